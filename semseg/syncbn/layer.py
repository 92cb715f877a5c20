"""Batch normalisation over all ranks: layers with the state dict of nn.BatchNorm, and conversion in both directions.

There are two conventions:

| | `torch` | `published` (the 2018 code) |
|---|---|---|
| inv_std in training | 1 / sqrt(var + eps) | 1 / sqrt(max(var, eps)), no gradient through a clamped variance |
| running += | momentum * (stat - running) | (stat - running) / iter, iter = 0.999 iter + 1, from 1 towards 1000 |
| evaluation, frozen layers | var + eps | var + eps, as for the published scores |
| one process | plain nn.BatchNorm | the same rule |
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from semseg.errors import ConfigError, check_choice
from semseg.syncbn.reduce import Statistics, local_statistics, normalise_batch, reduce_statistics

M = TypeVar("M", bound=nn.Module)

CONVENTIONS = ("torch", "published")
PUBLISHED_MOMENTUM = 0.001  # momentum of the 2018 code for all networks except HRNet, which has 0.1
# Buffers that the normalisation layers of the 2018 code have beside those of nn.BatchNorm2d.
OLD_BUFFERS = ("_tmp_running_mean", "_tmp_running_var", "_running_iter")


@dataclass(frozen=True)
class NormalisationRule:
    """How a synchronised layer reduces and normalises.

    Attributes:
        convention: "torch" or "published".
        momentum: momentum of the published convention, above 0 and below 1; the torch convention uses the layer's own.
        process_group: ranks to reduce over; None: all ranks.

    Raises:
        ConfigError: for an unknown convention or a momentum out of range.
    """

    convention: str = "torch"
    momentum: float = PUBLISHED_MOMENTUM
    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        check_choice("syncbn.convention", self.convention, CONVENTIONS)
        if not 0 < self.momentum < 1:
            raise ConfigError(f"The published convention needs a momentum above 0 and below 1, not {self.momentum}.")

    def __deepcopy__(self, memo: dict[int, Any]) -> NormalisationRule:
        return self  # because a process group cannot be copied

    @property
    def is_published(self) -> bool:
        return self.convention == "published"


class _SyncBatchNorm(_BatchNorm):
    """Adds the reduction to the nn.BatchNorm that follows it in the method resolution order."""

    rule: NormalisationRule
    plain_class: type[_BatchNorm]

    def __init__(
        self,
        *args: Any,
        convention: str = "torch",
        process_group: dist.ProcessGroup | None = None,
        published_momentum: float = PUBLISHED_MOMENTUM,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rule = NormalisationRule(convention, published_momentum, process_group)
        self.plain_class = _torch_class_of(self)

    def forward(self, input: Tensor) -> Tensor:
        # There is no collective in evaluation, so ranks may evaluate different numbers of batches.
        if not self.training:
            return super().forward(input)
        group = _group_of_several(self.rule.process_group)
        has_one_value = input.numel() == input.shape[1]
        if group is None and not self.rule.is_published and not has_one_value:
            return super().forward(input)
        self._check_input_dim(input)
        output = self.normalise_over(input, group)
        for child in self.children():  # dropout and activation of timm's BatchNormAct, in this order
            output = child(output)
        return output

    def normalise_over(self, input: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """Normalise in training mode over the ranks of `group`; None: over the values of this process.

        A single value per channel over all ranks has no variance: it is normalised by the running statistics, which are
        not updated.

        Raises:
            ValueError: for a single value if there are no running statistics.
        """
        with torch.no_grad():
            stats = local_statistics(input)
            if group is not None:
                stats = reduce_statistics(stats, group)
            has_variance = stats.num_values > 1  # () on the device, because reading it would wait for the collective
            mean, inv_std, var_depends_on_input = self._centre_and_scale(stats)
            mean_weight = has_variance / stats.num_values.clamp(min=1)
            if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
                self._update_running(stats, has_variance)
                mean = torch.where(has_variance, mean, self.running_mean.to(mean.dtype))
                running_inv_std = (self.running_var.to(mean.dtype) + self.eps).rsqrt()
                inv_std = torch.where(has_variance, inv_std, running_inv_std)
            else:
                self._refuse_one_value(input, stats)
            var_weight = mean_weight * var_depends_on_input
        return normalise_batch(
            input,
            self.weight,
            self.bias,
            mean=mean,
            inv_std=inv_std,
            mean_weight=mean_weight,
            var_weight=var_weight,
            group=group,
        )

    def _centre_and_scale(self, stats: Statistics) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, 1 / standard deviation, and 1 where the latter depends on the variance (else 0)."""
        var = stats.m2 / stats.num_values.clamp(min=1)
        if self.rule.is_published:
            # At var = eps the gradient passes, as in syncbn.json; torch.clamp's gradient there depends on its version.
            return stats.mean, var.clamp(min=self.eps).rsqrt(), (var >= self.eps).to(var.dtype)
        return stats.mean, (var + self.eps).rsqrt(), torch.ones_like(var)

    def _update_running(self, stats: Statistics, has_variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        rate: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(has_variance)
            steps = self.num_batches_tracked.to(stats.mean.dtype).clamp(min=1)
            if self.rule.is_published:
                rate = iteration_weight(steps, self.rule.momentum).reciprocal()
            elif self.momentum is None:
                rate = steps.reciprocal()
        weight = (has_variance.to(stats.mean.dtype) * rate).to(self.running_mean.dtype)
        unbiased_var = stats.m2 / (stats.num_values - 1).clamp(min=1)
        self.running_mean.lerp_(stats.mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), weight)

    def _refuse_one_value(self, input: Tensor, stats: Statistics) -> None:
        if input.numel() > input.shape[1] or torch.compiler.is_compiling() or stats.num_values != 1:
            return
        raise ValueError(
            f"{type(self).__name__}: one value per channel over all ranks (input {tuple(input.shape)}) has no "
            "variance, and there are no running statistics to use instead. Use larger or more images, or "
            "track_running_stats=True."
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As nn.BatchNorm; also loads files of the 2018 code, with none, two or three of its own buffers."""
        _replace_old_buffers(state_dict, prefix, self.rule.momentum)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        preserve_loaded_statistics(self)


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d with statistics over all ranks; see SyncBatchNorm2d."""


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d with statistics over all ranks, on any device and backend.

    Takes nn.BatchNorm2d's arguments, and by keyword `convention` ("torch" or "published"), `process_group`
    (None: the world) and `published_momentum`. Input (N, C, H, W), N and the size may differ by rank, N may be 0;
    output in the same dtype and memory format. Every rank of the group must run the same layers in the same order.

    >>> layer = SyncBatchNorm2d(2, convention="published")  # one process: the rule without the collective
    >>> layer(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 2, 1, 1)).flatten().tolist()
    [-1.0, -1.0, 1.0, 1.0]
    """


class SyncBatchNorm3d(_SyncBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d with statistics over all ranks; see SyncBatchNorm2d."""


