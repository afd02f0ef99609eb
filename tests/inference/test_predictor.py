"""Prediction: one result per example, in order, whatever the model gives."""

from typing import Any

import pytest
import torch
from tiny import Net, Tensors
from torch import nn

import iris_hf


class Gives(nn.Module):
    """A model that gives, for the examples of each batch, what a function makes of their first pixel times 1000."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: torch.Tensor) -> Any:
        return self.function([int(image) for image in images])


class Numbers(torch.utils.data.Dataset):
    """`n` scalar inputs 0..n-1, with their negatives as targets."""

    def __init__(self, length: int = 5) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index), -index


class Bare(Numbers):
    def __getitem__(self, index: int) -> Any:
        return torch.tensor(index)


def predictions(function: Any, **config: Any) -> Any:
    return iris_hf.predict(Numbers(), Gives(function), batch_size=2, num_dataloader_workers=0, **config).predictions


def test_tensors_of_one_shape_are_concatenated() -> None:
    result = predictions(lambda batch: torch.tensor([[float(i), 2.0 * i] for i in batch]))
    assert torch.equal(result, torch.tensor([[i, 2.0 * i] for i in range(5)]))


def test_tensors_of_several_shapes_come_one_per_example() -> None:
    result = predictions(lambda batch: torch.full((len(batch), 1 + batch[0]), float(batch[0])))
    assert [tuple(item.shape) for item in result] == [(1,), (1,), (3,), (3,), (5,)]


def test_lists_and_lists_of_dicts_are_flattened() -> None:
    assert predictions(lambda batch: [[i] * i for i in batch]) == [[i] * i for i in range(5)]
    assert predictions(lambda batch: [{"id": i} for i in batch]) == [{"id": i} for i in range(5)]


def test_lists_of_boxes_stay_one_tensor_per_image() -> None:
    result = predictions(lambda batch: [torch.zeros(i, 6) for i in batch])
    assert [len(boxes) for boxes in result] == list(range(5))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_targets_come_along_and_bare_inputs_have_none(num_workers: int) -> None:
    model = Gives(lambda batch: torch.tensor(batch))
    result = iris_hf.predict(Numbers(), model, batch_size=2, num_dataloader_workers=num_workers)
    assert result.targets.tolist() == [0, -1, -2, -3, -4]
    bare = iris_hf.predict(Bare(), model, batch_size=2, num_dataloader_workers=num_workers)
    assert bare.predictions.tolist() == [0, 1, 2, 3, 4]
    assert bare.targets is None


def test_the_model_comes_back_as_it_was_and_runs_in_eval_mode() -> None:
    model = Net(dropout=0.5)
    model.body.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    first = iris_hf.predict(Tensors(8), model).predictions
    assert torch.equal(first, iris_hf.predict(Tensors(8), model).predictions)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())
    assert not first.requires_grad


def test_predictor_makes_probabilities_and_a_prediction_step_goes_first() -> None:
    model = Net()
    torch.testing.assert_close(iris_hf.predict(Tensors(4), model).predictions.sum(1), torch.ones(4))
    model.prediction_step = lambda images: model(images).argmax(1)
    assert iris_hf.predict(Tensors(4), model).predictions.dtype == torch.int64


def test_a_transform_may_see_the_image_alone_or_the_target_too() -> None:
    model = Gives(lambda batch: torch.tensor(batch))
    one = iris_hf.predict(Numbers(), model, lambda image: image + 1)
    assert one.predictions.tolist() == [1, 2, 3, 4, 5]
    two = iris_hf.predict(Numbers(), model, lambda image, target: (image - target, target * 2))
    assert two.predictions.tolist() == [0, 2, 4, 6, 8]
    assert two.targets.tolist() == [0, -2, -4, -6, -8]


def test_a_collate_function_of_the_caller_is_used() -> None:
    def collate(examples: list[Any]) -> tuple[Any, Any]:
        return torch.stack([image for image, _ in examples]) + 10, ["t"] * len(examples)

    model = Gives(lambda batch: torch.tensor(batch))
    result = iris_hf.predict(Numbers(), model, None, collate, batch_size=2)
    assert result.predictions.tolist() == [10, 11, 12, 13, 14]
    assert result.targets == ["t"] * 5


def test_one_prediction_per_example_or_an_error_that_counts() -> None:
    with pytest.raises(iris_hf.DataError, match=r"On the examples 0 to 1 Gives gave a Tensor of length 1.*here 2"):
        predictions(lambda batch: torch.zeros(1))
    with pytest.raises(iris_hf.DataError, match="On the examples 0 to 1 Gives gave a NoneType"):
        predictions(lambda batch: None)
    with pytest.raises(iris_hf.DataError, match="On the examples 0 to 1 Gives gave a dict"):
        predictions(lambda batch: {"logits": torch.zeros(len(batch)), "features": torch.zeros(len(batch))})
    with pytest.raises(iris_hf.DataError, match="the collate function gave a dict as targets"):
        iris_hf.predict(Numbers(), Gives(torch.tensor), None, lambda examples: (torch.zeros(len(examples)), {"y": 1}))


def test_a_predictor_outside_the_model_runs_in_eval_mode_too() -> None:
    model = Net()
    model.__dict__["predictor"] = nn.Dropout(0.5)
    del model._modules["predictor"]
    assert bool((iris_hf.predict(Tensors(32), model).predictions != 0).all())
    assert model.predictor.training


def test_a_model_that_draws_gets_numbers_that_depend_on_the_batch_alone() -> None:
    model = Gives(lambda batch: torch.rand(len(batch)))
    first = iris_hf.predict(Numbers(), model, batch_size=2).predictions
    assert len(set(first.tolist())) == 5
    assert torch.equal(first, iris_hf.predict(Numbers(), model, batch_size=2, num_dataloader_workers=0).predictions)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_example_that_fails_is_named_with_the_cause(num_workers: int) -> None:
    def fail(image: torch.Tensor) -> torch.Tensor:
        if int(image) == 3:
            raise KeyError("lost")
        return image

    with pytest.raises(iris_hf.DataError, match="Example 3: KeyError: 'lost'") as caught:
        iris_hf.predict(Numbers(), Gives(torch.tensor), fail, num_dataloader_workers=num_workers)
    assert "in fail" in "".join(caught.value.__notes__)


def test_an_error_in_the_model_says_on_which_examples() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        predictions(lambda batch: [1 // (3 - i) for i in batch])
    assert caught.value.__notes__ == ["On the examples 2 to 3."]


def test_a_collate_function_that_fails_says_so() -> None:
    with pytest.raises(iris_hf.DataError, match="The collate function: ZeroDivisionError"):
        iris_hf.predict(Numbers(), Net(), None, lambda examples: 1 / 0)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"batch_size": 0}, iris_hf.ConfigError, "batch_size must be at least 1, got 0"),
        ({"plugins": ["emma"]}, iris_hf.ConfigError, "Unknown plugin 'emma'"),
        ({"num_processes": -1}, iris_hf.ConfigError, "num_processes must be at least 1, got -1"),
        ({"num_dataloader_workers": -2}, iris_hf.ConfigError, "must not be negative, got -2"),
        ({"device": "tpu"}, iris_hf.ConfigError, "device must be 'cpu', 'cuda' or None, got 'tpu'"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        iris_hf.predict(Numbers(), Net(), **config)


def test_an_empty_dataset_and_a_model_that_is_none_are_errors() -> None:
    with pytest.raises(iris_hf.DataError, match="dataset is empty"):
        iris_hf.predict(Numbers(0), Net())
    with pytest.raises(iris_hf.ConfigError, match=r"must be a torch.nn.Module, got str"):
        iris_hf.predict(Numbers(), "resnet18")
