"""The door: compose and check the configuration, then hand it to one mode. No torch before that.

Who owns what: this module owns exit codes and messages, sweeps (one process per job) and the run
folder's name; semseg/supervise.py owns the processes of a run on several devices. A configuration error
leaves before anything is written.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from semseg.config import Config, check, explain, schema_keys, unknown_key, walk
from semseg.errors import STOPPED_CODES, ConfigError, SemsegError, nearest
from semseg.supervise import (
    agreed_run_dir,
    external_rank,
    follow_supervisor,
    leave_last_words,
    num_processes,
    supervise,
)

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
PATH_KEYS = (
    "ckpt", "init_from", "input", "output", "resume", "run_dir", "runs_dir",
    "data.root", "data.classes", "download.cache", "model.encoder.weights",
)  # fmt: skip
OPEN_KEYS = ("download.mirrors",)  # whose own keys are the user's
RESULT_FILE = "result.json"  # what a sweep reads of each of its jobs

log = logging.getLogger(__name__)

# Lightning's remarks on hardware, other products and its defaults; its warnings stay.
for chatty in (
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors.checkpoint_connector",
):
    logging.getLogger(chatty).setLevel(logging.WARNING)
# Its own use of a torch function that changes, and layers that freeze_bn put into eval mode: nothing to act on.
for harmless in (r".*LeafSpec.*", r"Found \d+ module\(s\) in eval mode"):
    warnings.filterwarnings("ignore", message=harmless)


def main() -> None:
    """Run the command line in sys.argv; ends the process with 0, 1 (failure) or 2 (configuration)."""
    # Hydra prints errors its own way unless told to pass them on.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv[1:] = [friendly(word, sweep="-m" in sys.argv or "--multirun" in sys.argv) for word in sys.argv[1:]]
    words = sys.argv[1:]
    try:
        sys.argv[1:] = words = again(words)
        if not any(word.startswith("-") for word in words):
            config = check(compose_config(words))  # before Hydra makes the run folder
            processes = num_processes(config)
            if processes > 1:
                sys.exit(run_ranks(words, processes, Path(config.run_dir).absolute()))
            sys.argv[1:] += words_of_external_rank(words, config)
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")(job)()
    except SemsegError as error:
        leave(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        leave(explain_hydra(error, words), ConfigError.exit_code)
    except KeyboardInterrupt:
        leave("interrupted.", 130)


def again(words: list[str]) -> list[str]:
    """The words of the run that `mode=rerun run=<folder>` repeats, and what else is given; other words as they are.

    Raises:
        ConfigError: if the folder holds no run.
    """
    if "mode=rerun" not in words:
        return words
    folder = next((word.partition("=")[2] for word in words if word.startswith("run=")), "")
    saved = Path(folder.strip("\"'")).expanduser() / ".hydra" / "overrides.yaml"
    if not folder or not saved.is_file():
        raise ConfigError(f"mode=rerun needs run=<run folder>: there is no {saved}.")
    before = [str(word) for word in OmegaConf.load(saved)]
    kept = [word for word in before if word.partition("=")[0] not in ("run_dir", "resume")]
    return kept + [word for word in words if word != "mode=rerun" and not word.startswith("run=")]


def words_of_external_rank(words: list[str], config: Config) -> list[str]:
    """What a rank that torchrun or SLURM started needs to share one run folder with the others."""
    rank = external_rank()
    if rank is None:
        return []
    is_given = any(word.startswith("run_dir=") for word in words)
    run_dir = config.run_dir if is_given else agreed_run_dir(config.run_dir, rank)
    return [f'hydra.run.dir="{Path(run_dir).absolute()}"'] + (["hydra.output_subdir=null"] if rank else [])


def run_ranks(words: list[str], processes: int, run_dir: Path) -> int:
    """Run this command line as one process per device, all with the same run folder."""
    command = [sys.executable, str(CONFIG_DIR.parent / "run.py"), *words, f'hydra.run.dir="{run_dir}"']
    return supervise(command, processes, run_dir)


def leave(message: str, exit_code: int) -> NoReturn:
    """Print one error message and end the process."""
    sys.stdout.flush()
    print(message if exit_code in STOPPED_CODES else f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def job(composed: DictConfig) -> float | None:
    """One job: the mode's `run` in this process, or in its own process if it is part of a sweep."""
    runtime = HydraConfig.get()
    if runtime.mode == RunMode.MULTIRUN:
        return run_in_own_process(list(runtime.overrides.task), Path(runtime.runtime.output_dir))
    with open_dict(composed):
        # In the process of another rank, or of a job of a sweep, ${now:} would name another folder.
        composed.run_dir = runtime.runtime.output_dir
    follow_supervisor()
    try:
        config = check(composed)
        mode = importlib.import_module(f"semseg.modes.{config.mode}")
        return mode.run(config, list(runtime.overrides.task))
    except SemsegError as error:
        leave_last_words(error, error.exit_code)
        leave(str(error), error.exit_code)  # here, or Hydra puts a line of its own before it
    except Exception as error:
        leave_last_words(error, 1)
        raise


