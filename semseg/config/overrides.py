"""The command line as Hydra's grammar wants it: what is refused, quoted, or read from an earlier run. No torch."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import yaml

from semseg.config.hints import REMOVED_KEYS
from semseg.errors import ConfigError

PATH_KEYS = (
    "ckpt", "init_from", "input", "output", "resume", "run_dir", "runs_dir",
    "data.root", "data.classes", "data.label_cache", "loss.class_weights", "download.cache", "model.encoder.weights",
    "data.images", "data.masks", "data.image_suffix", "data.mask_suffix",
    *(f"data.{split}.{key}" for split in ("train", "val", "test") for key in ("list", "images", "masks", "stems")),
)  # fmt: skip
# What Hydra's grammar reads as text without quotes, and what among it it reads as a number or a truth value.
UNQUOTED = re.compile(r"[\w/\-\\+.$%*@?|:]+", re.ASCII)
NUMBER_OR_BOOLEAN = re.compile(
    r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?[\d_]+)?|[+-]?(inf|nan)|true|false", re.IGNORECASE
)
OPEN_KEYS = ("download.mirrors",)  # whose own keys are the user's
# Options of Hydra's that are passed on. Not among them: those that load code (--experimental-rerun unpickles a file)
# or another configuration than ours, and abbreviations.
HYDRA_OPTIONS = (
    "--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r",
    "--multirun", "-m", "--info", "-i", "--shell-completion", "-sc",
)  # fmt: skip
SWEEP_OPTIONS = ("-m", "--multirun")


def parse_overrides(words: list[str]) -> list[str]:
    """The words of the command line as Hydra's grammar wants them, those of the run to repeat included.

    Raises:
        ConfigError: for a word that is never right, whatever the configuration.
    """
    for word in words:
        check_argument(word)
    words = [quote_override(word, sweep=is_sweep(words)) for word in expand_rerun(words)]
    alone = next((word for word in words if word.startswith("sweep_dir=")), None)
    if alone is not None:
        raise ConfigError(f"{shorten_override(alone)}: is for sweeps. Add -m.")
    for word in words:
        check_argument(word)
    return words


def check_argument(word: str) -> None:
    """Refuse words that Hydra would misread.

    Raises:
        ConfigError: for control characters, bytes that are no UTF-8, options that are not passed on, and values
            without a key.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in word):
        raise ConfigError(f"{shorten_override(word)}: holds a character that cannot be printed.")
    if word.startswith("-") and word.partition("=")[0] not in HYDRA_OPTIONS:
        raise ConfigError(f"{shorten_override(word)}: there is no such option. Valid: {', '.join(HYDRA_OPTIONS)}.")
    if re.match(r"[+~]*=", word):
        raise ConfigError(f"{shorten_override(word)}: there is no key before the sign =.")


def shorten_override(word: str) -> str:
    """A word as it may be printed: one line of plain characters."""
    return ascii(word if len(word) <= 80 else f"{word[:80]}...")


def is_sweep(words: list[str]) -> bool:
    return any(word in SWEEP_OPTIONS for word in words)


def select_overrides(words: list[str]) -> list[str]:
    """The words that are neither options nor values of options."""
    return [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]


def expand_rerun(words: list[str]) -> list[str]:
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
    before = read_saved_overrides(saved)
    left_out = ("run_dir", "resume", *REMOVED_KEYS)
    kept = [word for word in before if word.lstrip("+~").partition("=")[0] not in left_out]
    return kept + [word for word in words if word != "mode=rerun" and not word.startswith("run=")]


def read_saved_overrides(path: Path) -> list[str]:
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
        if word.startswith("-") or re.search(r"\bhydra\b", word.partition("=")[0]):
            raise ConfigError(f"{path}: {shorten_override(word)} is no word of a run.")
    return words


def quote_override(word: str, *, sweep: bool = False) -> str:
    """A command-line word as Hydra's grammar wants it.

    Device ranges become lists (0-3, 0,2; a comma in a sweep stays one), and paths are quoted where
    they hold characters that Hydra's grammar gives a meaning.

    >>> quote_override("trainer.devices=0-3")
    'trainer.devices=[0,1,2,3]'
    >>> quote_override("ckpt=epoch=3.ckpt")
    'ckpt="epoch=3.ckpt"'
    """
    key, equals, value = word.partition("=")
    if key == "sweep_dir" and sweep:
        return f"hydra.sweep.dir={quote_value(os.path.expanduser(value))}"  # noqa: PTH111
    if key in OPEN_KEYS:
        return f"++{word}"  # Hydra's way to give keys that are in no file
    if key == "trainer.devices" and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", value) and not value.isdigit():
        if sweep and "-" not in value:
            return word
        return f"trainer.devices=[{','.join(str(index) for index in parse_device_indices(value))}]"
    if equals and key in PATH_KEYS and needs_quotes(value, sweep=sweep):
        return f"{key}={quote_value(os.path.expanduser(value))}"  # noqa: PTH111 - a glob is no Path
    return word


def needs_quotes(value: str, *, sweep: bool) -> bool:
    """Whether a value is a path that Hydra's grammar would read as something else, or not at all.

    Whatever is there under this very name is a path. Otherwise, quotes, lists, interpolations, and the commas and
    brackets of a sweep are left to Hydra.
    """
    path = os.path.expanduser(value)  # noqa: PTH111
    if path == value and UNQUOTED.fullmatch(value) and not NUMBER_OR_BOOLEAN.fullmatch(value):
        return False
    if os.path.lexists(path):
        return value != "null"
    if "${" in value and not re.search(r"[=~,() ]", value):
        return False
    return bool(value) and value[0] not in "\"'[${" and not (sweep and re.search(r"[,()\[\]{}]", value))


def parse_device_indices(text: str) -> list[int]:
    """The seed project's device syntax: "0-3" or "0,2" or "0,2-4" as indices."""
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        indices.extend(range(int(first), int(last or first) + 1))
    return indices


def quote_value(text: object) -> str:
    """`text` between quotes of Hydra's grammar.

    >>> quote_value("my photos")
    '"my photos"'
    """
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), str(text))
    return f'"{escaped}"'
