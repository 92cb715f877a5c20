"""The configuration as typed sections: units, ranges, cross-field checks. Imports no torch.

The YAML files in configs/ give the defaults; these classes say what is allowed. `check` gathers all
problems of a composed configuration and raises once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeGuard, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from semseg.config.hints import unknown_key
from semseg.config.preprocessing import CONVENTIONS
from semseg.errors import ConfigError, choose, nearest

TELLING_MODES = ("models", "data", "doctor")  # that print something and leave no folder
MODES = (
    "train", "eval", "predict", "convert", "compare", "download", "replay", "serve", "export", "check", "bench",
    *TELLING_MODES,
)  # fmt: skip
SPLITS = ("train", "val", "test")
MIOU_RULES = ("ade20k", "present", "ground_truth")
DECODE = ("fast", "exact")
MASK_TYPES = ("auto", "ids", "colors")
LABEL_ORIENTATIONS = ("auto", "stored", "upright")
ON_BAD = ("error", "skip")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("poly", "poly_warmup", "cosine")
LIBRARIES = ("torchvision", "timm")  # whose networks are encoders
WEIGHTED_LOSSES = ("cross_entropy", "ohem", "focal")  # that know class weights
SMOOTHED_LOSSES = ("cross_entropy",)  # that know label smoothing
MONITORED = ("val/miou", "val/pixel_accuracy", "val/overall", "train/loss", "train/accuracy")  # by callbacks
SYNCBN = ("reduce", "native", "off")
SYNCBN_CONVENTIONS = ("torch", "published")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true", "32", "64")
ZOO_PREFIX = "zoo:"  # before the name of a published network, in ckpt and init_from
ONNX, TORCH_EXPORT = ".onnx", ".pt2"
EXPORT_SUFFIXES = {ONNX: "onnx", TORCH_EXPORT: "torch_export"}  # of files, and what they are called in `format`
RUNS_EXPORTED = ("eval", "predict", "serve")  # modes that can use an exported network
QUANTIZE = ("none", "dynamic", "static")
PREDICT_OUTPUTS = ("ids", "color", "overlay", "panel", "probabilities")
PREDICT_FORMATS = ("dataset", "ade20k")

# What a `_target_` in a configuration may name: nothing read from a file can call anything else.
ALLOWED_TARGETS = (
    "pytorch_lightning.callbacks.EarlyStopping",
    "pytorch_lightning.callbacks.LearningRateMonitor",
    "pytorch_lightning.callbacks.DeviceStatsMonitor",
    "semseg.training.loggers.csv.CSVLog",
    "semseg.training.loggers.external.TensorBoard",
    "semseg.training.loggers.external.WandB",
    "semseg.training.loggers.external.MLflow",
)
# Keys to which Hydra's instantiate gives a meaning; all but the first would be of no use here.
HYDRA_WORDS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


LONGEST_EDGE = 2**15  # pixels, of an image after scaling
LARGEST_INT, LARGEST_FLOAT = 2**63 - 1, (2 - 2**-23) * 2.0**127  # of int64 and float32, in which numbers are used
LARGEST_STRIDE = 1024  # pixels; images are padded to multiples of it
LARGEST_SEED = 2**32 - 1  # that every generator takes; NumPy's global one is the strictest


def number(
    default: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with a range: value >= low, value > above, value <= high, value < below."""
    return field(default=default, metadata={"low": low, "above": above, "high": high, "below": below})


def one_of(default: Any, choices: tuple[str, ...]) -> Any:
    """A field whose value is one of `choices`, or None if its type allows that."""
    return field(default=default, metadata={"choices": choices})


@dataclass
class ModelConfig:
    """Which network, and how it is run."""

    name: str = ""
    encoder: dict[str, Any] = field(default_factory=dict)  # name and the options of its constructor
    decoder: dict[str, Any] = field(default_factory=dict)
    # How pixel values enter the network; auto: as the encoder's weights were trained, or as the checkpoint says.
    convention: str = one_of("auto", ("auto", *CONVENTIONS))
    deepsup_weight: float = number(0.4, low=0)  # weight of the auxiliary loss
    freeze_bn: bool = False  # normalisation statistics stay as they are
    size_divisor: int | None = number(None, low=1, high=LARGEST_STRIDE)  # pixels; null: the network's largest stride
    label_stride: int | None = number(
        None, low=1, high=LARGEST_STRIDE
    )  # pixels; null: the stride of the network's logits
    channels_last: bool = False
    winograd: bool = True  # on the CPU, eager and in float32: 3 x 3 convolutions by fewer products
    compile: bool = False


