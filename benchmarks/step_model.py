"""A model of a training step on a GPU: bytes and operations of every stage, and the time that they take at least.

    python benchmarks/step_model.py                        # prints the tables of docs/scale.md
    python benchmarks/step_model.py --height 600 --width 1000

Every operator of a step of two images in bf16 is recorded on meta tensors, without computing. Its time is at least its
operations divided by the peak of the matrix units, and at least the bytes that it reads and writes divided by the
bandwidth of the memory (the roofline of Williams et al. 2009). Operators that a GPU runs as one kernel or not at all
(views) count as PyTorch runs them without torch.compile; caches are ignored.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdRef

from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter
from semseg.training.losses import segmentation_loss

NUM_CLASSES, NUM_IMAGES = 150, 2
NETWORKS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "upernet50": ("resnet50", "upernet", {}, {}),
    "resnet50_dilated8_ppm_deepsup": ("resnet50", "ppm", {"output_stride": 8}, {"deep_supervision": True}),
}


class Device(NamedTuple):
    """Figures of a data sheet: dense bf16 with sums in float32, and memory."""

    name: str
    tera_operations: float  # per second
    tera_bytes: float  # per second


DEVICES = (Device("H200", 989, 4.8), Device("A100 80 GB", 312, 2.0), Device("RTX 4090", 165, 1.0))


class Operator(NamedTuple):
    """One call of an operator."""

    stage: str
    operations: int
    bytes: int

    def seconds(self, device: Device) -> float:
        return max(self.operations / device.tera_operations, self.bytes / device.tera_bytes) / 1e12

    def waits_for_memory(self, device: Device) -> bool:
        return self.bytes / device.tera_bytes > self.operations / device.tera_operations


class Recorder(TorchDispatchMode):
    """Records the operators that run within it, with the stage that is set then."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = "other"
        self.operators: list[Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            operands = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            distinct = {WeakIdRef(operand): operand.nbytes for operand in operands}
            count = flop_registry.get(func._overloadpacket)
            operations = count(*args, **(kwargs or {}), out_val=result) if count else 0
            self.operators.append(Operator(self.stage, operations, sum(distinct.values())))
        return result


def iterate_stages(net: Segmenter) -> Iterator[tuple[str, nn.Module]]:
    """The layers before the first block of the encoder, its stages, and the decoder; of a ResNet."""
    for name, part in net.encoder.named_children():
        yield name if name.startswith("layer") else "stem", part
    yield "decoder", net.decoder


def record_step(net: Segmenter, height: int, width: int) -> list[Operator]:
    """The operators of a step: forward, loss, backward and a fused step of SGD with momentum."""
    recorder = Recorder()

    def enter(name: str) -> Callable[..., None]:
        def set_stage(*_: Any) -> None:
            recorder.stage = name

        return set_stage

    def enter_backward(name: str) -> Callable[..., None]:
        def mark_output(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if tensor is not None:  # logits may have no auxiliary ones
                    tensor.register_hook(enter(f"{name}, backward"))  # called when its gradient is complete

        return mark_output

    for name, part in iterate_stages(net):
        part.register_forward_pre_hook(enter(name))
        part.register_forward_hook(enter_backward(name))
    image = torch.empty(NUM_IMAGES, 3, height, width, dtype=torch.bfloat16, device="meta")
    label = torch.empty(NUM_IMAGES, height // net.label_stride, width // net.label_stride).to("meta").long()
    with recorder:
        logits = net(image)
        recorder.stage = "loss"
        loss = segmentation_loss(logits, label).total
        recorder.stage = "loss, backward"
        loss.backward()
    # Weights, gradients and momentum in float32: three are read, two written.
    weights = sum(parameter.numel() for parameter in net.parameters())
    return [*recorder.operators, Operator("optimiser", 4 * weights, 5 * 4 * weights)]


def print_table(name: str, height: int, width: int) -> None:
    """Print the stages of a network as a table in Markdown, with the least milliseconds on each device."""
    encoder, decoder, encoder_options, decoder_options = NETWORKS[name]
    with torch.device("meta"):
        net = build_segmenter(encoder, decoder, NUM_CLASSES, encoder_options, decoder_options).train().bfloat16()
    operators = record_step(net, height, width)
    print(f"{name}, {NUM_IMAGES} images of {height} x {width}\n")
    print(f"| stage | GFLOPs | GB | {' | '.join(f'{device.name}, ms' for device in DEVICES)} |")
    print("|---|---|---|" + "---|" * len(DEVICES))
    for stage in [*dict.fromkeys(one.stage for one in operators), "all"]:
        chosen = [one for one in operators if stage in (one.stage, "all")]
        totals = sum(one.operations for one in chosen) / 1e9, sum(one.bytes for one in chosen) / 1e9
        times = [1e3 * sum(one.seconds(device) for one in chosen) for device in DEVICES]
        print(f"| {stage} | {totals[0]:.0f} | {totals[1]:.1f} | {' | '.join(f'{time:.1f}' for time in times)} |")
    times = [sum(one.seconds(device) for one in operators) for device in DEVICES]
    rates = [NUM_IMAGES / time for time in times]
    waits = [sum(one.seconds(device) for one in operators if one.waits_for_memory(device)) for device in DEVICES]
    bound = [wait / time for wait, time in zip(waits, times, strict=True)]
    print(f"| images/s at most | | | {' | '.join(f'{rate:.0f}' for rate in rates)} |")
    print(f"| of the time, limited by memory | | | {' | '.join(f'{fraction:.0%}' for fraction in bound)} |\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=448)
    parser.add_argument("--width", type=int, default=576)
    chosen_size = parser.parse_args()
    for network in NETWORKS:
        print_table(network, chosen_size.height, chosen_size.width)
