"""The five target formats and their checks, in one place.

| target type | target |
|---|---|
| multiclass | class index: int, or integer tensor `[]` or `[1]` |
| multilabel | integer tensor `[num_classes]` of 0 and 1 |
| detection | float32 tensor `[num_boxes, 5]`: class, x0, y0, x1, y1; relative, 0 <= x0 < x1 <= 1 |
| segmentation | float32 tensor `[num_classes, height, width]` of 0 and 1; classes may overlap |
| image_text | class index as for multiclass, or None |
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iris_hf.errors import DataError, unknown_name
from iris_hf.types import TARGET_TYPES, TargetType

_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def check_target(
    target: Any,
    target_type: TargetType,
    *,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    where: str = "",
) -> None:
    """Check one target against its format.

    Args:
        target: What a dataset returned.
        target_type: The format that it should have.
        num_classes: Number of classes; class indices are only bounded below when it is not known.
        image_size: Width and height of the image in pixels (PIL's order); only masks are compared with it.
        where: What the message starts with, such as ``"Example 1043: "``.

    Raises:
        DataError: If the type, shape, dtype or a value is wrong.
        ConfigError: If there is no such target type.
    """
    problem = _problem_finder(target_type)(target, num_classes, image_size)
    if problem is not None:
        raise DataError(where + problem)


def classes_in(target: Any, target_type: TargetType) -> list[int]:
    """The classes that occur in a target that is in its format, each once, in ascending order.

    Args:
        target: A valid target.
        target_type: Its format.

    Returns:
        The class; the positive labels; the classes of the boxes; the classes with at least one pixel.
    """
    if target_type == "multiclass":
        return [int(target)]
    if target_type == "image_text":
        return [] if target is None else [int(target)]
    if target_type == "multilabel":
        return target.nonzero().flatten().tolist()  # type: ignore[no-any-return]
    if target_type == "detection":
        return target[:, 0].long().unique().tolist()  # type: ignore[no-any-return]
    if target_type == "segmentation":
        return target.flatten(1).any(1).nonzero().flatten().tolist()  # type: ignore[no-any-return]
    raise unknown_name("target_type", target_type, TARGET_TYPES)


def is_class_index(target: Any) -> bool:
    """Whether a target has the form of a class index, whatever its value.

    Args:
        target: What a dataset returned.
    """
    if isinstance(target, Tensor):
        return target.shape in ((), (1,)) and target.dtype in _INTEGERS
    return isinstance(target, numbers.Integral) and not isinstance(target, bool)


def infer_target_type(target: Any) -> TargetType:
    """Tell the target type from one target.

    An integer tensor `[1]` counts as a class index, not as the labels of a one-class multilabel data set.

    Args:
        target: What a dataset returned.

    Raises:
        DataError: If it looks like none of the five formats.
    """
    if target is None:
        return "image_text"
    if is_class_index(target):
        return "multiclass"
    if isinstance(target, Tensor):
        if target.dtype in _INTEGERS:
            if target.dim() == 1:
                return "multilabel"
        elif target.is_floating_point():
            if target.dim() == 2 and target.shape[1] == 5:
                return "detection"
            if target.dim() == 3:
                return "segmentation"
    raise DataError(f"{_describe(target)} is a target of no known type. Known: {', '.join(TARGET_TYPES)}.")


def find_bad_box(boxes: Tensor, num_classes: int | None) -> tuple[int, str] | None:
    """Look for the first box that breaks the format.

    Args:
        boxes: Float `[num_boxes, 5]`: class, x0, y0, x1, y1, relative.
        num_classes: Upper bound of the class indices, if known.

    Returns:
        The row and what is wrong with it, or None when all boxes are in order.
    """
    classes, x0, y0, x1, y1 = boxes.unbind(1)
    upper = float("inf") if num_classes is None else num_classes
    good = (classes >= 0) & (classes < upper) & (classes == classes.floor())
    good &= (x0 >= 0) & (y0 >= 0) & (x1 <= 1) & (y1 <= 1) & (x0 < x1) & (y0 < y1)  # NaN compares as False
    if good.all():
        return None
    row = int(good.logical_not().nonzero()[0])
    return row, _box_problem(boxes[row].tolist(), num_classes)


def class_index_problem(index: int, num_classes: int | None) -> str | None:
    """Say what is wrong with a class index, or None.

    Args:
        index: A class index.
        num_classes: Number of classes, if known.
    """
    if index < 0:
        return f"class index {index} is negative. Drop the example or fix its label."
    if num_classes is not None and index >= num_classes:
        return f"class index {index} is beyond the {num_classes} classes (0 to {num_classes - 1}). Check class_names."
    return None


_ProblemFinder = Callable[[Any, int | None, tuple[int, int] | None], str | None]


def _problem_finder(target_type: str) -> _ProblemFinder:
    try:
        return _PROBLEM_FINDERS[target_type]
    except KeyError:
        raise unknown_name("target_type", target_type, TARGET_TYPES) from None


def _multiclass_problem(target: Any, num_classes: int | None, _size: tuple[int, int] | None) -> str | None:
    if is_class_index(target):
        return class_index_problem(int(target), num_classes)
    return f"a multiclass target is an int or an integer tensor [] or [1], not {_describe(target)}."


def _multilabel_problem(target: Any, num_classes: int | None, _size: tuple[int, int] | None) -> str | None:
    if not isinstance(target, Tensor) or target.dim() != 1 or target.dtype not in _INTEGERS:
        return f"a multilabel target is an integer tensor [num_classes] of 0 and 1, not {_describe(target)}."
    if num_classes is not None and len(target) != num_classes:
        return f"a multilabel target has one value per class: {num_classes}, not {len(target)}."
    bad = (target != 0) & (target != 1)
    if bad.any():
        label = int(bad.nonzero()[0])
        return f"label {label} of a multilabel target is {int(target[label])}; it has to be 0 or 1."
    return None


def _detection_problem(target: Any, num_classes: int | None, _size: tuple[int, int] | None) -> str | None:
    expected = "a detection target is a float32 tensor [num_boxes, 5]"
    if not isinstance(target, Tensor) or target.dtype != torch.float32:
        return f"{expected}, not {_describe(target)}."
    if target.dim() != 2 or target.shape[1] != 5:
        return f"{expected}, not {_describe(target)}. No boxes are an empty [0, 5] tensor."
    bad = find_bad_box(target, num_classes)
    return None if bad is None else f"box {bad[0]} {bad[1]}"


def _segmentation_problem(target: Any, num_classes: int | None, size: tuple[int, int] | None) -> str | None:
    if not isinstance(target, Tensor) or target.dim() != 3 or target.dtype != torch.float32:
        return f"a segmentation target is a float32 tensor [num_classes, height, width], not {_describe(target)}."
    if num_classes is not None and len(target) != num_classes:
        return f"a segmentation target has one mask per class: {num_classes}, not {len(target)}."
    if size is not None and (target.shape[2], target.shape[1]) != tuple(size):
        return (
            f"the mask is {target.shape[2]} x {target.shape[1]} pixels (width x height), "
            f"its image {size[0]} x {size[1]}. Resize one to the other."
        )
    bad = (target != 0) & (target != 1)
    if bad.any():
        index, y, x = bad.nonzero()[0].tolist()
        return f"the mask of class {index} is {float(target[index, y, x])} at x={x}, y={y}; it has to be 0 or 1."
    return None


def _image_text_problem(target: Any, num_classes: int | None, size: tuple[int, int] | None) -> str | None:
    if target is None:
        return None
    problem = _multiclass_problem(target, num_classes, size)
    return problem and problem.replace("a multiclass target is", "an image_text target is None,")


_PROBLEM_FINDERS: dict[str, _ProblemFinder] = {
    "multiclass": _multiclass_problem,
    "multilabel": _multilabel_problem,
    "detection": _detection_problem,
    "segmentation": _segmentation_problem,
    "image_text": _image_text_problem,
}


def _box_problem(box: list[float], num_classes: int | None) -> str:
    index, x0, y0, x1, y1 = box
    fix = "Drop it or fix the annotation."
    if not all(abs(value) < float("inf") for value in box):
        return f"holds NaN or infinity: {box}. {fix}"
    if index != int(index):
        return f"has class {index}, which is no whole number. {fix}"
    problem = class_index_problem(int(index), num_classes)
    if problem is not None:
        return f"is wrong: {problem}"
    if x0 >= x1:
        return f"has x1 <= x0 ({x1:.7g}, {x0:.7g}). {fix}"
    if y0 >= y1:
        return f"has y1 <= y0 ({y1:.7g}, {y0:.7g}). {fix}"
    return (
        f"leaves the image: x0={x0:.7g}, y0={y0:.7g}, x1={x1:.7g}, y1={y1:.7g}; "
        "coordinates are relative to width and height, in [0, 1]. Clip it or fix the annotation."
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {list(value.shape)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
