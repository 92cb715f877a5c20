"""mode=train: fit one network, keep its best and last checkpoint, say how to go on."""

from __future__ import annotations

import importlib
import math
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from rich.console import Console
from rich.table import Table
from rich.text import Text

from semseg.build import build_net, build_trainer, check_network, find_network, tell, without_weights
from semseg.checkpoints.atomic_io import find_damage, find_newest_intact, remove_leftovers
from semseg.checkpoints.format import (
    CHECKPOINT_FOLDER,
    SavedNetwork,
    find_checkpoint,
    read_checkpoint,
    refuse_nonfinite_weights,
)
from semseg.checkpoints.initialise import initialise_from
from semseg.checkpoints.published import find_published_files
from semseg.config.schema import ZOO_PREFIX, Config, ModelConfig, config_to_plain
from semseg.data.overlap import find_overlap
from semseg.data.sources import DataSource, describe_split_folders, require_masks
from semseg.datamodule import SegmentationData
from semseg.errors import CheckpointError, DataError
from semseg.lit_module import SegmentationModule
from semseg.nets.cost import NetworkCost, measure_cost, write_cost
from semseg.nets.segmenter import Segmenter
from semseg.storage.atomic import atomic_write, entry_command, relative_to_cwd
from semseg.storage.ranks import is_first_rank
from semseg.storage.run_lock import RunLock
from semseg.storage.run_results import RESULT_FILE, RunResult, read_result, write_result
from semseg.system.text import escape_unprintable
from semseg.training.callbacks.console import config_tree
from semseg.training.callbacks.stop import StoppedError, requeue
from semseg.training.loggers.external import log_settings
from semseg.training.losses import read_class_weights
from semseg.training.resume import (
    RunState,
    check_same_facts,
    check_same_run,
    early_stopping_callbacks,
    read_run_state,
    without_callback,
)
from semseg.training.training_state import restoring

NETWORK_KEYS = ("model/", "model.encoder", "model.decoder")


def run(config: Config, overrides: list[str]) -> float | None:
    """Train; returns the best mean IoU on the validation images (None without validation).

    Raises:
        SemsegError: for anything the user can mend.
    """
    source = DataSource(config.data)
    source.records("train")  # missing files are told before anything slow happens
    config = with_numbers(with_meaning_of_ckpt(config))
    saved = find_network(config.init_from, config, overrides) if config.init_from else None
    if saved is not None and not sets_network(overrides):
        config = replace(config, model=with_network(config.model, saved.config.model))
    with locked(Path(config.run_dir)):
        state = state_to_resume(config, source)
        reason = None if state is None else state.why_finished(config)
        if reason is not None:
            tell(reason)
            result = read_result(Path(config.run_dir))
            if result is not None:
                return result.score
            # Killed between its last step and the end: no step is left to take, the rest is.
        return train(config, overrides, source, saved, state)


def check_records(config: Config, source: DataSource, world_size: int) -> None:
    """Count files that are not used, warn of images that are in two splits, and refuse what cannot be trained on.

    Raises:
        DataError: if train is smaller than one step, or val has images without a mask.
    """
    records, needed = source.records("train"), config.data.batch_size * world_size
    if len(records) < needed:
        raise DataError(
            f"data.train has {len(records)} images, one step takes {needed}: "
            f"data.batch_size={config.data.batch_size} on {world_size} devices. Lower one of them."
        )
    tell(source.describe_unused("train"))
    if source.has("val"):
        require_masks("val", source.records("val"))
        tell(source.describe_unused("val"))
    if keys := source.find_split_folders():
        tell(f"warning: {describe_split_folders(keys)}")
    common = find_overlap(records, source.records("val")) if source.has("val") else None
    if common is not None:
        tell(f"warning: {common}")


