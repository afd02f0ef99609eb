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

from iris_hf.engine.loader import pinned, to_device
from iris_hf.engine.plugins import PluginList
from iris_hf.engine.rng import GeneratorState
from iris_hf.errors import ConfigError, DataError
from iris_hf.losses.collectives import together, world_group
from iris_hf.models.steps import Cacheable, Gradients, feature_names, feature_tensors, like_features
from iris_hf.training.columns import borrow_form, count_and_compare, gather_around, gather_targets, make_columns
from iris_hf.training.config import CacheConfig
from iris_hf.training.passes import propagate, scalars, synchronised
from iris_hf.training.replay import (
    Calls,
    are_same,
    attributes,
    can_be_replayed,
    fixed_statistics,
    frozen_parts,
    has_hooks,
    recorded,
    replayed,
    saved_bytes,
)
from iris_hf.training.sub_batches import count_examples, count_targets, split, take_slice

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_ROOM_FOR_FROZEN = 64
"""How many times the bytes of a sub-batch's features the outputs of a frozen part may take to be kept."""


class CachedPass:
    """Turns a micro-batch into the gradients of its whole loss, a sub-batch at a time. A :class:`Pass`.

    Attributes:
        config: How a batch is divided.
        num_kept_graphs: Sub-batches, from the first, whose graph is kept from the first pass, so that they are not
            computed again; None until a sub-batch has told what the budget allows.
        frozen: The parts that are computed once, since they and their inputs depend on nothing trainable, and nothing
            but their output is used. A sub-batch tells which, the first of the run and whenever parameters have been
            frozen or freed, and the next that is not the last of its batch tries it out. Where one is left out the
            batch that follows tells again: a part may make tensors of its own in its first forward.
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
        self.num_kept_graphs: int | None = None
        self.frozen: list[nn.Module] = []
        self.compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())
        self.sharded = accelerator.is_fsdp2
        if self.sharded and (config.num_kept_graphs or config.memory_budget_in_mb is not None):
            raise ConfigError(
                "FSDP2 frees the weights that a kept graph needs: leave out num_kept_graphs and memory_budget_in_mb."
            )
        self.norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._parameters = list(module.parameters())
        self._trainable: list[bool] | None = None
        self._measured = False
        self._tried = False
        self._looks_again = False
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
            ConfigError: If the model's forward returns nothing that can be cached, or nothing is trainable.
            DataError: If the inputs of a batch differ in length, or the loss is NaN or infinite where no scaler of
                half precision skips the step.
        """
        if self.accelerator.device.type == "cuda":  # a copy of what a plugin has made would wait for the device
            inputs = pinned(inputs)
        parts = split(inputs, self.config.sub_batch_size, num_examples=count_targets(targets))
        self._look_again(len(parts))
        # Under DDP the last sub-batch goes forward and backward with nothing in between: it is never a kept one.
        limit = len(parts) - (self.accelerator.num_processes > 1)
        sizes = [count_examples(part) for part in parts]
        try:
            cache = [self._first_pass(part, position=k, limit=limit) for k, part in enumerate(parts)]
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"BatchNorm cannot normalise a single example: the sub-batches have {', '.join(map(str, sizes))}. "
                "Choose another sub_batch_size."
            ) from error
        end = GeneratorState.capture(self.accelerator.device)
        if self.frozen and not self._tried:
            self._try_replay(parts, cache)
            end.restore()
        result, gradients = self._derive(cache, targets, sizes)
        if not result["loss"].isfinite():
            self._refuse(result["loss"], cache)
        last = len(parts) - 1
        has_graph = not parts
        for k, part in enumerate(parts):
            has_graph |= self._second_pass(
                part,
                cache[k],
                Gradients([slices[k] for slices in gradients.features], gradients.parameters if k == last else None),
                divisor=divisor,
                synchronise=synchronise and k == last,
            )
            cache[k] = _SPENT  # lets go of its graph
        if not has_graph:
            raise ConfigError("Neither features nor criterion depend on anything trainable: there is nothing to train.")
        if not parts:
            with synchronised(self.accelerator, self.model, synchronise):
                propagate(self.accelerator, self.model(None, Gradients([], gradients.parameters)), divisor)
        end.restore()
        return scalars(result)

    def loss(self, module: Cacheable, inputs: Any, targets: Any) -> Tensor:
        """See :class:`iris_hf.training.passes.Pass`; the features are computed in sub-batches here too."""
        parts = split(inputs, self.config.sub_batch_size, num_examples=count_targets(targets))
        results = []
        for part in parts:
            with self.accelerator.autocast(), self.plugins.forward_context():
                features = module(to_device(part, self.accelerator.device))
            results.append(like_features(features, self._own(feature_tensors(features))))
        columns = make_columns(list(map(feature_tensors, results)), results[0], list(map(count_examples, parts)))
        tensors = [column.join() for column in columns]
        with self.accelerator.autocast(), together(False):
            loss: Tensor = module.measure(like_features(results[0], tensors), targets)["loss"]
        return loss

    def parts(self, inputs: Any, targets: Any) -> Iterable[tuple[Any, Any]]:
        """See :class:`iris_hf.training.passes.Pass`."""
        size = self.config.sub_batch_size
        divided = split(inputs, size, num_examples=count_targets(targets))
        per_part = [take_slice(targets, slice(start, start + size)) for start in range(0, len(divided) * size, size)]
        return zip(divided, per_part, strict=True)

    def _look_again(self, num_parts: int) -> None:
        """Forget what a sub-batch has taught where parameters have been frozen or freed, or hooks added, since."""
        trainable = [parameter.requires_grad for parameter in self._parameters]
        has_changed = trainable != self._trainable
        if has_changed:
            self._trainable = trainable
            self.num_kept_graphs = self.config.num_kept_graphs if self.config.memory_budget_in_mb is None else None
        if has_changed or self._looks_again:
            self._measured = self._tried = False
            self._looks_again = has_changed
            self.frozen = [] if self.compiled else frozen_parts(self.module)
        hooked = [has_hooks(part) for part in self.frozen]
        if self.sharded:
            hooked = self._agree_on_division(num_parts, hooked)
        self.frozen = [part for part, has_any in zip(self.frozen, hooked, strict=True) if not has_any]

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
        before = [] if self._measured else [attributes(module) for module in self.frozen]
        with torch.set_grad_enabled(needs_graph), recorded(self.frozen) as calls, self.plugins.forward_context():
            features = self.module(part) if self._measured else self._measure(part)
        tensors = feature_tensors(features)
        if not self._measured:
            self._learn(tensors, calls, before)
            if position < min(self.num_kept_graphs or 0, limit):
                return _Cached(features, tensors, state, has_graph=True)
        tensors = self._own(tensors)
        calls = {module: outputs for module, outputs in calls.items() if module in self.frozen}
        return _Cached(like_features(features, tensors), tensors, state, has_graph=False, calls=calls)

    def _own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Detach features; those of a compiled model lie where its next call, by CUDA graphs, may write its own."""
        return [tensor.detach().clone() if self.compiled else tensor.detach() for tensor in tensors]

    def _measure(self, part: Any) -> Any:
        """Compute the features of a sub-batch that is to teach something, and count what its graph holds."""
        if self.compiled or self.sharded:
            return self.module(part)
        with saved_bytes(self.module) as self._saved:
            return self.module(part)

    def _learn(self, tensors: list[Tensor], calls: Calls, before: Sequence[Sequence[tuple[Tensor, int]]]) -> None:
        """Take from a sub-batch which frozen parts to compute once, and how many graphs to keep."""
        self._measured = True
        room = _ROOM_FOR_FROZEN * sum(tensor.nbytes for tensor in tensors)
        can_be = [
            can_be_replayed(outputs, room=room) and are_same(attributes(module), held)
            for (module, outputs), held in zip(calls.items(), before, strict=True)
        ]
        if self.sharded:  # the processes gather a part's weights together
            can_be = self._all_agree(can_be)
        self.frozen = [module for module, can in zip(calls, can_be, strict=True) if can]
        self._looks_again &= not all(can_be)
        if self.sharded:
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

    def _try_replay(self, parts: Sequence[Any], cache: Sequence[_Cached]) -> None:
        """Let no frozen part be replayed where that gives other features than computing it again.

        What a part does beside its output, unseen, stays as the last sub-batch left it: any other shows it.
        """
        position = next((k for k, cached in enumerate(cache[:-1]) if not cached.has_graph), None)
        if position is None:
            return
        self._tried = True
        if any(isinstance(module, nn.SyncBatchNorm) and module.training for module in self.module.modules()):
            return  # processes would have to try as often as each other
        part, cached = parts[position], cache[position]
        replay = self._compute_again(part, cached, cached.calls)
        if self._all_same(replay, cached.tensors) or self._all_same(replay, self._compute_again(part, cached, {})):
            return
        self.frozen = []
        for each in cache:
            each.calls = {}
        if self.accelerator.is_main_process:
            logger.warning("Frozen parts are computed twice: what they return is not all that the model takes of them.")

    def _compute_again(self, part: Any, cached: _Cached, calls: Calls) -> list[Tensor]:
        assert cached.state is not None
        cached.state.restore()
        before = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        with torch.no_grad():
            with replayed(calls), fixed_statistics(self.norms), self.plugins.forward_context():
                tensors = feature_tensors(self.module(to_device(part, self.accelerator.device)))
            for buffer, value in before:  # a state that goes on with every forward, as of spectral_norm, has gone on
                buffer.copy_(value)
        return tensors

    def _all_same(self, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
        """Whether tensors are the same to the bit, if sharded on every process."""
        pairs = zip(tensors, others, strict=True)
        same = all(torch.equal(tensor.nan_to_num(), other.nan_to_num()) for tensor, other in pairs)
        return self._all_agree([same])[0] if self.sharded else same

    def _all_agree(self, flags: Sequence[bool]) -> list[bool]:
        """Return which flags are true on every process."""
        everywhere = torch.tensor([int(flag) for flag in flags], device=self.accelerator.device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return [bool(flag) for flag in everywhere.tolist()]

    def _agree_on_division(self, num_parts: int, hooked: Sequence[bool]) -> list[bool]:
        """Return which frozen parts have hooks on any of the sharded processes, which compute every layer together.

        Raises:
            DataError: If the processes have different numbers of sub-batches.
        """
        numbers = torch.tensor([num_parts, -num_parts, *map(int, hooked)], device=self.accelerator.device)
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        most, fewest, *flags = numbers.tolist()
        if most != -fewest:
            raise DataError(
                f"Under FSDP2 every process needs as many sub-batches of {self.config.sub_batch_size}; they have from "
                f"{-fewest} to {most}. Keep batches equally long in collate_function and plugins, or use ddp.yaml."
            )
        return [bool(flag) for flag in flags]

    def _derive(self, cache: list[_Cached], targets: Any, sizes: list[int]) -> tuple[dict[str, Any], _SplitGradients]:
        """Compute the loss of all features, and its derivatives by them and by the parameters that it uses itself."""
        group = world_group()
        form = cache[0].features if cache else None
        columns = make_columns([cached.tensors for cached in cache], form, sizes)
        leaves = [column.join() for column in columns]
        by_example = [column.by_example for column in columns]
        num_active = 1
        if group is not None:
            names = feature_names(form) if columns else []
            named = zip(names, leaves, by_example, strict=True)
            equal = {name: leaf for name, leaf, has_rows in named if not has_rows}
            active = count_and_compare(len(cache), names, equal, self.accelerator.device, group)
            num_active = sum(count > 0 for count in active)
            if num_active < len(active):
                form, leaves = borrow_form(form, leaves, by_example, active, self.accelerator.device)
                by_example = by_example or [leaf.dim() > 0 and not len(leaf) for leaf in leaves]
        for leaf in leaves:
            if leaf.is_floating_point():
                leaf.requires_grad_()
        tensors, of_rows, of_scalars = leaves, 1.0, 1.0
        if group is not None and not self.module.gathers:
            # Every rank computes the whole loss; DDP takes the mean of what the ranks then have.
            named = zip(feature_names(form), leaves, by_example, strict=True)
            tensors = [gather_around(leaf, group, name) if has_rows else leaf for name, leaf, has_rows in named]
            targets = gather_targets(targets, group)
            of_rows, of_scalars = group.size(), group.size() / num_active
        with torch.enable_grad(), self.accelerator.autocast(), self.plugins.forward_context(), together(True):
            result = self.module.measure(like_features(form, tensors), targets)
        if not result["loss"].requires_grad:
            raise ConfigError("The loss depends on no feature: the criterion must be differentiable.")
        # A criterion may use any parameter of the model, not just its own: those that it does have a derivative.
        trainable = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        derived = torch.autograd.grad(result["loss"], [*wanted, *trainable.values()], allow_unused=True)
        by_leaf = dict(zip(map(id, wanted), derived, strict=False))
        slices = [  # none where there are no examples
            column.divide(by_leaf.get(id(leaf)), of_rows if column.by_example else of_scalars)
            for leaf, column in zip(leaves, columns, strict=False)
        ]
        by_name = zip(trainable, derived[len(wanted) :], strict=True)
        return result, _SplitGradients(slices, {name: by for name, by in by_name if by is not None})

    def _refuse(self, loss: Tensor, cache: list[_Cached]) -> None:
        """Stop for a loss that is not finite, unless a scaler is there to skip the step, as in plain training."""
        if self.accelerator.scaler is not None:
            logger.warning("The loss is %s: the step is skipped.", loss.item())
            return
        broken = [
            str(position)
            for position, column in enumerate(zip(*(cached.tensors for cached in cache), strict=True))
            if not all(tensor.isfinite().all() for tensor in column)
        ]
        where = "its features are finite"
        if broken:
            where = f"feature tensors {', '.join(broken)} of this rank are not finite"
        raise DataError(
            f"The loss is {loss.item()}: {where}. Look at the examples and the model's outputs, lower base_lr, or use "
            "clip_grad_norm."
        )

    def _second_pass(
        self, part: Any, cached: _Cached, gradients: Gradients, *, divisor: int, synchronise: bool
    ) -> bool:
        """Send the gradients of a sub-batch backward, through its kept graph or one made again; say if there is one."""
        if cached.has_graph:
            with synchronised(self.accelerator, self.model, synchronise):
                return self._propagate(self.module.weigh(cached.tensors, gradients), divisor)
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
            return self._propagate(surrogate, divisor)

    def _propagate(self, surrogate: Tensor, divisor: int) -> bool:
        """Run a backward pass if there is something to train behind the surrogate: it may be the criterion alone."""
        if surrogate.requires_grad:
            propagate(self.accelerator, surrogate, divisor)
        return surrogate.requires_grad


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
    """The derivatives of a loss: by each feature tensor, a list over the sub-batches; by the parameters it uses."""

    features: list[list[Tensor | None]]
    parameters: dict[str, Tensor]
