"""The tasks by name, and the options of a run.

A data set of one's own: a module beside these with the names that tasks/p3.py has, and a line in TASKS.

    FOLDER, MODEL, METRIC, DEFAULTS  where the miniature's files lie; the metric; options by size of model
    check(args)                      InputError for options that don't go together
    build(args), restore(args, RUN)  the model at the start of a run; as a finished run left it
    save(hyper, tensors, …)          what training leaves behind
    batches(args, hyper, formatter)  (seed, numbers of rows) -> data.Batch
    load(args, formatter, split)     the tasks to train on ("train") and the held-out ones ("test")

Text has an `evaluate` of its own, prefix tuning a `start` and a `prefix_of`.
"""

import argparse
import json
import math
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from llama import InputError, read_config, reading
from tasks import p3, prefix, sni, symbol, text

TASKS = {"p3": p3, "sni": sni, "symbol": symbol, "hyperpretrain": text, "prefix": prefix}

TINY = Path(__file__).parents[1] / "tiny"
TINY_WIDTH = 512  # models narrower than this get the miniature's defaults
COMMON = {  # defaults of all tasks; the others are in tasks/*.py
    "method": "hyper", "gists": 16, "context": 1024, "query_length": 384, "instruction_downstream": False, "fuse_instruction": False,
    "words": None, "quantize": False, "dtype": None, "device": None, "seed": 0, "downstream": "frozen", "init": None, "run": None,
    "rank": 8, "alpha": 16, "accumulate": 1, "checkpoint_activations": False, "measure": 0, "save_every": 100,
    "controls": True, "limit": None, "score": "sum", "eval_batch_size": 16, "average": None, "concat": None,
}  # fmt: skip
MOVABLE = {"model", "data", "device", "dtype"}  # the same model may lie elsewhere later
EVALUATION = {"controls", "sets", "limit", "score", "eval_batch_size", "average", "concat"}


class Parser(argparse.ArgumentParser):
    """Keeps only what was typed. Its errors are one line, like all others."""

    def __init__(self, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, argument_default=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_options(parser: Parser) -> None:
    """What a run needs to know, in training and in evaluation."""
    add = parser.add_argument
    add("--task", choices=list(TASKS), help="P3, Super-NaturalInstructions, symbol tuning, compression hyperpretraining, or prefix tuning")
    add("--model", metavar="DIR", help="checkpoint: a Hugging Face or Meta folder (default: a tiny one)")
    add("--data", metavar="DIR", help="the task's data (default: the miniature's)")
    add("--method", choices=["hyper", "fewshot", "zeroshot"], help="HyperLlama; a language model with the examples in context; the same without examples")
    add("--gists", type=positive, help="gist tokens (16)")
    add("--shots", type=positive, help="examples: 16 of p3, the first 2 of sni, 4 per class of symbol (in training 2 to 10)")
    add("--context", type=positive, help="most tokens of examples and gists (1024)")
    add("--query-length", type=positive, help="most tokens of a query with its target (384)")
    add("--instruction-downstream", action="store_true", help="sni: the definition also in the query (the paper's I)")
    add("--fuse-instruction", action="store_true",
        help="sni: the definition's own keys and values stay in the prefix beside the gists (HINT)")  # fmt: skip
    add("--words", metavar="FILE", help="symbol: words to use as labels (default: the tokenizer's whole words)")
    add("--quantize", action="store_true", help="hold the base in NF4")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--seed", type=int)
    # How to evaluate: these may differ between a run and its later evaluation (EVALUATION).
    add("--controls", action=argparse.BooleanOptionalAction,
        help="also without a prefix, with another task's, with mean-pooled keys and values, with fewer shots")  # fmt: skip
    add("--sets", type=positive, help="draws of examples, for mean and standard deviation")
    add("--limit", type=positive, help="rows of a held-out task to score (default: all)")
    add("--average", type=positive, metavar="N", help="p3: average the gists of N sets of examples")
    add("--concat", type=positive, metavar="N", help="p3: the gists of N sets of examples side by side")
    add("--score", choices=["sum", "mean"], help="of an option's token log-probabilities (sum)")
    add("--eval-batch-size", type=positive, help="queries scored at a time (16)")


def settle(typed: dict, run: dict | None = None) -> argparse.Namespace:
    """The options of a run: the task's defaults for this size of model, then the run's own, then what was typed."""
    own = (run or {}) | typed
    if "task" not in own:
        raise InputError("--task is required")
    task = TASKS[own["task"]]
    folders = {"model": str(TINY / task.MODEL), "data": str(TINY / task.FOLDER)}
    size = "tiny" if read_config(Path((folders | own)["model"])).width < TINY_WIDTH else "large"
    args = argparse.Namespace(**COMMON | folders | task.DEFAULTS[size] | own)
    check_options(args, task)
    return args


def check_options(args: argparse.Namespace, task: ModuleType) -> None:
    """InputError for options that exclude each other."""
    for names, tasks in {"instruction_downstream fuse_instruction": "sni", "average concat": "p3", "words": "symbol", "init run": "prefix"}.items():
        if args.task != tasks and any(getattr(args, name) for name in names.split()):
            options = " and ".join("--" + name.replace("_", "-") for name in names.split())
            raise InputError(f"{options} {'belong' if ' ' in names else 'belongs'} to --task {tasks}")
    if args.average and args.concat:
        raise InputError("--average and --concat exclude each other")
    if args.downstream != "frozen" and args.method != "hyper":
        raise InputError(f"--downstream {args.downstream} belongs to --method hyper")
    if args.measure < 0:
        raise InputError("--measure counts the times that held-out tasks are scored")
    for name in ("lr", "gist_lr"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    task.check(args)


def read_args(folder: Path) -> dict:
    """The arguments of a run."""
    with reading(folder / "args.json", "not what a run writes"):
        if not (folder / "args.json").exists():
            raise InputError(f"{folder}: not the folder of a run (no args.json)")
        args = json.loads((folder / "args.json").read_text())
        if not {"task", "method", "model", "data"} <= args.keys():
            raise ValueError("it lacks the arguments of a run")
        return args
