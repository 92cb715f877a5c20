"""NaN and infinite values: steps that have them do not reach the weights, and the layer where they begin is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from semseg.data.batch import Batch
from semseg.errors import SemsegError
from semseg.storage.atomic import atomic_write, entry_command
from semseg.training.callbacks.stop import Votes

NONFINITE_FOLDER = "nonfinite"  # in the run folder


class NonFiniteError(SemsegError):
    """The loss or the gradient of a step is NaN or infinite."""


class NonFiniteGuard(Callback):
    """Keeps steps with a NaN or infinite loss or gradient from the weights, on all ranks together.

    The sub-batch of such a step is saved for mode=replay. Up to `max_skipped` of them are skipped in a run,
    normalisation statistics included; the next one ends it, before the optimiser has moved.

    Args:
        run_dir: the folder of the run.
        max_skipped: trainer.max_nonfinite_steps.
        precision: trainer.precision.

    Raises:
        NonFiniteError: names the step, its files, learning rates and gradient norm, and the saved sub-batch.
    """

    def __init__(self, run_dir: Path, max_skipped: int, precision: str) -> None:
        self.folder = run_dir / NONFINITE_FOLDER
        self.max_skipped = max_skipped
        # A gradient scaler looks for infinite gradients of half precision itself, and skips them routinely.
        self.has_scaler = precision == "16-mixed"
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
        is_bad_here = not all(map(is_finite, losses)) or not (self.has_scaler or is_finite(norm))
        (is_bad,) = self._votes.maximum(is_bad_here)
        batches, self._batches, self._losses = self._batches, [], []
        if not is_bad:
            return
        step = trainer.global_step + 1
        self.skipped += 1
        path = self.save_batches(batches, step, trainer.global_rank)
        if is_bad_here:
            message = describe_bad_step(step, losses, norm, optimizer, batches)
        else:
            message = f"step {step}: the loss or the gradient of another rank is NaN or infinite."
        if self.skipped > self.max_skipped:
            command = f"{entry_command()} mode=replay ckpt=last input={path}"
            raise NonFiniteError(f"{message} The sub-batch is saved: {command}")
        rank_zero_warn(f"{message} The step is skipped ({self.skipped} of {self.max_skipped}).")
        optimizer.zero_grad(set_to_none=True)  # an optimiser ignores parameters without a gradient
        for name, value in pl_module.named_buffers():
            value.copy_(self._statistics[name])

    def save_batches(self, batches: list[Batch], step: int, rank: int) -> Path:
        """Write this rank's sub-batches of a step; returns the file."""
        path = self.folder / f"step_{step}_rank_{rank}.pt"
        content = {"step": step, "batches": [batch_to_dict(batch) for batch in batches]}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
        return path


def describe_bad_step(step: int, losses: list[float], norm: float, optimizer: Optimizer, batches: list[Batch]) -> str:
    """What is known about a step with a NaN or infinite loss or gradient, in one line."""
    rates = ", ".join(f"{group['lr']:.3g}" for group in optimizer.param_groups[::2])
    files = ", ".join(path for batch in batches for path in batch.paths)
    return (
        f"step {step}: the loss is {', '.join(f'{loss:g}' for loss in losses)} and the gradient norm {norm:g}, "
        f"at learning rates {rates}; images: {files}. Weights and checkpoints are unchanged."
    )


def is_finite(value: float) -> bool:
    return value - value == 0  # neither NaN nor infinite


def batch_to_dict(batch: Batch) -> dict[str, Any]:
    """A batch as torch.load(weights_only=True) can read it."""
    return {name: value.cpu() if isinstance(value, Tensor) else list(value) for name, value in batch._asdict().items()}


class NonFiniteLayer(NamedTuple):
    """The first layer of a network whose output is NaN or infinite."""

    name: str
    kind: str


def find_nonfinite_layer(net: torch.nn.Module, image: Tensor) -> NonFiniteLayer | None:
    """Run `net` on `image` and name the first layer whose output is NaN or infinite; None if there is none."""
    found: list[NonFiniteLayer] = []

    def check_output(name: str, kind: str, output: Any) -> None:
        tensors = (
            [output] if isinstance(output, Tensor) else [part for part in output or () if isinstance(part, Tensor)]
        )
        if not found and not all(bool(tensor.isfinite().all()) for tensor in tensors):
            found.append(NonFiniteLayer(name, kind))

    layers = {name: layer for name, layer in net.named_modules() if not list(layer.children())}
    handles = [
        layer.register_forward_hook(
            lambda layer, _, output, name=name: check_output(name, type(layer).__name__, output)
        )
        for name, layer in layers.items()
    ]
    try:
        net(image)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
