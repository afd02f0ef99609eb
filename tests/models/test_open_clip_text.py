"""Models of open_clip whose text tower or tokenizer is of transformers: what open_clip computes, saved and loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from iris_hf.data.image_text_transform import make_image_text_transform
from iris_hf.data.prompts import build_classification_prompt_dataset
from iris_hf.errors import ConfigError, DataError
from iris_hf.inference.predictor import predict
from iris_hf.models.classifier import append_classifier
from iris_hf.models.contrastive import split_image_text_model
from iris_hf.models.hub import from_pretrained, save_pretrained
from iris_hf.models.sources.open_clip import create_open_clip_model, create_tokenizer
from iris_hf.models.transforms import create_image_transform
from iris_hf.models.zero_shot import build_zero_shot_classifier

from .test_hub import nudge
from .words import open_clip_config, save_bert

TEXTS = ["A big, red DOG.", "two cats", "a " * 40]
OPTIONS = {"clean": "canonicalize", "strip_sep_token": True}
TOWERS = {
    "bert": {"hf_model_name": "{folder}", "tokenizer_kwargs": OPTIONS, "hf_pooler_type": "cls_pooler"},
    "own": {"vocab_size": 15, "width": 16, "heads": 2, "layers": 1, "no_causal_mask": True, "pool_type": "last"},
}
"""Text towers around a tokenizer of transformers: one of transformers, and open_clip's own as in SigLIP."""


def make_model(folder: Path, tower: str, name: str = "alices-clip", **options):
    text_cfg = {k: save_bert(folder) if v == "{folder}" else v for k, v in TOWERS[tower].items()}
    torch.manual_seed(0)
    model = create_open_clip_model(name, config=open_clip_config(save_bert(folder), **text_cfg) | options)
    nudge(model)
    return model.eval()


def facts(model) -> list[torch.Tensor]:
    """The tokens of a few texts, and the features of images and texts."""
    tokens = create_tokenizer(model)(TEXTS)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [tokens, *model((images, tokens))]


def zero_shot(model) -> list[torch.Tensor]:
    """What the parts give: a pair of the transform, and the probabilities of a classifier made of texts."""
    image_model, text_model, logit_scale = split_image_text_model(model)
    names = ["cat", "dog"]
    prompts, tokenizer = build_classification_prompt_dataset(names), create_tokenizer(text_model)
    features, classes = predict(prompts, text_model, tokenizer, batch_size=8, num_dataloader_workers=0, device="cpu")
    classifier = build_zero_shot_classifier(features, classes, logit_scale, num_classes=2)
    classify = append_classifier(image_model, classifier, task_type="multiclass_classification").eval()
    transform = make_image_text_transform(
        create_image_transform(model), names, lambda name: [f"a big {name}."], tokenizer
    )
    (pixels, tokens), target = transform(Image.new("RGB", (40, 36), (10, 200, 90)), 1)
    with torch.no_grad():
        return [pixels, tokens, torch.tensor(target), classify.prediction_step(pixels[None])]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_towers_and_tokenizer_are_open_clips(tmp_path, monkeypatch):
    from open_clip import factory

    config = open_clip_config(save_bert(tmp_path / "bert"), **TOWERS["bert"])
    config["text_cfg"]["hf_model_name"] = str(tmp_path / "bert")
    (tmp_path / "tiny-bert-clip.json").write_text(json.dumps(config))
    with monkeypatch.context() as patch:
        patch.setattr(factory, "_MODEL_CONFIGS", factory._MODEL_CONFIGS)
        patch.setattr(factory, "_MODEL_CONFIG_PATHS", factory._MODEL_CONFIG_PATHS[:])
        factory.add_model_config(tmp_path / "tiny-bert-clip.json")
        whole = factory.create_model("tiny-bert-clip", pretrained_text=False).float().eval()
        model = create_open_clip_model("tiny-bert-clip").eval()
        assert model.text_model.tokenizer_name == "tiny-bert-clip"
        model.text_model.network.load_state_dict(whole.text.state_dict())
        expected = facts(model)
        for tokenizer in (create_tokenizer("tiny-bert-clip"), factory.get_tokenizer("tiny-bert-clip")):
            assert torch.equal(tokenizer(TEXTS), expected[0])
        with torch.no_grad():
            torch.testing.assert_close(model.text_model(expected[0]), whole.encode_text(expected[0]))
        save_pretrained(model, tmp_path / "saved")
    assert_equal(facts(from_pretrained(tmp_path / "saved")), expected)  # where open_clip does not know the name


