"""The schema of the configuration: every key with its type, default, range and explanation.

This is the only place where a key is described. The string below a field is its explanation; `find_problems` of a
section checks what types and ranges cannot. The YAML files with all keys, the page docs/configuration.md and a part of
`--help` are written from here (semseg/config/generate.py), and semseg/config/validate.py checks what was composed.
Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeGuard, get_args, get_type_hints

from semseg.config.fields import (
    AUTO,
    MAX_EDGE_LENGTH,
    MAX_INT,
    MAX_SEED,
    MAX_STRIDE,
    auto_field,
    choice_field,
    find_crop_problems,
    find_edge_problems,
    find_view_problems,
    format_wrong_choice,
    free_field,
    interpolated_field,
    is_int_between,
    key_of,
    network_field,
    number_field,
    open_field,
)
from semseg.config.preprocessing import MAX_BANDS, PREPROCESSING, RGB, is_range
from semseg.errors import ConfigError, check_choice

PRINTING_MODES = ("models", "data", "doctor")  # these print something and create no run folder
RESULT_MODES = ("eval", "predict")  # these write the results of a network below its run
MODES = (
    "train", "eval", "predict", "convert", "compare", "download", "replay", "serve", "export", "check", "import",
    "bench", "crossval", "average",
    *PRINTING_MODES,
)  # fmt: skip
SPLITS = ("train", "val", "test")
BUILT_IN_CLASSES = ("ade20k", "camvid", "cityscapes", "voc2012", "cocostuff")
MIOU_RULES = ("ade20k", "present", "ground_truth")
FINE_STRIDE = 4  # pixels: the largest stride of training labels that model.label_stride=auto chooses
RESIZE_CHOICES = ("short_edge", "native")
DECODE_MODES = ("fast", "exact")
MASK_TYPES = ("auto", "ids", "colors")
LABEL_ORIENTATIONS = ("auto", "stored", "upright")
ON_BAD_CHOICES = ("error", "skip")
AUTO_RANGE = "auto"  # data.value_range
OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("poly", "poly_warmup", "cosine")
LIBRARIES = ("torchvision", "timm")  # their networks can be encoders
WEIGHTED_LOSSES = ("cross_entropy", "ohem", "focal")  # these support class weights
SMOOTHED_LOSSES = ("cross_entropy",)  # these support label smoothing
MONITORED_METRICS = (
    "val/miou",
    "val/pixel_accuracy",
    "val/overall",
    "train/loss",
    "train/accuracy",
)  # what callbacks can watch
LOWEST_IS_BEST = ("train/loss",)  # of them
SYNCBN_NAMES = ("reduce", "native", "off")
SYNCBN_CONVENTIONS = ("torch", "published")
# Those in which every device has the whole network, as averages, statistics and checkpoints need.
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true", "32", "64")
DEFAULT_RUN_DIR = "${runs_dir}/${now:%Y-%m-%d_%H-%M-%S}_${mode}"
ZOO_PREFIX = "zoo:"  # marks the name of a published network in ckpt and init_from
HUB_PREFIX = "hf:"  # marks the name of a network of the Hugging Face hub there
ONNX, TORCH_EXPORT = ".onnx", ".pt2"
EXPORT_SUFFIXES = {ONNX: "onnx", TORCH_EXPORT: "torch_export"}  # file suffixes and their values of `format`
EXPORTED_NETWORK_MODES = ("eval", "predict", "serve")  # modes that accept an exported network
QUANTIZE_CHOICES = ("none", "dynamic", "static")
PREDICT_OUTPUTS = ("ids", "color", "overlay", "panel", "probabilities", "coco", "label_studio")
PREDICT_FORMATS = ("dataset", "ade20k")
EXPORT_FORMATS = ("coco", "yolo", "voc", "labelme", "label_studio", "roboflow")  # of annotation tools, for mode=import

# Keys of `model` that say which network it is, besides those in its section `encoder`.
ARCHITECTURE_KEYS = ("library", "arch", "name", "revision", "options", "config", "decoder")

EARLY_STOPPING = "pytorch_lightning.callbacks.EarlyStopping"
# The only objects that `_target_` in a configuration may name, so that no file can make us call anything else.
ALLOWED_TARGETS = (
    EARLY_STOPPING,
    "pytorch_lightning.callbacks.LearningRateMonitor",
    "pytorch_lightning.callbacks.DeviceStatsMonitor",
    "semseg.training.loggers.csv.CSVLog",
    "semseg.training.loggers.external.TensorBoard",
    "semseg.training.loggers.external.WandB",
    "semseg.training.loggers.external.MLflow",
)
# Keys that Hydra's instantiate interprets. Only `_target_` is useful here.
INSTANTIATE_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


@dataclass
class EncoderKeys:
    """The encoder, chosen by model/encoder=<name>; further keys are options of its constructor."""

    library: str
    """Where the network comes from, if it is not one of ours: torchvision or timm."""
    name: str
    """Name of the network; with `library`, its name in that library."""
    output_stride: int
    """Stride of the coarsest map: 32; 16 or 8 dilates the last stages."""
    join: bool | None
    """hrnetv2; true: one map, all branches joined at stride 4; false: four maps; null: what the decoder reads."""
    blocks: list[int] | None
    """timm's plain ViTs: the blocks whose outputs are the maps, [2, 5, 8, 11], from 0; null: four, evenly spaced."""
    pyramid: bool | None
    """timm's plain ViTs: make maps at 4, 2, 1 and 1/2 times their resolution; null: if the decoder reads a pyramid."""
    final_norm: bool
    """timm's plain ViTs: normalise the maps by the network's last layer; false: by a LayerNorm without weights."""
    weights: str
    """Initial weights: imagenet (downloaded), hub (the own ones of model=transformers), a file, or none."""
    frozen: bool = False
    """Train the decoder only; weights and statistics of the encoder stay as they are."""


@dataclass
class DecoderKeys:
    """The decoder, chosen by model/decoder=<name>; further keys are options of its constructor."""

    name: str
    """Name of the network."""
    deep_supervision: bool
    """c1, ppm: train an auxiliary classifier on the last but one map."""
    width: int
    """upernet: channels of the feature pyramid; segformer: channels of each map."""


