"""A task is a file of this folder, found by its name: --task p3 is p3.py. sample.py is one to copy.

    FOLDER, MODEL    the miniature's data and checkpoint for it, in tiny/
    METRIC           "accuracy" (choices are ranked) or "rougeL" (answers are generated)
    DEFAULTS         options by size of model: {"tiny": {…}, "large": {…}}
    load(args, formatter, split)   its tasks (data.Task) to train on ("train"), or the held-out ones ("test")

What a file leaves out is taken from defaults.py, as score(answer, query).
"""

from functools import cache
from importlib import import_module
from types import SimpleNamespace

NOT_TASKS = {"defaults", "rows"}


@cache
def find(name: str) -> SimpleNamespace:
    """The task of this name: its file over defaults.py."""
    own = {} if name in NOT_TASKS else vars(import_module(f"tasks.{name}"))
    return SimpleNamespace(**vars(import_module("tasks.defaults")) | own)
