import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from iris_hf.errors import ConfigError, DataError
from iris_hf.models.classifier import append_classifier
from iris_hf.models.hub import from_pretrained, save_pretrained
from iris_hf.models.recipe import register_model_factory
from iris_hf.models.sources.open_clip import create_tokenizer
from iris_hf.models.sources.text_encoders import create_hf_text_encoder
from iris_hf.models.sources.timm import create_timm_model
from iris_hf.models.sources.transformers import create_hf_model
from iris_hf.models.steps import as_predictor

from .families import BERT, FAMILIES, NAMES, RESNET, TOWERS, make, make_batch, make_inputs


def predict(model, name):
    """All that a model gives for a batch, as one list of tensors."""
    model.eval()
    with torch.no_grad():
        inputs = make_batch(name)[0] if name in FAMILIES else make_inputs(name)
        return list(as_predictor(model)(inputs))


def nudge(model):
    """Change every weight and statistic, so that what is saved is not what a seed gives."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and "normalize" not in name and "anchors" not in name:
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.01)


@pytest.mark.parametrize("name", [*FAMILIES, *TOWERS])
def test_a_saved_model_comes_back_with_equal_outputs(name, tmp_path):
    model = make(name)
    nudge(model)
    expected = predict(model, name)
    save_pretrained(model, tmp_path)
    torch.manual_seed(99)
    loaded = from_pretrained(tmp_path)
    assert not loaded.training
    for a, b in zip(predict(loaded, name), expected, strict=True):
        assert torch.equal(a, b)
    for attribute in ("target_type", "num_classes", "class_names", "image_spec"):
        assert getattr(loaded, attribute) == getattr(model, attribute)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}

    save_pretrained(loaded, tmp_path)  # a second generation, over the first
    for a, b in zip(predict(from_pretrained(tmp_path), name), expected, strict=True):
        assert torch.equal(a, b)


def test_a_fresh_process_gives_equal_outputs(tmp_path):
    names = ["hf-vit", "hf-rt_detr", "append_classifier"]
    for name in names:
        model = make(name)
        save_pretrained(model, tmp_path / name)
        save_file(
            {str(i): t.contiguous() for i, t in enumerate(predict(model, name))}, tmp_path / f"{name}.safetensors"
        )
    program = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from iris_hf.models.hub import from_pretrained
from models.test_hub import predict
for name in sys.argv[2:]:
    outputs = predict(from_pretrained(Path(sys.argv[1]) / name), name)
    expected = load_file(Path(sys.argv[1]) / f"{name}.safetensors")
    assert all(torch.equal(t, expected[str(i)]) for i, t in enumerate(outputs)), name
print("equal")
"""
    project = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(project), str(project / "tests")])}
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), *names], env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "equal", result.stderr


def test_plain_transformers_loads_what_we_save(tmp_path):
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    model = make("hf-vit").eval()
    save_pretrained(model, tmp_path)
    network = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert network.config.id2label == dict(enumerate(NAMES))
    picture = Image.effect_noise((32, 32), 90).convert("RGB")
    from iris_hf.models.transforms import create_image_transform

    image = create_image_transform(model)(picture)
    with torch.no_grad():
        probabilities = model.prediction_step(image[None])[0]
        pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(network(pixels).logits.softmax(1)[0], probabilities)
    scores = {d["label"]: d["score"] for d in pipeline("image-classification", model=str(tmp_path))(picture)}
    assert scores == pytest.approx(dict(zip(NAMES, probabilities.tolist(), strict=True)), abs=1e-5)


def test_we_load_what_plain_transformers_saves(tmp_path):
    from transformers import AutoModelForImageClassification, ResNetConfig

    torch.manual_seed(0)
    config = ResNetConfig(**{k: v for k, v in RESNET.items() if k != "model_type"}, id2label=dict(enumerate(NAMES)))
    network = AutoModelForImageClassification.from_config(config).eval()
    network.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert (model.target_type, model.class_names) == ("multiclass", NAMES)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.prediction_step(images), network((images - 0.5) / 0.5).logits.softmax(1))


def test_half_precision_survives(tmp_path):
    for name in ("timm-resnet", "hf-resnet", "hf-clip", "hf-siglip", "open_clip", "hf-bert"):
        model = make(name).to(torch.bfloat16)
        save_pretrained(model, tmp_path / name)
        loaded = from_pretrained(tmp_path / name)
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert torch.equal(predict(loaded, name)[0], predict(model, name)[0])


@register_model_factory("tests.tied")
def make_tied(*, width: int, inner: nn.Module) -> nn.Module:
    """Two names for one weight, around a module that was given."""
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), inner)
    model[1].weight = model[0].weight
    return model