@dataclass
class ModelConfig:
    """Which network, and how it runs."""

    library: str = ""
    """A whole network: smp, transformers, or a name that a program adds; empty: an encoder and a decoder of ours."""
    arch: str = ""
    """smp: its architecture, such as unet."""
    name: str = ""
    """Name in the run card and in tables; transformers: the network's name on the hub, or its folder."""
    revision: str | None = None
    """transformers: a branch, tag or commit of the network on the hub; null: the newest, which checkpoints note."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of a whole network, by the names of its library: model.options.decoder_channels=[64,32,16]."""
    config: dict[str, Any] = field(default_factory=dict)
    """Written by us into checkpoints: what rebuilds a network of transformers without its files."""
    encoder: dict[str, Any] = network_field(EncoderKeys)
    decoder: dict[str, Any] = network_field(DecoderKeys)
    convention: str = choice_field("auto", ("auto", *PREPROCESSING))
    """Preprocessing of pixel values; auto: as the weights were trained, rgb_mean_std without weights."""
    deepsup_weight: float = number_field(0.4, low=0)
    """Weight of the auxiliary loss of the *_deepsup decoders."""
    freeze_bn: bool = False
    """Keep normalisation statistics as they are (the original's fix_bn)."""
    size_divisor: int | None = number_field(None, low=1, high=MAX_STRIDE)
    """Images are padded to multiples of this many pixels; null: the network's largest stride."""
    label_stride: Any = free_field("auto", "auto, a number of pixels, or null")
    """Stride of training labels in pixels; 1: every pixel is scored; null: that of the logits; auto: the same, but at
    most 4, which small objects survive; the original's networks keep theirs with data.resize=short_edge."""
    channels_last: Any = auto_field(False, bool)
    """Memory layout of images and weights; networks with linear layers (attention) keep theirs; auto: where it is
    faster."""
    winograd: bool = True
    """Faster kernels on a CPU (Winograd, oneDNN, factored upsampling) in float32, without compile."""
    compile: bool = False
    """Use torch.compile(dynamic=True) in training and mode=eval; the first steps take minutes."""

    @property
    def title(self) -> str:
        """What the network is: encoder and decoder, either of which may have been replaced in a model of a name."""
        if not self.library:
            return f"{self.encoder.get('name')} + {self.decoder.get('name')}"
        encoder = self.encoder.get("name")
        return " ".join(filter(None, [self.library, self.arch or self.name, encoder and f"+ {encoder}"]))

    @property
    def backbone_name(self) -> str:
        """The name of the part that model.encoder.weights are for, in messages."""
        encoder = self.encoder.get("library") or self.encoder.get("name") or "this network"
        return f"{self.library} {encoder}" if self.library else str(encoder)

    def find_problems(self) -> Iterator[str]:
        """A sentence for every value that does not fit the others."""
        stride = self.label_stride
        if stride not in ("auto", None) and not is_int_between(stride, low=1, high=MAX_STRIDE):
            yield f"model.label_stride={stride}: must be auto, null, or a number from 1 to {MAX_STRIDE}."
        elif self.size_divisor and isinstance(stride, int) and self.size_divisor % stride:
            yield (
                f"model.size_divisor={self.size_divisor}: must be a multiple of model.label_stride={self.label_stride}."
            )
        whole = {"arch": self.arch, "options": self.options, "revision": self.revision, "config": self.config}
        for key, value in whole.items():
            if value and not self.library:
                yield f"model.{key}={value}: is for whole networks of other libraries, such as model=smp."
        if self.library and self.decoder:
            yield f"model.library={self.library}: is a whole network, without model.decoder: choose it by model=<name>."
        frozen = self.encoder.get("frozen", False)
        if not isinstance(frozen, bool):
            yield f"model.encoder.frozen={frozen}: must be true or false."


@dataclass
class SplitConfig:
    """Where the records of a split are: a list, or a folder of images and one of masks. Relative to data.root."""

    list: str | None = None
    """A list of images and labels: .odgt, .csv or .jsonl."""
    images: str | None = None
    """Folder of images."""
    masks: str | None = None
    """Folder of masks."""
    stems: str | None = None
    """A text file with the stems of the images to use; null: all."""


@dataclass
class ScenesConfig:
    """How many scenes to draw, for a data set that is drawn at its first use (data=scenes)."""

    num_train: int = number_field(320, low=1)
    """Training images."""
    num_val: int = number_field(64, low=1)
    """Validation images."""
    seed: int = number_field(304, low=0, high=MAX_SEED)
    """Seed of the drawing."""


@dataclass
class ArchiveConfig:
    """The file that mode=download fetches, and what is below data.root afterwards; null: nothing to download."""

    url: str = ""
    """Address of a zip or tar file."""
    digest: str = ""
    """Checksum of that file, sha256:<hex>, sha1:<hex> or md5:<hex>; empty: unknown."""
    num_train: int = number_field(0, low=0)
    """Pairs of image and label for training."""
    num_val: int = number_field(0, low=0)
    """Pairs of image and label for validation."""


