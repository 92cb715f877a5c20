"""Commands and paths for users to copy: as short as they can be, and as this program was started. No torch."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from omegaconf import OmegaConf

from semseg.config.choice_files import is_choice_file

RUN_FILE = Path(__file__).resolve().parents[2] / "run.py"  # in a clone; a wheel has none

# Environment variables: the processes of ranks and jobs start the same file, and print the command of the first one.
SCRIPT_VARIABLE, PROGRAM_VARIABLE = "SEMSEG_SCRIPT", "SEMSEG_PROGRAM"


def remember_program() -> None:
    """Keep how this program was started in the environment, also for the processes that it starts."""
    if Path(sys.argv[0]).is_file():  # false in python -c
        os.environ[SCRIPT_VARIABLE] = str(Path(sys.argv[0]).resolve())
        os.environ.setdefault(PROGRAM_VARIABLE, describe_program(sys.argv[0], sys.orig_argv))


def describe_program(script: str, typed: list[str]) -> str:
    """The words that start a script, as they were typed: `python3 ../semseg/run.py`, or `semseg` if it is on the PATH.

    Args:
        script: sys.argv[0].
        typed: sys.orig_argv, the interpreter and its arguments.

    >>> describe_program("run.py", ["python3", "run.py", "mode=data"])
    'python3 run.py'
    """
    path = Path(script)
    if path.suffix == ".py":
        interpreter = typed[0] if script in typed[1:] else "python"
        return shlex.join([shorten_path(interpreter), shorten_path(script)])
    found = shutil.which(path.name)
    return shlex.quote(path.name if found and Path(found).resolve() == path.resolve() else shorten_path(script))


def entry_script() -> Path:
    """The file that this command was started with: run.py, or a program that adds networks and calls `main.main`."""
    return Path(os.environ.get(SCRIPT_VARIABLE, RUN_FILE))


def entry_command() -> str:
    """How to start this program, for commands to copy: "python run.py", or "semseg" if it is installed."""
    return os.environ.get(PROGRAM_VARIABLE, "python run.py" if os.path.isfile(RUN_FILE) else "semseg")  # noqa: PTH113


# For the page of --help.
OmegaConf.register_new_resolver("entry_command", entry_command, replace=True)


def format_command(overrides: Iterable[str]) -> str:
    """The command line with these overrides, in one line for a shell."""
    return " ".join([entry_command(), *map(shlex.quote, shorten_overrides(overrides))])


def list_this_command() -> list[str]:
    """The words of the command line of this process, without what this program has added."""
    own = ("hydra.run.dir=", "hydra.output_subdir=")
    words = [word for word in sys.argv[1:] if not word.startswith(own)]
    return [*shlex.split(entry_command()), *shorten_overrides(words)]


def shorten_overrides(overrides: Iterable[str]) -> list[str]:
    """Overrides with the paths of files that are options of groups as short as possible."""
    words = []
    for word in overrides:
        group, _, value = word.partition("=")
        path = value.strip("\"'")
        words.append(f"{group}={shorten_path(path)}" if is_choice_file(group, path) else word)
    return words


def shorten_path(path: str) -> str:
    """The path relative to the working directory if that is shorter."""
    relative = os.path.relpath(path) if os.path.isabs(path) else path  # noqa: PTH117
    return relative if len(relative) < len(path) else path


def relative_to_cwd(path: Path) -> Path:
    """`path` relative to the working directory if that is shorter."""
    return Path(shorten_path(str(path)))
