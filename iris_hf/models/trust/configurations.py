"""What a configuration of transformers must not do: load anything but what it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iris_hf.errors import DataError
from iris_hf.models.trust.values import PLAIN, dicts_in, is_harmless, is_safetensors, would_load

KERNEL_KEYS = tuple(f"{part}_implementation{end}" for part in ("attn", "experts") for end in ("", "_internal"))
"""How fields of a configuration end that say which code computes attention and experts."""

CODE_KEYS = ("auto_map", "_auto_map", "custom_pipelines", "_auto_class")
"""Fields that name code: never run, and not passed on with what is saved."""

_FETCHING_TYPES = ("edgetam", "lightglue", "xcodec")
"""Types whose configurations make transformers 4 fetch others."""


def refuse_fetches(values: Mapping[str, Any], file: Path) -> None:
    """Make sure that a configuration of transformers, from a file, is data: nothing else is loaded because of it.

    Weights that a backbone would fetch for itself don't count: they are switched off wherever a configuration is read.

    Args:
        values: The configuration.
        file: Where it comes from, for the message.

    Raises:
        DataError: If it names a repository, another folder, code or a file of weights that transformers would load, or
            gives keys other names.
    """
    from transformers import CONFIG_MAPPING

    if values.get("configuration_files"):
        raise would_load(file, "configuration_files", values["configuration_files"])
    weights = values.get("transformers_weights")
    if weights is not None and not is_safetensors(weights):
        raise would_load(file, "transformers_weights", weights)
    for part, is_whole in dicts_in(values):
        model_type = part.get("model_type")
        if not isinstance(model_type, str | None):
            raise DataError(f"{str(file)!r} holds the model_type {model_type!r}, which must be a string.")
        if str(model_type).startswith(_FETCHING_TYPES):
            raise would_load(file, "model_type", model_type)
        for key, value in part.items():
            told = (
                (key == "trust_remote_code" and value)
                or (key == "attribute_map" and value)  # another name for any other key
                or (key == "auto_map" and value and not is_whole)  # of a part: transformers would ask whether to run it
                or (key in ("backbone", "architecture") and isinstance(value, str) and not PLAIN.fullmatch(value))
                or (key in ("backbone_kwargs", "model_args") and not is_harmless(value))
                or (key.endswith(KERNEL_KEYS) and "/" in json.dumps(value))
            )
            if told or (key == "quantization_config" and value is not None):
                raise would_load(file, key, value)
        backbone = part.get("backbone")
        if isinstance(backbone, str) and part.get("backbone_config") is None and model_type != "timm_backbone":
            by_timm = part.get("use_timm_backbone", False)
            if "use_timm_backbone" not in part and model_type in CONFIG_MAPPING:
                by_timm = getattr(CONFIG_MAPPING[model_type](), "use_timm_backbone", True)  # 5.x: all by timm
            if not (is_whole and by_timm):  # transformers would ask the Hub for it
                raise would_load(file, "backbone", backbone)


def refuse_hints(values: Mapping[str, Any], file: Path) -> None:
    """Ours hold none; those of config.json are left out as it is read."""
    for part, is_whole in dicts_in(values):
        for key, value in part.items():
            if is_hint(key, value, is_whole=is_whole) and value:
                raise would_load(file, key, value)


def is_hint(key: str, value: object, *, is_whole: bool) -> bool:
    """Whether a field only says where a configuration came from, which kernels a machine had, or which code is its own.

    Such are left out where one is read or stored.

    Args:
        key: The name of the field.
        value: Its value.
        is_whole: Whether it is a field of the whole configuration, or of a part, which some types load from there.
    """
    is_kernel = key.endswith(KERNEL_KEYS) and value not in ("eager", "sdpa")
    return is_kernel or key in CODE_KEYS or (key == "_name_or_path" and not is_whole)
