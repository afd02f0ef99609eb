"""What checkpoints keep and hold, what a run refuses to go on from, and what it says where it does."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import Pairs, TwoTowers
from tiny import Dies, Net, Tensors, train_tiny

import iris_hf
from iris_hf.training import checkpoint
from iris_hf.training.buffers import mean_buffers
from iris_hf.training.checkpoint import open_checkpoint
from iris_hf.training.termination import Preempted, TerminationFlag

pytestmark = pytest.mark.torch_only


def steps_of(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(folder.glob("step-*"))]


class Terminates(iris_hf.Plugin):
    """Sends SIGTERM to this process at the end of the second epoch, or in its validation."""

    def __init__(self, hook: str) -> None:
        self.calls: list[str] = []

        def note(state: iris_hf.TrainState, *_: Any) -> None:
            self.calls.append(hook)
            if state.epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, hook, note)

    def on_epoch_end(self, state: iris_hf.TrainState) -> None: ...

    def on_validation_batch(self, state: iris_hf.TrainState, batch: Any) -> None: ...


@contextmanager
def terminated_at_once(flag: TerminationFlag, listening: Any = TerminationFlag.listening) -> Iterator[None]:
    """Listen as a run does, when SIGTERM has come between its start and its first step or validation."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with listening(flag):
            os.kill(os.getpid(), signal.SIGTERM)
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("hook", "calls"), [("on_epoch_end", 2), ("on_validation_batch", 2 + 1)])
def test_sigterm_does_not_wait_for_a_validation(
    hook: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"val_dataset": Tensors(16, seed=1), "plugins": ["ema(0.9, 0)", "log_summary"], "dropout": 0.3}
    terminates = Terminates(hook)
    before = signal.getsignal(signal.SIGTERM)
    try:
        plugins = [terminates, *settings["plugins"]]
        with pytest.raises(Preempted):
            train_tiny(**{**settings, "plugins": plugins}, checkpoint_dir=tmp_path, val_batch_size=8)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(terminates.calls) == calls  # of 2 epochs, of the 2 batches of the first validation and 1 more
    assert steps_of(tmp_path) == [8, 16]
    with monkeypatch.context() as patch:
        patch.setattr(TerminationFlag, "listening", terminated_at_once)
        with pytest.raises(Preempted):
            train_tiny(**settings, checkpoint_dir=tmp_path, resume="auto", val_batch_size=8)
    weights, resumed = train_tiny(**settings, checkpoint_dir=tmp_path, resume="auto", val_batch_size=8)
    whole, never = train_tiny(**settings, val_batch_size=8)
    assert resumed.val_losses == {epoch: never.val_losses[epoch] for epoch in (1, 2)}
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_a_run_that_a_plugin_ends_is_validated_although_sigterm_arrives(tmp_path: Path) -> None:
    class Stops(Terminates):
        def on_step_end(self, state: iris_hf.TrainState) -> None:
            if state.step == 12:
                state.request_stop("the time is up.")

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Preempted):
            train_tiny(val_dataset=Tensors(16), checkpoint_dir=tmp_path, plugins=[Stops("on_epoch_end")])
    finally:
        signal.signal(signal.SIGTERM, before)
    progress = open_checkpoint(tmp_path / "step-00000012").progress
    assert (progress.stop_reason, progress.is_validated) == ("the time is up.", True)


def test_buffers_of_ranks_are_averaged_where_all_have_them_alike() -> None:
    first = {"mean": torch.tensor([1.0]), "count": torch.tensor(1), "cache": torch.zeros(2), "own": torch.zeros(1)}
    second = {"late": torch.zeros(3), "cache": torch.ones(3), "count": torch.tensor(5), "mean": torch.tensor([2.0])}
    merged = mean_buffers([first, second])
    wanted = {"mean": [1.5], "count": 1, "cache": [0, 0], "own": [0]}
    assert {name: value.tolist() for name, value in merged.items()} == wanted


