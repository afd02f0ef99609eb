"""Forked processes that come up for sure."""

from __future__ import annotations

import logging
import os
from multiprocessing.connection import wait
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess

logger = logging.getLogger(__name__)

START_SECONDS = 30.0
"""How long a forked process may take until it runs Python; some hundredths of a second, as a rule."""

_STARTS = 3


class SureForkProcess(ForkProcess):
    """A process that is forked again if it does not come up.

    A forked process has the locks of its parent, but not the threads that would release them. Before 3.11.10 Python
    waits forever for one that a thread of a library held in that moment, as gloo's do after an exchange; see
    https://github.com/python/cpython/issues/112275. In runs of two processes that was one start of about 1,500.

    Raises:
        RuntimeError: By :meth:`start`, if it does not come up in three starts.
    """

    _pipe: tuple[int, int]

    @staticmethod
    def _Popen(process: BaseProcess) -> Popen:  # multiprocessing's name
        assert isinstance(process, SureForkProcess)
        for start in range(1, _STARTS + 1):
            process._pipe = hears, says = os.pipe()
            try:
                try:
                    forked = Popen(process)
                finally:
                    os.close(says)  # the forked process has its own, so that its end is heard, too
                if wait([hears], START_SECONDS):
                    return forked
            finally:
                os.close(hears)
            forked.kill()
            forked.wait()
            forked.close()
            logger.warning("Start %d of a process that loads data: it hung for %g s.", start, START_SECONDS)
        raise RuntimeError(
            f"A process that loads data hung in each of {_STARTS} starts. Python 3.11.10 and later fork more "
            "safely; num_dataloader_workers=0, or num_proc=1 in to_hf, starts none."
        )

    def run(self) -> None:
        """Say that it runs, and run."""
        hears, says = self._pipe
        os.close(hears)
        os.write(says, b"\0")
        os.close(says)
        super().run()


class SureForkContext(ForkContext):
    """Multiprocessing's "fork", with processes that come up for sure."""

    Process = SureForkProcess
