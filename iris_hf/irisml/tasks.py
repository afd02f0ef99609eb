"""The Task classes by name, where pickle finds them: `iris_hf.irisml.tasks.train`."""

from __future__ import annotations

from typing import Any

from iris_hf.tasks import TASKS


def __getattr__(name: str) -> Any:
    from iris_hf.irisml.field_types import nested_classes
    from iris_hf.irisml.task_classes import task_class

    if name in TASKS:
        return task_class(name)
    if not name.startswith("_"):
        for task in TASKS:
            task_class(task)
        if name in nested_classes():
            return nested_classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
