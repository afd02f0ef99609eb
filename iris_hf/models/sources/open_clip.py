"""Image-text models of open_clip, as two towers, and tokenizers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError, unknown_name
from iris_hf.models.batching import ImageBatch
from iris_hf.models.classifier import ImageEncoder
from iris_hf.models.image_spec import ImageSpec, make_image_spec
from iris_hf.models.recipe import record

_RESIZE = {"shortest": "crop", "squash": "squash"}


class ImageTextModel(nn.Module):
    """An image tower and a text tower that map into one space.

    Attributes:
        image_model: Maps images `[N, 3, H, W]` in [0, 1] to features `[N, F]`.
        text_model: Maps tokens `[N, L]` to features `[N, F]`.
        logit_scale: What similarities are multiplied by, in log space.
        logit_bias: What is added to them after that (SigLIP), or None.
        target_type: `image_text`.
        num_classes: None: a class is a text.
        class_names: None.
        image_spec: The images it takes.
        tokenizer_name: The name that :func:`create_tokenizer` understands.
    """

    target_type = "image_text"
    num_classes = None
    class_names = None

    def __init__(
        self,
        image_model: ImageEncoder,
        text_model: nn.Module,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        tokenizer_name: str,
    ) -> None:
        super().__init__()
        self.image_model = image_model
        self.text_model = text_model
        self.logit_scale = nn.Parameter(logit_scale.detach().clone())
        self.logit_bias = None if logit_bias is None else nn.Parameter(logit_bias.detach().clone())
        self.image_spec = image_model.image_spec
        self.tokenizer_name = tokenizer_name

    def forward(self, inputs: tuple[ImageBatch, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Map (images, tokens) to image features `[N, F]`, text features `[N, F]`, both of length 1, and exp(scale)."""
        images, tokens = inputs
        image_features = nn.functional.normalize(self.image_model(images), dim=-1)
        text_features = nn.functional.normalize(self.text_model(tokens), dim=-1)
        return image_features, text_features, self.logit_scale.exp()


def create_open_clip_model(
    name: str,
    *,
    pretrained: str | None = None,
    config: Mapping[str, Any] | None = None,
    image_spec: ImageSpec | Mapping[str, Any] | None = None,
) -> ImageTextModel:
    """Make an open_clip model that takes images in [0, 1].

    Args:
        name: An architecture that open_clip knows, such as `ViT-B-32`.
        pretrained: A tag of weights that open_clip fetches, such as `laion2b_s34b_b79k`, or a local file; None for
            random weights.
        config: Changes to the architecture, as in open_clip's own JSON files:
            `{"embed_dim": 64, "vision_cfg": {"layers": 2}, "text_cfg": {"layers": 2}}`.
        image_spec: Fields of :class:`iris_hf.models.image_spec.ImageSpec` to change.

    Raises:
        ConfigError: If the name, or a part of the configuration, is unknown, or the model has no two plain towers.
        DataError: If the weights cannot be had.
    """
    import open_clip

    if name not in open_clip.list_models():
        raise unknown_name("open_clip model", name, open_clip.list_models())
    architecture = _merge(open_clip.get_model_config(name), config or {})
    if "multimodal_cfg" in architecture:
        raise ConfigError(f"{name} is a captioner (CoCa) rather than two towers. Choose a CLIP or SigLIP model.")
    architecture.pop("custom_text", None)
    if pretrained is not None and not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            raise unknown_name(f"pretrained weights of {name} (no such file either)", pretrained, tags)
    try:
        whole = open_clip.create_model(
            name,
            pretrained=pretrained,
            force_custom_text=True,
            pretrained_text=False,
            **architecture,
        )
    except TypeError as error:
        raise ConfigError(f"The config {config} does not fit {name}: {error}.") from error
    except Exception as error:
        raise DataError(f"open_clip cannot make {name} with pretrained={pretrained!r}: {error}") from error

    known = whole.visual.preprocess_cfg
    height, width = (known["size"],) * 2 if isinstance(known["size"], int) else known["size"]
    fields = {k: known[k] for k in ("mean", "std", "interpolation")}
    fields.update(height=height, width=width, resize=_RESIZE.get(known["resize_mode"], "squash"))
    spec = make_image_spec(fields, image_spec)
    model = ImageTextModel(
        ImageEncoder(whole.visual, spec), whole.text, whole.logit_scale, whole.logit_bias, tokenizer_name=name
    )
    return record(model, "create_open_clip_model", name=name, config=config, image_spec=spec)


class Tokenizer:
    """Turns a text into tokens of one length. Picklable. Made by :func:`create_tokenizer`.

    Attributes:
        name: Where it comes from.
    """

    def __init__(self, name: str, function: Any, *, transformers: bool) -> None:
        self.name = name
        self._function = function
        self._transformers = transformers

    def __call__(self, text: str | Sequence[str]) -> Any:
        """Tokenize.

        Args:
            text: One text, or N.

        Returns:
            int64 tokens `[L]`, or `[N, L]` for N texts. A tokenizer of transformers gives a dict of such tensors,
            `input_ids` and `attention_mask` among them.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if self._transformers:
            encoded = self._function(texts, padding="max_length", truncation=True, return_tensors="pt")
            return {k: v[0] if isinstance(text, str) else v for k, v in encoded.items()}
        tokens: Tensor = self._function(texts)
        return tokens[0] if isinstance(text, str) else tokens


def create_tokenizer(name_or_model: str | nn.Module) -> Tokenizer:
    """Make the tokenizer of a model.

    Args:
        name_or_model: A model of :func:`create_open_clip_model`; the name of an open_clip architecture; or a
            repository or local folder with a tokenizer of transformers.

    Raises:
        ConfigError: If the model has no tokenizer, or the name stands for none.
    """
    import open_clip

    name = name_or_model if isinstance(name_or_model, str) else getattr(name_or_model, "tokenizer_name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{type(name_or_model).__name__} has no tokenizer. Pass the name of one.")
    if name in open_clip.list_models():
        return Tokenizer(name, open_clip.get_tokenizer(name), transformers=False)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ConfigError(
            f"{name!r} is no architecture of open_clip, and transformers finds no tokenizer there: {error}"
        ) from error
    if tokenizer.model_max_length > 100_000:  # transformers' way of saying that it does not know
        tokenizer.model_max_length = 77
    return Tokenizer(name, tokenizer, transformers=True)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else copy.deepcopy(value)
    return merged
