"""A full disk ends in one line that names the file, and what was there before stays whole."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from helpers.command_line import TINY, run_here
from helpers.in_process import TINY_RUN, configured, fit
from helpers.memory import in_child
from semseg.checkpoints import atomic_io
from semseg.data.header_cache import load_cache, save_cache
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import LabelMap
from semseg.evaluation.result_files import write_rows
from semseg.modes.convert import save_state_dict
from semseg.prediction.outputs import array_on_disk, save_png
from semseg.prediction.video import VideoWriters
from semseg.storage.atomic import atomic_write, describe_write_error
from semseg.storage.run_results import Job, RunResult, write_job, write_result
from semseg.training.loggers.csv import RowFile

NOISE = torch.rand(3, 64, 64)


@pytest.mark.parametrize("blocked", ["file", "file/below", "link"])
def test_a_folder_that_cannot_be_created_is_named_like_a_full_disk(blocked: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    path = tmp_path / blocked / "x.png"
    writers = (
        lambda: save_png(Image.new("L", (4, 4)), path),
        lambda: array_on_disk(path, (2, 3, 4)).__enter__(),
        lambda: VideoWriters(path.parent / "film").add("overlay", np.zeros((4, 4, 3), np.uint8), 10),
    )
    for write in writers:
        with pytest.raises(OSError) as caught:
            write()
        message = describe_write_error(caught.value, tmp_path)
        assert message is not None and str(tmp_path / blocked) in message and "Check the path" in message


@contextmanager
def full_disk(limit: int = 64) -> Iterator[None]:
    """No file of this process grows beyond `limit` bytes, which the system reports as it reports a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_rows(path: Path) -> None:
    file = RowFile(path)
    file.add(len(file._rows), {f"column {index}": 0.5 for index in range(9)})
    file.save()


def save_safetensors(path: Path) -> None:
    with atomic_write(path) as temporary:
        save_file({"noise": NOISE}, temporary)


def save_probabilities(path: Path) -> None:
    with array_on_disk(path, (3, 64, 64)) as array:
        array[:] = 1
    with atomic_write(path) as temporary:
        temporary.write_bytes(bytes(100))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "result.json": lambda path: write_result(path.parent, RunResult(0.123456789, "a score with a long name " * 3)),
    "job.json": lambda path: write_job(Job(path.parent, ("optim.lr=0.1",) * 9)),
    "per_class.csv": lambda path: write_rows(path, [{"name": "sky", "iou": 0.5}] * 9),
    "photo_ids.png": lambda path: save_png(Image.fromarray((NOISE[0].numpy() * 255).astype(np.uint8)), path),
    "encoder.pth": lambda path: save_state_dict(path, {"noise": NOISE}),
    "net.safetensors": save_safetensors,
    "photo_probabilities.npz": save_probabilities,
    "metrics.csv": save_rows,
}


@pytest.mark.reliability
@pytest.mark.parametrize("name", WRITERS)
def test_b9_a_full_disk_is_reported_with_the_file_and_leaves_the_one_before(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError) as caught:
        WRITERS[name](path)
    message = describe_write_error(caught.value, tmp_path) or ""
    assert message.startswith(f"{path}: cannot be written (") and "\n" not in message
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.reliability
def test_b9_a_library_that_hides_a_full_disk_is_seen_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt2"
    with pytest.raises(RuntimeError, match="of its own"), atomic_write(path):
        raise RuntimeError("of its own")
    monkeypatch.setattr("semseg.storage.atomic.shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(path):
        raise RuntimeError("unexpected pos 832 vs 726")
    assert caught.value.filename == str(path)


@pytest.mark.reliability
def test_b9_caches_are_skipped_on_a_full_disk(tmp_path: Path) -> None:
    cache = tmp_path / "sizes.json"
    save_cache(cache, {"a.jpg": [1] * 6})
    labels = LabelCache(tmp_path / "labels", LabelMap(3))
    place = labels.folder / "a.safetensors"
    with full_disk():
        save_cache(cache, {f"{index}.jpg": [1] * 6 for index in range(99)})
        with pytest.warns(UserWarning, match=r"data\.label_cache=.*cannot be written to"):
            labels.save(place, np.zeros((64, 64), np.int16))
    assert load_cache(cache) == {"a.jpg": [1] * 6} and labels.load(place) is None


@pytest.mark.reliability
@pytest.mark.filterwarnings("ignore")
def test_b10_on_error_warn_trains_on_without_best_last_log_and_panels(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"data.root={tmp_path}/scenes", "data.make.num_train=4", "data.make.num_val=1", *TINY_RUN]
    words += ["data=scenes", "data.steps_per_epoch=1", "trainer.max_epochs=3", f"run_dir={tmp_path}/run"]
    write, written = atomic_io._stream_checkpoint, []

    def write_if_there_is_room(path: Path, checkpoint: dict[str, Any]) -> None:
        if checkpoint["epoch"] == 1:  # the second of three
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append((path.name.split(".")[1], checkpoint["epoch"]))
        write(path, checkpoint)

    def write_log_if_there_is_room(file: RowFile) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file.path))

    scores = iter([0.2, 0.4, 0.3])  # better than the best that could be saved, though not than the one in between
    with (
        patch.object(atomic_io, "_stream_checkpoint", write_if_there_is_room),
        patch.object(RowFile, "save", write_log_if_there_is_room),
        pytest.warns(UserWarning, match=r"metrics\.csv: cannot be written"),  # at the end, once more
        patch("semseg.lit_module.scores_from", rising(scores)),
    ):
        content = fit(configured(*words, "checkpoint.on_error=warn"))
    assert content["epoch"] == 2
    assert ("best", 0) in written and ("best", 2) in written
    state = next(state for name, state in content["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert float(state["best_model_score"]) == pytest.approx(0.3)
    errors = capfd.readouterr().err
    assert "best.ckpt: the checkpoint cannot be written" in errors and "last.ckpt: the" in errors
    assert "metrics.csv: cannot be written" in errors and not (tmp_path / "run" / "logs" / "metrics.csv").exists()


def rising(scores: Iterator[float]) -> Callable[..., Any]:
    from semseg.evaluation.metrics import scores_from

    def scored(*args: Any, **kwargs: Any) -> Any:
        return scores_from(*args, **kwargs)._replace(mean_iou=next(scores))

    return scored


@pytest.mark.reliability
def test_b9_hydras_files_on_a_full_disk_are_a_sentence_and_stay_as_they_were(tmp_path: Path) -> None:
    saved = tmp_path / "run" / ".hydra" / "overrides.yaml"
    saved.parent.mkdir(parents=True)
    saved.write_text("- seed=1\n")

    def convert() -> str:
        with full_disk(1024):
            return run_here(tmp_path, *TINY, "mode=convert", "ckpt=x", "output=y.ckpt", "run_dir=run", code=1)

    output = in_child(convert)
    assert output.count("\n") == 1
    assert output.startswith(f"error: {saved.parent / 'config.yaml'}: cannot be written (File too large)")
    assert saved.read_text() == "- seed=1\n"
