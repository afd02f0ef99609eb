"""The gradient cache gives the gradients of the whole batch, once, on any number of processes."""

import copy
import logging
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cache_rank import DIVISIONS, MODELS
from launching import torchrun
from pairs import Pairs, TwoTowers, full_batch_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import iris_hf
from iris_hf.engine.plugins import PluginList
from iris_hf.engine.rng import probe_generators, seed_generators
from iris_hf.models.steps import as_cacheable
from iris_hf.training.gradient_cache import CacheConfig, CachedPass
from iris_hf.training.replay import saved_bytes
from iris_hf.training.sub_batches import split

pytestmark = pytest.mark.torch_only


def make_pass(model: nn.Module, size: int, **options: Any) -> CachedPass:
    settings = {"num_kept_graphs": 0, "memory_budget_in_mb": None, "check_replay": True, **options}
    module = as_cacheable(model)
    accelerator = Accelerator(cpu=True)
    return CachedPass(module, module, accelerator, PluginList([]), config=CacheConfig(sub_batch_size=size, **settings))


def cached_gradients(
    model: nn.Module, inputs: Any, targets: Any, size: int, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same as `full_batch_gradients`, with a cache."""
    model = copy.deepcopy(model)
    result = make_pass(model, size, **options).backward(inputs, targets, divisor=1, synchronise=True)
    return result["loss"], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], **tolerance) -> None:
    torch.testing.assert_close(got[0], wanted[0], **tolerance)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][name], gradient, **tolerance)


EXACT = {"rtol": 1e-10, "atol": 1e-13}
TOLERANCES = {"float32": {"rtol": 1e-5, "atol": 1e-6}}


def one_pass_gradients(
    model: nn.Module, inputs: Any, targets: Any, size: int, *, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with the random numbers of one pass over sub-batches, of a model that returns two features and more."""
    model = copy.deepcopy(model)
    seed_generators(seed)
    features = [model(part) for part in split(inputs, size)]
    tensors = [torch.cat([f[0] for f in features]), torch.cat([f[1] for f in features]), *features[0][2:]]
    loss = model.criterion(tensors, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("size", "kept"), DIVISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_that_of_the_whole_batch(name: str, size: int, kept: int) -> None:
    model, (inputs, targets) = MODELS[name](), Pairs().batch()
    wanted = full_batch_gradients(model, inputs, targets)
    got = cached_gradients(model, inputs, targets, size, num_kept_graphs=kept)
    assert_equal(got, wanted, **TOLERANCES.get(name, EXACT))


@pytest.mark.parametrize("size", [3, 5, 13])
def test_a_scale_of_one_axis_is_a_scalar(size: int) -> None:
    model, (inputs, targets) = TwoTowers(), Pairs().batch()
    model.logit_scale = nn.Parameter(model.logit_scale.data[None])
    wanted = full_batch_gradients(model, inputs, targets)
    assert_equal(cached_gradients(model, inputs, targets, size), wanted, **EXACT)


@pytest.mark.parametrize("kept", [2, 50])
def test_kept_graphs_change_no_bit(kept: int) -> None:
    model, (inputs, targets) = TwoTowers(dropout=0.3, dtype=torch.float32), Pairs(dtype=torch.float32).batch()
    seed_generators(1)
    wanted = cached_gradients(model, inputs, targets, 3)
    seed_generators(1)
    assert_equal(cached_gradients(model, inputs, targets, 3, num_kept_graphs=kept), wanted, rtol=0, atol=0)


class Noisy(TwoTowers):
    """Draws from all three global generators in its forward."""

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        import random

        images, texts = inputs
        return super().forward((images * (1 + random.random()) + np.random.random(), texts))


def test_second_pass_replays_every_random_number_and_the_generators_advance_once() -> None:
    inputs, targets = Pairs().batch()
    model = Noisy(dropout=0.5)  # and stochastic depth
    wanted = one_pass_gradients(model, inputs, targets, 3, seed=11)
    once = probe_generators()
    seed_generators(11)
    got = cached_gradients(model, inputs, targets, 3)  # check_replay compares the features to the bit
    assert probe_generators() == once
    assert_equal(got, wanted, **EXACT)


class Inside(nn.Module):
    """A module around another: torch compiles no Sequential by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Tensor) -> Tensor:
        return self.inner(features)


# Inductor itself uses what torch deprecates: https://github.com/pytorch/pytorch/issues/178060
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_model_replays_its_dropout() -> None:
    import torch._dynamo.utils

    compiled = torch._dynamo.utils.counters["frames"]["ok"]
    inputs, targets = Pairs(39, dtype=torch.float32).batch()
    model = TwoTowers(dropout=0.5, dtype=torch.float32)  # and stochastic depth
    model.image_model = Inside(model.image_model)
    model.image_model.compile(backend="aot_eager")
    seed_generators(3)
    cache = make_pass(model, 13)  # equal sub-batches: no second shape to compile for
    cache.backward(inputs, targets, divisor=1, synchronise=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > compiled
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_check_replay_finds_a_model_that_keeps_state() -> None:
    class Counting(TwoTowers):
        calls = 0

        def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            self.calls += 1
            return super().forward((inputs[0] + self.calls, inputs[1]))

    inputs, targets = Pairs().batch()
    with pytest.raises(iris_hf.ConfigError, match=r"Feature tensor 0 .*largest difference .*keeps state between calls"):
        cached_gradients(Counting(), inputs, targets, 5)


def test_batch_norm_counts_every_example_once_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    inputs, targets = Pairs().batch()
    model = TwoTowers(norm=True)
    with caplog.at_level(logging.WARNING, "iris_hf"):
        cache = make_pass(model, 5)
    assert "2 BatchNorm layers normalise each sub-batch of 5" in caplog.text
    once = copy.deepcopy(model)
    for part in split(inputs, 5):
        once(part)
    cache.backward(inputs, targets, divisor=1, synchronise=True)
    assert {n: b.tolist() for n, b in model.named_buffers()} == {n: b.tolist() for n, b in once.named_buffers()}
    assert all(norm.track_running_stats for norm in cache.norms)


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


def test_parts_of_an_input_in_a_list_are_an_error() -> None:
    (images, texts), targets = Pairs().batch()
    with pytest.raises(iris_hf.DataError, match=r"2 inputs for 13 targets. .*as a tuple or a dict"):
        make_pass(TwoTowers(), 4).backward([images, texts], targets, divisor=1, synchronise=True)


class Lists(nn.Module):
    """Takes dicts, and lists of images of different sizes; returns one feature tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4, dtype=torch.float64)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        means = torch.stack([image.mean((1, 2)) for image in inputs["images"]])
        weights = inputs["weights"]["by_example"] * torch.from_numpy(inputs["array"])
        return self.layer(means) * weights[:, None] * inputs["weights"]["for_all"]


def test_dicts_and_images_of_different_sizes_are_divided_by_example() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "images": [torch.rand(3, 4 + i, 9 - i, generator=generator, dtype=torch.float64) for i in range(7)],
        "weights": {"by_example": torch.rand(7, generator=generator, dtype=torch.float64), "for_all": torch.tensor(2)},
        "array": np.linspace(0.5, 1, 7),
        "note": "goes along",
    }
    targets = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    model = Lists()
    wanted = full_batch_gradients(model, inputs, targets)
    assert_equal(cached_gradients(model, inputs, targets, 2), wanted, **EXACT)
    assert [len(part["images"]) for part in split(inputs, 3)] == [3, 3, 1]


