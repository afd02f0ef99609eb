"""Accuracy, and average precision of labels that may hold together."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from iris_hf.errors import DataError
from iris_hf.metrics.arrays import require_rows, to_class_indices, to_numpy, to_tensor

Array = npt.NDArray[Any]


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
        scores, labels = to_tensor(predictions, "Predictions"), to_tensor(targets, "Targets")
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


def evaluate_multilabel_average_precision(predictions: Any, targets: Any) -> dict[str, Any]:
    """Macro mean of each class's average precision, the area under its precision-recall steps.

    Per class equal to scikit-learn's `average_precision_score` (no interpolation; equal scores are one step).

    Args:
        predictions: Scores `[N, num_classes]`; only their order within a class matters.
        targets: 0 or 1, `[N, num_classes]`.

    Returns:
        The scores of :class:`iris_hf.metrics.MultilabelAveragePrecision`.

    Raises:
        DataError: If there are no examples, the shapes differ, a score is NaN, a target isn't 0 or 1, or no class has
            a positive.
    """
    statistics = MultilabelStatistics()
    statistics.update(predictions, targets)
    return statistics.result()


class MultilabelStatistics:
    """The scores as they came, and the targets in one byte each."""

    def __init__(self) -> None:
        self._scores: list[Array] = []
        self._targets: list[Array] = []
        self._num_examples = 0

    def __len__(self) -> int:
        return self._num_examples

    def update(self, predictions: Any, targets: Any) -> None:
        """Keep a batch; see :func:`evaluate_multilabel_average_precision` for shapes and errors."""
        scores, labels = to_numpy(predictions, "Predictions"), to_numpy(targets, "Targets")
        if len(scores.shape) > 0 and len(scores) == 0 and len(labels.shape) > 0 and len(labels) == 0:
            return
        if scores.ndim != 2 or labels.shape != scores.shape:
            raise DataError(
                "Multilabel average precision takes predictions and targets of one shape [N, num_classes], "
                f"got {list(scores.shape)} and {list(labels.shape)}."
            )
        if self._scores and scores.shape[1] != self._scores[0].shape[1]:
            raise DataError(f"This batch has {scores.shape[1]} classes, those before {self._scores[0].shape[1]}.")
        first = self._num_examples
        require_rows(~np.isnan(scores).any(axis=1), scores, "prediction: scores must not be NaN", first)
        require_rows(np.isin(labels, (0, 1)).all(axis=1), labels, "target: labels must be 0 or 1", first)
        self._scores.append(scores)
        self._targets.append(labels.astype(bool))
        self._num_examples += len(scores)

    def result(self) -> dict[str, Any]:
        """Return the scores, named in :class:`iris_hf.metrics.MultilabelAveragePrecision`."""
        if self._num_examples == 0:
            raise DataError("Average precision of no examples is undefined: the predictions and targets are empty.")
        scores, targets = np.concatenate(self._scores), np.concatenate(self._targets)
        num_positives = targets.sum(axis=0)
        if not num_positives.any():
            raise DataError(
                f"None of the {self._num_examples} examples is positive for any of the {len(num_positives)} classes, "
                "so average precision is undefined."
            )
        per_class = [
            {
                "class": int(k),
                "num_positives": int(num_positives[k]),
                "AP": _average_precision(scores[:, k], targets[:, k]),
            }
            for k in np.flatnonzero(num_positives)
        ]
        return {
            "mAP": float(np.mean([entry["AP"] for entry in per_class])),
            "per_class": per_class,
            "classes_without_positives": np.flatnonzero(num_positives == 0).tolist(),
        }


def _average_precision(scores: Array, targets: Array) -> float:
    """Sum of precision times the gain in recall, over the distinct scores from high to low."""
    order = np.argsort(scores, kind="stable")[::-1]
    last_of_its_score = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.cumsum(targets[order])[last_of_its_score]
    precision = hits / (last_of_its_score + 1)
    recall = hits / hits[-1]
    return float(np.sum(precision * np.diff(recall, prepend=0)))
