"""What a run changes in its process and must leave as it was: the next run and the caller's program come after it."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from semseg.cli.foreign_messages import QUIET_LOGGERS, hide_foreign_messages
from semseg.system.process import STOP_SIGNALS


@contextmanager
def keep_process_state(words: Sequence[str]) -> Iterator[None]:
    """Within this context, `words` are the command line; afterwards the process is as before.

    That covers the environment, random states (Python, NumPy, torch), the settings of torch, signal handlers, levels of
    loggers, and filters of warnings. It does not cover rules of torch.compile (see `compile_network`) and the threads
    of OpenCV, which end when images are first read.
    """
    with ExitStack() as stack:
        stack.enter_context(keep_interpreter_state(words))
        stack.enter_context(keep_torch_state())
        hide_foreign_messages()
        yield


@contextmanager
def keep_interpreter_state(words: Sequence[str]) -> Iterator[None]:
    """Keep what is not torch's."""
    environment, arguments = dict(os.environ), sys.argv
    python_state, numpy_state = random.getstate(), np.random.get_state()
    levels = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS} if is_main else {}
    sys.argv = [arguments[0] if arguments else "", *words]
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.argv = arguments
        os.environ.clear()
        os.environ.update(environment)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for number, handler in handlers.items():
            if handler is not None:  # one that Python did not install
                signal.signal(number, handler)


@contextmanager
def keep_torch_state() -> Iterator[None]:
    """Keep the random states and the settings of torch that a trainer changes."""
    import torch  # noqa: PLC0415 - after the configuration is checked

    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    precision, has_gradients = torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    try:
        # Not of GPUs that this process does not use: asking for the state of one initialises it.
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.set_float32_matmul_precision(precision)
        torch.set_grad_enabled(has_gradients)
