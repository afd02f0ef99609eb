"""A task of another package: a transform for images."""

import dataclasses
from collections.abc import Callable

import irisml.core
import numpy as np
import PIL.Image
import torch


def shrink(image: PIL.Image.Image) -> torch.Tensor:
    """An image as `[3, 4, 4]` in [0, 1]."""
    return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1) / 255


class Task(irisml.core.TaskBase):
    """Make a transform that shrinks images to what the tiny model takes."""

    VERSION = "0.1.0"

    @dataclasses.dataclass
    class Outputs:
        transform: Callable

    def execute(self, inputs):
        return self.Outputs(shrink)
