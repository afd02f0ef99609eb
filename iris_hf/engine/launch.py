"""Local worker processes for `num_processes > 1` outside a launcher.

The workers are torchrun's: its elastic agent starts them, watches them, and ends all of them when one
fails. What they run travels by cloudpickle, in a folder that only this user can read, so that functions and
classes of a script or notebook work too.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iris_hf.engine.accelerator import Device, available_cores

_CALL, _RESULT, _ERROR = "call.pickle", "result.pickle", "error-{rank}.pickle"


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
        RuntimeError: If a worker died without an error (killed, out of memory).
    """
    import cloudpickle
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    on_cpu = device == "cpu" or not torch.accelerator.is_available()
    with tempfile.TemporaryDirectory(prefix="iris_hf-workers-") as folder:
        with open(Path(folder, _CALL), "wb") as file:
            cloudpickle.dump({"sys_path": sys.path, "on_cpu": on_cpu}, file)
            cloudpickle.dump((function, args, kwargs), file)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=Path(folder).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        )
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = threads or str(max(1, available_cores() // num_processes))
        try:
            elastic_launch(config, sys.executable)("-m", __name__, folder)
        except ChildFailedError as failure:
            raise _first_error(Path(folder), failure) from None
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
        with open(Path(folder, _RESULT), "rb") as file:
            return cloudpickle.load(file)


def _first_error(folder: Path, failure: Any) -> BaseException:
    import cloudpickle

    rank, first = failure.get_first_failure()
    errors = sorted(folder.glob(_ERROR.format(rank="*")), key=lambda path: path.stat().st_mtime_ns)
    if not errors:
        return RuntimeError(f"Worker {rank} of the local run died with exit code {first.exitcode}, without an error.")
    with open(errors[0], "rb") as file:
        error: BaseException = cloudpickle.load(file)
    return error


def _work(folder: Path) -> None:
    """Run one worker: read the call, make it, write the first worker's result or one's own error."""
    import cloudpickle
    import torch

    rank = os.environ["RANK"]
    try:
        with open(folder / _CALL, "rb") as file:
            setting = cloudpickle.load(file)
            sys.path[:] = setting["sys_path"]
            if setting["on_cpu"]:
                os.environ["ACCELERATE_USE_CPU"] = "true"
            function, args, kwargs = cloudpickle.load(file)
        result = function(*args, **kwargs)
        if rank == "0":
            with open(folder / _RESULT, "wb") as file:
                cloudpickle.dump(result, file)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except Exception as error:
        error.add_note(f"In worker {rank} of the local run:\n{traceback.format_exc()}")
        partial = folder / f"{rank}.partial"
        with open(partial, "wb") as file:
            cloudpickle.dump(error, file)
        partial.rename(folder / _ERROR.format(rank=rank))
        sys.exit(1)


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the result is written; threads of libraries sometimes abort a process that is torn down in full
