"""Image-text contrastive models: two towers that map images and texts into one space."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError, require_integer, unknown_name
from iris_hf.losses.contrastive import ContrastiveKind
from iris_hf.losses.criterion import ContrastiveCriterion
from iris_hf.models.image_spec import ImageSpec
from iris_hf.models.recipe import record

MAX_LOGIT_SCALE = math.log(100)
"""Bound of CLIP's scale, for softmax losses; published SigLIP models lie above it."""

_PARTS = ("image_model", "text_model", "image_projection", "text_projection", "logit_scale")


class ImageTextContrastiveModel(nn.Module):
    """An image tower and a text tower that map into one space, and the loss that trains them.

    Attributes:
        image_model: Maps images to features.
        text_model: Maps tokens to features.
        image_projection: Maps image features into the common space; `Identity` where they are in it already.
        text_projection: The same for text features.
        logit_scale: What similarities are multiplied by, in log space: a parameter `[]`; what counts of it for `clip`
            and `unicl` is at most ln 100.
        logit_bias: What is added after that, a parameter `[]` for `siglip`; otherwise None.
        loss: `clip`, `unicl` or `siglip`.
        criterion: `(features, targets) -> scalar`, where features are what `forward` returns.
        target_type: `image_text`.
        num_classes: None: a class is a text.
        class_names: None.
        image_spec: The images that the image tower takes, or None if unknown.
        tokenizer_name: The name that :func:`iris_hf.create_tokenizer` understands, or None.
    """

    target_type = "image_text"
    num_classes = None
    class_names = None

    def __init__(
        self,
        image_model: nn.Module,
        text_model: nn.Module,
        *,
        loss: ContrastiveKind,
        image_projection: nn.Module | None = None,
        text_projection: nn.Module | None = None,
        logit_scale: float | Tensor | None = None,
        logit_bias: float | Tensor | None = None,
    ) -> None:
        super().__init__()
        siglip = loss == "siglip"
        if logit_scale is None:
            logit_scale = math.log(10) if siglip else math.log(1 / 0.07)
        if logit_bias is None and siglip:
            logit_bias = -10.0
        self.image_model = image_model
        self.text_model = text_model
        self.image_projection = nn.Identity() if image_projection is None else image_projection
        self.text_projection = nn.Identity() if text_projection is None else text_projection
        self.logit_scale = nn.Parameter(_scalar(logit_scale))
        self.logit_bias = None if logit_bias is None else nn.Parameter(_scalar(logit_bias))
        self.loss = loss
        self.criterion = ContrastiveCriterion(loss)
        spec = getattr(image_model, "image_spec", None)
        self.image_spec = spec if isinstance(spec, ImageSpec) else None

    @property
    def tokenizer_name(self) -> str | None:
        """The name of the text tower's tokenizer, or None."""
        return getattr(self.text_model, "tokenizer_name", None)

    @tokenizer_name.setter
    def tokenizer_name(self, name: str | None) -> None:
        self.text_model.tokenizer_name = name  # type: ignore[assignment]

    def forward(self, inputs: tuple[Any, Any]) -> tuple[Tensor, ...]:
        """Map pairs of images and texts to features of length 1.

        In training mode a `logit_scale` above ln 100 is first set back to it, as in CLIP (arXiv 2103.00020); that of
        `siglip` has no bound (arXiv 2303.15343).

        Args:
            inputs: (images, texts): what the two towers take, N of each.

        Returns:
            Image features `[N, F]`, text features `[N, F]`, exp(logit_scale), and for `siglip` the logit_bias.

        Raises:
            DataError: If the inputs are no pair, or the features differ in number or length.
        """
        if not isinstance(inputs, tuple | list) or len(inputs) != 2:
            raise DataError(
                f"An image-text model takes (images, texts), got {type(inputs).__name__}. The transforms of "
                "make_image_text_transform and make_image_caption_transform give such pairs."
            )
        if self.training and self.logit_scale.requires_grad and self.loss != "siglip":
            # .data: a graph that an earlier forward has left, and that saw the same value, stays valid.
            self.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        image_features, text_features = self.encode_image(inputs[0]), self.encode_text(inputs[1])
        if image_features.shape != text_features.shape:
            raise DataError(
                f"The image features have the shape {tuple(image_features.shape)}, the text features "
                f"{tuple(text_features.shape)}. There must be one text for each image, and features of one length: "
                "give make_image_text_contrastive_model image_feature_dim and text_feature_dim to project them."
            )
        scale = self.bounded_logit_scale().exp()
        if self.logit_bias is None:
            return image_features, text_features, scale
        return image_features, text_features, scale, self.logit_bias

    def bounded_logit_scale(self) -> Tensor:
        """Give what counts of the `logit_scale`: at most ln 100 for `clip` and `unicl`."""
        return self.logit_scale if self.loss == "siglip" else self.logit_scale.clamp(max=MAX_LOGIT_SCALE)

    def encode_image(self, images: Any) -> Tensor:
        """Map images to features `[N, F]` of length 1."""
        return nn.functional.normalize(self.image_projection(self.image_model(images)), dim=-1)

    def encode_text(self, texts: Any) -> Tensor:
        """Map tokenized texts to features `[N, F]` of length 1."""
        return nn.functional.normalize(self.text_projection(self.text_model(texts)), dim=-1)

    def training_step(self, inputs: tuple[Any, Any], targets: Tensor | None) -> dict[str, Tensor]:
        """Give the loss of a batch of pairs, and what is worth logging beside it.

        In a training step of several processes, the loss is that of all their pairs together.

        Args:
            inputs: (images, texts), N of each.
            targets: Class indices `[N]` or `[N, 1]`: pairs of one class match each other for `unicl`, which needs
                them, and for `siglip`. `clip` uses none.

        Returns:
            `loss`, `temperature`, and the fractions of images whose best text is theirs (`image_to_text_r1`) and of
            texts whose best image is theirs (`text_to_image_r1`).
        """
        measures: dict[str, Tensor] = self.criterion.measure(self(inputs), targets)
        return measures

    def prediction_step(self, inputs: tuple[Any, Any]) -> Tensor:
        """Give the features of each pair: `[N, 2, F]`, image features at `[:, 0]` and text features at `[:, 1]`.

        Images or texts alone are mapped by the parts that :func:`split_image_text_model` gives.
        """
        image_features, text_features, *_ = self(inputs)
        return torch.stack([image_features, text_features], 1)


