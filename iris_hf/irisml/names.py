"""Let `irisml.tasks.<name>` be iris_hf's, for the names in the task table."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

from iris_hf.irisml.engine import irisml_module
from iris_hf.tasks import TASKS

_PACKAGE = "irisml.tasks"


def install() -> None:
    """Let irisml find the tasks of iris_hf by their names, in place of those of irisml-tasks-training.

    All other tasks stay as they are. A second call changes nothing. Names in the original's modules other than `Task`,
    and its submodules, are still found where it is installed, so that its other tasks, which import them, work. A
    Task of another module that extends one of them extends the original's.

    Raises:
        MissingDependencyError: If irisml is not installed.
    """
    irisml_module("core")
    if _FINDER not in sys.meta_path:
        for name in _module_names():
            if name in sys.modules:
                _REPLACED[name] = sys.modules.pop(name)
        _forget_attributes()
        sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Undo :func:`install`."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
        for name in _module_names():
            sys.modules.pop(name, None)
        _forget_attributes()
        sys.modules.update(_REPLACED)
        _REPLACED.clear()


@contextmanager
def installed() -> Iterator[None]:
    """A context in which the names are installed; afterwards they are as they were before."""
    was_there = _FINDER in sys.meta_path
    install()
    try:
        yield
    finally:
        if not was_there:
            uninstall()


def _module_names() -> list[str]:
    return [f"{_PACKAGE}.{name}" for name in TASKS]


def _forget_attributes() -> None:
    """Let `from irisml.tasks import train` look the module up again."""
    package = sys.modules.get(_PACKAGE)
    for name in TASKS:
        vars(package).pop(name, None) if package else None


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != _PACKAGE or name not in TASKS:
            return None
        original = PathFinder.find_spec(fullname, path)
        spec = ModuleSpec(fullname, _TaskLoader(name), origin="iris_hf")
        if original is not None:
            spec.submodule_search_locations = original.submodule_search_locations
        return spec


class _TaskLoader(Loader):
    def __init__(self, name: str) -> None:
        self._name = name

    def exec_module(self, module: ModuleType) -> None:
        from iris_hf.irisml.task_classes import task_class

        module.Task = task_class(self._name)  # type: ignore[attr-defined]
        module.__getattr__ = self._find_in_original  # type: ignore[method-assign]

    def _find_in_original(self, name: str) -> Any:
        """Look up what another module of the original imports from this one."""
        original = None if name.startswith("__") else find_original(self._name)
        if original is None:
            raise AttributeError(f"module '{_PACKAGE}.{self._name}' of iris_hf has no attribute {name!r}")
        return getattr(original, name)


def find_original(name: str) -> ModuleType | None:
    """Return the module of a task that :func:`install` replaces, or None if no package brings one."""
    fullname = f"{_PACKAGE}.{name}"
    if fullname not in _REPLACED:
        spec = PathFinder.find_spec(fullname, irisml_module("tasks").__path__)
        if spec is None or spec.loader is None:
            return None
        _REPLACED[fullname] = module_from_spec(spec)
        try:
            spec.loader.exec_module(_REPLACED[fullname])
        except BaseException:
            del _REPLACED[fullname]
            raise
    return _REPLACED[fullname]


_FINDER = _Finder()
_REPLACED: dict[str, ModuleType] = {}
"""The modules of the original: those that were imported before :func:`install`, and those that were needed since."""
