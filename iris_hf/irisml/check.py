"""Check a job before its first task runs, so that a mistake costs seconds and its message names task and field."""

from __future__ import annotations

import dataclasses
import logging
import pkgutil
import types
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

from iris_hf.engine.plugins.registry import find_plugin, parse
from iris_hf.errors import ConfigError, IrisHFError, MissingDependencyError, unknown_name
from iris_hf.irisml.engine import irisml_module
from iris_hf.irisml.field_types import FreeMapping, TrueOrFalse, takes_text
from iris_hf.irisml.task_classes import config_fields, is_in_config
from iris_hf.tasks import TASKS, union_members

logger = logging.getLogger(__name__)

_SETS_NO_VARIABLES = frozenset({"run_sequential", "branch", "run_parallel", "run_profiler"})
"""The tasks that run others and are known to set no variables for them."""

_KEEPS_OUTPUTS = frozenset({"repeat_tasks"})
"""The tasks that run others whose outputs the rest of the job does not get."""


def check_job(job: Any, env_vars: Mapping[str, str]) -> None:
    """Check that every task, field and variable of a job is known, and that its values fit.

    Raises:
        ConfigError: If something is wrong; the message names the task and the field.
        MissingDependencyError: If a task needs a package that is not installed.
    """
    if not isinstance(job, Mapping) or not isinstance(job.get("tasks"), list):
        raise ConfigError('A job is a mapping with a list of tasks: {"tasks": [{"task": "train", ...}, ...]}.')
    parts = {part: job.get(part) or [] for part in ("tasks", "on_error")}
    for key in job:
        if key not in parts:
            logger.warning("%s irisml ignores it.", unknown_name("key of the job", key, parts))
    for part, tasks in parts.items():
        for index, task in enumerate(tasks):
            _check_form(task, f"{part}[{index}]")
    names = iter(_names(parts))
    outputs: dict[str, set[str]] = {}
    for part, tasks in parts.items():
        env = {**env_vars, "IRISML_EXCEPTION": ""} if part == "on_error" else env_vars
        for task in tasks:
            check = _TaskCheck(task, next(names), env, outputs)
            check.run()
            outputs |= check.outputs


def _check_form(task: Any, where: str) -> None:
    if not isinstance(task, Mapping) or not isinstance(task.get("task"), str):
        raise ConfigError(f'{where} has to be a mapping with the name of a task: {{"task": "train", ...}}.')
    for key in task:
        if key not in ("task", "name", "inputs", "config"):
            raise unknown_name(f"key of {where} ({task['task']})", key, ("task", "name", "inputs", "config"))
    for key in ("inputs", "config"):
        if not isinstance(task.get(key) or {}, Mapping):
            raise ConfigError(f"{where} ({task['task']}): {key} has to be a mapping, got {task[key]!r}.")
    if not task["task"].islower():
        raise unknown_name("task", task["task"], known_tasks())


