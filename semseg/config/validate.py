"""Check a composed configuration: all of its problems are gathered and raised once. Imports no torch."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from semseg.config.fields import (
    MAX_FLOAT,
    MAX_INT,
    find_edge_problems,
    find_view_problems,
    format_wrong_choice,
    is_int_between,
)
from semseg.config.hints import explain_unknown_key
from semseg.config.schema import (
    ALLOWED_TARGETS,
    EXPORT_SUFFIXES,
    EXPORTED_NETWORK_MODES,
    INSTANTIATE_KEYS,
    MONITORED_METRICS,
    ONNX,
    PREDICT_OUTPUTS,
    PRINTING_MODES,
    SMOOTHED_LOSSES,
    TORCH_EXPORT,
    WEIGHTED_LOSSES,
    ZOO_PREFIX,
    AugmentConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    TrainerConfig,
    config_to_plain,
    get_sections,
    list_keys,
)
from semseg.errors import ConfigError


def check_config(composed: DictConfig) -> Config:
    """The composed configuration as typed sections, or one error with all its problems.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, sections that contradict.
    """
    try:
        return _check_sections(composed)
    except RecursionError:
        raise ConfigError("cannot read the configuration: a value has too many brackets inside each other.") from None


def _check_sections(composed: DictConfig) -> Config:
    """`check`, without its answer to values that are nested too deeply."""
    plain = OmegaConf.to_container(composed, resolve=False)
    told = next(find_section_problems(plain), None)
    if told is not None:
        raise ConfigError(told)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), composed)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_omegaconf_error(error, composed)) from None
    assert isinstance(config, Config)
    told = next(find_interpolation_problems(config), None)
    if told is not None:
        raise ConfigError(told)  # alone: the other sentences quote values
    problems = [*find_range_problems(config), *find_target_problems(config), *find_cross_problems(config)]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration:\n  " + "\n  ".join(problems))
    return config


def explain_omegaconf_error(error: OmegaConfBaseException, composed: DictConfig) -> str:
    """OmegaConf's error as one line: the key, the value, and the nearest valid name."""
    key = str(error.full_key or error.key or "")
    if isinstance(error, ConfigKeyError):
        return explain_unknown_key(key, list_keys())
    value = dict(iterate_leaves(OmegaConf.to_container(composed, resolve=False))).get(key)
    reason = str(error.msg or error).splitlines()[0].rstrip(".")
    reason = reason.removeprefix("ConfigError raised while resolving interpolation: ")
    if "Missing mandatory value" in str(error) or (
        key and OmegaConf.is_missing(composed, key.split(".", maxsplit=1)[0])
    ):
        return f"{key} must be set: {key}=..."
    return f"{key}={value}: {reason}." if key else f"cannot read the configuration: {reason}."


def find_section_problems(plain: Any, cls: type = Config, prefix: str = "") -> Iterator[str]:
    """A sentence for every section that was given one value in the place of its keys."""
    for name, kind in get_sections(cls).items():
        key, value = prefix + name, plain.get(name, {})
        if isinstance(value, dict):
            yield from find_section_problems(value, kind, key + ".")
        elif value is not None:
            keys = ", ".join(f"{key}.{item.name}" for item in fields(kind))
            yield f"{key}={value}: is a section, not a value. Its keys: {keys}."
    for name in ("encoder", "decoder"):
        value = plain.get(name, {}) if cls is ModelConfig else {}
        if not isinstance(value, dict):
            yield f"{prefix}{name}={value}: is a section, not a value. Choose a network by model/{name}=<name>."


