"""Stage 6: parameter groups, optimisers, and the learning rate at every step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from semseg.config.schema import OptimConfig, ScheduleConfig
from semseg.errors import ConfigError
from semseg.nets.interfaces import SegmentationNetwork

Schedule = Callable[[int], float]

DECAYING = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
# The first numbered part of a parameter's name, and the names that networks of libraries give to lists of blocks:
# model.blocks.3.attn.qkv.weight, stages_0.blocks.1.norm.bias, encoder.layer.11.output.dense.weight, trunk.block2.0.a.
BLOCK = re.compile(r"(?:[a-z]\w*\.)*?_?(?P<name>[a-z]\w*?)(?:[._]|(?<=block))(?P<number>\d+)\.", re.IGNORECASE)
# Twins has embeddings and a position block beside each stage of blocks. The blocks within a patch embedding, in hybrids
# of convolutions and attention, are the stem.
BLOCK_NAMES = ("blocks", "block", "layers", "layer", "stages", "patch_embeds", "pos_block")
STEM_PART = re.compile(r"(?:stem|patch_embed)_\d+")  # timm makes children of the parts of a stem
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
TRANSITION = re.compile(r"(?:features_)?transition\d+")  # of HRNet and DenseNet


def split_by_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(weights of convolutions and linear layers, everything else): only the first decay.

    Those of attention are linear layers, too: nn.MultiheadAttention keeps its projections as parameters of its own.
    Biases and the scale and shift of normalisation do not decay, as in the original code; nor do tokens and position
    embeddings.
    """
    weights = {id(layer.weight) for layer in module.modules() if isinstance(layer, DECAYING)}
    for layer in module.modules():
        if isinstance(layer, nn.MultiheadAttention):
            named = layer.named_parameters(recurse=False)
            weights |= {id(parameter) for name, parameter in named if name.endswith("proj_weight")}
    decay: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in module.parameters():
        (decay if id(parameter) in weights else free).append(parameter)
    return decay, free