def run_in_own_process(overrides: list[str], run_dir: Path) -> float:
    """Run one job of a sweep by itself and return its score (NaN if it failed).

    So that jobs leave each other alone: their ranks, their memory, their crashes.
    """
    command = [sys.executable, str(CONFIG_DIR.parent / "run.py"), *overrides]
    command += [f'hydra.run.dir="{run_dir}"', f'run_dir="{run_dir}"']
    finished = subprocess.run(command, check=False)  # noqa: S603 - our own interpreter and entry point
    if finished.returncode:
        log.error("job failed with exit code %d: %s", finished.returncode, " ".join(overrides))
        return float("nan")
    result = run_dir / RESULT_FILE
    score = json.loads(result.read_text())["score"] if result.is_file() else None
    return float("nan") if score is None else float(score)  # no validation, no score


def compose_config(overrides: list[str]) -> DictConfig:
    """The configuration that a command line amounts to, without running it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        composed = compose("config", overrides=overrides)
    with open_dict(composed):
        composed.run_dir = str(composed.run_dir)
    return composed


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
    if key in OPEN_KEYS:
        return f"++{word}"  # Hydra's way to give keys that are in no file
    if key == "trainer.devices" and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", value) and not value.isdigit():
        if sweep and "-" not in value:
            return word
        return f"trainer.devices=[{','.join(str(index) for index in device_indices(value))}]"
    special = re.search(r"[=~,() ]", value)
    if equals and key in PATH_KEYS and special and value[0] not in "\"'[$" and not sweep:
        quoted = os.path.expanduser(value).replace('"', '\\"')  # noqa: PTH111 - a glob is no Path
        return f'{key}="{quoted}"'
    return word


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
    missing = re.search(r"Could not find '([^']+)'", text)
    if missing:
        group, _, option = missing[1].rpartition("/")
        return explain_option(group, option)
    key = re.search(r"Could not override '([^'@]+)", text) or re.search(r"Key '([^']+)'", text)
    if key:
        meant = group_of_option(key[1], overrides)
        valid = [meant] if meant else schema_keys() + composed_keys(overrides) + groups()
        return unknown_key(key[1], valid)
    if isinstance(error, OmegaConfBaseException):
        return explain(error, OmegaConf.create())
    return " ".join(line.strip() for line in text.splitlines() if line.strip())[:400]


def group_of_option(key: str, overrides: list[str]) -> str | None:
    """The group that `key=value` was meant for, told by its value: modle=upernet50 -> model."""
    values = [word.partition("=")[2] for word in overrides if word.startswith(f"{key}=")]
    owners = [group for group in groups() for value in values if (CONFIG_DIR / group / f"{value}.yaml").is_file()]
    return nearest(key, owners)


def explain_option(group: str, option: str) -> str:
    """One line for a group that has no such option."""
    options = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
    if not options:
        return unknown_key(group or option, groups())
    meant = nearest(option, options)
    hint = f" Did you mean {group}={meant}?" if meant else ""
    return f"{group}={option}: not known.{hint}\nValid: {', '.join(options)}."


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
