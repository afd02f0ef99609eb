"""Detection average precision is pycocotools', and what has no place in it is an error, never a skip."""

import contextlib
import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iris_hf.errors import ConfigError, DataError, MissingDependencyError
from iris_hf.metrics import evaluate_detection_average_precision

NAMES = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
NAMES += ["AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"]
BOX = [0, 0.1, 0.1, 0.5, 0.5]
FOUND = [0, 0.9, 0.1, 0.1, 0.5, 0.5]
PAIRS = [
    "dt_yolo_fastestv2_on_128_yolo_labels.json",
    "dt_yolo_fastestv2_on_100.json",
    "dt_yolov5n_320_on_100.json",
    "instances_val2014_fakebbox100_results.json",
    "instances_val2014_fakesegm100_results.json",
    "fce_dt_dataset.json:bbox",
    "fce_dt_dataset.json:segm",
]


def run_pycocotools(predictions, targets, size, iou_thresholds=None):
    """Rows as in the contract, with a crowd flag as a sixth value of each target -> pycocotools' COCOeval."""
    height, width = size
    scale = np.array([width, height, width, height])

    def annotate(image, row, corners):
        x0, y0, x1, y1 = (np.array(corners) * scale).tolist()
        return {"image_id": image, "category_id": int(row[0]), "bbox": [x0, y0, x1 - x0, y1 - y0]}

    annotations = [
        annotate(i, row, row[1:5]) | {"iscrowd": int(row[5])} for i, rows in enumerate(targets) for row in rows
    ]
    results = [annotate(i, row, row[2:]) | {"score": row[1]} for i, rows in enumerate(predictions) for row in rows]
    for number, annotation in enumerate(annotations, start=1):
        annotation |= {"id": number, "area": annotation["bbox"][2] * annotation["bbox"][3]}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": height, "width": width} for i in range(len(targets))],
        "annotations": annotations,
        "categories": [{"id": c} for c in range(10)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = COCO()
        found.dataset = truth.dataset | {"annotations": []}
        found.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results) if results else found, "bbox")
        if iou_thresholds is not None:
            evaluation.params.iouThrs = np.array(iou_thresholds)
        evaluation.evaluate()
        evaluation.accumulate()
        if iou_thresholds is None:
            evaluation.summarize()
    return evaluation


def with_sizes(targets, size):
    return [
        {"boxes": [row[:5] for row in rows], "iscrowd": [row[5] for row in rows], "image_size": size}
        for rows in targets
    ]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_twelve_numbers_are_those_of_pycocotools_on_real_data(shared_data, pair):
    folder = shared_data / "coco_map"
    expected = json.loads((folder / "expected_pycocotools.json").read_text())[pair]
    truth = json.loads((folder / expected["gt"]).read_text())
    found = json.loads((folder / pair.partition(":")[0]).read_text())
    has_masks = expected["iouType"] == "segm"
    predictions, targets = [], []
    for image in sorted(truth["images"], key=lambda image: image["id"]):
        height, width = image["height"], image["width"]

        def corners(annotation, width=width, height=height):
            x, y, w, h = annotation.get("bbox") or coco_mask.toBbox(annotation["segmentation"]).tolist()
            return [x / width, y / height, (x + w) / width, (y + h) / height]

        boxes = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        rows = [a for a in found if a["image_id"] == image["id"]]
        target = {
            "boxes": [[a["category_id"], *corners(a)] for a in boxes],
            "image_size": (height, width),
            "iscrowd": [a["iscrowd"] for a in boxes],
            "area": [a["area"] for a in boxes],
        }
        prediction = {"boxes": [[a["category_id"], a["score"], *corners(a)] for a in rows]}
        if has_masks:
            target["masks"], prediction["masks"] = ([a["segmentation"] for a in of] for of in (boxes, rows))
            if all("bbox" in a for a in rows):  # pycocotools then takes the box's area, not the mask's
                prediction["area"] = [a["bbox"][2] * a["bbox"][3] for a in rows]
        predictions.append(prediction)
        targets.append(target)
    details = evaluate_detection_average_precision(predictions, targets, iou_type=expected["iouType"]).details
    ours = [-1 if details[name] is None else details[name] for name in NAMES]
    assert ours == pytest.approx([expected["stats"][name] for name in NAMES], abs=1e-9)


