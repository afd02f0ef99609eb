"""tqdm bars for training and prediction."""

from __future__ import annotations

import time
from contextlib import ExitStack

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from iris_hf.engine.plugins.base import Plugin, PredictState, RunState, TrainState

_SECONDS_BETWEEN_LOSSES = 0.5


class ProgressBar(Plugin):
    """Bars for epochs, steps and prediction, on the main process; silent without a terminal.

    Log lines appear above the bars. The loss is read from the device twice a second, not every step.
    """

    def __init__(self) -> None:
        self._epochs: tqdm[None] | None = None
        self._steps: tqdm[None] | None = None
        self._next_loss = 0.0
        self._open = ExitStack()

    def _bar(self, state: RunState, **options: object) -> tqdm[None]:
        # disable=None: tqdm finds out whether there is a terminal
        return self._open.enter_context(
            tqdm(disable=None if state.is_main_process else True, dynamic_ncols=True, **options)  # type: ignore[call-overload]
        )

    def on_train_start(self, state: TrainState) -> None:
        """Open the bar of epochs."""
        self._open.enter_context(logging_redirect_tqdm())
        self._epochs = self._bar(state, total=state.num_epochs, desc="train", unit="epoch", initial=state.epoch)

    def on_epoch_start(self, state: TrainState) -> None:
        """Open the epoch's bar of steps."""
        done = state.step - state.epoch * state.steps_per_epoch
        self._steps = self._bar(
            state, total=state.steps_per_epoch, initial=done, desc=f"epoch {state.epoch + 1}", leave=False
        )

    def on_step_end(self, state: TrainState) -> None:
        """Advance, and show loss and learning rate now and then."""
        assert self._steps is not None
        if not self._steps.disable and time.monotonic() >= self._next_loss:
            self._steps.set_postfix(
                {"loss": f"{state.loss.item():.4f}", "lr": f"{state.learning_rates[0]:.2e}"}, refresh=False
            )
            self._next_loss = time.monotonic() + _SECONDS_BETWEEN_LOSSES
        self._steps.update()

    def on_epoch_end(self, state: TrainState) -> None:
        """Close the bar of steps."""
        assert self._steps is not None
        assert self._epochs is not None
        self._steps.close()
        self._epochs.update()

    def on_validation_end(self, state: TrainState) -> None:
        """Show what the validation measured beside the epochs."""
        assert self._epochs is not None
        measured = {"val_loss": state.val_loss, **state.val_metrics}
        self._epochs.set_postfix({name: f"{value:.4f}" for name, value in measured.items()})

    def on_prediction_start(self, state: PredictState) -> None:
        """Open the bar of batches."""
        self._open.enter_context(logging_redirect_tqdm())
        self._steps = self._bar(state, total=state.num_batches, desc="predict", unit="batch")

    def on_prediction_batch_end(self, state: PredictState) -> None:
        """Advance."""
        assert self._steps is not None
        self._steps.update()

    def on_exit(self) -> None:
        """Close all bars."""
        self._open.close()
