"""Evaluation: held-out tasks by ranking or ROUGE-L, with the baselines and controls beside the number.

    python eval.py RUN                                     evaluate a run of train.py
    python eval.py --model DIR --task p3 --method fewshot  a plain Llama: a run of no steps

All that is compared differs only in what comes before a query: gists, the keys and values of the
examples themselves, or nothing. So one function answers for them all (`predict`), and one table says
what they are (MAIN, BASELINES, CONTROLS).

A score depends on the tokens that are read and on the weights that read them, and both make up its key
(`digest`). Equal work has an equal key and is done once: with a frozen model, no prefix is 0-shot.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hashlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import tasks
from data import Episode, Formatter, Task, report
from gist import Context, Gists, Rows, keep_all, label_anchors, mean_pooled, nothing, read_contexts
from llama import InputError, Llama, causal_mask_after, generate, int_tensor, ragged, reading

# fmt: off
from run import (
    MARK, MAX_NEW_TOKENS, Options, Parser, Run, add_options, all_gather_dict, check_out, default_folder,
    flag, lock, names_of, open_run, portable, print_lines, processes, read_args, read_lines, resolve_args,
    run_command, start_processes, write_json,
)
# fmt: on

# ------------------------------------------------------------------------------- choices, ranked


def choice_rows(prompts, choices, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of a prompt and then all its choices, [N, T] each. With two choices, a1 a2 a3 and b1 b2:

        tokens      prompt    a1 a2  b1        a choice's last token predicts nothing, and is left out
        branch      0 … 0     1  1   2         -1: padding
        positions   0 … p-1   p p+1  p         each choice goes on from the end of its prompt

    And where the tokens of all choices are predicted (a1 and b1 by the prompt's last token), as indices
    into N·T.
    """
    T = max(map(row_length, prompts, choices))
    rows, branches, positions, predictors = [], [], [], []
    for n, (prompt, own) in enumerate(zip(prompts, choices)):
        row = [*prompt]
        branch = [0] * len(prompt)
        position = [*range(len(prompt))]
        for number, choice in enumerate(own, 1):
            here = range(len(row), len(row) + len(choice) - 1)
            predictors += [n * T + len(prompt) - 1, *(n * T + t for t in here)]
            row += choice[:-1]
            branch += [number] * len(here)
            position += range(len(prompt), len(prompt) + len(here))
        rows.append(row)
        branches.append(branch)
        positions.append(position)
    padded = ragged(rows, device=device), ragged(branches, -1, device), ragged(positions, device=device)
    return *padded, int_tensor(predictors, device)


