"""What a plugin is, and what it sees of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from iris_hf.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(kw_only=True)
class RunState:
    """What a run shows to its plugins. Plugins read it; only :meth:`request_stop` changes the run.

    Attributes:
        accelerator: The run's Accelerator: rank, world size, device, gathering.
        model: The caller's model as the run holds it (a copy in training), without wrappers. Under FSDP2 it is whole
            in `transform_model` and during validations, and at other times sharded: its parameters are DTensors, of
            which `full_tensor()`, called on every process, gives the whole.
    """

    accelerator: Accelerator
    model: torch.nn.Module

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes for all."""
        return bool(self.accelerator.is_main_process)


@dataclass(kw_only=True)
class TrainState(RunState):
    """A training run. A step is one optimizer step.

    Attributes:
        optimizer: The torch optimizer; `param_groups` hold the learning rates of the next step.
        num_epochs: Epochs that the run was asked for.
        steps_per_epoch: Optimizer steps in an epoch.
        examples_per_step: Examples that all processes together use in a full step.
        epoch: The current epoch, from 0.
        step: Optimizer steps done since the start of the run.
        validates: Whether the run has a validation set.
        metrics: What the last step's examples gave on this rank: `loss`, and the other scalars that the model's
            training step returns or its criterion measures. They are on the device; reading a value waits for
            it: do it rarely. In `on_gradients_ready` they are those of the step at hand.
        val_loss: Mean loss per validation example after the last validation, the same on every rank;
            None before the first.
        val_metrics: What plugins measured in the last validation, the same on every rank; empty before the first.
        val_position: Of the first example of the validation batch at hand, in the order of the validation set.
        stop_reason: Why the run ends early; None while it goes on.
        config: The arguments of training that are no inputs.
        class_names: Of the model or a data set; None where neither names classes.
    """

    optimizer: torch.optim.Optimizer
    num_epochs: int
    steps_per_epoch: int
    examples_per_step: int
    epoch: int = 0
    step: int = 0
    validates: bool = False
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    val_loss: float | None = None
    val_metrics: dict[str, float] = field(default_factory=dict)
    val_position: int = 0
    stop_reason: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] | None = None

    @property
    def loss(self) -> torch.Tensor:
        """Mean loss of the last step's examples on this rank; NaN before the first step."""
        return self.metrics.get("loss", torch.tensor(torch.nan))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.num_epochs * self.steps_per_epoch

    @property
    def learning_rates(self) -> list[float]:
        """Learning rate of each parameter group for the next step."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def request_stop(self, reason: str) -> None:
        """End the run after this step, as if it had been asked for that many.

        Every rank has to ask for it at the same step; decide on values that are equal everywhere.

        Args:
            reason: Said in the log.
        """
        self.stop_reason = self.stop_reason or reason


@dataclass(kw_only=True)
class PredictState(RunState):
    """A prediction run.

    Attributes:
        num_batches: Batches that this rank goes through; None for a stream, which tells at its end.
        batch: Batches done.
    """

    num_batches: int | None
    batch: int = 0


class Plugin:
    """Watches, transforms or wraps a run. Override what you need; the rest costs nothing.

    Hooks named `on_*` watch and return nothing. A plugin that keeps something between steps gives it to
    checkpoints by `state_dict` and takes it back by `load_state_dict`.

    Attributes:
        comes_once: Whether a second one in the same run is an error.
    """

    comes_once: ClassVar[bool] = False

    def accelerator_options(self) -> dict[str, Any]:
        """Return arguments for `accelerate.Accelerator`, such as `{"mixed_precision": "bf16"}`.

        The precision `"auto"` is fp16 on a GPU and bf16 on a CPU.
        """
        return {}

    def transform_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model to train or to predict with, before it is moved and wrapped."""
        return model

    def transform_batch(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Return the `(inputs, targets)` to train on, given those on the device."""
        return batch

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a context for each forward pass."""
        return ExitStack()

    def on_train_start(self, state: TrainState) -> None:
        """Watch: everything is prepared, no step is done."""

    def on_epoch_start(self, state: TrainState) -> None:
        """Watch: `state.epoch` begins."""

    def on_gradients_ready(self, state: TrainState) -> None:
        """Watch or change gradients: complete, unscaled and averaged over the ranks; the optimizer steps next."""

    def on_step_end(self, state: TrainState) -> None:
        """Watch: an optimizer step is done."""

    def on_epoch_end(self, state: TrainState) -> None:
        """Watch: the epoch's steps are done; its validation, if any, follows."""

    def on_validation_start(self, state: TrainState) -> None:
        """Watch: validation begins; the model is in eval mode."""

    def validation_context(self, state: TrainState) -> AbstractContextManager[Any]:
        """Return a context for a whole validation, `on_validation_start` and `on_validation_end` included."""
        return ExitStack()

    def on_validation_batch(self, state: TrainState, batch: tuple[Any, Any]) -> None:
        """Watch this rank's `(inputs, targets)`, whose loss is computed; ranks may have different numbers of them."""

    def validation_metrics(self, state: TrainState) -> dict[str, float]:
        """Return what was measured in this validation, equal on every rank, for `state.val_metrics`."""
        return {}

    def on_validation_end(self, state: TrainState) -> None:
        """Watch: `state.val_loss` and `state.val_metrics` are new."""

    def on_train_end(self, state: TrainState) -> None:
        """Watch or change the final weights: no step will follow."""

    def on_prediction_start(self, state: PredictState) -> None:
        """Watch: no batch is predicted yet."""

    def on_prediction_batch_end(self, state: PredictState) -> None:
        """Watch: a batch is predicted."""

    def on_prediction_end(self, state: PredictState) -> None:
        """Watch: this rank's batches are done."""

    def on_exit(self) -> None:
        """Let go of what the plugin holds (files, bars); called also when the run failed."""

    def state_dict(self) -> dict[str, Any]:
        """Return what has to survive a restart."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


class PluginList:
    """Several plugins as one. A hook that no plugin overrides is not called at all."""

    def __init__(self, plugins: list[Plugin]) -> None:
        self.plugins = plugins
        self._hooks: dict[str, list[Callable[..., Any]]] = {}

    def named(self) -> list[tuple[str, Plugin]]:
        """Return the plugins by their classes' names, numbered where there are several of one."""
        counts: Counter[str] = Counter()
        named = []
        for plugin in self.plugins:
            kind = type(plugin).__name__
            counts[kind] += 1
            named.append((f"{kind} {counts[kind]}", plugin))
        return named

    def hooks(self, name: str) -> list[Callable[..., Any]]:
        """Return the bound methods of the plugins that override hook `name`, in order."""
        if name not in self._hooks:
            base = getattr(Plugin, name)
            self._hooks[name] = [getattr(p, name) for p in self.plugins if getattr(type(p), name) is not base]
        return self._hooks[name]

    def notify(self, name: str, state: RunState) -> None:
        """Call a watching hook."""
        for hook in self.hooks(name):
            hook(state)

    def transform(self, name: str, value: Any) -> Any:
        """Pass a value through a transforming hook of every plugin."""
        for hook in self.hooks(name):
            value = hook(value)
        return value

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the contexts of all plugins as one."""
        stack = ExitStack()
        for hook in self.hooks("forward_context"):
            stack.enter_context(hook())
        return stack

    def validation_context(self, state: TrainState) -> AbstractContextManager[Any]:
        """Return the contexts of all plugins as one."""
        stack = ExitStack()
        for hook in self.hooks("validation_context"):
            stack.enter_context(hook(state))
        return stack

    def accelerator_options(self) -> dict[str, Any]:
        """Return the arguments that the plugins have for the Accelerator.

        Raises:
            ConfigError: If two plugins want different values of one argument.
        """
        options: dict[str, Any] = {}
        for plugin in self.plugins:
            for name, value in plugin.accelerator_options().items():
                if options.setdefault(name, value) != value:
                    raise ConfigError(f"Two plugins contradict each other: {name}={options[name]!r} and {value!r}.")
        return options

    @contextmanager
    def running(self) -> Iterator[None]:
        """Call `on_exit` of every plugin at the end, also when the run fails."""
        with ExitStack() as stack:
            for plugin in self.plugins:
                stack.callback(plugin.on_exit)
            yield
