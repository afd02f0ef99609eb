"""What a user of the Hub does; it runs in a process of its own, whose environment names the Hub."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def call(token: str | None, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a function as the owner of a token, or as nobody."""
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    return function(*args, **kwargs)


def push(name: str, repo_id: str, *, seed: int = 5, **options: Any) -> tuple[str | None, dict[str, int], list[Any]]:
    """Push a model of a family, and give the result and the model's outputs."""
    from iris_hf.hub.push_model import push_to_hub

    model = make_model(name, seed)
    pushed = push_to_hub(model, repo_id, **options)
    return pushed.commit_url, pushed.files, outputs(model, name)


def pull(repo_id: str, name: str, **options: Any) -> list[Any]:
    """Pull a model and give its outputs."""
    from iris_hf.models.hub import from_pretrained

    return outputs(from_pretrained(repo_id, **options), name)


def make_model(name: str, seed: int = 5) -> Any:
    """A model of a family whose weights are moved by a seed."""
    import torch
    from models.families import make

    model, generator = make(name), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.01)
    return model


def outputs(model: Any, name: str) -> list[Any]:
    """All that a model gives for a batch."""
    from models.test_hub import predict

    return [tensor.numpy() for tensor in predict(model, name)]


def push_weights_named(repo_id: str, shard: str) -> None:
    """Leave the weights of an older model in a repository."""
    from huggingface_hub import HfApi

    HfApi().upload_file(path_or_fileobj=b"old", path_in_repo=shard, repo_id=repo_id)


def pull_plainly(repo_id: str) -> tuple[Any, list[str]]:
    """Load a classifier by plain transformers, and give the softmax of its logits and its class names."""
    import torch
    from models.families import make_batch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    network = AutoModelForImageClassification.from_pretrained(repo_id).eval()
    processor = AutoImageProcessor.from_pretrained(repo_id)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        probabilities = network((make_batch("hf-vit")[0] - mean) / std).logits.softmax(1)
    return probabilities.numpy(), list(network.config.id2label.values())


def shown(repo_id: str) -> dict[str, Any]:
    """What the Hub shows of a model."""
    from huggingface_hub import HfApi, ModelCard

    info, card = HfApi().model_info(repo_id), ModelCard.load(repo_id)
    return {
        "library": info.library_name,
        "task": info.pipeline_tag,
        "tags": info.tags,
        "private": info.private,
        "metrics": {r.metric_type: (r.dataset_name, r.metric_value) for r in card.data.eval_results or []},
        "metadata": card.data.to_dict(),
        "text": card.text,
    }


def shown_refs(repo_id: str, kind: str = "model") -> dict[str, str]:
    """The branches and tags of a repository."""
    from huggingface_hub import HfApi

    refs = HfApi().list_repo_refs(repo_id, repo_type=kind)
    return {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}


def make_boxes(size: int = 7) -> Any:
    """Random images with boxes whose corners need all bits of a float32."""
    import PIL.Image
    import torch

    import iris_hf

    generator = np.random.default_rng(0)
    examples = []
    for i in range(size):
        corners = np.sort(generator.random((i % 3, 2, 2), dtype=np.float32), 1).reshape(-1, 4)
        target = torch.cat([torch.full((len(corners), 1), float(i % 2)), torch.from_numpy(corners)], 1)
        image = PIL.Image.fromarray(generator.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8))
        examples.append((image, target))
    return iris_hf.to_hf(examples, target_type="detection", class_names=["red", "white"], streaming=False)


def push_dataset(repo_id: str, **options: Any) -> tuple[str | None, dict[str, int]]:
    """Push images with boxes."""
    from iris_hf.hub.push_dataset import push_dataset_to_hub

    return tuple(push_dataset_to_hub(options.pop("dataset", None) or make_boxes(), repo_id, **options))


def push_two_splits(repo_id: str) -> None:
    """Push a training and a test split."""
    push_dataset(repo_id, dataset={"train": make_boxes(5), "test": make_boxes(2)})


def differences(repo_id: str, **options: Any) -> tuple[int, list[str], list[str]]:
    """Pull images with boxes, and give their number, what differs from the source, and the class names."""
    import datasets
    import torch

    import iris_hf

    pulled = iris_hf.from_hf(datasets.load_dataset(repo_id, split="train", **options))
    source = iris_hf.from_hf(make_boxes())
    different = []
    for i, ((image, target), (old_image, old_target)) in enumerate(zip(pulled, source, strict=True)):
        if not np.array_equal(np.asarray(image), np.asarray(old_image)):
            different.append(f"image {i}")
        if not (target.dtype == old_target.dtype and torch.equal(target, old_target)):
            different.append(f"target {i}")
    return len(pulled), different, pulled.class_names


def split_sizes(repo_id: str) -> dict[str, int]:
    """The number of examples of each split."""
    import datasets

    return {name: len(rows) for name, rows in datasets.load_dataset(repo_id).items()}


def dataset_metadata(repo_id: str) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a data set's card."""
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(repo_id)
    return card.data.to_dict(), card.text


def push_unsavable(repo_id: str) -> None:
    """Push a model that nothing tells how to make again."""
    from torch import nn

    from iris_hf.hub.push_model import push_to_hub

    push_to_hub(nn.Conv2d(1, 1, 1), repo_id)


def cached_files(home: str) -> list[str]:
    """The names of all files that were ever fetched."""
    return sorted({p.name for p in Path(home).rglob("snapshots/*/*")})
