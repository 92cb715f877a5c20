"""Guards around the steps: numbers that are no numbers, and sub-batches that do not fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from semseg.config.schema import TrainerConfig
from semseg.data.batch import Batch
from semseg.data.datasets import EvalSample
from semseg.data.geometry import Size
from semseg.errors import SemsegError
from semseg.storage.atomic import atomic_write, entry_command
from semseg.training.callbacks.stop import Votes

FOLDER = "nonfinite"  # in the run folder


class NonFiniteError(SemsegError):
    """The loss or the gradient of a step is NaN or infinite."""


class NonFiniteGuard(Callback):
    """Keeps steps with a NaN or infinite loss or gradient from the weights, on all ranks together.

    The sub-batch of such a step is saved for mode=replay. Up to `trainer.max_nonfinite_steps` of them are skipped
    in a run, normalisation statistics included; the next one ends it, before the optimiser has moved.

    Raises:
        NonFiniteError: names step, files, learning rates and gradient norm, and the saved sub-batch.
    """

    def __init__(self, run_dir: Path, config: TrainerConfig) -> None:
        self.folder = run_dir / FOLDER
        self.max_skipped = config.max_nonfinite_steps
        # A scaler looks for infinite gradients of half precision itself, and skips them as a matter of course.
        self.has_scaler = config.precision == "16-mixed"
        self.skipped = 0
        self._votes: Votes | None = None
        self._batches: list[Batch] = []  # since the last step of the optimiser
        self._losses: list[Tensor] = []
        self._statistics: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._votes = Votes(trainer.world_size)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.max_skipped and not self._batches:
            self._statistics = {name: value.clone() for name, value in pl_module.named_buffers()}
        self._batches.append(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert self._votes is not None, "on_fit_start comes first"
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        norm = float(get_total_norm(gradients))
        losses = [float(loss) for loss in self._losses]
        mine = not all(map(is_finite, losses)) or not (self.has_scaler or is_finite(norm))
        (is_bad,) = self._votes.largest(mine)
        batches, self._batches, self._losses = self._batches, [], []
        if not is_bad:
            return
        step = trainer.global_step + 1
        self.skipped += 1
        saved = self.save(batches, step, trainer.global_rank)
        told = self.describe(step, losses, norm, optimizer, batches) if mine else f"step {step}: another rank's loss"
        if self.skipped > self.max_skipped:
            command = f"{entry_command()} mode=replay ckpt=last input={saved}"
            raise NonFiniteError(f"{told} The sub-batch is saved: {command}")
        rank_zero_warn(f"{told} The step is skipped ({self.skipped} of {self.max_skipped}).")
        optimizer.zero_grad(set_to_none=True)  # an optimiser leaves alone what has no gradient
        for name, value in pl_module.named_buffers():
            value.copy_(self._statistics[name])

    def save(self, batches: list[Batch], step: int, rank: int) -> Path:
        """Write this rank's sub-batches of a step; returns the file."""
        path = self.folder / f"step_{step}_rank_{rank}.pt"
        content = {"step": step, "batches": [as_plain_batch(batch) for batch in batches]}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
        return path

    def describe(self, step: int, losses: list[float], norm: float, optimizer: Optimizer, batches: list[Batch]) -> str:
        """What there is to know about a bad step, in one line."""
        rates = ", ".join(f"{group['lr']:.3g}" for group in optimizer.param_groups[::2])
        files = ", ".join(path for batch in batches for path in batch.paths)
        return (
            f"step {step}: the loss is {', '.join(f'{loss:g}' for loss in losses)} and the gradient's norm {norm:g}, "
            f"at learning rates {rates}; images: {files}. Weights and checkpoints are untouched."
        )


def is_finite(value: float) -> bool:
    return value - value == 0  # neither NaN nor infinite


def as_plain_batch(batch: Batch) -> dict[str, Any]:
    """A batch as torch.load(weights_only=True) opens it again."""
    return {name: value.cpu() if isinstance(value, Tensor) else list(value) for name, value in batch._asdict().items()}


