"""Entry point: compose and check the configuration, then hand it to one mode. Torch is not imported before that.

This module is responsible for exit codes, messages and the name of the run folder, semseg/cli/sweep.py for the jobs of
a sweep, and semseg/cli/supervise.py for the processes of a run on several devices. A configuration error ends the
process before anything is written.
"""

from __future__ import annotations

import contextlib
import importlib
import keyword
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import hydra
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from semseg.cli.foreign_messages import hide_foreign_messages
from semseg.cli.supervise import (
    PARALLEL_MODES,
    agree_on_run_dir,
    check_world_size,
    count_processes,
    get_external_rank,
    has_other_rank_failed,
    record_error,
    refuse_launcher,
    supervise_ranks,
)
from semseg.config.compose import compose_with_hydra, drop_hydra_section, read_unresolved
from semseg.config.explain import explain_hydra_error
from semseg.config.groups import CONFIG_DIR
from semseg.config.override_keys import override_key
from semseg.config.overrides import (
    RECORD_FOLDER,
    SWEEP_OPTIONS,
    parse_overrides,
    quote_value,
    record_overrides,
    select_overrides,
)
from semseg.config.schema import DEFAULT_RUN_DIR, PRINTING_MODES, RESULT_MODES, Config
from semseg.config.uses import (
    TRAINING_MODES,
    describe_training_words,
    refuse_idle_keys,
    refuse_unread_keys,
    refuse_unused_sizes,
)
from semseg.config.validate import check_config
from semseg.errors import INTERRUPTED, STOPPED_CODES, ConfigError, ReportedError, SemsegError, first_line
from semseg.storage import run_lock
from semseg.storage.atomic import atomic_write, describe_write_error, make_folder
from semseg.storage.commands import entry_script, format_command, relative_to_cwd, remember_program
from semseg.storage.ranks import is_first_rank, is_first_rank_of_machine, print_once
from semseg.storage.run_folders import (
    AVERAGE_FILE,
    CHECKPOINT_FOLDER,
    claim_folder,
    expand_path,
    find_checkpoint,
    find_foreign_file,
    find_run_folder,
    list_missing_folders,
    remove_unused_folders,
    require_folder_path,
)
from semseg.storage.run_results import find_finished_job, job_overrides
from semseg.system.memory import is_out_of_memory
from semseg.system.process import announce_sweep, is_supervised, is_sweep_job, prepare_process
from semseg.system.text import escape_lines

NO_HYDRA_RECORD = "hydra.output_subdir=null"  # the record is written here instead

_log = logging.getLogger(__name__)


def main() -> None:
    """Run the command line in sys.argv; ends the process with 0, 1 (failure) or 2 (configuration)."""
    prepare_process()
    hide_foreign_messages()
    # Makes Hydra raise errors instead of printing them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    remember_program()
    typed = overrides = sys.argv[1:]
    try:
        sys.argv[1:] = overrides = parse_overrides(typed)
        options = {argument for argument in overrides if argument.startswith("-")}
        if options & set(SWEEP_OPTIONS):
            refuse_other_options(options)
            sys.exit(run_sweep(typed, overrides))
        if not options:
            # Before anything is written.
            composed, config = compose_run(overrides, is_repeated="mode=rerun" in typed)
            if config.mode in PRINTING_MODES:
                import_mode(config.mode).run(config, overrides)
                sys.exit(0)
            check_world_size(config)
            if config.mode == "crossval":
                refuse_launcher("mode=crossval")
            run_in_folder(config, composed, overrides)
            return
        if not {"-sc", "--shell-completion"} & options:
            compose_with_hydra(select_overrides(overrides))
        start_hydra()
    except SemsegError as error:
        exit_with_problem(error)
    except (HydraException, OmegaConfBaseException) as error:
        exit_with_error(explain_hydra_error(error, overrides), ConfigError.exit_code)
    except KeyboardInterrupt:
        exit_with_error("interrupted.", INTERRUPTED)
    except OSError as error:
        message = describe_write_error(error, Path.cwd())
        if message is None:
            raise
        exit_with_error(message, SemsegError.exit_code)


