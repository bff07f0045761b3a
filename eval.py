"""Evaluation: held-out tasks by option ranking or ROUGE-L, with the baselines and controls beside the number.

    python eval.py RUN                                     evaluate a run of train.py
    python eval.py --model DIR --task p3 --method fewshot  a plain Llama: a run of no steps

All that is compared differs only in the prefix that comes before a query: gists, the keys and values
of the examples themselves, or nothing. So one function scores them all (`score`), and one table says
what they are (`COLUMNS`).
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Episode, Formatter, Row, Task, collate, report
from gist import Gists, HyperLlama, combine, mean_pooled, read_rows
from llama import InputError, Llama, Tokenizer, generate, holes_mask, ragged, read_config, read_prompts
from lora import write_json
from tasks import EVALUATION, MOVABLE, TASKS, Parser, add_options, read_args, settle

# ------------------------------------------------------------------------- two ways to score an answer


@torch.no_grad()
def score_options(
    model: Llama, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[Sequence[int]]],
    prefix: Gists | None = None, adapter: str | None = None, mean: bool = False,
) -> list[list[float]]:  # fmt: skip
    """Log-probability of each option of each prompt: the sum over its tokens (`mean`: their mean).

    prefix: what comes before each of the N prompts. Each prompt is read once; its options go on
    from its keys and values.
    """
    past, offset, seen = (prefix.past, prefix.offset, prefix.seen) if prefix else (None, None, None)
    logits, present, seen, position = read_prompts(model, prompts, past, offset, seen, adapter)
    first, N, device = logits.float().log_softmax(-1), len(prompts), logits.device  # [N, V]

    flat = [(n, option) for n, choices in enumerate(options) for option in choices]
    row = torch.tensor([n for n, _ in flat], device=device)  # [M]
    scores = first[row, torch.tensor([option[0] for _, option in flat], device=device)]  # [M]

    longer = [m for m, (_, option) in enumerate(flat) if len(option) > 1]
    for start in range(0, len(longer), N):  # as many at a time as there are prompts: each brings its own past
        part = longer[start : start + N]
        rest = collate(None, part, [flat[m][1][:1] for m in part], [flat[m][1][1:] for m in part]).to(device)
        own, width = row[rest.row], rest.tokens.shape[1]
        logits, _ = model(
            rest.tokens,
            past=[(k[own], v[own]) for k, v in present],
            offset=position[own],
            adapter=adapter,
            mask=holes_mask(seen[own], width),
            select=rest.select,
        )
        gains = -F.cross_entropy(logits.float(), rest.targets, reduction="none")
        scores = scores.index_add(0, rest.row[rest.select // width], gains)
    values = iter(scores.tolist())
    return [[next(values) / (len(option) if mean else 1) for option in choices] for choices in options]


@cache
def rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and only needed here

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in percent against the best reference, as Super-NaturalInstructions scores."""
    return 100 * max(rouge_scorer().score(reference, prediction)["rougeL"].fmeasure for reference in references)


# ------------------------------------------------------------------------------------ what is compared


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


@dataclass(frozen=True)
class Column:
    """One column of the table.

    prefix    what comes before the query: a function below, of (run, episodes, number of the task, LoRA set); None: nothing
    trained   whether the run's own LoRA set answers; else the base does
    instruct  whether the instruction stands in the query itself; None: as --instruction-downstream says
    other     whether the prefix is that of another task
    bos       where the examples' own BOS stands in front, a query has none
    """

    title: str
    prefix: Callable | None
    trained: bool = True
    instruct: bool | None = None
    other: bool = False
    bos: bool = True


@torch.no_grad()
def compressed(run: Run, episodes: list[Episode], t: int, adapter: str | None) -> Gists:
    """Gists: those of each episode's examples, or (--average, --concat) of several sets of examples."""
    args, hyper = run.args, run.hyper
    sets = args.average or args.concat
    if sets:
        (episode,) = episodes
        parts = [replace(episode, shots=episode.shots[n::sets]) for n in range(sets)]
        rows = [run.formatter.context_row(part, hyper.gist_ids).tokens for part in parts]
        return combine(hyper, rows, side_by_side=bool(args.concat))
    rows = [run.formatter.context_row(episode, hyper.gist_ids) for episode in episodes]
    kept = torch.tensor([row.lead for row in rows], device=run.device) if args.fuse_instruction else None
    return hyper.compress(ragged([row.tokens for row in rows], device=run.device), kept=kept)


