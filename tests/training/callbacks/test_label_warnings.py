"""Warnings about labels and predictions: what is counted, and when a sentence is due."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from helpers.in_process import TINY_RUN, configured, fit
from semseg.data.batch import Batch
from semseg.training.callbacks import label_warnings as module
from semseg.training.callbacks.label_warnings import count_label_pixels, describe_odd_labels, describe_odd_predictions

NAMES = ("sky", "road", "car")


def test_pixels_are_counted_by_class_and_padding_not_at_all() -> None:
    label = torch.full((2, 4, 4), -1)
    label[0, :2, :3] = torch.tensor([[0, 0, 2], [2, -1, 2]])  # an image of 2 x 3 label pixels
    label[1, :4, :4] = 1  # one that fills the canvas
    batch = Batch(torch.zeros(2, 3, 32, 32), label, torch.tensor([[16, 20], [32, 32]]), ["a", "b"])
    assert count_label_pixels(batch, 3).tolist() == [2, 16, 3, 1]


def test_sentences_about_labels() -> None:
    assert describe_odd_labels([5, 5, 5, 5], NAMES) == []
    (ignored,) = describe_odd_labels([1, 1, 1, 97], NAMES)
    assert ignored.startswith("97.0% of the pixels of this epoch are ignored")
    (never,) = describe_odd_labels([5, 0, 5, 0], NAMES)
    assert never.startswith("1 of 3 classes did not occur in this epoch: road.")


def test_a_sentence_about_predictions() -> None:
    assert describe_odd_predictions(torch.tensor([[50, 1, 0], [45, 4, 0], [0, 0, 0]]), NAMES) is None
    warning = describe_odd_predictions(torch.tensor([[500, 0, 0], [498, 2, 0], [0, 0, 0]]), NAMES)
    assert warning is not None and warning.startswith("99.8% of the predictions are 'sky'")
    assert describe_odd_predictions(torch.zeros(3, 3, dtype=torch.int64), NAMES) is None


@pytest.mark.slow
def test_a_run_warns_of_labels_that_are_nearly_all_ignored(tmp_path: Path) -> None:
    scenes = ["data=scenes", f"data.root={tmp_path / 'scenes'}", "data.make.num_train=4", "data.make.num_val=2"]
    length = ["data.steps_per_epoch=2", "trainer.max_epochs=1", f"run_dir={tmp_path / 'run'}"]
    # Classes have ids that do not occur, and those that do are not scored.
    ids = [f"{65000 + index}:{index}" for index in range(11)] + [f"{raw_id}:null" for raw_id in range(1, 12)]
    with pytest.warns(UserWarning, match="100.0% of the pixels of this epoch are ignored"):
        fit(configured(*scenes, *TINY_RUN, *length, f"data.map={{{','.join(ids)}}}"))


@pytest.mark.slow
def test_a_first_epoch_that_is_too_good_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = ["data=scenes", f"data.root={tmp_path / 'scenes'}", "data.make.num_train=4", "data.make.num_val=2"]
    length = ["data.steps_per_epoch=2", "trainer.max_epochs=1"]

    def warnings_of(name: str) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(configured(*scenes, *TINY_RUN, *length, f"run_dir={tmp_path / name}"))
        return [str(one.message) for one in caught if "too good to be true" in str(one.message)]

    assert warnings_of("honest") == []
    monkeypatch.setattr(module, "MAX_FIRST_ACCURACY", -1.0)
    assert len(warnings_of("too_good")) == 1
