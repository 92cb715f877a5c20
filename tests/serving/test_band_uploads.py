"""Uploads to a network with other bands than 8-bit RGB: what it takes, what it shows, and what it refuses."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import rasterio
import tifffile
from numpy.typing import NDArray
from PIL import Image
from test_server import SERVED, client, encoded, half_bright, mask_of

from semseg.config.preprocessing import BandRange
from semseg.config.schema import ServeConfig
from semseg.data.bands import BandFile, BandOptions, draw_bands
from semseg.errors import DataError
from semseg.serving.server import read_uploaded_mask

FOUR = ("red", "green", "blue", "nir")
OPTIONS = BandOptions((BandFile("", FOUR),), FOUR, (BandRange(0, 3000),) * 4, (1500.0,) * 4)
LARGER = ServeConfig(max_upload_mb=1, max_pixels=10_000)


def scene() -> NDArray[np.uint16]:
    """12 x 16 pixels of four bands; near infrared is high in the right quarter."""
    pixels = np.random.default_rng(0).integers(100, 900, (12, 16, 4)).astype(np.uint16)
    pixels[:, 12:, 3] = 2500
    return pixels


def send(data: bytes, name: str, options: BandOptions = OPTIONS) -> Any:
    """The response to an upload of a network that finds the second class where near infrared is high."""
    nir = options.names.index("nir")
    served = SERVED._replace(
        predict=lambda image: (image[..., nir] > 2000).astype(np.int64), bands=options,
        draw=lambda image: draw_bands(image, options.names, ["nir"]),
    )  # fmt: skip
    return client(served, LARGER).post("/predict", files={"image": (name, data)})


def as_tiff(pixels: NDArray, **how: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, photometric="minisblack", planarconfig="contig", **how)
    return stream.getvalue()


def as_geotiff(folder: Path) -> bytes:
    pixels = scene().transpose(2, 0, 1)
    with rasterio.open(
        folder / "a.tif", "w", driver="GTiff", height=12, width=16, count=4, dtype="uint16", crs="EPSG:32632",
        transform=rasterio.transform.from_origin(4e5, 5e6, 10, 10), compress="lzw",
    ) as file:  # fmt: skip
        file.write(pixels)
    return (folder / "a.tif").read_bytes()


def as_npy(pixels: NDArray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, pixels)
    return stream.getvalue()


def as_png(pixels: NDArray[np.uint16]) -> bytes:
    """16 bits of red, green and blue, and near infrared in the place of alpha."""
    return cv2.imencode(".png", pixels[..., [2, 1, 0, 3]])[1].tobytes()


@pytest.mark.parametrize("name", ["a.tif", "geo.tif", "a.npy", "a.png"])
def test_four_bands_of_16_bits_are_predicted_and_shown_stretched(tmp_path: Path, name: str) -> None:
    data = {
        "a.tif": as_tiff(scene()),
        "geo.tif": as_geotiff(tmp_path),
        "a.npy": as_npy(scene()),
        "a.png": as_png(scene()),
    }
    response = send(data[name], name)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["height"], answer["width"]) == (12, 16)
    assert np.asarray(mask_of(answer)).tolist() == [[1] * 12 + [2] * 4] * 12
    with Image.open(io.BytesIO(base64.b64decode(answer["picture"]))) as picture:
        assert picture.format == "JPEG" and picture.size == (16, 12)
        shown = np.asarray(picture)
    assert shown[:, 13:].min() > 240 and shown[:, :11].max() < 120  # near infrared, stretched


def test_pixels_without_values_have_no_class(tmp_path: Path) -> None:
    values = scene().astype(np.float32)
    values[:, :8] = np.nan
    answer = send(as_npy(values), "a.npy").json()
    assert np.asarray(mask_of(answer)).tolist() == [[0] * 8 + [1] * 4 + [2] * 4] * 12
    assert [entry["share"] for entry in answer["classes"]] == [0.25, 0.25]


def test_pixels_of_a_geotiff_of_colours_without_values_have_no_class(tmp_path: Path) -> None:
    pixels = np.asarray(half_bright()).transpose(2, 0, 1)
    _, height, width = pixels.shape
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", height=height, width=width, count=3, dtype="uint8", nodata=0,
        crs="EPSG:32632", transform=rasterio.transform.from_origin(4e5, 5e6, 10, 10),
    ) as file:  # fmt: skip
        file.write(pixels)
    answer = client().post("/predict", files={"image": ("a.tif", (tmp_path / "a.tif").read_bytes())}).json()
    mask, is_dark = np.asarray(mask_of(answer)), (pixels == 0).all(axis=0)
    assert is_dark.any() and not is_dark.all()
    assert (mask[is_dark] == 0).all() and (mask[~is_dark] != 0).all()


def test_a_damaged_mask_of_an_upload_is_reported_with_its_name(tmp_path: Path) -> None:
    def fail(file: Path) -> None:
        raise DataError(f"{file}: its mask cannot be read.")

    with (
        patch("semseg.serving.server.read_whole_mask", fail),
        pytest.raises(DataError, match=r"^a\.tif: its mask cannot be read\.$"),
    ):
        read_uploaded_mask(as_geotiff(tmp_path), "a.tif")


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (encoded(half_bright()), "photo.png", "photo.png: holds 3 bands of uint8 values, but data.bands names 4: "
         "[red,green,blue,nir]. Send an image with these bands, in one file and in this order."),
        (encoded(half_bright(), "JPEG"), "photo.jpg", "photo.jpg: holds 3 bands of uint8 values"),
        (as_tiff(scene()[..., :3]), "a.tif", "a.tif: holds 3 bands of uint16 values"),
        (as_tiff((scene() // 16).astype(np.uint8)), "a.tif", "a.tif: holds 8-bit values, which do not reach the range "
         "[0,3000]"),
        (as_tiff(scene())[:300], "a.tif", "a.tif: the TIFF file is broken"),
        (as_tiff(np.zeros((200, 200, 4), np.uint16)), "a.tif", "more than the limit serve.max_pixels=10000"),
        (as_npy(scene().astype(np.float64)), "a.npy", "a.npy: holds 4 bands of float64 values, which are not"),
        (as_npy(np.array([{"a": 1}])), "a.npy", "which are no numbers of pixels"),
    ],
)  # fmt: skip
def test_other_files_are_refused_in_one_sentence(data: bytes, name: str, message: str) -> None:
    response = send(data, name)
    assert response.status_code == 400
    assert message in response.json()["detail"] and "\n" not in response.json()["detail"]


def test_bands_that_are_not_used_may_be_in_the_file_and_files_of_bands_are_sent_as_one() -> None:
    names = ("red", None, "blue", "nir")
    used = BandOptions((BandFile("_x", names),), ("red", "blue", "nir"), (BandRange(0, 3000),) * 3, (0.0,) * 3)
    assert used.as_one_file() is used
    served = SERVED._replace(bands=used, predict=lambda image: (image[..., 2] > 2000).astype(np.int64),
                             draw=lambda image: draw_bands(image, used.names))  # fmt: skip
    answer = client(served, LARGER).post("/predict", files={"image": ("a.tif", as_tiff(scene()))})
    assert answer.status_code == 200 and answer.json()["classes"][1]["share"] == 0.25
    several = BandOptions(
        (BandFile("_B8", ("nir",)), BandFile("_B4", ("red",))), ("red", "nir"), used.ranges, (0.0,) * 2
    )
    assert several.as_one_file().files == (BandFile("", ("red", "nir")),)


def test_the_page_learns_the_bands_and_gets_pictures_where_browsers_have_none() -> None:
    answer = client(SERVED._replace(bands=OPTIONS)).get("/network").json()
    assert answer["bands"] == ["red", "green", "blue", "nir"]
    assert client().get("/network").json()["bands"] == ["red", "green", "blue"]
    image = half_bright()
    pictures = {}
    for kind in ("PNG", "TIFF", "JPEG2000"):
        answer = client().post("/predict", files={"image": (f"a.{kind}", encoded(image, kind))}).json()
        pictures[kind] = answer["picture"]
    assert pictures["PNG"] is None
    for kind in ("TIFF", "JPEG2000"):
        with Image.open(io.BytesIO(base64.b64decode(pictures[kind]))) as picture:
            assert np.abs(np.asarray(picture).astype(int) - image).max() < 60
