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


def fake_image_job(notes: Path) -> dict[str, Any]:
    """A job of irisml's public tasks around those of this library, as it was written for the original."""
    return {
        "tasks": [
            {"task": "get_fake_image_classification_dataset", "name": "data", "config": {"num_classes": 2}},
            {
                "task": "get_dataset_split",
                "name": "split",
                "inputs": {"train_dataset": "$output.data.dataset"},
                "config": {"train_val_split": 0.8, "keep_class_distribution": True},
            },
            {"task": "make_tiny"},
            {"task": "make_shrinker"},
            {
                "task": "train",
                "inputs": {
                    "model": "$output.make_tiny.model",
                    "train_dataset": "$output.split.train_dataset",
                    "train_transform": "$output.make_shrinker.transform",
                },
                "config": {**TRAIN, "num_epochs": 5},
            },
            {
                "task": "predict",
                "inputs": {
                    "model": "$output.train.model",
                    "dataset": "$output.split.val_dataset",
                    "transform": "$output.make_shrinker.transform",
                },
                "config": {"batch_size": 8, "num_dataloader_workers": 0},
            },
            {
                "task": "evaluate_accuracy",
                "inputs": {"predictions": "$output.predict.predictions", "targets": "$output.predict.targets"},
            },
            note(notes, "accuracy", "$output.evaluate_accuracy.accuracy"),
        ]
    }


def export_tasks(file: Path) -> list[dict[str, Any]]:
    """Tasks that export the trained model and save the bytes."""
    return [
        {"task": "export_onnx", "inputs": {"model": "$output.train.model"}, "config": {"input_size": 4}},
        {"task": "save_file", "inputs": {"data": "$output.export_onnx.data"}, "config": {"path": str(file)}},
    ]
