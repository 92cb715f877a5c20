"""Train, evaluate and apply semantic segmentation networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# No other imports here: `run.py --help` must not import torch.
if TYPE_CHECKING:
    import torch

    from semseg.prediction.predictor import Predictor

__all__ = ["load"]
__version__ = "0.1.0"


def load(
    ckpt: str | Path | Sequence[str | Path], *overrides: str, device: str | int | torch.device | None = None
) -> Predictor:
    """Load a network to predict pictures: `semseg.load("runs/a/checkpoints/best.ckpt").predict("photo.jpg")`.

    Args:
        ckpt: any value of `ckpt=` on the command line: a file, a run folder, `last`, `best`, `zoo:<name>`,
            `hf:<name>`, published files; or a list of several, whose probabilities are averaged.
        overrides: arguments as on the command line that change predictions, such as "predict.scales=[300,450]" or
            "predict.flip=true".
        device: the device to run on, as PyTorch names it; None means the GPU if there is one.

    Raises:
        SemsegError: if there is no such network or device, it is damaged, or an override is invalid.
    """
    from semseg.config.load import load_prediction_config  # noqa: PLC0415 - fails before torch is imported

    loaded = load_prediction_config(ckpt, overrides)
    from semseg.build import open_predictor  # noqa: PLC0415

    return open_predictor(*loaded, device=device)
