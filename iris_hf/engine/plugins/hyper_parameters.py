"""What describes a run to people who compare runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from iris_hf.engine.plugins.base import Plugin, TrainState


def hyper_parameters(state: TrainState) -> dict[str, str | int | float | bool]:
    """Describe a run by numbers and strings: the arguments of training, then facts."""
    parameters = list(state.model.parameters())
    optimizer = {k: v for k, v in state.optimizer.param_groups[0].items() if k not in ("params", "lr", "initial_lr")}
    return flat(
        {
            **state.config,
            "model": type(state.model).__name__,
            "num_parameters": sum(parameter.numel() for parameter in parameters),
            "num_trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            "steps_per_epoch": state.steps_per_epoch,
            "examples_per_step": state.examples_per_step,
            "num_processes": state.accelerator.num_processes,
            "device": state.accelerator.device.type,
            "mixed_precision": state.accelerator.mixed_precision,
            "optimizer": type(state.optimizer).__name__,
            **{f"optimizer/{name}": value for name, value in optimizer.items()},
        }
    )


def flat(values: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Turn values of any type into numbers and strings; those in mappings get the name `name/key`; None is left out."""
    result: dict[str, str | int | float | bool] = {}
    for name, value in values.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping):
            result.update(flat({f"{name}/{key}": nested for key, nested in value.items()}))
        elif isinstance(value, (str, int, float, bool)):
            result[name] = value
        elif isinstance(value, (list, tuple)):
            result[name] = ", ".join(map(_described, value))
        elif value is not None:
            result[name] = _described(value)
    return result


def _described(value: Any) -> str:
    """Name a plugin by its class, without an address in memory, and anything else by its text."""
    return type(value).__name__ if isinstance(value, Plugin) else str(value)
