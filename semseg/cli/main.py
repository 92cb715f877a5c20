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
import re
import shlex
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra import initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from semseg.cli.supervise import (
    agreed_run_dir,
    check_world_size,
    external_rank,
    leave_last_words,
    num_processes,
    refuse_ranks,
    supervise,
)
from semseg.config.hints import unknown_key
from semseg.config.schema import TELLING_MODES, Config, check, explain, hydra_words, schema_keys, walk
from semseg.config.secrets import guard_interpolations, refusal, secret_in
from semseg.errors import INTERRUPTED, STOPPED_CODES, ConfigError, SemsegError, nearest
from semseg.storage import run_lock
from semseg.storage.atomic import SCRIPT, from_here, program, replacing, script, unwritable
from semseg.storage.run_results import finished_job, job_words
from semseg.storage.transfer import is_first_rank
from semseg.system.process import lead_sweep, prepare
from semseg.system.text import lines_printable

# In a wheel inside the package, in a checkout beside it.
PACKAGE = Path(__file__).resolve().parents[1]
CONFIG_DIR = next(place for place in (PACKAGE / "configs", PACKAGE.parent / "configs") if place.is_dir())
PATH_KEYS = (
    "ckpt", "init_from", "input", "output", "resume", "run_dir", "runs_dir",
    "data.root", "data.classes", "data.label_cache", "loss.class_weights", "download.cache", "model.encoder.weights",
    "data.images", "data.masks", "data.image_suffix", "data.mask_suffix",
    *(f"data.{split}.{key}" for split in ("train", "val", "test") for key in ("list", "images", "masks", "stems")),
)  # fmt: skip
# What Hydra's grammar reads as text without quotes, and what among it it reads as a number or a truth value.
PLAIN = re.compile(r"[\w/\-\\+.$%*@?|:]+", re.ASCII)
NOT_TEXT = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?[\d_]+)?|[+-]?(inf|nan)|true|false", re.IGNORECASE)
OPEN_KEYS = ("download.mirrors",)  # whose own keys are the user's
# Options of Hydra's that are passed on. Not among them: those that load code (--experimental-rerun unpickles a file)
# or another configuration than ours, and abbreviations.
OPTIONS = (
    "--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r",
    "--multirun", "-m", "--info", "-i", "--shell-completion", "-sc",
)  # fmt: skip
RECORD = ".hydra"  # in a run folder: the command line, for mode=rerun
NO_RECORD = "hydra.output_subdir=null"  # we write it ourselves
SWEEP = ("-m", "--multirun")
# What Hydra's own settings may call: its plugins, which it looks up among those that are installed, and no callback.
HYDRA_TARGETS = {"launcher._target_", "sweeper._target_"}
HYDRA_PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
OPTUNA_SAMPLERS = tuple(f"optuna.samplers.{name}Sampler" for name in ("TPE", "Random", "CmaEs", "NSGAII", "MOTPE"))
PLUGIN_EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "optuna": "optuna"}
LOGGING_CALLS = ("logging.StreamHandler", "logging.FileHandler", "colorlog.ColoredFormatter")
LOGGING_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
# How Hydra names a key that does not exist: in key=value, in ~key, and where OmegaConf looks it up.
UNKNOWN_KEY = (r"Could not override '([^'@]+)", r"Could not delete from config\. '([^'@]+)' does not", r"Key '([^']+)'")
LONGEST_WORD = 10_000  # characters; Hydra's parser takes seconds for more
LONGEST_NUMBER = r"[\d_]{1000}"  # Python refuses to read integers with a few thousand
DEEPEST_WORD = 50  # brackets inside each other; the parser is recursive

