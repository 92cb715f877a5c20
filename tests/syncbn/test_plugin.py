"""The LayerSync plugin under Lightning's DDP, and the choice of plugins."""

from __future__ import annotations

import pytest
import torch
from pytorch_lightning.plugins import TorchSyncBatchNorm
from torch import nn

from semseg.errors import ConfigError
from semseg.nets.registry import build_segmenter
from semseg.syncbn.layer import SyncBatchNorm2d
from semseg.syncbn.plugin import LAYER_SYNC_BUILDERS, ReducedBatchNorm, build_layer_sync


def test_reduce_is_ours_native_is_torchs_and_off_is_none() -> None:
    assert set(LAYER_SYNC_BUILDERS) == {"reduce", "native", "off"}
    plugin = build_layer_sync("reduce", "published", "cpu", "node")
    assert isinstance(plugin, ReducedBatchNorm)
    assert (plugin.convention, plugin.group) == ("published", "node")
    assert isinstance(build_layer_sync("native", accelerator="gpu"), TorchSyncBatchNorm)
    assert build_layer_sync("off") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("native", "torch", "cpu"), "runs on CUDA only"),
        (("native", "published", "gpu"), "only syncbn.convention=torch"),
        (("native", "torch", "gpu", "node"), "only syncbn.convention"),
        (("reduse",), "Did you mean reduce"),
        (("reduce", "torhc"), "Did you mean torch"),
        (("reduce", "torch", "cpu", "rack"), "Valid: node, world"),
    ],
)
def test_unsupported_combinations_are_rejected(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_layer_sync(*arguments)


def test_apply_and_revert_without_processes() -> None:
    plugin, net = ReducedBatchNorm(group="node"), nn.Sequential(nn.BatchNorm2d(2))
    assert type(plugin.apply(net)[0]) is SyncBatchNorm2d
    assert type(plugin.revert(net)[0]) is nn.BatchNorm2d


@pytest.mark.slow
def test_ddp_trains_and_validates_with_synchronised_layers_and_restores_plain_ones() -> None:
    from lightning_ranks import under_ddp

    for rank in under_ddp():
        result = rank["small, torch"]
        assert result["seen"] == ["train SyncBatchNorm2d", "val SyncBatchNorm2d", "after BatchNorm2d"]
        assert result["training"] == [True, False]  # the second layer was frozen


def test_a_node_is_the_ranks_of_one_host_and_node_number() -> None:
    from lightning_ranks import under_ddp

    assert [rank["node sizes"] for rank in under_ddp()] == [[2, 1], [2, 1]]


def test_native_refuses_layers_with_an_activation_which_it_would_leave_out() -> None:
    plugin = build_layer_sync("native", accelerator="gpu")
    assert plugin is not None
    with torch.device("meta"):
        net = build_segmenter("timm", "c1", 5, {"name": "regnety_002"}, {})
        without = build_segmenter("timm", "c1", 5, {"name": "repvgg_a0"}, {})  # those of its layers do nothing
        plain = build_segmenter("resnet18", "c1", 5)
    with pytest.raises(ConfigError, match=r"leave out the activation in 27 layers \(BatchNormAct2d\) of this network"):
        plugin.apply(net)
    for other in (without, plain):
        assert any(isinstance(layer, nn.SyncBatchNorm) for layer in plugin.apply(other).modules())
