"""Object detectors of transformers in the model interface: relative boxes in, relative boxes out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError
from iris_hf.models.batching import ImageBatch, pad_images
from iris_hf.models.image_spec import ImageSpec, Normalize

_SEE_THE_MASK = {"conditional_detr", "dab-detr", "deformable_detr", "detr", "lw_detr", "rf_detr", "table-transformer"}
"""Model types whose boxes are relative to the image; those of the others are relative to the padded image."""
_MULTIPLES = {"d_fine": 32, "rt_detr": 32, "rt_detr_v2": 32}
"""Model types that only take heights and widths of such multiples."""


class ImageDetector(nn.Module):
    """A detector of the DETR family or YOLOS that takes images in [0, 1] of any sizes.

    Images of different sizes are padded at the right and the bottom. Networks that see the pixel mask (DETR,
    conditional and deformable DETR, DAB-DETR) place boxes relative to the image itself; the others (YOLOS, RT-DETR,
    D-FINE) only see the padded image, and boxes are converted to and from it.

    Attributes:
        network: The transformers model.
        normalize: The normalisation.
        target_type: `detection`.
        num_classes: Number of classes.
        class_names: Their names.
        image_spec: The images it takes.
        score_threshold: Predictions of lower probability are left out, in [0, 1].
        max_detections: At most so many boxes are predicted for an image, the most probable.
    """

    target_type = "detection"

    def __init__(
        self,
        network: nn.Module,
        *,
        class_names: Sequence[str],
        image_spec: ImageSpec,
        score_threshold: float = 0.0,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if not 0 <= score_threshold <= 1:
            raise ConfigError(f"score_threshold must be in [0, 1], got {score_threshold}.")
        if max_detections < 1:
            raise ConfigError(f"max_detections must be positive, got {max_detections}.")
        self.network = network
        self.normalize = Normalize(image_spec)
        self.class_names = list(class_names)
        self.num_classes = len(self.class_names)
        self.image_spec = image_spec
        self.score_threshold = score_threshold
        self.max_detections = max_detections
        config: Any = network.config
        self._multiple = _MULTIPLES.get(config.model_type, 1)
        self._sees_mask = config.model_type in _SEE_THE_MASK
        self._takes_mask = "pixel_mask" in inspect.signature(network.forward).parameters

    def forward(self, images: ImageBatch) -> Any:
        """Give the network's own output, with `logits` `[N, Q, C]` and `pred_boxes` `[N, Q, 4]` (cx, cy, w, h)."""
        return self._run(images)[0]

    def training_step(self, inputs: ImageBatch, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Give the network's own loss.

        Args:
            inputs: Images in [0, 1], `[N, 3, H, W]` or a list of `[3, H, W]`.
            targets: N tensors `[num_boxes, 5]` of class, x0, y0, x1, y1, relative.

        Raises:
            DataError: If the targets have another format.
        """
        if len(targets) != len(inputs):
            raise DataError(f"There are {len(inputs)} images and {len(targets)} targets. There must be one for each.")
        for i, target in enumerate(targets):
            if not isinstance(target, Tensor) or target.ndim != 2 or target.shape[1] != 5:
                got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
                raise DataError(f"Target {i} of the batch must be a tensor [num_boxes, 5], got {got}.")
        return {"loss": self._run(inputs, targets)[0].loss}

    def prediction_step(self, inputs: ImageBatch) -> list[Tensor]:
        """Find objects.

        Networks with a no-object class give one box for each query, with its most probable class; the others give
        the best pairs of query and class.

        Args:
            inputs: Images in [0, 1], `[N, 3, H, W]` or a list of `[3, H, W]`.

        Returns:
            N tensors `[num_boxes, 6]` of class, probability, x0, y0, x1, y1: relative, clipped to [0, 1], with x0 < x1
            and y0 < y1 (a box outside the image is dropped), the most probable first.
        """
        output, scale = self._run(inputs)
        rows = self._best_boxes(output, scale)
        dropped = rows[..., 1] < self.score_threshold  # not-a-number stays, so that it is noticed
        return [row[~drop] for row, drop in zip(rows, dropped, strict=True)]

    def detect(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find objects in images of one size, by operations on tensors alone, so that it can be exported.

        Args:
            images: `[N, 3, H, W]` in [0, 1].

        Returns:
            The network's `logits` `[N, Q, C]` and `pred_boxes` `[N, Q, 4]` (cx, cy, w, h), and the best boxes
            `[N, K, 6]` of :meth:`prediction_step`. None of them is left out; one outside the image has the
            probability -1.
        """
        height, width = images.shape[2:]
        padding = (0, -width % self._multiple, 0, -height % self._multiple)
        mask = nn.functional.pad(torch.ones_like(images[:, 0]), padding)
        pixels = self.normalize(nn.functional.pad(images, padding)) * mask[:, None]
        across, down = mask[:, 0].mean(-1), mask[:, :, 0].mean(-1)
        scale = torch.stack([across, down, across, down], -1)
        arguments = {"pixel_mask": mask.long()} if self._takes_mask else {}
        output = self.network(pixel_values=pixels.to(self.normalize.mean.dtype), **arguments)
        return (
            output.logits,
            output.pred_boxes,
            self._best_boxes(output, torch.ones_like(scale) if self._sees_mask else scale),
        )

    def _best_boxes(self, output: Any, scale: Tensor) -> Tensor:
        logits, boxes = output.logits.float(), output.pred_boxes.float()
        corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
        corners = (corners / scale[:, None]).clamp(0, 1)
        if logits.shape[-1] > self.num_classes:
            scores, classes = logits.softmax(-1)[..., :-1].max(-1, keepdim=True)
        else:
            scores, classes = logits.sigmoid(), torch.arange(self.num_classes, device=logits.device)
        empty = (corners[..., 2:] <= corners[..., :2]).any(-1, keepdim=True)
        scores = scores.masked_fill(empty, -1.0)
        classes, corners = classes.expand_as(scores), corners[:, :, None].expand(*scores.shape, 4)
        rows = torch.cat([classes[..., None].to(scores.dtype), scores[..., None], corners], -1).flatten(1, 2)
        _, chosen = scores.flatten(1).topk(min(self.max_detections, rows.shape[1]))
        return rows.gather(1, chosen[..., None].expand(-1, -1, 6))

    def _run(self, images: ImageBatch, targets: Sequence[Tensor] | None = None) -> tuple[Any, Tensor]:
        """Run the network; also give, for each image, what relative boxes (x, y, x, y) are to be multiplied by."""
        batch, mask, sizes = pad_images(images, multiple=self._multiple)
        pixels = self.normalize(batch)
        height, width = batch.shape[2:]
        padded = any(size != (height, width) for size in sizes)
        if padded:
            pixels = pixels * mask[:, None].to(pixels.dtype)
        shares = [(w / width, h / height) * 2 for h, w in sizes]
        if self._sees_mask:
            shares = [(1.0,) * 4] * len(sizes)
        scale = torch.tensor(shares, device=batch.device)
        arguments: dict[str, Any] = {"pixel_mask": mask} if self._takes_mask else {}
        if targets is not None:
            arguments["labels"] = [_to_labels(t, s) for t, s in zip(targets, scale, strict=True)]
        return self.network(pixel_values=pixels, **arguments), scale


def _to_labels(target: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Turn boxes into transformers' labels: class indices and cx, cy, w, h."""
    corners = target[:, 1:].float() * scale
    return {
        "class_labels": target[:, 0].long(),
        "boxes": torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1),
    }
