"""Targets from Arrow columns, a whole column as fast as a few rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from iris_hf.data.columns import Layout
from iris_hf.data.images import image_size, open_image, read_image_bytes
from iris_hf.data.targets import check_target, class_index_problem, classes_in, find_bad_box
from iris_hf.errors import DataError

_ROUNDING = 1e-6
"""How far, relative to the image, a box may leave it without being wrong: the noise of float arithmetic."""

_Ints = npt.NDArray[np.int64]


def read_targets(table: pa.Table, layout: Layout, indices: Sequence[int]) -> Any:
    """Turn the target columns of some rows into targets.

    Args:
        table: At least the layout's target columns, N rows.
        layout: Which column holds what.
        indices: The index of each row in its data set, for messages.

    Returns:
        int64 `[N]` for multiclass, int64 `[N, num_classes]` for multilabel, else a list of N targets.

    Raises:
        DataError: If a target is not in its format; the message names the example.
    """
    if layout.target_type == "multiclass":
        return _class_indices(table, layout, indices)
    if layout.target_type == "image_text":
        return _optional_class_indices(table, layout, indices)
    if layout.target_type == "multilabel":
        return _multi_hot(table, layout, indices)
    if layout.target_type == "detection":
        return _boxes(table, layout, indices)
    rows = table[layout.target].to_pylist()
    return [_masks(row, layout, f"Example {index}: ") for row, index in zip(rows, indices, strict=True)]


def read_classes(table: pa.Table, layout: Layout, indices: Sequence[int]) -> list[list[int]]:
    """The classes that occur in each row, in ascending order; masks are not decoded if a column lists their classes.

    Args:
        table: The layout's class columns, N rows.
        layout: Which column holds what.
        indices: The index of each row in its data set, for messages.

    Raises:
        DataError: If a class is missing or out of range; the message names the example. Boxes are not checked.
    """
    lengths, classes = _class_lists(table, layout, indices)
    _check_class_indices(classes, np.repeat(indices, lengths), layout)
    num_classes = int(classes.max(initial=0)) + 1
    keys = np.sort(np.repeat(np.arange(len(lengths)), lengths) * num_classes + classes)  # np.unique is 10 times slower
    rows, classes = np.divmod(keys[np.diff(keys, prepend=-1) > 0], num_classes)
    ends = np.cumsum(np.bincount(rows, minlength=len(lengths))).tolist()
    values = classes.tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _class_lists(table: pa.Table, layout: Layout, indices: Sequence[int]) -> tuple[_Ints, _Ints]:
    """How many classes are noted in each row, and all of them; a class may be noted more than once."""
    if layout.target_type == "multiclass":
        return np.ones(len(indices), dtype=np.int64), _class_indices(table, layout, indices).numpy()
    if layout.target_type == "image_text":
        column = table[layout.target]
        return _to_ints(column.is_valid().cast("int64")), _to_ints(column.drop_null())
    if layout.target_type == "multilabel" or layout.classes is not None:
        column = layout.target if layout.classes is None else layout.classes
        lengths, flat = _lists(table[column], column, indices)
        return lengths, _to_ints(flat)
    if layout.target_type == "detection" and not layout.fix_boxes:
        objects = table[layout.target].combine_chunks()
        lengths, flat = _field(objects, layout.category, layout, indices)
        if not layout.has_crowd:
            return lengths, _to_ints(flat)
        is_crowd = _to_ints(_field(objects, "iscrowd", layout, indices)[1]) == 1
        return lengths - _count_per_row(is_crowd, lengths), _to_ints(flat)[~is_crowd]
    classes = [classes_in(target, layout.target_type) for target in read_targets(table, layout, indices)]
    flattened = [index for row in classes for index in row]
    return np.array([len(row) for row in classes], dtype=np.int64), np.array(flattened, dtype=np.int64)


def _class_indices(table: pa.Table, layout: Layout, indices: Sequence[int]) -> Tensor:
    column = table[layout.target]
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(f"Example {indices[row]}: {layout.target!r} is null. Drop the example or give it a class.")
    values = _to_ints(column)
    _check_class_indices(values, indices, layout)
    return torch.from_numpy(values)


def _optional_class_indices(table: pa.Table, layout: Layout, indices: Sequence[int]) -> list[int | None]:
    if layout.target is None:
        return [None] * len(indices)
    column = table[layout.target]
    given = column.is_valid().to_numpy(zero_copy_only=False)
    _check_class_indices(_to_ints(column.drop_null()), np.asarray(indices)[given], layout)
    return column.to_pylist()  # type: ignore[no-any-return]


def _multi_hot(table: pa.Table, layout: Layout, indices: Sequence[int]) -> Tensor:
    assert layout.class_names is not None
    lengths, flat = _lists(table[layout.target], layout.target, indices)
    labels = _to_ints(flat)
    _check_class_indices(labels, np.repeat(indices, lengths), layout)
    targets = torch.zeros(len(lengths), len(layout.class_names), dtype=torch.int64)
    targets[torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)), torch.from_numpy(labels)] = 1
    return targets


def _boxes(table: pa.Table, layout: Layout, indices: Sequence[int]) -> list[Tensor]:
    assert layout.class_names is not None
    objects = table[layout.target].combine_chunks()
    lengths, categories = _field(objects, layout.category, layout, indices)
    box_counts, boxes = _field(objects, "bbox", layout, indices)
    _check_all(lengths == box_counts, indices, lambda row: (
        f"{box_counts[row]} boxes but {lengths[row]} categories. Give each box its category."))  # fmt: skip
    num_numbers, numbers = _lists(boxes, "bbox", np.repeat(indices, lengths))
    _check_all(num_numbers == 4, np.repeat(indices, lengths), lambda row: (
        f"a bbox has 4 numbers (x, y, width, height), not {num_numbers[row]}."))  # fmt: skip
    sizes = np.repeat(_image_sizes(table, layout, indices), lengths, axis=0)
    pixels = np.asarray(numbers.to_numpy(zero_copy_only=False), dtype=np.float64).reshape(-1, 4)
    corners = np.concatenate([pixels[:, :2], pixels[:, :2] + pixels[:, 2:]], axis=1) / np.tile(sizes, 2)
    relative = torch.from_numpy(corners).float()
    nearly = (relative > -_ROUNDING) & (relative < 1 + _ROUNDING)
    relative = torch.where(nearly | torch.tensor(layout.fix_boxes), relative.clamp(0, 1), relative)
    targets = torch.cat([torch.from_numpy(_to_ints(categories)).float()[:, None], relative], dim=1)
    left_out = torch.zeros(len(targets), dtype=torch.bool)
    if layout.fix_boxes:
        left_out |= (relative[:, 0] >= relative[:, 2]) | (relative[:, 1] >= relative[:, 3])
    if layout.has_crowd:
        left_out |= torch.from_numpy(_to_ints(_field(objects, "iscrowd", layout, indices)[1]) == 1)
    bad = find_bad_box(targets[~left_out], len(layout.class_names))
    if bad is not None:
        box = int((~left_out).nonzero()[bad[0]])
        ends = np.cumsum(lengths)
        row = int(np.searchsorted(ends, box, side="right"))
        raise DataError(f"Example {indices[row]}: box {box - (ends - lengths)[row]} {bad[1]}")
    kept = lengths - _count_per_row(left_out.numpy(), lengths)
    return list(torch.split(targets[~left_out], kept.tolist()))


def _field(objects: pa.Array, name: str, layout: Layout, indices: Sequence[int]) -> tuple[_Ints, pa.Array]:
    """A field of the boxes, as lengths and flat values, whether stored as struct of lists or list of structs."""
    if pa.types.is_struct(objects.type):
        return _lists(pc.struct_field(objects, name), f"{layout.target}.{name}", indices)
    lengths, items = _lists(objects, f"{layout.target}", indices)
    return lengths, pc.struct_field(items, name)


def _image_sizes(table: pa.Table, layout: Layout, indices: Sequence[int]) -> npt.NDArray[np.float64]:
    if layout.has_size:
        columns = [np.asarray(table[name].to_numpy(), dtype=np.float64) for name in ("width", "height")]
        sizes = np.stack(columns, axis=1)
    else:
        images = table[layout.image].to_pylist()
        sizes = np.array([image_size(image, f"Example {i}: ") for image, i in zip(images, indices, strict=True)])
        sizes = sizes.astype(np.float64).reshape(-1, 2)
    _check_all((sizes > 0).all(axis=1), indices, lambda row: (
        f"width and height have to be positive, not {sizes[row].tolist()}."))  # fmt: skip
    return sizes


def _masks(stored: Any, layout: Layout, where: str) -> Tensor:
    assert layout.class_names is not None
    if stored is None:
        raise DataError(f"{where}{layout.target!r} is null. Drop the example or give it a mask.")
    if layout.is_stacked:
        return _stacked_masks(stored, layout, where)
    mask = read_index_mask(stored, layout, where)
    return (mask == torch.arange(len(layout.class_names)).view(-1, 1, 1)).float()


def read_index_mask(stored: Any, layout: Layout, where: str) -> Tensor:
    """Decode an image of class indices: int32 `[height, width]`, with the layout's `ignore_index` for no class.

    Args:
        stored: What the target column holds.
        layout: Of a segmentation data set whose masks are not stacked.
        where: What an error message starts with.

    Raises:
        DataError: If it is no mask, or a pixel's class is out of range.
    """
    assert layout.class_names is not None
    mask = _decode_mask(read_image_bytes(stored, where), where)
    num_classes = len(layout.class_names)
    unknown = (mask != layout.ignore_index) & ((mask < 0) | (mask >= num_classes))
    if unknown.any():
        y, x = unknown.nonzero()[0].tolist()
        problem = class_index_problem(int(mask[y, x]), num_classes)
        raise DataError(f"{where}at x={x}, y={y} of the mask: {problem} Or give ignore_index={int(mask[y, x])}.")
    return mask


def _stacked_masks(stored: list[Any], layout: Layout, where: str) -> Tensor:
    assert layout.class_names is not None
    if len(stored) != len(layout.class_names):
        raise DataError(f"{where}{len(stored)} masks for {len(layout.class_names)} classes; give one mask per class.")
    read = [read_image_bytes(image, where) for image in stored]
    decoded = {data: _decode_mask(data, where) != 0 for data in set(read)}  # empty masks have equal bytes
    sizes = {tuple(mask.shape) for mask in decoded.values()}
    if len(sizes) > 1:
        raise DataError(f"{where}the masks have several sizes: {sorted(sizes)}.")
    masks = torch.zeros(len(read), *sizes.pop())
    filled = {data for data, mask in decoded.items() if mask.any()}
    for index, data in enumerate(read):
        if data in filled:
            masks[index] = decoded[data]
    return masks


def _decode_mask(data: bytes, where: str) -> Tensor:
    """Decode a mask to class indices, int32 `[height, width]`; a palette stands for its indices."""
    try:
        image = open_image(data)
        values = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{where}the mask cannot be decoded: {error}. Replace it or drop the example.") from error
    if values.ndim != 2:
        raise DataError(f"{where}a mask has one channel of class indices, not mode {image.mode}. Convert it first.")
    return torch.from_numpy(values.astype(np.int32))


def check_mask_size(masks: Tensor, image: PIL.Image.Image, where: str) -> None:
    """Compare the size of masks that were read with their image's.

    Raises:
        DataError: If they differ.
    """
    if masks.shape[1:] != (image.height, image.width):
        check_target(masks, "segmentation", image_size=image.size, where=where)


def _to_ints(column: Any) -> _Ints:
    values = column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
    return np.array(values, dtype=np.int64)  # a copy that can be written to


def _lists(column: Any, name: str | None, indices: Any) -> tuple[_Ints, pa.Array]:
    """Split a list column into the length of each row and all values in a row."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if array.null_count:
        row = pc.index(array.is_null(), True).as_py()
        raise DataError(f"Example {indices[row]}: {name!r} is null. Use an empty list for none.")
    flat = array.flatten()
    if flat.null_count:
        row = int(
            np.searchsorted(
                np.cumsum(_to_ints(pc.list_value_length(array))), pc.index(flat.is_null(), True).as_py(), side="right"
            )
        )
        raise DataError(f"Example {indices[row]}: {name!r} holds a null.")
    return _to_ints(pc.list_value_length(array)), flat


def _check_class_indices(values: _Ints, indices: Any, layout: Layout) -> None:
    num_classes = None if layout.class_names is None else len(layout.class_names)
    bad = values < 0 if num_classes is None else (values < 0) | (values >= num_classes)
    if bad.any():
        row = int(bad.argmax())
        raise DataError(f"Example {indices[row]}: {class_index_problem(int(values[row]), num_classes)}")


def _check_all(good: Any, indices: Any, problem: Any) -> None:
    if not good.all():
        row = int((~good).argmax())
        raise DataError(f"Example {indices[row]}: {problem(row)}")


def _count_per_row(marked: npt.NDArray[np.bool_], lengths: _Ints) -> _Ints:
    rows = np.repeat(np.arange(len(lengths)), lengths)
    return np.bincount(rows[marked], minlength=len(lengths)).astype(np.int64)