@dataclass
class SplitConfig:
    """Where the records of one split are: a list, or a folder pair. Relative to data.root."""

    list: str | None = None  # odgt, .csv or .jsonl
    images: str | None = None
    masks: str | None = None
    stems: str | None = None  # a text file: which of the images are meant


@dataclass
class ScenesConfig:
    """How many scenes are drawn when the data set is made on the spot."""

    num_train: int = number(320, low=1)
    num_val: int = number(64, low=1)
    seed: int = number(304, low=0, high=LARGEST_SEED)


@dataclass
class ArchiveConfig:
    """Where a data set can be downloaded, and what it then holds (mode=download)."""

    url: str = ""  # of a zip or tar file
    digest: str = ""  # sha256:<hex>, sha1:<hex> or md5:<hex> of that file; empty: none is known
    num_train: int = number(0, low=0)  # pairs of image and label
    num_val: int = number(0, low=0)


@dataclass
class DataConfig:
    """Which images, and how they become sub-batches."""

    name: str = ""
    root: str = ""
    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    test: SplitConfig = field(default_factory=SplitConfig)
    images: str | None = None  # short for train.images, from the working directory
    masks: str | None = None
    image_suffix: str = ""  # what the stems of images have in addition to those of their masks, and the other way round
    mask_suffix: str = ""
    val_fraction: float = number(0.0, low=0, high=0.9)  # of train, held out by a hash of the path
    make: ScenesConfig | None = None
    archive: ArchiveConfig | None = None  # null: there is nothing to download
    classes: str | None = None  # ade20k, camvid, or a CSV file with index,name,R,G,B
    num_classes: int | None = number(None, low=2)  # null: as many as `classes` has
    first_id: int = number(1, low=0)  # the value that class 0 has in the label files
    ignore: list[int] = field(default_factory=lambda: [0])  # label values that are not scored
    map: Any = None  # label value -> class index, or null for values that are not scored; in the place of first_id
    mask_type: str = one_of("auto", MASK_TYPES)  # auto: colour files are in colours if data.classes is a file
    label_orientation: str = one_of("auto", LABEL_ORIENTATIONS)  # grid of the labels of photos that EXIF turns
    ignore_colors: list[list[int]] = field(default_factory=lambda: [[0, 0, 0]])  # of masks in colours, not scored
    miou_rule: str = one_of("present", MIOU_RULES)
    short_edges: list[int] = field(default_factory=lambda: [300, 375, 450, 525, 600])  # pixels
    max_long_edge: int = number(1000, low=1, high=LONGEST_EDGE)  # pixels
    batch_size: int = number(2, low=1)  # images per device
    steps_per_epoch: int | None = number(5000, low=1)  # null: one pass over the records
    limit: int | None = number(None, low=1)  # the first so many records of each split
    flip: bool = True
    oversample: float = number(0.0, low=0, high=1)  # of rare classes: those in fewer images than this share; 0: off
    num_workers: int = number(4, low=0)  # per process
    worker_timeout_s: float = number(
        120.0, low=0
    )  # seconds to wait for a worker's next sub-batch or image; 0: for ever
    decode: str = one_of("fast", DECODE)  # of training images; exact: every pixel, resized as the original does
    label_cache: str | None = None  # a folder in which labels are kept once they were read; null: none
    on_bad: str = one_of(
        "error", ON_BAD
    )  # a file that is missing, broken or does not fit: stop, or leave the image out
    max_bad: float = number(0.01, low=0, high=1)  # share of images left out beyond which a run stops
    max_pixels: int = number(2**27, low=1)  # of an image; larger ones are refused by their header
    hint: str = ""  # what to do when the files are not there


