"""The configuration as typed sections: units, ranges, cross-field checks. Imports no torch.

The YAML files in configs/ give the defaults; these classes say what is allowed. `check` gathers all
problems of a composed configuration and raises once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeGuard, get_args, get_type_hints

from semseg.config.fields import MAX_EDGE_LENGTH, MAX_SEED, MAX_STRIDE, choice_field, number_field
from semseg.config.preprocessing import PREPROCESSING
from semseg.errors import ConfigError, check_choice

PRINTING_MODES = ("models", "data", "doctor")  # that print something and leave no folder
MODES = (
    "train", "eval", "predict", "convert", "compare", "download", "replay", "serve", "export", "check", "bench",
    *PRINTING_MODES,
)  # fmt: skip
SPLITS = ("train", "val", "test")
MIOU_RULES = ("ade20k", "present", "ground_truth")
DECODE_MODES = ("fast", "exact")
MASK_TYPES = ("auto", "ids", "colors")
LABEL_ORIENTATIONS = ("auto", "stored", "upright")
ON_BAD_CHOICES = ("error", "skip")
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("poly", "poly_warmup", "cosine")
LIBRARIES = ("torchvision", "timm")  # whose networks are encoders
WEIGHTED_LOSSES = ("cross_entropy", "ohem", "focal")  # that know class weights
SMOOTHED_LOSSES = ("cross_entropy",)  # that know label smoothing
MONITORED_METRICS = ("val/miou", "val/pixel_accuracy", "val/overall", "train/loss", "train/accuracy")  # by callbacks
SYNCBN_NAMES = ("reduce", "native", "off")
SYNCBN_CONVENTIONS = ("torch", "published")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true", "32", "64")
ZOO_PREFIX = "zoo:"  # before the name of a published network, in ckpt and init_from
ONNX, TORCH_EXPORT = ".onnx", ".pt2"
EXPORT_SUFFIXES = {ONNX: "onnx", TORCH_EXPORT: "torch_export"}  # of files, and what they are called in `format`
EXPORTED_NETWORK_MODES = ("eval", "predict", "serve")  # modes that can use an exported network
QUANTIZE_CHOICES = ("none", "dynamic", "static")
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
INSTANTIATE_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


@dataclass
class ModelConfig:
    """Which network, and how it is run."""

    name: str = ""
    encoder: dict[str, Any] = field(default_factory=dict)  # name and the options of its constructor
    decoder: dict[str, Any] = field(default_factory=dict)
    # How pixel values enter the network; auto: as the encoder's weights were trained, or as the checkpoint says.
    convention: str = choice_field("auto", ("auto", *PREPROCESSING))
    deepsup_weight: float = number_field(0.4, low=0)  # weight of the auxiliary loss
    freeze_bn: bool = False  # normalisation statistics stay as they are
    size_divisor: int | None = number_field(None, low=1, high=MAX_STRIDE)  # pixels; null: the network's largest stride
    label_stride: int | None = number_field(
        None, low=1, high=MAX_STRIDE
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

    num_train: int = number_field(320, low=1)
    num_val: int = number_field(64, low=1)
    seed: int = number_field(304, low=0, high=MAX_SEED)


@dataclass
class ArchiveConfig:
    """Where a data set can be downloaded, and what it then holds (mode=download)."""

    url: str = ""  # of a zip or tar file
    digest: str = ""  # sha256:<hex>, sha1:<hex> or md5:<hex> of that file; empty: none is known
    num_train: int = number_field(0, low=0)  # pairs of image and label
    num_val: int = number_field(0, low=0)


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
    val_fraction: float = number_field(0.0, low=0, high=0.9)  # of train, held out by a hash of the path
    make: ScenesConfig | None = None
    archive: ArchiveConfig | None = None  # null: there is nothing to download
    classes: str | None = None  # ade20k, camvid, or a CSV file with index,name,R,G,B
    num_classes: int | None = number_field(None, low=2)  # null: as many as `classes` has
    first_id: int = number_field(1, low=0)  # the value that class 0 has in the label files
    ignore: list[int] = field(default_factory=lambda: [0])  # label values that are not scored
    map: Any = None  # label value -> class index, or null for values that are not scored; in the place of first_id
    mask_type: str = choice_field("auto", MASK_TYPES)  # auto: colour files are in colours if data.classes is a file
    label_orientation: str = choice_field("auto", LABEL_ORIENTATIONS)  # grid of the labels of photos that EXIF turns
    ignore_colors: list[list[int]] = field(default_factory=lambda: [[0, 0, 0]])  # of masks in colours, not scored
    miou_rule: str = choice_field("present", MIOU_RULES)
    short_edges: list[int] = field(default_factory=lambda: [300, 375, 450, 525, 600])  # pixels
    max_long_edge: int = number_field(1000, low=1, high=MAX_EDGE_LENGTH)  # pixels
    batch_size: int = number_field(2, low=1)  # images per device
    steps_per_epoch: int | None = number_field(5000, low=1)  # null: one pass over the records
    limit: int | None = number_field(None, low=1)  # the first so many records of each split
    flip: bool = True
    oversample: float = number_field(
        0.0, low=0, high=1
    )  # of rare classes: those in fewer images than this share; 0: off
    num_workers: int = number_field(4, low=0)  # per process
    worker_timeout_s: float = number_field(
        120.0, low=0
    )  # seconds to wait for a worker's next sub-batch or image; 0: for ever
    decode: str = choice_field(
        "fast", DECODE_MODES
    )  # of training images; exact: every pixel, resized as the original does
    label_cache: str | None = None  # a folder in which labels are kept once they were read; null: none
    on_bad: str = choice_field(
        "error", ON_BAD_CHOICES
    )  # a file that is missing, broken or does not fit: stop, or leave the image out
    max_bad: float = number_field(0.01, low=0, high=1)  # share of images left out beyond which a run stops
    max_pixels: int = number_field(2**27, low=1)  # of an image; larger ones are refused by their header
    hint: str = ""  # what to do when the files are not there


@dataclass
class AugmentConfig:
    """Random changes of training images, beyond data.flip and data.short_edges."""

    name: str = "none"  # for the run card
    brightness: float = number_field(0.0, low=0, high=1)  # factors are drawn from 1 - this to 1 + this
    contrast: float = number_field(0.0, low=0, high=1)
    saturation: float = number_field(0.0, low=0, high=1)
    hue: float = number_field(0.0, low=0, high=0.5)  # share of the circle of colours, to both sides
    blur: float = number_field(0.0, low=0, high=1)  # chance
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])  # standard deviation in pixels, from .. to
    rotation: float = number_field(0.0, low=0, high=180)  # degrees, to both sides
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

    name: str = choice_field("sgd", OPTIMIZERS)
    lr: float = number_field(0.02, above=0)
    lr_encoder: float | None = number_field(None, low=0)
    lr_decoder: float | None = number_field(None, low=0)
    momentum: float = number_field(0.9, low=0, below=1)  # SGD's momentum, AdamW's beta1
    beta2: float = number_field(0.999, low=0, below=1)  # AdamW only
    weight_decay: float = number_field(1e-4, low=0)  # on convolution and linear weights only
    layer_decay: float = number_field(1.0, above=0, high=1)  # encoder: from each stage to the one before it


@dataclass
class ScheduleConfig:
    """The learning rate as a share of its base, per step."""

    name: str = choice_field("poly", SCHEDULES)
    power: float = number_field(0.9, above=0)  # poly, poly_warmup
    warmup_steps: int = number_field(0, low=0)  # poly_warmup, cosine
    warmup_factor: float = number_field(0.001, low=0, high=1)  # share of the base rate at step 0
    min_factor: float = number_field(0.0, low=0, high=1)  # cosine's floor


@dataclass
class LossTermsConfig:
    """Factors of the terms."""

    cross_entropy: float = number_field(1.0, low=0)
    ohem: float = number_field(0.0, low=0)
    focal: float = number_field(0.0, low=0)
    dice: float = number_field(0.0, low=0)
    lovasz: float = number_field(0.0, low=0)


@dataclass
class LossConfig:
    """A sum of terms; see semseg/training/losses.py."""

    name: str = "cross_entropy"  # for the run card
    terms: LossTermsConfig = field(default_factory=LossTermsConfig)
    class_weights: Any = None  # K numbers, or a JSON file that has them; for cross_entropy, ohem and focal
    label_smoothing: float = number_field(0.0, low=0, high=1)  # cross_entropy
    ohem_threshold: float = number_field(
        0.7, above=0, high=1
    )  # probability of the true class below which a pixel is hard
    ohem_min_kept: float = number_field(0.1, low=0, high=1)  # share of the scored pixels
    focal_gamma: float = number_field(2.0, low=0)
    average: str = choice_field("ranks", ("ranks", "pixels"))  # over devices: plain mean, or by scored pixels


@dataclass
class SyncBNConfig:
    name: str = choice_field("reduce", SYNCBN_NAMES)
    convention: str = choice_field("torch", SYNCBN_CONVENTIONS)
    group: str = choice_field("world", ("world", "node"))


@dataclass
class TrainerConfig:
    """Lightning's own names; see the documentation of pytorch_lightning.Trainer."""

    accelerator: str = "auto"
    devices: Any = 1  # a count, a list of indices, or "auto"
    num_nodes: int = number_field(1, low=1)
    strategy: str = "auto"
    precision: str = choice_field("32-true", PRECISIONS)
    max_epochs: int = number_field(20, low=1)
    max_steps: int = number_field(-1, low=-1)
    accumulate_grad_batches: int = number_field(1, low=1)
    gradient_clip_val: float | None = number_field(None, above=0)
    check_val_every_n_epoch: int = number_field(1, low=1)
    limit_train_batches: Any = None
    limit_val_batches: Any = None
    num_sanity_val_steps: int = number_field(0, low=-1)
    log_every_n_steps: int = number_field(20, low=1)
    deterministic: bool = False
    benchmark: bool = False
    detect_anomaly: bool = False
    fast_dev_run: Any = False
    profiler: str | None = choice_field(None, ("simple", "advanced"))  # where the time goes, in a file
    enable_progress_bar: bool = True
    # Ours, not Lightning's:
    max_nonfinite_steps: int = number_field(0, low=0)  # of a run that may be skipped for a NaN or infinite loss
    probe_memory: str = choice_field("gpu", ("gpu", "always", "never"))  # run the largest possible sub-batch first
    log_images: int = number_field(4, low=0)  # validation images shown in every validation; 0: none


