"""The export of a model to ONNX: traced, checked, and only then written."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from iris_hf.errors import ConfigError, unknown_name
from iris_hf.export.check import TOLERANCES, Case, Comparison, compare
from iris_hf.export.examples import (
    BATCH_SIZES,
    DEFAULT_SIZE,
    Batch,
    choose_size,
    image_spec_of,
    is_images,
    make_inputs,
    other_sizes,
    split_inputs,
    vary,
)
from iris_hf.export.exporters import Axes, find_exporters, write_onnx
from iris_hf.export.folder import MODEL_FILE, write_folder
from iris_hf.export.graph import Graph, make_graph
from iris_hf.export.operators import FirstOfEquals
from iris_hf.export.precision import convert
from iris_hf.models.detector import ImageDetector
from iris_hf.models.segmenter import ImageSegmenter

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16", "int8"]
_LARGEST_FILE = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class OnnxExport:
    """An ONNX model and how far it is from the one it was made of.

    Attributes:
        data: The ONNX file.
        max_error: The largest absolute difference from torch, over all outputs, batch sizes and image sizes.
        errors: The same for each output. Of `masks` it is the probability that separates the class chosen from the
            most probable one; of `detections` the distance to the model's nearest box of the class.
        agreement: Fraction of decisions that are the same, in [0, 1]: the most probable class, or for multilabel which
            probabilities exceed 0.5. None where the model gives no probabilities.
        input_names: Inputs of the graph.
        output_names: Outputs of the graph.
        dynamic_size: Whether it takes images of other sizes than it was traced with.
        precision: `fp32`, `fp16` or `int8`.
        exporter: `optimum`, `torchscript` or `dynamo`: the one that made it.
    """

    data: bytes = dataclasses.field(repr=False)
    max_error: float
    errors: Mapping[str, float]
    agreement: float | None
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_size: bool
    precision: str
    exporter: str


def export_onnx(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    input_size: int | Sequence[int] = DEFAULT_SIZE,
    opset: int = 18,
    precision: Precision = "fp32",
    exporter: Literal["auto", "optimum", "torchscript", "dynamo"] = "auto",
    dynamic_size: bool | None = None,
    tolerance: float | None = None,
    folder: str | Path | None = None,
) -> bytes:
    """Turn a model into an ONNX file that is proven to give the same.

    The graph runs the prediction step. It takes what the model takes, so images in [0, 1]: the normalisation is in it.
    Its first axis, the batch, may have any length. Before anything is returned or written, ONNX Runtime and torch are
    compared at the batch sizes 1, 2 and 5, and at two image sizes where the model takes any.

    Inputs are named `pixel_values` (images), `input_ids` (tokens), `features`, or by the keys of a dict. Outputs of a
    classifier are `logits` and `probabilities`; of a detector `logits`, `pred_boxes` and `detections` `[N, K, 6]`
    (class, probability, x0, y0, x1, y1; a probability of -1 is no box); of a segmenter `logits`, `probabilities` and
    `masks`; of an encoder `features`; of anything else the keys of a dict, or `predictions`.

    Args:
        model: Has `prediction_step`, or `predictor` and `forward`, or `forward`. It stays as it is.
        example_inputs: A batch of what the model takes, as its prediction step takes it: a tensor, a dict, a tuple. The
            check uses it, too. None makes random images, tokens, or both, by what the model looks like.
        input_size: Edge of the images in pixels, or [height, width], where `example_inputs` is None. A model that takes
            images of one size is exported at that size by default.
        opset: Version of the ONNX operators.
        precision: `fp32`; `fp16`, weights and arithmetic of half precision; `int8`, matrix products in integers whose
            ranges are found while the model runs. Inputs and outputs are float32 always.
        exporter: `optimum`, `torchscript` or `dynamo`; `auto` is Optimum, or TorchScript where Optimum cannot be
            imported (transformers 5), then dynamo if that fails and onnxscript is installed.
        dynamic_size: Whether the graph takes images of any size; None asks the model's image_spec.
        tolerance: Largest absolute error allowed, as a multiple of the largest absolute value of an output where that
            exceeds 1. None: 1e-4 for fp32, 0.05 for fp16, no limit for int8.
        folder: Also write model.onnx there, with the configuration, the preprocessor and the labels that
            `ORTModelForImageClassification`, `ORTModelForCustomTasks` and `pipeline` load, and what
            :func:`iris_hf.export.runtime.load_onnx` needs.

    Returns:
        The ONNX file.

    Raises:
        ConfigError: If an argument is wrong, the model cannot be exported, or the graph differs from the model; the
            message names the output and the error.
        MissingDependencyError: If the packages of the extra `onnx` are missing.
    """
    return export_onnx_model(
        model,
        example_inputs,
        input_size=input_size,
        opset=opset,
        precision=precision,
        exporter=exporter,
        dynamic_size=dynamic_size,
        tolerance=tolerance,
        folder=folder,
    ).data


def export_onnx_model(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    input_size: int | Sequence[int] = DEFAULT_SIZE,
    opset: int = 18,
    precision: Precision = "fp32",
    exporter: Literal["auto", "optimum", "torchscript", "dynamo"] = "auto",
    dynamic_size: bool | None = None,
    tolerance: float | None = None,
    folder: str | Path | None = None,
) -> OnnxExport:
    """Do what :func:`export_onnx` does, and report the errors that were measured."""
    if precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))
    if not isinstance(opset, int) or isinstance(opset, bool) or opset < 18:
        raise ConfigError(f"opset must be 18 or later, got {opset!r}.")
    if tolerance is not None and not tolerance >= 0:
        raise ConfigError(f"tolerance must not be negative, got {tolerance}.")
    if folder is not None and Path(folder).is_file():
        raise ConfigError(f"{str(folder)!r} is a file. Give a folder.")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"A model must be a torch.nn.Module, got {type(model).__name__}.")
    exporters = find_exporters(exporter)
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if size > _LARGEST_FILE:
        raise ConfigError(f"The model has {size / 2**30:.1f} GiB of weights, and an ONNX file holds 2 GiB.")

    if example_inputs is None:
        example_inputs = make_inputs(model, *choose_size(model, input_size))
    batch, layout = split_inputs(example_inputs)
    batch = {name: tensor.detach().cpu() for name, tensor in batch.items()}
    graph = make_graph(model, batch, layout)
    allowed = TOLERANCES[precision] if tolerance is None else tolerance
    with tempfile.TemporaryDirectory() as workplace:
        file = Path(workplace) / MODEL_FILE
        for dynamic in _sizes_to_try(model, batch, dynamic_size):
            cases = _make_cases(graph, batch, dynamic)
            try:
                limit = allowed if precision == "fp32" else TOLERANCES["fp32"]
                comparison, used = _write(graph, cases, _find_axes(cases, dynamic), file, exporters, opset, limit)
                break
            except ConfigError as error:
                if not dynamic or dynamic_size is not None:
                    raise
                logger.warning(
                    "%s is exported for images of one size, as the graph for all sizes is wrong: %s",
                    type(model).__name__,
                    error,
                )
        if precision != "fp32":
            convert(file, precision)
            comparison = compare(graph, file, cases, precision=precision, tolerance=allowed)
        data = file.read_bytes()
    export = OnnxExport(
        data=data,
        max_error=max(comparison.errors.values()),
        errors=comparison.errors,
        agreement=comparison.agreement,
        input_names=graph.input_names,
        output_names=graph.output_names,
        dynamic_size=dynamic,
        precision=precision,
        exporter=used,
    )
    logger.info(
        "Exported %s (%s, %.1f MiB) with %s: maximum error %.3g, same decisions %s.",
        type(model).__name__,
        precision,
        len(data) / 2**20,
        used,
        export.max_error,
        "unknown" if export.agreement is None else f"{export.agreement:.1%}",
    )
    if folder is not None:
        write_folder(export, graph, model, Path(folder))
    return export


def _sizes_to_try(model: nn.Module, batch: Batch, dynamic_size: bool | None) -> list[bool]:
    """Whether to export for any size: what was asked for, or what the model says and, if that fails, one size."""
    if dynamic_size is not None:
        if dynamic_size and not other_sizes(batch):
            raise ConfigError(f"dynamic_size is for images, and {type(model).__name__} takes {', '.join(batch)}.")
        return [dynamic_size]
    spec = image_spec_of(model)
    return [True, False] if spec is not None and spec.variable_size and other_sizes(batch) else [False]


def _write(
    graph: Graph,
    cases: Sequence[Case],
    axes: Axes,
    file: Path,
    exporters: Sequence[str],
    opset: int,
    tolerance: float | None,
) -> tuple[Comparison, str]:
    """Write the file with the first exporter whose graph stands the check; return the errors and that exporter."""
    failure: ConfigError | None = None
    for exporter in exporters:
        try:
            write_onnx(graph, cases[0].inputs, axes, file, opset=opset, exporter=exporter)
            return compare(graph, file, cases, precision="fp32", tolerance=tolerance), exporter
        except ConfigError as error:
            if failure is None:
                failure = error
            else:
                failure.add_note(f"Nor with {exporter}: {error}")
    assert failure is not None
    raise failure


def _make_cases(graph: Graph, batch: Batch, dynamic: bool) -> list[Case]:
    """Run the model on every combination of batch size and image size of the check; the first is to be traced."""
    cases = [_run_case(graph, vary(batch, n)) for n in BATCH_SIZES]
    if dynamic:
        odd, other = other_sizes(batch)
        try:
            resized = [_run_case(graph, vary(batch, n, odd)) for n in BATCH_SIZES]
        except ConfigError:  # the network takes certain multiples only
            resized = [_run_case(graph, vary(batch, n, other)) for n in BATCH_SIZES]
        cases = resized + cases
    names = {tuple(case.outputs) for case in cases}
    if len(names) > 1:
        raise ConfigError(
            f"{type(graph.model).__name__} gives {' or '.join(str(len(n)) for n in sorted(names))} tensors for batches "
            "of several lengths, and a graph has fixed outputs. Let it return a tensor [N, ...], not a list of N."
        )
    return cases


def _run_case(graph: Graph, inputs: Batch) -> Case:
    with torch.no_grad(), FirstOfEquals():
        try:
            outputs = graph.run(inputs)
            model = graph.model
            if isinstance(model, ImageSegmenter):
                outputs["masks"] = graph.predict(inputs)
            prediction = _all_boxes(model, graph, inputs) if isinstance(model, ImageDetector) else None
        except ConfigError:
            raise
        except Exception as error:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.items())
            raise ConfigError(
                f"{type(graph.model).__name__} does not run on {shapes}: {type(error).__name__}: {error}. Pass "
                "example_inputs, a batch of what it takes, or input_size; dynamic_size=False if only one size will do."
            ) from error
    return Case({name: tensor.clone() for name, tensor in inputs.items()}, outputs, prediction)


def _all_boxes(detector: ImageDetector, graph: Graph, inputs: Batch) -> Any:
    """The predictions of a detector without its limits."""
    limits = detector.max_detections, detector.score_threshold
    detector.max_detections, detector.score_threshold = 2**31, 0.0
    try:
        return graph.predict(inputs)
    finally:
        detector.max_detections, detector.score_threshold = limits


def _find_axes(cases: Sequence[Case], dynamic: bool) -> Axes:
    """Name the axes of variable length: those of the inputs, and those of the outputs that vary among the cases."""
    axes: Axes = {}
    for name, tensor in cases[0].inputs.items():
        axes[name] = {0: "batch_size"}
        if dynamic and is_images(tensor):
            axes[name].update({2: "height", 3: "width"})
    for name in cases[0].outputs:
        lengths = zip(*(case.outputs[name].shape for case in cases), strict=True)
        varying = [axis for axis, values in enumerate(lengths) if len(set(values)) > 1]
        axes[name] = {axis: "batch_size" if axis == 0 else f"{name}_axis_{axis}" for axis in varying}
    return axes
