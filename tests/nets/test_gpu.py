"""Settings for GPUs."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch

from semseg.nets.gpu import ALLOCATOR_VARIABLES, configure_gpu


@pytest.fixture(autouse=True)
def precision_restored() -> object:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_matrix_products_use_tf32_and_memory_grows_in_segments() -> None:
    without = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    with patch.dict(os.environ, without, clear=True):
        configure_gpu()
        assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_a_setting_of_the_user_is_kept(name: str) -> None:
    with patch.dict(os.environ, {name: "max_split_size_mb:64"}):
        configure_gpu()
        assert [other for other in ALLOCATOR_VARIABLES if other in os.environ] == [name]
