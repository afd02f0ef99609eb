"""An exported folder is loaded by ONNX Runtime's model classes, by `pipeline`, and by iris_hf as a model."""

import concurrent.futures
import copy
import json
import pickle
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from models.families import FAMILIES, NAMES, make, make_batch
from models.resnet20 import load_cifar10, load_resnet20
from models.words import open_clip_config, save_bert, save_word_tokenizer
from onnx_models import HAS_OPTIMUM, HAS_RUNTIME, Stepped, enliven, zero_shot

import iris_hf
from iris_hf.cli import main
from iris_hf.errors import ConfigError, DataError
from iris_hf.export.onnx import export_onnx, export_onnx_model
from iris_hf.export.runtime import OnnxModel, load_onnx
from iris_hf.models.contrastive import split_image_text_model
from iris_hf.models.hub import from_pretrained, save_pretrained
from iris_hf.models.sources.open_clip import create_open_clip_model, create_tokenizer
from iris_hf.models.sources.text_encoders import create_hf_text_encoder
from iris_hf.models.transforms import create_image_transform
from iris_hf.tasks import TASKS

pytestmark = pytest.mark.skipif(not HAS_RUNTIME, reason="the packages of the extra onnx are not installed")
needs_optimum = pytest.mark.skipif(not HAS_OPTIMUM, reason="Optimum's classes for ONNX need transformers 4")

PICTURE = PIL.Image.effect_noise((70, 50), 90).convert("RGB")


class Images(torch.utils.data.Dataset):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], index


@needs_optimum
@pytest.mark.parametrize("name", ["hf-vit", "hf-vit-multilabel", "hf-swin", "timm-resnet", "append_classifier"])
def test_pipeline_gives_the_models_probabilities(name, tmp_path):
    from optimum.onnxruntime import ORTModelForImageClassification
    from transformers import AutoImageProcessor, pipeline

    model = make(name).eval()
    size = FAMILIES[name].size
    export_onnx(model, input_size=size, folder=tmp_path)
    network = ORTModelForImageClassification.from_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    classify = pipeline("image-classification", model=network, image_processor=processor)
    with torch.no_grad():
        expected = model.prediction_step(create_image_transform(model)(PICTURE)[None])[0]
    names = NAMES if model.class_names else [f"LABEL_{i}" for i in range(3)]
    scores = {d["label"]: d["score"] for d in classify(PICTURE, top_k=3)}
    assert scores == pytest.approx(dict(zip(names, expected.tolist(), strict=True)), abs=1e-5)


@needs_optimum
@pytest.mark.parametrize("name", ["hf-detr", "hf-segformer"])
def test_other_models_load_as_custom_tasks(name, tmp_path):
    from optimum.onnxruntime import ORTModelForCustomTasks

    model = make(name).eval()
    export_onnx(model, input_size=64, folder=tmp_path)
    images = torch.rand(2, 3, 64, 96)
    outputs = ORTModelForCustomTasks.from_pretrained(tmp_path)(pixel_values=images)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(outputs["logits"], getattr(expected, "logits", expected), atol=1e-5, rtol=0)


