"""Check a job before its first task runs, so that a mistake costs seconds and its message names task and field."""

from __future__ import annotations

import dataclasses
import logging
import pkgutil
import types
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, get_args, get_origin

from iris_hf.errors import ConfigError, IrisHFError, MissingDependencyError, unknown_name
from iris_hf.irisml.engine import irisml_module
from iris_hf.irisml.field_types import takes_text
from iris_hf.tasks import TASKS, union_members

logger = logging.getLogger(__name__)

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def checked_job(job: Any, env_vars: Mapping[str, str]) -> dict[str, Any]:
    """Return a job in which every task, field and variable is known.

    The variables that stand for true or false are replaced by what they say: irisml takes every text for true.

    Raises:
        ConfigError: If something is wrong; the message names the task and the field.
        MissingDependencyError: If a task needs a package that is not installed.
    """
    if not isinstance(job, Mapping) or not isinstance(job.get("tasks"), list):
        raise ConfigError('A job is a mapping with a list of tasks: {"tasks": [{"task": "train", ...}, ...]}.')
    parts = {part: job.get(part) or [] for part in ("tasks", "on_error")}
    for part, tasks in parts.items():
        for index, task in enumerate(tasks):
            _check_form(task, f"{part}[{index}]")
    names = iter(_names(parts))
    outputs: dict[str, Any] = {}
    checked: dict[str, Any] = dict(job)
    for part, tasks in parts.items():
        env = {**env_vars, "IRISML_EXCEPTION": ""} if part == "on_error" else env_vars
        checked_tasks = []
        for task in tasks:
            name = next(names)
            check = _TaskCheck(task, name, env, outputs)
            checked_tasks.append(check.run())
            outputs[name] = check.task_class
        if part in job and job[part] is not None:
            checked[part] = checked_tasks
    return checked


def _check_form(task: Any, where: str) -> None:
    if not isinstance(task, Mapping) or not isinstance(task.get("task"), str):
        raise ConfigError(f'{where} has to be a mapping with the name of a task: {{"task": "train", ...}}.')
    for key in task:
        if key not in ("task", "name", "inputs", "config"):
            raise unknown_name(f"key of {where} ({task['task']})", key, ("task", "name", "inputs", "config"))
    for key in ("inputs", "config"):
        if not isinstance(task.get(key) or {}, Mapping):
            raise ConfigError(f"{where} ({task['task']}): {key} has to be a mapping, got {task[key]!r}.")


