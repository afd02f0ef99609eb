"""ema, amp and clip_grad_norm: equal to what they say written out by hand, in any order and with each other."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Net, NormNet, Recorder, Tensors, train_tiny
from torch import nn

import iris_hf
from iris_hf.engine.plugins.clip_grad_norm import clip_on_cpu
from iris_hf.engine.plugins.ema import EMA


class Snapshots(iris_hf.Plugin):
    """Keeps what the model holds after every step, and the batches."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []
        self.batches: list[Any] = []

    def transform_batch(self, batch: Any) -> Any:
        self.batches.append(batch)
        return batch

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        held = {**dict(state.model.named_parameters()), **dict(state.model.named_buffers())}
        self.after.append({name: tensor.detach().clone() for name, tensor in held.items()})


SETTINGS: dict[str, Any] = {
    "num_epochs": 2,
    "batch_size": 8,
    "base_lr": 0.1,
    "random_seed": 0,
    "num_dataloader_workers": 0,
}


def by_hand(snapshots: Snapshots, *, decay: float, skip: int) -> dict[str, torch.Tensor]:
    average = dict(snapshots.after[skip])
    for held in snapshots.after[skip + 1 :]:
        for name, tensor in held.items():
            is_averaged = tensor.is_floating_point()
            average[name] = decay * average[name] + (1 - decay) * tensor if is_averaged else tensor
    return average


@pytest.mark.parametrize(
    ("plugin", "skip", "accumulate"),
    [("ema(0.9, 0)", 0, 1), ("ema(decay=0.9, num_skip_iterations=3, use_cpu_memory=True)", 3, 2)],
)
def test_the_trained_model_carries_the_average_of_the_steps(plugin: str, skip: int, accumulate: int) -> None:
    snapshots = Snapshots()
    settings = {**SETTINGS, "accumulate_grad_batches": accumulate, "plugins": [plugin, snapshots]}
    model = iris_hf.train(NormNet(), Tensors(64), None, Tensors(8), **settings).model
    assert len(snapshots.after) == 16 // accumulate
    trained = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, expected in by_hand(snapshots, decay=0.9, skip=skip).items():
        torch.testing.assert_close(trained[name], expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(model.norm.running_mean, snapshots.after[-1]["norm.running_mean"])
    assert int(model.norm.num_batches_tracked) == 16


def test_the_average_counts_steps_under_a_gradient_cache_too() -> None:
    snapshots = Snapshots()
    settings = {**SETTINGS, "accumulate_grad_batches": 2, "plugins": ["ema(0.9, 1)", snapshots]}
    model = iris_hf.train_with_gradient_cache(Net(), Tensors(64), None, **settings, sub_batch_size=3).model
    assert len(snapshots.after) == 8
    for name, expected in by_hand(snapshots, decay=0.9, skip=1).items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-6, atol=1e-6)


def test_the_average_is_validated_and_training_goes_on_with_the_weights() -> None:
    plain = train_tiny(val_dataset=Tensors(8))[1]
    snapshots = Snapshots()
    averaged = train_tiny(val_dataset=Tensors(8), plugins=["ema(0.9, 2)", snapshots])[1]
    assert averaged.losses == plain.losses
    model, data = Net(), Tensors(8)
    for epoch in range(3):
        part = Snapshots()
        part.after = snapshots.after[: 8 * (epoch + 1)]
        model.load_state_dict(by_hand(part, decay=0.9, skip=2))
        with torch.no_grad():
            assert float(model.criterion(model(data.images), data.labels)) == pytest.approx(averaged.val_losses[epoch])


def test_a_run_shorter_than_the_skipped_steps_keeps_its_weights_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plain, averaged = train_tiny()[0], train_tiny(plugins=["ema"])[0]
    assert all(torch.equal(averaged[name], weight) for name, weight in plain.items())
    assert "nothing is averaged. The run has 24 steps, and the first num_skip_iterations=100 are left" in caplog.text


