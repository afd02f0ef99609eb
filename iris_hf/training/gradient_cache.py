"""The gradient cache: exact gradients of a batch whose activations never exist at once.

Gao et al.: Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, arXiv 2101.06983. The features of
a batch are computed in sub-batches without graphs; the loss of all of them gives its derivative by each feature; then
every sub-batch is computed again, with the same random numbers, and its derivatives go backward through it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iris_hf.engine.loader import map_nested, to_device
from iris_hf.engine.plugins import PluginList
from iris_hf.engine.rng import GeneratorState
from iris_hf.errors import ConfigError, DataError, require_integer, require_number
from iris_hf.losses.collectives import Group, Rows, world_group
from iris_hf.models.steps import Cacheable, Gradients, feature_tensors, like_features, weigh
from iris_hf.training.passes import propagate, scalars, synchronised
from iris_hf.training.replay import (
    Calls,
    can_be_replayed,
    fixed_statistics,
    frozen_parts,
    recorded,
    replayed,
    saved_bytes,
)
from iris_hf.training.sub_batches import count_targets, split, take_slice

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_ROOM_FOR_FROZEN = 64
"""How many times the bytes of a sub-batch's features the outputs of a frozen part may take to be kept."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How a gradient cache divides a batch; see :func:`iris_hf.train_with_gradient_cache`.

    Raises:
        ConfigError: If a value is out of its range, or two contradict each other.
    """

    sub_batch_size: int
    num_kept_graphs: int
    memory_budget_in_mb: float | None
    check_replay: bool

    def __post_init__(self) -> None:
        require_integer("sub_batch_size", self.sub_batch_size, at_least=1)
        require_integer("num_kept_graphs", self.num_kept_graphs, at_least=0)
        if self.memory_budget_in_mb is not None:
            require_number("memory_budget_in_mb", self.memory_budget_in_mb, at_least=0)
            if self.num_kept_graphs:
                raise ConfigError(
                    f"num_kept_graphs={self.num_kept_graphs} and memory_budget_in_mb={self.memory_budget_in_mb} "
                    "say different things: give one of them."
                )


class CachedPass:
    """Turns a micro-batch into the gradients of its whole loss, a sub-batch at a time. A :class:`Pass`.

    Attributes:
        config: How a batch is divided.
        num_kept_graphs: Sub-batches, from the first, whose graph is kept from the first pass, so that they are not
            computed again; None until the first sub-batch has told what the budget allows.
        frozen: The parts that are computed once, since they and their inputs depend on nothing trainable.
    """

    def __init__(
        self,
        module: Cacheable,
        model: nn.Module,
        accelerator: Accelerator,
        plugins: PluginList,
        *,
        config: CacheConfig,
    ) -> None:
        self.module = module
        self.model = model
        self.accelerator = accelerator
        self.plugins = plugins
        self.config = config
        self.num_kept_graphs = config.num_kept_graphs if config.memory_budget_in_mb is None else None
        self.compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())
        self.sharded = accelerator.is_fsdp2
        if self.sharded and (config.num_kept_graphs or config.memory_budget_in_mb is not None):
            raise ConfigError(
                "FSDP2 frees the weights that a kept graph needs: leave out num_kept_graphs and memory_budget_in_mb."
            )
        self.frozen = [] if self.compiled else frozen_parts(module)
        self.norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._measured = False
        if self.norms and accelerator.is_main_process:
            logger.warning(
                "%d BatchNorm layers normalise each sub-batch of %d by its own statistics: gradients are those of "
                "sub-batches, not of the batch. LayerNorm, GroupNorm, or freezing in evaluation mode avoid that.",
                *(len(self.norms), config.sub_batch_size),
            )

    def place(self, batch: tuple[Any, Any]) -> tuple[Any, Any]:
        """Move the targets to the device; the inputs follow a sub-batch at a time."""
        return batch[0], to_device(batch[1], self.accelerator.device)

    def backward(self, inputs: Any, targets: Any, *, divisor: int, synchronise: bool) -> dict[str, Tensor]:
        """See :class:`iris_hf.training.passes.Pass`.

        Raises:
            ConfigError: If the model's forward returns nothing that can be cached.
            DataError: If the inputs of a batch differ in length, or the loss is NaN or infinite.
        """
        parts = split(inputs, self.config.sub_batch_size, num_examples=count_targets(targets))
        if self.sharded:
            self._agree_on_number(len(parts))
        # Under DDP the last sub-batch goes forward and backward with nothing in between: it is never a kept one.
        limit = len(parts) - (self.accelerator.num_processes > 1)
        cache = [self._first_pass(part, position=k, limit=limit) for k, part in enumerate(parts)]
        end = GeneratorState.capture(self.accelerator.device)
        result, gradients = self._derive(cache, targets)
        if not result["loss"].isfinite():
            _refuse(result["loss"], cache)
        last = len(parts) - 1
        for k, part in enumerate(parts):
            self._second_pass(
                part,
                cache[k],
                Gradients([slices[k] for slices in gradients.features], gradients.parameters if k == last else None),
                divisor=divisor,
                synchronise=synchronise and k == last,
            )
            cache[k] = _SPENT  # lets go of its graph
        if not parts:
            with synchronised(self.accelerator, self.model, synchronise):
                propagate(self.accelerator, self.model(None, Gradients([], gradients.parameters)), divisor)
        end.restore()
        return scalars(result)

    def loss(self, module: Cacheable, inputs: Any, targets: Any) -> Tensor:
        """See :class:`iris_hf.training.passes.Pass`; the features are computed in sub-batches here too."""
        results = []
        for part in split(inputs, self.config.sub_batch_size, num_examples=count_targets(targets)):
            with self.accelerator.autocast(), self.plugins.forward_context():
                results.append(module(to_device(part, self.accelerator.device)))
        tensors = [_joined(column) for column in zip(*map(feature_tensors, results), strict=True)]
        with self.accelerator.autocast():
            loss: Tensor = module.measure(like_features(results[0], tensors), targets)["loss"]
        return loss

    def parts(self, inputs: Any, targets: Any) -> Iterable[tuple[Any, Any]]:
        """See :class:`iris_hf.training.passes.Pass`."""
        size = self.config.sub_batch_size
        divided = split(inputs, size, num_examples=count_targets(targets))
        per_part = [take_slice(targets, slice(start, start + size)) for start in range(0, len(divided) * size, size)]
        return zip(divided, per_part, strict=True)

    def _first_pass(self, part: Any, *, position: int, limit: int) -> _Cached:
        """Compute the features of a sub-batch, as a rule without a graph."""
        state = GeneratorState.capture(self.accelerator.device)
        part = to_device(part, self.accelerator.device)
        if self._measured and position < min(self.num_kept_graphs or 0, limit):
            with self.plugins.forward_context():
                features = self.module(part)
            return _Cached(features, feature_tensors(features), state, has_graph=True)
        # A compiled model has one graph for training and another for inference, whose random numbers differ.
        needs_graph = self.compiled or not self._measured
        with torch.set_grad_enabled(needs_graph), recorded(self.frozen) as calls, self.plugins.forward_context():
            features = self.module(part) if self._measured else self._measure(part)
        tensors = feature_tensors(features)
        if not self._measured:
            self._learn(tensors, calls)
            if position < min(self.num_kept_graphs or 0, limit):
                return _Cached(features, tensors, state, has_graph=True)
        tensors = [tensor.detach() for tensor in tensors]
        calls = {module: outputs for module, outputs in calls.items() if module in self.frozen}
        return _Cached(like_features(features, tensors), tensors, state, has_graph=False, calls=calls)

    def _measure(self, part: Any) -> Any:
        """Compute the features of the run's first sub-batch, and count what its graph holds."""
        if self.compiled or self.sharded:
            return self.module(part)
        with saved_bytes(self.module) as self._saved:
            return self.module(part)

    def _learn(self, tensors: list[Tensor], calls: Calls) -> None:
        """Take from the run's first sub-batch which frozen parts to compute once, and how many graphs to keep."""
        self._measured = True
        if not any(tensor.requires_grad for tensor in tensors):
            raise ConfigError("No feature depends on a trainable parameter: there is nothing to train.")
        room = _ROOM_FOR_FROZEN * sum(tensor.nbytes for tensor in tensors)
        self.frozen = [module for module, outputs in calls.items() if can_be_replayed(outputs, room=room)]
        if self.sharded:
            self._agree_on_frozen(list(calls))
            return
        if self.compiled:
            if self.num_kept_graphs is None:
                logger.warning("The graph of a compiled model cannot be measured: none is kept.")
                self.num_kept_graphs = 0
            return
        mib = sum(self._saved.values()) / 2**20
        if self.num_kept_graphs is None:
            assert self.config.memory_budget_in_mb is not None
            self.num_kept_graphs = int(self.config.memory_budget_in_mb // max(mib, 1e-6))
        logger.info(
            "Gradient cache: the graph of a sub-batch of %d holds %.1f MiB; %d graphs are kept at most; %d frozen "
            "parts are computed once.",
            *(self.config.sub_batch_size, mib, self.num_kept_graphs, len(self.frozen)),
        )

    def _agree_on_number(self, num_parts: int) -> None:
        """Make sure that sharded processes, which compute every layer together, have as many sub-batches."""
        extremes = torch.tensor([num_parts, -num_parts], device=self.accelerator.device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        most, fewest = int(extremes[0]), -int(extremes[1])
        if most != fewest:
            raise DataError(
                f"Under FSDP2 every process needs as many sub-batches of {self.config.sub_batch_size}; they have from "
                f"{fewest} to {most}. Keep batches equally long in collate_function and plugins, or use ddp.yaml."
            )

    def _agree_on_frozen(self, candidates: list[nn.Module]) -> None:
        """Compute a frozen part once only if every sharded process can: they gather its weights together."""
        flags = torch.tensor([int(part in self.frozen) for part in candidates], device=self.accelerator.device)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        self.frozen = [part for part, flag in zip(candidates, flags.tolist(), strict=True) if flag]

    def _derive(self, cache: list[_Cached], targets: Any) -> tuple[dict[str, Any], _SplitGradients]:
        """Compute the loss of all features, and its derivatives by them."""
        group = world_group()
        columns = list(zip(*(cached.tensors for cached in cache), strict=True))
        leaves = [_joined(list(column)) for column in columns]
        form = cache[0].features if cache else None
        num_active = 1
        if group is not None:
            active = Rows.counting(len(cache), self.accelerator.device, group).counts
            num_active = sum(count > 0 for count in active)
            if num_active < len(active):
                form, leaves = _borrow_form(form, leaves, active, self.accelerator.device)
        for leaf in leaves:
            if leaf.is_floating_point():
                leaf.requires_grad_()
        tensors, by_example, by_scalar = leaves, 1.0, 1.0
        if group is not None and not self.module.gathers:
            # Every rank computes the whole loss; DDP takes the mean of what the ranks then have.
            tensors, targets = [_gather_around(leaf, group) for leaf in leaves], _gather(targets, group)
            by_example, by_scalar = group.size(), group.size() / num_active
        with torch.enable_grad(), self.accelerator.autocast(), self.plugins.forward_context():
            result = self.module.measure(like_features(form, tensors), targets)
        parameters = self.module.loss_parameters()
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        derived = torch.autograd.grad(result["loss"], [*wanted, *parameters], allow_unused=True)
        by_leaf = dict(zip(map(id, wanted), derived, strict=False))
        slices = [
            _sliced(by_leaf.get(id(leaf)), column, by_example if leaf.dim() else by_scalar)
            for leaf, column in zip(leaves, columns, strict=False)  # no columns where there are no examples
        ]
        own = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, derived[len(wanted) :], strict=True)]
        return result, _SplitGradients(slices, own)

    def _second_pass(
        self, part: Any, cached: _Cached, gradients: Gradients, *, divisor: int, synchronise: bool
    ) -> None:
        """Send the gradients of a sub-batch backward, through its kept graph or one made again."""
        if cached.has_graph:
            with synchronised(self.accelerator, self.model, synchronise):
                products = weigh(cached.tensors, gradients.features)
                pairs = zip(self.module.loss_parameters(), gradients.parameters or (), strict=False)
                products += [(parameter * gradient).sum() for parameter, gradient in pairs]
                propagate(self.accelerator, torch.stack([product.float() for product in products]).sum(), divisor)
            return
        assert cached.state is not None
        cached.state.restore()
        if self.config.check_replay:
            gradients = gradients._replace(expected=cached.tensors)
        with (
            synchronised(self.accelerator, self.model, synchronise),
            replayed(cached.calls),
            fixed_statistics(self.norms),
        ):
            with self.plugins.forward_context():
                surrogate = self.model(to_device(part, self.accelerator.device), gradients)
            propagate(self.accelerator, surrogate, divisor)