def test_an_overflow_in_half_precision_skips_the_step() -> None:
    """A scaler works on a CPU too, on float32: with a scale so large that gradients overflow, and on a NaN loss."""
    inputs, targets = Pairs(dtype=torch.float32).batch()
    moved: list[list[bool]] = []
    for scale, factor in ((3e38, 1.0), (8.0, 1.0), (8.0, torch.inf)):
        model = TwoTowers(dtype=torch.float32)
        model.logit_scale.data.fill_(4.5)  # large gradients
        cache = make_pass(model, 4, check_replay=False)
        scaler = cache.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wanted = full_batch_gradients(model, inputs, targets)
        before = copy.deepcopy(model.state_dict())
        cache.backward((inputs[0] * factor, inputs[1]), targets, divisor=1, synchronise=True)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved.append([not torch.equal(before[name], value) for name, value in model.state_dict().items()])
        if all(moved[-1]):
            for name, gradient in wanted[1].items():
                torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-5)
        else:
            assert scaler.get_scale() == pytest.approx(scale / 2)
    assert [set(step) for step in moved] == [{False}, {True}, {False}]


def test_saved_bytes_grow_linearly_and_peak_at_one_sub_batch() -> None:
    sizes = []
    for num_examples in (64, 128, 256):
        model, (inputs, targets) = TwoTowers(), Pairs(num_examples).batch()
        with saved_bytes(model) as found:
            model.criterion(model(inputs), targets)
        sizes.append(sum(found.values()))
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.1)  # nothing of size B x B


