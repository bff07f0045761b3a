"""Every table and picture in miniature, from scratch: RESULTS.md and figures/.

    python -m tools.reproduce [--jobs 2] [--only p3 sni …]

Three seeds of each row, so many runs at a time with one thread each; finished runs are kept, so it can be
stopped and started again. Tables and verdicts are computed; the prose beside them quotes no number. With
--only, tables and pictures go to runs/reproduce, and those of the project stay.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data import Formatter
from llama import InputError, Tokenizer, read_config
from run import PROJECT, Parser, number, run_command
from tasks import p3
from tools.cost import at_use

# fmt: off
from tools.report import (
    COMPARED, bars, compare, draw_curve, draw_mask, log_ticks, mean_and_deviation, plot,
    read_results, write_picture,
)
# fmt: on

ALL = Path("runs/reproduce")
SEEDS = (0, 1, 2)
ONE_SEED = {"layout"}  # tables whose runs others start from
BASE = "--model tiny/llama"
C = "--model tiny/llama-c"  # the base after compression hyperpretraining
C_FOLDER = Path("tiny/llama-c")  # itself a finished run
HELPS = {  # what the literature since then found to help
    "HyperLlama distill": f"{BASE} --distill 1",
    "C reconstruct": f"{C} --reconstruct 0.5",
    "HyperLlama both": f"{BASE} --distill 1 --reconstruct 0.5",
    "C gists every 4": f"{C} --gists-every 4",
    "C gists spread": f"{C} --gists-spread",
    "C distill": f"{C} --distill 1",
    "HyperLlama anchors": f"{BASE} --anchors",
    "C anchors": f"{C} --anchors",
    "C chain of 2": f"{C} --chain 2",
    "C emit lora": f"{C} --emit lora --gists 8",
}
FILES = {"two-files": "[12]-*", "third-file": "3-*"}  # of tiny/text; the first two have no task's layout


def folder_of(table: str, row: str) -> Path:
    return ALL / table / row.replace(" ", "_")


PLACES = {  # of what is kept, beside the gists at the end
    "every 4": "--gists-every 4",
    "spread": "--gists-spread",
    "anchors": "--anchors",
    "emit lora": "--emit lora --gists 8",
}


def from_its_own_c(place: str) -> str:
    """P3 from a C that was hyperpretrained further with its gists in that place."""
    return f"--task p3 --model {folder_of('layout', f'C further, {place}')}/seed0 --measure 0"


FURTHER = f"--task hyperpretrain {C} --data {ALL}/third-file --steps 300 --lr 3e-3 --gist-lr 1e-3 --measure 3"
ROWS = {  # table -> row -> options of train.py, or of eval.py where the model stays untouched ("plain")
    "layout": {
        "C of two files": f"--task hyperpretrain --data {ALL}/two-files --steps 1330 --measure 7",
        "C further": FURTHER,
        "C further, drawn": f"{FURTHER} --fewest-gists 1",
        **{f"C further, {row}": f"{FURTHER} {options}" for row, options in PLACES.items()},
    },
    "p3": {
        "HyperLlama": f"--task p3 {BASE} --measure 0",
        "C": f"--task p3 {C}",
        "D": f"--task p3 {BASE} --downstream lora --measure 0",
        "CD": f"--task p3 {C} --downstream lora --measure 0",
        "C without the layout": f"--task p3 --model {ALL}/layout/C_of_two_files/seed0 --measure 0",
        "fine-tuned 0-shot": f"--task p3 {BASE} --method zeroshot --measure 0",
        "fine-tuned 16-shot": f"--task p3 {BASE} --method fewshot --measure 0",
        "C fine-tuned 16-shot": f"--task p3 {C} --method fewshot --measure 0",
    },
    "prefix": {
        f"{init}": f"--task prefix {C} --init {init}"
        + " --run runs/reproduce/p3/C/seed{seed}" * (init == "hyper")
        for init in ("hyper", "shared", "random", "reparam", "propagate", "text", "anchors", "pooled")
    },
    "helps": {row: f"--task p3 {options} --measure 0" for row, options in HELPS.items()},
    "sni": {
        "definition": f"--task sni {BASE} --method zeroshot",
        "definition and examples": f"--task sni {BASE} --method fewshot",
        "C definition and examples": f"--task sni {C} --method fewshot",
        "HyperLlama": f"--task sni {BASE}",
        "C": f"--task sni {C}",
        "I": f"--task sni {BASE} --instruction-downstream",
        "CDI": f"--task sni {C} --downstream lora --instruction-downstream",
    },
    "symbol": {
        "0-shot": f"plain --task symbol {BASE} --method zeroshot",
        "few-shot": f"plain --task symbol {BASE} --method fewshot",
        "symbol-tuned few-shot": f"--task symbol {BASE} --method fewshot",
        "C symbol-tuned few-shot": f"--task symbol {C} --method fewshot",
        "HyperLlama": f"--task symbol {BASE}",
        "C": f"--task symbol {C}",
    },
    "gists": {f"{n} gists": f"--task p3 {C} --gists {n} --measure 0" for n in (1, 2, 4, 8)},
    "drawn": {
        f"{n} gists": f"--task p3 --model {ALL}/layout/C_further,_drawn/seed0 --gists {n} --measure 0"
        for n in (2, 4, 8, 16)
    },
    "places": {
        "C further": f"--task p3 --model {ALL}/layout/C_further/seed0 --measure 0",
        **{row: f"{from_its_own_c(row)} {options}" for row, options in PLACES.items()},
    },
    "shots": {f"{n} examples": f"--task p3 {C} --shots {n} --measure 0" for n in (1, 2, 4, 8)},
    "ratios": {
        "every 4, 4 gists": f"{from_its_own_c('every 4')} --gists-every 4 --gists 4",
        "every 4, 8 gists": f"{from_its_own_c('every 4')} --gists-every 4 --gists 8",
        "every 2 of 8 examples": f"{from_its_own_c('every 4')} --gists-every 2 --shots 8",
        "every 1 of 4 examples": f"{from_its_own_c('every 4')} --gists-every 1 --shots 4",
        "spread, 4 gists": f"{from_its_own_c('spread')} --gists-spread --gists 4",
        "spread, 8 gists": f"{from_its_own_c('spread')} --gists-spread --gists 8",
        "spread, 8 examples": f"{from_its_own_c('spread')} --gists-spread --shots 8",
        "spread, 4 examples": f"{from_its_own_c('spread')} --gists-spread --shots 4",
    },
}
RATIOS = {  # a line of the table and of its picture -> the rows of other tables that it is made of
    "gists at the end": [
        ("shots", "4 examples"), ("shots", "8 examples"), ("p3", "C"), ("gists", "8 gists"),
        ("gists", "4 gists"),
    ],
    "positions spread": [
        ("ratios", "spread, 4 examples"), ("ratios", "spread, 8 examples"), ("places", "spread"),
        ("ratios", "spread, 8 gists"), ("ratios", "spread, 4 gists"),
    ],
    "in four parts": [
        ("ratios", "every 1 of 4 examples"), ("ratios", "every 2 of 8 examples"), ("places", "every 4"),
        ("ratios", "every 4, 8 gists"), ("ratios", "every 4, 4 gists"),
    ],
}  # fmt: skip
ORDERS = {  # what the paper finds: the first row above the second
    "p3": [
        ("C", "HyperLlama"), ("D", "HyperLlama"), ("CD", "HyperLlama"), ("HyperLlama", "fine-tuned 0-shot"),
        ("C", "fine-tuned 0-shot"), ("fine-tuned 16-shot", "C"), ("C fine-tuned 16-shot", "C"),
        ("fine-tuned 16-shot", "fine-tuned 0-shot"),
    ],
    "prefix": [("hyper", "shared"), ("hyper", "random"), ("shared", "random"), ("reparam", "hyper")],
    "sni": [
        ("HyperLlama", "definition"), ("definition and examples", "HyperLlama"), ("I", "HyperLlama"),
        ("CDI", "HyperLlama"), ("C", "definition"), ("CDI", "C"), ("definition and examples", "C"),
        ("C definition and examples", "C"),
    ],
    "symbol": [
        ("HyperLlama", "0-shot"), ("few-shot", "HyperLlama"), ("C", "0-shot"), ("few-shot", "C"),
        ("C symbol-tuned few-shot", "C"), ("symbol-tuned few-shot", "few-shot"),
    ],
}  # fmt: skip
TITLES = {
    "text": "Compression hyperpretraining on text",
    "p3": "P3",
    "prefix": "Prefix tuning",
    "sni": "Super-NaturalInstructions",
    "symbol": "Symbol tuning",
    "helps": "What helps",
    "gists": "Fewer gists",
    "drawn": "Any number of gists",
    "places": "Places, each with a C of its own",
    "shots": "Fewer examples",
    "ratios": "Tokens a gist",
}
INTRO = """# Results in miniature

