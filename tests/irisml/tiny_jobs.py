"""Jobs that take a moment."""

from pathlib import Path
from typing import Any

TRAIN = {"num_epochs": 2, "batch_size": 8, "base_lr": 0.1, "num_dataloader_workers": 0}


def tiny_job(notes: Path, **train: Any) -> dict[str, Any]:
    """Train, predict, evaluate and note the accuracy down."""
    return {
        "tasks": [
            {"task": "make_tiny"},
            {
                "task": "train",
                "inputs": {
                    "model": "$output.make_tiny.model",
                    "train_dataset": "$output.make_tiny.dataset",
                    "train_transform": None,
                },
                "config": {**TRAIN, **train},
            },
            {
                "task": "predict",
                "inputs": {"model": "$output.train.model", "dataset": "$output.make_tiny.dataset"},
                "config": {"batch_size": 8, "num_dataloader_workers": 0},
            },
            {
                "task": "evaluate_accuracy",
                "inputs": {"predictions": "$output.predict.predictions", "targets": "$output.predict.targets"},
            },
            note(notes, "accuracy", "$output.evaluate_accuracy.accuracy"),
        ]
    }


def note(file: Path, text: str, value: Any = None) -> dict[str, Any]:
    """A task that writes a line."""
    inputs = {"inputs": {"value": value}} if value is not None else {}
    return {"task": "note_down", **inputs, "config": {"file": str(file), "text": text}}
