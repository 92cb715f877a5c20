"""Stage 5: the interface of networks, and those of encoders and decoders.

Worked shapes for an image of 3 x 480 x 608 (both multiples of the largest stride):

| | channels | strides | maps (height x width) |
|---|---|---|---|
| ResNet-50 | 256, 512, 1024, 2048 | 4, 8, 16, 32 | 120 x 152, 60 x 76, 30 x 38, 15 x 19 |
| ResNet-50, output stride 8 | 256, 512, 1024, 2048 | 4, 8, 8, 8 | 120 x 152, 60 x 76, 60 x 76, 60 x 76 |
| MobileNetV2, output stride 8 | 24, 32, 64, 160, 320 | 4, 8, 8, 8, 8 | 120 x 152, then 60 x 76 |
| HRNetV2-W48, joined | 720 | 4 | 120 x 152 |
| ViT-S, patches of 16 | 384, 384, 384, 384 | 16, 16, 16, 16 | 30 x 38, four times |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semseg.config.origin import WeightsOrigin
from semseg.config.preprocessing import PREPROCESSING, Preprocessing
from semseg.config.schema import DownloadConfig
from semseg.data.geometry import Size
from semseg.errors import ConfigError

CLASSIFIER_PREFIXES = ("fc.", "classifier.", "head.")  # weights of ImageNet heads, which no encoder keeps


class Logits(NamedTuple):
    """Class scores before the softmax, at the resolution of the features that they come from."""

    main: Tensor  # (N, num_classes, h, w)
    aux: Tensor | None  # (N, num_classes, h', w') of the auxiliary head; None without a head and in eval mode


class WeightsFile(NamedTuple):
    """The published file of an encoder's ImageNet weights."""

    url: str
    digest: str = ""  # "sha256:<hex>", possibly only the first hex digits; empty: unknown
    folder: str = "imagenet"  # of the download cache
    beside: tuple[str, ...] = ()  # the URLs of files that are fetched into the same folder


class NetworkKeys(NamedTuple):
    """The keys of `model` that choose a whole network: what a constructor of registry.NETWORKS may be handed."""

    arch: str = ""
    name: str = ""
    encoder: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it
    options: dict[str, Any] = {}  # noqa: RUF012
    revision: str | None = None
    config: dict[str, Any] = {}  # noqa: RUF012 - SegmentationNetwork.library_config of a checkpoint; empty: a new network
    download: DownloadConfig | None = None  # how to fetch files; None: without files

    @property
    def encoder_options(self) -> dict[str, Any]:
        """The keys of the section `encoder` that choose an encoder; every whole network has the others."""
        return {key: value for key, value in self.encoder.items() if key not in ("frozen", "weights")}


