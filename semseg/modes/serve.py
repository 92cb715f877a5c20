"""mode=serve: a web page and a JSON endpoint for one network, on this machine."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from semseg.build import accelerator, open_network, restore_net
from semseg.config import Config
from semseg.data.classes import LabelMap
from semseg.data.geometry import Size, stretched_size
from semseg.data.images import resize_image
from semseg.draw import Pixels
from semseg.errors import ConfigError
from semseg.inference import predict
from semseg.nets.segmenter import Segmenter

EXTRA = ("fastapi", "uvicorn", "python_multipart")  # modules of semseg[demo]
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]


def run(config: Config, overrides: list[str]) -> None:
    """Serve the network `ckpt` at serve.host and serve.port until Ctrl-C.

    Raises:
        SemsegError: for anything the user can mend.
    """
    require_extra()
    from semseg.server import Served, address_of, build_app, is_loopback, listen, run_server  # noqa: PLC0415

    with listen(config.serve) as door:  # before the network is read, which takes longer
        saved, config = open_network(config, overrides)
        device = torch.device("cuda" if accelerator(config) == "gpu" else "cpu")
        net = restore_net(saved).to(device)
        label_map = LabelMap(saved.classes.num_classes, config.data.first_id, config.data.ignore)
        served = Served(saved.config.model.name, saved.classes, label_map, partial(predict_ids, net, config))
        hosts = [*LOOPBACK_NAMES, config.serve.host] if is_loopback(door) else ["*"]
        app = build_app(served, config.serve, hosts)
        if not is_loopback(door):
            print(f"serve.host={config.serve.host}: whoever reaches this machine can use the page, without a password.")
        print(f"serving {saved.source} at {address_of(door)} (Ctrl-C to stop)", flush=True)
        try:
            run_server(app, door)
        except KeyboardInterrupt:
            print("stopped.")


def require_extra() -> None:
    """Leave early, before a network is read, where the packages of the extra are not installed.

    Raises:
        ConfigError: then.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(f"mode=serve needs {', '.join(missing)}: pip install 'semseg[demo]'")


def predict_ids(net: Segmenter, config: Config, image: Pixels) -> NDArray[np.integer]:
    """(H, W) class indices of an image, as mode=predict gives them."""
    size = Size(*image.shape[:2])
    divisor, antialias = config.model.size_divisor or net.size_divisor, net.convention.antialias
    scales = []
    for edge in config.predict.scales or config.eval.scales:
        scaled = stretched_size(size, edge, config.data.max_long_edge, divisor)
        pixels = resize_image(image, scaled, antialias=antialias)
        scales.append(torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))))
    found = predict(net, scales, (size.height, size.width), net.convention, flip=config.predict.flip)
    return found.ids.cpu().numpy()
