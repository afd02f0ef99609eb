"""Signals to processes that are trained on from Python, and ranks that are killed from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import resume_run
from launching import environment

from iris_hf.engine.launch import run_in_workers
from iris_hf.training.checkpoint import open_checkpoint
from iris_hf.training.termination import PREEMPTED

pytestmark = pytest.mark.torch_only

ENDLESS: dict[str, Any] = {"random_seed": 0, "num_epochs": 100_000, "batch_size": 4, "num_dataloader_workers": 0}
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d")


class Run:
    """A training on two processes in a process group of its own, that has written a checkpoint."""

    def __init__(self, folder: Path, *launcher: str, **arguments: Any) -> None:
        self.checkpoints = folder / "checkpoints"
        arguments = {**ENDLESS, **arguments, "checkpoint_dir": str(self.checkpoints), "checkpoint_epochs": 5}
        self.log = folder / "log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, resume_run.__file__, str(folder / "out"), json.dumps(arguments)],
                env=environment(OMP_NUM_THREADS="1"),
                start_new_session=True,
                stderr=log,
            )
        while not list(self.checkpoints.glob("step-*")) and self.process.poll() is None:
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """The processes that the run's own process has started for its ranks."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "RANK" in child.environ()]

    def newest(self) -> Path:
        return sorted(self.checkpoints.glob("step-*"))[-1]

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.parametrize("goes_to", ["the caller", "the process group"])
def test_sigterm_to_a_caller_of_workers_writes_a_checkpoint_and_ends_it_with_the_same_code(
    goes_to: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, num_processes=2)
    try:
        before = run.newest()
        (os.kill if goes_to == "the caller" else os.killpg)(run.process.pid, signal.SIGTERM)
        code = run.process.wait(timeout=60)
        said = run.log.read_text()
        assert code == PREEMPTED, said
        assert "SIGTERM: the checkpoint of step" in said
        assert open_checkpoint(run.newest()).progress.step >= open_checkpoint(before).progress.step
    finally:
        run.close()


@pytest.mark.parametrize(
    ("leave", "error", "message"),
    [(sys.exit, SystemExit, "0"), (os._exit, RuntimeError, "ended before it gave a result")],
    ids=["sys.exit", "os._exit"],
)
def test_a_worker_that_ends_without_a_result_is_an_error(leave: Any, error: type[BaseException], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        run_in_workers(leave, 0, num_processes=1, device="cpu")
    if error is SystemExit:
        assert "In worker 0 of the local run" in raised.value.__notes__[0]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with the one that started it")
def test_workers_do_not_outlive_a_caller_that_is_killed() -> None:
    worker = (
        "import time; from iris_hf.engine.launch import _end_with_parent; _end_with_parent(); "
        "print('ready', flush=True); time.sleep(60)"
    )
    caller = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    with subprocess.Popen([sys.executable, "-c", caller], env=environment(), stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        workers = psutil.Process(run.pid).children()
        run.kill()
        assert len(psutil.wait_procs(workers, timeout=30)[0]) == 1


@pytest.mark.parametrize("launcher", ["torchrun", "the caller"])
def test_a_rank_that_is_killed_ends_the_others_with_an_error(launcher: str, tmp_path: Path) -> None:
    by_torchrun = launcher == "torchrun"
    run = Run(tmp_path, *TORCHRUN) if by_torchrun else Run(tmp_path, num_processes=2)
    try:
        workers = run.workers()
        assert len(workers) == 2, run.log.read_text()
        workers[1].kill()
        start = time.monotonic()
        code = run.process.wait(timeout=60)
        _, alive = psutil.wait_procs(workers, timeout=max(0.0, 60 - (time.monotonic() - start)))
        assert not alive
        assert code not in (0, PREEMPTED)
        said = run.log.read_text()
        assert ("exitcode  : -9" if by_torchrun else "RuntimeError") in said
        assert open_checkpoint(run.newest())
    finally:
        run.close()
