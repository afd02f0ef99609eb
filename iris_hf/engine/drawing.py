"""Pictures of examples with their targets and what a model predicts for them."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

logger = logging.getLogger(__name__)

_TILE, _LINE, _GAP = 176, 16, 6  # pixels
_WHITE, _BLACK, _RIGHT, _WRONG = (255, 255, 255), (0, 0, 0), (0, 120, 0), (190, 0, 0)
_PALETTE = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (23, 190, 207),
    (227, 119, 194),
)
_LEAST_PROBABILITY = 0.3
_MOST_BOXES = 50

Lines = Sequence[tuple[str, tuple[int, int, int]]]


def split_images(inputs: Any) -> list[Tensor] | None:
    """Return the images in a batch of inputs, or None if it holds something else.

    Args:
        inputs: A float tensor `[N, 3, H, W]`, or a list of `[3, H, W]`; one channel is grey.
    """
    is_batch = isinstance(inputs, (list, tuple)) or (isinstance(inputs, Tensor) and inputs.dim() == 4)
    images = list(inputs) if is_batch else []
    if not images or not all(
        isinstance(image, Tensor) and image.is_floating_point() and image.dim() == 3 and image.shape[0] in (1, 3)
        for image in images
    ):
        return None
    return images


def draw_examples(
    images: Sequence[Tensor],
    targets: Sequence[Any],
    predictions: Sequence[Any],
    class_names: Sequence[str] | None = None,
) -> np.ndarray[Any, Any] | None:
    """Draw a grid of images with targets and predictions.

    Classes and labels stand below the image, in green where they are right, in red where they are wrong. Boxes (the 50
    most probable of at least 0.3) and masks are drawn twice, as annotated and as predicted, with a colour per class.
    Left out are boxes that are not finite and, with a warning, images of size 0 and examples of other forms.

    Args:
        images: Floats `[1 or 3, H, W]`; values outside of [0, 1] are scaled into it, image by image.
        targets: One per image: a class index, 0/1 labels `[C]`, boxes `[n, 5]` or masks `[C, H, W]`; a tensor without
            values stands for no boxes, among the predictions too.
        predictions: Likewise: scores `[C]` or a class index, scores `[C]`, boxes `[m, 6]`, masks or scores `[C, H, W]`.
        class_names: None names classes by their numbers.

    Returns:
        An RGB picture, uint8 `[height, width, 3]`; None if no example can be drawn.
    """
    tiles = [
        tile
        for image, target, prediction in zip(images, targets, predictions, strict=True)
        if image.numel() and (tile := _draw_example(_to_picture(image), target, prediction, class_names)) is not None
    ]
    if tiles and len(tiles) < len(images):
        logger.warning("%d of %d examples cannot be drawn and are left out.", len(images) - len(tiles), len(images))
    return np.asarray(_arrange(tiles)) if tiles else None


def _draw_example(
    picture: PIL.Image.Image, target: Any, prediction: Any, class_names: Sequence[str] | None
) -> PIL.Image.Image | None:
    if not isinstance(prediction, Tensor) or not isinstance(target, (Tensor, numbers.Integral)):
        return None
    target = target if isinstance(target, Tensor) else torch.tensor(int(target))
    form = target.dim(), prediction.dim()
    if form == (3, 3):
        return _side_by_side(*(_cover(picture, masks) for masks in (target, prediction)))
    boxes, found = _finite_boxes(target, 5), _finite_boxes(prediction, 6)
    if boxes is not None and found is not None:
        sure = found[found[:, 1] >= _LEAST_PROBABILITY]
        sure = sure[sure[:, 1].argsort(descending=True)][:_MOST_BOXES]
        annotated = _frame(picture, boxes[:, 0], boxes[:, 1:], class_names)
        predicted = _frame(picture, sure[:, 0], sure[:, 2:], class_names)
        return _side_by_side(annotated, predicted)
    if form == (1, 1) and target.shape == prediction.shape and (len(target) > 1 or prediction.is_floating_point()):
        threshold = 0.5 if _are_probabilities(prediction) else 0.0
        chosen, wanted = (
            [_name(index, class_names) for index in (scores > least).nonzero().flatten().tolist()]
            for scores, least in ((prediction, threshold), (target, 0))
        )
        return _with_lines(picture, _compare(", ".join(chosen) or "none", ", ".join(wanted) or "none"))
    if target.numel() == 1 and not target.is_floating_point():
        best, certainty = prediction, ""
        if prediction.dim() == 1 and prediction.is_floating_point() and len(prediction):
            best = prediction.argmax()
            certainty = f" {float(prediction[best]):.2f}" if _are_probabilities(prediction) else ""
        if best.numel() == 1 and not best.is_floating_point():
            return _with_lines(
                picture, _compare(_name(int(best), class_names), _name(int(target), class_names), certainty)
            )
    return None


def _finite_boxes(values: Tensor, num_columns: int) -> Tensor | None:
    """Return the rows `[n, num_columns]` whose values are all finite; None if they are no boxes."""
    if not values.numel():
        return values.new_zeros(0, num_columns)
    if values.dim() != 2 or values.shape[1] != num_columns:
        return None
    return values[values.isfinite().all(1)]


def _compare(predicted: str, wanted: str, certainty: str = "") -> Lines:
    return [(f"{predicted}{certainty}", _RIGHT if predicted == wanted else _WRONG), (f"target: {wanted}", _BLACK)]


def _are_probabilities(scores: Tensor) -> bool:
    return bool(((scores >= 0) & (scores <= 1)).all())


def _name(index: int, class_names: Sequence[str] | None) -> str:
    if class_names is None or not 0 <= index < len(class_names):
        return str(index)
    return " ".join(class_names[index].split())  # in one line


def _colour(index: int) -> tuple[int, int, int]:
    return _PALETTE[index % len(_PALETTE)]


def _to_picture(image: Tensor) -> PIL.Image.Image:
    """Turn a tensor into a picture that fits a tile."""
    values = image.detach().float().cpu().nan_to_num(0.0, 1.0, 0.0)
    low, high = values.min(), values.max()
    if low < 0 or high > 1:
        values = (values - low) / (high - low).clamp(min=1e-12)
    pixels = (values * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).numpy()
    picture = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    scale = _TILE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    smooth = PIL.Image.Resampling.BILINEAR if scale < 1 else PIL.Image.Resampling.NEAREST
    return picture.resize(size, smooth)


def _classes_of_pixels(masks: Tensor) -> np.ndarray[Any, Any]:
    """Return the class of every pixel `[H, W]` of masks or scores, -1 where all are 0."""
    values = masks.byte() if masks.dtype == torch.bool else masks
    classes: np.ndarray[Any, Any] = torch.where((values != 0).any(0), values.argmax(0), -1).cpu().numpy()
    return classes


def _cover(picture: PIL.Image.Image, masks: Tensor) -> PIL.Image.Image:
    """Lay the colours of classes over a picture; masks without classes or pixels leave it as it is."""
    if not masks.numel():
        return picture
    classes = _classes_of_pixels(masks)
    colours = np.array([_colour(index) for index in range(len(_PALETTE))], dtype=np.uint8)[classes % len(_PALETTE)]
    colours = np.where(classes[..., None] < 0, 0, colours).astype(np.uint8)
    overlay = PIL.Image.fromarray(colours).resize(picture.size, PIL.Image.Resampling.NEAREST)
    return PIL.Image.blend(picture, overlay, 0.6)


def _frame(
    picture: PIL.Image.Image, classes: Tensor, boxes: Tensor, class_names: Sequence[str] | None
) -> PIL.Image.Image:
    """Draw boxes in relative coordinates, with the names of their classes."""
    framed = picture.copy()
    pen = ImageDraw.Draw(framed)
    width, height = framed.width - 1, framed.height - 1
    for index, (x0, y0, x1, y1) in zip(classes.int().tolist(), boxes.clamp(0, 1).tolist(), strict=True):
        left, right = sorted((x0 * width, x1 * width))
        top, bottom = sorted((y0 * height, y1 * height))
        pen.rectangle((left, top, right, bottom), outline=_colour(index), width=2)
        where, name = (left + 4, top + 2), _name(index, class_names)
        pen.text(where, name, fill=_colour(index), font=ImageFont.load_default(10), stroke_width=1, stroke_fill=_WHITE)
    return framed


def _with_lines(picture: PIL.Image.Image, lines: Lines) -> PIL.Image.Image:
    """Put a picture into a tile, with lines of text below it."""
    tile = PIL.Image.new("RGB", (_TILE, _TILE + _LINE * len(lines)), _WHITE)
    tile.paste(picture, ((_TILE - picture.width) // 2, _TILE - picture.height))
    pen, font = ImageDraw.Draw(tile), ImageFont.load_default(12)
    for number, (text, colour) in enumerate(lines):
        shown = text
        while len(shown) > 1 and pen.textlength(shown, font) > _TILE:
            text = text[:-1]
            shown = f"{text}.."
        pen.text((0, _TILE + _LINE * number), shown, fill=colour, font=font)
    return tile


def _side_by_side(annotated: PIL.Image.Image, predicted: PIL.Image.Image) -> PIL.Image.Image:
    return _arrange([_with_lines(annotated, [("target", _BLACK)]), _with_lines(predicted, [("predicted", _BLACK)])])


def _arrange(tiles: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Lay tiles out in rows that are about as wide as all of them are high."""
    width, height = max(tile.width for tile in tiles) + _GAP, max(tile.height for tile in tiles) + _GAP
    columns = min(len(tiles), max(2, round((len(tiles) * height / width) ** 0.5)))
    rows = -(-len(tiles) // columns)
    grid = PIL.Image.new("RGB", (columns * width - _GAP, rows * height - _GAP), _WHITE)
    for number, tile in enumerate(tiles):
        grid.paste(tile, (number % columns * width, number // columns * height))
    return grid