log = logging.getLogger(__name__)

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
    prepare()
    # Hydra prints errors its own way unless told to pass them on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    if Path(sys.argv[0]).is_file():  # not so in python -c
        os.environ[SCRIPT] = str(Path(sys.argv[0]).resolve())
    given = words = sys.argv[1:]
    try:
        sys.argv[1:] = words = understood(words)
        options = {word for word in words if word.startswith("-")}
        if options & set(SWEEP):
            refuse_further(options)
            sys.exit(run_sweep(given, words))
        if not options:
            composed = compose_all(words)
            config = check(settled(composed))  # before anything is written
            refuse_search(composed)
            if config.mode in TELLING_MODES:
                importlib.import_module(f"semseg.modes.{config.mode}").run(config, words)
                sys.exit(0)
            check_world_size(config)
            run_dir = run_folder(composed)
            processes = num_processes(config)
            if processes > 1:
                sys.exit(run_ranks(words, processes, run_dir))
            sys.argv[1:] += [f"hydra.run.dir={quoted(run_dir)}", NO_RECORD]
        elif not {"-sc", "--shell-completion"} & options:
            compose_all(overrides_among(words))
        start()
    except SemsegError as error:
        leave_last_words(error, error.exit_code)
        leave(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        leave(explain_hydra(error, words), ConfigError.exit_code)
    except KeyboardInterrupt:
        leave("interrupted.", INTERRUPTED)
    except OSError as error:
        told = unwritable(error, Path.cwd())
        if told is None:
            raise
        leave(told, SemsegError.exit_code)


def refuse_further(options: set[str]) -> None:
    """A sweep runs; it does not show configurations as well.

    Raises:
        ConfigError: if there is any other option.
    """
    further = sorted(options - set(SWEEP))
    if further:
        raise ConfigError(f"{further[0]} and -m: a sweep takes no other option.")


def start() -> None:
    """Hand the words in sys.argv over to Hydra."""
    hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(job)()


def run_sweep(given: list[str], words: list[str]) -> int:
    """Run the sweep in sys.argv to its end, then print and write its table; returns the exit code.

    Args:
        given: the command line as it was typed, for the command that goes on with the sweep.
        words: the same as Hydra wants it.
    """
    refuse_ranks("a sweep (-m)")
    composed = compose_all(overrides_among(words), sweep=True)
    sweep_dir = sweep_folder(composed)
    sys.argv[1:] += [f"hydra.sweep.dir={quoted(sweep_dir)}", NO_RECORD]  # its jobs write theirs
    # For launchers whose jobs begin as a process that knows nothing but the name of our function.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CONFIG_DIR.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    stopped = 0
    lead_sweep()
    try:
        start()
    except KeyboardInterrupt:
        stopped = INTERRUPTED
    except SystemExit as asked:  # by a signal, which the job had passed on
        stopped = int(asked.code or 0)
    except (SemsegError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:  # of a launcher that lost a job, say; the table tells what became of the others
        stopped = 1
        told = unwritable(error, sweep_dir) if isinstance(error, OSError) else None
        if told is not None:
            leave(told, SemsegError.exit_code)
        if "No trials are completed" not in str(error):  # Optuna, when every job failed
            traceback.print_exc()
    again = [word for word in given if word.partition("=")[0] not in ("sweep_dir", "hydra.sweep.dir")]
    command = shlex.join([*program().split(), *again, f"sweep_dir={from_here(sweep_dir)}"])
    from semseg.cli.sweep import conclude  # noqa: PLC0415 - tables and pages take time to import, and most runs need none

    code = conclude(sweep_dir, command)
    return stopped or code


def understood(words: list[str]) -> list[str]:
    """The words of the command line as Hydra's grammar wants them, those of the run to repeat included.

    Raises:
        ConfigError: for a word that is never right, whatever the configuration.
    """
    for word in words:
        check_word(word)
    words = [friendly(word, sweep=is_sweep(words)) for word in again(words)]
    alone = next((word for word in words if word.startswith("sweep_dir=")), None)
    if alone is not None:
        raise ConfigError(f"{shortened(alone)}: is for sweeps. Add -m.")
    for word in words:
        check_word(word)
    return words


def check_word(word: str) -> None:
    """Refuse what no configuration can hold or no program should print.

    Raises:
        ConfigError: for control characters, bytes that are no UTF-8, options that are not passed on, too many
            characters or brackets, and secrets.
    """
    secret = secret_in(word)
    if secret is not None:
        raise ConfigError(refusal("a word of the command line", secret))
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in word):
        raise ConfigError(f"{shortened(word)}: holds a character that cannot be printed.")
    if word.startswith("-") and word.partition("=")[0] not in OPTIONS:
        raise ConfigError(f"{shortened(word)}: there is no such option. Valid: {', '.join(OPTIONS)}.")
    if re.match(r"[+~]*=", word):
        raise ConfigError(f"{shortened(word)}: there is no key before the sign =.")
    if len(word) > LONGEST_WORD or nesting(word) > DEEPEST_WORD or re.search(LONGEST_NUMBER, word):
        raise ConfigError(f"{shortened(word)}: is too long, or has too many digits or brackets inside each other.")


def shortened(word: str) -> str:
    """A word as it may be printed: one line of plain characters."""
    return ascii(word if len(word) <= 80 else f"{word[:80]}...")


def nesting(word: str) -> int:
    """The largest number of brackets that are open at once.

    >>> nesting("a=[[1],[2]]")
    2
    """
    steps = ((character in "[{(") - (character in ")}]") for character in word)
    return max(itertools.accumulate(steps), default=0)


def is_sweep(words: list[str]) -> bool:
    return any(word in SWEEP for word in words)


def overrides_among(words: list[str]) -> list[str]:
    """The words that are neither options nor values of options."""
    return [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]


def again(words: list[str]) -> list[str]:
    """The words of the run that `mode=rerun run=<folder>` repeats, and what else is given; other words as they are.

    Raises:
        ConfigError: if the folder holds no run, or words that no run of ours writes.
    """
    if "mode=rerun" not in words:
        return words
    folder = next((word.partition("=")[2] for word in words if word.startswith("run=")), "")
    saved = Path(folder.strip("\"'")).expanduser() / ".hydra" / "overrides.yaml"
    if not folder or not os.path.isfile(saved):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        raise ConfigError(f"mode=rerun needs run=<run folder>: there is no {saved}.")
    before = saved_words(saved)
    kept = [word for word in before if word.partition("=")[0] not in ("run_dir", "resume")]
    return kept + [word for word in words if word != "mode=rerun" and not word.startswith("run=")]


def saved_words(path: Path) -> list[str]:
    """The command line that Hydra saved with a run. It is data: options and words for Hydra itself are refused.

    Raises:
        ConfigError: if the file holds them, or anything but a list of words.
    """
    try:
        words = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}).") from None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{path}: not the saved words of a run.")
    for word in words:
        if word.startswith("-") or re.match(r"[+~]*hydra\b", word):
            raise ConfigError(f"{path}: {shortened(word)} is no word of a run.")
    return words


