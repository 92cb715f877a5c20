"""Names, colours and the way from raw ids to class indices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from semseg.data.classes import ClassTable, LabelMap, built_in_classes, generated_palette
from semseg.errors import ConfigError, DataError


def test_ade20k_has_150_names_and_one_pair_of_equal_colours() -> None:
    table = built_in_classes("ade20k")
    assert table.num_classes == len(set(table.names)) == 150
    assert (table.names[0], table.names[12], table.names[149]) == ("wall", "person", "flag")
    assert (table.palette[0], table.palette[12], table.palette[149]) == ((120, 120, 120), (150, 5, 61), (92, 0, 255))
    assert len(set(table.palette)) == 149
    assert (table.names[6], table.names[48]) == ("road", "skyscraper")
    assert table.palette[6] == table.palette[48] == (140, 140, 140)
    assert table.colours().shape == (150, 3)


def test_camvid_has_11_classes() -> None:
    table = built_in_classes("camvid")
    assert table.num_classes == 11
    assert (table.names[0], table.palette[3]) == ("Sky", (128, 64, 128))


@pytest.mark.shared
def test_camvid_is_the_table_beside_the_data() -> None:
    path = Path(__file__).parents[2].parent / "shared/camvid/classes.csv"
    if not path.exists():
        pytest.skip("no shared data")
    assert ClassTable.from_csv(path) == built_in_classes("camvid")


def test_a_table_may_start_at_0_and_come_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_text("\ufeffname,index,R,G,B\r\ndog,1,4,5,6\r\ncat,0,1,2,3\r\n")
    assert ClassTable.from_csv(path) == ClassTable(("cat", "dog"), ((1, 2, 3), (4, 5, 6)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index,name,R,G\n1,a,2,3\n", ":1: columns B are missing"),
        ("", "columns B, G, R, index, name are missing"),
        ("index,name,R,G,B\n", "without gaps"),
        ("index,name,R,G,B\n1,a,1,2,3\n3,b,1,2,3\n", "without gaps"),
        ("index,name,R,G,B\n2,a,1,2,3\n", "without gaps"),
        ("index,name,R,G,B\n1,a,1,2,x\n", ":2: index, R, G and B must be whole numbers"),
        ("index,name,R,G,B\n1,a,1,2\n", ":2: index, R, G and B must be whole numbers"),
        ("index,name,R,G,B\n1,a,1,2,256\n", ":2: a colour is three numbers"),
    ],
)
def test_a_bad_table_is_named_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "classes.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        ClassTable.from_csv(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        ClassTable.from_csv(tmp_path / "none.csv")


def test_generated_colours_differ_clearly_and_do_not_change_with_their_number() -> None:
    palette = np.array(generated_palette(150), np.int64)
    assert generated_palette(20) == generated_palette(150)[:20]
    distance = np.abs(palette[:, None] - palette[None]).max(-1) + 255 * np.eye(150, dtype=np.int64)
    assert distance.min() >= 23  # one step of the grid
    first = palette[:12]
    assert (np.abs(first[:, None] - first[None]).sum(-1) + 255 * np.eye(12, dtype=np.int64)).min() > 90
    assert palette.max(1).min() > 60  # none is nearly black
    assert len(set(generated_palette(512))) == 512
    assert generated_palette(600)[512:] == generated_palette(88)
    assert ClassTable.generated(["a", "b"]).palette == generated_palette(2)


def dichromat(rgb: np.ndarray, opsin: int) -> np.ndarray:
    """Linear RGB without the red (0) or the green (1) cones, by the cones of Vienot, Brettel and Mollon 1999."""
    to_cones = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    lost = np.eye(3)
    lost[opsin] = [[0, 2.02344, -2.52581], [0.494207, 0, 1.24827]][opsin]
    return rgb @ (np.linalg.inv(to_cones) @ lost @ to_cones).T


@pytest.mark.parametrize("opsin", [0, 1], ids=["protanopia", "deuteranopia"])
def test_the_colours_of_few_classes_differ_for_colour_blind_people_too(opsin: int) -> None:
    linear = (np.array(generated_palette(19)) / 255) ** 2.2
    seen = np.clip(dichromat(linear, opsin), 0, 1) ** (1 / 2.2) * 255
    distance = np.abs(seen[:, None] - seen[None]).sum(-1) + 999 * np.eye(19)
    assert distance.min() > 30


def test_by_default_ids_are_those_of_ade20k() -> None:
    index = LabelMap(num_classes=150)(np.array([[0, 1, 150]], np.uint8), "a.png")
    assert index.dtype == np.int16
    assert index.tolist() == [[-1, 0, 149]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_first_id_and_ignored_ids_can_be_set(dtype: type) -> None:
    label_map = LabelMap(num_classes=3, first_id=0, ignore=[255, 254])
    raw = np.array([[0, 2], [254, 255]], dtype)
    assert label_map(raw, "a.png").tolist() == [[0, 2], [-1, -1]]
    assert label_map.to_raw(np.array([0, 2])).tolist() == [0, 2]


def test_sixteen_bits_are_enough_for_a_thousand_classes() -> None:
    assert LabelMap(num_classes=1000)(np.array([1000], np.uint16), "a.png").tolist() == [999]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_an_unknown_id_names_file_ids_and_keys(dtype: type) -> None:
    raw = np.array([1, 2, 3, 151, 151, 160], dtype)
    with pytest.raises(DataError, match=r"a\.png: label ids 151 \(2 pixels\), 160 \(1 pixels\) are neither") as caught:
        LabelMap(num_classes=150)(raw, "a.png")
    for key in ("data.num_classes=150", "data.first_id=1", "data.ignore=[0]", "1..150"):
        assert key in str(caught.value)


@pytest.mark.parametrize("worst", [-1, 70000])
def test_ids_beyond_sixteen_bits_are_unknown(worst: int) -> None:
    with pytest.raises(DataError, match=rf"label ids {worst} \(1 pixels\)"):
        LabelMap(num_classes=3)(np.array([1, worst], np.int32), "a.png")


def test_an_id_cannot_be_a_class_and_ignored() -> None:
    with pytest.raises(ConfigError, match=r"data.ignore contains 0, but data.first_id=0"):
        LabelMap(num_classes=3, first_id=0)


@pytest.mark.parametrize("numbers", [(0, 1, (0,)), (40000, 1, (0,)), (3, -1, ()), (3, 65534, ()), (3, 1, (-1,))])
def test_numbers_that_do_not_fit_are_refused(numbers: tuple[int, int, tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        LabelMap(*numbers)


def test_checking_ids_refuses_what_translating_refuses() -> None:
    label_map = LabelMap(3, first_id=5, ignore=[0, 255])
    for known in ([5, 6, 7], [0, 5, 255], [7]):
        label_map.check(np.array([known], np.uint8), "a.png")
    for unknown in ([4, 5], [0, 3, 255], [8], [-1, 5], [70000, 5]):
        with pytest.raises(DataError, match="label ids"):
            label_map.check(np.array([unknown], np.int32), "a.png")


@pytest.mark.reliability
def test_c36_lines_of_a_text_file_that_begin_with_a_sign_are_comments(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text('# mine\nroad\n\n"#1"\nsky # blue\n')
    assert ClassTable.from_file(tmp_path / "classes.txt").names == ("road", "#1", "sky # blue")
