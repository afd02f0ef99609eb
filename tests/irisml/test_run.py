"""Jobs: what they do, what the cache keeps, and what a wrong one says."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from launching import ROOT, run_python
from tiny import Net, Tensors
from tiny_jobs import TRAIN, note, tiny_job

import iris_hf
from iris_hf.errors import ConfigError
from iris_hf.irisml import run_job
from iris_hf.irisml.check import check_job
from iris_hf.irisml.run import folder_cache


def lines(notes: Path) -> list[str]:
    return notes.read_text().splitlines() if notes.exists() else []


def test_a_job_does_what_the_functions_do(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    run_job(tiny_job(notes, random_seed=0))
    data = Tensors(32)
    trained = iris_hf.train(Net(), data, None, **TRAIN, random_seed=0).model
    result = iris_hf.predict(data, trained, batch_size=8, num_dataloader_workers=0)
    assert lines(notes) == [f"- accuracy {iris_hf.evaluate_accuracy(result.predictions, result.targets)}"]


def test_variables_reach_numbers_truth_and_plugins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = tiny_job(tmp_path / "notes", num_epochs="$env.N", nesterov="$env.NO", plugins=["heartbeat('$env.PAUSE')"])
    with caplog.at_level("INFO", logger="iris_hf"):
        run_job(job, {"N": "1", "NO": "False", "PAUSE": "0"})  # nesterov without momentum would be an error
    assert "Step 4 of 4 is done" in caplog.text


def test_the_cache_gives_back_what_was_computed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    notes, cache = tmp_path / "notes", tmp_path / "cache"
    cache.mkdir()
    job = tiny_job(notes)
    for _ in range(2):
        with caplog.at_level("INFO"):
            run_job(job, cache_storage_url=str(cache))
    assert lines(notes)[0] == lines(notes)[1]
    for name in ("train", "predict", "evaluate_accuracy"):
        assert caplog.text.count(f"[{name}]: Found cached outputs") == 1
    assert "has different hash" not in caplog.text
    assert "wrong hash" not in caplog.text


@pytest.mark.parametrize(
    ("name", "inputs", "config"),
    [
        ("create_classification_prompt_generator", {}, {"name": "template", "template": "a {}"}),
        ("build_classification_prompt_dataset", {"class_names": ["cat", "dog"]}, {}),
        ("sample_few_shot_dataset", {"dataset": "$output.make_tiny.dataset"}, {"n_shot": 2}),
        ("make_feature_extractor_model", {"model": "$output.make_tiny.model"}, {"output_module_name": "body"}),
    ],
)
def test_outputs_survive_the_cache(
    name: str, inputs: Any, config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    job = {"tasks": [{"task": "make_tiny"}, {"task": name, "inputs": inputs, "config": config}]}
    for _ in range(2):
        run_job(job, cache_storage_url=str(cache))
    assert f"[{name}]: Found cached outputs" in "".join(caplog.messages) or caplog.messages == []
    files = [f for f in cache.glob(f"{name}/*/*/*") if f.suffix != ".hash"]
    assert [f.name for f in files] == [field.name for field in iris_hf.tasks.TASKS[name].outputs]
    import pickle

    assert not isinstance(pickle.loads(files[0].read_bytes()), dict)


def test_a_changed_file_of_weights_is_read_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import timm
    from safetensors.torch import load_file, save_file

    file, cache, saved = tmp_path / "weights.safetensors", tmp_path / "cache", tmp_path / "saved"
    cache.mkdir()
    encode = {"task": "make_feature_extractor_model", "inputs": {"model": "$output.create_timm_model.model"}}
    create = {"task": "create_timm_model", "inputs": {"name": "test_resnet"}, "config": {"weights": str(file)}}
    save = {"inputs": {"model": "$output.make_feature_extractor_model.model"}, "config": {"path": str(saved)}}
    read = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_resnet").state_dict(), file)
        with caplog.at_level("INFO"):
            run_job({"tasks": [create, encode, {"task": "save_state_dict", **save}]}, cache_storage_url=str(cache))
        first = next(iter(load_file(file).values()))
        read.append(any(torch.equal(first, value) for value in torch.load(saved, weights_only=True).values()))
    assert read == [True] * 3
    assert caplog.text.count("[make_feature_extractor_model]: Found cached outputs") == 1


def test_a_training_that_writes_is_not_found_in_the_cache(tmp_path: Path) -> None:
    cache, checkpoints = tmp_path / "cache", tmp_path / "checkpoints"
    cache.mkdir()
    job = {"tasks": tiny_job(tmp_path, checkpoint_dir=str(checkpoints), checkpoint_epochs=1)["tasks"][:2]}
    for _ in range(2):
        run_job(job, cache_storage_url=str(cache))
        assert any(checkpoints.iterdir())
        shutil.rmtree(checkpoints)


def test_renumbered_data_are_the_same_to_the_cache_in_every_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image, boxes = PIL.Image.new("RGB", (8, 8)), torch.tensor([[1, 0.2, 0.2, 0.8, 0.8]])
    rows = iris_hf.to_hf([(image, boxes)], target_type="detection", class_names=["cat", "dog"], streaming=False)
    rows.save_to_disk(str(tmp_path / "data"))
    (tmp_path / "cache").mkdir()
    data = {name: f"$output.load_hf_dataset.{name}" for name in ("dataset", "class_names")}
    tasks = [
        {"task": "load_hf_dataset", "inputs": {"path": str(tmp_path / "data")}},
        {"task": "get_subclass_dataset", "inputs": data, "config": {"class_ids": [1], "remap_class_ids": True}},
        {"task": "get_targets_from_dataset", "inputs": {"dataset": "$output.get_subclass_dataset.dataset"}},
    ]
    for _ in range(2):
        with caplog.at_level("INFO"):
            run_job({"tasks": tasks}, cache_storage_url=str(tmp_path / "cache"))
    assert caplog.text.count("[get_targets_from_dataset]: Found cached outputs") == 1
    assert "has different hash" not in caplog.text


def test_jobs_can_share_a_folder_as_their_cache(tmp_path: Path) -> None:
    from irisml.core import job_runner

    with folder_cache():
        storage = job_runner.create_storage_manager(str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: storage.put_contents(["train", "model"], b"x" * 9999, "hash", True), range(400)))
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["model.hash"]


def test_a_dry_run_works_on_nothing(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    job = tiny_job(notes)
    job["tasks"][-1] = {"task": "print", "inputs": {"data_float": "$output.evaluate_accuracy.accuracy"}}
    job["tasks"].append({"task": "save_pretrained", "inputs": {"model": None, "folder": str(tmp_path / "saved")}})
    run_job(job, dry_run=True)
    assert not notes.exists()
    assert not (tmp_path / "saved").exists()


def changed(job: dict[str, Any], index: int, **parts: Any) -> dict[str, Any]:
    tasks = [dict(task) for task in job["tasks"]]
    for key, value in parts.items():
        tasks[index][key] = {**tasks[index].get(key, {}), **value} if isinstance(value, dict) else value
    return {**job, "tasks": tasks}


WRONG = {
    "unknown task": ((1, {"task": "trian"}), "Unknown task 'trian'. Did you mean 'train'"),
    "upper case": ((1, {"task": "Train"}), "Unknown task 'Train'"),
    "unknown key": ((1, {"configs": {}}), r"Unknown key of tasks\[1\] \(train\) 'configs'. Did you mean 'config'"),
    "unknown field": (
        (1, {"config": {"num_epoch": 1}}),
        "Task 'train': Unknown config field 'num_epoch'. Did you mean",
    ),
    "unknown nested field": (
        (1, {"config": {"lr_scheduler": {"warm_iters": 1}}}),
        "Task 'train': Unknown field of lr_scheduler 'warm_iters'",
    ),
    "unknown literal": ((1, {"config": {"optimizer": "adamv"}}), "Task 'train': Unknown value of optimizer 'adamv'"),
    "wrong type": ((1, {"config": {"num_epochs": "many"}}), "the config field 'num_epochs' takes int, got 'many'"),
    "cut number": ((1, {"config": {"batch_size": 2.5}}), "the config field 'batch_size' takes int, got 2.5"),
    "text for truth": ((1, {"config": {"nesterov": "perhaps"}}), "'nesterov' takes true or false, got 'perhaps'"),
    "text for a list": ((1, {"config": {"plugins": "ema"}}), r"'plugins' takes list\[str\], got 'ema'"),
    "number for a mapping": ((1, {"config": {"lr_scheduler": 3}}), "'lr_scheduler' takes a mapping, got 3"),
    "none": ((1, {"config": {"num_epochs": None}}), "'num_epochs' takes int, got None"),
    "unset variable": (
        (1, {"config": {"num_epochs": "$env.EPOCHS"}}),
        r"'num_epochs' is '\$env.EPOCHS', and EPOCHS is not set. Set it: -e EPOCHS=VALUE",
    ),
    "no variable": ((1, {"config": {"device": "$cpu"}}), r"the config field 'device' is '\$cpu', which is neither"),
    "lower-case variable": (
        (1, {"config": {"num_epochs": "$env.epochs"}}),
        r"'num_epochs' is '\$env.epochs', which is neither \$env.NAME, in upper case",
    ),
    "variable with a dot": ((1, {"config": {"num_epochs": "$env.A.B"}}), r"'\$env.A.B', which is neither"),
    "upper-case output": ((1, {"inputs": {"model": "$output.Make.model"}}), r"'\$output.Make.model', which is neither"),
    "object for a mapping": (
        (1, {"config": {"lr_scheduler": "$output.make_tiny.model"}}),
        r"'lr_scheduler' takes a mapping, got '\$output.make_tiny.model'",
    ),
    "infinite number": ((1, {"config": {"batch_size": float("inf")}}), "'batch_size' takes int, got inf"),
    "unknown plugin": (
        (1, {"config": {"plugins": ["emma"]}}),
        "Task 'train': Unknown plugin 'emma'. Did you mean 'ema'",
    ),
    "unset variable in a plugin": (
        (1, {"config": {"plugins": ["ema('$env.DECAY')"]}}),
        r"Task 'train': plugin .* is '\$env.DECAY', and DECAY is not set",
    ),
    "wrong type in another package's task": (
        (0, {"config": {"num_examples": "many"}}),
        "Task 'make_tiny': the config field 'num_examples' takes int, got 'many'",
    ),
    "wrong nested task": (
        (0, {"task": "run_sequential", "config": {"tasks": [{"task": "predict", "config": {"batchsize": 1}}]}}),
        "Task 'predict': the input 'dataset' is missing",
    ),
    "unknown key of a nested task": (
        (0, {"task": "branch", "config": {"condition": True, "then_tasks": [{"task": "print", "input": {}}]}}),
        r"Unknown key of then_tasks\[0\] of branch \(print\) 'input'. Did you mean 'inputs'",
    ),
    "no variable in an input": (
        (1, {"inputs": {"model": "$model"}}),
        r"neither \$env.NAME, in upper case, nor \$output.task.field, in lower case",
    ),
    "later task": (
        (1, {"inputs": {"model": "$output.predict.model"}}),
        r"no task before it is named 'predict'. Before it: note_down, make_tiny",
    ),
    "unknown output": (
        (2, {"inputs": {"model": "$output.train.modell"}}),
        "Task 'predict': Unknown output of 'train' in the input 'model' 'modell'. Did you mean 'model'",
    ),
    "text for an object": ((1, {"inputs": {"model": "resnet"}}), "the input 'model' takes an object, got 'resnet'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_job_names_task_and_field_before_anything_runs(case: str, tmp_path: Path) -> None:
    (index, parts), message = WRONG[case]
    job = changed(tiny_job(tmp_path / "notes"), index, **parts)
    job["tasks"].insert(0, note(tmp_path / "early", "ran"))
    if "key of tasks" in message:
        message = message.replace("[1", "[2")
    with pytest.raises(ConfigError, match=message):
        run_job(job)
    assert not (tmp_path / "early").exists()


def test_outputs_of_nested_tasks_are_known_and_false_is_false_in_them(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    job = tiny_job(notes, nesterov="$env.NO")  # nesterov without momentum would be an error
    job["tasks"][1] = {"task": "run_sequential", "config": {"tasks": [job["tasks"][1]]}}
    job["tasks"][:2] = [
        {"task": "branch", "config": {"condition": True, "then_tasks": job["tasks"][:2]}},
    ]
    run_job(job, {"NO": "false"})
    assert lines(notes)[0].startswith("- accuracy")


def test_nested_tasks_know_what_their_task_sets_for_them() -> None:
    iris_hf.irisml.install()
    made = {"task": "make_tiny", "config": {"num_examples": "$env.REPEAT_TASKS_INDEX"}}
    job: dict[str, Any] = {"tasks": [{"task": "repeat_tasks", "config": {"num_repeats": 2, "tasks": [made]}}]}
    check_job(job, {})
    shrink = {"task": "get_targets_from_dataset", "inputs": {"dataset": "$output.make_tiny.dataset"}}
    with pytest.raises(ConfigError, match="no task before it is named 'make_tiny'"):
        check_job({"tasks": [*job["tasks"], shrink]}, {})
    space = [{"name": "REPEAT_TASKS_INDEX", "candidates": [4, 8]}]
    grid = {"search_space": space, "tasks": [made, shrink], "metrics_output_name": "get_targets_from_dataset.targets"}
    after = {**shrink, "name": "again"}
    check_job({"tasks": [{"task": "search_grid_sequential", "config": grid}, after]}, {})
    with pytest.raises(ConfigError, match="no task before it is named 'make_tiny'"):
        check_job({"tasks": [{"task": "run_parallel", "config": {"tasks": [{"task": "make_tiny"}, shrink]}}]}, {})


def test_an_unknown_key_of_a_job_is_told_as_irisml_ignores_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    iris_hf.irisml.install()
    check_job({**tiny_job(tmp_path), "on_errors": []}, {})
    assert "Unknown key of the job 'on_errors'. Did you mean 'on_error'" in caplog.text


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "notes")
    del job["tasks"][1]["inputs"]["model"]
    with pytest.raises(ConfigError, match="Task 'train': the input 'model' is missing"):
        run_job(job)
    job = tiny_job(tmp_path / "notes")
    del job["tasks"][1]["config"]["num_epochs"]
    job["tasks"][1]["name"] = "first"
    with pytest.raises(ConfigError, match=r"Task 'train' \(name 'first'\): the config field 'num_epochs' is missing"):
        run_job(job)
    with pytest.raises(ConfigError, match="A job is a mapping with a list of tasks"):
        run_job({"task": "train"})


def test_the_variables_text_is_checked_by_the_fields_type(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "notes", num_epochs="$env.N")
    with pytest.raises(ConfigError, match=r"'num_epochs' takes int, got 'ten' \(the value of \$env.N\)"):
        run_job(job, {"N": "ten"})


def test_after_a_failure_the_error_tasks_run_and_the_first_error_is_told(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    job = tiny_job(notes)
    job["tasks"][2]["inputs"]["model"] = "$output.make_tiny.dataset"
    job["on_error"] = [note(notes, "cleaned", "$env.IRISML_EXCEPTION"), note(tmp_path / "no" / "folder", "fails")]
    with pytest.raises(Exception, match="Tensors") as caught:
        run_job(job)
    assert caught.value.__notes__[0] == "In the task 'predict'."
    assert caught.value.__notes__[1].startswith("Then an on_error task failed: FileNotFoundError")
    assert lines(notes)[0].startswith("- cleaned")
    assert "accuracy" not in notes.read_text()


def test_an_unknown_input_is_told_as_irisml_ignores_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_job(changed(tiny_job(tmp_path / "notes"), 1, inputs={"transforms": 1}), dry_run=True)
    assert "Task 'train': there is no input 'transforms'; irisml ignores it." in caplog.text


def cli(*arguments: str) -> Any:
    other = str(Path(__file__).parent / "other_tasks")
    code = f"import sys; sys.path[:0] = [{other!r}]; from iris_hf.cli import main; sys.exit(main({list(arguments)!r}))"
    return run_python("-c", code)


def test_the_command_runs_a_job_and_its_exit_code_tells(tmp_path: Path) -> None:
    notes, file = tmp_path / "notes", tmp_path / "job.json"
    file.write_text(json.dumps(tiny_job(notes, num_epochs="$env.N")))
    done = cli("run", str(file), "-e", "N=1", "--no-cache")
    assert done.returncode == 0, done.stderr
    assert lines(notes)[0].startswith("- accuracy")
    wrong = cli("run", str(file))
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "iris-hf: error: Task 'train': the config field 'num_epochs' is '$env.N'" in wrong.stderr
    job = {"tasks": [note(tmp_path / "no" / "folder", "fails")]}
    file.write_text(json.dumps(job))
    failed = cli("run", str(file))
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "  In the task 'note_down'."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.json"], "The job 'no.json' cannot be read: No such file"),
        ([str(ROOT / "README.md")], "is not JSON"),
        ([str(ROOT / "README.md"), "-e", "N"], "A variable is NAME=VALUE, got 'N'|is not JSON"),
    ],
)
def test_what_is_no_job_is_said(arguments: list[str], message: str) -> None:
    from iris_hf.irisml import commands

    with pytest.raises(ConfigError, match=message):
        commands.run(arguments)


def test_show_tells_what_a_task_takes(capsys: pytest.CaptureFixture[str]) -> None:
    from iris_hf.cli import main

    assert main(["show", "predict"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Run a model over a dataset.")
    assert "  batch_size: int = 1\n" in printed
    assert "  plugins: list[str] = []\n" in printed
    assert main(["show", "get_dataset_split"]) == 0
    assert "train_val_split: float" in capsys.readouterr().out
    assert main(["show"]) == 0
    printed = capsys.readouterr().out
    assert "train  (iris_hf)\n" in printed
    assert "get_dataset_split\n" in printed
    assert main(["show", "trian"]) == 2
    assert "Unknown task 'trian'. Did you mean 'train'" in capsys.readouterr().err


def test_a_model_of_a_job_is_the_trained_one(tmp_path: Path) -> None:
    """Models flow through the engine as they are: no copies that lose what training gave."""
    from irisml.core import JobRunner

    with iris_hf.irisml.installed():
        runner = JobRunner({"tasks": tiny_job(tmp_path / "notes", random_seed=0)["tasks"][:2]})
        runner._job.load_modules()
        from irisml.core import Context

        context = Context({})
        for task in runner._job.tasks:
            task.execute(context)
    model = context.get_outputs("train").model
    expected = iris_hf.train(Net(), Tensors(32), None, **TRAIN, random_seed=0).model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
