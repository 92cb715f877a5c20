"""Stage 5: an encoder and a decoder as one network."""

from __future__ import annotations

from torch import Tensor, nn

from semseg.nets.cpu.pointwise import use_onednn
from semseg.nets.cpu.winograd import use_winograd
from semseg.nets.interfaces import Decoder, Encoder, Logits


class Segmenter(nn.Module):
    """Image to logits. Its strides tell the data pipeline how to pad images and thin labels.

    Args:
        encoder: gives the maps.
        decoder: built with the encoder's channels.
        num_classes: of the logits.

    Attributes:
        convention: how pixel values enter it; bound to the weights it has or starts from.
        winograd: run 3 x 3 convolutions on the CPU the shorter way; see `semseg.nets.cpu.winograd`.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.num_classes = num_classes
        self.convention = encoder.convention
        self.winograd = True

    @property
    def size_divisor(self) -> int:
        """Height and width of an image must be multiples of it."""
        return self.encoder.size_divisor

    @property
    def label_stride(self) -> int:
        """Pixels of the image to one of the main logits."""
        return self.encoder.strides[self.decoder.feature_level]

    def forward(self, image: Tensor) -> Logits:
        """(N, 3, H, W) normalised -> logits, main (N, num_classes, H / label_stride, W / label_stride)."""
        with use_winograd(self.winograd, image), use_onednn(image):
            return self.decoder(self.encoder(image))
