"""Every command in README.md and docs/ is valid, and runs unless a comment `# needs ...` beside it names what it needs.

A comment stands behind its command, or on a line of its own above all commands up to the next empty line. The needs
that a configuration shows (the network, ADE20K, GPUs, several machines) must be named. Commands without any are run in
this process, with words behind them that make them small.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import cv2
import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from PIL import Image

from helpers.command_line import RUN, TINY_ENCODERS, run_here
from helpers.composition import compose_quickly
from helpers.fork_server import run_python
from helpers.in_process import TINY_RUN, configured, fit
from semseg.config.compose import compose_with_hydra, drop_hydra_section
from semseg.config.overrides import SWEEP_OPTIONS, parse_overrides, select_overrides
from semseg.config.schema import Config
from semseg.config.validate import check_config
from semseg.errors import ConfigError, SemsegError
from semseg.nets.registry import ENCODERS

pytestmark = pytest.mark.reliability
ROOT = RUN.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = r"(?:torchrun|srun)\b.*?\brun\.py|(?:srun )?python (?:run|my_\w+)\.py"
# Programs of pages and the tests that run them; commands that take long, by their words, and the tests that run such.
TESTED_ELSEWHERE = {
    "python my_": "documentation/test_extending.py",
    "experiment=quickstart": "documentation/test_newcomer.py",
    "mode=doctor": "documentation/test_newcomer.py",
    "mode=models": "modes/test_printing_modes.py",
    "mode=bench": "modes/test_bench.py",
    "data.resize=native": "training/test_native_resolution.py",
    "mode=export": "export/test_onnx.py",
    "mode=serve": "serving/test_server.py",
    "ckpt=model.onnx": "export/test_onnx.py",
    "mode=import": "modes/test_import_mode.py",
    "data.root=pets": "modes/test_import_mode.py",
    "data.root=beside": "modes/test_import_mode.py",
    "predict.save=[coco]": "modes/test_import_mode.py",
    "predict.save=[label_studio]": "modes/test_import_mode.py",
}
SMALL = {
    "eval": ["eval.scales=[32]", "trainer=cpu", "data.num_workers=0"],
    "predict": ["predict.scales=[32]", "trainer=cpu"],
    "check": ["data.num_workers=0"],
}


# The programs of docs/extending.md.
PROGRAMS = dict(
    re.findall(
        r"^`(\w+\.py)`\n\n```python\n(.*?)^```",
        (ROOT / "docs" / "extending.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )
)
# What a comment says about each need.
NAMES = {"ADE20K": "ADE20K", "the network": "network", "a GPU": "GPU", "several machines": "machines|SLURM"}


class Command(NamedTuple):
    """A command line of a page."""

    page: str
    line: int
    text: str  # without the comment
    needs: str  # the comments `# needs ...` that belong to it
    is_output: bool  # printed by another command
    error: str  # what the page says it prints, if it is an example of a mistake

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    def words(self) -> tuple[str, ...]:
        """The command line behind the program."""
        return tuple(shlex.split(re.sub(rf"^(?:{LAUNCHERS})", "", self.text)))

    def find_other_test(self) -> str | None:
        return next((test for key, test in TESTED_ELSEWHERE.items() if key in self.text), None)


def list_code_blocks(text: str) -> Iterator[list[tuple[int, str]]]:
    """The code of a page, indented or fenced with `bash`, up to each empty line: line numbers and joined lines."""
    block: list[tuple[int, str]] = []
    fence = ""
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        is_code = bool(line) and (fence == "bash" if fence else line.startswith("    "))
        if match := re.match(r"```(\w*)", line):
            fence, is_code = ("" if fence else match[1] or "text"), False
        if is_code:
            if block and block[-1][1].endswith("\\"):
                block[-1] = (block[-1][0], block[-1][1].removesuffix("\\") + line.strip())
            else:
                block.append((number, line.strip()))
        elif block:
            yield block
            block = []
    yield block


def list_commands(page: Path) -> Iterator[Command]:
    """The commands that start a program of Python or `run.py`, in blocks of code and in the text."""
    text = page.read_text()
    for block in list_code_blocks(text):
        block_needs = ""
        for index, (number, line) in enumerate(block):
            if comment := re.match(r"# needs (.*)", line):
                block_needs += f" {comment[1]}"
            match = re.search(rf"(?:{LAUNCHERS}).*", line)
            if match is None or "<Tab>" in line or line.startswith("eval "):
                continue
            command, _, comment = re.sub(r"\s+#(?= )", "\0", match[0], count=1).partition("\0")
            named = re.search(r"needs (.*)", comment)
            following = block[index + 1][1] if index + 1 < len(block) else ""
            yield Command(
                page.name,
                number,
                command.strip(),
                f"{block_needs} {named[1] if named else ''}".strip(),
                is_output=bool(match.start()) and not line.startswith("$ "),
                error=following.removeprefix("error: ") if line.startswith("$ ") else "",
            )
    for match in re.finditer(r"`((?:python run\.py|semseg) [^`]+)`", text):
        command = " ".join(match[1].split())
        if "..." not in command:
            yield Command(page.name, text[: match.start()].count("\n") + 1, command, "", is_output=True, error="")


COMMANDS = [command for page in PAGES if page.name != "configuration.md" for command in list_commands(page)]


def write_option_files(command: Command, folder: Path) -> None:
    """Write the files that a command chooses as options of groups (`data=mine.yaml`)."""
    for word in command.words():
        key, _, name = word.partition("=")
        if key != "output" and name.endswith(".yaml"):
            is_recipe = key == "experiment"  # as mode=check writes it
            (folder / name).write_text("defaults: [override /data: folder]" if is_recipe else "{}")


@cache
def check_command_line(words: tuple[str, ...]) -> Config | None:
    """The configuration of a command line, read as the program reads it; of a sweep, that of its first job."""
    overrides = parse_overrides(list(words))
    selected = select_overrides(overrides)
    if "--help" in overrides:
        return None
    if not set(SWEEP_OPTIONS) & set(overrides):
        return check_config(compose_quickly(tuple(selected)))
    compose_with_hydra(selected, sweep=True)
    parsed = OverridesParser.create().parse_overrides(selected)
    job = [
        f"{override.key_or_group}={next(override.sweep_string_iterator())}"
        if override.is_sweep_override()
        else str(override.input_line)
        for override in parsed
        if not str(override.input_line).startswith(("hydra", "hparams_search", "sweep_dir"))
    ]
    return check_config(drop_hydra_section(compose_with_hydra(job)))


def compose_command(command: Command, folder: Path) -> Config | None:
    """The configuration of a command; None for --help and for programs of a page, which compose it themselves.

    Raises:
        SemsegError, HydraException: if it is not a valid command line.
    """
    program = re.match(r"python (my_\w+\.py)", command.text)
    if program is None:
        return check_command_line(command.words())
    (folder / program[1]).write_text(PROGRAMS[program[1]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = run_python(program[1], *command.words(), "--cfg", "job", cwd=folder, env=environment)
    if result.returncode != 0:
        raise ConfigError(result.stdout)
    return None


def list_needs(command: Command, config: Config | None) -> Iterator[str]:
    """What the machine must have for a command, as far as its configuration shows it."""
    if config is None:
        if "mode=" not in command.text and "--help" not in command.text:
            yield "ADE20K"
        return
    start = f"{config.ckpt} {config.init_from}"
    trains = config.mode == "train"
    if trains and config.data.name == "ade20k":
        yield "ADE20K"
    elif (
        config.mode == "download"
        or "zoo:" in start
        or (trains and config.model.encoder.get("weights") == "imagenet" and config.ckpt is None)
    ):
        yield "the network"
    devices = str(config.trainer.devices)
    if "srun" in command.text or config.trainer.num_nodes > 1 or "submitit" in command.text:
        yield "several machines"
    elif config.trainer.accelerator == "gpu" or (config.trainer.accelerator == "auto" and devices not in ("auto", "1")):
        yield "a GPU"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_i7_commands_of_a_page_are_valid_and_name_what_they_need(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    problems = []
    for command in COMMANDS:
        if command.page != page or command.error:
            continue
        try:
            write_option_files(command, tmp_path)
            config = compose_command(command, tmp_path)
        except (SemsegError, HydraException) as error:
            problems.append(f"{command}\n    is not a valid command: {error}")
            continue
        missing = [
            need
            for need in list_needs(command, config)
            if not command.is_output and not re.search(NAMES[need], command.needs)
        ]
        if missing:
            problems.append(
                f"{command}\n    add the comment `# needs {' and '.join(missing)}` to it, or above its block"
            )
    assert not problems, "\n".join(problems)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with everything that the pages name: photographs, masks and class tables, a film, runs, evaluations."""
    folder = tmp_path_factory.mktemp("commands")
    data = ["data=scenes", "data.make.num_train=2", "data.make.num_val=2", f"data.root={folder / 'scenes'}"]
    test = ["data.test.images=images/validation", "data.test.masks=annotations/validation"]
    run_dir = folder / "runs" / "2026-11-23_10-00-00_train"
    fit(configured(*data, *TINY_RUN, *test, "data.steps_per_epoch=1", "trainer.max_epochs=1", f"run_dir={run_dir}"))
    shutil.copytree(folder / "scenes/images/validation", folder / "photos")
    photo = next((folder / "photos").iterdir())
    shutil.copy(photo, folder / "photo.jpg")
    pixels = np.asarray(Image.open(photo).resize((64, 48)))
    film = cv2.VideoWriter(str(folder / "film.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    film.write(pixels)
    film.release()
    make_data(folder, "my_data", 5)
    make_data(folder, "facades", 7)
    make_data(folder, "street", 11, images="pictures", masks="labels")
    with patch.dict(ENCODERS, TINY_ENCODERS):
        for name in ("a", "b"):
            run_here(folder, "mode=eval", f"ckpt={run_dir}", f"run_dir=runs/{name}/eval", *SMALL["eval"])
        for name in ("runs/mine", "facades_run"):
            shutil.copytree(run_dir, folder / name)
        run_dir.touch()
        yield folder


def make_data(folder: Path, name: str, num_classes: int, *, images: str = "images", masks: str = "masks") -> None:
    """A data set of drawn scenes with ids from 0 to `num_classes`, and class tables: of my_data, 0 is a class too."""
    shutil.copytree(folder / "scenes" / "images", folder / name / images)
    shutil.copytree(folder / "scenes" / "annotations", folder / name / masks)
    for path in (folder / name / masks).rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)).clip(max=num_classes)).save(path)
    names = [f"class {index}" for index in range(num_classes + (name == "my_data"))]
    (folder / name / "classes.txt").write_text("\n".join(names))
    rows = "".join(f"{index},{each},{index},0,0\n" for index, each in enumerate(names))
    (folder / name / "classes.csv").write_text(f"index,name,R,G,B\n{rows}")


