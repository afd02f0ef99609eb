"""Run by accelerate launch with FSDP2: trains in many ways, one after the other; rank 0 saves what came out."""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from pairs import Pairs, TwoTowers
from sharded import RESUMED, RUNS, Accuracy, Deep, Interrupter, cached_models, train_deep
from tiny import NormNet, Recorder, Tensors
from torch import nn

import iris_hf
from iris_hf.engine.accelerator import open_accelerator
from iris_hf.engine.shards import own_part
from iris_hf.models.steps import as_trainable
from iris_hf.training.layouts import lay_out_model


class Shares(iris_hf.Plugin):
    """Counts what the optimizer of each process holds."""

    def on_train_start(self, state: iris_hf.TrainState) -> None:
        parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        mine = sum(own_part(parameter).numel() for parameter in parameters)
        self.counts = gather_object([(mine, sum(parameter.numel() for parameter in parameters))])
        self.sharded_classes = sorted({type(m).__name__ for m in state.model.modules() if "FSDP" in type(m).__name__})
        self.is_fsdp2 = state.accelerator.is_fsdp2


class LooksIntoBlocks(Deep):
    """Uses a layer's parameters outside that layer's forward."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (
            super().forward(images) + nn.functional.linear(images.flatten(1)[:, :7], self.blocks[0].linear.weight).sum()
        )


def set_up(policy: str = "TRANSFORMER_BASED_WRAP", **changes: str) -> None:
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY=policy)
    os.environ.update(FSDP_MIN_NUM_PARAMS="30", FSDP_OFFLOAD_PARAMS="false", FSDP_ACTIVATION_CHECKPOINTING="false")
    os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)
    os.environ.update(changes)


def equal_runs() -> dict[str, Any]:
    results = {}
    for name, run in RUNS.items():
        set_up(run["policy"])
        shares = Shares()
        model, recorder = train_deep(
            **{**run, "batch_size": run["batch_size"] // 2, "plugins": [*run.get("plugins", ()), shares]}
        )
        results[name] = {"weights": model.state_dict(), "trainable": [p.requires_grad for p in model.parameters()]}
        results[name].update(vars(recorder), **vars(shares), kind=type(model).__name__)
    return results


def beside_ddp() -> list[dict[str, Any]]:
    """Trains what depends on the number of processes, with FSDP2 and with DistributedDataParallel."""
    results = []
    for sharded in ("true", "false"):
        set_up(ACCELERATE_USE_FSDP=sharded)
        torch.manual_seed(int(os.environ["RANK"]))  # DistributedDataParallel takes the first process's weights
        model = NormNet()
        nn.init.normal_(model.head.weight)
        model.eval()  # training puts it into training mode
        settings = {"num_epochs": 2, "batch_size": 4, "base_lr": 0.1, "random_seed": 0, "num_dataloader_workers": 0}
        trained = iris_hf.train(model, Tensors(32), None, Tensors(8), **settings).model
        everywhere = gather_object([[buffer.tolist() for buffer in trained.buffers()]])
        predicted = iris_hf.predict(Tensors(13), trained, batch_size=2, num_dataloader_workers=0).predictions
        results.append({"weights": trained.state_dict(), "buffers": everywhere, "predictions": predicted})
    return results


def cached() -> dict[str, Any]:
    results = {}
    set_up("SIZE_BASED_WRAP")
    for name, model in cached_models().items():
        recorder = Recorder()
        settings = {"num_epochs": 2, "batch_size": 6, "base_lr": 0.1, "random_seed": 0, "optimizer": "adamw"}
        trained = iris_hf.train_with_gradient_cache(
            model,
            Pairs(60),
            None,
            **settings,
            sub_batch_size=4,
            accumulate_grad_batches=2,
            check_replay=True,
            num_dataloader_workers=0,
            plugins=[recorder, "clip_grad_norm(0.05)"],
        ).model
        results[name] = {"weights": trained.state_dict(), "losses": recorder.losses}
    return results


def uneven() -> list[str]:
    """What each process says when the second has fewer sub-batches than the first."""

    class Cut(iris_hf.Plugin):
        def transform_batch(self, batch: Any) -> Any:
            (images, texts), targets = batch
            count = len(images) if os.environ["RANK"] == "0" else 3
            return (images[:count], texts[:count]), targets[:count]

    set_up("SIZE_BASED_WRAP")
    settings = {"num_epochs": 1, "batch_size": 6, "sub_batch_size": 3, "num_dataloader_workers": 0, "plugins": [Cut()]}
    try:
        iris_hf.train_with_gradient_cache(TwoTowers(), Pairs(60), None, **settings)
    except iris_hf.DataError as error:
        return list(gather_object([str(error)]))
    return []


def resumed(folder: Path) -> dict[str, Any]:
    set_up()
    run = {**RESUMED, "batch_size": RESUMED["batch_size"] // 2}
    results: dict[str, Any] = {"never stopped": train_deep(**run)[0].state_dict()}
    for name, how in {"an error": Interrupter(5), "SIGTERM": Interrupter(9, signal.SIGTERM)}.items():
        config = {**run, "checkpoint_dir": folder / name, "checkpoint_steps": 2}
        try:
            train_deep(**{**config, "plugins": [*run["plugins"], how]})
        except RuntimeError as error:
            if str(error) != "interrupted":
                raise
        except SystemExit as leave:
            results["code"] = leave.code
        if name == "SIGTERM" and os.environ["RANK"] == "0":
            shutil.copytree(folder / name, folder / "for one process")
        results[name] = train_deep(**config, resume="auto")[0].state_dict()
    config = {**run, "checkpoint_dir": folder / "of one process"}
    results["of one process"] = train_deep(**config, resume="auto")[0].state_dict()
    return results


def watched(folder: Path) -> list[float]:
    """Validates with what looks into the whole model."""
    set_up()
    accuracy = Accuracy()
    train_deep(batch_size=4, base_lr=0.02, plugins=[accuracy, f"save_best('{folder / 'best'}')"])
    return accuracy.measured


def scaled() -> list[bool]:
    """Whether a step changes weights, without an infinite gradient and with one in the last process's shard."""
    changed = []
    set_up()
    for has_infinity in (False, True):
        with open_accelerator("cpu") as accelerator:
            module = as_trainable(Deep())
            groups = [{"params": [parameter]} for parameter in module.parameters() if parameter.requires_grad]
            layout = lay_out_model(module, groups, accelerator)
            optimizer = torch.optim.SGD(layout.groups, lr=0.1)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            before = layout.parameters(keep=True)
            scaler.scale(layout.model(Tensors(4).images, Tensors(4).labels)["loss"]).backward()
            if has_infinity and accelerator.is_last_process:
                own_part(layout.module.model.head.weight.grad).fill_(torch.inf)
            layout.complete_gradients(scaled=True)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            after = layout.parameters(keep=True)
            changed += gather_object([any(not torch.equal(before[name], after[name]) for name in before)])
    return changed