class ProbeMemory(Callback):
    """Runs the largest sub-batch that the plan can give before training starts, forward and backward.

    What does not fit into memory then shows in the first minute instead of the first night. Nothing is trained:
    gradients are thrown away, and normalisation statistics put back.

    Raises:
        OutOfMemory: if it does not fit.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self.config = config

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_wanted = {"always": True, "never": False, "gpu": pl_module.device.type == "cuda"}[self.config.probe_memory]
        if not is_wanted:
            return
        batch: Batch = trainer.datamodule.largest_batch()  # pyright: ignore[reportAttributeAccessIssue]
        batch = batch._replace(**{
            name: value.to(pl_module.device) for name, value in batch._asdict().items() if isinstance(value, Tensor)
        })  # fmt: skip
        with out_of_memory_told(batch), trainer.precision_plugin.forward_context():
            try_out(pl_module, batch)


def try_out(module: pl.LightningModule, batch: Batch) -> None:
    """Run a sub-batch forward and backward and leave no trace: no gradient, no statistics, no random number drawn.

    Raises:
        torch.OutOfMemoryError: if it does not fit into memory.
    """
    statistics = {name: value.clone() for name, value in module.named_buffers()}
    weights = [value for value in module.parameters() if value.requires_grad]
    device = module.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss = module.losses(batch, average="ranks").total  # pyright: ignore[reportCallIssue]
        with torch.autocast(device.type, enabled=False):
            # Not backward(): hooks that average gradients over ranks are for real steps.
            torch.autograd.grad(loss, weights, allow_unused=True)
    finally:
        torch.clear_autocast_cache()  # its copies of the weights belong to the graph that is gone
        for name, value in module.named_buffers():
            value.copy_(statistics[name])


class Culprit(NamedTuple):
    """The first layer of a network that gave something else than numbers."""

    name: str
    kind: str


def first_nonfinite(net: torch.nn.Module, image: Tensor) -> Culprit | None:
    """Run `net` on `image` and name the first layer whose output is not finite; None if all are."""
    found: list[Culprit] = []

    def look(name: str, kind: str, output: Any) -> None:
        tensors = (
            [output] if isinstance(output, Tensor) else [part for part in output or () if isinstance(part, Tensor)]
        )
        if not found and not all(bool(tensor.isfinite().all()) for tensor in tensors):
            found.append(Culprit(name, kind))

    leaves = {name: layer for name, layer in net.named_modules() if not list(layer.children())}
    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: look(name, type(layer).__name__, output))
        for name, layer in leaves.items()
    ]
    try:
        net(image)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


class OutOfMemory(SemsegError):  # noqa: N818 - torch's own name for it
    """A sub-batch does not fit into the memory of the device."""

    def __init__(self, batch: Batch, error: torch.OutOfMemoryError) -> None:
        count, _, height, width = batch.image.shape
        super().__init__(
            f"out of memory on a sub-batch of {count} images of {height} x {width} pixels ({', '.join(batch.paths)}). "
            "Lower data.batch_size, data.max_long_edge or the largest of data.short_edges, or set "
            f"trainer.precision=bf16-mixed. The device said: {said(error)}"
        )


def said(error: torch.OutOfMemoryError) -> str:
    """The first line of what the device says."""
    return (str(error).splitlines() or ["nothing"])[0][:160]


@contextmanager
def out_of_memory_in_evaluation_told(samples: Sequence[EvalSample]) -> Iterator[None]:
    """While inside, running out of memory is told with the images, their largest scale and the keys.

    Raises:
        SemsegError: in place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        largest = max((Size(*scale.shape[1:]) for scale in samples[0].scales), key=math.prod)
        raise SemsegError(
            f"out of memory evaluating {', '.join(sample.path for sample in samples)} at up to {largest} pixels. Lower "
            "eval.batch_size or the largest of eval.scales, or set eval.window or trainer.precision=bf16-mixed. The "
            f"device said: {said(error)}"
        ) from None


@contextmanager
def out_of_memory_told(batch: Batch) -> Iterator[None]:
    """While inside, running out of memory is told as an OutOfMemory on `batch`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(batch, error) from None
