"""Text towers and tokenizers of transformers in models of open_clip, described by more than a repository's name."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iris_hf.errors import ConfigError, DataError, IrisHFError, require_integer, unknown_name
from iris_hf.models.sources.configurations import describe_config, fetch_stored, make_config
from iris_hf.models.sources.packaged import resolve_packaged
from iris_hf.models.sources.tokenizers import load_hf_tokenizer
from iris_hf.models.sources.weights import check_weights
from iris_hf.models.trust.recipes import HERE
from iris_hf.models.trust.values import read_json

OPTIONS_FILE = "tokenizer_open_clip.json"
"""What says, beside a tokenizer of transformers, how open_clip uses it."""

_FIELDS = ("context_length", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")
_OPTIONS = ("clean", "language", "strip_sep_token")
_OWN_TOKENIZER = "ViT-B-32"  # has open_clip's own, which all architectures share
_POOLERS = ("cls_last_hidden_state_pooler", "cls_pooler", "mean_pooler")  # max_pooler takes a mask that torch refuses
_PRECISIONS = ("dtype", "torch_dtype")


def is_open_clip(name: str) -> bool:
    """Whether open_clip knows an architecture of that name."""
    import open_clip

    return name in open_clip.list_models()


def comes_with_open_clip(tokenizer_name: str) -> bool:
    """Whether a tokenizer needs no file but those of open_clip itself."""
    return is_open_clip(tokenizer_name) and not tokenizer_fields(tokenizer_name)["hf_tokenizer_name"]


def settle_text_tower(text_cfg: Mapping[str, Any], place: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find the configuration of a text tower of transformers, in place of the name of a repository.

    Args:
        text_cfg: As open_clip has it. Its `hf_model_name` is a repository, a folder, or a configuration as
            :func:`iris_hf.create_hf_text_encoder` takes it; `hf_model_pretrained` whether its weights are loaded, too.
        place: An empty folder for the configuration.

    Returns:
        What open_clip makes the tower of, and what a recipe holds: the whole configuration and no names.

    Raises:
        ConfigError: If open_clip has no tower of that type, or no such pooler.
        DataError: If the configuration or the weights cannot be had.
    """
    from open_clip.hf_configs import arch_dict
    from transformers import PretrainedConfig

    made = copy.deepcopy(dict(text_cfg))
    weights = bool(made.setdefault("hf_model_pretrained", False))
    stored = made | {"hf_model_name": None, "hf_model_pretrained": False}
    stored["hf_tokenizer_name"] = HERE if made.get("hf_tokenizer_name") else None
    source: Any = made.get("hf_model_name")
    if not source:
        return made, stored
    if isinstance(source, str):
        source = resolve_packaged(source)
    if not isinstance(source, str | Path | Mapping | PretrainedConfig):
        raise ConfigError(f"hf_model_name must be a repository, a folder or a configuration, got {source!r}.")
    folder = fetch_stored(source, pretrained=weights, revision=None)
    settings = make_config(folder or source, {}, pretrained=weights)
    if made.get("hf_pooler_type", _POOLERS[0]) not in (*_POOLERS, None):
        raise unknown_name("hf_pooler_type", made["hf_pooler_type"], _POOLERS)
    if settings.model_type not in arch_dict:
        raise unknown_name("type of a text tower of open_clip", settings.model_type, arch_dict)
    description = {k: v for k, v in describe_config(settings).items() if k not in _PRECISIONS}
    if folder is not None and weights:
        check_weights(folder)
        place = folder
    else:
        (place / "config.json").write_text(json.dumps(description), encoding="utf-8")
    return made | {"hf_model_name": str(place)}, stored | {"hf_model_name": description}


def name_tokenizer(name: str, text_cfg: Mapping[str, Any]) -> str:
    """The name that :func:`iris_hf.create_tokenizer` understands for the tokenizer of a model.

    Raises:
        ConfigError: If an option is unknown, or the tokenizer has to come from elsewhere, but its name is missing.
    """
    fields = _fields_of(text_cfg)
    source, options = fields["hf_tokenizer_name"], fields["tokenizer_kwargs"]
    if not source and (options or "siglip" in name.lower()):
        why = f"the options {options}" if options else f"a name like {name!r}"
        raise ConfigError(f"text_cfg needs hf_tokenizer_name, the repository or folder of a tokenizer, with {why}.")
    _check_options(options)
    if source == HERE:
        return HERE
    if is_open_clip(name) and _without_length(fields) == _without_length(tokenizer_fields(name)):
        return name
    return json.dumps({k: v for k, v in fields.items() if v is not None}) if source else _OWN_TOKENIZER


def tokenizer_fields(name: str) -> dict[str, Any]:
    """What open_clip's configuration tells of the tokenizer of an architecture, or what :func:`name_tokenizer` gave."""
    import open_clip

    return _fields_of(json.loads(name) if name.startswith("{") else open_clip.get_model_config(name)["text_cfg"])


def load_tokenizer(folder: Path, fields: Mapping[str, Any]) -> Any:
    """Load open_clip's wrapper of the tokenizer of transformers in a folder.

    Raises:
        ConfigError: If transformers finds no tokenizer, or an option is wrong.
        DataError: If something in the folder would run code or load anything else.
    """
    from open_clip.tokenizer import HFTokenizer

    options = fields["tokenizer_kwargs"] or {}
    _check_options(options)
    wrap = functools.partial(
        HFTokenizer, context_length=fields["context_length"], tokenizer_mode=fields["tokenizer_mode"], **options
    )
    try:
        return load_hf_tokenizer(folder, wrap)
    except DataError:
        raise
    except Exception as error:
        raise ConfigError(
            f"open_clip finds no tokenizer in {str(folder)!r}: {type(error).__name__}: {error}"
        ) from error


def write_options(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write beside a tokenizer how open_clip uses it."""
    told = {k: v for k, v in fields.items() if v is not None and k != "hf_tokenizer_name"}
    (folder / OPTIONS_FILE).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def read_options(folder: Path) -> dict[str, Any] | None:
    """Read what :func:`write_options` wrote; None if the tokenizer is none of open_clip's.

    Raises:
        DataError: If it is damaged, or would load anything else.
    """
    file = folder / OPTIONS_FILE
    if not file.is_file():
        return None
    told = read_json(file)
    try:
        if not isinstance(told, dict) or not told.keys() <= {*_FIELDS} - {"hf_tokenizer_name"}:
            raise ConfigError(f"got {told!r}.")
        _check_options(told.get("tokenizer_kwargs"))
        require_integer("context_length", told.get("context_length"), at_least=1)
    except IrisHFError as error:
        raise DataError(f"{str(file)!r} does not describe a tokenizer: {error}") from error
    return _fields_of(told)


def _fields_of(text_cfg: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: text_cfg.get(name) or None for name in _FIELDS}
    if fields["hf_tokenizer_name"] is not None:
        fields["hf_tokenizer_name"] = str(fields["hf_tokenizer_name"])
    return fields


def _without_length(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A model knows its own."""
    return {k: v for k, v in fields.items() if k != "context_length"}


def _check_options(options: Any) -> None:
    if not isinstance(options, Mapping | None):
        raise ConfigError(f"tokenizer_kwargs must be a mapping, got {options!r}.")
    for option in options or {}:
        if option not in _OPTIONS:
            raise unknown_name("option of a tokenizer of open_clip (tokenizer_kwargs)", option, _OPTIONS)
