"""Accuracy agrees with scikit-learn and refuses what it cannot count."""

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from iris_hf.errors import DataError
from iris_hf.metrics import evaluate_accuracy

SCORES = torch.tensor([[0.1, 0.2, 0.1], [0.9, 0.2, 0.2], [0.4, 0.4, 0.8]])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=50))
def test_class_indices_agree_with_scikit_learn(pairs):
    predictions, targets = zip(*pairs, strict=True)
    assert evaluate_accuracy(list(predictions), list(targets)) == sklearn.metrics.accuracy_score(targets, predictions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scores_count_by_their_top_class(dtype):
    scores = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(200) % 7
    expected = sklearn.metrics.accuracy_score(targets, scores.double().numpy().argmax(1))
    assert evaluate_accuracy(scores, targets) == expected


@pytest.mark.parametrize("as_given", [torch.tensor, np.array, list])
@pytest.mark.parametrize("targets", [[1, 0, 1], [[1], [0], [1]], [1.0, 0.0, 1.0]])
@pytest.mark.parametrize("predictions", [SCORES.tolist(), [1, 0, 2], [1.0, 0.0, 2.0]])
def test_every_shape_and_container_of_the_contract_counts_alike(as_given, targets, predictions):
    assert evaluate_accuracy(as_given(predictions), as_given(targets)) == 2 / 3


def test_a_list_of_tensors_is_a_batch():
    assert evaluate_accuracy(list(SCORES), [torch.tensor(1), torch.tensor(0), torch.tensor(0)]) == 2 / 3


def test_the_lowest_class_wins_a_tie():
    assert evaluate_accuracy(torch.zeros(2, 3), [0, 1]) == 0.5


def test_arguments_are_not_changed_and_read_only_arrays_are_taken():
    scores = SCORES.numpy().copy()
    scores.flags.writeable = False
    assert evaluate_accuracy(scores, np.array([1, 0, 2])) == 1.0


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ([], [], "no examples"),
        (torch.empty(0, 3), torch.empty(0), "no examples"),
        ([0, 1], [0], "2 predictions but 1 targets"),
        ([], [0], "0 predictions but 1 targets"),
        ([[0.1, 0.9], [float("nan"), 0.2]], [0, 1], r"Example 1: .*NaN, got \[nan"),
        ([0, float("nan")], [0, 1], "Example 1: prediction: must be a class index .*got nan"),
        ([0, 1], [0, 0.5], "Example 1: target: must be a class index .*got 0.5"),
        ([0, 1], [0, -1], "Example 1: target: must be a class index .*got -1"),
        (SCORES, [0, 1, 3], "Example 2: target: the predictions have 3 classes, got 3"),
        (SCORES, torch.eye(3), r"targets? must be class indices \[N\] or \[N, 1\], got shape \[3, 3\]"),
        (torch.zeros(2, 3, 4), [0, 1], r"got shapes \[2, 3, 4\] and \[2\]"),
        (torch.zeros(2, 0), [0, 1], r"got shapes \[2, 0\] and \[2\]"),
        (torch.tensor(1), torch.tensor(1), r"got shapes \[\] and \[\]"),
        ([[0.1, 0.2], [0.3]], [0, 1], "Predictions cannot become one array of numbers"),
        ([torch.zeros(2), torch.zeros(3)], [0, 1], "Predictions cannot become one array of numbers"),
        (["cat", "dog"], [0, 1], "Predictions cannot become one array of numbers"),
    ],
)
def test_what_cannot_be_counted_is_a_clear_error(predictions, targets, message):
    with pytest.raises(DataError, match=message):
        evaluate_accuracy(predictions, targets)


def test_the_error_is_a_value_error():
    with pytest.raises(ValueError, match="no examples"):
        evaluate_accuracy([], [])
