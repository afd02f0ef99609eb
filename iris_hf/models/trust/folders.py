"""What a model's folder from elsewhere must not do: run code, or load anything but the weights in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iris_hf.errors import DataError
from iris_hf.models.trust.configurations import CODE_KEYS, refuse_fetches
from iris_hf.models.trust.values import dicts_in, is_harmless, is_safetensors, read_object, would_load

_OF_PROCESSORS = ("config.json", "preprocessor_config.json", "processor_config.json")
_FILES_OF_PROCESSORS = ("repo_path", "class_info_file", "tesseract_config", "ocr_lang")
"""Fields from which image processors fetch or read files, or call another program."""

_PATHS_OF_TOKENIZERS = ("_file", "_files", "_spm", "_path", "_dir", "mecab_option")
_UNREAD = ("special_tokens_map_file", "name_or_path", "_name_or_path")


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
        ("byte_maps.json", ""),
    ):
        file = folder / name
        content = read_object(file) if file.is_file() else {}
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
            if own_tokenizer(folder, content) or not any(folder.glob("tokenizer.*json")):  # often the path of a cache
                content.pop("tokenizer_file", None)
            _refuse_other_vocabulary(content, file)
        elif name == "special_tokens_map.json":
            _refuse_other_than_tokens(content, file)
        elif name == "byte_maps.json":  # the vocabulary of MyT5, which reads a map from a path
            for key in (key for key, value in content.items() if isinstance(value, str)):
                raise would_load(file, key, content[key])
        if name in _OF_PROCESSORS:
            _refuse_other_processor(content, file)
    index = folder / "model.safetensors.index.json"
    shards = read_object(index).get("weight_map") if index.is_file() else {}
    if not isinstance(shards, dict):
        raise DataError(f"{str(index)!r} must hold a weight_map of names and files, got {shards!r}.")
    for shard in shards.values():
        if not is_safetensors(shard):
            outside = "are outside its folder" if Path(str(shard)).name != shard else "are no safetensors"
            raise DataError(f"{str(index)!r} names the weights {shard!r}, which {outside}.")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_object(adapter).get("base_model_name_or_path")
        raise DataError(
            f"{str(adapter)!r} describes an adapter, base_model_name_or_path={base!r}, and only what lies in the "
            "folder is loaded. Merge it into its model with peft, and save that into a folder of its own."
        )


def own_tokenizer(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The tokenizer.json of a folder, to be loaded whatever `tokenizer_file` its settings name.

    Args:
        folder: Where it is.
        settings: What tokenizer_config.json holds. None if it lists tokenizers for several versions.
    """
    file = folder / "tokenizer.json"
    return str(file) if file.is_file() and not settings.get("fast_tokenizer_files") else None


def _refuse_other_classes(content: Mapping[str, Any], file: Path) -> None:
    """Make sure that classes are what their keys say: transformers makes any class of its own from such a name."""
    from transformers import ImageProcessingMixin, PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    kinds = {
        "image_processor_type": ImageProcessingMixin,
        "feature_extractor_type": ImageProcessingMixin,
        "tokenizer_class": PreTrainedTokenizerBase,
    }
    for part, is_whole in dicts_in(content):
        for key in kinds.keys() & part.keys():
            name = part[key]
            if name is not None and not (isinstance(name, str) and _is_only(name, kinds[key], key)):
                raise would_load(file, key, name)
        model_type = part.get("model_type")
        of_type = TOKENIZER_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
        for name in filter(None, [of_type] if isinstance(of_type, str | None) else of_type):
            if not _is_only(name, PreTrainedTokenizerBase, "tokenizer_class"):
                raise would_load(file, "model_type", model_type)
        for key in () if is_whole else CODE_KEYS:
            if part.get(key):
                raise would_load(file, key, part[key])


def _is_only(name: str, kind: type, key: str) -> bool:
    """Whether a name leads transformers to nothing but a class of one kind, a stand-in for one, or nowhere."""
    import transformers
    from transformers.utils.import_utils import DummyObject

    stem = name.replace("FeatureExtractor", "ImageProcessor") if key == "feature_extractor_type" else name
    stem = re.sub(r"(Fast)+$", "", stem)  # 5.x takes off one after the other
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
            raise would_load(file, key, value)


def _refuse_other_vocabulary(content: Mapping[str, Any], file: Path) -> None:
    """Files are found by their names; transformers 4 takes paths from here instead, and writes templates by theirs."""
    for part, _ in dicts_in(content):
        for key, value in part.items():
            is_file = key.endswith(_PATHS_OF_TOKENIZERS) and key not in _UNREAD
            is_list_of_names = key == "fast_tokenizer_files" and isinstance(value, list) and is_harmless(value)
            is_path = key in ("vocab", "merges") and isinstance(value, str)
            if value and (key == "init_inputs" or is_path or (is_file and not is_list_of_names)):
                raise would_load(file, key, value)
    templates = content.get("chat_template")
    if isinstance(templates, list):
        templates = [template.get("name") if isinstance(template, dict) else template for template in templates]
    for name in templates if isinstance(templates, list | dict) else ():
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
            raise DataError(f"{str(file)!r} names a chat_template {name!r}, which is no name of a file in its folder.")


def _refuse_other_processor(content: Mapping[str, Any], file: Path) -> None:
    for part, _ in dicts_in(content):
        for key, value in part.items():
            # OneFormer's fetches the names of classes, whatever it is told.
            if (key in _FILES_OF_PROCESSORS and value) or str(value).startswith("OneFormer"):
                raise would_load(file, key, value)
