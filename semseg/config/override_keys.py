"""The keys of overrides, as they are on a command line or in Hydra's grammar."""

from __future__ import annotations

from collections.abc import Iterable


def split_override(word: str) -> tuple[str, str]:
    """The key of an override, without what Hydra's grammar puts before it, and its value.

    >>> split_override("++optim.lr=0.1"), split_override("~optim.lr")
    (('optim.lr', '0.1'), ('optim.lr', ''))
    """
    key, _, value = word.lstrip("+~").partition("=")
    return key, value


def override_key(word: str) -> str:
    """The key of an override; see `split_override`."""
    return split_override(word)[0]


def list_given_keys(overrides: Iterable[str]) -> dict[str, None]:
    """The keys that some overrides set, each once, in their order; not those that they remove (~key)."""
    return dict.fromkeys(override_key(word) for word in overrides if not word.startswith("~"))
