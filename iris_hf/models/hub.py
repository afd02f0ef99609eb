"""Save a model into a folder and load it from a folder or the Hub: safetensors and JSON, never a pickle.

A model that wraps a transformers model becomes a plain transformers folder (config.json, model.safetensors,
preprocessor_config.json), which `AutoModelFor...` and `pipeline` load without iris_hf. Any other model becomes
`model.safetensors`. `iris_hf.json` beside them tells how the model was made.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError, IrisHFError
from iris_hf.models.pull import fetch
from iris_hf.models.recipe import build, recipe_of, to_json
from iris_hf.models.trust.folders import refuse_code
from iris_hf.models.trust.recipes import HERE, refuse_other_sources
from iris_hf.models.trust.values import read_json

_RECIPE_FILE, _WEIGHTS_FILE, _FORMAT = "iris_hf.json", "model.safetensors", 1
_TOKENIZER_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
"""What transformers writes for a tokenizer."""

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_OF_A_MODEL = ("model*.safetensors*", "pytorch_model*.bin*", _RECIPE_FILE)
MODEL_FILES = (
    *(*_OF_A_MODEL, "config.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *TOKENIZER_FILES,
)
"""What iris_hf and transformers write for a model."""

EXPORT_FILE = "iris_hf_onnx.json"
"""What describes an export to ONNX, in place of a recipe."""


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write a model into a folder, from which :func:`from_pretrained` makes one with bit-equal outputs.

    Args:
        model: Made by a function of iris_hf, or by one registered with
            :func:`iris_hf.models.recipe.register_model_factory`; trained or not.
        folder: Made if absent. A model that it held is replaced with all of its files, once the new one is written;
            other files stay. The image processor and the tokenizer go there, too, where the model has one of
            transformers; the configuration of open_clip's text tower of transformers is in `iris_hf.json`.

    Raises:
        ConfigError: If the model, or a part of it, was made otherwise, its tokenizer cannot be had, or the folder holds
            an export to ONNX, whose configuration and preprocessor have the same names.
        DataError: If an argument of its making names what would be loaded from elsewhere, such as `weights`.
    """
    from safetensors.torch import save_file

    from iris_hf.models.sources.transformers import hf_network, save_image_processor

    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {model!r}.")
    if not isinstance(folder, (str, Path)) or Path(folder).is_file():
        raise ConfigError(f"A model is saved in a folder, not as {str(folder)!r}.")
    recipe = recipe_of(model)
    if recipe is None:
        raise ConfigError(
            f"Nothing tells how to make this {type(model).__name__} again. Make it by a function decorated with "
            "@register_model_factory('<name>') whose arguments are JSON values."
        )
    stored: dict[str, Any] = {"format": _FORMAT, **to_json(recipe)}
    path = Path(folder)
    if (path / EXPORT_FILE).is_file():
        raise ConfigError(
            f"{str(folder)!r} holds an export to ONNX, and files of the same names would describe both. Save the model "
            f"in another folder, or export it to {str(path / 'onnx')!r}."
        )
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".iris_hf-", dir=path) as temporary:
        new = Path(temporary)
        if save_tokenizer(model, new):
            stored = _point_here(stored)
        network = hf_network(model)
        if network is not None:
            stored["arguments"].pop("name_or_path")  # it is config.json
            network.save_pretrained(new)
            save_image_processor(model, new)  # type: ignore[arg-type]
        else:
            state = {name: tensor.detach().contiguous() for name, tensor in _distinct(model).items()}
            save_file(state, new / _WEIGHTS_FILE, metadata={"format": "pt"})
        refuse_other_sources(stored, path / _RECIPE_FILE)  # as it would be on loading
        (new / _RECIPE_FILE).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        _remove_model(path)
        for file in new.iterdir():
            file.replace(path / file.name)


def from_pretrained(
    folder_or_repo_id: str | Path, *, revision: str | None = None, local_files_only: bool = False
) -> nn.Module:
    """Load a model that :func:`save_pretrained`, or plain transformers, wrote.

    Nothing is unpickled, and no code runs but that of iris_hf, its libraries and registered factories. A tokenizer that
    was saved with the model becomes its `tokenizer_name`.

    Args:
        folder_or_repo_id: A local folder, or a repository of the Hub. Of a repository only the description, the
            safetensors that transformers would load and the tokenizer's files are fetched, into the cache of
            huggingface_hub; its token (`hf auth login`, or HF_TOKEN) opens private ones.
        revision: A branch, tag or commit of the repository; None is `main`.
        local_files_only: Whether to take the repository from the cache without asking the Hub. HF_HUB_OFFLINE=1 does
            that, too.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ConfigError: If the folder names a factory that isn't registered, or the repository lacks the revision.
        DataError: If the repository cannot be had, or the folder, its description or its weights are missing,
            unreadable, or don't fit each other. If the folder holds an export, which `load_onnx` loads.
    """
    folder = fetch(folder_or_repo_id, revision=revision, local_files_only=local_files_only)
    model = _load(folder).eval()
    beside = str(folder) if (folder / _TOKENIZER_FILE).is_file() else None
    for part in _parts_with_tokenizer(model):
        if beside is not None or part.tokenizer_name == HERE:
            part.tokenizer_name = beside  # type: ignore[assignment]
    return model


