"""The training loop."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iris_hf.engine.accelerator import Device, agree_on_seed, draw_seed, needs_local_workers, open_accelerator
from iris_hf.engine.launch import run_in_workers
from iris_hf.engine.loader import (
    EpochBatches,
    Examples,
    Failure,
    OrderedBatches,
    TargetCheck,
    closing_workers,
    count_examples,
    make_loader,
    to_device,
)
from iris_hf.engine.plugins import Plugin, PluginList, TrainState, load_plugins
from iris_hf.engine.rng import STEP, VALIDATION, mix, preserve_generators, seed_generators
from iris_hf.errors import ConfigError, noted
from iris_hf.models.steps import Trainable, as_trainable
from iris_hf.training.config import OptimizerName, TrainConfig
from iris_hf.training.optimizers import build_optimizer, parameter_groups
from iris_hf.training.schedulers import LearningRateSchedule, LrSchedulerConfig
from iris_hf.types import CollateFunction, Transform

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class TrainResult(NamedTuple):
    """What training returns.

    Attributes:
        model: The trained copy of the model: unwrapped, on the CPU, in train mode.
        elapsed_time: Seconds that the call took.
    """

    model: nn.Module
    elapsed_time: float


def train(
    model: nn.Module,
    train_dataset: Dataset[Any],
    train_transform: Transform | None,
    val_dataset: Dataset[Any] | None = None,
    val_transform: Transform | None = None,
    collate_function: CollateFunction | None = None,
    *,
    num_epochs: int,
    batch_size: int = 1,
    base_lr: float = 1e-5,
    device: Device | None = None,
    lr_scheduler: LrSchedulerConfig | Mapping[str, Any] | None = None,
    accumulate_grad_batches: int | None = None,
    momentum: float = 0,
    nesterov: bool = False,
    optimizer: OptimizerName = "sgd",
    val_check_interval: float | None = None,
    val_check_interval_epoch: int | None = None,
    val_batch_size: int | None = None,
    weight_decay: float = 0,
    num_processes: int = 1,
    num_dataloader_workers: int = 4,
    no_weight_decay_param_names: Sequence[str] | None = None,
    no_weight_decay_module_class_names: Sequence[str] | None = None,
    lr_scale_param_names: Sequence[tuple[str, float]] | None = None,
    plugins: Sequence[str | Plugin] = (),
    random_seed: int | None = None,
    ddp_find_unused_parameters: bool = False,
) -> TrainResult:
    """Train a copy of a model on Accelerate.

    A step is one optimizer step: `accumulate_grad_batches` micro-batches of `batch_size` examples on each
    process. The incomplete micro-batch at the end of an epoch is dropped; complete ones that are too few for
    a full step still make one, with the mean of their gradients. The examples of a step, their
    augmentation, and the learning-rate curve (one point per step) depend on the seed alone: 2 processes
    with batch 8 take the same steps as 1 with batch 16. (A model that draws random numbers of its own,
    such as dropout masks, draws others on other ranks.) A train set smaller than one full step is gone through
    several times per epoch.

    BatchNorm sees its own process's part of a batch; its statistics are averaged over the processes before each
    validation and at the end. The caller's model and random generators stay as they are.

    Args:
        model: Has `training_step(inputs, targets) -> {"loss": scalar}`, or `criterion` and `forward`.
        train_dataset: index -> `(raw_input, target)`.
        train_transform: `(raw_input, target) -> (input, target)`, or image-only; None leaves examples as they are.
        val_dataset: Gone through at intervals; each example counts once in the validation loss.
        val_transform: As `train_transform`, for validation.
        collate_function: list of `(input, target)` -> `(inputs_batch, targets_batch)`; the contract's rules when None.
        num_epochs: Times that every example is used.
        batch_size: Examples per process and micro-batch.
        base_lr: Learning rate that the scheduler's curve multiplies.
        device: `"cpu"` or `"cuda"`; what is there when None.
        lr_scheduler: A mapping or an LrSchedulerConfig; cosine annealing to 0 when None.
        accumulate_grad_batches: Micro-batches per step on each process; 1 when None.
        momentum: For sgd and rmsprop.
        nesterov: Nesterov momentum, for sgd.
        optimizer: sgd, adam, amsgrad, adamw, adamw_amsgrad, rmsprop, or one of the Adam family with `zero_` in
            front, which shards its state over the processes.
        val_check_interval: Validate after every this fraction of `num_epochs`, in (0, 1].
        val_check_interval_epoch: Validate after every this many epochs. With neither, after every epoch. The last
            epoch is always validated.
        val_batch_size: Examples per process in validation; `batch_size` when None.
        weight_decay: Weight decay.
        num_processes: Outside a launcher, local worker processes to start. Inside one (accelerate launch,
            torchrun) its world size rules, and a contradicting value is an error.
        num_dataloader_workers: Loader processes per process, at most one per core. The result does not
            depend on it.
        no_weight_decay_param_names: Regular expressions matched from the start of a parameter's name.
        no_weight_decay_module_class_names: Regular expressions matched from the start of a module's class name.
        lr_scale_param_names: List of `[pattern, factor]`; the first pattern that matches scales a parameter's rate.
        plugins: Names, with arguments where needed, or Plugin objects; after those in `model.plugins`. An object that
            ran in local workers has the attributes of the first worker's afterwards.
        random_seed: Any integer, 0 included. None draws one from torch's global generator.
        ddp_find_unused_parameters: For models whose forward leaves parameters out, on several processes.

    Returns:
        The trained model and the elapsed time in seconds.

    Raises:
        ConfigError: If the configuration is contradictory, or the model cannot be trained.
        DataError: If a dataset is empty, or an example is invalid; the message names the example.
    """
    start = time.perf_counter()
    arguments = dict(locals())
    config = TrainConfig.of(arguments)
    inputs = {name: arguments[name] for name in _INPUTS}
    if needs_local_workers(num_processes):
        if random_seed is None:
            config = replace(config, random_seed=draw_seed())
        tensors, attributes = run_in_workers(
            _fit_for_caller, inputs, config, num_processes=num_processes, device=device
        )
        trained = copy.deepcopy(model).to("cpu").train()
        with torch.no_grad():
            for name, tensor in _tensors(trained).items():
                tensor.copy_(tensors[name])
        for plugin, values in zip(_own_plugins(config), attributes, strict=True):
            vars(plugin).update(values)
    else:
        trained = fit(config, **inputs)
    return TrainResult(trained, time.perf_counter() - start)


_INPUTS = ("model", "train_dataset", "train_transform", "val_dataset", "val_transform", "collate_function")


def _fit_for_caller(inputs: Mapping[str, Any], config: TrainConfig) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train in a worker; return the model's tensors and the attributes of the caller's plugin objects."""
    tensors = _tensors(fit(config, **inputs))
    return {name: tensor.detach() for name, tensor in tensors.items()}, [vars(p) for p in _own_plugins(config)]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _own_plugins(config: TrainConfig) -> list[Plugin]:
    return [plugin for plugin in config.plugins if isinstance(plugin, Plugin)]


