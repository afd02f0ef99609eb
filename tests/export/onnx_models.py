"""Models for tests of the export, beside the families of the models' tests."""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models.families import IMAGE_TEXT, NAMES, make
from torch import nn

from iris_hf.export.cases import Case, run_exactly
from iris_hf.export.check import compare, distance
from iris_hf.export.graph import Graph
from iris_hf.models.classifier import ImageClassifier, append_classifier
from iris_hf.models.contrastive import split_image_text_model
from iris_hf.models.feature_extractor import make_feature_extractor_model
from iris_hf.models.sources.timm import create_timm_model


def _has(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


HAS_RUNTIME = _has("onnx", "onnxruntime")
HAS_ONNXSCRIPT = HAS_RUNTIME and _has("onnxscript")
HAS_OPTIMUM = HAS_RUNTIME and _has("optimum") and _has("optimum.onnxruntime")
"""True on the transformers 4 line."""


class Stepped(nn.Module):
    """A user's own model: a prediction step over a forward that gives logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.norm(self.conv(images)).relu().mean((2, 3))))

    def prediction_step(self, images: torch.Tensor) -> torch.Tensor:
        return self(images).softmax(1)


class Baked(Stepped):
    """Its forward holds on to the batch size it was traced with."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.norm(self.conv(images)).relu().reshape(int(images.shape[0]), 4, -1)
        return self.head(features.mean(2))


class Sampled(Stepped):
    """Its forward turns a value of the inputs into a Python number."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * float(images.max() * 10 + images.mean())


class Faint(Stepped):
    """Like that, with outputs of some thousandths."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * 1e-5 * float(images.sum())


class Cancelling(nn.Module):
    """Two large numbers that leave a small one, mostly rounding."""

    def __init__(self, num_outputs: int, large: float) -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_outputs, bias=False)
        nn.init.normal_(self.linear.weight, std=1e-4, generator=torch.Generator().manual_seed(0))
        self.large = large

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features + self.large) - self.linear(self.large * torch.ones_like(features))


class Unlikely(Stepped):
    """Its logits are large, and its probabilities about 0.02."""

    target_type = "multilabel"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + 1000

    def prediction_step(self, images: torch.Tensor) -> torch.Tensor:
        return (self(images) - 1004).sigmoid()


class Masking(Stepped):
    """It calls its outputs as segmenters do: several masks for a pixel, and one probability for each."""

    def prediction_step(self, images: torch.Tensor) -> Any:
        masks = (images.mean(1, keepdim=True) > torch.tensor([0.2, 0.4])[:, None, None]).float()
        return {"probabilities": masks.mean((2, 3)), "masks": masks}


class Moving(nn.Module):
    """Boxes to boxes."""

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"boxes": inputs["boxes"] + 1, "given": inputs["boxes"]}


class Dropping(Stepped):
    """Its dropout stays on in evaluation mode."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super().forward(images), 0.5, training=True)


class Noisy(Sampled):
    """A number of the inputs is written down as a constant, and noise hides it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + torch.randn(len(images), 3)


class Squeezed(Stepped):
    """Its outputs lose every axis of length 1, the batch's too."""

    def prediction_step(self, images: torch.Tensor) -> torch.Tensor:
        return self(images)[:, :1].squeeze()


class Scaled(Stepped):
    """What it predicts is no probability."""

    def prediction_step(self, images: torch.Tensor) -> torch.Tensor:
        return self(images) * 100 + 5


class Headless(Stepped):
    """Where others give a second tensor, it gives None."""

    def prediction_step(self, images: torch.Tensor) -> Any:
        return self(images), None


class Listing(Stepped):
    """Its prediction step gives a list with an item per image."""

    def prediction_step(self, images: torch.Tensor) -> Any:
        return list(self(images).softmax(1))


class Naming(Stepped):
    """Its prediction step gives a dict with a tuple in it."""

    def prediction_step(self, images: torch.Tensor) -> Any:
        logits = self(images)
        return {"classes": logits.argmax(1), "best": (logits.amax(1), logits)}


