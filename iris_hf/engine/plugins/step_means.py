"""Means over the steps of an interval, without waiting for the device in any of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepMeans:
    """What steps measured, summed on the device, and the time that they took.

    Attributes:
        steps: Steps added since the last reading.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seconds = 0.0
        self._start: float | None = None

    def start_clock(self) -> None:
        """Let time count."""
        self._start = time.perf_counter()

    def stop_clock(self) -> None:
        """Let time pass without counting, as in validations."""
        self._seconds, self._start = self._elapsed(), None

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        """Add what a step measured."""
        self.steps += 1
        for name, value in metrics.items():
            if name in self._sums:
                if self._sums[name].device != value.device:  # from a checkpoint, which is in host memory
                    self._sums[name] = self._sums[name].to(value.device)
                self._sums[name] += value
                self._counts[name] += 1
            else:
                self._sums[name] = value.to(torch.float32, copy=True)
                self._counts[name] = 1

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], float]:
        """Return means, and seconds per step; start anew. Every rank has to take part.

        A mean is over the steps, of all ranks, that measured such a thing.
        """
        from accelerate.utils import gather_object

        names = list(dict.fromkeys(gather_object(list(self._sums))))
        sums = torch.zeros(2, len(names), device=accelerator.device)
        for k, name in enumerate(names):
            if name in self._sums:
                sums[0, k] = self._sums[name]
        sums[1] = torch.tensor([self._counts.get(name, 0) for name in names])
        totals, counts = accelerator.reduce(sums, reduction="sum").tolist()
        means = {name: total / count for name, total, count in zip(names, totals, counts, strict=True)}
        per_step = self._elapsed() / self.steps  # after the values were read: the device is done
        self.steps, self._sums, self._counts, self._seconds = 0, {}, {}, 0.0
        self.start_clock()
        return means, per_step

    def state_dict(self) -> dict[str, Any]:
        """Return sums and time."""
        return {
            "steps": self.steps,
            "sums": {name: value.clone() for name, value in self._sums.items()},
            "counts": dict(self._counts),
            "seconds": self._elapsed(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.steps = state["steps"]
        self._sums = dict(state["sums"])
        self._counts = dict(state["counts"])
        self._seconds = state["seconds"]

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._start is None else time.perf_counter() - self._start)
