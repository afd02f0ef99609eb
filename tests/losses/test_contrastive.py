"""The tiled losses against the naive ones, alone and on several processes."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive_examples import DIM, LABELS, NUM_PAIRS, SCALES, naive, pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import run_ranks
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from iris_hf.errors import ConfigError, DataError
from iris_hf.losses.contrastive import KINDS, contrastive_loss
from iris_hf.losses.criterion import ContrastiveCriterion

pytestmark = pytest.mark.torch_only

CASES = [case for case in itertools.product(KINDS, LABELS) if case != ("unicl", "none")]


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("tile_size", [1, 3, 1024])
@pytest.mark.parametrize(("kind", "labels"), CASES)
def test_loss_and_every_gradient_are_the_naive_ones(kind: str, labels: str, tile_size: int, scale: float) -> None:
    tensors = pairs(scale=scale)
    u, v, s, bias = tensors
    tiled = contrastive_loss(u, v, s, LABELS[labels], kind=kind, logit_bias=bias, tile_size=tile_size).loss
    expected = naive(kind, *tensors, LABELS[labels])
    torch.testing.assert_close(tiled, expected, rtol=1e-10, atol=1e-12)
    for got, wanted in zip(gradients(tiled, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "labels"), CASES)
def test_gradcheck(kind: str, labels: str) -> None:
    def loss(u: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return contrastive_loss(u, v, scale, LABELS[labels], kind=kind, logit_bias=bias, tile_size=4).loss

    assert torch.autograd.gradcheck(loss, pairs(scale=2.0))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    labels=st.lists(st.integers(-2, 5), min_size=1, max_size=20),
    tile_size=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_any_labels_and_any_tiles(kind: str, labels: list[int], tile_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = [torch.randn(len(labels), 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    tensors += [torch.tensor(1.5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y = torch.tensor(labels)
    tiled = contrastive_loss(*tensors[:3], y, kind=kind, logit_bias=tensors[3], tile_size=tile_size).loss
    expected = naive(kind, *tensors, y)
    torch.testing.assert_close(tiled, expected, rtol=1e-9, atol=1e-12)
    for got, wanted in zip(gradients(tiled, tensors), gradients(expected, tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_unicl_with_distinct_labels_is_clip() -> None:
    u, v, scale, _ = pairs()
    clip = contrastive_loss(u, v, scale, kind="clip").loss
    torch.testing.assert_close(contrastive_loss(u, v, scale, LABELS["distinct"], kind="unicl").loss, clip)


def test_float32_agrees_with_open_clip() -> None:
    u, v, scale, bias = pairs(200, 32, dtype=torch.float32)
    for ours, theirs in (
        (contrastive_loss(u, v, scale, tile_size=64).loss, ClipLoss()(u, v, scale)),
        (
            contrastive_loss(u, v, scale, kind="siglip", logit_bias=bias, tile_size=64).loss,
            SigLipLoss()(u, v, scale, bias),
        ),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        for got, wanted in zip(gradients(ours, [u, v, scale]), gradients(theirs, [u, v, scale]), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_holds_at_the_coldest_temperature(kind: str) -> None:
    labels = torch.arange(300) % 40
    tensors = pairs(300, 16, scale=100.0)
    single = [t.detach().float().requires_grad_() for t in tensors]
    ours = contrastive_loss(*single[:3], labels, kind=kind, logit_bias=single[3], tile_size=77).loss
    exact = naive(kind, *tensors, None if kind == "clip" else labels)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    for got, wanted in zip(gradients(ours, single), gradients(exact, tensors), strict=True):
        # the softmaxes do not feel a bias: its gradient is 0, up to rounding in the naive loss
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item() + 1e-12)


def test_half_precision_and_autocast_compute_in_float32() -> None:
    u, v, scale, _ = pairs(64, 16, dtype=torch.float32)
    expected = contrastive_loss(u.bfloat16().float(), v.bfloat16().float(), scale)
    with torch.autocast("cpu", torch.bfloat16):
        u16, v16 = (t.detach().bfloat16().requires_grad_() for t in (u, v))
        result = contrastive_loss(u16, v16, scale)
    assert result.loss.dtype == torch.float32
    assert torch.equal(result.loss, expected.loss)
    with torch.autocast("cpu", torch.bfloat16):
        result.loss.backward()
    assert u16.grad is not None
    assert u16.grad.dtype == torch.bfloat16


def test_r1_is_the_share_of_pairs_that_find_each_other() -> None:
    u, v, scale, _ = pairs(50, 4)
    similarities = (u @ v.T).detach()
    own = torch.arange(50)
    result = contrastive_loss(u, v, scale, tile_size=7)
    assert result.image_to_text_r1.item() == pytest.approx((similarities.argmax(1) == own).double().mean().item())
    assert result.text_to_image_r1.item() == pytest.approx((similarities.argmax(0) == own).double().mean().item())
    labels = own % 5
    found = labels[similarities.argmax(1)] == labels
    labelled = contrastive_loss(u, v, scale, labels, kind="unicl", tile_size=7)
    assert labelled.image_to_text_r1.item() == pytest.approx(found.double().mean().item())


def test_a_collapsed_model_gets_no_credit() -> None:
    u = torch.ones(8, 3)
    result = contrastive_loss(u, u, torch.tensor(1.0), tile_size=3)
    assert result.image_to_text_r1.item() == result.text_to_image_r1.item() == 1 / 8
    assert result.loss.item() == pytest.approx(math.log(8), rel=1e-6)


def test_one_pair_has_no_loss() -> None:
    u, v, scale, _ = pairs(1)
    result = contrastive_loss(u, v, scale)
    assert result.loss.item() == pytest.approx(0, abs=1e-12)
    assert all(g.abs().max() < 1e-12 for g in gradients(result.loss, [u, v, scale]))


def test_nan_reaches_the_loss() -> None:
    u, v, scale, _ = pairs()
    broken = u.detach().clone()
    broken[3, 1] = torch.nan
    for kind in KINDS:
        assert contrastive_loss(broken, v, scale, LABELS["one"], kind=kind, tile_size=4).loss.isnan()


COUNTS = {"even": (7, 6), "5 + 8": (5, 8), "one empty": (0, 13), "three": (4, 0, 9)}


@pytest.fixture(scope="module", params=COUNTS.values(), ids=COUNTS)
def on_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    out = tmp_path_factory.mktemp("ranks") / "out"
    done = run_ranks(len(request.param), str(Path(__file__).with_name("rank.py")), str(out), *map(str, request.param))
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{out}.{rank}") for rank in range(len(request.param))]


def test_ranks_together_give_the_loss_and_the_gradients_of_one(on_ranks: list[Any]) -> None:
    for kind, labels in CASES:
        tensors = pairs()
        expected = naive(kind, *tensors, LABELS[labels])
        alone = contrastive_loss(*tensors[:3], LABELS[labels], kind=kind, logit_bias=tensors[3])
        wanted = gradients(expected, tensors)
        for tile_size in (1, 3, 1024):
            ranks = [results[kind, labels, tile_size] for results, _ in on_ranks]
            for values, _, _ in ranks:
                assert values == pytest.approx([expected.item(), *(r.item() for r in alone[1:])], rel=1e-10)
            columns = list(zip(*(g for _, g, _ in ranks), strict=True))
            got = [torch.cat(columns[0]), torch.cat(columns[1]), sum(columns[2]), sum(columns[3])]
            for ours, theirs in zip(got, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_communication_does_not_depend_on_the_number_of_tiles(on_ranks: list[Any]) -> None:
    calls: dict[tuple[str, str], set[int]] = {case: set() for case in CASES}
    for (kind, labels, _), (_, _, count) in on_ranks[0][0].items():
        calls[kind, labels].add(count)
    assert all(len(counts) == 1 and max(counts) <= 9 for counts in calls.values()), calls


def test_every_rank_says_what_is_wrong(on_ranks: list[Any]) -> None:
    for _, (dimensions, empty) in on_ranks:
        assert "The features have 4, 5" in dimensions
        assert "at least one pair" in empty


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "clap"}, ConfigError, "Unknown contrastive loss 'clap'"),
        ({"tile_size": 0}, ConfigError, "tile_size must be at least 1, got 0"),
        ({"image_features": torch.rand(4, 5)}, DataError, r"image_features \[4, 5\] and text_features \[13, 5\]"),
        ({"image_features": torch.rand(13, 6)}, DataError, r"\[13, 6\].*Projections make dimensions equal"),
        ({"image_features": torch.ones(13, 5, dtype=torch.long)}, DataError, "image_features must be floats"),
        ({"kind": "unicl"}, DataError, "unicl needs the label of every pair"),
        ({"kind": "unicl", "labels": torch.rand(13)}, DataError, "Labels must be integers"),
        ({"kind": "unicl", "labels": torch.zeros(3, dtype=torch.long)}, DataError, r"labels of 13 pairs.*got \[3\]"),
        ({"logit_scale": torch.ones(2)}, DataError, r"logit_scale must be a tensor of one element, got \[2\]"),
        ({"logit_bias": 1.0}, DataError, "logit_bias must be a tensor of one element, got float"),
    ],
)
def test_errors_name_the_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    u, v, scale, _ = pairs()
    arguments = {"image_features": u, "text_features": v, "logit_scale": scale, **change}
    with pytest.raises(error, match=message):
        contrastive_loss(**arguments)


def test_no_pairs_are_an_error() -> None:
    with pytest.raises(DataError, match="at least one pair"):
        contrastive_loss(torch.rand(0, DIM), torch.rand(0, DIM), torch.tensor(1.0))


def test_criterion_takes_what_models_return() -> None:
    u, v, scale, bias = pairs()
    measured = ContrastiveCriterion("siglip", tile_size=4).measure((u, v, scale, bias))
    assert measured["loss"].item() == pytest.approx(naive("siglip", u, v, scale, bias, None).item())
    assert measured["temperature"].item() == pytest.approx(1 / 14.3)
    assert ContrastiveCriterion("siglip")((u, v, scale, bias)).item() == pytest.approx(measured["loss"].item())
    labels = LABELS["duplicates"].reshape(NUM_PAIRS, 1)
    unicl = ContrastiveCriterion("unicl")((u, v, scale), labels)
    assert unicl.item() == pytest.approx(naive("unicl", u, v, scale, bias, labels).item())
