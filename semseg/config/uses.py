"""What a use of the configuration needs, and what it cannot use: a mode of the command line, or prediction from Python.

The schema says which values are valid; the rules here depend on what is done with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path

from semseg.config.fields import AUTO
from semseg.config.override_keys import list_given_keys, override_key, split_override
from semseg.config.schema import (
    EXPORT_SUFFIXES,
    EXPORTED_NETWORK_MODES,
    ONNX,
    PRINTING_MODES,
    TORCH_EXPORT,
    ZOO_PREFIX,
    Config,
    DataConfig,
    SplitConfig,
    is_checkpoint,
    list_checkpoints,
)
from semseg.errors import ConfigError

# Keys that say to which size images are brought.
SIZE_KEYS = ("data.short_edges", "data.max_long_edge", "eval.scales", "eval.also_scales", "predict.scales")
# Keys that `eval` and `predict` both have, apart from eval.scales, which is the default of predict.scales.
VIEW_KEYS = ("flip", "window", "stride", "memory_limit_mb")
EVALUATION_KEYS = (
    "also_scales",
    "bootstrap",
    "boundary_iou",
    "boundary_ratio",
    "label_errors",
    "visualize",
)
PREDICTION_ADVICE = {
    **{f"eval.{key}": f"Use predict.{key}." for key in VIEW_KEYS},
    **{f"eval.{key}": "It is for mode=eval. Leave it out." for key in EVALUATION_KEYS},
    "model.compile": "It is for training and mode=eval. Leave it out.",
    "data.limit": "It is for data sets. Leave it out.",
    "eval.split": "It predicts the images of input=<folder>. Leave it out.",
}
TRAINING_MODES = ("train", "crossval")
# Keys, or values of them (key=value), that a mode does not read, and what to do.
UNREAD_KEYS = {
    "eval": {f"predict.{key}": f"Use eval.{key}." for key in (*VIEW_KEYS, "scales")}
    | {
        "predict.threshold": "Scores are those of the most probable class; precision_recall.csv has other thresholds.",
        "predict.min_confidence": "Every pixel has a class in the scores. Leave it out.",
        "predict.save": "It is for mode=predict. Leave it out.",
        "predict.format": "It is for predictions. Leave it out.",
        "input": "It scores a data set: data.root=<folder> names another one.",
        "output": "The results are written to run_dir=<folder>.",
        "trainer.limit_val_batches": "data.limit=<number> scores the first images only.",
        "trainer.fast_dev_run": "data.limit=<number> scores the first images only.",
    },
    "predict": PREDICTION_ADVICE | {"output": "The predictions are written to run_dir=<folder>."},
    "serve": PREDICTION_ADVICE
    | {"eval.split": "It predicts the images that are sent to it. Leave it out."}
    | {
        f"predict.{key}": "It is for the files of mode=predict. Leave it out."
        for key in ("save", "image_prefix", "polygon_tolerance")
    }
    | {"input": "Images are sent to the page.", "output": "The page shows the results."},
    "bench": dict.fromkeys(
        ("trainer.fast_dev_run", "trainer.limit_train_batches"), "bench.steps is the number of steps that are timed."
    ),
    "average": {
        "output": "The network is written to run_dir=<folder>.",
        "trainer.fast_dev_run": "All images of eval.split are scored. Leave it out.",
        "data.on_bad=skip": "An image that cannot be read ends it. Leave it out.",
    },
    "export": {
        f"predict.{key}": "An exported file does not apply it: give it where the file is used."
        for key in ("threshold", "min_confidence", "window", "stride")
    },
    "compare": {"output": "The page is written to run_dir=<folder>."},
    **{mode: {"output": "All files are written to run_dir=<folder>."} for mode in TRAINING_MODES},
}
# Modes that cannot work without a network.
NETWORK_MODES = ("eval", "predict", "convert", "replay", "serve", "export")

INHERITING_MODES = ("eval", "predict", "serve", "export", "replay", "average")  # modes with the settings of the run
SEVERAL_NETWORKS_MODES = ("eval", "predict", "serve", "average")  # modes that average networks
USING_MODES = ("eval", "predict", "serve", "export", "convert")  # modes that take a network as it was trained
PLAIN_DECODERS = ("linear", "segformer", "upernet", "upernet_lite")  # without an auxiliary classifier
TRAINING_KEYS = (  # keys and sections that only training reads
    "optim", "schedule", "loss", "augment", "syncbn", "ema", "checkpoint", "callbacks", "logger",
    "after_training", "init_from", "resume", "resume_force",
    "data.batch_size", "data.short_edges", "data.steps_per_epoch", "data.oversample",
)  # fmt: skip
DATA_MODES = (*TRAINING_MODES, "bench", "check")  # modes whose data set is that of the command line
BATCH_MODES = ("check", "average")  # modes that use data.batch_size, and do not choose it


def find_mode_problems(config: Config) -> Iterator[str]:
    """A sentence for every key that `mode` needs and that is not set, and for every one that it cannot use."""
    if not is_checkpoint(config.ckpt):
        return  # Config.find_problems says so
    if isinstance(config.ckpt, list) and config.mode not in SEVERAL_NETWORKS_MODES:
        yield (
            f"ckpt={config.ckpt}: several networks are for mode={', '.join(SEVERAL_NETWORKS_MODES)}. "
            f"mode={config.mode} takes one."
        )
        return
    yield from find_missing_keys(config)
    yield from find_training_problems(config)
    yield from find_fold_problems(config)
    yield from find_automatic_problems(config)
    yield from find_exported_file_problems(config)
    yield from find_exported_network_problems(config)
    yield from find_export_problems(config)
    yield from find_confidence_problems(config)


def find_prediction_problems(config: Config) -> Iterator[str]:
    """A sentence for everything with which no network can be loaded to predict, whatever the mode."""
    yield from find_unloadable_files([("ckpt", file) for file in list_checkpoints(config.ckpt)])
    yield from find_exported_network_problems(config)


def refuse_unused_sizes(config: Config, overrides: Sequence[str]) -> None:
    """Refuse sizes on the command line where pixels stay as they are. Those of files describe the data set.

    Raises:
        ConfigError: with the key.
    """
    if config.data.resize != "native":
        return
    for word in overrides:
        key, value = split_override(word)
        if key in SIZE_KEYS:
            raise ConfigError(
                f"{key}={value}: has no effect with data.resize=native, which takes pixels as they are. Leave it out; "
                "augment.scale varies the size in training, and eval.window sets the windows of evaluation."
            )


def refuse_unused_boundary_ratio(config: Config, overrides: Sequence[str]) -> None:
    """Refuse a width of boundaries on the command line where boundaries are not scored.

    Raises:
        ConfigError: if eval.boundary_iou=true is missing.
    """
    if "eval.boundary_ratio" in list_given_keys(overrides) and not config.eval.boundary_iou:
        raise ConfigError(
            f"eval.boundary_ratio={config.eval.boundary_ratio}: has no effect. It is for eval.boundary_iou=true. Give "
            "that, or leave it out."
        )


def refuse_unread_keys(mode: str, overrides: Sequence[str]) -> None:
    """Refuse keys on the command line that a mode does not read, where users expect it. Those of files are for others.

    Raises:
        ConfigError: with the key to use instead.
    """
    unread = UNREAD_KEYS.get(mode, {})
    for word in overrides:
        key, value = split_override(word)
        is_off = value.lower() in ("", "0", "[]", "false", "null")
        advice = unread.get(f"{key}={value}") or (None if is_off else unread.get(key))
        if advice:
            raise ConfigError(f"{key}={value}: has no effect with mode={mode}. {advice}")


def describe_training_words(mode: str, overrides: Sequence[str]) -> str | None:
    """A sentence that names the overrides which only training reads; None if there are none, or `mode` trains.

    They are no errors, because the command line of a run is often given again with mode=eval.
    """
    if mode not in USING_MODES:
        return None
    keys = {word: override_key(word).replace("/", ".") for word in overrides}
    words = [word for word, key in keys.items() if key in TRAINING_KEYS or key.partition(".")[0] in TRAINING_KEYS]
    verb = "have" if len(words) > 1 else "has"
    return f"{', '.join(words)}: {verb} no effect with mode={mode}, which trains nothing" if words else None


def refuse_idle_keys(config: Config, overrides: Sequence[str]) -> None:
    """Refuse keys on the command line that other settings leave without effect. Those of files may serve other runs.

    A run that resumes keeps its words, and debug=<name> changes what others mean.

    Raises:
        ConfigError: with the setting that they are for, or that replaces them.
    """
    given = list_given_keys(overrides)
    if config.mode in DATA_MODES and ("debug" in given or is_resumed(config)):
        return
    if config.mode in DATA_MODES and config.input and "input" in given and "predict" not in config.after_training:
        raise ConfigError(
            f"input={config.input}: has no effect with mode={config.mode}. Give mode=predict, or "
            "after_training=[predict] to predict after training."
        )
    idle = dict(find_idle_output_keys(config))
    if config.mode in DATA_MODES:
        idle |= dict(find_idle_data_keys(config.data))
    if config.mode in TRAINING_MODES:
        idle |= dict(find_idle_training_keys(config))
        refuse_unused_boundary_ratio(config, overrides)  # other modes have the settings of a run
    for key in given:
        value = reduce(getattr, key.split("."), config) if key in idle else None
        if value:  # neither null, false, 0 nor empty
            raise ConfigError(f"{key}={value}: has no effect. {idle[key]}")


def is_resumed(config: Config) -> bool:
    """Whether training may continue a run that has begun."""
    return (
        config.resume not in (None, "auto") or config.ckpt is not None or Path(config.run_dir, "checkpoints").exists()
    )


def find_idle_training_keys(config: Config) -> Iterator[tuple[str, str]]:
    """Every key of training that has no effect, with a sentence about what to do."""
    schedule = config.schedule.name
    if schedule == "poly":
        advice = "It is for schedule=poly_warmup and schedule=cosine. Give one of them, or leave it out."
        yield from dict.fromkeys(("schedule.warmup_steps", "schedule.warmup_factor"), advice).items()
    if schedule == "cosine":
        yield "schedule.power", "It is for schedule=poly and schedule=poly_warmup. Leave it out."
    else:
        yield "schedule.min_factor", "It is for schedule=cosine. Give that, or leave it out."
    if config.optim.name != "adamw":
        yield "optim.beta2", "It is for optim=adamw. Leave it out."
    if config.syncbn.name == "off":
        advice = "It is for syncbn=reduce. Give that, or leave it out."
        yield from dict.fromkeys(("syncbn.convention", "syncbn.group"), advice).items()
    if config.ema.decay is None:
        yield "ema.start_step", "There is no average without ema.decay. Give that, or leave it out."
    if config.model.encoder.get("frozen"):
        advice = "model.encoder.frozen=true leaves the encoder as it is. Leave it out."
        yield from dict.fromkeys(("optim.lr_encoder", "optim.layer_decay"), advice).items()
    if config.optim.lr_encoder is not None and config.optim.lr_decoder is not None:
        yield "optim.lr", "optim.lr_encoder and optim.lr_decoder are the rates of both parts. Leave one of them out."
    if config.optim.lr != AUTO:
        yield "optim.lr_images", "It is for optim.lr=auto. Give that, or leave it out."
    if not config.augment.blur:
        yield "augment.blur_sigma", "It is for augment.blur. Give that, or leave it out."
    if config.checkpoint.every_n_steps is None and config.checkpoint.every_n_minutes is None:
        yield "checkpoint.keep", "It is for checkpoint.every_n_steps or every_n_minutes. Give one of them."
    yield from find_idle_loss_keys(config)


def find_idle_loss_keys(config: Config) -> Iterator[tuple[str, str]]:
    """Every key of the loss that has no effect, with a sentence about what to do."""
    terms = config.loss.terms
    decoder = config.model.decoder
    is_plain = decoder.get("name") in PLAIN_DECODERS or decoder.get("deep_supervision") is False
    if is_plain or config.model.library == "smp":
        yield "model.deepsup_weight", "It is for decoders with deep supervision, such as ppm_deepsup. Leave it out."
    if not terms.ohem:
        advice = "It is for loss=ohem. Give that, or leave it out."
        yield from dict.fromkeys(("loss.ohem_threshold", "loss.ohem_min_kept"), advice).items()
    if not terms.focal:
        yield "loss.focal_gamma", "It is for loss=focal. Give that, or leave it out."


def find_idle_data_keys(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Every key that names images and is not read, because another one names them; with a sentence about what to do.

    None with data.mix, whose parts have the keys of the main data set.
    """
    if data.mix:
        return
    if data.on_bad != "skip":
        yield "data.max_bad", "It is for data.on_bad=skip. Give that, or leave it out."
    splits: dict[str, SplitConfig] = {split: getattr(data, split) for split in ("train", "val", "test")}
    if data.images:
        yield "data.root", "With data.images, paths start at the working directory. Leave it out."
        yield "data.train.list", f"data.images={data.images} names the images. Set it to null to use a list."
        splits.pop("train")
    for split, files in splits.items():
        keys = [f"data.{split}.{name}" for name in ("images", "masks", "stems")]
        if files.list:
            advice = f"data.{split}.list={files.list} names the images. Set it to null to use folders."
            yield from dict.fromkeys(keys, advice).items()
        elif not files.images and not files.stems:
            yield keys[1], f"It needs data.{split}.images=<folder>."
    if not data.images and not data.has_bands and all(files.list or not files.images for files in splits.values()):
        for key in ("data.image_suffix", "data.mask_suffix"):
            yield key, "A list names images and masks by their whole names."
    if data.fold is None and (data.val.list or data.val.images or data.val.stems):
        named = next(name for name in ("list", "images", "stems") if getattr(data.val, name))
        yield "data.val_fraction", f"data.val.{named}={getattr(data.val, named)} names the images of val."


