"""The training loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iris_hf.engine.loader import EpochBatches, Failure, OrderedBatches
from iris_hf.engine.plugins import PluginList, TrainState
from iris_hf.engine.rng import STEP, VALIDATION, mix, seed_generators
from iris_hf.errors import noted
from iris_hf.training.config import TrainConfig
from iris_hf.training.optimizers import build_optimizer, parameter_groups
from iris_hf.training.passes import Pass, Stepper, mean_of
from iris_hf.training.schedulers import LearningRateSchedule, LrSchedulerConfig

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
        batches: EpochBatches,
        seed: int,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.plugins = plugins
        self.loader = loader
        self.batches = batches
        self.seed = seed
        self.val_loader: Any = None
        self.val_batches: OrderedBatches | None = None

        module.to(accelerator.device)
        groups = parameter_groups(
            module,
            base_lr=config.base_lr,
            weight_decay=config.weight_decay,
            no_weight_decay_param_names=config.no_weight_decay_param_names,
            no_weight_decay_module_class_names=config.no_weight_decay_module_class_names,
            lr_scale_param_names=config.lr_scale_param_names,
        )
        self.base_lrs = [group["lr"] for group in groups]
        self.optimizer = build_optimizer(
            config.optimizer,
            groups,
            base_lr=config.base_lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            nesterov=config.nesterov,
        )
        self.module = module
        self.pass_ = make_pass(module, accelerator.prepare_model(module), accelerator, plugins)

        steps_per_epoch = -(-len(batches) // config.accumulation)
        self.schedule = LearningRateSchedule(
            config=LrSchedulerConfig.of(config.lr_scheduler),
            steps_per_epoch=steps_per_epoch,
            num_epochs=config.num_epochs,
        )
        self.state = TrainState(
            accelerator=accelerator,
            model=module.model,
            optimizer=self.optimizer,
            num_epochs=config.num_epochs,
            steps_per_epoch=steps_per_epoch,
            examples_per_step=config.batch_size * config.accumulation * accelerator.num_processes,
        )

    def run(self) -> None:
        """Train until the last epoch, or until a plugin asks for a stop."""
        state = self.state
        self.schedule.apply(self.optimizer, self.base_lrs, state.step)
        state.validates = self.val_loader is not None
        self.plugins.notify("on_train_start", state)
        while state.epoch < state.num_epochs:
            self.train_epoch()
            if self.val_loader is not None and (state.stop_reason or self.config.validates_after(state.epoch)):
                with self.plugins.validation_context(state):
                    self.validate()
            if state.stop_reason:
                logger.info("Stopped after step %d: %s", state.step, state.stop_reason)
                break
            state.epoch += 1
        self.plugins.notify("on_train_end", state)

    def train_epoch(self) -> None:
        """Take the steps of one epoch."""
        state = self.state
        self.module.train()
        self.batches.epoch = state.epoch
        self.plugins.notify("on_epoch_start", state)
        remaining = len(self.batches)
        batches = iter(self.loader)
        while remaining and not state.stop_reason:
            count = min(remaining, self.config.accumulation)
            self.step(batches, count)
            remaining -= count
            state.step += 1
            self.schedule.apply(self.optimizer, self.base_lrs, state.step)
            self.plugins.notify("on_step_end", state)
        self.plugins.notify("on_epoch_end", state)

    def step(self, batches: Iterator[Any], count: int) -> None:
        """Take one optimizer step; set `state.metrics` to the mean loss on this rank and what else the model measures.

        Args:
            batches: Yields the micro-batches.
            count: How many of them make this step.
        """
        results = []
        scaler = self.accelerator.scaler
        for position in range(count):
            batch = self.take(batches)
            seed_generators(
                mix(self.seed, STEP, self.state.step, position, self.accelerator.process_index), self.accelerator.device
            )
            inputs, targets = self.plugins.transform("transform_batch", batch)
            with self.noted():
                results.append(self.pass_.backward(inputs, targets, divisor=count, synchronise=position == count - 1))
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

    def take(self, batches: Iterator[Any]) -> tuple[Any, Any]:
        """Return the next batch, placed for the pass, or raise the error that it could not be made for."""
        batch = next(batches)
        if isinstance(batch, Failure):
            batch.reraise()
        return self.pass_.place(batch)

    def noted(self) -> AbstractContextManager[Any]:
        """Return a context that says, in an error's notes, where in the run it happened."""
        return noted(
            lambda: f"At epoch {self.state.epoch}, step {self.state.step}, on rank {self.accelerator.process_index}."
        )

    @torch.no_grad()
    def validate(self) -> None:
        """Go through the validation set; set `state.val_loss`, the mean loss per example, and `state.val_metrics`."""
        from accelerate.utils import gather_object

        state, accelerator = self.state, self.accelerator
        assert self.val_batches is not None
        self.synchronise_buffers()
        was_training = self.module.training
        self.module.eval()
        self.plugins.notify("on_validation_start", state)
        loss_sum, count = torch.zeros((), device=accelerator.device), 0
        batches = iter(self.val_loader)
        for batch in self.val_batches.batches:
            inputs, targets = self.take(batches)
            seed_generators(mix(self.seed, VALIDATION, state.epoch, batch.start), accelerator.device)
            with self.noted():
                loss_sum += self.pass_.loss(inputs, targets).float() * len(batch)
                for watch in self.plugins.hooks("on_validation_batch"):
                    watch(state, (inputs, targets))
            count += len(batch)
        losses, counts = zip(*gather_object([(loss_sum.item(), count)]), strict=True)
        state.val_loss = sum(losses) / sum(counts)
        state.val_metrics = {k: v for hook in self.plugins.hooks("validation_metrics") for k, v in hook(state).items()}
        self.module.train(was_training)
        self.plugins.notify("on_validation_end", state)

    def trained_model(self) -> nn.Module:
        """Return the trained model: unwrapped, on the CPU, in train mode."""
        self.synchronise_buffers()
        return self.module.to("cpu").model.train()

    def synchronise_buffers(self) -> None:
        """Make buffers equal on all ranks: the mean (BatchNorm's statistics), or rank 0's where they are integers."""
        if self.accelerator.num_processes == 1:
            return
        for buffer in self.module.buffers():
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer.div_(self.accelerator.num_processes))
            else:
                torch.distributed.broadcast(buffer, src=0)
