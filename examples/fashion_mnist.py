"""Fashion-MNIST with a small residual network of timm.

    apt-get install dataset-fashion-mnist       # or any copy of the four .gz files, by --data
    accelerate launch examples/fashion_mnist.py

Ten kinds of clothes, 60,000 + 10,000 images of 28x28 pixels (Xiao et al., arXiv 1708.07747). On two CPU cores it takes
about 5 minutes and prints a test accuracy above 0.90 (four epochs: 0.904).

The images go through `to_hf` to a Hugging Face data set on disk, and from there to the model.
"""

import argparse
import gzip
import logging
from pathlib import Path

import numpy as np
import PIL.Image
import torch

import iris_hf

CLASS_NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]


class Idx(torch.utils.data.Dataset):
    """The images and labels of two IDX files."""

    def __init__(self, folder: Path, split: str) -> None:
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
            self.images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
            self.labels = np.frombuffer(file.read(), np.uint8, offset=8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        return PIL.Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


def main() -> None:
    """Convert, train, predict, score."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128, help="examples per process and step")
    options = parser.parse_args()

    train_set, test_set = (
        iris_hf.from_hf(iris_hf.to_hf(Idx(options.data, split), target_type="multiclass", class_names=CLASS_NAMES))
        for split in ("train", "t10k")
    )
    torch.manual_seed(0)
    model = iris_hf.create_timm_model(
        "resnet18",
        num_classes=10,
        class_names=CLASS_NAMES,
        config={"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]},
        image_spec={"height": 28, "width": 28, "crop_fraction": 1.0},
    )
    model, seconds = iris_hf.train(
        model,
        train_set,
        iris_hf.create_image_transform(model, train=True, min_scale=0.9),
        num_epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer="adamw",
        base_lr=3e-3,
        weight_decay=0.05,
        lr_scheduler={"name": "cosine_annealing", "warmup_iters": 200},
        random_seed=0,
        plugins=["progressbar", "log_summary"],
    )
    predictions, targets = iris_hf.predict(test_set, model, iris_hf.create_image_transform(model), batch_size=500)

    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"trained in {seconds:.0f} s")
        print(f"test accuracy: {iris_hf.evaluate_accuracy(predictions, targets):.3f}")


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
