"""Mixed precision."""

from __future__ import annotations

from typing import Any, Literal

from iris_hf.engine.plugins.base import Plugin
from iris_hf.errors import unknown_name


class Amp(Plugin):
    """Computes forward passes in half precision, in training, validation and prediction.

    Weights, optimizer state and losses stay in fp32. With fp16 the loss is scaled so that small gradients survive, and
    a step whose gradients overflow is left out (Micikevicius et al., arXiv 1710.03740).

    Attributes:
        dtype: `fp16`, which needs a GPU, or `bf16`; None takes fp16 on a GPU and bf16 on a CPU.
    """

    def __init__(self, dtype: Literal["fp16", "bf16"] | None = None) -> None:
        if dtype not in (None, "fp16", "bf16"):
            raise unknown_name("amp dtype", dtype, ("fp16", "bf16"))
        self.dtype = dtype

    def accelerator_options(self) -> dict[str, Any]:
        """Ask for the precision."""
        return {"mixed_precision": self.dtype or "auto"}
