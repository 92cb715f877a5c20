"""One training step and one inference of networks beside those of the library that they come from, on the same inputs.

    python benchmarks/networks.py                                   # 2 images of 224 x 320, on the CPU
    python benchmarks/networks.py --device cuda --height 512 --width 512 --images 8 --precision bf16
    python benchmarks/networks.py --only linear_dinov3_vit_small
    python benchmarks/networks.py --toy                             # small networks, one round: for testing programs

A training step is forward, cross entropy on labels at the stride of the logits, backward and an SGD step; an inference
is a forward pass in eval mode. Ours and the library's take turns in one process, one step each, so that other load on
the machine affects both, and both have the same weights where the library's network is part of ours. Printed are
medians, and the median over the rounds of our time divided by the library's: below 1, ours is faster.

smp's networks upsample their logits to the image, and train on labels at that size; ours of `model=smp` train on labels
at the stride of the logits. A row "at its stride" has smp's logits without upsampling (upsampling=1), which is the same
work as ours.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semseg.checkpoints.network import build_network
from semseg.config.schema import ModelConfig
from semseg.nets.registry import build_decoder, build_segmenter

NUM_CLASSES = 150
ROW = "| {:<36} | {:>9} | {:>9} | {:>6} | {:>9} | {:>9} | {:>6} |"
Forward = Callable[[Tensor], Tensor]  # an image (N, 3, H, W) -> logits (N, NUM_CLASSES, h, w)


class Pair(NamedTuple):
    """A network of ours and the library's own, both with their forward pass from images to logits."""

    ours: nn.Module
    theirs: nn.Module
    run_ours: Forward
    run_theirs: Forward


def compare_linear_vit(name: str) -> Pair:
    """A linear layer on a ViT of timm, and the same of timm's own forward pass with its last normalisation."""
    import timm

    ours = build_segmenter("timm", "linear", NUM_CLASSES, {"name": name})
    body = timm.create_model(name, num_classes=0, global_pool="", dynamic_img_size=True)
    own = ours.encoder.model.model.state_dict()
    body.load_state_dict(own, strict=False)
    width = ours.encoder.channels[-1]
    theirs = nn.ModuleDict({"body": body, "norm": nn.BatchNorm2d(width), "head": nn.Conv2d(width, NUM_CLASSES, 1)})

    def run_theirs(image: Tensor) -> Tensor:
        tokens = body.forward_features(image)[:, body.num_prefix_tokens :]  # (N, h * w, C)
        height = image.shape[2] // ours.size_divisor
        return theirs["head"](theirs["norm"](tokens.mT.unflatten(2, (height, -1))))

    return Pair(ours, theirs, lambda image: ours(image).main, run_theirs)


