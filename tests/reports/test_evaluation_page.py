from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.browser import in_browser, needs_browser
from semseg.config.schema import Config, LossConfig
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.data.records import Record
from semseg.evaluation.bootstrap import ConfidenceIntervals
from semseg.evaluation.evaluator import Speed, SplitCounts
from semseg.evaluation.metrics import Counts
from semseg.evaluation.result import EvaluationResult, ImageScore, build_result
from semseg.reports.charts import Line, average_points, draw_heat_map, draw_histogram, draw_line_chart, round_ticks
from semseg.reports.curves import Curves, read_training_curves, run_folder_of_checkpoint
from semseg.reports.evaluation_page import (
    ConfusedPair,
    EvaluationReport,
    Example,
    build_example_legend,
    choose_examples,
    draw_confusion_chart,
    rank_confused_pairs,
    render_evaluation_page,
    write_evaluation_page,
)
from semseg.reports.pictures import MAX_EDGE, draw_error_map, encode_strip, resize_nearest, shrink
from semseg.reports.run_card import (
    NO_CHECKOUT,
    RunCard,
    build_run_card,
    compute_data_fingerprint,
    describe_git_state,
    mask_argument,
    mask_secrets,
)

HOSTILE = "<img src=x onerror=alert(1)> & \"quoted\" 'name'"
CLASSES = ClassTable(("sky", "road", HOSTILE, "boat"), ((0, 0, 255), (128, 128, 128), (255, 0, 0), (0, 255, 0)))
# Rows are labels. boat is neither labelled nor predicted.
CONFUSION = np.array([[6, 2, 0, 0], [0, 8, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0]])
CARD = RunCard(
    "python run.py mode=eval", f"mode: eval\nname: {HOSTILE}\n", {"torch": "2.10"}, NO_CHECKOUT, "cpu", "today", None
)


def result_of(confusion: np.ndarray, classes: ClassTable) -> EvaluationResult:
    counts = SplitCounts([Counts(torch.from_numpy(confusion), 1)], None, [], Speed(1.0, {}))
    intervals = ConfidenceIntervals(100, (0.2, 0.4), None)
    return build_result(
        counts, classes, range(classes.num_classes), rule="present", root=Path("/data"), intervals=intervals
    )


def report(num_images: int = 5) -> EvaluationReport:
    """A page with everything on it, about one small picture."""
    images = [ImageScore(f"a&b/{n}.jpg", n / 10, n / 10) for n in range(num_images)]
    label = np.array([[0, 0, 1], [-1, 2, 2]])
    prediction = np.array([[0, 1, 1], [0, 1, 0]])
    picture = np.full((2, 3, 3), 200, np.uint8)
    examples = tuple(Example(group, images[n], picture, label, prediction) for group, n in choose_examples(images, 1))
    curve = Curves("loss", (Line("train/loss", (1, 2, 3), (3.0, 2.0, 1.0)),))
    return EvaluationReport(
        title=f"report of {HOSTILE}",
        subtitle="five images",
        result=result_of(CONFUSION, CLASSES)._replace(images=images),
        examples=examples,
        curves=(curve,),
        card=CARD,
    )


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


# ---- the page


def test_names_with_markup_in_them_stay_text() -> None:
    page = render_evaluation_page(report())
    reader = read(page)
    assert HOSTILE in reader.text
    assert not [attributes for tag, attributes in reader.tags if tag == "img" and attributes.get("src") == "x"]
    assert not [attributes for _, attributes in reader.tags if "onerror" in attributes]
    assert "a&b/4.jpg" in reader.text


def test_the_page_refers_to_nothing_outside_itself() -> None:
    page = render_evaluation_page(report())
    links = [(name, value) for _, attributes in read(page).tags for name, value in attributes.items()]
    sources = [value or "" for name, value in links if name in ("src", "href", "srcset", "action")]
    assert sources and all(value.startswith(("data:image/", "#")) for value in sources)
    assert "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page


def test_scores_are_in_percent_and_missing_scores_not_available() -> None:
    text = read(render_evaluation_page(report())).text
    # IoU: sky 6 of 9, road 8 of 13, the third 0 of 4; boat is absent.
    assert "66.67" in text and "61.54" in text and "n/a" in text
    assert "20.00 to 40.00 %" in re.sub(r"\s+", " ", text)
    for rule, averaged in (("ade20k", 4), ("present", 3), ("ground_truth", 3)):
        assert re.search(rf"{rule}\s+[\d.]+\s+{averaged} of 4 classes\s+boat", text), rule


