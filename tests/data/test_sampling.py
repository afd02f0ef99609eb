import functools
import math
import pickle
import random
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from data_examples import CLASS_NAMES, assert_same_target, hf_arguments
from sampling_examples import LABELLED_KINDS, WithTargets, make_hf, make_targets, rows_of
from torch.utils.data import ConcatDataset, Subset

from iris_hf.data.convert import to_hf
from iris_hf.data.hf_dataset import HFDataset, from_hf
from iris_hf.data.read_targets import get_targets_from_dataset
from iris_hf.data.sampling import balance_weights, make_oversampled_dataset, sample_few_shot_dataset
from iris_hf.data.subclass import get_subclass_dataset
from iris_hf.data.targets import classes_in
from iris_hf.errors import ConfigError, DataError


@pytest.fixture(params=LABELLED_KINDS)
def kind(request):
    return request.param


def classes_of(kind, targets):
    return [set(classes_in(target, hf_arguments(kind)["target_type"])) for target in targets]


def few_shot_by_hand(classes, n_shot, seed):
    order = list(range(len(classes)))
    random.Random(seed).shuffle(order)
    chosen = []
    for example in order:
        if any(sum(index in classes[other] for other in chosen) < n_shot for index in classes[example]):
            chosen.append(example)
    return chosen


@pytest.mark.parametrize("seed", range(10))
def test_few_shot_has_enough_of_each_class_and_nothing_needless(kind, seed):
    targets = make_targets(kind, seed=seed)
    classes = classes_of(kind, targets)
    held = Counter(index for row in classes for index in row)
    for n_shot in (1, 3, 12):
        chosen = rows_of(sample_few_shot_dataset(WithTargets(targets), n_shot=n_shot, random_seed=seed))
        assert chosen == few_shot_by_hand(classes, n_shot, seed)
        assert len(set(chosen)) == len(chosen)
        so_far = Counter()
        for example in chosen:
            assert any(so_far[index] < n_shot for index in classes[example])
            so_far.update(classes[example])
        assert all(so_far[index] >= min(n_shot, count) for index, count in held.items())


def test_few_shot_reads_no_image_and_is_the_same_for_every_kind_of_data_set(kind):
    targets = make_targets(kind)
    expected = rows_of(sample_few_shot_dataset(WithTargets(targets), n_shot=np.int64(2), random_seed=np.int64(3)))
    hf = make_hf(kind, targets)
    with pytest.raises(DataError):
        hf[0]
    sampled = sample_few_shot_dataset(hf, n_shot=2, random_seed=3)
    assert isinstance(sampled, HFDataset)
    assert rows_of(sampled) == expected
    raw = sample_few_shot_dataset(hf.hf_dataset, n_shot=2, random_seed=3)
    assert isinstance(raw, datasets.Dataset)
    assert list(raw["row"]) == expected
    pairs = [(None, target) for target in targets]
    assert rows_of(sample_few_shot_dataset(pairs, n_shot=2, random_seed=3)) == expected
    doubled = Subset(ConcatDataset([hf, hf]), torch.arange(30) + 15)
    moved = sample_few_shot_dataset(doubled, n_shot=2, random_seed=3)
    in_order = sample_few_shot_dataset(WithTargets(targets[15:] + targets[:15]), n_shot=2, random_seed=3)
    assert [row - 15 for row in rows_of(moved)] == rows_of(in_order)
    for index, row in enumerate(rows_of(in_order)):
        assert_same_target(moved.get_targets(index), targets[(row + 15) % 30])


def test_a_subset_of_a_hugging_face_data_set_stays_one():
    targets = make_targets("multiclass")
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    sampled = sample_few_shot_dataset(Subset(make_hf("multiclass", targets), order), n_shot=2)
    expected = sample_few_shot_dataset(WithTargets([targets[i] for i in order]), n_shot=2)
    assert rows_of(sampled) == order[rows_of(expected)].tolist()


def test_few_shot_keeps_rare_classes():
    for seed in range(10):
        sampled = sample_few_shot_dataset(WithTargets([0, 1, 1, 1, 2, 2, 2, 2]), n_shot=2, random_seed=seed)
        assert Counter(get_targets_from_dataset(sampled).tolist()) == {0: 1, 1: 2, 2: 2}