@pytest.mark.parametrize("tower", TOWERS)
def test_text_tower_and_tokenizer_travel_with_the_model(tower, tmp_path, monkeypatch):
    origin, saved = tmp_path / "alices-words", tmp_path / "saved"
    model = make_model(origin, tower, init_logit_bias=-10.0 if tower == "own" else None)
    expected, parts = facts(model), zero_shot(model)
    save_pretrained(model, saved)
    shutil.rmtree(origin)
    monkeypatch.chdir(tmp_path)
    for generation in ("first", "second"):
        moved = tmp_path / generation
        shutil.move(saved, moved)
        assert not [file for file in moved.iterdir() if b"alices-words" in file.read_bytes()]
        loaded = from_pretrained(moved)
        assert loaded.text_model.tokenizer_name == str(moved)
        assert_equal(facts(loaded), expected)
        assert_equal(zero_shot(loaded), parts)
        assert torch.equal(create_tokenizer(moved)(TEXTS), expected[0])  # by its name alone
        save_pretrained(loaded, saved)
        shutil.rmtree(moved)


def test_the_towers_of_such_a_model_are_saved_apart(tmp_path):
    model = make_model(tmp_path / "bert", "bert")
    tokens, *_ = facts(model)
    parts = split_image_text_model(model)
    for name, tower, inputs in (
        ("image", parts.image_model, torch.rand(2, 3, 32, 32)),
        ("text", parts.text_model, tokens),
    ):
        with torch.no_grad():
            expected = tower(inputs)
            save_pretrained(tower, tmp_path / name)
            assert torch.equal(from_pretrained(tmp_path / name)(inputs), expected)
    assert not list((tmp_path / "image").glob("tokenizer*"))
    assert torch.equal(create_tokenizer(from_pretrained(tmp_path / "text"))(TEXTS), tokens)
    model.tokenizer_name = None
    save_pretrained(model, tmp_path / "bare")
    assert from_pretrained(tmp_path / "bare").tokenizer_name is None


def test_a_tower_has_random_weights_unless_asked_for(tmp_path):
    from transformers import BertConfig, BertModel

    folder = Path(save_bert(tmp_path / "bert"))
    network = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    nudge(network)
    network.save_pretrained(folder)
    expected = network.state_dict()
    for asked in (True, False):
        config = open_clip_config(str(folder), hf_model_name=str(folder), hf_model_pretrained=asked)
        tower = create_open_clip_model("alices-clip", config=config).text_model.network.transformer
        assert tower.training
        same = [torch.equal(v, expected[k].float()) for k, v in tower.state_dict().items()]
        assert all(same) == asked


def test_built_in_tokenizers_need_no_file(tmp_path):
    config = open_clip_config(None, width=16, heads=2, layers=1, vocab_size=49408)
    model = create_open_clip_model("alices-clip", config=config)
    save_pretrained(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"iris_hf.json", "model.safetensors"}
    assert_equal(facts(from_pretrained(tmp_path)), facts(model.eval()))


