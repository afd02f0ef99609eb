"""The interfaces between data, models and loops: names, shapes and protocols.

`N` is the batch size, `H` and `W` height and width in pixels. Images that reach a model are
float `[3, H, W]` in [0, 1]; normalisation with mean and standard deviation lives in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

TargetType = Literal["multiclass", "multilabel", "detection", "segmentation", "image_text"]
"""What a target means. The formats are in :mod:`iris_hf.data.targets`."""

TARGET_TYPES: tuple[str, ...] = get_args(TargetType)

Transform = Callable[..., Any]
"""`(raw_input, target) -> (input, target)`, or image-only `raw_input -> input`."""

CollateFunction = Callable[[list[Any]], tuple[Any, Any]]
"""A list of `(input, target)` -> `(inputs_batch, targets_batch)`."""


@runtime_checkable
class SupportsTrainingStep(Protocol):
    """A model that computes its own loss."""

    def training_step(self, inputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return `{"loss": scalar}` for one batch."""
        ...


@runtime_checkable
class SupportsPredictionStep(Protocol):
    """A model that turns a batch of inputs into predictions."""

    def prediction_step(self, inputs: Any) -> Any:
        """Return one prediction per example: a tensor `[N, ...]` or a list of N."""
        ...
