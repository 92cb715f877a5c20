"""Prediction by overlapping windows against the plain way: all windows at once, a weighted mean of whole maps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from helpers.tiny_network import TinyNetwork
from semseg.config.preprocessing import PREPROCESSING
from semseg.data.geometry import Size
from semseg.data.windows import FinishedRows, WholeImage, blend_weights, window_starts
from semseg.errors import ConfigError
from semseg.evaluation.inference import merge_scales
from semseg.evaluation.tiled import ArraySink, WindowLayout, blend_windows, choose_layout, predict_by_windows
from semseg.nets.interfaces import Logits
from semseg.nets.normalise import normalise

CONVENTION = PREPROCESSING["rgb_mean_std"]
LAYOUT = WindowLayout(32, 24, 8)


def tiny_network(num_classes: int = 5) -> TinyNetwork:
    torch.manual_seed(3)
    net = TinyNetwork(num_classes).eval()
    net.model.classify.weight.data.mul_(20)  # clear winners
    return net


def random_image(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)


def predicted(
    image: NDArray[np.uint8], layout: WindowLayout = LAYOUT, net: TinyNetwork | None = None, **options: int | bool
) -> ArraySink:
    net = net or tiny_network()
    sink = ArraySink(Size(*image.shape[:2]), np.empty((net.num_classes, *image.shape[:2]), np.float32))
    predict_by_windows(net, WholeImage(image), CONVENTION, layout, sink, **options)  # pyright: ignore[reportArgumentType]
    return sink


def padded(image: NDArray[np.uint8], divisor: int = 8) -> Tensor:
    """(1, 3, H, W) normalised, padded below and on the right with 0."""
    pixels = normalise(torch.from_numpy(image).permute(2, 0, 1)[None], CONVENTION)
    height, width = image.shape[:2]
    return F.pad(pixels, (0, -width % divisor, 0, -height % divisor))


@torch.no_grad()
def plainly(image: NDArray[np.uint8], layout: WindowLayout, *, flip: bool = False) -> Tensor:
    """(K, H, W) probabilities: every window and its weights on the canvas of the whole image, then one division."""
    net, canvas = tiny_network(), padded(image)
    maps = []
    for is_mirrored in (False, True)[: 1 + flip]:
        total = torch.zeros(1, 5, canvas.shape[2] // 4, canvas.shape[3] // 4, dtype=torch.float64)
        weights = torch.zeros(total.shape[2:], dtype=torch.float64)
        for top in window_starts(canvas.shape[2], layout.side, layout.step):
            for left in window_starts(canvas.shape[3], layout.side, layout.step):
                part = canvas[..., top : top + layout.side, left : left + layout.side]
                logits = net(part.flip(-1)).main.flip(-1) if is_mirrored else net(part).main
                down, across = (torch.from_numpy(blend_weights(n)).double() for n in logits.shape[2:])
                place = (slice(top // 4, top // 4 + len(down)), slice(left // 4, left // 4 + len(across)))
                total[..., place[0], place[1]] += logits * down[:, None] * across
                weights[place] += down[:, None] * across
        upsampled = F.interpolate(total / weights, size=canvas.shape[2:], mode="bilinear")
        maps.append(upsampled[0, :, : image.shape[0], : image.shape[1]].softmax(0))
    return torch.stack(maps).mean(0)


@pytest.mark.parametrize("size", [(100, 70), (33, 150), (8, 41), (97, 32), (64, 64)])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_are_blended_as_in_the_plain_computation(size: tuple[int, int], flip: bool) -> None:
    image = random_image(*size)
    found, expected = predicted(image, flip=flip), plainly(image, LAYOUT, flip=flip)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, expected.numpy(), atol=2e-6)
    clear = expected.topk(2, dim=0).values.diff(dim=0).abs()[0] > 1e-5
    assert torch.equal(torch.from_numpy(found.ids)[clear].long(), expected.argmax(0)[clear])
    assert np.array_equal(found.confidence, found.probabilities.max(0))


@torch.no_grad()
def test_an_image_in_one_window_equals_the_network_on_the_whole_image_to_the_last_bit() -> None:
    image, net = random_image(30, 21), tiny_network()
    logits = net(padded(image).to(memory_format=torch.channels_last)).main.permute(0, 2, 3, 1)
    expected = merge_scales([logits], (32, 24))
    found = predicted(image, net=net)
    assert np.array_equal(found.confidence, expected.confidence[:30, :21].numpy())
    assert np.array_equal(found.ids, expected.ids[:30, :21].numpy())


def test_the_memory_limit_and_the_order_of_reading_change_no_bit() -> None:
    image = random_image(120, 90)
    first, second = predicted(image), predicted(image, memory_limit_mb=16)
    assert np.array_equal(first.probabilities, second.probabilities)  # pyright: ignore[reportArgumentType]


def test_windows_that_go_through_the_network_together_give_the_same_up_to_rounding() -> None:
    image = random_image(70, 120)
    one, three = predicted(image), predicted(image, batch_size=3)
    np.testing.assert_allclose(one.confidence, three.confidence, atol=1e-5)


class Constant(TinyNetwork):
    """Whole numbers as logits: the class is always 2."""

    def forward(self, image: Tensor) -> Logits:
        values = torch.tensor([1.0, 3.0, 7.0, -2.0, 0.0])[None, :, None, None]
        return Logits(values.expand(len(image), 5, image.shape[2] // 4, image.shape[3] // 4), None)


def test_constant_logits_stay_constant_to_the_last_bit() -> None:
    found = predicted(random_image(150, 101), net=Constant(5))
    assert found.probabilities is not None
    assert (found.probabilities == found.probabilities[:, :1, :1]).all()
    assert (found.ids == 2).all()


class Listing:
    """A sink that only notes which rows it gets."""

    takes_probabilities = False

    def __init__(self) -> None:
        self.tops: list[int] = [0]

    def write_rows(self, rows: FinishedRows) -> None:
        assert rows.top == self.tops[-1]
        assert rows.probabilities is None
        self.tops.append(rows.top + len(rows.ids))


class Watched(WholeImage):
    """A reader that asserts that rows above the finished ones are not read again."""

    def __init__(self, pixels: NDArray[np.uint8], sink: Listing) -> None:
        super().__init__(pixels)
        self.sink = sink
        self.behind: list[int] = []

    def read(self, top: int, left: int, height: int, width: int) -> NDArray:
        self.behind.append(top - self.sink.tops[-1])
        return super().read(top, left, height, width)


def test_rows_reach_the_sink_once_in_order_and_as_soon_as_no_later_window_touches_them() -> None:
    sink = Listing()
    reader = Watched(random_image(403, 60), sink)
    predict_by_windows(tiny_network(), reader, CONVENTION, LAYOUT, sink)
    assert sink.tops[-1] == 403
    assert all(before < after for before, after in pairwise(sink.tops))
    # Interpolation needs the row of logits after: 4 pixels at most.
    assert min(reader.behind) >= 0
    assert max(reader.behind) <= 4


@torch.no_grad()
def test_the_logits_in_memory_do_not_depend_on_the_height_of_the_image() -> None:
    net = tiny_network()

    def largest_strip(height: int) -> int:
        image = torch.from_numpy(random_image(height, 64)).permute(2, 0, 1)
        return max(band.shape[1] for band in blend_windows(net, image, CONVENTION, LAYOUT))

    assert largest_strip(200) == largest_strip(2000) <= LAYOUT.side // 4


def test_windows_are_those_of_the_crops_in_multiples_of_the_divisor() -> None:
    net = tiny_network()
    assert choose_layout(net, [100, 60]) == WindowLayout(104, 72, 8)
    assert choose_layout(net, [100, 60], window=64, stride=30, divisor=16) == WindowLayout(64, 32, 16)


def test_a_network_of_one_size_takes_windows_of_that_size_only() -> None:
    net = tiny_network()
    net.image_size = Size(40, 40)
    assert choose_layout(net, [512, 512]) == WindowLayout(40, 32, 8)
    with pytest.raises(ConfigError, match="takes windows of 40 pixels only"):
        choose_layout(net, [512, 512], window=64)
    found = predicted(random_image(20, 90), WindowLayout(40, 32, 8), net)
    assert found.ids.shape == (20, 90)
