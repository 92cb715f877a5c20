"""Train, evaluate and apply semantic segmentation networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# No other imports here: `run.py --help` must not import torch.
if TYPE_CHECKING:
    import torch

    from semseg.api.results import DataCheck, Evaluation, Predictions, TrainingRun
    from semseg.prediction.predictor import Predictor

__all__ = ["check", "evaluate", "load", "predict", "train"]
__version__ = "0.1.0"


def load(
    ckpt: str | Path | Sequence[str | Path],
    *overrides: str,
    device: str | int | torch.device | None = None,
    **keywords: Any,
) -> Predictor:
    """Load a network to predict pictures: `semseg.load("runs/a/checkpoints/best.ckpt").predict("photo.jpg")`.

    Args:
        ckpt: any value of `ckpt=` on the command line: a file, a run folder, `last`, `best`, `zoo:<name>`,
            `hf:<name>`, published files; or a list of several, whose probabilities are averaged.
        overrides: arguments as on the command line that change predictions, such as "predict.scales=[300,450]" or
            "predict.flip=true".
        device: the device to run on, as PyTorch names it; None means the GPU if there is one.
        keywords: overrides by key: `predict__flip=True`; see `train`.

    Raises:
        SemsegError: if there is no such network or device, it is damaged, or an override is invalid.
    """
    from semseg.api.keywords import list_words  # noqa: PLC0415
    from semseg.config.load import load_prediction_config  # noqa: PLC0415 - fails before torch is imported

    loaded = load_prediction_config(ckpt, [*overrides, *list_words([], keywords)])
    from semseg.build import open_predictor  # noqa: PLC0415

    return open_predictor(*loaded, device=device)


def train(*overrides: str, **keywords: Any) -> TrainingRun:
    """Train a network in this process: `semseg.train(data="folder", data__root="photos", trainer__max_epochs=20)`.

    Args:
        overrides: words of the command line: "optim.lr=0.01", "model/encoder=resnet18".
        keywords: the same by key, with two underscores for a dot (`optim__lr=0.01`), or by section
            (`optim={"lr": 0.01}`). The options of groups are keywords too: `experiment="own_data"`,
            `model__encoder="resnet18"`.

    Returns:
        The run: its folder, checkpoints, best score and logged values. A notebook shows its page.

    Raises:
        SemsegError: for every error that you can fix, with the key or the file.
        KeyboardInterrupt: after a second Ctrl-C. The first one ends training with a checkpoint, and raises SemsegError
            with the command that resumes the run: the same call with `run_dir` and `resume="auto"`.
    """
    from semseg.api.results import TrainingRun  # noqa: PLC0415
    from semseg.api.run import run_in_process  # noqa: PLC0415

    return TrainingRun(*run_in_process("train", overrides, keywords))


def evaluate(ckpt: str | Path | Sequence[str | Path], *overrides: str, **keywords: Any) -> Evaluation:
    """Score a network on a split: `semseg.evaluate("runs/a", eval__split="test").mean_iou`.

    Args:
        ckpt: as in `load`.
        overrides, keywords: as in `train`.

    Raises:
        SemsegError: for every error that you can fix.
    """
    from semseg.api.results import Evaluation  # noqa: PLC0415
    from semseg.api.run import run_in_process  # noqa: PLC0415

    return Evaluation(run_in_process("eval", overrides, {"ckpt": ckpt, **keywords}).folder)


def predict(
    ckpt: str | Path | Sequence[str | Path], input: str | Path, *overrides: str, **keywords: Any
) -> Predictions:
    """Predict images, folders of images or videos, and write files: `semseg.predict("runs/a", "photos").files`.

    For arrays in memory use `load`, whose `predict` returns class ids and writes nothing.

    Args:
        ckpt: as in `load`.
        input: a file, a folder, a pattern, or a list of paths in a text file.
        overrides, keywords: as in `train`; `predict__save=["ids", "overlay"]` chooses what is written.

    Raises:
        SemsegError: for every error that you can fix; for files that cannot be read, after all others are written.
    """
    from semseg.api.results import Predictions  # noqa: PLC0415
    from semseg.api.run import run_in_process  # noqa: PLC0415

    return Predictions(run_in_process("predict", overrides, {"ckpt": ckpt, "input": input, **keywords}).folder)


def check(*overrides: str, **keywords: Any) -> DataCheck:
    """Look for what would stop or spoil training on a data set: `semseg.check(data="folder", data__root="photos")`.

    Args:
        overrides, keywords: as in `train`.

    Returns:
        The findings, and overrides that mend them; also of a data set on which nothing can be trained yet.

    Raises:
        SemsegError: for every error that you can fix, and for the export of an annotation tool, with the command that
            imports it.
    """
    from semseg.api.run import check_data  # noqa: PLC0415

    return check_data(overrides, keywords)