def compare_segformer_head(channels: tuple[int, ...] = (64, 128, 320, 512), width: int = 256) -> Pair:
    """Our decoder of SegFormer and that of transformers, on maps of the channels of B1 to B5."""
    from transformers import SegformerConfig
    from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

    ours = build_decoder("segformer", channels, NUM_CLASSES, width=width)
    theirs = SegformerDecodeHead(
        SegformerConfig(hidden_sizes=list(channels), decoder_hidden_size=width, num_labels=NUM_CLASSES)
    )

    def maps_of(image: Tensor) -> list[Tensor]:
        sides = [(image.shape[2] // stride, image.shape[3] // stride) for stride in (4, 8, 16, 32)]
        return [
            image.mean(1, keepdim=True)[..., :height, :width].expand(-1, count, -1, -1).contiguous()
            for count, (height, width) in zip(channels, sides, strict=True)
        ]

    return Pair(ours, theirs, lambda image: ours(maps_of(image)).main, lambda image: theirs(maps_of(image)))


def compare_smp(arch: str, encoder: str, *, at_stride: bool = False, **options: Any) -> Pair:
    """model=smp and smp's own network, with its upsampling or, `at_stride`, without."""
    import segmentation_models_pytorch as smp

    keys = {"name": encoder, "weights": "none"}
    ours: Any = build_network(ModelConfig(library="smp", arch=arch, encoder=keys, options=options), NUM_CLASSES)
    plain = {"upsampling": 1} if at_stride else {}
    theirs = smp.create_model(arch, encoder, None, classes=NUM_CLASSES, **options, **plain)
    theirs.load_state_dict(ours.model.state_dict())
    return Pair(ours, theirs, lambda image: ours(image).main, theirs)


def compare_transformers(model_type: str, **options: Any) -> Pair:
    """model=transformers and the library's own network of the same configuration (SegFormer-B0 by default)."""
    from transformers import AutoConfig

    from semseg.nets.libraries.transformers import plain_config

    config = plain_config(AutoConfig.for_model(model_type, num_labels=NUM_CLASSES, **options))
    ours: Any = build_network(
        ModelConfig(library="transformers", config=config, encoder={"weights": "none"}), NUM_CLASSES
    )
    theirs = copy.deepcopy(ours.model)
    return Pair(ours, theirs, lambda image: ours(image).main, lambda image: theirs(image).logits)


PAIRS: dict[str, Callable[[], Pair]] = {
    "linear_dinov3_vit_small (timm)": lambda: compare_linear_vit("vit_small_patch16_dinov3"),
    "linear_vit_tiny (timm)": lambda: compare_linear_vit("vit_tiny_patch16_224"),
    "decoder segformer (transformers)": compare_segformer_head,
    "smp unet + resnet34": lambda: compare_smp("unet", "resnet34"),
    "smp fpn + resnet34": lambda: compare_smp("fpn", "resnet34"),
    "smp fpn + resnet34, at its stride": lambda: compare_smp("fpn", "resnet34", at_stride=True),
    "transformers segformer, B0": lambda: compare_transformers("segformer"),
}
TOYS: dict[str, Callable[[], Pair]] = {
    "linear_vit_tiny (timm)": PAIRS["linear_vit_tiny (timm)"],
    "smp fpn + resnet18, at its stride": lambda: compare_smp(
        "fpn", "resnet18", at_stride=True, decoder_pyramid_channels=64, decoder_segmentation_channels=64
    ),
    "transformers segformer": lambda: compare_transformers("segformer", hidden_sizes=[8, 8, 8, 8], depths=[1] * 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--height", type=int, default=224, help="pixels, a multiple of 32")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each network, after two for warming up")
    parser.add_argument("--only", default="", help="part of the name of a row")
    parser.add_argument("--toy", action="store_true", help="small networks on small images, one round")
    options = parser.parse_args()
    if options.toy:
        options.height, options.width, options.rounds = 64, 64, 1
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options}")
    print(ROW.format("", "step ms", "library", "ratio", "infer ms", "library", "ratio"))
    print(ROW.format("---", *("---:",) * 6))
    for name, build in (TOYS if options.toy else PAIRS).items():
        if options.only in name:
            torch.manual_seed(0)
            print(ROW.format(name, *measure(build(), options)), flush=True)


def measure(pair: Pair, options: argparse.Namespace) -> list[str]:
    """The six numbers of a row."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(options.images, 3, options.height, options.width, generator=generator).to(options.device)
    both = [(pair.ours, pair.run_ours), (pair.theirs, pair.run_theirs)]
    for net, _ in both:
        net.to(options.device)
    cells = []
    for build in (training_step, inference):
        steps = [build(net, run, image, options) for net, run in both]
        ours, theirs = take_turns(steps, options)
        ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
        cells += [f"{1000 * statistics.median(ours):.0f}", f"{1000 * statistics.median(theirs):.0f}", f"{ratio:.2f}"]
    return cells


def training_step(net: nn.Module, run: Forward, image: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    with torch.no_grad(), autocast(options):
        shape = run(image)[:, 0].shape
    label = torch.randint(0, NUM_CLASSES, shape, generator=torch.Generator().manual_seed(0)).to(options.device)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(options):
            loss = F.cross_entropy(run(image), label)
        loss.backward()
        optimizer.step()

    return step


def inference(net: nn.Module, run: Forward, image: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    def step() -> Tensor:
        net.eval()
        with torch.inference_mode(), autocast(options):
            return run(image)

    return step


def autocast(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16")


def take_turns(steps: list[Callable[[], object]], options: argparse.Namespace) -> list[list[float]]:
    """Seconds of every timed round of each step."""
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(options.rounds + 2):
        for step, found in zip(steps, seconds, strict=True):
            synchronise(options)
            start = time.perf_counter()
            step()
            synchronise(options)
            if number >= 2:
                found.append(time.perf_counter() - start)
    return seconds


def synchronise(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
