"""What a prefix remembers: each example that was compressed is asked back.

    python -m tools.probe RUN [--out FILE]

Examples of the held-out tasks are compressed, and then each is a query itself. Percent of right answers,
after gists and with the examples in context: by where the example stood (first … last), by how many examples
there were, and by how many of them had its label. "Lost by the boundary", "lost if surprise" and "lost along
the way" would show as slopes.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from data import Episode
from eval import BASELINES, MAIN, Column, longest_query, score
from llama import InputError
from run import Parser, Run, add_options, number, open_run, print_lines, read_args, resolve_args, run_command
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
    choices = episode.queries[0].choices
    shots = episode.shots[:count]
    queries = [replace(s, choices=s.choices or choices, references=(s.target,)) for s in shots]
    return replace(episode, shots=shots, queries=queries)


def those_that_fit(run: Run, episode: Episode) -> Episode:
    """With the examples that both columns can read: beside the gists, and beside the longest query."""
    room = max(len(run.hyper.gists), longest_query(run.formatter, asked_back(episode, len(episode.shots))))
    fits = []
    for shot in episode.shots:
        more = replace(episode, shots=[*fits, shot])
        if len(run.formatter.context_parts(more, reserved=room)[1]) == len(more.shots):
            fits.append(shot)
    return replace(episode, shots=fits)


def probe(run: Run, draws: int) -> list[Asked]:
    """For 1, 2, 4, … examples of each held-out task, and all of them."""
    args = run.args
    found = []
    for task in tqdm(run.task.load(args, run.formatter, "test"), desc="asking", leave=False):
        drawn = [task.evaluation(args.seed, n, args.shots, 1)[0] for n in range(draws)]
        drawn = [episode for n, episode in enumerate(drawn) if episode not in drawn[:n]]  # (S-NI's are given)
        for episode in [those_that_fit(run, episode) for episode in drawn if episode.shots]:
            whole = len(episode.shots)
            counts = {2**i for i in range(whole.bit_length()) if 2**i < whole} | {whole}
            for count in sorted(counts - {0}):
                again = asked_back(episode, count)
                scores = {name: score(run, column, [again], []) for name, column in COLUMNS.items()}
                labels = [shot.target for shot in again.shots]
                for place, label in enumerate(labels):
                    own = {name: values[place] for name, values in scores.items()}
                    found.append(Asked(place + 1, count, labels.count(label), own))
    return found


def grouped(asked: list[Asked], by: str) -> dict[int, list[Asked]]:
    groups = {}
    for one in sorted(asked, key=lambda one: getattr(one, by)):
        groups.setdefault(getattr(one, by), []).append(one)
    return groups


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished hypernetwork's run")
    parser.add_argument("--out", metavar="FILE", help="the picture (default: RUN/probe.png)")
    parser.add_argument("--sets", type=number(int, 1), help="draws of examples (5)")
    add_options(parser, "place")
    typed = vars(parser.parse_args())
    folder = Path(typed.pop("folder"))
    sets = typed.pop("sets", 5)
    out = picture(Path(typed.pop("out", folder / "probe.png")))
    run = open_run(resolve_args(typed, read_args(folder)), folder)
    if run.args.method != "hyper" or not run.hyper.gist_ids or run.task.evaluate:
        raise InputError(f"{folder}: not the run of a hypernetwork with tasks")
    if run.hyper.compression.parts > 1:
        what = "its prefixes are made of several sets of examples; what is probed is one"
        raise InputError(f"{folder}: {what}")
    found = probe(run, sets)
    if not found:
        raise InputError(f"{folder}: its held-out tasks have no examples to ask back")
    whole = max(asked.count for asked in found)
    of_whole = [asked for asked in found if asked.count == whole]
    pictures = {
        f"place among {whole} examples": grouped(of_whole, "place"),
        "number of examples": grouped(found, "count"),
        f"examples with its label, of {whole}": grouped(of_whole, "alike"),
    }
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (title, groups) in zip(figure.subplots(1, 3, sharey=True), pictures.items()):
        means = {}
        for name in COLUMNS:
            means[name] = [statistics.fmean(a.scores[name] for a in group) for group in groups.values()]
            axes.plot(list(groups), means[name], marker="o", markersize=3, label=name)
        axes.set(xlabel=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        lines = [[title, *COLUMNS, "asked"]]
        for (x, group), values in zip(groups.items(), zip(*means.values())):
            lines.append([str(x), *(f"{value:.1f}" for value in values), str(len(group))])
        print_lines(lines, total=False)
        print()
    figure.axes[0].set(ylabel=f"examples asked back: {run.task.METRIC}, %")
    figure.axes[0].legend(frameon=False)
    write_picture(figure, out)


if __name__ == "__main__":
    run_command(main)
