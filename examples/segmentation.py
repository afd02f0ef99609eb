"""Train a semantic segmenter on images with masks of class indices.

    accelerate launch examples/segmentation.py path/to/CamVid

The folder holds `images/{train,test}/*.png`, masks of the same names in `masks/`, whose pixels are class indices, and
`classes.json`, a list of names (or a dict with the key `classes`). With CamVid's road scenes as SegNet has them
(480x360 pixels, 11 classes, 11 = ignore; here 27 images to train on and 8 to test), a small Segformer (Xie et al.,
arXiv 2105.15203) from random weights takes a minute on two CPU cores and prints

    mean IoU 0.212 (majority class everywhere: 0.025)

`outputs/segmentation.png` shows images, annotated and predicted masks, and the IoU per class.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import matplotlib.pyplot as plt
import torch

import iris_hf

SMALL_SEGFORMER = {
    "hidden_sizes": [32, 48, 96, 128],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 3, 4],
    "decoder_hidden_size": 96,
}


def main() -> None:
    """Load, train, predict, score, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ignore", type=int, default=11, help="the mask value of pixels without a class")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4, help="examples per process and step")
    parser.add_argument("--output", type=Path, default=Path("outputs/segmentation.png"))
    options = parser.parse_args()

    names = json.loads((options.folder / "classes.json").read_text())
    names = names["classes"] if isinstance(names, dict) else names
    train_set, test_set = (load(options.folder, split, names, options.ignore) for split in ("train", "test"))
    torch.manual_seed(0)
    model = iris_hf.create_hf_model(
        "segformer",
        target_type="segmentation",
        class_names=train_set.class_names,
        pretrained=False,
        config=SMALL_SEGFORMER,
        image_spec={"height": 180, "width": 240, "resize": "squash"},
    )
    model, seconds = iris_hf.train(
        model,
        train_set,
        iris_hf.create_image_transform(model, train=True),
        num_epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer="adamw",
        base_lr=1e-3,
        weight_decay=0.01,
        lr_scheduler={"name": "cosine_annealing", "warmup_iters": 20},
        random_seed=0,
        plugins=["progressbar", "clip_grad_norm(1.0)"],
    )
    predictions, targets = iris_hf.predict(test_set, model, iris_hf.create_image_transform(model), batch_size=4)
    results = iris_hf.evaluate_mean_iou(predictions, targets)

    from accelerate import PartialState

    if PartialState().is_main_process:
        majority = torch.zeros_like(targets)
        majority[:, targets.sum((0, 2, 3)).argmax()] = 1
        baseline = iris_hf.evaluate_mean_iou(majority, targets)["mean_iou"]
        print(f"trained in {seconds:.0f} s on {len(train_set)} images")
        print(f"mean IoU {results['mean_iou']:.3f} (majority class everywhere: {baseline:.3f})")
        draw(test_set, predictions, targets, results, options.output)
        print(f"masks and IoU per class: {options.output}")


def load(folder: Path, split: str, names: list[str], ignore: int) -> Any:
    """Return images and masks as a data set that reads them from their files when asked."""
    masks = sorted((folder / "masks" / split).glob("*.png"))
    columns = {
        "image": [str(folder / "images" / split / mask.name) for mask in masks],
        "annotation": list(map(str, masks)),
    }
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    hf_dataset = datasets.Dataset.from_dict(columns, features=features)
    return iris_hf.from_hf(hf_dataset, target_type="segmentation", class_names=names, ignore_index=ignore)


def draw(dataset: Any, predictions: torch.Tensor, targets: torch.Tensor, results: dict[str, Any], path: Path) -> None:
    """Save a picture of three images with annotated and predicted masks, and of the IoU per class."""
    matplotlib.use("Agg")
    figure = plt.figure(figsize=(15, 7), layout="constrained")
    photos, bars = figure.subfigures(1, 2, width_ratios=(3, 1))
    colours = plt.get_cmap("tab20")(range(dataset.num_classes))

    def coloured(mask: torch.Tensor) -> Any:
        picture = colours[mask.argmax(0)]
        picture[mask.sum(0) == 0] = (0, 0, 0, 1)  # no class
        return picture

    for row, axes in enumerate(photos.subplots(3, 3)):
        index = row * (len(dataset) - 1) // 2
        shown = (dataset[index][0], coloured(targets[index]), coloured(predictions[index]))
        for axis, picture, name in zip(axes, shown, ("image", "annotated", "predicted"), strict=True):
            axis.imshow(picture, aspect="auto")
            axis.set(xticks=[], yticks=[], title=name if row == 0 else "")
    axes = bars.subplots()
    found = results["per_class"]
    labels = [dataset.class_names[row["class"]] for row in found]
    axes.barh(labels, [row["iou"] for row in found], color=[colours[row["class"]] for row in found])
    axes.bar_label(axes.containers[0], fmt="%.2f", padding=3)
    axes.set(xlim=(0, 1.15), title=f"IoU per class, mean {results['mean_iou']:.3f}")
    axes.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