def find_idle_output_keys(config: Config) -> Iterator[tuple[str, str]]:
    """Every key of mode=predict and mode=export that is for an output that is not chosen, with a sentence."""
    if config.mode == "predict" and not {"coco", "label_studio"} & set(config.predict.save):
        advice = "It is for predict.save=[coco] and [label_studio]. Give one of them, or leave it out."
        yield from dict.fromkeys(("predict.polygon_tolerance", "predict.image_prefix"), advice).items()
    if config.mode == "export" and config.export.quantize != "static":
        advice = "It is for export.quantize=static. Give that, or leave it out."
        yield from dict.fromkeys(("export.calibration_split", "export.calibration_images"), advice).items()
        if config.export.quantize == "none":
            yield "export.score_images", "It is for export.quantize. Give that, or leave it out."


def find_missing_keys(config: Config) -> Iterator[str]:
    """A sentence for every key that the mode needs and that is not set, and for quiet=true where it would be silent."""
    if config.mode in NETWORK_MODES and not config.ckpt:
        yield f"mode={config.mode} needs ckpt=<file, run folder, last, best, zoo:<name>, hf:<name> or folder>."
    if config.mode == "convert" and not config.output:
        yield "mode=convert needs output=<file.ckpt, file.safetensors, or a folder for encoder_ and decoder_ files>."
    if config.mode == "check" and config.output and Path(config.output).suffix not in (".yaml", ".yml"):
        yield f"output={config.output}: mode=check writes the description of a data set: output=<file.yaml>."
    for key, what in (("input", "the export of an annotation tool"), ("output", "a new folder")):
        if config.mode == "import" and not getattr(config, key):
            yield f"mode=import needs {key}=<{what}>."
    if config.mode == "replay" and not config.input:
        yield "mode=replay needs input=<sub-batch that a run with a NaN loss has saved>."
    if config.mode in ("train", "crossval") and "predict" in config.after_training and not config.input:
        yield "after_training=[predict] needs input=<image, video, folder, pattern, or list of paths>."
    has_own_picture = any(file.startswith(ZOO_PREFIX) for file in list_checkpoints(config.ckpt))
    if config.mode == "predict" and not config.input and not has_own_picture:
        yield "mode=predict needs input=<image, video, folder, pattern, list of paths, or - for standard input>."
    if config.quiet and config.mode in PRINTING_MODES:
        yield f"quiet=true: mode={config.mode} only prints. Remove quiet=true."
    if config.mode == "average" and not isinstance(config.ckpt, list):
        yield "mode=average needs at least two networks: ckpt=[<file or run folder>,<file or run folder>]."
    if config.mode == "compare" and len(config.runs) < 2:
        yield f"runs={config.runs}: mode=compare needs at least two evaluations: runs=[<folder>,<folder>]."


