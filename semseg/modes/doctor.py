"""mode=doctor: tries out whether this machine can train, and reports what is missing if it cannot."""

from __future__ import annotations

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
from semseg.errors import DataError, SemsegError, install_command
from semseg.nets.registry import build_segmenter
from semseg.prediction.video import VideoWriters, read_frames
from semseg.storage.run_folders import expand_path, require_folder_path
from semseg.system.memory import get_total_memory
from semseg.system.processors import choose_num_workers, count_processors
from semseg.system.shared_memory import SHARED_MEMORY, get_free_shared_memory
from semseg.training.losses import segmentation_loss

OK, WARNING, ERROR = "ok", "warning", "error"
CORE_PACKAGES = (
    "torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core", "omegaconf", "opencv-python", "numpy",
    "pillow",
)  # fmt: skip
EXTRA_PACKAGES = {
    "tb": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny", "tiff": "imagecodecs", "geo": "rasterio",
    "timm": "timm", "smp": "segmentation-models-pytorch", "transformers": "transformers", "demo": "fastapi",
    "export": "onnxruntime", "joblib": "hydra-joblib-launcher", "slurm": "hydra-submitit-launcher",
    "optuna": "hydra-optuna-sweeper",
}  # fmt: skip
MIN_SHARED_MEMORY = 2**30  # bytes; a sub-batch of two images of 600 x 1000 pixels is 4 MB, each worker has several
MIN_DISK_SPACE = 5 * 2**30  # bytes; a checkpoint of UPerNet-101 is 700 MB
WORKER_SECONDS = 60


class MachineError(SemsegError):
    """Something that every training run needs does not work on this machine."""

    exit_code = 1


def run(config: Config, overrides: list[str]) -> None:
    """Run all checks and print one line for each, then a verdict.

    Raises:
        MachineError: if this machine cannot train.
    """
    results = check_machine(expand_path(config.runs_dir), choose_num_workers(config.data.num_workers, num_ranks=1))
    table = Table(title="this machine", show_header=False)
    for result in results:
        table.add_row(result.level, result.name, result.text)
    Console().print(table)
    failed = [result.name for result in results if result.level == ERROR]
    if failed:
        raise MachineError(f"NOT READY: {', '.join(failed)}. See above.")
    warnings = [result.name for result in results if result.level == WARNING]
    print(f"READY to train, with warnings: {', '.join(warnings)}." if warnings else "READY to train.")


class CheckResult(NamedTuple):
    """The outcome of one check."""

    level: str  # OK, WARNING or ERROR
    name: str
    text: str


def check_machine(runs_dir: Path, num_workers: int) -> list[CheckResult]:
    """Try everything that training needs, one after the other.

    Args:
        runs_dir: the folder for run folders.
        num_workers: of the loader; 0: workers are not tried.
    """
    checks: list[tuple[str, Callable[[], CheckResult]]] = [
        ("versions", check_versions),
        ("extras", check_extras),
        ("processor", check_processor),
        ("devices", check_devices),
        ("shared memory", lambda: check_shared_memory(num_workers)),
        ("disk", lambda: check_disk(runs_dir)),
        ("images", check_images),
        ("videos", check_videos),
        ("loader", lambda: check_loader(num_workers)),
        ("training step", check_training_step),
    ]
    return [attempt(name, check) for name, check in checks]


