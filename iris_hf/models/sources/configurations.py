"""Configurations of transformers: read, changed, and made without fetching anything that they name."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iris_hf.errors import ConfigError, DataError, unknown_name

_OLD_FIELDS = ("backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone")  # still understood by 5.x


def is_stored(source: object, pretrained: bool) -> bool:
    """Whether a source means a repository or folder."""
    return isinstance(source, str | Path) and not _is_model_type(source, pretrained)


def _is_model_type(source: Any, pretrained: bool) -> bool:
    """Whether a name means a type of model, `vit`, and not a repository or folder: nothing is looked up then."""
    from transformers import CONFIG_MAPPING

    return not pretrained and str(source) in CONFIG_MAPPING


def describe_config(settings: Any) -> dict[str, Any]:
    """A configuration as JSON values, without the folders that it and its parts came from."""
    described: dict[str, Any] = json.loads(
        json.dumps(settings.to_dict(), default=lambda dtype: str(dtype).removeprefix("torch.")),
        object_hook=lambda part: {k: v for k, v in part.items() if k != "_name_or_path"},
    )
    return described


def make_config(source: Any, changes: Mapping[str, Any], *, pretrained: bool) -> Any:
    """The configuration that is asked for, as an object of our own."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    if not isinstance(changes, Mapping):
        raise ConfigError(f"config must be a mapping such as {{'image_size': 64}}, got {changes!r}.")
    changes = copy.deepcopy(dict(changes))
    if pretrained and not isinstance(source, str | Path):
        raise ConfigError("A configuration has no weights. Pass pretrained=False, or the name or folder of a model.")
    if isinstance(source, Mapping):
        values = copy.deepcopy(dict(source))
        model_type = values.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise unknown_name("model_type", model_type, CONFIG_MAPPING)
        if "transformers_version" not in values:
            _check_fields(CONFIG_MAPPING[model_type], values)
        settings = _configured(CONFIG_MAPPING[model_type], _settle_backbone(values, model_type))
    elif isinstance(source, transformers.PretrainedConfig):
        settings = copy.deepcopy(source)
    elif _is_model_type(source, pretrained):
        _check_fields(CONFIG_MAPPING[str(source)], changes)
        return _configured(CONFIG_MAPPING[str(source)], _settle_backbone(changes, str(source)))
    else:
        try:
            settings = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
        except (OSError, ValueError) as error:
            types = "" if pretrained else " It is no model type either."
            raise DataError(f"There is no configuration of transformers at {str(source)!r}: {error}{types}") from error
    if changes:
        _check_fields(type(settings), changes)
        settings = _configured(type(settings), {**settings.to_dict(), **changes})
    if getattr(settings, "use_pretrained_backbone", False):
        settings.use_pretrained_backbone = False  # the weights come from the model itself, or are to be random
    return settings


def _configured(kind: Any, values: dict[str, Any]) -> Any:
    with naming_the_config(kind.model_type):
        return kind.from_dict(values)


@contextmanager
def naming_the_config(model_type: str) -> Iterator[None]:
    """Say that it is the configuration which transformers or torch refuse, by whatever error of theirs."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ConfigError(
            f"transformers cannot make a {model_type!r} of this config: {type(error).__name__}: {error}"
        ) from error


def _settle_backbone(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Keep backbones from fetching weights of their own, and let a given backbone_config stand for itself."""
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[model_type]()
    settled: dict[str, Any] = {"use_pretrained_backbone": False}
    if "backbone_config" in values:
        settled.update(use_timm_backbone=False, backbone=None)
    return {k: v for k, v in settled.items() if hasattr(default, k)} | dict(values)


def _check_fields(config_type: Any, values: Mapping[str, Any]) -> None:
    default = config_type()
    known = {*default.to_dict(), *config_type.attribute_map, "num_labels", *_OLD_FIELDS}
    for name in values:
        if name not in known:
            raise unknown_name(f"field of the {config_type.model_type} configuration", name, known)
