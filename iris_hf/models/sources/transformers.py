"""Models of transformers: classification, detection and segmentation of images, and image-text models."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from iris_hf.errors import ConfigError, DataError, require_names, unknown_name
from iris_hf.losses.contrastive import ContrastiveKind
from iris_hf.models.classifier import ImageClassifier, ImageEncoder
from iris_hf.models.contrastive import ImageTextContrastiveModel
from iris_hf.models.detector import ImageDetector
from iris_hf.models.image_spec import ImageSpec, Normalize, make_image_spec
from iris_hf.models.recipe import record
from iris_hf.models.segmenter import ImageSegmenter
from iris_hf.models.sources.image_text import IMAGE_TEXT_TYPES, from_towers, to_towers
from iris_hf.models.text_encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HFModel = ImageClassifier | ImageDetector | ImageSegmenter | ImageTextContrastiveModel

_AUTO_CLASSES = {
    "multiclass": "AutoModelForImageClassification",
    "multilabel": "AutoModelForImageClassification",
    "detection": "AutoModelForObjectDetection",
    "segmentation": "AutoModelForSemanticSegmentation",
    "image_text": "AutoModelForZeroShotImageClassification",
}
_PROBLEM_TYPES = {"multiclass": "single_label_classification", "multilabel": "multi_label_classification"}
_OLD_FIELDS = ("backbone", "backbone_kwargs", "use_pretrained_backbone", "use_timm_backbone")  # still understood by 5.x
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as processors store them


def create_hf_model(
    name_or_path: str | Path | PretrainedConfig | Mapping[str, Any],
    *,
    target_type: Literal["multiclass", "multilabel", "detection", "segmentation", "image_text"],
    class_names: Sequence[str] | None = None,
    pretrained: bool = True,
    config: Mapping[str, Any] | None = None,
    image_spec: ImageSpec | Mapping[str, Any] | None = None,
    score_threshold: float = 0.0,
    max_detections: int = 100,
    loss: ContrastiveKind | None = None,
    tokenizer: str | Path | None = None,
) -> HFModel:
    """Make a transformers model that takes images in [0, 1] and speaks the model interface.

    Args:
        name_or_path: A repository of the Hub or a local folder. With `pretrained=False` also a model type, such as
            `vit`, or a whole configuration: an object of transformers, or a dict that holds `model_type`.
        target_type: What the model is for.
        class_names: Names of the classes; a head for another number of classes than the weights have is
            initialised anew. None keeps the classes of the weights. An image_text model has none.
        pretrained: Whether to load the weights of `name_or_path` (safetensors; a pickle is refused). Otherwise only
            its configuration is used, and weights are random.
        config: Fields of the configuration to change, such as `{"hidden_size": 64}`.
        image_spec: Fields of :class:`iris_hf.models.image_spec.ImageSpec` to change. By default they come from the
            image processor of `name_or_path`; a bare configuration gets mean = std = 0.5 (CLIP: its own) and its own
            image size.
        score_threshold: For detection: predictions of lower probability are left out.
        max_detections: For detection: the largest number of boxes predicted for an image.
        loss: For image_text: `siglip` for models with a bias of the logits, `clip` or `unicl` for others. None takes
            the first that fits.
        tokenizer: For image_text: the repository or folder of its tokenizer; None: `name_or_path`, if it has one.

    Raises:
        ConfigError: If a name or field is unknown, the type has no model for the target type, weights are asked of a
            configuration, there are no class names, or the loss is not for the model.
        DataError: If the folder or its weights cannot be read.
    """
    return _create(
        name_or_path,
        target_type=target_type,
        class_names=class_names,
        pretrained=pretrained,
        config=config,
        image_spec=image_spec,
        score_threshold=score_threshold,
        max_detections=max_detections,
        loss=loss,
        tokenizer=tokenizer,
        exact=False,
    )


def load_hf_model(folder: Path, *, target_type: str | None = None, **arguments: Any) -> HFModel:
    """Load a local folder that transformers wrote, with every weight in it and in its own precision.

    Args:
        folder: Holds config.json and safetensors.
        target_type: None takes it from the model class that the configuration names.
        arguments: More arguments of :func:`create_hf_model`.

    Raises:
        ConfigError: If the target type cannot be told.
        DataError: If a weight is missing, superfluous, of another shape or unreadable.
    """
    return _create(folder, target_type=target_type, pretrained=True, exact=True, **arguments)


def hf_network(model: nn.Module) -> Any:
    """The transformers model that a model of `create_hf_model` or `create_hf_text_encoder` wraps, or None."""
    if isinstance(model, ImageTextContrastiveModel):
        return from_towers(model)
    if isinstance(model, ImageClassifier):
        model = model.network
    wrappers = ImageEncoder | ImageDetector | ImageSegmenter | TextEncoder
    network = model.network if isinstance(model, wrappers) else None
    return network if hasattr(network, "save_pretrained") and hasattr(network, "config") else None


def save_image_processor(model: HFModel | TextEncoder, folder: Path) -> None:
    """Write the image processor with which plain transformers prepares images for a model, if it takes any."""
    import transformers

    if isinstance(model, TextEncoder):
        return
    processor = model.__dict__.get("_image_processor")
    if processor is not None:
        processor.save_pretrained(folder)
        return
    spec = model.image_spec
    assert spec is not None
    arguments: dict[str, Any] = {
        "resample": {v: k for k, v in _RESAMPLE.items()}[spec.interpolation],
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "size": {"height": spec.height, "width": spec.width},
    }
    if spec.resize == "crop":
        arguments["size"] = {"shortest_edge": round(min(spec.height, spec.width) / spec.crop_fraction)}
        arguments.update(crop_size={"height": spec.height, "width": spec.width}, do_center_crop=True)
    elif spec.resize == "fit":
        short, long = sorted((spec.height, spec.width))
        arguments["size"] = {"shortest_edge": short, "longest_edge": long}
    if model.target_type == "detection":
        processor_type = _detection_processor_type(hf_network(model).config)
    elif spec.channels == "bgr":
        processor_type = transformers.MobileViTImageProcessor
    elif model.target_type == "segmentation":
        crops = spec.resize == "crop"
        processor_type = transformers.MobileNetV2ImageProcessor if crops else transformers.SegformerImageProcessor
    else:
        squashes = spec.resize == "squash"
        processor_type = transformers.ViTImageProcessor if squashes else transformers.CLIPImageProcessor
    processor_type(**arguments).save_pretrained(folder)


def _create(
    source: str | Path | PretrainedConfig | Mapping[str, Any],
    *,
    target_type: str | None,
    class_names: Sequence[str] | None = None,
    pretrained: bool,
    config: Mapping[str, Any] | None = None,
    image_spec: ImageSpec | Mapping[str, Any] | None = None,
    score_threshold: float = 0.0,
    max_detections: int = 100,
    loss: ContrastiveKind | None = None,
    tokenizer: str | Path | None = None,
    exact: bool,
) -> HFModel:
    import transformers

    if target_type is not None and target_type not in _AUTO_CLASSES:
        raise unknown_name("target_type of a transformers model", target_type, _AUTO_CLASSES)
    settings = make_config(source, config or {}, pretrained=pretrained)
    target_type = target_type or _infer_target_type(settings, source)
    _check_options(target_type, loss=loss, tokenizer=tokenizer)
    class_names = _set_classes(settings, target_type, class_names, pretrained=pretrained)

    auto_class = getattr(transformers, _AUTO_CLASSES[target_type])
    # Optimum's classes for ONNX Runtime register AutoConfig itself, which has no type.
    supported = {c.model_type: c for c in auto_class._model_mapping if hasattr(c, "model_type")}
    if target_type == "image_text":
        supported = {k: v for k, v in supported.items() if k in IMAGE_TEXT_TYPES}
    if type(settings) not in supported.values():
        what = f"model type for {target_type} ({_AUTO_CLASSES[target_type]})"
        raise unknown_name(what, settings.model_type, supported)
    if pretrained:
        network, wrong = load_network(auto_class, str(source), settings, exact=exact)
        if not exact and target_type == "image_text":  # it gets no new head: all that it needs has to be there
            wrong.pop("unexpected_keys", None)
        if exact or target_type == "image_text":
            refuse_wrong_weights(source, wrong)
    else:
        with naming_the_config(settings.model_type):
            network = auto_class.from_config(settings, trust_remote_code=False)
        for name, parameter in network.named_parameters():
            if "backbone" in name:  # DETR freezes its backbone, which has learnt nothing here
                parameter.requires_grad_(True)
    network.train()

    stored = str(source) if is_stored(source, pretrained) else None
    processor = None if stored is None else _load_processor(stored)
    fields = _fields_of_processor(processor) if processor is not None else _fields_of_config(settings, target_type)
    fields["variable_size"] = target_type == "detection" or not _has_fixed_size(network)
    if target_type == "image_text":
        fields["variable_size"] = False
    spec = make_image_spec(fields, image_spec)

    model: HFModel
    if target_type == "detection":
        model = ImageDetector(
            network,
            class_names=class_names,
            image_spec=spec,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )
        extra: dict[str, Any] = {"score_threshold": score_threshold, "max_detections": max_detections}
    elif target_type == "segmentation":
        model, extra = ImageSegmenter(network, class_names=class_names, image_spec=spec), {}
    elif target_type == "image_text":
        tokenizer = find_tokenizer(stored, tokenizer)
        model, extra = to_towers(network, spec, loss=loss, tokenizer_name=tokenizer), {"tokenizer": tokenizer}
        extra["loss"] = loss
    else:
        model = ImageClassifier(
            ImageEncoder(network, spec, output="logits"),
            target_type="multiclass" if target_type == "multiclass" else "multilabel",
            num_classes=len(class_names),
            class_names=class_names,
            image_spec=spec,
        )
        extra = {}
    for module in model.modules():
        if isinstance(module, Normalize):
            module.to(network.dtype)
    if processor is not None and all(getattr(spec, name) == value for name, value in fields.items()):
        model._image_processor = processor
    return record(
        model,
        "create_hf_model",
        name_or_path=describe_config(settings),
        target_type=target_type,
        class_names=class_names or None,
        pretrained=False,
        image_spec=spec,
        **extra,
    )


def find_tokenizer(source: str | None, tokenizer: str | Path | None) -> str | None:
    """The name of the tokenizer that was asked for, or else of that in a repository or folder, if it may have one."""
    if tokenizer is not None or source is None:
        return None if tokenizer is None else str(tokenizer)
    folder = Path(source)
    files = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
    return source if not folder.is_dir() or any((folder / file).is_file() for file in files) else None


def _check_options(target_type: str, **options: object) -> None:
    for name, value in options.items():
        if target_type != "image_text" and value is not None:
            raise ConfigError(f"{name}={value!r} is for target_type='image_text', not for {target_type!r}.")


def _set_classes(
    settings: Any, target_type: str, class_names: Sequence[str] | None, *, pretrained: bool
) -> Sequence[str]:
    """Write the classes into a configuration, and return them; image-text models have none."""
    if target_type == "image_text":
        if class_names is not None:
            raise ConfigError(f"An image_text model has no classes, got class_names={class_names!r}. Leave them out.")
        return ()
    if class_names is None:
        if not pretrained:
            raise ConfigError("A model without pretrained weights needs class_names.")
        class_names = [str(settings.id2label[i]) for i in range(settings.num_labels)]
    require_names("class_names", class_names)
    settings.id2label = dict(enumerate(map(str, class_names)))
    settings.label2id = {name: i for i, name in settings.id2label.items()}
    if target_type in _PROBLEM_TYPES:
        settings.problem_type = _PROBLEM_TYPES[target_type]
    return class_names


def is_stored(source: object, pretrained: bool) -> bool:
    """Whether a source means a repository or folder."""
    return isinstance(source, str | Path) and not _is_model_type(source, pretrained)


def _is_model_type(source: Any, pretrained: bool) -> bool:
    """Whether a name means a type of model, `vit`, and not a repository or folder: nothing is looked up then."""
    from transformers import CONFIG_MAPPING

    return not pretrained and str(source) in CONFIG_MAPPING


def describe_config(settings: Any) -> dict[str, Any]:
    """A configuration as JSON values."""
    described: dict[str, Any] = json.loads(
        json.dumps(settings.to_dict(), default=lambda dtype: str(dtype).removeprefix("torch."))
    )
    return described


def make_config(source: Any, changes: Mapping[str, Any], *, pretrained: bool) -> Any:
    """The configuration that is asked for, as an object of our own."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    if not isinstance(changes, Mapping):
        raise ConfigError(f"config must be a mapping such as {{'image_size': 64}}, got {changes!r}.")
    changes = copy.deepcopy(dict(changes))
    if pretrained and not isinstance(source, str | Path):
        raise ConfigError("A configuration has no weights. Pass pretrained=False, or the name or folder of a model.")
    if isinstance(source, Mapping):
        values = copy.deepcopy(dict(source))
        model_type = values.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise unknown_name("model_type", model_type, CONFIG_MAPPING)
        if "transformers_version" not in values:
            _check_fields(CONFIG_MAPPING[model_type], values)
        settings = _configured(CONFIG_MAPPING[model_type], _settle_backbone(values, model_type))
    elif isinstance(source, transformers.PretrainedConfig):
        settings = copy.deepcopy(source)
    elif _is_model_type(source, pretrained):
        _check_fields(CONFIG_MAPPING[str(source)], changes)
        return _configured(CONFIG_MAPPING[str(source)], _settle_backbone(changes, str(source)))
    else:
        try:
            settings = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
        except (OSError, ValueError) as error:
            types = "" if pretrained else " It is no model type either."
            raise DataError(f"There is no configuration of transformers at {str(source)!r}: {error}{types}") from error
    if changes:
        _check_fields(type(settings), changes)
        settings = _configured(type(settings), {**settings.to_dict(), **changes})
    if getattr(settings, "use_pretrained_backbone", False):
        settings.use_pretrained_backbone = False  # the weights come from the model itself, or are to be random
    return settings


