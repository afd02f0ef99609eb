"""Run by run_ranks: trains with plugins; rank 0 saves what came out on every rank."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tiny import NormNet, Tensors, train_tiny

import iris_hf
from iris_hf.engine.plugins.val_metrics import ValMetrics

AVERAGED = ["ema(0.9, 3)", "clip_grad_norm(0.05)"]
BREAKS_AT = 5
BROKEN_IMAGE = float("nan")


def measured(folder: Path) -> list[Any]:
    return [
        ValMetrics(Accuracy()),
        f"log_tensorboard({str(folder / 'logs')!r}, every=3, num_images=3)",
        f"save_best({str(folder / 'best')!r})",
        "early_stopping(2, metric='accuracy', mode='max')",
    ]


class Accuracy:
    """A metric in the form of evaluate's, whose import takes seconds on every rank."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def add_batch(self, predictions: torch.Tensor, references: torch.Tensor) -> None:
        self.right += (predictions.argmax(1) == references).tolist()

    def compute(self) -> dict[str, float]:
        right, self.right = self.right, []
        return {"accuracy": sum(right) / len(right), "num_examples": len(right)}


class BreaksOnTheLastRank(iris_hf.Plugin):
    """Makes the inputs of one step not a number, on one rank."""

    def __init__(self) -> None:
        self.step = 0

    def on_train_start(self, state: iris_hf.TrainState) -> None:
        self.is_last = state.accelerator.is_last_process

    def transform_batch(self, batch: Any) -> Any:
        self.step += 1
        return (batch[0] * BROKEN_IMAGE, batch[1]) if self.is_last and self.step == BREAKS_AT else batch


class Last(iris_hf.Plugin):
    """Keeps what the last validation measured."""

    def on_validation_end(self, state: iris_hf.TrainState) -> None:
        self.measured = {"val_loss": state.val_loss, **state.val_metrics}


def run(folder: Path, *, batch_size: int) -> dict[str, Any]:
    last = Last()
    settings = {"accumulate_grad_batches": 2, "num_examples": 61, "batch_size": batch_size}
    weights, recorder = train_tiny(plugins=AVERAGED, val_dataset=Tensors(13, seed=1), **settings)
    halved, _ = train_tiny(plugins=["amp", *AVERAGED], **settings)
    broken, broken_recorder = train_tiny(
        plugins=[BreaksOnTheLastRank(), "stop_if_loss_is_nan"], num_examples=61, batch_size=batch_size
    )
    watched = {"val_dataset": Tensors(13, seed=1), "val_batch_size": 3, "num_epochs": 4}
    _, watched_recorder = train_tiny(plugins=[*measured(folder), last], batch_size=batch_size, **watched)
    return {
        "averaged": weights,
        "halved": halved,
        "averaged_val_losses": recorder.val_losses,
        "broken": broken,
        "broken_steps": broken_recorder.steps,
        "measured": last.measured,
        "watched_steps": len(watched_recorder.steps),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = run(folder, batch_size=4)
    settings = {"num_epochs": 2, "batch_size": 4, "base_lr": 0.1, "random_seed": 0, "num_dataloader_workers": 0}
    model = iris_hf.train(NormNet(), Tensors(32), None, Tensors(8), **settings, plugins=["ema(0.9, 2)"]).model
    results["norm"] = [*model.parameters(), *model.buffers()]
    everyone = gather_object([results])
    if PartialState().is_main_process:
        torch.save(everyone, folder / "out.pt")
