"""Graphs in smaller numbers, and those of other exporters."""

import pytest
import torch
from models.families import make
from onnx_models import (
    HAS_ONNXSCRIPT,
    HAS_OPTIMUM,
    HAS_RUNTIME,
    Baked,
    Stepped,
    TokensFirst,
)
from onnx_sessions import run
from torch import nn

from iris_hf.errors import ConfigError, MissingDependencyError
from iris_hf.export.onnx import export_onnx, export_onnx_model

pytestmark = pytest.mark.skipif(not HAS_RUNTIME, reason="the packages of the extra onnx are not installed")


@pytest.mark.skipif(not HAS_ONNXSCRIPT, reason="torch's newer exporter needs onnxscript")
def test_torchs_newer_exporter_stands_the_same_check():
    for model in (Stepped(), make("timm-vit")):
        export = export_onnx_model(model, input_size=32, exporter="dynamo")
        assert export.exporter == "dynamo"
        assert export.max_error <= 1e-5
    with pytest.raises(ConfigError, match="Baked cannot be exported by dynamo"):
        export_onnx(Baked(), input_size=16, exporter="dynamo")


@pytest.mark.skipif(not HAS_ONNXSCRIPT, reason="torch's newer exporter needs onnxscript")
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_graphs_of_the_newer_exporter_become_smaller(precision):
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 10))
    export = export_onnx_model(model, input_size=16, exporter="dynamo", precision=precision)
    assert len(export.data) < 0.55 * sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(HAS_OPTIMUM, reason="Optimum is there")
def test_optimum_is_asked_for_by_name_where_it_cannot_be_imported():
    with pytest.raises(MissingDependencyError, match=r"needs transformers 4 and optimum-onnx: pip install"):
        export_onnx(Stepped(), input_size=16, exporter="optimum")


def test_half_precision_is_smaller_and_close():
    model = make("timm-resnet").eval()
    half = export_onnx_model(model, input_size=32, precision="fp16")
    assert len(half.data) < 0.55 * sum(p.nbytes for p in model.parameters())
    assert 1e-6 < half.max_error < 1e-2
    outputs = run(half.data, pixel_values=torch.rand(2, 3, 32, 32))
    assert {t.dtype for t in outputs.values()} == {torch.float32}


def test_half_precision_does_not_crash_the_runtime():
    # Without a detour through float32, this ends the process: github.com/microsoft/onnxruntime/issues/28392
    for name in ("fp16", "int8"):
        assert export_onnx_model(TokensFirst(), input_size=16, precision=name).max_error < 1e-2


def test_integers_are_smaller_and_their_error_is_reported():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 10))
    full, small = (export_onnx_model(model, input_size=16, precision=p) for p in ("fp32", "int8"))
    assert len(small.data) < 0.3 * len(full.data)
    images = torch.rand(2, 3, 16, 16)
    error = (run(small.data, pixel_values=images)["predictions"] - model(images).detach()).abs().max()
    assert 1e-5 < error < 3 * small.max_error < 0.3
    with pytest.raises(ConfigError, match=r"The int8 graph differs from the model: output 'predictions' by"):
        export_onnx(model, input_size=16, precision="int8", tolerance=1e-6)
    with pytest.raises(ConfigError, match=r"the model has neither. Use 'fp16'"):
        export_onnx(nn.Conv2d(3, 2, 3), input_size=16, precision="int8")


def test_integers_multiply_what_is_computed():
    import onnx

    class Products(nn.Module):
        def forward(self, images):
            rows = images.flatten(2)
            return rows @ rows.transpose(1, 2)

    data = export_onnx_model(Products(), input_size=16, precision="int8").data
    assert "MatMulInteger" in {node.op_type for node in onnx.load_from_string(data).graph.node}


def test_half_precision_models_export_in_float32():
    model = make("timm-resnet").to(torch.bfloat16)
    export = export_onnx_model(model, input_size=32)
    assert export.max_error <= 1e-5
    assert next(model.parameters()).dtype == torch.bfloat16
