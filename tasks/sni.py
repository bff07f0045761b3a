"""Super-NaturalInstructions (Wang et al. 2022): a definition, two examples, a free answer.

The prompt is Tk-Instruct's. ROUGE-L of the generated answer against the best reference, mean over
all instances (paper, Section 4.2). The paper's I: the definition also in the query.
"""

import json
import random
import statistics
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from data import Episode, Example, Formatter, Layout
from llama import InputError, reading
from tasks.rows import as_text, draw_rows, existing, read_lists

FOLDER = "natural-instructions"  # the miniature's data, and the checkpoint for it
MODEL = "llama-c"
METRIC = "rougeL"
WITHOUT = ("score",)  # there are no choices to rank
ONE_SET = True
DEFAULTS = {
    "large": {"shots": 2, "steps": 10_000, "batch_size": 4, "lr": 2e-4, "gist_lr": 2e-4, "sets": 1},
    "tiny": {"shots": 2, "steps": 300, "batch_size": 8, "lr": 1e-3, "gist_lr": 3e-2, "sets": 1},
}


@cache
def rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, and only needed here

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in percent against the best reference, as Super-NaturalInstructions scores."""
    return 100 * max(
        rouge_scorer().score(reference, prediction)["rougeL"].fmeasure for reference in references
    )


def score(answer: str, query: Example) -> float:
    return rouge_l(answer, query.references)


def without_a_model(tasks: list[list[Episode]]) -> dict[str, list[list[float]]]:
    """ROUGE-L of two answers that need no model: the input, and the output of the first example."""
    scores = {"copy_input": [], "copy_example": []}
    for (episode,) in tasks:
        example = episode.shots[0].target if episode.shots else ""
        queries = episode.queries
        scores["copy_input"].append([statistics.fmean(rouge_l(q.input, q.references) for q in queries)])
        scores["copy_example"].append([statistics.fmean(rouge_l(example, q.references) for q in queries)])
    return scores


def check(args) -> None:
    if not find_spec("rouge_score"):
        raise InputError("ROUGE-L needs the package rouge-score (pip install rouge-score)")
    if args.instruction_downstream and args.method != "hyper":
        raise InputError("--instruction-downstream belongs to --method hyper")
    if args.sets > 1:
        raise InputError(f"--sets {args.sets}: the examples of --task sni are given, so there is one set")


def load(args, formatter: Formatter, split: str) -> list["SNITask"]:
    return sni_tasks(args.data, split)


LAYOUT = Layout(  # Tk-Instruct's prompt
    " Positive Example {n} -\nInput: {input}\n Output: {target}\n\n",
    "Now complete the following example -\nInput:",
    "\nOutput:",
    " ",
    "Definition: {}\n\n",
    "\n\n",
)
INSTANCES = 100  # of a task, in training and in evaluation: the protocol of Tk-Instruct


@dataclass(frozen=True)
class SNITask:
    """A definition, positive examples, and instances with one or several right answers each."""

    name: str
    group: str  # the task's category
    definition: str
    examples: list[Example]
    instances: list[Example]
    weight: int = 1

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        picked = draw_rows(rng, self.instances, queries, self.name)
        picked = [replace(example, target=rng.choice(example.references)) for example in picked]
        return Episode(picked, self.examples[:shots], LAYOUT, self.definition)

    def evaluation(self, seed: int, n: int, shots: int, limit: int | None) -> list[Episode]:
        return [Episode(self.instances[:limit], self.examples[:shots], LAYOUT, self.definition)]


def full_stop(text: str) -> str:
    return text if not text or text[-1] in string.punctuation else text + "."


def read_sni_task(path: Path) -> SNITask:
    """A task file. Older ones have plain text where newer ones have lists."""

    def texts(value: object, what: str) -> list[str]:
        values = [
            as_text(v, f"{path}: {what}").strip() for v in (value if isinstance(value, list) else [value])
        ]
        if not values:
            raise InputError(f"{path}: {what} is empty")
        return values

    with reading(path, "not a task file of Super-NaturalInstructions"):
        raw = json.loads(path.read_bytes())
        definition = full_stop(texts(raw["Definition"], "Definition")[0])
        examples = [
            Example(
                *(full_stop(texts(e[key], f"Positive Examples: {key}")[0]) for key in ("input", "output"))
            )
            for e in raw["Positive Examples"]
        ]
        instances = []
        for i, row in enumerate(raw["Instances"][:INSTANCES]):
            (text,) = texts(row["input"], f"instance {i + 1}: input")
            answers = texts(row["output"], f"instance {i + 1}: output")
            instances.append(Example(full_stop(text), answers[0], references=tuple(answers)))
        group = texts(raw.get("Categories") or "no category", "Categories")[0]
    if not instances:
        raise InputError(f"{path}: has no instances")
    return SNITask(path.stem, group, definition, examples, instances)


def sni_tasks(folder: str | Path, split: str) -> list[SNITask]:
    """The tasks of splits/default/{train,test}_tasks.txt whose files are there; the others are counted."""
    folder = existing(folder)
    lists = read_lists(folder / "splits" / "default")
    if lists is None:
        raise InputError(f"{folder}: no splits/default/{split}_tasks.txt, so not Super-NaturalInstructions")
    paths = [folder / "tasks" / f"{name}.json" for name in lists[split]]
    present = [path for path in paths if path.exists()]
    if not present:
        raise InputError(f"{folder / 'tasks'}: none of the {len(paths)} tasks of {split}_tasks.txt is here")
    if len(present) < len(paths):
        print(
            f"{folder}: {len(paths) - len(present)} of {len(paths)} {split} tasks have no file: left out",
            file=sys.stderr,
        )
    return [
        read_sni_task(path) for path in tqdm(present, desc=f"reading {split} tasks", leave=False, delay=1)
    ]
