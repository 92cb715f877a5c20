"""Every ready-made network takes a step on real ADE20K images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from semseg.build import build_data, build_module
from semseg.checkpoints.network import build_network
from semseg.config.compose import compose_config, list_options
from semseg.config.validate import check_config
from semseg.data.sources import DataSource
from semseg.training.losses import segmentation_loss
from semseg.training.optim import build_optimizer

# Of the families with several sizes, one network each; the others take half an hour. REPEATED has blocks of others.
FEW = {"upernet_swin_tiny", "upernet_convnext_tiny", "linear_dinov2_vit_small"}
REPEATED = {
    "upernet101", "upernet_resnext101", "resnet101_dilated8_ppm_deepsup", "resnet50_dilated8_ppm_deepsup",
    "resnet50_dilated8_c1_deepsup",
}  # fmt: skip
OF_A_FAMILY = ("dinov2_vit", "dinov3_vit", "convnext", "swin", "sam2")
MODELS = [
    pytest.param(
        name,
        marks=[pytest.mark.long]
        if name in REPEATED or (any(kind in name for kind in OF_A_FAMILY) and name not in FEW)
        else [],
    )
    for name in list_options("model")
    if name not in ("custom", "smp", "transformers")  # which need the name of a network
]


@pytest.mark.shared
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.slow
def test_a_step_on_real_images_gives_every_weight_a_gradient(model: str, shared: Path) -> None:
    config = check_config(
        compose_config(
            [f"model={model}", "model.encoder.weights=none", f"data.root={shared / 'ade20k_samples'}",
             "data.train.list=training.odgt", "data.val.list=validation.odgt", "data.short_edges=[64]",
             "data.num_workers=0"]
        )
    )  # fmt: skip
    torch.manual_seed(0)
    source = DataSource(config.data)
    net = build_network(config.model, source.classes.num_classes)
    for layer in net.modules():  # stochastic depth idles a block now and then
        if type(layer).__name__ == "StochasticDepth":
            layer.p = 0.0
        elif type(layer).__name__ == "DropPath":
            layer.drop_prob = 0.0
    module = build_module(config, net, source.classes)
    optimizer = build_optimizer(net, config.optim)

    batch = next(iter(build_data(config, source, net).train_dataloader()))
    assert batch.image.shape[0] == 2
    loss = segmentation_loss(
        net(module.prepare_input(batch.image, batch.size)), batch.label.long(), config.model.deepsup_weight
    )
    loss.total.backward()
    optimizer.step()

    assert torch.isfinite(loss.total) and int(loss.scored) > 0
    idle = [name for name, value in net.named_parameters() if value.grad is None or not value.grad.any()]
    assert idle == []
