"""Semantic segmenters of transformers in the model interface: masks in, masks out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError
from iris_hf.models.batching import ImageBatch, pad_images, stack_images
from iris_hf.models.image_spec import ImageSpec, Normalize


class ImageSegmenter(nn.Module):
    """A network that gives every pixel one class, for images in [0, 1].

    Attributes:
        network: The transformers model.
        normalize: The normalisation.
        target_type: `segmentation`.
        num_classes: Number of classes, at least two.
        class_names: Their names.
        image_spec: The images it takes.
    """

    target_type = "segmentation"

    def __init__(self, network: nn.Module, *, class_names: Sequence[str], image_spec: ImageSpec) -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ConfigError(
                f"A segmenter gives every pixel one of its classes, so {list(class_names)} are too few. "
                "Add a class for the background."
            )
        self.network = network
        self.normalize = Normalize(image_spec)
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.image_spec = image_spec
        config: Any = network.config
        upernet = getattr(config, "loss_ignore_index", 255)
        self._ignore_index = int(getattr(config, "semantic_loss_ignore_index", upernet))

    def forward(self, images: ImageBatch) -> Tensor:
        """Give the logits `[N, num_classes, h, w]`, at the network's own resolution."""
        logits: Tensor = self.network(pixel_values=self.normalize(self._batch(images)[0])).logits
        return logits

    def training_step(self, inputs: ImageBatch, targets: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """Give the network's own loss (cross-entropy at the size of the images).

        A pixel without any class does not count; a batch without any labelled pixel has the loss 0.

        Args:
            inputs: Images in [0, 1], `[N, 3, H, W]`, or a list of `[3, H, W]`.
            targets: Masks 0/1, `[N, num_classes, H, W]`, or a list of `[num_classes, H, W]`; classes exclude one
                another.

        Raises:
            DataError: If a mask has another shape than its image and the classes, or a pixel two classes.
        """
        batch, sizes = self._batch(inputs)
        if len(targets) != len(sizes):
            raise DataError(f"There are {len(sizes)} images and {len(targets)} masks. There must be one for each.")
        height, width = batch.shape[2:]
        labels = torch.full((len(sizes), height, width), self._ignore_index, device=batch.device)
        counts = torch.zeros_like(labels)
        for i, (target, (h, w)) in enumerate(zip(targets, sizes, strict=True)):
            if tuple(target.shape) != (self.num_classes, h, w):
                raise DataError(
                    f"Mask {i} of the batch must have the shape {(self.num_classes, h, w)} (classes and size of the "
                    f"image), got {tuple(target.shape)}."
                )
            present = target > 0.5
            counts[i, :h, :w] = present.sum(0)
            labels[i, :h, :w] = torch.where(present.any(0), present.to(torch.uint8).argmax(0), self._ignore_index)
        labelled, overlapping = torch.stack([(counts > 0).any(), (counts > 1).any()]).tolist()
        if overlapping:
            i = int((counts > 1).flatten(1).any(1).nonzero()[0])
            raise DataError(f"Mask {i} of the batch gives a pixel two classes; this model needs one at most.")
        pixels = self.normalize(batch)
        if not labelled:
            return {"loss": self.network(pixel_values=pixels).logits.sum() * 0}
        return {"loss": self.network(pixel_values=pixels, labels=labels).loss}

    def prediction_step(self, inputs: ImageBatch) -> Tensor | list[Tensor]:
        """Give every pixel its most probable class.

        Args:
            inputs: Images in [0, 1], `[N, 3, H, W]`, or a list of `[3, H, W]`.

        Returns:
            Masks 0/1 (uint8) in the format of the targets and the size of the inputs: `[N, num_classes, H, W]`, or for
            images of different sizes a list of `[num_classes, H, W]`.
        """
        batch, sizes = self._batch(inputs)
        masks = _most_probable(_resize(self.network(pixel_values=self.normalize(batch)).logits, batch))
        if len(set(sizes)) == 1:
            return masks[..., : sizes[0][0], : sizes[0][1]]
        return [mask[:, :h, :w] for mask, (h, w) in zip(masks, sizes, strict=True)]

    def segment(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Segment images of one size, by operations on tensors alone, so that it can be exported.

        Args:
            images: `[N, 3, H, W]` in [0, 1].

        Returns:
            The network's logits `[N, num_classes, h, w]`; the probabilities `[N, num_classes, H, W]`, which sum to 1
            over the classes; and the masks 0/1 (uint8) of :meth:`prediction_step`, `[N, num_classes, H, W]`.
        """
        logits: Tensor = self.network(pixel_values=self.normalize(images)).logits
        resized = _resize(logits, images)
        return logits, resized.softmax(1), _most_probable(resized)

    def _batch(self, images: ImageBatch) -> tuple[Tensor, list[tuple[int, int]]]:
        if self.image_spec.variable_size:
            batch, _, sizes = pad_images(images)
            return batch, sizes
        batch = stack_images(images)
        return batch, [(batch.shape[2], batch.shape[3])] * len(batch)


def _resize(logits: Tensor, images: Tensor) -> Tensor:
    return nn.functional.interpolate(logits.float(), size=images.shape[2:], mode="bilinear", align_corners=False)


def _most_probable(logits: Tensor) -> Tensor:
    """Masks 0/1 (uint8) of the class with the largest logit."""
    return torch.zeros_like(logits, dtype=torch.uint8).scatter_(1, logits.argmax(1, keepdim=True), 1)
