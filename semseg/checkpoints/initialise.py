"""Initial weights: a backbone's ImageNet file, or a whole network for a new run.

All mismatches are reported; weights are loaded completely or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from semseg.checkpoints.format import NET_PREFIX, SavedNetwork, WeightsContent, open_weights, refuse_nonfinite_weights
from semseg.config.origin import WeightsOrigin
from semseg.config.preprocessing import RGB, Preprocessing
from semseg.errors import CheckpointError
from semseg.nets.bands import adapt_first_layers, adapt_weights
from semseg.nets.encoders.efficientnet_lite import LICENCE as LITE_LICENCE
from semseg.nets.encoders.efficientnet_lite import is_lite_layout
from semseg.nets.interfaces import Encoder, SegmentationNetwork
from semseg.syncbn.layer import OLD_BUFFERS
from semseg.system.text import escape_unprintable

COUNTER = "num_batches_tracked"  # a batch counter in files of PyTorch 0.4.1 and later; not used here
MAX_LISTED = 3


class WeightsSource(NamedTuple):
    """Where the weights of a backbone come from."""

    origin: WeightsOrigin
    convention: Preprocessing | None  # on which a checkpoint of ours was trained; None: the file does not say


def load_encoder_weights(encoder: Encoder, path: Path) -> WeightsOrigin:
    """`load_backbone_weights` for an encoder alone."""
    return _load_part(encoder, encoder.convert_weights, ["encoder"], path, open_weights(path))


def load_backbone_weights(net: SegmentationNetwork, path: Path, bands: Sequence[str] = RGB) -> WeightsSource:
    """Load the backbone of `net` from a file of ImageNet weights, or from that of a checkpoint, by name and shape.

    The ImageNet classifier and the extra buffers of old normalisation layers are skipped. Returns where the weights
    come from: for a checkpoint of ours, what the checkpoint says.

    Args:
        bands: of the images. Weights for these bands, of a checkpoint of ours, are loaded too: the layers of `net` that
            read the image are then made for them.

    Raises:
        CheckpointError: if the file is damaged or for other bands, or any weight is missing, unexpected or of another
            shape; the first of each kind are named, and the backbone is unchanged.
    """
    content = open_weights(path)
    if content.convention is not None and content.convention.bands != RGB:
        check_bands_of_weights(f"model.encoder.weights={path}", content.convention.bands, bands)
        adapt_first_layers(net, bands)
    backbone = net.backbone
    name = next((name for name, module in net.named_modules() if module is backbone), None)
    # `model.` is the library's module in our wrapper, which is not in the library's own files.
    names = [name, name.removeprefix("model.")] if name else []
    origin = _load_part(backbone, net.convert_weights, names, path, content)
    return WeightsSource(origin, content.convention)


def check_bands_of_weights(source: str, has: Sequence[str], needs: Sequence[str]) -> None:
    """Refuse weights for other bands than those of the images, unless they are for red, green and blue.

    Raises:
        CheckpointError: with both; it begins with `source`.
    """
    if tuple(has) not in (tuple(needs), RGB):
        raise CheckpointError(
            f"{source}: its network takes the bands {', '.join(has)}, and data.bands are {', '.join(needs)}. Set "
            f"data.bands=[{','.join(has)}], or start from a network for red, green and blue."
        )


def _load_part(
    part: nn.Module,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    names: Sequence[str],
    path: Path,
    content: WeightsContent,
) -> WeightsOrigin:
    found = content.tensors
    refuse_nonfinite_weights(found, str(path))
    try:
        weights = extract_weights(found, names) or convert(found)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    load_all_weights(part, drop_old_buffers(weights), f"{path}: does not fit model.encoder")
    return content.origin or WeightsOrigin(path.name, LITE_LICENCE if is_lite_layout(found) else "")


def extract_weights(weights: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The weights of a part, by one of its `names` in a whole network; empty if they are not those of one."""
    for prefix in (f"{before}{name}." for name in names for before in (NET_PREFIX, "")):
        part = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if part:
            return part
    return {}


def load_all_weights(module: nn.Module, weights: dict[str, Tensor], error_prefix: str) -> None:
    """Load all weights of `module`, cast to its types; batch counters may be missing.

    Raises:
        CheckpointError: begins with `error_prefix` and names what is missing, unexpected or has another shape; then
            nothing is loaded.
    """
    problems = find_differences(weights, module.state_dict())
    if problems:
        raise CheckpointError(f"{error_prefix}: {'; '.join(problems)}.")
    module.load_state_dict(weights, strict=False)


