"""How the five target types lie in the columns of a Hugging Face data set.

| target type | columns |
|---|---|
| multiclass | `image: Image()`, `label: ClassLabel(names)` |
| multilabel | `image`, `labels: List(ClassLabel(names))` |
| detection | `image_id`, `image`, `width`, `height`, `objects: {id, area, bbox, category}` |
| segmentation | `image`, `annotation: Image()` of class indices, `classes: List(ClassLabel(names))` |
| segmentation, overlapping | `image`, `annotation: List(Image())`, one 1-bit mask per class, `classes` as above |
| image_text | `image`, `caption` (a string, or a list of strings), and, where there are labels, `label` |

`bbox` is COCO's x, y, width, height in pixels; where `objects` has a field `iscrowd`, a crowd is no target. In an index
mask, 255 is no class. `classes` lists the classes that have at least one pixel; it carries the class names, which an
image column cannot, and lets sampling do without masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from iris_hf.errors import ConfigError, require_names, unknown_name
from iris_hf.types import TARGET_TYPES, TargetType

IGNORE_INDEX = 255
"""The pixel value of an index mask that belongs to no class."""

_IMAGES = ("image", "img", "images", "pixel_values")
_LABELS = ("label", "labels")
_MASKS = (
    "annotation", "annotations", "label", "labels", "mask", "masks",
    "segmentation", "semantic_seg", "semantic_segmentation",
)  # fmt: skip
_CAPTIONS = ("caption", "captions", "text", "sentence", "sentences")
_OBJECTS = ("objects", "object", "annotations")
_CATEGORIES = ("category", "categories", "label", "labels", "category_id")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which column holds what, and how to read it.

    Attributes:
        target_type: What the targets mean.
        class_names: Name of each class; None when an image-text data set has no classes.
        image: The column of images.
        target: The column of targets; None when an image-text data set has no labels.
        caption: The column of captions, for image_text.
        category: The field of `target` with the class of each box, for detection.
        has_crowd: Whether `target` has a field `iscrowd`, for detection; boxes of crowds are left out.
        has_size: Whether there are `width` and `height` columns, for detection.
        classes: The column with the classes that occur, for segmentation.
        is_stacked: Whether a mask is a list of images, one per class, rather than one image of class indices.
        ignore_index: The pixel value that belongs to no class.
        fix_boxes: Whether boxes are clipped to the image, and dropped when nothing is left of them.
    """

    target_type: TargetType
    class_names: tuple[str, ...] | None
    image: str
    target: str | None = None
    caption: str | None = None
    category: str = "category"
    has_crowd: bool = False
    has_size: bool = True
    classes: str | None = None
    is_stacked: bool = False
    ignore_index: int = IGNORE_INDEX
    fix_boxes: bool = False

    @property
    def target_columns(self) -> list[str]:
        """The columns that are needed for a target."""
        columns = [] if self.target is None else [self.target]
        if self.target_type == "detection":
            columns += ["width", "height"] if self.has_size else [self.image]
        return columns

    @property
    def class_columns(self) -> list[str]:
        """The columns that tell which classes occur: no image, and no mask where `classes` lists them."""
        if self.classes is not None:
            return [self.classes]
        needs_boxes = self.target_type == "detection" and self.fix_boxes
        return self.target_columns if needs_boxes or self.target is None else [self.target]

    @property
    def columns(self) -> list[str]:
        """The columns that are needed for an example."""
        extra = [] if self.caption is None else [self.caption]
        return list(dict.fromkeys([self.image, *self.target_columns, *extra]))


def features_for(
    target_type: TargetType, class_names: Sequence[str] | None, *, stacked: bool = False, many_captions: bool = False
) -> datasets.Features:
    """Give the features of a data set that :func:`iris_hf.data.to_hf` writes.

    Args:
        target_type: What the targets mean.
        class_names: Name of each class; None for image-text pairs without labels.
        stacked: Whether masks overlap and are stored one by one.
        many_captions: Whether an image has a list of captions.
    """
    from datasets import ClassLabel, Features, Image, List, Value

    label = None if class_names is None else ClassLabel(names=list(class_names))
    if target_type == "multiclass":
        return Features({"image": Image(), "label": label})
    if target_type == "multilabel":
        return Features({"image": Image(), "labels": List(label)})
    if target_type == "detection":
        box = List(Value("float64"), length=4)
        objects = {
            "id": List(Value("int64")),
            "area": List(Value("float64")),
            "bbox": List(box),
            "category": List(label),
        }
        size = {"width": Value("int64"), "height": Value("int64")}
        return Features({"image_id": Value("int64"), "image": Image(), **size, "objects": objects})
    if target_type == "segmentation":
        return Features({"image": Image(), "annotation": List(Image()) if stacked else Image(), "classes": List(label)})
    if target_type == "image_text":
        caption = List(Value("string")) if many_captions else Value("string")
        return Features({"image": Image(), "caption": caption} | ({} if label is None else {"label": label}))
    raise unknown_name("target_type", target_type, TARGET_TYPES)


