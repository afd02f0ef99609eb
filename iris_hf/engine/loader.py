"""From a dataset to batches: order, sharding, transforms, errors that name the example.

The loop asks for *keys* `(epoch, index)`, and an example is a pure function of its key and the seed. So
loader workers keep no state, an epoch can start anywhere, and every world size sees the same examples.
Streams, which are read forward, come in by the same door: :mod:`iris_hf.engine.streams`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from iris_hf.data.collate import collate
from iris_hf.data.targets import check_target
from iris_hf.data.transforms import as_pair_transform
from iris_hf.data.workers import outlive_sigterm, worker_context
from iris_hf.engine.accelerator import available_cores
from iris_hf.engine.rng import COLLATE, EXAMPLE, ORDER, mix, preserve_generators, probe_generators, seed_generators
from iris_hf.errors import ConfigError, DataError, failure_of
from iris_hf.types import CollateFunction, TargetType, Transform

Key = tuple[int, int]
"""`(epoch, index)`: which example, and for the how-manieth time."""


with preserve_generators():
    seed_generators(0)
    _PROBE = probe_generators()


@dataclass(frozen=True)
class Failure:
    """What a loader yields in place of a batch that could not be made.

    An exception that travels through a loader worker loses its message in a traceback of another
    process; this one arrives whole and is raised by the loop.
    """

    error: Exception

    def reraise(self) -> None:
        """Raise the error in the loop's process."""
        raise self.error


@dataclass(frozen=True)
class Reported:
    """A batch, and what the loop has to know of it.

    Attributes:
        batch: The batch; None after the end of a stream.
        skipped: Label of each bad example that a good one stands for, and what was wrong with it.
        place: Where in a stream it was read, see :meth:`Source.place`.
    """

    batch: Any
    skipped: dict[int | str, str]
    place: Any = None

    def pin_memory(self) -> Reported:
        """Return the same in page-locked memory."""
        return replace(self, batch=pinned(self.batch))


class Source(ABC):
    """Where :class:`Examples` come from."""

    @abstractmethod
    def keys(self, request: Any) -> Sequence[Key]:
        """Make ready what a batch needs, and return the keys of its examples.

        Args:
            request: What the sampler yielded.
        """

    @abstractmethod
    def read(self, key: Key) -> Any:
        """Return a raw example."""

    @abstractmethod
    def label(self, key: Key) -> int | str:
        """Return what messages call an example, after the word "Example"."""

    @abstractmethod
    def others(self, key: Key) -> Iterable[Key]:
        """Return what may stand for an example that cannot be made, nearest first."""

    def place(self) -> Any:
        """Return what the loop has to know of where the last request was read; None where that says nothing."""
        return None


