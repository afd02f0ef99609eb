"""A repository of the Hub: made where it is missing, and changed in single commits."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from iris_hf._version import __version__
from iris_hf.errors import ConfigError
from iris_hf.models.pull import hub_error, patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Kind = Literal["model", "dataset"]


class Push(NamedTuple):
    """What a push did, or would do.

    Attributes:
        commit_url: The page of the commit; None for a dry run.
        files: The size in bytes of each file, by its path in the repository.
    """

    commit_url: str | None
    files: dict[str, int]


def open_api() -> HfApi:
    """Give the client of the Hub, with the token that huggingface_hub finds (HF_TOKEN, or `hf auth login`)."""
    from huggingface_hub import HfApi

    return HfApi(library_name="iris_hf", library_version=__version__)


@contextlib.contextmanager
def explained(repo_id: str, *, kind: Kind, revision: str | None = None) -> Iterator[None]:
    """Turn what a push raises into an error that says what to do."""
    try:
        yield
    except Exception as error:
        raise hub_error(f"Pushing to {repo_id!r} failed:", error, repo_id, revision=revision, kind=kind) from error


def prepare_repository(repo_id: str, *, kind: Kind, private: bool, revision: str | None, tag: str | None) -> str:
    """Make a repository and a branch unless they are there.

    Args:
        repo_id: `owner/name`, or a name of the token's owner.
        kind: What it holds.
        private: Whether a new one is private, and an old one has to be.
        revision: The branch; None is `main`.
        tag: A tag that is going to be made.

    Returns:
        The full name.

    Raises:
        ConfigError: If it should be private and is public, or has the tag.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    api = open_api()
    full_name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
    try:
        info = api.repo_info(full_name, repo_type=kind)
    except RepositoryNotFoundError:
        api.create_repo(full_name, repo_type=kind, private=private, exist_ok=True)  # others may make it at this moment
        info = api.repo_info(full_name, repo_type=kind)
    if private and not info.private:
        raise ConfigError(
            f"The repository {full_name!r} exists and is public: nothing was pushed. Choose another name, or make it "
            "private on its page first."
        )
    if tag is not None:
        check_tag(full_name, tag, kind=kind)
    if revision is not None:
        api.create_branch(full_name, branch=revision, repo_type=kind, exist_ok=True)
    return full_name


def add_tag(repo_id: str, tag: str, *, kind: Kind, commit: str) -> None:
    """Tag a commit."""
    patiently(lambda: open_api().create_tag(repo_id, tag=tag, revision=commit, repo_type=kind))


def check_tag(repo_id: str, tag: str, *, kind: Kind) -> None:
    """Make sure that a repository has no such tag yet.

    Raises:
        ConfigError: If it has.
    """
    tags = [ref.name for ref in open_api().list_repo_refs(repo_id, repo_type=kind).tags]
    if tag in tags:
        raise ConfigError(f"{repo_id!r} has the tag {tag!r} already. Choose another; it has {', '.join(sorted(tags))}.")


def read_card(repo_id: str, *, kind: Kind, revision: str | None) -> str | None:
    """Give the README.md of a repository, or None without one."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = open_api().hf_hub_download(repo_id, "README.md", repo_type=kind, revision=revision)
    except EntryNotFoundError:
        return None
    return Path(path).read_text(encoding="utf-8")


def commit(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    kind: Kind,
    revision: str | None,
    message: str,
    parent_commit: str | None = None,
    stale: Sequence[str] = (),
) -> Any:
    """Upload files in one commit: others see all of them or none.

    A file that the Hub has already, from an upload that broke or an earlier commit, is not sent again.

    Args:
        repo_id: The repository, which exists.
        files: What each path in the repository gets.
        kind: What the repository holds.
        revision: The branch; None is `main`.
        message: The first line of the commit message.
        parent_commit: The commit that has to be the last one; None takes any.
        stale: Patterns of files that are removed unless they are among `files`. One without a slash is for files that
            are in no folder.

    Returns:
        The `CommitInfo` of huggingface_hub.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    def attempt() -> Any:
        api = open_api()
        held = api.list_repo_files(repo_id, repo_type=kind, revision=revision)
        old = [p for p in held if p not in files and any(_matches(p, pattern) for pattern in stale)]
        additions = [CommitOperationAdd(p, c if isinstance(c, bytes) else str(c)) for p, c in sorted(files.items())]
        return api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(p) for p in old)],
            commit_message=message,
            repo_type=kind,
            revision=revision,
            parent_commit=parent_commit,
        )

    return patiently(attempt)


def _matches(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) and ("/" in pattern or "/" not in path)
