"""How costs scale with the amount of work: the time per unit should stay constant.

    OMP_NUM_THREADS=1 python benchmarks/growth.py                  # prints a table, writes docs/images/growth.svg

Reading a training image from lists of increasing length; evaluating more images, more classes, more pixels; training
steps of more images. One thread, CPU time, medians of rounds that take turns; resnet18_dilated8 + c1 at small sizes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from loader import build_dataset, draw_images, list_records
from markupsafe import Markup

from semseg.config.preprocessing import PREPROCESSING
from semseg.data.plan import TrainPlan
from semseg.evaluation.inference import predict_class_map
from semseg.evaluation.metrics import confusion_counts
from semseg.nets.registry import build_segmenter
from semseg.reports.charts import svg_element
from semseg.training.losses import segmentation_loss

PLOT = Path(__file__).resolve().parent.parent / "docs" / "images" / "growth.svg"
RGB = PREPROCESSING["rgb_mean_std"]
PANEL, MARGIN = 150, 34  # pixels of the drawing


class Series(NamedTuple):
    """The cost of one kind of work at several sizes."""

    name: str
    unit: str  # unit of the sizes
    sizes: list[int]
    actions: list[Callable[[], object]]
    is_divided: bool = True  # by the size, because an action does that many units of work

    def measure_unit_costs(self, rounds: int) -> list[float]:
        """CPU time in ms of one unit at each size, medians."""
        times: list[list[float]] = [[] for _ in self.actions]
        for _ in range(rounds + 1):  # the first one warms up
            for seconds, action in zip(times, self.actions, strict=True):
                start = time.process_time()
                action()
                seconds.append(time.process_time() - start)
        units = self.sizes if self.is_divided else [1] * len(self.sizes)
        return [1e3 * statistics.median(seconds[1:]) / unit for seconds, unit in zip(times, units, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        measured = [(series, series.measure_unit_costs(options.rounds)) for series in build_series(Path(folder))]
    for series, costs in measured:
        row = "  ".join(f"{size:,}: {cost:.3g}" for size, cost in zip(series.sizes, costs, strict=True))
        print(f"{series.name}, ms by {series.unit}: {row}")
    options.plot.write_text(draw_plot(measured) + "\n")
    print(f"written {options.plot}")


def build_series(folder: Path) -> Iterator[Series]:
    records = list_records(draw_images(folder, 12))
    counts = [100, 1_000, 10_000, 100_000, 1_000_000]
    yield Series(
        "read an image", "images in the list", counts, [build_reading(records, count) for count in counts], False
    )
    counts = [2, 4, 8, 16]
    yield Series("evaluate an image", "images", counts, [build_evaluation(150, 128, count) for count in counts])
    classes = [19, 150, 1000]
    yield Series("evaluate, per class", "classes", classes, [build_evaluation(count, 128, 1) for count in classes])
    edges = [96, 192, 384]
    actions = [build_evaluation(150, edge, 1) for edge in edges]
    yield Series("evaluate, per pixel", "pixels", [edge * edge for edge in edges], actions)
    counts = [1, 2, 4, 8]
    yield Series("train an image", "images per device", counts, [build_training(count) for count in counts])


def build_reading(records: list, count: int) -> Callable[[], object]:
    """Read the same images, whatever the length `count` of the list that contains them."""
    listed = records * (count // len(records) + 1)
    data = build_dataset(listed[:count], exact=False)
    plan = TrainPlan([record.size for record in listed[:count]], seed=0, batch_size=1, short_edges=[300])
    plan.sub_batch(0)  # draws the order of the pass

    def run() -> None:
        for number in range(3 * len(records)):
            # Each file is read equally often, so that only the length of the list differs.
            sub_batch = plan.sub_batch(number)
            _ = data[sub_batch._replace(records=(number % len(records),), short_edge=300)]

    return run


def build_evaluation(num_classes: int, edge: int, images: int) -> Callable[[], object]:
    net = build_segmenter("resnet18_dilated8", "c1", num_classes).eval()
    image = torch.randint(0, 256, (3, edge, edge), dtype=torch.uint8)
    label = torch.randint(0, num_classes, (edge, edge))

    def run() -> None:
        for _ in range(images):
            ids = predict_class_map(net, [image], (edge, edge), RGB).ids
            confusion_counts(ids, label, num_classes)

    return run


def build_training(images: int) -> Callable[[], object]:
    net = build_segmenter("resnet18_dilated8", "c1_deepsup", 150).train()
    image, label = torch.randn(images, 3, 96, 128), torch.randint(0, 150, (images, 12, 16))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    return partial(train_step, net, optimizer, image, label)


def train_step(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, image: torch.Tensor, label: torch.Tensor
) -> None:
    optimizer.zero_grad()
    segmentation_loss(net(image), label).total.backward()
    optimizer.step()


# ---- the plot


def draw_plot(measured: list[tuple[Series, list[float]]]) -> str:
    """One panel per series: the cost of a unit relative to that at the largest size, against the size."""
    panels = [draw_panel(series, costs, number) for number, (series, costs) in enumerate(measured)]
    width, height = len(panels) * (PANEL + MARGIN) + MARGIN, PANEL + 2 * MARGIN
    style = svg_element("style", "text{font:10px sans-serif;fill:#777}.line{fill:none;stroke:#3b6fd4;stroke-width:2}"
                    ".dot{fill:#3b6fd4}.even{stroke:#999;stroke-dasharray:3 3}.box{fill:none;stroke:#999}")  # fmt: skip
    return str(
        svg_element(
            "svg", style, *panels, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width
        )
    )


def draw_panel(series: Series, costs: list[float], number: int) -> Markup:
    """Relative cost of a unit between 0 and 2; larger values are drawn at the edge."""
    left, top = MARGIN + number * (PANEL + MARGIN), MARGIN
    count = len(costs)
    positions = [left + PANEL * (index + 0.5) / count for index in range(count)]
    heights = [top + PANEL * (1 - min(cost / costs[-1], 2) / 2) for cost in costs]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(positions, heights, strict=True))
    dots = [
        svg_element("circle", svg_element("title", f"{size:,} {series.unit}: {cost:.3g} ms per unit"), class_="dot",
                cx=f"{x:.1f}", cy=f"{y:.1f}", r=3)
        for size, cost, x, y in zip(series.sizes, costs, positions, heights, strict=True)
    ]  # fmt: skip
    middle = top + PANEL / 2
    ends = {series.sizes[0]: positions[0], series.sizes[-1]: positions[-1]}
    return svg_element(
        "g",
        svg_element("rect", class_="box", x=left, y=top, width=PANEL, height=PANEL),
        svg_element("line", class_="even", x1=left, x2=left + PANEL, y1=middle, y2=middle),
        svg_element("polyline", class_="line", points=path),
        *dots,
        svg_element("text", series.name, x=left, y=top - 8),
        *(svg_element("text", f"{size:,}", x=f"{x:.0f}", y=top + PANEL + 13, text_anchor="middle")
          for size, x in ends.items()),
        svg_element("text", series.unit, x=left + PANEL / 2, y=top + PANEL + 27, text_anchor="middle"),
        *(svg_element("text", str(value), x=left - 4, y=f"{top + PANEL * (1 - value / 2) + 3:.0f}", text_anchor="end")
          for value in (0, 1, 2)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
