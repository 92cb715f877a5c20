"""What every encoder and every decoder must do. A new one is tested by adding its name to a list."""

from __future__ import annotations

import math

import torch

from semseg.nets.features import Decoder, Encoder


def check_encoder(encoder: Encoder) -> None:
    """Channels and strides are as announced at awkward sizes, and gradients reach every parameter."""
    assert len(encoder.channels) == len(encoder.strides) == 4
    assert list(encoder.strides) == sorted(encoder.strides)
    encoder.eval()
    for height, width in ((64, 96), (97, 33), (1, 1)):
        with torch.no_grad():
            maps = encoder(torch.randn(1, 3, height, width))
        for features, channels, stride in zip(maps, encoder.channels, encoder.strides, strict=True):
            assert features.shape == (1, channels, math.ceil(height / stride), math.ceil(width / stride))
    encoder.train()
    maps = encoder(torch.randn(2, 3, 64, 64))
    sum(features.square().mean() for features in maps).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def check_decoder(decoder: Decoder, channels: tuple[int, ...], num_classes: int) -> None:
    """Logits have the announced resolution, one image with a 1 x 1 map trains, gradients reach every parameter."""
    for batch, sizes in ((2, (16, 8, 4, 2)), (1, (8, 4, 2, 1)), (1, (5, 3, 2, 1))):
        maps = [
            torch.randn(batch, count, size, size + (size > 1), requires_grad=True)
            for count, size in zip(channels, sizes, strict=True)
        ]
        logits = decoder.train()(maps)
        assert logits.main.shape == (batch, num_classes, *maps[decoder.feature_level].shape[-2:])
        loss = logits.main.square().mean()
        if logits.aux is not None:
            assert logits.aux.shape == (batch, num_classes, *maps[-2].shape[-2:])
            loss = loss + logits.aux.square().mean()
        loss.backward()
        assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert decoder.eval()(maps).aux is None  # nobody reads it
