"""COCO annotation files as Hugging Face data sets, and back.

A detection data set holds each annotation whole: besides the columns of :mod:`iris_hf.data.columns`, `objects` has
`iscrowd` and `segmentation` (the JSON of its polygons or run lengths, or null). :func:`iris_hf.data.from_hf` leaves
crowd regions out of the boxes, since a crowd is not one object.
"""

from __future__ import annotations

import json as json_module
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch
from torch import Tensor

from iris_hf.data.columns import features_for
from iris_hf.data.convert import OverlappingMasksError, mask_columns, own_folder, write_rows
from iris_hf.data.hf_dataset import HFDataset, from_hf
from iris_hf.data.images import image_format, image_size, read_image_bytes
from iris_hf.errors import ConfigError, DataError, MissingDependencyError

_Json = dict[str, Any]


def load_coco(
    json: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    target_type: Literal["detection", "segmentation"] = "detection",
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset:
    """Load a COCO instances file as a Hugging Face data set that :func:`iris_hf.data.from_hf` understands.

    Images are stored by reference: only an example that is read opens its file. Images without annotations are kept.
    Classes are in the order of the category ids, without gaps.

    Args:
        json: The annotation file.
        images: The folder that its `file_name` entries refer to.
        target_type: ``"detection"`` gives boxes. ``"segmentation"`` gives the masks of each class, with all of its
            instances and crowds together; polygons and run lengths are drawn now, image by image.
        cache_dir: Folder for the Arrow file, which then stays there; by default it goes with this process.

    Raises:
        DataError: If the file is no COCO instances file, or an annotation refers to no image or category.
        MissingDependencyError: If masks are wanted and `faster-coco-eval` is missing.
    """
    if target_type not in ("detection", "segmentation"):
        raise ConfigError(f"A COCO file has targets for 'detection' or 'segmentation', not {target_type!r}.")
    content = _read(Path(json))
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    annotations = _by_image(content, {category["id"] for category in categories}, Path(json))
    class_of = {category["id"]: index for index, category in enumerate(categories)}
    folder = own_folder(cache_dir)

    def rows(columns: Callable[[_Json, list[_Json]], _Json]) -> Iterator[_Json]:
        for image in content["images"]:
            path = os.path.abspath(os.path.join(images, image["file_name"]))
            yield {"image": {"bytes": None, "path": path}} | columns(image, annotations[image["id"]])

    if target_type == "detection":
        features = features_for("detection", names)
        features["objects"] |= {
            "iscrowd": datasets.List(datasets.Value("int64")),
            "segmentation": datasets.List(datasets.Value("string")),
        }
        return write_rows(rows(lambda image, boxes: _object_columns(image, boxes, class_of)), features, folder)

    def mask_rows(stacked: bool) -> Iterator[_Json]:
        def columns(image: _Json, regions: list[_Json]) -> _Json:
            return mask_columns(_draw(image, regions, class_of), stacked, f"Image {image['file_name']!r}: ")

        return rows(columns)

    try:
        return write_rows(mask_rows(stacked=False), features_for("segmentation", names), folder)
    except OverlappingMasksError:
        return write_rows(mask_rows(stacked=True), features_for("segmentation", names, stacked=True), folder)


def save_coco(
    dataset: datasets.Dataset | HFDataset, json: str | os.PathLike[str], images_folder: str | os.PathLike[str]
) -> None:
    """Write a detection or segmentation data set as a COCO instances file and a folder of images.

    Images are written as they are stored, not encoded anew, under their stored file names where these are unique,
    else under numbers. Categories are numbered from 1. A detection data set from :func:`load_coco` keeps the ids of
    its images and annotations, its crowds and its polygons; the masks of a segmentation data set become one
    annotation with run lengths for each class.

    Args:
        dataset: What :func:`iris_hf.data.to_hf`, :func:`load_coco` or :func:`iris_hf.data.from_hf` gave.
        json: The annotation file to write; its folder is made.
        images_folder: The folder for the images; it is made.

    Raises:
        ConfigError: If the data set is not for detection or segmentation.
        DataError: If an image cannot be read.
        MissingDependencyError: If there are masks and `faster-coco-eval` is missing.
    """
    source = dataset if isinstance(dataset, HFDataset) else from_hf(dataset)
    if not isinstance(source, HFDataset) or source.target_type not in ("detection", "segmentation"):
        raise ConfigError(f"A COCO file holds detection or segmentation data, not {source.target_type}.")
    rows = source.hf_dataset.with_format("arrow")
    names = _file_names(source, rows)
    image_ids = _unique_or_numbers(source, "image_id")
    keeps_ids = _has_unique_object_ids(source)
    Path(images_folder).mkdir(parents=True, exist_ok=True)
    content: _Json = {
        "images": [],
        "annotations": [],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(source.class_names)],
    }
    for index, image_id in enumerate(image_ids):
        row = rows[index].to_pylist()[0]
        data = read_image_bytes(row[source.layout.image], f"Example {index}: ")
        width, height = image_size(data, f"Example {index}: ")
        name = names[index] or f"{image_id:012d}.{image_format(data, f'Example {index}: ').lower()}"
        (Path(images_folder) / name).write_bytes(data)
        content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        found = _regions(source, index) if source.target_type == "segmentation" else _objects(source, index, row)
        for annotation in found:
            number = len(content["annotations"]) + 1
            ids = {"id": annotation["id"] if keeps_ids else number, "image_id": image_id}
            content["annotations"].append(annotation | ids)
    Path(json).parent.mkdir(parents=True, exist_ok=True)
    Path(json).write_text(json_module.dumps(content))


