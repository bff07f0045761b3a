"""What is done with a finished run, or with the code: each is a command, python -m tools.NAME."""

import sys


def one_line(kind, problem, trace) -> None:
    print("interrupted", file=sys.stderr) if kind is KeyboardInterrupt else sys.__excepthook__(kind, problem, trace)


sys.excepthook = one_line  # for Ctrl-C while torch is imported; from then on, eval.run_command answers it