def test_registered_factories_nest_and_tied_weights_stay_tied(tmp_path):
    model = make_tied(width=4, inner=nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.2), nn.Linear(4, 2, bias=False)))
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded[1].weight is loaded[0].weight
    assert len(load_file(tmp_path / "model.safetensors")) == len(model.state_dict()) - 1
    x = torch.rand(3, 4)
    assert torch.equal(loaded(x), model.eval()(x))


def test_a_model_that_nobody_knows_how_to_make_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"make this Conv2d again.*register_model_factory"):
        save_pretrained(nn.Conv2d(1, 1, 1), tmp_path)
    for folder in (None, __file__):
        with pytest.raises(ConfigError, match="A model is saved in a folder, not as"):
            save_pretrained(nn.Linear(1, 1), folder)
    with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, got None"):
        save_pretrained(None, tmp_path)
    model = append_classifier(nn.Conv2d(1, 1, 1), nn.Linear(1, 2), task_type="multiclass_classification")
    with pytest.raises(ConfigError, match=r"'model' of append_classifier is a Conv2d.*register_model_factory"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="'append_classifier' is registered already"):
        register_model_factory("append_classifier")(make_tied)


def test_numbers_named_like_weights_are_saved(tmp_path):
    model = make_tied(width=4, inner=nn.Identity())
    for harmless in ([1.0, 3.0], {"cat": 1.0, "dog": 3}, 2):
        model._recipe.arguments.update(weights=harmless, pretrained_window_sizes=[8, 8])
        save_pretrained(model, tmp_path)
    for harmful in (True, "weights.pth", ["weights.pth"], {"file": "weights.pth"}):
        model._recipe.arguments["weights"] = harmful
        with pytest.raises(DataError, match=r"would load weights="):
            save_pretrained(model, tmp_path)
    model._recipe.arguments.update(weights=None, pretrained=[1])
    with pytest.raises(DataError, match=r"would load pretrained=\[1\]"):
        save_pretrained(model, tmp_path)


def test_no_saved_file_tells_the_folder_that_a_model_came_from(tmp_path):
    origin = tmp_path / "secret-folder-of-alice"
    models = {
        "text": create_hf_text_encoder("bert", pretrained=False, config=BERT),
        "vit": make("hf-vit"),
        "clip": make("hf-clip"),
    }
    for name, model in models.items():
        save_pretrained(model, origin / name)
    text = create_hf_text_encoder(origin / "text")
    appended = append_classifier(text, nn.Linear(text.feature_dim, 2), task_type="multiclass_classification")
    clip = create_hf_model(origin / "clip", target_type="image_text")
    vit = create_hf_model(origin / "vit", target_type="multiclass")
    for name, model in {"appended": appended, "text": text, "clip": clip, "vit": vit}.items():
        save_pretrained(model, tmp_path / name)
        for file in (tmp_path / name).iterdir():
            assert b"alice" not in file.read_bytes(), file


def test_a_recipe_that_would_load_from_elsewhere_is_not_saved(tmp_path):
    model = make_tied(width=4, inner=nn.Identity())
    model._recipe.arguments["text_cfg"] = {"hf_model_name": "alice/words"}
    with pytest.raises(DataError, match=r"would load hf_model_name='alice/words'"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_kind_of_number_are_refused_by_name(tmp_path):
    model = make_tied(width=4, inner=nn.BatchNorm1d(4))
    save_pretrained(model, tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    for name, dtype in (("0.weight", torch.int32), ("2.num_batches_tracked", torch.float32)):
        save_file({**saved, name: saved[name].to(dtype)}, file)
        with pytest.raises(DataError, match=rf"don't fit.*{name} is {dtype} instead of"):
            from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["timm-resnet", "hf-vit"])
def test_broken_folders_are_refused_by_name(name, tmp_path):
    save_pretrained(make(name), tmp_path)
    weights, recipe = tmp_path / "model.safetensors", tmp_path / "iris_hf.json"
    saved, stored = weights.read_bytes(), json.loads(recipe.read_text())

    weights.write_bytes(saved[: len(saved) // 2])
    with pytest.raises(DataError, match=r"model.safetensors' is cut short"):
        from_pretrained(tmp_path)

    weights.unlink()
    with pytest.raises(DataError, match=r"holds no weights \(model\.safetensors\)"):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"pytorch_model.bin is a pickle"):
        from_pretrained(tmp_path)

    tensors = load_file_from(saved, weights)
    key = next(k for k, v in tensors.items() if v.ndim > 1)
    save_file({**tensors, key: torch.zeros(2, 2)}, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match=key):
        from_pretrained(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != key}, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match=rf"missing.*{key}"):
        from_pretrained(tmp_path)
    weights.write_bytes(saved)

    recipe.write_text(json.dumps({**stored, "factory": "create_time_model"}))
    with pytest.raises(ConfigError, match=r"Unknown model factory.*Did you mean.*create_timm_model.*Import the module"):
        from_pretrained(tmp_path)
    recipe.write_text(json.dumps({**stored, "format": 7}))
    with pytest.raises(DataError, match=r"has the format 7, this iris_hf reads 1"):
        from_pretrained(tmp_path)
    recipe.write_text("{")
    with pytest.raises(DataError, match=r"iris_hf.json' is no JSON"):
        from_pretrained(tmp_path)


def load_file_from(content, path):
    path.write_bytes(content)
    return {k: v.clone() for k, v in load_file(path).items()}


def test_an_empty_folder_and_an_unknown_repository_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no model: neither iris_hf.json nor the config.json"):
        from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"from a folder or a repository of the Hub, not from None"):
        from_pretrained(None)
    with pytest.raises(DataError, match=r"'nobody/nothing' is no folder"):
        from_pretrained("nobody/nothing")


