"""P3, the Public Pool of Prompts (Sanh et al. 2022): a folder for each prompt, options to choose from.

Rows have inputs_pretokenized, targets_pretokenized and answer_choices. Accuracy: the option with the
highest log-probability; the mean over a dataset's prompts, then over datasets (paper, Section 4.1).
"""

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Episode, Example, Formatter
from llama import InputError
from tasks.rows import READERS, as_text, draw_rows, existing, file_kind, read_lists, unasked

FOLDER = "P3"  # the miniature's data, and the checkpoint for it
MODEL = "llama-c"
METRIC = "accuracy"
DEFAULTS = {
    "large": {"shots": 16, "steps": 10_000, "batch_size": 4, "lr": 2e-4, "gist_lr": 2e-4, "sets": 1},
    "tiny": {
        "shots": 16, "steps": 300, "measure": 4, "batch_size": 8, "lr": 1e-3, "gist_lr": 3e-2, "sets": 5
    },
}  # fmt: skip


def load(args, formatter: Formatter, split: str) -> list["Prompt"]:
    return p3_tasks(args.data, split)


def find_split(folder: Path, split: str) -> list[Path]:
    """Files like train.jsonl, train.tfrecord-00000-of-00001, train-00000-of-00002.parquet."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"{split}[.-]*")):
        kind = file_kind(path)
        if kind:
            files.setdefault(kind, []).append(path)
    paths = files[next(iter(files))] if files else []  # the same split in two formats: read one
    for count in {match[1] for path in paths if (match := re.search(r"-of-(\d+)", path.name))}:
        if sum(f"-of-{count}" in path.name for path in paths) != int(count):
            raise InputError(f"{folder}: not all of the {int(count)} files of the {split} split are here")
    return paths


class Split(Sequence):
    """The examples of one split of one P3 task, by number."""

    def __init__(self, folder: Path, split: str):
        self.folder = folder
        self.name = split
        paths = find_split(folder, split)
        if not paths:
            raise InputError(f"{folder}: no {split} split ({split}.tfrecord*, .jsonl or .parquet)")
        self.files = [READERS[file_kind(path)](path) for path in paths]
        self.ends = np.cumsum([len(file) for file in self.files])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, i: int) -> str:
        return f"{self.folder}: row {i + 1} of {self.name}"

    @lru_cache(1 << 14)  # rows of all splits together: a small folder is read once
    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(i)
        file = int(np.searchsorted(self.ends, i, side="right"))
        row = self.files[file][i - int(self.ends[file]) + len(self.files[file])]
        where = self.where(i)
        text = {}
        for field in ("inputs_pretokenized", "targets_pretokenized"):
            value = row.get(field)
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            text[field] = as_text(value, f"{where}: {field}")
        choices = row.get("answer_choices") or []
        if not isinstance(choices, list):
            raise InputError(f"{where}: answer_choices is not a list")
        # Real rows begin targets with a space or a newline, and their choices don't.
        choices = tuple(as_text(choice, f"{where}: answer_choices").strip() for choice in choices)
        target = text["targets_pretokenized"].strip()
        return Example(text["inputs_pretokenized"].strip(), target, choices)

    def check(self, count: int) -> None:
        """Read so many rows, evenly spaced: what is wrong with all is found before a long run."""
        for i in range(0, len(self), max(1, len(self) // count)):
            self[i]

    def scorable(self, i: int) -> Example:
        """Example i, with choices that are there, differ, and hold the target; else InputError."""
        example = self[i]
        where = self.where(i)
        if len(set(example.choices)) < 2 or not all(example.choices):
            raise InputError(
                f"{where}: needs two or more different answer_choices, has {list(example.choices)}"
            )
        if example.target not in example.choices:
            raise InputError(f"{where}: target {example.target!r} is not among {list(example.choices)}")
        return example


MAX_WEIGHT = 30_000  # rows of one task that count when tasks are drawn
ROWS_CHECKED = 50_000  # training rows that are read at the start, over all tasks: every row of a small folder


@dataclass(frozen=True)
class Prompt:
    """One prompt of P3. Accuracies are averaged over a dataset's prompts (the group), then over datasets."""

    name: str
    group: str
    train: Split
    validation: Split | None = None

    @property
    def weight(self) -> int:
        return min(len(self.train), MAX_WEIGHT)

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        numbers = draw_rows(rng, range(len(self.train)), shots + queries, self.train.folder)
        picked = [self.train[i] for i in numbers]
        return Episode(picked[:queries], list(unasked(picked[queries:], picked[:queries])))

    def evaluation(self, seed: int, n: int, shots: int, limit: int | None) -> list[Episode]:
        """One episode: the examples come from the training split, and none is among the questions."""
        if not len(self.validation):
            raise InputError(f"{self.validation.folder}: the {self.validation.name} split is empty")
        queries = [
            self.validation.scorable(i) for i in range(min(len(self.validation), limit or sys.maxsize))
        ]
        order = random.Random(f"{seed} {self.name} {n}").sample(range(len(self.train)), len(self.train))
        drawn = list(islice(unasked(map(self.train.__getitem__, order), queries), shots))
        if len(drawn) < shots:
            raise InputError(
                f"{self.train.folder}: only {len(drawn)} training rows aren't questions, for {shots} --shots"
            )
        return [Episode(queries, drawn)]


# Held-out datasets by the beginning of their tasks' names. T0 held out story_cloze too: it has to be
# asked for separately, so it is neither trained nor evaluated here.
HELD_OUT = (
    "anli hellaswag super_glue_cb super_glue_copa super_glue_rte super_glue_wic super_glue_wsc.fixed "
    "winogrande"
).split()


def p3_names(folder: Path, split: str) -> dict[str, str]:
    """Task name -> dataset, for split "train" or "test": by splits/….txt, else the paper's."""
    lists = read_lists(folder / "splits")
    if lists is not None:
        return {name: name for name in lists[split]}
    names = {}
    for path in sorted(folder.iterdir()):
        if (
            path.name.endswith("_score_eval")
            or path.name.startswith("story_cloze")
            or not find_split(path, "train")
        ):
            continue
        dataset = next((d for d in HELD_OUT if path.name.startswith(d)), None)
        if (dataset is not None) != (split == "test"):
            continue
        if split == "test":
            rows = Split(path, "validation")
            if len(rows) and not rows[0].choices:
                print(f"{path.name}: left out, its rows have no answer_choices to rank", file=sys.stderr)
                continue
        names[path.name] = dataset or path.name
    return names


def p3_tasks(folder: str | Path, split: str) -> list[Prompt]:
    """The training tasks (split "train") or the held-out ones ("test") of a P3 folder."""
    folder = existing(folder)
    root = folder if (folder / "splits").is_dir() or not (folder / "data").is_dir() else folder / "data"
    tasks = []
    names = p3_names(root, split)
    for name, dataset in tqdm(names.items(), desc=f"reading {split} tasks", leave=False, delay=1):
        if not (root / name).is_dir():
            raise InputError(f"{root}: the task {name}, listed in splits/{split}_tasks.txt, has no folder")
        validation = Split(root / name, "validation") if split == "test" else None
        tasks.append(Prompt(name, dataset, Split(root / name, "train"), validation))
        tasks[-1].train.check(ROWS_CHECKED // len(names))
    if not tasks:
        kind = "training" if split == "train" else "held-out"
        raise InputError(f"{root}: no {kind} tasks of P3 here (splits/{split}_tasks.txt may name them)")
    return tasks