# Corners on a grid of sixteenths of 256 pixels are exact, so that equal overlaps are equal in both libraries.
corner_pairs = st.tuples(st.integers(0, 15), st.integers(1, 16)).filter(lambda p: p[0] < p[1])
boxes = st.tuples(corner_pairs, corner_pairs).map(lambda b: [b[0][0] / 16, b[1][0] / 16, b[0][1] / 16, b[1][1] / 16])
target_rows = st.lists(st.tuples(st.integers(0, 3), boxes, st.booleans()), max_size=6)
prediction_rows = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5, 1.0]), boxes), max_size=8)
image_sets = st.lists(st.tuples(prediction_rows, target_rows), min_size=1, max_size=5)


@settings(deadline=None, max_examples=150)
@given(image_sets, st.lists(st.sampled_from([0.01, 0.3, 0.5, 0.65, 0.75, 0.9, 1.0]), min_size=1, max_size=4))
def test_random_boxes_agree_with_pycocotools(images, iou_thresholds):
    predictions = [[[c, p, *box] for c, p, box in rows] for rows, _ in images]
    targets = [[[c, *box, crowd] for c, box, crowd in rows] for _, rows in images]
    size = (256, 256)
    expected = run_pycocotools(predictions, targets, size)
    if expected.stats[0] == -1:
        with pytest.raises(DataError, match="box to find"):
            evaluate_detection_average_precision(predictions, with_sizes(targets, size))
        return
    results = evaluate_detection_average_precision(
        predictions, with_sizes(targets, size), iou_thresholds=iou_thresholds
    )
    ours = [-1 if results.details[name] is None else results.details[name] for name in NAMES]
    assert ours == pytest.approx(expected.stats, abs=1e-12)

    at_thresholds = run_pycocotools(predictions, targets, size, sorted(set(iou_thresholds)))
    precision = at_thresholds.eval["precision"][..., 0, -1]  # [threshold, recall, class]
    occurs = precision[0, 0] > -1
    for threshold, score in zip(iou_thresholds, results, strict=True):
        t = sorted(set(iou_thresholds)).index(threshold)
        assert score == pytest.approx(precision[t][:, occurs].mean(), abs=1e-12)
    assert [entry["class"] for entry in results.details["per_class"]] == np.flatnonzero(occurs).tolist()


def test_sizes_add_area_ranges_and_change_nothing_else():
    plain = evaluate_detection_average_precision([[FOUND]], [[BOX]]).details
    sized = evaluate_detection_average_precision([[FOUND]], [{"boxes": [BOX], "image_size": (100, 200)}]).details
    assert {name: sized[name] for name in plain} == plain
    assert set(sized) - set(plain) == {name for name in NAMES if name.endswith(("small", "medium", "large"))}
    assert (sized["AP_small"], sized["AP_medium"], sized["AP_large"]) == (None, 1.0, None)


def test_the_original_callers_list_and_the_details_are_one_json_able_object():
    # The cases of the original's own test; 0.89 overlaps by 0.89 with the unit box.
    twice = [[0, 0.5, 0, 0, 1, 0.89], [0, 0.5, 0, 0, 1, 0.89]]
    results = evaluate_detection_average_precision(
        [torch.tensor(twice)], [torch.tensor([[0, 0, 0, 1, 1]] * 2)], iou_thresholds=[0.5, 0.75, 0.9]
    )
    assert results == [1.0, 1.0, 0.0]
    assert results.details["mAP"] == results
    assert json.loads(json.dumps(results)) == results
    assert json.loads(json.dumps(results.details)) == results.details
    assert pickle.loads(pickle.dumps(results)).details == results.details


