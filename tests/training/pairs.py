"""Small two-tower models and pairs, for tests of the gradient cache."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from iris_hf.losses.criterion import ContrastiveCriterion


class Pairs(torch.utils.data.Dataset):
    """`((image [6], text [4]), class)` in float64."""

    def __init__(self, num_examples: int = 13, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(num_examples, 6, generator=generator, dtype=dtype)
        self.texts = torch.randn(num_examples, 4, generator=generator, dtype=dtype)
        self.labels = torch.arange(num_examples) % 5

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.images[index], self.texts[index]), self.labels[index]

    def batch(self, at: slice = slice(None)) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.images[at], self.texts[at]), self.labels[at]


class StochasticDepth(nn.Module):
    """Leaves out examples at random (arXiv 1603.09382), in a form that torch.compile takes whole."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, features: Tensor) -> Tensor:
        return features * nn.functional.dropout(features.new_ones(len(features), 1), self.p, self.training)


class TwoTowers(nn.Module):
    """Two perceptrons, perhaps with a layer in common, a scale and, for siglip, a bias."""

    def __init__(
        self,
        kind: str = "clip",
        *,
        dropout: float = 0.0,
        norm: bool = False,
        tied: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)

            def tower(size: int) -> nn.Sequential:
                layers = [nn.Linear(size, 8), nn.Tanh(), nn.Dropout(dropout), StochasticDepth(dropout)]
                return nn.Sequential(*layers, nn.BatchNorm1d(8) if norm else nn.Identity())

            self.image_model, self.text_model = tower(6), tower(4)
            self.image_projection = nn.Linear(8, 5)
            self.text_projection = self.image_projection if tied else nn.Linear(8, 5)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0)) if kind == "siglip" else None
        self.criterion = ContrastiveCriterion(kind, tile_size=3)
        self.to(dtype)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        images, texts = [tensor.to(self.logit_scale.dtype) for tensor in inputs]
        u = normalize(self.image_projection(self.image_model(images)), dim=-1)
        v = normalize(self.text_projection(self.text_model(texts)), dim=-1)
        bias = () if self.logit_bias is None else (self.logit_bias,)
        return (u, v, self.logit_scale.exp(), *bias)


class GatheredLoss(nn.Module):
    """A criterion that knows nothing of processes, with a parameter of its own and a scalar feature."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, features: dict[str, Tensor], targets: Tensor) -> Tensor:
        logits = features["scale"] * features["image"] @ features["text"].T
        same = (targets[:, None] == targets[None, :]).to(logits.dtype)
        return nn.functional.binary_cross_entropy_with_logits(self.weight * logits, same) + self.weight**2


class DictTowers(TwoTowers):
    """The same towers, whose features are a dict."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.criterion = GatheredLoss()

    def forward(self, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        image, text, scale = super().forward(inputs)
        return {"image": image, "text": text, "scale": scale}


class FunctionTowers(TwoTowers):
    """The same towers, whose criterion is a method that uses a parameter of the model."""

    def __init__(self) -> None:
        super().__init__()
        del self._modules["criterion"]

    def forward(self, inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        return list(super().forward(inputs)[:2])

    def criterion(self, features: list[Tensor], targets: Any) -> Tensor:
        logits = self.logit_scale.exp() * features[0] @ features[1].T
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def calibrated() -> TwoTowers:
    """Frozen towers, of which the temperature alone is trained."""
    model = TwoTowers().requires_grad_(False)
    model.logit_scale.requires_grad_(True)
    return model


def full_batch_gradients(model: nn.Module, inputs: Any, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a whole batch, and every gradient, by plain autograd on a copy of the model."""
    model = copy.deepcopy(model)
    loss = model.criterion(model(inputs), targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