def test_seeds_differ_and_zero_is_one():
    dataset = WithTargets([index % 10 for index in range(100)])
    samples = [tuple(rows_of(sample_few_shot_dataset(dataset, n_shot=2, random_seed=seed))) for seed in range(5)]
    assert len(set(samples)) == 5
    assert rows_of(sample_few_shot_dataset(dataset, n_shot=2)) == list(samples[0])


def test_examples_without_a_class_are_not_sampled():
    box = torch.tensor([[1, 0.1, 0.1, 0.2, 0.2]])
    dataset = WithTargets([torch.zeros(0, 5), box, torch.zeros(0, 5)])
    assert rows_of(sample_few_shot_dataset(dataset, n_shot=5)) == [1]


def test_strict_names_the_classes_and_their_counts():
    dataset = WithTargets([0, 0, 0, 1, 2, 2])
    expected = r"Fewer than n_shot=3 examples: class 1 has 1, class 2 has 2\. Lower n_shot"
    with pytest.raises(DataError, match=expected):
        sample_few_shot_dataset(dataset, n_shot=3, strict=True)
    assert len(sample_few_shot_dataset(dataset, n_shot=1, strict=True)) == 3


def test_strict_counts_classes_that_do_not_occur_where_they_are_known():
    hf = make_hf("multiclass", [0, 0, 1])
    with pytest.raises(DataError, match=r"class 1 \('bee'\) has 1, class 2 \('cat'\) has 0"):
        sample_few_shot_dataset(hf, n_shot=2, strict=True)


@pytest.mark.parametrize("n_shot", [0, -1, 2.5, "3", True])
def test_n_shot_has_to_be_positive(n_shot):
    with pytest.raises(ConfigError, match=r"n_shot must be (at least 1|a whole number), got "):
        sample_few_shot_dataset(WithTargets([0, 1]), n_shot=n_shot)


@pytest.mark.parametrize("seed", [None, "0", [1]])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ConfigError, match="random_seed must be a whole number, got "):
        sample_few_shot_dataset(WithTargets([0, 1]), n_shot=1, random_seed=seed)
    chosen = sample_few_shot_dataset(WithTargets(list(range(9))), n_shot=1, random_seed=np.int64(3))
    assert rows_of(chosen) == rows_of(sample_few_shot_dataset(WithTargets(list(range(9))), n_shot=1, random_seed=3))


@pytest.mark.parametrize("targets", [[None, None], [torch.zeros(0, 5)] * 2, [torch.zeros(3, dtype=torch.int64)] * 2])
def test_no_class_at_all_is_an_error(targets):
    with pytest.raises(DataError, match="No example of the data set has a class"):
        sample_few_shot_dataset(WithTargets(targets), n_shot=1)
    with pytest.raises(DataError, match="No example of the data set has a class"):
        make_oversampled_dataset(WithTargets(targets), min_num_samples=5, balance=True)
    assert len(make_oversampled_dataset(WithTargets(targets), min_num_samples=5)) == 5


def test_streaming_empty_and_several_splits_are_errors():
    hf = make_hf("multiclass", [0, 1]).hf_dataset
    samplers = [functools.partial(sample_few_shot_dataset, n_shot=1),
                functools.partial(make_oversampled_dataset, min_num_samples=9),
                functools.partial(get_subclass_dataset, class_names=CLASS_NAMES, class_ids=[0])]  # fmt: skip
    for sample in samplers:
        with pytest.raises(ConfigError, match=r"HFIterableDataset has no length\. Give a map-style data set"):
            sample(from_hf(hf.to_iterable_dataset()))
        with pytest.raises(ConfigError, match="Give one split"):
            sample(datasets.DatasetDict(train=hf))
        with pytest.raises(DataError, match="no examples"):
            sample([])