def _names(parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the names of the tasks as irisml gives them out: `predict`, `predict@2`."""
    bare = {part: [{k: v for k, v in t.items() if k in ("task", "name")} for t in ts] for part, ts in parts.items()}
    for part in bare.values():
        for task in part:
            if not task["task"].islower():
                raise unknown_name("task", task["task"], known_tasks())
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
    """The check of one task of a job."""

    def __init__(
        self, task: Mapping[str, Any], name: str, env_vars: Mapping[str, str], outputs: Mapping[str, Any]
    ) -> None:
        self.task, self.name, self.env_vars, self.outputs = task, name, env_vars, outputs
        self.task_class = find_task_class(task["task"])
        self.is_ours = hasattr(self.task_class, "iris_hf_task")

    def run(self) -> dict[str, Any]:
        """Return the task with its variables for true and false replaced."""
        inputs, config = dict(self.task.get("inputs") or {}), dict(self.task.get("config") or {})
        input_fields = {f.name: f for f in dataclasses.fields(self.task_class.Inputs)}
        for name, value in inputs.items():
            if name not in input_fields:
                logger.warning("%s: there is no input %r; irisml ignores it.", self._where(), name)
            elif self.is_ours:
                self._check_input(name, input_fields[name].type, value)
        self._check_required("input", self.task_class.Inputs, inputs)
        if self.is_ours:
            config = self._checked_fields(self.task_class.Config, config, "config field")
        else:
            self._check_required("config field", self.task_class.Config, config)
            for name in config:
                known = {f.name for f in dataclasses.fields(self.task_class.Config)}
                if name not in known:
                    raise self._located(unknown_name("config field", name, known))
        self._check_variables("input", inputs)
        if self.task_class.RESOLVE_CONFIG_VARIABLES:  # otherwise it holds tasks, with variables of its own
            self._check_variables("config field", config)
        return {**self.task, "inputs": inputs, "config": config}

    def _where(self) -> str:
        from iris_hf.irisml.run import described

        return f"Task {described(self.task['task'], self.name)}"

    def _located(self, error: IrisHFError) -> ConfigError:
        return ConfigError(f"{self._where()}: {error}")

    def _check_required(self, what: str, fields_class: Any, given: Mapping[str, Any]) -> None:
        for field in dataclasses.fields(fields_class):
            is_required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if is_required and field.name not in given:
                raise ConfigError(f"{self._where()}: the {what} {field.name!r} is missing.")

    def _check_input(self, name: str, annotation: Any, value: Any) -> None:
        text = _environment_name(value) is not None or (isinstance(value, str) and not value.startswith("$"))
        if text and not takes_text(annotation):
            raise ConfigError(
                f"{self._where()}: the input {name!r} takes an object, got {value!r}. Take one from a task: "
                '"$output.<task>.<field>".'
            )

    def _checked_fields(self, fields_class: Any, values: Any, path: str) -> dict[str, Any]:
        known = {f.name: f for f in dataclasses.fields(fields_class)}
        for name in values:
            if name not in known:
                raise self._located(unknown_name(path, name, known))
        self._check_required(path, fields_class, values)
        return {name: self._checked(known[name].type, value, name) for name, value in values.items()}

    def _checked(self, annotation: Any, value: Any, name: str) -> Any:
        """Check a config value against its type, by the rules of irisml's loader, and without its surprises."""
        if annotation is Any or _output_parts(value) is not None:
            return value
        if value is None and types.NoneType in get_args(annotation):
            return None
        kind = next(iter(union_members(annotation)))
        variable = _environment_name(value)
        if variable is not None and variable not in self.env_vars:
            return value  # the check of variables tells it
        given = self.env_vars[variable] if variable is not None else value
        problem = ConfigError(
            f"{self._where()}: the config field {name!r} takes {_said(kind)}, got {given!r}"
            + (f" (the value of {value})." if variable is not None else ".")
        )
        if dataclasses.is_dataclass(kind):
            if not isinstance(given, Mapping):
                raise problem
            return self._checked_fields(kind, given, f"field of {name}")
        origin = get_origin(kind)
        if origin is Literal:
            if str(given) not in map(str, get_args(kind)):
                raise self._located(unknown_name(f"value of {name}", given, get_args(kind)))
            return value
        if origin in (list, tuple):
            if not isinstance(given, (list, tuple)):
                raise problem
            parts = get_args(kind) * (len(given) if origin is list else 1)
            if len(parts) != len(given):
                raise problem
            return [self._checked(parts[i], item, f"{name}[{i}]") for i, item in enumerate(given)]
        if origin is dict:
            if not isinstance(given, Mapping):
                raise problem
            return {k: self._checked(get_args(kind)[1], item, f"{name}[{k!r}]") for k, item in given.items()}
        if kind is bool:
            truth = _TRUTH.get(str(given).lower())
            if truth is None:
                raise problem
            return truth
        if not _fits(kind, given):
            raise problem
        return value

    def _check_variables(self, what: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            for text in _texts(value):
                self._check_variable(f"the {what} {name!r}", text)

    def _check_variable(self, where: str, text: str) -> None:
        if not text.startswith("$"):
            return
        variable = _environment_name(text)
        if variable is not None:
            if variable not in self.env_vars:
                raise ConfigError(
                    f"{self._where()}: {where} is {text!r}, and {variable} is not set. Set it: -e {variable}=VALUE."
                )
            return
        parts = _output_parts(text)
        if parts is None:
            raise ConfigError(
                f"{self._where()}: {where} is {text!r}, which is neither $env.NAME nor $output.task.field."
            )
        task, field = parts
        if task not in self.outputs:
            before = ", ".join(self.outputs) or "none"
            raise ConfigError(
                f"{self._where()}: {where} is {text!r}, and no task before it is named {task!r}. Before it: {before}."
            )
        fields = [f.name for f in dataclasses.fields(self.outputs[task].Outputs)]
        if field not in fields:
            raise self._located(unknown_name(f"output of {task!r} in {where}", field, fields))


def _environment_name(value: Any) -> str | None:
    if not isinstance(value, str) or not value.startswith("$env."):
        return None
    return value.removeprefix("$env.")


def _output_parts(value: Any) -> tuple[str, str] | None:
    parts = value.split(".") if isinstance(value, str) else []
    return (parts[1], parts[2]) if len(parts) == 3 and parts[0] == "$output" else None


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


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value means the same after the loader's `kind(value)`."""
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        return isinstance(value, bool) and kind is int
    if kind is str:
        return True
    try:
        return kind(value) == value or isinstance(value, str)
    except ValueError:
        return False


def _said(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return "a mapping"
    return str(kind) if get_origin(kind) else str(getattr(kind, "__name__", kind))
