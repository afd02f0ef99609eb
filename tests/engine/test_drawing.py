"""Pictures of examples: what is right or wrong, and where, can be seen in them; other data is told apart."""

from typing import Any

import numpy as np
import pytest
import torch

from iris_hf.engine.drawing import draw_examples, split_images

FIRST, SECOND = (31, 119, 180), (255, 127, 14)
BLACK = torch.zeros(3, 40, 40)


def count(picture: Any, colour: tuple[int, int, int]) -> int:
    return int((picture == np.array(colour)).all(-1).sum())


@pytest.mark.parametrize(
    ("targets", "right", "wrong"),
    [
        (torch.tensor([1, 0]), torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([[0.9, 0.1], [0.2, 0.8]])),
        (torch.tensor([[1], [0]]), torch.tensor([[-3.0, 2.0], [5.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 7.0]])),
        ([1, 0], torch.tensor([1, 0]), torch.tensor([0, 1])),
        (torch.tensor([[1, 0], [0, 0]]), torch.tensor([[0.6, 0.4], [0, 0.2]]), torch.tensor([[0.4, 0], [0, 0.9]])),
        (torch.tensor([[1], [0]]), torch.tensor([[4.0], [-4.0]]), torch.tensor([[-4.0], [4.0]])),
    ],
    ids=["classes", "classes [N, 1] and logits", "predicted classes", "labels", "one label"],
)
def test_classes_and_labels_are_green_where_they_are_right(targets: Any, right: Any, wrong: Any) -> None:
    for predictions, sign in ((right, 1), (wrong, -1)):
        picture: Any = draw_examples([BLACK, BLACK], targets, predictions, ["cat", "dog"])
        greenness = sign * (picture[..., 1].astype(int) - picture[..., 0])
        assert (greenness > 60).sum() > 20
        assert (greenness < 0).sum() == 0


def test_boxes_are_drawn_where_they_are_annotated_and_predicted() -> None:
    target = torch.tensor([[0, 0.25, 0.5, 0.75, 1.0]])
    unsure = [1, 0.1, 0.0, 0.0, 1.0, 1.0]
    predictions = [torch.tensor([[0, 0.9, 0.25, 0.5, 0.75, 1.0], unsure]), torch.tensor([unsure])]
    picture = draw_examples([BLACK, BLACK], [target, torch.zeros(0, 5)], predictions)
    assert picture is not None
    rows, columns = np.nonzero((picture == np.array(FIRST)).all(-1))
    width = (picture.shape[1] - 6) // 2 if picture.shape[1] < 400 else (picture.shape[1] - 18) // 4
    annotated, predicted = columns < width, (columns >= width) & (columns < 2 * width + 6)
    for side, offset in ((annotated, 0), (predicted, width + 6)):
        assert columns[side].min() - offset == pytest.approx(0.25 * width, abs=2)
        assert columns[side].max() - offset == pytest.approx(0.75 * width, abs=2)
        assert rows[side].min() == pytest.approx(0.5 * width, abs=2)
    assert count(picture, SECOND) == 0  # too unsure


def test_masks_lie_over_the_image_in_colours_of_their_classes() -> None:
    mask = torch.zeros(2, 40, 40)
    mask[0, :20], mask[1, 20:, :20] = 1, 1  # the last quarter has no class
    picture = draw_examples([BLACK], [mask], mask[None])
    assert picture is not None
    shown = [tuple(round(0.6 * channel) for channel in colour) for colour in (FIRST, SECOND)]
    half, quarter = (
        max(count(picture, (r + d, g + e, b + f)) for d in (-1, 0) for e in (-1, 0) for f in (-1, 0))
        for r, g, b in shown
    )
    assert half == pytest.approx(2 * quarter, rel=0.05)


def test_images_of_any_size_colour_and_range_are_drawn() -> None:
    images = [torch.rand(1, 5, 9), torch.rand(3, 300, 7), torch.randn(3, 4, 4) * 50, torch.full((3, 2, 2), torch.nan)]
    picture = draw_examples(images, [0, 1, 2, 3], torch.rand(4, 4), ["a name that is much longer than a tile is wide"])
    assert picture is not None
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3


