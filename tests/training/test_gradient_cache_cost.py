"""What a step with the gradient cache costs: operations, waits for the device, memory."""

import logging
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from cached import make_pass
from pairs import Pairs, TwoTowers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import iris_hf
from iris_hf.losses.criterion import ContrastiveCriterion
from iris_hf.training.replay import saved_bytes

pytestmark = pytest.mark.torch_only

aten = torch.ops.aten


def image_tower(kind: str) -> nn.Module:
    if kind == "convolutions":
        layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((3, 8), (8, 32), (32, 128))]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 16))
    layers = [nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True) for _ in range(2)]
    return nn.Sequential(nn.Flatten(1, 2), nn.Linear(16, 32), *layers, nn.Flatten(), nn.Linear(48 * 32, 16))


class LargeTowers(nn.Module):
    """Towers whose operations are many beside those of the loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.image_model = image_tower(kind)
        self.text_model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.criterion = ContrastiveCriterion()

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        u, v = self.image_model(inputs[0]), self.text_model(inputs[1])
        return nn.functional.normalize(u, dim=-1), nn.functional.normalize(v, dim=-1), self.logit_scale.exp()


@pytest.mark.parametrize("kind", ["convolutions", "attention"])
def test_a_step_takes_one_forward_pass_more_than_plain_training_less_the_kept_graphs(kind: str) -> None:
    """At most 1.35 of plain training's operations, ideally 4/3, falling to 1."""
    model, targets = LargeTowers(kind), torch.zeros(16, dtype=torch.long)
    inputs = torch.rand(16, 3, 16, 16), torch.rand(16, 16)

    def operations(compute: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            compute()
        return counter.get_total_flops()

    def cached(kept: int = 0) -> int:
        cache = make_pass(model, 2, num_kept_graphs=kept, check_replay=False)
        first, second = (
            operations(lambda: cache.backward(inputs, targets, divisor=1, synchronise=True)) for _ in range(2)
        )
        assert first == second or cache.frozen  # a trial of replay, once
        return second

    plain = operations(lambda: model.criterion(model(inputs), targets).backward())
    with torch.no_grad():
        forward = operations(lambda: model(inputs))
    assert [cached(kept) for kept in (0, 4, 8)] == [plain + forward, plain + forward // 2, plain]
    assert (plain + forward) / plain <= 1.35

    model.image_model.requires_grad_(False)
    plain = operations(lambda: model.criterion(model(inputs), targets).backward())
    with torch.no_grad():
        forward -= operations(lambda: model.image_model(inputs[0]))
    assert cached() == plain + forward  # the frozen tower is computed once


class Unseen(TorchDispatchMode):
    """Counts how often the host asks for values on the device `meta`, which holds none, and makes some up.

    What it does not know, and would wait for a device, is an error of torch's.
    """

    reads = 0

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        if isinstance(arguments[0] if arguments else None, Tensor) and arguments[0].is_meta:
            to_host = op is aten._to_copy.default and options.get("device", "meta") == torch.device("cpu")
            if to_host or op in (aten._local_scalar_dense.default, aten.allclose.default, aten.equal.default):
                self.reads += 1
                return torch.ones(arguments[0].shape, dtype=options.get("dtype")) if to_host else True
        return op(*arguments, **options)


class Reads(iris_hf.Plugin):
    """Notes how often every step has read from the device."""

    def __init__(self, mode: Unseen) -> None:
        self.mode = mode
        self.of_steps: list[int] = []

    def on_epoch_start(self, state: iris_hf.TrainState) -> None:
        self.before = self.mode.reads

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        self.of_steps.append(self.mode.reads - self.before)
        self.before = self.mode.reads


PLUGINS = ["clip_grad_norm(0.1)", "ema(num_skip_iterations=0)", "log_summary"]


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, 0),
        ({"sub_batch_size": 12}, 1),  # is the loss finite?
        ({"sub_batch_size": 4}, 2),  # and is the scale one in all sub-batches?
        ({"sub_batch_size": 1}, 2),
        ({"sub_batch_size": 2, "num_kept_graphs": 3}, 2),
        ({"sub_batch_size": 2, "accumulate_grad_batches": 2}, 4),
        ({"sub_batch_size": 2, "plugins": ["freeze_modules('image_model')"]}, 2),
    ],
    ids=str,
)
def test_a_step_does_not_wait_for_the_device_more_often_with_more_sub_batches(
    config: dict[str, Any], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "device", torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none on this device
    with Unseen() as mode:
        reads = Reads(mode)
        train = iris_hf.train_with_gradient_cache if "sub_batch_size" in config else iris_hf.train
        train(
            TwoTowers(dropout=0.1, dtype=torch.float32),
            Pairs(48, torch.float32),
            None,
            batch_size=12,
            base_lr=0.1,
            optimizer="adamw",
            num_epochs=1,
            random_seed=0,
            num_dataloader_workers=0,
            **{**config, "plugins": [reads, *PLUGINS, *config.get("plugins", ())]},
        )
    num_steps = 4 // config.get("accumulate_grad_batches", 1)
    assert reads.of_steps[1:] == [wanted] * (num_steps - 1)  # the first step looks at buffers and tries replay


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
