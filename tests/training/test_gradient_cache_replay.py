"""The gradient cache's second pass does what its first did: the same random numbers, and nothing twice."""

import copy
import logging

import numpy as np
import pytest
from cached import EXACT, assert_equal, cached_gradients, make_pass, one_pass_gradients
from pairs import Pairs, TwoTowers
from torch import Tensor, nn

import iris_hf
from iris_hf.engine.rng import probe_generators, seed_generators
from iris_hf.training.sub_batches import split

pytestmark = pytest.mark.torch_only


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
