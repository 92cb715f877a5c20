"""The Python API and its files, with a network whose predictions are known."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import semseg
from semseg.config.preprocessing import PREPROCESSING
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.label_map import LabelMap
from semseg.errors import ArgumentError, ConfigError, DataError, SemsegError
from semseg.evaluation.tiled import ArraySink
from semseg.nets.interfaces import Logits
from semseg.prediction.outputs import array_on_disk, write_outputs
from semseg.prediction.predictor import PredictionResult, PredictionSettings, Predictor
from semseg.prediction.video import VideoWriters, read_frames

CLASSES = ClassTable(("red", "green", "blue"), ((200, 0, 0), (0, 180, 0), (0, 0, 250)))


class Brightest(nn.Module):
    """Every pixel belongs to the brightest of its three channels."""

    size_divisor = 4
    label_stride = 1
    convention = PREPROCESSING["rgb_mean_std"]

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(5.0))

    def forward(self, image: Tensor) -> Logits:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.convention.mean, self.convention.std))
        return Logits(F.avg_pool2d((image * std + mean) * self.factor, 2), None)


@pytest.fixture
def net() -> Predictor:
    return Predictor(Brightest().eval(), CLASSES, LabelMap(3, first_id=7, ignore=[0]), PredictionSettings([16], 64))  # pyright: ignore[reportArgumentType]


def stripes(height: int = 16, width: int = 24) -> np.ndarray:
    """Red, green and blue columns of equal width."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        pixels[:, channel * width // 3 : (channel + 1) * width // 3, channel] = 255
    return pixels


def test_every_type_of_picture_gives_the_same_prediction(net: Predictor, tmp_path: Path) -> None:
    pixels = stripes()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pictures = [
        pixels,
        Image.fromarray(pixels),
        torch.from_numpy(pixels).permute(2, 0, 1),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    ]
    results = [net.predict(picture) for picture in pictures]
    assert results[0].ids[3].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    for result in results[1:]:
        assert np.array_equal(result.ids, results[0].ids)
        assert np.array_equal(result.image, pixels)


def test_phone_photos_come_out_upright(net: Predictor, tmp_path: Path) -> None:
    photo = Image.fromarray(stripes())
    exif = photo.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    photo.save(tmp_path / "a.png", exif=exif)
    opened = Image.open(tmp_path / "a.png")
    for picture in (tmp_path / "a.png", opened):
        assert net.predict(picture).ids[:, 0].tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_grey_pictures_become_rgb_and_alpha_is_dropped(net: Predictor, tmp_path: Path) -> None:
    grey = stripes().max(2) // np.array([1, 2], np.uint8).repeat(12)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    tensor = torch.from_numpy(grey)
    for picture in (tmp_path / "grey.png", Image.fromarray(grey), grey, grey[..., None], tensor, tensor[None]):
        assert np.array_equal(net.predict(picture).image, grey[..., None].repeat(3, 2))
    alpha = np.concatenate([stripes(), grey[..., None]], axis=2)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    tensor = torch.from_numpy(alpha).permute(2, 0, 1)
    for picture in (tmp_path / "alpha.png", Image.fromarray(alpha), alpha, tensor):
        assert np.array_equal(net.predict(picture).image, stripes())


@pytest.mark.filterwarnings("error")
def test_memory_that_cannot_be_written_is_fine_and_the_result_has_its_own(net: Predictor) -> None:
    pixels = stripes()
    readonly = np.asarray(Image.fromarray(pixels))
    assert not readonly.flags.writeable
    assert np.array_equal(net.predict(readonly).ids, net.predict(pixels).ids)
    result = net.predict(pixels)
    pixels[:] = 0  # a camera that fills the same memory again
    assert np.array_equal(result.image, stripes())


