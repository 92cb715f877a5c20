"""What an import writes, whole or not at all; sizes and rotated photographs; spoiled files."""

from __future__ import annotations

import json
import random
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.exports import (
    CAT,
    HEIGHT,
    NAMES,
    WIDTH,
    WRITERS,
    corners,
    expected,
    flat,
    import_here,
    labelme_content,
    labelme_shape,
    masks_of,
    photo,
    put,
    write_coco,
    write_labelme,
    write_roboflow,
    write_yolo,
)
from semseg.data.geometry import Size
from semseg.data.images import apply_orientation
from semseg.data.importing.draw import draw_label, paint
from semseg.data.importing.model import AnnotatedImage, Annotation, Polygon, make_ring
from semseg.data.importing.write import clean_name
from semseg.data.records import Record, split_by_hash
from semseg.errors import ConfigError, DataError

pytestmark = pytest.mark.reliability


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_images_are_links_or_copies_and_names_that_differ_in_case_or_suffix_do_not_collide(tmp_path: Path) -> None:
    names = ["x/a", "x/A", "y/a"]
    write_coco(tmp_path / "e", names)
    put(tmp_path / "e/images/x/a.png", photo("other"))
    content = json.loads((tmp_path / "e/annotations/instances_default.json").read_text())
    content["images"].append({"id": 9, "file_name": "x/a.png", "height": HEIGHT, "width": WIDTH})
    put(tmp_path / "e/annotations/instances_default.json", content)
    import_here(tmp_path / "e", tmp_path / "links")
    masks = masks_of(tmp_path / "links")
    assert len({name.casefold() for name in masks}) == 4
    assert all(path.is_symlink() for path in (tmp_path / "links/images").rglob("*.*"))
    import_here(tmp_path / "e", tmp_path / "copies", "import.copy=true")
    copied = sorted(path.read_bytes() for path in (tmp_path / "copies/images").rglob("*.*"))
    assert copied == sorted([*(photo(name) for name in names), photo("other")])
    assert not any(path.is_symlink() for path in (tmp_path / "copies").rglob("*"))
    assert clean_name('a:b/../c\n"d*.jpg') == "a_b/c__d_.jpg"


def test_an_archive_is_read_in_place_and_its_images_are_copied(tmp_path: Path) -> None:
    write_yolo(tmp_path / "e")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as file:
        for path in sorted((tmp_path / "e").rglob("*.*")):
            file.write(path, path.relative_to(tmp_path / "e"))
    import_here(tmp_path / "e.zip", tmp_path / "out")
    assert np.array_equal(masks_of(tmp_path / "out")["train/images/b"], expected())
    assert (tmp_path / "out/images/train/images/b.jpg").read_bytes() == photo("b")


def test_nothing_is_left_after_an_error_and_an_existing_folder_is_kept(tmp_path: Path) -> None:
    write_coco(tmp_path / "e")
    put(tmp_path / "e/images/d.jpg", photo("d")[:200])
    (tmp_path / ".out.unfinished").mkdir()  # of a process that was killed
    with pytest.raises(DataError, match=r"image 4: .*d\.jpg: .*Nothing is written; data\.on_bad=skip"):
        import_here(tmp_path / "e", tmp_path / "out")
    assert list_names(tmp_path) == ["e"]
    put(tmp_path / "out/mine.txt", "x")
    with pytest.raises(ConfigError, match=r"output=.*out: exists and is not empty"):
        import_here(tmp_path / "e", tmp_path / "out", "data.on_bad=skip")
    assert list_names(tmp_path) == ["e", "out"] and list_names(tmp_path / "out") == ["mine.txt"]


