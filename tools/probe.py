"""What a prefix remembers: each example that was compressed is asked back.

    python -m tools.probe RUN [--out FILE]

Examples of the held-out tasks are compressed, and then each is a query itself. How often the answer is right, after
gists and with the examples in context: by where the example stood (first … last), by how many examples there were, and by
how many of them had its label. "Lost by the boundary", "lost if surprise", "lost along the way" would show as slopes.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data import Episode
from eval import BASELINES, MAIN, Column, score
from llama import InputError
from tasks import TASKS, Parser, Run, add_places, open_run, positive, read_args, settle, several
from tools import print_lines, run_command
from tools.report import picture, write_picture

COLUMNS: dict[str, Column] = {"gists": MAIN["hyper"], "in context": BASELINES["fewshot"]}


@dataclass(frozen=True)
class Asked:
    """One example asked back: its place among how many, how many had its label, and what came of it."""

    place: int
    count: int
    alike: int
    scores: dict[str, float]  # column -> percent


def asked_back(episode: Episode, count: int) -> Episode:
    """The first examples of an episode, each also a query."""
    (query, *_), shots = episode.queries, episode.shots[:count]
    return replace(episode, shots=shots, queries=[replace(s, options=s.options or query.options, references=(s.target,)) for s in shots])


def probe(run: Run, draws: int) -> list[Asked]:
    """For 1, 2, 4, … examples of each held-out task, and all of them."""
    args, found, tasks = run.args, [], run.task.load(run.args, run.formatter, "test")
    for task in tqdm(tasks, desc="asking", leave=False):
        for n in range(draws):
            episode = task.evaluation(args.seed, n, args.shots, 1)[0]
            whole = len(episode.shots)
            for count in sorted({2**i for i in range(whole.bit_length()) if 2**i < whole} | {whole}):
                again = asked_back(episode, count)
                scores = {name: score(run, column, [again], []) for name, column in COLUMNS.items()}
                labels = [shot.target for shot in again.shots]
                for place, label in enumerate(labels):
                    found.append(Asked(place + 1, count, labels.count(label), {name: values[place] for name, values in scores.items()}))
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished hypernetwork's run")
    parser.add_argument("--out", metavar="FILE", help="the picture (default: RUN/probe.png)")
    parser.add_argument("--sets", type=positive, help="draws of examples (5)")
    add_places(parser)
    typed = vars(parser.parse_args())
    folder, sets = Path(typed.pop("folder")), typed.pop("sets", 5)
    out = picture(Path(typed.pop("out", folder / "probe.png")))
    args = settle(typed, read_args(folder))
    if several(args)[0]:
        raise InputError(f"{folder}: its prefixes are made of several sets of examples; what is probed is one")
    if args.method != "hyper" or not hasattr(TASKS[args.task], "load") or hasattr(TASKS[args.task], "start"):
        raise InputError(f"{folder}: not the run of a hypernetwork with tasks")
    found = probe(open_run(args, folder), sets)
    if not found:
        raise InputError(f"{folder}: its held-out tasks have no examples to ask back")
    whole = max(asked.count for asked in found)
    pictures = {
        f"place among {whole} examples": {place: [a for a in found if a.count == whole and a.place == place] for place in range(1, whole + 1)},
        "number of examples": {count: [a for a in found if a.count == count] for count in sorted({a.count for a in found})},
        f"examples with its label, of {whole}": {
            n: some for n in range(1, whole + 1) if (some := [a for a in found if a.count == whole and a.alike == n])
        },
    }
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (title, groups) in zip(figure.subplots(1, 3, sharey=True), pictures.items()):
        lines = [[title, *COLUMNS, "asked"]]
        means = {name: [statistics.fmean(a.scores[name] for a in some) for some in groups.values()] for name in COLUMNS}
        for i, (x, some) in enumerate(groups.items()):
            lines.append([str(x), *(f"{values[i]:.1f}" for values in means.values()), str(len(some))])
        print_lines(lines, total=False)
        print()
        for name, values in means.items():
            axes.plot(list(groups), values, marker="o", markersize=3, label=name)
        axes.set(xlabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel=f"examples asked back: {TASKS[args.task].METRIC}, %")
    figure.axes[0].legend(frameon=False)
    write_picture(figure, out)


if __name__ == "__main__":
    run_command(main)
