"""Networks of the Hugging Face hub that are listed here: the part of the zoo that is on the hub. No torch."""

from __future__ import annotations

from typing import NamedTuple


class HubEntry(NamedTuple):
    """A network of the Hugging Face hub, trained on ADE20K."""

    name: str  # zoo:<name>
    hub_name: str
    licence: str  # in the words of its model card; in brackets what the authors of the weights say


# "other" is what the model cards say. https://github.com/NVlabs/SegFormer#license: "for research or evaluation purposes
# only"; https://github.com/facebookresearch/Mask2Former/blob/main/MODEL_ZOO.md#license: CC BY-NC 4.0.
SEGFORMER_LICENCE = "other (NVIDIA, non-commercial)"
MASK2FORMER_LICENCE = "other (cc-by-nc-4.0)"

HUB_ZOO = {
    entry.name: entry
    for entry in (
        HubEntry("segformer_b0", "nvidia/segformer-b0-finetuned-ade-512-512", SEGFORMER_LICENCE),
        HubEntry("segformer_b1", "nvidia/segformer-b1-finetuned-ade-512-512", SEGFORMER_LICENCE),
        HubEntry("segformer_b2", "nvidia/segformer-b2-finetuned-ade-512-512", SEGFORMER_LICENCE),
        HubEntry("segformer_b3", "nvidia/segformer-b3-finetuned-ade-512-512", SEGFORMER_LICENCE),
        HubEntry("segformer_b4", "nvidia/segformer-b4-finetuned-ade-512-512", SEGFORMER_LICENCE),
        HubEntry("segformer_b5", "nvidia/segformer-b5-finetuned-ade-640-640", SEGFORMER_LICENCE),
        HubEntry("upernet_convnext_tiny", "openmmlab/upernet-convnext-tiny", "mit"),
        HubEntry("upernet_convnext_small", "openmmlab/upernet-convnext-small", "mit"),
        HubEntry("upernet_convnext_base", "openmmlab/upernet-convnext-base", "mit"),
        HubEntry("upernet_convnext_large", "openmmlab/upernet-convnext-large", "mit"),
        HubEntry("dpt_large", "Intel/dpt-large-ade", "apache-2.0"),
        HubEntry("beit_base", "microsoft/beit-base-finetuned-ade-640-640", "apache-2.0"),
        HubEntry("mask2former_swin_tiny", "facebook/mask2former-swin-tiny-ade-semantic", MASK2FORMER_LICENCE),
        HubEntry("mask2former_swin_small", "facebook/mask2former-swin-small-ade-semantic", MASK2FORMER_LICENCE),
        HubEntry("mask2former_swin_base", "facebook/mask2former-swin-base-ade-semantic", MASK2FORMER_LICENCE),
        HubEntry("mask2former_swin_large", "facebook/mask2former-swin-large-ade-semantic", MASK2FORMER_LICENCE),
        HubEntry("eomt_large", "tue-mps/ade20k_semantic_eomt_large_512", "mit"),
    )
}
HUB_LICENCES = {entry.hub_name: entry.licence for entry in HUB_ZOO.values()}
