"""Translate the command line into Hydra's grammar: refuse, quote, read the overrides of an earlier run. No torch."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import yaml

from semseg.config.choice_files import is_choice_file, read_choice_file, resolve_choice
from semseg.config.groups import list_groups
from semseg.config.hints import REMOVED_KEYS
from semseg.config.override_keys import override_key
from semseg.config.tables import is_own_key
from semseg.errors import ConfigError

PATH_KEYS = (
    "ckpt", "init_from", "input", "import.images", "output", "resume", "run_dir", "runs_dir",
    "data.root", "data.classes", "data.label_cache", "loss.class_weights", "download.cache", "model.encoder.weights",
    "data.images", "data.masks", "data.image_suffix", "data.mask_suffix", "predict.image_prefix",
    *(f"data.{split}.{key}" for split in ("train", "val", "test") for key in ("list", "images", "masks", "stems")),
)  # fmt: skip
# Text that Hydra's grammar accepts without quotes, and the part of it that it reads as a number or boolean.
UNQUOTED = re.compile(r"[\w/\-\\+.$%*@?|:]+", re.ASCII)
NUMBER_OR_BOOLEAN = re.compile(
    r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?[\d_]+)?|[+-]?(inf|nan)|true|false", re.IGNORECASE
)
SINGLE_KEYS = {  # given twice, they are a mistake: what to do instead
    "input": "Give both in a folder, a pattern or a list of paths.",
    "ckpt": "Give one, or several networks as ckpt=[<file>,<file>].",
    "output": "Give one.",
}
LIST_KEYS = ("ckpt", "runs")  # paths whose text may be a list without quotes: [a.ckpt,b.ckpt]
OPEN_KEYS = ("download.mirrors",)  # users choose the keys of these
OPEN_PREFIXES = ("model.options.",)  # keys of a library, which checks them
# Hydra's options that are allowed. Left out are those that load code (--experimental-rerun unpickles a file) or
# another configuration, and abbreviations.
HYDRA_OPTIONS = (
    "--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r",
    "--multirun", "-m", "--info", "-i", "--shell-completion", "-sc",
)  # fmt: skip
DESCRIPTION_FILE = "semseg.yaml"  # in a folder that mode=import has written: the settings of this data set
SWEEP_OPTIONS = ("-m", "--multirun")
RECORD_FOLDER = ".hydra"  # in a run folder: its command line, and the files that it named, for mode=rerun


def parse_overrides(arguments: list[str]) -> list[str]:
    """The arguments of the command line in Hydra's grammar, including those of a run that mode=rerun repeats.

    Raises:
        ConfigError: for an argument that no configuration could accept.
    """
    for argument in arguments:
        check_argument(argument)
    refuse_second_values(arguments)
    words = use_own_description(expand_rerun(arguments))
    overrides = [quote_override(word, sweep=is_sweep(arguments)) for word in words]
    sweep_dir = next((override for override in overrides if override.startswith("sweep_dir=")), None)
    if sweep_dir is not None:  # in a sweep it has become hydra.sweep.dir
        raise ConfigError(f"{shorten_override(sweep_dir)}: needs a sweep. Add -m.")
    for override in overrides:
        check_argument(override)
    return overrides


def check_argument(argument: str) -> None:
    """Refuse arguments that Hydra would misread.

    Raises:
        ConfigError: for control characters, bytes that are not UTF-8, options that are not allowed, and values without
            a key.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in argument):
        raise ConfigError(f"{shorten_override(argument)}: contains a character that cannot be printed.")
    if argument.startswith("-") and argument.partition("=")[0] not in HYDRA_OPTIONS:
        raise ConfigError(f"{shorten_override(argument)}: there is no such option. Valid: {', '.join(HYDRA_OPTIONS)}.")
    if re.match(r"[+~]*=", argument):
        raise ConfigError(f"{shorten_override(argument)}: there is no key before the equals sign.")