class Masked(Net):
    """A mask as attention has it, among buffers that are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1), persistent=False)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(images)) @ self.mask.softmax(-1)


def test_a_mask_with_infinities_is_left_out_of_the_average(tmp_path: Path) -> None:
    snapshots = Snapshots()
    kept = {**SETTINGS, "checkpoint_dir": tmp_path, "plugins": ["ema(0.9, 0)", snapshots]}
    model = iris_hf.train(Masked(), Tensors(), None, Tensors(8), **kept).model
    assert torch.equal(model.mask, Masked().mask)
    trained = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, expected in by_hand(snapshots, decay=0.9, skip=0).items():
        if name != "mask":
            torch.testing.assert_close(trained[name], expected, rtol=1e-6, atol=1e-6)
    resumed = iris_hf.train(Masked(), Tensors(), None, Tensors(8), **kept, resume=tmp_path / "step-00000008").model
    assert all(torch.equal(weight, trained[name]) for name, weight in resumed.state_dict().items())


def test_frozen_parameters_take_no_memory_for_an_average() -> None:
    class Looks(iris_hf.Plugin):
        sizes: list[int] = []  # noqa: RUF012

        def on_epoch_end(self, state: iris_hf.TrainState) -> None:
            self.sizes.append(len(ema.state_dict()["average"]))

    ema = EMA(0.9, 0)
    train_tiny(plugins=["freeze_modules('body')", ema, Looks()])
    assert Looks.sizes == [2, 2, 2]


def test_ema_clip_and_amp_give_the_same_bytes_in_any_order() -> None:
    plugins = ["ema(0.9, 2)", "clip_grad_norm(0.05)", "amp"]
    results = [train_tiny(plugins=list(order))[0] for order in itertools.permutations(plugins)]
    for weights in results[1:]:
        assert all(torch.equal(weight, results[0][name]) for name, weight in weights.items())
    unclipped = train_tiny(plugins=["ema(0.9, 2)", "amp"])[0]
    assert not torch.equal(unclipped["head.weight"], results[0]["head.weight"])


@pytest.mark.parametrize("length", [0.0, 1e-8, 0.69, 0.7, 0.71, 1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_clipped_as_torch_does(length: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(shape, generator=generator) for shape in ((5, 3), (), (0, 2), (7,))]
    unit = torch.cat([direction.flatten() for direction in directions]).norm()
    ours = [(direction / unit * length).to(dtype) for direction in directions]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in ours]
    for parameter, gradient in zip(parameters, ours, strict=True):
        parameter.grad = gradient.clone()
    clip_on_cpu(ours, 0.7)
    torch.nn.utils.clip_grad_norm_(parameters, 0.7)
    for parameter, gradient in zip(parameters, ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, equal_nan=True)


def test_a_model_whose_gradients_are_missing_in_part_is_clipped() -> None:
    class Half(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(images).detach())

    model = iris_hf.train(Half(), Tensors(8), None, **SETTINGS, plugins=["clip_grad_norm(1e-3)"]).model
    moved = (model.head.weight - Net().head.weight).detach().norm()
    assert 0 < float(moved) <= 2 * 0.1 * 1e-3  # two steps


def test_amp_on_a_cpu_takes_the_steps_of_a_loop_in_bfloat16() -> None:
    snapshots = Snapshots()
    trained, recorder = train_tiny(plugins=["amp", snapshots])
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for (images, labels), lr in zip(snapshots.batches, recorder.learning_rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(weight, trained[name]) for name, weight in model.state_dict().items())
    assert not torch.equal(trained["head.weight"], train_tiny()[0]["head.weight"])
    assert all(weight.dtype == torch.float32 for weight in trained.values())


def test_amp_on_a_cpu_learns_handwritten_digits_as_well_as_float32() -> None:
    from sklearn.datasets import load_digits

    pixels, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    pixels = (pixels / 16).float()
    train_set, test_set = (
        torch.utils.data.TensorDataset(pixels[part], labels[part]) for part in (slice(0, 1437), slice(1437, None))
    )
    torch.manual_seed(0)
    network = iris_hf.append_classifier(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 10), task_type="multiclass_classification"
    )
    settings: dict[str, Any] = {"num_epochs": 10, "batch_size": 32, "optimizer": "adamw", "base_lr": 3e-3}
    accuracies = []
    for plugins in ([], ["amp('bf16')"]):
        model = iris_hf.train(
            network, train_set, None, **settings, random_seed=0, num_dataloader_workers=0, plugins=plugins
        ).model
        accuracies.append(iris_hf.evaluate_accuracy(*iris_hf.predict(test_set, model, batch_size=360)))
    single, half = accuracies
    assert single > 0.85, accuracies
    assert half == pytest.approx(single, abs=0.02)  # a standard error of 0.88 on 360 digits is 0.017


def test_amp_under_a_gradient_cache_is_amp() -> None:
    settings = {**SETTINGS, "plugins": ["amp('bf16')"]}
    plain = iris_hf.train(Net(), Tensors(64), None, **settings).model.state_dict()
    cached = iris_hf.train_with_gradient_cache(Net(), Tensors(64), None, **settings, sub_batch_size=3).model
    for name, weight in cached.state_dict().items():
        torch.testing.assert_close(weight, plain[name], rtol=0, atol=2e-3)


def test_amp_predicts_in_bfloat16_and_returns_floats() -> None:
    class Logits(Net):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = nn.Identity()

    data, model = Tensors(8), Logits()
    predictions = iris_hf.predict(data, model, batch_size=8, plugins=["amp"]).predictions
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(data.images)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(predictions, expected.float())


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        (["amp('fp16')"], "mixed precision fp16 needs a GPU. Use bf16 on a CPU"),
        (["amp('fp8')"], "Unknown amp dtype 'fp8'. Known: bf16, fp16"),
        (["amp('bf16')", "amp"], "Two plugins contradict each other: mixed_precision='bf16' and 'auto'"),
        (["ema(0.9)", "ema"], "plugins name EMA 2 times, the model's own included. Leave one"),
        (["ema(0.99, '50')"], r"'<' not supported.*Its arguments: ema\(decay"),
        (["ema(1.0)"], r"ema: decay must be in \[0, 1\), got 1.0"),
        (["ema(num_skip_iterations=-1)"], "ema: num_skip_iterations must not be negative, got -1"),
        (["ema(momentum=0.9)"], r"unexpected keyword argument 'momentum'. Its arguments: ema\(decay"),
    ],
)
def test_what_cannot_work_is_said(plugins: list[str], message: str) -> None:
    with pytest.raises(iris_hf.ConfigError, match=message):
        iris_hf.train(Net(), Tensors(8), None, num_epochs=1, device="cpu", plugins=plugins)


def test_recorder_sees_the_steps_own_metrics_before_the_optimizer() -> None:
    class Early(Recorder):
        def on_gradients_ready(self, state: iris_hf.TrainState) -> None:
            self.learning_rates.append(float(state.loss))

    early = Early()
    recorder = train_tiny(plugins=[early])[1]
    assert early.learning_rates == recorder.losses
