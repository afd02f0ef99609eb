"""Floating-point operations of a contrastive step with the gradient cache, and of the same step in plain training.

    python benchmarks/gradient_cache_operations.py [--device cuda]

Without a device the towers lie on torch's device `meta`: the real step runs, every matrix product and convolution is
counted by torch.utils.flop_counter, and no number is computed. That is no measurement of time: what a step reads,
writes, launches and waits for is not counted. The promise: with no graph kept at most 1.35 of plain training (a forward
pass more is 4/3, and a little more since a first layer has no gradient to pass on), falling with every graph to 1.
With a device, the seconds of a step in bf16 stand beside, the median of --steps.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import Any

import timm
import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from iris_hf.engine.plugins import PluginList
from iris_hf.models.steps import as_cacheable, as_trainable
from iris_hf.training.config import CacheConfig
from iris_hf.training.gradient_cache import CachedPass
from iris_hf.training.passes import Pass, PlainPass

SIZE, LENGTH, VOCABULARY, WIDTH = 224, 77, 49408, 512
TOWERS = {"ViT-B/16": "vit_base_patch16_224", "ViT-B/16, frozen": "vit_base_patch16_224", "ResNet-50": "resnet50"}

QUESTIONS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.allclose.default,
    torch.ops.aten.equal.default,
)


class Towers(nn.Module):
    """A tower of timm's, and a text transformer as large as CLIP's."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.image_model = timm.create_model(TOWERS[name], num_classes=WIDTH)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layers = [nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, 0.0, "gelu", batch_first=True) for _ in range(12)]
        self.text_model = nn.Sequential(*layers)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        if "frozen" in name:
            self.image_model.requires_grad_(False)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        u, v = self.image_model(inputs[0]), self.text_model(self.embedding(inputs[1]))[:, -1]
        return nn.functional.normalize(u, dim=-1), nn.functional.normalize(v, dim=-1), self.logit_scale.exp()

    def criterion(self, features: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        u, v, scale = features
        logits, own = scale * u @ v.T, torch.arange(len(u), device=u.device)
        return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


class Unseen(TorchDispatchMode):
    """Answers with yes what a step asks of values that are not there: is the loss finite, are features the same?"""

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if op in QUESTIONS:
            return True
        return op(*arguments, **(options or {}))


def make_accelerator(device: torch.device) -> Accelerator:
    if device.type == "meta":
        PartialState(cpu=True).device = device
        return Accelerator()
    return Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")


def make_pass(name: str, kept: int | None, sub_batch: int, accelerator: Accelerator) -> Pass:
    """Return a pass of fresh towers; a plain one where `kept` is None."""
    with accelerator.device:
        model = Towers(name).train()
    wrap = as_trainable if kept is None else as_cacheable
    module: Any = wrap(model)
    arguments = module, accelerator.prepare_model(module), accelerator, PluginList([])
    if kept is None:
        return PlainPass(*arguments)
    config = CacheConfig(sub_batch_size=sub_batch, num_kept_graphs=kept, memory_budget_in_mb=None, check_replay=False)
    return CachedPass(*arguments, config=config)


def step(pass_: Any, batch: Any) -> None:
    inputs, targets = pass_.place(batch)
    pass_.backward(inputs, targets, divisor=1, synchronise=True)
    pass_.module.zero_grad()


def count(pass_: Any, batch: Any) -> int:
    """Return the operations of a step, as all but the first one take them: that one tries replay."""
    with Unseen() if batch[1].is_meta else nullcontext():
        step(pass_, batch)
        with FlopCounterMode(display=False) as counter:
            step(pass_, batch)
    return counter.get_total_flops()


def measure(pass_: Any, batch: Any, num_steps: int) -> float:
    """Return the seconds of a step."""
    seconds = []
    for _ in range(num_steps + 2):
        start = time.perf_counter()
        step(pass_, batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--sub-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    device = torch.device(arguments.device or "meta")
    accelerator = make_accelerator(device)
    num_parts = -(-arguments.pairs // arguments.sub_batch)
    print(f"torch {torch.__version__}, {arguments.pairs} pairs, {num_parts} sub-batches of {arguments.sub_batch}")
    print("| image tower | step | operations, 10^12 | of plain |" + " seconds | of plain |" * (device.type != "meta"))
    print("|---|---|---|---|" + "---|---|" * (device.type != "meta"))
    for name in TOWERS:
        plain = []
        for kept in (None, 0, num_parts // 4, num_parts // 2, num_parts):
            host = "meta" if device.type == "meta" else "cpu"
            images = torch.empty(arguments.pairs, 3, SIZE, SIZE, device=host).fill_(0.5)
            texts = torch.zeros(arguments.pairs, LENGTH, dtype=torch.long, device=host)
            if device.type == "cuda":
                images, texts = images.pin_memory(), texts.pin_memory()
            batch = (images, texts), torch.zeros(arguments.pairs, dtype=torch.long, device=host)
            pass_ = make_pass(name, kept, arguments.sub_batch, accelerator)
            numbers = [count(pass_, batch) / 1e12]
            if device.type != "meta":
                numbers.append(measure(pass_, batch, arguments.steps))
            plain = plain or numbers
            cells = [f"{number:.2f} | {number / of:.3f}" for number, of in zip(numbers, plain, strict=True)]
            what = "plain" if kept is None else f"cache, {kept} graphs kept" if kept else "cache"
            print(f"| {name} | {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
