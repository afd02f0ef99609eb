"""Streaming data sets as sources of examples: read forward, divided among processes, resumed by position.

The passes over a stream are strung together to an endless one, and every batch has its place there, so that nothing
depends on which process or loader worker makes it: a worker reads forward to the batch that it is asked for. What it
passes over is read, but not decoded where the data set can do without (see :class:`SupportsRows`).

A stream is read as one part or as several parts (the shards of a Hugging Face data set, dealt out), each endless by
itself. A global micro-batch takes equally many rows of every part, in a row, and is dealt to the processes as
consecutive examples. So a run depends on its number of parts, not on its number of processes.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch.utils.data
from torch.utils.data import Sampler

from iris_hf.engine.loader import Failure, Key, Reported, Source
from iris_hf.engine.rng import READING, mix, seed_generators
from iris_hf.errors import DataError, failure_of

Origin = tuple[int, int]
"""A pass over a part, and the position of its first row in the endless stream of that part."""


@runtime_checkable
class SupportsRows(Protocol):
    """A streaming data set whose rows can be read without decoding them, and by shards."""

    @property
    def num_shards(self) -> int:
        """Into how many parts the rows can be divided without reading all of them."""
        ...

    @property
    def is_split_by_node(self) -> bool:
        """Whether these are the rows of one process already."""
        ...

    @property
    def shuffled_by(self) -> str:
        """What decides on the order of the rows; the same on every process and when a run is resumed."""
        ...

    def iter_rows(self, epoch: int, *, part: int = 0, num_parts: int = 1) -> Iterator[Any]:
        """Iterate over the undecoded rows of one pass, or of one of several parts of it."""
        ...

    def make_example(self, row: Any, position: int) -> tuple[Any, Any]:
        """Decode a row; `position` is for messages."""
        ...


@dataclass(frozen=True)
class Request:
    """What a batch is made of.

    Attributes:
        rows: Parts, and positions in the endless stream of each.
        origins: By part, from where on to read if it isn't open yet; from its very beginning where there is none.
    """

    rows: Sequence[tuple[int, range]]
    origins: Mapping[int, Origin]


@dataclass(frozen=True, slots=True)
class _Row:
    key: Key
    part: int
    index: int  # in the pass over its part
    position: int
    origin: Origin
    raw: Any


class Stream(Source):
    """A streaming data set as the source of examples.

    Random numbers that the data set draws while it is read come from generators seeded by the row's number. A key is
    `(pass, number)`, where numbers tell the rows of all parts apart.

    Attributes:
        dataset: Iterable over raw examples. Its `set_epoch` is called before each pass where it has one.
        num_parts: Parts that the data set is read in; more than one where it has shards.
        seed: The run's seed.
        endless: Whether a new pass begins where one ends.
    """

    def __init__(self, dataset: Any, *, num_parts: int, seed: int, endless: bool) -> None:
        self.dataset = dataset
        self.num_parts = num_parts
        self.seed = seed
        self.endless = endless
        self._has_rows = isinstance(dataset, SupportsRows)
        self._readers: dict[int, _Reader] = {}
        self._rows: dict[Key, _Row] = {}
        self._place: Any = None

    def keys(self, request: Request) -> list[Key]:
        """Read the rows that are asked for; fewer after the end of a stream that isn't endless."""
        rows = []
        for part, positions in request.rows:
            if part not in self._readers:
                self._readers[part] = _Reader(self, part)
            rows += self._readers[part].rows(positions, request.origins.get(part, (0, 0)))
        self._rows = {row.key: row for row in rows}
        if self.endless:
            self._place = {row.part: row.origin for row in rows}
        else:
            start = request.rows[0][1].start
            self._place = range(start, start + len(rows))
        return list(self._rows)

    def place(self) -> dict[int, Origin] | range:
        """Return the origins of an endless stream's parts; of another the positions of the batch, none at the end."""
        place: dict[int, Origin] | range = self._place
        return place

    def read(self, key: Key) -> Any:
        """Return a row that was read for the last request, decoded: an example of its own, each time."""
        row = self._rows[key]
        return self.dataset.make_example(row.raw, row.index) if self._has_rows else copy.deepcopy(row.raw)

    def label(self, key: Key) -> str:
        """Name a row by its number in its pass."""
        return self.name(self._rows[key].part, self._rows[key].index, key[0])

    def name(self, part: int, index: int, epoch: int) -> str:
        """Name a row: from 0, in its part, in a pass."""
        return f"{index} of {self.name_part(part)} (pass {epoch})"

    def name_part(self, part: int) -> str:
        """Name a part."""
        return "the stream" if self.num_parts == 1 else f"part {part} of the stream"

    def others(self, key: Key) -> Iterator[Key]:
        """Read on for the hundred rows that follow in the same part; they are not used up by that."""
        row = self._rows[key]
        for other in self._readers[row.part].following(row.position, 100):
            self._rows[other.key] = other
            yield other.key

    def open(self, part: int, epoch: int) -> Iterator[Any]:
        """Begin a pass over a part."""
        if self._has_rows:
            rows: Iterator[Any] = self.dataset.iter_rows(epoch, part=part, num_parts=self.num_parts)
            return rows
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        return iter(self.dataset)


