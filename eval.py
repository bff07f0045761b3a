"""Evaluation: held-out tasks by option ranking or ROUGE-L, with the baselines and controls beside the number.

    python eval.py RUN                                    evaluate a run of train.py
    python eval.py --model DIR --task p3 --method fewshot  a plain Llama, without training

All that is compared differs only in the prefix that stands before a query: gists, the keys and
values of the examples themselves, or nothing. So one function scores them all.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import (
    P3_LAYOUT,
    PREFIX_PROMPTS,
    SNI_LAYOUT,
    SYMBOL_LAYOUTS,
    Episode,
    Example,
    Formatter,
    JsonLines,
    P3Task,
    SNITask,
    SymbolTask,
    TextBatches,
    as_text,
    collate,
    p3_tasks,
    read_words,
    sni_tasks,
    symbol_tasks,
)
from gist import Gists, HyperLlama, SoftPrefix, combine, load_gists, save_gists
from llama import (
    Config,
    InputError,
    Linear,
    Llama,
    Tokenizer,
    generate,
    holes_mask,
    load,
    positions_of,
    ragged,
    read_config,
    real,
    seen_after,
)
from lora import NF4Linear, add_lora, assign, load_tensors

# --------------------------------------------------------------------------------- a model to evaluate


@dataclass
class System:
    """A model and how it is asked: everything that the arguments of a run decide."""

    args: argparse.Namespace
    tokenizer: Tokenizer
    formatter: Formatter
    hyper: HyperLlama | SoftPrefix

    @property
    def model(self) -> Llama:
        return self.hyper.model

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def gist_ids(self) -> list[int]:
        return [self.model.config.vocab + i for i in range(self.args.gists if self.args.method == "hyper" else 0)]

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.hyper.named_parameters() if p.requires_grad}

    def trained(self) -> dict[str, Tensor]:
        """What training leaves behind: the trained parameters, and where prefixes that are trained themselves end."""
        return self.trainable() | dict(self.hyper.named_buffers())


ROOM_FOR_EXAMPLES = 32  # tokens of a row of examples that must not be gists
MAX_NEW_TOKENS = 128  # of a generated answer
DOWNSTREAM = {"frozen": None, "lora": "downstream", "shared": "hyper"}  # --downstream -> LoRA set


def build(args: argparse.Namespace, trained: bool = True) -> System:
    """Load the model that `args` describe; unless `trained` is False, with what is to be trained."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise InputError(f"--device {device}: not to be had here ({str(problem).splitlines()[0]})") from None
    whole = args.task == "hyperpretrain"  # no LoRA: one set of weights learns both roles
    # Small updates of a weight get lost in bfloat16, so weights that are trained are float32.
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.startswith("cuda") and not whole else "float32"))
    tokenizer = Tokenizer(args.model)
    config = read_config(Path(args.model))
    longest = args.context + args.query_length + MAX_NEW_TOKENS * (args.task == "sni")
    if longest > config.max_positions:
        raise InputError(
            f"--context {args.context} + --query-length {args.query_length}{' + an answer' * (args.task == 'sni')} "
            f"exceed the {config.max_positions} positions of {args.model}"
        )
    if args.method == "fewshot" and args.context <= args.query_length:
        raise InputError(f"--context {args.context} must be longer than --query-length {args.query_length}")
    if args.context < args.gists + ROOM_FOR_EXAMPLES:
        raise InputError(f"--gists {args.gists} leave no room for examples in --context {args.context}")
    if tokenizer.size > config.vocab:
        raise InputError(f"{args.model}: the tokenizer has {tokenizer.size} pieces, the model only {config.vocab}")

    model = load(args.model, device, dtype, NF4Linear if args.quantize else Linear)
    generator = torch.Generator().manual_seed(args.seed)
    formatter = Formatter(tokenizer, args.context, args.query_length)
    if args.task == "prefix":
        kind = args.init if args.init in ("reparam", "propagate") else "flat"
        tasks = len(load_tasks(args, tokenizer, "test"))
        return System(args, tokenizer, formatter, SoftPrefix(model, tasks, args.gists, kind, generator))
    roles = {"hyper": "hyper", "downstream": DOWNSTREAM[args.downstream]} if args.method == "hyper" else {"downstream": "downstream"}
    if whole or not trained:
        roles = {"hyper": None, "downstream": None}
    for name in dict.fromkeys(filter(None, roles.values())):
        only_gists = roles["downstream"] != name
        add_lora(model, name, args.rank, args.alpha, generator, keys_values_only=only_gists)
    hyper = HyperLlama(model, first_gists(args, model, generator), **roles)
    hyper.gists.requires_grad_(args.method == "hyper")
    if whole and trained:
        hyper.requires_grad_(True)
    return System(args, tokenizer, formatter, hyper)


def first_gists(args: argparse.Namespace, model: Llama, generator: torch.Generator) -> Tensor:
    """Gist embeddings to start from: a hyperpretrained model's own, else the embeddings of random words. [G, D]"""
    count = args.gists if args.method == "hyper" else 0
    words = model.embed_tokens.weight[torch.randperm(model.config.vocab, generator=generator)[:count]]
    own = Path(args.model) / "gists.safetensors"
    if not count or not own.exists():
        return words
    gists = load_tensors(own)[0].get("gists", words[:0])[:count]
    if len(gists) < count:
        print(f"{own}: holds {len(gists)} gists, fewer than {count}: these start as words", file=sys.stderr)
        return words
    if gists.shape != words.shape:
        raise InputError(f"{own}: gists of shape {list(gists.shape)} don't fit the model")
    return gists.to(words.device)


def read_args(folder: Path) -> dict:
    """The arguments of a run."""
    try:
        args = json.loads((folder / "args.json").read_text())
        if {"task", "method", "model", "data"} <= args.keys():
            return args
        raise ValueError("not what a run writes")
    except (OSError, ValueError, AttributeError):
        raise InputError(f"{folder}: not the folder of a run (no readable args.json)") from None


