"""FSDP2: a model in shards for training, beside the whole one that is validated and returned."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from iris_hf.engine.shards import gather, gather_nested, is_sharded, lay_out, own_part
from iris_hf.engine.strategy import sharding_plugin
from iris_hf.errors import ConfigError
from iris_hf.models.steps import Cacheable
from iris_hf.training.fsdp_units import find_units
from iris_hf.training.optimizers import load_optimizer_state
from iris_hf.training.passes import Stepper
from iris_hf.training.storage import copy_into

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


class Sharded:
    """FSDP2 (`fully_shard`): weights, gradients and optimizer states lie in shards.

    A :class:`~iris_hf.training.layouts.Layout`. Two copies of the model are there. The one that plugins saw in
    `transform_model` stays whole on the host; it comes to the device for validations, and back to the caller. Its copy
    is sharded and trained. (A sharded module cannot be turned back, and ranks with different numbers of validation
    batches must not wait for each other.)

    FSDP2 cannot shard 0-dimensional parameters, and the criterion of a gradient cache is used outside the sharded
    forward: such parameters are whole on every process. To the optimizer they are replicated DTensors in the same
    memory, so that it has one kind of tensors only.

    Precision is autocast's, as everywhere: shards and the sums of gradients stay in fp32.
    """

    def __init__(self, module: Stepper, groups: list[dict[str, Any]], accelerator: Accelerator) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        plugin = sharding_plugin(accelerator)
        assert plugin is not None
        _check_model(module)
        self.device = accelerator.device
        self.mesh = init_device_mesh(self.device.type, (accelerator.num_processes,))
        self.whole = module
        self.module = copy.deepcopy(module)
        _equalise(self.module, self.device)
        for parameter in self.module.parameters():
            parameter.data = parameter.data.contiguous()  # channels_last cannot be sharded
        names = {parameter: name for name, parameter in module.named_parameters()}
        replicated = _unshardable(self.module)
        units = find_units(self.module, plugin)
        accelerator.prepare_model(self.module, evaluation_mode=True)  # autocast, nothing else
        for tensor in (*replicated.values(), *self.module.buffers()):
            tensor.data = tensor.data.to(self.device)
        options: Any = {"mesh": self.mesh, "ignored_params": set(replicated.values())}
        for unit in units:
            fully_shard(unit, reshard_after_forward=plugin.reshard_after_forward, **options)
        fully_shard(self.module, **options)
        self.model: nn.Module = self.module
        self.replicas = {parameter: _replica(parameter, self.mesh) for parameter in replicated.values()}
        sharded = dict(self.module.named_parameters())
        of_optimizer = {name: self.replicas.get(parameter, parameter) for name, parameter in sharded.items()}
        self.groups = [
            {**group, "params": [of_optimizer[names[parameter]] for parameter in group["params"]]} for group in groups
        ]
        logger.info(
            "FSDP2: %d units beside the root over %d processes; %d parameters are whole on each.",
            *(len(units), accelerator.num_processes, len(self.replicas)),
        )

    def train(self) -> None:
        """See :class:`~iris_hf.training.layouts.Layout`."""
        self.whole.train()
        self.module.train()

    def follow_modes(self) -> None:
        """See :class:`~iris_hf.training.layouts.Layout`; plugins may know the whole model's modules."""
        for shown, trained in zip(self.whole.modules(), self.module.modules(), strict=True):
            if not shown.training:
                trained.training = False

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """See :class:`~iris_hf.training.layouts.Layout`."""
        try:
            yield
        except RuntimeError as error:
            if "DTensor" in str(error) or "storage of size 0" in str(error):
                error.add_note(
                    "FSDP2: the model uses parameters of a wrapped module outside that module's forward. Wrap others "
                    "(fsdp_transformer_layer_cls_to_wrap), or none: fsdp_auto_wrap_policy: NO_WRAP."
                )
            raise

    def complete_gradients(self, *, scaled: bool) -> None:
        """Average the gradients of parameters that are whole, and hand them to the optimizer's view of these.

        A scaler asks one gradient's layout for that of all, whether an infinity is everybody's: so one of a shard
        anywhere makes those of the whole parameters NaN everywhere.
        """
        from torch.distributed.tensor import DTensor, Replicate

        trained = {parameter: replica for parameter, replica in self.replicas.items() if parameter.requires_grad}
        if not trained:
            return
        flat = torch.cat([_own_gradient(parameter) for parameter in trained])
        if scaled:
            for parameter in self.module.parameters():
                if is_sharded(parameter) and parameter.grad is not None:
                    flat += 0 * own_part(parameter.grad).sum()
        dist.all_reduce(flat)
        flat /= self.mesh.size()
        means = torch.split(flat, [parameter.numel() + 1 for parameter in trained])
        for (parameter, replica), mean in zip(trained.items(), means, strict=True):
            if parameter.grad is not None or mean[-1] != 0:  # used here, or by another process
                gradient = mean[:-1].view_as(parameter).to(parameter.dtype)
                replica.grad = DTensor.from_local(gradient, self.mesh, [Replicate()], run_check=False)
            parameter.grad = None

    def gather(self, device: torch.device | None = None) -> Stepper:
        """See :class:`~iris_hf.training.layouts.Layout`."""
        from torch.distributed.fsdp import FSDPModule

        for unit in self.module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()
        self.whole.to(device or self.device)
        with torch.no_grad():
            parameters = dict(self.module.named_parameters())
            for name, parameter in self.whole.named_parameters():
                parameter.copy_(gather(parameters[name]))
            buffers = dict(self.module.named_buffers())
            for name, buffer in self.whole.named_buffers():
                buffer.copy_(buffers[name])
        return self.whole

    def release(self) -> None:
        """See :class:`~iris_hf.training.layouts.Layout`."""
        self.whole.to("cpu")

    def parameters(self, *, keep: bool) -> dict[str, Any]:
        """See :class:`~iris_hf.training.layouts.Layout`."""
        gathered: dict[str, Any] = gather_nested(dict(self.module.named_parameters()), keep=keep)
        return gathered

    def load_parameters(self, stored: dict[str, Tensor]) -> None:
        """See :class:`~iris_hf.training.layouts.Layout`."""
        parameters = dict(self.module.named_parameters())
        laid_out = {name: lay_out(t, parameters[name]) if name in parameters else t for name, t in stored.items()}
        copy_into(dict(parameters), laid_out, "parameters")

    def optimizer_state(self, optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
        """See :class:`~iris_hf.training.layouts.Layout`."""
        gathered: dict[str, Any] = gather_nested(optimizer.state_dict(), keep=keep)
        return gathered if keep else {}

    def load_optimizer(self, optimizer: Optimizer, stored: dict[str, Any]) -> None:
        """See :class:`~iris_hf.training.layouts.Layout`."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def of(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
            return {
                name: lay_out(value, parameter) if name != "step" and isinstance(value, Tensor) else value
                for name, value in state.items()
            }

        states = {index: of(parameters[index], state) for index, state in stored["state"].items()}
        load_optimizer_state(optimizer, {**stored, "state": states})


def _check_model(module: nn.Module) -> None:
    dtypes = sorted({str(parameter.dtype) for parameter in module.parameters() if parameter.requires_grad})
    if len(dtypes) > 1:
        raise ConfigError(
            f"FSDP2 shards trainable parameters of one type, and the model has {', '.join(dtypes)}. Convert it, as "
            "with model.float(); half precision in forward passes is the plugin amp's."
        )
    if any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in module.modules()):
        raise ConfigError("A compiled model cannot be sharded: leave out the plugin compile, or FSDP2.")


def _equalise(module: nn.Module, device: torch.device) -> None:
    """Give every process the first one's weights and buffers, as DistributedDataParallel does."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            sent = tensor.to(device)
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def _unshardable(module: Stepper) -> dict[str, nn.Parameter]:
    of_criterion = {id(p) for p in module.criterion_parameters()} if isinstance(module, Cacheable) else set()
    return {name: p for name, p in module.named_parameters() if p.dim() == 0 or id(p) in of_criterion}


def _own_gradient(parameter: nn.Parameter) -> Tensor:
    """Return a plain parameter's gradient, flat, in a type that may be summed, and behind it whether there is one."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    flat = gradient.flatten().to(torch.promote_types(parameter.dtype, torch.float32))
    return torch.cat([flat, flat.new_full((1,), parameter.grad is not None)])


def _replica(parameter: nn.Parameter, mesh: Any) -> nn.Parameter:
    """Return a DTensor parameter in the same memory."""
    from torch.distributed.tensor import DTensor, Replicate

    replica = DTensor.from_local(parameter.detach(), mesh, [Replicate()], run_check=False)
    return nn.Parameter(replica, requires_grad=parameter.requires_grad)
