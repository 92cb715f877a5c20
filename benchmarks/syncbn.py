"""The cost of synchronised batch normalisation compared with nn.BatchNorm2d, side by side in the same run.

    python benchmarks/syncbn.py                          # 2 processes on the CPU, gloo
    python benchmarks/syncbn.py --device cuda            # one process on a GPU, with the reduction enforced
    python benchmarks/syncbn.py --device cuda --processes 2 --backend gloo   # two processes on one GPU

Plain and synchronised rounds alternate, so that other load on the machine affects both; numbers are medians of rank 0
in milliseconds. Plain layers have separate statistics on each rank; both networks run under DDP.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semseg.nets.registry import build_segmenter
from semseg.syncbn.layer import convert_batch_norms

LAYERS = [(2, 64, 128, 128), (2, 256, 64, 64), (2, 512, 32, 32)]
ROW = "{:<44}{:>10}{:>10}{:>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, help="default: 2 on the CPU, 1 on CUDA")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: gloo on the CPU, nccl on CUDA")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each contender")
    parser.add_argument("--convention", choices=("torch", "published"), default="torch")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--batch", type=int, default=2, help="images per process in the training step")
    parser.add_argument("--size", type=int, default=160, help="height and width of the images, pixels")
    parser.add_argument("--threads", type=int, default=1, help="per process, CPU only")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.processes = options.processes or (2 if on_cpu else 1)
    options.backend = options.backend or ("gloo" if on_cpu else "nccl")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run, (port, options), nprocs=options.processes)


def run(rank: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group(options.backend, rank=rank, world_size=options.processes)
    show = print if rank == 0 else lambda *_: None
    show(f"torch {torch.__version__}, {options.device}, {options.processes} processes, {options.backend}")
    show(ROW.format("milliseconds, median", "plain", "synchronised", "ratio"))
    for shape in LAYERS:
        for layout in ("contiguous", "channels_last"):
            compare(f"layer {tuple(shape)} {layout}", build_layer_pair(shape, layout, options), options, show)
    for layout in ("contiguous", "channels_last"):
        name = f"step {options.encoder}_dilated8 + c1, {options.batch} x {options.size}^2, {layout}"
        compare(name, build_step_pair(layout, options), options, show)
    if options.processes > 1:
        measure_collectives(options, show)
    dist.destroy_process_group()


def synchronise_norms(module: nn.Module, options: argparse.Namespace) -> nn.Module:
    convert_batch_norms(module, options.convention)
    if options.processes == 1:  # where the layer would skip the reduction
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.forward = partial(layer.normalise_over, group=dist.group.WORLD)
    return module


def build_layer_pair(shape: tuple[int, ...], layout: str, options: argparse.Namespace) -> list[Callable[[], None]]:
    x, grad = (torch.randn(shape, device=options.device).to(memory_format=memory_format_of(layout)) for _ in range(2))
    x.requires_grad_()

    def step(layer: nn.Module) -> None:
        x.grad = None
        layer(x).backward(grad)

    layers = [nn.BatchNorm2d(shape[1]).to(options.device) for _ in range(2)]
    return [partial(step, layers[0]), partial(step, synchronise_norms(layers[1], options))]


def build_step_pair(layout: str, options: argparse.Namespace) -> list[Callable[[], None]]:
    image = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    image = image.to(memory_format=memory_format_of(layout))
    label = torch.randint(150, (options.batch, options.size // 8, options.size // 8), device=options.device)

    def network(is_synced: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = build_segmenter(options.encoder, "c1", 150, {"output_stride": 8}).to(options.device)
        net = net.to(memory_format=memory_format_of(layout))
        net = DistributedDataParallel(synchronise_norms(net, options) if is_synced else net)
        return net, torch.optim.SGD(net.parameters(), lr=1e-4)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(image).main, label).backward()
        optimizer.step()

    return [partial(step, *network(is_synced)) for is_synced in (False, True)]


def memory_format_of(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def compare(name: str, pair: list[Callable[[], None]], options: argparse.Namespace, show: Callable[..., None]) -> None:
    times: list[list[float]] = [[], []]
    for _ in range(options.rounds + 2):
        for index, action in enumerate(pair):
            times[index].append(measure_seconds(action, options))
    plain, reduced = (1e3 * statistics.median(seconds[2:]) for seconds in times)
    show(ROW.format(name, f"{plain:.2f}", f"{reduced:.2f}", f"{reduced / plain:.2f}"))


def measure_seconds(action: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds of `action`, started by all ranks together."""
    dist.barrier()
    synchronise(options)
    start = time.perf_counter()
    action()
    synchronise(options)
    return time.perf_counter() - start


def synchronise(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def measure_collectives(options: argparse.Namespace, show: Callable[..., None]) -> None:
    """The lower bound for every synchronised layer: its two collectives alone, for 256 channels."""
    packed = torch.zeros(513, device=options.device)
    gathered = packed.new_empty(513 * options.processes)
    for name, action in [
        ("all_gather of 513 numbers", partial(dist.all_gather_into_tensor, gathered, packed)),
        ("all_reduce of 512 numbers", partial(dist.all_reduce, packed[:512])),
    ]:
        times = [measure_seconds(action, options) for _ in range(100)]
        show(ROW.format(name, "", f"{1e3 * statistics.median(times):.2f}", ""))


if __name__ == "__main__":
    main()
