"""What trackers are sent, read back with TensorBoard's own reader."""

import importlib.util
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import Dies, Net, Recorder, Tensors, train_tiny

import iris_hf
from iris_hf.engine.drawing import draw_examples
from iris_hf.engine.plugins import load_plugins
from iris_hf.engine.plugins.hyper_parameters import flat
from iris_hf.engine.plugins.trackers import LogTensorboard
from iris_hf.training.schedulers import LrSchedulerConfig

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
    for tag in ("examples_per_second", "peak_host_memory_mib"):
        assert set(scalars[tag]) == set(expected)
        assert all(value > 0 for value in scalars[tag].values())


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


def test_a_resumed_run_goes_on_in_its_folder_with_every_step_once(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"val_dataset": Tensors(8), "num_epochs": 2}
    kept = {**settings, "checkpoint_dir": str(tmp_path / "checkpoints"), "checkpoint_steps": 5}
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    train_tiny(plugins=[f"log_tensorboard({whole!r}, every=2)"], **settings)
    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(plugins=[f"log_tensorboard({cut!r}, every=2)", Dies(14)], **kept)
    time.sleep(1)  # TensorBoard reads its files by the second they are from
    train_tiny(plugins=[f"log_tensorboard({cut!r}, every=2)"], **kept, resume="auto")
    expected, found = read(tmp_path / "whole"), read(tmp_path / "cut")
    for tag in ("loss", "learning_rate", "val_loss"):
        assert found[tag] == expected[tag], tag


def test_a_resume_with_another_tracker_is_a_new_run_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker

    class Notes(TensorBoardTracker):
        name = "notes"

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notes", Notes)
    folder = str(tmp_path / "logs")
    kept: dict[str, Any] = {"checkpoint_dir": str(tmp_path / "checkpoints"), "num_epochs": 2}
    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(plugins=[f"log_tracker('notes', 'first', folder={folder!r})", Dies(12)], **kept, checkpoint_steps=5)
    (tmp_path / "logs" / "first").rename(tmp_path / "first")
    train_tiny(plugins=[f"log_tracker('tensorboard', 'second', folder={folder!r})"], **kept, resume="auto")
    assert caplog.text.count("was sent to notes: a new run begins in tensorboard") == 1
    assert [run.name for run in (tmp_path / "logs").iterdir()] == ["second"]
    assert set(read(tmp_path / "logs")["loss"]) == {16}


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
        ("log_tensorboard(num_images=-1)", iris_hf.ConfigError, "num_images must not be negative, got -1"),
        ("log_tensorboard(every=0)", iris_hf.ConfigError, "every must be at least 1, got 0"),
    ],
)
def test_a_tracker_that_cannot_be_is_an_error_at_once(plugin: str, error: type[Exception], message: str) -> None:
    for library in ("wandb", "comet_ml"):
        if library in plugin and importlib.util.find_spec(library) is not None:
            pytest.skip(f"{library} is installed here")
    with pytest.raises(error, match=message):
        load_plugins([plugin])


def pictures(folder: Path) -> dict[int, np.ndarray[Any, Any]]:
    """Return the pictures of validation examples by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    found = {}
    for event in events.Images("val_examples") if "val_examples" in events.Tags()["images"] else ():
        with PIL.Image.open(io.BytesIO(event.encoded_image_string)) as picture:
            found[event.step] = np.asarray(picture)
    return found


class Named(Tensors):
    class_names = ("dark", "bright")


def test_the_same_examples_are_drawn_at_every_validation_with_what_is_predicted_then(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in "ab"]
    watched = Watched()
    settings = {"val_dataset": Named(11, seed=1), "val_batch_size": 4, "num_epochs": 2, "base_lr": 2.0}
    plugins = [f"log_tensorboard({folders[0]!r}, num_images=6)", f"log_tensorboard({folders[1]!r}, num_images=99)"]
    weights = train_tiny(plugins=[*plugins, "ema(0.5, 0)", watched], **settings)[0]
    data = settings["val_dataset"]
    for name, count in (("a", 6), ("b", 11)):
        drawn = pictures(tmp_path / name)
        assert set(drawn) == {8, 16}
        for step, predictions in watched.predictions.items():
            expected = draw_examples(
                list(data.images[:count]), data.labels[:count], predictions[:count], data.class_names
            )
            assert np.array_equal(drawn[step], expected)
    plain = train_tiny(plugins=["ema(0.5, 0)"], **settings)[0]
    assert all(torch.equal(weight, plain[name]) for name, weight in weights.items())


class Watched(iris_hf.Plugin):
    """Predicts by hand at every validation, after the weights were exchanged for their average."""

    def __init__(self) -> None:
        self.predictions: dict[int, torch.Tensor] = {}

    def on_validation_end(self, state: iris_hf.TrainState) -> None:
        images = Named(11, seed=1).images
        self.predictions[state.step] = state.model.predictor(state.model.eval()(images)).detach()


def test_what_cannot_be_drawn_is_said_once_and_numbers_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Pairs(Tensors):
        def __getitem__(self, index: int) -> Any:
            return (self.images[index], torch.zeros(3)), self.labels[index]

    class TwoInputs(Net):
        def forward(self, inputs: Any) -> torch.Tensor:
            return super().forward(inputs[0])

    settings = {"num_epochs": 2, "batch_size": 8, "num_dataloader_workers": 0}
    plugins = [LogTensorboard(str(tmp_path / "a"), num_images=3)]
    iris_hf.train(TwoInputs(), Pairs(16), None, Pairs(8), **settings, plugins=plugins)
    assert caplog.text.count("num_images=3, but the inputs are no images [3, H, W]") == 1
    assert set(read(tmp_path / "a")["val_loss"]) == {2, 4}
    assert pictures(tmp_path / "a") == {}
    train_tiny(plugins=[LogTensorboard(str(tmp_path / "b"), num_images=3)], num_epochs=1)
    assert "num_images=3, but there is no val_dataset: no examples are drawn" in caplog.text


def test_hyper_parameters_of_any_type_become_numbers_and_strings() -> None:
    given = {"zero": 0, "none": None, "nested": {"a": (1, None)}, "curve": LrSchedulerConfig(), "path": Path("x")}
    described = flat({**given, "plugins": ["ema", Dies(3)], "half": 0.5, "flag": False})
    assert described["plugins"] == "ema, Dies"
    assert described["nested/a"] == "1, None"
    assert described["curve/name"] == "cosine_annealing"
    assert (described["zero"], described["half"], described["flag"], described["path"]) == (0, 0.5, False, "x")
    assert "none" not in described


def test_nothing_is_written_before_there_is_something_to_say(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        train_tiny(plugins=[LogTensorboard(str(tmp_path / "logs")), Dies(1)], num_epochs=1)
    assert not (tmp_path / "logs").exists()
