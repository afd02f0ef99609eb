"""What a gradient cache's second pass takes from its first, and what it must not do twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iris_hf.engine.rng import GeneratorState


class Call(NamedTuple):
    """What a module returned, the versions of its tensors, and where the generators stood then."""

    output: Any
    versions: list[int] | None
    state: GeneratorState


Calls = dict[nn.Module, list[Call]]
"""What modules returned, call by call."""


def frozen_parts(module: nn.Module) -> list[nn.Module]:
    """List the largest submodules that have parameters, none of them trainable; none is a part of another."""
    found = list(dict.fromkeys(_frozen_children(module)))
    return [part for part in found if not any(part is not other and part in other.modules() for other in found)]


def _frozen_children(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            yield child
        else:
            yield from _frozen_children(child)


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[Calls]:
    """Note what modules return, and where the random generators stand then."""
    calls: Calls = {module: [] for module in modules}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        tensors = _tensors_of(output)
        versions = None if tensors is None else [tensor._version for tensor in tensors]
        calls[module].append(Call(output, versions, GeneratorState.capture(_device_of(module))))

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def can_be_replayed(outputs: Sequence[Call], *, room: int) -> bool:
    """Whether what a frozen part returned may stand for computing it again.

    It may not if it depends on something trainable, is of a kind that nobody can look into, was changed in place
    afterwards, or takes more than `room` bytes: that is no feature but an activation inside a tower, and keeping those
    of a whole batch is what a gradient cache is there to avoid.
    """
    num_bytes = 0
    for call in outputs:
        tensors = _tensors_of(call.output)
        if tensors is None or any(tensor.requires_grad for tensor in tensors):
            return False
        if [tensor._version for tensor in tensors] != call.versions:
            return False
        num_bytes += sum(tensor.nbytes for tensor in tensors)
    return bool(outputs) and num_bytes <= room


_HARMLESS = ("torch.distributed.", "torch.utils.module_tracker", "iris_hf.")


def has_hooks(part: nn.Module) -> bool:
    """Whether something hangs on a forward of a part or of a module in it: it may keep what it sees, or change it.

    The hooks of FSDP2 that gather weights, of a feature extractor that stops, and of FlopCounterMode do neither.
    """
    registers = [(torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)]
    registers += [(module._forward_hooks, module._forward_pre_hooks) for module in part.modules()]
    return any(
        not (getattr(hook, "__module__", None) or "").startswith(_HARMLESS)
        for hooks, pre_hooks in registers
        if hooks or pre_hooks
        for hook in (*hooks.values(), *pre_hooks.values())
    )


def attributes(part: nn.Module) -> list[tuple[Tensor, int]]:
    """List the tensors in attributes of a part and of the modules in it, with their versions; not its state."""
    state = ("_parameters", "_buffers")
    return [
        (tensor, -1 if tensor.is_inference() else tensor._version)
        for module in part.modules()
        for name, value in vars(module).items()
        if name not in state
        for tensor in _held_by(value)
    ]


def are_same(attributes: Sequence[tuple[Tensor, int]], before: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether attributes hold the very tensors that they held before, unchanged."""
    return [(id(tensor), version) for tensor, version in attributes] == [(id(t), version) for t, version in before]


def _held_by(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _held_by(item)


def _tensors_of(output: Any) -> list[Tensor] | None:
    """List the tensors in nested lists, tuples and dicts; None where something else may hold some."""
    if isinstance(output, Tensor):
        return [output]
    if output is None or isinstance(output, (bool, int, float, str)):
        return []
    if not isinstance(output, (Mapping, list, tuple)):
        return None
    found: list[Tensor] = []
    for value in output.values() if isinstance(output, Mapping) else output:
        tensors = _tensors_of(value)
        if tensors is None:
            return None
        found += tensors
    return found


@contextmanager
def replayed(calls: Calls) -> Iterator[None]:
    """Have modules return what was noted, in place of computing it, and set the generators where they stood then.

    Calls beyond those are computed: activation checkpointing makes them, in an order of its own, in the backward pass.
    """

    def replay(outputs: Iterator[Call], compute: Callable[..., Any]) -> Any:
        def forward(*arguments: Any, **options: Any) -> Any:
            call = next(outputs, None)
            if call is None:
                return compute(*arguments, **options)
            call.state.restore()
            return call.output

        return forward

    kept = {module: module.__dict__.get("forward") for module in calls}
    for module, outputs in calls.items():
        module.forward = replay(iter(outputs), module.forward)
    try:
        yield
    finally:
        for module, forward in kept.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@contextmanager
def fixed_statistics(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Keep BatchNorm layers from updating their running statistics: every example counts once."""
    tracking: list[Any] = [norm for norm in norms if norm.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = not norm.training  # in evaluation the statistics are used, not updated
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


@contextmanager
def saved_bytes(module: nn.Module) -> Iterator[dict[int, int]]:
    """Count the bytes that autograd keeps for the backward pass, by storage; the module's own tensors are left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
