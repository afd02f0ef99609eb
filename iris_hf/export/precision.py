"""Smaller ONNX files: half precision, and dynamic 8-bit integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from iris_hf.errors import ConfigError
from iris_hf.export.exporters import quiet

_QUANTIZED = ["MatMul", "Gemm"]
_NOT_IN_HALF = ["GridSample", "Resize"]
"""Operators that ONNX Runtime has in float32 only, or whose converted form it refuses."""


def convert(file: Path, precision: str) -> None:
    """Convert a float32 ONNX file in place. Inputs and outputs stay float32.

    Args:
        file: The ONNX file.
        precision: `fp16`, or `int8`: weights of matrix products are integers, and what is computed becomes so while
            the model runs. Convolutions stay float32, since dynamic integers make them slower.

    Raises:
        ConfigError: If there is nothing to convert.
    """
    with quiet():
        if precision == "fp16":
            _convert_to_fp16(file)
        elif precision == "int8":
            _quantize(file)


def _convert_to_fp16(file: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    model = onnx.load(str(file))
    half = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, *_NOT_IN_HALF],
        node_block_list=_crashing_transposes(model.graph),
    )
    _drop_twins(half.graph)
    onnx.save(half, str(file))


def _crashing_transposes(graph: Any) -> list[str]:
    """Names of the operators that would end ONNX Runtime with a segmentation fault in float16, on x86 CPUs.

    They move the first axis to one of the last two places, and a matrix product follows: so do the attentions of
    open_clip's text towers, tokens first. https://github.com/microsoft/onnxruntime/issues/28392
    """
    multiplied = {name for node in graph.node if node.op_type == "MatMul" for name in node.input}
    names = []
    for node in graph.node:
        if node.op_type == "Transpose" and not multiplied.isdisjoint(node.output):
            axes = next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
            if len(axes) > 2 and 0 in axes[-2:]:
                names.append(node.name)
    return names


def _drop_twins(graph: Any) -> None:
    """Drop the conversion of a tensor that was written down twice, once for each operator that takes it."""
    seen: set[tuple[str, ...]] = set()
    for node in list(graph.node):
        outputs = tuple(node.output)
        if node.op_type == "Cast" and outputs in seen:
            graph.node.remove(node)
        seen.add(outputs)


def _quantize(file: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    operators = {node.op_type for node in onnx.load(str(file)).graph.node}
    if not operators & set(_QUANTIZED):
        raise ConfigError(
            f"precision='int8' converts {' and '.join(_QUANTIZED)}, and the model has neither. Use 'fp16'."
        )
    try:
        from optimum.onnxruntime import ORTQuantizer
        from optimum.onnxruntime.configuration import AutoQuantizationConfig
        from transformers import PretrainedConfig
    except ImportError:
        target = file.with_name("quantized.onnx")
        quantize_dynamic(
            file,
            target,
            op_types_to_quantize=_QUANTIZED,
            per_channel=False,
            weight_type=QuantType.QUInt8,
            extra_options={"MatMulConstBOnly": False},  # as Optimum: products of what is computed, too
        )
        target.replace(file)
        return
    settings = AutoQuantizationConfig.avx2(is_static=False, per_channel=False, operators_to_quantize=_QUANTIZED)
    folder = file.parent / "quantized"
    ORTQuantizer(file, config=PretrainedConfig()).quantize(settings, save_dir=folder, file_suffix="")
    (folder / file.name).replace(file)
