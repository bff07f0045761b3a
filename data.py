"""Tasks, examples and batches. P3 as it lies on disk (paper, Section 4; Sanh et al. 2022).

A data folder holds one folder per task; a task's splits are TFRecord files as bigscience/P3 was
published, or .jsonl, or .parquet, with the same fields. Rows are indexed and read one by one: real
P3 does not fit in memory. A batch is a pure function of (seed, step, rank), so that a run can be
resumed at any step by asking for that batch.

Text becomes tokens as follows, whole examples only:

    hypernetwork   BOS {\\nInput:\\n x \\nOutput:\\n y}×shots gist×G
    downstream     BOS \\nInput:\\n x \\nOutput:\\n   then y EOS, the only tokens with a loss
"""

import json
import mmap
import random
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llama import InputError, Tokenizer, ragged

# ---------------------------------------------------------------------------------- rows of a file


class JsonLines(Sequence):
    """A .jsonl file, by line number. Only the places where lines begin are kept in memory."""

    def __init__(self, path: Path):
        self.path, self.data = path, map_file(path)
        newlines = [0]
        for start in range(0, len(self.data), 1 << 24):
            block = np.frombuffer(self.data[start : start + (1 << 24)], dtype=np.uint8)
            newlines.append(np.flatnonzero(block == ord("\n")) + start + 1)
        bounds = np.append(np.concatenate([np.atleast_1d(part) for part in newlines]), len(self.data))
        self.starts, self.ends = bounds[:-1], bounds[1:]
        if len(self.starts) and self.starts[-1] == self.ends[-1]:  # the file ends with a newline
            self.starts, self.ends = self.starts[:-1], self.ends[:-1]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict:
        try:
            row = json.loads(self.data[self.starts[i] : self.ends[i]])
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: line {i + 1} is not UTF-8") from None
        except json.JSONDecodeError as problem:
            raise InputError(f"{self.path}: line {i + 1} is not JSON ({problem.msg})") from None
        if not isinstance(row, dict):
            raise InputError(f"{self.path}: line {i + 1} is not an object with fields")
        return row


