"""What a model's folder from elsewhere must not do: run code, or load anything but the weights in it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
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

_PLAIN = re.compile(r"[\w.+-]+")
"""A name that timm looks up among its own models and layers."""

KERNEL_KEYS = tuple(f"{part}_implementation{end}" for part in ("attn", "experts") for end in ("", "_internal"))
"""How fields of a configuration end that say which code computes attention and experts."""

_HF_FACTORIES = ("create_hf_model", "create_hf_text_encoder")
_HF_CONFIGS = ("name_or_path", "hf_model_name")
_TOKENIZERS = ("tokenizer", "hf_tokenizer_name")
_FETCHING_TYPES = ("edgetam", "lightglue", "xcodec")
"""Types whose configurations make transformers 4 fetch others."""

CODE_KEYS = ("auto_map", "custom_pipelines", "_auto_class")
"""Fields that name code: never run, and not passed on with what is saved."""


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: If it is none.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{str(file)!r} is no JSON: {error}") from error


def refuse_code(folder: Path) -> None:
    """Make sure that a folder names nothing but its own files, and types that transformers has itself.

    Raises:
        DataError: If a file names code of its own for an unknown type, or what would be loaded from elsewhere; if a
            shard of the weights is outside the folder or no safetensors; if an adapter stands for a model.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    for name, key in (
        ("config.json", "model_type"),
        ("preprocessor_config.json", "image_processor_type"),
        ("processor_config.json", ""),
        ("tokenizer_config.json", "tokenizer_class"),
        ("special_tokens_map.json", ""),
    ):
        file = folder / name
        content = _read_object(file) if file.is_file() else {}
        _refuse_other_classes(content, file)
        kind = str(content.get(key))
        is_known = kind in CONFIG_MAPPING if key == "model_type" else hasattr(transformers, kind)
        if key and "auto_map" in content and not is_known:
            raise DataError(
                f"{str(file)!r} names the {key} {kind!r}, which transformers does not have, and code of "
                "its own (auto_map), which is not run. If you trust it, load it with transformers and save it anew."
            )
        if name == "config.json":
            refuse_fetches(content, file)
        elif name == "tokenizer_config.json":
            if not (folder / "tokenizer.json").is_file():  # transformers ignores it then: often the path of a cache
                content.pop("tokenizer_file", None)
            _refuse_other_vocabulary(content, file)
        elif name == "special_tokens_map.json":
            _refuse_other_than_tokens(content, file)
        else:
            _refuse_other_processor(content, file)
    index = folder / "model.safetensors.index.json"
    shards = _read_object(index).get("weight_map") if index.is_file() else {}
    if not isinstance(shards, dict):
        raise DataError(f"{str(index)!r} must hold a weight_map of names and files, got {shards!r}.")
    for shard in shards.values():
        if not _is_safetensors(shard):
            outside = "are outside its folder" if Path(str(shard)).name != shard else "are no safetensors"
            raise DataError(f"{str(index)!r} names the weights {shard!r}, which {outside}.")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = _read_object(adapter).get("base_model_name_or_path")
        raise DataError(
            f"{str(adapter)!r} describes an adapter, base_model_name_or_path={base!r}, and only what lies in the "
            "folder is loaded. Merge it into its model with peft, and save that into a folder of its own."
        )


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
        raise _would_load(file, "configuration_files", values["configuration_files"])
    weights = values.get("transformers_weights")
    if weights is not None and not _is_safetensors(weights):
        raise _would_load(file, "transformers_weights", weights)
    for part, is_whole in _dicts_in(values):
        model_type = part.get("model_type")
        if not isinstance(model_type, str | None):
            raise DataError(f"{str(file)!r} holds the model_type {model_type!r}, which must be a string.")
        if str(model_type).startswith(_FETCHING_TYPES):
            raise _would_load(file, "model_type", model_type)
        for key, value in part.items():
            told = (
                (key == "trust_remote_code" and value)
                or (key == "attribute_map" and value)  # another name for any other key
                or (key == "auto_map" and value and not is_whole)  # of a part: transformers would ask whether to run it
                or (key in ("backbone", "architecture") and isinstance(value, str) and not _PLAIN.fullmatch(value))
                or (key in ("backbone_kwargs", "model_args") and not _is_harmless(value))
                or (key.endswith(KERNEL_KEYS) and "/" in json.dumps(value))
            )
            if told or (key == "quantization_config" and value is not None):
                raise _would_load(file, key, value)
        backbone = part.get("backbone")
        if isinstance(backbone, str) and part.get("backbone_config") is None and model_type != "timm_backbone":
            by_timm = part.get("use_timm_backbone", False)
            if "use_timm_backbone" not in part and model_type in CONFIG_MAPPING:
                by_timm = getattr(CONFIG_MAPPING[model_type](), "use_timm_backbone", True)  # 5.x: all by timm
            if not (is_whole and by_timm):  # transformers would ask the Hub for it
                raise _would_load(file, "backbone", backbone)


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{str(file)!r} must hold a JSON object, got a {type(content).__name__}.")
    return content


def _would_load(file: Path, key: str, value: object) -> DataError:
    return DataError(f"{str(file)!r} would load {key}={value!r}. Only what lies beside it is loaded.")