GROUPS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another part frozen": (
        {"plugins": ["freeze_modules('body')"]},
        {"plugins": ["freeze_modules('head')"]},
        "'head.weight' was in group 1, now not trained .so do 3 more",
    ),
    "nothing frozen": (
        {"plugins": ["freeze_modules('body')"]},
        {},
        "'body.1.weight' was not trained, now in group 1 .so do 1 more",
    ),
    "other groups": (
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "no_weight_decay_param_names": [".*bias"]},
        "'body.1.bias' was in group 1, now in group 2 .so do 1 more",
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_an_optimizers_state_never_goes_to_other_parameters(name: str, tmp_path: Path) -> None:
    first, then, message = GROUPS[name]
    settings = {"num_epochs": 1, "optimizer": "adamw", "checkpoint_dir": tmp_path}
    train_tiny(**settings, **first)
    with pytest.raises(iris_hf.ConfigError, match=f"belongs to another run: in the optimizer, the parameter {message}"):
        train_tiny(**settings, **then, resume="auto")


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rates": (
        {"lr_scale_param_names": [("head", 0.1)]},
        {"lr_scale_param_names": [("head", 0.5)]},
        "lr_scale_param_names was [['head', 0.1]], now [['head', 0.5]]",
    ),
    "decay": (
        {"weight_decay": 0.1, "no_weight_decay_param_names": ["body"]},
        {"weight_decay": 0.1, "no_weight_decay_param_names": ["head"]},
        "no_weight_decay_param_names was ['body'], now ['head']",
    ),
    "arguments": (
        {"plugins": ["clip_grad_norm(1)"]},
        {"plugins": ["clip_grad_norm(max_norm=0.5)"]},
        "plugin ClipGradNorm 1 was {'max_norm': 1}, now {'max_norm': 0.5}",
    ),
    "plugin left out": ({"plugins": ["ema(0.9, 0)"]}, {}, "without plugins whose state it had: EMA 1"),
    "plugin added": ({}, {"plugins": ["ema(0.5, 0)"]}, "plugin EMA 1 was absent, now {'decay': 0.5, "),
    "precision": ({"plugins": ["amp('bf16')"]}, {}, "precision was 'bf16', now 'no'"),
    "watching": ({"plugins": ["progressbar"]}, {"plugins": ["log_summary"]}, ""),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_changes_on_the_way_counts_and_is_said(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Groups(iris_hf.Plugin):
        def on_epoch_start(self, state: iris_hf.TrainState) -> None:
            self.found = [(group["lr"], group["weight_decay"]) for group in state.optimizer.param_groups]

    first, then, message = SETTINGS[name]
    resumed, fresh = Groups(), Groups()
    train_tiny(**first, num_epochs=2, checkpoint_dir=tmp_path, checkpoint_epochs=1, optimizer="adamw")
    caplog.clear()
    settings = {**then, "num_epochs": 2, "optimizer": "adamw"}
    plugins = then.get("plugins", [])
    train_tiny(**{**settings, "plugins": [*plugins, resumed]}, resume=tmp_path / "step-00000008")
    assert (message in caplog.text) if message else not caplog.records
    train_tiny(**{**settings, "plugins": [*plugins, fresh]})
    assert resumed.found == fresh.found


def test_an_epoch_has_the_examples_that_it_had(tmp_path: Path) -> None:
    settings = {"num_examples": 61, "num_epochs": 1, "checkpoint_dir": tmp_path}
    train_tiny(**settings, batch_size=8, accumulate_grad_batches=2)
    with pytest.raises(iris_hf.ConfigError, match="examples_per_epoch was 56, now 60"):
        train_tiny(**settings, batch_size=4, accumulate_grad_batches=4, resume="auto")


def test_a_death_while_the_checkpoint_of_a_step_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"val_dataset": Tensors(16, seed=1), "checkpoint_dir": tmp_path, "num_epochs": 2, "keep_checkpoints": 1}
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Preempted):  # leaves the checkpoint of a step that is not validated yet
            train_tiny(**settings, plugins=[Terminates("on_epoch_end")])
    finally:
        signal.signal(signal.SIGTERM, before)
    rename = Path.rename

    def dies(path: Path, target: Path) -> Path:
        if path.name == ".partial-step-00000016":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(**settings, resume="auto")
    monkeypatch.undo()
    _, recorder = train_tiny(**settings, resume="auto")
    assert (recorder.steps, list(recorder.val_losses)) == ([], [1])
    assert steps_of(tmp_path)[-1] == 16
    assert not list(tmp_path.glob(".*"))