def train(
    config: Config, overrides: list[str], source: DataSource, saved: SavedNetwork | None, state: RunState | None
) -> float | None:
    """Fit from the start, from the weights `saved`, or from where a run is; returns the best score."""
    run_dir = Path(config.run_dir)
    pl.seed_everything(config.seed, verbose=False)
    trainer = build_trainer(config, source)
    check_records(config, source, trainer.world_size)
    if saved is not None:
        check_network(saved)
        refuse_nonfinite_weights(saved.weights, saved.source)
    has_weights = saved is not None or state is not None
    model = without_weights(config.model) if has_weights else config.model
    net = build_net(model, source.classes.num_classes, config.download)
    data = SegmentationData(source, config, net)
    data.trainer = trainer  # as trainer.fit does
    if state is not None:
        for line in check_same_facts(state, config, data.facts()):
            tell(line)
        tell(f"going on from {state.path}")
        if trainer.is_global_zero:
            bring_best_along(state, run_dir / CHECKPOINT_FOLDER)
    console = Console(quiet=not trainer.is_global_zero)
    log_settings(trainer.loggers, config)
    if trainer.is_global_zero:
        (run_dir / RESULT_FILE).unlink(missing_ok=True)  # of an earlier end
        with atomic_write(run_dir / "config.yaml") as temporary:
            OmegaConf.save(OmegaConf.create(config_to_plain(config)), temporary)
        cost = measure_cost(deepcopy(net).to("meta"))
        write_cost(run_dir / "model.txt", cost)
        console.print(config_tree(config, overrides), start_table(config, net, source, cost))
    if saved is not None and state is None:
        tell(saved.note)
        console.print(initialise_from(net, saved).make_table(saved.source))
        if config.model.convention == "auto":
            net.convention = saved.convention
    module = SegmentationModule(net, config, source.classes)
    try:
        with restoring(trainer, path := state.path if state else None):
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    except StoppedError as stopped:
        job = requeue(stopped.number, is_first_rank=trainer.is_global_zero)
        if job is not None:
            tell(f"{stopped} SLURM job {job} is requeued and will go on by itself.")
            return None
        raise StoppedError(f"{stopped} To go on: {command_to_go_on(config, overrides)}", stopped.number) from None
    result = best_result(trainer)
    finish(config, overrides, trainer, console, result)
    return result.score


def state_to_resume(config: Config, source: DataSource) -> RunState | None:
    """Where the run to go on with is; None for a fresh start.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or holds no optimiser.
        ConfigError: if the run was another one.
    """
    path = resume_path(config)
    if path is None:
        if config.resume == "auto":
            tell(f"no checkpoint in {config.run_dir} yet: this run starts afresh")
        return None
    state = read_run_state(path, config, has_val=source.has("val"))
    tell(check_same_run(state, config, num_classes=source.classes.num_classes) or "")
    return state


def bring_best_along(state: RunState, folder: Path) -> None:
    """Copy best.ckpt from beside the resumed checkpoint, if that is in another folder than the run has now."""
    best, target = state.path.parent / "best.ckpt", folder / "best.ckpt"
    if target.exists() or find_damage(best) is not None or read_checkpoint(best).step > state.step:
        return  # or it is of steps that this run has not taken yet
    with atomic_write(target) as temporary:
        shutil.copyfile(best, temporary)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, on rank 0, and clear away what a killed run left in it."""
    if not is_first_rank():
        yield
        return
    with RunLock(run_dir) as lock:
        tell(lock.takeover or "")
        for folder in (run_dir / CHECKPOINT_FOLDER, run_dir / "logs"):
            remove_leftovers(folder)
        yield


def with_meaning_of_ckpt(config: Config) -> Config:
    """In training, ckpt=<checkpoint of ours> goes on with its run, and published files are where a new one starts.

    Raises:
        CheckpointError: if there is no such checkpoint.
    """
    if config.ckpt is None:
        return config
    if config.ckpt.startswith(ZOO_PREFIX) or find_published_files(config.ckpt) is not None:
        return replace(config, ckpt=None, init_from=config.ckpt)
    path = find_checkpoint(config.ckpt, Path(config.runs_dir), prefer=("last", "best"))
    return replace(config, ckpt=None, resume=str(path))


def with_numbers(config: Config) -> Config:
    """The configuration with class weights as numbers: they belong to the run, their file may change.

    Raises:
        ConfigError: if the file does not hold any.
    """
    weights = config.loss.class_weights
    if not isinstance(weights, str):
        return config
    return replace(config, loss=replace(config.loss, class_weights=read_class_weights(weights)))


def with_network(model: ModelConfig, network: ModelConfig) -> ModelConfig:
    """`model` with the encoder and the decoder of `network`; how they are trained stays."""
    frozen = {"frozen": model.encoder.get("frozen", False)}
    return replace(model, name=network.name, encoder=network.encoder | frozen, decoder=network.decoder)


def sets_network(overrides: list[str]) -> bool:
    """Whether the command line says which network to train."""
    keys = [word.lstrip("+").partition("=")[0] for word in overrides]
    return any(
        key in ("model", "experiment") or (key.startswith(NETWORK_KEYS) and key != "model.encoder.frozen")
        for key in keys
    )


def resume_path(config: Config) -> Path | None:
    """The checkpoint that `resume` means, or None for a fresh start.

    Raises:
        CheckpointError: if a file is named that is not there.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume).expanduser()
        if not path.is_file():
            raise CheckpointError(f"resume={config.resume}: there is no such file.")
        return path
    folder = Path(config.run_dir) / CHECKPOINT_FOLDER
    last = folder / "last.ckpt"
    if last.is_file() and find_damage(last) is None:
        return last
    newest = find_newest_intact(folder)
    if newest.passed_over and newest.path is None:
        told = "; ".join(f"{damaged.path.name}: {damaged.reason}" for damaged in newest.passed_over)
        raise CheckpointError(
            f"resume=auto: no checkpoint in {folder} is intact ({told}). Delete them, or start afresh with resume=null."
        )
    for damaged in newest.passed_over:
        tell(f"{damaged.path}: {damaged.reason}; going on from {newest.path} instead")
    return newest.path