@dataclass
class AugmentConfig:
    """Random changes of training images, beyond data.flip and data.short_edges."""

    name: str = "none"  # for the run card
    brightness: float = number(0.0, low=0, high=1)  # factors are drawn from 1 - this to 1 + this
    contrast: float = number(0.0, low=0, high=1)
    saturation: float = number(0.0, low=0, high=1)
    hue: float = number(0.0, low=0, high=0.5)  # share of the circle of colours, to both sides
    blur: float = number(0.0, low=0, high=1)  # chance
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])  # standard deviation in pixels, from .. to
    rotation: float = number(0.0, low=0, high=180)  # degrees, to both sides
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])  # of data.short_edges and max_long_edge, from .. to
    crop: list[int] | None = None  # height and width in pixels of the part that is kept, after scaling

    @property
    def is_on(self) -> bool:
        """Whether anything changes."""
        amounts = (self.brightness, self.contrast, self.saturation, self.hue, self.blur, self.rotation)
        return any(amounts) or self.crop is not None or self.scale != [1.0, 1.0]


@dataclass
class OptimConfig:
    """The optimiser. `lr` sets both rates; `lr_encoder` and `lr_decoder` each."""

    name: str = one_of("sgd", OPTIMIZERS)
    lr: float = number(0.02, above=0)
    lr_encoder: float | None = number(None, low=0)
    lr_decoder: float | None = number(None, low=0)
    momentum: float = number(0.9, low=0, below=1)  # SGD's momentum, AdamW's beta1
    beta2: float = number(0.999, low=0, below=1)  # AdamW only
    weight_decay: float = number(1e-4, low=0)  # on convolution and linear weights only
    layer_decay: float = number(1.0, above=0, high=1)  # encoder: from each stage to the one before it


@dataclass
class ScheduleConfig:
    """The learning rate as a share of its base, per step."""

    name: str = one_of("poly", SCHEDULES)
    power: float = number(0.9, above=0)  # poly, poly_warmup
    warmup_steps: int = number(0, low=0)  # poly_warmup, cosine
    warmup_factor: float = number(0.001, low=0, high=1)  # share of the base rate at step 0
    min_factor: float = number(0.0, low=0, high=1)  # cosine's floor


@dataclass
class LossTermsConfig:
    """Factors of the terms."""

    cross_entropy: float = number(1.0, low=0)
    ohem: float = number(0.0, low=0)
    focal: float = number(0.0, low=0)
    dice: float = number(0.0, low=0)
    lovasz: float = number(0.0, low=0)


@dataclass
class LossConfig:
    """A sum of terms; see semseg/training/losses.py."""

    name: str = "cross_entropy"  # for the run card
    terms: LossTermsConfig = field(default_factory=LossTermsConfig)
    class_weights: Any = None  # K numbers, or a JSON file that has them; for cross_entropy, ohem and focal
    label_smoothing: float = number(0.0, low=0, high=1)  # cross_entropy
    ohem_threshold: float = number(0.7, above=0, high=1)  # probability of the true class below which a pixel is hard
    ohem_min_kept: float = number(0.1, low=0, high=1)  # share of the scored pixels
    focal_gamma: float = number(2.0, low=0)
    average: str = one_of("ranks", ("ranks", "pixels"))  # over devices: plain mean, or by scored pixels


@dataclass
class SyncBNConfig:
    name: str = one_of("reduce", SYNCBN)
    convention: str = one_of("torch", SYNCBN_CONVENTIONS)
    group: str = one_of("world", ("world", "node"))


@dataclass
class TrainerConfig:
    """Lightning's own names; see the documentation of pytorch_lightning.Trainer."""

    accelerator: str = "auto"
    devices: Any = 1  # a count, a list of indices, or "auto"
    num_nodes: int = number(1, low=1)
    strategy: str = "auto"
    precision: str = one_of("32-true", PRECISIONS)
    max_epochs: int = number(20, low=1)
    max_steps: int = number(-1, low=-1)
    accumulate_grad_batches: int = number(1, low=1)
    gradient_clip_val: float | None = number(None, above=0)
    check_val_every_n_epoch: int = number(1, low=1)
    limit_train_batches: Any = None
    limit_val_batches: Any = None
    num_sanity_val_steps: int = number(0, low=-1)
    log_every_n_steps: int = number(20, low=1)
    deterministic: bool = False
    benchmark: bool = False
    detect_anomaly: bool = False
    fast_dev_run: Any = False
    profiler: str | None = one_of(None, ("simple", "advanced"))  # where the time goes, in a file
    enable_progress_bar: bool = True
    # Ours, not Lightning's:
    max_nonfinite_steps: int = number(0, low=0)  # of a run that may be skipped for a NaN or infinite loss
    probe_memory: str = one_of("gpu", ("gpu", "always", "never"))  # run the largest possible sub-batch first
    log_images: int = number(4, low=0)  # validation images shown in every validation; 0: none


