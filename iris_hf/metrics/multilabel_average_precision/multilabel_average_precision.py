"""Multilabel mean average precision as an `evaluate` module."""

import datasets
import evaluate

from iris_hf.metrics import base, classification


class MultilabelAveragePrecision(base.StatisticsMetric):
    """Macro mean average precision of labels that may hold together; per class equal to scikit-learn's.

    `predictions` are scores `[N, num_classes]`, `references` 0 or 1 of the same shape.

    Scores:
        mAP: Mean over the classes that have a positive, in [0, 1].
        per_class: For each of them `{class, num_positives, AP}`.
        classes_without_positives: The other classes; they have no average precision and enter no mean.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Macro mean of each class's average precision.",
            citation="",
            inputs_description="predictions: scores [N, num_classes]; references: 0 or 1 [N, num_classes].",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float32")),
                    "references": datasets.List(datasets.Value("int64")),
                }
            ),
        )

    def _new_statistics(self) -> base.Statistics:
        return classification.MultilabelStatistics()
