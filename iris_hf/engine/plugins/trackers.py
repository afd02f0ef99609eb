"""Experiment trackers, through Accelerate's."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iris_hf.engine.memory import peak_memory
from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.engine.plugins.hyper_parameters import hyper_parameters
from iris_hf.engine.plugins.step_means import StepMeans
from iris_hf.engine.plugins.tracker_runs import finish, picture_logger, same_run_options, store_hyper_parameters
from iris_hf.engine.plugins.val_examples import ValExamples
from iris_hf.errors import ConfigError, MissingDependencyError, unknown_name

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger(__name__)

_PICTURE = "val_examples"


class LogTracker(Plugin):
    """Sends what a run measures to an experiment tracker, from the main process.

    Steps are optimizer steps since the start of the run. Every `every` steps, and at the end of an epoch, go the means
    since the last time of `loss` and what else the model measures, with `learning_rate` (of the last of these steps;
    `learning_rate/<k>` where there are several groups), `examples_per_second` of all processes together, and of the
    process that has taken most memory `peak_host_memory_mib` and, on a GPU, `peak_device_memory_mib`. Validations send
    `val_loss` and their metrics, and the picture `val_examples`. The run's hyper-parameters go first: the arguments of
    training that are not None, and facts about model, optimizer and processes. The device is waited for only then.

    After a resume the run goes on in wandb, trackio, mlflow, comet and tensorboard. What it sent after its last
    checkpoint, before it was interrupted, is sent again; tensorboard forgets the first. A resume with another tracker
    begins a new run there, with a warning.

    A run that fails is marked as failed in wandb (exit code 1) and mlflow (FAILED). One that SIGTERM has preempted is
    KILLED in mlflow, as is one that ends by Ctrl-C or `sys.exit`; wandb knows no such state, and is given the exit code
    of the process: 75 after SIGTERM, 1 after Ctrl-C. Other trackers are not told.

    Attributes:
        name: `tensorboard`, `wandb`, `trackio`, `mlflow`, `comet_ml` or another of Accelerate's trackers.
        project: The project there; for tensorboard the folder of the run, a time by default.
        every: Steps between writings.
        folder: Where trackers that write files put them.
        options: More arguments of the tracker, such as `{"tags": ["baseline"]}` for wandb.
        num_images: How many examples of the validation set to draw with their targets and predictions at every
            validation: the first ones of the main process, the same each time. Images with classes, labels, boxes
            or masks can be drawn, and tensorboard, wandb, trackio, mlflow and comet take pictures.

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
        num_images: int = 0,
    ) -> None:
        if every < 1:
            raise ConfigError(f"log_{name}: every must be at least 1, got {every}.")
        if num_images < 0:
            raise ConfigError(f"log_{name}: num_images must not be negative, got {num_images}.")
        self.tracker_class = find_tracker(name)
        self.name = name
        self.project = project
        self.every = every
        self.folder = folder
        self.options = dict(options or {})
        self.num_images = num_images
        self._means = StepMeans()
        self._rates: list[float] = []  # of the step before
        self._next_rates: list[float] = []
        self._tracker: GeneralTracker | None = None
        self._same_run: dict[str, str] = {}
        self._is_complete = False
        self._is_main_process = True
        self._examples: ValExamples | None = None

    def on_train_start(self, state: TrainState) -> None:
        """Note the first step's learning rates, and whether there is something to draw."""
        self._next_rates = state.learning_rates
        self._same_run, self._is_complete, self._is_main_process = {}, False, state.is_main_process
        self._examples = ValExamples(self.num_images) if self.num_images and state.is_main_process else None
        if self._examples is not None and picture_logger(self.tracker_class) is None:
            self._stop_drawing(f"the tracker {self.name} takes no pictures")
        elif self._examples is not None and not state.validates:
            self._stop_drawing("there is no val_dataset")

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

    def on_validation_start(self, state: TrainState) -> None:
        """Make the model predict what will be drawn."""
        if self._examples is not None:
            self._examples.start(state)

    def on_validation_batch(self, state: TrainState, batch: tuple[Any, Any]) -> None:
        """Predict the examples that will be drawn."""
        if self._examples is not None:
            self._examples.add(state, batch)

    def on_validation_end(self, state: TrainState) -> None:
        """Send what the validation measured, and what was predicted."""
        assert state.val_loss is not None
        self._send(state, {"val_loss": state.val_loss, **state.val_metrics})
        if self._examples is not None:
            picture, send = self._examples.draw(state), picture_logger(self.tracker_class)
            self._examples.clear()
            if picture is not None and send is not None:
                send(self._open(state), _PICTURE, picture, state.step)
            elif self._examples.obstacle is not None:
                self._stop_drawing(self._examples.obstacle)

    def on_train_end(self, state: TrainState) -> None:
        """Note that nothing failed."""
        self._is_complete = True

    def on_exit(self) -> None:
        """Close the tracker."""
        tracker, self._tracker = self._tracker, None
        self._means, self._examples = StepMeans(), None
        if tracker is not None:
            finish(tracker, failed=not self._is_complete)

    def state_dict(self) -> dict[str, Any]:
        """Return the tracker's and the run's name and what was measured and not sent."""
        same_run = self._same_run if self._tracker is None else same_run_options(self._tracker)
        run = {"tracker": self.name, "project": self.project, "same_run": same_run}
        return {**run, "means": self._means.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the same run, unless it is another tracker's."""
        if state["tracker"] == self.name:
            self.project = state["project"]
            self._same_run = state["same_run"]
        elif self._is_main_process:
            there = f"the run that goes on was sent to {state['tracker']}"
            logger.warning("log_%s: %s: a new run begins in %s.", self.name, there, self.name)
        self._means.load_state_dict(state["means"])

    def start_options(self, state: TrainState) -> dict[str, Any]:
        """Return the arguments of the tracker, when the first values are sent."""
        return {**self._same_run, **self.options}

    def _send_means(self, state: TrainState) -> None:
        means, seconds = self._means.read(state.accelerator)
        if len(self._rates) == 1:
            means["learning_rate"] = self._rates[0]
        else:
            means.update({f"learning_rate/{k}": rate for k, rate in enumerate(self._rates)})
        means["examples_per_second"] = state.examples_per_step / seconds
        is_open = self._tracker is not None
        self._send(state, {**means, **peak_memory(state.accelerator)})
        if not is_open:
            self._means.start_clock()  # opening a tracker can take seconds, which no step needs

    def _send(self, state: TrainState, values: dict[str, float]) -> None:
        if state.is_main_process:
            self._open(state).log(values, step=state.step)

    def _open(self, state: TrainState) -> GeneralTracker:
        if self._tracker is None:
            options = self.start_options(state)
            if self.tracker_class.requires_logging_directory:
                options = {"logging_dir": self.folder, **options}
            tracker = self.tracker_class(self.project, **options)
            tracker.start()
            self._tracker = tracker  # only one that is open can be closed
            store_hyper_parameters(tracker, hyper_parameters(state), again=bool(self._same_run))
        return self._tracker

    def _stop_drawing(self, reason: str) -> None:
        self._examples = None
        logger.warning("log_%s: num_images=%d, but %s: no examples are drawn.", self.name, self.num_images, reason)


class LogTensorboard(LogTracker):
    """Writes files for TensorBoard, as log_tracker does. Look at them with `tensorboard --logdir logs`.

    Attributes:
        folder: The run makes a folder in it, named by the time.
        every: Steps between writings.
        num_images: How many examples of the validation set to draw at every validation.
    """

    def __init__(self, folder: str = "logs", every: int = 50, num_images: int = 0) -> None:
        super().__init__("tensorboard", project="", every=every, folder=folder, num_images=num_images)

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