def _configured(kind: Any, values: dict[str, Any]) -> Any:
    with naming_the_config(kind.model_type):
        return kind.from_dict(values)


@contextmanager
def naming_the_config(model_type: str) -> Iterator[None]:
    """Say that it is the configuration which transformers or torch refuse, by whatever error of theirs."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ConfigError(
            f"transformers cannot make a {model_type!r} of this config: {type(error).__name__}: {error}"
        ) from error


def _settle_backbone(values: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Keep backbones from fetching weights of their own, and let a given backbone_config stand for itself."""
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[model_type]()
    settled: dict[str, Any] = {"use_pretrained_backbone": False}
    if "backbone_config" in values:
        settled.update(use_timm_backbone=False, backbone=None)
    return {k: v for k, v in settled.items() if hasattr(default, k)} | dict(values)


def _check_fields(config_type: Any, values: Mapping[str, Any]) -> None:
    default = config_type()
    known = {*default.to_dict(), *config_type.attribute_map, "num_labels", *_OLD_FIELDS}
    for name in values:
        if name not in known:
            raise unknown_name(f"field of the {config_type.model_type} configuration", name, known)


def _infer_target_type(settings: Any, source: object) -> str:
    architecture = next(iter(settings.architectures or []), "")
    for suffix, target_type in (
        ("ForImageClassification", "multilabel" if "multi_label" in str(settings.problem_type) else "multiclass"),
        ("ForObjectDetection", "detection"),
        ("ForSemanticSegmentation", "segmentation"),
    ):
        if architecture.endswith(suffix):
            return target_type
    if settings.model_type in IMAGE_TEXT_TYPES and architecture.endswith("Model"):
        return "image_text"
    raise ConfigError(
        f"{str(source)!r} holds a {architecture or settings.model_type}, and iris_hf knows models for image "
        "classification, object detection and semantic segmentation, and image-text models. Use create_hf_model to "
        "give it such a head, or create_hf_text_encoder for a text encoder."
    )


