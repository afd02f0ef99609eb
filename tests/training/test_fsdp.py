"""FSDP2 on two real processes, started by accelerate launch from the example's configuration, against one process."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, run_python
from pairs import Pairs
from safetensors.torch import load_file
from sharded import RESUMED, RUNS, Accuracy, Deep, Interrupter, cached_models, train_deep
from tiny import Recorder

import iris_hf

pytestmark = pytest.mark.torch_only

CONFIGURATION = ROOT / "examples" / "accelerate_configs" / "fsdp2.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, Any]:
    plugins = [*RESUMED["plugins"], Interrupter(9, signal.SIGTERM)]
    with pytest.raises(SystemExit):  # leaves a checkpoint
        train_deep(**{**RESUMED, "checkpoint_dir": folder / "of one process", "plugins": plugins})
    launcher = str(Path(sys.executable).with_name("accelerate"))
    script = str(Path(__file__).with_name("fsdp_rank.py"))
    done = run_python(
        launcher, "launch", "--config_file", str(CONFIGURATION), script, str(folder / "out.pt"), str(folder)
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = torch.load(folder / "out.pt")
    return results


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", RUNS)
def test_two_sharded_processes_take_the_steps_of_one(on_two: dict[str, Any], name: str) -> None:
    model, recorder = train_deep(**RUNS[name])
    two = on_two["equal"][name]
    tolerance = 1e-2 if name == "in bf16" else 1e-5
    assert two["is_fsdp2"]
    assert two["learning_rates"] == recorder.learning_rates
    assert two["losses"] == pytest.approx(recorder.losses, rel=tolerance)
    assert two["val_losses"] == pytest.approx(recorder.val_losses, rel=tolerance)
    assert_close(two["weights"], model.state_dict(), tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_the_caller_gets_an_ordinary_model(on_two: dict[str, Any], name: str) -> None:
    two, model = on_two["equal"][name], Deep()
    assert two["kind"] == "Deep"
    assert two["trainable"] == [parameter.requires_grad for parameter in model.parameters()]
    assert all(type(weight) is torch.Tensor and weight.device.type == "cpu" for weight in two["weights"].values())


def test_each_process_holds_its_share_and_the_policy_says_which_layers_are_units(on_two: dict[str, Any]) -> None:
    for run in on_two["equal"].values():
        for mine, total in run["counts"]:
            assert mine < 0.65 * total  # seven rows are four and three
    # The third block shares a weight with something outside it, so that it belongs to the root.
    assert on_two["equal"]["by class"]["sharded_classes"] == ["FSDPBlock"]
    assert on_two["equal"]["in one unit"]["sharded_classes"] == []
    assert "FSDPLinear" in on_two["equal"]["by size"]["sharded_classes"]


def test_sharding_changes_nothing_of_what_depends_on_the_number_of_processes(on_two: dict[str, Any]) -> None:
    sharded, whole = on_two["beside_ddp"]
    assert_close(sharded["weights"], whole["weights"])
    assert sharded["buffers"][0] == sharded["buffers"][1]  # BatchNorm's statistics
    torch.testing.assert_close(sharded["predictions"], whole["predictions"])


@pytest.mark.parametrize("name", cached_models())
def test_the_gradient_cache_is_exact_on_shards(on_two: dict[str, Any], name: str) -> None:
    recorder = Recorder()
    trained = iris_hf.train_with_gradient_cache(
        cached_models()[name],
        Pairs(60),
        None,
        num_epochs=2,
        batch_size=12,
        base_lr=0.1,
        random_seed=0,
        optimizer="adamw",
        sub_batch_size=4,
        accumulate_grad_batches=2,
        num_dataloader_workers=0,
        plugins=[recorder, "clip_grad_norm(0.05)"],
    ).model
    assert on_two["cached"][name]["losses"] == pytest.approx(recorder.losses, rel=1e-8)
    assert_close(on_two["cached"][name]["weights"], trained.state_dict(), 1e-8)


def test_sub_batches_that_sharded_processes_cannot_share_are_an_error_on_each(on_two: dict[str, Any]) -> None:
    assert len(on_two["uneven"]) == 2
    assert all("as many sub-batches of 3; they have from 1 to 2" in message for message in on_two["uneven"])


@pytest.mark.parametrize("what", ["an error", "SIGTERM"])
def test_a_sharded_run_that_was_stopped_ends_with_the_same_bytes(on_two: dict[str, Any], what: str) -> None:
    assert on_two["resumed"]["code"] == 75
    for name, weight in on_two["resumed"]["never stopped"].items():
        assert torch.equal(on_two["resumed"][what][name], weight), name


def test_checkpoints_go_from_shards_to_one_process_and_back(on_two: dict[str, Any], folder: Path) -> None:
    never_stopped = train_deep(**RESUMED)[0].state_dict()
    assert_close(on_two["resumed"]["of one process"], never_stopped)
    on_one, recorder = train_deep(**RESUMED, checkpoint_dir=folder / "for one process", resume="auto")
    assert recorder.steps[0] == 10
    assert_close(on_one.state_dict(), never_stopped)


def test_validation_sees_the_whole_model(on_two: dict[str, Any], folder: Path) -> None:
    accuracy = Accuracy()
    train_deep(batch_size=8, base_lr=0.02, plugins=[accuracy, f"save_best('{folder / 'best of one'}')"])
    assert on_two["watched"] == accuracy.measured
    best, of_one = (load_file(folder / name / "model.safetensors") for name in ("best", "best of one"))
    assert_close(best, of_one)


def test_an_infinite_gradient_in_one_shard_skips_the_step_on_all(on_two: dict[str, Any]) -> None:
    assert on_two["scaled"] == [True, True, False, False]


REFUSALS = {
    "version 1": "ConfigError The launcher chose version 1 of FSDP, and iris_hf works with version 2",
    "zero": "ConfigError optimizer='zero_adamw' shards its state over the processes, which FSDP2 does already: use",
    "offload": "ConfigError fsdp_offload_params is not there in train",
    "checkpointing": "ConfigError fsdp_activation_checkpointing is not there in train",
    "class": "ConfigError fsdp_transformer_layer_cls_to_wrap: Deep has no module of class Blok. It has Block, Deep,",
    "types": "ConfigError FSDP2 shards trainable parameters of one type, and the model has torch.bfloat16",
    "compile": "ConfigError A compiled model cannot be sharded",
    "deepspeed": "ConfigError The launcher chose DeepSpeed, whose engine takes the optimizer steps itself",
    "outside": "FSDP2: the model uses parameters of a wrapped module outside that module's forward",
    "benchmark": "ConfigError benchmark_model measures whole models, and the launcher chose FSDP2",
    "kept": "ConfigError FSDP2 frees the weights that a kept graph needs",
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_sharded_is_an_error_on_every_process(on_two: dict[str, Any], what: str) -> None:
    said = on_two["refusals"][what]
    assert len(said) == 2
    for message in said:
        assert REFUSALS[what] in message