def run_folder(composed: DictConfig) -> Path:
    """The run folder: for this run alone if its name has the time in it, and the same for all ranks of a run.

    Raises:
        ConfigError: if it cannot be made.
    """
    run_dir = Path(str(composed.hydra.run.dir)).absolute()
    is_new = raw(composed.hydra.run, "dir") == "${run_dir}" and "${now:" in raw(composed, "run_dir")
    rank = external_rank()
    if not is_new:
        return run_dir
    if rank is None:
        return claimed(run_dir)
    mine = claimed(run_dir) if rank == 0 and "TORCHELASTIC_RUN_ID" in os.environ else run_dir
    return Path(agreed_run_dir(str(mine), rank))


def sweep_folder(composed: DictConfig) -> Path:
    """The folder of a sweep: for this sweep alone if its name has the time in it.

    Raises:
        ConfigError: if it cannot be made.
    """
    sweep_dir = Path(str(composed.hydra.sweep.dir)).absolute()
    return claimed(sweep_dir) if "${now:" in raw(composed.hydra.sweep, "dir") else sweep_dir


def refuse_search(composed: DictConfig) -> None:
    """Settings of a sweep mean nothing to a single run.

    Raises:
        ConfigError: if there are any.
    """
    search = composed.hydra.runtime.choices.get("hparams_search")
    if search is not None:
        raise ConfigError(f"hparams_search={search}: is for sweeps. Add -m.")


def claimed(folder: Path) -> Path:
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


def raw(node: DictConfig, key: str) -> str:
    """The text under `key`, its interpolations as they were written."""
    plain = OmegaConf.to_container(node, resolve=False)
    assert isinstance(plain, dict)
    return str(plain[key])


def quoted(text: object) -> str:
    """`text` between quotes of Hydra's grammar.

    >>> quoted("my photos")
    '"my photos"'
    """
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), str(text))
    return f'"{escaped}"'


def run_ranks(words: list[str], processes: int, run_dir: Path) -> int:
    """Run this command line as one process per device, all with the same run folder."""
    command = [sys.executable, str(script()), *words, f"hydra.run.dir={quoted(run_dir)}"]
    return supervise(command, processes, run_dir)


