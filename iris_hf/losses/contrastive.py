"""Contrastive losses between images and texts, in tiles: the N x N matrix of logits never exists.

With unit features `u_i` (image) and `v_j` (text), the logits are `z_ij = s u_i . v_j + b` over the N pairs of all
processes. Sweep 1 goes over tiles of them and keeps what a loss needs of each row and column; sweep 2, in the backward
pass, makes each tile again and adds up the gradients. Memory is O(tile_size**2 + N d). Positive pairs cost O(N d) by
sums over classes, since `sum over j of u_i . v_j = u_i . (sum of v_j)`.

On several processes each holds some rows. The text features and the labels are gathered; column sums are reduced
once, and so are the text gradients: no communication per tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from iris_hf.errors import ConfigError, DataError, unknown_name
from iris_hf.losses.collectives import Group, Rows

ContrastiveKind = Literal["clip", "unicl", "siglip"]
KINDS: tuple[ContrastiveKind, ...] = ("clip", "unicl", "siglip")


class ContrastiveResult(NamedTuple):
    """A contrastive loss, and how well the pairs of the batch find each other.

    Attributes:
        loss: A scalar: the mean over all pairs of all processes.
        image_to_text_r1: Fraction of images whose most similar text is theirs (has their label, where there are
            labels), in [0, 1]. Of equally similar texts the first counts.
        text_to_image_r1: Fraction of texts whose most similar image is theirs.
    """

    loss: Tensor
    image_to_text_r1: Tensor
    text_to_image_r1: Tensor


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    labels: Tensor | None = None,
    *,
    kind: ContrastiveKind = "clip",
    logit_bias: Tensor | None = None,
    tile_size: int = 1024,
    group: Group | None = None,
) -> ContrastiveResult:
    """Compute a contrastive loss; differentiable once in the features, the scale and the bias.

    - `clip`: the mean of the cross-entropies over rows and over columns, where a pair is its own class
      (Radford et al.: Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020).
    - `unicl`: the same with all pairs of one label as positives, each with an equal share
      (Yang et al.: Unified Contrastive Learning in Image-Text-Label Space, arXiv 2204.03610).
    - `siglip`: a sigmoid for every pair of an image and a text, summed over texts, mean over images
      (Zhai et al.: Sigmoid Loss for Language Image Pre-Training, arXiv 2303.15343).

    It computes in float32, or in float64 for float64 features, whatever autocast says.

    Args:
        image_features: `[N, d]`, of length 1 each, as a rule.
        text_features: `[N, d]`; row i belongs to image i.
        logit_scale: The factor s, a scalar: not its logarithm.
        labels: Class indices `[N]` or `[N, 1]`. `unicl` needs them; `siglip` takes each pair as its own class
            without; `clip` ignores them.
        kind: The loss.
        logit_bias: The summand b, a scalar; 0 when None. It changes `siglip` alone.
        tile_size: Rows and columns of a tile.
        group: Processes whose pairs make up the batch, with as many pairs on each as there are, also none. Every
            process gets the loss of all; its gradients are multiplied by the number of processes, because
            DistributedDataParallel averages them over the processes. None: this process's pairs alone.

    Raises:
        ConfigError: If `kind` is unknown or `tile_size` below 1.
        DataError: If shapes don't fit each other, there are no pairs, or labels are missing or aren't integers.
    """
    if kind not in KINDS:
        raise unknown_name("contrastive loss", kind, KINDS)
    if tile_size < 1:
        raise ConfigError(f"tile_size must be at least 1, got {tile_size}.")
    _check_features(image_features, text_features)
    labels = None if kind == "clip" else _checked_labels(labels, len(image_features), kind)
    dtype = torch.promote_types(torch.promote_types(image_features.dtype, text_features.dtype), torch.float32)
    scale = _scalar(logit_scale, image_features, dtype, "logit_scale")
    bias = torch.zeros_like(scale) if logit_bias is None else _scalar(logit_bias, image_features, dtype, "logit_bias")
    outputs: tuple[Tensor, Tensor, Tensor] = _Tiled.apply(  # type: ignore[no-untyped-call]
        image_features.to(dtype), text_features.to(dtype), scale, bias, labels, kind == "siglip", tile_size, group
    )
    return ContrastiveResult(*outputs)


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    for name, features in (("image", image_features), ("text", text_features)):
        if features.ndim != 2 or not features.is_floating_point():
            raise DataError(f"{name}_features must be floats [N, d], got {features.dtype} {list(features.shape)}.")
    if image_features.shape != text_features.shape:
        raise DataError(
            f"image_features {list(image_features.shape)} and text_features {list(text_features.shape)} must have one "
            "shape: a text for each image, of one dimension. Projections make dimensions equal."
        )


def _checked_labels(labels: Tensor | None, num_pairs: int, kind: str) -> Tensor | None:
    if labels is None:
        if kind == "unicl":
            raise DataError("unicl needs the label of every pair, and there are none. Use clip for pairs without.")
        return None
    if not isinstance(labels, Tensor) or labels.shape not in ((num_pairs,), (num_pairs, 1)):
        got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"The labels of {num_pairs} pairs must be a tensor [{num_pairs}], got {got}.")
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(f"Labels must be integers (class indices), got {labels.dtype}.")
    return labels.flatten().long()


def _scalar(value: Tensor, like: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"{name} must be a tensor of one element, got {got}.")
    return value.reshape(()).to(like.device, dtype)


class _Classes:
    """Sums over the pairs of a class; without labels every pair is its own class and nothing is summed."""

    def __init__(self, labels: Tensor | None, rows: Rows, *, mean: bool) -> None:
        self.index: Tensor | None = None
        self.own_index: Tensor | None = None
        if labels is not None:
            _, index, counts = torch.unique(rows.gather(labels), return_inverse=True, return_counts=True)
            self.index, self.own_index, self.counts = index, index[rows.own], counts
            self.mean = mean

    def positives(self, features: Tensor, own: slice) -> Tensor:
        """For every own pair, the mean (or sum) of all pairs' features over its class, given those `[N, d]`."""
        if self.index is None or self.own_index is None:
            return features[own]
        return self._weighted(features, self.index)[self.own_index]

    def spread(self, own_features: Tensor) -> Tensor:
        """For each of all pairs, the mean (or sum) over its class of this process's features; adds up over ranks."""
        assert self.index is not None
        assert self.own_index is not None
        return self._weighted(own_features, self.own_index)[self.index]

    def _weighted(self, features: Tensor, index: Tensor) -> Tensor:
        sums = features.new_zeros(len(self.counts), features.shape[1]).index_add_(0, index, features)
        return sums.div_(self.counts[:, None]) if self.mean else sums

    @property
    def own_positive_pairs(self) -> Tensor | None:
        """For every own pair, the number of texts that are positive for it; None where that is 1 each."""
        return None if self.own_index is None else self.counts[self.own_index]


