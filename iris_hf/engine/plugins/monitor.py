"""The best value so far of something that a validation measures."""

from __future__ import annotations

import math
from typing import Any, Literal

from iris_hf.engine.plugins.base import TrainState
from iris_hf.errors import ConfigError, unknown_name


def require_validation(state: TrainState, plugin: str) -> None:
    """Refuse a run without a validation set.

    Raises:
        ConfigError: If it has none.
    """
    if not state.validates:
        raise ConfigError(f"{plugin} needs validations: give a val_dataset, or leave the plugin out.")


class Best:
    """The best value of a metric over validations.

    Attributes:
        metric: `val_loss` or a name in `state.val_metrics`.
        mode: Whether `min` or `max` is better. None: `min` for `val_loss`; anything else has to say it.
        min_delta: By how much a value has to be better to count.
        value: The best one; None before the first.
    """

    def __init__(self, metric: str, mode: Literal["min", "max"] | None, min_delta: float = 0.0) -> None:
        if mode is None and metric != "val_loss":
            raise ConfigError(f"Is more of {metric!r} better, or less? Say mode='max' or mode='min'.")
        mode = mode or "min"
        if mode not in ("min", "max"):
            raise unknown_name("mode", mode, ("min", "max"))
        if not min_delta >= 0:
            raise ConfigError(f"min_delta must not be negative, got {min_delta}.")
        self.metric = metric
        self.mode = mode
        self.min_delta = min_delta
        self.value: float | None = None

    def improves(self, state: TrainState) -> bool:
        """Look at the last validation; tell whether it was the best. NaN never is.

        Raises:
            ConfigError: If nothing of that name was measured.
        """
        measured: dict[str, Any] = {"val_loss": state.val_loss, **state.val_metrics}
        if self.metric not in measured:
            error = unknown_name("validation metric", self.metric, measured)
            raise ConfigError(f"{error} The plugin val_metrics measures more.")
        value = float(measured[self.metric])
        gain = math.inf if self.value is None else self.value - value if self.mode == "min" else value - self.value
        if math.isnan(value) or not gain > self.min_delta:
            return False
        self.value = value
        return True
