"""What image processors and configurations of transformers say of the images that a model takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from iris_hf.errors import DataError
from iris_hf.models.image_spec import ImageSpec, Normalize
from iris_hf.models.sources.configurations import config_beside
from iris_hf.models.sources.image_text import IMAGE_TEXT_TYPES
from iris_hf.models.sources.timm import fields_of_timm
from iris_hf.models.transforms import create_image_transform
from iris_hf.models.trust.configurations import CODE_KEYS

RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as processors store them."""

YOLOS_MULTIPLE = 16
"""What the image processor of YOLOS rounds edges to, whatever the size of patches."""


def load_processor(source: str) -> Any:
    """The image processor of a repository or folder, or None if it has none."""
    import transformers
    from transformers import AutoImageProcessor, ImageProcessingMixin

    try:
        ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:
        return None
    slow = {"use_fast": False} if transformers.__version__.startswith("4.") else {}
    try:
        settings = config_beside(Path(source))
        processor = AutoImageProcessor.from_pretrained(source, config=settings, trust_remote_code=False, **slow)
    except Exception as error:
        raise DataError(f"The image processor of {source!r} cannot be loaded: {error}") from error
    for key in (*CODE_KEYS, "image_processor"):  # a saved one would be read in place of what is around it
        processor.__dict__.pop(key, None)
    return processor


def describe_processor(processor: Any) -> tuple[dict[str, Any], str | None]:
    """What an image processor does, as fields of an ImageSpec, or what it does that no fields say."""
    fields: dict[str, Any] = {}
    difference = _find_odd_value(processor)
    try:
        fields = {} if difference else fields_of_processor(processor)
        difference = difference or find_difference(processor, fields)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # of values that a repository gave
        difference = f"its settings make no image_spec, {type(error).__name__}: {error}"
    return ({} if difference else fields), difference


def _find_odd_value(processor: Any) -> str | None:
    """What a setting of the normalisation is that it cannot be, or None."""
    for name, what in (("image_mean", "three numbers"), ("image_std", "three positive numbers")):
        value = getattr(processor, name, None)
        if value is None or not getattr(processor, "do_normalize", False):
            continue
        are_three = isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))
        if not are_three or (name == "image_std" and min(value) <= 0):
            return f"its {name} is {value!r}, and must be {what}"
    factor = getattr(processor, "rescale_factor", None)
    if factor is not None and getattr(processor, "do_rescale", False) and not (_is_number(factor) and factor > 0):
        return f"its rescale_factor is {factor!r}, and must be a positive number"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fields_of_processor(processor: Any) -> dict[str, Any]:
    """What an image processor does, as fields of an ImageSpec."""

    def get(name: str, default: Any = None) -> Any:
        value = getattr(processor, name, None)
        return default if value is None else value

    factor = 255 * get("rescale_factor", 1 / 255) if get("do_rescale", False) else 255.0
    offset = 1.0 if get("rescale_offset", False) else 0.0
    normalizes = get("do_normalize", False)
    mean = get("image_mean", [0.5] * 3) if normalizes else [0.0] * 3
    std = get("image_std", [0.5] * 3) if normalizes else [1.0] * 3
    fields: dict[str, Any] = {
        "mean": tuple((m + offset) / factor for m in mean),
        "std": tuple(s / factor for s in std),
        "interpolation": RESAMPLE.get(int(get("resample", 2)), "bilinear"),
        "channels": "bgr" if get("do_flip_channel_order", False) else "rgb",
    }
    if get("include_top", False) and normalizes:  # EfficientNet divides by the deviation a second time
        fields["std"] = tuple(a * b for a, b in zip(fields["std"], std, strict=True))
    size = {k: v for k, v in dict(get("size", {})).items() if v is not None}
    crop = {k: v for k, v in dict(get("crop_size", {})).items() if v is not None}
    kind = type(processor).__name__
    short = size.get("shortest_edge")
    if short and kind.startswith("Levit"):
        short = int(256 / 224 * short)
    if kind.startswith("PoolFormer") and get("crop_pct") is not None:
        short = int((short or size["height"]) / get("crop_pct"))
    if get("do_center_crop", False) and crop:
        scaled = short or size.get("height", crop["height"])
        fields.update(height=crop["height"], width=crop["width"], resize="crop" if short else "squash")
        fields["crop_fraction"] = min(1.0, crop["height"] / scaled)
    elif "height" in size:
        fields.update(height=size["height"], width=size["width"], resize="squash")
    elif short and "longest_edge" in size:
        fields.update(height=short, width=size["longest_edge"], resize="fit")
        if kind.startswith("Yolos"):
            fields["multiple_of"] = YOLOS_MULTIPLE
    elif short and get("crop_pct") is not None:  # ConvNeXt
        squash = short >= 384
        fields.update(height=short, width=short, resize="squash" if squash else "crop")
        fields["crop_fraction"] = 1.0 if squash else get("crop_pct")
    elif short:
        fields.update(height=short, width=short, resize="crop")
    return fields


