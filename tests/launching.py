"""Real launchers for tests: torchrun with gloo on this machine's CPU, and examples under `accelerate launch`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import PIL.Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TIMEOUT = 1500
"""Seconds that an example may take, some times what it takes on an idle machine."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of this process, outside any launcher and with the project importable."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), inherited.get("PYTHONPATH", "")])
    return {**inherited, "PYTHONPATH": path, **changes}


def run_python(*arguments: str, timeout: float = 300, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the tests' Python in that environment."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(**changes),
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


def run_ranks(
    num_processes: int, script: str, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a script on several ranks, as torchrun does, in half its time: see forked_ranks.py."""
    forked = str(ROOT / "tests" / "forked_ranks.py")
    return run_python(forked, str(num_processes), script, *arguments, timeout=timeout, OMP_NUM_THREADS="1")


def launch(name: str, *arguments: str, folder: Path) -> str:
    """Run an example under `accelerate launch` in an empty folder and return what it printed."""
    launcher = str(Path(sys.executable).with_name("accelerate"))
    cache = {"HF_HOME": str(folder / "hf"), "MPLCONFIGDIR": str(folder / "mpl")}
    script = f"import os, sys; os.chdir({str(folder)!r}); os.execv({launcher!r}, [{launcher!r}, *sys.argv[1:]])"
    done = run_python("-c", script, "launch", str(EXAMPLES / name), *arguments, timeout=TIMEOUT, **cache)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    """Return the number that follows a pattern in what was printed."""
    found = re.search(pattern + r" (\d\.\d+)", text)
    assert found, text
    return float(found.group(1))


def is_picture(path: Path) -> bool:
    """Whether a file is a picture with something on it."""
    with PIL.Image.open(path) as picture:
        return picture.width > 600 and len(picture.convert("L").getcolors() or []) > 20
