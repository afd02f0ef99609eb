"""The training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from iris_hf.engine.loader import EpochBatches, Failure, OrderedBatches, Reported
from iris_hf.engine.plugins import PluginList, TrainState
from iris_hf.engine.rng import STEP, VALIDATION, mix, seed_generators
from iris_hf.engine.streams import StreamBatches, StreamOnce
from iris_hf.errors import ConfigError, DataError, noted
from iris_hf.training.buffers import synchronise_buffers
from iris_hf.training.checkpoint import CheckpointWriter
from iris_hf.training.config import TrainConfig
from iris_hf.training.layouts import lay_out_model
from iris_hf.training.optimizers import build_optimizer, parameter_groups
from iris_hf.training.passes import Pass, Stepper, mean_of
from iris_hf.training.resuming import Pending, write_checkpoint
from iris_hf.training.schedulers import LearningRateSchedule, LrSchedulerConfig
from iris_hf.training.termination import Preempted, TerminationFlag

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class TrainingRun:
    """A prepared run: loops over epochs, steps and micro-batches.

    Of Accelerate's layers it uses the model's (wrapping, precision), the backward pass and the scaler. The prepared
    optimizer, which inspects signatures and looks for packages in every step and cannot hold a sharded one, and the
    prepared loader and scheduler, by which the order of examples and the learning-rate curve would depend on the
    world size, are left out.

    Attributes:
        state: What plugins see.
        val_loader: Yields this rank's validation batches; None without validation.
        val_batches: Their keys.
        writer: Writes checkpoints; None for a run that keeps none.
        skipped: Train examples that could not be made on this rank, and why.
        best_val_loss: The least loss of all validations; None before the first.
        pending: What it gets back on its way from a checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        accelerator: Accelerator,
        plugins: PluginList,
        module: Stepper,
        make_pass: Callable[..., Pass],
        loader: Any,
        batches: EpochBatches | StreamBatches,
        seed: int,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.plugins = plugins
        self.loader = loader
        self.batches = batches
        self.seed = seed
        self.val_loader: Any = None
        self.val_batches: OrderedBatches | StreamOnce | None = None
        self.writer: CheckpointWriter | None = None
        self.termination = TerminationFlag(accelerator)
        self.skipped: dict[int | str, str] = {}
        self.best_val_loss: float | None = None
        self.pending = Pending()

        groups = parameter_groups(
            module,
            base_lr=config.base_lr,
            weight_decay=config.weight_decay,
            no_weight_decay_param_names=config.no_weight_decay_param_names,
            no_weight_decay_module_class_names=config.no_weight_decay_module_class_names,
            lr_scale_param_names=config.lr_scale_param_names,
        )
        self.base_lrs = [group["lr"] for group in groups]
        names = {parameter: name.removeprefix("model.") for name, parameter in module.named_parameters()}
        self.group_names = [[names[parameter] for parameter in group["params"]] for group in groups]
        self.layout = lay_out_model(module, groups, accelerator)
        self.optimizer = build_optimizer(
            config.optimizer,
            self.layout.groups,
            base_lr=config.base_lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            nesterov=config.nesterov,
        )
        self.module = self.layout.module
        self.pass_ = make_pass(self.module, self.layout.model, accelerator, plugins)

        steps_per_epoch = -(-len(batches) // config.accumulation)
        self.schedule = LearningRateSchedule(
            config=LrSchedulerConfig.of(config.lr_scheduler),
            steps_per_epoch=steps_per_epoch,
            num_epochs=config.num_epochs,
        )
        self.state = TrainState(
            accelerator=accelerator,
            model=self.module.model,
            optimizer=self.optimizer,
            num_epochs=config.num_epochs,
            steps_per_epoch=steps_per_epoch,
            examples_per_step=config.batch_size * config.accumulation * accelerator.num_processes,
            config={**vars(config), "random_seed": seed},
        )

    def run(self) -> None:
        """Train until the last epoch, or until a plugin asks for a stop.

        Raises:
            Preempted: If SIGTERM arrived at a run that keeps checkpoints; the last one is of this very step.
        """
        state = self.state
        self.schedule.apply(self.optimizer, self.base_lrs, state.step)
        state.validates = self.val_loader is not None
        self.plugins.notify("on_train_start", state)
        self.pending.restore_buffers(self.accelerator.device)
        with self.termination.listening() if self.writer is not None else nullcontext():
            while not self.is_over():
                if state.step < (state.epoch + 1) * state.steps_per_epoch:
                    self.train_epoch()
                self.pending.restore_plugins(self.plugins)  # where no step of the epoch was left
                self.end_epoch()
        self.pending.restore_plugins(self.plugins)
        self.report_skipped()
        self.plugins.notify("on_train_end", state)

    def report_skipped(self) -> None:
        """Say which examples of the train set were skipped on any rank."""
        if self.config.on_bad_example == "raise":
            return
        from accelerate.utils import gather_object

        skipped = {index: why for rank in gather_object([self.skipped]) for index, why in rank.items()}
        if skipped and self.accelerator.is_main_process:
            labels = sorted(skipped, key=lambda label: (len(str(label)), str(label)))
            logger.warning(
                "%d bad examples of the train set were skipped, and others took their places: %s. The first: %s",
                *(len(labels), ", ".join(map(str, labels)), skipped[labels[0]]),
            )

    def note_validation(self) -> bool:
        """Return whether the last validation was the best so far."""
        loss = self.state.val_loss
        assert loss is not None
        is_best = loss < (math.inf if self.best_val_loss is None else self.best_val_loss)
        if is_best:
            self.best_val_loss = loss
        return is_best

    def is_over(self) -> bool:
        """Whether no step is left: all epochs are done, or a plugin has asked for a stop."""
        return self.state.stop_reason is not None or self.state.epoch == self.state.num_epochs

    def train_epoch(self) -> None:
        """Take the steps of one epoch, or what is left of them."""
        state = self.state
        self.layout.train()
        done = (state.step - state.epoch * state.steps_per_epoch) * self.config.accumulation
        self.batches.epoch, self.batches.start = state.epoch, done
        if not done:
            self.pending.restore_plugins(self.plugins)
        self.plugins.notify("on_epoch_start", state)
        self.layout.follow_modes()
        self.pending.restore_plugins(self.plugins)
        remaining = len(self.batches) - done
        batches = iter(self.loader)
        while remaining and not state.stop_reason:
            count = min(remaining, self.config.accumulation)
            self.step(batches, count)
            remaining -= count
            state.step += 1
            self.schedule.apply(self.optimizer, self.base_lrs, state.step)
            self.plugins.notify("on_step_end", state)
            if remaining and not state.stop_reason and self.writer is not None:
                if self.config.keeps_after_step(state.step):
                    write_checkpoint(self, self.writer, is_validated=False)
                self.leave_if_terminated()
        self.plugins.notify("on_epoch_end", state)

    def end_epoch(self) -> None:
        """Validate and write a checkpoint, where it is time to; leave if SIGTERM arrived."""
        state = self.state
        is_validated = is_best = False
        if self.val_loader is not None and (state.stop_reason or self.config.validates_after(state.epoch)):
            if not state.stop_reason:
                self.leave_if_terminated()
            with self.plugins.validation_context(state):
                is_validated = self.validate()
            if not is_validated:
                self.leave_if_terminated()
            is_best = self.note_validation()
        if state.stop_reason:
            if state.is_main_process:
                logger.warning("Stopped after step %d: %s", state.step, state.stop_reason)
        else:
            state.epoch += 1
        stopped = state.stop_reason is not None
        if self.writer is not None and (
            is_best or self.config.keeps_after_epoch(state.epoch, state.step, stopped=stopped)
        ):
            write_checkpoint(self, self.writer, is_validated=is_validated)
        self.leave_if_terminated()

    def leave_if_terminated(self) -> None:
        """Write a checkpoint and leave, if SIGTERM arrived at any process."""
        if self.writer is not None and self.termination.is_set_anywhere():
            if self.writer.last_step != self.state.step:
                write_checkpoint(self, self.writer, is_validated=False)
            logger.warning("SIGTERM: the checkpoint of step %d is written. Resume to go on.", self.state.step)
            raise Preempted

    def step(self, batches: Iterator[Any], count: int) -> None:
        """Take one optimizer step; set `state.metrics` to the mean loss on this rank and what else the model measures.

        Args:
            batches: Yields the micro-batches.
            count: How many of them make this step.
        """
        results = []
        scaler = self.accelerator.scaler
        for position in range(count):
            batch = self.take(next(batches))
            seed_generators(
                mix(self.seed, STEP, self.state.step, position, self.accelerator.process_index), self.accelerator.device
            )
            inputs, targets = self.plugins.transform("transform_batch", batch)
            with self.noted(), self.layout.explaining():
                results.append(self.pass_.backward(inputs, targets, divisor=count, synchronise=position == count - 1))
        self.layout.complete_gradients(scaled=scaler is not None)
        self.state.metrics = mean_of(results)
        if self.plugins.hooks("on_gradients_ready"):
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            self.plugins.notify("on_gradients_ready", self.state)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad()

    def take(self, batch: Any) -> tuple[Any, Any]:
        """Return a batch placed for the pass, or raise the error that it could not be made for."""
        if isinstance(batch, Failure):
            batch.reraise()
        if isinstance(batch, Reported):
            self.skipped.update(batch.skipped)
            self.batches.origins.update(batch.place or {})
            batch = batch.batch
        return self.pass_.place(batch)

    def noted(self) -> AbstractContextManager[Any]:
        """Return a context that says, in an error's notes, where in the run it happened."""
        return noted(
            lambda: f"At epoch {self.state.epoch}, step {self.state.step}, on rank {self.accelerator.process_index}."
        )

    @torch.no_grad()
    def validate(self) -> bool:
        """Go through the validation set; set `state.val_loss`, the mean loss per example, and `state.val_metrics`.

        Returns:
            Whether it was gone through. When SIGTERM arrives at a process, each leaves its part as soon as it notices,
            and they meet at the end, where all give up the validation; one after a plugin has asked for a stop is
            finished.
        """
        from accelerate.utils import gather_object

        state, accelerator = self.state, self.accelerator
        assert self.val_batches is not None
        synchronise_buffers(self.module, self.accelerator)
        module = self.layout.gather()
        state.model = module.model
        was_training = module.training
        module.eval()
        self.plugins.notify("on_validation_start", state)
        loss_sum, count, is_left = torch.zeros((), device=accelerator.device), 0, False
        for examples, batch in self.val_batches.walk(self.val_loader):
            state.val_position = examples.start
            inputs, targets = self.take(batch)
            seed_generators(mix(self.seed, VALIDATION, state.epoch, examples.start), accelerator.device)
            with self.noted():
                loss_sum += self.pass_.loss(module, inputs, targets).float() * len(examples)
                if watching := self.plugins.hooks("on_validation_batch"):
                    for part in self.pass_.parts(inputs, targets):
                        for watch in watching:
                            watch(state, part)
            count += len(examples)
            if self.writer is not None and not state.stop_reason and self.termination.is_noticed():
                is_left = True
                break
        losses, counts, left = zip(*gather_object([(loss_sum.item(), count, is_left)]), strict=True)
        is_complete = not any(left)
        if is_complete:
            if not sum(counts):
                raise DataError("val_dataset is empty.")
            state.val_loss = sum(losses) / sum(counts)
            state.val_metrics = self.measure()
        module.train(was_training)
        if is_complete:
            self.plugins.notify("on_validation_end", state)
        state.model = self.module.model
        self.layout.release()
        return is_complete

    def measure(self) -> dict[str, float]:
        """Return what plugins have measured in a validation.

        Raises:
            ConfigError: If two of them measure something of one name.
        """
        metrics: dict[str, float] = {}
        for hook in self.plugins.hooks("validation_metrics"):
            measured = hook(self.state)
            if clash := sorted(measured.keys() & {*metrics, "val_loss"}):
                raise ConfigError(
                    f"Two plugins measure {', '.join(clash)} in a validation. Leave out one, or rename it."
                )
            metrics.update(measured)
        return metrics

    def trained_model(self) -> nn.Module:
        """Return the trained model: unwrapped, on the CPU, in train mode."""
        synchronise_buffers(self.module, self.accelerator)
        return self.layout.gather(torch.device("cpu")).model.train()
