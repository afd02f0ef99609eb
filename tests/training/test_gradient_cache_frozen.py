"""A gradient cache computes frozen parts once where that leaves gradients exact, and only there."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached import EXACT, assert_equal, cached_gradients, make_pass, one_pass_gradients
from pairs import Pairs, TwoTowers, full_batch_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iris_hf.engine.rng import seed_generators

pytestmark = pytest.mark.torch_only


def test_a_frozen_tower_is_computed_once_with_the_same_gradients() -> None:
    calls: list[int] = []

    class Counted(nn.Identity):
        def forward(self, images: Tensor) -> Tensor:
            calls.append(1)
            return images

    inputs, targets = Pairs().batch()
    model = TwoTowers(dropout=0.4)
    model.image_model.insert(0, Counted())
    model.image_model.requires_grad_(False)
    wanted = one_pass_gradients(model, inputs, targets, 4, seed=2)
    calls.clear()
    cache = make_pass(model, 4)
    seed_generators(2)
    result = cache.backward(inputs, targets, divisor=1, synchronise=True)
    assert len(calls) == 4  # 13 examples in sub-batches of 4
    assert cache.frozen == [model.image_model]
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal((result["loss"], got), wanted, **EXACT)


def test_freezing_and_freeing_between_steps_is_noticed() -> None:
    inputs, targets = Pairs().batch()
    model = TwoTowers()
    model.image_model.requires_grad_(False)
    model.image_projection.requires_grad_(False)
    cache = make_pass(model, 4, num_kept_graphs=1)
    for trainable in (False, True, False):
        model.image_model.requires_grad_(trainable)  # in front of a projection that stays frozen
        model.zero_grad()
        wanted = full_batch_gradients(model, inputs, targets)
        result = cache.backward(inputs, targets, divisor=1, synchronise=True)
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_equal((result["loss"], got), wanted, **EXACT)


class Checkpointed(TwoTowers):
    """Computes most of its image tower, with frozen parts that draw random numbers, again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__(dropout=0.3)
        self.reentrant = reentrant
        self.twice = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3)).requires_grad_(False)
        self.first = nn.Linear(6, 6)
        self.double()

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        def tower(images: Tensor) -> Tensor:
            return self.image_model(self.twice(torch.tanh(self.twice(images))))

        images = self.first(inputs[0]) if self.reentrant else inputs[0]  # that kind wants an input with a gradient
        u = self.image_projection(checkpoint(tower, images, use_reentrant=self.reentrant))
        v = self.text_projection(self.text_model(inputs[1]))
        return nn.functional.normalize(u, dim=-1), nn.functional.normalize(v, dim=-1), self.logit_scale.exp()


# That kind warns in a pass without gradients, such as the cache's first.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_a_tower_with_frozen_parts_leaves_gradients_exact(reentrant: bool) -> None:
    model, (inputs, targets) = Checkpointed(reentrant=reentrant), Pairs().batch()
    wanted = one_pass_gradients(model, inputs, targets, 4, seed=6)
    seed_generators(6)
    assert_equal(cached_gradients(model, inputs, targets, 4), wanted, **EXACT)


def test_a_frozen_part_behind_a_trainable_one_still_passes_gradients_on() -> None:
    class Behind(TwoTowers):
        def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            u = torch.tanh(self.image_projection(self.image_model(inputs[0])))
            return u, self.text_projection(self.text_model(inputs[1])), self.logit_scale.exp()

    inputs, targets = Pairs().batch()
    model = Behind()
    model.image_projection.requires_grad_(False)
    assert_equal(cached_gradients(model, inputs, targets, 4), full_batch_gradients(model, inputs, targets), **EXACT)


def frozen_model(kind: str) -> nn.Module:
    """Models whose frozen parts are not just towers of their own."""
    torch.manual_seed(0)
    model = TwoTowers()
    if kind == "changed in place":
        model.image_model = nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.SiLU(inplace=True), nn.Linear(8, 8))
    elif kind == "shared":
        shared = nn.Linear(8, 8).requires_grad_(False)
        model.image_model = nn.Sequential(nn.Linear(6, 8).requires_grad_(False), shared, nn.Linear(8, 8))
        model.text_model = nn.Sequential(nn.Linear(4, 8).requires_grad_(False), shared, nn.Linear(8, 8))
    elif kind == "called inside and outside another":

        class Outside(TwoTowers):
            def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
                image, text = inputs
                return super().forward((image, self.inner(text)))

        model = Outside()
        model.inner = nn.Linear(4, 4).requires_grad_(False)
        model.text_model = nn.Sequential(nn.Sequential(model.inner, nn.Tanh()), nn.Linear(4, 8))
    elif kind == "hook that changes the output":
        model.image_model.requires_grad_(False).register_forward_hook(lambda _, inputs, output: output * 0.5)
    elif kind in KEEPING:
        model = TakesKept(*KEEPING[kind])
    return model.double()


