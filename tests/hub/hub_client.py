"""What a user of the Hub does; it runs in a process of its own, whose environment names the Hub."""

import os
import shutil
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


def save_again(repo_id: str, folder: str) -> None:
    """Pull a model and save it."""
    from iris_hf.models.hub import from_pretrained, save_pretrained

    save_pretrained(from_pretrained(repo_id), folder)


def create(repo_id: str, _: str, **options: Any) -> Any:
    """Make a classifier of a repository, in the way of a user who wants another head."""
    from iris_hf.models.sources.transformers import create_hf_model

    return create_hf_model(repo_id, target_type="multiclass", class_names=["a", "b"], **options)


def split(weights: bytes) -> dict[str, tuple[bytes, list[str]]]:
    """Split a file of weights in two: their names, contents and tensors."""
    from safetensors.torch import load, save

    state = load(weights)
    halves = (sorted(state)[::2], sorted(state)[1::2])
    return {
        f"model-0000{i}-of-00002.safetensors": (save({n: state[n] for n in names}, {"format": "pt"}), names)
        for i, names in enumerate(halves, 1)
    }


TEXTS = {"model_type": "bert", "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1}
TEXTS |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 16}


def save_text_encoder(folder: str) -> None:
    """Save a text encoder with its tokenizer."""
    from models.words import save_word_tokenizer

    from iris_hf.models.hub import save_pretrained
    from iris_hf.models.sources.text_encoders import create_hf_text_encoder

    name = save_word_tokenizer(Path(folder) / "words", model_max_length=16)
    save_pretrained(create_hf_text_encoder(TEXTS, pretrained=False, tokenizer=name), folder)
    shutil.rmtree(name)


def encode(source: str, **options: Any) -> list[float]:
    """Make a text encoder of a folder or repository, and encode a text with its own tokenizer."""
    import iris_hf
    from iris_hf.models.sources.text_encoders import create_hf_text_encoder

    encoder = create_hf_text_encoder(source, **options).eval()
    return encoder(iris_hf.create_tokenizer(encoder)(["a big red dog"])).tolist()


def timm_detector() -> dict[str, Any]:
    """The configuration of a small DETR around a backbone of timm, as published ones are."""
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 3}
    arguments = {"out_indices": [1, 2, 3, 4], "in_chans": 3}
    backbone = {"backbone": "resnet10t", "use_timm_backbone": True, "backbone_kwargs": arguments}
    return {"model_type": "detr", **small, **backbone, "use_pretrained_backbone": True}


def save_timm_detector(folder: str) -> None:
    """Save such a detector as plain transformers does."""
    from iris_hf.models.sources.transformers import create_hf_model, hf_network

    model = create_hf_model(timm_detector(), target_type="detection", class_names=["a", "b"], pretrained=False)
    hf_network(model).save_pretrained(folder)


def save_detector_around(backbone: str, folder: str) -> list[float]:
    """Make a detector around a backbone that the user names, save it, and give the sums of its weights."""
    from iris_hf.models.hub import save_pretrained
    from iris_hf.models.sources.transformers import create_hf_model

    config = timm_detector() | {"backbone": backbone, "use_timm_backbone": False, "backbone_kwargs": {}}
    model = create_hf_model(config, target_type="detection", class_names=["a", "b"], pretrained=False)
    save_pretrained(model, folder)
    return [float(p.detach().double().sum()) for p in model.parameters()]


def detector_facts(source: str, **options: Any) -> list[float]:
    """Load a detector, and give the sums of its weights."""
    from iris_hf.models.hub import from_pretrained

    return [float(p.detach().double().sum()) for p in from_pretrained(source, **options).parameters()]


