import re

import numpy as np
import pytest
import torch
from data_examples import noise

from iris_hf.data.collate import collate
from iris_hf.errors import DataError

IMAGE = torch.zeros(3, 4, 6)


def test_images_of_one_shape_are_stacked():
    inputs, targets = collate([(IMAGE, 1), (IMAGE + 1, 2)])
    assert inputs.shape == (2, 3, 4, 6)
    assert inputs[1].eq(1).all()
    assert targets.tolist() == [1, 2]
    assert targets.dtype == torch.int64


def test_images_of_several_shapes_stay_a_list():
    inputs, _ = collate([(IMAGE, 1), (torch.zeros(3, 4, 4), 2)])
    assert [tuple(image.shape) for image in inputs] == [(3, 4, 6), (3, 4, 4)]


@pytest.mark.parametrize(
    "targets",
    [[3, 0], [torch.tensor(3), torch.tensor(0)], [torch.tensor([3]), torch.tensor([0])], [np.int64(3), np.int64(0)]],
)
def test_class_indices_become_one_vector(targets):
    batch = collate([(IMAGE, target) for target in targets])[1]
    assert batch.dtype == torch.int64
    assert batch.tolist() == [3, 0]


@pytest.mark.parametrize("target", [torch.tensor([0, 1, 1]), torch.rand(3, 4, 6)])
def test_labels_and_masks_are_stacked(target):
    assert torch.equal(collate([(IMAGE, target)] * 2)[1], torch.stack([target] * 2))


@pytest.mark.parametrize("counts", [(2, 2), (0, 3), (0, 0)])
def test_boxes_stay_a_list_even_when_their_numbers_agree(counts):
    targets = collate([(IMAGE, torch.rand(count, 5)) for count in counts])[1]
    assert [tuple(target.shape) for target in targets] == [(count, 5) for count in counts]


def test_masks_of_several_sizes_stay_a_list():
    targets = collate([(IMAGE, torch.zeros(3, 4, 6)), (IMAGE, torch.zeros(3, 4, 4))])[1]
    assert [tuple(target.shape) for target in targets] == [(3, 4, 6), (3, 4, 4)]


def test_pairs_of_image_and_tokens_become_a_pair_of_batches():
    (images, tokens), targets = collate([((IMAGE, torch.arange(5)), 0)] * 3)
    assert images.shape == (3, 3, 4, 6)
    assert tokens.shape == (3, 5)
    assert targets.shape == (3,)


def test_dicts_become_a_dict_of_batches():
    examples = [((IMAGE, {"scores": torch.zeros(5), "ragged": torch.zeros(n)}), None) for n in (5, 4)]
    (_, batch), targets = collate(examples)
    assert targets is None
    assert batch["scores"].shape == (2, 5)
    assert [len(row) for row in batch["ragged"]] == [5, 4]


def test_token_dicts_of_uneven_length_are_padded_to_the_longest():
    def encode(n):
        return {"input_ids": torch.arange(1, n + 1), "attention_mask": torch.ones(n, dtype=torch.long)}

    (_, tokens), _ = collate([((IMAGE, encode(n)), 0) for n in (2, 4, 1)])
    assert tokens["input_ids"].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4], [1, 0, 0, 0]]
    assert tokens["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def test_bare_inputs_have_no_targets():
    inputs, targets = collate([IMAGE, IMAGE])
    assert inputs.shape == (2, 3, 4, 6)
    assert targets is None


def test_strings_and_pil_images_stay_lists():
    images = [noise(0), noise(1)]
    assert collate([(images[0], "a"), (images[1], "b")]) == (images, ["a", "b"])
    assert collate(["a", "b"]) == (["a", "b"], None)
    assert collate([(("text", images[0]), 1), (("more", images[1]), 2)])[0] == (["text", "more"], images)


def test_plain_lists_are_taken_as_tensors():
    assert collate([(IMAGE, [0, 1]), (IMAGE, [1, 1])])[1].tolist() == [[0, 1], [1, 1]]
    boxes = collate([(IMAGE, [[0, 0.0, 0.0, 1.0, 1.0]]), (IMAGE, [[1, 0.0, 0.0, 0.5, 0.5]] * 2)])[1]
    assert [tuple(box.shape) for box in boxes] == [(1, 5), (2, 5)]


@pytest.mark.parametrize(
    "rows", [[[[0, 0.0, 0.0, 1.0, 1.0]], []], [[], [[0, 0.0, 0.0, 1.0, 1.0]] * 2], [[], [[1] * 5]]]
)
def test_an_empty_list_beside_boxes_is_an_image_without_boxes(rows):
    boxes = collate([(IMAGE, row) for row in rows])[1]
    assert [tuple(box.shape) for box in boxes] == [(len(row), 5) for row in rows]
    assert {box.dtype for box in boxes} == {torch.float32}


def test_floats_become_a_vector():
    batch = collate([(IMAGE, 0.5), (IMAGE, 1)])[1]
    assert batch.tolist() == [0.5, 1.0]
    assert batch.dtype == torch.float32


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "A batch needs at least one example."),
        ([(IMAGE, 1), IMAGE], "Example 1 of the batch is a tensor [3, 4, 6], not a tuple (input, target)"),
        ([(IMAGE, 1), (IMAGE, 1, 2)], "Example 1 of the batch is a tuple, not a tuple (input, target)"),
        ([(IMAGE, 1), (noise(0), 1)], "The input of example 1 of the batch is a Image, that of the first a tensor"),
        ([(IMAGE, 1), (IMAGE, "a")], "The target of example 1 of the batch is a str"),
        ([(IMAGE, 1), (IMAGE, None)], "The target of example 1 of the batch is None"),
        ([(IMAGE, None), (IMAGE, 1)], "The target of example 0 of the batch is None"),
        ([(IMAGE, object())] * 2, "The target of example 0 of the batch is a object"),
        ([(object(), 1)] * 2, "The input of example 0 of the batch is a object"),
        ([({"a": IMAGE}, 1), ({"b": IMAGE}, 1)], "The input of example 1 of the batch has the keys ['b']"),
        ([((IMAGE, IMAGE), 1), ((IMAGE,), 1)], "The input of example 1 of the batch is a tuple of 1"),
        ([((IMAGE, IMAGE), 1), ((IMAGE, "t"), 1)], "The input[1] of example 1 of the batch is a str"),
    ],
)
def test_what_makes_no_batch_is_named_by_its_position(examples, message):
    with pytest.raises(DataError, match=re.escape(message)):
        collate(examples)
