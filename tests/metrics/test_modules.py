"""Every metric keeps the promises of an `evaluate` module: loaded by path, combined, pickled, batched, distributed."""

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import evaluate
import pytest
import torch
from launching import run_ranks

import iris_hf.metrics
from iris_hf.errors import ConfigError, DataError
from iris_hf.metrics import Accuracy, DetectionAveragePrecision, MeanIoU, MultilabelAveragePrecision, Retrieval

generator = torch.Generator().manual_seed(0)
MULTILABEL_TARGETS = torch.randint(0, 2, (13, 4), generator=generator)
SCORES = torch.rand(13, 4, generator=generator)
CLASSES = torch.randint(0, 4, (13, 1), generator=generator)
MAPS = torch.randint(0, 3, (13, 5, 6), generator=generator)
PAIRS = torch.randn(13, 2, 6, generator=generator)
PAIRS[11:, 0] = PAIRS[:2, 0]  # two images have two captions each
IMAGES = torch.arange(13) % 11


def boxes(number: int) -> torch.Tensor:
    corners = torch.rand(number, 2, generator=generator) / 2
    sides = torch.rand(number, 2, generator=generator) / 2 + 0.01
    return torch.cat([torch.randint(0, 3, (number, 1), generator=generator), corners, corners + sides], dim=1)


TARGET_BOXES = [boxes(i % 4) for i in range(13)]
FOUND_BOXES = [
    torch.cat([rows[:, :1], torch.rand(len(rows), 1, generator=generator), rows[:, 1:] * 0.97], dim=1)
    for rows in [torch.cat([rows, boxes(2)]) for rows in TARGET_BOXES]
]
CASES = {
    Accuracy: (SCORES, CLASSES),
    MultilabelAveragePrecision: (SCORES, MULTILABEL_TARGETS),
    MeanIoU: (torch.rand(13, 3, 5, 6, generator=generator), MAPS),
    DetectionAveragePrecision: (FOUND_BOXES, TARGET_BOXES),
    Retrieval: (PAIRS, IMAGES),
}
FUNCTIONS = {
    Accuracy: lambda *batch: {"accuracy": iris_hf.metrics.evaluate_accuracy(*batch)},
    MultilabelAveragePrecision: iris_hf.metrics.evaluate_multilabel_average_precision,
    MeanIoU: iris_hf.metrics.evaluate_mean_iou,
    DetectionAveragePrecision: lambda *b: iris_hf.metrics.evaluate_detection_average_precision(*b).details,
    Retrieval: lambda *batch: retrieval_of_pairs(*batch),
}
every_metric = pytest.mark.parametrize("metric_class", CASES, ids=lambda c: c.__name__)


def retrieval_of_pairs(pairs, ids):
    rows = {int(image): row for row, image in reversed(list(enumerate(ids)))}
    return iris_hf.metrics.evaluate_retrieval(pairs[list(rows.values()), 0], pairs[:, 1], list(rows), ids)


def folder_of(metric_class) -> Path:
    return Path(sys.modules[metric_class.__module__].__file__).parent


@every_metric
def test_one_call_batches_single_examples_and_the_function_agree(metric_class):
    predictions, references = CASES[metric_class]
    expected = FUNCTIONS[metric_class](predictions, references)
    metric = metric_class()
    assert metric.compute(predictions=predictions, references=references) == expected
    for i in range(0, 13, 3):
        metric.add_batch(predictions=predictions[i : i + 3], references=references[i : i + 3])
    assert len(metric) == 13
    assert metric.compute() == expected
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == expected
    assert json.loads(json.dumps(expected)) == expected


@every_metric
def test_it_loads_by_path_without_network_or_warning(metric_class):
    predictions, references = CASES[metric_class]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = evaluate.load(str(folder_of(metric_class)))
    assert metric.name == folder_of(metric_class).name
    expected = FUNCTIONS[metric_class](predictions, references)
    assert metric.compute(predictions=predictions, references=references) == expected


def test_options_pass_through_the_loader():
    options = {
        DetectionAveragePrecision: {"iou_thresholds": [0.25]},
        MeanIoU: {"ignore_index": 1},
        Retrieval: {"recall_at": [2]},
    }
    for metric_class, given in options.items():
        predictions, references = CASES[metric_class]
        loaded = evaluate.load(str(folder_of(metric_class)), **given)
        direct = metric_class(**given)
        score = loaded.compute(predictions=predictions, references=references)
        assert score == direct.compute(predictions=predictions, references=references)
        assert score != FUNCTIONS[metric_class](predictions, references)


@every_metric
def test_compute_starts_anew_also_after_an_error(metric_class):
    predictions, references = CASES[metric_class]
    metric = metric_class()
    metric.add_batch(predictions=predictions, references=references)
    metric.compute()
    with pytest.raises(DataError, match="undefined"):
        metric.compute()
    metric.add_batch(predictions=predictions, references=references)
    with pytest.raises(DataError):
        metric.compute(predictions=predictions[:2], references=references[:1])
    assert len(metric) == 0