def find_layout(
    features: datasets.Features,
    *,
    target_type: TargetType | None,
    class_names: Sequence[str] | None,
    ignore_index: int = IGNORE_INDEX,
    fix_boxes: bool = False,
) -> Layout:
    """Find the columns of a data set, by name and feature.

    Args:
        features: The features of the data set.
        target_type: What the targets mean; None looks for the columns of each type.
        class_names: Names that replace the ones in the features.
        ignore_index: As in :class:`Layout`.
        fix_boxes: As in :class:`Layout`.

    Raises:
        ConfigError: If the columns do not fit the target type, or any; the message lists them with their features.
    """
    if target_type is not None and target_type not in TARGET_TYPES:
        raise unknown_name("target_type", target_type, TARGET_TYPES)
    target_types = [target_type] if target_type is not None else list(_FINDERS)
    for candidate in target_types:
        found = _FINDERS[candidate](features)
        if found is None:
            continue
        label, fields = found
        names = _class_names(label, class_names, candidate, fields["target"])
        return Layout(
            target_type=candidate,
            class_names=names,
            image=_image_column(features, besides=fields["target"]),
            ignore_index=ignore_index,
            fix_boxes=fix_boxes,
            **fields,
        )
    wanted = (
        f"No columns for the target type {target_type!r}"
        if target_type is not None
        else "Cannot infer the target type (give target_type)"
    )
    raise ConfigError(
        f"{wanted}. {_list_columns(features)} Rename or cast them: multiclass needs label (ClassLabel), multilabel "
        "labels (List(ClassLabel)), detection objects {bbox, category}, segmentation annotation (Image or "
        "List(Image)), image_text caption (string)."
    )


_Found = tuple[Any, dict[str, Any]]  # the feature that may hold class names, and the fields of the Layout


def _find_detection(features: datasets.Features) -> _Found | None:
    for name in _OBJECTS:
        fields = _item(features.get(name))
        if isinstance(fields, dict) and "bbox" in fields:
            for category in _CATEGORIES:
                if category in fields:
                    found = {
                        "target": name,
                        "category": category,
                        "has_crowd": "iscrowd" in fields,
                        "has_size": "width" in features and "height" in features,
                    }
                    return _item(fields[category]), found
    return None


def _find_segmentation(features: datasets.Features) -> _Found | None:
    for name in _MASKS:
        feature = features.get(name)
        if isinstance(_item(feature), datasets.Image):
            classes = "classes" if _is_class_label(_item(features.get("classes"))) else None
            fields = {"target": name, "classes": classes, "is_stacked": _is_list(feature)}
            return None if classes is None else _item(features["classes"]), fields
    return None


def _find_image_text(features: datasets.Features) -> _Found | None:
    for name in _CAPTIONS:
        if _is_value(_item(features.get(name)), ("string", "large_string")):
            label = next((n for n in _LABELS if _is_class_index(features.get(n))), None)
            return features.get(label), {"target": label, "caption": name}
    return None


def _find_multilabel(features: datasets.Features) -> _Found | None:
    for name in reversed(_LABELS):
        feature = features.get(name)
        if _is_list(feature) and _is_class_index(_item(feature)):
            return _item(feature), {"target": name}
    return None


def _find_multiclass(features: datasets.Features) -> _Found | None:
    names = [name for name in _LABELS if _is_class_index(features.get(name))]
    names = names or [name for name, feature in features.items() if _is_class_label(feature)]
    if not names or (len(names) > 1 and names[0] not in _LABELS):
        return None
    return features[names[0]], {"target": names[0]}


_FINDERS: dict[TargetType, Callable[[datasets.Features], _Found | None]] = {
    # From the most to the least specific: a label column may stand beside boxes, masks or captions.
    "detection": _find_detection,
    "segmentation": _find_segmentation,
    "image_text": _find_image_text,
    "multilabel": _find_multilabel,
    "multiclass": _find_multiclass,
}


def _image_column(features: datasets.Features, besides: str | None) -> str:
    columns: list[str] = [
        name for name, feature in features.items() if isinstance(feature, datasets.Image) and name != besides
    ]
    known = [name for name in _IMAGES if name in columns]
    if known:
        return known[0]
    if len(columns) == 1:
        return columns[0]
    problem = "several columns of images, none named image" if columns else "no column of images"
    raise ConfigError(
        f"The data set has {problem}. {_list_columns(features)} Use rename_column, or cast_column(name, Image())."
    )


def _class_names(
    label: Any, class_names: Sequence[str] | None, target_type: TargetType, column: str | None
) -> tuple[str, ...] | None:
    stored = tuple(label.names) if _is_class_label(label) else None
    if class_names is None:
        if stored is None and not (target_type == "image_text"):
            raise ConfigError(
                f"The column {column!r} does not tell the class names. Give class_names, in the order of the indices."
            )
        return stored
    require_names("class_names", class_names)
    names = tuple(class_names)
    if stored is not None and len(stored) != len(names):
        raise ConfigError(f"class_names has {len(names)} names, but the column {column!r} has {len(stored)} classes.")
    return names


def _list_columns(features: datasets.Features) -> str:
    return "Columns: " + ", ".join(f"{name}: {_short(feature)}" for name, feature in features.items()) + "."


def _short(feature: Any) -> str:
    if isinstance(feature, dict):
        return "{" + ", ".join(f"{name}: {_short(inner)}" for name, inner in feature.items()) + "}"
    if _is_list(feature):
        return f"List({_short(_item(feature))})"
    name = feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
    return str(name)


def _is_list(feature: Any) -> bool:
    return isinstance(feature, (datasets.List, datasets.LargeList))


def _item(feature: Any) -> Any:
    return feature.feature if _is_list(feature) else feature


def _is_class_label(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel)


def _is_value(feature: Any, dtypes: Sequence[str]) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in dtypes


def _is_class_index(feature: Any) -> bool:
    return _is_class_label(feature) or (isinstance(feature, datasets.Value) and "int" in feature.dtype)