@dataclass
class DataConfig:
    """Which images, and how they become sub-batches."""

    name: str = ""
    """Name in the run card and in tables."""
    root: str = ""
    """Folder of the data set."""
    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    test: SplitConfig = field(default_factory=SplitConfig)
    images: str | None = None
    """Shorthand for train.images, relative to the working directory."""
    masks: str | None = None
    """Shorthand for train.masks, relative to the working directory."""
    bands: list[str | None] = field(default_factory=lambda: list(RGB))
    """Names of the bands of an image file, in its order; null: a band that is not used: [red,green,blue,nir]."""
    band_files: dict[str, str] | None = None
    """Bands in files of their own, by the ends of their stems: {red: _B4, nir: _B8}; null: none are."""
    value_range: Any = free_field(None, "[low, high], one such list for each band, auto, or null")
    """The values that become black and white, beyond which values are cut off; auto: percentiles 0.5 and 99.5 of the
    training images; null: 0 and 255, and 16 bits are read as 8."""
    band_mean: list[float | None] | None = None
    """Mean of each band, in the values of its files; null: that of the weights for red, green and blue."""
    band_std: list[float | None] | None = None
    """Standard deviation of each band, like band_mean."""
    show_bands: list[str] | None = None
    """Three bands, or one, that pictures show as red, green and blue; null: these, or the first three."""
    image_suffix: str = ""
    """End of the stems of images that the stems of masks do not have: _leftImg8bit."""
    mask_suffix: str = ""
    """End of the stems of masks that the stems of images do not have: _gtFine_labelTrainIds."""
    val_fraction: float = number_field(0.0, low=0, high=0.9)
    """Fraction of train that is held out for validation, chosen by a hash of the path."""
    folds: int | None = number_field(None, low=2, high=100)
    """crossval: train is cut into so many parts, each of which is validated on once; data.val is not used."""
    fold: int | None = number_field(None, low=0)
    """The part, from 0, that is held out for validation; the others are trained on."""
    group: str | None = None
    """Images that stay together in folds and val_fraction: a regular expression for their paths below root, such as
    patient[0-9]+; null: each image by itself."""
    mix: Any = free_field(None, "a list of mappings or null")
    """Further data sets to train on, each with its share of the images: [{root: more_data, share: 0.5}]. The main one
    has what is left; keys that an entry does not have are as here; null: none."""
    make: ScenesConfig | None = None
    archive: ArchiveConfig | None = None
    classes: str | None = None
    """Built-in classes (ade20k, camvid, cityscapes, cocostuff, voc2012), or a CSV, JSON or text file (docs/data.md)."""
    num_classes: int | None = number_field(None, low=2)
    """Number of classes; null: as many as `classes` has."""
    first_id: int = number_field(1, low=0)
    """Value of class 0 in label files."""
    ignore: list[int] = field(default_factory=lambda: [0])
    """Label values that are ignored."""
    map: Any = free_field(None, "a mapping or null")
    """Class index of each label value, null: ignored; used instead of first_id: {7: 0, 8: 1, 255: null}."""
    mask_type: str = choice_field("auto", MASK_TYPES)
    """What masks hold; auto: a colour image holds the colours of `classes` if that is a file."""
    label_orientation: str = choice_field("auto", LABEL_ORIENTATIONS)
    """Labels of photographs with an EXIF rotation: on the stored pixels, or upright; auto: as their sizes show."""
    ignore_colors: list[list[int]] = field(default_factory=lambda: [[0, 0, 0]])
    """Colours of masks that are ignored unless they belong to a class."""
    miou_rule: str = choice_field("present", MIOU_RULES)
    """Classes of the mean IoU; ade20k: all, an absent one counts 0 (the original's rule); present: those that are
    labelled or predicted; ground_truth: those that are labelled."""
    resize: str = choice_field("short_edge", RESIZE_CHOICES)
    """short_edge: bring images to one of short_edges; native: keep their pixels, train on crops, and predict by
    overlapping windows."""
    crop: list[int] | None = None
    """[height, width] in pixels: train on a random crop of each image; smaller images stay whole; null: no crop, and
    [512, 512] with resize=native."""
    crop_foreground: float | None = number_field(None, low=0, high=1)
    """resize=native: fraction of the crops that is centred on a pixel of a class, rare ones more often; null: 0.33."""
    short_edges: list[int] = field(default_factory=lambda: [300, 375, 450, 525, 600])
    """Short edges in pixels; one is drawn at random for each sub-batch of training images."""
    max_long_edge: int = number_field(1000, low=1, high=MAX_EDGE_LENGTH)
    """Limit of the long edge in pixels; takes precedence over the short edge."""
    batch_size: Any = auto_field(2, int, low=1)
    """Images per device and step; auto: as many as fit into the memory of the device."""
    steps_per_epoch: int | None = number_field(5000, low=1)
    """Sub-batches of an epoch on every device; null: one pass over the records."""
    limit: int | None = number_field(None, low=1)
    """Use only so many records of each split, the first ones."""
    flip: bool = True
    """Mirror half of the training images, at random."""
    oversample: float = number_field(0.0, low=0, high=1)
    """Repeat images with classes that occur in less than this fraction of all images: 0.05; 0: off."""
    num_workers: Any = auto_field(None, int, low=0)
    """Data-loading workers per device; 0: none; null: its share of the processors, at most 4; auto: more of them if
    the run before has waited for images."""
    worker_timeout_s: float = number_field(120.0, low=0)
    """Seconds to wait for the next sub-batch or image of a worker; 0: for ever."""
    decode: str = choice_field("fast", DECODE_MODES)
    """Large JPEGs of training; fast: decoded at a reduced size; exact: every pixel, as in the original."""
    label_cache: str | None = AUTO
    """A folder in which labels are kept run-length encoded, 10 times as fast to read; auto: one of the cache, with
    10 GiB at most; null: no cache."""
    on_bad: str = choice_field("error", ON_BAD_CHOICES)
    """A file that is missing, damaged or does not fit; error: stop the run; skip: leave out the image."""
    max_bad: float = number_field(0.01, low=0, high=1)
    """Largest fraction that may be left out of the images read so far, or of 100; the run stops beyond it."""
    max_pixels: int = number_field(2**27, low=1)
    """Largest image in pixels; larger ones are refused by their header."""
    hint: str = ""
    """Shown when files of the data set are missing."""

    def find_problems(self) -> Iterator[str]:
        """A sentence for every value that is not a list of edges, map, colour, or pair of folders."""
        yield from find_edge_problems("data.short_edges", self.short_edges)
        yield from find_crop_problems("data.crop", self.crop)
        if self.crop_foreground is not None and self.resize != "native":
            yield f"data.crop_foreground={self.crop_foreground}: needs data.resize=native, whose crops it chooses."
        if self.map is not None:
            entries = self.map.items() if isinstance(self.map, dict) else [(self.map, None)]
            is_valid = all(_is_id(key) and (index is None or _is_id(index)) for key, index in entries)
            if not is_valid or not self.map:
                yield f"data.map={self.map}: must be like {{7: 0, 8: 1, 255: null}}: label value, class index."
        for colour in self.ignore_colors:
            if len(colour) != 3 or not all(0 <= part <= 255 for part in colour):
                yield f"data.ignore_colors={self.ignore_colors}: a colour is [red, green, blue], each 0..255."
        if self.fold is not None and self.folds is None:
            yield f"data.fold={self.fold}: needs data.folds=<number of folds>."
        if self.fold is not None and self.folds is not None and self.fold >= self.folds:
            yield f"data.fold={self.fold}: must be below data.folds={self.folds}, because folds count from 0."
        if self.group is not None and self.folds is None and not self.val_fraction:
            yield f"data.group={self.group}: says what data.folds or data.val_fraction keeps together. Set one of them."
        if self.group is not None and not is_pattern(self.group):
            yield f"data.group={self.group}: is no regular expression."
        if bool(self.images) != bool(self.masks):
            yield f"data.images={self.images} and data.masks={self.masks}: set both, or neither."
        yield from self.find_band_problems()

    @property
    def has_class_file(self) -> bool:
        """Whether `classes` is a file, and no table of semseg."""
        return self.classes is not None and self.classes not in BUILT_IN_CLASSES

    @property
    def has_bands(self) -> bool:
        """Whether images are anything but 8-bit RGB."""
        return tuple(self.bands) != RGB or bool(self.band_files) or self.value_range is not None

    @property
    def band_names(self) -> list[str]:
        """The bands that are used."""
        return [name for name in self.bands if name is not None]

    def find_band_problems(self) -> Iterator[str]:
        """A sentence for every key about bands that does not fit the others."""
        names = self.band_names
        rule = f"must be 1 to {MAX_BANDS} names, each once, such as [red,green,blue,nir]"
        if not 0 < len(names) <= MAX_BANDS or len(set(names)) != len(names) or not all(map(_is_band_name, names)):
            yield f"data.bands={self.bands}: {rule}, of letters, digits, - and _; null for a band that is not used."
            return
        listed = ", ".join(names)
        for name in self.band_files or {}:
            if name not in names:
                yield f"data.band_files={self.band_files}: {name} is not in data.bands, which are {listed}."
        if self.band_files and not all(self.band_files.values()):
            yield f"data.band_files={self.band_files}: must be the end of a stem for each band, such as {{nir: _B8}}."
        if self.value_range not in (None, AUTO_RANGE) and not is_value_range(self.value_range, len(names)):
            yield (
                f"data.value_range={self.value_range}: must be auto, [low, high] with low below high, or one such list "
                f"for each of {listed}."
            )
        for key, values, low in (("band_mean", self.band_mean, -math.inf), ("band_std", self.band_std, 0.0)):
            numbers = [value for value in values or [] if value is not None]
            if values is not None and (
                len(values) != len(names) or not all(low < number < math.inf for number in numbers)
            ):
                above = " above 0" if low == 0 else ""
                yield f"data.{key}={values}: must be a number{above} or null for each of {listed}."
            elif values is not None and not self.has_bands:
                yield f"data.{key}={values}: is for images with data.bands or data.value_range."
        shown = self.show_bands
        if shown is not None and (len(shown) not in (1, 3) or not set(shown) <= set(names)):
            yield f"data.show_bands={shown}: must be three bands, or one, of {listed}."


