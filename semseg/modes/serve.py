"""mode=serve: a web page and a JSON endpoint for one network, on this machine."""

from __future__ import annotations

import signal
from functools import partial
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from semseg.build import open_predictor
from semseg.config.schema import Config
from semseg.errors import ConfigError
from semseg.prediction.predictor import Predictor
from semseg.reports.draw import Pixels

EXTRA = ("fastapi", "uvicorn", "python_multipart")  # modules of semseg[demo]
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]


def run(config: Config, overrides: list[str]) -> None:
    """Serve the network `ckpt` at serve.host and serve.port until Ctrl-C.

    Raises:
        SemsegError: for anything the user can mend.
    """
    require_extra()
    from semseg.serving.server import Served, address_of, build_app, is_loopback, listen, run_server  # noqa: PLC0415

    with listen(config.serve) as door:  # before the network is read, which takes longer
        predictor = open_predictor(config, overrides)
        served = Served(predictor.name, predictor.classes, predictor.label_map, partial(predict_ids, predictor))
        hosts = [*LOOPBACK_NAMES, config.serve.host] if is_loopback(door) else ["*"]
        app = build_app(served, config.serve, hosts)
        if not is_loopback(door):
            print(f"serve.host={config.serve.host}: whoever reaches this machine can use the page, without a password.")
        print(f"serving {predictor.source} at {address_of(door)} (Ctrl-C to stop)", flush=True)
        # The server ends in good order on Ctrl-C and then passes it on.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run_server(app, door)
        except KeyboardInterrupt:
            print("stopped.")
        finally:
            signal.signal(signal.SIGINT, before)


def require_extra() -> None:
    """Leave early, before a network is read, where the packages of the extra are not installed.

    Raises:
        ConfigError: then.
    """
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(f"mode=serve needs {', '.join(missing)}: pip install 'semseg[demo]'")


def predict_ids(predictor: Predictor, image: Pixels) -> NDArray[np.int16]:
    """(H, W) class indices of an image, as mode=predict gives them."""
    return predictor.predict(image).ids