class TFRecords(Sequence):
    """A .tfrecord file of tf.train.Example messages, read without TensorFlow.

    Framing of a record: length (8 bytes, little endian), checksum of the length (4), data, checksum
    of the data (4).
    """

    def __init__(self, path: Path):
        self.path, self.data = path, map_file(path)
        starts, at = [], 0
        while at < len(self.data):
            starts.append(at)
            if at + 12 > len(self.data):
                break
            at += 16 + struct.unpack_from("<Q", self.data, at)[0]
        if at != len(self.data):
            raise InputError(f"{path}: record {len(starts)} is cut off or its length is corrupt")
        self.starts = np.array(starts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict:
        at = int(self.starts[i])
        length, length_sum = struct.unpack_from("<QI", self.data, at)
        data = self.data[at + 12 : at + 12 + length]
        (data_sum,) = struct.unpack_from("<I", self.data, at + 12 + length)
        if masked_crc32c(self.data[at : at + 8]) != length_sum or masked_crc32c(data) != data_sum:
            raise InputError(f"{self.path}: record {i + 1} fails its checksum")
        try:
            return parse_example(data)
        except (IndexError, ValueError):
            raise InputError(f"{self.path}: record {i + 1} is not a tf.train.Example") from None


class Parquet(Sequence):
    """A .parquet file, by row; one row group at a time is in memory. Needs pyarrow."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise InputError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
        try:
            self.file = ParquetFile(path, memory_map=True)
        except (OSError, pyarrow.ArrowException) as problem:
            raise InputError(f"{path}: not a parquet file ({problem})") from None
        groups = range(self.file.num_row_groups)
        self.ends = np.cumsum([self.file.metadata.row_group(g).num_rows for g in groups])
        self.group, self.rows = -1, []

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def __getitem__(self, i: int) -> dict:
        group = int(np.searchsorted(self.ends, i, side="right"))
        if group != self.group:
            self.group, self.rows = group, self.file.read_row_group(group).to_pylist()
        return self.rows[i - int(self.ends[group])]  # counted from the group's end: negative


def map_file(path: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}") from None


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli's polynomial, reversed
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32C as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a protocol-buffer message: (field number, content)."""

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    at = 0
    while at < len(message):
        key = varint()
        if key & 7 != 2:
            raise ValueError("a field that tf.train.Example doesn't have")
        length = varint()
        if at + length > len(message):
            raise ValueError("a field that ends behind its message")
        yield key >> 3, message[at : at + length]
        at += length


def parse_example(message: bytes) -> dict[str, list[bytes]]:
    """The byte features of a tf.train.Example: name -> values. (P3's numbers are T5 ids: ignored.)"""
    row = {}
    for _, features in _fields(message):
        for _, entry in _fields(features):
            parts = dict(_fields(entry))  # 1: name, 2: feature
            for kind, values in _fields(parts.get(2, b"")):
                if kind == 1:  # a list of bytes
                    row[parts[1].decode()] = [value for _, value in _fields(values)]
    return row


# ---------------------------------------------------------------------------------------- P3's tasks


@dataclass(frozen=True)
class Example:
    input: str
    target: str
    options: tuple[str, ...] = ()


READERS = {".jsonl": JsonLines, ".tfrecord": TFRecords, ".parquet": Parquet}


def file_kind(path: Path) -> str | None:
    return next((kind for kind in READERS if kind in path.name), None)


def find_split(folder: Path, split: str) -> list[Path]:
    """Files like train.jsonl, train.tfrecord-00000-of-00001, train-00000-of-00002.parquet."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(f"{split}[.-]*")):
        kind = file_kind(path)
        if kind:
            found.setdefault(kind, []).append(path)
    return found[next(iter(found))] if found else []  # the same split in two formats: read one


class Split(Sequence):
    """The examples of one split of one P3 task, by number."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.name = folder, split
        paths = find_split(folder, split)
        if not paths:
            raise InputError(f"{folder}: no {split} split ({split}.tfrecord*, .jsonl or .parquet)")
        self.files = [READERS[file_kind(path)](path) for path in paths]
        self.ends = np.cumsum([len(file) for file in self.files])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def where(self, i: int) -> str:
        return f"{self.folder}: row {i + 1} of {self.name}"

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
        # Real rows begin targets with a space or a newline, and their options don't.
        options = tuple(as_text(choice, f"{where}: answer_choices").strip() for choice in choices)
        target = text["targets_pretokenized"].strip()
        return Example(text["inputs_pretokenized"].strip(), target, options)

    def scorable(self, i: int) -> Example:
        """Example i, with options that are there, differ, and hold the target; else InputError."""
        example = self[i]
        where = self.where(i)
        if len(set(example.options)) < 2 or not all(example.options):
            raise InputError(f"{where}: needs two or more different answer_choices, has {list(example.options)}")
        if example.target not in example.options:
            raise InputError(f"{where}: target {example.target!r} is not among {list(example.options)}")
        return example


def as_text(value: object, where: str) -> str:
    try:
        value = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8") from None
    if not isinstance(value, str):
        raise InputError(f"{where} is missing or not text")
    return value


@dataclass(frozen=True)
class Task:
    name: str
    dataset: str  # accuracies are averaged over a dataset's tasks (prompts), then over datasets
    train: Split
    evaluation: Split | None = None


# Held-out datasets by the beginning of their tasks' names. T0 held out story_cloze too: it has to be
# asked for separately, so it is neither trained nor evaluated here.
HELD_OUT = (
    "anli hellaswag super_glue_cb super_glue_copa super_glue_rte super_glue_wic super_glue_wsc.fixed winogrande"
).split()
MAX_WEIGHT = 30_000  # rows of one task that count when tasks are drawn


def p3_names(folder: Path, split: str) -> dict[str, str]:
    """Task name -> dataset, for split "train" or "test": by splits/{train,test}_tasks.txt, else the paper's."""
    lists = [folder / "splits" / f"{part}_tasks.txt" for part in ("train", "test")]
    if any(path.exists() for path in lists):
        for path in lists:
            if not path.exists():
                raise InputError(f"{path}: is missing; beside the other list it is needed, too")
        train, test = (path.read_text(encoding="utf-8").split() for path in lists)
        for name in sorted(set(train) & set(test)):
            raise InputError(f"{folder / 'splits'}: the task {name} is in both lists")
        return {name: name for name in (train if split == "train" else test)}
    names = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith("_score_eval") or path.name.startswith("story_cloze") or not find_split(path, "train"):
            continue
        dataset = next((d for d in HELD_OUT if path.name.startswith(d)), None)
        if (dataset is not None) != (split == "test"):
            continue
        if split == "test":
            rows = Split(path, "validation")
            if len(rows) and not rows[0].options:
                print(f"{path.name}: left out, its rows have no answer_choices to rank", file=sys.stderr)
                continue
        names[path.name] = dataset or path.name
    return names


def p3_tasks(folder: str | Path, split: str) -> list[Task]:
    """The training tasks (split "train") or the held-out ones ("test") of a P3 folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such data folder")
    root = folder if (folder / "splits").is_dir() or not (folder / "data").is_dir() else folder / "data"
    tasks = []
    for name, dataset in p3_names(root, split).items():
        if Path(name).name != name or not (root / name).is_dir():
            raise InputError(f"{root}: the task {name}, listed in splits/{split}_tasks.txt, has no folder")
        evaluation = Split(root / name, "validation") if split == "test" else None
        tasks.append(Task(name, dataset, Split(root / name, "train"), evaluation))
    if not tasks:
        kind = "training" if split == "train" else "held-out"
        raise InputError(f"{root}: no {kind} tasks of P3 here (splits/{split}_tasks.txt may name them)")
    return tasks


# ------------------------------------------------------------------------------------------- tokens


def shot_text(example: Example) -> str:
    return f"\nInput:\n{example.input}\nOutput:\n{example.target}"


ROOM_FOR_QUERY = 32  # tokens of a downstream row that its target must leave to the query


class Formatter:
    """Turns examples into rows of tokens within a budget, and counts what did not fit."""

    def __init__(self, tokenizer: Tokenizer, context: int, downstream: int):
        """context: most tokens of a row of examples (gists included); downstream: of one query."""
        self.tokenizer, self.context, self.downstream = tokenizer, context, downstream
        self.counts: Counter[str] = Counter()

    def shots(self, examples: Sequence[Example], end: Sequence[int] = (), budget: int | None = None) -> list[int]:
        """BOS, as many whole examples as fit into the budget, then `end` (the gists). Others are counted."""
        row, room = [self.tokenizer.bos], (self.context if budget is None else budget) - len(end)
        for example in examples:
            tokens = self.tokenizer.encode(shot_text(example))
            self.counts["shots"] += 1
            if len(row) + len(tokens) <= room:
                row += tokens
            else:
                self.counts["shots left out"] += 1
        return row + list(end)

    def query(self, example: Example, budget: int, bos: bool = True) -> list[int]:
        """The prompt of a query. What is too long loses the beginning of its input."""
        start = [self.tokenizer.bos] * bos + self.tokenizer.encode("\nInput:\n")
        text, end = self.tokenizer.encode(example.input), self.tokenizer.encode("\nOutput:\n")
        room = budget - len(start) - len(end)
        if room < 0:
            raise InputError(f"{budget} tokens leave no room for a query: its target or options are too long for it")
        self.counts["queries"] += 1
        if len(text) > room:
            self.counts["queries cut"] += 1
            text = text[len(text) - room :]
        return start + text + end

    def fits(self, example: Example) -> bool:
        """Whether the target leaves room for a query. A target is never cut: one that doesn't fit is left out."""
        fits = len(self.tokenizer.encode(example.target)) + ROOM_FOR_QUERY <= self.downstream
        self.counts["targets left out"] += not fits
        self.counts["targets"] += 1
        return fits

    def query_and_target(self, example: Example, shots: list[Example] | None = None) -> tuple[list[int], list[int]]:
        """A training row: prompt, and target with EOS. With `shots`, these stand in the prompt itself."""
        target = self.tokenizer.encode(example.target) + [self.tokenizer.eos]
        if shots is None:
            return self.query(example, self.downstream - len(target)), target
        query = self.query(example, self.downstream - len(target), bos=False)
        return self.shots(shots, query, self.context - len(target)), target

    def report(self) -> str:
        """What was left out or cut, in a line; empty if nothing was."""
        told = [
            f"{self.counts[part]} of {self.counts[whole]} {what}"
            for part, whole, what in (
                ("shots left out", "shots", "examples left out, because the context was full"),
                ("targets left out", "targets", "training targets left out, because they were too long"),
                ("queries cut", "queries", "queries cut at the beginning, because they were too long"),
            )
            if self.counts[part]
        ]
        return "; ".join(told)


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Batch:
    """What `HyperLlama.forward` reads. N queries share B rows of examples; M tokens have a loss.

    examples  [B, T] rows for the hypernetwork, or None
    row       [N] which row of examples serves each query
    tokens    [N, T'] the queries with their targets (without the last token, which is only predicted)
    select    [M] positions that predict a target token, as indices into N·T'
    targets   [M] the tokens to predict there
    read      tokens read, padding left out: for tokens/s
    """

    examples: Tensor | None
    row: Tensor
    tokens: Tensor
    select: Tensor
    targets: Tensor
    read: int

    def to(self, device: torch.device | str) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Batch(**moved)


def collate(examples: list[list[int]] | None, row: list[int], prompts: list[list[int]], targets: list[list[int]]):
    """Right-padded tensors of rows of tokens; loss on the targets alone."""
    tokens = [prompt + target[:-1] for prompt, target in zip(prompts, targets)]
    width = max(map(len, tokens))
    select = [
        n * width + t
        for n, (prompt, target) in enumerate(zip(prompts, targets))
        for t in range(len(prompt) - 1, len(prompt) - 1 + len(target))
    ]
    return Batch(
        examples=None if examples is None else ragged(examples),
        row=torch.tensor(row),
        tokens=ragged(tokens),
        select=torch.tensor(select),
        targets=torch.tensor([token for target in targets for token in target]),
        read=sum(map(len, tokens)) + sum(map(len, examples or [])),
    )


QUERIES = 4  # queries that share one row of examples in training: one hyper pass serves them all


class P3Batches:
    """Training batches: `batches(seed, step, rank)` is a pure function of its arguments."""

    def __init__(self, tasks: list[Task], formatter: Formatter, method: str, gist_ids: list[int], shots: int, rows: int):
        """rows: rows of examples in a batch, with QUERIES queries each; or, without gists, rows of text."""
        self.tasks, self.formatter, self.method = tasks, formatter, method
        self.gist_ids, self.shots, self.rows = gist_ids, shots, rows
        self.queries = QUERIES if method == "hyper" else 1
        self.weights = [min(len(task.train), MAX_WEIGHT) for task in tasks]
        for task in tasks:
            if len(task.train) < shots + self.queries:
                raise InputError(
                    f"{task.train.folder}: {len(task.train)} training rows are too few for "
                    f"{shots} shots and {self.queries} queries (--shots)"
                )

    def __call__(self, seed: int, step: int, rank: int = 0) -> Batch:
        rng = random.Random(f"{seed} {step} {rank}")
        context, row, prompts, targets = [], [], [], []
        for b in range(self.rows):
            queries, shots = self.draw(rng)
            if self.method == "hyper":
                context.append(self.formatter.shots(shots, self.gist_ids))
            for query in queries:
                prompt, target = self.formatter.query_and_target(query, shots if self.method == "fewshot" else None)
                row.append(b)
                prompts.append(prompt)
                targets.append(target)
        return collate(context or None, row, prompts, targets)

    def draw(self, rng: random.Random) -> tuple[list[Example], list[Example]]:
        """Queries and shots of one task. Tasks are drawn by size, up to MAX_WEIGHT rows."""
        for _ in range(100):
            (split,) = rng.choices([task.train for task in self.tasks], self.weights)
            picked = [split[i] for i in rng.sample(range(len(split)), self.shots + self.queries)]
            queries = [example for example in picked[: self.queries] if self.formatter.fits(example)]
            if queries:
                # Real tasks hold the same row several times: a shot may never be the query itself.
                inputs = {query.input for query in queries}
                return queries, [shot for shot in picked[self.queries :] if shot.input not in inputs]
        raise InputError(f"no target fits into {self.formatter.downstream} tokens (--query-length)")
