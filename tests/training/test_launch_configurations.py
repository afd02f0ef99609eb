"""The configurations of accelerate launch in the examples: parsed, accepted, and run as far as a CPU goes."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from launching import ROOT, run_python
from sharded import Deep, train_deep
from torch import nn
from torch.distributed.fsdp import FSDPModule

import iris_hf
from iris_hf.engine.strategy import check_fsdp, check_launcher
from iris_hf.models.steps import as_cacheable, as_trainable
from iris_hf.training.fsdp_units import find_units

pytestmark = pytest.mark.torch_only

CONFIGURATIONS = sorted((ROOT / "examples" / "accelerate_configs").glob("*.yaml"))
every_configuration = pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)


def launch_environment(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What accelerate launch sets for the processes that it starts; set in this one, too."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args, *_ = _validate_launch_command(args)
    if args.use_fsdp or args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        environment = prepare_simple_launcher_cmd_env(args)[1]
    added = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    for name, value in added.items():
        monkeypatch.setenv(name, value)
    return added


@every_configuration
def test_accelerate_reads_it_and_train_accepts_what_it_sets(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = yaml.safe_load(path.read_text())
    added = launch_environment(path, monkeypatch)
    assert added["ACCELERATE_MIXED_PRECISION"] == wanted["mixed_precision"]
    assert (added.get("ACCELERATE_USE_FSDP") == "true") == ("fsdp_config" in wanted)
    check_launcher()
    if "fsdp_config" in wanted:
        plugin = FullyShardedDataParallelPlugin()
        check_fsdp(plugin)
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert [type(unit).__name__ for unit in find_units(as_trainable(Deep()), plugin)] == ["Block", "Block"]


SCRIPT = """
import os, sys
from sharded import train_deep
import iris_hf
class Notes(iris_hf.Plugin):
    def on_train_start(self, state):
        a = state.accelerator
        kind = a.distributed_type.value
        self.text = f"{a.process_index} of {a.num_processes}, {kind}, {a.mixed_precision}, {a.device.type}"
notes = Notes()
batch_size = 8 // int(os.environ.get("WORLD_SIZE", "1"))
recorder = train_deep(batch_size=batch_size, base_lr=0.02, num_epochs=1, plugins=[notes])[1]
sys.stdout.write(f"{notes.text}: {recorder.losses}\\n")
"""
RUN = {
    "cpu_bf16": ["0 of 1, NO, bf16, cpu"],
    "ddp_bf16": ["0 of 2, MULTI_CPU, bf16, cpu", "1 of 2, MULTI_CPU, bf16, cpu"],
    "fsdp2_bf16": ["0 of 2, FSDP, bf16, cpu", "1 of 2, FSDP, bf16, cpu"],
}


@pytest.mark.parametrize("name", RUN)
def test_it_trains_on_the_cpu(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = ROOT / "examples" / "accelerate_configs" / f"{name}.yaml"
    tests = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    launcher = str(Path(sys.executable).with_name("accelerate"))
    done = run_python(
        *(launcher, "launch", "--config_file", str(path), str(script)), PYTHONPATH=tests, CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ") for line in re.findall(r"\d of .*", done.stdout))
    assert sorted(said) == RUN[name]
    recorder = train_deep(batch_size=8, base_lr=0.02, num_epochs=1, device="cpu", plugins=["amp('bf16')"])[1]
    for losses in said.values():
        assert json.loads(losses) == pytest.approx(recorder.losses, rel=1e-2)


def test_fp16_goes_as_far_as_the_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_environment(next(path for path in CONFIGURATIONS if path.stem == "ddp_fp16"), monkeypatch)
    with pytest.raises(iris_hf.ConfigError, match="mixed precision fp16 needs a GPU"):
        train_deep(batch_size=4, device="cpu")


def test_the_documentation_names_every_configuration() -> None:
    documented = set(re.findall(r"`(\w+)\.yaml`", (ROOT / "docs" / "launching.md").read_text()))
    assert documented == {path.stem for path in CONFIGURATIONS}


def by_size(min_num_params: int) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=min_num_params, reshard_after_forward=True
    )


def names(module: nn.Module, units: list[nn.Module]) -> list[str]:
    assert not any(isinstance(unit, FSDPModule) for unit in units)
    return [name.removeprefix("model.") for name, part in module.named_modules() if part in units]


def test_layers_are_units_by_size_and_the_largest_takes_what_smaller_ones_leave() -> None:
    module = as_trainable(Deep())
    # A block has 70 parameters, its linear layer 56. The last block's weight is the mirror's, too.
    assert names(module, find_units(module, by_size(60))) == ["stem", "blocks.0", "blocks.1"]
    assert names(module, find_units(module, by_size(50))) == ["stem", "blocks.0.linear", "blocks.1.linear"]


def test_attention_is_a_unit_as_a_whole_since_it_reads_its_parts_weights() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    model.criterion = nn.MSELoss()
    module = as_trainable(model)
    assert names(module, find_units(module, by_size(10))) == ["0", "1"]


def test_a_criterion_outside_the_forward_and_models_within_models_are_no_units() -> None:
    model = Deep()
    model.criterion = nn.Linear(7, 7)
    model.stem._no_split_modules = None  # as a PreTrainedModel has it
    cacheable = as_cacheable(model)
    assert names(cacheable, find_units(cacheable, by_size(50))) == ["blocks.0.linear", "blocks.1.linear"]


def test_a_policy_that_finds_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert find_units(as_trainable(Deep()), by_size(10**6)) == []
    assert "the whole model is one unit" in caplog.text
