"""Where the weights of a network come from, and their licence. Stored in every checkpoint that starts from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NOT_STATED = "not stated"
UNKNOWN_LICENCES = ("", "none", "unknown", "null")  # what libraries and model cards write where they know of none
MAX_TEXT = 500  # characters of an entry


class WeightsOrigin(NamedTuple):
    """The source of weights. Networks that were trained from them have the same one: a licence may ask for that."""

    source: str  # a name of the hub, an address, or the file's name
    licence: str = ""  # as its publisher names it; empty: not stated
    revision: str = ""  # the commit of the hub; empty: none is known

    def __str__(self) -> str:
        """One line for people.

        >>> print(WeightsOrigin("timm/vit_small_patch16_dinov3.lvd1689m", "dinov3-license"))
        timm/vit_small_patch16_dinov3.lvd1689m, licence: dinov3-license
        """
        at = f" at {self.revision[:12]}" if self.revision else ""
        return f"{self.source}{at}, licence: {describe_licence(self.licence)}"

    def as_plain(self) -> dict[str, str]:
        """Text only, for checkpoints and JSON."""
        return dict(self._asdict())

    @classmethod
    def from_plain(cls, plain: Any) -> WeightsOrigin | None:
        """The inverse of `as_plain`, for a file of any origin; None: the file says nothing about it.

        Raises:
            ValueError: if an entry is missing, unknown, or no short text.
        """
        if plain is None:
            return None
        if not isinstance(plain, Mapping) or set(plain) != set(cls._fields):
            raise ValueError(f"the origin of its weights must have {', '.join(cls._fields)}")
        if not all(isinstance(value, str) and len(value) <= MAX_TEXT for value in plain.values()):
            raise ValueError("the origin of its weights must be short texts")
        return cls(**plain)


def describe_licence(licence: str | None) -> str:
    """A licence for people.

    >>> describe_licence("apache-2.0"), describe_licence("unknown")
    ('apache-2.0', 'not stated')
    """
    name = " ".join(str(licence or "").split())
    return NOT_STATED if name.lower() in UNKNOWN_LICENCES else name