def test_what_is_not_finite_or_empty_is_left_out_and_the_rest_is_drawn() -> None:
    box, nan, inf = [0, 0.2, 0.2, 0.8, 0.8], float("nan"), float("inf")
    found = [0, 0.9, *box[1:]]
    expected = draw_examples([BLACK], [torch.tensor([box])], [torch.tensor([found])])
    targets = torch.tensor([box, [0, nan, 0.2, 0.8, 0.8], [nan, 0, 0, 1, 1]])
    predictions = torch.tensor([[0, 0.9, 0, 0, inf, 1], found, [0, nan, 0, 0, 1, 1], [0, inf, 0, 0, 1, 1]])
    assert np.array_equal(draw_examples([BLACK], [targets], [predictions]), expected)
    assert np.array_equal(draw_examples([torch.zeros(3, 0, 9), BLACK], [targets] * 2, [predictions] * 2), expected)
    assert draw_examples([torch.zeros(3, 4, 0)], [0], torch.rand(1, 2)) is None


def test_an_example_without_boxes_is_drawn_in_any_empty_form() -> None:
    found = torch.tensor([[0, 0.9, 0.2, 0.2, 0.8, 0.8]])
    for prediction, empty in ((found, torch.zeros(0, 6)), (torch.zeros(0), torch.zeros(0, 6))):
        picture = draw_examples([BLACK], [torch.zeros(0)], [prediction])
        expected = draw_examples([BLACK], [torch.zeros(0, 5)], [found if prediction is found else empty])
        assert picture is not None
        assert np.array_equal(picture, expected)


def test_masks_without_classes_or_pixels_leave_the_image_bare_and_boolean_ones_are_drawn() -> None:
    scores = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    bare, covered = (draw_examples([BLACK], [masks], [scores]) for masks in (torch.zeros(2, 4, 4), scores))
    for masks in (torch.zeros(0, 4, 4), torch.zeros(2, 0, 4)):
        picture = draw_examples([BLACK], [masks], [scores])
        assert picture is not None
        assert picture.shape == bare.shape
        assert not np.array_equal(picture, covered)
    first = torch.stack([scores[0] > scores[1], scores[0] <= scores[1]])
    assert np.array_equal(draw_examples([BLACK], [first], [scores]), covered)


def test_one_example_of_unknown_form_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    expected = draw_examples([BLACK, BLACK], [0, 1], torch.eye(2), ["a\nb", "c"])
    targets, predictions = [np.int64(0), "unknown", np.int64(1), 1], [*torch.eye(2)]
    predictions = [predictions[0], predictions[1], predictions[1], torch.zeros(0)]
    assert np.array_equal(draw_examples([BLACK] * 4, targets, predictions, ["a\nb", "c"]), expected)
    assert "2 of 4 examples cannot be drawn and are left out" in caplog.text


@pytest.mark.parametrize("predictions", [["a caption", "another"], torch.rand(2), torch.rand(2, 3, 4), [{}, {}]])
def test_predictions_of_other_forms_are_not_drawn(predictions: Any) -> None:
    assert draw_examples([BLACK, BLACK], torch.tensor([0, 1]), predictions) is None


@pytest.mark.parametrize("targets", [torch.tensor([0.5, 0.1]), ["a", "b"], [{}, {}]])
def test_targets_of_other_forms_are_not_drawn(targets: Any) -> None:
    assert draw_examples([BLACK, BLACK], targets, torch.rand(2, 3)) is None


@pytest.mark.parametrize(
    "inputs",
    [
        torch.rand(2, 4),
        torch.rand(2, 12, 4, 4),
        (torch.rand(2, 3, 4, 4), torch.rand(2, 7)),
        {"pixel_values": BLACK},
        [],
    ],
)
def test_inputs_that_are_no_images_are_told_apart(inputs: Any) -> None:
    assert split_images(inputs) is None
