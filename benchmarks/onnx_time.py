"""CPU time of a prediction: ONNX Runtime on the exported graph against torch, on one thread, in alternation.

    OMP_NUM_THREADS=1 python benchmarks/onnx_time.py

CPU time rather than wall time, so that other programs on the machine disturb it less.
"""

import statistics
import tempfile
import time
from typing import Any

import torch

import iris_hf

MODELS = ["resnet18", "vit_tiny_patch16_224"]
BATCH_SIZES = [1, 8]
ROUNDS = 12


def seconds(model: Any, images: torch.Tensor) -> float:
    start = time.process_time()
    model.prediction_step(images)
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| model | batch | torch, ms | ONNX Runtime, ms | ratio |\n|---|---|---|---|---|")
    for name in MODELS:
        model = iris_hf.create_timm_model(name, num_classes=1000).eval()
        with tempfile.TemporaryDirectory() as folder:
            iris_hf.export_onnx(model, folder=folder)
            exported = iris_hf.load_onnx(folder, num_threads=1)
        for batch_size in BATCH_SIZES:
            images = torch.rand(batch_size, 3, 224, 224)
            with torch.no_grad():
                pairs = [(seconds(model, images), seconds(exported, images)) for _ in range(ROUNDS + 1)][1:]
            in_torch, in_onnx = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
            print(f"| {name} | {batch_size} | {in_torch:.1f} | {in_onnx:.1f} | {in_onnx / in_torch:.2f} |", flush=True)


if __name__ == "__main__":
    main()