@dataclass
class EmaConfig:
    """A moving average of the weights, which is what is validated, kept as best and used."""

    decay: float | None = number_field(None, above=0, high=1)  # of every step; null: no average
    start_step: int = number_field(0, low=0)  # the average is the present weights until then


@dataclass
class CheckpointConfig:
    """When checkpoints are written, besides the end of every epoch."""

    every_n_steps: int | None = number_field(None, low=1)
    every_n_minutes: float | None = number_field(30.0, above=0)
    keep: int = number_field(0, low=0)  # of those between epochs, besides last.ckpt
    on_error: str = choice_field("stop", ("stop", "warn"))  # a full disk, say: end the run, or train on without


@dataclass
class EvalConfig:
    scales: list[int] = field(default_factory=lambda: [450])  # short edges in pixels
    also_scales: list[list[int]] = field(default_factory=list)  # parts of `scales` that get scores of their own
    batch_size: int = number_field(1, low=1)  # images of one shape that go through the network together, on each device
    flip: bool = False  # average with the mirrored image
    window: int | None = number_field(None, low=1)  # side of the windows an image is cut into, in pixels
    stride: int | None = number_field(None, low=1)  # from window to window, in pixels; None: 2/3 of the window
    memory_limit_mb: int = number_field(
        1024, low=16
    )  # for probabilities; at least one row of the image is done at a time
    split: str = choice_field("val", SPLITS)
    boundary_iou: bool = False
    boundary_ratio: float = number_field(
        0.02, above=0, high=1
    )  # width of a boundary, as a share of the image's diagonal
    bootstrap: int = number_field(0, low=0)  # resamples of the images for the confidence intervals; 0: none
    visualize: bool = False  # a picture of every image: image | ground truth | prediction