def fit(
    config: TrainConfig,
    *,
    model: nn.Module,
    train_dataset: Dataset[Any],
    train_transform: Transform | None,
    val_dataset: Dataset[Any] | None,
    val_transform: Transform | None,
    collate_function: CollateFunction | None,
) -> nn.Module:
    """Train in this process, as one rank of its launcher's world; see :func:`train`."""
    plugins = load_plugins(config.plugins, before=getattr(model, "plugins", ()))
    as_trainable(model)  # a model that cannot be trained is an error before it is copied
    if val_dataset is None and (config.val_check_interval or config.val_check_interval_epoch):
        logger.warning("A validation interval is given, but no val_dataset: nothing is validated.")
    if val_dataset is not None:
        count_examples(val_dataset, "val_dataset")
    num_examples = count_examples(train_dataset, "train_dataset")

    with open_accelerator(config.device, **_accelerator_options(config, plugins)) as accelerator:
        _check_strategy(accelerator)
        seed = agree_on_seed(config.random_seed)
        with preserve_generators(accelerator.device), plugins.running():
            seed_generators(mix(seed, STEP), accelerator.device)
            batches = EpochBatches(
                num_examples,
                batch_size=config.batch_size,
                min_examples=config.batch_size * config.accumulation * accelerator.num_processes,
                seed=seed,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            )
            if batches.examples_per_epoch > num_examples:
                logger.info(
                    "An epoch uses %d of %d examples, some repeatedly.", batches.examples_per_epoch, num_examples
                )
            trainable = as_trainable(plugins.transform("transform_model", copy.deepcopy(model)))
            check = TargetCheck.of(model)

            def loader(dataset: Dataset[Any], transform: Transform | None, batches: Any) -> Any:
                return make_loader(
                    Examples(dataset, transform, seed=seed, targets_required=True, check=check),
                    batches,
                    collate_function=collate_function,
                    num_workers=config.num_dataloader_workers,
                    pin_memory=accelerator.device.type == "cuda",
                )

            train_loader = loader(train_dataset, train_transform, batches)
            run = TrainingRun(
                config,
                accelerator=accelerator,
                plugins=plugins,
                trainable=trainable,
                loader=train_loader,
                batches=batches,
                seed=seed,
            )
            if val_dataset is not None:
                run.val_batches = OrderedBatches(
                    count_examples(val_dataset, "val_dataset"),
                    batch_size=config.val_batch_size or config.batch_size,
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                )
                run.val_loader = loader(val_dataset, val_transform, run.val_batches)
            with closing_workers(train_loader), closing_workers(run.val_loader):
                run.run()
            return run.trained_model()


