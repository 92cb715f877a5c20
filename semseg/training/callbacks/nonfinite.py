"""NaN and infinite values: steps that have them do not reach the weights, and the layer where they begin is found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from semseg.data.batch import Batch
from semseg.errors import SemsegError
from semseg.nets.gpu import copies_without_waiting
from semseg.storage.atomic import atomic_write
from semseg.storage.commands import format_command
from semseg.storage.run_folders import CHECKPOINT_FOLDER
from semseg.training.callbacks.step_reduction import StepReduction

NONFINITE_FOLDER = "nonfinite"  # in the run folder
OVERFLOWS = "amp/overflows"  # in the log
# After as many, the factor of the gradient scaler has fallen from 2**16 to 2**-24: the gradients are not too large.
MAX_OVERFLOWS_IN_A_ROW = 40


class NonFiniteError(SemsegError):
    """The loss or the gradient of a step is NaN or infinite."""


class Step(NamedTuple):
    """A step of the optimiser whose loss and gradient may be NaN or infinite."""

    number: int
    batches: list[Batch]  # this rank's
    seeds: list[int]  # of torch's generators before each of them, which decide dropout
    rates: list[float]  # the learning rate of each part of the network
    values: Tensor  # on the host: the sums over the ranks, bad on this rank, gradient norm, losses of the sub-batches
    is_copied: torch.Event | None  # recorded when `values` are there; None: they are


class NonFiniteGuard(Callback):
    """Keeps steps with a NaN or infinite loss or gradient from the weights, on all ranks together.

    The sub-batch of such a step is saved for mode=replay. Up to `max_skipped` of them are skipped in a run,
    normalisation statistics included; the next one ends it, before the optimiser has moved.

    With a fused optimiser the host does not wait for the loss: the device leaves out the update, and the step is
    reported one step later, before a checkpoint is written, or before validation. The ranks agree in one reduction on
    the device, in which the numbers of other callbacks travel as well.

    Args:
        run_dir: the folder of the run.
        max_skipped: trainer.max_nonfinite_steps.
        reduction: sums integers of other callbacks over the ranks at every step.

    Raises:
        NonFiniteError: names the step, its files, learning rates and gradient norm, and the saved sub-batch.
    """

    def __init__(self, run_dir: Path, max_skipped: int, reduction: StepReduction | None = None) -> None:
        self.folder = run_dir / NONFINITE_FOLDER
        self.max_skipped = max_skipped
        self.has_scaler = False
        self.skipped = 0
        self.overflows = 0  # steps that the gradient scaler skipped
        self._overflows_in_a_row = 0
        self._rank = self._world_size = self._total_steps = 0
        self._batches: list[Batch] = []  # since the last step of the optimiser
        self._seeds: list[int] = []
        self._losses: list[Tensor] = []
        self._statistics: dict[str, Tensor] = {}
        self._unread: Step | None = None
        self._reduction = reduction or StepReduction()
        self._reduction.flush = self.read_last_step

    def state_dict(self) -> dict[str, Any]:
        self.read_last_step()  # a checkpoint counts all steps before it, and holds no statistics of a bad one
        return {"skipped": self.skipped, "overflows": self.overflows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.overflows = state_dict["skipped"], state_dict.get("overflows", 0)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._total_steps = int(trainer.estimated_stepping_batches)
        # A gradient scaler looks for infinite gradients of half precision itself, and skips them routinely.
        self.has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.max_skipped and not self._batches:
            self._statistics = {name: value.clone() for name, value in pl_module.named_buffers()}
        self._batches.append(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        # A gradient scaler and the accumulation of gradients have multiplied the one to differentiate.
        unscaled, loss = pl_module.step_metrics[-1][0], loss.detach()  # pyright: ignore[reportIndexIssue]
        self._losses.append(torch.where(loss.isfinite(), unscaled.to(loss), loss))
        self._seeds.append(torch.initial_seed())  # that of SeedEveryStep

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        norm = get_total_norm(gradients).to(pl_module.device)
        norm = norm.to(torch.promote_types(norm.dtype, torch.float32))
        losses = torch.stack(self._losses).to(norm)
        is_bad_here = ~losses.isfinite().all() | ~(torch.ones_like(norm) if self.has_scaler else norm).isfinite()
        sums = torch.cat([is_bad_here.float().view(1), self._reduction.collect(is_bad_here.float())])
        if self._world_size > 1:  # ranks agree on the device, without waiting for it
            dist.all_reduce(sums)
        is_bad = (sums[0] > 0).float()  # fused kernels compare it with 1
        values = torch.cat([sums.to(norm), torch.stack([is_bad_here.to(norm), norm]), losses])
        # A part has a group with weight decay and one without, or either of them.
        rates = {str(group.get("name")).removesuffix("_no_decay"): group["lr"] for group in optimizer.param_groups}
        numbers = [*map(float, rates.values())]
        step = Step(trainer.global_step + 1, self._batches, self._seeds, numbers, *copy_to_host(values))
        self._batches, self._seeds, self._losses = [], [], []
        if optimizer.defaults.get("fused"):
            self.read_last_step()
            self._unread = step
            optimizer.found_inf = is_bad  # pyright: ignore[reportAttributeAccessIssue] - fused kernels look for it
            for name, value in pl_module.named_buffers() if self.max_skipped else ():
                value.copy_(torch.where(is_bad > 0, self._statistics[name], value))
            return
        if self.read_step(step):
            optimizer.zero_grad(set_to_none=True)  # an optimiser ignores parameters without a gradient
            for name, value in pl_module.named_buffers():
                value.copy_(self._statistics[name])

    def read_counts(self) -> dict[str, int]:
        return {OVERFLOWS: self.overflows} if self.has_scaler else {}

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read_last_step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.read_last_step()

    def read_last_step(self) -> None:
        """Read and report the last step of a fused optimiser, if that has not been done."""
        step, self._unread = self._unread, None
        if step is not None:
            self.read_step(step)

    def read_step(self, step: Step) -> bool:
        """Whether a step was skipped, which is reported.

        Raises:
            NonFiniteError: if it is one too many.
        """
        if step.is_copied is not None:
            step.is_copied.synchronize()
        num_bad, *values = step.values.tolist()
        sums, (is_bad_here, norm, *losses) = values[: self._reduction.length], values[self._reduction.length :]
        self._reduction.dispatch(step.number, sums)
        if not num_bad:
            self._overflows_in_a_row = 0 if math.isfinite(norm) else self._overflows_in_a_row + 1
            if self._overflows_in_a_row <= MAX_OVERFLOWS_IN_A_ROW:
                if self._overflows_in_a_row:
                    self.count_overflow(step.number)
                return False
            is_bad_here = True  # whatever the scale is
        self.skipped += 1
        path = self.save_batches(step)
        if is_bad_here:
            message = describe_bad_step(step, losses, norm)
        else:
            message = f"step {step.number}: the loss or the gradient of another rank is NaN or infinite."
        if self.skipped > self.max_skipped:
            last = self.folder.parent / CHECKPOINT_FOLDER / "last.ckpt"
            ckpt = f"ckpt={last}" if last.is_file() else "ckpt=<checkpoint>"
            command = format_command(["mode=replay", ckpt, f"input={path}"])
            raise NonFiniteError(f"{message} The sub-batch is saved: {command}")
        rank_zero_warn(f"{message} The step is skipped ({self.skipped} of {self.max_skipped}).")
        return True

    def count_overflow(self, step: int) -> None:
        """Count a step that the gradient scaler of trainer.precision=16-mixed skips, and report the first one."""
        self.overflows += 1
        if self.overflows == 1:
            rank_zero_warn(
                f"step {step}: gradients overflow in half precision. The gradient scaler skips such a step and lowers "
                f"its factor; {OVERFLOWS} in the log counts them."
            )

    def save_batches(self, step: Step) -> Path:
        """Write this rank's sub-batches of a step; returns the file."""
        path = self.folder / f"step_{step.number}_rank_{self._rank}.pt"
        batches = [batch_to_dict(batch) for batch in step.batches]
        content = {
            "step": step.number, "total_steps": self._total_steps, "batches": batches, "seeds": step.seeds
        }  # fmt: skip
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
        return path


