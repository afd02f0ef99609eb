"""Streaming data sets that train in milliseconds: Parquet shards of tiny pictures, as the Hub has them."""

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets.distributed import split_dataset_by_node
from tiny import Net, Recorder, noisy

import iris_hf

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # after each pass over interleaved shards; 5 s where that is long

CONSTANT = {"lr_scheduler": {"name": "linear"}}
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])})


def write_shards(folder: Path, sizes: Sequence[int], bad: Sequence[int] = ()) -> Path:
    """Write Parquet files of `sizes` rows; those whose number over all files is in `bad` cannot be decoded."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    numbers = itertools.count()
    for shard, size in enumerate(sizes):
        rows = []
        for number in itertools.islice(numbers, size):
            pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            PIL.Image.fromarray(pixels).save(buffer, "PNG")
            content = b"no image" if number in bad else buffer.getvalue()
            rows.append({"image": {"bytes": content, "path": None}, "label": int(pixels.mean() > 127)})
        table = pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)
        pq.write_table(table, folder / f"{shard:03}.parquet", row_group_size=3)
    return folder


def load(
    folder: Path | str, buffer_size: int = 0, take: int = 0, shuffle_seed: int | None = 3
) -> datasets.IterableDataset:
    """Stream them, shuffled where there is a buffer."""
    files = [str(file) for file in sorted(Path(folder).glob("*.parquet"))]
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, features=FEATURES)
    if buffer_size:
        stream = stream.shuffle(seed=shuffle_seed, buffer_size=buffer_size)
    return stream.take(take) if take else stream


def to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def to_noisy_tensor(image: PIL.Image.Image) -> torch.Tensor:
    return noisy(to_tensor(image))


class Interruption(Exception):
    """Ends a run in the middle."""


class Interrupt(iris_hf.Plugin):
    """Raises in a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_gradients_ready(self, state: iris_hf.TrainState) -> None:
        if state.step == self.step:
            raise Interruption


class Pairs(torch.utils.data.IterableDataset):
    """A torch stream that draws its order and its noise from the global generators, and shares itself among workers."""

    def __init__(self, num_examples: int, fails_at: int | None = None) -> None:
        self.num_examples = num_examples
        self.fails_at = fails_at

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        import random

        worker = torch.utils.data.get_worker_info()
        order = list(range(self.num_examples))
        random.shuffle(order)
        for index in order[worker.id :: worker.num_workers] if worker is not None else order:
            if index == self.fails_at:
                raise OSError("the connection broke")
            image = torch.full((3, 4, 4), index / self.num_examples)
            yield image + 0.1 * torch.rand(image.shape), int(2 * index > self.num_examples)


def train_stream(dataset: Any, **config: Any) -> tuple[dict[str, torch.Tensor], Recorder]:
    """Train the tiny model on a stream and return its weights and what was recorded."""
    recorder = Recorder()
    settings = {
        "num_epochs": 2,
        "batch_size": 8,
        "base_lr": 0.1,
        "random_seed": 0,
        "num_dataloader_workers": 0,
        "steps_per_epoch": 4,
        "train_transform": to_tensor,
        "val_transform": to_tensor,
        **config,
    }
    plugins = [recorder, *settings.pop("plugins", ())]
    model = Net(settings.pop("dropout", 0.0))
    result = iris_hf.train(model, dataset, plugins=plugins, **settings)
    return result.model.state_dict(), recorder


def rows_of(folder: Path, epoch: int, buffer_size: int = 0, part: int = 0, num_parts: int = 1) -> list[Any]:
    """The examples of one pass, as `datasets` itself gives them."""
    stream = split_dataset_by_node(load(folder, buffer_size), rank=part, world_size=num_parts)
    stream.set_epoch(epoch if buffer_size else 0)
    return [(to_tensor(row["image"].convert("RGB")), row["label"]) for row in stream]


def endless(folder: Path, **arguments: Any) -> Iterator[Any]:
    for epoch in itertools.count():
        yield from rows_of(folder, epoch, **arguments)


def trained_by_hand(rows: Iterator[Any] | Sequence[Iterator[Any]], num_steps: int, size: int = 8) -> dict[str, Any]:
    """Plain SGD on the rows in their order; with several sources, on the same number of each."""
    sources = list(rows) if isinstance(rows, list) else [rows]
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(num_steps):
        batch = [row for source in sources for row in itertools.islice(source, size // len(sources))]
        images, labels = torch.stack([image for image, _ in batch]), torch.tensor([label for _, label in batch])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.state_dict()


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(got[name], weight) for name, weight in wanted.items())
