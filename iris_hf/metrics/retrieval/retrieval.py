"""Image-text retrieval as an `evaluate` module: it keeps the features of the pairs."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from iris_hf.metrics import base, ranking


class Retrieval(base.StatisticsMetric):
    """Recall at K and median rank between images and texts, as in :func:`iris_hf.metrics.evaluate_retrieval`.

    `predictions` are pairs `[N, 2, F]`: the image's feature, then the text's, as the `prediction_step` of an
    image-text model gives them. `references` are integers `[N]` that number the images: rows with the same number
    are captions of one image, which is searched, and searches, once.

    Scores:
        text_to_image_R@1, text_to_image_R@5, text_to_image_R@10: Part of the texts whose image is among the first K,
            in [0, 1].
        text_to_image_median_rank: Median rank of a text's image, from 1.
        image_to_text_R@1, image_to_text_R@5, image_to_text_R@10: Part of the images with one of their texts among
            the first K.
        image_to_text_median_rank: Median rank of an image's best text, from 1.
        num_images: Number of images.
        num_texts: Number of texts.

    Args:
        recall_at: The values of K.
        **kwargs: What every `evaluate` module takes.
    """

    def __init__(self, *, recall_at: Sequence[int] = ranking.RECALL_AT, **kwargs: Any) -> None:
        self._recall_at = recall_at
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Recall at K and median rank between images and texts.",
            citation="",
            inputs_description="predictions: features of image and text [N, 2, F]; references: image numbers [N].",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.List(datasets.Value("float32"))),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _new_statistics(self) -> base.Statistics:
        return ranking.PairStatistics(recall_at=self._recall_at)
