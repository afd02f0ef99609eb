"""Data sets of files: from a folder, a file or the Hub, and to a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from iris_hf.errors import ConfigError
from iris_hf.types import TargetType


class LoadedDataset(NamedTuple):
    """What loading returns.

    Attributes:
        dataset: index -> (RGB image, target).
        class_names: In the order of the class indices.
        num_classes: Their number.
    """

    dataset: Dataset[Any]
    class_names: list[str]
    num_classes: int


def load_hf_dataset(
    path: str | Path,
    *,
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    target_type: TargetType | None = None,
    class_names: Sequence[str] | None = None,
) -> LoadedDataset:
    """Load a data set of the Hub, an image folder, a Parquet file, or a folder of `save_to_disk`.

    Args:
        path: A folder of `save_to_disk`, a folder of images, a `.parquet` file, or a repository of the Hub.
        split: Which split; None takes the only one.
        name: The configuration of a repository, or of a folder like one, that has several.
        revision: A branch, tag or commit of a repository of the Hub.
        target_type: What the targets mean; None infers it from the columns.
        class_names: Names in the order of the class indices; None takes those of the columns.

    Raises:
        ConfigError: If nothing can be loaded, there are several splits and none is named, there is nothing that
            `split`, `name` or `revision` could choose from, or the columns are not known.
    """
    import datasets

    from iris_hf.data.hf_dataset import from_hf

    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"path must be a folder, a .parquet file or a repository of the Hub, got {path!r}.")
    if split is not None and not isinstance(split, str):
        raise ConfigError(f"split must be the name of one split, got {split!r}.")
    source, folder = str(path), Path(path)
    if revision is not None and folder.exists():
        raise ConfigError(f"{source!r} is a local path, which has no revisions. Leave out revision={revision!r}.")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(source)
        elif folder.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=source)
        elif folder.is_dir() and not any(folder.glob("*.py")) and not any(folder.rglob("*.parquet")):
            loaded = datasets.load_dataset("imagefolder", data_dir=source)
        else:
            loaded, name = datasets.load_dataset(source, name, revision=revision), None
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = f" {error.__cause__}" if error.__cause__ is not None else ""
        raise ConfigError(f"No dataset could be loaded from {source!r}: {error}{cause}") from error
    if name is not None:
        raise ConfigError(f"{source!r} has no configurations, as repositories have them. Leave out name={name!r}.")
    if isinstance(loaded, datasets.DatasetDict):
        if split is None and len(loaded) == 1:
            split = next(iter(loaded))
        if split not in loaded:
            raise ConfigError(
                f"{source!r} has the splits {', '.join(loaded)}. Name one of them: split={next(iter(loaded))!r}, "
                f"or '{source}#{next(iter(loaded))}' on the command line."
            )
        loaded = loaded[split]
    elif split not in (None, str(loaded.split)):
        raise ConfigError(f"{source!r} is one data set without splits. Leave out split={split!r}.")
    dataset: Any = from_hf(loaded, target_type=target_type, class_names=class_names)
    names = list(dataset.class_names or ())
    return LoadedDataset(dataset, names, len(names))


def save_hf_dataset(
    dataset: Dataset[Any],
    folder: str | Path,
    *,
    target_type: TargetType | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a data set into a folder that `load_hf_dataset` and `datasets.load_from_disk` read.

    Args:
        dataset: One of `load_hf_dataset` or `from_hf`, or any index -> (RGB image, target).
        folder: Made if absent.
        target_type: What the targets mean, for a data set that does not say so.
        class_names: Names in the order of the class indices, for a data set that has none.

    Raises:
        ConfigError: If the target type or the class names are not known.
        DataError: If an example is invalid; the message names it.
    """
    from iris_hf.data.convert import to_hf

    if Path(folder).is_file():
        raise ConfigError(f"A data set is saved in a folder, but {str(folder)!r} is a file.")
    rows = getattr(dataset, "hf_dataset", None)
    if rows is None:
        target_type = target_type or getattr(dataset, "target_type", None)
        if target_type is None:
            raise ConfigError(f"{type(dataset).__name__} does not say its target type. Give target_type=...")
        names = class_names or getattr(dataset, "class_names", None)
        rows = to_hf(dataset, target_type=target_type, class_names=names, streaming=False)
    rows.save_to_disk(str(folder))
