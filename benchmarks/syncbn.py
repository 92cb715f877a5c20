"""What synchronised batch normalisation costs against plain nn.BatchNorm2d, side by side in the same run.

    python benchmarks/syncbn.py                          # 2 processes on the CPU, gloo
    python benchmarks/syncbn.py --device cuda            # one process on a GPU, the reduction forced on
    python benchmarks/syncbn.py --device cuda --processes 2 --backend gloo   # two processes on one GPU

Plain and synced rounds alternate, so that what else the machine does falls on both; numbers are medians of rank 0
in milliseconds. Plain layers keep the ranks' statistics apart; both networks run under DDP.
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
from semseg.syncbn.layer import convert

LAYERS = [(2, 64, 128, 128), (2, 256, 64, 64), (2, 512, 32, 32)]
ROW = "{:<44}{:>10}{:>10}{:>8}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, help="default: 2 on the CPU, 1 on CUDA")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="default: gloo on the CPU, nccl on CUDA")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each side")
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
    say = print if rank == 0 else lambda *_: None
    say(f"torch {torch.__version__}, {options.device}, {options.processes} processes, {options.backend}")
    say(ROW.format("milliseconds, median", "plain", "synced", "ratio"))
    for shape in LAYERS:
        for layout in ("contiguous", "channels_last"):
            compare(f"layer {tuple(shape)} {layout}", layer_pair(shape, layout, options), options, say)
    for layout in ("contiguous", "channels_last"):
        name = f"step {options.encoder}_dilated8 + c1, {options.batch} x {options.size}^2, {layout}"
        compare(name, step_pair(layout, options), options, say)
    if options.processes > 1:
        collectives(options, say)
    dist.destroy_process_group()


def synced(module: nn.Module, options: argparse.Namespace) -> nn.Module:
    convert(module, options.convention)
    if options.processes == 1:  # where the layer would leave the reduction out
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.forward = partial(layer.reduced, group=dist.group.WORLD)
    return module


def layer_pair(shape: tuple[int, ...], layout: str, options: argparse.Namespace) -> list[Callable[[], None]]:
    x, grad = (torch.randn(shape, device=options.device).to(memory_format=formats(layout)) for _ in range(2))
    x.requires_grad_()

    def step(layer: nn.Module) -> None:
        x.grad = None
        layer(x).backward(grad)

    layers = [nn.BatchNorm2d(shape[1]).to(options.device) for _ in range(2)]
    return [partial(step, layers[0]), partial(step, synced(layers[1], options))]


def step_pair(layout: str, options: argparse.Namespace) -> list[Callable[[], None]]:
    image = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    image = image.to(memory_format=formats(layout))
    label = torch.randint(150, (options.batch, options.size // 8, options.size // 8), device=options.device)

    def network(is_synced: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = build_segmenter(options.encoder, "c1", 150, {"output_stride": 8}).to(options.device)
        net = net.to(memory_format=formats(layout))
        net = DistributedDataParallel(synced(net, options) if is_synced else net)
        return net, torch.optim.SGD(net.parameters(), lr=1e-4)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(image).main, label).backward()
        optimizer.step()

    return [partial(step, *network(is_synced)) for is_synced in (False, True)]


def formats(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


def compare(name: str, pair: list[Callable[[], None]], options: argparse.Namespace, say: Callable[..., None]) -> None:
    times: list[list[float]] = [[], []]
    for _ in range(options.rounds + 2):
        for side, action in enumerate(pair):
            times[side].append(timed(action, options))
    plain, reduced = (1e3 * statistics.median(side[2:]) for side in times)
    say(ROW.format(name, f"{plain:.2f}", f"{reduced:.2f}", f"{reduced / plain:.2f}"))


def timed(action: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds of `action`, begun by all ranks together."""
    dist.barrier()
    synchronise(options)
    start = time.perf_counter()
    action()
    synchronise(options)
    return time.perf_counter() - start


def synchronise(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def collectives(options: argparse.Namespace, say: Callable[..., None]) -> None:
    """The floor under every synced layer: its two collectives alone, 256 channels."""
    packed = torch.zeros(513, device=options.device)
    gathered = packed.new_empty(513 * options.processes)
    for name, action in [
        ("all_gather of 513 numbers", partial(dist.all_gather_into_tensor, gathered, packed)),
        ("all_reduce of 512 numbers", partial(dist.all_reduce, packed[:512])),
    ]:
        times = [timed(action, options) for _ in range(100)]
        say(ROW.format(name, "", f"{1e3 * statistics.median(times):.2f}", ""))


if __name__ == "__main__":
    main()
