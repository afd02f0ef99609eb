"""Gradient clipping."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.errors import ConfigError

_EPSILON = 1e-6  # torch's: a norm of zero divides nothing


class ClipGradNorm(Plugin):
    """Scales the gradients of a step down to a global norm, once they are complete, unscaled and averaged.

    Pascanu et al., arXiv 1211.5063.

    Attributes:
        max_norm: Largest L2 norm of all gradients together, positive.
    """

    def __init__(self, max_norm: float = 1.0) -> None:
        if not max_norm > 0:
            raise ConfigError(f"clip_grad_norm: max_norm must be positive, got {max_norm}.")
        self.max_norm = max_norm
        self._parameters: list[nn.Parameter] = []

    def on_train_start(self, state: TrainState) -> None:
        """Find what to clip."""
        self._parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]

    def on_gradients_ready(self, state: TrainState) -> None:
        """Clip."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        # Sharded gradients (DTensor) are a subclass of Tensor.
        if gradients and all(type(gradient) is Tensor and gradient.is_cpu for gradient in gradients):
            clip_on_cpu(gradients, self.max_norm)
        else:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.max_norm)

    def on_exit(self) -> None:
        """Let go of the parameters."""
        self._parameters = []


def clip_on_cpu(gradients: list[Tensor], max_norm: float) -> None:
    """Do what `torch.nn.utils.clip_grad_norm_` does, to gradients in host memory.

    Nothing is grouped by device, and, since reading the norm waits for none here, short gradients are left alone.

    Args:
        gradients: Plain dense tensors, changed in place.
        max_norm: Their largest L2 norm together.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    scale = max_norm / (norm.item() + _EPSILON)
    if not scale >= 1:  # NaN too
        torch._foreach_mul_(gradients, scale)
