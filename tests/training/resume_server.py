"""Run by a test: forks runs of resume_run.py on command, so that none has to import torch again.

Every line of standard input is a command in JSON. `{"out", "arguments", "num_processes"}` starts the ranks of a run, in
a process group each, and answers with their ids; `"wait"` answers with their exit codes, once all have ended. A rank
that hangs says where, and ends.
"""

import faulthandler
import json
import os
import socket
import sys
import traceback
from typing import Any

import accelerate  # noqa: F401  # what a run would import
import resume_run

LIMIT = 200
"""Seconds that a rank may take, a hundred times what it takes on an idle machine."""


def start(out: str, arguments: dict[str, Any], num_processes: int) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes: list[int] = []
    for rank in range(num_processes):
        process = os.fork()
        if process == 0:
            os.setpgid(0, 0)
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            if num_processes > 1:
                world = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": num_processes,
                    "LOCAL_WORLD_SIZE": num_processes,
                }
                os.environ.update({name: str(value) for name, value in world.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                resume_run.main(out, arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        processes.append(process)
    return processes


if __name__ == "__main__":
    running: list[int] = []
    for line in sys.stdin:
        command = json.loads(line)
        if command == "wait":
            answer = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in running]
        else:
            answer = running = start(**command)
        print(json.dumps(answer), flush=True)
