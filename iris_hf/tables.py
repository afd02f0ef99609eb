"""Tables of the documentation, made from signatures and docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields

from iris_hf.engine.plugins.registry import BUILT_IN, find_plugin
from iris_hf.models.image_spec import ImageSpec
from iris_hf.tasks import TASKS, Field, described, plain
from iris_hf.training.schedulers import LrSchedulerConfig

MAPPINGS = {"lr_scheduler": LrSchedulerConfig, "image_spec": ImageSpec}
"""Configuration that is a mapping of its own, by the names that tasks give it."""


def tasks_in_markdown() -> str:
    """The tasks, then the fields of the mappings among their configuration."""
    rows = [
        (
            f"`{task.name}`" if task.name == task.python_name else f"`{task.name}` (`iris_hf.{task.python_name}`)",
            ", ".join(map(_parameter, task.inputs)),
            ", ".join(map(_parameter, task.config)),
            ", ".join(f"`{field.name}`" for field in task.outputs),
            task.summary,
        )
        for task in TASKS.values()
    ]
    parts = [_table(("task", "inputs", "config", "outputs", ""), rows)]
    for name, kind in MAPPINGS.items():
        texts = described(kind, "Attributes")
        rows_of_fields = [
            (f"`{f.name}`" if f.default is MISSING else f"`{f.name}={f.default!r}`", texts[f.name])
            for f in fields(kind)
        ]
        parts.append(f"\n## `{name}`\n\n{_table(('field', ''), rows_of_fields)}")
    return "".join(parts)


def plugins_in_markdown() -> str:
    """The plugins of this library and their arguments."""
    rows = [
        (f"`{call}`", text, " ".join(f"`{name}`: {meaning}" for name, meaning in arguments.items()))
        for call, text, arguments in plugins()
    ]
    return _table(("plugin", "", "arguments"), rows)


def plugins() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Every plugin of this library: how it is called, what it does, and what its arguments mean."""
    for name in BUILT_IN:
        kind = find_plugin(name)
        signature = inspect.signature(kind)
        parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        call = f"{name}{signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)}"
        texts = described(kind, "Attributes") | described(kind.__init__, "Args")
        summary = plain((inspect.getdoc(kind) or "").partition("\n")[0])
        yield call.removesuffix("()"), summary, {p.name: texts[p.name] for p in parameters}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def _parameter(field: Field) -> str:
    return f"`{field.name}`" if field.is_required else f"`{field.name}={field.default!r}`"
