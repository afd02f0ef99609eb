"""What a model's folder from elsewhere must not do: run code, or load anything but the weights in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from iris_hf.errors import DataError

HERE = "."
"""What a stored recipe calls its own folder."""

_ELSEWHERE = ("weights", "checkpoint_path", "cache_dir", "hf_model_name", "hf_tokenizer_name")
_NUMBERS_TOO = ("weights", "pretrained_window_sizes")
"""What may hold numbers, such as the weights of classes, which load nothing."""

_SCHEMES = ("hf-hub", "hf_hub", "local-dir")
"""What timm and open_clip put before the name of a repository or folder, and a colon behind."""


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: If it is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{str(file)!r} is no JSON: {error}") from error


def refuse_code(folder: Path) -> None:
    """Make sure that everything in a folder of transformers is of a type that transformers has itself.

    Raises:
        DataError: If a file names code of its own for an unknown type, or a shard of the weights outside the folder.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    for name, key in (
        ("config.json", "model_type"),
        ("preprocessor_config.json", "image_processor_type"),
        ("tokenizer_config.json", "tokenizer_class"),
    ):
        file = folder / name
        content = read_json(file) if file.is_file() else {}
        if not isinstance(content, dict):
            raise DataError(f"{str(file)!r} must hold a JSON object, got a {type(content).__name__}.")
        kind = str(content.get(key))
        is_known = kind in CONFIG_MAPPING if key == "model_type" else hasattr(transformers, kind)
        if "auto_map" in content and not is_known:
            raise DataError(
                f"{str(file)!r} names the {key} {kind!r}, which transformers does not have, and code of "
                "its own (auto_map), which is not run. If you trust it, load it with transformers and save it anew."
            )
    index = folder / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map", {}).values() if index.is_file() else ()
    for shard in shards:
        if Path(str(shard)).name != shard:
            raise DataError(f"{str(index)!r} names the weights {shard!r}, which are outside its folder.")


def refuse_other_sources(value: Any, file: Path) -> None:
    """Make sure that a recipe loads nothing: what it describes gets the weights and the tokenizer beside it.

    Args:
        value: The recipe as stored, or a part of it.
        file: Where it comes from, for the message.

    Raises:
        DataError: If it names weights, a tokenizer, a repository or another folder.
    """
    if isinstance(value, list):
        for item in value:
            refuse_other_sources(item, file)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == "name_or_path" and isinstance(item, dict):
            continue  # a whole configuration of transformers, which loads nothing
        other_tokenizer = key == "tokenizer" and item not in (None, HERE)
        has_scheme = isinstance(item, str) and item.partition(":")[0].lower() in _SCHEMES
        loads = bool(item) and (key == "name_or_path" or "pretrained" in key or key in _ELSEWHERE)
        if other_tokenizer or has_scheme or (loads and not (key in _NUMBERS_TOO and _holds_numbers(item))):
            raise DataError(f"{str(file)!r} would load {key}={item!r}. Only what lies beside it is loaded.")
        refuse_other_sources(item, file)


def _holds_numbers(value: Any) -> bool:
    """Whether a stored value is a number, or holds nothing else."""
    if isinstance(value, list | dict):
        return all(_holds_numbers(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not isinstance(value, bool)
