"""Makers of examples for every target type, and the comparison of two examples."""

import io
from typing import Any

import numpy as np
import PIL.Image
import torch

CLASS_NAMES = ["ant", "bee", "cat"]
KINDS = ["multiclass", "multilabel", "detection", "segmentation", "overlapping", "image_text", "labelled_image_text"]
_TARGET_TYPES = {"overlapping": "segmentation", "labelled_image_text": "image_text"}


def hf_arguments(kind: str) -> dict[str, Any]:
    """The arguments of to_hf for a kind of examples."""
    names = None if kind == "image_text" else CLASS_NAMES
    return {"target_type": _TARGET_TYPES.get(kind, kind), "class_names": names}


def noise(seed: int, width: int = 13, height: int = 9) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def random_boxes(rng: np.random.Generator, num_boxes: int, num_classes: int = 3) -> torch.Tensor:
    corners = np.sort(rng.random((num_boxes, 2, 2), dtype=np.float32), axis=1).reshape(num_boxes, 4)
    classes = rng.integers(0, num_classes, (num_boxes, 1)).astype(np.float32)
    return torch.from_numpy(np.concatenate([classes, corners], axis=1))


def make_target(kind: str, seed: int) -> Any:
    """Every third example has no boxes, no positive labels, no pixels of a class."""
    rng = np.random.default_rng(seed)
    empty = seed % 3 == 0
    if kind in ("multiclass", "labelled_image_text"):
        return int(rng.integers(3))
    if kind == "multilabel":
        return torch.zeros(3, dtype=torch.int64) if empty else torch.from_numpy(rng.integers(0, 2, 3))
    if kind == "detection":
        return random_boxes(rng, 0 if empty else int(rng.integers(1, 5)))
    if kind in ("segmentation", "overlapping"):
        masks = torch.zeros(3, 9, 13) if empty else torch.from_numpy(rng.integers(0, 2, (3, 9, 13))).float()
        return masks if kind == "overlapping" else masks * (masks.cumsum(0) == 1)
    return None


def make_examples(kind: str, count: int = 10) -> list[Any]:
    examples = []
    for seed in range(count):
        image, target = noise(seed), make_target(kind, seed)
        captions = [f"caption {seed}", "ünïcode"] if kind == "labelled_image_text" else f"caption {seed}"
        examples.append(((image, captions) if "image_text" in kind else image, target))
    return examples


def encode(image: PIL.Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def assert_same_target(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


def assert_same_image(actual: PIL.Image.Image, expected: PIL.Image.Image) -> None:
    assert actual.mode == "RGB"
    assert actual.size == expected.size
    assert actual.tobytes() == expected.convert("RGB").tobytes()


def assert_same_example(actual: Any, expected: Any) -> None:
    (raw, target), (expected_raw, expected_target) = actual, expected
    if isinstance(expected_raw, tuple):
        assert raw[1] == expected_raw[1]
        raw, expected_raw = raw[0], expected_raw[0]
    assert_same_image(raw, expected_raw)
    assert_same_target(target, expected_target)