def in_context(run: Run, episodes: list[Episode], t: int, adapter: str | None) -> Gists:
    """All examples as they are: few-shot prompting."""
    if run.args.average or run.args.concat:  # one set, as without these
        episodes = [replace(episode, shots=episode.shots[: run.args.shots]) for episode in episodes]
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
    "fewshot": Column("fewshot", in_context, instruct=False, bos=False),
    "zeroshot": Column("zeroshot", None, instruct=True),
}
BASELINES = {  # the untouched model
    "zeroshot": Column("0-shot", None, trained=False, instruct=True),
    "fewshot": Column("{shots}-shot", in_context, trained=False, instruct=False, bos=False),
}
CONTROLS = {  # of a hypernetwork
    "no_prefix": Column("no prefix", None),
    "other_task": Column("other task", compressed, other=True),
    "mean_pooled": Column("mean-pooled", pooled),
    "fewer_shots": Column("fewer shots", fewer, trained=False, instruct=False, bos=False),
}
TITLES = {name: column.title for name, column in (BASELINES | CONTROLS).items()}
TITLES |= {"main": "{method}", "copy_input": "copy input", "copy_example": "copy example"}


def columns(run: Run, tasks: Sequence[Task]) -> dict[str, Column]:
    """The number itself ("main"), the untouched model, and what a hypernetwork has to be better than."""
    own = getattr(run.task, "prefix_of", None)  # prefix tuning brings prefixes of its own
    if own:
        return {"main": Column("prefix", own)} | BASELINES
    controls = CONTROLS if run.args.controls and run.args.method == "hyper" else {}
    if len({task.group for task in tasks}) == 1:  # there is no other
        controls = {name: column for name, column in controls.items() if not column.other}
    return {"main": MAIN[run.args.method]} | BASELINES | controls


# -------------------------------------------------------------------------------------- queries, scored


def ask(formatter: Formatter, episode: Episode, instruct: bool, bos: bool = True) -> tuple[list[Row], list[list[list[int]]]]:
    """An episode's queries as tokens: prompts, and the options of each (none where answers are generated)."""
    options, prompts = [], []
    for query in episode.queries:
        options.append([formatter.target(episode, option) for option in query.options])
        budget = formatter.query_length - max(map(len, options[-1]), default=0)
        prompts.append(formatter.query(episode, query, budget, instruct, bos))
    return prompts, options


def longest(formatter: Formatter, episode: Episode) -> int:
    """Tokens that the longest query of an episode needs after examples in context, with its longest option."""
    prompts, options = ask(formatter, episode, instruct=False, bos=False)
    return max(len(p.tokens) + max(map(len, choices), default=0) for p, choices in zip(prompts, options))


@torch.no_grad()
def score(run: Run, column: Column, episodes: list[Episode], others: list[Episode], t: int = 0) -> list[float]:
    """A score in percent for each query of task number t: whether the best-scored option is right, or ROUGE-L.

    others: episodes of another task, whose prefix a control takes.
    """
    size, scores, adapter = run.args.eval_batch_size, [], run.hyper.answerer if column.trained else None
    instruct = run.args.instruction_downstream if column.instruct is None else column.instruct
    for start in range(0, len(episodes), size):
        part = episodes[start : start + size]
        source = [others[i % len(others)] for i in range(start, start + len(part))] if column.other else part
        prefix = column.prefix and column.prefix(run, source, t, adapter)
        queries = [(e, query) for e, episode in enumerate(part) for query in episode.queries]
        asked = [ask(run.formatter, episode, instruct, column.bos) for episode in part]
        prompts, options = [p.tokens for ps, _ in asked for p in ps], [choices for _, cs in asked for choices in cs]
        values = [0.0] * len(queries)
        order = sorted(range(len(queries)), key=lambda i: len(prompts[i]))  # alike lengths: little padding
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            before = prefix and prefix[torch.tensor([queries[i][0] for i in rows], device=run.device)]
            now, given = [queries[i][1] for i in rows], [prompts[i] for i in rows]
            if now[0].options:
                found = score_options(run.hyper.model, given, [options[i] for i in rows], before, adapter, run.args.score == "mean")
                answers = [query.options[row.index(max(row))] for query, row in zip(now, found)]
                right = [100.0 * (answer == query.target) for answer, query in zip(answers, now)]
            else:
                answers = write_answers(run, part[0], given, before, adapter)
                right = [rouge_l(answer, query.references) for answer, query in zip(answers, now)]
            for i, value in zip(rows, right):
                values[i] = value
        scores += values
    return scores


MAX_NEW_TOKENS = 128  # of a generated answer


