"""Tiny networks of transformers with random weights, one of each family that works, as folders of `save_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

NUM_CLASSES = 3
NAMES = ("wall", "sky", "tree")
HALF_MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def swin(transformers: Any) -> Any:
    return transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def create_config(family: str) -> Any:
    """A configuration of a few thousand parameters."""
    import transformers

    vit = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 16,
    }
    beit = {
        **vit, "image_size": 64, "out_indices": [1, 2, 3, 4], "use_relative_position_bias": True,
        "layer_scale_init_value": 0.1, "auxiliary_channels": 16, "auxiliary_num_convs": 1, "pool_scales": [1, 2],
    }  # fmt: skip
    mask = {
        "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 16,
        "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 16, "num_queries": 6,
        "train_num_points": 64,
    }  # fmt: skip
    eomt = {
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 16, "image_size": 64,
        "num_queries": 5, "num_blocks": 2, "num_upscale_blocks": 2, "train_num_points": 64, "num_register_tokens": 1,
    }  # fmt: skip
    builders: dict[str, Any] = {
        "segformer": lambda: transformers.SegformerConfig(
            depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
            mlp_ratios=[1, 1, 1, 1],
        ),
        "upernet": lambda: transformers.UperNetConfig(
            backbone_config=transformers.ConvNextConfig(
                hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1],
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8, pool_scales=[1, 2],
        ),
        "dpt": lambda: transformers.DPTConfig(
            **vit, image_size=64, neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8,
            backbone_out_indices=[0, 1, 2, 3], is_hybrid=False,
        ),
        "beit": lambda: transformers.BeitConfig(**beit),
        "data2vec-vision": lambda: transformers.Data2VecVisionConfig(**beit),
        "mobilenet_v2": lambda: transformers.MobileNetV2Config(
            depth_multiplier=0.1, depth_divisible_by=2, min_depth=2, output_stride=16
        ),
        "mobilevit": lambda: transformers.MobileViTConfig(
            hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 16], num_attention_heads=2, output_stride=16,
            aspp_out_channels=8, image_size=64,
        ),
        "mobilevitv2": lambda: transformers.MobileViTV2Config(
            width_multiplier=0.1, output_stride=16, aspp_out_channels=8, image_size=64, n_attn_blocks=[1, 1, 1],
            base_attn_unit_dims=[16, 16, 16],
        ),
        "maskformer": lambda: transformers.MaskFormerConfig(
            backbone_config=swin(transformers), fpn_feature_size=64, mask_feature_size=32, use_auxiliary_loss=True,
            decoder_config=transformers.DetrConfig(
                d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=6,
            ),
        ),
        "mask2former": lambda: transformers.Mask2FormerConfig(backbone_config=swin(transformers), **mask),
        "oneformer": lambda: transformers.OneFormerConfig(
            backbone_config=swin(transformers), is_training=True, conv_dim=32, mask_dim=32, hidden_dim=32,
            encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16,
            num_queries=6, train_num_points=64, text_encoder_width=64, text_encoder_num_layers=1,
            text_encoder_vocab_size=49408, query_dec_layers=1, text_encoder_n_ctx=2,
        ),
        "eomt": lambda: transformers.EomtConfig(**eomt),
        "eomt_dinov3": lambda: transformers.EomtDinov3Config(**eomt, intermediate_size=16),
    }  # fmt: skip
    config = builders[family]()
    config.id2label = dict(enumerate(NAMES))
    config.label2id = {name: index for index, name in enumerate(NAMES)}
    return config


def fit_statistics(model: Any) -> None:
    """Set the statistics of batch normalisation to those of a random image: else deep networks give numbers near 0."""
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 64, 64))
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum


SIZES = ["data.short_edges=[64]", "data.max_long_edge=96", "eval.scales=[64]"]


def save_network(family: str, folder: Path, processor: dict[str, Any] | None = None) -> Path:
    """Write a tiny network of a family with random weights to a folder, as transformers does; returns the folder."""
    import transformers

    from semseg.nets.libraries.families import ALL_FAMILIES

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = create_config(family)
        if family == "maskformer":
            config.use_auxiliary_loss = False
        model = getattr(transformers, ALL_FAMILIES[family].class_name)(config)
        for value in model.parameters():  # the initial values are so small that outputs hardly differ
            if value.ndim > 1:
                value.detach().normal_(std=value[0].numel() ** -0.5)
        fit_statistics(model)
    model.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
