"""Files as the 2018 and 2020 releases have them, with small or random weights, and a server for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor, nn

from semseg.nets.registry import build_decoder, build_encoder


def with_bookkeeping(state: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """`state` with the first `count` of the extra statistics that the published normalisation layers saved."""
    extra = {}
    for name, value in state.items():
        extra[name] = value
        if name.endswith("running_var"):
            layer = name.removesuffix("running_var")
            tmp = [
                (f"{layer}_tmp_running_mean", torch.zeros_like(value)),
                (f"{layer}_tmp_running_var", torch.ones_like(value)),
                (f"{layer}_running_iter", torch.ones(1)),
            ]
            extra |= dict(tmp[:count])
    return extra


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` as PyTorch before 0.4.1 saved it."""
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def write_files(
    folder: Path,
    encoder: str,
    decoder: str,
    num_classes: int = 150,
    *,
    epoch: int = 20,
    bookkeeping: int = 2,
    counters: bool = False,
) -> tuple[nn.Module, nn.Module]:
    """Write encoder_epoch_N.pth and decoder_epoch_N.pth of a random network below `folder`; returns its parts."""
    torch.manual_seed(epoch)
    parts = [build_encoder(encoder)]
    parts.append(build_decoder(decoder, parts[0].channels, num_classes))  # pyright: ignore[reportArgumentType]
    folder.mkdir(parents=True, exist_ok=True)
    for kind, part in zip(("encoder", "decoder"), parts, strict=True):
        state = part.state_dict() if counters else without_counters(part.state_dict())
        torch.save(with_bookkeeping(state, bookkeeping), folder / f"{kind}_epoch_{epoch}.pth")
    return parts[0], parts[1]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The root URL of a server for `folder`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
