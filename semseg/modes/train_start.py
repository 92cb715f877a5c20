"""What a training run starts from: its own checkpoint, other weights, or nothing; and its folder."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from semseg.build import find_network
from semseg.checkpoints.atomic_io import find_damage, find_newest_intact, remove_leftovers
from semseg.checkpoints.format import SavedNetwork, load_plain
from semseg.checkpoints.from_hub import is_on_hub
from semseg.checkpoints.published import find_published_files
from semseg.config.override_keys import split_override
from semseg.config.recipes import find_experiment, list_chosen_options, read_recipe
from semseg.config.schema import ARCHITECTURE_KEYS, ZOO_PREFIX, Config, ModelConfig, config_to_plain, flatten_sections
from semseg.data.sources import DataSource
from semseg.errors import CheckpointError
from semseg.modes.automatic import AutomaticChoice, choose_automatic
from semseg.storage.atomic import atomic_write
from semseg.storage.ranks import is_first_rank, print_once
from semseg.storage.run_folders import CHECKPOINT_FOLDER, expand_path, find_checkpoint
from semseg.storage.run_lock import hold_run_folder
from semseg.training.losses import build_terms, read_class_weights
from semseg.training.resume import RunConditions, RunState, count_taken, read_run_state
from semseg.training.same_run import check_same_run
from semseg.training.training_state import find_invalid_entries

# Prefixes of overrides that choose the network.
NETWORK_KEYS = (
    "model/", "model.library", "model.arch", "model.revision", "model.options", "model.encoder", "model.decoder",
)  # fmt: skip


class Start(NamedTuple):
    """What a run starts from: a checkpoint of the same run, other weights, or nothing."""

    config: Config  # the configuration of the run, with everything that the start decides
    state: RunState | None = None  # the run to resume
    network: SavedNetwork | None = None  # the weights to initialise a new run from
    choices: Sequence[AutomaticChoice] = ()  # what a run that resumes keeps for keys that are `auto`

    @property
    def kind(self) -> str:
        """resume, init or scratch."""
        return "resume" if self.state else "init" if self.network else "scratch"


def resolve_start(config: Config, overrides: list[str], source: DataSource) -> Start:
    """What `ckpt`, `resume` and `init_from` amount to, with the configuration that follows from it.

    ckpt=<checkpoint> resumes its run; ckpt=<published files> initialises a new one. The network is that of the initial
    weights unless the command line chooses another, and class weights are read from their file, which may change later.

    Raises:
        CheckpointError: if a checkpoint is missing, damaged or holds no optimiser.
        ConfigError: if the checkpoint belongs to another run, the file of class weights holds none, or `loss` does not
            fit the classes.
    """
    if config.ckpt is not None and is_trained_elsewhere(config.ckpt):
        config = replace(config, ckpt=None, init_from=config.ckpt)
    elif config.ckpt is not None:
        path = find_checkpoint(config.ckpt, expand_path(config.runs_dir), prefer=("last", "best"))
        config = replace(config, ckpt=None, resume=str(path))
    weights = config.loss.class_weights
    if isinstance(weights, str):
        config = replace(config, loss=replace(config.loss, class_weights=read_class_weights(weights)))
    build_terms(config.loss, source.classes.num_classes)  # the module does it again, after much else
    network = find_network(config.init_from, config, overrides, "init_from") if config.init_from else None
    if network is not None and not chooses_network(overrides):
        config = replace(config, model=adopt_network(config.model, network.config.model))
    path = find_resume_checkpoint(config.resume, Path(config.run_dir))
    if path is None:
        return Start(config, network=network)
    state = read_run_state(path, config.trainer, config.callbacks, has_val=source.has("val"))
    if config.model.label_stride == "auto" and state.config["model"]["label_stride"] is None:
        # A run of a version in which null was the default.
        config = replace(config, model=replace(config.model, label_stride=None))
    if not config.model.config:  # written by the run, which saw the files of the library
        saved = state.config["model"]
        library = {"config": saved.get("config", {}), "revision": config.model.revision or saved.get("revision")}
        config = replace(config, model=replace(config.model, **library))
    config, choices = choose_automatic(config, overrides, source, state.config)
    print_once(
        check_same_run(
            state,
            config_to_plain(config),
            classes=source.classes,
            decodes_colours=source.label_map.colours is not None,
            force=config.resume_force,
        )
    )
    return Start(config, state=state, choices=choices)


def is_trained_elsewhere(ckpt: str) -> bool:
    """Whether `ckpt` names a network without the state of a training run."""
    return ckpt.startswith(ZOO_PREFIX) or is_on_hub(ckpt) or find_published_files(ckpt) is not None


def chooses_network(overrides: list[str]) -> bool:
    """Whether the command line chooses the network to train, itself or by a recipe."""
    experiment = find_experiment(overrides)
    recipe = read_recipe(experiment) if experiment else {}
    settings: dict[str, Any] = list_chosen_options(recipe) | dict(flatten_sections(recipe))
    settings |= dict(map(split_override, overrides))
    whatever_it_is = {"model.encoder.frozen": settings.get("model.encoder.frozen"), "model.encoder.weights": "none"}
    return any(
        key == "model" or (key.startswith(NETWORK_KEYS) and (key, value) not in whatever_it_is.items())
        for key, value in settings.items()
    )


def adopt_network(model: ModelConfig, network: ModelConfig) -> ModelConfig:
    """`model` with the architecture of `network`, and its own settings of training."""
    frozen = {"frozen": model.encoder.get("frozen", False)}
    chosen = {key: getattr(network, key) for key in ARCHITECTURE_KEYS}
    return replace(model, **chosen, encoder=network.encoder | frozen)


def find_resume_checkpoint(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint for the key `resume`, or None for a new run.

    Raises:
        CheckpointError: if the file does not exist, or no checkpoint of the run is intact.
    """
    if resume is None:
        return None
    folder = run_dir / CHECKPOINT_FOLDER
    last = folder / "last.ckpt"
    if resume != "auto" and not (is_requeued() and last.is_file()):
        path = Path(resume).expanduser()
        if not path.is_file():
            raise CheckpointError(f"resume={resume}: there is no such file.")
        return path
    if last.is_file() and find_damage(last) is None:
        return last
    newest = find_newest_intact(folder)
    if newest.passed_over and newest.path is None:
        damages = "; ".join(f"{damaged.path.name}: {damaged.reason}" for damaged in newest.passed_over)
        raise CheckpointError(
            f"resume=auto: no checkpoint in {folder} is intact ({damages}). Delete them, or start a new run with "
            "resume=null."
        )
    for damaged in newest.passed_over:
        print_once(f"{damaged.path}: {damaged.reason}; resuming from {newest.path} instead")
    return newest.path


