"""Naive contrastive losses, with the whole matrix of logits, as oracles; and pairs to compute them on."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize

NUM_PAIRS, DIM = 13, 5
LABELS = {
    "none": None,
    "distinct": torch.arange(NUM_PAIRS) * 7 - 3,
    "duplicates": torch.tensor([4, -1, 4, 0, 9, 9, 9, 0, 2, 4, 1, 9, -1]),
    "one": torch.full((NUM_PAIRS,), 3),
}
SCALES = {"cold": 100.0, "warm": 14.3, "hot": 0.5}


def naive(kind: str, u: Tensor, v: Tensor, scale: Tensor, bias: Tensor, labels: Tensor | None) -> Tensor:
    """The loss as the papers have it."""
    logits = scale * u @ v.T + bias
    n = len(u)
    if labels is None or kind == "clip":
        labels = torch.arange(n)
    positive = (labels.reshape(-1, 1) == labels.reshape(1, -1)).to(u.dtype)
    if kind == "siglip":
        return -logsigmoid(logits * (2 * positive - 1)).sum() / n
    share = positive / positive.sum(dim=1, keepdim=True)
    return (cross_entropy(logits, share) + cross_entropy(logits.T, share)) / 2


def pairs(
    num_pairs: int = NUM_PAIRS, dim: int = DIM, *, scale: float = 14.3, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Unit features of images and texts, the scale and a bias; all leaves that require gradients."""
    generator = torch.Generator().manual_seed(0)
    u, v = (normalize(torch.randn(num_pairs, dim, dtype=dtype, generator=generator), dim=1) for _ in range(2))
    tensors = [u, v, torch.tensor(scale, dtype=dtype), torch.tensor(-2.0, dtype=dtype)]
    return [tensor.requires_grad_() for tensor in tensors]