@dataclass
class EmaConfig:
    """A moving average of the weights, which is what is validated, kept as best and used."""

    decay: float | None = number(None, above=0, high=1)  # of every step; null: no average
    start_step: int = number(0, low=0)  # the average is the present weights until then


@dataclass
class CheckpointConfig:
    """When checkpoints are written, besides the end of every epoch."""

    every_n_steps: int | None = number(None, low=1)
    every_n_minutes: float | None = number(30.0, above=0)
    keep: int = number(0, low=0)  # of those between epochs, besides last.ckpt
    on_error: str = one_of("stop", ("stop", "warn"))  # a full disk, say: end the run, or train on without


@dataclass
class EvalConfig:
    scales: list[int] = field(default_factory=lambda: [450])  # short edges in pixels
    also_scales: list[list[int]] = field(default_factory=list)  # parts of `scales` that get scores of their own
    batch_size: int = number(1, low=1)  # images of one shape that go through the network together, on each device
    flip: bool = False  # average with the mirrored image
    window: int | None = number(None, low=1)  # side of the windows an image is cut into, in pixels
    stride: int | None = number(None, low=1)  # from window to window, in pixels; None: 2/3 of the window
    memory_limit_mb: int = number(1024, low=16)  # for probabilities; at least one row of the image is done at a time
    split: str = one_of("val", SPLITS)
    boundary_iou: bool = False
    boundary_ratio: float = number(0.02, above=0, high=1)  # width of a boundary, as a share of the image's diagonal
    bootstrap: int = number(0, low=0)  # resamples of the images for the confidence intervals; 0: none
    visualize: bool = False  # a picture of every image: image | ground truth | prediction


@dataclass
class PredictConfig:
    save: list[str] = field(default_factory=lambda: ["ids", "panel"])
    format: str = one_of("dataset", PREDICT_FORMATS)  # of ids: the numbers of the data set's label files, or 1 .. K
    scales: list[int] | None = None  # null: eval.scales
    flip: bool = False
    window: int | None = number(None, low=1)  # as in eval
    stride: int | None = number(None, low=1)
    memory_limit_mb: int = number(1024, low=16)


@dataclass
class ServeConfig:
    """The local web page of a network (mode=serve)."""

    host: str = "127.0.0.1"  # a name or an address of this machine
    port: int = number(8000, low=0, high=65535)  # 0: a free one
    max_upload_mb: float = number(32.0, above=0, high=1024)  # of a request; 1 MB is 2**20 bytes
    max_pixels: int = number(2**24, low=1, high=2**27)  # of an image
    queue: int = number(64, low=1, high=1024)  # requests at once, the one that is worked on included


@dataclass
class ExportConfig:
    """A network as a file for other programs (mode=export)."""

    quantize: str = one_of("none", QUANTIZE)  # convolutions in 8-bit integers; format=onnx
    calibration_split: str = one_of("train", SPLITS)  # static: whose values set the ranges
    calibration_images: int = number(32, low=1)
    score_images: int = number(100, low=0)  # of eval.split, to tell what quantisation costs; 0: not told


@dataclass
class CheckConfig:
    """The data doctor (mode=check)."""

    fix: str = one_of("none", ("none", "list"))  # list: write a list of the sound pairs of each split
    samples: int = number(6, low=0, high=100)  # pictures of the page


@dataclass
class BenchConfig:
    """What mode=bench times."""

    warmup: int = number(3, low=0)  # steps that are not counted
    steps: int = number(20, low=1)
    images: int = number(10, low=1)  # of eval.split, per device