def is_value_range(value: object, num_bands: int) -> bool:
    """Whether a value is [low, high], or a list of `num_bands` of them."""
    if not isinstance(value, list) or not value:
        return False
    pairs = value if isinstance(value[0], list) else [value]
    is_list = all(isinstance(pair, list) and len(pair) == 2 and is_range(*pair) for pair in pairs)
    return is_list and len(pairs) in (num_bands, *([] if isinstance(value[0], list) else [1]))


def _is_band_name(name: str) -> bool:
    """Whether a name can be written on the command line without quotes."""
    return bool(name) and name.isascii() and name.replace("-", "_").replace("_", "a").isalnum()


def is_pattern(text: str) -> bool:
    """Whether a text is a regular expression that finds something."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return bool(text)


def _is_id(value: object) -> bool:
    """Whether a label value or class index, which files keep as text, is an integer of at least 0."""
    return not isinstance(value, bool) and str(value).isdecimal()


@dataclass
class AugmentConfig:
    """Random changes of training images, besides data.flip and data.short_edges."""

    name: str = "none"
    """Name in the run card."""
    brightness: float = number_field(0.0, low=0, high=1)
    """Pixels are multiplied by a random factor from 1 - this to 1 + this; 0.4: 0.6 to 1.4."""
    contrast: float = number_field(0.0, low=0, high=1)
    """Like brightness."""
    saturation: float = number_field(0.0, low=0, high=1)
    """Like brightness."""
    hue: float = number_field(0.0, low=0, high=0.5)
    """Largest rotation of the hue in both directions, as a fraction of the colour circle."""
    blur: float = number_field(0.0, low=0, high=1)
    """Probability of a Gaussian blur."""
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    """Standard deviation of the blur in pixels, [from, to]."""
    rotation: float = number_field(0.0, low=0, high=180)
    """Largest rotation in degrees, in both directions; the corners are black and ignored."""
    quarter_turns: bool = False
    """Turn by 0, 90, 180 or 270 degrees, at random; images that are not square by 0 or 180. With data.flip a square
    image has all eight orientations."""
    erasing: float = number_field(0.0, low=0, high=1)
    """Probability of erasing a rectangle of 2 to 33 % of the image: filled with the mean, and ignored."""
    cutmix: float = number_field(0.0, low=0, high=1)
    """Probability of replacing a rectangle of an image and its label by that of another image of its sub-batch."""
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Random factor of each image's size, [from, to], in addition to its short edge."""
    crop: list[int] | None = None
    """The same as data.crop, for recipes of augmentation; null: data.crop decides."""
    own: dict[str, Any] = open_field()
    """Custom transforms by name: a number, true, or a mapping of options; 0, false, null: left out."""

    @property
    def is_on(self) -> bool:
        """Whether anything changes."""
        amounts = (
            self.brightness, self.contrast, self.saturation, self.hue, self.blur, self.rotation, self.quarter_turns,
            self.erasing, self.cutmix,
        )  # fmt: skip
        has_own = any(is_chosen(value) for value in self.own.values())
        return any(amounts) or self.crop is not None or self.scale != [1.0, 1.0] or has_own

    def find_problems(self) -> Iterator[str]:
        """A sentence for every invalid range or crop."""
        for key in ("blur_sigma", "scale"):
            values = getattr(self, key)
            if len(values) != 2 or not 0 < values[0] <= values[1] < math.inf:
                yield f"augment.{key}={values}: must be [from, to], above 0."
        yield from find_crop_problems("augment.crop", self.crop)
        for name, value in self.own.items():
            if not isinstance(value, dict | bool | int | float | None):
                yield f"augment.{name}={value}: must be a number, true, or a mapping of options."


def is_chosen(value: Any) -> bool:
    """Whether the value of an augmentation that a program adds is one with which it is applied."""
    return isinstance(value, dict) or bool(value)