def checksum(model: Llama) -> str:
    """Tells models apart by tensors that are never quantized, whatever they are computed in."""
    found = hashlib.sha256(repr(model.config).encode())
    for weight in (model.norm.weight, model.embed_tokens.weight[:256]):
        found.update(weight.detach().bfloat16().float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def load_trained(system: System, folder: Path) -> None:
    """Put a finished run's LoRA sets and gist embeddings (or its prefixes) in place."""
    path = folder / "adapters.safetensors"
    if not path.exists():
        raise InputError(f"{folder}: this run isn't finished (no {path.name}); train.py with --resume goes on with it")
    tensors, about = load_tensors(path)
    assign(system.trained(), tensors, path)
    if about.get("base") != checksum(system.model):
        raise InputError(f"{path}: was trained on another model than {system.args.model}")


def load_tasks(args: argparse.Namespace, tokenizer: Tokenizer, split: str) -> list[P3Task] | list[SNITask] | list[SymbolTask]:
    if args.task == "symbol":
        return symbol_tasks(args.data, split, read_words(args.words) if args.words else tokenizer.words())
    tasks = (sni_tasks if args.task == "sni" else p3_tasks)(args.data, split)
    if args.task == "prefix" and split == "test":
        return [task for task in tasks if task.name in PREFIX_PROMPTS] or tasks
    return tasks


# ----------------------------------------------------------------------- two ways to score an answer


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

    prefix: what stands before each of the N prompts. Each prompt is read once; its options go on
    from its keys and values.
    """
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [N]
    tokens = ragged(prompts, device=device)  # [N, T]
    N, T = tokens.shape
    before = {"offset": torch.zeros_like(lengths)} if prefix is None else prefix.before(T)
    last = torch.arange(N, device=device) * T + lengths - 1
    logits, present = model(tokens, **before, adapter=adapter, select=last)
    first = logits.float().log_softmax(-1)  # [N, V]
    seen = seen_after(prefix and prefix.seen, present, lengths, T)  # the padding of prompts stays unseen

    flat = [(n, option) for n, choices in enumerate(options) for option in choices]
    row = torch.tensor([n for n, _ in flat], device=device)  # [M]
    scores = first[row, torch.tensor([option[0] for _, option in flat], device=device)]  # [M]

    longer = [m for m, (_, option) in enumerate(flat) if len(option) > 1]
    for start in range(0, len(longer), N):  # as many at a time as there are prompts: each brings its own past
        some = longer[start : start + N]
        rest = collate(None, some, [flat[m][1][:1] for m in some], [flat[m][1][1:] for m in some]).to(device)
        own, width = row[rest.row], rest.tokens.shape[1]
        logits, _ = model(
            rest.tokens,
            past=[(k[own], v[own]) for k, v in present],
            offset=(before["offset"] + lengths)[own],
            adapter=adapter,
            mask=holes_mask(seen[own], width),
            select=rest.select,
        )
        gains = -F.cross_entropy(logits.float(), rest.targets, reduction="none")
        scores = scores.index_add(0, rest.row[rest.select // width], gains)
    found = iter(scores.tolist())
    return [[next(found) / (len(option) if mean else 1) for option in choices] for choices in options]


@cache
def rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and only needed here

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in percent against the best reference, as Super-NaturalInstructions scores."""
    return 100 * max(rouge_scorer().score(reference, prediction)["rougeL"].fmeasure for reference in references)


# --------------------------------------------------------------------- what is compared, and its score


@dataclass
class Condition:
    """One column of the table: what stands before a query, and the LoRA set that answers."""

    prefix: Callable[[list[Episode], list[Episode], int], Gists] | None  # of episodes, another task's, task: a row for each
    adapter: str | None = None
    instruct: bool = False  # whether the instruction stands in the query itself
    bos: bool = True  # where the examples' own BOS stands in front, a query has none


def conditions(system: System, controls: bool) -> dict[str, Condition]:
    """The number itself ("main"), the untouched model as baseline, and the controls of a hypernetwork."""
    args, formatter, adapter, gists = system.args, system.formatter, system.hyper.downstream, system.gist_ids
    instruct, sets = args.instruction_downstream, args.average or args.concat or 1

    def compressed(episodes: list[Episode], *_) -> Gists:
        if sets > 1:
            return several(episodes)
        rows, lead = zip(*(formatter.context_row(episode, gists) for episode in episodes))
        kept = torch.tensor(lead, device=system.device) if args.fuse_instruction else None
        with torch.no_grad():
            return system.hyper.compress(ragged(rows, device=system.device), kept=kept)

    @torch.no_grad()
    def several(episodes: list[Episode]) -> Gists:
        """The examples of an episode in so many sets, averaged or side by side."""
        (episode,) = episodes
        parts = [replace(episode, shots=episode.shots[n::sets]) for n in range(sets)]
        rows = [formatter.context_row(part, gists)[0] for part in parts]
        return combine(system.hyper, rows, side_by_side=bool(args.concat))

    def tuned(episodes: list[Episode], _, t: int) -> Gists:
        with torch.no_grad():
            return system.hyper.prefix()[torch.tensor([t] * len(episodes), device=system.device)]

    def in_context(adapter: str | None) -> Condition:
        def read(episodes: list[Episode], *_) -> Gists:
            if sets > 1:  # one set, as without --average and --concat
                episodes = [replace(episode, shots=episode.shots[: args.shots]) for episode in episodes]
            rows = [formatter.context_row(e, budget=args.context - longest(system, e))[0] for e in episodes]
            return read_rows(system, rows, adapter)

        return Condition(read, adapter, bos=False)

    def fewer(episodes: list[Episode], *_) -> Gists:
        """Whole examples in as many raw tokens as there are gists; at least one."""
        apart = Formatter(formatter.tokenizer, formatter.context, formatter.downstream)  # what it leaves out isn't reported
        bare = [replace(episode, instruction="") for episode in episodes]
        ones = [len(apart.context_row(replace(e, shots=e.shots[:1]))[0]) for e in bare]
        return read_rows(system, [apart.context_row(e, budget=max(n, len(gists)))[0] for e, n in zip(bare, ones)], None)

    untouched = in_context(None)
    main = {
        "hyper": Condition(compressed, adapter, instruct),
        "fewshot": in_context(adapter) if adapter else untouched,
        "zeroshot": Condition(None, adapter, instruct=True),
    }[args.method]
    table = {"main": main, "zeroshot": Condition(None, instruct=True), "fewshot": untouched}
    if args.task == "prefix":
        table["main"], controls = Condition(tuned), False
    if controls and args.method == "hyper":
        table["no_prefix"] = Condition(None, adapter, instruct)
        table["other_task"] = Condition(lambda episodes, others, t: compressed(others), adapter, instruct)
        table["mean_pooled"] = Condition(lambda *given: mean_pooled(untouched.prefix(*given), len(gists)), adapter, instruct)
        table["fewer_shots"] = Condition(fewer, bos=False)
    return table


@torch.no_grad()
def read_rows(system: System, rows: list[list[int]], adapter: str | None) -> Gists:
    """The keys and values of every token of some rows: few-shot prompting, as a prefix."""
    tokens = ragged(rows, device=system.device)
    lengths = torch.tensor([len(row) for row in rows], device=system.device)
    _, present = system.model(tokens, adapter=adapter, keep=positions_of(tokens))
    return Gists(present, lengths, real(lengths, tokens.shape[1]) if len(rows) > 1 else None)


def mean_pooled(prefix: Gists, count: int) -> Gists:
    """A control: keys and values of all examples averaged over `count` stretches. Nothing is learned."""
    lengths = prefix.offset.tolist()
    count = min(count, *lengths)

    def pool(x: Tensor) -> Tensor:  # [B, K, T, hd] -> [B, K, count, hd]
        rows = [row[:, :length].tensor_split(count, dim=1) for row, length in zip(x, lengths)]
        return torch.stack([torch.stack([part.mean(1) for part in parts], dim=1) for parts in rows])

    return Gists([(pool(k), pool(v)) for k, v in prefix.past], prefix.offset)


def longest(system: System, episode: Episode) -> int:
    """Tokens that the longest query of an episode needs behind examples in context, with its longest option."""
    prompts, options = ask(system, episode, Condition(None, bos=False))
    return max(len(p) + max((len(o) for o in choices), default=0) for p, choices in zip(prompts, options))


def ask(system: System, episode: Episode, condition: Condition) -> tuple[list[list[int]], list[list[list[int]]]]:
    """An episode's queries as tokens: prompts, and the options of each (none where answers are generated)."""
    formatter, options, prompts = system.formatter, [], []
    for query in episode.queries:
        options.append([formatter.target(episode, option) for option in query.options])
        budget = formatter.downstream - max((len(option) for option in options[-1]), default=0)
        prompts.append(formatter.query(episode, query, budget, condition.instruct, condition.bos))
    return prompts, options


@torch.no_grad()
def score(system: System, episodes: list[Episode], others: list[Episode], condition: Condition, t: int = 0) -> list[float]:
    """A score in percent for each query of task number t: whether the best-scored option is right, or ROUGE-L."""
    size, scores = system.args.eval_batch_size, []
    for start in range(0, len(episodes), size):
        some = episodes[start : start + size]
        elsewhere = [others[i % len(others)] for i in range(start, start + len(some))] if others else []
        prefix = condition.prefix and condition.prefix(some, elsewhere, t)
        asked = [(e, query) for e, episode in enumerate(some) for query in episode.queries]
        prompts, options = ([x for xs in part for x in xs] for part in zip(*(ask(system, e, condition) for e in some)))
        found = [0.0] * len(asked)
        order = sorted(range(len(asked)), key=lambda i: len(prompts[i]))  # alike lengths: little padding
        for at in (order[i : i + size] for i in range(0, len(order), size)):
            gists = prefix and prefix[torch.tensor([asked[i][0] for i in at], device=system.device)]
            queries, given = [asked[i][1] for i in at], [prompts[i] for i in at]
            if queries[0].options:
                mean = system.args.score == "mean"
                rows = score_options(system.model, given, [options[i] for i in at], gists, condition.adapter, mean)
                best = [query.options[row.index(max(row))] for query, row in zip(queries, rows)]
                values = [100.0 * (answer == query.target) for answer, query in zip(best, queries)]
            else:
                answers = write_answers(system, some[0], given, gists, condition.adapter)
                values = [rouge_l(answer, query.references) for answer, query in zip(answers, queries)]
            for i, value in zip(at, values):
                found[i] = value
        scores += found
    return scores


def write_answers(
    system: System, episode: Episode, prompts: list[list[int]], prefix: Gists | None, adapter: str | None
) -> list[str]:
    """The model's own answers to prompts in the episode's layout. prefix: what stands before each of them."""
    before = {} if prefix is None else {"past": prefix.past, "offset": prefix.offset, "seen": prefix.seen}
    ends = {"eos": system.tokenizer.eos, "until": system.tokenizer.encode(episode.layout.end)}
    rows = generate(system.model, prompts, MAX_NEW_TOKENS, **ends, **before, adapter=adapter)
    return [system.tokenizer.decode(row).strip() for row in rows]


def prepare(system: System, tasks: Sequence) -> tuple[Sequence, list[list[list[Episode]]]]:
    """Tasks, and their episodes per draw and task. Done before training, a bad row is found in time."""
    args = system.args
    shots = args.shots * (args.average or args.concat or 1)
    episodes = [[task.evaluation(args.seed, n, shots, args.limit) for task in tasks] for n in range(args.sets)]
    for episode in (episode for some in episodes[0] for episode in some):
        longest(system, episode)  # a query that can't be asked is found now
    system.formatter.counts.clear()
    return tasks, episodes


def evaluate(system: System, tasks: Sequence, episodes: list[list[list[Episode]]]) -> dict:
    """Score what `prepare` gave under every condition; returns what results.json holds, and prints the table."""
    args, began = system.args, time.time()
    table = conditions(system, args.controls)
    if len({task.group for task in tasks}) == 1:
        table.pop("other_task", None)  # there is no other
    scores: dict[str, list[list[float]]] = {}  # condition -> task -> draw
    with tqdm(total=len(table) * len(tasks), desc="evaluating", leave=False) as bar:
        for name, condition in table.items():
            twin = next((other for other in scores if table[other] == condition), None)
            scores[name] = scores[twin] if twin else [[] for _ in tasks]
            for t in range(len(tasks)):
                bar.update()
                for n, draw in enumerate(episodes if not twin else []):
                    first = episodes[0][t]
                    if n and (draw[t] == first or condition.prefix is None and draw[t][0].queries == first[0].queries):
                        scores[name][t] += scores[name][t][:1]  # nothing differs from the first draw
                        continue
                    found = score(system, draw[t], draw[other_task(tasks, t)], condition, t)
                    scores[name][t].append(statistics.fmean(found))
    if args.task == "sni":
        scores |= copying(episodes[0])
    sizes = [sum(len(episode.queries) for episode in some) for some in episodes[0]]
    print_table(tasks, scores, sizes, args)
    averages = {name: average(tasks, found, sizes, args.task) for name, found in scores.items()}
    draws = [average(tasks, [[found[n]] for found in scores["main"]], sizes, args.task) for n in range(len(episodes))]
    return {
        "task": args.task,
        "method": args.method,
        "metric": METRICS[args.task],
        "tasks": {
            task.name: {"mean": statistics.fmean(found), "std": spread(found), "n": size}
            for task, found, size in zip(tasks, scores["main"], sizes)
        },
        "average": averages.pop("main"),
        "std": spread(draws),
        "baselines": {name: averages.pop(name) for name in BASELINES if name in averages},
        "controls": averages,
        "seconds": round(time.time() - began, 1),
        "args": vars(args),
    }


METRICS = {"p3": "accuracy", "sni": "rougeL", "symbol": "accuracy", "hyperpretrain": "loss", "prefix": "accuracy"}
BASELINES = ("zeroshot", "fewshot", "copy_input", "copy_example")


def copying(tasks: list[list[Episode]]) -> dict[str, list[list[float]]]:
    """ROUGE-L of two answers that need no model: the input, and the output of the first example."""
    found: dict[str, list[list[float]]] = {"copy_input": [], "copy_example": []}
    for (episode,) in tasks:
        example = episode.shots[0].target if episode.shots else ""
        for name, answer in (("copy_input", None), ("copy_example", example)):
            values = [rouge_l(query.input if answer is None else answer, query.references) for query in episode.queries]
            found[name].append([statistics.fmean(values)])
    return found


def other_task(tasks: Sequence, t: int) -> int:
    """By name, the next task of another group (itself, where there is none)."""
    order = sorted(range(len(tasks)), key=lambda i: (tasks[i].name <= tasks[t].name, tasks[i].name))
    return next((i for i in order if tasks[i].group != tasks[t].group), t)


def average(tasks: Sequence, scores: list[list[float]], sizes: list[int], kind: str) -> float:
    """Mean over draws; then over all instances (S-NI), or over a group's tasks and then over groups."""
    means = [statistics.fmean(found) for found in scores]
    if kind == "sni":
        return math.fsum(mean * size for mean, size in zip(means, sizes)) / sum(sizes)
    groups: dict[str, list[float]] = {}
    for task, mean in zip(tasks, means):
        groups.setdefault(task.group, []).append(mean)
    return statistics.fmean(map(statistics.fmean, groups.values()))


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
    "copy_input": "copy input",
    "copy_example": "copy example",
}


