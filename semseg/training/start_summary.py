"""What a run prints before its first step: a few labelled lines, of which long ones are shortened."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.text import Text

from semseg.system.text import escape_unprintable

LABEL_WIDTH = 12  # characters
MAX_SUMMARY_LINES = 13  # with 2 for notes and warnings, 15 before the first step


def format_start(rows: Mapping[str, str], overrides: Sequence[str], width: int) -> list[Text]:
    """The entries of `rows`, each with its label, and the overrides of the command line as far as lines are left.

    Args:
        rows: values by label, which are wrapped at their commas; entries without a value are left out.
        overrides: as Hydra got them.
        width: of the terminal in characters; lists of names are expected to fit, see `shorten_list`.
    """
    lines = [
        (label if index == 0 else "", line)
        for label, value in rows.items()
        for index, line in enumerate(wrap_words(split_at_commas(value), width - LABEL_WIDTH))
    ]
    num_left = max(MAX_SUMMARY_LINES - len(lines), 1)
    words = [shlex.quote(word) for word in overrides if not word.startswith("run_dir=")]  # the run folder has a row
    given = wrap_words(words, width - LABEL_WIDTH, num_left)
    lines += [("given" if index == 0 else "", line) for index, line in enumerate(given)]
    return [Text.assemble((f"{label:{LABEL_WIDTH}}", "bold cyan"), escape_unprintable(line)) for label, line in lines]


def split_at_commas(value: str) -> list[str]:
    """The parts of a list of phrases, each with its comma; none of an empty text."""
    *parts, last = value.split(", ")
    return [*(f"{part}," for part in parts), *([last] if last else [])]


def wrap_words(words: Sequence[str], width: int, max_lines: int | None = None) -> list[str]:
    """`words` in lines of at most `width` characters; a longer word has a line of its own, and no word is cut.

    If there are too many lines, the last one says how many words are left out.

    >>> wrap_words(["a=1", "bb=2", "c=3", "d=4"], 8, max_lines=2)
    ['a=1 bb=2', 'c=3 d=4']
    >>> wrap_words(["a=1", "bb=2", "c=3", "d=4"], 8, max_lines=1)
    ['... and 4 more in config.yaml']
    """
    lines: list[list[str]] = []
    for word in words:
        if lines and len(" ".join([*lines[-1], word])) <= width:
            lines[-1].append(word)
        else:
            lines.append([word])
    if max_lines is not None and len(lines) > max_lines:
        num_shown = sum(map(len, lines[: max_lines - 1]))
        lines[max_lines - 1 :] = [[f"... and {len(words) - num_shown} more in config.yaml"]]
    return [" ".join(line) for line in lines]


def shorten_list(names: Sequence[str], width: int) -> str:
    """As many of `names` as fit into `width` characters, and "..." if there are more; at least one.

    >>> shorten_list(["sky", "tree", "road"], 14), shorten_list(["sky", "tree", "road"], 20)
    ('sky, tree, ...', 'sky, tree, road')
    """
    if len(", ".join(names)) <= width:
        return ", ".join(names)
    shown = list(iterate_fitting(names, width - len("...")))
    return ", ".join([*(shown or names[:1]), "..."])


def iterate_fitting(names: Sequence[str], width: int) -> Iterator[str]:
    """The first names whose lengths, each with ", ", add up to at most `width`."""
    for name in names:
        width -= len(name) + len(", ")
        if width < 0:
            return
        yield name


def abbreviate_path(path: str, width: int) -> str:
    """A path of at most `width` characters if possible: "..." for parts in the middle, or at the start; never the last.

    >>> abbreviate_path("/data/projects/2026/facades/rectified", 30)
    '/data/.../facades/rectified'
    """
    parts = Path(path).parts
    first = parts[: 2 if Path(path).is_absolute() else 1]
    rest = parts[len(first) :]
    shorter = [str(Path(*start, "...", *rest[index:])) for start in (first, ()) for index in range(1, len(rest))]
    candidates = [path, *shorter]
    return next((candidate for candidate in candidates if len(candidate) <= width), candidates[-1])
