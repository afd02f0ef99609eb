"""Torch data sets as Hugging Face data sets."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import PIL.Image
import pyarrow as pa
import torch.utils.data
from torch import Tensor

from iris_hf.data.columns import IGNORE_INDEX, features_for
from iris_hf.data.images import encode_image, image_size
from iris_hf.data.read_targets import locate
from iris_hf.data.targets import check_target
from iris_hf.data.workers import worker_context
from iris_hf.errors import ConfigError, DataError, failure_of, require_integer, require_names, unknown_name
from iris_hf.types import TARGET_TYPES, TargetType

_ROWS_PER_CHUNK = 4  # what a worker process sends at a time: few, since a row may be a 12-megapixel PNG
_MAX_BATCH_ROWS = 1000
_MAX_BATCH_BYTES = 32 * 2**20
_NUM_SHARDS = 64  # of a streamed map-style source; many world sizes and worker numbers divide it

MaskFormat = Literal["auto", "index", "stack"]


def to_hf(
    dataset: Any,
    *,
    target_type: TargetType,
    class_names: Sequence[str] | None = None,
    streaming: bool | None = None,
    num_proc: int = 1,
    masks: MaskFormat = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Write a torch data set of (raw input, target) as a Hugging Face data set.

    The columns are those of :mod:`iris_hf.data.columns`, and :func:`from_hf` gives the examples back: equal pixels,
    equal targets (as int, int64 and float32). Encoded bytes are kept where the source has them: a raw input may be a
    PIL image, which counts as encoded while its file holds the same pixels, or encoded bytes, or a path. Other images
    become PNG. An image-text example is ``((image, caption or list of captions), label or None)``.

    Examples go through memory one by one into an Arrow file, which the result maps. That file lives in the cache
    folder of `datasets` until the process ends; ``save_to_disk``, ``to_parquet`` and ``push_to_hub`` keep it.

    Args:
        dataset: Map-style (``__len__`` and ``__getitem__``) or iterable. Every target is checked.
        target_type: What the targets mean.
        class_names: The name of each class, in the order of the class indices. Image-text pairs without labels need
            none.
        streaming: Whether to give an ``IterableDataset`` that reads the source while it is iterated; None does so for
            an iterable source.
        num_proc: Number of worker processes that read and encode a map-style source. 1 works in this process.
        masks: ``"index"`` stores one image of class indices, 255 where there is no class; ``"stack"`` one 1-bit
            image for each class, which may overlap. ``"auto"`` is ``"index"`` unless there are more than 255 classes
            or two masks overlap, in which case the conversion starts over with ``"stack"``; a streaming result
            cannot and raises.
        cache_dir: Folder for the Arrow file, which then stays there.

    Raises:
        ConfigError: If arguments are missing or contradict each other.
        DataError: If the data set is empty, or an example is not in its format; the message names it.
    """
    _check_arguments(dataset, target_type, class_names, num_proc, masks)
    is_map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if is_map_style and len(dataset) == 0:
        raise DataError("The data set has no examples.")
    num_classes = None if class_names is None else len(class_names)
    stacked = masks == "stack" or (masks == "auto" and (num_classes or 0) > IGNORE_INDEX)
    encode = _Encoder(target_type, num_classes, stacked)
    many_captions = False
    if target_type == "image_text":
        first: Any = dataset[0] if is_map_style else next(iter(dataset), None)
        many_captions = _has_many_captions(first)
        if isinstance(dataset, Iterator):  # which has given its first example away
            dataset = itertools.chain([first], dataset)
    features = functools.partial(features_for, target_type, class_names, many_captions=many_captions)
    if streaming or (streaming is None and not is_map_style):
        return _stream(dataset, encode, features(stacked=stacked), is_map_style)
    folder = own_folder(cache_dir)
    rows = functools.partial(_encoded_rows, num_proc=num_proc) if is_map_style else _iterate
    try:
        return write_rows(rows(dataset, encode), features(stacked=stacked), folder)
    except OverlappingMasksError:
        if masks != "auto" or isinstance(dataset, Iterator):
            raise
    encode = _Encoder(target_type, num_classes, stacked=True)
    return write_rows(rows(dataset, encode), features(stacked=True), folder)


class OverlappingMasksError(DataError):
    """Two masks of an example share a pixel, so that one image of class indices cannot hold them."""


