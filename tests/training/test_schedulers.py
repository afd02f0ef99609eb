"""Learning-rate curves against torch's schedulers."""

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from iris_hf.training.schedulers import LearningRateSchedule, LrSchedulerConfig

STEPS, EPOCHS, WARMUP = 7, 6, 14  # a warm-up of two epochs


def curve(config: dict[str, Any], base_lr: float = 0.3) -> list[float]:
    schedule = LearningRateSchedule(config=LrSchedulerConfig.of(config), steps_per_epoch=STEPS, num_epochs=EPOCHS)
    return [schedule.learning_rate(base_lr, step) for step in range(STEPS * EPOCHS)]


def of_torch(make: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler, rates = make(optimizer), []
    for _ in range(STEPS * EPOCHS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


TOTAL = STEPS * EPOCHS
PLAIN = {
    "cosine_annealing": ({"min_lr": 0.01}, lambda o, total: CosineAnnealingLR(o, total, eta_min=0.01)),
    "linear_decreasing": ({}, lambda o, total: LinearLR(o, 1.0, 0.0, total)),
    "linear": ({"end_factor": 0.2}, lambda o, total: LinearLR(o, 1.0, 0.2, total)),
    "multistep": (
        {"decay_milestones": [0.75, 0.5], "decay_rate": 0.3},
        lambda o, total: MultiStepLR(o, [int(total * 0.5), int(total * 0.75)], 0.3),
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_curves_are_those_of_torch(name: str) -> None:
    config, make = PLAIN[name]
    assert curve({"name": name, **config}) == pytest.approx(of_torch(lambda o: make(o, TOTAL)))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("length", [{"warmup_epochs": 2}, {"warmup_iters": WARMUP}])
def test_warm_up_is_that_of_torch(name: str, length: dict[str, int]) -> None:
    config, make = PLAIN[name]

    def warmed(optimizer: torch.optim.Optimizer) -> Any:
        warm = LinearLR(optimizer, 0.1, 0.8, WARMUP)
        return SequentialLR(optimizer, [warm, make(optimizer, TOTAL - WARMUP)], [WARMUP])

    ours = curve({"name": name, **config, **length, "warmup_factor": 0.1, "warmup_end_factor": 0.8})
    assert ours == pytest.approx(of_torch(warmed))


def test_milestones_are_the_steps_that_fractions_of_a_run_name() -> None:
    config = LrSchedulerConfig(name="multistep", decay_milestones=[0.29], decay_rate=0.5)
    schedule = LearningRateSchedule(config=config, steps_per_epoch=1, num_epochs=100)
    assert [schedule.learning_rate(1.0, step) for step in (28, 29)] == [1.0, 0.5]  # 100 * 0.29 is 28.999999999999996


def test_a_linear_curve_may_rise() -> None:
    rates = curve({"name": "linear", "end_factor": 3.0})
    assert rates[0] == pytest.approx(0.3)
    assert rates[-1] == pytest.approx(0.3 * (1 + 2 * (TOTAL - 1) / TOTAL))


def test_multistep_with_warm_up_counts_milestones_from_the_start() -> None:
    rates = curve({"name": "multistep_with_warm_up", "warmup_epochs": 2, "warmup_lr": 0.02, "decay_milestones": [0.5]})
    assert rates[0] == pytest.approx(0.02)
    assert rates[7] == pytest.approx(0.02 + (0.3 - 0.02) / 2)
    assert rates[WARMUP : TOTAL // 2] == pytest.approx([0.3] * (TOTAL // 2 - WARMUP))
    assert rates[TOTAL // 2 :] == pytest.approx([0.03] * (TOTAL - TOTAL // 2))


def test_a_warm_up_without_a_start_begins_at_zero() -> None:
    assert curve({"warmup_iters": 2})[:3] == pytest.approx([0.0, 0.15, 0.3])


def test_a_warm_up_that_is_longer_than_the_run_is_said(caplog: pytest.LogCaptureFixture) -> None:
    curve({"warmup_iters": STEPS * EPOCHS - 1})
    assert not caplog.records
    assert max(curve({"warmup_iters": 1000})) < 0.3
    assert "The warm-up of 1000 steps is not over when the run ends: it has 42." in caplog.text


def test_min_lr_is_absolute_for_every_group() -> None:
    assert curve({"min_lr": 0.01}, base_lr=0.03)[-1] == pytest.approx(0.01, abs=1e-3)
