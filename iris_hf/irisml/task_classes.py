"""irisml's Task classes, made of the task table."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import uuid
from collections.abc import Mapping
from typing import Any, Literal, Optional, get_origin

from iris_hf._version import __version__
from iris_hf.engine.plugins.registry import BUILT_IN
from iris_hf.errors import ConfigError
from iris_hf.irisml.engine import irisml_module
from iris_hf.irisml.field_types import HOME, Literally, config_type, input_type, make_fields_class, takes_text
from iris_hf.irisml.names import find_original
from iris_hf.irisml.ranks import call_on_all_ranks
from iris_hf.tasks import Field, Task, find_task

TASK_VERSION = f"{__version__}+iris_hf"
"""Part of the keys of irisml's cache, so that neither another release nor the original finds what this one wrote."""

_ON_ALL_RANKS = frozenset({"train", "train_with_gradient_cache", "predict", "benchmark_model"})
"""The tasks that use every process of a launcher."""

_NOT_CACHED = frozenset(
    {
        *("benchmark_model", "export_onnx", "load_hf_dataset", "save_hf_dataset", "save_pretrained"),
        *("from_pretrained", "load_onnx", "push_to_hub", "push_dataset_to_hub", "create_hf_model", "create_timm_model"),
        *("create_open_clip_model", "create_hf_text_encoder", "create_hf_tokenizer", "get_subclass_dataset"),
    }
)
"""What measures, or reads or writes something beside its inputs and outputs. (Renumbered masks are a file.)"""

_WRITING_PLUGINS = frozenset({"log_tensorboard", "log_tracker", "profile", "save_best"})
"""A run with these, or with another package's, is not to be found in the cache."""

_TIMM_WORDS: Mapping[str, tuple[str, Any]] = {
    "name": ("name", str),
    "task_type": ("target_type", Literal["multiclass_classification", "multilabel_classification"]),
}
"""Config fields of the task of irisml-tasks-timm that ours replaces: the parameter here, and the type there."""

_OTHER_WORDS = {"create_timm_model": _TIMM_WORDS}

_RUN_WHEN_DRY = frozenset(
    {
        *("append_classifier", "make_feature_extractor_model", "make_image_text_contrastive_model"),
        *("split_image_text_model", "get_subclass_dataset", "sample_few_shot_dataset", "make_oversampled_dataset"),
        *("create_classification_prompt_generator", "build_classification_prompt_dataset"),
        *("make_image_text_transform", "create_hf_transform"),
    }
)
"""The tasks that only put objects together, which a dry run does, too."""


class TaskType(type):
    """The type of the Task classes. One that extends them was written for the original's, and gets it as its base."""

    iris_hf_task: Task

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        """Make a Task class."""
        originals = tuple(_original(base) for base in bases)
        return super().__new__(cls, name, bases, body) if originals == bases else type(name, originals, body)


def _original(base: Any) -> Any:
    module = find_original(base.iris_hf_task.name) if isinstance(base, TaskType) else None
    return base if module is None else module.Task


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
        "Config": _config_class(task),
        "Inputs": make_fields_class(
            "Inputs",
            [(f.name, input_type(f.annotation), _input_default(task, f)) for f in task.inputs],
            qualname=f"{name}.Inputs",
        ),
        "Outputs": make_fields_class(
            "Outputs",
            [(f.name, input_type(f.annotation), _nothing(f)) for f in task.outputs],
            qualname=f"{name}.Outputs",
        ),
        "execute": _execute,
        "dry_run": _dry_run,
        "iris_hf_task": task,
    }
    return TaskType("Task", (irisml_module("core").TaskBase,), body)


def is_in_config(task: Task, name: str) -> bool:
    """Whether an input may also stand in the config, as another package's task of this name has it."""
    return name in _OTHER_WORDS.get(task.name, ())


def _config_class(task: Task) -> type:
    fields = [(f.name, config_type(f.annotation), _default(f)) for f in task.config]
    fields += [(name, Optional[kind], None) for name, (_, kind) in _OTHER_WORDS.get(task.name, {}).items()]  # noqa: UP045
    methods = {}
    if task.name not in _NOT_CACHED and any(f.name == "plugins" for f in task.config):
        fields.append((_OWN_KEY, Optional[str], None))  # noqa: UP045
        methods["__post_init__"] = _take_own_key
    return make_fields_class("Config", fields, qualname=f"{task.name}.Config", methods=methods)


def _default(field: Field) -> Any:
    return dataclasses.MISSING if field.is_required else field.default


def _input_default(task: Task, field: Field) -> Any:
    return None if is_in_config(task, field.name) else _default(field)


_OWN_KEY = "_own_key"
"""A field of the Config of tasks that may write or read files: part of the cache's key, and new in each such run."""


def _take_own_key(self: Any) -> None:
    """Let the cache not find a run that writes or reads files, which it could not give back."""
    files = (getattr(self, name, None) for name in ("checkpoint_dir", "resume"))
    plugins = self.plugins if isinstance(self.plugins, list) else [self.plugins]
    if self._own_key is None and (any(file is not None for file in files) or any(map(_may_write, plugins))):
        self._own_key = uuid.uuid4().hex


def _may_write(plugin: Any) -> bool:
    name = re.findall(r"^\s*(\w*)", str(plugin))[0]
    return name not in BUILT_IN or name in _WRITING_PLUGINS


def config_fields(task_class: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields of a Config that a job may give."""
    return [field for field in dataclasses.fields(task_class.Config) if field.name != _OWN_KEY]


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
    values = {f.name: getattr(config, f.name) for f in task.config}
    for field in task.config:
        value = values[field.name]
        if dataclasses.is_dataclass(value):
            values[field.name] = _as_mapping(value)
        elif isinstance(value, str) and not takes_text(field.annotation):
            # A variable for one of several types, such as a number or a list.
            values[field.name] = Literally.read(value)
    if values.get("plugins"):
        values["plugins"] = [_without_variables(plugin, context) for plugin in values["plugins"]]
    for name, (parameter, _) in _OTHER_WORDS.get(task.name, {}).items():
        if getattr(config, name) is not None:
            values[parameter] = getattr(config, name).removesuffix("_classification")
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
        return ast.Constant(Literally.read(value))


def _stored(value: Any) -> Any:
    """Return an output in a form that irisml's cache gives back as it was."""
    return list(value) if isinstance(value, list) else value