@needs_optimum
def test_segmenters_load_in_the_segmentation_pipeline(tmp_path):
    from optimum.onnxruntime import ORTModelForSemanticSegmentation
    from transformers import AutoImageProcessor, pipeline

    model = make("hf-segformer").eval()
    export_onnx(model, input_size=64, folder=tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    network = ORTModelForSemanticSegmentation.from_pretrained(tmp_path)
    segments = pipeline("image-segmentation", model=network, image_processor=processor)(PICTURE)
    assert {s["label"] for s in segments} <= set(NAMES)
    assert all(s["mask"].size == PICTURE.size for s in segments)


@pytest.mark.parametrize("name", ["hf-vit", "hf-yolos", "hf-segformer"])
def test_an_exported_folder_predicts_as_the_model_does(name, tmp_path):
    model = make(name)
    images, _ = make_batch(name, n=5)
    export_onnx(model, input_size=FAMILIES[name].size, folder=tmp_path)
    loaded = load_onnx(tmp_path)
    settings = {"batch_size": 2, "device": "cpu", "num_dataloader_workers": 0}
    expected = iris_hf.predict(Images(images), model, **settings)
    got = iris_hf.predict(Images(images), loaded, **settings)
    assert torch.equal(got.targets, expected.targets)
    for a, b in zip(got.predictions, expected.predictions, strict=True):
        if FAMILIES[name].target_type == "detection":
            a, b = a[:, 1], b[:, 1]
        torch.testing.assert_close(a.float(), b.float(), atol=1e-5, rtol=0)
    for attribute in ("target_type", "num_classes", "class_names"):
        assert getattr(loaded, attribute) == getattr(model, attribute)


def test_the_transform_of_an_exported_model_is_that_of_the_model(tmp_path):
    model = make("timm-resnet")
    export_onnx(model, input_size=32, folder=tmp_path)
    transforms = create_image_transform(load_onnx(tmp_path)), create_image_transform(model)
    assert torch.equal(transforms[0](PICTURE), transforms[1](PICTURE))


def test_images_of_several_sizes_are_run_one_by_one(tmp_path):
    model = enliven(make("hf-yolos")).eval()
    export_onnx(model, input_size=64, folder=tmp_path)
    images = [torch.rand(3, 64, 64), torch.rand(3, 80, 100)]
    predicted = load_onnx(tmp_path).prediction_step(images)
    with torch.no_grad():
        for rows, image in zip(predicted, images, strict=True):
            torch.testing.assert_close(rows[:, 1], model.prediction_step(image[None])[0][:, 1], atol=1e-5, rtol=0)


def test_processes_and_threads_predict_the_same(tmp_path):
    export_onnx(Stepped(), input_size=16, folder=tmp_path)
    loaded = load_onnx(tmp_path)
    images = torch.rand(12, 3, 16, 16)
    expected = loaded.prediction_step(images)
    for twin in (pickle.loads(pickle.dumps(loaded)), copy.deepcopy(loaded)):
        assert torch.equal(twin.prediction_step(images), expected)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(loaded.prediction_step, [images] * 8):
            assert torch.equal(result, expected)
    spread = iris_hf.predict(
        Images(images), loaded, batch_size=3, num_processes=2, device="cpu", num_dataloader_workers=0
    )
    torch.testing.assert_close(spread.predictions, expected)


def test_inputs_that_do_not_fit_are_named(tmp_path):
    export_onnx(Stepped(), input_size=16, folder=tmp_path)
    loaded = load_onnx(tmp_path)
    with pytest.raises(DataError, match=r"pixel_values of the shape \[batch_size, 3, 16, 16\], got \[2, 3, 16, 17\]"):
        loaded(torch.rand(2, 3, 16, 17))
    with pytest.raises(DataError, match=r"The graph takes pixel_values, and the inputs are input_ids"):
        loaded(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(DataError, match=r"inputs must be a batch of tensors of one length"):
        loaded([])


def test_folders_that_hold_no_export_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no model.onnx. Export a model there"):
        load_onnx(tmp_path)
    export_onnx(Stepped(), input_size=16, folder=tmp_path)
    description = tmp_path / "iris_hf_onnx.json"
    stored = json.loads(description.read_text())
    description.write_text("{")
    with pytest.raises(DataError, match=r"is no JSON"):
        load_onnx(tmp_path)
    description.write_text("{}")
    with pytest.raises(DataError, match=r"does not describe an ONNX model: it needs inputs and prediction"):
        load_onnx(tmp_path)
    description.write_text(json.dumps({**stored, "format": 7}))
    with pytest.raises(DataError, match=r"has the format 7, this iris_hf reads 1. Update it"):
        load_onnx(tmp_path)
    for damage, message in (
        ({"prediction": {}}, r"is damaged: prediction is \{\}. Export the model anew"),
        ({"prediction": {"boxes": "detections"}}, r"is damaged: prediction is"),
        ({"prediction": {"layout": {"set": ["logits"]}}}, r"json' is damaged: prediction is .*'set'"),
        ({"prediction": {"layout": None}}, r"is damaged: prediction is"),
        ({"prediction": {"layout": "elsewhere"}}, r"prediction is made of elsewhere, and model.onnx gives \w+"),
        ({"prediction": {"boxes": "elsewhere", "score_threshold": 0}}, r"prediction is made of elsewhere, and"),
        ({"prediction": {"boxes": "detections", "score_threshold": "0"}}, r"is damaged: prediction is"),
        ({"inputs": 3}, r"is damaged: inputs is 3"),
        ({"target_type": ["multiclass"]}, r"is damaged: target_type is \['multiclass'\]"),
        ({"num_classes": "3"}, r"is damaged: num_classes is '3'"),
        ({"class_names": "ab"}, r"is damaged: class_names is 'ab'"),
        ({"max_length": 1.5}, r"is damaged: max_length is 1.5"),
        ({"dynamic_size": "no"}, r"is damaged: dynamic_size is 'no'"),
        ({"image_spec": {"height": 0, "width": 3}}, r"is damaged: .*height must be.*got 0"),
        ({"image_spec": {"depth": 3}}, r"is damaged: .*'depth' \(image_spec\)"),
    ):
        description.write_text(json.dumps({**stored, **damage}))
        with pytest.raises(DataError, match=message):
            load_onnx(tmp_path)
    description.write_text(json.dumps(stored))
    (tmp_path / "model.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:200])
    with pytest.raises(DataError, match=r"ONNX Runtime cannot read"):
        load_onnx(tmp_path)


def test_a_graph_reads_no_weights_from_other_files(tmp_path, monkeypatch):
    import onnx

    export_onnx(Stepped(), input_size=16, folder=tmp_path / "model")
    file = tmp_path / "model" / "model.onnx"
    graph = onnx.load(str(file))
    for weights in graph.graph.initializer:
        content = onnx.numpy_helper.to_array(weights).tobytes()
        for folder in (tmp_path, tmp_path / "model"):
            (folder / f"{weights.name}.bin").write_bytes(content)
        weights.ClearField("raw_data")
        weights.ClearField("float_data")
        weights.data_location = onnx.TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=f"{weights.name}.bin")
    file.write_bytes(graph.SerializeToString())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"ONNX Runtime cannot read .*External data path does not exist"):
        load_onnx(tmp_path / "model")


def test_the_folder_holds_labels_configuration_and_errors(tmp_path):
    export = export_onnx_model(make("hf-vit"), folder=tmp_path)
    assert json.loads((tmp_path / "labels.json").read_text()) == NAMES
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0, 0, 0], [1, 1, 1])
    assert json.loads((tmp_path / "iris_hf_onnx.json").read_text())["errors"] == export.errors
    export_onnx(zero_shot(), input_size=32, folder=tmp_path)
    assert not (tmp_path / "labels.json").exists()  # of the model that was there before


