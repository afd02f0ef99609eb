"""What SIGTERM means to a run that keeps checkpoints."""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import Accelerator

PREEMPTED = 75
"""Exit code of a run that SIGTERM ended after its checkpoint was written: EX_TEMPFAIL, run it again."""


class Preempted(SystemExit):
    """Ends a process that was asked to by SIGTERM, after its checkpoint was written; the exit code is 75."""

    def __init__(self, code: int = PREEMPTED) -> None:
        super().__init__(code)


class TerminationFlag:
    """Whether SIGTERM has arrived.

    Attributes:
        is_set_here: Whether it has at this process. Others may not know: what all have to do together, like leaving,
            is decided on by :meth:`is_set_anywhere`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.is_set_here = False
        self._group: Any = None
        self._key = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM instead of dying of it. Only a main thread can; in another the signal acts as before.

        Every process enters this at the same time.
        """
        with self._talking():
            if threading.current_thread() is not threading.main_thread():
                yield
                return

            def note(*_: Any) -> None:
                self.is_set_here = True

            before = signal.signal(signal.SIGTERM, note)
            try:
                yield
            finally:
                # Who leaves because of one ignores the next: launchers pass on what the whole process group got.
                signal.signal(signal.SIGTERM, signal.SIG_IGN if self.is_set_here else before)

    def is_set_anywhere(self) -> bool:
        """Ask all processes; every one has to at the same step."""
        if self.accelerator.num_processes == 1:
            return self.is_set_here
        flag = torch.tensor(int(self.is_set_here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def is_noticed(self) -> bool:
        """Whether this process knows, by itself or from another, that one was asked to leave; any may ask at any time.

        What it costs is a question to the store by which the processes have found each other.
        """
        if self.accelerator.num_processes == 1:
            return self.is_set_here
        store = dist.distributed_c10d._get_default_store()
        if self.is_set_here:
            store.set(self._key, "")
        return self.is_set_here or bool(store.check([self._key]))

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Have processes talk from host to host: to ask by their devices would wait for these in every step."""
        if self.accelerator.num_processes == 1:
            yield
            return
        from accelerate.utils import broadcast_object_list

        # A launcher that starts processes again keeps the store, with what those before have set.
        self._key = broadcast_object_list([f"iris_hf/termination/{uuid.uuid4()}"])[0]
        if dist.get_backend() == "gloo":
            yield
            return
        self._group = dist.new_group(backend="gloo")
        try:
            yield
        finally:
            dist.destroy_process_group(self._group)
            self._group = None
