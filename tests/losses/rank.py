"""Run by run_ranks: every rank computes the losses of its rows, and saves them, their gradients and what it sent."""

import sys

import torch
import torch.distributed as dist
from contrastive_examples import LABELS, pairs

from iris_hf.errors import DataError
from iris_hf.losses.contrastive import KINDS, contrastive_loss

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
CALLS: list[str] = []


def counted(name: str):
    function = getattr(dist, name)

    def call(*args, **kwargs):
        CALLS.append(name)
        return function(*args, **kwargs)

    return call


def main(out: str, counts: list[int]) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    results = {}
    for kind in KINDS:
        for label_name, labels in LABELS.items():
            if kind == "unicl" and labels is None:
                continue
            for tile_size in (1, 3, 1024):
                full = pairs()
                u, v = (t.detach()[own].clone().requires_grad_() for t in full[:2])
                CALLS.clear()
                result = contrastive_loss(
                    *(u, v, full[2], None if labels is None else labels[own]),
                    kind=kind,
                    logit_bias=full[3],
                    tile_size=tile_size,
                    group=dist.group.WORLD,
                )
                result.loss.backward()
                gradients = [t.grad / world for t in (u, v, full[2], full[3])]
                results[kind, label_name, tile_size] = [value.item() for value in result], gradients, len(CALLS)
    errors = []
    for wrong in (torch.rand(2, 4 + rank), torch.rand(0, 4)):  # unequal dimensions; no pair anywhere
        try:
            contrastive_loss(wrong, wrong, torch.tensor(1.0), group=dist.group.WORLD)
        except DataError as error:
            errors.append(str(error))
    torch.save((results, errors), f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], [int(count) for count in sys.argv[2:]])
