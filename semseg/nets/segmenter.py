"""Stage 5: an encoder and a decoder as one network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from semseg.nets.interfaces import Decoder, Encoder, Logits, SegmentationNetwork
from semseg.nets.upsampled_conv import UpsampledConcatConv


class Segmenter(SegmentationNetwork):
    """Image to logits. The data pipeline pads images and thins labels according to its strides.

    Args:
        encoder: gives the maps.
        decoder: built with the encoder's channels.
        num_classes: number of classes of the logits.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.num_classes = num_classes
        self.convention = encoder.convention
        strides = decoder.list_strides(encoder.strides)
        self.size_divisor = max(encoder.size_divisor, *strides)
        self.label_stride = strides[decoder.feature_level]
        self.weights_file = encoder.weights_file
        self.licence = encoder.licence
        self.export_problem = encoder.export_problem
        self._has_cpu_kernels = True

    @property
    def backbone(self) -> Encoder:
        """The encoder."""
        return self.encoder

    @property
    def architecture(self) -> str:
        """The class names of encoder and decoder."""
        return f"{type(self.encoder).__name__} + {type(self.decoder).__name__}"

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """As the encoder does."""
        return self.encoder.convert_weights(published)

    @property
    def has_cpu_kernels(self) -> bool:
        """Whether the network runs on a CPU with the kernels of `semseg.nets.cpu` (configuration: model.winograd).

        False: PyTorch's operators only, in the order in which the architecture is written down.
        """
        return self._has_cpu_kernels

    @has_cpu_kernels.setter
    def has_cpu_kernels(self, is_enabled: bool) -> None:
        self._has_cpu_kernels = is_enabled
        for module in self.modules():
            if isinstance(module, UpsampledConcatConv):
                module.factored = None if is_enabled else False

    def forward(self, image: Tensor) -> Logits:
        """(N, 3, H, W) normalised -> logits, main (N, num_classes, H / label_stride, W / label_stride)."""
        # Compilers and exporters get the operators as they are, and have kernels of their own.
        if not self._has_cpu_kernels or image.device.type != "cpu" or torch.compiler.is_compiling():
            return self.compute_logits(image)
        from semseg.nets.cpu.kernels import use_cpu_kernels  # noqa: PLC0415 - only where a network runs on the CPU

        with use_cpu_kernels():
            return self.compute_logits(image)

    def compute_logits(self, image: Tensor) -> Logits:
        """As `forward`, with the kernels that are in use."""
        logits = self.decoder(self.encoder(image))
        height, width = image.shape[-2:]
        if torch.compiler.is_compiling() or not (height % self.size_divisor or width % self.size_divisor):
            return logits
        # Finer maps that are made of the encoder's cover the part of its last cells that is outside of the image too.
        rows, columns = -(-height // self.label_stride), -(-width // self.label_stride)
        return logits._replace(main=logits.main[..., :rows, :columns])


def is_convolutional(net: nn.Module) -> bool:
    """Whether a network has no linear layers, which attention and ConvNeXt have: channels_last may pay for it."""
    return not any(isinstance(module, nn.Linear) for module in net.modules())
