"""Run an irisml job."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iris_hf.irisml.check import check_job
from iris_hf.irisml.engine import irisml_module
from iris_hf.irisml.names import installed
from iris_hf.irisml.ranks import run_on_main


def run_job(
    job: Mapping[str, Any],
    env_vars: Mapping[str, str] | None = None,
    *,
    dry_run: bool = False,
    cache_storage_url: str | None = None,
    no_cache_read: bool = False,
) -> None:
    """Run an irisml job by irisml's engine, with the tasks of iris_hf.

    The job is checked before its first task runs. Inside a launcher the main process runs it, the others take part in
    training, prediction and benchmarks, and all get the error of a job that fails.

    Args:
        job: What the JSON file holds: `tasks`, and `on_error` for those that run after a failure.
        env_vars: The values of `$env.NAME`.
        dry_run: Whether to only put the tasks together: nothing is loaded, trained, saved or sent.
        cache_storage_url: Where irisml keeps outputs, to be found by the next run: a folder, or a URL of Azure. None
            keeps none.
        no_cache_read: Whether to only write there.

    Raises:
        ConfigError: If the job is wrong; the message names the task and the field.
        MissingDependencyError: If irisml, or a package that a task needs, is not installed.
        Exception: The error of a task; a note names the task. The `on_error` tasks have run by then.
    """
    with installed():
        env = dict(env_vars or {})
        check_job(job, env)

        def run() -> None:
            with folder_cache():
                runner = _runner(job, cache_storage_url, no_cache_read)
                runner.run(env, dry_run=dry_run)

        run_on_main(run)


def _runner(job: Mapping[str, Any], cache_storage_url: str | None, no_cache_read: bool) -> Any:
    base = irisml_module("core").JobRunner

    class Runner(base):  # type: ignore[misc,valid-type]
        """The engine, which tells what failed; the error is the task's, not that of an error handler."""

        def on_error(self, context: Any, error: Exception) -> None:
            logs = context.get_execution_logs()
            if logs:
                error.add_note(f"In the task {described(logs[-1]['task_name'], logs[-1]['name'])}.")
            try:
                super().on_error(context, error)
            except Exception as second:
                error.add_note(f"Then an on_error task failed: {type(second).__name__}: {second}")

    return Runner(job, cache_storage_url=cache_storage_url, no_cache_read=no_cache_read)


def described(task: str, name: str | None) -> str:
    """Return how messages name a task of a job."""
    return repr(task) if name in (None, task) else f"{task!r} (name {name!r})"


@contextmanager
def folder_cache() -> Iterator[None]:
    """Let irisml keep its cache in a folder: its own way (0.0.38) calls a method that pathlib does not have."""
    runner, cache = irisml_module("core.job_runner"), irisml_module("core.cache_manager")
    original = runner.create_storage_manager

    class FolderStorage(cache.StorageManager):  # type: ignore[misc,name-defined]
        """Outputs as files, with the hash beside each."""

        def __init__(self, folder: Path) -> None:
            self._folder = folder

        def get_hash(self, paths: list[str]) -> str | None:
            file = self._hash_file(paths)
            return file.read_text() if file.is_file() else None

        def get_contents(self, paths: list[str]) -> bytes | None:
            file = self._folder.joinpath(*paths)
            return file.read_bytes() if file.is_file() else None

        def put_contents(self, paths: list[str], contents: bytes, hash_value: str, overwrite: bool) -> None:
            file, hash_file = self._folder.joinpath(*paths), self._hash_file(paths)
            if hash_file.exists() and not overwrite:
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            for path, content in ((file, contents), (hash_file, hash_value.encode())):
                partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
                partial.write_bytes(content)
                partial.replace(path)

        def _hash_file(self, paths: list[str]) -> Path:
            return self._folder.joinpath(*paths[:-1], f"{paths[-1]}.hash")

    def create(url: str) -> Any:
        return FolderStorage(Path(url)) if Path(url).is_dir() else original(url)

    runner.create_storage_manager = create
    try:
        yield
    finally:
        runner.create_storage_manager = original
