"""What `topk` chooses among equal scores, which torch leaves open: the first of them, or what ONNX Runtime chose.

Detectors with two stages choose their queries by scores. Where the last of them and the next differ by no more than
rounding, each choice is right, and each gives other queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FirstOfEquals(TorchFunctionMode):
    """A context in which `topk` prefers the first of equal values, as ONNX does; torch promises nothing."""

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a call of `topk`."""
        if func not in (torch.topk, Tensor.topk):
            return func(*args, **(kwargs or {}))
        return self._choose(*args, **(kwargs or {}))

    def _choose(self, values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        ordered = values.sort(dim=dim, descending=largest, stable=True)
        return torch.return_types.topk((ordered.values.narrow(dim, 0, k), ordered.indices.narrow(dim, 0, k)))


class SameChoice(FirstOfEquals):
    """A context in which `topk` gives indices that are given, where their values are the best but for a tolerance.

    Elsewhere it is :class:`FirstOfEquals`.

    Args:
        choices: Indices in the order of the calls. A call takes the next that have its shape.
        tolerance: How far the values at the indices may be from the best ones, each in its place, as a multiple of the
            largest absolute value of these.
    """

    def __init__(self, choices: Sequence[Tensor], tolerance: float) -> None:
        super().__init__()
        self._choices = iter(choices)
        self._tolerance = tolerance

    def _choose(self, values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        best = super()._choose(values, k, dim, largest)
        choice = next((c for c in self._choices if c.shape == best.indices.shape), None)
        if choice is None:
            return best
        chosen = values.gather(dim, choice)
        is_as_good = (chosen - best.values).abs() <= self._tolerance * best.values.abs().amax()
        return torch.return_types.topk((chosen, choice)) if is_as_good.all() else best


def with_choices(file: Path) -> tuple[bytes, list[str]]:
    """An ONNX model that gives the indices of every choice beside its outputs.

    Returns:
        The model and the names of these outputs, in the order of the graph. No names if it chooses nothing.
    """
    import onnx

    model = onnx.load(str(file))
    names = [node.output[1] for node in model.graph.node if node.op_type == "TopK" and node.output[1]]
    known = {output.name for output in model.graph.output}
    integers = onnx.TensorProto.INT64
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, integers, None) for n in names if n not in known)
    return model.SerializeToString(), names
