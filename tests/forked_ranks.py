"""What torchrun does, by torch's own agent, but its ranks are forked from a process that has imported torch already.

    python tests/forked_ranks.py NUM_PROCESSES SCRIPT [ARGUMENT ...]

Half of a short test would be imports otherwise. They are processes of their own all the same, and talk through gloo.
"""

import runpy
import signal
import sys
from pathlib import Path

import accelerate  # noqa: F401  # what a rank would import
import torch._dynamo  # noqa: F401  # what the first optimizer of a process imports
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run(script: str, arguments: list[str]) -> None:
    """Be a rank."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the agent's
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    num_processes, script, *arguments = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(num_processes),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        run_id="tests",
        max_restarts=0,
    )
    elastic_launch(config, run)(script, arguments)
