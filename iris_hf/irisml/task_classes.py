"""irisml's Task classes, made of the task table."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any, get_origin

from iris_hf._version import __version__
from iris_hf.errors import ConfigError
from iris_hf.irisml.engine import irisml_module
from iris_hf.irisml.field_types import HOME, config_type, input_type, make_fields_class, takes_text
from iris_hf.irisml.ranks import call_on_all_ranks
from iris_hf.tasks import Field, Task, find_task

TASK_VERSION = f"{__version__}+iris_hf"
"""Part of the keys of irisml's cache, so that neither another release nor the original finds what this one wrote."""

_ON_ALL_RANKS = frozenset({"train", "train_with_gradient_cache", "predict", "benchmark_model"})
"""The tasks that use every process of a launcher."""

_NOT_CACHED = frozenset(
    {
        *("benchmark_model", "export_onnx", "load_hf_dataset", "save_hf_dataset", "save_pretrained"),
        *("from_pretrained", "load_onnx", "push_to_hub", "push_dataset_to_hub"),
    }
)
"""What measures, or reads or writes something beside its inputs and outputs."""

_RUN_WHEN_DRY = frozenset(
    {
        *("append_classifier", "make_feature_extractor_model", "make_image_text_contrastive_model"),
        *("split_image_text_model", "get_subclass_dataset", "sample_few_shot_dataset", "make_oversampled_dataset"),
        *("create_classification_prompt_generator", "build_classification_prompt_dataset"),
        *("make_image_text_transform", "create_hf_transform"),
    }
)
"""The tasks that only put objects together, which a dry run does, too."""


@functools.cache
def task_class(name: str) -> Any:
    """Return the irisml Task class of a task.

    Its Config holds the keyword parameters and its Inputs the others. Values are checked in `execute`, where irisml
    has put values in the place of variables.

    Raises:
        ConfigError: If there is no such task.
        MissingDependencyError: If irisml is not installed.
    """
    task = find_task(name)
    body = {
        "__doc__": inspect.getdoc(task.function),
        "__module__": HOME,
        "__qualname__": name,
        "VERSION": TASK_VERSION,
        "CACHE_ENABLED": name not in _NOT_CACHED,
        "Config": _fields_class(task, "Config", task.config, config_type),
        "Inputs": _fields_class(task, "Inputs", task.inputs, input_type),
        "Outputs": make_fields_class(
            "Outputs",
            [(f.name, input_type(f.annotation), _nothing(f)) for f in task.outputs],
            qualname=f"{name}.Outputs",
        ),
        "execute": _execute,
        "dry_run": _dry_run,
        "iris_hf_task": task,
    }
    return type("Task", (irisml_module("core").TaskBase,), body)


def _fields_class(task: Task, name: str, fields: tuple[Field, ...], kind: Any) -> type:
    typed = [(f.name, kind(f.annotation), dataclasses.MISSING if f.is_required else f.default) for f in fields]
    return make_fields_class(name, typed, qualname=f"{task.name}.{name}")


def _nothing(output: Field) -> Any:
    """Return what stands for an output in a dry run: 0 for numbers, an empty list for lists, otherwise None."""
    kind = get_origin(output.annotation) or output.annotation
    if kind in (int, float):
        return kind()
    return [] if isinstance(kind, type) and issubclass(kind, list) else None


def _execute(self: Any, inputs: Any) -> Any:
    """Call the task's function."""
    task: Task = self.iris_hf_task
    arguments = {f.name: getattr(inputs, f.name) for f in task.inputs}
    arguments |= config_values(task, self.config, self.context)
    result = call_on_all_ranks(task, arguments) if task.name in _ON_ALL_RANKS else task.function(**arguments)
    return self.Outputs(**{name: _stored(value) for name, value in task.named_outputs(result).items()})


def _dry_run(self: Any, inputs: Any) -> Any:
    """Do what costs nothing; a task that works passes on inputs that have the name of an output."""
    task: Task = self.iris_hf_task
    given = {f.name: getattr(inputs, f.name) for f in task.inputs}
    has_all = all(given[f.name] is not None for f in task.inputs if f.is_required)
    if has_all and task.name in _RUN_WHEN_DRY:
        return self.execute(inputs)
    return self.Outputs(**{f.name: given[f.name] for f in task.outputs if f.name in given})


def config_values(task: Task, config: Any, context: Any) -> dict[str, Any]:
    """Return the keyword arguments that a Config stands for.

    Args:
        task: Whose Config it is.
        config: Its nested dataclasses become mappings without the fields that are None.
        context: irisml's, for the variables in the arguments of plugins: `"ema('$env.DECAY')"`.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for field in task.config:
        value = values[field.name]
        if dataclasses.is_dataclass(value):
            values[field.name] = _as_mapping(value)
        elif isinstance(value, str) and not takes_text(field.annotation):
            values[field.name] = _literal(value)  # a variable for one of several types, such as a number or a list
    if values.get("plugins"):
        values["plugins"] = [_without_variables(plugin, context) for plugin in values["plugins"]]
    return values


def _as_mapping(value: Any) -> Mapping[str, Any]:
    return {name: part for name, part in vars(value).items() if part is not None}


def _without_variables(plugin: Any, context: Any) -> Any:
    """Put values in the place of the variables among a plugin's arguments."""
    if not isinstance(plugin, str) or "$" not in plugin:
        return plugin
    try:
        tree = ast.parse(plugin.strip(), mode="eval")
    except SyntaxError as error:
        raise ConfigError(f"Plugin {plugin!r} is not of the form name or name(1, key='$env.VALUE').") from error
    return ast.unparse(_Resolved(context).visit(tree))


class _Resolved(ast.NodeTransformer):
    def __init__(self, context: Any) -> None:
        self._context = context

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if not isinstance(node.value, str) or not node.value.startswith("$"):
            return node
        value = self._context.resolve(irisml_module("core.variable").replace_variables(node.value))
        return ast.Constant(_literal(value))


def _literal(value: Any) -> Any:
    """Read a number out of a text, which is all that a variable of the environment holds."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value


def _stored(value: Any) -> Any:
    """Return an output in a form that irisml's cache gives back as it was."""
    return list(value) if isinstance(value, list) else value
