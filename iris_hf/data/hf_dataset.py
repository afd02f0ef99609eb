"""Hugging Face data sets as torch data sets of (RGB image, target)."""

from __future__ import annotations

import copy
import logging
import operator
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import torch.utils.data
from datasets.distributed import split_dataset_by_node

from iris_hf.data.columns import IGNORE_INDEX, Layout, find_layout
from iris_hf.data.hf_targets import check_mask_size, read_classes, read_targets
from iris_hf.data.images import decode_image, encode_image, read_image_bytes
from iris_hf.data.trust import find_origin, refuse_foreign_files, refuse_foreign_rows, steps_of
from iris_hf.errors import ConfigError, DataError, require_integer
from iris_hf.types import TargetType

logger = logging.getLogger(__name__)

_SHUFFLING_DISALLOWED: Any = getattr(datasets.iterable_dataset, "DataSourcesShufflingDisallowed", ())
"""What `datasets` raises from 5.0 on; no exception before, where there is none to catch."""

_CUTS = (datasets.iterable_dataset.SkipExamplesIterable, datasets.iterable_dataset.TakeExamplesIterable)
_ALTERNATIONS = (
    datasets.iterable_dataset.CyclingMultiSourcesExamplesIterable,
    datasets.iterable_dataset.HorizontallyConcatenatedMultiSourcesExamplesIterable,
)
"""Steps that give other rows where their sources are divided: by count, or until one of the sources is exhausted."""


def from_hf(
    dataset: datasets.Dataset | datasets.IterableDataset,
    *,
    target_type: TargetType | None = None,
    class_names: Sequence[str] | None = None,
    ignore_index: int = IGNORE_INDEX,
    fix_boxes: bool = False,
) -> HFDataset | HFIterableDataset:
    """Read a Hugging Face data set as a torch data set of (RGB image, target).

    The columns are found by name and feature, see :mod:`iris_hf.data.columns`. Images are decoded when an example is
    read and only then, without EXIF transposition, so that boxes and masks match. An image-text example is
    ``((image, caption), label or None)``.

    Args:
        dataset: One split, map-style or streaming. Selections, shuffles and splits by node are respected; a format
            or transform that is set on it is not applied.
        target_type: What the targets mean; None infers it from the features.
        class_names: Names in the order of the class indices. Needed where the features hold none, such as index
            masks without a `classes` column; otherwise they replace the names in the features.
        ignore_index: The pixel value of index masks that belongs to no class.
        fix_boxes: Clip boxes to the image and drop those of which nothing is left. Without it, a box that leaves the
            image by more than a rounding error of 1e-6, or is empty, is an error.

    Returns:
        A map-style data set, or a streaming one for a streaming source.

    Raises:
        ConfigError: If the target type cannot be inferred or the columns do not fit it; the message lists them.
        DataError: If a row of a repository of the Hub names a file that is not of the repository; of a stream that
            comes with the row. Rows that the caller mapped may name any, and so may a column of text that was cast to
            images, except in a stream.
    """
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise ConfigError(f"Give one split of the data set, such as dataset[{next(iter(dataset), 'train')!r}].")
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ConfigError(f"from_hf takes a datasets.Dataset or IterableDataset, not {type(dataset).__name__}.")
    if dataset.features is None:
        raise ConfigError("The features of the streaming data set are unknown. Give them: dataset.cast(features).")
    require_integer("ignore_index", ignore_index)
    layout = find_layout(
        dataset.features,
        target_type=target_type,
        class_names=class_names,
        ignore_index=ignore_index,
        fix_boxes=fix_boxes,
    )
    if isinstance(dataset, datasets.IterableDataset):
        return HFIterableDataset(dataset, layout)
    origin = find_origin(dataset)
    if origin is not None:
        refuse_foreign_files(dataset, origin, except_cast=True)
    return HFDataset(dataset, layout)


