"""Run by run_ranks: the whole chain of a detector and a segmenter, on coloured squares; ranks save results."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from models.families import FAMILIES

import iris_hf

NAMES = ["red cell", "white cell", "platelet"]
COLOURS = [(220, 40, 40), (230, 230, 230), (60, 40, 160)]


class Squares(torch.utils.data.Dataset):
    """`length` images of 64x64 pixels with a square of one class each, as boxes or as masks."""

    def __init__(self, length: int, target_type: str) -> None:
        self.length, self.target_type = length, target_type

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, torch.Tensor]:
        category, x, y = index % 3, 4 + 5 * (index % 7), 4 + 6 * (index % 5)
        image = PIL.Image.new("RGB", (64, 64), (120, 160, 120))
        image.paste(COLOURS[category], (x, y, x + 24, y + 20))
        if self.target_type == "detection":
            return image, torch.tensor([[category, x / 64, y / 64, (x + 24) / 64, (y + 20) / 64]])
        masks = torch.zeros(3, 64, 64)
        masks[category, y : y + 20, x : x + 24] = 1
        return image, masks


def chain(target_type: str, family: str) -> dict[str, Any]:
    """Convert, sample, oversample, train, predict and score."""
    dataset = iris_hf.from_hf(iris_hf.to_hf(Squares(40, target_type), target_type=target_type, class_names=NAMES))
    few = iris_hf.sample_few_shot_dataset(dataset, n_shot=3, strict=True)
    train_set = iris_hf.make_oversampled_dataset(few, min_num_samples=16, random_seed=0)
    torch.manual_seed(0)
    model = FAMILIES[family].make()
    settings: dict[str, Any] = {"num_epochs": 2, "batch_size": 4, "optimizer": "adamw", "base_lr": 1e-3}
    val_set = dataset.select(range(5))
    transform = iris_hf.create_image_transform(model, train=True)
    model = iris_hf.train(
        model,
        train_set,
        transform,
        val_set,
        iris_hf.create_image_transform(model),
        **settings,
        ddp_find_unused_parameters=True,
        random_seed=0,
    ).model
    predictions, targets = iris_hf.predict(
        dataset.select(range(13)), model, iris_hf.create_image_transform(model), batch_size=2
    )
    if target_type == "detection":
        scores = iris_hf.evaluate_detection_average_precision(predictions, targets).details
    else:
        scores = iris_hf.evaluate_mean_iou(predictions, targets)
    return {"few": len(few), "train": len(train_set), "predictions": len(predictions), "scores": scores}


if __name__ == "__main__":
    results = [chain("detection", "hf-rt_detr"), chain("segmentation", "hf-segformer")]
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(results))
