"""Write checkpoint files such that a kill, a full disk or a crash never damages the previous one.

A checkpoint is streamed into a temporary file in its own folder, read back, synced, and only then renamed over the old
one: `last.ckpt` and `best.ckpt` are complete files at any time. This takes disk space for one more checkpoint, and one
read of the file. A killed process leaves a temporary file, which the next start removes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import CheckpointIO
from torch import Tensor

from semseg.checkpoints.format import find_packed_entry, load_plain
from semseg.errors import CheckpointError, first_line
from semseg.storage.atomic import DISK_FULL, TEMPORARY_NAME, atomic_write, describe_room, make_folder
from semseg.system.text import escape_lines, shorten_repr

URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's CheckpointIO for local paths: `Trainer(plugins=[AtomicCheckpointIO()])`."""

    has_loaded = False  # whether a checkpoint was loaded

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`, completely or not at all.

        Takes no more memory than the largest tensor that is not on the CPU. The file is read back before it replaces
        the old one (about 1 s per GB, from the page cache), so that it is known to load.

        Raises:
            CheckpointError: if it cannot be written, or not be loaded with weights_only=True; the previous file at
                `path` is unchanged.
            TypeError: if storage options are given; none are supported.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO has no storage options")
        target = _require_local_path(path)
        try:
            make_folder(target.parent)
            _write_verified(target, checkpoint)
        except OSError as error:
            raise CheckpointError(_describe_save_error(error, target, checkpoint)) from error

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors (onto the CPU) and plain containers, always with weights_only=True.

        Raises:
            CheckpointError: if the file is missing, damaged, contains code, or is no dict, or if `path` is a URL.
            ValueError: if the caller requests weights_only=False or for another device.
        """
        if weights_only is False or str(map_location or "cpu") != "cpu":
            raise ValueError("AtomicCheckpointIO loads with weights_only=True, onto the CPU")
        content = load_plain(_require_local_path(path))
        self.has_loaded = True
        return content

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete one checkpoint file if it exists.

        Raises:
            CheckpointError: if it is a folder.
        """
        target = _require_local_path(path)
        if target.is_dir():
            raise CheckpointError(f"{target}: is a folder, so it is not deleted as a checkpoint.")
        target.unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """ModelCheckpoint for which a NaN is never the best, and which restores everything that it saves.

    Lightning accepts a NaN if it comes first, and saves the score of the last checkpoint without restoring it.

    Args:
        continue_on_error: continue training if the file cannot be written; the previous best checkpoint stays.
    """

    def __init__(self, *args: Any, continue_on_error: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.continue_on_error = continue_on_error

    def _update_best_and_save(
        self, current: Tensor, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        names = (
            "current_score", "kth_best_model_path", "kth_value", "best_model_path", "best_model_score",
            "_last_global_step_saved", "_last_checkpoint_saved",
        )  # fmt: skip
        before, models = {name: getattr(self, name) for name in names}, dict(self.best_k_models)
        has_failed = False
        try:
            super()._update_best_and_save(current, trainer, monitor_candidates)
        except CheckpointError as error:
            if not self.continue_on_error:
                raise
            has_failed = True
            report_failed_save(trainer, error)
        # Only the first rank writes. All must agree on the best: whether they communicate next depends on it.
        if self.continue_on_error and trainer.strategy.broadcast(has_failed):
            self.__dict__.update(before, best_k_models=models)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state, also of a run folder that was moved, copied or is resumed in another one.

        A best checkpoint that is not in this folder is copied from beside the resumed one. Without it, the search for
        the best starts over: a score without its file would keep worse ones from being saved, and leave none.
        """
        paths_here = {name: self._path_in_this_folder(name) for name in _checkpoint_paths(state_dict)}
        if not all(Path(path).is_file() for path in paths_here.values()):
            return
        moved: dict[str, Any] = {
            key: paths_here.get(value, value) for key, value in state_dict.items() if key != "best_k_models"
        }
        moved["best_k_models"] = {paths_here[name]: score for name, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**moved, "dirpath": self.dirpath})
        self.current_score = state_dict["current_score"]

    def _path_in_this_folder(self, path: str) -> str:
        """The path in this folder of a file that was saved in another one."""
        assert self.dirpath is not None, "set up by the trainer"
        return os.path.join(self.dirpath, os.path.basename(path))  # noqa: PTH118, PTH119 - as Lightning writes them

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        is_better = super().check_monitor_top_k(trainer, current)  # first: the ranks may communicate in it
        return is_better and current is not None and not bool(torch.isnan(current))


def _checkpoint_paths(state: dict[str, Any]) -> set[str]:
    """The checkpoint files that are listed in a saved state of ModelCheckpoint."""
    single = (state["best_model_path"], state["kth_best_model_path"])
    return {str(path) for path in (*single, *state["best_k_models"]) if path}


def report_failed_save(trainer: pl.Trainer, error: Exception) -> None:
    """Report a checkpoint that could not be written, and join the barrier at which the other ranks wait."""
    print(f"warning: {escape_lines(error)}", file=sys.stderr, flush=True)
    trainer.strategy.barrier("Trainer.save_checkpoint")


class DamagedCheckpoint(NamedTuple):
    """A checkpoint that cannot be used."""

    path: Path
    reason: str


class NewestCheckpoint(NamedTuple):
    """The result of `find_newest_intact`."""

    path: Path | None  # None: no checkpoint of the folder is intact
    passed_over: list[DamagedCheckpoint]  # damaged ones that are newer, the newest first


def find_newest_intact(folder: Path) -> NewestCheckpoint:
    """The newest intact checkpoint of a folder, and the damaged ones that are newer."""
    passed_over = []
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        reason = find_damage(path)
        if reason is None:
            return NewestCheckpoint(path, passed_over)
        passed_over.append(DamagedCheckpoint(path, reason))
    return NewestCheckpoint(None, passed_over)


def find_damage(path: Path) -> str | None:
    """Why a checkpoint file cannot be used, or None if it is intact.

    Reads the whole file in blocks and verifies the checksum of every tensor; then reads the structure without the
    tensors, as far as weights_only=True allows. Supports files of torch.save from torch 1.6 on, which have checksums.
    """
    if not path.is_file():
        return "there is no such file"
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        return "the file is empty"
    if not start.startswith(b"PK\x03\x04"):
        return f"not a checkpoint: it begins with {start!r}"
    try:
        return _find_damage_inside(path)
    except zipfile.BadZipFile as error:
        return f"cut short or damaged at {path.stat().st_size} bytes ({first_line(error)})"
    except Exception as error:  # a flipped bit can change a length, a method or a name
        return f"damaged ({first_line(error)})"


def _find_damage_inside(path: Path) -> str | None:
    packed = find_packed_entry(path)
    if packed is not None:
        return f"its entry {shorten_repr(packed)} is compressed or overlaps another one"
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        return f"damaged: its entry {broken} does not match its checksum"
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if foreign:
        return f"holds more than tensors and plain containers: {', '.join(sorted(foreign))}"
    content = torch.load(path, map_location="meta", weights_only=True)
    return None if isinstance(content, dict) else f"holds a {type(content).__name__}, not a dict"


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete the temporary files of processes that were killed while writing; returns the deleted files.

    Call it while the run folder is locked: then no other process writes to `folder`, and all temporary files are stale.
    """
    leftovers = [path for path in folder.glob(".*.tmp") if TEMPORARY_NAME.fullmatch(path.name)]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def count_tensor_bytes(checkpoint: Any) -> int:
    """Bytes of all tensors in nested containers, shared memory counted once: the minimum size of their file."""
    storages: dict[tuple[str, int], int] = {}
    waiting = [checkpoint]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor) and value.layout is torch.strided:
            storage = value.untyped_storage()  # a view is saved with all of its storage
            storages[str(storage.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)
    return sum(storages.values())


def _require_local_path(path: str | os.PathLike[str]) -> Path:
    if URL.match(os.fspath(path)):
        raise CheckpointError(f"{path}: checkpoints are local files, not URLs. Download it first and give the path.")
    return Path(path)


def _write_verified(target: Path, checkpoint: dict[str, Any]) -> None:
    """Replace `target` by a file with `checkpoint` that can be loaded."""
    disk = shutil.disk_usage(target.parent)
    if disk.total and disk.free < count_tensor_bytes(checkpoint):  # some file systems report no size at all
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with atomic_write(target) as temporary:
        _stream_checkpoint(temporary, checkpoint)
        reason = find_damage(temporary)
        if reason is not None:
            raise CheckpointError(f"{target}: not replaced, because the new file cannot be used: {reason}.")


def _stream_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write `checkpoint` to a file without a copy in memory."""
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # After a failed write, torch's zip writer fails again when it closes and hides the first error, which may
            # be a request to stop.
            reason = error.__context__
            if reason is None or (isinstance(reason, Exception) and not isinstance(reason, OSError)):
                raise
            raise reason from error


def _describe_save_error(error: OSError, target: Path, checkpoint: dict[str, Any]) -> str:
    if error.errno not in DISK_FULL:
        return f"{target}: the checkpoint cannot be written ({error.strerror}). The previous file is untouched."
    needed, free = count_tensor_bytes(checkpoint), shutil.disk_usage(target.parent).free
    return (
        f"{target}: the checkpoint cannot be written ({error.strerror}). It needs {needed} bytes "
        f"({needed / 1e6:.1f} MB) in addition to the previous file, and {free} ({free / 1e6:.1f} MB) are free. "
        f"The previous file is untouched. {describe_room(error)}, then continue with resume=auto."
    )
