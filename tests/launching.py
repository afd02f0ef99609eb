"""Real launchers for tests: torchrun with gloo on this machine's CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(*arguments: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the tests' Python, with the project importable, outside any launcher."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), inherited.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def torchrun(num_processes: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m module`, under torchrun."""
    return run_python(
        *("-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *arguments,
        timeout=timeout,
        OMP_NUM_THREADS="1",
    )
