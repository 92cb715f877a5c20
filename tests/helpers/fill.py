"""Weights, images and labels from names alone, so that two code bases can hold the same numbers.

The rules are those of the reference runs: a stream of uniform numbers for each name, shaped by what the tensor is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uniform(name: str, shape: Sequence[int]) -> NDArray[np.float64]:
    """Numbers in [0, 1): the upper 53 bits of PCG64's raw words, seeded by the SHA-256 of the name."""
    digest = hashlib.sha256(name.encode()).digest()
    words = np.random.PCG64(int.from_bytes(digest[:8], "little")).random_raw(math.prod(shape))
    words >>= np.uint64(11)
    numbers = words.astype(np.float64)
    numbers *= 2.0**-53  # exact
    return numbers.reshape(tuple(shape))


def filled(key: str, shape: Sequence[int]) -> Tensor:
    """float32 value of the tensor `key` of an encoder or a decoder (a count for num_batches_tracked)."""
    kind = key.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    draws = uniform(key, shape)
    if kind == "running_var":
        values = 0.5 + draws
    elif kind in ("running_mean", "bias"):
        values = 0.4 * (draws - 0.5)
    elif len(shape) == 1:  # the scale of a normalisation layer
        family = 1.5 if key.startswith("features.") else 0.5 if key.startswith("stage") else 1.0  # MobileNetV2, HRNet
        values = family * (0.4 + 0.4 * draws)
    else:
        values = convolution(key, draws)
    return torch.from_numpy(values.astype(np.float32))


def convolution(key: str, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    in_channels, *kernel = draws.shape[1:]
    values = draws  # in place, because a new array of this size costs more than the arithmetic
    values *= 2
    values -= 1
    values *= math.sqrt(6 / (in_channels * math.prod(kernel)))
    if in_channels == 3 and kernel[0] > 1:
        values = values / 64  # the stem sees grey levels
    if "conv_last" in key and kernel[0] == 1:
        values = 8 * (values - values.mean(1, keepdims=True))  # classifiers with a decided opinion
    return values


def image(name: str, shape: tuple[int, int, int, int]) -> Tensor:
    """A float64 batch in [-128, 128): blocks of 32 x 32 pixels with one colour each, plus fine noise."""
    count, channels, height, width = shape
    blocks = uniform(f"{name}/blocks", (count, channels, math.ceil(height / 32), math.ceil(width / 32)))
    coarse = np.kron(blocks, np.ones((32, 32)))[..., :height, :width]
    values = 192 * coarse + 64 * uniform(name, shape) - 128
    return torch.from_numpy(values.astype(np.float32)).double()


def sampled(tensor: Tensor) -> NDArray[np.float64]:
    """Sixteen of the 64 values at which the reference outputs were read."""
    flat = tensor.detach().numpy().ravel()
    return flat[np.floor(uniform("samples", (64,)) * flat.size).astype(np.int64)][::4]