def _read(path: Path) -> _Json:
    try:
        content = json_module.loads(path.read_text())
    except OSError as error:
        raise DataError(f"Cannot read the COCO file {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{str(path)!r} is no JSON: {error}.") from error
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing or not isinstance(content, dict):
        raise DataError(f"{str(path)!r} is no COCO instances file: it has no {', '.join(missing)}.")
    return content


def _by_image(content: _Json, category_ids: set[int], path: Path) -> dict[int, list[_Json]]:
    image_ids = {image["id"] for image in content["images"]}
    annotations: dict[int, list[_Json]] = defaultdict(list)
    for annotation in content["annotations"]:
        where = f"{str(path)!r}: annotation {annotation.get('id')}"
        if annotation.get("image_id") not in image_ids:
            raise DataError(f"{where} belongs to image {annotation.get('image_id')}, which is not in the file.")
        if annotation.get("category_id") not in category_ids:
            raise DataError(f"{where} has category {annotation.get('category_id')}, which is not in the file.")
        if "bbox" not in annotation:
            raise DataError(f"{where} has no bbox.")
        annotations[annotation["image_id"]].append(annotation)
    return annotations


def _object_columns(image: _Json, annotations: list[_Json], class_of: dict[int, int]) -> _Json:
    objects = {
        "id": [annotation["id"] for annotation in annotations],
        "area": [annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3]) for annotation in annotations],
        "bbox": [annotation["bbox"] for annotation in annotations],
        "category": [class_of[annotation["category_id"]] for annotation in annotations],
        "iscrowd": [annotation.get("iscrowd", 0) for annotation in annotations],
        "segmentation": [
            json_module.dumps(annotation["segmentation"]) if "segmentation" in annotation else None
            for annotation in annotations
        ],
    }
    return {"image_id": image["id"], "width": image["width"], "height": image["height"], "objects": objects}


def _draw(image: _Json, annotations: list[_Json], class_of: dict[int, int]) -> Tensor:
    """Draw the regions of an image: bool `[num_classes, height, width]`."""
    masks = np.zeros((len(class_of), image["height"], image["width"]), dtype=np.bool_)
    for annotation in annotations:
        region = annotation.get("segmentation")
        if not region:
            raise DataError(f"Image {image['file_name']!r}: annotation {annotation['id']} has no segmentation.")
        masks[class_of[annotation["category_id"]]] |= _draw_region(region, image["height"], image["width"])
    return torch.from_numpy(masks)


def _draw_region(region: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    library = _import_masks()
    if isinstance(region, list):
        encoded = library.merge(library.frPyObjects(region, height, width))
    elif isinstance(region["counts"], list):
        encoded = library.frPyObjects(region, height, width)
    else:
        encoded = region
    return np.asarray(library.decode(encoded), dtype=np.bool_)


def _regions(source: HFDataset, index: int) -> Iterator[_Json]:
    """The masks of a segmentation example as annotations, one for each class that occurs."""
    library = _import_masks()
    for category, mask in enumerate(source.get_targets(index)):
        if mask.any():
            encoded = library.encode(np.asfortranarray(mask.byte().numpy()))
            yield {
                "category_id": category + 1,
                "bbox": np.asarray(library.toBbox(encoded)).ravel().tolist(),
                "area": float(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
            }


def _objects(source: HFDataset, index: int, row: _Json) -> Iterator[_Json]:
    """The boxes of a detection example as annotations, as they are stored."""
    assert source.layout.target is not None
    source.get_targets(index)  # checks them
    for one in _as_list(row[source.layout.target]):
        x, y, width, height = one["bbox"]
        annotation = {
            "category_id": one[source.layout.category] + 1,
            "bbox": [x, y, width, height],
            "area": one.get("area", width * height),
            "iscrowd": one.get("iscrowd", 0),
        }
        if one.get("segmentation") is not None:
            annotation["segmentation"] = json_module.loads(one["segmentation"])
        yield annotation | ({"id": one["id"]} if "id" in one else {})


def _as_list(objects: Any) -> list[_Json]:
    """Objects one by one, whether stored as a struct of lists or as a list of structs."""
    if isinstance(objects, list):
        return objects
    return [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]


def _has_unique_object_ids(source: HFDataset) -> bool:
    if source.target_type != "detection":
        return False
    column = source.hf_dataset.with_format("arrow").select_columns([source.layout.target])[:][0].to_pylist()
    ids = [one.get("id") for objects in column for one in _as_list(objects)]
    return None not in ids and len(set(ids)) == len(ids)


def _unique_or_numbers(source: HFDataset, column: str) -> Sequence[int]:
    if column in source.hf_dataset.column_names:
        values: list[int] = source.hf_dataset.with_format(None).select_columns([column])[:][column]
        if len(set(values)) == len(values) and all(isinstance(value, int) for value in values):
            return values
    return range(1, len(source) + 1)


def _file_names(source: HFDataset, rows: datasets.Dataset) -> list[str | None]:
    """The stored file name of each image; None for all unless each has its own."""
    images = rows.select_columns([source.layout.image])[:][0]
    paths = [path for chunk in images.chunks for path in pc.struct_field(chunk, "path").to_pylist()]
    names = [os.path.basename(path) if path else None for path in paths]
    return names if None not in names and len(set(names)) == len(names) else [None] * len(names)


def _import_masks() -> Any:
    try:
        import faster_coco_eval
    except ImportError as error:
        raise MissingDependencyError(
            'COCO masks need faster-coco-eval. Install it: pip install "iris-hf[detection]".'
        ) from error
    return faster_coco_eval.mask