def find_training_problems(config: Config) -> Iterator[str]:
    """A sentence for every contradiction about where a run starts, and for a run without steps."""
    if config.mode not in TRAINING_MODES:
        return
    if config.trainer.limit_train_batches == 0:
        yield "trainer.limit_train_batches=0: there is nothing to train. Remove it, or set at least 1."
    if config.mode == "crossval":
        return
    starts = [key for key in ("ckpt", "resume", "init_from") if getattr(config, key) not in (None, "auto")]
    if "ckpt" in starts and len(starts) > 1:
        yield f"{' and '.join(starts)}: a run starts from one of them. Remove the others."
    if config.data.folds is not None and config.data.fold is None:
        yield (
            f"data.folds={config.data.folds}: is for mode=crossval, which trains on every fold. For one of them give "
            "data.fold=<0 to folds - 1>."
        )


def find_fold_problems(config: Config) -> Iterator[str]:
    """A sentence for everything that contradicts a training run for every fold."""
    if config.mode != "crossval":
        return
    if config.data.folds is None:
        yield "mode=crossval needs data.folds=<number of folds>, such as 5."
    if config.data.fold is not None:
        yield f"data.fold={config.data.fold}: mode=crossval trains on every fold. Leave it out."
    if config.eval.split != "val":
        yield f"eval.split={config.eval.split}: mode=crossval scores every network on its fold. Leave it out."
    if config.ckpt is not None:
        yield f"ckpt={config.ckpt}: mode=crossval trains new networks. Use init_from to start from weights."
    if config.resume not in (None, "auto"):
        yield f"resume={config.resume}: is one run. mode=crossval resumes all its folds in the same run_dir."


