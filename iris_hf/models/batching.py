"""Image batches: one tensor when all shapes agree, otherwise a list that some models pad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from iris_hf.errors import DataError

ImageBatch = Tensor | Sequence[Tensor]
"""Images in [0, 1]: `[N, 3, H, W]`, or N tensors `[3, H, W]`."""


def stack_images(images: ImageBatch) -> Tensor:
    """Check a batch of images of one shape and return it as a tensor `[N, 3, H, W]`.

    Raises:
        DataError: If the shapes differ, or it is no batch of float images with three channels.
    """
    if isinstance(images, Tensor):
        _check(images, 4, "[N, 3, H, W]")
        return images
    shapes = sorted({tuple(_check(image, 3, "[3, H, W]").shape) for image in images})
    if len(shapes) > 1:
        raise DataError(
            f"This model takes images of one size, and the batch holds {', '.join(map(str, shapes))}. "
            "Resize them: create_image_transform(model) gives the transform that fits."
        )
    return torch.stack(list(images))


def pad_images(images: ImageBatch, *, multiple: int = 1) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Pad images with zeros at the right and the bottom to the largest height and width among them.

    Args:
        images: The batch.
        multiple: The padded height and width are rounded up to multiples of this.

    Returns:
        The batch `[N, 3, H, W]`, a mask `[N, H, W]` which is 1 on the images and 0 on the padding (int64), and the
        (height, width) of each image.

    Raises:
        DataError: If it is no batch of float images with three channels.
    """
    if isinstance(images, Tensor):
        _check(images, 4, "[N, 3, H, W]")
    for image in images:
        _check(image, 3, "[3, H, W]")
    sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
    height, width = (-(-max(edge) // multiple) * multiple for edge in zip(*sizes, strict=True))
    first = images[0]
    mask = torch.zeros(len(sizes), height, width, dtype=torch.long, device=first.device)
    for i, (h, w) in enumerate(sizes):
        mask[i, :h, :w] = 1
    if isinstance(images, Tensor) and images.shape[2:] == (height, width):
        return images, mask, sizes
    batch = first.new_zeros(len(sizes), 3, height, width)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = image
    return batch, mask, sizes


def _check(images: Tensor, ndim: int, shape: str) -> Tensor:
    if not isinstance(images, Tensor):
        raise DataError(f"A model takes float tensors {shape} in [0, 1], got {type(images).__name__}. Use a transform.")
    if images.ndim != ndim or images.shape[-3] != 3:
        raise DataError(f"A model takes images {shape}, got a tensor of shape {tuple(images.shape)}.")
    if not images.is_floating_point():
        raise DataError(f"A model takes float images in [0, 1], got {images.dtype}. Divide by 255 first.")
    return images
