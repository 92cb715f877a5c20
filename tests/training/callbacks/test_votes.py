"""The exchange of numbers between ranks in a step; tests/distributed/test_two_ranks.py has two ranks do it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from helpers.in_process import configured
from semseg.system.process import STOP_SIGNALS
from semseg.training.callbacks.saver import Saver
from semseg.training.callbacks.votes import Question, StepVote


def test_every_question_hears_the_sums_of_its_own_answers() -> None:
    vote, heard = StepVote(), []
    for name, answers in (("first", [3, 0]), ("second", [0, 0, 5])):
        question = Question(
            len(answers), lambda answers=answers: answers, lambda *sums, name=name: heard.append((name, *sums))
        )
        vote.ask(question)
    row = vote.collect(torch.ones((), dtype=torch.float64))
    assert row.dtype == torch.float64 and row.tolist() == [3, 0, 0, 0, 5] and vote.num_answers == 5
    vote.announce(7, (2 * row).tolist())
    assert heard == [("first", 7, [6, 0]), ("second", 7, [0, 0, 10])]


def test_a_checkpoint_that_was_due_before_the_last_one_was_written_is_not_written_again(tmp_path: Path) -> None:
    saver = Saver(tmp_path, configured("data=scenes").checkpoint, StepVote())
    trainer: Any = SimpleNamespace(loggers=[], global_step=0, save_checkpoint=lambda path: None)
    nobody = [0] * len(STOP_SIGNALS)
    due = []
    for step in (4, 5, 6):
        saver._hear_sums(step, [1, *nobody])  # of two ranks, one says so
        due.append(saver._heard_due)
        trainer.global_step = 5  # all of them write it at the end of step 5
        saver.save(trainer)
    assert due == [True, False, True]
    assert saver._heard_signal == 0
