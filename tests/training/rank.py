"""Run by run_ranks: trains the tiny model as the JSON on the command line says; rank 0 saves what came out."""

import json
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tiny import Net, NormNet, Tensors, noisy, train_tiny

import iris_hf


class Grows(NormNet):
    """Has a buffer of another length on each rank, and one on the second alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        rank = PartialState().process_index
        self.register_buffer("cache", torch.full((2 + rank,), rank))
        if rank == 1:
            self.register_buffer("late", torch.ones(1))
        return super().forward(images)


if __name__ == "__main__":
    out, *runs = sys.argv[1:]
    results = []
    for run in map(json.loads, runs):
        if run.pop("noisy", False):
            run["train_transform"] = noisy
        if "val_examples" in run:
            run["val_dataset"] = Tensors(run.pop("val_examples"), seed=1)
        weights, recorder = train_tiny(**run)
        results.append({"weights": weights, **vars(recorder)})
    norm = iris_hf.train(Grows(), Tensors(32), None, Tensors(8), num_epochs=2, batch_size=4, random_seed=0).model
    buffers = {name: buffer.tolist() for name, buffer in norm.named_buffers()}
    grown = gather_object([{name: buffers.pop(name) for name in ("cache", "late") if name in buffers}])
    everywhere = gather_object([[*buffers.values()]])
    refused = []
    for unequal in (
        lambda examples: iris_hf.train(Net(), examples, None, num_epochs=1),
        lambda examples: iris_hf.predict(examples, Net(), num_dataloader_workers=0),
    ):
        try:
            unequal(Tensors(48 + 16 * PartialState().process_index))
        except iris_hf.ConfigError as error:
            refused.append(str(error))
    refused_everywhere = gather_object([refused])
    result = iris_hf.predict(Tensors(13), Net(), batch_size=2, num_dataloader_workers=0)
    results.append({"refused": refused_everywhere})
    results.append({"predictions": result.predictions, "targets": result.targets})
    results.append({"buffers": everywhere, "grown": grown})
    if PartialState().is_main_process:
        torch.save(results, out)