def test_a_folder_holds_a_model_or_an_export(tmp_path):
    model = make("hf-vit").eval()
    save_pretrained(model, tmp_path)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"holds a model, and files of the same names.*such as '.*/onnx'"):
        export_onnx(model, folder=tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files
    export_onnx(model, folder=tmp_path / "onnx")
    files = {file.name: file.read_bytes() for file in (tmp_path / "onnx").iterdir()}
    with pytest.raises(ConfigError, match=r"holds an export to ONNX, and files of the same names"):
        save_pretrained(model, tmp_path / "onnx")
    assert {file.name: file.read_bytes() for file in (tmp_path / "onnx").iterdir()} == files
    images, _ = make_batch("hf-vit")
    with torch.no_grad():
        expected = model.prediction_step(images)
    save_pretrained(model, tmp_path)  # beside the subfolder
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path).prediction_step(images), expected)
    torch.testing.assert_close(load_onnx(tmp_path / "onnx").prediction_step(images), expected, atol=1e-5, rtol=0)


def test_the_tokenizer_travels_with_the_export(tmp_path):
    words = tmp_path / "words"
    settings = {"model_type": "bert", "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}
    name = save_word_tokenizer(words, model_max_length=10**30)
    encoder = create_hf_text_encoder(settings, pretrained=False, tokenizer=name).eval()
    tokens = create_tokenizer(encoder)(["a big red dog"])
    export_onnx(encoder, folder=tmp_path / "exported")
    shutil.rmtree(words)
    folder = (tmp_path / "exported").rename(tmp_path / "elsewhere")
    assert not [file.name for file in folder.iterdir() if str(tmp_path).encode() in file.read_bytes()]
    loaded = load_onnx(folder)
    tokenizer = create_tokenizer(loaded)
    assert tokenizer.max_length == encoder.max_length == 16
    assert torch.equal(tokenizer(["a big red dog"])["input_ids"], tokens["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(loaded.prediction_step(tokens), encoder(tokens), atol=1e-5, rtol=0)
    export_onnx(Stepped(), input_size=16, folder=folder)
    assert not list(folder.glob("tokenizer*"))
    assert load_onnx(folder).tokenizer_name is None
    file = folder / "iris_hf_onnx.json"
    description = json.loads(file.read_text())
    for name, known in (("ViT-B-32", True), ("evil/tok", False), (str(tmp_path), False)):
        file.write_text(json.dumps({**description, "tokenizer_name": name}))
        if known:
            assert load_onnx(folder).tokenizer_name == name
            continue
        with pytest.raises(DataError, match=rf"names the tokenizer '{name}'. Only what lies beside it is loaded"):
            load_onnx(folder)


def test_a_text_tower_of_open_clip_is_exported_with_its_tokenizer(tmp_path):
    name = save_bert(tmp_path / "bert")
    options = {"clean": "canonicalize", "strip_sep_token": True}
    nllb = {"model_type": "m2m_100", "d_model": 16, "vocab_size": 15, "pad_token_id": 0}  # the encoder of a translator
    for part in ("encoder", "decoder"):
        nllb |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    config = open_clip_config(name, hf_model_name=nllb, tokenizer_kwargs=options)
    model = create_open_clip_model("alices-clip", config=config).eval()
    save_pretrained(model, tmp_path / "saved")
    tokens = create_tokenizer(model)(["A big, red DOG.", "two cats"])
    text_model = split_image_text_model(from_pretrained(tmp_path / "saved")).text_model
    export_onnx(text_model, folder=tmp_path / "exported")
    loaded = load_onnx(tmp_path / "exported")
    assert torch.equal(create_tokenizer(loaded)(["A big, red DOG.", "two cats"]), tokens)
    with torch.no_grad():
        torch.testing.assert_close(loaded.prediction_step(tokens), model.encode_text(tokens), atol=1e-5, rtol=0)


def test_the_command_line_and_jobs_take_an_exported_folder(tmp_path, capsys):
    folder, images = tmp_path / "exported", tmp_path / "images"
    model = make("timm-resnet").eval()
    export_onnx(model, input_size=32, folder=folder)
    for name in ("blue", "red"):
        (images / name).mkdir(parents=True)
        PICTURE.save(images / name / "0.png")
    dataset = ["--dataset", str(images), "--model", str(folder), "--batch-size", "1"]
    predictions = ["--num-dataloader-workers", "0", "--save-predictions", str(tmp_path / "p.npy")]
    assert main(["predict", *dataset, *predictions]) == 0
    with torch.no_grad():
        expected = model.prediction_step(create_image_transform(model)(PICTURE)[None]).expand(2, -1)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "p.npy")), expected, atol=1e-5, rtol=0)
    capsys.readouterr()
    assert main(["benchmark_model", *dataset, "--num-iterations", "1", "--skip-training"]) == 0
    assert json.loads(capsys.readouterr().out)["prediction_throughput"] > 0
    assert isinstance(TASKS["load_onnx"].function(folder), OnnxModel)
    with pytest.raises(DataError, match=r"exported' holds an export to ONNX: load it with load_onnx"):
        from_pretrained(folder)
    with pytest.raises(ConfigError, match=r"got str. Load a saved one with from_pretrained, an export with load_onnx"):
        iris_hf.predict([torch.rand(3, 8, 8)], str(folder), device="cpu", num_dataloader_workers=0)


@pytest.mark.parametrize(("precision", "correct"), [("fp32", 915), ("fp16", 915), ("int8", 915)])
def test_the_published_accuracy_survives_the_export(precision, correct, shared_data, tmp_path):
    images, labels = load_cifar10(shared_data)
    export_onnx(load_resnet20(shared_data), images[:8], precision=precision, folder=tmp_path)
    predicted = load_onnx(tmp_path).prediction_step(images).argmax(1)
    assert int((predicted == labels).sum()) == pytest.approx(correct, abs=0 if precision == "fp32" else 2)
