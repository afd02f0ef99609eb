import copy
import pickle

import pytest
import torch
from torch import nn

from iris_hf.errors import ConfigError
from iris_hf.models.steps import as_predictor, as_trainable


class WithCriterion(nn.Linear):
    """A model in the original's manner: criterion and predictor as properties that no submodule holds."""

    def __init__(self, criterion, predictor=None):
        super().__init__(4, 3)
        self._functions = (criterion, predictor)

    criterion = property(lambda self: self._functions[0])
    predictor = property(lambda self: self._functions[1])


class WithSteps(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.criterion = nn.MSELoss()

    def training_step(self, inputs, targets):
        return {"loss": self(inputs).sum() * 0 + 5, "seen": targets}

    def prediction_step(self, inputs):
        return self(inputs) * 0 + 7


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def test_training_step_goes_before_criterion_and_prediction_step_before_forward(batch):
    model = WithSteps()
    result = as_trainable(model)(*batch)
    assert result["loss"].item() == 5
    assert result["seen"] is batch[1]
    assert (as_predictor(model)(batch[0]) == 7).all()


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.functional.cross_entropy, nn.NLLLoss()])
def test_criterion_and_forward_stand_in_for_a_training_step(batch, criterion):
    model = WithCriterion(criterion)
    inputs, targets = batch
    torch.testing.assert_close(as_trainable(model)(inputs, targets)["loss"], criterion(model(inputs), targets))


def test_class_indices_n_by_1_equal_class_indices_n(batch):
    trainable = as_trainable(WithCriterion(nn.CrossEntropyLoss()))
    inputs, targets = batch
    assert trainable(inputs, targets[:, None])["loss"] == trainable(inputs, targets)["loss"]


def test_integer_labels_serve_binary_cross_entropy(batch):
    trainable = as_trainable(WithCriterion(nn.BCEWithLogitsLoss()))
    labels = torch.randint(0, 2, (6, 3))
    assert trainable(batch[0], labels)["loss"] == trainable(batch[0], labels.float())["loss"]


def test_targets_reach_any_other_criterion_untouched(batch):
    seen = []
    trainable = as_trainable(WithCriterion(lambda outputs, targets: seen.append(targets) or outputs.sum()))
    targets = batch[1][:, None]
    trainable(batch[0], targets)
    assert seen[0] is targets


def test_prediction_falls_back_to_predictor_then_forward(batch):
    model = WithCriterion(None, nn.Softmax(1))
    torch.testing.assert_close(as_predictor(model)(batch[0]), model(batch[0]).softmax(1))
    plain = WithCriterion(None)
    torch.testing.assert_close(as_predictor(plain)(batch[0]), plain(batch[0]))


def test_a_loose_criterion_moves_to_the_device_and_is_trained_once(batch):
    criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
    criterion.scale = nn.Parameter(torch.ones(1))
    trainable = as_trainable(WithCriterion(criterion))
    assert {n for n, _ in trainable.named_parameters()} == {"model.weight", "model.bias", "criterion.scale"}
    trainable.to("meta")
    assert criterion.weight.device.type == "meta"


def test_a_criterion_that_the_model_holds_is_not_registered_twice():
    model = WithSteps()
    model.criterion = nn.CrossEntropyLoss(weight=torch.ones(3))
    model.training_step = None
    assert set(as_trainable(model).state_dict()) == {"model.weight", "model.bias", "model.criterion.weight"}


def test_wrapping_never_copies_and_survives_pickle_and_deepcopy(batch):
    model = WithSteps()
    trainable = as_trainable(model)
    assert trainable.model is model
    assert as_predictor(model).model is model
    for twin in (copy.deepcopy(trainable), pickle.loads(pickle.dumps(trainable))):
        assert twin(*batch)["loss"] == 5
        assert twin.model is not model


def test_a_model_without_any_step_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"Linear cannot be trained.*training_step.*criterion.*append_classifier"):
        as_trainable(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"Module has no forward"):
        as_predictor(nn.Module())
    with pytest.raises(ConfigError, match=r"must be a torch.nn.Module, got int"):
        as_trainable(3)


@pytest.mark.parametrize(
    ("returned", "described"),
    [
        (torch.ones(()), r"a tensor \(\)"),
        ({"los": 1}, r"a dict with \{'los': 1\}"),
        ({"loss": torch.ones(2)}, r"\(2,\)"),
    ],
)
def test_a_step_that_returns_no_scalar_loss_is_refused(batch, returned, described):
    model = WithSteps()
    model.training_step = lambda inputs, targets: returned
    with pytest.raises(ConfigError, match=f"WithSteps.training_step must return .*got .*{described}"):
        as_trainable(model)(*batch)