def hooked(*sizes: int) -> nn.Linear:
    def keep(layer: nn.Module, _: Any, output: Tensor) -> None:
        layer.hidden = output

    layer = nn.Linear(*sizes)
    layer.register_forward_hook(keep)
    return layer


class Keeps(nn.Linear):
    """Keeps what it returns, in an attribute."""

    hidden: Tensor

    def forward(self, features: Tensor) -> Tensor:
        hidden = super().forward(features)
        self.keep(hidden)
        return hidden

    def keep(self, hidden: Tensor) -> None:
        self.hidden = hidden


class KeepsInside(Keeps):
    """Keeps it deep in an attribute that stays the same."""

    def keep(self, hidden: Tensor) -> None:
        self.__dict__.setdefault("kept", {"by name": [hidden]})["by name"][0] = hidden


class KeepsElsewhere(Keeps):
    """Keeps it where nobody looks."""

    elsewhere: dict[str, Tensor] = {}  # noqa: RUF012

    def keep(self, hidden: Tensor) -> None:
        self.elsewhere["hidden"] = hidden


KEEPING: dict[str, tuple[Callable[..., nn.Linear], Callable[[Any], Tensor]]] = {
    "hook that keeps the output": (hooked, lambda layer: layer.hidden),
    "output kept in an attribute": (Keeps, lambda layer: layer.hidden),
    "output kept inside an attribute": (KeepsInside, lambda layer: layer.kept["by name"][0]),
    "output kept elsewhere": (KeepsElsewhere, lambda layer: layer.elsewhere["hidden"]),
}


class TakesKept(TwoTowers):
    """Takes the intermediate features of a frozen tower from where they are kept."""

    def __init__(self, make: Callable[..., nn.Linear], take: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.take = take
        self.image_model = nn.Sequential(make(6, 8), nn.Tanh(), nn.Linear(8, 8)).requires_grad_(False)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        images = self.image_model(inputs[0]) + self.take(self.image_model[0])
        u, v = self.image_projection(images), self.text_projection(self.text_model(inputs[1]))
        return nn.functional.normalize(u, dim=-1), nn.functional.normalize(v, dim=-1), self.logit_scale.exp()


KINDS = ["changed in place", "shared", "called inside and outside another", "hook that changes the output"]


@pytest.mark.parametrize("kind", [*KINDS, *KEEPING])
def test_frozen_parts_of_every_kind_leave_gradients_exact(kind: str) -> None:
    model, (inputs, targets) = frozen_model(kind), Pairs().batch()
    wanted = full_batch_gradients(model, inputs, targets)
    model_of_two_steps = copy.deepcopy(model)
    cache = make_pass(model_of_two_steps, 4)
    for _ in range(2):  # the first step learns what the second uses
        model_of_two_steps.zero_grad()
        result = cache.backward(inputs, targets, divisor=1, synchronise=True)
        got = {n: p.grad for n, p in model_of_two_steps.named_parameters() if p.grad is not None}
        assert_equal((result["loss"], got), wanted, **EXACT)


def test_activations_of_frozen_layers_inside_a_tower_are_not_kept() -> None:
    wide = nn.Linear(6, 8 * 1000, dtype=torch.float64).requires_grad_(False)
    model = TwoTowers()
    model.image_model = nn.Sequential(
        wide, nn.Unflatten(1, (8, 1000)), nn.AvgPool1d(1000), nn.Flatten(), nn.Linear(8, 8)
    )
    model.double()
    cache = make_pass(model, 4)
    inputs, targets = Pairs().batch()
    cache.backward(inputs, targets, divisor=1, synchronise=True)
    assert cache.frozen == []


def test_a_part_that_makes_a_tensor_in_its_first_forward_is_computed_once_from_the_second_batch_on() -> None:
    calls: list[int] = []

    class Lazy(nn.Linear):
        positions: Tensor | None = None

        def forward(self, features: Tensor) -> Tensor:
            calls.append(1)
            if self.positions is None:
                self.positions = torch.arange(8)
            return super().forward(features) + self.positions

    inputs, targets = Pairs().batch()
    model = TwoTowers()
    model.image_model = nn.Sequential(Lazy(6, 8), nn.Tanh()).double().requires_grad_(False)
    wanted = full_batch_gradients(model, inputs, targets)
    cache = make_pass(model, 4)
    for step in range(3):
        model.zero_grad()
        calls.clear()
        result = cache.backward(inputs, targets, divisor=1, synchronise=True)
        got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert_equal((result["loss"], got), wanted, **EXACT)
        assert len(calls) == (8, 4, 4)[step]  # of 4 sub-batches
    assert cache.frozen == [model.image_model]


def test_replay_is_tried_beside_synchronised_batch_norm_in_evaluation_mode() -> None:
    model, (inputs, targets) = frozen_model("output kept elsewhere"), Pairs().batch()
    model.image_model.append(nn.SyncBatchNorm(8).double().requires_grad_(False).eval())
    assert_equal(cached_gradients(model, inputs, targets, 4), full_batch_gradients(model, inputs, targets), **EXACT)