TEXT_COLUMNS = {"zeroshot": "without", "fewshot": "A D in full", "other_task": "other text's gists"}


def print_table(tasks: Sequence, scores: dict[str, list[list[float]]], sizes: list[int], args: argparse.Namespace) -> None:
    """A row per group, a column per condition; ± over draws of examples."""
    unit = {"accuracy": "accuracy, %", "rougeL": "ROUGE-L"}[METRICS[args.task]]
    lines = [[unit, *(COLUMNS[name].format(**vars(args)) for name in scores)]]
    for group in [*dict.fromkeys(task.group for task in tasks), None]:
        at = [t for t, task in enumerate(tasks) if group in (task.group, None)]
        some, counts = [tasks[t] for t in at], [sizes[t] for t in at]
        line = ["average" if group is None else group if len(at) == 1 else f"{group} ({len(at)} tasks)"]
        for name, found in scores.items():
            line.append(f"{average(some, [found[t] for t in at], counts, args.task):.1f}")
            draws = [average(some, [[found[t][n]] for t in at], counts, args.task) for n in range(len(found[0]))]
            if name == "main" and spread(draws) is not None:
                line[-1] += f" ± {spread(draws):.1f}"
        lines.append(line)
    print_lines(lines)


def print_lines(lines: list[list[str]], total: bool = True) -> None:
    """A table: a rule under the first line, and above the last if that is a total."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for i, line in enumerate(lines):
        if i == 1 or total and i == len(lines) - 1:
            print("-" * (sum(widths) + 2 * len(widths) - 2))
        print(line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:])), sep="  ")


def compare(rows: list[Path]) -> str:
    """A table in Markdown of the runs in some folders: a line per folder, mean ± standard deviation over its runs."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values = found.setdefault(row.name.replace("_", " "), {})
        paths = sorted(row.glob("*/results.json"))
        if not paths:
            raise InputError(f"{row}: holds no runs with results.json")
        for path in paths:
            try:
                results = json.loads(path.read_text())
                log = path.with_name("log.jsonl")
                training = [json.loads(line)["seconds"] for line in log.read_text().splitlines()] if log.exists() else []
                columns = {"result": results["average"]} | results["baselines"] | results["controls"]
                columns |= {"share kept, %": results["kept"]} if "kept" in results else {}
                metric, args = results["metric"], results["args"]
                if args["task"] == "prefix":
                    columns |= {name: task["mean"] for name, task in results["tasks"].items()}
                columns["seconds"] = results["seconds"] + sum(training)
            except (OSError, ValueError, KeyError, TypeError) as problem:
                raise InputError(f"{path}: not the results of a run ({problem})") from None
            for name, value in columns.items():
                values.setdefault(name, []).append(value)
    names = {name: None for values in found.values() for name in values if name != "seconds"}  # in order, each once
    heads = COLUMNS | (TEXT_COLUMNS if metric == "loss" else {})
    heads = [heads[name].format(**args) if name in heads else name for name in names]
    lines = [f"| {metric} | " + " | ".join([*heads, "seconds a run"]) + " |", "|---" * (len(names) + 2) + "|"]
    for row, values in found.items():
        cells = []
        for name in names:
            some, digits = values.get(name), 3 if metric == "loss" and "%" not in name else 1
            spreading = f" ± {statistics.stdev(some):.{digits}f}" if some and len(some) > 1 else ""
            cells.append(f"{statistics.fmean(some):.{digits}f}{spreading}" if some else "")
        lines.append("| " + " | ".join([row, *cells, f"{statistics.fmean(values['seconds']):.0f}"]) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------- own examples: compress, keep, answer

LAYOUTS = {"p3": P3_LAYOUT, "sni": SNI_LAYOUT, "symbol": SYMBOL_LAYOUTS[0]}  # as, or among others as, the run was trained


def belongs_to(system: System, run: Path) -> dict[str, str]:
    """Checksums of the model and the run that make and read a prefix: it means nothing to others."""
    try:
        trained = hashlib.sha256((run / "adapters.safetensors").read_bytes())
    except OSError as problem:
        raise InputError(f"{run / 'adapters.safetensors'}: {problem.strerror}") from None
    return {"model": checksum(system.model), "run": trained.hexdigest()[:16]}


@torch.no_grad()
def compress_examples(system: System, path: Path) -> Gists:
    """The gists of a user's own examples, a .jsonl file with input and output; says what that saves."""
    rows = JsonLines(path)
    examples = [Example(*(as_text(row.get(f), f"{path}: line {i + 1}: {f}") for f in ("input", "output"))) for i, row in enumerate(rows)]
    if not examples:
        raise InputError(f"{path}: holds no examples")
    episode = Episode([], examples, LAYOUTS[system.args.task])
    row, _ = system.formatter.context_row(episode, system.gist_ids)
    left_out = system.formatter.counts["shots left out"]
    if left_out:
        print(f"{left_out} of {len(examples)} examples left out: they don't fit into {system.args.context} tokens", file=sys.stderr)
    if left_out == len(examples):
        raise InputError(f"{path}: no example fits into {system.args.context} tokens")
    gists = system.hyper.compress(torch.tensor([row], device=system.device))
    size = sum(x.numel() * x.element_size() for layer in gists.past for x in layer)
    count, read = len(system.gist_ids), len(row) - len(system.gist_ids)
    print(f"{len(examples) - left_out} examples, {read} tokens, became {count} gists: keys and values of {size:,} bytes "
          f"instead of {size // count * read:,}, {read / count:.0f} times as many")  # fmt: skip
    return gists


@torch.no_grad()
def answer(system: System, gists: Gists, text: str, options: list[str]) -> str:
    """The answer to one input behind a prefix: the best option with its probability, or generated text."""
    query = Example(text, "", tuple(options))
    episode = Episode([query], [], LAYOUTS[system.args.task])
    adapter = system.hyper.downstream
    prompts, choices = ask(system, episode, Condition(None))
    if options:
        (scores,) = score_options(system.model, prompts, choices, gists, adapter, system.args.score == "mean")
        shares = torch.tensor(scores).softmax(0).tolist()
        best = max(range(len(options)), key=scores.__getitem__)
        return f"{options[best]}  ({', '.join(f'{option} {100 * share:.0f} %' for option, share in zip(options, shares))})"
    return write_answers(system, episode, prompts, gists, adapter)[0]


def use(system: System, run: Path, given: argparse.Namespace) -> None:
    """Own examples to gists, gists to a file, and answers behind them: --input, else the lines of stdin."""
    if system.args.method != "hyper" or system.args.task not in LAYOUTS:
        raise InputError(f"{run}: has no hypernetwork to compress examples with")
    about = belongs_to(system, run)
    if given.examples:
        gists = compress_examples(system, Path(given.examples))
    else:
        gists = load_gists(Path(given.gists_file), about, system.device, system.model.embed_tokens.weight.dtype)
    if given.save_gists:
        save_gists(Path(given.save_gists), gists, about)
        print(f"saved as {given.save_gists}, {Path(given.save_gists).stat().st_size:,} bytes")
    options = [option.strip() for option in (given.options or "").split(",") if option.strip()]
    if given.input is not None:
        print(answer(system, gists, given.input, options))
    elif not given.save_gists:
        for line in sys.stdin:
            if line.strip():
                print(answer(system, gists, line.strip(), options), flush=True)


# ------------------------------------------------------------------------------------------- the cost

LLAMA_2_7B = Config(32000, 4096, 32, 32, 32, 128, 11008, 1e-5, 10000.0, 4096)


def flops(c: Config, tokens: int, past: int = 0, logits: int = 0, rank: int = 0, kept: int = 0) -> int:
    """Floating-point operations of the matrix products of one forward pass; rank: of a LoRA set that acts.

    logits: at how many positions they are wanted; kept: at how many keys and values alone are wanted.
    As they are computed: every query against every key, also those that the causal mask hides.
    """
    q, kv = c.heads * c.head_size, c.kv_heads * c.head_size

    def linears(*shapes: tuple[int, int]) -> int:  # for one token
        return sum(2 * (m * n + rank * (m + n)) for m, n in shapes)

    made = linears((c.width, kv), (c.width, kv))  # keys and values
    asked = linears((c.width, q)) + 2 * 2 * (past + tokens) * q
    rest = linears((q, c.width), *[(c.width, c.hidden)] * 2, (c.hidden, c.width))
    if kept:  # the last layer but one goes on from the kept positions, and the last makes their keys and values alone
        return (c.layers - 1) * tokens * (made + asked) + ((c.layers - 2) * tokens + kept) * rest + kept * made
    layers = c.layers * tokens * (made + asked) + ((c.layers - 1) * tokens + logits) * rest
    return layers + 2 * logits * c.width * c.vocab


def print_cost(system: System, tasks: Sequence) -> None:
    """What examples cost in context, kept as keys and values, and as gists (compression included)."""
    args, formatter = system.args, system.formatter
    drawn = [task.evaluation(args.seed, 0, args.shots, 20)[0] for task in tasks]
    examples = round(statistics.fmean(len(formatter.context_row(e, budget=args.context - args.gists)[0]) for e in drawn))
    query = round(statistics.fmean(len(p) for e in drawn for p in ask(system, e, Condition(None))[0]))
    G = args.gists
    print(f"{examples} tokens of examples, {query} of a query (means of {args.data}), {G} gists; one logit row a query\n")
    adapted = args.rank if system.hyper.downstream else 0
    own = (args.model, system.model.config, system.model.embed_tokens.weight.element_size())
    for name, c, size in (own, ("Llama-2-7B, bf16", LLAMA_2_7B, 2)):
        bytes_of = 2 * c.layers * c.kv_heads * c.head_size * size  # of one token's keys and values
        ways = {  # once, per query, tokens kept
            "in context": (0, flops(c, examples + query, logits=1), 0),
            "examples kept": (flops(c, examples, kept=examples), flops(c, query, examples, 1), examples),
            "gists": (flops(c, examples + G, rank=args.rank, kept=G), flops(c, query, G, 1, adapted), G),
        }
        once, each, _ = ways["gists"]
        lines = [[name, "GFLOP once", "GFLOP a query", "bytes kept", "gists ahead after"]]
        for way, (first, then, kept) in ways.items():
            count = math.floor((once - first) / (then - each)) + 1 if then > each else 0
            after = f"{max(1, count):,} quer{'y' if count < 2 else 'ies'}" if then > each else "never"
            lines.append([way, f"{first / 1e9:,.2f}", f"{then / 1e9:,.3f}", f"{kept * bytes_of:,}", "" if way == "gists" else after])
        print_lines(lines)
        print()


# ---------------------------------------------------------------------------------------- the picture


def plot(runs: list[Path], path: Path, by: str | None = None) -> None:
    """Curves of several runs in one picture: over steps the held-out score where it was measured, else the loss;
    or, `by` an option of theirs (gists, shots), their results.

    Runs that differ only in their seed make one curve: the mean, and a band of one standard deviation.
    Baselines and controls are dashed.
    """
    import matplotlib  # slow to import, and only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points: dict[tuple[str, str], dict[float, list[float]]] = {}  # (run's name, column) -> x -> values
    kinds = set()
    for run in runs:
        args = read_args(run)
        name = args.get("init") or f"{args['task']} {args['method']} {args.get('downstream', '')} {Path(args['model']).name}"
        try:
            if by:
                results = json.loads((run / "results.json").read_text())
                kinds.add(METRICS[args["task"]])
                rows = [(args[by], {"main": results["average"]} | results["baselines"] | results["controls"])]
            else:
                lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
                measured = any("score" in line for line in lines)
                kinds.add(METRICS[args["task"]] if measured else "loss")
                key = "score" if measured else "loss"
                rows = [(line["step"], {"main": line[key]} | line.get("controls", {})) for line in lines if key in line]
        except (OSError, ValueError, KeyError) as problem:
            raise InputError(f"{run}: has no readable results or log ({problem})") from None
        for x, values in rows:
            for column, value in values.items():
                points.setdefault((name, column), {}).setdefault(x, []).append(value)
    if len(kinds) != 1:
        raise InputError(f"--plot: these runs have different things to draw: {', '.join(sorted(kinds))}")
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    alone = len({name for name, _ in points}) == 1
    heads = COLUMNS | ({"fewshot": "examples in context"} if by else {})  # as many as there were shots
    for (name, column), curve in points.items():
        xs = sorted(curve)
        means = np.array([statistics.fmean(curve[x]) for x in xs])
        sds = np.array([spread(curve[x]) or 0.0 for x in xs])
        label = name if column == "main" else heads[column].format(**args) if alone else f"{name}, {column}"
        style = {"linewidth": 1.8} if column == "main" else {"linewidth": 1.2, "linestyle": "--"}
        (line,) = axes.plot(xs, means, label=label, marker="o" if by else None, markersize=4, **style)
        axes.fill_between(xs, means - sds, means + sds, color=line.get_color(), alpha=0.15, linewidth=0)
    unit = {"loss": "loss per token", "accuracy": "accuracy on held-out rows, %", "rougeL": "ROUGE-L"}[kinds.pop()]
    axes.set(xlabel=by or "step", ylabel=unit)
    if by:
        every = sorted({x for curve in points.values() for x in curve})
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(x) for x in every])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=110)
    except OSError as problem:
        raise InputError(f"{path}: can't be written ({problem.strerror})") from None
    print(f"written: {path}")