def refuse_other_options(options: set[str]) -> None:
    """Refuse options that show something in the command line of a sweep.

    Raises:
        ConfigError: if there is any other option.
    """
    others = sorted(options - set(SWEEP_OPTIONS))
    if others:
        raise ConfigError(f"{others[0]} and -m: a sweep takes no other option.")


def compose_run(overrides: list[str], *, is_repeated: bool = False) -> tuple[DictConfig, Config]:
    """The configuration of a single run: as Hydra composes it, with Hydra's own settings, and checked.

    Args:
        is_repeated: by mode=rerun, which cannot leave out keys without effect that were accepted before.

    Raises:
        ConfigError: if a value is wrong, has no effect, or belongs to a sweep or another mode.
    """
    composed = compose_with_hydra(overrides)
    config = check_config(drop_hydra_section(composed))
    refuse_unused_sizes(config, overrides)
    is_own_rank = is_supervised() and "LOCAL_RANK" in os.environ  # whose words the first process has checked
    if not is_repeated and not is_own_rank:
        refuse_unread_keys(config.mode, overrides)
        if not is_sweep_job():  # others of its jobs may use them: -m optim=sgd,adamw optim.beta2=0.99
            refuse_idle_keys(config, overrides)
    refuse_search_settings(composed)
    return composed, config


def run_in_folder(config: Config, composed: DictConfig, overrides: list[str]) -> None:
    """Run one command line in its run folder; what it created is removed if nothing is written there in the end.

    Raises:
        SemsegError: for any error that the user can fix.
        SystemExit: at the end of several processes, or after an error that was printed.
    """
    processes = check_start(config, overrides)
    with create_run_folder(composed) as run_dir:
        try:
            make_folder(run_dir)
        except NotADirectoryError:  # a file system that takes no folders
            raise ConfigError(f"{run_dir}: this folder cannot be created. Set run_dir or runs_dir.") from None
        if config.mode == "crossval":
            from semseg.cli.crossval import run_folds  # noqa: PLC0415 - slow to import, and most runs need no folds

            with silence_stdout(config.quiet):
                code = run_folds(config, overrides, run_dir)
            sys.exit(code)
        if processes > 1:
            sys.exit(run_ranks(overrides, processes, run_dir))
        sys.argv[1:] += [f"hydra.run.dir={quote_value(run_dir)}", NO_HYDRA_RECORD]
        start_hydra()


def check_start(config: Config, overrides: list[str]) -> int:
    """Check what would otherwise fail in every process, or in a run folder; returns the processes to start.

    Raises:
        SemsegError: if the checkpoint, a GPU or data are missing, or `output` cannot be written.
    """
    if config.output:
        require_output_path(config.mode, expand_path(config.output).absolute())
    if config.ckpt in ("last", "best"):
        # Its error lists the runs, so before there is a new one.
        find_checkpoint(config.ckpt, expand_path(config.runs_dir))
    processes = count_processes(config)
    if processes > 1 and config.trainer.accelerator in ("gpu", "cuda"):
        from semseg.training.trainer import check_gpu_numbers  # noqa: PLC0415 - slow to import

        check_gpu_numbers(config.trainer)  # one error instead of one from every process
    if processes > 1 or get_external_rank() is not None:
        with leave_messages_to_one_rank():
            require_data(config, overrides)
    return processes


def require_output_path(mode: str, output: Path) -> None:
    """Check that `output` can be where its path says.

    Raises:
        ConfigError: if a file lies where a folder has to be, or a folder where the file has to be.
    """
    require_folder_path(output.parent, "output")
    if mode != "import" and output.suffix and output.is_dir():
        raise ConfigError(f"output={output}: is a folder. Give the name of a file.")


@contextlib.contextmanager
def create_run_folder(composed: DictConfig) -> Iterator[Path]:
    """The folder of a run; within this context it is in use, and afterwards it is removed if nothing is in it.

    Raises:
        ConfigError: if it cannot be created.
    """
    created: list[Path] = []
    try:
        yield resolve_run_dir(composed, created)
    finally:
        if get_external_rank() in (None, 0):  # the folder belongs to all ranks
            remove_unused_folders(created)