Made by `python -m tools.reproduce`: three seeds a row, mean ± standard deviation over them. The model has 1.0
million parameters and its world is a few hundred words: this shows that the mechanism works and what it
takes, not how well a real Llama-2 does. `tiny/llama` is the base, `tiny/llama-c` the same after compression
hyperpretraining (C).

0-shot, few-shot and label anchors are the untouched model of that row, with nothing, with all examples in
context, and with the keys and values of BOS and of the examples' last tokens; "base, …" is that model before
hyperpretraining. Controls: the answering model without a prefix, with the gists of another task, with the
keys and values of the examples mean-pooled to as many as there are gists, and with whole examples in as many
raw tokens (at least one). Seconds are those of training and evaluation, one thread a run; other work shared
the cores, so some are too many."""
WORDS = {
    "p3": """Accuracy, the mean over the held-out prompts, sixteen examples, five draws of them. Fine-tuned
rows are language models that were trained with the examples in context, or without, from the base or from C.
"C without the layout" was hyperpretrained on two of the three files of text, which have no task's layout, in
1,330 of the 2,800 steps.
The paper's numbers (7B): fine-tuned 0-shot 55.4, HyperLlama 55.8, C 56.8, D 57.2, CD 57.2, fine-tuned 16-shot
61.2.""",
    "prefix": """Accuracy on the held-out prompts of P3 after training a prefix of sixteen for each on its
