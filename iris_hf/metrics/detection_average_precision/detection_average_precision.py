"""Detection average precision as an `evaluate` module: rows per image, no buffers."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from iris_hf.metrics import base, detection


class DetectionAveragePrecision(base.StatisticsMetric):
    """COCO's average precision (AP) and recall (AR), equal to pycocotools'; all scores lie in [0, 1].

    `predictions` and `references` are one entry per image, as in
    :func:`iris_hf.metrics.evaluate_detection_average_precision`.

    Scores:
        iou_thresholds, mAP: The given thresholds, and at each the mean AP over the classes that occur in the
            ground truth.
        AP, AP50, AP75: The same averaged over the thresholds 0.50, 0.55 … 0.95, at 0.5 and at 0.75.
        AR_1, AR_10, AR_100: Mean recall over those thresholds with at most that many detections per image and class.
        AP_small, AP_medium, AP_large, AR_small, AR_medium, AR_large: Of objects below 32², between, and above 96²
            square pixels; there if image sizes are given, and None where no object is of that size.
        per_class: For each class that occurs `{class, num_boxes, mAP (a list, as above), AP, AP50, AP75}`.
        classes_without_ground_truth: Classes that were predicted, or are only crowd; they enter no mean.
        num_images: The number of images.

    Args:
        iou_thresholds: Each in (0, 1].
        iou_type: ``"bbox"``, or ``"segm"`` for masks.
        **kwargs: What every `evaluate` module takes.
    """

    def __init__(
        self,
        *,
        iou_thresholds: Sequence[float] = detection.DEFAULT_IOU_THRESHOLDS,
        iou_type: detection.IouType = "bbox",
        **kwargs: Any,
    ) -> None:
        self._iou_thresholds = iou_thresholds
        self._iou_type = iou_type
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Average precision and recall of detections, as COCO defines them.",
            citation="Lin et al., Microsoft COCO: Common Objects in Context, arXiv 1405.0312",
            inputs_description="Per image, predictions: [m, 6] class, probability, x0, y0, x1, y1, relative; "
            "references: [n, 5] class, x0, y0, x1, y1, or a dict of boxes, image_size, iscrowd, area, masks.",
            features=datasets.Features({"predictions": datasets.List(row), "references": datasets.List(row)}),
        )

    def _new_statistics(self) -> base.Statistics:
        return detection.DetectionStatistics(iou_thresholds=self._iou_thresholds, iou_type=self._iou_type)