@dataclass
class _Cached:
    """A sub-batch after the first pass.

    Attributes:
        features: What the forward returned.
        tensors: Its tensors.
        state: Where the generators stood before.
        has_graph: Whether the tensors still have their graph.
        calls: What the frozen parts returned.
    """

    features: Any
    tensors: list[Tensor]
    state: GeneratorState | None
    has_graph: bool
    calls: Calls = field(default_factory=dict)


_SPENT = _Cached(None, [], None, has_graph=False)


class _SplitGradients(NamedTuple):
    """The derivatives of a loss: by each feature tensor, a list over the sub-batches; by each parameter of the loss."""

    features: list[list[Tensor | None]]
    parameters: list[Tensor]


def _sliced(gradient: Tensor | None, column: Sequence[Tensor], factor: float) -> list[Tensor | None]:
    """Divide the gradient of a feature among the sub-batches; that of a scalar goes to the last."""
    if gradient is None:
        return [None] * len(column)
    gradient = gradient if factor == 1 else gradient * factor
    if gradient.dim() == 0:
        return [None] * (len(column) - 1) + [gradient]
    return list(torch.split(gradient, [len(tensor) for tensor in column]))


def _joined(column: Sequence[Tensor]) -> Tensor:
    """Join a feature of all sub-batches, as a leaf; a scalar is the same in all."""
    return column[0].detach().clone() if column[0].dim() == 0 else torch.cat([tensor.detach() for tensor in column])


