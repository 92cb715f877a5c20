"""Run a mode of the command line in this process. No torch before the configuration is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from semseg.api.isolation import keep_process_state
from semseg.api.keywords import list_words
from semseg.api.results import CHECK_FILE, DataCheck
from semseg.cli.main import check_start, collect_run_record, compose_run, create_run_folder, run_mode, run_ranks
from semseg.cli.supervise import check_world_size
from semseg.config.explain import explain_hydra_error
from semseg.config.overrides import parse_overrides
from semseg.config.schema import Config
from semseg.errors import ConfigError, DataError, SemsegError
from semseg.storage.atomic import describe_write_error
from semseg.storage.commands import entry_script
from semseg.storage.ranks import is_first_rank
from semseg.storage.run_results import read_result


class FinishedRun(NamedTuple):
    """A run that has ended without an error."""

    folder: Path  # absolute
    score: float | None


def run_in_process(
    mode: str,
    overrides: Sequence[str],
    keywords: Mapping[str, Any],
    on_start: Callable[[Path], object] = lambda folder: None,
) -> FinishedRun:
    """Run a mode with the configuration of `overrides` and `keywords`; the process stays as it was.

    Several devices need a process each, which are started as the command line starts them.

    Args:
        on_start: called with the run folder before anything is written.

    Raises:
        SemsegError: for any error that the user can fix.
        KeyboardInterrupt: after Ctrl-C.
    """
    given = list_words(overrides, keywords)
    other = next((word for word in given if word.lstrip("+").startswith("mode=")), None)
    if other is not None and other.partition("=")[2].strip("\"'") != mode:
        raise ConfigError(f"{other}: this call is mode={mode}. Leave it out.")
    words = [f"mode={mode}", *given]
    parsed = parse_overrides(words)
    try:
        composed, config = compose_run(parsed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_hydra_error(error, parsed)) from error
    check_world_size(config)
    processes = check_start(config, parsed)
    try:
        with create_run_folder(composed) as folder, keep_process_state(words):
            on_start(folder)
            if processes > 1:
                return FinishedRun(folder, start_ranks(config, parsed, processes, folder))
            config.run_dir = str(folder)
            record = collect_run_record(composed, composed.hydra, folder) if is_first_rank() else {}
            return FinishedRun(folder, run_mode(config, parsed, record))
    except OSError as error:
        message = describe_write_error(error, Path(config.run_dir))
        if message is None:
            raise
        raise SemsegError(message) from error
    except SystemExit as leaving:  # by Lightning, after a second Ctrl-C; it would end the caller's program
        raise KeyboardInterrupt from leaving


def check_data(overrides: Sequence[str], keywords: Mapping[str, Any]) -> DataCheck:
    """Run mode=check; a data set that is not ready is a result, and no error.

    Raises:
        SemsegError: if there is nothing that could be checked.
    """
    folders: list[Path] = []

    def forget_earlier(folder: Path) -> None:
        """Remove the result of an earlier check in the same folder, so that one that is there is of this check."""
        folders.append(folder)
        (folder / CHECK_FILE).unlink(missing_ok=True)

    try:
        return DataCheck(run_in_process("check", overrides, keywords, forget_earlier).folder)
    except DataError:
        if not folders or not (folders[0] / CHECK_FILE).is_file():
            raise
        return DataCheck(folders[0])


def start_ranks(config: Config, overrides: list[str], processes: int, folder: Path) -> float | None:
    """Run a process for each device; returns the score.

    Raises:
        SemsegError: if one of them fails, whose message is printed.
        ConfigError: if there is no program to start.
    """
    if not entry_script().is_file():
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}: several devices need the command line, "
            f"semseg mode={config.mode} ..."
        )
    code = run_ranks(overrides, processes, folder)
    if code:
        raise SemsegError(
            f"mode={config.mode} on {processes} devices ended with exit code {code}; see the output above."
        )
    result = read_result(folder)
    return None if result is None else result.score
