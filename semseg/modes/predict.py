"""mode=predict: class maps and pictures of anyone's images."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from semseg.build import accelerator, open_network, restore_net
from semseg.config import Config
from semseg.data.classes import ClassTable, LabelMap
from semseg.data.datasets import EvalDataset
from semseg.data.images import read_image
from semseg.data.records import IMAGE_SUFFIXES, record_of_image
from semseg.download import fetch
from semseg.draw import panel
from semseg.errors import DataError
from semseg.inference import predict
from semseg.nets.segmenter import Segmenter
from semseg.zoo import DEMONSTRATION


def run(config: Config, overrides: list[str]) -> None:
    """Predict every image of `input` and write what `predict.save` asks for.

    Raises:
        SemsegError: for anything the user can mend.
    """
    saved, config = open_network(config, overrides)
    root = Path(config.input).expanduser() if config.input else fetch(DEMONSTRATION, config.download)
    images = find_images(root)
    device = torch.device("cuda" if accelerator(config) == "gpu" else "cpu")
    net = restore_net(saved).to(device)
    label_map = LabelMap(saved.classes.num_classes, config.data.first_id, config.data.ignore)
    writer = Writer(config.predict.save, saved.classes, label_map)
    folder = Path(config.run_dir)
    target_of = targets(images, root, folder)
    console = Console()
    progress = track(predictions(net, images, config), "predicting", len(images), disable=not sys.stdout.isatty())
    for image, ids in progress:
        writer.save(target_of[image], image, ids)
    console.print(f"{len(images)} images predicted, written below {folder}", soft_wrap=True, highlight=False)


def find_images(root: Path) -> list[Path]:
    """The image, or all images below the folder, sorted.

    Raises:
        DataError: if there is nothing.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError(f"input={root}: there is no such file or folder.")
    images = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise DataError(f"input={root}: no images in this folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))}).")
    return images


def predictions(net: Segmenter, images: list[Path], config: Config) -> Iterator[tuple[Path, NDArray[np.int64]]]:
    """(path, class indices (H, W)) of every image, upright."""
    dataset = EvalDataset(
        [record_of_image(path) for path in images],
        label_map=None,
        short_edges=config.predict.scales or config.eval.scales,
        max_long_edge=config.data.max_long_edge,
        size_divisor=config.model.size_divisor or net.size_divisor,
        antialias=net.convention.antialias,
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=min(1, config.data.num_workers))
    for path, sample in zip(images, loader, strict=True):
        height, width = (int(length) for length in sample.size)
        found = predict(
            net,
            sample.scales,
            (height, width),
            net.convention,
            flip=config.predict.flip,
            window=config.predict.window,
            stride=config.predict.stride,
            memory_limit_mb=config.predict.memory_limit_mb,
        )
        yield path, found.ids.cpu().numpy()


class Writer(NamedTuple):
    """Writes what `predict.save` asks for."""

    outputs: list[str]
    classes: ClassTable
    label_map: LabelMap

    def save(self, target: Path, image: Path, ids: NDArray[np.integer]) -> None:
        """Write `<target>_<output>.png` for every output of `image`, whose class indices are `ids` (H, W)."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if "ids" in self.outputs:
            raw = self.label_map.to_raw(ids)  # the values that the label files of the data set have
            raw = raw.astype(np.uint8) if raw.max(initial=0) < 256 else raw
            Image.fromarray(raw).save(f"{target}_ids.png")
        if "panel" in self.outputs:
            pixels = panel(read_image(image, upright=True), ids, self.classes)
            Image.fromarray(pixels).save(f"{target}_panel.png")


def targets(images: list[Path], root: Path, folder: Path) -> dict[Path, Path]:
    """Where the outputs of each image go: its place below `root`, without suffix, below `folder`.

    Two images that differ in nothing but the suffix keep it: a.jpg -> a_jpg, a.png -> a_png.
    """
    base = root if root.is_dir() else root.parent
    places = {image: image.relative_to(base) for image in images}
    stems = Counter(place.with_suffix("") for place in places.values())
    found = {}
    for image, place in places.items():
        is_alone = stems[place.with_suffix("")] == 1
        found[image] = folder / (place.with_suffix("") if is_alone else place.with_name(place.name.replace(".", "_")))
    return found
