"""The LightningDataModule: one loader per stage and rank. semseg/data decides what the loaders return."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from semseg.collate import collate
from semseg.config.schema import AugmentConfig, EvalConfig, TrainerConfig
from semseg.data import shared_slots
from semseg.data.augment import Augmentation
from semseg.data.bands import BandOptions
from semseg.data.batch import LABEL_TYPE, Batch, EvalSample
from semseg.data.crops import DEFAULT_FOREGROUND, NATIVE, CropPlan, choose_crop
from semseg.data.datasets import EvalDataset, ReadOptions, TrainDataset
from semseg.data.foreground import ForegroundIndex, build_foreground_index
from semseg.data.geometry import Size, label_size, stretched_size
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import IGNORED
from semseg.data.loaders import PREFETCH, SlotDemand, SubBatchLoader, WatchedLoader, close_iterations, parse_taken
from semseg.data.open_pairs import OpenPair, is_read_by_window, open_pair
from semseg.data.plan import TrainPlan, group_by_shape, share_repeats
from semseg.data.records import Record
from semseg.data.scan import repeat_factors, scan_pairs
from semseg.data.sources import DataSource
from semseg.data.training_size import TrainingSizes
from semseg.errors import ConfigError, DataError
from semseg.evaluation.own_scores import IMAGE_METRICS
from semseg.nets.bands import check_bands, expect_trained_type
from semseg.nets.interfaces import SegmentationNetwork, choose_size_divisor
from semseg.system.processors import choose_num_workers
from semseg.system.shared_memory import get_free_shared_memory
from semseg.training.resume import RunConditions, count_run_steps, digest_records, limit_batches

MANY_CLASSES = 32  # of the label of an image, for measurements of memory: few images have more


class LargestSubBatch(NamedTuple):
    """Sizes of the largest sub-batch that the plan can produce."""

    num_images: int
    canvas: Size
    label: Size
    pixel_bytes: int = 3

    @property
    def image_bytes(self) -> int:
        return self.num_images * self.pixel_bytes * math.prod(self.canvas)

    @property
    def label_bytes(self) -> int:
        return self.num_images * math.prod(self.label) * torch.int64.itemsize


class SegmentationData(pl.LightningDataModule):
    """Loaders of a data source for one network; semseg/build.py:build_data takes the arguments from the configuration.

    Args:
        source: records, label map, and how images are read.
        net: defines the default size divisor and label stride, and the preprocessing.
        trainer_config: the length of the run, and its limits.
        seed: of the plan and of augmentation.
        size_divisor: images are padded to multiples of this many pixels; None: the network's own value.
        label_stride: stride of training labels in pixels; None: the network's own value.

    Raises:
        ConfigError: if the size divisor is not a multiple of the label stride, or the network takes other bands than
            the images have.
    """

    def __init__(
        self,
        source: DataSource,
        net: SegmentationNetwork,
        *,
        augment_config: AugmentConfig,
        eval_config: EvalConfig,
        trainer_config: TrainerConfig,
        seed: int,
        size_divisor: int | None = None,
        label_stride: int | None = None,
    ) -> None:
        super().__init__()
        self.source, self.data_config = source, source.config
        self.net = net
        self.eval_config, self.trainer_config = eval_config, trainer_config
        self.seed = seed
        check_bands(net.convention, source.bands)
        self.size_divisor = choose_size_divisor(net, size_divisor)
        self.image_size: Size | None = getattr(net, "image_size", None)  # the one size that the network takes
        self.crop = choose_crop(source.config, augment_config, self.image_size)
        self.is_native = source.config.resize == NATIVE  # then the data set crops, and augmentation does not
        self.augment_config = replace(augment_config, crop=None if self.is_native else self.crop)
        self.label_stride = label_stride or net.label_stride
        if self.size_divisor % self.label_stride:
            raise ConfigError(
                f"model.size_divisor={self.size_divisor} is not a multiple of model.label_stride={self.label_stride}. "
                f"null selects the network's own values, {net.size_divisor} and {net.label_stride}."
            )
        self._train_loader: SubBatchLoader | None = None
        self._taken = 0  # sub-batches of all ranks before training starts or resumes
        self._plan: TrainPlan | None = None
        self._conditions: RunConditions | None = None
        self._eval_groups: dict[str, list[list[int]]] = {}  # by stage
        self._by_window: dict[str, frozenset[int]] = {}  # by stage

    def num_images(self, stage: str) -> int:
        """The number of images that stage "val" or "test" scores."""
        return len(self.source.records(self.split_of(stage)))

    def split_of(self, stage: str) -> str:
        """The split that a stage scores: "val" the validation split, "test" (mode=eval) eval.split."""
        return "val" if stage == "val" else self.eval_config.split

    def plan(self) -> TrainPlan:
        """The plan of training, which is computed once."""
        if self._plan is None:
            data = self.data_config
            self._plan = TrainPlan(
                self._training_sizes(),
                seed=self.seed,
                batch_size=data.batch_size,
                short_edges=[0] if self.is_native else data.short_edges,
                flip=data.flip,
                repeats=self._compute_repeats(),
                sources=self._source_numbers(),
            )
        return self._plan

    def batches_per_epoch(self) -> int:
        """Sub-batches per epoch and device, under trainer.limit_train_batches.

        Raises:
            ConfigError: if the limit leaves none.
        """
        limit = getattr(self.trainer, "limit_train_batches", None)
        return _require_batches("limit_train_batches", limit, self.steps_per_epoch())

    def steps_per_epoch(self) -> int:
        """Sub-batches per epoch and device: data.steps_per_epoch, or about one pass over the images."""
        return self.data_config.steps_per_epoch or self.plan().steps_in_pass(self._rank_and_world_size()[1])

    def run_conditions(self) -> RunConditions:
        """What determines the steps besides the configuration; needs the trainer."""
        if self._conditions is None:
            assert self.trainer is not None, "training has a trainer"
            batches, source = self.batches_per_epoch(), self.source
            splits = [split for split in ("train", "val") if source.has(split)]
            self._conditions = RunConditions(
                world_size=self.trainer.world_size,
                batches_per_epoch=batches,
                total_steps=count_run_steps(self.trainer_config, batches),
                records={split: digest_records(source.used_records(split), source.root) for split in splits},
                accelerator=self.trainer.strategy.root_device.type,
                threads=torch.get_num_threads(),
            )
        return self._conditions

    def train_dataloader(self) -> SubBatchLoader:
        data, augment, records = self.data_config, self.augment_config, self.source.training_records()
        self.batches_per_epoch()  # raises if there are none
        dataset = TrainDataset(
            records,
            self.source.label_map,
            replace(self._read_options("train"), size_divisor=self._train_divisor),
            collate=partial(collate, label_type=LABEL_TYPE),
            label_stride=self.label_stride,
            exact=data.decode == "exact",
            augmentation=Augmentation(augment, self.seed, self.source.bands_of("train")) if augment.is_on else None,
            crops=self._crop_plan() if self.is_native else None,
        )
        rank, world_size = self._rank_and_world_size()
        self._train_loader = SubBatchLoader(
            dataset,
            self.plan(),
            rank=rank,
            world_size=world_size,
            steps=self.steps_per_epoch(),
            num_workers=self.num_workers(self._largest_batch_bytes),
            timeout_s=data.worker_timeout_s,
            max_image_bytes=self._largest_sub_batch().image_bytes,
            pin_memory=self.pins_memory(),
        )
        self._train_loader.taken = self._taken
        return self._train_loader

    def _training_sizes(self) -> list[Size]:
        """The sizes of training images for the plan, which keeps portraits apart: those of their crops if it crops."""
        return self._sizes.list_planned([record.size for record in self.source.training_records()])

    @property
    def _sizes(self) -> TrainingSizes:
        return TrainingSizes(self.data_config, self.augment_config, self.crop, self._train_divisor)

    @property
    def foreground(self) -> float:
        """The fraction of crops that are centred on a pixel of a class."""
        chosen = self.data_config.crop_foreground
        return DEFAULT_FOREGROUND if chosen is None else chosen

    def _crop_plan(self) -> CropPlan:
        assert self.crop is not None, "data.resize=native has crops"
        return CropPlan(self.seed, Size(*self.crop), self.foreground, self._build_index() if self.foreground else None)

    def _build_index(self) -> ForegroundIndex:
        """The index of classes in the labels of training, most of it from the cache."""
        source, data = self.source, self.data_config
        return build_foreground_index(
            source.training_records(),
            source.root,
            source.label_map,
            max_pixels=data.max_pixels,
            label_cache=self._read_options("train").cache,
        )

    @property
    def num_train_workers(self) -> int:
        """The workers of the training loader, which is created first."""
        assert self._train_loader is not None, "training has a loader"
        return self._train_loader.num_workers

    @property
    def _train_divisor(self) -> int:
        """Training images are padded to multiples of it: to the one size that the network takes, if it takes one."""
        return self.image_size.height if self.image_size else self.size_divisor

    @property
    def num_bands(self) -> int:
        """Numbers per pixel of an image."""
        return 3 if self.source.bands is None else len(self.source.bands.names)

    def bands_of(self, split: str) -> BandOptions | None:
        """How the bands of a split are read; None: images are 8-bit RGB.

        Raises:
            DataError: as `DataSource.records`.
        """
        return expect_trained_type(self.source.bands_of(split), self.net.convention)

    def _pixel_type(self, split: str) -> torch.dtype:
        """The type in which the images of a split are read and sent to the device."""
        bands = self.bands_of(split)
        return torch.uint8 if bands is None else getattr(torch, bands.dtype or "uint8")

    def _read_options(self, split: str) -> ReadOptions:
        """How the images of a split are read.

        Raises:
            ConfigError: if the folder data.label_cache cannot be created.
        """
        data = self.data_config
        cache = LabelCache(data.label_cache, self.source.label_map) if data.label_cache else None
        bands = self.bands_of(split)
        return ReadOptions(
            max_long_edge=data.max_long_edge,
            size_divisor=self.size_divisor,
            skip_bad=self.skips_bad,
            max_pixels=data.max_pixels,
            cache=cache,
            bands=bands,
        )

    def num_workers(self, max_item_bytes: Callable[[], int]) -> int:
        """Workers of a loader on each device; 0 if /dev/shm is needed and too small for what all of them prepare.

        Forks transfer pixels in slots and labels as bytes, and do not use /dev/shm (see shared_slots.py). Other workers
        transfer tensors in it, and a worker that finds it full is killed without a message.

        Args:
            max_item_bytes: computes the size of the largest item of the loader.
        """
        ranks, free = 1 if self.trainer is None else self.trainer.num_devices, get_free_shared_memory()
        num_workers = choose_num_workers(self.data_config.num_workers, ranks)
        if not num_workers or free is None or shared_slots.slots_are_possible():
            return num_workers
        needed = PREFETCH * num_workers * ranks * max_item_bytes()
        if needed <= free:
            return num_workers
        rank_zero_warn(
            f"{num_workers} workers may need {needed / 2**20:.0f} MiB of shared memory, but {free / 2**20:.0f} MiB are "
            "free: images are read without workers. For speed, provide more memory (docker run --shm-size=8g) or set "
            "fewer data.num_workers."
        )
        return 0

    def pins_memory(self) -> bool:
        """Whether loaders copy to pinned memory, from which a GPU reads by itself; of no use to a run on the CPU."""
        return self.trainer_config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Widen the labels of a Batch or of a list of EvalSample, which have reached the device in LABEL_TYPE."""
        return widen_labels(batch)

    def prepare_data(self) -> None:
        """On one rank: read the masks that data.oversample needs, so that the other ranks find them in the cache."""
        if self.data_config.oversample:
            records = self.source.training_records()
            rank_zero_info(f"data.oversample: reading {len(records)} masks, except those that are cached")
            self._compute_repeats()
        if self.is_native and self.foreground and self.source.has("train"):
            self._build_index()

    def _source_numbers(self) -> NDArray[np.int64] | None:
        """The number of the data set of each training image; None if there is one data set."""
        if not self.data_config.mix:
            return None
        return np.array([record.source for record in self.source.training_records()], np.int64)

    def _compute_repeats(self) -> NDArray[np.float64] | None:
        """The average number of times that each training image occurs in a pass; None: once."""
        repeats = self._compute_class_repeats() if self.data_config.oversample else None
        numbers = self._source_numbers()
        return repeats if numbers is None else share_repeats(numbers, self.source.shares, repeats)

    def _compute_class_repeats(self) -> NDArray[np.float64]:
        """The repeats of data.oversample, from the classes in the label of each training image.

        Raises:
            DataError: for an image or a label that cannot be read, with data.on_bad=error.
        """
        data, source = self.data_config, self.source
        bands, present = source.bands_of("train"), []
        for _, group in itertools.groupby(source.training_records(), key=lambda record: record.source):
            records = list(group)
            label_map = records[0].label_map or source.label_map
            pairs = scan_pairs(
                records,
                source.root,
                max_pixels=data.max_pixels,
                colours=label_map.colours,
                bands=bands,
                is_native=self.is_native,
            )
            for pair in pairs:
                if pair.problem and not self.skips_bad:
                    raise DataError(pair.problem)
                classes = {label_map.class_index(raw) for raw in pair.ids}
                present.append({index for index in classes if index is not None and index != IGNORED})
        return repeat_factors(present, data.oversample)

    # ---- sizes

    def largest_batch(self) -> Batch:
        """A black sub-batch as large as the plan can produce, with MANY_CLASSES in each label.

        Lovasz sorts the pixels once for each class of a sub-batch, and mask classification makes a mask for each class
        of an image.
        """
        count, canvas, label, _ = self._largest_sub_batch()
        num_classes = self.source.classes.num_classes
        pixels = torch.arange(math.prod(label)) % min(num_classes, MANY_CLASSES)
        classes = (pixels + MANY_CLASSES * torch.arange(count)[:, None]) % num_classes
        return Batch(
            torch.zeros(count, self.num_bands, *canvas, dtype=self._pixel_type("train")),
            classes.view(count, *label),
            torch.tensor([canvas] * count),
            ["the largest possible sub-batch"],
        )

    def _largest_sub_batch(self) -> LargestSubBatch:
        data = self.data_config
        canvas = self._sizes.find_largest([record.size for record in self.source.training_records()])
        pixel_bytes = self.num_bands * self._pixel_type("train").itemsize
        return LargestSubBatch(data.batch_size, canvas, label_size(canvas, self.label_stride), pixel_bytes)

    def _largest_batch_bytes(self) -> int:
        largest = self._largest_sub_batch()
        return largest.image_bytes + largest.label_bytes

    def largest_sample_bytes(self, records: Sequence[Record], pixel_bytes: int = 3) -> int:
        """Bytes of the label and all scales of the largest image; 0 without any.

        Args:
            pixel_bytes: of one pixel of an image.
        """

        def sample_bytes(size: Size) -> int:
            label_bytes = LABEL_TYPE.itemsize * math.prod(size)
            return label_bytes + pixel_bytes * sum(math.prod(scale) for scale in self._scale_sizes(size))

        return max((sample_bytes(size) for size in {record.size for record in records}), default=0)

    def _scale_sizes(self, size: Size) -> tuple[Size, ...]:
        """The sizes to which an image is stretched for evaluation; its own if pixels stay as they are."""
        if self.is_native:
            return (size,)
        limits = self.data_config.max_long_edge, self.size_divisor
        return tuple(stretched_size(size, edge, *limits) for edge in self.eval_config.scales)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """The position of training. It is kept here: Lightning creates the loader before it restores its state."""
        return {"taken": self._taken if self._train_loader is None else self._train_loader.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._taken = parse_taken(state_dict, self._rank_and_world_size()[1])

    # ---- evaluation

    @property
    def skips_bad(self) -> bool:
        """Whether images that cannot be read are left out."""
        return self.data_config.on_bad == "skip"

    def find_by_window(self, stage: str) -> frozenset[int]:
        """The images of a stage, by their index, that are too large to be held whole and that can be read by window.

        None are where something needs the whole class map of an image: a score that a program adds, and in mode=eval
        boundary_iou, visualize and label_errors. Images of more than data.max_pixels cannot be evaluated then.
        """
        options = self.eval_config
        needs_maps = bool(IMAGE_METRICS) or (
            stage == "test" and (options.boundary_iou or options.visualize or options.label_errors)
        )
        if stage not in self._by_window:
            split, found = self.split_of(stage), []
            for index, record in enumerate(self.source.records(split) if self.is_native and not needs_maps else ()):
                with suppress(DataError):  # a damaged image is reported when it is read
                    if is_read_by_window(record, self.bands_of(split), self.data_config.max_pixels):
                        found.append(index)
            self._by_window[stage] = frozenset(found)
        return self._by_window[stage]

    def open_pair(self, stage: str, position: int) -> AbstractContextManager[OpenPair]:
        """An image of a stage and its label, to be read by window.

        Raises:
            DataError: if one of them cannot be read, or they differ in size.
        """
        split, data = self.split_of(stage), self.data_config
        options = self._read_options(split)
        return open_pair(
            self.source.records(split)[position],
            self.source.label_map,
            max_pixels=data.max_pixels,
            cache=options.cache,
            bands=options.bands,
        )

    @property
    def _images_at_once(self) -> int:
        """Images that are evaluated together; with data.resize=native eval.batch_size is a number of windows of one."""
        return 1 if self.is_native else self.eval_config.batch_size

    def eval_groups(self, stage: str) -> list[list[int]]:
        """The images of a stage in groups of up to eval.batch_size that have the same shape at every scale.

        They are the same for any number of ranks, and so are all results.
        """
        if stage not in self._eval_groups:
            records = self.source.records(self.split_of(stage))
            shapes: list[Hashable] = [self._scale_sizes(record.size) for record in records]
            self._eval_groups[stage] = group_by_shape(shapes, self._images_at_once)
        return self._eval_groups[stage]

    def val_dataloader(self) -> DataLoader[Any]:
        loader = self.eval_loader("val")
        limit = self.trainer_config.limit_val_batches
        if limit:  # 0 turns validation off
            _require_batches("limit_val_batches", limit, len(loader))
        return loader

    def test_dataloader(self) -> DataLoader[Any]:
        return self.eval_loader("test")

    def eval_loader(self, stage: str) -> DataLoader[Any]:
        """This rank's groups of the images of a stage: rank, rank + world_size, ... each exactly once.

        A rank without a group gets the first one, which the module does not score: Lightning rejects empty loaders.
        """
        data, records = self.data_config, self.source.records(self.split_of(stage))
        by_window = self.find_by_window(stage)
        whole = [record for index, record in enumerate(records) if index not in by_window]
        dataset = EvalDataset(
            records,
            self.source.label_map,
            self._read_options(self.split_of(stage)),
            short_edges=() if self.is_native else self.eval_config.scales,
            antialias=self.net.convention.antialias,
            label_type=LABEL_TYPE,
            by_window=by_window,
        )
        rank, world_size = self._rank_and_world_size()
        groups = self.eval_groups(stage)
        own_groups = groups[rank::world_size] or groups[:1]
        pixel_bytes = self.num_bands * self._pixel_type(self.split_of(stage)).itemsize
        batch_size, sample_bytes = self._images_at_once, self.largest_sample_bytes(whole, pixel_bytes)
        return WatchedLoader(
            dataset,
            lambda number: [records[index].image for index in own_groups[number]],
            data.worker_timeout_s,
            SlotDemand(batch_size, sample_bytes) if whole else None,
            is_ahead=True,
            batch_sampler=own_groups,
            collate_fn=list,
            num_workers=self.num_workers(lambda: batch_size * sample_bytes),
            pin_memory=self.pins_memory(),
        )

    def on_exception(self, exception: BaseException) -> None:
        close_iterations()  # the traceback keeps iterations referenced, and so their workers alive

    def teardown(self, stage: str) -> None:
        if self._train_loader is not None:
            self._train_loader.close()

    def _rank_and_world_size(self) -> tuple[int, int]:
        """(rank, number of ranks) of this process."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size


def widen_labels(batch: Any) -> Any:
    """A Batch, an EvalSample or a list of these with labels in int64, on the device where they are."""
    if isinstance(batch, list):
        return [widen_labels(sample) for sample in batch]
    return batch._replace(label=batch.label.long()) if isinstance(batch, Batch | EvalSample) else batch


def _require_batches(key: str, limit: float | None, num_batches: int) -> int:
    """The batches that trainer.`key` leaves; a fraction is rounded down, as Lightning does.

    Raises:
        ConfigError: if none are left.
    """
    batches = limit_batches(num_batches, limit)
    if not batches:
        raise ConfigError(f"trainer.{key}={limit}: leaves none of {num_batches} batches. Raise or remove the limit.")
    return batches
