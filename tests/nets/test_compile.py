"""torch.compile with sizes that change from step to step: few graphs, whatever the number of canvases."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics
from torch.fx import GraphModule
from torch.utils._sympy.functions import Mod, PythonMod

from helpers.in_process import TinyEncoder
from semseg.checkpoints.network import build_network
from semseg.config.schema import ModelConfig
from semseg.data.geometry import Size, canvas_size, scaled_size
from semseg.data.plan import TrainPlan
from semseg.nets import compilation
from semseg.nets.compilation import compile_network, simplify_padding
from semseg.nets.decoders.c1 import C1
from semseg.nets.encoders import hrnet, torchvision
from semseg.nets.interfaces import SegmentationNetwork
from semseg.nets.normalise import normalise
from semseg.nets.registry import build_segmenter
from semseg.nets.segmenter import Segmenter

NUM_CLASSES, BATCH_SIZE = 5, 2
MAX_GRAPHS = 3
NUM_CANVASES = 30
SHORT_EDGES, MAX_LONG_EDGE = (300, 375, 450, 525, 600), 1000  # the defaults of data.short_edges and data.max_long_edge
SIZES = [
    Size(*size)
    for size in (
        (512, 683), (683, 512), (450, 600), (640, 480), (512, 512), (1024, 1024), (768, 1024), (1024, 680), (720, 1280),
        (427, 640), (640, 427), (375, 500), (256, 256), (500, 333), (600, 1200), (819, 1024), (900, 675), (1125, 2000),
    )
]  # fmt: skip


def list_canvases(size_divisor: int) -> list[Size]:
    """The first canvases of a training that differ; some of them are squares."""
    plan = TrainPlan(SIZES, seed=304, batch_size=BATCH_SIZE, short_edges=SHORT_EDGES)
    canvases: dict[Size, None] = {}
    number = 0
    while len(canvases) < NUM_CANVASES:
        records, short_edge = plan.sub_batch(number)[1:3]
        scaled = [scaled_size(SIZES[record], short_edge, MAX_LONG_EDGE) for record in records]
        canvases[canvas_size(scaled, size_divisor)] = None
        number += 1
    return list(canvases)


class KnownGraphError(Exception):
    """A canvas was given to a graph that is there already."""


def run_new_graphs_only(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """The backend aot_eager; from its second call on, a graph raises instead of computing what is known to work."""
    compiled = aot_eager(graph, inputs)
    calls = iter([compiled])

    def run(*arguments: Any) -> Any:
        call = next(calls, None)
        if call is None:
            raise KnownGraphError
        return call(*arguments)

    return run


class Compilation(NamedTuple):
    """What compiling a network for several canvases took."""

    num_graphs: int
    breaks: list[str]  # why the forward pass was cut into several graphs
    causes: list[str]  # of each compilation after the first


def compile_for(net: SegmentationNetwork, canvases: list[Size]) -> Compilation:
    """Compile the forward and backward pass of training steps on these canvases."""
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()
    compile_network(net.train(), run_new_graphs_only)
    for canvas in canvases:
        image = torch.zeros(BATCH_SIZE, 3, *canvas, dtype=torch.uint8)
        try:
            net(normalise(image, net.convention)).main.sum().backward()
        except KnownGraphError:
            continue
    causes = [str(metrics.recompile_reason) for metrics in get_compilation_metrics() if metrics.is_forward]
    return Compilation(counters["stats"]["unique_graphs"], list(counters["graph_break"]), causes[1:])


def assert_few_graphs(net: SegmentationNetwork, max_graphs: int = MAX_GRAPHS) -> None:
    with mock.patch.object(torch._dynamo.config, "specialize_float", False):  # put back afterwards
        result = compile_for(net, list_canvases(net.size_divisor))
    assert not result.breaks
    assert len(result.causes) < result.num_graphs <= max_graphs, result


# ---- encoders, as shallow as their kind allows


def segmenter(encoder: str, decoder: str, **encoder_options: Any) -> Segmenter:
    decoder_options = {"c1": {"deep_supervision": True}, "ppm": {"deep_supervision": True}, "upernet": {"width": 32}}
    if encoder_options.get("join"):
        return build_segmenter(encoder, decoder, NUM_CLASSES, encoder_options)
    return build_segmenter(encoder, decoder, NUM_CLASSES, encoder_options, decoder_options.get(decoder))


class WindowEncoder(TinyEncoder):
    """Its coarser map is padded to windows of 2 x 2, as by Swin, and cut again."""

    def forward(self, image: Tensor) -> list[Tensor]:
        fine, coarse = super().forward(image)
        height, width = coarse.shape[2:]
        padded = F.pad(coarse, (0, (2 - width % 2) % 2, 0, (2 - height % 2) % 2))
        return [fine, padded[..., :height, :width].contiguous()]


def window_segmenter() -> Segmenter:
    encoder = WindowEncoder()
    return Segmenter(encoder, C1(encoder.channels, NUM_CLASSES), NUM_CLASSES)


def shallow_hrnet(decoder: str, *, join: bool) -> Segmenter:
    """One module per stage, one block per branch."""

    def build_modules(widths: tuple[int, ...], count: int) -> nn.Sequential:
        return nn.Sequential(hrnet.HighResolutionModule(widths))

    with mock.patch.multiple(hrnet, NUM_BLOCKS=1, build_modules=build_modules):
        return segmenter("hrnetv2", decoder, join=join)


def narrow_torchvision(name: str, decoder: str) -> Segmenter:
    from torchvision.models import convnext as convnext_module
    from torchvision.models import swin_transformer as swin

    sizes = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
    second = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    builders: dict[str, Callable[[], nn.Module]] = {
        "swin_t": partial(swin.SwinTransformer, **sizes, window_size=[7, 7]),
        "swin_v2_t": partial(swin.SwinTransformer, **sizes, window_size=[8, 8], **second),
        "convnext_tiny": partial(
            convnext_module.ConvNeXt,
            [convnext_module.CNBlockConfig(*widths, 1) for widths in ((8, 16), (16, 32), (32, 64), (64, None))],
        ),
    }  # fmt: skip
    with mock.patch.object(torchvision, "build_torchvision_model", lambda name, _: builders[name]()):
        return segmenter("torchvision", decoder, name=name)


SMALLER_TIMM: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"depths": (2, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)},
    "swinv2_tiny_window8_256": {"depths": (2, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)},
    "sam2_hiera_tiny": {"stages": (1, 1, 2, 1), "global_att_blocks": (3,), "embed_dim": 16},
}


def narrow_timm(name: str, decoder: str, **options: Any) -> Segmenter:
    timm = pytest.importorskip("timm")
    pytest.importorskip("helpers.tiny_vit")  # adds its networks to timm's
    with mock.patch("timm.create_model", partial(timm.create_model, **SMALLER_TIMM.get(name, {}))):
        return segmenter("timm", decoder, name=name, **options)


ENCODER_KINDS: dict[str, Callable[[], Segmenter]] = {
    "windows": window_segmenter,
    "upernet": partial(segmenter, "resnet18", "upernet"),
    "ppm_deepsup": partial(segmenter, "resnet18", "ppm", output_stride=8),
    "segformer": partial(segmenter, "resnet18", "segformer"),
    "linear": partial(segmenter, "resnet18", "linear"),
    "mobilenet": partial(segmenter, "mobilenetv2", "c1", output_stride=8),
    "hrnet": partial(shallow_hrnet, "c1", join=True),
    "hrnet_upernet": partial(shallow_hrnet, "upernet", join=False),
    "swin": partial(narrow_torchvision, "swin_t", "upernet"),
    "swin_v2": partial(narrow_torchvision, "swin_v2_t", "upernet"),
    "convnext": partial(narrow_torchvision, "convnext_tiny", "upernet"),
    "efficientnet": partial(segmenter, "torchvision", "linear", name="efficientnet_b0"),
    "dinov2": partial(narrow_timm, "tiny_dinov2", "linear", blocks=[0]),
    "dinov3_linear": partial(narrow_timm, "tiny_dinov3", "linear", blocks=[0]),
    "dinov3_segformer": partial(narrow_timm, "tiny_dinov3", "segformer", blocks=[0]),
    "dinov3_upernet": partial(narrow_timm, "tiny_dinov3", "upernet", blocks=[0]),
    "timm_resnet": partial(narrow_timm, "resnet10t", "c1"),
    "timm_convnext": partial(narrow_timm, "convnext_tiny", "upernet"),
    "timm_swin": partial(narrow_timm, "swin_tiny_patch4_window7_224", "upernet"),
    "timm_swin_v2": partial(narrow_timm, "swinv2_tiny_window8_256", "upernet"),
    "timm_hiera": partial(narrow_timm, "sam2_hiera_tiny", "upernet"),
}


IN_EVERY_RUN = ("windows",)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind in IN_EVERY_RUN else pytest.mark.long)
        for kind in ENCODER_KINDS
    ],
)
def test_every_kind_of_encoder_and_decoder_is_compiled_a_few_times(kind: str) -> None:
    assert_few_graphs(ENCODER_KINDS[kind](), max_graphs=1 if kind in IN_EVERY_RUN else MAX_GRAPHS)


def test_a_version_of_pytorch_without_the_rules_that_are_changed_compiles_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilation, "skip_contiguity_checks", lambda: torch.no_such_part)
    with pytest.warns(UserWarning, match=r"model\.compile: compilation takes longer.*no_such_part"):
        compile_network(window_segmenter(), backend="eager")


@pytest.mark.parametrize("remainder", [Mod, PythonMod])
def test_the_padding_to_windows_is_a_quotient(remainder: Any) -> None:
    simplify_padding()
    length = sympy.Symbol("length", integer=True, nonnegative=True)
    for window in (1, 2, 7, 8):
        padding = remainder(window - remainder(length, window), window)
        assert not padding.atoms(Mod, PythonMod)
        assert [padding.subs(length, n) for n in range(20)] == [(window - n % window) % window for n in range(20)]
        doubled = 2 * window - remainder(2 * length, 2 * window)
        assert remainder(doubled, 2 * window) == 2 * padding
    other = remainder(13 - remainder(length, 7), 7)  # no padding
    assert [other.subs(length, n) for n in range(20)] == [(13 - n % 7) % 7 for n in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_compiled_network_computes_what_it_computes_without(layout: torch.memory_format) -> None:
    torch._dynamo.reset()
    plain = window_segmenter().eval()
    compiled = deepcopy(plain)
    with mock.patch.object(torch._dynamo.config, "specialize_float", False), torch.no_grad():
        compile_network(compiled, "aot_eager")
        for size in ((2, 3, 64, 96), (2, 3, 128, 64), (1, 3, 8, 8), (2, 3, 70, 45)):
            image = torch.rand(size).to(memory_format=layout)
            torch.testing.assert_close(compiled(image), plain(image))
    assert list(compiled.state_dict()) == list(plain.state_dict())


# ---- networks of libraries


@pytest.mark.long
@pytest.mark.parametrize("arch", ["unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "pan", "deeplabv3",
                                  "deeplabv3plus", "segformer", "upernet", "dpt"])  # fmt: skip
def test_every_architecture_of_smp_is_compiled_a_few_times(arch: str) -> None:
    encoder = "tu-vit_tiny_patch16_224" if arch == "dpt" else "resnet18"
    model = ModelConfig(library="smp", arch=arch, encoder={"name": encoder, "weights": "none"})
    assert_few_graphs(build_network(model, NUM_CLASSES))


@pytest.mark.long
@pytest.mark.parametrize("family", ["segformer", "upernet", "dpt", "beit", "mobilenet_v2", "mobilevit", "mobilevitv2"])
def test_every_family_of_transformers_is_compiled_a_few_times(family: str) -> None:
    pytest.importorskip("transformers")
    from helpers.transformers_networks import create_config
    from semseg.nets.libraries.families import build_from_config

    assert_few_graphs(build_from_config(create_config(family).to_dict(), NUM_CLASSES))