@dataclass
class OptimConfig:
    """The optimiser."""

    name: str = choice_field("sgd", OPTIMIZERS)
    """Which optimiser."""
    lr: Any = auto_field(0.02, float, above=0)
    """Base learning rate of encoder and decoder; auto: that of the recipe, scaled to the images of a step."""
    lr_images: int = number_field(16, low=1)
    """lr=auto: the images of a step (all devices, accumulation included) that the rate of the recipe was chosen for."""
    lr_encoder: float | None = number_field(None, low=0)
    """Base learning rate of the encoder; null: lr."""
    lr_decoder: float | None = number_field(None, low=0)
    """Base learning rate of the decoder; null: lr."""
    momentum: float = number_field(0.9, low=0, below=1)
    """Momentum of sgd, beta1 of adamw."""
    beta2: float = number_field(0.999, low=0, below=1)
    """adamw only."""
    weight_decay: float = number_field(1e-4, low=0)
    """Applies to convolution and linear weights only."""
    layer_decay: float = number_field(1.0, above=0, high=1)
    """Encoder: factor of the learning rate from each stage to the one before it; 0.8: the stem learns slowest."""
    fused: bool | None = None
    """Update all weights in one kernel; null: on GPUs, unless trainer.precision is 16-mixed, which refuses it."""

    @property
    def encoder_rate(self) -> float:
        """The base learning rate of the encoder."""
        return self.lr if self.lr_encoder is None else self.lr_encoder

    @property
    def decoder_rate(self) -> float:
        """The base learning rate of all other parts."""
        return self.lr if self.lr_decoder is None else self.lr_decoder


@dataclass
class ScheduleConfig:
    """The learning rate of each step, as a fraction of the base rate."""

    name: str = choice_field("poly", SCHEDULES)
    """Which schedule."""
    power: float = number_field(0.9, above=0)
    """poly, poly_warmup: exponent of 1 - step / steps."""
    warmup_steps: int = number_field(0, low=0)
    """poly_warmup, cosine: steps of the linear rise to the base rate."""
    warmup_factor: float = number_field(0.001, low=0, high=1)
    """poly_warmup, cosine: fraction of the base rate at step 0."""
    min_factor: float = number_field(0.0, low=0, high=1)
    """cosine: fraction of the base rate at the end."""


@dataclass
class LossTermsConfig:
    """Weights of the terms in the sum; 0 leaves out a term."""

    cross_entropy: float = number_field(1.0, low=0)
    """Cross entropy."""
    ohem: float = number_field(0.0, low=0)
    """Cross entropy of the hard pixels only (online hard example mining)."""
    focal: float = number_field(0.0, low=0)
    """Focal loss."""
    dice: float = number_field(0.0, low=0)
    """Dice loss."""
    lovasz: float = number_field(0.0, low=0)
    """Lovasz softmax loss."""
    own: dict[str, Any] = open_field()
    """Custom terms by name: the weight, or a mapping of `factor` and options."""

    @property
    def factors(self) -> dict[str, float]:
        """The weight of every term."""
        ours = {item.name: getattr(self, item.name) for item in fields(self) if not item.metadata.get("is_open")}
        return ours | {name: read_factor(value) for name, value in self.own.items()}

    @property
    def formula(self) -> str:
        """The sum in words, such as "cross_entropy + 0.5 dice"."""
        terms = [(f"{factor:g} " if factor != 1 else "", name) for name, factor in self.factors.items() if factor]
        return " + ".join(f"{factor}{name}" for factor, name in terms)

    def find_problems(self) -> Iterator[str]:
        """A sentence for every invalid weight of a term that a program adds."""
        for name, value in self.own.items():
            factor = read_factor(value)
            is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
            if not is_number or not 0 <= factor < math.inf:
                yield f"loss.terms.{name}={value}: must be a number of at least 0, or {{factor: 0.5, <options>}}."


def read_factor(value: Any) -> Any:
    """The weight in the value of a term that a program adds: the number itself, or its `factor`, 1 if it has none."""
    return value.get("factor", 1.0) if isinstance(value, dict) else value


@dataclass
class LossConfig:
    """The loss: a weighted sum of terms."""

    name: str = "cross_entropy"
    """Name in the run card."""
    terms: LossTermsConfig = field(default_factory=LossTermsConfig)
    class_weights: Any = free_field(None, "a list of numbers, a file or null")
    """cross_entropy, ohem, focal: a number for each class, or a JSON file that has them (check.json of mode=check)."""
    label_smoothing: float = number_field(0.0, low=0, high=1)
    """cross_entropy: fraction of the target that is spread over all classes."""
    ohem_threshold: float = number_field(0.7, above=0, high=1)
    """ohem: a pixel is hard if its true class has a lower probability."""
    ohem_min_kept: float = number_field(0.1, low=0, high=1)
    """ohem: fraction of the labelled pixels that is always kept."""
    focal_gamma: float = number_field(2.0, low=0)
    """focal: the higher, the less easy pixels count."""
    average: str = choice_field("ranks", ("ranks", "pixels"))
    """Over devices; ranks: mean of the means of all devices (the original's); pixels: weighted by labelled pixels."""

    def find_problems(self) -> Iterator[str]:
        """A sentence for a sum without terms, and for invalid or unused weights."""
        if not any(self.terms.factors.values()):
            yield "loss.terms: at least one must have a factor above 0."
        weights = self.class_weights
        is_list = isinstance(weights, list) and all(
            isinstance(weight, int | float) and not isinstance(weight, bool) and 0 <= weight < math.inf
            for weight in weights
        )
        if weights is not None and not isinstance(weights, str) and not is_list:
            yield f"loss.class_weights={weights}: must be null, a list of numbers of at least 0, or a JSON file."
        if isinstance(weights, list) and not any(weights):
            yield f"loss.class_weights={weights}: at least one must be above 0."
        for key, value, losses in (
            ("class_weights", weights, WEIGHTED_LOSSES),
            ("label_smoothing", self.label_smoothing, SMOOTHED_LOSSES),
        ):
            may_apply = bool(self.terms.own) and key == "class_weights"  # known only when the loss is built
            if value and not may_apply and not any(getattr(self.terms, name) for name in losses):
                yield f"loss.{key}={value}: applies to {', '.join(losses)}, and none of them is in loss.terms."


@dataclass
class SyncBNConfig:
    """Batch normalisation on several devices."""

    name: str = choice_field("reduce", SYNCBN_NAMES)
    """reduce: statistics over all devices, on GPUs and CPUs; native: torch.nn.SyncBatchNorm; off: each device alone."""
    convention: str = choice_field("torch", SYNCBN_CONVENTIONS)
    """torch: like nn.BatchNorm on the joined batch; published: the rule of the original (2018)."""
    group: str = choice_field("world", ("world", "node"))
    """Devices that share statistics: all of them, or those of one machine."""