def test_category_gaps_and_classes_without_ground_truth_are_reported():
    found = [[7, 0.9, *BOX[1:]], [90, 0.8, *BOX[1:]], [3, 0.7, *BOX[1:]]]
    target = {"boxes": [[7, *BOX[1:]], [3, *BOX[1:]]], "iscrowd": [0, 1]}
    details = evaluate_detection_average_precision([found], [target]).details
    assert details["classes_without_ground_truth"] == [3, 90]
    assert details["per_class"] == [
        {"class": 7, "num_boxes": 1, "mAP": [1.0] * 4, "AP": 1.0, "AP50": 1.0, "AP75": 1.0},
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_container_and_precision_is_taken(dtype):
    rows, box = torch.tensor([[1, 0.5, 0.25, 0.25, 0.75, 0.5]]), torch.tensor([[1, 0.25, 0.25, 0.75, 0.5]])
    for predictions, targets in [
        ([rows.to(dtype), torch.empty(0)], [box.to(dtype), torch.empty(0, 5)]),
        ([rows.numpy(), []], [box.numpy(), np.empty((0, 5))]),
        ([rows.tolist(), []], [box.tolist(), []]),
        ([list(rows.to(dtype)), []], [list(box.to(dtype)), []]),
    ]:
        assert evaluate_detection_average_precision(predictions, targets) == [1.0] * 4


def test_predicted_boxes_may_overhang_the_image_or_be_empty():
    before = [[0, 1.0, -0.2, 0.5, 0.6, 1.4], [0, 0.95, 0.3, 1.0, 0.5, 1.0]]  # both count as false
    assert evaluate_detection_average_precision([[*before, FOUND]], [[BOX]]) == pytest.approx([1 / 3] * 4)


def test_targets_may_end_a_rounding_error_outside():
    edge = float(np.nextafter(np.float32(1), np.float32(2)))
    assert evaluate_detection_average_precision([[[0, 1, 0.5, 0.5, 1, 1]]], [[[0, 0.5, 0.5, edge, edge]]]) == [1.0] * 4


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([], [], "no images"),
        ([[]], [[]], "None of the 1 images has a box to find"),
        ([[]], [{"boxes": [BOX], "iscrowd": [1]}], "None of the 1 images has a box to find"),
        ([[FOUND]], [], "Predictions of 1 images but targets of 0"),
        ([[], [FOUND[:5]]], [[], []], r"Image 1: predictions must be rows of 6 .*got shape \[1, 5\]"),
        ([[], [[*FOUND, 1]]], [[], []], r"Image 1: predictions must be rows of 6 .*got shape \[1, 7\]"),
        ([[], FOUND], [[], []], r"Image 1: predictions must be rows of 6 .*got shape \[6\]"),
        ([[]], [[[*BOX, 1]]], r"Image 0: targets must be rows of 5 .*got shape \[1, 6\]"),
        ([[]], [["cat"]], "Image 0: targets cannot become one array"),
        ([[], [FOUND, [0, float("nan"), 0, 0, 1, 1]]], [[], []], "Image 1, prediction 1: .*finite"),
        ([[[0, 0.5, 0, 0, float("inf"), 1]]], [[]], "Image 0, prediction 0: .*finite"),
        ([[[0, 1.5, 0, 0, 1, 1]]], [[]], r"Image 0, prediction 0: the probability .*got \[0.0, 1.5"),
        ([[[0.5, 0.5, 0, 0, 1, 1]]], [[]], "Image 0, prediction 0: the class must be"),
        ([[[-1, 0.5, 0, 0, 1, 1]]], [[]], "Image 0, prediction 0: the class must be"),
        ([[FOUND, [0, 0.5, 0.6, 0, 0.5, 1]]], [[]], "Image 0, prediction 1: a box needs x0 <= x1"),
        ([[[0, 0.5, 1.1, 0, 1.2, 1]]], [[]], "Image 0, prediction 0: the box lies outside the image"),
        ([[[0, 0.5, 0, 0, 640, 480]]], [[]], r"Image 0, prediction 0: .*are these pixels\?"),
        ([[], []], [[], [BOX, [0, 0.5, 0.1, 0.5, 0.2]]], "Image 1, target 1: a box needs x0 < x1"),
        ([[]], [[[0, 0.5, 0.1, 1.01, 0.2]]], "Image 0, target 0: the box reaches outside"),
        ([[]], [[[0, float("nan"), 0.1, 1, 0.2]]], "Image 0, target 0: .*finite"),
        ([[]], [[[1.5, 0.1, 0.1, 1, 0.2]]], "Image 0, target 0: the class must be"),
        ([[]], [{"box": [BOX]}], r"Image 0, targets: a dict needs boxes .*got \['box'\]"),
        ([[]], [{"boxes": [BOX], "crowd": [1]}], "may have image_size, iscrowd, area, masks"),
        ([[]], [{"boxes": [BOX], "iscrowd": [1, 0]}], "Image 0: iscrowd must have one value for each of the 1 boxes"),
        ([[]], [{"boxes": [BOX], "iscrowd": [2]}], "Image 0: iscrowd must be 0 or 1"),
        ([[]], [{"boxes": [BOX], "area": [9]}], "Image 0, targets: area .*need image_size"),
        ([[]], [{"boxes": [BOX], "area": [-1], "image_size": (9, 9)}], "areas must be at least 0"),
        ([[]], [{"boxes": [BOX], "image_size": (9, 0)}], r"image_size must be \(height, width\) .*got \[9, 0\]"),
        ([[], []], [{"boxes": [BOX], "image_size": (9, 9)}, [BOX]], "Image 1 has no image_size but .*all or none"),
        ([[], []], [[BOX], {"boxes": [BOX], "image_size": (9, 9)}], "Image 1 has an image_size but .*all or none"),
    ],
)
def test_bad_rows_are_errors_that_name_image_and_row(predictions, targets, message):
    with pytest.raises(DataError, match=message):
        evaluate_detection_average_precision(predictions, targets)


