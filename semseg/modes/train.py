"""mode=train: fit one network, keep its best and last checkpoint, say how to go on."""

from __future__ import annotations

import importlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from semseg.build import build_net, build_trainer
from semseg.checkpoint import FOLDER
from semseg.config import Config, as_plain
from semseg.data.sources import DataSource
from semseg.datamodule import SegmentationData
from semseg.errors import CheckpointError
from semseg.launch import RESULT_FILE
from semseg.lit_module import SegmentationModule
from semseg.nets.segmenter import Segmenter


def run(config: Config, overrides: list[str]) -> float | None:
    """Train; returns the best mean IoU on the validation images (None without validation).

    Raises:
        SemsegError: for anything the user can mend.
    """
    source = DataSource(config.data)
    records = source.records("train")  # missing files are told before anything slow happens
    pl.seed_everything(config.seed, verbose=False)
    net = build_net(config.model, source.classes.num_classes)
    trainer = build_trainer(config, source)
    data = SegmentationData(source, config, net)
    module = SegmentationModule(net, config, source.classes)
    console = Console(quiet=not trainer.is_global_zero)
    run_dir = Path(config.run_dir)
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(as_plain(config)), run_dir / "config.yaml")
    console.print(start_table(config, net, len(records)))
    trainer.fit(module, datamodule=data, ckpt_path=resume_path(config, run_dir, console))
    if config.trainer.max_steps > 0 and not config.trainer.fast_dev_run:
        trainer.save_checkpoint(run_dir / FOLDER / "last.ckpt")  # max_steps may end inside an epoch
    score = best_score(trainer)
    finish(config, overrides, trainer, console, score)
    return score


def resume_path(config: Config, run_dir: Path, console: Console) -> Path | None:
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
    path = run_dir / FOLDER / "last.ckpt"
    if path.is_file():
        console.print(f"going on from {path}")
        return path
    console.print(f"resume=auto: no checkpoint in {run_dir} yet, so this run starts afresh")
    return None


def start_table(config: Config, net: Segmenter, num_records: int) -> Table:
    """What is about to run, in one look."""
    table = Table(title="training", show_header=False)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    data = config.data
    rows = {
        "network": f"{config.model.name}: {parameters / 1e6:.1f} M parameters, {net.num_classes} classes",
        "strides": f"images padded to {net.size_divisor}, labels at 1/{net.label_stride}",
        "data": f"{data.name}: {num_records} images in {data.root}",
        "sub-batch": f"{data.batch_size} images per device, short edges {data.short_edges}",
        "run folder": config.run_dir,
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def best_score(trainer: pl.Trainer) -> float | None:
    """The monitored score of best.ckpt, or None."""
    scores = [getattr(callback, "best_model_score", None) for callback in trainer.checkpoint_callbacks]
    found = [float(score) for score in scores if score is not None]
    return max(found, default=None)


def finish(config: Config, overrides: list[str], trainer: pl.Trainer, console: Console, score: float | None) -> None:
    """Run what comes after training, then tell paths and commands. Rank 0 only; the others leave."""
    is_first = trainer.is_global_zero
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if not is_first:
        return
    run_dir = Path(config.run_dir)
    (run_dir / RESULT_FILE).write_text(json.dumps({"score": score, "monitor": "val/miou"}) + "\n")
    checkpoint = next((path for path in checkpoint_paths(run_dir) if path.is_file()), None)
    if checkpoint is None:
        console.print("no checkpoint was written")
        return
    for mode in config.after_training:
        follow_up(mode, config, checkpoint)
    for line in last_lines(config, overrides, checkpoint, score):
        console.print(line, soft_wrap=True, highlight=False)  # commands must survive copying


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """Where the checkpoints of a run are, the best one first."""
    return [run_dir / FOLDER / name for name in ("best.ckpt", "last.ckpt")]


def follow_up(mode: str, config: Config, checkpoint: Path) -> None:
    """Run another mode on the checkpoint, in a folder of its own below the run folder."""
    one_device = replace(config.trainer, devices=1, num_nodes=1, strategy="auto")
    after = replace(
        config, mode=mode, ckpt=str(checkpoint), run_dir=str(Path(config.run_dir) / mode), trainer=one_device
    )
    importlib.import_module(f"semseg.modes.{mode}").run(after, ["data", "eval"])


def last_lines(config: Config, overrides: list[str], checkpoint: Path, score: float | None) -> list[str]:
    """Where everything is, and the exact commands to go on."""
    run_dir, ckpt = (shlex.quote(str(from_here(path))) for path in (Path(config.run_dir), checkpoint))
    kept = [word for word in overrides if word.partition("=")[0] not in ("run_dir", "resume", "trainer.max_epochs")]
    again = " ".join([*map(shlex.quote, kept), f"run_dir={run_dir}"])
    lines = [] if score is None else [f"best mean IoU   {score:.4f} on the validation images"]
    if torch.cuda.is_available():
        lines.append(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    lines += [f"checkpoint      {ckpt}", f"log             {run_dir}/logs"]
    lines += [f"{mode:15} {run_dir}/{mode}" for mode in config.after_training]
    return [
        *lines,
        f"to evaluate     python run.py mode=eval ckpt={ckpt}",
        f"to predict      python run.py mode=predict ckpt={ckpt} input=<image or folder>",
        f"to train on     python run.py {again} resume=auto trainer.max_epochs={2 * config.trainer.max_epochs}",
    ]


def from_here(path: Path) -> Path:
    """`path` relative to the working directory if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