@dataclass
class TrainerConfig:
    """Lightning's Trainer, with its own names: https://lightning.ai/docs/pytorch/stable/common/trainer.html"""

    accelerator: str = choice_field("auto", ("auto", "cpu", "gpu", "cuda", "mps"))
    """gpu: of any kind; auto: one if there is one."""
    devices: Any = free_field(1, "a count, a list or auto")
    """A count, a list of indices ([0,2] or 0-3), or auto (all)."""
    num_nodes: int = number_field(1, low=1)
    """Machines."""
    strategy: str = "auto"
    """How devices work together: ddp, ddp_find_unused_parameters_true; auto: ddp for several."""
    precision: str = choice_field("32-true", PRECISIONS)
    """Number format of the network; 16-mixed is for GPUs."""
    max_epochs: int = number_field(20, low=1)
    """Epochs of a run, each of data.steps_per_epoch sub-batches on every device."""
    max_steps: int = number_field(-1, low=-1)
    """Steps of a run; -1: as many as max_epochs has."""
    accumulate_grad_batches: int = number_field(1, low=1)
    """Sub-batches per step of the optimiser."""
    gradient_clip_val: float | None = number_field(None, above=0)
    """Largest norm of the gradients; null: no clipping."""
    check_val_every_n_epoch: int = number_field(1, low=1)
    """Epochs between validations."""
    limit_train_batches: Any = free_field(None, "a count, a fraction or null")
    """Use only part of each epoch: a number of sub-batches (10), or a fraction (0.5)."""
    limit_val_batches: Any = free_field(None, "a count, a fraction or null")
    """Use only part of each validation: a number of steps (10), or a fraction (0.5)."""
    num_sanity_val_steps: int = number_field(0, low=-1)
    """Validation steps before training; -1: all."""
    log_every_n_steps: int = number_field(20, low=1)
    """Steps between rows of the log, whose loss is their mean; the first step and the ends of epochs have one too."""
    deterministic: bool = False
    """Use deterministic algorithms only."""
    benchmark: bool = False
    """Let cuDNN time its kernels; rarely faster, because image sizes vary from step to step."""
    detect_anomaly: bool = False
    """Find the operation that produces a NaN; slow."""
    fast_dev_run: Any = free_field(False, "true, false or a count")
    """Run this many steps of training and validation and nothing else; true: 1."""
    profiler: str | None = choice_field(None, ("simple", "advanced"))
    """Where time is spent, in <run folder>/fit-profile.txt; null: off."""
    enable_progress_bar: bool = True
    """Show the progress of training on the terminal."""
    max_nonfinite_steps: int = number_field(0, low=0)
    """Ours: steps of a run that may be skipped because of a NaN or infinite loss; the next one stops it."""
    probe_memory: str = choice_field("gpu", ("gpu", "always", "never"))
    """Ours: run the largest possible sub-batch before training; gpu: only on GPUs."""
    log_images: int = number_field(4, low=0)
    """Ours: the first validation images that each validation logs as panels and shows in report.html; 0: none."""

    def find_problems(self) -> Iterator[str]:
        """A sentence for every invalid value of the keys that have several types."""
        devices = self.devices
        is_valid = (
            devices in ("auto", -1)
            or (isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1)
            or (isinstance(devices, list) and devices and all(isinstance(d, int) and d >= 0 for d in devices))
        )
        if not is_valid:
            yield (
                f"trainer.devices={devices}: must be a count of at least 1, a list such as [0,2], a range 0-3, or auto."
            )
        if self.strategy not in STRATEGIES:
            yield (
                f"trainer.strategy={self.strategy}: must be one of {', '.join(STRATEGIES)}: averages, statistics and "
                "checkpoints need all weights in a process for each device. Use trainer.strategy=ddp."
            )
        for key, lowest in (("limit_train_batches", 1), ("limit_val_batches", 0)):
            value = getattr(self, key)
            is_fraction = isinstance(value, float) and value <= 1 and (value > 0 or value == lowest)
            if value is not None and not is_fraction and not is_int_between(value, low=lowest, high=MAX_INT):
                yield f"trainer.{key}={value}: must be null, a count of at least {lowest}, or a fraction up to 1.0."
        if self.max_steps == 0:
            yield "trainer.max_steps=0: there is nothing to train. Set at least 1, or -1 for no limit."
        if not isinstance(self.fast_dev_run, bool) and not is_int_between(self.fast_dev_run, low=1, high=MAX_INT):
            yield f"trainer.fast_dev_run={self.fast_dev_run}: must be true, false, or a number of steps."


@dataclass
class EmaConfig:
    """A moving average of the weights: validated, kept as best.ckpt, and used by all other modes."""

    decay: float | None = number_field(None, above=0, below=1)
    """0.999: average = 0.999 * average + 0.001 * weights after every step; null: no average."""
    start_step: int = number_field(0, low=0)
    """Until this step the average equals the weights."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written, besides last.ckpt and best.ckpt after every epoch."""

    every_n_steps: int | None = number_field(None, low=1)
    """Write one every so many steps of the optimiser; null: off."""
    every_n_minutes: float | None = number_field(30.0, above=0)
    """Write one every so many minutes of training; null: off."""
    keep: int = number_field(0, low=0)
    """Number of these to keep, as step_<number>.ckpt."""
    on_error: str = choice_field("stop", ("stop", "warn"))
    """If a checkpoint cannot be written (a full disk): stop the run, or warn and continue."""
    monitor: str = "val/miou"
    """The score that chooses best.ckpt: val/miou, val/pixel_accuracy, val/overall, or val/<name> of an own score."""
    mode: str = choice_field("max", ("max", "min"))
    """Whether the best score is the largest or the smallest."""


@dataclass
class EvalConfig:
    """How images are evaluated, in mode=eval and in the validation of training."""

    scales: list[int] = field(default_factory=lambda: [450])
    """Short edges in pixels, averaged; the original's test uses [300,375,450,525,600]."""
    also_scales: list[list[int]] = field(default_factory=list)
    """Subsets of scales to score separately in the same pass: [[450]]."""
    batch_size: int = number_field(1, low=1)
    """Images of equal shape per device that go through the network together."""
    flip: bool = False
    """Average with the mirrored image."""
    window: int | None = number_field(None, low=1)
    """Cut the scaled image into overlapping squares of this many pixels and average; null: the whole image."""
    stride: int | None = number_field(None, low=1)
    """Distance of windows in pixels; null: 2/3 of the window."""
    memory_limit_mb: int = number_field(1024, low=16)
    """Memory for the probabilities of an image, which are computed in bands; never changes the result."""
    split: str = choice_field("val", SPLITS)
    """Which split to evaluate."""
    boundary_iou: bool = False
    """Also score the boundaries (Cheng et al. 2021)."""
    boundary_ratio: float = number_field(0.02, above=0, high=1)
    """Width of a boundary, as a fraction of the image's diagonal."""
    bootstrap: int | None = number_field(None, low=0)
    """Resamples of the images for 95 % confidence intervals; null: 1000 for 2 to 499 images, else none; 0: none."""
    visualize: bool = False
    """Write image | ground truth | prediction of every image to <run folder>/panels."""
    label_errors: bool = False
    """Rank the regions where the network is sure that the label is wrong, in label_errors.csv and report.html."""

    def find_problems(self) -> Iterator[str]:
        """A sentence for every problem with scales and windows."""
        yield from find_view_problems("eval.", self.scales, self.window, self.stride)
        for subset in self.also_scales:
            if not subset or not set(subset) <= set(self.scales):
                example = [self.scales[:1]]
                yield f"eval.also_scales: {subset} must be a subset of eval.scales={self.scales}, such as {example}."


