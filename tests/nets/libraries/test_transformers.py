"""Networks of transformers: their logits are the library's own, and they go through training and all modes.

All in one file, so that one worker imports the classes, which takes seconds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed.two_steps import train_two_steps
from torch import Tensor, nn

from helpers.command_line import TINY, run_here
from helpers.fake_hub import COMMIT, add_to_cache, use_hub
from helpers.ranks import launch
from helpers.transformers_networks import HALF_MEAN, NAMES, NUM_CLASSES, SIZES, create_config, save_network
from semseg.checkpoints.format import SavedNetwork, read_checkpoint, write_ckpt
from semseg.checkpoints.initialise import initialise_from
from semseg.checkpoints.network import build_network
from semseg.config.load import load_config
from semseg.config.schema import AugmentConfig, Config, DataConfig, DownloadConfig, LossConfig, ModelConfig, OptimConfig
from semseg.data.classes import ClassTable
from semseg.data.crops import choose_crop
from semseg.data.geometry import Size
from semseg.data.scenes import make_scenes
from semseg.errors import CheckpointError, ConfigError, ExportError, SemsegError
from semseg.evaluation.inference import run_in_windows
from semseg.modes.train import find_own_loss
from semseg.nets.cost import measure_cost
from semseg.nets.libraries.description import describe_hub_network, read_convention
from semseg.nets.libraries.families import ALL_FAMILIES, build_from_config
from semseg.nets.libraries.mask_classification import (
    MASK_FAMILIES,
    annealed_shares,
    find_replacements,
    semantic_scores,
)
from semseg.nets.libraries.transformers import IMAGENET, SEMANTIC_FAMILIES, TransformersNetwork, plain_config
from semseg.nets.normalise import normalise
from semseg.training.losses import segmentation_loss
from semseg.training.optim import parameter_groups
from semseg.training.unused import freeze_unused, summarise_modules

pytestmark = pytest.mark.slow
IN_EVERY_RUN = ("segformer", "eomt")  # one of each kind; the others are in `make test-long`
EVERY_FAMILY = [pytest.param(name, id=name) for name in ALL_FAMILIES]
# What the loss does not depend on, in tiny networks whose layers are all read but the last of BEiT.
UNUSED = {
    "dpt": ["model.dpt.layernorm", "model.neck.fusion_stage.layers.0.residual_layer1"],
    "beit": ["model.beit.layers.3"],
    "data2vec-vision": ["model.data2vec_vision.encoder.layer.3"],
    "mobilenet_v2": ["model.mobilenet_v2.conv_1x1"],
    "maskformer": ["model.model.pixel_level_module.encoder.model.layernorm"],
    "mask2former": ["model.model.pixel_level_module.encoder.swin.layernorm"],
    "oneformer": ["model.model.pixel_level_module.encoder.swin.layernorm", "model.criterion"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By family: the folder of a tiny network with random weights, written once."""
    return cache(lambda family: save_network(family, tmp_path_factory.mktemp("networks") / family, HALF_MEAN))


@pytest.fixture(scope="module")
def load(folder: Callable[[str], Path]) -> Callable[..., TransformersNetwork]:
    """By family and number of classes: the network with the weights of its folder, in eval mode."""

    @cache
    def build(family: str, num_classes: int) -> TransformersNetwork:
        config = ModelConfig(library="transformers", name=str(folder(family)), encoder={"weights": "hub"})
        net = build_network(config, num_classes)
        assert isinstance(net, TransformersNetwork)
        return net.eval()

    return lambda family, num_classes=NUM_CLASSES: deepcopy(build(family, num_classes))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def load_library(folder: Path, family: str) -> Any:
    """The network as a program with transformers alone loads it."""
    import transformers

    options = {"is_training": False} if family == "oneformer" else {}
    return getattr(transformers, ALL_FAMILIES[family].class_name).from_pretrained(folder, **options)