def refuse_second_values(arguments: list[str]) -> None:
    """Refuse keys of SINGLE_KEYS with two different values, of which Hydra would take the last.

    Raises:
        ConfigError: with both values.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key = override_key(argument)
        first = given.setdefault(key, argument)
        if key in SINGLE_KEYS and first != argument:
            both = f"{shorten_override(first)} {shorten_override(argument)}"
            raise ConfigError(f"{both}: {key} has one value. {SINGLE_KEYS[key]}")


def shorten_override(override: str) -> str:
    """An override for messages: at most 80 characters, in ASCII."""
    return ascii(override if len(override) <= 80 else f"{override[:80]}...")


def is_sweep(arguments: list[str]) -> bool:
    """Whether a command line asks for a sweep."""
    return any(argument in SWEEP_OPTIONS for argument in arguments)


def select_overrides(arguments: list[str]) -> list[str]:
    """The arguments that are neither options nor values of options."""
    return [word for word in arguments if not word.startswith("-") and ("=" in word or word.startswith("~"))]


def expand_rerun(arguments: list[str]) -> list[str]:
    """Replace `mode=rerun run=<folder>` by the overrides of that run; other arguments are kept.

    Raises:
        ConfigError: if the folder holds no run, or overrides that no run of ours writes.
    """
    if "mode=rerun" not in arguments:
        return arguments
    folder = next((argument.partition("=")[2] for argument in arguments if argument.startswith("run=")), "")
    record = Path(folder.strip("\"'")).expanduser() / RECORD_FOLDER
    saved = record / "overrides.yaml"
    if not folder or not os.path.isfile(saved):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        raise ConfigError(f"mode=rerun needs run=<run folder>: there is no {saved}.")
    ignored = ("run_dir", "resume", *REMOVED_KEYS)
    kept = [
        override.replace(f"={RECORD_FOLDER}/", f"={record}/", 1)
        for override in read_saved_overrides(saved)
        if override_key(override) not in ignored
    ]
    return kept + [word for word in arguments if word != "mode=rerun" and not word.startswith("run=")]


def use_own_description(arguments: list[str]) -> list[str]:
    """Replace `data=folder data.root=<folder>` by `data=<folder>/semseg.yaml` if the folder has this description.

    Raises:
        ConfigError: if it would set other keys than those of `data`.
    """
    roots = [word.partition("=")[2].strip("\"'") for word in arguments if word.startswith("data.root=")]
    if "data=folder" not in arguments or len(roots) != 1:
        return arguments
    file = Path(os.path.expanduser(roots[0])) / DESCRIPTION_FILE  # noqa: PTH111 - for unknown users
    if not os.path.isfile(file):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        return arguments
    if read_choice_file("data", file).is_global:
        raise ConfigError(f"{file}: sets keys of other sections than data. Use it as data={file} if you trust it.")
    return [
        f"data={file}" if word == "data=folder" else word for word in arguments if not word.startswith("data.root=")
    ]


def record_overrides(overrides: list[str]) -> dict[str, str]:
    """The files that record a command line in RECORD_FOLDER: its overrides, and copies of the files that they name.

    The overrides name the copies, so that the run can be repeated without the original files, from anywhere.
    """
    words, files = [], {}
    for word in overrides:
        group, _, value = word.partition("=")
        path = value.strip("\"'")
        if is_choice_file(group, path):
            name = f"{group.replace('/', '_')}.yaml"
            files[name] = read_choice_file(group, Path(path)).to_yaml()
            words.append(f"{group}={RECORD_FOLDER}/{name}")
        else:
            words.append(word)
    return {"overrides.yaml": yaml.safe_dump(words, width=1000, allow_unicode=True), **files}


def read_saved_overrides(path: Path) -> list[str]:
    """The overrides saved with a run. The file is not trusted: options and overrides of Hydra itself are refused.

    Raises:
        ConfigError: if the file holds these, or anything but a list of text.
    """
    try:
        overrides = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({type(error).__name__}).") from None
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        raise ConfigError(f"{path}: does not hold the overrides of a run.")
    for override in overrides:
        if override.startswith("-") or re.search(r"\bhydra\b", override.partition("=")[0]):
            raise ConfigError(f"{path}: {shorten_override(override)} is not an override of a run.")
    return overrides


def quote_override(argument: str, *, sweep: bool = False) -> str:
    """An argument of the command line in Hydra's grammar.

    Device ranges become lists (0-3 and 0,2; in a sweep a comma keeps its meaning), paths are quoted if they contain
    characters that Hydra's grammar interprets, and files that are options of groups get their absolute path.

    >>> quote_override("trainer.devices=0-3")
    'trainer.devices=[0,1,2,3]'
    >>> quote_override("ckpt=epoch=3.ckpt")
    'ckpt="epoch=3.ckpt"'
    >>> quote_override("ckpt=[a.ckpt,epoch=3.ckpt]")
    'ckpt=["a.ckpt","epoch=3.ckpt"]'
    """
    key, equals, value = argument.partition("=")
    if key == "sweep_dir" and sweep:
        return f"hydra.sweep.dir={quote_value(os.path.expanduser(value))}"  # noqa: PTH111
    if key in OPEN_KEYS or key.startswith(OPEN_PREFIXES) or is_own_key(key):
        return f"++{argument}"  # allows keys that are in no file
    if key == "trainer.devices":
        return f"{key}{equals}{quote_devices(value, sweep=sweep)}"
    if equals and key in list_groups():
        return f"{key}={quote_choices(key, value, sweep=sweep)}"
    if key in LIST_KEYS and re.fullmatch(r"\[[^\[\]\"'{}$]*\]", value):
        value = quote_list(value)
    elif key == "data.group" and value not in ("", "null") and value[0] not in "\"'":
        value = quote_value(value)  # a regular expression
    elif equals and key in PATH_KEYS and needs_quotes(value, sweep=sweep):
        value = quote_value(os.path.expanduser(value))  # noqa: PTH111 - Path would change patterns
    return f"{key}{equals}{value}"


def quote_list(value: str) -> str:
    """A list of paths without quotes, such as [a.ckpt,b.ckpt], in Hydra's grammar."""
    parts = (os.path.expanduser(part.strip()) for part in value[1:-1].split(","))  # noqa: PTH111
    return f"[{','.join(map(quote_value, parts))}]"


