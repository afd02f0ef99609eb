"""Folders whose JSON or weights are odd, and folders of timm."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from iris_hf.errors import DataError
from iris_hf.models.hub import from_pretrained, save_pretrained
from iris_hf.models.image_spec import ImageSpec
from iris_hf.models.sources.timm import create_timm_model
from iris_hf.models.sources.transformers import create_hf_model
from iris_hf.models.transforms import create_image_transform

from .families import NAMES, make


def store(file, **fields):
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({"a": "x", "b": "y"}, r"config.json' holds id2label=\{'a': 'x', 'b': 'y'\}. It must give numbers names"),
        (["x", "y"], r"config.json' holds id2label=\['x', 'y'\]"),
        ({"0": "x", "1": None}, r"config.json' holds id2label=\{'0': 'x', '1': None\}"),
        ({"0": "x", "2": "y", "5": "z"}, r"id2label in the configuration of '.*' has no name for class 1 of 3"),
        ({}, r"id2label in the configuration of '.*' has no name for any class. Correct it, or give class_names"),
    ],
)
def test_odd_names_of_classes_are_refused_by_name(id2label, message, tmp_path):
    make("hf-vit").network.network.save_pretrained(tmp_path)
    store(tmp_path / "config.json", id2label=id2label)
    with pytest.raises(DataError, match=message):
        create_hf_model(tmp_path, target_type="multiclass")
    with pytest.raises(DataError, match=message):
        from_pretrained(tmp_path)


def test_class_names_of_the_caller_go_before_gaps_and_doubles(tmp_path):
    make("hf-vit").network.network.save_pretrained(tmp_path)
    store(tmp_path / "config.json", id2label={"0": "crane", "1": "crane", "2": "z"})
    assert create_hf_model(tmp_path, target_type="multiclass").class_names == ["crane", "crane", "z"]
    store(tmp_path / "config.json", id2label={"0": "x", "2": "y", "5": "z"})
    assert create_hf_model(tmp_path, target_type="multiclass", class_names=NAMES).class_names == NAMES
    store(tmp_path / "config.json", id2label={"0": "x", "1": "y"})
    with pytest.raises(DataError, match=r"don't belong to its configuration. mismatched keys: classifier.*class_names"):
        create_hf_model(tmp_path, target_type="multiclass")
    assert create_hf_model(tmp_path, target_type="multiclass", class_names=["x", "y"]).num_classes == 2
    store(tmp_path / "config.json", num_labels=5)
    with pytest.raises(DataError, match=r"config.json' holds num_labels=5, and id2label names 2 classes. Correct one"):
        create_hf_model(tmp_path, target_type="multiclass", class_names=NAMES)
    store(tmp_path / "config.json", id2label=None, num_labels="3")
    with pytest.raises(DataError, match=r"config.json' holds num_labels='3', which must be a whole number"):
        create_hf_model(tmp_path, target_type="multiclass", class_names=NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_floats_become_float32(dtype, tmp_path):
    make("hf-vit").network.network.save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "vit.embeddings.cls_token"
    state = load_file(file)
    state[name] = torch.rand(state[name].shape, dtype=torch.float64).to(dtype)
    save_file(state, file, metadata={"format": "pt"})
    loaded = create_hf_model(tmp_path, target_type="multiclass").network.network.state_dict()[name]
    assert torch.equal(loaded, state[name].float())  # of float64 the nearest float32, of others the same number


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantised_weights_are_refused_by_name(dtype, kind, tmp_path):
    make("hf-vit").network.network.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["classifier.weight"] = state["classifier.weight"].to(dtype)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (from_pretrained, lambda folder: create_hf_model(folder, target_type="multiclass")):
        with pytest.raises(DataError, match=rf"model.safetensors' holds classifier.weight as {kind}; only F64, F32"):
            load(tmp_path)
    model = create_timm_model("resnet10t", num_classes=3)
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["network.network.fc.weight"] = state["network.network.fc.weight"].to(dtype)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=rf"model.safetensors' .*network.network.fc.weight is {dtype} instead of"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("image_mean", [0.5, 0.5], r"its image_mean is .0.5, 0.5., and must be three numbers"),
        ("image_mean", "abc", r"its image_mean is 'abc'"),
        ("image_mean", ["0.5"] * 3, r"its image_mean is .'0.5', '0.5', '0.5'."),
        ("image_std", [0.5, 0.5, 0], r"its image_std is .0.5, 0.5, 0., and must be three positive numbers"),
        ("image_std", 0.5, r"its image_std is 0.5"),
        ("rescale_factor", 0, r"its rescale_factor is 0, and must be a positive number"),
        ("rescale_factor", "1/255", r"its rescale_factor is '1/255'"),
        ("rescale_factor", None, r"it fails on an image with ValueError: `rescale_factor` must be specified"),
        ("resample", "soft", r"its settings make no image_spec, ValueError: .*'soft'"),
        ("size", {"height": 0, "width": 3}, r"its settings make no image_spec, ConfigError: .*height must be .*got 0"),
    ],
)
def test_an_image_processor_with_odd_settings_is_refused_with_the_way_out(setting, value, message, tmp_path):
    from transformers import ViTImageProcessor

    make("hf-vit").network.network.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    store(tmp_path / "preprocessor_config.json", **{setting: value})
    with pytest.raises(DataError, match=rf"(?s)ViTImageProcessor of '{tmp_path}'.*{message}.*takes: image_spec="):
        create_hf_model(tmp_path, target_type="multiclass")
    with pytest.raises(DataError, match=rf"(?s){message}.*Say to create_hf_model .*image_spec=.*save that model"):
        from_pretrained(tmp_path)
    model = create_hf_model(tmp_path, target_type="multiclass", image_spec=ImageSpec(height=32, width=32))
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).image_spec == ImageSpec(height=32, width=32)


@pytest.mark.parametrize(
    "known",
    [
        {"input_size": (3, 40, 48), "crop_pct": 0.8, "interpolation": "bilinear", "crop_mode": "squash"},
        {"input_size": (3, 64, 64), "crop_pct": 0.9, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)},
    ],
)
def test_a_folder_of_timm_takes_the_images_that_timm_says(known, tmp_path):
    import timm
    from transformers import AutoImageProcessor

    network = timm.create_model("resnet10t", num_classes=3, pretrained_cfg_overlay=known).eval()
    timm.models.save_for_hf(network, tmp_path, safe_serialization=True)
    model = create_hf_model(tmp_path, target_type="multiclass").eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    oracle = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    ours = create_image_transform(model)(image)[None]
    torch.testing.assert_close(model.network.normalize(ours), oracle, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(ours), network(oracle), atol=1e-5, rtol=0)
    save_pretrained(model, tmp_path / "saved")
    assert from_pretrained(tmp_path / "saved").image_spec == model.image_spec
    store(tmp_path / "config.json", pretrained_cfg={"input_size": [3]})
    with pytest.raises(DataError, match=r"pretrained_cfg of 'resnet10t' describes no images, .*Correct it in config"):
        create_hf_model(tmp_path, target_type="multiclass")


def test_a_bare_architecture_of_timm_takes_the_images_of_its_weights():
    source = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_384", "num_classes": 3}
    arguments = {"target_type": "multiclass", "class_names": NAMES, "pretrained": False}
    expected = create_timm_model("vit_tiny_patch16_384").image_spec
    assert (expected.height, expected.variable_size) == (384, False)
    assert create_hf_model(source, **arguments).image_spec == expected
    smaller = create_hf_model({**source, "model_args": {"img_size": 32}}, **arguments)
    assert (smaller.image_spec.height, smaller.image_spec.width) == (32, 32)
