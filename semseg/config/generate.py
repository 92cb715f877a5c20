"""Write everything that repeats the schema: `make configs`, or python -m semseg.config.generate.

Written are the keys of the YAML files that have all keys of a section, the page docs/configuration.md, and the list of
sections in `--help`. Headers of files, the defaults list and Hydra's own settings in configs/config.yaml are kept.
tests/config/test_generate.py fails if a file is out of date.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf

from semseg.config.fields import describe_range, key_of
from semseg.config.groups import COMPLETE_OPTIONS, CONFIG_DIR
from semseg.config.schema import Config, DecoderKeys, EncoderKeys, config_to_plain, get_sections, is_section

NETWORK_SECTIONS = {"encoder": EncoderKeys, "decoder": DecoderKeys}
FIRST_KEY, LAST_SECTION = "mode:", "hydra:"  # configs/config.yaml is written from the one to the other
HELP_MARK = "footer: |\n"
LINE_LENGTH = 120
COMMENT_COLUMN = 27

PAGE_HEADER = """# Configuration

All keys, in the order of `configs/config.yaml`. This page is written from the schema (`semseg/config/schema.py`) by
`make configs`. Change a key with `key=value`, and choose a group with `group=name`:

```bash
python run.py model=upernet50 optim.lr=0.01 trainer.devices=2
python run.py model=upernet50 --cfg job     # prints the resulting configuration and runs nothing
```

Defaults are those of `python run.py` without arguments; other options of a group, such as `data=camvid`, have other
values: see their files in `configs/`. `null` means "not set".
"""


@dataclass
class Key:
    """A key of the schema as the documentation shows it."""

    name: str
    type: str
    default: Any  # MISSING if there is none
    allowed: str
    explanation: str
    section: type | None  # the class of its keys, if it is a section


# ---- reading the schema


@cache
def read_explanations(cls: type) -> Mapping[str, str]:
    """The string below each field of a section."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for item, below in itertools.pairwise(definition.body):
        match item, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.split())
    return found


def list_section_keys(cls: type) -> list[Key]:
    """The keys of a section, in the order of its fields."""
    explanations, types, sections = read_explanations(cls), get_type_hints(cls), get_sections(cls)
    found = []
    for item in fields(cls):
        if item.metadata.get("is_open"):
            continue
        key = key_of(item)
        section = sections.get(key) or item.metadata.get("keys")
        explanation = explanations.get(item.name) or (inspect.getdoc(section) or "").split("\n\n")[0].replace("\n", " ")
        default = get_default(item)
        found.append(
            Key(key, describe_type(types[item.name], item), default, describe_allowed(item), explanation, section)
        )
    return found


def get_default(item: Field[Any]) -> Any:
    """The default of a field as configs/ writes it, or MISSING."""
    if "interpolation" in item.metadata:
        return item.metadata["interpolation"]
    if item.default_factory is MISSING:
        return item.default
    create: Any = item.default_factory
    return config_to_plain(create()) if is_section(create) else create()


def describe_type(kind: Any, item: Field[Any]) -> str:
    """The type of a field in words.

    >>> describe_type(int | None, next(iter(fields(Config))))
    'int or null'
    """
    if "accepts" in item.metadata:
        return item.metadata["accepts"]
    if "keys" in item.metadata or is_section(kind):
        return "section"
    inner = [describe_type(part, item) for part in get_args(kind)]
    if get_origin(kind) is list:
        return f"list of ({inner[0]})" if " or " in inner[0] else f"list of {inner[0]}"
    if get_origin(kind) is dict:
        return "mapping"
    names = {str: "text", type(None): "null"}
    return " or ".join(inner) or names.get(kind) or str(kind.__name__)


def describe_allowed(item: Field[Any]) -> str:
    """The choices or the range of a field in words; empty if the type is enough."""
    return ", ".join(item.metadata.get("choices", ())) or describe_range(item.metadata)


# ---- YAML


def render_yaml(cls: type, values: Mapping[str, Any], *, indent: int = 0) -> Iterator[str]:
    """The lines of a section: a key each, with its value and, in a comment, its explanation and choices.

    Args:
        values: what to write instead of the defaults. Keys without a value and a default are left out.
    """
    explained: set[type] = set()
    for key in list_section_keys(cls):
        value = values.get(key.name, key.default)
        if value is MISSING:
            continue
        prefix = " " * indent + f"{key.name}:"
        if key.section is None or value is None:
            yield from render_line(f"{prefix} {format_value(value)}", format_comment(key))
        elif key.section in explained:
            plain = {name: value.get(name, inner.default) for name, inner in index_keys(key.section).items()}
            yield f"{prefix} {format_value(plain)}"
        else:
            lines = list(render_yaml(key.section, value, indent=indent + 2))
            if lines:
                yield from [""] * (indent == 0 and cls is Config)
                yield from render_line(prefix, key.explanation)
                yield from lines
            explained.add(key.section)


def index_keys(cls: type) -> dict[str, Key]:
    """The keys of a section by name."""
    return {key.name: key for key in list_section_keys(cls)}


def format_comment(key: Key) -> str:
    """The explanation of a key, and its choices unless the explanation has them."""
    choices = key.allowed if "," in key.allowed else ""
    if not choices or all(choice in key.explanation for choice in choices.split(", ")):
        return key.explanation
    return f"{key.explanation} One of {choices}."


