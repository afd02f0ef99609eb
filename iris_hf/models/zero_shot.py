"""Zero-shot classifiers from features of texts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from iris_hf.errors import DataError, require_integer


def build_zero_shot_classifier(
    text_features: Tensor | Sequence[Tensor],
    text_classes: Tensor | Sequence[int],
    logit_scale: Tensor | float | None = None,
    *,
    num_classes: int,
) -> nn.Linear:
    """Make a linear classifier of image features from the features of texts that describe the classes.

    Its logits, for image features of length 1, are cosine similarities with the normalised mean of each class's text
    features (arXiv 2103.00020), times exp(logit_scale).

    Args:
        text_features: `[N, F]`, or N tensors `[F]`; as a rule of length 1.
        text_classes: The class index of each text, `[N]` or `[N, 1]`.
        logit_scale: In log space, one number; None leaves similarities as they are.
        num_classes: Number of classes. A class without a text gets zeros, and a warning names it.

    Returns:
        A layer without bias from F to `num_classes`, in the type of the features (float32 for half precision).

    Raises:
        ConfigError: If `num_classes` is not positive.
        DataError: If there are no texts, the lengths differ, a class index is no integer in [0, num_classes), a
            feature is not finite, or the scale is not one number.
    """
    require_integer("num_classes", num_classes, at_least=1)
    features = _features(text_features)
    classes = _classes(text_classes, len(features), num_classes).to(features.device)
    weight = features.new_zeros(num_classes, features.shape[1]).index_add_(0, classes, features)
    weight = nn.functional.normalize(weight, dim=1)  # a sum and a mean have one direction
    if logit_scale is not None:
        weight = weight * _scale(logit_scale).to(weight)
    absent = sorted(set(range(num_classes)) - set(classes.tolist()))
    if absent:
        named = ", ".join(map(str, absent[:20])) + (f" and {len(absent) - 20} more" if len(absent) > 20 else "")
        warnings.warn(f"There is no text for {len(absent)} classes: {named}. Their logits are 0.", stacklevel=2)
    classifier = nn.Linear(features.shape[1], num_classes, bias=False, device="meta").to_empty(device=weight.device)
    classifier.weight = nn.Parameter(weight)
    return classifier


def _features(text_features: Tensor | Sequence[Tensor]) -> Tensor:
    if not isinstance(text_features, Tensor):
        if not isinstance(text_features, Sequence) or not all(isinstance(f, Tensor) for f in text_features):
            raise DataError(
                "text_features must be a tensor [N, F] or a list of tensors [F] (torch.as_tensor makes one), not a "
                f"{type(text_features).__name__}."
            )
        lengths = {tuple(f.shape) for f in text_features}
        if len(lengths) != 1:
            raise DataError(f"text_features must be tensors of one shape [F], got {sorted(lengths)}.")
        text_features = torch.stack(list(text_features))
    if text_features.ndim != 2 or not text_features.is_floating_point() or len(text_features) == 0:
        raise DataError(
            f"text_features must be floats [N, F], at least one row, got {text_features.dtype} of shape "
            f"{tuple(text_features.shape)}."
        )
    features = text_features.detach()
    features = features.float() if features.element_size() < 4 else features
    bad = (~features.isfinite().all(1)).nonzero()
    if len(bad):
        raise DataError(f"The features of text {int(bad[0])} are not finite.")
    return features


def _classes(text_classes: Tensor | Sequence[int], num_texts: int, num_classes: int) -> Tensor:
    try:
        classes = torch.as_tensor(text_classes)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"text_classes must be integers [N] or [N, 1], got {text_classes!r}.") from None
    is_whole = not classes.is_floating_point() or bool((classes == classes.round()).all())
    if not is_whole or classes.ndim > 2 or classes.shape[1:] not in ((), (1,)):
        raise DataError(
            f"text_classes must be integers [N] or [N, 1], got {classes.dtype} of shape {tuple(classes.shape)}."
        )
    classes = classes.flatten().long()
    if len(classes) != num_texts:
        raise DataError(
            f"There are {num_texts} text_features and {len(classes)} text_classes. Give one class per text."
        )
    bad = ((classes < 0) | (classes >= num_classes)).nonzero()
    if len(bad):
        text = int(bad[0])
        raise DataError(
            f"Text {text} has the class index {int(classes[text])}, and num_classes={num_classes} allows "
            f"0 to {num_classes - 1}."
        )
    return classes


def _scale(logit_scale: Tensor | float) -> Tensor:
    if not isinstance(logit_scale, (Tensor, Real)):
        raise DataError(f"logit_scale must be one number, got {logit_scale!r}.")
    scale = torch.as_tensor(logit_scale).detach()
    if scale.numel() != 1:
        raise DataError(f"logit_scale must be one number, got the shape {tuple(scale.shape)}.")
    return scale.reshape(()).double().exp()
