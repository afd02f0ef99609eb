"""Prediction over a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iris_hf.data.workers import closing_workers
from iris_hf.engine.accelerator import Device, needs_local_workers, open_accelerator
from iris_hf.engine.launch import run_in_workers
from iris_hf.engine.loader import (
    Examples,
    Failure,
    OrderedBatches,
    make_loader,
    map_nested,
    to_device,
)
from iris_hf.engine.plans import batches_once
from iris_hf.engine.plugins import Plugin, PluginList, PredictState, load_plugins
from iris_hf.engine.rng import PREDICTION, mix, preserve_generators, seed_generators
from iris_hf.engine.streams import StreamOnce
from iris_hf.errors import DataError, noted, require_integer
from iris_hf.models.steps import Predictor, as_predictor
from iris_hf.types import CollateFunction, Transform

if TYPE_CHECKING:
    from accelerate import Accelerator


class PredictResult(NamedTuple):
    """What prediction returns, on the CPU and in dataset order.

    Attributes:
        predictions: A tensor `[N, ...]`, or a list of N where shapes differ or the model gives lists.
        targets: The same for the targets; None where the dataset has none.
    """

    predictions: Any
    targets: Any


def predict(
    dataset: Dataset[Any],
    model: nn.Module,
    transform: Transform | None = None,
    collate_function: CollateFunction | None = None,
    *,
    batch_size: int = 1,
    device: Device | None = None,
    num_processes: int = 1,
    num_dataloader_workers: int = 4,
    plugins: Sequence[str | Plugin] = (),
) -> PredictResult:
    """Run a model over a dataset.

    Every example is predicted once, whatever the number of processes, and every process returns all results.
    Batches hold the same examples at every world size, so the numbers are the same too.

    Args:
        dataset: index -> `(raw_input, target)`, or a bare input that is not a pair. Or a stream of those.
        model: Has `prediction_step(inputs)`, or `predictor` and `forward`, or `forward`. It runs in eval mode and
            comes back as it was.
        transform: `(raw_input, target) -> (input, target)`, or image-only; None leaves examples as they are.
        collate_function: list of `(input, target)` -> `(inputs_batch, targets_batch)`; the contract's rules when None.
        batch_size: Examples per process.
        device: `"cpu"` or `"cuda"`; what is there when None.
        num_processes: Outside a launcher, local worker processes to start. Inside one its world size rules, and a
            contradicting value is an error.
        num_dataloader_workers: Loader processes per process, at most one per core.
        plugins: Names, with arguments where needed, or Plugin objects.

    Returns:
        Predictions and targets. Tensors of one shape are concatenated; otherwise they come as a list with one
        item per example. Lists, of dicts too, are flattened.

    Raises:
        ConfigError: If the configuration is contradictory.
        DataError: If the dataset is empty, an example is invalid (the message names it), or the model does not
            give one prediction per example.
    """
    require_integer("batch_size", batch_size, at_least=1)
    require_integer("num_dataloader_workers", num_dataloader_workers, at_least=0)
    arguments = (dataset, model, transform, collate_function, batch_size, device, num_dataloader_workers, plugins)
    if needs_local_workers(num_processes):
        result: PredictResult = run_in_workers(_predict_here, *arguments, num_processes=num_processes, device=device)
        return result
    return _predict_here(*arguments)


def _predict_here(
    dataset: Dataset[Any],
    model: nn.Module,
    transform: Transform | None,
    collate_function: CollateFunction | None,
    batch_size: int,
    device: Device | None,
    num_dataloader_workers: int,
    plugins: Sequence[str | Plugin],
) -> PredictResult:
    """Predict in this process, as one rank of its launcher's world."""
    plugin_list = load_plugins(plugins, before=getattr(model, "plugins", ()))
    with open_accelerator(device, **plugin_list.accelerator_options()) as accelerator:
        source, batches = batches_once(
            dataset,
            "dataset",
            batch_size=batch_size,
            seed=0,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        loader = make_loader(
            Examples(source, transform, seed=0, targets_required=False),
            batches,
            collate_function=collate_function,
            num_workers=num_dataloader_workers,
            pin_memory=accelerator.device.type == "cuda",
        )
        with (
            preserve_generators(accelerator.device),
            plugin_list.running(),
            closing_workers(loader),
        ):
            predictor = as_predictor(plugin_list.transform("transform_model", model))
            with _lent(predictor, accelerator.device):
                results = _gathered(_run(accelerator, plugin_list, predictor, loader, batches))
        return PredictResult(*(_joined([result[i] for result in results]) for i in (1, 2)))


@torch.no_grad()
def _run(
    accelerator: Accelerator,
    plugins: PluginList,
    predictor: Predictor,
    loader: Any,
    batches: OrderedBatches | StreamOnce,
) -> list[tuple[int, Any, Any]]:
    """Return the first example, the predictions and the targets of this rank's batches, on the CPU."""
    from accelerate.utils.operations import convert_to_fp32

    model = predictor.model
    num_batches = len(batches) if isinstance(batches, OrderedBatches) else None
    state = PredictState(accelerator=accelerator, model=model, num_batches=num_batches)
    results = []
    plugins.notify("on_prediction_start", state)
    for keys, batch in batches.walk(loader):
        if isinstance(batch, Failure):
            batch.reraise()
        inputs, batch_targets = batch
        seed_generators(mix(0, PREDICTION, keys.start), accelerator.device)
        where = f"On the examples {keys[0]} to {keys[-1]}"
        with noted(lambda where=where: f"{where}."), accelerator.autocast(), plugins.forward_context():  # type: ignore[misc]
            batch_predictions = predictor(to_device(inputs, accelerator.device))
        if accelerator.mixed_precision != "no":  # half precision is for the way there
            batch_predictions = convert_to_fp32(batch_predictions)
        batch_predictions = to_device(batch_predictions, torch.device("cpu"))
        if not _has_one_per_example(batch_predictions, len(keys)):
            raise DataError(
                f"{where} {type(model).__name__} gave {_count(batch_predictions)}. "
                f"It has to give one prediction per example, here {len(keys)}: a tensor [N, ...] or a list."
            )
        if batch_targets is not None and not _has_one_per_example(batch_targets, len(keys)):
            raise DataError(
                f"{where} the collate function gave {_count(batch_targets)} as targets. "
                f"It has to give one per example, here {len(keys)}: a tensor [N, ...] or a list."
            )
        results.append((keys.start, batch_predictions, _own(batch_targets)))
        state.batch += 1
        plugins.notify("on_prediction_batch_end", state)
    plugins.notify("on_prediction_end", state)
    return results


@contextmanager
def _lent(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put a model on the device and in eval mode, and give it back as it was."""
    modes = {module: module.training for module in model.modules()}
    home = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), device)
    try:
        model.to(device).eval()
        yield
    finally:
        model.to(home)
        for module, training in modes.items():
            module.training = training


def _gathered(results: list[tuple[int, Any, Any]]) -> list[tuple[int, Any, Any]]:
    """Return the results of all ranks, in dataset order, on every rank.

    Raises:
        DataError: If there are none: the stream was empty.
    """
    from accelerate.utils import gather_object

    gathered: list[tuple[int, Any, Any]] = sorted(gather_object(results), key=lambda result: result[0])
    if not gathered:
        raise DataError("dataset is empty.")
    return gathered


def _joined(batches: list[Any]) -> Any:
    """Join batches into one tensor where shapes allow, else into one list with an item per example."""
    if all(batch is None for batch in batches):
        return None
    if all(isinstance(batch, Tensor) and batch.shape[1:] == batches[0].shape[1:] for batch in batches):
        return torch.cat(batches)
    return [item for batch in batches for item in batch]


def _own(targets: Any) -> Any:
    """Copy tensors out of page-locked memory, of which there is little."""
    if isinstance(targets, Tensor):
        return targets.clone() if targets.is_pinned() else targets
    return map_nested(_own, targets)


def _has_one_per_example(values: Any, num_examples: int) -> bool:
    """Whether values are a tensor or a list of that length; the length of a dict or a tuple means something else."""
    if isinstance(values, Tensor):
        return values.dim() > 0 and len(values) == num_examples
    return isinstance(values, list) and len(values) == num_examples


def _count(predictions: Any) -> str:
    kind = type(predictions).__name__
    has_length = isinstance(predictions, list) or (isinstance(predictions, Tensor) and predictions.dim() > 0)
    return f"a {kind} of length {len(predictions)}" if has_length else f"a {kind}"
