"""Train an image-text model on labelled images with UniCL (Yang et al., arXiv 2204.03610), and classify by prompts.

    apt-get install dataset-fashion-mnist       # or any copy of the four .gz files, by --data
    accelerate launch examples/unicl.py

Fashion-MNIST's labels become texts: each image meets a random one of CLIP's 80 prompts for its class ("a photo of a
sneaker.", "a drawing of the sneaker.", ...), and all images and prompts of a class in the batch belong together. Both
towers are small and start from random weights. Then the classes' names make a classifier, as in `zero_shot.py`. It
takes 4 minutes on one CPU core and prints

    zero-shot accuracy: 0.875 with 800 prompts

`outputs/unicl.png` shows how similar the prompts are to each other, the confusions, and test images.
"""

import argparse
import gzip
import logging
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch

import iris_hf

CLASS_NAMES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
TOKENIZER = "ViT-B-32"  # CLIP's, which open_clip brings
SMALL_BERT = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 24,
}


class Idx(torch.utils.data.Dataset):
    """The images and labels of two IDX files."""

    def __init__(self, folder: Path, split: str, limit: int | None = None) -> None:
        with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
            self.images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)[:limit]
        with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
            self.labels = np.frombuffer(file.read(), np.uint8, offset=8)[:limit]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        return PIL.Image.fromarray(self.images[index]).convert("RGB"), int(self.labels[index])


def main() -> None:
    """Train on images and prompts, make a classifier of prompts, predict, score, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--limit", type=int, help="train on the first images only")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128, help="pairs per process and step")
    parser.add_argument("--output", type=Path, default=Path("outputs/unicl.png"))
    options = parser.parse_args()

    train_set, test_set = Idx(options.data, "train", options.limit), Idx(options.data, "t10k")
    torch.manual_seed(0)
    image_model = iris_hf.create_timm_model(
        "resnet18",
        config={"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]},
        image_spec={"height": 28, "width": 28, "crop_fraction": 1.0},
    )
    text_model = iris_hf.create_hf_text_encoder("bert", pretrained=False, config=SMALL_BERT)
    model = iris_hf.make_image_text_contrastive_model(
        image_model,
        text_model,
        loss="unicl",
        image_feature_dim=image_model.feature_dim,
        text_feature_dim=text_model.feature_dim,
        projection_dim=64,
    )
    prompt_generator = iris_hf.create_classification_prompt_generator(name="clip_imagenet")
    tokenizer = iris_hf.create_tokenizer(TOKENIZER, max_length=24)
    transform = iris_hf.make_image_text_transform(
        iris_hf.create_image_transform(model, train=True, min_scale=0.9), CLASS_NAMES, prompt_generator, tokenizer
    )
    model, seconds = iris_hf.train(
        model,
        train_set,
        transform,
        num_epochs=options.epochs,
        batch_size=options.batch_size,
        optimizer="adamw",
        base_lr=2e-3,
        weight_decay=0.05,
        no_weight_decay_param_names=["logit_scale", r".*\.bias"],
        lr_scheduler={"name": "cosine_annealing", "warmup_iters": 50},
        random_seed=0,
        plugins=["progressbar", "log_summary"],
    )

    image_model, text_model, logit_scale = iris_hf.split_image_text_model(model)
    prompts = iris_hf.build_classification_prompt_dataset(CLASS_NAMES, prompt_generator)
    text_features, text_classes = iris_hf.predict(prompts, text_model, tokenizer, batch_size=100)
    classifier = iris_hf.build_zero_shot_classifier(text_features, text_classes, logit_scale, num_classes=10)
    zero_shot = iris_hf.append_classifier(image_model, classifier, task_type="multiclass_classification")
    predictions, targets = iris_hf.predict(
        test_set, zero_shot, iris_hf.create_image_transform(image_model), batch_size=500
    )

    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"trained in {seconds:.0f} s on {len(train_set)} images")
        print(f"zero-shot accuracy: {iris_hf.evaluate_accuracy(predictions, targets):.3f} with {len(prompts)} prompts")
        draw(test_set, predictions.argmax(1), targets, text_features, text_classes, options.output)
        print(f"similarities and predictions: {options.output}")


def draw(
    dataset: Idx,
    predicted: torch.Tensor,
    targets: torch.Tensor,
    text_features: torch.Tensor,
    text_classes: torch.Tensor,
    path: Path,
) -> None:
    """Save a picture of the similarities of all prompts, of the confusions, and of images with their predictions."""
    matplotlib.use("Agg")
    figure = plt.figure(figsize=(18, 6), layout="constrained")
    left, middle, right = figure.subfigures(1, 3)
    axes = left.subplots()
    middles = [(text_classes == index).nonzero().float().mean().item() for index in range(len(CLASS_NAMES))]
    left.colorbar(axes.imshow(text_features @ text_features.T, cmap="magma"), ax=axes, shrink=0.8)
    axes.set(title="Cosine similarity of the prompts", xticks=[], yticks=middles, yticklabels=CLASS_NAMES)

    axes = middle.subplots()
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts.index_put_((targets, predicted), torch.ones_like(targets), accumulate=True)
    axes.imshow(counts, cmap="Blues")
    for row, column in torch.cartesian_prod(torch.arange(10), torch.arange(10)).tolist():
        count = counts[row, column].item()
        axes.text(column, row, count, ha="center", va="center", fontsize=8, color="white" if count > 500 else "black")
    axes.set(title="Test images: class (rows) and prediction", yticks=range(10), yticklabels=CLASS_NAMES)
    axes.set_xticks(range(10), CLASS_NAMES, rotation=60, ha="right")

    for axis, index in zip(right.subplots(5, 6).flat, range(30), strict=True):
        axis.imshow(dataset[index][0])
        right_or_wrong = "green" if predicted[index] == targets[index] else "red"
        axis.set_title(CLASS_NAMES[predicted[index]], fontsize=9, color=right_or_wrong)
        axis.axis("off")
    right.suptitle("Test images with prediction (red: wrong)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
