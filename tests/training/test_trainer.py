"""The training loop, against loops by hand and against itself."""

import copy
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Net, NormNet, Recorder, Tensors, noisy, train_tiny
from torch import nn

import iris_hf
from iris_hf.engine.loader import EpochBatches
from iris_hf.training.optimizers import OPTIMIZERS


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def by_hand(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, batch_size: int, accumulate: int, num_examples: int
) -> None:
    """A plain loop over the order of examples that the run used; cosine annealing as torch computes it."""
    data = Tensors(num_examples)
    batches = EpochBatches(
        num_examples, batch_size=batch_size, min_examples=batch_size * accumulate, seed=0, rank=0, world_size=1
    )
    steps = -(-len(batches) // accumulate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * steps)
    for epoch in range(3):
        batches.epoch = epoch
        micro_batches = list(batches)
        for first in range(0, len(micro_batches), accumulate):
            group = micro_batches[first : first + accumulate]
            for keys in group:
                indices = [index for _, index in keys]
                loss = model.criterion(model(data.images[indices]), data.labels[indices])
                (loss / len(group)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


MAKERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_does_what_torch_does_by_hand(name: str) -> None:
    make = MAKERS[name.removeprefix("zero_")]
    momentum = {"momentum": 0.9} if OPTIMIZERS[name].momentum else {}
    weights, _ = train_tiny(
        optimizer=name,
        weight_decay=0.01,
        nesterov=name == "sgd",
        accumulate_grad_batches=3,
        num_examples=61,
        **momentum,
    )
    model = Net()
    by_hand(make(model.parameters()), model, batch_size=8, accumulate=3, num_examples=61)
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(weights[key], weight, rtol=1e-5, atol=1e-6)


def test_accumulating_four_times_eight_equals_batch_32() -> None:
    accumulated, one = train_tiny(accumulate_grad_batches=4, num_examples=128)
    whole, other = train_tiny(batch_size=32, num_examples=128)
    assert one.learning_rates == other.learning_rates
    assert one.losses == pytest.approx(other.losses, rel=1e-5)
    for name, weight in whole.items():
        torch.testing.assert_close(accumulated[name], weight, rtol=1e-5, atol=1e-6)


def test_a_leftover_micro_batch_makes_a_step_of_its_own() -> None:
    _, recorder = train_tiny(accumulate_grad_batches=4, num_examples=8 * 9 + 3, num_epochs=2)
    assert recorder.steps == [1, 2, 3, 4, 5, 6]  # 9 micro-batches: 4 + 4 + 1


def test_a_train_set_smaller_than_a_step_is_gone_through_several_times() -> None:
    _, recorder = train_tiny(batch_size=8, accumulate_grad_batches=2, num_examples=5, num_epochs=2)
    assert recorder.steps == [1, 2]
    order = EpochBatches(5, batch_size=8, min_examples=16, seed=0, rank=0, world_size=1).order(0)
    counts = np.bincount(order, minlength=5)
    assert counts.sum() == 16
    assert counts.max() - counts.min() <= 1


def test_an_epoch_uses_every_example_once_and_the_next_in_another_order() -> None:
    batches = EpochBatches(64, batch_size=8, min_examples=8, seed=3, rank=0, world_size=1)
    orders = [batches.order(epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_ranks_share_each_global_batch_of_one_process() -> None:
    alone = EpochBatches(61, batch_size=12, min_examples=12, seed=0, rank=0, world_size=1)
    ranks = [EpochBatches(61, batch_size=4, min_examples=12, seed=0, rank=r, world_size=3) for r in range(3)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert whole == [key for part in parts for key in part]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_augmentation_depends_on_seed_epoch_and_example_alone(num_workers: int) -> None:
    weights, recorder = train_tiny(train_transform=noisy, num_dataloader_workers=num_workers)
    expected, other = train_tiny(train_transform=noisy)
    assert_equal(weights, expected)
    assert recorder.losses == other.losses


def test_an_augmentation_that_starts_to_draw_late_is_seeded_from_that_example_on() -> None:
    def sometimes(image: torch.Tensor) -> torch.Tensor:
        return image + torch.rand(()) if float(image[0, 0, 0]) > 0.9 else image

    weights, _ = train_tiny(train_transform=sometimes, batch_size=2)
    expected, _ = train_tiny(train_transform=sometimes, batch_size=2, num_dataloader_workers=2)
    assert_equal(weights, expected)


def test_examples_differ_in_their_randomness() -> None:
    from iris_hf.engine.loader import Examples

    examples = Examples(Tensors(), lambda image: torch.rand(()), seed=0, targets_required=True)
    keys = [(epoch, index) for epoch in range(2) for index in range(4)]
    draws = [float(value) for value, _ in examples.__getitems__(keys)]
    assert len(set(draws)) == 8
    assert draws == [float(examples.__getitems__([key])[0][0]) for key in keys]


def draws(examples: list[Any]) -> Any:
    images, labels = zip(*examples, strict=True)
    return 0 * torch.stack(images) + torch.rand(()) + random.random(), torch.stack(labels)


def test_what_a_collate_function_draws_depends_on_the_seed_and_the_batch_alone() -> None:
    def shifts(seed: int, **config: Any) -> list[float]:
        inputs = Inputs()
        train_tiny(plugins=[inputs], collate_function=draws, random_seed=seed, num_epochs=2, **config)
        return inputs.means

    alone = shifts(0)
    assert len(set(alone)) == 16
    assert not set(alone) & set(shifts(1))
    assert shifts(0, num_dataloader_workers=2) == alone
    assert shifts(0, train_transform=noisy) == shifts(0, train_transform=noisy, num_dataloader_workers=2)


class Inputs(iris_hf.Plugin):
    """Notes the mean of every step's inputs."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def transform_batch(self, batch: Any) -> Any:
        self.means.append(float(batch[0].mean()))
        return batch


def test_seeds_zero_is_one_of_them() -> None:
    zero, _ = train_tiny(random_seed=0, dropout=0.5)
    again, _ = train_tiny(random_seed=0, dropout=0.5)
    one, _ = train_tiny(random_seed=1, dropout=0.5)
    assert_equal(zero, again)
    assert not torch.equal(zero["head.weight"], one["head.weight"])


def test_without_a_seed_torchs_generator_decides() -> None:
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(train_tiny(random_seed=None)[0]["head.weight"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_callers_model_and_generators_stay_as_they_are() -> None:
    model = Net(dropout=0.5).eval()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    result = iris_hf.train(model, Tensors(), noisy, num_epochs=1, batch_size=8, base_lr=0.1, random_seed=0)
    assert_equal(before, model.state_dict())
    assert not model.training
    assert result.model is not model
    assert result.model.training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert result.elapsed_time > 0


def test_validation_is_the_mean_loss_per_example() -> None:
    val = Tensors(13, seed=1)
    weights, recorder = train_tiny(val_dataset=val, val_batch_size=4, num_epochs=2)
    model = Net(dropout=0.5).eval()
    model.load_state_dict(weights)
    expected = nn.functional.cross_entropy(model(val.images), val.labels).item()
    assert recorder.val_losses[1] == pytest.approx(expected, rel=1e-5)
    assert list(recorder.val_losses) == [0, 1]


@pytest.mark.parametrize(
    ("interval", "validated"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"val_check_interval_epoch": 3}, [2, 5, 6]),
        ({"val_check_interval": 0.5}, [2, 5, 6]),
        ({"val_check_interval": 0.43}, [2, 5, 6]),
        ({"val_check_interval": 0.01}, [0, 1, 2, 3, 4, 5, 6]),
        ({"val_check_interval": 1.0}, [6]),
    ],
)
def test_validation_happens_at_the_intervals_and_after_the_last_epoch(
    interval: dict[str, Any], validated: list[int]
) -> None:
    _, recorder = train_tiny(val_dataset=Tensors(4), num_epochs=7, **interval)
    assert list(recorder.val_losses) == validated


def test_weight_decay_and_learning_rate_go_to_the_parameters_that_patterns_name() -> None:
    class Groups(iris_hf.Plugin):
        def on_train_start(self, state: iris_hf.TrainState) -> None:
            names = {id(p): name for name, p in state.model.named_parameters()}
            self.found = {
                names[id(p)]: (group["lr"], group["weight_decay"])
                for group in state.optimizer.param_groups
                for p in group["params"]
            }

    groups = Groups()
    iris_hf.train(
        Net(),
        Tensors(8),
        None,
        num_epochs=1,
        batch_size=8,
        base_lr=0.1,
        weight_decay=0.5,
        no_weight_decay_param_names=[r".*\.bias"],
        no_weight_decay_module_class_names=["Sequential"],
        lr_scale_param_names=[["body", 0.1], [".*weight", 2.0]],
        plugins=[groups],
    )
    assert groups.found == {
        "body.1.weight": (pytest.approx(0.01), 0.0),
        "body.1.bias": (pytest.approx(0.01), 0.0),
        "head.weight": (pytest.approx(0.2), 0.5),
        "head.bias": (pytest.approx(0.1), 0.0),
    }


def test_a_pattern_that_matches_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train_tiny(num_epochs=1, no_weight_decay_param_names=["haed"])
    assert "'haed' matches no parameter" in caplog.text


def test_frozen_parameters_stay_and_nothing_to_train_is_an_error() -> None:
    model = Net()
    model.body.requires_grad_(False)
    trained = iris_hf.train(model, Tensors(8), None, num_epochs=1, batch_size=8, base_lr=1.0, weight_decay=0.5).model
    assert torch.equal(trained.body[1].weight, model.body[1].weight)
    assert not torch.equal(trained.head.weight, model.head.weight)
    with pytest.raises(iris_hf.ConfigError, match="Net has no parameter with requires_grad=True"):
        iris_hf.train(model.requires_grad_(False), Tensors(8), None, num_epochs=1)


def test_clipping_bounds_the_norm_of_a_whole_step() -> None:
    class Norms(iris_hf.Plugin):
        def __init__(self) -> None:
            self.norms: list[float] = []

        def on_gradients_ready(self, state: iris_hf.TrainState) -> None:
            gradients = [parameter.grad for parameter in state.model.parameters()]
            self.norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))

    before, after = Norms(), Norms()
    train_tiny(accumulate_grad_batches=2, plugins=[before, "clip_grad_norm(0.2)", after])
    assert max(before.norms) > 0.2
    assert after.norms == pytest.approx([min(norm, 0.2) for norm in before.norms], rel=1e-4)


def test_a_criterion_outside_the_model_is_trained_and_its_loss_may_have_an_axis() -> None:
    model = NormNet()
    trained = iris_hf.train(model, Tensors(16), None, Tensors(8), num_epochs=1, batch_size=8, base_lr=0.1).model
    assert trained.criterion.scale.item() != 1.0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_plugin_draws_depends_on_the_seed_and_the_step_alone(num_workers: int) -> None:
    class Draws(iris_hf.Plugin):
        def __init__(self) -> None:
            self.numbers: list[float] = []

        def transform_batch(self, batch: Any) -> Any:
            self.numbers.append(float(torch.rand(())))
            return batch

    runs = []
    for seed in (0, 0, 1):
        runs.append(Draws())
        train_tiny(plugins=[runs[-1]], random_seed=seed, num_dataloader_workers=num_workers if len(runs) == 1 else 0)
    assert runs[0].numbers == runs[1].numbers
    assert len(set(runs[0].numbers)) == len(runs[0].numbers)
    assert runs[1].numbers != runs[2].numbers


def test_accelerates_state_is_the_callers_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    expected, _ = train_tiny(num_epochs=1)
    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    weights, _ = train_tiny(num_epochs=1)
    assert_equal(weights, expected)
    assert own.mixed_precision == "bf16"
    assert own.gradient_accumulation_steps == 4


def test_bf16_of_the_launcher_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Net16(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            outputs = super().forward(images)
            seen.append(outputs.dtype)
            return outputs

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trained = iris_hf.train(Net16(), Tensors(8), None, Tensors(8), num_epochs=1, batch_size=8).model
    predicted = iris_hf.predict(Tensors(8), trained)
    assert set(seen) == {torch.bfloat16}
    assert trained.head.weight.dtype == torch.float32
    assert len(predicted.predictions) == 8
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    seen.clear()
    iris_hf.predict(Tensors(8), trained)
    assert set(seen) == {torch.float32}  # precision belongs to a run, not to the process


class Indexed(Tensors):
    def __init__(self, bad: Any) -> None:
        super().__init__(16)
        self.bad = bad

    def __getitem__(self, index: int) -> Any:
        return self.bad if index == 9 else super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(3, 4, 4), r"Example 9: the dataset gave Tensor, not a pair \(input, target\)"),
        ((torch.zeros(3, 4, 4), 2), r"Example 9: .*2"),
        ((torch.zeros(3, 4, 4), -1), r"Example 9: .*-1"),
        ((torch.zeros(3, 4, 4), 0.5), "Example 9: .*0.5"),
    ],
)
def test_a_bad_example_is_named(example: Any, message: str, num_workers: int) -> None:
    model = Net()
    model.target_type, model.num_classes = "multiclass", 2
    with pytest.raises(iris_hf.DataError, match=message):
        iris_hf.train(model, Indexed(example), None, num_epochs=1, num_dataloader_workers=num_workers)


def test_an_error_in_the_model_says_where_in_the_run_it_happened() -> None:
    class Exploding(Net):
        def training_step(self, inputs: Any, targets: Any) -> dict[str, torch.Tensor]:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom") as caught:
        iris_hf.train(Exploding(), Tensors(8), None, num_epochs=1, batch_size=4)
    assert caught.value.__notes__ == ["At epoch 0, step 0, on rank 0."]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"optimizer": "adamv"}, "Unknown optimizer 'adamv'. Did you mean 'adam"),
        ({"plugins": ["progresbar"]}, "Unknown plugin 'progresbar'. Did you mean 'progressbar'"),
        ({"plugins": ["log_summary(every=3)"]}, r"Plugin 'log_summary\(every=3\)': got an unexpected keyword"),
        ({"plugins": ["log_summary("]}, "is not of the form name or name"),
        ({"plugins": "log_summary"}, "plugins must be a list"),
        ({"plugins": ["clip_grad_norm(0)"]}, "max_norm must be positive, got 0"),
        ({"num_epochs": 0}, "num_epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"base_lr": -1.0}, "base_lr must not be negative, got -1.0"),
        ({"num_processes": 0}, "num_processes must be at least 1, got 0"),
        ({"num_dataloader_workers": -1}, "num_dataloader_workers must not be negative, got -1"),
        ({"val_check_interval": 0.5, "val_check_interval_epoch": 2}, "give one of them"),
        ({"val_check_interval": 2.0}, r"fraction of num_epochs in \(0, 1\], got 2.0"),
        ({"nesterov": True}, "nesterov=True needs a momentum above 0"),
        ({"nesterov": True, "optimizer": "adam"}, "nesterov=True works with optimizer 'sgd', not with 'adam'"),
        ({"lr_scheduler": {"name": "cosin"}}, "Unknown lr_scheduler 'cosin'. Did you mean"),
        ({"lr_scheduler": {"min_lr": 1.0}}, "min_lr=1.0 is above base_lr=0.1"),
        ({"lr_scheduler": {"warmup": 1}}, "Unknown field of lr_scheduler 'warmup'"),
        ({"lr_scheduler": {"warmup_epochs": 1, "warmup_iters": 1}}, "give one of them"),
        ({"lr_scheduler": {"name": "multistep"}}, "needs decay_milestones"),
        ({"lr_scheduler": "linear"}, "lr_scheduler must be a mapping"),
        ({"lr_scale_param_names": ["head"]}, r"must be a list of \[pattern, factor\], got \['head'\]"),
        ({"base_lr": float("nan")}, "base_lr must be a finite number, got nan"),
        ({"base_lr": float("inf")}, "base_lr must be a finite number, got inf"),
        ({"base_lr": "0.1"}, "base_lr must be a finite number, got '0.1'"),
        ({"random_seed": 1.5}, "random_seed must be a whole number, got 1.5"),
        ({"random_seed": "0"}, "random_seed must be a whole number, got '0'"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"num_processes": 1.5}, "num_processes must be a whole number, got 1.5"),
        ({"num_dataloader_workers": 1.5}, "num_dataloader_workers must be a whole number, got 1.5"),
        ({"val_check_interval": "0.5"}, "val_check_interval must be a finite number, got '0.5'"),
        ({"lr_scheduler": {"warmup_epochs": "1"}}, "lr_scheduler: warmup_epochs must be a whole number, got '1'"),
        ({"lr_scheduler": {"warmup_iters": 2.5}}, "lr_scheduler: warmup_iters must be a whole number, got 2.5"),
        ({"lr_scheduler": {"end_factor": float("nan")}}, "lr_scheduler: end_factor must be a finite number, got nan"),
        ({"lr_scheduler": {"warmup_lr": -1}}, "lr_scheduler: warmup_lr must not be negative, got -1"),
        ({"lr_scheduler": {"decay_milestones": 0.5}}, "must be a list such as .0.5, 0.75., got 0.5"),
        ({"lr_scheduler": {"decay_milestones": [5, 8]}}, r"fractions of the run in \(0, 1\), got 5. For an epoch"),
        (
            {"lr_scheduler": {"decay_milestones": ["a"]}},
            "a number in decay_milestones must be a finite number, got 'a'",
        ),
        ({"lr_scale_param_names": [["head", "10"]]}, "the factor of 'head' must be a finite number, got '10'"),
        ({"lr_scale_param_names": [3]}, r"must be a list of \[pattern, factor\], got \[3\]"),
        ({"no_weight_decay_param_names": [3]}, r"must be a list of patterns, got \[3\]"),
        ({"no_weight_decay_param_names": ["("]}, r"'\(' is no regular expression"),
        ({"no_weight_decay_param_names": "bias"}, "must be a list of patterns, got the string 'bias'"),
        ({"device": "gpu"}, "device must be 'cpu', 'cuda' or None, got 'gpu'"),
        ({"device": "cuda"}, "torch sees no GPU"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(config: dict[str, Any], message: str) -> None:
    if config.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(iris_hf.ConfigError, match=message):
        train_tiny(**config) if "plugins" not in config else iris_hf.train(
            Net(), Tensors(), None, num_epochs=1, **config
        )


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        train_tiny(learning_rate=1.0)


def test_momentum_without_effect_is_said() -> None:
    with pytest.warns(UserWarning, match=r"momentum=0.9 has no effect with optimizer 'adamw'"):
        train_tiny(optimizer="adamw", momentum=0.9, num_epochs=1)


def test_empty_and_streaming_train_sets_are_errors() -> None:
    with pytest.raises(iris_hf.DataError, match="train_dataset is empty"):
        train_tiny(num_examples=0)
    with pytest.raises(iris_hf.DataError, match="val_dataset is empty"):
        train_tiny(val_dataset=Tensors(0))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            yield from Tensors()

    with pytest.raises(iris_hf.ConfigError, match="train_dataset is a Stream without a length"):
        iris_hf.train(Net(), Stream(), None, num_epochs=1)


def test_a_model_without_a_step_is_an_error() -> None:
    with pytest.raises(iris_hf.ConfigError, match="Linear cannot be trained"):
        iris_hf.train(nn.Linear(2, 2), Tensors(), None, num_epochs=1)


def test_a_plugin_of_the_model_runs_first_and_a_stop_ends_the_run_with_a_validation() -> None:
    calls = []

    class Named(iris_hf.Plugin):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_step_end(self, state: iris_hf.TrainState) -> None:
            calls.append(self.name)
            if state.step == 2:
                state.request_stop("enough")

    model = Net()
    model.plugins = [Named("model's")]
    recorder = Recorder()
    iris_hf.train(model, Tensors(), None, Tensors(8), num_epochs=9, batch_size=8, plugins=[Named("caller's"), recorder])
    assert calls == ["model's", "caller's"] * 2
    assert list(recorder.val_losses) == [0]