@dataclass
class PredictConfig:
    save: list[str] = field(default_factory=lambda: ["ids", "panel"])
    format: str = choice_field(
        "dataset", PREDICT_FORMATS
    )  # of ids: the numbers of the data set's label files, or 1 .. K
    scales: list[int] | None = None  # null: eval.scales
    flip: bool = False
    window: int | None = number_field(None, low=1)  # as in eval
    stride: int | None = number_field(None, low=1)
    memory_limit_mb: int = number_field(1024, low=16)


@dataclass
class ServeConfig:
    """The local web page of a network (mode=serve)."""

    host: str = "127.0.0.1"  # a name or an address of this machine
    port: int = number_field(8000, low=0, high=65535)  # 0: a free one
    max_upload_mb: float = number_field(32.0, above=0, high=1024)  # of a request; 1 MB is 2**20 bytes
    max_pixels: int = number_field(2**24, low=1, high=2**27)  # of an image
    queue: int = number_field(64, low=1, high=1024)  # requests at once, the one that is worked on included


@dataclass
class ExportConfig:
    """A network as a file for other programs (mode=export)."""

    quantize: str = choice_field("none", QUANTIZE_CHOICES)  # convolutions in 8-bit integers; format=onnx
    calibration_split: str = choice_field("train", SPLITS)  # static: whose values set the ranges
    calibration_images: int = number_field(32, low=1)
    score_images: int = number_field(100, low=0)  # of eval.split, to tell what quantisation costs; 0: not told


