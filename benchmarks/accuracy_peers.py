"""The training loops of the other libraries in accuracy.py, which starts this program: accuracy_peers.py settings.json

Loss, optimiser, schedule, crops and augmentation are those of each library's own example:

- smp: examples/camvid_segmentation_multiclass.ipynb of segmentation-models-pytorch: Dice loss, Adam 2e-4, cosine to
  1e-5, crops of 320 x 320 after flips, scales and shifts, perspective, noise, blur and colours (albumentations).
- transformers: examples/pytorch/semantic-segmentation/run_semantic_segmentation.py, with the values of its README: the
  network's own loss, AdamW 6e-5, polynomial schedule, batches of 8, crops, flips. SegFormer-B0 starts from random
  weights.

Where an example is worse off for a reason that is no choice of its authors, this program is kinder: smp's batches have
8 images, not 32, because a CPU would take too few steps; pixels are normalised as the encoder's weights were trained
with; unlabelled pixels are left out of the loss; whole images are predicted at their own size.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from accuracy import list_pairs, read_class_names, read_label
from numpy.typing import NDArray
from torch import Tensor, nn

IGNORED = 255
Transform = Callable[[NDArray[np.uint8], NDArray[np.uint8]], tuple[NDArray[np.uint8], NDArray[np.uint8]]]


class Peer(NamedTuple):
    """A network of another library with the recipe of its example."""

    net: nn.Module
    logits: Callable[[Tensor], Tensor]  # normalised (N, 3, H, W) -> (N, K, H, W)
    loss: Callable[[Tensor, Tensor], Tensor]  # normalised images, labels -> scalar
    optimizer: torch.optim.Optimizer
    rate: Callable[[float], float]  # progress 0..1 -> learning rate
    transform: Transform
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    divisor: int  # images are padded to multiples of it


def main() -> None:
    started = time.monotonic()
    settings = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(settings["seed"])
    data = Path(settings["data"])
    peer = PEERS[settings["side"]](settings, len(read_class_names(data)))
    steps, images = train(peer, list_pairs(data, "train"), settings)
    used = resource.getrusage(resource.RUSAGE_SELF)
    usage = (used.ru_utime + used.ru_stime, time.monotonic() - started, used.ru_maxrss / 2**10)
    folder = Path(settings["folder"])
    predict(peer, [image for image, _ in list_pairs(data, settings["split"])], folder / "predictions")
    (folder / "trained.json").write_text(json.dumps({"usage": usage, "steps": steps, "images": images}))


def train(peer: Peer, pairs: list[tuple[Path, Path]], settings: dict[str, Any]) -> tuple[int, int]:
    """Steps until this process has used its CPU minutes; returns their number and that of the images."""
    budget_s = 60 * settings["minutes"]
    rng = np.random.default_rng(settings["seed"])
    peer.net.train()
    steps = images = 0
    for batch in draw_batches(pairs, peer.batch_size, rng):
        progress = time.process_time() / budget_s
        if steps >= 2 and (settings["toy"] or progress >= 1):
            break
        for group in peer.optimizer.param_groups:
            group["lr"] = peer.rate(min(progress, 1))
        image, label = read_batch(batch, peer)
        peer.optimizer.zero_grad()
        loss = peer.loss(image, label)
        loss.backward()
        peer.optimizer.step()
        steps, images = steps + 1, images + len(batch)
        print(f"step {steps}  CPU {time.process_time():.0f} s  loss {loss.item():.4f}", flush=True)
    return steps, images


def draw_batches(
    pairs: list[tuple[Path, Path]], batch_size: int, rng: np.random.Generator
) -> Iterator[list[tuple[Path, Path]]]:
    """Shuffled passes without end, the last batch of each with what is left, as a DataLoader gives them."""
    while True:
        order = rng.permutation(len(pairs))
        for first in range(0, len(order), batch_size):
            yield [pairs[index] for index in order[first : first + batch_size]]


def read_batch(pairs: list[tuple[Path, Path]], peer: Peer) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, H, W) and labels (N, H, W), 255 = not scored."""
    read = []
    for image_path, label_path in pairs:
        label = read_label(label_path)
        read.append(peer.transform(read_rgb(image_path), np.where(label < 0, IGNORED, label).astype(np.uint8)))
    images, labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*read, strict=True))
    return normalise(images, peer), labels.long()


def read_rgb(path: Path) -> NDArray[np.uint8]:
    return np.ascontiguousarray(cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1])


def normalise(images: Tensor, peer: Peer) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (peer.mean, peer.std))
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


@torch.inference_mode()
def predict(peer: Peer, images: list[Path], folder: Path) -> None:
    """Write class ids, 1 = the first class, at the size of each image."""
    folder.mkdir()
    peer.net.eval()
    for path in images:
        image = read_rgb(path)
        height, width = image.shape[:2]
        below, right = -height % peer.divisor, -width % peer.divisor
        padded = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT)
        logits = peer.logits(normalise(torch.from_numpy(padded)[None], peer))
        ids = logits[0, :, :height, :width].argmax(0).numpy().astype(np.uint8) + 1
        cv2.imwrite(str(folder / f"{path.stem}_ids.png"), ids)


# ---- segmentation-models-pytorch


