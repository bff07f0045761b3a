"""The lecture: gisting in six steps, each a few sentences and what a model computes.

    python gist.py                                 in the terminal
    python -m tools.lecture --pictures figures     the pictures of docs/lecture.md

The model is the run that `python train.py --task p3` leaves in runs/. Where there is none, it is the
miniature with random numbers as its LoRA set. Every number and every picture is measured when the lecture is
given, on a few queries of each held-out task.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from eval import draw_held_out, encode_queries, gist_context, score_choices
from gist import Gists, HyperLlama, Rows, gist_mask, nothing
from llama import attend, int_tensor, ragged, rotary_angles, rotate
from run import PROJECT, Parser, a_path, default_folder, open_run, read_args, resolve_args, run_command
from tools.report import WORDS, picture, write_picture

QUERIES = 15  # of each held-out task
SHIFTS = range(-32, 33, 4)  # how many positions too late a query begins


@dataclass
class Lesson:
    """A model, and what it is asked. S tasks, N queries.

    model_name  what the lecture calls the model
    rows        [S] what the hypernetwork reads: a task's examples and the gists
    task        [N] which task each query belongs to
    other       [S] another task, for each
    prompts     N rows of tokens, BOS first
    choices     N lists of the choices' tokens
    right       N numbers of the right choice
    """

    model_name: str
    hyper: HyperLlama
    rows: Rows
    task: Tensor
    other: Tensor
    prompts: list[list[int]]
    choices: list[list[list[int]]]
    right: list[int]

    @property
    def context(self) -> int:
        """How many tokens the first task's examples have, with their BOS."""
        return int(self.rows.kept[0, 0])


class Score(NamedTuple):
    accuracy: float  # percent of queries whose right choice is the likeliest
    loss: float  # -log p(right choice), mean over queries

    def cells(self) -> list[str]:
        return [f"{self.accuracy:.0f} %", f"{self.loss:.2f}"]


def open_lesson(queries: int = QUERIES) -> Lesson:
    """The trained run, or the miniature; so many queries of each held-out task, with one draw of examples."""
    args = resolve_args({"task": "p3"})
    folder = PROJECT / default_folder(args)
    trained = (folder / "adapters.safetensors").exists()
    args = resolve_args({}, read_args(folder)) if trained else args
    run = open_run(replace(args, sets=1, limit=queries), folder if trained else None)
    name = f"{folder.name}, after {args.steps} steps of training"
    if not trained:
        name = f"tiny/{Path(args.model).name}, not trained on tasks, random numbers as its LoRA set"
        generator = torch.Generator().manual_seed(0)
        for parameter in (p for path, p in run.hyper.named_parameters() if path.endswith(".B")):
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    held_out = draw_held_out(run)
    episodes = [episode for (episode,) in held_out.episodes[0]]  # P3 has one for each task and draw
    contexts = [context for episode in episodes for context in gist_context(run, episode)]
    encoded = [encode_queries(run.formatter, episode) for episode in episodes]
    return Lesson(
        name,
        run.hyper,
        Rows.of(contexts, run.device),
        int_tensor([s for s, episode in enumerate(episodes) for _ in episode.queries], run.device),
        int_tensor([held_out.other(s) for s in range(len(episodes))], run.device),
        [prompt for prompts, _ in encoded for prompt in prompts],
        [options for _, choices in encoded for options in choices],
        [query.choices.index(query.target) for episode in episodes for query in episode.queries],
    )


# ------------------------------------------------------------------------------- what is computed


def score(lesson: Lesson, prefixes: Gists, shift: int = 0, adapter: str | None = None) -> Score:
    """How the queries are answered after prefixes [N], `shift` positions too late, by a LoRA set or none."""
    prefixes = replace(prefixes, offset=prefixes.offset + shift)
    scores = score_choices(lesson.hyper.model, lesson.prompts, lesson.choices, prefixes, adapter)
    accuracy = fmean(100.0 * (values.index(max(values)) == n) for values, n in zip(scores, lesson.right))
    return Score(accuracy, -fmean(values[n] for values, n in zip(scores, lesson.right)))