def test_a_memory_budget_decides_how_many_graphs_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    inputs, targets = Pairs(64).batch()
    with caplog.at_level(logging.INFO, "iris_hf"):
        none = make_pass(TwoTowers(), 8, memory_budget_in_mb=0)
        none.backward(inputs, targets, divisor=1, synchronise=True)
        some = make_pass(TwoTowers(), 8, memory_budget_in_mb=0.02)
        some.backward(inputs, targets, divisor=1, synchronise=True)
    assert none.num_kept_graphs == 0
    assert some.num_kept_graphs is not None
    assert 1 <= some.num_kept_graphs <= 20
    assert "the graph of a sub-batch of 8 holds" in caplog.text


def test_every_graph_is_released_before_the_next() -> None:
    alive: list[int] = []
    graphs: set[int] = set()

    class Model(TwoTowers):
        def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            u, *rest = super().forward(inputs)
            if torch.is_grad_enabled():
                held = torch.zeros(1)
                key = id(held)
                graphs.add(key)
                weakref.finalize(held, graphs.discard, key)
                u = u * (1 + held.requires_grad_(True) * 0)
                alive.append(len(graphs))
            return (u, *rest)

    inputs, targets = Pairs().batch()
    make_pass(Model(), 2).backward(inputs, targets, divisor=1, synchronise=True)
    assert len(alive) >= 7
    assert max(alive) == 1


COUNTS = {"5 + 8": (5, 8), "one empty": (13, 0), "three": (4, 0, 9)}


@pytest.fixture(scope="module", params=COUNTS.values(), ids=COUNTS)
def on_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[Any, Any], str, dict[str, list[str]]]:
    out = tmp_path_factory.mktemp("cache") / "out.pt"
    script = str(Path(__file__).with_name("cache_rank.py"))
    done = torchrun(len(request.param), script, str(out), *map(str, request.param))
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def test_uneven_ranks_have_the_gradients_of_one_process_with_the_whole_batch(on_ranks: Any) -> None:
    inputs, targets = Pairs().batch()
    for (name, _, _), (loss, gradients, _) in on_ranks[0].items():
        wanted = full_batch_gradients(MODELS[name](), inputs, targets)
        assert_equal((torch.tensor(loss, dtype=wanted[0].dtype), gradients), wanted, **TOLERANCES.get(name, EXACT))


def test_gradients_are_reduced_once_per_step(on_ranks: Any) -> None:
    assert all(reductions == 1 for _, _, reductions in on_ranks[0].values())


def test_parameters_without_a_part_in_the_loss_are_explained(on_ranks: Any) -> None:
    assert "give ddp_find_unused_parameters=True, or freeze those" in on_ranks[1]


def test_what_differs_between_ranks_is_said_on_each(on_ranks: Any, request: pytest.FixtureRequest) -> None:
    counts = request.node.callspec.params["on_ranks"]
    differences = on_ranks[2]
    if sum(map(bool, counts)) > 1:
        for said in differences["scale"]:
            assert re.match("(Feature 'scale'|A feature) is a scalar from .* the same for every sub-batch, on", said)
        for said in differences["image"]:
            assert said.startswith(
                "The rows of feature 'image' have to be alike on all processes, and are [5] of torch"
            )
            assert said.endswith("Pad them to one size.")
    else:
        assert differences["scale"] == differences["image"] == [""] * len(counts)
    for said in differences["targets"]:
        assert "The rows of the targets have to be alike" in said
        assert "[1] of torch.int64 on rank 0, [2] of torch.int64 on rank 1" in said
