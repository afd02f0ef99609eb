"""Image-text models of open_clip, and tokenizers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError, IrisHFError, require_integer, unknown_name
from iris_hf.losses.contrastive import ContrastiveKind
from iris_hf.models.classifier import ImageEncoder
from iris_hf.models.contrastive import ImageTextContrastiveModel, choose_loss
from iris_hf.models.image_spec import ImageSpec, make_image_spec
from iris_hf.models.pull import fetch
from iris_hf.models.recipe import record
from iris_hf.models.sources.image_text import longest_text
from iris_hf.models.sources.open_clip_text import (
    comes_with_open_clip,
    is_open_clip,
    load_tokenizer,
    name_tokenizer,
    read_options,
    settle_text_tower,
    tokenizer_fields,
    write_options,
)
from iris_hf.models.sources.packaged import resolve_packaged
from iris_hf.models.sources.tokenizers import load_hf_tokenizer
from iris_hf.models.text_encoder import TextEncoder

_RESIZE = {"shortest": "crop", "squash": "squash"}
_PARTS = ("embed_dim", "vision_cfg", "text_cfg")
_FIELDS = ("custom_text", "init_logit_bias", "init_logit_scale", "nonscalar_logit_scale", "quick_gelu")
_ANY = "ViT-B-32"  # open_clip makes nothing without a name, even of a whole configuration
_PADDED_LENGTH = 77  # of CLIP; SigLIP takes 64
_UNKNOWN_LENGTH = 100_000  # from here on, a length is transformers' way of saying that it does not know
_DEFAULT_LENGTH = 512


def create_open_clip_model(
    name: str,
    *,
    pretrained: str | None = None,
    config: Mapping[str, Any] | None = None,
    image_spec: ImageSpec | Mapping[str, Any] | None = None,
    loss: ContrastiveKind | None = None,
) -> ImageTextContrastiveModel:
    """Make an open_clip model, an image tower and a text tower, that takes images in [0, 1].

    Args:
        name: An architecture that open_clip knows, such as `ViT-B-32`, or a name of one's own for a whole `config`.
            Some have a tokenizer of the Hub, SigLIP's among them, or a text tower of transformers whose configuration
            is there. These are fetched where the model or its tokenizer is made first; `save_pretrained` stores them.
        pretrained: A tag of weights that open_clip fetches, such as `laion2b_s34b_b79k`, or a local file; None for
            random weights.
        config: Changes to the architecture, as in open_clip's own JSON files:
            `{"embed_dim": 64, "vision_cfg": {"layers": 2}, "text_cfg": {"layers": 2}}`. In `text_cfg`,
            `hf_tokenizer_name` may be a repository or folder, and `hf_model_name` also a configuration, as in
            :func:`iris_hf.create_hf_text_encoder`; that tower has its weights with `hf_model_pretrained=True` alone.
        image_spec: Fields of :class:`iris_hf.models.image_spec.ImageSpec` to change.
        loss: What trains it: `siglip` for architectures with a bias of the logits, `clip` or `unicl` for others. None
            takes the first that fits.

    Raises:
        ConfigError: If the name, or a part of the configuration, is unknown, the model has no two plain towers, or
            the loss is not for it.
        DataError: If the weights cannot be had.
    """
    import open_clip

    architecture = _find_architecture(name, config)
    if pretrained is not None and not isinstance(pretrained, (str, Path)):
        raise ConfigError(f"pretrained must be a tag such as 'openai', or a file, got {pretrained!r}.")
    if pretrained is not None and not Path(pretrained).is_file():
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            raise unknown_name(f"pretrained weights of {name} (no such file either)", pretrained, tags)
    tokenizer_name = name_tokenizer(name, architecture["text_cfg"])
    with tempfile.TemporaryDirectory() as place:
        text_cfg, stored_text_cfg = settle_text_tower(architecture["text_cfg"], Path(place))
        try:
            whole = open_clip.create_model(
                name if is_open_clip(name) else _ANY,
                pretrained=pretrained,
                force_custom_text=True,
                pretrained_text=False,
                **{**architecture, "text_cfg": text_cfg},
            )
        except TypeError as error:
            raise ConfigError(f"The config {config} does not fit {name}: {error}.") from error
        except Exception as error:
            raise DataError(f"open_clip cannot make {name} with pretrained={pretrained!r}: {error}") from error

    whole.float().train()  # weights of a text tower come as they are stored, and in evaluation mode
    known = whole.visual.preprocess_cfg
    height, width = (known["size"],) * 2 if isinstance(known["size"], int) else known["size"]
    fields = {k: known[k] for k in ("mean", "std", "interpolation")}
    fields.update(height=height, width=width, resize=_RESIZE.get(known["resize_mode"], "squash"))
    spec = make_image_spec(fields, image_spec)
    feature_dim = architecture["embed_dim"]
    text_model = TextEncoder(
        whole.text,
        pooling=None,
        feature_dim=feature_dim,
        max_length=_text_length(whole.text, text_cfg),
        pad_token_id=_pad_token_id(whole.text),
        tokenizer_name=tokenizer_name,
    )
    model = ImageTextContrastiveModel(
        ImageEncoder(whole.visual, spec, feature_dim=feature_dim),
        text_model,
        loss=choose_loss(loss, has_bias=whole.logit_bias is not None, what=name),
        logit_scale=whole.logit_scale,
        logit_bias=whole.logit_bias,
    )
    stored = architecture | {"text_cfg": stored_text_cfg}
    stored["vision_cfg"] = stored["vision_cfg"] | {"timm_model_pretrained": False}
    return record(model, "create_open_clip_model", name=name, config=stored, image_spec=spec, loss=loss)


class Tokenizer:
    """Turns a text into tokens. Picklable. Made by :func:`create_tokenizer`.

    Attributes:
        name: Where it comes from.
        max_length: The largest number of tokens it gives; longer texts are cut.
        pads: Whether it gives that number always. Otherwise a text has as many tokens as it needs, and
            :func:`iris_hf.collate` pads the texts of a batch to the longest among them.
    """

    def __init__(
        self,
        name: str,
        function: Any,
        *,
        max_length: int,
        pads: bool,
        transformers: bool,
        fields: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.max_length = max_length
        self.pads = pads
        self._function = function
        self._transformers = transformers
        self._fields = fields

    @property
    def is_of_transformers(self) -> bool:
        """Whether it comes from transformers; otherwise from open_clip."""
        return self._transformers

    def save(self, folder: str | Path) -> None:
        """Write it into a folder, whose name :func:`create_tokenizer` then understands.

        Raises:
            ConfigError: If it is open_clip's own, which has a name everywhere.
        """
        if not hasattr(self._function, "save_pretrained"):
            raise ConfigError(f"The tokenizer of {self.name} comes with open_clip: there is nothing to save.")
        self._function.save_pretrained(folder)
        if self._fields is not None:
            write_options(Path(folder), {**self._fields, "context_length": self.max_length})

    def __call__(self, text: str | Sequence[str]) -> Any:
        """Tokenize.

        Args:
            text: One text, or N.

        Returns:
            int64 tokens `[L]`, or `[N, L]` for N texts. A tokenizer of transformers gives a dict of such tensors:
            `input_ids` and what else its models take, `attention_mask` as a rule.

        Raises:
            DataError: If it is no text.
        """
        texts = [text] if isinstance(text, str) else list(text)
        for one in texts:
            if not isinstance(one, str):
                raise DataError(f"A tokenizer takes a text or a list of texts, got a {type(one).__name__} among them.")
        if self._transformers:
            padding = "max_length" if self.pads else "longest"
            encoded = self._function(
                texts, padding=padding, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            return {k: v[0] if isinstance(text, str) else v for k, v in encoded.items()}
        tokens: Tensor = self._function(texts, context_length=self.max_length)
        return tokens[0] if isinstance(text, str) else tokens


def create_tokenizer(name_or_model: str | Path | nn.Module, *, max_length: int | None = None) -> Tokenizer:
    """Make the tokenizer of a model.

    Texts that are too long are cut. By default the tokenizers of CLIP-like models, which take at most 77 tokens, and
    all of open_clip pad every text to the length that the model takes: they were trained so. Others pad nothing. Where
    open_clip cleans texts before a tokenizer of transformers, as for SigLIP, that is done, for a saved model too.

    Args:
        name_or_model: An image-text model, its text part or a text encoder; the name of an open_clip architecture; or
            a repository, local folder or `pip:` name with a tokenizer of transformers, such as that of a saved model.
        max_length: Every text gets exactly this number of tokens, cut or padded; None takes what the model does.

    Raises:
        ConfigError: If the model has no tokenizer, the name stands for none, or `max_length` is not positive or more
            than the model takes.
    """
    name = getattr(name_or_model, "tokenizer_name", None) if isinstance(name_or_model, nn.Module) else name_or_model
    if name is None:
        raise ConfigError(f"{type(name_or_model).__name__} has no tokenizer. Pass the name of one.")
    if max_length is not None:
        require_integer("max_length", max_length, at_least=1)
    text_model = getattr(name_or_model, "text_model", name_or_model)
    limit = getattr(text_model, "max_length", None)
    if max_length is not None and limit is not None and max_length > limit:
        raise ConfigError(f"max_length={max_length}, but the model takes at most {limit} tokens.")
    name = str(name)
    if is_open_clip(name) and comes_with_open_clip(name):
        return _own_tokenizer(name, max_length or limit)
    is_named = name.startswith("{") or is_open_clip(name)
    fields = tokenizer_fields(name) if is_named else None
    folder = _tokenizer_folder(name if fields is None else fields["hf_tokenizer_name"])
    fields = fields or read_options(folder)
    if fields is not None:
        fields["context_length"] = max_length or limit or fields["context_length"] or _PADDED_LENGTH
        wrapper = load_tokenizer(folder, fields)
        return Tokenizer(name, wrapper, max_length=wrapper.context_length, pads=True, transformers=False, fields=fields)
    function = _load_hf_tokenizer(folder, name)
    if function.pad_token is None:  # GPT-like: any token will do, since the attention mask hides it
        function.pad_token = function.eos_token or function.unk_token
    known = [n for n in (function.model_max_length, limit) if n is not None and n < _UNKNOWN_LENGTH]
    longest = min(known, default=_DEFAULT_LENGTH)
    pads = max_length is not None or longest <= _PADDED_LENGTH
    return Tokenizer(name, function, max_length=max_length or longest, pads=pads, transformers=True)


def _pad_token_id(text: Any) -> int | None:
    """What a text tower of open_clip, its own or one around a model of transformers, takes for padding."""
    pad_id: int | None = getattr(text, "pad_id", None)
    return getattr(getattr(text, "config", None), "pad_token_id", None) if pad_id is None else pad_id


def _text_length(text: Any, text_cfg: Mapping[str, Any]) -> int:
    """The number of tokens that a text tower gets."""
    length: int = text_cfg.get("context_length", _PADDED_LENGTH)
    longest = longest_text(text.transformer, text.config) if text_cfg.get("hf_model_name") else None
    if longest is not None and length > longest:
        raise ConfigError(f"text_cfg has context_length={length}, and its text tower takes at most {longest} tokens.")
    return length


def _find_architecture(name: str, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The whole configuration of a model of two towers, as open_clip has it."""
    import open_clip

    if not isinstance(config, Mapping | None):
        raise ConfigError(f"config must be a mapping such as {{'embed_dim': 64}}, got {config!r}.")
    is_known = is_open_clip(name)
    if not is_known and not {*_PARTS} <= (config or {}).keys():
        raise unknown_name("open_clip model", name, open_clip.list_models())
    architecture = _merge(open_clip.get_model_config(name) if is_known else {}, config or {})
    for part in _PARTS[1:]:
        if not isinstance(architecture[part], Mapping):
            raise ConfigError(f"{part} must be a mapping, got {architecture[part]!r}.")
    if "multimodal_cfg" in architecture:
        raise ConfigError(f"{name} is a captioner (CoCa) rather than two towers. Choose a CLIP or SigLIP model.")
    known = (*_PARTS, *_FIELDS)
    for field in architecture.keys() - {*known}:
        raise unknown_name("field of an architecture of open_clip (config)", field, known)
    architecture.pop("custom_text", None)
    return architecture


def _own_tokenizer(name: str, max_length: int | None) -> Tokenizer:
    import open_clip

    try:
        function = open_clip.get_tokenizer(name, context_length=max_length)
    except Exception as error:
        raise ConfigError(f"The tokenizer of {name} cannot be had: {error}") from error
    return Tokenizer(name, function, max_length=function.context_length, pads=True, transformers=False)


def _tokenizer_folder(name: str) -> Path:
    try:
        return fetch(resolve_packaged(name), revision=None, local_files_only=False, weights=False)
    except IrisHFError as error:
        raise ConfigError(f"{name!r} is no architecture of open_clip, and no tokenizer is there: {error}") from error


def _load_hf_tokenizer(folder: Path, name: str) -> Any:
    try:
        return load_hf_tokenizer(folder)
    except DataError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{name!r} is no architecture of open_clip, and transformers finds no tokenizer there: {error}"
        ) from error


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else copy.deepcopy(value)
    return merged
