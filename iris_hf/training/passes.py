"""How a micro-batch becomes gradients: one forward and backward pass, as plain training has it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from iris_hf.engine.loader import to_device
from iris_hf.engine.plugins import PluginList
from iris_hf.losses.collectives import together
from iris_hf.models.steps import Cacheable, Trainable

if TYPE_CHECKING:
    from accelerate import Accelerator


class Pass(Protocol):
    """Turns micro-batches into gradients, and into losses."""

    def place(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Move what has to be on the device there."""
        ...

    def backward(self, inputs: Any, targets: Any, *, divisor: int, synchronise: bool) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch to the parameters'.

        Args:
            inputs: The inputs, as `place` gave them.
            targets: The targets.
            divisor: Micro-batches in this step; the gradients are divided by it.
            synchronise: Whether the gradients of this step are complete now and averaged over the ranks.

        Returns:
            `loss`, and scalars worth logging; detached, on the device.
        """
        ...

    def loss(self, module: Any, inputs: Any, targets: Any) -> Tensor:
        """Compute the loss of this rank's batch without gradients and without the other ranks.

        Args:
            module: The step of the whole model, which no other rank waits for.
            inputs: The inputs, as `place` gave them.
            targets: The targets.
        """
        ...

    def parts(self, inputs: Any, targets: Any) -> Iterable[tuple[Any, Any]]:
        """Divide a batch into what may be computed at once."""
        ...


class PlainPass:
    """One forward and one backward pass over the whole micro-batch.

    Attributes:
        module: The model's training step.
        model: The module as Accelerate wrapped it.
    """

    def __init__(self, module: Trainable, model: nn.Module, accelerator: Accelerator, plugins: PluginList) -> None:
        self.module = module
        self.model = model
        self.accelerator = accelerator
        self.plugins = plugins

    def place(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Move the whole batch to the device."""
        inputs, targets = to_device(batch, self.accelerator.device)
        return inputs, targets

    def backward(self, inputs: Any, targets: Any, *, divisor: int, synchronise: bool) -> dict[str, Tensor]:
        """See :class:`Pass`."""
        with synchronised(self.accelerator, self.model, synchronise):
            with self.plugins.forward_context(), together(True):
                result = self.model(inputs, targets)
            propagate(self.accelerator, result["loss"], divisor)
        return scalars(result)

    def loss(self, module: Trainable, inputs: Any, targets: Any) -> Tensor:
        """See :class:`Pass`."""
        # Not DDP's module: ranks may have different numbers of batches, and must not wait for each other here.
        with self.accelerator.autocast(), self.plugins.forward_context(), together(False):
            loss: Tensor = module(inputs, targets)["loss"]
        return loss

    def parts(self, inputs: Any, targets: Any) -> Iterable[tuple[Any, Any]]:
        """Return the whole batch: plain training computes it at once."""
        return [(inputs, targets)]


def synchronised(accelerator: Accelerator, model: nn.Module, synchronise: bool) -> AbstractContextManager[Any]:
    """Return the context of a forward and backward pass: gradients are averaged over the ranks in it, or not yet."""
    accelerator.gradient_state._set_sync_gradients(synchronise)
    return nullcontext() if synchronise else accelerator.no_sync(model)


def propagate(accelerator: Accelerator, loss: Tensor, divisor: int) -> None:
    """Run the backward pass of a loss that is divided first, and scaled where precision demands it."""
    loss = loss if divisor == 1 else loss / divisor
    if accelerator.scaler is None:
        loss.backward()  # type: ignore[no-untyped-call]  # what accelerator.backward comes to, less a division by one
    else:
        accelerator.backward(loss)


def scalars(result: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of one element, detached."""
    return {k: v.detach().reshape(()) for k, v in result.items() if isinstance(v, Tensor) and v.numel() == 1}


Stepper = Trainable | Cacheable
"""What a pass works on: a model whose `forward` DDP, FSDP and torch.compile may see."""


def mean_of(results: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of every scalar over the micro-batches of a step that have it."""
    if len(results) == 1:
        return results[0]
    names = dict.fromkeys(name for result in results for name in result)
    return {name: torch.stack([result[name] for result in results if name in result]).mean() for name in names}
