"""torch.compile."""

from __future__ import annotations

import torch
from torch import nn

from iris_hf.engine.plugins.base import Plugin
from iris_hf.errors import unknown_name

_STEPS = ("training_step", "prediction_step")


class Compile(Plugin):
    """Compiles the model's forward and its steps; the model comes back as it was.

    Attributes:
        backend: One of `torch.compiler.list_backends()`.
        mode: `default`, `reduce-overhead`, `max-autotune` and so on, for the backend `inductor`.
    """

    comes_once = True

    def __init__(self, backend: str = "inductor", mode: str | None = None) -> None:
        import torch._inductor

        backends = torch.compiler.list_backends(exclude_tags=())
        if backend not in backends:
            raise unknown_name("compile backend", backend, backends)
        if mode is not None and mode not in torch._inductor.list_mode_options():
            raise unknown_name("compile mode", mode, torch._inductor.list_mode_options())
        self.backend = backend
        self.mode = mode
        self._model: nn.Module | None = None

    def transform_model(self, model: nn.Module) -> nn.Module:
        """Compile in place: every call compiles what it needs when it comes."""
        self._model = model
        # Steps that call the model's parts rather than the model itself are compiled, too.
        for name in _STEPS:
            step = getattr(model, name, None)
            if callable(step):
                model.__dict__[name] = torch.compile(step, backend=self.backend, mode=self.mode)
        model.compile(backend=self.backend, mode=self.mode)
        return model

    def on_exit(self) -> None:
        """Undo it."""
        if self._model is not None:
            for name in _STEPS:
                self._model.__dict__.pop(name, None)
            self._model._compiled_call_impl = None
            self._model = None