def build_smp(settings: dict[str, Any], num_classes: int) -> Peer:
    import segmentation_models_pytorch as smp

    arch = settings["side"].removeprefix("smp_")
    net = smp.create_model(arch, f"tu-{settings['encoder']}", encoder_weights=None, classes=num_classes)
    load_encoder(net.encoder, settings)
    loss = smp.losses.DiceLoss(smp.losses.MULTICLASS_MODE, from_logits=True, ignore_index=IGNORED)
    config = net.encoder.model.default_cfg  # type: ignore[union-attr]
    return Peer(
        net=net,
        logits=net,
        loss=lambda image, label: loss(net(image), label),
        optimizer=torch.optim.Adam(net.parameters(), lr=2e-4),
        rate=lambda progress: 1e-5 + (2e-4 - 1e-5) * (1 + math.cos(math.pi * progress)) / 2,
        transform=build_smp_transform(64 if settings["toy"] else 320, settings["seed"]),
        batch_size=2 if settings["toy"] else 8,
        mean=config["mean"],
        std=config["std"],
        divisor=32,
    )


def load_encoder(encoder: nn.Module, settings: dict[str, Any]) -> None:
    """The ImageNet weights that ours starts from, in timm's network below `model`."""
    if settings["weights"] == "none":
        return
    from semseg.nets.encoders.efficientnet_lite import convert_lite_weights

    published = torch.load(settings["weights"], weights_only=True)
    own = encoder.model.state_dict()  # type: ignore[union-attr]
    channels = encoder.out_channels[-1]  # type: ignore[index]
    weights = convert_lite_weights(published, settings["encoder"], channels, own)
    missing = set(own) - set(weights)
    assert not [key for key in missing if "num_batches_tracked" not in key], missing
    encoder.model.load_state_dict({key: weights[key] for key in own if key in weights}, strict=False)  # type: ignore[union-attr]


def build_smp_transform(crop: int, seed: int) -> Transform:
    """The augmentation of the example; areas beyond the image are black, and not scored."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for newer versions
    import albumentations as A

    outside = {"border_mode": cv2.BORDER_CONSTANT, "fill": 0, "fill_mask": IGNORED}
    transform = A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.ShiftScaleRotate(scale_limit=0.5, rotate_limit=0, shift_limit=0.1, p=1, **outside),
            A.PadIfNeeded(min_height=crop, min_width=crop, **outside),
            A.RandomCrop(height=crop, width=crop),
            A.GaussNoise(p=0.2),
            A.Perspective(p=0.5, **outside),
            A.OneOf([A.CLAHE(p=1), A.RandomBrightnessContrast(p=1), A.RandomGamma(p=1)], p=0.9),
            A.OneOf([A.Sharpen(p=1), A.Blur(blur_limit=3, p=1), A.MotionBlur(blur_limit=3, p=1)], p=0.9),
            A.OneOf([A.RandomBrightnessContrast(p=1), A.HueSaturationValue(p=1)], p=0.9),
        ],
        seed=seed,
    )

    def apply(image: NDArray[np.uint8], label: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        changed = transform(image=image, mask=label)
        return changed["image"], changed["mask"]

    return apply


# ---- transformers


def build_segformer(settings: dict[str, Any], num_classes: int) -> Peer:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    small = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    sizes = small if settings["toy"] else {}  # the defaults are those of B0
    net = SegformerForSemanticSegmentation(
        SegformerConfig(num_labels=num_classes, semantic_loss_ignore_index=IGNORED, **sizes)
    )

    def logits(image: Tensor) -> Tensor:
        found = net(pixel_values=image).logits  # a quarter of the size
        return F.interpolate(found, image.shape[-2:], mode="bilinear", align_corners=False)

    return Peer(
        net=net,
        logits=logits,
        loss=lambda image, label: net(pixel_values=image, labels=label).loss,
        optimizer=torch.optim.AdamW(net.parameters(), lr=6e-5),
        rate=lambda progress: 6e-5 * (1 - progress),
        transform=crop_and_flip(64 if settings["toy"] else 360, np.random.default_rng(settings["seed"] + 1)),
        batch_size=2 if settings["toy"] else 8,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        divisor=32,
    )


def crop_and_flip(crop: int, rng: np.random.Generator) -> Transform:
    """A random square, of the image with black below and to the right where it is smaller; half of them mirrored."""

    def apply(image: NDArray[np.uint8], label: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        below, right = (max(0, crop - length) for length in image.shape[:2])
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT)  # pyright: ignore[reportAssignmentType]
        label = cv2.copyMakeBorder(label, 0, below, 0, right, cv2.BORDER_CONSTANT, value=IGNORED)  # pyright: ignore[reportAssignmentType]
        top, left = (int(rng.integers(length - crop + 1)) for length in image.shape[:2])
        step = -1 if rng.random() < 0.5 else 1
        area = (slice(top, top + crop), slice(left, left + crop))
        return image[area][:, ::step].copy(), label[area][:, ::step].copy()

    return apply


PEERS: dict[str, Callable[[dict[str, Any], int], Peer]] = {
    "smp_unet": build_smp,
    "smp_deeplabv3plus": build_smp,
    "transformers_segformer_b0": build_segformer,
}

if __name__ == "__main__":
    main()
