"""Stage 7: pixels where the network is not sure of its class are ignored, so that predictions can be labels.

The probabilities of a network whose activations overflow are NaN. Such pixels have class 0, and never count as sure.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from semseg.data.label_map import IGNORED
from semseg.data.windows import FinishedRows, RowSink

UNDEFINED = (
    "the probabilities of the network are NaN, because its activations overflow. Such pixels have class 0. Use "
    "trainer.precision=32-true; if that does not help, train again with a lower optim.lr."
)


def warn_of_undefined(confidence: Tensor) -> None:
    """Warn if a probability is NaN; waits for the device of `confidence`."""
    if torch.isnan(confidence).any():
        warnings.warn(UNDEFINED, stacklevel=2)


def ignore_unsure(ids: Tensor, confidence: Tensor, min_confidence: float) -> Tensor:
    """(H, W) int16: the class indices `ids`, and -1 where their probability is below `min_confidence` or NaN."""
    return ids.masked_fill(~(confidence >= min_confidence), IGNORED)


class ConfidenceSink:
    """Hands rows on to another sink without the classes of which the network is not sure."""

    def __init__(self, sink: RowSink, min_confidence: float) -> None:
        self.sink, self.min_confidence = sink, min_confidence

    @property
    def takes_probabilities(self) -> bool:
        """Whether the other sink takes them."""
        return self.sink.takes_probabilities

    def write_rows(self, rows: FinishedRows) -> None:
        """Hand on the next rows."""
        kept = ignore_unsure(torch.from_numpy(rows.ids), torch.from_numpy(rows.confidence), self.min_confidence)
        self.sink.write_rows(rows._replace(ids=kept.numpy()))
