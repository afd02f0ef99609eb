import datasets
import numpy as np
import pytest
import torch
from data_examples import CLASS_NAMES, assert_same_target, hf_arguments, make_examples, make_target
from datasets import ClassLabel, Features, Image, List, Value
from torch.utils.data import ConcatDataset, Subset

from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import from_hf
from iris_hf.data.read_targets import get_classes_from_dataset, get_targets_from_dataset
from iris_hf.data.targets import classes_in
from iris_hf.errors import ConfigError, DataError


class WithTargets(torch.utils.data.Dataset):
    """Tells its targets and cannot be read otherwise."""

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        raise AssertionError("an example was read")

    def get_targets(self, index):
        return self.targets[index]


def with_broken_images(kind):
    """A Hugging Face data set whose images cannot be decoded, so that reading one would fail."""
    converted = to_hf(make_examples(kind), **hf_arguments(kind))
    broken = [{"bytes": b"no image", "path": None}] * len(converted)
    features = converted.features.copy()
    return from_hf(
        datasets.Dataset.from_dict(converted.to_dict() | {"image": broken}, features=features)
        if kind not in ("segmentation", "overlapping")
        else converted.remove_columns("image").add_column("image", broken, feature=Image())
    )


def expected_targets(kind):
    return [target for _, target in make_examples(kind)]


def assert_same_targets(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_same_target(one.item() if isinstance(other, int) and torch.is_tensor(one) else one, other)


def test_no_image_is_decoded(kind):
    dataset = with_broken_images(kind)
    with pytest.raises(DataError):
        dataset[0]
    assert_same_targets(get_targets_from_dataset(dataset), expected_targets(kind))
    stream = from_hf(dataset.hf_dataset.to_iterable_dataset(num_shards=2))
    assert_same_targets(get_targets_from_dataset(stream), expected_targets(kind))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    expected = [expected_targets(kind)[i] for i in order]
    for view in (dataset.select(order), Subset(dataset, order), Subset(dataset, torch.tensor(order)),
                 ConcatDataset([dataset.select(order[:4]), Subset(dataset, order[4:])]),
                 Subset(ConcatDataset([dataset, dataset]), [i + 10 * (i % 2) for i in order])):  # fmt: skip
        assert_same_targets(get_targets_from_dataset(view), expected)
        classes = [[] if t is None else classes_in(t, dataset.target_type) for t in expected]
        assert get_classes_from_dataset(view, target_type=dataset.target_type) == classes


def test_classes_of_masks_are_read_from_their_column():
    columns = {
        "image": [None] * 3,
        "annotation": [{"bytes": b"no mask", "path": None}] * 3,
        "classes": [[2, 0], [], [1]],
    }
    features = Features({"image": Image(), "annotation": Image(), "classes": List(ClassLabel(names=CLASS_NAMES))})
    dataset = from_hf(datasets.Dataset.from_dict(columns, features=features))
    assert get_classes_from_dataset(dataset.select([0, 2, 1])) == [[0, 2], [1], []]


@pytest.mark.parametrize("as_list_of_objects", [False, True])
def test_classes_of_boxes_are_read_without_image_sizes_and_crowds(as_list_of_objects):
    rows = [{"bbox": [[0.0, 0.0, 1.0, 1.0]] * 3, "category": [2, 0, 2], "iscrowd": [0, 1, 0]},
            {"bbox": [], "category": [], "iscrowd": []},
            {"bbox": [[0.0, 0.0, 1.0, 1.0]], "category": [1], "iscrowd": [0]}]  # fmt: skip
    one = {"bbox": List(Value("float64")), "category": ClassLabel(names=CLASS_NAMES), "iscrowd": Value("int64")}
    feature = List(one) if as_list_of_objects else {name: List(inner) for name, inner in one.items()}
    if as_list_of_objects:
        rows = [[dict(zip(row, box, strict=True)) for box in zip(*row.values(), strict=True)] for row in rows]
    features = Features({"image": Image(), "objects": feature})
    dataset = from_hf(datasets.Dataset.from_dict({"image": [None] * 3, "objects": rows}, features=features))
    assert get_classes_from_dataset(dataset) == [[2], [], [1]]
    assert get_classes_from_dataset(dataset.select([2, 1, 0, 2])) == [[1], [], [2], [1]]


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([[0], [1, 7]], "Example 1: class index 7 is beyond the 3 classes"),
        ([[0], None], r"Example 1: 'objects.category' is null"),
    ],
)
def test_a_wrong_class_of_a_box_is_named(categories, message):
    features = {"image": Image(), "objects": {"bbox": List(List(Value("float64"))), "category": List(Value("int64"))}}
    rows = [{"bbox": [], "category": row} for row in categories]
    columns = {"image": [None] * 2, "objects": rows}
    dataset = from_hf(datasets.Dataset.from_dict(columns, features=Features(features)), class_names=CLASS_NAMES)
    with pytest.raises(DataError, match=message):
        get_classes_from_dataset(dataset)


