"""Contrastive losses as a criterion of a model's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, unknown_name
from iris_hf.losses.collectives import is_together, world_group
from iris_hf.losses.contrastive import KINDS, ContrastiveKind, contrastive_loss


class ContrastiveCriterion(nn.Module):
    """The loss of image features, text features and a scale; see :func:`contrastive_loss`.

    In a training step under torch.distributed it is the loss of the pairs of all processes, with gradients made for
    DistributedDataParallel's averaging. In a validation it is that of this process's pairs alone, since processes may
    go through different numbers of batches. Outside of `train` and `train_with_gradient_cache`, training mode stands
    for the one and evaluation mode for the other.

    Attributes:
        kind: `clip`, `unicl` or `siglip`.
        tile_size: Rows and columns of a tile of logits.
        gathers: True: the criterion itself brings together what several processes hold.
    """

    gathers = True

    def __init__(self, kind: ContrastiveKind = "clip", *, tile_size: int = 1024) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown_name("contrastive loss", kind, KINDS)
        self.kind = kind
        self.tile_size = tile_size

    def forward(self, features: Sequence[Tensor], targets: Tensor | None = None) -> Tensor:
        """Compute the loss.

        Args:
            features: Image features `[N, d]`, text features `[N, d]`, the scale (not its logarithm), and perhaps a
                bias.
            targets: Class indices `[N]`; see :func:`contrastive_loss`.

        Raises:
            DataError: If the features or the targets don't fit the loss.
        """
        loss: Tensor = self.measure(features, targets)["loss"]
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a loop over tiles is nothing to unroll
    def measure(self, features: Sequence[Tensor], targets: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the loss and, detached, what is worth logging beside it.

        Returns:
            Scalars: `loss`; `temperature`, one over the scale; `image_to_text_r1` and `text_to_image_r1`, the
            retrieval recall inside the batch, in [0, 1].

        Raises:
            ConfigError: If a step of training has a single pair, whose loss is 0 for `clip` and `unicl`.
        """
        in_step = is_together()
        group = world_group() if (self.training if in_step is None else in_step) else None
        image_features, text_features, logit_scale, *bias = features
        result = contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            targets,
            kind=self.kind,
            logit_bias=bias[0] if bias else None,
            tile_size=self.tile_size,
            group=group,
        )
        if in_step and group is None and self.kind != "siglip" and len(image_features) == 1:
            raise ConfigError(
                f"The batch is one pair, and {self.kind} learns to tell pairs of a batch apart: its loss is 0. Give a "
                "larger batch_size (accumulated micro-batches are no substitute, since each has a loss of its own); "
                "train_with_gradient_cache computes a large one in parts."
            )
        return {
            "loss": result.loss,
            "temperature": 1 / logit_scale.detach(),
            "image_to_text_r1": result.image_to_text_r1,
            "text_to_image_r1": result.text_to_image_r1,
        }

    def extra_repr(self) -> str:
        """Name the loss."""
        return f"{self.kind!r}"
