"""Optimizers by name, and their parameter groups."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from iris_hf.engine.shards import is_sharded
from iris_hf.errors import ConfigError, require_number, unknown_name
from iris_hf.models.steps import Cacheable, Trainable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How an optimizer is built.

    Attributes:
        optimizer_class: The class of torch.
        momentum: Whether it takes `momentum`.
        nesterov: Whether it takes `nesterov`.
        amsgrad: Whether the AMSGrad variant is meant (Reddi et al., arXiv 1904.09237).
        sharded: Whether its state is sharded over the ranks (ZeRO stage 1, Rajbhandari et al., arXiv 1910.02054).
    """

    optimizer_class: type[Optimizer]
    momentum: bool = False
    nesterov: bool = False
    amsgrad: bool = False
    sharded: bool = False


class _Recipes(dict[str, _Recipe]):
    def check(self, name: str, *, momentum: float, nesterov: bool) -> None:
        """Raise ConfigError for an unknown name or contradictory arguments; warn of those without effect."""
        if name not in self:
            raise unknown_name("optimizer", name, self)
        if nesterov and not self[name].nesterov:
            raise ConfigError(f"nesterov=True works with optimizer 'sgd', not with {name!r}.")
        if nesterov and not momentum:
            raise ConfigError("nesterov=True needs a momentum above 0.")
        if momentum and not self[name].momentum:
            warnings.warn(f"momentum={momentum} has no effect with optimizer {name!r}.", stacklevel=2)


OPTIMIZERS = _Recipes(
    sgd=_Recipe(optimizer_class=torch.optim.SGD, momentum=True, nesterov=True),
    adam=_Recipe(optimizer_class=torch.optim.Adam),
    amsgrad=_Recipe(optimizer_class=torch.optim.Adam, amsgrad=True),
    adamw=_Recipe(optimizer_class=torch.optim.AdamW),
    adamw_amsgrad=_Recipe(optimizer_class=torch.optim.AdamW, amsgrad=True),
    rmsprop=_Recipe(optimizer_class=torch.optim.RMSprop, momentum=True),
    zero_adam=_Recipe(optimizer_class=torch.optim.Adam, sharded=True),
    zero_amsgrad=_Recipe(optimizer_class=torch.optim.Adam, amsgrad=True, sharded=True),
    zero_adamw=_Recipe(optimizer_class=torch.optim.AdamW, sharded=True),
    zero_adamw_amsgrad=_Recipe(optimizer_class=torch.optim.AdamW, amsgrad=True, sharded=True),
)
"""Every optimizer by its name in a config."""


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    *,
    base_lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
) -> Optimizer:
    """Build an optimizer.

    Args:
        name: A key of :data:`OPTIMIZERS`. Those that shard their state do so when several processes run.
        groups: Parameter groups of :func:`parameter_groups`.
        base_lr: Learning rate of groups without one of their own.
        weight_decay: Weight decay of groups without one of their own (L2 for sgd, adam and rmsprop, decoupled
            for adamw).
        momentum: For sgd and rmsprop.
        nesterov: For sgd.
    """
    recipe = OPTIMIZERS[name]
    options: dict[str, Any] = {"lr": base_lr, "weight_decay": weight_decay}
    if recipe.momentum:
        options["momentum"] = momentum
    if recipe.nesterov:
        options["nesterov"] = nesterov
    if recipe.amsgrad:
        options["amsgrad"] = True
    if any(is_sharded(parameter) for group in groups for parameter in group["params"]):
        options["foreach"] = True  # torch's choice for plain tensors on a GPU, which it does not make for these
    if recipe.sharded and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, optimizer_class=recipe.optimizer_class, **options)
    return recipe.optimizer_class(groups, **options)


def load_optimizer_state(optimizer: Optimizer, stored: dict[str, Any]) -> None:
    """Load a state; the decay of each group and by which kernels to compute stay this run's affair."""
    kept = [{name: group.get(name) for name in ("weight_decay", "foreach")} for group in optimizer.param_groups]
    optimizer.load_state_dict(stored)
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        group.update(own)


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    no_weight_decay_param_names: Sequence[str] | None = None,
    no_weight_decay_module_class_names: Sequence[str] | None = None,
    lr_scale_param_names: Sequence[tuple[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's trainable parameters into groups of equal learning rate and weight decay.

    Args:
        model: Parameters with `requires_grad=False` are left out. Of a Trainable or Cacheable, names are those in its
            model.
        base_lr: Learning rate of parameters that no pattern scales.
        weight_decay: Weight decay of parameters that no pattern exempts.
        no_weight_decay_param_names: Regular expressions; a parameter whose name one of them matches from its
            start has no weight decay.
        no_weight_decay_module_class_names: The same for all parameters below a module, by its class's name.
        lr_scale_param_names: `[pattern, factor]`; the first pattern that matches a parameter's name scales its rate.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, in the order of their first parameters.

    Raises:
        ConfigError: If a pattern is no regular expression, a factor no number, or nothing is to be trained.
    """
    names = _compile("no_weight_decay_param_names", no_weight_decay_param_names or ())
    classes = _compile("no_weight_decay_module_class_names", no_weight_decay_module_class_names or ())
    scales = lr_scale_param_names or ()
    if not isinstance(scales, Sequence) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in scales
    ):
        raise ConfigError(f"lr_scale_param_names must be a list of [pattern, factor], got {scales!r}.")
    for name, factor in scales:
        require_number(f"lr_scale_param_names: the factor of {name!r}", factor, at_least=0)
    scaled = _compile("lr_scale_param_names", [pattern for pattern, _ in scales])
    used: set[re.Pattern[str]] = set()

    def first_match(patterns: Sequence[re.Pattern[str]], text: str) -> int | None:
        for position, pattern in enumerate(patterns):
            if pattern.match(text):
                used.add(pattern)
                return position
        return None

    exempt = {
        id(parameter)
        for module in model.modules()
        if first_match(classes, type(module).__name__) is not None
        for parameter in module.parameters()
    }
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    wrapped = isinstance(model, Trainable | Cacheable)
    described = type(model.model if wrapped else model).__name__
    for full_name, parameter in model.named_parameters():
        name = full_name.removeprefix("model.") if wrapped else full_name
        by_name = first_match(names, name) is not None
        scale = first_match(scaled, name)
        if not parameter.requires_grad:
            continue
        lr = base_lr if scale is None else base_lr * scales[scale][1]
        decay = 0.0 if by_name or id(parameter) in exempt else weight_decay
        group = groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ConfigError(f"{described} has no parameter with requires_grad=True: nothing can be trained.")
    for pattern in dict.fromkeys([*names, *classes, *scaled]):
        if pattern not in used:
            logger.warning("The pattern %r matches no parameter or module class of %s.", pattern.pattern, described)
    return list(groups.values())


def _compile(argument: str, patterns: Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(patterns, str):
        raise ConfigError(f"{argument} must be a list of patterns, got the string {patterns!r}.")
    if not isinstance(patterns, Collection) or not all(isinstance(pattern, (str, re.Pattern)) for pattern in patterns):
        raise ConfigError(f"{argument} must be a list of patterns, got {patterns!r}.")
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ConfigError(f"{argument}: {pattern!r} is no regular expression: {error}.") from error
    return compiled
