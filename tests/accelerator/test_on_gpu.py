"""What only a GPU can show, in ten tests of five minutes in all: `make test-gpu`.

Each test also runs on the CPU, smaller, so that none is out of date when there is a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.command_line import TINY_NETWORK, run_here
from helpers.in_process import assert_equal, prepare_run
from helpers.ranks import launch
from semseg.data.batch import LABEL_TYPE, Batch
from semseg.errors import OutOfMemoryError
from semseg.evaluation.inference import batch_logits, merge_scales
from semseg.lit_module import SegmentationModule
from semseg.nets.normalise import normalise
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.syncbn.layer import convert_batch_norms
from semseg.training.losses import segmentation_loss


class Place(NamedTuple):
    """Where a test runs, and how large."""

    device: torch.device
    words: Sequence[str]  # overrides for runs there
    canvas: tuple[int, int]  # of random images

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"


CPU = Place(torch.device("cpu"), [], (64, 96))
GPU = Place(torch.device("cuda"), ["trainer.accelerator=gpu"], (256, 320))
PLACES = [pytest.param(CPU, id="toy"), pytest.param(GPU, id="cuda", marks=pytest.mark.gpu)]
on_every_place = pytest.mark.parametrize("place", PLACES)
# What other tests show for the CPU; here, that the programs for a GPU run.
toy_is_long = pytest.mark.parametrize("place", [pytest.param(CPU, id="toy", marks=pytest.mark.long), PLACES[1]])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data") / "scenes"  # drawn by the first run


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    """Runs on GPUs set TF32 and the allocator for their whole process."""
    before, environment = torch.get_float32_matmul_precision(), dict(os.environ)
    yield
    torch.set_float32_matmul_precision(before)
    os.environ.clear()
    os.environ.update(environment)


def random_batch(place: Place, label_stride: int) -> tuple[Tensor, Tensor]:
    """Two images (2, 3, H, W) uint8 and their labels, one class in stripes."""
    generator = torch.Generator().manual_seed(0)
    height, width = place.canvas
    image = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    label = torch.arange(width // label_stride).expand(2, height // label_stride, -1) % 5
    return image, label.contiguous()


def compute_step(net: Segmenter, image: Tensor, label: Tensor) -> list[Tensor]:
    """The loss and all gradients, on the CPU."""
    net.zero_grad(set_to_none=True)
    device = next(net.parameters()).device
    loss = segmentation_loss(net(normalise(image.to(device), net.convention)), label.to(device)).total
    loss.backward()
    return [loss.detach().cpu(), *(weight.grad.cpu() for weight in net.parameters() if weight.grad is not None)]


PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
LAYOUTS = {"nchw": "model.channels_last=false", "nhwc": "model.channels_last=true"}
COMPILED = ("fp32-nchw", "bf16-nhwc")  # compiling takes most of a minute
SETTINGS = [pytest.param(CPU, ["trainer.precision=bf16-mixed", LAYOUTS["nhwc"]], id="toy")] + [
    pytest.param(
        GPU, [f"trainer.precision={value}", layout, f"model.compile={compiles}".lower()],
        id=f"cuda-{precision}-{name}{'-compiled' if compiles else ''}", marks=pytest.mark.gpu,
    )
    for precision, value in PRECISIONS.items()
    for name, layout in LAYOUTS.items()
    for compiles in (False, True)
    if not compiles or f"{precision}-{name}" in COMPILED
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("place", "words"), SETTINGS)
def test_steps_in_every_precision_and_layout_move_the_weights(
    root: Path, tmp_path: Path, place: Place, words: Sequence[str]
) -> None:
    run = prepare_run(root, tmp_path, *place.words, *words)
    before = {name: value.detach().clone().cpu() for name, value in run.net.named_parameters()}
    run.fit()
    after = {name: value.detach().cpu() for name, value in run.net.named_parameters()}
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert any(not torch.equal(before[name], value) for name, value in after.items())


@pytest.mark.slow
@on_every_place
def test_loss_and_gradients_equal_those_of_the_cpu(place: Place) -> None:
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.manual_seed(0)
        net = build_segmenter("resnet18", "upernet", 5, {}, {"width": 64}).double()
        image, label = random_batch(place, net.label_stride)
        net.has_cpu_kernels = False
        results = []
        for device in ("cpu", place.device):
            net = net.to(device)
            logits = net(normalise(image.to(device), net.convention).double())
            loss = segmentation_loss(logits, label.to(device)).total
            gradients = torch.autograd.grad(loss, list(net.parameters()))
            results.append([loss.detach().cpu(), *(gradient.cpu() for gradient in gradients)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@on_every_place
def test_deterministic_training_gives_the_same_weights_twice(root: Path, tmp_path: Path, place: Place) -> None:
    ends = []
    for name in ("one", "other"):
        run = prepare_run(root, tmp_path / name, *place.words, "trainer.deterministic=true")
        run.fit()
        ends.append(run.net.state_dict())
    torch.use_deterministic_algorithms(False)
    assert_equal(*ends)


@pytest.mark.slow
@toy_is_long
def test_a_resumed_run_equals_one_that_never_stopped(root: Path, tmp_path: Path, place: Place) -> None:
    words = [*place.words, "trainer.deterministic=true", "checkpoint.every_n_steps=1", "checkpoint.keep=3"]
    whole = prepare_run(root, tmp_path / "whole", *words)
    whole.fit()
    resumed = prepare_run(root, tmp_path / "resumed", *words)
    resumed.fit(tmp_path / "whole" / "checkpoints" / "step_00000002.ckpt")
    torch.use_deterministic_algorithms(False)
    assert_equal(resumed.net.state_dict(), whole.net.state_dict())
    assert_equal(resumed.trainer.optimizers[0].state_dict(), whole.trainer.optimizers[0].state_dict())


@on_every_place
def test_an_evaluation_gives_the_class_map_of_the_cpu(place: Place) -> None:
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    net = build_segmenter("resnet18", "c1", 5).eval()
    image, _ = random_batch(place, net.label_stride)
    maps = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for device in ("cpu", place.device):
            (logits,) = batch_logits(net.to(device), [[image[0], image[1]]], net.convention, flip=True)
            maps.append(merge_scales(logits, (131, 97)).ids.cpu())
    assert (maps[0] == maps[1]).float().mean() > 0.999  # ties aside


def normalise_on_one_device(rank: int, world: int, device: str) -> Tensor:
    """One half of a batch through a synchronised layer; both ranks use the same device."""
    layer = convert_batch_norms(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), "torch").to(device)
    images = torch.arange(world * 3 * 4 * 5, dtype=torch.float32).reshape(world, 3, 4, 5).sin()
    return layer(images[rank : rank + 1].to(device)).detach().cpu()


@pytest.mark.slow
@on_every_place
def test_two_ranks_on_one_device_normalise_as_one(place: Place) -> None:
    parts = launch(partial(normalise_on_one_device, device=str(place.device)), 2)
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5).sin()
    torch.testing.assert_close(torch.cat(parts), torch.nn.BatchNorm2d(3)(images).detach(), rtol=1e-5, atol=1e-5)


@on_every_place
def test_a_sub_batch_that_does_not_fit_is_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    run = prepare_run(root, tmp_path, *place.words, "trainer.probe_memory=always")
    compute = SegmentationModule.compute_loss

    def compute_with_too_much(module: SegmentationModule, batch: Batch, average: str) -> Any:
        if not place.is_gpu:
            raise torch.OutOfMemoryError("out of memory")
        free, total = torch.cuda.mem_get_info()
        kept = [torch.empty(total, dtype=torch.uint8, device="cuda") for _ in range(1 + free // total)]
        return compute(module, batch, average), kept

    monkeypatch.setattr(SegmentationModule, "compute_loss", compute_with_too_much)
    with pytest.raises(OutOfMemoryError, match=r"2 images of \d+ x \d+ pixels .*data\.batch_size"):
        run.fit()


@on_every_place
def test_batches_are_pinned_for_a_run_on_a_gpu(root: Path, tmp_path: Path, place: Place) -> None:
    run = prepare_run(root, tmp_path, *place.words, "data.num_workers=1")
    batch = next(iter(run.data.train_dataloader()))
    assert batch.image.is_pinned() == batch.label.is_pinned() == place.is_gpu
    assert batch.label.dtype == LABEL_TYPE


@pytest.mark.slow
@on_every_place
def test_upernet101_trains_on_two_large_images_in_12_gigabytes(place: Place) -> None:
    encoder, canvas = ("resnet101", (600, 992)) if place.is_gpu else ("resnet18", place.canvas)
    with place.device:
        net = build_segmenter(encoder, "upernet", 150, {}, {} if place.is_gpu else {"width": 32}).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=place.is_gpu or None)
    height, width = (side // 32 * 32 for side in canvas)
    image = torch.zeros(2, 3, height, width, dtype=torch.uint8, device=place.device)
    stride = net.label_stride
    label = torch.zeros(2, height // stride, width // stride, dtype=torch.int64, device=place.device)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=place.is_gpu):
            loss = segmentation_loss(net(normalise(image, net.convention)), label).total
        loss.backward()
        optimizer.step()
    assert bool(loss.isfinite())
    if place.is_gpu:
        assert torch.cuda.max_memory_allocated() < 12e9


@pytest.mark.slow
@toy_is_long
def test_mode_bench_prints_the_throughput(root: Path, tmp_path: Path, place: Place) -> None:
    prepare_run(root, tmp_path / "draw")
    size = ["data.short_edges=[64]", "eval.scales=[64]"] if not place.is_gpu else ["trainer=gpu"]
    printed = run_here(
        tmp_path, "mode=bench", "data=scenes", f"data.root={root}", "model/encoder=resnet18", "model/decoder=c1",
        "model.encoder.weights=none", "bench.steps=2", "bench.warmup=1", "bench.images=2", "data.num_workers=1",
        *(["trainer=cpu", *TINY_NETWORK] if not place.is_gpu else []), *size,
    )  # fmt: skip
    assert "images/s" in printed