def push_pairs(repo_id: str, folder: str) -> tuple[dict[str, int], list[Any], list[int]]:
    """Push an image-text model whose texts go through a tokenizer of transformers in a local folder."""
    import torch
    from models.families import make
    from models.words import save_word_tokenizer

    import iris_hf
    from iris_hf.hub.push_model import push_to_hub
    from iris_hf.models.contrastive import make_image_text_contrastive_model
    from iris_hf.models.sources.text_encoders import create_hf_text_encoder

    name = save_word_tokenizer(Path(folder), model_max_length=16)
    texts = create_hf_text_encoder(TEXTS, pretrained=False, tokenizer=name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_image_text_contrastive_model(
            make("timm-encoder"), texts, image_feature_dim=512, text_feature_dim=16, projection_dim=8
        )
    tokens = iris_hf.create_tokenizer(model)("a big red dog")
    pushed = push_to_hub(model, repo_id)
    features = text_features(model)
    shutil.rmtree(folder)
    return pushed.files, features, tokens["input_ids"].tolist()


def pull_pairs(repo_id: str) -> tuple[list[Any], list[int]]:
    """Pull it, and give its features of a text and the tokens."""
    import iris_hf
    from iris_hf.models.hub import from_pretrained

    model = from_pretrained(repo_id)
    return text_features(model), iris_hf.create_tokenizer(model)("a big red dog")["input_ids"].tolist()


def push_open_clip(repo_id: str, folder: str) -> tuple[list[str], list[Any]]:
    """Push a model of open_clip around a text model in a local folder."""
    import shutil

    import torch
    from models.words import open_clip_config, save_bert

    import iris_hf
    from iris_hf.hub.push_model import push_to_hub

    bert = save_bert(Path(folder))
    options = {"clean": "canonicalize", "strip_sep_token": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = iris_hf.create_open_clip_model(
            "alices-clip", config=open_clip_config(bert, hf_model_name=bert, tokenizer_kwargs=options)
        )
    pushed = push_to_hub(model, repo_id)
    facts = [iris_hf.create_tokenizer(model)(["A big, red DOG."]).numpy(), *text_features(model)]
    shutil.rmtree(folder)
    return list(pushed.files), facts


def pull_open_clip(repo_id: str) -> list[Any]:
    """Pull it, and give the tokens of a text, by the model and by the repository's name, and its features."""
    import iris_hf
    from iris_hf.models.hub import from_pretrained

    model = from_pretrained(repo_id)
    by_model, by_name = (iris_hf.create_tokenizer(of)(["A big, red DOG."]).numpy() for of in (model, repo_id))
    assert (by_model == by_name).all()
    return [by_model, *text_features(model)]


def text_features(model: Any) -> list[Any]:
    """The features of a text."""
    import torch

    import iris_hf

    with torch.no_grad():
        return [model.eval().encode_text(iris_hf.create_tokenizer(model)(["a big red dog"])).numpy()]


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


def targets_differ(repo_id: str, target_type: str) -> list[str]:
    """Push a data set of a target type, pull it, and give what differs."""
    import datasets
    import PIL.Image
    import torch

    import iris_hf
    from iris_hf.hub.push_dataset import push_dataset_to_hub

    generator = np.random.default_rng(0)
    images = [PIL.Image.fromarray(generator.integers(0, 255, (9, 8 + i, 3), dtype=np.uint8)) for i in range(4)]
    masks = [torch.from_numpy(generator.integers(0, 2, (3, 9, 8 + i))).float() for i in range(4)]
    targets: dict[str, list[Any]] = {
        "multiclass": [0, 2, 1, 0],
        "multilabel": [torch.tensor(row) for row in ([1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0])],
        "segmentation": masks,
        "image_text": [None] * 4,
    }
    is_pair = target_type == "image_text"
    inputs = [(image, f"caption {i}") for i, image in enumerate(images)] if is_pair else images
    examples = list(zip(inputs, targets[target_type], strict=True))
    names = None if is_pair else ["a", "b", "c"]
    source = iris_hf.from_hf(iris_hf.to_hf(examples, target_type=target_type, class_names=names, streaming=False))
    push_dataset_to_hub(source, repo_id)
    pulled = iris_hf.from_hf(datasets.load_dataset(repo_id, split="train"))
    different = [] if pulled.target_type == target_type else [pulled.target_type]
    for i, (ours, theirs) in enumerate(zip(source, pulled, strict=True)):
        for a, b in zip(flat(ours), flat(theirs), strict=True):
            if type(a) is not type(b) or not np.array_equal(np.asarray(a), np.asarray(b)):
                different.append(f"example {i}: {a} {b}")
    return different


def flat(example: Any) -> list[Any]:
    """The parts of an example."""
    return [part for item in example for part in (item if isinstance(item, tuple) else (item,))]


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


def first_sizes(repo_id: str, **options: Any) -> dict[str, Any]:
    """Load a data set in each way, and give the sizes of its images, or why it was refused."""
    import datasets

    import iris_hf
    from iris_hf.errors import IrisHFError

    def stream(**options: Any) -> Any:
        return iris_hf.from_hf(datasets.load_dataset(repo_id, split="train", streaming=True), **options)

    ways = {
        "load_hf_dataset": lambda: iris_hf.load_hf_dataset(repo_id, split="train", **options).dataset,
        "from_hf": lambda: iris_hf.from_hf(datasets.load_dataset(repo_id, split="train"), **options),
        "stream": lambda: stream(**options),
        "targets of a stream": lambda: [(None, target) for target in stream(**options).get_all_targets()],
    }
    found: dict[str, Any] = {}
    for way, load in ways.items():
        try:
            found[way] = sorted(str(getattr(image, "size", image)) for image, _ in load())
        except IrisHFError as error:
            found[way] = f"{type(error).__name__}: {error}"
    return found


def why_refused(repo_id: str) -> str:
    """Load a data set, and give the message of the error."""
    import iris_hf
    from iris_hf.errors import IrisHFError

    try:
        iris_hf.load_hf_dataset(repo_id)
    except IrisHFError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def images_of_ones_own(repo_id: str, image: str) -> list[tuple[int, int]]:
    """Put images of one's own beside the rows of a repository, and give their sizes."""
    import datasets

    import iris_hf

    def add(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": {"bytes": None, "path": image}, "label": 0}

    def sizes(rows: Any) -> Any:
        return next(iter(iris_hf.from_hf(rows, class_names=["a"])))[0].size

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.load_dataset(repo_id, split="train")
    stream = datasets.load_dataset(repo_id, split="train", streaming=True)
    return [
        sizes(rows.map(add, remove_columns=rows.column_names, features=features)),
        sizes(stream.map(add, remove_columns=rows.column_names, features=features)),
        sizes(rows.rename_columns({"text": "image"}).cast_column("image", datasets.Image())),
    ]