@dataclass(frozen=True)
class _Encoder:
    """Makes a row from an example."""

    target_type: TargetType
    num_classes: int | None
    stacked: bool

    def __call__(self, index: int, example: Any) -> dict[str, Any]:
        where = f"Example {index}: "
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise DataError(f"{where}an example is a tuple (raw input, target), not {type(example).__name__}.")
        raw_input, target = example
        caption = None
        if self.target_type == "image_text":
            raw_input, caption = _split_caption(raw_input, where)
        data = encode_image(raw_input, where)
        size = image_size(data, where)
        check_target(target, self.target_type, num_classes=self.num_classes, image_size=size, where=where)
        row: dict[str, Any] = {"image": {"bytes": data, "path": None}}
        if self.target_type == "multiclass":
            return row | {"label": int(target)}
        if self.target_type == "multilabel":
            return row | {"labels": target.nonzero().flatten().tolist()}
        if self.target_type == "detection":
            return {"image_id": index} | row | _box_columns(index, target, size)
        if self.target_type == "segmentation":
            return row | mask_columns(target, self.stacked, where)
        return row | {"caption": caption} | self._label_column(target, where)

    def _label_column(self, target: Any, where: str) -> dict[str, Any]:
        if self.num_classes is not None:
            return {"label": None if target is None else int(target)}
        if target is not None:
            raise DataError(f"{where}has the label {int(target)}, but no class_names were given. Give them.")
        return {}


def _split_caption(raw_input: Any, where: str) -> tuple[Any, Any]:
    if isinstance(raw_input, (tuple, list)) and len(raw_input) == 2:
        image, caption = raw_input
        if isinstance(caption, str) or (isinstance(caption, list) and all(isinstance(c, str) for c in caption)):
            return image, caption
    raise DataError(f"{where}the raw input of image_text is a tuple (image, caption), not {type(raw_input).__name__}.")


def _box_columns(index: int, target: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """COCO boxes in float64, from which float32 coordinates come back bit by bit."""
    corners = target[:, 1:].double() * torch.tensor([*size, *size], dtype=torch.float64)
    extents = corners[:, 2:] - corners[:, :2]
    objects = {
        "id": [(index << 20) + box for box in range(len(target))],
        "area": extents.prod(1).tolist(),
        "bbox": torch.cat([corners[:, :2], extents], dim=1).tolist(),
        "category": target[:, 0].long().tolist(),
    }
    return {"width": size[0], "height": size[1], "objects": objects}


def mask_columns(target: Tensor, stacked: bool, where: str) -> dict[str, Any]:
    """Give the columns of a mask.

    Args:
        target: 0/1 masks `[num_classes, height, width]` of any dtype.
        stacked: Whether each class gets its own image.
        where: What an error message starts with.

    Raises:
        OverlappingMasksError: If masks overlap that are to share an image.
    """
    masks = target.bool()
    classes = masks.flatten(1).any(1).nonzero().flatten().tolist()
    if stacked:
        empty = encode_mask(PIL.Image.new("1", (masks.shape[2], masks.shape[1])))
        images = [empty] * len(masks)
        for index in classes:
            images[index] = encode_mask(PIL.Image.fromarray(masks[index].numpy()))
        return {"annotation": images, "classes": classes}
    crowded = masks.sum(0) > 1
    if crowded.any():
        y, x = crowded.nonzero()[0].tolist()
        raise OverlappingMasksError(
            f"{where}the masks of classes {masks[:, y, x].nonzero().flatten().tolist()} overlap at x={x}, y={y}; "
            'give masks="stack".'
        )
    index_mask = torch.where(masks.any(0), masks.byte().argmax(0), IGNORE_INDEX).byte()
    return {"annotation": encode_mask(PIL.Image.fromarray(index_mask.numpy())), "classes": classes}


def encode_mask(mask: PIL.Image.Image) -> dict[str, Any]:
    """Give a mask as it is stored, a PNG.

    Args:
        mask: Of one channel.
    """
    buffer = io.BytesIO()
    mask.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _check_arguments(
    dataset: Any, target_type: str, class_names: Sequence[str] | None, num_proc: int, masks: str
) -> None:
    if target_type not in TARGET_TYPES:
        raise unknown_name("target_type", target_type, TARGET_TYPES)
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise ConfigError("The data set is a Hugging Face data set already; from_hf reads it.")
    if not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
        raise ConfigError(f"A data set gives (raw input, target) by index or one after another, not {dataset!r}.")
    if class_names is None and target_type != "image_text":
        raise ConfigError(f"class_names is needed for the target type {target_type!r}.")
    if class_names is not None:
        require_names("class_names", class_names)
        if len(set(class_names)) != len(class_names):
            raise ConfigError(f"class_names is a list of distinct names, not {class_names!r}.")
    require_integer("num_proc", num_proc, at_least=1)
    if masks not in ("auto", "index", "stack"):
        raise unknown_name("format of masks", masks, ("auto", "index", "stack"))
    if masks == "index" and class_names is not None and len(class_names) > IGNORE_INDEX:
        raise ConfigError(f"An index mask has room for {IGNORE_INDEX} classes, not {len(class_names)}. Use 'stack'.")


def _has_many_captions(example: Any) -> bool:
    try:
        return isinstance(example[0][1], list)
    except (TypeError, IndexError, KeyError):
        return False  # not an image-text example, which its check will tell with its name


def own_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """Make a new folder for an Arrow file, removed when this process ends.

    Args:
        cache_dir: Where to make it, for good; None chooses the cache folder of `datasets`.
    """
    parent = Path(cache_dir if cache_dir is not None else datasets.config.HF_DATASETS_CACHE)
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="iris_hf-", dir=parent))  # a new name: nothing stale can be found in it
    if cache_dir is None:
        atexit.register(_remove_folder, folder, os.getpid())
    return folder