@pytest.mark.parametrize(
    ("count", "minimum", "rate", "length"),
    [
        (3, 10, 1.0, 10),
        (3, 0, 3.0, 9),
        (3, 8, 3.0, 9),
        (3, 12, 3, 12),
        (10, 0, 1.25, 12),
        (10, 0, 1.2, 12),
        (7, 8, 1.1, 8),
    ],
)
@pytest.mark.parametrize("balance", [False, True])
def test_oversampled_are_the_originals_and_then_the_draws(count, minimum, rate, length, balance):
    targets = make_targets("multiclass", count, seed=1)
    for dataset in (WithTargets(targets), make_hf("multiclass", targets)):
        more = make_oversampled_dataset(
            dataset, min_num_samples=minimum, oversampling_rate=rate, balance=balance, random_seed=0
        )
        rows = rows_of(more)
        assert len(more) == len(rows) == length
        assert rows[:count] == list(range(count))
        assert set(rows) == set(range(count))
        assert get_targets_from_dataset(more).tolist() == [targets[row] for row in rows]


@pytest.mark.parametrize(("minimum", "rate"), [(0, 1.0), (3, 1), (2, 1.3)])
def test_without_draws_the_same_object_comes_back(minimum, rate):
    hf = make_hf("multiclass", [0, 1, 1])
    for dataset in ([(None, 0)] * 3, hf, hf.hf_dataset, Subset(hf, [0, 1, 2])):
        assert make_oversampled_dataset(dataset, min_num_samples=minimum, oversampling_rate=rate) is dataset
        with pytest.warns(UserWarning, match=f"balance has no effect: min_num_samples={minimum}"):
            assert make_oversampled_dataset(
                dataset, min_num_samples=minimum, oversampling_rate=rate, balance=True
            ) is dataset  # fmt: skip


def weights_by_hand(classes, minimum, maximum):
    held = [index for row in classes for index in row]
    mean = len(held) / len(set(held))
    weights = []
    for row in classes:
        weight = 1.0
        for index in row:
            weight *= max(min((mean / held.count(index)) ** 0.5, maximum), minimum)
        weights.append(min(weight, maximum))
    return weights


@pytest.mark.parametrize("limits", [(0.2, 5.0), (0.0, 100.0), (0.9, 1.1), (1.0, 1.0), (0.1, 0.5)])
def test_balance_weights_are_those_of_the_formula(kind, limits):
    for seed in range(3):
        classes = classes_of(kind, make_targets(kind, seed=seed))
        expected = np.array(weights_by_hand(classes, *limits))
        actual = balance_weights([sorted(row) for row in classes], minimum=limits[0], maximum=limits[1])
        np.testing.assert_allclose(actual / actual.sum(), expected / expected.sum(), rtol=1e-12)


def test_weights_over_very_many_classes_do_not_vanish():
    many, rare = list(range(2000)), [2000]
    weights = balance_weights([many] * 1000 + [rare], minimum=0.2, maximum=5.0)
    assert np.isfinite(weights).all()
    assert weights[-1] == 1
    only_common = balance_weights([many, many], minimum=0.2, maximum=0.5)
    assert only_common.tolist() == [1, 1]


def test_examples_are_drawn_as_often_as_they_weigh():
    boxes = {"ant": [0, 0, 0, 0.5, 0.5], "bee": [1, 0, 0, 0.5, 0.5], "cat": [2, 0, 0, 0.5, 0.5]}
    rows = [["ant"], ["ant", "ant"], ["ant", "bee"], [], ["ant", "bee", "cat"], ["cat"], ["ant"], ["ant"]]
    targets = [torch.tensor([boxes[name] for name in row]).reshape(-1, 5) for row in rows]
    num_draws = 200_000
    more = make_oversampled_dataset(
        WithTargets(targets), min_num_samples=len(rows) + num_draws, balance=True, random_seed=1
    )
    drawn = np.bincount(rows_of(more)[len(rows) :], minlength=len(rows))
    weights = np.array(weights_by_hand([set(row) for row in rows], 0.2, 5.0))
    expected = weights / weights.sum() * num_draws
    chi_square = ((drawn - expected) ** 2 / expected).sum()
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001
    uniform = make_oversampled_dataset(WithTargets(targets), min_num_samples=len(rows) + num_draws, random_seed=1)
    drawn = np.bincount(rows_of(uniform)[len(rows) :], minlength=len(rows))
    assert ((drawn - num_draws / 8) ** 2 / (num_draws / 8)).sum() < 24.3


