"""Models that give features: the output of a part of a model, or of all of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, unknown_name
from iris_hf.models.image_spec import ImageSpec
from iris_hf.models.recipe import record


class FeatureExtractor(nn.Module):
    """A model that stops at one of its parts. Made by :func:`make_feature_extractor_model`.

    Attributes:
        model: The model, whose forward no longer gets beyond that part.
        output_module_name: The path of the part; None runs the whole model.
        target_type: None, as for every encoder.
        num_classes: 0, as for every encoder.
        class_names: None, as for every encoder.
        image_spec: The images that the model takes, or None if unknown.
    """

    target_type = None
    num_classes = 0
    class_names = None

    def __init__(self, model: nn.Module, output_module_name: str | None) -> None:
        super().__init__()
        spec = getattr(model, "image_spec", None)
        self.image_spec = spec if isinstance(spec, ImageSpec) else None
        self.output_module_name = output_module_name
        self.model = model
        self.training = model.training
        if output_module_name is not None:
            parts = {name: part for name, part in model.named_modules(remove_duplicate=False) if name}
            if not isinstance(output_module_name, str) or output_module_name not in parts:
                raise unknown_name(f"module of {type(model).__name__}", output_module_name, parts)
            self._stop = _Stop()
            parts[output_module_name].register_forward_hook(self._stop)

    @property
    def tokenizer_name(self) -> str | None:
        """The name of the model's tokenizer, or None."""
        return getattr(self.model, "tokenizer_name", None)

    def forward(self, inputs: Any) -> Tensor:
        """Give the features of a batch.

        Raises:
            ConfigError: If the part doesn't run for these inputs, or no tensor comes out of it.
        """
        if self.output_module_name is None:
            return self._first_tensor(self.model(inputs))
        reached = self._run_through(inputs) if _is_exporting() else self._run_until(inputs)
        if reached is None:
            raise ConfigError(
                f"The module {self.output_module_name!r} does not run when {type(self.model).__name__} is called. "
                "Choose another."
            )
        return self._first_tensor(reached[0])

    def prediction_step(self, inputs: Any) -> Tensor:
        """Give the features `[N, ...]` of a batch."""
        features: Tensor = self(inputs)
        return features

    def _run_until(self, inputs: Any) -> tuple[Any] | None:
        try:
            self.model(inputs)
        except _Reached as reached:
            stop, output = reached.args
            if stop is not self._stop:  # that of an extractor around this one
                raise
            return (output,)
        return None

    def _run_through(self, inputs: Any) -> tuple[Any] | None:
        """Run the whole model: the exporter loses its place by an exception, and drops by itself what is unused."""
        self._stop.kept = None
        self.model(inputs)
        kept, self._stop.kept = self._stop.kept, None
        return kept

    def _first_tensor(self, output: Any) -> Tensor:
        values = list(output.values()) if isinstance(output, Mapping) else output
        found = values if isinstance(values, Tensor) else None
        if isinstance(values, Sequence):
            found = next((value for value in values if isinstance(value, Tensor)), None)
        if found is None:
            raise ConfigError(f"{self.output_module_name or 'The model'} gives a {type(output).__name__}, no tensor.")
        return found


def _is_exporting() -> bool:
    """Whether torch.export runs the model in Python, as it does by default."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


class _Reached(Exception):
    """Carries the hook that stopped, and an output, past everything that would have come after it.

    It needs no place to keep the output between the part and the caller, so threads don't meet. They are its `args`:
    torch.export cannot trace an exception with an `__init__`.
    """


class _Stop:
    """The hook of the part: it ends the run, or, under the exporter, keeps the first output."""

    def __init__(self) -> None:
        self.kept: tuple[Any] | None = None

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not _is_exporting():
            raise _Reached(self, output)
        if self.kept is None:
            self.kept = (output,)


def make_feature_extractor_model(model: nn.Module, *, output_module_name: str | None = None) -> FeatureExtractor:
    """Make a model whose `prediction_step` gives the output of a part of another model. That model is copied.

    Nothing is computed after that part. Threads may share the result, and it can be exported.

    Args:
        model: Any model with `forward(inputs)`.
        output_module_name: The dotted path of a submodule, such as `network.network.layer4`; of several calls the
            first counts. None takes the output of the whole model. Of a tuple, a dict or a ModelOutput the first
            tensor is taken.

    Raises:
        ConfigError: If there is no such submodule; the message lists near names.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    return record(
        FeatureExtractor(copy.deepcopy(model), output_module_name),
        "make_feature_extractor_model",
        model=model,
        output_module_name=output_module_name,
    )
