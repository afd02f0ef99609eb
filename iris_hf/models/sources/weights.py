"""Weights of transformers: safetensors, all of them, or an error that names what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from iris_hf.errors import DataError
from iris_hf.models.pull import weight_files

_FLOATS = ("F64", "F32", "F16", "BF16")
_COUNTS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""How safetensors call types of numbers. Some models keep positions and masks as those of the second kind."""


def load_network(auto_class: Any, source: str, settings: Any, *, exact: bool) -> tuple[Any, dict[str, list[str]]]:
    """Load a model of transformers with its weights.

    Args:
        auto_class: Whose `from_pretrained` loads it.
        source: A folder.
        settings: Its configuration.
        exact: Whether the weights keep the precision of the model, which its configuration names, or else its first
            weight has; otherwise they become float32.

    Returns:
        The model, and the names of weights that don't fit by what is wrong with them, such as `missing_keys`.

    Raises:
        DataError: If there are no readable safetensors, or some are neither float16, bfloat16, float32 nor float64.
    """
    check_weights(Path(source))
    _refuse_quantised(Path(source))
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
    wrong = {k: v for k, v in info.items() if v and k != "error_msgs"}
    # transformers 5 gives the shapes, too
    return network, {k: sorted(n if isinstance(n, str) else n[0] for n in v) for k, v in wrong.items()}


def allow_new_head(auto_class: Any, network: Any, wrong: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Leave out of what :func:`load_network` found wrong all that a new head explains.

    That is weights of an old head, missing ones outside the base model (or of its pooler), and those whose shape
    depends on the number of classes.
    """
    if not wrong:
        return {}
    settings = copy.deepcopy(network.config)
    settings.num_labels += 1
    with torch.device("meta"):
        other = auto_class.from_config(settings, trust_remote_code=False).state_dict()
    own = network.state_dict()
    of_classes = {name for name, tensor in own.items() if name not in other or other[name].shape != tensor.shape}
    base = "" if network.base_model is network else f"{network.base_model_prefix}."
    kept = {
        "mismatched_keys": [n for n in wrong.get("mismatched_keys", []) if n not in of_classes],
        "missing_keys": [
            n
            for n in wrong.get("missing_keys", [])
            if n not in of_classes and n.startswith(base) and ".pooler." not in n
        ],
    }
    return {what: names for what, names in kept.items() if names}


def refuse_wrong_weights(source: object, wrong: Mapping[str, list[str]]) -> None:
    """Make sure that weights fit.

    Raises:
        DataError: If :func:`load_network` found any that don't.
    """
    if wrong:
        listed = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:3])}" for k, v in wrong.items())
        raise DataError(
            f"The weights of {str(source)!r} don't belong to its configuration. {listed}. "
            "create_hf_model with class_names gives a model for images another head."
        )


def check_weights(folder: Path) -> None:
    """Make sure that the weights in a folder are readable safetensors.

    Raises:
        DataError: If there are none, only pickles, or a file is cut short or missing.
    """
    for name in weight_files(folder):
        if not (folder / name).is_file():
            raise _missing_weights(folder, name)
        _types_in(folder / name)


def _types_in(file: Path) -> dict[str, str]:
    """How safetensors call the types of the tensors in a file, by their names."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            return {name: tensors.get_slice(name).get_dtype() for name in names}
    except SafetensorError as error:
        raise DataError(f"{str(file)!r} is cut short or no safetensors file: {error}") from error


def _refuse_quantised(folder: Path) -> None:
    """Make sure that weights are floats: float8 and integers mean nothing without the scales they were made by."""
    for file in weight_files(folder):
        for name, kind in _types_in(folder / file).items():
            if kind not in _FLOATS and (kind not in _COUNTS or name.split(".")[-1] == "weight"):
                raise DataError(
                    f"{str(folder / file)!r} holds {name} as {kind}; only {', '.join(_FLOATS)} are read. Save the "
                    "model in one of these."
                )


def _missing_weights(folder: Path, name: str) -> DataError:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    found = f" {', '.join(pickles)} is a pickle, which may run code and is not read." if pickles else ""
    return DataError(
        f"{str(folder)!r} holds no weights ({name}).{found} Save the model as safetensors. A repository with pickles "
        "alone may have a pull request with safetensors, number N: pass revision='refs/pr/N' to from_pretrained, "
        "create_hf_model or create_hf_text_encoder."
    )