def _names(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the names of the tasks as irisml gives them out: `predict`, `predict@2`."""
    bare = {part: [{k: v for k, v in t.items() if k in ("task", "name")} for t in ts] for part, ts in parts.items()}
    job = irisml_module("core.job").Job(irisml_module("core").JobDescription.from_dict(bare))
    return [task.name for task in (*job.tasks, *job.on_error)]


def known_tasks() -> list[str]:
    """Return the names of all tasks that a job can use."""
    package = irisml_module("tasks")
    return sorted({*TASKS, *(module.name for module in pkgutil.iter_modules(package.__path__))})


def find_task_class(name: str) -> Any:
    """Return the Task class that irisml will use.

    Raises:
        ConfigError: If there is none.
        MissingDependencyError: If it needs a package that is not installed.
    """
    module_name = f"irisml.tasks.{name}"
    try:
        return import_module(module_name).Task
    except ModuleNotFoundError as error:
        if error.name in (module_name, "irisml.tasks"):
            raise unknown_name("task", name, known_tasks()) from error
        raise MissingDependencyError(
            f"The task {name!r} needs the package {error.name!r}, which is missing."
        ) from error


class _TaskCheck:
    """The check of one task of a job.

    Attributes:
        outputs: After the run, what later tasks can take: the fields by the name of the task, and those of the tasks
            in its config.
    """

    def __init__(
        self,
        task: Mapping[str, Any],
        name: str,
        env_vars: Mapping[str, str],
        before: Mapping[str, set[str]],
        *,
        knows_all_variables: bool = True,
    ) -> None:
        self.task, self.name, self.env_vars, self.before = task, name, env_vars, before
        self.knows_all_variables = knows_all_variables
        self.task_class = find_task_class(task["task"])
        self.is_ours = "iris_hf_task" in vars(self.task_class)
        self.outputs: dict[str, set[str]] = {}

    def run(self) -> None:
        """Check inputs and config."""
        inputs, config = self.task.get("inputs") or {}, self.task.get("config") or {}
        input_fields = {f.name: f for f in dataclasses.fields(self.task_class.Inputs)}
        for name, value in inputs.items():
            if name not in input_fields:
                logger.warning("%s: there is no input %r; irisml ignores it.", self._where(), name)
            elif self.is_ours:
                self._check_input(name, input_fields[name].type, value)
            self._check_variables(f"the input {name!r}", value)
        self._check_required("input", self.task_class.Inputs, inputs)
        if self.is_ours:
            for field in self.task_class.iris_hf_task.inputs:
                if is_in_config(self.task_class.iris_hf_task, field.name) and field.name not in {**inputs, **config}:
                    raise self._missing("input", field.name)
        self._check_fields(self.task_class.Config, config_fields(self.task_class), config, "config field")
        if self.is_ours and isinstance(config.get("plugins"), (list, tuple)):
            for plugin in config["plugins"]:
                self._check_plugin(plugin)
        if self.task["task"] in _KEEPS_OUTPUTS:
            self.outputs.clear()
        self.outputs[self.name] = {f.name for f in dataclasses.fields(self.task_class.Outputs)}

    def _where(self) -> str:
        from iris_hf.irisml.run import described

        return f"Task {described(self.task['task'], self.name)}"

    def _located(self, error: IrisHFError) -> ConfigError:
        return ConfigError(f"{self._where()}: {error}")

    def _missing(self, what: str, name: str) -> ConfigError:
        return ConfigError(f"{self._where()}: the {what} {name!r} is missing.")

    def _check_required(self, what: str, fields_class: Any, given: Mapping[str, Any]) -> None:
        for field in dataclasses.fields(fields_class):
            is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if is_required and field.name not in given:
                raise self._missing(what, field.name)

    def _check_input(self, name: str, annotation: Any, value: Any) -> None:
        text = _environment_name(value) is not None or (isinstance(value, str) and not value.startswith("$"))
        if text and not takes_text(annotation):
            raise ConfigError(
                f"{self._where()}: the input {name!r} takes an object, got {value!r}. Take one from a task: "
                '"$output.<task>.<field>".'
            )

    def _check_fields(
        self, fields_class: Any, fields: Iterable[dataclasses.Field[Any]], values: Any, path: str
    ) -> None:
        known = {field.name: field for field in fields}
        for name in values:
            if name not in known:
                raise self._located(unknown_name(path, name, known))
        self._check_required(path, fields_class, values)
        for name, value in values.items():
            self._check_value(known[name].type, value, name)

    def _check_value(self, annotation: Any, value: Any, name: str) -> None:
        """Check a config value against its type, by the rules of irisml's loader, and without its surprises."""
        members = union_members(annotation)
        if len(members) != 1 or (value is None and types.NoneType in get_args(annotation)):
            self._check_variables(f"the config field {name!r}", value)
            return
        kind, origin = members[0], get_origin(members[0])
        if kind is irisml_module("core").TaskDescription:
            self._check_nested(value, name)
            return
        is_loaded_by_parts = dataclasses.is_dataclass(kind) or origin is tuple  # which are no variables
        variable = _environment_name(value)
        if isinstance(value, str) and value.startswith("$") and not is_loaded_by_parts:
            self._check_variable(f"the config field {name!r}", value)
            if variable is None or variable not in self.env_vars:
                return  # an output, or a variable that a task sets
            given: Any = self.env_vars[variable]
        else:
            given = value
        problem = ConfigError(
            f"{self._where()}: the config field {name!r} takes {_said(kind)}, got {given!r}"
            + (f" (the value of {value})." if given is not value else ".")
        )
        if dataclasses.is_dataclass(kind):
            if not isinstance(given, Mapping):
                raise problem
            self._check_fields(kind, dataclasses.fields(kind), given, f"field of {name}")
        elif origin in (list, tuple):
            if not isinstance(given, (list, tuple)):
                raise problem
            parts = get_args(kind) * (len(given) if origin is list else 1)
            if len(parts) != len(given):
                raise problem
            for index, (part, item) in enumerate(zip(parts, given, strict=True)):
                self._check_value(part, item, f"{name}[{index}]")
        elif origin is dict:
            if not isinstance(given, Mapping):
                raise problem
            for key, item in given.items():
                self._check_value(get_args(kind)[1], item, f"{name}[{key!r}]")
        elif origin is Literal:
            if str(given) not in map(str, get_args(kind)):
                raise self._located(unknown_name(f"value of {name}", given, get_args(kind)))
        elif not self._fits(kind, given):
            raise problem
        else:
            self._check_variables(f"the config field {name!r}", value)

    def _fits(self, kind: Any, value: Any) -> bool:
        """Whether the loader's `kind(value)` works; for a task of iris_hf, whether it means the same."""
        if kind is FreeMapping:
            return isinstance(value, Mapping)
        if kind not in (int, float, str, TrueOrFalse):
            return True
        try:
            read = kind(value)
        except (TypeError, ValueError, OverflowError, ConfigError):
            return False
        if not self.is_ours or kind is TrueOrFalse:
            return True
        if isinstance(value, bool):
            return kind is int
        return isinstance(value, str) or (isinstance(value, (int, float)) and (kind is str or read == value))

    def _check_nested(self, task: Any, name: str) -> None:
        """Check a task in the config of this one."""
        _check_form(task, f"{name} of {self.task['task']}")
        is_run_after_others = not self.task_class.RESOLVE_CONFIG_VARIABLES
        check = _TaskCheck(
            task,
            task.get("name") or task["task"],
            self.env_vars,
            {**self.before, **self.outputs} if is_run_after_others else self.before,
            knows_all_variables=self.knows_all_variables and self.task["task"] in _SETS_NO_VARIABLES,
        )
        check.run()
        for nested, fields in check.outputs.items():  # the branches of one task may hold two of the same name
            self.outputs[nested] = self.outputs.get(nested, set()) | fields

    def _check_plugin(self, specification: Any) -> None:
        if not isinstance(specification, str) or specification.startswith("$"):
            return
        try:
            name, args, kwargs = parse(specification)
            find_plugin(name)
        except IrisHFError as error:
            raise self._located(error) from error
        self._check_variables(f"plugin {specification!r}", [*args, *kwargs.values()])

    def _check_variables(self, where: str, value: Any) -> None:
        for text in _texts(value):
            self._check_variable(where, text)

    def _check_variable(self, where: str, text: str) -> None:
        if not text.startswith("$"):
            return
        variable = _environment_name(text)
        if variable is not None:
            if variable not in self.env_vars and self.knows_all_variables:
                raise ConfigError(
                    f"{self._where()}: {where} is {text!r}, and {variable} is not set. Set it: -e {variable}=VALUE."
                )
            return
        parts = _output_parts(text)
        if parts is None:
            raise ConfigError(
                f"{self._where()}: {where} is {text!r}, which is neither $env.NAME, in upper case, nor "
                "$output.task.field, in lower case."
            )
        task, field = parts
        if task not in self.before:
            before = ", ".join(self.before) or "none"
            raise ConfigError(
                f"{self._where()}: {where} is {text!r}, and no task before it is named {task!r}. Before it: {before}."
            )
        if field not in self.before[task]:
            raise self._located(unknown_name(f"output of {task!r} in {where}", field, self.before[task]))


def _environment_name(value: Any) -> str | None:
    """Return the NAME of a text `$env.NAME`; irisml takes upper case only."""
    parts = value.split(".") if isinstance(value, str) else []
    return parts[1] if len(parts) == 2 and parts[0] == "$env" and parts[1].isupper() else None


def _output_parts(value: str) -> tuple[str, str] | None:
    """Return the task and the field of a text `$output.task.field`; irisml takes lower case only."""
    parts = value.split(".")
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == "$output" and value.islower() else None


def _texts(value: Any) -> Iterable[str]:
    """All texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def _said(kind: Any) -> str:
    if kind is TrueOrFalse:
        return "true or false"
    if kind is FreeMapping or dataclasses.is_dataclass(kind):
        return "a mapping"
    return str(kind) if get_origin(kind) else str(getattr(kind, "__name__", kind))
