"""The ways in which people keep images and masks, each on a small tree in its layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from helpers.in_process import configured
from semseg.collate import collate
from semseg.data.classes import ClassTable
from semseg.data.datasets import ReadOptions, TrainDataset
from semseg.data.label_map import UNSCORED_ID, ColourIds, LabelMap
from semseg.data.labels import read_label
from semseg.data.pairs import read_pair
from semseg.data.plan import SubBatch
from semseg.data.sources import DataSource
from semseg.errors import ConfigError, DataError

RED, GREEN, BLACK, BLUE = (200, 10, 10), (10, 200, 10), (0, 0, 0), (10, 10, 200)


def save(path: Path, pixels: NDArray[np.uint8]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def image(path: Path, height: int = 8, width: int = 12) -> Path:
    return save(path, np.full((height, width, 3), 90, np.uint8))


def ids(*values: int) -> NDArray[np.uint8]:
    """(8, 12), a column of 12 / n pixels for each value."""
    return np.repeat(np.array(values, np.uint8), 12 // len(values))[None].repeat(8, axis=0)


def colours(*values: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.array(values, np.uint8)[ids(*range(len(values)))]


def source(root: Path, *words: str) -> DataSource:
    return DataSource(configured(f"data.root={root}", *words).data)


def labels(data: DataSource, split: str = "train") -> list[list[int]]:
    """The first row of each label of a split."""
    pairs = [read_pair(record, data.label_map) for record in data.records(split)]
    return [np.asarray(pair.label)[0].tolist() for pair in pairs]


# ---- masks in colours


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    for name, mask in (("a", colours(RED, GREEN)), ("b", colours(BLACK, RED, GREEN))):
        image(tmp_path / "images" / f"{name}.png")
        save(tmp_path / "masks" / f"{name}.png", mask)
    (tmp_path / "classes.csv").write_text("index,name,R,G,B\n0,wall,200,10,10\n1,tree,10,200,10\n")
    return tmp_path


COLOURED = ["data=folder", "data.classes=classes.csv", "data.val_fraction=0"]


def test_masks_in_colours_are_read_by_the_table_and_black_is_not_scored(coloured: Path) -> None:
    data = source(coloured, *COLOURED)
    assert labels(data) == [[0] * 6 + [1] * 6, [-1] * 4 + [0] * 4 + [1] * 4]


@pytest.mark.parametrize("exact", [True, False])
def test_training_reads_colours_in_both_ways_of_decoding(coloured: Path, exact: bool) -> None:
    data = source(coloured, *COLOURED)
    dataset = TrainDataset(
        data.records("train"),
        data.label_map,
        ReadOptions(max_long_edge=100, size_divisor=4),
        collate=collate,
        label_stride=1,
        exact=exact,
    )
    assert dataset[SubBatch(0, (1,), 8, (False,))].label[0, 0].tolist() == [-1] * 4 + [0] * 4 + [1] * 4


def test_an_unknown_colour_is_named_with_its_first_pixel(coloured: Path) -> None:
    mask = colours(RED, GREEN)
    mask[5, 7] = BLUE
    path = save(coloured / "masks" / "a.png", mask)
    with pytest.raises(DataError, match=r"masks/a\.png: the colour \(10, 10, 200\) at row 5, column 7"):
        labels(source(coloured, *COLOURED))
    data = source(coloured, *COLOURED, "data.ignore_colors=[[10,10,200]]")
    assert read_label(path, colours=data.label_map.colours)[5, 7] == UNSCORED_ID


@pytest.mark.slow
def test_a_grey_colour_file_holds_ids_unless_the_type_is_set(coloured: Path) -> None:
    (coloured / "classes.csv").write_text("index,name,R,G,B\n0,wall,1,1,1\n1,tree,10,200,10\n")
    grey = save(coloured / "masks" / "a.png", colours((1, 1, 1), (2, 2, 2)))
    auto, always = (
        source(coloured, *COLOURED, f"data.mask_type={kind}").label_map.colours for kind in ("auto", "colors")
    )
    assert read_label(grey, colours=auto)[0].tolist() == [1] * 6 + [2] * 6
    with pytest.raises(DataError, match=r"the colour \(2, 2, 2\)"):
        read_label(grey, colours=always)
    assert source(coloured, *COLOURED, "data.mask_type=ids").label_map.colours is None


@pytest.mark.parametrize(("background", "row"), [("0,0,0", [0] * 12), ("9,9,9", [-1] * 12)])
@pytest.mark.parametrize("words", [[], ["data.first_id=0", "data.ignore=[255]"]])
def test_a_black_mask_of_a_data_set_in_colours_is_read_as_the_others_are(
    coloured: Path, background: str, row: list[int], words: list[str]
) -> None:
    (coloured / "classes.csv").write_text(f"index,name,R,G,B\n0,background,{background}\n1,tree,10,200,10\n")
    save(coloured / "masks" / "a.png", colours((0, 0, 0), (0, 0, 0)))
    save(coloured / "masks" / "b.png", colours((0, 0, 0), GREEN))
    assert labels(source(coloured, *COLOURED, *words)) == [row, row[:6] + [1] * 6]


@pytest.mark.parametrize("words", [[], ["data.first_id=0", "data.ignore=[]"]])
def test_masks_in_black_and_white_are_coded_in_colours_if_the_table_has_them(coloured: Path, words: list[str]) -> None:
    (coloured / "classes.csv").write_text("index,name,R,G,B\n0,ground,0,0,0\n1,building,255,255,255\n")
    save(coloured / "masks" / "a.png", colours((0, 0, 0), (0, 0, 0)))
    save(coloured / "masks" / "b.png", colours((0, 0, 0), (255, 255, 255)))
    assert labels(source(coloured, *COLOURED, *words)) == [[0] * 12, [0] * 6 + [1] * 6]


@pytest.mark.parametrize("first", ["train", "val"])
def test_every_split_is_read_alike_whichever_is_read_first(coloured: Path, first: str) -> None:
    rows = ("index,name,R,G,B", "0,ground,0,0,0", "1,building,255,255,255", "2,tree,10,200,10")
    (coloured / "classes.csv").write_text("\n".join(rows))
    image(coloured / "more" / "c.png")
    save(coloured / "black" / "c.png", colours((0, 0, 0), (0, 0, 0)))
    save(coloured / "masks" / "a.png", colours((0, 0, 0), GREEN))
    save(coloured / "masks" / "b.png", colours((0, 0, 0), GREEN))
    data = source(coloured, "data=folder", "data.classes=classes.csv", "data.val.images=more", "data.val.masks=black")
    data.records(first)
    assert data.label_map.colours is not None and data.label_map.colours.codes_grey


def test_a_black_mask_of_a_data_set_of_ids_in_rgb_files_is_id_0(coloured: Path) -> None:
    save(coloured / "masks" / "a.png", colours((0, 0, 0), (0, 0, 0)))
    save(coloured / "masks" / "b.png", colours((0, 0, 0), (1, 1, 1)))
    words = ["data.first_id=0", "data.ignore=[255]"]
    assert labels(source(coloured, *COLOURED, *words)) == [[0] * 12, [0] * 6 + [1] * 6]


def test_palette_files_give_ids_or_by_option_colours(coloured: Path) -> None:
    picture = Image.fromarray(ids(0, 1), "P")
    picture.putpalette([*GREEN, *RED])
    picture.save(coloured / "masks" / "a.png")
    words = [*COLOURED, "data.first_id=0", "data.ignore=[]"]
    (coloured / "one.txt").write_text("a\n")
    for kind, row in (("ids", [0] * 6 + [1] * 6), ("colors", [1] * 6 + [0] * 6)):
        assert labels(source(coloured, *words, f"data.mask_type={kind}", "data.train.stems=one.txt")) == [row]


def test_two_classes_of_one_colour_cannot_be_distinguished() -> None:
    with pytest.raises(ConfigError, match=r"two classes have the colour \(200, 10, 10\)"):
        ColourIds([RED, GREEN, RED], [1, 2, 3], [], always=True)


@pytest.mark.parametrize(
    ("name", "text", "palette"),
    [
        ("c.txt", "wall\n\ntree\n", None),
        ("c.json", json.dumps([{"name": "wall", "color": RED}, {"name": "tree", "color": GREEN}]), (RED, GREEN)),
        ("c.json", json.dumps({"classes": [{"name": "wall"}, {"name": "tree"}]}), None),
    ],
)
def test_class_tables_of_every_kind(
    tmp_path: Path, name: str, text: str, palette: tuple[tuple[int, int, int], ...] | None
) -> None:
    (tmp_path / name).write_text(text)
    table = ClassTable.from_file(tmp_path / name)
    assert table.names == ("wall", "tree")
    assert palette is None or table.palette == palette


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]", '[{"name": "a", "color": [1, 2]}]', '[{"color": [1, 2, 3]}]'])
def test_a_broken_class_table_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=r"c\.json: the class table cannot be read"):
        ClassTable.from_file(tmp_path / "c.json")


# ---- data.map


def test_a_map_merges_ids_and_predictions_are_written_with_the_lowest() -> None:
    ids_of = LabelMap(2, ignore=(0,), ids={9: 1, 7: 0, 8: 1, 255: None})
    assert ids_of(np.array([0, 7, 8, 9, 255]), "a").tolist() == [-1, 0, 1, 1, -1]
    assert ids_of.to_raw(np.array([0, 1])).tolist() == [7, 8]
    with pytest.raises(DataError, match=r"a: label ids 5 \(1 pixels\) are in neither data\.map nor data\.ignore=\[0\]"):
        ids_of(np.array([5]), "a")


def test_a_map_comes_from_the_command_line_and_back_from_a_file(tmp_path: Path) -> None:
    words = ["data=folder", "data.num_classes=2", "data.ignore=[]", "data.map={7:0,8:1,9:null}"]
    data = source(tmp_path, *words)
    assert data.label_map(np.array([7, 8, 9]), "a").tolist() == [0, 1, -1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{7:0}", "classes 1 of 2 have no raw id"),
        ("{7:0,8:2}", "8: 2 is out of range"),
        ("{7:0,a:1}", "must be like"),
        ("[1]", "must be like"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(tmp_path: Path, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source(tmp_path, "data=folder", "data.num_classes=2", f"data.map={value}")


# ---- layouts


@pytest.mark.slow
def test_cityscapes_with_train_ids_and_with_label_ids(tmp_path: Path) -> None:
    for split in ("train", "val"):
        city = f"{split}/ulm"
        image(tmp_path / "leftImg8bit" / city / "ulm_000_leftImg8bit.png")
        stem = tmp_path / "gtFine" / city / "ulm_000_gtFine"
        save(stem.with_name(stem.name + "_labelTrainIds.png"), ids(0, 18, 255))
        save(stem.with_name(stem.name + "_labelIds.png"), ids(7, 33, 4))
        save(stem.with_name(stem.name + "_color.png"), colours(RED))
        stem.with_name(stem.name + "_polygons.json").write_text("{}")
    for name in ("cityscapes", "cityscapes_labelids"):
        data = source(tmp_path, f"data={name}")
        assert data.classes.num_classes == 19 and data.classes.names[18] == "bicycle"
        assert labels(data) == labels(data, "val") == [[0] * 4 + [18] * 4 + [-1] * 4]
    assert source(tmp_path, "data=cityscapes_labelids").label_map.to_raw(np.array([0, 18])).tolist() == [7, 33]


@pytest.mark.slow
def test_pascal_voc_takes_the_stems_of_its_lists(tmp_path: Path) -> None:
    for stem in ("2007_01", "2007_02", "2007_03"):
        image(tmp_path / "JPEGImages" / f"{stem}.jpg")
    for stem, mask in (("2007_01", ids(0, 20, 255)), ("2007_02", ids(1, 2))):
        picture = Image.fromarray(mask, "P")
        picture.putpalette(list(range(256)) * 3)
        (tmp_path / "SegmentationClass").mkdir(exist_ok=True)
        picture.save(tmp_path / "SegmentationClass" / f"{stem}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_01\n")
    (lists / "val.txt").write_text("2007_02\n")
    data = source(tmp_path, "data=voc2012")
    assert labels(data) == [[0] * 4 + [20] * 4 + [-1] * 4]
    assert labels(data, "val") == [[1] * 6 + [2] * 6]
    assert data.classes.palette[1] == (128, 0, 0) and data.classes.names[20] == "tv monitor"
    (lists / "train.txt").write_text("2007_01\n2009_99\n")
    with pytest.raises(DataError, match=r"train\.txt:2: there is no image 2009_99"):
        source(tmp_path, "data=voc2012").records("train")


def test_coco_stuff_leaves_out_the_numbers_that_are_not_in_use(tmp_path: Path) -> None:
    image(tmp_path / "images" / "train2017" / "000000000009.jpg")
    save(tmp_path / "stuffthingmaps" / "train2017" / "000000000009.png", ids(0, 12, 181, 255))
    data = source(tmp_path, "data=cocostuff")
    assert labels(data) == [[0] * 3 + [11] * 3 + [170] * 3 + [-1] * 3]
    assert (data.classes.names[11], data.classes.names[170]) == ("stop sign", "wood")


def test_camvid_in_its_lists(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    save(tmp_path / "b.png", ids(0, 1, 11))
    line = {"fpath_img": "a.png", "fpath_segm": "b.png", "width": 12, "height": 8}
    (tmp_path / "training.odgt").write_text(json.dumps(line))
    assert labels(source(tmp_path, "data=camvid")) == [[-1] * 4 + [0] * 4 + [10] * 4]


# ---- lists


def two_pairs(root: Path) -> None:
    for name, mask in (("a", ids(1)), ("b", ids(2))):
        image(root / f"{name}.png")
        save(root / f"{name}_mask.png", mask)


CSV = "image,mask,split\na.png,a_mask.png,train\nb.png,b_mask.png,val\n"
JSON_LINES = """{"image": "a.png", "mask": "a_mask.png", "split": "train"}

