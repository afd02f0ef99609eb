"""Two processes share a stream, resume it, and hand it over to one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_ranks
from stream_rank import InOrder, Measured
from streams import (
    CONSTANT,
    Interrupt,
    Interruption,
    assert_close,
    assert_equal,
    endless,
    load,
    to_noisy_tensor,
    to_tensor,
    train_stream,
    trained_by_hand,
)
from tiny import Net, Tensors

import iris_hf
from iris_hf.engine.plugins.val_metrics import ValMetrics


class OnTwo:
    """What two processes did in one launch."""

    def __init__(self, runs: dict[str, dict[str, Any]], results: list[Any]) -> None:
        self.runs = runs
        self.last = results[-1]
        self.results = dict(zip(runs, results[:-1], strict=True))


@pytest.fixture(scope="module")
def on_two(
    shards: Path, even_shards: Path, bad_shards: Path, val_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> OnTwo:
    folder = tmp_path_factory.mktemp("two")
    odd, even = {"shards": str(shards), "buffer_size": 6}, {"shards": str(even_shards)}
    half = {"batch_size": 4, "noisy": True}
    alone = {"checkpoint_dir": folder / "alone", "checkpoint_steps": 3, "train_transform": to_noisy_tensor}
    with pytest.raises(Interruption):
        train_stream(iris_hf.from_hf(load(even_shards)), plugins=[Interrupt(5)], **alone)
    kept = {"checkpoint_steps": 3, "resume": "auto", **half}
    odd_kept = {**odd, **kept, "checkpoint_dir": str(folder / "odd")}
    even_kept = {**even, **kept, "checkpoint_dir": str(folder / "even")}
    runs = {
        "odd": {**odd, **half, "val": str(val_shards), "val_batch_size": 3},
        "odd interrupted": {**odd_kept, "interrupted_at": 5},
        "odd resumed": odd_kept,
        "even": {**even, "batch_size": 4, **CONSTANT},
        "even, noisy": {**even, **half},
        "even interrupted": {**even_kept, "interrupted_at": 5},
        "even resumed": even_kept,
        "even, begun by one": {**even, **half, "resume": str(folder / "alone" / "step-00000003")},
        "bad": {"shards": str(bad_shards), "batch_size": 4, "on_bad_example": "skip"},
    }
    out = folder / "out.pt"
    script = str(Path(__file__).with_name("stream_rank.py"))
    done = run_ranks(2, script, str(out), json.dumps(list(runs.values())), str(val_shards))
    assert done.returncode == 0, done.stderr
    return OnTwo(runs, torch.load(out))


def test_two_processes_take_the_same_steps_as_one(on_two: OnTwo, shards: Path, val_shards: Path) -> None:
    two = on_two.results["odd"]
    measured = Measured()
    weights, recorder = train_stream(
        iris_hf.from_hf(load(shards, 6)),
        train_transform=to_noisy_tensor,
        val_dataset=iris_hf.from_hf(load(val_shards)),
        val_batch_size=3,
        plugins=[ValMetrics(InOrder()), measured],
    )
    for validation, on_one in zip(two["val_metrics"], measured.val_metrics, strict=True):
        assert validation == pytest.approx(on_one, rel=1e-5)
    assert two["losses"] == pytest.approx(recorder.losses, rel=1e-5)
    assert two["val_losses"] == pytest.approx(recorder.val_losses, rel=1e-5)
    assert two["learning_rates"] == recorder.learning_rates
    assert_close(two["weights"], weights)


def test_processes_read_their_own_shards_where_these_can_be_shared(on_two: OnTwo, even_shards: Path) -> None:
    parts = [endless(even_shards, part=part, num_parts=2) for part in range(2)]
    assert_close(on_two.results["even"]["weights"], trained_by_hand(parts, 8))


@pytest.mark.parametrize("name", ["odd", "even"])
def test_two_processes_resume_to_the_same_bytes(on_two: OnTwo, name: str) -> None:
    never = on_two.results["odd" if name == "odd" else "even, noisy"]
    resumed = on_two.results[f"{name} resumed"]
    assert on_two.results[f"{name} interrupted"] is None
    assert_equal(resumed["weights"], never["weights"])
    assert resumed["losses"] == never["losses"][3:]


@pytest.mark.parametrize("name", ["odd", "even"])
@pytest.mark.parametrize("split", [{"batch_size": 8}, {"batch_size": 4, "accumulate_grad_batches": 2}])
def test_one_process_goes_on_where_two_were(on_two: OnTwo, name: str, split: dict[str, Any]) -> None:
    run = on_two.runs[f"{name} interrupted"]
    newest = max(Path(run["checkpoint_dir"] + "-copy").glob("step-*"))
    weights, recorder = train_stream(
        iris_hf.from_hf(load(run["shards"], run.get("buffer_size", 0))),
        train_transform=to_noisy_tensor,
        resume=newest,
        **split,
    )
    resumed = on_two.results[f"{name} resumed"]
    assert recorder.steps == resumed["steps"] == [4, 5, 6, 7, 8]
    assert recorder.losses == pytest.approx(resumed["losses"], rel=1e-5)
    assert_close(weights, resumed["weights"])


def test_two_processes_go_on_where_one_was_and_divide_the_stream_as_it_did(on_two: OnTwo, even_shards: Path) -> None:
    weights, recorder = train_stream(iris_hf.from_hf(load(even_shards)), train_transform=to_noisy_tensor)
    assert on_two.results["even, begun by one"]["losses"] == pytest.approx(recorder.losses[3:], rel=1e-5)
    assert_close(on_two.results["even, begun by one"]["weights"], weights)


def test_a_resumed_run_says_how_its_stream_has_to_be_divided(on_two: OnTwo, shards: Path) -> None:
    newest = max(Path(on_two.runs["even interrupted"]["checkpoint_dir"] + "-copy").glob("step-*"))
    with pytest.raises(iris_hf.ConfigError, match=r"read its stream in 2 parts.*shards \(now 3\).*\(now 8 x 1\)"):
        train_stream(iris_hf.from_hf(load(shards)), resume=newest)
    with pytest.raises(iris_hf.ConfigError, match=r"num_examples was None, now 64; num_stream_parts was 2, now None"):
        train_stream(Tensors(), resume=newest, train_transform=None)


def test_a_resumed_run_says_that_its_stream_is_shuffled_otherwise(shards: Path, tmp_path: Path) -> None:
    train_stream(iris_hf.from_hf(load(shards, 6)), checkpoint_dir=tmp_path)
    train_stream(iris_hf.from_hf(load(shards, 6)), checkpoint_dir=tmp_path, resume="auto")
    for other in (load(shards, 7), load(shards, 6, shuffle_seed=None), load(shards)):
        with pytest.raises(iris_hf.ConfigError, match=r"stream_shuffled_by was '\w+', now '\w*'"):
            train_stream(iris_hf.from_hf(other), checkpoint_dir=tmp_path, resume="auto")


def test_two_processes_skip_the_same_examples_as_one(on_two: OnTwo, bad_shards: Path) -> None:
    weights, recorder = train_stream(iris_hf.from_hf(load(bad_shards)), on_bad_example="skip")
    assert on_two.results["bad"]["losses"] == pytest.approx(recorder.losses, rel=1e-5)
    assert_close(on_two.results["bad"]["weights"], weights)


def test_two_processes_predict_every_example_once_and_in_order(on_two: OnTwo, val_shards: Path) -> None:
    alone = iris_hf.predict(iris_hf.from_hf(load(val_shards)), Net(), to_tensor, batch_size=3)
    assert torch.equal(on_two.last["predictions"], alone.predictions)
    assert torch.equal(on_two.last["targets"], alone.targets)


def test_streams_that_processes_cannot_share_are_refused(on_two: OnTwo) -> None:
    split, shuffled = on_two.last["refused"]
    assert "train_dataset was split by node, and would be divided among the 2 processes once more" in split
    assert "train_dataset is shuffled in another order on each process" in shuffled
