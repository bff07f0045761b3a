"""Tables and pictures of finished runs.

python -m tools.report table DIR…              a line for each run, or folder of runs: mean ± deviation
python -m tools.report plot RUN… --out FILE    curves over steps; --by gists, --by shots: results by an option
python -m tools.report bars RUN… --out FILE    the last line of a run's table; of several seeds, the means
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import io
import json
import os
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

import tasks
from eval import MAIN, TITLES, spread
from gist import gist_mask
from llama import InputError, reading
from lora import replacing
from run import Parser, names_of, read_args, read_lines, run_command

IN_CONTEXT = {"fewshot": "in context", "base_fewshot": "base, in context"}  # of runs with other --shots
TEXT_TITLES = {  # of the columns, where the result is a loss on text
    "zeroshot": "without, before",
    "fewshot": "A D in full, before",
    "no_prefix": "without, after",
    "in_full": "A D in full, after",
    "other_task": "other text's gists",
}


def read_results(run: Path) -> dict:
    with reading(run / "results.json", "not the results of a run"):
        return json.loads((run / "results.json").read_text()) if (run / "results.json").exists() else {}


def compare(rows: list[Path]) -> str:
    """A table in Markdown: a line for each folder, mean ± standard deviation over the runs in it.

    A folder may be a run itself; else its runs differ in their seed.
    """
    rows = list(dict.fromkeys(row.resolve() for row in rows))
    table: dict[str, dict[str, list[float]]] = {}  # row -> column -> a value for each run
    metrics = set()
    shots = set()
    for row in rows:
        name = row.name if [other.name for other in rows].count(row.name) == 1 else str(row)
        values = table.setdefault(name.replace("_", " "), {})
        paths = [path for path in sorted(row.glob("*/results.json")) if not path.parent.name.startswith(".")]
        if (row / "results.json").exists():  # a run itself
            paths = [row / "results.json"]
        if not paths:
            raise InputError(f"{row}: holds no runs with results.json")
        options = []
        for path in paths:
            with reading(path, "not the results of a run"):
                results = read_results(path.parent)
                columns = columns_of(results, read_lines(path.with_name("log.jsonl")))
                metric = results["metric"]
                args = {"shots": None, "method": None} | results["args"]
            options.append(args)
            metrics.add(metric)
            shots.add(args["shots"])
            for column, value in columns.items():
                values.setdefault(column, []).append(value)
        differs = differing(options)
        if differs:
            what = f"holds runs that differ in {', '.join(differs)}, so their mean says nothing"
            raise InputError(f"{row}: {what}; name them one by one")
    if len(metrics) > 1:
        raise InputError(f"these runs have different metrics: {', '.join(sorted(metrics))}")
    titles = TITLES | (TEXT_TITLES if metric == "loss" else {}) | (IN_CONTEXT if len(shots) > 1 else {})
    names = list(dict.fromkeys(name for values in table.values() for name in values if name != "seconds"))
    heads = [titles[name].format(**args) if name in titles else name for name in names]
    lines = [f"| {metric} | " + " | ".join([*heads, "seconds a run"]) + " |", "|---" * (len(names) + 2) + "|"]
    for row, values in table.items():
        cells = []
        for name in names:
            digits = 3 if metric == "loss" and "%" not in name else 1
            cells.append(mean_and_deviation(values.get(name, []), digits))
        lines.append("| " + " | ".join([row, *cells, f"{statistics.fmean(values['seconds']):.0f}"]) + " |")
    return "\n".join(lines)


def columns_of(results: dict, log: list[dict]) -> dict[str, float]:
    """What a table has of one run. Seconds: of training and evaluation."""
    columns = {"result": results["average"]} | results["baselines"] | results["controls"]
    if "kept" in results:
        columns["share kept, %"] = results["kept"]
    if results["args"]["task"] == "prefix" and len(results["tasks"]) <= 8:  # as many as the paper tunes on
        columns |= {name: task["mean"] for name, task in results["tasks"].items()}
    columns["seconds"] = results["seconds"] + sum(line.get("seconds", 0) for line in log)
    check_numbers(columns.values())
    return columns


def check_numbers(values: Iterable) -> None:
    if not all(isinstance(value, (int, float)) for value in values):
        raise ValueError("a result isn't a number")


def mean_and_deviation(values: list[float], digits: int) -> str:
    if not values:
        return ""
    deviation = spread(values)
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


Points = dict[tuple[str, str], dict[float, list[float]]]  # (run's name, column) -> x -> values of all runs


COMPARED = {  # what results are held against where they are drawn by an option -> its title
    name: (TITLES | IN_CONTEXT)[name]
    for name in ("zeroshot", "fewshot", "label_anchors", "mean_pooled", "fewer_shots")
}


def differing(options: list[dict]) -> list[str]:
    """The options that make runs other runs: not the seed, nor how they were watched and evaluated."""
    same = {"seed", "run"} | names_of("place", "eval") | names_of("course") - {"steps"}
    return [
        name for name in options[0] if name not in same and len({str(args.get(name)) for args in options}) > 1
    ]


def curves(runs: list[Path], by: str | None) -> tuple[Points, str, dict]:
    """What to draw; what the values are; the options of the last run."""
    points: Points = {}
    kinds = set()
    options = [read_args(run) for run in runs]
    named = {"task", "method", "downstream", "init", by}
    differs = [name for name in differing(options) if name not in named]
    for run, args in zip(runs, options):
        name = f"{args['task']} {args['method']} {args.get('downstream', '')} {Path(args['model']).name}"
        name = args.get("init") or name
        name += "".join(f", {option.replace('_', ' ')} {args.get(option)}" for option in differs)
        metric = tasks.find(args["task"]).METRIC
        with reading(run, "has no readable results or log"):
            if by:
                results = json.loads((run / "results.json").read_text())
                others = results["baselines"] | results["controls"]
                compared = {column: others[column] for column in COMPARED if column in others}
                rows = [(args[by], {"main": results["average"]} | compared)]
            else:
                lines = list(read_lines(run / "log.jsonl"))
                measured = any("score" in line for line in lines)
                # Hyperpretraining, whose result is a loss, is measured on P3's held-out tasks.
                metric = {"loss": "accuracy"}.get(metric, metric) if measured else "loss"
                key = "score" if measured else "loss"
                lines = [line for line in lines if key in line]
                rows = [(line["step"], {"main": line[key]} | line.get("controls", {})) for line in lines]
            for x, values in rows:
                check_numbers((x, *values.values()))
        kinds.add(metric)
        for x, values in rows:
            for column, value in values.items():
                points.setdefault((name, column), {}).setdefault(x, []).append(value)
    if len(kinds) != 1:
        raise InputError(f"these runs have different things to draw: {', '.join(sorted(kinds))}")
    if not any(points.values()):
        raise InputError("these runs have nothing to draw yet")
    return points, kinds.pop(), args


def draw_curve(axes, curve: dict[float, list[float]], label: str, main: bool, marker: str | None) -> None:
    """The mean at each x, and a band of one standard deviation. Dashed where it is not the main thing."""
    xs = sorted(curve)
    means = np.array([statistics.fmean(curve[x]) for x in xs])
    deviations = np.array([spread(curve[x]) or 0.0 for x in xs])
    style = {"linewidth": 1.8} if main else {"linewidth": 1.2, "linestyle": "--"}
    (line,) = axes.plot(xs, means, label=label, marker=marker, markersize=4, **style)
    axes.fill_between(
        xs, means - deviations, means + deviations, color=line.get_color(), alpha=0.15, linewidth=0
    )


def log_ticks(axes, xs: Iterable[float]) -> None:
    xs = sorted(xs)
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [f"{x:.3g}" for x in xs])


def plot(runs: list[Path], path: Path, by: str | None = None) -> None:
    """Curves of several runs in one picture.

    Over steps, the held-out score where it was measured, else the loss; or, `by` an option of theirs (gists,
    shots), their results.

    Runs that differ only in their seed make one curve: the mean, and a band of one standard deviation.
    Baselines and controls are dashed. Below a single curve, the training loss of labels and of EOS.
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    points, kind, args = curves(runs, by)
    alone = len({name for name, _ in points}) == 1
    below = []
    if alone and not by:
        below = [line for run in runs for line in read_lines(run / "log.jsonl") if "label_loss" in line]
    figure = Figure(figsize=(7, 6.0 if below else 4.2), layout="constrained")
    heights = [7, 3] if below else [7]
    axes, *under = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    heads = TITLES | (COMPARED if by else {})
    for (name, column), curve in points.items():
        label = name if column == "main" else heads[column].format(**args) if alone else f"{name}, {column}"
        draw_curve(axes, curve, label, column == "main", marker="o" if by else None)
    unit = {"loss": "loss per token", "accuracy": "accuracy on held-out rows, %", "rougeL": "ROUGE-L"}[kind]
    axes.set(xlabel=by or "step", ylabel=unit)
    if by:
        log_ticks(axes, {x for curve in points.values() for x in curve})
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for part in under:
        for key, label in (("label_loss", "label"), ("end_loss", "EOS after it")):
            of_step: dict[int, list[float]] = {}
            for line in below:
                if key in line:  # (a target that ends as its layout does has no EOS)
                    of_step.setdefault(line["step"], []).append(line[key])
            if not of_step:
                continue
            means = [statistics.fmean(losses) for losses in of_step.values()]
            part.plot(list(of_step), means, label=label, linewidth=1.2)
        part.set(xlabel="step", ylabel="loss per token", yscale="log")
        part.grid(alpha=0.3)
        part.legend(frameon=False)
    write_picture(figure, path)


