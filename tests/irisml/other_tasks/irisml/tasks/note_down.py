"""A task of another package with a side effect."""

import dataclasses
import os

import irisml.core


class Task(irisml.core.TaskBase):
    """Append a line to a file."""

    VERSION = "0.1.0"
    CACHE_ENABLED = False

    @dataclasses.dataclass
    class Inputs:
        value: str | None = None

    @dataclasses.dataclass
    class Config:
        file: str
        text: str = ""

    def execute(self, inputs):
        with open(self.config.file, "a") as file:
            file.write(f"{os.environ.get('RANK', '-')} {self.config.text} {inputs.value}\n")
        return self.Outputs()