def _refuse(loss: Tensor, cache: list[_Cached]) -> None:
    broken = [
        str(position)
        for position, column in enumerate(zip(*(cached.tensors for cached in cache), strict=True))
        if not all(tensor.isfinite().all() for tensor in column)
    ]
    where = f"feature tensors {', '.join(broken)} of this rank are not finite" if broken else "its features are finite"
    raise DataError(
        f"The loss is {loss.item()}: {where}. Look at the examples and the model's outputs, lower base_lr, or use "
        "clip_grad_norm."
    )


def _borrow_form(
    form: Any, leaves: list[Tensor], active: Sequence[int], device: torch.device
) -> tuple[Any, list[Tensor]]:
    """Give a rank without examples the features of none: the form, the types and the scalars of a rank that has some.

    Raises:
        DataError: On every rank, if none has examples.
    """
    from accelerate.utils import broadcast_object_list

    source = next((rank for rank, count in enumerate(active) if count), None)
    if source is None:
        raise DataError("A micro-batch needs at least one example on one of the processes.")
    empty = [leaf[:0].cpu() if leaf.dim() else leaf.cpu() for leaf in leaves]
    borrowed = broadcast_object_list([like_features(form, empty) if leaves else None], from_process=source)[0]
    if leaves:
        return form, leaves
    return borrowed, [tensor.to(device) for tensor in feature_tensors(borrowed)]


def _gather_around(leaf: Tensor, group: Group) -> Tensor:
    """Put the features of the other ranks around this rank's, which stay differentiable."""
    if leaf.dim() == 0:
        return leaf
    rows = Rows.counting(len(leaf), leaf.device, group)
    everyone = rows.gather(leaf.detach())
    return torch.cat([everyone[: rows.own.start], leaf, everyone[rows.own.stop :]])


def _gather(targets: Any, group: Group) -> Any:
    """Join the targets of all ranks."""
    if isinstance(targets, Tensor) and targets.dim():
        return Rows.counting(len(targets), targets.device, group).gather(targets)
    if isinstance(targets, list):
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, targets, group=group)
        return [target for rank in everyone for target in rank]
    return map_nested(lambda value: _gather(value, group), targets)
