"""Where the weights of a training run lie: whole on every process, or sharded over them by FSDP2."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from iris_hf.engine.strategy import sharding_plugin
from iris_hf.errors import ConfigError
from iris_hf.training.fsdp import Sharded
from iris_hf.training.optimizers import load_optimizer_state
from iris_hf.training.passes import Stepper
from iris_hf.training.storage import copy_into

if TYPE_CHECKING:
    from accelerate import Accelerator


class Layout(Protocol):
    """A model laid out for training.

    Attributes:
        module: What is trained: its parameters are those of `groups`, unless sharded.
        model: The same as Accelerate or FSDP2 wrapped it, for forward passes whose gradients count.
        groups: The optimizer's parameter groups.
    """

    module: Stepper
    model: nn.Module
    groups: list[dict[str, Any]]

    def train(self) -> None:
        """Put everything into training mode."""
        ...

    def follow_modes(self) -> None:
        """Put into evaluation mode what plugins have put there."""
        ...

    def explaining(self) -> AbstractContextManager[Any]:
        """Return a context for a forward and backward pass, which says what errors of the layout mean."""
        ...

    def complete_gradients(self, *, scaled: bool) -> None:
        """Average those gradients over the processes that the wrapped model leaves alone.

        Args:
            scaled: Whether a gradient scaler looks for infinities afterwards.
        """
        ...

    def gather(self, device: torch.device | None = None) -> Stepper:
        """Return the model with its weights of this moment, whole; every process calls this.

        Args:
            device: Where to put it; the accelerator's device when None.
        """
        ...

    def release(self) -> None:
        """Let the device forget what `gather` put there."""
        ...

    def parameters(self, *, keep: bool) -> dict[str, Any]:
        """Return whole parameters by name; every process calls this, and those without `keep` need no values."""
        ...

    def load_parameters(self, stored: dict[str, Tensor]) -> None:
        """Take whole parameters."""
        ...

    def optimizer_state(self, optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
        """Return the optimizer's whole state; see `parameters`."""
        ...

    def load_optimizer(self, optimizer: Optimizer, stored: dict[str, Any]) -> None:
        """Give the optimizer a whole state."""
        ...


def check_sharding(accelerator: Accelerator, *, optimizer: str) -> None:
    """Refuse a strategy that training does not have, before anything is done.

    Raises:
        ConfigError: For those, and for an optimizer that shards its state where FSDP2 does so already.
    """
    if sharding_plugin(accelerator) is not None and optimizer.startswith("zero_"):
        raise ConfigError(
            f"optimizer={optimizer!r} shards its state over the processes, which FSDP2 does already: use "
            f"{optimizer.removeprefix('zero_')!r}."
        )


def lay_out_model(module: Stepper, groups: list[dict[str, Any]], accelerator: Accelerator) -> Layout:
    """Put a model on the device, as the launcher's strategy has it.

    Raises:
        ConfigError: If FSDP2 cannot shard the model, or not as it is configured.
    """
    layout = Whole if sharding_plugin(accelerator) is None else Sharded
    return layout(module, groups, accelerator)


class _ExplainingUnused:
    """A context that translates what DistributedDataParallel says of a step that left parameters without gradients.

    It is a class since a generator would cost time in every step.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and "find_unused_parameters" in str(error):
            raise ConfigError(
                "Parameters of the model had no part in the loss of the step before, on some process, which training "
                "on several processes has to know: give ddp_find_unused_parameters=True, or freeze those that are "
                "never used (requires_grad_(False), or the plugin freeze_modules)."
            ) from error


class Whole:
    """Every process holds the whole model, in DistributedDataParallel where there are several. A :class:`Layout`."""

    def __init__(self, module: Stepper, groups: list[dict[str, Any]], accelerator: Accelerator) -> None:
        self.module = module.to(accelerator.device)
        self.groups = groups
        self.model: nn.Module = accelerator.prepare_model(module)
        self._explaining = _ExplainingUnused() if accelerator.num_processes > 1 else nullcontext()

    def train(self) -> None:
        """See :class:`Layout`."""
        self.module.train()

    def follow_modes(self) -> None:
        """Do nothing: plugins see the module itself."""

    def explaining(self) -> AbstractContextManager[Any]:
        """Say which argument is for parameters that take no part in a loss."""
        return self._explaining

    def complete_gradients(self, *, scaled: bool) -> None:
        """Do nothing: DistributedDataParallel has averaged all."""

    def gather(self, device: torch.device | None = None) -> Stepper:
        """Return the module itself."""
        return self.module if device is None else self.module.to(device)

    def release(self) -> None:
        """Do nothing."""

    def parameters(self, *, keep: bool) -> dict[str, Any]:
        """See :class:`Layout`."""
        return dict(self.module.named_parameters())

    def load_parameters(self, stored: dict[str, Tensor]) -> None:
        """See :class:`Layout`."""
        copy_into(dict(self.module.named_parameters()), stored, "parameters")

    def optimizer_state(self, optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
        """See :class:`Layout`."""
        if hasattr(optimizer, "consolidate_state_dict"):  # sharded: the main process gets all of it
            optimizer.consolidate_state_dict()
        return optimizer.state_dict() if keep else {}

    def load_optimizer(self, optimizer: Optimizer, stored: dict[str, Any]) -> None:
        """See :class:`Layout`."""
        load_optimizer_state(optimizer, stored)
