"""mode=doctor: whether this machine can train, found out by trying, and what is missing if it cannot."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from semseg.config.schema import Config
from semseg.data import shared_slots
from semseg.errors import DataError, SemsegError
from semseg.nets.registry import build_segmenter
from semseg.prediction.video import VideoWriters, read_frames
from semseg.system.shared_memory import SHARED_MEMORY, get_free_shared_memory
from semseg.training.losses import segmentation_loss

OK, WARNING, ERROR = "ok", "warning", "error"
PACKAGES = (
    "torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core", "omegaconf", "opencv-python", "numpy",
    "pillow",
)  # fmt: skip
EXTRAS = {
    "tb": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny", "timm": "timm", "demo": "fastapi",
    "export": "onnxruntime", "joblib": "hydra-joblib-launcher", "slurm": "hydra-submitit-launcher",
    "optuna": "hydra-optuna-sweeper",
}  # fmt: skip
LITTLE_SHARED_MEMORY = 2**30  # bytes; a sub-batch of two images of 600 x 1000 pixels is 4 MB, each worker has several
LITTLE_DISK = 5 * 2**30  # bytes; a checkpoint of UPerNet-101 is 700 MB
WORKER_SECONDS = 60


class MachineError(SemsegError):
    """Something that every training run needs does not work here."""

    exit_code = 1


def run(config: Config, overrides: list[str]) -> None:
    """Look at everything and print a line for each, then a verdict.

    Raises:
        MachineError: if this machine cannot train.
    """
    findings = examine(Path(config.runs_dir), config.data.num_workers)
    table = Table(title="this machine", show_header=False)
    for finding in findings:
        table.add_row(finding.level, finding.name, finding.text)
    Console().print(table)
    wrong = [finding.name for finding in findings if finding.level == ERROR]
    if wrong:
        raise MachineError(f"NOT READY: {', '.join(wrong)}. See above.")
    doubtful = [finding.name for finding in findings if finding.level == WARNING]
    print(f"READY to train, with warnings: {', '.join(doubtful)}." if doubtful else "READY to train.")


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: str  # OK, WARNING or ERROR
    name: str
    text: str


def examine(runs_dir: Path, num_workers: int) -> list[Finding]:
    """Everything that training needs, one after the other; each is tried, not looked up.

    Args:
        runs_dir: where run folders are to be.
        num_workers: of the loader; 0: they are not tried.
    """
    looks: list[tuple[str, Callable[[], Finding]]] = [
        ("versions", versions),
        ("extras", extras),
        ("processor", processor),
        ("devices", devices),
        ("shared memory", lambda: shared_memory(num_workers)),
        ("disk", lambda: disk(runs_dir)),
        ("images", images),
        ("videos", videos),
        ("loader", lambda: loader(num_workers)),
        ("training step", training_step),
    ]
    return [attempted(name, look) for name, look in looks]


def attempted(name: str, look: Callable[[], Finding]) -> Finding:
    """What `look` finds; whatever it raises is a finding too."""
    try:
        return look()
    except Exception as error:  # of any library, for any reason: that is what is looked for
        return Finding(ERROR, name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def versions() -> Finding:
    """Of Python and of the packages that everything is built on."""
    known = [f"{name} {version(name)}" for name in PACKAGES]
    return Finding(OK, "versions", ", ".join([f"Python {platform.python_version()}", *known]))


def extras() -> Finding:
    """Which optional packages are here."""
    here = [extra for extra, package in EXTRAS.items() if is_installed(package)]
    missing = [extra for extra in EXTRAS if extra not in here]
    how = f"; not installed: {', '.join(missing)} (pip install --editable '.[<extra>]')" if missing else ""
    return Finding(OK, "extras", f"{', '.join(here) or 'none'}{how}")


def is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def processor() -> Finding:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {in_gigabytes(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} of memory"
    return Finding(OK, "processor", f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads{memory}")


def devices() -> Finding:
    """GPUs, if PyTorch sees any; training works without."""
    if not torch.cuda.is_available():
        return Finding(OK, "devices", "no GPU that PyTorch can use: training runs on the CPU")
    known = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    told = ", ".join(f"{device.name} with {in_gigabytes(device.total_memory)}" for device in known)
    half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use trainer.precision=16-mixed"
    return Finding(OK, "devices", f"{told}; CUDA {torch.version.cuda}; {half}")


def shared_memory(num_workers: int) -> Finding:
    """Room in /dev/shm, of which containers have 64 MB.

    Workers of training and evaluation need none where they are forks; the worker of mode=predict, other workers, and
    several GPUs that talk to each other do.
    """
    free = get_free_shared_memory()
    if free is None:
        return Finding(OK, "shared memory", "is not a folder on this system")
    if num_workers and free < LITTLE_SHARED_MEMORY:
        users = (
            "mode=predict with a worker and several GPUs"
            if shared_slots.slots_are_possible()
            else "workers and several GPUs"
        )
        way = f"{users} may need more (docker run --shm-size=8g, or data.num_workers=0)"
        return Finding(WARNING, "shared memory", f"{in_gigabytes(free)} free in {SHARED_MEMORY}: {way}")
    return Finding(OK, "shared memory", f"{in_gigabytes(free)} free")


def disk(runs_dir: Path) -> Finding:
    """Whether run folders can be written, and how much fits. A folder that is made for the trial is removed."""
    folder = runs_dir.absolute()
    above = next(path for path in (folder, *folder.parents) if path.is_dir())
    with tempfile.TemporaryFile(dir=above) as file:
        file.write(b"semseg")
    free = shutil.disk_usage(above).free
    level = WARNING if free < LITTLE_DISK else OK
    return Finding(level, "disk", f"{in_gigabytes(free)} free for runs_dir={runs_dir}")


def images() -> Finding:
    """JPEG, PNG and WebP, written and read again."""
    pixels = np.full((16, 24, 3), 90, np.uint8)
    for suffix in (".jpg", ".png", ".webp"):
        is_written, data = cv2.imencode(suffix, pixels)
        again = cv2.imdecode(data, cv2.IMREAD_COLOR) if is_written else None
        if again is None or int(np.abs(again.astype(int) - pixels).max()) > 3:
            return Finding(ERROR, "images", f"OpenCV cannot write and read {suffix}: reinstall opencv-python")
    return Finding(OK, "images", "JPEG, PNG, WebP")


def videos() -> Finding:
    """MP4, written and read again; only mode=predict needs it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "film"
        try:
            with VideoWriters(target) as writers:
                writers.add("overlay", np.full((64, 96, 3), 90, np.uint8), 25.0)
            (film,) = Path(folder).iterdir()
            frames = sum(1 for _ in read_frames(film))
        except (DataError, OSError, ValueError, cv2.error) as error:
            return Finding(WARNING, "videos", f"cannot be written and read ({error}): pictures work")
    return Finding(OK, "videos", f"MP4, {frames} frame written and read")


