"""A data set of your own: copy this file. Here, CSV files with the columns text and label.

    python train.py --task sample --data DIR

Each file of DIR is a task, whose labels are the choices; files called test….csv are held out.
"""

import csv
import random
from dataclasses import dataclass

from data import Episode, Example
from llama import InputError, reading
from tasks.rows import draw_rows, existing, unasked

FOLDER = "sample"
MODEL = "llama-c"
METRIC = "accuracy"
DEFAULTS = {
    "large": {"shots": 16, "steps": 1000, "batch_size": 4, "lr": 2e-4, "gist_lr": 2e-4, "sets": 3},
    "tiny": {"shots": 16, "steps": 50, "batch_size": 8, "lr": 1e-3, "gist_lr": 3e-2, "sets": 3},
}


def load(args, formatter, split: str) -> list["Table"]:
    paths = sorted(existing(args.data).glob("*.csv"))
    paths = [path for path in paths if path.name.startswith("test") == (split == "test")]
    if not paths:
        raise InputError(f"{args.data}: no CSV files to {split} on (those called test….csv are held out)")
    return [Table(path.stem, read(path)) for path in paths]


def read(path) -> list[Example]:
    """The rows of a file. Whatever is wrong in it names it."""
    with reading(path, "not a CSV file of text and label"), open(path, newline="", encoding="utf-8") as file:
        rows = [(row["text"].strip(), row["label"].strip()) for row in csv.DictReader(file)]
    choices = tuple(sorted({label for _, label in rows}))
    if len(choices) < 2 or not all(choices):
        raise InputError(f"{path}: needs two labels or more, and one in each row")
    return [Example(text, label, choices) for text, label in rows]


@dataclass(frozen=True)
class Table:
    name: str
    rows: list[Example]
    weight: int = 1

    @property
    def group(self) -> str:
        return self.name

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        rows = draw_rows(rng, self.rows, shots + queries, self.name)
        return Episode(rows[:queries], list(unasked(rows[queries:], rows[:queries])))

    def evaluation(self, seed: int, n: int, shots: int, limit: int | None) -> list[Episode]:
        """Every second row is a query; the examples are drawn from the others."""
        queries = self.rows[::2][:limit]
        rows = list(unasked(self.rows[1::2], queries))
        return [Episode(queries, draw_rows(random.Random(f"{seed} {self.name} {n}"), rows, shots, self.name))]
