"""Values on the command line: what a path stands for, and how an output is saved."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, get_origin

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from iris_hf.errors import ConfigError, DataError
from iris_hf.tasks import Field, union_members

logger = logging.getLogger(__name__)

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
        tensors = load_file(path)
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise DataError(f"{text!r} cannot be read: {error}") from error
    if "values" in tensors:
        return tensors["values"]
    numbers = [str(i) for i in range(len(tensors))]
    if set(numbers) != set(tensors):
        raise DataError(
            f"{text!r} holds the tensors {', '.join(sorted(tensors))}. Name one tensor 'values', or the tensors of a "
            "list '0', '1' and so on."
        )
    return [tensors[number] for number in numbers]


def _of_lists(values: Any) -> Any:
    if not isinstance(values, list):
        raise ValueError(f"it holds no list but {type(values).__name__}")
    try:
        return torch.tensor(values)
    except (ValueError, TypeError):
        return [torch.tensor(value) for value in values]


def check_output_path(field: Field, path: str) -> None:
    """Check where an output is to be saved, before the task runs, as far as its type tells.

    Args:
        field: The output.
        path: What the command line gave.

    Raises:
        ConfigError: If no output of this kind can be saved there.
    """
    members = [get_origin(member) or member for member in union_members(field.annotation)]
    kinds = [member for member in members if isinstance(member, type) and member is not Any]
    if any(issubclass(kind, (nn.Module, Dataset)) for kind in kinds):
        if Path(path).is_file():
            raise ConfigError(f"{field.name} is saved in a folder, but {path!r} is a file.")
        return
    known = (".json",) if kinds and Tensor not in kinds else _TENSOR_FILES
    if bytes not in kinds and Path(path).suffix not in known:
        raise ConfigError(f"{field.name} cannot be saved as {path!r}. Known: {', '.join(known)}.")
    if not Path(path).parent.is_dir():
        raise ConfigError(f"There is no folder {str(Path(path).parent)!r} to save {field.name} in.")


def save_output(field: Field, value: Any, path: str) -> str:
    """Save an output of a task where `path` says: a model's or dataset's folder, a tensor's file, or a file of bytes.

    Returns:
        Where it is. What turns out not to fit into the kind of file is not lost, but in a `.json` file beside.
    """
    if isinstance(value, nn.Module):
        from iris_hf.models.hub import save_pretrained

        save_pretrained(value, path)
        return path
    if hasattr(value, "hf_dataset"):
        value.hf_dataset.save_to_disk(path)
        return path
    suffix = Path(path).suffix
    if isinstance(value, Tensor) and suffix == ".npy":
        np.save(path, value.numpy())
    elif suffix == ".safetensors" and _is_tensors(value):
        from safetensors.torch import save_file

        save_file({"values": value} if isinstance(value, Tensor) else {str(i): t for i, t in enumerate(value)}, path)
    elif isinstance(value, bytes):
        Path(path).write_bytes(value)
    else:
        if suffix != ".json":
            logger.warning("%s is a %s, which a file %r cannot hold.", field.name, type(value).__name__, suffix)
            path += ".json"
        Path(path).write_text(json.dumps(shown(value, limit=None)))
    return path


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
