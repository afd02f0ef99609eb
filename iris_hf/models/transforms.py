"""The transform that fits a model: an image and its target in, a tensor and its target out."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError
from iris_hf.models.image_spec import ImageSpec

_MIN_SCALES = {"detection": 0.5, "segmentation": 0.5}
_RATIO = (3 / 4, 4 / 3)
_ABSENT: Any = object()

Step = tuple[str, dict[str, Any]]
"""A function of torchvision.transforms.v2.functional that acts alike on images, boxes and masks; its arguments."""


def create_image_transform(
    model: nn.Module | ImageSpec,
    *,
    train: bool = False,
    horizontal_flip: bool = True,
    min_scale: float | None = None,
) -> ImageTransform:
    """Make the transform `(image, target) -> (tensor, target)` that fits a model.

    For evaluation an image is resized by the rule of the model's `image_spec`. For training a random part of it is
    cut out (aspect ratio between 3/4 and 4/3 of the image's pixels), resized to the size of the specification (with
    the rule `fit`: by that rule), and flipped in half of the cases. Boxes and masks follow.

    Args:
        model: A model with an `image_spec`, or the specification itself (for images whose targets stay as they are).
        train: Whether to augment.
        horizontal_flip: Whether training flips; turn it off where left and right differ, as for digits.
        min_scale: The smallest part of the image's area that training cuts out, in (0, 1]; 1 keeps the whole image.
            By default 0.08 for classification, 0.5 for boxes and masks.

    Returns:
        A picklable transform. Its random choices come from torch's global generator.

    Raises:
        ConfigError: If the model has no image specification or an argument is out of range.
    """
    spec = model if isinstance(model, ImageSpec) else getattr(model, "image_spec", None)
    if not isinstance(spec, ImageSpec):
        raise ConfigError(
            f"{type(model).__name__} has no image_spec, so its images aren't known. Pass an "
            "iris_hf.models.image_spec.ImageSpec(height=..., width=...) instead of the model."
        )
    target_type = getattr(model, "target_type", None)
    scale = _MIN_SCALES.get(str(target_type), 0.08) if min_scale is None else min_scale
    if not 0 < scale <= 1:
        raise ConfigError(f"min_scale must be in (0, 1], got {min_scale}.")
    return ImageTransform(spec, target_type, train=train, horizontal_flip=horizontal_flip, min_scale=scale)


class ImageTransform:
    """Made by :func:`create_image_transform`.

    Called with an image alone, it returns the image alone.

    Attributes:
        spec: The images to make.
        target_type: What targets are; boxes and masks are transformed, anything else is returned as it came.
        train: Whether to augment.
        horizontal_flip: Whether training flips.
        min_scale: The smallest part of an image that training cuts out.
    """

    def __init__(
        self, spec: ImageSpec, target_type: str | None, *, train: bool, horizontal_flip: bool, min_scale: float
    ) -> None:
        self.spec = spec
        self.target_type = target_type
        self.train = train
        self.horizontal_flip = horizontal_flip
        self.min_scale = min_scale

    def __call__(self, image: Any, target: Any = _ABSENT) -> Any:
        """Transform an image and its target.

        Args:
            image: A PIL image of any mode, or a tensor `[3, H, W]`, uint8 or float in [0, 1].
            target: Of the model's target type. Boxes `[num_boxes, 5]` are clipped to what is left of the image; a box
                of which less than a pixel is left along an edge is dropped, with its class. Masks
                `[num_classes, H, W]` are resized to the nearest pixel.

        Returns:
            A float32 tensor `[3, H, W]` in [0, 1], and the target (left out if none was given; None stays None).

        Raises:
            DataError: If the image is none, or boxes or masks have another format or size.
        """
        from torchvision.transforms import v2
        from torchvision.transforms.v2 import functional as F

        if not isinstance(image, (PIL.Image.Image, Tensor)):
            raise DataError(f"An image is a PIL image or a tensor [3, H, W], not a {type(image).__name__}.")
        image = image if isinstance(image, Tensor) else image.convert("RGB")
        _, height, width = F.get_dimensions(image)
        steps = self._random_steps(image) if self.train else self._steps(height, width)
        for name, arguments in steps:
            if name == "resize":
                arguments = {**arguments, "interpolation": v2.InterpolationMode(self.spec.interpolation)}
            image = getattr(F, name)(image, **arguments)
        image = F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(Tensor)
        if target is _ABSENT:
            return image
        if target is None:
            return image, None
        if self.target_type == "detection":
            target = _transform_boxes(target, (height, width), steps)
        elif self.target_type == "segmentation":
            target = _transform_masks(target, (height, width), steps)
        return image, target

    def _steps(self, height: int, width: int) -> list[Step]:
        size = self.spec.resized(height, width)
        steps: list[Step] = [("resize", {"size": list(size)})] if size != (height, width) else []
        if self.spec.resize != "fit" and size != (self.spec.height, self.spec.width):
            steps.append(("center_crop", {"output_size": [self.spec.height, self.spec.width]}))
        return steps

    def _random_steps(self, image: Any) -> list[Step]:
        from torchvision.transforms import v2

        steps: list[Step] = []
        _, height, width = v2.functional.get_dimensions(image)
        if self.min_scale < 1:
            top, left, height, width = v2.RandomResizedCrop.get_params(image, [self.min_scale, 1.0], list(_RATIO))
            steps.append(("crop", {"top": top, "left": left, "height": height, "width": width}))
        fit = self.spec.resize == "fit"
        size = self.spec.resized(height, width) if fit else (self.spec.height, self.spec.width)
        if size != (height, width):
            steps.append(("resize", {"size": list(size)}))
        if self.horizontal_flip and torch.rand(()) < 0.5:
            steps.append(("horizontal_flip", {}))
        return steps


def _transform_boxes(boxes: Tensor, size: tuple[int, int], steps: list[Step]) -> Tensor:
    """Let boxes `[num_boxes, 5]` follow their image, in pixels of float64; unmoved boxes come back bit for bit."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional as F

    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 5:
        raise DataError(
            f"A detection target must be a tensor [num_boxes, 5] of class, x0, y0, x1, y1, got {_shape(boxes)}."
        )
    if all(name == "resize" for name, _ in steps):
        return boxes
    corners = boxes[:, 1:].double() * _edges(size)
    moved: Any = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=size)
    for name, arguments in steps:
        moved = getattr(F, name)(moved, **arguments)
    moved = F.clamp_bounding_boxes(moved)
    canvas = moved.canvas_size
    moved, kept = F.sanitize_bounding_boxes(moved)
    relative = moved.as_subclass(Tensor) / _edges(canvas)
    return torch.cat([boxes[kept, :1], relative.to(boxes.dtype)], 1)


def _transform_masks(masks: Tensor, size: tuple[int, int], steps: list[Step]) -> Tensor:
    """Let masks `[num_classes, H, W]` follow their image; a resized pixel is the one at its centre, as in PIL."""
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F

    if not isinstance(masks, Tensor) or masks.ndim != 3 or tuple(masks.shape[1:]) != size:
        raise DataError(
            f"A segmentation target must be a tensor (num_classes, {size[0]}, {size[1]}), got {_shape(masks)}."
        )
    for name, arguments in steps:
        if name == "resize":  # the rule of tv_tensors.Mask shifts masks by half a pixel
            arguments = {**arguments, "interpolation": v2.InterpolationMode.NEAREST_EXACT}
        masks = getattr(F, name)(masks, **arguments)
    return masks


def _edges(size: tuple[int, int]) -> Tensor:
    height, width = size
    return torch.tensor([width, height, width, height], dtype=torch.float64)


def _shape(value: Any) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