def copy_to_host(values: Tensor) -> tuple[Tensor, torch.Event | None]:
    """A copy on the host that may be incomplete, and the event after which it is complete; None: it is."""
    is_async = copies_without_waiting(values.device)
    copy = values.to("cpu", non_blocking=is_async)
    if not is_async:
        return copy, None
    event = torch.Event(device=values.device)
    event.record()
    return copy, event


def describe_bad_step(step: Step, losses: list[float], norm: float) -> str:
    """What is known about a step with a NaN or infinite loss or gradient, in one line."""
    rates = ", ".join(f"{rate:.3g}" for rate in step.rates)
    files = ", ".join(path for batch in step.batches for path in batch.paths)
    return (
        f"step {step.number}: the loss is {', '.join(f'{loss:g}' for loss in losses)} and the gradient norm {norm:g}, "
        f"at learning rates {rates}; images: {files}. Weights and checkpoints are unchanged."
    )


def batch_to_dict(batch: Batch) -> dict[str, Any]:
    """A batch as torch.load(weights_only=True) can read it."""
    return {name: value.cpu() if isinstance(value, Tensor) else list(value) for name, value in batch._asdict().items()}


class NonFiniteLayer(NamedTuple):
    """A layer of a network whose output is NaN or infinite."""

    name: str
    kind: str


@contextmanager
def watch_layers(net: torch.nn.Module) -> Iterator[list[NonFiniteLayer]]:
    """Watch the outputs of `net` in this context; the list gets the layers that give NaN or infinity, in order."""
    found: list[NonFiniteLayer] = []

    def check_output(name: str, layer: torch.nn.Module, output: Any) -> None:
        tensors = [part for part in tree_leaves(output) if isinstance(part, Tensor)]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            found.append(NonFiniteLayer(name, type(layer).__name__))

    layers = [(name, layer) for name, layer in net.named_modules() if not list(layer.children())]
    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: check_output(name, layer, output))
        for name, layer in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