def test_images_that_cannot_be_read_are_left_out_on_request_up_to_a_limit(tmp_path: Path) -> None:
    write_coco(tmp_path / "e")
    (tmp_path / "e/images/d.jpg").rename(tmp_path / "e/images/D.jpg")
    with pytest.raises(DataError, match=r"More than data\.max_bad=0\.01 of 4 entries are bad"):
        import_here(tmp_path / "e", tmp_path / "out", "data.on_bad=skip")
    imported = import_here(tmp_path / "e", tmp_path / "out", "data.on_bad=skip", "data.max_bad=0.3")
    assert len(imported.images) == 3 and len(masks_of(tmp_path / "out")) == 3
    assert "image 4: there is no image d.jpg, but D.jpg: upper and lower case differ" in imported.problems[0]
    (tmp_path / "e/images/c.jpg").unlink()
    with pytest.raises(DataError, match=r"^2 entries cannot be imported\..*\n.*image 3.*\n.*image 4"):
        import_here(tmp_path / "e", tmp_path / "other")


@pytest.mark.parametrize("unlabelled", ["background", "ignore"])
def test_pixels_nobody_annotated_are_background_or_ignored(unlabelled: str, tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e")
    content = json.loads(file.read_text())
    content["annotations"] = content["annotations"][:-2]  # nothing is annotated in the last image
    put(file, content)
    imported = import_here(tmp_path / "e", tmp_path / "out", f"import.unlabelled={unlabelled}")
    masks = masks_of(tmp_path / "out")
    other = 3 if unlabelled == "background" else 0
    assert np.array_equal(masks["a"], expected(other=other)) and len(imported.names) == (3 if other else 2)
    assert (imported.num_empty, len(masks)) == ((0, 4) if other else (1, 3))


def test_one_class_alone_is_refused_and_needs_a_background(tmp_path: Path) -> None:
    write_coco(tmp_path / "e", annotations=[], categories=[{"id": 1, "name": "cat"}])
    with pytest.raises(DataError, match=r"nothing is annotated"):
        import_here(tmp_path / "e", tmp_path / "out", "import.unlabelled=ignore")
    entry = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [flat(CAT)]}
    write_coco(tmp_path / "e", ["a"], annotations=[entry], categories=[{"id": 1, "name": "cat"}])
    with pytest.raises(DataError, match=r"cat is the only class, .* import\.unlabelled=background"):
        import_here(tmp_path / "e", tmp_path / "out", "import.unlabelled=ignore")
    entry["segmentation"] = [[0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]]
    write_coco(tmp_path / "e", ["a"], annotations=[entry], categories=[{"id": 1, "name": "cat"}])
    with pytest.raises(DataError, match=r"cat is the only class, .* Every pixel is annotated as it: annotate another"):
        import_here(tmp_path / "e", tmp_path / "out")


# ---- sizes and rotated photographs


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("is_upright", [True, False])
def test_the_size_of_annotations_shows_the_grid_and_masks_are_upright(
    orientation: int, is_upright: bool, tmp_path: Path
) -> None:
    path = put(tmp_path / "a.jpg", photo("a", (30, 50), orientation))
    is_swapped = orientation >= 5
    size = Size(50, 30) if is_swapped and is_upright else Size(30, 50)
    shape = Polygon((make_ring([2, 3, 12, 3, 12, 9, 2, 9]),))
    item = AnnotatedImage(str(path), "a.jpg", "", size, "origin", (Annotation(0, (shape,), "one"),))
    drawing = draw_label(item, smaller_on_top=True, max_pixels=10**6)
    drawn, _ = paint(item, size, smaller_on_top=True)
    turns = is_swapped and not is_upright
    assert np.array_equal(drawing.label, apply_orientation(drawn, orientation) if turns else drawn)
    assert drawing.label.shape == ((50, 30) if is_swapped else (30, 50))
    assert drawing.is_assumed == (orientation in (2, 3, 4)) and drawing.is_rotated == (orientation != 1)


