"""irisml's Task classes of the task table: the original's fields, and irisml's own loader."""

import dataclasses
import importlib
import inspect
import os
import pickle
import sys
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from tiny import Net

import iris_hf.irisml
from iris_hf.errors import ConfigError
from iris_hf.irisml import ranks
from iris_hf.irisml.check import check_job
from iris_hf.irisml.field_types import TrueOrFalse
from iris_hf.irisml.task_classes import config_fields, config_values, task_class
from iris_hf.tasks import TASKS, plain
from iris_hf.training.termination import Preempted

LR_SCHEDULER = (
    "name warmup_epochs warmup_iters warmup_lr warmup_factor warmup_end_factor min_lr end_factor decay_milestones "
    "decay_rate"
)
TRAIN_CONFIG = {
    "num_epochs": int,
    "batch_size": int,
    "base_lr": float,
    "device": Literal["cpu", "cuda"],
    "accumulate_grad_batches": int,
    "momentum": float,
    "nesterov": TrueOrFalse,
    "val_check_interval": float,
    "val_check_interval_epoch": int,
    "val_batch_size": int,
    "weight_decay": float,
    "num_processes": int,
    "num_dataloader_workers": int,
    "no_weight_decay_param_names": list[str],
    "no_weight_decay_module_class_names": list[str],
    "lr_scale_param_names": list[tuple[str, float]],
    "plugins": list[str],
    "random_seed": int,
    "ddp_find_unused_parameters": TrueOrFalse,
}
PREDICT_CONFIG = {
    name: TRAIN_CONFIG[name] for name in ("batch_size", "device", "num_processes", "num_dataloader_workers", "plugins")
}
TRAIN_INPUTS = "model train_dataset train_transform val_dataset val_transform collate_function"
ORIGINAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "train": (TRAIN_INPUTS, TRAIN_CONFIG, "model elapsed_time"),
    "train_with_gradient_cache": (TRAIN_INPUTS, {**TRAIN_CONFIG, "sub_batch_size": int}, "model elapsed_time"),
    "predict": ("dataset model transform collate_function", PREDICT_CONFIG, "predictions targets"),
    "append_classifier": (
        "model classifier",
        {"task_type": Literal["multiclass_classification", "multilabel_classification"]},
        "model",
    ),
    "make_feature_extractor_model": ("model", {"output_module_name": str}, "model"),
    "make_image_text_contrastive_model": (
        "image_model text_model",
        {"image_feature_dim": int, "text_feature_dim": int, "projection_dim": int},
        "model",
    ),
    "split_image_text_model": ("model", {"append_normalizer": TrueOrFalse}, "image_model text_model logit_scale"),
    "build_zero_shot_classifier": ("text_features text_classes logit_scale", {"num_classes": int}, "classifier"),
    "get_targets_from_dataset": ("dataset", {}, "targets"),
    "get_subclass_dataset": ("dataset class_names", {"class_ids": list[int]}, "dataset class_names num_classes"),
    "sample_few_shot_dataset": ("dataset", {"n_shot": int, "random_seed": int, "strict": TrueOrFalse}, "dataset"),
    "make_oversampled_dataset": (
        "dataset",
        {
            "min_num_samples": int,
            "oversampling_rate": float,
            "balance": TrueOrFalse,
            "balance_weights_max": float,
            "balance_weights_min": float,
        },
        "dataset",
    ),
    "create_classification_prompt_generator": ("", {"template": str}, "generator"),
    "build_classification_prompt_dataset": ("class_names prompt_generator", {}, "dataset"),
    "make_image_text_transform": ("image_transform class_names prompt_generator tokenizer", {}, "transform"),
    "evaluate_accuracy": ("predictions targets", {}, "accuracy"),
    "evaluate_detection_average_precision": ("predictions targets", {"iou_thresholds": list[float]}, "results"),
    "benchmark_model": (
        "model dataset transform",
        {
            "batch_size": int,
            "device": Literal["cpu", "cuda"],
            "num_iterations": int,
            "skip_training": TrueOrFalse,
            "skip_prediction": TrueOrFalse,
            "plugins": list[str],
        },
        "forward_backward_time_per_iteration forward_time_per_iteration backward_time_per_iteration "
        "prediction_time_per_iteration max_cuda_memory_in_mb",
    ),
    "export_onnx": ("model", {"input_size": Any}, "data"),
}
"""Inputs, config and outputs of the original's 19 tasks, without its literals that iris_hf has more of."""


def names(fields_class: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(fields_class)]


def without_none(kind: Any) -> Any:
    rest = [part for part in get_args(kind) if part is not type(None)]
    return rest[0] if get_origin(kind) is Union and len(rest) == 1 else kind


def loaded(name: str, config: dict[str, Any]) -> Any:
    """What irisml's loader makes of a config."""
    from irisml.core.task import Task
    from irisml.core.variable import replace_variables

    return Task._load_config(task_class(name).Config, replace_variables(config))


