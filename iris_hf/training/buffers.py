"""What a model keeps beside its parameters, in checkpoints: buffers, also those made on the way, and extra states."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iris_hf.errors import DataError
from iris_hf.training.storage import copy_into

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class LateBuffer:
    """A buffer that a model has made, or given another shape, in the course of training.

    Attributes:
        owner: The module that it belongs to.
        name: Its name there.
        value: On the CPU.
        is_saved: Whether it belongs to the module's state dict.
    """

    owner: nn.Module
    name: str
    value: Tensor
    is_saved: bool

    def register(self, device: torch.device) -> None:
        """Put it into its place."""
        vars(self.owner).pop(self.name, None)
        if self.name in self.owner._buffers:
            self.owner._buffers[self.name] = self.value.to(device)
        else:
            self.owner.register_buffer(self.name, self.value.to(device), persistent=self.is_saved)


def unsaved_buffers(module: nn.Module) -> list[str]:
    """List the buffers that are no part of the module's state dict."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in sorted(part._non_persistent_buffers_set)
    ]


def copy_buffers(module: nn.Module, stored: Mapping[str, Tensor], *, unsaved: Collection[str]) -> list[LateBuffer]:
    """Copy stored buffers into those of a module; return those that it has not made, or not in that shape, yet.

    Raises:
        DataError: If a buffer of the module is not stored, or it has no such part.
    """
    own = dict(module.named_buffers())
    late = []
    for path, value in stored.items():
        if path in own and own[path].shape == value.shape:
            continue
        prefix, _, name = path.rpartition(".")
        try:
            owner = module.get_submodule(prefix)
        except AttributeError as error:
            raise DataError(f"The checkpoint's buffers are not this model's: it has no {path}.") from error
        late.append(LateBuffer(owner, name, value, is_saved=path not in unsaved))
    resized = {path for path in own.keys() & stored.keys() if own[path].shape != stored[path].shape}
    copy_into(
        {path: buffer for path, buffer in own.items() if path not in resized},
        {path: value for path, value in stored.items() if path in own and path not in resized},
        "buffers",
    )
    return late


def in_common(of_ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names that all ranks have, with equal values, in the first one's order."""
    first, *others = of_ranks
    return [name for name, value in first.items() if all(name in other and other[name] == value for other in others)]


def mean_buffers(of_ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what several processes' buffers are to others: the mean where it has one, and else the first rank's."""
    alike = in_common([{name: (value.shape, value.dtype) for name, value in each.items()} for each in of_ranks])
    merged = dict(of_ranks[0])
    for name in alike:
        values = [of_rank[name] for of_rank in of_ranks]
        if values[0].is_floating_point() and not all(torch.equal(value, values[0]) for value in values):
            merged[name] = torch.stack(values).mean(0)
    return merged


def synchronise_buffers(module: nn.Module, accelerator: Accelerator) -> None:
    """Make buffers equal on all ranks: the mean (BatchNorm's statistics), or rank 0's where they are integers.

    Those that agree stay as they are to the bit: means and standard deviations of images, for one. So do those
    that not every rank has, in the same shape: caches, which grow with each process's inputs.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    buffers = dict(module.named_buffers())
    everywhere = gather_object([{name: (buffer.shape, buffer.dtype) for name, buffer in buffers.items()}])
    for name in in_common(everywhere):
        buffer = buffers[name]
        if buffer.is_floating_point():
            low, high = buffer.clone(), buffer.clone()
            torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
            if not torch.equal(low, high):
                torch.distributed.all_reduce(buffer.div_(accelerator.num_processes))
        else:
            torch.distributed.broadcast(buffer, src=0)


def extra_states(module: nn.Module) -> dict[str, Any]:
    """Return what modules keep beside parameters and buffers, by `get_extra_state`."""
    return {
        name: part.get_extra_state()
        for name, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    }


def set_extra_states(module: nn.Module, stored: Mapping[str, Any]) -> None:
    """Give modules back what `get_extra_state` gave.

    Raises:
        DataError: If others have one.
    """
    parts = dict(module.named_modules())
    if wrong := stored.keys() ^ extra_states(module).keys():
        raise DataError(f"The checkpoint's extra states are not this model's: {', '.join(sorted(wrong)[:3])} differ.")
    for name, state in stored.items():
        parts[name].set_extra_state(state)
