"""How long it takes to sample Hugging Face data sets of 1,000,000 rows, and how much memory.

The images of these sets are bytes that cannot be decoded, so that reading one would end the benchmark. Prints seconds
for each target type, for rows in file order and shuffled; the last line is the greatest memory of the process.
"""

import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Features, Image, List, Value

from iris_hf.data.hf_dataset import HFDataset, from_hf
from iris_hf.data.sampling import make_oversampled_dataset, sample_few_shot_dataset
from iris_hf.data.subclass import get_subclass_dataset
from iris_hf.errors import DataError

NUM_ROWS, NUM_CLASSES, N_SHOT = 1_000_000, 1000, 16
NAMES = [f"class {index}" for index in range(NUM_CLASSES)]
LABEL = ClassLabel(names=NAMES)
COLUMNS = ["few-shot", "balanced", "subclass", "remapped"]


def lists(values: pa.Array, ends: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]), type=pa.int32()), values)


def make_columns(target_type: str, rng: np.random.Generator) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """Classes are as rare as words: the most frequent one is in a tenth of the rows."""
    ends = np.cumsum(rng.integers(0, 6, NUM_ROWS))
    weights = 1 / np.arange(1, NUM_CLASSES + 1)
    classes = rng.choice(NUM_CLASSES, NUM_ROWS + ends[-1], p=weights / weights.sum())
    labels = lists(pa.array(classes[: ends[-1]]), ends)
    if target_type == "multiclass":
        return {"label": pa.array(classes[:NUM_ROWS])}, {"label": LABEL}
    if target_type == "multilabel":
        return {"labels": labels}, {"labels": List(LABEL)}
    if target_type == "segmentation":
        masks = pa.nulls(NUM_ROWS, Image().pa_type)
        return {"annotation": masks, "classes": labels}, {"annotation": Image(), "classes": List(LABEL)}
    corners = pa.FixedSizeListArray.from_arrays(pa.array(rng.random(4 * ends[-1])), 4)
    objects = pa.StructArray.from_arrays([lists(corners, ends), labels], names=["bbox", "category"])
    feature = {"bbox": List(List(Value("float64"), length=4)), "category": List(LABEL)}
    return {"objects": objects}, {"objects": feature}


def make_dataset(target_type: str) -> HFDataset:
    columns, features = make_columns(target_type, np.random.default_rng(0))
    broken = pa.array([{"bytes": b"no image", "path": None}] * 1000, type=Image().pa_type)
    columns["image"] = pa.chunked_array([broken] * (NUM_ROWS // 1000))
    info = datasets.DatasetInfo(features=Features(features | {"image": Image()}))
    dataset = from_hf(datasets.Dataset(pa.table(columns), info=info))
    try:
        dataset[0]
    except DataError:
        return dataset
    raise AssertionError("the images are meant to be broken")


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(dataset: HFDataset, can_remap: bool) -> list[float]:
    def subclass(remap: bool) -> object:
        return get_subclass_dataset(dataset, NAMES, class_ids=list(range(0, 1000, 10)), remap_class_ids=remap)

    return [
        seconds(lambda: sample_few_shot_dataset(dataset, n_shot=N_SHOT)),
        seconds(lambda: make_oversampled_dataset(dataset, min_num_samples=2 * NUM_ROWS, balance=True, random_seed=0)),
        seconds(lambda: subclass(remap=False)),
        *([seconds(lambda: subclass(remap=True))] if can_remap else []),
    ]


def main() -> None:
    warnings.simplefilter("error")
    print(f"{'target type':14s} {'order':10s}" + "".join(f"{name:>12s}" for name in COLUMNS))
    for target_type in ("multiclass", "multilabel", "detection", "segmentation"):
        dataset = make_dataset(target_type)
        shuffled = dataset.select(np.random.default_rng(1).permutation(NUM_ROWS))
        for order, rows in (("file", dataset), ("shuffled", shuffled)):
            times = measure(rows, can_remap=target_type != "segmentation")  # whose masks here are none
            print(f"{target_type:14s} {order:10s}" + "".join(f"{time_:12.2f}" for time_ in times))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
