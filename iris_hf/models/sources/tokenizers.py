"""Tokenizers of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from iris_hf.errors import DataError
from iris_hf.models.sources.configurations import config_beside
from iris_hf.models.trust.configurations import CODE_KEYS
from iris_hf.models.trust.folders import own_tokenizer, refuse_code
from iris_hf.models.trust.values import read_object

_UNREAD = ("name_or_path", "special_tokens_map_file")
"""Where older versions wrote their files and folders. Nothing is read from there."""


def load_hf_tokenizer(folder: Path, wrap: Callable[..., Any] | None = None) -> Any:
    """Load the tokenizer in a folder, of its own files.

    Args:
        folder: Where it is.
        wrap: Loads it as `AutoTokenizer.from_pretrained` would, into an object that has it as `tokenizer`. That object
            is returned then.

    Raises:
        DataError: If something in it would run code or load anything else.
        Exception: Whatever transformers raises where there is no tokenizer.
    """
    from transformers import AutoTokenizer

    refuse_code(folder)
    file = folder / "tokenizer_config.json"
    settings = read_object(file) if file.is_file() else {}
    own = {"tokenizer_file": own_tokenizer(folder, settings)} if settings.get("tokenizer_file") else {}
    load = wrap or AutoTokenizer.from_pretrained
    loaded = load(folder, config=config_beside(folder), trust_remote_code=False, **own)
    tokenizer = loaded if wrap is None else loaded.tokenizer
    for settings in (tokenizer.init_kwargs, vars(tokenizer)):
        for key, value in settings.items():
            is_file = isinstance(value, str) and Path(value).is_absolute() and Path(value).is_file()
            if is_file and key not in _UNREAD and Path(value).absolute().parent != folder.absolute():
                raise DataError(f"The tokenizer in {str(folder)!r} reads {key}={value!r}, which is outside of it.")
    for key in CODE_KEYS:
        tokenizer.init_kwargs.pop(key, None)
        vars(tokenizer).pop(key, None)
    return loaded
