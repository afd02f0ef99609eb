"""The benchmark: honest clocks, nothing of the caller changed, and numbers that oracles confirm."""

import contextlib
import copy
import json
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT, run_ranks
from scipy.stats import trim_mean
from tiny import Net, NormNet, Tensors
from torch import nn

import iris_hf
from iris_hf.inference.benchmark import BenchmarkResult, _trimmed_mean, benchmark_model, benchmark_table

CALLS: list[str] = []


class Sleeps(nn.Module):
    """Sleeps for 10 ms in each step; the list says how much longer it sleeps in the calls of each step."""

    def __init__(self, *extra: float) -> None:
        super().__init__()
        self.extra = extra
        CALLS.clear()

    def sleep(self, step: str) -> None:
        number = CALLS.count(step)
        CALLS.append(step)
        time.sleep(0.01 + (self.extra[number] if number < len(self.extra) else 0))

    def training_step(self, inputs: Any, targets: Any) -> Any:
        self.sleep("training")
        return {"loss": torch.tensor(1.0, requires_grad=True)}

    def prediction_step(self, inputs: Any) -> None:
        self.sleep("prediction")


class Predicts(nn.Module):
    def prediction_step(self, inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return inputs


def measure(model: nn.Module, num_examples: int = 40, transform: Any = None, **config: Any) -> BenchmarkResult:
    settings: dict[str, Any] = {"batch_size": 4, "device": "cpu", "num_iterations": 5, **config}
    return benchmark_model(model, Tensors(num_examples), transform, **settings)


def test_times_are_at_least_what_the_steps_take() -> None:
    result = measure(Sleeps())
    assert 0.01 < result.forward_time_per_iteration < result.forward_backward_time_per_iteration
    assert result.prediction_time_per_iteration > 0.01
    assert result.forward_backward_time_p95 >= result.forward_backward_time_p50 > 0.01
    assert result.prediction_time_p95 >= result.prediction_time_p50 > 0.01
    assert result.prediction_throughput == pytest.approx(4 / result.prediction_time_per_iteration)
    assert result.training_throughput == pytest.approx(4 / result.forward_backward_time_per_iteration)
    assert result.max_cuda_memory_in_mb == 0
    assert result.peak_host_memory_in_mb > 50
    json.dumps(result._asdict())


def test_the_first_iteration_and_the_outliers_count_for_nothing() -> None:
    result = measure(Sleeps(0.5, 0, 0.5))
    assert result.forward_time_per_iteration < 0.15
    assert result.prediction_time_per_iteration < 0.15
    assert result.prediction_time_p95 > 0.3


def test_every_step_runs_once_for_each_iteration_once_before_and_once_for_counting() -> None:
    measure(Sleeps(), num_iterations=3)
    assert CALLS == ["training"] * 5 + ["prediction"] * 5
    measure(Sleeps(), num_iterations=1, skip_prediction=True)
    assert CALLS == ["training"] * 3


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9, 10, 14, 15, 100])
def test_means_are_trimmed_by_a_fifth_on_either_side(count: int) -> None:
    values = np.random.default_rng(count).random(count).tolist()
    assert _trimmed_mean(values) == pytest.approx(trim_mean(values, 0.2))


def test_what_is_skipped_is_zero_and_need_not_be_there() -> None:
    result = measure(Predicts(), skip_training=True)
    assert result.forward_backward_time_per_iteration == result.forward_time_per_iteration == 0
    assert result.backward_time_per_iteration == result.training_throughput == 0
    assert result.prediction_time_per_iteration > 0.01
    with pytest.raises(iris_hf.ConfigError, match=r"Predicts cannot be trained.*use skip_training=True"):
        measure(Predicts())
    trained = measure(Net(), skip_prediction=True)
    assert trained.prediction_time_per_iteration == trained.prediction_flops_per_iteration == 0
    assert trained.forward_time_per_iteration > 0


