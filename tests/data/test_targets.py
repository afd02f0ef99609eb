import math
import re
import time

import pytest
import torch
from data_examples import make_target

from iris_hf.data.targets import check_target, classes_in, infer_target_type
from iris_hf.errors import ConfigError, DataError

GOOD = [
    ("multiclass", 0),
    ("multiclass", torch.tensor(2)),
    ("multiclass", torch.tensor([2], dtype=torch.uint8)),
    ("multilabel", torch.tensor([0, 0, 0])),
    ("multilabel", torch.tensor([1, 0, 1], dtype=torch.int32)),
    ("detection", torch.zeros(0, 5)),
    ("detection", torch.tensor([[2, 0, 0, 1, 1], [0, 0.25, 0.5, 0.26, 0.51]])),
    ("segmentation", torch.ones(3, 2, 4)),
    ("image_text", None),
    ("image_text", 1),
]

BAD = [
    ("multiclass", 3, "class index 3 is beyond the 3 classes (0 to 2)"),
    ("multiclass", -1, "class index -1 is negative"),
    ("multiclass", 1.0, "not 1.0 (float)"),
    ("multiclass", True, "not True (bool)"),
    ("multiclass", "cat", "not 'cat' (str)"),
    ("multiclass", torch.tensor([1, 2]), "not a int64 tensor [2]"),
    ("multiclass", torch.tensor(1.0), "not a float32 tensor []"),
    ("multilabel", torch.tensor([1.0, 0, 0]), "not a float32 tensor [3]"),
    ("multilabel", torch.tensor([True, False, False]), "not a bool tensor [3]"),
    ("multilabel", [1, 0, 0], "not [1, 0, 0] (list)"),
    ("multilabel", torch.tensor([1, 0]), "one value per class: 3, not 2"),
    ("multilabel", torch.tensor([0, 2, 0]), "label 1 of a multilabel target is 2"),
    ("multilabel", torch.tensor([0, 0, -1]), "label 2 of a multilabel target is -1"),
    ("detection", torch.zeros(5), "not a float32 tensor [5]"),
    ("detection", torch.zeros(0), "No boxes are an empty [0, 5] tensor"),
    ("detection", torch.zeros(2, 4), "not a float32 tensor [2, 4]"),
    ("detection", torch.zeros(0, 5, dtype=torch.float64), "not a float64 tensor [0, 5]"),
    ("detection", torch.tensor([[0, 0.71, 0, 0.7, 1.0]]), "box 0 has x1 <= x0 (0.7, 0.71)"),
    ("detection", torch.tensor([[0, 0, 0.5, 1.0, 0.5]]), "box 0 has y1 <= y0 (0.5, 0.5)"),
    ("detection", torch.tensor([[0, 0, 0, 1, 1], [0, -0.1, 0, 1, 1]]), "box 1 leaves the image: x0=-0.1"),
    ("detection", torch.tensor([[0, 0, 0, 1, 1.001]]), "box 0 leaves the image"),
    ("detection", torch.tensor([[0, math.nan, 0, 1, 1]]), "box 0 holds NaN or infinity"),
    ("detection", torch.tensor([[0, 0, 0, math.inf, 1]]), "box 0 holds NaN or infinity"),
    ("detection", torch.tensor([[math.inf, 0, 0, 1, 1]]), "box 0 holds NaN or infinity"),
    ("detection", torch.tensor([[0.5, 0, 0, 1, 1]]), "box 0 has class 0.5, which is no whole number"),
    ("detection", torch.tensor([[3.0, 0, 0, 1, 1]]), "class index 3 is beyond the 3 classes"),
    ("detection", torch.tensor([[-1.0, 0, 0, 1, 1]]), "class index -1 is negative"),
    ("segmentation", torch.zeros(3, 2, 4, dtype=torch.int64), "not a int64 tensor [3, 2, 4]"),
    ("segmentation", torch.zeros(2, 4), "not a float32 tensor [2, 4]"),
    ("segmentation", torch.zeros(2, 2, 4), "one mask per class: 3, not 2"),
    ("segmentation", torch.zeros(3, 4, 2), "the mask is 2 x 4 pixels (width x height), its image 4 x 2"),
    ("segmentation", torch.full((3, 2, 4), 0.5), "the mask of class 0 is 0.5 at x=0, y=0"),
    ("segmentation", torch.full((3, 2, 4), math.nan), "the mask of class 0 is nan"),
    ("image_text", 3, "class index 3 is beyond"),
    ("image_text", "text", "an image_text target is None, an int"),
]


@pytest.mark.parametrize(("target_type", "target"), GOOD)
def test_valid_targets_pass(target_type, target):
    check_target(target, target_type, num_classes=3, image_size=(4, 2))
    check_target(target, target_type)


@pytest.mark.parametrize(("target_type", "target", "message"), BAD)
def test_invalid_targets_name_the_example_and_the_value(target_type, target, message):
    with pytest.raises(DataError, match=f"^Example 1043: .*{re.escape(message)}"):
        check_target(target, target_type, num_classes=3, image_size=(4, 2), where="Example 1043: ")


def test_unknown_target_types_list_the_known():
    with pytest.raises(ConfigError, match=r"Unknown target_type 'multi_label'. Did you mean 'multilabel'"):
        check_target(0, "multi_label")
    with pytest.raises(ConfigError, match="Unknown target_type"):
        classes_in(0, "multi_label")


@pytest.mark.parametrize(
    ("target_type", "target", "classes"),
    [
        ("multiclass", torch.tensor([2]), [2]),
        ("multilabel", torch.tensor([1, 0, 1]), [0, 2]),
        ("multilabel", torch.tensor([0, 0, 0]), []),
        ("detection", torch.tensor([[2.0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [2, 0, 0, 1, 1]]), [0, 2]),
        ("detection", torch.zeros(0, 5), []),
        ("segmentation", torch.tensor([[[0.0, 0]], [[0, 1]]]), [1]),
        ("image_text", None, []),
        ("image_text", 4, [4]),
    ],
)
def test_classes_that_occur_are_listed_once_in_order(target_type, target, classes):
    assert classes_in(target, target_type) == classes


def test_target_type_is_told_from_a_target(kind):
    expected = {"overlapping": "segmentation", "labelled_image_text": "multiclass"}.get(kind, kind)
    assert infer_target_type(make_target(kind, 1)) == expected


@pytest.mark.parametrize("target", ["cat", 1.5, [1, 2], torch.zeros(3), torch.zeros(2, 4), True])
def test_targets_of_no_known_type_are_refused(target):
    with pytest.raises(DataError, match="target of no known type"):
        infer_target_type(target)


def test_checking_a_class_index_is_cheap():
    start = time.perf_counter()
    for _ in range(10_000):
        check_target(1, "multiclass", num_classes=3)
    assert (time.perf_counter() - start) / 10_000 < 50e-6  # about 1e-6; the bound only catches a mistake
