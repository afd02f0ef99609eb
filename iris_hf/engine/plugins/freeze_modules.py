"""Training a part of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.errors import ConfigError


class FreezeModules(Plugin):
    """Keeps modules as they are during training: no gradients, and evaluation mode (no dropout, fixed statistics).

    The trained model comes back as trainable as it was.

    Attributes:
        patterns: Regular expressions, found anywhere in a module's dotted name. One string is one pattern, and an
            empty one freezes nothing.
    """

    def __init__(self, patterns: str | Sequence[str]) -> None:
        self.patterns = ([patterns] if patterns else []) if isinstance(patterns, str) else list(patterns)
        if patterns != "" and (not self.patterns or not all(self.patterns)):
            raise ConfigError("freeze_modules: give a pattern, such as 'encoder'.")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"freeze_modules: {pattern!r} is no regular expression: {error}.") from error
        self._modules: list[nn.Module] = []
        self._parameters: list[nn.Parameter] = []

    def transform_model(self, model: nn.Module) -> nn.Module:
        """Freeze.

        Raises:
            ConfigError: If a pattern is in no module's name.
        """
        named = {name: module for name, module in model.named_modules() if name}
        for pattern in self.patterns:
            found = [module for name, module in named.items() if re.search(pattern, name)]
            if not found:
                known = ", ".join([*named][:20]) + (", ..." if len(named) > 20 else "")
                raise ConfigError(f"freeze_modules: no module's name contains {pattern!r}. Modules: {known}.")
            self._modules += found
        frozen = {parameter: None for module in self._modules for parameter in module.parameters()}
        self._parameters = [parameter for parameter in frozen if parameter.requires_grad]
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        return model

    def on_epoch_start(self, state: TrainState) -> None:
        """Put the frozen modules back in evaluation mode; an epoch begins in training mode."""
        for module in self._modules:
            module.eval()

    def on_exit(self) -> None:
        """Make parameters trainable again."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._modules, self._parameters = [], []
