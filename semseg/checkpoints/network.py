"""Networks from their configuration: with fresh weights, ImageNet weights, or those of a checkpoint."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

from semseg.checkpoints.format import SavedNetwork
from semseg.checkpoints.initialise import find_differences, load_all_weights, load_backbone_weights
from semseg.checkpoints.zoo import release_of_folder
from semseg.config.origin import WeightsOrigin
from semseg.config.preprocessing import PREPROCESSING, RGB, Preprocessing
from semseg.config.schema import DownloadConfig, ModelConfig, split_network_options
from semseg.data.bands import BandOptions
from semseg.data.classes import ClassTable, find_moved_class
from semseg.errors import CheckpointError, ConfigError, first_line
from semseg.nets.bands import adapt_first_layers, use_bands
from semseg.nets.interfaces import Encoder, NetworkKeys, SegmentationNetwork
from semseg.nets.meta import build_on_meta
from semseg.nets.registry import build_library_network, build_segmenter
from semseg.storage.download import fetch_file
from semseg.storage.ranks import print_once
from semseg.system.text import escape_unprintable

_log = logging.getLogger(__name__)

HUB = "hub"  # model.encoder.weights: the weights of the files that describe the network


def build_network(
    config: ModelConfig,
    num_classes: int,
    download: DownloadConfig | None = None,
    bands: BandOptions | None = None,
) -> SegmentationNetwork:
    """The network, its backbone initialised as model.encoder.weights says, the rest with fresh weights.

    Args:
        download: how to fetch files: ImageNet weights (model.encoder.weights=imagenet), and networks of the hub.
        bands: of the images; the weights of its first layer are then made of those for red, green and blue. None: RGB.

    Raises:
        ConfigError: for unknown names and options.
        CheckpointError: if the weight file does not fit.
        DownloadError: if it cannot be fetched.
    """
    weights = config.encoder.get("weights", "none")
    if weights == HUB:
        download = download or DownloadConfig()
    net, trained = build_architecture(config, num_classes, download), None
    if weights == HUB:
        load_described_weights(net, config)
    elif weights == "imagenet":
        path = fetch_imagenet_weights(net, config.backbone_name, download or DownloadConfig())
        load_backbone_weights(net, path)
        net.adopt_description(path)
        net.origin = imagenet_origin(net)
    elif weights not in (None, "none"):
        path = Path(weights).expanduser()
        net.origin, trained = load_backbone_weights(net, path, RGB if bands is None else bands.names)
        trained = trained or find_published_convention(path)
        net.adopt_description(path)
        print_once(f"weights: {net.origin}")
    if trained is not None:
        net.convention = trained
    if config.convention != "auto":
        net.convention = PREPROCESSING[config.convention]
    use_bands(net, bands, is_adapted=trained is not None and trained.bands != RGB)
    net.has_cpu_kernels = config.winograd
    return net


def find_published_convention(path: Path) -> Preprocessing | None:
    """The preprocessing of an encoder file in a folder of the releases of 2018 and 2020; None for other files."""
    release = release_of_folder(path.resolve().parent.name) if path.name.startswith("encoder_epoch_") else None
    return PREPROCESSING[release.convention] if release else None


def build_architecture(
    config: ModelConfig, num_classes: int, download: DownloadConfig | None = None
) -> SegmentationNetwork:
    """The network of `config`, with fresh weights: an encoder and a decoder, or a whole network (model.library).

    Raises:
        ConfigError: for unknown names and options.
    """
    if config.library:
        keys = NetworkKeys(
            config.arch, config.name, config.encoder, config.options, config.revision, config.config, download
        )
        return build_library_network(config.library, num_classes, keys)
    encoder, encoder_options = split_network_options(config.encoder, "encoder")
    decoder, decoder_options = split_network_options(config.decoder, "decoder")
    return build_segmenter(encoder, decoder, num_classes, encoder_options, decoder_options)


def load_described_weights(net: SegmentationNetwork, config: ModelConfig) -> None:
    """Load the weights that belong to the description that `net` was built from, and say what was loaded.

    Raises:
        ConfigError: for a network that is not described by files.
        CheckpointError: if they do not fit.
    """
    description = getattr(net, "description", None)
    if description is None:
        raise ConfigError(f"model.encoder.weights={HUB}: is for model=transformers, not for {config.title}.")
    from semseg.checkpoints.hub import load_hub_weights  # noqa: PLC0415 - an extra

    print_once(f"weights from {description.source}: {load_hub_weights(net, description).describe()}")
    net.origin = description.origin


def fetch_imagenet_weights(net: SegmentationNetwork | Encoder, name: str, download: DownloadConfig) -> Path:
    """The file of the published ImageNet weights of a network's backbone, downloaded if it is not in the cache.

    Raises:
        ConfigError: if none are published for this backbone.
        DownloadError: if they cannot be fetched.
    """
    file = net.weights_file
    if file is None:
        raise ConfigError(f"model.encoder.weights=imagenet: none are known for {name}. Give a file, or none.")
    print_once(f"weights: {imagenet_origin(net)}")  # before the download, which may be stopped then
    manual = "or set model.encoder.weights to a file you have, or to none for random ones"
    for url in file.beside:
        fetch_file(url, download, folder=file.folder, manual=manual)
    return fetch_file(file.url, download, folder=file.folder, digest=file.digest, manual=manual)


def imagenet_origin(net: SegmentationNetwork | Encoder) -> WeightsOrigin | None:
    """Where the published ImageNet weights of a network's backbone come from; None if there are none."""
    if net.weights_file is None:
        return None
    on_hub = re.match(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/([0-9a-f]{40})?", net.weights_file.url)
    if on_hub is None:
        return WeightsOrigin(net.weights_file.url, net.licence)
    return WeightsOrigin(on_hub[1], net.licence, on_hub[2] or "")


def without_weights(model: ModelConfig) -> ModelConfig:
    """The same network without initial weights, for weights that are loaded into it."""
    return replace(model, encoder=model.encoder | {"weights": "none"})


def load_network(saved: SavedNetwork) -> SegmentationNetwork:
    """The network of a checkpoint with its weights, in eval mode.

    Raises:
        CheckpointError: if any weight is missing, unexpected or of another shape.
    """
    check_network(saved)
    net = build_network(without_weights(saved.config.model), saved.classes.num_classes)
    adapt_first_layers(net, saved.convention.bands)
    load_all_weights(net, saved.weights, f"{saved.source}: its weights do not fit its own configuration")
    net.convention, net.origin = saved.convention, saved.origin
    report_one_size(net, saved.config.model)
    return net.eval()


def report_one_size(net: SegmentationNetwork, config: ModelConfig) -> None:
    """Say what happens to images of other sizes, if the network takes only one."""
    if net.image_size is not None:
        size = f"{net.image_size.height} x {net.image_size.width}"
        print_once(f"{config.title}: takes images of {size} only. Others go through it in windows of that size.")


def check_class_names(classes: ClassTable, data_name: str, saved: SavedNetwork) -> None:
    """Compare the classes of a data set with those of a network that has as many, and warn of other names.

    Raises:
        ConfigError: if they are the same classes in another order.
    """
    names, trained = classes.names, saved.classes.names
    index = find_moved_class(names, trained)
    if index is not None:
        raise ConfigError(
            f"data.classes: the classes of data={data_name} are those of {saved.source} in another order: class "
            f"{index} is {names[index]} here and {trained[index]} there. Give the order of the network; data.map says "
            "which class an id of the labels is."
        )
    if names != trained:
        source = escape_unprintable(saved.source)
        _log.warning("class names of data=%s differ from those in %s: is this the same task?", data_name, source)


def check_network(saved: SavedNetwork) -> None:
    """Refuse a file whose weights and configuration do not fit each other, before memory is allocated.

    Raises:
        CheckpointError: if the network cannot be built, or its weights are missing, unexpected or of another shape.
    """

    def build() -> SegmentationNetwork:
        net = build_network(without_weights(saved.config.model), saved.classes.num_classes)
        adapt_first_layers(net, saved.convention.bands)
        return net

    try:
        net = build_on_meta(build)
    except Exception as error:  # constructors may raise anything for the options of a damaged file
        raise CheckpointError(f"{saved.source}: its network cannot be built: {first_line(error)}") from error
    problems = find_differences(saved.weights, net.state_dict())
    if problems:
        raise CheckpointError(f"{saved.source}: its weights do not fit its own configuration: {'; '.join(problems)}.")
