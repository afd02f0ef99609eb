"""Training tasks: plain, and with a gradient cache."""

from __future__ import annotations

import copy
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.utils.data import Dataset

from iris_hf.data.workers import closing_workers
from iris_hf.engine.accelerator import Device, agree_on_seed, draw_seed, needs_local_workers, open_accelerator
from iris_hf.engine.launch import run_in_workers
from iris_hf.engine.loader import Examples, Source, TargetCheck, make_loader
from iris_hf.engine.plans import batches_once, training_batches
from iris_hf.engine.plugins import Plugin, PluginList, load_plugins
from iris_hf.engine.rng import STEP, mix, preserve_generators, seed_generators
from iris_hf.models.steps import as_cacheable, as_trainable
from iris_hf.training.checkpoint import CheckpointWriter, find_checkpoint
from iris_hf.training.config import CacheConfig, OptimizerName, TrainConfig
from iris_hf.training.extends import extends
from iris_hf.training.gradient_cache import CachedPass
from iris_hf.training.homecoming import give_back, leave_behind, portable_attributes
from iris_hf.training.layouts import check_sharding
from iris_hf.training.passes import Pass, PlainPass, Stepper
from iris_hf.training.resuming import facts_of, report_resumption, restore
from iris_hf.training.run import TrainingRun
from iris_hf.training.schedulers import LrSchedulerConfig
from iris_hf.types import CollateFunction, Transform

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
    checkpoint_dir: str | Path | None = None,
    checkpoint_steps: int | None = None,
    checkpoint_epochs: int | None = None,
    keep_checkpoints: int = 2,
    resume: str | Path | None = None,
    on_bad_example: Literal["raise", "skip"] = "raise",
    steps_per_epoch: int | None = None,
) -> TrainResult:
    """Train a copy of a model on Accelerate.

    A step is one optimizer step: `accumulate_grad_batches` micro-batches of `batch_size` examples on each
    process. The incomplete micro-batch at the end of an epoch is dropped; complete ones that are too few for
    a full step still make one, with the mean of their gradients. The examples of a step, their
    augmentation, and the learning-rate curve (one point per step) depend on the seed alone: 2 processes
    with batch 8 take the same steps as 1 with batch 16. (A model that draws random numbers of its own,
    such as dropout masks, draws others on other ranks. A loss that is no mean over examples, such as a cross-entropy
    with weights of classes or a detector's that is divided by the number of boxes, is that of each process's part.)
    A train set smaller than one full step is gone through several times per epoch.

    Processes hold the whole model each, or shards of it where the launcher chose FSDP2 (docs/launching.md); the steps
    are the same.

    A streaming train set, such as `from_hf` makes of a streaming Hugging Face data set, is read in its own order:
    shuffle it there, with a seed. When it ends, its next pass begins (`set_epoch` chooses another order of a shuffled
    one), in the middle of an epoch if need be. Give every process the whole stream. If its shards can be divided
    evenly by the number of processes, each process reads its own, and every batch has as many rows of each part: shards
    of equal size are used equally often. Otherwise, and for streams with `skip` or `take`, each reads all and decodes
    its own examples, and the global batches are the same on any number of processes. Likewise every loader worker
    reads all that its process reads, and decodes its own batches. (What a stream's own `map` and `filter` decode, they
    decode for every reader: give them `input_columns`, or use `train_transform`.) What is drawn for an example depends
    on the seed, the pass and the example's number. Resuming reads forward to where the run was; a run that was divided
    by shards keeps that division on another number of processes too.

    A data set, a transform or a collate function that draws random numbers finds the global generators of torch, numpy
    and Python seeded for each example or batch. Generators of its own are its own affair; with them, the result may
    depend on the loader workers, and a resumed run may differ. (What it draws under `torch.random.fork_rng`, which puts
    the generators back, may be the same for every example.) To the bit, a run is repeated or resumed where the device
    computes so: on a GPU, call `torch.use_deterministic_algorithms(True)` before.

    BatchNorm sees its own process's part of a batch; its statistics are averaged over the processes before each
    validation and at the end. The caller's model and random generators stay as they are.

    Args:
        model: Has `training_step(inputs, targets) -> {"loss": scalar}`, or `criterion` and `forward`.
        train_dataset: index -> `(raw_input, target)`. Or a stream: a torch IterableDataset of such pairs.
        train_transform: `(raw_input, target) -> (input, target)`, or image-only; None leaves examples as they are.
        val_dataset: Gone through at intervals; each example counts once in the validation loss. May be a stream.
        val_transform: As `train_transform`, for validation.
        collate_function: list of `(input, target)` -> `(inputs_batch, targets_batch)`; the contract's rules when None.
        num_epochs: Positive. In each, every example is used once, but for those that fill no micro-batch; with
            `steps_per_epoch`, those of as many steps. A set smaller than a step is filled up with repetitions.
        batch_size: Examples per process and micro-batch.
        base_lr: Learning rate that the scheduler's curve multiplies, at least 0.
        device: `"cpu"` or `"cuda"`; what is there when None.
        lr_scheduler: A mapping or an LrSchedulerConfig; cosine annealing to 0 when None.
        accumulate_grad_batches: Micro-batches per step on each process; 1 when None.
        momentum: For sgd and rmsprop, at least 0.
        nesterov: Nesterov momentum, for sgd.
        optimizer: sgd, adam, amsgrad, adamw, adamw_amsgrad, rmsprop, or one of the Adam family with `zero_` in
            front, which shards its state over the processes.
        val_check_interval: Validate after every this fraction of `num_epochs`, in (0, 1].
        val_check_interval_epoch: Validate after every this many epochs. With neither, after every epoch. The last
            epoch is always validated.
        val_batch_size: Examples per process in validation; `batch_size` when None.
        weight_decay: As the optimizer means it, at least 0: for adamw and adamw_amsgrad decoupled from the gradients
            (Loshchilov and Hutter, arXiv 1711.05101), for the others an L2 term in them.
        num_processes: Outside a launcher, local worker processes to start. Inside one (accelerate launch,
            torchrun) its world size rules, and a contradicting value is an error.
        num_dataloader_workers: Loader processes per process, at most one per core. The result does not
            depend on it. Each of them reads a stream for itself.
        no_weight_decay_param_names: Regular expressions matched from the start of a parameter's name.
        no_weight_decay_module_class_names: Regular expressions matched from the start of a module's class name.
        lr_scale_param_names: List of `[pattern, factor]`; the first pattern that matches scales a parameter's rate.
        plugins: Names, with arguments where needed, or Plugin objects; after those in `model.plugins`. An object that
            ran in local workers has the attributes of the first worker's afterwards. (What cannot be pickled, of these
            or of the model, is as it was before the run, and a warning names it.)
        random_seed: Any integer, 0 included. None draws one from torch's global generator.
        ddp_find_unused_parameters: For models whose forward leaves parameters out, on several processes.
        checkpoint_dir: Where to keep checkpoints, a folder each: complete, or not there. With one, SIGTERM makes the
            run write a checkpoint and end the process with exit code 75, without waiting for a validation to end.
        checkpoint_steps: Write a checkpoint after every this many optimizer steps.
        checkpoint_epochs: The same for epochs. With neither, after every epoch. The end of the run always has one, and
            so has a validation that is the best so far.
        keep_checkpoints: How many of the newest to keep; the one of least validation loss is kept besides.
        resume: `"auto"`: go on from the newest good checkpoint in `checkpoint_dir`, or start afresh without one. The
            folder of a checkpoint: go on from that. The run then ends with the same bytes as one that never
            stopped, on as many processes; on another number, with as many examples per step and epoch (and per
            micro-batch, where a loss is of all its examples together), it takes the same steps up to rounding. A run
            that was configured otherwise is refused, and so is one that trains other parameters, or in other groups.
            Patterns, precision and plugins may change; a warning names what did.
        on_bad_example: What happens when a train example cannot be read, transformed or checked. `raise`: an error
            that names it. `skip`: the next good example takes its place, so that batches keep their size on every
            process; a warning at the end counts and names those skipped. An error of a stream itself is always raised.
        steps_per_epoch: Optimizer steps in an epoch. Needed for a stream without `__len__`. None: as many as a pass
            over the data set has, of a stream without the incomplete one. A map-style data set is shuffled anew in
            every epoch, and its first examples are used, or all of them several times.

    Returns:
        The trained model and the elapsed time in seconds.

    Raises:
        ConfigError: If the configuration is contradictory, or the model cannot be trained.
        DataError: If a dataset is empty, or an example is invalid; the message names the example. If a checkpoint is
            damaged.
        Preempted: A SystemExit with code 75, after SIGTERM.
    """
    return _train(dict(locals()), None)