def test_folders_of_others_beside_checkpoints_are_left_alone(tmp_path: Path) -> None:
    settings = {"checkpoint_dir": tmp_path, "keep_checkpoints": 1}
    others = ("step-00000008-mine", "step-good", "step-7")

    class Copies(iris_hf.Plugin):
        def on_epoch_start(self, state: iris_hf.TrainState) -> None:
            if state.epoch == 1:
                for name in others:
                    shutil.copytree(tmp_path / "step-00000008", tmp_path / name)

    train_tiny(**settings, plugins=[Copies()])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "step-00000024"])
    _, recorder = train_tiny(**settings, resume="auto")
    assert recorder.steps == []


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder one that this process cannot write to, as root neither."""
    is_root = os.geteuid() == 0
    mode = folder.stat().st_mode
    os.chmod(folder, 0o555)
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        os.chmod(folder, mode)


def test_a_finished_run_is_resumed_from_where_nobody_can_write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        weights, _ = train_tiny(checkpoint_dir=folder, num_epochs=1)
        for path in (Path(folder), *Path(folder).rglob("*")):
            os.chmod(path, 0o755)
        with read_only(Path(folder)):
            again, _ = train_tiny(checkpoint_dir=folder, num_epochs=1, resume="auto")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("division", [{}, {"sub_batch_size": 3}])
def test_a_loss_of_a_whole_micro_batch_keeps_its_examples(division: dict[str, int], tmp_path: Path) -> None:
    task = iris_hf.train_with_gradient_cache if division else iris_hf.train
    settings = {"num_epochs": 1, "random_seed": 0, "num_dataloader_workers": 0, **division}
    task(TwoTowers(), Pairs(16), None, **settings, batch_size=8, checkpoint_dir=tmp_path)
    settings |= {"batch_size": 4, "accumulate_grad_batches": 2, "resume": "auto", "checkpoint_dir": tmp_path}
    with pytest.raises(iris_hf.ConfigError, match=r"examples_per_micro_batch was 8, now 4\. .* in a micro-batch\. To"):
        task(TwoTowers(), Pairs(16), None, **settings)


def test_a_mean_over_examples_may_be_divided_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"num_epochs": 2, "checkpoint_dir": tmp_path}
    train_tiny(**settings)
    shutil.rmtree(tmp_path / "step-00000016")
    train_tiny(**settings, batch_size=4, accumulate_grad_batches=2, resume="auto")
    assert "examples_per_micro_batch was 8, now 4" in caplog.text


def test_other_sub_batches_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"num_epochs": 1, "batch_size": 8, "random_seed": 0, "num_dataloader_workers": 0}
    for size, resume in ((3, None), (4, "auto")):
        settings |= {"sub_batch_size": size, "resume": resume, "checkpoint_dir": tmp_path}
        iris_hf.train_with_gradient_cache(TwoTowers(), Pairs(16), None, **settings)
    assert "other settings than before: sub_batch_size was 3, now 4." in caplog.text


@pytest.mark.parametrize("interval", [{"checkpoint_steps": 3}, {"checkpoint_epochs": 3}])
def test_the_best_is_kept_also_between_the_intervals(interval: dict[str, int], tmp_path: Path) -> None:
    settings = {**interval, "base_lr": 3.0, "num_epochs": 8, "val_dataset": Tensors(16, seed=1)}
    _, recorder = train_tiny(**settings, checkpoint_dir=tmp_path)
    best = min(recorder.val_losses, key=recorder.val_losses.__getitem__)
    kept = {open_checkpoint(folder).progress for folder in tmp_path.glob("step-*")}
    assert (best + 1) * 8 in {progress.step for progress in kept if progress.is_validated}
    assert {progress.best_val_loss for progress in kept if progress.step >= (best + 1) * 8} == {
        recorder.val_losses[best]
    }


def test_checkpoints_of_another_run_do_not_count(tmp_path: Path) -> None:
    train_tiny(num_epochs=1, checkpoint_dir=tmp_path / "a", num_examples=32)
    train_tiny(num_epochs=1, checkpoint_dir=tmp_path / "b")
    with pytest.raises(iris_hf.ConfigError, match="a' holds the checkpoints of another run"):
        train_tiny(num_epochs=1, checkpoint_dir=tmp_path / "a", resume=tmp_path / "b" / "step-00000008")
    assert steps_of(tmp_path / "a") == [4]


def test_a_run_that_a_plugin_ended_says_so_when_it_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Limit(iris_hf.Plugin):
        def on_step_end(self, state: iris_hf.TrainState) -> None:
            if state.step == 3:
                state.request_stop("the time is up.")

    train_tiny(checkpoint_dir=tmp_path, plugins=[Limit()])
    _, recorder = train_tiny(checkpoint_dir=tmp_path, plugins=[Limit()], resume="auto")
    assert recorder.steps == []
    assert "step-00000003 is the end of its run, at step 3: the time is up. Nothing is left to train." in caplog.text


class Growing(Net):
    """Makes a buffer, may resize a second one, and counts beside its buffers; all of it shapes the steps."""

    def __init__(self, *, resizes: bool = False) -> None:
        super().__init__()
        self.resizes = resizes
        self.count = 0
        self.register_buffer("seen", torch.zeros(0), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            if not hasattr(self, "made"):
                self.register_buffer("made", torch.zeros(()), persistent=False)
            self.made += images.mean()
            if self.resizes:
                self.seen = torch.cat([self.seen, images.mean()[None]])
            self.count += 1
            return super().forward(images) * (1 + self.made + self.seen.sum() + self.count) / 100
        return super().forward(images)

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize(("resizes", "plugins"), [(True, []), (False, ["ema(0.9, 0)"])])
def test_what_a_model_makes_on_its_way_is_resumed_to_the_byte(
    resizes: bool, plugins: list[str], tmp_path: Path
) -> None:
    settings = {"num_epochs": 2, "batch_size": 8, "base_lr": 0.1, "random_seed": 0, "num_dataloader_workers": 0}
    settings |= {"plugins": plugins}
    never = iris_hf.train(Growing(resizes=resizes), Tensors(32), None, **settings, checkpoint_dir=tmp_path).model
    settings |= {"resume": tmp_path / "step-00000004"}
    resumed = iris_hf.train(Growing(resizes=resizes), Tensors(32), None, **settings).model
    assert (resumed.count, len(resumed.seen)) == (8, 8 if resizes else 0)
    wanted = dict(never.named_buffers()) | never.state_dict()
    got = dict(resumed.named_buffers()) | resumed.state_dict()
    assert got.pop("_extra_state") == wanted.pop("_extra_state")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert resumed.state_dict().keys() == never.state_dict().keys()


def test_buffers_of_another_model_are_refused(tmp_path: Path) -> None:
    settings = {"num_epochs": 1, "batch_size": 8, "random_seed": 0}
    iris_hf.train(Growing(), Tensors(32), None, **settings, checkpoint_dir=tmp_path)
    with pytest.raises(iris_hf.DataError, match="extra states are not this model's: model differ"):
        iris_hf.train(Net(), Tensors(32), None, **settings, resume=tmp_path / "step-00000004")


def test_a_resumed_run_reads_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_tiny(num_epochs=1, checkpoint_dir=tmp_path)
    files: list[Path] = []
    read = checkpoint.read_state
    monkeypatch.setattr(checkpoint, "read_state", lambda file: (files.append(file), read(file))[1])
    train_tiny(num_epochs=1, checkpoint_dir=tmp_path, resume="auto")
    assert sorted(file.name for file in files) == [
        "model.safetensors",
        "optimizer.safetensors",
        "rank-0000.safetensors",
    ]


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    class Measures(iris_hf.Plugin):
        def validation_metrics(self, state: iris_hf.TrainState) -> dict[str, float]:
            return {"half": np.float32(0.5)}  # type: ignore[dict-item]  # as metrics come

        def state_dict(self) -> dict[str, Any]:
            return {"flag": np.bool_(True), "count": np.int64(3)}

    settings = {"num_epochs": np.int64(1), "batch_size": np.int64(8), "base_lr": np.float32(0.1)}
    settings |= {"random_seed": np.int64(3), "plugins": [Measures()], "val_dataset": Tensors(8)}
    train_tiny(**settings, checkpoint_dir=tmp_path)
    own = open_checkpoint(tmp_path / "step-00000008").of_rank(0)
    assert own["plugins"] == {"Measures 1": {"flag": True, "count": 3}}
    assert own["val_metrics"] == {"half": 0.5}
    train_tiny(**settings, checkpoint_dir=tmp_path, resume="auto")


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_first_step() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        read_only(Path(folder)),
        pytest.raises(iris_hf.DataError, match=r"checkpoint_dir=.* cannot be used: .*Permission denied"),
    ):
        train_tiny(checkpoint_dir=folder, plugins=[Dies(1)])


def test_save_best_deletes_no_checkpoints(tmp_path: Path) -> None:
    for checkpoint_dir in (tmp_path / "a", tmp_path / "b" / "checkpoints"):
        best = f"save_best({str(tmp_path / checkpoint_dir.relative_to(tmp_path).parts[0])!r})"
        with pytest.raises(iris_hf.ConfigError, match=r"would hold the checkpoints of .* such as '.*best'"):
            train_tiny(checkpoint_dir=checkpoint_dir, plugins=[best], val_dataset=Tensors(8))
    inside = f"save_best({str(tmp_path / 'c' / 'best')!r})"
    train_tiny(checkpoint_dir=tmp_path / "c", plugins=[inside], val_dataset=Tensors(8))
    assert (tmp_path / "c" / "best" / "best.json").is_file()
    assert steps_of(tmp_path / "c")


def test_save_best_deletes_nothing_that_others_have_added_since_its_last_run(tmp_path: Path) -> None:
    settings = {"plugins": [f"save_best({str(tmp_path)!r})"], "val_dataset": Tensors(8), "num_epochs": 1}
    train_tiny(**settings)
    train_tiny(**settings)  # replaces what it has written itself
    (tmp_path / "evaluation.json").touch()
    with pytest.raises(
        iris_hf.ConfigError, match=r"holds other things: evaluation\.json\. Give it a folder of its own"
    ):
        train_tiny(**settings)
    assert (tmp_path / "evaluation.json").is_file()


def test_save_best_deletes_nothing_that_others_have_put_beside_it(tmp_path: Path) -> None:
    class Writes(iris_hf.Plugin):
        def on_epoch_end(self, state: iris_hf.TrainState) -> None:
            if state.epoch == 1:
                (tmp_path / "notes").touch()

    with pytest.raises(iris_hf.ConfigError, match=r"now holds other things: notes\. Give it a folder of its own"):
        train_tiny(plugins=[Writes(), f"save_best({str(tmp_path)!r})"], val_dataset=Tensors())
    assert (tmp_path / "notes").is_file()
    assert (tmp_path / "best.json").is_file()


def test_save_best_killed_between_its_renames_has_the_new_model_in_place_at_the_next_start(tmp_path: Path) -> None:
    best, new, old = (tmp_path / name for name in ("best", ".best-new", ".best-old"))
    settings = {"plugins": [f"save_best({str(best)!r})"], "val_dataset": Tensors(8), "num_epochs": 1}
    train_tiny(**settings)
    before = best.rename(tmp_path / "before")
    train_tiny(**settings, random_seed=5)
    written = {file.name: file.read_bytes() for file in best.iterdir()}
    best.rename(new)
    before.rename(old)
    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(**{**settings, "plugins": [*settings["plugins"], Dies(1)]})
    assert {file.name: file.read_bytes() for file in best.iterdir()} == written
    assert list(tmp_path.iterdir()) == [best]
