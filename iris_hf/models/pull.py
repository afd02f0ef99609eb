"""Fetch a model's files from the Hub, and say in words what the Hub or the way to it refused."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from iris_hf.errors import ConfigError, DataError, IrisHFError, unknown_name
from iris_hf.models.trust.values import read_json

ErrorT = TypeVar("ErrorT", bound=BaseException)
T = TypeVar("T")
_WAITS = (1.0, 3.0)  # seconds
_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # the last three are tokenizers'
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NETWORK = ("requests", "urllib3", "httpx", "httpx2")  # the first two are of huggingface_hub 0.36


def fetch(folder_or_repo_id: str | Path, *, revision: str | None, local_files_only: bool, weights: bool = True) -> Path:
    """Give a local folder, or fetch a repository's description, weights and tokenizer into the cache of the Hub.

    Of the weights only the files of :func:`weight_files` are fetched, if any are asked for. Subfolders are left out,
    as are all files that could hold code or a pickle.

    Raises:
        ConfigError: If the repository lacks the revision.
        DataError: If a revision of a local folder is asked, there is no such repository, it is not shown to this token,
            or it cannot be reached.
    """
    if not isinstance(folder_or_repo_id, (str, Path)):
        raise ConfigError(f"A model is read from a folder or a repository of the Hub, not from {folder_or_repo_id!r}.")
    path = Path(folder_or_repo_id)
    if path.is_dir():
        if revision is not None:
            raise DataError(f"{str(path)!r} is a local folder, which has no revision {revision!r}. Leave it out.")
        return path
    repo_id = str(folder_or_repo_id)
    at = "" if revision is None else f" at revision {revision!r}"
    try:
        folder = _download(repo_id, _FILES, revision=revision, local_files_only=local_files_only)
        if weights:
            _fetch_weights(repo_id, folder, local_files_only=local_files_only)
    except Exception as error:
        raise hub_error(
            f"{repo_id!r}{at} is no folder, and", error, repo_id, revision=revision, fetching=True
        ) from error
    return folder


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors that transformers loads from a folder, whether they are there or not.

    These are what config.json names as `transformers_weights`, else model.safetensors, else the shards of its index.
    Odd values are left to :func:`iris_hf.models.trust.folders.refuse_code`.
    """
    named = _read_field(folder / "config.json", "transformers_weights")
    if named is not None:
        return [str(named)]
    shards = _read_field(folder / _INDEX, "weight_map")
    if (folder / _WEIGHTS).is_file() or not isinstance(shards, dict) or not shards:
        return [_WEIGHTS]
    return sorted({str(shard) for shard in shards.values()})


def _read_field(file: Path, key: str) -> Any:
    content = read_json(file) if file.is_file() else None
    return content.get(key) if isinstance(content, dict) else None


