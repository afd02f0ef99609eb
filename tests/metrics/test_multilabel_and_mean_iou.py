"""Multilabel average precision and mean IoU agree with scikit-learn; what is undefined is said, not guessed."""

import json

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from iris_hf.errors import ConfigError, DataError
from iris_hf.metrics import evaluate_mean_iou, evaluate_multilabel_average_precision

SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 4))


@settings(deadline=None)
@given(st.data())
def test_each_class_has_scikit_learns_average_precision(data):
    shape = data.draw(SHAPES)
    scores = data.draw(
        hnp.arrays(np.float32, shape, elements=st.sampled_from([-1.5, 0.0, 0.25, 0.5, 2.0]))
    )  # with ties
    targets = data.draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 1)))
    assume(targets.any())
    result = evaluate_multilabel_average_precision(scores, torch.from_numpy(targets))
    present = np.flatnonzero(targets.any(axis=0))
    expected = [sklearn.metrics.average_precision_score(targets[:, k], scores[:, k]) for k in present]
    assert [entry["AP"] for entry in result["per_class"]] == pytest.approx(expected, abs=1e-12)
    assert result["mAP"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert [entry["class"] for entry in result["per_class"]] == present.tolist()
    assert result["classes_without_positives"] == np.flatnonzero(~targets.any(axis=0)).tolist()
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([], [], "no examples"),
        (torch.empty(0, 3), torch.empty(0, 3), "no examples"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "None of the 2 examples is positive for any of the 3 classes"),
        (torch.zeros(2, 3), torch.zeros(3, 3), r"one shape .*got \[2, 3\] and \[3, 3\]"),
        (torch.zeros(2), torch.zeros(2), r"one shape .*got \[2\] and \[2\]"),
        ([[0, 1], [float("nan"), 0]], [[0, 1], [1, 0]], "Example 1: .*NaN"),
        ([[0, 1], [1, 0]], [[0, 1], [2, 0]], r"Example 1: .*0 or 1, got \[2, 0\]"),
    ],
)
def test_labels_that_cannot_be_scored_are_errors(predictions, targets, message):
    with pytest.raises(DataError, match=message):
        evaluate_multilabel_average_precision(predictions, targets)


@settings(deadline=None)
@given(st.data())
def test_each_class_has_scikit_learns_jaccard_score(data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
    predictions = data.draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 4)))
    targets = data.draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([0, 1, 2, 3, 255])))
    counted = targets != 255
    assume(counted.any())
    result = evaluate_mean_iou(predictions, list(targets))
    own, found = targets[counted], predictions[counted]
    labels = np.union1d(own, found)
    expected = sklearn.metrics.jaccard_score(own, found, labels=labels, average=None)
    assert [entry["class"] for entry in result["per_class"]] == labels.tolist()
    assert [entry["iou"] for entry in result["per_class"]] == pytest.approx(expected)
    assert result["mean_iou"] == pytest.approx(expected.mean())
    assert result["overall_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(own, found))
    recall = sklearn.metrics.recall_score(own, found, labels=np.unique(own), average="macro", zero_division=0)
    assert result["mean_accuracy"] == pytest.approx(recall)
    assert json.loads(json.dumps(result)) == result


def test_masks_scores_and_class_maps_are_the_same_segmentation():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, 8, 9, generator=generator)
    target = torch.randint(0, 5, (3, 8, 9), generator=generator)
    one_hot = [torch.nn.functional.one_hot(x, 5).movedim(-1, 1).float() for x in (scores.argmax(1), target)]
    expected = evaluate_mean_iou(scores.argmax(1), target)
    assert evaluate_mean_iou(scores, target) == expected
    assert evaluate_mean_iou(one_hot[0], one_hot[1]) == expected
    assert evaluate_mean_iou(one_hot[0].bool(), one_hot[1].bool()) == expected


def test_images_of_several_sizes_are_pooled_by_pixel():
    result = evaluate_mean_iou([torch.zeros(2, 2), torch.ones(1, 4)], [torch.zeros(2, 2), torch.zeros(1, 4)])
    assert result["mean_iou"] == pytest.approx((4 / 8 + 0) / 2)
    assert result["per_class"][1] == {"class": 1, "num_pixels": 0, "iou": 0.0, "accuracy": None}


def test_pixels_without_a_class_are_ignored_in_targets_and_missed_in_predictions():
    target = torch.zeros(2, 1, 4)
    target[0, 0, :2] = 1
    target[1, 0, 2] = 1  # the fourth pixel has no class
    prediction = torch.zeros(2, 1, 4)
    prediction[0, 0, [0, 3]] = 1
    prediction[1, 0, 2] = 1  # the second pixel has no class
    result = evaluate_mean_iou([prediction], [target])
    assert [entry["iou"] for entry in result["per_class"]] == [1 / 2, 1.0]
    assert evaluate_mean_iou([[[0, 255, 1, 0]]], [[[0, 0, 1, 255]]]) == result


def test_without_an_ignored_index_255_is_a_class():
    assert evaluate_mean_iou([[[255, 0]]], [[[255, 0]]], ignore_index=None)["per_class"][1]["class"] == 255


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([], [], "no images"),
        ([[[0]]], [[[255]]], "No pixel of the 1 targets has a class"),
        ([[[0]]], [], "Predictions of 1 images but targets of 0"),
        (torch.zeros(2, 2, 3), torch.zeros(2, 3, 2), r"Image 0: the prediction has \[2, 3\] pixels, .*resize"),
        ([[[0, 0]], [[0, 1.5]]], [[[0, 0]], [[0, 1]]], r"Image 1, prediction: pixel \(0, 1\) must be a class .*1.5"),
        ([[[0, 0]]], [[[0, -1]]], r"Image 0, target: pixel \(0, 1\) must be a class index or 255 for none, got -1"),
        ([[[0]]], [[[2**24]]], "must be a class index"),
        (torch.zeros(1, 2, 1, 1), [[[2]]], "Image 0: the target has class 2, the prediction 2 classes"),
        (torch.full((1, 2, 1, 1), float("nan")), [[[0]]], "Image 0: the prediction's scores must not be NaN"),
        ([[[0]]], torch.ones(1, 2, 1, 1), r"Image 0: pixel \(0, 0\) of the target belongs to classes \[0, 1\]"),
        ([[[0]]], torch.full((1, 2, 1, 1), 0.5), "Image 0: target masks .*0 and 1 only"),
        ([[0]], [[0]], r"Image 0: a prediction is \[H, W\] or \[C, H, W\], got shape \[1\]"),
    ],
)
def test_segmentations_that_cannot_be_compared_are_errors(predictions, targets, message):
    with pytest.raises(DataError, match=message):
        evaluate_mean_iou(predictions, targets)


def test_what_is_no_list_of_images_and_no_class_to_ignore_is_said():
    with pytest.raises(DataError, match="The predictions must be a list with an item for each image, got None"):
        evaluate_mean_iou(None, [])
    with pytest.raises(ConfigError, match="ignore_index must be a whole number, got 'a'"):
        evaluate_mean_iou([], [], ignore_index="a")