def leave(message: str, exit_code: int) -> NoReturn:
    """Print one error message and end the process."""
    sys.stdout.flush()
    message = lines_printable(message)
    print(message if exit_code in STOPPED_CODES else f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def job(composed: DictConfig) -> float | None:
    """One job: the mode's `run` in this process, or in its own process if it is part of a sweep."""
    runtime = HydraConfig.get()
    if runtime.mode == RunMode.MULTIRUN:
        overrides, run_dir = job_words(runtime.overrides.task), Path(runtime.runtime.output_dir)
        return run_in_own_process(overrides, run_dir, scores=composed.mode == "train")
    run_dir = Path(runtime.runtime.output_dir)
    is_recorded = runtime.output_subdir is None and is_first_rank()
    record = record_of(composed, runtime, run_dir) if is_recorded else {}
    with open_dict(composed):
        # In the process of another rank, or of a job of a sweep, ${now:} would name another folder.
        composed.run_dir = runtime.runtime.output_dir
    try:
        config = check(composed)
        mode = importlib.import_module(f"semseg.modes.{config.mode}")
        # One line, without the place in the code. Lightning sets a form of its own when it is imported.
        warnings.formatwarning = lambda message, *_, **__: f"warning: {lines_printable(message)}\n"
        with muted(config.quiet):
            if config.mode == "train":  # not before the folder is known to be its own
                run_lock.when_held = partial(write_files, record)
            else:
                write_files(record)
            return mode.run(config, list(runtime.overrides.task))
    except SemsegError as error:
        leave_last_words(error, error.exit_code)
        leave(str(error), error.exit_code)  # here, or Hydra puts a line of its own before it
    except Exception as error:
        leave_last_words(error, 1)
        told = unwritable(error, run_dir) if isinstance(error, OSError) else None
        if told is None:
            raise
        leave(told, SemsegError.exit_code)


def record_of(composed: DictConfig, runtime: HydraConf, folder: Path) -> dict[Path, str]:
    """The files in which Hydra keeps the command line of a run, with their contents.

    Hydra writes over those that are there, without a lock, and leaves them empty on a full disk.
    """
    contents = {"config": composed, "hydra": {"hydra": runtime}, "overrides": runtime.overrides.task}
    return {folder / RECORD / f"{name}.yaml": OmegaConf.to_yaml(OmegaConf.create(it)) for name, it in contents.items()}


def write_files(contents: dict[Path, str]) -> None:
    for path, text in contents.items():
        with replacing(path, durable=False) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def muted(is_quiet: bool) -> Iterator[None]:
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


def run_in_own_process(overrides: list[str], run_dir: Path, *, scores: bool) -> float | None:
    """Run one job of a sweep by itself, unless it is finished, and return its score (None without one).

    So that jobs leave each other alone: their ranks, their memory, their crashes. `scores`: as of `run_job`.
    """
    from semseg.cli.sweep import run_job  # noqa: PLC0415 - as above

    done = finished_job(run_dir, overrides, scores=scores)
    if done is not None:
        log.info("job %s: was finished before", run_dir.name)
        return done.result.score
    command = [sys.executable, str(script()), *overrides]
    command += [f"{key}={quoted(run_dir)}" for key in ("hydra.run.dir", "run_dir")]
    job = run_job(command, overrides, run_dir, scores=scores)
    log.info("job %s: %s%s", run_dir.name, job.status, f": {job.reason}" if job.reason else "")
    return job.result.score


def compose_config(overrides: list[str]) -> DictConfig:
    """The configuration that a command line amounts to, without running it.

    Raises:
        ConfigError: if Hydra's own settings name code.
    """
    return settled(compose_all(overrides))


def options_of(group: str) -> list[str]:
    """The names of a group's files in configs/, sorted."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def load_config(words: list[str]) -> tuple[Config, list[str]]:
    """The checked configuration of a command line, for use from Python, and its words as Hydra's grammar wants them.

    Raises:
        ConfigError: if a word is wrong.
    """
    words = understood(words)
    try:
        return check(compose_config(words)), words
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_hydra(error, words)) from error


def settled(composed: DictConfig) -> DictConfig:
    """The configuration without Hydra's own settings; the name of the run folder stays what it is now."""
    ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    ours.run_dir = str(composed.run_dir)
    return ours


def compose_all(overrides: list[str], *, sweep: bool = False) -> DictConfig:
    """The configuration with Hydra's own settings below `hydra`; in a sweep, without what is swept over.

    Raises:
        ConfigError: if Hydra's own settings name code, or Hydra cannot make anything of the words.
    """
    guard_interpolations()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        mode = RunMode.MULTIRUN if sweep else RunMode.RUN
        try:
            composed = loader.load_configuration(
                "config", overrides, mode, from_shell=False, validate_sweep_overrides=not sweep
            )
        except (HydraException, OmegaConfBaseException):
            raise
        except Exception as error:  # whatever Hydra stumbles over: an assertion, a file name that is too long, ...
            told = next(group_problems(overrides), None)
            if told is not None:
                raise ConfigError(told) from error
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"cannot read this command line ({type(error).__name__}: {reason}).") from error
    told = next(hydra_problems(OmegaConf.to_container(composed.hydra, resolve=False)), None)
    if told is not None:
        raise ConfigError(told)
    return composed


