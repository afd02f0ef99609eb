"""The features of a micro-batch from what its sub-batches gave, on one process and on several."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from iris_hf.engine.loader import map_nested
from iris_hf.errors import ConfigError, DataError
from iris_hf.losses.collectives import Group, Rows
from iris_hf.models.steps import feature_names, feature_tensors, like_features

_ROOM_FOR_SCALARS = 8
"""How many scalars of a rank are compared with the others' one by one."""


class Column(NamedTuple):
    """One of the tensors that a forward returns, for every sub-batch: rows of examples, or a scalar."""

    tensors: Sequence[Tensor]
    by_example: bool

    def join(self) -> Tensor:
        """Join what all sub-batches have, as a leaf; a scalar is the same in all."""
        tensors = [tensor.detach() for tensor in self.tensors]
        return torch.cat(tensors) if self.by_example else tensors[0].clone()

    def divide(self, gradient: Tensor | None, factor: float) -> list[Tensor | None]:
        """Divide a gradient, times a factor, among the sub-batches; that of a scalar goes to the last."""
        if gradient is None:
            return [None] * len(self.tensors)
        gradient = gradient if factor == 1 else gradient * factor
        if not self.by_example:
            return [None] * (len(self.tensors) - 1) + [gradient]
        return list(torch.split(gradient, [len(tensor) for tensor in self.tensors]))


def make_columns(rows: Sequence[Sequence[Tensor]], form: Any, sizes: Sequence[int]) -> list[Column]:
    """Arrange the tensors of sub-batches, whose examples are counted, by their place in what forward returned.

    Raises:
        ConfigError: If they are neither a row per example nor a scalar that is the same for all sub-batches.
    """
    numbers = [len(row) for row in rows]
    if len(set(numbers)) > 1:
        raise ConfigError(
            f"forward returned {', '.join(map(str, numbers))} tensors for sub-batches of {', '.join(map(str, sizes))} "
            "examples. A gradient cache takes the same features [N, ...] of each: torch.stack a list with an item per "
            "example, and pad items of different sizes."
        )
    if not rows:
        return []
    named = zip(feature_names(form), zip(*rows, strict=True), strict=True)
    return [_make_column(name, tensors, sizes) for name, tensors in named]


def _make_column(name: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Column:
    form = tensors[0].shape
    if len(form) == 0 or (form == (1,) and sizes[0] > 1):
        if len(tensors) > 1:
            values = torch.stack([tensor.detach().reshape(()) for tensor in tensors]).float()
            if not torch.allclose(values, values[:1], rtol=1e-5, equal_nan=True):
                raise _unequal_scalars(f"Feature {name}", values)
        return Column(tensors, by_example=False)
    for tensor, size in zip(tensors, sizes, strict=True):
        if tensor.shape[:1] != (size,):
            raise ConfigError(
                f"Feature {name} has the shape {list(tensor.shape)} for a sub-batch of {size} examples, and must have "
                "a row for each, [N, ...], or be a scalar. Reshape it, or use train."
            )
    shapes = list(dict.fromkeys(str(list(tensor.shape[1:])) for tensor in tensors))
    if len(shapes) > 1:
        raise ConfigError(
            f"Feature {name} has rows of the shapes {', '.join(shapes)} in the sub-batches of one micro-batch. Pad "
            "them to one size."
        )
    return Column(tensors, by_example=True)


def _unequal_scalars(which: str, values: Tensor) -> ConfigError:
    return ConfigError(
        f"{which} is a scalar from {values.min().item():.6g} to {values.max().item():.6g}, and must be the same for "
        "every sub-batch, on every process. Return a value per example, [N], whose mean the criterion takes."
    )


def count_and_compare(
    num_parts: int, names: Sequence[str], scalars: Mapping[str, Tensor], device: torch.device, group: Group
) -> list[int]:
    """Return how many sub-batches each rank has, and make sure that those that have any have the same features.

    Args:
        num_parts: This rank's.
        names: Of all features.
        scalars: Those that have to have the same value on every rank.
        device: Where to compare.
        group: The ranks.

    Raises:
        ConfigError: On every rank, if names or scalars differ.
    """
    # One exchange of a fixed size, whatever a rank has. Beyond as many scalars as that has room for, it takes sums.
    own = torch.full((1, 2 + _ROOM_FOR_SCALARS), torch.nan, dtype=torch.float64, device=device)
    own[0, 0] = num_parts
    said = ", ".join(names)
    if said:
        own[0, 1] = zlib.crc32(said.encode())
    of_scalars = list(scalars)
    for place in range(min(len(of_scalars), _ROOM_FOR_SCALARS)):
        values = [scalars[name].detach().double().reshape(()) for name in of_scalars[place::_ROOM_FOR_SCALARS]]
        own[0, 2 + place] = sum(values)
    everyone = Rows((1,) * group.size(), group.rank(), group).gather(own).cpu()
    if len(set(_known(everyone[:, 1]).tolist())) > 1:
        said_by_all: list[Any] = [None] * group.size()
        dist.all_gather_object(said_by_all, said, group=group)
        listed = "; ".join(f"{said} on rank {rank}" for rank, said in enumerate(said_by_all) if said)
        raise ConfigError(f"forward has to return the same features on every process, and returns {listed}.")
    for place, values_of_all in enumerate(everyone[:, 2:].T):
        found = _known(values_of_all)
        if not torch.allclose(found, found[:1], rtol=1e-5):
            which = ", ".join(of_scalars[place::_ROOM_FOR_SCALARS])
            raise _unequal_scalars(f"Feature {which}" if which else "A feature", found)
    return [int(count) for count in everyone[:, 0].tolist()]


def _known(values: Tensor) -> Tensor:
    return values[~values.isnan()]


def borrow_form(
    form: Any, leaves: list[Tensor], by_example: Sequence[bool], active: Sequence[int], device: torch.device
) -> tuple[Any, list[Tensor]]:
    """Give a rank without examples the features of none: the form, the types and the scalars of a rank that has some.

    Raises:
        DataError: On every rank, if none has examples.
    """
    from accelerate.utils import broadcast_object_list

    source = next((rank for rank, count in enumerate(active) if count), None)
    if source is None:
        raise DataError("A micro-batch needs at least one example on one of the processes.")
    empty = [(leaf[:0] if has_rows else leaf).cpu() for leaf, has_rows in zip(leaves, by_example, strict=True)]
    borrowed = broadcast_object_list([like_features(form, empty) if leaves else None], from_process=source)[0]
    if leaves:
        return form, leaves
    return borrowed, [tensor.to(device) for tensor in feature_tensors(borrowed)]


def gather_around(leaf: Tensor, group: Group, name: str) -> Tensor:
    """Put the features of the other ranks around this rank's, which stay differentiable."""
    rows = Rows.counting(leaf, group, what=f"feature {name}")
    everyone = rows.gather(leaf.detach())
    return torch.cat([everyone[: rows.own.start], leaf, everyone[rows.own.stop :]])


def gather_targets(targets: Any, group: Group) -> Any:
    """Join the targets of all ranks."""
    if isinstance(targets, Tensor) and targets.dim():
        return Rows.counting(targets, group, what="the targets").gather(targets)
    if isinstance(targets, (list, np.ndarray)):
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, targets, group=group)
        return np.concatenate(everyone) if isinstance(targets, np.ndarray) else [t for rank in everyone for t in rank]
    return map_nested(lambda value: gather_targets(value, group), targets)
