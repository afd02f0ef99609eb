"""Processes of a DataLoader: how they start, what they ignore, and that all of them end."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from typing import Any


def worker_context(num_workers: int) -> BaseContext | None:
    """Return what a DataLoader of so many processes shall start them by; None leaves it to torch.

    Where new processes are forked, which is Linux's way before Python 3.14, they come up for sure.
    """
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if not num_workers or method != "fork":
        return None
    from iris_hf.data.forking import SureForkContext

    return SureForkContext()


def outlive_sigterm(_: int) -> None:
    """Leave it to the loop when to end: launchers send SIGTERM to a process and all that it has started."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def closing_workers(loader: Any) -> Iterator[None]:
    """End the processes of a DataLoader with the block, also when it fails; without a loader there is nothing to do.

    Left to the garbage collector they stay as long as somebody holds the exception, and a process that is forked
    meanwhile takes a copy of their queues along and waits for them when it ends.
    """
    try:
        yield
    finally:
        iterator: Any = getattr(loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in getattr(iterator, "_workers", ()):
                if worker.is_alive():
                    worker.kill()