class Indexed(Source):
    """A map-style dataset.

    Attributes:
        dataset: index -> raw example. Its `set_epoch` is called where it has one.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self._epoch: int | None = None

    def keys(self, request: Sequence[Key]) -> Sequence[Key]:
        """Return the keys that the sampler yielded."""
        return request

    def read(self, key: Key) -> Any:
        """See :class:`Source`."""
        epoch, index = key
        if epoch != self._epoch:
            self._epoch = epoch
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
        return self.dataset[index]

    def label(self, key: Key) -> int:
        """Return the index."""
        return key[1]

    def others(self, key: Key) -> Iterable[Key]:
        """Return the hundred examples that follow."""
        epoch, index = key
        num_examples = len(cast(Sized, self.dataset))
        return [(epoch, other % num_examples) for other in range(index + 1, index + min(num_examples, 101))]


@dataclass(frozen=True, kw_only=True)
class TargetCheck:
    """What the model says about its targets, so that a wrong one is found before it reaches a loss.

    Attributes:
        target_type: One of the target types of the contract.
        num_classes: Number of classes the model knows; unchecked when None.
    """

    target_type: TargetType
    num_classes: int | None

    @classmethod
    def of(cls, model: Any) -> TargetCheck | None:
        """Read the check off a model; None when it says nothing."""
        target_type = getattr(model, "target_type", None)
        if target_type is None or target_type == "image_text":
            return None
        return cls(target_type=target_type, num_classes=getattr(model, "num_classes", None) or None)


class Examples(Dataset[Any]):
    """Transformed examples by key.

    Attributes:
        source: Gives raw examples: `(raw_input, target)`, or a bare input where `targets_required` is False.
        transform: `(raw_input, target) -> (input, target)`.
        seed: The run's seed.
        targets_required: Whether an example without a target is an error.
        check: What is checked of the transformed target; nothing when None.
        skips: Whether the next good example of the source stands for one that cannot be made.
    """

    def __init__(
        self,
        source: Dataset[Any] | Source,
        transform: Transform | None,
        *,
        seed: int,
        targets_required: bool,
        check: TargetCheck | None = None,
        skips: bool = False,
    ) -> None:
        self.source = source if isinstance(source, Source) else Indexed(source)
        self.transform = as_pair_transform(transform)
        self.seed = seed
        self.targets_required = targets_required
        self.check = check
        self.skips = skips
        self._draws = False

    def __getitems__(self, request: Any) -> list[tuple[Any, Any]] | Failure:
        """Return the examples of one batch, or the first failure among them.

        An example that draws random numbers gets the global generators seeded by its key. Most data sets draw
        none, and seeding three generators per example would be a tenth of a small step. So a batch is first made
        on generators in a known state. If they are still in it, the batch is right whatever the seeds; otherwise
        it is made again, and from then on every example is seeded. (A data set that draws and puts the generators
        back, as under `torch.random.fork_rng`, looks as if it drew none: its numbers are always the same.)
        """
        try:
            keys = self.source.keys(request)
            if not self._draws:
                examples, self._draws = self._undrawn(keys)
                if not self._draws:
                    return examples
            return self._make(keys, seeded=True)
        except DataError as error:  # of a stream: there is no example that it is about
            return Failure(error)

    def _undrawn(self, keys: Sequence[Key]) -> tuple[list[tuple[Any, Any]] | Failure, bool]:
        """Return the batch, and whether making it drew random numbers."""
        seed_generators(0)
        examples = self._make(keys, seeded=False)
        return examples, probe_generators() != _PROBE

    def _make(self, keys: Sequence[Key], *, seeded: bool) -> list[tuple[Any, Any]] | Failure:
        examples = _Made(keys)
        for key in keys:
            example = self._try(key, seeded=seeded)
            if isinstance(example, Failure) and self.skips:
                examples.skipped[self.source.label(key)] = str(example.error)
                example = self._next_good(key, example, seeded=seeded)
            if isinstance(example, Failure):
                return example
            examples.append(example)
        examples.place = self.source.place()
        return examples

    def _try(self, key: Key, *, seeded: bool) -> tuple[Any, Any] | Failure:
        try:
            if seeded:
                seed_generators(mix(self.seed, EXAMPLE, *key))
            return self._example(key)
        except Exception as error:
            return Failure(failure_of(f"Example {self.source.label(key)}", error))

    def _next_good(self, key: Key, failure: Failure, *, seeded: bool) -> tuple[Any, Any] | Failure:
        """Return the next example that can be made; the failure where a hundred in a row cannot."""
        for other in self.source.others(key):
            example = self._try(other, seeded=seeded)
            if not isinstance(example, Failure):
                return example
        return failure

    def _example(self, key: Key) -> tuple[Any, Any]:
        item = self.source.read(key)
        if isinstance(item, tuple) and len(item) == 2:
            raw_input, target = item
        elif self.targets_required:
            raise DataError(
                f"the dataset gave {type(item).__name__}, not a pair (input, target). "
                "Training and validation need targets."
            )
        else:
            raw_input, target = item, None
        example = self.transform(raw_input, target)
        if self.check is not None and example[1] is not None:
            check_target(example[1], self.check.target_type, num_classes=self.check.num_classes)
        return example


class _Made(list[tuple[Any, Any]]):
    """Examples, their keys, those that others stand for, and where they were read."""

    def __init__(self, keys: Sequence[Key]) -> None:
        self.keys = keys
        self.skipped: dict[int | str, str] = {}
        self.place: Any = None


@dataclass(frozen=True)
class _Sealed:
    """A batch that DataLoader cannot look into: older versions of torch make lists of the tuples that they pin.

    See https://github.com/pytorch/pytorch/issues/48419.
    """

    batch: Any

    def pin_memory(self) -> _Sealed:
        """Return the same in page-locked memory; DataLoader calls this."""
        return _Sealed(pinned(self.batch))


class _PinningLoader(DataLoader[Any]):
    """A DataLoader of sealed batches, which it opens."""

    def __iter__(self) -> Any:
        return (sealed.batch for sealed in super().__iter__())


class Collator:
    """Collates a batch; lets a failure through and turns an error of the collate function into one.

    A function of the caller's finds the global generators seeded by the keys of the batch.
    """

    def __init__(self, collate_function: CollateFunction | None, seed: int, *, seals: bool = False) -> None:
        self.collate_function = collate_function or collate
        self.seed = seed
        self.seals = seals

    def __call__(self, examples: list[tuple[Any, Any]] | Failure) -> tuple[Any, Any] | Reported | Failure | _Sealed:
        """Return the batch."""
        batch = self._collated(examples)
        return _Sealed(batch) if self.seals else batch

    def _collated(self, examples: list[tuple[Any, Any]] | Failure) -> tuple[Any, Any] | Reported | Failure:
        if isinstance(examples, Failure):
            return examples
        if examples and self.collate_function is not collate:
            assert isinstance(examples, _Made)
            seed_generators(mix(self.seed, COLLATE, *examples.keys[0], *examples.keys[-1]))
        try:
            batch = self.collate_function(examples) if examples else None
        except Exception as error:
            return Failure(failure_of("The collate function", error))
        if isinstance(examples, _Made) and (examples.skipped or examples.place is not None):
            return Reported(batch, examples.skipped, examples.place)
        return cast(tuple[Any, Any], batch)


class EpochBatches(Sampler[list[Key]]):
    """The micro-batches of one rank in one epoch, as keys.

    The order of epoch `e` is a permutation that depends on the seed and `e`. One *global* micro-batch
    holds `batch_size * world_size` consecutive examples of it, and rank `r` takes the r-th part: every
    world size sees the same global batches. The incomplete one at the end is dropped. A dataset with
    fewer than `min_examples` examples, or fewer than `examples_per_epoch`, is gone through several times, each
    example equally often but for one.

    Attributes:
        epoch: The epoch that the next iteration yields.
        start: The first micro-batch that the next iteration yields; later ones start at 0 again.
        batches_per_epoch: Micro-batches of this rank in an epoch.
        num_parts: What streams have, see :class:`iris_hf.engine.streams.StreamBatches`: here None.
        num_shards: Likewise: None.
        shuffled_by: Likewise: empty.
        origins: Likewise: empty.
    """

    num_parts: int | None = None
    num_shards: int | None = None
    shuffled_by: str = ""

    def __init__(
        self,
        num_examples: int,
        *,
        batch_size: int,
        min_examples: int,
        seed: int,
        rank: int,
        world_size: int,
        examples_per_epoch: int | None = None,
    ) -> None:
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0
        self.origins: dict[int, tuple[int, int]] = {}
        self.examples_per_epoch = examples_per_epoch or max(num_examples, min_examples)
        self.batches_per_epoch = self.examples_per_epoch // (batch_size * world_size)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        start, self.start = self.start, 0
        order = self.order(self.epoch)
        for batch in range(start, self.batches_per_epoch):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]

    def order(self, epoch: int) -> list[int]:
        """Return the indices of all ranks' examples in one epoch, in order."""
        generator = torch.Generator().manual_seed(mix(self.seed, ORDER, epoch))
        order: list[int] = []
        while len(order) < self.examples_per_epoch:
            order += torch.randperm(self.num_examples, generator=generator).tolist()
        return order[: self.examples_per_epoch]


