"""The two ways from a graph to an ONNX file: Optimum's exporter, or torch's where Optimum cannot be imported."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from iris_hf.errors import ConfigError, MissingDependencyError
from iris_hf.export.examples import Batch
from iris_hf.export.graph import Graph
from iris_hf.export.operators import ExportableOperators, exportable_padding

Axes = dict[str, dict[int, str]]
"""Name of an input or output -> index of an axis of variable length -> its name."""


def find_exporter() -> str:
    """`optimum` where it can be imported, else `torch`.

    Raises:
        MissingDependencyError: If there is neither.
    """
    _require("onnx", "onnxruntime")
    try:
        import optimum.exporters.onnx  # noqa: F401
    except ImportError:
        if importlib.util.find_spec("onnxscript") is None:
            raise MissingDependencyError(
                "export_onnx needs Optimum (transformers 4: pip install 'iris-hf[onnx]') or onnxscript "
                "(transformers 5: pip install 'iris-hf[onnx5]')."
            ) from None
        return "torch"
    return "optimum"


def write_onnx(graph: Graph, batch: Batch, axes: Axes, file: Path, *, opset: int) -> str:
    """Write a graph into one file and return the name of the exporter that did.

    Args:
        graph: What to write.
        batch: Inputs to trace it with.
        axes: The axes of variable length, of inputs and outputs.
        file: Where to.
        opset: Version of the operators.

    Raises:
        ConfigError: If the exporter cannot write one of the operations.
        MissingDependencyError: If no exporter is installed.
    """
    exporter = find_exporter()
    write = _write_with_optimum if exporter == "optimum" else _write_with_torch
    with quiet(), _without_fast_path(), ExportableOperators(), exportable_padding(), torch.no_grad():
        try:
            write(graph, batch, axes, file, opset)
        except Exception as error:
            raise ConfigError(
                f"{type(graph.model).__name__} cannot be exported by {exporter} with opset {opset}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return exporter


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


def _write_with_torch(graph: Graph, batch: Batch, axes: Axes, file: Path, opset: int) -> None:
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


def _strip_traces(file: Path) -> None:
    """Take out where in the sources each node comes from: paths of a machine, and most of the size of a small file."""
    import onnx

    model = onnx.load(str(file))
    for graph in (model.graph, *model.functions):
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
        for value in graph.value_info:
            del value.metadata_props[:]
    onnx.save(model, str(file))


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"{' and '.join(missing)} missing: pip install 'iris-hf[onnx]'.")


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