def test_annotations_for_another_size_are_refused_with_both_sizes(tmp_path: Path) -> None:
    file = write_coco(tmp_path / "e")
    put(tmp_path / "e/images/b.jpg", photo("b", (24, 32), orientation=6))
    message = r"image 2: its annotations are for 48 x 64 pixels, .*b\.jpg is 24 x 32, or 32 x 24 upright"
    with pytest.raises(DataError, match=message):
        import_here(tmp_path / "e", tmp_path / "out")
    content = json.loads(file.read_text())
    content["images"][1] |= {"height": 10**9, "width": 10**9}
    put(file, content)
    with pytest.raises(DataError, match=r"are for 1000000000 x 1000000000 pixels"):
        import_here(tmp_path / "e", tmp_path / "out")
    with pytest.raises(DataError, match=r"more than the limit data\.max_pixels=1000"):
        import_here(tmp_path / "e", tmp_path / "out", "data.max_pixels=1000")


def test_masks_of_rotated_photographs_are_read_as_they_were_written(tmp_path: Path) -> None:
    for name, orientation in (("a", 1), ("b", 6), ("c", 3)):
        put(tmp_path / "e" / f"{name}.jpg", photo(name, (30, 50), orientation))
        content = labelme_content(name, [labelme_shape("cat", corners((2, 3, 10, 6)))])
        put(tmp_path / "e" / f"{name}.json", content | {"imageHeight": 30, "imageWidth": 50})
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert [image.is_assumed for image in imported.images] == [False, False, True]
    assert "label_orientation: upright" in (tmp_path / "out/semseg.yaml").read_text()
    assert masks_of(tmp_path / "out")["b"].shape == (50, 30)


