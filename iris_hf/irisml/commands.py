"""The commands `iris-hf run` and `iris-hf show`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iris_hf.errors import ConfigError, IrisHFError


def run(arguments: Sequence[str]) -> int:
    """Run a job; the exit code is 0, 1 for a task that failed, and 2 for a caller's mistake."""
    parser = argparse.ArgumentParser(
        prog="iris-hf run",
        allow_abbrev=False,
        description="Run an irisml job. Its engine and its other tasks are irisml's.",
        epilog="In several processes: accelerate launch -m iris_hf run JOB. The main process runs the job; training, "
        "prediction and benchmarks use all of them.",
    )
    parser.add_argument("job", type=Path, metavar="JOB", help="the JSON file")
    parser.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="the value of $env.NAME; may be repeated"
    )
    parser.add_argument(
        "-n", "--dry-run", "--dry_run", action="store_true", help="check the job and put its tasks together"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what irisml does")
    parser.add_argument("--no-cache", "--no_cache", action="store_true", help="leave IRISML_CACHE_URL alone")
    parser.add_argument(
        "--no-cache-read", "--no_cache_read", action="store_true", help="only write there (or set IRISML_NO_CACHE_READ)"
    )
    options = parser.parse_args(arguments)
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s (%(name)s)", level=logging.INFO if is_main else logging.ERROR
    )
    if options.verbose:
        logging.getLogger("irisml").setLevel(logging.DEBUG)
    from iris_hf.irisml.run import run_job

    try:
        run_job(
            _read_job(options.job),
            _variables(options.env),
            dry_run=options.dry_run,
            cache_storage_url=None if options.no_cache else os.environ.get("IRISML_CACHE_URL"),
            no_cache_read=options.no_cache_read or bool(os.environ.get("IRISML_NO_CACHE_READ")),
        )
    except IrisHFError:
        raise
    except Exception as error:  # irisml has logged its traceback
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()) if "\n" not in note)
        cause = f" {error.__cause__}" if error.__cause__ is not None else ""
        print(f"iris-hf: error: {type(error).__name__}: {error}{cause}{notes}", file=sys.stderr)
        return 1
    return 0


def _read_job(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The job {str(file)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"The job {str(file)!r} is not JSON: {error}.") from error


def _variables(texts: Sequence[str]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"A variable is NAME=VALUE, got {text!r}.")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def show(arguments: Sequence[str]) -> int:
    """Print what a task of jobs does and takes, of iris_hf or of irisml's packages; without a name, list them."""
    parser = argparse.ArgumentParser(prog="iris-hf show", description="Show a task of irisml jobs.")
    parser.add_argument("task", nargs="?", metavar="TASK", help="its name; without one, all are listed")
    options = parser.parse_args(arguments)
    from iris_hf.irisml.check import find_task_class, known_tasks
    from iris_hf.irisml.names import installed
    from iris_hf.irisml.task_classes import config_fields
    from iris_hf.tasks import TASKS

    with installed():
        if options.task is None:
            for name in known_tasks():
                print(f"{name}  (iris_hf)" if name in TASKS else name)
            return 0
        task = find_task_class(options.task)
        print(inspect.getdoc(task) or "It has no description.")
        inputs, outputs = dataclasses.fields(task.Inputs), dataclasses.fields(task.Outputs)
        for title, fields in (("Config", config_fields(task)), ("Inputs", inputs), ("Outputs", outputs)):
            print(f"\n{title}:")
            for field in fields:
                print(f"  {field.name}: {_type_name(field.type)}{_default(field)}")
    return 0


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()!r}"
    return "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
