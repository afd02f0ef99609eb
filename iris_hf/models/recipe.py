"""How a model was made: the name of a function and JSON arguments, from which it can be made again.

Every model made by iris_hf carries a recipe; :mod:`iris_hf.models.hub` stores it beside the weights. Nothing is
pickled, and nothing runs on loading but functions that were registered here by name.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from torch import nn

from iris_hf.errors import ConfigError, unknown_name

P = ParamSpec("P")
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_FACTORIES: dict[str, Callable[..., nn.Module]] = {}
_BUILT_IN = {
    "append_classifier": "iris_hf.models.classifier",
    "create_hf_model": "iris_hf.models.sources.transformers",
    "create_hf_text_encoder": "iris_hf.models.sources.text_encoders",
    "create_open_clip_model": "iris_hf.models.sources.open_clip",
    "create_timm_model": "iris_hf.models.sources.timm",
    "make_feature_extractor_model": "iris_hf.models.feature_extractor",
    "make_image_text_contrastive_model": "iris_hf.models.contrastive",
    "split_tower": "iris_hf.models.contrastive",
}
_LAYERS: dict[str, tuple[str, ...]] = {
    "BatchNorm1d": ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    "Dropout": ("p",),
    "Flatten": ("start_dim", "end_dim"),
    "GELU": ("approximate",),
    "Identity": (),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine"),
    "Linear": ("in_features", "out_features"),
    "ReLU": (),
    "Sequential": (),
    "SiLU": (),
    "Tanh": (),
}
MODEL_KEY, _LAYER = "$model", "torch.nn."


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make a module again.

    Attributes:
        factory: A registered name, or `torch.nn.` and the name of a layer.
        arguments: Its keyword arguments: JSON values, and recipes in place of modules.
    """

    factory: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Unknown:
    """Stands for an argument that no recipe can describe."""

    type_name: str


def register_model_factory(name: str) -> Callable[[Callable[P, ModuleT]], Callable[P, ModuleT]]:
    """Register a function that makes a model, so that its models can be saved and loaded.

    Its arguments have to be JSON values or modules that have a recipe themselves. A program that loads such a model
    must have imported the function.

    Raises:
        ConfigError: If the name is taken by another function.
    """

    def register(function: Callable[P, ModuleT]) -> Callable[P, ModuleT]:
        @functools.wraps(function)
        def factory(*args: P.args, **kwargs: P.kwargs) -> ModuleT:
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            return record(function(*args, **kwargs), name, **bound.arguments)

        known = _FACTORIES.get(name)
        if name in _BUILT_IN or (known is not None and inspect.unwrap(known).__module__ != function.__module__):
            raise ConfigError(f"The model factory {name!r} is registered already. Choose another name.")
        _FACTORIES[name] = factory
        return factory

    return register


def record(model: ModuleT, factory: str, /, **arguments: Any) -> ModuleT:
    """Write on a fresh model how it can be made again, and return it."""
    model._recipe = Recipe(factory, {k: _describe(v) for k, v in arguments.items()})  # type: ignore[assignment]
    return model


def recipe_of(module: nn.Module) -> Recipe | None:
    """The recipe that a module carries, or that its layer type implies; None if there is none."""
    recipe = module.__dict__.get("_recipe")
    if isinstance(recipe, Recipe):
        return recipe
    layer = type(module).__name__
    if layer not in _LAYERS or type(module) is not getattr(nn, layer):
        return None
    if isinstance(module, nn.Sequential):
        return Recipe(_LAYER + layer, {name: _describe(child) for name, child in module.named_children()})
    arguments = {name: _describe(getattr(module, name)) for name in _LAYERS[layer]}
    if layer in ("Linear", "LayerNorm"):
        arguments["bias"] = module.bias is not None
    return Recipe(_LAYER + layer, arguments)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Turn a recipe into JSON values.

    Raises:
        ConfigError: If an argument is a module without a recipe, or no JSON value.
    """
    return {"factory": recipe.factory, "arguments": {k: _encode(v, recipe, k) for k, v in recipe.arguments.items()}}


def build(stored: Mapping[str, Any]) -> nn.Module:
    """Make the module that :func:`to_json` described, with fresh weights.

    Raises:
        ConfigError: If a factory isn't known.
    """
    name = str(stored["factory"])
    arguments = {k: _decode(v) for k, v in stored["arguments"].items()}
    if name.startswith(_LAYER):
        layer = name.removeprefix(_LAYER)
        if layer not in _LAYERS:
            raise unknown_name("layer", layer, _LAYERS)
        if layer == "Sequential":
            module = nn.Sequential()
            for child, value in arguments.items():
                module.add_module(child, value)
            return module
        layer_type: type[nn.Module] = getattr(nn, layer)
        return layer_type(**arguments)
    if name in _BUILT_IN:
        made: nn.Module = getattr(importlib.import_module(_BUILT_IN[name]), name)(**arguments)
        return made
    if name not in _FACTORIES:
        error = unknown_name("model factory", name, {*_FACTORIES, *_BUILT_IN})
        raise ConfigError(f"{error} Import the module that registers it with @register_model_factory({name!r}).")
    return _FACTORIES[name](**arguments)


def _describe(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return recipe_of(value) or _Unknown(type(value).__name__)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _describe(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(k): _describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else _Unknown(type(value).__name__)


def _encode(value: Any, recipe: Recipe, name: str) -> Any:
    if isinstance(value, _Unknown):
        raise ConfigError(
            f"The argument {name!r} of {recipe.factory} is a {value.type_name}, which nothing tells how to make again. "
            "Make it by a function decorated with @register_model_factory('<name>') whose arguments are JSON values."
        )
    if isinstance(value, Recipe):
        return {MODEL_KEY: to_json(value)}
    if isinstance(value, dict):
        return {k: _encode(v, recipe, name) for k, v in value.items()}
    return [_encode(v, recipe, name) for v in value] if isinstance(value, list) else value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return build(value[MODEL_KEY]) if value.keys() == {MODEL_KEY} else {k: _decode(v) for k, v in value.items()}
    return [_decode(v) for v in value] if isinstance(value, list) else value
