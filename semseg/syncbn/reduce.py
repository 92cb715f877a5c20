"""Statistics and gradients of batch normalisation, reduced over the values of all ranks.

The forward pass is one all_gather of 2C + 1 numbers (mean, M2, count), the backward pass one all_reduce of 2C. Ranks
may have different numbers of values, also none. Statistics are float32, or float64 for float64 input, whatever the
dtype of the values, because sums of squares of bfloat16 numbers are too inexact.

Shapes: x is (N, C, ...) with C >= 1; everything per channel is (C,); counts are ().
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Statistics(NamedTuple):
    """Statistics of each channel over a set of values."""

    mean: Tensor  # (C,)
    m2: Tensor  # (C,) sum of squared distances to the mean
    num_values: Tensor  # () values per channel: an integer in the dtype of the statistics


def local_statistics(x: Tensor) -> Statistics:
    """Statistics of the values of this rank; all zero if there are none."""
    channels = x.shape[1]
    dtype = _statistics_dtype(x)
    count = torch.full((), x.numel() // channels, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return Statistics(x.new_zeros(channels, dtype=dtype), x.new_zeros(channels, dtype=dtype), count)
    return Statistics(*_kernels_for(x).moments(x), count)


def reduce_statistics(local: Statistics, group: dist.ProcessGroup) -> Statistics:
    """Statistics of the values of all ranks of `group`: one collective, then Chan's merge.

    Means and M2 are exchanged rather than sums and sums of squares: the variance of values around 1e4 would
    otherwise be the difference of two numbers around 1e8, which is rounding noise in float32.
    """
    channels = local.mean.numel()
    packed = torch.cat([local.mean, local.m2, local.num_values.view(1)])  # (2C + 1,)
    gathered = packed.new_empty(dist.get_world_size(group) * packed.numel())
    dist.all_gather_into_tensor(gathered, packed, group=group)
    mean, m2, count = gathered.view(-1, packed.numel()).split([channels, channels, 1], dim=1)  # (ranks, C or 1)
    total = count.sum()
    merged = (mean * (count / total.clamp(min=1))).sum(0)
    return Statistics(merged, (m2 + count * (mean - merged).square()).sum(0), total)


def normalise_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    mean: Tensor,
    inv_std: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """weight * (x - mean) * inv_std + bias, in the dtype and memory format of x.

    The gradient of x includes its effect on `mean` and `inv_std`, which carry no gradient themselves.

    Args:
        mean_weight: () weight of one value in the mean: 1 / count, or 0 if the mean does not depend on x (running
            statistics).
        var_weight: (C,) weight of one value in the variance, or 0 if that does not depend on x (also if it is clamped).
        group: the backward pass reduces over these ranks, except for the gradients of weight and bias, which are those
            of this rank; None: x has all values.
    """
    return _Normalise.apply(_dense(x), weight, bias, mean, inv_std, mean_weight, var_weight, group)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, mean, inv_std, mean_weight, var_weight, group) -> Tensor:  # noqa: PLR0917
        ctx.save_for_backward(x, weight, mean, inv_std, mean_weight, var_weight)
        ctx.group = group
        ctx.bias_dtype = None if bias is None else bias.dtype
        if x.numel() == 0:
            return torch.empty_like(x)
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        shift = torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)
        return _kernels_for(x).normalise(x, mean, inv_std, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, inv_std, mean_weight, var_weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=_memory_format(x))
        if x.numel() == 0:  # because the native kernels divide by the number of values
            sums = mean.new_zeros(2, mean.numel())
        else:
            sums = torch.stack(_kernels_for(x).grad_sums(grad, x, mean, inv_std))  # (2, C): dy and dy * x_hat
        grad_bias = None if ctx.bias_dtype is None else sums[0].to(ctx.bias_dtype)
        grad_weight = None if weight is None else sums[1].to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None, None, None, None, None

        if ctx.group is not None:
            sums = sums.clone()  # because the local sums are the gradients of weight and bias
            dist.all_reduce(sums, group=ctx.group)
        if x.numel() == 0:
            return torch.empty_like(x), grad_weight, grad_bias, None, None, None, None, None
        grad_x = _kernels_for(x).grad_x(
            grad,
            x,
            mean,
            inv_std,
            scale=torch.ones_like(mean) if weight is None else weight.to(mean.dtype),
            mean_dy=sums[0] * mean_weight,
            mean_dy_x_hat=sums[1] * var_weight,
        )
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class Kernels(Protocol):
    """The four passes over the values; x is not empty. `dy` has the memory format of x."""

    @staticmethod
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and M2."""
        ...

    @staticmethod
    def normalise(x: Tensor, mean: Tensor, inv_std: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """scale * x_hat + shift, with x_hat = (x - mean) * inv_std."""
        ...

    @staticmethod
    def grad_sums(dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of dy and of dy * x_hat."""
        ...

    @staticmethod
    def grad_x(
        dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, *, scale: Tensor, mean_dy: Tensor, mean_dy_x_hat: Tensor
    ) -> Tensor:
        """scale * inv_std * (dy - mean_dy - x_hat * mean_dy_x_hat)."""
        ...


class PortableKernels:
    """Plain expressions, for torch.compile, which fuses them, and for other devices."""

    @staticmethod
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.to(_statistics_dtype(x))
        var, mean = torch.var_mean(values, _all_but_channel(x), correction=0)
        return mean, var * (x.numel() // x.shape[1])

    @staticmethod
    def normalise(x: Tensor, mean: Tensor, inv_std: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y = (x - _column(mean, x)) * _column(inv_std * scale, x) + _column(shift, x)
        return _cast(y, x.dtype)

    @staticmethod
    def grad_sums(dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor) -> tuple[Tensor, Tensor]:
        dy = dy.to(mean.dtype)
        product = dy * (x - _column(mean, x))
        dims = _all_but_channel(x)
        return dy.sum(dims), product.sum(dims) * inv_std

    @staticmethod
    def grad_x(
        dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, *, scale: Tensor, mean_dy: Tensor, mean_dy_x_hat: Tensor
    ) -> Tensor:
        centred = (x - _column(mean, x)) * _column(inv_std * mean_dy_x_hat, x)
        return _cast((dy - _column(mean_dy, x) - centred) * _column(inv_std * scale, x), x.dtype)


class CpuKernels:
    """Each pass by the fastest vectorised kernel that torch has for the CPU.

    (2, 256, 64, 64) float32, one thread: `var_mean` 15 ms, native statistics 4.5 ms, `moments` 1.0 ms.
    """

    @staticmethod
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        guess = x.mean(_all_but_channel(x), dtype=_statistics_dtype(x))
        if _memory_format(x) != torch.contiguous_format:  # fast for this layout, but its mean lacks a few digits
            rough, var = torch.batch_norm_update_stats(x, torch.zeros_like(guess), torch.ones_like(guess), 0.0)
            return guess, (count * (var - (guess - rough).square())).clamp(min=0)
        centred = x - _column(guess, x)
        rest, m2 = CpuKernels.grad_sums(centred, centred, torch.zeros_like(guess), torch.ones_like(guess))
        rest = rest / count  # rounding error of the first mean
        return guess + rest, (m2 - count * rest.square()).clamp(min=0)

    @staticmethod
    def normalise(x: Tensor, mean: Tensor, inv_std: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        # var = 1, and an eps that does not change it; torch < 2.12 rejects an eps of 0.
        return F.batch_norm(x, mean, torch.ones_like(mean), scale * inv_std, shift, False, 0.0, 1e-30)

    @staticmethod
    def grad_sums(dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor) -> tuple[Tensor, Tensor]:
        _, sum_dy_x_hat, sum_dy = torch.ops.aten.native_batch_norm_backward(
            dy, x, torch.ones_like(mean), None, None, mean, inv_std, True, 0.0, [False, True, True]
        )
        return sum_dy, sum_dy_x_hat

    @staticmethod
    def grad_x(
        dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, *, scale: Tensor, mean_dy: Tensor, mean_dy_x_hat: Tensor
    ) -> Tensor:
        if x.dtype != mean.dtype:  # because the two steps below would round twice
            return PortableKernels.grad_x(
                dy, x, mean, inv_std, scale=scale, mean_dy=mean_dy, mean_dy_x_hat=mean_dy_x_hat
            )
        factor = scale * inv_std
        from_statistics = CpuKernels.normalise(x, mean, inv_std, -factor * mean_dy_x_hat, -factor * mean_dy)
        return from_statistics.addcmul_(dy, _column(factor, x))


class CudaKernels:
    """The fused kernels of torch.nn.SyncBatchNorm."""

    @staticmethod
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, inv_std = torch.batch_norm_stats(x, 0.0)  # eps = 0 keeps the digits of variances far below eps
        var = torch.where(inv_std > 0, inv_std.reciprocal().square(), 0)  # the kernel gives 0 for a variance of 0
        return mean, var * (x.numel() // x.shape[1])

    @staticmethod
    def normalise(x: Tensor, mean: Tensor, inv_std: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.batch_norm_elemt(x, scale, shift, mean, inv_std, 0.0)

    @staticmethod
    def grad_sums(dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor) -> tuple[Tensor, Tensor]:
        sum_dy, sum_dy_centred, _, _ = torch.batch_norm_backward_reduce(
            dy, x, mean, inv_std, torch.ones_like(mean), True, False, False
        )
        return sum_dy, sum_dy_centred * inv_std

    @staticmethod
    def grad_x(
        dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, *, scale: Tensor, mean_dy: Tensor, mean_dy_x_hat: Tensor
    ) -> Tensor:
        one = torch.ones(1, dtype=torch.int32, device=x.device)  # the means are already divided by their count
        return torch.batch_norm_backward_elemt(dy, x, mean, inv_std, scale, mean_dy, mean_dy_x_hat / inv_std, one)


KERNELS: dict[str, type[Kernels]] = {"cpu": CpuKernels, "cuda": CudaKernels}


def _kernels_for(x: Tensor) -> type[Kernels]:
    # The native kernels have no meta implementation, so each of them would break the graph.
    return PortableKernels if torch.compiler.is_compiling() else KERNELS.get(x.device.type, PortableKernels)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    # A `.to` without effect returns the tensor itself, and the compiler of torch 2.11 then loses its gradient.
    return values if values.dtype == dtype else values.to(dtype)


def _all_but_channel(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _column(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.view(-1, *[1] * (x.dim() - 2))  # (C,) -> (C, 1, ...), which broadcasts against x


def _memory_format(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_memory_format(x))