def test_the_page_omits_empty_sections() -> None:
    bare = report()._replace(result=result_of(np.diag([1, 2, 3, 0]), CLASSES), examples=(), curves=())
    reader = read(render_evaluation_page(bare))
    ids = {attributes["id"] for tag, attributes in reader.tags if tag == "section"}
    assert ids == {"scores", "classes", "confusion", "run"}
    assert "No classes were confused." in reader.text


def test_every_anchor_of_the_page_is_there() -> None:
    tags = read(render_evaluation_page(report())).tags
    anchors = {str(attributes["href"])[1:] for tag, attributes in tags if tag == "a"}
    assert anchors <= {attributes.get("id") for _, attributes in tags}
    assert len(anchors) == 7


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_evaluation_page(path, report())
    assert path.read_text(encoding="utf-8").endswith("</html>")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_page_of_150_classes_and_nine_photos_stays_below_three_megabytes() -> None:
    rng = np.random.default_rng(0)
    photo = np.asarray(Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).resize((800, 600)))
    ids = np.kron(rng.integers(0, 150, (30, 40)), np.ones((20, 20), int))
    classes = ClassTable(tuple(f"class {n}" for n in range(150)), ((1, 2, 3),) * 150)
    confusion = rng.integers(0, 1000, (150, 150))
    images = [ImageScore(str(n), n / 10, n / 10) for n in range(10)]
    page = render_evaluation_page(
        report()._replace(
            result=result_of(confusion, classes)._replace(images=images),
            examples=tuple(Example("best", images[n], photo, ids, ids.T.reshape(ids.shape)) for n in range(9)),
        )
    )
    assert len(page) < 3_000_000


# ---- scores


def test_the_table_of_classes_holds_the_scores_of_each() -> None:
    sky, road, third, boat = result_of(CONFUSION, CLASSES).class_scores
    assert (sky.name, sky.colour, sky.fraction) == ("sky", (0, 0, 255), 8 / 20)
    assert (sky.iou, sky.accuracy, sky.precision, sky.dice) == (6 / 9, 6 / 8, 6 / 7, 12 / 15)
    assert road.precision == 8 / 13
    assert (third.iou, third.accuracy, third.precision) == (0, 0, None)
    assert (boat.iou, boat.accuracy, boat.precision, boat.dice, boat.fraction) == (None, None, None, None, 0)


def test_a_class_that_is_only_predicted_is_absent_by_the_ground_truth_alone() -> None:
    result = result_of(np.array([[1, 1], [0, 0]]), ClassTable.from_names(["sky", "boat"]))
    assert [score.absent for score in result.rule_scores] == [(), (), ("boat",)]


def test_confused_pairs_are_sorted_by_their_fraction_of_the_label() -> None:
    assert rank_confused_pairs(CONFUSION) == [
        ConfusedPair(2, 1, 0.75, 3),
        ConfusedPair(0, 1, 0.25, 2),
        ConfusedPair(2, 0, 0.25, 1),
    ]


def test_the_heat_map_holds_at_most_twenty_classes() -> None:
    confusion = np.ones((30, 30), int)
    drawn = draw_confusion_chart(confusion, [f"class{n}" for n in range(30)])
    assert drawn is not None and drawn.count("predicted as") == 20 * 20


def test_examples_are_the_best_the_median_and_the_worst_without_repeats() -> None:
    images = [ImageScore(str(n), None, score) for n, score in enumerate([0.5, None, 0.9, 0.1, 0.3, 0.7, 0.6])]
    assert choose_examples(images, 1) == [("best", 2), ("median", 0), ("worst", 3)]
    assert choose_examples(images, 2) == [
        ("best", 2),
        ("best", 5),
        ("median", 6),
        ("median", 0),
        ("worst", 3),
        ("worst", 4),
    ]
    assert choose_examples(images[:2]) == [("best", 0)]
    assert choose_examples([]) == []


# ---- pictures


def test_the_error_map_is_red_where_wrong_grey_where_right_and_striped_where_not_scored() -> None:
    image = np.full((8, 8, 3), (250, 100, 100), np.uint8)
    label = np.zeros((8, 8), int)
    prediction = np.zeros((8, 8), int)
    prediction[0] = 1
    label[4:] = -1
    drawn = draw_error_map(image, label, prediction)
    red, green, blue = drawn[0, 0].tolist()
    assert red > 3 * green and green == blue
    assert len(set(drawn[2, 2].tolist())) == 1 and drawn[2, 2, 0] < 150
    assert {tuple(pixel) for pixel in drawn[4:].reshape(-1, 3).tolist()} == {(20, 20, 20), (70, 70, 70)}