@extends(train)
def train_with_gradient_cache(  # noqa: D417  # train documents what **arguments are
    *,
    sub_batch_size: int = 1,
    num_kept_graphs: int = 0,
    memory_budget_in_mb: float | None = None,
    check_replay: bool = False,
    **arguments: Any,
) -> TrainResult:
    """Train a copy of a model with the gradients of large batches, in the memory of small ones.

    The features of a micro-batch are computed in sub-batches without graphs, the loss of all of them is
    differentiated by the features, and each sub-batch is computed once more to send its part of the derivatives
    backward (Gao et al., arXiv 2101.06983). On any number of processes, loss and gradients are those of
    :func:`iris_hf.train` on one process with all their examples in its batches. Random numbers (dropout) are the same
    in both passes. Parts of the model that are frozen, and see nothing trainable, are computed once. The inputs of a
    micro-batch stay in host memory, and sub-batches move to the device one by one, so that `transform_batch` of plugins
    sees inputs there.

    The model's `forward(inputs)` returns a feature tensor `[N, ...]`, or a list, tuple or dict of those and of scalars
    (0-dimensional, or `[1]` for several examples: the same for every sub-batch); its `criterion(features, targets)`
    gives the loss, and may use parameters of the model too. A criterion with the attribute `gathers=True` takes this
    process's features and brings those of all together by itself, as
    :func:`iris_hf.make_image_text_contrastive_model`'s does; any other takes the features and targets of all processes
    (where :func:`iris_hf.train` takes the mean of a loss per process).

    Args:
        sub_batch_size: Examples that are computed together; what is left is a smaller sub-batch, and a size above
            `batch_size` is the same as `batch_size`.
        num_kept_graphs: Sub-batches, at most, whose graphs are kept from the first pass: they take memory as in
            plain training and no second forward pass. On several processes one fewer than there are sub-batches.
        memory_budget_in_mb: Sets `num_kept_graphs` to what fits into this many MiB beside one sub-batch's graph, as
            the first sub-batch takes it. A compiled model cannot be measured.
        check_replay: Compare the second pass's features with the first's to the bit, for finding models that draw
            random numbers from generators of their own or keep state between calls.

    Raises:
        ConfigError: If the configuration is contradictory, the model has no features to cache, or a scalar differs
            between sub-batches.
        DataError: If a dataset is empty, an example is invalid, the inputs of a batch differ in length, or the
            loss is not finite (in fp16 such a step is skipped, as in plain training).
    """
    cache = CacheConfig(
        sub_batch_size=sub_batch_size,
        num_kept_graphs=num_kept_graphs,
        memory_budget_in_mb=memory_budget_in_mb,
        check_replay=check_replay,
    )
    return _train(arguments, cache)


