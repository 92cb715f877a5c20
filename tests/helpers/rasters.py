"""A small data set of four bands of 16 bits, with masks in tiles, and the words of a run on it. Imports no pytest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from helpers.command_line import TINY_NETWORK

NO_DATA = [(42113, 2, 0, "0", True)]  # GDAL's tag
# To be put before data.root: a network at native resolution.
NATIVE_BANDS = [
    "data=folder", "data.num_classes=2", "data.first_id=0", "data.ignore=[]", "data.val.images=images",
    "data.val.masks=masks", "data.bands=[red,green,blue,nir]", "data.value_range=[0,3000]", "data.resize=native",
    "data.crop=[48,48]", "data.batch_size=2", "data.steps_per_epoch=8", "trainer.max_epochs=1", "optim.lr=0.1",
    "model/encoder=resnet18", *TINY_NETWORK, "model.encoder.weights=none", "model/decoder=c1", "trainer=cpu",
]  # fmt: skip


def draw_rasters(folder: Path, count: int = 4) -> Path:
    """Images of 70 to 110 pixels with nodata at the top left, and their masks of two classes in tiles."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(count):
        shape = (70 + 13 * number, 110 - 7 * number)
        label = rng.integers(0, 2, (shape[0] // 10 + 1, shape[1] // 10 + 1)).repeat(10, 0).repeat(10, 1)
        label = label[: shape[0], : shape[1]].astype(np.uint8)
        pixels = np.array([[300, 500, 900, 2500], [1200, 900, 700, 400]])[label] + rng.integers(1, 300, (*shape, 4))
        pixels[:5, :9] = 0
        tifffile.imwrite(folder / f"images/{number}.tif", pixels.astype(np.uint16), photometric="minisblack",
                         planarconfig="contig", compression="lzw", tile=(32, 48), extratags=NO_DATA)  # fmt: skip
        tifffile.imwrite(folder / f"masks/{number}.tif", label, compression="deflate", tile=(16, 32))
    return folder
