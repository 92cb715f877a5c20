"""The door: compose and check the configuration, then hand it to one mode. No torch before that.

Who owns what: this module owns exit codes and messages and the run folder's name; semseg/cli/sweep.py owns the jobs of
a sweep, and semseg/cli/supervise.py the processes of a run on several devices. A configuration error leaves before
anything is written.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from semseg.cli.supervise import (
    agree_on_run_dir,
    check_world_size,
    count_processes,
    get_external_rank,
    has_other_rank_failed,
    record_error,
    refuse_launcher,
    supervise_ranks,
)
from semseg.config.compose import CONFIG_DIR, compose_with_hydra, drop_hydra_section, read_unresolved
from semseg.config.explain import explain_hydra_error
from semseg.config.overrides import SWEEP_OPTIONS, parse_overrides, quote_value, select_overrides
from semseg.config.schema import PRINTING_MODES
from semseg.config.validate import check_config
from semseg.errors import INTERRUPTED, STOPPED_CODES, ConfigError, SemsegError
from semseg.storage import run_lock
from semseg.storage.atomic import (
    SCRIPT_VARIABLE,
    atomic_write,
    describe_write_error,
    entry_command,
    entry_script,
    relative_to_cwd,
)
from semseg.storage.run_results import find_finished_job, job_overrides
from semseg.storage.transfer import is_first_rank
from semseg.system.process import announce_sweep, prepare_process
from semseg.system.text import escape_lines

RECORD_FOLDER = ".hydra"  # in a run folder: the command line, for mode=rerun
NO_HYDRA_RECORD = "hydra.output_subdir=null"  # we write it ourselves

_log = logging.getLogger(__name__)

# Lightning's remarks on hardware, other products and its defaults; its warnings stay.
for chatty in (
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors.checkpoint_connector",
):
    logging.getLogger(chatty).setLevel(logging.WARNING)
# Its own use of a torch function that changes, layers that freeze_bn put into eval mode, and scores that are the same
# on every rank already: nothing to act on.
for harmless in (r".*LeafSpec.*", r"Found \d+ module\(s\) in eval mode", r"It is recommended to use `self\.log\('val/"):
    warnings.filterwarnings("ignore", message=harmless)


def main() -> None:
    """Run the command line in sys.argv; ends the process with 0, 1 (failure) or 2 (configuration)."""
    prepare_process()
    # Hydra prints errors its own way unless told to pass them on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if Path(sys.argv[0]).is_file():  # not so in python -c
        os.environ[SCRIPT_VARIABLE] = str(Path(sys.argv[0]).resolve())
    given = words = sys.argv[1:]
    try:
        sys.argv[1:] = words = parse_overrides(words)
        options = {word for word in words if word.startswith("-")}
        if options & set(SWEEP_OPTIONS):
            refuse_other_options(options)
            sys.exit(run_sweep(given, words))
        if not options:
            composed = compose_with_hydra(words)
            config = check_config(drop_hydra_section(composed))  # before anything is written
            refuse_search_settings(composed)
            if config.mode in PRINTING_MODES:
                importlib.import_module(f"semseg.modes.{config.mode}").run(config, words)
                sys.exit(0)
            check_world_size(config)
            run_dir = resolve_run_dir(composed)
            processes = count_processes(config)
            if processes > 1:
                sys.exit(run_ranks(words, processes, run_dir))
            sys.argv[1:] += [f"hydra.run.dir={quote_value(run_dir)}", NO_HYDRA_RECORD]
        elif not {"-sc", "--shell-completion"} & options:
            compose_with_hydra(select_overrides(words))
        start_hydra()
    except SemsegError as error:
        record_error(error, error.exit_code)
        exit_with_error(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        exit_with_error(explain_hydra_error(error, words), ConfigError.exit_code)
    except KeyboardInterrupt:
        exit_with_error("interrupted.", INTERRUPTED)
    except OSError as error:
        told = describe_write_error(error, Path.cwd())
        if told is None:
            raise
        exit_with_error(told, SemsegError.exit_code)


def refuse_other_options(options: set[str]) -> None:
    """A sweep runs; it does not show configurations as well.

    Raises:
        ConfigError: if there is any other option.
    """
    further = sorted(options - set(SWEEP_OPTIONS))
    if further:
        raise ConfigError(f"{further[0]} and -m: a sweep takes no other option.")


def start_hydra() -> None:
    """Hand the words in sys.argv over to Hydra."""
    hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(run_hydra_job)()


def run_sweep(given: list[str], words: list[str]) -> int:
    """Run the sweep in sys.argv to its end, then print and write its table; returns the exit code.

    Args:
        given: the command line as it was typed, for the command that goes on with the sweep.
        words: the same as Hydra wants it.
    """
    refuse_launcher("a sweep (-m)")
    composed = compose_with_hydra(select_overrides(words), sweep=True)
    sweep_dir = resolve_sweep_dir(composed)
    sys.argv[1:] += [f"hydra.sweep.dir={quote_value(sweep_dir)}", NO_HYDRA_RECORD]  # its jobs write theirs
    # For launchers whose jobs begin as a process that knows nothing but the name of our function.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CONFIG_DIR.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    stopped = 0
    announce_sweep()
    try:
        start_hydra()
    except KeyboardInterrupt:
        stopped = INTERRUPTED
    except SystemExit as asked:  # by a signal, which the job had passed on
        stopped = int(asked.code or 0)
    except (SemsegError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:  # of a launcher that lost a job, say; the table tells what became of the others
        stopped = 1
        told = describe_write_error(error, sweep_dir) if isinstance(error, OSError) else None
        if told is not None:
            exit_with_error(told, SemsegError.exit_code)
        if "No trials are completed" not in str(error):  # Optuna, when every job failed
            traceback.print_exc()
    again = [word for word in given if word.partition("=")[0] not in ("sweep_dir", "hydra.sweep.dir")]
    command = shlex.join([*entry_command().split(), *again, f"sweep_dir={relative_to_cwd(sweep_dir)}"])
    from semseg.cli.sweep import report_sweep  # noqa: PLC0415 - tables and pages take time to import, and most runs need none

    code = report_sweep(sweep_dir, command)
    return stopped or code


def resolve_run_dir(composed: DictConfig) -> Path:
    """The run folder: for this run alone if its name has the time in it, and the same for all ranks of a run.

    Raises:
        ConfigError: if it cannot be made.
    """
    run_dir = Path(str(composed.hydra.run.dir)).absolute()
    is_new = read_unresolved(composed.hydra.run, "dir") == "${run_dir}" and "${now:" in read_unresolved(
        composed, "run_dir"
    )
    rank = get_external_rank()
    if not is_new:
        return run_dir
    if rank is None:
        return claim_folder(run_dir)
    mine = claim_folder(run_dir) if rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ else run_dir
    return Path(agree_on_run_dir(str(mine), rank))


def resolve_sweep_dir(composed: DictConfig) -> Path:
    """The folder of a sweep: for this sweep alone if its name has the time in it.

    Raises:
        ConfigError: if it cannot be made.
    """
    sweep_dir = Path(str(composed.hydra.sweep.dir)).absolute()
    return claim_folder(sweep_dir) if "${now:" in read_unresolved(composed.hydra.sweep, "dir") else sweep_dir


def refuse_search_settings(composed: DictConfig) -> None:
    """Settings of a sweep mean nothing to a single run.

    Raises:
        ConfigError: if there are any.
    """
    search = composed.hydra.runtime.choices.get("hparams_search")
    if search is not None:
        raise ConfigError(f"hparams_search={search}: is for sweeps. Add -m.")


def claim_folder(folder: Path) -> Path:
    """Make `folder`, or <folder>_2, <folder>_3, ... if another run was faster in the same second.

    Raises:
        ConfigError: if it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            free = folder if number == 1 else folder.with_name(f"{folder.name}_{number}")
            with contextlib.suppress(FileExistsError):
                free.mkdir()  # by one process alone, however many try
                return free
    except OSError as error:
        raise ConfigError(
            f"{folder}: this run folder cannot be made ({error.strerror}). See run_dir, runs_dir."
        ) from None
    raise AssertionError("numbers do not end")


