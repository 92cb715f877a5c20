"""Checkpoints that survive kills, full disks and damage. Names say the row of the list of what must hold.

Processes that are killed or measured are forks of this one: they spare the seconds that importing torch takes.
"""

from __future__ import annotations

import errno
import io
import math
import os
import random
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.memory import FORK, MEGABYTE, in_child, needs_proc, peak_growth
from semseg.checkpoints import atomic_io
from semseg.checkpoints.atomic_io import (
    AtomicCheckpointIO,
    BestCheckpoint,
    find_damage,
    find_newest_intact,
    remove_leftovers,
)
from semseg.errors import CheckpointError
from semseg.storage.atomic import atomic_write, temporary_path
from semseg.system.process import StopRequest


def content(step: int, megabytes: float) -> dict[str, Any]:
    """A checkpoint of 20 tensors in which every number is its step."""
    numbers = int(megabytes * MEGABYTE / 4 / 20)
    return {
        "global_step": step,
        "state_dict": {str(index): torch.full((numbers,), float(step)) for index in range(20)},
    }


def step_of(path: Path) -> int:
    """The step of a file of `content`, which is whole and loads with plain torch.load."""
    loaded = torch.load(path, weights_only=True)
    assert all(bool((tensor == loaded["global_step"]).all()) for tensor in loaded["state_dict"].values())
    return loaded["global_step"]


def save(step: int, path: Path, megabytes: float = 0.1) -> None:
    AtomicCheckpointIO().save_checkpoint(content(step, megabytes), path)


@pytest.fixture
def other_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's temporary folder on another file system than the checkpoints, where there is one."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        return
    monkeypatch.setenv("TMPDIR", str(memory))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_b1_b2_a_kill_while_saving_costs_neither_the_checkpoint_nor_disk_space(
    kills: int, tmp_path: Path, other_temporary_folder: None
) -> None:
    last = tmp_path / "last.ckpt"
    save(0, last, megabytes=20)

    def save_for_ever(step: int) -> None:
        torch.set_num_threads(1)  # the parent's pool of threads does not survive the fork
        while True:
            step += 1
            save(step, last, megabytes=20)

    rng = random.Random(kills)
    num_leftovers = 0
    for _ in range(kills):
        before = step_of(last)
        child = FORK.Process(target=save_for_ever, args=(before,))
        child.start()
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob(".*.tmp")):
            assert child.is_alive() and time.monotonic() < deadline
        time.sleep(rng.choice([0, rng.uniform(0, 0.3)]))  # at once, while the file is written, or at any time
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        assert find_damage(last) is None
        assert step_of(last) >= before
        num_leftovers += len(remove_leftovers(tmp_path))
        assert list(tmp_path.iterdir()) == [last]
    assert num_leftovers > kills / 4  # or no kill came while a file was written
    assert step_of(last) > 0


@pytest.mark.reliability
def test_b2_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    last = tmp_path / "last.ckpt"
    stale = {temporary_path(last).name, ".last.ckpt.5@elsewhere.tmp", ".metrics.csv.17.tmp"}
    kept = {".notes.tmp", "last.ckpt", "last.ckpt.tmp"}
    for name in stale | kept:
        (tmp_path / name).write_text("half a file")
    assert {path.name for path in remove_leftovers(tmp_path)} == stale
    assert {path.name for path in tmp_path.iterdir()} == kept


@pytest.mark.reliability
def test_f7_processes_with_one_id_on_one_host_name_do_not_share_temporary_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "metrics.json"
    with atomic_write(path) as first, atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.reliability
def test_b3_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(1, path, megabytes=2)

    def save_too_much() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * MEGABYTE, 5 * MEGABYTE))
        with pytest.raises(CheckpointError) as caught:
            save(2, path, megabytes=20)
        return str(caught.value)

    message = in_child(save_too_much)
    assert str(path) in message and "File too large" in message and "20971520 bytes" in message and "free" in message
    assert step_of(path) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.reliability
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_b3_an_error_that_only_comes_with_the_sync_counts_too(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    save(1, path)

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="is untouched") as caught:
        save(2, path)
    assert os.strerror(code) in str(caught.value)
    assert ("bytes" in str(caught.value)) == (code != errno.EIO)
    assert step_of(path) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.reliability
def test_b3_the_reason_that_torch_hides_behind_an_error_of_its_own_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_as_torch_does(*_: object) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("unexpected pos 8002176 vs 8002128")  # noqa: B904 - neither does torch

    monkeypatch.setattr(torch, "save", fail_as_torch_does)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(1, tmp_path / "last.ckpt")


