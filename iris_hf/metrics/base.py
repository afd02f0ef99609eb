"""The joint between our statistics and `evaluate`: a metric that keeps numbers instead of Arrow files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import evaluate

from iris_hf.errors import ConfigError


class Statistics(Protocol):
    """What a metric remembers of the batches it has seen."""

    def __len__(self) -> int:
        """Return the number of examples seen."""
        ...

    def update(self, predictions: Any, targets: Any) -> None:
        """Add a batch; a batch that raises leaves the statistics as they were."""
        ...

    def result(self) -> dict[str, Any]:
        """Return the scores of all that was added, as values that JSON can hold."""
        ...


class StatisticsMetric(evaluate.Metric, ABC):  # type: ignore[misc]  # evaluate ships no types
    """An `evaluate` metric whose batches are reduced at once to small statistics in memory.

    It writes nothing to disk, so that any number of instances live side by side, and it pickles. Options are given
    to the constructor, which `evaluate.load(path, option=value)` calls too. On several processes, gather with
    `accelerator.gather_for_metrics` (`use_gather_object=True` for lists) and compute on the main process.
    A subclass gives `_info()` and `_new_statistics()`.

    Raises:
        ConfigError: If `num_process` isn't 1: that road would count the padding of the last batch.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("num_process", 1) != 1:
            raise ConfigError(
                f"num_process must be 1, got {kwargs['num_process']}. "
                "Gather with accelerator.gather_for_metrics and compute on the main process instead."
            )
        super().__init__(**kwargs)
        self.info.module_name = type(self).__module__.rpartition(".")[2]  # mean_iou, not evaluate's mean_io_u
        self._statistics = self._new_statistics()

    @abstractmethod
    def _new_statistics(self) -> Statistics:
        """Return empty statistics."""

    def __len__(self) -> int:
        return len(self._statistics)

    def __getstate__(self) -> dict[str, Any]:
        # evaluate puts copies of these methods on the instance; the class's own serve after unpickling.
        return {k: v for k, v in self.__dict__.items() if k not in ("add", "add_batch", "compute")}

    def _build_data_dir(self) -> str:
        return str(self._data_dir_root)  # never written to, so not created

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one example.

        Args:
            prediction: The prediction, one row of what `add_batch` takes.
            reference: The target.
            **kwargs: `predictions` and `references`, the names by which `evaluate.combine` passes one example.
        """
        example = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: None if value is None else [value] for name, value in example.items()})

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add a batch.

        Args:
            predictions: The predictions.
            references: The targets.
            **kwargs: Nothing else is known; anything here is an error.

        Raises:
            ConfigError: If an input is unknown or missing.
            DataError: If the batch isn't in the format. What was added before stays.
        """
        self._refuse(kwargs)
        missing = [n for n, v in (("predictions", predictions), ("references", references)) if v is None]
        if missing:
            raise ConfigError(f"{self.name} needs predictions and references; {' and '.join(missing)} not given.")
        self._statistics.update(predictions, references)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Score everything added since the last `compute`, and start anew (also when it raises).

        Args:
            predictions: One more batch, added first.
            references: Its targets.
            **kwargs: Nothing else is known; anything here is an error.

        Returns:
            The scores; their names and ranges are in the class's docstring.

        Raises:
            ConfigError: If an input is unknown or missing.
            DataError: If there are no examples, or the batch isn't in the format.
        """
        try:
            self._refuse(kwargs)
            if predictions is not None or references is not None:
                self.add_batch(predictions=predictions, references=references)
            return self._statistics.result()
        finally:
            self._statistics = self._new_statistics()

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        if kwargs:
            raise ConfigError(
                f"{self.name} does not know {', '.join(sorted(kwargs))}. "
                "Its inputs are predictions and references; options go to the constructor or to evaluate.load."
            )
