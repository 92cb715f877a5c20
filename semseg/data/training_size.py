"""How large images are in training: at a short edge or their own resolution, scaled at random, cropped, padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from semseg.config.schema import AugmentConfig, DataConfig
from semseg.data.augment import crop_size, draw_scale
from semseg.data.crops import NATIVE, cut_size
from semseg.data.geometry import Size, canvas_size, largest_canvas, scaled_size
from semseg.data.plan import SubBatch


class TrainingSizes(NamedTuple):
    """The sizes of images in training by those of their files.

    Args:
        data, augment: their settings.
        crop: height and width of crops in pixels (`choose_crop`); None: whole images.
        divisor: a sub-batch is padded to multiples of it.
    """

    data: DataConfig
    augment: AugmentConfig
    crop: Sequence[int] | None
    divisor: int

    def list_planned(self, sizes: Sequence[Size]) -> list[Size]:
        """The sizes by which the plan keeps portraits apart: those of crops where images keep their resolution."""
        if self.data.resize != NATIVE or self.crop is None:
            return list(sizes)
        return [crop_size(size, self.crop) for size in sizes]

    def find_largest(self, sizes: Sequence[Size]) -> Size:
        """The largest canvas that a sub-batch can have, in pixels."""
        data, factor = self.data, self.augment.scale[1]
        if data.resize == NATIVE:
            canvas = canvas_size([Size(*(round(side * factor) for side in size)) for size in sizes], multiple=1)
        else:
            limits = round(max(data.short_edges) * factor), round(data.max_long_edge * factor)
            canvas = largest_canvas(sizes, *limits, self.divisor)
        return canvas_size([canvas if self.crop is None else crop_size(canvas, self.crop)], self.divisor)

    def list_members(self, sub_batch: SubBatch, sizes: Sequence[Size], seed: int) -> list[Size]:
        """The sizes of the images of a sub-batch, before they are padded.

        Args:
            sizes: of all images.
            seed: of the run.
        """
        members = []
        for position, index in enumerate(sub_batch.records):
            factor = draw_scale(self.augment, seed, sub_batch.number, position)
            if self.data.resize == NATIVE:
                crop = self.crop or sizes[index]
                sides = zip(sizes[index], crop, strict=True)
                members.append(Size(*(cut_size(side, limit, factor)[1] for side, limit in sides)))
                continue
            limits = (max(1, round(limit * factor)) for limit in (sub_batch.short_edge, self.data.max_long_edge))
            size = scaled_size(sizes[index], *limits)
            members.append(size if self.crop is None else crop_size(size, self.crop))
        return members