def test_balancing_draws_rare_classes_more_often_from_every_kind_of_data_set(kind):
    targets = make_targets(kind)
    settings = {"min_num_samples": 500, "balance": True, "random_seed": 5}
    hf = make_hf(kind, targets)
    rows = rows_of(make_oversampled_dataset(WithTargets(targets), **settings))
    assert rows_of(make_oversampled_dataset(hf, **settings)) == rows
    assert list(make_oversampled_dataset(hf.hf_dataset, **settings)["row"]) == rows
    assert rows != rows_of(make_oversampled_dataset(hf, **settings | {"balance": False}))


@pytest.mark.parametrize("balance", [False, True])
def test_the_seed_decides_and_leaves_the_callers_generators_alone(balance):
    dataset = WithTargets([0, 0, 1, 2, 2, 2])

    def rows(**settings):
        return rows_of(make_oversampled_dataset(dataset, min_num_samples=50, balance=balance, **settings))

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert rows(random_seed=0) == rows(random_seed=0) != rows(random_seed=1)
    sample_few_shot_dataset(dataset, n_shot=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = rows(), rows()
        torch.manual_seed(0)
        assert rows() == first != second


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_num_samples": -1}, "min_num_samples must not be negative, got -1"),
        ({"min_num_samples": 2.0}, "min_num_samples must be a whole number, got 2.0"),
        ({"oversampling_rate": 0.5}, "oversampling_rate must be at least 1, which adds nothing, got 0.5"),
        ({"oversampling_rate": math.nan}, "oversampling_rate must be a finite number, got nan"),
        ({"oversampling_rate": math.inf}, "oversampling_rate must be a finite number, got inf"),
        ({"oversampling_rate": "2"}, "oversampling_rate must be a finite number, got '2'"),
        ({"random_seed": 1.5}, "random_seed must be a whole number, got 1.5"),
        ({"balance_weights_min": 6}, "got balance_weights_min=6 and balance_weights_max=5.0"),
        ({"balance_weights_min": -0.1}, "got balance_weights_min=-0.1"),
        ({"balance_weights_min": 0, "balance_weights_max": 0}, "a positive maximum"),
        ({"balance_weights_max": math.nan}, "balance_weights_max must be a finite number, got nan"),
    ],
)
def test_arguments_out_of_range_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_oversampled_dataset(WithTargets([0, 1]), **{"min_num_samples": 4} | settings)


class WithEverything(WithTargets):
    class_names = CLASS_NAMES
    num_classes = 3
    target_type = "multiclass"
    epoch = None

    def __getitem__(self, index):
        return f"image {index}", self.targets[index]

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_a_selection_has_what_its_data_set_has():
    dataset = WithEverything([0, 1, 2, 2])
    more = make_oversampled_dataset(sample_few_shot_dataset(dataset, n_shot=1), min_num_samples=6, random_seed=0)
    more = pickle.loads(pickle.dumps(more))
    assert (more.class_names, more.num_classes, more.target_type) == (CLASS_NAMES, 3, "multiclass")
    more.set_epoch(4)
    assert more.dataset.dataset.epoch == 4
    assert len(more) == len(list(iter(more[index] for index in range(6)))) == 6
    assert more[-1] == more[5]
    assert all(more[index][1] == more.get_targets(index) for index in range(6))
    with pytest.raises(IndexError):
        more[6]
    plain = sample_few_shot_dataset([("image", 1), ("image", 0)], n_shot=1)
    assert not any(hasattr(plain, name) for name in ("class_names", "num_classes", "target_type", "set_epoch"))
    assert sorted(plain.get_targets(index) for index in range(2)) == [0, 1]


def test_a_selection_converts_with_its_encoded_bytes(kind):
    targets = make_targets(kind, 6)
    parts = ConcatDataset([make_hf(kind, targets, broken=False), make_hf(kind, targets, broken=False)])
    more = make_oversampled_dataset(parts, min_num_samples=16, random_seed=0)
    converted = to_hf(more, **hf_arguments(kind))
    first = parts.datasets[0].hf_dataset.with_format("arrow")[:]["image"].to_pylist()
    stored = converted.with_format("arrow")[:]["image"].to_pylist()
    assert stored == [first[row % 6] for row in rows_of(more)]
