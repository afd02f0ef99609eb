"""Transforms of one and of two arguments, made alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from iris_hf.errors import ConfigError

_TARGET_NAMES = ("target", "targets", "label", "labels")

PairTransform = Callable[[Any, Any], tuple[Any, Any]]
"""`(raw_input, target) -> (input, target)`."""


def as_pair_transform(transform: Callable[..., Any] | None) -> PairTransform:
    """Give any transform the form `(raw_input, target) -> (input, target)`.

    The signature is looked at once, here. One required argument means image-only: the target passes through. Two, or
    an optional second one named ``target``, ``targets``, ``label`` or ``labels``, mean `(raw_input, target)`.
    torchvision's v2 transforms take both, but a v2 ``Compose`` with an image-only member takes the image. Other
    optional arguments and `*args` are left alone.

    Args:
        transform: A function, lambda, bound method, partial or callable object; None changes nothing.

    Returns:
        A callable that pickles if `transform` does.

    Raises:
        ConfigError: If it is not callable, or takes no argument or more than two.
    """
    if transform is None:
        return _identity
    if isinstance(transform, (_ImageOnly, _Pair)):
        return transform
    if not callable(transform):
        raise ConfigError(f"A transform is a callable or None, not {transform!r}.")
    return _Pair(transform) if _takes_target(transform) else _ImageOnly(transform)


class _ImageOnly:
    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, raw_input: Any, target: Any) -> tuple[Any, Any]:
        return self.transform(raw_input), target

    def __repr__(self) -> str:
        return f"{self.transform!r} (image only)"


class _Pair:
    def __init__(self, transform: PairTransform) -> None:
        self.transform = transform

    def __call__(self, raw_input: Any, target: Any) -> tuple[Any, Any]:
        result = self.transform(raw_input, target)
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ConfigError(
                f"The transform {self.transform!r} takes (raw_input, target) and has to return (input, target), "
                f"not {type(result).__name__}."
            )
        return result[0], result[1]

    def __repr__(self) -> str:
        return repr(self.transform)


def _identity(raw_input: Any, target: Any) -> tuple[Any, Any]:
    return raw_input, target


def _takes_target(transform: Callable[..., Any]) -> bool:
    if _is_torchvision_v2(transform):
        return all(_takes_target(member) for member in getattr(transform, "transforms", ()))
    parameters = _positional_parameters(transform)
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    if len(required) > 2 or not parameters:
        raise ConfigError(
            f"A transform takes (raw_input) or (raw_input, target); {transform!r} takes {len(required)} arguments."
        )
    return len(required) == 2 or (len(parameters) > 1 and parameters[1].name in _TARGET_NAMES)


def _positional_parameters(transform: Callable[..., Any]) -> list[inspect.Parameter]:
    function = transform.forward if isinstance(transform, torch.nn.Module) else transform
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a builtin without a signature, as some C functions are
        return [inspect.Parameter("image", inspect.Parameter.POSITIONAL_ONLY)]
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    return [p for p in signature.parameters.values() if p.kind in kinds]


def _is_torchvision_v2(transform: Callable[..., Any]) -> bool:
    return type(transform).__module__.startswith("torchvision.transforms.v2")
