"""From `"ema(decay=0.99)"` to a plugin."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from iris_hf.engine.plugins.base import Plugin, PluginList
from iris_hf.errors import ConfigError, unknown_name

ENTRY_POINT_GROUP = "iris_hf.plugins"
"""Other packages publish plugins as entry points of this group: `my_plugin = my_package.module:MyPlugin`."""

BUILT_IN = {
    "amp": "iris_hf.engine.plugins.amp:Amp",
    "clip_grad_norm": "iris_hf.engine.plugins.clip_grad_norm:ClipGradNorm",
    "compile": "iris_hf.engine.plugins.compile:Compile",
    "early_stopping": "iris_hf.engine.plugins.early_stopping:EarlyStopping",
    "ema": "iris_hf.engine.plugins.ema:EMA",
    "freeze_modules": "iris_hf.engine.plugins.freeze_modules:FreezeModules",
    "heartbeat": "iris_hf.engine.plugins.heartbeat:Heartbeat",
    "log_summary": "iris_hf.engine.plugins.log_summary:LogSummary",
    "log_tensorboard": "iris_hf.engine.plugins.trackers:LogTensorboard",
    "log_tracker": "iris_hf.engine.plugins.trackers:LogTracker",
    "mixup": "iris_hf.engine.plugins.mixup:Mixup",
    "profile": "iris_hf.engine.plugins.profile:Profile",
    "progressbar": "iris_hf.engine.plugins.progressbar:ProgressBar",
    "save_best": "iris_hf.engine.plugins.save_best:SaveBest",
    "stop_if_loss_is_nan": "iris_hf.engine.plugins.stop_if_loss_is_nan:StopIfLossIsNan",
    "val_metrics": "iris_hf.engine.plugins.val_metrics:ValMetrics",
}
"""Name -> `module:class` of the plugins of this library."""

NOTHING_TO_DO = ("call_dataset_set_epoch", "ddp", "nop")
"""Plugins of irisml that do nothing, or what every run does."""

_TASKS_OF_MIXUP = ("classification_multiclass", "classification_multilabel", "object_detection")


def load_plugins(specifications: Sequence[str | Plugin], *, before: Sequence[str | Plugin] = ()) -> PluginList:
    """Make the plugins of a run.

    Args:
        specifications: Names with or without arguments, `"ema"` or `"ema(0.99, num_skip_iterations=50)"`, or
            plugin objects.
        before: Those that run before them: a model's own.

    Raises:
        ConfigError: If a name is unknown, two packages publish it, it is not of the form `name(arguments)`, or
            the arguments do not fit the plugin, or one that comes once comes again.
    """
    for given in (before, specifications):
        if isinstance(given, str):
            raise ConfigError(f"plugins must be a list of plugins, got the string {given!r}. Put it in a list.")
    plugins = [s if isinstance(s, Plugin) else make_plugin(s) for s in (*before, *specifications)]
    for kind, count in Counter(type(plugin) for plugin in plugins if plugin.comes_once).items():
        if count > 1:
            raise ConfigError(f"plugins name {kind.__name__} {count} times, the model's own included. Leave one.")
    return PluginList(plugins)


def make_plugin(specification: str) -> Plugin:
    """Make one plugin of a string; see :func:`load_plugins`."""
    name, args, kwargs = parse(specification)
    plugin_class = find_plugin(name)
    args = without_irismls(name, args)
    signature = inspect.signature(plugin_class).replace(return_annotation=inspect.Signature.empty)
    try:
        signature.bind(*args, **kwargs)
        return plugin_class(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"Plugin {specification!r}: {error}. Its arguments: {name}{signature}.") from error


def parse(specification: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Split `name(arguments)` into name, positional and keyword arguments, which are Python literals."""
    malformed = ConfigError(f"Plugin {specification!r} is not of the form name or name(1, key='value').")
    if not isinstance(specification, str):
        raise ConfigError(f"A plugin is a string or a Plugin object, got {type(specification).__name__}.")
    try:
        node = ast.parse(specification.strip(), mode="eval").body
        if isinstance(node, ast.Name):
            return node.id, [], {}
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise malformed
        args = [ast.literal_eval(argument) for argument in node.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
        if len(kwargs) != len(node.keywords):
            raise malformed
    except (SyntaxError, ValueError) as error:
        raise malformed from error
    return node.func.id, args, kwargs


def without_irismls(name: str, args: list[Any]) -> list[Any]:
    """Leave out what irisml's plugin of the same name is told and the one here need not be."""
    if name == "mixup" and args and args[0] in _TASKS_OF_MIXUP:  # the model and the targets tell it
        return args[1:]
    if name == "compile" and args[1:] == ["fp32"]:
        return args[:1]
    return args


def find_plugin(name: str) -> type[Plugin]:
    """Return the class of a plugin name, built in or published by another package."""
    published = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if clash := published.keys() & BUILT_IN.keys():
        raise ConfigError(f"Another package publishes a plugin by a name of iris_hf: {', '.join(sorted(clash))}.")
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        plugin_class: type[Plugin] = getattr(import_module(module), attribute)
        return plugin_class
    if name in NOTHING_TO_DO and name not in published:
        return Plugin
    if name not in published:
        raise unknown_name("plugin", name, BUILT_IN.keys() | published.keys())
    loaded = published[name].load()
    if not (isinstance(loaded, type) and issubclass(loaded, Plugin)):
        raise ConfigError(f"The entry point {name!r} gives {loaded!r}, which is not a subclass of iris_hf.Plugin.")
    return loaded
