"""What a stored recipe must not do: name weights, tokenizers or configurations from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iris_hf.models.recipe import MODEL_KEY
from iris_hf.models.trust.configurations import refuse_fetches, refuse_hints
from iris_hf.models.trust.values import ELSEWHERE, PLAIN, dicts_in, would_load

HERE = "."
"""What a stored recipe calls its own folder."""

_NUMBERS_TOO = ("weights", "pretrained_window_sizes")
"""What may hold numbers, such as the weights of classes, which load nothing."""

_SCHEMES = ("hf-hub", "hf_hub", "local-dir")
"""What timm and open_clip put before the name of a repository or folder, and a colon behind."""

_HF_FACTORIES = ("create_hf_model", "create_hf_text_encoder")
_HF_CONFIGS = ("name_or_path", "hf_model_name")
_TOKENIZERS = ("tokenizer", "hf_tokenizer_name")


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
    arguments = value.get("arguments")
    if value.get("factory") in _HF_FACTORIES and isinstance(arguments, dict) and arguments.get("config"):
        raise would_load(file, "config", arguments["config"])  # ours hold the whole configuration, unchanged
    if value.get("factory") == "create_open_clip_model" and isinstance(arguments, dict):
        config = arguments.get("config")
        text = config.get("text_cfg") if isinstance(config, dict) else None
        if not isinstance(text, dict) or not {"hf_model_name", "hf_tokenizer_name"} <= text.keys():
            raise would_load(file, "name", arguments.get("name"))  # which may stand for repositories
    for key, item in value.items():
        if key in _TOKENIZERS and item in (None, HERE):
            continue
        if key in _HF_CONFIGS and isinstance(item, dict):
            refuse_fetches(item, file)
            refuse_hints(item, file)
            if any(MODEL_KEY in part for part, _ in dicts_in(item)):  # which would be made, of whatever it names
                raise would_load(file, key, item)
            continue
        other_tokenizer = key in _TOKENIZERS
        has_scheme = isinstance(item, str) and item.partition(":")[0].strip().lower() in _SCHEMES
        is_odd = key == "timm_model_name" and isinstance(item, str) and not PLAIN.fullmatch(item)
        loads = bool(item) and (key == "name_or_path" or "pretrained" in key or key in ELSEWHERE)
        if other_tokenizer or has_scheme or is_odd or (loads and not (key in _NUMBERS_TOO and _holds_numbers(item))):
            raise would_load(file, key, item)
        refuse_other_sources(item, file)


def _holds_numbers(value: Any) -> bool:
    """Whether a stored value is a number, or holds nothing else."""
    if isinstance(value, list | dict):
        return all(_holds_numbers(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not isinstance(value, bool)
