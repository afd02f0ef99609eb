"""What five plugins add to a training step: the same run without and with them, in alternation.

    python benchmarks/plugin_cost.py

clip_grad_norm, ema, log_summary, log_tensorboard and progressbar (with a terminal to draw on) together; the ratio is
the geometric mean over the turns, and each side goes first in half of them. The first epoch, in which trackers and bars
open, is not counted. The promise: at most 1.05 at about 4 ms a step. A third run of every turn times the plugins' hooks
one by one, and a fourth the bare calls of torch that clipping and averaging cannot do without: the norm of every
gradient, its scaling, and the averages. With --cpu-time, seconds are those of the processor, for machines with other
work.
"""

import argparse
import logging
import os
import statistics
import tempfile
import threading
import time
from itertools import pairwise

import torch
from step_time import ConvNet, Tensors
from torch import nn

import iris_hf
from iris_hf.engine.plugins.registry import make_plugin

BATCH_SIZE = 32
STEPS = 200
clock = time.perf_counter


class DeepNet(nn.Module):
    """Many small tensors, where calls cost more than arithmetic."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(96, 96), nn.ReLU()) for _ in range(depth)]
        self.layers = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 96), *blocks, nn.Linear(96, 10))
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


class Stopwatch(iris_hf.Plugin):
    """Notes the time of every hook in the second epoch, between other plugins."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {"gradients": [], "step": []}

    def on_epoch_start(self, state: iris_hf.TrainState) -> None:
        if state.epoch == 1:
            self.times = {"gradients": [], "step": []}
            self.start = clock()

    def on_gradients_ready(self, state: iris_hf.TrainState) -> None:
        self.times["gradients"].append(clock())

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        self.times["step"].append(clock())


class Timer(iris_hf.Plugin):
    """Seconds of the second epoch."""

    def on_epoch_start(self, state: iris_hf.TrainState) -> None:
        self.start = clock()

    def on_epoch_end(self, state: iris_hf.TrainState) -> None:
        self.seconds = clock() - self.start


class BareCalls(iris_hf.Plugin):
    """What clipping and averaging ask of torch, and nothing else."""

    def on_train_start(self, state: iris_hf.TrainState) -> None:
        self.parameters = list(state.model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def on_gradients_ready(self, state: iris_hf.TrainState) -> None:
        gradients = [parameter.grad for parameter in self.parameters]
        torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, 1.0)

    @torch.no_grad()
    def on_step_end(self, state: iris_hf.TrainState) -> None:
        torch._foreach_lerp_(self.average, self.parameters, 0.01)


def make_plugins(folder: str) -> dict[str, iris_hf.Plugin]:
    """The five, as a run would name them: gradients above 0.1 are clipped, which is every step here."""
    names = ("clip_grad_norm(0.1)", "ema(0.99, 0)", "log_summary", f"log_tensorboard({folder!r})", "progressbar")
    return {name.partition("(")[0]: make_plugin(name) for name in names}


def train(model: nn.Module, dataset: Tensors, plugins: list[iris_hf.Plugin]) -> float:
    """Seconds per step."""
    timer = Timer()
    iris_hf.train(
        model,
        dataset,
        None,
        num_epochs=2,
        batch_size=BATCH_SIZE,
        base_lr=0.01,
        num_dataloader_workers=0,
        random_seed=0,
        plugins=[*plugins, timer],
    )
    return timer.seconds / STEPS


def hook_times(model: nn.Module, dataset: Tensors, plugins: dict[str, iris_hf.Plugin]) -> dict[str, float]:
    """Mean seconds per step in the hooks of every plugin."""
    watches = [Stopwatch() for _ in range(len(plugins) + 1)]
    between = [watches[0], *(each for pair in zip(plugins.values(), watches[1:], strict=True) for each in pair)]
    train(model, dataset, between)
    totals = [sum(watch.times["gradients"]) + sum(watch.times["step"]) for watch in watches]
    return {name: (after - before) / STEPS for name, (before, after) in zip(plugins, pairwise(totals), strict=True)}


def open_terminal() -> None:
    """Make stderr a terminal that nobody looks at, so that bars are drawn."""
    reader, terminal = os.openpty()
    os.dup2(terminal, 2)

    def drain() -> None:
        while os.read(reader, 1 << 16):
            pass

    threading.Thread(target=drain, daemon=True).start()


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    if options.cpu_time:
        clock = time.process_time
    open_terminal()
    logger = logging.getLogger("iris_hf")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.FileHandler(os.devnull))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    dataset = Tensors(BATCH_SIZE * STEPS)
    for model in (ConvNet(32), DeepNet(30)):
        sides: dict[str, list[float]] = {"without": [], "with": []}
        hooks: list[dict[str, float]] = []
        with tempfile.TemporaryDirectory() as folder:
            for turn in range(options.turns):
                for side in sorted(sides, reverse=turn % 2 == 1):  # whichever goes second is the faster one
                    plugins = make_plugins(folder) if side == "with" else {}
                    sides[side].append(train(model, dataset, list(plugins.values())))
                timed = hook_times(model, dataset, make_plugins(folder))
                hooks.append({**timed, **hook_times(model, dataset, {"bare calls": BareCalls()})})
        count = len(list(model.parameters()))
        without, with_plugins = (statistics.median(seconds) * 1e3 for seconds in sides.values())
        ratio = statistics.geometric_mean(w / o for o, w in zip(*sides.values(), strict=True))
        print(f"\n{count} tensors: {without:.2f} ms a step, with the plugins {with_plugins:.2f} ms, ratio {ratio:.3f}")
        names = list(hooks[0])
        medians = {name: statistics.median(of_turn[name] for of_turn in hooks) for name in names}
        for name, seconds in medians.items():
            print(f"  {name:16s} {seconds * 1e6:6.1f} us a step")
        together = sum(medians.values()) - medians["bare calls"]
        print(f"  the five together {together * 1e6:.1f} us, {together * 1e5 / without:.1f} % of a step", flush=True)


if __name__ == "__main__":
    main()