def refusals() -> dict[str, list[str]]:
    cases: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
        "version 1": ({"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, {}),
        "zero": ({}, {"optimizer": "zero_adamw"}),
        "offload": ({"FSDP_OFFLOAD_PARAMS": "true"}, {}),
        "checkpointing": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}),
        "class": ({"FSDP_TRANSFORMER_CLS_TO_WRAP": "Blok"}, {}),
        "types": ({}, {"model": half_a_model()}),
        "compile": ({}, {"plugins": ["compile('eager')"]}),
        "deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}),
        "outside": ({}, {"model": LooksIntoBlocks()}),
    }
    said: dict[str, str] = {}
    for name, (changes, arguments) in cases.items():
        set_up(**changes)
        try:
            train_deep(batch_size=4, **arguments)
        except (iris_hf.ConfigError, RuntimeError) as error:
            said[name] = " ".join([type(error).__name__, str(error), *getattr(error, "__notes__", ())])
        for change in changes:
            os.environ.pop(change)
    os.environ["FSDP_RESHARD_AFTER_FORWARD"] = "true"
    set_up()
    try:
        iris_hf.train_with_gradient_cache(TwoTowers(), Pairs(), None, num_epochs=1, batch_size=4, num_kept_graphs=1)
    except iris_hf.ConfigError as error:
        said["kept"] = f"{type(error).__name__} {error}"
    try:
        iris_hf.benchmark_model(Deep(), Tensors(8), batch_size=2)
    except iris_hf.ConfigError as error:
        said["benchmark"] = f"{type(error).__name__} {error}"
    return {name: gather_object([message]) for name, message in said.items()}


def half_a_model() -> Deep:
    model = Deep()
    model.head.to(torch.bfloat16)
    return model


if __name__ == "__main__":
    out, folder = Path(sys.argv[1]), Path(sys.argv[2])
    results = {
        "refusals": refusals(),  # first: what follows shows that nothing is left of them
        "equal": equal_runs(),
        "beside_ddp": beside_ddp(),
        "cached": cached(),
        "uneven": uneven(),
        "resumed": resumed(folder),
        "watched": watched(folder),
        "scaled": scaled(),
    }
    if os.environ["RANK"] == "0":
        torch.save(results, out)
