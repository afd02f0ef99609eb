"""Gradients of a gradient cache, and what they have to be, for several files of tests."""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from iris_hf.engine.plugins import PluginList
from iris_hf.engine.rng import seed_generators
from iris_hf.models.steps import as_cacheable
from iris_hf.training.config import CacheConfig
from iris_hf.training.gradient_cache import CachedPass
from iris_hf.training.sub_batches import split


def make_pass(model: nn.Module, size: int, **options: Any) -> CachedPass:
    settings = {"num_kept_graphs": 0, "memory_budget_in_mb": None, "check_replay": True, **options}
    module = as_cacheable(model)
    accelerator = Accelerator(cpu=True)
    return CachedPass(module, module, accelerator, PluginList([]), config=CacheConfig(sub_batch_size=size, **settings))


def cached_gradients(
    model: nn.Module, inputs: Any, targets: Any, size: int, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same as `full_batch_gradients`, with a cache."""
    model = copy.deepcopy(model)
    result = make_pass(model, size, **options).backward(inputs, targets, divisor=1, synchronise=True)
    return result["loss"], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], **tolerance) -> None:
    torch.testing.assert_close(got[0], wanted[0], **tolerance)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(got[1][name], gradient, **tolerance)


EXACT = {"rtol": 1e-10, "atol": 1e-13}
TOLERANCES = {"float32": {"rtol": 1e-5, "atol": 1e-6}}


def one_pass_gradients(
    model: nn.Module, inputs: Any, targets: Any, size: int, *, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with the random numbers of one pass over sub-batches, of a model that returns two features and more."""
    model = copy.deepcopy(model)
    seed_generators(seed)
    features = [model(part) for part in split(inputs, size)]
    tensors = [torch.cat([f[0] for f in features]), torch.cat([f[1] for f in features]), *features[0][2:]]
    loss = model.criterion(tensors, targets)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
