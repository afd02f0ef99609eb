"""Mixup."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.engine.plugins.base import Plugin
from iris_hf.errors import ConfigError, DataError


class Mixup(Plugin):
    """Trains on mixtures of two examples: `m * a + (1 - m) * b`, images and targets (Zhang et al., arXiv 1710.09412).

    One `m` for a batch is drawn from Beta(alpha, alpha), and the partners are a permutation of the batch, which every
    process draws for its own part. Class indices become probabilities `[N, num_classes]`, 0/1 labels numbers between;
    boxes are kept from both images. The criterion has to take these, as cross-entropy does.

    Attributes:
        alpha: Positive; small values mix little.
        num_classes: Of class indices; None takes the model's `num_classes`.
    """

    def __init__(self, alpha: float = 0.2, num_classes: int | None = None) -> None:
        if not alpha > 0:
            raise ConfigError(f"mixup: alpha must be positive, got {alpha}.")
        if num_classes is not None and num_classes < 1:
            raise ConfigError(f"mixup: num_classes must be at least 1, got {num_classes}.")
        self.alpha = alpha
        self.num_classes = num_classes
        self._num_classes: int | None = None
        self._is_multilabel = False

    def transform_model(self, model: nn.Module) -> nn.Module:
        """Look at what the model classifies."""
        known: Any = getattr(model, "num_classes", None)
        self._num_classes = self.num_classes if self.num_classes is not None else known
        self._is_multilabel = getattr(model, "target_type", None) == "multilabel"
        return model

    def transform_batch(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Mix.

        Raises:
            ConfigError: If such inputs or targets cannot be mixed, or the number of classes is unknown.
            DataError: If a class index is not below the number of classes.
        """
        inputs, targets = batch
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise ConfigError(
                f"mixup mixes a float tensor of inputs [N, ...], got {_describe(inputs)}. Give images one shape by the "
                "transform; pairs of images and texts have no mixture."
            )
        keep = torch.distributions.Beta(self.alpha, self.alpha).sample().item()
        partners = torch.randperm(len(inputs))
        mixed = _mix(inputs, partners, keep)
        if isinstance(targets, list) and all(isinstance(target, Tensor) and target.dim() == 2 for target in targets):
            return mixed, [torch.cat((targets[i], targets[j])) for i, j in enumerate(partners.tolist())]
        return mixed, _mix(self._soft(targets), partners, keep)

    def _soft(self, targets: Any) -> Tensor:
        """Turn class indices or 0/1 labels into floats."""
        if not isinstance(targets, Tensor) or targets.dim() not in (1, 2):
            raise ConfigError(
                f"mixup mixes class indices [N], labels or probabilities [N, C] and lists of boxes, got "
                f"{_describe(targets)}."
            )
        if targets.is_floating_point():
            return targets
        if self._is_multilabel or (targets.dim() == 2 and targets.shape[1] != 1):
            return targets.float()
        if not self._num_classes:
            raise ConfigError(
                "mixup turns class indices into probabilities, and the model has no num_classes. Give it: "
                "mixup(num_classes=10)."
            )
        targets = targets.flatten().long()
        if not bool(((targets >= 0) & (targets < self._num_classes)).all()):
            raise DataError(f"mixup: a class index is not in [0, {self._num_classes}): {targets.tolist()}.")
        return nn.functional.one_hot(targets, self._num_classes).float()


def _mix(values: Tensor, partners: Tensor, keep: float) -> Tensor:
    return values * keep + values[partners.to(values.device)] * (1 - keep)


def _describe(values: Any) -> str:
    return f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
