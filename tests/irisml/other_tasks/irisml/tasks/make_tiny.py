"""A task of another package: the tiny model and data of the tests."""

import dataclasses
import os

import irisml.core
import torch.utils.data
from tiny import Net, Tensors


class Task(irisml.core.TaskBase):
    """Make a tiny model and data; rank 0 and the others would make different ones."""

    VERSION = "0.1.0"

    @dataclasses.dataclass
    class Config:
        num_examples: int = 32

    @dataclasses.dataclass
    class Outputs:
        model: torch.nn.Module
        dataset: torch.utils.data.Dataset

    def execute(self, inputs):
        return self.Outputs(Net(), Tensors(self.config.num_examples, seed=int(os.environ.get("RANK", "0"))))

    def dry_run(self, inputs):
        return self.execute(inputs)
