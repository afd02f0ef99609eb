"""How long a model takes, what it needs, and tables of it."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from iris_hf.engine.accelerator import Device, open_accelerator
from iris_hf.engine.loader import (
    Examples,
    Failure,
    Key,
    TargetCheck,
    count_examples,
    make_loader,
    to_device,
)
from iris_hf.engine.memory import MIB, peak_host_memory
from iris_hf.engine.plugins import Plugin, PluginList, PredictState, load_plugins
from iris_hf.engine.rng import PREDICTION, STEP, mix, preserve_generators, seed_generators
from iris_hf.engine.strategy import sharding_plugin
from iris_hf.errors import ConfigError, noted, require_integer
from iris_hf.models.steps import Predictor, Trainable, as_predictor, as_trainable
from iris_hf.types import Transform

if TYPE_CHECKING:
    from accelerate import Accelerator

_TRIMMED = 0.2
_NOTHING = "-"
_Times = dict[str, list[float]]
"""Seconds of every iteration, by what was done in it."""


class BenchmarkResult(NamedTuple):
    """What a benchmark measured. Times are in seconds, and 0 for what was skipped; an iteration is one batch.

    `result._asdict()` is JSON, and :func:`benchmark_table` prints results below each other.

    Attributes:
        forward_backward_time_per_iteration: The sum of the next two.
        forward_time_per_iteration: Trimmed mean of the training step's forward pass, loss included.
        backward_time_per_iteration: Trimmed mean of its backward pass, with the averaging of gradients over processes.
        prediction_time_per_iteration: Trimmed mean of the prediction step.
        max_cuda_memory_in_mb: Most memory in MiB that torch held on the GPU, less what it held before; 0 on a CPU.
        training_throughput: Examples per second of forward and backward pass, over all processes.
        prediction_throughput: Examples per second of prediction, over all processes.
        forward_backward_time_p50: Median.
        forward_backward_time_p95: 95th percentile.
        prediction_time_p50: Median.
        prediction_time_p95: 95th percentile.
        data_time_per_iteration: Trimmed mean of reading, transforming and collating a batch in this process and moving
            it to the device, which the other times leave out.
        peak_host_memory_in_mb: Most resident memory of this process in MiB, the libraries included, in the benchmark
            (on Linux; elsewhere since the process began).
        training_flops_per_iteration: Floating-point operations of forward and backward pass on one process; see the
            next.
        prediction_flops_per_iteration: Those of prediction. torch's counter sees matrix products, convolutions and
            attention, a multiplication and an addition as two, and nothing that runs outside torch.
        num_parameters: Numbers in the model's parameters.
        num_trainable_parameters: Those that require a gradient.
        batch_size: Examples per iteration and process.
    """

    forward_backward_time_per_iteration: float
    forward_time_per_iteration: float
    backward_time_per_iteration: float
    prediction_time_per_iteration: float
    max_cuda_memory_in_mb: float
    training_throughput: float
    prediction_throughput: float
    forward_backward_time_p50: float
    forward_backward_time_p95: float
    prediction_time_p50: float
    prediction_time_p95: float
    data_time_per_iteration: float
    peak_host_memory_in_mb: float
    training_flops_per_iteration: int
    prediction_flops_per_iteration: int
    num_parameters: int
    num_trainable_parameters: int
    batch_size: int


def benchmark_model(
    model: nn.Module,
    dataset: Dataset[Any],
    transform: Transform | None = None,
    *,
    batch_size: int,
    device: Device | None = None,
    num_iterations: int = 10,
    skip_training: bool = False,
    skip_prediction: bool = False,
    plugins: Sequence[str | Plugin] = (),
) -> BenchmarkResult:
    """Measure the training step and the prediction step of a model on batches of a dataset.

    One iteration goes before the measured ones. Of these the fastest and the slowest 20 % are left out of the means.
    Clocks are read when the device has finished. No optimizer steps, and the model that is measured is a copy.

    Args:
        model: As `train` and `predict` take it.
        dataset: index -> `(raw_input, target)`; a bare input will do with `skip_training`. Batches are always full: a
            small dataset is gone through several times.
        transform: `(raw_input, target) -> (input, target)`, or image-only; None leaves examples as they are.
        batch_size: Examples per iteration and process.
        device: `"cpu"` or `"cuda"`; what is there when None.
        num_iterations: Measured iterations of each kind.
        skip_training: Whether to leave out the training step, which the model then need not have.
        skip_prediction: Whether to leave out prediction.
        plugins: Names, with arguments where needed, or Plugin objects. Their `accelerator_options`, `transform_model`,
            `transform_batch` (in training), `forward_context` and what watches a prediction count; what watches a
            training run needs an optimizer, and is not called. `"compile"` measures the compiled model.

    Returns:
        Times, rates, memory and sizes. In a launcher's world every process gets the same: the times of the slowest.

    Raises:
        ConfigError: If the configuration is contradictory, the model has no training step (`skip_training` leaves it
            out) or nothing to train, or it is compiled already.
        DataError: If the dataset is empty or an example is invalid; the message names it.
    """
    for name, value in (("batch_size", batch_size), ("num_iterations", num_iterations)):
        require_integer(name, value, at_least=1)
    if skip_training and skip_prediction:
        raise ConfigError("skip_training and skip_prediction leave nothing to measure. Leave one of them out.")
    num_examples = count_examples(dataset, "dataset")
    plugin_list = load_plugins(plugins, before=getattr(model, "plugins", ()))
    measured = plugin_list.transform("transform_model", _copy(model))
    trainable = None if skip_training else _as_trainable(measured)
    predictor = None if skip_prediction else as_predictor(measured)
    with open_accelerator(device, **plugin_list.accelerator_options()) as accelerator:
        if sharding_plugin(accelerator) is not None:
            raise ConfigError("benchmark_model measures whole models, and the launcher chose FSDP2: use --multi_gpu.")
        examples = Examples(
            dataset,
            transform,
            seed=0,
            targets_required=not skip_training,
            check=None if skip_training else TargetCheck.of(measured),
        )
        keys = _cycle(num_examples, batch_size, num_iterations + 1, rank=accelerator.process_index)
        on_gpu = accelerator.device.type == "cuda"
        loader = make_loader(examples, keys, collate_function=None, num_workers=0, pin_memory=on_gpu)
        training: _Times = {}
        prediction: _Times = {}
        training_flops = prediction_flops = 0
        memory = _MemoryPeaks(accelerator.device)
        with preserve_generators(accelerator.device), plugin_list.running():
            if trainable is not None:
                training, training_flops = _measure_training(accelerator, plugin_list, loader, trainable)
            if predictor is not None:
                prediction, prediction_flops = _measure_prediction(accelerator, plugin_list, loader, predictor)
        peaks = _slowest({"cuda": [memory.cuda()], "host": [peak_host_memory()]})
        training, prediction = _slowest(training), _slowest(prediction)
        num_processes = accelerator.num_processes
    parameters = list(measured.parameters())
    forward, backward = training.get("forward", []), training.get("backward", [])
    both = [f + b for f, b in zip(forward, backward, strict=True)]
    predicting = prediction.get("prediction", [])
    training_time = _trimmed_mean(forward) + _trimmed_mean(backward)
    prediction_time = _trimmed_mean(predicting)
    return BenchmarkResult(
        forward_backward_time_per_iteration=training_time,
        forward_time_per_iteration=_trimmed_mean(forward),
        backward_time_per_iteration=_trimmed_mean(backward),
        prediction_time_per_iteration=prediction_time,
        max_cuda_memory_in_mb=peaks["cuda"][0],
        training_throughput=batch_size * num_processes / training_time if both else 0.0,
        prediction_throughput=batch_size * num_processes / prediction_time if predicting else 0.0,
        forward_backward_time_p50=_percentile(both, 50),
        forward_backward_time_p95=_percentile(both, 95),
        prediction_time_p50=_percentile(predicting, 50),
        prediction_time_p95=_percentile(predicting, 95),
        data_time_per_iteration=_trimmed_mean(training.get("data", []) + prediction.get("data", [])),
        peak_host_memory_in_mb=peaks["host"][0],
        training_flops_per_iteration=training_flops,
        prediction_flops_per_iteration=prediction_flops,
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        batch_size=batch_size,
    )


def benchmark_table(results: Mapping[str, BenchmarkResult]) -> str:
    """Lay out results for a terminal, one line for each.

    Args:
        results: What :func:`benchmark_model` returned, by the name that its line gets.

    Returns:
        Lines of equal width. Times are in milliseconds per iteration. What was not measured is a dash, and a column
        without any measurement is left out.
    """
    measured = {head: [show(r) for r in results.values()] for head, show in _COLUMNS.items()}
    columns = [["", *results], ["batch", *(str(r.batch_size) for r in results.values())]]
    columns += [[head, *cells] for head, cells in measured.items() if set(cells) != {_NOTHING}]
    names, *numbers = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
    names = [name.strip().ljust(len(name)) for name in names]
    return "\n".join("  ".join(line) for line in zip(names, *numbers, strict=True))


def _number(field: str, factor: float, digits: int) -> Callable[[BenchmarkResult], str]:
    def show(result: BenchmarkResult) -> str:
        value = getattr(result, field) * factor
        return f"{value:,.{digits}f}" if value else _NOTHING

    return show


_COLUMNS: dict[str, Callable[[BenchmarkResult], str]] = {
    "forward ms": _number("forward_time_per_iteration", 1e3, 2),
    "backward ms": _number("backward_time_per_iteration", 1e3, 2),
    "train ex/s": _number("training_throughput", 1, 0),
    "predict ms": _number("prediction_time_per_iteration", 1e3, 2),
    "p50": _number("prediction_time_p50", 1e3, 2),
    "p95": _number("prediction_time_p95", 1e3, 2),
    "predict ex/s": _number("prediction_throughput", 1, 0),
    "data ms": _number("data_time_per_iteration", 1e3, 2),
    "GFLOP": _number("prediction_flops_per_iteration", 1e-9, 3),
    "M params": _number("num_parameters", 1e-6, 2),
    "host MiB": _number("peak_host_memory_in_mb", 1, 0),
    "GPU MiB": _number("max_cuda_memory_in_mb", 1, 0),
}


class _Clock:
    """Reads the time when the device has finished.

    Attributes:
        seconds: What every block took, by the name of its kind.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._device = device

    @contextmanager
    def measuring(self, kind: str) -> Iterator[None]:
        self._synchronise()
        start = time.perf_counter()
        yield
        self._synchronise()
        self.seconds[kind].append(time.perf_counter() - start)

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _measure_training(
    accelerator: Accelerator, plugins: PluginList, loader: Any, trainable: Trainable
) -> tuple[_Times, int]:
    """Return the times of the training steps, and the floating-point operations of one."""
    step = accelerator.prepare_model(trainable.train())
    clock = _Clock(accelerator.device)

    def train(batch: tuple[Any, Any], clock: _Clock) -> None:
        with plugins.forward_context(), clock.measuring("forward"):
            loss = step(*batch)["loss"]
        if not loss.requires_grad:
            raise ConfigError(
                f"{type(trainable.model).__name__} has nothing to train: its loss depends on no parameter that "
                "requires a gradient. Unfreeze one, or measure prediction alone with skip_training=True."
            )
        with clock.measuring("backward"):
            accelerator.backward(loss)
        trainable.zero_grad()

    for iteration, batch in enumerate(_batches(loader, accelerator.device, clock)):
        seed_generators(mix(0, STEP, iteration), accelerator.device)
        batch = plugins.transform("transform_batch", batch)
        with noted(lambda iteration=iteration: f"In the training step of iteration {iteration}."):  # type: ignore[misc]
            train(batch, clock)
    return _after_the_first(clock), _count_operations(lambda: train(batch, _Clock(accelerator.device)))


