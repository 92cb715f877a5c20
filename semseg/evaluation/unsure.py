"""Stage 7: pixels where the network is not sure of its class are ignored, so that predictions can be labels."""

from __future__ import annotations

import torch
from torch import Tensor

from semseg.data.label_map import IGNORED
from semseg.data.windows import FinishedRows, RowSink


def ignore_unsure(ids: Tensor, confidence: Tensor, min_confidence: float) -> Tensor:
    """(H, W) int16: the class indices `ids`, and -1 where their probability `confidence` is below `min_confidence`."""
    return ids.masked_fill(confidence < min_confidence, IGNORED)


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
