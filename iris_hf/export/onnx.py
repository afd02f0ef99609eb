"""The export of a model to ONNX: traced, checked, and only then written."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from iris_hf.errors import ConfigError, unknown_name
from iris_hf.export.cases import Case, find_axes, find_freedom, make_cases
from iris_hf.export.check import TOLERANCES, Comparison, compare
from iris_hf.export.examples import DEFAULT_SIZE, choose_size, make_inputs, split_inputs
from iris_hf.export.exporters import Axes, find_exporters, write_onnx
from iris_hf.export.folder import MODEL_FILE, write_folder
from iris_hf.export.graph import Graph, make_graph
from iris_hf.export.precision import convert
from iris_hf.models.hub import refuse_model

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
        dynamic_length: Whether it takes texts of other lengths than it was traced with.
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
    dynamic_length: bool
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
    dynamic_length: bool | None = None,
    tolerance: float | None = None,
    folder: str | Path | None = None,
) -> bytes:
    """Turn a model into an ONNX file that is proven to give the same.

    The graph runs the prediction step. It takes what the model takes, so images in [0, 1]: the normalisation is in it.
    Its first axis, the batch, may have any length. Before anything is returned or written, ONNX Runtime and torch are
    compared at the batch sizes 1, 2 and 5, at two image sizes where the model takes any, and at two lengths of texts.

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
        dynamic_length: Whether the graph takes texts of any number of tokens up to the model's largest. None: if there
            is an attention mask among the inputs, or a text encoder of iris_hf in the model.
        tolerance: Largest absolute error allowed, as a multiple of the largest absolute value of an output, or of 1 for
            probabilities and boxes, and at least of 0.001. None: 0.05 for fp16, no limit for int8; 1e-4 for fp32, or
            where torch itself rounds by more (but not by more than 0.01 of the largest value and 1e-4, nor differently
            in each run), four times torch's distance from float64, with a warning.
        folder: Also write model.onnx there, with the configuration, the preprocessor and the labels that
            `ORTModelForImageClassification`, `ORTModelForCustomTasks` and `pipeline` load, and what
            :func:`iris_hf.export.runtime.load_onnx` needs. It must not hold a saved model, whose configuration and
            preprocessor have the same names.

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
        dynamic_length=dynamic_length,
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
    dynamic_length: bool | None = None,
    tolerance: float | None = None,
    folder: str | Path | None = None,
) -> OnnxExport:
    """Do what :func:`export_onnx` does, with its arguments and its errors, and report what was measured.

    Returns:
        The ONNX file, its largest differences from torch, and what the graph takes and gives.
    """
    if precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))
    if not isinstance(opset, int) or isinstance(opset, bool) or opset < 18:
        raise ConfigError(f"opset must be 18 or later, got {opset!r}.")
    if tolerance is not None and not tolerance >= 0:
        raise ConfigError(f"tolerance must not be negative, got {tolerance}.")
    if folder is not None and Path(folder).is_file():
        raise ConfigError(f"{str(folder)!r} is a file. Give a folder.")
    if folder is not None:
        refuse_model(Path(folder))
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
    strict = precision == "fp32" and tolerance is not None
    make_exact = None if strict else functools.cache(lambda: make_graph(model, batch, layout).double())
    with tempfile.TemporaryDirectory() as workplace:
        file = Path(workplace) / MODEL_FILE
        freedoms = find_freedom(model, batch, dynamic_size=dynamic_size, dynamic_length=dynamic_length)
        for free in freedoms:
            try:
                cases = make_cases(graph, batch, free)
                limit = allowed if precision == "fp32" else TOLERANCES["fp32"]
                axes = find_axes(cases, free)
                comparison, used = _write(graph, cases, axes, file, exporters, opset, limit, make_exact)
                break
            except ConfigError as error:
                if free == freedoms[-1]:
                    raise
                logger.warning(
                    "The graph of %s for %s is wrong, and less is tried: %s", type(model).__name__, free, error
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
        dynamic_size=free.images,
        dynamic_length=free.texts,
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


def _write(
    graph: Graph,
    cases: Sequence[Case],
    axes: Axes,
    file: Path,
    exporters: Sequence[str],
    opset: int,
    tolerance: float | None,
    make_exact: Callable[[], Graph] | None,
) -> tuple[Comparison, str]:
    """Write the file with the first exporter whose graph stands the check; return the errors and that exporter."""
    failure: ConfigError | None = None
    for exporter in exporters:
        try:
            write_onnx(graph, cases[0].inputs, axes, file, opset=opset, exporter=exporter)
            comparison = compare(graph, file, cases, precision="fp32", tolerance=tolerance, make_exact=make_exact)
            return comparison, exporter
        except ConfigError as error:
            if failure is None:
                failure = error
            else:
                failure.add_note(f"Nor with {exporter}: {error}")
    assert failure is not None
    raise failure
