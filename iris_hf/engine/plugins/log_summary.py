"""A line per epoch for people who read logs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.engine.plugins.step_means import StepMeans
from iris_hf.engine.plugins.telling import tell

logger = logging.getLogger(__name__)


class LogSummary(Plugin):
    """Logs, per epoch, mean loss, time, steps, examples per second and peak device memory; validation losses.

    What else the model measures in a step (a temperature, a recall inside the batch) stands beside the loss. The lines
    go to the logger `iris_hf` at level INFO, or to stderr where nobody listens to that. Values are summed on the
    device and read once an epoch; the means are over the steps of all ranks that measured them.
    """

    def __init__(self) -> None:
        self._means = StepMeans()

    def on_epoch_start(self, state: TrainState) -> None:
        """Start the epoch's clock."""
        self._means.start_clock()
        if state.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(state.accelerator.device)

    def on_step_end(self, state: TrainState) -> None:
        """Add what the step measured, without reading it."""
        self._means.add(state.metrics)

    def on_epoch_end(self, state: TrainState) -> None:
        """Log the epoch."""
        steps = self._means.steps
        if not steps:
            return
        means, seconds = self._means.read(state.accelerator)
        parts = [
            f"epoch {state.epoch + 1}/{state.num_epochs}: {_listed(means)}",
            f"{steps} steps in {seconds * steps:.1f} s",
            f"{state.examples_per_step / seconds:.1f} examples/s",
        ]
        if state.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(state.accelerator.device)
            parts.append(f"peak device memory {peak / 2**20:.0f} MiB")
        self._log(state, ", ".join(parts))

    def on_validation_end(self, state: TrainState) -> None:
        """Log what the validation measured."""
        measured = _listed({"val_loss": state.val_loss, **state.val_metrics})
        self._log(state, f"epoch {state.epoch + 1}/{state.num_epochs}: {measured}")

    def on_exit(self) -> None:
        """Forget the run."""
        self._means = StepMeans()

    def state_dict(self) -> dict[str, Any]:
        """Return what the epoch has measured so far."""
        return self._means.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._means.load_state_dict(state)

    @staticmethod
    def _log(state: TrainState, line: str) -> None:
        if state.is_main_process:
            tell(logger, line)


def _listed(values: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in values.items())