class _Reader:
    """Reads one part of a stream forward."""

    def __init__(self, stream: Stream, part: int) -> None:
        self.stream = stream
        self.part = part
        self._rows: Iterator[_Row] = iter(())
        self._ahead: deque[_Row] = deque()  # what was asked for last, and what was read beyond it
        self._next: int | None = None  # the position of the row that is read next
        self._failure: DataError | None = None

    def rows(self, positions: range, origin: Origin) -> list[_Row]:
        """Return the rows at these positions; what lies before them is given up.

        Raises:
            DataError: If the stream fails, or a pass over an endless one has no rows.
        """
        kept_from = self._ahead[0].position if self._ahead else self._next
        if kept_from is None or positions.start < kept_from:
            self._ahead.clear()
            self._rows, self._next = self._passes(*origin), origin[1]
        while self._ahead and self._ahead[0].position < positions.start:
            self._ahead.popleft()
        self._read_until(positions.stop, keep_from=positions.start)
        return [row for row in self._ahead if row.position < positions.stop]

    def following(self, position: int, count: int) -> Iterator[_Row]:
        """Yield rows that come after one that was asked for; they stay where they are."""
        for stop in range(position + 2, position + 2 + count):
            self._read_until(stop, keep_from=position)
            row = next((row for row in self._ahead if row.position == stop - 1), None)
            if row is None:
                return
            yield row

    def _read_until(self, stop: int, *, keep_from: int) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            while cast(int, self._next) < stop and (row := next(self._rows, None)) is not None:
                self._next = row.position + 1
                if row.position >= keep_from:
                    self._ahead.append(row)
        except DataError as error:
            self._failure = error
            raise

    def _passes(self, epoch: int, first: int) -> Iterator[_Row]:
        """Yield the rows from the beginning of a pass on, for good or to its end."""
        stream = self.stream
        while True:
            index = -1
            for index, raw in enumerate(self._pass(epoch)):
                key = epoch, index * stream.num_parts + self.part
                yield _Row(key, self.part, index, first + index, (epoch, first), raw)
            if not stream.endless:
                return
            if index < 0:
                way_out = (
                    "A stream has to give its examples again each time that it is iterated over."
                    if stream.num_parts == 1
                    else f"Each of the {stream.num_parts} parts that its shards are divided into needs examples: use "
                    "another number of processes, or shards of equal size."
                )
                raise DataError(
                    f"{stream.name_part(self.part).capitalize()} has no examples in pass {epoch}. {way_out}"
                )
            epoch, first = epoch + 1, first + index + 1

    def _pass(self, epoch: int) -> Iterator[Any]:
        stream, index = self.stream, 0
        try:
            seed_generators(mix(stream.seed, READING, epoch, self.part))
            with _alone():
                rows = stream.open(self.part, epoch)
            while True:
                seed_generators(mix(stream.seed, READING, epoch, self.part, index))
                try:
                    with _alone():
                        raw = next(rows)
                except StopIteration:
                    return
                yield raw
                index += 1
        except Exception as error:
            place = f"before example {stream.name(self.part, index, epoch)}"
            raise failure_of(f"The data set failed {place}", error) from error


@contextmanager
def _alone() -> Iterator[None]:
    """Hide from a data set that it is read in a loader worker.

    One that shares itself among workers would leave rows out: here each of them reads all.
    """
    worker = torch.utils.data._utils.worker
    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info


class StreamBatches(Sampler[Request]):
    """The micro-batches of one rank in one epoch of an endless stream.

    A *global* micro-batch holds `batch_size * world_size` examples, the same number of every part in a row, and rank
    `r` takes the r-th stretch of them. An epoch is a number of micro-batches; the next one goes on where it ended.

    Attributes:
        epoch: The epoch that the next iteration yields.
        start: The first micro-batch that the next iteration yields; later ones start at 0 again.
        num_examples: Examples in a pass; None where that isn't known.
        num_parts: Parts that the stream is read in.
        num_shards: Shards that these parts are made of; None where nobody knows.
        shuffled_by: What decides on the order of its rows, where that is known.
        origins: By part, from where a process that hasn't opened it has to read. The loop keeps it up to date, so that
            resuming reads no more than one pass.
    """

    def __init__(
        self,
        num_batches: int,
        *,
        num_examples: int | None,
        num_parts: int,
        num_shards: int | None = None,
        shuffled_by: str = "",
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.num_batches = num_batches
        self.num_examples = num_examples
        self.num_parts: int | None = num_parts
        self.num_shards = num_shards
        self.shuffled_by = shuffled_by
        self.origins: dict[int, Origin] = {}
        self.epoch = 0
        self.start = 0
        self._share = batch_size * world_size // num_parts
        self._mine = range(rank * batch_size, (rank + 1) * batch_size)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Request]:
        start, self.start = self.start, 0
        for batch in range(self.epoch * len(self) + start, (self.epoch + 1) * len(self)):
            yield Request(self.rows(batch), dict(self.origins))

    def rows(self, batch: int) -> list[tuple[int, range]]:
        """Return the parts and positions of this rank's examples in a micro-batch, counted from the run's start."""
        rows = []
        for part in range(self._mine.start // self._share, -(-self._mine.stop // self._share)):
            before = part * self._share
            first = max(self._mine.start - before, 0)
            last = min(self._mine.stop - before, self._share)
            rows.append((part, range(batch * self._share + first, batch * self._share + last)))
        return rows


class StreamOnce(Sampler[Request]):
    """The batches of one rank when every example of a stream counts once (validation, prediction).

    Rank `r` takes the r-th of every `world_size` batches, so a batch holds the same examples at every world size.
    """

    def __init__(self, *, batch_size: int, rank: int, world_size: int) -> None:
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[Request]:
        for batch in itertools.count(self.rank, self.world_size):
            yield Request([(0, range(batch * self.batch_size, (batch + 1) * self.batch_size))], {})

    def walk(self, loader: Iterable[Any]) -> Iterator[tuple[range, Any]]:
        """Yield what the loader gives until the stream ends, and which examples that are."""
        for batch in loader:
            if isinstance(batch, Failure):
                batch.reraise()
            assert isinstance(batch, Reported)
            if batch.place:
                yield batch.place, batch.batch
            if len(batch.place) < self.batch_size:
                return
