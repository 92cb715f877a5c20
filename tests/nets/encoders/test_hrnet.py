from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.contract import check_layout, check_maps, check_one_pixel_trains, check_start
from semseg.checkpoints.initialise import find_differences
from semseg.nets.blocks import BatchNorm2d
from semseg.nets.encoders.hrnet import HRNetBatchNorm2d, HRNetV2
from semseg.nets.registry import build_decoder
from semseg.syncbn.layer import convert_batch_norms, revert_batch_norms

BRANCHES = (48, 96, 192, 384)


@pytest.fixture(scope="module")
def encoder() -> HRNetV2:
    torch.manual_seed(0)
    return HRNetV2()


def test_it_starts_as_published(encoder: HRNetV2) -> None:
    check_start(encoder, 0.0, "fan_out")


def test_the_joined_map_is_the_image_over_4_rounded_up(encoder: HRNetV2) -> None:
    check_maps(encoder, (720,), (4,))
    assert encoder.size_divisor == 32  # the coarsest branch has whole pixels


def test_state_dict_is_the_published_one(encoder: HRNetV2) -> None:
    check_layout(encoder, "encoder/hrnetv2")


def test_one_image_of_one_pixel_trains(encoder: HRNetV2) -> None:
    check_one_pixel_trains(encoder)


@torch.no_grad()
@pytest.mark.slow
def test_the_joined_map_is_the_branches_resized_to_the_finest(encoder: HRNetV2) -> None:
    with torch.device("meta"):
        apart = HRNetV2(join=False)
    assert (apart.channels, apart.strides, apart.size_divisor) == (BRANCHES, (4, 8, 16, 32), 32)
    apart.load_state_dict(encoder.state_dict(), assign=True)
    image = torch.randn(1, 3, 97, 33)
    (joined,), branches = encoder.eval()(image), apart.eval()(image)
    assert [tuple(branch.shape[-2:]) for branch in branches] == [(25, 9), (13, 5), (7, 3), (4, 2)]
    for ours, branch in zip(joined.split(BRANCHES, 1), branches, strict=True):
        assert torch.equal(ours, F.interpolate(branch, size=(25, 9), mode="bilinear", align_corners=False))


@pytest.mark.parametrize("decoder", ["c1", "ppm"])
def test_published_decoders_fit_the_joined_map(decoder: str) -> None:
    with torch.device("meta"):
        check_layout(build_decoder(decoder, (720,), 150), f"decoder/{decoder}/720")


def test_the_classification_head_of_a_weight_file_is_left_out(encoder: HRNetV2) -> None:
    head = {
        name: torch.empty(1) for name in ("incre_modules.0.0.conv1.weight", "final_layer.0.bias", "classifier.bias")
    }
    assert find_differences(encoder.convert_weights({**encoder.state_dict(), **head}), encoder.state_dict()) == []
    assert encoder.weights_file is not None
    assert encoder.weights_file.url.endswith("/pretrained_resnet/hrnetv2_w48-imagenet.pth")


def test_its_norms_follow_the_statistics_faster_in_the_published_convention(encoder: HRNetV2) -> None:
    norms = [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 305
    assert all(type(layer) is HRNetBatchNorm2d for layer in norms)
    layers = convert_batch_norms(nn.Sequential(HRNetBatchNorm2d(1), BatchNorm2d(1)), "published")
    for layer, mean in zip(layers, (1.9, 1.999), strict=True):
        layer(torch.tensor([mean - 1, mean + 1]).view(2, 1, 1, 1))
        assert layer.running_mean == pytest.approx(1)  # the first step weighs 1 / (1 - momentum + 1)
    assert [type(layer) for layer in revert_batch_norms(layers)] == [HRNetBatchNorm2d, BatchNorm2d]
