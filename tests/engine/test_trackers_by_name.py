"""wandb, trackio, mlflow and comet, each offline: what they were sent, read back from what they wrote.

They run where they are installed: pip install "iris-hf[trackers]".
"""

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import tracker_run
from launching import run_python
from tiny import Recorder, train_tiny

from iris_hf.training.termination import PREEMPTED

DIES_AT = 14
LAST_CHECKPOINT = 10


def run(what: str, name: str, folder: Path, argument: str) -> tuple[int, str]:
    done = run_python(tracker_run.__file__, what, name, str(folder), argument)
    return done.returncode, done.stdout + done.stderr


def read(name: str, folder: Path) -> dict[str, Any]:
    out = folder.with_suffix(".json")
    code, said = run("read", name, folder, str(out))
    assert code == 0, said
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def by_step(found: dict[str, Any], metric: str) -> dict[int, float]:
    """The last value of every step."""
    return {int(step): values[-1] for step, values in found["metrics"][metric].items()}


@pytest.fixture(scope="module")
def expected() -> Recorder:
    recorder: Recorder = train_tiny(
        **tracker_run.SETTINGS, optimizer="adam", lr_scheduler={"name": "linear_decreasing"}
    )[1]
    return recorder


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow", "comet_ml"])
def test_a_tracker_has_every_number_of_an_interrupted_run_in_one_run(
    name: str, tmp_path: Path, expected: Recorder
) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install iris-hf[trackers]")
    folder = tmp_path / "run"
    code, said = run("train", name, folder, str(DIES_AT))
    assert code == 1
    assert "power cut" in said
    if name in ("wandb", "mlflow"):
        assert read(name, folder)["status"] == [{"wandb": 1, "mlflow": "FAILED"}[name]]
    code, said = run("train", name, folder, "0")
    assert code == 0, said
    found = read(name, folder)

    assert len(found["runs"]) == 1
    if name in ("wandb", "mlflow"):
        assert found["status"] == {"wandb": [1, 0], "mlflow": ["FINISHED"]}[name]
    intervals = [(0, 3), (3, 6), (6, 8), (8, 9), (9, 12), (12, 15), (15, 16)]  # every third step, and the epoch's end
    losses = {end: sum(expected.losses[start:end]) / (end - start) for start, end in intervals}
    assert by_step(found, "loss") == pytest.approx(losses)
    rates = {end: expected.learning_rates[end - 1] for _, end in intervals}
    assert by_step(found, "learning_rate") == pytest.approx(rates)
    assert by_step(found, "val_loss") == pytest.approx({8: expected.val_losses[0], 16: expected.val_losses[1]})
    assert {step for step, value in by_step(found, "undefined").items() if math.isnan(value)} == {8, 16}
    for metric in ("examples_per_second", "peak_host_memory_mib"):
        assert set(by_step(found, metric)) == set(losses)
        assert all(value > 0 for value in by_step(found, metric).values())
    again = Counter({int(step): len(values) for step, values in found["metrics"]["loss"].items()})
    assert {step for step, count in again.items() if count > 1} <= {12}  # sent between the checkpoint and the end

    parameters = {key: str(value) for key, value in found["parameters"].items()}
    wanted = {"optimizer": "Adam", "optimizer/betas": "0.9, 0.999", "base_lr": "0.1", "batch_size": "8"}
    wanted |= {"lr_scheduler/name": "linear_decreasing", "random_seed": "0", "model": "Net", "num_processes": "1"}
    assert wanted.items() <= parameters.items()
    assert "NotANumber" in parameters["plugins"]

    assert {int(step) for step in found["pictures"]} == {8, 16}
    for (file,) in found["pictures"].values():
        with PIL.Image.open(file) as picture:
            assert picture.width > 300
            assert len(picture.convert("L").getcolors() or []) > 20


@pytest.mark.parametrize(("first", "second"), [("wandb", "mlflow"), ("mlflow", "wandb")])
def test_a_preempted_run_is_marked_as_such_and_a_resume_with_another_tracker_is_a_new_run(
    first: str, second: str, tmp_path: Path
) -> None:
    for name in (first, second):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install iris-hf[trackers]")
    folder = tmp_path / "run"
    code, said = run("preempt", first, folder, "")
    assert code == PREEMPTED, said
    assert read(first, folder)["status"] == [{"wandb": PREEMPTED, "mlflow": "KILLED"}[first]]
    code, said = run("train", second, folder, "0")
    assert code == 0, said
    assert f"was sent to {first}: a new run begins in {second}" in said
    assert read(second, folder)["status"] == [{"wandb": 0, "mlflow": "FINISHED"}[second]]
    assert len(read(first, folder)["runs"]) == 1