# ---------------------------------------------------------------------- text, after hyperpretraining

WINDOWS = 64  # stretches of text to evaluate on


@torch.no_grad()
def evaluate_text(system: System, batches: TextBatches) -> dict:
    """Loss per token on C behind B (paper, Section 5): with the gists of A and D, without, with A and D in full.

    Returns what results.json holds. "kept" is the share of the context's benefit that the gists keep,
    in percent: (without - gists) / (without - in full).
    """
    args, began, G = system.args, time.time(), len(system.gist_ids)
    losses: dict[str, list[float]] = {name: [] for name in ("gists", "none", "full", "other")}
    count = min(WINDOWS, args.limit or WINDOWS)
    for start in tqdm(range(0, count, args.eval_batch_size), desc="evaluating", leave=False):
        size = min(args.eval_batch_size, count - start)
        # One row more: the gists of the next text are the control.
        more = batches(args.seed, range(start, start + size + 1), test=True).to(system.device)
        gists = system.hyper.compress(more.examples)
        rows = torch.arange(size, device=system.device)
        gists, others = gists[rows], gists[rows + 1]
        tokens, width = more.tokens[:size], more.tokens.shape[1]
        targets = more.targets.view(size + 1, -1)[:size, batches.inner :]
        full = read_rows(system, more.examples[:size, :-G].tolist(), system.hyper.hyper)
        full.seen = None  # all rows have the same length
        for name, prefix in {"gists": gists, "none": None, "full": full, "other": others}.items():
            before = {} if prefix is None else prefix.before(width)
            logits, _ = system.model(tokens, **before, adapter=system.hyper.downstream)
            on_c = logits[:, batches.inner :].float()  # BOS and B stand before it
            losses[name] += F.cross_entropy(on_c.transpose(1, 2), targets, reduction="none").mean(1).tolist()
    means = {name: statistics.fmean(found) for name, found in losses.items()}
    kept = 100 * (means["none"] - means["gists"]) / (means["none"] - means["full"])
    head = ["loss per token of C", "gists of A D", "no prefix", "A D in full", "other text's gists", "share kept"]
    print_lines([head, ["mean", *(f"{means[name]:.3f}" for name in losses), f"{kept:.0f} %"]])
    return {
        "task": args.task,
        "method": args.method,
        "metric": "loss",
        "tasks": {"text": {"mean": means["gists"], "std": None, "n": count}},
        "average": means["gists"],
        "baselines": {"zeroshot": means["none"], "fewshot": means["full"]},
        "controls": {"other_task": means["other"]},
        "kept": kept,
        "seconds": round(time.time() - began, 1),
        "args": vars(args),
    }


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
    add("--task", choices=list(METRICS), help="P3, Super-NaturalInstructions, symbol tuning, or compression hyperpretraining")
    add("--model", metavar="DIR", help="checkpoint: a Hugging Face or Meta folder (default: a tiny one)")
    add("--data", metavar="DIR", help="the task's data (default: the miniature's)")
    add("--method", choices=["hyper", "fewshot", "zeroshot"], default="hyper",
        help="HyperLlama; a language model with the examples in context; the same without examples")  # fmt: skip
    add("--gists", type=positive, default=16, help="gist tokens")
    add("--shots", type=positive, help="examples: 16 of p3, the first 2 of sni, 4 per class of symbol (in training 2 to 10)")
    add("--context", type=positive, default=1024, help="most tokens of examples and gists")
    add("--query-length", type=positive, default=384, help="most tokens of a query with its target")
    add("--instruction-downstream", action="store_true", help="sni: the definition also in the query (the paper's I)")
    add("--fuse-instruction", action="store_true",
        help="sni: the definition's own keys and values stay in the prefix beside the gists (HINT)")  # fmt: skip
    add("--words", metavar="FILE", help="symbol: words to use as labels (default: the tokenizer's whole words)")
    add("--quantize", action="store_true", help="hold the base in NF4")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--seed", type=int, default=0)
    # How to evaluate: these may differ between a run and its later evaluation (EVALUATION).
    add("--controls", action=argparse.BooleanOptionalAction, default=False,
        help="also without a prefix, with another task's, with mean-pooled keys and values, with fewer shots")  # fmt: skip
    add("--sets", type=positive, help="draws of examples, for mean and standard deviation")
    add("--limit", type=positive, help="rows of a held-out task to score (default: all)")
    add("--average", type=positive, metavar="N", help="p3: average the gists of N sets of examples")
    add("--concat", type=positive, metavar="N", help="p3: the gists of N sets of examples side by side")
    add("--score", choices=["sum", "mean"], default="sum", help="of an option's token log-probabilities")
    add("--eval-batch-size", type=positive, default=16, help="queries scored at a time")