@pytest.mark.reliability
@pytest.mark.parametrize("stop", [StopRequest(signal.SIGINT), KeyboardInterrupt()])
def test_e8_who_stops_while_a_checkpoint_is_written_stops_and_keeps_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    written = io.FileIO.write

    def write(file: io.FileIO, data: bytes) -> int:
        if len(data) > 2**16:
            raise stop  # a signal's handler, in the middle of a tensor
        return written(file, data)

    class Interrupted(io.FileIO):
        pass

    Interrupted.write = write  # pyright: ignore[reportAttributeAccessIssue]
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: Interrupted(path, "w") if mode == "wb" else opened(path, mode))
    with pytest.raises(type(stop)):
        AtomicCheckpointIO().save_checkpoint({"step": 2, "weight": torch.zeros(2**20)}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_b3_a_disk_that_is_too_small_is_reported_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_io, "_stream_checkpoint", lambda *_: pytest.fail("wrote"))
    usage = atomic_io.shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(atomic_io.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"2097120 bytes \(2\.1 MB\).*1000000 \(1\.0 MB\) are free"):
        save(1, tmp_path / "last.ckpt", megabytes=2)


def test_shared_memory_is_needed_once_and_a_view_needs_all_of_it() -> None:
    weights = torch.zeros(1000)
    assert atomic_io.count_tensor_bytes({"a": weights, "b": [weights], "c": ({"d": weights[:1]},), "e": 3}) == 4000


@pytest.mark.slow
@pytest.mark.reliability
@needs_proc
def test_b7_saving_takes_a_fifth_of_the_file_in_memory_at_most(tmp_path: Path) -> None:
    size = 100 * MEGABYTE

    def measure() -> tuple[float, float]:
        checkpoint = content(1, 100)
        path = tmp_path / "last.ckpt"
        streamed = peak_growth(lambda: AtomicCheckpointIO().save_checkpoint(checkpoint, path))
        return streamed / size, peak_growth(lambda: torch.save(checkpoint, io.BytesIO())) / size

    streamed, in_memory = in_child(measure)
    assert in_memory > 0.9  # the gauge sees what Lightning's own saving takes
    assert streamed <= 0.2
    assert (tmp_path / "last.ckpt").stat().st_size >= size


class Scripted(pl.LightningModule):
    """One weight, whose validation gives scores known in advance; looks at the files after every epoch."""

    def __init__(self, scores: list[float], folder: Path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scores = scores
        self.folder = folder
        self.num_looks = 0

    def training_step(self, batch: Tensor) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Tensor) -> None:
        self.log("val/miou", torch.tensor(self.scores[self.current_epoch]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_epoch_start(self) -> None:
        self.look(self.current_epoch)

    def on_train_end(self) -> None:
        self.look(self.current_epoch)

    def look(self, num_epochs: int) -> None:
        """best.ckpt is the first of the highest scores so far, last.ckpt the epoch before this; both load."""
        if num_epochs == 0:
            return
        assert epoch_in(self.folder / "last.ckpt") == num_epochs - 1
        known = [(score, -epoch) for epoch, score in enumerate(self.scores[:num_epochs]) if not math.isnan(score)]
        expected = -max(known)[1] if known else None
        assert epoch_in(self.folder / "best.ckpt") == expected
        self.num_looks += 1


def epoch_in(path: Path) -> int | None:
    return torch.load(path, weights_only=True)["epoch"] if path.exists() else None


def watch(paths: list[Path], stop: threading.Event, missing: list[Path]) -> None:
    """Note every time that a file which has been there is not."""
    seen: set[Path] = set()
    while not stop.is_set():
        for path in paths:
            if path.exists():
                seen.add(path)
            elif path in seen:
                missing.append(path)
        time.sleep(1e-4)


@pytest.mark.slow
@pytest.mark.reliability
@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*log_every_n_steps.*", "ignore:.*not empty.*")
def test_b8_best_and_last_are_whole_at_every_moment_and_nan_is_never_best(tmp_path: Path) -> None:
    rng = random.Random(8)
    scores = [math.nan, math.nan, *(math.nan if rng.random() < 0.1 else rng.random() for _ in range(98))]
    module = Scripted(scores, tmp_path)
    last = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=False, enable_version_counter=False)
    best = BestCheckpoint(tmp_path, "best", monitor="val/miou", mode="max", enable_version_counter=False)
    trainer = pl.Trainer(
        max_epochs=100, accelerator="cpu", logger=False, callbacks=[last, best], plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    stop, missing = threading.Event(), []
    watcher = threading.Thread(target=watch, args=([tmp_path / "last.ckpt", tmp_path / "best.ckpt"], stop, missing))
    watcher.start()
    data = DataLoader([torch.zeros(1)])  # type: ignore[arg-type]
    try:
        trainer.fit(module, data, data)
    finally:
        stop.set()
        watcher.join()
    assert module.num_looks >= 100
    assert missing == []
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "best.ckpt"}
    assert float(best.best_model_score or 0) == pytest.approx(max(score for score in scores if not math.isnan(score)))


def test_the_file_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "last.ckpt", []

    def note(descriptor: int) -> None:
        synced.append((os.path.samestat(os.fstat(descriptor), tmp_path.stat()), path.exists()))

    monkeypatch.setattr(os, "fsync", note)
    save(1, path)
    assert synced == [(False, False), (True, True)]  # (is the folder, the new file has its name)


def test_a_file_that_would_not_load_again_does_not_replace_one_that_does(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(1, path)
    with pytest.raises(CheckpointError, match=r"last\.ckpt: not replaced.*pathlib\.PosixPath"):
        AtomicCheckpointIO().save_checkpoint({"folder": Path("runs")}, path)
    assert step_of(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved_at_all_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"hook": lambda: None}, tmp_path / "new" / "last.ckpt")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match=r"run/checkpoints/last\.ckpt: .*Not a directory"):
        save(1, tmp_path / "run" / "checkpoints" / "last.ckpt")


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda whole: whole[: len(whole) // 2], "cut short"),
        (lambda whole: whole[:-1], "cut short"),
        (lambda whole: b"", "empty"),
        (lambda whole: b"<html>404 not found</html>", "not a checkpoint: it begins with b'<html>404"),
        (lambda whole: flipped(whole, whole.index(b"\0\0\x80?" * 100) * 8), "does not match its checksum"),
    ],
    ids=["half", "one byte short", "empty", "html", "one bit of a weight"],
)
def test_b6_damage_is_reported_and_the_newest_intact_checkpoint_is_found(
    spoil: Callable[[bytes], bytes], expected: str, tmp_path: Path
) -> None:
    for age, name in enumerate(["last.ckpt", "best.ckpt", "older.ckpt"]):
        save(1, tmp_path / name)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    last = tmp_path / "last.ckpt"
    last.write_bytes(spoil(last.read_bytes()))
    os.utime(last, (1e9, 1e9))
    found = find_newest_intact(tmp_path)
    assert found.path == tmp_path / "best.ckpt"
    assert [(item.path, expected in item.reason) for item in found.passed_over] == [(last, True)]