def _train(arguments: Mapping[str, Any], cache: CacheConfig | None) -> TrainResult:
    start = time.perf_counter()
    config = TrainConfig.of(arguments)
    inputs = {name: arguments[name] for name in _INPUTS}
    if needs_local_workers(config.num_processes):
        drawn = draw_seed() if config.random_seed is None else None
        trained, left_behind, attributes = run_in_workers(
            _fit_for_caller, inputs, config, cache, drawn, num_processes=config.num_processes, device=config.device
        )
        give_back(left_behind, trained, inputs["model"])
        for plugin, values in zip(_own_plugins(config), attributes, strict=True):
            vars(plugin).update(values)
    else:
        trained = fit(config, cache, **inputs)
    return TrainResult(trained, time.perf_counter() - start)


_INPUTS = ("model", "train_dataset", "train_transform", "val_dataset", "val_transform", "collate_function")


def _fit_for_caller(
    inputs: Mapping[str, Any], config: TrainConfig, cache: CacheConfig | None, drawn: int | None
) -> tuple[nn.Module, dict[str, list[str]], list[dict[str, Any]]] | None:
    """Train in a worker.

    Returns:
        On the first one: the model without what cannot travel; the names of that, by those of the modules; and the
        attributes of the caller's plugin objects that can.
    """
    trained = fit(config, cache, drawn_seed=drawn, **inputs)
    if os.environ["RANK"] != "0":
        return None
    return trained, leave_behind(trained), list(map(portable_attributes, _own_plugins(config)))


def _own_plugins(config: TrainConfig) -> list[Plugin]:
    return [plugin for plugin in config.plugins if isinstance(plugin, Plugin)]


