"""The command line, as processes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from launching import run_python, torchrun

import iris_hf
from iris_hf.cli import main
from iris_hf.cli_values import save_output
from iris_hf.engine.plugins.registry import BUILT_IN
from iris_hf.tables import MAPPINGS, plugins_in_markdown, tasks_in_markdown
from iris_hf.tasks import TASKS

ROOT = Path(__file__).parents[1]


def test_tasks_lists_every_task_with_its_first_line() -> None:
    printed = run_python("-m", "iris_hf", "tasks").stdout
    for name, task in TASKS.items():
        assert f"{name} " in printed
        assert task.summary in printed


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_parameter_of_a_task_is_documented_and_an_option(name: str) -> None:
    from iris_hf.cli import _flag, _is_function, task_parser

    task = TASKS[name]
    text = task_parser(task).format_help()
    for field in (*task.inputs, *task.config):
        assert field.help, f"{name}: the docstring says nothing of {field.name}"
        assert (_flag(field.name) in text) != _is_function(field.annotation)


@pytest.mark.parametrize(
    ("page", "table", "names"),
    [("tasks", tasks_in_markdown, [*TASKS, *MAPPINGS]), ("plugins", plugins_in_markdown, BUILT_IN)],
)
def test_the_documented_tables_are_those_of_the_signatures(
    page: str, table: Callable[[], str], names: Iterable[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (ROOT / "docs" / f"{page}.md").read_text().endswith(table())
    assert all(f"`{name}" in table() for name in names)
    assert main([page, "--markdown"]) == 0
    assert capsys.readouterr().out == table()


def test_plugins_are_listed_with_their_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins"]) == 0
    listed = capsys.readouterr().out
    assert "clip_grad_norm(max_norm=1.0)\n" in listed
    assert "\n    max_norm: Largest L2 norm" in listed


def test_output_that_nobody_reads_to_the_end_is_no_error() -> None:
    command = [sys.executable, "-m", "iris_hf", "plugins"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.close()
        assert listing.stderr.read() == ""
    assert listing.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Unknown command 'trian'. Did you mean 'train'"),
        (["taks"], "Did you mean 'tasks'"),
        (
            ["make_image_text_transform", "--class-names", "a"],
            "needs a function as image_transform, which no text can name",
        ),
        (["evaluate_accuracy", "--predictions", "no.npy", "--targets", "no.npy"], "There is no file 'no.npy'"),
        (["evaluate_accuracy", "--predictions", "x.csv", "--targets", "y"], "'x.csv' is not a file of tensors"),
        (["evaluate_accuracy", "--predictions", "x.npy"], "required: --targets"),
        (["evaluate_accuracy", "--pred", "x.npy", "--targets", "y"], "required: --predictions"),
        (["train", "--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["train", "--optimizer", "adamv"], "argument --optimizer: invalid choice: 'adamv'"),
    ],
)
def test_a_mistyped_command_says_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit:  # argparse's way
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["predict", "--save-predictions", "p.csv"],
            "predictions cannot be saved as 'p.csv'. Known: .safetensors, .npy",
        ),
        (["predict", "--save-targets", "none/t.npy"], "There is no folder 'none' to save targets in"),
        (["export_onnx", "--save-data", "none/m.onnx"], "There is no folder 'none' to save data in"),
        (["train", "--save-model", __file__], "model is saved in a folder, but"),
        (["train", "--save-elapsed-time", "t.npy"], "elapsed_time cannot be saved as 't.npy'. Known: .json."),
    ],
)
def test_where_nothing_can_be_saved_is_said_before_anything_is_read(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"predict": ["--dataset", "none"], "train": ["--train-dataset", "none", "--num-epochs", "1"]}
    assert main([*arguments, "--model", "none", *needed.get(arguments[0], [])]) == 2
    assert message in capsys.readouterr().err


def test_an_output_that_does_not_fit_into_its_file_is_not_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [torch.rand(2, 6), torch.rand(0, 6)]
    path = save_output(TASKS["predict"].outputs[0], boxes, str(tmp_path / "p.npy"))
    assert path == str(tmp_path / "p.npy.json")
    for read, box in zip(json.loads(Path(path).read_text()), boxes, strict=True):
        assert torch.equal(torch.tensor(read).reshape(-1, 6), box)
    assert "predictions is a list, which a file '.npy' cannot hold" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", b"{}", "it holds no list but dict"),
        ("t.json", b'[["a"]]', "cannot be read"),
        ("t.json", b"[", "cannot be read"),
        ("t.npy", b"no array", "cannot be read"),
        ("t.safetensors", b"no tensors", "cannot be read"),
        ("t.safetensors", safetensors.torch.save({"labels": torch.zeros(1)}), "holds the tensors labels. Name one"),
    ],
)
def test_a_file_that_holds_no_tensors_is_named(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["evaluate_accuracy", "--predictions", str(tmp_path / name), "--targets", "none.npy"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(tmp_path / name) in said


def test_accuracy_of_two_files(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]))
    (tmp_path / "t.json").write_text("[1, 0, 0]")
    files = ("--predictions", str(tmp_path / "p.npy"), "--targets", str(tmp_path / "t.json"))
    assert json.loads(run_python("-m", "iris_hf", "evaluate_accuracy", *files).stdout) == {
        "accuracy": pytest.approx(2 / 3)
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 images of two colours."""
    import PIL.Image

    folder = tmp_path_factory.mktemp("images")
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / name).mkdir()
        for number in range(6):
            shade = tuple(value + number for value in colour)
            PIL.Image.new("RGB", (8, 8), shade).save(folder / name / f"{number}.png")
    return folder