def test_what_cannot_travel_is_refused_where_it_is_made(tmp_path):
    folder = save_bert(tmp_path)
    config = open_clip_config(folder, hf_model_name={"model_type": "gpt2"})
    for changes, message in (
        ({}, r"Unknown type of a text tower of open_clip 'gpt2'.*Known: bert"),
        ({"hf_model_name": folder, "hf_pooler_type": "max_pooler"}, r"Unknown hf_pooler_type 'max_pooler'"),
        ({"hf_model_name": folder, "context_length": 13}, r"context_length=13, and its text tower takes at most 12"),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, r"Unknown option of a tokenizer.*'trust_remote_code'"),
        ({"hf_model_name": 5}, r"hf_model_name must be a repository, a folder or a configuration, got 5"),
        ({"tokenizer_kwargs": ["clean"]}, r"tokenizer_kwargs must be a mapping"),
        ({"hf_tokenizer_name": None, "tokenizer_kwargs": OPTIONS}, r"needs hf_tokenizer_name, the repository"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_open_clip_model("alices-clip", config=config | {"text_cfg": config["text_cfg"] | changes})
    with pytest.raises(ConfigError, match=r"needs hf_tokenizer_name.* a name like 'alices-siglip'"):
        create_open_clip_model("alices-siglip", config=open_clip_config(None))
    with pytest.raises(ConfigError, match=r"text_cfg must be a mapping, got 3"):
        create_open_clip_model("alices-clip", config=config | {"text_cfg": 3})
    with pytest.raises(ConfigError, match=r"config must be a mapping such as .*, got \[1\]"):
        create_open_clip_model("ViT-B-32", config=[1])
    model = create_open_clip_model("alices-clip", config=open_clip_config("alice/nothing", **TOWERS["own"]))
    with pytest.raises(ConfigError, match=r"'alice/nothing' is no architecture of open_clip, and no tokenizer"):
        save_pretrained(model, tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())


def test_a_stored_model_of_open_clip_loads_nothing_from_elsewhere(tmp_path):
    model = make_model(tmp_path / "bert", "bert")
    save_pretrained(model, tmp_path / "saved")
    recipe, options = tmp_path / "saved" / "iris_hf.json", tmp_path / "saved" / "tokenizer_open_clip.json"
    stored = json.loads(recipe.read_text())
    text_cfg = stored["arguments"]["config"]["text_cfg"]
    tower = text_cfg["hf_model_name"]
    for changes, message in (
        ({"hf_model_name": "mallory/bert"}, "would load hf_model_name='mallory/bert'"),
        ({"hf_model_name": "."}, "would load hf_model_name='.'"),
        ({"hf_tokenizer_name": "mallory/words"}, "would load hf_tokenizer_name='mallory/words'"),
        ({"hf_model_pretrained": True}, "would load hf_model_pretrained=True"),
        ({"hf_model_name": {**tower, "text": {"auto_map": {"AutoConfig": "evil.Evil"}}}}, "would load auto_map="),
        ({"hf_model_name": {**tower, "quantization_config": {}}}, "would load quantization_config="),
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "trust_remote_code=|option of a tokenizer"),
    ):
        stored["arguments"]["config"]["text_cfg"] = text_cfg | changes
        recipe.write_text(json.dumps(stored))
        with pytest.raises((DataError, ConfigError), match=message):
            from_pretrained(tmp_path / "saved")
    for text in ({}, None, {k: v for k, v in text_cfg.items() if k != "hf_model_name"}):
        stored["arguments"] |= {"name": "roberta-ViT-B-32", "config": {"text_cfg": text}}
        recipe.write_text(json.dumps(stored))
        with pytest.raises(DataError, match="would load name='roberta-ViT-B-32'"):
            from_pretrained(tmp_path / "saved")
    for content in ([], {"trust_remote_code": True}, {"tokenizer_kwargs": {"cache_dir": "x"}}, {"context_length": 0}):
        options.write_text(json.dumps({"context_length": 12, **content} if isinstance(content, dict) else content))
        with pytest.raises(DataError, match=r"tokenizer_open_clip.json' does not describe a tokenizer"):
            create_tokenizer(tmp_path / "saved")