def test_loading_runs_no_download_of_pretrained_weights(tmp_path):
    model = create_timm_model("resnet10t", num_classes=3, config={"drop_rate": 0.1})
    save_pretrained(model, tmp_path)
    stored = json.loads((tmp_path / "iris_hf.json").read_text())
    assert "pretrained" not in stored["arguments"]
    assert stored["arguments"]["config"] == {"drop_rate": 0.1}
    hf = make("hf-vit")
    assert hf._recipe.arguments["pretrained"] is False


def test_a_saved_model_leaves_nothing_of_the_model_before(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(make("hf-vit"), tmp_path)
    for name in ("tokenizer_config.json", "vocab.txt", "model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    model = make("timm-resnet")
    save_pretrained(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"iris_hf.json", "model.safetensors", "notes.txt"}
    for a, b in zip(predict(from_pretrained(tmp_path), "timm-resnet"), predict(model, "timm-resnet"), strict=True):
        assert torch.equal(a, b)

    (tmp_path / "iris_hf.json").unlink()  # as plain transformers would leave it
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    save_pretrained(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"iris_hf.json", "model.safetensors", "notes.txt"}


@pytest.mark.parametrize("content", ['{"learning_rate": 0.1}', "[]", "no JSON"])
def test_a_configuration_of_something_else_stays(content, tmp_path):
    for name, text in (("config.json", content), ("vocab.txt", "words")):
        (tmp_path / name).write_text(text)
    save_pretrained(make("timm-resnet"), tmp_path)
    assert (tmp_path / "config.json").read_text() == content
    assert (tmp_path / "vocab.txt").read_text() == "words"


def test_a_model_that_cannot_be_saved_leaves_the_one_before(tmp_path):
    save_pretrained(make("hf-vit"), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    model = make("timm-resnet")
    model.register_buffer("later", torch.zeros(1, device="meta"))  # has no data to write
    with pytest.raises(Exception, match="meta"):
        save_pretrained(model, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("file", "auto_class"),
    [("config.json", "AutoConfig"), ("preprocessor_config.json", "AutoImageProcessor")],
)
def test_code_in_a_folder_of_transformers_is_refused_without_asking(file, auto_class, tmp_path, monkeypatch):
    model = make("hf-vit")
    save_pretrained(model, tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    content = json.loads((tmp_path / file).read_text())
    content["model_type" if file == "config.json" else "image_processor_type"] = "evil"
    (tmp_path / file).write_text(json.dumps({**content, "auto_map": {auto_class: "evil.Evil"}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    with pytest.raises(DataError, match=r"code of its own \(auto_map\), which is not run"):
        create_hf_model(tmp_path, target_type="multiclass", class_names=NAMES)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"id2label": {"1": "a", "2": "b"}}),
        ("config.json", {"architectures": [3]}),
        ("config.json", {"dtype": "load", "torch_dtype": "load"}),
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"model_type": ["vit"]}),
        ("preprocessor_config.json", {"image_mean": 0.5}),
        ("preprocessor_config.json", {"rescale_factor": 0}),
        ("preprocessor_config.json", {"image_processor_type": "pipeline"}),
    ],
)
def test_a_strange_folder_of_transformers_is_a_data_error_that_names_it(file, changes, tmp_path):
    save_pretrained(make("hf-vit"), tmp_path)
    (tmp_path / "iris_hf.json").unlink()
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | changes))
    with pytest.raises(DataError, match=str(tmp_path)):
        from_pretrained(tmp_path)


def test_code_of_a_tokenizer_is_refused_without_asking(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    content = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))
    with pytest.raises(DataError, match=r"code of its own .auto_map., which is not run"):
        create_tokenizer(str(tmp_path))
    assert not (tmp_path / "trace").exists()
