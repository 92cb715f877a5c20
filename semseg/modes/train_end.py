"""What follows a training run: its result, the modes of after_training, and the commands that use or continue it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import Strategy
from rich.console import Console

from semseg.build import create_predictor
from semseg.checkpoints.format import read_checkpoint
from semseg.config.override_keys import override_key
from semseg.config.schema import CheckpointConfig, Config, TrainerConfig
from semseg.modes.eval import evaluate_network
from semseg.modes.predict import predict_inputs
from semseg.storage.commands import entry_command, format_command, relative_to_cwd
from semseg.storage.run_folders import CHECKPOINT_FOLDER, choose_follow_up_folder
from semseg.storage.run_results import RunResult, write_result
from semseg.training.callbacks.report import REPORT_FILE
from semseg.training.resume import EarlyStop, end_fast_dev_run, list_early_stopping, removal_override
from semseg.training.trainer import use_one_device


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
    if stop := EarlyStop.from_trainer(trainer, config.callbacks):
        line = f"callbacks.{stop.name} ended the run after epoch {trainer.current_epoch}: {stop.reason}"
        console.print(line, soft_wrap=True, highlight=False, markup=False)
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

    Those whose folder was deleted are run again.

    Args:
        result: that of the run, as it was written.
        folders: gets the folder of each, by mode.
    """
    run_dir, done = Path(config.run_dir), dict(result.follow_ups)
    for mode in config.after_training:
        if mode not in done or not (run_dir / done[mode]).is_dir():
            folder = choose_follow_up_folder(run_dir, mode)
            run_follow_up(mode, config, checkpoint, folder)
            folders[mode], done[mode] = folder, folder.name
            write_result(run_dir, result._replace(follow_ups=tuple(done.items())))


def describe_earlier_follow_ups(config: Config, checkpoint: Path, result: RunResult) -> Iterator[str]:
    """Where the results of after_training are that were there before, and how to get others."""
    others = {
        "eval": ("the evaluation was", "with other settings", []),
        "predict": ("predictions were", "for other images", [f"input={config.input}"]),
    }
    for mode, folder in result.follow_ups:
        if mode in config.after_training:
            what, case, words = others[mode]
            command = format_command([f"mode={mode}", f"ckpt={relative_to_cwd(checkpoint)}", *words])
            yield f"{what} written to {relative_to_cwd(Path(config.run_dir, folder))}; {case}: {command}"


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
    """The command that resumes this run, with `further` overrides in place of those with the same keys.

    Without ckpt=<checkpoint>, from which the run resumed at first, and which would take it back there.

    Args:
        config: as `resolve_start` gives it.
    """
    last = [f"run_dir={relative_to_cwd(Path(config.run_dir))}", "resume=auto", *further]
    replaced = {word.partition("=")[0] for word in last}  # with their signs: ~a goes behind +a=1, and not in its place
    is_dropped = config.init_from is None  # else the network was trained elsewhere, and ckpt=<network> says which it is
    words = [word for word in overrides if not (is_dropped and override_key(word) == "ckpt")]
    kept = [word for word in words if word.partition("=")[0] not in replaced]
    return format_command([*kept, *last])
