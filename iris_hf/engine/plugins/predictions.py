"""What a model predicts for batches of the validation set."""

from __future__ import annotations

from typing import Any

import torch

from iris_hf.engine.loader import to_device
from iris_hf.engine.plugins.base import RunState
from iris_hf.models.steps import Predictor, as_predictor


def make_predictor(state: RunState) -> Predictor:
    """Make the run's model predict, on its device and in eval mode."""
    return as_predictor(state.model).to(state.accelerator.device).eval()


@torch.no_grad()
def predict_batch(state: RunState, predictor: Predictor, inputs: Any) -> Any:
    """Return the predictions for a batch as :func:`iris_hf.predict` gives them: on the CPU, in fp32."""
    from accelerate.utils.operations import convert_to_fp32

    with state.accelerator.autocast():
        predictions = predictor(to_device(inputs, state.accelerator.device))
    if state.accelerator.mixed_precision != "no":
        predictions = convert_to_fp32(predictions)
    return to_device(predictions, torch.device("cpu"))
