"""The gradient cache on several processes: the gradients of one with all pairs, in one all-reduce."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_rank import MODELS
from cached import EXACT, TOLERANCES, assert_equal
from launching import torchrun
from pairs import Pairs, full_batch_gradients

pytestmark = pytest.mark.torch_only


COUNTS = {"5 + 8": (5, 8), "one empty": (13, 0), "three": (4, 0, 9)}


@pytest.fixture(scope="module", params=COUNTS.values(), ids=COUNTS)
def on_ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[Any, Any], str, dict[str, list[str]]]:
    out = tmp_path_factory.mktemp("cache") / "out.pt"
    script = str(Path(__file__).with_name("cache_rank.py"))
    done = torchrun(len(request.param), script, str(out), *map(str, request.param))
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def test_uneven_ranks_have_the_gradients_of_one_process_with_the_whole_batch(on_ranks: Any) -> None:
    inputs, targets = Pairs().batch()
    for (name, _, _), (loss, gradients, _) in on_ranks[0].items():
        wanted = full_batch_gradients(MODELS[name](), inputs, targets)
        assert_equal((torch.tensor(loss, dtype=wanted[0].dtype), gradients), wanted, **TOLERANCES.get(name, EXACT))


def test_gradients_are_reduced_once_per_step(on_ranks: Any) -> None:
    assert all(reductions == 1 for _, _, reductions in on_ranks[0].values())


def test_parameters_without_a_part_in_the_loss_are_explained(on_ranks: Any) -> None:
    assert "give ddp_find_unused_parameters=True, or freeze those" in on_ranks[1]


def test_what_differs_between_ranks_is_said_on_each(on_ranks: Any, request: pytest.FixtureRequest) -> None:
    counts = request.node.callspec.params["on_ranks"]
    differences = on_ranks[2]
    if sum(map(bool, counts)) > 1:
        for said in differences["scale"]:
            assert re.match("(Feature 'scale'|A feature) is a scalar from .* the same for every sub-batch, on", said)
        for said in differences["image"]:
            assert said.startswith(
                "The rows of feature 'image' have to be alike on all processes, and are [5] of torch"
            )
            assert said.endswith("Pad them to one size.")
        for said in differences["number"]:
            assert said.startswith("forward has to return the same features on every process, and returns 'image', ")
            assert re.search("'text', 'scale' on rank 0; .* 'scale', 'more 0'(, 'more 1')? on rank [12]", said)
    else:
        assert all(differences[what] == [""] * len(counts) for what in ("scale", "image", "number"))
    for said in differences["targets"]:
        assert "The rows of the targets have to be alike" in said
        assert "[1] of torch.int64 on rank 0, [2] of torch.int64 on rank 1" in said