@dataclass
class PredictConfig:
    """What mode=predict writes, and how it computes it."""

    save: list[str] = field(default_factory=lambda: ["ids", "panel"])
    """Any of ids, color, overlay, panel, probabilities, coco, label_studio; docs/prediction.md shows them."""
    format: str = choice_field("dataset", PREDICT_FORMATS)
    """Numbers in ids; dataset: those of the data set's label files; ade20k: 1 .. K; 0: pixels without a class."""
    scales: list[int] | None = None
    """Short edges in pixels; null: eval.scales."""
    flip: bool = False
    """Average with the mirrored image."""
    window: int | None = number_field(None, low=1)
    """Like eval.window."""
    stride: int | None = number_field(None, low=1)
    """Like eval.stride."""
    memory_limit_mb: int = number_field(1024, low=16)
    """Like eval.memory_limit_mb."""
    threshold: Any = free_field(None, "a probability, auto or null")
    """Two classes: the second one is predicted from this probability on; auto: from that of the highest F1 score in the
    network's validation, kept in the checkpoint; null: from 0.5, the class of the higher probability."""
    min_confidence: float | None = number_field(None, low=0, high=1)
    """Pixels whose class has a lower probability are not scored: ids has the first ignored id of data.ignore or
    data.map there, pictures are black, and annotations leave them out; null: every pixel has a class."""
    polygon_tolerance: float = number_field(1.0, low=0, high=100)
    """coco, label_studio: how far a polygon may be from the outline of a class, in pixels; 0: all corners of pixels."""
    image_prefix: str = ""
    """coco, label_studio: written before the path of an image below `input`, such as /data/local-files/?d=photos/."""

    def find_problems(self) -> Iterator[str]:
        """A sentence for every unknown output, and for a threshold that is none."""
        threshold = self.threshold
        is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if threshold not in (None, "auto") and not (is_number and 0 <= threshold <= 1):
            yield f"predict.threshold={threshold}: must be a probability from 0 to 1, auto, or null."
        if not self.save:
            yield f"predict.save=[]: nothing would be written. Give at least one of {', '.join(PREDICT_OUTPUTS)}."
        for output in self.save:
            if output not in PREDICT_OUTPUTS:
                yield format_wrong_choice("predict.save", output, PREDICT_OUTPUTS)


@dataclass
class ServeConfig:
    """The local web page of a network (mode=serve)."""

    host: str = "127.0.0.1"
    """A name or address of this machine; 127.0.0.1: only this machine; 0.0.0.0: everyone, without a password."""
    port: int = number_field(8000, low=0, high=65535)
    """0: a free port."""
    max_upload_mb: float = number_field(32.0, above=0, high=1024)
    """Largest request in MB (2**20 bytes)."""
    max_pixels: int = number_field(2**24, low=1, high=2**27)
    """Largest image in pixels, according to its header."""
    queue: int = number_field(64, low=1, high=1024)
    """Requests at once, including the one in progress; others are asked to retry later."""


@dataclass
class ExportConfig:
    """A network as a file for other programs (mode=export)."""

    preprocessing: bool = False
    """The .onnx file takes a picture of any size as uint8 (H, W, 3) and gives the class ids of its pixels."""
    quantize: str = choice_field("none", QUANTIZE_CHOICES)
    """int8 convolutions in an .onnx file; static is faster than dynamic, and calibrated on images."""
    calibration_split: str = choice_field("train", SPLITS)
    """static: split whose images determine the ranges."""
    calibration_images: int = number_field(32, low=1)
    """static: number of these images, used at every scale of eval.scales."""
    score_images: int = number_field(100, low=0)
    """Images of eval.split that are scored before and after quantisation; 0: none."""


@dataclass
class CheckConfig:
    """The data doctor (mode=check)."""

    fix: str = choice_field("none", ("none", "list"))
    """list: write a list of the valid pairs of each split, below the run folder."""
    samples: int = number_field(6, low=0, high=100)
    """Pictures on the page."""


@dataclass
class ImportConfig:
    """The export of an annotation tool as a data set (mode=import)."""

    format: str = choice_field("auto", ("auto", *EXPORT_FORMATS))
    """Of the export; auto: as its files show."""
    images: str | None = None
    """Folder of the images, if they are not in the export."""
    copy: bool = False
    """Copy the images; false: the data set has links to them."""
    unlabelled: str = choice_field("background", ("background", "ignore"))
    """Pixels that nobody annotated are the class background, or ignored."""
    overlaps: str = choice_field("auto", ("auto", "area", "order"))
    """What is on top; area: the smaller annotation; order: the later one; auto: area for COCO and YOLO, else order."""
    crowd: str = choice_field("class", ("class", "ignore"))
    """COCO: regions of many objects (iscrowd) belong to their class, or are ignored."""
    boxes: str = choice_field("refuse", ("refuse", "draw"))
    """COCO, YOLO: boxes without an outline end the import, or are drawn as rectangles."""
    line_width: float = number_field(10.0, above=0, high=1000)
    """LabelMe: width of lines and diameter of points, in pixels."""


@dataclass
class BenchConfig:
    """What mode=bench times."""

    warmup: int = number_field(3, low=0)
    """Steps that are not timed."""
    steps: int = number_field(20, low=1)
    """Steps that are timed."""
    images: int = number_field(10, low=1)
    """Images of eval.split per device."""


@dataclass
class DownloadConfig:
    """How files are downloaded, and where they are kept."""

    cache: str | None = None
    """Folder of downloaded files; null: $SEMSEG_CACHE, else $XDG_CACHE_HOME/semseg, else ~/.cache/semseg."""
    mirrors: dict[str, list[str]] = field(default_factory=dict)
    """Start of an address, without http://, and others to try after it: {a.org/x:["https://b.org/y"]}."""
    offline: bool = False
    """Use files of the cache only; open no connection."""
    timeout_s: float = number_field(30.0, above=0)
    """Seconds without an answer or a byte."""
    retries: int = number_field(4, low=0)
    """Consecutive retries after a transient error without progress."""
    delay_s: float = number_field(1.0, low=0)
    """Seconds before the first retry; doubles each time."""


