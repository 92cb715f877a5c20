"""Reports batch normalisation of a single value per channel, which has no variance, as one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from semseg.data.batch import Batch
from semseg.errors import ConfigError

REFUSAL = "Expected more than 1 value per channel"  # how torch's message begins


@contextmanager
def report_single_value(batch: Batch) -> Iterator[None]:
    """Name the image and the keys if a layer of a library refuses one value per channel.

    Our own layers, and those of torch that we replace, normalise by the running statistics then.

    Raises:
        ConfigError: in place of torch's ValueError.
    """
    try:
        yield
    except ValueError as error:
        if REFUSAL not in str(error):
            raise
        count, _, height, width = batch.image.shape
        raise ConfigError(
            f"{batch.paths[0]}: batch normalisation has one value per channel for {count} image of {height} x {width} "
            "pixels on a device, which the layers of this network cannot train on. Set data.batch_size=2, or larger "
            "data.short_edges."
        ) from error
