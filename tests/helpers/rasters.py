"""A small data set of four bands of 16 bits, with masks in tiles, and the words of a run on it; rasters of any size.

Imports no pytest.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import tifffile
from numpy.typing import NDArray
from rasterio.transform import Affine
from rasterio.windows import Window

from helpers.command_line import TINY_NETWORK

TURNED = Affine(10, 0.5, 400000, 0.5, -10, 5000000)
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


def write_raster(path: Path, height: int, width: int, pixels: NDArray | None = None, **how: Any) -> Path:
    """A tiled GeoTIFF of four bands of uint16, without empty tiles; `pixels` (4, h, w) are at the top left."""
    profile = {"crs": "EPSG:32632", "transform": TURNED, "tiled": True, "blockxsize": 512, "blockysize": 512, **how}
    with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=64):
        warnings.simplefilter("ignore")
        with rasterio.open(
            path, "w", driver="GTiff", height=height, width=width, count=4, dtype="uint16", SPARSE_OK=True, **profile
        ) as file:
            if pixels is not None:
                file.write(pixels, window=Window(0, 0, pixels.shape[2], pixels.shape[1]))
    return path