class Tower(nn.Module):
    """An encoder and its projection, split off an image-text model.

    Attributes:
        encoder: Maps inputs to features.
        projection: Maps them into the space that images and texts share.
        append_normalizer: Whether features are scaled to length 1.
        feature_dim: Their length F, or None if unknown.
        image_spec: The images that an image encoder takes, otherwise None.
        target_type: None, as for every encoder.
        num_classes: 0, as for every encoder.
        class_names: None, as for every encoder.
    """

    target_type = None
    num_classes = 0
    class_names = None

    def __init__(self, encoder: nn.Module, projection: nn.Module, *, append_normalizer: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection
        self.append_normalizer = append_normalizer
        self.feature_dim = _feature_dim(encoder, projection)
        spec = getattr(encoder, "image_spec", None)
        self.image_spec = spec if isinstance(spec, ImageSpec) else None

    @property
    def tokenizer_name(self) -> str | None:
        """The name of a text encoder's tokenizer, or None."""
        return getattr(self.encoder, "tokenizer_name", None)

    @tokenizer_name.setter
    def tokenizer_name(self, name: str | None) -> None:
        self.encoder.tokenizer_name = name  # type: ignore[assignment]

    @property
    def max_length(self) -> int | None:
        """The largest number of tokens that a text encoder takes, or None."""
        return getattr(self.encoder, "max_length", None)

    def forward(self, inputs: Any) -> Tensor:
        """Map N inputs to features `[N, F]`."""
        features: Tensor = self.projection(self.encoder(inputs))
        return nn.functional.normalize(features, dim=-1) if self.append_normalizer else features


class SplitModel(NamedTuple):
    """What :func:`split_image_text_model` returns; copies throughout.

    Attributes:
        image_model: Maps images to features `[N, F]`.
        text_model: Maps tokens to features `[N, F]`.
        logit_scale: What similarities are multiplied by, in log space, `[]`, as it counts in the model's forward.
    """

    image_model: nn.Module
    text_model: nn.Module
    logit_scale: Tensor


def make_image_text_contrastive_model(
    image_model: nn.Module,
    text_model: nn.Module,
    *,
    loss: ContrastiveKind = "clip",
    image_feature_dim: int | None = None,
    text_feature_dim: int | None = None,
    projection_dim: int | None = 512,
) -> ImageTextContrastiveModel:
    """Make a model for image-text contrastive training from two encoders. Both are copied.

    Args:
        image_model: Maps images to features `[N, F1]`.
        text_model: Maps tokens to features `[N, F2]`.
        loss: `clip` (arXiv 2103.00020): each pair is a class of its own. `unicl` (arXiv 2204.03610): pairs with one
            target are positives of each other. `siglip` (arXiv 2303.15343): a sigmoid for every image and text.
        image_feature_dim: F1. Where it is given, a linear layer maps image features to `projection_dim`; otherwise
            they are taken as they are. Encoders of iris_hf know theirs as `feature_dim`.
        text_feature_dim: F2, the same for text features.
        projection_dim: The dimension of the common space; None projects nothing.

    Raises:
        ConfigError: If the loss is unknown, a dimension is not positive or not that of its encoder, or the features
            would differ in length.
    """
    for name, module in (("image_model", image_model), ("text_model", text_model)):
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{name} must be a torch.nn.Module, got {type(module).__name__}.")
    image_projection = _projection("image", image_model, image_feature_dim, projection_dim)
    text_projection = _projection("text", text_model, text_feature_dim, projection_dim)
    dims = _feature_dim(image_model, image_projection), _feature_dim(text_model, text_projection)
    if None not in dims and dims[0] != dims[1]:
        raise ConfigError(
            f"Image features would have {dims[0]} dimensions and text features {dims[1]}. Project them: "
            f"image_feature_dim={getattr(image_model, 'feature_dim', '...')}, "
            f"text_feature_dim={getattr(text_model, 'feature_dim', '...')}, projection_dim={projection_dim or 512}."
        )
    return record(
        ImageTextContrastiveModel(
            copy.deepcopy(image_model),
            copy.deepcopy(text_model),
            loss=loss,
            image_projection=image_projection,
            text_projection=text_projection,
        ),
        "make_image_text_contrastive_model",
        image_model=image_model,
        text_model=text_model,
        loss=loss,
        image_feature_dim=image_feature_dim,
        text_feature_dim=text_feature_dim,
        projection_dim=projection_dim,
    )


def split_image_text_model(model: nn.Module, *, append_normalizer: bool = True) -> SplitModel:
    """Split an image-text model into its two towers, each with its projection. The model stays as it is.

    The image part keeps `image_spec` for :func:`iris_hf.create_image_transform`, the text part `tokenizer_name` for
    :func:`iris_hf.create_tokenizer`.

    Args:
        model: Has `image_model`, `text_model`, `image_projection`, `text_projection` and `logit_scale`, as every
            image-text model of iris_hf has.
        append_normalizer: Whether the parts scale their features to length 1.

    Raises:
        ConfigError: If the model lacks one of them.
    """
    image, text = (split_tower(model, tower=tower, append_normalizer=append_normalizer) for tower in ("image", "text"))
    scale = model.bounded_logit_scale() if isinstance(model, ImageTextContrastiveModel) else model.logit_scale
    return SplitModel(image, text, scale.detach().clone())  # type: ignore[operator]


def split_tower(model: nn.Module, *, tower: Literal["image", "text"], append_normalizer: bool = True) -> Tower:
    """Copy one tower of an image-text model; see :func:`split_image_text_model`."""
    missing = [name for name in _PARTS if not hasattr(model, name)]
    if missing:
        raise ConfigError(
            f"{type(model).__name__} is no image-text model: it has no {', '.join(missing)}. Make one with "
            "make_image_text_contrastive_model, create_open_clip_model or create_hf_model(target_type='image_text')."
        )
    encoder, projection = copy.deepcopy((getattr(model, f"{tower}_model"), getattr(model, f"{tower}_projection")))
    return record(
        Tower(encoder, projection, append_normalizer=append_normalizer),
        "split_tower",
        model=model,
        tower=tower,
        append_normalizer=append_normalizer,
    )


def choose_loss(loss: ContrastiveKind | None, *, has_bias: bool, what: str) -> ContrastiveKind:
    """The loss of a ready model: a bias of the logits belongs to `siglip`, and to it alone.

    Raises:
        ConfigError: If the loss that was asked for is another.
    """
    known: tuple[ContrastiveKind, ...] = ("siglip",) if has_bias else ("clip", "unicl")
    if loss is None:
        return known[0]
    if loss not in known:
        raise unknown_name(f"contrastive loss of {what} ({'with' if has_bias else 'without'} logit_bias)", loss, known)
    return loss


def _scalar(value: float | Tensor) -> Tensor:
    return value.detach().clone().reshape(()) if isinstance(value, Tensor) else torch.tensor(value)


def _projection(
    what: str, model: nn.Module, feature_dim: int | None, projection_dim: int | None
) -> nn.Linear | nn.Identity:
    for name, dim in ((f"{what}_feature_dim", feature_dim), ("projection_dim", projection_dim)):
        if dim is not None:
            require_integer(name, dim, at_least=1)
    known = getattr(model, "feature_dim", None)
    if feature_dim is not None and isinstance(known, int) and known != feature_dim:
        raise ConfigError(
            f"{what}_feature_dim={feature_dim}, but the features of the {what} model have {known} dimensions."
        )
    if feature_dim is None or projection_dim is None:
        return nn.Identity()
    return nn.Linear(feature_dim, projection_dim)


def _feature_dim(encoder: nn.Module, projection: nn.Module) -> int | None:
    dim = projection.out_features if isinstance(projection, nn.Linear) else getattr(encoder, "feature_dim", None)
    return dim if isinstance(dim, int) else None
