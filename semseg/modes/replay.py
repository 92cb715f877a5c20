"""mode=replay: repeat a sub-batch that gave a NaN or infinite loss, and name the layer where it began."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from semseg.build import open_network, restore_network
from semseg.checkpoints.format import is_dense_tensor, load_plain
from semseg.config.schema import Config
from semseg.data.batch import Batch
from semseg.errors import CheckpointError
from semseg.nets.normalise import normalise
from semseg.system.text import escape_unprintable
from semseg.training.callbacks.nonfinite import find_nonfinite_layer
from semseg.training.losses import build_terms, segmentation_loss


def run(config: Config, overrides: list[str]) -> None:
    """Take a step on the saved sub-batches of `input` with the weights of `ckpt`, and report what came out.

    Raises:
        SemsegError: for anything the user can fix.
    """
    assert config.input is not None, "config.check asks for it"
    path = Path(config.input).expanduser()
    step, batches = read_batches(path)
    saved, config = open_network(config, overrides)
    net = restore_network(saved).train()
    terms = build_terms(saved.config.loss, saved.classes.num_classes)
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        Text(escape_unprintable(f"step {step} repeated, with the weights of {saved.source} (step {saved.step})"))
    )
    for batch in batches:
        image = normalise(batch.image, net.convention, batch.size)
        layer = find_nonfinite_layer(net, image)
        loss = segmentation_loss(net(image), batch.label, config.model.deepsup_weight, terms=terms)
        loss.total.backward()
        nonfinite = [
            name for name, value in net.named_parameters() if value.grad is not None and not value.grad.isfinite().all()
        ]
        console.print(Text(escape_unprintable(f"images {', '.join(batch.paths)}")))
        console.print(f"loss {float(loss.total):g}, {int(loss.scored)} scored pixels")
        if layer:
            console.print(f"the first layer to give NaN or infinity: {layer.name} ({layer.kind})")
        console.print(
            f"gradients that are not finite: {', '.join(nonfinite[:5]) or 'none'}{', ...' if nonfinite[5:] else ''}"
        )


def read_batches(path: Path) -> tuple[int, list[Batch]]:
    """The step and the sub-batches of a file that a stopped run left.

    Raises:
        CheckpointError: if it is another kind of file.
    """
    content: dict[str, Any] = load_plain(path)
    try:
        batches = [Batch(**batch) for batch in content["batches"]]
        step = int(content["step"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"input={path}: not a saved sub-batch; a run that ends with a NaN loss prints its name."
        ) from error
    if not all(is_dense_tensor(value) for batch in batches for value in batch[:3]):
        raise CheckpointError(f"input={path}: not a saved sub-batch.")
    return step, batches
