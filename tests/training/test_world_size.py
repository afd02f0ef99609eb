"""Two processes equal one: real ones, started by torchrun and by `num_processes`."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_ranks, torchrun
from tiny import Net, NormNet, Recorder, Tensors, noisy, train_tiny

import iris_hf
from iris_hf.engine.loader import EpochBatches

pytestmark = pytest.mark.torch_only

RUNS: list[dict[str, Any]] = [
    # 61 examples do not divide by anything here
    {"batch_size": 8, "num_examples": 61, "val_examples": 13, "val_batch_size": 3, "noisy": True},
    {"batch_size": 4, "accumulate_grad_batches": 3, "num_examples": 61, "optimizer": "zero_adamw", "base_lr": 1e-2},
    {"batch_size": 8, "accumulate_grad_batches": 2, "num_examples": 64, "plugins": ["clip_grad_norm(0.05)"]},
]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("world") / "out.pt"
    script = str(Path(__file__).with_name("rank.py"))
    done = run_ranks(2, script, str(out), *(json.dumps({**run, "batch_size": run["batch_size"] // 2}) for run in RUNS))
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def on_one(run: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
    run = dict(run)
    if run.pop("noisy", False):
        run["train_transform"] = noisy
    if "val_examples" in run:
        run["val_dataset"] = Tensors(run.pop("val_examples"), seed=1)
    return train_tiny(**run)


@pytest.mark.parametrize("index", range(len(RUNS)))
def test_two_processes_take_the_same_steps_as_one(on_two: list[dict[str, Any]], index: int) -> None:
    weights, recorder = on_one(RUNS[index])
    two = on_two[index]
    assert two["learning_rates"] == recorder.learning_rates
    assert two["losses"] == pytest.approx(recorder.losses, rel=1e-5)
    assert two["val_losses"] == pytest.approx(recorder.val_losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-6)


def test_thirteen_examples_on_two_processes_come_once_each_and_in_order(on_two: list[dict[str, Any]]) -> None:
    alone = iris_hf.predict(Tensors(13), Net(), batch_size=2, num_dataloader_workers=0)
    assert torch.equal(on_two[-2]["predictions"], alone.predictions)
    assert torch.equal(on_two[-2]["targets"], Tensors(13).labels)


def test_data_sets_of_other_lengths_are_refused_on_every_rank(on_two: list[dict[str, Any]]) -> None:
    first, second = on_two[-3]["refused"]
    assert first == second
    for message, what in zip(first, ("train_dataset", "dataset"), strict=True):
        assert message.startswith(f"{what} has another length on each process: 48, 64. Give every process the whole")


def test_every_rank_ends_with_the_same_statistics(on_two: list[dict[str, Any]]) -> None:
    first, second = on_two[-1]["buffers"]
    assert first == second


def test_what_grew_differently_on_each_rank_stays_as_it_is(on_two: list[dict[str, Any]]) -> None:
    assert on_two[-1]["grown"] == [{"cache": [0, 0]}, {"cache": [1, 1, 1], "late": [1]}]


def test_the_statistics_are_the_mean_of_what_every_rank_saw(on_two: list[dict[str, Any]]) -> None:
    dataset = Tensors(32)
    norms = [torch.nn.BatchNorm2d(3) for _ in range(2)]
    for epoch in range(2):
        for rank, norm in enumerate(norms):
            batches = EpochBatches(32, batch_size=4, min_examples=8, seed=0, rank=rank, world_size=2)
            batches.epoch = epoch
            for keys in batches:
                norm(torch.stack([dataset[index][0] for _, index in keys]))
        for name in ("running_mean", "running_var"):  # averaged before the validation that ends an epoch
            mean = (getattr(norms[0], name) + getattr(norms[1], name)) / 2
            for norm in norms:
                getattr(norm, name).copy_(mean)
    trained = dict(zip([name for name, _ in NormNet().named_buffers()], on_two[-1]["buffers"][0], strict=True))
    for name in ("running_mean", "running_var"):
        assert trained[f"norm.{name}"] == pytest.approx(getattr(norms[0], name).tolist(), rel=1e-5)


def test_num_processes_starts_workers_and_gives_the_model_back() -> None:
    recorder = Recorder()
    alone = iris_hf.train(Net(), Tensors(), None, num_epochs=2, batch_size=8, base_lr=0.1, random_seed=0)
    settings = {"num_epochs": 2, "base_lr": 0.1, "random_seed": 0, "plugins": [recorder]}
    shared = iris_hf.train(Net(), Tensors(), None, batch_size=4, num_processes=2, **settings)
    for one, two in zip(alone.model.parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert shared.model.training
    assert recorder.steps == list(range(1, 17))  # what a plugin object saw comes back too
    predicted = iris_hf.predict(Tensors(13), Net(), batch_size=2, num_processes=2)
    assert torch.equal(predicted.predictions, iris_hf.predict(Tensors(13), Net(), batch_size=2).predictions)


def test_workers_give_back_unsaved_buffers_and_draw_from_the_callers_generator(tmp_path: Path) -> None:
    trained = []
    for run in ("one", "two"):
        torch.manual_seed(3)
        settings = {"num_epochs": 1, "batch_size": 4, "num_processes": 2}
        settings |= {"checkpoint_dir": tmp_path / run, "resume": "auto"}  # the seed would be a checkpoint's, with one
        trained.append(iris_hf.train(NormNet(), Tensors(16), None, **settings).model)
    assert float(trained[0].unsaved) == 2
    assert torch.equal(trained[0].head.weight, trained[1].head.weight)


def test_workers_take_functions_and_classes_of_the_caller_and_give_back_what_a_plugin_added(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Guarded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.guard = threading.Lock()

        def __getstate__(self) -> dict[str, Any]:
            state = self.__dict__.copy()
            del state["guard"]
            return state

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            self.guard = threading.Lock()

    class Local(Net):
        def __init__(self) -> None:
            super().__init__()
            self.memory, self.guarded = torch.nn.LSTM(2, 2).requires_grad_(False), Guarded()
            self.scale, self.batches, self.lock = double, 0, None

        def training_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
            self.batches += 1
            self.lock = self.lock or threading.Lock()
            self.body.lock = self.lock
            return {"loss": self.criterion(self(self.scale(inputs)), targets)}

    class Adapts(iris_hf.Plugin):
        lock: Any = None
        steps = 0

        def transform_model(self, model: torch.nn.Module) -> torch.nn.Module:
            model.requires_grad_(False)
            model.head = torch.nn.Sequential(model.head, torch.nn.Linear(2, 2))
            lock = threading.Lock()
            model.head.register_forward_hook(lambda *_: lock.release() if lock.locked() else None)
            return model

        def on_step_end(self, state: iris_hf.TrainState) -> None:
            self.steps, self.lock = state.step, threading.Lock()

    def double(image: torch.Tensor) -> torch.Tensor:
        return image * 2

    adapts = Adapts()
    settings = {"num_epochs": 1, "base_lr": 0.1, "random_seed": 0, "plugins": [adapts]}
    written = {cls: dict(vars(cls)) for cls in (Local, Adapts)}
    own = Local()
    model, _ = iris_hf.train(own, Tensors(16), double, batch_size=4, num_processes=2, **settings)
    for cls, attributes in written.items():
        assert [name for name, value in attributes.items() if vars(cls)[name] is not value] == []
    said = capfd.readouterr().err
    assert "Adapts: lock cannot be pickled after the run: as before it" in said
    assert "Local: lock cannot be pickled after the run: as before it" in said
    assert "Sequential: lock cannot be pickled after the run: as before it" in said
    assert "Sequential: _forward_hooks cannot be pickled after the run: as before it" in said
    assert adapts.steps == 2
    assert type(model) is Local
    assert model.scale is double
    assert (model.batches, model.lock, hasattr(model.body, "lock")) == (2, None, False)
    assert model(Tensors(2).images).shape == (2, 2)
    alone, _ = iris_hf.train(own, Tensors(16), double, batch_size=8, **settings)
    assert model.state_dict().keys() == alone.state_dict().keys()
    for one, two in zip(alone.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_an_error_in_a_worker_comes_back_as_it_was() -> None:
    class Broken(Tensors):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            if index == 5:
                raise OSError("disk on fire")
            return super().__getitem__(index)

    with pytest.raises(iris_hf.DataError, match="Example 5: OSError: disk on fire") as caught:
        iris_hf.train(Net(), Broken(16), None, num_epochs=1, batch_size=4, num_processes=2)
    assert any("worker" in note for note in caught.value.__notes__)


def test_a_world_size_that_contradicts_num_processes_is_an_error_on_every_rank(tmp_path: Path) -> None:
    script = tmp_path / "contradicts.py"
    script.write_text(
        "import iris_hf, os, sys\nfrom tiny import *\n"
        "try:\n    iris_hf.train(Net(), Tensors(), None, num_epochs=1, num_processes=3)\n"
        "except iris_hf.ConfigError as error:\n    sys.stdout.write(f'rank {os.environ[\"RANK\"]}: {error}\\n')\n"
    )
    done = torchrun(2, str(script))
    for rank in range(2):
        assert f"rank {rank}: num_processes=3 contradicts the launcher, which started 2 processes." in done.stdout


def test_a_failing_rank_ends_the_whole_run(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        "import iris_hf, os\nfrom tiny import *\n"
        "def fail(image):\n"
        "    if os.environ['RANK'] == '1' and float(image[0, 0, 0]) == float(Tensors().images[11, 0, 0, 0]):\n"
        "        raise ValueError('bad pixel')\n"
        "    return image\n"
        "iris_hf.train(Net(), Tensors(), fail, num_epochs=50, batch_size=4, num_dataloader_workers=0)\n"
        "print('finished')\n"
    )
    done = torchrun(2, str(script), timeout=120)
    assert done.returncode != 0
    assert "Example 11: ValueError: bad pixel" in done.stderr
    assert "finished" not in done.stdout