@pytest.mark.parametrize("name", sorted(ORIGINAL))
def test_a_task_has_the_fields_of_the_original(name: str) -> None:
    inputs, config, outputs = ORIGINAL[name]
    task = task_class(name)
    assert names(task.Inputs)[: len(inputs.split())] == inputs.split()
    assert names(task.Outputs)[: len(outputs.split())] == outputs.split()
    types = {field.name: without_none(field.type) for field in config_fields(task)}
    assert {field: types[field] for field in config} == config


@pytest.mark.parametrize("name", sorted(TASKS))
def test_irisml_takes_every_class(name: str) -> None:
    from irisml.core import TaskDescription
    from irisml.core.task import Task

    iris_hf.irisml.install()
    task = task_class(name)
    values: dict[Any, Any] = {int: 1, float: 1.0, TrueOrFalse: False, str: "x"}
    config = {}
    for field in dataclasses.fields(task.Config):
        kind = without_none(field.type)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            origin = get_origin(kind)
            config[field.name] = get_args(kind)[0] if origin is Literal else [] if origin else values[kind]
    irisml_task = Task(TaskDescription(name, config=config))
    irisml_task.load_module()
    assert irisml_task._task_class is task
    assert plain(inspect.getdoc(task)).startswith(TASKS[name].summary)
    assert names(task.Inputs) == [f.name for f in TASKS[name].inputs]
    for part in (task, task.Config, task.Inputs, task.Outputs):
        assert pickle.loads(pickle.dumps(part)) is part
    assert pickle.loads(pickle.dumps(loaded(name, config))) == loaded(name, config)


def test_variables_take_the_place_of_every_kind_of_value() -> None:
    from irisml.core import Context

    context = Context({"N": "3", "LR": "0.5", "OPT": "adamw", "DECAY": "0.9", "NAME": "linear", "DEVICE": "cpu"})
    config = loaded(
        "train",
        {
            "num_epochs": "$env.N",
            "base_lr": "$env.LR",
            "optimizer": "$env.OPT",
            "device": "$env.DEVICE",
            "val_batch_size": "$env.N",
            "lr_scheduler": {"name": "$env.NAME", "warmup_iters": "$env.N", "end_factor": None},
            "plugins": ["ema('$env.DECAY', num_skip_iterations=2)", "$env.OPT"],
            "lr_scale_param_names": [["body", 0.1]],
        },
    )
    values = config_values(TASKS["train"], context.resolve(config), context)
    assert values["num_epochs"] == values["val_batch_size"] == 3
    assert (values["base_lr"], values["optimizer"], values["device"]) == (0.5, "adamw", "cpu")
    assert values["plugins"] == ["ema(0.9, num_skip_iterations=2)", "adamw"]
    assert values["lr_scheduler"]["name"] == "linear"
    assert values["lr_scheduler"]["warmup_iters"] == 3
    assert "end_factor" not in values["lr_scheduler"]
    assert values["lr_scale_param_names"] == [("body", 0.1)]


@pytest.mark.parametrize("given", [{"height": 64, "width": 64}, {"crop_fraction": 1.0}, {"mean": [0.1, 0.2, 0.3]}])
def test_a_nested_field_that_a_job_leaves_out_is_not_said(given: dict[str, Any]) -> None:
    task = task_class("create_timm_model")
    model = task(loaded("create_timm_model", {"image_spec": given})).execute(task.Inputs("test_resnet")).model
    assert model.image_spec == iris_hf.create_timm_model("test_resnet", image_spec=given).image_spec


def test_a_job_of_irisml_tasks_timm_gives_its_model() -> None:
    task = task_class("create_timm_model")
    config = {"name": "test_resnet", "num_classes": 2, "task_type": "multilabel_classification"}
    model = task(loaded("create_timm_model", config)).execute(task.Inputs()).model
    expected = iris_hf.create_timm_model("test_resnet", num_classes=2, target_type="multilabel")
    assert repr(model) == repr(expected)
    iris_hf.irisml.install()
    check_job({"tasks": [{"task": "create_timm_model", "config": config}]}, {})
    with pytest.raises(ConfigError, match="Task 'create_timm_model': the input 'name' is missing"):
        check_job({"tasks": [{"task": "create_timm_model"}]}, {})


def test_variables_in_a_free_mapping_are_what_their_text_says() -> None:
    from irisml.core import Context

    context = Context({"SIZE": "64", "PRE_NORM": "false", "POOL": "avg"})
    given = {"img_size": ["$env.SIZE", 32], "pre_norm": "$env.PRE_NORM", "global_pool": "$env.POOL", "text": "64"}
    config = context.resolve(loaded("create_timm_model", {"config": given}))
    expected = {"img_size": [64, 32], "pre_norm": False, "global_pool": "avg", "text": "64"}
    assert config_values(TASKS["create_timm_model"], config, context)["config"] == expected