training rows, by what the prefix starts from; "hyper" starts from the gists that the run C above makes of
sixteen examples; "text", "anchors" and "pooled" from keys and values of the same examples: of their first
tokens, of their labels, and the mean of all (with a little noise). The paper's (7B): random with
reparametrisation 77.3, hyper 67.3, shared 59.0, random 57.7.""",
    "sni": """ROUGE-L, the mean over the instances of the held-out tasks; two positive examples. "definition"
and "definition and examples" are fine-tuned language models that see these in context. The paper gives an
order and no numbers.""",
    "symbol": """Accuracy, the mean over the held-out sets, 20 queries each, four examples per class; each run
is the mean of ten draws of symbols, formats and examples. The paper gives an order and no numbers.""",
    "text": """Loss per token on segment C after B, on held-out text, with the gists of A and D, which have
384 tokens: the run that made `tiny/llama-c`, one seed. "Before" is the base. Both have read texts in the
layouts of P3, Super-NaturalInstructions and symbol tuning: the base in rows of up to 448 tokens, C in the
last of its three files of text. Share kept is (without - gists) / (without - in full), all after training.
The picture shows P3's held-out tasks along the way, answered after the gists of 16 examples: no step is taken
on any task.""",
    "helps": """P3 as above, 300 steps each; from the base (HyperLlama) and from C. distill: 1 × the
