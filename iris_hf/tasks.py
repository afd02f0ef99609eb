"""The one table of tasks, and what their signatures say.

A task is a function. Parameters before `*` are its inputs, keyword-only ones its configuration, and its return
annotation names the outputs. The command line and the documentation table are views of this.
"""

from __future__ import annotations

import builtins
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

from iris_hf.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class Field:
    """A parameter or an output of a task.

    Attributes:
        name: Its name.
        annotation: Its resolved type.
        default: Its default; `inspect.Parameter.empty` where it has none.
        help: What the docstring says of it, on one line.
    """

    name: str
    annotation: Any
    default: Any = inspect.Parameter.empty
    help: str = ""

    @property
    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class Task:
    """An entry of the table.

    Attributes:
        name: The task's name, that of the function.
        home: Module of the function.
        output: Name of the output that is returned bare; None for a function that returns a NamedTuple, or nothing.
        function_name: Name of the function where it is another one.
    """

    name: str
    home: str
    output: str | None = None
    function_name: str | None = None

    @property
    def python_name(self) -> str:
        """What the function is called in `iris_hf`."""
        return self.function_name or self.name

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The task itself."""
        function: Callable[..., Any] = getattr(import_module(self.home), self.python_name)
        return function

    @cached_property
    def summary(self) -> str:
        """The first line of the docstring."""
        return plain((inspect.getdoc(self.function) or "").partition("\n")[0])

    @cached_property
    def inputs(self) -> tuple[Field, ...]:
        """The parameters before `*`."""
        return tuple(f for f, kind in self._parameters if kind is not inspect.Parameter.KEYWORD_ONLY)

    @cached_property
    def config(self) -> tuple[Field, ...]:
        """The keyword-only parameters."""
        return tuple(f for f, kind in self._parameters if kind is inspect.Parameter.KEYWORD_ONLY)

    @cached_property
    def outputs(self) -> tuple[Field, ...]:
        """What the function returns."""
        returned = self._hints["return"]
        if self.output is not None:
            return (Field(name=self.output, annotation=returned),)
        if returned is types.NoneType:
            return ()
        texts = described(returned, "Attributes")
        hints = typing.get_type_hints(returned)
        return tuple(Field(name=n, annotation=hints[n], help=texts.get(n, "")) for n in returned._fields)

    def named_outputs(self, result: Any) -> dict[str, Any]:
        """Return what the function returned by the names of the outputs."""
        values = () if not self.outputs else (result,) if self.output is not None else result
        return {field.name: value for field, value in zip(self.outputs, values, strict=True)}

    @property
    def _hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.function, localns=_Names(inspect.unwrap(self.function).__globals__))

    @cached_property
    def _parameters(self) -> list[tuple[Field, Any]]:
        texts, hints = described(self.function, "Args"), self._hints
        return [
            (Field(name=p.name, annotation=hints[p.name], default=p.default, help=texts.get(p.name, "")), p.kind)
            for p in inspect.signature(self.function).parameters.values()
        ]


def union_members(annotation: Any) -> list[Any]:
    """Return the alternatives of a union without None, or the annotation itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for part in typing.get_args(annotation) for m in union_members(part)]
    return [] if annotation is types.NoneType else [annotation]


class _Names(dict[str, Any]):
    """The names in a function's annotations; Any for types of heavy libraries, imported for type checkers only."""

    def __init__(self, module_names: Mapping[str, Any]) -> None:
        self._module_names = module_names

    def __missing__(self, name: str) -> Any:
        return self._module_names.get(name, getattr(builtins, name, Any))


def described(documented: Any, section: str) -> dict[str, str]:
    """Return name -> text of one section of a Google-style docstring."""
    doc = inspect.getdoc(documented) or ""
    found = re.search(rf"^{section}:\n((?:[ ]{{4}}.*\n?|\n)+)", doc, re.MULTILINE)
    entries = re.split(r"^    (?=\w+: )", found.group(1), flags=re.MULTILINE) if found else []
    pairs = (entry.partition(": ") for entry in entries if ": " in entry)
    return {name.strip(): plain(" ".join(text.split())) for name, _, text in pairs}


def plain(text: str) -> str:
    """Return text of a docstring without Sphinx's roles and modules' names."""
    return re.sub(r":\w+:`(?:[\w.]+\.)?(\w+)`", r"`\1`", text)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("train", "iris_hf.training.trainer"),
        Task("train_with_gradient_cache", "iris_hf.training.trainer"),
        Task("predict", "iris_hf.inference.predictor"),
        Task("benchmark_model", "iris_hf.inference.benchmark"),
        Task("append_classifier", "iris_hf.models.classifier", output="model"),
        Task("create_hf_model", "iris_hf.models.sources.transformers", output="model"),
        Task("create_timm_model", "iris_hf.models.sources.timm", output="model"),
        Task("create_open_clip_model", "iris_hf.models.sources.open_clip", output="model"),
        Task("create_hf_text_encoder", "iris_hf.models.sources.text_encoders", output="model"),
        Task("make_feature_extractor_model", "iris_hf.models.feature_extractor", output="model"),
        Task("make_image_text_contrastive_model", "iris_hf.models.contrastive", output="model"),
        Task("split_image_text_model", "iris_hf.models.contrastive"),
        Task("build_zero_shot_classifier", "iris_hf.models.zero_shot", output="classifier"),
        Task(
            "create_hf_transform",
            "iris_hf.models.transforms",
            output="transform",
            function_name="create_image_transform",
        ),
        Task(
            "create_hf_tokenizer",
            "iris_hf.models.sources.open_clip",
            output="tokenizer",
            function_name="create_tokenizer",
        ),
        Task("save_pretrained", "iris_hf.models.hub"),
        Task("from_pretrained", "iris_hf.models.hub", output="model"),
        Task("export_onnx", "iris_hf.export.onnx", output="data"),
        Task("load_onnx", "iris_hf.export.runtime", output="model"),
        Task("push_to_hub", "iris_hf.hub.push_model"),
        Task("load_hf_dataset", "iris_hf.data.storage"),
        Task("save_hf_dataset", "iris_hf.data.storage"),
        Task("push_dataset_to_hub", "iris_hf.hub.push_dataset"),
        Task("get_targets_from_dataset", "iris_hf.data.read_targets", output="targets"),
        Task("get_subclass_dataset", "iris_hf.data.subclass"),
        Task("sample_few_shot_dataset", "iris_hf.data.sampling", output="dataset"),
        Task("make_oversampled_dataset", "iris_hf.data.sampling", output="dataset"),
        Task("create_classification_prompt_generator", "iris_hf.data.prompts", output="generator"),
        Task("build_classification_prompt_dataset", "iris_hf.data.prompts", output="dataset"),
        Task("make_image_text_transform", "iris_hf.data.image_text_transform", output="transform"),
        Task("evaluate_accuracy", "iris_hf.metrics.classification", output="accuracy"),
        Task("evaluate_detection_average_precision", "iris_hf.metrics.detection", output="results"),
    )
}
"""Every task by its name."""


def find_task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        ConfigError: If there is none; the message lists near names.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