MOVABLE = ("model", "data", "device", "dtype")  # the same model may lie elsewhere later
EVALUATION = ("controls", "sets", "limit", "score", "eval_batch_size", "average", "concat")


def run_command(main: Callable[[], None]) -> None:
    """Run a command; what the user can mend is said in one line, with exit status 2 (Ctrl-C: 130)."""
    try:
        main()
        sys.stdout.flush()
        return
    except BrokenPipeError:  # whoever reads the output, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    except (InputError, OSError) as problem:  # OSError: a full disk, a folder taken away
        message, status = f"error: {problem}", 2
    except torch.OutOfMemoryError as problem:
        advice = "a smaller --batch-size or --eval-batch-size may help"
        message, status = f"error: out of memory; {advice} ({str(problem).splitlines()[0]})", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(message, file=sys.stderr)
    sys.exit(status)


def write_json(path: Path, value: dict) -> None:
    """Atomic, like save_tensors."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: can't be written ({problem.strerror})") from None


DATA = {"p3": "P3", "sni": "natural-instructions", "symbol": "symbol", "hyperpretrain": "text", "prefix": "P3"}
SHOTS = {"p3": 16, "sni": 2, "symbol": 4, "hyperpretrain": 0, "prefix": 16}


def usual_options(task: str) -> dict:
    """Defaults that depend on the task."""
    model = "llama" if task == "hyperpretrain" else "llama-c"
    return {"model": str(TINY / model), "data": str(TINY / DATA[task]), "shots": SHOTS[task]}


def complete(args: argparse.Namespace) -> None:
    """Fill in what depends on the task, and refuse what doesn't go together."""
    for name, value in usual_options(args.task).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if (args.instruction_downstream or args.fuse_instruction) and (args.task != "sni" or args.method != "hyper"):
        raise InputError("--instruction-downstream and --fuse-instruction belong to --task sni and --method hyper")
    if (args.average or args.concat) and (args.task != "p3" or args.method != "hyper"):
        raise InputError("--average and --concat belong to --task p3 and --method hyper")
    if args.average and args.concat:
        raise InputError("--average and --concat exclude each other")
    if args.words and args.task != "symbol":
        raise InputError("--words belongs to --task symbol")
    if args.task == "hyperpretrain" and (args.method != "hyper" or args.quantize):
        raise InputError("--task hyperpretrain trains all parameters of a hypernetwork: no --quantize, no other --method")