divergence from the base's answer with all examples in context; reconstruct: 0.5 × the loss of saying the
examples again after the gists; both: these two; gists every 4: four gists after every four examples, rather
than all at the end; gists spread: their positions lie evenly over the examples; emit lora: eight gists become
low-rank updates, in about as many bytes as the keys and values of sixteen; chain of 2: 32 examples, the gists
of the second sixteen see those of the first; anchors: no gists, the prefix is read at the last token of each
example, and training starts from the column "label anchors". The teacher of "C distill" is C itself with the
examples in context, see its column 16-shot.""",
    "gists": """P3 as above, from C with the first of its gists, 300 steps each: the same sixteen examples,
about 378 tokens, in fewer gists. Mean-pooled and fewer shots are those of as many positions; label anchors
have seventeen.""",
    "drawn": """P3 as above, from a C that was hyperpretrained 300 steps further on the third file of text,
each step with a number of gists that was drawn, from 1 to 16. "C further" had the same steps and sixteen
gists in each. "base, …" is the C before these steps.""",
    "places": """P3 as above. Each row's C was hyperpretrained 300 steps further on the third file of text,
with its gists in that place: after the text ("C further"), in parts of four after every four of its sixteen
stretches ("every 4"), after the text but with positions spread over it ("spread"); or with no gists, at the
last token of each stretch ("anchors"); or with eight gists that become low-rank updates ("emit lora").
"base, …" is the C before these steps.""",
    "shots": """P3 as above, from C, 300 steps each: sixteen gists for fewer examples; the last row has
sixteen.""",
    "ratios": """P3 as above: accuracy by how many tokens of examples there are for each gist. With sixteen
