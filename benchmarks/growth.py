"""How costs grow with the work: the time of one unit of it should stay as it is.

    OMP_NUM_THREADS=1 python benchmarks/growth.py                  # prints a table, writes docs/images/growth.svg

Reading a training image of a longer and longer list; evaluating more images, more classes, more pixels; a training step
of more images. One thread, processor's time, medians of rounds that take turns; resnet18_dilated8 + c1 at small sizes.
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
from loader import dataset, draw_mix, found
from markupsafe import Markup

from semseg.config.preprocessing import PREPROCESSING
from semseg.data.plan import TrainPlan
from semseg.evaluation.inference import predict
from semseg.evaluation.metrics import confusion_counts
from semseg.nets.registry import build_segmenter
from semseg.reports.charts import svg_element
from semseg.training.losses import segmentation_loss

PLOT = Path(__file__).resolve().parent.parent / "docs" / "images" / "growth.svg"
RGB = PREPROCESSING["rgb_mean_std"]
PANEL, MARGIN = 150, 34  # pixels of the drawing


class Series(NamedTuple):
    """One kind of growth: what a piece of work of each size costs."""

    name: str
    unit: str  # of the sizes
    sizes: list[int]
    works: list[Callable[[], object]]
    divide: bool = True  # by the size: the work is that many units

    def per_unit(self, rounds: int) -> list[float]:
        """Milliseconds of the processor for one unit of each size, medians."""
        taken: list[list[float]] = [[] for _ in self.works]
        for _ in range(rounds + 1):  # the first warms up
            for seconds, work in zip(taken, self.works, strict=True):
                started = time.process_time()
                work()
                seconds.append(time.process_time() - started)
        units = self.sizes if self.divide else [1] * len(self.sizes)
        return [1e3 * statistics.median(seconds[1:]) / unit for seconds, unit in zip(taken, units, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        measured = [(series, series.per_unit(options.rounds)) for series in all_series(Path(folder))]
    for series, costs in measured:
        row = "  ".join(f"{size:,}: {cost:.3g}" for size, cost in zip(series.sizes, costs, strict=True))
        print(f"{series.name}, ms by {series.unit}: {row}")
    options.plot.write_text(drawing([(series, costs) for series, costs in measured]) + "\n")
    print(f"written {options.plot}")


def all_series(folder: Path) -> Iterator[Series]:
    records = found(draw_mix(folder, 12))
    counts = [100, 1_000, 10_000, 100_000, 1_000_000]
    yield Series("read an image", "images in the list", counts, [reading(records, count) for count in counts], False)
    counts = [2, 4, 8, 16]
    yield Series("evaluate an image", "images", counts, [evaluating(150, 128, count) for count in counts])
    classes = [19, 150, 1000]
    yield Series("evaluate, per class", "classes", classes, [evaluating(count, 128, 1) for count in classes])
    edges = [96, 192, 384]
    works = [evaluating(150, edge, 1) for edge in edges]
    yield Series("evaluate, per pixel", "pixels", [edge * edge for edge in edges], works)
    counts = [1, 2, 4, 8]
    yield Series("train an image", "images per device", counts, [stepping(count) for count in counts])


def reading(records: list, count: int) -> Callable[[], object]:
    """The same images, whatever the length `count` of the list that they are part of."""
    listed = records * (count // len(records) + 1)
    data = dataset(listed[:count], exact=False)
    plan = TrainPlan([record.size for record in listed[:count]], seed=0, batch_size=1, short_edges=[300])
    plan.sub_batch(0)  # draws the order of the pass

    def work() -> None:
        for number in range(3 * len(records)):
            # The plan is asked, and each file read as often as any other: only the length of the list differs.
            sub_batch = plan.sub_batch(number)
            _ = data[sub_batch._replace(records=(number % len(records),), short_edge=300)]

    return work


def evaluating(num_classes: int, edge: int, images: int) -> Callable[[], object]:
    net = build_segmenter("resnet18_dilated8", "c1", num_classes).eval()
    image = torch.randint(0, 256, (3, edge, edge), dtype=torch.uint8)
    label = torch.randint(0, num_classes, (edge, edge))

    def work() -> None:
        for _ in range(images):
            ids = predict(net, [image], (edge, edge), RGB).ids
            confusion_counts(ids, label, num_classes)

    return work


def stepping(images: int) -> Callable[[], object]:
    net = build_segmenter("resnet18_dilated8", "c1_deepsup", 150).train()
    image, label = torch.randn(images, 3, 96, 128), torch.randint(0, 150, (images, 12, 16))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    return partial(step, net, optimizer, image, label)


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, image: torch.Tensor, label: torch.Tensor) -> None:
    optimizer.zero_grad()
    segmentation_loss(net(image), label).total.backward()
    optimizer.step()


# ---- the picture


def drawing(measured: list[tuple[Series, list[float]]]) -> str:
    """A panel a series: cost of a unit against size, both on logarithmic axes that double; 1 is the largest size's."""
    panels = [panel(series, costs, number) for number, (series, costs) in enumerate(measured)]
    width, height = len(panels) * (PANEL + MARGIN) + MARGIN, PANEL + 2 * MARGIN
    style = svg_element("style", "text{font:10px sans-serif;fill:#777}.line{fill:none;stroke:#3b6fd4;stroke-width:2}"
                    ".dot{fill:#3b6fd4}.even{stroke:#999;stroke-dasharray:3 3}.box{fill:none;stroke:#999}")  # fmt: skip
    return str(
        svg_element(
            "svg", style, *panels, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width
        )
    )


def panel(series: Series, costs: list[float], number: int) -> Markup:
    """Relative cost of a unit between 0 and 2 (what is above is at the edge)."""
    left, top = MARGIN + number * (PANEL + MARGIN), MARGIN
    count = len(costs)
    places = [left + PANEL * (index + 0.5) / count for index in range(count)]
    heights = [top + PANEL * (1 - min(cost / costs[-1], 2) / 2) for cost in costs]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(places, heights, strict=True))
    dots = [
        svg_element("circle", svg_element("title", f"{size:,} {series.unit}: {cost:.3g} ms a unit"), class_="dot",
                cx=f"{x:.1f}", cy=f"{y:.1f}", r=3)
        for size, cost, x, y in zip(series.sizes, costs, places, heights, strict=True)
    ]  # fmt: skip
    middle = top + PANEL / 2
    ends = {series.sizes[0]: places[0], series.sizes[-1]: places[-1]}
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
