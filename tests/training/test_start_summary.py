"""The start of a run: at most 15 lines before the first step, none of them from a library."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.command_line import TINY, TINY_NETWORK, run, run_here
from helpers.in_process import configured
from semseg.modes.train_summary import describe_unreached
from semseg.training.start_summary import MAX_SUMMARY_LINES, abbreviate_path, format_start, shorten_list, wrap_words

MAX_LINES = 15
LABELS = ("network", "weights", "data", "classes", "batch", "training", "automatic", "run folder", "given")
# Our warnings about the drawn images of these runs, after the first epoch.
KNOWN = ("did not occur in this epoch", "of the predictions are")


def lines_before_training(printed: str) -> list[str]:
    """The lines of a training before its first step is reported."""
    lines = printed.splitlines()
    return lines[: next(number for number, line in enumerate(lines) if line.startswith("epoch "))]


def labels_of(lines: list[str]) -> list[str]:
    """The labels of a summary in their order."""
    return [label for line in lines if (label := line[:12].strip())]


@pytest.mark.slow
def test_two_ranks_print_one_start_and_no_line_of_a_library_also_on_a_resume(tmp_path: Path) -> None:
    # More workers than there are processors, one more epoch than before, fewer steps than between two rows of the log.
    words = [
        *TINY,
        *TINY_NETWORK,
        "trainer=ddp_cpu",
        "trainer.devices=2",
        "data.num_workers=3",
        "run_dir=run",
        "callbacks=early_stopping",
    ]
    first = run(tmp_path, *words)
    second = run(tmp_path, *words, "trainer.max_epochs=2")
    for printed, weights in (
        (first, "a new run: random"),
        (second, "resuming from run/checkpoints/last.ckpt at step 2 of 4"),
    ):
        start = [line for line in lines_before_training(printed) if not line.startswith("the schedule ends at step ")]
        assert labels_of(start) == list(LABELS) and len(start) <= MAX_LINES - 1, printed
        assert f"weights     {weights}" in start
        foreign = [
            line for line in printed.splitlines() if "arning" in line and not any(part in line for part in KNOWN)
        ]
        assert not foreign, printed


def test_many_classes_a_long_map_and_long_paths_are_shortened(tmp_path: Path) -> None:
    root = tmp_path.joinpath(*["a folder with a long name"] * 5)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(4):
        pixels = draw.integers(0, 182, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(pixels[..., 0]).save(root / "masks" / f"{number}.png")
    ids = ",".join(f"{raw_id}:{raw_id if raw_id < 171 else 'null'}" for raw_id in range(182))
    words = [word for word in TINY if not word.startswith(("data=", "data.make", "data.root="))]
    words += [
        "data=folder",
        f"data.root={root}",
        "data.classes=cocostuff",
        f"data.map={{{ids}}}",
        "data.val_fraction=0.3",
    ]
    printed = run_here(tmp_path, *words, *TINY_NETWORK, "run_dir=run", "data.on_bad=skip")
    start = lines_before_training(printed)
    assert labels_of(start) == list(LABELS) and len(start) <= MAX_LINES, printed
    (classes,) = (line for line in start if line.startswith("classes"))
    assert (
        re.fullmatch(r"classes     171: 0 \w+, .*, \.\.\.; not scored: 171, 172, .*", classes) and len(classes) <= 120
    )
    (data,) = (line for line in start if line.startswith("data "))
    assert len(data) <= 120 and "/.../" in data and data.endswith("a folder with a long name")


@pytest.mark.slow
def test_verbose_prints_the_whole_configuration_too(tmp_path: Path) -> None:
    quiet = run_here(tmp_path, *TINY, *TINY_NETWORK, "run_dir=quiet")
    verbose = run_here(tmp_path, *TINY, *TINY_NETWORK, "run_dir=verbose", "verbose=true")
    assert "momentum=0.9" in verbose and "momentum" not in quiet
    assert "run folder  quiet" in quiet and "run_dir=quiet" not in "".join(lines_before_training(quiet))
    assert len(lines_before_training(quiet)) <= MAX_LINES < len(lines_before_training(verbose))
    assert "momentum: 0.9" in (tmp_path / "quiet" / "config.yaml").read_text()
    assert "GFLOPs" in (tmp_path / "quiet" / "model.txt").read_text()
    assert "quiet=true and verbose=true" in run_here(tmp_path, *TINY, "quiet=true", "verbose=true", code=2)


def test_what_was_given_takes_a_few_lines_and_can_be_copied() -> None:
    lines = format_start({"network": "x", "nothing": ""}, ["data.short_edges=[64]", "optim.lr=0.5"], 80)
    assert [line.plain for line in lines] == ["network     x", "given       'data.short_edges=[64]' optim.lr=0.5"]
    many = format_start({"network": "x"}, [f"callbacks.x.number_{number}=1" for number in range(100)], 80)
    assert len(many) == MAX_SUMMARY_LINES and many[-1].plain == "            ... and 75 more in config.yaml"


def test_a_narrow_terminal_gets_wrapped_rows_and_fewer_overrides() -> None:
    rows = {"batch": "2 images on each of 8 devices, short edges 300/375, long edges up to 1000", "run folder": "a, b"}
    lines = [line.plain for line in format_start(rows, ["a=1"] * 100, 50)]
    assert lines[:4] == [
        "batch       2 images on each of 8 devices,", "            short edges 300/375,",
        "            long edges up to 1000", "run folder  a, b",
    ]  # fmt: skip
    assert len(lines) == MAX_SUMMARY_LINES and all(len(line) <= 50 for line in lines)
    full = {f"row {number}": "a phrase, " * 10 + "the end" for number in range(8)}
    assert format_start(full, ["a=1"] * 100, 50)[-1].plain == "given       ... and 100 more in config.yaml"


def test_lists_and_paths_are_shortened_to_a_width() -> None:
    assert shorten_list(["sky", "tree", "road"], 14) == "sky, tree, ..."
    assert shorten_list(["sky", "tree", "road"], 15) == "sky, tree, road"
    assert shorten_list(["a class with a long name", "b"], 5) == "a class with a long name, ..." and not shorten_list(
        [], 5
    )
    assert abbreviate_path("/data/projects/2026/facades/rectified", 30) == "/data/.../facades/rectified"
    assert abbreviate_path("data/a/scenes", 5) == ".../scenes"
    assert abbreviate_path("data/2026/facades/rectified", 24) == "data/.../rectified"
    assert abbreviate_path("scenes", 5) == "scenes"
    assert wrap_words(["a" * 30, "b"], 10) == ["a" * 30, "b"]


@pytest.mark.slow
def test_a_resumed_run_reports_another_way_of_scoring(tmp_path: Path) -> None:
    """best.ckpt is chosen by the scores before and after."""
    words = [*TINY, *TINY_NETWORK, "run_dir=run", "data.steps_per_epoch=1"]
    run_here(tmp_path, *words)
    changed = ["eval.scales=[48]", "eval.flip=true", "data.miou_rule=ground_truth"]
    printed = run_here(tmp_path, *words, "trainer.max_epochs=2", *changed)
    assert (
        "warning: eval.scales: [32] in the checkpoint, [48] now; eval.flip: False in the checkpoint, True now; "
        "data.miou_rule: present in the checkpoint, ground_truth now. Scores before and after are not comparable"
    ) in printed


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        ([], []),
        (["ema.decay=0.9", "ema.start_step=99"], []),
        (["ema.decay=0.9", "ema.start_step=100"], ["none of them averaged: ema.start_step=100"]),
        (["schedule=poly_warmup", "schedule.warmup_steps=200"], ["all of them warm-up: schedule.warmup_steps=200"]),
    ],
)
def test_settings_that_start_after_the_last_step_are_named(words: list[str], notes: list[str]) -> None:
    assert list(describe_unreached(configured(*words), 100)) == notes
