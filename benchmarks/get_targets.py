"""How much faster targets are read from their column than through the examples.

Prints a table for 20,000 JPEGs of 128 x 128 pixels, in file order and shuffled. `examples` is the time of
`dataset[i][1]` for all of them, measured on a sample of 1,000 and scaled up.
"""

import io
import time

import datasets
import numpy as np
import PIL.Image
from datasets import ClassLabel, Features, Image

from iris_hf.data.hf_dataset import HFDataset, from_hf
from iris_hf.data.read_targets import get_targets_from_dataset

NUM_EXAMPLES, NUM_SAMPLED = 20_000, 1_000


def make_dataset() -> datasets.Dataset:
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(100):
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(coarse).resize((128, 128)).save(buffer, "JPEG", quality=90)
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    columns = {
        "image": [encoded[i % len(encoded)] for i in range(NUM_EXAMPLES)],
        "label": [i % 10 for i in range(NUM_EXAMPLES)],
    }
    names = [f"class {i}" for i in range(10)]
    return datasets.Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def measure(name: str, dataset: HFDataset) -> None:
    start = time.perf_counter()
    slow = [dataset[i][1] for i in range(NUM_SAMPLED)]
    examples = (time.perf_counter() - start) * NUM_EXAMPLES / NUM_SAMPLED
    times = []
    for _ in range(5):
        start = time.perf_counter()
        fast = get_targets_from_dataset(dataset)
        times.append(time.perf_counter() - start)
    assert fast[:NUM_SAMPLED].tolist() == slow
    column = sorted(times)[2]
    print(f"{name:12s} {examples:12.2f} {column * 1000:12.2f} {examples / column:12.0f}")


def main() -> None:
    dataset = make_dataset()
    print(f"{'order':12s} {'examples, s':>12s} {'column, ms':>12s} {'ratio':>12s}")
    measure("file", from_hf(dataset))
    measure("shuffled", from_hf(dataset.shuffle(seed=0)))


if __name__ == "__main__":
    main()
