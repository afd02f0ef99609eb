"""early_stopping, stop_if_loss_is_nan, save_best, val_metrics, freeze_modules, compile, profile and mixup."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Net, NormNet, Tensors, train_tiny
from torch import nn

import iris_hf
from iris_hf.engine.plugins.mixup import Mixup
from iris_hf.engine.plugins.val_metrics import ValMetrics

SETTINGS: dict[str, Any] = {
    "num_epochs": 2,
    "batch_size": 8,
    "base_lr": 0.1,
    "random_seed": 0,
    "num_dataloader_workers": 0,
}


class Says(iris_hf.Plugin):
    """Measures what it was told, validation by validation, and keeps the weights of each."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.weights: list[dict[str, torch.Tensor]] = []
        self.reason: str | None = None

    def validation_metrics(self, state: iris_hf.TrainState) -> dict[str, float]:
        self.weights.append({name: tensor.clone() for name, tensor in state.model.state_dict().items()})
        return {"score": self.values[state.epoch]}

    def on_train_end(self, state: iris_hf.TrainState) -> None:
        self.reason = state.stop_reason


NAN = float("nan")


@pytest.mark.parametrize(
    ("plugin", "values", "epochs"),
    [
        ("early_stopping(2, metric='score', mode='min')", [5, 4, 4, 4, 1], 4),
        ("early_stopping(2, metric='score', mode='min')", [5, 6, 4, 6, 6], 5),
        ("early_stopping(2, 0.5, 'score', 'min')", [5, 4.6, 4.5, 1, 1], 3),
        ("early_stopping(1, metric='score', mode='max')", [1, 2, 3, 0, 9], 4),
        ("early_stopping(2, metric='score', mode='min')", [NAN, 3, NAN, NAN, 1], 4),
        ("early_stopping(metric='score', mode='min')", [1, 1, 1, 1, 1], 4),
    ],
)
def test_early_stopping_ends_after_patience_validations_without_improvement(
    plugin: str, values: list[float], epochs: int
) -> None:
    says = Says(*values)
    recorder = train_tiny(plugins=[plugin, says], val_dataset=Tensors(8), num_epochs=5)[1]
    assert len(recorder.val_losses) == epochs
    assert (says.reason is not None) == (epochs < 5 or values[3:] == [6, 6])


def test_early_stopping_goes_by_the_validation_loss() -> None:
    class Worse(iris_hf.Plugin):
        def on_validation_end(self, state: iris_hf.TrainState) -> None:
            state.val_loss = float(state.epoch)

    recorder = train_tiny(plugins=[Worse(), "early_stopping(2)"], val_dataset=Tensors(8), num_epochs=9)[1]
    assert len(recorder.losses) == 3 * 8