def loader(num_workers: int) -> Finding:
    """Two worker processes that hand over a few tensors."""
    workers = min(2, num_workers)
    data = TensorDataset(torch.arange(64))
    timeout = WORKER_SECONDS if workers else 0
    total = sum(int(batch.sum()) for (batch,) in DataLoader(data, 4, num_workers=workers, timeout=timeout))
    if total != 2016:
        return Finding(ERROR, "loader", f"workers hand over wrong numbers: {total} for 2016")
    told = f"{workers} workers hand over tensors" if workers else "data.num_workers=0: no workers"
    return Finding(OK, "loader", told)


def training_step() -> Finding:
    """Steps of a small network on every device: its loss must become smaller."""
    kinds = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in kinds:
        torch.manual_seed(0)
        net = build_segmenter("resnet18", "c1", 4, {}, {}).to(device).train()
        image = torch.randn(2, 3, 64, 64, device=device)
        label = torch.randint(0, 4, (2, 64 // net.label_stride, 64 // net.label_stride), device=device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = segmentation_loss(net(image), label).total
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        if not losses[-1] < losses[0]:
            told = f"the loss on {device} goes from {losses[0]:.3f} to {losses[-1]:.3f}"
            return Finding(ERROR, "training step", told)
    return Finding(OK, "training step", f"the loss becomes smaller on {', '.join(kinds)}")


def in_gigabytes(number: int) -> str:
    """Bytes in words.

    >>> in_gigabytes(3 * 2**29)
    '1.5 GB'
    """
    return f"{number / 2**30:.1f} GB"