@dataclass
class CheckConfig:
    """The data doctor (mode=check)."""

    fix: str = choice_field("none", ("none", "list"))  # list: write a list of the sound pairs of each split
    samples: int = number_field(6, low=0, high=100)  # pictures of the page


@dataclass
class BenchConfig:
    """What mode=bench times."""

    warmup: int = number_field(3, low=0)  # steps that are not counted
    steps: int = number_field(20, low=1)
    images: int = number_field(10, low=1)  # of eval.split, per device


@dataclass
class DownloadConfig:
    """How files are fetched, and where they are kept."""

    cache: str | None = None  # folder; null: $SEMSEG_CACHE, else $XDG_CACHE_HOME/semseg, else ~/.cache/semseg
    mirrors: dict[str, list[str]] = field(default_factory=dict)  # start of an address: others to try after it
    offline: bool = False  # use files of the cache only
    timeout_s: float = number_field(30.0, above=0)  # seconds without an answer or a byte
    retries: int = number_field(4, low=0)  # after a passing failure, in a row without getting any further
    delay_s: float = number_field(1.0, low=0)  # seconds before the first of them; doubles each time


@dataclass
class Config:
    """The whole configuration; one field per section of configs/config.yaml."""

    mode: str = choice_field("train", MODES)
    quiet: bool = False  # print warnings and errors only
    seed: int = number_field(304, low=0, high=MAX_SEED)
    runs_dir: str = "runs"
    run_dir: str = ""
    ckpt: str | None = None
    init_from: str | None = None
    output: str | None = None
    format: str = choice_field("auto", ("auto", *EXPORT_SUFFIXES.values()))  # auto: by the suffix of output
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


def config_to_plain(config: Config) -> dict[str, Any]:
    """`config` as plain dicts, lists and numbers, fit for a checkpoint or a YAML file."""
    return asdict(config)


def list_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """All dotted keys of the sections, leaves and sections alike."""
    keys, sections = [], get_sections(cls)
    for item in fields(cls):
        keys.append(prefix + item.name)
        if item.name in sections:
            keys.extend(list_keys(sections[item.name], f"{prefix}{item.name}."))
    return keys


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether a type is a section of the configuration."""
    return isinstance(kind, type) and is_dataclass(kind)


def get_sections(cls: type) -> dict[str, type]:
    """The fields of a section that are sections themselves, or may be."""
    types = get_type_hints(cls)
    kinds = {item.name: (types[item.name], *get_args(types[item.name])) for item in fields(cls)}
    return {name: kind for name, both in kinds.items() for kind in both if is_section(kind)}


def split_network_options(section: dict[str, Any], kind: str) -> tuple[str, dict[str, Any]]:
    """Split a network section into its name and the options of its constructor.

    For a network of another library the name is that of the library, and its own name there is the option `name`.

    Raises:
        ConfigError: if there is no name, or for a library that is not one of LIBRARIES.

    >>> split_network_options({"library": "timm", "name": "efficientnet_b3", "weights": "none"}, "encoder")
    ('timm', {'name': 'efficientnet_b3'})
    """
    options = {key: value for key, value in section.items() if key not in ("library", "name", "weights", "frozen")}
    if not section.get("name"):
        raise ConfigError(f"model.{kind}.name must be set: model/{kind}=<name>.")
    name = str(section["name"])
    if "library" not in section:
        return name, options
    return check_choice(f"model.{kind}.library", section["library"], LIBRARIES), {"name": name, **options}
