"""Plugins: what they are, the registry, and those that come with the library."""

from iris_hf.engine.plugins.base import Plugin, PluginList, PredictState, RunState, TrainState
from iris_hf.engine.plugins.registry import load_plugins

__all__ = ["Plugin", "PluginList", "PredictState", "RunState", "TrainState", "load_plugins"]