class Breaks(iris_hf.Plugin):
    """Makes the inputs of some steps not a number."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.step = 0
        self.reason: str | None = None

    def transform_batch(self, batch: Any) -> Any:
        self.step += 1
        return (batch[0] * NAN, batch[1]) if self.step in self.steps else batch

    def on_train_end(self, state: iris_hf.TrainState) -> None:
        self.reason = state.stop_reason


def test_a_loss_that_is_nan_ends_the_run_with_the_weights_before_it() -> None:
    class Keeps(iris_hf.Plugin):
        def on_step_end(self, state: iris_hf.TrainState) -> None:
            if state.step == 4:
                self.weights = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}

    keeps, breaks = Keeps(), Breaks(5)
    settings = {"optimizer": "adamw", "base_lr": 0.01, "weight_decay": 0.1}
    for order in itertools.permutations(["stop_if_loss_is_nan", "clip_grad_norm", keeps]):
        breaks.step = 0
        weights, recorder = train_tiny(plugins=[breaks, *order], **settings)
        assert recorder.steps == [1, 2, 3, 4, 5]
        assert all(torch.equal(weight, keeps.weights[name]) for name, weight in weights.items())
    assert breaks.reason is not None
    assert breaks.reason.startswith("the loss or a gradient of step 5 is not finite. The step was left out.")


class BreaksGradients(iris_hf.Plugin):
    """Makes one gradient of a step infinite; the loss stays."""

    def on_gradients_ready(self, state: iris_hf.TrainState) -> None:
        if state.step == 4:
            state.model.head.bias.grad[0] = torch.inf


@pytest.mark.parametrize("breaks", [Breaks(9, 10), BreaksGradients()], ids=["loss", "gradient"])
def test_statistics_and_weights_are_those_before_a_broken_step_and_the_stop_is_said(
    breaks: iris_hf.Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    class Keeps(iris_hf.Plugin):
        def on_step_end(self, state: iris_hf.TrainState) -> None:
            if state.step == 4:
                self.state = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}

    keeps = Keeps()
    settings = {**SETTINGS, "accumulate_grad_batches": 2, "plugins": [breaks, "stop_if_loss_is_nan", keeps]}
    model = iris_hf.train(NormNet(), Tensors(), None, Tensors(8), **settings).model
    assert all(torch.equal(tensor, keeps.state[name]) for name, tensor in model.state_dict().items())
    assert "Stopped after step 5: the loss or a gradient of step 5 is not finite" in caplog.text


def test_patience_leaves_out_single_steps_and_ends_at_a_row_of_them() -> None:
    recorder = train_tiny(plugins=[Breaks(2, 3, 5, 6, 7, 8), "stop_if_loss_is_nan(patience=3)"])[1]
    assert recorder.steps == [1, 2, 3, 4, 5, 6, 7]


def classifier() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
        return iris_hf.append_classifier(encoder, nn.Linear(8, 2), task_type="multiclass_classification")


@pytest.mark.parametrize("ema_first", [True, False])
def test_save_best_keeps_the_validated_weights_of_the_best_epoch(tmp_path: Path, ema_first: bool) -> None:
    says, folder = Says(3, 1, 2), tmp_path / "models" / "best"
    plugins = [says, f"save_best({str(folder)!r}, 'score', 'min')"]
    plugins = ["ema(0.9, 2)", *plugins] if ema_first else [*plugins, "ema(0.9, 2)"]
    settings = {**SETTINGS, "num_epochs": 3, "plugins": plugins}
    iris_hf.train(classifier(), Tensors(), None, Tensors(8), **settings)
    saved = iris_hf.from_pretrained(folder).state_dict()
    assert all(torch.equal(weight, says.weights[1][name]) for name, weight in saved.items())
    assert not torch.equal(says.weights[0]["network.1.weight"], says.weights[1]["network.1.weight"])
    info = json.loads((folder / "best.json").read_text())
    files = sorted(path.name for path in folder.iterdir() if path.name != "best.json")
    assert info == {"metric": "score", "value": 1.0, "epoch": 2, "step": 16, "files": files}
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def test_save_best_keeps_the_weights_alone_of_a_model_that_nothing_describes(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    says = Says(1, 2, 3)
    train_tiny(plugins=[f"save_best({str(tmp_path)!r}, 'score', 'max')", says], val_dataset=Tensors(8))
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weight, says.weights[2][name]) for name, weight in saved.items())


def test_val_metrics_are_those_of_predict() -> None:
    class Last(iris_hf.Plugin):
        def on_validation_end(self, state: iris_hf.TrainState) -> None:
            self.measured = state.val_metrics

    last, data = Last(), Tensors(13, seed=1)
    settings = {**SETTINGS, "val_batch_size": 3, "plugins": [last, ValMetrics(iris_hf.metrics.Accuracy())]}
    model = iris_hf.train(Net(), Tensors(), None, data, **settings).model
    predictions, targets = iris_hf.predict(data, model)
    assert last.measured == {"accuracy": pytest.approx(iris_hf.evaluate_accuracy(predictions, targets))}


def test_val_metrics_take_several_modules_and_converted_predictions() -> None:
    import evaluate

    class Share(evaluate.Metric):
        """How many predictions are class 1, by class and altogether."""

        def _info(self) -> Any:
            import datasets

            features = datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            )
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, predictions: Any, references: Any) -> Any:
            return {"share": {"one": sum(predictions) / len(predictions)}, "all": list(predictions)}

    class Last(iris_hf.Plugin):
        def on_validation_end(self, state: iris_hf.TrainState) -> None:
            self.measured = state.val_metrics

    last, data = Last(), Tensors(13, seed=1)
    metrics = ValMetrics([Share(), "accuracy"], lambda predictions, targets: (predictions.argmax(1), targets))
    model = iris_hf.train(Net(), Tensors(), None, data, **SETTINGS, plugins=[metrics, last]).model
    classes = iris_hf.predict(data, model).predictions.argmax(1)
    assert last.measured["share/one"] == pytest.approx(float(classes.float().mean()))
    assert last.measured.keys() == {"share/one", "accuracy"}


def test_a_measured_metric_is_logged_and_stops_and_saves_in_any_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watching = ["log_summary", "early_stopping(1, metric='accuracy', mode='max')"]
    watching.append(f"save_best({str(tmp_path / 'best')!r}, 'accuracy', 'max')")
    with caplog.at_level(logging.INFO, logger="iris_hf"):
        train_tiny(plugins=[*watching, "val_metrics('accuracy')"], val_dataset=Tensors(8), base_lr=0.0)
    lines = [record.getMessage() for record in caplog.records]
    assert sum(", accuracy 0." in line for line in lines) == 2
    assert any("accuracy, 0." in line and "has not improved in 1 validations" in line for line in lines)
    assert (tmp_path / "best" / "best.json").is_file()


def test_frozen_modules_stay_to_the_bit_and_come_back_trainable() -> None:
    class Evaluates(iris_hf.Plugin):
        def on_step_end(self, state: iris_hf.TrainState) -> None:
            assert not state.model.norm.training
            assert state.model.head.training

    model = NormNet()
    settings = {**SETTINGS, "plugins": ["freeze_modules(['norm', '^body'])", Evaluates()]}
    trained = iris_hf.train(model, Tensors(), None, Tensors(8), **settings).model
    before, after = model.state_dict(), trained.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert all(module.training for module in trained.modules())


def test_a_compiled_model_takes_the_same_steps_and_comes_back_as_it_was() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    model = classifier()
    plain = iris_hf.train(model, Tensors(), None, Tensors(8), **SETTINGS).model
    compiled = iris_hf.train(model, Tensors(), None, Tensors(8), **SETTINGS, plugins=["compile('eager')"]).model
    assert counters["stats"]["unique_graphs"] > 0
    for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(one, two)
    assert "training_step" not in vars(compiled)
    counters.clear()
    predictions = iris_hf.predict(Tensors(8), model, batch_size=8, plugins=["compile('eager')"]).predictions
    assert counters["stats"]["unique_graphs"] > 0
    assert torch.equal(predictions, iris_hf.predict(Tensors(8), model, batch_size=8).predictions)
    assert "prediction_step" not in vars(model)
    assert model._compiled_call_impl is None


def test_a_profile_shows_the_operations_of_training_and_prediction(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = f"profile(2, {str(tmp_path / 'new')!r})"
    with caplog.at_level(logging.INFO, logger="iris_hf"):
        train_tiny(plugins=[plugin], num_epochs=1)
    iris_hf.predict(Tensors(3), Net(), plugins=[plugin])
    counts = {}
    for name in ("train", "predict"):
        trace = json.loads((tmp_path / "new" / f"{name}-rank0.json").read_text())
        counts[name] = sum(event.get("name") == "aten::addmm" for event in trace["traceEvents"])
    assert counts == {"train": 2 * 2, "predict": 2 * 2}  # two linear layers, two steps or batches
    assert "aten::addmm" in caplog.text


def test_specifications_of_irisml_say_the_same_here() -> None:
    from iris_hf.engine.plugins.registry import make_plugin

    same = [
        ("mixup('classification_multiclass', 0.2, 2)", "mixup(0.2, 2)"),
        ("compile('eager', 'fp32')", "compile('eager')"),
        ("freeze_modules('')", "nop"),
        ("ddp", "nop"),
        ("call_dataset_set_epoch", "nop"),
    ]
    for theirs, ours in same:
        if ours != "nop":
            assert vars(make_plugin(theirs)) == vars(make_plugin(ours))
        weights = [train_tiny(plugins=[name], num_epochs=1)[0] for name in (theirs, ours)]
        assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def mixed(plugin: Mixup, batch: Any) -> Any:
    plugin.transform_model(Net())
    torch.manual_seed(3)
    return plugin.transform_batch(batch)


def test_mixup_has_the_loss_of_both_targets_weighted() -> None:
    data = Tensors(8)
    inputs, targets = mixed(Mixup(1.0, num_classes=2), (data.images, data.labels))
    torch.manual_seed(3)
    keep = torch.distributions.Beta(1.0, 1.0).sample().item()
    partners = torch.randperm(8)
    torch.testing.assert_close(inputs, keep * data.images + (1 - keep) * data.images[partners])
    logits = Net()(inputs)
    loss = nn.functional.cross_entropy
    expected = keep * loss(logits, data.labels) + (1 - keep) * loss(logits, data.labels[partners])
    torch.testing.assert_close(loss(logits, targets), expected)


def test_mixup_mixes_labels_and_keeps_the_boxes_of_both() -> None:
    images = torch.rand(2, 3, 4, 4)
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    soft = mixed(Mixup(1.0), (images, labels))[1]
    assert torch.equal(soft[:, 2], torch.ones(2))
    assert torch.equal(soft[:, 1], torch.zeros(2))
    boxes = [torch.rand(1, 5), torch.rand(3, 5)]
    assert sorted(map(len, mixed(Mixup(1.0), (images, boxes))[1])) in ([2, 6], [4, 4])


def test_mixup_trains_classifiers_the_same_way_each_time() -> None:
    settings = {**SETTINGS, "plugins": ["mixup(alpha=0.4)"]}
    runs = [iris_hf.train(classifier(), Tensors(), None, Tensors(8), **settings).model for _ in range(2)]
    plain = iris_hf.train(classifier(), Tensors(), None, **SETTINGS).model
    assert torch.equal(next(runs[0].parameters()), next(runs[1].parameters()))
    assert not torch.equal(next(runs[0].parameters()), next(plain.parameters()))
    cached = iris_hf.train_with_gradient_cache(classifier(), Tensors(), None, **settings, sub_batch_size=3).model
    torch.testing.assert_close(next(cached.parameters()), next(runs[0].parameters()), rtol=0, atol=1e-5)


IMAGES = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((([IMAGES, IMAGES], IMAGES), torch.tensor([0, 1])), iris_hf.ConfigError, r"got tuple.*pairs of images and te"),
        ((IMAGES.long(), torch.tensor([0, 1])), iris_hf.ConfigError, r"got torch.int64 \(2, 3, 4, 4\)"),
        ((IMAGES, torch.rand(2, 5, 4, 4)), iris_hf.ConfigError, r"got torch.float32 \(2, 5, 4, 4\)"),
        ((IMAGES, ["a", "b"]), iris_hf.ConfigError, "got list"),
        ((IMAGES, torch.tensor([0, 1])), iris_hf.ConfigError, r"has no num_classes. Give it: mixup\(num_classes=10\)"),
    ],
)
def test_mixup_refuses_what_has_no_mixture(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mixed(Mixup(), batch)


def test_mixup_names_a_class_index_out_of_range() -> None:
    with pytest.raises(iris_hf.DataError, match=r"a class index is not in \[0, 2\): \[0, 2\]"):
        mixed(Mixup(num_classes=2), (IMAGES, torch.tensor([[0], [2]])))


VALIDATED = {"val_dataset": Tensors(8)}


@pytest.mark.parametrize(
    ("plugins", "options", "message"),
    [
        (["early_stopping"], {}, "early_stopping needs validations: give a val_dataset"),
        (["save_best('best')"], {}, "save_best needs validations"),
        (["val_metrics('accuracy')"], {}, "val_metrics needs validations"),
        (["val_metrics([])"], {}, "val_metrics: name at least one metric"),
        (["early_stopping(0)"], {}, "patience must be at least 1, got 0"),
        (["early_stopping(1, -1)"], {}, "min_delta must not be negative, got -1"),
        (["early_stopping(mode='least')"], {}, "Unknown mode 'least'. Known: max, min"),
        (
            ["early_stopping(metric='acuracy', mode='max')", "val_metrics('accuracy')"],
            VALIDATED,
            "Did you mean 'accuracy'",
        ),
        (
            ["early_stopping(metric='accuracy')"],
            {},
            "Is more of 'accuracy' better, or less. Say mode='max' or mode='min'",
        ),
        (["save_best('best', 'accuracy')"], {}, "Is more of 'accuracy' better"),
        (
            ["early_stopping(metric='f1', mode='max')"],
            VALIDATED,
            "Known: val_loss. The plugin val_metrics measures more",
        ),
        (["val_metrics(['accuracy', 'accuracy'])"], VALIDATED, "two metrics have the name accuracy"),
        (["val_metrics('acuracy')"], {}, "Unknown metric 'acuracy'. Did you mean 'accuracy'"),
        ([Says(1), Says(2)], VALIDATED, "Two plugins measure score in a validation. Leave out one"),
        (["stop_if_loss_is_nan(0)"], {}, "patience must be at least 1, got 0"),
        (["freeze_modules('tail')"], {}, "no module's name contains 'tail'. Modules: body, body.0"),
        (["freeze_modules('(')"], {}, r"freeze_modules: '\(' is no regular expression"),
        (["freeze_modules([])"], {}, "give a pattern"),
        (["freeze_modules('.')"], {}, "train"),
        (["compile('inducktor')"], {}, "Unknown compile backend 'inducktor'. Did you mean 'inductor'"),
        (["compile(mode='fast')"], {}, "Unknown compile mode 'fast'. Known: default"),
        (["profile(0)"], {}, "num_steps must be at least 1, got 0"),
        (["mixup(0)"], {}, "alpha must be positive, got 0"),
        (["mixup(num_classes=0)"], {}, "num_classes must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_said(plugins: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(iris_hf.ConfigError, match=message):
        iris_hf.train(Net(), Tensors(8), None, **options, **{**SETTINGS, "num_epochs": 1, "plugins": plugins})


def test_save_best_never_replaces_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(iris_hf.ConfigError, match=r"save_best replaces its folder, and '.*' holds other things"):
        train_tiny(plugins=[f"save_best({str(tmp_path)!r})"], val_dataset=Tensors(8))


class Reloads(iris_hf.Plugin):
    """After every step, gives each of the other plugins back what it would give to a checkpoint."""

    def __init__(self, *plugins: iris_hf.Plugin) -> None:
        self.plugins = plugins

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        for plugin in self.plugins:
            plugin.load_state_dict(stored(plugin.state_dict()))


def stored(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {stored(key): stored(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(stored, value))
    assert value is None or type(value) in (bool, int, float, str)
    return value


def test_the_state_of_every_plugin_is_what_a_checkpoint_holds_and_enough(tmp_path: Path) -> None:
    from iris_hf.engine.plugins.registry import make_plugin

    names = ["ema(0.9, 2)", "early_stopping(2)", "stop_if_loss_is_nan", "log_summary"]
    names += [f"log_tensorboard({str(tmp_path / 'logs')!r})", f"save_best({str(tmp_path / 'best')!r})"]
    runs = []
    for is_reloaded in (False, True):
        plugins = [make_plugin(name) for name in names]
        plugins += [Reloads(*plugins)] if is_reloaded else []
        runs.append(train_tiny(plugins=plugins, val_dataset=Tensors(8)))
    (weights, recorder), (again, recorder_again) = runs
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert recorder.val_losses == recorder_again.val_losses


class Dies(iris_hf.Plugin):
    """Ends the run at a step as a fault would."""

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        if state.step == 14:
            raise RuntimeError("power cut")


def test_a_resumed_run_ends_with_the_same_bytes_and_the_same_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(name: str, *more: Any, **kept: Any) -> nn.Module:
        plugins = ["ema(0.9, 2)", "log_summary", "clip_grad_norm", "amp", "early_stopping(3)", "stop_if_loss_is_nan"]
        plugins += [f"save_best({str(tmp_path / name)!r})"]
        settings = {**SETTINGS, "num_epochs": 3, "plugins": [*plugins, *more]}
        return iris_hf.train(NormNet(), Tensors(), None, Tensors(8), **settings, **kept).model

    def logged() -> list[str]:
        lines = [record.getMessage().partition(", 8 steps")[0] for record in caplog.records]
        caplog.clear()
        return [line for line in lines if line.startswith("epoch ")]

    with caplog.at_level(logging.INFO, logger="iris_hf"):
        whole, lines = trained("whole"), logged()
        kept = {"checkpoint_dir": str(tmp_path / "checkpoints"), "checkpoint_steps": 5}
        with pytest.raises(RuntimeError, match="power cut"):
            trained("cut", Dies(), **kept)
        assert logged() == lines[:2]
        cut = trained("cut", **kept, resume="auto")
        assert logged() == lines[2:]
    ours, theirs = cut.state_dict(), whole.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]
