"""Gradient clipping."""

from __future__ import annotations

import torch

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.errors import ConfigError


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

    def on_gradients_ready(self, state: TrainState) -> None:
        """Clip."""
        parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
