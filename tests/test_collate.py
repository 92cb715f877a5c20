"""A batch holds every sample in its top left corner, and padding never counts."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

from semseg.collate import collate
from semseg.data.batch import LABEL_TYPE, Batch, Sample


def sample(height: int, width: int, stride: int, value: int) -> Sample:
    label = np.full((-(-height // stride), -(-width // stride)), value, np.int16)
    return Sample(np.full((height, width, 3), (value, 2, 3), np.uint8), label, f"{value}.jpg")


@pytest.mark.reliability
@pytest.mark.parametrize(("size_divisor", "label_stride"), [(8, 8), (32, 4), (64, 1)])
def test_c12_two_very_different_sizes_share_a_canvas(size_divisor: int, label_stride: int) -> None:
    members = [sample(300, 401, label_stride, 7), sample(97, 131, label_stride, 9)]
    batch = collate(members, size_divisor, label_stride)
    height, width = batch.image.shape[2:]
    assert (height % size_divisor, width % size_divisor) == (0, 0)
    assert height - size_divisor < 300 <= height
    assert width - size_divisor < 401 <= width
    assert batch.label.shape == (2, height // label_stride, width // label_stride)
    assert (batch.image.dtype, batch.label.dtype, batch.size.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert batch.size.tolist() == [[300, 401], [97, 131]]
    assert batch.paths == ["7.jpg", "9.jpg"]
    for image, label, member in zip(batch.image, batch.label, members, strict=True):
        rows, columns = member.image.shape[:2]
        assert torch.equal(image[:, :rows, :columns].permute(1, 2, 0), torch.from_numpy(member.image))
        assert image.sum() == int(member.image.sum())  # 0 everywhere else
        assert (label >= 0).sum() == member.label.size  # -1 everywhere else
        rows, columns = member.label.shape
        assert (label[:rows, :columns] == int(member.label[0, 0])).all()


def test_ignored_pixels_stay_ignored() -> None:
    batch = collate([Sample(np.zeros((8, 8, 3), np.uint8), np.full((1, 1), -1, np.int16), "a")], 8, 8)
    assert batch.label.tolist() == [[[-1]]]


def test_a_batch_can_be_pinned_and_moved_as_a_named_tuple() -> None:
    assert issubclass(Batch, tuple)
    assert Batch._fields == ("image", "label", "size", "paths", "bad")


@pytest.mark.parametrize("label_type", [torch.int64, LABEL_TYPE])
def test_a_batch_comes_out_of_another_process_as_it_was(label_type: torch.dtype) -> None:
    batch = collate([sample(30, 40, 4, 7), sample(9, 13, 4, 9)], 8, 4, label_type)._replace(bad=("what is wrong",))
    assert batch.label.dtype == label_type
    handed_over = pickle.loads(ForkingPickler.dumps(batch))
    assert type(handed_over) is Batch
    for name in ("image", "label", "size"):
        before, after = getattr(batch, name), getattr(handed_over, name)
        assert torch.equal(after, before)
        assert after.dtype == before.dtype
    assert (handed_over.paths, handed_over.bad) == (batch.paths, batch.bad)


def test_a_label_stride_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="label_stride 3"):
        collate([sample(8, 8, 3, 1)], size_divisor=8, label_stride=3)