class SegmentationNetwork(nn.Module, ABC):
    """Image to logits: what training, evaluation, prediction and export need of any network.

    Segmenter (an encoder and a decoder of ours) is one kind; the others are whole networks of another library, or of a
    program (semseg.nets.registry.NETWORKS). A network of a library keeps the library's own module as `self.model`.

    Attributes:
        num_classes: number of classes of the logits.
        convention: how pixel values enter the network, according to the weights that it has or starts from.
        size_divisor: the data pipeline pads height and width of images to multiples of it.
        label_stride: pixels of the image per position of the main logits; divides size_divisor.
        min_size: smaller images are padded to it, by the network.
        image_size: the only size that the network takes, a square; None: any.
        num_void_classes: further outputs of the classifier, for what is none of the classes.
        has_own_loss: whether it trains with `compute_own_loss`, so that the keys of `loss` have no effect.
        revision: the commit of the hub that its files are of; saved as model.revision.
        weights_file: ImageNet weights of its backbone; None if the user has to provide a file.
        licence: that of these weights as the library states it, such as apache-2.0; empty: not stated.
        origin: of the weights that it has or starts from; None: unknown, or random ones.
        export_problem: why it cannot be exported for images of all sizes; empty: it may.
        library_config: plain data (JSON) that rebuilds the network without a file; saved as model.config.
    """

    num_classes: int
    convention: Preprocessing = PREPROCESSING["rgb_mean_std"]
    size_divisor: int
    label_stride: int
    min_size: int = 1
    image_size: Size | None = None
    num_void_classes: int = 0
    has_own_loss: bool = False
    revision: str | None = None
    weights_file: WeightsFile | None = None
    licence: str = ""
    origin: WeightsOrigin | None = None
    export_problem: str = ""
    library_config: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed

    @abstractmethod
    def forward(self, image: Tensor) -> Logits:
        """(N, 3, H, W) normalised -> logits, main (N, num_classes, ceil(H / label_stride), ceil(W / label_stride))."""

    @property
    @abstractmethod
    def backbone(self) -> nn.Module:
        """The part with pretrained weights, on which model.encoder.frozen and optim.lr_encoder act.

        It need not be a module of the network: nn.ModuleList([...]) of some of its modules will do.
        """

    @property
    def architecture(self) -> str:
        """The names of its classes, for messages."""
        return type(self).__name__

    @property
    def has_cpu_kernels(self) -> bool:
        """Whether the network runs on a CPU with the kernels of `semseg.nets.cpu` (configuration: model.winograd)."""
        return False

    @has_cpu_kernels.setter
    def has_cpu_kernels(self, is_enabled: bool) -> None:
        """Only the layers of Segmenter have such kernels."""

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename weights of a file of model.encoder.weights to the names of `backbone`, without a classifier."""
        return {name: value for name, value in published.items() if not name.startswith(CLASSIFIER_PREFIXES)}

    def adopt_description(self, weights: Path) -> None:
        """Called with the file of the weights of `backbone`, for networks that find their preprocessing beside it."""

    def as_graph(self) -> AbstractContextManager[None]:
        """Within it, the network computes with operators that exporters can follow, the same numbers up to rounding."""
        return nullcontext()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As nn.Module.compile, with height and width that are known to be multiples of size_divisor.

        The graph gets an image as cells of size_divisor x size_divisor pixels, and the sizes of all its maps are
        multiples of the same two numbers. As quotients of the height, rounded at each stage, they take PyTorch minutes
        to compare (SAM 2's Hiera: no end after 700 seconds of CPU time; with cells 30). Images of other sizes are
        computed as without compilation.
        """
        from torch._dynamo import mark_static  # noqa: PLC0415 - it takes a second

        @torch.compile(*args, **kwargs)
        def run_cells(cells: Tensor) -> Any:
            return self._call_impl(cells.flatten(4, 5).flatten(2, 3))

        def run(image: Tensor) -> Any:
            height, width = image.shape[2:]
            if height % self.size_divisor or width % self.size_divisor:
                return self._call_impl(image)
            cells = image.unflatten(3, (-1, self.size_divisor)).unflatten(2, (-1, self.size_divisor))
            mark_static(cells, [3, 5])
            return run_cells(cells)

        self._compiled_call_impl = run  # what nn.Module.compile sets

    def set_progress(self, step: int, total_steps: int) -> None:
        """Called before every training step with its number, for what a network changes over a run."""

    def compute_own_loss(self, image: Tensor, label: Tensor) -> tuple[Tensor, Logits] | None:
        """The loss of a network that has a loss of its own, and the logits for the accuracy in the log.

        Args:
            image: (N, 3, H, W) normalised.
            label: (N, H / label_stride, W / label_stride) int64, -1 = ignored.

        Returns:
            None for networks that train with the terms of `loss`.
        """
        return None


class Encoder(nn.Module, ABC):
    """Turns an image into feature maps, fine to coarse: four of them in most encoders.

    Attributes:
        channels: numbers of channels of the maps.
        strides: strides of the maps, in pixels of the image.
        convention: preprocessing of the pixel values, as in the training of its weights.
        weights_file: its ImageNet weights; None if the user has to provide a file.
        licence: that of these weights as the library states it, such as apache-2.0; empty: not stated.
        export_problem: see SegmentationNetwork.
        wants_pyramid: whether the decoder gets a pyramid made of the maps, which all have one stride
            (`semseg.nets.pyramid`).
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    convention: Preprocessing = PREPROCESSING["rgb_mean_std"]
    weights_file: WeightsFile | None = None
    licence: str = ""
    export_problem: str = ""
    wants_pyramid: bool = False

    @property
    def size_divisor(self) -> int:
        """The stride of the deepest map: images are padded to multiples of it, so that no map has part of a pixel."""
        return max(self.strides)

    @abstractmethod
    def forward(self, image: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised -> the maps (N, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))."""

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename published weights to the names of the own state dict, without those of the classifier.

        The default is for files that have our names.
        """
        return {name: value for name, value in published.items() if not name.startswith(CLASSIFIER_PREFIXES)}


def choose_size_divisor(net: SegmentationNetwork, divisor: int | None) -> int:
    """The number of pixels to multiples of which images are padded.

    Args:
        divisor: model.size_divisor, or a setting of the same name; None: the network's own.

    Raises:
        ConfigError: if the logits would not cover a whole number of pixels.
    """
    if divisor and divisor % net.label_stride:
        raise ConfigError(
            f"model.size_divisor={divisor}: must be a multiple of {net.label_stride}, the stride of the logits of this "
            f"network. null selects the network's own value, {net.size_divisor}."
        )
    return divisor or net.size_divisor


class Decoder(nn.Module, ABC):
    """Turns an encoder's maps into logits. Built with the encoder's channels and the number of classes.

    Attributes:
        feature_level: index of the map whose resolution the main logits have.
        reads_pyramid: whether it reads maps of several resolutions.
    """

    feature_level: int
    reads_pyramid: bool = False

    def list_strides(self, strides: Sequence[int]) -> Sequence[int]:
        """The strides of the maps that it works on, for an encoder whose maps have these `strides`."""
        return strides

    @abstractmethod
    def forward(self, maps: Sequence[Tensor]) -> Logits:
        """The encoder's maps, fine to coarse -> logits at the resolution of `maps[feature_level]`."""
