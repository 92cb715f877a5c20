from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers.browser import evaluate_in_browser, needs_browser
from semseg.data.classes import ClassTable
from semseg.evaluation.bootstrap import ConfidenceIntervals
from semseg.evaluation.evaluator import Speed, SplitCounts
from semseg.evaluation.metrics import Counts
from semseg.evaluation.result import EvaluationResult, ImageScore, build_result
from semseg.reports.charts import Line, Mark
from semseg.reports.curves import Curves
from semseg.reports.evaluation_page import (
    ConfusedPair,
    EvaluationReport,
    build_example_legend,
    build_score_tables,
    choose_examples,
    draw_confusion_chart,
    encode_example,
    find_confused_pairs,
    render_evaluation_page,
    write_evaluation_page,
)
from semseg.reports.run_card import NO_CHECKOUT, RunCard

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
    examples = tuple(
        encode_example(group, images[n], picture, label, prediction, classes=CLASSES)
        for group, n in choose_examples(images, 1)
    )
    loss = Line("train/loss", (0, 1, 2), (3.0, 2.0, 1.0))
    score = Line("val/miou", (1, 2), (0.5, 0.25), has_dots=True)
    best = Mark(1, "best validation: epoch 2")
    curves = (Curves("loss", (loss,), best, 2), Curves("mean IoU", (score,), best, 2))
    return EvaluationReport(
        title=f"report of {HOSTILE}",
        subtitle="five images",
        result=result_of(CONFUSION, CLASSES)._replace(images=images),
        num_images=num_images,
        examples=examples,
        curves=curves,
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
            examples=tuple(
                encode_example("best", images[n], photo, ids, ids.T.reshape(ids.shape), classes=classes)
                for n in range(9)
            ),
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


def test_confused_pairs_are_sorted_by_their_pixels() -> None:
    confusion = np.array([[600, 300, 100], [0, 40, 0], [0, 10, 0]])  # all of the third class is wrong, but it is small
    assert find_confused_pairs(confusion) == [
        ConfusedPair(0, 1, 0.3, 300, 300 / 410),
        ConfusedPair(0, 2, 0.1, 100, 100 / 410),
        ConfusedPair(2, 1, 1.0, 10, 10 / 410),
    ]


def test_the_page_ranks_confusions_by_pixels_and_by_share() -> None:
    confusion = np.array([[600, 300, 100], [0, 40, 0], [0, 10, 0]])
    tables = build_score_tables(result_of(confusion, ClassTable.from_names(["sky", "road", "boat"])))
    orders = {key: [(pair.label, pair.predicted) for pair in pairs] for key, _, pairs in tables.rankings}
    assert orders == {"pixels": [(0, 1), (0, 2), (2, 1)], "share": [(2, 1), (0, 1), (0, 2)]}


def test_classes_are_ordered_by_pixels_and_those_without_a_score_are_apart() -> None:
    confusion = np.array([[10, 2, 0, 0], [0, 80, 0, 0], [0, 0, 0, 0], [1, 0, 0, 30]])
    tables = build_score_tables(result_of(confusion, ClassTable.from_names(["sky", "road", "boat", "car"])))
    assert [row.score.name for row in tables.rows] == ["road", "car", "sky"]
    assert [row.missed for row in tables.rows] == [0, 1 / 123, 2 / 123]
    assert [score.name for score in tables.absent] == ["boat"]


def test_the_heat_map_has_the_classes_with_the_most_confused_pixels() -> None:
    confusion = np.diag([500] * 30)
    confusion[25, 26] = 400
    confusion[3, 4] = 10
    confusion[5:25, 0] = 100  # twenty classes that are confused more often than 3 and 4
    drawn = draw_confusion_chart(confusion, [f"class{n}" for n in range(30)])
    assert drawn is not None and "class25 predicted as class26: 44.4 %" in drawn and "class3 " not in drawn


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


def test_the_legend_names_labelled_and_predicted_classes_largest_first() -> None:
    entries = build_example_legend(np.array([[0, 0], [0, -1]]), np.array([[0, 1], [1, 1]]), CLASSES)
    assert [(entry.name, entry.labelled, entry.predicted) for entry in entries] == [
        ("sky", 0.75, 0.25),
        ("road", 0, 0.75),
    ]


# ---- in a browser


@needs_browser
def test_a_click_on_a_header_sorts_and_leaves_missing_values_at_the_end(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_evaluation_page(page, report())
    answer = evaluate_in_browser(
        page,
        """(() => {
          const table = document.querySelector("#classes table");
          const click = (n) => {
            const head = table.tHead.rows[0].cells[n];
            head.querySelector("button").click();
            return [head.ariaSort, [...table.tBodies[0].rows].map((row) => row.cells[0].innerText)];
          };
          const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
          const start = [...table.tBodies[0].rows].map((row) => row.cells[0].innerText);
          return {start, down: click(2), precision: click(4), up: click(4), name: click(1),
                  requests: requests.filter((n) => !/^data:/.test(n))};
        })()""",
    )
    assert answer["start"] == ["0", "1", "2"]  # by pixels; 3 has no score
    assert answer["down"] == ["descending", ["0", "1", "2"]]
    assert answer["precision"] == ["descending", ["0", "1", "2"]]
    assert answer["up"] == ["ascending", ["1", "0", "2"]]  # nothing was predicted as 2
    assert answer["name"] == ["ascending", ["2", "1", "0"]]
    assert answer["requests"] == []


@needs_browser
def test_on_a_phone_the_page_is_as_wide_as_the_window(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_evaluation_page(page, report())
    widths = evaluate_in_browser(page, "[innerWidth, document.documentElement.scrollWidth]", width=390)
    assert widths == [390, 390]


@needs_browser
def test_a_table_that_continues_fades_at_that_edge(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_evaluation_page(page, report())
    answer = evaluate_in_browser(
        page,
        """(async () => {
          const frame = document.querySelector("#classes .scroll");
          const settle = () => new Promise((resume) => requestAnimationFrame(() => requestAnimationFrame(resume)));
          await settle();
          const fades = () => [...frame.classList].filter((name) => name.startsWith("more")).sort().join(" ");
          const edges = [fades()];
          frame.scrollLeft = 20; await settle(); edges.push(fades());
          frame.scrollLeft = frame.scrollWidth; await settle(); edges.push(fades());
          return edges;
        })()""",
        width=400,
    )
    assert answer == ["more-right", "more-left more-right", "more-left"]


@needs_browser
def test_one_ranking_of_the_confusions_is_shown_at_a_time(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write_evaluation_page(page, report())
    answer = evaluate_in_browser(
        page,
        """(() => {
          const shown = () => [...document.querySelectorAll(".ranking")].map((part) => part.offsetHeight > 0);
          const before = shown();
          document.querySelector("#by-share").click();
          return [before, shown()];
        })()""",
    )
    assert answer == [[True, False], [False, True]]
