"""Models of transformers: classification, detection and segmentation of images, and image-text models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from iris_hf.errors import ConfigError, DataError, require_names, unknown_name
from iris_hf.losses.contrastive import ContrastiveKind
from iris_hf.models.classifier import ImageClassifier, ImageEncoder
from iris_hf.models.contrastive import ImageTextContrastiveModel
from iris_hf.models.detector import ImageDetector
from iris_hf.models.image_spec import ImageSpec, Normalize, is_whole, make_image_spec
from iris_hf.models.recipe import record
from iris_hf.models.segmenter import ImageSegmenter
from iris_hf.models.sources.configurations import (
    describe_config,
    fetch_stored,
    make_config,
    naming_the_config,
)
from iris_hf.models.sources.image_text import IMAGE_TEXT_TYPES, from_towers, to_towers
from iris_hf.models.sources.processors import (
    RESAMPLE,
    describe_processor,
    detection_processor_type,
    fields_of_config,
    has_fixed_size,
    load_processor,
)
from iris_hf.models.sources.weights import allow_new_head, load_network, refuse_wrong_weights
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
    revision: str | None = None,
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
            image processor of `name_or_path`, unless all are given; a bare configuration gets mean = std = 0.5 (CLIP:
            its own) and its own image size.
        score_threshold: For detection: predictions of lower probability are left out.
        max_detections: For detection: the largest number of boxes predicted for an image.
        loss: For image_text: `siglip` for models with a bias of the logits, `clip` or `unicl` for others. None takes
            the first that fits.
        tokenizer: For image_text: the repository or folder of its tokenizer; None: `name_or_path`, if it has one.
        revision: A branch, tag or commit of the repository, or `refs/pr/N` for its pull request number N; None is
            `main`.

    Raises:
        ConfigError: If a name or field is unknown, the type has no model for the target type, weights are asked of a
            configuration, there are no class names, the loss is not for the model, or the repository lacks the
            revision.
        DataError: If the folder or its weights cannot be read, or weights other than the head's are missing or of
            another shape, or its image processor does what no `image_spec` describes.
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
        revision=revision,
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
        "resample": {v: k for k, v in RESAMPLE.items()}[spec.interpolation],
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "size": {"height": spec.height, "width": spec.width},
    }
    crops = spec.resize == "crop" or (spec.resize == "squash" and spec.crop_fraction < 1)
    if crops:
        height, width = spec.resized(spec.height, spec.width)
        squashed = {"height": height, "width": width}
        arguments["size"] = {"shortest_edge": min(height, width)} if spec.resize == "crop" else squashed
        arguments.update(crop_size={"height": spec.height, "width": spec.width}, do_center_crop=True)
    elif spec.resize == "fit":
        short, long = sorted((spec.height, spec.width))
        arguments["size"] = {"shortest_edge": short, "longest_edge": long}
    if model.target_type == "detection":
        processor_type = detection_processor_type(hf_network(model).config)
    elif spec.channels == "bgr":
        processor_type = transformers.MobileViTImageProcessor
        arguments["do_center_crop"] = crops
    elif model.target_type == "segmentation":
        processor_type = transformers.MobileNetV2ImageProcessor if crops else transformers.SegformerImageProcessor
    else:
        squashes = spec.resize == "squash" and not crops
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
    revision: str | None = None,
    exact: bool,
) -> HFModel:
    import transformers

    if target_type is not None and target_type not in _AUTO_CLASSES:
        raise unknown_name("target_type of a transformers model", target_type, _AUTO_CLASSES)
    folder = fetch_stored(source, pretrained=pretrained, revision=revision)
    settings = make_config(folder or source, config or {}, pretrained=pretrained)
    target_type = target_type or _infer_target_type(settings, source)
    _check_options(target_type, loss=loss, tokenizer=tokenizer)
    has_new_classes = class_names is not None
    class_names = _set_classes(settings, target_type, class_names, source=source, pretrained=pretrained)

    auto_class = getattr(transformers, _AUTO_CLASSES[target_type])
    # Optimum's classes for ONNX Runtime register AutoConfig itself, which has no type.
    supported = {c.model_type: c for c in auto_class._model_mapping if hasattr(c, "model_type")}
    if target_type == "image_text":
        supported = {k: v for k, v in supported.items() if k in IMAGE_TEXT_TYPES}
    if type(settings) not in supported.values():
        what = f"model type for {target_type} ({_AUTO_CLASSES[target_type]})"
        raise unknown_name(what, settings.model_type, supported)
    if pretrained:
        network, wrong = load_network(auto_class, str(folder), settings, exact=exact)
        if not exact and target_type == "image_text":  # it gets no new head: all that it needs has to be there
            wrong.pop("unexpected_keys", None)
        elif not exact and (has_new_classes or "mismatched_keys" not in wrong):
            wrong = allow_new_head(auto_class, network, wrong)
        refuse_wrong_weights(source, wrong)
    else:
        with naming_the_config(settings.model_type):
            network = auto_class.from_config(settings, trust_remote_code=False)
        for name, parameter in network.named_parameters():
            if "backbone" in name:  # DETR freezes its backbone, which has learnt nothing here
                parameter.requires_grad_(True)
    network.train()

    processor = None if folder is None else load_processor(str(folder))
    if processor is None:
        fields = fields_of_config(settings, target_type, network)
    else:
        fields, difference = describe_processor(processor)
        if difference is not None and not is_whole(image_spec):
            asked = "image_spec=ImageSpec(height=..., width=..., resize=..., mean=..., std=...)"
            way_out = f"Say what images the model takes: {asked}."
            if exact:
                way_out = (
                    f"Say to create_hf_model what images it takes, {asked} (on the command line --image-spec), and "
                    "save that model: its folder loads."
                )
            raise DataError(
                f"iris_hf's transforms don't do what the {type(processor).__name__} of {str(source)!r} does: "
                f"{difference}. {way_out}"
            )
        if difference is not None:
            processor = None
    fields.setdefault("variable_size", target_type == "detection" or not has_fixed_size(network))
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
        tokenizer = find_tokenizer(source, folder, tokenizer, revision)
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


def find_tokenizer(
    source: object, folder: Path | None, tokenizer: str | Path | None, revision: str | None
) -> str | None:
    """The name of the tokenizer that was asked for, or else of that in a repository or folder, if it may have one.

    Args:
        source: What the model is made of.
        folder: Where its files are, if they are anywhere.
        tokenizer: What was asked for.
        revision: Of the source. A name says nothing of it, so that the folder in the cache stands for it.
    """
    if tokenizer is not None or folder is None:
        return None if tokenizer is None else str(tokenizer)
    files = (
        "tokenizer_config.json",
        "tokenizer.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tokenizer.model",
        "sentencepiece.bpe.model",
    )
    if not any((folder / file).is_file() for file in files):
        return None
    return str(source if revision is None else folder)


def _check_options(target_type: str, **options: object) -> None:
    for name, value in options.items():
        if target_type != "image_text" and value is not None:
            raise ConfigError(f"{name}={value!r} is for target_type='image_text', not for {target_type!r}.")


def _set_classes(
    settings: Any, target_type: str, class_names: Sequence[str] | None, *, source: object, pretrained: bool
) -> Sequence[str]:
    """Write the classes into a configuration, and return them; image-text models have none."""
    if target_type == "image_text":
        if class_names is not None:
            raise ConfigError(f"An image_text model has no classes, got class_names={class_names!r}. Leave them out.")
        return ()
    if class_names is None:
        if not pretrained:
            raise ConfigError("A model without pretrained weights needs class_names.")
        unnamed = [i for i in range(settings.num_labels) if i not in settings.id2label]
        if unnamed or not settings.num_labels:
            which = f"class {unnamed[0]} of {settings.num_labels}" if unnamed else "any class"
            raise DataError(
                f"id2label in the configuration of {str(source)!r} has no name for {which}. Correct it, or give "
                "class_names."
            )
        class_names = [str(settings.id2label[i]) for i in range(settings.num_labels)]
    require_names("class_names", class_names)
    settings.id2label = dict(enumerate(map(str, class_names)))
    settings.label2id = {name: i for i, name in settings.id2label.items()}
    if target_type in _PROBLEM_TYPES:
        settings.problem_type = _PROBLEM_TYPES[target_type]
    return class_names


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
