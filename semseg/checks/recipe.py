"""The settings that mode=check chooses for a data set on a machine, each with its reason, as a recipe. No torch.

What the data do not decide comes from the recipe for own images (configs/experiment/own_data.yaml), whose values were
measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from semseg.config.groups import CONFIG_DIR, list_groups
from semseg.config.override_keys import list_given_keys
from semseg.config.recipes import list_chosen_options
from semseg.config.schema import flatten_sections
from semseg.data.crops import NATIVE
from semseg.data.geometry import Size
from semseg.errors import ConfigError
from semseg.storage.atomic import atomic_write

BASE_RECIPE = "own_data"
CPU_EDGE, GPU_EDGE = 360, 512  # largest short edges, in pixels
SCALE, CROP_SHARE = (0.5, 2.0), 320 / 360  # of images that are resized; of the side of a crop to the short edge
MIN_OBJECT = 8  # pixels a side: smaller objects hardly show in logits of every fourth pixel
NATIVE_CROP = 512
SAME_SETTING = {"data.crop", "augment.crop"}
# What takes the place of the network of a recipe; other keys of `model` only change it.
REPLACING_KEYS = {
    "model", "model/encoder", "model/decoder", "model.encoder.name", "model.library", "model.arch", "model.name"
}  # fmt: skip
OF_RUNS = ("run_dir", "input", "after_training")  # keys of a base recipe that are not about training
BATCH_SIZES = (16, 8, 4, 2, 1)
MAX_CPU_BATCH = 4
CPU_IMAGES, GPU_IMAGES = 8000, 80_000  # training images in all passes of a run
MIN_PASSES, MAX_PASSES = 10, 200
LONG_RUN = 5000  # steps from which on the average of the weights may be a slow one
TINY_SHARE = 0.02  # fraction of the pixels of both classes below which the smaller one is a defect, and not a region

# Size and number of images -> bytes of a training step; None: cannot be estimated.
EstimateMemory = Callable[[Size, int], int | None]


class Choice(NamedTuple):
    """One setting of a recipe."""

    key: str  # as on the command line: data.batch_size, or a group such as augment
    value: Any
    reason: str


class DataFacts(NamedTuple):
    """What is known of the training images."""

    sizes: Sequence[Size]
    shares: Sequence[float]  # of each class, in the scored pixels
    object_sides: Mapping[str, float]  # class -> median side of its objects in pixels, where there are enough
    has_three_bands: bool = True
    has_colours: bool = True  # red, green and blue are among the bands
    given_resize: str | None = None  # data.resize, if it was given
    given_edge: int | None = None  # the largest of data.short_edges, if they were given
    given_batch: int | None = None  # data.batch_size, if it was given
    given_epochs: int | None = None  # trainer.max_epochs, if it was given
    epoch_steps: int | None = None  # data.steps_per_epoch; None: an epoch is one pass
    max_steps: int = -1  # trainer.max_steps; -1: no limit


class Machine(NamedTuple):
    """What the recipe is for."""

    has_gpu: bool
    memory: int  # bytes of the GPU, or of this machine without one
    has_timm: bool = True  # whether its networks can be used


WITHOUT_TIMM = (
    Choice("model/encoder", "torchvision", "timm, which has the measured one, is not installed"),
    Choice("model.encoder.name", "efficientnet_b0", "of about the same size"),
)


def choose_settings(
    facts: DataFacts, machine: Machine, rates: Mapping[str, float], estimate_memory: EstimateMemory
) -> list[Choice]:
    """Choose what the size and the number of the images decide.

    Args:
        rates: learning rates of the base recipe by key, for batches of MAX_CPU_BATCH images; empty: they are kept.
        estimate_memory: of one training step with the network of the recipe.
    """
    choices = choose_resolution(facts, machine)
    chosen = {choice.key: choice.value for choice in choices}
    crop = Size(*chosen["data.crop" if chosen["data.resize"] == NATIVE else "augment.crop"])
    batch = choose_batch(facts, crop, machine, estimate_memory)
    choices += [batch, *choose_length(facts, batch.value, machine)]
    factor = math.sqrt(batch.value / MAX_CPU_BATCH)
    rule = "as measured for this batch"
    if batch.value != MAX_CPU_BATCH:
        rule = f"that of {MAX_CPU_BATCH} images, times the square root of {batch.value} / {MAX_CPU_BATCH} (AdamW)"
    choices += [Choice(key, float(f"{rate * factor:.3g}"), rule) for key, rate in rates.items()]
    if "optim.lr" in rates:
        choices.append(Choice("optim.lr_images", batch.value, "the images of a step that these rates are for"))
    choices.append(choose_augmentation(facts, is_native=chosen["data.resize"] == NATIVE))
    return choices if machine.has_timm else [*choices, *WITHOUT_TIMM]


def choose_resolution(facts: DataFacts, machine: Machine) -> list[Choice]:
    """Choose whether images are resized, and to which edges."""
    short = statistics.median(min(size) for size in facts.sizes)
    limit = GPU_EDGE if machine.has_gpu else CPU_EDGE
    edge = facts.given_edge or max(8, 8 * round(min(short, limit) / 8))
    name, side = min(facts.object_sides.items(), key=lambda item: item[1], default=("", math.inf))
    has_small_objects = side * edge / short < MIN_OBJECT and edge < 0.75 * short
    if facts.given_resize == NATIVE or (facts.given_resize is None and has_small_objects):
        crop = [min(NATIVE_CROP, 32 * math.ceil(min(size[axis] for size in facts.sizes) / 32)) for axis in (0, 1)]
        seen = f"{side * edge / short:.1f} pixels a side"
        reason = f"at a short edge of {edge}, half of the objects of {name} would have less than {seen}"
        reason = "as it was given" if facts.given_resize else reason
        return [
            Choice("data.resize", NATIVE, reason),
            Choice("data.crop", crop, "pixels of the crops of training, and of the windows of evaluation"),
            Choice("data.crop_foreground", 0.33, "a third of the crops is centred on an object, rare classes first"),
        ]
    device = "GPU" if machine.has_gpu else "CPU"
    aspect = sorted(max(size) / min(size) for size in facts.sizes)[int(0.95 * (len(facts.sizes) - 1))]
    crop = max(32, 32 * round(edge * CROP_SHARE / 32))
    why = f"the median short side is {short:g} pixels, and {limit} is what a {device} trains in reasonable time"
    return [
        Choice("data.resize", "short_edge", "objects keep at least 8 pixels, as far as is known"),
        Choice("data.short_edges", [edge], why),
        Choice("data.max_long_edge", 8 * math.ceil(edge * aspect / 8), "for 95 % of the images no limit"),
        Choice("eval.scales", [edge], "that of training"),
        Choice("augment.scale", list(SCALE), "of every image, in addition to the short edge"),
        Choice("augment.crop", [crop, crop], f"pixels, {crop / edge:.0%} of the short edge; as measured"),
    ]


def choose_batch(facts: DataFacts, crop: Size, machine: Machine, estimate_memory: EstimateMemory) -> Choice:
    """Choose the number of images of a step, unless it was given."""
    largest = BATCH_SIZES[0] if machine.has_gpu else MAX_CPU_BATCH
    sizes = [size for size in BATCH_SIZES if size <= min(largest, max(1, len(facts.sizes) // 4))]
    if facts.given_batch is not None:
        sizes = [facts.given_batch]
    needs = {size: estimate_memory(crop, size) for size in sizes}
    size = next((size for size, need in needs.items() if need is not None and need < machine.memory / 2), sizes[-1])
    need = needs[size]
    memory = "the memory of a step cannot be estimated for this network"
    if need is not None:
        memory = f"needs about {need / 2**30:.1f} of {machine.memory / 2**30:.0f} GB"
    more = ""
    if not machine.has_gpu and facts.given_batch is None:
        more = "; on a CPU, more small steps teach more than few large ones"
    return Choice("data.batch_size", size, f"{memory}{more}")


def choose_length(facts: DataFacts, batch_size: int, machine: Machine) -> Iterator[Choice]:
    """Choose the number of epochs, unless it was given, and what depends on the number of steps."""
    total, num_images = GPU_IMAGES if machine.has_gpu else CPU_IMAGES, len(facts.sizes)
    passes = min(MAX_PASSES, max(MIN_PASSES, round(total / num_images)))
    steps_per_pass = max(1, num_images // batch_size)
    steps_per_epoch, meaning = steps_per_pass, f"an epoch is one pass over {num_images} images"
    if facts.epoch_steps is not None:
        steps_per_epoch, meaning = facts.epoch_steps, f"an epoch has {facts.epoch_steps}"
    epochs = facts.given_epochs or max(1, round(passes * steps_per_pass / steps_per_epoch))
    steps = epochs * steps_per_epoch
    if facts.max_steps > 0:
        steps = min(steps, facts.max_steps)
    yield Choice("trainer.max_epochs", epochs, f"{steps} steps; {meaning}")
    interval = max(1, epochs // 20)
    yield Choice("trainer.check_val_every_n_epoch", interval, "about twenty validations in the run")
    warmup = max(1, min(500, steps // 20))
    yield Choice("schedule.warmup_steps", warmup, "a twentieth of the steps")
    decay = 0.999 if steps >= LONG_RUN else 0.99
    yield Choice("ema.decay", decay, f"an average over the last {round(1 / (1 - decay))} steps")
    yield Choice(
        "ema.start_step", steps // 2, "half of the steps: the first weights do not count, also if it stops early"
    )


def choose_augmentation(facts: DataFacts, *, is_native: bool) -> Choice:
    """Choose a preset of augmentation."""
    names = {path.stem for path in (CONFIG_DIR / "augment").glob("*.yaml")}
    is_defect = len(facts.shares) == 2 and min(facts.shares) < TINY_SHARE
    if not facts.has_colours:
        reason = "the others change red, green and blue, which the bands do not have"
        return Choice("augment", "microscopy" if is_native and "microscopy" in names else "none", reason)
    if is_native and not facts.has_three_bands and "aerial" in names:
        return Choice("augment", "aerial", "images of other bands than three are mostly taken from above")
    if is_native and is_defect and "defects" in names:
        return Choice("augment", "defects", f"the rarer of two classes has {min(facts.shares):.2%} of the pixels")
    return Choice("augment", "color", "cameras and light vary; photographs are mirrored, not turned")


# ---- the file


def make_recipe(
    choices: Sequence[Choice], data: Mapping[str, Any], base: Mapping[str, Any], given: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of a recipe, and the reasons by key.

    Args:
        choices: what was chosen.
        data: the section `data` of the data set; what the user set in it takes the place of choices.
        base: the content of the recipe that gives all other values.
        given: overrides of the user; what they set is left out of the recipe, so that it does not contradict them.
    """
    keys = list_given_keys(given)

    def is_given(key: str) -> bool:
        return any(overrides_key(given_key, key) or {given_key, key} == SAME_SETTING for given_key in keys)

    groups: dict[str, Any] = {"data": "folder"}
    content: dict[str, Any] = {"data": dict(data)}
    reasons = {choice.key: choice.reason for choice in choices}
    groups |= list_chosen_options(base) | {"data": "folder"}  # which `data` is described by
    replaced = ("defaults", "augment.scale", "augment.crop", *OF_RUNS)  # chosen with the resolution, or by a preset
    values = {key: value for key, value in flatten_sections(base) if key not in replaced and not is_given(key)}
    values |= {choice.key: choice.value for choice in choices if not is_given(choice.key)}
    for key, value in values.items():
        if key in list_groups():
            groups[key] = value
        else:
            *sections, last = key.split(".")
            target = content
            for name in sections:
                target = target.setdefault(name, {})
            target[last] = value
    defaults = [{f"override /{key}": value} for key, value in groups.items() if key == "data" or not is_given(key)]
    return {"defaults": defaults, **content}, reasons


