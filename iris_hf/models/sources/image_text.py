"""Image-text models of transformers as two towers, and back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from iris_hf.losses.contrastive import ContrastiveKind
from iris_hf.models.classifier import ImageEncoder
from iris_hf.models.contrastive import ImageTextContrastiveModel, choose_loss
from iris_hf.models.image_spec import ImageSpec
from iris_hf.models.text_encoder import Pooling, TextEncoder

_CLIP_IMAGES = {
    "resize": "crop",
    "interpolation": "bicubic",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}


@dataclass(frozen=True)
class ImageTextType:
    """What is to be known of a model type with `vision_model` and `text_model`.

    Attributes:
        pooling: How the text tower's output becomes one vector.
        image_fields: Fields of an ImageSpec for a model without an image processor.
    """

    pooling: Pooling
    image_fields: dict[str, Any]


IMAGE_TEXT_TYPES = {
    "align": ImageTextType("cls", {}),
    "altclip": ImageTextType("pooler", _CLIP_IMAGES),
    "chinese_clip": ImageTextType("cls", _CLIP_IMAGES),
    "clip": ImageTextType("pooler", _CLIP_IMAGES),
    "metaclip_2": ImageTextType("pooler", _CLIP_IMAGES),
    "siglip": ImageTextType("pooler", {"resize": "squash", "interpolation": "bicubic"}),
}
"""Types of models by their `model_type`. SigLIP 2 with images of one size is `siglip`, too.

ALIGN divides by a temperature. Its `logit_scale` is saved as that, and comes back within rounding.
"""

_MODULES = {
    "vision_model": "image_model.network",
    "text_model": "text_model.network",
    "visual_projection": "image_projection",
    "text_projection": "text_projection",
}


def to_towers(
    network: Any, image_spec: ImageSpec, *, loss: ContrastiveKind | None, tokenizer_name: str | None
) -> ImageTextContrastiveModel:
    """Make an image-text model of the parts of a transformers model, which are not copied.

    Raises:
        ConfigError: If the loss is not for this model.
    """
    settings = network.config
    image_projection, text_projection = (getattr(network, n, None) for n in ("visual_projection", "text_projection"))
    vision, text = settings.vision_config, settings.text_config
    image_dim = vision.hidden_size if hasattr(vision, "hidden_size") else settings.projection_dim
    text_dim = text.projection_size if text_projection is None else text_projection.in_features
    pooling = IMAGE_TEXT_TYPES[settings.model_type].pooling
    if pooling == "cls" and getattr(network.text_model, "pooler", None) is not None:
        network.text_model.pooler.requires_grad_(False)  # ALIGN has one and uses it for nothing
    has_temperature = hasattr(network, "temperature")
    bias = getattr(network, "logit_bias", None)
    model = ImageTextContrastiveModel(
        ImageEncoder(network.vision_model, image_spec, output="pooler_output", feature_dim=image_dim),
        TextEncoder(
            network.text_model,
            pooling=pooling,
            feature_dim=text_dim,
            max_length=longest_text(network.text_model, text),
            tokenizer_name=tokenizer_name,
        ),
        loss=choose_loss(loss, has_bias=bias is not None, what=settings.model_type),
        image_projection=image_projection,
        text_projection=text_projection,
        logit_scale=-network.temperature.log() if has_temperature else network.logit_scale,
        logit_bias=bias,
    )
    model._hf_config = copy.deepcopy(settings)
    return model


def from_towers(model: ImageTextContrastiveModel) -> Any:
    """Put the transformers model together again, of the same parts; None for models from elsewhere."""
    from transformers import AutoModelForZeroShotImageClassification

    settings = model.__dict__.get("_hf_config")
    if settings is None:
        return None
    with torch.device("meta"):
        network = AutoModelForZeroShotImageClassification.from_config(settings, trust_remote_code=False)
    for theirs, ours in _MODULES.items():
        if hasattr(network, theirs):
            setattr(network, theirs, model.get_submodule(ours))
    scalars = {
        "logit_scale": model.logit_scale,
        "temperature": (-model.logit_scale).exp(),
        "logit_bias": model.logit_bias,
    }
    for name, value in scalars.items():
        if hasattr(network, name) and value is not None:
            setattr(network, name, nn.Parameter(value.detach().reshape(getattr(network, name).shape)))
    return network


def longest_text(network: nn.Module, settings: Any) -> int | None:
    """The largest number of tokens that a text model of transformers takes, or None without a bound."""
    limit: int | None = getattr(settings, "max_position_embeddings", None)
    for name, module in network.named_modules():
        # RoBERTa counts positions from the padding index on
        if (
            limit is not None
            and name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return limit - module.padding_idx - 1  # type: ignore[no-any-return]
    return limit
