"""Stage 5: networks of timm (PyTorch Image Models) as encoders (model/encoder=timm). Needs semseg[timm]."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from semseg.errors import CheckpointError, ConfigError, install_command, one_line, suggest
from semseg.nets.blocks import without_autocast
from semseg.nets.encoders.dilation import plan_stages
from semseg.nets.encoders.efficientnet_lite import convert_lite_weights, is_lite_layout
from semseg.nets.encoders.library import MIN_STRIDE, LibraryEncoder, rgb_preprocessing, weights_file_at
from semseg.nets.interfaces import WeightsFile
from semseg.nets.pyramid import FINEST

try:
    import timm
    from timm.layers.patch_embed import PatchEmbed
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
    from timm.models._features import FeatureGetterNet
except ModuleNotFoundError as error:
    raise ConfigError(f"model/encoder=timm needs the timm package: {install_command('timm')}") from error

# Its warnings list the weights of the classifier, which the encoder does not have.
logging.getLogger("timm").setLevel(logging.ERROR)

# Options that make a network for one image size accept all sizes: ViT has the first, Swin the second or both.
ANY_SIZE_OPTIONS: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
# Errors of networks that do not support an option or an image size.
UNSUPPORTED_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError)
HUB_ADDRESS = "https://huggingface.co"
NUM_MAPS = 4  # of a plain ViT
# Modules of timm with attention in windows that an exporter cannot express: Swin, SAM 2's Hiera, SAM's ViT.
WINDOWED = (
    "timm.models.swin_transformer", "timm.models.hieradet_sam2", "timm.models.vision_transformer_sam",
)  # fmt: skip


class TimmPlan(NamedTuple):
    """How timm builds a network.

    A plain ViT is one whose blocks all have the stride of its patches: not Swin, Hiera or ConvNeXt.
    """

    name: str
    network: dict[str, Any]  # options of the network itself
    maps: dict[str, Any]  # options with which it gives feature maps
    is_plain: bool

    def build(self, **options: Any) -> Any:
        """The network as a module that gives feature maps, with initial weights."""
        return timm.create_model(self.name, **self.network, **self.maps, **options)

    def build_whole(self) -> nn.Module:
        """The network with its classifier."""
        return timm.create_model(self.name, **self.network)


class TimmEncoder(LibraryEncoder):
    """The feature maps of a timm network, without those of stride 1 and 2.

    A plain ViT is not a pyramid: its maps are the outputs of some of its blocks, all with the stride of its patches.
    They are normalised by the network's own last layer, as in the linear evaluation of DINOv2 and DINOv3. Under a
    decoder that reads a pyramid, one is made of them (`semseg.nets.pyramid`). Its strides are a quarter of the patches'
    and so on, so patches whose size is no multiple of 4 become larger: of 16 pixels instead of 14, as EoMT does it with
    DINOv2; timm resamples the weights of the patches and the position embeddings of a published file to that.

    Args:
        name: timm's name, with or without the tag of its weights: efficientnet_b3 or efficientnet_b3.ra2_in1k.
        output_stride: 8, 16 or 32; below 32 for networks that timm can dilate.
        blocks: plain ViTs: the blocks whose outputs are the maps, from 0, or from -1 backwards; none: four, evenly
            spaced up to the last one. Blocks behind the last map are left out.
        pyramid: plain ViTs: whether a pyramid is made of the maps.
        final_norm: plain ViTs: whether the network's last normalisation is applied to every map; if not, a LayerNorm
            without weights is.

    Raises:
        ConfigError: for a name that timm does not have, for a network that gives no maps, cannot be dilated, or does
            not accept images of all sizes, and for options that it does not have.
    """

    def __init__(
        self,
        name: str = "resnet50",
        output_stride: int = 32,
        blocks: Sequence[int] = (),
        pyramid: bool = False,
        final_norm: bool = True,
    ) -> None:
        plan = plan_network(name, output_stride, blocks, pyramid=pyramid, final_norm=final_norm)
        model = plan.build()
        super().__init__(model, channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC")
        self.name = name
        self.plan = plan
        self.wants_pyramid = pyramid and plan.is_plain
        info, published = model.feature_info, model.pretrained_cfg
        self.levels = [level for level, stride in enumerate(info.reduction()) if stride >= MIN_STRIDE]
        self.channels = tuple(info.channels()[level] for level in self.levels)
        self.strides = tuple(info.reduction()[level] for level in self.levels)
        if plan.is_plain:
            # Networks for the mean of all tokens have their last normalisation behind it.
            self.normalises_maps = not (final_norm and has_norm(model.model))
        self.convention = rgb_preprocessing(published["mean"], published["std"])
        self.weights_file = find_weights_file(published)
        self.licence = str(published.get("license") or "")
        make_rotary_exportable(model)
        drop_size_checks(model)
        if any(type(module).__module__ in WINDOWED for module in model.modules()):
            self.export_problem = (
                f"timm's {name} cannot be exported for images of all sizes: its windows are padded by the size of the "
                "image, at which exporters give up after minutes. Networks on DINOv3, DINOv2 and ConvNeXt can."
            )
        self.check_maps()

    def compute_library_maps(self, image: Tensor) -> list[Tensor]:
        with choose_resampling(has_positions=self.plan.is_plain):
            maps = self.model(image)
        return [maps[level] for level in self.levels]

    @torch.no_grad()
    def check_maps(self) -> None:
        """Run the network once on a black image that is not square and not of the size that it was designed for.

        Raises:
            ConfigError: if the maps are not those announced.
        """
        height, width = 2 * self.size_divisor, 3 * self.size_divisor
        image = torch.zeros(1, 3, height, width, device=next(self.parameters()).device)
        expected = [
            (1, num_channels, height // stride, width // stride)
            for num_channels, stride in zip(self.channels, self.strides, strict=True)
        ]
        self.eval()  # draws no random numbers and leaves the running statistics alone
        found = []
        with suppress(*UNSUPPORTED_ERRORS):
            found = [tuple(self.convert_map(features).shape) for features in self.compute_library_maps(image)]
        self.train()
        if found != expected:
            strides = join_numbers(self.strides)
            raise ConfigError(
                f"model.encoder.name={self.name}: timm's network gives no maps of strides {strides} for an image of "
                f"{height} x {width} pixels. It is designed for other sizes. Choose another network."
            )

    def convert_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """As Encoder.convert_weights, for older names and layouts in timm's files too, and for EfficientNet-Lite.

        Raises:
            CheckpointError: if timm cannot use the weights for this network.
        """
        if is_lite_layout(published):
            published = convert_lite_weights(published, self.name, self.channels[-1], self.model.state_dict())
        weights = self.filter_weights(published)
        return weights if weights is not None else self.probe_weights(published)

    def filter_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The published weights after timm's own filter for the network's files; None unless they are complete."""
        weights = run_checkpoint_filter(self.plan, published)
        by_key = {feature_key(key): value for key, value in weights.items()}
        if len(by_key) < len(weights):
            return None  # ambiguous
        # A wrapper of timm that collects feature maps has the network as its attribute `model`.
        prefix = "model." if hasattr(self.model, "model") else ""
        own = self.model.state_dict()
        found = {key: by_key.get(feature_key(key.removeprefix(prefix))) for key in own}
        if any(value is None or value.shape != own[key].shape for key, value in found.items()):
            return None
        return {f"model.{key}": value for key, value in found.items() if value is not None}

    def probe_weights(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
        """What timm's loader makes of the published weights."""
        loaded = load_with_timm(partial(self.plan.build, pretrained=True), self.name, published)
        return {f"model.{name}": value for name, value in loaded.items()}


def load_with_timm(build: Callable[..., nn.Module], name: str, published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What timm's loader makes of published weights, without the weights that they lack.

    The loader leaves weights that it does not find at their random initial values, and does not report them. So the
    weights are loaded a second time with all values NaN: a weight that is not NaN then was not in the file.

    Args:
        build: builds the network, with timm's option `pretrained_cfg_overlay`.
        name: the network's name in the error.

    Raises:
        CheckpointError: if timm cannot use the weights for this network.
    """

    def load(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        source = {"state_dict": weights, "hf_hub_id": None, "url": ""}  # and nothing from the network
        try:
            with torch.random.fork_rng(devices=[]):
                return build(pretrained_cfg_overlay=source).state_dict()
        except (*UNSUPPORTED_ERRORS, LookupError) as error:
            raise CheckpointError(f"These weights do not fit timm's {name}: {one_line(error)}.") from error

    loaded = load(published)
    probed = load({key: fill_with_nan(value) for key, value in published.items()})
    return {key: value for key, value in loaded.items() if not value.is_floating_point() or probed[key].isnan().any()}


def run_checkpoint_filter(plan: TimmPlan, published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published weights after timm's filter for the network; empty if that is not known or fails.

    timm keeps such a function, `checkpoint_filter_fn` in most cases, beside each family of networks whose older files
    have other names or layouts.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = plan.build_whole()
        family = vars(sys.modules[type(model).__module__])
        if "checkpoint_filter_fn" in family:
            return family["checkpoint_filter_fn"](dict(published), model)
        return {} if any("filter" in function for function in family) else published
    except (*UNSUPPORTED_ERRORS, KeyError, NotImplementedError):
        return {}


def feature_key(key: str) -> str:
    """The key of a weight without the difference between a network and its feature maps: stem.1.bias, stem_1.bias."""
    return key.replace(".", "_")


def plan_network(name: str, output_stride: int, blocks: Sequence[int], *, pyramid: bool, final_norm: bool) -> TimmPlan:
    """How timm builds the network, found out by building it without memory for its weights.

    Raises:
        ConfigError: see TimmEncoder.
    """
    check_name(name)
    plan_stages(output_stride)  # raises an error unless it is 8, 16 or 32
    network: dict[str, Any] = {} if output_stride == 32 else {"output_stride": output_stride}
    try:
        model, network = probe_network(name, network)
    except UNSUPPORTED_ERRORS as error:
        if output_stride < 32:
            raise ConfigError(
                f"model.encoder.output_stride={output_stride}: timm's {name} cannot be dilated. Use 32."
            ) from error
        raise ConfigError(
            f"model.encoder.name={name}: timm gives no feature maps of it ({error}). Choose another network."
        ) from error
    maps: dict[str, Any] = {"features_only": True}
    depth = count_plain_blocks(model)
    if not depth:
        for option, is_given in (("blocks", bool(blocks)), ("final_norm", not final_norm)):
            if is_given:
                value = list(blocks) if option == "blocks" else "false"
                raise ConfigError(
                    f"model.encoder.{option}={value}: is for plain vision transformers. The maps of timm's {name} are "
                    f"those of its stages, of strides {join_numbers(model.feature_info.reduction())}. Leave it out."
                )
        return TimmPlan(name, network, maps, is_plain=False)
    maps["out_indices"] = choose_blocks(name, blocks, depth)
    if final_norm and hasattr(model.model, "norm"):
        maps["feature_cls"] = partial(FeatureGetterNet, norm=True)
    patch = model.feature_info.reduction()[-1]
    if pyramid and patch % FINEST:
        network["patch_size"] = patch + -patch % FINEST
    return TimmPlan(name, network, maps, is_plain=True)


def probe_network(name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The network on the device meta, as one that gives maps of images of all sizes if it can, and its options.

    Draws no random numbers. Raises what timm raises, one of UNSUPPORTED_ERRORS.
    """
    published = timm.get_pretrained_cfg(name)
    is_fixed = published is not None and published.fixed_input_size
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        for any_size in ANY_SIZE_OPTIONS if is_fixed else ({},):
            try:
                return timm.create_model(name, features_only=True, **options, **any_size), options | any_size
            except TypeError:  # the network has no such option
                if not any_size:
                    raise
    raise AssertionError("the last attempt returns or raises")


def count_plain_blocks(model: Any) -> int:
    """The number of blocks of a plain ViT that timm has made give maps; 0 for other networks."""
    inner = getattr(model, "model", None)
    is_one_stride = len(set(model.feature_info.reduction())) == 1
    blocks = getattr(inner, "blocks", None)
    is_plain = isinstance(model, FeatureGetterNet) and is_one_stride
    return len(blocks) if is_plain and isinstance(blocks, nn.Sequential | nn.ModuleList) else 0


def choose_blocks(name: str, blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """The indices, from 0, of the blocks of a plain ViT whose outputs are the maps.

    Raises:
        ConfigError: unless they increase and are in range.

    >>> choose_blocks("a ViT", [], 12)
    (2, 5, 8, 11)
    >>> choose_blocks("a ViT", [4, -1], 12)
    (4, 11)
    """
    if not blocks:
        return tuple(sorted({math.ceil(depth * part / NUM_MAPS) - 1 for part in range(1, NUM_MAPS + 1)}))
    chosen = tuple(block + depth if block < 0 else block for block in blocks)
    is_sorted = all(first < second for first, second in pairwise(chosen))
    if not is_sorted or chosen[0] < 0 or chosen[-1] >= depth:
        raise ConfigError(
            f"model.encoder.blocks={list(blocks)}: must be increasing numbers of blocks of {name}, from 0 to "
            f"{depth - 1}, or from -{depth} to -1."
        )
    return chosen


def has_norm(network: nn.Module) -> bool:
    """Whether a network has a last normalisation."""
    norm = getattr(network, "norm", None)
    return isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)


class ExportableRotary(RotaryEmbeddingDinoV3):
    """DINOv3's rotary embedding, whose grid follows the size of the image in an exported graph and on the device.

    timm divides by the sides of the grid as numbers of Python, at which an exporter freezes them, and builds the grid
    on the host. The results are the same to the last bit.
    """

    def _create_embed(self, feat_shape: list[int], no_aug: bool = False) -> Tensor:
        assert isinstance(self.periods, Tensor)
        device = self.periods.device
        sides = [(torch.arange(side, device=device) + 0.5) / side for side in feat_shape]
        grid = torch.stack(torch.meshgrid(sides, indexing="ij"), -1)  # (h, w, 2)
        sin, cos = self._get_pos_embed_from_coords(2 * grid.flatten(0, 1) - 1)
        return torch.cat([sin, cos], -1)


def make_rotary_exportable(model: nn.Module) -> None:
    """Give every rotary embedding of DINOv3 in a network the class ExportableRotary, if it has DINOv3's settings."""
    for module in model.modules():
        if (
            type(module) is RotaryEmbeddingDinoV3
            and not module.aug_active
            and (module.grid_offset, module.grid_indexing, module.normalize_coords) == (0, "ij", "separate")
        ):
            module.__class__ = ExportableRotary


def drop_size_checks(model: nn.Module) -> None:
    """Let patches of images of all sizes be cut without timm's check of the size, for images that are multiples anyway.

    Its message has the height and width in it, for which torch.compile makes a graph of every size.
    """
    for module in model.modules():
        if isinstance(module, PatchEmbed) and not module.strict_img_size:
            module.img_size = None  # pyright: ignore[reportAttributeAccessIssue]


def check_name(name: str) -> None:
    """Check that timm has a network of this name. Addresses to load networks from are not names.

    Raises:
        ConfigError: with the nearest name.
    """
    names = [*timm.list_models(), *timm.list_pretrained()]
    if name in names:
        return
    hint = suggest(name, names)
    raise ConfigError(
        f"model.encoder.name={name}: timm has no such network.{hint} timm.list_models() lists all networks."
    )


def find_weights_file(published: Mapping[str, Any]) -> WeightsFile | None:
    """The file that timm loads weights from, according to its entry for them; None if there is none."""
    if published.get("hf_hub_id"):
        file_name = published.get("hf_hub_filename") or "model.safetensors"
        return WeightsFile(f"{HUB_ADDRESS}/{published['hf_hub_id']}/resolve/main/{file_name}")
    return weights_file_at(published["url"]) if published.get("url") else None


def choose_resampling(*, has_positions: bool) -> AbstractContextManager[Any]:
    """MatrixResampling where PyTorch has no gradient of interpolation with antialias, else nothing.

    It has none that is deterministic on CUDA, and none for all sizes in a compiled graph. There it costs time to trace.

    Args:
        has_positions: whether the network may have learnt positions, which timm resamples with antialias.
    """
    is_compiled = has_positions and torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return MatrixResampling() if is_compiled or torch.are_deterministic_algorithms_enabled() else nullcontext()


class MatrixResampling(TorchFunctionMode):
    """While active, interpolation with antialias, as of position embeddings, is computed by matrix products."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("antialias"):
            return resample(args[0], kwargs["size"], kwargs["mode"])
        return func(*args, **kwargs)


def resample(features: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """F.interpolate(features, size, mode=mode, antialias=True) of (N, C, h, w), as a matrix product for each axis.

    As interpolation, it is not rounded under autocast. On a GPU, its products are in TF32, as those of other layers.
    """
    rows, columns = (
        resampling_matrix(length, out_length, mode, features)
        for length, out_length in zip(features.shape[2:], size, strict=True)
    )
    with without_autocast(features.device.type):
        return rows @ features @ columns.T


@torch.no_grad()
def resampling_matrix(length: int, out_length: int, mode: str, like: Tensor) -> Tensor:
    """(out_length, length) weights of the interpolation of one axis, of the type and on the device of `like`."""
    units = torch.eye(length, dtype=like.dtype, device=like.device)  # a column for each position
    return F.interpolate(units[None, None], (out_length, length), mode=mode, antialias=True)[0, 0]


def join_numbers(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def fill_with_nan(value: Tensor) -> Tensor:
    """A tensor like `value` with all values NaN, if its type has NaN."""
    return torch.full_like(value, torch.nan) if value.is_floating_point() else value
