"""A data set of your own: copy this file. Here, CSV files with the columns text and label.

    python train.py --task sample --data DIR

Each file of DIR is a task, whose labels are the choices; files called test….csv are held out.
"""

import csv
import random
from dataclasses import dataclass

from data import Episode, Example
from llama import InputError, reading
from tasks.rows import existing

FOLDER = "sample"
MODEL = "llama-c"
METRIC = "accuracy"
DEFAULTS = {
    "large": {"shots": 16, "steps": 1000, "batch_size": 4, "lr": 2e-4, "gist_lr": 2e-4, "sets": 3},
    "tiny": {"shots": 16, "steps": 50, "batch_size": 8, "lr": 1e-3, "gist_lr": 3e-2, "sets": 3},
}


def load(args, formatter, split: str) -> list["Table"]:
    paths = sorted(existing(args.data).glob("*.csv"))
    tables = [Table.read(path) for path in paths if path.name.startswith("test") == (split == "test")]
    if not tables:
        raise InputError(f"{args.data}: no CSV files to {split} on (those called test….csv are held out)")
    return tables


def score(answer: str, query: Example) -> float:
    return 100.0 * (answer == query.target)


@dataclass(frozen=True)
class Table:
    name: str
    rows: list[Example]
    weight: int = 1

    @property
    def group(self) -> str:
        return self.name

    @classmethod
    def read(cls, path) -> "Table":
        with (
            reading(path, "not a CSV file with text and label"),
            open(path, newline="", encoding="utf-8") as file,
        ):
            rows = [(row["text"].strip(), row["label"].strip()) for row in csv.DictReader(file)]
            choices = tuple(sorted({label for _, label in rows}))  # (in here, a mistake of rows names the file)
        if len(choices) < 2 or not all(choices):
            raise InputError(f"{path}: needs two labels or more, and one in each row")
        return cls(path.stem, [Example(text, label, choices) for text, label in rows])

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        if len(self.rows) < shots + queries:
            raise InputError(
                f"{self.name}: {len(self.rows)} rows are too few for {shots} --shots and {queries} queries"
            )
        rows = rng.sample(self.rows, shots + queries)
        return Episode(rows[:queries], rows[queries:])

    def evaluation(self, seed: int, n: int, shots: int, limit: int | None) -> list[Episode]:
        """Every second row is a query; the examples are drawn from the others."""
        if len(self.rows) < 2 * shots:
            raise InputError(
                f"{self.name}: {len(self.rows)} rows are too few for {shots} --shots beside the queries"
            )
        examples = random.Random(f"{seed} {self.name} {n}").sample(self.rows[1::2], shots)
        return [Episode(self.rows[::2][: limit or None], examples)]
