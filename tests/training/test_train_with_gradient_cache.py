"""The task: the same steps as plain training, whatever the sub-batches, processes, precision and plugins."""

import inspect
import json
import logging
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import DictTowers, Pairs, TwoTowers
from tiny import Net, Recorder, Tensors
from torch import Tensor, nn

import iris_hf
from iris_hf.engine.plugins.hyper_parameters import hyper_parameters

SETTINGS: dict[str, Any] = {
    "num_epochs": 3,
    "batch_size": 12,
    "base_lr": 0.1,
    "random_seed": 0,
    "num_dataloader_workers": 0,
    "lr_scheduler": {"name": "linear"},
}


def run(model: nn.Module, train_dataset: Any = None, **config: Any) -> tuple[dict[str, Tensor], Recorder]:
    """Train, with a cache where `sub_batch_size` is given; return the weights and what was recorded."""
    recorder = Recorder()
    task = iris_hf.train_with_gradient_cache if "sub_batch_size" in config else iris_hf.train
    settings = {**SETTINGS, **config, "plugins": [recorder, *config.get("plugins", ())]}
    dataset = train_dataset or Pairs(60)
    result = task(
        model,
        dataset,
        None,
        config.pop("val_dataset", Pairs(20)),
        **{k: v for k, v in settings.items() if k != "val_dataset"},
    )
    return result.model.state_dict(), recorder


def assert_same(got: tuple[dict[str, Tensor], Recorder], wanted: tuple[dict[str, Tensor], Recorder]) -> None:
    assert got[1].losses == pytest.approx(wanted[1].losses, rel=1e-8)
    assert got[1].val_losses == pytest.approx(wanted[1].val_losses, rel=1e-8)
    for name, weight in wanted[0].items():
        torch.testing.assert_close(got[0][name], weight, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("model", [TwoTowers("clip"), TwoTowers("unicl"), TwoTowers("siglip"), DictTowers()])
def test_the_cache_takes_the_steps_of_plain_training(model: nn.Module) -> None:
    assert_same(run(model, sub_batch_size=5, check_replay=True), run(model))


def test_accumulation_and_clipping_are_those_of_whole_batches() -> None:
    config = {"accumulate_grad_batches": 3, "plugins": ["clip_grad_norm(0.05)"], "optimizer": "adamw"}
    wanted = run(TwoTowers(), **config)
    assert_same(run(TwoTowers(), sub_batch_size=5, **config), wanted)
    assert_same(run(TwoTowers(), sub_batch_size=5, num_kept_graphs=1, **config), wanted)
    unclipped = run(TwoTowers(), sub_batch_size=5, **{**config, "plugins": []})
    assert unclipped[1].losses != pytest.approx(wanted[1].losses, rel=1e-4)


def test_two_local_processes_take_the_steps_of_one() -> None:
    wanted = run(TwoTowers("unicl"), sub_batch_size=5)
    got = run(TwoTowers("unicl"), sub_batch_size=4, batch_size=6, num_processes=2, num_kept_graphs=1)
    # validation batches are of batch_size pairs, and a pair's loss depends on the others in its batch
    got[1].val_losses = wanted[1].val_losses
    assert_same(got, wanted)


class Bf16(iris_hf.Plugin):
    def accelerator_options(self) -> dict[str, Any]:
        return {"mixed_precision": "bf16"}


def test_bf16_gives_what_plain_training_gives_in_bf16() -> None:
    config = {"plugins": [Bf16()], "train_dataset": Pairs(60, torch.float32), "val_dataset": Pairs(20, torch.float32)}
    plain = run(TwoTowers(dtype=torch.float32), **config)
    cached = run(TwoTowers(dtype=torch.float32), sub_batch_size=5, **config)
    assert cached[1].losses == pytest.approx(plain[1].losses, rel=1e-3)
    single = run(TwoTowers(dtype=torch.float32), **{**config, "plugins": []})
    assert single[1].losses != plain[1].losses


def test_what_the_criterion_measures_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "iris_hf"):
        run(TwoTowers("clip"), sub_batch_size=5, plugins=["log_summary"])
    lines = [line for line in caplog.messages if line.startswith("epoch 3/3: loss")]
    assert re.search(
        r"loss \d\.\d+, temperature 0\.\d+, image_to_text_r1 0\.\d+, text_to_image_r1 0\.\d+, .* examples/s", lines[0]
    )
    assert "the graph of a sub-batch of 5 holds" in caplog.text


