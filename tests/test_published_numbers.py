"""A published network through the library's own door: He et al.'s CIFAR ResNet-20."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from models.resnet20 import load_resnet20

import iris_hf


class Cifar(torch.utils.data.Dataset):
    """The first 1000 test images of CIFAR-10: row i of the picture is image i."""

    def __init__(self, folder: Path) -> None:
        self.images = np.array(PIL.Image.open(folder / "cifar10_test_first1000.png")).reshape(1000, 32, 32, 3)
        self.labels = json.loads((folder / "labels_first1000.json").read_text())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        return PIL.Image.fromarray(self.images[index]), int(self.labels[index])


def test_resnet20_gets_915_of_1000_through_to_hf_predict_and_evaluate_accuracy(shared_data: Path) -> None:
    folder = shared_data / "weights" / "resnet20_cifar10"
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    dataset = iris_hf.from_hf(iris_hf.to_hf(Cifar(folder), target_type="multiclass", class_names=names))
    model = load_resnet20(shared_data)
    predictions, targets = iris_hf.predict(dataset, model, iris_hf.create_image_transform(model), batch_size=100)
    assert iris_hf.evaluate_accuracy(predictions, targets) == 915 / 1000
    metric = iris_hf.metrics.Accuracy()
    assert metric.compute(predictions=predictions, references=targets)["accuracy"] == 915 / 1000