def settings(argv: list[str] | None = None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """What to evaluate, as the arguments of a run or of a plain model; and what is asked of this command alone."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="folder of a finished run; without it, a plain Llama")
    add("--out", metavar="PATH", help="folder for results.json (default: the run's, or runs/eval-…); file for --plot")
    add("--examples", metavar="FILE", help="compress own examples (.jsonl: input, output) with the run's hypernetwork")
    add("--save-gists", metavar="FILE", help="keep the gists of --examples (.safetensors)")
    add("--gists-file", metavar="FILE", help="answer behind gists that were kept")
    add("--input", metavar="TEXT", help="what to answer (default: each line of stdin)")
    add("--options", metavar="A,B,…", help="answers to choose from (default: the model writes its own)")
    add("--cost", action="store_true", help="only print what gists cost and save")
    add("--table", nargs="+", metavar="DIR", help="only print a table of runs: a line for each folder of runs")
    add("--plot", nargs="+", metavar="RUN", help="only draw the curves of runs")
    add("--by", choices=["gists", "shots"], help="--plot: results by this option of the runs, rather than curves over steps")
    own = {option.dest for option in parser._actions}
    add_options(parser)
    plain = {option.dest: option.default for option in parser._actions if option.dest not in own}
    parser.set_defaults(**dict.fromkeys(plain))
    parsed = vars(parser.parse_args(argv))
    asked = argparse.Namespace(**{name: parsed.pop(name) for name in own - {"help"}})
    given = {name: value for name, value in parsed.items() if value is not None}
    if asked.table or asked.plot:
        return argparse.Namespace(), asked
    if asked.examples and asked.gists_file:
        raise InputError("--examples and --gists-file exclude each other")
    if asked.save_gists and not asked.examples:
        raise InputError("--save-gists needs --examples")
    if (asked.input is not None or asked.options) and not (asked.examples or asked.gists_file):
        raise InputError("--input and --options need --gists-file or --examples")
    if asked.run is None:
        args = argparse.Namespace(**plain | given)
        if args.task in (None, "hyperpretrain", "prefix") or args.method == "hyper" or asked.examples or asked.gists_file or asked.cost:
            raise InputError("name a RUN, or a plain Llama: --model DIR --task p3 --method fewshot (or zeroshot)")
        complete(args)
        args.sets = args.sets or (10 if args.task == "symbol" else 1)
        asked.out = asked.out or f"runs/eval-{args.task}-{args.method}"
        return args, asked
    for name in given.keys() - {*EVALUATION, *MOVABLE}:
        raise InputError(f"--{name.replace('_', '-')}: {asked.run} was trained with its own, which can't be changed")
    args = argparse.Namespace(**plain | read_args(Path(asked.run)) | given)
    complete(args)
    if args.task == "hyperpretrain" and "model" not in given:
        args.model = asked.run  # what was trained is a whole model
    several = f"average-{args.average}" if args.average else f"concat-{args.concat}" if args.concat else ""
    asked.out = asked.out or str(Path(asked.run) / several)  # beside the run's own result, not in its place
    return args, asked


def main() -> None:
    args, asked = settings()
    if asked.table:
        print(compare([Path(folder) for folder in asked.table]))
        return
    if asked.plot:
        plot([Path(run) for run in asked.plot], Path(asked.out or "runs/curves.png"), asked.by)
        return
    if args.task == "hyperpretrain":
        system = build(args, trained=False)
        results = evaluate_text(system, TextBatches(args.data, system.formatter, system.gist_ids))
    else:
        system = build(args, trained=asked.run is not None)
        if asked.run is not None:
            load_trained(system, Path(asked.run))
        if asked.examples or asked.gists_file:
            use(system, Path(asked.run), asked)
            return
        tasks = load_tasks(args, system.tokenizer, "test")
        if asked.cost:
            print_cost(system, tasks)
            return
        results = evaluate(system, *prepare(system, tasks))
    Path(asked.out).mkdir(parents=True, exist_ok=True)
    write_json(Path(asked.out) / "results.json", results)
    if system.formatter.report():
        print(system.formatter.report())


if __name__ == "__main__":
    run_command(main)
