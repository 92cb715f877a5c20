"""The LightningDataModule: a loader per stage and rank. What they yield is decided in semseg/data."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from semseg.collate import collate
from semseg.config.schema import Config
from semseg.data import shared_slots
from semseg.data.augment import Augmentation, cropped
from semseg.data.batch import Batch
from semseg.data.datasets import EvalDataset, TrainDataset
from semseg.data.geometry import Size, canvas_size, label_size, largest_canvas, stretched_size
from semseg.data.label_cache import LabelCache
from semseg.data.label_map import IGNORED
from semseg.data.loaders import AHEAD, SubBatchLoader, WatchedLoader, end, sub_batches_taken
from semseg.data.plan import TrainPlan, groups_of_one_shape
from semseg.data.records import Record
from semseg.data.scan import repeat_factors, scan
from semseg.data.sources import DataSource
from semseg.errors import ConfigError
from semseg.nets.segmenter import Segmenter
from semseg.system.shared_memory import get_free_shared_memory
from semseg.training.resume import RunFacts, digest_records, limited, num_steps


class SegmentationData(pl.LightningDataModule):
    """Loaders of a data source for one network.

    Args:
        source: records and label map, files checked.
        config: sections data, eval and the seed.
        net: gives the size divisor, the label stride and the input convention.

    Raises:
        ConfigError: if the size divisor is not a multiple of the label stride.
    """

    def __init__(self, source: DataSource, config: Config, net: Segmenter) -> None:
        super().__init__()
        self.source = source
        self.config = config
        self.size_divisor = config.model.size_divisor or net.size_divisor
        self.net = net
        self.label_stride = config.model.label_stride or net.label_stride
        if self.size_divisor % self.label_stride:
            raise ConfigError(
                f"model.size_divisor={self.size_divisor}: is no multiple of model.label_stride={self.label_stride}. "
                f"The network's own, which null means, are {net.size_divisor} and {net.label_stride}."
            )
        self._train_loader: SubBatchLoader | None = None
        self._taken = 0  # sub-batches before those that training starts with
        self._plan: TrainPlan | None = None
        self._facts: RunFacts | None = None
        self._eval_groups: dict[str, list[list[int]]] = {}  # of each stage

    def num_images(self, stage: str) -> int:
        """Images that are scored in stage "val" or "test"."""
        return len(self.source.records(self.split_of(stage)))

    def split_of(self, stage: str) -> str:
        """Validation after an epoch scores val; mode=eval, Lightning's "test", scores eval.split."""
        return "val" if stage == "val" else self.config.eval.split

    def plan(self) -> TrainPlan:
        """Which images form each sub-batch; made once."""
        if self._plan is None:
            data = self.config.data
            self._plan = TrainPlan(
                [record.size for record in self.source.records("train")],
                seed=self.config.seed,
                batch_size=data.batch_size,
                short_edges=data.short_edges,
                flip=data.flip,
                repeats=self.repeats(),
            )
        return self._plan

    def batches_per_epoch(self) -> int:
        """Sub-batches of an epoch on every device, as the trainer limits them.

        Raises:
            ConfigError: if the limit leaves none.
        """
        steps, limit = self.steps_per_epoch(), getattr(self.trainer, "limit_train_batches", None)
        batches = limited(steps, limit)
        if not batches:
            raise ConfigError(f"trainer.limit_train_batches={limit}: leaves none of {steps} sub-batches in an epoch.")
        return batches

    def steps_per_epoch(self) -> int:
        """Sub-batches of an epoch on every device: data.steps_per_epoch, or about a pass over the images."""
        return self.config.data.steps_per_epoch or self.plan().steps_in_pass(self._place()[1])

    def facts(self) -> RunFacts:
        """What decides the steps besides the settings; needs the trainer."""
        if self._facts is None:
            assert self.trainer is not None, "there is one in training"
            batches, source = self.batches_per_epoch(), self.source
            splits = [split for split in ("train", "val") if source.has(split)]
            self._facts = RunFacts(
                self.trainer.world_size,
                batches,
                num_steps(self.config, batches),
                {split: digest_records(source.records(split), source.root) for split in splits},
                self.trainer.strategy.root_device.type,
                torch.get_num_threads(),
            )
        return self._facts

    def train_dataloader(self) -> SubBatchLoader:
        data, augment, records = self.config.data, self.config.augment, self.source.records("train")
        self.batches_per_epoch()  # leaves early where there are none
        dataset = TrainDataset(
            records,
            label_map=self.source.label_map,
            max_long_edge=data.max_long_edge,
            size_divisor=self.size_divisor,
            label_stride=self.label_stride,
            exact=data.decode == "exact",
            augmentation=Augmentation(augment, self.config.seed) if augment.is_on else None,
            skip_bad=data.on_bad == "skip",
            max_pixels=data.max_pixels,
            cache=self.label_cache(),
            collate=collate,
        )
        rank, world_size = self._place()
        self._train_loader = SubBatchLoader(
            dataset,
            self.plan(),
            rank=rank,
            world_size=world_size,
            steps=self.steps_per_epoch(),
            num_workers=self.num_workers(),
            patience_s=data.worker_timeout_s,
            largest=self.largest_batch().image.nbytes,
        )
        self._train_loader.taken = self._taken
        return self._train_loader

    def check_limit(self, key: str, num_batches: int) -> None:
        """Lightning rounds a share of the batches down, and ends with an error of its own where that is none.

        Raises:
            ConfigError: then.
        """
        share = getattr(self.config.trainer, key)
        if isinstance(share, float) and 0 < share * num_batches < 1:
            raise ConfigError(f"trainer.{key}={share}: is less than one of {num_batches} batches.")

    def label_cache(self) -> LabelCache | None:
        """data.label_cache, if there is one.

        Raises:
            ConfigError: if the folder cannot be made.
        """
        folder = self.config.data.label_cache
        return LabelCache(folder, self.source.label_map) if folder else None

    def num_workers(self, item_bytes: Callable[[], int] | None = None) -> int:
        """data.num_workers; 0 where /dev/shm is needed and cannot hold what those of this machine's ranks keep ready.

        Forks hand over pixels in slots and labels as bytes, and need none of it (see shared_slots.py); other workers
        hand over tensors in /dev/shm, and one that runs out of it is killed without a message.

        Args:
            item_bytes: the largest item of the loader; None: that of training.
        """
        wanted, free = self.config.data.num_workers, get_free_shared_memory()
        if not wanted or free is None or shared_slots.is_possible():
            return wanted
        ranks = 1 if self.trainer is None else self.trainer.num_devices
        needed = AHEAD * wanted * ranks * (item_bytes or self.largest_batch_bytes)()
        if needed <= free:
            return wanted
        rank_zero_warn(
            f"{wanted} workers may need {needed / 2**20:.0f} MiB of shared memory, {free / 2**20:.0f} are free: images "
            "are read without workers. More memory (docker run --shm-size=8g) or fewer data.num_workers are faster."
        )
        return 0

    def prepare_data(self) -> None:
        """On one rank: what `repeats` needs to know of the masks is put into the cache."""
        if self.config.data.oversample:
            records = self.source.records("train")
            rank_zero_info(f"data.oversample: reading {len(records)} masks, or what is remembered of them")
            self.repeats()

    def repeats(self) -> NDArray[np.float64] | None:
        """How often each training image is seen in a pass; None: once."""
        data = self.config.data
        if not data.oversample:
            return None
        source = self.source
        found = scan(source.records("train"), source.root, max_pixels=data.max_pixels, colours=source.label_map.colours)
        meaning = self.source.label_map.class_index
        present = [
            {index for raw in finding.ids if (index := meaning(raw)) not in (None, IGNORED)} for finding in found
        ]
        return repeat_factors(present, data.oversample)

    def largest_batch(self) -> Batch:
        """A black sub-batch as large as the plan can give."""
        data = self.config.data
        sizes = [record.size for record in self.source.records("train")]
        most, crop = self.config.augment.scale[1], self.config.augment.crop
        limits = round(max(data.short_edges) * most), round(data.max_long_edge * most)
        canvas = largest_canvas(sizes, *limits, self.size_divisor)
        if crop is not None:
            canvas = canvas_size([cropped(canvas, crop)], self.size_divisor)
        count = data.batch_size
        image = torch.zeros(count, 3, *canvas, dtype=torch.uint8)
        label = torch.zeros(count, *label_size(canvas, self.label_stride), dtype=torch.int64)
        return Batch(image, label, torch.tensor([canvas] * count), ["the largest possible sub-batch"])

    def largest_batch_bytes(self) -> int:
        """Bytes of the images and labels of `largest_batch`."""
        batch = self.largest_batch()
        return batch.image.nbytes + batch.label.nbytes

    def largest_sample(self, records: Sequence[Record]) -> int:
        """Bytes of the label and all scales of the largest image."""
        limits = self.config.data.max_long_edge, self.size_divisor

        def size_of(image: Size) -> int:
            scales = (stretched_size(image, edge, *limits) for edge in self.config.eval.scales)
            label = torch.int16.itemsize * math.prod(image)
            return label + 3 * sum(math.prod(scale) for scale in scales)

        return max(size_of(size) for size in {record.size for record in records})

    def state_dict(self) -> dict[str, Any]:
        """Where training is. Here, since Lightning asks for the loader before it loads a loader's state."""
        return {"taken": self._taken if self._train_loader is None else self._train_loader.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._taken = sub_batches_taken(state_dict, self._place()[1])

    def eval_groups(self, stage: str) -> list[list[int]]:
        """The images of a stage in groups of up to eval.batch_size that have the same shape at every scale.

        They are the same for any number of ranks, and so is everything that is computed of them.
        """
        if stage not in self._eval_groups:
            config, records = self.config, self.source.records(self.split_of(stage))

            def shape(size: Size) -> Hashable:
                limits = config.data.max_long_edge, self.size_divisor
                return tuple(stretched_size(size, edge, *limits) for edge in config.eval.scales)

            self._eval_groups[stage] = groups_of_one_shape(
                (shape(record.size) for record in records), config.eval.batch_size
            )
        return self._eval_groups[stage]

    def val_dataloader(self) -> DataLoader[Any]:
        loader = self.eval_loader("val")
        self.check_limit("limit_val_batches", len(loader))
        return loader

    def test_dataloader(self) -> DataLoader[Any]:
        return self.eval_loader("test")

    def eval_loader(self, stage: str) -> DataLoader[Any]:
        """This rank's groups of the images of a stage: rank, rank + world_size, ... each exactly once.

        A rank without a group of its own gets the first one, which the module leaves alone: Lightning refuses empty
        loaders.
        """
        data, records = self.config.data, self.source.records(self.split_of(stage))
        dataset = EvalDataset(
            records,
            label_map=self.source.label_map,
            short_edges=self.config.eval.scales,
            max_long_edge=data.max_long_edge,
            size_divisor=self.size_divisor,
            antialias=self.net.convention.antialias,
            skip_bad=data.on_bad == "skip",
            max_pixels=data.max_pixels,
            cache=self.label_cache(),
        )
        rank, world_size = self._place()
        groups = self.eval_groups(stage)
        share = groups[rank::world_size] or groups[:1]
        return WatchedLoader(
            dataset,
            lambda number: [records[index].image for index in share[number]],
            data.worker_timeout_s,
            (self.config.eval.batch_size, self.largest_sample(records)),
            batch_sampler=share,
            collate_fn=list,
            num_workers=self.num_workers(lambda: self.config.eval.batch_size * self.largest_sample(records)),
            pin_memory=torch.cuda.is_available(),
        )

    def on_exception(self, exception: BaseException) -> None:
        end()  # the traceback keeps iterations referenced, and so their workers alive

    def teardown(self, stage: str) -> None:
        if self._train_loader is not None:
            self._train_loader.close()

    def _place(self) -> tuple[int, int]:
        """(rank, number of ranks) of this process."""
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
