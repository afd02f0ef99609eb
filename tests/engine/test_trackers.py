"""What trackers are sent, read back with TensorBoard's own reader."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tiny import Net, Recorder, Tensors, train_tiny

import iris_hf
from iris_hf.engine.plugins import load_plugins
from iris_hf.engine.plugins.trackers import LogTensorboard

pytest.importorskip("tensorboard", reason="pip install iris-hf[tensorboard]")


def read(folder: Path) -> dict[str, dict[int, float]]:
    """Return tag -> step -> value of the only run in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert len(dict(found)) == len(found), "a step was written twice"
        scalars[tag] = dict(found)
    return scalars


def test_tensorboard_gets_means_rates_throughput_and_validations(tmp_path: Path) -> None:
    folder = str(tmp_path / "logs")
    plugins = [f"log_tensorboard({folder!r}, every=3)", "val_metrics('accuracy')"]
    recorder = train_tiny(plugins=plugins, val_dataset=Tensors(8), num_epochs=2)[1]
    scalars = read(tmp_path / "logs")
    # 8 steps an epoch: every third, and what is left of an epoch
    intervals = [(0, 3), (3, 6), (6, 8), (8, 9), (9, 12), (12, 15), (15, 16)]
    expected = {end: sum(recorder.losses[start:end]) / (end - start) for start, end in intervals}
    assert scalars["loss"] == pytest.approx(expected)
    assert scalars["learning_rate"] == pytest.approx({end: recorder.learning_rates[end - 1] for _, end in intervals})
    assert scalars["val_loss"] == pytest.approx({8: recorder.val_losses[0], 16: recorder.val_losses[1]})
    assert set(scalars["accuracy"]) == {8, 16}
    assert all(value > 0 for value in scalars["examples_per_second"].values())


def test_hyper_parameters_are_stored(tmp_path: Path) -> None:
    import yaml

    train_tiny(plugins=[LogTensorboard(str(tmp_path))], num_epochs=1, weight_decay=0.5)
    (file,) = tmp_path.glob("*/*/hparams.yml")
    stored = yaml.safe_load(file.read_text())
    assert stored["model"] == "Net"
    assert stored["examples_per_step"] == 8
    assert stored["optimizer"] == "SGD"
    assert stored["optimizer/weight_decay"] == 0.5
    assert stored["num_trainable_parameters"] == sum(parameter.numel() for parameter in Net().parameters())


class Dies(iris_hf.Plugin):
    """Ends the run at a step as a fault would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        if state.step == self.step:
            raise RuntimeError("power cut")


def test_a_resumed_run_goes_on_in_its_folder_with_every_step_once(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"val_dataset": Tensors(8), "num_epochs": 2}
    kept = {**settings, "checkpoint_dir": str(tmp_path / "checkpoints"), "checkpoint_steps": 5}
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    train_tiny(plugins=[f"log_tensorboard({whole!r}, every=2)"], **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(plugins=[f"log_tensorboard({cut!r}, every=2)", Dies(14)], **kept)
    train_tiny(plugins=[f"log_tensorboard({cut!r}, every=2)"], **kept, resume="auto")
    expected, found = read(tmp_path / "whole"), read(tmp_path / "cut")
    for tag in ("loss", "learning_rate", "val_loss"):
        assert found[tag] == expected[tag], tag


def test_two_runs_of_one_object_have_two_folders(tmp_path: Path) -> None:
    plugin = LogTensorboard(str(tmp_path))
    for _ in range(2):
        train_tiny(plugins=[plugin], num_epochs=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_several_groups_have_a_learning_rate_each(tmp_path: Path) -> None:
    settings = {"num_epochs": 1, "lr_scale_param_names": [["head", 0.1]]}
    recorder = Recorder()
    train_tiny(plugins=[LogTensorboard(str(tmp_path), every=4), recorder], **settings)
    scalars = read(tmp_path)
    assert scalars["learning_rate/0"][4] == pytest.approx(recorder.learning_rates[3])
    assert scalars["learning_rate/1"][4] == pytest.approx(recorder.learning_rates[3] / 10)


def test_any_tracker_of_accelerate_is_a_name_away(tmp_path: Path) -> None:
    train_tiny(plugins=[f"log_tracker('tensorboard', 'mine', folder={str(tmp_path)!r})"], num_epochs=1)
    assert set(read(tmp_path)["loss"]) == {8}
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize(
    ("plugin", "error", "message"),
    [
        ("log_tracker('wandb')", iris_hf.MissingDependencyError, "The tracker wandb needs its library: pip install w"),
        ("log_tracker('comet_ml')", iris_hf.MissingDependencyError, "pip install comet-ml"),
        ("log_tracker('tensorbord')", iris_hf.ConfigError, "Unknown tracker 'tensorbord'. Did you mean 'tensorboard'"),
        ("log_tensorboard(every=0)", iris_hf.ConfigError, "every must be at least 1, got 0"),
    ],
)
def test_a_tracker_that_cannot_be_is_an_error_at_once(plugin: str, error: type[Exception], message: str) -> None:
    for library in ("wandb", "comet_ml"):
        if library in plugin and importlib.util.find_spec(library) is not None:
            pytest.skip(f"{library} is installed here")
    with pytest.raises(error, match=message):
        load_plugins([plugin])


def test_nothing_is_written_before_there_is_something_to_say(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(plugins=[LogTensorboard(str(tmp_path / "logs")), Dies(1)], num_epochs=1)
    assert not (tmp_path / "logs").exists()
