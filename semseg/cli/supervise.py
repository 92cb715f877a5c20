"""Process supervisor: start one process per device, watch them, and end all of them together.

The supervisor never uses torch or data. It gives every rank the same run folder, so that there is one folder and one
saved configuration for any number of ranks, and it reports which rank failed and why. Under torchrun or SLURM, which
start ranks themselves, it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from semseg.config.schema import Config, TrainerConfig
from semseg.errors import STOPPED_CODES, TERMINATED, ConfigError, SemsegError
from semseg.system.process import (
    SUPERVISOR_VARIABLE,
    get_stop_code,
    is_supervised,
    is_sweep_gone,
    kill_with_children,
    list_stop_signals,
)
from semseg.system.processors import count_processors
from semseg.system.text import escape_lines

RANKS_FOLDER = "ranks"  # in the run folder: logs of ranks above 0, and error files of ranks that raised an exception
# Environment variable of every rank and every job of a sweep: the file in which it records an exception.
ERROR_FILE_VARIABLE = "SEMSEG_ERROR_FILE"
MESSAGE_MARK = "\nmessage:\n"  # in that file, between the traceback and the message
POLL_SECONDS = 0.05
GRACE_SECONDS = 3.0  # between SIGTERM and SIGKILL
STOP_SECONDS = 30.0  # for ranks that were asked to stop, which write a checkpoint first
# Environment variables that show that another launcher starts the ranks.
LAUNCHER_VARIABLES = ("LOCAL_RANK", "SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
# Variables that a run with its own ranks must not inherit: these, and those that make Lightning treat it as a rank.
CLEARED_VARIABLES = (*LAUNCHER_VARIABLES, "RANK", "WORLD_SIZE", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID")
# Other launchers: name, the variable that shows it, variables for the number of processes, and variables for the
# processes of a node (torchrun) or the number of nodes.
LAUNCHERS = (
    ("torchrun", "LOCAL_RANK", ("WORLD_SIZE",), ("LOCAL_WORLD_SIZE",)),
    ("srun", "SLURM_PROCID", ("SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_NNODES", "SLURM_JOB_NUM_NODES")),
    ("mpirun", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), ()),
    ("mpirun", "PMI_RANK", ("PMI_SIZE",), ()),
)
PARALLEL_MODES = ("train", "eval", "bench")


class RankFailure(NamedTuple):
    """Why a rank failed."""

    rank: int
    reason: str
    log: str
    exit_code: int


def count_processes(config: Config) -> int:
    """Processes to start on this machine; 1 if none needs supervision."""
    trainer = config.trainer
    is_external = any(name in os.environ for name in LAUNCHER_VARIABLES)
    if is_external or config.mode not in PARALLEL_MODES:
        return 1
    return count_devices(trainer)


def count_devices(trainer: TrainerConfig) -> int:
    """Devices per machine."""
    devices = trainer.devices
    if isinstance(devices, list):
        return len(devices)
    return max(1, _count_gpus(trainer.accelerator)) if devices in ("auto", -1) else int(devices)


def check_world_size(config: Config) -> None:
    """Refuse a configuration that does not match the number of processes started by torchrun, srun or mpirun.

    Otherwise each process would be a separate run in the same folder, or would wait for ranks that do not exist. Only
    these launchers start processes on several machines.

    Raises:
        ConfigError: with the keys to set.
    """
    found, trainer = _find_launcher(), config.trainer
    if found is None:
        is_rank = is_supervised() and "LOCAL_RANK" in os.environ
        if trainer.num_nodes > 1 and config.mode in (*PARALLEL_MODES, "crossval") and not is_rank:
            raise ConfigError(
                f"trainer.num_nodes={trainer.num_nodes}: start the processes of all machines with torchrun or srun, as "
                "in docs/distributed.md."
            )
        return
    launcher, world_size, nodes = found
    if config.mode not in PARALLEL_MODES:
        return refuse_launcher(f"mode={config.mode}")
    num_ranks = count_devices(trainer) * trainer.num_nodes
    if num_ranks != world_size:
        raise ConfigError(
            f"{launcher} has started {world_size} processes, but trainer.devices={_format_devices(trainer.devices)} on "
            f"trainer.num_nodes={trainer.num_nodes} needs {num_ranks}. "
            f"Set trainer.devices={world_size // nodes} trainer.num_nodes={nodes}, or start {num_ranks} processes."
        )


def refuse_launcher(task: str) -> None:
    """Refuse torchrun for a task of one process. (srun's variables also exist in the script of a job.)

    Raises:
        ConfigError: if there are several.
    """
    found = _find_launcher()
    if found is not None and found[0] == "torchrun" and found[1] > 1:
        raise ConfigError(f"{task} needs one process, but torchrun has started {found[1]}. Start it without torchrun.")


def _find_launcher() -> tuple[str, int, int] | None:
    """The launcher that started the ranks, the number of ranks and of nodes; None if there is no other launcher."""
    if is_supervised():
        return None
    for launcher, variable, size_names, node_names in LAUNCHERS:
        size = next((os.environ[name] for name in size_names if os.environ.get(name, "").isdecimal()), None)
        if variable not in os.environ or size is None:
            continue
        if launcher == "srun" and os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            continue  # a shell inside an allocation, which Lightning does not treat as a launcher either
        world_size = int(size)
        nodes = next((os.environ[name] for name in node_names if os.environ.get(name, "").isdecimal()), "1")
        num_nodes = world_size // int(nodes) if launcher == "torchrun" else int(nodes)
        return launcher, world_size, num_nodes if num_nodes and world_size % num_nodes == 0 else 1
    return None


def _format_devices(devices: object) -> str:
    return str(devices).replace(" ", "")


def _count_gpus(accelerator: str) -> int:
    if accelerator == "cpu":
        return 1
    import torch  # noqa: PLC0415 - only if devices must be counted

    return torch.cuda.device_count()


def supervise_ranks(command: Sequence[str], processes: int, run_dir: Path) -> int:
    """Run `command` once per rank and return the exit code of the run.

    The run ends when all ranks have ended, or at most about ten seconds after the first one failed; then the last lines
    printed say which rank failed, why, and where its log is. No process survives.
    """
    folder = run_dir / RANKS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    port = _find_free_port()
    received: list[int] = []
    with _collect_stop_signals(received.append):
        ranks = [_start_rank(command, rank, processes, folder, port) for rank in range(processes)]
        failure = _watch_ranks(ranks, folder, received)
        if failure is None and received:
            _forward_signals(ranks, received)
        if failure is not None and any(rank.returncode in STOPPED_CODES for rank in ranks):
            _wait_for_exit(ranks, STOP_SECONDS)  # all ranks stop at the same step, although one received the signal
        _terminate_all(ranks)
    stopped = [rank.returncode for rank in ranks if rank.returncode in STOPPED_CODES]
    if stopped and len(stopped) == len(ranks):
        return stopped[0]
    if failure is not None:
        message = f"rank {failure.rank} of {processes} failed: {failure.reason}"
        record_error(SemsegError(message), failure.exit_code)  # if this is a job of a sweep
        sys.stdout.flush()
        print(f"\nerror: {escape_lines(message)}\nits log: {failure.log}", file=sys.stderr, flush=True)
        return failure.exit_code
    return get_stop_code(received[0]) if received else 0


class ProcessEnd(NamedTuple):
    """How a process ended."""

    exit_code: int  # negative: killed by that signal
    signal: int | None  # a signal that this process received meanwhile and forwarded


def run_isolated(command: Sequence[str], error_file: Path) -> ProcessEnd:
    """Run `command` as a separate run, with its own ranks, and wait until it ends. No process survives.

    Args:
        error_file: the file in which it records an exception. It does not exist afterwards if there was none.
    """
    error_file.unlink(missing_ok=True)
    error_file.parent.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in CLEARED_VARIABLES}
    environment |= {SUPERVISOR_VARIABLE: str(os.getpid()), ERROR_FILE_VARIABLE: str(error_file)}
    received: list[int] = []
    is_gone = False
    with _collect_stop_signals(received.append):
        process = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603 - our own entry point
        while process.poll() is None and not received and not (is_gone := is_sweep_gone()):
            time.sleep(POLL_SECONDS)
        if received:
            _forward_signals([process], received)
        _terminate_all([process])
    if is_gone:
        os._exit(TERMINATED)  # otherwise the launcher's process would start the next job
    return ProcessEnd(process.returncode, received[0] if received else None)


def _start_rank(command: Sequence[str], rank: int, processes: int, folder: Path, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
        SUPERVISOR_VARIABLE: str(os.getpid()),
        ERROR_FILE_VARIABLE: str(_error_path(folder, rank)),
    }
    # Divide the cores between the ranks, as Lightning's own launcher does.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, count_processors() // processes)))
    with contextlib.ExitStack() as stack:
        output = None if rank == 0 else stack.enter_context(_log_path(folder, rank).open("wb"))
        return subprocess.Popen(  # noqa: S603 - our own interpreter and entry point
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )


def _watch_ranks(ranks: list[subprocess.Popen[bytes]], folder: Path, received: list[int]) -> RankFailure | None:
    """Wait until all ranks have succeeded (None), one has failed, or a signal has arrived (None)."""
    deadline = None
    while not received:
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return None
        has_error = any(_error_path(folder, rank).exists() for rank in range(len(ranks)))
        if any(codes):
            time.sleep(POLL_SECONDS)  # an error file may be in the middle of being written
            return _find_first_failure([rank.poll() for rank in ranks], folder)
        if has_error:
            # A rank that raised an exception may hang while it ends.
            deadline = deadline or time.monotonic() + GRACE_SECONDS
            if time.monotonic() > deadline:
                return _find_first_failure(codes, folder)
        time.sleep(POLL_SECONDS)
    return None


def _find_first_failure(codes: list[int | None], folder: Path) -> RankFailure:
    """The rank that caused the failure: one that ended without an error file, or the first to write one."""
    silent = [rank for rank, code in enumerate(codes) if code and not _error_path(folder, rank).exists()]
    if silent:
        rank = silent[0]
        code = codes[rank] or 1
        if code < 0:
            name = signal.Signals(-code).name
            return RankFailure(rank, f"killed by signal {-code} ({name})", _locate_log(folder, rank), 128 - code)
        return RankFailure(rank, f"ended with exit code {code}", _locate_log(folder, rank), code)
    files = [_error_path(folder, rank) for rank in range(len(codes))]
    first = min((path for path in files if path.exists()), key=lambda path: path.stat().st_mtime_ns)
    rank = files.index(first)
    exit_code, _, text = first.read_text(encoding="utf-8").partition("\n")
    return RankFailure(rank, extract_error_message(text), _locate_log(folder, rank), int(exit_code))


def _forward_signals(ranks: list[subprocess.Popen[bytes]], received: list[int]) -> None:
    """Send the signals that this process received to the ranks, and wait; a second Ctrl-C shortens the wait."""
    deadline, num_sent = time.monotonic() + STOP_SECONDS, 0
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        for number in received[num_sent:]:
            for rank in ranks:
                rank.send_signal(number)
            num_sent += 1
            if num_sent > 1 and number == signal.SIGINT:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(POLL_SECONDS)


def _wait_for_exit(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _terminate_all(ranks: list[subprocess.Popen[bytes]]) -> None:
    """End every rank that is still running, and all processes that it has started."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    _wait_for_exit(ranks, GRACE_SECONDS)
    for rank in ranks:
        kill_with_children(rank)  # its data-loading workers too
        rank.wait()


@contextlib.contextmanager
def _collect_stop_signals(record: Callable[[int], None]):
    """Pass signals that request a stop to `record` instead of ending this process."""

    def handle(number: int, frame: FrameType | None) -> None:
        record(number)

    previous = {number: signal.signal(number, handle) for number in list_stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _error_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.error"


def _locate_log(folder: Path, rank: int) -> str:
    paths = [path for path in (_error_path(folder, rank), _log_path(folder, rank)) if path.exists()]
    return ", ".join(map(str, paths)) or "above (rank 0 writes to this terminal)"


# ---- in a rank


def get_external_rank() -> int | None:
    """The rank of this process if torchrun or SLURM started it; else None."""
    if is_supervised():
        return None
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    return int(number) if number is not None else None


def agree_on_run_dir(own_dir: str, rank: int) -> str:
    """The run folder of a run whose ranks torchrun or SLURM started: the same one on every rank.

    Each rank composes its own configuration, and the time in the folder's name differs. Under torchrun, rank 0 sends
    its folder to the others through torchrun's store; under SLURM the job's number replaces the time, so that a
    requeued job finds its folder again.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        job = os.environ.get("SLURM_JOB_ID")
        return str(Path(own_dir).with_name(f"slurm_{job}")) if job else own_dir
    import torch.distributed as dist  # noqa: PLC0415 - only these ranks need torch this early

    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    key = f"semseg/run_dir/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank == 0:
        store.set(key, own_dir)
    return store.get(key).decode()


def record_error(error: BaseException, exit_code: int) -> None:
    """In a rank or a job of a sweep: record an exception at once, because the process may hang while it ends.

    The exception itself is printed later, so nothing is lost where the record cannot be written.
    """
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path is None:
        return
    text = "".join(traceback.format_exception(error))
    message = "".join(traceback.format_exception_only(error))  # may have several lines
    content = f"{exit_code}\n{text}{MESSAGE_MARK}{message}".encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        Path(f"{path}.new").write_bytes(content)
        Path(f"{path}.new").replace(path)


def has_other_rank_failed() -> bool:
    """In a rank of ours: whether another rank has already recorded an error, of which this one only saw the effect."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path is None or Path(path).parent.name != RANKS_FOLDER:
        return False
    return any(other != Path(path) for other in Path(path).parent.glob("rank*.error"))


def extract_error_message(text: str) -> str:
    """The message in an error file; its last line if the message is not marked."""
    _, is_marked, message = text.rpartition(MESSAGE_MARK)
    message = message.strip() if is_marked else text.strip().splitlines()[-1]
    return re.sub(r"^semseg\.[\w.]+: ", "", message)  # the names of our errors do not help users
