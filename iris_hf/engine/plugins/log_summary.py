"""A line per epoch for people who read logs."""

from __future__ import annotations

import logging
import time

import torch
from tqdm import tqdm

from iris_hf.engine.plugins.base import Plugin, TrainState

logger = logging.getLogger(__name__)


class LogSummary(Plugin):
    """Logs, per epoch, mean loss, time, steps, examples per second and peak device memory; validation losses.

    The lines go to the logger `iris_hf` at level INFO, or to stderr where nobody listens to that. The loss
    is summed on the device and read once an epoch; the mean is over the steps of all ranks.
    """

    def __init__(self) -> None:
        self._loss_sum: torch.Tensor | None = None
        self._first_step = 0
        self._start = 0.0

    def on_epoch_start(self, state: TrainState) -> None:
        """Start the epoch's clock and sums."""
        self._loss_sum = None
        self._first_step = state.step
        self._start = time.perf_counter()
        if state.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(state.accelerator.device)

    def on_step_end(self, state: TrainState) -> None:
        """Add the step's loss, without reading it."""
        loss = state.loss.detach()
        self._loss_sum = loss.clone() if self._loss_sum is None else self._loss_sum.add_(loss)

    def on_epoch_end(self, state: TrainState) -> None:
        """Log the epoch."""
        steps = state.step - self._first_step
        if self._loss_sum is None or not steps:
            return
        loss = state.accelerator.reduce(self._loss_sum / steps, reduction="mean").item()
        seconds = time.perf_counter() - self._start  # after the read above: the device is done
        parts = [
            f"epoch {state.epoch + 1}/{state.num_epochs}: loss {loss:.4f}",
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

    @staticmethod
    def _log(state: TrainState, line: str) -> None:
        if not state.is_main_process:
            return
        if logger.isEnabledFor(logging.INFO):
            logger.info(line)
        else:
            tqdm.write(line)