def find_difference(processor: Any, fields: Mapping[str, Any]) -> str | None:
    """What an image processor does to a picture that the transform of :func:`fields_of_processor` does not, or None.

    There are more processors than anyone has read, each with switches of its own: it is tried instead.
    """
    if not {"height", "width"} <= fields.keys():
        return "it has no size of images"
    spec = ImageSpec(**fields)
    across, down = np.meshgrid(np.linspace(0, 255, 91), np.linspace(0, 255, 53))
    picture = PIL.Image.fromarray(np.stack([across, down, (across + 255 - down) / 2], -1).round().astype(np.uint8))
    try:
        made = processor(picture, return_tensors="np")
        theirs = torch.from_numpy(np.asarray(made["pixel_values"])[0])
        if "pixel_mask" in made:  # padded to one size: our detectors do that themselves
            rows, columns = (np.asarray(made["pixel_mask"])[0].any(axis).sum() for axis in (1, 0))
            theirs = theirs[:, :rows, :columns]
    except Exception as error:  # of a library, on values that a repository gave
        return f"it fails on an image with {type(error).__name__}: {error}"
    ours = Normalize(spec)(create_image_transform(spec)(picture))
    if theirs.shape != ours.shape:
        sizes = tuple(theirs.shape), tuple(ours.shape[1:])
        return f"of an image of 53 x 91 pixels it makes {sizes[0]} where its settings read as {sizes[1]}"
    off = ((theirs - ours).abs().mean((1, 2)) * torch.tensor(spec.std)).max().item()
    # Resampling differs by less than 0.002 between libraries; a crop may be off by a pixel.
    if off > 0.005 + 0.5 / min(ours.shape[1:]):
        return f"its pixels are {off:.3f} from what its settings read as, in units of [0, 1]"
    return None


def fields_of_config(settings: Any, target_type: str, network: Any) -> dict[str, Any]:
    """What is known of the images where there is a configuration but no image processor.

    Raises:
        DataError: If it is one of timm's, and describes no images.
    """
    if settings.model_type == "timm_wrapper":
        known = getattr(settings, "pretrained_cfg", None) or network.timm_model.pretrained_cfg
        try:
            fields = fields_of_timm(known, settings.model_args or {})
            ImageSpec(**fields)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise DataError(
                f"The pretrained_cfg of {settings.architecture!r} describes no images, {type(error).__name__}: "
                f"{error}. Correct it in config.json."
            ) from error
        return fields
    size = getattr(getattr(settings, "vision_config", settings), "image_size", None)
    squash_to = {"detection": 640, "segmentation": 512}.get(target_type, 224)
    fields = {"resize": "squash"}
    if target_type == "detection" and settings.model_type not in ("d_fine", "rt_detr", "rt_detr_v2"):
        fields["resize"] = "fit"
        size = size or (800, 1333)
        if settings.model_type == "yolos":
            fields["multiple_of"] = YOLOS_MULTIPLE
    size = size or squash_to
    fields["height"], fields["width"] = (size, size) if isinstance(size, int) else size
    if target_type == "image_text":
        fields.update(IMAGE_TEXT_TYPES[settings.model_type].image_fields)
    if settings.model_type.startswith("mobilevit"):
        fields.update(mean=(0.0,) * 3, std=(1.0,) * 3, channels="bgr")
    return fields


def has_fixed_size(network: Any) -> bool:
    """Whether positions are learnt for one size of images (those of Swin are relative to a window)."""
    if network.config.model_type == "timm_wrapper":
        return bool(network.timm_model.pretrained_cfg.get("fixed_input_size", False))
    names = [name for name, _ in network.named_parameters()]
    windows = network.config.model_type.startswith("swin")
    return any("position_embeddings" in n or ("relative_position_bias" in n and not windows) for n in names)


def detection_processor_type(settings: Any) -> Any:
    """The class of the image processor that belongs to a detector's configuration."""
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    types = IMAGE_PROCESSOR_MAPPING.get(type(settings), None)
    if types is None:  # RT-DETR v2 on 4.x
        return transformers.RTDetrImageProcessor
    return types["torchvision"] if isinstance(types, dict) else types[0]
