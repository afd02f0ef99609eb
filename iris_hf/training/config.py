"""The configuration of a training run, checked once for every door that leads to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from iris_hf.engine.accelerator import Device
from iris_hf.engine.plugins import Plugin
from iris_hf.errors import ConfigError, require_integer, require_number, unknown_name
from iris_hf.training.optimizers import OPTIMIZERS
from iris_hf.training.schedulers import LrSchedulerConfig

OptimizerName = Literal[
    "sgd",
    "adam",
    "amsgrad",
    "adamw",
    "adamw_amsgrad",
    "rmsprop",
    "zero_adam",
    "zero_amsgrad",
    "zero_adamw",
    "zero_adamw_amsgrad",
]


_COUNTS = ("num_epochs", "batch_size", "num_processes", "keep_checkpoints")
_OPTIONAL_COUNTS = (
    "accumulate_grad_batches",
    "val_batch_size",
    "val_check_interval_epoch",
    "checkpoint_steps",
    "checkpoint_epochs",
    "steps_per_epoch",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The keyword arguments of :func:`iris_hf.train`, which documents them and has the defaults.

    Raises:
        ConfigError: If a value is out of its range or two values contradict each other.
    """

    num_epochs: int
    batch_size: int
    base_lr: float
    device: Device | None
    lr_scheduler: LrSchedulerConfig | Mapping[str, Any] | None
    accumulate_grad_batches: int | None
    momentum: float
    nesterov: bool
    optimizer: OptimizerName
    val_check_interval: float | None
    val_check_interval_epoch: int | None
    val_batch_size: int | None
    weight_decay: float
    num_processes: int
    num_dataloader_workers: int
    no_weight_decay_param_names: Sequence[str] | None
    no_weight_decay_module_class_names: Sequence[str] | None
    lr_scale_param_names: Sequence[tuple[str, float]] | None
    plugins: Sequence[str | Plugin]
    random_seed: int | None
    ddp_find_unused_parameters: bool
    checkpoint_dir: str | Path | None
    checkpoint_steps: int | None
    checkpoint_epochs: int | None
    keep_checkpoints: int
    resume: str | Path | None
    on_bad_example: Literal["raise", "skip"]
    steps_per_epoch: int | None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # a number of numpy is as good as Python's, but not in JSON
                object.__setattr__(self, field.name, value.item())
        for name in _COUNTS:
            require_integer(name, getattr(self, name), at_least=1)
        for name in _OPTIONAL_COUNTS:
            if getattr(self, name) is not None:
                require_integer(name, getattr(self, name), at_least=1)
        require_integer("num_dataloader_workers", self.num_dataloader_workers, at_least=0)
        if self.random_seed is not None:
            require_integer("random_seed", self.random_seed)
        for name in ("base_lr", "weight_decay", "momentum"):
            require_number(name, getattr(self, name), at_least=0)
        if self.val_check_interval is not None:
            require_number("val_check_interval", self.val_check_interval)
            if not 0 < self.val_check_interval <= 1:
                raise ConfigError(
                    f"val_check_interval is a fraction of num_epochs in (0, 1], got {self.val_check_interval}. "
                    "For a number of epochs use val_check_interval_epoch."
                )
        if self.val_check_interval is not None and self.val_check_interval_epoch is not None:
            raise ConfigError(
                f"val_check_interval={self.val_check_interval} and val_check_interval_epoch="
                f"{self.val_check_interval_epoch} say different things: give one of them."
            )
        for name, example in (("checkpoint_dir", "a folder"), ("resume", "'auto' or the folder of a checkpoint")):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str | os.PathLike) and os.fspath(value)):
                raise ConfigError(f"{name} must be {example}, or None; got {value!r}.")
        if self.checkpoint_dir is None:
            for name in ("checkpoint_steps", "checkpoint_epochs"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name}={getattr(self, name)} needs a checkpoint_dir to write to.")
            if self.resume == "auto":
                raise ConfigError("resume='auto' looks into checkpoint_dir: give one, or the folder of a checkpoint.")
        if self.on_bad_example not in ("raise", "skip"):
            raise unknown_name("on_bad_example", self.on_bad_example, ("raise", "skip"))
        OPTIMIZERS.check(self.optimizer, momentum=self.momentum, nesterov=self.nesterov)
        scheduler = LrSchedulerConfig.of(self.lr_scheduler)
        if scheduler.name == "cosine_annealing" and scheduler.min_lr > self.base_lr:
            raise ConfigError(f"min_lr={scheduler.min_lr} is above base_lr={self.base_lr}: the rate would rise.")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> TrainConfig:
        """Pick the configuration out of the arguments of a training function."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in a full optimizer step."""
        return self.accumulate_grad_batches or 1

    def keeps_after_epoch(self, num_done: int, step: int, *, stopped: bool) -> bool:
        """Whether to write a checkpoint after an epoch, given how many epochs and steps are done."""
        if stopped or num_done == self.num_epochs:
            return True
        interval = self.checkpoint_epochs or (None if self.checkpoint_steps else 1)
        return (interval is not None and num_done % interval == 0) or self.keeps_after_step(step)

    def keeps_after_step(self, step: int) -> bool:
        """Whether to write a checkpoint after a step within an epoch, given how many steps are done."""
        return self.checkpoint_steps is not None and step % self.checkpoint_steps == 0

    def validates_after(self, epoch: int) -> bool:
        """Whether the validation set is gone through after epoch `epoch` (from 0): at intervals, and after the last."""
        if self.val_check_interval is not None:
            interval = max(1, int(self.num_epochs * self.val_check_interval + 1e-9))
        else:
            interval = self.val_check_interval_epoch or 1
        return (epoch + 1) % interval == 0 or epoch + 1 == self.num_epochs


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How a gradient cache divides a batch; see :func:`iris_hf.train_with_gradient_cache`.

    Raises:
        ConfigError: If a value is out of its range, or two contradict each other.
    """

    sub_batch_size: int
    num_kept_graphs: int
    memory_budget_in_mb: float | None
    check_replay: bool

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            if isinstance(value, np.generic):  # as in TrainConfig
                object.__setattr__(self, name, value.item())
        require_integer("sub_batch_size", self.sub_batch_size, at_least=1)
        require_integer("num_kept_graphs", self.num_kept_graphs, at_least=0)
        if self.memory_budget_in_mb is not None:
            require_number("memory_budget_in_mb", self.memory_budget_in_mb, at_least=0)
            if self.num_kept_graphs:
                raise ConfigError(
                    f"num_kept_graphs={self.num_kept_graphs} and memory_budget_in_mb={self.memory_budget_in_mb} "
                    "say different things: give one of them."
                )
