"""Plain vision transformers of the kinds in timm, small enough to train and export in a test. Imports no pytest."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from timm.models.eva import Eva, _create_eva
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from torch import nn

_SHARED = {
    "fixed_input_size": True, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "classifier": "head",
    "license": "apache-2.0",
}  # fmt: skip
default_cfgs = generate_default_cfgs(
    {
        "tiny_dinov2.untrained": {**_SHARED, "input_size": (3, 70, 70), "first_conv": "patch_embed.proj"},
        "tiny_dinov3.untrained": {**_SHARED, "input_size": (3, 64, 64), "first_conv": "patch_embed.proj"},
    }
)


@register_model
def tiny_dinov2(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Patches of 14 pixels, 4 registers, positions that are interpolated; 4 blocks, 30 000 parameters."""
    sizes = {"patch_size": 14, "embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 70, "init_values": 0.5}
    tokens = {"reg_tokens": 4, "no_embed_class": True}
    return _create_vision_transformer("tiny_dinov2", pretrained=pretrained, **{**sizes, **tokens, **options})


@register_model
def tiny_dinov3(pretrained: bool = False, **options: Any) -> Eva:
    """Patches of 16 pixels, 4 registers, rotary positions; 4 blocks, 40 000 parameters."""
    sizes = {"patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64, "init_values": 0.5}
    rotary = {
        "rope_type": "dinov3", "rope_temperature": 100, "use_rot_pos_emb": True, "use_abs_pos_emb": False,
        "rope_rotate_half": True, "num_reg_tokens": 4, "dynamic_img_size": True, "use_post_transformer_norm": True,
        "use_fc_norm": False,
    }  # fmt: skip
    return _create_eva("tiny_dinov3", pretrained=pretrained, **{**sizes, **rotary, **options})


def build_timm(name: str, **options: Any) -> nn.Module:
    """timm's own network for images of any size, with its head."""
    return timm.create_model(name, dynamic_img_size=True, **options).eval()
