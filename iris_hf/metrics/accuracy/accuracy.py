"""Accuracy as an `evaluate` module: counts, no buffers."""

import datasets
import evaluate

from iris_hf.metrics import base, classification


class Accuracy(base.StatisticsMetric):
    """Fraction of examples whose top class is the target: `{"accuracy": float}`, in [0, 1].

    `predictions` are logits or probabilities `[N, C]`, or class indices `[N]`; `references` are class indices
    `[N]` or `[N, 1]`. See :func:`iris_hf.metrics.evaluate_accuracy`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fraction of examples whose top class is the target.",
            citation="",
            inputs_description="predictions: [N, C] scores or [N] class indices; references: [N] or [N, 1].",
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _new_statistics(self) -> base.Statistics:
        return classification.AccuracyStatistics()
