"""mode=replay: repeat a sub-batch that gave a NaN or infinite loss, and name the layer where it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from semseg.build import build_module, choose_device, open_network, restore_network
from semseg.checkpoints.format import NET_PREFIX, SAFETENSORS, TRAINED_WEIGHTS, is_dense_tensor, load_plain
from semseg.config.override_keys import list_given_keys
from semseg.config.schema import Config
from semseg.data.batch import Batch
from semseg.errors import CheckpointError
from semseg.nets.precision import choose_weight_type, create_autocast
from semseg.system.text import escape_unprintable
from semseg.training.callbacks.nonfinite import watch_layers


class SavedStep(NamedTuple):
    """What a stopped run left of a step."""

    number: int  # from 1
    total_steps: int  # of the run; 0: a file of an earlier version does not say
    batches: list[Batch]
    seeds: list[int]  # of torch's generators before each of them


def run(config: Config, overrides: list[str]) -> None:
    """Take a step on the saved sub-batches of `input` with the weights of `ckpt`, and report what came out.

    Loss, precision, frozen layers and dropout are those of the run. With several ranks, normalisation has the
    statistics of this rank's images alone. The device is that of trainer.accelerator: half precision
    may be rounded otherwise on a CPU than on the GPU of the run.

    Raises:
        SemsegError: for anything the user can fix.
    """
    assert config.input is not None, "find_mode_problems asks for it"
    path = Path(config.input).expanduser()
    step = read_step(path)
    saved, config = open_network(config, overrides)
    config = restore_training(saved.config, config, overrides)
    device, precision = choose_device(config.trainer), config.trainer.precision
    saved = saved._replace(weights=read_trained_weights(Path(saved.source)) or saved.weights)
    module = build_module(config, restore_network(saved), saved.classes).to(device, choose_weight_type(precision))
    module.prepare_training()
    if step.total_steps:
        module.net.set_progress(step.number - 1, step.total_steps)
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        Text(escape_unprintable(f"step {step.number} repeated, with the weights of {saved.source} (step {saved.step})"))
    )
    for batch, seed in zip(step.batches, step.seeds, strict=True):
        module.zero_grad()
        torch.manual_seed(seed)
        moved = batch._replace(**{name: getattr(batch, name).to(device) for name in ("image", "label", "size")})
        with create_autocast(precision, device), watch_layers(module.net) as layers:
            loss = module.compute_loss(moved, config.loss.average)
        loss.total.backward()
        nonfinite = [
            name
            for name, value in module.net.named_parameters()
            if value.grad is not None and not value.grad.isfinite().all()
        ]
        console.print(Text(escape_unprintable(f"images {', '.join(batch.paths)}")))
        console.print(f"loss {loss.total.item():g}, {int(loss.scored)} scored pixels")
        if layers:
            console.print(f"the first layer to give NaN or infinity: {layers[0].name} ({layers[0].kind})")
        console.print(
            f"gradients that are not finite: {', '.join(nonfinite[:5]) or 'none'}{', ...' if nonfinite[5:] else ''}"
        )


def restore_training(saved: Config, config: Config, overrides: Sequence[str]) -> Config:
    """The configuration of mode=replay with what decides a step of the run; loss and precision unless they are given.

    A compiled network has no layers that can be watched.
    """
    keys = list_given_keys(overrides)
    is_given = any(key.partition(".")[0] == "loss" for key in keys)
    precision = config.trainer.precision if "trainer.precision" in keys else saved.trainer.precision
    return replace(
        config,
        loss=config.loss if is_given else saved.loss,
        syncbn=saved.syncbn,
        trainer=replace(config.trainer, precision=precision),
        model=replace(config.model, compile=False),
    )


def read_trained_weights(path: Path) -> dict[str, Tensor]:
    """The weights that were trained, where the checkpoint has their moving average as those of the network."""
    content = load_plain(path) if path.is_file() and path.suffix != SAFETENSORS else {}
    trained = content.get(TRAINED_WEIGHTS, {})
    return {name.removeprefix(NET_PREFIX): value for name, value in trained.items() if name.startswith(NET_PREFIX)}


def read_step(path: Path) -> SavedStep:
    """The step in a file that a stopped run left.

    Raises:
        CheckpointError: if it is another kind of file.
    """
    content: dict[str, Any] = load_plain(path)
    try:
        batches = [Batch(**batch) for batch in content["batches"]]
        number, total_steps = int(content["step"]), int(content.get("total_steps", 0))
        seeds = [int(seed) for seed in content.get("seeds", [0] * len(batches))]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"input={path}: not a saved sub-batch; a run that ends with a NaN loss prints its name."
        ) from error
    if len(seeds) != len(batches) or not all(is_dense_tensor(value) for batch in batches for value in batch[:3]):
        raise CheckpointError(f"input={path}: not a saved sub-batch.")
    return SavedStep(number, total_steps, batches, seeds)
