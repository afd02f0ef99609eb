"""Run by torchrun: takes steps with a gradient cache on uneven ranks; rank 0 saves losses, gradients, all-reduces.

And what is said of parameters that have no part in a loss, and, on every rank, of what differs between ranks.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object
from pairs import DictTowers, FunctionTowers, Pairs, TwoTowers, calibrated
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from iris_hf.engine.plugins import PluginList
from iris_hf.errors import ConfigError, DataError
from iris_hf.models.steps import as_cacheable, as_trainable
from iris_hf.training.config import CacheConfig
from iris_hf.training.gradient_cache import CachedPass
from iris_hf.training.layouts import lay_out_model
from iris_hf.training.passes import PlainPass

MODELS = {
    "clip": lambda: TwoTowers("clip"),
    "unicl": lambda: TwoTowers("unicl", tied=True),
    "siglip": lambda: TwoTowers("siglip"),
    "gathered": DictTowers,
    "function": FunctionTowers,
    "temperature": calibrated,
    "evaluation": lambda: TwoTowers().eval(),
    "float32": lambda: TwoTowers(dtype=torch.float32),
}

DIVISIONS = ((1, 0), (3, 0), (3, 2), (13, 0), (50, 4))
"""Sub-batch sizes, and numbers of kept graphs."""

DIFFERENCES = ("scale", "image", "number", "targets")


def unused(accelerator: Accelerator, inputs: Any, targets: Any) -> str:
    """Take steps of a model with a layer that has no part in its loss; return what is said."""
    model = TwoTowers()
    model.unused = nn.Linear(1, 1, dtype=torch.float64)
    layout = lay_out_model(as_trainable(model), [], accelerator)
    plain = PlainPass(layout.module, layout.model, accelerator, PluginList([]))
    try:
        for _ in range(2):
            with layout.explaining():
                plain.backward(inputs, targets, divisor=1, synchronise=True)
    except ConfigError as error:
        return str(error)
    return ""


class Differs(DictTowers):
    """Features that are not alike on all ranks: a scalar of their examples, rows of another width, one more."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        features = super().forward(inputs)
        if self.what == "scale":
            return {**features, "scale": features["scale"] * features["image"].std()}
        if self.what == "image":
            return {**features, "image": nn.functional.pad(features["image"], (0, dist.get_rank()))}
        if self.what == "number":
            return {**features, **{f"more {k}": features["image"] for k in range(dist.get_rank())}}
        return features


def refused(what: str, accelerator: Accelerator, inputs: Any, targets: Tensor) -> list[str]:
    """Take a step with what differs between ranks; return what is said on each."""
    module = as_cacheable(Differs(what))
    if what == "targets":
        targets = targets[:, None].expand(-1, 1 + accelerator.process_index)
    config = CacheConfig(sub_batch_size=50, num_kept_graphs=0, memory_budget_in_mb=None, check_replay=False)
    cache = CachedPass(module, accelerator.prepare_model(module), accelerator, PluginList([]), config=config)
    said = ""
    try:
        cache.backward(inputs, targets, divisor=1, synchronise=True)
    except (ConfigError, DataError) as error:
        said = str(error)
    return gather_object([said])


def main(out: str, counts: list[int]) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    rank = accelerator.process_index
    inputs, targets = Pairs().batch(slice(sum(counts[:rank]), sum(counts[: rank + 1])))
    results: dict[Any, Any] = {}
    for name, make in MODELS.items():
        for size, kept in DIVISIONS:
            module = as_cacheable(make())
            config = CacheConfig(sub_batch_size=size, num_kept_graphs=kept, memory_budget_in_mb=None, check_replay=True)
            prepared = accelerator.prepare_model(module)
            reductions: list[int] = []

            def count(_: Any, bucket: dist.GradBucket, seen: list[int] = reductions) -> Future[Tensor]:
                seen.append(bucket.buffer().numel())
                return allreduce_hook(None, bucket)

            prepared.register_comm_hook(None, count)
            cache = CachedPass(module, prepared, accelerator, PluginList([]), config=config)
            result = cache.backward(inputs, targets, divisor=1, synchronise=True)
            gradients = {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}
            results[name, size, kept] = float(result["loss"]), gradients, len(reductions)
    module = as_trainable(MODELS["evaluation"]())
    plain = PlainPass(module, accelerator.prepare_model(module), accelerator, PluginList([]))
    result = plain.backward(inputs, targets, divisor=1, synchronise=True)
    gradients = {n: p.grad.clone() for n, p in module.model.named_parameters()}
    results["evaluation", "plain", None] = float(result["loss"]), gradients, 1
    said = unused(accelerator, inputs, targets)
    differences = {what: refused(what, accelerator, inputs, targets) for what in DIFFERENCES}
    if accelerator.is_main_process:
        torch.save((results, said, differences), out)
    accelerator.wait_for_everyone()
    os._exit(0)  # tearing down DistributedDataParallel with a hook written in Python can wait for itself


if __name__ == "__main__":
    main(sys.argv[1], [int(count) for count in sys.argv[2:]])