@every_metric
def test_a_bad_batch_leaves_what_was_added(metric_class):
    predictions, references = CASES[metric_class]
    metric = metric_class()
    metric.add_batch(predictions=predictions, references=references)
    with pytest.raises(DataError):
        metric.add_batch(predictions=predictions[:2], references=references[:1])
    assert metric.compute() == FUNCTIONS[metric_class](predictions, references)


@every_metric
def test_it_pickles_with_what_it_has_seen(metric_class):
    predictions, references = CASES[metric_class]
    metric = metric_class()
    metric.add_batch(predictions=predictions[:5], references=references[:5])
    copy = pickle.loads(pickle.dumps(metric))
    copy.add_batch(predictions=predictions[5:], references=references[5:])
    assert len(metric) == 5
    assert copy.compute() == FUNCTIONS[metric_class](predictions, references)


@every_metric
def test_instances_live_side_by_side_and_write_nothing(metric_class, tmp_path):
    predictions, references = CASES[metric_class]
    metrics = [metric_class(cache_dir=str(tmp_path / "cache")) for _ in range(3)]
    for i, metric in enumerate(metrics):
        metric.add_batch(predictions=predictions[i:], references=references[i:])
    for i, metric in enumerate(metrics):
        assert metric.compute() == FUNCTIONS[metric_class](predictions[i:], references[i:])
    assert list(tmp_path.iterdir()) == []


@every_metric
def test_later_changes_to_a_batch_do_not_reach_the_metric(metric_class):
    predictions, references = CASES[metric_class]
    metric = metric_class()
    mine = [torch.clone(rows) for rows in predictions]
    metric.add_batch(predictions=mine, references=references)
    for rows in mine:
        rows.zero_()
    assert metric.compute() == FUNCTIONS[metric_class](predictions, references)


@every_metric
def test_what_it_does_not_know_is_an_error(metric_class):
    predictions, references = CASES[metric_class]
    metric = metric_class()
    with pytest.raises(ConfigError, match=f"{metric.name} does not know sample_weight.*constructor"):
        metric.compute(predictions=predictions, references=references, sample_weight=[1])
    with pytest.raises(ConfigError, match="needs predictions and references; references not given"):
        metric.add_batch(predictions=predictions)
    with pytest.raises(ConfigError, match=r"num_process must be 1, got 2.*gather_for_metrics"):
        metric_class(num_process=2, process_id=0)


def test_combined_metrics_take_batches_examples_and_one_call():
    batch = {"predictions": SCORES, "references": CLASSES}
    combined = evaluate.combine([Accuracy(), evaluate.load(str(folder_of(Accuracy)))])
    expected = {f"accuracy_{i}_accuracy": FUNCTIONS[Accuracy](SCORES, CLASSES)["accuracy"] for i in range(2)}
    assert combined.compute(**batch) == expected
    combined.add_batch(**batch)
    assert combined.compute() == expected
    for prediction, reference in zip(SCORES, CLASSES, strict=True):
        combined.add(predictions=prediction, references=reference)
    assert combined.compute() == expected


def test_detection_at_two_settings_combines_under_the_names_given():
    combined = evaluate.combine(
        {"loose": DetectionAveragePrecision(iou_thresholds=[0.3]), "strict": DetectionAveragePrecision()}
    )
    combined.add_batch(predictions=FOUND_BOXES, references=TARGET_BOXES)
    result = combined.compute()
    assert result["loose_mAP"] == result["strict_mAP"][:1]
    alone = FUNCTIONS[DetectionAveragePrecision](FOUND_BOXES, TARGET_BOXES)
    assert result["loose_AP"] == result["strict_AP"] == alone["AP"]


def test_metrics_load_lazily():
    code = "import sys, iris_hf.metrics; print([m for m in ('torch', 'evaluate') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'Precision'"):
        _ = iris_hf.metrics.Precision
    assert all(getattr(iris_hf.metrics, name) is not None for name in iris_hf.metrics.__all__)


WORKER = """
import json, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from test_modules import CASES
from iris_hf import metrics

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
results = {}
for metric_class, (predictions, references) in CASES.items():
    is_ragged = isinstance(predictions, list)
    loader = DataLoader(list(zip(predictions, references)), batch_size=2, collate_fn=list)
    loader = accelerator.prepare(loader)
    metric = metric_class()
    for batch in loader:
        batch = tuple(list(column) for column in zip(*batch))
        batch = batch if is_ragged else tuple(torch.stack(column) for column in batch)
        found, true = (accelerator.gather_for_metrics(column, use_gather_object=is_ragged) for column in batch)
        metric.add_batch(predictions=found, references=true)
    results[metric.name] = [len(metric), metric.compute()]
if accelerator.is_main_process:
    print("RESULTS", json.dumps(results))
torch.distributed.destroy_process_group()
"""


def test_two_processes_that_gather_13_examples_score_as_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{WORKER}")
    done = run_ranks(2, str(script))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS"))
    results = json.loads(line.removeprefix("RESULTS "))
    assert len(results) == len(CASES)
    for metric_class, batch in CASES.items():
        assert results[folder_of(metric_class).name] == [13, FUNCTIONS[metric_class](*batch)]
