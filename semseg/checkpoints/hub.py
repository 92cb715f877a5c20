"""The weights of a network of transformers, from the files that its description was read from.

Only safetensors are read; transformers does it, without a connection, and we check what it loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from semseg.checkpoints.format import refuse_nonfinite_weights
from semseg.checkpoints.initialise import LoadReport, find_differences, is_counter, shorten_names
from semseg.errors import CheckpointError, first_line
from semseg.nets.interfaces import SegmentationNetwork
from semseg.storage.hub import CONFIG

if TYPE_CHECKING:  # an extra
    from semseg.nets.libraries.description import NetworkDescription

MODEL_PREFIX = "model."  # of the library's weights in the state dict of our network


def read_hub_weights(network: NetworkDescription) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of a network by their names in ours, in float32; and what the file has beside them.

    transformers reads them, because it knows the names and layouts of older files.

    Raises:
        CheckpointError: if a file is damaged, or does not fit its own configuration.
    """
    import transformers  # noqa: PLC0415 - an extra

    from semseg.nets.libraries.families import find_family, read_library_config  # noqa: PLC0415

    family = find_family(network.config.get("model_type"), network.source)
    config = read_library_config(network.config, len(network.class_names))
    try:
        # Weights that are missing get random numbers, which are not used.
        with torch.random.fork_rng(devices=[]):
            model, info = getattr(transformers, family.class_name).from_pretrained(
                network.folder,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # SafetensorError, OSError, and whatever a damaged file leads to
        raise CheckpointError(f"{network.source}: its weights cannot be loaded ({first_line(error)}).") from error
    reshaped = [f"{name} {tuple(found)} instead of {tuple(own)}" for name, found, own in info["mismatched_keys"]]
    if reshaped:
        raise CheckpointError(
            f"{network.source}: its weights do not fit its own {CONFIG}: {len(reshaped)} of another shape "
            f"({shorten_names(sorted(reshaped))})."
        )
    missing = set(info["missing_keys"])
    weights = {MODEL_PREFIX + name: value for name, value in model.state_dict().items() if name not in missing}
    refuse_nonfinite_weights(weights, network.source)
    return weights, sorted(MODEL_PREFIX + name for name in info["unexpected_keys"])


def load_hub_weights(net: SegmentationNetwork, network: NetworkDescription) -> LoadReport:
    """Load the weights of `network` into `net`, a network of its configuration, perhaps for other classes.

    The classifier (with the loss's class weights) is the only part that may have another shape, and weights outside the
    backbone may be missing: a backbone that was trained for image classification is a usual start.

    Raises:
        CheckpointError: if anything else differs; `net` is unchanged then.
    """
    weights, unexpected = read_hub_weights(network)
    expected = net.state_dict()
    num_classes, own_classes = len(network.class_names), net.num_classes
    other_classes = [
        name
        for name, value in weights.items()
        if name in expected
        and value.shape != expected[name].shape
        and is_classifier(net, name)
        and value.shape[1:] == expected[name].shape[1:]
        and value.shape[0] - num_classes == expected[name].shape[0] - own_classes
    ]
    backbone = {id(value) for value in net.backbone.state_dict(keep_vars=True).values()}
    own = net.state_dict(keep_vars=True)
    missing = [
        name for name in expected if name not in weights and not is_counter(name) and id(own[name]) not in backbone
    ]
    skipped = [name for name in weights if name not in expected and not is_counter(name)]
    set_aside = {*other_classes, *skipped}
    usable = {name: value for name, value in weights.items() if name not in set_aside}
    needed = {name: value for name, value in expected.items() if name not in {*other_classes, *missing}}
    problems = find_differences(usable, needed)
    if problems:
        raise CheckpointError(f"{network.source}: its weights do not fit model.config: {'; '.join(problems)}.")
    net.load_state_dict(usable, strict=False)
    return LoadReport(list(usable), [*skipped, *unexpected], other_classes, missing)


def is_classifier(net: Any, name: str) -> bool:
    """Whether the first dimension of a weight is the number of classes."""
    prefixes = tuple(MODEL_PREFIX + prefix for prefix in net.family.classifiers)
    return name.startswith(prefixes) or name == f"{MODEL_PREFIX}criterion.empty_weight"
