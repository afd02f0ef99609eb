"""CPU time of a prediction: torch, compiled torch, and ONNX Runtime on the exported graph, one thread, in alternation.

    OMP_NUM_THREADS=1 python benchmarks/onnx_time.py [MODEL ...]

CPU time rather than wall time, so that other programs on the machine disturb it less. Compiling needs a C++ compiler.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import iris_hf

MODELS = ["resnet18", "vit_tiny_patch16_224"]
BATCH_SIZES = [1, 8]
ROUNDS = 12


def milliseconds(predict: Callable[[torch.Tensor], Any], images: torch.Tensor) -> float:
    start = time.process_time()
    predict(images)
    return (time.process_time() - start) * 1e3


@torch.no_grad()
def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | batch | torch, ms | compiled torch, ms | ONNX Runtime, ms | compiled / torch | ONNX / torch |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        model = iris_hf.create_timm_model(name, num_classes=1000).eval()
        with tempfile.TemporaryDirectory() as folder:
            iris_hf.export_onnx(model, folder=folder)
            exported = iris_hf.load_onnx(folder, num_threads=1)
        for batch_size in BATCH_SIZES:
            torch.compiler.reset()
            runtimes = [model.prediction_step, torch.compile(model.prediction_step), exported.prediction_step]
            images = torch.rand(batch_size, 3, 224, 224)
            rounds = [[milliseconds(predict, images) for predict in runtimes] for _ in range(ROUNDS + 2)][2:]
            times = [statistics.median(column) for column in zip(*rounds, strict=True)]
            ratios = [f"{t / times[0]:.2f}" for t in times[1:]]
            print(f"| {name} | {batch_size} | {' | '.join([*(f'{t:.1f}' for t in times), *ratios])} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or MODELS)
