"""Tensors of which every process holds a part (FSDP2's DTensors), and how to have them whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from iris_hf.engine.loader import map_nested

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether something is such a tensor. Asks without loading what only sharded runs need."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def own_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory; a plain tensor is its own."""
    return tensor.to_local().detach() if is_sharded(tensor) else tensor


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """Return a tensor whole, detached; every process calls this for the same ones in the same order."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()


def gather_nested(value: Any, *, keep: bool = True) -> Any:
    """Return nested dicts, lists and tuples with sharded tensors made whole, on the CPU, one at a time.

    Args:
        value: The same on every process, but for what the tensors hold.
        keep: Whether this process needs them. Otherwise it takes part, and gets None in their places.
    """
    if is_sharded(value):
        whole = gather(value)
        return whole.to("cpu") if keep else None
    return map_nested(lambda item: gather_nested(item, keep=keep), value)


def gather_part(part: Tensor, like: Tensor) -> Tensor:
    """Return, on the CPU, the tensor whose part this process holds; the part itself where the other is plain.

    Args:
        part: As :func:`own_part` gives it for `like`; on any device.
        like: Laid out as the tensor was.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    local = part.to(like.device)
    sharded = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return gather(sharded).to("cpu")


def lay_out(whole: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor laid out like another: sharded where that is. Nothing is sent between processes."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