def drop_old_buffers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without the extra statistics of the published normalisation layers."""
    return {name: value for name, value in weights.items() if name.rpartition(".")[2] not in OLD_BUFFERS}


def find_differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Why `found` cannot be loaded into `expected`, one phrase for each kind; batch counters are ignored."""
    missing = [name for name in expected if name not in found and not is_counter(name)]
    unexpected = [name for name in found if name not in expected and not is_counter(name)]
    reshaped = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    retyped = [
        f"{name} {found[name].dtype} instead of {expected[name].dtype}"
        for name in expected
        if name in found
        and found[name].is_floating_point() != expected[name].is_floating_point()
        and not is_counter(name)
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped, "of another type": retyped}
    return [f"{len(names)} {kind} ({shorten_names(names)})" for kind, names in kinds.items() if names]


def is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == COUNTER


def shorten_names(names: list[str]) -> str:
    """The first few names.

    >>> shorten_names(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join(map(escape_unprintable, names[:MAX_LISTED])) + (", ..." if len(names) > MAX_LISTED else "")


class LoadReport(NamedTuple):
    """The names of the weights of a file and of a network, by what happened to them."""

    loaded: list[str]
    skipped: list[str]  # only in the file: an auxiliary head that is switched off
    reinitialised: list[str]  # in both, but with another number of classes
    missing: list[str]  # only in the network: a new auxiliary head

    def describe(self) -> str:
        """One line, which names the first weights of each kind that were not loaded."""
        kinds = {"re-initialised": self.reinitialised, "missing": self.missing, "skipped": self.skipped}
        rest = [f"{len(names)} {kind} ({shorten_names(names)})" for kind, names in kinds.items() if names]
        return ", ".join([f"{len(self.loaded)} tensors loaded", *rest])

    def make_table(self, source: str) -> Table:
        """A table with one row for each kind."""
        table = Table(title=Text(escape_unprintable(f"weights from {source}")))
        for column in ("", "tensors", "names"):
            table.add_column(column, justify="right" if column == "tensors" else "left")
        for kind, names in self._asdict().items():
            listed = "" if kind == "loaded" else ", ".join(names)
            table.add_row(kind.replace("reinit", "re-init"), str(len(names)), escape(escape_unprintable(listed)))
        return table


def initialise_from(net: SegmentationNetwork, saved: SavedNetwork) -> LoadReport:
    """Load the weights of `saved` into `net`, for a new run with the same architecture.

    Classifiers for another number of classes keep their random weights. An auxiliary head may be in one of them.

    Raises:
        CheckpointError: if anything else differs; the first differing names are reported, and `net` is unchanged.
    """
    expected = net.state_dict()
    has, needs = saved.convention.bands, net.convention.bands
    check_bands_of_weights(f"init_from={saved.source}", has, needs)
    found = {name: value for name, value in saved.weights.items() if name in expected or not is_counter(name)}
    if has != needs:
        found = adapt_weights(found, net, needs, saved.convention.channel_order)
    other_classes = [
        name
        for name, value in found.items()
        if name in expected
        and any(
            differs_only_in_classes(value, saved.classes.num_classes + void, expected[name], net.num_classes + void)
            for void in {0, net.num_void_classes}
        )
    ]
    skipped = [name for name in found if name not in expected and is_auxiliary(name)]
    missing = [name for name in expected if name not in found and is_auxiliary(name) and not is_counter(name)]
    set_aside = {*other_classes, *skipped}
    usable = {name: value for name, value in found.items() if name not in set_aside}
    needed = {name: value for name, value in expected.items() if name not in {*other_classes, *missing}}
    problems = find_differences(usable, needed)
    if problems:
        raise CheckpointError(
            f"init_from={saved.source}: its architecture is not that of model={net.architecture}: "
            f"{'; '.join(problems)}. The file holds {saved.config.model.title}: "
            "omit model to use it, or load its encoder alone with model.encoder.weights=<file>."
        )
    net.load_state_dict(usable, strict=False)
    return LoadReport(list(usable), skipped, other_classes, missing)


def is_auxiliary(name: str) -> bool:
    """Whether a weight belongs to the head of deep supervision."""
    return (name.startswith("decoder.") and "_deepsup." in name) or name.startswith("model.auxiliary_head.")


def differs_only_in_classes(found: Tensor, found_classes: int, expected: Tensor, expected_classes: int) -> bool:
    """Whether the shapes of two tensors differ only in their first dimension, the number of classes.

    In mask classification it is one more, for a mask of no class.
    """
    if found.shape == expected.shape or found.shape[1:] != expected.shape[1:] or not found.ndim:
        return False
    return found.shape[0] - found_classes == expected.shape[0] - expected_classes in (0, 1)
