"""Local worker processes for `num_processes > 1` outside a launcher.

The workers are torchrun's: its elastic agent starts them, watches them, and ends all of them when one
fails. What they run travels by cloudpickle (:mod:`iris_hf.engine.parcels`), in a folder that only this user can
read, so that functions and classes of a script or notebook work too.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iris_hf.engine.accelerator import Device, available_cores

if TYPE_CHECKING:
    from iris_hf.engine.parcels import Known

_CALL, _RESULT, _ERROR = "call.pickle", "result.pickle", "error-{rank}.pickle"
_PR_SET_PDEATHSIG = 1
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")


def run_in_workers(
    function: Callable[..., Any], *args: Any, num_processes: int, device: Device | None, **kwargs: Any
) -> Any:
    """Call `function(*args, **kwargs)` in worker processes and return what the first one returned.

    Args:
        function: Called once per worker, with the environment of a launcher (RANK, WORLD_SIZE, ...).
        args: Positional arguments; everything must be picklable by cloudpickle.
        num_processes: How many workers to start.
        device: Where the workers run; decides whether they talk over gloo.
        kwargs: Keyword arguments.

    Raises:
        Exception: The error of the worker that failed first, with its traceback as a note.
        SystemExit: If a worker left by one, as after SIGTERM, which is passed on to the workers; also with code 0, if
            the first worker gave no result.
        RuntimeError: If a worker died without an error (killed, out of memory), or ended before it gave a result.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    try:
        with tempfile.TemporaryDirectory(prefix="iris_hf-workers-") as folder:
            return _run(Path(folder), (function, args, kwargs), num_processes, device)
    except SignalException as ended:
        signal.raise_signal(ended.sigval)  # as if no launcher had caught it: SIGTERM kills, SIGINT is KeyboardInterrupt
        raise


def _run(folder: Path, call: tuple[Any, ...], num_processes: int, device: Device | None) -> Any:
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from iris_hf.engine.parcels import receive_back, send_call

    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    with open(folder / _CALL, "wb") as file:
        pickle.dump({"sys_path": sys.path, "on_cpu": on_cpu}, file)
        known = send_call(call, file)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads or str(max(1, available_cores() // num_processes))
    try:
        with _keeping_signal_handlers():
            elastic_launch(config, sys.executable)("-m", __name__, str(folder))
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        silent = f"Worker {rank} of the local run died with exit code {first.exitcode}, without an error."
        raise _first_error(folder, known) or RuntimeError(silent) from None
    except SignalException:
        error = _first_error(folder, known)
        if isinstance(error, SystemExit):  # the workers had time to leave in order
            raise error from None
        raise
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
    if not (folder / _RESULT).exists():
        raise _first_error(folder, known) or RuntimeError(
            "The first worker of the local run ended before it gave a result."
        )
    with open(folder / _RESULT, "rb") as file:
        return receive_back(file, known)


@contextmanager
def _keeping_signal_handlers() -> Iterator[None]:
    """Give signals back to the caller's handlers; torch's agent leaves its own."""
    kept = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        kept = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:  # not set from Python
                signal.signal(number, handler)


def _first_error(folder: Path, known: Known) -> BaseException | None:
    from iris_hf.engine.parcels import receive_back

    errors = sorted(folder.glob(_ERROR.format(rank="*")), key=lambda path: path.stat().st_mtime_ns)
    if not errors:
        return None
    with open(errors[0], "rb") as file:
        error: BaseException = receive_back(file, known)
    return error


def _work(folder: Path) -> None:
    """Run one worker: read the call, make it, write the first worker's result or one's own error."""
    import torch

    from iris_hf.engine.parcels import receive_call, send_back

    rank = os.environ["RANK"]
    known: Known = {}
    _end_with_parent()
    try:
        with open(folder / _CALL, "rb") as file:
            setting = pickle.load(file)
            sys.path[:] = setting["sys_path"]
            if setting["on_cpu"]:
                os.environ["ACCELERATE_USE_CPU"] = "true"
            (function, args, kwargs), known = receive_call(file)
        result = function(*args, **kwargs)
        if rank == "0":
            with open(folder / _RESULT, "wb") as file:
                send_back(result, file, known)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (Exception, SystemExit) as error:
        error.add_note(f"In worker {rank} of the local run:\n{traceback.format_exc()}")
        partial = folder / f"{rank}.partial"
        with open(partial, "wb") as file:
            send_back(error, file, known)
        partial.rename(folder / _ERROR.format(rank=rank))
        sys.exit(error.code if isinstance(error, SystemExit) else 1)


def _end_with_parent() -> None:
    """Have Linux kill this process when the one that started it is gone, which SIGKILL gives no time to do it."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the result is written; threads of libraries sometimes abort a process that is torn down in full