@torch.no_grad()
def score_choices(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    prefix: Gists,
    adapter: str | None = None,
    mean: bool = False,
) -> list[list[float]]:
    """Log-probability of each choice of each prompt: the sum over its tokens (`mean`: their mean).

    prefix: what comes before each of the N prompts. A choice sees its prompt and itself.
    """
    device = model.embed_tokens.weight.device
    tokens, branch, positions, predictors = choice_rows(prompts, choices, device)
    N, T = tokens.shape
    past = prefix.as_past(T, adapter)
    positions += past["offset"][:, None]
    mask = past["mask"]
    if mask is None:
        mask = causal_mask_after(torch.ones(N, prefix.length, dtype=torch.bool, device=device), T)
    mask[:, :, -T:] &= (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
    # The prompt's last token predicts the first token of each of its choices: one logit row serves them all.
    select, logit_row = predictors.unique(return_inverse=True)
    logits = model(tokens, **past | {"offset": positions, "mask": mask}, select=select)[0].float()

    flat = [choice for own in choices for choice in own]
    targets = int_tensor([token for choice in flat for token in choice], device)
    log_probs = logits[logit_row, targets] - logits.logsumexp(-1)[logit_row]
    parts = log_probs.split([len(choice) for choice in flat])
    scores = torch.stack([part.mean() if mean else part.sum() for part in parts])
    if not scores.isfinite().all():
        raise InputError("a query's scores aren't finite: the model or its adapters hold NaN or inf")
    return [of_prompt.tolist() for of_prompt in scores.split([len(own) for own in choices])]


def row_length(prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> int:
    return len(prompt) + sum(len(choice) - 1 for choice in choices)


# ------------------------------------------------------------------------------------ what is compared

# What comes before a query, in two steps: a context, the tokens that are read, of (run, episode); and a
# prefix, their keys and values, of (run, contexts of several episodes, LoRA set).


def gist_context(run: Run, episode: Episode) -> list:
    """The rows that the hypernetwork reads."""
    return run.hyper.compression.contexts(run.formatter, episode, run.hyper.gist_ids)


def compress(run: Run, contexts: Sequence[list], adapter: str | None) -> Gists:
    pieces = [Rows.of(rows, run.device) for rows in zip(*contexts)]
    return run.hyper.compression.prefix(run.hyper, pieces)


def shots_context(run: Run, episode: Episode) -> list[Context]:
    """All examples as they are: few-shot prompting."""
    episode = one_set(run, episode)
    room = run.args.context - longest_query(run.formatter, episode)
    return [keep_all(run.formatter.context_tokens(episode, room))]


def one_set(run: Run, episode: Episode) -> Episode:
    """Where gists stand for several sets of examples: with one of these."""
    if run.hyper.compression.parts == 1:
        return episode
    return replace(episode, shots=episode.shots[: run.args.shots])


def longest_query(formatter: Formatter, episode: Episode) -> int:
    """Tokens that an episode's longest query needs after examples in context, with its longest choice."""
    prompts, choices = encode_queries(formatter, episode, "continues")
    return max(len(p) + max(map(len, own), default=0) for p, own in zip(prompts, choices))


def read(run: Run, contexts: Sequence[list[Context]], adapter: str | None) -> Gists:
    return read_contexts(run.hyper.model, [row for (row,) in contexts], adapter)


def pool(run: Run, contexts: Sequence[list[Context]], adapter: str | None) -> Gists:
    """A control: the keys and values of all examples, averaged to as many as there are gists."""
    return mean_pooled(read(run, contexts, None), len(run.hyper.gists), run.hyper.model.config)


def anchor_context(run: Run, episode: Episode) -> list[Context]:
    return [label_anchors(run.formatter, one_set(run, episode))]


def fewer_context(run: Run, episode: Episode) -> list[Context]:
    """A control: whole examples in as many raw tokens as there are gists; at least one."""
    bare = replace(episode, instruction="")
    one = run.formatter.context_tokens(replace(bare, shots=bare.shots[:1]))
    return [keep_all(run.formatter.context_tokens(bare, budget=max(len(one), len(run.hyper.gists))))]


def tuned(run: Run, contexts: Sequence[int], adapter: str | None) -> Gists:
    """Prefix tuning: nothing is read, the task has a prefix. contexts: its number, for each episode."""
    return run.task.prefix_of(run, contexts[0])[int_tensor([0] * len(contexts), run.device)]


@dataclass(frozen=True)
class Column:
    """One column of the table."""

    title: str
    context: Callable | None = None  # what comes before a query, as above; None: nothing is read
    prefix: Callable | None = None  # None: nothing comes before a query
    trained: bool = True  # whether the run's own LoRA set answers; else the model without it does
    base: bool = False  # whether the model answers as it was before hyperpretraining (Run.base)
    instruct: str | None = None  # what a query begins with (Formatter.query); None: as the run's options say
    other: bool = False  # whether the context is that of another task


MAIN = {
    "hyper": Column("gists", gist_context, compress),
    "fewshot": Column("fewshot", shots_context, read, instruct="continues"),
    "zeroshot": Column("zeroshot", instruct="before"),
}
BASELINES = {  # the model before any step of the run; "base_…": before hyperpretraining, too
    "zeroshot": Column("0-shot", trained=False, instruct="before"),
    "fewshot": Column("{shots}-shot", shots_context, read, trained=False, instruct="continues"),
    "label_anchors": Column("label anchors", anchor_context, read, trained=False),
}
BASELINES |= {
    "base_fewshot": replace(BASELINES["fewshot"], title="base, {shots}-shot", base=True),
    "base_label_anchors": replace(BASELINES["label_anchors"], title="base, label anchors", base=True),
}
CONTROLS = {  # of a hypernetwork
    "no_prefix": Column("no prefix"),
    "other_task": Column("other task", gist_context, compress, other=True),
    "mean_pooled": Column("mean-pooled", shots_context, pool),
    "fewer_shots": Column("fewer shots", fewer_context, read, trained=False, instruct="continues"),
}
TITLES = {name: column.title for name, column in (BASELINES | CONTROLS).items()}
TITLES |= {"main": "{method}", "copy_input": "copy input", "copy_example": "copy example"}


def columns(run: Run, tasks: Sequence[Task]) -> dict[str, Column]:
    """The number itself ("main"), the untouched model, and what a hypernetwork has to be better than."""
    plain = {name: BASELINES[name] for name in ("zeroshot", "fewshot")}
    if run.task.prefix_of:
        return {"main": Column("prefix", prefix=tuned)} | plain
    main = {"main": MAIN[run.args.method]}
    if run.args.method != "hyper" or not run.args.controls:
        return main | plain
    several = len({task.group for task in tasks}) > 1
    return main | {
        name: column
        for name, column in (BASELINES | CONTROLS).items()
        if (several or not column.other) and (run.base_folder or not column.base)
    }


# -------------------------------------------------------------------------------------- queries, scored


class Encoded(NamedTuple):
    """An episode as one column reads it: its context, and tokens of each query's prompt and choices."""

    context: object
    prompts: list[list[int]]
    choices: list[list[list[int]]]


def encode_queries(formatter: Formatter, episode: Episode, instruct: str = "no"):
    """Prompts, and the choices of each (none where answers are generated)."""
    prompts, choices = [], []
    for query in episode.queries:
        own = [formatter.target(episode, choice) for choice in query.choices]
        budget = formatter.query_length - max(map(len, own), default=0)
        prompts.append(formatter.query(episode, query, budget, instruct))
        choices.append(own)
    return prompts, choices


def encode(
    run: Run, column: Column, episodes: list[Episode], others: list[Episode], t: int = 0
) -> list[Encoded]:
    """Episodes of task number t as tokens. others: of another task, whose context a control takes."""
    instruct = column.instruct or run.instruct
    encoded = []
    for i, episode in enumerate(episodes):
        source = others[i % len(others)] if column.other else episode
        context = column.context(run, source) if column.context else t  # (a tuned prefix is its task's)
        encoded.append(Encoded(context, *encode_queries(run.formatter, episode, instruct)))
    return encoded


def context_length(context) -> int:
    """How many tokens are read before the queries."""
    return sum(len(row.tokens) for row in context) if isinstance(context, list) else 0


def token_batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of rows that are computed together: alike in length, at most so many tokens with padding."""
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[i] > most:
            yield rows
            rows = []
        rows.append(i)
    yield rows


@torch.no_grad()
def predict(run: Run, column: Column, episodes: list[Episode], encoded: list[Encoded]) -> list[str]:
    """The answer to each query: its best-scored choice, or what the model writes."""
    most = run.args.eval_tokens
    adapter = run.hyper.downstream_adapter if column.trained else None
    answers = {}  # (episode, query) -> text
    for part in token_batches([context_length(item.context) for item in encoded], most):
        contexts = [encoded[e].context for e in part]
        prefix = column.prefix(run, contexts, adapter) if column.prefix else nothing(run.device)
        # Each query that is asked after one of these: its row of the prefix, its episode, its number there.
        asked = [(row, e, q) for row, e in enumerate(part) for q in range(len(episodes[e].queries))]
        prompts = [encoded[e].prompts[q] for _, e, q in asked]
        choices = [encoded[e].choices[q] for _, e, q in asked]
        longest = [row_length(p, c) if c else len(p) + MAX_NEW_TOKENS for p, c in zip(prompts, choices)]
        for chosen in token_batches([prefix.length + length for length in longest], most):
            queries = [asked[i] for i in chosen]
            before = prefix[int_tensor([row for row, _, _ in queries], run.device)]
            batch = [prompts[i] for i in chosen]
            if choices[chosen[0]]:
                own = [choices[i] for i in chosen]
                mean = run.args.score == "mean"
                scores = score_choices(run.hyper.model, batch, own, before, adapter, mean)
                best = [of_query.index(max(of_query)) for of_query in scores]
                texts = [episodes[e].queries[q].choices[n] for (_, e, q), n in zip(queries, best)]
            else:
                texts = write_answers(run, episodes[part[0]], batch, before, adapter)
            answers |= {(e, q): text for (_, e, q), text in zip(queries, texts)}
    return [answers[key] for key in sorted(answers)]


def write_answers(run: Run, episode: Episode, prompts, prefix: Gists, adapter: str | None) -> list[str]:
    """The model's own answers to prompts in the episode's layout. prefix: what comes before each of them."""
    tokenizer = run.formatter.tokenizer
    past = prefix.as_past(max(map(len, prompts)), adapter)
    until = tokenizer.encode(episode.layout.end)
    rows = generate(run.hyper.model, prompts, MAX_NEW_TOKENS, tokenizer.eos, until, **past)
    # (A token may hold the end of an answer and the beginning of `until`, as ".\n\n" does.)
    return [tokenizer.decode(row).partition(episode.layout.end)[0].strip() for row in rows]


# ----------------------------------------------------------------------------------- everything, scored


@dataclass
class HeldOut:
    """Tasks to evaluate on."""

    tasks: Sequence[Task]
    episodes: list[list[list[Episode]]]  # draw of examples -> task -> episodes
    left_out: Counter[str]  # what didn't fit into what the run itself reads, counted
    shots: list[dict[str, float]]  # task -> "hyper", "fewshot" -> how many examples could be read (mean)
    all_read: bool = True  # whether these are all examples
    digests: dict[tuple[str, int, int], str] = field(default_factory=dict)  # of (column, task, draw), so far
    scores: dict[str, float] = field(default_factory=dict)  # digest and step -> mean score, so far

    @property
    def sizes(self) -> list[int]:
        return [sum(len(episode.queries) for episode in task) for task in self.episodes[0]]

    def other(self, t: int) -> int:
        """By name, the next task of another group (itself, where there is none)."""
        tasks = self.tasks
        order = sorted(range(len(tasks)), key=lambda i: (tasks[i].name <= tasks[t].name, tasks[i].name))
        return next((i for i in order if tasks[i].group != tasks[t].group), t)


def draw_held_out(run: Run) -> HeldOut:
    """Draw the episodes. Done before training, so that a bad row or query is found in time."""
    args = run.args
    held_out = run.task.load(args, run.formatter, "test")
    instruct = MAIN[args.method].instruct or run.instruct
    count = args.shots * run.hyper.compression.parts
    left_out = Counter()
    all_read = True
    shots = []
    episodes = [[] for _ in range(args.sets)]
    for t, task in enumerate(tqdm(held_out, desc="preparing held-out tasks", leave=False, delay=1)):
        for n in range(args.sets):
            episodes[n].append(task.evaluation(args.seed, n, count, args.limit or None))
        for episode in episodes[0][t]:
            encode_queries(replace(run.formatter, left_out=left_out), episode, instruct)
        drawn = [episode for draw in episodes for episode in draw[t]]
        shots.append({})
        for name, context in (("hyper", gist_context), ("fewshot", shots_context)):
            counts = Counter()
            counting = replace(run, formatter=replace(run.formatter, left_out=counts))
            for episode in drawn:
                context(counting, episode)
            shots[t][name] = (counts["shots"] - counts["shots left out"]) / len(drawn)
            if args.method in (name, "hyper"):
                all_read = all_read and not counts["shots left out"]
            if args.method == name:  # (its queries are counted above)
                left_out.update({what: n for what, n in counts.items() if "queries" not in what})
    return HeldOut(held_out, episodes, left_out, shots, all_read)


def digest(run: Run, column: Column, episodes: list[Episode], others: list[Episode], t: int) -> str:
    """Of all that a score depends on but the step: the tokens read, and the weights that read them."""
    run = run.base if column.base else run
    encoded = encode(run, column, episodes, others, t)
    adapter = run.hyper.downstream_adapter if column.trained else None
    model = run.hyper.model
    held = (model.checksum, str(model.embed_tokens.weight.dtype), run.args.quantize, run.args.gists)
    how = (column.prefix and column.prefix.__name__, adapter, run.args.score, held)
    right = [(query.target, query.references) for episode in episodes for query in episode.queries]
    return hashlib.sha256(repr((how, encoded, right, trained_by(run, column))).encode()).hexdigest()


def trained_by(run: Run, column: Column) -> str | None:
    """The options that trained the weights that a column uses; None where it uses the base alone."""
    trained_set = column.trained and run.hyper.downstream_adapter
    trains_base = run.hyper.model.embed_tokens.weight.requires_grad
    if column.prefix not in (compress, tuned) and not trained_set and not trains_base:
        return None
    names = ["data", *sorted(names_of("model", "parts", "course"))]
    return repr([(name, vars(run.args)[name]) for name in names])


def score_all(
    run: Run, held_out: HeldOut, table: dict[str, Column], draws: int, step: int, out: Path | None = None
) -> dict[str, list[list[float]]]:
    """The mean score: column -> task -> draw. Under torchrun, the work is divided among the processes.

    What has an equal key is scored once: 0-shot with each draw of examples, say, or the last measurement
    along the way and the result. step: how many steps the model has been trained. out: a folder that keeps
    what is done until all is, so that an interrupted evaluation goes on.
    """
    rank, world = processes()
    work = {}  # key -> the first (column, task, draw) that has it
    keys = {}
    for name, t, n in product(table, range(len(held_out.tasks)), range(draws)):
        column = table[name]
        episodes = held_out.episodes[n]
        item = (name, t, n)
        if item not in held_out.digests:
            held_out.digests[item] = digest(run, column, episodes[t], episodes[held_out.other(t)], t)
        keys[item] = f"{held_out.digests[item]} {step if trained_by(run, column) else 0}"
        work.setdefault(keys[item], item)
    for path in out.glob("scores-*.jsonl") if out else ():
        held_out.scores |= {key: score for key, score in read_lines(path)}
    scores = held_out.scores = all_gather_dict(held_out.scores)

    todo = [key for key in work if key not in scores][rank::world]
    queries = sum(held_out.sizes[work[key][1]] for key in todo)
    with tqdm(total=queries, desc="evaluating", unit="query", leave=False, disable=rank > 0) as bar:
        for key in todo:
            name, t, n = work[key]
            episodes = held_out.episodes[n]
            scores[key] = fmean(score(run, table[name], episodes[t], episodes[held_out.other(t)], t))
            with open(out / f"scores-{rank}.jsonl" if out else os.devnull, "a") as kept:
                print(json.dumps([key, scores[key]]), file=kept)
            bar.update(held_out.sizes[t])
    scores = held_out.scores = all_gather_dict(scores)
    return {
        name: [[scores[keys[name, t, n]] for n in range(draws)] for t in range(len(held_out.tasks))]
        for name in table
    }


def score(
    run: Run, column: Column, episodes: list[Episode], others: list[Episode], t: int = 0
) -> list[float]:
    """A score in percent for each query of task number t: whether the best choice is right, or ROUGE-L."""
    run = run.base if column.base else run
    queries = [query for episode in episodes for query in episode.queries]
    answers = predict(run, column, episodes, encode(run, column, episodes, others, t))
    return [run.task.score(answer, query) for answer, query in zip(answers, queries)]


# ------------------------------------------------------------------------------------------ the result


def evaluate(run: Run, held_out: HeldOut, out: Path | None = None) -> tuple[dict, list[list[str]]]:
    """Score everything under every column. Returns what results.json holds, and the lines of the table."""
    args = run.args
    began = time.monotonic()
    table = columns(run, held_out.tasks)
    draws = len(held_out.episodes)
    scores = score_all(run, held_out, table, draws, args.steps, out)
    first = {}  # the first column of each kind: with a frozen model, the control without a prefix is 0-shot
    for name in table:
        first.setdefault(tuple(held_out.digests[name, t, 0] for t in range(len(held_out.tasks))), name)
    scores |= run.task.without_a_model(held_out.episodes[0])
    averages = {name: average(run, held_out, values) for name, values in scores.items()}
    anchors = [name for name in averages if "label_anchors" in name]
    hidden = set(anchors) - {max(anchors, key=averages.get, default=None)}  # the better one is shown
    hidden |= {name for name in CONTROLS if name not in first.values()}
    shown = [name for name in scores if name not in hidden]
    results = {
        "task": args.task,
        "method": args.method,
        "metric": run.task.METRIC,
        "tasks": {
            task.name: {"mean": fmean(values), "std": spread(values), "n": size, "shots": shots}
            for task, values, size, shots in zip(
                held_out.tasks, scores["main"], held_out.sizes, held_out.shots
            )
        },
        "average": averages.pop("main"),
        "std": spread(draw_averages(run, held_out, scores["main"])),
        "before": None,
        "shots": {name: fmean(shots[name] for shots in held_out.shots) for name in ("hyper", "fewshot")},
        "baselines": {name: averages.pop(name) for name in list(averages) if name not in CONTROLS},
        "controls": averages,
        "seconds": round(time.monotonic() - began, 1),
        "args": portable(args),
    }
    return results, result_table(run, held_out, {name: scores[name] for name in shown})


def measure(run: Run, held_out: HeldOut, step: int) -> dict:
    """Scores along the way, with the first draw of examples: of the run itself and its controls.

    Before the first step also "before": the score with all draws, as in results.json.
    """
    table = {name: column for name, column in columns(run, held_out.tasks).items() if name not in BASELINES}
    before = {}
    if step == 0:
        main = score_all(run, held_out, {"main": table["main"]}, len(held_out.episodes), step)["main"]
        before = {"before": average(run, held_out, main)}
    scores = score_all(run, held_out, table, draws=1, step=step)
    averages = {name: round(average(run, held_out, values), 2) for name, values in scores.items()}
    each = {task.name: round(value, 2) for task, (value,) in zip(held_out.tasks, scores["main"])}
    return {"score": averages.pop("main"), "controls": averages, "scores": each} | before


def draw_averages(
    run: Run, held_out: HeldOut, scores: list[list[float]], chosen: Sequence[int] | None = None
) -> list[float]:
    """Of each draw: the mean over all instances (ROUGE-L), or over a group's tasks and then over groups.

    scores: task -> draw. chosen: the numbers of the tasks that count.
    """
    chosen = range(len(scores)) if chosen is None else chosen
    group_sizes = Counter(held_out.tasks[t].group for t in chosen)
    weights = [1 / group_sizes[held_out.tasks[t].group] for t in chosen]
    if run.task.METRIC == "rougeL":
        weights = [held_out.sizes[t] for t in chosen]
    draws = zip(*(scores[t] for t in chosen))
    return [math.fsum(w * x for w, x in zip(weights, draw)) / math.fsum(weights) for draw in draws]


def average(run: Run, held_out: HeldOut, scores: list[list[float]]) -> float:
    return fmean(draw_averages(run, held_out, scores))


def spread(draws: list[float]) -> float | None:
    return stdev(draws) if len(draws) > 1 else None


MOST_LINES = 12  # of a table, before groups are put together


def result_table(run: Run, held_out: HeldOut, scores: dict[str, list[list[float]]]) -> list[list[str]]:
    """A row per group (of many: per first word of their names), a column per condition; ± is over draws.

    Where some examples didn't fit, also how many were read, by gists and in context.
    """
    unit = {"accuracy": "accuracy, %", "rougeL": "ROUGE-L"}[run.task.METRIC]
    unit += f", first {run.args.limit} of each" * bool(run.args.limit)
    read = {name: fmean(shots[name] for shots in held_out.shots) for name in ("hyper", "fewshot")}
    fields = {"shots": f"{read['fewshot']:.3g}", "method": columns(run, held_out.tasks)["main"].title}
    heads = ["examples read"] * (not held_out.all_read) + [TITLES[name].format(**fields) for name in scores]
    lines = [[unit, "queries", *heads]]
    groups = [task.group for task in held_out.tasks]
    if len(set(groups)) > MOST_LINES:
        groups = [group.split("_")[0] for group in groups]
    for group in [*dict.fromkeys(groups), None]:
        chosen = [t for t, name in enumerate(groups) if group in (name, None)]
        line = ["average" if group is None else group + f" ({len(chosen)} tasks)" * (len(chosen) > 1)]
        line.append(f"{sum(held_out.sizes[t] for t in chosen):,}")
        if not held_out.all_read:
            line.append(", ".join(f"{fmean(held_out.shots[t][name] for t in chosen):.3g}" for name in read))
        for name, values in scores.items():
            draws = draw_averages(run, held_out, values, chosen)
            line.append(f"{fmean(draws):.1f}")
            if name == "main" and spread(draws) is not None:
                line[-1] += f" ± {spread(draws):.1f}"
        lines.append(line)
    return lines


def show_answers(run: Run, held_out: HeldOut, count: int = 3) -> None:
    """Print the answers to a few held-out questions, of different tasks."""
    column = columns(run, held_out.tasks)["main"]
    draw = held_out.episodes[0]
    for t in range(0, len(draw), -(-len(draw) // count)):
        episode = replace(draw[t][0], queries=draw[t][0].queries[:1])
        (query,) = episode.queries
        encoded = encode(run, column, [episode], draw[held_out.other(t)], t)
        (answer,) = predict(run, column, [episode], encoded)
        right = answer in (query.references or (query.target,))
        print(" ".join(query.input.split())[-100:])
        print(f"    {' '.join(answer.split())[:100]}  ({'right' if right else f'wrong: {query.target}'})")


# ---------------------------------------------------------------------------------------- the command


def parse(argv: list[str] | None = None) -> tuple[Options, Path | None, Path]:
    """What to evaluate; the finished run's folder, if it is one; the folder for the results."""
    parser = Parser(__doc__)
    parser.add_argument("folder", nargs="?", metavar="RUN", help="a finished run; without it, a plain Llama")
    parser.add_argument("--out", metavar="DIR", help="folder for results.json (the run's, or runs/eval-…)")
    add_options(parser, "eval", "place", "parts")
    add_options(parser.add_argument_group("for a plain Llama (a RUN has its own)"), "model", "course")
    typed = vars(parser.parse_args(argv))
    folder = typed.pop("folder", None)
    out = typed.pop("out", None)
    if out == "":
        raise InputError("--out: an empty name")
    if folder is None:
        plain = {"task", "method"} <= typed.keys() and typed["method"] != "hyper"
        if not plain or tasks.find(typed["task"]).prefix_of or tasks.find(typed["task"]).evaluate:
            raise InputError(
                "name a RUN, or a plain Llama: --model DIR --task p3 --method fewshot (or zeroshot)"
            )
        args = resolve_args(typed | {"steps": 0})
        return args, None, Path(out or default_folder(args).replace("runs/", "runs/eval-"))
    folder = Path(folder)
    ways = typed.keys() & names_of("parts")
    for name in typed.keys() - names_of("eval", "place", "parts"):
        raise InputError(f"{flag(name)}: {folder} was trained with its own, which can't be changed")
    before = read_args(folder)
    # How the training was evaluated is not inherited; nor how it combined sets, where another way is named.
    dropped = names_of("eval", "parts") if ways else names_of("eval")
    args = resolve_args(typed, {name: value for name, value in before.items() if name not in dropped})
    beside = [f"{way}-{typed[way]}" for way in sorted(ways)]  # the run's own result stays
    if "data" in typed and typed["data"] != before["data"] and Path(before["data"]).exists():
        beside.append(f"data-{Path(typed['data']).name}")
    return args, folder, Path(out or folder / "-".join(beside))


def take_folder(out: Path, folder: Path | None, args: Options) -> None:
    """Lock the run's folder and that of the results; InputError where these would replace something else."""
    check_out(out)
    own = folder is not None and os.path.realpath(out) == os.path.realpath(folder)
    if folder is not None:
        lock(folder, only_read=not own)
    if own:
        return
    if (out / "args.json").exists():
        raise InputError(f"--out {out}: holds another run, whose results would be replaced")
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise InputError(f"--out {out}: holds something that no run wrote, so it isn't used")
    lock(out)
    (out / MARK).touch()
    path = out / "results.json"
    with reading(path, "not the results of a run"):
        before = json.loads(path.read_text()).get("args", {}).get("data") if path.exists() else None
    if before not in (None, portable(args)["data"]):  # two folders can have the same last name
        raise InputError(f"--out {out}: holds the results of {before}; another name keeps both")


def save_results(results: dict, lines: list[list[str]], left_out: Counter, out: Path) -> None:
    """Write results.json, then print the table: what is printed may go nowhere."""
    write_json(out / "results.json", results)
    for path in out.glob("scores-*.jsonl"):  # of an evaluation that wasn't finished
        path.unlink()
    print_lines(lines)
    if report(left_out):
        print(report(left_out))


def main() -> None:
    args, folder, out = parse()
    rank, _ = start_processes()
    if rank == 0:
        take_folder(out, folder, args)
    run = open_run(args, folder)
    left_out = Counter()
    if run.task.evaluate:
        results, lines = run.task.evaluate(run)
    else:
        held_out = draw_held_out(run)
        left_out = held_out.left_out
        results, lines = evaluate(run, held_out, out)
    if rank == 0:
        save_results(results, lines, left_out, out)
        print(f"written: {out / 'results.json'}")


if __name__ == "__main__":
    run_command(main)
