"""Parameters that the loss does not depend on: found before training, and frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from semseg.data.geometry import Size
from semseg.nets.interfaces import Logits, SegmentationNetwork


def freeze_unused(net: SegmentationNetwork, loss: Callable[[Logits, Tensor], Tensor]) -> dict[str, nn.Parameter]:
    """Set requires_grad to False for every trainable parameter that `loss` does not depend on; returns them by name.

    Examples are an auxiliary head whose loss has the weight 0, and the layers of an encoder behind maps that the
    decoder does not read. They never get a gradient, for which DistributedDataParallel would wait in vain.

    The network runs once on a small image, in the mode that it is in, to build the graph of autograd, which is then
    searched for parameters. Weights, normalisation statistics and random numbers stay as they are.

    Args:
        net: as it will be trained, on any device.
        loss: a scalar of logits and label (N, h, w); only its graph is used.
    """
    used = find_leaves_behind(compute_probe_loss(net, loss))
    unused = {name: value for name, value in net.named_parameters() if value.requires_grad and id(value) not in used}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    return unused


def compute_probe_loss(net: SegmentationNetwork, loss: Callable[[Logits, Tensor], Tensor]) -> Tensor:
    """The loss of two black images, two pixels high and wide at the largest stride, with the graph behind it."""
    weight = next(net.parameters())
    side = max(2 * net.size_divisor, net.min_size)
    size = net.image_size or Size(side, side)
    image = torch.zeros(2, net.convention.num_bands, *size, dtype=weight.dtype, device=weight.device)
    statistics = {name: value.clone() for name, value in net.named_buffers()}
    try:
        with torch.random.fork_rng([weight.device] if weight.device.type == "cuda" else []), torch.enable_grad():
            label = torch.zeros(2, *(length // net.label_stride for length in size), dtype=torch.int64).to(image.device)
            own = net.compute_own_loss(image, label)
            # Not net(image), which would compile a compiled network for this size.
            return loss(net.forward(image), label) if own is None else own[0]
    finally:
        with torch.no_grad():
            for name, value in net.named_buffers():
                value.copy_(statistics[name])


def find_leaves_behind(value: Tensor) -> set[int]:
    """The ids of the tensors to which a backward pass from `value` would bring gradients."""
    found: set[int] = set()
    seen = {value.grad_fn}
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if (leaf := getattr(node, "variable", None)) is not None:  # where gradients are accumulated
            found.add(id(leaf))
        following = {parent for parent, _ in node.next_functions} - seen
        seen |= following
        waiting += following
    return found


def summarise_modules(names: Iterable[str], net: nn.Module) -> list[str]:
    """`names` of parameters, summarised by the largest modules all of whose parameters are among them."""
    return list(_iterate_modules(set(names), "", net))


def _iterate_modules(names: set[str], prefix: str, module: nn.Module) -> Iterator[str]:
    names_here = [f"{prefix}{name}" for name, _ in module.named_parameters()]
    if prefix and names_here and names.issuperset(names_here):
        yield prefix.removesuffix(".")
        return
    yield from (f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False) if f"{prefix}{name}" in names)
    for name, child in module.named_children():
        yield from _iterate_modules(names, f"{prefix}{name}.", child)
