"""How commands begin and end: one line for a mistake, Ctrl-C, several processes, tables.

The modules beside this file do something with a finished run, or with the code: each is a command, python -m tools.NAME.
"""

import sys


def one_line(kind, problem, trace) -> None:
    print("interrupted", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, problem, trace)


sys.excepthook = one_line  # for Ctrl-C while torch is imported; from then on, run_command answers it

import ctypes  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402
from contextlib import suppress  # noqa: E402
from typing import TextIO  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from llama import InputError, reading  # noqa: E402


def start_processes() -> tuple[int, int]:
    """This process's rank, and how many there are: torchrun says so in the environment."""
    if "RANK" not in os.environ:
        return 0, 1
    if not {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError("RANK is set without WORLD_SIZE, LOCAL_RANK and MASTER_ADDR: torchrun sets them all")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with reading("torchrun's environment", "doesn't describe processes"):
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return processes()


def processes() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everybodys(items: dict) -> dict:
    """The items of all processes together."""
    parts = [items] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, items)
    return {key: value for part in parts for key, value in part.items()}


def at_once(function: Callable, items: Sequence, several: bool) -> Iterator:
    """function(item) for each item, in order; if `several`, up to four at once, which share the cores (more would wait for Python)."""
    threads = torch.get_num_threads()
    workers = min(4, threads) if several else 1
    if workers == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        for future in [pool.submit(function, item) for item in items]:
            yield future.result()
    finally:  # however it ends: what has not begun never does
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def keep_memory() -> None:
    """What is freed stays with the process. Otherwise each large tensor's memory goes back to the system and is taken anew, page by page."""
    with suppress(OSError, AttributeError):  # glibc alone has this
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(option, 1 << 30)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a mistake of the user's is one line, with exit status 2 (Ctrl-C and SIGTERM: 130)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks ± shows a question mark
    if "RANK" not in os.environ:  # (once, with gloo's threads beside it, the heap was found damaged)
        keep_memory()
    torch.set_num_threads(torch.get_num_threads())  # (said aloud: until somebody does, MKL takes fewer for small products)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream(sys.stdout), Stream(sys.stderr)
    default = {kind: signal.signal(kind, interrupt) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        main()
        sys.stdout.flush()
        if sys.stdout.problem is None or isinstance(sys.stdout.problem, BrokenPipeError):  # head, for instance, has seen enough
            return
        message, status = f"error: what was to be shown is lost, stdout can't be written ({sys.stdout.problem.strerror})", 2
    except (InputError, OSError) as problem:  # OSError: a full disk, a folder taken away
        message, status = f"error: {problem}", 2
    except ImportError as problem:
        message, status = f"error: {problem} (pip install -r requirements.txt installs what is needed)", 2
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        text = str(problem).split("\n")[0]
        if type(problem) is RuntimeError and "alloc" not in text:
            raise
        message, status = f"error: out of memory; a smaller --batch-size or --eval-tokens may help ({text})", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    finally:
        for kind, handler in default.items():
            if signal.getsignal(kind) is interrupt:
                signal.signal(kind, handler)
        sys.stdout, sys.stderr = streams
    Stream(sys.stdout).flush()
    if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:  # of several processes, one speaks
        print(" ".join(message.split("\n")), file=Stream(sys.stderr))
    sys.exit(status)


def interrupt(*_) -> None:
    """Ctrl-C and SIGTERM; what follows the first one doesn't disturb the way out."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    raise KeyboardInterrupt


class Stream:
    """stdout or stderr. When it can't be written to any more, the command goes on without it."""

    def __init__(self, stream: TextIO):
        self.stream, self.problem = stream, None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.until_lost(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self.until_lost(self.stream.flush)

    def until_lost(self, do: Callable, *args):
        try:
            return do(*args)
        except OSError as problem:
            self.problem = problem
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def print_lines(lines: list[list[str]], total: bool = True) -> None:
    """A table: a rule under the first line, and above the last if that is a total."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for i, line in enumerate(lines):
        if i == 1 or total and i == len(lines) - 1:
            print("-" * (sum(widths) + 2 * len(widths) - 2))
        print(line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:])), sep="  ")