def test_create_train_predict_and_score_from_the_command_line(images: Path, tmp_path: Path) -> None:
    vit = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit["intermediate_size"] = 16
    created = run_python(
        *("-m", "iris_hf", "create_hf_model", "--name-or-path", "vit", "--no-pretrained", "--config", json.dumps(vit)),
        *("--target-type", "multiclass", "--class-names", "blue", "red", "--save-model", str(tmp_path / "fresh")),
    )
    assert created.returncode == 0, created.stderr
    trained = torchrun(
        2,
        *("-m", "iris_hf", "train", "--model", str(tmp_path / "fresh"), "--train-dataset", str(images)),
        *("--num-epochs", "8", "--batch-size", "3", "--optimizer", "adamw", "--base-lr", "0.01", "--random-seed", "0"),
        *("--plugins", "log_summary", "--save-model", str(tmp_path / "trained")),
    )
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count(str(tmp_path / "trained")) == 1  # one process writes and prints for all
    predicted = run_python(
        *("-m", "iris_hf", "predict", "--dataset", str(images), "--model", str(tmp_path / "trained")),
        *("--save-predictions", str(tmp_path / "p.safetensors"), "--save-targets", str(tmp_path / "t.npy")),
    )
    assert predicted.returncode == 0, predicted.stderr
    files = ("--predictions", str(tmp_path / "p.safetensors"), "--targets", str(tmp_path / "t.npy"))
    scored = run_python("-m", "iris_hf", "evaluate_accuracy", *files)
    assert json.loads(scored.stdout) == {"accuracy": 1.0}


def test_a_data_set_and_names_from_the_command_line(images: Path, tmp_path: Path) -> None:
    sampled = run_python(
        *("-m", "iris_hf", "sample_few_shot_dataset", "--dataset", str(images), "--n-shot", "2"),
        *("--save-dataset", str(tmp_path / "few")),
    )
    assert sampled.returncode == 0, sampled.stderr
    read = run_python("-m", "iris_hf", "get_targets_from_dataset", "--dataset", str(tmp_path / "few"))
    assert sorted(json.loads(read.stdout)["targets"]) == [0, 0, 1, 1]
    names = ("--class-names", "red", "blue")
    picked = run_python(
        *("-m", "iris_hf", "get_subclass_dataset", "--dataset", str(images), *names, "--class-ids", "[1]"),
        *("--save-dataset", str(tmp_path / "one")),
    )
    assert json.loads(picked.stdout) == {"dataset": str(tmp_path / "one"), "class_names": ["blue"], "num_classes": 1}


def test_every_public_name_loads_and_is_mirrored_for_type_checkers() -> None:
    source = (ROOT / "iris_hf" / "__init__.py").read_text()
    for name in iris_hf.__all__:
        assert getattr(iris_hf, name) is not None
        assert f"{name} as {name}" in source
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        iris_hf.trian  # noqa: B018
