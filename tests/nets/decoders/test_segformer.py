from __future__ import annotations

import pytest
import torch

from helpers.contract import DecoderContract
from semseg.errors import ConfigError
from semseg.nets.decoders.segformer import SegFormer


class TestSegFormer(DecoderContract):
    name = "segformer"


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("factored", [True, False])
def test_it_gives_what_the_head_of_transformers_gives(factored: bool) -> None:
    from transformers import SegformerConfig
    from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

    torch.manual_seed(0)
    channels = (8, 16, 24, 40)
    config = SegformerConfig(hidden_sizes=list(channels), decoder_hidden_size=32, num_labels=7)
    theirs, ours = SegformerDecodeHead(config).eval(), SegFormer(channels, 7, width=32).eval()
    theirs.batch_norm.running_mean.normal_()
    theirs.batch_norm.running_var.uniform_(0.5, 2)
    weights = {}
    for index in range(len(channels)):
        projection = theirs.linear_projections[index].proj
        weights[f"linear.{index}.weight"] = projection.weight[..., None, None]
        weights[f"linear.{index}.bias"] = projection.bias
    weights["fuse.0.weight"] = theirs.linear_fuse.weight  # the deepest map first
    weights |= {f"fuse.1.{name}": value for name, value in theirs.batch_norm.state_dict().items()}
    weights |= {f"conv_last.{name}": value for name, value in theirs.classifier.state_dict().items()}
    ours.load_state_dict(weights)
    ours.fuse.factored = factored
    for sizes in ((16, 8, 4, 2), (9, 5, 3, 2)):
        maps = [torch.randn(2, count, size, size + 1) for count, size in zip(channels, sizes, strict=True)]
        torch.testing.assert_close(ours(maps).main, theirs(maps), rtol=1e-5, atol=1e-5)


def test_the_factored_way_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, count, size, size) for count, size in zip((4, 8, 16), (8, 4, 2), strict=True)]
    gradients = []
    decoder = SegFormer((4, 8, 16), 3, width=6).eval()
    for factored in (True, False):
        decoder.fuse.factored = factored
        decoder.zero_grad()
        decoder(maps).main.square().sum().backward()
        gradients.append([weight.grad.clone() for weight in decoder.parameters() if weight.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_width_of_0_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"^model\.decoder\.width=0: must be at least 1"):
        SegFormer((4, 8, 16, 32), 3, width=0)