@dataclass
class Config:
    """The whole configuration."""

    mode: str = choice_field("train", MODES)
    """What to do; also rerun, with run=<run folder>."""
    quiet: bool = False
    """Print only warnings and errors."""
    verbose: bool = False
    """train: print the whole configuration at the start, which is in config.yaml in any case."""
    seed: int = number_field(304, low=0, high=MAX_SEED)
    """Seed of the order of images, of augmentation and of the initial weights."""
    runs_dir: str = "runs"
    """Folder for new run folders."""
    run_dir: str = interpolated_field(DEFAULT_RUN_DIR)
    """The folder of this run. The default for eval and predict of a network that a run has trained: below that run, as
    eval, eval-2, ..., predict, ..."""
    ckpt: Any = free_field(None, "text, a list or null")
    """A network: a file, a run folder, last, best, zoo:<name>, hf:<owner>/<name>[@<revision>], a folder of published
    files or of transformers, or <encoder file>,<decoder file>; a list: their mean. For modes that use one, and
    download; train resumes it."""
    init_from: str | None = None
    """train: a network whose weights a new run starts from; its architecture too, unless the command line or
    its experiment sets one."""
    output: str | None = None
    """convert: file.ckpt, file.safetensors, or a folder for encoder_ and decoder_ files; export: a file; check: a .yaml
    file for the checked data set, which data=<file> reads; import: a new folder."""
    format: str = choice_field("auto", ("auto", *EXPORT_SUFFIXES.values()))
    """export: auto chooses by the suffix of output, .onnx or .pt2."""
    resume: str | None = "auto"
    """train: auto resumes if run_dir has a checkpoint; or a checkpoint file; null: never."""
    resume_force: bool = False
    """Resume although settings or data that determine the steps differ from those of the checkpoint."""
    input: str | None = None
    """predict: an image, a video, a folder, a pattern, a list of paths, or - (standard input); replay: a sub-batch;
    import: the export of an annotation tool, a folder, a zip archive, or its main file."""
    runs: list[str] = field(default_factory=list)
    """compare: evaluations, or runs, each with its newest evaluation; the first is the baseline."""
    after_training: list[str] = field(default_factory=list)
    """Modes to run on the best checkpoint after training: any of eval, predict."""
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
    import_: ImportConfig = field(default_factory=ImportConfig, metadata={"key": "import"})  # a keyword of Python
    bench: BenchConfig = field(default_factory=BenchConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    logger: dict[str, Any] = field(default_factory=dict)
    """Loggers by name, from configs/logger/."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    """Further callbacks by name, from configs/callbacks/."""

    def __post_init__(self) -> None:
        if isinstance(self.ckpt, int | float):  # a folder may be named 2026
            self.ckpt = str(self.ckpt)

    def find_problems(self) -> Iterator[str]:
        """A sentence for every key that contradicts one of another section, in any mode; the others are in uses.py."""
        predict = self.predict
        scales = self.eval.scales if predict.scales is None else predict.scales
        yield from find_view_problems("predict.", scales, predict.window, predict.stride)
        data, augment = self.data, self.augment
        if data.crop is not None and augment.crop not in (None, data.crop):
            yield f"data.crop={data.crop} and augment.crop={augment.crop} are the same setting. Set one to null."
        if augment.cutmix and data.batch_size == 1:
            yield f"augment.cutmix={augment.cutmix}: needs another image in a sub-batch: data.batch_size=2 or more."
        if data.resize == "native" and self.eval.also_scales:
            yield f"eval.also_scales={self.eval.also_scales}: data.resize=native has one scale. Leave it out."
        if self.quiet and self.verbose:
            yield "quiet=true and verbose=true contradict each other. Remove one of them."
        if not is_checkpoint(self.ckpt):
            yield f"ckpt={self.ckpt}: must be text, or a list of at least two networks: ckpt=[<file>,<file>]."
        for mode in self.after_training:
            if mode not in ("eval", "predict"):
                yield format_wrong_choice("after_training", mode, ("eval", "predict"))


def is_checkpoint(ckpt: Any) -> TypeGuard[str | list[str] | None]:
    """Whether a value can be that of `ckpt`: null, text, or a list of at least two texts."""
    is_list = isinstance(ckpt, list) and len(ckpt) > 1 and all(isinstance(item, str) and item for item in ckpt)
    return ckpt is None or isinstance(ckpt, str) or is_list


def list_checkpoints(ckpt: str | list[str] | None) -> list[str]:
    """The networks that `ckpt` names."""
    return ckpt if isinstance(ckpt, list) else [ckpt] if ckpt else []


# Sections to which programs can add keys (semseg/config/tables.py). They are in the field `own`, and beside the other
# keys of the section in files, on the command line and in checkpoints.
OPEN_SECTIONS: dict[str, type] = {"loss.terms": LossTermsConfig, "augment": AugmentConfig}


def flatten_sections(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value of nested mappings; an empty one is a value.

    >>> dict(flatten_sections({"optim": {"lr": 0.1}, "seed": 1}))
    {'optim.lr': 0.1, 'seed': 1}
    """
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flatten_sections(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config_to_plain(config: Any) -> dict[str, Any]:
    """A configuration, or a section, as plain dicts, lists, text and numbers, for checkpoints and YAML files."""
    plain: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if item.metadata.get("is_open"):
            plain |= deepcopy(value)
        else:
            plain[key_of(item)] = config_to_plain(value) if is_dataclass(value) else deepcopy(value)
    return plain


def list_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """The dotted names of all keys and sections."""
    keys, sections = [], get_sections(cls)
    for item in fields(cls):
        if item.metadata.get("is_open"):
            continue
        key = key_of(item)
        keys.append(prefix + key)
        if key in sections:
            keys.extend(list_keys(sections[key], f"{prefix}{key}."))
    return keys


def is_section(kind: Any) -> TypeGuard[type]:
    """Whether a type is a section of the configuration."""
    return isinstance(kind, type) and is_dataclass(kind)


def get_sections(cls: type) -> dict[str, type]:
    """The keys of a section that hold a section, or may hold one, with its class."""
    types = get_type_hints(cls)
    kinds = {key_of(item): (types[item.name], *get_args(types[item.name])) for item in fields(cls)}
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
