"""How much memory a process has taken."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

MIB = 2**20


def peak_host_memory() -> float:
    """Return the most memory that was resident in this process, in MiB."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def peak_memory(accelerator: Accelerator) -> dict[str, float]:
    """Return, in MiB, the peaks of the process that has taken most. Every rank has to take part.

    Returns:
        `peak_host_memory_mib`, and on a GPU `peak_device_memory_mib`, what torch held there at most.
    """
    peaks = {"peak_host_memory_mib": peak_host_memory()}
    if accelerator.device.type == "cuda":
        peaks["peak_device_memory_mib"] = torch.cuda.max_memory_allocated(accelerator.device) / MIB
    of_ranks = accelerator.gather(torch.tensor([list(peaks.values())], device=accelerator.device))
    return dict(zip(peaks, of_ranks.amax(0).tolist(), strict=True))
