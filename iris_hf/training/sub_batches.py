"""Batches divided along their first axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from iris_hf.engine.loader import map_nested
from iris_hf.errors import DataError


def split(inputs: Any, size: int, *, num_examples: int | None = None) -> list[Any]:
    """Divide a batch of inputs into sub-batches.

    Args:
        inputs: A tensor or numpy array with a leading batch axis, a list with an item per example (images of different
            sizes, texts), or tuples and dicts of these. Scalars and anything else go into every part as they are.
        size: Examples of a part; the last has what is left.
        num_examples: How many there have to be; None where nobody knows.

    Returns:
        The parts; none for a batch of no examples.

    Raises:
        DataError: If there is nothing to divide, or lengths differ.
    """
    lengths = sorted(set(_lengths(inputs)))
    if len(lengths) != 1:
        found = f"parts of {', '.join(map(str, lengths))} examples" if lengths else type(inputs).__name__
        raise DataError(
            f"A gradient cache divides tensors and arrays [N, ...] and lists of N, alone or in tuples and dicts; got "
            f"{found}. Give every part of the inputs one entry per example, by a collate_function."
        )
    if num_examples not in (None, lengths[0]):
        raise DataError(
            f"There are {lengths[0]} inputs for {num_examples} targets. A list has an item per example; give the "
            "parts of an input, such as images and texts, as a tuple or a dict."
        )
    return [take_slice(inputs, slice(start, start + size)) for start in range(0, lengths[0], size)]


def count_targets(targets: Any) -> int | None:
    """Return how many targets there are; None where that cannot be told."""
    return len(targets) if _has_rows(targets) else None


def count_examples(inputs: Any) -> int:
    """Return how many examples a part of a batch has."""
    return next(_lengths(inputs))


def take_slice(inputs: Any, at: slice) -> Any:
    """Return the examples of a range; what has no batch axis stays as it is."""
    if isinstance(inputs, Mapping):
        return {key: take_slice(value, at) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return map_nested(lambda value: take_slice(value, at), inputs)
    return inputs[at] if _has_rows(inputs) else inputs


def _lengths(inputs: Any) -> Iterator[int]:
    if isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from _lengths(value)
    elif isinstance(inputs, tuple):
        for value in inputs:
            yield from _lengths(value)
    elif _has_rows(inputs):
        yield len(inputs)


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0)