def compare_roles(lesson: Lesson) -> dict[tuple[bool, bool], tuple[float, Score]]:
    """LoRA on or off in the first pass, and in the second -> a distance from the joint pass, and the score.

    The distance is by how much a logit differs at most, in the first query of each task.
    """
    tasks = lesson.task.tolist()
    first_queries = [tasks.index(s) for s in range(len(lesson.other))]
    joint = [joint_pass(lesson, n) for n in first_queries]
    results = {}
    for roles in ((True, False), (False, False), (True, True)):
        first, second = ("hyper" if on else None for on in roles)
        gists = HyperLlama(lesson.hyper.model, lesson.hyper.gists, first, second).compress(lesson.rows)
        differences = []
        for s, (n, expected) in enumerate(zip(first_queries, joint)):
            query = int_tensor([lesson.prompts[n]], lesson.task.device)
            past = gists[int_tensor([s], query.device)].as_past(query.shape[1], second)
            logits, _ = lesson.hyper.model(query, **past)
            differences.append((logits[0] - expected).abs().max().item())
        results[roles] = max(differences), score(lesson, gists[lesson.task], adapter=second)
    return results


def joint_pass(lesson: Lesson, n: int) -> Tensor:
    """Logits at the tokens of query number n, all in one row with its examples and gists. [T, V]"""
    G = len(lesson.hyper.gists)
    s = int(lesson.task[n])
    length = int(lesson.rows.kept[s, -1]) + 1  # of the examples and gists, without padding
    query = int_tensor(lesson.prompts[n], lesson.task.device)
    row = torch.cat((lesson.rows.tokens[s, :length], query))
    positions = torch.arange(G - length, G + len(query), device=row.device)
    return lesson.hyper.joint(row[None], positions[None])[0, length:]


def compare_offsets(lesson: Lesson) -> dict[int, Score]:
    prefixes = lesson.hyper.compress(lesson.rows)[lesson.task]
    return {shift: score(lesson, prefixes, shift) for shift in SHIFTS}


def compare_prefixes(lesson: Lesson) -> dict[str, Score]:
    gists = lesson.hyper.compress(lesson.rows)
    return {
        "gists of the task's examples": score(lesson, gists[lesson.task]),
        "gists of another task": score(lesson, gists[lesson.other[lesson.task]]),
        "no gists": score(lesson, nothing(lesson.task.device)),
    }


def attention_to_gists(lesson: Lesson) -> Tensor:
    """The share of attention of a query's last token to each gist: mean over heads and queries. [L, G]

    What attention returns is its weights times the values: with the identity for values, the weights.
    """
    model = lesson.hyper.model
    gists = lesson.hyper.compress(lesson.rows)[lesson.task]
    tokens = ragged(lesson.prompts, device=lesson.task.device)  # [N, T]
    last = int_tensor([len(prompt) - 1 for prompt in lesson.prompts], tokens.device)
    x, positions, adapter = model.inputs(tokens, gists.offset, None)
    angles = rotary_angles(positions, model.config)
    shares = []
    for layer, past in zip(model.layers, gists.past):
        h = layer.input_layernorm(x)
        attention = layer.self_attn
        q = rotate(attention.heads(attention.q_proj(h, adapter)), angles)
        k, _ = attention.keys_values(h, angles, past, adapter)  # [N, K, G + T, hd]
        identity = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        weights = attend(q, k, identity, None)  # [N, H, T, G + T]
        weights = weights[torch.arange(len(last)), :, last]  # [N, H, G + T]
        shares.append(weights.float().mean((0, 1))[: len(lesson.hyper.gists)])
        x, _, _ = layer(x, angles, past, None, adapter)
    return torch.stack(shares).cpu()


# ------------------------------------------------------------------------------------ in the terminal

SHADES = {0.64: "█", 0.16: "▓", 0.04: "▒", 0.01: "░", 0.0: " "}  # from which share of attention on
EIGHTHS = " ▁▂▃▄▅▆▇█"


