"""Every family exports, and the graph takes and gives what the model does."""

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from models.families import FAMILIES, IMAGE_TEXT, TOWERS, make
from onnx_models import (
    HAS_RUNTIME,
    KINDS_OF_TIMM,
    Baked,
    CountingTower,
    Headless,
    Listing,
    MaskedTower,
    Moving,
    Naming,
    Pair,
    Scaled,
    Squeezed,
    Stepped,
    TokenTower,
    enliven,
    far_from_exact,
    features,
    zero_shot,
)
from onnx_sessions import open_session, run
from torch import nn
from trained import draw_digits, train_on_digits

from iris_hf.errors import ConfigError, DataError, MissingDependencyError
from iris_hf.export.cases import Free, make_cases
from iris_hf.export.choices import FirstOfEquals
from iris_hf.export.examples import make_inputs, split_inputs
from iris_hf.export.exporters import find_exporters
from iris_hf.export.graph import make_graph
from iris_hf.export.onnx import export_onnx, export_onnx_model
from iris_hf.export.runtime import load_onnx
from iris_hf.models.contrastive import split_image_text_model
from iris_hf.models.feature_extractor import make_feature_extractor_model

pytestmark = pytest.mark.skipif(not HAS_RUNTIME, reason="the packages of the extra onnx are not installed")


DEEP = ("hf-rt_detr", "hf-rt_detr_v2", "hf-mobilenet_v2", "hf-mobilevit-segmentation", "hf-mobilevitv2")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_exports_and_predicts_the_same(name, tmp_path):
    size, target_type = FAMILIES[name].size, FAMILIES[name].target_type
    model = enliven(make(name), size)
    export = export_onnx_model(model, input_size=size, folder=tmp_path)
    # Of these, torch itself is as far from the exact values: see test_deep_networks_round_no_worse_than_in_torch.
    assert export.max_error <= (5e-5 if name in DEEP else 1e-5)
    assert "logits" in export.output_names
    assert export.exporter == find_exporters()[0]
    assert export.dynamic_size == (model.image_spec.variable_size and name != "hf-swin")
    model.eval()
    loaded = load_onnx(tmp_path)
    for height, width in [(size, size), (size + 64, size + 25)][: 1 + export.dynamic_size]:
        images = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.no_grad(), FirstOfEquals():  # RT-DETR chooses among equal scores
            expected = model.prediction_step(images)
        predicted = loaded.prediction_step(images)
        if target_type == "detection":
            for rows, wanted in zip(predicted, expected, strict=True):
                assert rows.shape == wanted.shape
                torch.testing.assert_close(rows[:, 1], wanted[:, 1], atol=1e-5, rtol=0)
                closest = (rows[:, None] - wanted[None]).abs().amax(2).amin(1)  # near ties may change places
                assert closest.max() < 1e-4
        elif target_type == "segmentation":
            assert predicted.dtype == torch.uint8
            assert (predicted != expected).float().mean() < 0.02  # a pixel with two equal classes may go either way
        else:
            assert (expected[0] - expected[1]).abs().max() > 1e-3  # a constant would prove nothing
            torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", DEEP)
def test_deep_networks_round_no_worse_than_in_torch(name, tmp_path):
    size = FAMILIES[name].size
    model = enliven(make(name), size)
    export_onnx(model, input_size=size, folder=tmp_path)
    batch, layout = split_inputs(make_inputs(model, size, size))
    graph, exact = make_graph(model, batch, layout), make_graph(model, batch, layout).double()
    cases = make_cases(graph, batch, Free(images=True, texts=False))
    in_torch, in_onnx = far_from_exact(graph, exact, cases, tmp_path / "model.onnx")
    assert 1e-6 < in_torch < 5e-5  # what a program that computes in float32 is off
    assert in_onnx < 2 * in_torch


@pytest.mark.parametrize("name", DEEP)
def test_deep_networks_that_were_trained_are_as_close_as_others(name):
    size = FAMILIES[name].size
    model = train_on_digits(name)
    export = export_onnx_model(model, input_size=size)
    assert export.max_error <= 1e-5
    assert export.dynamic_size
    images = torch.stack([image for image, _ in draw_digits(FAMILIES[name].target_type, size)[:2]])
    with torch.no_grad():
        logits = model.network(images).logits
    assert (logits[0] - logits[1]).abs().max() > 1e-2  # they tell images apart


@pytest.mark.parametrize("name", KINDS_OF_TIMM)
def test_networks_of_timm_of_several_kinds_export(name):
    model = enliven(KINDS_OF_TIMM[name]())
    export = export_onnx_model(model, input_size=64 if model.image_spec.variable_size else model.image_spec.height)
    assert export.max_error <= 1e-5
    assert export.output_names == ("logits", "probabilities")


def test_feature_extractors_export(tmp_path):
    model = features().eval()
    assert export_onnx_model(model, input_size=32, folder=tmp_path).max_error <= 1e-5
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = model.prediction_step(images)
    torch.testing.assert_close(load_onnx(tmp_path).prediction_step(images), expected, atol=1e-5, rtol=0)


