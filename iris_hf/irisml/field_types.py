"""The types of task parameters in the words that irisml's loader understands.

It takes plain types, Literal, list, dict, tuples of fixed length, nested dataclasses, Any, and Optional of those; not
Sequence, Mapping or other unions. A job is JSON, so that of several alternatives the one that JSON can say stays.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin

from iris_hf.errors import ConfigError
from iris_hf.tasks import union_members

_PLAIN = (bool, int, float, str)
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


class _Reader(type):
    """The type of a type that irisml calls with a value of a job, or with the text of a variable, to convert it."""

    read: Any

    def __call__(cls, value: Any) -> Any:
        return cls.read(value)

    def __instancecheck__(cls, value: Any) -> bool:
        return True  # irisml asks of a variable that a task has set, and takes it as it is


class TrueOrFalse(metaclass=_Reader):
    """`false` is false, where bool takes every text for true."""

    @staticmethod
    def read(value: Any) -> bool:
        """Read a truth value or its text."""
        truth = _TRUTH.get(str(value).lower())
        if truth is None:
            raise ConfigError(f"A field takes true or false, got {value!r}.")
        return truth


class Literally(metaclass=_Reader):
    """What a text says: a number, a list, true or false, or else the text."""

    @staticmethod
    def read(value: Any) -> Any:
        """Read a text; another value stays as it is."""
        if not isinstance(value, str):
            return value
        if value in ("true", "false"):
            return value == "true"
        try:
            return ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return value


class FreeMapping(metaclass=_Reader):
    """A mapping with any values; variables in it are numbers, lists and truth values where their text says so."""

    @staticmethod
    def read(value: Any) -> Any:
        """Tell the variables in a mapping what they are."""
        if not isinstance(value, dict):
            raise ConfigError(f"A field takes a mapping, got {value!r}.")
        _read_variables_literally(value)
        return value


def _read_variables_literally(value: Any) -> None:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            _read_variables_literally(part)
    elif hasattr(value, "expected_type"):
        value.expected_type = Literally


def config_type(annotation: Any) -> Any:
    """Return the type of a config field.

    Args:
        annotation: The type in the signature of a task. A dataclass in it becomes a plain one with the same fields, in
            which variables may stand until they are resolved: it checks nothing.
    """
    return _optional(annotation, _of_members(union_members(annotation)))


def input_type(annotation: Any) -> Any:
    """Return the type of an input field; what is neither text nor a class is Any."""
    members = union_members(annotation)
    if str in members:
        says_more = any(_is_a(member, Mapping) for member in members)
        return _optional(annotation, Union[str, dict] if says_more else str)  # noqa: UP007  # irisml knows only Union
    if len(members) == 1:
        origin = get_origin(members[0])
        if origin is Callable:
            return _optional(annotation, typing.Callable)
        plain = origin if isinstance(origin, type) and not issubclass(origin, (Sequence, Mapping)) else members[0]
        if isinstance(plain, type) and not dataclasses.is_dataclass(plain):
            return _optional(annotation, plain)
        if _is_a(members[0], Sequence):
            return _optional(annotation, list)
    return Any


def takes_text(annotation: Any) -> bool:
    """Whether a text of the job can be a value of this type."""
    members = union_members(annotation)
    return any(m in (str, Path, Any) or get_origin(m) is Literal for m in members)


def is_optional(annotation: Any) -> bool:
    """Whether None is among the alternatives."""
    return types.NoneType in get_args(annotation)


def _optional(annotation: Any, kind: Any) -> Any:
    return Optional[kind] if is_optional(annotation) and kind is not Any else kind  # noqa: UP045


def _of_members(members: list[Any]) -> Any:
    nested = [m for m in members if dataclasses.is_dataclass(m)]
    if nested:
        return plain_dataclass(nested[0])
    said_by_json = [m for m in members if _is_json(m)]
    if Any in members or len(said_by_json) != 1:
        return str if Path in members and said_by_json == [] else Any
    return _of_one(said_by_json[0])


def _of_one(kind: Any) -> Any:
    if _is_a(kind, tuple) and Ellipsis not in get_args(kind):
        return tuple[tuple(config_type(part) for part in get_args(kind))]  # type: ignore[misc]
    if _is_a(kind, Sequence):
        return list[config_type(get_args(kind)[0])]  # type: ignore[misc]
    if _is_a(kind, Mapping):
        key, value = get_args(kind)
        return FreeMapping if value is Any else dict[key, config_type(value)]  # type: ignore[misc,valid-type]
    return TrueOrFalse if kind is bool else kind


def _is_json(kind: Any) -> bool:
    return kind in _PLAIN or get_origin(kind) is Literal or _is_a(kind, Sequence) or _is_a(kind, Mapping)


def _is_a(kind: Any, base: type) -> bool:
    """Whether a subscripted type, such as `list[int]`, is of this kind."""
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, base)


_PLAIN_DATACLASSES: dict[type, type] = {}


def nested_classes() -> dict[str, type]:
    """Return the plain dataclasses that were made, by name."""
    return {kind.__name__: plain for kind, plain in _PLAIN_DATACLASSES.items()}


def plain_dataclass(kind: Any) -> type:
    """Return a dataclass with the fields of another, in the loader's types, and without its checks.

    Every field may be left out or None, which means that the job doesn't say it: what stands there then, such as the
    normalisation that a pretrained model was trained with, is for the task to know.
    """
    if kind not in _PLAIN_DATACLASSES:
        hints = typing.get_type_hints(kind)
        plain = make_fields_class(
            kind.__name__,
            [(f.name, _nested_type(hints[f.name]), None) for f in dataclasses.fields(kind)],
            qualname=kind.__name__,
        )
        _PLAIN_DATACLASSES[kind] = plain
    return _PLAIN_DATACLASSES[kind]


def _nested_type(annotation: Any) -> Any:
    kind = config_type(annotation)
    return kind if kind is Any else Optional[kind]  # noqa: UP045


HOME = "iris_hf.irisml.tasks"
"""The module where pickle finds the classes that are made here."""


def make_fields_class(
    name: str, fields: Sequence[tuple[str, Any, Any]], *, qualname: str, methods: Mapping[str, Any] | None = None
) -> type:
    """Make a dataclass of (name, type, default); required fields come first, and lists are copied for each object."""
    ordered = sorted(fields, key=lambda field: field[2] is not dataclasses.MISSING)
    typed = [(n, kind, _field(default)) for n, kind, default in ordered]
    made = dataclasses.make_dataclass(name, typed, namespace=dict(methods or {}))
    made.__module__, made.__qualname__ = HOME, qualname
    return made


def _field(default: Any) -> Any:
    if default is dataclasses.MISSING:
        return dataclasses.field()
    if isinstance(default, (list, tuple)):
        return dataclasses.field(default_factory=lambda: list(default))
    return dataclasses.field(default=default)
