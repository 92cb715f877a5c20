"""Networks whose constructor or forward pass reads values are trained, saved and checked as others are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from helpers.command_line import TINY, run_here
from helpers.tiny_network import TinyNetwork
from semseg.nets.interfaces import Logits
from semseg.nets.meta import build_on_meta
from semseg.nets.registry import NETWORKS, Constructor

WORDS = [
    *(word for word in TINY if not word.startswith("model")), "model=custom", "model.library=reading",
    "model.options.width=4",
]  # fmt: skip


class ReadingNetwork(TinyNetwork):
    """Reads values of tensors as many networks do: rates of stochastic depth, and a test of its input."""

    def __init__(self, num_classes: int, width: int = 8, reader: str = "item") -> None:
        super().__init__(num_classes, width)
        rates = torch.linspace(0, 0.1, 3)
        self.rates = [rate.item() for rate in rates] if reader == "item" else getattr(rates, reader)()

    def forward(self, image: Tensor) -> Logits:
        if image.sum().item() == float("inf"):
            raise ValueError("the image is infinite")
        return super().forward(image)


@pytest.fixture(autouse=True)
def program() -> Iterator[None]:
    with patch.dict(NETWORKS, {"reading": Constructor("nets.test_meta", "ReadingNetwork")}):
        yield


@pytest.mark.parametrize("reader", ["item", "tolist", "numpy"])
def test_a_constructor_that_reads_values_is_run_in_memory(reader: str) -> None:
    net = build_on_meta(lambda: ReadingNetwork(3, reader=reader))
    assert {value.device.type for value in net.state_dict().values()} == {"meta"}
    assert list(net.rates) == pytest.approx([0, 0.05, 0.1])


def test_other_errors_of_a_constructor_are_raised() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        build_on_meta(lambda: ReadingNetwork(3, reader="nonsense"))


def test_such_a_network_is_trained_and_evaluated(tmp_path: Path) -> None:
    run_here(tmp_path, *WORDS, "run_dir=run", "trainer.limit_train_batches=1", "trainer.limit_val_batches=0")
    printed = run_here(tmp_path, "mode=eval", "ckpt=run", "eval.bootstrap=0", "trainer.accelerator=cpu")
    assert "mean IoU" in printed


def test_a_check_says_that_its_memory_is_unknown(tmp_path: Path) -> None:
    printed = run_here(tmp_path, "mode=check", *WORDS, "output=recipe.yaml")
    assert "how much memory reading needs for them cannot be estimated" in printed
    assert "the memory of a step cannot be estimated for this network" in (tmp_path / "recipe.yaml").read_text()


def test_its_batch_size_cannot_be_chosen_by_an_estimate(tmp_path: Path) -> None:
    printed = run_here(tmp_path, *WORDS, "data.batch_size=auto", "run_dir=run", code=2)
    assert "data.batch_size=auto: the memory that reading needs cannot be estimated" in printed
