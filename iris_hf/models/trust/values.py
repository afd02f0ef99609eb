"""What a folder's JSON files hold, and which of that is only data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iris_hf.errors import DataError

PLAIN = re.compile(r"[\w.+-]+")
"""A name that timm looks up among its own models and layers."""

ELSEWHERE = ("weights", "checkpoint_path", "cache_dir", "hf_model_name", "hf_tokenizer_name")
"""Arguments that name what timm and open_clip load."""


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: If it is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{str(file)!r} is no JSON: {error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: If it is none.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{str(file)!r} must hold a JSON object, got a {type(content).__name__}.")
    return content


def would_load(file: Path, key: str, value: object) -> DataError:
    """The error of a file with a field for which something else would be loaded."""
    return DataError(f"{str(file)!r} would load {key}={value!r}. Only what lies beside it is loaded.")


def is_safetensors(name: object) -> bool:
    """Whether a value is the name of a safetensors file, without a folder."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def dicts_in(value: Any, is_whole: bool = True) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every dict in JSON values, and whether it is the whole."""
    if isinstance(value, dict):
        yield value, is_whole
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from dicts_in(item, False)


def is_harmless(value: Any) -> bool:
    """Whether arguments of timm load nothing: they are numbers and plain words, and no weights are asked for."""
    if isinstance(value, dict):
        asks = [k for k, v in value.items() if v and ("pretrained" in k or k in (*ELSEWHERE, "trust_remote_code"))]
        return not asks and all(map(is_harmless, value.values()))
    if isinstance(value, list):
        return all(map(is_harmless, value))
    return not isinstance(value, str) or PLAIN.fullmatch(value) is not None