gists for four, eight and sixteen examples, and then with eight and four gists for sixteen examples. Gists at
the end are those from the common C, see "Fewer examples" and "Fewer gists"; the other two places start from a
C of their own, see "Places". "In four parts": a quarter of the gists after each quarter of the examples. The
other lines are the untouched C, of the runs with gists at the end.""",
}
PICTURES = {  # table -> picture -> caption
    "text": {"hyperpretraining": "held-out tasks of P3 during hyperpretraining on text"},
    "p3": {"first-screen": "the row C as bars", "training": "held-out tasks of P3 during training, from C"},
    "prefix": {"prefix-tuning": "accuracy during prefix tuning"},
    "gists": {"gists": "accuracy by the number of gists"},
    "drawn": {"drawn": "accuracy by the number of gists, after hyperpretraining with any number of them"},
    "shots": {"shots": "accuracy by the number of examples"},
    "ratios": {"ratios": "accuracy by the tokens of examples for each gist"},
}


RUNNING: set[subprocess.Popen] = set()


def job(table: str, row: str, options: str, seed: int) -> Path | None:
    """One run, unless it is finished. What a killed run left is gone on with. The log, where it failed."""
    out = folder_of(table, row) / f"seed{seed}"
    if (out / "results.json").exists():
        return None
    program = "eval.py" if options.startswith("plain") else "train.py"
    argv = [sys.executable, PROJECT / program, *options.removeprefix("plain").format(seed=seed).split()]
    argv += ["--seed", str(seed), "--out", out]
    if program == "train.py" and (out / "args.json").exists():
        argv.append("--resume" if (out / "state.safetensors").exists() else "--overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    began = time.time()
    with open(log, "w") as file:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(argv, stdout=file, stderr=file, env=one_thread)
        RUNNING.add(process)
        failed = process.wait() != 0
        RUNNING.remove(process)
    print(f"{'FAILED' if failed else 'done'}  {out}  {time.time() - began:.0f} s", flush=True)
    return log if failed else None


def run_all(tables: list[str], at_once: int) -> None:
    """All rows of these tables. InputError where a run failed, after the others are done."""
    failed = []
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for table in tables:  # one after the other: prefixes start from runs of P3
                seeds = SEEDS[:1] if table in ONE_SEED else SEEDS
                jobs = [
                    pool.submit(job, table, row, options, seed)
                    for row, options in ROWS[table].items()
                    for seed in seeds
                ]
                failed += [log for log in (one.result() for one in jobs) if log]
        except BaseException:  # Ctrl-C: nothing more begins, and what runs keeps its last checkpoint
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING.copy():
                process.terminate()
            raise
    if failed:
        raise InputError(f"{len(failed)} runs failed (see {failed[0]}), so no table is written")


def runs_of(table: str, row: str = "*") -> list[Path]:
    """The folders of finished runs: of one row, or of all."""
    return sorted(path.parent for path in ALL.glob(f"{table}/{row.replace(' ', '_')}/*/results.json"))


def values(table: str, row: str) -> list[float]:
    return [read_results(run)["average"] for run in runs_of(table, row)]


def verdicts(table: str) -> list[str]:
    """Whether each of the paper's orders holds here.

    The difference of the means is held against the deviation of the difference of two runs.
    """
    lines = []
    for above, below in ORDERS.get(table, ()):
        a = values(table, above)
        b = values(table, below)
        if min(len(a), len(b)) < 2:
            continue
        gap = statistics.fmean(a) - statistics.fmean(b)
        spread = (statistics.variance(a) + statistics.variance(b)) ** 0.5
        verdict = "holds" if gap > spread else "doesn't hold" if gap < -spread else "within the spread"
        lines.append(f"| {above} above {below} | {verdict} | {gap:+.1f} ± {spread:.1f} |")
    return ["| the paper's order | here | difference |", "|---|---|---|", *lines] if lines else []


def tokens_of(shots: int) -> float:
    """How many tokens so many examples of a held-out task of P3 have, in the mean."""
    formatter = Formatter(Tokenizer(C_FOLDER), context=1024, query_length=384)
    episodes = [task.evaluation(0, 0, shots, 1)[0] for task in p3.p3_tasks("tiny/P3", "test")]
    return statistics.fmean(len(formatter.context_tokens(episode)) for episode in episodes)


def by_ratio() -> dict[str, dict[float, list[float]]]:
    """Line -> tokens a gist -> the averages of all seeds; beside the gists' lines, what they are held against."""
    lines: dict[str, dict[float, list[float]]] = {}
    for line, rows in RATIOS.items():
        for run in (run for row in rows for run in runs_of(*row)):
            results = read_results(run)
            ratio = round(tokens_of(results["args"]["shots"]) / results["args"]["gists"])
            values = {line: results["average"]}
            if line == "gists at the end":
                others = results["baselines"] | results["controls"]
                titles = COMPARED | {"other_task": "another task's gists"}
                values |= {titles[column]: others[column] for column in titles if column in others}
            for name, value in values.items():
                lines.setdefault(name, {}).setdefault(ratio, []).append(value)
    return dict(sorted(lines.items(), key=lambda item: item[0] not in RATIOS))


def ratio_table() -> list[str]:
    lines = by_ratio()
    ratios = sorted({ratio for curve in lines.values() for ratio in curve})
    table = ["| tokens a gist | " + " | ".join(map(str, ratios)) + " |", "|---" * (len(ratios) + 1) + "|"]
    for name, curve in lines.items():
        cells = [mean_and_deviation(curve.get(ratio, []), 1) for ratio in ratios]
        table.append("| " + " | ".join([name, *cells]) + " |")
    return table


