"""Mean intersection over union as an `evaluate` module: three counts per class."""

from typing import Any

import datasets
import evaluate

from iris_hf.metrics import base, segmentation


class MeanIoU(base.StatisticsMetric):
    """Intersection over union of segmentations, over the pixels of all images; all scores lie in [0, 1].

    `predictions` and `references` are as in :func:`iris_hf.metrics.evaluate_mean_iou`.

    Scores:
        mean_iou: Mean over the classes that occur in a target or a prediction.
        mean_accuracy: Mean, over the classes that occur in a target, of the part of their pixels that was found.
        overall_accuracy: Part of all target pixels that was right.
        per_class: For each class that occurs in either `{class, num_pixels, iou, accuracy}`; accuracy is None for a
            class that was only predicted.
        num_pixels: The number of target pixels that have a class.

    Args:
        ignore_index: The value in target maps that means "no class"; None if there is none.
        **kwargs: What every `evaluate` module takes.
    """

    def __init__(self, *, ignore_index: int | None = segmentation.IGNORE_INDEX, **kwargs: Any) -> None:
        self._ignore_index = ignore_index
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.List(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Mean over classes of intersection over union, in pixels of all images.",
            citation="",
            inputs_description="Per image, predictions: class map [H, W] or scores or masks [C, H, W]; "
            "references: class map [H, W] or 0/1 masks [C, H, W].",
            features=datasets.Features({"predictions": datasets.List(row), "references": datasets.List(row)}),
        )

    def _new_statistics(self) -> base.Statistics:
        return segmentation.IoUStatistics(ignore_index=self._ignore_index)