def write_answers(run: Run, episode: Episode, prompts: list[list[int]], prefix: Gists | None, adapter: str | None) -> list[str]:
    """The model's own answers to prompts in the episode's layout. prefix: what comes before each of them."""
    before = {} if prefix is None else {"past": prefix.past, "offset": prefix.offset, "seen": prefix.seen}
    tokenizer = run.formatter.tokenizer
    ends = {"eos": tokenizer.eos, "until": tokenizer.encode(episode.layout.end)}
    rows = generate(run.hyper.model, prompts, MAX_NEW_TOKENS, **ends, **before, adapter=adapter)
    return [tokenizer.decode(row).strip() for row in rows]


# ------------------------------------------------------------------------------------------ the result

Draws = list[list[list[Episode]]]  # draw of examples -> task -> episodes


@dataclass
class HeldOut:
    """Tasks to evaluate on, with their episodes; and what of these didn't fit."""

    tasks: Sequence[Task]
    episodes: Draws
    left_out: Counter[str]

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
    args = run.args
    shots = args.shots * (args.average or args.concat or 1)
    episodes = [[task.evaluation(args.seed, n, shots, args.limit) for task in tasks] for n in range(args.sets)]
    left_out: Counter[str] = Counter()
    for draw in episodes:
        for episode in (episode for task in draw for episode in task):
            if draw is episodes[0]:
                longest(run.formatter, episode)
                for prompt in ask(run.formatter, episode, instruct=args.method == "zeroshot" or args.instruction_downstream)[0]:
                    left_out += prompt.left_out
            if args.method != "zeroshot":
                left_out += run.formatter.context_row(episode, run.hyper.gist_ids).left_out
    return HeldOut(tasks, episodes, left_out)


def evaluate(run: Run, held_out: HeldOut) -> dict:
    """Score everything under every column; prints the table and returns what results.json holds."""
    args, tasks, episodes, began = run.args, held_out.tasks, held_out.episodes, time.time()
    table, scores = columns(run, tasks), {}  # column -> task -> draw
    with tqdm(total=len(table) * len(tasks), desc="evaluating", leave=False) as bar:
        for name, column in table.items():
            scores[name] = [[] for _ in tasks]
            for t in range(len(tasks)):
                bar.update()
                for n, draw in enumerate(episodes):
                    first = episodes[0][t]
                    if n and (draw[t] == first or column.prefix is None and draw[t][0].queries == first[0].queries):
                        scores[name][t] += scores[name][t][:1]  # nothing differs from the first draw
                        continue
                    values = score(run, column, draw[t], draw[held_out.other(t)], t)
                    scores[name][t].append(statistics.fmean(values))
    if run.task.METRIC == "rougeL":
        scores |= copying(episodes[0])
    print_lines(result_table(run, held_out, scores))
    averages = {name: average(run, held_out, values) for name, values in scores.items()}
    draws = [average(run, held_out, [[values[n]] for values in scores["main"]]) for n in range(len(episodes))]
    return {
        "task": args.task,
        "method": args.method,
        "metric": run.task.METRIC,
        "tasks": {
            task.name: {"mean": statistics.fmean(values), "std": spread(values), "n": size}
            for task, values, size in zip(tasks, scores["main"], held_out.sizes)
        },
        "average": averages.pop("main"),
        "std": spread(draws),
        "baselines": {name: averages.pop(name) for name in list(averages) if name not in CONTROLS},
        "controls": averages,
        "seconds": round(time.time() - began, 1),
        "args": vars(args),
    }


def measure(run: Run, held_out: HeldOut) -> dict:
    """Scores along the way, with the first draw of examples: of the run itself and its controls."""
    averages, each, first = {}, {}, held_out.episodes[0]
    for name, column in columns(run, held_out.tasks).items():
        if name not in BASELINES:  # the untouched model stays as it is
            each[name] = [statistics.fmean(score(run, column, first[t], first[held_out.other(t)], t)) for t in range(len(first))]
            averages[name] = round(average(run, held_out, [[value] for value in each[name]]), 2)
    scores = {task.name: round(value, 2) for task, value in zip(held_out.tasks, each["main"])}
    return {"score": averages.pop("main"), "controls": averages, "scores": scores}


def copying(tasks: list[list[Episode]]) -> dict[str, list[list[float]]]:
    """ROUGE-L of two answers that need no model: the input, and the output of the first example."""
    values: dict[str, list[list[float]]] = {"copy_input": [], "copy_example": []}
    for (episode,) in tasks:
        example = episode.shots[0].target if episode.shots else ""
        for name, answer in (("copy_input", None), ("copy_example", example)):
            each = [rouge_l(query.input if answer is None else answer, query.references) for query in episode.queries]
            values[name].append([statistics.fmean(each)])
    return values


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
    """A row per group, a column per condition; ± over draws of examples."""
    unit = {"accuracy": "accuracy, %", "rougeL": "ROUGE-L"}[run.task.METRIC]
    lines = [[unit, *(TITLES[name].format(**vars(run.args)) for name in scores)]]
    for group in [*dict.fromkeys(task.group for task in held_out.tasks), None]:
        chosen = [t for t, task in enumerate(held_out.tasks) if group in (task.group, None)]
        line = ["average" if group is None else group if len(chosen) == 1 else f"{group} ({len(chosen)} tasks)"]
        for name, values in scores.items():
            line.append(f"{average(run, held_out, values, chosen):.1f}")
            draws = [average(run, held_out, [[v[n]] for v in values], chosen) for n in range(len(values[0]))]
            if name == "main" and spread(draws) is not None:
                line[-1] += f" ± {spread(draws):.1f}"
        lines.append(line)
    return lines


