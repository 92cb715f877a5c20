"""The only source of randomness: a generator made from a seed and a position.

The same numbers give the same random numbers on any rank and worker, with any number of processes, after any resume.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What random numbers are for: the first number of their position."""

    ORDER = 0  # of the images in a pass over them
    DRAW = 1  # short edges and mirroring
    REPEAT = 2  # of images with rare classes; followed by the number of the pass alone
    AUGMENT = 3
    CROP = 4
    DROPOUT = 2  # followed by two numbers, so that its positions are others than those of REPEAT


def generator_for(seed: int, *position: int) -> np.random.Generator:
    """A NumPy generator that depends only on `seed` and `position` (all >= 0).

    >>> bool(generator_for(304, 1, 7).random() == generator_for(304, 1, 7).random())
    True
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=position)))


def number_for(seed: int, *position: int) -> int:
    """A 63-bit number that depends only on `seed` and `position` (all >= 0): a seed for other generators."""
    return int(generator_for(seed, *position).integers(2**63))
