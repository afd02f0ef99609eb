"""Inputs to export and to check a model with: those of the caller, or random ones of the kind that the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from iris_hf.errors import ConfigError
from iris_hf.export.structure import Layout, flatten
from iris_hf.models.image_spec import ImageSpec
from iris_hf.models.text_encoder import TextEncoder

DEFAULT_SIZE = 224
BATCH_SIZES = (2, 1, 5)
"""Batch sizes of the check. The first is the one that is traced."""

Batch = dict[str, Tensor]


def name_input(path: tuple[str | int, ...], tensor: Tensor) -> str:
    """The name that transformers gives to such an input; the key itself in a dict."""
    if path and isinstance(path[-1], str):
        return path[-1]
    if not tensor.is_floating_point():
        return "input_ids"
    return "pixel_values" if tensor.ndim == 4 else "features"


def split_inputs(inputs: Any, what: str = "example_inputs") -> tuple[Batch, Layout]:
    """Turn a batch of inputs into named tensors and their layout. A list of images of one size becomes a tensor.

    Args:
        inputs: Nested tensors.
        what: What the message calls them.

    Raises:
        ConfigError: If it holds no tensors, or they have no common batch size.
    """
    if is_list_of_images(inputs) and len({image.shape for image in inputs}) == 1:
        inputs = torch.stack(inputs)
    batch, layout = flatten(inputs, name_input)
    sizes = {name: tensor.shape[0] if tensor.ndim else 0 for name, tensor in batch.items()}
    if not batch or min(sizes.values()) < 1 or len(set(sizes.values())) > 1:
        raise ConfigError(f"{what} must be a batch of tensors of one length on their first axis, got {sizes}.")
    return batch, layout


def make_inputs(model: nn.Module, height: int, width: int) -> Any:
    """Make a random batch of two examples of what a model takes.

    Images where nothing tells otherwise; token ids for a text tower, which has an embedding table and no convolution;
    both for a model with an image and a text tower; features for a model that begins with a linear layer.

    Args:
        model: Its towers, `image_model` and `text_model`, its embedding tables and its configuration are looked at.
        height: Of images, in pixels.
        width: Of images, in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH_SIZES[0], 3, height, width, generator=generator)
    text_model = getattr(model, "text_model", None)
    if isinstance(text_model, nn.Module) and isinstance(getattr(model, "image_model", None), nn.Module):
        return images, make_tokens(text_model, generator)
    if is_text_tower(model):
        return make_tokens(model, generator)
    first = next((m for m in model.modules() if not list(m.children())), model)
    if isinstance(first, nn.Linear):
        return torch.randn(BATCH_SIZES[0], first.in_features, generator=generator)
    return images


def is_text_tower(model: nn.Module) -> bool:
    """Whether a model looks up embeddings and has neither convolutions nor a specification of images."""
    kinds = {type(m) for m in model.modules()}
    has_images = any(isinstance(getattr(m, "image_spec", None), ImageSpec) for m in model.modules())
    has_table, has_convolution = (any(issubclass(k, t) for k in kinds) for t in (nn.Embedding, nn.modules.conv._ConvNd))
    return not has_images and has_table and not has_convolution


