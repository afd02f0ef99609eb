"""Memory and time of a contrastive step: with the gradient cache, and plain.

    python benchmarks/gradient_cache.py [--original FOLDER] [--device cuda]

Every row runs in a process of its own: --steps steps of one batch, and seconds are the median of all but the first
(on a CPU, the process's own CPU time: run it on one thread). Memory is the peak of the process above what it had before
training; "less data" leaves out the batch's inputs and its features, their gradients and copies. The promise: that
column is flat. FOLDER holds the source of irisml-tasks-training (its `irisml` folder), whose gradient cache is then
measured beside ours.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from typing import Any, ClassVar

import psutil
import torch
from torch import nn

import iris_hf
from iris_hf.losses.criterion import ContrastiveCriterion

SUB_BATCH, DIM, VOCABULARY, LENGTH, SIZE = 32, 128, 1000, 16, 32
INPUT_BYTES = 4 * 3 * SIZE * SIZE + 8 * LENGTH
FEATURE_BYTES = 2 * 4 * DIM  # an image's and a text's
COPIES = 4  # features, as they were made and joined, and their gradients, as they came and divided


def clock(device: str) -> float:
    return time.perf_counter() if device == "cuda" else time.process_time()


class Pairs(torch.utils.data.Dataset):
    def __init__(self, num_pairs: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(num_pairs, 3, SIZE, SIZE, generator=generator)
        self.texts = torch.randint(VOCABULARY, (num_pairs, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        return (self.images[index], self.texts[index]), torch.tensor(0)


class Towers(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)

        def layer(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GELU())

        self.image_model = nn.Sequential(layer(3, 64), layer(64, 128), layer(128, 256), nn.Flatten())
        self.image_projection = nn.Linear(256 * 16, DIM)
        self.text_model = nn.Sequential(nn.EmbeddingBag(VOCABULARY, 256), nn.Linear(256, 256), nn.GELU())
        self.text_projection = nn.Linear(256, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        self.criterion = criterion

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        images, texts = inputs
        u = nn.functional.normalize(self.image_projection(self.image_model(images)), dim=-1)
        v = nn.functional.normalize(self.text_projection(self.text_model(texts)), dim=-1)
        return u, v, self.logit_scale.exp()


class Clip(nn.Module):
    """The naive loss, for the original."""

    def forward(self, features: list[torch.Tensor], targets: Any) -> torch.Tensor:
        u, v, scale = features
        logits, own = scale * u @ v.T, torch.arange(len(u), device=u.device)
        return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


class Watch(iris_hf.Plugin):
    """Memory at the start of the run, and seconds of its steps."""

    def on_train_start(self, state: iris_hf.TrainState) -> None:
        self.before = psutil.Process().memory_info().rss
        self.seconds: list[float] = []

    def on_epoch_start(self, state: iris_hf.TrainState) -> None:
        self.start = clock(state.accelerator.device.type)

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        if state.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(clock(state.accelerator.device.type) - self.start)


def measure(kind: str, batch_size: int, num_steps: int, device: str, original: str | None) -> tuple[float, float]:
    """Return MiB of extra peak memory and seconds of a step."""
    dataset = Pairs(batch_size)
    settings: dict[str, Any] = {
        "num_epochs": num_steps,
        "batch_size": batch_size,
        "base_lr": 0.01,
        "num_dataloader_workers": 0,
    }
    if kind == "original":
        return measure_original(dataset, settings, device, str(original))
    watch = Watch()
    settings.update(device=device, random_seed=0, plugins=[watch])
    model = Towers(ContrastiveCriterion("clip"))
    if kind == "plain":
        model.training_step = lambda inputs, targets: {"loss": model.criterion(model(inputs), targets)}
        iris_hf.train(model, dataset, None, **settings)
    else:
        kept = int(kind.partition(" ")[2] or 0)
        iris_hf.train_with_gradient_cache(
            model, dataset, None, sub_batch_size=SUB_BATCH, num_kept_graphs=kept, **settings
        )
    return peak(watch.before, device), statistics.median(watch.seconds[1:])


def measure_original(dataset: Pairs, settings: dict[str, Any], device: str, folder: str) -> tuple[float, float]:
    sys.path.insert(0, folder)  # irisml.tasks is a namespace package
    from irisml.tasks.train_with_gradient_cache import GradientCachingTrainer

    class Trainer(GradientCachingTrainer):
        seconds: ClassVar[list[float]] = []

        def train_epoch(self, dataloader: Any, epoch: int) -> Any:
            start = clock(device)
            result = super().train_epoch(dataloader, epoch)
            self.seconds.append(clock(device) - start)
            return result

    before = psutil.Process().memory_info().rss
    model = Towers(Clip())
    trainer = Trainer(
        sub_batch_size=SUB_BATCH,
        model=model,
        lr_scheduler_factory=torch.optim.lr_scheduler.ConstantLR,
        optimizer_factory=lambda model: torch.optim.SGD(model.parameters(), lr=settings["base_lr"]),
        plugins=[],
        device=torch.device(device),
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=settings["batch_size"], shuffle=True)
    trainer.train(loader, None, settings["num_epochs"])
    return peak(before, device), statistics.median(trainer.seconds[1:])


def peak(before: int, device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", help="folder with the source of irisml-tasks-training")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}, sub-batch {SUB_BATCH}")
    print("| pairs | step | extra memory, MiB | less data, MiB | seconds |")
    print("|---|---|---|---|---|")
    for batch_size in arguments.sizes:
        kinds = ["cache"] + (["plain"] if batch_size <= 1024 else []) + (["cache 8"] if batch_size == 1024 else [])
        if arguments.original and batch_size <= 1024:
            kinds.append("original")
        for kind in kinds:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                options = (kind, batch_size, arguments.steps, arguments.device, arguments.original)
                memory, seconds = pool.apply(measure, options)
            data = batch_size * (INPUT_BYTES + COPIES * FEATURE_BYTES) / 2**20
            print(f"| {batch_size} | {kind} | {memory:.0f} | {memory - data:.0f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
