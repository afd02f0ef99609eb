"""What images a model takes, and the normalisation that lives inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, require_integer, require_number, unknown_name

ResizeRule = Literal["crop", "squash", "fit"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """The images that a model takes. Every model made by iris_hf carries one as `image_spec`.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        resize: How an image gets that size. `crop`: the image is scaled until `crop_fraction` of it covers height and
            width, and its centre is cut out. `squash`: the same, but each edge is scaled by itself, so that with
            `crop_fraction=1` all of the image is squeezed into height and width. `fit`: it keeps its shape; its
            shorter edge becomes the smaller of height and width, unless its longer edge would then exceed the larger.
        crop_fraction: For `crop` and `squash`, the part of the scaled image that is kept along an edge, in (0, 1].
        multiple_of: For `fit`, edges are then rounded down to multiples of this, as YOLOS needs it.
        interpolation: Of the scaling.
        mean: Subtracted from each channel, in units of [0, 1] images.
        std: What each channel is divided by after that.
        channels: The order that the network expects; images are `rgb` outside the model, always.
        variable_size: Whether the network takes images of other sizes, too.
    """

    height: int
    width: int
    resize: ResizeRule = "squash"
    crop_fraction: float = 1.0
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    channels: Literal["rgb", "bgr"] = "rgb"
    variable_size: bool = False
    multiple_of: int = 1

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = getattr(self, name)
            try:
                values = tuple(float(v) for v in given)
            except (TypeError, ValueError):
                values = ()
            if len(values) != 3:
                raise ConfigError(f"image_spec: {name} needs three values, got {given!r}.")
            object.__setattr__(self, name, values)
        for name in ("height", "width", "multiple_of"):
            require_integer(f"image_spec: {name}", getattr(self, name), at_least=1)
        require_number("image_spec: crop_fraction", self.crop_fraction)
        if min(self.std) <= 0:
            raise ConfigError(f"image_spec: std must be positive, got {self.std}.")
        if not 0 < self.crop_fraction <= 1:
            raise ConfigError(f"image_spec: crop_fraction must be in (0, 1], got {self.crop_fraction}.")
        for name, known in (
            ("resize", get_args(ResizeRule)),
            ("interpolation", get_args(Interpolation)),
            ("channels", ("rgb", "bgr")),
        ):
            if getattr(self, name) not in known:
                raise unknown_name(f"image_spec {name}", getattr(self, name), known)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image of this height and width is scaled to, before any crop.

        Edges are rounded as torchvision, timm and the image processors of transformers round them.
        """
        if self.resize == "fit":
            return self._fitted(height, width)
        scaled = _scaled(self.height, self.crop_fraction), _scaled(self.width, self.crop_fraction)
        if self.resize == "squash":
            return scaled
        if scaled[0] * width >= scaled[1] * height:  # the height decides
            return scaled[0], max(self.width, scaled[0] * width // height)
        return max(self.height, scaled[1] * height // width), scaled[1]

    def _fitted(self, height: int, width: int) -> tuple[int, int]:
        short, long = sorted((height, width))
        exact, longest = map(float, sorted((self.height, self.width)))
        if long / short * exact > longest:
            exact = longest * short / long
        new_short, new_long = (
            max(self.multiple_of, edge - edge % self.multiple_of)
            for edge in (round(exact), int(exact * long / short) if round(exact) != short else long)
        )
        return (new_short, new_long) if height <= width else (new_long, new_short)


def _scaled(edge: int, crop_fraction: float) -> int:
    return int(edge / crop_fraction + 1e-6)


def make_image_spec(known: Mapping[str, Any], override: ImageSpec | Mapping[str, Any] | None) -> ImageSpec:
    """Lay the fields that a caller gave over those that are known of the model.

    Args:
        known: Fields of :class:`ImageSpec`; `height` and `width` may be missing if the caller gives them.
        override: A whole specification, or some of its fields. Another `resize` keeps all of the image, unless it
            comes with a `crop_fraction`.

    Raises:
        ConfigError: If a field is unknown or wrong, or the size stays unknown.
    """
    if isinstance(override, ImageSpec):
        return override
    if override is not None and not isinstance(override, Mapping):
        raise ConfigError(f"image_spec must be an ImageSpec or a mapping such as {{'height': 64}}, got {override!r}.")
    fields = {f.name for f in dataclasses.fields(ImageSpec)}
    for name in override or {}:
        if name not in fields:
            raise unknown_name("image_spec field", name, fields)
    merged = {**known, **(override or {})}
    if merged.get("resize") != known.get("resize") and "crop_fraction" not in (override or {}):
        merged["crop_fraction"] = 1.0
    if not {"height", "width"} <= merged.keys():
        raise ConfigError(
            "The size of the images is not known for this model. Pass it: image_spec={'height': 224, 'width': 224}."
        )
    return ImageSpec(**merged)


def is_whole(override: ImageSpec | Mapping[str, Any] | None) -> bool:
    """Whether nothing but what a caller gave is asked for."""
    return isinstance(override, ImageSpec) or {f.name for f in dataclasses.fields(ImageSpec)} <= set(override or ())


class Normalize(nn.Module):
    """`(images - mean) / std` for images `[..., 3, H, W]` in [0, 1], in the type that the module was converted to.

    Mean and standard deviation are saved with the model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        self.bgr = spec.channels == "bgr"
        self.register_buffer("mean", torch.tensor(spec.mean).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images, and turn the channels where the network wants blue first."""
        if self.bgr:
            images = images.flip(-3)
        return ((images - self.mean) / self.std).to(self.mean.dtype)
