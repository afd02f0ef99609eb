"""What a step with the gradient cache costs: memory of one sub-batch, and of the graphs that it keeps."""

import logging
import weakref

import pytest
import torch
from cached import make_pass
from pairs import Pairs, TwoTowers
from torch import Tensor

from iris_hf.training.replay import saved_bytes

pytestmark = pytest.mark.torch_only


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
