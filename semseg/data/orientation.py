"""Stage 1: whether the labels of turned photographs lie on the stored pixels or on the upright picture. No torch.

EXIF orientations 5 to 8 exchange height and width, so that a label's size shows its grid. 2, 3 and 4, and any
orientation of a square, do not: there the other photographs of the data set decide, or `data.label_orientation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from semseg.data.headers import Header
from semseg.data.records import Record
from semseg.errors import DataError

KEY = "data.label_orientation"


class Evidence(NamedTuple):
    """What the sizes of turned photographs and their labels show: paths of the images."""

    stored: tuple[str, ...] = ()  # the label has the size of the stored pixels alone
    upright: tuple[str, ...] = ()  # of the upright picture alone
    unclear: tuple[str, ...] = ()  # of both

    @property
    def counts(self) -> str:
        return f"{len(self.stored)} labels lie on the stored pixels, {len(self.upright)} on the upright picture"


def evidence_of(records: Iterable[Record], headers: Mapping[str, Header]) -> Evidence:
    """What the headers of images and masks show; a mask with an orientation of its own needs no evidence."""
    stored, upright, unclear = [], [], []
    for record in records:
        image, mask = headers.get(record.image), headers.get(record.label or "")
        if image is None or mask is None or image.orientation == 1 or mask.orientation != 1:
            continue
        fits_stored, fits_upright = mask.stored == image.stored, mask.stored == image.upright
        if fits_stored and fits_upright:
            unclear.append(record.image)
        elif fits_stored or fits_upright:
            (stored if fits_stored else upright).append(record.image)
    return Evidence(tuple(stored), tuple(upright), tuple(unclear))


def labels_are_upright(key: str, found: Evidence, others: Callable[[], Evidence], split: str) -> bool:
    """Whether labels lie on the upright picture where their sizes do not show it.

    Args:
        key: auto, stored or upright.
        found: of the split.
        others: of the other splits; asked where this one has none.

    Raises:
        DataError: if it is to be found out (auto), and nothing shows it or the evidence contradicts itself.
    """
    if key != "auto" or not found.unclear:
        return key == "upright"
    shown = found if found.stored or found.upright else others()
    if bool(shown.stored) != bool(shown.upright):
        return bool(shown.upright)
    unclear = (
        f"data.{split}: {len(found.unclear)} photographs, such as {found.unclear[0]}, have an EXIF orientation that "
        "keeps their height and width, so that the sizes of their masks do not show whether these were drawn on the "
        "stored pixels or on the upright picture"
    )
    why = (
        f"other photographs contradict each other ({shown.counts})" if shown.stored else "no other photograph shows it"
    )
    raise DataError(f"{unclear}, and {why}. Look at one and set {KEY}=stored or {KEY}=upright.")


def settled(records: Sequence[Record], headers: Mapping[str, Header], *, upright: bool) -> list[Record]:
    """The records with `is_upright` as it is: for all labels, and for those that have an orientation of their own."""

    def is_upright(record: Record) -> bool:
        mask = headers.get(record.label or "")
        return upright or (mask is not None and mask.orientation != 1)

    return [record if record.orientation == 1 else record._replace(is_upright=is_upright(record)) for record in records]


def told(found: Evidence, *, upright: bool) -> str:
    """A sentence about turned photographs; nothing if there are none."""
    count = sum(map(len, found))
    if not count:
        return ""
    if found.stored and found.upright:
        return f"{count} photographs are turned by EXIF, and their masks are not drawn alike: {found.counts}."
    grid = "the upright picture" if found.upright or (upright and not found.stored) else "the stored pixels"
    return f"{count} photographs are turned by EXIF; their masks are taken to be drawn on {grid}."
