"""Evaluation: held-out tasks by option ranking, with the baselines and controls beside the number.

    python eval.py RUN                                    evaluate a run of train.py
    python eval.py --model DIR --task p3 --method fewshot  a plain Llama, without training

All that is compared differs only in the prefix that stands before a query: gists, the keys and
values of the examples themselves, or nothing. So one function scores them all.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Example, Formatter, Task, collate, p3_tasks
from gist import Gists, HyperLlama
from llama import InputError, Linear, Llama, Tokenizer, filled, load, ragged, step_mask
from lora import NF4Linear, add_lora, assign, load_tensors

# --------------------------------------------------------------------------------- a model to evaluate


@dataclass
class System:
    """A model and how it is asked: everything that the arguments of a run decide."""

    args: argparse.Namespace
    tokenizer: Tokenizer
    formatter: Formatter
    hyper: HyperLlama

    @property
    def model(self) -> Llama:
        return self.hyper.model

    @property
    def device(self) -> torch.device:
        return self.hyper.gists.device

    @property
    def gist_ids(self) -> list[int]:
        return [self.model.config.vocab + i for i in range(len(self.hyper.gists))]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.hyper.named_parameters() if p.requires_grad}


ROOM_FOR_EXAMPLES = 32  # tokens of a row of examples that must not be gists
DOWNSTREAM = {"frozen": None, "lora": "downstream", "shared": "hyper"}  # --downstream -> LoRA set


def build(args: argparse.Namespace, trained: bool = True) -> System:
    """Load the model that `args` describe; unless `trained` is False, with LoRA sets to train."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise InputError(f"--device {device}: not to be had here ({str(problem).splitlines()[0]})") from None
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"))
    tokenizer = Tokenizer(args.model)
    model = load(args.model, device, dtype, NF4Linear if args.quantize else Linear)
    config = model.config
    if tokenizer.size > config.vocab:
        raise InputError(f"{args.model}: the tokenizer has {tokenizer.size} pieces, the model only {config.vocab}")
    if args.context + args.query_length > config.max_positions:
        raise InputError(
            f"--context {args.context} + --query-length {args.query_length} exceed "
            f"the {config.max_positions} positions of {args.model}"
        )
    if args.method == "fewshot" and args.context <= args.query_length:
        raise InputError(f"--context {args.context} must be longer than --query-length {args.query_length}")
    if args.context < args.gists + ROOM_FOR_EXAMPLES:
        raise InputError(f"--gists {args.gists} leave no room for examples in --context {args.context}")
    generator = torch.Generator().manual_seed(args.seed)
    downstream = None
    if trained and args.method == "hyper":
        downstream = DOWNSTREAM[args.downstream]
        only_gists = downstream != "hyper"
        add_lora(model, "hyper", args.rank, args.alpha, generator, keys_values_only=only_gists)
    elif trained:
        downstream = "downstream"
    if downstream == "downstream":
        add_lora(model, "downstream", args.rank, args.alpha, generator)
    # Gist embeddings start as the embeddings of random words.
    gists = args.gists if args.method == "hyper" else 0
    words = torch.randperm(config.vocab, generator=generator)[:gists].to(device)
    hyper = HyperLlama(model, model.embed_tokens.weight[words], "hyper", downstream)
    hyper.gists.requires_grad_(gists > 0)
    return System(args, tokenizer, Formatter(tokenizer, args.context, args.query_length), hyper)


def read_args(folder: Path) -> dict:
    """The arguments of a run."""
    try:
        args = json.loads((folder / "args.json").read_text())
        if {"task", "method", "model", "data"} <= args.keys():
            return args
        raise ValueError("not what a run writes")
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{folder}: not the folder of a run (no readable args.json)") from None


def load_trained(system: System, folder: Path) -> None:
    """Put a finished run's LoRA sets and gist embeddings in place."""
    path = folder / "adapters.safetensors"
    if not path.exists():
        raise InputError(f"{folder}: this run isn't finished (no {path.name}); train.py with --resume goes on with it")
    assign(system.trainable(), load_tensors(path)[0], path)


