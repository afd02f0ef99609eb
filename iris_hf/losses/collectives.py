"""What a loss over several processes needs of torch.distributed: rows of uneven shards, gathered and scattered."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from iris_hf.errors import DataError

Group = dist.ProcessGroup


def world_group() -> Group | None:
    """Return the group of all processes, or None where there is just one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


class together:
    """A context in which a training loop says whether its processes compute a loss together.

    Without one a criterion can go by nothing but its mode, and plugins put models into evaluation mode in training too.
    It is a class since a generator would cost time in every step.

    Args:
        value: Whether they do: in a step, and not in a validation, where processes have different numbers of batches.
    """

    def __init__(self, value: bool) -> None:
        self.value = value

    def __enter__(self) -> None:
        self.token = _TOGETHER.set(self.value)

    def __exit__(self, *_: object) -> None:
        _TOGETHER.reset(self.token)


def is_together() -> bool | None:
    """Return what the loop says by :class:`together`; None outside of loops."""
    return _TOGETHER.get()


_TOGETHER: ContextVar[bool | None] = ContextVar("together", default=None)


@dataclass(frozen=True)
class Rows:
    """How the rows of a tensor are spread over the processes of a group.

    Attributes:
        counts: Rows on each process.
        rank: This process.
        group: The processes; None for one alone.
    """

    counts: tuple[int, ...]
    rank: int
    group: Group | None

    @classmethod
    def of(cls, features: Tensor, group: Group | None) -> Rows:
        """Learn from all processes how many rows they hold.

        Raises:
            DataError: On every process, if the features `[rows, d]` differ in d.
        """
        shapes = _exchange(features.shape, features.device, group)
        if len({dim for _, dim in shapes}) > 1:
            dims = ", ".join(str(dim) for _, dim in shapes)
            raise DataError(f"The features have {dims} dimensions on ranks 0 to {len(shapes) - 1}.")
        return cls(tuple(count for count, _ in shapes), dist.get_rank(group) if group else 0, group)

    @classmethod
    def counting(cls, rows: Tensor, group: Group | None, *, what: str) -> Rows:
        """Learn from all processes how many rows they hold.

        Args:
            rows: This process's, `[n, ...]`.
            group: The processes.
            what: Names the rows where they are not alike.

        Raises:
            DataError: On every process, if the rows differ in shape or type.
        """
        form = f"{list(rows.shape[1:])} of {rows.dtype}"
        numbers = _exchange((len(rows), zlib.crc32(form.encode())), rows.device, group)
        if len({mark for _, mark in numbers}) > 1:
            forms: list[Any] = [None] * len(numbers)
            dist.all_gather_object(forms, form, group=group)
            raise DataError(
                f"The rows of {what} have to be alike on all processes, and are "
                f"{', '.join(f'{form} on rank {rank}' for rank, form in enumerate(forms))}. Pad them to one size."
            )
        return cls(tuple(count for count, _ in numbers), dist.get_rank(group) if group else 0, group)

    @property
    def total(self) -> int:
        """Rows of all processes together."""
        return sum(self.counts)

    @property
    def offset(self) -> int:
        """Rows of the processes before this one."""
        return sum(self.counts[: self.rank])

    @property
    def own(self) -> slice:
        """This process's rows among all."""
        return slice(self.offset, self.offset + self.counts[self.rank])

    def gather(self, local: Tensor) -> Tensor:
        """Return the rows `[total, ...]` of all processes, given this one's. Not differentiable."""
        if self.group is None:
            return local
        longest = max(self.counts)
        padded = local.new_zeros(longest, *local.shape[1:])
        padded[: len(local)] = local
        blocks = local.new_empty(len(self.counts) * longest, *local.shape[1:])
        dist.all_gather_into_tensor(blocks, padded, group=self.group)
        if min(self.counts) == longest:
            return blocks
        return torch.cat([block[:n] for block, n in zip(torch.split(blocks, longest), self.counts, strict=True)])

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        """Sum partial results `[total, ...]` over the processes; return this one's rows of the sum."""
        if self.group is None:
            return partial
        longest = max(self.counts)
        if min(self.counts) < longest:
            padded = partial.new_zeros(len(self.counts), longest, *partial.shape[1:])
            for block, rows in zip(padded, torch.split(partial, list(self.counts)), strict=True):
                block[: len(rows)] = rows
            partial = padded.flatten(0, 1)
        own = partial.new_empty(longest, *partial.shape[1:])
        dist.reduce_scatter_tensor(own, partial, group=self.group)
        return own[: self.counts[self.rank]]

    def reduce(self, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce a tensor over the processes, in place, and return it."""
        if self.group is not None:
            dist.all_reduce(value, op, group=self.group)
        return value

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.counts)


def _exchange(numbers: Sequence[int], device: torch.device, group: Group | None) -> list[list[int]]:
    """Return the numbers of every process."""
    if group is None:
        return [list(numbers)]
    own = torch.tensor([list(numbers)], device=device)
    everyone = own.new_empty(group.size(), len(numbers))
    dist.all_gather_into_tensor(everyone, own, group=group)
    listed: list[list[int]] = everyone.tolist()
    return listed
