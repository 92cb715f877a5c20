"""Files of the 2018 and 2020 releases: two flat state dicts, an encoder and a decoder, without any description.

Names and shapes identify the architecture and the number of classes. Two properties do not show in the weights; they
follow rules that the command line can override:

- dilation: UPerNet uses the plain encoder, C1 and PPM one with output stride 8 (model.encoder.output_stride);
- the release, and with it the preprocessing: by the folder's name on the server (baseline-... 2018, ade20k-... 2020),
  otherwise 2020 (model.convention=bgr_mean for 2018).
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semseg.checkpoints.format import SavedNetwork, load_weights
from semseg.checkpoints.initialise import drop_old_buffers, find_differences
from semseg.checkpoints.zoo import RELEASES, Release, release_of_folder
from semseg.config.override_keys import list_given_keys
from semseg.config.preprocessing import PREPROCESSING
from semseg.config.schema import Config, ModelConfig
from semseg.data.classes import ClassTable, built_in_classes
from semseg.errors import CheckpointError
from semseg.nets.interfaces import CLASSIFIER_PREFIXES
from semseg.nets.registry import DECODERS, ENCODERS, Network, build_decoder, build_encoder

PUBLISHED_ENCODERS = ("resnet18", "resnet50", "resnet101", "resnext101", "mobilenetv2", "hrnetv2")
ONLY_2020 = ("mobilenetv2", "hrnetv2")
PUBLISHED_FREE_KEYS = ("model.convention", "model.encoder.output_stride")  # what the files do not contain


class PublishedFiles(NamedTuple):
    """The two files of a published network."""

    encoder: Path
    decoder: Path

    @property
    def epoch(self) -> int:
        """The number in the decoder's name; 0 if there is none."""
        found = re.search(r"epoch_(\d+)", self.decoder.name)
        return int(found[1]) if found else 0

    def __str__(self) -> str:
        return f"{self.encoder},{self.decoder}"


def find_published_files(spec: str) -> PublishedFiles | None:
    """The published files that `ckpt=<folder>` or `ckpt=<encoder file>,<decoder file>` means, or None.

    In a folder with several epochs, the last one with both files is taken.

    Raises:
        CheckpointError: if one file of a pair is missing.
    """
    path = Path(spec).expanduser()
    if os.path.isdir(path):  # noqa: PTH112 - Path raises an error for a name that is too long
        pairs = [
            (encoder, decoder)
            for encoder in path.glob("encoder*.pth")
            if (decoder := path / encoder.name.replace("encoder", "decoder", 1)).is_file()
        ]
        found = (PublishedFiles(*pair) for pair in pairs)
        return max(found, key=lambda files: (files.epoch, files.decoder.name), default=None)
    if os.path.exists(path) or "," not in spec:  # noqa: PTH110
        return None
    parts = [Path(part.strip()).expanduser() for part in spec.split(",")]
    if len(parts) != 2:
        raise CheckpointError(f"{spec}: must be two files: <encoder file>,<decoder file>.")
    for part in parts:
        if not part.is_file():
            raise CheckpointError(f"{part}: there is no such file.")
    return PublishedFiles(*parts)


class Identified(NamedTuple):
    """What two published files contain."""

    weights: dict[str, Tensor]  # encoder.* and decoder.*
    encoder: str  # a name of PUBLISHED_ENCODERS
    decoder: Network
    num_classes: int
    release: Release
    reason: str  # for the release

    @property
    def has_output_stride(self) -> bool:
        """Whether the encoder can be dilated to another output stride."""
        return "output_stride" in inspect.signature(ENCODERS[self.encoder].load()).parameters

    @property
    def default_output_stride(self) -> int:
        """The output stride of the published networks with this decoder."""
        return 32 if self.decoder.name == "upernet" else 8


def identify(files: PublishedFiles, release: Release | None = None) -> Identified:
    """Find out by names and shapes of the weights which network two files contain.

    Args:
        release: 2018 or 2020 if it is known; None: by the rule above.

    Raises:
        CheckpointError: if a file is missing, damaged, or of an unknown architecture.
    """
    encoder_weights = drop_old_buffers(load_weights(files.encoder))
    encoder_weights = {
        name: value for name, value in encoder_weights.items() if not name.startswith(CLASSIFIER_PREFIXES)
    }
    decoder_weights = drop_old_buffers(load_weights(files.decoder))
    encoder = identify_encoder(files.encoder, encoder_weights)
    num_classes = count_classes(files.decoder, decoder_weights)
    decoder = identify_decoder(files.decoder, decoder_weights, encoder, num_classes)
    release, reason = (release, "by the zoo") if release else infer_release(files, encoder)
    weights = {f"encoder.{name}": value for name, value in encoder_weights.items()}
    weights |= {f"decoder.{name}": value for name, value in decoder_weights.items()}
    return Identified(weights, encoder, decoder, num_classes, release, reason)


def read_published(
    files: PublishedFiles, config: Config, overrides: list[str], release: Release | None = None
) -> SavedNetwork:
    """Read two published files. The `note` of the result says what was assumed about them and how to correct that.

    Args:
        config: is saved with the network; provides what the files lack: data set, evaluation, and PUBLISHED_FREE_KEYS
            if they are overridden.
        overrides: the command line.
        release: 2018 or 2020 if it is known; None: by the rule above.

    Raises:
        CheckpointError: if a file is missing, damaged, or of an unknown architecture.
    """
    found = identify(files, release)
    overridden = list_given_keys(overrides)
    encoder: dict[str, Any] = {"name": found.encoder, "weights": "none", "frozen": False}
    if found.has_output_stride:
        is_given = "model.encoder.output_stride" in overridden
        encoder["output_stride"] = config.model.encoder["output_stride"] if is_given else found.default_output_stride
    is_convention_given = "model.convention" in overridden and config.model.convention != "auto"
    model = replace(
        config.model,
        library="",
        arch="",
        revision=None,
        options={},
        config={},
        name=f"{found.encoder}_{found.decoder.name}",
        encoder=encoder,
        decoder={"name": found.decoder.name, **found.decoder.options},
        convention=config.model.convention if is_convention_given else found.release.convention,
    )
    return SavedNetwork(
        source=str(files),
        weights=found.weights,
        config=replace(config, model=model),
        classes=class_table_for(found.num_classes),
        convention=PREPROCESSING[model.convention],
        epoch=files.epoch,
        note=describe_identified(found, files, model, is_convention_given),
    )