def require_data(config: Config, overrides: list[str]) -> None:
    """Report missing data once, before the process of every device imports torch and builds its network.

    A data set that is drawn at its first use is drawn here, by one process.

    Raises:
        SemsegError: if a folder, list or class table of a split that the mode reads does not exist; in mode=eval also
            if the network cannot be read, whose data set it is.
    """
    from semseg.data.sources import DataSource  # noqa: PLC0415 - slow to import, and only several devices need it

    if config.mode not in PARALLEL_MODES:
        return
    splits = ["train", "val"]
    if config.mode == "eval":
        from semseg.build import open_network  # noqa: PLC0415 - imports torch

        with silence_stdout(True):  # the first rank prints it again
            _, config = open_network(config, overrides)
        splits = [config.eval.split]
    source = DataSource(config.data)
    for split in splits:
        if split != "val" or source.has("val"):
            source.require_paths(split)


@contextlib.contextmanager
def leave_messages_to_one_rank() -> Iterator[None]:
    """Within this context, only one process on each machine prints an error, where a launcher has started several."""
    try:
        yield
    except SemsegError as error:
        if is_first_rank_of_machine():
            raise
        sys.exit(error.exit_code)


def start_hydra() -> None:
    """Run Hydra on the arguments in sys.argv."""
    GlobalHydra.instance().clear()  # a program that calls `main` may have used Hydra
    hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(run_hydra_job)()


