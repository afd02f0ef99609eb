"""Mean intersection over union (IoU) of segmentations with one class per pixel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from iris_hf.errors import DataError, require_integer
from iris_hf.metrics.arrays import to_list, to_tensor

IGNORE_INDEX = 255
NO_CLASS = -1
MAX_CLASS_ID = 2**16 - 1  # a larger value is a mistake, such as a colour


def evaluate_mean_iou(
    predictions: Iterable[Any], targets: Iterable[Any], *, ignore_index: int | None = IGNORE_INDEX
) -> dict[str, Any]:
    """Intersection over union per class over the pixels of all images, and its mean.

    A target pixel without a class is ignored: `ignore_index` in a map, no mask set in `[C, H, W]`. A predicted pixel
    without a class (likewise) is a miss for its target and false for no class.

    Args:
        predictions: Per image a class map `[H, W]`, or scores or 0/1 masks `[C, H, W]` of which the highest wins (the
            lowest class in a tie) and all zeros mean no class. A batch `[N, ...]` or a list; sizes may vary.
        targets: Per image a class map `[H, W]`, or 0/1 masks `[C, H, W]` that don't overlap.
        ignore_index: The value in maps that means "no class"; None if there is none.

    Returns:
        The scores of :class:`iris_hf.metrics.MeanIoU`.

    Raises:
        DataError: If there are no images, their numbers or sizes differ, no target pixel has a class, masks overlap,
            or a value is no class or NaN; it names the image.
    """
    statistics = IoUStatistics(ignore_index=ignore_index)
    statistics.update(predictions, targets)
    return statistics.result()


class IoUStatistics:
    """Per class, the pixels that are its own, that were predicted as it, and both."""

    def __init__(self, *, ignore_index: int | None = IGNORE_INDEX) -> None:
        if ignore_index is not None:
            require_integer("ignore_index", ignore_index)
        self._ignore_index = ignore_index
        self._counts = torch.zeros(3, 0, dtype=torch.int64)  # [target | predicted | both, class]
        self._num_images = 0

    def __len__(self) -> int:
        return self._num_images

    def update(self, predictions: Iterable[Any], targets: Iterable[Any]) -> None:
        """Count a batch; see :func:`evaluate_mean_iou` for shapes and errors."""
        predictions, targets = to_list(predictions, "predictions"), to_list(targets, "targets")
        if len(predictions) != len(targets):
            raise DataError(f"Predictions of {len(predictions)} images but targets of {len(targets)}.")
        counts = self._counts
        for i, (prediction, target) in enumerate(zip(predictions, targets, strict=True), start=self._num_images):
            counts = _add(counts, self._count(prediction, target, f"Image {i}"))
        self._counts = counts
        self._num_images += len(predictions)

    def result(self) -> dict[str, Any]:
        """Return the scores, named in :class:`iris_hf.metrics.MeanIoU`."""
        if self._num_images == 0:
            raise DataError("Mean IoU of no images is undefined: the predictions and targets are empty.")
        own, predicted, both = self._counts.double()
        if not bool(own.any()):
            raise DataError(f"No pixel of the {self._num_images} targets has a class, so mean IoU is undefined.")
        union = own + predicted - both
        iou, accuracy = both / union, both / own
        return {
            "mean_iou": float(iou[union > 0].mean()),
            "mean_accuracy": float(accuracy[own > 0].mean()),
            "overall_accuracy": float(both.sum() / own.sum()),
            "per_class": [
                {
                    "class": k,
                    "num_pixels": int(own[k]),
                    "iou": float(iou[k]),
                    "accuracy": float(accuracy[k]) if own[k] > 0 else None,
                }
                for k in torch.nonzero(union).flatten().tolist()
            ],
            "num_pixels": int(own.sum()),
        }

    def _count(self, prediction: Any, target: Any, where: str) -> Tensor:
        scores, labels = to_tensor(prediction, f"{where}: predictions"), to_tensor(target, f"{where}: targets")
        for what, values in (("prediction", scores), ("target", labels)):
            if values.ndim not in (2, 3) or values.numel() == 0:
                raise DataError(f"{where}: a {what} is [H, W] or [C, H, W], got shape {list(values.shape)}.")
        if scores.shape[-2:] != labels.shape[-2:]:
            raise DataError(
                f"{where}: the prediction has {list(scores.shape[-2:])} pixels, the target {list(labels.shape[-2:])}: "
                "resize the prediction to the target."
            )
        labels = labels.to(scores.device)
        own = self._read_map(labels, f"{where}, target") if labels.ndim == 2 else _read_masks(labels, where)
        if scores.ndim == 2:
            predicted = self._read_map(scores, f"{where}, prediction")
        else:
            predicted = _read_scores(scores, where)
            if int(own.max()) >= len(scores):
                raise DataError(
                    f"{where}: the target has class {int(own.max())}, the prediction {len(scores)} classes."
                )
        has_class = own != NO_CLASS
        own, predicted = own[has_class], predicted[has_class]
        num_classes = 1 + max((int(x.max()) for x in (own, predicted) if x.numel()), default=NO_CLASS)
        chosen = (own, predicted[predicted != NO_CLASS], own[own == predicted])
        return torch.stack([torch.bincount(x, minlength=num_classes) for x in chosen]).cpu()

    def _read_map(self, values: Tensor, where: str) -> Tensor:
        indices = values.to(torch.int64)
        ignored = torch.zeros_like(indices, dtype=torch.bool)
        if self._ignore_index is not None:
            ignored = values == self._ignore_index
        good = ((indices == values) & (indices >= 0) & (indices <= MAX_CLASS_ID)) | ignored
        if not bool(good.all()):
            row, column = torch.nonzero(~good)[0].tolist()
            no_class = "" if self._ignore_index is None else f" or {self._ignore_index} for none"
            raise DataError(
                f"{where}: pixel ({row}, {column}) must be a class index{no_class}, got {values[row, column].item()}."
            )
        return indices.masked_fill(ignored, NO_CLASS)


def _read_masks(masks: Tensor, where: str) -> Tensor:
    if not bool(((masks == 0) | (masks == 1)).all()):
        raise DataError(f"{where}: target masks [C, H, W] must hold 0 and 1 only.")
    number = masks.sum(dim=0)
    if bool((number > 1).any()):
        row, column = torch.nonzero(number > 1)[0].tolist()
        classes = torch.nonzero(masks[:, row, column]).flatten().tolist()
        raise DataError(
            f"{where}: pixel ({row}, {column}) of the target belongs to classes {classes}; mean IoU takes one at most."
        )
    return masks.to(torch.uint8).argmax(dim=0).masked_fill(number == 0, NO_CLASS)


def _read_scores(scores: Tensor, where: str) -> Tensor:
    if bool(scores.isnan().any()):
        raise DataError(f"{where}: the prediction's scores must not be NaN.")
    scores = scores.to(torch.uint8) if scores.dtype == torch.bool else scores
    return scores.argmax(dim=0).masked_fill((scores == 0).all(dim=0), NO_CLASS)


def _add(counts: Tensor, more: Tensor) -> Tensor:
    total = torch.zeros(3, max(counts.shape[1], more.shape[1]), dtype=torch.int64)
    total[:, : counts.shape[1]] += counts
    total[:, : more.shape[1]] += more
    return total