def test_its_signature_is_that_of_train_and_its_own() -> None:
    ours, base = (
        dict(inspect.signature(task).parameters) for task in (iris_hf.train_with_gradient_cache, iris_hf.train)
    )
    assert list(ours) == [*base, "sub_batch_size", "num_kept_graphs", "memory_budget_in_mb", "check_replay"]
    assert all(ours[name] == parameter for name, parameter in base.items())
    with pytest.raises(TypeError, match="num_epoch"):
        iris_hf.train_with_gradient_cache(TwoTowers(), Pairs(), None, num_epoch=1)


class Wrong(TwoTowers):
    """Returns what it is told to, in place of features."""

    def __init__(self, features: Any) -> None:
        super().__init__()
        self.features = features

    def forward(self, inputs: Any) -> Any:
        return self.features(super().forward(inputs))


@pytest.mark.parametrize(
    ("model", "config", "error", "message"),
    [
        (TwoTowers(), {"sub_batch_size": 0}, iris_hf.ConfigError, "sub_batch_size must be .*1.* got 0"),
        (TwoTowers(), {"sub_batch_size": 4.0}, iris_hf.ConfigError, "sub_batch_size must be .* got 4.0"),
        (TwoTowers(), {"sub_batch_size": "4"}, iris_hf.ConfigError, "sub_batch_size must be .* got '4'"),
        (TwoTowers(), {"num_kept_graphs": -1}, iris_hf.ConfigError, "num_kept_graphs must .* got -1"),
        (
            TwoTowers(),
            {"num_kept_graphs": 1, "memory_budget_in_mb": 5},
            iris_hf.ConfigError,
            "num_kept_graphs=1 and memory_budget_in_mb=5 say different things",
        ),
        (TwoTowers(), {"memory_budget_in_mb": -5}, iris_hf.ConfigError, "memory_budget_in_mb must .* got -5"),
        (TwoTowers(), {"memory_budget_in_mb": torch.inf}, iris_hf.ConfigError, "memory_budget_in_mb must .* got inf"),
        (
            TwoTowers(norm=True),
            {"sub_batch_size": 11},
            iris_hf.ConfigError,
            "BatchNorm cannot normalise a single example: the sub-batches have 11, 1. Choose another sub_batch_size",
        ),
        (nn.Linear(2, 2), {}, iris_hf.ConfigError, "Linear has no criterion"),
        (Wrong(lambda f: "text"), {}, iris_hf.ConfigError, "forward that returns a feature tensor.*got str"),
        (Wrong(lambda f: ()), {}, iris_hf.ConfigError, "forward that returns a feature tensor.*got tuple"),
        (
            Wrong(lambda f: (f[0], f[1][1:], f[2])),
            {},
            iris_hf.ConfigError,
            r"Feature 1 has the shape \[4, 5\] for a sub-batch of 5 examples, and must have a row for each",
        ),
        (
            Wrong(lambda f: {"image": f[0], "aux": f[0][0, 0]}),
            {},
            iris_hf.ConfigError,
            "Feature 'aux' is a scalar from .* to .*, and must be the same for every sub-batch",
        ),
        (
            Wrong(lambda f: list(f[0])),
            {},
            iris_hf.ConfigError,
            "forward returned 5, 5, 2 tensors .* torch.stack",
        ),
        (
            Wrong(lambda f: (f[0][:, : 2 + len(f[0]) // 2], *f[1:])),
            {},
            iris_hf.ConfigError,
            r"Feature 0 has rows of the shapes \[4\], \[3\] in the sub-batches of one micro-batch. Pad them",
        ),
        (Wrong(lambda f: list(f[0])), {"sub_batch_size": 4}, iris_hf.ConfigError, r"Feature 0 has the shape \[5\]"),
        (Wrong(lambda f: (f[0][:, 1:], *f[1:])), {}, iris_hf.DataError, r"image_features \[12, 4\]"),
        (
            Wrong(lambda f: (f[0] * torch.nan, *f[1:])),
            {},
            iris_hf.DataError,
            r"loss is nan: feature tensors 0 .*step 0",
        ),
        (Wrong(lambda f: [t.detach() for t in f]), {}, iris_hf.ConfigError, "there is nothing to train"),
    ],
)
def test_errors_say_what_is_wrong(
    model: nn.Module, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        run(model, **{"sub_batch_size": 5, **config})


def test_unicl_without_labels_says_so() -> None:
    class Unlabelled(Pairs):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[0], None

    with pytest.raises(iris_hf.DataError, match="unicl needs the label of every pair"):
        run(TwoTowers("unicl"), Unlabelled(), sub_batch_size=5)


def test_inputs_of_different_lengths_are_an_error() -> None:
    def collate(examples: list[Any]) -> Any:
        images = torch.stack([image for (image, _), _ in examples])
        return (images, images[1:, :4]), None

    with pytest.raises(iris_hf.DataError, match="parts of 11, 12 examples"):
        iris_hf.train_with_gradient_cache(
            TwoTowers(), Pairs(60), None, collate_function=collate, sub_batch_size=5, **SETTINGS
        )


@pytest.mark.parametrize("config", [{}, {"sub_batch_size": 5}])
def test_a_batch_of_one_pair_is_an_error_in_training_alone(config: dict[str, Any]) -> None:
    with pytest.raises(iris_hf.ConfigError, match=r"batch is one pair, and clip learns .* larger batch_size"):
        run(TwoTowers(), batch_size=1, num_epochs=1, **config)
    _, validated = run(TwoTowers(), val_dataset=Pairs(13), num_epochs=1, **config)  # the last batch is one pair
    assert validated.val_losses[0] > 0
    _, sigmoids = run(TwoTowers("siglip"), batch_size=1, num_epochs=1, **config)  # has a loss for a pair
    assert sigmoids.losses[-1] > 0


def test_trackers_are_told_how_a_batch_is_divided() -> None:
    told: list[dict[str, Any]] = []

    class Tracker(iris_hf.Plugin):
        def on_train_start(self, state: iris_hf.TrainState) -> None:
            told.append(hyper_parameters(state))

    run(TwoTowers(), num_epochs=1, sub_batch_size=5, num_kept_graphs=1, plugins=[Tracker()])
    assert (told[0]["sub_batch_size"], told[0]["num_kept_graphs"], told[0]["batch_size"]) == (5, 1, 12)


def test_a_classifier_with_a_criterion_trains_with_the_cache() -> None:
    plain, cached = (run(Net(), Tensors(60), val_dataset=Tensors(20), **c) for c in ({}, {"sub_batch_size": 5}))
    assert cached[1].losses == pytest.approx(plain[1].losses, rel=1e-5)
    assert cached[1].val_losses == pytest.approx(plain[1].val_losses, rel=1e-5)


@pytest.mark.parametrize("settings", [{"num_kept_graphs": 0}, {"num_kept_graphs": 2}, {"memory_budget_in_mb": 1.0}])
def test_a_step_leaves_nothing_of_its_batch_in_memory(settings: dict[str, Any]) -> None:
    """Also of the first, whose graph is measured."""
    alive: list[list[Any]] = []
    batches: list[weakref.ref[Tensor]] = []

    class Watch(iris_hf.Plugin):
        def transform_batch(self, batch: Any) -> Any:
            batches.append(weakref.ref(batch[0][0]))
            return batch

        def on_step_end(self, state: iris_hf.TrainState) -> None:
            alive.append([reference() for reference in batches])

    run(TwoTowers(), Pairs(24), sub_batch_size=3, num_epochs=2, plugins=[Watch()], **settings)
    assert alive
    assert all(batch is None for step in alive for batch in step)


class Wandering(Net):
    """A frozen body, and a head whose buffers go on with every forward."""

    def __init__(self, looks_twice: bool) -> None:
        super().__init__()
        self.body.requires_grad_(False)
        self.head = nn.utils.parametrizations.spectral_norm(self.head)
        if looks_twice:  # what hangs on a hook is computed again, without a trial
            self.body.register_forward_hook(lambda *_: None)


def test_finding_out_what_can_be_replayed_leaves_no_trace() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = Wandering(looks_twice=False)
    watched = Wandering(looks_twice=True)
    watched.load_state_dict(plain.state_dict())
    settings = {"num_epochs": 1, "batch_size": 8, "sub_batch_size": 3, "base_lr": 0.1, "random_seed": 0}
    states = [
        iris_hf.train_with_gradient_cache(model, Tensors(16), None, num_dataloader_workers=0, **settings).model
        for model in (plain, watched)
    ]
    for name, value in states[0].state_dict().items():
        assert torch.equal(value, states[1].state_dict()[name]), name


def test_numbers_of_numpy_go_into_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {"num_epochs": 1, "batch_size": 8, "sub_batch_size": np.int64(4), "num_dataloader_workers": 0}
    iris_hf.train_with_gradient_cache(Net(), Tensors(16), None, checkpoint_dir=folder, random_seed=0, **settings)
    (written,) = folder.glob("step-*/checkpoint.json")
    assert json.loads(written.read_text())["facts"]["settings"]["sub_batch_size"] == 4
