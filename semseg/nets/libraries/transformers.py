"""Stage 5: whole semantic segmentation networks of transformers (model=transformers). Needs semseg[transformers].

A network is built from its configuration as plain data, without any file: that is what a checkpoint keeps. The files of
the hub are read in semseg/checkpoints/hub.py. No code of a file is ever run: the class is chosen here by `model_type`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from semseg.config.origin import WeightsOrigin
from semseg.config.preprocessing import PREPROCESSING, Preprocessing
from semseg.data.classes import ClassTable
from semseg.data.geometry import Size
from semseg.errors import ConfigError, install_command, one_line
from semseg.nets.bands import adapt_first_layers
from semseg.nets.encoders.library import replace_batch_norms
from semseg.nets.interfaces import Logits, SegmentationNetwork
from semseg.nets.padding import crop_logits, pad_image

try:
    import transformers
    from transformers.utils import logging as transformers_logging
except ModuleNotFoundError as error:
    raise ConfigError(
        f"model=transformers needs the transformers package: {install_command('transformers')}"
    ) from error

# Its reports about loaded weights and its progress bars repeat ours; errors are raised, not logged.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

HALF = PREPROCESSING["rgb_mean_std"]._replace(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
IMAGENET = PREPROCESSING["rgb_mean_std"]
BGR = Preprocessing("bgr", 1 / 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), antialias=True)
# Backbones whose stage n has the stride 2 ** (n + 1): below these names of model_type UPerNet's first map is stage 1.
STAGED_BACKBONES = ("convnext", "convnextv2", "resnet", "swin", "swinv2")


class Family(NamedTuple):
    """The networks of one `model_type`."""

    class_name: str  # of transformers
    backbone: tuple[str, ...]  # paths of the modules that were pretrained; the rest is new in a fine-tuning
    classifiers: tuple[str, ...]  # beginnings of the names of weights whose first dimension is the number of classes
    convention: Preprocessing  # of its published weights, for folders without a file that says it
    run: Callable[[Any, Tensor, bool], Logits]  # (network of transformers, image, whether to compute aux) -> logits
    find_strides: Callable[[Any], tuple[int, int]]  # configuration -> size_divisor, label_stride
    has_one_size: bool = False  # it takes images of config.image_size only
    needs_multiples: bool = False  # it loses what is beyond the last whole patch
    frozen_graph: str = ""  # why an exported graph would be right at one size only; empty: it is right at all


class NetworkDescription(NamedTuple):
    """What the files of a network of transformers say about it, apart from the weights."""

    folder: Path
    origin: WeightsOrigin
    config: dict[str, Any]  # of transformers, plain data
    class_names: tuple[str, ...]
    convention: Preprocessing
    reduces_labels: bool  # in its training, class 0 was the id 1 of the label files, and the id 0 was not scored

    @property
    def class_table(self) -> ClassTable:
        """The names with generated colours; no configuration has colours."""
        return ClassTable.from_names(self.class_names)

    @property
    def source(self) -> str:
        """The name with the commit, for messages."""
        name, revision = self.origin.source, self.origin.revision
        return f"{name}@{revision[:8]}" if revision else name


# ---- running the families


def run_plain(model: Any, image: Tensor, wants_aux: bool) -> Logits:
    return Logits(model(image).logits, None)


def run_upernet(model: Any, image: Tensor, wants_aux: bool) -> Logits:
    """The heads without the upsampling to the size of the image, which ours does in bands."""
    backbone = model.backbone
    if type(backbone).__name__ == "ConvNextBackbone":
        maps = run_convnext(backbone, image)
    else:
        maps = backbone.forward_with_filtered_kwargs(image).feature_maps
    return Logits(model.decode_head(maps), run_auxiliary(model, maps, wants_aux))


def run_convnext(backbone: Any, image: Tensor) -> tuple[Tensor, ...]:
    """The feature maps as transformers computes them, without its hooks, which torch.compile does not trace."""
    state = backbone.embeddings(image)
    maps = {"stem": state}
    for name, stage in zip(backbone.stage_names[1:], backbone.encoder.stages, strict=True):
        maps[name] = state = stage(state)
    return tuple(backbone.hidden_states_norms[name](maps[name]) for name in backbone.out_features)


def run_dpt(model: Any, image: Tensor, wants_aux: bool) -> Logits:
    """As transformers, which supposes that images are squares; the neck takes any grid of patches."""
    config = model.config
    states = model.dpt(image, output_hidden_states=True).hidden_states
    grid = [side // config.patch_size for side in image.shape[-2:]]
    maps = model.neck([states[index + 1] for index in sorted(config.backbone_out_indices)], *grid)
    return Logits(model.head(maps), run_auxiliary(model, maps[-1], wants_aux))


def run_beit(model: Any, image: Tensor, wants_aux: bool) -> Logits:
    has_fixed_positions = bool(model.config.use_absolute_position_embeddings)
    states = model.beit(image, interpolate_pos_encoding=has_fixed_positions, output_hidden_states=True).hidden_states
    maps = model.fpn(tuple(arrange_patches(model, states, image)))
    return Logits(model.decode_head(maps), run_auxiliary(model, maps, wants_aux))


def run_data2vec(model: Any, image: Tensor, wants_aux: bool) -> Logits:
    states = model.data2vec_vision(image, output_hidden_states=True, return_dict=True).hidden_states
    necks = (model.fpn1, model.fpn2, model.fpn3, model.fpn4)
    maps = [neck(features) for neck, features in zip(necks, arrange_patches(model, states, image), strict=True)]
    return Logits(model.decode_head(maps), run_auxiliary(model, maps, wants_aux))


def arrange_patches(model: Any, states: Any, image: Tensor) -> list[Tensor]:
    """The tokens of the patches (N, 1 + h * w, C) of the layers that the head reads as maps (N, C, h, w)."""
    height, width = (side // model.config.patch_size for side in image.shape[-2:])
    chosen = [states[index - 1] for index in sorted(model.config.out_indices)]
    return [tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, height, width) for tokens in chosen]


def run_auxiliary(model: Any, maps: Any, wants_aux: bool) -> Tensor | None:
    head = model.auxiliary_head
    return head(maps) if wants_aux and head is not None else None


# ---- strides


def find_segformer_strides(config: Any) -> tuple[int, int]:
    return math.prod(config.strides), config.strides[0]


def find_upernet_strides(config: Any) -> tuple[int, int]:
    """Raises a ConfigError for a backbone whose strides are not known here."""
    backbone = config.backbone_config
    first = str(backbone.out_features[0])
    if backbone.model_type not in STAGED_BACKBONES or not first.startswith("stage"):
        raise ConfigError(
            f"UPerNet of transformers with the backbone {backbone.model_type}: not supported. It works with "
            f"{', '.join(STAGED_BACKBONES)}."
        )
    return 32, 2 * 2 ** int(first.removeprefix("stage"))


def find_dpt_strides(config: Any) -> tuple[int, int]:
    """Raises a ConfigError for hybrid networks, and for those whose logits are finer than the image."""
    label_stride = config.patch_size / (4 * config.reassemble_factors[0]) if config.reassemble_factors else 0
    if config.is_hybrid or config.backbone_config is not None or label_stride < 1 or label_stride % 1:
        raise ConfigError("DPT of transformers: only networks of plain ViTs with patches of 16 pixels are supported.")
    return config.patch_size, int(label_stride)


def find_beit_strides(config: Any) -> tuple[int, int]:
    """The coarsest map has half the resolution of the grid of patches."""
    return 2 * config.patch_size, config.patch_size // 4


def find_patch_strides(config: Any) -> tuple[int, int]:
    """Two transposed convolutions refine the grid of patches."""
    return config.patch_size, config.patch_size // 4


def find_mobile_strides(config: Any) -> tuple[int, int]:
    return 32, config.output_stride


BEIT_CLASSIFIERS = ("decode_head.classifier.", "auxiliary_head.classifier.")
MOBILE_CLASSIFIERS = ("segmentation_head.classifier.",)
SEMANTIC_FAMILIES: dict[str, Family] = {
    "segformer": Family(
        "SegformerForSemanticSegmentation",
        ("segformer",),
        ("decode_head.classifier.",),
        IMAGENET,
        run_plain,
        find_segformer_strides,
    ),
    "upernet": Family(
        "UperNetForSemanticSegmentation",
        ("backbone",),
        BEIT_CLASSIFIERS,
        IMAGENET,
        run_upernet,
        find_upernet_strides,
        needs_multiples=True,
    ),
    "dpt": Family(
        "DPTForSemanticSegmentation",
        ("dpt",),
        ("head.head.4.", "auxiliary_head.head.4."),
        HALF,
        run_dpt,
        find_dpt_strides,
        needs_multiples=True,
    ),
    "beit": Family(
        "BeitForSemanticSegmentation",
        ("beit",),
        BEIT_CLASSIFIERS,
        HALF,
        run_beit,
        find_beit_strides,
        needs_multiples=True,
    ),
    "data2vec-vision": Family(
        "Data2VecVisionForSemanticSegmentation",
        ("data2vec_vision",),
        BEIT_CLASSIFIERS,
        HALF,
        run_data2vec,
        find_patch_strides,
        has_one_size=True,
        frozen_graph="and for one number of images: both are computed while it is traced",
    ),
    "mobilenet_v2": Family(
        "MobileNetV2ForSemanticSegmentation",
        ("mobilenet_v2",),
        MOBILE_CLASSIFIERS,
        HALF,
        run_plain,
        find_mobile_strides,
    ),
    "mobilevit": Family(
        "MobileViTForSemanticSegmentation",
        ("mobilevit",),
        MOBILE_CLASSIFIERS,
        BGR,
        run_plain,
        find_mobile_strides,
        frozen_graph="because its patches are counted while it is traced",
    ),
    "mobilevitv2": Family(
        "MobileViTV2ForSemanticSegmentation",
        ("mobilevitv2",),
        MOBILE_CLASSIFIERS,
        BGR,
        run_plain,
        find_mobile_strides,
    ),
}


class TransformersNetwork(SegmentationNetwork):
    """A semantic segmentation network of transformers, built by semseg/nets/libraries/description.py.

    Its forward is that of the library, and so is the state dict of `model`; batch normalisation can also train on one
    value per channel. An auxiliary head (UPerNet, DPT, BEiT, Data2Vec) gives the auxiliary logits in training mode.

    Args:
        family: an entry of the table of families.
        config: a configuration of transformers, with the number of classes.
        convention: preprocessing of the pixel values; None: that of the published weights of the family.

    Raises:
        ConfigError: for a variant of the family that is not supported.
    """

    def __init__(self, family: Family, config: Any, convention: Preprocessing | None = None) -> None:
        super().__init__()
        self.family = family
        self.num_classes = int(config.num_labels)
        self.convention = convention or family.convention
        self.size_divisor, self.label_stride = family.find_strides(config)
        self.model = build_library_model(family, config)
        self.library_config = plain_config(config)
        if family.frozen_graph:
            self.export_problem = (
                f"{family.class_name}: its graph would be right for one size of images only, {family.frozen_graph}. So "
                "it is not exported."
            )
        self.description: NetworkDescription | None = None  # of the files that it was built from
        if family.has_one_size:
            self.image_size = Size(*read_sides(config.image_size))
            if self.image_size.height != self.image_size.width:
                raise ConfigError(
                    f"{family.class_name}: takes images of {self.image_size} only; squares are supported."
                )

    @property
    def backbone(self) -> nn.Module:
        """What was pretrained: one module, or several in a list that is made for the caller."""
        parts = [self.model.get_submodule(path) for path in self.family.backbone]
        return parts[0] if len(parts) == 1 else nn.ModuleList(parts)

    def forward(self, image: Tensor) -> Logits:
        """As SegmentationNetwork.forward.

        Raises:
            ConfigError: if the network takes images of one size only, and this is another one.
        """
        self.check_size(image)
        if not self.family.needs_multiples:
            return self.family.run(self.model, image, self.training)
        logits = self.family.run(self.model, pad_image(image, self.size_divisor), self.training)
        return logits._replace(main=crop_logits(logits.main, image, self.label_stride))

    def compile(self, *args: Any, **options: Any) -> None:
        """As nn.Module.compile, without breaks of the graph."""
        prepare_capturing(self.model)
        super().compile(*args, **options)

    @contextmanager
    def as_graph(self) -> Iterator[None]:
        """Within it, attention is written out: exporters fix the sizes of windows and positions in its kernels."""
        model, is_training = self.model, self.model.training
        # A copy that is built so: some modules choose their attention only once.
        config = deepcopy(model.config)
        self.model = build_library_model(self.family, config, attention="eager")
        try:
            adapt_first_layers(self, self.convention.bands)
            self.model.load_state_dict(model.state_dict())
            self.model.to(next(model.parameters()).device).train(is_training)
            yield
        finally:
            self.model = model

    def check_size(self, image: Tensor) -> None:
        """Raises a ConfigError if the network takes images of one size only, and this is another one."""
        if self.image_size is not None and tuple(image.shape[-2:]) != self.image_size:
            raise ConfigError(
                f"{self.family.class_name}: takes images of {self.image_size.height} x {self.image_size.width} pixels "
                f"only, not {image.shape[-2]} x {image.shape[-1]}."
            )


def build_library_model(family: Family, config: Any, attention: str = "") -> Any:
    """The network of transformers with initial weights in float32, in training mode as every new module.

    Args:
        attention: an implementation of transformers; empty: the one that it chooses.

    Raises:
        ConfigError: if the class of transformers refuses its configuration.
    """
    network = getattr(transformers, family.class_name)
    try:
        options = {"attn_implementation": attention, "dtype": torch.float32}
        model = network._from_config(config, **options) if attention else network(config)
    except (ValueError, TypeError, AttributeError, KeyError, AssertionError, ImportError) as error:
        raise ConfigError(
            f"transformers cannot build {family.class_name} from its configuration: {one_line(error)}."
        ) from error
    replace_batch_norms(model)
    return model.train()


def prepare_capturing(model: nn.Module) -> None:
    """Install the hooks that collect the outputs of layers, if this version of transformers has them.

    It would do that within the first call, under a lock, which a compiled graph cannot contain.
    """
    try:
        from transformers.utils.output_capturing import (  # noqa: PLC0415 - not in every version
            _CAN_RECORD_REGISTRY,
            maybe_install_capturing_hooks,
        )
    except ImportError:
        return
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and _CAN_RECORD_REGISTRY.get(module) is not None:
            maybe_install_capturing_hooks(module)


def read_sides(image_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Height and width."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def read_plain_config(plain: Mapping[str, Any], num_classes: int) -> Any:
    """The configuration of transformers in plain data, for this number of classes.

    Raises:
        ConfigError: if transformers refuses it, or its backbone is only a name, which would be fetched.
    """
    model_type = str(plain.get("model_type"))
    if isinstance(plain.get("backbone"), str):
        raise ConfigError(
            f"the configuration names its backbone ({plain['backbone']}) instead of describing it, so that it would be "
            "fetched from the network whenever it is built. Use a network whose config.json has a backbone_config."
        )
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(dict(plain))
        config.num_labels = num_classes
    except Exception as error:  # of any class: the checks of transformers' configurations raise their own
        raise ConfigError(f"transformers cannot read the configuration of {model_type}: {one_line(error)}.") from error
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False  # the weights come from the file of the whole network
    return config


# What a configuration says about the file that it comes from, and not about the network.
NOT_SAVED = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "torch_dtype", "transformers_version")


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration of transformers as plain data that JSON and YAML can hold, without names of classes."""
    return strip_config(json.loads(config.to_json_string(use_diff=False)))


def strip_config(value: Any) -> Any:
    """Plain data without the entries NOT_SAVED, also of configurations inside."""
    if isinstance(value, dict):
        return {key: strip_config(entry) for key, entry in value.items() if key not in NOT_SAVED}
    return [strip_config(entry) for entry in value] if isinstance(value, list) else value
