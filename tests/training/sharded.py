"""A model for tests of FSDP2, and the runs that have to come out the same on one process and on two."""

import os
from typing import Any

import torch
from accelerate.utils import gather_object
from pairs import DictTowers, TwoTowers
from tiny import Recorder, Tensors, noisy
from torch import Tensor, nn

import iris_hf


class Block(nn.Module):
    """A layer as a wrap policy looks for them. Seven does not divide by two."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(7, 7), nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Deep(nn.Module):
    """Has what sharding stumbles over: a scalar, frozen and tied parameters, uneven shapes, a step beside forward."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.logit_scale = nn.Parameter(torch.tensor(0.3))
            self.stem = nn.Linear(48, 7)
            self.blocks = nn.ModuleList(Block() for _ in range(3))
            self.mirror = nn.Linear(7, 7)
            self.head = nn.Linear(7, 2)
        self.stem.bias.requires_grad_(False)
        self.mirror.weight = self.blocks[2].linear.weight
        self.register_buffer("constant", torch.full((3,), 0.1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.mirror(x)) * self.logit_scale.exp() + self.constant.sum()

    def training_step(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self(images), targets), "scale": self.logit_scale.exp()}

    def prediction_step(self, images: Tensor) -> Tensor:
        return self(images).softmax(1)


RUNS: dict[str, dict[str, Any]] = {
    "by class": {
        "policy": "TRANSFORMER_BASED_WRAP",
        "batch_size": 8,
        "optimizer": "adamw_amsgrad",
        "weight_decay": 0.1,
        "no_weight_decay_param_names": ["logit_scale", ".*bias"],
        "no_weight_decay_module_class_names": ["LayerNorm"],
        "lr_scale_param_names": [("stem", 0.5)],
        "plugins": ["clip_grad_norm(0.05)", "ema(decay=0.8, num_skip_iterations=2)", "freeze_modules('blocks.0')"],
    },
    "by size": {
        "policy": "SIZE_BASED_WRAP",
        "batch_size": 4,
        "accumulate_grad_batches": 3,
        "momentum": 0.9,
        "nesterov": True,
        "noisy": True,
        "plugins": ["clip_grad_norm(0.05)", "stop_if_loss_is_nan"],
    },
    "in one unit": {"policy": "NO_WRAP", "batch_size": 8, "optimizer": "rmsprop", "momentum": 0.5, "base_lr": 0.01},
    "in bf16": {
        "policy": "TRANSFORMER_BASED_WRAP",
        "batch_size": 4,
        "accumulate_grad_batches": 2,
        "plugins": ["amp('bf16')"],
    },
}
for run in RUNS.values():
    run.setdefault("base_lr", 0.02)
RESUMED: dict[str, Any] = {
    "batch_size": 8,
    "optimizer": "adamw",
    "base_lr": 0.02,
    "noisy": True,
    "plugins": ["ema(decay=0.8, num_skip_iterations=2)"],
}
"""A run that is stopped and resumed."""


def train_deep(model: nn.Module | None = None, **config: Any) -> tuple[nn.Module, Recorder]:
    """Train on 61 examples, which divide by nothing here, and validate on 13 in batches of 3."""
    recorder = Recorder()
    config.pop("policy", None)
    transform = noisy if config.pop("noisy", False) else None
    settings = {"num_epochs": 3, "random_seed": 0, "num_dataloader_workers": 0, "val_batch_size": 3, **config}
    settings["plugins"] = [recorder, *config.get("plugins", ())]
    inputs = (Tensors(61), transform, Tensors(13, seed=1))
    return iris_hf.train(Deep() if model is None else model, *inputs, **settings).model, recorder


class Accuracy(iris_hf.Plugin):
    """Predicts the validation set with the model of the run, as plugins that watch validations do."""

    def __init__(self) -> None:
        self.right = 0
        self.measured: list[float] = []

    @torch.no_grad()
    def on_validation_batch(self, state: iris_hf.TrainState, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        self.right += int((state.model.prediction_step(images).argmax(1) == labels).sum())

    def validation_metrics(self, state: iris_hf.TrainState) -> dict[str, float]:
        self.measured.append(sum(gather_object([self.right])))
        self.right = 0
        return {"right": self.measured[-1]}


class Interrupter(iris_hf.Plugin):
    """Ends a run in its middle: by an error, or by SIGTERM to the last process."""

    def __init__(self, at: int, signal: int | None = None) -> None:
        self.at, self.signal = at, signal

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        if state.step != self.at:
            return
        if self.signal is None:
            raise RuntimeError("interrupted")
        if state.accelerator.process_index == state.accelerator.num_processes - 1:
            os.kill(os.getpid(), self.signal)


def cached_models() -> dict[str, nn.Module]:
    """Models for the gradient cache: of each kind that sharding treats in another way."""
    frozen = TwoTowers()
    frozen.image_model.requires_grad_(False)
    return {"tied": TwoTowers("siglip", tied=True), "gathered": DictTowers(), "frozen": frozen}
