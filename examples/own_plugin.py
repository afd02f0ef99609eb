"""A plugin of one's own: one small class that watches training.

    python examples/own_plugin.py

The class below is given to `train` as an object. It notes the largest gradient norm of every epoch, which tells where
to set `clip_grad_norm`. A linear classifier on the digits of scikit-learn takes a few seconds and prints a line such as

    epoch 1: the largest gradient norm was 1.00, at step 14

for each of 3 epochs, and a validation accuracy of 0.85.

A package publishes a plugin by an entry point, in its pyproject.toml:

    [project.entry-points."iris_hf.plugins"]
    gradient_norms = "my_package:GradientNorms"

and then it has a name like those of the library, also in jobs and on the command line: `plugins=["gradient_norms"]`.
"""

from typing import Any

import sklearn.datasets
import torch
from torch import nn

import iris_hf


class GradientNorms(iris_hf.Plugin):
    """Prints the largest gradient norm of every epoch and the step that had it."""

    def __init__(self) -> None:
        self.largest, self.step = torch.tensor(0.0), torch.tensor(0)

    def on_gradients_ready(self, state: iris_hf.TrainState) -> None:
        """Look at complete gradients: averaged over the processes, unscaled. Nothing here waits for the device."""
        gradients = [p.grad for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.step = torch.where(norm > self.largest.to(norm.device), state.step + 1, self.step.to(norm.device))
        self.largest = torch.maximum(norm, self.largest.to(norm.device))

    def on_epoch_end(self, state: iris_hf.TrainState) -> None:
        """Read the values once an epoch, and print them on one process."""
        if state.is_main_process:
            print(f"epoch {state.epoch + 1}: the largest gradient norm was {self.largest:.2f}, at step {self.step}")
        self.largest = torch.zeros_like(self.largest)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run prints the same lines."""
        return {"largest": self.largest, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.largest, self.step = state["largest"], state["step"]


class Digits(torch.utils.data.Dataset):
    """index -> (image [1, 8, 8] in [0, 1], class index)."""

    def __init__(self, rows: slice) -> None:
        digits = sklearn.datasets.load_digits()
        self.images = torch.tensor(digits.images[rows] / 16, dtype=torch.float32)[:, None]
        self.labels = torch.tensor(digits.target[rows])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


def main() -> None:
    """Train with the plugin beside those of the library, and score."""
    torch.manual_seed(0)
    model = iris_hf.append_classifier(nn.Flatten(), nn.Linear(64, 10), task_type="multiclass_classification")
    train_set, val_set = Digits(slice(0, 1437)), Digits(slice(1437, None))
    settings = {"num_epochs": 3, "batch_size": 32, "optimizer": "adamw", "base_lr": 1e-2, "random_seed": 0}
    result = iris_hf.train(model, train_set, None, **settings, plugins=[GradientNorms(), "clip_grad_norm(0.8)"])
    predictions, targets = iris_hf.predict(val_set, result.model, batch_size=128)
    print(f"validation accuracy: {iris_hf.evaluate_accuracy(predictions, targets):.3f}")


if __name__ == "__main__":
    main()
