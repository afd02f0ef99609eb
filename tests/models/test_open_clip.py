"""Models of open_clip, and tokenizers of open_clip and transformers."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from iris_hf.errors import ConfigError, DataError
from iris_hf.models.sources.open_clip import create_open_clip_model, create_tokenizer
from models.words import save_word_tokenizer

from .families import make


def test_open_clip_towers_equal_the_whole_model():
    import open_clip

    model = make("open_clip").eval()
    torch.manual_seed(0)
    config = model._recipe.arguments["config"]
    base = open_clip.get_model_config("ViT-B-32")
    architecture = {k: {**v, **config[k]} if isinstance(v, dict) else config.get(k, v) for k, v in base.items()}
    whole = open_clip.create_model("ViT-B-32", **architecture).eval()  # the class CLIP, one flat module
    state = open_clip.model.convert_to_custom_text_state_dict(whole.state_dict())
    model.image_model.network.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("visual.")})
    model.text_model.network.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("text.")})
    images, tokens = torch.rand(2, 3, 32, 32), create_tokenizer(model)(["a dog", "two cats"])
    mean, std = (
        torch.tensor(v).reshape(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        expected = whole((images - mean) / std, tokens)
        for ours, theirs in zip(model((images, tokens)), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(model.text_model(tokens), whole.encode_text(tokens))
    assert model.image_spec.resize == "crop"
    assert model.logit_scale.item() == pytest.approx(np.log(1 / 0.07))


def test_open_clip_tokenizer_gives_tokens_and_pickles():
    tokenizer = pickle.loads(pickle.dumps(create_tokenizer("ViT-B-32")))
    tokens = tokenizer(["a dog", "two cats"])
    assert tokens.shape == (2, 77)
    assert torch.equal(tokenizer("two cats"), tokens[1])


def test_transformers_tokenizer_gives_dicts_of_one_length(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "dog": 3}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=5
    ).save_pretrained(tmp_path)
    tokenizer = create_tokenizer(str(tmp_path))
    encoded = pickle.loads(pickle.dumps(tokenizer))("a big dog")
    assert encoded["input_ids"].tolist() == [2, 1, 3, 0, 0]
    assert encoded["attention_mask"].tolist() == [1, 1, 1, 0, 0]
    assert tokenizer(["a", "a dog dog dog dog dog"])["input_ids"].shape == (2, 5)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, "would load init_inputs="),
        ("tokenizer_config.json", {"tokenizer_class": "AutoImageProcessor"}, "would load tokenizer_class='AutoImage"),
        ("special_tokens_map.json", {"vocab": "/etc/passwd"}, "would load vocab='/etc/passwd'"),
        (
            "config.json",
            {"model_type": "lightglue", "trust_remote_code": True, "keypoint_detector_config": {"model_type": "evil"}},
            "would load model_type='lightglue'",
        ),
    ],
)
def test_a_tokenizer_loads_nothing_from_elsewhere(file, content, message, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        create_tokenizer(tmp_path)


def test_a_tokenizer_reads_no_file_outside_its_folder(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("word")
    name = save_word_tokenizer(tmp_path / "tokens", model_max_length=10)
    file = tmp_path / "tokens" / "tokenizer_config.json"
    for key, message in (("vocab_file", "would load vocab_file="), ("dictionary", "reads dictionary='.*secret'")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dictionary": None, key: str(secret)}))
        with pytest.raises(DataError, match=message):
            create_tokenizer(name)
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: None}))


def test_a_tokenizer_of_another_version_is_no_way_out_of_the_folder(tmp_path):
    name = save_word_tokenizer(tmp_path / "tokens", model_max_length=10)
    folder = tmp_path / "tokens"
    (folder / "tokenizer.json").rename(folder / "tokenizer.4.0.0.json")
    file = folder / "tokenizer_config.json"
    changes = {"fast_tokenizer_files": ["tokenizer.4.0.0.json"], "tokenizer_file": "/other/tokenizer.json"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(DataError, match=r"would load tokenizer_file='/other/tokenizer.json'"):
        create_tokenizer(name)


def test_the_path_of_a_cache_in_an_old_tokenizer_is_no_matter(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ndog\n")
    content = {"tokenizer_class": "BertTokenizer", "tokenizer_file": "/root/.cache/none/tokenizer.json"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    assert create_tokenizer(tmp_path)(["a dog"])["input_ids"].tolist() == [[2, 5, 6, 3]]


def test_the_path_of_a_cache_beside_a_tokenizer_is_no_matter(tmp_path):
    name, other = (save_word_tokenizer(tmp_path / place, model_max_length=10) for place in ("tokens", "others"))
    (tmp_path / "others" / "tokenizer.json").write_text("no tokenizer")
    tokens = create_tokenizer(name)("a big red dog")["input_ids"].tolist()
    file = tmp_path / "tokens" / "tokenizer_config.json"
    for path in ("/root/.cache/none/tokenizer.json", f"{other}/tokenizer.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_file": path}))
        tokenizer = create_tokenizer(name)
        assert tokenizer("a big red dog")["input_ids"].tolist() == tokens
        tokenizer.save(tmp_path / "saved")
        assert "tokenizer_file" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_the_vocabulary_of_myt5_names_no_file(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MyT5Tokenizer"}))
    (tmp_path / "map.json").write_text("{}")
    maps = {"decompose_map": str(tmp_path / "map.json"), "merge_map": {}}
    (tmp_path / "byte_maps.json").write_text(json.dumps(maps))
    with pytest.raises(DataError, match=r"byte_maps.json' would load decompose_map='.*map.json'"):
        create_tokenizer(tmp_path)


def test_wrong_open_clip_requests_are_refused():
    with pytest.raises(ConfigError, match=r"Unknown open_clip model 'ViT-B32'. Did you mean .*'ViT-B-32'"):
        create_open_clip_model("ViT-B32")
    with pytest.raises(ConfigError, match=r"coca_base is a captioner"):
        create_open_clip_model("coca_base")
    with pytest.raises(ConfigError, match=r"Unknown pretrained weights of ViT-B-32 .*'laion'.*Known: .*openai"):
        create_open_clip_model("ViT-B-32", pretrained="laion")
    with pytest.raises(ConfigError, match=r"does not fit ViT-B-32: .*layer_count"):
        create_open_clip_model("ViT-B-32", config={"vision_cfg": {"layer_count": 1}})
    with pytest.raises(ConfigError, match=r"Unknown field of an architecture of open_clip .config. 'weights_only'"):
        create_open_clip_model("ViT-B-32", config={"weights_only": False})
    with pytest.raises(ConfigError, match="Flatten has no tokenizer"):
        create_tokenizer(nn.Flatten())
    with pytest.raises(ConfigError, match=r"'nobody/nothing' is no architecture of open_clip, and no tokenizer"):
        create_tokenizer("nobody/nothing")