def towers_of(name):
    """An image-text model and both of its towers, or a tower itself."""
    model = make(name).eval()
    return [model, *split_image_text_model(model)[:2]] if name in IMAGE_TEXT else [model]


@pytest.mark.parametrize("name", TOWERS)
def test_image_text_models_and_their_towers_export(name):
    for model in towers_of(name):
        export = export_onnx_model(model, input_size=32)
        assert export.max_error <= 1e-5
        names = ("image_features", "text_features", "logit_scale") if model.target_type else ("features",)
        assert export.output_names[: len(names)] == names
        assert export.dynamic_length == ("input_ids" in export.input_names)


def test_the_graph_normalises_and_takes_any_batch_size():
    model = make("timm-resnet").eval()
    data = export_onnx(model, input_size=32)
    assert isinstance(data, bytes)
    images = torch.rand(7, 3, 32, 32)
    outputs = run(data, pixel_values=images)
    with torch.no_grad():
        torch.testing.assert_close(outputs["probabilities"], model.prediction_step(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(outputs["logits"], model(images), atol=1e-5, rtol=1e-5)


def test_the_model_stays_as_it_is():
    model = make("hf-vit").train()
    model.network.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    export_onnx(model)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_a_model_of_one_size_is_exported_at_that_size():
    session = open_session(export_onnx(make("hf-vit")))
    assert session.get_inputs()[0].shape[1:] == [3, 32, 32]
    with pytest.raises(ConfigError, match=r"takes images of 32 x 32 \(height x width\) only, and input_size is 64"):
        export_onnx(make("hf-vit"), input_size=64)


def test_any_module_with_a_step_or_forward_exports():
    images = torch.rand(3, 3, 16, 16)
    model = Stepped().eval()
    outputs = run(export_onnx(model, input_size=16), pixel_values=images)
    assert sorted(outputs) == ["logits", "probabilities"]
    with torch.no_grad():
        torch.testing.assert_close(outputs["probabilities"], model.prediction_step(images), atol=1e-6, rtol=0)
        plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 3), nn.Softmax(1)).eval()
        outputs = run(export_onnx(plain, input_size=16), pixel_values=images)
        torch.testing.assert_close(outputs["predictions"], plain(images), atol=1e-6, rtol=0)


