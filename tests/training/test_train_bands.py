"""Training on four bands of 16 bits: any number of workers gives the same steps, and a run resumes exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import tifffile
import torch
from PIL import Image

from helpers.in_process import TINY_RUN, PreparedRun, assert_equal, configured, fit
from semseg.data.plan import SubBatch
from semseg.errors import ConfigError, DataError
from semseg.training.callbacks.saver import Saver

pytestmark = pytest.mark.reliability
WORDS = [
    "data=folder", "data.num_classes=2", "data.first_id=0", "data.ignore=[]", "data.val_fraction=0.2", *TINY_RUN,
    "data.bands=[red,green,blue,nir]", "data.value_range=[0,3000]", "data.steps_per_epoch=4", "trainer.max_epochs=1",
    "augment.brightness=0.3", "augment.hue=0.1", "augment.blur=0.5", "augment.rotation=20", "augment.erasing=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(6):
        label = np.zeros((40, 52), np.uint8)
        label[:, 10 + 5 * number :] = 1
        pixels = np.array([[300, 500, 900, 2500], [1200, 900, 700, 400]])[label] + rng.integers(0, 200, (40, 52, 4))
        tifffile.imwrite(folder / f"images/{number}.tif", pixels.astype(np.uint16), photometric="minisblack",
                         planarconfig="contig", compression="deflate")  # fmt: skip
        Image.fromarray(label).save(folder / f"masks/{number}.png")
    return folder


def words(root: Path, run_dir: Path, *more: str) -> list[str]:
    return [*WORDS, f"data.root={root}", f"run_dir={run_dir}", *more]


@pytest.mark.slow
def test_a_run_resumes_exactly_and_workers_change_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, copies = Saver.save, []

    def save_and_copy(saver: Saver, trainer: pl.Trainer) -> bool:
        is_saved = save(saver, trainer)
        copies.append(shutil.copy(tmp_path / "whole/checkpoints/last.ckpt", tmp_path / f"{len(copies)}.ckpt"))
        return is_saved

    with monkeypatch.context() as patched:
        patched.setattr(Saver, "save", save_and_copy)
        whole = fit(configured(*words(root, tmp_path / "whole", "checkpoint.every_n_steps=2")))
    with_workers = fit(configured(*words(root, tmp_path / "workers", "data.num_workers=2")))
    assert_equal(with_workers["state_dict"], whole["state_dict"], "workers")
    assert torch.load(copies[0], weights_only=True)["global_step"] == 2
    resumed = fit(configured(*words(root, tmp_path / "resumed")), resume=Path(copies[0]))
    assert_equal(resumed["state_dict"], whole["state_dict"], "resumed")
    assert_equal(resumed["optimizer_states"], whole["optimizer_states"], "resumed")
    assert whole["state_dict"]["net.encoder.fine.0.0.weight"].shape[1] == 4
    convention = whole["semseg"]["convention"]
    assert convention["bands"] == ["red", "green", "blue", "nir"] and convention["ranges"] == [[0.0, 3000.0]] * 4


def test_a_sub_batch_has_the_type_of_the_files_and_nir_keeps_its_values(root: Path, tmp_path: Path) -> None:
    plain = [word for word in words(root, tmp_path) if not word.startswith("augment.")]
    batches = []
    for more in ((), ("augment.brightness=0.9",)):
        run = PreparedRun(configured(*plain, *more))
        run.data.trainer = run.trainer
        dataset = run.data.train_dataloader().dataset
        batches.append(dataset[SubBatch(0, (0, 1), 32, (False, True))])
    still, brighter = (batch.image for batch in batches)
    assert still.dtype == torch.uint16 and still.shape[1] == 4
    assert torch.equal(still[:, 3].int(), brighter[:, 3].int())
    assert not torch.equal(still[:, 0].int(), brighter[:, 0].int())
    assert int(brighter.int().max()) <= 3200


def test_bad_files_are_counted_with_on_bad_skip(root: Path, tmp_path: Path) -> None:
    run = PreparedRun(configured(*words(root, tmp_path, "data.on_bad=skip", "data.max_bad=0.5")))
    run.data.trainer = run.trainer
    dataset = run.data.train_dataloader().dataset
    broken = tmp_path / "broken.tif"
    tifffile.imwrite(broken, np.zeros((40, 52, 3), np.uint16), photometric="rgb")
    dataset.records = [dataset.records[0]._replace(image=str(broken)), *dataset.records[1:]]
    batch = dataset[SubBatch(0, (0, 1), 32, (False, False))]
    assert len(batch.image) == 1 and len(batch.bad) == 1 and "holds 3 bands of uint16 values" in batch.bad[0]
    alone = dataset[SubBatch(0, (0,), 32, (False,))]
    assert alone.image.dtype == torch.uint16 and alone.image.shape[1] == 4 and (alone.label == -1).all()
    dataset.options = dataset.options.__class__(**{**vars(dataset.options), "skip_bad": False})
    with pytest.raises(DataError, match=r"broken\.tif: holds 3 bands"):
        dataset[SubBatch(0, (0,), 32, (False,))]


def test_changes_of_colour_need_colours(root: Path, tmp_path: Path) -> None:
    run = PreparedRun(configured(*words(root, tmp_path, "data.bands=[a,b,c,d]")))
    run.data.trainer = run.trainer
    with pytest.raises(ConfigError, match=r"change red, green and blue, and data\.bands are a, b, c, d"):
        run.data.train_dataloader()
