"""Killed and resumed is the same as never stopped, to the byte; damaged checkpoints are passed over."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import environment, run_python, torchrun
from tiny import train_tiny

import iris_hf
from iris_hf.training.checkpoint import open_checkpoint
from iris_hf.training.storage import read_state, write_state
from iris_hf.training.termination import PREEMPTED

pytestmark = pytest.mark.torch_only

SCRIPT = str(Path(__file__).with_name("resume_run.py"))


def run(out: Path, arguments: dict[str, Any], num_processes: int = 1) -> int:
    command = (SCRIPT, str(out), json.dumps(arguments))
    done = run_python(*command) if num_processes == 1 else torchrun(num_processes, *command)
    print(done.stderr)  # shown where the test fails
    if done.returncode == 0:
        assert out.exists()
    return done.returncode


def assert_equal(got: dict[str, Any], wanted: dict[str, Any], *, rtol: float = 0, atol: float = 0) -> None:
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=rtol, atol=atol)


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (
        1,
        {
            "random_seed": 0,
            "checkpoint_steps": 3,
            "num_dataloader_workers": 2,
            "accumulate_grad_batches": 2,
            "val_check_interval_epoch": 2,
        },
    ),
    "alone, seed drawn, with a cache": (1, {"checkpoint_steps": 3, "cache": True, "sub_batch_size": 3}),
    "two processes": (2, {"random_seed": 0, "checkpoint_steps": 3, "batch_size": 4}),
    "two processes, sharded": (
        2,
        {
            "random_seed": 0,
            "checkpoint_steps": 3,
            "batch_size": 4,
            "optimizer": "zero_adam",
            "cache": True,
            "sub_batch_size": 2,
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_ends_with_the_bytes_of_one_never_stopped(name: str, tmp_path: Path) -> None:
    num_processes, arguments = RUNS[name]
    killed = {**arguments, "checkpoint_dir": str(tmp_path / "killed"), "resume": "auto"}
    assert run(tmp_path / "out", {**killed, "die_at": 5}, num_processes) != 0
    assert not (tmp_path / "out").exists()
    newest = open_checkpoint(sorted((tmp_path / "killed").glob("step-*"))[-1])
    assert newest.progress.step == 3  # in the middle of an epoch
    assert run(tmp_path / "resumed", killed, num_processes) == 0
    whole = {**arguments, "random_seed": newest.facts.random_seed, "checkpoint_dir": str(tmp_path / "whole")}
    assert run(tmp_path / "never", whole, num_processes) == 0
    resumed, never = torch.load(tmp_path / "resumed"), torch.load(tmp_path / "never")
    assert_equal(resumed, never)
    first = newest.progress.step
    assert resumed["losses"] == never["losses"][first:]
    assert resumed["steps"] == never["steps"][first:]
    assert resumed["val_losses"] == {e: v for e, v in never["val_losses"].items() if e in resumed["val_losses"]}


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_on_another_number_of_processes(first: int, then: int, tmp_path: Path) -> None:
    arguments = {"random_seed": 0, "checkpoint_steps": 3, "with_random_parts": False}
    folder = str(tmp_path / "checkpoints")

    def on(num_processes: int) -> dict[str, Any]:
        return {**arguments, "batch_size": 8 // num_processes, "checkpoint_dir": folder, "resume": "auto"}

    assert run(tmp_path / "out", {**on(first), "die_at": 5}, first) != 0
    assert run(tmp_path / "out", on(then), then) == 0
    assert run(tmp_path / "never", {**arguments, "checkpoint_dir": str(tmp_path / "whole")}) == 0
    resumed, never = torch.load(tmp_path / "out"), torch.load(tmp_path / "never")
    assert resumed["steps"] == never["steps"][3:]
    assert resumed["learning_rates"] == never["learning_rates"][3:]
    assert resumed["losses"] == pytest.approx(never["losses"][3:], rel=1e-5)
    assert_equal(resumed, never, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_processes", "step"), [(1, 2), (2, 7)], ids=["alone", "two processes, in a validation"])
def test_sigterm_writes_a_checkpoint_and_ends_with_its_own_code(
    num_processes: int, step: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"random_seed": 0, "checkpoint_dir": str(tmp_path / "c"), "batch_size": 4, "resume": "auto"}
    code = run(tmp_path / "out", {**arguments, "terminate_at": step, "val_batch_size": 1}, num_processes)
    num_validated = capsys.readouterr().out.count("a batch of the validation")
    assert num_validated == 0 if num_processes == 1 else 0 < num_validated < 7  # of the process that got no signal
    assert code == PREEMPTED if num_processes == 1 else code != 0  # torchrun has a code of its own
    (folder,) = (tmp_path / "c").glob("step-*")
    progress = open_checkpoint(folder).progress
    assert (progress.step, progress.epoch, progress.is_validated) == (step, 0, False)
    if num_processes == 1:
        assert run(tmp_path / "out", arguments) == 0
        assert run(tmp_path / "never", {**arguments, "checkpoint_dir": str(tmp_path / "whole")}) == 0
        assert_equal(torch.load(tmp_path / "out"), torch.load(tmp_path / "never"))


def test_sigterm_to_a_whole_process_group_writes_a_checkpoint(tmp_path: Path) -> None:
    arguments = {
        "random_seed": 0,
        "checkpoint_dir": str(tmp_path / "c"),
        "num_dataloader_workers": 2,
        "num_epochs": 500,
    }
    command = [sys.executable, SCRIPT, str(tmp_path / "out"), json.dumps({**arguments, "checkpoint_epochs": 1})]
    process = subprocess.Popen(command, env=environment(), start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "c").glob("step-*")) and process.poll() is None:
        time.sleep(0.05)  # until it runs
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED, stderr
    assert "SIGTERM: the checkpoint of step" in stderr


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.glob("step-*"))]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    from tiny import Tensors

    _, recorder = train_tiny(
        num_epochs=8, base_lr=3.0, val_dataset=Tensors(16, seed=1), checkpoint_dir=tmp_path, keep_checkpoints=2
    )
    best = min(recorder.val_losses, key=recorder.val_losses.__getitem__)
    assert steps_of(tmp_path) == sorted({(best + 1) * 8, 56, 64})
    assert not list(tmp_path.glob(".*"))


def test_a_finished_run_resumes_to_what_it_was(tmp_path: Path) -> None:
    weights, _ = train_tiny(checkpoint_dir=tmp_path)
    again, recorder = train_tiny(checkpoint_dir=tmp_path, resume="auto")
    assert recorder.steps == []
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "info"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights, _ = train_tiny(checkpoint_dir=tmp_path, keep_checkpoints=3)
    newest = tmp_path / "step-00000024"
    file = newest / ("checkpoint.json" if damage == "info" else "optimizer.safetensors")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-5] if damage in ("cut", "info") else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(iris_hf.DataError, match=r"step-00000024"):
        train_tiny(resume=newest)
    again, recorder = train_tiny(checkpoint_dir=tmp_path, resume="auto")
    assert "Passing over a damaged checkpoint" in caplog.text
    assert recorder.steps[0] == 17
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert (tmp_path / "aside-step-00000024").is_dir()


def test_wrong_configurations_say_what_is_wrong(tmp_path: Path) -> None:
    train_tiny(checkpoint_dir=tmp_path, num_epochs=1)
    checkpoint = tmp_path / "step-00000008"
    for change, message in (
        ({"checkpoint_dir": tmp_path}, "holds the checkpoints of another run"),
        ({"resume": checkpoint, "num_epochs": 2}, "num_epochs was 1, now 2"),
        ({"resume": checkpoint, "num_epochs": 1, "random_seed": 5}, "random_seed was 0, now 5"),
        ({"resume": checkpoint, "num_epochs": 1, "batch_size": 4}, "examples_per_step was 8, now 4"),
        ({"resume": checkpoint, "num_epochs": 1, "optimizer": "adam"}, "optimizer was 'sgd', now 'adam'"),
        ({"resume": checkpoint, "num_epochs": 1, "weight_decay": 0.5}, "weight_decay was 0, now 0.5"),
        ({"resume": checkpoint, "num_epochs": 1, "base_lr": 1.0}, r"base_lr was 0\.1, now 1\.0"),
        ({"resume": checkpoint, "num_epochs": 1, "lr_scheduler": {"name": "linear"}}, "lr_scheduler was"),
        ({"random_seed": 1.5}, r"random_seed must be a whole number, got 1\.5"),
        ({"num_dataloader_workers": 0.5}, r"num_dataloader_workers must be a whole number, got 0\.5"),
        ({"resume": True}, "resume must be 'auto' or the folder of a checkpoint, or None; got True"),
        ({"checkpoint_dir": ""}, "checkpoint_dir must be a folder, or None; got ''"),
        ({"resume": "auto"}, "resume='auto' looks into checkpoint_dir"),
        ({"checkpoint_steps": 5}, "checkpoint_steps=5 needs a checkpoint_dir"),
        ({"checkpoint_dir": tmp_path / "new", "checkpoint_steps": 0}, "checkpoint_steps must be at least 1, got 0"),
        ({"checkpoint_dir": tmp_path / "new", "keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
    ):
        with pytest.raises(iris_hf.ConfigError, match=message):
            train_tiny(**change)
    for resume, message in (("Auto", ": .*No such file.* resume='auto' goes on"), (tmp_path, "holds 'step-00000008'")):
        with pytest.raises(iris_hf.DataError, match=f"is no complete checkpoint.*{message}"):
            train_tiny(resume=resume)


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    state = {
        "a": [1, 2.5, None, True, "x", (1e-300, float("inf"))],
        7: {"t": torch.tensor(3, dtype=torch.int64), "half": torch.rand(2, 2).half(), "view": shared[1:], "s": shared},
    }
    write_state(state, tmp_path / "s")
    back = read_state(tmp_path / "s")
    assert back["a"] == state["a"]
    assert all(torch.equal(back[7][name], value) for name, value in state[7].items())
    with pytest.raises(iris_hf.ConfigError, match=r"state\['x'\]\[0\] is a set"):
        write_state({"x": [{1}]}, tmp_path / "t")


def test_a_full_disk_is_an_error_that_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    code = (
        "import resource, sys, tiny, iris_hf\n"
        "class Fill(iris_hf.Plugin):\n"
        "    def on_epoch_start(self, state):\n"
        "        if state.epoch == 1:\n"
        "            resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "tiny.train_tiny(checkpoint_dir=sys.argv[1], plugins=[Fill()])\n"
    )
    done = run_python("-c", code, str(tmp_path))
    assert done.returncode == 1
    assert "The checkpoint of step 16 cannot be written to" in done.stderr
    assert "earlier ones are as they were: " in done.stderr
    assert "Make room" in done.stderr
    assert steps_of(tmp_path) == [8]
    assert open_checkpoint(tmp_path / "step-00000008").progress.step == 8
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000008"]


def test_a_checkpoint_dir_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(iris_hf.DataError, match=r"checkpoint_dir=.*file/c' cannot be used"):
        train_tiny(checkpoint_dir=tmp_path / "file" / "c")


class Server:
    """Starts runs without importing torch each time; see resume_server.py."""

    def __init__(self, log: Path) -> None:
        self.log = log
        script = Path(__file__).with_name("resume_server.py")
        with open(log, "w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, str(script)],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def ask(self, command: Any) -> list[int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer: list[int] = json.loads(self.process.stdout.readline())
        return answer

    def run(self, out: Path, arguments: dict[str, Any], num_processes: int) -> None:
        self.ask({"out": str(out), "arguments": arguments, "num_processes": num_processes})
        assert self.ask("wait") == [0] * num_processes, self.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "log")
    with server.process:  # closes its standard input, at which it ends
        yield server


KILLS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "alone, loader workers": (8, 1, {"num_dataloader_workers": 2, "accumulate_grad_batches": 2}),
    "alone, with a cache": (7, 1, {"cache": True, "sub_batch_size": 3}),
    "two processes": (8, 2, {"batch_size": 4, "accumulate_grad_batches": 2}),
    "two processes, sharded, loader workers": (
        7,
        2,
        {"batch_size": 4, "num_dataloader_workers": 2, "optimizer": "zero_adam"},
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", KILLS)
def test_kills_at_random_moments_change_no_byte(name: str, server: Server, tmp_path: Path) -> None:
    num_kills, num_processes, own = KILLS[name]
    arguments = {"random_seed": 0, "checkpoint_steps": 1, "num_epochs": 30, "plugins": ["ema(0.9, 3)"], **own}
    folder = tmp_path / "killed"
    killed = {**arguments, "checkpoint_dir": str(folder), "resume": "auto"}
    random_moment = random.Random(name)
    steps = [0]
    for _ in range(num_kills):
        ranks = server.ask({"out": str(tmp_path / "out"), "arguments": killed, "num_processes": num_processes})
        while max(steps_of(folder), default=0) <= steps[-1]:
            time.sleep(0.001)  # until it has gone on
        time.sleep(random_moment.uniform(0, 0.3))
        for rank in ranks:
            os.killpg(rank, signal.SIGKILL)
        assert server.ask("wait") == [-signal.SIGKILL] * num_processes
        newest = open_checkpoint(sorted(folder.glob("step-*"))[-1])  # each can be loaded
        steps.append(newest.progress.step)
    assert steps == sorted(set(steps))
    server.run(tmp_path / "out", killed, num_processes)
    server.run(tmp_path / "never", {**arguments, "checkpoint_steps": None}, num_processes)
    assert_equal(torch.load(tmp_path / "out"), torch.load(tmp_path / "never"))
    assert not list(folder.glob(".*"))
