"""Image encoders and classifiers: images in [0, 1] in, features or probabilities out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError, unknown_name
from iris_hf.models.batching import ImageBatch, stack_images
from iris_hf.models.image_spec import ImageSpec, Normalize
from iris_hf.models.recipe import record

_TASK_TYPES = {"multiclass_classification": "multiclass", "multilabel_classification": "multilabel"}


class ImageEncoder(nn.Module):
    """A network that takes images in [0, 1] and normalises them itself.

    Attributes:
        normalize: The normalisation.
        network: Takes normalised images `[N, 3, H, W]`.
        output: The key of the network's output that is wanted, or None where that is a tensor.
        image_spec: The images it takes.
        feature_dim: Length of a feature vector, or None if unknown.
        target_type: None, as for every encoder.
        num_classes: 0, as for every encoder.
        class_names: None, as for every encoder.
    """

    target_type = None
    num_classes = 0
    class_names = None

    def __init__(
        self, network: nn.Module, image_spec: ImageSpec, *, output: str | None = None, feature_dim: int | None = None
    ) -> None:
        super().__init__()
        self.image_spec = image_spec
        self.feature_dim = feature_dim
        self.output = output
        self.normalize = Normalize(image_spec)
        self.network = network

    def forward(self, images: ImageBatch) -> Tensor:
        """Map images `[N, 3, H, W]` in [0, 1] to the network's output `[N, ...]`.

        Raises:
            DataError: If the images differ in shape or are no float images.
        """
        result: Any = self.network(self.normalize(stack_images(images)))
        tensor: Tensor = result if self.output is None else result[self.output]
        return tensor


class ImageClassifier(nn.Module):
    """A network whose outputs `[N, num_classes]` are logits.

    Attributes:
        network: Takes whatever the inputs are; images in [0, 1] as a rule.
        target_type: `multiclass` or `multilabel`.
        num_classes: Number of classes, or None if unknown.
        class_names: Their names, or None.
        image_spec: The images that the network takes, or None if unknown.
        criterion: Mean cross-entropy of logits and class indices, or of logits and 0/1 labels.
        predictor: Turns logits into probabilities: softmax over the classes, or a sigmoid for each.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        target_type: Literal["multiclass", "multilabel"],
        num_classes: int | None,
        class_names: Sequence[str] | None,
        image_spec: ImageSpec | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.target_type = target_type
        self.num_classes = num_classes
        self.class_names = None if class_names is None else list(class_names)
        self.image_spec = image_spec
        multiclass = target_type == "multiclass"
        self.criterion: nn.Module = nn.CrossEntropyLoss() if multiclass else nn.BCEWithLogitsLoss()
        self.predictor: nn.Module = nn.Softmax(1) if multiclass else nn.Sigmoid()

    def forward(self, inputs: Any) -> Tensor:
        """Give the logits `[N, num_classes]` of a batch."""
        logits: Tensor = self.network(inputs)
        return logits

    def training_step(self, inputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """Give the mean loss of a batch.

        Args:
            inputs: What the network takes.
            targets: Class indices `[N]` or `[N, 1]`, or float probabilities `[N, num_classes]`, for multiclass, 0/1
                `[N, num_classes]` for multilabel.

        Raises:
            DataError: If the targets have another shape or type.
        """
        logits = self(inputs)
        return {"loss": self.criterion(logits, self._fit(targets, logits))}

    def prediction_step(self, inputs: Any) -> Tensor:
        """Give the probabilities `[N, num_classes]` of a batch; for multiclass each row sums to 1."""
        probabilities: Tensor = self.predictor(self(inputs))
        return probabilities

    def _fit(self, targets: Tensor, logits: Tensor) -> Tensor:
        n, num_classes = logits.shape
        if isinstance(targets, Tensor) and targets.is_floating_point() and targets.shape == logits.shape:
            return targets.to(logits.dtype)
        # A single label per example, class index or only class, may come with an axis of its own or without.
        is_single = self.target_type == "multiclass" or num_classes == 1
        shapes = [(n,), (n, 1)] if is_single else [(n, num_classes)]
        if not isinstance(targets, Tensor) or tuple(targets.shape) not in shapes:
            got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            wanted = " or ".join(map(str, shapes))
            raise DataError(f"{self.target_type} targets of {n} examples must be a tensor {wanted}, got {got}.")
        if self.target_type == "multilabel":
            return targets.reshape(logits.shape).to(logits.dtype)
        if targets.is_floating_point():
            raise DataError(f"multiclass targets must be integers (class indices), got {targets.dtype}.")
        return targets.flatten().long()


def append_classifier(
    model: nn.Module,
    classifier: nn.Module,
    *,
    task_type: Literal["multiclass_classification", "multilabel_classification"],
) -> ImageClassifier:
    """Put a classifier behind an encoder. Both are copied.

    Args:
        model: Maps inputs to features `[N, F]`.
        classifier: Maps features `[N, F]` to logits `[N, num_classes]`; the number of classes is taken from its last
            linear layer.
        task_type: `multiclass_classification`: cross-entropy and softmax. `multilabel_classification`: binary
            cross-entropy and sigmoid.

    Raises:
        ConfigError: If the task type is unknown or an argument is no module.
    """
    if task_type not in _TASK_TYPES:
        raise unknown_name("task_type", task_type, _TASK_TYPES)
    for name, module in (("model", model), ("classifier", classifier)):
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{name} must be a torch.nn.Module, got {type(module).__name__}.")
    linears = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    spec = getattr(model, "image_spec", None)
    return record(
        ImageClassifier(
            nn.Sequential(copy.deepcopy(model), copy.deepcopy(classifier)),
            target_type="multiclass" if _TASK_TYPES[task_type] == "multiclass" else "multilabel",
            num_classes=linears[-1].out_features if linears else None,
            class_names=None,
            image_spec=spec if isinstance(spec, ImageSpec) else None,
        ),
        "append_classifier",
        model=model,
        classifier=classifier,
        task_type=task_type,
    )
