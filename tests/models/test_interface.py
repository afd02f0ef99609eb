"""What every model made here promises, whatever its family."""

import copy
import pickle

import pytest
import torch

from iris_hf.errors import DataError
from iris_hf.models.image_spec import ImageSpec
from iris_hf.models.steps import as_predictor, as_trainable

from .families import FAMILIES, NAMES, make, make_batch, of_target_type

every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_models_say_what_they_are(name):
    model = make(name)
    assert model.target_type == FAMILIES[name].target_type
    assert model.num_classes == 3
    assert model.class_names == (None if name == "append_classifier" else NAMES)
    assert isinstance(model.image_spec, ImageSpec)


@every_family
def test_gradients_reach_every_parameter(name):
    model = make(name).train()
    as_trainable(model)(*make_batch(name))["loss"].backward()
    idle = FAMILIES[name].idle
    missed = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [n for n in missed if not any(part in n for part in idle)] == []
    frozen = {n.rpartition(".")[2] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen <= {"reg_scale", "up"}  # D-FINE's constants


@every_family
def test_a_few_steps_lower_the_loss(name):
    model = make(name).train()
    batch = make_batch(name, n=4)
    trainable = as_trainable(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        torch.manual_seed(2)  # the same dropout and denoising noise at every step
        loss = trainable(*batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < losses[0]


@every_family
def test_predictions_have_the_format_of_the_contract(name):
    model = make(name).eval()
    images, targets = make_batch(name)
    with torch.no_grad():
        predictions = as_predictor(model)(images)
    if model.target_type == "detection":
        assert len(predictions) == 2
        for rows in predictions:
            assert rows.shape[1] == 6
            assert set(rows[:, 0].tolist()) <= {0, 1, 2}
            assert ((rows[:, 1:] >= 0) & (rows[:, 1:] <= 1)).all()
            assert (rows[:, 4:] > rows[:, 2:4]).all()
            assert (rows[:-1, 1] >= rows[1:, 1]).all()
    elif model.target_type == "segmentation":
        assert predictions.shape == targets.shape
        assert (predictions.sum(1) == 1).all()
    else:
        assert predictions.shape == (2, 3)
        assert ((predictions >= 0) & (predictions <= 1)).all()
        if model.target_type == "multiclass":
            torch.testing.assert_close(predictions.sum(1), torch.ones(2))


@every_family
def test_copies_and_pickles_predict_the_same(name):
    model = make(name).eval()
    images, _ = make_batch(name)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        expected = model.prediction_step(images)
        for twin in twins:
            for a, b in zip(twin.prediction_step(images), expected, strict=True):
                assert torch.equal(a, b)


@every_family
def test_an_image_is_predicted_alone_as_in_its_batch(name):
    model = make(name).eval()
    images, _ = make_batch(name)
    with torch.no_grad():
        for a, b in zip(
            model.prediction_step(images), [model.prediction_step(i[None])[0] for i in images], strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", of_target_type("multiclass"))
def test_class_indices_may_have_a_second_axis(name):
    model = make(name).eval()
    images, targets = make_batch(name)
    assert torch.equal(
        model.training_step(images, targets)["loss"], model.training_step(images, targets[:, None])["loss"]
    )


@pytest.mark.parametrize("name", of_target_type("multiclass", "multilabel"))
def test_classifiers_ask_for_images_of_one_size(name):
    model = make(name)
    with pytest.raises(DataError, match=r"images of one size.*\(3, 20, 30\), \(3, 30, 20\).*create_image_transform"):
        model.prediction_step([torch.rand(3, 30, 20), torch.rand(3, 20, 30)])


@every_family
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 1, 32, 32), r"takes images \[N, 3, H, W\], got a tensor of shape \(2, 1, 32, 32\)"),
        (torch.rand(3, 32, 32), r"takes images \[N, 3, H, W\], got a tensor of shape \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"float images in \[0, 1\], got torch.uint8"),
    ],
)
def test_wrong_images_are_refused(name, images, message):
    with pytest.raises(DataError, match=message):
        make(name).prediction_step(images)


@every_family
def test_wrong_targets_are_refused(name):
    model = make(name)
    images, targets = make_batch(name)
    wrong, message = {
        "multiclass": (torch.zeros(2, 3, dtype=torch.long), r"of 2 examples must be a tensor \(2,\) or \(2, 1\)"),
        "multilabel": (torch.zeros(2, 4), r"must be a tensor \(2, 3\), got \(2, 4\)"),
        "detection": (
            [torch.zeros(1, 4), torch.zeros(1, 5)],
            r"Target 0 of the batch must be .*num_boxes, 5.*\(1, 4\)",
        ),
        "segmentation": (torch.zeros(2, 3, 5, 5), r"Mask 0 of the batch must have the shape \(3, .*got \(3, 5, 5\)"),
    }[model.target_type]
    with pytest.raises(DataError, match=message):
        model.training_step(images, wrong)
    if model.target_type in ("detection", "segmentation"):
        with pytest.raises(DataError, match="2 images and 1"):
            model.training_step(images, targets[:1])
