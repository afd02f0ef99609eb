"""One rank of a job under torchrun."""

import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "other_tasks"))

from iris_hf.cli import main

rank = os.environ["RANK"]
arguments = sys.argv[1:]
if arguments[0] == "--break-rank":
    import iris_hf.irisml.ranks as ranks
    from iris_hf.engine.plugins.heartbeat import Heartbeat

    def on_train_start(self: Heartbeat, state: object) -> None:
        raise RuntimeError("broken on this rank only")

    ranks._FAILURE_WAIT = timedelta(seconds=3)
    if arguments[1] == rank:
        Heartbeat.on_train_start = on_train_start
    arguments = arguments[2:]
if arguments[0] == "--twice":  # a script may run a job and go on
    arguments = arguments[1:]
    assert main(arguments) == 0
code = main(arguments)
os.write(1, f"rank {rank} exits {code}\n".encode())
sys.stderr.flush()
if code and rank == "0":  # the launcher ends the others when one exits
    import time

    time.sleep(3)
sys.exit(code)
