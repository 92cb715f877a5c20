"""The zoo: trained segmentation networks by name, with their addresses, licences and published scores. No torch.

Two kinds: files of the 2018 and 2020 releases on a server of MIT, and networks of the Hugging Face hub.
"""

from __future__ import annotations

from typing import NamedTuple

from semseg.config.schema import ZOO_PREFIX
from semseg.errors import CheckpointError, suggest
from semseg.storage.hub_list import HUB_ZOO, HubEntry

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


# ---- scores


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


class ScoreSource(NamedTuple):
    """Where scores are published, and what they are."""

    mark: str  # one letter, which stands behind the score in tables
    text: str


CSAIL = ScoreSource("a", "CSAILVision/semantic-segmentation-pytorch, README.md: short edge 450")
DINOV3 = ScoreSource("b", "facebookresearch/dinov3, MODEL_CARD.md: a linear layer on the frozen encoder")
MMSEG_CONVNEXT = ScoreSource("c", "open-mmlab/mmsegmentation, configs/convnext/README.md")
MMSEG_SWIN = ScoreSource("d", "open-mmlab/mmsegmentation, configs/swin/README.md")
MMSEG_SEGFORMER = ScoreSource(
    "e", "open-mmlab/mmsegmentation, configs/segformer/README.md: of its own weights, not of NVIDIA's"
)
UNILM_BEIT = ScoreSource("f", "microsoft/unilm, beit/semantic_segmentation/README.md: sliding windows")
MASK2FORMER = ScoreSource("g", "facebookresearch/Mask2Former, MODEL_ZOO.md")
EOMT = ScoreSource("h", "tue-mps/eomt, model_zoo/dinov2.md: windows of 512 x 512")


class CitedScore(NamedTuple):
    """A published mean IoU on ADE20K validation, in percent, at one scale."""

    mean_iou: float
    source: ScoreSource

    def __str__(self) -> str:
        return f"{self.mean_iou:.1f} {self.source.mark}"


# Of networks with the same architecture and initial weights as those of configs/model/; ours were not trained again.
MODEL_SCORES = {
    **{name: CitedScore(scores.one_scale.mean_iou, CSAIL) for name, scores in PUBLISHED_SCORES.items()},
    "linear_dinov3_vit_small": CitedScore(47.0, DINOV3),
    "linear_dinov3_vit_base": CitedScore(51.8, DINOV3),
    "linear_dinov3_vit_large": CitedScore(54.9, DINOV3),
    "upernet_convnext_tiny": CitedScore(46.11, MMSEG_CONVNEXT),
    "upernet_convnext_small": CitedScore(48.56, MMSEG_CONVNEXT),
    "upernet_swin_tiny": CitedScore(44.41, MMSEG_SWIN),
    "upernet_swin_small": CitedScore(47.72, MMSEG_SWIN),
    "upernet_swin_base": CitedScore(47.99, MMSEG_SWIN),
}
# None is known for sure for those that are missing: mmsegmentation has two of UPerNet with ConvNeXt base, and the paper
# of DPT gives the score of another size.
HUB_SCORES = {
    "segformer_b0": CitedScore(37.41, MMSEG_SEGFORMER),
    "segformer_b1": CitedScore(40.97, MMSEG_SEGFORMER),
    "segformer_b2": CitedScore(45.58, MMSEG_SEGFORMER),
    "segformer_b3": CitedScore(47.82, MMSEG_SEGFORMER),
    "segformer_b4": CitedScore(48.46, MMSEG_SEGFORMER),
    "segformer_b5": CitedScore(49.62, MMSEG_SEGFORMER),
    "upernet_convnext_tiny": CitedScore(46.11, MMSEG_CONVNEXT),
    "upernet_convnext_small": CitedScore(48.56, MMSEG_CONVNEXT),
    "upernet_convnext_large": CitedScore(53.16, MMSEG_CONVNEXT),
    "beit_base": CitedScore(53.61, UNILM_BEIT),
    "mask2former_swin_tiny": CitedScore(47.7, MASK2FORMER),
    "mask2former_swin_small": CitedScore(51.3, MASK2FORMER),
    "mask2former_swin_base": CitedScore(52.4, MASK2FORMER),
    "mask2former_swin_large": CitedScore(56.1, MASK2FORMER),
    "eomt_large": CitedScore(58.4, EOMT),
}


# ---- names


def find_zoo_network(spec: str) -> PublishedNetwork | HubEntry:
    """The entry that `zoo:<name>` names; the folder's name on the server, and the name on the hub, are accepted too.

    Raises:
        CheckpointError: for an unknown name; it lists the nearest one and all.

    >>> find_zoo_network("zoo:upernet50").urls()[0]
    'http://sceneparsing.csail.mit.edu/model/pytorch/ade20k-resnet50-upernet/encoder_epoch_30.pth'
    >>> find_zoo_network("zoo:segformer_b0").hub_name
    'nvidia/segformer-b0-finetuned-ade-512-512'
    """
    name = spec.removeprefix(ZOO_PREFIX)
    by_name: dict[str, PublishedNetwork | HubEntry] = {**ZOO, **HUB_ZOO}
    by_name |= {network.folder: network for network in ZOO.values()}
    by_name |= {entry.hub_name: entry for entry in HUB_ZOO.values()}
    if name in by_name:
        return by_name[name]
    hint = suggest(name, by_name, prefix=ZOO_PREFIX)
    raise CheckpointError(f"{spec}: not in the zoo.{hint} Valid: {', '.join([*ZOO, *HUB_ZOO])}.")


def release_of_folder(name: str) -> Release | None:
    """The release with this kind of folder name: baseline-... 2018, ade20k-... 2020.

    >>> release_of_folder("ade20k-resnet50-upernet").year
    2020
    """
    years = {"baseline-": 2018, "ade20k-": 2020}
    return next((RELEASES[year] for start, year in years.items() if name.startswith(start)), None)
