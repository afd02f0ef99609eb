"""The door to the package irisml, which is optional."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from iris_hf.errors import MissingDependencyError


def irisml_module(name: str) -> Any:
    """Import a module of irisml, such as `core`.

    Raises:
        MissingDependencyError: If irisml is not installed.
    """
    try:
        return import_module(f"irisml.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("irisml"):
            raise
        raise MissingDependencyError('irisml jobs need irisml: pip install "iris-hf[irisml]".') from error