@torch.no_grad()
def _measure_prediction(
    accelerator: Accelerator, plugins: PluginList, loader: Any, predictor: Predictor
) -> tuple[_Times, int]:
    """Return the times of the prediction steps, and the floating-point operations of one."""
    predictor.to(accelerator.device).eval()
    clock = _Clock(accelerator.device)

    def predict(inputs: Any, clock: _Clock) -> None:
        with accelerator.autocast(), plugins.forward_context(), clock.measuring("prediction"):
            predictor(inputs)

    state = PredictState(accelerator=accelerator, model=predictor.model, num_batches=len(loader))
    plugins.notify("on_prediction_start", state)
    for iteration, (inputs, _) in enumerate(_batches(loader, accelerator.device, clock)):
        seed_generators(mix(0, PREDICTION, iteration), accelerator.device)
        with noted(lambda iteration=iteration: f"In the prediction step of iteration {iteration}."):  # type: ignore[misc]
            predict(inputs, clock)
        state.batch += 1
        plugins.notify("on_prediction_batch_end", state)
    plugins.notify("on_prediction_end", state)
    return _after_the_first(clock), _count_operations(lambda: predict(inputs, _Clock(accelerator.device)))


def _batches(loader: Any, device: torch.device, clock: _Clock) -> Iterator[tuple[Any, Any]]:
    """Yield the batches, on the device."""
    batches = iter(loader)
    for _ in range(len(loader)):
        with clock.measuring("data"):
            batch = next(batches)
            if isinstance(batch, Failure):
                batch.reraise()
            inputs, targets = to_device(batch, device)
        yield inputs, targets