@dataclass
class DownloadConfig:
    """How files are fetched, and where they are kept."""

    cache: str | None = None  # folder; null: $SEMSEG_CACHE, else $XDG_CACHE_HOME/semseg, else ~/.cache/semseg
    mirrors: dict[str, list[str]] = field(default_factory=dict)  # start of an address: others to try after it
    offline: bool = False  # use files of the cache only
    timeout_s: float = number(30.0, above=0)  # seconds without an answer or a byte
    retries: int = number(4, low=0)  # after a passing failure, in a row without getting any further
    delay_s: float = number(1.0, low=0)  # seconds before the first of them; doubles each time


@dataclass
class Config:
    """The whole configuration; one field per section of configs/config.yaml."""

    mode: str = one_of("train", MODES)
    quiet: bool = False  # print warnings and errors only
    seed: int = number(304, low=0, high=LARGEST_SEED)
    runs_dir: str = "runs"
    run_dir: str = ""
    ckpt: str | None = None
    init_from: str | None = None
    output: str | None = None
    format: str = one_of("auto", ("auto", *EXPORT_SUFFIXES.values()))  # auto: by the suffix of output
    resume: str | None = "auto"
    resume_force: bool = False
    input: str | None = None
    runs: list[str] = field(default_factory=list)  # folders
    after_training: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    syncbn: SyncBNConfig = field(default_factory=SyncBNConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    predict: PredictConfig = field(default_factory=PredictConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    check: CheckConfig = field(default_factory=CheckConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)


def check(composed: DictConfig) -> Config:
    """The composed configuration as typed sections, or one error with all its problems.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, sections that contradict.
    """
    try:
        return check_sections(composed)
    except RecursionError:
        raise ConfigError("cannot read the configuration: a value has too many brackets inside each other.") from None


def check_sections(composed: DictConfig) -> Config:
    """`check`, without its answer to values that are nested too deeply."""
    plain = OmegaConf.to_container(composed, resolve=False)
    told = next(section_problems(plain), None)
    if told is not None:
        raise ConfigError(told)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), composed)
        config = OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, composed)) from None
    assert isinstance(config, Config)
    told = next(text_problems(config), None)
    if told is not None:
        raise ConfigError(told)  # alone: the other sentences quote values
    problems = [*range_problems(config), *target_problems(config), *cross_problems(config)]
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems in the configuration:\n  " + "\n  ".join(problems))
    return config


def as_plain(config: Config) -> dict[str, Any]:
    """`config` as plain dicts, lists and numbers, fit for a checkpoint or a YAML file."""
    return asdict(config)


def explain(error: OmegaConfBaseException, composed: DictConfig) -> str:
    """OmegaConf's error as one line: the key, the value, and the nearest valid name."""
    key = str(error.full_key or error.key or "")
    if isinstance(error, ConfigKeyError):
        return unknown_key(key, schema_keys())
    value = dict(walk(OmegaConf.to_container(composed, resolve=False))).get(key)
    reason = str(error.msg or error).splitlines()[0].rstrip(".")
    reason = reason.removeprefix("ConfigError raised while resolving interpolation: ")
    if "Missing mandatory value" in str(error) or (
        key and OmegaConf.is_missing(composed, key.split(".", maxsplit=1)[0])
    ):
        return f"{key} must be set: {key}=..."
    return f"{key}={value}: {reason}." if key else f"cannot read the configuration: {reason}."


def schema_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """All dotted keys of the sections, leaves and sections alike."""
    keys, sections = [], sections_of(cls)
    for item in fields(cls):
        keys.append(prefix + item.name)
        if item.name in sections:
            keys.extend(schema_keys(sections[item.name], f"{prefix}{item.name}."))
    return keys


