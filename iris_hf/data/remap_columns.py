"""The target columns of a Hugging Face data set, renumbered to some of its classes.

The columns are written anew rather than a mapping being applied when they are read: so the Hugging Face data set itself
is right, wherever it is saved, pushed or handed to another library. They cost little beside the images, which stay
where they are, in the same file or memory, in the same order. Rows that the data set does not show become empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc

from iris_hf.data.columns import IGNORE_INDEX
from iris_hf.data.convert import encode_mask, mask_columns, own_folder, write_rows
from iris_hf.data.hf_dataset import HFDataset
from iris_hf.data.hf_targets import read_index_mask
from iris_hf.errors import DataError


def remap_columns(dataset: HFDataset, class_ids: Sequence[int], class_names: Sequence[str]) -> HFDataset:
    """Renumber the targets to some classes, and drop the others from them.

    Args:
        dataset: Each of its examples holds one of the classes.
        class_ids: The class that becomes 0, the one that becomes 1, ...; in ascending order.
        class_names: Their names, which the label features get too.
    """
    layout, source = dataset.layout, dataset.hf_dataset
    assert layout.target is not None
    changes: dict[str, Any] = {"class_names": tuple(class_names)}
    label = datasets.ClassLabel(names=list(class_names))
    if layout.target_type == "segmentation":
        stacked = layout.is_stacked or len(class_ids) > IGNORE_INDEX
        changes |= {"classes": layout.classes or "classes", "is_stacked": stacked, "ignore_index": IGNORE_INDEX}
        features = {layout.target: _images(stacked), changes["classes"]: datasets.List(label)}
        rows = _mask_rows(dataset, class_ids, stacked)
        columns = write_rows(rows, datasets.Features(features), own_folder(None)).data
    else:
        features = {layout.target: _relabelled(source.features[layout.target], layout.category, label)}
        rewrite = _REWRITERS[layout.target_type](class_ids, layout.category)
        chunks = [rewrite(chunk) for chunk in source.data.table[layout.target].chunks]
        table = pa.table({layout.target: pa.chunked_array(chunks)})
        columns = datasets.table.InMemoryTable(table.cast(datasets.Features(features).arrow_schema))
    new = datasets.fingerprint.Hasher.hash([source._fingerprint, list(class_ids), list(class_names), layout])
    return HFDataset(_with_columns(source, columns, features, new), dataclasses.replace(layout, **changes))


def _with_columns(
    source: datasets.Dataset, columns: datasets.table.Table, features: dict[str, Any], fingerprint: str
) -> datasets.Dataset:
    """Put columns in the place of those of the same names; no row is copied.

    `Dataset.add_column` would copy the images of a data set that is shuffled or filtered.
    """
    kept = [name for name in source.column_names if name not in features]
    order = list(dict.fromkeys([*source.column_names, *features]))
    info = source.info.copy()
    info.features = datasets.Features({name: (source.features | features)[name] for name in order})
    table = datasets.table.concat_tables([source.data.select(kept), columns], axis=1).select(order)
    return datasets.Dataset(
        table.replace_schema_metadata(None),
        info=info,
        split=source.split,
        indices_table=source._indices,
        fingerprint=fingerprint,
    )


def _relabelled(feature: Any, category: str, label: datasets.ClassLabel) -> Any:
    """The feature of a target column, with another label in the place of its label."""
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return datasets.List(_relabelled(feature.feature, category, label))
    if isinstance(feature, dict):
        return feature | {category: _relabelled(feature[category], category, label)}
    return label


def _images(stacked: bool) -> Any:
    return datasets.List(datasets.Image()) if stacked else datasets.Image()


def _mask_rows(dataset: HFDataset, class_ids: Sequence[int], stacked: bool) -> Iterator[dict[str, Any]]:
    """A row for each row behind the data set, empty where it does not show one."""
    layout = dataset.layout
    target, classes = str(layout.target), layout.classes or "classes"
    columns = [target] if layout.classes is None else [target, classes]
    stored = dataset.hf_dataset.with_format("arrow").select_columns(columns)
    order = dataset.hf_dataset._indices
    behind = np.arange(len(dataset)) if order is None else order.column(0).to_numpy()
    position_of = dict(zip(*(values.tolist() for values in np.unique(behind, return_index=True)), strict=True))
    for row in range(dataset.hf_dataset.data.num_rows):
        if row not in position_of:
            yield {target: None, classes: None}
            continue
        position = position_of[row]
        where = f"Example {position}: "
        if layout.is_stacked and layout.classes is not None:
            values = stored[position].to_pylist()[0]
            new = _pick_masks(values[target], values[classes], dataset.num_classes, class_ids, where)
        elif not stacked:
            mask = read_index_mask(stored[position].to_pylist()[0][target], layout, where)
            new = _renumber_mask(mask.numpy(), dataset.num_classes, class_ids)
        else:
            new = mask_columns(dataset.get_targets(position)[list(class_ids)], stacked, where)
        yield {target: new["annotation"], classes: new["classes"]}


def _pick_masks(
    masks: list[Any] | None, classes: list[int], num_classes: int, class_ids: Sequence[int], where: str
) -> dict[str, Any]:
    """The columns of stacked masks, which need not be decoded."""
    if masks is None or len(masks) != num_classes:
        raise DataError(f"{where}{len(masks or ())} masks for {num_classes} classes; give one mask per class.")
    occurring = [position for position, index in enumerate(class_ids) if index in classes]
    return {"annotation": [masks[index] for index in class_ids], "classes": occurring}


def _renumber_mask(mask: npt.NDArray[np.int32], num_classes: int, class_ids: Sequence[int]) -> dict[str, Any]:
    """The columns of an index mask; pixels of other classes become those of none."""
    new_index = np.full(num_classes + 1, IGNORE_INDEX, dtype=np.uint8)  # the last one stands for no class
    new_index[list(class_ids)] = range(len(class_ids))
    is_class = (mask >= 0) & (mask < num_classes)
    new = new_index[np.where(is_class, mask, num_classes)]
    occurring = np.flatnonzero(np.bincount(new.ravel(), minlength=len(class_ids))[: len(class_ids)]).tolist()
    return {"annotation": encode_mask(PIL.Image.fromarray(new)), "classes": occurring}


_Rewrite = Callable[[pa.Array], pa.Array]


def _rewrite_labels(class_ids: Sequence[int], _category: str) -> _Rewrite:
    return lambda labels: _renumber(labels, class_ids)


def _rewrite_label_lists(class_ids: Sequence[int], _category: str) -> _Rewrite:
    def rewrite(lists: pa.Array) -> pa.Array:
        new = _renumber(lists.flatten(), class_ids)
        return _filter_lists(_lengths(lists), new, new.is_valid())

    return rewrite


def _rewrite_objects(class_ids: Sequence[int], category: str) -> _Rewrite:
    def rewrite_lists(objects: pa.Array) -> pa.Array:
        """A struct of lists: each field has an item for each box."""
        fields = {field.name: pc.struct_field(objects, field.name) for field in objects.type}
        lengths = _lengths(fields[category])
        new = _renumber(fields[category].flatten(), class_ids)
        filtered = []
        for name, field in fields.items():
            if not _is_list(field.type):
                filtered.append(field)
                continue
            if not np.array_equal(_lengths(field), lengths):
                row = int((_lengths(field) != lengths).argmax())
                raise DataError(
                    f"{_lengths(field)[row]} values of {name!r} for {lengths[row]} boxes of {category!r}. "
                    "Each box needs one."
                )
            filtered.append(_filter_lists(lengths, new if name == category else field.flatten(), new.is_valid()))
        return pa.StructArray.from_arrays(filtered, names=list(fields))

    def rewrite_structs(objects: pa.Array) -> pa.Array:
        """A list of structs: an item for each box."""
        boxes = objects.flatten()
        fields = {field.name: pc.struct_field(boxes, field.name) for field in boxes.type}
        fields[category] = new = _renumber(fields[category], class_ids)
        boxes = pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
        return _filter_lists(_lengths(objects), boxes, new.is_valid())

    return lambda objects: (rewrite_lists if pa.types.is_struct(objects.type) else rewrite_structs)(objects)


_REWRITERS: dict[str, Callable[[Sequence[int], str], _Rewrite]] = {
    "multiclass": _rewrite_labels,
    "image_text": _rewrite_labels,
    "multilabel": _rewrite_label_lists,
    "detection": _rewrite_objects,
}


def _renumber(labels: pa.Array, class_ids: Sequence[int]) -> pa.Array:
    """The position of each label in `class_ids`, null where it is not there."""
    return pc.index_in(labels, value_set=pa.array(class_ids, type=labels.type)).cast("int64")


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _lengths(lists: pa.Array) -> npt.NDArray[np.int64]:
    lengths = pc.list_value_length(lists).fill_null(0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False), dtype=np.int64)


def _filter_lists(lengths: npt.NDArray[np.int64], items: pa.Array, keep: pa.Array) -> pa.Array:
    """Lists of the items that are kept."""
    rows = np.repeat(np.arange(len(lengths)), lengths)[keep.to_numpy(zero_copy_only=False)]
    ends = np.cumsum(np.bincount(rows, minlength=len(lengths)))
    return pa.ListArray.from_arrays(pa.array([0, *ends.tolist()], type=pa.int32()), items.filter(keep))