def bars(runs: list[Path], path: Path) -> None:
    """Result, baselines and controls of runs that differ in their seed: means, and whiskers of one deviation.

    (Of a single run, the whisker of its result is the deviation over draws of examples.)
    """
    from matplotlib.figure import Figure  # slow to import, and only needed here

    values: dict[str, list[float]] = {}
    colours: dict[str, str] = {}
    differs = differing([read_args(run) for run in runs])
    if differs:
        raise InputError(f"bars are of runs that differ in their seed, and these do in {', '.join(differs)}")
    for run in runs:
        results = read_results(run)
        with reading(run / "results.json", "not the results of a run"):
            parts = ({"main": results["average"]}, results["baselines"], results["controls"])
            for columns in parts:
                check_numbers(columns.values())
            if results["metric"] == "loss":
                raise InputError(f"{run}: its result is a loss; bars are of scores")
        for columns, colour in zip(parts, ("#0072b2", "#999999", "#e69f00")):
            for name, value in columns.items():
                values.setdefault(name, []).append(value)
                colours[name] = colour
    args = results["args"]
    titles = TITLES | {"main": "prefix" if args["task"] == "prefix" else MAIN[args["method"]].title}
    names = list(values)[::-1]
    heads = [titles[name].format(**args) for name in names]
    means = [statistics.fmean(values[name]) for name in names]
    deviations = {name: spread(values[name]) or 0.0 for name in names}
    if len(runs) == 1:
        deviations["main"] = results.get("std") or 0.0
    figure = Figure(figsize=(7, 0.6 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    whiskers = [deviations[name] for name in names]
    axes.barh(heads, means, xerr=whiskers, color=[colours[name] for name in names])
    for y, mean in enumerate(means):
        axes.text(1, y, f"{mean:.1f}", va="center", color="white", fontweight="bold")
    axes.set(xlabel={"accuracy": "accuracy on held-out tasks, %"}.get(results["metric"], results["metric"]))
    axes.spines[["top", "right"]].set_visible(False)
    write_picture(figure, path)


# A short row: two examples, gists, a query.
WORDS = ["BOS", "fox", ":", "kilo", "owl", ":", "east", "gist", "gist", "gist", "BOS", "fox", ":"]


def draw_mask(path: Path) -> None:
    """The gist mask of a short row, with the tokens' positions and the two passes that it falls into."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    T = len(WORDS)
    first = WORDS.index("gist")
    gists = WORDS.count("gist")
    end = first + gists
    is_gist = torch.tensor([[word == "gist" for word in WORDS]])
    names = [f"gist {t - first}" if word == "gist" else word for t, word in enumerate(WORDS)]
    looking = [f"{name}  {t - first:3d}".replace("-", "−") for t, name in enumerate(names)]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = ListedColormap(["white", "#9ecae1", "#fdae6b"])
    kinds = gist_mask(is_gist)[0].int() * (1 + is_gist.int())  # unseen, a token, a gist
    axes.pcolormesh(kinds, cmap=colours, edgecolors="#dddddd", linewidth=0.5)
    axes.set_yticks(torch.arange(T) + 0.5, looking, family="monospace")
    axes.set_xticks(torch.arange(T) + 0.5, names, rotation=90, family="monospace")
    axes.axhline(end, color="black", linewidth=1.2)
    axes.text(T + 0.3, end / 2, "first pass:\nthe hypernetwork\n(LoRA on)", va="center")
    second = f"second pass:\nthe downstream model\n(LoRA off), offset {gists};"
    second += "\nonly the gists are left\nof the first"
    axes.text(T + 0.3, (end + T) / 2, second, va="center")
    axes.set(ylabel="a token that looks, and its position", xlabel="a token that it may look at")
    axes.set_aspect("equal")
    axes.invert_yaxis()
    write_picture(figure, path)


MADE_BY = "HyperLlama, tools.report"  # in the pictures' metadata: these may be replaced
PICTURES = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}  # where each kind says so


def picture(path: Path) -> Path:
    """A name that a picture can have; InputError where it would replace a picture that isn't ours."""
    if path.suffix not in PICTURES:
        raise InputError(f"--out {path}: a picture's name ends in .png, .svg or .pdf")
    if os.path.lexists(path) and not (path.is_file() and MADE_BY.encode() in path.read_bytes()):
        raise InputError(f"--out {path}: would replace something that isn't a picture of ours")
    return path


def write_picture(figure, path: Path) -> None:
    drawn = io.BytesIO()  # (where a disk is full, matplotlib's own writers can raise anything)
    metadata = {PICTURES[path.suffix]: MADE_BY}
    figure.savefig(drawn, dpi=110, format=path.suffix.removeprefix("."), metadata=metadata)
    with replacing(path) as partial:
        partial.write_bytes(drawn.getvalue())
    print(f"written: {path}")


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("what", choices=["table", "plot", "bars"])
    add("folders", nargs="+", metavar="DIR", help="folders of runs (table), or runs")
    add("--out", metavar="FILE", default=None, help="where to draw (runs/curves.png)")
    by = "results by this option, rather than curves over steps"
    add("--by", choices=["gists", "shots"], default=None, help=by)
    asked = parser.parse_args()
    folders = [Path(folder) for folder in asked.folders]
    if asked.by and asked.what != "plot":
        raise InputError("--by belongs to plot")
    if asked.what == "table":
        if asked.out is not None:
            raise InputError("--out belongs to plot and bars; a table is printed")
        print(compare(folders))
        return
    out = picture(Path("runs/curves.png" if asked.out is None else asked.out))
    if asked.what == "bars":
        bars(folders, out)
    else:
        plot(folders, out, asked.by)


if __name__ == "__main__":
    run_command(main)