def render_line(start: str, comment: str) -> Iterator[str]:
    """A line and its comment, which continues on the next lines, or is above the line if there is no room."""
    column = max(COMMENT_COLUMN, len(start) + 2)
    width = LINE_LENGTH - column - 2
    if ". " not in comment and not comment.endswith("..."):
        comment = comment.removesuffix(".")
    if len(comment) > 2 * width or column > 2 * COMMENT_COLUMN:
        indent = " " * (len(start) - len(start.lstrip()))
        yield from textwrap.wrap(comment, LINE_LENGTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        yield start
        return
    first, *rest = textwrap.wrap(comment, width)
    yield f"{start.ljust(column)}# {first}"
    yield from (f"{' ' * column}# {line}" for line in rest)


def format_value(value: Any) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("...\n").strip().replace("''", '""')


# ---- files


def render_files() -> dict[Path, str]:
    """The contents of all files that are written from the schema."""
    found = {CONFIG_DIR / "config.yaml": render_root((CONFIG_DIR / "config.yaml").read_text(encoding="utf-8"))}
    for group, option in COMPLETE_OPTIONS.items():
        path = CONFIG_DIR / group / f"{option}.yaml"
        cls = get_sections(Config)[group]
        found[path] = render_option(path, cls, read_values(path) if group == "data" else {})
    for kind, cls in NETWORK_SECTIONS.items():
        for path in sorted((CONFIG_DIR / "model" / kind).glob("*.yaml")):
            values = read_values(path)
            if "defaults" not in values:
                found[path] = render_option(path, cls, {**dict.fromkeys(index_keys(cls), MISSING), **values})
    path = CONFIG_DIR / "hydra" / "help" / "semseg.yaml"
    found[path] = render_help(path.read_text(encoding="utf-8"))
    docs = CONFIG_DIR.parent / "docs"
    if docs.is_dir():
        found[docs / "configuration.md"] = render_page()
    return found


def render_root(text: str) -> str:
    """configs/config.yaml, whose defaults list and settings of Hydra stay."""
    start, end = text.index(f"\n{FIRST_KEY}") + 1, text.index(f"\n{LAST_SECTION}") + 1
    start = text.rindex("\n\n", 0, start) + 2  # a long explanation is above its key
    groups = dict.fromkeys([*COMPLETE_OPTIONS, "logger", "callbacks"], MISSING)
    return text[:start] + "\n".join(render_yaml(Config, groups)) + "\n\n" + text[end:]


def render_option(path: Path, cls: type, values: Mapping[str, Any]) -> str:
    """A file with all keys of a section, below the comment that it begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    return "\n".join([*header, *render_yaml(cls, values)]) + "\n"


def read_values(path: Path) -> dict[str, Any]:
    """The values of a YAML file, interpolations as they are written."""
    plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def render_help(text: str) -> str:
    """configs/hydra/help/semseg.yaml, whose last part lists the keys and sections of the root."""
    start = text.index(HELP_MARK) + len(HELP_MARK)
    lines = []
    for key in list_section_keys(Config):
        name = f"{key.name}.*" if key.section else key.name
        lines += textwrap.wrap(f"{name:<16}{format_comment(key)}", 110, subsequent_indent=" " * 16)
    body = ["Keys and sections; docs/configuration.md explains all of them:", *(f"  {line}" for line in lines)]
    escaped = "\n".join(f"  {line}" for line in body).replace("${", r"\${")
    return text[:start] + escaped + "\n"


# ---- the page


def render_page() -> str:
    """docs/configuration.md."""
    values = {group: read_values(CONFIG_DIR / group / f"{option}.yaml") for group, option in COMPLETE_OPTIONS.items()}
    parts = [PAGE_HEADER]
    keys = list_section_keys(Config)
    parts.append(render_table("General", "", [key for key in keys if key.section is None]))
    for key in keys:
        if key.section is not None:
            rows = list(flatten_keys(key.section, f"{key.name}.", values.get(key.name, {})))
            parts.append(render_table(key.name, key.explanation, rows))
    return "\n".join(parts)


def flatten_keys(cls: type, prefix: str, values: Mapping[str, Any]) -> Iterator[Key]:
    """The keys of a section and of the sections inside it, with their dotted names and composed defaults."""
    for key in list_section_keys(cls):
        name, value = prefix + key.name, values.get(key.name, key.default)
        if key.section is None:
            yield Key(name, key.type, value, key.allowed, key.explanation, None)
            continue
        yield Key(name, key.type, MISSING if value is not None else None, "", key.explanation, key.section)
        yield from flatten_keys(key.section, f"{name}.", value if isinstance(value, Mapping) else {})


def render_table(title: str, explanation: str, keys: list[Key]) -> str:
    """A heading, a sentence, and a row for each key."""
    group = f" Options: the files in `configs/{title}/`." if (CONFIG_DIR / title).is_dir() else ""
    rows = [
        f"| `{key.name}` | {key.type} | {format_default(key.default)} | {escape_cell(key.allowed)} "
        f"| {escape_cell(key.explanation)} |"
        for key in keys
    ]
    head = [f"## {title}", "", *([explanation + group, ""] if explanation else [])]
    return "\n".join([*head, "| key | type | default | allowed | explanation |", "|---|---|---|---|---|", *rows, ""])


def format_default(value: Any) -> str:
    """A default in code style; empty if there is none."""
    if value is MISSING:
        return ""
    text = format_value(value)
    return f"`{escape_cell(text)}`" if len(text) <= 60 else "see its file"


def escape_cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", r"\|").replace("<", r"\<").replace("*", r"\*")


def write_generated_files() -> None:
    """Write all files, and print the names of those that changed."""
    for path, text in render_files().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(CONFIG_DIR.parent))


if __name__ == "__main__":
    write_generated_files()