def refuse_model(folder: Path) -> None:
    """Make sure that a folder for an export to ONNX holds no model.

    Raises:
        ConfigError: If it does: files of the same names describe both.
    """
    if any(True for pattern in _OF_A_MODEL for _ in folder.glob(pattern)):
        raise ConfigError(
            f"{str(folder)!r} holds a model, and files of the same names would describe both it and an export to ONNX. "
            f"Export to another folder, such as {str(folder / 'onnx')!r}."
        )


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export to ONNX, and no model that :func:`from_pretrained` loads."""
    return (folder / EXPORT_FILE).is_file() and not (folder / _RECIPE_FILE).is_file()


def _load(folder: Path) -> nn.Module:
    from iris_hf.models.sources.text_encoders import load_hf_text_encoder
    from iris_hf.models.sources.transformers import load_hf_model
    from iris_hf.models.sources.weights import check_weights

    recipe_file = folder / _RECIPE_FILE
    if is_export(folder):
        raise DataError(f"{str(folder)!r} holds an export to ONNX: load it with load_onnx.")
    if not recipe_file.is_file():
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{str(folder)!r} holds no model: neither {_RECIPE_FILE} nor the config.json of transformers is there."
            )
        try:
            return load_hf_model(folder)
        except IrisHFError:
            raise
        except Exception as error:
            raise DataError(
                f"{str(folder)!r} describes no model that can be made: {type(error).__name__}: {error}"
            ) from error
    stored = _read_recipe(recipe_file)
    refuse_code(folder)
    check_weights(folder)
    loaders: dict[str, Callable[..., nn.Module]] = {
        "create_hf_model": load_hf_model,
        "create_hf_text_encoder": load_hf_text_encoder,
    }
    load = loaders.get(stored["factory"])
    try:
        if load is not None:
            return load(folder, **{k: v for k, v in stored["arguments"].items() if k != "pretrained"})
        model = build(stored)
    except IrisHFError:
        raise
    except Exception as error:
        raise DataError(f"{str(recipe_file)!r} describes no model that can be made: {error}") from error
    _load_weights(model, folder / _WEIGHTS_FILE)
    return model


def _remove_model(folder: Path) -> None:
    """Remove what another model left, if the folder holds one: a config.json may be of something else."""
    content = None
    with contextlib.suppress(DataError):
        content = read_json(folder / "config.json")
    held = (folder / _RECIPE_FILE).is_file() or (isinstance(content, dict) and "model_type" in content)
    for pattern in MODEL_FILES if held else ("model*.safetensors*",):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)


def _read_recipe(file: Path) -> dict[str, Any]:
    stored = read_json(file)
    if not isinstance(stored, dict) or not {"format", "factory", "arguments"} <= stored.keys():
        raise DataError(f"{str(file)!r} does not describe a model: it needs format, factory and arguments.")
    if stored["format"] != _FORMAT:
        raise DataError(f"{str(file)!r} has the format {stored['format']!r}, this iris_hf reads {_FORMAT}. Update it.")
    refuse_other_sources(stored, file)
    return stored


def _parts_with_tokenizer(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that name a tokenizer of transformers; open_clip brings its own."""
    from iris_hf.models.sources.open_clip_text import comes_with_open_clip

    parts = [m for m in model.modules() if isinstance(m.__dict__.get("tokenizer_name"), str)]
    return [m for m in parts if not comes_with_open_clip(str(m.tokenizer_name))]


def save_tokenizer(model: nn.Module, folder: Path) -> bool:
    """Write the tokenizer of transformers that a model names; tell whether there is one.

    Raises:
        ConfigError: If it cannot be had, or the model has several.
    """
    from iris_hf.models.sources.open_clip import create_tokenizer

    parts = {str(part.tokenizer_name): part for part in _parts_with_tokenizer(model)}
    if len(parts) > 1:
        raise ConfigError(f"A folder holds one tokenizer, and this model has several: {', '.join(sorted(parts))}.")
    for part in parts.values():
        create_tokenizer(part).save(folder)
    return bool(parts)


def _point_here(value: Any) -> Any:
    """Name the recipe's own folder where it names a tokenizer: the saved one is there, wherever it came from."""
    if isinstance(value, list):
        return [_point_here(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: HERE if k == "tokenizer" and v is not None else _point_here(v) for k, v in value.items()}


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
    types = [
        f"{k} is {saved[k].dtype} instead of {own[k].dtype}"
        for k in sorted(own.keys() & saved.keys())
        if own[k].is_floating_point() != saved[k].is_floating_point()
        or (saved[k].is_floating_point() and saved[k].dtype not in {own[k].dtype, *_FLOATS})
    ]
    problems = [f"missing: {', '.join(missing[:3])}"] if missing else []
    problems += [f"superfluous: {', '.join(superfluous[:3])}"] if superfluous else []
    problems += shapes[:3] + types[:3]
    if problems:
        raise DataError(
            f"The weights in {str(file)!r} don't fit the model that {_RECIPE_FILE} describes. {'; '.join(problems)}."
        )
    variables = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in saved.items():
            variables[name].data = variables[name].data.to(tensor.dtype)
            variables[name].copy_(tensor)
