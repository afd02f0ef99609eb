"""Models that have been trained on real images of digits, as those are that leave the house."""

import functools
from typing import Any

import torch
from models.families import FAMILIES, make
from torch import Tensor
from torch.nn import functional as F

from iris_hf.training.trainer import train

NUM_IMAGES = 64
NUM_EPOCHS = 8


def train_on_digits(name: str) -> Any:
    """A detector or segmenter of a family, trained for some seconds from the library's own random weights."""
    family = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(name)
    return train(
        model,
        draw_digits(family.target_type, family.size),
        None,
        num_epochs=NUM_EPOCHS,
        batch_size=16,
        base_lr=2e-3,
        optimizer="adamw",
        num_dataloader_workers=0,
        device="cpu",
        random_seed=0,
    ).model


@functools.cache
def draw_digits(target_type: str, size: int) -> list[tuple[Tensor, Tensor]]:
    """Images with two digits (0, 1 or 2) in two of their quarters, and their boxes or masks."""
    from sklearn.datasets import load_digits

    digits = load_digits(n_class=3)
    generator = torch.Generator().manual_seed(0)
    half = size // 2
    edge = half - 4
    examples = []
    for _ in range(NUM_IMAGES):
        image = torch.rand(3, size, size, generator=generator) * 0.3
        mask = torch.zeros(size, size, dtype=torch.long)
        rows = []
        for quarter in torch.randperm(4, generator=generator)[:2].tolist():
            index, y, x = (int(torch.randint(n, (), generator=generator)) for n in (len(digits.target), 4, 4))
            y, x = y + quarter // 2 * half, x + quarter % 2 * half
            digit = torch.as_tensor(digits.images[index], dtype=torch.float32)[None, None] / 16
            place = (slice(y, y + edge), slice(x, x + edge))
            image[:, *place] = image[:, *place].maximum(F.interpolate(digit, size=edge, mode="bilinear")[0])
            mask[place] = int(digits.target[index])
            rows.append([float(digits.target[index]), *(v / size for v in (x, y, x + edge, y + edge))])
        target = torch.tensor(rows) if target_type == "detection" else F.one_hot(mask, 3).permute(2, 0, 1).float()
        examples.append((image, target))
    return examples
