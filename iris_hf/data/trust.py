"""What a data set from elsewhere must not do: have files read or asked for that are not its own."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.features.features import require_storage_embed

from iris_hf.errors import DataError

_ARCHIVES = ("zip", "gzip", "bz2", "xz", "lz4", "zstd", "tar")
_SCHEME = re.compile(r"[A-Za-z][\w.+-]*:")
_CACHED = re.compile(r".*/([^/]+)/[^/]+/[^/]+/([0-9a-f]{40})/[^/]+")
"""Where `datasets` keeps rows of the Hub: owner___name, configuration, version, commit, file."""


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from, and so where the files may lie that its rows name.

    Attributes:
        name: What messages call it.
        folders: Absolute, with a separator at the end.
        repositories: Of the Hub.
    """

    name: str
    folders: tuple[str, ...]
    repositories: tuple[str, ...] = ()

    def holds(self, path: str) -> bool:
        """Tell whether a path, perhaps into an archive, stays in the folders and repositories."""
        *hops, last = path.split("::")
        if any(hop.partition("://")[0] not in _ARCHIVES for hop in hops):
            return False
        if "://" in last:
            starts = tuple(f"hf://datasets/{repository}{end}" for repository in self.repositories for end in "@/")
            return last.startswith(starts) and ".." not in last.split("/")
        climbs = ".." in last.replace("\\", "/").split("/")  # which a link on the way would redirect
        return (os.path.realpath(last) if climbs else os.path.abspath(last)).startswith(self.folders)


def folder_origin(folder: str | Path) -> Origin:
    """Give the origin of a data set in a local folder."""
    extracted = datasets.config.EXTRACTED_DATASETS_PATH  # what `datasets` unpacks archives into
    return Origin(str(folder), _with_ends(os.path.abspath(folder), os.path.realpath(folder), extracted))


def repository_origin(*repo_ids: str) -> Origin:
    """Give the origin of a data set of the Hub: its repositories, and what the cache holds of them."""
    folders = [folder for repo_id in repo_ids for folder in _cached(f"datasets--{repo_id.replace('/', '--')}")]
    return _hub_origin(repo_ids, folders, repo_ids)


def find_origin(dataset: datasets.Dataset | datasets.IterableDataset) -> Origin | None:
    """Tell whether a data set holds what a repository of the Hub put into it.

    Returns:
        Its origin; None for other data sets, and for one that was mapped, which holds what the caller put into it.
    """
    if isinstance(dataset, datasets.IterableDataset):
        is_mapped = any(map(_is_mapped, steps_of(dataset._ex_iterable)))
        return repository_origin(*dataset._token_per_repo_id) if dataset._token_per_repo_id and not is_mapped else None
    files = [Path(file["filename"]) for file in dataset.cache_files]
    from_hub = [found for file in files if (found := _CACHED.fullmatch(file.as_posix()))]
    if not from_hub or any(file.name.startswith("cache-") for file in files):
        return None
    names = dict.fromkeys(found[1].replace("___", "/") for found in from_hub)
    snapshots = [f"datasets--*/snapshots/{commit}" for commit in dict.fromkeys(found[2] for found in from_hub)]
    return _hub_origin(names, [held.parents[1] for snapshot in snapshots for held in _cached(snapshot)])


def _hub_origin(names: Iterable[str], folders: Sequence[Path], repositories: tuple[str, ...] = ()) -> Origin:
    extracted = datasets.config.EXTRACTED_DATASETS_PATH
    return Origin(", ".join(names), _with_ends(*folders, *map(os.path.realpath, folders), extracted), repositories)


def _cached(pattern: str) -> Iterator[Path]:
    """Folders in the cache of the Hub."""
    from huggingface_hub import constants

    return Path(os.path.abspath(constants.HF_HUB_CACHE)).glob(pattern)


def steps_of(ex_iterable: Any) -> Iterator[Any]:
    """Yield the steps of a stream, from its sources on."""
    for source in [getattr(ex_iterable, "ex_iterable", None), *getattr(ex_iterable, "ex_iterables", ())]:
        if source is not None:
            yield from steps_of(source)
    yield ex_iterable


def refuse_foreign_files(dataset: datasets.Dataset, origin: Origin, *, except_cast: bool = False) -> None:
    """Make sure that no row names a file from elsewhere; rows that the data set does not show do not count.

    Args:
        dataset: One split.
        origin: Where it comes from.
        except_cast: Whether to leave out columns that are stored as text, of which the caller said that they hold paths
            of images.

    Raises:
        DataError: If one does.
    """
    table, features = dataset.data.table, dict(dataset.features)
    if except_cast:
        stored = _stored_types(dataset)
        features = {name: features[name] for name in features if table.schema.field(name).type in stored}
    order, positions = dataset._indices, None
    for name, path, row in _foreign_files(table, features, origin):
        if order is not None and positions is None:
            positions = {row: position for position, row in enumerate(order.column(0).to_pylist())}
        if positions is None or row in positions:
            raise _foreign(row if positions is None else positions[row], name, path, origin)


def refuse_foreign_rows(table: pa.Table, features: Mapping[str, Any], origin: Origin, position: int) -> None:
    """Make sure that rows of a stream name no file from elsewhere.

    Args:
        table: The rows.
        features: Of its columns.
        origin: Where the stream comes from.
        position: Of the first row, for the message.

    Raises:
        DataError: If one does.
    """
    for name, path, row in _foreign_files(table, features, origin):
        raise _foreign(position + row, name, path, origin)