def run_ranks(words: list[str], processes: int, run_dir: Path) -> int:
    """Run this command line as one process per device, all with the same run folder."""
    command = [sys.executable, str(entry_script()), *words, f"hydra.run.dir={quote_value(run_dir)}"]
    return supervise_ranks(command, processes, run_dir)


def exit_with_error(message: str, exit_code: int) -> NoReturn:
    """Print one error message and end the process."""
    sys.stdout.flush()
    message = escape_lines(message)
    print(message if exit_code in STOPPED_CODES else f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def run_hydra_job(composed: DictConfig) -> float | None:
    """One job: the mode's `run` in this process, or in its own process if it is part of a sweep."""
    runtime = HydraConfig.get()
    if runtime.mode == RunMode.MULTIRUN:
        overrides, run_dir = job_overrides(runtime.overrides.task), Path(runtime.runtime.output_dir)
        return run_sweep_job(overrides, run_dir, scores=composed.mode == "train")
    run_dir = Path(runtime.runtime.output_dir)
    is_recorded = runtime.output_subdir is None and is_first_rank()
    record = collect_run_record(composed, runtime, run_dir) if is_recorded else {}
    with open_dict(composed):
        # In the process of another rank, or of a job of a sweep, ${now:} would name another folder.
        composed.run_dir = runtime.runtime.output_dir
    try:
        config = check_config(composed)
        mode = importlib.import_module(f"semseg.modes.{config.mode}")
        # One line, without the place in the code. Lightning sets a form of its own when it is imported.
        warnings.formatwarning = lambda message, *_, **__: f"warning: {escape_lines(message)}\n"
        with silence_stdout(config.quiet):
            if config.mode == "train":  # not before the folder is known to be its own
                run_lock.on_lock_acquired = partial(write_run_record, record)
            else:
                write_run_record(record)
            return mode.run(config, list(runtime.overrides.task))
    except SemsegError as error:
        record_error(error, error.exit_code)
        exit_with_error(str(error), error.exit_code)  # here, or Hydra puts a line of its own before it
    except Exception as error:
        record_error(error, 1)
        told = describe_write_error(error, run_dir) if isinstance(error, OSError) else None
        if told is None and has_other_rank_failed():
            sys.exit(1)  # a lost connection, say: its traceback, kept in this rank's file, would bury the reason
        if told is None:
            raise
        exit_with_error(told, SemsegError.exit_code)


def collect_run_record(composed: DictConfig, runtime: HydraConf, folder: Path) -> dict[Path, str]:
    """The files in which Hydra keeps the command line of a run, with their contents.

    Hydra writes over those that are there, without a lock, and leaves them empty on a full disk.
    """
    contents = {"config": composed, "hydra": {"hydra": runtime}, "overrides": runtime.overrides.task}
    return {
        folder / RECORD_FOLDER / f"{name}.yaml": OmegaConf.to_yaml(OmegaConf.create(it))
        for name, it in contents.items()
    }


def write_run_record(contents: dict[Path, str]) -> None:
    for path, text in contents.items():
        with atomic_write(path, durable=False) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def silence_stdout(is_quiet: bool) -> Iterator[None]:
    """Nothing goes to standard output, and of Lightning's log only warnings are told. Standard error stays."""
    if not is_quiet:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(before)


def run_sweep_job(overrides: list[str], run_dir: Path, *, scores: bool) -> float | None:
    """Run one job of a sweep by itself, unless it is finished, and return its score (None without one).

    So that jobs leave each other alone: their ranks, their memory, their crashes. `scores`: as of `run_job`.
    """
    from semseg.cli.sweep import run_job  # noqa: PLC0415 - as above

    done = find_finished_job(run_dir, overrides, scores=scores)
    if done is not None:
        _log.info("job %s: was finished before", run_dir.name)
        return done.result.score
    command = [sys.executable, str(entry_script()), *overrides]
    command += [f"{key}={quote_value(run_dir)}" for key in ("hydra.run.dir", "run_dir")]
    job = run_job(command, overrides, run_dir, scores=scores)
    _log.info("job %s: %s%s", run_dir.name, job.status, f": {job.reason}" if job.reason else "")
    return job.result.score