def test_copies_of_one_photograph_are_on_one_side(tmp_path: Path) -> None:
    records = [
        Record(f"{tmp_path}/{name}_jpg.rf.{copy:08x}.jpg", None, Size(1, 1), "")
        for name in "abcdefghij"
        for copy in range(5)
    ]
    kept, held_out = split_by_hash(records, 0.3, tmp_path)
    sides = [{Path(record.image).name.partition(".rf.")[0] for record in side} for side in (kept, held_out)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    with pytest.raises(DataError, match="copies of one photograph"):
        split_by_hash(records[:5], 0.3, tmp_path)
    write_roboflow(tmp_path / "e")
    import_here(tmp_path / "e", tmp_path / "out")
    assert (tmp_path / "out/images/train/b_jpg.rf.22bb.jpg").is_file()  # the mark stays in the name


# ---- bad input


@pytest.mark.parametrize(
    ("name", "word", "tools"),
    [
        ("labelme", "import.crowd=ignore", "COCO JSON"),
        ("voc", "import.boxes=draw", "COCO JSON, YOLO"),
        ("coco", "import.line_width=3", "LabelMe"),
        ("roboflow", "import.overlaps=order", "COCO JSON, Label Studio JSON, LabelMe, YOLO"),
    ],
)
def test_an_option_for_other_formats_is_refused_unless_it_is_the_default(
    name: str, word: str, tools: str, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path / "e")
    with pytest.raises(ConfigError, match=rf"^{word}(\.0)?: has no effect on .*\. It is for {tools}\.$"):
        import_here(tmp_path / "e", tmp_path / "out", word)
    import_here(tmp_path / "e", tmp_path / "out", "import.crowd=class", "import.boxes=refuse", "import.line_width=10")


@pytest.mark.parametrize("name", list(WRITERS))
def test_an_image_or_mask_of_another_size_is_named_in_every_format(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "e")
    path = next(iter(sorted((tmp_path / "e").rglob("*.jpg"))))
    path.write_bytes(photo("a", (HEIGHT // 2, WIDTH)))
    if name == "yolo":  # has no sizes
        import_here(tmp_path / "e", tmp_path / "out")
        return
    with pytest.raises(DataError, match=r"48 x 64 pixels, .*is 24 x 64") as caught:
        import_here(tmp_path / "e", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", list(WRITERS))
def test_an_image_that_leads_out_of_the_export_is_not_read(name: str, tmp_path: Path) -> None:
    main = WRITERS[name](tmp_path / "e", ["a", "b"])
    put(tmp_path / "secret.jpg", photo("secret"))
    text = main.read_text(encoding="utf-8-sig")
    if name in ("coco", "labelme", "label_studio"):
        for old in ('"a.jpg"', '"..\\\\photos\\\\a.jpg"', '"/data/upload/1/0a1b2c3d-a.jpg"'):
            text = text.replace(old, '"../../secret.jpg"')
        main.write_text(text)
    elif name == "yolo":
        main.write_text(text.replace("../train/images", "list.txt"))
        put(tmp_path / "e/list.txt", f"../secret.jpg\n{tmp_path / 'secret.jpg'}\n")
    elif name == "voc":
        put(tmp_path / "e/ImageSets/Segmentation/default.txt", "../../secret\n")
    else:
        put(tmp_path / "e/valid/../secret_mask.png", photo("x"))
    if name == "roboflow":
        import_here(tmp_path / "e", tmp_path / "out")
        return
    with pytest.raises(DataError, match=r"no image .*secret\.jpg below|lists secret, which has no mask"):
        import_here(tmp_path / "e", tmp_path / "out")


def test_links_of_an_export_are_followed_and_a_link_to_nothing_is_a_missing_image(tmp_path: Path) -> None:
    write_coco(tmp_path / "e", ["a", "b"])
    image = tmp_path / "e" / "images" / "a.jpg"
    image.rename(tmp_path / "photo.jpg")
    image.symlink_to(tmp_path / "photo.jpg")
    import_here(tmp_path / "e", tmp_path / "out")
    assert (tmp_path / "out" / "images" / "a.jpg").read_bytes() == photo("a")
    for target in ("/nowhere.jpg", "a.jpg"):
        image.unlink()
        image.symlink_to(target)
        with pytest.raises(DataError, match=r"image 1: there is no image a\.jpg below .*Set import\.images"):
            import_here(tmp_path / "e", tmp_path / "other")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "voc"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 100_000, b"null", b"\xff\xfe\x00", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_truncated_and_absurd_files_end_in_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    main = WRITERS[name](tmp_path / "e")
    whole = main.read_bytes()
    main.write_bytes(whole[: len(whole) // 2] if content == b"{" else content)
    if name == "roboflow":
        put(tmp_path / "e/valid/_classes.csv", main.read_bytes())
    try:
        import_here(tmp_path / "e", tmp_path / "out", f"import.format={name}")
    except DataError as error:
        assert len(str(error)) < 1200 and not (tmp_path / "out").exists()
    else:
        assert name in ("labelme", "yolo", "roboflow") and (tmp_path / "out").exists()  # the other half was enough


ABSURD_NUMBERS = {
    "not a number": "NaN", "infinite": "-Infinity", "too large": "1e999", "4000 digits": "-" + "9" * 4000,
    "6000 digits": "9" * 6000, "nested": "[" * 5000 + "]" * 5000, "half a letter": '"\\ud800"', "nothing": "null",
}  # fmt: skip


@pytest.mark.parametrize("name", ["coco", "labelme", "label_studio"])
@pytest.mark.parametrize(
    "number",
    [
        name if name in ("not a number", "nested", "4000 digits") else pytest.param(name, marks=pytest.mark.long)
        for name in ABSURD_NUMBERS
    ],
)
def test_an_absurd_number_in_json_ends_in_one_line_or_changes_nothing(name: str, number: str, tmp_path: Path) -> None:
    main = WRITERS[name](tmp_path / "e", ["a"])
    import_here(tmp_path / "e", tmp_path / "whole")
    expected_masks, text = masks_of(tmp_path / "whole"), main.read_text()
    places = list(re.finditer(r"(?<=[ \[])-?[0-9.]+(?=[,\]}])", text))
    for place in places[:: max(1, len(places) // 5)]:
        main.write_text(text[: place.start()] + ABSURD_NUMBERS[number] + text[place.end() :])
        output = tmp_path / str(place.start())
        try:
            import_here(tmp_path / "e", output, f"import.format={name}")
        except DataError as error:
            assert len(str(error)) < 1500 and main.name in str(error) and not output.exists()
        else:
            masks = masks_of(output)
            assert all(np.array_equal(mask, masks[key]) for key, mask in expected_masks.items())


@pytest.mark.parametrize("name", ["coco", "labelme", "label_studio"])
def test_a_repeated_key_in_json_is_refused(name: str, tmp_path: Path) -> None:
    main = WRITERS[name](tmp_path / "e", ["a"])
    text = main.read_text()
    keys = list(re.finditer(r'"(\w+)": ', text))
    for key in keys[:: len(keys) // 5]:
        main.write_text(f"{text[: key.start()]}{key[0]}null, {text[key.start() :]}")
        with pytest.raises(DataError, match=rf"an object has the key '{key[1]}' twice, and which value is right"):
            import_here(tmp_path / "e", tmp_path / "out", f"import.format={name}")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def spoil(value: Any, replacement: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one of its parts replaced or removed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {name: each for name, each in value.items() if name != key}
        return {**value, key: spoil(value[key], replacement, chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        index = chance.randrange(len(value))
        return [*value[:index], spoil(value[index], replacement, chance), *value[index + 1 :]]
    return replacement


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco", "labelme", "label_studio"])
def test_spoiled_json_gives_a_data_set_or_one_error_and_nothing_else(name: str, tmp_path: Path) -> None:
    main = WRITERS[name](tmp_path / "e", ["a", "b"])
    content = json.loads(main.read_text())
    kinds = Counter[str]()

    @settings(
        max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(JSON_VALUES, st.integers(0, 2**32))
    def check(replacement: Any, seed: int) -> None:
        output = tmp_path / "out" / str(kinds.total())
        main.write_text(json.dumps(spoil(content, replacement, random.Random(seed))))
        try:
            import_here(tmp_path / "e", output, f"import.format={name}")
        except (DataError, ConfigError) as error:
            assert not output.exists() and str(tmp_path) in str(error)
            kinds["refused"] += 1
        else:
            assert all(mask.max() <= 4 for mask in masks_of(output).values())
            kinds["read"] += 1

    check()
    assert min(kinds["read"], kinds["refused"]) > 2


@pytest.mark.parametrize("name", ["coco", "yolo"])
@pytest.mark.slow
def test_spoiled_bytes_give_a_data_set_or_one_error(name: str, tmp_path: Path) -> None:
    main = WRITERS[name](tmp_path / "e", ["a", "b"])
    label = tmp_path / "e/train/labels/b.txt" if name == "yolo" else main
    whole, chance, kinds = label.read_bytes(), random.Random(0), Counter[str]()
    for number in range(60):
        spoilt = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            start = chance.randrange(len(spoilt))
            spoilt[start : start + chance.randint(0, 3)] = chance.choice(
                [b"", b"-", b"9" * 9, b"e9", b"\xff", b'"', b"]"]
            )
        label.write_bytes(bytes(spoilt))
        try:
            import_here(tmp_path / "e", tmp_path / "out" / str(number), f"import.format={name}")
        except DataError:
            kinds["refused"] += 1
        else:
            kinds["read"] += 1
    assert min(kinds["read"], kinds["refused"]) > 0


def test_many_annotations_of_a_whole_image_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semseg.data.importing.draw.MAX_KEPT_BYTES", 2000)
    file = write_coco(tmp_path / "e", ["a"])
    content = json.loads(file.read_text())
    whole = [0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]
    extra = [{"id": 9, "image_id": 1, "category_id": 90, "segmentation": [whole]}]
    put(file, content | {"annotations": extra + content["annotations"] + extra})
    import_here(tmp_path / "e", tmp_path / "out")
    assert np.array_equal(masks_of(tmp_path / "out")["a"], expected(1, 2, 2))


def test_labelme_files_are_found_in_folders_of_splits(tmp_path: Path) -> None:
    write_labelme(tmp_path / "e/train", NAMES[1:])
    write_labelme(tmp_path / "e/val", NAMES[:1])
    imported = import_here(tmp_path / "e", tmp_path / "out")
    assert Counter(image.split for image in imported.images) == {"train": 3, "val": 1}
