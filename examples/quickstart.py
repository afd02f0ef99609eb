"""The main job: a vision transformer learns to read handwritten digits.

    accelerate launch examples/quickstart.py
    torchrun --nproc_per_node 2 examples/quickstart.py --batch-size 16    # the same steps on two processes

The 1,797 digits of scikit-learn (8x8 pixels, from 43 writers) become a Hugging Face data set, a small ViT is built from
its configuration and trained on Accelerate, and an `evaluate` module scores it on the 360 digits that it has not seen.
On two CPU cores this takes about a minute and prints

    validation accuracy: 0.978 (352 of 360 digits)

and a few digits more or fewer on other machines and versions. `outputs/quickstart.png` shows the learning curve and
the confusion matrix.
"""

import argparse
import logging
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import PIL.Image
import sklearn.datasets
import torch
from sklearn.metrics import ConfusionMatrixDisplay

import iris_hf

CLASS_NAMES = [str(digit) for digit in range(10)]


class Digits(torch.utils.data.Dataset):
    """irisml's dataset interface: index -> (RGB image, class index)."""

    def __init__(self) -> None:
        digits = sklearn.datasets.load_digits()
        self.images, self.labels = (digits.images * 255 / 16).astype("uint8"), digits.target

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        return PIL.Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


class History(iris_hf.Plugin):
    """A plugin of one's own: remembers the losses of every epoch."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[float] = []

    def on_epoch_start(self, state: iris_hf.TrainState) -> None:
        """Start a new mean."""
        self.sum, self.steps = 0.0, 0

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        """Add the step's loss, a tensor that need not be read now."""
        self.sum, self.steps = self.sum + state.loss, self.steps + 1

    def on_epoch_end(self, state: iris_hf.TrainState) -> None:
        """Keep the epoch's mean over all processes."""
        self.train.append(float(state.accelerator.reduce(self.sum / self.steps, reduction="mean")))

    def on_validation_end(self, state: iris_hf.TrainState) -> None:
        """Keep the validation loss."""
        self.val.append(state.val_loss)


def main() -> None:
    """Train, predict, score, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32, help="examples per process and step")
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart.png"))
    options = parser.parse_args()

    # Any torch data set becomes a Hugging Face data set with the columns that Hub users expect ...
    hf_dataset = iris_hf.to_hf(Digits(), target_type="multiclass", class_names=CLASS_NAMES)
    splits = hf_dataset.train_test_split(test_size=360, seed=0, stratify_by_column="label")
    # ... and any Hugging Face data set becomes a torch data set of (image, class index).
    train_set, val_set = iris_hf.from_hf(splits["train"]), iris_hf.from_hf(splits["test"])

    torch.manual_seed(0)
    model = iris_hf.create_hf_model(
        "vit",
        target_type="multiclass",
        class_names=CLASS_NAMES,
        pretrained=False,
        config={
            "image_size": 8,
            "patch_size": 2,
            "hidden_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 192,
        },
    )
    history = History()
    model, seconds = iris_hf.train(
        model,
        train_set,
        iris_hf.create_image_transform(model, train=True, horizontal_flip=False, min_scale=0.85),
        val_set,
        iris_hf.create_image_transform(model),
        num_epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer="adamw",
        base_lr=1e-3,
        weight_decay=0.05,
        lr_scheduler={"name": "cosine_annealing", "warmup_epochs": 3, "warmup_factor": 0.1},
        random_seed=0,
        plugins=["progressbar", "log_summary", history],
    )

    result = iris_hf.predict(val_set, model, iris_hf.create_image_transform(model), batch_size=128)
    accuracy = iris_hf.metrics.Accuracy().compute(predictions=result.predictions, references=result.targets)["accuracy"]

    if is_main_process():
        print(f"trained in {seconds:.0f} s on {len(train_set)} digits")
        print(f"validation accuracy: {accuracy:.3f} ({round(accuracy * len(val_set))} of {len(val_set)} digits)")
        draw(history, result.predictions.argmax(1), result.targets, accuracy, options.output)
        print(f"learning curve and confusion matrix: {options.output}")


def is_main_process() -> bool:
    """Whether this is the one process that prints and draws."""
    from accelerate import PartialState

    return PartialState().is_main_process


def draw(history: History, predictions: torch.Tensor, targets: torch.Tensor, accuracy: float, path: Path) -> None:
    """Save a picture of the learning curve and the confusion matrix."""
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    epochs = range(1, len(history.train) + 1)
    left.plot(epochs, history.train, label="training (augmented)")
    left.plot(epochs, history.val, label="validation")
    left.set(title="Learning curve", xlabel="epoch", ylabel="cross-entropy loss", yscale="log")
    left.legend()
    left.grid(alpha=0.3)
    ConfusionMatrixDisplay.from_predictions(targets, predictions, ax=right, colorbar=False, cmap="Blues")
    right.set_title(f"Validation digits, accuracy {accuracy:.3f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    warnings.simplefilter("default")
    main()
