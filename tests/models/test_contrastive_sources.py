"""Image-text models of transformers and open_clip are what these libraries compute, save and load."""

import pytest
import torch

from iris_hf.errors import ConfigError, DataError
from iris_hf.models.contrastive import split_image_text_model
from iris_hf.models.hub import from_pretrained, save_pretrained
from iris_hf.models.image_spec import Normalize
from iris_hf.models.sources.open_clip import create_open_clip_model, create_tokenizer
from iris_hf.models.sources.transformers import create_hf_model, hf_network
from iris_hf.models.transforms import create_image_transform

from .families import IMAGE_TEXT, make, make_pairs
from .words import save_word_tokenizer

TRANSFORMERS = [name for name in IMAGE_TEXT if name.startswith("hf-")]


def library_outputs(model):
    """What the transformers model computes of the same pairs, and its inputs."""
    network = hf_network(model).eval()
    images, tokens = make_pairs()
    return network, {"pixel_values": model.image_model.normalize(images), **tokens}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_logits_and_loss_are_the_librarys_own(name):
    model = make(name).eval()
    network, arguments = library_outputs(model)
    with torch.no_grad():
        library = network(**arguments, return_loss=True)
        image, text, scale, *bias = model(make_pairs())
        torch.testing.assert_close(image, library.image_embeds)
        torch.testing.assert_close(text, library.text_embeds)
        torch.testing.assert_close(scale * image @ text.T + sum(bias), library.logits_per_image)
        if name != "hf-align":  # transformers smooths the labels of ALIGN's loss by 0.1
            torch.testing.assert_close(model.training_step(make_pairs(), None)["loss"], library.loss)


# Chinese CLIP's get_text_features fails on transformers 4.57: it projects the output of a pooler that isn't there.
@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name != "hf-chinese_clip"])
def test_split_parts_are_get_image_and_text_features(name):
    model = make(name).eval()
    network, arguments = library_outputs(model)
    pixels = {"pixel_values": arguments.pop("pixel_values")}
    parts = split_image_text_model(model, append_normalizer=False)
    images, tokens = make_pairs()
    with torch.no_grad():
        for ours, theirs in (
            (parts.image_model(images), network.get_image_features(**pixels)),
            (parts.text_model(tokens), network.get_text_features(**arguments)),
        ):
            theirs = getattr(theirs, "pooler_output", theirs)  # transformers 5 returns an object
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["hf-clip", "hf-siglip", "hf-chinese_clip"])
def test_plain_transformers_loads_what_we_save(name, tmp_path):
    from transformers import AutoModel

    model = make(name).eval()
    with torch.no_grad():
        model.logit_scale.add_(0.1)
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_pretrained(model, tmp_path)
    network, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(v for k, v in info.items() if k != "error_msgs")
    assert type(network) is type(hf_network(model))
    _, arguments = library_outputs(model)
    with torch.no_grad():
        library = network.eval()(**arguments)
        image, text, scale, *bias = model(make_pairs())
        torch.testing.assert_close(scale * image @ text.T + sum(bias), library.logits_per_image)


@pytest.mark.parametrize("name", ["hf-clip", "hf-siglip"])
def test_we_load_what_plain_transformers_saves(name, tmp_path):
    model = make(name).eval()
    hf_network(model).save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert (loaded.target_type, loaded.loss) == ("image_text", "siglip" if "siglip" in name else "clip")
    assert loaded.tokenizer_name is None
    with torch.no_grad():
        assert torch.equal(loaded.prediction_step(make_pairs()), model.prediction_step(make_pairs()))
        assert torch.equal(loaded.logit_scale, model.logit_scale)
    trained = create_hf_model(tmp_path, target_type="image_text", loss=None if "siglip" in name else "unicl")
    assert trained.loss == ("siglip" if "siglip" in name else "unicl")


