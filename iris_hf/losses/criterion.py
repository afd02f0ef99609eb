"""Contrastive losses as a criterion of a model's features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iris_hf.errors import unknown_name
from iris_hf.losses.collectives import world_group
from iris_hf.losses.contrastive import KINDS, ContrastiveKind, contrastive_loss


class ContrastiveCriterion(nn.Module):
    """The loss of image features, text features and a scale; see :func:`contrastive_loss`.

    In training mode under torch.distributed it is the loss of the pairs of all processes, with gradients made for
    DistributedDataParallel's averaging. In evaluation mode it is that of this process's pairs alone, since processes
    may go through different numbers of validation batches.

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
        """
        image_features, text_features, logit_scale, *bias = features
        result = contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            targets,
            kind=self.kind,
            logit_bias=bias[0] if bias else None,
            tile_size=self.tile_size,
            group=world_group() if self.training else None,
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
