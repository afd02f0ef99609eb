"""Time per training step: `iris_hf.train` against a hand-written PyTorch loop, in one run.

    python benchmarks/step_time.py

Both take the same steps on the same model, data and loader settings, in short turns side by side, and the ratio is the
geometric mean over the turns. Each side goes first in half of them, since whichever goes second is the faster one. The
promise: at most 1.05 at about 4 ms a step, 1.02 at about 40 ms.
"""

import functools
import statistics
import time

import torch
from torch import nn

import iris_hf

EPOCHS = 2
TURNS = 20


class Tensors(torch.utils.data.Dataset):
    def __init__(self, num_examples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(num_examples, 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (num_examples,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


class ConvNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 64, 10),
        )
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class Clock(iris_hf.Plugin):
    """Seconds of the steps alone, from the first batch of an epoch to its last step."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_epoch_start(self, state: iris_hf.TrainState) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, state: iris_hf.TrainState) -> None:
        self.seconds += time.perf_counter() - self.start


def ours(model: nn.Module, dataset: Tensors, batch_size: int, plugins: list) -> float:
    clock = Clock()
    iris_hf.train(
        model,
        dataset,
        None,
        num_epochs=EPOCHS,
        batch_size=batch_size,
        base_lr=0.01,
        num_dataloader_workers=0,
        random_seed=0,
        plugins=[clock, *plugins],
    )
    return clock.seconds


def by_hand(model: nn.Module, dataset: Tensors, batch_size: int) -> float:
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    model.train()
    seconds = 0.0
    for _ in range(EPOCHS):
        start = time.perf_counter()
        for images, labels in loader:
            loss = model.criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        seconds += time.perf_counter() - start
    return seconds


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| width | batch | by hand, ms/step | iris_hf, ms/step | ratio |")
    print("|---|---|---|---|---|")
    for width, batch_size, steps in ((26, 32, 60), (110, 64, 15)):
        dataset = Tensors(batch_size * steps)
        times: dict[str, list[float]] = {"by hand": [], "iris_hf": []}
        runs = {"by hand": by_hand, "iris_hf": functools.partial(ours, plugins=[])}
        for turn in range(TURNS):
            for name in sorted(runs, reverse=turn % 2 == 1):  # whichever goes second is the faster one
                times[name].append(runs[name](ConvNet(width), dataset, batch_size))
        hand, iris = (statistics.median(seconds) / (EPOCHS * steps) * 1e3 for seconds in times.values())
        ratio = statistics.geometric_mean(i / h for h, i in zip(*times.values(), strict=True))
        print(f"| {width} | {batch_size} | {hand:.2f} | {iris:.2f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
