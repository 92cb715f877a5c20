"""Weight files of encoders: read, matched by name, and told in full when they do not fit."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from semseg.checkpoint import load_plain
from semseg.errors import CheckpointError

CLASSIFIER = ("fc.", "classifier.")  # the ImageNet head, which no encoder keeps
# Bookkeeping of the 2018 normalisation, and counters that newer files add.
BOOKKEEPING = ("_tmp_running_mean", "_tmp_running_var", "_running_iter", "num_batches_tracked")


def load_encoder_weights(encoder: nn.Module, path: Path) -> None:
    """Fill `encoder` from a file of ImageNet weights, matched by name and shape.

    The ImageNet classifier and the bookkeeping of old normalisation layers are left out.

    Raises:
        CheckpointError: if the file is damaged, or any weight is missing, unexpected or of another
            shape; the first of each kind are named, and the encoder is left as it was.
    """
    found = {name: value for name, value in load_plain(path).items() if is_weight(name, value)}
    wanted = {name: value for name, value in encoder.state_dict().items() if is_weight(name, value)}
    problems = differences(found, wanted)
    if problems:
        raise CheckpointError(f"{path}: does not fit model.encoder: {'; '.join(problems)}.")
    encoder.load_state_dict(found, strict=False)


def is_weight(name: str, value: object) -> bool:
    """Whether a state-dict entry counts when files are matched."""
    is_left_out = name.startswith(CLASSIFIER) or name.rpartition(".")[2] in BOOKKEEPING
    return isinstance(value, Tensor) and not is_left_out


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """What keeps `found` from filling `wanted`, a phrase for each kind."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    reshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in kinds.items() if names]
