"""Data sets of files: from a folder, a file or the Hub, and to a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import Dataset

from iris_hf.errors import ConfigError, DataError, IrisHFError
from iris_hf.types import TargetType

if TYPE_CHECKING:
    from iris_hf.data.trust import Origin

_DESCRIPTIONS = ("README.md", ".huggingface.yaml")
"""What may say which files a data set consists of."""

_NETWORK = ("httpx", "httpx2")
"""Whose errors, unlike those of requests, are no OSError."""


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

    Nothing but the files of the data set itself is read or asked for, whatever its rows and its description name.

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
        DataError: If it names files or addresses outside of it, as the path of an image or as data of a split; if it
            is a script, or the Hub or a file fails in another way.
    """
    import datasets

    from iris_hf.data.hf_dataset import from_hf
    from iris_hf.data.trust import refuse_foreign_files

    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(f"path must be a folder, a .parquet file or a repository of the Hub, got {path!r}.")
    if split is not None and not isinstance(split, str):
        raise ConfigError(f"split must be the name of one split, got {split!r}.")
    source = str(path)
    if revision is not None and Path(path).exists():
        raise ConfigError(f"{source!r} is a local path, which has no revisions. Leave out revision={revision!r}.")
    try:
        loaded, origin = _load(source, name, revision)
    except IrisHFError:
        raise
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = f" {error.__cause__}" if error.__cause__ is not None else ""
        raise ConfigError(f"No dataset could be loaded from {source!r}: {error}{cause}") from error
    except Exception as error:
        raise DataError(f"No dataset could be loaded from {source!r}: {_advice(error)}") from error
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
    refuse_foreign_files(loaded, origin)
    dataset: Any = from_hf(loaded, target_type=target_type, class_names=class_names)
    names = list(dataset.class_names or ())
    return LoadedDataset(dataset, names, len(names))


def _load(source: str, name: str | None, revision: str | None) -> tuple[Any, Origin]:
    """Load what a path stands for, and tell where its rows' files may lie."""
    import datasets

    from iris_hf.data import trust

    folder = Path(source)
    is_saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    is_file = folder.suffix == ".parquet"
    is_of_images = folder.is_dir() and not any(folder.glob("*.py")) and not any(folder.rglob("*.parquet"))
    if name is not None and (is_saved or is_file or is_of_images):
        raise ConfigError(f"{source!r} has no configurations, as repositories have them. Leave out name={name!r}.")
    if is_saved:
        trust.refuse_foreign_tables(folder)
        return datasets.load_from_disk(source), trust.folder_origin(folder)
    if is_file:
        return datasets.load_dataset("parquet", data_files=source), trust.folder_origin(folder.parent)
    if is_of_images:
        return datasets.load_dataset("imagefolder", data_dir=source), trust.folder_origin(folder)
    if folder.is_dir():
        for description in map(folder.joinpath, _DESCRIPTIONS):
            if description.is_file():
                trust.refuse_foreign_data_files(source, description)
        return datasets.load_dataset(source, name), trust.folder_origin(folder)
    if source.removeprefix("hf://").startswith("buckets/"):
        raise ConfigError(f"{source!r} is a bucket. Load it with datasets.load_dataset, and give that to from_hf.")
    repo_id = source.removeprefix("hf://datasets/")
    commit = _check_repository(repo_id, revision)
    return datasets.load_dataset(source, name, revision=commit), trust.repository_origin(repo_id)


def _check_repository(repo_id: str, revision: str | None) -> str | None:
    """Check which files a repository says that it consists of, and give the commit that says so.

    Where the Hub knows no such repository, or is not reached, it is left to `datasets` to say why, or to take what is
    in its cache: nothing else could be had of it then.

    Raises:
        DataError: If the Hub fails, so that nothing could be checked, or the files are not the repository's.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from iris_hf.data.trust import refuse_foreign_data_files

    api = HfApi()
    try:
        commit = api.dataset_info(repo_id, revision=revision, expand=["sha"]).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        return revision
    except HfHubHTTPError as error:
        raise DataError(f"The Hub does not tell which files {repo_id!r} consists of: {error}. Try again.") from error
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK:
            return revision
        raise
    for description in _DESCRIPTIONS:
        try:
            file = api.hf_hub_download(repo_id, description, repo_type="dataset", revision=commit)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
        refuse_foreign_data_files(repo_id, Path(file))
    return commit


def _advice(error: Exception) -> str:
    if isinstance(error, RuntimeError) and "scripts" in str(error):
        return (
            "it holds a script, which is not run. The Hub keeps the rows of many such repositories as Parquet: try "
            "revision='refs/convert/parquet'. Of a local folder, give one that holds the data files alone."
        )
    return f"{type(error).__name__}: {error}"


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