def parameter_groups(
    net: SegmentationNetwork, config: OptimConfig, unused: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Backbone (encoder) and the rest (decoder), each with its own rate, each with and without decay.

    Frozen parameters are in none. The exception are those in `unused`, which the loss does not depend on: an optimiser
    neither moves nor decays a parameter without a gradient, and its state keeps the layout of checkpoints written
    before they were frozen.

    With `layer_decay` the encoder has a pair for each of its stages: the last one, called encoder, at the encoder's
    rate, the one before it, encoder_-1, at layer_decay times that, and so on.

    An encoder whose stages are not known has one rate, which is a warning.
    """
    backbone = list(net.backbone.parameters())
    stages = list_stages(net, net.backbone) if config.layer_decay < 1 else [backbone]
    if config.layer_decay < 1 and len(stages) == 1:
        rank_zero_warn(
            f"optim.layer_decay={config.layer_decay} has no effect, because no stages of this encoder are known. "
            "optim.lr_encoder sets the rate of the whole encoder."
        )
    in_backbone = {id(parameter) for parameter in backbone}
    rest = [parameter for parameter in net.parameters() if id(parameter) not in in_backbone]
    parts: list[tuple[str, Sequence[nn.Parameter], float]] = []
    for position, stage in enumerate(stages, start=1 - len(stages)):
        name = f"encoder_{position}" if position else "encoder"
        parts.append((name, stage, config.encoder_rate * config.layer_decay**-position))
    parts.append(("decoder", rest, config.decoder_rate))

    decaying = {id(parameter) for parameter in split_by_decay(net)[0]}
    trained = {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
    trained |= {id(parameter) for parameter in unused}
    groups: list[dict[str, Any]] = []
    for name, part, rate in parts:
        kept = [parameter for parameter in part if id(parameter) in trained]
        decay = [parameter for parameter in kept if id(parameter) in decaying]
        free = [parameter for parameter in kept if id(parameter) not in decaying]
        groups += [
            {"name": name, "params": decay, "lr": rate, "weight_decay": config.weight_decay},
            {"name": f"{name}_no_decay", "params": free, "lr": rate, "weight_decay": 0.0},
        ]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(trained), "every trainable parameter is in exactly one group"
    return [group for group in groups if group["params"]]


def list_stages(net: nn.Module, backbone: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of the backbone of a network by stage, from its input on.

    Stages are the children of the network (`list_child_stages`), unless one of them holds several blocks: where the
    names of its parameters number the blocks (BLOCK), as in networks of timm and transformers, every block is a stage.
    What comes before the first one (tokens, position and patch embeddings, the stem) is the stage in front of them, and
    what comes after a block (the final norm) belongs to it.
    """
    numbers: dict[int, int] = {}  # by the id of a parameter; 0: before the first block
    number = 0
    names = {id(parameter): name for name, parameter in net.named_parameters()}  # backbone may be a list of its modules
    for parameter in backbone.parameters():
        name = names[id(parameter)]
        found = BLOCK.match(name)
        if found and found["name"] in BLOCK_NAMES and "patch_embed" not in found.group().split("."):
            number = int(found["number"]) + 1
        numbers[id(parameter)] = number
    children = list_child_stages(backbone)
    if all(len({numbers[id(parameter)] for parameter in stage} - {0}) < 2 for stage in children):
        return children
    stages: dict[int, list[nn.Parameter]] = {}
    for parameter in backbone.parameters():
        stages.setdefault(numbers[id(parameter)], []).append(parameter)
    return [stages[number] for number in sorted(stages)]


def list_child_stages(module: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of a module by child, from its input on; the single layers before the first block are one stage.

    What halves the resolution between two stages (`is_transition`) belongs to the one behind it. A single child is
    replaced by its own children, because adapters wrap their network in that way. Parameters of the module itself are
    in the first stage. Numbered parts of a stem are one child. If all children are numbered, and each number has the
    same kinds of them (patch_embed1, block1, norm1, patch_embed2, ...), those of a number are a stage.
    """
    named = {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}
    stem = [child for name, child in named.items() if STEM_PART.fullmatch(name)]
    if stem:
        others = {name: child for name, child in named.items() if not STEM_PART.fullmatch(name)}
        named = {"stem": nn.ModuleList(stem), **others}
    children, own = list(named.values()), list(module.parameters(recurse=False))
    kinds: dict[int, dict[str, nn.Module]] = {}  # number -> kind -> child
    for name, child in named.items():
        kind = name.rstrip("0123456789")
        kinds.setdefault(int(name[len(kind) :] or -1), {})[kind] = child
    if -1 not in kinds and 1 < len(kinds) < len(children) and len({frozenset(parts) for parts in kinds.values()}) == 1:
        stages = [list(nn.ModuleList(kinds[number].values()).parameters()) for number in sorted(kinds)]
    elif len(children) == 1 and next(children[0].children(), None) is not None:
        stages = list_child_stages(children[0])
    else:
        stages, ahead = [], []
        for name, child in named.items():
            # Also a norm that holds its activation.
            is_layer = all(next(part.parameters(), None) is None for part in child.children())
            if is_layer and stages:
                (ahead or stages[-1]).extend(child.parameters())
            elif stages and is_transition(name, child):
                ahead += child.parameters()
            else:
                stages.append([*ahead, *child.parameters()])
                ahead = []
        stages += [ahead] if ahead else []  # with no stage behind it
    return [own + stages[0], *stages[1:]] if stages else [own]


def is_transition(name: str, child: nn.Module) -> bool:
    """Whether a child of a network is no stage, but what halves the resolution between two.

    By its name, or because it is a norm and then a convolution (ConvNeXt), or a norm and a linear layer (Swin). Stages
    begin with a convolution.
    """
    parts = list(child.children())
    is_pair = len(parts) == 2 and any(isinstance(part, NORMS) for part in parts)
    is_before_layer = is_pair and (isinstance(parts[1], nn.Conv2d) or isinstance(parts[0], nn.Linear))
    return is_before_layer or bool(TRANSITION.fullmatch(name))


def build_optimizer(
    net: SegmentationNetwork, config: OptimConfig, unused: Collection[nn.Parameter] = (), *, is_fused: bool = False
) -> Optimizer:
    """The optimiser named in `config`, over `parameter_groups`.

    Args:
        is_fused: update all weights in one kernel, which can leave out a step without the host's knowing: see
            NonFiniteGuard.
    """
    groups = parameter_groups(net, config, unused)
    fused = True if is_fused else None  # None: torch chooses
    if config.name == "adamw":
        return AdamW(groups, betas=(config.momentum, config.beta2), fused=fused)
    optimizer = SGD(groups, momentum=config.momentum, fused=fused)
    if is_fused and config.momentum:
        # torch leaves the momentum uninitialised if the first step is left out. Zeros give the same first step.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def choose_fused(config: OptimConfig, device: torch.device, precision: str) -> bool:
    """Whether the optimiser is fused: optim.fused, by default on GPUs.

    Raises:
        ConfigError: if it is requested beside a gradient scaler, which would skip steps in the same way.
    """
    has_scaler = precision == "16-mixed"
    if config.fused and has_scaler:
        raise ConfigError(
            "optim.fused=true: not with trainer.precision=16-mixed. Use bf16-mixed, or optim.fused=false."
        )
    return device.type == "cuda" and not has_scaler if config.fused is None else config.fused


def poly(step: int, *, total_steps: int, power: float) -> float:
    """Fraction of the base rate at `step`, set before the step: (1 - step / total) ** power.

    >>> poly(50, total_steps=100, power=1.0)
    0.5
    """
    return max(0.0, 1 - step / total_steps) ** power


def cosine(step: int, *, total_steps: int, floor: float) -> float:
    """Half a cosine from 1 at step 0 to `floor` at `total_steps` (Loshchilov and Hutter 2017, eq. 5)."""
    progress = min(1.0, step / total_steps)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def warm_up(step: int, *, schedule: Schedule, warmup_steps: int, factor: float) -> float:
    """`schedule` times a factor that rises linearly from `factor` to 1 over `warmup_steps`."""
    if step >= warmup_steps:
        return schedule(step)
    return schedule(step) * (factor + (1 - factor) * step / warmup_steps)


def build_schedule(config: ScheduleConfig, total_steps: int) -> Schedule:
    """The fraction of the base rate as a function of the step (from 0)."""
    schedule: Schedule = partial(poly, total_steps=total_steps, power=config.power)
    if config.name == "cosine":
        schedule = partial(cosine, total_steps=total_steps, floor=config.min_factor)
    if config.name == "poly" or not config.warmup_steps:
        return schedule
    return partial(warm_up, schedule=schedule, warmup_steps=config.warmup_steps, factor=config.warmup_factor)


def apply_settings(optimizer: Optimizer, scheduler: LambdaLR, settings: Sequence[dict[str, Any]]) -> None:
    """Give the parameter groups of a resumed run the settings and the schedule of this run instead of the saved ones.

    Restoring an optimiser restores the rate of the saved schedule, and LambdaLR corrects it one step late.

    Args:
        settings: one dict per group, as the optimiser was built: the entries of `optimizer.param_groups` besides the
            parameters, including the scheduler's `initial_lr`.
    """
    for group, given, schedule in zip(optimizer.param_groups, settings, scheduler.lr_lambdas, strict=True):
        group.update(given)
        group["lr"] = given["initial_lr"] * schedule(scheduler.last_epoch)
        for parameter in group["params"] if group.get("fused") else ():
            # Fused kernels count the steps on the device. A run that was not fused has saved a number of the host.
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(parameter.device)
    scheduler.base_lrs = [given["initial_lr"] for given in settings]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def build_scheduler(optimizer: Optimizer, config: ScheduleConfig, total_steps: int) -> LambdaLR:
    """The scheduler, which Lightning steps after every optimiser step, so that step n runs with schedule(n)."""
    return LambdaLR(optimizer, build_schedule(config, total_steps))