def overrides_key(given: str, key: str) -> bool:
    """Whether an override of `given` decides `key`: the same key, a section or group that holds it, or the network.

    >>> overrides_key("optim", "optim.lr"), overrides_key("optim.momentum", "optim.lr")
    (True, False)
    >>> overrides_key("model", "model/encoder"), overrides_key("model/decoder", "model.channels_last")
    (True, False)
    >>> overrides_key("model.label_stride", "model/encoder"), overrides_key("model.label_stride", "model.label_stride")
    (False, True)
    """
    if given in REPLACING_KEYS and key.startswith("model"):
        return key != "model.channels_last"
    return key == given or key.startswith((f"{given}.", f"{given}/"))


def write_lines(
    content: Mapping[str, Any], reasons: Mapping[str, str], prefix: str = "", indent: str = ""
) -> Iterator[str]:
    """Yield the lines of a recipe in YAML, each value with its reason as a comment."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and name != "map":
            yield f"{indent}{name}:"
            yield from write_lines(value, reasons, f"{key}.", f"{indent}  ")
            continue
        if key == "defaults":
            yield "defaults:"
            for entry in value:
                ((option, choice),) = entry.items()
                yield add_reason(f"  - {option}: {choice}", reasons.get(option.removeprefix("override /")))
            continue
        text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6)
        yield add_reason(f"{indent}{name}: {text.strip()[1:-1]}", reasons.get(key))


def write_recipe(
    file: Path, content: Mapping[str, Any], reasons: Mapping[str, str], command: str, base: str = BASE_RECIPE
) -> None:
    """Write a recipe, unless the file has it already.

    Args:
        command: the one that trains with it.
        base: the experiment that gives what the data do not decide.

    Raises:
        ConfigError: if the file exists and has another content, which is kept.
    """
    if file.exists():
        if read_content(file) != content:
            raise ConfigError(f"output={file}: exists with another content. Remove it, or give another name.")
        return
    with atomic_write(file) as temporary:
        temporary.write_text(format_recipe(content, reasons, file, command, base), encoding="utf-8")


def read_content(file: Path) -> Any:
    """The content of a YAML file; None if it has none."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None


def add_reason(line: str, reason: str | None) -> str:
    return f"{line:<40}  # {reason}" if reason else line


def format_recipe(content: Mapping[str, Any], reasons: Mapping[str, str], file: Path, command: str, base: str) -> str:
    """The text of a recipe; see `write_recipe`."""
    source = f"experiment={base}{' (docs/results.md)' if base == BASE_RECIPE else ''}"
    head = [
        "# @package _global_",
        f"# A recipe that mode=check chose for a data set and a machine: {command}",
        f"# data={file.name} uses its section data alone. Relative paths start at the folder of this file.",
        f"# Values without a comment are those of {source}, unless they were given.",
    ]
    return "\n".join([*head, *write_lines(content, reasons)]) + "\n"