def _is_safetensors(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _dicts_in(value: Any, is_whole: bool = True) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every dict in JSON values, and whether it is the whole."""
    if isinstance(value, dict):
        yield value, is_whole
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dicts_in(item, False)


def _is_harmless(value: Any) -> bool:
    """Whether arguments of timm load nothing: they are numbers and plain words, and no weights are asked for."""
    if isinstance(value, dict):
        asks = [k for k, v in value.items() if v and ("pretrained" in k or k in (*_ELSEWHERE, "trust_remote_code"))]
        return not asks and all(map(_is_harmless, value.values()))
    if isinstance(value, list):
        return all(map(_is_harmless, value))
    return not isinstance(value, str) or _PLAIN.fullmatch(value) is not None


def _refuse_other_classes(content: Mapping[str, Any], file: Path) -> None:
    """Make sure that classes are what their keys say: transformers makes any class of its own from such a name."""
    from transformers import ImageProcessingMixin, PreTrainedTokenizerBase

    kinds = {
        "image_processor_type": ImageProcessingMixin,
        "feature_extractor_type": ImageProcessingMixin,
        "tokenizer_class": PreTrainedTokenizerBase,
    }
    for part, _ in _dicts_in(content):
        for key in kinds.keys() & part.keys():
            name = part[key]
            if name is not None and not (isinstance(name, str) and _is_only(name, kinds[key], key)):
                raise _would_load(file, key, name)


def _is_only(name: str, kind: type, key: str) -> bool:
    """Whether a name leads transformers to nothing but a class of one kind, a stand-in for one, or nowhere."""
    import transformers
    from transformers.utils.import_utils import DummyObject

    stem = name.replace("FeatureExtractor", "ImageProcessor") if key == "feature_extractor_type" else name
    stem = stem.removesuffix("Fast")
    for candidate in (stem, f"{stem}Fast" if key == "tokenizer_class" else f"{stem}Pil"):
        found = getattr(transformers, candidate, None)
        if found is None or isinstance(found, DummyObject):  # one that raises on any use
            continue
        reads_pickles = key == "tokenizer_class" and ".deprecated." in str(getattr(found, "__module__", ""))
        if reads_pickles or not (isinstance(found, type) and issubclass(found, kind)):
            return False
    return True


def _refuse_other_than_tokens(content: Mapping[str, Any], file: Path) -> None:
    """Make sure that only tokens are there: transformers takes them for arguments, paths of vocabularies included."""
    for key, value in content.items():
        if not key.endswith(("_token", "_special_tokens")):
            raise _would_load(file, key, value)


def _refuse_other_vocabulary(content: Mapping[str, Any], file: Path) -> None:
    """Files are found by their names; transformers 4 takes paths from here instead."""
    for part, _ in _dicts_in(content):
        for key, value in part.items():
            is_file = key.endswith(("_file", "_files", "_spm")) and key != "special_tokens_map_file"
            is_list_of_names = key == "fast_tokenizer_files" and isinstance(value, list) and _is_harmless(value)
            is_path = key in ("vocab", "merges") and isinstance(value, str)
            if value and (key == "init_inputs" or is_path or (is_file and not is_list_of_names)):
                raise _would_load(file, key, value)


def _refuse_other_processor(content: Mapping[str, Any], file: Path) -> None:
    for part, _ in _dicts_in(content):
        for key, value in part.items():
            if (key == "repo_path" and value) or str(value).startswith("OneFormer"):  # fetches the names of classes
                raise _would_load(file, key, value)


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
        raise _would_load(file, "config", arguments["config"])  # ours hold the whole configuration, unchanged
    if value.get("factory") == "create_open_clip_model" and isinstance(arguments, dict):
        config = arguments.get("config")
        text = config.get("text_cfg") if isinstance(config, dict) else None
        if not isinstance(text, dict) or not {"hf_model_name", "hf_tokenizer_name"} <= text.keys():
            raise _would_load(file, "name", arguments.get("name"))  # which may stand for repositories
    for key, item in value.items():
        if key in _TOKENIZERS and item in (None, HERE):
            continue
        if key in _HF_CONFIGS and isinstance(item, dict):
            refuse_fetches(item, file)
            _refuse_hints(item, file)
            continue
        other_tokenizer = key in _TOKENIZERS
        has_scheme = isinstance(item, str) and item.partition(":")[0].strip().lower() in _SCHEMES
        is_odd = key == "timm_model_name" and isinstance(item, str) and not _PLAIN.fullmatch(item)
        loads = bool(item) and (key == "name_or_path" or "pretrained" in key or key in _ELSEWHERE)
        if other_tokenizer or has_scheme or is_odd or (loads and not (key in _NUMBERS_TOO and _holds_numbers(item))):
            raise _would_load(file, key, item)
        refuse_other_sources(item, file)


def _refuse_hints(values: Mapping[str, Any], file: Path) -> None:
    """Ours hold none; those of config.json are left out as it is read."""
    for part, is_whole in _dicts_in(values):
        for key, value in part.items():
            if is_hint(key, value, is_whole=is_whole) and value:
                raise _would_load(file, key, value)


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


def _holds_numbers(value: Any) -> bool:
    """Whether a stored value is a number, or holds nothing else."""
    if isinstance(value, list | dict):
        return all(_holds_numbers(item) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not isinstance(value, bool)