def run_sweep(typed: list[str], overrides: list[str]) -> int:
    """Run the sweep in sys.argv to its end, then print and write its table; returns the exit code.

    Args:
        typed: the command line as it was typed, for the command that continues the sweep.
        overrides: the same in Hydra's grammar.
    """
    refuse_launcher("a sweep (-m)")
    given = next((word for word in overrides if override_key(word) in ("run_dir", "hydra.run.dir")), None)
    if given is not None:
        raise ConfigError(f"{given}: is of one run, and every job of a sweep has a folder of its own. Give sweep_dir.")
    composed = compose_with_hydra(select_overrides(overrides), sweep=True)
    sweep_dir = resolve_sweep_dir(composed)
    words = sorted(sys.argv[1:], key=lambda word: not word.startswith("-"))  # Hydra takes no option between overrides
    sys.argv[1:] = [*words, f"hydra.sweep.dir={quote_value(sweep_dir)}", NO_HYDRA_RECORD]  # each job has its own record
    # For launchers that start a new process and import our function by its name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CONFIG_DIR.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    stop_code = 0
    announce_sweep()
    try:
        start_hydra()
    except KeyboardInterrupt:
        stop_code = INTERRUPTED
    except SystemExit as request:  # after a signal, which was forwarded to the job
        stop_code = int(request.code or 0)
    except (SemsegError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:  # such as a launcher that lost a job; the table shows the status of the others
        stop_code = 1
        message = describe_write_error(error, sweep_dir) if isinstance(error, OSError) else None
        if message is not None:
            exit_with_error(message, SemsegError.exit_code)
        if "No trials are completed" not in str(error):  # raised by Optuna when every job failed
            traceback.print_exc()
    kept = [argument for argument in typed if argument.partition("=")[0] not in ("sweep_dir", "hydra.sweep.dir")]
    command = format_command([*kept, f"sweep_dir={relative_to_cwd(sweep_dir)}"])
    from semseg.cli.sweep import report_sweep  # noqa: PLC0415 - slow to import, and most runs need no sweep

    code = report_sweep(sweep_dir, command)
    return stop_code or code


def resolve_run_dir(composed: DictConfig, created: list[Path] | None = None) -> Path:
    """The run folder: new for this run if its name contains the time, and the same for all ranks of a run.

    Results of a network that a run of ours has trained are below that run: eval, eval-2, predict, ...

    Args:
        created: receives the folders that this command creates, the innermost first.

    Raises:
        ConfigError: if it cannot be created, or belongs to a training run that this mode would spoil.
    """
    run_dir, template = expand_path(composed.hydra.run.dir).absolute(), read_unresolved(composed, "run_dir")
    is_given = read_unresolved(composed.hydra.run, "dir") != "${run_dir}"
    parent = find_parent_run(composed) if template == DEFAULT_RUN_DIR and not is_given else None
    if parent is not None:
        run_dir = parent / str(composed.mode)
    require_folder_path(run_dir)
    refuse_kept_results(str(composed.mode), run_dir)
    missing = list_missing_folders(run_dir)
    if not is_given and "${now:" in template:
        run_dir = claim_run_folder(run_dir, "-" if parent else "_")
        missing = [run_dir, *(folder for folder in missing if folder in run_dir.parents)]
    if created is not None:
        created += missing
    return run_dir


def refuse_kept_results(mode: str, run_dir: Path) -> None:
    """Refuse a folder with results that a mode would replace, and that are not those of an earlier call of it.

    Raises:
        ConfigError: for the folder of a training run, for one with averaged weights, which may be in use, and for one
            that no command of ours has written and that holds a file of such a name.
    """
    given = f"run_dir={relative_to_cwd(run_dir)}"
    if mode != "train" and (run_dir / CHECKPOINT_FOLDER).exists():
        raise ConfigError(
            f"{given}: is the folder of a training run, whose report and record mode={mode} would replace. Leave it "
            "out, or give another folder."
        )
    if mode == "average" and (run_dir / AVERAGE_FILE).exists():
        raise ConfigError(f"{given}: holds {AVERAGE_FILE} of an earlier call. Leave it out, or give another folder.")
    foreign = find_foreign_file(run_dir)
    if foreign is not None:
        raise ConfigError(
            f"{given}: holds {foreign.name}, which this run could replace, and no record ({RECORD_FOLDER}) of a run "
            "that wrote it. Give another folder."
        )


def claim_run_folder(planned: Path, mark: str) -> Path:
    """Create the folder of a new run, `planned` or one with a number behind `mark`; the same one on every rank.

    Raises:
        ConfigError: if it cannot be created.
    """
    rank = get_external_rank()
    if rank is None:
        return claim_folder(planned, mark)
    does_claim = rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ
    agreed = Path(agree_on_run_dir(str(claim_folder(planned, mark) if does_claim else planned), rank))
    is_renamed = not agreed.name.startswith(planned.name)  # by the number of a job of SLURM
    return agreed.with_name(f"{planned.name}-{agreed.name}") if is_renamed and mark == "-" else agreed


def find_parent_run(composed: DictConfig) -> Path | None:
    """The run below whose folder this command writes: that of its network; None without one, or if it is read-only."""
    if composed.mode not in RESULT_MODES:
        return None
    parent = find_run_folder(composed.ckpt, expand_path(composed.runs_dir))
    return parent if parent is not None and os.access(parent, os.W_OK) else None


def resolve_sweep_dir(composed: DictConfig) -> Path:
    """The folder of a sweep: new for this sweep if its name contains the time.

    Raises:
        ConfigError: if it cannot be created.
    """
    sweep_dir = expand_path(composed.hydra.sweep.dir).absolute()
    require_folder_path(sweep_dir, "sweep_dir")
    return claim_folder(sweep_dir) if "${now:" in read_unresolved(composed.hydra.sweep, "dir") else sweep_dir


def refuse_search_settings(composed: DictConfig) -> None:
    """Refuse settings of a sweep in a single run.

    Raises:
        ConfigError: if there are any.
    """
    search = composed.hydra.runtime.choices.get("hparams_search")
    if search is not None:
        raise ConfigError(f"hparams_search={search}: needs a sweep. Add -m.")


def run_ranks(overrides: list[str], processes: int, run_dir: Path) -> int:
    """Run this command line as one process per device, all with the same run folder."""
    command = [sys.executable, str(entry_script()), *overrides, f"hydra.run.dir={quote_value(run_dir)}"]
    return supervise_ranks(command, processes, run_dir)


def exit_with_problem(error: SemsegError) -> NoReturn:
    """Record and print an error that the user can fix, unless its report is printed already, and end the process."""
    record_error(error, error.exit_code)
    if isinstance(error, ReportedError):
        sys.stdout.flush()
        sys.exit(error.exit_code)
    exit_with_error(str(error), error.exit_code)


def exit_with_error(message: str, exit_code: int) -> NoReturn:
    """Print one error message and end the process."""
    sys.stdout.flush()
    message = escape_lines(message)
    print(message if exit_code in STOPPED_CODES else f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def run_hydra_job(composed: DictConfig) -> float | None:
    """The function that Hydra calls: runs the mode in this process, or a job of a sweep in a process of its own."""
    runtime = HydraConfig.get()
    if runtime.mode == RunMode.MULTIRUN:
        overrides, run_dir = job_overrides(runtime.overrides.task), Path(runtime.runtime.output_dir)
        return run_sweep_job(overrides, run_dir, scores=composed.mode in TRAINING_MODES)
    run_dir = Path(runtime.runtime.output_dir)
    writes_record = runtime.output_subdir is None and is_first_rank()
    record = collect_run_record(composed, runtime, run_dir) if writes_record else {}
    with open_dict(composed):
        # In another rank, or in a job of a sweep, ${now:} would name another folder.
        composed.run_dir = runtime.runtime.output_dir
    try:
        config = check_config(composed)
        import_mode(config.mode)
        # One line, without the position in the code. Set here because Lightning sets its own format when imported.
        warnings.formatwarning = lambda message, *_, **__: f"warning: {escape_lines(message)}\n"
        return run_mode(config, list(runtime.overrides.task), record)
    except SemsegError as error:
        exit_with_problem(error)  # here, because Hydra would print a line of its own first
    except Exception as error:
        record_error(error, 1)
        message = describe_write_error(error, run_dir) if isinstance(error, OSError) else None
        if message is None and has_other_rank_failed():
            sys.exit(1)  # the traceback of a lost connection would hide the reason; it is in this rank's error file
        if message is None and is_out_of_memory(error):
            message = f"out of memory. The allocation failed: {first_line(error)}"
        if message is None:
            raise
        exit_with_error(message, SemsegError.exit_code)


def run_mode(config: Config, overrides: list[str], record: dict[Path, str]) -> float | None:
    """Run the mode of a configuration in this process, and write the record of its command line into its folder.

    Raises:
        SemsegError: for any error that the user can fix.
    """
    mode = import_mode(config.mode)
    with silence_stdout(config.quiet):
        if config.mode in ("train", "predict"):  # only once nothing else uses the folder
            run_lock.on_folder_taken = partial(write_run_record, record)
        else:
            write_run_record(record)
        print_once(describe_training_words(config.mode, overrides))
        return mode.run(config, overrides)


def import_mode(name: str) -> ModuleType:
    """The module of a mode: that of mode=import is called import_, because import is a keyword."""
    return importlib.import_module(f"semseg.modes.{name}{'_' if keyword.iskeyword(name) else ''}")


def collect_run_record(composed: DictConfig, runtime: HydraConf, folder: Path) -> dict[Path, str]:
    """The files with the command line of a run that Hydra would write, and their contents.

    Hydra itself overwrites them without a lock, and leaves them empty on a full disk.
    """
    contents = {"config": composed, "hydra": {"hydra": runtime}}
    files = {f"{name}.yaml": OmegaConf.to_yaml(OmegaConf.create(content)) for name, content in contents.items()}
    files |= record_overrides(list(runtime.overrides.task))
    return {folder / RECORD_FOLDER / name: text for name, text in files.items()}


def write_run_record(contents: dict[Path, str]) -> None:
    """Write each of these files whole."""
    for path, text in contents.items():
        with atomic_write(path, durable=False) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def silence_stdout(is_quiet: bool) -> Iterator[None]:
    """Discard standard output and log messages below warnings if `is_quiet`. Standard error stays."""
    if not is_quiet:
        yield
        return
    previous = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(previous)


def run_sweep_job(overrides: list[str], run_dir: Path, *, scores: bool) -> float | None:
    """Run one job of a sweep in a process of its own, unless it is finished, and return its score (None without one).

    Jobs are separate processes so that their ranks, memory and crashes do not affect each other.

    Args:
        scores: see `run_job`.
    """
    from semseg.cli.sweep import run_job  # noqa: PLC0415 - slow to import, and most runs need no sweep

    finished = find_finished_job(run_dir, overrides, scores=scores)
    if finished is not None:
        _log.info("job %s: finished earlier", run_dir.name)
        return finished.result.score
    command = [sys.executable, str(entry_script()), *overrides]
    command += [f"{key}={quote_value(run_dir)}" for key in ("hydra.run.dir", "run_dir")]
    job = run_job(command, overrides, run_dir, scores=scores)
    _log.info("job %s: %s%s", run_dir.name, job.status, f": {job.reason}" if job.reason else "")
    return job.result.score
