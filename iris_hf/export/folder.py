"""The folder of an export: what ONNX Runtime's model classes, `pipeline` and iris_hf load."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from iris_hf.errors import DataError
from iris_hf.export.examples import image_spec_of
from iris_hf.export.graph import Graph
from iris_hf.export.structure import is_layout
from iris_hf.models.hub import EXPORT_FILE, TOKENIZER_FILES, save_tokenizer
from iris_hf.models.image_spec import ImageSpec
from iris_hf.models.trust.recipes import HERE
from iris_hf.models.trust.values import read_json

if TYPE_CHECKING:
    from iris_hf.export.onnx import OnnxExport

MODEL_FILE, LABELS_FILE, FORMAT = "model.onnx", "labels.json", 1
_FILES = (MODEL_FILE, EXPORT_FILE, LABELS_FILE, "config.json", "preprocessor_config.json")


def write_folder(export: OnnxExport, graph: Graph, model: nn.Module, folder: Path) -> None:
    """Write an export into a folder, all of it or nothing.

    Files: `model.onnx`; `config.json` with the names of the classes, as transformers has it;
    `preprocessor_config.json`, which resizes and scales to [0, 1] but does not normalise, as the graph does that;
    `labels.json`; the files of the tokenizer, where the model has one of transformers; and `iris_hf_onnx.json`, from
    which :func:`iris_hf.export.runtime.load_onnx` knows what the tensors mean.

    Args:
        export: What to write.
        graph: The graph that was exported.
        model: The model it was made of.
        folder: Made if absent. Files of these names are replaced, and the tokenizer of an export that it held is
            removed.

    Raises:
        ConfigError: If the tokenizer that the model names cannot be had.
    """
    spec = image_spec_of(model)
    names = getattr(model, "class_names", None)
    description = {
        "format": FORMAT,
        "inputs": graph.input_layout,
        "prediction": graph.prediction,
        "target_type": getattr(model, "target_type", None),
        "num_classes": getattr(model, "num_classes", None),
        "class_names": names,
        "tokenizer_name": getattr(model, "tokenizer_name", None),
        "max_length": getattr(getattr(model, "text_model", model), "max_length", None),
        "image_spec": None if spec is None else dataclasses.asdict(_without_normalisation(spec)),
        "dynamic_size": export.dynamic_size,
        "dynamic_length": export.dynamic_length,
        "precision": export.precision,
        "errors": dict(export.errors),
        "agreement": export.agreement,
        "exporter": export.exporter,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as workplace:
        aside = Path(workplace)
        if save_tokenizer(model, aside):
            description["tokenizer_name"] = HERE
        (aside / MODEL_FILE).write_bytes(export.data)
        (aside / EXPORT_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        if names is not None:
            (aside / LABELS_FILE).write_text(json.dumps(list(names), indent=2) + "\n", encoding="utf-8")
        _write_config(model, names, aside)
        if spec is not None:
            _save_preprocessor(model, spec, aside)
        old_tokenizer = TOKENIZER_FILES if (folder / EXPORT_FILE).is_file() else ()
        for pattern in (*_FILES, *old_tokenizer):
            for file in folder.glob(pattern):
                file.unlink()
        for file in aside.iterdir():
            file.replace(folder / file.name)


def make_spec(description: Mapping[str, Any]) -> ImageSpec | None:
    """Give the images that a described model takes, or None."""
    spec = description.get("image_spec")
    return None if spec is None else ImageSpec(**spec)


def read_description(folder: Path) -> dict[str, Any]:
    """Read what :func:`write_folder` wrote of a model.

    Raises:
        DataError: If the folder holds no export of iris_hf, one of another format, or a damaged one.
    """
    for name in (MODEL_FILE, EXPORT_FILE):
        if not (folder / name).is_file():
            raise DataError(f"{str(folder)!r} holds no {name}. Export a model there: export_onnx(model, folder=...).")
    file = folder / EXPORT_FILE
    description = read_json(file)
    if not isinstance(description, dict) or not {"inputs", "prediction"} <= description.keys():
        raise DataError(f"{str(file)!r} does not describe an ONNX model: it needs inputs and prediction.")
    if description.get("format") != FORMAT:
        raise DataError(
            f"{str(file)!r} has the format {description.get('format')!r}, this iris_hf reads {FORMAT}. Update it."
        )
    for name, fits in _FIELDS.items():
        if not fits(description.get(name)):
            raise DataError(f"{str(file)!r} is damaged: {name} is {description.get(name)!r}. Export the model anew.")
    try:
        make_spec(description)
    except (TypeError, ValueError) as error:
        raise DataError(f"{str(file)!r} is damaged: {error} (image_spec). Export the model anew.") from error
    return description


def _is_prediction(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    if "layout" in value:
        return value["layout"] is not None and is_layout(value["layout"])
    threshold = value.get("score_threshold")
    return isinstance(value.get("boxes"), str) and isinstance(threshold, int | float)


def _is_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_a(kind: type) -> Callable[[object], bool]:
    return lambda value: value is None or type(value) is kind


_FIELDS: Mapping[str, Callable[[object], bool]] = {
    "inputs": is_layout,
    "prediction": _is_prediction,
    "target_type": _is_a(str),
    "num_classes": _is_a(int),
    "class_names": _is_names,
    "max_length": _is_a(int),
    "dynamic_size": _is_a(bool),
    "dynamic_length": _is_a(bool),
}
"""What values the fields of a description may have."""


def _without_normalisation(spec: ImageSpec) -> ImageSpec:
    """What is left to do outside the graph."""
    return dataclasses.replace(spec, mean=(0.0,) * 3, std=(1.0,) * 3, channels="rgb")


def _write_config(model: nn.Module, names: list[str] | None, folder: Path) -> None:
    """Write the configuration of the transformers model within, or one that Optimum's classes take for any network."""
    from transformers import TimmWrapperConfig

    from iris_hf.models.sources.transformers import hf_network

    network = hf_network(model)
    if network is not None:
        config = copy.deepcopy(network.config)
    else:
        config = TimmWrapperConfig(architecture=type(model).__name__)
    if names is None:
        count = getattr(model, "num_classes", None)
        names = [f"LABEL_{i}" for i in range(count)] if count else None
    if names is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = {
        "multiclass": "single_label_classification",
        "multilabel": "multi_label_classification",
    }.get(str(getattr(model, "target_type", None)))
    config.save_pretrained(folder)
    if names is not None:  # which the configuration for any network calls otherwise
        file = folder / "config.json"
        stored = json.loads(file.read_text(encoding="utf-8"))
        stored.update(id2label=config.id2label, label2id=config.label2id)
        file.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def _save_preprocessor(model: nn.Module, spec: ImageSpec, folder: Path) -> None:
    from iris_hf.models.sources.transformers import save_image_processor

    stand_in: Any = copy.copy(model)  # shares the weights; only its own attributes change
    stand_in.__dict__.pop("_image_processor", None)
    stand_in.image_spec = _without_normalisation(spec)
    stand_in.target_type = getattr(model, "target_type", None)
    save_image_processor(stand_in, folder)
