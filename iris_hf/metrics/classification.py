"""Accuracy."""

from __future__ import annotations

from typing import Any

import torch

from iris_hf.errors import DataError
from iris_hf.metrics.arrays import require_rows, to_class_indices, to_tensor


def evaluate_accuracy(predictions: Any, targets: Any) -> float:
    """Fraction of examples whose top class is the target, in [0, 1].

    Args:
        predictions: Scores `[N, C]` (logits or probabilities; the lowest class wins a tie) or class indices `[N]`.
            Any tensor, array or list; indices may be floats that hold whole numbers.
        targets: Class indices `[N]` or `[N, 1]`.

    Raises:
        DataError: If there are no examples, the lengths differ, a score is NaN, or an index is no class.
    """
    statistics = AccuracyStatistics()
    statistics.update(predictions, targets)
    return statistics.result()["accuracy"]


class AccuracyStatistics:
    """The number of examples and of those that were right."""

    def __init__(self) -> None:
        self._num_correct = 0
        self._num_examples = 0

    def __len__(self) -> int:
        return self._num_examples

    def update(self, predictions: Any, targets: Any) -> None:
        """Count a batch; see :func:`evaluate_accuracy` for shapes and errors."""
        scores, labels = to_tensor(predictions, "predictions"), to_tensor(targets, "targets")
        if scores.ndim not in (1, 2) or labels.ndim == 0 or (scores.ndim == 2 and scores.shape[1] == 0):
            raise DataError(
                "Accuracy takes predictions [N, C] or [N] and targets [N] or [N, 1], "
                f"got shapes {list(scores.shape)} and {list(labels.shape)}."
            )
        if len(scores) != len(labels):
            raise DataError(f"{len(scores)} predictions but {len(labels)} targets: there must be one for each.")
        if len(labels) == 0:
            return
        first = self._num_examples
        indices = to_class_indices(labels.to(scores.device), "target", first)
        if scores.ndim == 1:
            top = to_class_indices(scores, "prediction", first)
        else:
            require_rows(~scores.isnan().any(dim=1), scores, "prediction: scores must not be NaN", first)
            num_classes = scores.shape[1]
            require_rows(indices < num_classes, indices, f"target: the predictions have {num_classes} classes", first)
            top = scores.argmax(dim=1)
        self._num_correct += int(torch.sum(top == indices))
        self._num_examples += len(indices)

    def result(self) -> dict[str, float]:
        """Return `{"accuracy": correct / examples}`."""
        if self._num_examples == 0:
            raise DataError("Accuracy of no examples is undefined: the predictions or the targets are empty.")
        return {"accuracy": self._num_correct / self._num_examples}