def start_table(config: Config, net: Segmenter, source: DataSource, cost: NetworkCost) -> Table:
    """What is about to run, in one look."""
    table = Table(title="training", show_header=False)
    data = config.data
    rows = {
        "network": f"{network_name(config.model)}: {cost}, {net.num_classes} classes",
        "strides": f"images padded to {net.size_divisor}, labels at 1/{net.label_stride}",
        "data": f"{data.name}: {len(source.records('train'))} images in {data.root}",
        "labels": source.label_map.describe(source.classes.names),
        "sub-batch": f"{data.batch_size} images per device, short edges {data.short_edges}",
        "run folder": config.run_dir,
    }
    for name, value in rows.items():
        table.add_row(name, Text(escape_unprintable(value)))
    return table


def network_name(model: ModelConfig) -> str:
    """Encoder and decoder, since either may have been exchanged in a model of another name."""
    return f"{model.encoder['name']} + {model.decoder['name']}"


def best_result(trainer: pl.Trainer) -> RunResult:
    """The score by which best.ckpt was chosen; without validation there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            return RunResult(float(callback.best_model_score), callback.monitor, callback.mode)
    return RunResult()


def finish(config: Config, overrides: list[str], trainer: pl.Trainer, console: Console, result: RunResult) -> None:
    """Run what comes after training, then tell paths and commands. Rank 0 only; the others leave."""
    is_first = trainer.is_global_zero
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if not is_first:
        return
    run_dir = Path(config.run_dir)
    write_result(run_dir, result)
    checkpoint = next((path for path in checkpoint_paths(run_dir) if path.is_file()), None)
    if checkpoint is None:
        console.print("no checkpoint was written")
        return
    for mode in config.after_training:
        follow_up(mode, config, checkpoint)
    again = command_to_go_on(config, overrides, *words_to_train_on(config, trainer))
    for line in last_lines(config, checkpoint, result.score, again):
        console.print(line, soft_wrap=True, highlight=False, markup=False)  # commands must survive copying


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """Where the checkpoints of a run are, the best one first."""
    return [run_dir / CHECKPOINT_FOLDER / name for name in ("best.ckpt", "last.ckpt")]


def follow_up(mode: str, config: Config, checkpoint: Path) -> None:
    """Run another mode on the checkpoint, in a folder of its own below the run folder."""
    one_device = replace(config.trainer, devices=1, num_nodes=1, strategy="auto")
    after = replace(
        config, mode=mode, ckpt=str(checkpoint), run_dir=str(Path(config.run_dir) / mode), trainer=one_device
    )
    importlib.import_module(f"semseg.modes.{mode}").run(after, ["data", "eval"])


def words_to_train_on(config: Config, trainer: pl.Trainer) -> list[str]:
    """What to add to the command line of a run that has ended, so that what has ended it does so no more."""
    limits, words = config.trainer, []
    steps_per_epoch = math.ceil(trainer.num_training_batches / limits.accumulate_grad_batches)
    if trainer.global_step >= limits.max_epochs * steps_per_epoch:
        words.append(f"trainer.max_epochs={2 * limits.max_epochs}")
    if 0 < limits.max_steps <= trainer.global_step:
        words.append(f"trainer.max_steps={2 * limits.max_steps}")
    if trainer.should_stop:
        words += [without_callback(name) for name in early_stopping_callbacks(config)]
    return words


def last_lines(config: Config, checkpoint: Path, score: float | None, again: str) -> list[str]:
    """Where everything is, and the exact commands to go on.

    Args:
        again: the command that trains on.
    """
    run_dir, ckpt = (shlex.quote(str(relative_to_cwd(path))) for path in (Path(config.run_dir), checkpoint))
    lines = [] if score is None else [f"best mean IoU   {score:.4f} on the validation images"]
    if torch.cuda.is_available():
        lines.append(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    lines += [f"checkpoint      {ckpt}", f"log             {run_dir}/logs"]
    lines += [f"{mode:15} {run_dir}/{mode}" for mode in config.after_training]
    return [
        *lines,
        f"to evaluate     {entry_command()} mode=eval ckpt={ckpt}",
        f"to predict      {entry_command()} mode=predict ckpt={ckpt} input=<image or folder>",
        f"to train on     {again}",
    ]


def command_to_go_on(config: Config, overrides: list[str], *further: str) -> str:
    """The exact command that goes on with this run, with `further` words in the place of those with the same keys."""
    last = [f"run_dir={relative_to_cwd(Path(config.run_dir))}", "resume=auto", *further]
    replaced = {word.partition("=")[0] for word in last}
    kept = [word for word in overrides if word.partition("=")[0] not in replaced]
    return " ".join([entry_command(), *map(shlex.quote, [*kept, *last])])
