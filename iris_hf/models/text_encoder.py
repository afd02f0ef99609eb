"""Text encoders: tokens in, one feature vector per text out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError, DataError, unknown_name

Tokens = Tensor | Mapping[str, Tensor]
"""int64 tokens `[N, L]`, or a dict of such tensors: `input_ids` and, as a rule, `attention_mask` (1 = a token)."""

Pooling = Literal["mean", "cls", "last", "pooler"]

_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids")


class TextEncoder(nn.Module):
    """A network that takes tokens, and one vector per text from what it gives.

    Attributes:
        network: Takes tokens. With a pooling, a model of transformers.
        pooling: `mean` of the token vectors over the attention mask, the vector of the first token (`cls`) or of the
            `last` one, or what the model's own `pooler` makes; None where the network gives vectors `[N, F]` itself, of
            tokens `[N, max_length]`, to which shorter texts are padded.
        feature_dim: F, the length of a feature vector, or None if unknown.
        max_length: The largest number of tokens that the network takes, or None without a bound.
        pad_token_id: The token that is padding in tokens without an attention mask, or None: with a pooling, all are
            text then; without, padding is 0.
        tokenizer_name: The name that :func:`iris_hf.create_tokenizer` understands, or None.
        target_type: None, as for every encoder.
        num_classes: 0, as for every encoder.
        class_names: None, as for every encoder.
        image_spec: None: it takes no images.
    """

    target_type = None
    num_classes = 0
    class_names = None
    image_spec = None

    def __init__(
        self,
        network: nn.Module,
        *,
        pooling: Pooling | None,
        feature_dim: int | None,
        max_length: int | None,
        pad_token_id: int | None = None,
        tokenizer_name: str | None = None,
    ) -> None:
        super().__init__()
        if pooling is not None and pooling not in get_args(Pooling):
            raise unknown_name("pooling", pooling, get_args(Pooling))
        self.network = network
        self.pooling = pooling
        self.feature_dim = feature_dim
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self.tokenizer_name = tokenizer_name
        self._accepted = [n for n in _ARGUMENTS if n in inspect.signature(network.forward).parameters]

    def forward(self, tokens: Tokens) -> Tensor:
        """Map the tokens of N texts to features `[N, F]`.

        Args:
            tokens: `[N, L]`, or a dict; of a dict `input_ids`, `attention_mask` and `token_type_ids` are used where
                the network takes them.

        Raises:
            DataError: If there are no tokens, they have another shape or type, or are too many.
        """
        arguments = self._check(tokens)
        if self.pooling is None:
            features: Tensor = self.network(self._fill(arguments["input_ids"]))
            return features
        input_ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        if mask is None and self.pad_token_id is not None:
            mask = arguments["attention_mask"] = (input_ids != self.pad_token_id).long()
        outputs = self.network(**{name: arguments[name] for name in self._accepted if name in arguments})
        if self.pooling == "pooler":
            pooled: Tensor | None = getattr(outputs, "pooler_output", None)
            if pooled is None:
                raise ConfigError(
                    f"{type(self.network).__name__} has no pooler. Choose pooling 'mean', 'cls' or 'last'."
                )
            return pooled
        return _pool(outputs.last_hidden_state, torch.ones_like(input_ids) if mask is None else mask, self.pooling)

    def _fill(self, input_ids: Tensor) -> Tensor:
        """Pad tokens to the length that the network takes."""
        if self.max_length is None or input_ids.shape[1] == self.max_length:
            return input_ids
        missing: Any = self.max_length - input_ids.shape[1]
        if isinstance(missing, Tensor):  # while it is traced: a text that is too long shall fail later, and not be cut
            missing = missing.clamp(min=0)
        return nn.functional.pad(input_ids, (0, missing), value=self.pad_token_id or 0)

    def _check(self, tokens: Tokens) -> dict[str, Tensor]:
        arguments: dict[str, Any] = dict(tokens) if isinstance(tokens, Mapping) else {"input_ids": tokens}
        input_ids = arguments.get("input_ids")
        if not isinstance(input_ids, Tensor):
            got = f"a dict of {', '.join(arguments)}" if isinstance(tokens, Mapping) else type(tokens).__name__
            raise DataError(
                f"A text encoder takes tokens [N, L], or a dict with input_ids, got {got}. Tokenize the texts in the "
                "transform: create_tokenizer(model) gives the tokenizer."
            )
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise DataError(
                f"A text encoder takes integer tokens [N, L], got {input_ids.dtype} of shape {tuple(input_ids.shape)}."
            )
        if self.max_length is not None and input_ids.shape[1] > self.max_length:
            raise DataError(
                f"The texts have {input_ids.shape[1]} tokens, and this text encoder takes at most {self.max_length}. "
                f"Cut them: create_tokenizer(..., max_length={self.max_length})."
            )
        return arguments


def _pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool token vectors `[N, L, F]` to `[N, F]`."""
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