SYNCED_CLASSES: dict[type[_BatchNorm], type[_SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def convert_batch_norms(
    module: M,
    convention: str = "torch",
    process_group: dist.ProcessGroup | None = None,
    momentum: float = PUBLISHED_MOMENTUM,
) -> M:
    """Convert every nn.BatchNorm1d/2d/3d in `module`, including subclasses, to a synchronised layer, in place.

    Only the class of a layer changes: parameters, buffers, hooks, sharing and the training flag stay. Layers that are
    already synchronised get the new rule. `momentum` is that of the published convention, for layers without an
    attribute `published_momentum` (those of HRNet have it).

    Raises:
        ConfigError: for an unknown convention, a momentum out of range, or a lazy layer not yet initialised.
    """
    rule = NormalisationRule(convention, momentum, process_group)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and isinstance(layer, LazyModuleMixin):
            raise ConfigError(f"{type(layer).__name__} has no channels yet. Run the network once before converting it.")
        if not isinstance(layer, tuple(SYNCED_CLASSES)):
            continue
        if not isinstance(layer, _SyncBatchNorm):
            plain_class = type(layer)
            layer.__class__ = _synced_class(plain_class)
            cast(_SyncBatchNorm, layer).plain_class = plain_class
        synced = cast(_SyncBatchNorm, layer)
        synced.rule = replace(rule, momentum=getattr(layer, "published_momentum", momentum))
        preserve_loaded_statistics(synced)
    return module


def revert_batch_norms(module: M) -> M:
    """Give every synchronised layer in `module` its class from before `convert_batch_norms`, in place.

    A layer that was constructed as SyncBatchNorm2d becomes nn.BatchNorm2d.
    """
    for layer in module.modules():
        if not isinstance(layer, _SyncBatchNorm):
            continue
        plain_class = layer.plain_class
        del layer.rule, layer.plain_class
        cast(_BatchNorm, layer).__class__ = plain_class
    return module


def iteration_weight(steps: Tensor, momentum: float) -> Tensor:
    """The published convention's `iter` after `steps` steps, in closed form, so that num_batches_tracked suffices.

    iter_n = a^n + (1 - a^n) / (1 - a) with a = 1 - momentum, which is the recurrence iter = a * iter + 1 from 1.

    >>> iteration_weight(torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), 0.001).tolist()
    [1.0, 1.999, 2.997001]
    """
    exponent = steps * math.log1p(-momentum)
    return exponent.exp() - exponent.expm1() / momentum


def steps_at_weight(iteration: float, momentum: float) -> int:
    """The number of steps after which `iter` is `iteration`; `steady_steps` if it has converged.

    >>> steps_at_weight(2.997001, 0.001)
    2
    """
    left = (1 / momentum - iteration) / (1 / momentum - 1)  # a^n
    if left <= math.exp(-40):
        return steady_steps(momentum)
    return max(0, round(math.log(left) / math.log1p(-momentum)))


def steady_steps(momentum: float) -> int:
    """Number of steps after which `iter` equals 1 / momentum in float64."""
    return math.ceil(40 / momentum)


def _replace_old_buffers(state_dict: dict[str, Tensor], prefix: str, momentum: float) -> None:
    """Convert a state dict of the 2018 code to the keys of nn.BatchNorm, for the layer at `prefix`.

    `_tmp_running_mean`, `_tmp_running_var` and `_running_iter` are removed. `num_batches_tracked` is computed from
    `_running_iter`. If both are missing, it is set to the steady state: loaded statistics then count as a long average,
    whereas the original code forgot them at the first step.
    """
    old = {name: state_dict.pop(prefix + name, None) for name in OLD_BUFFERS}
    if prefix + "running_var" not in state_dict:
        return
    iteration = old["_running_iter"]
    if iteration is not None:
        steps = steps_at_weight(float(iteration), momentum)
    elif prefix + "num_batches_tracked" not in state_dict:
        steps = steady_steps(momentum)
    else:
        return
    state_dict[prefix + "num_batches_tracked"] = torch.tensor(steps)


@torch.no_grad()
def preserve_loaded_statistics(layer: _SyncBatchNorm) -> None:
    """In the published convention, keep the first step from forgetting statistics that come without a step count.

    Running statistics other than the initial 0 and 1 beside num_batches_tracked = 0 were loaded without a count, as
    from many published weights: they start at the steady state. Any other count is used as it is.
    """
    steps, mean, var = layer.num_batches_tracked, layer.running_mean, layer.running_var
    if not layer.rule.is_published or steps is None or mean is None or var is None or steps.is_meta:
        return
    is_initial = bool((mean == 0).all() and (var == 1).all())
    if not is_initial and int(steps) == 0:
        steps.fill_(steady_steps(layer.rule.momentum))


def _group_of_several(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """`group` (None: the world) if it has more than one rank, else None."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    size = dist.get_world_size(group)
    if size < 1:
        raise ConfigError(
            "syncbn: this process is not in the process group of the layer. Every rank must pass its own group."
        )
    return (group or dist.group.WORLD) if size > 1 else None


def _torch_class_of(layer: _BatchNorm) -> type[_BatchNorm]:
    return next(plain for plain in SYNCED_CLASSES if isinstance(layer, plain))


@functools.cache
def _synced_class(plain_class: type[_BatchNorm]) -> type[_BatchNorm]:
    """SyncBatchNorm2d for nn.BatchNorm2d; for a subclass, a class that keeps its behaviour outside of training."""
    if plain_class in SYNCED_CLASSES:
        return SYNCED_CLASSES[plain_class]
    return type(f"Sync{plain_class.__name__}", (_SyncBatchNorm, plain_class), {"__module__": __name__})
