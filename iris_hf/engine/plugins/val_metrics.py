"""Metrics of the validation set during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iris_hf.engine.loader import to_device
from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.engine.plugins.monitor import require_validation
from iris_hf.engine.plugins.predictions import make_predictor, predict_batch
from iris_hf.errors import ConfigError, unknown_name
from iris_hf.models.steps import Predictor

if TYPE_CHECKING:
    from evaluate import EvaluationModule


class ValMetrics(Plugin):
    """Measures predictions on the validation set by modules of `evaluate`; results stand in `state.val_metrics`.

    Predictions are those of :func:`iris_hf.predict`, in a forward pass beside that of the loss, with the averaged
    weights where the plugin ema keeps some. Every example counts once on any number of processes; the modules see them
    in order, on the main process. Of the results, numbers are kept, those in a dict by `name/key`; lists are left out.

    Attributes:
        modules: What to compute: modules, or what `evaluate.load` takes, where the names of iris_hf's own
            (`accuracy`, `detection_average_precision`, `mean_iou`, `multilabel_average_precision`, `retrieval`) come
            first.
        convert: `(predictions, targets) -> (predictions, references)` of a batch, on the CPU, for modules that take
            other forms, such as class indices.
    """

    def __init__(
        self,
        modules: str | EvaluationModule | Sequence[str | EvaluationModule],
        convert: Callable[[Any, Any], tuple[Any, Any]] | None = None,
    ) -> None:
        given = list(modules) if isinstance(modules, Sequence) and not isinstance(modules, str) else [modules]
        if not given:
            raise ConfigError("val_metrics: name at least one metric.")
        self.modules = [load_metric(module) if isinstance(module, str) else module for module in given]
        self.convert = convert
        self._predictor: Predictor | None = None
        self._batches: list[tuple[int, tuple[Any, Any]]] = []

    def on_train_start(self, state: TrainState) -> None:
        """Refuse a run without validations."""
        require_validation(state, "val_metrics")

    def on_validation_start(self, state: TrainState) -> None:
        """Make the model predict."""
        self._predictor = make_predictor(state)

    def on_validation_batch(self, state: TrainState, batch: tuple[Any, Any]) -> None:
        """Predict a batch."""
        assert self._predictor is not None
        measured = predict_batch(state, self._predictor, batch[0]), to_device(batch[1], torch.device("cpu"))
        self._batches.append((state.val_position, self.convert(*measured) if self.convert is not None else measured))
        if state.accelerator.num_processes == 1:
            self._add()

    def validation_metrics(self, state: TrainState) -> dict[str, float]:
        """Compute the metrics of all batches.

        Raises:
            ConfigError: If two modules give the same name.
        """
        from accelerate.utils import broadcast_object_list, gather_object

        self._predictor = None
        results: dict[str, float] = {}
        self._batches = sorted(gather_object(self._batches), key=itemgetter(0))  # parts of a batch stay in order
        if state.is_main_process:
            self._add()
            for module in self.modules:
                computed = numbers_in(module.compute())
                if clash := sorted(computed.keys() & {*results, "val_loss"}):
                    raise ConfigError(f"val_metrics: two metrics have the name {', '.join(clash)}.")
                results.update(computed)
        self._batches = []
        shared: dict[str, float] = broadcast_object_list([results])[0]
        return shared

    def on_exit(self) -> None:
        """Let go of the model."""
        self._predictor, self._batches = None, []

    def _add(self) -> None:
        for _, (predictions, references) in self._batches:
            for module in self.modules:
                module.add_batch(predictions=predictions, references=references)
        self._batches = []


def load_metric(name: str) -> EvaluationModule:
    """Load a metric of iris_hf by its name, or whatever `evaluate.load` finds.

    Raises:
        ConfigError: If neither knows it.
    """
    import evaluate

    own = {path.stem: str(path.parent) for path in (Path(__file__).parents[2] / "metrics").glob("*/[a-z]*.py")}
    try:
        return evaluate.load(own.get(name, name))
    except FileNotFoundError as error:
        raise ConfigError(f"{unknown_name('metric', name, own)} evaluate.load finds no other: {error}") from error


def numbers_in(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in a metric's results, those of nested dicts by `name/key`."""
    numbers: dict[str, float] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            numbers.update(numbers_in(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", None) == 0):
            numbers[f"{prefix}{key}"] = float(value.item() if isinstance(value, Tensor) else value)
    return numbers