def make_tokens(model: nn.Module, generator: torch.Generator) -> Any:
    """Random token ids: a tensor `[2, L]`, or `input_ids` and `attention_mask` for text encoders of transformers.

    Raises:
        ConfigError: If nothing tells the number of tokens.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    length = _first_attribute(model, "max_length", "context_length", "max_position_embeddings")
    if not tables or length is None:
        raise ConfigError(
            f"Nothing tells what tokens {type(model).__name__} takes. Pass example_inputs: a batch as its tokenizer "
            "gives it."
        )
    tokens = torch.randint(1, tables[0].num_embeddings, (BATCH_SIZES[0], length), generator=generator)
    if not any(isinstance(m, TextEncoder) and m.pooling is not None for m in model.modules()):
        return tokens
    mask = torch.ones_like(tokens)
    mask[1, length // 2 :] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def vary(
    batch: Batch, num_examples: int, *, size: tuple[int, int] | None = None, num_tokens: int | None = None
) -> Batch:
    """Make a batch of another length, with images of another size and with shorter texts, out of one.

    Further examples are the given ones, turned along their last axis where they are float, so that no two are equal.

    Args:
        batch: Named tensors.
        num_examples: How many examples there shall be.
        size: Height and width of the images; None leaves them.
        num_tokens: What texts are cut to; None leaves them.
    """

    def longer(tensor: Tensor) -> Tensor:
        n = len(tensor)
        rows = [tensor[i % n] for i in range(num_examples)]
        return torch.stack([r.roll(i // n, -1) if r.ndim and r.is_floating_point() else r for i, r in enumerate(rows)])

    def resized(tensor: Tensor) -> Tensor:
        if size is None or not is_images(tensor):
            return tensor
        return nn.functional.interpolate(tensor, size=size, mode="bilinear", align_corners=False)

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:, :num_tokens] if is_tokens(tensor) else tensor

    return {name: cut(resized(longer(tensor))) for name, tensor in batch.items()}


def choose_size(model: nn.Module, input_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width to export at.

    A model that takes images of one size is exported at that size, which may be left to it by the default of 224.

    Raises:
        ConfigError: If the size is no positive integer or pair of them, or the model takes only another one.
    """
    edges = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(edges) != 2 or not all(isinstance(e, int) and not isinstance(e, bool) and e > 0 for e in edges):
        raise ConfigError(f"input_size must be a positive number of pixels, or [height, width], got {input_size!r}.")
    spec = image_spec_of(model)
    if spec is None or spec.variable_size or edges == (spec.height, spec.width):
        return edges[0], edges[1]
    if input_size == DEFAULT_SIZE:
        return spec.height, spec.width
    raise ConfigError(
        f"{type(model).__name__} takes images of {spec.height} x {spec.width} (height x width) only, and input_size is "
        f"{input_size!r}. Leave it out."
    )


def image_spec_of(model: nn.Module) -> ImageSpec | None:
    """The images that a model, or the first part of it that tells, takes."""
    specs = (getattr(m, "image_spec", None) for m in model.modules())
    return next((s for s in specs if isinstance(s, ImageSpec)), None)


def other_sizes(batch: Batch) -> list[tuple[int, int]]:
    """Sizes to trace and check with beside that of the images in a batch, in order of preference; none without images.

    Height and width of the first stay odd when they are halved and rounded up again and again: what a network does only
    for sizes that don't divide, such as padding, then becomes part of the graph, where it does nothing for the others.
    """
    images = next((t for t in batch.values() if is_images(t)), None)
    if images is None:
        return []
    height, width = images.shape[2:]
    odd = (height + (7 - height) % 64, width + (39 - width) % 64)
    return [odd, (height + 32, width + 64)]


def shorter_length(batch: Batch) -> int | None:
    """A number of tokens to trace and check with beside that of the texts in a batch; None without texts to cut."""
    lengths = {tensor.shape[1] for tensor in batch.values() if is_tokens(tensor)}
    return max(lengths) * 2 // 3 if len(lengths) == 1 and lengths != {1} else None


def is_list_of_images(inputs: Any) -> bool:
    """Whether a batch is a list of images `[C, H, W]`."""
    is_list = isinstance(inputs, list) and len(inputs) > 0
    return is_list and all(isinstance(i, Tensor) and i.ndim == 3 and i.is_floating_point() for i in inputs)


def is_images(tensor: Tensor) -> bool:
    """Whether a tensor is a batch of images, `[N, C, H, W]`."""
    return tensor.ndim == 4 and tensor.is_floating_point()


def is_tokens(tensor: Tensor) -> bool:
    """Whether a tensor is a batch of tokens or what belongs to each of them, such as a mask: `[N, L]`."""
    return tensor.ndim == 2 and not tensor.is_floating_point()


def _first_attribute(model: nn.Module, *names: str) -> int | None:
    holders = [h for m in model.modules() for h in (m, getattr(m, "config", None))]
    values = (getattr(h, name, None) for name in names for h in holders)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)
