"""Evaluation: held-out tasks by option ranking or ROUGE-L, with the baselines and controls beside the number.

    python eval.py RUN                                     evaluate a run of train.py
    python eval.py --model DIR --task p3 --method fewshot  a plain Llama: a run of no steps

All that is compared differs only in the prefix that comes before a query: gists, the keys and values
of the examples themselves, or nothing. So one function answers for them all (`respond`), and one table
says what they are (MAIN, BASELINES, CONTROLS).
"""

from tools import at_once, everybodys, print_lines, processes, run_command, start_processes  # isort: skip  first: Ctrl-C during the other imports is one line, too

import argparse
import hashlib
import json
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import Episode, Formatter, Row, Task, report
from gist import Gists, combine, mean_pooled, read_rows, trained
from llama import InputError, Llama, generate, holes_mask, ragged, reading, tensor
from lora import read_lines, write_json
from tasks import EVALUATION, MAX_NEW_TOKENS, MOVABLE, TASKS, WAYS, Parser, Run, add_options, open_run, portable, read_args, settle, several
from tools.folder import UNFINISHED, check_writable

# ------------------------------------------------------------------------------- options, ranked


@torch.no_grad()
def score_options(
    model: Llama, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]],
    prefix: Gists | None = None, adapter: str | None = None, mean: bool = False,
) -> list[list[float]]:  # fmt: skip
    """Log-probability of each option of each prompt: the sum over its tokens (`mean`: their mean).

    prefix: what comes before each of the N prompts. A row is a prompt and then all its options: each goes on from
    the end of the prompt, at the same positions, and sees the prompt and itself. So nothing is read twice.
    """
    T, device = max(map(row_length, prompts, options)), model.embed_tokens.weight.device
    rows, branches, places, predictors = [], [], [], []
    for n, (prompt, choices) in enumerate(zip(prompts, options)):
        row, branch, place = [*prompt], [0] * len(prompt), [*range(len(prompt))]  # tokens, whose they are (0: the prompt's), positions
        for number, option in enumerate(choices, 1):
            here = range(len(row), len(row) + len(option) - 1)  # its last token predicts nothing, and is left out
            predictors += [n * T + len(prompt) - 1, *(n * T + t for t in here)]
            row += option[:-1]
            branch += [number] * len(here)
            place += range(len(prompt), len(prompt) + len(here))
        rows.append(row)
        branches.append(branch)
        places.append(place)
    select, at = tensor(predictors, device).unique(return_inverse=True)  # the prompt's end predicts for all options
    tokens, branch, place = ragged(rows, device=device), ragged(branches, -1, device), ragged(places, device=device)

    past, offset, seen = (prefix.past, prefix.offset, prefix.seen) if prefix else (None, torch.zeros_like(place[:, 0]), None)
    seen = torch.ones(len(rows), past[0][0].shape[2] if past else 0, device=device).bool() if seen is None else seen
    mask = holes_mask(seen, T)
    mask[:, :, -T:] &= (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
    adapter = prefix.acting(adapter) if prefix else adapter
    logits = model(tokens, past=past, offset=offset[:, None] + place, adapter=adapter, mask=mask, select=select)[0].float()

    flat = [option for choices in options for option in choices]
    targets = tensor([token for option in flat for token in option], device)
    gains = (logits[at, targets] - logits.logsumexp(-1)[at]).split([len(option) for option in flat])
    values = iter(torch.stack([gain.mean() if mean else gain.sum() for gain in gains]).tolist())
    return [[next(values) for _ in choices] for choices in options]


def row_length(prompt: Sequence[int], options: Sequence[Sequence[int]]) -> int:
    return len(prompt) + sum(len(option) - 1 for option in options)


# ------------------------------------------------------------------------------------ what is compared


@dataclass(frozen=True)
class Column:
    """One column of the table.

    prefix    what comes before the query: a function below, of (run, episodes, number of the task, LoRA set); None: nothing
    trained   whether the run's own LoRA set answers; else the base does
    instruct  whether and where the instruction stands in the query itself ("no", "inside", "before": Formatter.query);
              None: as --instruction-downstream says
    other     whether the prefix is that of another task
    bos       whether the query begins with a BOS of its own; it has none after examples, which have theirs
    drawn     whether the prefix depends on which examples were drawn
    """

    title: str
    prefix: Callable | None
    trained: bool = True
    instruct: str | None = None
    other: bool = False
    bos: bool = True
    drawn: bool = True

    def asks(self, run: Run) -> str:
        return self.instruct or ("inside" if run.args.instruction_downstream else "no")

    def fixed(self, run: Run) -> bool:
        """Whether training leaves its scores as they are: nothing that is trained makes the prefix or the answer."""
        untrained = self.prefix in (None, in_context, pooled, fewer) and not (self.trained and run.hyper.answerer)
        return untrained and not run.hyper.model.embed_tokens.weight.requires_grad  # (hyperpretraining trains all)

    def same(self, run: Run, column: "Column", instructed: bool) -> bool:
        """Whether another column asks and answers in the same way: with a frozen downstream model, no prefix is 0-shot."""
        mine, theirs = (
            (c.prefix, run.hyper.answerer if c.trained else None, c.other, c.bos, instructed and c.asks(run)) for c in (self, column)
        )
        return mine == theirs


@torch.no_grad()
def compressed(run: Run, episodes: list[Episode], t: int, adapter: str | None) -> Gists:
    """Gists: those of each episode's examples, or (--average, --concat, --chain) of several sets of examples."""
    hyper, way = run.hyper, several(run.args)[0]
    if way:
        (episode,) = episodes
        return combine(hyper, [run.formatter.context_row(piece, hyper.gist_ids).tokens for piece in pieces(run, episode)], way)
    rows = [run.formatter.context_row(episode, hyper.gist_ids) for episode in episodes]
    kept = torch.tensor([row.lead for row in rows], device=run.device) if run.args.fuse_instruction else None
    return hyper.compress(ragged([row.tokens for row in rows], device=run.device), kept=kept)


def pieces(run: Run, episode: Episode) -> list[Episode]:
    """The sets of examples that are compressed one by one."""
    return episode.split(several(run.args)[1])


def one_set(run: Run, episode: Episode) -> Episode:
    """As many examples as without --average and the like: what is read in context."""
    return replace(episode, shots=episode.shots[: run.args.shots]) if several(run.args)[0] else episode


def in_context(run: Run, episodes: list[Episode], t: int, adapter: str | None) -> Gists:
    """All examples as they are: few-shot prompting."""
    episodes = [one_set(run, episode) for episode in episodes]
    rows = [run.formatter.context_row(e, budget=run.args.context - longest(run.formatter, e)).tokens for e in episodes]
    return read_rows(run.hyper.model, rows, adapter)


def fewer(run: Run, episodes: list[Episode], t: int, adapter: str | None) -> Gists:
    """Whole examples in as many raw tokens as there are gists; at least one."""
    bare, G = [replace(episode, instruction="") for episode in episodes], len(run.hyper.gists)
    ones = [len(run.formatter.context_row(replace(e, shots=e.shots[:1])).tokens) for e in bare]
    rows = [run.formatter.context_row(e, budget=max(n, G)).tokens for e, n in zip(bare, ones)]
    return read_rows(run.hyper.model, rows, adapter)


def pooled(run: Run, episodes: list[Episode], t: int, adapter: str | None) -> Gists:
    """A control: the base's keys and values of all examples, averaged to as many as there are gists."""
    return mean_pooled(in_context(run, episodes, t, None), len(run.hyper.gists))


MAIN = {
    "hyper": Column("hyper", compressed),
    "fewshot": Column("fewshot", in_context, instruct="no", bos=False),
    "zeroshot": Column("zeroshot", None, instruct="before", drawn=False),
}
BASELINES = {  # the untouched model
    "zeroshot": Column("0-shot", None, trained=False, instruct="before", drawn=False),
    "fewshot": Column("{shots}-shot", in_context, trained=False, instruct="no", bos=False),
}
CONTROLS = {  # of a hypernetwork
    "no_prefix": Column("no prefix", None, drawn=False),
    "other_task": Column("other task", compressed, other=True),
    "mean_pooled": Column("mean-pooled", pooled),
    "fewer_shots": Column("fewer shots", fewer, trained=False, instruct="no", bos=False),
}
TITLES = {name: column.title for name, column in (BASELINES | CONTROLS).items()}
TITLES |= {"main": "{method}", "copy_input": "copy input", "copy_example": "copy example"}


def columns(run: Run, tasks: Sequence[Task]) -> dict[str, Column]:
    """The number itself ("main"), the untouched model, and what a hypernetwork has to be better than."""
    own = getattr(run.task, "prefix_of", None)  # prefix tuning brings prefixes of its own
    if own:
        return {"main": Column("prefix", own, drawn=False)} | BASELINES
    controls = CONTROLS if run.args.controls and run.args.method == "hyper" else {}
    if len({task.group for task in tasks}) == 1:  # there is no other
        controls = {name: column for name, column in controls.items() if not column.other}
    return {"main": MAIN[run.args.method]} | BASELINES | controls


# -------------------------------------------------------------------------------------- queries, scored


def ask(formatter: Formatter, episode: Episode, instruct: str = "no", bos: bool = True) -> tuple[list[Row], list[list[list[int]]]]:
    """An episode's queries as tokens: prompts, and the options of each (none where answers are generated)."""
    options, prompts = [], []
    for query in episode.queries:
        options.append([formatter.target(episode, option) for option in query.options])
        budget = formatter.query_length - max(map(len, options[-1]), default=0)
        prompts.append(formatter.query(episode, query, budget, instruct, bos))
    return prompts, options


def longest(formatter: Formatter, episode: Episode) -> int:
    """Tokens that the longest query of an episode needs after examples in context, with its longest option."""
    prompts, options = ask(formatter, episode, instruct="no", bos=False)
    return max(len(p.tokens) + max(map(len, choices), default=0) for p, choices in zip(prompts, options))


def score(run: Run, column: Column, episodes: list[Episode], others: list[Episode], t: int = 0) -> list[float]:
    """A score in percent for each query of task number t: whether the best-scored option is right, or ROUGE-L."""
    queries = [query for episode in episodes for query in episode.queries]
    return [run.task.score(answer, query) for answer, query in zip(respond(run, column, episodes, others, t), queries)]


def filled(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of rows that are computed together: alike in length, and at most so many tokens with their padding (at least a row)."""
    rows: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[i] > most:
            yield rows
            rows = []
        rows.append(i)
    yield rows


@torch.no_grad()
def respond(run: Run, column: Column, episodes: list[Episode], others: list[Episode], t: int = 0) -> list[str]:
    """The answer to each query of task number t: its best-scored option, or what the model writes.

    others: episodes of another task, whose prefix a control takes.
    """
    formatter, most, adapter = run.formatter, run.args.eval_tokens, run.hyper.answerer if column.trained else None
    sources = [others[i % len(others)] for i in range(len(episodes))] if column.other else episodes
    answers = [[""] * len(episode.queries) for episode in episodes]
    for part in filled([len(formatter.context_row(source).tokens) if column.prefix else 0 for source in sources], most):
        prefix = column.prefix and column.prefix(run, [sources[e] for e in part], t, adapter)
        before = prefix.past[0][0].shape[2] if prefix else 0
        asked = {e: ask(formatter, episodes[e], column.asks(run), column.bos) for e in part}
        queries = [(row, e, q) for row, e in enumerate(part) for q in range(len(episodes[e].queries))]
        prompts, options = [asked[e][0][q].tokens for _, e, q in queries], [asked[e][1][q] for _, e, q in queries]
        lengths = [before + (row_length(p, o) if o else len(p) + MAX_NEW_TOKENS) for p, o in zip(prompts, options)]
        for chosen in filled(lengths, most):
            own = prefix and prefix[torch.tensor([queries[i][0] for i in chosen], device=run.device)]
            given, choices = [prompts[i] for i in chosen], [options[i] for i in chosen]
            if choices[0]:
                scores = score_options(run.hyper.model, given, choices, own, adapter, run.args.score == "mean")
            else:
                texts = write_answers(run, episodes[part[0]], given, own, adapter)
            for n, i in enumerate(chosen):
                _, e, q = queries[i]
                query = episodes[e].queries[q]
                if choices[0] and not all(map(math.isfinite, scores[n])):
                    raise InputError(f"the scores of {query.input[-80:]!r} aren't finite: the model or its adapters hold NaN or inf")
                answers[e][q] = query.options[scores[n].index(max(scores[n]))] if choices[0] else texts[n]
    return [answer for texts in answers for answer in texts]


def write_answers(run: Run, episode: Episode, prompts: list[list[int]], prefix: Gists | None, adapter: str | None) -> list[str]:
    """The model's own answers to prompts in the episode's layout. prefix: what comes before each of them."""
    before = {} if prefix is None else {"past": prefix.past, "offset": prefix.offset, "seen": prefix.seen}
    tokenizer = run.formatter.tokenizer
    ends = {"eos": tokenizer.eos, "until": tokenizer.encode(episode.layout.end)}
    rows = generate(run.hyper.model, prompts, MAX_NEW_TOKENS, **ends, **before, adapter=prefix.acting(adapter) if prefix else adapter)
    return [tokenizer.decode(row).strip() for row in rows]


# ------------------------------------------------------------------------------------------ the result

SMALL = 512  # width of a model whose products are too small to keep several cores busy: each core scores an item of its own
Draws = list[list[list[Episode]]]  # draw of examples -> task -> episodes
Item = tuple[str, int, int]  # column, task, draw of examples


@dataclass
class HeldOut:
    """Tasks to evaluate on, with their episodes; what of these didn't fit; how many examples could be read, per task, on average;
    and the scores that training doesn't change, once they are known."""

    tasks: Sequence[Task]
    episodes: Draws
    left_out: Counter[str]
    shots: list[dict[str, float]]
    known: dict[Item, float] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        return [sum(len(episode.queries) for episode in task) for task in self.episodes[0]]

    def other(self, t: int) -> int:
        """By name, the next task of another group (itself, where there is none)."""
        tasks = self.tasks
        order = sorted(range(len(tasks)), key=lambda i: (tasks[i].name <= tasks[t].name, tasks[i].name))
        return next((i for i in order if tasks[i].group != tasks[t].group), t)


def prepare(run: Run, tasks: Sequence[Task]) -> HeldOut:
    """Draw the episodes. Done before training, a bad row, or a query that can't be asked, is found in time."""
    args, formatter, left_out, shots = run.args, run.formatter, Counter(), []
    instruct = "before" if args.method == "zeroshot" else "inside" if args.instruction_downstream else "no"
    sets = args.shots * several(args)[1]
    episodes: Draws = [[] for _ in range(args.sets)]
    for t, task in enumerate(tqdm(tasks, desc="preparing held-out tasks", leave=False, delay=1)):
        read: Counter[str] = Counter()
        for n, draw in enumerate(episodes):
            draw.append(task.evaluation(args.seed, n, sets, args.limit))
            for episode in draw[t]:
                if not n:
                    room = args.context - longest(formatter, episode)
                    left_out += sum((prompt.left_out for prompt in ask(formatter, episode, instruct)[0]), Counter())
                hyper = [formatter.context_row(piece, run.hyper.gist_ids).left_out for piece in pieces(run, episode)]
                rows = {"hyper": sum(hyper, Counter()), "fewshot": formatter.context_row(one_set(run, episode), budget=room).left_out}
                read.update({name: row["shots"] - row["shots left out"] for name, row in rows.items()})
                read["episodes"] += 1
                left_out += rows[args.method] if args.method in rows else Counter()
        shots.append({name: read[name] / read["episodes"] for name in ("hyper", "fewshot")})
    return HeldOut(tasks, episodes, left_out, shots)


def originals(run: Run, held_out: HeldOut, table: dict[str, Column], draws: int) -> dict[Item, Item]:
    """What has to be scored for each item: the first column that asks and answers in the same way, and the first draw that
    says the same. (With a frozen model, no prefix is 0-shot; and 0-shot reads no examples.)"""

    def read(column: Column, t: int, n: int) -> tuple:  # what a column reads: the queries, and what its prefix is made of
        draw = held_out.episodes[n]
        return [episode.queries for episode in draw[t]], column.drawn and (draw[t], column.other and draw[held_out.other(t)])

    numbers = [(t, n) for t in range(len(held_out.tasks)) for n in range(draws)]
    first = {name: twin(run, held_out, table, name) for name in table}
    return {(name, t, n): (first[name], t, n * (read(column, t, n) != read(column, t, 0))) for t, n in numbers for name, column in table.items()}


def twin(run: Run, held_out: HeldOut, table: dict[str, Column], name: str) -> str:
    """The first column that asks and answers as this one does."""
    instructed = any(episode.instruction for task in held_out.episodes[0] for episode in task)
    return next(other for other in table if table[other].same(run, table[name], instructed))


def score_all(run: Run, held_out: HeldOut, table: dict[str, Column], draws: int | None = None, out: Path | None = None) -> dict[str, list[list[float]]]:
    """The mean score: column -> task -> draw. Under torchrun, the work is divided among the processes.

    out: a folder that keeps what is done until all is, so that an evaluation that was interrupted goes on.
    """
    draws, (rank, world) = draws or len(held_out.episodes), processes()
    same = originals(run, held_out, table, draws)
    kept, found = out and f"{UNFINISHED}-{fingerprint(run, held_out)}", {}
    for path in out.glob(f"{kept}-*") if out and rank == 0 else ():
        with reading(path, "not scores of ours"):
            found |= {(str(name), int(t), int(n)): score for (name, t, n), score in read_lines(path) if 0 <= score <= 100}
    found = everybodys(found) | held_out.known

    def mean_score(item: Item) -> float:
        name, t, n = item
        draw = held_out.episodes[n]
        return statistics.fmean(score(run, table[name], draw[t], draw[held_out.other(t)], t))

    mine = [item for item in dict.fromkeys(same.values()) if item not in found][rank::world]
    small = run.device.type == "cpu" and run.hyper.model.config.width <= SMALL
    with open(out / f"{kept}-{rank}" if out else os.devnull, "a") as file, tqdm(desc="evaluating", unit="query", leave=False, disable=rank > 0) as bar:
        bar.reset(sum(held_out.sizes[t] for _, t, _ in mine))
        for item, value in zip(mine, at_once(mean_score, mine, several=small)):
            found[item] = value
            file.write("\n" + json.dumps([item, value]))
            file.flush()
            bar.update(held_out.sizes[item[1]])
    found = everybodys(found)
    held_out.known.update({item: found[item] for item in same.values() if table[item[0]].fixed(run)})
    return {name: [[found[same[name, t, n]] for n in range(draws)] for t in range(len(held_out.tasks))] for name in table}


def fingerprint(run: Run, held_out: HeldOut) -> str:
    """Of all that scores depend on."""
    digest = hashlib.sha256(repr((sorted(vars(run.args).items()), run.hyper.model.checksum, held_out.episodes)).encode())
    for tensor in trained(run.hyper).values():
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluate(run: Run, held_out: HeldOut, out: Path | None = None) -> tuple[dict, list[list[str]]]:
    """Score everything under every column. Returns what results.json holds, and the lines of the table."""
    args, tasks, episodes, began = run.args, held_out.tasks, held_out.episodes, time.monotonic()
    table = columns(run, tasks)
    scores = score_all(run, held_out, table, out=out)
    hidden = [name for name in CONTROLS if name in table and twin(run, held_out, table, name) != name]  # no prefix, where it is 0-shot
    if hasattr(run.task, "without_a_model"):
        scores |= run.task.without_a_model(episodes[0])
    lines = result_table(run, held_out, {name: values for name, values in scores.items() if name not in hidden})
    averages = {name: average(run, held_out, values) for name, values in scores.items()}
    draws = [average(run, held_out, [[values[n]] for values in scores["main"]]) for n in range(len(episodes))]
    results = {
        "task": args.task,
        "method": args.method,
        "metric": run.task.METRIC,
        "tasks": {
            task.name: {"mean": statistics.fmean(values), "std": spread(values), "n": size, "shots": shots}
            for task, values, size, shots in zip(tasks, scores["main"], held_out.sizes, held_out.shots)
        },
        "average": averages.pop("main"),
        "std": spread(draws),
        "before": None,
        "shots": {name: statistics.fmean(shots[name] for shots in held_out.shots) for name in ("hyper", "fewshot")},
        "baselines": {name: averages.pop(name) for name in list(averages) if name not in CONTROLS},
        "controls": averages,
        "seconds": round(time.monotonic() - began, 1),
        "args": portable(args),
    }
    return results, lines


def main_score(run: Run, held_out: HeldOut) -> float:
    """The average that results.json will hold, of the run as it stands."""
    return average(run, held_out, score_all(run, held_out, {"main": columns(run, held_out.tasks)["main"]})["main"])


def show_answers(run: Run, held_out: HeldOut, count: int = 3) -> None:
    """Print the answers to a few held-out questions, of different tasks."""
    column, draw = columns(run, held_out.tasks)["main"], held_out.episodes[0]
    for t in range(0, len(draw), -(-len(draw) // count)):
        episode = replace(draw[t][0], queries=draw[t][0].queries[:1])
        (answer,), (query,) = respond(run, column, [episode], draw[held_out.other(t)], t), episode.queries
        right = answer in (query.references or (query.target,))
        print(f"{' '.join(query.input.split())[-100:]}\n    {' '.join(answer.split())[:100]}  ({'right' if right else f'wrong: {query.target}'})")


def measure(run: Run, held_out: HeldOut) -> dict:
    """Scores along the way, with the first draw of examples: of the run itself and its controls."""
    table = {name: column for name, column in columns(run, held_out.tasks).items() if name not in BASELINES}  # the untouched model stays as it is
    each = score_all(run, held_out, table, draws=1)
    averages = {name: round(average(run, held_out, scores), 2) for name, scores in each.items()}
    scores = {task.name: round(value, 2) for task, (value,) in zip(held_out.tasks, each["main"])}
    return {"score": averages.pop("main"), "controls": averages, "scores": scores}


def average(run: Run, held_out: HeldOut, scores: list[list[float]], chosen: Sequence[int] | None = None) -> float:
    """Mean over draws; then over all instances (ROUGE-L), or over a group's tasks and then over groups."""
    chosen, sizes = range(len(scores)) if chosen is None else chosen, held_out.sizes
    means = {t: statistics.fmean(scores[t]) for t in chosen}
    if run.task.METRIC == "rougeL":
        return math.fsum(means[t] * sizes[t] for t in chosen) / sum(sizes[t] for t in chosen)
    groups: dict[str, list[float]] = {}
    for t in chosen:
        groups.setdefault(held_out.tasks[t].group, []).append(means[t])
    return statistics.fmean(map(statistics.fmean, groups.values()))


def spread(draws: list[float]) -> float | None:
    return statistics.stdev(draws) if len(draws) > 1 else None


def result_table(run: Run, held_out: HeldOut, scores: dict[str, list[list[float]]]) -> list[list[str]]:
    """A row per group, a column per condition; ± over draws of examples. Where some didn't fit: how many were read, by gists and in context."""
    unit = {"accuracy": "accuracy, %", "rougeL": "ROUGE-L"}[run.task.METRIC]
    unit += f", first {run.args.limit} of each" * bool(run.args.limit)
    read = {name: statistics.fmean(shots[name] for shots in held_out.shots) for name in ("hyper", "fewshot")}
    titles = {name: TITLES[name].format(**vars(run.args) | {"shots": f"{read['fewshot']:.3g}"}) for name in scores}
    short = held_out.left_out["shots left out"] > 0
    lines = [[unit, "queries", *["examples read"] * short, *titles.values()]]
    for group in [*dict.fromkeys(task.group for task in held_out.tasks), None]:
        chosen = [t for t, task in enumerate(held_out.tasks) if group in (task.group, None)]
        line = ["average" if group is None else group if len(chosen) == 1 else f"{group} ({len(chosen)} tasks)"]
        line.append(f"{sum(held_out.sizes[t] for t in chosen):,}")
        line += [", ".join(f"{statistics.fmean(held_out.shots[t][name] for t in chosen):.3g}" for name in read)] * short
        for name, values in scores.items():
            line.append(f"{average(run, held_out, values, chosen):.1f}")
            draws = [average(run, held_out, [[v[n]] for v in values], chosen) for n in range(len(values[0]))]
            if name == "main" and spread(draws) is not None:
                line[-1] += f" ± {spread(draws):.1f}"
        lines.append(line)
    return lines


# ---------------------------------------------------------------------------------------- the command


def settings(argv: list[str] | None = None) -> tuple[argparse.Namespace, Path | None, Path]:
    """What to evaluate; the finished run's folder, if it is one; the folder for the results."""
    parser = Parser(__doc__)
    parser.add_argument("folder", nargs="?", metavar="RUN", default=None, help="folder of a finished run; without it, a plain Llama")
    parser.add_argument("--out", metavar="DIR", help="folder for results.json (default: the run's, or runs/eval-…)")
    add_options(parser)
    typed = vars(parser.parse_args(argv))
    folder, out = typed.pop("folder"), typed.pop("out", None)
    if folder is None:
        task = TASKS.get(typed.get("task"))
        if not {"task", "method"} <= typed.keys() or typed["method"] == "hyper" or hasattr(task, "evaluate") or hasattr(task, "start"):
            raise InputError("name a RUN, or a plain Llama: --model DIR --task p3 --method fewshot (or zeroshot)")
        name = f"runs/eval-{typed['task']}-{typed['method']}" + (f"-{Path(typed['model']).resolve().name}" if "model" in typed else "")
        return settle(typed | {"steps": 0}), None, Path(out or name)
    for name in typed.keys() - EVALUATION - MOVABLE:
        raise InputError(f"--{name.replace('_', '-')}: {folder} was trained with its own, which can't be changed")
    ways, before = typed.keys() & {*WAYS}, read_args(Path(folder))
    inherited = {name: value for name, value in before.items() if name not in EVALUATION or name == "chain" and not ways}
    args = settle(typed, inherited)  # --limit and the like of the training are not inherited
    return args, Path(folder), Path(out or Path(folder, *(f"{way}-{typed[way]}" for way in ways)))  # beside the run's own result


def final_results(run: Run, held_out: HeldOut | None, before: float | None, out: Path) -> dict:
    """Evaluate, write results.json, then print the table. before: the average before the first step."""
    out.mkdir(parents=True, exist_ok=True)
    results, lines = evaluate(run, held_out, out) if held_out else run.task.evaluate(run.args, run.hyper, run.formatter)
    results |= {"before": before, "args": portable(run.args)}
    if processes()[0] == 0:
        write_json(out / "results.json", results)  # first of all: what is printed may go nowhere
        for path in out.glob(f"{UNFINISHED}-{fingerprint(run, held_out)}-*") if held_out else ():
            path.unlink()
        print_lines(lines)
    return results


def score_before(folder: Path, args: argparse.Namespace) -> float | None:
    """The average before the first step as the run's own results hold it, if they were evaluated in the same way."""
    path = folder / "results.json"
    if not path.exists():
        return None
    with reading(path, "not the results of a run"):
        results = json.loads(path.read_text())
        same = all(results["args"].get(name) == getattr(args, name) for name in EVALUATION - {"controls", "eval_tokens"})
        return results.get("before") if same else None


def check_results(out: Path, args: argparse.Namespace, folder: Path | None) -> None:
    """InputError where results would replace something other than an earlier evaluation of the same."""
    check_writable(out)
    path = out / "results.json"
    if (out / "args.json").exists() and (folder is None or out.resolve() != folder.resolve()):
        raise InputError(f"--out {out}: holds another run, whose results would be replaced")
    with reading(path, "would be replaced, and is not a result of ours"):
        before = json.loads(path.read_text())["args"] if path.exists() else portable(args)
        for name in before.keys() - EVALUATION - {"threads"} - (MOVABLE if folder else {"device", "dtype"}):
            if before[name] != portable(args).get(name):
                raise InputError(f"--out {out}: holds other results, with --{name.replace('_', '-')} {before[name]}, which would be replaced")


def main() -> None:
    args, folder, out = settings()
    rank, _ = start_processes()
    check_results(out, args, folder)
    run = open_run(args, folder)
    held_out = None if hasattr(run.task, "evaluate") else prepare(run, run.task.load(args, run.formatter, "test"))
    final_results(run, held_out, score_before(folder, args) if folder else None, out)
    if held_out and report(held_out.left_out) and rank == 0:
        print(report(held_out.left_out))


if __name__ == "__main__":
    run_command(main)
