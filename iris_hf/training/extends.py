"""A function with all parameters of another: names, defaults, types and documentation stand in one place."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")

_ARGS = re.compile(r"^( *)Args:\n", re.MULTILINE)


def extends(base: Callable[..., Any]) -> Callable[[Callable[..., ResultT]], Callable[..., ResultT]]:
    """Decorate a function whose `**arguments` are the parameters of another.

    Its signature then lists the parameters of `base` and, after them, its own keyword-only ones; it gets all of them
    by name, with their defaults. The `Args` of its docstring begin with those of `base`.
    """

    def decorate(function: Callable[..., ResultT]) -> Callable[..., ResultT]:
        own = inspect.signature(function)
        added = [p for p in own.parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        parameters = [*inspect.signature(base).parameters.values(), *added]
        signature = inspect.Signature(parameters, return_annotation=own.return_annotation)

        @functools.wraps(function)
        def extended(*args: Any, **kwargs: Any) -> ResultT:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(**bound.arguments)

        extended.__signature__ = signature  # type: ignore[attr-defined]
        extended.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": own.return_annotation}
        extended.__doc__ = _ARGS.sub(
            lambda found: found.group(0) + _arguments_of(base), function.__doc__ or "", count=1
        )
        return extended

    return decorate


def _arguments_of(function: Callable[..., Any]) -> str:
    """Return the entries of a docstring's `Args`, as they are indented there."""
    doc = function.__doc__ or ""
    found = _ARGS.search(doc)
    return "" if found is None else doc[found.end() : doc.index("\n\n", found.end()) + 1]
