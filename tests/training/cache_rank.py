"""Run by torchrun: takes steps with a gradient cache on uneven ranks; rank 0 saves losses, gradients, all-reduces."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from pairs import DictTowers, Pairs, TwoTowers
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from iris_hf.engine.plugins import PluginList
from iris_hf.models.steps import as_cacheable
from iris_hf.training.gradient_cache import CacheConfig, CachedPass

MODELS = {
    "clip": lambda: TwoTowers("clip"),
    "unicl": lambda: TwoTowers("unicl", tied=True),
    "siglip": lambda: TwoTowers("siglip"),
    "gathered": DictTowers,
}


def main(out: str, counts: list[int]) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    rank = accelerator.process_index
    inputs, targets = Pairs().batch(slice(sum(counts[:rank]), sum(counts[: rank + 1])))
    results: dict[Any, Any] = {}
    for name, make in MODELS.items():
        for size, kept in ((1, 0), (3, 0), (3, 2), (13, 0), (50, 4)):
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
    if accelerator.is_main_process:
        torch.save(results, out)
    accelerator.wait_for_everyone()
    os._exit(0)  # tearing down DistributedDataParallel with a hook written in Python can wait for itself


if __name__ == "__main__":
    main(sys.argv[1], [int(count) for count in sys.argv[2:]])
