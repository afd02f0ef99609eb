"""Values on the command line: what a path stands for, and how an output is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError
from iris_hf.tasks import Field, union_members

_TENSOR_FILES = (".safetensors", ".npy", ".json")


def read_input(field: Field, text: str | list[str]) -> Any:
    """Return the object that a task's input stands for.

    Args:
        field: The input. Names are the contract's: `*dataset` is a dataset, `*model` a model; the rest are tensors, but
            for inputs that are text themselves.
        text: What the command line gave; a list where the input is a list of texts.

    Raises:
        ConfigError: If nothing is there, or it is of no known kind.
    """
    if isinstance(text, list) or str in union_members(field.annotation):
        return text
    if field.name.endswith("dataset"):
        from iris_hf.data.storage import load_hf_dataset

        path, _, split = text.partition("#")
        return load_hf_dataset(path, split=split or None).dataset
    if field.name.endswith(("model", "classifier")):
        from iris_hf.export.runtime import load_onnx
        from iris_hf.models.hub import from_pretrained, is_export

        return load_onnx(text) if is_export(Path(text)) else from_pretrained(text)
    return read_tensor(text)


def read_tensor(text: str) -> Any:
    """Read a tensor, or a list of tensors, of a `.safetensors`, `.npy` or `.json` file.

    Raises:
        ConfigError: If the file is not there or of another kind.
        DataError: If its content is not what its name says.
    """
    path = Path(text)
    if path.suffix not in _TENSOR_FILES:
        raise ConfigError(f"{text!r} is not a file of tensors. Known: {', '.join(_TENSOR_FILES)}.")
    if not path.is_file():
        raise ConfigError(f"There is no file {text!r}.")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".json":
            return _of_lists(json.loads(path.read_text()))
        from safetensors.torch import load_file

        tensors = load_file(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{text!r} cannot be read: {error}") from error
    return tensors["values"] if "values" in tensors else [tensors[str(i)] for i in range(len(tensors))]


def _of_lists(values: Any) -> Any:
    try:
        return torch.tensor(values)
    except (ValueError, TypeError):
        return [torch.tensor(value) for value in values]


def save_output(field: Field, value: Any, path: str) -> None:
    """Save an output of a task where `path` says: a model's or dataset's folder, a tensor's file, or a file of bytes.

    Raises:
        ConfigError: If the kind of output cannot be saved there.
    """
    if isinstance(value, nn.Module):
        from iris_hf.models.hub import save_pretrained

        save_pretrained(value, path)
        return
    if hasattr(value, "hf_dataset"):
        value.hf_dataset.save_to_disk(path)
        return
    suffix = Path(path).suffix
    if isinstance(value, Tensor) and suffix == ".npy":
        np.save(path, value.numpy())
    elif suffix == ".safetensors" and _is_tensors(value):
        from safetensors.torch import save_file

        save_file({"values": value} if isinstance(value, Tensor) else {str(i): t for i, t in enumerate(value)}, path)
    elif isinstance(value, bytes):
        Path(path).write_bytes(value)
    elif suffix == ".json":
        Path(path).write_text(json.dumps(shown(value, limit=None)))
    else:
        kind = type(value).__name__
        raise ConfigError(
            f"{field.name} is a {kind}, which cannot be saved as {path!r}. Known: {', '.join(_TENSOR_FILES)}."
        )


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and all(isinstance(v, Tensor) for v in value))


def shown(value: Any, limit: int | None = 20) -> Any:
    """Return a JSON value for an output: all of it, or a description where it has more than `limit` numbers."""
    if isinstance(value, Tensor):
        if limit is not None and value.numel() > limit:
            return f"tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        return value.tolist()
    if isinstance(value, (list, tuple)):
        if limit is not None and len(value) > limit:
            return f"list of {len(value)}"
        return [shown(item, limit) for item in value]
    if isinstance(value, dict):
        return {key: shown(item, limit) for key, item in value.items()}
    return value if isinstance(value, (int, float, str, bool)) or value is None else type(value).__name__