def attempt(name: str, check: Callable[[], CheckResult]) -> CheckResult:
    """The result of a check; any exception is an ERROR."""
    try:
        return check()
    except SemsegError as error:
        return CheckResult(ERROR, name, str(error))
    except Exception as error:  # from any library, for any reason
        return CheckResult(ERROR, name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def check_versions() -> CheckResult:
    """The versions of Python and of the required packages."""
    versions = [f"{name} {version(name)}" for name in CORE_PACKAGES]
    return CheckResult(OK, "versions", ", ".join([f"Python {platform.python_version()}", *versions]))


def check_extras() -> CheckResult:
    """The optional packages that are installed."""
    installed = [extra for extra, package in EXTRA_PACKAGES.items() if is_installed(package)]
    missing = [extra for extra in EXTRA_PACKAGES if extra not in installed]
    hint = f"; not installed: {', '.join(missing)} ({install_command('<extra>')})" if missing else ""
    return CheckResult(OK, "extras", f"{', '.join(installed) or 'none'}{hint}")


def is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def check_processor() -> CheckResult:
    """The cores and the memory that this process may use."""
    cores = count_processors()
    total = get_total_memory()
    memory = "" if total is None else f", {format_gigabytes(total)} of memory"
    return CheckResult(
        OK, "processor", f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads{memory}"
    )


def check_devices() -> CheckResult:
    """The GPUs that PyTorch sees; training works without."""
    if torch.backends.mps.is_available():
        return CheckResult(OK, "devices", "an Apple GPU, which trainer.accelerator=auto uses")
    if not torch.cuda.is_available():
        return CheckResult(OK, "devices", "no GPU that PyTorch can use: training runs on the CPU")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    listed = ", ".join(f"{device.name} with {format_gigabytes(device.total_memory)}" for device in gpus)
    half = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use trainer.precision=16-mixed"
    return CheckResult(OK, "devices", f"{listed}; CUDA {torch.version.cuda}; {half}")


def check_shared_memory(num_workers: int) -> CheckResult:
    """Free space in /dev/shm, which containers limit to 64 MB.

    Workers of training and evaluation need none if they are forks; the worker of mode=predict, other workers, and
    communication between several GPUs do.
    """
    free = get_free_shared_memory()
    if free is None:
        return CheckResult(OK, "shared memory", "is not a folder on this system")
    if num_workers and free < MIN_SHARED_MEMORY:
        users = (
            "mode=predict with a worker and several GPUs"
            if shared_slots.slots_are_possible()
            else "workers and several GPUs"
        )
        hint = f"{users} may need more (docker run --shm-size=8g, or data.num_workers=0)"
        return CheckResult(WARNING, "shared memory", f"{format_gigabytes(free)} free in {SHARED_MEMORY}: {hint}")
    return CheckResult(OK, "shared memory", f"{format_gigabytes(free)} free")


def check_disk(runs_dir: Path) -> CheckResult:
    """Whether run folders can be written, and the free space."""
    folder = runs_dir.absolute()
    require_folder_path(folder, "runs_dir")
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    with tempfile.TemporaryFile(dir=existing) as file:
        file.write(b"semseg")
    free = shutil.disk_usage(existing).free
    level = WARNING if free < MIN_DISK_SPACE else OK
    return CheckResult(level, "disk", f"{format_gigabytes(free)} free for runs_dir={runs_dir}")


def check_images() -> CheckResult:
    """Write and read JPEG, PNG and WebP."""
    pixels = np.full((16, 24, 3), 90, np.uint8)
    for suffix in (".jpg", ".png", ".webp"):
        is_written, data = cv2.imencode(suffix, pixels)
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR) if is_written else None
        if decoded is None or int(np.abs(decoded.astype(int) - pixels).max()) > 3:
            return CheckResult(ERROR, "images", f"OpenCV cannot write and read {suffix}: reinstall opencv-python")
    return CheckResult(OK, "images", "JPEG, PNG, WebP")


def check_videos() -> CheckResult:
    """Write and read MP4, which only mode=predict needs."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "film"
        try:
            with VideoWriters(target) as writers:
                writers.add("overlay", np.full((64, 96, 3), 90, np.uint8), 25.0)
            (film,) = Path(folder).iterdir()
            frames = sum(1 for _ in read_frames(film))
        except (DataError, OSError, ValueError, cv2.error) as error:
            return CheckResult(WARNING, "videos", f"cannot be written and read ({error}): images work")
    return CheckResult(OK, "videos", f"MP4, {frames} frame written and read")


def check_loader(num_workers: int) -> CheckResult:
    """Two worker processes that send a few tensors."""
    workers = min(2, num_workers)
    data = TensorDataset(torch.arange(64))
    timeout = WORKER_SECONDS if workers else 0
    total = sum(int(batch.sum()) for (batch,) in DataLoader(data, 4, num_workers=workers, timeout=timeout))
    if total != 2016:
        return CheckResult(ERROR, "loader", f"workers sent wrong numbers: {total} instead of 2016")
    text = f"{workers} workers send tensors" if workers else "data.num_workers=0: no workers"
    return CheckResult(OK, "loader", text)


def check_training_step() -> CheckResult:
    """Take steps with a small network on every device: its loss must decrease."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
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
            text = f"the loss on {device} does not decrease: {losses[0]:.3f}, then {losses[-1]:.3f}"
            return CheckResult(ERROR, "training step", text)
    return CheckResult(OK, "training step", f"the loss decreases on {', '.join(devices)}")


def format_gigabytes(number: int) -> str:
    """A number of bytes as text.

    >>> format_gigabytes(3 * 2**29)
    '1.5 GB'
    """
    return f"{number / 2**30:.1f} GB"