def _accelerator_options(config: TrainConfig, plugins: PluginList) -> dict[str, Any]:
    from accelerate import DistributedDataParallelKwargs

    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=config.ddp_find_unused_parameters, gradient_as_bucket_view=True
    )
    return {"kwargs_handlers": [ddp], **plugins.accelerator_options()}


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
        trainable: Trainable,
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

        trainable.to(accelerator.device)
        groups = parameter_groups(
            trainable,
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
        self.trainable = trainable
        self.model = accelerator.prepare_model(trainable)

        steps_per_epoch = -(-len(batches) // config.accumulation)
        self.schedule = LearningRateSchedule(
            config=LrSchedulerConfig.of(config.lr_scheduler),
            steps_per_epoch=steps_per_epoch,
            num_epochs=config.num_epochs,
        )
        self.state = TrainState(
            accelerator=accelerator,
            model=trainable.model,
            optimizer=self.optimizer,
            num_epochs=config.num_epochs,
            steps_per_epoch=steps_per_epoch,
            examples_per_step=config.batch_size * config.accumulation * accelerator.num_processes,
        )

    def run(self) -> None:
        """Train until the last epoch, or until a plugin asks for a stop."""
        state = self.state
        self.schedule.apply(self.optimizer, self.base_lrs, state.step)
        self.plugins.notify("on_train_start", state)
        while state.epoch < state.num_epochs:
            self.train_epoch()
            if self.val_loader is not None and (state.stop_reason or self.config.validates_after(state.epoch)):
                self.validate()
            if state.stop_reason:
                logger.info("Stopped after step %d: %s", state.step, state.stop_reason)
                break
            state.epoch += 1
        self.plugins.notify("on_train_end", state)

    def train_epoch(self) -> None:
        """Take the steps of one epoch."""
        state = self.state
        self.model.train()
        self.batches.epoch = state.epoch
        self.plugins.notify("on_epoch_start", state)
        remaining = len(self.batches)
        batches = iter(self.loader)
        while remaining and not state.stop_reason:
            count = min(remaining, self.config.accumulation)
            state.loss = self.step(batches, count)
            remaining -= count
            state.step += 1
            self.schedule.apply(self.optimizer, self.base_lrs, state.step)
            self.plugins.notify("on_step_end", state)
        self.plugins.notify("on_epoch_end", state)

    def step(self, batches: Iterator[Any], count: int) -> Tensor:
        """Take one optimizer step.

        Args:
            batches: Yields the micro-batches.
            count: How many of them make this step.

        Returns:
            The mean loss on this rank, a scalar on the device.
        """
        losses = []
        scaler = self.accelerator.scaler
        for position in range(count):
            batch = self.take(batches)
            seed_generators(
                mix(self.seed, STEP, self.state.step, position, self.accelerator.process_index), self.accelerator.device
            )
            inputs, targets = self.plugins.transform("transform_batch", batch)
            with self.synchronised(position == count - 1), self.noted():
                with self.plugins.forward_context():
                    loss = self.model(inputs, targets)["loss"]
                scaled = loss if count == 1 else loss / count
                if scaler is None:
                    scaled.backward()  # what accelerator.backward comes to, less a division by one
                else:
                    self.accelerator.backward(scaled)
            losses.append(loss.detach())
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
        return losses[0] if count == 1 else torch.stack(losses).mean()

    def take(self, batches: Iterator[Any]) -> tuple[Any, Any]:
        """Return the next batch on the device, or raise the error that it could not be made for."""
        batch = next(batches)
        if isinstance(batch, Failure):
            batch.reraise()
        inputs, targets = to_device(batch, self.accelerator.device)
        return inputs, targets

    def synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch: gradients are averaged over the ranks with the last of a step."""
        self.accelerator.gradient_state._set_sync_gradients(is_last)
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def noted(self) -> AbstractContextManager[Any]:
        """Return a context that says, in an error's notes, where in the run it happened."""
        return noted(
            lambda: f"At epoch {self.state.epoch}, step {self.state.step}, on rank {self.accelerator.process_index}."
        )

    @torch.no_grad()
    def validate(self) -> None:
        """Go through the validation set; set `state.val_loss` to the mean loss per example."""
        from accelerate.utils import gather_object

        state, accelerator = self.state, self.accelerator
        assert self.val_batches is not None
        self.synchronise_buffers()
        was_training = self.trainable.training
        self.trainable.eval()
        self.plugins.notify("on_validation_start", state)
        # The module inside DDP: ranks may have different numbers of batches, and must not wait for each other here.
        loss_sum, count = torch.zeros((), device=accelerator.device), 0
        batches = iter(self.val_loader)
        for batch in self.val_batches.batches:
            inputs, targets = self.take(batches)
            seed_generators(mix(self.seed, VALIDATION, state.epoch, batch.start), accelerator.device)
            with self.noted(), accelerator.autocast(), self.plugins.forward_context():
                loss_sum += self.trainable(inputs, targets)["loss"].float() * len(batch)
            count += len(batch)
        losses, counts = zip(*gather_object([(loss_sum.item(), count)]), strict=True)
        state.val_loss = sum(losses) / sum(counts)
        self.trainable.train(was_training)
        self.plugins.notify("on_validation_end", state)

    def trained_model(self) -> nn.Module:
        """Return the trained model: unwrapped, on the CPU, in train mode."""
        self.synchronise_buffers()
        return self.trainable.to("cpu").model.train()

    def synchronise_buffers(self) -> None:
        """Make buffers equal on all ranks: the mean (BatchNorm's statistics), or rank 0's where they are integers."""
        if self.accelerator.num_processes == 1:
            return
        for buffer in self.trainable.buffers():
            if buffer.is_floating_point():
                torch.distributed.all_reduce(buffer.div_(self.accelerator.num_processes))
            else:
                torch.distributed.broadcast(buffer, src=0)


def _check_strategy(accelerator: Accelerator) -> None:
    from accelerate.utils import DistributedType

    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"train works on one process or with DistributedDataParallel; the launcher chose "
            f"{accelerator.distributed_type.value}. Launch with --multi_gpu, or torchrun."
        )
