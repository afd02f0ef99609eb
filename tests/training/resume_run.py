"""Run by tests: a training that may be killed, and saves how it ended. Under torchrun or alone.

The JSON on the command line holds arguments of the task and, beside them: `cache`, whether to use a gradient cache;
`die_at`, a step at which this process kills itself; `terminate_at`, one at which it sends itself SIGTERM, in the
validation where it has one there.
"""

import json
import os
import signal
import sys
import time
from typing import Any

import torch
from pairs import Pairs, TwoTowers
from tiny import Recorder, noisy

import iris_hf


class Killer(iris_hf.Plugin):
    """Ends the process in the middle of a run."""

    def __init__(self, die_at: int | None, terminate_at: int | None) -> None:
        self.die_at, self.terminate_at = die_at, terminate_at

    def on_gradients_ready(self, state: iris_hf.TrainState) -> None:
        if state.step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, state: iris_hf.TrainState) -> None:
        if state.step % state.steps_per_epoch:
            self.on_validation_batch(state, ())

    def on_validation_batch(self, state: iris_hf.TrainState, batch: Any) -> None:
        if batch and state.step == self.terminate_at and state.is_main_process:
            print("a batch of the validation", file=sys.stderr)
            time.sleep(0.3)
        if state.step == self.terminate_at and state.accelerator.process_index == state.accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # one process gets it, all have to leave


def augmented(inputs: Any) -> Any:
    image, text = inputs
    return noisy(image), text


def main(out: str, arguments: dict[str, Any]) -> None:
    killer = Killer(arguments.pop("die_at", None), arguments.pop("terminate_at", None))
    recorder = Recorder()
    task = iris_hf.train_with_gradient_cache if arguments.pop("cache", False) else iris_hf.train
    settings = {
        "num_epochs": 3,
        "batch_size": 8,
        "base_lr": 0.01,
        "optimizer": "adamw",
        "num_dataloader_workers": 0,
        "plugins": [recorder, killer, *arguments.pop("plugins", ())],
        **arguments,
    }
    # BatchNorm's statistics differ from rank to rank between validations; dropout draws on every rank.
    random_parts = {"norm": True, "dropout": 0.3} if settings.pop("with_random_parts", True) else {}
    model = TwoTowers(dtype=torch.float32, **random_parts)
    result = task(model, Pairs(61, torch.float32), augmented, Pairs(13, torch.float32), **settings)
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save({"weights": result.model.state_dict(), **vars(recorder)}, out)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
    if torch.distributed.is_initialized():
        # Everything is written; a sharded optimizer's process group has aborted at the interpreter's end, now and then.
        torch.distributed.barrier()
        os._exit(0)
