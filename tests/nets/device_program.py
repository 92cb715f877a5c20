"""What networks and their evaluation would ask of a GPU, as JSON: {case: [findings]}; see helpers/fake_device.py.

What GPUs of Apple cannot do is in cases of its own, named "apple: ...". With the argument `all`, networks that consist
of layers of others are tried as well.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from helpers.fake_device import DEVICE, PACKAGE, AppleProblems, FakeDevice, HostCopies, fill_meta_tensors
from semseg.checkpoints.network import build_network
from semseg.config.compose import list_options
from semseg.config.load import load_config
from semseg.config.schema import LossConfig
from semseg.data.batch import LABEL_TYPE, Batch
from semseg.datamodule import widen_labels
from semseg.evaluation.inference import ClassMap, batch_logits, merge_scales
from semseg.evaluation.metrics import confusion_counts
from semseg.evaluation.thresholds import count_probabilities
from semseg.nets.interfaces import Logits
from semseg.nets.normalise import normalise
from semseg.nets.precision import choose_widest_float
from semseg.nets.registry import DECODERS, ENCODERS, build_decoder, build_encoder, build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.training import logit_strips
from semseg.training.callbacks.ema import update_average
from semseg.training.callbacks.label_warnings import count_label_pixels
from semseg.training.callbacks.nonfinite import NonFiniteGuard
from semseg.training.callbacks.step_reduction import StepReduction, Summands
from semseg.training.logit_strips import LogitsByStrip
from semseg.training.losses import LOSSES, ROW_TERMS, build_term, segmentation_loss
from semseg.training.step_means import IntervalMean, LastSteps

apple_problems: set[str] = set()  # of the current case
NUM_CLASSES = 150
CANVAS = (128, 160)
# Networks and encoders with the layers of smaller ones, or large ones; every decoder is tried on every other encoder.
REPEATED = {
    "mobilenetv2_dilated8_ppm_deepsup", "resnet18_dilated8_c1_deepsup", "resnet50_dilated8_c1_deepsup",
    "resnet50_dilated8_ppm_deepsup", "resnet101_dilated8_ppm_deepsup", "upernet101", "upernet_resnext101",
    "hrnetv2_c1", "hrnetv2", "resnet50", "resnet101", "resnext101", "upernet50", "upernet_sam2_hiera_tiny",
    "upernet_convnext_tiny",
}  # fmt: skip
REPEATED |= {
    name for name in list_options("model")
    if name.endswith(("_small", "_base", "_base_plus", "_large")) or name == "upernet_dinov3_convnext_tiny"
} - {"linear_dinov2_vit_small", "upernet_lite_dinov3_vit_small"}  # fmt: skip
# Evaluation is the same for all networks, but for their size and strides.
EVALUATED = {
    "mobilenetv2_dilated8_c1_deepsup", "resnet18_dilated8_ppm_deepsup", "linear_dinov2_vit_small",
}  # fmt: skip


@contextmanager
def collect_findings() -> Iterator[HostCopies]:
    """Collect what is found within this context, and what Apple's GPUs cannot do in `apple_problems`."""
    with HostCopies() as copies, AppleProblems() as apple:
        yield copies
    apple_problems.update(apple.found)


