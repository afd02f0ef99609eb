"""The exponential moving average of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.engine.plugins.base import Plugin, TrainState
from iris_hf.engine.shards import gather_part, lay_out, own_part
from iris_hf.errors import ConfigError

logger = logging.getLogger(__name__)


class EMA(Plugin):
    """Keeps `average = decay * average + (1 - decay) * weights`, once per optimizer step.

    The average begins with the weights after step `num_skip_iterations + 1`. It covers the trained parameters and the
    floating-point buffers (BatchNorm's statistics); frozen parameters and integer buffers have one value anyway, and a
    buffer that holds infinities when the average begins (a mask of attention) has no mean. The model carries the
    average during validations and when training is over (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992, for the
    idea of averaging).

    Attributes:
        decay: Weight kept from the previous average, in [0, 1).
        num_skip_iterations: Steps at the beginning that are left out.
        use_cpu_memory: Whether to keep the average in host memory. Every step then copies the weights there.
    """

    comes_once = True

    def __init__(self, decay: float = 0.99, num_skip_iterations: int = 100, use_cpu_memory: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"ema: decay must be in [0, 1), got {decay}.")
        if num_skip_iterations < 0:
            raise ConfigError(f"ema: num_skip_iterations must not be negative, got {num_skip_iterations}.")
        self.decay = decay
        self.num_skip_iterations = num_skip_iterations
        self.use_cpu_memory = use_cpu_memory
        self._update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._average: list[Tensor] = []
        self._parameters: list[nn.Parameter] = []
        self._parts: list[Tensor] = []
        self._buffers: dict[str, tuple[nn.Module, str]] = {}

    def on_train_start(self, state: TrainState) -> None:
        """Find what to average, and say it where the run is too short for that."""
        if state.num_steps <= self.num_skip_iterations and state.is_main_process:
            logger.warning(
                "ema: nothing is averaged. The run has %d steps, and the first num_skip_iterations=%d are left out.",
                *(state.num_steps, self.num_skip_iterations),
            )
        self._parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        self._parts = [own_part(parameter) for parameter in self._parameters]
        self._buffers = {
            f"{path}.{name}": (module, name)
            for path, module in state.model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        }

    def on_step_end(self, state: TrainState) -> None:
        """Update the average, or begin it."""
        if state.step <= self.num_skip_iterations:
            return
        if not self._average:
            self._buffers = {k: (m, name) for k, (m, name) in self._buffers.items() if _is_finite(getattr(m, name))}
            device = "cpu" if self.use_cpu_memory else None
            live = self._live()
            self._average = [tensor.detach().to(device, copy=True) for tensor in live]
            return
        live = self._live()
        if self.use_cpu_memory:
            live = [tensor.detach().to("cpu") for tensor in live]
        self._update(self._average, live, 0)

    @contextmanager
    def validation_context(self, state: TrainState) -> Iterator[None]:
        """Exchange weights and average for the validation."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def on_train_end(self, state: TrainState) -> None:
        """Give the average to the model."""
        for average, tensor in zip(self._average, self._live(), strict=False):  # no average yet: nothing to give
            tensor.copy_(average)

    def on_exit(self) -> None:
        """Let go of the tensors."""
        self._average, self._parameters, self._parts, self._buffers = [], [], [], {}

    def state_dict(self) -> dict[str, Any]:
        """Return the average, whole also where weights are sharded; that of buffers is each rank's own."""
        pairs = zip(self._average, self._layout(), strict=False)
        return {"average": [gather_part(average, tensor) for average, tensor in pairs], "buffers": [*self._buffers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the average back."""
        self._buffers = {name: self._buffers[name] for name in state["buffers"]}
        pairs = zip(state["average"], self._layout(), strict=False)
        self._average = [own_part(lay_out(average, tensor)).clone() for average, tensor in pairs]
        self._place()

    def _live(self) -> list[Tensor]:
        """The tensors as this process has them now: a module may have put another in a buffer's place."""
        return [*self._parts, *(getattr(module, name) for module, name in self._buffers.values())]

    def _layout(self) -> list[Tensor]:
        """The same, with the parameters' own layout, which may be sharded over the processes."""
        return [*self._parameters, *self._live()[len(self._parts) :]]

    def _place(self) -> None:
        """Put a loaded average where it belongs."""
        if not self.use_cpu_memory:
            pairs = zip(self._average, self._live(), strict=False)
            self._average = [average.to(tensor.device) for average, tensor in pairs] or self._average

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, tensor in zip(self._average, self._live(), strict=False):
            kept = tensor.clone()
            tensor.copy_(average)
            average.copy_(kept)


def _is_finite(buffer: Tensor) -> bool:
    return bool(buffer.isfinite().all())
