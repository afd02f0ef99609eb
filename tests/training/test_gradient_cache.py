"""The gradient cache gives the gradients of the whole batch, whatever its inputs, sub-batches and kept graphs."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from cache_rank import DIVISIONS, MODELS
from cached import EXACT, TOLERANCES, assert_equal, cached_gradients, make_pass
from pairs import Pairs, TwoTowers, full_batch_gradients
from torch import Tensor, nn

import iris_hf
from iris_hf.engine.rng import seed_generators
from iris_hf.training.sub_batches import split

pytestmark = pytest.mark.torch_only


@pytest.mark.parametrize(("size", "kept"), DIVISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_that_of_the_whole_batch(name: str, size: int, kept: int) -> None:
    model, (inputs, targets) = MODELS[name](), Pairs().batch()
    wanted = full_batch_gradients(model, inputs, targets)
    got = cached_gradients(model, inputs, targets, size, num_kept_graphs=kept)
    assert_equal(got, wanted, **TOLERANCES.get(name, EXACT))


@pytest.mark.parametrize("size", [3, 5, 13])
def test_a_scale_of_one_axis_is_a_scalar(size: int) -> None:
    model, (inputs, targets) = TwoTowers(), Pairs().batch()
    model.logit_scale = nn.Parameter(model.logit_scale.data[None])
    wanted = full_batch_gradients(model, inputs, targets)
    assert_equal(cached_gradients(model, inputs, targets, size), wanted, **EXACT)


@pytest.mark.parametrize("kept", [2, 50])
def test_kept_graphs_change_no_bit(kept: int) -> None:
    model, (inputs, targets) = TwoTowers(dropout=0.3, dtype=torch.float32), Pairs(dtype=torch.float32).batch()
    seed_generators(1)
    wanted = cached_gradients(model, inputs, targets, 3)
    seed_generators(1)
    assert_equal(cached_gradients(model, inputs, targets, 3, num_kept_graphs=kept), wanted, rtol=0, atol=0)


def test_parts_of_an_input_in_a_list_are_an_error() -> None:
    (images, texts), targets = Pairs().batch()
    with pytest.raises(iris_hf.DataError, match=r"2 inputs for 13 targets. .*as a tuple or a dict"):
        make_pass(TwoTowers(), 4).backward([images, texts], targets, divisor=1, synchronise=True)


class Lists(nn.Module):
    """Takes dicts, and lists of images of different sizes; returns one feature tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4, dtype=torch.float64)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        means = torch.stack([image.mean((1, 2)) for image in inputs["images"]])
        weights = inputs["weights"]["by_example"] * torch.from_numpy(inputs["array"])
        return self.layer(means) * weights[:, None] * inputs["weights"]["for_all"]


def test_dicts_and_images_of_different_sizes_are_divided_by_example() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "images": [torch.rand(3, 4 + i, 9 - i, generator=generator, dtype=torch.float64) for i in range(7)],
        "weights": {"by_example": torch.rand(7, generator=generator, dtype=torch.float64), "for_all": torch.tensor(2)},
        "array": np.linspace(0.5, 1, 7),
        "note": "goes along",
    }
    targets = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    model = Lists()
    wanted = full_batch_gradients(model, inputs, targets)
    assert_equal(cached_gradients(model, inputs, targets, 2), wanted, **EXACT)
    assert [len(part["images"]) for part in split(inputs, 3)] == [3, 3, 1]


def test_an_overflow_in_half_precision_skips_the_step() -> None:
    """A scaler works on a CPU too, on float32: with a scale so large that gradients overflow, and on a NaN loss."""
    inputs, targets = Pairs(dtype=torch.float32).batch()
    moved: list[list[bool]] = []
    for scale, factor in ((3e38, 1.0), (8.0, 1.0), (8.0, torch.inf)):
        model = TwoTowers(dtype=torch.float32)
        model.logit_scale.data.fill_(4.5)  # large gradients
        cache = make_pass(model, 4, check_replay=False)
        scaler = cache.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wanted = full_batch_gradients(model, inputs, targets)
        before = copy.deepcopy(model.state_dict())
        cache.backward((inputs[0] * factor, inputs[1]), targets, divisor=1, synchronise=True)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved.append([not torch.equal(before[name], value) for name, value in model.state_dict().items()])
        if all(moved[-1]):
            for name, gradient in wanted[1].items():
                torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-5)
        else:
            assert scaler.get_scale() == pytest.approx(scale / 2)
    assert [set(step) for step in moved] == [{False}, {True}, {False}]