def print_lines(lines: list[list[str]], total: bool = True) -> None:
    """A table: a rule under the first line, and above the last if that is a total."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for i, line in enumerate(lines):
        if i == 1 or total and i == len(lines) - 1:
            print("-" * (sum(widths) + 2 * len(widths) - 2))
        print(line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:])), sep="  ")


# ------------------------------------------------------------------------------------- opening a run

ROOM_FOR_EXAMPLES = 32  # tokens of a row of examples that must not be gists


def open_run(args: argparse.Namespace, folder: Path | None = None) -> Run:
    """The model that `args` describe, as at the start of a run; or as a finished one left it in its folder."""
    tokenizer, config = Tokenizer(args.model), read_config(Path(args.model))
    answer = MAX_NEW_TOKENS * (TASKS[args.task].METRIC == "rougeL")
    if args.context + args.query_length + answer > config.max_positions:
        raise InputError(
            f"--context {args.context} + --query-length {args.query_length}{' + an answer' * bool(answer)} "
            f"exceed the {config.max_positions} positions of {args.model}"
        )
    if args.method == "fewshot" and args.context <= args.query_length:
        raise InputError(f"--context {args.context} must be longer than --query-length {args.query_length}")
    if args.context < args.gists + ROOM_FOR_EXAMPLES:
        raise InputError(f"--gists {args.gists} leave no room for examples in --context {args.context}")
    if tokenizer.size > config.vocab:
        raise InputError(f"{args.model}: the tokenizer has {tokenizer.size} pieces, the model only {config.vocab}")
    formatter = Formatter(tokenizer, args.context, args.query_length)
    task = TASKS[args.task]
    return Run(args, task.build(args) if folder is None else task.restore(args, folder), formatter)


# ---------------------------------------------------------------------------------------- the command


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


def settings(argv: list[str] | None = None) -> tuple[argparse.Namespace, Path | None, Path]:
    """What to evaluate; the finished run's folder, if it is one; the folder for the results."""
    parser = Parser(__doc__)
    parser.add_argument("folder", nargs="?", metavar="RUN", default=None, help="folder of a finished run; without it, a plain Llama")
    parser.add_argument("--out", metavar="DIR", help="folder for results.json (default: the run's, or runs/eval-…)")
    add_options(parser)
    typed = vars(parser.parse_args(argv))
    folder, out = typed.pop("folder"), typed.pop("out", None)
    if folder is None:
        if not {"task", "method"} <= typed.keys() or "evaluate" in vars(TASKS[typed["task"]]) or typed["task"] == "prefix" or typed["method"] == "hyper":
            raise InputError("name a RUN, or a plain Llama: --model DIR --task p3 --method fewshot (or zeroshot)")
        return settle(typed | {"steps": 0}), None, Path(out or f"runs/eval-{typed['task']}-{typed['method']}")
    for name in typed.keys() - EVALUATION - MOVABLE:
        raise InputError(f"--{name.replace('_', '-')}: {folder} was trained with its own, which can't be changed")
    args = settle(typed, read_args(Path(folder)))
    several = f"average-{args.average}" if args.average else f"concat-{args.concat}" if args.concat else ""
    return args, Path(folder), Path(out or Path(folder) / several)  # beside the run's own result, not in its place


def final_results(run: Run, held_out: HeldOut | None = None) -> dict:
    """What results.json holds; prints the table."""
    if hasattr(run.task, "evaluate"):  # text is evaluated otherwise
        results, lines = run.task.evaluate(run.args, run.hyper, run.formatter)
        print_lines(lines)
        return results
    return evaluate(run, held_out)


def main() -> None:
    args, folder, out = settings()
    run = open_run(args, folder)
    held_out = None if hasattr(run.task, "evaluate") else prepare(run, run.task.load(args, run.formatter, "test"))
    results = final_results(run, held_out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)
    if held_out and report(held_out.left_out):
        print(report(held_out.left_out))


if __name__ == "__main__":
    run_command(main)
