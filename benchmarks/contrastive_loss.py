"""Memory and time of the tiled contrastive loss, forward and backward, against the naive one.

    python benchmarks/contrastive_loss.py

Every row runs in a process of its own. Memory is the peak of the process above what it had with the features made.
The promises: below 1 GB at 32,768 pairs of 512 dimensions, and at most 1.5 times the naive loss's time where that fits.
"""

import multiprocessing
import resource
import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch
from torch.nn.functional import cross_entropy, normalize

from iris_hf.losses.contrastive import contrastive_loss


def naive(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * u @ v.T
    own = torch.arange(len(u))
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def tiled(u: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return contrastive_loss(u, v, scale).loss


def measure(kind: str, num_pairs: int, dim: int, turns: int) -> tuple[float, float]:
    """Return MiB of extra peak memory and seconds of the median turn."""
    torch.manual_seed(0)
    u, v = (normalize(torch.randn(num_pairs, dim), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(14.3, requires_grad=True)
    loss: Callable[..., torch.Tensor] = naive if kind == "naive" else tiled
    loss(u[:8], v[:8], scale).backward()
    u.grad = v.grad = None
    before = psutil.Process().memory_info().rss
    peak = before
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, psutil.Process().memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = []
    for _ in range(turns):
        start = time.process_time()
        loss(u, v, scale).backward()
        seconds.append(time.process_time() - start)
        u.grad = v.grad = None
    done.set()
    watcher.join()
    peak = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return (peak - before) / 2**20, statistics.median(seconds)


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| pairs | dimensions | loss | extra memory, MiB | seconds |")
    print("|---|---|---|---|---|")
    for num_pairs, dim, turns, kinds in (
        (1024, 512, 9, ("naive", "tiled")),
        (4096, 512, 5, ("naive", "tiled", "naive", "tiled")),
        (32768, 512, 1, ("tiled",)),
    ):
        for kind in kinds:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory, seconds = pool.apply(measure, (kind, num_pairs, dim, turns))
            print(f"| {num_pairs} | {dim} | {kind} | {memory:.0f} | {seconds:.3f} |", flush=True)


if __name__ == "__main__":
    main()