CHEAP = list(
    {
        command.text: command
        for command in COMMANDS
        if not (command.needs or command.is_output or command.find_other_test())
    }.values()
)


@pytest.mark.slow
@pytest.mark.parametrize("command", CHEAP, ids=str)
def test_i7_a_command_without_needs_runs(folder: Path, command: Command) -> None:
    mode = re.search(r"mode=(\w+)", command.text)
    words = [*command.words(), *SMALL.get(mode[1] if mode else "", [])]
    if command.error:
        assert command.error in run_here(folder, *words, code=2)
        return
    is_incomplete = "mode=check" in words and not re.search(r"data\.(num_)?classes=", command.text)
    printed = run_here(folder, *words, code=1 if is_incomplete else 0)
    assert "NOT READY" in printed if is_incomplete else printed


def test_i7_tests_that_run_a_program_or_a_slow_command_exist() -> None:
    used = {key for key in TESTED_ELSEWHERE for command in COMMANDS if key in command.text}
    assert used == set(TESTED_ELSEWHERE)
    for test in TESTED_ELSEWHERE.values():
        assert (ROOT / "tests" / test).is_file(), test


def test_i7_extras_and_targets_of_make_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"(?<=^    make )[\w-]+|(?<=`make )[\w-]+", text, re.MULTILINE)) <= set(targets), page
        assert set(re.findall(r"[.g]\[(\w+)\](?=[\"`'])", text)) <= set(extras), page
        assert not re.search(r"install '?\"?semseg\[", text), f'{page}: the extras of a clone are ".[export]"'
