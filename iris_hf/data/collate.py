"""Batches from examples."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from iris_hf.errors import DataError


def collate(examples: Sequence[Any]) -> tuple[Any, Any]:
    """Make a batch of examples, each a tuple `(input, target)` or a bare input.

    | inputs | inputs_batch |
    |---|---|
    | tensors of one shape | `[N, ...]` |
    | tensors of several shapes, PIL images, strings | list of N |
    | tuples, such as (image, tokens) | tuple of batches |
    | mappings | dict of batches |
    | mappings with an `attention_mask`, such as a tokenizer gives | dict of `[N, L]`, zeros after the shorter texts |

    | targets | targets_batch |
    |---|---|
    | int, integer tensor `[]` or `[1]` | int64 `[N]` |
    | multilabel `[C]`, masks `[C, H, W]` | `[N, C]`, `[N, C, H, W]`; list of N when shapes differ |
    | boxes `[num_boxes, 5]` | list of N tensors, also when shapes agree |
    | float | float32 `[N]` |
    | strings | list of N |
    | None for all, bare inputs | None |

    Targets that are plain lists are taken as tensors: numbers as labels, lists of five numbers as boxes, and beside
    boxes an empty list as none.

    Args:
        examples: At least one example. A tuple is always `(input, target)`.

    Returns:
        The inputs and the targets of the batch.

    Raises:
        DataError: If there are no examples, or one has an unknown or a different type; the message names its
            position in the batch.
    """
    if len(examples) == 0:
        raise DataError("A batch needs at least one example.")
    if not isinstance(examples[0], tuple):
        return _batch_inputs(list(examples), "input"), None
    for position, example in enumerate(examples):
        if not isinstance(example, tuple) or len(example) != 2:
            raise DataError(
                f"Example {position} of the batch is {_describe(example)}, not a tuple (input, target) like the first."
            )
    inputs, targets = zip(*examples, strict=True)
    return _batch_inputs(list(inputs), "input"), _batch_targets(list(targets))


def _batch_inputs(values: list[Any], what: str) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return _stack(values, what)
    if isinstance(first, (str, PIL.Image.Image)):
        _check_types(values, str if isinstance(first, str) else PIL.Image.Image, what)
        return values
    if isinstance(first, Mapping):
        _check_types(values, Mapping, what)
        for position, value in enumerate(values):
            if value.keys() != first.keys():
                raise DataError(
                    f"The {what} of example {position} of the batch has the keys {sorted(value)}, "
                    f"the first {sorted(first)}."
                )
        batch = _pad_tokens if "attention_mask" in first else _batch_inputs
        return {key: batch([value[key] for value in values], f"{what}[{key!r}]") for key in first}
    if isinstance(first, tuple):
        _check_types(values, tuple, what)
        for position, value in enumerate(values):
            if len(value) != len(first):
                raise DataError(
                    f"The {what} of example {position} of the batch is a tuple of {len(value)}, "
                    f"that of the first of {len(first)}."
                )
        return tuple(_batch_inputs([v[i] for v in values], f"{what}[{i}]") for i in range(len(first)))
    if isinstance(first, list) and all(isinstance(item, str) for item in first):
        _check_types(values, list, what)
        return values
    if isinstance(first, numbers.Real):
        return _batch_numbers(values, what)
    raise DataError(
        f"The {what} of example 0 of the batch is {_describe(first)}. Use tensors (give a transform that makes them), "
        "PIL images, strings, or tuples and dicts of these; or pass your own collate_function."
    )


def _pad_tokens(values: list[Any], what: str) -> Any:
    if all(isinstance(value, Tensor) and value.dim() == 1 for value in values):
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    return _batch_inputs(values, what)


def _batch_targets(targets: list[Any]) -> Any:
    if all(target is None for target in targets):
        return None
    if isinstance(targets[0], list):
        targets = [_listed_to_tensor(target) for target in targets]
        if any(isinstance(target, Tensor) and target.dim() == 2 for target in targets):
            targets = [torch.zeros(0, 5) if target == [] else target for target in targets]
    first = targets[0]
    if isinstance(first, Tensor):
        if first.dim() == 0 and isinstance(stacked := _stack(targets, "target"), Tensor):
            return stacked
        targets = [_listed_to_tensor(target) for target in targets]
        _check_types(targets, Tensor, "target")
        shapes = {target.shape for target in targets}
        if shapes <= {(), (1,)}:
            return torch.stack(targets if shapes == {()} else [target.reshape(()) for target in targets])
        are_boxes = first.dim() == 2 and first.shape[1] == 5 and first.is_floating_point()
        return torch.stack(targets) if not are_boxes and _same_shape(targets) else targets
    if isinstance(first, numbers.Real):
        return _batch_numbers(targets, "target")
    if isinstance(first, (str, list)):
        _check_types(targets, type(first), "target")
        return targets
    raise DataError(
        f"The target of example 0 of the batch is {_describe(first)}. "
        "Use an int, a tensor or a string; or pass your own collate_function."
    )


def _stack(values: list[Any], what: str) -> Tensor | list[Tensor]:
    """Stack tensors of one shape; return others as they are. The checks wait until stacking fails: it does them too."""
    try:
        return torch.stack(values)
    except (TypeError, RuntimeError):
        _check_types(values, Tensor, what)
        if _same_shape(values):
            raise
        return values


def _batch_numbers(values: list[Any], what: str) -> Tensor:
    if all(isinstance(value, numbers.Integral) for value in values):
        return torch.tensor([int(value) for value in values])
    if isinstance(values[0], numbers.Integral):
        values = [int(v) if isinstance(v, Tensor) and v.shape in ((), (1,)) else v for v in values]
        _check_types(values, numbers.Integral, what)
        return torch.tensor(values)
    _check_types(values, numbers.Real, what)
    return torch.tensor([float(value) for value in values])


def _listed_to_tensor(target: Any) -> Any:
    if not isinstance(target, list) or not target:
        return target
    if all(isinstance(value, numbers.Real) for value in target):
        return torch.tensor(target)
    if all(isinstance(row, (list, tuple)) and len(row) == 5 for row in target):
        return torch.tensor(target, dtype=torch.float32)
    return target


def _check_types(values: list[Any], kind: type, what: str) -> None:
    for position, value in enumerate(values):
        if not isinstance(value, kind):
            raise DataError(
                f"The {what} of example {position} of the batch is {_describe(value)}, "
                f"that of the first {_describe(values[0])}."
            )


def _same_shape(tensors: list[Tensor]) -> bool:
    return all(tensor.shape == tensors[0].shape for tensor in tensors)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
