"""Train, evaluate and apply semantic segmentation networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

# No other imports here: `run.py --help` must not pay for torch.
if TYPE_CHECKING:
    import torch

    from semseg.prediction.predictor import Predictor

__all__ = ["load"]
__version__ = "0.1.0"


def load(ckpt: str | Path, *overrides: str, device: str | torch.device | None = None) -> Predictor:
    """A network, ready to be shown pictures: `semseg.load("runs/a/checkpoints/best.ckpt").predict("photo.jpg")`.

    Args:
        ckpt: what `ckpt=` takes on the command line: a file, a run folder, `last`, `best`, `zoo:<name>`, published
            files.
        overrides: words as on the command line, such as "predict.scales=[300,450]" or "predict.flip=true".
        device: where it runs; None: on the GPU if there is one.

    Raises:
        SemsegError: if there is no such network, it is damaged, or a word is wrong.
    """
    from semseg.build import open_predictor  # noqa: PLC0415
    from semseg.config.load import load_config  # noqa: PLC0415

    words = ["mode=serve", f"ckpt={ckpt}", *overrides]  # of all modes it asks for the least
    return open_predictor(*load_config(words), device=device)