def prepare_checkpoint_folder(state: RunState, folder: Path, resume: str | None) -> None:
    """Set aside what does not belong to a run that resumes from `state`, and add its best checkpoint."""
    if resume != "auto" and not is_requeued():
        set_aside_checkpoints(state, folder)
    copy_best_checkpoint(state, folder)


def set_aside_checkpoints(state: RunState, folder: Path) -> None:
    """Rename the checkpoints of later steps than that of `state`, which a run that goes back in its folder discards.

    Otherwise, they would count as its best one, and as its newest, which is the one of `state` now.
    """
    found = [folder / "last.ckpt", folder / "best.ckpt", *sorted(folder.glob("step_*.ckpt"))]
    later = [path for path in found if (read_taken(path) or 0) > state.taken]
    for path in later:
        names = (f"{path.name}.discarded{number or ''}" for number in itertools.count())
        target = next(folder / name for name in names if not (folder / name).exists())
        path.rename(target)
        print_once(f"{path}: is of a later step, which is discarded; renamed to {target.name}")
    if later:
        with atomic_write(folder / "last.ckpt") as temporary:
            shutil.copyfile(state.path, temporary)


def read_taken(path: Path) -> int | None:
    """The sub-batches that a run had taken when it wrote a checkpoint; None if there is none, or it is damaged."""
    if not path.is_file() or find_damage(path) is not None:
        return None
    content = load_plain(path)
    if next(find_invalid_entries(content), None) is not None:
        return None
    return count_taken(content, RunConditions.from_checkpoint(content))


def is_requeued() -> bool:
    """Whether SLURM runs the command line again, of which `resume=<file>` is for the first time only."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def copy_best_checkpoint(state: RunState, folder: Path) -> None:
    """Copy best.ckpt from beside the resumed checkpoint, if the run has another folder now."""
    best, target = state.path.parent / "best.ckpt", folder / "best.ckpt"
    taken = None if target.exists() else read_taken(best)
    if taken is None or taken > state.taken:
        return  # a best.ckpt of a later step is one that this run has not reached yet
    with atomic_write(target) as temporary:
        shutil.copyfile(best, temporary)


@contextmanager
def lock_run_folder(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, on rank 0, and remove what a killed run left in it."""
    if not is_first_rank():
        yield
        return
    with hold_run_folder(run_dir) as takeover:
        print_once(takeover)
        for folder in (run_dir, run_dir / CHECKPOINT_FOLDER, run_dir / "logs"):
            remove_leftovers(folder)
        yield
