from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torchvision
from torch import nn

from helpers.reference import golden
from semseg.config.schema import OptimConfig, ScheduleConfig
from semseg.errors import ConfigError
from semseg.nets.registry import build_segmenter
from semseg.training.optim import (
    apply_settings,
    build_optimizer,
    build_schedule,
    build_scheduler,
    choose_fused,
    list_stages,
    parameter_groups,
    split_by_decay,
)


def test_poly_gives_the_published_rates_before_each_step() -> None:
    reference = golden("lr_poly.json")
    schedule = build_schedule(ScheduleConfig(name="poly", power=0.9), reference["max_iters"])
    for step, rate in reference["before_step"].items():
        assert reference["base_lr"] * schedule(int(step)) == pytest.approx(rate, abs=1e-9)
    longer = build_schedule(ScheduleConfig(name="poly", power=0.9), 125000)
    for step, rate in reference["before_step_125000"].items():
        assert 0.02 * longer(int(step)) == pytest.approx(rate, abs=1e-9)


def test_the_scheduler_sets_the_rate_of_step_n_before_step_n() -> None:
    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scheduler = build_scheduler(optimizer, ScheduleConfig(power=1.0), total_steps=4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_warm_up_rises_and_meets_the_schedule() -> None:
    config = ScheduleConfig(name="poly_warmup", power=1.0, warmup_steps=10, warmup_factor=0.0)
    schedule = build_schedule(config, 100)
    assert schedule(0) == 0.0
    assert schedule(5) == pytest.approx(0.5 * 0.95)
    assert schedule(10) == pytest.approx(0.9)


def test_cosine_ends_at_its_floor() -> None:
    schedule = build_schedule(ScheduleConfig(name="cosine", min_factor=0.1), 100)
    assert schedule(0) == pytest.approx(1)
    assert schedule(50) == pytest.approx(0.55)
    assert schedule(100) == pytest.approx(0.1)


def test_only_weights_of_convolutions_and_linear_layers_decay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decay, free = split_by_decay(net)
    assert {id(p) for p in decay} == {id(net[0].weight), id(net[2].weight)}
    assert len(free) == 4
    attention = nn.MultiheadAttention(8, 2, kdim=4)
    decay, free = split_by_decay(attention)
    names = {id(parameter): name for name, parameter in attention.named_parameters()}
    assert sorted(names[id(parameter)] for parameter in decay) == [
        "k_proj_weight", "out_proj.weight", "q_proj_weight", "v_proj_weight",
    ]  # fmt: skip
    assert sorted(names[id(parameter)] for parameter in free) == ["in_proj_bias", "out_proj.bias"]
    attention = nn.MultiheadAttention(8, 2)
    assert any(parameter is attention.in_proj_weight for parameter in split_by_decay(attention)[0])


def test_groups_have_the_published_numbers_of_elements() -> None:
    net = build_segmenter("resnet18", "c1", 150, {"output_stride": 8}, {"deep_supervision": True})
    groups = {group["name"]: group for group in parameter_groups(net, OptimConfig())}
    count = {name: sum(p.numel() for p in group["params"]) for name, group in groups.items()}
    assert count == {
        "encoder": 11_314_880,
        "encoder_no_decay": 10_112,
        "decoder": 923_136,
        "decoder_no_decay": 812,
    }
    assert groups["encoder"]["weight_decay"] == 1e-4
    assert groups["decoder_no_decay"]["weight_decay"] == 0.0


def test_lr_sets_both_rates_and_each_can_be_set_alone() -> None:
    net = build_segmenter("resnet18", "c1", 5, {}, {})
    rates = {g["name"]: g["lr"] for g in build_optimizer(net, OptimConfig(lr=0.1, lr_decoder=0.5)).param_groups}
    assert rates["encoder"] == rates["encoder_no_decay"] == 0.1
    assert rates["decoder"] == rates["decoder_no_decay"] == 0.5


def test_adamw_takes_its_own_settings() -> None:
    net = build_segmenter("resnet18", "c1", 5, {}, {})
    optimizer = build_optimizer(net, OptimConfig(name="adamw", lr=1e-4, momentum=0.8, weight_decay=0.05))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.999)
    assert optimizer.param_groups[0]["weight_decay"] == 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoder", "name", "stages"),
    [
        ("resnet18", None, 5),
        ("mobilenetv2", None, 18),
        ("hrnetv2", None, 5),
        ("torchvision", "resnet18", 5),
        ("torchvision", "convnext_tiny", 5),  # layers that halve the resolution belong to the stage behind them
        ("torchvision", "swin_t", 5),
        ("torchvision", "efficientnet_b0", 9),
        ("timm", "test_convnext", 5),
        ("timm", "test_efficientnet", 6),  # five lists of blocks in one module
        ("timm", "test_vit", 7),
        ("timm", "vit_tiny_patch16_dinov3_qkvb", 13),
        ("timm", "sam2_hiera_tiny", 13),
    ],
)
def test_layer_decay_slows_the_encoder_stage_by_stage_towards_its_input(
    encoder: str, name: str | None, stages: int
) -> None:
    with torch.device("meta"):
        net = build_segmenter(encoder, "c1", 5, {"name": name} if name else {}, {})
    groups = parameter_groups(net, OptimConfig(lr=0.1, layer_decay=0.5, weight_decay=0.01))
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["encoder"] == rates["decoder"] == 0.1
    assert rates["encoder_-1"] == pytest.approx(0.05)
    assert min(rates.values()) == pytest.approx(0.1 * 0.5 ** (stages - 1))
    named = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(named) == sorted(id(parameter) for parameter in net.parameters())
    stem = [parameter for group in groups if group["lr"] == min(rates.values()) for parameter in group["params"]]
    assert any(parameter is next(net.encoder.parameters()) for parameter in stem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("torchvision_name", "timm_name"),
    [("swin_t", "swin_tiny_patch4_window7_224"), ("convnext_tiny", "convnext_tiny")],
)
def test_layer_decay_is_the_same_for_a_network_of_torchvision_and_of_timm(
    torchvision_name: str, timm_name: str
) -> None:
    config, rates = OptimConfig(lr=1, layer_decay=0.7), []
    for encoder, name in (("torchvision", torchvision_name), ("timm", timm_name)):
        pytest.importorskip(encoder)
        with torch.device("meta"):
            net = build_segmenter(encoder, "c1", 5, {"name": name}, {})
        rates.append(sorted({round(group["lr"], 6) for group in parameter_groups(net, config)}))
    assert rates[0] == rates[1] == [0.2401, 0.343, 0.49, 0.7, 1]


