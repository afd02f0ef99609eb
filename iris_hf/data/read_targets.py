"""Targets of whole data sets, without decoding images wherever that can be avoided."""

from __future__ import annotations

import bisect
from typing import Any

import torch
import torch.utils.data
from torch import Tensor

from iris_hf.data.targets import check_target, classes_in, infer_target_type, is_class_index
from iris_hf.errors import ConfigError, DataError
from iris_hf.types import TargetType


def get_targets_from_dataset(dataset: Any) -> Any:
    """Read all targets of a data set of (raw input, target).

    A data set that can tell its targets alone is asked for them: all at once (``get_all_targets``, as the data sets of
    :func:`iris_hf.data.from_hf` have it, streams too), or one by one (``get_targets(index)``). torch's ``Subset`` and
    ``ConcatDataset`` of such data sets are looked through. Any other is read example by example.

    Args:
        dataset: Map-style, or iterable; or one of the library `datasets`.

    Returns:
        One tensor `[N, ...]` when the targets are class indices (int, or integer tensor `[]` or `[1]`) or tensors of
        one shape, else a list of N.

    Raises:
        ConfigError: If it is no data set, or one of several splits.
        DataError: If there are no examples, or one is no pair.
    """
    if type(dataset).__module__.startswith("datasets."):
        from iris_hf.data.hf_dataset import from_hf

        dataset = from_hf(dataset)
    targets = _all_targets(dataset)
    if isinstance(targets, Tensor):
        if len(targets) == 0:
            raise DataError("The data set has no examples.")
        return targets
    if not targets:
        raise DataError("The data set has no examples.")
    if all(isinstance(target, Tensor) and target.shape == targets[0].shape for target in targets):
        return torch.stack(targets)
    if all(is_class_index(target) for target in targets):
        return torch.tensor([int(target) for target in targets])
    return targets


def get_classes_from_dataset(dataset: Any, *, target_type: TargetType | None = None) -> list[list[int]]:
    """Read which classes occur in each example, in ascending order.

    Decodes no images, and no masks of a data set that lists their classes in a column.

    Args:
        dataset: Map-style, or iterable.
        target_type: What the targets mean; None asks the data set, or tells it from the first target that is not None.

    Returns:
        A list of class indices for each example.

    Raises:
        DataError: If a target is not in its format. Boxes and masks only have to have its shape, since that is what
            the classes depend on.
    """
    classes = _all_classes(dataset)
    if classes is not None:
        return classes
    targets = list(_all_targets(dataset))
    if target_type is None:
        target_type = getattr(dataset, "target_type", None)
    if target_type is None:
        target_type = infer_target_type(next((target for target in targets if target is not None), None))
    return [
        [] if target is None else classes_in(_checked(target, target_type, index), target_type)
        for index, target in enumerate(targets)
    ]


def locate(dataset: Any, index: int) -> tuple[Any, int]:
    """Find where an example of torch's ``Subset`` and ``ConcatDataset`` comes from.

    Args:
        dataset: Any map-style data set.
        index: From 0.

    Returns:
        The data set that is neither, and the index in it.
    """
    while True:
        if type(dataset) is torch.utils.data.Subset:
            dataset, index = dataset.dataset, int(dataset.indices[index])
        elif type(dataset) is torch.utils.data.ConcatDataset:
            part = bisect.bisect_right(dataset.cumulative_sizes, index)
            start = dataset.cumulative_sizes[part - 1] if part else 0
            dataset, index = dataset.datasets[part], index - start
        else:
            return dataset, index


def _checked(target: Any, target_type: TargetType, index: int) -> Any:
    dims = {"detection": 2, "segmentation": 3}.get(target_type)
    has_shape = isinstance(target, Tensor) and target.dim() == dims and (dims != 2 or target.shape[1] == 5)
    if not has_shape:
        check_target(target, target_type, where=f"Example {index}: ")
    return target


def _all_targets(dataset: Any) -> Any:
    """A tensor or a list."""
    if hasattr(dataset, "get_all_targets"):
        return dataset.get_all_targets()
    if type(dataset) is torch.utils.data.Subset:
        return _subset_targets(dataset)
    if type(dataset) is torch.utils.data.ConcatDataset:
        parts = [_all_targets(part) for part in dataset.datasets]
        if all(isinstance(part, Tensor) and part.shape[1:] == parts[0].shape[1:] for part in parts):
            return torch.cat(parts)
        return [target for part in parts for target in part]
    if hasattr(dataset, "get_targets"):
        return [dataset.get_targets(index) for index in range(len(dataset))]
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return [_target_of(dataset[index], index) for index in range(len(dataset))]
    if not hasattr(dataset, "__iter__"):
        raise ConfigError(f"A data set gives (raw input, target) by index or one after another, not {dataset!r}.")
    return [_target_of(example, index) for index, example in enumerate(dataset)]


def _target_of(example: Any, index: int) -> Any:
    if not isinstance(example, (tuple, list)) or len(example) != 2:
        raise DataError(f"Example {index} is a {type(example).__name__}, not a pair (raw input, target).")
    return example[1]


def _subset_targets(subset: Any) -> Any:
    leaf, indices = subset.dataset, [int(index) for index in subset.indices]
    if hasattr(leaf, "get_all_targets") and hasattr(leaf, "select"):
        return leaf.select(indices).get_all_targets()
    found = [locate(leaf, index) for index in indices]
    return [owner.get_targets(i) if hasattr(owner, "get_targets") else owner[i][1] for owner, i in found]


def _all_classes(dataset: Any) -> list[list[int]] | None:
    if hasattr(dataset, "get_all_classes"):
        return dataset.get_all_classes()  # type: ignore[no-any-return]
    if type(dataset) is torch.utils.data.Subset:
        classes = _all_classes(dataset.dataset)
        return None if classes is None else [classes[int(index)] for index in dataset.indices]
    if type(dataset) is torch.utils.data.ConcatDataset:
        parts = [_all_classes(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return [row for part in known for row in part] if len(known) == len(parts) else None
    return None