def describe_identified(found: Identified, files: PublishedFiles, model: ModelConfig, is_convention_given: bool) -> str:
    """One line with the network, what was assumed about it, and how to correct that."""
    stride = f" at output stride {model.encoder['output_stride']}" if found.has_output_stride else ""
    origin = "as given" if is_convention_given else f"release of {found.release.year} {found.reason}"
    return (
        f"{files.encoder.parent}: {found.encoder}{stride} + {decoder_label(found.decoder)}, "
        f"{found.num_classes} classes, input {model.convention} ({origin}). "
        f"To correct: {'=... '.join(PUBLISHED_FREE_KEYS)}=..."
    )


def infer_release(files: PublishedFiles, encoder: str) -> tuple[Release, str]:
    """The release of files that are not from the zoo, and the reason."""
    by_name = release_of_folder(files.encoder.resolve().parent.name)
    if by_name:
        return by_name, "by the folder's name"
    reason = "the only one with this encoder" if encoder in ONLY_2020 else "assumed"
    return RELEASES[2020], reason


def identify_encoder(path: Path, weights: dict[str, Tensor]) -> str:
    """The encoder whose state dict has these names and shapes.

    Raises:
        CheckpointError: if there is none; it names the first differences from the nearest one.
    """
    return find_matching_layout(path, weights, {name: encoder_layout(name).tensors for name in PUBLISHED_ENCODERS})


class EncoderLayout(NamedTuple):
    """What is known about an encoder without memory for its weights."""

    channels: tuple[int, ...]
    tensors: dict[str, Tensor]  # on the meta device


@cache
def encoder_layout(name: str) -> EncoderLayout:
    """Names and shapes of the encoder `name`."""
    with torch.device("meta"):
        encoder = build_encoder(name)
    return EncoderLayout(encoder.channels, encoder.state_dict())


def identify_decoder(path: Path, weights: dict[str, Tensor], encoder: str, num_classes: int) -> Network:
    """The decoder and its options whose state dict has these names and shapes.

    Raises:
        CheckpointError: if there is none; it names the first differences from the nearest one.
    """
    channels = encoder_layout(encoder).channels
    with torch.device("meta"):
        candidates = {
            decoder_label(network): (network, build_decoder(network.name, channels, num_classes, **network.options))
            for network in list_possible_decoders(weights, len(channels))
        }
    states = {label: decoder.state_dict() for label, (_, decoder) in candidates.items()}
    return candidates[find_matching_layout(path, weights, states)][0]


def list_possible_decoders(weights: dict[str, Tensor], num_maps: int) -> Iterator[Network]:
    """Every decoder with every option that these weights could belong to."""
    lateral = weights.get("fpn_in.0.0.weight")
    for name, constructor in DECODERS.items():
        options = inspect.signature(constructor.load()).parameters
        if "width" in options:
            yield Network(name, {"width": 512 if lateral is None else lateral.shape[0]})
            continue
        yield Network(name, {})
        if "deep_supervision" in options and num_maps > 1:
            yield Network(name, {"deep_supervision": True})


def find_matching_layout(path: Path, weights: dict[str, Tensor], candidates: dict[str, dict[str, Tensor]]) -> str:
    """The name of the candidate with the same names and shapes; batch counters may be missing.

    Raises:
        CheckpointError: if there is none.
    """
    problems = {name: find_differences(weights, state) for name, state in candidates.items()}
    found = next((name for name, differences in problems.items() if not differences), None)
    if found is not None:
        return found

    def overlap(name: str) -> int:
        state = candidates[name]
        return sum(key in state and state[key].shape == value.shape for key, value in weights.items())

    closest = max(candidates, key=overlap)
    raise CheckpointError(
        f"{path}: matches no published architecture. The nearest is {closest}: {'; '.join(problems[closest])}."
    )


def count_classes(path: Path, weights: dict[str, Tensor]) -> int:
    """The number of classes of a decoder's weights: the outputs of its last convolution.

    Raises:
        CheckpointError: if there is no such convolution.
    """
    outputs = [
        value.shape[0]
        for name, value in weights.items()
        if re.fullmatch(r"conv_last\.(\d+\.)?weight", name) and value.ndim == 4
    ]
    if not outputs:
        found = ", ".join(list(weights)[:3])
        raise CheckpointError(f"{path}: not a published decoder: it has no conv_last (it contains {found}, ...).")
    return outputs[-1]


def class_table_for(num_classes: int) -> ClassTable:
    """The classes of ADE20K if there are 150, otherwise numbered ones."""
    ade20k = built_in_classes("ade20k")
    if num_classes == ade20k.num_classes:
        return ade20k
    return ClassTable.from_names([f"class {index}" for index in range(num_classes)])


def decoder_label(network: Network) -> str:
    """`ppm with deep supervision`, `upernet of width 256`."""
    if network.options.get("deep_supervision"):
        return f"{network.name} with deep supervision"
    return f"{network.name} of width {network.options['width']}" if "width" in network.options else network.name
