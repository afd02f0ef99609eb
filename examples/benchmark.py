"""How fast does a model predict? torch, compiled torch and ONNX Runtime side by side.

    accelerate launch --num_processes 1 examples/benchmark.py
    accelerate launch --num_processes 1 examples/benchmark.py --model vit_tiny_patch16_224 --runtimes torch onnx

Any model of timm, or with `--from` any folder of `save_pretrained` or repository of the Hub, is measured on random
images at every batch size. It is exported to ONNX first, which needs `pip install "iris-hf[onnx5]"` (with transformers
4 `"iris-hf[onnx]"`); `compiled` needs a C++ compiler on a CPU. The first iteration, which compiles, does not count.
`--training` measures forward and backward pass of the torch runtimes, too. With `--runtimes torch onnx --batch-sizes
1 4` it takes a minute and prints, on one CPU core that other programs used as well (so compare the lines, and not with
other machines),

    resnet18, 224 x 224 pixels, CPU threads: 1
                    batch  predict ms     p50     p95  predict ex/s  data ms   GFLOP  M params  host MiB
    torch 1             1      195.18  194.25  221.12             5     0.41   3.628     11.69     1,121
    torch 4             4      572.68  572.15  680.85             7     0.61  14.513     11.69     1,159
    ONNX Runtime 1      1      114.41  114.34  127.79             9     0.44       -         -     1,258
    ONNX Runtime 4      4      428.79  426.36  467.49             9     0.66       -         -     1,296

`outputs/benchmark.png` shows latency and throughput over the batch size, and `outputs/benchmark.json` has everything.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch

import iris_hf

NAMES = {"torch": "torch", "compiled": "compiled torch", "onnx": "ONNX Runtime"}


class RandomImages(torch.utils.data.Dataset):
    """Images of noise, with class indices."""

    def __init__(self, height: int, width: int, num_classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(16, 3, height, width, generator=generator)
        self.labels = torch.randint(num_classes, (16,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


def main() -> None:
    """Export, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet18", help="a model of timm")
    parser.add_argument("--from", dest="source", help="a folder of save_pretrained, or a repository of the Hub")
    parser.add_argument("--runtimes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--training", action="store_true", help="measure the training step of the torch runtimes, too")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.png"))
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.source:
        name, model = Path(options.source).name, iris_hf.from_pretrained(options.source)
    else:
        name, model = options.model, iris_hf.create_timm_model(options.model, num_classes=1000)
    spec = model.image_spec
    images = RandomImages(spec.height, spec.width, model.num_classes)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        if "onnx" in options.runtimes:
            iris_hf.export_onnx(model, folder=folder)
        for runtime in options.runtimes:
            for batch_size in options.batch_sizes:
                torch.compiler.reset()  # each batch size gets code of its own
                results[runtime, batch_size] = iris_hf.benchmark_model(
                    iris_hf.load_onnx(folder) if runtime == "onnx" else model,
                    images,
                    batch_size=batch_size,
                    device=options.device,
                    num_iterations=options.iterations,
                    skip_training=runtime == "onnx" or not options.training,
                    plugins=["compile"] if runtime == "compiled" else [],
                )

    where = "GPU" if options.device == "cuda" else f"CPU threads: {torch.get_num_threads()}"
    title = f"{name}, {spec.height} x {spec.width} pixels, {where}"
    print(title)
    print(iris_hf.benchmark_table({f"{NAMES[runtime]} {n}": r for (runtime, n), r in results.items()}))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(results, title, options.output)
    numbers = options.output.with_suffix(".json")
    rows = [{"model": name, "runtime": runtime, **r._asdict()} for (runtime, _), r in results.items()]
    numbers.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"picture: {options.output}, numbers: {numbers}")


def draw(results: dict[tuple[str, int], Any], title: str, path: Path) -> None:
    """Save a picture of latency and throughput over the batch size."""
    matplotlib.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for runtime in dict.fromkeys(runtime for runtime, _ in results):
        rows = [r for (of, _), r in results.items() if of == runtime]
        sizes = [r.batch_size for r in rows]
        medians, slow = [r.prediction_time_p50 * 1e3 for r in rows], [r.prediction_time_p95 * 1e3 for r in rows]
        (line,) = left.plot(sizes, medians, marker="o", label=NAMES[runtime])
        left.fill_between(sizes, medians, slow, color=line.get_color(), alpha=0.2, linewidth=0)
        right.plot(sizes, [r.prediction_throughput for r in rows], marker="o", label=NAMES[runtime])
    left.set(title="Latency: median, and 95th percentile shaded", ylabel="milliseconds per batch", yscale="log")
    right.set(title="Throughput", ylabel="images per second", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set(xlabel="batch size")
        axes.yaxis.set_major_formatter("{x:,.4g}")
        axes.yaxis.set_minor_formatter("{x:,.4g}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    main()