class TokenTower(nn.Module):
    """A text tower that takes a tensor of tokens."""

    context_length = 7

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embedding(tokens)).mean(1)


class TokensFirst(nn.Module):
    """Attention as torch has it and open_clip uses it: inside, the batch is the second axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.conv(images).flatten(2).transpose(1, 2))
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1)


class MaskedTower(nn.Module):
    """A text tower that takes a dict of tokens and mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 8)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = inputs["attention_mask"][..., None]
        return (self.embedding(inputs["input_ids"]) * mask).sum(1) / mask.sum(1)


class CountingTower(MaskedTower):
    """It holds on to the number of tokens it was traced with."""

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().forward(inputs) * int(inputs["input_ids"].shape[1])


class Pair(nn.Module):
    """Two towers: (images, tokens) -> features of both and the scale."""

    target_type = "image_text"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image_model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.text_model = TokenTower()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        images = nn.functional.normalize(self.image_model(inputs[0]), dim=-1)
        texts = nn.functional.normalize(self.text_model(inputs[1]), dim=-1)
        return images, texts, self.logit_scale.exp()


def zero_shot() -> ImageClassifier:
    """A zero-shot classifier: a plain linear layer of text features behind an encoder."""
    torch.manual_seed(0)
    encoder = create_timm_model("resnet10t")
    layer = nn.Linear(512, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(nn.functional.normalize(layer.weight, dim=1) * 14)
    return append_classifier(encoder, layer, task_type="multiclass_classification")


def features() -> Any:
    """A feature extractor: the output of a part in the middle of a network."""
    return make_feature_extractor_model(make("timm-resnet"), output_module_name="network.network.layer2")


def tower(name: str, part: int) -> Any:
    """The image part (0) or the text part (1) of an image-text model."""
    return split_image_text_model(make(name))[part]


def _timm(name: str) -> Any:
    torch.manual_seed(0)
    return create_timm_model(name, num_classes=3, class_names=NAMES)


KINDS_OF_TIMM = {
    f"timm-{kind}": functools.partial(_timm, f"test_{kind}")
    for kind in ("byobnet", "convnext", "efficientnet", "mambaout", "nfnet", "vit_relpos")
}
"""Networks of timm of several kinds, small."""

FURTHER = {
    **KINDS_OF_TIMM,
    "zero-shot classifier": zero_shot,
    "feature extractor": features,
    **{f"{name}, image part": functools.partial(tower, name, 0) for name in IMAGE_TEXT},
    **{f"{name}, text part": functools.partial(tower, name, 1) for name in IMAGE_TEXT},
}
"""Models that are exported beside those of `models.families`."""


def enliven(model: Any, size: int = 32) -> Any:
    """Draw all weights anew and let batch norms measure images, the same at every call.

    Outputs then vary with the images, and few scores are nearly equal: some networks begin with weights so small that
    their outputs are constant, or with batch norms that multiply by (nearly) zero.
    """
    generator = torch.Generator().manual_seed(3)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad(), torch.random.fork_rng():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("logit_scale"):
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
        for norm in norms:
            norm.weight.fill_(1)
        if norms and model.target_type is not None and model.target_type != "image_text":
            torch.manual_seed(0)
            for norm in norms:
                norm.momentum = None  # the average over all batches, here one
            edge = 128 if model.image_spec.variable_size else size  # many pixels even where they are fewest
            model.train()(torch.rand(16, 3, edge, edge, generator=generator))
            for norm in norms:
                norm.running_var.clamp_(min=0.01)
    return model.eval()


def far_from_exact(graph: Graph, exact: Graph, cases: Sequence[Case], file: Path) -> tuple[float, float]:
    """The largest error of torch and of ONNX Runtime, both in float32, against the same model in float64."""
    truths = [run_exactly(exact, case) for case in cases]
    in_torch = [
        distance(graph, name, truth, case.outputs)[0]
        for case, truth in zip(cases, truths, strict=True)
        for name in graph.output_names
    ]
    in_onnx = compare(graph, file, truths, precision="fp32", tolerance=None).errors
    return max(in_torch), max(in_onnx.values())
