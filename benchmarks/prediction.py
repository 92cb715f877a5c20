"""Prediction on the CPU: PyTorch as semseg runs it, ONNX Runtime and OpenVINO, side by side, with their agreement.

    pip install --editable ".[export]"; pip install openvino    # OpenVINO is left out where it is not installed
    python benchmarks/prediction.py                             # UPerNet-50, 448 x 608, one thread
    python benchmarks/prediction.py --model mobilenetv2_dilated8_c1_deepsup --height 512 --width 512
    python benchmarks/prediction.py --ckpt best --images photos    # a trained network

Each side computes the logits of the same images from the same weights: `mode=export` writes the ONNX file that ONNX
Runtime and OpenVINO read, and the int8 file from 16 of the images (static quantisation). The sides take turns. The
table has the median CPU seconds of an image and its ratio to PyTorch with semseg's kernels; the largest difference of a
logit from that of plain PyTorch, as a fraction of the largest logit; and the fraction of pixels with the same class.
The weights are random without --ckpt: what int8 costs in mean IoU is measured by mode=export export.quantize=static.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import cv2
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from semseg.build import find_network, restore_network
from semseg.checkpoints.network import build_network
from semseg.config.load import load_config
from semseg.export.onnx import PixelNetwork, write_onnx
from semseg.export.quantize import quantize_onnx
from semseg.nets.interfaces import SegmentationNetwork

NUM_CLASSES = 150
NUM_CALIBRATION = 16  # images
ROW = "{:<46}{:>10}{:>8}{:>14}{:>14}"

Pixels = NDArray[np.float32]  # (1, 3, H, W), 0..255
Side = Callable[[Pixels], NDArray[np.float32]]  # to logits (1, K, h, w)


class Measured(NamedTuple):
    """A side after all rounds."""

    cpu_s: float  # median of an image
    largest: float  # difference of a logit, as a fraction of the largest logit
    agreement: float  # fraction of pixels, at the resolution of the logits


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    net = build_net(options)
    images = list(read_images(options, net.size_divisor))
    height, width = images[0].shape[2:]
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {describe_openvino()}, {options}")
    print(f"{torch.backends.cpu.get_cpu_capability()}, {len(images)} images of {height} x {width}")
    with TemporaryDirectory() as folder:
        float_file, int8_file = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        write_onnx(float_file, net, {})
        int8_file.write_bytes(float_file.read_bytes())
        quantize_onnx(int8_file, [torch.from_numpy(image[0].astype(np.uint8)) for image in images[:NUM_CALIBRATION]])
        sides = dict(list_sides(net, float_file, int8_file, options.threads))
        expected = [sides["PyTorch, float32"](image) for image in images]
        measured = measure_sides(sides, images, expected, options.rounds)
    print(ROW.format("", "CPU s", "ratio", "difference", "same class"))
    base = measured["semseg, float32"].cpu_s
    for name, (cpu_s, largest, agreement) in measured.items():
        print(ROW.format(name, f"{cpu_s:.3f}", f"{cpu_s / base:.2f}", f"{largest:.1e}", f"{agreement:.2%}"))
    wrong = [name for name, one in measured.items() if name.endswith("float32") and one.largest > 1e-3]
    if wrong:
        sys.exit(f"these compute something else: {', '.join(wrong)}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="upernet50", help="with random weights, unless --ckpt is given")
    parser.add_argument("--encoder", help="another encoder for it")
    parser.add_argument("--ckpt", help="a trained network, as on the command line")
    parser.add_argument("--images", type=Path, help="a folder of images; without it, they are smoothed noise")
    parser.add_argument("--height", type=int, default=448)
    parser.add_argument("--width", type=int, default=608)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def build_net(options: argparse.Namespace) -> SegmentationNetwork:
    """The network, in the layout that is fastest for it on a CPU."""
    if options.ckpt is not None:
        config, overrides = load_config(["mode=predict", f"ckpt={options.ckpt}", "input=."])
        net = restore_network(find_network(options.ckpt, config, overrides))
    else:
        words = [f"model={options.model}", "model.encoder.weights=none"]
        config, _ = load_config([*words, *([f"model/encoder={options.encoder}"] if options.encoder else [])])
        torch.manual_seed(0)
        net = build_network(config.model, NUM_CLASSES)
    return net.eval()


def read_images(options: argparse.Namespace, divisor: int) -> Iterator[Pixels]:
    """Images of the given size, in RGB."""
    size = [-(-side // divisor) * divisor for side in (options.height, options.width)]
    if options.images is None:
        generator = np.random.default_rng(0)
        for _ in range(NUM_CALIBRATION):
            coarse = generator.integers(0, 256, (8, 10, 3)).astype(np.float32)
            yield to_input(cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC).clip(0, 255))
        return
    paths = [path for path in sorted(options.images.iterdir()) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    for path in paths[:NUM_CALIBRATION]:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        assert image is not None, f"{path} cannot be read"
        yield to_input(cv2.resize(image[..., ::-1], (size[1], size[0]), interpolation=cv2.INTER_AREA))


def to_input(image: NDArray[np.generic]) -> Pixels:
    """(H, W, 3) as the input of a network, with whole numbers."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None].astype(np.uint8).astype(np.float32))


