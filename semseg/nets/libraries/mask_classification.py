"""Stage 5: mask classification of transformers: MaskFormer, Mask2Former, OneFormer and EoMT, trained with its own loss.

Such a network predicts Q masks, each with a class or none. The score of a class at a pixel is the sum over the masks of
the mask's probability for that class times the mask's probability at the pixel (Cheng et al. 2021, section 3.4). Its
logarithm takes the place of logits, so that evaluation at several scales, windows and prediction work as for all other
networks: a softmax gives the scores divided by their sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semseg.data.label_map import IGNORED
from semseg.errors import ConfigError
from semseg.nets.blocks import to_full_precision, without_autocast
from semseg.nets.interfaces import Logits
from semseg.nets.libraries.transformers import IMAGENET, Family, TransformersNetwork
from semseg.nets.padding import pad_image
from semseg.nets.precision import choose_widest_float

MIN_SCORE = 1e-6  # keeps the logarithm of a score finite
# "the task is semantic" in the tokens of CLIP, which OneFormer reads with every image.
SEMANTIC_TASK = (49406, 518, 10549, 533, 29119, 1550, 49407)
PROBS = "attn_mask_probs"  # buffer of EoMT: by block, the share of the queries whose attention is masked
ANNEALING_POWER = 0.9


# ---- the families


def run_masks(model: Any, image: Tensor, wants_aux: bool) -> Logits:
    return Logits(semantic_scores(model(image)), None)


def run_oneformer(model: Any, image: Tensor, wants_aux: bool) -> Logits:
    return Logits(semantic_scores(model(image, task_inputs=build_task(model, image))), None)


def build_task(model: Any, image: Tensor) -> Tensor:
    """(N, T) int64: the tokens of the task, padded with 0."""
    task = image.new_zeros(1, model.config.task_seq_len, dtype=torch.int64)
    task[:, : len(SEMANTIC_TASK)] = torch.tensor(SEMANTIC_TASK, device=image.device)
    return task.expand(len(image), -1)


def semantic_scores(output: Any) -> Tensor:
    """The logarithms of the scores (N, K, h, w), in float32 or wider, from the logits of classes and masks."""
    classes, masks = output.class_queries_logits, output.masks_queries_logits  # (N, Q, K + 1), (N, Q, h, w)
    with without_autocast(classes.device.type):
        chances = to_full_precision(classes).softmax(-1)[..., :-1]
        scores = torch.einsum("bqc,bqhw->bchw", chances, to_full_precision(masks).sigmoid())
    return scores.clamp_min(MIN_SCORE).log()


def find_mask_strides(config: Any) -> tuple[int, int]:
    return 32, 4


def find_eomt_strides(config: Any) -> tuple[int, int]:
    return config.patch_size, config.patch_size // 2**config.num_upscale_blocks


DEFORMABLE = "because the reference points of its deformable attention are computed while it is traced"
MASK_CLASSIFIERS = ("class_predictor.",)
ENCODER = ("model.pixel_level_module.encoder",)
EOMT_BACKBONE = ("embeddings", "layers", "layernorm")
MASK_FAMILIES: dict[str, Family] = {
    "maskformer": Family(
        "MaskFormerForInstanceSegmentation", ENCODER, MASK_CLASSIFIERS, IMAGENET, run_masks, find_mask_strides
    ),
    "mask2former": Family(
        "Mask2FormerForUniversalSegmentation",
        ENCODER,
        MASK_CLASSIFIERS,
        IMAGENET,
        run_masks,
        find_mask_strides,
        frozen_graph=DEFORMABLE,
    ),
    "oneformer": Family(
        "OneFormerForUniversalSegmentation",
        ENCODER,
        ("model.transformer_module.decoder.class_embed.",),
        IMAGENET,
        run_oneformer,
        find_mask_strides,
        frozen_graph=DEFORMABLE,
    ),
    "eomt": Family(
        "EomtForUniversalSegmentation",
        EOMT_BACKBONE,
        MASK_CLASSIFIERS,
        IMAGENET,
        run_masks,
        find_eomt_strides,
        has_one_size=True,
    ),
    "eomt_dinov3": Family(
        "EomtDinov3ForUniversalSegmentation",
        EOMT_BACKBONE,
        MASK_CLASSIFIERS,
        IMAGENET,
        run_masks,
        find_eomt_strides,
        needs_multiples=True,
    ),
}
# Settings without which these networks fail, or ask for inputs that a data set of semantic segmentation does not have.
NEEDED_SETTINGS: dict[str, dict[str, Any]] = {
    "maskformer": {"use_auxiliary_loss": False},
    "oneformer": {"is_training": False},
}


class MaskClassifier(TransformersNetwork):
    """A network of mask classification with the loss of transformers: class, mask and dice losses of matched masks.

    EoMT's masked attention is annealed over the run: see `annealed_shares`. In eval mode nothing is random: the masks
    of a block are applied to all queries from a share of 0.5 on, and to none below.

    Args: as for TransformersNetwork.
    """

    has_own_loss = True
    num_void_classes = 1  # the class of a mask that is none

    @property
    def is_eomt(self) -> bool:
        return self.model.config.model_type in ("eomt", "eomt_dinov3")

    def forward(self, image: Tensor) -> Logits:
        """(N, 3, H, W) normalised -> the logarithms of the scores as main logits, without auxiliary ones."""
        self._set_grid(pad_image(image, self.size_divisor))
        if not self.is_eomt or (self.training and image.device.type != "meta"):
            return super().forward(image)
        with self.fix_masks():
            return super().forward(image)

    def compute_own_loss(self, image: Tensor, label: Tensor) -> tuple[Tensor, Logits]:
        """The loss of transformers, and the scores without a gradient.

        Ignored pixels are left out exactly: the loss does not depend on the masks there. It is averaged over the masks
        of this rank.

        Args:
            image: (N, 3, H, W) normalised.
            label: (N, h, w) int64, -1 = ignored, at the stride of the masks; another one is sampled.

        Raises:
            ConfigError: for weights of another type than float32, with which the library's loss cannot compute.
        """
        if image.dtype != torch.float32:
            raise ConfigError(
                f"trainer.precision: the loss of {self.family.class_name} needs weights in float32, not "
                f"{str(image.dtype).removeprefix('torch.')}. Use bf16-mixed or 32-true."
            )
        self.check_size(image)
        image = pad_image(image, self.size_divisor)
        self._set_grid(image)
        size = [side // self.label_stride for side in image.shape[-2:]]
        if list(label.shape[-2:]) != size:
            label = F.interpolate(label[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()
        index = find_replacements(label)
        masks, classes = split_classes(label.flatten(1).gather(1, index).view_as(label))
        given: dict[str, Any] = {"task_inputs": build_task(self.model, image)} if self.is_oneformer else {}
        with self._replace_ignored(index):
            output = self.model(image, mask_labels=masks, class_labels=classes, **given)
        with torch.no_grad():
            logits = Logits(semantic_scores(output), None)
        return output.loss.reshape(()), logits

    @property
    def is_oneformer(self) -> bool:
        return self.model.config.model_type == "oneformer"

    def set_progress(self, step: int, total_steps: int) -> None:
        """Set the share of masked attention of step `step` of a run of `total_steps`; only EoMT has one."""
        if self.is_eomt:
            probs = getattr(self.model, PROBS)
            shares = annealed_shares(step, total_steps, len(probs))
            probs.copy_(torch.tensor(shares, dtype=probs.dtype))

    @contextmanager
    def fix_masks(self) -> Iterator[None]:
        """Within it, the shares of masked attention are numbers, 0 or 1: nothing is random, and no graph reads them."""
        model = self.model
        shares = model._buffers.pop(PROBS, None)
        if shares is None:  # inside another call
            yield
            return
        rounded = [1.0] * len(shares) if shares.is_meta else [float(share >= 0.5) for share in shares.tolist()]
        model.__dict__[PROBS] = rounded  # not a buffer, whose values an exported graph would depend on
        try:
            yield
        finally:
            del model.__dict__[PROBS]
            model._buffers[PROBS] = shares

    @contextmanager
    def as_graph(self) -> Iterator[None]:
        """As TransformersNetwork.as_graph, with masked attention decided before."""
        if not self.is_eomt:
            with super().as_graph():
                yield
            return
        with super().as_graph(), self.fix_masks():
            yield

    @contextmanager
    def _replace_ignored(self, index: Tensor) -> Iterator[None]:
        """Within it, the criterion sees masks whose ignored places have the values of scored ones."""

        def replace(criterion: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            call = inspect.signature(criterion.forward).bind(*args, **kwargs)
            given = call.arguments
            given.update(prepare_for_loss(given, index))
            if given.get("auxiliary_predictions"):
                given["auxiliary_predictions"] = [
                    {**prediction, **prepare_for_loss(prediction, index)}
                    for prediction in given["auxiliary_predictions"]
                ]
            return call.args, call.kwargs

        handle = self.model.criterion.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _set_grid(self, image: Tensor) -> None:
        """EoMT on DINOv3 takes any size, but has its grid of patches as an attribute."""
        if self.is_eomt and self.image_size is None:
            patch = self.model.config.patch_size
            self.model.grid_size = (image.shape[-2] // patch, image.shape[-1] // patch)


# ---- targets


def find_replacements(label: Tensor) -> Tensor:
    """For every place of a label (N, h, w) the place to take instead (N, h * w): itself, or if ignored, a scored one.

    The replacements of an image are spread evenly over its scored places. Without any, nothing is replaced.

    >>> find_replacements(torch.tensor([[[3, -1, 0]]]))
    tensor([[0, 0, 2]])
    """
    flat = label.flatten(1)
    index = torch.arange(flat.shape[1], device=label.device).repeat(len(flat), 1)
    for row, places in zip(flat, index, strict=True):
        scored, ignored = (row != IGNORED).nonzero()[:, 0], (row == IGNORED).nonzero()[:, 0]
        if len(scored) and len(ignored):
            last, sum_type = len(scored) - 1, choose_widest_float(label.device)
            chosen = torch.linspace(0, last, len(ignored), dtype=sum_type, device=label.device)
            places[ignored] = scored[chosen.long().clamp(max=last)]
    return index


def prepare_for_loss(logits: Mapping[str, Any], index: Tensor) -> dict[str, Tensor]:
    """The logits of masks at the places `index`, and those of classes, in float32 whatever the autocast says."""
    return {
        "masks_queries_logits": take(logits["masks_queries_logits"].float(), index),
        "class_queries_logits": logits["class_queries_logits"].float(),
    }


def take(masks: Tensor, index: Tensor) -> Tensor:
    """Masks (N, Q, h, w) with the values of the places `index` (N, h * w)."""
    chosen = index[:, None].expand(-1, masks.shape[1], -1)
    return masks.flatten(2).gather(2, chosen).view_as(masks)


def split_classes(label: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """By image: the masks (n, h, w) float32 of its classes, and these classes (n) int64; n may be 0."""
    classes = [ids[ids != IGNORED].unique() for ids in label]
    masks = [(ids == found[:, None, None]).float() for ids, found in zip(label, classes, strict=True)]
    return masks, classes


def annealed_shares(step: int, total_steps: int, num_blocks: int) -> Sequence[float]:
    """The share of queries whose attention is masked, for each of EoMT's last blocks, before step `step` (from 0).

    As in Kerssies et al. 2025: from 1 to 0 for one block after the other, with the power 0.9. The run has
    num_blocks + 2 equal parts; block n anneals in part n + 1, so that the last part trains without masks, as a finished
    network is used.

    >>> annealed_shares(0, 60, 4), annealed_shares(50, 60, 4)
    ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    """
    part = step / max(1, total_steps) * (num_blocks + 2)
    return [min(1.0, max(0.0, block + 2 - part)) ** ANNEALING_POWER for block in range(num_blocks)]
