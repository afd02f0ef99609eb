"""A picture of the first examples of a validation set."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from iris_hf.engine.drawing import draw_examples, split_images
from iris_hf.engine.loader import to_device
from iris_hf.engine.plugins.base import TrainState
from iris_hf.engine.plugins.predictions import make_predictor, predict_batch
from iris_hf.models.steps import Predictor

_UNKNOWN = "the targets and predictions are no classes, labels, boxes or masks"


class ValExamples:
    """Collects examples with what the model predicts for them, and draws them.

    Attributes:
        count: How many.
        obstacle: Why they cannot be drawn; None while they can.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.obstacle: str | None = None
        self._predictor: Predictor | None = None
        self._images: list[Any] = []
        self._targets: list[Any] = []
        self._predictions: list[Any] = []

    def start(self, state: TrainState) -> None:
        """Begin anew, with the model as it is now."""
        self.clear()
        self._predictor = make_predictor(state)

    def add(self, state: TrainState, batch: tuple[Any, Any]) -> None:
        """Predict examples of a batch, until there are enough."""
        missing = self.count - len(self._images)
        if self.obstacle is not None or self._predictor is None or missing <= 0:
            return
        images = split_images(batch[0])
        if images is None:
            self.obstacle = "the inputs are no images [3, H, W] or [1, H, W]"
            return
        images = images[:missing]
        predictions = predict_batch(state, self._predictor, batch[0][:missing])
        if not (_is_one_each(batch[1], len(batch[0])) and _is_one_each(predictions, len(images))):
            self.obstacle = _UNKNOWN
            return
        self._images += to_device(images, torch.device("cpu"))
        self._targets += to_device(batch[1][:missing], torch.device("cpu"))
        self._predictions += predictions

    def draw(self, state: TrainState) -> np.ndarray[Any, Any] | None:
        """Return the picture, uint8 `[H, W, 3]`; None where there is an obstacle."""
        if self.obstacle is None and self._images:
            picture = draw_examples(self._images, self._targets, self._predictions, state.class_names)
            if picture is not None:
                return picture
            self.obstacle = _UNKNOWN
        return None

    def clear(self) -> None:
        """Let go of model and examples."""
        self._predictor, self._images, self._targets, self._predictions = None, [], [], []


def _is_one_each(values: Any, count: int) -> bool:
    return (isinstance(values, list) or (isinstance(values, Tensor) and values.dim() > 0)) and len(values) == count
