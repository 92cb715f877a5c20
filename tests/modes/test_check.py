"""The data doctor: what it finds in a folder with everything that goes wrong, and that its advice helps."""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path
from typing import Any
from zlib import crc32

import cv2
import numpy as np
import pytest
import tifffile
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from helpers.browser import evaluate_in_browser, needs_browser
from helpers.command_line import run_here
from helpers.in_process import configured
from semseg.checks.dataset import ScannedSplit, check_files, check_reading
from semseg.checks.description import describe_data_set
from semseg.config.load import load_config
from semseg.config.uses import refuse_idle_keys
from semseg.data.geometry import Size
from semseg.data.label_map import ColourIds
from semseg.data.labels import read_label
from semseg.data.records import Record
from semseg.data.scan import PairFacts, scan_pairs
from semseg.errors import DataError
from semseg.modes import check as mode
from semseg.modes.check_recipe import apply_suggestions
from semseg.nets.registry import build_segmenter
from semseg.nets.step_memory import estimate_step_memory

TINY = ["model/encoder=resnet18", "model/decoder=c1", "model.encoder.weights=none", "check.samples=2"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def stripes(*ids: int, dtype: type[np.integer[Any]] = np.uint8) -> NDArray[Any]:
    """A mask of 60 x 80 pixels with an equal stripe for each id."""
    return np.repeat(np.array(ids, dtype), 60 // len(ids))[:, None].repeat(80, axis=1)


def put(root: Path, name: str, mask: NDArray[np.uint8] | None, image: NDArray[np.uint8] | None = None) -> None:
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(crc32(name.encode())).integers(0, 256, (60, 80, 3), np.uint8)
    cv2.imwrite(str(root / "images" / f"{name}.jpg"), noise if image is None else image)
    if mask is not None:
        cv2.imwrite(str(root / "masks" / f"{name}.png"), mask)


def good_folder(root: Path, ids: tuple[int, ...] = (1, 2, 3), count: int = 12) -> Path:
    for index in range(count):
        put(root, f"{index:02d}", stripes(*ids))
    return root


def check(root: Path, *words: str) -> dict[str, Any]:
    """What check.json says; a verdict of NOT READY raises in the end, after it is written."""
    out = root.parent / "out"
    overrides = ["data=folder", f"data.root={root}", *words]
    try:
        mode.run(configured("mode=check", *overrides, f"run_dir={out}", *TINY), overrides)
    except DataError as error:
        assert "not ready" in str(error)
    return json.loads((out / "check.json").read_text())


@pytest.mark.parametrize(
    "given",
    [
        [
            "data.train.images=images/training",
            "data.train.masks=masks",
            "data.val_fraction=0.3",
            "data.mask_suffix=_ids",
        ],
        ["data.images=photos", "data.masks=masks"],
    ],
)
def test_lists_take_the_place_of_folders_in_the_suggested_command(given: list[str]) -> None:
    lists = {"data.train.list": "train.odgt", "data.val.list": "val.odgt"}
    words = apply_suggestions(["mode=check", "data=folder", "data.num_classes=2", *given], lists)
    assert words == ["data=folder", "data.num_classes=2", "data.train.list=train.odgt", "data.val.list=val.odgt"]
    refuse_idle_keys(load_config(words)[0], words)
    folds = apply_suggestions(["mode=check", "data=folder", "data.num_classes=2", "data.folds=3"], lists)
    assert "data.folds=3" in folds  # which mode=check accepts, and mode=train does not


def of_level(found: dict[str, Any], level: str) -> str:
    return "\n".join(notice["text"] for notice in found["notices"] if notice["level"] == level)


def test_good_data_are_ready_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = check(good_folder(tmp_path / "data"), "data.num_classes=3", "data.short_edges=[60]")
    assert found["verdict"] == "READY"
    assert not found["notices"]
    train, val = found["splits"]
    assert train["pairs"] + val["pairs"] == 12
    assert train["ids"] == {"1": 1600 * train["pairs"], "2": 1600 * train["pairs"], "3": 1600 * train["pairs"]}
    assert found["class_weights"] == [1.0, 1.0, 1.0]
    assert [row["pixels"]["val"] for row in found["classes"]] == [1600 * val["pairs"]] * 3
    assert found["plan"]["largest"] == [64, 96]  # 60 x 80, multiples of 32
    assert found["plan"]["model"] == "resnet18 + c1"  # which TINY puts into the default model
    assert "READY" in capsys.readouterr().out


def test_masks_that_no_image_matches_are_what_is_reported(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    for mask in (root / "masks").iterdir():
        mask.rename(mask.with_stem(f"{mask.stem}_mask"))
    found = check(root, "data.num_classes=3", "data.short_edges=[60]")
    assert found["verdict"] == "NOT READY"
    assert "24 lines or files give no pair" in of_level(found, "error")
    assert "cannot be split" not in of_level(found, "error")


def test_colours_that_are_not_scored_have_no_id_in_the_report(tmp_path: Path) -> None:
    root = tmp_path / "data"
    colours = np.array([(0, 0, 0), (0, 0, 250), (0, 250, 0)], np.uint8)  # BGR
    for index in range(6):
        put(root, str(index), colours[stripes(0, 1, 2)])
    (root / "classes.csv").write_text("index,name,R,G,B\n0,a,250,0,0\n1,b,0,250,0\n")
    found = check(root, "data.classes=classes.csv", "data.short_edges=[60]")
    assert [set(split["ids"]) for split in found["splits"]] == [{"1", "2"}] * 2
    assert found["splits"][0]["ignored"] == pytest.approx(1 / 3)


def test_classes_of_one_name_are_a_warning(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    (root / "classes.txt").write_text("road\ntree\nroad\n")
    found = check(root, "data.classes=classes.txt", "data.short_edges=[60]")
    assert found["verdict"] == "READY, WITH WARNINGS"
    assert "several classes have the same name, so that tables do not tell them apart: road." in of_level(
        found, "warning"
    )


@pytest.mark.slow
def test_ids_that_nobody_explained_are_read_off_the_masks_and_the_advice_makes_it_ready(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data", ids=(0, 1, 4, 255))
    found = check(root, "data.short_edges=[60]")
    assert found["verdict"] == "NOT READY"
    assert "Found ids 0, 1, 4, 255" in of_level(found, "error")
    assert found["suggestions"] == {"data.num_classes": "5", "data.first_id": "0", "data.ignore": "[255]"}
    words = shlex.split(found["command"])
    assert words[:4] == ["python", "run.py", "mode=check", "data=folder"]
    again = check(root, *[word for word in words[5:] if not word.startswith("run_dir=")])
    assert again["verdict"] == "READY, WITH WARNINGS"
    assert "class 2, class 3" in of_level(again, "warning")  # ids 2 and 3 never occur


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ids", "suggestions"),
    [
        ((1, 2, 99), {"data.ignore": "[0,99]"}),  # a table of three classes stays one of three
        ((0, 1, 2), {"data.first_id": "0", "data.ignore": "[]"}),  # the same number of classes, from 0
        ((0, 255), {"data.map": "{0:0,255:1}"}),  # black and white
    ],
)
def test_the_suggestion_for_an_unknown_id_keeps_the_class_table(
    tmp_path: Path, ids: tuple[int, ...], suggestions: dict[str, str]
) -> None:
    root = good_folder(tmp_path / "data", ids)
    (root / "classes.txt").write_text("sky\nroad\n" if 255 in ids else "sky\nroad\ncar\n")
    words = ["data.classes=classes.txt", "data.ignore=[]" if 0 in ids else "data.ignore=[0]"]
    found = check(root, *words)
    assert found["verdict"] == "NOT READY"
    assert suggestions.items() <= found["suggestions"].items() and "data.num_classes" not in found["suggestions"]
    again = check(root, *shlex.split(found["command"])[2:])
    assert again["verdict"].startswith("READY")


def test_grey_levels_become_classes_by_a_map(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data", ids=(0, 128, 255))
    found = check(root, "data.short_edges=[60]")
    assert "Found ids 0, 128, 255. They look like grey levels. In data.map, give null" in of_level(found, "error")
    assert found["suggestions"]["data.map"] == "{0:0,128:1,255:2}" and found["suggestions"]["data.num_classes"] == "3"
    again = check(root, *shlex.split(found["command"])[4:])
    assert again["verdict"].startswith("READY")


def test_classes_that_a_table_lacks_are_not_suggested_to_be_ignored(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data", ids=(1, 2, 3, 4))
    (root / "classes.txt").write_text("sky\nroad\n")
    found = check(root, "data.classes=classes.txt", "data.short_edges=[60]")
    assert found["verdict"] == "NOT READY" and found["suggestions"] == {}
    assert "data.classes has 2 classes. If 3, 4 are classes too, add them there." in of_level(found, "note")


def test_an_unknown_id_is_shown_with_file_and_pixel(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    mask = stripes(1, 2, 3)
    mask[33, 44] = 9
    put(root, "zz", mask)
    found = check(root, "data.num_classes=3", "data.val_fraction=0")
    assert f"9 at row 33, column 44 of {root / 'masks' / 'zz.png'}" in of_level(found, "error")
    suggested = found["suggestions"]  # one pixel is a mistake, and not six more classes
    assert suggested["data.ignore"] == "[0,9]" and "data.num_classes" not in suggested
    mask[:40] = 9
    put(root, "zz", mask)
    assert check(root, "data.num_classes=3", "data.val_fraction=0")["suggestions"]["data.num_classes"] == "9"


def test_more_ids_than_classes_extend_the_classes_and_keep_0_ignored(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data", ids=(0, 1, 2, 3, 4))
    found = check(root, "data.num_classes=2")
    assert found["suggestions"].get("data.num_classes") == "4"
    assert not {"data.first_id", "data.ignore"} & found["suggestions"].keys()
    assert check(root, *shlex.split(found["command"])[2:])["verdict"].startswith("READY")


@pytest.mark.slow
def test_255_that_is_not_ignored_and_masks_that_start_at_0_are_recognised(tmp_path: Path) -> None:
    void = check(good_folder(tmp_path / "void" / "data", ids=(1, 2, 255)), "data.num_classes=2")
    assert void["suggestions"]["data.ignore"] == "[0,255]"
    shifted = check(good_folder(tmp_path / "shifted" / "data", ids=(0, 1, 2)), "data.num_classes=3")
    assert "Do the masks start at 0?" in of_level(shifted, "warning")
    assert shifted["suggestions"]["data.first_id"] == "0"


@pytest.mark.slow
def test_masks_of_a_class_table_that_start_at_0_are_recognised(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data", ids=(0, 1, 2))
    (root / "classes.txt").write_text("sky\nroad\ntree\n")
    found = check(root, "data.classes=classes.txt", "data.short_edges=[60]")
    assert "id 3 never occurs and id 0, which is ignored, takes 33%" in of_level(found, "warning")
    assert "If so, set data.first_id=0 data.ignore=[]." in of_level(found, "warning")
    assert found["suggestions"] == {}  # tree may just not occur
    words = ("data.classes=classes.txt", "data.first_id=0", "data.ignore=[]", "data.short_edges=[60]")
    assert check(root, *words)["verdict"] == "READY"
    put(root, "zz", stripes(0, 1, 2, 7))
    found = check(root, "data.classes=classes.txt", "data.short_edges=[60]")
    assert "Do the masks start at 0" not in of_level(found, "warning")  # unknown ids come first
    assert check(root, *shlex.split(found["command"])[2:])["verdict"].startswith("READY")


@pytest.mark.slow
def test_black_and_white_masks_have_two_classes(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data", ids=(0, 255))
    found = check(root, "data.num_classes=2", "data.short_edges=[60]")
    assert found["verdict"] == "NOT READY"
    assert found["suggestions"]["data.map"] == "{0:0,255:1}"
    again = check(root, *shlex.split(found["command"])[2:])
    assert again["verdict"] == "READY" and len(again["classes"]) == 2
    assert all(row["pixels"]["train"] for row in again["classes"])


@pytest.mark.slow
def test_palettes_that_contradict_each_other_or_the_class_table_are_reported(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data", ids=(1, 2))
    (root / "classes.csv").write_text("index,name,R,G,B\n1,wall,200,0,0\n2,tree,0,200,0\n")

    def paint(*levels: int) -> dict[str, Any]:
        for mask in (root / "masks").iterdir():
            picture = Image.fromarray(stripes(1, 2))
            picture.putpalette([0, 0, 0, *levels])
            picture.save(mask)
        return check(root, "data.classes=classes.csv", "data.short_edges=[60]")

    assert not paint(200, 0, 0, 0, 200, 0)["notices"]
    assert not paint(9, 9, 9, 8, 8, 8)["notices"]  # colours that say nothing
    found = of_level(paint(0, 200, 0, 200, 0, 0), "warning")
    assert "id 1 is wall, and its colour (0, 200, 0) in the palette that of tree. data.mask_type=colors" in found
    picture = Image.fromarray(stripes(1, 2))
    picture.putpalette([0, 0, 0, 9, 9, 9, 8, 8, 8])
    paint(7, 7, 7, 8, 8, 8)
    picture.save(root / "masks" / "03.png")
    found = of_level(check(root, "data.num_classes=2", "data.short_edges=[60]"), "warning")
    assert "id 1 has the colour (" in found and "03.png" in found


@pytest.mark.slow
def test_codes_of_16_bits_become_a_map(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    for mask in (root / "masks").iterdir():
        Image.fromarray(stripes(100, 40000, 65535, dtype=np.uint16)).save(mask)
    for words in ((), ("data.num_classes=2",)):
        found = check(root, *words, "data.short_edges=[60]")
        assert found["verdict"] == "NOT READY"
        assert found["suggestions"]["data.map"] == "{100:0,40000:1}"
        assert found["suggestions"]["data.ignore"] == "[65535]"
        assert check(root, *shlex.split(found["command"])[2:])["verdict"] == "READY"


@pytest.mark.slow
def test_ids_that_no_setting_can_name_have_no_suggestion(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    Image.fromarray(stripes(1, 2, -1, dtype=np.int32)).save(root / "masks" / "00.tif")
    (root / "masks" / "00.png").unlink()
    found = check(root, "data.num_classes=3", "data.short_edges=[60]")
    assert "ids -1 are out of range: 0 to 65535. Change them in the masks." in of_level(found, "note")
    assert "data.ignore" not in found["suggestions"]
    assert check(root)["verdict"] == "NOT READY"  # without data.num_classes: it reports, and does not stop


@pytest.mark.slow
@pytest.mark.parametrize("ids", [(255, 65535), (65535,), (0, 65535)])
def test_masks_that_no_setting_makes_two_classes_are_reported(tmp_path: Path, ids: tuple[int, ...]) -> None:
    root = good_folder(tmp_path / "data")
    for mask in (root / "masks").iterdir():
        Image.fromarray(stripes(*ids, dtype=np.uint16)).save(mask)
    found = check(root)
    assert found["verdict"] == "NOT READY" and "data.num_classes" not in found["suggestions"]


@pytest.mark.slow
def test_255_among_consecutive_ids_is_a_class(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    mask = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) % 301
    for path in (root / "masks").iterdir():
        Image.fromarray(mask).save(path)
    found = check(root)
    assert found["suggestions"]["data.num_classes"] == "301"
    assert check(root, *shlex.split(found["command"])[2:])["verdict"].startswith("READY")
    found = check(root, "data.num_classes=200")  # from 1, as 0 is unlabelled
    assert found["suggestions"]["data.num_classes"] == "300" and "data.ignore" not in found["suggestions"]
    assert check(root, *shlex.split(found["command"])[2:])["verdict"].startswith("READY")


@pytest.mark.slow
def test_the_number_of_classes_is_that_of_a_map(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data", ids=(0, 1, 2))
    found = check(root, "data.map={0: 0, 1: 1, 2: 0}")
    assert found["suggestions"] == {"data.num_classes": "2"}
    assert check(root, *shlex.split(found["command"])[2:])["verdict"].startswith("READY")


def test_masks_without_any_scored_pixel_are_an_error(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data", ids=(0, 255))
    found = check(root, "data.num_classes=2", "data.ignore=[0,255]", "data.short_edges=[60]")
    assert found["verdict"] == "NOT READY"
    assert "train: all pixels of all masks are ignored, so that there is nothing to learn." in of_level(found, "error")


def test_the_command_that_leaves_out_broken_files_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = good_folder(tmp_path / "data")
    (root / "images" / "broken.jpg").write_text("x")
    check(root, "data.num_classes=3")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("to leave out what cannot")]
    found = check(root, *shlex.split(line.partition(": ")[2])[5:])
    again = check(root, *shlex.split(found["command"])[4:])
    assert again["verdict"].startswith("READY")


@pytest.mark.slow
def test_everything_that_is_wrong_with_files_is_listed_and_a_clean_list_leaves_it_out(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    put(root, "alone", None)
    put(root, "broken", stripes(1, 2, 3))
    (root / "images" / "broken.jpg").write_bytes((root / "images" / "broken.jpg").read_bytes()[:900])
    put(root, "coloured", np.dstack([stripes(1, 2, 3), stripes(9, 8, 7), stripes(0, 255, 0)]))
    put(root, "small", stripes(1, 2, 3)[:30])
    put(root, "empty", stripes(0, 0, 0))
    found = check(root, "data.num_classes=3", "data.val_fraction=0", "data.short_edges=[60]", "check.fix=list")
    errors = of_level(found, "error")
    assert "alone.jpg: has no mask" in errors
    assert "the JPEG is truncated" in errors
    assert "found 1 mask coded in 3 colours" in errors
    assert "empty.png" in json.dumps(found["notices"])
    assert "more than 90 %" in of_level(found, "warning")
    lines = (tmp_path / "out" / "train.odgt").read_text().splitlines()
    assert len(lines) == 13  # 12 good ones and the one that is all ignored
    words = shlex.split(found["command"])
    assert any(word.startswith("data.train.list=") for word in words)
    again = check(root, *words[4:])
    assert again["verdict"] == "READY, WITH WARNINGS"  # about the mask that is all ignored
    assert sum(split["pairs"] for split in again["splits"]) == 13  # a part is held out now, as suggested


def test_images_of_two_splits_are_found_by_content(tmp_path: Path) -> None:
    for part in ("a", "b"):
        put(tmp_path / "data" / part, "x" if part == "a" else "y", stripes(1, 2), np.full((60, 80, 3), 7, np.uint8))
    places = [
        f"data.{split}.{kind}={part}/{kind}"
        for split, part in (("train", "a"), ("val", "b"))
        for kind in ("images", "masks")
    ]
    found = check(tmp_path / "data", *places, "data.num_classes=2")
    assert "1 validation image also used for training" in of_level(found, "warning")


def test_a_second_scan_reads_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = good_folder(tmp_path / "data", count=4)
    records = [
        Record(str(path), str(root / "masks" / f"{path.stem}.png"), Size(60, 80), "folder")
        for path in sorted((root / "images").iterdir())
    ]
    read: list[str] = []

    def counted(path: str, **options: Any) -> NDArray[np.integer]:
        read.append(Path(path).stem)
        return read_label(path, **options)

    monkeypatch.setattr("semseg.data.scan.read_label", counted)
    first = list(scan_pairs(records, root))
    assert first[0] == PairFacts(
        60, 80, "JPEG RGB", "PNG L", {1: 1600, 2: 1600, 3: 1600}, {}, "", 255, objects=first[0].objects
    )
    assert sorted(read) == ["00", "01", "02", "03"]
    read.clear()
    put(root, "02", stripes(1, 2, 3, 4))
    assert [found.ids for found in scan_pairs(records, root)] == [first[0].ids] * 2 + [
        dict.fromkeys((1, 2, 3, 4), 1200),
        first[3].ids,
    ]
    assert read == ["02"]


def test_a_problem_of_the_machine_is_gone_at_the_next_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = good_folder(tmp_path / "data", count=1)
    record = Record(str(root / "images" / "00.jpg"), str(root / "masks" / "00.png"), Size(60, 80), "folder")
    with monkeypatch.context() as broken:
        broken.setattr("semseg.data.scan.read_label", raise_input_output_error)
        assert "Input/output error" in next(iter(scan_pairs([record], root))).problem
    assert next(iter(scan_pairs([record], root))).problem == ""


def raise_input_output_error(path: str, **options: Any) -> NDArray[np.integer]:
    raise DataError(f"{path}: cannot be read (Input/output error).")


def test_a_colour_that_the_class_table_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    mask = np.zeros((60, 80, 3), np.uint8)
    mask[7, 9] = (1, 2, 3)  # blue, green, red
    put(tmp_path, "a", mask)
    record = Record(str(tmp_path / "images/a.jpg"), str(tmp_path / "masks/a.png"), Size(60, 80), "folder")
    colours = ColourIds(((0, 0, 0), (128, 0, 0)), (0, 1), [], always=False)
    split = ScannedSplit("train", [record], list(scan_pairs([record], tmp_path, colours=colours)), [])
    texts = [notice.text for notice in check_files(split)]
    assert "a.png: the colour (3, 2, 1) at row 7, column 9 is not in data.classes" in texts[0]
    assert not any("coded in" in text for text in texts)


@pytest.mark.slow
def test_a_damaged_cache_is_as_none(tmp_path: Path, cache: Path) -> None:
    root = good_folder(tmp_path / "data", count=2)
    check(root, "data.num_classes=3", "data.val_fraction=0")
    (file,) = (cache / "semseg").glob("masks-*.json")
    content = json.loads(file.read_text())
    for spoilt in ("not JSON", json.dumps({key: [stamps, [1, 2]] for key, (stamps, _) in content.items()})):
        file.write_text(spoilt)
        assert check(root, "data.num_classes=3", "data.val_fraction=0")["splits"][0]["ids"] == {
            "1": 3200,
            "2": 3200,
            "3": 3200,
        }


def test_memory_is_counted_without_being_taken() -> None:
    with torch.device("meta"):
        net = build_segmenter("resnet18", "c1", 7).train()
    one, two = (estimate_step_memory(net, Size(64, 64), count) for count in (1, 2))
    assert one is not None and two is not None
    assert one.weights == sum(value.nbytes for value in net.state_dict().values())
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)
    # The first convolution alone keeps its input, 3 x 64 x 64, and its output, 64 x 32 x 32, of float32.
    assert one.activations > 4 * (3 * 64 * 64 + 64 * 32 * 32)
    pytest.importorskip("timm")
    with torch.device("meta"):  # whose batch normalisation refuses the single value that is left of 32 x 32 pixels
        small = build_segmenter("timm", "segformer", 7, {"name": "tf_efficientnet_lite0"}).train()
    memory = estimate_step_memory(small, Size(32, 32), 1)
    assert memory is not None and memory.activations > 0


@pytest.mark.slow
@needs_browser
def test_the_page_opens_from_disk(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    put(root, "<b>odd</b>".replace("/", "_"), stripes(1, 2, 3)[:30])
    check(root, "data.num_classes=3", "data.val_fraction=0")
    seen = evaluate_in_browser(
        tmp_path / "out" / "check.html",
        "[document.querySelector('#verdict h2').textContent, document.querySelectorAll('#classes tbody tr').length, "
        "document.querySelectorAll('#samples img').length, "
        "[...document.querySelectorAll('main b')].filter(each => each.textContent == 'odd').length]",
    )
    assert seen == ["NOT READY", 3, 4, 0]


@needs_browser
@pytest.mark.slow
def test_the_only_chart_of_the_splits_has_labels_of_the_size_of_text(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    put(root, "one_id", stripes(1))
    check(root, "data.num_classes=3", "data.val_fraction=0")
    script = "[...document.querySelectorAll('.figures svg')].map(each => each.getBoundingClientRect().width)"
    (width,) = evaluate_in_browser(tmp_path / "out" / "check.html", script)
    assert width <= 600


# ---- pixels


@pytest.mark.reliability
def test_c24_12_bits_in_files_of_16_are_a_finding(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    for path in (root / "images").iterdir():
        path.unlink()
        cv2.imwrite(str(path.with_suffix(".png")), (np.arange(4800).reshape(60, 80) * 4095 // 4799).astype(np.uint16))
    found = check(root, "data.num_classes=3", "data.short_edges=[60]")
    assert found["verdict"] == "READY, WITH WARNINGS"
    assert "images hold uint16 values; percentiles 0.5 and 99.5 of" in of_level(found, "warning")
    assert "Without data.value_range they are read as 8 bits" in of_level(found, "warning")
    assert found["suggestions"] == {"data.value_range": "[19,4074]"} and "data.value_range=[19," in found["command"]


@pytest.mark.reliability
def test_names_and_values_of_bands_are_suggested_and_written_down(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    for path in (root / "images").iterdir():
        path.unlink()
        values = np.tile(np.arange(4800, dtype=np.float32).reshape(60, 80, 1), (1, 1, 4))
        tifffile.imwrite(path.with_suffix(".tif"), values, photometric="rgb", extrasamples=["unspecified"])
    words = ("data.num_classes=3", "data.short_edges=[60]")
    found = check(root, *words)
    assert found["verdict"] == "READY, WITH WARNINGS" and "images hold 4 bands of float32 values" in of_level(
        found, "note"
    )
    assert found["suggestions"]["data.bands"] == "[red,green,blue,nir]"
    assert found["suggestions"]["data.value_range"] == "[23,4775]"
    assert found["suggestions"]["data.band_mean"].startswith("[null,null,null,2399")
    broken = next((root / "images").iterdir())
    tifffile.imwrite(broken, np.zeros((60, 80, 3), np.float32), photometric="rgb")
    again = check(root, *words)
    assert again["verdict"] == "NOT READY"
    assert f"{broken.name}: holds 3 bands of float32 values, but data.bands names 4" in of_level(again, "error")


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("kind", "largest", "message"),
    [(np.uint16, 1023, "1023 of 65535 (1.6%), which is read as 3 of 255"), (np.uint16, 16383, "16383 of 65535"),
     (np.uint16, 65535, None), (np.uint8, 31, "31 of 255"), (np.uint8, 200, None)],
)  # fmt: skip
def test_c24_images_that_use_a_fraction_of_their_depth_are_counted(
    tmp_path: Path, kind: type, largest: int, message: str | None
) -> None:
    put(tmp_path, "a", stripes(1, 2))
    cv2.imwrite(str(tmp_path / "a.png"), (np.arange(4800).reshape(60, 80) * largest // 4799).astype(kind))
    record = Record(str(tmp_path / "a.png"), str(tmp_path / "masks/a.png"), Size(60, 80), "folder")
    split = ScannedSplit("train", [record], list(scan_pairs([record], tmp_path)), [])
    notices = [notice.text for notice in check_reading(split)]
    assert (message is None and not notices) or (message is not None and message in notices[0])


def test_a_dark_image_is_counted_among_the_others(tmp_path: Path) -> None:
    records = []
    for number in range(3):
        put(tmp_path, f"{number}", stripes(1, 2))
        image = tmp_path / f"{number}.png"
        cv2.imwrite(str(image), np.full((60, 80), 20 if number == 1 else 200, np.uint8))
        records.append(Record(str(image), str(tmp_path / f"masks/{number}.png"), Size(60, 80), "folder"))
    split = ScannedSplit("train", records, list(scan_pairs(records, tmp_path)), [])
    (notice,) = check_reading(split)
    assert "1 of 3 8-bit images use a fraction of their range: the largest value is 20 of 255" in notice.text
    assert [Path(name).name for name in notice.files] == ["1.png"]


def test_samples_of_a_split_are_no_larger_than_their_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semseg.data.scan.NUM_SAMPLED", 3)
    monkeypatch.setattr("semseg.data.scan.NUM_MASKS_MEASURED", 4)
    root = good_folder(tmp_path / "data", count=5)
    records = [
        Record(str(path), str(root / "masks" / f"{path.stem}.png"), Size(60, 80), "folder")
        for path in sorted((root / "images").iterdir())
    ]
    found = list(scan_pairs(records, root))
    assert [facts.largest >= 0 for facts in found] == [True, False, True, False, True]
    assert [bool(facts.objects) for facts in found] == [True, False, True, False, True]


@pytest.mark.reliability
def test_c21_lossy_masks_make_a_data_set_not_ready(tmp_path: Path) -> None:
    root = good_folder(tmp_path / "data")
    for path in list((root / "masks").iterdir())[:3]:
        Image.open(path).save(path.with_suffix(".webp"), quality=90)
        path.unlink()
    found = check(root, "data.num_classes=3", "data.short_edges=[60]")
    assert found["verdict"] == "NOT READY"
    assert "compressed with lossy WebP, which may change ids" in of_level(found, "error")


@pytest.mark.slow
@pytest.mark.reliability
def test_c27_photos_turned_by_180_degrees_need_the_key_and_are_reported(tmp_path: Path) -> None:
    root, exif = good_folder(tmp_path / "data"), Image.Exif()
    exif[0x0112] = 3
    for path in (root / "images").iterdir():
        Image.open(path).rotate(180).save(path, exif=exif)
    words = ("data.num_classes=3", "data.short_edges=[60]")
    found = check(root, *words)
    assert found["verdict"] == "NOT READY"
    assert "data.label_orientation=upright" in of_level(found, "error")
    found = check(root, *words, "data.label_orientation=upright")
    assert found["verdict"] == "READY"
    assert "12 images are rotated by EXIF, and masks are assumed to be drawn on the upright image" in of_level(
        found, "note"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "largest", "padding"),
    [
        (["data.short_edges=[60]"], [64, 96], 0.22),
        (["data.short_edges=[60]", "augment.scale=[2,2]"], [128, 160], 0.06),
        (["data.short_edges=[60]", "augment.scale=[1,2]", "augment.crop=[32,64]"], [32, 64], 0.0),
        (["data.resize=native", "data.crop=[32,64]"], [32, 64], 0.0),
        (["data.resize=native", "data.crop=[512,512]", "augment.scale=[2,2]"], [128, 160], 0.06),
    ],
)
def test_the_plan_has_the_sizes_that_training_has(
    tmp_path: Path, words: list[str], largest: list[int], padding: float
) -> None:
    plan = check(good_folder(tmp_path / "data"), "data.num_classes=3", *words)["plan"]
    assert plan["largest"] == largest
    assert plan["padding"] == pytest.approx(padding, abs=0.01)


# ---- the description of the data set


def check_here(folder: Path, *words: str, code: int = 0) -> str:
    return run_here(folder, "mode=check", "data=folder", "data.short_edges=[60]", *words, *TINY, code=code)


@pytest.mark.slow
def test_a_ready_data_set_is_described_in_a_file_that_trains_it(tmp_path: Path) -> None:
    good_folder(tmp_path / "photos")
    shown = check_here(tmp_path, "data.root=photos", "data.num_classes=3", "output=sub/plants.yaml")
    command = shown.splitlines()[-1]
    assert command.startswith("to train: python run.py experiment=sub/plants.yaml model/encoder=resnet18")
    written = (tmp_path / "sub" / "plants.yaml").read_text()
    described = yaml.safe_load(written)
    expected = {"root": str(tmp_path / "photos"), "num_classes": 3, "short_edges": [60]}
    assert described["data"].items() >= expected.items()
    assert "model" not in described or described["model"] == {"channels_last": True}  # the network is given
    with contextlib.chdir(tmp_path):
        data = load_config(["data=sub/plants.yaml"])[0].data
        trained = load_config(shlex.split(command.partition("run.py ")[2]))[0]
    assert (data.name, data.root, data.num_classes) == ("plants", str(tmp_path / "photos"), 3)
    assert trained.data == data and trained.model.encoder["name"] == "resnet18"
    check_here(tmp_path, "data.root=photos", "data.num_classes=3", "output=sub/plants.yaml")  # the same content
    check_here(tmp_path, "data.root=photos", "data.num_classes=4", "output=sub/plants.yaml", code=2)
    assert (tmp_path / "sub" / "plants.yaml").read_text() == written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "network", "left_out"),
    [
        (["trainer=cpu", "model.label_stride=1"], ("timm", "segformer"), {"label_stride"}),
        (["trainer=cpu", "trainer.max_epochs=3"], ("timm", "segformer"), {"max_epochs"}),
        (["model.deepsup_weight=0.2"], (None, None), {"label_stride"}),  # of another network
        (["model/decoder=c1"], (None, None), {"label_stride"}),
        (["data.short_edges=[96]"], ("timm", "segformer"), set()),  # images are enlarged on purpose
    ],
)
def test_a_setting_leaves_the_network_and_the_length_to_the_recipe(
    tmp_path: Path, words: list[str], network: tuple[str | None, str | None], left_out: set[str]
) -> None:
    good_folder(tmp_path / "photos")
    words = ["data=folder", "data.root=photos", "data.num_classes=3", "model.encoder.weights=none", *words]
    shown = run_here(tmp_path, "mode=check", "check.samples=2", *words, "output=a.yaml")
    recipe = yaml.safe_load((tmp_path / "a.yaml").read_text())
    groups = {key: value for entry in recipe["defaults"] for key, value in entry.items()}
    assert (groups.get("override /model/encoder"), groups.get("override /model/decoder")) == network
    assert {"label_stride", "max_epochs"} - {*recipe["model"], *recipe["trainer"]} == left_out
    command = shlex.split(shown.splitlines()[-1].partition("run.py ")[2])
    with contextlib.chdir(tmp_path):
        config, _ = load_config(command)
    assert (config.data.short_edges == [96]) == ("data.short_edges=[96]" in words)
    assert config.trainer.max_epochs == (3 if "max_epochs" in left_out else recipe["trainer"]["max_epochs"])


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["short_edge", "native"])
def test_a_recipe_for_bands_without_colours_trains(tmp_path: Path, resize: str) -> None:
    root = good_folder(tmp_path / "radar")
    for path in (root / "images").iterdir():
        path.unlink()
        np.save(path.with_suffix(".npy"), np.tile(np.arange(4800, dtype=np.float32).reshape(60, 80, 1), (1, 1, 2)))
    words = ["mode=check", "data=folder", "data.root=radar", "data.num_classes=3", f"data.resize={resize}", *TINY]
    shown = run_here(tmp_path, *words, "output=radar.yaml")
    command = shlex.split(shown.splitlines()[-1].partition("run.py ")[2])
    run_here(tmp_path, *command, "model.encoder.weights=none", "debug=fast", "trainer=cpu", "run_dir=run")


@pytest.mark.slow
def test_a_description_has_the_suggestions_and_paths_beside_it(tmp_path: Path) -> None:
    for split in ("train", "val"):
        good_folder(tmp_path / "raw" / split)
    for kind in ("images", "masks"):  # photos/images/train/..., from photos/train/images/...
        for split in ("train", "val"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / "raw" / split / kind).rename(tmp_path / kind / split)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    words = ["data.images=images", "data.masks=masks", "data.classes=names.txt", "output=plants.yaml"]
    shown = check_here(tmp_path, *words)
    assert yaml.safe_load((tmp_path / "plants.yaml").read_text())["data"].items() >= {
        "root": ".", "classes": "names.txt", "short_edges": [60],
        "train": {"images": "images/train", "masks": "masks/train"},
        "val": {"images": "images/val", "masks": "masks/val"},
    }.items()  # fmt: skip
    assert " data.train.images=" not in shown.splitlines()[-1]


@pytest.mark.slow
def test_a_data_set_that_is_not_ready_is_not_described_and_the_last_line_checks_it_again(tmp_path: Path) -> None:
    good_folder(tmp_path / "photos", ids=(0, 1, 2))
    shown = check_here(tmp_path, "data.root=photos", "output=plants.yaml", code=1)
    assert not (tmp_path / "plants.yaml").exists()
    assert "to train:" not in shown and "error: the data set" not in shown
    other, last = shown.splitlines()[-2:]
    assert last.startswith("to check as suggested: python run.py mode=check data=folder")
    assert other.startswith("to check with 0 as unlabelled: python run.py mode=check data=folder")
    check_here(tmp_path, *shlex.split(other.partition("mode=check ")[2].partition(" output=")[0]))
    page = min(tmp_path.glob("runs/*/check.html")).read_text()  # of the first check
    assert "To check as suggested:" in page and "To train" not in page
    run_here(tmp_path, *shlex.split(last.partition("run.py ")[2]))
    assert (tmp_path / "plants.yaml").is_file()


def test_the_map_of_a_description_makes_first_id_void(tmp_path: Path) -> None:
    data = configured("data=folder", "data.num_classes=2", "data.first_id=0", "data.map={0: 0, 255: 1}").data
    content = describe_data_set(data, configured("data=folder").data, tmp_path / "a.yaml")
    assert content["map"] == {0: 0, 255: 1} and "first_id" not in content
