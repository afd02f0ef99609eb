"""Experiment trackers, through Accelerate's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.engine.plugins.step_means import StepMeans
from iris_hf.errors import ConfigError, MissingDependencyError, unknown_name

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


class LogTracker(Plugin):
    """Sends what a run measures to an experiment tracker, from the main process.

    Steps are optimizer steps since the start of the run, also after a resume. Every `every` steps, and at the end of an
    epoch, go the means since the last time of `loss` and what else the model measures, with `learning_rate` (of the
    last of these steps; `learning_rate/<k>` where there are several groups), `examples_per_second` and, on a GPU,
    `peak_device_memory_mib`. Validations send `val_loss` and their metrics. The run's hyper-parameters go first. The
    device is waited for only then.

    Attributes:
        name: `tensorboard`, `wandb`, `trackio`, `mlflow`, `comet_ml` or another of Accelerate's trackers.
        project: The project there; for tensorboard the folder of the run, a time by default.
        every: Steps between writings.
        folder: Where trackers that write files put them.
        options: More arguments of the tracker, such as `{"tags": ["baseline"]}` for wandb.

    Raises:
        MissingDependencyError: If the tracker's library is not installed.
    """

    def __init__(
        self,
        name: str,
        project: str = "iris_hf",
        every: int = 50,
        folder: str = "logs",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if every < 1:
            raise ConfigError(f"log_{name}: every must be at least 1, got {every}.")
        self.tracker_class = find_tracker(name)
        self.name = name
        self.project = project
        self.every = every
        self.folder = folder
        self.options = dict(options or {})
        self._means = StepMeans()
        self._rates: list[float] = []  # of the step before
        self._next_rates: list[float] = []
        self._tracker: GeneralTracker | None = None

    def on_train_start(self, state: TrainState) -> None:
        """Note the first step's learning rates."""
        self._next_rates = state.learning_rates

    def on_epoch_start(self, state: TrainState) -> None:
        """Let the clock run."""
        self._means.start_clock()

    def on_step_end(self, state: TrainState) -> None:
        """Add what the step measured, and send it now and then."""
        self._means.add(state.metrics)
        self._rates, self._next_rates = self._next_rates, state.learning_rates
        if state.step % self.every == 0:
            self._send_means(state)

    def on_epoch_end(self, state: TrainState) -> None:
        """Send the rest of the epoch."""
        if self._means.steps:
            self._send_means(state)
        self._means.stop_clock()

    def on_validation_end(self, state: TrainState) -> None:
        """Send what the validation measured."""
        assert state.val_loss is not None
        self._send(state, {"val_loss": state.val_loss, **state.val_metrics})

    def on_exit(self) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._tracker.finish()
        self._tracker, self._means = None, StepMeans()

    def state_dict(self) -> dict[str, Any]:
        """Return the run's name and what was measured and not sent."""
        return {"project": self.project, "means": self._means.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the same run."""
        self.project = state["project"]
        self._means.load_state_dict(state["means"])

    def start_options(self, state: TrainState) -> dict[str, Any]:
        """Return the arguments of the tracker, when the first values are sent."""
        return self.options

    def _send_means(self, state: TrainState) -> None:
        means, seconds = self._means.read(state.accelerator)
        if len(self._rates) == 1:
            means["learning_rate"] = self._rates[0]
        else:
            means.update({f"learning_rate/{k}": rate for k, rate in enumerate(self._rates)})
        means["examples_per_second"] = state.examples_per_step / seconds
        if state.accelerator.device.type == "cuda":
            means["peak_device_memory_mib"] = torch.cuda.max_memory_allocated(state.accelerator.device) / 2**20
        self._send(state, means)

    def _send(self, state: TrainState, values: dict[str, float]) -> None:
        if not state.is_main_process:
            return
        if self._tracker is None:
            options = self.start_options(state)
            if self.tracker_class.requires_logging_directory:
                options = {"logging_dir": self.folder, **options}
            self._tracker = self.tracker_class(self.project, **options)
            self._tracker.start()
            self._tracker.store_init_configuration(hyper_parameters(state))
        self._tracker.log(values, step=state.step)


class LogTensorboard(LogTracker):
    """Writes TensorBoard's event files; see :class:`LogTracker`. Look at them with `tensorboard --logdir logs`.

    Attributes:
        folder: The run makes a folder in it, named by the time.
        every: Steps between writings.
    """

    def __init__(self, folder: str = "logs", every: int = 50) -> None:
        super().__init__("tensorboard", project="", every=every, folder=folder)

    def on_train_start(self, state: TrainState) -> None:
        """Forget the folder of an earlier run."""
        super().on_train_start(state)
        self.project = ""

    def start_options(self, state: TrainState) -> dict[str, Any]:
        """Name the run; what an interrupted run wrote after its last checkpoint does not count."""
        if not self.project:
            name = time.strftime("%Y%m%d-%H%M%S")
            taken = len(list(Path(self.folder).glob(f"{name}*")))
            self.project = f"{name}-{taken + 1}" if taken else name
        return {"purge_step": state.step, **self.options}


def find_tracker(name: str) -> type[GeneralTracker]:
    """Return Accelerate's class for a tracker.

    Raises:
        ConfigError: If Accelerate knows none of that name.
        MissingDependencyError: If its library is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    if name not in LOGGER_TYPE_TO_CLASS:
        raise unknown_name("tracker", name, LOGGER_TYPE_TO_CLASS)
    available = {str(tracker) for tracker in get_available_trackers()}
    if name not in available and name in {str(kind) for kind in LoggerType}:  # others were registered by the caller
        package = '"iris-hf[tensorboard]"' if name == "tensorboard" else name.replace("_", "-")
        raise MissingDependencyError(f"The tracker {name} needs its library: pip install {package}")
    tracker_class: type[GeneralTracker] = LOGGER_TYPE_TO_CLASS[name]
    return tracker_class


def hyper_parameters(state: TrainState) -> dict[str, str | int | float | bool]:
    """Describe a run by numbers and strings."""
    parameters = list(state.model.parameters())
    described: dict[str, str | int | float | bool] = {
        "model": type(state.model).__name__,
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "num_trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "num_epochs": state.num_epochs,
        "steps_per_epoch": state.steps_per_epoch,
        "examples_per_step": state.examples_per_step,
        "num_processes": state.accelerator.num_processes,
        "device": state.accelerator.device.type,
        "mixed_precision": state.accelerator.mixed_precision,
        "optimizer": type(state.optimizer).__name__,
    }
    for name, value in state.optimizer.param_groups[0].items():
        if name not in ("params", "lr") and isinstance(value, (str, int, float, bool)):
            described[f"optimizer/{name}"] = value
    return described
