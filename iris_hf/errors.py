"""The errors that iris_hf raises for a caller's mistakes.

Each message names the value that is wrong and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any


class IrisHFError(Exception):
    """Base of every error that iris_hf raises on purpose."""


class ConfigError(IrisHFError, ValueError):
    """An argument or a combination of arguments cannot work."""


class DataError(IrisHFError, ValueError):
    """An example, a target or a prediction is not in the format it has to be in."""


class MissingDependencyError(IrisHFError, ImportError):
    """An optional package is needed; the message says which extra installs it."""


def failure_of(what: str, error: Exception) -> DataError:
    """Build the error for an example that could not be read or a batch that could not be made.

    Args:
        what: What failed, such as ``"Example 7"``.
        error: Why.

    Returns:
        An error that survives the way from a worker process to the loop: with the traceback as a note, since notes
        are pickled, and tracebacks and causes are not.
    """
    import traceback

    if isinstance(error, DataError):
        return DataError(f"{what}: {error}")
    named = DataError(f"{what}: {type(error).__name__}: {error}")
    named.add_note("".join(traceback.format_exception(error)))
    return named


class noted:
    """A context that adds a note to an exception that passes through it.

    It is a class since a generator would cost time in every step.

    Args:
        describe: Called for the note, only when there is an exception.
    """

    def __init__(self, describe: Callable[[], str]) -> None:
        self.describe = describe

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self.describe())


def unknown_name(what: str, name: object, known: object) -> ConfigError:
    """Build the error for a name that is in no table.

    Args:
        what: What the name stands for, such as ``"optimizer"``.
        name: The value that was given.
        known: The names that exist, any iterable of strings.

    Returns:
        An error that lists the near names first, then all known ones.
    """
    import difflib

    names = sorted(str(k) for k in known)  # type: ignore[attr-defined]
    starts = [k for k in names if str(name) and k.startswith(str(name))]
    near = starts[:3] or difflib.get_close_matches(str(name), names, n=3)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return ConfigError(f"Unknown {what} {name!r}.{hint} Known: {', '.join(names)}.")


def require_integer(name: str, value: object, *, at_least: int | None = None) -> None:
    """Check an argument that counts something; True is no number.

    Args:
        name: The argument's.
        value: What was given.
        at_least: Its lower bound, if it has one.

    Raises:
        ConfigError: If it is no whole number, or below the bound.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} must be a whole number, got {value!r}.")
    _require_bound(name, value, at_least)


def require_number(name: str, value: object, *, at_least: float | None = None) -> None:
    """Check an argument that measures something; True is no number, and neither are NaN and infinity.

    Args:
        name: The argument's.
        value: What was given.
        at_least: Its lower bound, if it has one.

    Raises:
        ConfigError: If it is no finite number, or below the bound.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}.")
    _require_bound(name, value, at_least)


def require_names(name: str, value: object) -> None:
    """Check an argument that lists names, such as those of the classes.

    Args:
        name: The argument's.
        value: What was given.

    Raises:
        ConfigError: If it is no list (or another sequence) of at least one string.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise ConfigError(f"{name} must be a list of at least one name, got {value!r}.")
    for position, item in enumerate(value):
        if not isinstance(item, str):
            raise ConfigError(f"{name}[{position}] must be a string, got {item!r}.")


def _require_bound(name: str, value: Any, at_least: float | None) -> None:
    if at_least is not None and value < at_least:
        raise ConfigError(
            f"{name} must {'not be negative' if at_least == 0 else f'be at least {at_least}'}, got {value}."
        )
