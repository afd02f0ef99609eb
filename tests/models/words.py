"""A small tokenizer of transformers, for models with up to 99 tokens."""

from pathlib import Path

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
