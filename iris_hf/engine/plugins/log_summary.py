"""A line per epoch for people who read logs."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from tqdm import tqdm

from iris_hf.engine.plugins.base import Plugin, TrainState

logger = logging.getLogger(__name__)


class LogSummary(Plugin):
    """Logs, per epoch, mean loss, time, steps, examples per second and peak device memory; validation losses.

    What else the model measures in a step (a temperature, a recall inside the batch) stands beside the loss. The lines
    go to the logger `iris_hf` at level INFO, or to stderr where nobody listens to that. Values are summed on the
    device and read once an epoch; the means are over the steps of all ranks.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._first_step = 0
        self._start = 0.0

    def on_epoch_start(self, state: TrainState) -> None:
        """Start the epoch's clock and sums."""
        self._sums = {}
        self._first_step = state.step
        self._start = time.perf_counter()
        if state.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(state.accelerator.device)

    def on_step_end(self, state: TrainState) -> None:
        """Add what the step measured, without reading it."""
        for name, value in state.metrics.items():
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value

    def on_epoch_end(self, state: TrainState) -> None:
        """Log the epoch."""
        steps = state.step - self._first_step
        if not self._sums or not steps:
            return
        sums = torch.stack([value.float() for value in self._sums.values()])
        means = state.accelerator.reduce(sums / steps, reduction="mean").tolist()
        seconds = time.perf_counter() - self._start  # after the read above: the device is done
        measured = ", ".join(f"{name} {mean:.4f}" for name, mean in zip(self._sums, means, strict=True))
        parts = [
            f"epoch {state.epoch + 1}/{state.num_epochs}: {measured}",
            f"{steps} steps in {seconds:.1f} s",
            f"{steps * state.examples_per_step / seconds:.1f} examples/s",
        ]
        if state.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(state.accelerator.device)
            parts.append(f"peak device memory {peak / 2**20:.0f} MiB")
        self._log(state, ", ".join(parts))

    def on_validation_end(self, state: TrainState) -> None:
        """Log the validation loss."""
        self._log(state, f"epoch {state.epoch + 1}/{state.num_epochs}: val_loss {state.val_loss:.4f}")

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the epoch at hand."""
        return {"sums": dict(self._sums), "first_step": self._first_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with an epoch's sums."""
        self._sums, self._first_step = dict(state["sums"]), state["first_step"]

    @staticmethod
    def _log(state: TrainState, line: str) -> None:
        if not state.is_main_process:
            return
        if logger.isEnabledFor(logging.INFO):
            logger.info(line)
        else:
            tqdm.write(line)
