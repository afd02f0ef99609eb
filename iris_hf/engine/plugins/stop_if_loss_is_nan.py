"""Ending a run whose loss is no number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.engine.shards import own_part
from iris_hf.errors import ConfigError


class StopIfLossIsNan(Plugin):
    """Leaves out steps whose loss or gradients are NaN or infinite on any process, and ends the run.

    The weights and buffers (BatchNorm's statistics), also those that a stopped run returns, are those before such
    steps. Gradients that overflow in fp16 are left to the gradient scaler, which leaves out such steps, too, and goes
    on. Looking at the loss waits for the device in every step, and buffers are copied. Under a gradient cache a loss
    that is no number is an error already.

    Attributes:
        patience: That many such steps in a row end the run.
    """

    def __init__(self, patience: int = 1) -> None:
        if patience < 1:
            raise ConfigError(f"stop_if_loss_is_nan: patience must be at least 1, got {patience}.")
        self.patience = patience
        self._count = 0
        self._modules: list[nn.Module] = []
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def on_epoch_start(self, state: TrainState) -> None:
        """Keep the buffers as they are: validations may have changed them."""
        self._modules = [module for module in state.model.modules() if list(module.buffers(recurse=False))]
        self._keep_buffers()

    def on_gradients_ready(self, state: TrainState) -> None:
        """Look at the loss and the gradients of every rank before the optimizer uses these."""
        is_broken = torch.where(_are_finite(state), 0.0, 1.0)
        if not float(state.accelerator.reduce(is_broken, reduction="sum")):
            self._count = 0
            self._keep_buffers()
            return
        state.optimizer.zero_grad()  # the optimizer leaves parameters without gradients as they are
        self._restore_buffers()
        self._count += 1
        if self._count >= self.patience:
            state.request_stop(
                f"the loss or a gradient of step {state.step + 1} is not finite. The step was left out. Look at its "
                "examples, lower base_lr, or use clip_grad_norm."
            )

    def on_exit(self) -> None:
        """Forget the run."""
        self._count, self._modules, self._kept = 0, [], []

    def state_dict(self) -> dict[str, Any]:
        """Return the count."""
        return {"count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._count = state["count"]

    @torch.no_grad()
    def _keep_buffers(self) -> None:
        self._kept = [
            (module, name, buffer, buffer.clone())
            for module in self._modules
            for name, buffer in module.named_buffers(recurse=False)
        ]

    @torch.no_grad()
    def _restore_buffers(self) -> None:
        for module, name, buffer, kept in self._kept:
            buffer.copy_(kept)
            setattr(module, name, buffer)  # the step may have put another in its place


def _are_finite(state: TrainState) -> Tensor:
    """Tell, on the device, whether the loss and, but for a scaler that looks itself, this process's gradients are."""
    if state.accelerator.scaler is not None:
        return state.loss.isfinite()
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    parts = [own_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    gradients = [values for part in parts if (values := part._values() if part.is_sparse else part).numel()]
    largest = torch._foreach_norm(gradients, torch.inf) if gradients else ()
    return torch.stack([state.loss, *(each.to(state.loss) for each in largest)]).isfinite().all()