def hydra_problems(settings: Any) -> Iterator[str]:
    """A sentence for everything in Hydra's own settings, as they are written, that would call what is not on a list."""
    found = dict(walk(settings))
    for place in hydra_words(settings):
        if not may_call(place, str(found.get(place))):
            yield f"hydra.{place}={found.get(place)}: not allowed."
    if found.get("sweeper.custom_search_space") is not None:
        yield f"hydra.sweeper.custom_search_space={found['sweeper.custom_search_space']}: not allowed."
    for name in ("params", "search_space"):
        space = settings["sweeper"].get(name) or {}
        if not isinstance(space, dict) or any(re.search(r"\bhydra\b", str(key)) for key in space):
            yield f"hydra.sweeper.{name}={space}: not allowed. It makes words of jobs, which cannot change Hydra."
    for key, value in found.items():
        section, _, rest = key.partition(".")
        if section not in ("job_logging", "hydra_logging"):
            continue
        words, text = rest.split("."), str(value)
        calls = words[-1] in ("class", "()") and value not in LOGGING_CALLS
        names = "://" in text and value not in LOGGING_STREAMS
        later = "${" in text and words[-1] != "filename"
        if calls or names or later or "()" in words[:-1]:
            yield f"hydra.{key}={text}: not allowed. Allowed: {', '.join((*LOGGING_CALLS, *LOGGING_STREAMS))}."


def may_call(place: str, target: str) -> bool:
    """Whether Hydra's own setting `place` may name `target`."""
    is_plugin = place in HYDRA_TARGETS and target.startswith(HYDRA_PLUGINS)
    return is_plugin or (place == "sweeper.sampler._target_" and target in OPTUNA_SAMPLERS)


def friendly(word: str, *, sweep: bool = False) -> str:
    """A command-line word as Hydra's grammar wants it.

    Device ranges become lists (0-3, 0,2; a comma in a sweep stays one), and paths are quoted where
    they hold characters that Hydra's grammar gives a meaning.

    >>> friendly("trainer.devices=0-3")
    'trainer.devices=[0,1,2,3]'
    >>> friendly("ckpt=epoch=3.ckpt")
    'ckpt="epoch=3.ckpt"'
    """
    key, equals, value = word.partition("=")
    if key == "sweep_dir" and sweep:
        return f"hydra.sweep.dir={quoted(os.path.expanduser(value))}"  # noqa: PTH111
    if key in OPEN_KEYS:
        return f"++{word}"  # Hydra's way to give keys that are in no file
    if key == "trainer.devices" and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", value) and not value.isdigit():
        if sweep and "-" not in value:
            return word
        return f"trainer.devices=[{','.join(str(index) for index in device_indices(value))}]"
    if equals and key in PATH_KEYS and is_bare_path(value, sweep=sweep):
        return f"{key}={quoted(os.path.expanduser(value))}"  # noqa: PTH111 - a glob is no Path
    return word


def is_bare_path(value: str, *, sweep: bool) -> bool:
    """Whether a value is a path that Hydra's grammar would read as something else, or not at all.

    Whatever is there under this very name is a path. Otherwise, quotes, lists, interpolations, and the commas and
    brackets of a sweep are left to Hydra.
    """
    path = os.path.expanduser(value)  # noqa: PTH111
    if path == value and PLAIN.fullmatch(value) and not NOT_TEXT.fullmatch(value):
        return False
    if os.path.lexists(path):
        return value != "null"
    if "${" in value and not re.search(r"[=~,() ]", value):
        return False
    return bool(value) and value[0] not in "\"'[${" and not (sweep and re.search(r"[,()\[\]{}]", value))