def test_pictures_are_shrunk_to_the_limit_and_never_enlarged() -> None:
    assert shrink(np.zeros((1000, 500, 3), np.uint8), MAX_EDGE).shape == (480, 240, 3)
    assert shrink(np.zeros((10, 20, 3), np.uint8), MAX_EDGE).shape == (10, 20, 3)


def test_class_maps_are_shrunk_without_new_values() -> None:
    ids = np.array([[0, 0, 9, 9], [0, 0, 9, 9], [5, 5, -1, -1], [5, 5, -1, -1]])
    assert resize_nearest(ids, 2, 2).tolist() == [[0, 9], [5, -1]]


def test_maps_of_another_size_than_the_image_are_rejected() -> None:
    with pytest.raises(ValueError, match="differ"):
        encode_strip(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), int), np.zeros((4, 4), int), CLASSES)


def test_the_legend_names_labelled_and_predicted_classes_largest_first() -> None:
    entries = build_example_legend(np.array([[0, 0], [0, -1]]), np.array([[0, 1], [1, 1]]), CLASSES)
    assert [(entry.name, entry.labelled, entry.predicted) for entry in entries] == [
        ("sky", 0.75, 0.25),
        ("road", 0, 0.75),
    ]


# ---- charts


def test_the_histogram_counts_every_image_once() -> None:
    drawn = draw_histogram([0.0, 0.02, 0.5, 1.0], "scores")
    assert "0 to 5 %: 2 images" in drawn and "50 to 55 %: 1 image<" in drawn and "95 to 100 %: 1 image<" in drawn
    assert "median: 26 %" in drawn


def test_a_flat_curve_and_a_single_point_can_be_drawn() -> None:
    flat = draw_line_chart([Line("loss", (1, 2), (0.0, 0.0))], "loss", "step")
    assert "polyline" in flat and "nan" not in flat
    assert "circle" in draw_line_chart([Line("loss", (1,), (2.0,))], "loss", "step")


def test_long_curves_are_averaged_in_groups() -> None:
    line = average_points(Line("loss", tuple(range(10)), tuple(range(10))), max_points=5)
    assert line.x == line.y == (0.5, 2.5, 4.5, 6.5, 8.5)


def test_ticks_are_round_numbers_inside_the_range() -> None:
    assert round_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert round_ticks(130, 171, 4) == [140, 160]
    assert round_ticks(3, 3) == [3]


def test_cells_of_the_heat_map_have_tooltips() -> None:
    drawn = draw_heat_map(np.array([[0.7, 0.3], [0.0001, 0.0]]), ["sky", "<b>"], "confusion")
    assert "sky predicted as &lt;b&gt;: 30.0 % of its pixels" in drawn
    assert "&lt;b&gt; predicted as sky: &lt;0.1 % of its pixels" in drawn


# ---- training curves


def log(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)


def test_the_log_of_a_resumed_run_replaces_repeated_steps(tmp_path: Path) -> None:
    log(tmp_path / "logs/version_9", "epoch,step,train/loss,val/miou\n0,10,3.0,\n0,20,2.0,\n0,20,,0.5\n0,30,9.0,\n")
    log(tmp_path / "logs/version_10", "epoch,step,train/loss\n1,30,1.5\n1,40,1.0\n")
    loss, miou = read_training_curves(tmp_path)
    assert loss == Curves("loss", (Line("train/loss", (10, 20, 30, 40), (3.0, 2.0, 1.5, 1.0)),))
    assert miou == Curves("mean IoU", (Line("val/miou", (20,), (0.5,)),))


def test_equal_learning_rates_are_one_line_and_nan_is_left_out(tmp_path: Path) -> None:
    log(tmp_path / "logs/csv", "step,lr-SGD/decoder,lr-SGD/encoder,train/loss\n1,0.1,0.1,nan\n2,0.05,0.05,2\n")
    loss, rate = read_training_curves(tmp_path)
    assert loss.lines[0].y == (2.0,)
    assert [line.name for line in rate.lines] == ["lr-SGD/decoder"]