def test_clips_own_processor_and_tokenizer_travel_with_it(tmp_path):
    from PIL import Image
    from transformers import CLIPImageProcessor, pipeline

    network = hf_network(make("hf-clip")).eval()
    network.save_pretrained(tmp_path / "plain")
    CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "plain"
    )
    save_word_tokenizer(tmp_path / "plain", model_max_length=12)
    model = create_hf_model(tmp_path / "plain", target_type="image_text").eval()
    assert model.image_spec.crop_fraction == pytest.approx(0.8)
    assert model.image_spec.mean[0] == pytest.approx(0.48145466)
    tokens = create_tokenizer(model)(["a photo of a cat .", "a dog"])
    assert tokens["input_ids"].shape == (2, 12)
    save_pretrained(model, tmp_path / "ours")
    assert (tmp_path / "ours" / "tokenizer_config.json").is_file()
    loaded = from_pretrained(tmp_path / "ours")
    assert create_tokenizer(loaded)("a dog")["input_ids"].tolist() == tokens["input_ids"][1].tolist()
    picture = Image.effect_noise((60, 50), 90).convert("RGB")
    scores = pipeline("zero-shot-image-classification", model=str(tmp_path / "ours"))(
        picture, candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {}."
    )
    image = create_image_transform(model)(picture)
    texts = create_tokenizer(model)(["a photo of a cat.", "a photo of a dog."])
    with torch.no_grad():
        features = model.encode_image(image[None])
        logits = model.logit_scale.exp() * features @ model.encode_text(texts).T
    expected = dict(zip(["cat", "dog"], logits.softmax(1)[0].tolist(), strict=True))
    assert {s["label"]: s["score"] for s in scores} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("clip", {"class_names": ["a"]}, r"An image_text model has no classes, got class_names=\['a'\]"),
        ("clip", {"loss": "siglip"}, r"Unknown contrastive loss of clip \(without logit_bias\) 'siglip'.*clip, unicl"),
        ("siglip", {"loss": "clip"}, r"loss of siglip \(with logit_bias\) 'clip'.*Known: siglip"),
        ("blip", {}, r"Unknown model type for image_text .* 'blip'.*Known: .*clip.*siglip"),
        ("vit", {"target_type": "multiclass", "class_names": ["a"], "loss": "clip"}, r"loss='clip' is for target_type"),
    ],
)
def test_wrong_requests_are_refused(source, arguments, message):
    small = {"text_config": {"num_hidden_layers": 1}} if source != "vit" else {}
    known = {"target_type": "image_text", "pretrained": False, "config": small, **arguments}
    with pytest.raises(ConfigError, match=message):
        create_hf_model(source, **known)


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_network(make("hf-clip")).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if k != "visual_projection.weight"},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(DataError, match=r"missing keys: visual_projection.weight"):
        create_hf_model(tmp_path, target_type="image_text")


# ---- models of open_clip


def test_open_clip_chooses_its_loss():
    assert make("open_clip").loss == "clip"
    siglip = make("open_clip-siglip")
    assert (siglip.loss, siglip.logit_bias.item()) == ("siglip", -10)
    assert siglip.logit_scale.item() == pytest.approx(2.3)
    with pytest.raises(ConfigError, match=r"loss of ViT-B-32 \(without logit_bias\) 'siglip'"):
        create_open_clip_model(
            "ViT-B-32", loss="siglip", config=siglip._recipe.arguments["config"] | {"init_logit_bias": None}
        )


def test_a_changed_context_length_reaches_the_tokenizer():
    config = make("open_clip")._recipe.arguments["config"]
    config = {**config, "text_cfg": {**config["text_cfg"], "context_length": 16}}
    model = create_open_clip_model("ViT-B-32", config=config)
    tokens = create_tokenizer(model)("a photo of a very long caption " * 9)
    assert tokens.shape == (16,)
    assert model.encode_text(tokens[None]).shape == (1, 16)
    with pytest.raises(DataError, match=r"have 77 tokens, and this text encoder takes at most 16.*max_length=16"):
        model.encode_text(create_tokenizer("ViT-B-32")(["a"]))
    with pytest.raises(ConfigError, match="max_length=20, but the model takes at most 16 tokens"):
        create_tokenizer(model, max_length=20)


def test_short_tokens_are_filled_up_for_open_clip():
    model = make("open_clip").eval()
    with torch.no_grad():
        whole, short = (model.encode_text(create_tokenizer(model, max_length=n)(["a dog"])) for n in (None, 10))
    torch.testing.assert_close(short, whole)


def test_normalisation_stays_in_the_image_tower():
    for name in ("open_clip", "hf-clip"):
        normalize_layers = [m for m in make(name).image_model.modules() if isinstance(m, Normalize)]
        assert [tuple(round(v, 4) for v in m.mean.flatten().tolist()) for m in normalize_layers] == [
            (0.4815, 0.4578, 0.4082)
        ]