class HFDataset(torch.utils.data.Dataset[Any]):
    """A map-style Hugging Face data set as (RGB image, target); made by :func:`from_hf`.

    Attributes:
        hf_dataset: The data set behind it, as it was given.
        layout: Which column holds what.
    """

    def __init__(self, hf_dataset: datasets.Dataset, layout: Layout) -> None:
        self.hf_dataset = hf_dataset
        self.layout = layout
        arrow = hf_dataset.with_format("arrow")  # undecoded
        self._rows = arrow.select_columns(layout.columns)
        self._target_rows = arrow.select_columns(layout.target_columns)

    @property
    def target_type(self) -> TargetType:
        """What the targets mean."""
        return self.layout.target_type

    @property
    def class_names(self) -> list[str]:
        """The name of each class; empty for image-text pairs without classes."""
        return list(self.layout.class_names or ())

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.layout.class_names or ())

    def __len__(self) -> int:
        return len(self.hf_dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            index = operator.index(index)
        except TypeError:
            raise ConfigError(
                f"An example is read by its number, got {index!r}. For several use select([0, 1, ...]); columns are in "
                "hf_dataset."
            ) from None
        return _examples(self._rows[index], self.layout, [self._position(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        rows = [int(index) for index in indices]
        return _examples(self._rows[rows], self.layout, [self._position(index) for index in rows])

    def get_targets(self, index: int) -> Any:
        """Read one target without touching the image.

        Args:
            index: Position in this data set; negative ones count from the end.
        """
        if not self.layout.target_columns:
            return None
        target = read_targets(self._target_rows[int(index)], self.layout, [self._position(index)])[0]
        return int(target) if self.target_type == "multiclass" else target

    def get_all_targets(self) -> Any:
        """Read all targets at once: a tensor for multiclass `[N]` and multilabel `[N, num_classes]`, else a list."""
        if not self.layout.target_columns:
            return [None] * len(self)
        return read_targets(_whole_columns(self.hf_dataset, self.layout.target_columns), self.layout, range(len(self)))

    def get_all_classes(self) -> list[list[int]]:
        """Read which classes occur in each example, without decoding images, nor masks if a column lists them."""
        columns = self.layout.class_columns
        if not columns:
            return [[] for _ in range(len(self))]
        return read_classes(_whole_columns(self.hf_dataset, columns), self.layout, range(len(self)))

    def get_encoded(self, index: int) -> tuple[Any, Any]:
        """Read an example with its image as encoded bytes.

        Args:
            index: Position in this data set; negative ones count from the end.
        """
        return _examples(self._rows[int(index)], self.layout, [self._position(index)], decode=False)[0]

    def select(self, indices: Iterable[int]) -> HFDataset:
        """Give the data set of some examples; no image is read.

        Args:
            indices: Positions in this data set, in the order wanted; repetitions are fine.
        """
        return HFDataset(self.hf_dataset.select(indices), self.layout)

    def __getstate__(self) -> dict[str, Any]:
        return {"hf_dataset": self.hf_dataset, "layout": self.layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"HFDataset({self.target_type}, {len(self)} examples, {self.num_classes} classes)"

    def _position(self, index: int) -> int:
        return int(index) if index >= 0 else int(index) + len(self)


class HFIterableDataset(torch.utils.data.IterableDataset[Any]):
    """A streaming Hugging Face data set as (RGB image, target); made by :func:`from_hf`.

    DataLoader workers share its shards as `datasets` does: each example comes once, and workers beyond the number of
    shards stay idle.

    Attributes:
        hf_dataset: The data set behind it, as it was given.
        layout: Which column holds what.
    """

    def __init__(self, hf_dataset: datasets.IterableDataset, layout: Layout) -> None:
        self.hf_dataset = hf_dataset
        self.layout = layout
        self._rows = hf_dataset.with_format(None).select_columns(layout.columns).decode(False)
        self._types = {name: layout_type.type for name, layout_type in zip(*_arrow_fields(self._rows), strict=True)}
        self._origin = find_origin(hf_dataset)

    @property
    def target_type(self) -> TargetType:
        """What the targets mean."""
        return self.layout.target_type

    @property
    def class_names(self) -> list[str]:
        """The name of each class; empty for image-text pairs without classes."""
        return list(self.layout.class_names or ())

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.layout.class_names or ())

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for position, row in enumerate(self._rows):
            yield self.make_example(row, position)

    @property
    def num_shards(self) -> int:
        """Files or other sources by which the rows can be divided.

        One, where the data set skips or takes rows, or alternates between sources: it would do so in every part.
        """
        is_whole = any(isinstance(step, (*_CUTS, *_ALTERNATIONS)) for step in steps_of(self.hf_dataset._ex_iterable))
        return 1 if is_whole else int(self.hf_dataset.num_shards)

    @property
    def is_split_by_node(self) -> bool:
        """Whether these are the rows of one process, by `split_dataset_by_node`."""
        return self.hf_dataset._distributed is not None

    @property
    def shuffled_by(self) -> str:
        """Stands for seed and buffer of a shuffled data set; empty where it is not shuffled."""
        steps = _shuffled_by(self.hf_dataset._ex_iterable)
        return f"{zlib.crc32(repr(steps).encode()):08x}" if steps else ""

    def iter_rows(self, epoch: int, *, part: int = 0, num_parts: int = 1) -> Iterator[dict[str, Any]]:
        """Iterate over the rows of one epoch without decoding them, whatever other iterations do meanwhile.

        Args:
            epoch: Seeds a shuffled data set, as :meth:`set_epoch` does, but for this iteration alone. A data set that
                was not shuffled has the same order in every epoch, where `datasets` would shuffle its shards. So has
                one that was cut by skip or take after it was shuffled: in another order it would be cut elsewhere, and
                rows that were left for validation would be in it.
            part: Which part of the rows to read, from 0.
            num_parts: Parts that the rows are divided into by shards, as `split_dataset_by_node` does; it has to divide
                the number of shards.
        """
        rows = self._rows.with_format(None)  # another object: loader workers share the epoch of the same one
        steps = _without_history(rows._ex_iterable)
        if epoch and self._is_cut_after_shuffling():
            logger.warning(
                "A stream that was shuffled and then cut, by skip or take, has the same order in every pass. For "
                "another order in each, cut it first: stream.skip(n).shuffle(seed)."
            )
            epoch = 0
        epoch = epoch if self.shuffled_by else 0
        if epoch:
            try:
                steps.shuffle_data_sources(np.random.default_rng(epoch))
            except _SHUFFLING_DISALLOWED:  # after skip and take. As datasets 5.2, where 5.0 fails: buffers alone
                steps, epoch = datasets.iterable_dataset.shift_ex_examples_rngs(steps, epoch), 0
        rows._ex_iterable = steps
        if num_parts > 1:
            rows = split_dataset_by_node(rows, rank=part, world_size=num_parts)
        rows.set_epoch(epoch)
        return iter(rows)

    def make_example(self, row: dict[str, Any], position: int) -> tuple[Any, Any]:
        """Make (RGB image, target) of a row.

        Args:
            row: From :meth:`iter_rows`.
            position: What error messages call it.
        """
        return _examples(self._table(row, position), self.layout, [position])[0]

    def get_all_targets(self) -> list[Any]:
        """Read all targets, of their columns alone: no image is decoded."""
        columns = self.layout.target_columns
        if not columns:
            return [None for _ in self._rows]
        rows = self.hf_dataset.with_format(None).select_columns(columns).decode(False)
        return [
            read_targets(self._table(row, position), self.layout, [position])[0] for position, row in enumerate(rows)
        ]

    def iter_encoded(self) -> Iterator[tuple[Any, Any]]:
        """Iterate over (raw input, target) with images as encoded bytes."""
        for position, row in enumerate(self._rows):
            yield _examples(self._table(row, position), self.layout, [position], decode=False)[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which seeds a shuffled data set.

        Args:
            epoch: From 0.
        """
        self.hf_dataset.set_epoch(epoch)
        self._rows.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands, as `datasets` counts it."""
        return self._rows.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state at the next iteration.

        Args:
            state: From :meth:`state_dict`.
        """
        self._rows.load_state_dict(state)

    def __repr__(self) -> str:
        return f"HFIterableDataset({self.target_type}, {self.num_classes} classes)"

    def _is_cut_after_shuffling(self) -> bool:
        steps = steps_of(self.hf_dataset._ex_iterable)
        return any(isinstance(step, _CUTS) and _shuffled_by(step) for step in steps)

    def _table(self, row: dict[str, Any], position: int) -> pa.Table:
        table = pa.table({name: pa.array([_undecoded(row[name])], type=self._types[name]) for name in row})
        if self._origin is not None:
            refuse_foreign_rows(table, {name: self._rows.features[name] for name in row}, self._origin, position)
        return table


def _whole_columns(dataset: datasets.Dataset, columns: list[str]) -> pa.Table:
    """Read columns in the order of the data set.

    `datasets` gathers the rows of a shuffled data set one by one; one ``take`` is 15 times faster, but copies, which
    is too much for images.
    """
    order = dataset._indices
    if order is None or any(isinstance(feature, datasets.Image) for feature in _leaves(dataset.features, columns)):
        return dataset.with_format("arrow").select_columns(columns)[:]
    return dataset.data.table.select(columns).combine_chunks().take(order.column(0))


def _without_history(ex_iterable: Any) -> Any:
    """Copy the steps of a stream, but not its data.

    `datasets` notes in them how far an iteration has come, which another iteration of the same steps resets, and up to
    5.0.1 the seeds of an epoch, on which the next epoch's would build.
    """
    ex_iterable = copy.copy(ex_iterable)
    if hasattr(ex_iterable, "ex_iterable"):
        ex_iterable.ex_iterable = _without_history(ex_iterable.ex_iterable)
    if hasattr(ex_iterable, "ex_iterables"):
        ex_iterable.ex_iterables = [_without_history(source) for source in ex_iterable.ex_iterables]
    return ex_iterable


def _undecoded(value: Any) -> Any:
    """Encode images that a function given to `map` has got decoded; the pixels stay as they are."""
    if isinstance(value, PIL.Image.Image):
        return {"bytes": encode_image(value), "path": None}
    return [_undecoded(item) for item in value] if isinstance(value, list) else value


def _shuffled_by(ex_iterable: Any) -> list[str]:
    """Describe the steps of a stream that draw random numbers, and the generators that they draw from."""
    return [
        f"{getattr(step, 'buffer_size', None)} {step.generator.bit_generator.state}"
        for step in steps_of(ex_iterable)
        if getattr(step, "generator", None) is not None
    ]


def _leaves(features: datasets.Features, columns: list[str]) -> list[Any]:
    return [getattr(features[name], "feature", features[name]) for name in columns]


def _arrow_fields(dataset: datasets.IterableDataset) -> tuple[list[str], list[pa.Field]]:
    schema = dataset.features.arrow_schema
    return schema.names, list(schema)


def _examples(table: pa.Table, layout: Layout, indices: Sequence[int], decode: bool = True) -> list[tuple[Any, Any]]:
    wheres = [f"Example {index}: " for index in indices]
    images = table[layout.image].to_pylist()
    inputs: list[Any] = [
        decode_image(image, where) if decode else read_image_bytes(image, where)
        for image, where in zip(images, wheres, strict=True)
    ]
    targets = read_targets(table, layout, indices)
    if layout.target_type == "multiclass":
        targets = targets.tolist()
    if layout.caption is not None:
        captions = table[layout.caption].to_pylist()
        for caption, where in zip(captions, wheres, strict=True):
            if caption is None:
                raise DataError(f"{where}{layout.caption!r} is null. Drop the example or give it a caption.")
        inputs = list(zip(inputs, captions, strict=True))
    if layout.target_type == "segmentation" and decode:
        for masks, image, where in zip(targets, inputs, wheres, strict=True):
            check_mask_size(masks, image, where)
    if layout.target_type == "detection" and layout.has_size and decode:
        _check_not_rotated(table, inputs, wheres)
    return list(zip(inputs, targets, strict=True))


def _check_not_rotated(table: pa.Table, images: Sequence[Any], wheres: Sequence[str]) -> None:
    """Boxes drawn on an EXIF-rotated view do not fit the stored pixels; merely resized images keep relative boxes."""
    for width, height, image, where in zip(
        table["width"].to_pylist(), table["height"].to_pylist(), images, wheres, strict=True
    ):
        if width != height and image.size == (height, width):
            raise DataError(
                f"{where}the columns say {width} x {height} pixels, the image {image.width} x {image.height}: its "
                "boxes were drawn on a rotated view (EXIF). Rotate the image or the boxes."
            )