def test_nested_predictions_come_back_nested(tmp_path):
    model = Naming().eval()
    export_onnx(model, input_size=16, folder=tmp_path)
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        expected = model.prediction_step(images)
    predicted = load_onnx(tmp_path).prediction_step(images)
    assert torch.equal(predicted["classes"], expected["classes"])
    for a, b in zip(predicted["best"], expected["best"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_text_towers_take_tokens_or_a_dict(tmp_path):
    tower = TokenTower().eval()
    export_onnx(tower, folder=tmp_path / "tokens")
    tokens = torch.randint(50, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(load_onnx(tmp_path / "tokens").prediction_step(tokens), tower(tokens))

    masked = MaskedTower().eval()
    inputs = {"input_ids": torch.randint(50, (2, 5)), "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5])}
    with pytest.raises(ConfigError, match=r"Nothing tells what tokens MaskedTower takes. Pass example_inputs"):
        export_onnx(masked)
    export_onnx(masked, inputs, folder=tmp_path / "dict")
    longer = {name: torch.cat([t, t]) for name, t in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(load_onnx(tmp_path / "dict").prediction_step(longer), masked(longer))


@pytest.mark.parametrize("name", ["hf-bert", "open_clip", "hf-clip"])
def test_texts_may_have_any_number_of_tokens(name, tmp_path):
    encoder = make(name).eval()
    if name in IMAGE_TEXT:
        encoder = split_image_text_model(encoder).text_model
    export_onnx(encoder, folder=tmp_path)
    loaded = load_onnx(tmp_path)
    assert loaded.dynamic_length
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 3, encoder.max_length):
        inputs = torch.randint(2, 97, (3, num_tokens), generator=generator)
        if name != "open_clip":
            inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
            inputs["attention_mask"][1, 1:] = 0
        with torch.no_grad():
            torch.testing.assert_close(loaded.prediction_step(inputs), encoder(inputs), atol=1e-5, rtol=0)
    many = torch.ones(3, 200, dtype=torch.long)
    many = many if name == "open_clip" else {"input_ids": many, "attention_mask": many}
    with pytest.raises(DataError, match=r"ONNX Runtime fails on input_ids \[3, 200\]"):
        loaded(many)


def test_texts_keep_their_length_where_it_is_asked_for_or_part_of_the_model(caplog):
    ids = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    fixed = open_session(export_onnx(MaskedTower(), inputs, dynamic_length=False))
    assert [i.shape[1] for i in fixed.get_inputs()] == [6, 6]
    assert not caplog.records
    assert not export_onnx_model(CountingTower(), inputs).dynamic_length
    assert "The graph of CountingTower for texts of any length is wrong, and less is tried" in caplog.text
    with pytest.raises(ConfigError, match=r"output 'predictions' by .*dynamic_length=False"):
        export_onnx(CountingTower(), inputs, dynamic_length=True)
    with pytest.raises(ConfigError, match=r"dynamic_length is for texts of more than one token, and Stepped takes"):
        export_onnx(Stepped(), input_size=16, dynamic_length=True)


def test_pairs_of_images_and_texts_export(tmp_path):
    model = Pair().eval()
    export = export_onnx_model(model, input_size=16, folder=tmp_path)
    assert export.input_names == ("pixel_values", "input_ids")
    assert export.output_names == ("image_features", "text_features", "logit_scale")
    pair = torch.rand(4, 3, 16, 16), torch.randint(50, (4, 7))
    with torch.no_grad():
        expected = model(pair)
    predicted = load_onnx(tmp_path).prediction_step(pair)
    assert isinstance(predicted, tuple)
    for a, b in zip(predicted, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_zero_shot_classifiers_export():
    model = zero_shot().eval()
    export = export_onnx_model(model, input_size=32)
    assert export.max_error <= 1e-5
    layer = model.network[1]
    features = torch.rand(3, 512)
    torch.testing.assert_close(run(export_onnx(layer), features=features)["predictions"], layer(features).detach())


def test_an_output_may_be_called_like_an_input(tmp_path):
    boxes = {"boxes": torch.rand(2, 4)}
    assert export_onnx_model(Moving(), boxes, folder=tmp_path).output_names == ("boxes_2", "given")
    moved = load_onnx(tmp_path).prediction_step(boxes)
    assert torch.equal(moved["boxes"], boxes["boxes"] + 1)
    assert torch.equal(moved["given"], boxes["boxes"])
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    part = make_feature_extractor_model(network, output_module_name="0")
    assert export_onnx_model(part).output_names == ("features_2",)


def test_a_failed_export_leaves_an_older_one_as_it_is(tmp_path):
    data = export_onnx(Stepped(), input_size=16, folder=tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError):
        export_onnx(Baked(), input_size=16, folder=tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    assert files["model.onnx"] == data


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Stepped(), {"precision": "fp8"}, "Unknown precision 'fp8'"),
        (Stepped(), {"exporter": "onnx2"}, "Unknown exporter 'onnx2'"),
        (Stepped(), {"opset": 9}, "opset must be 18 or later, got 9"),
        (Stepped(), {"input_size": 0}, r"input_size must be a positive number of pixels, or \[height, width\], got 0"),
        (Stepped(), {"input_size": [32]}, "input_size must be a positive number"),
        (Stepped(), {"tolerance": -1.0}, "tolerance must not be negative, got -1.0"),
        (Stepped(), {"input_size": 2}, "Stepped does not run on pixel_values"),
        (Stepped(), {"example_inputs": "cat"}, "tensors only; here is a str"),
        (Stepped(), {"example_inputs": ()}, "example_inputs must be a batch of tensors of one length"),
        (TokenTower(), {"dynamic_size": True}, "dynamic_size is for images, and TokenTower takes input_ids"),
        (Squeezed(), {"input_size": 16}, r"axes that depends on the batch: \[5\] or \[\]. Name the axis that goes"),
        (Listing(), {"input_size": 16}, r"Let it return a tensor \[N, ...\], not a list of N"),
        ("a model", {}, "must be a torch.nn.Module, got str"),
        (nn.Module(), {}, "has no forward"),
    ],
)
def test_bad_input_is_named(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        export_onnx(model, **arguments)


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(ConfigError, match=r"is a file. Give a folder"):
        export_onnx(Stepped(), input_size=16, folder=tmp_path / "file")


def test_missing_packages_name_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a)
    )
    with pytest.raises(MissingDependencyError, match=r"export_onnx needs onnxruntime: pip install 'iris-hf\[onnx\]'"):
        export_onnx(Stepped(), input_size=16)


def test_no_path_of_this_machine_is_in_the_file():
    data = export_onnx(Stepped(), input_size=16)
    assert str(Path(__file__).parents[2]).encode() not in data
    assert b"site-packages" not in data


def test_the_result_is_one_file_that_onnx_accepts():
    import onnx

    model = onnx.load(io.BytesIO(export_onnx(make("hf-resnet"), input_size=64, opset=20)))
    onnx.checker.check_model(model)
    assert next(o.version for o in model.opset_import if o.domain == "") == 20


def test_a_size_may_be_fixed():
    session = open_session(export_onnx(make("timm-resnet"), input_size=(32, 48), dynamic_size=False))
    assert session.get_inputs()[0].shape[1:] == [3, 32, 48]


def test_only_probabilities_are_called_so():
    export = export_onnx_model(Scaled(), input_size=16)
    assert (export.output_names, export.agreement) == (("logits", "predictions"), None)


def test_none_keeps_its_place_among_tensors(tmp_path):
    export_onnx(Headless(), input_size=16, folder=tmp_path)
    images = torch.rand(3, 3, 16, 16)
    logits, none = load_onnx(tmp_path).prediction_step(images)
    assert none is None
    torch.testing.assert_close(logits, Headless().eval()(images).detach(), atol=1e-6, rtol=0)
