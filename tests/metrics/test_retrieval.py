"""Retrieval agrees with a full sort of all similarities, takes ties without optimism, and never holds all of them."""

import json
import pickle

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iris_hf.errors import ConfigError, DataError
from iris_hf.metrics import Retrieval, evaluate_retrieval, ranking


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force_ranks(queries, items, query_ids, item_ids):
    """The place of the first item that belongs to each query, after those that are as similar and don't."""
    similar = sklearn.metrics.pairwise.cosine_similarity(queries, items).round(9)
    ranks = []
    for row, query_id in zip(similar, query_ids, strict=True):
        belongs = item_ids == query_id
        order = np.lexsort((belongs, -row))
        ranks.append(1 + np.count_nonzero(~belongs[order][: np.argmax(belongs[order])]))
    return np.array(ranks)


def brute_force(images, texts, image_ids, text_ids, recall_at=(1, 5, 10)):
    found = {
        "text_to_image": brute_force_ranks(texts, images, text_ids, image_ids),
        "image_to_text": brute_force_ranks(images, texts, image_ids, text_ids),
    }
    scores = {f"{name}_R@{k}": np.mean(ranks <= k) for name, ranks in found.items() for k in recall_at}
    scores |= {f"{name}_median_rank": np.median(ranks) for name, ranks in found.items()}
    return scores | {"num_images": len(images), "num_texts": len(texts)}


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@settings(deadline=None)
@given(st.data())
def test_every_score_is_that_of_a_full_sort_whatever_the_tile(data):
    num_images, num_texts, dimensions = (data.draw(st.integers(1, n)) for n in (20, 30, 4))
    number = np.random.default_rng(data.draw(st.integers(0, 999)))
    whole = data.draw(st.booleans())  # small whole numbers make ties

    def draw(n):
        values = number.integers(-1, 2, (n, dimensions)) if whole else number.normal(size=(n, dimensions))
        values[~values.any(axis=1)] = 1
        return values.astype(np.float64)

    num_ids = data.draw(st.integers(1, min(num_images, num_texts)))
    image_ids, text_ids = (
        np.concatenate([np.arange(num_ids), number.integers(0, num_ids, n - num_ids)]) - 3
        for n in (num_images, num_texts)
    )
    images, texts = draw(num_images), draw(num_texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "TILE", data.draw(st.sampled_from([1, 3, 2048])))
        result = evaluate_retrieval(torch.from_numpy(images), texts, image_ids, text_ids)
    assert result == pytest.approx(brute_force(images, texts, image_ids, text_ids))
    assert json.loads(json.dumps(result)) == result


def test_without_ids_pairs_agree_with_scikit_learns_top_k_accuracy():
    images, texts = features(60, 8), features(60, 8) + features(60, 8, seed=1)
    similar = sklearn.metrics.pairwise.cosine_similarity(texts, images)
    result = evaluate_retrieval(images, texts)
    for k in (1, 5, 10):
        expected = sklearn.metrics.top_k_accuracy_score(np.arange(60), similar, k=k)
        assert result[f"text_to_image_R@{k}"] == pytest.approx(expected)
        expected = sklearn.metrics.top_k_accuracy_score(np.arange(60), similar.T, k=k)
        assert result[f"image_to_text_R@{k}"] == pytest.approx(expected)


def test_features_that_are_all_equal_find_nothing():
    result = evaluate_retrieval(torch.ones(20, 7), torch.ones(20, 7) / 3)
    assert result["text_to_image_R@10"] == result["image_to_text_R@10"] == 0
    assert result["text_to_image_median_rank"] == result["image_to_text_median_rank"] == 20


def test_equal_features_tie_in_float32_wherever_they_stand():
    """Rounding of the products must not decide between an image and its exact copy."""
    images = features(300, 33)
    doubled = torch.cat([images, images])
    result = evaluate_retrieval(doubled, doubled, recall_at=[1, 2])
    assert result["text_to_image_R@1"] == result["image_to_text_R@1"] == 0
    assert result["text_to_image_R@2"] == result["image_to_text_R@2"] == 1


def test_one_of_several_captions_is_enough_for_an_image_and_each_must_find_its_image():
    images = [[1.0, 0.0], [0.0, 1.0]]
    texts = [[1.0, 0.1], [0.1, 1.0], [0.2, 1.0], [0.0, 1.0]]  # the second speaks of the other image
    result = evaluate_retrieval(images, texts, [7, 9], [7, 7, 9, 9], recall_at=[1])
    assert result["image_to_text_R@1"] == 1.0
    assert result["text_to_image_R@1"] == 0.75
    assert (result["num_images"], result["num_texts"]) == (2, 4)


def test_length_and_type_of_features_do_not_matter():
    images, texts = features(30, 16).bfloat16(), features(30, 16, seed=1).half()
    expected = evaluate_retrieval(images.double(), texts.double())
    assert evaluate_retrieval(images, texts) == expected
    assert evaluate_retrieval(images.float() * 1e30, texts.numpy() * 1e-4) == expected
    assert evaluate_retrieval(images.float().requires_grad_(), list(texts.float())) == expected
    with torch.autocast("cpu"):
        assert evaluate_retrieval(images, texts) == expected


