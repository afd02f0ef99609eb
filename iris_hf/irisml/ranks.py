"""A job in the several processes of a launcher.

The main process runs the job, with irisml's engine as it is. The others wait. When a task that uses all processes is
due (training, prediction), the main process sends its arguments to the others, and all call its function. So whatever
else a task does, it does once; every rank trains the same model on the same data; and a cache hit, an early end or an
error handler need no agreement.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from iris_hf.engine.accelerator import launched_world_size, open_accelerator
from iris_hf.errors import ConfigError
from iris_hf.tasks import Task, find_task
from iris_hf.training.termination import Preempted

_LONGEST_WAIT = timedelta(days=30)
"""How long a process waits for its next call: the tasks in between may take their time."""

_FAILURE_WAIT = timedelta(seconds=30)
"""How long a process whose call failed waits for the others to fail, too. If they don't, the launcher ends them."""


def run_on_main(job: Callable[[], None]) -> None:
    """Run a job: on the main process of a launcher, or here where there is none.

    Raises:
        Exception: The error of the job, on every rank.
    """
    if (launched_world_size() or 1) == 1:
        job()
        return
    with _open_crew() as crew:
        if crew.rank == 0:
            crew.lead(job)
        else:
            crew.follow()


def call_on_all_ranks(task: Task, arguments: Mapping[str, Any]) -> Any:
    """Call a task's function; within :func:`run_on_main`, on every process.

    Raises:
        ConfigError: In a process that a task of the main process has started, which the others don't hear.
    """
    if not _LEADING:
        return task.function(**arguments)
    if _LEADING[-1].pid != os.getpid():
        raise ConfigError(
            f"The task {task.name!r} uses all processes of the launcher, and cannot in one that another task has "
            "started, as run_parallel does. Take run_sequential, or run the job without a launcher."
        )
    return _LEADING[-1].call_everywhere(task, arguments)


@dataclass
class _Crew:
    """The processes of a launcher during a job.

    Attributes:
        rank: This one's; 0 is the main process.
        group: All of them, for talking on the CPU beside the groups of the tasks.
        failed: The same, for meeting after a failure.
        is_whole: Whether all still listen; not after an error on some of them only.
        pid: Of this process.
    """

    rank: int
    group: Any
    failed: Any
    is_whole: bool = True
    pid: int = field(default_factory=os.getpid)

    def lead(self, job: Callable[[], None]) -> None:
        """Run the job, then let the others go."""
        _LEADING.append(self)
        try:
            job()
        except Preempted:  # every rank leaves with it, and has left
            raise
        except BaseException as error:
            self._send(("failed", _portable(error)))
            raise
        finally:
            _LEADING.remove(self)
        self._send(("done",))

    def call_everywhere(self, task: Task, arguments: Mapping[str, Any]) -> Any:
        """Send a call to the others and make it here, too."""
        self._send(("call", task.name, dict(arguments)))
        return self._call(task, arguments)

    def follow(self) -> None:
        """Make the calls that the main process sends, until it is done.

        Raises:
            Exception: The error of the job on the main process, or of the call that failed here alone.
        """
        while True:
            match self._receive():
                case ("done",):
                    return
                case ("failed", error):
                    raise error
                case (_, name, arguments):
                    try:
                        self._call(find_task(name), arguments)
                    except Exception:
                        if not self.is_whole:
                            raise

    def _call(self, task: Task, arguments: Mapping[str, Any]) -> Any:
        try:
            return task.function(**arguments)
        except Exception:
            self._meet_after_failure()
            raise

    def _meet_after_failure(self) -> None:
        """Find out whether the call failed on every rank, as most mistakes make it."""
        from torch.distributed import barrier

        try:
            barrier(self.failed)
        except RuntimeError:
            self.is_whole = False

    def _send(self, message: tuple[Any, ...]) -> None:
        import cloudpickle

        if self.is_whole:
            self._broadcast(cloudpickle.dumps(message))

    def _receive(self) -> Any:
        import cloudpickle

        return cloudpickle.loads(self._broadcast(None))

    def _broadcast(self, message: bytes | None) -> bytes:
        from torch.distributed import broadcast_object_list

        box = [message]
        broadcast_object_list(box, src=0, group=self.group)
        assert box[0] is not None
        return box[0]


_LEADING: list[_Crew] = []


@contextmanager
def _open_crew() -> Iterator[_Crew]:
    import torch.distributed as dist

    with open_accelerator():
        pass  # it has set the process group up as Accelerate wants it, for the whole process
    group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    failed = dist.new_group(backend="gloo", timeout=_FAILURE_WAIT)
    crew = _Crew(dist.get_rank(), group, failed)
    yield crew
    if crew.is_whole:  # Accelerate's own group stays, for what the script does next
        dist.destroy_process_group(group)
        dist.destroy_process_group(failed)


def _portable(error: BaseException) -> BaseException:
    """Return an error that can be sent, with its notes."""
    import cloudpickle

    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:
        portable = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            portable.add_note(note)
        return portable
    return error
