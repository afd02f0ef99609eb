"""Nested states in a safetensors file: tensors as they are, everything else as JSON in its header. No pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iris_hf.errors import ConfigError, DataError

_HEADER = "structure"


def write_state(state: Any, file: Path) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Numbers of numpy come back as Python's.

    Raises:
        ConfigError: If the state holds anything else; the message says where.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    structure = _encode(state, tensors, "state")
    save_file(tensors, file, metadata={_HEADER: json.dumps(structure)})


def read_state(file: Path) -> Any:
    """Read what :func:`write_state` wrote; tensors are on the CPU.

    Raises:
        DataError: If the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            structure = json.loads(opened.metadata()[_HEADER])
            return _decode(structure, opened.get_tensor)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{str(file)!r} cannot be read: {error}") from error


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy where several tensors share memory, which safetensors refuses.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {
            "dict": [[_encode(k, tensors, where), _encode(v, tensors, f"{where}[{k!r}]")] for k, v in value.items()]
        }
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ConfigError(
        f"A checkpoint stores tensors, numbers, strings, lists and dicts, and {where} is a {type(value).__name__}. "
        "Convert it in state_dict() or get_extra_state()."
    )


def _decode(value: Any, get_tensor: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        tensor: Tensor = get_tensor(content)
        return tensor
    if kind == "dict":
        return {_decode(k, get_tensor): _decode(v, get_tensor) for k, v in content}
    items = [_decode(v, get_tensor) for v in content]
    return tuple(items) if kind == "tuple" else items


def cpu_copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


@torch.no_grad()
def copy_into(tensors: dict[str, Tensor], stored: dict[str, Tensor], what: str) -> None:
    """Copy stored values into tensors of the same names and shapes.

    Raises:
        DataError: If a name is missing or superfluous, or a shape differs.
    """
    wrong = sorted(tensors.keys() ^ stored.keys())
    wrong += [name for name in tensors.keys() & stored.keys() if tensors[name].shape != stored[name].shape]
    if wrong:
        raise DataError(f"The checkpoint's {what} are not this model's: {', '.join(wrong[:3])} differ.")
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