@pytest.mark.parametrize(("text", "truth"), [("false", False), ("True", True), ("0", False)])
def test_a_variable_for_truth_is_read_not_taken_for_true(text: str, truth: bool) -> None:
    from irisml.core import Context

    context = Context({"STRICT": text})
    config = context.resolve(loaded("sample_few_shot_dataset", {"n_shot": 1, "strict": "$env.STRICT"}))
    assert config.strict is truth


@pytest.mark.parametrize(
    ("config", "same"),
    [
        ({"plugins": ["ema", "log_summary"]}, True),
        ({"plugins": ["save_best('folder')"]}, False),
        ({"plugins": ["of_another_package"]}, False),
        ({"resume": "auto"}, False),
    ],
)
def test_the_cache_knows_trainings_that_only_compute(config: dict[str, Any], same: bool) -> None:
    from irisml.core import Context

    first, second = (loaded("train", {"num_epochs": 1, **config}) for _ in range(2))
    assert (first == second) is same
    assert Context({}).resolve(first) == first


def test_a_variable_may_be_one_of_several_types() -> None:
    from irisml.core import Context

    for text, size in (("64", 64), ("[64, 32]", [64, 32])):
        context = Context({"SIZE": text})
        config = context.resolve(loaded("export_onnx", {"input_size": "$env.SIZE"}))
        assert config_values(TASKS["export_onnx"], config, context)["input_size"] == size


def test_the_schedulers_fields_are_those_of_the_original() -> None:
    from iris_hf.irisml import tasks

    assert names(tasks.LrSchedulerConfig) == LR_SCHEDULER.split()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = tasks.nothing


def test_a_contradiction_is_found_when_the_task_runs_not_when_irisml_loads_it() -> None:
    config = loaded("train", {"num_epochs": 1, "lr_scheduler": {"name": "multistep"}})
    task = task_class("train")
    with pytest.raises(ConfigError, match="needs decay_milestones"):
        task(config).execute(task.Inputs(Net(), [(torch.zeros(3, 4, 4), 0)], None))


def test_install_resolves_its_names_only_and_can_be_undone() -> None:
    import irisml.tasks.get_dataset_split as other

    before = list(sys.meta_path)
    iris_hf.irisml.install()
    iris_hf.irisml.install()
    assert len(sys.meta_path) == len(before) + 1
    assert importlib.import_module("irisml.tasks.train").Task is task_class("train")
    assert importlib.import_module("irisml.tasks.get_dataset_split") is other
    with pytest.raises(AttributeError, match=r"'irisml\.tasks\.predict' of iris_hf has no attribute 'Predictor'"):
        _ = importlib.import_module("irisml.tasks.predict").Predictor
    iris_hf.irisml.uninstall()
    iris_hf.irisml.uninstall()
    assert sys.meta_path == before
    with pytest.raises(ModuleNotFoundError, match=r"irisml\.tasks\.train"):
        importlib.import_module("irisml.tasks.train")


def test_an_installed_original_is_replaced_put_back_and_lends_its_other_names(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "irisml" / "tasks" / "train"
    package.mkdir(parents=True)
    base = "import irisml.core\nclass Task(irisml.core.TaskBase):\n    def step(self): return 1\n"
    (package / "__init__.py").write_text(f"from .parts import VALUE\nclass Helper: ...\n{base}")
    (package / "parts.py").write_text("VALUE = 5\n")
    other = "from irisml.tasks.train import Task\nclass Task(Task):\n    def step(self): return super().step() + 1\n"
    (package.parent / "train_more.py").write_text(other)
    monkeypatch.syspath_prepend(str(tmp_path))
    original = importlib.import_module("irisml.tasks.train")
    iris_hf.irisml.install()
    ours = importlib.import_module("irisml.tasks.train")
    assert ours.Task is task_class("train")
    assert ours.VALUE == 5
    assert importlib.import_module("irisml.tasks.train.parts").VALUE == 5
    assert pickle.loads(pickle.dumps(ours.Helper)) is ours.Helper is original.Helper
    more = importlib.import_module("irisml.tasks.train_more").Task
    assert issubclass(more, original.Task)
    assert more(more.Config()).step() == 2
    iris_hf.irisml.uninstall()
    assert importlib.import_module("irisml.tasks.train") is original
    for name in ("irisml.tasks.train", "irisml.tasks.train.parts", "irisml.tasks.train_more"):
        del sys.modules[name]


def test_a_process_that_a_task_has_started_does_not_wait_for_the_launchers_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = ranks._Crew(rank=0, group=None, failed=None, pid=os.getpid() + 1)
    monkeypatch.setattr(ranks, "_LEADING", [child])
    with pytest.raises(ConfigError, match="The task 'predict' uses all processes of the launcher, and cannot in one"):
        ranks.call_on_all_ranks(TASKS["predict"], {})


def test_a_preempted_job_tells_nothing_to_ranks_that_have_left() -> None:
    def job() -> None:
        raise Preempted

    with pytest.raises(Preempted):
        ranks._Crew(rank=0, group=None, failed=None).lead(job)  # to send anything would need a group
