"""Configurations of transformers: read, changed, and made without fetching anything that they name."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iris_hf.errors import ConfigError, DataError, IrisHFError, unknown_name
from iris_hf.models.pull import fetch
from iris_hf.models.trust.configurations import is_hint
from iris_hf.models.trust.folders import refuse_code
from iris_hf.models.trust.values import read_json

_OLD_FIELDS = ("backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone")  # still understood by 5.x


def _is_model_type(source: Any, pretrained: bool) -> bool:
    """Whether a name means a type of model, `vit`, and not a repository or folder: nothing is looked up then."""
    from transformers import CONFIG_MAPPING

    return not pretrained and str(source) in CONFIG_MAPPING


def describe_config(settings: Any) -> dict[str, Any]:
    """A configuration as JSON values, without the folders that it and its parts came from."""
    text = json.dumps(settings.to_dict(), default=lambda dtype: str(dtype).removeprefix("torch."))
    described: dict[str, Any] = _without_hints(json.loads(text))
    described.pop("_name_or_path", None)
    return described


def make_config(source: Any, changes: Mapping[str, Any], *, pretrained: bool) -> Any:
    """The configuration that is asked for, as an object of our own."""
    import transformers
    from transformers import CONFIG_MAPPING

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
        settings = _read_config(Path(source))
    if changes:
        _check_fields(type(settings), changes)
        settings = _configured(type(settings), {**settings.to_dict(), **changes})
    _resolve_backbone(settings)
    for part in _parts_of(settings):
        if getattr(part, "use_pretrained_backbone", False):
            part.use_pretrained_backbone = False  # the weights come from the model itself, or are to be random
    return settings


def fetch_stored(source: object, *, pretrained: bool, revision: str | None) -> Path | None:
    """The folder that a source means, fetched if it is a repository; it names nothing but its own files.

    A configuration or a type of model is in no folder: None.

    Raises:
        ConfigError: If a revision is asked of what has none, or the repository lacks it.
        DataError: If there is no such folder, or something in it would run code or load anything from elsewhere.
    """
    if not isinstance(source, str | Path) or _is_model_type(source, pretrained):
        if revision is not None:
            raise ConfigError(f"revision={revision!r} is for a repository of the Hub. Leave it out.")
        return None
    types = "" if pretrained else " It is no model type either."
    try:
        folder = fetch(source, revision=revision, local_files_only=False, weights=pretrained)
    except IrisHFError as error:
        if revision is not None:  # so a repository is meant, surely
            raise
        raise DataError(f"There is no configuration of transformers at {str(source)!r}: {error}{types}") from error
    if not (folder / "config.json").is_file():
        raise DataError(f"There is no configuration of transformers at {str(source)!r}: no config.json.{types}")
    refuse_code(folder)
    return folder


def config_beside(folder: Path) -> Any:
    """The configuration in a folder, read as that of a model is: transformers would read it anew, with all it names.

    A bare one if there is none, or none that tells its type: transformers would look for that in the folder's name.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    file = folder / "config.json"
    values = read_json(file) if file.is_file() else {}
    is_known = values.get("model_type") in CONFIG_MAPPING or "pretrained_cfg" in values
    return _read_config(folder) if is_known else PretrainedConfig()


def _read_config(folder: Path) -> Any:
    """The configuration in a folder, in which attention is what this transformers chooses unless eager or sdpa."""
    from transformers import CONFIG_MAPPING

    values = _without_hints(read_json(folder / "config.json"))
    _check_classes(values, folder / "config.json")
    model_type = values.pop("model_type", "timm_wrapper" if "pretrained_cfg" in values else None)
    if model_type == "timm_wrapper" and isinstance(values.get("model_args"), dict):
        values["model_args"].pop("num_classes", None)  # timm writes it, and transformers would give it twice
    try:
        if model_type not in CONFIG_MAPPING:
            raise unknown_name("model_type", model_type, CONFIG_MAPPING)
        return CONFIG_MAPPING[model_type].from_dict(_as_timm_backbone(values, model_type))
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        raise DataError(f"{str(folder / 'config.json')!r} is no configuration of transformers. {message}") from error


def _check_classes(values: Mapping[str, Any], file: Path) -> None:
    """Make sure that transformers can read the classes in a configuration, or the error names them."""
    names, count = values.get("id2label"), values.get("num_labels")
    if names is not None and not (
        isinstance(names, dict)
        and all(re.fullmatch(r"\d+", key) for key in names)
        and all(isinstance(name, str | int | float) for name in names.values())
    ):
        raise DataError(f"{str(file)!r} holds id2label={names!r}. It must give numbers names: {{'0': 'cat'}}.")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise DataError(f"{str(file)!r} holds num_labels={count!r}, which must be a whole number.")
    if names and count is not None and len(names) != count:
        raise DataError(
            f"{str(file)!r} holds num_labels={count}, and id2label names {len(names)} classes. Correct one."
        )


def _without_hints(value: Any, *, is_whole: bool = True) -> Any:
    """JSON values without what only says where they came from, which kernels a machine had, or what code is theirs."""
    if isinstance(value, list):
        return [_without_hints(item, is_whole=False) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_hints(item, is_whole=False)
        for key, item in value.items()
        if not is_hint(key, item, is_whole=is_whole)
    }


def _parts_of(settings: Any) -> Iterator[Any]:
    """A configuration and those in it."""
    from transformers import PretrainedConfig

    yield settings
    for part in vars(settings).values():
        if isinstance(part, PretrainedConfig):
            yield from _parts_of(part)


def _resolve_backbone(settings: Any) -> None:
    """Hold the configuration of a backbone that the caller names, as transformers 5 does: a saved model names none."""
    from transformers import AutoConfig

    name = getattr(settings, "backbone", None)
    if isinstance(name, str) and not getattr(settings, "use_timm_backbone", True) and settings.backbone_config is None:
        with naming_the_config(settings.model_type):
            arguments = {"trust_remote_code": False, **(getattr(settings, "backbone_kwargs", None) or {})}
            settings.backbone_config = AutoConfig.from_pretrained(name, **arguments)
        settings.backbone = settings.backbone_kwargs = None


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
    return {k: v for k, v in settled.items() if hasattr(default, k)} | _as_timm_backbone(values, model_type)


def _as_timm_backbone(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Name a backbone of timm as transformers 5 does: it would ask the Hub first whether that is a repository."""
    from transformers import CONFIG_MAPPING

    changed = dict(values)
    is_named = isinstance(values.get("backbone"), str) and values.get("backbone_config") is None
    if not is_named or model_type == "timm_backbone" or not values.get("use_timm_backbone", True):
        return changed
    default = CONFIG_MAPPING[model_type]()
    arguments = values.get("backbone_kwargs") or {}
    fills_in = getattr(getattr(default, "backbone_config", None), "model_type", None) == "timm_backbone"
    if hasattr(default, "use_timm_backbone") or (fills_in and not arguments):
        return changed
    for field in _OLD_FIELDS:
        changed.pop(field, None)
    return changed | {"backbone_config": {"model_type": "timm_backbone", "backbone": values["backbone"], **arguments}}


def _check_fields(config_type: Any, values: Mapping[str, Any]) -> None:
    default = config_type()
    known = {*default.to_dict(), *config_type.attribute_map, "num_labels", *_OLD_FIELDS}
    for name in values:
        if name not in known:
            raise unknown_name(f"field of the {config_type.model_type} configuration", name, known)
