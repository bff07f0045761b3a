"""Evaluation: held-out tasks by option ranking or ROUGE-L, with the baselines and controls beside the number.

    python eval.py RUN                                     evaluate a run of train.py
    python eval.py --model DIR --task p3 --method fewshot  a plain Llama: a run of no steps

All that is compared differs only in the prefix that comes before a query: gists, the keys and values
of the examples themselves, or nothing. So one function answers for them all (`respond`), and one table
says what they are (MAIN, BASELINES, CONTROLS).
"""

import tools  # noqa: F401, I001  first: Ctrl-C is one line even during the imports that follow

import argparse
import json
import math
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Episode, Formatter, Row, Task, collate, report
from gist import Gists, combine, mean_pooled, read_rows
from llama import InputError, Llama, generate, holes_mask, ragged, read_prompts, reading
from lora import write_json
from tasks import EVALUATION, MAX_NEW_TOKENS, MOVABLE, TASKS, Parser, Run, add_options, open_run, portable, read_args, settle, several

# ------------------------------------------------------------------------------- options, ranked


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
    """

    title: str
    prefix: Callable | None
    trained: bool = True
    instruct: str | None = None
    other: bool = False
    bos: bool = True

    def asks(self, run: Run) -> str:
        return self.instruct or ("inside" if run.args.instruction_downstream else "no")

    def same(self, run: Run, column: "Column", instructed: bool) -> bool:
        """Whether another column asks and answers in the same way: with a frozen downstream model, no prefix is 0-shot."""
        mine, theirs = (
            (c.prefix, run.hyper.answerer if c.trained else None, c.other, c.bos, instructed and c.asks(run)) for c in (self, column)
        )
        return mine == theirs


@torch.no_grad()
def compressed(run: Run, episodes: list[Episode], t: int, adapter: str | None) -> Gists:
    """Gists: those of each episode's examples, or (--average, --concat, --chain) of several sets of examples."""
    args, hyper = run.args, run.hyper
    way, sets = several(args)
    if way:
        (episode,) = episodes
        parts = [replace(episode, shots=episode.shots[n::sets]) for n in range(sets)]
        rows = [run.formatter.context_row(part, hyper.gist_ids).tokens for part in parts]
        return combine(hyper, rows, way)
    rows = [run.formatter.context_row(episode, hyper.gist_ids) for episode in episodes]
    kept = torch.tensor([row.lead for row in rows], device=run.device) if args.fuse_instruction else None
    return hyper.compress(ragged([row.tokens for row in rows], device=run.device), kept=kept)