def section_problems(plain: Any, cls: type = Config, prefix: str = "") -> Iterator[str]:
    """A sentence for every section that was given one value in the place of its keys."""
    for name, kind in sections_of(cls).items():
        key, value = prefix + name, plain.get(name, {})
        if isinstance(value, dict):
            yield from section_problems(value, kind, key + ".")
        elif value is not None:
            keys = ", ".join(f"{key}.{item.name}" for item in fields(kind))
            yield f"{key}={value}: is a section, not a value. Its keys: {keys}."
    for name in ("encoder", "decoder"):
        value = plain.get(name, {}) if cls is ModelConfig else {}
        if not isinstance(value, dict):
            yield f"{prefix}{name}={value}: is a section, not a value. Choose a network by model/{name}=<name>."


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether a type is a section of the configuration."""
    return isinstance(kind, type) and is_dataclass(kind)


def sections_of(cls: type) -> dict[str, type]:
    """The fields of a section that are sections themselves, or may be."""
    types = get_type_hints(cls)
    kinds = {item.name: (types[item.name], *get_args(types[item.name])) for item in fields(cls)}
    return {name: kind for name, both in kinds.items() for kind in both if is_section(kind)}


def range_problems(section: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for every value outside the range or the choices of its field."""
    for item in fields(section):
        key, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            yield from range_problems(value, key + ".")
            continue
        choices = item.metadata.get("choices")
        if choices and value is not None and value not in choices:  # None is for the types to refuse
            yield wrong_choice(key, value, choices)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield from _bounds(key, value, item.metadata)


def _bounds(key: str, value: float, limits: Mapping[str, Any]) -> Iterator[str]:
    largest = LARGEST_FLOAT if isinstance(value, float) else LARGEST_INT
    if not abs(value) <= largest:  # nor is a NaN
        yield f"{key}={value}: must be a number of at most {largest:.8g}."
        return
    rules = {"low": ("at least", operator.ge), "above": ("above", operator.gt)}
    rules |= {"high": ("at most", operator.le), "below": ("below", operator.lt)}
    bounds = [(words, limits[name], holds) for name, (words, holds) in rules.items() if limits.get(name) is not None]
    if not all(holds(value, bound) for _, bound, holds in bounds):
        yield f"{key}={value}: must be {' and '.join(f'{words} {bound}' for words, bound, _ in bounds)}."


def wrong_choice(key: str, value: Any, choices: tuple[str, ...]) -> str:
    meant = nearest(str(value), choices)
    hint = f" Did you mean {key}={meant}?" if meant else ""
    return f"{key}={value}: not known.{hint} Valid: {', '.join(choices)}."


def text_problems(config: Config) -> Iterator[str]:
    """A sentence for every text that would change its meaning where the configuration is saved."""
    for key, value in walk(as_plain(config)):
        if "${" in f"{key}={value}":
            yield f"{key}={value}: a value cannot hold ${{ as text; it would be read as an interpolation."


def target_problems(config: Config) -> Iterator[str]:
    """A sentence for every logger and callback that is not on the allow-list, and for words of Hydra elsewhere."""
    plain = as_plain(config)
    for group in ("logger", "callbacks"):
        for name, section in plain[group].items():
            target = section.pop("_target_", None) if isinstance(section, dict) else None
            if target not in ALLOWED_TARGETS:
                yield f"{group}.{name}._target_={target}: not allowed. Allowed: {', '.join(ALLOWED_TARGETS)}."
    for place in hydra_words(plain):
        yield f"{place}: not allowed here."


def hydra_words(node: Any, prefix: str = "") -> Iterator[str]:
    """The places of all keys in nested dicts and lists that Hydra could take for a word of its own, in any case."""
    if not isinstance(node, dict | list):
        return
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        place = f"{prefix}.{key}" if prefix else str(key)
        if str(key).strip().lower() in HYDRA_WORDS:
            yield place
        yield from hydra_words(value, place)


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All (dotted key, leaf) pairs of nested dicts and lists."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from walk(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from walk(value, f"{prefix}.{index}")
    else:
        yield prefix, node


def cross_problems(config: Config) -> Iterator[str]:
    """A sentence for every pair of fields that contradict each other."""
    yield from edge_problems("data.short_edges", config.data.short_edges)
    yield from view_problems("eval.", config.eval.scales, config.eval.window, config.eval.stride)
    predict = config.predict
    scales = config.eval.scales if predict.scales is None else predict.scales
    yield from view_problems("predict.", scales, predict.window, predict.stride)
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
            yield wrong_choice("after_training", mode, ("eval", "predict"))
    for output in config.predict.save:
        if output not in PREDICT_OUTPUTS:
            yield wrong_choice("predict.save", output, PREDICT_OUTPUTS)


