"""Detection average precision against pycocotools: 5,000 images, 50 detections each, 80 classes.

    python benchmarks/detection_average_precision.py

Both start from the same arrays and each runs in a process of its own, so that the peaks of memory are their own.
Other work on the machine moves the ratio of the clock; the one of processor time moves less.
Needs `pip install "iris-hf[detection]" pycocotools`.
"""

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import time

import faster_coco_eval  # noqa: F401  # loaded before the clock starts, like the others
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iris_hf.metrics import evaluate_detection_average_precision

SIZE = (480, 640)  # height, width


def make_rows(num_images: int, num_detections: int, num_classes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Random targets, and detections of which about a third are moved targets of the right class."""
    rng = np.random.default_rng(0)
    predictions, targets = [], []
    for _ in range(num_images):
        n = rng.integers(1, 15)
        corner, extent = rng.uniform(0, 0.6, (n, 2)), rng.uniform(0.02, 0.4, (n, 2))
        target = np.concatenate([rng.integers(0, num_classes, (n, 1)), corner, corner + extent], axis=1)
        chosen = target[rng.integers(0, n, num_detections)]
        boxes = np.clip(chosen[:, 1:] + rng.normal(0, 0.03, (num_detections, 4)), 0, 1)
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
        keeps_class = rng.random(num_detections) < 0.33
        classes = np.where(keeps_class, chosen[:, 0], rng.integers(0, num_classes, num_detections))
        predictions.append(np.column_stack([classes, rng.random(num_detections), boxes]))
        targets.append(target)
    return predictions, targets


def run_iris_hf(predictions: list[np.ndarray], targets: list[np.ndarray]) -> dict[str, float]:
    sized = [{"boxes": rows, "image_size": SIZE} for rows in targets]
    return evaluate_detection_average_precision(predictions, sized).details


def run_pycocotools(predictions: list[np.ndarray], targets: list[np.ndarray]) -> dict[str, float]:
    scale = np.array([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])
    annotations, results = [], []
    for image, (found, true) in enumerate(zip(predictions, targets, strict=True)):
        for row, to_list, num_leading in ((found, results, 2), (true, annotations, 1)):
            corners = row[:, num_leading:] * scale
            boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            for leading, box in zip(row[:, :num_leading].tolist(), boxes.tolist(), strict=True):
                entry = {"image_id": image, "category_id": int(leading[0]), "bbox": box}
                extra = {"score": leading[1]} if num_leading == 2 else {"area": box[2] * box[3], "iscrowd": 0}
                to_list.append({**entry, **extra, "id": len(to_list) + 1})
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(len(targets))],
        "annotations": annotations,
        "categories": [{"id": int(c)} for c in np.unique(np.concatenate([rows[:, 0] for rows in targets]))],
    }
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = [
        "AP",
        "AP50",
        "AP75",
        "AP_small",
        "AP_medium",
        "AP_large",
        "AR_1",
        "AR_10",
        "AR_100",
        "AR_small",
        "AR_medium",
        "AR_large",
    ]
    return dict(zip(names, evaluation.stats.tolist(), strict=True))


RUNNERS = {"pycocotools": run_pycocotools, "iris_hf": run_iris_hf}


def measure(which: str, shape: tuple[int, int, int]) -> dict[str, object]:
    """Time one of the two in this process; the numbers, seconds and MiB above what the rows themselves took."""
    rows = make_rows(*shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        scores = RUNNERS[which](*rows)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"scores": scores, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=50)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--only", choices=RUNNERS, help="measure one, print JSON")
    arguments = parser.parse_args()
    shape = (arguments.images, arguments.detections, arguments.classes)
    if arguments.only:
        print(json.dumps(measure(arguments.only, shape)))
        return
    sizes = [f"--{name}={value}" for name, value in zip(("images", "detections", "classes"), shape, strict=True)]
    measured = {}
    for which in RUNNERS:
        command = [sys.executable, __file__, f"--only={which}", *sizes]
        measured[which] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        seconds, cpu_seconds, peak = (measured[which][name] for name in ("seconds", "cpu_seconds", "peak_mib"))
        print(f"{which:12} {seconds:6.2f} s, of the processor {cpu_seconds:6.2f} s, {peak:5.0f} MiB at the peak")
    wall, cpu = (measured["pycocotools"][name] / measured["iris_hf"][name] for name in ("seconds", "cpu_seconds"))
    ours, theirs = (measured[which]["scores"] for which in ("iris_hf", "pycocotools"))
    difference = max(abs((-1 if ours[name] is None else ours[name]) - value) for name, value in theirs.items())
    print(f"{wall:.1f} times faster ({cpu:.1f} in processor time)")
    print(f"AP {ours['AP']:.4f}; largest difference of the 12 numbers {difference:.1e}")


if __name__ == "__main__":
    main()