def test_stages_without_blocks_are_stages_and_no_transitions() -> None:
    def layers(*channels: int) -> nn.Sequential:
        convolution = nn.Conv2d(*channels, 3, stride=2)
        return nn.Sequential(convolution, nn.BatchNorm2d(channels[1]), nn.ReLU())

    encoder = nn.ModuleDict({f"stage{number}": layers(*sides) for number, sides in enumerate(((3, 4), (4, 4), (4, 8)))})
    assert [len(stage) for stage in list_stages(encoder, encoder)] == [4, 4, 4]
    encoder = nn.ModuleDict(
        {"features_block1": layers(3, 4), "features_transition1": layers(4, 4), "features_block2": layers(4, 8)}
    )
    assert [len(stage) for stage in list_stages(encoder, encoder)] == [4, 8]  # as timm names the parts of DenseNet


def test_a_norm_with_its_activation_is_a_layer_and_no_stage() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    parts = {
        "conv0": nn.Conv2d(3, 4, 3), "norm0": timm_layers.BatchNormAct2d(4), "block1": block,
        "block2": copy.deepcopy(block), "norm5": timm_layers.BatchNormAct2d(4),
    }  # fmt: skip
    encoder = nn.ModuleDict(parts)
    assert [len(stage) for stage in list_stages(encoder, encoder)] == [2 + 2, 4, 4 + 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name", "first", "last"),
    [
        ("smp", "mit_b0", ("patch_embed1", "block1", "norm1"), ("patch_embed4", "block4", "norm4")),
        ("timm", "twins_pcpvt_small", ("patch_embeds.0", "blocks.0", "pos_block.0"), ("patch_embeds.3", "blocks.3")),
        ("torchvision", "regnet_y_400mf", ("stem",), ("trunk_output.block4", "fc")),
        ("timm features", "ese_vovnet19b_slim", ("stem_0", "stem_1", "stem_2"), ("stages_3",)),
        ("timm features", "nextvit_small", ("stem_0", "stem_1", "stem_2", "stem_3"), ("stages_3",)),
    ],
)
def test_stages_of_networks_that_number_their_parts_otherwise(
    library: str, name: str, first: tuple[str, ...], last: tuple[str, ...]
) -> None:
    encoder: Any
    if library == "smp":
        encoder = pytest.importorskip("segmentation_models_pytorch").encoders.get_encoder(name, weights=None)
    elif library.startswith("timm"):
        with torch.device("meta"):
            encoder = pytest.importorskip("timm").create_model(name, features_only="features" in library)
    else:
        encoder = torchvision.models.get_model(name, weights=None)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    stages = [[names[id(parameter)] for parameter in stage] for stage in list_stages(encoder, encoder)]
    assert sorted(names.values()) == sorted(name for stage in stages for name in stage)
    assert len(stages) == (5 if library in ("torchvision", "timm features") else 4)
    assert all(any(name.startswith(part) for name in stages[0]) for part in first)
    assert all(any(name.startswith(part) for name in stages[-1]) for part in last)
    assert not any(name.startswith(last) for stage in stages[:-1] for name in stage)