def device_indices(text: str) -> list[int]:
    """The seed project's device syntax: "0-3" or "0,2" or "0,2-4" as indices."""
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        indices.extend(range(int(first), int(last or first) + 1))
    return indices


def explain_hydra(error: Exception, overrides: list[str]) -> str:
    """Hydra's error in at most three lines: what is wrong, what was meant, what is valid."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return explain_grammar(error.override)
    missing = re.search(r"Could not (?:find|load) '([^']+)'", text)  # load: one of a list
    if missing:
        group, _, option = missing[1].rpartition("/")
        return explain_option(group, option, re.findall(r"^\t(\w+)$", text, re.MULTILINE))
    key = next(filter(None, (re.search(pattern, text) for pattern in UNKNOWN_KEY)), None)
    if key:
        return explain_key(key[1], overrides)
    if isinstance(error, OmegaConfBaseException):
        return explain(error, OmegaConf.create())
    if not text and isinstance(error.__cause__, Exception):
        return explain_hydra(error.__cause__, overrides)
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:400]


def explain_key(key: str, overrides: list[str]) -> str:
    """One line for a key that is not in the configuration with these groups."""
    section, option = [*key.split("."), ""][:2]
    if section in ("logger", "callbacks") and option in options_of(section):
        return f"There is no key {key!r} without {section}={option}."
    meant = group_of_option(key, overrides)
    return unknown_key(key, [meant] if meant else schema_keys() + composed_keys(overrides) + groups())


def group_of_option(key: str, overrides: list[str]) -> str | None:
    """The group that `key=value` was meant for, told by its value: modle=upernet50 -> model."""
    values = [word.partition("=")[2] for word in overrides if word.startswith(f"{key}=")]
    owners = [group for group in groups() for value in values if (CONFIG_DIR / group / f"{value}.yaml").is_file()]
    return nearest(key, owners)


def explain_option(group: str, option: str, listed: list[str]) -> str:
    """One line for a group that has no such option; `listed` are those of a group that is not ours."""
    if group in ("hydra/launcher", "hydra/sweeper") and option in PLUGIN_EXTRAS:
        return f"{group}={option} is not installed. To install it: pip install 'semseg[{PLUGIN_EXTRAS[option]}]'"
    options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml")) or listed
    if not options:
        return unknown_key(group or option, groups())
    meant = nearest(option, options)
    hint = f" Did you mean {group}={meant}?" if meant else ""
    return f"{group}={option}: not known.{hint}\nValid: {', '.join(options)}."


def group_problems(overrides: list[str]) -> Iterator[str]:
    """A sentence for every group that was given something else than the name of one of its options."""
    for word in overrides:
        key, _, value = word.lstrip("+").partition("=")
        if key in groups() and value not in options_of(key):
            yield explain_option(key, value, [])


def explain_grammar(override: str) -> str:
    """One line for a word that is not of the form key=value in Hydra's grammar."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is not of the form key=value."
    quoted = value.strip("\"'")
    return f"cannot read {override!r}. Quote the value: '{key}=\"{quoted}\"'"


def composed_keys(overrides: list[str]) -> list[str]:
    """All keys of the configuration with the groups, but not the values, of `overrides`."""
    parser = OverridesParser.create()
    chosen = []
    for word in overrides:
        try:
            is_group = (CONFIG_DIR / parser.parse_override(word).key_or_group).is_dir()
        except HydraException:
            continue
        if is_group:
            chosen.append(word)
    try:
        plain = OmegaConf.to_container(compose_config(chosen), resolve=False)
    except (HydraException, OmegaConfBaseException):
        return []
    return [key for key, _ in walk(plain)]


def groups() -> list[str]:
    """Names of all configuration groups: model, model/encoder, data, ..."""
    folders = (path.relative_to(CONFIG_DIR) for path in CONFIG_DIR.rglob("*") if path.is_dir())
    return sorted(folder.as_posix() for folder in folders if folder.parts[0] != "hydra")
