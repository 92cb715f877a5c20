"""The exchange of numbers between ranks in a step; tests/distributed/test_two_ranks.py has two ranks do it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from helpers.in_process import configured
from semseg.system.process import STOP_SIGNALS
from semseg.training.callbacks.saver import Saver
from semseg.training.callbacks.step_reduction import StepReduction, Summands


def test_every_callback_gets_the_sums_of_its_own_integers() -> None:
    reduction, found = StepReduction(), []
    for name, numbers in (("first", [3, 0]), ("second", [0, 0, 5])):
        summands = Summands(
            len(numbers), lambda numbers=numbers: numbers, lambda *sums, name=name: found.append((name, *sums))
        )
        reduction.register(summands)
    row = reduction.collect(torch.ones((), dtype=torch.float64))
    assert row.dtype == torch.float64 and row.tolist() == [3, 0, 0, 0, 5] and reduction.length == 5
    reduction.dispatch(7, (2 * row).tolist())
    assert found == [("first", 7, [6, 0]), ("second", 7, [0, 0, 10])]


def test_a_checkpoint_that_was_due_before_the_last_one_was_written_is_not_written_again(tmp_path: Path) -> None:
    saver = Saver(tmp_path, configured("data=scenes").checkpoint, StepReduction())
    trainer: Any = SimpleNamespace(loggers=[], global_step=0, save_checkpoint=lambda path: None)
    nobody = [0] * len(STOP_SIGNALS)
    due = []
    for step in (4, 5, 6):
        saver._read_sums(step, [1, *nobody])  # of two ranks, one says so
        due.append(saver._agreed_due)
        trainer.global_step = 5  # all of them write it at the end of step 5
        saver.save(trainer)
    assert due == [True, False, True]
    assert saver._agreed_signal == 0
