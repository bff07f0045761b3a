"""The tasks by name, and the options of a run.

A data set of one's own: a module beside these with the names that tasks/p3.py has, and a line in TASKS.

    FOLDER, MODEL, METRIC, DEFAULTS  where the miniature's files lie; the metric; options by size of model
    OPTIONS                          those that only this task has (WITHOUT, optional: those that mean nothing to it)
    check(args)                      InputError for options that don't go together
    score(answer, query)             percent
    build(args), restore(args, RUN)  the model at the start of a run; as a finished run left it
    save(hyper, tensors, …)          what training leaves behind
    batches(args, hyper, formatter)  (seed, numbers of rows) -> data.Batch
    load(args, formatter, split)     the tasks to train on ("train") and the held-out ones ("test")

Optional: a LAYOUT for own examples (tools.answer); `evaluate`, `shard` (text); `start`, `prefix_of` (prefix tuning);
`without_a_model` (S-NI: answers that need none).
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from data import Formatter
from gist import HyperLlama
from llama import InputError, Tokenizer, read_config, reading
from tasks import p3, prefix, sni, symbol, text

TASKS = {"p3": p3, "sni": sni, "symbol": symbol, "hyperpretrain": text, "prefix": prefix}

PROJECT = Path(__file__).resolve().parents[1]
TINY = PROJECT / "tiny"
TINY_WIDTH = 512  # models narrower than this get the miniature's defaults
COMMON = {  # defaults of all tasks; the others are in tasks/*.py
    "method": "hyper", "gists": 16, "context": 1024, "query_length": 384, "instruction_downstream": False, "fuse_instruction": False,
    "words": None, "quantize": False, "dtype": None, "device": None, "seed": 0, "downstream": "frozen", "init": None, "run": None,
    "rank": 8, "alpha": 16, "accumulate": 1, "checkpoint_activations": False, "measure": 0, "save_every": 100,
    "optimizer": "adamw", "held_out": None, "lm": 0.0, "in_order": False, "distill": 0.0, "reconstruct": 0.0, "weight_by_context": False,
    "gists_every": 0, "gists_spread": False, "emit": "kv", "controls": True, "limit": 0, "score": "sum", "eval_tokens": 8192, "average": None, "concat": None, "chain": None,
}  # fmt: skip
MOVABLE = {"model", "data", "device", "dtype"}  # the same model may lie elsewhere later
WAYS = p3.OPTIONS  # to make one prefix of several sets of examples
EVALUATION = {"controls", "sets", "limit", "score", "eval_tokens", *WAYS}


class Parser(argparse.ArgumentParser):
    """Keeps only what was typed. Its errors are one line, like all others."""

    def __init__(self, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, argument_default=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'positive ' * (least > 0)}whole number of at most 9 digits")
    return int(text)


def a_name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return text


def positive(text: str) -> int:
    return whole(text, 1)


def number(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def add_places(parser: Parser) -> None:
    """What may differ later from what a run was made with (MOVABLE)."""
    add = parser.add_argument
    add("--model", type=a_name, metavar="DIR", help="checkpoint: a Hugging Face or Meta folder (default: a tiny one)")
    add("--data", type=a_name, metavar="DIR", help="the task's data (default: the miniature's)")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    add("--device", help="default: cuda where there is one, else cpu")


def add_options(parser: Parser) -> None:
    """What a run needs to know, in training and in evaluation."""
    add = parser.add_argument
    add("--task", choices=list(TASKS), help="P3, Super-NaturalInstructions, symbol tuning, compression hyperpretraining, or prefix tuning")
    add_places(parser)
    add("--method", choices=["hyper", "fewshot", "zeroshot"], help="HyperLlama; a language model with the examples in context; the same without examples")
    add("--gists", type=positive, help="gist tokens (16)")
    add("--shots", type=positive, help="examples: 16 of p3, the first 2 of sni, 4 per class of symbol (in training 2 to 10)")
    add("--context", type=positive, help="maximum of tokens in examples and gists (1024)")
    add("--query-length", type=positive, help="maximum of tokens in a query with its target (384)")
    add("--instruction-downstream", action="store_true", help="sni: the definition also in the query (the paper's I)")
    add("--fuse-instruction", action="store_true",
        help="sni: the definition's own keys and values stay in the prefix beside the gists (HINT)")  # fmt: skip
    add("--words", type=a_name, metavar="FILE", help="symbol: words to use as labels (default: the tokenizer's whole words)")
    add("--quantize", action="store_true", help="hold the base in NF4")
    add("--seed", type=whole)
    add("--downstream", choices=["frozen", "lora", "shared"], help="the model that answers: frozen; "
        "with a LoRA set of its own (the paper's D); with the hypernetwork's set (Mu et al.'s gisting)")  # fmt: skip
    add("--init", choices=prefix.INITS, help="prefix: what a prefix starts from: gists of --run; a prefix tuned on the training "
        "tasks; random numbers; an MLP; the examples' first tokens; slots that pass through the layers")  # fmt: skip
    add("--run", type=a_name, metavar="DIR", help="a finished run to start from (--init hyper: its hypernetwork)")
    add("--rank", type=positive, help="LoRA rank (8)")
    add("--alpha", type=number, help="LoRA scale (16)")
    add("--steps", type=positive, help="optimizer steps")
    add("--batch-size", type=positive, help="rows of examples in a batch, over all processes; gists serve 4 queries a row")
    add("--accumulate", type=positive, help="batches in a step (1)")
    add("--lr", type=number, help="highest learning rate of the LoRA sets (hyperpretrain: of the model)")
    add("--gist-lr", type=number, help="highest learning rate of the gist embeddings")
    add("--optimizer", choices=["adamw", "muon"], help="AdamW, or Muon for the layers' matrices (the rest: AdamW at --gist-lr)")
    add("--lm", type=number, metavar="WEIGHT", help="hyperpretrain: of ordinary language modelling on the same text, added to the loss")
    add("--in-order", action=argparse.BooleanOptionalAction, help="hyperpretrain: read the files of text one after the other, by name")
    add("--distill", type=number, metavar="WEIGHT", help="add to the loss how far answers after gists are from the base's with all examples in context")
    add("--reconstruct", type=number, metavar="WEIGHT", help="add to the loss that of saying the examples again, after their gists")
    add("--weight-by-context", action="store_true", help="weight each target token by how much the full context lowers its loss")
    add("--gists-every", type=whole, metavar="N", help="a part of the gists after every N examples (0: all at the end)")
    add("--gists-spread", action="store_true", help="the gists' positions spread evenly over what they compress, rather than after it")
    add("--emit", choices=["kv", "lora"], help="what gists become: keys and values, or low-rank updates of the answering model's q_proj and v_proj")
    add("--checkpoint-activations", action="store_true",
        help="compute each layer again for its gradient, rather than keep what it needs: less memory, same bits")  # fmt: skip
    add("--measure", type=whole, metavar="N", help="score the held-out tasks before training and about N times along the way (miniature: p3 4, hyperpretrain 7, prefix 10; else never)")
    add("--held-out", type=a_name, metavar="DIR", help="hyperpretrain: P3 folder whose held-out tasks --measure scores (default: the miniature's)")
    add("--save-every", type=positive, metavar="STEPS", help="steps between checkpoints (100)")
    # How to evaluate: these may differ between a run and its later evaluation (EVALUATION).
    add("--controls", action=argparse.BooleanOptionalAction,
        help="also without a prefix, with another task's, with mean-pooled keys and values, with fewer shots")  # fmt: skip
    add("--sets", type=positive, help="draws of examples, for mean and standard deviation")
    add("--limit", type=lambda text: 0 if text == "all" else whole(text), metavar="N", help="rows of a held-out task to score (all)")
    add("--average", type=positive, metavar="N", help="p3: average the gists of N sets of examples")
    add("--concat", type=positive, metavar="N", help="p3: the gists of N sets of examples side by side")
    add("--chain", type=positive, metavar="N", help="p3, also in training: N sets of examples one after the other, each seeing the gists of those before it")
    add("--score", choices=["sum", "mean"], help="of an option's token log-probabilities (sum)")
    add("--eval-tokens", type=positive, help="tokens in memory at a time when answering, prefixes and padding included (8192)")


PATHS = ("model", "data", "run", "words", "held_out")


def settle(typed: dict, run: dict | None = None) -> argparse.Namespace:
    """The options of a run: the task's defaults for this size of model, then the run's own, then what was typed."""
    typed = typed | {name: str(Path(typed[name]).resolve()) for name in PATHS if typed.get(name)}
    own = (run or {}) | typed
    if "task" not in own:
        raise InputError("--task is required")
    task = TASKS[own["task"]]
    folders = {"model": str(TINY / task.MODEL), "data": str(TINY / task.FOLDER)}
    for name in folders:
        if name in own and not Path(own[name]).is_dir():
            moved = "" if name in typed else f", which this run was made with; --{name} says where it is now"
            raise InputError(f"{own[name]}: no such folder{moved}")
    size = "tiny" if read_config(Path((folders | own)["model"])).width < TINY_WIDTH else "large"
    for name in typed.keys() & set(getattr(task, "WITHOUT", ())):
        raise InputError(f"--{name.replace('_', '-')} has no meaning for --task {own['task']}")
    args = argparse.Namespace(**COMMON | folders | task.DEFAULTS[size] | own)
    args.threads = torch.get_num_threads()  # with another number, sums are rounded in another order
    check_options(args, task)
    return args


def portable(args: argparse.Namespace) -> dict:
    """As written to disk: folders of this project by their place in it, which may be another one later."""
    inside = {name: Path(value) for name in PATHS if (value := getattr(args, name)) and Path(value).is_relative_to(PROJECT)}
    return vars(args) | {name: str(path.relative_to(PROJECT)) for name, path in inside.items()}


def several(args: argparse.Namespace) -> tuple[str, int]:
    """How sets of examples are combined, and how many of them: ("", 1) where there is one."""
    return next(((way, getattr(args, way)) for way in WAYS if getattr(args, way)), ("", 1))


def check_options(args: argparse.Namespace, task: ModuleType) -> None:
    """InputError for options that exclude each other."""
    for name, other in TASKS.items():
        if other is not task and any(getattr(args, option) for option in other.OPTIONS):
            options = " and ".join("--" + option.replace("_", "-") for option in other.OPTIONS)
            raise InputError(f"{options} {'belong' if len(other.OPTIONS) > 1 else 'belongs'} to --task {name}")
    if sum(bool(getattr(args, way)) for way in WAYS) > 1:
        raise InputError("--average, --concat and --chain exclude each other")
    further = [f"--{name.replace('_', '-')}" for name in ("distill", "reconstruct", "weight_by_context", "gists_every") if getattr(args, name)]
    if further and (args.method != "hyper" or task is prefix):
        raise InputError(f"{further[0]} belongs to a hypernetwork that is trained to compress")
    if args.emit == "lora" and (args.method != "hyper" or args.gists % 2 or args.fuse_instruction or several(args)[0] or task in (prefix, text)):
        raise InputError("--emit lora needs --method hyper and an even number of gists, and goes with nothing that keeps or combines keys and values")
    if args.gists_spread and (args.method != "hyper" or args.gists_every or several(args)[0] or task is prefix):
        raise InputError("--gists-spread goes with no other place for gists, and with one set of examples")
    if args.chain and (args.reconstruct or args.gists_every):
        raise InputError("--chain goes with neither --reconstruct nor --gists-every")
    if args.gists_every and (args.fuse_instruction or task is text):
        raise InputError("--gists-every goes with neither --fuse-instruction nor --task hyperpretrain")
    if args.downstream != "frozen" and args.method != "hyper":
        raise InputError(f"--downstream {args.downstream} belongs to --method hyper")
    for name in ("lr", "gist_lr", "alpha"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    task.check(args)


def check_values(args: dict, folder: Path) -> None:
    """InputError where a file of arguments holds what the command line would refuse."""
    argv, usual = [], COMMON | TASKS.get(str(args["task"]), p3).DEFAULTS["tiny"]
    for name, value in args.items():
        default = usual.get(name, "")  # (task, model and data have none)
        if value is None and default is not None or value is False and not isinstance(default, bool):
            raise InputError(f"{folder / 'args.json'}: {name} = {value!r} is not an option's value")
        option = "--" + name.replace("_", "-")
        argv += [option] * (value is True) + ([option, str(value)] if isinstance(value, (int, float, str)) and not isinstance(value, bool) else [])
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise InputError(f"{folder / 'args.json'}: {name} = {value!r} is not an option's value")
    parser = Parser("")
    add_options(parser)
    parser.add_argument("--threads", type=positive)
    with reading(folder / "args.json", "not what a run writes"):
        try:
            parsed = vars(parser.parse_args(argv))
        except InputError as problem:
            raise InputError(f"{folder / 'args.json'}: {problem}") from None
        for name, value in parsed.items():
            if args[name] != value:
                raise ValueError(f"{name} = {args[name]!r} has the wrong type")


def read_args(folder: Path) -> dict:
    """The arguments of a run."""
    with reading(folder / "args.json", "not what a run writes"):
        if not (folder / "args.json").exists():
            raise InputError(f"{folder}: not the folder of a run (no args.json)")
        args = json.loads((folder / "args.json").read_text())
        if not {"task", "method", "model", "data"} <= args.keys():
            raise ValueError("it lacks the arguments of a run")
        check_values(args, folder)
        return args | {name: str(PROJECT / args[name]) for name in PATHS if args.get(name)}


# ------------------------------------------------------------------------------------- opening a run

ROOM_FOR_EXAMPLES = 32  # least tokens of a row that gists must leave to examples
MAX_NEW_TOKENS = 128  # of a generated answer


@dataclass
class Run:
    """A model and how it is asked."""

    args: argparse.Namespace
    hyper: HyperLlama
    formatter: Formatter

    @property
    def task(self) -> ModuleType:
        return TASKS[self.args.task]

    @property
    def device(self) -> torch.device:
        return self.hyper.model.embed_tokens.weight.device


def open_run(args: argparse.Namespace, folder: Path | None = None) -> Run:
    """The model that `args` describe, as at the start of a run; or as a finished one left it in its folder."""
    tokenizer, config = Tokenizer(args.model), read_config(Path(args.model))
    answer = MAX_NEW_TOKENS * (TASKS[args.task].METRIC == "rougeL")
    if args.context + args.query_length + answer > config.max_positions:
        raise InputError(
            f"--context {args.context} + --query-length {args.query_length}{' + an answer' * bool(answer)} "
            f"exceed the {config.max_positions} positions of {args.model}"
        )
    if args.gists * max(args.concat or 1, args.chain or 1) + args.query_length + answer > config.max_positions:
        raise InputError(f"--concat or --chain: so many gists and a query exceed the {config.max_positions} positions of {args.model}")
    if args.method == "fewshot" and args.context <= args.query_length:
        raise InputError(f"--context {args.context} must be longer than --query-length {args.query_length}")
    if args.context < args.gists + ROOM_FOR_EXAMPLES:
        raise InputError(f"--gists {args.gists} leave no room for examples in --context {args.context}")
    if tokenizer.size > config.vocab:
        raise InputError(f"{args.model}: the tokenizer has {tokenizer.size} pieces, the model only {config.vocab}")
    formatter = Formatter(tokenizer, args.context, args.query_length, args.gists_every)
    task = TASKS[args.task]
    return Run(args, task.build(args) if folder is None else task.restore(args, folder), formatter)
