"""A model and data that train in milliseconds, for tests of loops."""

from typing import Any

import torch
from torch import nn

import iris_hf


class Tensors(torch.utils.data.Dataset):
    """`num_examples` random images `[3, 4, 4]` whose class is whether they are bright."""

    def __init__(self, num_examples: int = 64, seed: int = 0) -> None:
        self.images = torch.rand(num_examples, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        self.labels = (self.images.mean((1, 2, 3)) > 0.5).long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


class Net(nn.Module):
    """A small perceptron with the contract's `criterion` and `predictor`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Dropout(dropout))
            self.head = nn.Linear(8, 2)
        self.criterion = nn.CrossEntropyLoss()
        self.predictor = nn.Softmax(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


class NormNet(Net):
    """The same with BatchNorm, an integer buffer, a buffer that is not saved, and a criterion of its own to train."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)
        del self.criterion
        self.__dict__["criterion"] = Scaled()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.unsaved.add_(1)
        return super().forward(self.norm(images))


class Scaled(nn.Module):
    """A criterion with a parameter, whose loss has the shape `[1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs * self.scale, targets) + self.scale**2


class Recorder(iris_hf.Plugin):
    """Writes down the steps of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.learning_rates: list[float] = []
        self.val_losses: dict[int, float] = {}
        self.steps: list[int] = []

    def on_gradients_ready(self, state: iris_hf.TrainState) -> None:
        self.learning_rates.append(state.learning_rates[0])

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        self.losses.append(float(state.accelerator.reduce(state.loss, reduction="mean")))
        self.steps.append(state.step)

    def on_validation_end(self, state: iris_hf.TrainState) -> None:
        self.val_losses[state.epoch] = state.val_loss


class Dies(iris_hf.Plugin):
    """Ends the run at a step as a fault would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        if state.step == self.step:
            raise RuntimeError("power cut")


def noisy(image: torch.Tensor) -> torch.Tensor:
    """An augmentation that draws from all three global generators."""
    import random

    import numpy as np

    return image + 0.1 * torch.randn(image.shape) + 0.1 * random.random() + 0.1 * np.random.random()


def train_tiny(**config: Any) -> tuple[dict[str, torch.Tensor], Recorder]:
    """Train the tiny model and return its weights and what was recorded."""
    recorder = Recorder()
    inputs = {
        "model": Net(config.pop("dropout", 0.0)),
        "train_dataset": Tensors(config.pop("num_examples", 64)),
        "train_transform": config.pop("train_transform", None),
        "val_dataset": config.pop("val_dataset", None),
    }
    settings = {"num_epochs": 3, "batch_size": 8, "base_lr": 0.1, "random_seed": 0, "num_dataloader_workers": 0}
    result = iris_hf.train(**inputs, **{**settings, **config, "plugins": [recorder, *config.get("plugins", ())]})
    return result.model.state_dict(), recorder
