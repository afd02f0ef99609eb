"""Whatever holds numbers -> a tensor or a clear error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from iris_hf.errors import DataError


def to_tensor(values: Any, name: str) -> Tensor:
    """Make one tensor of a tensor, an array, a list of numbers or a list of tensors of one shape.

    Args:
        values: The numbers. A tensor stays on its device and keeps its type.
        name: What they are, for the error, such as ``"Predictions"``.

    Raises:
        DataError: If they are ragged or no numbers.
    """
    if isinstance(values, Tensor):
        return values.detach()
    try:
        if isinstance(values, Sequence) and len(values) > 0 and isinstance(values[0], Tensor):
            return torch.stack([v.detach() for v in values])
        array = np.array(values)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"they are of type {array.dtype}")
        return torch.from_numpy(array)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{name} cannot become one array of numbers: {error}.") from error


def to_list(values: Any, name: str) -> list[Any]:
    """Return what belongs to each image as a list.

    Args:
        values: One item for each image.
        name: What the message calls it.

    Raises:
        DataError: If it is nothing to go through.
    """
    if not isinstance(values, Iterable):
        raise DataError(f"The {name} must be a list with an item for each image, got {values!r}.")
    return list(values)


def to_numpy(values: Any, name: str) -> npt.NDArray[Any]:
    """Make one array, a copy on the CPU, of what :func:`to_tensor` takes.

    Args:
        values: The numbers. Types keep their width, but bfloat16, unknown to NumPy, becomes float32.
        name: What they are, for the error.

    Raises:
        DataError: If they are ragged or no numbers.
    """
    tensor = to_tensor(values, name).cpu()
    return np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


def to_class_indices(values: Tensor, name: str, first: int = 0) -> Tensor:
    """Make int64 class indices `[N]` of `[N]` or `[N, 1]` whole numbers of any type.

    Args:
        values: The numbers.
        name: What they are, for the error.
        first: The number of the first example, for the error.

    Raises:
        DataError: If the shape is another, or a value is fractional, NaN or negative.
    """
    if values.ndim not in (1, 2) or (values.ndim == 2 and values.shape[1] != 1):
        raise DataError(f"The {name} must be class indices [N] or [N, 1], got shape {list(values.shape)}.")
    values = values.reshape(-1)
    indices = values.to(torch.int64)
    require_rows((indices == values) & (indices >= 0), values, f"{name}: must be a class index (0, 1, 2, …)", first)
    return indices


def require_rows(
    good: Tensor | npt.NDArray[Any] | np.bool_, values: Tensor | npt.NDArray[Any], rule: str, first: int = 0
) -> None:
    """Raise for the first example that is not good.

    Args:
        good: Boolean `[N]`, not all true for an error.
        values: `[N, ...]`, shown in the error.
        rule: What a good example is.
        first: The number of the first example.

    Raises:
        DataError: Naming the example, its value and the rule.
    """
    if not bool(good.all()):
        row = int((~torch.as_tensor(good)).to(torch.int8).argmax())
        raise DataError(f"Example {first + row}: {rule}, got {values[row].tolist()}.")