def test_images_without_targets_do_for_prediction_alone() -> None:
    class Bare(Tensors):
        def __getitem__(self, index: int) -> Any:
            return self.images[index]

    benchmark_model(Net(), Bare(), batch_size=2, device="cpu", num_iterations=1, skip_training=True)
    with pytest.raises(iris_hf.DataError, match="Example 0: the dataset gave Tensor, not a pair"):
        benchmark_model(Net(), Bare(), batch_size=2, device="cpu", num_iterations=1)


def test_the_caller_finds_everything_as_it_was() -> None:
    model = NormNet().train()
    model.body.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    measure(model, transform=lambda image: image + torch.rand(1) + random.random() + np.random.random())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert model.head.weight.grad.eq(1).all()
    assert all(p.grad is None for p in model.parameters() if p is not model.head.weight)
    assert model.unsaved == 0
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]


def test_operations_and_parameters_are_those_of_the_layers() -> None:
    result = measure(Net(), batch_size=3)
    forward = 3 * 2 * (48 * 8 + 8 * 2)
    to_inputs = 3 * 2 * (8 * 2)  # the images need no gradient
    assert result.prediction_flops_per_iteration == forward
    assert result.training_flops_per_iteration == 2 * forward + to_inputs
    assert result.num_parameters == result.num_trainable_parameters == 49 * 8 + 9 * 2
    frozen = Net()
    frozen.body.requires_grad_(False)
    assert measure(frozen).num_trainable_parameters == 9 * 2


def test_a_frozen_model_has_nothing_to_train() -> None:
    with pytest.raises(iris_hf.ConfigError, match=r"Net has nothing to train.*skip_training=True"):
        measure(Net().requires_grad_(False))