def in_context(run: Run, episodes: list[Episode], t: int, adapter: str | None) -> Gists:
    """All examples as they are: few-shot prompting."""
    if several(run.args)[0]:  # one set, as without these
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
    "fewshot": Column("fewshot", in_context, instruct="no", bos=False),
    "zeroshot": Column("zeroshot", None, instruct="before"),
}
BASELINES = {  # the untouched model
    "zeroshot": Column("0-shot", None, trained=False, instruct="before"),
    "fewshot": Column("{shots}-shot", in_context, trained=False, instruct="no", bos=False),
}
CONTROLS = {  # of a hypernetwork
    "no_prefix": Column("no prefix", None),
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
        return {"main": Column("prefix", own)} | BASELINES
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


@torch.no_grad()
def respond(run: Run, column: Column, episodes: list[Episode], others: list[Episode], t: int = 0) -> list[str]:
    """The answer to each query of task number t: its best-scored option, or what the model writes.

    others: episodes of another task, whose prefix a control takes.
    """
    size, answers, adapter = run.args.eval_batch_size, [], run.hyper.answerer if column.trained else None
    instruct = column.asks(run)
    for start in range(0, len(episodes), size):
        part = episodes[start : start + size]
        source = [others[i % len(others)] for i in range(start, start + len(part))] if column.other else part
        prefix = column.prefix and column.prefix(run, source, t, adapter)
        queries = [(e, query) for e, episode in enumerate(part) for query in episode.queries]
        asked = [ask(run.formatter, episode, instruct, column.bos) for episode in part]
        prompts, options = [p.tokens for ps, _ in asked for p in ps], [choices for _, cs in asked for choices in cs]
        written = [""] * len(queries)
        order = sorted(range(len(queries)), key=lambda i: len(prompts[i]))  # alike lengths: little padding
        for rows in (order[i : i + size] for i in range(0, len(order), size)):
            before = prefix and prefix[torch.tensor([queries[i][0] for i in rows], device=run.device)]
            now, given = [queries[i][1] for i in rows], [prompts[i] for i in rows]
            if now[0].options:
                scores = score_options(run.hyper.model, given, [options[i] for i in rows], before, adapter, run.args.score == "mean")
                for query, row in zip(now, scores):
                    if not all(map(math.isfinite, row)):
                        raise InputError(f"the scores of {query.input[-80:]!r} aren't finite: the model or its adapters hold NaN or inf")
                texts = [query.options[row.index(max(row))] for query, row in zip(now, scores)]
            else:
                texts = write_answers(run, part[0], given, before, adapter)
            for i, text in zip(rows, texts):
                written[i] = text
        answers += written
    return answers


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
    """Tasks to evaluate on, with their episodes; what of these didn't fit; how many examples could be read, per task, on average."""

    tasks: Sequence[Task]
    episodes: Draws
    left_out: Counter[str]
    shots: list[dict[str, float]]

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
                rows = {"hyper": formatter.context_row(episode, run.hyper.gist_ids), "fewshot": formatter.context_row(episode, budget=room)}
                read.update({name: row.left_out["shots"] - row.left_out["shots left out"] for name, row in rows.items()})
                read["episodes"] += 1
                left_out += rows[args.method].left_out if args.method in rows else Counter()
        shots.append({name: read[name] / read["episodes"] for name in ("hyper", "fewshot")})
    return HeldOut(tasks, episodes, left_out, shots)


def evaluate(run: Run, held_out: HeldOut) -> tuple[dict, list[list[str]]]:
    """Score everything under every column. Returns what results.json holds, and the lines of the table."""
    args, tasks, episodes, began = run.args, held_out.tasks, held_out.episodes, time.monotonic()
    table, scores, own, hidden = columns(run, tasks), {}, [], []  # scores: column -> task -> draw
    instructed = any(episode.instruction for task in episodes[0] for episode in task)
    for name, column in table.items():
        twin = next((other for other in own if column.same(run, table[other], instructed)), None)
        scores[name] = scores[twin] if twin else [[] for _ in tasks]
        own += [] if twin else [name]
        hidden += [name] if twin and name in CONTROLS else []  # no prefix, where it is 0-shot: shown once
    with tqdm(total=len(own) * sum(held_out.sizes) * len(episodes), desc="evaluating", unit="query", leave=False) as bar:
        for t, n, name in [(t, n, name) for t in range(len(tasks)) for n in range(len(episodes)) for name in own]:
            column, draw, first = table[name], episodes[n][t], episodes[0][t]
            bar.update(held_out.sizes[t])
            if n and (draw == first or column.prefix is None and draw[0].queries == first[0].queries):
                scores[name][t].append(scores[name][t][0])  # nothing differs from the first draw
                continue
            scores[name][t].append(statistics.fmean(score(run, column, draw, episodes[n][held_out.other(t)], t)))
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
    column = columns(run, held_out.tasks)["main"]
    scores = [
        [statistics.fmean(score(run, column, draw[t], draw[held_out.other(t)], t)) for draw in held_out.episodes]
        for t in range(len(held_out.tasks))
    ]
    return average(run, held_out, scores)


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
    averages, each, first = {}, {}, held_out.episodes[0]
    for name, column in columns(run, held_out.tasks).items():
        if name not in BASELINES:  # the untouched model stays as it is
            each[name] = [statistics.fmean(score(run, column, first[t], first[held_out.other(t)], t)) for t in range(len(first))]
            averages[name] = round(average(run, held_out, [[value] for value in each[name]]), 2)
    scores = {task.name: round(value, 2) for task, value in zip(held_out.tasks, each["main"])}
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


def print_lines(lines: list[list[str]], total: bool = True) -> None:
    """A table: a rule under the first line, and above the last if that is a total."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for i, line in enumerate(lines):
        if i == 1 or total and i == len(lines) - 1:
            print("-" * (sum(widths) + 2 * len(widths) - 2))
        print(line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:])), sep="  ")


# ---------------------------------------------------------------------------------------- the command


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a mistake of the user's is one line, with exit status 2 (Ctrl-C and SIGTERM: 130)."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks ± shows a question mark
    default = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
        return
    except BrokenPipeError:  # whoever reads the output, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return
    except (InputError, OSError) as problem:  # OSError: a full disk, a folder taken away
        message, status = f"error: {problem}", 2
    except torch.OutOfMemoryError as problem:
        advice = "a smaller --batch-size or --eval-batch-size may help"
        message, status = f"error: out of memory; {advice} ({str(problem).splitlines()[0]})", 2
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    finally:
        signal.signal(signal.SIGTERM, default)
    if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:  # of several processes, one speaks
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
        task = TASKS.get(typed.get("task"))
        if not {"task", "method"} <= typed.keys() or typed["method"] == "hyper" or hasattr(task, "evaluate") or hasattr(task, "start"):
            raise InputError("name a RUN, or a plain Llama: --model DIR --task p3 --method fewshot (or zeroshot)")
        return settle(typed | {"steps": 0}), None, Path(out or f"runs/eval-{typed['task']}-{typed['method']}")
    for name in typed.keys() - EVALUATION - MOVABLE:
        raise InputError(f"--{name.replace('_', '-')}: {folder} was trained with its own, which can't be changed")
    before = {name: value for name, value in read_args(Path(folder)).items() if name not in EVALUATION}
    args = settle(typed, before)  # --limit and the like of the training are not inherited
    way, sets = several(args)
    return args, Path(folder), Path(out or Path(folder) / (way and f"{way}-{sets}"))  # beside the run's own result, not in its place


def final_results(run: Run, held_out: HeldOut | None, before: float | None, out: Path) -> dict:
    """Evaluate, write results.json, then print the table. before: the average before the first step."""
    evaluation = evaluate(run, held_out) if held_out else run.task.evaluate(run.args, run.hyper, run.formatter)
    results, lines = evaluation
    results |= {"before": before, "args": portable(run.args)}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results)  # first of all: what is printed may go nowhere
    print_lines(lines)
    return results


def score_before(folder: Path, args: argparse.Namespace) -> float | None:
    """The average before the first step as the run's own results hold it, if they were evaluated in the same way."""
    path = folder / "results.json"
    if not path.exists():
        return None
    with reading(path, "not the results of a run"):
        results = json.loads(path.read_text())
        same = all(results["args"].get(name) == getattr(args, name) for name in EVALUATION - {"controls", "eval_batch_size"})
        return results.get("before") if same else None


def main() -> None:
    args, folder, out = settings()
    if (out / "args.json").exists() and (folder is None or out.resolve() != folder.resolve()):
        raise InputError(f"--out {out}: holds another run, whose results would be replaced")
    run = open_run(args, folder)
    held_out = None if hasattr(run.task, "evaluate") else prepare(run, run.task.load(args, run.formatter, "test"))
    final_results(run, held_out, score_before(folder, args) if folder else None, out)
    if held_out and report(held_out.left_out):
        print(report(held_out.left_out))


if __name__ == "__main__":
    run_command(main)