def fit(
    config: TrainConfig,
    cache: CacheConfig | None,
    *,
    drawn_seed: int | None = None,
    model: nn.Module,
    train_dataset: Dataset[Any],
    train_transform: Transform | None,
    val_dataset: Dataset[Any] | None,
    val_transform: Transform | None,
    collate_function: CollateFunction | None,
) -> nn.Module:
    """Train in this process, as one rank of its launcher's world; see :func:`train`. Plainly where `cache` is None.

    `drawn_seed` is the seed where neither the configuration nor a checkpoint has one; None draws it here.
    """
    plugins = load_plugins(config.plugins, before=getattr(model, "plugins", ()))
    wrap: Callable[[nn.Module], Stepper] = as_trainable if cache is None else as_cacheable
    make_pass: Callable[..., Pass] = PlainPass if cache is None else functools.partial(CachedPass, config=cache)
    wrap(model)  # a model that cannot be trained is an error before it is copied
    if val_dataset is None and (config.val_check_interval or config.val_check_interval_epoch):
        logger.warning("A validation interval is given, but no val_dataset: nothing is validated.")

    with open_accelerator(config.device, **_accelerator_options(config, plugins)) as accelerator:
        check_sharding(accelerator, optimizer=config.optimizer)
        checkpoint = find_checkpoint(config.resume, config.checkpoint_dir)
        known_seed = drawn_seed if checkpoint is None else checkpoint.facts.random_seed
        seed = agree_on_seed(config.random_seed if config.random_seed is not None else known_seed)
        with preserve_generators(accelerator.device), plugins.running():
            seed_generators(mix(seed, STEP), accelerator.device)
            world: dict[str, int] = {
                "seed": seed,
                "rank": accelerator.process_index,
                "world_size": accelerator.num_processes,
            }
            source, batches = training_batches(
                train_dataset,
                batch_size=config.batch_size,
                accumulation=config.accumulation,
                steps_per_epoch=config.steps_per_epoch,
                num_parts=None if checkpoint is None else checkpoint.facts.num_stream_parts,
                **world,
            )
            module = wrap(plugins.transform("transform_model", copy.deepcopy(model)))
            check = TargetCheck.of(model)

            def loader(source: Source, transform: Transform | None, batches: Any, *, skips: bool = False) -> Any:
                return make_loader(
                    Examples(source, transform, seed=seed, targets_required=True, check=check, skips=skips),
                    batches,
                    collate_function=collate_function,
                    num_workers=config.num_dataloader_workers,
                    pin_memory=accelerator.device.type == "cuda",
                )

            train_loader = loader(source, train_transform, batches, skips=config.on_bad_example == "skip")
            run = TrainingRun(
                config,
                accelerator=accelerator,
                plugins=plugins,
                module=module,
                make_pass=make_pass,
                loader=train_loader,
                batches=batches,
                seed=seed,
            )
            if val_dataset is not None:
                val_size = config.val_batch_size or config.batch_size
                val_source, run.val_batches = batches_once(val_dataset, "val_dataset", batch_size=val_size, **world)
                run.val_loader = loader(val_source, val_transform, run.val_batches)
            named = [getattr(each, "class_names", None) for each in (model, val_dataset, train_dataset)]
            if cache is not None:
                run.state.config = {**run.state.config, **vars(cache)}
            run.state.class_names = next((names for names in named if names is not None), None)
            facts = facts_of(run)
            if checkpoint is not None:
                checkpoint.require(facts)
                run.pending = restore(run, checkpoint)
                if accelerator.is_main_process:
                    report_resumption(run, checkpoint)
            if config.checkpoint_dir is not None:
                run.writer = CheckpointWriter(
                    config.checkpoint_dir,
                    keep=config.keep_checkpoints,
                    facts=facts,
                    accelerator=accelerator,
                    resumed=config.resume is not None,
                    step=run.state.step,
                )
            with closing_workers(train_loader), closing_workers(run.val_loader):
                run.run()
            return run.trained_model()


def _accelerator_options(config: TrainConfig, plugins: PluginList) -> dict[str, Any]:
    from accelerate import DistributedDataParallelKwargs

    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False,  # every rank's BatchNorm statistics count; buffers.py averages them
        find_unused_parameters=config.ddp_find_unused_parameters,
        gradient_as_bucket_view=True,
    )
    return {"kwargs_handlers": [ddp], **plugins.accelerator_options()}
