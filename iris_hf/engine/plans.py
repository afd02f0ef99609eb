"""Which examples every process takes: of a map-style data set by index, of a stream by position."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sized
from typing import Any, cast

from torch.utils.data import Dataset, IterableDataset

from iris_hf.engine.loader import EpochBatches, Indexed, OrderedBatches, Source, count_examples
from iris_hf.engine.streams import Stream, StreamBatches, StreamOnce, SupportsRows
from iris_hf.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def is_stream(dataset: Any) -> bool:
    """Whether a data set is iterated over, not indexed."""
    return isinstance(dataset, IterableDataset) or (
        hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
    )


def training_batches(
    dataset: Dataset[Any],
    *,
    batch_size: int,
    accumulation: int,
    steps_per_epoch: int | None,
    seed: int,
    rank: int,
    world_size: int,
    num_parts: int | None,
) -> tuple[Source, EpochBatches | StreamBatches]:
    """Plan which examples of a train set a rank takes, map-style or streaming.

    Args:
        dataset: The train set.
        batch_size: Examples per process and micro-batch.
        accumulation: Micro-batches per step.
        steps_per_epoch: Optimizer steps in an epoch; those of one pass when None.
        seed: The run's seed.
        rank: This process's number.
        world_size: Number of processes.
        num_parts: Parts of a stream in the run that this one goes on with; None in a fresh run, which reads one part
            per process where the shards can be divided so.

    Raises:
        ConfigError: If `steps_per_epoch` has to be known and isn't, a stream cannot be divided, or the processes were
            given data sets of different lengths.
        DataError: If the data set is empty.
    """
    examples_per_step = batch_size * accumulation * world_size
    _check_lengths(dataset, "train_dataset", world_size)
    if not is_stream(dataset):
        batches = EpochBatches(
            count_examples(dataset, "train_dataset"),
            batch_size=batch_size,
            min_examples=examples_per_step,
            seed=seed,
            rank=rank,
            world_size=world_size,
            examples_per_epoch=None if steps_per_epoch is None else steps_per_epoch * examples_per_step,
        )
        if batches.examples_per_epoch > batches.num_examples:
            logger.info(
                "An epoch uses %d of %d examples, some repeatedly.", batches.examples_per_epoch, batches.num_examples
            )
        return Indexed(dataset), batches
    _check_stream(dataset, "train_dataset", world_size)
    num_examples = _length(dataset)
    if num_examples == 0:
        raise DataError("train_dataset is empty.")
    if steps_per_epoch is None:
        steps_per_epoch = max(1, _require_length(dataset, num_examples, examples_per_step) // examples_per_step)
    num_shards = dataset.num_shards if isinstance(dataset, SupportsRows) else 1
    if num_parts is None:
        num_parts = world_size if num_shards % world_size == 0 else 1
    if num_shards % num_parts or batch_size * world_size % num_parts:
        raise ConfigError(
            f"The run to resume read its stream in {num_parts} parts. That needs a number of shards (now {num_shards}) "
            f"and of examples in a global micro-batch (now {batch_size} x {world_size}) which {num_parts} divides."
        )
    stream_batches = StreamBatches(
        steps_per_epoch * accumulation,
        num_examples=num_examples,
        num_parts=num_parts,
        num_shards=dataset.num_shards if isinstance(dataset, SupportsRows) else None,
        shuffled_by=dataset.shuffled_by if isinstance(dataset, SupportsRows) else "",
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )
    return Stream(dataset, num_parts=num_parts, seed=seed, endless=True), stream_batches


def batches_once(
    dataset: Dataset[Any], what: str, *, batch_size: int, seed: int, rank: int, world_size: int
) -> tuple[Source, OrderedBatches | StreamOnce]:
    """Plan which examples a rank takes when each counts once.

    Args:
        dataset: Map-style or streaming.
        what: What error messages call it.
        batch_size: Examples in a batch.
        seed: The run's seed.
        rank: This process's number.
        world_size: Number of processes.

    Raises:
        ConfigError: If it cannot be gone through, or the processes were given data sets of different lengths.
        DataError: If it is known to be empty.
    """
    _check_lengths(dataset, what, world_size)
    if not is_stream(dataset):
        num_examples = count_examples(dataset, what)
        return Indexed(dataset), OrderedBatches(num_examples, batch_size=batch_size, rank=rank, world_size=world_size)
    _check_stream(dataset, what, world_size)
    source = Stream(dataset, num_parts=1, seed=seed, endless=False)
    return source, StreamOnce(batch_size=batch_size, rank=rank, world_size=world_size)


def _check_lengths(dataset: Any, what: str, world_size: int) -> None:
    if world_size == 1:
        return
    from accelerate.utils import gather_object

    lengths = gather_object([_length(dataset)])
    if len(set(lengths)) > 1:
        raise ConfigError(
            f"{what} has another length on each process: {', '.join(map(str, lengths))}. Give every process the whole "
            "data set; they share it by themselves."
        )


def _check_stream(dataset: Any, what: str, world_size: int) -> None:
    if isinstance(dataset, Iterator):
        raise ConfigError(
            f"{what} is a {type(dataset).__name__}, which can be gone through once only, and by one process. Give an "
            "IterableDataset whose __iter__ makes it."
        )
    if world_size == 1 or not isinstance(dataset, SupportsRows):
        return
    from accelerate.utils import gather_object

    if len(set(gather_object([dataset.shuffled_by]))) > 1:
        raise ConfigError(
            f"{what} is shuffled in another order on each process, so that these would not share it. Give shuffle a "
            "seed."
        )
    if dataset.is_split_by_node:
        raise ConfigError(
            f"{what} was split by node, and would be divided among the {world_size} processes once more. Give the "
            "whole data set, without split_dataset_by_node."
        )


def _length(dataset: Any) -> int | None:
    try:
        return len(cast(Sized, dataset))
    except (TypeError, NotImplementedError):
        return None


def _require_length(dataset: Any, num_examples: int | None, examples_per_step: int) -> int:
    if num_examples is not None:
        return num_examples
    raise ConfigError(
        f"train_dataset is a {type(dataset).__name__} without a length: give steps_per_epoch, the optimizer steps that "
        f"make one epoch. A pass over N examples has N / {examples_per_step}."
    )
