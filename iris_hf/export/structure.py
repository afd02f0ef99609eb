"""Nested inputs and outputs as named tensors, and back: an ONNX graph knows nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from iris_hf.errors import ConfigError

Layout = Any
"""How tensors are nested, in JSON: a name, or layouts as `{"list": [...]}`, `{"tuple": [...]}` or `{"dict": {...}}`.

`null` is None.
"""

NameLeaf = Callable[[tuple[str | int, ...], Tensor], str]
"""The path of a tensor in a nested value, and the tensor -> its name."""


def flatten(value: Any, name_leaf: NameLeaf, taken: Collection[str] = ()) -> tuple[dict[str, Tensor], Layout]:
    """Take a nested value apart.

    Args:
        value: Tensors in dicts (outputs of transformers are such), tuples and lists. None is left out of dicts, and
            keeps its place elsewhere.
        name_leaf: Names a tensor; a name that is taken gets a number behind it.
        taken: Names that others have.

    Returns:
        The tensors by name, and the layout from which :func:`rebuild` makes the value again.

    Raises:
        ConfigError: If there is anything else than tensors.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: tuple[str | int, ...]) -> Layout:
        if isinstance(value, Tensor):
            name = _free_name(name_leaf(path, value), {*taken, *tensors})
            tensors[name] = value
            return name
        if isinstance(value, Mapping):
            return {"dict": {str(k): visit(v, (*path, str(k))) for k, v in value.items() if v is not None}}
        if hasattr(value, "_fields"):
            return visit(value._asdict(), path)
        if isinstance(value, list | tuple):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [visit(v, (*path, i)) for i, v in enumerate(value)]}
        if value is None and path:
            return None
        where = "".join(f"[{p!r}]" for p in path)
        raise ConfigError(f"An ONNX graph takes and gives tensors only; here is a {type(value).__name__} {where}.")

    layout = visit(value, ())
    return tensors, layout


def rebuild(layout: Layout, tensors: Mapping[str, Any]) -> Any:
    """Nest named tensors as a layout tells."""
    if layout is None:
        return None
    if isinstance(layout, str):
        return tensors[layout]
    ((kind, items),) = layout.items()
    if kind == "dict":
        return {key: rebuild(item, tensors) for key, item in items.items()}
    nested = [rebuild(item, tensors) for item in items]
    return tuple(nested) if kind == "tuple" else nested


def is_layout(value: object) -> bool:
    """Whether JSON is a layout."""
    if value is None or isinstance(value, str):
        return True
    if not isinstance(value, dict) or len(value) != 1:
        return False
    ((kind, items),) = value.items()
    if kind == "dict":
        return isinstance(items, dict) and all(map(is_layout, items.values()))
    return kind in ("list", "tuple") and isinstance(items, list) and all(map(is_layout, items))


def names_in(layout: Layout) -> list[str]:
    """The names of the tensors in a layout."""
    if layout is None or isinstance(layout, str):
        return [] if layout is None else [layout]
    ((kind, items),) = layout.items()
    return [name for item in (items.values() if kind == "dict" else items) for name in names_in(item)]


def _free_name(name: str, taken: Collection[str]) -> str:
    number = 2
    free = name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
