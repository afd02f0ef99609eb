"""Run by run_ranks: trains on streams as the JSON on the command line says; rank 0 saves what came out."""

import json
import shutil
import sys
from typing import Any

import torch
from accelerate import PartialState
from datasets.distributed import split_dataset_by_node
from streams import Interrupt, Interruption, load, to_noisy_tensor, to_tensor, train_stream
from tiny import Net

import iris_hf
from iris_hf.engine.plugins.val_metrics import ValMetrics


class InOrder:
    """A metric that depends on the order of the examples."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def add_batch(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        self.seen += predictions[:, 0].tolist()

    def compute(self) -> dict[str, float]:
        seen, self.seen = self.seen, []
        return {"in_order": sum(position * value for position, value in enumerate(seen))}


class Measured(iris_hf.Plugin):
    """Keeps what validations measured."""

    def __init__(self) -> None:
        self.val_metrics: list[dict[str, float]] = []

    def on_validation_end(self, state: iris_hf.TrainState) -> None:
        self.val_metrics.append(state.val_metrics)


def run(shards: str, buffer_size: int = 0, val: str | None = None, noisy: bool = False, **config: Any) -> Any:
    if noisy:
        config["train_transform"] = to_noisy_tensor
    if val is not None:
        config["val_dataset"] = iris_hf.from_hf(load(val))
    if (interrupted := config.pop("interrupted_at", None)) is not None:
        config["plugins"] = [Interrupt(interrupted)]
    measured = Measured()
    if val is not None:
        config["plugins"] = [ValMetrics(InOrder()), measured]
    try:
        weights, recorder = train_stream(iris_hf.from_hf(load(shards, buffer_size)), **config)
    except Interruption:
        state = PartialState()
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.copytree(config["checkpoint_dir"], config["checkpoint_dir"] + "-copy")
        state.wait_for_everyone()
        return None
    return {"weights": weights, **vars(recorder), **vars(measured)}


if __name__ == "__main__":
    out, runs, predicted = sys.argv[1:]
    results = [run(**arguments) for arguments in json.loads(runs)]
    stream = iris_hf.from_hf(load(predicted))
    result = iris_hf.predict(stream, Net(), to_tensor, batch_size=3, num_dataloader_workers=0)
    refused = []
    for refusable in (
        split_dataset_by_node(load(predicted), rank=0, world_size=2),
        load(predicted, 5, shuffle_seed=None),
    ):
        try:
            train_stream(iris_hf.from_hf(refusable))
        except iris_hf.ConfigError as error:
            refused.append(str(error))
    if PartialState().is_main_process:
        torch.save([*results, {"predictions": result.predictions, "targets": result.targets, "refused": refused}], out)