{"image": "b.png", "mask": "b_mask.png", "split": "val"}
"""


@pytest.mark.parametrize(("name", "text"), [("list.csv", CSV), ("list.jsonl", JSON_LINES)])
def test_one_table_for_all_splits(tmp_path: Path, name: str, text: str) -> None:
    two_pairs(tmp_path)
    (tmp_path / name).write_text("\ufeff" + text)
    words = ["data=folder", "data.num_classes=2", f"data.train.list={name}", f"data.val.list={name}"]
    data = source(tmp_path, *words)
    assert (labels(data), labels(data, "val")) == ([[0] * 12], [[1] * 12])
    assert data.records("val")[0].origin.endswith(f"{name}:3")
    assert data.records("train")[0].size == (8, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "picture,mask\na.png,b.png\n", r"l\.csv:1: columns image and mask are needed"),
        ("l.csv", "image,mask\n../a.png,b.png\n", r"l\.csv:2: image '\.\./a\.png' leaves the data folder"),
        ("l.csv", "image,mask\nnone.png,a_mask.png\n", "there is no such file|No such file"),
        ("l.csv", "image,mask\n", "the list names no image of train"),
        ("l.jsonl", '{"image": "a.png"\n', r"l\.jsonl:1: not one JSON object"),
        ("l.jsonl", '["a.png"]\n', r"l\.jsonl:1: a line must be an object"),
    ],
)
def test_a_table_that_does_not_fit_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    two_pairs(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        source(tmp_path, "data=folder", "data.num_classes=2", f"data.train.list={name}").records("train")


def test_images_and_masks_can_be_named_from_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "pictures" / "a.png")
    save(tmp_path / "labels" / "a.png", ids(1, 2))
    monkeypatch.chdir(tmp_path)
    words = ["data=folder", "data.num_classes=2", "data.val_fraction=0"]
    data = source(tmp_path / "nowhere", *words, "data.images=pictures", "data.masks=labels")
    assert labels(data) == [[0] * 6 + [1] * 6]
    with pytest.raises(ConfigError, match="set both, or neither"):
        source(tmp_path, *words, "data.images=pictures")


@pytest.mark.parametrize("cut", [["data.val_fraction=0.4"], ["data.folds=3", "data.fold=0"]])
def test_images_named_from_where_one_is_have_one_split_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: list[str]
) -> None:
    for index in range(12):
        image(tmp_path / "set" / "pictures" / f"{index}.png")
        save(tmp_path / "set" / "labels" / f"{index}.png", ids(1, 2))
    words = ["data=folder", "data.num_classes=2", *cut]
    held_out = []
    for folder in ("set", "set/pictures", "."):
        monkeypatch.chdir(tmp_path / folder)
        images, masks = (os.path.relpath(tmp_path / "set" / name) for name in ("pictures", "labels"))
        held_out.append(
            [
                Path(record.image).name
                for record in source(tmp_path, *words, f"data.images={images}", f"data.masks={masks}").records("val")
            ]
        )
    assert held_out[0] == held_out[1] == held_out[2] != []
