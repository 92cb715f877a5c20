"""Sub-batches that do not fit into memory: found before training starts, and reported with images, sizes and keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.optim import AdamW, Optimizer

from semseg.data.batch import Batch, EvalSample
from semseg.data.geometry import Size
from semseg.system.memory import report_out_of_memory_as


def report_out_of_memory(batch: Batch) -> AbstractContextManager[None]:
    """A context in which running out of memory is an OutOfMemoryError that describes `batch`, with the keys."""

    def describe() -> str:
        count, _, height, width = batch.image.shape
        return (
            f"out of memory on a sub-batch of {count} images of {height} x {width} pixels ({', '.join(batch.paths)}). "
            "Lower data.batch_size, data.crop, data.max_long_edge or the largest of data.short_edges, or set "
            "trainer.precision=bf16-mixed."
        )

    return report_out_of_memory_as(describe)


def report_out_of_memory_in_evaluation(samples: Sequence[EvalSample]) -> AbstractContextManager[None]:
    """A context in which running out of memory is an OutOfMemoryError with images, their largest scale and keys."""

    def describe() -> str:
        sizes = [Size(*scale.shape[1:]) for scale in samples[0].scales]
        largest = max(sizes, key=math.prod, default=Size(*samples[0].size.tolist()))
        return (
            f"out of memory evaluating {', '.join(sample.path for sample in samples)} at up to {largest} pixels. Lower "
            "eval.batch_size or the largest of eval.scales, or set eval.window or trainer.precision=bf16-mixed."
        )

    return report_out_of_memory_as(describe)


class ProbeMemory(Callback):
    """Runs the largest sub-batch that the plan can give before training starts, forward and backward.

    What does not fit into memory then shows in the first minute instead of the first night. Nothing is trained:
    gradients are discarded, and normalisation statistics restored.

    Args:
        policy: trainer.probe_memory: always, never, or gpu for GPUs only.

    Raises:
        OutOfMemoryError: if it does not fit.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_enabled = {"always": True, "never": False, "gpu": pl_module.device.type == "cuda"}[self.policy]
        if not is_enabled:
            return
        batch: Batch = trainer.datamodule.largest_batch()  # pyright: ignore[reportAttributeAccessIssue]
        batch = batch._replace(**{
            name: value.to(pl_module.device) for name, value in batch._asdict().items() if isinstance(value, Tensor)
        })  # fmt: skip
        # A compiled network is split into the parts whose gradients DDP exchanges together only inside of its forward
        # pass, and the graphs of this first pass are those of all others. (A private part of PyTorch: without it, the
        # exchange does not overlap the backward pass.)
        ddp_forward = getattr(trainer.strategy.model, "_inside_ddp_forward", nullcontext)()
        with report_out_of_memory(batch), trainer.precision_plugin.forward_context(), ddp_forward:
            # Gradients, the buckets of DDP and the moving average are there already, or are created by the run.
            missing = sum(map(count_missing_state_bytes, trainer.optimizers))
            reserved = torch.empty(missing, dtype=torch.uint8, device=pl_module.device)
            run_without_trace(pl_module, batch)
            del reserved


def count_missing_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the state that an optimiser allocates at its first step: momentum of SGD, two moments of AdamW."""
    copies = 2 if isinstance(optimizer, AdamW) else int(bool(optimizer.defaults.get("momentum")))
    missing = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {}).values()
            there = sum(value.nbytes for value in state if isinstance(value, Tensor) and value.shape == parameter.shape)
            missing += max(0, copies * parameter.nbytes - there)
    return missing


def run_without_trace(module: pl.LightningModule, batch: Batch) -> None:
    """Run a sub-batch forward and backward and leave no trace: no gradient, no statistics, no random number drawn.

    Raises:
        torch.OutOfMemoryError: if it does not fit into memory.
    """
    statistics = {name: value.clone() for name, value in module.named_buffers()}
    weights = [value for value in module.parameters() if value.requires_grad]
    device = module.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            loss = module.compute_loss(batch, average="ranks").total  # pyright: ignore[reportCallIssue]
        with torch.autocast(device.type, enabled=False):
            # Not backward(): hooks that average gradients over ranks are for real steps.
            torch.autograd.grad(loss, weights, allow_unused=True)
    finally:
        torch.clear_autocast_cache()  # its copies of the weights belong to a graph that no longer exists
        for name, value in module.named_buffers():
            value.copy_(statistics[name])
