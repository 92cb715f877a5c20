"""mode=train: fit one network, keep its best and last checkpoint, and print how to continue."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import Strategy
from rich.console import Console

from semseg.build import build_data, build_module, build_trainer, create_predictor, find_network
from semseg.checkpoints.atomic_io import find_damage, find_newest_intact, remove_leftovers
from semseg.checkpoints.format import (
    SavedNetwork,
    read_checkpoint,
    refuse_nonfinite_weights,
)
from semseg.checkpoints.from_hub import is_on_hub
from semseg.checkpoints.initialise import LoadReport, initialise_from
from semseg.checkpoints.network import build_network, check_network, report_one_size, without_weights
from semseg.checkpoints.published import find_published_files
from semseg.checks.recipe import list_chosen_options, read_recipe
from semseg.config.override_keys import split_override
from semseg.config.schema import (
    ARCHITECTURE_KEYS,
    AUTO_RANGE,
    ZOO_PREFIX,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainerConfig,
    config_to_plain,
    flatten_sections,
)
from semseg.data.band_statistics import measure_bands
from semseg.data.classes import ClassTable
from semseg.data.label_windows import LabelWindows, open_label
from semseg.data.overlap import find_overlap
from semseg.data.pairs import name_origin
from semseg.data.sources import DataSource, describe_named_splits, require_masks
from semseg.data.store import UnusedFiles
from semseg.datamodule import SegmentationData
from semseg.errors import CheckpointError, ConfigError, DataError
from semseg.lit_module import SegmentationModule
from semseg.modes.automatic import AutomaticChoice, choose_automatic
from semseg.modes.eval import evaluate_network
from semseg.modes.predict import predict_inputs
from semseg.nets.bands import inherit_convention
from semseg.nets.cost import measure_cost, write_cost
from semseg.nets.interfaces import SegmentationNetwork
from semseg.prediction.inputs import find_inputs
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import entry_command, format_command, relative_to_cwd, shorten_overrides
from semseg.storage.ranks import is_first_rank, print_once
from semseg.storage.run_folders import CHECKPOINT_FOLDER, choose_follow_up_folder, find_checkpoint
from semseg.storage.run_lock import hold_run_folder
from semseg.storage.run_results import RESULT_FILE, RunResult, read_result, write_result
from semseg.system.process import StopRequest
from semseg.system.processors import choose_num_workers
from semseg.system.text import format_quantity
from semseg.training.callbacks.console import build_config_tree
from semseg.training.callbacks.report import REPORT_FILE
from semseg.training.callbacks.stop import StoppedError, requeue
from semseg.training.loggers.external import log_settings
from semseg.training.losses import build_terms, read_class_weights
from semseg.training.resume import (
    RunState,
    check_same_conditions,
    check_same_run,
    end_fast_dev_run,
    list_early_stopping,
    read_run_state,
    removal_override,
)
from semseg.training.start_summary import LABEL_WIDTH, abbreviate_path, format_start, shorten_list
from semseg.training.trainer import use_one_device
from semseg.training.training_state import report_restore_errors

PIPE_WIDTH = 120  # characters of a line where there is no terminal
NUM_CHECKED_LABELS = 8  # before anything slow happens
# Prefixes of overrides that choose the network.
NETWORK_KEYS = (
    "model/", "model.library", "model.arch", "model.revision", "model.options", "model.encoder", "model.decoder",
)  # fmt: skip


def run(config: Config, overrides: list[str]) -> float | None:
    """Train; returns the best mean IoU on the validation images (None without validation).

    Raises:
        SemsegError: for any error that the user can fix.
    """
    source = DataSource(config.data)
    source.training_records()  # missing files are reported before anything slow happens
    if config.data.value_range == AUTO_RANGE:
        config = replace(config, data=measure_range(source))
        source = DataSource(config.data)
    run_dir = Path(config.run_dir)
    with lock_run_folder(run_dir):
        start = resolve_start(config, overrides, source)
        end = None if start.state is None else start.state.describe_end(start.config.trainer)
        if end is not None:
            print_once(end)
            result = read_result(run_dir)
            if result is not None:
                checkpoint = find_best_checkpoint(run_dir)
                if is_first_rank() and checkpoint is not None:
                    run_follow_ups(start.config, checkpoint, result, {})
                return result.score
            # Killed after its last step, before it finished: fit takes no step, and the rest follows.
        if "predict" in config.after_training and config.input and config.input != "-":
            # What is missing is reported now, not after training.
            find_inputs(config.input, choose_follow_up_folder(run_dir, "predict"), unused=UnusedFiles())
        return train_network(start, overrides, source)


# ---- the start


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
        path = find_checkpoint(config.ckpt, Path(config.runs_dir), prefer=("last", "best"))
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
    settings: dict[str, Any] = {}
    for key, value in map(split_override, overrides):
        if key == "experiment" and value not in ("", "null"):
            recipe = read_recipe(value.strip("\"'"))
            settings |= list_chosen_options(recipe) | dict(flatten_sections(recipe))
        else:
            settings[key] = value
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
    later = [path for path in (folder / "last.ckpt", folder / "best.ckpt") if (read_step(path) or 0) > state.step]
    later += [path for path in sorted(folder.glob("step_*.ckpt")) if int(path.stem.partition("_")[2]) > state.step]
    for path in later:
        names = (f"{path.name}.discarded{number or ''}" for number in itertools.count())
        target = next(folder / name for name in names if not (folder / name).exists())
        path.rename(target)
        print_once(f"{path}: is of a later step, which is discarded; renamed to {target.name}")
    if later:
        with atomic_write(folder / "last.ckpt") as temporary:
            shutil.copyfile(state.path, temporary)


def read_step(path: Path) -> int | None:
    """The step of a checkpoint; None if there is none, or it is damaged."""
    return read_checkpoint(path).step if path.is_file() and find_damage(path) is None else None


def is_requeued() -> bool:
    """Whether SLURM runs the command line again, of which `resume=<file>` is for the first time only."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def copy_best_checkpoint(state: RunState, folder: Path) -> None:
    """Copy best.ckpt from beside the resumed checkpoint, if the run has another folder now."""
    best, target = state.path.parent / "best.ckpt", folder / "best.ckpt"
    step = None if target.exists() else read_step(best)
    if step is None or step > state.step:
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