def test_all_similarities_are_never_held_at_once():
    with LargestTensor() as seen:
        evaluate_retrieval(features(5000, 4), features(7000, 4, seed=1), range(5000), torch.arange(7000) % 5000)
    assert seen.elements == ranking.TILE**2


def test_rows_of_one_image_are_its_captions_in_any_order_of_batches():
    images, texts, owners = features(8, 5), features(40, 5, seed=1), torch.arange(40) % 8
    expected = evaluate_retrieval(images, texts, range(8), owners)
    pairs = torch.stack([images[owners], texts], dim=1)
    metric = Retrieval()
    for batch in torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(7):
        metric.add_batch(predictions=pairs[batch], references=owners[batch])
        metric = pickle.loads(pickle.dumps(metric))
    assert metric.compute() == expected
    assert Retrieval().compute(predictions=list(pairs), references=owners[:, None].tolist()) == expected


def test_other_values_of_k_name_the_scores():
    result = Retrieval(recall_at=[3]).compute(predictions=features(5, 2, 4), references=range(5))
    assert [name for name in result if "R@" in name] == ["text_to_image_R@3", "image_to_text_R@3"]


NAN = [[1.0, 0.0], [float("nan"), 0.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "undefined without images"),
        ((torch.ones(1, 3), torch.empty(0, 3)), "undefined without texts"),
        ((torch.ones(2, 3), torch.ones(2, 4)), "Image features have 3 dimensions, text features 4"),
        ((torch.ones(2, 3), torch.ones(3, 3)), "2 images but 3 texts: give image_ids and text_ids"),
        ((torch.ones(2), torch.ones(2, 2)), r"Image features must have the shape \[N, F\], got \[2\]"),
        ((torch.ones(2, 2), torch.ones(2, 0)), r"Text features must have the shape \[N, F\], got \[2, 0\]"),
        ((torch.ones(2, 2), NAN), "Example 1: the text feature is NaN or infinite"),
        (([[1.0, float("inf")]], [[1.0, 0.0]]), "Example 0: the image feature is NaN or infinite"),
        (([[0.0, 0.0]], [[1.0, 0.0]]), "Example 0: the image feature is all zeros"),
        ((torch.ones(2, 2), torch.ones(2, 2), [0, 1], [0]), "2 texts but 1 ids"),
        ((torch.ones(2, 2), torch.ones(2, 2), [0, 1], [0, 2]), "Example 1: image id: must be the id of a text.*got 1"),
        ((torch.ones(1, 2), torch.ones(2, 2), [0], [0, 2]), "Example 1: text id: must be the id of an image.*got 2"),
        ((torch.ones(2, 2), torch.ones(2, 2), [0, 0.5], [0, 1]), "Example 1: image id: must be an integer, got 0.5"),
        ((torch.ones(2, 2), torch.ones(2, 2), torch.eye(2), [0, 1]), r"image ids must be integers \[N\]"),
        ((["cat"], torch.ones(1, 2)), "Image features cannot become one array of numbers"),
    ],
)
def test_features_that_cannot_be_compared_are_errors(arguments, message):
    with pytest.raises(DataError, match=message):
        evaluate_retrieval(*arguments)


@pytest.mark.parametrize("recall_at", [[], [0], [1.5], 5, "15", [True]])
def test_a_k_that_is_no_count_is_an_error(recall_at):
    with pytest.raises(ConfigError, match="recall_at must be a list of positive integers"):
        evaluate_retrieval(torch.ones(1, 2), torch.ones(1, 2), recall_at=recall_at)
    with pytest.raises(ConfigError, match="recall_at must be a list of positive integers"):
        Retrieval(recall_at=recall_at)


def test_one_kind_of_ids_alone_is_an_error():
    with pytest.raises(ConfigError, match="text_ids without image_ids: give both"):
        evaluate_retrieval(torch.ones(1, 2), torch.ones(1, 2), text_ids=[0])


@pytest.mark.parametrize(
    ("pairs", "ids", "message"),
    [
        (torch.ones(2, 3), [0, 1], r"predictions \[N, 2, F\], .*got shape \[2, 3\]"),
        (torch.ones(2, 3, 2), [0, 1], r"predictions \[N, 2, F\], .*got shape \[2, 3, 2\]"),
        (torch.ones(2, 2, 3), [0], "2 pairs but 1 ids"),
        (torch.ones(2, 2, 4), [0, 1], "this batch have 4 dimensions, those before 3"),
        (
            torch.tensor([[[1.0] * 3] * 2, [[1.0] * 3, [float("nan")] * 3]]),
            [0, 1],
            "Example 6: the text feature is NaN",
        ),
        (torch.ones(2, 2, 3), [0, 1.5], "Example 6: pair id: must be an integer, got 1.5"),
    ],
)
def test_a_bad_batch_of_pairs_is_named_and_leaves_what_was_added(pairs, ids, message):
    metric = Retrieval()
    metric.add_batch(predictions=features(5, 2, 3), references=range(5))
    with pytest.raises(DataError, match=message):
        metric.add_batch(predictions=pairs, references=ids)
    assert metric.compute() == Retrieval().compute(predictions=features(5, 2, 3), references=range(5))