@torch.no_grad()
def show(lesson: Lesson) -> None:
    tasks = len(lesson.other)
    print(f"""\
HyperLlama is one Llama in two roles. The hypernetwork reads the examples of a task, with
LoRA on: a small trained update of its matrices. The downstream model answers queries,
with LoRA off. In between stand gists: tokens with an embedding of their own and no text.
Their keys and values, in every layer, are all that the second role gets of the examples.

The model: {lesson.model_name}.
The queries: the first {len(lesson.prompts) // tasks} of each of {tasks} held-out tasks.""")
    show_positions(lesson)
    show_mask()
    show_roles(lesson)
    show_offsets(lesson)
    show_prefixes(lesson)
    show_attention(lesson)


def show_positions(lesson: Lesson) -> None:
    G = len(lesson.hyper.gists)
    print(f"""
1. Where tokens stand

The hypernetwork reads BOS (the token that begins a row), the examples and {G} gists. The
downstream model reads BOS and a query. Positions are counted from the first gist: the
examples before it have negative ones, and every query begins at {G}. This is its offset.
""")
    lines = ["", "", ""]
    for label, first, last, role in (
        ("BOS, examples", -lesson.context, -1, "first pass: LoRA on"),
        ("gists", 0, G - 1, ""),
        ("BOS, query", G, G + len(lesson.prompts[0]) - 1, "second pass: LoRA off"),
    ):
        line = f"├─── {label} ───┤"
        ends = f"{first}{last:>{len(line) - len(str(first))}}"
        lines = [text + part.ljust(len(line) + 3) for text, part in zip(lines, (ends, line, role))]
    print("\n".join("   " + text.rstrip() for text in lines))


def show_mask() -> None:
    is_gist = torch.tensor([[word == "gist" for word in WORDS]])
    first_gist = WORDS.index("gist")
    end = first_gist + WORDS.count("gist")
    print("""
2. What a token sees

Now all in one row, a short one. Each line is a token t with its position, each column a
token s. # is a gist that t sees, o another token that it sees, . a token that it doesn't:

   see(t, s)  =  s ≤ t  and  (gist(s) or segment(s) = segment(t))

The last gist ends a segment. After it, gists are all that can be seen of the first
segment, in every layer. So a second pass needs nothing of the first but their keys and
values.
""")
    for t, sees in enumerate(gist_mask(is_gist)[0].tolist()):
        marks = " ".join("." if not seen else "#" if is_gist[0, s] else "o" for s, seen in enumerate(sees))
        note = "kept" if is_gist[0, t] else ""
        print(f"   {t - first_gist:>3}  {WORDS[t]:<4}  {marks}   {note}".rstrip())
        if t == end - 1:
            print(f"              {'- ' * len(WORDS)}  second pass")


