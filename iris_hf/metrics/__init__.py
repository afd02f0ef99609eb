"""Metrics as pure functions, and as `evaluate` modules that keep compact statistics.

Every module sits at `iris_hf/metrics/<name>/<name>.py`, so `evaluate.load` takes that folder's path; no network.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iris_hf.metrics.accuracy.accuracy import Accuracy
    from iris_hf.metrics.classification import evaluate_accuracy, evaluate_multilabel_average_precision
    from iris_hf.metrics.detection import DetectionResults, evaluate_detection_average_precision
    from iris_hf.metrics.detection_average_precision.detection_average_precision import DetectionAveragePrecision
    from iris_hf.metrics.mean_iou.mean_iou import MeanIoU
    from iris_hf.metrics.multilabel_average_precision.multilabel_average_precision import MultilabelAveragePrecision
    from iris_hf.metrics.ranking import evaluate_retrieval
    from iris_hf.metrics.retrieval.retrieval import Retrieval
    from iris_hf.metrics.segmentation import evaluate_mean_iou

_HOME_OF = {
    "Accuracy": "accuracy.accuracy",
    "DetectionAveragePrecision": "detection_average_precision.detection_average_precision",
    "DetectionResults": "detection",
    "MeanIoU": "mean_iou.mean_iou",
    "MultilabelAveragePrecision": "multilabel_average_precision.multilabel_average_precision",
    "Retrieval": "retrieval.retrieval",
    "evaluate_accuracy": "classification",
    "evaluate_detection_average_precision": "detection",
    "evaluate_mean_iou": "segmentation",
    "evaluate_multilabel_average_precision": "classification",
    "evaluate_retrieval": "ranking",
}

__all__ = [
    "Accuracy",
    "DetectionAveragePrecision",
    "DetectionResults",
    "MeanIoU",
    "MultilabelAveragePrecision",
    "Retrieval",
    "evaluate_accuracy",
    "evaluate_detection_average_precision",
    "evaluate_mean_iou",
    "evaluate_multilabel_average_precision",
    "evaluate_retrieval",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
