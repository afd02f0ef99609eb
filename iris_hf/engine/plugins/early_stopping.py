"""Ending a run that no longer improves."""

from __future__ import annotations

from typing import Any, Literal

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.engine.plugins.monitor import Best, require_validation
from iris_hf.errors import ConfigError


class EarlyStopping(Plugin):
    """Ends the run after validations without improvement.

    Attributes:
        patience: That many validations in a row without improvement end the run.
        min_delta: By how much a value has to be better to count as an improvement.
        metric: `val_loss`, or what the plugin val_metrics measures.
        mode: Whether `min` or `max` is better; needed for anything but `val_loss`.
    """

    def __init__(
        self,
        patience: int = 3,
        min_delta: float = 0.0,
        metric: str = "val_loss",
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        if patience < 1:
            raise ConfigError(f"early_stopping: patience must be at least 1, got {patience}.")
        self.patience = patience
        self._best = Best(metric, mode, min_delta)
        self._count = 0

    def on_train_start(self, state: TrainState) -> None:
        """Refuse a run without validations."""
        require_validation(state, "early_stopping")

    def on_validation_end(self, state: TrainState) -> None:
        """Count validations without improvement."""
        if self._best.improves(state):
            self._count = 0
            return
        self._count += 1
        if self._count >= self.patience:
            best = "never a number" if self._best.value is None else f"{self._best.value:.6g} at best"
            state.request_stop(f"{self._best.metric}, {best}, has not improved in {self._count} validations.")

    def on_exit(self) -> None:
        """Forget the run."""
        self._best.value, self._count = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the count."""
        return {"best": self._best.value, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._best.value, self._count = state["best"], state["count"]
