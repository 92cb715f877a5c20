"""Multi-scale inference against the plain way: interpolate every scale as a whole, softmax, average, argmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semseg.config.preprocessing import PREPROCESSING
from semseg.errors import ConfigError
from semseg.evaluation.inference import (
    ClassMap,
    batch_logits,
    merge_scales,
    predict_class_map,
    scale_logits,
    strip_height,
)
from semseg.nets.interfaces import Logits
from semseg.nets.normalise import normalise

CONVENTION = PREPROCESSING["rgb_mean_std"]


class Colours(nn.Module):
    """A network whose logits are its input's channels, at half the resolution; it counts how often it runs."""

    size_divisor = 4
    calls = 0

    def forward(self, image: Tensor) -> Logits:
        self.calls += 1
        return Logits(F.avg_pool2d(image, 2), None)


def random_image(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def random_logits(*shapes: tuple[int, int], num_classes: int = 150) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(1, *shape, num_classes, generator=generator) for shape in shapes]


def plainly(logits: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """(K, height, width): the mean of the softmax of the logits, each upsampled as a whole."""
    maps = [one[None].permute(0, 3, 1, 2) for scale in logits for one in scale]
    upsampled = [F.interpolate(one, size=size, mode="bilinear", align_corners=False).softmax(1)[0] for one in maps]
    return torch.stack(upsampled).mean(0)


def probabilities_of(net: nn.Module, scales: list[Tensor], size: tuple[int, int], *, flip: bool = False) -> Tensor:
    found = np.empty((3, *size), np.float32)
    predict_class_map(net, scales, size, CONVENTION, flip=flip, probabilities=found)
    return torch.from_numpy(found)


def test_scales_are_averaged_after_upsampling_and_softmax() -> None:
    scales = [random_image(8, 12), random_image(16, 24, 1)]
    expected = sum(
        F.interpolate(Colours()(normalise(s[None], CONVENTION)).main, size=(9, 13), mode="bilinear").softmax(1)
        for s in scales
    )
    answer = probabilities_of(Colours(), scales, (9, 13))
    assert torch.allclose(answer, expected[0] / 2, atol=1e-6)
    assert torch.allclose(answer.sum(0), torch.ones(9, 13), atol=1e-6)


@pytest.mark.parametrize("window", [None, 8])
def test_images_of_one_shape_run_together_and_others_by_themselves(window: int | None) -> None:
    net = Colours()
    images = [
        [random_image(16, height, number), random_image(24, 24, number)] for number, height in enumerate((12, 8, 12))
    ]
    together = batch_logits(net, images, CONVENTION, flip=True, window=window)
    assert window or net.calls == 2 * 3  # mirrored too; two shapes at the first scale, one at the second
    for image, found in zip(images, together, strict=True):
        alone = scale_logits(net, image, CONVENTION, flip=True, window=window)
        assert [one.shape for one in found] == [(2, 8, image[0].shape[-1] // 2, 3), (2, 12, 12, 3)]
        torch.testing.assert_close(found, alone)


def test_flip_averages_with_the_mirrored_answer() -> None:
    image = random_image(8, 12)
    plain = probabilities_of(Colours(), [image], (8, 12))
    # This network commutes with mirroring, so that the flip changes nothing ...
    assert torch.allclose(probabilities_of(Colours(), [image], (8, 12), flip=True), plain, atol=1e-6)

    class LeftHalf(Colours):
        def forward(self, image: Tensor) -> Logits:
            logits = super().forward(image).main
            logits[..., logits.shape[-1] // 2 :] = 0
            return Logits(logits, None)

    # ... and one that does not is made symmetric.
    left = probabilities_of(LeftHalf(), [image], (8, 12), flip=True)
    mirrored = probabilities_of(LeftHalf(), [image.flip(-1)], (8, 12), flip=True)
    assert torch.allclose(left, mirrored.flip(-1), atol=1e-6)
    assert not torch.allclose(left, plain, atol=1e-3)


@pytest.mark.parametrize("size", [(61, 83), (7, 5), (1, 1), (40, 30)], ids=str)
def test_strips_give_the_classes_and_probabilities_of_the_whole_image(size: tuple[int, int]) -> None:
    logits = random_logits((9, 13), (20, 15), (1, 2))
    expected = plainly(logits, size)
    found = np.empty(expected.shape, np.float32)
    ids, confidence, _ = merge_scales(logits, size, probabilities=found)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-6)
    assert torch.allclose(confidence, expected.amax(0), atol=1e-6)
    assert torch.equal(ids.long(), torch.from_numpy(found).argmax(0))
    # Where the two largest are not equal up to rounding, the class is that of the plain way.
    first, second = expected.topk(2, dim=0).values
    clear = first - second > 1e-5
    assert torch.equal(ids.long()[clear], expected.argmax(0)[clear])
    assert clear.float().mean() > 0.99


def test_the_memory_limit_never_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits((13, 17), (26, 34))
    answers: list[tuple[ClassMap, np.ndarray]] = []
    heights = []
    for rows in (1, 7, 64, 1000):
        monkeypatch.setattr("semseg.evaluation.inference.strip_height", lambda *_, rows=rows: rows)
        found = np.empty((150, 101, 77), np.float32)
        answers.append((merge_scales(logits, (101, 77), probabilities=found), found))
        heights.append(rows)
    for (ids, confidence, _), found in answers[1:]:
        assert torch.equal(ids, answers[0][0].ids)
        assert torch.equal(confidence, answers[0][0].confidence)
        assert np.array_equal(found, answers[0][1])


def test_the_height_of_a_strip_follows_the_limit() -> None:
    row_bytes = 4000 * 150 * 4
    of_gpu = [strip_height(row_bytes, limit, torch.device("cuda")) for limit in (16, 1024, 2048)]
    assert of_gpu == [1, 74, 149]
    assert all(6 * rows * row_bytes <= limit * 2**20 for rows, limit in zip(of_gpu[1:], (1024, 2048), strict=True))


def test_the_network_runs_once_for_all_subsets_of_the_scales() -> None:
    net, scales = Colours(), [random_image(8, 12), random_image(16, 24, 1)]
    logits = scale_logits(net, scales, CONVENTION)
    both, first = merge_scales(logits, (8, 12)), merge_scales(logits[:1], (8, 12))
    assert net.calls == 2
    assert torch.equal(both.ids, predict_class_map(Colours(), scales, (8, 12), CONVENTION).ids)
    assert torch.equal(first.ids, predict_class_map(Colours(), scales[:1], (8, 12), CONVENTION).ids)


@pytest.mark.parametrize("stride", [None, 4, 12])
def test_windows_of_a_network_that_looks_no_further_change_nothing(stride: int | None) -> None:
    image, net = random_image(28, 44), Colours()
    whole = predict_class_map(Colours(), [image], (28, 44), CONVENTION)
    cut = predict_class_map(net, [image], (28, 44), CONVENTION, window=10, stride=stride)  # 10 is rounded up to 12
    assert torch.equal(whole.ids, cut.ids)
    assert torch.allclose(whole.confidence, cut.confidence, atol=1e-6)
    # Starts 0, 12, 16 and 0, 12, 24, 32 if the windows touch; 2/3 of 10 is 6, rounded up to 8.
    assert net.calls == {None: 3 * 5, 4: 5 * 9, 12: 3 * 4}[stride]


def test_windows_are_averaged_where_they_overlap() -> None:
    class Numbered(Colours):
        def forward(self, image: Tensor) -> Logits:
            shape = (1, 1, image.shape[-2] // 2, image.shape[-1] // 2)
            self.calls += 1
            return Logits(torch.full(shape, float(self.calls)), None)

    (logits,) = scale_logits(Numbered(), [random_image(4, 12)], CONVENTION, window=8, stride=4)
    assert logits[0, 0, :, 0].tolist() == [1, 1, 1.5, 1.5, 2, 2]


def test_windows_need_images_that_fit_the_network() -> None:
    with pytest.raises(ConfigError, match=r"window=8: .* multiples of 4 pixels, not 8 x 10"):
        predict_class_map(Colours(), [random_image(8, 10)], (8, 10), CONVENTION, window=8)


def test_half_precision_logits_give_probabilities_in_float32() -> None:
    class Half(Colours):
        def forward(self, image: Tensor) -> Logits:
            return Logits(super().forward(image).main.bfloat16(), None)

    (logits,) = scale_logits(Half(), [random_image(8, 12)], CONVENTION)
    assert logits.dtype == torch.float32
    assert merge_scales([logits], (8, 12)).confidence.dtype == torch.float32


def test_a_float64_network_is_answered_in_float64() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1)).double()

    class Wrapped(Colours):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, image: Tensor) -> Logits:
            return Logits(self.net(image), None)

    assert predict_class_map(Wrapped(), [random_image(4, 4)], (4, 4), CONVENTION).confidence.dtype == torch.float64
