"""The published segmentation networks of 2018 and 2020: their names, addresses and scores. No torch."""

from __future__ import annotations

from typing import NamedTuple

from semseg.config.schema import ZOO_PREFIX
from semseg.errors import CheckpointError, find_nearest

SERVER_URL = "http://sceneparsing.csail.mit.edu/model/pytorch"
# The image of the original demonstration; mode=predict uses it for a network of the zoo if there is no input.
DEMONSTRATION_IMAGE = (
    "http://sceneparsing.csail.mit.edu/data/ADEChallengeData2016/images/validation/ADE_val_00001519.jpg"
)


class Release(NamedTuple):
    """Properties that all files of one release share."""

    year: int
    convention: str  # a name of CONVENTIONS


RELEASES = {2018: Release(2018, "bgr_mean"), 2020: Release(2020, "rgb_mean_std")}


class PublishedNetwork(NamedTuple):
    """A published network: two files in one folder of the server."""

    name: str  # the file in configs/model/
    folder: str
    epoch: int
    release: Release

    def urls(self) -> tuple[str, str]:
        """The URLs of the encoder's and the decoder's file."""
        encoder, decoder = (
            f"{SERVER_URL}/{self.folder}/{part}_epoch_{self.epoch}.pth" for part in ("encoder", "decoder")
        )
        return encoder, decoder


ZOO = {
    network.name: network
    for network in (
        PublishedNetwork("mobilenetv2_dilated8_c1_deepsup", "ade20k-mobilenetv2dilated-c1_deepsup", 20, RELEASES[2020]),
        PublishedNetwork("resnet18_dilated8_ppm_deepsup", "ade20k-resnet18dilated-ppm_deepsup", 20, RELEASES[2020]),
        PublishedNetwork("resnet50_dilated8_ppm_deepsup", "ade20k-resnet50dilated-ppm_deepsup", 20, RELEASES[2020]),
        PublishedNetwork("resnet101_dilated8_ppm_deepsup", "ade20k-resnet101dilated-ppm_deepsup", 25, RELEASES[2020]),
        PublishedNetwork("upernet50", "ade20k-resnet50-upernet", 30, RELEASES[2020]),
        PublishedNetwork("upernet101", "ade20k-resnet101-upernet", 50, RELEASES[2020]),
        PublishedNetwork("hrnetv2_c1", "ade20k-hrnetv2-c1", 30, RELEASES[2020]),
        # This network was released in both years; this entry has its name of 2018.
        PublishedNetwork(
            "resnet50_dilated8_ppm_bilinear_deepsup",
            "baseline-resnet50_dilated8-ppm_bilinear_deepsup",
            20,
            RELEASES[2018],
        ),
    )
}


class PublishedScore(NamedTuple):
    """Scores on ADE20K validation, in percent."""

    mean_iou: float
    pixel_accuracy: float


class PublishedScores(NamedTuple):
    """The published scores of a network: short edge 450, and the mean over 300, 375, 450, 525 and 600."""

    one_scale: PublishedScore
    five_scales: PublishedScore


PUBLISHED_SCORES = {
    "resnet18_dilated8_c1_deepsup": PublishedScores(PublishedScore(33.82, 76.05), PublishedScore(35.34, 77.41)),
    "resnet18_dilated8_ppm_deepsup": PublishedScores(PublishedScore(38.00, 78.64), PublishedScore(38.81, 79.29)),
    "resnet50_dilated8_ppm_deepsup": PublishedScores(PublishedScore(41.26, 79.73), PublishedScore(42.04, 80.23)),
    "resnet101_dilated8_ppm_deepsup": PublishedScores(PublishedScore(42.19, 80.59), PublishedScore(42.53, 80.91)),
    "upernet50": PublishedScores(PublishedScore(40.44, 79.80), PublishedScore(41.55, 80.23)),
    "upernet101": PublishedScores(PublishedScore(41.98, 80.63), PublishedScore(42.66, 81.01)),
}


def find_published_network(spec: str) -> PublishedNetwork:
    """The entry that `zoo:<name>` names; the folder's name on the server is accepted too.

    Raises:
        CheckpointError: for an unknown name; it lists the nearest one and all.

    >>> find_published_network("zoo:upernet50").urls()[0]
    'http://sceneparsing.csail.mit.edu/model/pytorch/ade20k-resnet50-upernet/encoder_epoch_30.pth'
    """
    name = spec.removeprefix(ZOO_PREFIX)
    by_name = ZOO | {network.folder: network for network in ZOO.values()}
    if name in by_name:
        return by_name[name]
    suggestion = find_nearest(name, by_name)
    hint = f" Did you mean {ZOO_PREFIX}{suggestion}?" if suggestion else ""
    raise CheckpointError(f"{spec}: not in the zoo.{hint} Valid: {', '.join(ZOO)}.")


def release_of_folder(name: str) -> Release | None:
    """The release with this kind of folder name: baseline-... 2018, ade20k-... 2020.

    >>> release_of_folder("ade20k-resnet50-upernet").year
    2020
    """
    years = {"baseline-": 2018, "ade20k-": 2020}
    return next((RELEASES[year] for start, year in years.items() if name.startswith(start)), None)
