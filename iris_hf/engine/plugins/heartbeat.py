"""A sign of life at intervals, for epochs that take hours."""

from __future__ import annotations

import logging
import time

from iris_hf.engine.plugins.base import Plugin, PredictState, TrainState
from iris_hf.engine.plugins.telling import tell
from iris_hf.errors import ConfigError

logger = logging.getLogger(__name__)


class Heartbeat(Plugin):
    """Logs how far a run is, at most once in an interval, on the main process.

    The lines go to the logger `iris_hf` at level INFO, or to stderr where nobody listens to that.

    Attributes:
        interval_in_minutes: The interval, from the start of the run.
    """

    def __init__(self, interval_in_minutes: float = 5) -> None:
        if not interval_in_minutes >= 0:  # NaN too
            raise ConfigError(f"heartbeat: interval_in_minutes must not be negative, got {interval_in_minutes}.")
        self.interval_in_minutes = interval_in_minutes
        self._last = 0.0

    def on_train_start(self, state: TrainState) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_step_end(self, state: TrainState) -> None:
        """Log the step and the loss."""
        if self._is_due(state.is_main_process):
            tell(logger, f"Step {state.step} of {state.num_steps} is done, loss {float(state.loss):.4g}.")

    def on_prediction_start(self, state: PredictState) -> None:
        """Start the clock."""
        self._last = time.monotonic()

    def on_prediction_batch_end(self, state: PredictState) -> None:
        """Log the batch."""
        if self._is_due(state.is_main_process):
            of_all = "" if state.num_batches is None else f" of {state.num_batches}"
            tell(logger, f"Batch {state.batch}{of_all} is predicted.")

    def _is_due(self, is_main_process: bool) -> bool:
        now = time.monotonic()
        if not is_main_process or now < self._last + 60 * self.interval_in_minutes:
            return False
        self._last = now
        return True