def test_layer_decay_warns_where_no_stages_are_known() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        net = build_segmenter("timm", "c1", 5, {"name": "vgg11_bn"}, {})
    with pytest.warns(UserWarning, match=r"optim\.layer_decay=0\.5 has no effect, because no stages of this encoder"):
        groups = parameter_groups(net, OptimConfig(lr=0.1, layer_decay=0.5))
    assert {group["lr"] for group in groups} == {0.1}


def test_a_vision_transformer_has_a_stage_per_block_and_its_tokens_are_in_the_first() -> None:
    with torch.device("meta"):
        net = build_segmenter("timm", "c1", 5, {"name": "test_vit"}, {})
    names = {id(parameter): name.removeprefix("encoder.model.model.") for name, parameter in net.named_parameters()}
    found: dict[str, list[str]] = {}
    for group in parameter_groups(net, OptimConfig(layer_decay=0.5)):
        found[group["name"]] = [names[id(parameter)] for parameter in group["params"]]
    assert found["encoder_-6"] == ["patch_embed.proj.weight"]
    assert found["encoder_-6_no_decay"] == ["cls_token", "pos_embed", "patch_embed.proj.bias"]
    for block in range(6):
        name = f"encoder_{block - 5}" if block < 5 else "encoder"
        assert all(part.startswith((f"blocks.{block}.", "norm.")) for part in found[name] + found[f"{name}_no_decay"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_base_r26_s32_224", "vitamin_small_224"])
def test_the_convolutions_that_embed_the_patches_of_a_hybrid_are_before_its_first_block(name: str) -> None:
    with torch.device("meta"):
        encoder = pytest.importorskip("timm").create_model(name)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    stages = [[names[id(parameter)] for parameter in stage] for stage in list_stages(encoder, encoder)]
    assert len(stages) == 1 + len(encoder.blocks)
    assert {name for stage in stages[:1] for name in stage} == {
        name for name in names.values() if name.startswith(("patch_embed.", "cls_token", "pos_embed"))
    }
    assert all(name.startswith(f"blocks.{index}.") for index, stage in enumerate(stages[1:-1]) for name in stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "options", "stages", "first"),
    [
        ("dinov2", {"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 1}, 4, "embeddings.cls_token"),
        ("segformer", {"depths": [1, 1, 1, 1]}, 4, "stages.0.patch_embeddings"),
    ],
)
def test_blocks_of_a_network_of_transformers_are_stages(
    model_type: str, options: dict[str, Any], stages: int, first: str
) -> None:
    from transformers import AutoConfig, AutoModel

    backbone = AutoModel.from_config(AutoConfig.for_model(model_type, **options))
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    found = [[names[id(parameter)] for parameter in stage] for stage in list_stages(backbone, backbone)]
    assert sorted(names.values()) == sorted(name for stage in found for name in stage)
    assert len(found) == stages and found[0][0].startswith(first)
    assert all("layernorm" not in name.split(".") for stage in found[:-1] for name in stage)
    if model_type == "dinov2":  # a backbone that is a list of some of its modules
        parts = nn.ModuleList([backbone.embeddings, backbone.encoder.layer, backbone.layernorm])
        assert [[names[id(parameter)] for parameter in stage] for stage in list_stages(backbone, parts)] == found


def test_a_parameter_in_no_group_is_noticed_in_every_run() -> None:
    net = build_segmenter("resnet18", "c1", 5)
    assert parameter_groups(net, OptimConfig(layer_decay=0.5))
    stages = list_stages(net, net.encoder)
    for wrong in ([stages[0][1:], *stages[1:]], [stages[0] + stages[1][:1], *stages[1:]]):
        with (
            patch("semseg.training.optim.list_stages", return_value=wrong),
            pytest.raises(AssertionError, match="exactly one group"),
        ):
            parameter_groups(net, OptimConfig(layer_decay=0.5))


@pytest.mark.parametrize(
    ("fused", "device", "precision", "expected"),
    [
        (None, "cpu", "32-true", False),
        (None, "cuda", "bf16-mixed", True),
        (None, "cuda", "16-mixed", False),  # its gradient scaler skips steps by the same means
        (False, "cuda", "32-true", False),
        (True, "cpu", "32-true", True),
    ],
)
def test_optimisers_are_fused_on_gpus(fused: bool | None, device: str, precision: str, expected: bool) -> None:
    assert choose_fused(OptimConfig(fused=fused), torch.device(device), precision) == expected


def test_a_fused_optimiser_beside_a_gradient_scaler_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.fused.*16-mixed"):
        choose_fused(OptimConfig(fused=True), torch.device("cuda"), "16-mixed")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_step_equals_one_that_is_not_fused(name: str) -> None:
    weights = []
    for is_fused in (False, True):
        torch.manual_seed(0)
        net = build_segmenter("resnet18", "c1", 3)
        optimizer = build_optimizer(net, OptimConfig(name=name, lr=0.01), is_fused=is_fused)
        for step in range(3):
            for weight in net.parameters():
                weight.grad = torch.full_like(weight, 0.1 * (step + 1))
            optimizer.step()
        weights.append([weight.detach().clone() for weight in net.parameters()])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-7)


def test_a_fused_optimiser_finds_its_number_of_steps_on_the_device_also_after_a_run_that_was_not_fused() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    before = torch.optim.AdamW([weight])
    before.step()
    resumed = torch.optim.AdamW([nn.Parameter(torch.ones(2, device="meta"))])  # another device than the host
    resumed.load_state_dict(before.state_dict())
    scheduler = build_scheduler(resumed, ScheduleConfig(), 10)
    (parameter,) = resumed.param_groups[0]["params"]
    for fused, device in ((False, "cpu"), (True, "meta")):
        given = {name: value for name, value in resumed.param_groups[0].items() if name != "params"}
        apply_settings(resumed, scheduler, [{**given, "fused": fused}])
        assert resumed.state[parameter]["step"].device.type == device