# ---- the sides


def list_sides(net: SegmentationNetwork, float_file: Path, int8_file: Path, threads: int) -> Iterator[tuple[str, Side]]:
    """Every way to compute the logits, by name."""
    pixels = PixelNetwork(net)
    yield "semseg, float32", partial(compute, pixels, has_cpu_kernels=True)
    yield "PyTorch, float32", partial(compute, pixels, has_cpu_kernels=False)
    yield "semseg, bf16 (trainer.precision=bf16-mixed)", partial(compute, pixels, has_cpu_kernels=True, is_bf16=True)
    yield "ONNX Runtime, float32", load_onnxruntime(float_file, threads)
    yield "ONNX Runtime, int8 (export.quantize=static)", load_onnxruntime(int8_file, threads)
    if find_spec("openvino") is not None:
        yield "OpenVINO, float32", load_openvino(float_file, threads, "f32")
        yield "OpenVINO, bf16", load_openvino(float_file, threads, "bf16")
        yield "OpenVINO, int8", load_openvino(int8_file, threads, "f32")


@torch.inference_mode()
def compute(
    pixels: PixelNetwork, image: Pixels, *, has_cpu_kernels: bool, is_bf16: bool = False
) -> NDArray[np.float32]:
    """The logits by PyTorch, with or without the kernels of semseg."""
    pixels.net.has_cpu_kernels = has_cpu_kernels
    tensor: Tensor = torch.from_numpy(image).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        return pixels(tensor).float().numpy()


def load_onnxruntime(path: Path, threads: int) -> Side:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image})[0]


def load_openvino(path: Path, threads: int, precision: str) -> Side:
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": 1}
    compiled = ov.Core().compile_model(str(path), "CPU", settings)
    return lambda image: np.asarray(compiled(image)[0], np.float32)


def describe_openvino() -> str:
    if find_spec("openvino") is None:
        return "no openvino"
    import openvino as ov

    return f"openvino {ov.__version__}"


def measure_sides(
    sides: Mapping[str, Side], images: list[Pixels], expected: list[NDArray[np.float32]], rounds: int
) -> dict[str, Measured]:
    """Time the sides in turns, and compare their logits with the expected ones."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    differences = dict.fromkeys(sides, 0.0)
    same: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        image, logits = images[number % len(images)], expected[number % len(images)]
        for name, run in sides.items():
            start = time.process_time()
            found = run(image)
            elapsed = time.process_time() - start
            if number:  # the first round warms up
                seconds[name].append(elapsed)
            largest = float(np.abs(found - logits).max() / np.abs(logits).max())
            differences[name] = max(differences[name], largest)
            same[name].append(float((found.argmax(1) == logits.argmax(1)).mean()))
    return {
        name: Measured(statistics.median(seconds[name]), differences[name], statistics.mean(same[name]))
        for name in sides
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
