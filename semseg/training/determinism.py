"""Operations of a network that CUDA refuses with trainer.deterministic=true: found and named before training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from semseg.errors import ConfigError

# Operations whose gradient has no deterministic kernel in CUDA, by the names of their forward passes: gradients are
# added in an order that changes. Bilinear and bicubic interpolation without antialias are not among them: PyTorch
# computes them from other operations then.
REFUSED_GRADIENTS: dict[str, str] = {
    "aten::_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "aten::_adaptive_avg_pool3d": "adaptive_avg_pool3d",
    "aten::adaptive_max_pool2d": "adaptive_max_pool2d",
    "aten::adaptive_max_pool3d": "adaptive_max_pool3d",
    "aten::avg_pool3d": "avg_pool3d",
    "aten::fractional_max_pool2d": "fractional_max_pool2d",
    "aten::grid_sampler_2d": "grid_sample",
    "aten::grid_sampler_3d": "grid_sample",
    "aten::reflection_pad1d": "padding by reflection",
    "aten::reflection_pad2d": "padding by reflection",
    "aten::reflection_pad3d": "padding by reflection",
    "aten::_upsample_bilinear2d_aa": "bilinear interpolation with antialias",
    "aten::_upsample_bicubic2d_aa": "bicubic interpolation with antialias",
    "aten::upsample_linear1d": "linear interpolation",
    "aten::upsample_trilinear3d": "trilinear interpolation",
}
# Operations that are refused without a gradient too.
REFUSED_OPERATIONS: dict[str, str] = {
    "aten::histc": "histc",
    "aten::kthvalue": "kthvalue",
    "aten::max_unpool2d": "max_unpool2d",
    "aten::median.dim": "median of a dimension",
    "aten::nanmedian.dim": "nanmedian of a dimension",
    "aten::put_": "put_",
}
NLL_LOSS = "aten::nll_loss2d_forward"  # unless its losses are left as they are, without a sum or mean
NLL_LOSS_REDUCTION, NO_REDUCTION = 3, 0  # position and value of its argument


class RefusedOperation(NamedTuple):
    """An operation that CUDA refuses if algorithms must be deterministic."""

    module: str  # the innermost one that computes it, such as "encoder.layer1.0"; "" outside of all, in the loss
    operation: str


def check_determinism(net: nn.Module, run: Callable[[], object], title: str, encoder: nn.Module) -> None:
    """Check that CUDA could compute `run` and its gradients with deterministic algorithms.

    Args:
        net, run: see `find_refused_operations`.
        title: what to call the network.
        encoder: the part of `net` that model.encoder.frozen freezes.

    Raises:
        ConfigError: with every operation that it refuses, and the first module that computes it.
    """
    found = find_refused_operations(net, run)
    if not found:
        return
    first = {operation: module for module, operation in reversed(found)}
    listed = ", ".join(f"{operation} (in {module or 'the loss'})" for operation, module in first.items())
    freezable = {name for name, module in net.named_modules() if module in set(encoder.modules())}
    is_in_encoder = all(refusal.module in freezable for refusal in found)
    freezing = "freeze the encoder (model.encoder.frozen=true), " if is_in_encoder else ""
    raise ConfigError(
        f"trainer.deterministic=true: PyTorch cannot train {title} so on a GPU, because it has no deterministic "
        f"algorithm for {listed}. Choose another network, {freezing}or set trainer.deterministic=false."
    )


def find_refused_operations(net: nn.Module, run: Callable[[], object]) -> list[RefusedOperation]:
    """The operations within `run` that CUDA refuses if algorithms must be deterministic, each once per module.

    Gradients are not computed: an operation whose gradient is refused counts if an input of it requires a gradient.

    Args:
        net: its modules are named.
        run: a forward pass of `net` and the loss, on any device: operations have the same names on all.
    """
    names = {module: name for name, module in net.named_modules()}
    log = OperationLog()

    def begin(module: nn.Module, inputs: Any) -> None:
        log.running.append(names.get(module, ""))

    def end(module: nn.Module, inputs: Any, outputs: Any) -> None:
        log.running.pop()

    with register_module_forward_pre_hook(begin), register_module_forward_hook(end, always_call=True), log:
        run()
    return list(dict.fromkeys(log.refused))


class OperationLog(TorchDispatchMode):
    """Collects refused operations.

    Attributes:
        running: names of the modules that are being computed, the innermost one last.
        refused: what was found.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.refused: list[RefusedOperation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operation = name_refused(func.name(), args)
        if operation is not None:
            self.refused.append(RefusedOperation(self.running[-1] if self.running else "", operation))
        return func(*args, **(kwargs or {}))


def name_refused(name: str, inputs: tuple[Any, ...]) -> str | None:
    """What to call an operation that CUDA refuses with these inputs; None if it does not."""
    if name in REFUSED_GRADIENTS and any(
        isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(inputs)
    ):
        return REFUSED_GRADIENTS[name]
    if name == NLL_LOSS and inputs[NLL_LOSS_REDUCTION] != NO_REDUCTION:
        return "nll_loss of images with a sum or mean"
    return REFUSED_OPERATIONS.get(name)
