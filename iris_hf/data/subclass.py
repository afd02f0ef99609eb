"""The examples of some classes of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from iris_hf.data.hf_dataset import HFDataset, from_hf
from iris_hf.data.read_targets import get_classes_from_dataset
from iris_hf.data.remap_columns import remap_columns
from iris_hf.data.selection import Selection, open_examples, select_examples
from iris_hf.data.targets import infer_target_type
from iris_hf.errors import ConfigError, DataError, require_names
from iris_hf.types import TargetType


class Subclass(NamedTuple):
    """What :func:`get_subclass_dataset` returns.

    Attributes:
        dataset: The examples.
        class_names: The names of the chosen classes, in the order of their ids.
        num_classes: Number of chosen classes.
    """

    dataset: Dataset[Any]
    class_names: list[str]
    num_classes: int


def get_subclass_dataset(
    dataset: Dataset[Any], class_names: Sequence[str], *, class_ids: list[int], remap_class_ids: bool = False
) -> Subclass:
    """Keep the examples in which at least one of some classes occurs, in their order.

    Images are not read where the data set can tell its targets alone. Targets stay as they are, with the ids of all
    classes, unless they are remapped: then they speak of the chosen classes only, numbered from 0 in ascending order
    of their ids, and boxes, labels and masks of other classes are dropped.

    Args:
        dataset: Map-style; a data set of :func:`from_hf`, or a ``datasets.Dataset``, stays one. Remapped, it has new
            target columns beside the old images; only masks are decoded and written anew, to a file that stays until
            the process ends.
        class_names: The name of each class, in the order of the class ids.
        class_ids: The classes to keep, in any order.
        remap_class_ids: Whether targets are renumbered, so that a model of `num_classes` outputs trains on them.

    Raises:
        ConfigError: If a class id is not in `class_names`, or comes twice, or there are none.
        DataError: If no example holds one of the classes.
    """
    examples = open_examples(dataset)
    _check_class_ids(class_ids, class_names, getattr(examples, "num_classes", None))
    class_ids = [int(index) for index in class_ids]
    wanted = set(class_ids)
    classes = get_classes_from_dataset(examples)
    held = set(chain.from_iterable(classes))
    if not wanted <= held:
        absent = ", ".join(f"{index} ({class_names[index]!r})" for index in sorted(wanted - held))
        raise DataError(f"No example holds the class {absent}. The data set holds {sorted(held)}.")
    indices = [index for index, row in enumerate(classes) if not wanted.isdisjoint(row)]
    selected = select_examples(dataset, np.array(indices, dtype=np.int64))
    ids = sorted(class_ids)
    names = [class_names[index] for index in ids]
    return Subclass(_remap(selected, ids, names) if remap_class_ids else selected, names, len(names))


def remap_target(target: Any, target_type: TargetType, class_ids: Sequence[int]) -> Any:
    """Renumber a target to some classes, and drop the others from it.

    Args:
        target: A target of its format. A class index has to be one of `class_ids`.
        target_type: Its format.
        class_ids: The class that becomes 0, the one that becomes 1, ...
    """
    if target_type in ("multilabel", "segmentation"):
        return target[list(class_ids)]
    if target_type == "detection":
        matches = target[:, :1] == torch.tensor(class_ids, dtype=target.dtype)
        boxes = target[matches.any(1)]
        boxes[:, 0] = matches[matches.any(1)].int().argmax(1).to(target.dtype)
        return boxes
    new = list(class_ids).index(int(target))
    return torch.full_like(target, new) if isinstance(target, Tensor) else new


class RemappedSelection(Dataset[Any]):
    """A selection whose targets are renumbered to some classes.

    Attributes:
        class_names: The names of these classes.
        target_type: What the targets mean.
    """

    def __init__(self, selection: Selection, class_ids: list[int], class_names: list[str]) -> None:
        self._selection = selection
        self._class_ids = class_ids
        self.class_names = class_names
        target_type: TargetType | None = getattr(selection, "target_type", None)
        self.target_type = infer_target_type(selection.get_targets(0)) if target_type is None else target_type

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._selection)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._remapped(self._selection[index])

    def get_targets(self, index: int) -> Any:
        """Read one target, without its image where the data set can.

        Args:
            index: Position in the selection.
        """
        return remap_target(self._selection.get_targets(index), self.target_type, self._class_ids)

    def get_encoded(self, index: int) -> tuple[Any, Any]:
        """Read an example, with its image as encoded bytes where the data set can.

        Args:
            index: Position in the selection.
        """
        return self._remapped(self._selection.get_encoded(index))

    def __getattr__(self, name: str) -> Any:
        if name == "set_epoch":
            return self._selection.set_epoch
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _remapped(self, example: tuple[Any, Any]) -> tuple[Any, Any]:
        raw_input, target = example
        return raw_input, remap_target(target, self.target_type, self._class_ids)


def _remap(selected: Any, class_ids: list[int], class_names: list[str]) -> Any:
    if isinstance(selected, datasets.Dataset):
        return _remap(from_hf(selected), class_ids, class_names).hf_dataset
    if isinstance(selected, HFDataset):
        return remap_columns(selected, class_ids, class_names)
    return RemappedSelection(selected, class_ids, class_names)


def _check_class_ids(class_ids: Any, class_names: Any, num_classes: int | None) -> None:
    require_names("class_names", class_names)
    if num_classes and num_classes != len(class_names):
        raise ConfigError(
            f"class_names has {len(class_names)} names, but the data set has {num_classes} classes. "
            "Give the name of each class, in the order of the ids."
        )
    if not isinstance(class_ids, (list, tuple)) or not class_ids:
        raise ConfigError(f"class_ids must be a list of at least one class id, got {class_ids!r}.")
    for position, index in enumerate(class_ids):
        if not isinstance(index, (int, np.integer)) or not 0 <= index < len(class_names):
            raise ConfigError(
                f"class_ids[{position}] is {index!r}, but class_names has the ids 0 to {len(class_names) - 1}."
            )
    twice = sorted({index for index in class_ids if class_ids.count(index) > 1})
    if twice:
        raise ConfigError(f"class_ids names {', '.join(map(str, twice))} more than once: {list(class_ids)}.")
