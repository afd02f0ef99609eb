"""Save a model into a folder and load it from a folder or the Hub: safetensors and JSON, never a pickle.

A model that wraps a transformers model becomes a plain transformers folder (config.json, model.safetensors,
preprocessor_config.json), which `AutoModelFor...` and `pipeline` load without iris_hf. Any other model becomes
`model.safetensors`. `iris_hf.json` beside them tells how the model was made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError
from iris_hf.models.recipe import build, recipe_of, to_json

_RECIPE_FILE, _WEIGHTS_FILE, _FORMAT = "iris_hf.json", "model.safetensors", 1
_FILES = ("*.json", "*.safetensors")


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a model into a folder, from which :func:`from_pretrained` makes one with bit-equal outputs.

    Args:
        model: Made by a function of iris_hf, or by one registered with
            :func:`iris_hf.models.recipe.register_model_factory`; trained or not.
        folder: Made if absent. A model that it held is replaced.

    Raises:
        ConfigError: If the model, or a part of it, was made otherwise.
    """
    from safetensors.torch import save_file

    from iris_hf.models.sources.transformers import hf_network, save_image_processor

    recipe = recipe_of(model)
    if recipe is None:
        raise ConfigError(
            f"Nothing tells how to make this {type(model).__name__} again. Make it by a function decorated with "
            "@register_model_factory('<name>') whose arguments are JSON values."
        )
    stored: dict[str, Any] = {"format": _FORMAT, **to_json(recipe)}
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for old in (*path.glob("model*.safetensors*"), *path.glob(_RECIPE_FILE)):
        old.unlink()
    network = hf_network(model)
    if network is not None:
        stored["arguments"].pop("name_or_path")  # it is config.json
        network.save_pretrained(path)
        save_image_processor(model, path)  # type: ignore[arg-type]
    else:
        state = {name: tensor.detach().contiguous() for name, tensor in _distinct(model).items()}
        save_file(state, path / _WEIGHTS_FILE, metadata={"format": "pt"})
    (path / _RECIPE_FILE).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def from_pretrained(folder_or_repo_id: str | Path) -> nn.Module:
    """Load a model that :func:`save_pretrained`, or plain transformers, wrote.

    Args:
        folder_or_repo_id: A local folder, or a repository of the Hub. Of a repository only JSON and safetensors are
            fetched.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ConfigError: If the folder names a factory that isn't registered.
        DataError: If the folder, its description or its weights are missing, unreadable, or don't fit each other.
    """
    from iris_hf.models.sources.transformers import check_weights, load_hf_model

    folder = _fetch(folder_or_repo_id)
    recipe_file = folder / _RECIPE_FILE
    if not recipe_file.is_file():
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{str(folder)!r} holds no model: neither {_RECIPE_FILE} nor the config.json of transformers is there."
            )
        return load_hf_model(folder).eval()
    stored = _read_recipe(recipe_file)
    check_weights(folder)
    if stored["factory"] == "create_hf_model":
        return load_hf_model(folder, **{k: v for k, v in stored["arguments"].items() if k != "pretrained"}).eval()
    model = build(stored)
    _load_weights(model, folder / _WEIGHTS_FILE)
    return model.eval()


def _fetch(folder_or_repo_id: str | Path) -> Path:
    path = Path(folder_or_repo_id)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder_or_repo_id), allow_patterns=list(_FILES)))
    except Exception as error:
        raise DataError(
            f"{str(folder_or_repo_id)!r} is no folder, and the Hub does not give such a repository: {error}"
        ) from error


def _read_recipe(file: Path) -> dict[str, Any]:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(stored, dict) or not {"format", "factory", "arguments"} <= stored.keys():
        raise DataError(f"{str(file)!r} does not describe a model: it needs format, factory and arguments.")
    if stored["format"] != _FORMAT:
        raise DataError(f"{str(file)!r} has the format {stored['format']!r}, this iris_hf reads {_FORMAT}. Update it.")
    return stored


def _distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model; of several names for one tensor the first."""
    seen: set[tuple[Any, ...]] = set()
    distinct = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        if key not in seen:
            seen.add(key)
            distinct[name] = tensor
    return distinct


def _load_weights(model: nn.Module, file: Path) -> None:
    from safetensors.torch import load_file

    if not file.is_file():
        raise DataError(f"{str(file.parent)!r} holds no {file.name}.")
    saved = load_file(file)
    own = _distinct(model)
    missing, superfluous = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    shapes = [
        f"{k} is {tuple(saved[k].shape)} instead of {tuple(own[k].shape)}"
        for k in sorted(own.keys() & saved.keys())
        if own[k].shape != saved[k].shape
    ]
    problems = [f"missing: {', '.join(missing[:3])}"] if missing else []
    problems += [f"superfluous: {', '.join(superfluous[:3])}"] if superfluous else []
    problems += shapes[:3]
    if problems:
        raise DataError(
            f"The weights in {str(file)!r} don't fit the model that {_RECIPE_FILE} describes. {'; '.join(problems)}."
        )
    variables = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in saved.items():
            variables[name].data = variables[name].data.to(tensor.dtype)
            variables[name].copy_(tensor)