def quote_devices(value: str, *, sweep: bool) -> str:
    """The devices as a list if they are a range or, outside of a sweep, several."""
    is_list = re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", value) and not value.isdigit()
    if not is_list or (sweep and "-" not in value):
        return value
    return f"[{','.join(str(index) for index in parse_device_indices(value))}]"


def quote_choices(group: str, value: str, *, sweep: bool) -> str:
    """The value of a group with files by their absolute paths; in a sweep, commas separate several options.

    Raises:
        ConfigError: if a file does not exist, or cannot be an option of the group.
    """
    if sweep and "," in value:
        return ",".join(quote_choices(group, part.strip(), sweep=False) for part in value.split(","))
    name = value.strip("\"'")
    if not is_choice_file(group, name):
        return value
    path = str(resolve_choice(group, name))
    return path if UNQUOTED.fullmatch(path) else quote_value(path)


def needs_quotes(value: str, *, sweep: bool) -> bool:
    """Whether a value is a path that Hydra's grammar would misread or reject.

    The name of an existing file is always a path. Otherwise quotes, lists, interpolations, and the commas and brackets
    of a sweep are left to Hydra.
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
    """Device indices in the syntax of the original: "0-3", "0,2" or "0,2-4"."""
    indices: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        indices.extend(range(int(first), int(last or first) + 1))
    return indices


def quote_value(text: object) -> str:
    """`text` quoted for Hydra's grammar.

    >>> quote_value("my photos")
    '"my photos"'
    """
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + (r"\"" if found[2] else ""), str(text))
    return f'"{escaped}"'
