"""Class tables: the built-in ones, and CSV, JSON and text files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semseg.config.schema import DataConfig
from semseg.data.classes import ClassTable, built_in_classes
from semseg.data.sources import DataSource
from semseg.errors import DataError


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
        ("index,name,R,G,B\n1,a,1,2,x\n", ":2: index, R, G and B must be integers"),
        ("index,name,R,G,B\n1,a,1,2\n", ":2: index, R, G and B must be integers"),
        ("index,name,R,G,B\n1,a,1,2,256\n", ":2: a colour is three integers"),
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


@pytest.mark.reliability
def test_c36_lines_of_a_text_file_that_begin_with_a_sign_are_comments(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text('# mine\nroad\n\n"#1"\nsky # blue\n')
    assert ClassTable.from_file(tmp_path / "classes.txt").names == ("road", "#1", "sky # blue")


def test_a_table_with_semicolons_is_read_as_spreadsheets_write_it(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("index;name;R;G;B\n0;a, b;1;2;3\n1;c;4;5;6\n")
    table = ClassTable.from_file(tmp_path / "t.csv")
    assert table.names == ("a, b", "c") and table.palette == ((1, 2, 3), (4, 5, 6))


@pytest.mark.parametrize(
    "text",
    [
        "index\tname\tR\tG\tB\n0\ta, b\t1\t2\t3\n1\tc\t4\t5\t6\n",
        "Index;Name;r;g;b\n0;a, b;1;2;3\n1;c;4;5;6\n;;;;\n",
        "sep=;\nindex;name;R;G;B\n0;a, b;1;2;3\n1;c;4;5;6\n",
        '"index","name","R","G","B"\n"0","a, b","1","2","3"\n,,,,\n"1","c","4","5","6"\n',
    ],
)
def test_a_table_of_a_spreadsheet_may_have_tabs_capitals_a_line_sep_and_empty_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    table = ClassTable.from_file(tmp_path / "t.csv")
    assert table.names == ("a, b", "c") and table.palette == ((1, 2, 3), (4, 5, 6))
    *_, last = (line for line in text.splitlines() if "4" in line)
    (tmp_path / "t.csv").write_text(text + last.replace("4", "x"))
    with pytest.raises(DataError, match=rf"t\.csv:{len(text.splitlines()) + 1}: index, R, G and B must be integers"):
        ClassTable.from_file(tmp_path / "t.csv")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.json"])
def test_a_table_in_another_encoding_is_to_be_saved_in_utf_8(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_text("index,name,R,G,B\n0,K\u00e4se,1,2,3\n", encoding=encoding)
    with pytest.raises(
        DataError, match=rf"{name}: the class table is not UTF-8 text \(byte \d+\)\. Save it as text in"
    ):
        ClassTable.from_file(tmp_path / name)


def test_the_numbers_of_a_json_table_decide_the_order_of_its_classes(tmp_path: Path) -> None:
    for key, numbers in (("index", (2, 0, 1)), ("index", (3, 1, 2)), ("id", (30, 10, 20))):
        rows = [{key: number, "name": name} for number, name in zip(numbers, "cab", strict=True)]
        (tmp_path / "t.json").write_text(json.dumps({"classes": rows}))
        assert ClassTable.from_file(tmp_path / "t.json").names == ("a", "b", "c"), (key, numbers)
    for key, numbers, message in (
        ("index", (0, 2, 3), "indices must be"), ("index", (0, 1, None), "indices must be"), ("id", (1, 1, 2), "twice")
    ):  # fmt: skip
        rows = [{key: number, "name": name} for number, name in zip(numbers, "cab", strict=True)]
        (tmp_path / "t.json").write_text(json.dumps(rows))
        with pytest.raises(DataError, match=message):
            ClassTable.from_file(tmp_path / "t.json")


def test_colours_of_some_classes_only_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"name": "a", "color": [1, 2, 3]}, {"name": "b"}]')
    with pytest.raises(DataError, match=r"t\.json: .*some classes have a color, and some have none"):
        ClassTable.from_file(tmp_path / "t.json")


@pytest.mark.parametrize(("name", "text"), [("t.txt", "road\n"), ("t.csv", "index,name,R,G,B\n0,road,1,2,3\n")])
def test_a_table_of_one_class_is_refused_before_anything_is_trained(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"data.classes={name}: names one class, and a network needs at least 2"):
        DataSource(DataConfig(root=str(tmp_path), classes=name))


def test_tables_of_json_need_names_and_take_both_spellings_of_colour(tmp_path: Path) -> None:
    path = tmp_path / "classes.json"
    path.write_text('[{"name": "a", "colour": [1, 2, 3]}, {"name": "b", "color": [4, 5, 6]}]')
    assert ClassTable.from_file(path).palette == ((1, 2, 3), (4, 5, 6))
    for text, message in (
        ('["a", "b"]', r'a class is \{"name": "sky", .*got \'a\''),
        ('[{"name": null}, {"name": "b"}]', "a class is "),
        ('{"0": "a"}', "neither a list of classes, nor an object with that list under `classes`"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            ClassTable.from_file(path)


def test_headers_may_have_blanks_and_label_maps_of_cvat_no_colours(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("index, name, R, G, B\n0, sky, 1, 2, 3\n1, road, 4, 5, 6\n")
    assert ClassTable.from_file(tmp_path / "a.csv").names == ("sky", "road")
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\ncat:::\ndog: small:::\n")
    assert ClassTable.from_file(tmp_path / "labelmap.txt").names == ("cat", "dog: small")
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\ncat:250,50,83::\ndog:::\n")  # as imports read it
    expected = ClassTable(("background", "cat", "dog"), ((0, 0, 0), (250, 50, 83), (0, 128, 0)))
    assert ClassTable.from_file(tmp_path / "labelmap.txt") == expected
