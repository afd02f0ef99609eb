"""Data sets of random targets whose images cannot be read, for tests of sampling."""

from typing import Any

import datasets
import numpy as np
import torch
from data_examples import hf_arguments, make_target, noise

from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import HFDataset, from_hf

LABELLED_KINDS = ["multiclass", "multilabel", "detection", "segmentation", "overlapping", "labelled_image_text"]


class WithTargets(torch.utils.data.Dataset):
    """Tells its targets and cannot be read otherwise."""

    def __init__(self, targets: list[Any]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an example was read")

    def get_targets(self, index: int) -> Any:
        return self.targets[index]


def make_targets(kind: str, count: int = 30, seed: int = 0) -> list[Any]:
    return [make_target(kind, 1000 * seed + index) for index in range(count)]


def make_hf(kind: str, targets: list[Any], broken: bool = True) -> HFDataset:
    """A Hugging Face data set with a column `row` of row numbers; a broken one has bytes that are no image."""
    images = [noise(index) for index in range(len(targets))]
    raw = [(image, "a text") for image in images] if "image_text" in kind else images
    converted = to_hf(list(zip(raw, targets, strict=True)), **hf_arguments(kind))
    if broken:
        stored = [{"bytes": f"image {index}".encode(), "path": None} for index in range(len(targets))]
        converted = converted.remove_columns("image").add_column("image", stored, feature=datasets.Image())
    return from_hf(converted.add_column("row", list(range(len(targets)))))


def rows_of(dataset: Any) -> list[int]:
    """Which rows a selection holds."""
    if isinstance(dataset, HFDataset):
        return list(dataset.hf_dataset["row"])
    return np.asarray(dataset.indices).tolist()
