"""Some examples of a data set, picked by index."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Subset

from iris_hf.data.hf_dataset import HFDataset, from_hf
from iris_hf.data.read_targets import get_classes_from_dataset, locate
from iris_hf.errors import ConfigError, DataError

_FORWARDED = ("class_names", "num_classes", "target_type", "set_epoch")


def open_examples(dataset: Any) -> Any:
    """Check that examples can be picked from a data set, and read a Hugging Face data set as :func:`from_hf` does.

    Args:
        dataset: A map-style data set of (raw input, target), or a ``datasets.Dataset``.

    Raises:
        ConfigError: If examples cannot be picked by index.
        DataError: If there are none.
    """
    if isinstance(dataset, (datasets.Dataset, datasets.DatasetDict)):
        dataset = from_hf(dataset)
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ConfigError(
            f"Examples are picked by index, but {type(dataset).__name__} has no length. "
            "Give a map-style data set; load a Hugging Face data set without streaming."
        )
    if len(dataset) == 0:
        raise DataError("The data set has no examples.")
    return dataset


def select_examples(dataset: Any, indices: npt.NDArray[np.int64]) -> Any:
    """Give the data set of some examples; no image is read.

    Args:
        dataset: A map-style data set of (raw input, target), or a ``datasets.Dataset``.
        indices: Positions `[n]` in the order wanted; repetitions are fine.

    Returns:
        A Hugging Face data set, and the torch data set of one, stays what it is, also from within torch's ``Subset``.
        Others become a :class:`Selection`.
    """
    if isinstance(dataset, (HFDataset, datasets.Dataset)):
        return dataset.select(indices)
    if type(dataset) is Subset:
        return select_examples(dataset.dataset, np.asarray(dataset.indices, dtype=np.int64)[indices])
    return Selection(dataset, indices)


class Selection(Dataset[Any]):
    """Some examples of a torch data set.

    It has ``class_names``, ``num_classes``, ``target_type`` and ``set_epoch`` where the data set has them.

    Args:
        dataset: A map-style data set of (raw input, target).
        indices: Positions `[n]` in it.
    """

    def __init__(self, dataset: Any, indices: npt.NDArray[np.int64]) -> None:
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def get_targets(self, index: int) -> Any:
        """Read one target, without its image where the data set can.

        Args:
            index: Position in the selection.
        """
        owner, position = locate(self.dataset, int(self.indices[index]))
        return owner.get_targets(position) if hasattr(owner, "get_targets") else owner[position][1]

    def get_all_classes(self) -> list[list[int]]:
        """Read which classes occur in each example, without images where the data set can."""
        return get_classes_from_dataset(
            Subset(self.dataset, self.indices.tolist()), target_type=getattr(self, "target_type", None)
        )

    def get_encoded(self, index: int) -> Any:
        """Read an example, with its image as encoded bytes where the data set can.

        Args:
            index: Position in the selection.
        """
        owner, position = locate(self.dataset, int(self.indices[index]))
        return owner.get_encoded(position) if hasattr(owner, "get_encoded") else owner[position]

    def __getattr__(self, name: str) -> Any:
        if name in _FORWARDED:
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
