"""Average precision of detections, with the definitions of COCO, computed by faster-coco-eval.

Lin et al., "Microsoft COCO: Common Objects in Context", arXiv 1405.0312: greedy matching by score at each
intersection-over-union (IoU) threshold, at most 100 detections per image and class, precision interpolated at 101
recalls, mean over the classes that occur.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from iris_hf.errors import ConfigError, DataError, MissingDependencyError, unknown_name
from iris_hf.metrics.arrays import to_list, to_numpy

Array = npt.NDArray[Any]
IouType = Literal["bbox", "segm"]

DEFAULT_IOU_THRESHOLDS = (0.3, 0.5, 0.75, 0.9)
COCO_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = (1, 10, 100)
AREA_RANGES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, math.inf)}  # square pixels
ALL_AREAS = (0, math.inf)

EDGE_TOLERANCE = 1e-6  # a target's pixel / size in float32 may end this far beyond the image
LARGEST_OVERHANG = 1.0  # a predicted box may reach this many image sizes beyond the image; pixels reach further

TARGET_KEYS = ("boxes", "image_size", "iscrowd", "area", "masks")
PREDICTION_KEYS = ("boxes", "area", "masks")


class DetectionResults(list[float]):
    """The mean average precision at each IoU threshold, in the order of the thresholds.

    Attributes:
        details: Every other number too, as `DetectionAveragePrecision.compute` returns them; JSON can hold it.
    """

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(details["mAP"])
        self.details = details


def evaluate_detection_average_precision(
    predictions: Iterable[Any],
    targets: Iterable[Any],
    *,
    iou_thresholds: Sequence[float] = DEFAULT_IOU_THRESHOLDS,
    iou_type: IouType = "bbox",
) -> DetectionResults:
    """Mean average precision per IoU threshold, equal to pycocotools'.

    Args:
        predictions: Per image a tensor, array or list `[m, 6]`: class, probability, x0, y0, x1, y1, relative to the
            image. Boxes may overhang the image (detectors predict such) and have no extent; they count as they are.
            Or a dict with `boxes` and any of `area`, `masks`, as below.
        targets: Per image `[n, 5]`: class, x0, y0, x1, y1 with 0 <= x0 < x1 <= 1 (1e-6 of rounding is tolerated).
            Or a dict with `boxes` and any of `image_size`, (height, width) in pixels, for all images or none, from
            which areas follow; `iscrowd` `[n]`, 1 for a region whose detections count neither way; `area` `[n]` in
            square pixels where it isn't that of the mask or box; `masks`.
            A mask is COCO run-length encoding or a list of polygons in pixels.
        iou_thresholds: Each in (0, 1].
        iou_type: What overlap is measured on: ``"bbox"`` or ``"segm"``, which needs masks and image sizes.

    Returns:
        A list of the mAPs, each in [0, 1], whose `details` are the scores of
        :class:`iris_hf.metrics.DetectionAveragePrecision`.

    Raises:
        ConfigError: If a threshold or the type of overlap is none.
        DataError: If the numbers of images differ or are zero, no image has a box to find, or a row isn't in the
            format; it names the image and the row.
        MissingDependencyError: If faster-coco-eval isn't installed.
    """
    statistics = DetectionStatistics(iou_thresholds=iou_thresholds, iou_type=iou_type)
    statistics.update(predictions, targets)
    return DetectionResults(statistics.result())


@dataclass(frozen=True, kw_only=True)
class _Boxes:
    """The predictions or the targets of one image.

    Attributes:
        rows: `[n, 6]` or `[n, 5]`, as in the contract.
        area: `[n]` in square pixels, where given.
        masks: Run-length encodings, where masks are compared.
    """

    rows: Array
    area: Array | None
    masks: list[dict[str, Any]] | None


@dataclass(frozen=True, kw_only=True)
class _Image:
    predictions: _Boxes
    targets: _Boxes
    is_crowd: Array
    size: tuple[int, int] | None  # height, width


class DetectionStatistics:
    """The rows of every image, as small arrays."""

    def __init__(self, *, iou_thresholds: Sequence[float] = DEFAULT_IOU_THRESHOLDS, iou_type: IouType = "bbox") -> None:
        if iou_type not in get_args(IouType):
            raise unknown_name("iou_type", iou_type, get_args(IouType))
        self._iou_thresholds = _check_thresholds(iou_thresholds)
        self._iou_type = iou_type
        self._images: list[_Image] = []

    def __len__(self) -> int:
        return len(self._images)

    def update(self, predictions: Iterable[Any], targets: Iterable[Any]) -> None:
        """Add images; see :func:`evaluate_detection_average_precision` for the format and errors."""
        predictions, targets = to_list(predictions, "predictions"), to_list(targets, "targets")
        if len(predictions) != len(targets):
            raise DataError(
                f"Predictions of {len(predictions)} images but targets of {len(targets)}: each image needs both, "
                "an empty list where it has none."
            )
        first = len(self._images)
        images = [self._read_image(first + i, *pair) for i, pair in enumerate(zip(predictions, targets, strict=True))]
        _check_predictions([image.predictions.rows for image in images], first)
        _check_targets([image.targets.rows for image in images], first)
        known = self._images[0].size is not None if self._images else bool(images) and images[0].size is not None
        for i, image in enumerate(images):
            if (image.size is not None) != known:
                has, others = ("no", "have one") if known else ("an", "have none")
                raise DataError(
                    f"Image {first + i} has {has} image_size but the images before it {others}: give all or none."
                )
        self._images.extend(images)

    def result(self) -> dict[str, Any]:
        """Return the scores, named in :class:`iris_hf.metrics.DetectionAveragePrecision`."""
        if not self._images:
            raise DataError("Average precision of no images is undefined: the predictions and targets are empty.")
        area_ranges = {"all": ALL_AREAS} | (AREA_RANGES if self._images[0].size is not None else {})
        thresholds = np.union1d(COCO_IOU_THRESHOLDS, self._iou_thresholds)
        targets = _flatten([image.targets for image in self._images], self._images)
        predictions = _flatten([image.predictions for image in self._images], self._images)
        is_crowd = np.concatenate([image.is_crowd for image in self._images])
        counted, num_boxes = np.unique(targets.classes[~is_crowd], return_counts=True)
        if not len(counted):
            raise DataError(
                f"None of the {len(self._images)} images has a box to find, so average precision is undefined."
            )

        sizes = [image.size or (1, 1) for image in self._images]
        headers = [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)]
        # precision [class, threshold, recall, area], recall [class, threshold, area, limit]; -1 where nothing occurs
        curves = [
            _evaluate_class(
                int(class_id), headers, targets, is_crowd, predictions, thresholds, area_ranges, self._iou_type
            )
            for class_id in counted
        ]
        precision, recall = (np.stack(arrays) for arrays in zip(*curves, strict=True))
        given = np.searchsorted(thresholds, self._iou_thresholds)
        coco = np.searchsorted(thresholds, COCO_IOU_THRESHOLDS)
        at_50, at_75 = np.searchsorted(thresholds, [0.5, 0.75])
        ap = precision[..., 0].mean(axis=2)
        result: dict[str, Any] = {
            "iou_thresholds": list(self._iou_thresholds),
            "mAP": ap[:, given].mean(axis=0).tolist(),
            "AP": float(ap[:, coco].mean()),
            "AP50": float(ap[:, at_50].mean()),
            "AP75": float(ap[:, at_75].mean()),
        }
        areas = list(area_ranges)[1:]
        result |= {f"AP_{name}": _mean(precision[:, coco, :, a]) for a, name in enumerate(areas, start=1)}
        result |= {f"AR_{limit}": _mean(recall[:, coco, 0, m]) for m, limit in enumerate(MAX_DETECTIONS)}
        result |= {f"AR_{name}": _mean(recall[:, coco, a, -1]) for a, name in enumerate(areas, start=1)}
        result["per_class"] = [
            {
                "class": int(class_id),
                "num_boxes": int(number),
                "mAP": row[given].tolist(),
                "AP": float(row[coco].mean()),
                "AP50": float(row[at_50]),
                "AP75": float(row[at_75]),
            }
            for class_id, number, row in zip(counted, num_boxes, ap, strict=True)
        ]
        seen = np.union1d(targets.classes, predictions.classes)
        result["classes_without_ground_truth"] = np.setdiff1d(seen, counted).tolist()
        result["num_images"] = len(self._images)
        return result

    def _read_image(self, number: int, prediction: Any, target: Any) -> _Image:
        where = f"Image {number}"
        predicted = _as_mapping(prediction, PREDICTION_KEYS, f"{where}, predictions")
        given = _as_mapping(target, TARGET_KEYS, f"{where}, targets")
        rows = _to_rows(predicted["boxes"], 6, f"{where}: predictions")
        boxes = _to_rows(given["boxes"], 5, f"{where}: targets")
        size = None if given.get("image_size") is None else _read_size(given["image_size"], where)
        crowd = np.zeros(len(boxes))
        if given.get("iscrowd") is not None:
            crowd = _read_column(given["iscrowd"], len(boxes), f"{where}: iscrowd")
        if not bool(np.isin(crowd, (0, 1)).all()):
            raise DataError(f"{where}: iscrowd must be 0 or 1, got {crowd.tolist()}.")
        if self._iou_type == "segm" and size is None:
            raise DataError(f"{where}: masks are compared in pixels, so targets need image_size (height, width).")
        where_rows, where_boxes = f"{where}, predictions", f"{where}, targets"
        return _Image(
            predictions=_Boxes(
                rows=rows,
                area=_read_area(predicted, len(rows), size, where_rows),
                masks=self._read_masks(predicted, len(rows), size, where_rows),
            ),
            targets=_Boxes(
                rows=boxes,
                area=_read_area(given, len(boxes), size, where_boxes),
                masks=self._read_masks(given, len(boxes), size, where_boxes),
            ),
            is_crowd=crowd.astype(bool),
            size=size,
        )

    def _read_masks(
        self, mapping: Mapping[str, Any], number: int, size: tuple[int, int] | None, where: str
    ) -> list[dict[str, Any]] | None:
        if self._iou_type != "segm" or size is None:
            return None
        masks = mapping.get("masks", () if number == 0 else None)
        if masks is None or len(masks) != number:
            raise DataError(f"{where}: {number} rows need as many masks, got {None if masks is None else len(masks)}.")
        return [_to_rle(mask, size, f"{where}, mask {i}") for i, mask in enumerate(masks)]


def _check_thresholds(iou_thresholds: Sequence[float]) -> tuple[float, ...]:
    try:
        thresholds = tuple(float(t) for t in iou_thresholds)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"iou_thresholds must be a list of numbers, got {iou_thresholds!r}.") from error
    for threshold in thresholds:
        if not 0 < threshold <= 1:
            raise ConfigError(f"iou_thresholds must lie in (0, 1], got {threshold}.")
    return thresholds


def _as_mapping(value: Any, known: tuple[str, ...], where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        return {"boxes": value}
    unknown = [key for key in value if key not in known]
    if unknown or "boxes" not in value:
        raise DataError(f"{where}: a dict needs boxes and may have {', '.join(known[1:])}, got {sorted(value)}.")
    return value


def _to_rows(value: Any, num_columns: int, where: str) -> Array:
    rows = to_numpy(value, where)
    if rows.ndim > 0 and len(rows) == 0:
        return np.empty((0, num_columns))
    if rows.ndim != 2 or rows.shape[1] != num_columns:
        columns = "class, probability, x0, y0, x1, y1" if num_columns == 6 else "class, x0, y0, x1, y1"
        raise DataError(f"{where} must be rows of {num_columns} ({columns}), got shape {list(rows.shape)}.")
    return rows


def _read_column(value: Any, number: int, where: str) -> Array:
    column = to_numpy(value, where)
    if column.shape != (number,):
        raise DataError(f"{where} must have one value for each of the {number} boxes, got shape {list(column.shape)}.")
    return column


def _read_area(mapping: Mapping[str, Any], number: int, size: tuple[int, int] | None, where: str) -> Array | None:
    if mapping.get("area") is None:
        return None
    if size is None:
        raise DataError(f"{where}: area is in square pixels, so the targets need image_size (height, width) too.")
    area = _read_column(mapping["area"], number, f"{where}: area")
    if not bool(np.all(area >= 0)):
        raise DataError(f"{where}: areas must be at least 0, got {area.tolist()}.")
    return area


def _read_size(value: Any, where: str) -> tuple[int, int]:
    size = to_numpy(value, f"{where}: image_size")
    if size.shape != (2,) or not bool(np.all((size >= 1) & (size == np.floor(size)))):
        raise DataError(f"{where}: image_size must be (height, width) in whole pixels, got {size.tolist()}.")
    return int(size[0]), int(size[1])


def _check_predictions(images: list[Array], first: int) -> None:
    table = _stack(images, 6)
    boxes = table[:, 2:]
    x0, y0, x1, y1 = boxes.T
    score = table[:, 1]
    _require(np.isfinite(table).all(axis=1), images, first, "prediction", "every value must be finite")
    _require(_is_class(table[:, 0]), images, first, "prediction", "the class must be 0, 1, 2, …")
    _require((score >= 0) & (score <= 1), images, first, "prediction", "the probability must be in [0, 1]")
    _require((x0 <= x1) & (y0 <= y1), images, first, "prediction", "a box needs x0 <= x1 and y0 <= y1")
    touches = (x0 <= 1) & (y0 <= 1) & (x1 >= 0) & (y1 >= 0)
    near = ((boxes >= -LARGEST_OVERHANG) & (boxes <= 1 + LARGEST_OVERHANG)).all(axis=1)
    rule = "the box lies outside the image; coordinates are relative to its size (are these pixels?)"
    _require(touches & near, images, first, "prediction", rule)


def _check_targets(images: list[Array], first: int) -> None:
    table = _stack(images, 5)
    boxes = table[:, 1:]
    x0, y0, x1, y1 = boxes.T
    _require(np.isfinite(table).all(axis=1), images, first, "target", "every value must be finite")
    _require(_is_class(table[:, 0]), images, first, "target", "the class must be 0, 1, 2, …")
    _require((x0 < x1) & (y0 < y1), images, first, "target", "a box needs x0 < x1 and y0 < y1")
    inside = ((boxes >= -EDGE_TOLERANCE) & (boxes <= 1 + EDGE_TOLERANCE)).all(axis=1)
    rule = "the box reaches outside the image; coordinates are relative to its size, in [0, 1] (are these pixels?)"
    _require(inside, images, first, "target", rule)


def _stack(images: list[Array], num_columns: int) -> Array:
    return np.concatenate([np.empty((0, num_columns)), *images])


def _is_class(values: Array) -> Array:
    result: Array = (values >= 0) & (values == np.floor(values))
    return result


def _require(good: Array | np.bool_, images: list[Array], first: int, what: str, rule: str) -> None:
    """Raise for the first row of the stacked images that is not good."""
    if good.all():
        return
    ends = np.cumsum([len(rows) for rows in images])
    bad = int(np.argmin(good))
    image = int(np.searchsorted(ends, bad, side="right"))
    row = bad - int(ends[image]) + len(images[image])
    raise DataError(f"Image {first + image}, {what} {row}: {rule}, got {images[image][row].tolist()}.")


def _to_rle(mask: Any, size: tuple[int, int], where: str) -> dict[str, Any]:
    library = _import_faster_coco_eval()
    is_encoding = isinstance(mask, Mapping) and {"size", "counts"} <= set(mask)
    if not is_encoding and not (isinstance(mask, list | tuple) and len(mask) > 0):
        raise DataError(
            f"{where}: it is no COCO run-length encoding {{size, counts}} or list of polygons, got {mask!r}."
        )
    if is_encoding and tuple(mask["size"]) != size:
        raise DataError(f"{where}: its size {mask['size']} must be the image's (height, width) {list(size)}.")
    height, width = size
    try:
        rle: dict[str, Any] = library.mask.segmToRle(mask if is_encoding else list(mask), width, height)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: it is no COCO run-length encoding or list of polygons: {error}.") from error
    return rle


def _import_faster_coco_eval() -> Any:
    try:
        import faster_coco_eval
    except ImportError as error:
        raise MissingDependencyError(
            'Detection average precision needs faster-coco-eval: pip install "iris-hf[detection]".'
        ) from error
    return faster_coco_eval


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The rows of all images, in order; boxes as x, y, width, height in pixels (or image sizes where none is given)."""

    images: Array  # [R], which image
    classes: Array  # [R]
    scores: Array  # [R]
    boxes: Array  # [R, 4]
    areas: Array  # [R]
    masks: list[dict[str, Any]] | None