def find_automatic_problems(config: Config) -> Iterator[str]:
    """A sentence for a batch size that is chosen for training, where another mode needs one."""
    if config.data.batch_size == AUTO and config.mode in BATCH_MODES:
        yield f"data.batch_size=auto: is chosen for mode=train and mode=bench. Give a number for mode={config.mode}."


def find_exported_file_problems(config: Config) -> Iterator[str]:
    """A sentence for every exported network where the mode cannot use one."""
    files: list[tuple[str, str | None]] = [("ckpt", file) for file in list_checkpoints(config.ckpt)]
    files += [(key, getattr(config, key)) for key in ("init_from", "resume")]
    files.append(("model.encoder.weights", config.model.encoder.get("weights")))
    yield from find_unloadable_files(files)
    for key, file in files:
        if is_onnx(file) and (key != "ckpt" or config.mode not in EXPORTED_NETWORK_MODES):
            modes = ", ".join(EXPORTED_NETWORK_MODES)
            yield f"{key}={file}: an exported network is for mode={modes}. Use its checkpoint."


def find_unloadable_files(files: Sequence[tuple[str, str | None]]) -> Iterator[str]:
    """A sentence for every (key, file) that is never loaded because loading it could run code."""
    for key, file in files:
        if Path(str(file)).suffix.lower() == TORCH_EXPORT:
            yield f"{key}={file}: cannot be loaded, because loading it could run code. Export to {ONNX} instead."