def test_a_curve_that_the_resumed_run_did_not_log_is_removed(tmp_path: Path) -> None:
    log(tmp_path / "logs/version_0", "step,train/loss,val/miou\n5,2.0,0.5\n")
    log(tmp_path / "logs/version_1", "step,train/loss\n5,1.0\n")
    assert [curves.title for curves in read_training_curves(tmp_path)] == ["loss"]


def test_a_folder_without_logs_has_no_curves(tmp_path: Path) -> None:
    assert read_training_curves(tmp_path) == ()


def test_the_run_folder_of_a_checkpoint_is_two_levels_up() -> None:
    assert run_folder_of_checkpoint("/runs/a/checkpoints/best.ckpt") == Path("/runs/a")


# ---- run card


def test_secrets_are_masked_at_any_depth() -> None:
    plain = {"logger": {"w": {"API_Key": "abc", "url": "https://me:pw@host/x"}}, "list": [{"token": 1}], "lr": 0.1}
    assert mask_secrets(plain) == {
        "logger": {"w": {"API_Key": "***", "url": "https://***@host/x"}},
        "list": [{"token": "***"}],
        "lr": 0.1,
    }
    assert mask_argument("logger={w:{api_key:abc}}") == "logger=***"
    assert mask_argument("ckpt=epoch=3.ckpt") == "ckpt=epoch=3.ckpt"


def test_the_card_holds_a_command_that_can_be_pasted_and_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_VARIABLE", "do-not-store")
    config = Config(mode="eval", ckpt="my run/best.ckpt", loss=LossConfig(), logger={"w": {"password": "hunter2"}})
    card = build_run_card(config, ["python", "run.py", "ckpt=my run/best.ckpt", "logger.w.password=hunter2"], "cpu")
    assert card.command == "python run.py 'ckpt=my run/best.ckpt' 'logger.w.password=***'"
    assert "ckpt: my run/best.ckpt" in card.config
    assert "hunter2" not in str(card) and "do-not-store" not in str(card)
    assert card.versions["torch"] == torch.__version__.partition("+")[0] or card.versions["torch"] == torch.__version__


def test_the_git_state_names_commit_and_changes_of_the_tracking_checkout_only(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    assert describe_git_state(file) == NO_CHECKOUT
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "a.py"], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}, nothing changed since", describe_git_state(file))
    file.write_text("x = 2\n")
    assert describe_git_state(file).endswith(", files changed since: 1")
    installed = tmp_path / "b.py"
    installed.write_text("")
    assert describe_git_state(installed) == NO_CHECKOUT


def test_the_fingerprint_depends_on_names_and_sizes_but_not_on_root_and_order(tmp_path: Path) -> None:
    def fingerprint(root: Path, names: str, size: int) -> str:
        root.mkdir()
        for name in names:
            (root / name).write_bytes(b"x" * size)
        records = [Record(str(root / name), None, Size(1, 1), "") for name in names]
        found = compute_data_fingerprint(records, root)
        assert found.images == len(names)
        return found.sha256

    base = fingerprint(tmp_path / "a", "xyz", 3)
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert fingerprint(tmp_path / "b", "zxy", 3) == base
    assert fingerprint(tmp_path / "c", "xyz", 4) != base
    assert fingerprint(tmp_path / "d", "xyw", 3) != base


# ---- in a browser


@needs_browser
def test_a_click_on_a_header_sorts_and_leaves_missing_values_at_the_end(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_evaluation_page(page, report())
    answer = in_browser(
        page,
        """(() => {
          const table = document.querySelector("#classes table");
          const click = (n) => {
            const head = table.tHead.rows[0].cells[n];
            head.querySelector("button").click();
            return [head.ariaSort, [...table.tBodies[0].rows].map((row) => row.cells[0].innerText)];
          };
          const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
          return {down: click(2), up: click(2), name: click(1), requests: requests.filter((n) => !/^data:/.test(n))};
        })()""",
    )
    assert answer["down"] == ["descending", ["0", "1", "2", "3"]]
    assert answer["up"] == ["ascending", ["2", "1", "0", "3"]]
    assert answer["name"] == ["ascending", ["2", "3", "1", "0"]]
    assert answer["requests"] == []


@needs_browser
def test_on_a_phone_the_page_is_as_wide_as_the_window(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_evaluation_page(page, report())
    widths = in_browser(page, "[innerWidth, document.documentElement.scrollWidth]", width=390)
    assert widths == [390, 390]