class OrderedBatches(Sampler[list[Key]]):
    """The batches of one rank when every example counts once, in dataset order (validation, prediction).

    Rank `r` takes the r-th contiguous run of batches, so results concatenated by rank are in dataset
    order, and a batch holds the same examples at every world size.

    Attributes:
        epoch: The epoch that keys carry.
        batches: This rank's batches, as ranges of indices.
    """

    def __init__(self, num_examples: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        starts = range(0, num_examples, batch_size)
        per_rank, extra = divmod(len(starts), world_size)
        first = rank * per_rank + min(rank, extra)
        mine = starts[first : first + per_rank + (rank < extra)]
        self.epoch = 0
        self.batches = [range(start, min(start + batch_size, num_examples)) for start in mine]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self.batches:
            yield [(self.epoch, index) for index in batch]

    def walk(self, loader: Iterable[Any]) -> Iterator[tuple[range, Any]]:
        """Yield what the loader gives, and which examples that are."""
        return zip(self.batches, loader, strict=True)


def count_examples(dataset: Dataset[Any], what: str) -> int:
    """Return the dataset's length.

    Raises:
        ConfigError: If it has none (a streaming dataset).
        DataError: If it is zero.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"{what} is a {type(dataset).__name__} without a length, and batches are drawn by index. "
            "Pass a map-style dataset; a streaming one of the Hub becomes one with load_dataset(..., streaming=False)."
        )
    length = len(cast(Sized, dataset))
    if length == 0:
        raise DataError(f"{what} is empty.")
    return length


def make_loader(
    examples: Examples,
    batches: Sampler[Any] | Sequence[list[Key]],
    *,
    collate_function: CollateFunction | None,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Any]:
    """Build the loader. It draws nothing from the global generators.

    Args:
        examples: The examples by key.
        batches: The keys of each batch.
        collate_function: Makes a batch of a list of examples; the contract's rules when None.
        num_workers: Loader processes, at most one per core and batch; 0 loads in the loop's process.
            Batches do not depend on it.
        pin_memory: Whether batches come in page-locked memory, for copies to a GPU that don't wait.

    Raises:
        ConfigError: If `num_workers` is negative.
    """
    if num_workers < 0:
        raise ConfigError(f"num_dataloader_workers must not be negative, got {num_workers}.")
    num_workers = min(num_workers, available_cores())
    if isinstance(batches, Sized):
        num_workers = min(num_workers, len(batches))
    kind = _PinningLoader if pin_memory else DataLoader
    return kind(
        examples,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=Collator(collate_function, examples.seed, seals=pin_memory),
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=outlive_sigterm,
        multiprocessing_context=worker_context(num_workers),
    )


def to_device(data: Any, device: torch.device) -> Any:
    """Move every tensor in nested lists, tuples and mappings; other values stay as they are.

    A copy from page-locked memory to a device does not wait for it. One to host memory does: who reads that would
    otherwise find what was there before.
    """
    if isinstance(data, (torch.Tensor, PackedSequence)):
        return data.to(device, non_blocking=device.type != "cpu")  # type: ignore[arg-type]  # PackedSequence's stub
    return map_nested(lambda item: to_device(item, device), data)


def pinned(data: Any) -> Any:
    """Put every tensor in nested lists, tuples and mappings into page-locked memory, and what knows how to go there."""
    if isinstance(data, torch.Tensor):
        return data.pin_memory() if data.device.type == "cpu" and data.layout is torch.strided else data
    return data.pin_memory() if hasattr(data, "pin_memory") else map_nested(pinned, data)


def map_nested(function: Callable[[Any], Any], data: Any) -> Any:
    """Apply a function to the items of a list, tuple or mapping, keeping its kind; other values stay.

    Of a subclass of dict it makes a dict. Other mappings, such as a tokenizer's BatchEncoding, are copied.
    """
    if isinstance(data, dict):
        return {key: function(value) for key, value in data.items()}
    if isinstance(data, MutableMapping):
        changed = copy.copy(data)
        changed.update({key: function(value) for key, value in data.items()})
        return changed
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*map(function, data))
    if isinstance(data, (list, tuple)):
        return type(data)(map(function, data))
    return data
