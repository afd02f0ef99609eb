"""The command line: one command per task, generated from its signature."""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from iris_hf._version import __version__
from iris_hf.errors import ConfigError, IrisHFError, unknown_name

if typing.TYPE_CHECKING:
    from iris_hf.tasks import Field, Task


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 2 for a caller's mistake, with one line that names it."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not arguments or arguments[0].startswith("-"):
        parser.parse_args(arguments)
        parser.print_help()
        return 0
    try:
        code = _dispatch(arguments[0], arguments[1:])
        sys.stdout.flush()
        return code
    except IrisHFError as error:
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()) if "\n" not in note)
        print(f"iris-hf: error: {error}{notes}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads the output, such as `head`, has seen enough; Python would write more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(command: str, rest: Sequence[str]) -> int:
    if command == "tasks":
        return _list_tasks(rest)
    if command == "plugins":
        return _list_plugins(rest)
    if command in ("run", "show"):
        from iris_hf.irisml import commands

        return commands.run(rest) if command == "run" else commands.show(rest)
    from iris_hf.tasks import TASKS

    if command not in TASKS:
        raise unknown_name("command", command, [*TASKS, "tasks", "plugins", "run", "show"])
    return _run(TASKS[command], rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iris-hf",
        description="The irisml training tasks on the Hugging Face stack.",
        usage="iris-hf [--version] COMMAND ...",
        epilog="Commands: `tasks` lists the tasks; `iris-hf TASK --help` says what one takes; `plugins` lists the "
        "plugins; `run` runs an irisml job; `show` shows a task of jobs. "
        "Several processes: `accelerate launch -m iris_hf TASK ...`.",
    )
    parser.add_argument("--version", action="version", version=f"iris_hf {__version__}")
    return parser


def _wants_markdown(command: str, description: str, arguments: Sequence[str]) -> bool:
    parser = argparse.ArgumentParser(prog=f"iris-hf {command}", description=description)
    parser.add_argument("--markdown", action="store_true", help="print the documentation table")
    return bool(parser.parse_args(arguments).markdown)


def _list_tasks(arguments: Sequence[str]) -> int:
    if _wants_markdown("tasks", "List the tasks.", arguments):
        from iris_hf.tables import tasks_in_markdown

        print(tasks_in_markdown(), end="")
        return 0
    from iris_hf.tasks import TASKS

    width = max(map(len, TASKS))
    for name, task in TASKS.items():
        print(f"{name:<{width}}  {task.summary}")
    return 0


def _list_plugins(arguments: Sequence[str]) -> int:
    as_markdown = _wants_markdown("plugins", "List the plugins and their arguments.", arguments)
    from iris_hf.tables import plugins, plugins_in_markdown

    if as_markdown:
        print(plugins_in_markdown(), end="")
        return 0
    for call, text, meanings in plugins():
        print(f"{call}\n    {text}", *(f"\n    {name}: {meaning}" for name, meaning in meanings.items()), sep="")
    return 0


def _run(task: Task, arguments: Sequence[str]) -> int:
    from iris_hf.cli_values import check_output_path, read_input, save_output, shown

    options = vars(task_parser(task).parse_args(arguments))
    for field in task.outputs:
        if options[f"save_{field.name}"] is not None:
            check_output_path(field, options[f"save_{field.name}"])
    inputs: dict[str, Any] = {}
    for field in task.inputs:
        if _is_function(field.annotation):
            inputs[field.name] = _default_function(field.name, inputs)
            if inputs[field.name] is None and field.is_required:
                raise ConfigError(
                    f"{task.name} needs a function as {field.name}, which no text can name. Call "
                    f"iris_hf.{task.python_name} from Python, or let a job's task make it (docs/irisml.md)."
                )
        elif options[field.name] is not None:
            inputs[field.name] = read_input(field, options[field.name])
        elif not field.is_required:
            inputs[field.name] = field.default
    given = {field.name: options[field.name] for field in task.config if options[field.name] is not _UNSET}
    outputs = task.named_outputs(task.function(**inputs, **given))
    # Inside a launcher every rank has the result, and one of them writes it.
    if int(os.environ.get("RANK", "0")) == 0:
        printed = {}
        for field in task.outputs:
            value = outputs[field.name]
            path = options[f"save_{field.name}"]
            if path is not None:
                printed[field.name] = save_output(field, value, path)
            else:
                printed[field.name] = shown(value)
        print(json.dumps(printed))
    return 0


_UNSET = object()


def task_parser(task: Task) -> argparse.ArgumentParser:
    """Return the parser of a task's command."""
    parser = argparse.ArgumentParser(
        prog=f"iris-hf {task.name}",
        allow_abbrev=False,
        description=task.summary,
        epilog="Models: a folder of save_pretrained or of export_onnx, or a Hub repository. Datasets: a folder of "
        "save_to_disk, an image folder, a .parquet file or a Hub repository, each with #split where it has several. "
        "Tensors: .safetensors, .npy or .json. Outputs that are not saved are printed as JSON.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inputs = parser.add_argument_group("inputs")
    for field in task.inputs:
        if not _is_function(field.annotation):
            option = _option(field.annotation)
            inputs.add_argument(
                _flag(field.name),
                required=field.is_required,
                help=_help(field, field.is_required),
                **(option if "nargs" in option else {"metavar": "PATH"}),
            )
    config = parser.add_argument_group("configuration")
    for field in task.config:
        config.add_argument(
            _flag(field.name),
            required=field.is_required,
            default=_UNSET,
            help=_help(field, field.is_required),
            **_option(field.annotation),
        )
    outputs = parser.add_argument_group("outputs")
    for field in task.outputs:
        outputs.add_argument(
            _flag(f"save_{field.name}"), metavar="PATH", help=f"where to save it. {_help(field, True)}"
        )
    return parser


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(field: Field, is_required: bool) -> str:
    text = field.help.replace("%", "%%")
    return text if is_required else f"{text} (default: {str(field.default).replace('%', '%%')})"


def _option(annotation: Any) -> dict[str, Any]:
    """Return argparse's arguments for a config value of this type."""
    from iris_hf.tasks import union_members

    members = union_members(annotation)
    if members == [bool]:
        return {"action": argparse.BooleanOptionalAction}
    if len(members) == 1 and get_origin(members[0]) is Literal:
        return {"choices": get_args(members[0])}
    if len(members) == 1 and members[0] in (int, float, str):
        return {"type": members[0], "metavar": members[0].__name__.upper()}
    if set(members) == {str, Path}:
        return {"type": str, "metavar": "PATH"}
    lists = [m for m in members if get_origin(m) is not None and issubclass(get_origin(m), Sequence)]
    if lists and any(str in union_members(get_args(item)[0]) for item in lists):
        return {"nargs": "*", "metavar": "TEXT"}
    return {"type": _json_value, "metavar": "JSON"}


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _is_function(annotation: Any) -> bool:
    """Whether a value is code (a transform, a collate function): no text can name it, so it has a default."""
    from iris_hf.tasks import union_members

    members = union_members(annotation)
    return any(getattr(get_origin(member), "__name__", "") == "Callable" for member in members)


def _default_function(name: str, inputs: dict[str, Any]) -> Any:
    """Return the transform that fits the model; None for every other function."""
    model = inputs.get("model")
    if "transform" not in name or model is None:
        return None
    if getattr(model, "image_spec", None) is None:
        raise ConfigError(
            f"{type(model).__name__} does not say what images it takes, so {name} cannot be made for it. "
            "Use a model of create_hf_model or create_timm_model, or call the task from Python."
        )
    from iris_hf.models.transforms import create_image_transform

    return create_image_transform(model, train=name.startswith("train"))