def find_range_problems(section: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for every value outside the range or the choices of its field."""
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            yield from find_range_problems(value, key + ".")
            continue
        choices = item.metadata.get("choices")
        if choices and value is not None and value not in choices:  # None is for the types to refuse
            yield format_wrong_choice(key, value, choices)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield from _bounds(key, value, item.metadata)


def _bounds(key: str, value: float, limits: Mapping[str, Any]) -> Iterator[str]:
    largest = MAX_FLOAT if isinstance(value, float) else MAX_INT
    if not abs(value) <= largest:  # nor is a NaN
        yield f"{key}={value}: must be a number of at most {largest:.8g}."
        return
    rules = {"low": ("at least", operator.ge), "above": ("above", operator.gt)}
    rules |= {"high": ("at most", operator.le), "below": ("below", operator.lt)}
    bounds = [(words, limits[name], holds) for name, (words, holds) in rules.items() if limits.get(name) is not None]
    if not all(holds(value, bound) for _, bound, holds in bounds):
        yield f"{key}={value}: must be {' and '.join(f'{words} {bound}' for words, bound, _ in bounds)}."


def find_interpolation_problems(config: Config) -> Iterator[str]:
    """A sentence for every text that would change its meaning where the configuration is saved."""
    for key, value in iterate_leaves(config_to_plain(config)):
        if "${" in f"{key}={value}":
            yield f"{key}={value}: a value cannot hold ${{ as text; it would be read as an interpolation."


def find_target_problems(config: Config) -> Iterator[str]:
    """A sentence for every logger and callback that is not on the allow-list, and for words of Hydra elsewhere."""
    plain = config_to_plain(config)
    for group in ("logger", "callbacks"):
        for name, section in plain[group].items():
            target = section.pop("_target_", None) if isinstance(section, dict) else None
            if target not in ALLOWED_TARGETS:
                yield f"{group}.{name}._target_={target}: not allowed. Allowed: {', '.join(ALLOWED_TARGETS)}."
    for place in find_instantiate_keys(plain):
        yield f"{place}: not allowed here."


def find_instantiate_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """The places of all keys in nested dicts and lists that Hydra could take for a word of its own, in any case."""
    if not isinstance(node, dict | list):
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        place = f"{prefix}.{key}" if prefix else str(key)
        if str(key).strip().lower() in INSTANTIATE_KEYS:
            yield place
        yield from find_instantiate_keys(value, place)


def iterate_leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All (dotted key, leaf) pairs of nested dicts and lists."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from iterate_leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from iterate_leaves(value, f"{prefix}.{index}")
    else:
        yield prefix, node


def find_cross_problems(config: Config) -> Iterator[str]:
    """A sentence for every pair of fields that contradict each other."""
    yield from find_edge_problems("data.short_edges", config.data.short_edges)
    yield from find_view_problems("eval.", config.eval.scales, config.eval.window, config.eval.stride)
    predict = config.predict
    scales = config.eval.scales if predict.scales is None else predict.scales
    yield from find_view_problems("predict.", scales, predict.window, predict.stride)
    for part in config.eval.also_scales:
        if not part or not set(part) <= set(config.eval.scales):
            yield f"eval.also_scales: {part} must be a part of eval.scales={config.eval.scales}, such as [[450]]."
    yield from _device_problems(config.trainer)
    divisor, stride = config.model.size_divisor, config.model.label_stride
    if divisor and stride and divisor % stride:
        yield f"model.size_divisor={divisor}: must be a multiple of model.label_stride={stride}."
    yield from _mode_problems(config)
    yield from _loss_problems(config.loss)
    yield from _label_problems(config.data)
    yield from _augment_problems(config.augment)
    yield from _training_problems(config)
    yield from _exported_file_problems(config)
    yield from _export_problems(config)
    for mode in config.after_training:
        if mode not in ("eval", "predict"):
            yield format_wrong_choice("after_training", mode, ("eval", "predict"))
    for output in config.predict.save:
        if output not in PREDICT_OUTPUTS:
            yield format_wrong_choice("predict.save", output, PREDICT_OUTPUTS)


def _mode_problems(config: Config) -> Iterator[str]:
    """A sentence for every key that the mode needs and that is not there, or that does not belong to it."""
    needs_checkpoint = config.mode in ("eval", "predict", "convert", "replay", "serve", "export")
    if needs_checkpoint and not config.ckpt:
        yield f"mode={config.mode} needs ckpt=<file, run folder, last, best, zoo:<name> or folder of published files>."
    starts = [key for key in ("ckpt", "resume", "init_from") if getattr(config, key) not in (None, "auto")]
    if config.mode == "train" and "ckpt" in starts and len(starts) > 1:
        yield f"{' and '.join(starts)}: a run starts from one of them; leave the others out."
    if config.mode == "convert" and not config.output:
        yield "mode=convert needs output=<file.ckpt, file.safetensors, or a folder for encoder_ and decoder_ files>."
    if config.mode == "replay" and not config.input:
        yield "mode=replay needs input=<sub-batch that a run with a NaN loss has saved>."
    is_demonstration = (config.ckpt or "").startswith(ZOO_PREFIX)  # which brings its picture along
    if config.mode == "predict" and not config.input and not is_demonstration:
        yield "mode=predict needs input=<image, video, folder, pattern, list of paths, or - for standard input>."
    if config.quiet and config.mode in PRINTING_MODES:
        yield f"quiet=true: mode={config.mode} does nothing but print."
    if config.mode == "compare" and len(config.runs) < 2:
        yield f"runs={config.runs}: mode=compare needs at least two evaluations: runs=[<folder>,<folder>]."


def _label_problems(data: DataConfig) -> Iterator[str]:
    """A sentence for everything that is no map, colour, or pair of folders."""
    if data.map is not None:
        entries = data.map.items() if isinstance(data.map, dict) else [(data.map, None)]
        wrong = [f"{key}: {index}" for key, index in entries if not (_is_id(key) and (index is None or _is_id(index)))]
        if wrong or not data.map:
            yield f"data.map={data.map}: must be like {{7: 0, 8: 1, 255: null}}: label value, class index."
    for colour in data.ignore_colors:
        if len(colour) != 3 or not all(0 <= part <= 255 for part in colour):
            yield f"data.ignore_colors={data.ignore_colors}: a colour is [red, green, blue], each 0..255."
    if bool(data.images) != bool(data.masks):
        yield f"data.images={data.images} and data.masks={data.masks}: give both, or neither."


def _augment_problems(augment: AugmentConfig) -> Iterator[str]:
    """A sentence for every range that is none."""
    for key, lowest in (("blur_sigma", 0.0), ("scale", 0.0)):
        values = getattr(augment, key)
        if len(values) != 2 or not lowest < values[0] <= values[1] < math.inf:
            yield f"augment.{key}={values}: must be [from, to], above {lowest:g}."
    if augment.crop is not None and (len(augment.crop) != 2 or min(augment.crop) < 1):
        yield f"augment.crop={augment.crop}: must be [height, width] in pixels, or null."


def _is_id(word: object) -> bool:
    """Whether a key of a map, which files keep as text, is a whole number of at least 0."""
    return not isinstance(word, bool) and str(word).isdecimal()


def _loss_problems(loss: LossConfig) -> Iterator[str]:
    """A sentence for a sum without terms, and for weights that are none."""
    if not any(vars(loss.terms).values()):
        yield "loss.terms: at least one must have a factor above 0."
    weights = loss.class_weights
    is_list = isinstance(weights, list) and all(
        isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf
        for weight in weights
    )
    if weights is not None and not isinstance(weights, str) and not is_list:
        yield f"loss.class_weights={weights}: must be null, a list of numbers of at least 0, or a JSON file."
    if isinstance(weights, list) and not any(weights):
        yield f"loss.class_weights={weights}: must have at least one above 0."
    for key, value, losses in (
        ("class_weights", weights, WEIGHTED_LOSSES),
        ("label_smoothing", loss.label_smoothing, SMOOTHED_LOSSES),
    ):
        if value and not any(getattr(loss.terms, name) for name in losses):
            yield f"loss.{key}={value}: is for {', '.join(losses)}, and none of them is in loss.terms."


def _training_problems(config: Config) -> Iterator[str]:
    """A sentence for everything about weights and callbacks that cannot be trained like this."""
    frozen = config.model.encoder.get("frozen", False)
    if not isinstance(frozen, bool):
        yield f"model.encoder.frozen={frozen}: must be true or false."
    for key in ("limit_train_batches", "max_steps"):
        if config.mode == "train" and getattr(config.trainer, key) == 0:
            yield f"trainer.{key}=0: there is nothing to train. Leave it out, or give at least 1."
    if config.ema.decay is not None and not replicates_weights(config.trainer):
        yield (
            f"ema.decay={config.ema.decay}: the average needs all weights on every device, which "
            f"trainer.strategy={config.trainer.strategy} does not promise. Use trainer.strategy=ddp."
        )
    for name, section in config.callbacks.items():
        monitor = section.get("monitor", MONITORED_METRICS[0]) if isinstance(section, dict) else MONITORED_METRICS[0]
        if monitor not in MONITORED_METRICS:
            yield format_wrong_choice(f"callbacks.{name}.monitor", monitor, MONITORED_METRICS)


def _exported_file_problems(config: Config) -> Iterator[str]:
    """A sentence for every exported network in a place where none can be used."""
    files = {key: getattr(config, key) for key in ("ckpt", "init_from", "resume")}
    files["model.encoder.weights"] = config.model.encoder.get("weights")
    for key, file in files.items():
        suffix = Path(str(file)).suffix.lower()
        if suffix == TORCH_EXPORT:
            yield f"{key}={file}: is not read, for reading it could run code in it. Export to {ONNX} for that."
        if suffix == ONNX and (key != "ckpt" or config.mode not in EXPORTED_NETWORK_MODES):
            modes = ", ".join(EXPORTED_NETWORK_MODES)
            yield f"{key}={file}: an exported network is for mode={modes}. Give its checkpoint."
    if Path(str(config.ckpt)).suffix.lower() != ONNX:
        return
    ways = {
        "model.compile": False,
        "model.channels_last": False,
        "model.winograd": True,
        "trainer.precision": "32-true",
    }
    given = dict(iterate_leaves(config_to_plain(config)))
    for key, default in ways.items():
        if given[key] != default:
            yield f"{key}={given[key]}: an exported network runs as it was exported. Leave this at {default}."


def _export_problems(config: Config) -> Iterator[str]:
    """A sentence for everything that mode=export cannot write."""
    if config.mode != "export":
        return
    meant = EXPORT_SUFFIXES.get(Path(str(config.output)).suffix)
    if meant is None:
        yield f"output={config.output}: mode=export needs output=<file{ONNX} or file{TORCH_EXPORT}>."
    elif config.format not in ("auto", meant):
        yield f"format={config.format}: output={config.output} would be format={meant}."
    if config.export.quantize != "none" and meant == "torch_export":
        yield f"export.quantize={config.export.quantize}: is for {ONNX} files."


def replicates_weights(trainer: TrainerConfig) -> bool:
    """Whether every device has the whole network."""
    return trainer.strategy.startswith(("auto", "ddp"))


def _device_problems(trainer: TrainerConfig) -> Iterator[str]:
    devices = trainer.devices
    fine = (
        devices in ("auto", -1)
        or (isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1)
        or (isinstance(devices, list) and devices and all(isinstance(d, int) and d >= 0 for d in devices))
    )
    if not fine:
        yield f"trainer.devices={devices}: must be a count of at least 1, a list such as [0,2], a range 0-3, or auto."
    if trainer.strategy.lower().startswith("fsdp"):
        yield (
            f"trainer.strategy={trainer.strategy}: not supported, since averages, statistics and checkpoints need all "
            "weights on every device. Use trainer.strategy=ddp."
        )
    for key, lowest in (("limit_train_batches", 1), ("limit_val_batches", 0)):
        value = getattr(trainer, key)
        is_share = isinstance(value, float) and value <= 1 and (value > 0 or value == lowest)
        if value is not None and not is_share and not is_int_between(value, low=lowest, high=MAX_INT):
            yield f"trainer.{key}={value}: must be null, a count of at least {lowest}, or a share up to 1.0."
    if trainer.max_steps == 0:
        yield "trainer.max_steps=0: must be at least 1, or -1 for no limit."
    if not isinstance(trainer.fast_dev_run, bool) and not is_int_between(trainer.fast_dev_run, low=1, high=MAX_INT):
        yield f"trainer.fast_dev_run={trainer.fast_dev_run}: must be true, false, or a number of batches."
