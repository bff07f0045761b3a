"""Commands in processes of their own, as forks of one process that has imported torch: no interpreter starts.

The server never computes a tensor, so no thread pool is lost in a fork. A command can be killed at its n-th
write: every replaced file is two moments (before and after it takes its place), every line of a log is one.
"""

import atexit
import contextlib
import functools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def arguments(*argv) -> list[str]:
    """The words of a command: a string is divided at spaces; a path or an item of a list is one word."""
    words = []
    for part in argv:
        if isinstance(part, list):
            words += map(str, part)
        else:
            words += part.split() if isinstance(part, str) else [str(part)]
    return words


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    # What each fork would import otherwise: an optimizer, its state, sharding, the curve, the chapters.
    import torch._dynamo  # noqa: F401
    import torch.distributed.checkpoint.state_dict  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401

    import eval
    import run
    import train  # noqa: F401

    with contextlib.suppress(ImportError):
        import matplotlib.figure  # noqa: F401
    run.all_options()
    eval.MAX_NEW_TOKENS = 16  # (untrained models never end an answer)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(wait_for(request["wait"]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(child(**request))
        print(pid, flush=True)


def wait_for(pid: int) -> int:
    """Its exit status. What doesn't end is killed, so that a test fails rather than hangs."""
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def child(module: str, argv: list[str], env: dict[str, str], log: str, kill_at: int, most_bytes: int) -> int:
    os.environ.update(env, CUDA_VISIBLE_DEVICES="")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import importlib

    import torch

    import run

    torch.set_num_threads(1)
    sys.argv = [module, *argv]
    if kill_at:
        kill_at_write(kill_at)
    if most_bytes:  # of a file: stands for a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    status = 0
    try:
        run.run_command(importlib.import_module(module).main)
    except SystemExit as stop:
        status = stop.code
    except BaseException:  # as the interpreter would end
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    return status


def kill_at_write(n: int) -> None:
    """SIGKILL at the n-th moment at which something is written."""
    import builtins

    moments = iter(range(1, n + 1))
    replace = os.replace
    print_line = builtins.print

    def moment() -> None:
        if next(moments, n) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def replace_and_die(source, target):
        moment()  # the partial file is complete
        replace(source, target)
        moment()  # it has taken its place

    def print_and_die(*args, file=None, **options):
        if file is not None and file not in (sys.stdout, sys.stderr):
            moment()
            print_line(str(args[0])[:20], end="", file=file, flush=True)  # torn
            moment()
            print_line(str(args[0])[20:], file=file, flush=True)
        else:
            print_line(*args, file=file, **options)

    os.replace = replace_and_die
    builtins.print = print_and_die


@functools.cache
def server() -> subprocess.Popen:
    """Started at the first command; ends with the tests, and is waited for: its time counts as theirs."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
    assert process.stdout.readline() == "ready\n"
    atexit.register(process.communicate)
    return process


def ask(**request) -> int:
    server().stdin.write(json.dumps(request) + "\n")
    server().stdin.flush()
    return int(server().stdout.readline())


def launch(log, *argv, module="train", processes=1, kill_at=0, most_bytes=0) -> list[int]:
    """Start a command, as torchrun would for several processes; returns their process ids."""
    shared = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pids = []
    for rank in range(processes):
        env = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if shared else {})
        command = {"module": module, "argv": arguments(*argv), "env": env, "log": str(log)}
        pids.append(ask(**command, kill_at=kill_at, most_bytes=most_bytes))
    return pids


def wait(pids: list[int]) -> list[int]:
    """Exit statuses; −9 where a process was killed. As under torchrun, none outlives the first that fails."""
    statuses = []
    for pid in pids:
        if any(statuses):
            os.kill(pid, signal.SIGKILL)
        statuses.append(ask(wait=pid))
    return statuses


if __name__ == "__main__":
    serve()