# ---- training


def measure_range(source: DataSource) -> DataConfig:
    """The configuration of the data with the values that data.value_range=auto stands for, which are printed.

    Raises:
        DataError: if no image of train can be read.
    """
    data = source.config
    measured = measure_bands(source.training_records(), source.bands_of("train"), data.max_pixels)
    settings = measured.suggest(data)
    print_once(f"data.value_range=auto: {' '.join(f'{key}={value}' for key, value in settings.items())}")
    return measured.apply(data)


def check_records(source: DataSource, world_size: int) -> None:
    """Report unused files and images that are in two splits, and refuse data that cannot be trained on.

    Raises:
        DataError: if train is smaller than one step, or val has images without a mask.
    """
    records, batch_size = source.training_records(), source.config.batch_size
    if len(records) < batch_size * world_size:
        raise DataError(
            f"data.train has {len(records)} images, one step takes {batch_size * world_size}: "
            f"data.batch_size={batch_size} on {world_size} devices. Lower one of them."
        )
    print_once(source.describe_unused("train"))
    for part in source.parts:
        print_once(part.describe_unused())
    if source.has("val"):
        require_masks("val", source.records("val"))
        print_once(source.describe_unused("val"))
    if keys := source.find_named_splits():
        print_once(f"warning: {describe_named_splits(keys)}")
    common = find_overlap(records, source.records("val")) if source.has("val") else None
    if common is not None:
        print_once(f"warning: {common}")