def _fetch_weights(repo_id: str, folder: Path, *, local_files_only: bool) -> None:
    """Fetch the weights of a repository whose description is in a folder of the cache, of the same commit."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    options: dict[str, Any] = {"revision": folder.name, "local_files_only": local_files_only}
    names = weight_files(folder)
    if (folder / _INDEX).is_file() and _read_field(folder / "config.json", "transformers_weights") is None:
        with suppress(EntryNotFoundError):  # where the whole is there, shards are not looked at
            patiently(lambda: hf_hub_download(repo_id, _WEIGHTS, library_name="iris_hf", **options))
            names = [_WEIGHTS]
    _download(repo_id, [glob.escape(name) for name in names if name.endswith(".safetensors")], **options)


def _download(repo_id: str, patterns: Sequence[str], *, revision: str | None, local_files_only: bool) -> Path:
    """Fetch the files of a repository whose names fit, none from subfolders, into the cache; give their folder."""
    from huggingface_hub import snapshot_download

    fetched = patiently(
        lambda: snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            local_files_only=local_files_only,
            library_name="iris_hf",
        )
    )
    return Path(fetched)


def hub_error(
    doing: str,
    error: Exception,
    repo_id: str,
    *,
    revision: str | None = None,
    kind: str = "model",
    fetching: bool = False,
) -> IrisHFError:
    """Build the error for a call to the Hub that failed.

    Args:
        doing: How the message begins, such as `"Pushing to 'me/net' failed:"`.
        error: What huggingface_hub, `datasets` or the network raised.
        repo_id: The repository.
        revision: What was asked of it.
        kind: `model` or `dataset`.
        fetching: Whether the cache would have served, too.
    """
    from huggingface_hub import constants, errors

    causes = list(_causes(error))
    ours = _first(causes, IrisHFError)
    if ours is not None:
        return ours
    if _first(causes, errors.HFValidationError):
        return DataError(f"{doing} {repo_id!r} is no name of a repository: give 'owner/name'.")
    if _first(causes, errors.GatedRepoError):
        return DataError(f"{doing} the repository is gated: ask its owner for access on its page, then log in.")
    if _first(causes, errors.RepositoryNotFoundError):
        return DataError(f"{doing} {_missing(repo_id)}")
    if _first(causes, errors.RevisionNotFoundError):
        return _missing_revision(doing, repo_id, str(revision), kind)
    if _first(causes, errors.OfflineModeIsEnabled) or (
        _first(causes, errors.LocalEntryNotFoundError) and len(causes) == 1
    ):
        return DataError(f"{doing} {_offline(fetching)}")
    answered = _answered(causes)
    if answered is not None:
        return DataError(f"{doing} {_refusal(answered)}")
    network = next((c for c in causes if _is_of_network(c)), None)
    if network is not None:
        return DataError(
            f"{doing} the Hub at {constants.ENDPOINT} cannot be reached, or the connection broke "
            f"({type(network).__name__}). Try again; files that arrived are not sent again."
        )
    return DataError(f"{doing} {type(causes[-1]).__name__}: {causes[-1]}")


def patiently(call: Callable[[], T]) -> T:
    """Make a call that may be repeated, and repeat it after 1 and 3 seconds if the Hub or the network failed."""
    for seconds in _WAITS:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error):
                raise
        time.sleep(seconds)
    return call()


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    causes = list(_causes(error))
    if _first(causes, OfflineModeIsEnabled):
        return False
    answered = _answered(causes)
    if answered is not None:
        return bool(answered.response.status_code >= 500)
    return any(_is_of_network(cause) for cause in causes)


def _answered(causes: list[BaseException]) -> Any:
    """The first of the errors that carries an answer of the Hub, or None."""
    return next((c for c in causes if getattr(c, "response", None) is not None), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_of_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in _NETWORK


def _first(causes: list[BaseException], kind: type[ErrorT]) -> ErrorT | None:
    return next((cause for cause in causes if isinstance(cause, kind)), None)


def _offline(fetching: bool) -> str:
    if fetching:
        return (
            "it is not in the cache, or not all of it, while the Hub is not to be asked (HF_HUB_OFFLINE or "
            "local_files_only). Fetch it once while the Hub may be asked."
        )
    return "the Hub is not to be asked (HF_HUB_OFFLINE). Unset that, or keep the files with save_pretrained."


def _missing(repo_id: str) -> str:
    from huggingface_hub import get_token

    advice = "Check the name, or log in: `hf auth login`, or set HF_TOKEN."
    if get_token() is None:
        return f"the Hub has no repository {repo_id!r}, or it is private and there is no token. {advice}"
    return f"the Hub has no repository {repo_id!r}, or it is private and this token may not see it. {advice}"


def _missing_revision(doing: str, repo_id: str, revision: str, kind: str) -> IrisHFError:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo_id, repo_type=kind)
    except Exception:  # the error at hand is that of the revision; this only looks for better words
        return DataError(f"{doing} {repo_id!r} has no revision {revision!r}. Give a branch, a tag or a commit.")
    return unknown_name(f"revision of {repo_id!r}", revision, [ref.name for ref in (*refs.branches, *refs.tags)])


def _refusal(error: Any) -> str:
    """What an answer of the Hub means."""
    status = error.response.status_code
    said = getattr(error, "server_message", None) or error.response.headers.get("X-Error-Message") or ""
    quoted = f" The Hub says: {' '.join(said.split())}" if said.strip() else ""
    if status == 401:
        return f"the Hub does not accept the token. Log in again (`hf auth login`), or correct HF_TOKEN.{quoted}"
    if status in (402, 403, 413):
        return f"the Hub forbids it with this token ({status}). Use one that may write there.{quoted}"
    if status in (409, 412):
        return f"the repository has changed since, or is being changed ({status}). Look at it, then repeat.{quoted}"
    if status == 429:
        return f"the Hub asks to wait: too many requests (429). Repeat later.{quoted}"
    if status >= 500:
        return f"the Hub failed ({status}). Repeat later; files that arrived are not sent again.{quoted}"
    return f"the Hub refuses it ({status}).{quoted}"
