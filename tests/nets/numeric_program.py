"""The types of every operation under CUDA's autocast, as JSON: {case: [[operation, arguments, results, where]]}.

See helpers/numeric_types.py. With the argument `all`, the smallest ready network of every kind is tried.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from unittest import mock

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from helpers.fake_device import DEVICE, FakeDevice, fill_meta_tensors
from helpers.numeric_types import NumericTypes, add_autocast, cuda_autocast
from semseg.checkpoints.network import build_network
from semseg.config.compose import list_options
from semseg.config.load import load_config
from semseg.config.schema import LossConfig
from semseg.data.geometry import round_up
from semseg.evaluation.inference import batch_logits, merge_scales
from semseg.nets.interfaces import Logits
from semseg.nets.normalise import normalise
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.nets.upsampled_conv import UpsampledConcatConv
from semseg.syncbn.layer import convert_batch_norms
from semseg.training.callbacks.ema import update_average
from semseg.training.losses import LOSSES, Loss, build_term, segmentation_loss

NUM_CLASSES = 150
CANVAS = (64, 96)
LARGE = ("_base", "_base_plus", "_large", "101", "resnet50_dilated8_c1_deepsup", "resnet50_dilated8_ppm_deepsup")
LIBRARIES = ("custom", "smp", "transformers")  # which network they build is not said
NETWORKS = {
    "upernet": ("resnet18", "upernet"),
    "ppm": ("resnet18_dilated8", "ppm_deepsup"),
    "c1": ("mobilenetv2_dilated8", "c1_deepsup"),
}


def run_step(net: Segmenter) -> Loss:
    """Preprocessing, network and loss."""
    canvas = [round_up(side, net.size_divisor) for side in CANVAS]
    image = torch.zeros(2, 3, *canvas, dtype=torch.uint8)
    label = torch.zeros(2, *(side // net.label_stride for side in canvas), dtype=torch.int64)
    return segmentation_loss(net(normalise(image, net.convention, torch.zeros(2, 2).long())), label)


def step_on_cuda(build: Callable[[], Segmenter]) -> NumericTypes:
    with cuda_autocast():
        net = build().train()
        with NumericTypes() as types:
            run_step(net)
    return types


def evaluation_on_cuda() -> NumericTypes:
    with cuda_autocast():
        net = build_segmenter(*NETWORKS["ppm"], NUM_CLASSES).eval()
        scales = [torch.zeros(3, *CANVAS, dtype=torch.uint8)]
        with NumericTypes() as types:
            (logits,) = batch_logits(net, [scales], net.convention, flip=True, window=64)
            merge_scales(logits, (50, 70))
    return types


def loss_on_cuda(name: str) -> NumericTypes:
    with cuda_autocast():
        term = build_term(name, LossConfig(), torch.ones(NUM_CLASSES))
        logits = torch.zeros(2, NUM_CLASSES, 16, 20, dtype=torch.bfloat16)
        with NumericTypes() as types:
            segmentation_loss(Logits(logits, logits), torch.zeros(2, 16, 20).long(), terms=[(1.0, term)])
    return types


def build_factored() -> Segmenter:
    net = build_segmenter(*NETWORKS["upernet"], NUM_CLASSES)
    for module in net.modules():
        if isinstance(module, UpsampledConcatConv):
            module.factored = True
    return net


def step_with_backward(build: Callable[[], Segmenter]) -> NumericTypes:
    """Preprocessing, network, loss, backward pass and optimiser, on the device that autograd serves."""
    with FakeDevice(), torch.device(DEVICE):
        net = build().train()
        with NumericTypes() as types, torch.autograd.set_multithreading_enabled(False):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = run_step(net)
            loss.total.backward()
            torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9).step()
        kept = [*net.parameters(), *(weight.grad for weight in net.parameters()), *net.buffers()]
    assert {value.dtype for value in kept if value is not None} == {torch.float32, torch.int64}
    return types


def average_on_cuda() -> NumericTypes:
    with cuda_autocast(), NumericTypes() as types:
        for decay in (None, 0.9):
            update_average(torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3), decay)
    return types


def list_cases() -> dict[str, Callable[[], NumericTypes]]:
    cases: dict[str, Callable[[], NumericTypes]] = {"evaluation": evaluation_on_cuda, "moving average": average_on_cuda}
    for name, parts in NETWORKS.items():
        cases[f"step of {name}"] = lambda parts=parts: step_on_cuda(lambda: build_segmenter(*parts, NUM_CLASSES))
    cases["step of upernet, factored"] = lambda: step_on_cuda(build_factored)
    for name in LOSSES:
        if name != "lovasz":  # it asks the device which classes there are
            cases[f"loss {name}"] = lambda name=name: loss_on_cuda(name)
    for name, build in {
        "upernet": lambda: build_segmenter(*NETWORKS["upernet"], NUM_CLASSES),
        "upernet, factored": build_factored,
        "ppm, published statistics": lambda: convert_batch_norms(
            build_segmenter(*NETWORKS["ppm"], NUM_CLASSES), "published"
        ),
    }.items():
        cases[f"backward of {name}"] = lambda build=build: step_with_backward(build)
    if "all" in sys.argv:
        for name in (name for name in list_options("model") if not name.endswith(LARGE) and name not in LIBRARIES):
            cases[f"step of model {name}"] = lambda name=name: step_on_cuda(lambda: build_model(name))
    return cases


def build_model(name: str) -> Segmenter:
    """A ready network on the default device, without values: timm computes with them while it builds one."""
    config, _ = load_config([f"model={name}", "model.encoder.weights=none"])
    with unset_fake_temporarily(), torch.device("meta"):
        net = build_network(config.model, NUM_CLASSES)
    fill_meta_tensors(net)
    assert isinstance(net, Segmenter)
    return net


if __name__ == "__main__":
    add_autocast(DEVICE)
    # Initialisation looks at values; it takes place on the host.
    with (
        mock.patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor),
        mock.patch("semseg.syncbn.layer.preserve_loaded_statistics", lambda layer: None),
    ):
        print(json.dumps({name: sorted(case().found) for name, case in list_cases().items()}))