def check_first_labels(source: DataSource, max_pixels: int) -> None:
    """Read a few labels of train, so that a wrong number of classes is reported before anything slow happens.

    Raises:
        DataError: if one cannot be read, or has an id that is neither a class nor ignored.
    """
    records = [record for record in source.training_records() if record.label]
    for record in records[:: -(-len(records) // NUM_CHECKED_LABELS) or 1]:
        try:
            with open_label(record.label or "", record.label_map or source.label_map, max_pixels=max_pixels) as label:
                if isinstance(label, LabelWindows):
                    for _ in label.read_bands():  # which checks the ids
                        pass
        except DataError as error:
            raise name_origin(record, error) from error


def find_own_loss(net: SegmentationNetwork, config: Config, overrides: list[str]) -> str:
    """What the start says about a loss that the network has of its own; empty if it has none.

    A loss that comes with the data set or the recipe is for other networks.

    Raises:
        ConfigError: if the command line has a loss that this network would not use.
    """
    if not net.has_own_loss:
        return ""
    words = [word for word in overrides if re.match(r"\+*loss[.=]", word)]
    given = next((word for word in words if word != "loss=cross_entropy"), None)
    kind = "classes and masks, matched to each other"
    if given is not None and config.loss != LossConfig():
        raise ConfigError(
            f"{given}: has no effect, because {config.model.title} has a loss of its own ({kind}). Leave loss out."
        )
    return f"the network's own: {kind}"


def name_classes(start: Start, source: DataSource) -> None:
    """Give classes without names (data.classes=null) those that the run had, or those of its initial weights."""
    model, given = start.config.model, start.config.data
    names: ClassTable | None = None
    if given.classes is not None:
        return
    if start.state is not None:
        names = start.state.classes
    elif model.library == "transformers" and start.network is None:
        from semseg.nets.libraries.description import describe_hub_network  # noqa: PLC0415 - an extra

        names = describe_hub_network(model.name, model.revision, start.config.download).class_table
    if names is not None and names.num_classes == source.classes.num_classes:
        source.classes = names


def train_network(start: Start, overrides: list[str], source: DataSource) -> float | None:
    """Fit from `start` to the end of the run; returns the best score."""
    config, choices, state = start.config, start.choices, start.state
    run_dir = Path(config.run_dir)
    name_classes(start, source)
    if state is None:
        config, choices = choose_automatic(config, overrides, source)
    pl.seed_everything(config.seed, verbose=False)
    trainer = build_trainer(config, source)
    check_records(source, trainer.world_size)
    if start.network is not None:
        check_network(start.network)
        refuse_nonfinite_weights(start.network.weights, start.network.source)
    if state is None and config.data.on_bad == "error":
        check_first_labels(source, config.data.max_pixels)  # before ImageNet weights are downloaded
    model = config.model if start.kind == "scratch" else without_weights(config.model)
    net = build_network(model, source.classes.num_classes, config.download, source.bands)
    own_loss = find_own_loss(net, config, overrides)
    library = {"config": net.library_config, "revision": net.revision or config.model.revision}
    config = replace(config, model=replace(config.model, **library))
    report_one_size(net, config.model)
    data = build_data(config, source, net)
    data.trainer = trainer  # as trainer.fit does
    plain = config_to_plain(config)
    if state is not None:
        for line in check_same_conditions(state, plain, data.run_conditions(), force=config.resume_force):
            print_once(line)
        if trainer.is_global_zero:
            prepare_checkpoint_folder(state, run_dir / CHECKPOINT_FOLDER, config.resume)
    console = Console(quiet=not trainer.is_global_zero)
    log_settings(trainer.loggers, plain)
    loaded = None
    if start.network is not None:
        print_once(start.network.note)
        loaded = initialise_from(net, start.network)
        net.origin = start.network.origin
        if config.model.convention == "auto":
            net.convention = inherit_convention(start.network.convention, source.bands)
    if trainer.is_global_zero:
        write_config(run_dir, plain)
        cost = measure_cost(deepcopy(net).to("meta"))
        write_cost(run_dir / "model.txt", cost)
        if config.verbose:
            print_details(console, plain, overrides, start, loaded)
        width = console.width if console.is_terminal else PIPE_WIDTH
        rows = {
            "network": f"{config.model.title}: {cost}",
            "weights": describe_weights(start, loaded, data),
            "loss": own_loss,
            **describe_data(source, width - LABEL_WIDTH),
            **describe_steps(config, trainer, data),
            **({} if state is not None else describe_validation(config.trainer, data)),
            "automatic": ", ".join(map(str, choices)),
            "run folder": str(relative_to_cwd(run_dir)),
        }
        for line in format_start(rows, shorten_overrides(overrides), width):
            console.print(line, soft_wrap=True)
    module = build_module(config, net, source.classes)
    if not fit_network(trainer, module, data, start, overrides):
        return None
    result = best_result(trainer)
    finish(config, overrides, trainer, console, result)
    return result.score


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Write the configuration of a run that begins or resumes, and remove the result of an earlier end."""
    (run_dir / RESULT_FILE).unlink(missing_ok=True)
    with atomic_write(run_dir / "config.yaml") as temporary:
        OmegaConf.save(OmegaConf.create(config), temporary)


def fit_network(
    trainer: pl.Trainer, module: SegmentationModule, data: SegmentationData, start: Start, overrides: list[str]
) -> bool:
    """Fit, and say what to do about a run that stops; returns False if a job of SLURM will resume it.

    Raises:
        DataError: for an image that cannot be read, with the key that leaves it out.
        StoppedError: if the run was stopped, with the command that resumes it.
    """
    config = start.config
    try:
        with report_restore_errors(trainer, path := start.state.path if start.state else None):
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    except DataError as error:
        if config.data.on_bad == "skip":
            raise
        advice = "To train without images that are damaged or do not fit, give data.on_bad=skip."
        raise DataError(f"{error} {advice}") from error
    except StopRequest:  # a second Ctrl-C, or one before the first step: no checkpoint is written now
        print_once(describe_last_checkpoint(config, overrides))
        raise
    except StoppedError as stopped:
        job = requeue(stopped.number, is_first_rank=trainer.is_global_zero)
        if job is not None:
            print_once(f"{stopped} SLURM job {job} is requeued and will resume by itself.")
            return False
        raise StoppedError(f"{stopped} To resume: {resume_command(config, overrides)}", stopped.number) from None
    return True


# ---- what is printed, and what follows


def print_details(
    console: Console, config: dict[str, Any], overrides: list[str], start: Start, loaded: LoadReport | None
) -> None:
    """Print what verbose=true adds: the whole configuration, and every weight that was not loaded.

    Args:
        config: the configuration of the run as plain data.
        loaded: the weights that were loaded from `start.network`.
    """
    console.print(build_config_tree(config, overrides))
    if start.network is not None and loaded is not None:
        console.print(loaded.make_table(start.network.source))


def describe_weights(start: Start, loaded: LoadReport | None, data: SegmentationData) -> str:
    """Whether the run is new or resumes, and from which weights."""
    if start.state is not None:
        conditions, accumulate = data.run_conditions(), start.config.trainer.accumulate_grad_batches
        step = start.state.compute_resume_step(accumulate, conditions.batches_per_epoch)
        return f"resuming from {relative_to_cwd(start.state.path)} at step {step} of {conditions.total_steps}"
    if start.network is not None and loaded is not None:
        return f"a new run from {start.network.source}: {loaded.describe()}"
    weights = start.config.model.encoder.get("weights") or "none"
    sources = {"none": "random", "imagenet": "encoder from ImageNet"}
    return f"a new run: {sources.get(weights, f'encoder from {weights}')}"


def describe_data(source: DataSource, width: int) -> dict[str, str]:
    """The images and classes of a run, in two rows.

    Args:
        width: of a line in characters; names that do not fit are left out.
    """
    names, ids, ignored = source.classes.names, source.label_map.class_ids, source.label_map.ignored_ids
    unscored = shorten_list([str(raw_id) for raw_id in ignored], width // 3) or "none"
    start, end = f"{len(names)}: ", f"; not scored: {unscored}"
    listed = shorten_list(
        [f"{raw_id} {name}" for raw_id, name in zip(ids, names, strict=True)], width - len(start + end)
    )
    images = f"{source.config.name}: {format_quantity(len(source.records('train')), 'image')} to train"
    if source.has("val"):
        images = f"{images}, {len(source.records('val'))} to validate"
    root = relative_to_cwd(Path(source.root))
    return {
        "data": f"{images}, in {abbreviate_path(str(root), width - len(images) - len(', in '))}",
        **describe_mix(source, width),
        "classes": f"{start}{listed}{end}",
    }


def describe_mix(source: DataSource, width: int) -> dict[str, str]:
    """The shares of the data sets of data.mix, in a row; none without them.

    Args:
        width: of a line in characters.
    """
    if not source.parts:
        return {}
    counts = Counter(record.source for record in source.training_records())
    rows = [f"{source.shares[0]:.0%} of the images from {source.config.name}"]
    for part in source.parts:
        root = abbreviate_path(str(relative_to_cwd(Path(part.source.root))), max(12, width // 3))
        rows.append(f"{part.share:.0%} from {format_quantity(counts[part.number], 'image')} in {root}")
    return {"mix": ", ".join(rows)}


def describe_steps(config: Config, trainer: pl.Trainer, data: SegmentationData) -> dict[str, str]:
    """What a step takes, and how many there are, in two rows."""
    sizes, limits, conditions = config.data, config.trainer, data.run_conditions()
    edges = "/".join(map(str, sizes.short_edges))
    view = f"short edges {edges}, long edges up to {sizes.max_long_edge}"
    if data.is_native:
        height, width = data.crop or (0, 0)
        view = f"native resolution, crops of {height} x {width}, {data.foreground:.0%} around a pixel of a class"
    parts = [format_quantity(sizes.batch_size, "image")]
    if trainer.world_size > 1:
        parts.append(f"on each of {trainer.world_size} devices")
    if limits.accumulate_grad_batches > 1:
        parts.append(f"x {limits.accumulate_grad_batches} accumulated")
    steps = math.ceil(conditions.batches_per_epoch / limits.accumulate_grad_batches)
    warm_up = config.schedule.warmup_steps if config.schedule.name != "poly" else 0
    unreached = f" (all of them warm-up: schedule.warmup_steps={warm_up})" if warm_up >= conditions.total_steps else ""
    workers = choose_num_workers(sizes.num_workers, trainer.num_devices)
    return {
        "batch": f"{' '.join(parts)}, {view}, "
        f"padded to multiples of {data.size_divisor}, labels at 1/{data.label_stride}",
        "training": f"{format_quantity(conditions.total_steps, 'step')}{unreached}, {steps} an epoch"
        f", {config.optim.name} with lr {config.optim.lr:g}, {config.loss.terms.formula}"
        f", {limits.precision} on {conditions.accelerator}, {format_quantity(workers, 'worker')}",
    }


def describe_validation(limits: TrainerConfig, data: SegmentationData) -> dict[str, str]:
    """A row that says why a run with validation images is never validated; none if it is."""
    conditions = data.run_conditions()
    first = math.ceil(conditions.batches_per_epoch / limits.accumulate_grad_batches) * limits.check_val_every_n_epoch
    is_validated = first <= conditions.total_steps or limits.fast_dev_run
    if is_validated or limits.limit_val_batches == 0 or not data.source.has("val"):
        return {}
    reason = f"the run ends at step {conditions.total_steps} and the first would be after step {first}"
    key = f"trainer.check_val_every_n_epoch={limits.check_val_every_n_epoch}"
    return {"validation": f"none, because {reason}: no score, no best.ckpt, no report ({key})"}


def best_result(trainer: pl.Trainer) -> RunResult:
    """The score by which best.ckpt was chosen; without validation there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            return RunResult(float(callback.best_model_score), callback.monitor, callback.mode)
    return RunResult()


def finish(config: Config, overrides: list[str], trainer: pl.Trainer, console: Console, result: RunResult) -> None:
    """Run the follow-ups of training, then print paths and commands. On rank 0 only; the others return."""
    is_first, memory = trainer.is_global_zero, measure_peak_memory(trainer.strategy)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if not is_first:
        return
    run_dir = Path(config.run_dir)
    write_result(run_dir, result)
    checkpoint = find_best_checkpoint(run_dir)
    if checkpoint is None:
        console.print("no checkpoint was written")
        return
    folders: dict[str, Path] = {}
    try:
        run_follow_ups(config, checkpoint, result, folders)
    finally:  # the network is there, whatever became of its evaluation
        command = resume_command(config, overrides, *overrides_to_continue(config.trainer, config.callbacks, trainer))
        for line in closing_lines(config, checkpoint, result, folders, memory=memory, command=command):
            console.print(line, soft_wrap=True, highlight=False, markup=False)  # commands must survive copying


def measure_peak_memory(strategy: Strategy) -> int | None:
    """The most bytes that were allocated on the GPU of a rank; None without GPUs. To be called on every rank."""
    device = strategy.root_device
    if device.type != "cuda":
        return None
    peak = torch.tensor(torch.cuda.max_memory_allocated(device), device=device)
    return int(strategy.reduce(peak, reduce_op="max"))


def find_best_checkpoint(run_dir: Path) -> Path | None:
    """best.ckpt, or last.ckpt without validation; None if there is neither."""
    paths = [run_dir / CHECKPOINT_FOLDER / name for name in ("best.ckpt", "last.ckpt")]
    return next((path for path in paths if path.is_file()), None)


def run_follow_ups(config: Config, checkpoint: Path, result: RunResult, folders: dict[str, Path]) -> None:
    """Run the modes of after_training that `result` does not name, and add each to the result once it is complete.

    Args:
        result: that of the run, as it was written.
        folders: gets the folder of each, by mode.
    """
    run_dir, done = Path(config.run_dir), dict(result.follow_ups)
    for mode in config.after_training:
        if mode not in done:
            folder = choose_follow_up_folder(run_dir, mode)
            run_follow_up(mode, config, checkpoint, folder)
            folders[mode], done[mode] = folder, folder.name
            write_result(run_dir, result._replace(follow_ups=tuple(done.items())))


def run_follow_up(mode: str, config: Config, checkpoint: Path, folder: Path) -> None:
    """Evaluate the checkpoint or predict with it, in a folder of its own below the run folder."""
    trainer = use_one_device(config.trainer)
    after = replace(config, mode=mode, ckpt=str(checkpoint), run_dir=str(folder), trainer=trainer)
    saved = read_checkpoint(checkpoint)
    if mode == "eval":
        evaluate_network(saved, after)
    else:
        predict_inputs(create_predictor(saved, after), after)


def overrides_to_continue(limits: TrainerConfig, callbacks: Mapping[str, Any], trainer: pl.Trainer) -> list[str]:
    """Overrides with which a finished run continues: larger limits, or without early stopping.

    Args:
        limits, callbacks: the sections of the run.
        trainer: has trained it.
    """
    if limits.fast_dev_run:
        words = end_fast_dev_run(limits)
        if 0 < limits.max_steps <= trainer.global_step:
            words.append(f"trainer.max_steps={2 * limits.max_steps}")
        return words
    words = []
    steps_per_epoch = math.ceil(trainer.num_training_batches / limits.accumulate_grad_batches)
    if trainer.global_step >= limits.max_epochs * steps_per_epoch:
        words.append(f"trainer.max_epochs={2 * limits.max_epochs}")
    if 0 < limits.max_steps <= trainer.global_step:
        words.append(f"trainer.max_steps={2 * limits.max_steps}")
    if trainer.should_stop:
        words += [removal_override(name) for name in list_early_stopping(callbacks)]
    return words


def closing_lines(
    config: Config,
    checkpoint: Path,
    result: RunResult,
    folders: Mapping[str, Path],
    *,
    memory: int | None,
    command: str,
) -> list[str]:
    """The best score, the paths of the results, and the commands that use them.

    Args:
        folders: those of the follow-ups, by mode.
        memory: of the GPU with the highest peak, in bytes; None: there was no GPU.
        command: the command that continues training.
    """
    run_dir, ckpt = (shlex.quote(str(relative_to_cwd(path))) for path in (Path(config.run_dir), checkpoint))
    name = "mean IoU" if result.monitor == CheckpointConfig.monitor else result.monitor
    lines = [] if result.score is None else [f"{f'best {name}':15} {result.score:.4f} on the validation images"]
    if memory is not None:
        lines.append(f"peak GPU memory {memory / 2**30:.2f} GiB")
    lines += [f"checkpoint      {ckpt}", f"log             {run_dir}/logs"]
    if (Path(config.run_dir) / REPORT_FILE).is_file():  # which the first validation writes
        lines.append(f"report          {run_dir}/{REPORT_FILE}")
    lines += [f"{mode:15} {shlex.quote(str(relative_to_cwd(folder)))}" for mode, folder in folders.items()]
    return [
        *lines,
        f"to evaluate     {entry_command()} mode=eval ckpt={ckpt}",
        f"to predict      {entry_command()} mode=predict ckpt={ckpt} input=<image or folder>",
        f"to continue     {command}",
    ]


def describe_last_checkpoint(config: Config, overrides: list[str]) -> str | None:
    """The last checkpoint that was written before training was interrupted, and the command that resumes it."""
    last = Path(config.run_dir) / CHECKPOINT_FOLDER / "last.ckpt"
    if not last.is_file():
        return None
    return f"The last checkpoint is {relative_to_cwd(last)}. To resume: {resume_command(config, overrides)}"


def resume_command(config: Config, overrides: list[str], *further: str) -> str:
    """The command that resumes this run, with `further` overrides in place of those with the same keys."""
    last = [f"run_dir={relative_to_cwd(Path(config.run_dir))}", "resume=auto", *further]
    replaced = {word.partition("=")[0] for word in last}  # with their signs: ~a goes behind +a=1, and not in its place
    kept = [word for word in overrides if word.partition("=")[0] not in replaced]
    return format_command([*kept, *last])