def refuse_foreign_data_files(name: str, description: Path) -> None:
    """Make sure that the description of a data set names no data outside of it.

    Args:
        name: Of the data set, for the message.
        description: A README.md whose head may say which files the splits are, or a YAML file that does.

    Raises:
        DataError: If it names an address, or a path that leaves the folder.
    """
    import yaml
    from huggingface_hub import DatasetCard

    try:
        if description.suffix == ".md":
            content = DatasetCard.load(description).data.to_dict()
        else:
            content = yaml.safe_load(description.read_text(encoding="utf-8"))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise DataError(f"The description {description.name} of {name!r} cannot be read: {error}") from error
    for configuration in _dicts_in(content):
        for key in ("data_files", "data_dir"):
            for path in _texts_in(configuration.get(key)):
                if not _is_inside(path):
                    raise DataError(
                        f"{description.name} of {name!r} names the {key} {path!r}, which are not in it: they are not "
                        "asked for. Only files of the data set itself are; if you trust these, load them with "
                        "datasets.load_dataset and give that to from_hf."
                    )


def refuse_foreign_tables(folder: Path) -> None:
    """Make sure that a folder of `save_to_disk` names no files outside of it.

    Raises:
        DataError: If it does, or its description is none.
    """
    splits = folder / "dataset_dict.json"
    names = _read_names(splits, lambda content: content["splits"]) if splits.is_file() else []
    for state in [folder / "state.json", *(folder / name / "state.json" for name in names)]:
        if state.is_file():
            _read_names(state, lambda content: [file["filename"] for file in content["_data_files"]])


def _read_names(file: Path, pick: Any) -> list[str]:
    try:
        names = list(pick(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{str(file)!r} does not describe a saved data set: {error!r}. Save it again.") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\"):
            raise DataError(f"{str(file)!r} names {name!r}, which is not in its folder: it is not read.")
    return names


def _foreign(row: int, column: str, path: str, origin: Origin) -> DataError:
    return DataError(
        f"Example {row}: the column {column!r} names the file {path!r}, which is not of the data set {origin.name!r}: "
        "it is not read. Drop the row. If you trust it, load the data set with `datasets`, open the file in map, and "
        "give the result to from_hf."
    )


def _foreign_files(table: pa.Table, features: Any, origin: Origin) -> Iterator[tuple[str, str, int]]:
    """Yield column, path and row of what is stored as a path alone, and leads elsewhere."""
    for name, feature in features.items():
        if not require_storage_embed(feature):
            continue
        start = 0
        for chunk in table[name].chunks:
            rows = pa.array(np.arange(start, start + len(chunk)))
            start += len(chunk)
            for paths, path_rows in _bare_paths(feature, chunk, rows):
                for path, row in zip(*_suspects(paths, path_rows, origin), strict=True):
                    if not origin.holds(path.as_py()):
                        yield name, path.as_py(), row.as_py()


def _suspects(paths: pa.Array, rows: pa.Array, origin: Origin) -> tuple[pa.Array, pa.Array]:
    """Those that do not plainly lie in one of the folders."""
    plain = pc.invert(pc.match_substring_regex(paths, r"::|(^|[/\\])\.\.([/\\]|$)"))
    inside = pa.array(np.zeros(len(paths), dtype=bool))
    for folder in origin.folders:
        inside = pc.or_(inside, pc.starts_with(paths, folder))
    suspect = pc.invert(pc.and_(plain, inside))
    return paths.filter(suspect), rows.filter(suspect)


def _bare_paths(feature: Any, array: pa.Array, rows: pa.Array) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yield the paths without bytes in a column that may be nested, and their rows."""
    if isinstance(feature, dict):
        for key, inner in feature.items():
            yield from _bare_paths(inner, pc.struct_field(array, key), rows)
    elif isinstance(feature, (datasets.List, datasets.LargeList)):
        yield from _bare_paths(feature.feature, array.flatten(), rows.take(pc.list_parent_indices(array)))
    elif require_storage_embed(feature) and pa.types.is_struct(array.type):
        paths = pc.struct_field(array, "path")
        is_bare = pc.and_(pc.struct_field(array, "bytes").is_null(), paths.is_valid())
        if pc.any(is_bare).as_py():
            yield paths.filter(is_bare), rows.filter(is_bare)


def _stored_types(dataset: datasets.Dataset) -> set[pa.DataType]:
    """The types of the columns as they are in the file, before the caller cast any."""
    types: set[pa.DataType] = set()
    for file in dataset.cache_files:
        with pa.memory_map(file["filename"]) as source, pa.ipc.open_stream(source) as reader:
            types.update(reader.schema.types)
    return types


def _is_mapped(step: Any) -> bool:
    """Whether a step of a stream is a function of the caller's; renaming a column is one of `datasets`."""
    if type(step) is not datasets.iterable_dataset.MappedExamplesIterable:
        return False
    function = getattr(step.function, "func", step.function)
    return not str(getattr(function, "__module__", "")).startswith("datasets.")


def _dicts_in(content: Any) -> Iterator[dict[str, Any]]:
    configurations = content.get("configs") if isinstance(content, dict) else None
    for configuration in configurations if isinstance(configurations, list) else ():
        if isinstance(configuration, dict):
            yield configuration


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(item)


def _is_inside(path: str) -> bool:
    posix = path.replace("\\", "/")
    leaves = posix.startswith("/") or ".." in posix.split("/")
    return not leaves and "::" not in path and _SCHEME.match(path) is None


def _with_ends(*folders: str | Path) -> tuple[str, ...]:
    return tuple(dict.fromkeys(os.path.join(folder, "") for folder in folders))
