"""What makes two runs the same run, and what may change where one goes on."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from iris_hf.engine.plugins import Plugin
from iris_hf.errors import ConfigError

Settings = dict[str, Any]
"""By name, as JSON has it."""

_SHAPING = ("transform_model", "transform_batch", "forward_context", "on_gradients_ready", "validation_context")


@dataclass(frozen=True)
class RunFacts:
    """What makes two runs the same run, step by step.

    Attributes:
        random_seed: The seed.
        num_examples: Examples in the train set; None for a stream of unknown length.
        examples_per_step: Examples of all processes in a full step.
        examples_per_epoch: Examples of all processes in an epoch, whose last step may have fewer.
        examples_per_micro_batch: Examples of all processes in a micro-batch. May change on the way, unless the loss of
            a micro-batch is no mean over its examples.
        loss_is_joint: Whether a micro-batch has one loss of all its examples, of all processes: a contrastive one, or
            any with a gradient cache.
        num_epochs: Epochs asked for, which the learning-rate curve depends on.
        steps_per_epoch: Optimizer steps in an epoch.
        optimizer: Its name.
        base_lr: The base learning rate.
        lr_scheduler: The configuration of the curve, as JSON.
        weight_decay: The weight decay.
        momentum: The momentum.
        nesterov: Whether it is Nesterov's.
        num_stream_parts: Parts that a stream is read in; None for a map-style data set.
        num_stream_shards: Shards of a stream, where that is known.
        stream_shuffled_by: Stands for the seed and the buffer that a stream is shuffled by.
        settings: What shapes training as well, and may change on the way.
    """

    random_seed: int
    num_examples: int | None
    examples_per_step: int
    examples_per_epoch: int
    examples_per_micro_batch: int = field(compare=False)
    loss_is_joint: bool = field(compare=False)
    num_epochs: int
    steps_per_epoch: int
    optimizer: str
    base_lr: float
    lr_scheduler: str
    weight_decay: float
    momentum: float
    nesterov: bool
    num_stream_parts: int | None = None
    num_stream_shards: int | None = None
    stream_shuffled_by: str = ""
    settings: Settings = field(default_factory=dict, compare=False)

    def differences(self, before: RunFacts) -> list[str]:
        """Say what makes this another run than one before; nothing if it is the same."""
        names = [each.name for each in fields(self) if each.compare]
        if self.loss_is_joint or before.loss_is_joint:
            names.append("examples_per_micro_batch")
        pairs = {name: (getattr(before, name), getattr(self, name)) for name in names}
        return [f"{name} was {was!r}, now {now!r}" for name, (was, now) in pairs.items() if was != now]

    def changes(self, before: RunFacts) -> list[str]:
        """Say what may change and is not what it was: settings, and how many examples a micro-batch has."""
        was, now = (
            {"examples_per_micro_batch": facts.examples_per_micro_batch, **facts.settings} for facts in (before, self)
        )

        def describe(settings: Settings, name: str) -> str:
            return repr(settings[name]) if name in settings else "absent"

        return [
            f"{name} was {describe(was, name)}, now {describe(now, name)}"
            for name in {**was, **now}
            if describe(was, name) != describe(now, name)
        ]


def plugin_settings(named: Iterable[tuple[str, Plugin]]) -> Settings:
    """Return what the plugins that take part in training were made with, so far as they keep it by these names."""
    return {
        f"plugin {name}": {
            argument: plain(getattr(plugin, argument))
            for argument in inspect.signature(type(plugin)).parameters
            if hasattr(plugin, argument)
        }
        for name, plugin in named
        if any(getattr(type(plugin), hook) is not getattr(Plugin, hook) for hook in _SHAPING)
    }


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back; of what JSON cannot hold, the name of its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else type(value).__name__


def another_run(folder: Path, why: str) -> ConfigError:
    """Return the error of a checkpoint from which a run cannot go on."""
    return ConfigError(
        f"The checkpoint {str(folder)!r} belongs to another run: {why}. To start afresh, leave out resume or choose "
        "another checkpoint_dir."
    )


def regrouping(before: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> str | None:
    """Say why an optimizer's state does not fit; None if it does.

    Args:
        before: Names of the parameters in each of the optimizer's groups, as the state has them.
        now: The same of the optimizer.
    """
    if before == now:
        return None
    was, is_now = (
        {name: f"in group {number}" for number, group in enumerate(groups, 1) for name in group}
        for groups in (before, now)
    )
    moved = [name for name in {**was, **is_now} if was.get(name) != is_now.get(name)]
    if not moved:
        return "the parameters come in another order"
    first, others = moved[0], f" (so do {len(moved) - 1} more)" if len(moved) > 1 else ""
    places = (places.get(first, "not trained") for places in (was, is_now))
    return "the parameter {!r} was {}, now {}{}".format(first, *places, others)
