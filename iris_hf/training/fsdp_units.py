"""Which modules FSDP2 gathers and frees one by one, as the launcher's wrap policy says; the root has the rest."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from iris_hf.errors import ConfigError
from iris_hf.models.steps import Cacheable
from iris_hf.training.passes import Stepper

if TYPE_CHECKING:
    from accelerate import FullyShardedDataParallelPlugin

logger = logging.getLogger(__name__)


def find_units(module: Stepper, plugin: FullyShardedDataParallelPlugin) -> list[nn.Module]:
    """List the modules that become units of their own, inner ones first.

    A module that shares a parameter or a part with something outside it belongs to the root's unit, and so does the
    criterion of a gradient cache, which is called outside the root's forward.

    Args:
        module: The model with its step.
        plugin: Its policy: by the names of classes (those that models of transformers name in `_no_split_modules`
            when there are none), by size, or none.

    Raises:
        ConfigError: If the policy names a class of which the model has no module.
    """
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    policy: Any = plugin.auto_wrap_policy
    if policy is transformer_auto_wrap_policy:
        found = _of_classes(module.model, plugin.transformer_cls_names_to_wrap)
    elif policy is size_based_auto_wrap_policy and plugin.min_num_params:
        found = _of_size(module.model, plugin.min_num_params, policy)
    else:
        return []
    criterion = getattr(module.model, "criterion", None) if isinstance(module, Cacheable) else None
    outside = {module.model, *(criterion.modules() if isinstance(criterion, nn.Module) else ())}
    is_closed = _closedness(module)
    units = [unit for unit in found if unit not in outside and is_closed(unit)]
    if not units:
        logger.warning("FSDP2: the wrap policy finds no module to wrap; the whole model is one unit.")
    return units


def _of_classes(model: nn.Module, names: list[str] | None) -> list[nn.Module]:
    known = {type(part).__name__ for part in model.modules()}
    if names is None:
        wanted = {name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    else:
        wanted = {name.strip() for name in names}
        if missing := sorted(wanted - known):
            raise ConfigError(
                f"fsdp_transformer_layer_cls_to_wrap: {type(model).__name__} has no module of class "
                f"{', '.join(missing)}. It has {', '.join(sorted(known))}."
            )
    return [part for part in _inner_first(model) if type(part).__name__ in wanted]


def _of_size(model: nn.Module, min_num_params: int, policy: Any) -> list[nn.Module]:
    """As FSDP1 has it: parameters that an inner unit has taken count no more."""
    found: list[nn.Module] = []

    def total_of(part: nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    def visit(part: nn.Module) -> int:
        """Return how many parameters of this part are in no unit."""
        left = total_of(part)
        if policy(part, True, left, min_num_params):
            left -= sum(total_of(child) - visit(child) for child in part.children())
        # Wrapping changes a module's class, by which transformers looks up what models within models shall return.
        if policy(part, False, left, min_num_params) and not hasattr(part, "_no_split_modules"):
            found.append(part)
            return 0
        return left

    visit(model)
    return list(dict.fromkeys(found))


def _inner_first(model: nn.Module) -> Iterator[nn.Module]:
    return reversed(list(model.modules()))  # a module stands before its parts in modules()


def _closedness(root: nn.Module) -> Callable[[nn.Module], bool]:
    """Return a function that tells whether nothing outside a module has a part or a parameter of it."""
    parents: dict[nn.Module, set[nn.Module]] = defaultdict(set)
    owners: dict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    for module in root.modules():
        for child in module.children():
            parents[child].add(module)
        for parameter in module.parameters(recurse=False):
            owners[parameter].add(module)

    def is_closed(unit: nn.Module) -> bool:
        inside = set(unit.modules())
        return all(parents[part] <= inside for part in inside - {unit}) and all(
            owners[parameter] <= inside for parameter in unit.parameters()
        )

    return is_closed
