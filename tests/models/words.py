"""A small tokenizer of transformers, for models with up to 99 tokens."""

import json
from pathlib import Path
from typing import Any

WORDS = ["a", "photo", "of", "cat", "dog", "red", "big", "two", "car", "."]


def save_word_tokenizer(folder: Path, *, model_max_length: int, pads: bool = True) -> str:
    """Write a tokenizer that knows `WORDS` into a folder, and return its name."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]" if pads else None,
        unk_token="[UNK]",
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
    return str(folder)


def save_bert(folder: Path) -> str:
    """Write what a repository with a BERT holds, but for its weights, into a folder, and return its name."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "bert", "vocab_size": 15, "hidden_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}
    config |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 12, "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return str(folder)


def open_clip_config(name: str, **text_cfg: Any) -> dict[str, Any]:
    """The configuration of a small model of open_clip, whose tokenizer is that of a repository or folder."""
    vision_cfg = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    text_cfg = {"context_length": 12, "hf_tokenizer_name": name, **text_cfg}
    return {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
