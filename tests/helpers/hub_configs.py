"""The architectures of the zoo's networks on the hub, which are not described without their files: for their cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from semseg.config.schema import ModelConfig

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SEGFORMER_DEPTHS = {
    "b0": [2, 2, 2, 2], "b1": [2, 2, 2, 2], "b2": [3, 4, 6, 3], "b3": [3, 4, 18, 3], "b4": [3, 8, 27, 3],
    "b5": [3, 6, 40, 3],
}  # fmt: skip
# Depth of the third stage, channels of the first.
CONVNEXT_SIZES = {"tiny": (9, 96), "small": (27, 96), "base": (27, 128), "large": (27, 192)}
# Depth of the third stage, channels and heads of the first, window.
SWIN_SIZES = {"tiny": (6, 96, 3, 7), "small": (18, 96, 3, 7), "base": (18, 128, 4, 12), "large": (18, 192, 6, 12)}


def describe(config: Any) -> ModelConfig:
    """The network of a configuration of transformers."""
    from semseg.nets.libraries.transformers import plain_config

    return ModelConfig(library="transformers", config=plain_config(config), encoder={"weights": "none"})


def segformer(size: str) -> ModelConfig:
    from transformers import SegformerConfig

    return describe(
        SegformerConfig(
            depths=SEGFORMER_DEPTHS[size],
            hidden_sizes=[32, 64, 160, 256] if size == "b0" else [64, 128, 320, 512],
            decoder_hidden_size=256 if size in ("b0", "b1") else 768,
        )
    )


def upernet_convnext(size: str) -> ModelConfig:
    from transformers import ConvNextConfig, UperNetConfig

    depth, width = CONVNEXT_SIZES[size]
    backbone = ConvNextConfig(
        depths=[3, 3, depth, 3], hidden_sizes=[width, 2 * width, 4 * width, 8 * width], out_features=STAGES
    )
    return describe(UperNetConfig(backbone_config=backbone, auxiliary_in_channels=4 * width))


def dpt_large() -> ModelConfig:
    from transformers import DPTConfig

    return describe(
        DPTConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            backbone_out_indices=[5, 11, 17, 23],
            neck_hidden_sizes=[256, 512, 1024, 1024],
            use_batch_norm_in_fusion_residual=True,
            is_hybrid=False,
        )
    )


def beit_base() -> ModelConfig:
    from transformers import BeitConfig

    return describe(
        BeitConfig(
            image_size=640,
            use_relative_position_bias=True,
            use_absolute_position_embeddings=False,
            out_indices=[3, 5, 7, 11],
        )
    )


def mask2former_swin(size: str) -> ModelConfig:
    from transformers import Mask2FormerConfig, SwinConfig

    depth, width, heads, window = SWIN_SIZES[size]
    backbone = SwinConfig(
        depths=[2, 2, depth, 2],
        embed_dim=width,
        num_heads=[heads, 2 * heads, 4 * heads, 8 * heads],
        window_size=window,
        out_features=STAGES,
    )
    return describe(Mask2FormerConfig(backbone_config=backbone, num_queries=100))


def eomt_large() -> ModelConfig:
    from transformers import EomtConfig

    return describe(
        EomtConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=512, num_queries=100)
    )


HUB_CONFIGS: dict[str, Callable[[], ModelConfig]] = {
    **{f"segformer_{size}": partial(segformer, size) for size in SEGFORMER_DEPTHS},
    **{f"upernet_convnext_{size}": partial(upernet_convnext, size) for size in CONVNEXT_SIZES},
    "dpt_large": dpt_large,
    "beit_base": beit_base,
    **{f"mask2former_swin_{size}": partial(mask2former_swin, size) for size in SWIN_SIZES},
    "eomt_large": eomt_large,
}
