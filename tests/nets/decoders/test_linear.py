from __future__ import annotations

import pytest
import torch

from helpers.contract import DecoderContract
from semseg.nets.decoders.linear import Linear


class TestLinear(DecoderContract):
    name = "linear"

    def test_it_starts_as_published(self) -> None:
        torch.manual_seed(0)
        decoder = Linear((4, 512), 100)
        assert decoder.conv_last.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert not decoder.conv_last.bias.any()
        assert torch.equal(decoder.norm.weight, torch.ones(512)) and not decoder.norm.bias.any()


def test_it_is_linear_in_the_last_map() -> None:
    torch.manual_seed(0)
    decoder = Linear((4, 8), 3).train()
    last = torch.randn(2, 8, 5, 4)
    decoder([torch.randn(2, 4, 5, 4), last])
    torch.testing.assert_close(decoder.norm.running_mean, 0.1 * last.mean((0, 2, 3)))
    decoder.eval()
    with torch.no_grad():
        zero, one, two = (decoder([last[:, :4], factor * last]).main for factor in (0, 1, 2))
    torch.testing.assert_close(two - one, one - zero)
