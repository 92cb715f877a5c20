"""mode=serve: a web page and a JSON endpoint for one network, on this machine."""

from __future__ import annotations

import signal
from functools import partial
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from semseg.build import open_predictor
from semseg.config.schema import Config
from semseg.errors import ConfigError, install_command
from semseg.prediction.predictor import Predictor

DEMO_MODULES = ("fastapi", "uvicorn", "python_multipart")  # modules of semseg[demo]
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]


def run(config: Config, overrides: list[str]) -> None:
    """Serve the network `ckpt` at serve.host and serve.port until Ctrl-C.

    Raises:
        SemsegError: for any error that the user can fix.
    """
    require_demo_extra()
    from semseg.serving.server import ServedNetwork, build_app, is_loopback, listen, run_server, socket_url  # noqa: PLC0415

    with listen(
        config.serve.host, config.serve.port
    ) as listener:  # fails before the network is loaded, which takes longer
        predictor = open_predictor(config, overrides)
        served = ServedNetwork(
            predictor.name,
            predictor.classes,
            predictor.label_map,
            partial(predict_ids, predictor),
            None if predictor.bands is None else predictor.bands.as_one_file(),
            predictor.draw,
        )
        hosts = [*LOOPBACK_NAMES, config.serve.host] if is_loopback(listener) else ["*"]
        app = build_app(served, config.serve, hosts)
        if not is_loopback(listener):
            host = config.serve.host
            print(f"serve.host={host}: anyone who can reach this machine can use the page, without a password.")
        print(f"serving {predictor.source} at {socket_url(listener)} (Ctrl-C to stop)", flush=True)
        # uvicorn shuts down on Ctrl-C and then raises the signal again.
        previous_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            run_server(app, listener)
        except KeyboardInterrupt:
            print("stopped.")
        finally:
            signal.signal(signal.SIGINT, previous_handler)


def require_demo_extra() -> None:
    """Check that the packages of the extra semseg[demo] are installed, before a network is loaded.

    Raises:
        ConfigError: if one is missing.
    """
    missing = [name for name in DEMO_MODULES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"mode=serve needs {', '.join(missing)}: {install_command('demo')}")


def predict_ids(predictor: Predictor, image: NDArray) -> NDArray[np.int16]:
    """Predict (H, W) class indices of an image, as mode=predict does."""
    return predictor.predict(image).ids
