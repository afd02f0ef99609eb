"""Ending a run whose loss is no number."""

from __future__ import annotations

from typing import Any

import torch

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.errors import ConfigError


class StopIfLossIsNan(Plugin):
    """Leaves out steps whose loss is NaN or infinite on any process, and ends the run.

    The weights, also those that a stopped run returns, are those before such steps. Looking at the loss waits for the
    device in every step. Under a gradient cache a loss that is no number is an error already.

    Attributes:
        patience: That many such steps in a row end the run.
    """

    def __init__(self, patience: int = 1) -> None:
        if patience < 1:
            raise ConfigError(f"stop_if_loss_is_nan: patience must be at least 1, got {patience}.")
        self.patience = patience
        self._count = 0

    def on_gradients_ready(self, state: TrainState) -> None:
        """Look at the loss of every rank before the optimizer uses its gradients."""
        broken = torch.where(state.loss.isfinite(), 0.0, 1.0)
        if not float(state.accelerator.reduce(broken, reduction="sum")):
            self._count = 0
            return
        state.optimizer.zero_grad()  # the optimizer leaves parameters without gradients as they are
        self._count += 1
        if self._count >= self.patience:
            state.request_stop(
                f"the loss of step {state.step + 1} is not finite. Its gradients were not used. Look at its examples, "
                "lower base_lr, or use clip_grad_norm."
            )

    def on_exit(self) -> None:
        """Forget the run."""
        self._count = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._count = state["count"]
