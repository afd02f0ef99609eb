"""The ways from a graph to an ONNX file: Optimum's exporter, or torch's where Optimum cannot be imported."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from iris_hf.errors import ConfigError, MissingDependencyError, unknown_name
from iris_hf.export.examples import Batch
from iris_hf.export.graph import Graph
from iris_hf.export.operators import ExportableOperators, exportable_padding

EXPORTERS = ("auto", "optimum", "torchscript", "dynamo")

Axes = dict[str, dict[int, str]]
"""Name of an input or output -> index of an axis of variable length -> its name."""


def find_exporters(name: str = "auto") -> list[str]:
    """The exporters to try, in this order.

    Args:
        name: One of :data:`EXPORTERS`. `optimum` needs transformers 4. `torchscript` is the exporter of torch that
            Optimum calls, too; `dynamo` torch's newer one, which needs onnxscript and takes many times as long. `auto`:
            Optimum or else TorchScript, then dynamo where onnxscript is there.

    Raises:
        ConfigError: If the name is unknown.
        MissingDependencyError: If onnx or ONNX Runtime is missing, or what the exporter needs.
    """
    if name not in EXPORTERS:
        raise unknown_name("exporter", name, EXPORTERS)
    missing = [module for module in ("onnx", "onnxruntime") if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f"export_onnx needs {' and '.join(missing)}: pip install 'iris-hf[onnx]' with transformers 4, "
            "'iris-hf[onnx5]' with transformers 5."
        )
    has_onnxscript = importlib.util.find_spec("onnxscript") is not None
    if name == "dynamo" and not has_onnxscript:
        raise MissingDependencyError("The exporter 'dynamo' needs onnxscript: pip install 'iris-hf[onnx5]'.")
    if name in ("dynamo", "torchscript"):
        return [name]
    try:
        import optimum.exporters.onnx  # noqa: F401
    except ImportError as error:
        if name == "optimum":
            raise MissingDependencyError(
                "The exporter 'optimum' needs transformers 4 and optimum-onnx: pip install 'iris-hf[onnx]'. "
                "With transformers 5 leave the exporter to iris_hf."
            ) from error
        return ["torchscript", *["dynamo"] * has_onnxscript]
    return ["optimum"] if name == "optimum" else ["optimum", *["dynamo"] * has_onnxscript]


def write_onnx(graph: Graph, batch: Batch, axes: Axes, file: Path, *, opset: int, exporter: str) -> None:
    """Write a graph into one file.

    Args:
        graph: What to write.
        batch: Inputs to trace it with.
        axes: The axes of variable length, of inputs and outputs.
        file: Where to.
        opset: Version of the operators.
        exporter: One of :func:`find_exporters`.

    Raises:
        ConfigError: If the exporter cannot write one of the operations.
    """
    write = {"optimum": _write_with_optimum, "torchscript": _write_with_torchscript, "dynamo": _write_with_dynamo}
    with quiet(), _without_fast_path(), ExportableOperators(), exportable_padding(), torch.no_grad():
        try:
            write[exporter](graph, batch, axes, file, opset)
        except Exception as error:
            raise ConfigError(
                f"{type(graph.model).__name__} cannot be exported by {exporter} with opset {opset}: {_reason(error)}"
            ) from error


def _reason(error: BaseException) -> str:
    """What is at the bottom of an exporter's error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def _write_with_optimum(graph: Graph, batch: Batch, axes: Axes, file: Path, opset: int) -> None:
    from optimum.exporters.onnx import export
    from optimum.exporters.onnx.base import OnnxConfig
    from optimum.utils import NormalizedConfig
    from transformers import PretrainedConfig

    class GraphConfig(OnnxConfig):  # type: ignore[misc]
        NORMALIZED_CONFIG_CLASS = NormalizedConfig
        DUMMY_INPUT_GENERATOR_CLASSES = ()

        @property
        def inputs(self) -> Axes:
            return {name: axes[name] for name in graph.input_names}

        @property
        def outputs(self) -> Axes:
            return {name: axes[name] for name in graph.output_names}

        def generate_dummy_inputs(self, framework: str = "pt", **_: Any) -> Mapping[str, Any]:
            return batch if framework == "pt" else {name: tensor.numpy() for name, tensor in batch.items()}

    graph.config = PretrainedConfig()
    export(graph, GraphConfig(graph.config), file, opset=opset)


def _write_with_dynamo(graph: Graph, batch: Batch, axes: Axes, file: Path, opset: int) -> None:
    from torch.export import Dim

    torch.onnx.export(
        graph,
        tuple(batch.values()),
        str(file),
        input_names=graph.input_names,
        output_names=graph.output_names,
        dynamic_shapes=tuple(dict.fromkeys(axes[name], Dim.DYNAMIC) for name in graph.input_names),
        opset_version=opset,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    _strip_traces(file)


def _write_with_torchscript(graph: Graph, batch: Batch, axes: Axes, file: Path, opset: int) -> None:
    torch.onnx.export(
        graph,
        tuple(batch.values()),
        str(file),
        input_names=graph.input_names,
        output_names=graph.output_names,
        dynamic_axes=axes,
        opset_version=opset,
        dynamo=False,
    )


def _strip_traces(file: Path) -> None:
    """Take out where in the sources each node comes from: paths of a machine, and most of the size of a small file."""
    import onnx

    model = onnx.load(str(file))
    for graph in (model.graph, *model.functions):
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        del graph.value_info[:]  # shapes from before the graph was simplified, which quantization would believe
    onnx.save(model, str(file))


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporters say of constants and deprecations: the check at several sizes finds what matters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "optimum", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keep torch's attention from calling a kernel that has no counterpart in ONNX."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