def flipped(whole: bytes, bit: int) -> bytes:
    changed = bytearray(whole)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_folder_without_an_intact_checkpoint_says_so(tmp_path: Path) -> None:
    assert find_newest_intact(tmp_path) == (None, [])
    (tmp_path / "last.ckpt").touch()
    assert find_newest_intact(tmp_path) == (None, [(tmp_path / "last.ckpt", "the file is empty")])
    assert find_damage(tmp_path / "best.ckpt") == "there is no such file"


def test_any_flipped_bit_is_reported_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save(3, path, megabytes=0.001)
    whole = path.read_bytes()
    rng = random.Random(0)
    num_found = 0
    for _ in range(300):
        path.write_bytes(flipped(whole, rng.randrange(8 * len(whole))))
        reason = find_damage(path)
        num_found += reason is not None
        assert reason is not None or step_of(path) == 3
        assert reason is None or "\n" not in reason
    assert num_found > 50


def test_a_file_with_code_in_it_is_not_intact(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"run": os.getcwd}, path)
    assert find_damage(path) == "holds more than tensors and plain containers: posix.getcwd"
    torch.save([1], path)
    assert find_damage(path) == "holds a list, not a dict"


def test_loading_goes_to_the_cpu_and_never_runs_code(tmp_path: Path) -> None:
    plugin, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    save(5, path)
    assert plugin.load_checkpoint(path, weights_only=True)["global_step"] == 5
    with pytest.raises(ValueError, match="weights_only=True"):
        plugin.load_checkpoint(path, weights_only=False)
    with pytest.raises(ValueError, match="CPU"):
        plugin.load_checkpoint(path, map_location="cuda")
    torch.save({"run": os.getcwd}, path)
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        plugin.load_checkpoint(path)


@pytest.mark.parametrize("url", ["http://host/last.ckpt", "s3://bucket/last.ckpt", Path("https://host/last.ckpt")])
def test_a_url_is_refused(url: str | Path) -> None:
    plugin = AtomicCheckpointIO()
    for use in (plugin.load_checkpoint, plugin.remove_checkpoint, lambda path: plugin.save_checkpoint({}, path)):
        with pytest.raises(CheckpointError, match="not URLs"):
            use(url)


def test_only_files_are_removed(tmp_path: Path) -> None:
    plugin, path = AtomicCheckpointIO(), tmp_path / "run" / "last.ckpt"
    save(1, path)
    with pytest.raises(CheckpointError, match="is a folder"):
        plugin.remove_checkpoint(path.parent)
    plugin.remove_checkpoint(path)
    plugin.remove_checkpoint(path)
    assert not path.exists()