def image_for(net: TransformersNetwork, count: int = 1) -> Tensor:
    return torch.randn(count, 3, *(net.image_size or (64, 96)))


def total_loss(net: TransformersNetwork, image: Tensor, label: Tensor) -> Tensor:
    own = net.compute_own_loss(image, label)
    return segmentation_loss(net(image), label).total if own is None else own[0]


def random_label(net: TransformersNetwork, image: Tensor) -> Tensor:
    sides = (side // net.label_stride for side in image.shape[-2:])
    return torch.randint(-1, net.num_classes, (len(image), *sides))


# ---- exactness


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_logits_and_the_state_dict_are_those_of_the_library(
    folder: Callable[[str], Path], load: Callable[..., TransformersNetwork], family: str
) -> None:
    net, library = load(family), load_library(folder(family), family)
    state = net.model.state_dict()
    assert list(state) == list(library.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in library.state_dict().items())
    image = image_for(net, 2) if family != "dpt" else torch.randn(2, 3, 64, 64)  # the library's takes squares only
    if family == "eomt_dinov3":
        image = image[..., :64]  # the library takes config.image_size unless its grid is set
    logits = net(image).main
    assert logits.shape == (2, NUM_CLASSES, *(side // net.label_stride for side in image.shape[-2:]))
    if family in MASK_FAMILIES:
        given = {"task_inputs": torch.tensor([[49406, 518, 10549, 533, 29119, 1550, 49407] + [0] * 70] * 2)}
        expected = library(image, **(given if family == "oneformer" else {}))
        ours = net.model(image, **(given if family == "oneformer" else {}))
        for name in ("class_queries_logits", "masks_queries_logits"):
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, semantic_scores(expected), rtol=1e-5, atol=1e-5)
        scores = torch.einsum(
            "bqc,bqhw->bchw",
            expected.class_queries_logits.softmax(-1)[..., :-1],
            expected.masks_queries_logits.sigmoid(),
        )
        torch.testing.assert_close(logits.exp(), scores.clamp_min(1e-6), rtol=1e-4, atol=1e-6)
    else:
        expected = library(image).logits
        if family == "upernet":  # upsamples to the image inside
            logits = F.interpolate(logits, expected.shape[-2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert expected.std() > 1e-3, "these weights show something"


@torch.no_grad()
def test_dpt_takes_images_that_are_no_squares_and_the_grid_of_eomt_on_dinov3_follows_the_image(
    load: Callable[..., TransformersNetwork],
) -> None:
    net = load("dpt")
    tall, wide = net(torch.zeros(1, 3, 96, 64)).main, net(torch.zeros(1, 3, 64, 96)).main
    assert tall.shape[-2:] == (96, 64) and wide.shape[-2:] == (64, 96)
    net = load("eomt_dinov3")
    image = torch.randn(1, 3, 64, 96)
    logits = net(image).main
    library = deepcopy(net.model)
    library.grid_size = (4, 6)
    torch.testing.assert_close(logits, semantic_scores(library(image)))


# ---- the contract


@torch.no_grad()
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_any_size_or_the_one_that_is_stated(load: Callable[..., TransformersNetwork], family: str) -> None:
    net = load(family)
    if net.image_size is None:
        logits = net(torch.randn(1, 3, 65, 97)).main
        assert logits.shape == (1, NUM_CLASSES, -(-65 // net.label_stride), -(-97 // net.label_stride))
        return
    with pytest.raises(ConfigError, match="takes images of 64 x 64 pixels only, not 65 x 97"):
        net(torch.randn(1, 3, 65, 97))
    for size in (Size(96, 160), Size(32, 64)):
        logits = run_in_windows(net, torch.randn(2, 3, *size), None, None)
        assert logits.shape == (2, NUM_CLASSES, size.height // net.label_stride, size.width // net.label_stride)
    with pytest.raises(ConfigError, match="window=32: this network takes windows of 64 pixels only"):
        run_in_windows(net, torch.randn(1, 3, 64, 128), 32, None)


@torch.no_grad()
def test_a_window_of_the_one_size_is_what_the_network_says_of_it(load: Callable[..., TransformersNetwork]) -> None:
    net, image = load("eomt"), torch.randn(1, 3, 64, 128)
    logits = run_in_windows(net, image, 64, 64)
    torch.testing.assert_close(logits, torch.cat([net(image[..., :64]).main, net(image[..., 64:]).main], -1))


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_it_trains_on_one_image_and_names_what_it_does_not_use(
    load: Callable[..., TransformersNetwork], family: str
) -> None:
    net = load(family, 5).train()
    unused = freeze_unused(net, lambda logits, label: segmentation_loss(logits, label).total)
    assert summarise_modules(unused, net) == UNUSED.get(family, [])
    for count in (1, 2):
        image = image_for(net, count)
        loss = total_loss(net, image, random_label(net, image))
        assert loss.ndim == 0 and loss.isfinite()
        net.zero_grad()
        loss.backward()
        for name, value in net.named_parameters():
            assert (value.grad is not None) == value.requires_grad, name
            assert value.grad is None or value.grad.isfinite().all(), name
    image = image_for(net)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net.eval()(image).main.isfinite().all()
        assert torch.equal(net(image).main, net(image).main)
        assert total_loss(net.train(), image, random_label(net, image)).isfinite()


@pytest.mark.parametrize("family", ["upernet", "dpt", "beit", "data2vec-vision"])
def test_an_auxiliary_head_trains_or_is_frozen(load: Callable[..., TransformersNetwork], family: str) -> None:
    net = load(family).train()
    assert net(image_for(net)).aux is not None
    assert net.eval()(image_for(net)).aux is None
    unused = freeze_unused(net.train(), lambda logits, label: segmentation_loss(logits, label, 0.0).total)
    assert "model.auxiliary_head" in summarise_modules(unused, net)


@pytest.mark.parametrize(
    "family",
    [
        name if name in (*IN_EVERY_RUN, "oneformer") else pytest.param(name, marks=pytest.mark.long)
        for name in ALL_FAMILIES
    ],
)
def test_its_backbone_is_part_of_it_and_its_cost_is_known(
    load: Callable[..., TransformersNetwork], family: str
) -> None:
    net = load(family)
    ours = {id(value) for value in net.parameters()}
    backbone = {id(value) for value in net.backbone.parameters()}
    assert backbone < ours and not any(
        id(value) in backbone for name, value in net.named_parameters() if "class_predictor" in name or "head" in name
    )
    cost = measure_cost(net.to("meta"))
    assert cost.parameters == sum(value.numel() for value in net.parameters())
    assert (cost.flops > 0) == (family != "oneformer"), "OneFormer looks at values"


# The stages of layer decay: before the first block, its blocks (or stages).
STAGES = {
    "segformer": 4, "upernet": 5, "dpt": 5, "beit": 5, "data2vec-vision": 5, "mobilenet_v2": 17, "mobilevit": 6,
    "mobilevitv2": 6, "maskformer": 5, "mask2former": 5, "oneformer": 5, "eomt": 4, "eomt_dinov3": 4,
}  # fmt: skip


def test_layer_decay_knows_the_stages_of_every_backbone() -> None:
    found = {}
    for family in ALL_FAMILIES:
        with torch.device("meta"):
            net = build_from_config(plain_config(create_config(family)), NUM_CLASSES)
        groups = parameter_groups(net, OptimConfig(layer_decay=0.5))
        assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
        found[family] = sum(group["name"].startswith("encoder") and "no_decay" not in group["name"] for group in groups)
    assert found == STAGES


# ---- mask classification


@pytest.mark.parametrize("family", list(MASK_FAMILIES))
def test_ignored_pixels_are_left_out_exactly_and_images_without_a_class_work(
    load: Callable[..., TransformersNetwork], family: str
) -> None:
    net = load(family).train()
    image = image_for(net, 2)
    label = random_label(net, image)
    label[0, :5] = -1
    seen: list[Tensor] = []

    def keep(criterion: nn.Module, args: Any, kwargs: Any) -> None:
        masks = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 4]
        more = kwargs.get("auxiliary_predictions") or (args[4] if len(args) > 4 else None) or []
        for one in [*masks, *(prediction["masks_queries_logits"] for prediction in more)]:
            one.retain_grad()
            seen.append(one)

    net.model.criterion.register_forward_pre_hook(keep, with_kwargs=True)
    loss, logits = net.compute_own_loss(image, label) or pytest.fail("it has a loss of its own")
    loss.backward()
    assert not logits.main.requires_grad and logits.main.shape == (2, NUM_CLASSES, *label.shape[-2:])
    assert len(seen) == {"maskformer": 1, "mask2former": 2, "oneformer": 2}.get(family, 3), "of every layer"
    for masks in seen:
        assert masks.grad is not None
        ignored = (label == -1)[:, None].expand_as(masks)
        assert not masks.grad[ignored].any() and masks.grad[~ignored].any()
    label[0] = -1
    for nothing in (label, torch.full_like(label, -1)):
        net.zero_grad()
        loss, _ = net.compute_own_loss(image, nothing) or pytest.fail("it has a loss of its own")
        loss.backward()
        assert loss.isfinite() and all(value.grad is None or value.grad.isfinite().all() for value in net.parameters())


def test_the_loss_of_masks_is_refused_in_other_types_than_float32(load: Callable[..., TransformersNetwork]) -> None:
    net = load("eomt").bfloat16()
    with pytest.raises(ConfigError, match=r"needs weights in float32, not bfloat16\. Use bf16-mixed or 32-true"):
        net.compute_own_loss(image_for(net).bfloat16(), torch.zeros(1, 16, 16, dtype=torch.int64))


def test_replacements_are_scored_places() -> None:
    label = torch.tensor([[[-1, 2, -1], [-1, 0, -1]], [[-1] * 3] * 2])
    index = find_replacements(label)
    assert index.tolist() == [[1, 1, 1, 1, 4, 4], [0, 1, 2, 3, 4, 5]]


def test_masked_attention_is_annealed_by_the_step_alone_and_evaluation_draws_nothing(
    load: Callable[..., TransformersNetwork],
) -> None:
    assert annealed_shares(0, 100, 2) == [1.0, 1.0]
    assert annealed_shares(25, 100, 2) == [1.0, 1.0]
    assert annealed_shares(50, 100, 2) == [0.0, 1.0]
    assert annealed_shares(75, 100, 2) == [0.0, 0.0]
    assert annealed_shares(25 + 12, 100, 2)[0] == pytest.approx((13 / 25) ** 0.9)
    net = load("eomt")
    assert net.model.attn_mask_probs.tolist() == [1, 1]
    image, outputs = image_for(net), {}
    for step in (0, 60, 74, 99):
        net.set_progress(step, 100)
        state = torch.get_rng_state()
        with torch.no_grad():
            outputs[step] = net(image).main
        assert torch.equal(torch.get_rng_state(), state)
        assert net.model.attn_mask_probs.tolist() == pytest.approx(list(annealed_shares(step, 100, 2)))
    assert torch.equal(outputs[74], outputs[99]) and not torch.equal(outputs[0], outputs[99])
    assert torch.equal(outputs[60], outputs[0]) is False


# ---- files


def test_the_image_processor_says_how_pixels_enter() -> None:
    assert read_convention({}, IMAGENET, "x") == IMAGENET
    old = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "reduce_labels": True, "size": 512}
    assert read_convention(old, IMAGENET, "x")[:4] == ("rgb", 1 / 255, (0.5,) * 3, (0.25,) * 3)
    flipped = {"do_flip_channel_order": True, "do_rescale": True, "rescale_factor": 0.00392156862745098}
    bgr = SEMANTIC_FAMILIES["mobilevit"].convention
    assert read_convention(flipped, bgr, "x")[:4] == ("bgr", 1 / 255, (0.0,) * 3, (1.0,) * 3)
    unscaled = {"do_rescale": False, "do_normalize": False}
    assert read_convention(unscaled, IMAGENET, "x")[:4] == ("rgb", 1.0, (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(CheckpointError, match="x: its image processor is damaged: mean of the preprocessing"):
        read_convention({"image_mean": [0.5]}, IMAGENET, "x")


def test_names_and_preprocessing_come_with_the_network(folder: Callable[[str], Path]) -> None:
    description = describe_hub_network(str(folder("segformer")))
    assert description.class_names == NAMES
    assert description.convention.mean == (0.5, 0.5, 0.5)
    assert not description.reduces_labels
    assert "id2label" not in description.config and json.loads(json.dumps(description.config)) == description.config


@pytest.mark.parametrize("family", list(MASK_FAMILIES)[-2:] + list(SEMANTIC_FAMILIES)[:2])
def test_only_the_classifier_changes_with_the_classes(
    load: Callable[..., TransformersNetwork], capsys: pytest.CaptureFixture[str], family: str
) -> None:
    same, other = load(family).state_dict(), load(family, 5).state_dict()
    changed = {name for name, value in other.items() if not torch.equal(value, same.get(name, torch.empty(0)))}
    heads = tuple(f"model.{name}" for name in ALL_FAMILIES[family].classifiers)
    assert changed and all(name.startswith((*heads, "model.criterion.empty_weight")) for name in changed)
    if family in MASK_FAMILIES:
        assert other["model.criterion.empty_weight"].tolist() == pytest.approx([1] * 5 + [0.1])


def test_a_backbone_that_was_trained_on_images_alone_is_a_start(
    tmp_path: Path, folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    config = transformers.SegformerConfig.from_pretrained(folder("segformer"))
    transformers.SegformerForImageClassification(config).save_pretrained(tmp_path)
    model = ModelConfig(library="transformers", name=str(tmp_path), encoder={"weights": "hub"})
    net = build_network(model, 5)
    printed = capsys.readouterr()
    assert "missing (model.decode_head." in printed.out and "skipped (model.classifier." in printed.out
    assert printed.err == ""
    assert isinstance(net, TransformersNetwork)
    library = transformers.SegformerForImageClassification.from_pretrained(tmp_path)
    backbone = library.segformer.state_dict()
    assert all(torch.equal(value, backbone[name]) for name, value in net.backbone.state_dict().items())


def change_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda at: (at / "config.json").unlink(), "has no config.json"),
        (lambda at: (at / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda at: (at / "model.safetensors").rename(at / "pytorch_model.bin"), "can hold code and is not read"),
        (lambda at: (at / "model.safetensors").write_bytes(b"1234567890"), "its weights cannot be loaded"),
        (lambda at: change_json(at / "config.json", model_type="vit"), "'vit', which is not supported. Supported: s"),
        (lambda at: change_json(at / "config.json", backbone="resnet50"), "names its backbone (resnet50) instead of"),
        (lambda at: change_json(at / "config.json", id2label={"0": "a", "5": "b"}), "does not number its classes"),
        (lambda at: change_json(at / "config.json", decoder_hidden_size=24), "do not fit its own config.json: "),
        (lambda at: change_json(at / "preprocessor_config.json", image_std=[0, 1, 1]), "image processor is damaged"),
        (lambda at: change_json(at / "config.json", auto_map={"AutoConfig": "code.Own"}), ""),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_are_refused_in_one_line(
    tmp_path: Path, folder: Callable[[str], Path], change: Callable[[Path], object], message: str
) -> None:
    at = tmp_path / "net"
    shutil.copytree(folder("segformer"), at)
    change(at)
    model = ModelConfig(library="transformers", name=str(at), encoder={"weights": "hub"})
    if not message:  # code that a file names is not even looked for
        build_network(model, 5)
        return
    with pytest.raises(SemsegError) as caught:
        build_network(model, 5)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": ""}, "model.name: give the name of a network"),
        ({"name": "./nothing"}, "there is no such folder"),
        ({"name": "owner/network"}, "HF_HUB_OFFLINE=1|download.offline=true"),
        ({"revision": "main"}, "is a folder, which has no revisions"),
        ({"options": {"drop_path_rat": 0.2}}, "can be set. Did you mean model.options.drop_path_rate?"),
        ({"options": {"drop_path_rate": "high"}}, "model.options.drop_path_rate=high: must be of the kind of 0.1"),
        ({"options": {"decoder_hidden_size": 24}}, "do not fit model.config"),
        ({"arch": "unet"}, "model.arch: model=transformers has no such key"),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused_in_one_line(
    folder: Callable[[str], Path], model: dict[str, Any], message: str
) -> None:
    keys = {"library": "transformers", "name": str(folder("segformer")), "encoder": {"weights": "hub"}, **model}
    with pytest.raises(SemsegError, match=message.replace("?", r"\?") if "|" not in message else message):
        build_network(ModelConfig(**keys), 5, DownloadConfig(offline=True))


def test_weights_become_float32_and_may_be_in_several_files(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    library = load_library(folder("segformer"), "segformer").to(torch.bfloat16)
    library.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    model = ModelConfig(library="transformers", name=str(tmp_path), encoder={"weights": "hub"})
    state = build_network(model, NUM_CLASSES).state_dict()
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}
    expected = {f"model.{name}": value for name, value in library.state_dict().items()}
    assert all(torch.equal(value.to(state[name].dtype), state[name]) for name, value in expected.items())
    next(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="a part of its weights"):
        build_network(model, NUM_CLASSES)


@pytest.mark.parametrize("family", IN_EVERY_RUN)
def test_a_run_for_other_classes_starts_from_a_checkpoint(
    load: Callable[..., TransformersNetwork], family: str
) -> None:
    net, target = load(family), load(family, 5)
    config = Config(model=ModelConfig(library="transformers", config=net.library_config))
    saved = SavedNetwork("x", net.state_dict(), config, ClassTable.from_names(NAMES), net.convention)
    report = initialise_from(target, saved)
    heads = [f"model.{name}" for name in ALL_FAMILIES[family].classifiers]
    assert all(name.startswith((*heads, "model.criterion.empty_weight")) for name in report.reinitialised)
    assert report.reinitialised and not report.missing and not report.skipped


# ---- whole runs

WORDS = [word for word in TINY if not word.startswith("model")]
RUN = [
    *WORDS, "model=transformers", "trainer.log_every_n_steps=1", "optim.layer_decay=0.8", "optim.lr_encoder=0.001",
    "optim.name=adamw", "optim.lr=0.001", "ema.decay=0.9", "data.steps_per_epoch=4", "checkpoint.every_n_steps=3",
    "checkpoint.keep=9", "trainer.limit_val_batches=1", "trainer.log_images=0",
]  # fmt: skip


def weights_of(run: Path) -> dict[str, Any]:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return content["state_dict"] | {f"current.{k}": v for k, v in content.get("current_model_state", {}).items()}


@pytest.mark.parametrize(
    "family", [name if name == "segformer" else pytest.param(name, marks=pytest.mark.long) for name in ALL_FAMILIES]
)
def test_a_run_resumes_exactly_and_its_checkpoint_needs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Callable[[str], Path], family: str
) -> None:
    files = {path.name: path.read_bytes() for path in folder(family).iterdir()}
    network = add_to_cache(tmp_path / "cache", "owner/tiny", files)
    use_hub(monkeypatch, tmp_path / "cache", "http://127.0.0.1:9", is_offline=True)
    words = [*RUN, *SIZES, "model.name=owner/tiny"]
    printed = run_here(tmp_path, *words, "run_dir=whole")
    assert "weights from owner/tiny@01234567: " in printed and "re-initialised" in printed
    if ALL_FAMILIES[family].has_one_size:
        assert "takes images of 64 x 64 only. Others go through it in windows of that size." in printed
    shutil.rmtree(tmp_path / "cache")
    assert not network.exists()
    resumed = run_here(tmp_path, *words, "run_dir=resumed", "resume=whole/checkpoints/step_00000003.ckpt")
    assert "resuming" in resumed
    expected = weights_of(tmp_path / "whole")
    found = weights_of(tmp_path / "resumed")
    assert set(found) == set(expected)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    saved = read_checkpoint(tmp_path / "resumed" / "checkpoints" / "last.ckpt").config.model
    assert saved.revision == COMMIT and saved.config["model_type"] == family
    run_here(
        tmp_path, "mode=predict", "ckpt=whole", "input=scenes/images/validation", "run_dir=seen", "predict.save=[ids]"
    )
    assert len(list((tmp_path / "seen").rglob("*_ids*"))) == 7


@pytest.mark.long  # those of IN_EVERY_RUN train in tests/distributed/test_two_steps.py
def test_two_ranks_train_one_network(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    words = ["model=transformers", "model.encoder.weights=hub"]
    cases = {family: [*words, f"model.name={folder(family)}"] for family in ALL_FAMILIES}
    first, second = launch(partial(train_two_steps, cases=cases, folder=str(tmp_path)), 2)
    assert first == second
    assert {name: outcome.steps for name, outcome in first.items()} == dict.fromkeys(ALL_FAMILIES, 2)
    assert not any(outcome.without_gradient for outcome in first.values())
    assert {name for name, outcome in first.items() if outcome.unused} == set(UNUSED)


def test_a_run_starts_from_a_checkpoint_with_its_network_and_a_frozen_backbone(
    tmp_path: Path, load: Callable[..., TransformersNetwork]
) -> None:
    net = load("segformer")
    model = ModelConfig(library="transformers", name="tiny", config=net.library_config)
    table = ClassTable.from_names(NAMES)
    write_ckpt(tmp_path / "net.ckpt", SavedNetwork("", net.state_dict(), Config(model=model), table, net.convention))
    start = [*WORDS, *SIZES, "init_from=net.ckpt", "run_dir=run", "trainer.limit_val_batches=0"]
    assert "tensors loaded" in run_here(tmp_path, *start, "model.encoder.frozen=true")
    after = weights_of(tmp_path / "run")
    assert all(torch.equal(value, after[f"net.model.segformer.{n}"]) for n, value in net.backbone.state_dict().items())
    assert not torch.equal(after["net.model.decode_head.batch_norm.weight"], net.model.decode_head.batch_norm.weight)


def test_settings_without_an_effect_are_refused(load: Callable[..., TransformersNetwork]) -> None:
    net, size = load("eomt"), load("eomt").image_size
    config = Config(model=ModelConfig(library="transformers", name="tiny"), loss=LossConfig(average="pixels"))
    assert find_own_loss(net, config, ["data=folder", "optim.lr=1"])  # of the data set or the recipe
    assert find_own_loss(net, replace(config, loss=LossConfig()), ["loss=cross_entropy"])
    assert not find_own_loss(load("segformer"), config, ["loss.average=pixels"])
    with pytest.raises(
        ConfigError, match=r"loss.average=pixels: has no effect, because transformers tiny has a loss of"
    ):
        find_own_loss(net, config, ["data=folder", "loss.average=pixels"])
    assert choose_crop(DataConfig(), AugmentConfig(), size) == [64, 64]
    assert choose_crop(DataConfig(), AugmentConfig()) is None
    with pytest.raises(ConfigError, match=r"augment.crop=\[32, 32\]: this network takes images of 64 x 64 only"):
        choose_crop(DataConfig(), AugmentConfig(crop=[32, 32]), size)


SCENES_AS_FOLDER = [
    "data=folder", "data.root=scenes", "data.train.images=images/training", "data.train.masks=annotations/training",
    "data.num_classes=12",
]  # fmt: skip


@pytest.mark.slow
def test_the_recipe_of_a_check_has_no_crops_for_a_network_of_one_size(
    tmp_path: Path, folder: Callable[[str], Path]
) -> None:
    make_scenes(tmp_path / "scenes", num_train=4, num_val=1, seed=1)
    network = ["model=transformers", f"model.name={folder('eomt')}", "model.encoder.weights=none", "trainer=cpu"]
    run_here(tmp_path, "mode=check", *SCENES_AS_FOLDER, *network, "output=recipe.yaml")
    config = load_config([f"experiment={tmp_path / 'recipe.yaml'}", *network])[0]
    assert (config.augment.scale, config.augment.crop, config.data.crop) == ([0.5, 2.0], None, None)


@pytest.mark.slow
def test_a_network_with_a_loss_of_its_own_trains_on_a_folder_and_is_evaluated_on_it(
    tmp_path: Path, folder: Callable[[str], Path]
) -> None:
    make_scenes(tmp_path / "scenes", num_train=4, num_val=2, seed=1)
    data = [*SCENES_AS_FOLDER, "trainer=cpu", "data.num_workers=0", "eval.scales=[64]"]
    network = ["model=transformers", f"model.name={folder('eomt')}", "model.encoder.weights=none"]
    printed = run_here(tmp_path, *data, *network, "data.short_edges=[64]", "trainer.max_steps=1", "run_dir=run")
    assert "the network's own: classes and masks" in printed
    assert "mean IoU" in run_here(tmp_path, "mode=eval", "ckpt=run", *data)
    compiled = [*data, *network, "data.short_edges=[64]", "model.compile=true", "run_dir=compiled"]
    assert "cannot be compiled, because its loss matches masks" in run_here(tmp_path, *compiled, code=2)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dpt", "beit"])
def test_the_hooks_that_a_first_call_installs_are_there_before_a_network_is_compiled(
    load: Callable[..., TransformersNetwork], family: str
) -> None:
    net, compiled = load(family), load(family)
    image = image_for(net)
    compiled.compile(backend="eager")
    num_hooks = count_hooks(compiled)
    assert num_hooks > count_hooks(net) == 0
    assert torch.equal(compiled.forward(image).main, net(image).main)
    assert count_hooks(compiled) == num_hooks == count_hooks(net)


def count_hooks(net: TransformersNetwork) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


# ---- export


@pytest.mark.long
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_it_is_exported_for_all_sizes_or_its_own_or_refused(
    load: Callable[..., TransformersNetwork], tmp_path: Path, family: str
) -> None:
    from semseg.export.onnx import write_onnx
    from semseg.export.onnx_runtime import build_description, build_graph_network, read_exported

    net = load(family)
    if ALL_FAMILIES[family].frozen_graph:
        with pytest.raises(ExportError, match="its graph would be right for one size of images only"):
            write_onnx(tmp_path / "net.onnx", net, {})
        return
    config = Config(model=ModelConfig(library="transformers", config=net.library_config))
    saved = SavedNetwork("x", net.state_dict(), config, ClassTable.from_names(NAMES), net.convention)
    deviation = write_onnx(tmp_path / "net.onnx", net, build_description(saved, net))  # compares at five sizes
    assert deviation.largest < 1e-4 * deviation.scale
    exported = read_exported(tmp_path / "net.onnx")
    assert exported.graph is not None and exported.graph.image_size == net.image_size
    pixels = torch.randint(0, 256, (1, 3, 96, 160)).float()
    expected = run_in_windows(net, normalise(pixels.clone(), net.convention), None, None)
    found = run_in_windows(build_graph_network(exported, exported.graph), pixels, None, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * deviation.scale)