def test_classes_column_out_of_range_is_named():
    columns = {"image": [None] * 2, "annotation": [None] * 2, "classes": [[0], [-1]]}
    features = Features({"image": Image(), "annotation": Image(), "classes": List(ClassLabel(names=CLASS_NAMES))})
    with pytest.raises(DataError, match="Example 1: class index -1 is negative"):
        get_classes_from_dataset(from_hf(datasets.Dataset.from_dict(columns, features=features)))


@pytest.mark.parametrize(
    ("targets", "shape"),
    [
        ([1, 2, 0], (3,)),
        ([np.int64(1), np.int32(2)], (2,)),
        ([torch.tensor(1), torch.tensor(2)], (2,)),
        ([torch.tensor([1]), torch.tensor([2])], (2, 1)),
        ([torch.tensor([1, 0]), torch.tensor([0, 0])], (2, 2)),
        ([torch.zeros(2, 5)] * 3, (3, 2, 5)),
    ],
)
def test_equal_shapes_are_stacked(targets, shape):
    with_targets = WithTargets(targets)
    pairs = [("image", target) for target in targets]
    for dataset in (with_targets, pairs, Subset(with_targets, range(len(targets)))):
        stacked = get_targets_from_dataset(dataset)
        assert stacked.shape == shape
        assert [row.tolist() for row in stacked] == [torch.as_tensor(target).tolist() for target in targets]


@pytest.mark.parametrize(
    "targets", [[np.int64(1), np.int32(0)], [torch.tensor([1]), 0], [torch.tensor(1), torch.tensor([0])]]
)
def test_class_indices_of_every_form_become_one_tensor(targets):
    assert get_targets_from_dataset(WithTargets(targets)).tolist() == [1, 0]


@pytest.mark.parametrize("example", ["image", ("image", 1, 2), {"image": 0}])
def test_an_example_that_is_no_pair_is_named(example):
    with pytest.raises(DataError, match=r"Example 1 is a \w+, not a pair \(raw input, target\)"):
        get_targets_from_dataset([("image", 0), example])


def test_a_data_set_of_hugging_face_needs_no_wrapping_and_no_data_set_is_said():
    rows = with_broken_images("multiclass").hf_dataset
    for dataset in (rows, rows.to_iterable_dataset()):
        assert_same_targets(get_targets_from_dataset(dataset), expected_targets("multiclass"))
    with pytest.raises(ConfigError, match=r"Give one split of the data set, such as dataset\['train'\]"):
        get_targets_from_dataset(datasets.DatasetDict(train=rows))
    with pytest.raises(ConfigError, match="by index or one after another, not None"):
        get_targets_from_dataset(None)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([torch.tensor([0, 1]), torch.tensor([5, 7])], "Example 1: label 0 of a multilabel target is 5; it has to be"),
        ([torch.tensor([1]), torch.tensor([0, 1])], "Example 1: a multiclass target is an int or an integer tensor"),
        ([0, -1], "Example 1: class index -1 is negative"),
        ([torch.zeros(0, 5), 3], "Example 1: a detection target is a float32 tensor"),
        ([torch.zeros(0, 5), torch.zeros(3)], "Example 1: a detection target is a float32 tensor"),
        ([torch.zeros(2, 4, 4), torch.zeros(2, 5)], "Example 1: a segmentation target is a float32 tensor"),
    ],
)
def test_classes_are_not_read_out_of_targets_in_another_format(targets, message):
    with pytest.raises(DataError, match=message):
        get_classes_from_dataset(WithTargets(targets))


@pytest.mark.parametrize("targets", [[torch.zeros(2, 5), torch.zeros(0, 5)], ["a", "b"], [None, 1], [None, None]])
def test_other_targets_are_a_list(targets):
    assert get_targets_from_dataset(WithTargets(targets)) is not targets
    for actual, expected in zip(get_targets_from_dataset(WithTargets(targets)), targets, strict=True):
        assert actual is expected


def test_an_iterable_is_read_once_through():
    assert get_targets_from_dataset(iter([("a", 1), ("b", 2)])).tolist() == [1, 2]


def test_classes_are_told_from_any_targets(kind):
    targets = [make_target(kind, seed) for seed in range(1, 6)]
    classes = get_classes_from_dataset(WithTargets(targets))
    target_type = hf_arguments(kind)["target_type"]
    assert classes == [[] if target is None else classes_in(target, target_type) for target in targets]


@pytest.mark.parametrize("dataset", [[], WithTargets([])])
def test_an_empty_data_set_is_an_error(dataset):
    with pytest.raises(DataError, match="The data set has no examples"):
        get_targets_from_dataset(dataset)


def test_an_empty_hugging_face_data_set_is_an_error():
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES), "id": Value("int64")})
    dataset = from_hf(datasets.Dataset.from_dict({name: [] for name in features}, features=features))
    with pytest.raises(DataError, match="The data set has no examples"):
        get_targets_from_dataset(dataset)