def test_reading_the_data_has_its_own_time() -> None:
    def slow(image: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return image

    result = measure(Net(), transform=slow)
    assert result.data_time_per_iteration > 0.04
    assert measure(Sleeps()).data_time_per_iteration < 0.04


def test_batches_are_full_and_start_again_after_the_last_example() -> None:
    seen = []

    class Watches(Predicts):
        def prediction_step(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs.flatten().tolist())
            return inputs

    class Numbers(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return torch.tensor(index), 0

    benchmark_model(Watches(), Numbers(), batch_size=4, device="cpu", num_iterations=2, skip_training=True)
    assert seen[:3] == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]


def test_plugins_take_part() -> None:
    class Watcher(iris_hf.Plugin):
        def __init__(self) -> None:
            self.forwards: list[torch.dtype] = []
            self.batches = self.exits = self.ends = 0

        def accelerator_options(self) -> dict[str, Any]:
            return {"mixed_precision": "bf16"}

        def transform_model(self, model: nn.Module) -> nn.Module:
            model.body.register_forward_hook(lambda *args: self.forwards.append(args[-1].dtype))
            return model

        def transform_batch(self, batch: Any) -> Any:
            self.batches += 1
            return batch

        @contextlib.contextmanager
        def forward_context(self) -> Any:
            yield
            self.forwards.append(torch.bool)

        def on_prediction_batch_end(self, state: iris_hf.PredictState) -> None:
            self.ends += 1
            assert (state.batch, state.num_batches) == (self.ends, 3)

        def on_exit(self) -> None:
            self.exits += 1

    watcher = Watcher()
    measure(Net(), num_iterations=2, plugins=[watcher])
    assert watcher.forwards == [torch.bfloat16, torch.bool] * 8
    assert (watcher.batches, watcher.ends, watcher.exits) == (3, 3, 1)


def test_a_compiled_model_is_refused_rather_than_measured_uncompiled() -> None:
    model = Net()
    model.compile(backend="eager")
    with pytest.raises(iris_hf.ConfigError, match=r"Net is compiled, and the copy.*plugins=\['compile'\]"):
        measure(model)
    with pytest.raises(iris_hf.ConfigError, match="OptimizedModule is compiled"):
        measure(torch.compile(Net(), backend="eager"))


def test_a_plugin_that_compiles_is_measured_and_its_operations_are_counted() -> None:
    class Compile(iris_hf.Plugin):
        def transform_model(self, model: nn.Module) -> nn.Module:
            model.compile(backend=lambda graph, inputs: CALLS.append("compiled") or graph.forward)
            return model

    CALLS.clear()
    result = measure(Net(), plugins=[Compile()], skip_training=True)
    assert CALLS == ["compiled"]
    assert result.prediction_flops_per_iteration == 4 * 2 * (48 * 8 + 8 * 2)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"batch_size": 0}, iris_hf.ConfigError, "batch_size must be at least 1, got 0"),
        ({"num_iterations": 0}, iris_hf.ConfigError, "num_iterations must be at least 1, got 0"),
        ({"skip_training": True, "skip_prediction": True}, iris_hf.ConfigError, "leave nothing to measure"),
        ({"device": "tpu"}, iris_hf.ConfigError, "device must be 'cpu', 'cuda' or None, got 'tpu'"),
        ({"plugins": ["progresbar"]}, iris_hf.ConfigError, "Unknown plugin 'progresbar'. Did you mean 'progressbar'"),
        ({"num_examples": 0}, iris_hf.DataError, "dataset is empty"),
        ({"model": "resnet18"}, iris_hf.ConfigError, r"must be a torch.nn.Module, got str"),
        ({"transform": lambda image: 1 / 0}, iris_hf.DataError, "Example 0: ZeroDivisionError"),
    ],
)
def test_a_wrong_argument_says_what_is_wrong(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        measure(**{"model": Net(), **config})


def test_an_error_in_a_step_says_where() -> None:
    class Fails(Predicts):
        def prediction_step(self, inputs: torch.Tensor) -> torch.Tensor:
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost") as caught:
        measure(Fails(), skip_training=True)
    assert caught.value.__notes__ == ["In the prediction step of iteration 0."]


def test_the_table_has_a_line_for_each_result() -> None:
    one = measure(Predicts(), skip_training=True)._replace(
        prediction_time_per_iteration=0.0125, num_parameters=12345678
    )
    lines = benchmark_table({"first": one, "the second": one._replace(batch_size=64)}).splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split()[:3] == ["batch", "predict", "ms"]  # nothing of training
    assert lines[1].split()[:3] == ["first", "4", "12.50"]
    assert lines[2].startswith("the second     64 ")
    assert all(" 12.50 " in line and " 12.35 " in line for line in lines[1:])


def test_a_table_of_several_kinds_has_dashes_where_nothing_was_measured() -> None:
    both, one = measure(Net()), measure(Net(), skip_training=True)
    head, first, second = benchmark_table({"both": both, "one": one}).splitlines()
    assert "forward ms" in head
    assert "GPU MiB" not in head
    assert "-" not in first
    assert second.split()[2:5] == ["-", "-", "-"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_the_gpu_is_that_of_the_model_and_its_activations() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8 * 2**20 // 4))

        def training_step(self, inputs: Any, targets: Any) -> Any:
            return {"loss": (self.weight * 2).exp().sum()}

        def prediction_step(self, inputs: Any) -> None: ...

    held = torch.zeros(2**20, device="cuda")
    result = measure(Large(), device="cuda")
    assert 24 <= result.max_cuda_memory_in_mb < 60  # weights, what exp gives, gradients
    assert measure(Large(), device="cuda", skip_training=True).max_cuda_memory_in_mb < 16
    del held


def test_every_rank_gets_the_times_of_the_slowest() -> None:
    done = run_ranks(2, str(ROOT / "tests/inference/benchmark_rank.py"))
    assert done.returncode == 0, done.stderr
    results = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if "RESULT" in line]
    assert len(results) == 2
    assert results[0] == results[1]
    assert results[0]["prediction_throughput"] == pytest.approx(8 / results[0]["prediction_time_per_iteration"])
