"""Jobs under torchrun: side effects once, training and prediction by all, errors on every rank."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from launching import torchrun
from tiny import Net, Tensors
from tiny_jobs import TRAIN, note, tiny_job

import iris_hf

RANK = Path(__file__).parent / "job_rank.py"


def launch_job(
    folder: Path, job: dict[str, Any], *arguments: str, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    return torchrun(2, str(RANK), *before, "run", str(file), *arguments)


def test_side_effects_happen_once_in_each_of_two_runs_and_training_is_that_of_one_process(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    job = tiny_job(notes, random_seed=0, batch_size="$env.BATCH")
    job["tasks"].append(
        {
            "task": "save_state_dict",
            "inputs": {"model": "$output.train.model"},
            "config": {"path": str(tmp_path / "weights")},
        }
    )
    done = launch_job(tmp_path, job, "-e", "BATCH=4", before=("--twice",))
    assert done.returncode == 0, done.stderr
    data = Tensors(32)  # the main process's: rank 1 would have made others
    expected = iris_hf.train(Net(), data, None, **TRAIN, random_seed=0).model
    result = iris_hf.predict(data, expected, batch_size=8, num_dataloader_workers=0)
    accuracy = iris_hf.evaluate_accuracy(result.predictions, result.targets)
    assert notes.read_text() == f"0 accuracy {accuracy}\n" * 2
    weights = torch.load(tmp_path / "weights", weights_only=True)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)


def exits(done: subprocess.CompletedProcess[str]) -> dict[int, int]:
    """Exit code by rank, as the ranks print them."""
    return {int(rank): int(code) for rank, code in re.findall(r"^rank (\d) exits (\d)", done.stdout, re.MULTILINE)}


def test_an_error_in_training_is_told_on_every_rank_after_on_error_ran_once(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    job = tiny_job(notes, lr_scheduler={"name": "multistep"})
    job["on_error"] = [note(notes, "cleaned")]
    done = launch_job(tmp_path, job)
    assert done.returncode != 0
    assert exits(done) == {0: 2, 1: 2}, done.stderr
    assert notes.read_text() == "0 cleaned None\n"
    assert done.stderr.count("iris-hf: error: lr_scheduler 'multistep' needs decay_milestones") == 2
    assert done.stderr.count("In the task 'train'.") >= 2


def test_an_error_of_another_task_ends_every_rank(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "no" / "folder")
    done = launch_job(tmp_path, job)
    assert exits(done) == {0: 1, 1: 1}, done.stderr
    assert done.stderr.count("iris-hf: error: FileNotFoundError") == 2


def test_a_wrong_job_is_told_on_every_rank(tmp_path: Path) -> None:
    done = launch_job(tmp_path, tiny_job(tmp_path / "notes", num_epochs="many"))
    assert exits(done) == {0: 2, 1: 2}, done.stderr
    assert done.stderr.count("Task 'train': the config field 'num_epochs' takes int, got 'many'") == 2
    assert not (tmp_path / "notes").exists()


def test_an_error_on_one_rank_ends_the_job(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "notes", plugins=["heartbeat"])
    done = torchrun(2, str(RANK), "--break-rank", "1", "run", str(write(tmp_path, job)))
    assert done.returncode != 0
    assert "RuntimeError: broken on this rank only" in done.stderr
    assert not (tmp_path / "notes").exists()


def write(folder: Path, job: dict[str, Any]) -> Path:
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    return file