def find_in_step(net: Segmenter) -> set[str]:
    """Findings of a training step: preprocessing, network, loss, backward pass and optimiser."""
    image = torch.zeros(2, 3, *CANVAS, dtype=torch.uint8, device=DEVICE)
    size = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    label = torch.zeros(2, *(side // net.label_stride for side in CANVAS), dtype=torch.int64, device=DEVICE)
    weights = [weight for weight in net.train().parameters() if weight.requires_grad]
    with collect_findings() as copies, torch.autograd.set_multithreading_enabled(False):
        segmentation_loss(net(normalise(image, net.convention, size)), label).total.backward()
        torch.optim.SGD(weights, lr=0.1, momentum=0.9).step()
    assert all(weight.grad is not None and weight.grad.device == weight.device for weight in weights)
    return copies.found


def find_in_evaluation(net: Segmenter) -> set[str]:
    """Findings of an evaluation at two scales with mirrored images."""
    scales = [torch.zeros(3, *(side * part for side in CANVAS), dtype=torch.uint8, device="cpu") for part in (1, 2)]
    net.eval()
    with collect_findings() as copies:
        (logits,) = batch_logits(net, [scales], net.convention, flip=True)
        class_map = merge_scales(logits, (77, 99)).ids
        confusion_counts(class_map, torch.zeros(77, 99, dtype=torch.int64, device=DEVICE), NUM_CLASSES)
    return copies.found


def build_model(name: str) -> Segmenter:
    config, _ = load_config([f"model={name}", "model.encoder.weights=none"])
    if config.model.encoder.get("library") != "timm":
        return build_network(config.model, NUM_CLASSES)
    # timm computes with values while it builds a network.
    with unset_fake_temporarily(), torch.device("meta"):
        net = build_network(config.model, NUM_CLASSES)
    fill_meta_tensors(net)
    return net


def find_in_thresholds() -> set[str]:
    """Findings of the counts by threshold, which two classes have in every evaluation."""
    ids, confidence = torch.zeros(6, 8, dtype=torch.int16), torch.zeros(6, 8)
    with collect_findings() as copies:
        count_probabilities(ClassMap(ids, confidence), torch.zeros(6, 8, dtype=torch.int64))
    return copies.found


def find_in_decoders(encoder: str) -> set[str]:
    """Findings of every decoder, with and without deep supervision, on the maps of an encoder."""
    found: set[str] = set()
    image = torch.zeros(2, 3, *CANVAS, device=DEVICE)
    for joined in ({}, {"join": False}) if encoder == "hrnetv2" else ({},):
        body = build_encoder(encoder, **joined)
        with torch.no_grad():
            maps = body(image)
        for decoder in DECODERS:
            if decoder == "upernet" and len(maps) == 1:
                continue
            deep = decoder in ("c1", "ppm") and len(maps) > 1
            for options in ({}, {"deep_supervision": True}) if deep else ({},):
                head = build_decoder(decoder, body.channels, NUM_CLASSES, **options)
                with collect_findings() as copies, torch.autograd.set_multithreading_enabled(False):
                    logits = head.train()(maps)
                    (logits.main.sum() + (0 if logits.aux is None else logits.aux.sum())).backward()
                found |= copies.found
    return found


MISTAKES: dict[str, Callable[[Tensor], object]] = {
    "mixed devices": lambda x: x + torch.ones(3, 1, 1, device="cpu"),
    "a branch": lambda x: 1 if x.sum() > 0 else 0,
    "a number": lambda x: float(x.mean()),
    "a mask": lambda x: x[x > 0],
    "a count": lambda x: torch.bincount(x.flatten().long()),
    "a download": lambda x: x.mean().cpu(),
    "an upload": lambda x: torch.tensor([1.0, 2.0], device="cpu").to(x.device),
    "an index on the host": lambda x: x[torch.tensor([1, 0], device="cpu")],
    "a mask of an assignment": lambda x: x.clone().index_put_([x > 0], x.new_zeros(1)),
    "a pooling that has no deterministic gradient": lambda x: nn.functional.adaptive_avg_pool2d(x, 2).sum().backward(),
    "a double": lambda x: x.double(),
    "an operation without a kernel for Apple": lambda x: torch.mode(x.detach()),
    "an operation that is never deterministic": lambda x: x.median(dim=1),
}


def find_mistake(name: str) -> set[str]:
    net = build_segmenter("resnet18", "c1", NUM_CLASSES)

    def act(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        MISTAKES[name](inputs[0].requires_grad_())

    net.encoder.register_forward_pre_hook(act)
    return find_in_step(net)


def apply_at_once(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
    """Instead of PyTorch's checkpoint, whose second forward pass ends the process on this device."""
    return function(*args)


def find_in_loss(name: str, stride: int = 1) -> set[str]:
    """Findings of a term of the loss, with class weights, forward and backward.

    Args:
        stride: pixels of the label to one of the logits; above 1, the loss is computed in strips of rows.
    """
    term = build_term(name, LossConfig(), torch.ones(NUM_CLASSES))
    logits = torch.zeros(2, NUM_CLASSES, 16, 20, requires_grad=True)
    label = torch.zeros(2, 16 * stride, 20 * stride).long()
    with (
        mock.patch.object(logit_strips, "WHOLE_BYTES", 0),
        mock.patch.object(LogitsByStrip.__init__, "__defaults__", (100_000,)),
        mock.patch.object(logit_strips, "checkpoint", apply_at_once),
        collect_findings() as copies,
        torch.autograd.set_multithreading_enabled(False),
    ):
        segmentation_loss(Logits(logits, logits), label, terms=[(1.0, term)]).total.backward()
    return copies.found


def find_in_average() -> set[str]:
    """Findings of the moving average: its first update, which copies, and its next one."""
    average, net = (build_segmenter("resnet18", "c1", NUM_CLASSES) for _ in range(2))
    with collect_findings() as copies:
        for decay in (None, 0.9):
            update_average(average, net, decay)
    return copies.found


def find_in_callbacks() -> set[str]:
    """Findings of what surrounds a step: wide labels, the guard with its reduction, and the values that are logged."""
    net = build_segmenter("resnet18", "c1", NUM_CLASSES)
    weights = list(net.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    module, trainer = nn.Module(), SimpleNamespace(global_step=0, world_size=1, global_rank=0)
    module.net = net
    module.device = torch.device(DEVICE)  # pyright: ignore[reportAttributeAccessIssue]
    module.step_metrics = [torch.zeros(2)]  # pyright: ignore[reportAttributeAccessIssue]
    label = torch.zeros(2, 16, 20, dtype=LABEL_TYPE)
    batch = Batch(torch.zeros(2, 3, 64, 80, dtype=torch.uint8), label, torch.zeros(2, 2).long(), ["a.jpg", "b.jpg"])
    reduction = StepReduction()
    reduction.register(Summands(2, lambda: [0, 3], lambda step, sums: None))
    guard = NonFiniteGuard(Path(), 1, reduction)
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.1}], defaults={"fused": True})
    mean = IntervalMean()
    with collect_findings() as copies:
        batch = widen_labels(batch)
        guard.on_train_batch_start(trainer, module, batch, 0)  # pyright: ignore[reportArgumentType]
        guard.on_before_backward(trainer, module, torch.zeros(()))  # pyright: ignore[reportArgumentType]
        guard.on_before_optimizer_step(trainer, module, optimizer)  # pyright: ignore[reportArgumentType]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        count_label_pixels(batch, NUM_CLASSES)
        mean._sums = torch.zeros(3, dtype=choose_widest_float(module.device))  # as after a first step
        mean.add(torch.zeros(2))
        LastSteps().add(torch.zeros(2))
    return copies.found


def list_cases() -> dict[str, Callable[[], set[str]]]:
    cases: dict[str, Callable[[], set[str]]] = {}
    is_all = sys.argv[1:] == ["all"]
    left_out = set() if is_all else REPEATED
    for name in list_options("model"):
        if name in ("custom", "smp", "transformers") or name in left_out:  # the first three need the name of a network
            continue
        cases[f"step of {name}"] = lambda name=name: find_in_step(build_model(name))
        if is_all or name in EVALUATED:
            cases[f"evaluation of {name}"] = lambda name=name: find_in_evaluation(build_model(name))
    for name in LOSSES:
        cases[f"step of the loss {name}"] = lambda name=name: find_in_loss(name)
        if LOSSES[name] in ROW_TERMS:
            cases[f"step of the loss {name}, in strips"] = lambda name=name: find_in_loss(name, stride=4)
    cases["thresholds of two classes"] = find_in_thresholds
    cases["step of the moving average"] = find_in_average
    cases["callbacks of a step"] = find_in_callbacks
    for name in sorted(ENCODERS.keys() - {"torchvision", "timm", "tiny"} - left_out):
        cases[f"decoders of {name}"] = lambda name=name: find_in_decoders(name)
    for name in MISTAKES:
        cases[f"mistake: {name}"] = lambda name=name: find_mistake(name)
    return cases


def find_or_fail(case: Callable[[], set[str]]) -> list[str]:
    """The findings of a case, or the error that ended it, with where in semseg it was raised."""
    try:
        # Initialisation looks at values; it takes place on the host.
        with mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor), FakeDevice(), torch.device(DEVICE):
            return sorted(case())
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
        where = f"{frames[-1].filename.removeprefix(PACKAGE)}:{frames[-1].name}" if frames else "the program"
        return [f"{type(error).__name__} in {where}: {' '.join(str(error).split())[:300]}"]


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # position embeddings are resampled in another way then
    mock.patch("semseg.nets.precision.WITHOUT_FLOAT64", (DEVICE,)).start()
    findings: dict[str, list[str]] = {}
    for name, case in list_cases().items():
        apple_problems.clear()
        findings[name] = find_or_fail(case)
        findings[f"apple: {name}"] = sorted(apple_problems)
    print(json.dumps(findings))