def _remove_folder(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)


def write_rows(rows: Iterable[dict[str, Any]], features: datasets.Features, folder: Path) -> datasets.Dataset:
    """Write rows to an Arrow stream in batches of bounded size, and map it.

    Args:
        rows: Values by column, with images as mappings of ``bytes`` and ``path``.
        features: The features of the columns.
        folder: Where the file goes, from :func:`own_folder`.
    """
    path, schema = folder / "data.arrow", features.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        batch: list[dict[str, Any]] = []
        num_bytes = 0
        for row in rows:
            batch.append(row)
            num_bytes += _num_image_bytes(row)
            if len(batch) >= _MAX_BATCH_ROWS or num_bytes >= _MAX_BATCH_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                batch, num_bytes = [], 0
        if batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    return datasets.Dataset.from_file(str(path))


def _num_image_bytes(row: dict[str, Any]) -> int:
    values = itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in row.values())
    return sum(len(value.get("bytes") or b"") for value in values if isinstance(value, dict))


def _encoded_rows(dataset: Any, encode: _Encoder, num_proc: int) -> Iterator[dict[str, Any]]:
    """Encode all examples in order, in worker processes if there are to be several."""
    num_workers = num_proc if num_proc > 1 else 0
    loader = torch.utils.data.DataLoader(
        _Chunks(dataset, encode),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=num_workers,
        multiprocessing_context=worker_context(num_workers),
        generator=torch.Generator(),  # leaves the caller's random state alone
    )
    failure = None
    for rows in loader:
        if isinstance(rows, DataError):
            failure = rows
            break  # first drops the iterator, which stops the workers; in a traceback it would live on
        yield from rows
    if failure is not None:
        raise failure


class _Chunks(torch.utils.data.Dataset[Any]):
    """The rows of some examples at a time; a failure in a worker comes as a value, which crosses processes whole."""

    def __init__(self, dataset: Any, encode: _Encoder) -> None:
        self.dataset = dataset
        self.encode = encode

    def __len__(self) -> int:
        return -(-len(self.dataset) // _ROWS_PER_CHUNK)

    def __getitem__(self, chunk: int) -> list[dict[str, Any]] | DataError:
        rows: list[dict[str, Any]] = []
        start = chunk * _ROWS_PER_CHUNK
        for index in range(start, min(start + _ROWS_PER_CHUNK, len(self.dataset))):
            try:
                rows.append(self.encode(index, _encoded_example(self.dataset, index)))
            except DataError as error:
                return error
            except Exception as error:
                return failure_of(f"Example {index}", error)
        return rows


def _unchanged(value: Any) -> Any:
    return value


def _encoded_example(dataset: Any, index: int) -> Any:
    leaf, position = locate(dataset, index)
    return leaf.get_encoded(position) if hasattr(leaf, "get_encoded") else leaf[position]


def _iterate(dataset: Any, encode: _Encoder) -> Iterator[dict[str, Any]]:
    examples = dataset.iter_encoded() if hasattr(dataset, "iter_encoded") else dataset
    with _one_reader():
        for index, example in enumerate(examples):
            yield encode(index, example)


def _stream(
    dataset: Any, encode: _Encoder, features: datasets.Features, is_map_style: bool
) -> datasets.IterableDataset:
    from datasets.iterable_dataset import ExamplesIterable

    if is_map_style:
        num_shards = min(_NUM_SHARDS, len(dataset))
        bounds = [len(dataset) * shard // num_shards for shard in range(num_shards + 1)]
        ranges = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
        generate, arguments = functools.partial(_stream_ranges, dataset, encode), {"ranges": ranges}
    else:
        generate, arguments = functools.partial(_stream_all, dataset, encode), {}
    # Not IterableDataset.from_generator, which pickles the whole source for a fingerprint.
    return datasets.IterableDataset(ExamplesIterable(generate, arguments), info=datasets.DatasetInfo(features=features))


def _stream_ranges(dataset: Any, encode: _Encoder, ranges: Sequence[range]) -> Iterator[tuple[int, dict[str, Any]]]:
    for indices in ranges:
        for index in indices:
            yield index, encode(index, _encoded_example(dataset, index))


def _stream_all(dataset: Any, encode: _Encoder) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(_iterate(dataset, encode))


@contextlib.contextmanager
def _one_reader() -> Iterator[None]:
    """Let a source that shares itself among DataLoader workers give all examples to its one reader.

    `datasets` reads a source of one shard in one worker only, so the others' part would be lost.
    """
    from torch.utils.data._utils import worker

    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info
