"""Stage 1: whether labels of images with an EXIF orientation are drawn on the stored or the upright image. No torch.

EXIF orientations 5 to 8 exchange height and width, so that a label's size shows its grid. 2, 3 and 4, and any
orientation of a square, do not: there the other images of the data set decide, or `data.label_orientation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from semseg.data.headers import Header
from semseg.data.records import Record
from semseg.errors import DataError
from semseg.system.text import format_quantity, format_subject

KEY = "data.label_orientation"


class Evidence(NamedTuple):
    """What the sizes of images with an EXIF orientation and of their labels show: paths of the images."""

    stored: tuple[str, ...] = ()  # only the stored image has the size of the label
    upright: tuple[str, ...] = ()  # only the upright image has
    unclear: tuple[str, ...] = ()  # both have

    @property
    def counts(self) -> str:
        return f"{len(self.stored)} labels fit the stored image, {len(self.upright)} the upright image"


def collect_evidence(records: Iterable[Record], headers: Mapping[str, Header]) -> Evidence:
    """Compare the headers of images and masks. A mask with an EXIF orientation needs no evidence."""
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


def labels_are_upright(setting: str, evidence: Evidence, other_evidence: Callable[[], Evidence], split: str) -> bool:
    """Whether labels are drawn on the upright image where their sizes do not show it.

    Args:
        setting: data.label_orientation: auto, stored or upright.
        evidence: from the images of the split.
        other_evidence: collects evidence from the other splits; called if this one has none.

    Raises:
        DataError: if the setting is auto, and there is no evidence or it is contradictory.
    """
    if setting != "auto" or not evidence.unclear:
        return setting == "upright"
    decisive = evidence if evidence.stored or evidence.upright else other_evidence()
    if bool(decisive.stored) != bool(decisive.upright):
        return bool(decisive.upright)
    reason = f"other images contradict each other ({decisive.counts})" if decisive.stored else "no other image shows it"
    raise DataError(
        f"data.{split}: {format_quantity(len(evidence.unclear), 'image')} with an EXIF orientation that keeps height "
        f"and width, such as {evidence.unclear[0]}: the sizes of the masks do not show whether these are drawn on the "
        f"stored or on the upright image, and {reason}. Look at one and set {KEY}=stored or {KEY}=upright."
    )


def set_label_orientation(
    records: Sequence[Record], headers: Mapping[str, Header], *, is_upright: bool
) -> list[Record]:
    """The records with `Record.is_upright` set: as given, but True for labels with an EXIF orientation."""

    def has_upright_label(record: Record) -> bool:
        mask = headers.get(record.label or "")
        return is_upright or (mask is not None and mask.orientation != 1)

    return [
        record if record.orientation == 1 else record._replace(is_upright=has_upright_label(record))
        for record in records
    ]


def describe_orientations(evidence: Evidence, *, is_upright: bool) -> str:
    """A sentence about the images with an EXIF orientation; empty if there are none."""
    count = sum(map(len, evidence))
    if not count:
        return ""
    if evidence.stored and evidence.upright:
        return f"{count} images are rotated by EXIF, and their masks differ in orientation: {evidence.counts}."
    is_stored = evidence.stored or not (evidence.upright or is_upright)
    grid = "the stored image" if is_stored else "the upright image"
    rotated = format_subject(count, "image is", "images are")
    return f"{rotated} rotated by EXIF, and masks are assumed to be drawn on {grid}."