def draw_ratios(path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, and only needed here

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = by_ratio()
    for name, curve in lines.items():
        draw_curve(axes, curve, name, name in RATIOS, marker="o")
    axes.set(xlabel="tokens of examples for each gist", ylabel="accuracy on held-out rows, %")
    log_ticks(axes, {ratio for curve in lines.values() for ratio in curve})
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    write_picture(figure, path)


def costs(rows: list[Path], query: int = 32) -> list[str]:
    """Bytes of some rows' prefixes, and operations of a query of so many tokens after them."""
    c = read_config(C_FOLDER)
    head = f"| at use | bytes of a prefix | million operations of a query of {query} tokens |"
    lines = [head, "|---|---|---|"]
    for row in rows:
        args = read_results(next(row.glob("*/results.json")).parent)["args"]
        sets = max(args.get(way) or 1 for way in ("concat", "chain"))
        kept = 1 + args["shots"] if args["anchors"] else args["gists"] * sets
        size, operations = at_use(c, kept, args["emit"], query, 4)
        lines.append(f"| {row.name.replace('_', ' ')} | {size:,} | {operations / 1e6:.1f} |")
    return lines


def write_results(path: Path) -> None:
    text = [INTRO]
    for table, title in TITLES.items():
        counts = {row: len(runs_of(table, row)) for row in ROWS.get(table, ())}
        rows = [folder_of(table, row) for row, count in counts.items() if count]
        if table == "text":
            rows = [C_FOLDER.parent]
        if table == "helps" and rows:
            rows = [folder_of("p3", row) for row in ("HyperLlama", "C") if runs_of("p3", row)] + rows
        if table in ("gists", "shots") and rows and runs_of("p3", "C"):
            rows.append(folder_of("p3", "C"))
        if table == "drawn" and rows and runs_of("places", "C further"):
            rows.append(folder_of("places", "C further"))
        if not rows:
            continue
        results = compare(rows).replace("| tiny |", "| tiny/llama-c |")
        if table == "ratios":
            results = "\n".join(ratio_table())
        text += ["", f"## {title}", "", WORDS[table], "", results, "", *verdicts(table)]
        short = [f"{folder_of(table, row).name} ({n})" for row, n in counts.items() if 0 < n < len(SEEDS)]
        if short:
            text += ["", f"Fewer than three seeds: {', '.join(short)}."]
        missing = [row for row, count in counts.items() if not count]
        if missing:
            text += ["", f"Not run with this `tiny/llama-c`: {', '.join(missing)}."]
        if table == "helps":
            text += ["", *costs(rows)]
        for name, caption in PICTURES.get(table, {}).items():
            text += ["", f"![{caption}](figures/{name}.png)"]
    path.write_text("\n".join(text) + "\n")
    print(f"written: {path}")


def draw(figures: Path) -> None:
    """The pictures, of the runs that their captions name."""
    figures.mkdir(exist_ok=True)
    draw_mask(figures / "mask.png")
    plot([C_FOLDER], figures / "hyperpretraining.png")
    c = runs_of("p3", "C")
    prefixes = runs_of("prefix")
    if prefixes:
        plot(prefixes, figures / "prefix-tuning.png")
    for table, by in (("gists", "gists"), ("drawn", "gists"), ("shots", "shots")):
        runs = runs_of(table)
        if runs:
            plot(runs + c * (table != "drawn"), figures / f"{table}.png", by)
    if runs_of("ratios"):
        draw_ratios(figures / "ratios.png")
    if c:
        plot(c, figures / "training.png")
        bars(c, figures / "first-screen.png")
        probe = [sys.executable, "-m", "tools.probe", c[0], "--sets", "3", "--out", figures / "probe.png"]
        if subprocess.run(probe).returncode:
            raise InputError(f"{c[0]}: can't be probed")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--jobs", type=number(int, 1), default=2, help="runs at a time (2)")
    tables = {"choices": list(ROWS), "default": list(ROWS), "help": f"of {', '.join(ROWS)}"}
    parser.add_argument("--only", nargs="+", metavar="TABLE", **tables)
    asked = parser.parse_args()
    os.chdir(PROJECT)
    if shutil.disk_usage(".").free < 2 << 30:
        raise InputError("less than 2 GB of disk are free")
    for name, files in FILES.items():
        (ALL / name).mkdir(parents=True, exist_ok=True)
        for path in Path("tiny/text").glob(files):
            shutil.copyfile(path, ALL / name / path.name)
    run_all(asked.only, asked.jobs)
    place = Path() if set(asked.only) == set(ROWS) else ALL
    write_results(place / "RESULTS.md")
    draw(place / "figures")


if __name__ == "__main__":
    run_command(main)