def edge_problems(key: str, edges: object) -> Iterator[str]:
    """A sentence if `edges` is no list of short edges."""
    listed = list(edges) if isinstance(edges, Iterable) and not isinstance(edges, str) else []
    if not listed or not all(is_whole(edge, low=1, high=LONGEST_EDGE) for edge in listed):
        yield (
            f"{key}={edges}: must be a list of short edges in pixels, each at least 1 and at most {LONGEST_EDGE}, "
            "such as [300,450,600]."
        )


def view_problems(section: str, scales: object, window: int | None, stride: int | None) -> Iterator[str]:
    """A sentence for every reason why images cannot be looked at like this; keys begin with `section`."""
    yield from edge_problems(f"{section}scales", scales)
    if stride and stride > (window or 0):
        yield f"{section}stride={stride}: is for windows of at least that side; {section}window={window}."


def is_whole(value: object, *, low: int, high: float = math.inf) -> bool:
    """Whether `value` is a whole number, NumPy's included, from `low` to `high`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


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
    if config.quiet and config.mode in TELLING_MODES:
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
    if config.ema.decay is not None and not has_all_weights(config.trainer):
        yield (
            f"ema.decay={config.ema.decay}: the average needs all weights on every device, which "
            f"trainer.strategy={config.trainer.strategy} does not promise. Use trainer.strategy=ddp."
        )
    for name, section in config.callbacks.items():
        monitor = section.get("monitor", MONITORED[0]) if isinstance(section, dict) else MONITORED[0]
        if monitor not in MONITORED:
            yield wrong_choice(f"callbacks.{name}.monitor", monitor, MONITORED)


def _exported_file_problems(config: Config) -> Iterator[str]:
    """A sentence for every exported network in a place where none can be used."""
    files = {key: getattr(config, key) for key in ("ckpt", "init_from", "resume")}
    files["model.encoder.weights"] = config.model.encoder.get("weights")
    for key, file in files.items():
        suffix = Path(str(file)).suffix.lower()
        if suffix == TORCH_EXPORT:
            yield f"{key}={file}: is not read, for reading it could run code in it. Export to {ONNX} for that."
        if suffix == ONNX and (key != "ckpt" or config.mode not in RUNS_EXPORTED):
            yield f"{key}={file}: an exported network is for mode={', '.join(RUNS_EXPORTED)}. Give its checkpoint."
    if Path(str(config.ckpt)).suffix.lower() != ONNX:
        return
    ways = {
        "model.compile": False,
        "model.channels_last": False,
        "model.winograd": True,
        "trainer.precision": "32-true",
    }
    given = dict(walk(as_plain(config)))
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


def has_all_weights(trainer: TrainerConfig) -> bool:
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
        if value is not None and not is_share and not is_whole(value, low=lowest, high=LARGEST_INT):
            yield f"trainer.{key}={value}: must be null, a count of at least {lowest}, or a share up to 1.0."
    if trainer.max_steps == 0:
        yield "trainer.max_steps=0: must be at least 1, or -1 for no limit."
    if not isinstance(trainer.fast_dev_run, bool) and not is_whole(trainer.fast_dev_run, low=1, high=LARGEST_INT):
        yield f"trainer.fast_dev_run={trainer.fast_dev_run}: must be true, false, or a number of batches."


def network_options(section: dict[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """Split a network section into its name and the options of its constructor.

    For a network of another library the name is that of the library, and its own name there is the option `name`.

    Raises:
        ConfigError: if there is no name, or for a library that is not one of LIBRARIES.

    >>> network_options({"library": "timm", "name": "efficientnet_b3", "weights": "none"}, "encoder")
    ('timm', {'name': 'efficientnet_b3'})
    """
    options = {key: value for key, value in section.items() if key not in ("library", "name", "weights", "frozen")}
    if not section.get("name"):
        raise ConfigError(f"model.{kind}.name must be set: model/{kind}=<name>.")
    name = str(section["name"])
    if "library" not in section:
        return name, options
    return choose(f"model.{kind}.library", section["library"], LIBRARIES), {"name": name, **options}


__all__ = ["Config", "as_plain", "check", "choose"]
