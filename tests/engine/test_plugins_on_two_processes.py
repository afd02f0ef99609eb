"""Plugins that touch numbers do on two processes what they do on one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import plugins_rank
import pytest
import torch
from launching import run_ranks
from test_trackers import pictures, read

pytestmark = pytest.mark.torch_only


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = run_ranks(2, plugins_rank.__file__, str(folder), timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def on_two(two: Path) -> list[dict[str, Any]]:
    ranks: list[dict[str, Any]] = torch.load(two / "out.pt")
    return ranks


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def on_one(one: Path) -> dict[str, Any]:
    return plugins_rank.run(one, batch_size=8)


@pytest.mark.parametrize("name", ["averaged", "halved", "broken"])
def test_weights_are_those_of_one_process(on_one: dict[str, Any], on_two: list[dict[str, Any]], name: str) -> None:
    tolerance = 2e-3 if name == "halved" else 1e-6  # bfloat16: halves of a batch round differently
    for weight in on_one[name]:
        torch.testing.assert_close(on_two[0][name][weight], on_one[name][weight], rtol=1e-5, atol=tolerance)


def test_every_rank_ends_with_the_same_bytes(on_two: list[dict[str, Any]]) -> None:
    first, second = on_two
    for name in ("averaged", "halved", "broken"):
        assert all(torch.equal(weight, second[name][key]) for key, weight in first[name].items())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first["norm"], second["norm"], strict=True))
    assert first["measured"] == second["measured"]


def test_all_ranks_stop_at_the_step_whose_loss_one_of_them_lost(
    on_one: dict[str, Any], on_two: list[dict[str, Any]]
) -> None:
    steps = [ranks["broken_steps"] for ranks in (on_one, *on_two)]
    assert steps == [[1, 2, 3, 4, 5]] * 3


def test_metrics_count_every_example_once(on_one: dict[str, Any], on_two: list[dict[str, Any]]) -> None:
    assert on_two[0]["measured"] == pytest.approx(on_one["measured"], rel=1e-5)
    assert on_two[0]["measured"]["num_examples"] == 13
    assert on_two[0]["averaged_val_losses"] == pytest.approx(on_one["averaged_val_losses"], rel=1e-5)
    assert on_two[0]["watched_steps"] == on_one["watched_steps"] < 4 * 8


def test_one_process_writes_what_one_alone_would(
    one: Path, two: Path, on_one: dict[str, Any], on_two: list[dict[str, Any]]
) -> None:
    alone, together = read(one / "logs"), read(two / "logs")
    for tag in ("loss", "learning_rate", "val_loss", "accuracy"):
        assert together[tag] == pytest.approx(alone[tag], rel=1e-4)
    for tag in ("examples_per_second", "peak_host_memory_mib"):
        assert set(together[tag]) == set(alone["loss"])
        assert all(value > 0 for value in together[tag].values())
    drawn = [pictures(folder / "logs") for folder in (one, two)]
    assert set(drawn[0]) == set(alone["val_loss"])
    assert all(np.array_equal(picture, drawn[1][step]) for step, picture in drawn[0].items())
    best = [json.loads((folder / "best" / "best.json").read_text()) for folder in (one, two)]
    assert best[0] == {**best[1], "value": pytest.approx(best[1]["value"], rel=1e-5)}