@pytest.mark.parametrize(
    ("target", "prediction", "message"),
    [
        ({"boxes": [BOX]}, [], r"need image_size \(height, width\)"),
        ({"boxes": [BOX], "image_size": (8, 8)}, [], "Image 0, targets: 1 rows need as many masks, got None"),
        ({"boxes": [], "image_size": (8, 8)}, {"boxes": [FOUND], "masks": []}, "predictions: 1 rows .*got 0"),
        (
            {"boxes": [BOX], "image_size": (8, 8), "masks": [{"size": [9, 9], "counts": [81]}]},
            [],
            r"Image 0, targets, mask 0: its size \[9, 9\] must be the image's \(height, width\) \[8, 8\]",
        ),
        ({"boxes": [BOX], "image_size": (8, 8), "masks": ["round"]}, [], "mask 0: it is no COCO run-length encoding"),
        ({"boxes": [BOX], "image_size": (8, 8), "masks": [[["a"]]]}, [], "mask 0: it is no COCO run-length"),
    ],
)
def test_masks_that_cannot_be_compared_are_errors(target, prediction, message):
    with pytest.raises(DataError, match=message):
        evaluate_detection_average_precision([prediction], [target], iou_type="segm")


@pytest.mark.parametrize("thresholds", [[0], [1.1], [-0.5], [float("nan")], [0.5, 2]])
def test_thresholds_lie_above_0_and_up_to_1(thresholds):
    with pytest.raises(ConfigError, match=r"iou_thresholds must lie in \(0, 1\], got"):
        evaluate_detection_average_precision([[FOUND]], [[BOX]], iou_thresholds=thresholds)


def test_one_threshold_must_be_a_list_and_an_unknown_overlap_lists_the_known():
    with pytest.raises(DataError, match="The targets must be a list with an item for each image, got 3"):
        evaluate_detection_average_precision([[FOUND]], 3)
    with pytest.raises(ConfigError, match=r"must be a list of numbers, got 0\.5"):
        evaluate_detection_average_precision([[FOUND]], [[BOX]], iou_thresholds=0.5)
    with pytest.raises(ConfigError, match=r"Unknown iou_type 'mask'.*bbox, segm"):
        evaluate_detection_average_precision([[FOUND]], [[BOX]], iou_type="mask")


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "iris-hf\[detection\]"'):
        evaluate_detection_average_precision([[FOUND]], [[BOX]])
