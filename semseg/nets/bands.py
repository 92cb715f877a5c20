"""Stage 5: networks for images with other bands than red, green and blue.

The convolutions that read the image get a channel for each band. Their weights are those for red, green and blue,
repeated and rescaled, so that sums over all channels stay as large: as timm does it for its option in_chans. A band
that is a colour has the weights of that colour.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor, nn

from semseg.config.preprocessing import RGB, BandRange, Preprocessing
from semseg.config.schema import AUTO_RANGE, DataConfig
from semseg.data.bands import BandFile, BandOptions, band_options, describe_bands, format_value_range
from semseg.errors import ConfigError
from semseg.nets.interfaces import SegmentationNetwork

NUM_COLOURS = 3
BYTE = BandRange(0.0, 255.0)


def use_bands(net: SegmentationNetwork, options: BandOptions | None, *, is_adapted: bool = False) -> None:
    """Make a network for red, green and blue one for other bands, in place, with the preprocessing of their values.

    Args:
        options: None: images are 8-bit RGB.
        is_adapted: whether its layers are for these bands already.

    Raises:
        ConfigError: for a network whose first layer is not a convolution of the three colours.
    """
    order = net.convention.channel_order
    net.convention = inherit_convention(net.convention, options)
    if options is not None and not is_adapted:
        adapt_first_layers(net, options.names, order)


def band_convention(base: Preprocessing, options: BandOptions) -> Preprocessing:
    """The preprocessing of bands: for the colours that of the weights, for others as measured.

    What was not measured has the mean of the three colours, whose weights it gets.

    Args:
        base: the preprocessing of the weights, for red, green and blue.
    """
    of_rgb = [list(values) if base.channel_order == "rgb" else list(values)[::-1] for values in (base.mean, base.std)]
    ranges = options.ranges or (BYTE,) * len(options.names)
    means, stds = [], []
    for index, (name, (low, high)) in enumerate(zip(options.names, ranges, strict=True)):
        mean, std = (values[RGB.index(name)] if name in RGB else sum(values) / NUM_COLOURS for values in of_rgb)
        measured_mean = options.mean[index] if options.mean else None
        measured_std = options.std[index] if options.std else None
        factor = 255 * base.scale / (high - low)
        means.append(mean if measured_mean is None else (measured_mean - low) * factor)
        stds.append(std if measured_std is None else measured_std * factor)
    if options.names == RGB and base.channel_order == "bgr":
        means, stds = means[::-1], stds[::-1]
    order = base.channel_order if options.names == RGB else "rgb"
    kept = () if options.ranges is None else tuple(ranges)
    dtype = options.dtype if kept else ""
    return Preprocessing(order, base.scale, tuple(means), tuple(stds), base.antialias, options.names, kept, dtype)


def inherit_convention(saved: Preprocessing, options: BandOptions | None) -> Preprocessing:
    """The preprocessing of initial weights, for these bands; ranges and type are always those of the data.

    Args:
        saved: of the weights, for red, green and blue or for the same bands.
        options: None: images are 8-bit RGB.
    """
    if options is not None and (saved.takes_pictures or saved.bands != options.names):
        return band_convention(saved, options)
    ranges = () if options is None else options.ranges or ()
    return saved._replace(ranges=ranges, dtype=options.dtype if options is not None and ranges else "")


def check_bands(convention: Preprocessing, options: BandOptions | None) -> None:
    """Refuse images whose bands or values are not those of a network; warn of a range that it does not take over.

    Args:
        convention: of the network.
        options: how the images are read; None: they are 8-bit RGB.

    Raises:
        ConfigError: with the keys to set.
    """
    names = RGB if options is None else options.names
    if names == convention.bands and not (convention.ranges and options is None):
        given = None if options is None else options.ranges
        if given and not convention.ranges:
            raise ConfigError(
                f"data.value_range={format_value_range(given)}: the network was trained on 8-bit images, and takes no "
                "range. Leave it out: 16-bit images are then read as 8-bit ones. To train it further on these values, "
                "use init_from instead of ckpt."
            )
        if given and convention.ranges and given != convention.ranges:
            warnings.warn(
                f"data.value_range={format_value_range(given)} is not used: the network keeps that of its training, "
                f"{format_value_range(convention.ranges)}.",
                stacklevel=2,
            )
        return
    ranges = f" data.value_range={format_value_range(convention.ranges)}" if convention.ranges else ""
    raise ConfigError(
        f"data.bands={describe_bands(names)}: the network takes the bands {describe_bands(convention.bands)}"
        f"{', with values beyond 8 bits' if convention.ranges and options is None else ''}. Set "
        f"data.bands={describe_bands(convention.bands)}{ranges}."
    )


def choose_reading(convention: Preprocessing, data: DataConfig) -> BandOptions | None:
    """How images for a network are read; None: as 8-bit RGB.

    Args:
        convention: of the network.
        data: its data set, or another one that does not say anything about bands.

    Raises:
        ConfigError: if the bands of `data` are not those of the network.
    """
    options = band_options(adopt_ranges(data, convention)) if data.has_bands else None
    if options is None and not convention.takes_pictures:
        middle = tuple((low + high) / 2 for low, high in convention.ranges)
        options = BandOptions((BandFile("", convention.bands),), convention.bands, convention.ranges or None, middle)
    check_bands(convention, options)
    return expect_trained_type(options, convention)


def expect_trained_type(options: BandOptions | None, convention: Preprocessing) -> BandOptions | None:
    """The same reading, by which all files must hold the type on which the network was trained, if it is known."""
    return options if options is None or not convention.dtype else replace(options, dtype=convention.dtype)


def adopt_ranges(data: DataConfig, convention: Preprocessing) -> DataConfig:
    """A data set with the bands of a network, whose ranges are those of the network where it has none, or auto."""
    has_ranges = data.value_range not in (None, AUTO_RANGE)
    if has_ranges or not convention.ranges or tuple(data.band_names) != convention.bands:
        return data
    return replace(data, value_range=[list(ends) for ends in convention.ranges])


def adapt_first_layers(net: SegmentationNetwork, names: Sequence[str], channel_order: str = "rgb") -> None:
    """Give all convolutions that read the image a channel for each band; nothing for RGB.

    Args:
        names: of the bands.
        channel_order: in which the weights take red, green and blue.

    Raises:
        ConfigError: if there is no such convolution.
    """
    if tuple(names) == RGB:
        return
    layers = find_first_layers(net)
    if not layers:
        raise ConfigError(
            f"data.bands={list(names)}: {type(net).__name__} has no convolution that reads red, green and blue, "
            "which could read other bands. Choose another network."
        )
    for layer in layers:
        layer.in_channels = len(names)
        layer.weight = nn.Parameter(
            repeat_weights(layer.weight.detach(), names, channel_order), requires_grad=layer.weight.requires_grad
        )
    for part in net.modules():
        # Networks of transformers compare the number of channels of an image with this one.
        if getattr(part, "num_channels", None) == NUM_COLOURS:
            setattr(part, "num_channels", len(names))  # noqa: B010 - a plain attribute of many classes


def find_first_layers(net: SegmentationNetwork, num_channels: int = NUM_COLOURS) -> list[nn.Conv2d]:
    """The convolutions that read an image of so many channels.

    A pointwise convolution outside the backbone is none: decoders squeeze channels, also to three.
    """
    in_backbone = set(net.backbone.modules())
    return [
        layer
        for layer in net.modules()
        if isinstance(layer, nn.Conv2d)
        and layer.in_channels == num_channels
        and layer.groups == 1
        and (layer in in_backbone or layer.kernel_size != (1, 1))
    ]


def repeat_weights(weight: Tensor, names: Sequence[str], channel_order: str = "rgb") -> Tensor:
    """Weights (K, 3, h, w) for red, green and blue as weights (K, bands, h, w).

    >>> repeat_weights(torch.tensor([3.0, 6.0, 9.0]).view(1, 3, 1, 1), ["red", "green", "blue", "nir"]).flatten()
    tensor([2.2500, 4.5000, 6.7500, 2.2500])
    """
    by_colour = weight.flip(1) if channel_order == "bgr" else weight
    if len(names) == 1:
        return by_colour.sum(1, keepdim=True)
    others = cycle(range(NUM_COLOURS))
    places = [RGB.index(name) if name in RGB else next(others) for name in names]
    return (by_colour[:, places] * (NUM_COLOURS / len(names))).contiguous()


def adapt_weights(
    found: dict[str, Tensor], net: SegmentationNetwork, names: Sequence[str], channel_order: str = "rgb"
) -> dict[str, Tensor]:
    """Weights of a network for red, green and blue, of which the first layers are made for other bands.

    Args:
        net: the network for the bands `names`.
    """
    layers = set(find_first_layers(net, len(names)))
    expected = {f"{name}.weight": module.weight for name, module in net.named_modules() if module in layers}
    return {
        name: repeat_weights(value, names, channel_order)
        if name in expected and reads_colours(value, expected[name], len(names))
        else value
        for name, value in found.items()
    }


def reads_colours(found: Tensor, expected: Tensor, num_bands: int) -> bool:
    """Whether `found` is a convolution of red, green and blue, and `expected` the same of `num_bands` bands."""
    if found.ndim != 4 or found.shape[1] != NUM_COLOURS:
        return False
    return expected.shape == torch.Size((found.shape[0], num_bands, *found.shape[2:]))