def show_roles(lesson: Lesson) -> None:
    print("""
3. Two passes are one joint pass

The joint pass reads examples, gists and query as one row under this mask, with LoRA on
up to the last gist and off after it. Two passes have to compute the same logits, with
LoRA on in the first and off in the second. In the other lines LoRA is left off in the
first pass, or left on in the second. It is off there by design, not because it scores
best: the model that answers stays the plain Llama that everybody has.
""")
    lines = [["first pass", "second pass", "difference", "right", "loss"]]
    for roles, (difference, score) in compare_roles(lesson).items():
        names = [f"LoRA {'on' if on else 'off'}" for on in roles]
        lines.append([*names, f"{difference:.5f}", *score.cells()])
    print_table(lines)
    print("""
   difference: of a logit from the joint pass, the largest in the first query of each task
   right: queries whose right choice is the likeliest; loss: -log p(right choice), mean""")


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Cells under heads, the first column at the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for first, *rest in lines:
        print(f"   {first:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(rest, widths[1:])), sep="   ")


def show_offsets(lesson: Lesson) -> None:
    G = len(lesson.hyper.gists)
    scores = compare_offsets(lesson)
    length = fmean(map(len, lesson.prompts))
    print(f"""
4. The offset

Attention scores depend on the distance between two tokens, and the gists' keys stay
rotated for positions 0 … {G - 1}. Here the queries begin too early (-) or too late (+). A
query that ignores the offset begins at position 0, which is {-G:+}. "Distance" is the one
from the last gist to the query's last token, on average. Where it is negative, gists
stand after the token that looks back at them, as they never do in training. A small
mistake may hardly show in a score: what it breaks is that two passes equal the joint one.
""")
    right, losses = zip(*scores.values())
    curves = (("right, %", right, 100.0, 5, 0), ("loss", losses, max(losses), 3, 1))
    for name, values, top, height, digits in curves:
        for line in bars(values, top, height):
            print((" " * 12 + "".join(f" {mark * 3}" for mark in line)).rstrip())
        print(f"   {name:<9}" + "".join(f"{value:>4.{digits}f}" for value in values) + "\n")
    print(f"   {'begin':<9}" + "".join(f"{shift:>+4}" for shift in scores))
    print(f"   {'distance':<9}" + "".join(f"{round(shift + length):>+4}" for shift in scores))


def bars(values: Sequence[float], top: float, height: int) -> list[str]:
    """Bars from 0 to `top`, a column a value, as so many lines of block characters, the highest first."""
    lines = []
    for below in reversed(range(0, 8 * height, 8)):
        eighths = [round(8 * height * value / top) - below for value in values]
        lines.append("".join(EIGHTHS[min(8, max(0, n))] for n in eighths))
    return lines


def show_prefixes(lesson: Lesson) -> None:
    print("""
5. What the gists hold

The same queries after the gists of their own task, after those of another task, and
after nothing. The lines differ in what stands before the query, and in nothing else.
""")
    rows = [[name, *score.cells()] for name, score in compare_prefixes(lesson).items()]
    print_table([["prefix", "right", "loss"], *rows])


def show_attention(lesson: Lesson) -> None:
    shares = attention_to_gists(lesson)
    legend = ", ".join(f"{shade} from {share:.0%}" for share, shade in SHADES.items() if share)
    print(f"""
6. Where a query looks

The last token of a query predicts the answer. This is its attention to each gist, mean
over heads and queries, one line per layer. The rest goes to the query's own tokens.
{legend}
""")
    G = shares.shape[1]
    print(f"   {'gist':<9}" + "".join(f"{g:>3}" for g in range(G)) + "   all gists   query")
    for i, layer in enumerate(shares.tolist()):
        shades = "".join(3 * next(SHADES[least] for least in SHADES if share >= least) for share in layer)
        print(f"   layer {i:<3}{shades}{sum(layer):>12.0%}{1 - sum(layer):>8.0%}")


# ------------------------------------------------------------------------------------- as pictures

PICTURES = [f"lecture-{name}.png" for name in ("positions", "offset", "prefixes", "attention")]
BLUE = "#9ecae1"  # as in figures/mask.png: told apart by all eyes
ORANGE = "#fdae6b"
GREY = "#bdbdbd"


@torch.no_grad()
def draw(lesson: Lesson, folder: Path) -> None:
    import matplotlib  # slow to import
    from matplotlib.figure import Figure

    paths = [picture(folder / name) for name in PICTURES]
    folder.mkdir(parents=True, exist_ok=True)
    drawings = ((draw_positions, 1.8), (draw_offsets, 4), (draw_prefixes, 2.9), (draw_attention, 2.6))
    with matplotlib.rc_context({"font.size": 12, "axes.titlesize": 11}):
        for path, (draw_one, height) in zip(paths, drawings):
            figure = Figure(figsize=(7, height), layout="constrained")
            draw_one(lesson, figure)
            write_picture(figure, path)


def draw_positions(lesson: Lesson, figure) -> None:
    G = len(lesson.hyper.gists)
    query = G + len(lesson.prompts[0]) - 1
    axes = figure.subplots()
    for x, width, color, label, first, last in (
        (0, 6, BLUE, "BOS, examples", -lesson.context, -1),
        (6.2, 2.6, ORANGE, f"{G} gists", 0, G - 1),
        (9.0, 3.4, BLUE, "BOS, query", G, query),
    ):
        axes.barh(0, width, 1, x, color=color, edgecolor="black")
        axes.text(x + width / 2, 0, label, ha="center", va="center")
        axes.text(x, 0.65, str(first).replace("-", "−"), ha="left")
        axes.text(x + width, 0.65, str(last).replace("-", "−"), ha="right")
    axes.text(0, -1.1, "first pass: hypernetwork, LoRA on")
    axes.text(12.4, -1.1, "second pass: LoRA off", ha="right")
    axes.set(xlim=(0, 12.4), ylim=(-1.3, 1.2))
    axes.axis("off")


def draw_offsets(lesson: Lesson, figure) -> None:
    scores = compare_offsets(lesson)
    without = score(lesson, nothing(lesson.task.device))
    length = fmean(map(len, lesson.prompts))
    ends = (SHIFTS[0] - 2, SHIFTS[-1] + 2)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, field, label in ((upper, "accuracy", "right, %"), (lower, "loss", "loss")):
        axes.plot(SHIFTS, [getattr(score, field) for score in scores.values()], "o-", color="#08519c")
        axes.axhline(getattr(without, field), color="#d95f02", linestyle="--", label="no gists")
        axes.axvspan(ends[0], -length, color=GREY, alpha=0.4, linewidth=0)
        axes.set(ylabel=label, xlim=ends)
        axes.set_ylim(bottom=0)
        axes.set_xticks(SHIFTS[::2])
        axes.grid(alpha=0.3)
    upper.set_title(lesson.model_name)
    upper.legend(frameon=False)
    lower.set(xlabel="positions too late (grey: the query's last token stands before the last gist)")


def draw_prefixes(lesson: Lesson, figure) -> None:
    scores = compare_prefixes(lesson)
    names = {
        (True, False): next(iter(scores)),
        (False, False): "LoRA off in the first pass",
        (True, True): "LoRA on in the second pass",
    }
    differences = {}
    for roles, found in compare_roles(lesson).items():
        differences[names[roles]], scores[names[roles]] = found
    axes = figure.subplots()
    axes.barh(list(scores), [score.accuracy for score in scores.values()], color=[ORANGE] + 4 * [BLUE])
    for i, (name, score) in enumerate(scores.items()):
        text = "{} right, loss {}".format(*score.cells())
        if name in differences:
            text += f", logits {differences[name]:.5f} off"
        axes.text(2, i, text, va="center")
    axes.set(xlim=(0, 100), xlabel="right, %", title=lesson.model_name)
    axes.invert_yaxis()


def draw_attention(lesson: Lesson, figure) -> None:
    from matplotlib.colors import LogNorm

    shares = attention_to_gists(lesson)
    axes = figure.subplots()
    cells = axes.pcolormesh((100 * shares).clamp(min=0.1), cmap="cividis", norm=LogNorm(0.1, 100))
    L, G = shares.shape
    axes.set_xticks(torch.arange(G) + 0.5, range(G))
    names = [f"layer {i}: {layer.sum():.0%}" for i, layer in enumerate(shares)]
    axes.set_yticks(torch.arange(L) + 0.5, names)
    axes.set(xlabel="gist", title=lesson.model_name)
    axes.invert_yaxis()
    figure.colorbar(cells, label="attention, %", ticks=[0.1, 1, 10, 100], format="%g")


def main() -> None:
    parser = Parser(__doc__)
    text = "draw into a folder, rather than print"
    parser.add_argument("--pictures", type=a_path, metavar="FOLDER", help=text)
    folder = getattr(parser.parse_args(), "pictures", None)
    if folder is None:
        show(open_lesson())
    else:
        draw(open_lesson(), Path(folder))


if __name__ == "__main__":
    run_command(main)
