"""Metrics as pure functions, and as `evaluate` modules that keep compact statistics.

Every module sits at `iris_hf/metrics/<name>/<name>.py`, so `evaluate.load` takes that folder's path; no network.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iris_hf.metrics.accuracy.accuracy import Accuracy
    from iris_hf.metrics.classification import evaluate_accuracy

_HOME_OF = {
    "Accuracy": "iris_hf.metrics.accuracy.accuracy",
    "evaluate_accuracy": "iris_hf.metrics.classification",
}

__all__ = ["Accuracy", "evaluate_accuracy"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
