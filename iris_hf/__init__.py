"""The irisml training tasks on the Hugging Face stack.

Names load on first use: `import iris_hf` imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from iris_hf._version import __version__

if TYPE_CHECKING:
    from iris_hf.data.collate import collate
    from iris_hf.engine.plugins.base import Plugin, PredictState, RunState, TrainState
    from iris_hf.errors import ConfigError, DataError, IrisHFError, MissingDependencyError
    from iris_hf.inference.predictor import predict
    from iris_hf.metrics.classification import evaluate_accuracy
    from iris_hf.training.schedulers import LrSchedulerConfig
    from iris_hf.training.trainer import train

_HOMES = {
    "iris_hf.data.collate": ["collate"],
    "iris_hf.engine.plugins.base": ["Plugin", "PredictState", "RunState", "TrainState"],
    "iris_hf.errors": ["ConfigError", "DataError", "IrisHFError", "MissingDependencyError"],
    "iris_hf.inference.predictor": ["predict"],
    "iris_hf.metrics.classification": ["evaluate_accuracy"],
    "iris_hf.training.schedulers": ["LrSchedulerConfig"],
    "iris_hf.training.trainer": ["train"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