class _Top:
    """The largest logit of each row or column and where it is; of equal ones the first."""

    def __init__(self, size: int, like: Tensor) -> None:
        self.value = like.new_full((size,), -torch.inf)
        self.index = torch.zeros(size, dtype=torch.long, device=like.device)

    def update(self, at: slice, value: Tensor, index: Tensor) -> None:
        better = value > self.value[at]
        self.value[at] = torch.where(better, value, self.value[at])
        self.index[at] = torch.where(better, index, self.index[at])


class _Tiled(torch.autograd.Function):
    """The loss and the gradients in two sweeps over tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        scale: Tensor,
        bias: Tensor,
        labels: Tensor | None,
        sigmoid: bool,
        tile_size: int,
        group: Group | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = Rows.of(u, group)
        total = rows.total
        if total == 0:
            raise DataError("A contrastive loss needs at least one pair.")
        with torch.autocast(u.device.type, enabled=False):
            all_v = rows.gather(v)
            classes = _Classes(labels, rows, mean=not sigmoid)
            top_text, top_image = _Top(len(u), u), _Top(total, u)
            row_lse, column_lse = u.new_full((len(u),), -torch.inf), u.new_full((total,), -torch.inf)
            softplus = torch.zeros((), dtype=torch.float64, device=u.device)
            for i, j, z in _tiles(u, all_v, scale, bias, tile_size):
                row_top, column_top = z.max(dim=1), z.max(dim=0)
                top_text.update(i, row_top.values, row_top.indices + j.start)
                top_image.update(j, column_top.values, column_top.indices + i.start + rows.offset)
                if sigmoid:
                    softplus += torch.nn.functional.softplus(z, threshold=1e9).sum(dtype=torch.float64)
                else:
                    row_lse[i] = torch.logaddexp(row_lse[i], _logsumexp(z, row_top.values, dim=1))
                    column_lse[j] = torch.logaddexp(column_lse[j], _logsumexp(z, column_top.values, dim=0))

            positive = scale * (u * classes.positives(all_v, rows.own)).sum(dim=1)
            if sigmoid:
                pairs = classes.own_positive_pairs
                positive += bias if pairs is None else bias * pairs
                summed = softplus - positive.sum(dtype=torch.float64)
            else:
                peak = rows.reduce(column_lse.clone(), dist.ReduceOp.MAX)
                column_lse = rows.reduce((column_lse - peak).exp_()).log_().add_(peak)
                own = (row_lse + column_lse[rows.own]).div_(2).sub_(positive + bias)
                summed = own.sum(dtype=torch.float64)
            hits = _hits(top_text, top_image, classes, rows)
            summed, *hits = rows.reduce(torch.stack([summed, *hits])).div_(total).unbind()

        ctx.save_for_backward(u, all_v, scale, bias, row_lse, column_lse)
        ctx.rows, ctx.classes, ctx.sigmoid, ctx.tile_size = rows, classes, sigmoid, tile_size
        outputs = summed.to(u.dtype), hits[0].float(), hits[1].float()
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        u, all_v, scale, bias, row_lse, column_lse = ctx.saved_tensors
        rows, classes = ctx.rows, ctx.classes
        with torch.autocast(u.device.type, enabled=False):
            du, dv = torch.zeros_like(u), torch.zeros_like(all_v)
            sigmoids = torch.zeros((), dtype=torch.float64, device=u.device)
            for i, j, z in _tiles(u, all_v, scale, bias, ctx.tile_size):
                if ctx.sigmoid:
                    g = z.sigmoid_()
                    sigmoids += g.sum(dtype=torch.float64)
                else:
                    g = torch.exp(z - row_lse[i, None])
                    g += z.sub_(column_lse[j]).exp_()
                    g /= 2
                du[i].addmm_(g, all_v[j])
                dv[j].addmm_(g.T, u[i])
            du -= classes.positives(all_v, rows.own)
            if classes.index is not None:
                dv -= classes.spread(u)
            dv = rows.reduce_scatter(dv)
            if classes.index is None:
                dv = dv - u
            factor = grad * rows.size / rows.total
            d_scale = (u * du).sum(dtype=torch.float64).to(scale.dtype) * factor
            du *= scale * factor
            dv *= scale * factor
            d_bias = torch.zeros_like(bias)
            if ctx.sigmoid:
                pairs = classes.own_positive_pairs
                d_bias = (sigmoids - (len(u) if pairs is None else pairs.sum())).to(bias.dtype) * factor
        return du, dv, d_scale, d_bias, None, None, None, None


def _tiles(u: Tensor, v: Tensor, scale: Tensor, bias: Tensor, size: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the rows, the columns and the logits of every tile."""
    for start in range(0, len(u), size):
        i = slice(start, min(start + size, len(u)))
        scaled = u[i] * scale
        for first in range(0, len(v), size):
            j = slice(first, min(first + size, len(v)))
            yield i, j, torch.addmm(bias, scaled, v[j].T)


def _logsumexp(z: Tensor, peak: Tensor, *, dim: int) -> Tensor:
    """The log of the sum of exp(z) along a dimension, given the maxima along it."""
    return (z - peak.unsqueeze(dim)).exp_().sum(dim=dim).log_().add_(peak)


def _hits(top_text: _Top, top_image: _Top, classes: _Classes, rows: Rows) -> list[Tensor]:
    """The numbers of this process's images and texts whose most similar counterpart is theirs."""
    best = rows.reduce(top_image.value.clone(), dist.ReduceOp.MAX)
    candidates = torch.where(top_image.value == best, top_image.index, rows.total)
    images = rows.reduce(candidates, dist.ReduceOp.MIN)[rows.own].clamp_(max=rows.total - 1)
    own = torch.arange(rows.own.start, rows.own.stop, device=images.device)
    texts = top_text.index
    if classes.index is not None:
        assert classes.own_index is not None
        own, texts, images = classes.own_index, classes.index[texts], classes.index[images]
    return [torch.sum(found == own, dtype=torch.float64) for found in (texts, images)]