def test_a_notebook_shows_a_picture_and_short_texts(net: Predictor) -> None:
    result = net.predict(stripes(40, 3000), max_long_edge=64)
    shown = Image.open(io.BytesIO(result._repr_png_()))
    assert shown.format == "PNG" and shown.width == 1024 and shown.height > 14  # the legend is below
    assert "40 x 3000 pixels, red 33." in repr(result)
    small = Image.open(io.BytesIO(net.predict(stripes())._repr_png_()))
    assert np.array_equal(np.asarray(small), net.predict(stripes()).overlay())
    for shown in (result, net, net.classes, net.label_map, ClassTable.from_names([str(n) for n in range(300)])):
        assert len(repr(shown)) < 120 and "object at" not in repr(shown)


@pytest.mark.parametrize(
    ("picture", "error", "part"),
    [
        (np.zeros((5, 4, 2), np.uint8), ArgumentError, r"\(H, W, 4\) or \(H, W\), not \(5, 4, 2\)\.$"),
        (np.zeros((3, 4, 5), np.uint8), ArgumentError, r"array\.transpose\(1, 2, 0\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), ArgumentError, "one by one"),
        (np.zeros((4, 4, 3)), ArgumentError, "not float64. Multiply values from 0 to 1 by 255"),
        (np.zeros((4, 4, 3), np.uint16), ArgumentError, "not uint16. Divide"),
        (torch.zeros(5, 4, 3, dtype=torch.uint8), ArgumentError, r"tensor\.permute\(2, 0, 1\)"),
        (torch.zeros(3, 4, 5), ArgumentError, "not torch.float32"),
        ("nowhere.jpg", DataError, r"nowhere\.jpg: there is no such file\.$"),  # there is no data set
        ("http://a.org/b.jpg", DataError, "http://a.org/b.jpg: URLs are not supported"),
        (17, TypeError, "not int"),
        ([stripes()], ArgumentError, "not list. Predict them one by one"),
        ("", ArgumentError, "'': is no path of a picture"),
        ("a\0b.jpg", ArgumentError, "is no path of a picture"),
        (
            torch.zeros(3, 4, 5, dtype=torch.uint8, device="meta"),
            ArgumentError,
            "the device meta, which",
        ),
        (torch.zeros(4, 5, dtype=torch.uint8).to_sparse(), ArgumentError, r"of layout torch\.sparse_coo"),
    ],
)
def test_other_types_are_rejected(net: Predictor, picture: object, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        net.predict(picture)  # pyright: ignore[reportArgumentType]


def test_mistakes_in_arguments_are_errors_for_users(net: Predictor, tmp_path: Path) -> None:
    wrong: Any = [("crop", 64), ("probabilities", "no")]
    for name, value in wrong:
        with pytest.raises(ConfigError, match=f"^{name}={value!r}: must be"):
            net.predict(stripes(), **{name: value})
    result = net.predict(stripes())
    for settings, message in (
        ({"folder": None}, "folder=None: must be a path"),
        ({"outputs": 3}, "outputs=3: must be one or several of the names"),
        ({"name": 3}, "name=3: must be the name of a file"),
    ):
        given: Any = {"folder": tmp_path, **settings}
        with pytest.raises(ArgumentError, match=message):
            result.save(**given)
    assert not list(tmp_path.iterdir())
    (file,) = result.save(tmp_path, (name for name in ["ids"]))
    assert file.is_file()
    with pytest.raises(ArgumentError, match=r"^ckpt='': must be a path"):
        semseg.load("")


def test_settings_apply_to_one_picture(net: Predictor) -> None:
    assert len(net.resize(stripes(), scales=[8, 16])) == 2
    assert np.array_equal(net.predict(stripes(), flip=True, window=8).ids, net.predict(stripes()).ids)
    for name, nearest in (("scale", "scales"), ("probability", "probabilities")):
        with pytest.raises(TypeError, match=rf"^{name}=.*Did you mean {nearest}\?") as caught:
            net.predict(stripes(), **{name: [8]})  # pyright: ignore[reportArgumentType]
        assert isinstance(caught.value, SemsegError)


@pytest.mark.reliability
def test_i1_every_combination_of_settings_gives_a_map_and_its_probabilities(net: Predictor) -> None:
    choices = {
        "probabilities": (False, True), "scales": ([8], (8, 16), np.array([12])), "flip": (False, True),
        "window": (None, 8), "stride": (None, 4), "max_long_edge": (64, 20), "size_divisor": (None, 8),
        "memory_limit_mb": (1024,), "max_pixels": (10**6,), "crop": (None,), "batch_size": (1,),
        "threshold": (None,), "min_confidence": (None, 0.5),
    }  # fmt: skip
    assert set(choices) - {"probabilities"} == {item.name for item in fields(PredictionSettings)}
    for values in itertools.product(*choices.values()):
        given = dict(zip(choices, values, strict=True))
        if given["stride"] and not given["window"]:
            continue  # rejected, see below
        result = net.predict(stripes(), **given)
        assert result.ids.shape == (16, 24) and result.ids[8, [2, 12, 21]].tolist() == [0, 1, 2], given
        assert (result.probabilities is not None) == given["probabilities"]


@pytest.mark.reliability
def test_i1_at_native_resolution_every_combination_of_settings_gives_a_map_and_its_probabilities(
    net: Predictor,
) -> None:
    choices = {
        "probabilities": (False, True), "flip": (False, True), "window": (None, 8), "stride": (None, 4),
        "size_divisor": (None, 8), "crop": ([8, 8], (16, 24)), "batch_size": (1, 3),
    }  # fmt: skip
    for values in itertools.product(*choices.values()):
        given = dict(zip(choices, values, strict=True))
        if given["stride"] and not given["window"]:
            continue
        result = net.predict(stripes(), **given)
        assert result.ids.shape == (16, 24) and result.ids[8, [2, 12, 21]].tolist() == [0, 1, 2], given
        assert (result.probabilities is not None) == given["probabilities"]


def test_wrong_arguments_of_a_result_are_refused(net: Predictor, tmp_path: Path) -> None:
    result = net.predict(stripes())
    for opacity in ("x", True, 1.5):
        with pytest.raises(ArgumentError, match=f"opacity={opacity!r}: must be from 0 to 1"):
            result.overlay(opacity)  # pyright: ignore[reportArgumentType]
    for name in ("", "../x", "/x", "a/../../x"):
        with pytest.raises(ArgumentError, match="must be the name of a file in the folder"):
            result.save(tmp_path / "out", name=name)
    assert not list(tmp_path.iterdir())


def test_settings_of_the_other_way_to_see_a_picture_are_refused(net: Predictor) -> None:
    with pytest.raises(ArgumentError, match=r"scales=\[8\]: has no effect, because this network takes pixels"):
        net.predict(stripes(), crop=[8, 8], scales=[8])
    with pytest.raises(ArgumentError, match="batch_size=2: is a number of windows of resize=native"):
        net.predict(stripes(), batch_size=2)
    with pytest.raises(ArgumentError, match=r"predict_rows needs data\.resize=native"):
        net.predict_rows(torch.zeros(3, 8, 8, dtype=torch.uint8), ArraySink(Size(8, 8)))


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": []}, r"scales=\[\]: must be a list of short edges"),
        ({"scales": 64}, "scales=64: must be a list of short edges"),
        ({"scales": [0]}, r"scales=\[0\]: must be a list"),
        ({"scales": [1.5]}, r"scales=\[1.5\]: must be a list"),
        ({"scales": ["64"]}, "must be a list"),
        ({"scales": "64"}, "scales=64: must be a list"),
        ({"window": 0}, "window=0: must be a whole number of at least 1"),
        ({"window": 8.5}, "window=8.5: must be a whole number"),
        ({"window": 8, "stride": 0}, "stride=0: must be a whole number"),
        ({"window": 8, "stride": 9}, "stride=9: must not exceed window=8"),
        ({"stride": 4}, "stride=4: needs window="),
        ({"max_long_edge": 0}, "max_long_edge=0: must be"),
        ({"size_divisor": -4}, "size_divisor=-4: must be"),
        ({"size_divisor": 6}, "size_divisor=6: this network takes images whose sides are multiples of 4 pixels"),
        ({"threshold": 1.5}, r"threshold=1\.5: must be a probability"),
        ({"min_confidence": True}, "min_confidence=True: must be a probability"),
        ({"min_confidence": np.float32("nan")}, "must be a probability"),
        ({"memory_limit_mb": 0}, "memory_limit_mb=0: must be"),
        ({"max_long_edge": None}, "max_long_edge=None: must be"),
        ({"max_pixels": 0}, "max_pixels=0: must be"),
        ({"flip": "no"}, "flip='no': must be True or False"),
    ],
)
def test_i1_settings_out_of_their_range_are_rejected(net: Predictor, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        net.predict(stripes(), **settings)  # pyright: ignore[reportArgumentType]


def test_numbers_of_numpy_are_settings_too(net: Predictor) -> None:
    settings: dict[str, Any] = {"min_confidence": np.float32(0.5), "window": np.int64(8), "size_divisor": np.int32(8)}
    assert np.array_equal(
        net.predict(stripes(), **settings).ids, net.predict(stripes(), min_confidence=0.5, window=8).ids
    )
    assert net.predict(stripes()).overlay(np.float64(0.5)).shape[2] == 3  # pyright: ignore[reportArgumentType]


def test_arrays_and_names_have_limits_too(net: Predictor, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the picture has 16 x 24 pixels, more than the limit max_pixels=100"):
        net.predict(stripes(), max_pixels=100)
    result = net.predict(stripes())
    for name in ("x" * 300, "a\0b", ".", "./"):
        with pytest.raises(ArgumentError, match="name="):
            result.save(tmp_path, name=name)
    assert list(tmp_path.iterdir()) == []


def test_shares_and_probabilities(net: Predictor) -> None:
    result = net.predict(stripes(), probabilities=True)
    assert [(share.name, share.share) for share in result.shares()] == [(name, 1 / 3) for name in CLASSES.names]
    assert result.probabilities is not None and result.probabilities.shape == (3, 16, 24)
    assert np.array_equal(result.probabilities.argmax(0), result.ids)
    assert np.abs(result.probabilities.astype(np.float32).sum(0) - 1).max() < 2e-3
    assert net.predict(stripes()).probabilities is None


def test_an_overlay_has_the_size_of_the_picture_and_a_legend_below(net: Predictor) -> None:
    result = net.predict(stripes(48, 300))
    bare, whole = result.overlay(legend=False), result.overlay()
    assert bare.shape == (48, 300, 3)
    assert np.array_equal(whole[:48], bare) and whole.shape[0] > 60
    assert bare[20, 20].tolist() == [222, 0, 0]  # 0.4 * 255 + 0.6 * 200


@pytest.mark.parametrize("size", [(64, 64), (40, 1000), (3000, 40)], ids=str)
def test_the_legend_is_readable_at_any_size(net: Predictor, size: tuple[int, int]) -> None:
    ids = np.zeros(size, np.int16)
    ids[0, :2] = 1, 2
    picture = PredictionResult(np.zeros((*size, 3), np.uint8), ids, CLASSES, LabelMap(3)).overlay()
    assert picture.shape[1] >= 240
    assert (picture[-30:] == 255).mean() > 0.5  # paper, with writing on it
    assert all((picture == np.array(colour, np.uint8)).all(-1).any() for colour in CLASSES.palette)


def test_saved_files_read_back(net: Predictor, tmp_path: Path) -> None:
    result = net.predict(stripes(), probabilities=True)
    files = result.save(tmp_path / "new", ["ids", "color", "overlay", "panel", "probabilities"], name="a")
    assert [file.name for file in files] == [
        "a_ids.png", "a_color.png", "a_overlay.png", "a_panel.png", "a_probabilities.npz",
    ]  # fmt: skip
    assert np.array_equal(np.asarray(Image.open(files[0])), result.ids + 7)  # the ids of the data set
    color = Image.open(files[1])
    assert color.mode == "P" and np.array_equal(np.asarray(color), result.ids)
    assert np.asarray(color.convert("RGB"))[0, 0].tolist() == [200, 0, 0]
    kept = np.load(files[4])
    assert np.array_equal(kept["probabilities"], result.probabilities)
    assert kept["probabilities"].dtype == np.float16 and kept["names"].tolist() == list(CLASSES.names)
    assert result.save(tmp_path / "one", "ids") == [tmp_path / "one" / "prediction_ids.png"]
    with pytest.raises(ArgumentError, match=r"'overlays' is not known\. Did you mean overlay\?"):
        result.save(tmp_path / "none", ["ids", "overlays"])
    with pytest.raises(ArgumentError, match="probabilities=True"):
        net.predict(stripes()).save(tmp_path / "none", ["ids", "probabilities"])
    assert not (tmp_path / "none").exists()
    with pytest.raises(ArgumentError, match="is a file"):
        result.save(files[0])


def test_ids_above_255_are_saved_in_16_bits(net: Predictor, tmp_path: Path) -> None:
    net.label_map = LabelMap(3, first_id=300)
    (file,) = net.predict(stripes()).save(tmp_path, ["ids"])
    assert np.asarray(Image.open(file)).dtype == np.uint16
    assert np.unique(np.asarray(Image.open(file))).tolist() == [300, 301, 302]


def test_more_than_256_classes_are_coloured_in_rgb(tmp_path: Path) -> None:
    classes = ClassTable.from_names([str(index) for index in range(300)])
    result = PredictionResult(
        np.zeros((1, 300, 3), np.uint8), np.arange(300, dtype=np.int16)[None], classes, LabelMap(300)
    )
    picture = Image.open(write_outputs(result, tmp_path / "a", ["color"])[0])
    assert picture.mode == "RGB" and picture.getpixel((299, 0)) == classes.palette[299]


def test_an_array_on_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    with array_on_disk(tmp_path / "x" / "a.tmp", (3, 4, 5)) as array:
        array[:] = 1
        (file,) = (tmp_path / "x").iterdir()
        assert file.stat().st_size == 2 * 60
    assert not list((tmp_path / "x").iterdir())


def test_video_frames_come_back_with_their_rate_and_odd_sizes_are_completed(tmp_path: Path) -> None:
    with VideoWriters(tmp_path / "sub" / "film") as writers:
        for level in (0, 100, 200):
            writers.add("overlay", np.full((31, 41, 3), level, np.uint8), 12.5)
    frames = list(read_frames(tmp_path / "sub" / "film_overlay.mp4"))
    assert [frame.rate for frame in frames] == [12.5] * 3
    assert frames[0].pixels.shape == (32, 42, 3)
    levels = [float(frame.pixels.mean()) for frame in frames]
    assert levels == pytest.approx([0, 100, 200], abs=5)  # the codec rounds grey
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["film_overlay.mp4"]


def test_an_unfinished_video_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError), VideoWriters(tmp_path / "film") as writers:
        writers.add("overlay", np.zeros((32, 32, 3), np.uint8), 25)
        raise DataError("broken")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_a_video_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    for name, part in (("a.mp4", "cannot be decoded"), ("b.mp4", "no such file")):
        with pytest.raises(DataError, match=f"{name}: .*{part}"):
            next(read_frames(tmp_path / name))


def test_importing_the_package_loads_no_torch() -> None:
    code = "import semseg, sys; assert 'torch' not in sys.modules and callable(semseg.load)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_picture_without_pixels_is_rejected(net: Predictor) -> None:
    for empty in (np.zeros((0, 0, 3), np.uint8), torch.zeros(3, 0, 5, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"the picture has no pixels: its shape is \("):
            net.predict(empty)