def load_network(auto_class: Any, source: str, settings: Any, *, exact: bool) -> tuple[Any, dict[str, list[str]]]:
    """Load a model of transformers with its weights.

    Args:
        auto_class: Whose `from_pretrained` loads it.
        source: A repository or folder.
        settings: Its configuration.
        exact: Whether the weights keep their precision; otherwise they become float32.

    Returns:
        The model, and the names of weights that don't fit by what is wrong with them, such as `missing_keys`.

    Raises:
        DataError: If there are no readable safetensors.
    """
    if Path(source).is_dir():
        check_weights(Path(source))
    try:
        network, info = auto_class.from_pretrained(
            source,
            config=settings,
            dtype="auto" if exact else torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:
        raise DataError(f"The weights of {source!r} cannot be loaded: {error}") from error
    return network, {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}


def refuse_wrong_weights(source: object, wrong: Mapping[str, list[str]]) -> None:
    """Make sure that weights fit.

    Raises:
        DataError: If :func:`load_network` found any that don't.
    """
    if wrong:
        listed = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:3])}" for k, v in wrong.items())
        raise DataError(f"The weights of {str(source)!r} don't belong to its configuration. {listed}.")


def check_weights(folder: Path) -> None:
    """Make sure that a folder holds readable safetensors.

    Raises:
        DataError: If there are none, only pickles, or a file is cut short.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = f" {', '.join(pickles)} is a pickle, which may run code and is not read." if pickles else ""
        raise DataError(f"{str(folder)!r} holds no weights (*.safetensors).{found} Save the model as safetensors.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise DataError(f"{str(file)!r} is cut short or no safetensors file: {error}") from error


def _load_processor(source: str) -> Any:
    """The image processor of a repository or folder, or None if it has none."""
    import transformers
    from transformers import AutoImageProcessor, ImageProcessingMixin

    try:
        ImageProcessingMixin.get_image_processor_dict(source)
    except OSError:
        return None
    slow = {"use_fast": False} if transformers.__version__.startswith("4.") else {}
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **slow)
    except ValueError as error:
        raise DataError(f"The image processor of {source!r} cannot be loaded: {error}") from error


def _fields_of_processor(processor: Any) -> dict[str, Any]:
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
        "interpolation": _RESAMPLE.get(int(get("resample", 2)), "bilinear"),
        "channels": "bgr" if get("do_flip_channel_order", False) else "rgb",
    }
    if get("include_top", False) and normalizes:  # EfficientNet divides by the deviation a second time
        fields["std"] = tuple(a * b for a, b in zip(fields["std"], std, strict=True))
    size = {k: v for k, v in dict(get("size", {})).items() if v is not None}
    crop = {k: v for k, v in dict(get("crop_size", {})).items() if v is not None}
    short = size.get("shortest_edge")
    if get("do_center_crop", False) and crop:
        scaled = short or min(size.get("height", crop["height"]), size.get("width", crop["width"]))
        fraction = min(1.0, min(crop["height"], crop["width"]) / scaled)
        fields.update(height=crop["height"], width=crop["width"], resize="crop", crop_fraction=fraction)
    elif "height" in size:
        fields.update(height=size["height"], width=size["width"], resize="squash")
    elif short and "longest_edge" in size:
        fields.update(height=short, width=size["longest_edge"], resize="fit")
    elif short and get("crop_pct") is not None:  # ConvNeXt
        squash = short >= 384
        fields.update(height=short, width=short, resize="squash" if squash else "crop")
        fields["crop_fraction"] = 1.0 if squash else get("crop_pct")
    elif short:
        fields.update(height=short, width=short, resize="crop")
    return fields


def _fields_of_config(settings: Any, target_type: str) -> dict[str, Any]:
    """What is known of the images where there is a configuration but no image processor."""
    size = getattr(getattr(settings, "vision_config", settings), "image_size", None)
    squash_to = {"detection": 640, "segmentation": 512}.get(target_type, 224)
    fields: dict[str, Any] = {"resize": "squash"}
    if target_type == "detection" and settings.model_type not in ("d_fine", "rt_detr", "rt_detr_v2"):
        fields["resize"] = "fit"
        size = size or (800, 1333)
    size = size or squash_to
    fields["height"], fields["width"] = (size, size) if isinstance(size, int) else size
    if target_type == "image_text":
        fields.update(IMAGE_TEXT_TYPES[settings.model_type].image_fields)
    if settings.model_type.startswith("mobilevit"):
        fields.update(mean=(0.0,) * 3, std=(1.0,) * 3, channels="bgr")
    return fields


def _has_fixed_size(network: Any) -> bool:
    """Whether positions are learnt for one size of images (those of Swin are relative to a window)."""
    names = [name for name, _ in network.named_parameters()]
    windows = network.config.model_type.startswith("swin")
    return any("position_embeddings" in n or ("relative_position_bias" in n and not windows) for n in names)


def _detection_processor_type(settings: Any) -> Any:
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    types = IMAGE_PROCESSOR_MAPPING.get(type(settings), None)
    if types is None:  # RT-DETR v2 on 4.x
        return transformers.RTDetrImageProcessor
    return types["torchvision"] if isinstance(types, dict) else types[0]