def _flatten(parts: list[_Boxes], images: list[_Image]) -> _Table:
    numbers = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    table = np.concatenate([part.rows for part in parts]).astype(np.float64)
    height, width = np.array([image.size or (1, 1) for image in images]).T[:, numbers]
    corners = table[:, -4:] * np.stack([width, height, width, height], axis=1)
    extents = corners[:, 2:] - corners[:, :2]
    areas = extents.prod(axis=1)
    ends = np.cumsum([len(part.rows) for part in parts])
    for part, end in zip(parts, ends, strict=True):
        if part.area is not None:
            areas[end - len(part.rows) : end] = part.area
        elif part.masks:
            areas[end - len(part.rows) : end] = _import_faster_coco_eval().mask.area(part.masks)
    return _Table(
        images=numbers,
        classes=table[:, 0].astype(np.int64),
        scores=table[:, 1],
        boxes=np.concatenate([corners[:, :2], extents], axis=1),
        areas=areas,
        masks=None if parts[0].masks is None else [mask for part in parts for mask in part.masks or ()],
    )


def _evaluate_class(
    class_id: int,
    headers: list[dict[str, int]],
    targets: _Table,
    is_crowd: Array,
    predictions: _Table,
    thresholds: Array,
    area_ranges: Mapping[str, tuple[float, float]],
    iou_type: IouType,
) -> tuple[Array, Array]:
    """Match one class, so that memory and time don't grow with images times classes.

    Returns:
        Precision `[T, 101, A]` at the most detections, and recall `[T, A, M]`; -1 is undefined.
    """
    library = _import_faster_coco_eval()
    true, found = (np.flatnonzero(table.classes == class_id) for table in (targets, predictions))
    numbers = np.union1d(targets.images[true], predictions.images[found])
    header = {"images": [headers[number] for number in numbers], "categories": [{"id": 1}]}
    truth = _annotations(targets, true, "iscrowd", is_crowd[true].astype(int))
    detections = _annotations(predictions, found, "score", predictions.scores[found])
    evaluation = library.COCOeval_faster(
        library.COCO(header | {"annotations": truth}),
        library.COCO(header | {"annotations": detections}),
        iouType=iou_type,
    )
    evaluation.params.iouThrs = thresholds
    evaluation.params.maxDets = list(MAX_DETECTIONS)
    evaluation.params.areaRng = [list(area) for area in area_ranges.values()]
    evaluation.params.areaRngLbl = list(area_ranges)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0, :, -1], evaluation.eval["recall"][:, 0]


def _annotations(table: _Table, chosen: Array, key: str, values: Array) -> list[dict[str, Any]]:
    columns = [column[chosen].tolist() for column in (table.images, table.boxes, table.areas)]
    annotations = [
        {"id": number, "image_id": image, "category_id": 1, "bbox": box, "area": area, key: value}
        for number, (image, box, area, value) in enumerate(zip(*columns, values.tolist(), strict=True), start=1)
    ]  # ids from 1 on: the library takes 0 for "unmatched"
    if table.masks is not None:
        for annotation, row in zip(annotations, chosen, strict=True):
            annotation["segmentation"] = table.masks[row]
    return annotations


def _mean(values: Array) -> float | None:
    """Mean over what is defined; none if nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