def _cycle(num_examples: int, batch_size: int, num_batches: int, *, rank: int) -> list[list[Key]]:
    """Return the keys of full batches: this rank's, in dataset order, from the beginning again after the end."""
    starts = range(rank * num_batches * batch_size, (rank + 1) * num_batches * batch_size, batch_size)
    return [[divmod(i, num_examples) for i in range(start, start + batch_size)] for start in starts]


def _copy(model: nn.Module) -> nn.Module:
    """Copy a model that is not compiled."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"A model must be a torch.nn.Module, got {type(model).__name__}.")
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise ConfigError(
            f"{type(model).__name__} is compiled, and the copy of it that is measured would not be. Pass the model as "
            "it was before, and plugins=['compile']."
        )
    return copy.deepcopy(model)


def _as_trainable(model: nn.Module) -> Trainable:
    try:
        return as_trainable(model)
    except ConfigError as error:
        raise ConfigError(f"{error} To measure prediction alone, use skip_training=True.") from error


def _count_operations(function: Callable[[], None]) -> int:
    """Count the floating-point operations of a function, whose compiled parts run uncompiled."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


def _after_the_first(clock: _Clock) -> _Times:
    return {kind: seconds[1:] for kind, seconds in clock.seconds.items()}


def _slowest(times: _Times) -> _Times:
    """Return the longest of the ranks' times, iteration by iteration."""
    from accelerate.utils import gather_object

    return {
        kind: [max(ranks) for ranks in zip(*gather_object([seconds]), strict=True)] for kind, seconds in times.items()
    }


def _trimmed_mean(values: Sequence[float]) -> float:
    """Return the mean without the smallest and the largest 20 % (rounded down); 0 of no values."""
    cut = int(len(values) * _TRIMMED)
    kept = sorted(values)[cut : len(values) - cut]
    return statistics.fmean(kept) if kept else 0.0


def _percentile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent)) if values else 0.0


class _MemoryPeaks:
    """The most memory that is used from now on."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._cuda_before = 0
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._cuda_before = torch.cuda.memory_allocated(self._cuda)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak

    def cuda(self) -> float:
        """MiB that torch holds on the GPU at most, less what it held before."""
        if self._cuda is None:
            return 0.0
        return (torch.cuda.max_memory_allocated(self._cuda) - self._cuda_before) / MIB
