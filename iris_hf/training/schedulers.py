"""Learning-rate curves in closed form: a rate is a function of the step, so there is no state to save or to drift."""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from torch.optim import Optimizer

from iris_hf.errors import ConfigError, require_integer, require_number, unknown_name

logger = logging.getLogger(__name__)

SchedulerName = Literal["cosine_annealing", "linear_decreasing", "linear", "multistep", "multistep_with_warm_up"]


@dataclass(frozen=True, kw_only=True)
class LrSchedulerConfig:
    """A learning-rate curve over the optimizer steps of a run, with an optional linear warm-up before it.

    Attributes:
        name: `cosine_annealing` falls from the base rate to `min_lr` along half a cosine (Loshchilov and
            Hutter, arXiv 1608.03983); `linear_decreasing` to 0 and `linear` to `end_factor` times the
            base rate along a line; `multistep` multiplies by `decay_rate` at each milestone;
            `multistep_with_warm_up` is the same with its milestones counted from the start of the
            warm-up, which it must have.
        warmup_epochs: Length of the warm-up in epochs.
        warmup_iters: Length of the warm-up in optimizer steps; exclusive with `warmup_epochs`.
        warmup_lr: Learning rate at the first step of the warm-up.
        warmup_factor: The same as a fraction of the base rate; exclusive with `warmup_lr`. With neither, the
            warm-up starts at 0.
        warmup_end_factor: Fraction of the base rate that the warm-up reaches.
        min_lr: Lowest rate of `cosine_annealing`, absolute.
        end_factor: Last fraction of `linear`; may exceed 1.
        decay_milestones: Fractions, in (0, 1), of the steps (without the warm-up, but for
            `multistep_with_warm_up`).
        decay_rate: Factor at each milestone.

    Raises:
        ConfigError: If values are unknown, missing, out of their range or contradict each other.
    """

    name: SchedulerName = "cosine_annealing"
    warmup_epochs: int | None = None
    warmup_iters: int | None = None
    warmup_lr: float | None = None
    warmup_factor: float | None = None
    warmup_end_factor: float = 1.0
    min_lr: float = 0.0
    end_factor: float = 1.0
    decay_milestones: Sequence[float] | None = None
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in get_args(SchedulerName):
            raise unknown_name("lr_scheduler", self.name, get_args(SchedulerName))
        for name in ("warmup_epochs", "warmup_iters"):
            if getattr(self, name) is not None:
                require_integer(f"lr_scheduler: {name}", getattr(self, name), at_least=0)
        for name in ("warmup_lr", "warmup_factor"):
            if getattr(self, name) is not None:
                require_number(f"lr_scheduler: {name}", getattr(self, name), at_least=0)
        for name in ("warmup_end_factor", "min_lr", "end_factor", "decay_rate"):
            require_number(f"lr_scheduler: {name}", getattr(self, name), at_least=0)
        if self.decay_milestones is not None:
            _check_milestones(self.decay_milestones)
        if self.warmup_epochs and self.warmup_iters:
            raise ConfigError(
                f"warmup_epochs={self.warmup_epochs} and warmup_iters={self.warmup_iters}: give one of them."
            )
        if self.warmup_lr is not None and self.warmup_factor is not None:
            raise ConfigError(f"warmup_lr={self.warmup_lr} and warmup_factor={self.warmup_factor}: give one of them.")
        if self.name.startswith("multistep") and not self.decay_milestones:
            raise ConfigError(f"lr_scheduler {self.name!r} needs decay_milestones, such as [0.5, 0.75].")
        if self.name == "multistep_with_warm_up" and not (self.warmup_epochs or self.warmup_iters):
            raise ConfigError("lr_scheduler 'multistep_with_warm_up' needs warmup_epochs or warmup_iters.")

    @classmethod
    def of(cls, config: LrSchedulerConfig | Mapping[str, Any] | None) -> LrSchedulerConfig:
        """Make a config of a mapping; cosine annealing of None.

        None as a value means the default, as in irisml's jobs.

        Raises:
            ConfigError: If a key is unknown.
        """
        if isinstance(config, LrSchedulerConfig):
            return config
        if config is not None and not isinstance(config, Mapping):
            raise ConfigError(f"lr_scheduler must be a mapping such as {{'name': 'linear'}}, got {config!r}.")
        known = {field.name for field in fields(cls)}
        for key in config or {}:
            if key not in known:
                raise unknown_name("field of lr_scheduler", key, known)
        return cls(**{key: value for key, value in (config or {}).items() if value is not None})


def _check_milestones(milestones: Any) -> None:
    if not isinstance(milestones, Sequence) or isinstance(milestones, str):
        raise ConfigError(f"lr_scheduler: decay_milestones must be a list such as [0.5, 0.75], got {milestones!r}.")
    for milestone in milestones:
        require_number("lr_scheduler: a number in decay_milestones", milestone)
        if not 0 < milestone < 1:
            raise ConfigError(
                f"lr_scheduler: decay_milestones are fractions of the run in (0, 1), got {milestone}. For an epoch or "
                "a step, divide it by their number."
            )


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """The curve of one run.

    Attributes:
        config: Its form.
        steps_per_epoch: Optimizer steps in an epoch.
        num_epochs: Epochs in the run.
    """

    config: LrSchedulerConfig
    steps_per_epoch: int
    num_epochs: int

    def __post_init__(self) -> None:
        num_steps = self.steps_per_epoch * self.num_epochs
        if self.warmup_steps >= num_steps:
            logger.warning(
                "The warm-up of %d steps is not over when the run ends: it has %d.", self.warmup_steps, num_steps
            )

    @property
    def warmup_steps(self) -> int:
        """Length of the warm-up in steps."""
        return self.config.warmup_iters or (self.config.warmup_epochs or 0) * self.steps_per_epoch

    def learning_rate(self, base_lr: float, step: int) -> float:
        """Return the learning rate of optimizer step `step` (from 0) for a group whose base rate is `base_lr`."""
        config, warmup = self.config, self.warmup_steps
        if step < warmup:
            start = config.warmup_lr if config.warmup_lr is not None else (config.warmup_factor or 0.0) * base_lr
            return start + (config.warmup_end_factor * base_lr - start) * step / warmup
        total = self.steps_per_epoch * self.num_epochs
        if config.name == "multistep_with_warm_up":
            return base_lr * self._decay(step, total)
        step, total = step - warmup, max(1, total - warmup)
        if config.name == "cosine_annealing":
            return config.min_lr + (base_lr - config.min_lr) * (1 + math.cos(math.pi * min(step / total, 1))) / 2
        if config.name == "multistep":
            return base_lr * self._decay(step, total)
        end = 0.0 if config.name == "linear_decreasing" else config.end_factor
        return base_lr * (1 + (end - 1) * min(step / total, 1))

    def _decay(self, step: int, total: int) -> float:
        milestones = sorted(int(total * milestone + 1e-9) for milestone in self.config.decay_milestones or ())
        return float(self.config.decay_rate ** bisect_right(milestones, step))

    def apply(self, optimizer: Optimizer, base_lrs: Sequence[float], step: int) -> None:
        """Set the rate of every parameter group for optimizer step `step`."""
        for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = self.learning_rate(base_lr, step)
