"""Sub-batches that do not fit into memory are found early and reported with images, sizes and keys."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from helpers.in_process import prepare_run
from semseg.config.schema import OptimConfig
from semseg.data import images
from semseg.data.batch import Batch
from semseg.errors import OutOfMemoryError, SemsegError
from semseg.lit_module import SegmentationModule
from semseg.nets.registry import build_segmenter
from semseg.training.callbacks import out_of_memory
from semseg.training.callbacks.ema import MovingAverage
from semseg.training.callbacks.out_of_memory import ProbeMemory, count_missing_state_bytes
from semseg.training.losses import Loss
from semseg.training.optim import build_optimizer

pytestmark = pytest.mark.reliability


LARGE = 48 * 48  # pixels of a canvas, at least, at a short edge of 48; at 32 it is smaller


def no_memory_for_large(monkeypatch: pytest.MonkeyPatch, large: int = LARGE) -> list[int]:
    """A device on which a canvas of `large` pixels does not fit; returns the numbers of pixels that were tried."""
    tried: list[int] = []
    compute_loss = SegmentationModule.compute_loss

    def compute_small(module: SegmentationModule, batch: Batch, average: str) -> Loss:
        tried.append(batch.image[0, 0].numel())
        if tried[-1] >= large:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return compute_loss(module, batch, average)

    monkeypatch.setattr(SegmentationModule, "compute_loss", compute_small)
    return tried


def test_d3_out_of_memory_is_reported_with_sizes_and_keys(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_memory_for_large(monkeypatch)
    with pytest.raises(OutOfMemoryError) as caught:
        prepare_run(root, tmp_path, "data.short_edges=[48]").fit()
    message = str(caught.value)
    assert re.search(r"2 images of \d+ x \d+ pixels \(\S+\.jpg, ", message)
    assert all(key in message for key in ("data.batch_size", "data.max_long_edge", "data.short_edges", "20.00 GiB"))
    assert "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_d3_an_image_that_memory_is_too_small_for_is_not_reported_as_broken(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, on_bad: str
) -> None:
    def full(*args: object, **settings: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_decode_by_opencv", lambda *_: None)
    monkeypatch.setattr(images, "pil_to_rgb", full)
    run = prepare_run(root, tmp_path, f"data.num_workers={num_workers}", f"data.on_bad={on_bad}", "data.max_bad=0.9")
    with pytest.raises(OutOfMemoryError, match=r"\.jpg: out of memory reading it.* failed: MemoryError") as caught:
        run.fit()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.49 GB)"),
        MemoryError("Unable to allocate 3.00 GiB for an array"),
    ],
)
def test_d3_a_processor_without_memory_is_reported_as_a_gpu_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*args: object, **settings: object) -> None:
        raise error

    monkeypatch.setattr(SegmentationModule, "compute_loss", full)
    with pytest.raises(OutOfMemoryError, match="out of memory on a sub-batch of 2 images") as caught:
        prepare_run(root, tmp_path).fit()
    assert str(error)[:40] in str(caught.value)


def test_d3_out_of_memory_in_evaluation_is_reported_with_images_and_keys(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare_run(root, tmp_path, "eval.scales=[32,64]")

    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(type(run.net), "forward", full)
    with pytest.raises(SemsegError, match=r"evaluating .*\.jpg at up to \d+ x \d+ pixels") as caught:
        run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert "eval.batch_size" in str(caught.value) and "Tried to allocate 20.00 GiB" in str(caught.value)


def test_d3_out_of_memory_in_the_backward_pass_names_the_sub_batch_too(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare_run(root, tmp_path)

    def full(loss: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Tensor, "backward", full)
    with pytest.raises(OutOfMemoryError, match=r"data\.batch_size") as caught:
        run.fit()
    assert all(path in str(caught.value) for path in run.module.batch.paths)
    assert run.trainer.global_step == 0


def test_the_largest_sub_batch_is_tried_before_the_first_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = no_memory_for_large(monkeypatch)
    with pytest.raises(OutOfMemoryError, match="the largest possible sub-batch"):
        prepare_run(root, tmp_path, "trainer.probe_memory=always").fit()
    assert len(tried) == 1


def test_ddp_knows_of_the_first_pass_so_that_a_compiled_network_is_split_for_its_buckets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Splitting happens where DDP is the active module; the graphs of the first pass are those of all others."""
    active: list[object] = []
    model = DistributedDataParallel.__new__(DistributedDataParallel)
    monkeypatch.setattr(
        out_of_memory, "run_without_trace", lambda *_: active.append(DistributedDataParallel._active_ddp_module)
    )
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 2), [])
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(largest_batch=lambda: batch),
        strategy=SimpleNamespace(model=model),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        optimizers=[],
    )
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    ProbeMemory("always").on_train_start(trainer, module)
    assert active == [model] and DistributedDataParallel._active_ddp_module is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_trying_the_largest_sub_batch_trains_nothing(root: Path, tmp_path: Path, precision: str) -> None:
    ends = []
    for probe in ("always", "never"):
        run = prepare_run(root, tmp_path / probe, f"trainer.probe_memory={probe}", f"trainer.precision={precision}")
        run.fit()
        ends.append(run.net.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize(("name", "copies"), [("sgd", 1), ("adamw", 2)])
@pytest.mark.parametrize("is_fused", [False, True])
def test_d4_the_probe_counts_the_state_that_the_first_step_allocates(name: str, copies: int, is_fused: bool) -> None:
    net = build_segmenter("resnet18", "c1", 3)
    weights = sum(weight.nbytes for weight in net.parameters())
    optimizer = build_optimizer(net, OptimConfig(name=name), is_fused=is_fused)
    has_momentum = name == "sgd" and is_fused  # from the start
    assert count_missing_state_bytes(optimizer) == (0 if has_momentum else copies * weights)
    for weight in net.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert count_missing_state_bytes(optimizer) == 0


def test_d4_the_probe_reserves_that_state(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []

    def compute_loss(module: SegmentationModule, batch: Batch, average: str) -> Loss:
        reserved.extend(
            tensor.nbytes for tensor in iterate_tensors() if tensor.dtype == torch.uint8 and tensor.ndim == 1
        )
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SegmentationModule, "compute_loss", compute_loss)
    run = prepare_run(root, tmp_path, "trainer.probe_memory=always")
    with pytest.raises(OutOfMemoryError):
        run.fit()
    assert sum(weight.nbytes for weight in run.net.parameters()) in reserved  # the momentum


def test_d4_the_average_is_there_when_memory_is_probed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages: list[nn.Module | None] = []

    def compute_loss(module: SegmentationModule, batch: Batch, average: str) -> Loss:
        callbacks = module.trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        averages.extend(one._average_model for one in callbacks if isinstance(one, MovingAverage))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SegmentationModule, "compute_loss", compute_loss)
    run = prepare_run(root, tmp_path, "trainer.probe_memory=always", "ema.decay=0.9")
    with pytest.raises(OutOfMemoryError):
        run.fit()
    (average,) = averages
    assert average is not None
    assert sum(map(Tensor.numel, average.parameters())) == sum(map(Tensor.numel, run.module.parameters()))


def iterate_tensors() -> Iterator[Tensor]:
    """All tensors of this process."""
    yield from (item for item in gc.get_objects() if type(item) is Tensor)
