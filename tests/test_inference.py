from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semseg.data.convention import CONVENTIONS
from semseg.inference import predict_probabilities, upsampled_softmax
from semseg.nets.features import Logits
from semseg.nets.normalise import normalise

CONVENTION = CONVENTIONS["rgb_mean_std"]


class Colours(nn.Module):
    """A network whose logits are its input's channels, at half the resolution."""

    def forward(self, image: Tensor) -> Logits:
        return Logits(F.avg_pool2d(image, 2), None)


def random_image(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def test_scales_are_averaged_after_upsampling_and_softmax() -> None:
    scales = [random_image(8, 12), random_image(16, 24, 1)]
    expected = sum(
        F.interpolate(Colours()(normalise(s[None], CONVENTION)).main, size=(9, 13), mode="bilinear").softmax(1)
        for s in scales
    )
    answer = predict_probabilities(Colours(), scales, (9, 13), CONVENTION)
    assert answer.shape == (3, 9, 13)
    assert torch.allclose(answer, expected[0] / 2, atol=1e-6)
    assert torch.allclose(answer.sum(0), torch.ones(9, 13), atol=1e-6)


def test_flip_averages_with_the_mirrored_answer() -> None:
    image = random_image(8, 12)
    plain = predict_probabilities(Colours(), [image], (8, 12), CONVENTION)
    # This network commutes with mirroring, so that the flip changes nothing ...
    assert torch.allclose(predict_probabilities(Colours(), [image], (8, 12), CONVENTION, flip=True), plain, atol=1e-6)

    class LeftHalf(Colours):
        def forward(self, image: Tensor) -> Logits:
            logits = super().forward(image).main
            logits[..., logits.shape[-1] // 2 :] = 0
            return Logits(logits, None)

    # ... and one that does not is made symmetric.
    left = predict_probabilities(LeftHalf(), [image], (8, 12), CONVENTION, flip=True)
    mirrored = predict_probabilities(LeftHalf(), [image.flip(-1)], (8, 12), CONVENTION, flip=True)
    assert torch.allclose(left, mirrored.flip(-1), atol=1e-6)
    assert not torch.allclose(left, plain, atol=1e-3)


def test_half_precision_logits_give_probabilities_in_float32() -> None:
    answer = upsampled_softmax(torch.randn(1, 150, 4, 4).bfloat16(), (8, 8))
    assert answer.dtype == torch.float32
    assert torch.allclose(answer.sum(1), torch.ones(1, 8, 8), atol=1e-6)