def find_exported_network_problems(config: Config) -> Iterator[str]:
    """A sentence for every setting that an exported network as `ckpt` cannot follow."""
    if not any(map(is_onnx, list_checkpoints(config.ckpt))):
        return
    for key, value, default in (
        ("model.compile", config.model.compile, False),
        ("model.channels_last", config.model.channels_last, False),
        ("model.winograd", config.model.winograd, True),
        ("trainer.precision", config.trainer.precision, "32-true"),
    ):
        if value != default:
            yield f"{key}={value}: an exported network runs as it was exported. Leave this at {default}."


def is_onnx(file: str | None) -> bool:
    """Whether a file is an exported network, by its suffix."""
    return Path(str(file)).suffix.lower() == ONNX


def find_confidence_problems(config: Config) -> Iterator[str]:
    """A sentence for predict.min_confidence where every pixel has a class."""
    given = config.predict.min_confidence
    if given is None:
        return
    if config.mode == "serve":
        yield f"predict.min_confidence={given}: mode=serve shows the most probable class everywhere. Use mode=predict."
    if config.mode == "export" and config.export.preprocessing:
        yield (
            f"predict.min_confidence={given}: a file with export.preprocessing=true gives the class of every pixel. "
            "Leave it out."
        )


def find_export_problems(config: Config) -> Iterator[str]:
    """A sentence for everything that mode=export cannot write."""
    if config.mode != "export":
        return
    written = EXPORT_SUFFIXES.get(Path(str(config.output)).suffix)
    if written is None:
        given = f"output={config.output}: " if config.output else ""
        yield f"{given}mode=export needs output=<file{ONNX} or file{TORCH_EXPORT}>."
    elif config.format not in ("auto", written):
        yield f"format={config.format}: output={config.output} would be format={written}."
    if config.export.quantize != "none" and written == "torch_export":
        yield f"export.quantize={config.export.quantize}: applies to {ONNX} files only."
    if config.export.preprocessing and written == "torch_export":
        yield f"export.preprocessing=true: applies to {ONNX} files only."
    if config.export.preprocessing and config.predict.window is not None:
        yield f"predict.window={config.predict.window}: windows cannot be exported with export.preprocessing=true."