# ------------------------------------------------------------------------------------ option ranking


@torch.no_grad()
def score_options(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    options: Sequence[Sequence[Sequence[int]]],
    prefix: Gists | None = None,
    adapter: str | None = None,
    mean: bool = False,
) -> list[list[float]]:
    """Log-probability of each option of each prompt: the sum over its tokens (`mean`: their mean).

    prefix: one row of Gists that stands before every prompt. Each prompt is read once; its options
    go on from its keys and values.
    """
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [N]
    tokens = ragged(prompts, device=device)  # [N, T]
    N, T = tokens.shape
    before = {"offset": torch.zeros_like(lengths)}
    if prefix is not None:
        shared = prefix[torch.zeros_like(lengths)]  # the one row, N times
        before = {"past": shared.past, "offset": shared.offset}
    last = torch.arange(N, device=device) * T + lengths - 1
    logits, present = model(tokens, **before, adapter=adapter, select=last)
    first = logits.float().log_softmax(-1)  # [N, V]

    flat = [(n, option) for n, choices in enumerate(options) for option in choices]
    row = torch.tensor([n for n, _ in flat], device=device)  # [M]
    scores = first[row, torch.tensor([option[0] for _, option in flat], device=device)]  # [M]

    longer = [m for m, (_, option) in enumerate(flat) if len(option) > 1]
    for start in range(0, len(longer), N):  # as many at a time as there are prompts: each brings its own past
        # The tokens after the first: read the options behind their prompts, whose padding stays unseen.
        some = longer[start : start + N]
        rest = collate(None, some, [flat[m][1][:1] for m in some], [flat[m][1][1:] for m in some]).to(device)
        own, width = row[rest.row], rest.tokens.shape[1]
        logits, _ = model(
            rest.tokens,
            past=[(k[own], v[own]) for k, v in present],
            offset=(before["offset"] + lengths)[own],
            adapter=adapter,
            mask=step_mask(filled(present, lengths, T)[own], width),
            select=rest.select,
        )
        gains = -F.cross_entropy(logits.float(), rest.targets, reduction="none")
        scores = scores.index_add(0, rest.row[rest.select // width], gains)
    found = iter(scores.tolist())
    return [[next(found) / (len(option) if mean else 1) for option in choices] for choices in options]


@dataclass
class Questions:
    """A task's evaluation rows, and the same as tokens."""

    examples: list[Example]
    prompts: list[list[int]]  # without BOS
    options: list[list[list[int]]]
    targets: list[list[int]]  # indices: two options may read the same

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with BOS and its longest option."""
        return max(1 + len(p) + max(map(len, o)) for p, o in zip(self.prompts, self.options))


def questions(task: Task, formatter: Formatter, limit: int | None) -> Questions:
    if not len(task.evaluation):
        raise InputError(f"{task.evaluation.folder}: the {task.evaluation.name} split is empty")
    examples = [task.evaluation.scorable(i) for i in range(min(len(task.evaluation), limit or sys.maxsize))]
    options = [[formatter.tokenizer.encode(option) for option in example.options] for example in examples]
    room = [formatter.downstream - 1 - max(map(len, choices)) for choices in options]
    prompts = [formatter.query(example, budget, bos=False) for example, budget in zip(examples, room)]
    return Questions(examples, prompts, options, [[i for i, o in enumerate(e.options) if o == e.target] for e in examples])


def accuracy(system: System, asked: Questions, prefix: Gists | None, adapter: str | None, bos: bool) -> float:
    """Share of questions, in percent, whose best-scored option is the target."""
    prompts = [[system.tokenizer.bos] * bos + prompt for prompt in asked.prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths: little padding
    right, size = 0, system.args.eval_batch_size
    for some in (order[start : start + size] for start in range(0, len(order), size)):
        scores = score_options(
            system.model,
            [prompts[i] for i in some],
            [asked.options[i] for i in some],
            prefix,
            adapter,
            mean=system.args.score == "mean",
        )
        right += sum(row.index(max(row)) in asked.targets[i] for i, row in zip(some, scores))
    return 100 * right / len(prompts)


# --------------------------------------------------------------------- what is compared, and the table


@dataclass
class Condition:
    """One column of the table: what stands before a query, and the LoRA set that answers."""

    prefix: Callable[[list[Example], list[Example], int], Gists] | None  # of (shots, other task's shots, room)
    adapter: str | None = None
    bos: bool = True  # where the examples' own BOS stands in front, a query has none


def conditions(system: System, controls: bool) -> dict[str, Condition]:
    """The number itself ("main"), the untouched model as baseline, and the controls of a hypernetwork."""
    formatter, adapter, gists = system.formatter, system.hyper.downstream, system.gist_ids

    def compressed(shots: list[Example]) -> Gists:
        with torch.no_grad():
            return system.hyper.compress(torch.tensor([formatter.shots(shots, gists)], device=system.device))

    def in_context(adapter: str | None) -> Condition:
        def read(shots: list[Example], other: list[Example], room: int) -> Gists:
            return read_row(system, formatter.shots(shots, budget=room), adapter)

        return Condition(read, adapter, bos=False)

    untouched = in_context(None)

    def fewer(shots: list[Example], *_) -> Gists:  # whole examples in as many raw tokens as gists; at least one
        counted_apart = Formatter(formatter.tokenizer, formatter.context, formatter.downstream)
        one = len(counted_apart.shots(shots[:1]))
        return read_row(system, counted_apart.shots(shots, budget=max(one, len(gists))), None)

    main = {
        "hyper": Condition(lambda shots, other, room: compressed(shots), adapter),
        "fewshot": in_context(adapter) if adapter else untouched,
        "zeroshot": Condition(None, adapter),
    }[system.args.method]
    table = {"main": main, "zeroshot": Condition(None), "fewshot": untouched}
    if controls and system.args.method == "hyper":
        table["no_prefix"] = Condition(None, adapter)
        table["other_task"] = Condition(lambda shots, other, room: compressed(other), adapter)
        table["mean_pooled"] = Condition(lambda *given: mean_pooled(untouched.prefix(*given), len(gists)), adapter)
        table["fewer_shots"] = Condition(fewer, None, bos=False)
    return table


@torch.no_grad()
def read_row(system: System, row: list[int], adapter: str | None) -> Gists:
    """The keys and values of every token of a row: few-shot prompting, as a prefix."""
    tokens = torch.tensor([row], device=system.device)
    _, present = system.model(tokens, adapter=adapter, keys_values_only=True)
    return Gists(present, torch.tensor([len(row)], device=system.device))


def mean_pooled(prefix: Gists, count: int) -> Gists:
    """A control: keys and values averaged over `count` stretches of the examples. Nothing is learned."""

    def pool(x: Tensor) -> Tensor:  # [B, K, T, hd] -> [B, K, count, hd]
        return torch.stack([part.mean(2) for part in x.tensor_split(min(count, x.shape[2]), dim=2)], dim=2)

    return Gists([(pool(k), pool(v)) for k, v in prefix.past], prefix.offset)


def draw_shots(task: Task, asked: Questions, count: int, seed: int, draw: int) -> list[Example]:
    """Examples from the training split, none of them a question. The order of tasks doesn't matter to them."""
    rng = random.Random(f"{seed} {task.name} {draw}")
    order = rng.sample(range(len(task.train)), len(task.train))
    questions = {example.input for example in asked.examples}
    shots = list(islice((e for e in map(task.train.__getitem__, order) if e.input not in questions), count))
    if len(shots) < count:
        raise InputError(f"{task.train.folder}: only {len(shots)} training rows are no questions; {count} --shots asked")
    return shots


def prepare(system: System, tasks: list[Task]) -> tuple[list[Task], list[Questions], list[list[list[Example]]]]:
    """Tasks, their questions, and shots per draw and task. Done before training, a bad row is found in time."""
    args = system.args
    asked = [questions(task, system.formatter, args.limit) for task in tasks]
    draws = range(args.sets)
    return tasks, asked, [[draw_shots(t, q, args.shots, args.seed, d) for t, q in zip(tasks, asked)] for d in draws]


def evaluate(system: System, tasks: list[Task], asked: list[Questions], shots: list[list[list[Example]]]) -> dict:
    """Score what `prepare` gave under every condition; returns what results.json holds, and prints the table."""
    args, began = system.args, time.time()
    table = conditions(system, args.controls)
    if len({task.dataset for task in tasks}) == 1:
        table.pop("other_task", None)  # there is no other
    scores: dict[str, list[list[float]]] = {}  # condition -> task -> draw
    with tqdm(total=len(table) * len(tasks), desc="evaluating", leave=False) as bar:
        for name, condition in table.items():
            twin = next((other for other in scores if table[other] == condition), None)
            scores[name] = scores[twin] if twin else [[] for _ in tasks]
            for t, rows in enumerate(asked):
                bar.update()
                if twin:
                    continue
                room = args.context - rows.longest  # in a context, the query has to find its place too
                for draw in shots:
                    if condition.prefix is None and scores[name][t]:  # no examples: each draw is the same
                        scores[name][t] += scores[name][t][:1]
                        continue
                    prefix = condition.prefix and condition.prefix(draw[t], draw[other_task(tasks, t)], room)
                    scores[name][t].append(accuracy(system, rows, prefix, condition.adapter, condition.bos))
    averages = {name: average(tasks, found) for name, found in scores.items()}
    print_table(tasks, scores, vars(args))
    return {
        "task": args.task,
        "method": args.method,
        "metric": "accuracy",
        "tasks": {
            task.name: {"mean": statistics.fmean(found), "std": spread(found), "n": len(rows.prompts)}
            for task, found, rows in zip(tasks, scores["main"], asked)
        },
        "average": averages.pop("main"),
        "baselines": {name: averages.pop(name) for name in ("zeroshot", "fewshot")},
        "controls": averages,
        "seconds": round(time.time() - began, 1),
        "args": vars(args),
    }


def other_task(tasks: list[Task], t: int) -> int:
    """The next task of another dataset (itself, where there is none)."""
    order = [*range(t + 1, len(tasks)), *range(t)]
    return next((i for i in order if tasks[i].dataset != tasks[t].dataset), t)


def average(tasks: list[Task], scores: list[list[float]]) -> float:
    """Mean over the draws, then over a dataset's tasks (prompts), then over datasets."""
    datasets: dict[str, list[float]] = {}
    for task, found in zip(tasks, scores):
        datasets.setdefault(task.dataset, []).append(statistics.fmean(found))
    return statistics.fmean(map(statistics.fmean, datasets.values()))


def spread(draws: list[float]) -> float | None:
    return statistics.stdev(draws) if len(draws) > 1 else None


COLUMNS = {
    "main": "{method}",
    "zeroshot": "0-shot",
    "fewshot": "{shots}-shot",
    "no_prefix": "no prefix",
    "other_task": "other task",
    "mean_pooled": "mean-pooled",
    "fewer_shots": "fewer shots",
}


def print_table(tasks: list[Task], scores: dict[str, list[list[float]]], args: dict) -> None:
    """A row per dataset, a column per condition."""
    lines = [["accuracy, %", *(COLUMNS[name].format(**args) for name in scores)]]
    for dataset in dict.fromkeys(task.dataset for task in tasks):
        at = [t for t, task in enumerate(tasks) if task.dataset == dataset]
        line = [dataset if len(at) == 1 else f"{dataset} ({len(at)} prompts)"]
        for name, found in scores.items():
            line.append(f"{average([tasks[t] for t in at], [found[t] for t in at]):.1f}")
            if name == "main" and len(at) == 1 and spread(found[at[0]]) is not None:
                line[-1] += f" ± {spread(found[at[0]]):.1f}"
        lines.append(line)
    lines.append(["average", *(f"{average(tasks, found):.1f}" for found in scores.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for i, line in enumerate(lines):
        if i in (1, len(lines) - 1):
            print("-" * (sum(widths) + 2 * len(widths) - 2))
        print(line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:])), sep="  ")


# ------------------------------------------------------------------------------------------- command


TINY = Path(__file__).parent / "tiny"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_options(parser: Parser) -> None:
    """What training and evaluation both need to know."""
    add = parser.add_argument
    add("--task", choices=["p3"])
    add("--model", default=str(TINY / "llama-c"), metavar="DIR", help="checkpoint: a Hugging Face or Meta folder")
    add("--data", default=str(TINY / "P3"), metavar="DIR", help="the task's data")
    add("--method", choices=["hyper", "fewshot", "zeroshot"], default="hyper",
        help="HyperLlama; a language model with the examples in context; the same without examples")  # fmt: skip
    add("--gists", type=positive, default=16, help="gist tokens")
    add("--shots", type=positive, default=16, help="examples of a task")
    add("--context", type=positive, default=1024, help="most tokens of examples and gists")
    add("--query-length", type=positive, default=384, help="most tokens of a query with its target")
    add("--quantize", action="store_true", help="hold the base in NF4")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--seed", type=int, default=0)
    # How to evaluate: these may differ between a run and its later evaluation (EVALUATION).
    add("--controls", action=argparse.BooleanOptionalAction, default=False,
        help="also without a prefix, with another task's, with mean-pooled keys and values, with fewer shots")  # fmt: skip
    add("--sets", type=positive, default=1, help="draws of examples, for mean and standard deviation")
    add("--limit", type=positive, help="rows of a held-out task to score (default: all)")
    add("--score", choices=["sum", "mean"], default="sum", help="of an option's token log-probabilities")
    add("--eval-batch-size", type=positive, default=16, help="queries scored at a time")


MOVABLE = ("model", "data", "device", "dtype")  # the same model may lie elsewhere later
EVALUATION = ("controls", "sets", "limit", "score", "eval_batch_size")


def run_command(main: Callable[[], None]) -> None:
    """Run a command; what the user can mend is said in one line, with exit status 2 (Ctrl-C: 130)."""
    try:
        main()
    except (InputError, OSError) as problem:  # OSError: a full disk, a folder taken away
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as problem:
        print(f"error: out of memory; a smaller --batch-size or --eval-batch-size may help ({str(problem).splitlines()[0]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def write_json(path: Path, value: dict) -> None:
    """Atomic, like save_tensors."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: can't be written ({problem.strerror})") from None


def settings(argv: list[str] | None = None) -> tuple[argparse.Namespace, Path]:
    """What to evaluate, and the folder for the result: a run's own, with its arguments, or a new one."""
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a finished run; without it, a plain Llama")
    add_options(parser)
    plain = {option.dest: option.default for option in parser._actions if option.dest not in ("help", "run")}
    parser.set_defaults(**dict.fromkeys(plain))
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    run = given.pop("run", None)
    if run is None:
        args = argparse.Namespace(**plain | given)
        if args.task is None or args.method == "hyper":
            raise InputError("name a RUN, or a plain Llama: --model DIR --task p3 --method fewshot (or zeroshot)")
        return args, Path("runs") / f"eval-{args.task}-{args.method}"
    for name in given.keys() - {*EVALUATION, *MOVABLE}:
        raise InputError(f"--{name.replace('_', '-')}: {run} was trained with its own, which can't be changed")
    return argparse.Namespace(**read_args(Path(run)) | given), Path(run)


def main() -> None:
    args, folder = settings()
    tasks = p3_tasks(args.data, "test")
    is_run = (folder / "args.json").exists()
    system = build(args, trained=is_run)
    if is_run:
        load_trained(system, folder)
    results = evaluate(system, *prepare(system, tasks))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    if system.formatter.report():
        print(system.formatter.report())


if __name__ == "__main__":
    run_command(main)
