"""Tasks, examples and batches: P3, Super-NaturalInstructions, symbol tuning, text (paper, Section 4).

A task gives episodes: queries, and what may be known of their task (an instruction, examples).
Formatter turns episodes into rows of tokens, whole examples only:

    hypernetwork   BOS instruction {\\nInput:\\n x \\nOutput:\\n y}×shots gist×G
    downstream     BOS \\nInput:\\n x \\nOutput:\\n   then y EOS, the only tokens with a loss

Rows on disk are indexed and read one by one: real P3 does not fit in memory. Each row of a batch is
a pure function of the seed and its number, so that a run can be resumed at any step, by any number
of processes, by asking for those rows.
"""

import gzip
import json
import mmap
import random
import shutil
import string
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from llama import InputError, Tokenizer, ragged

# ---------------------------------------------------------------------------------- rows of a file


class JsonLines(Sequence):
    """A .jsonl file, by line number. Only the places where lines begin are kept in memory."""

    def __init__(self, path: Path):
        data, newlines = map_file(path), [np.zeros(1, dtype=np.int64)]
        for start in range(0, len(data), 1 << 24):
            block = np.frombuffer(data[start : start + (1 << 24)], dtype=np.uint8)
            newlines.append(np.flatnonzero(block == ord("\n")) + start + 1)
        if len(data) and data[len(data) - 1 :] != b"\n":  # the last line has no end of its own
            newlines.append(np.array([len(data)]))
        self.path, self.bounds = path, np.concatenate(newlines)  # of n lines: n + 1

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i: int) -> dict:
        try:
            row = json.loads(read_bytes(self.path, self.bounds[i], self.bounds[i + 1]))
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
        data, bounds = map_file(path), [0]
        while (at := bounds[-1]) + 12 <= len(data):
            bounds.append(at + 16 + struct.unpack_from("<Q", data, at)[0])
        if bounds[-1] != len(data):
            raise InputError(f"{path}: record {max(1, len(bounds) - 1)} is cut off or its length is corrupt")
        self.path, self.bounds = path, np.array(bounds)
        # The checksums of all lengths at once: byte 0 of every record, then byte 1, …
        heads = np.frombuffer(data, dtype=np.uint8)[self.bounds[:-1, None] + np.arange(12)].astype(np.int64).T
        wrong = masked_crc32c(heads[:8], np.array(_CRC_TABLE)) != heads[8:].T @ (1 << 8 * np.arange(4))
        if wrong.any():
            raise InputError(f"{path}: the length of record {wrong.argmax() + 1} fails its checksum")

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i: int) -> dict:
        record = read_bytes(self.path, self.bounds[i], self.bounds[i + 1])
        data = record[12:-4]
        if masked_crc32c(data) != int.from_bytes(record[-4:], "little"):
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
        self.path, self.errors = path, (OSError, ValueError, pyarrow.ArrowException)
        try:
            self.file = ParquetFile(path, memory_map=True, page_checksum_verification=True)
        except self.errors as problem:
            raise InputError(f"{path}: not a parquet file ({str(problem).splitlines()[0]})") from None
        groups = range(self.file.num_row_groups)
        self.ends = np.cumsum([self.file.metadata.row_group(g).num_rows for g in groups])
        self.group, self.rows = -1, []

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def __getitem__(self, i: int) -> dict:
        group = int(np.searchsorted(self.ends, i, side="right"))
        if group != self.group:
            try:
                self.group, self.rows = group, self.file.read_row_group(group).to_pylist()
            except self.errors as problem:
                raise InputError(f"{self.path}: row group {group + 1} can't be read ({str(problem).splitlines()[0]})") from None
        return self.rows[i - int(self.ends[group])]  # counted from the group's end: negative


def map_file(path: Path) -> mmap.mmap | bytes:
    """A file's bytes, without reading them. To be dropped soon: a map holds a file open, and data has thousands."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}") from None


def read_bytes(path: Path, start: int, end: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)
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


def masked_crc32c(data: bytes | np.ndarray, table: list[int] | np.ndarray = _CRC_TABLE) -> int | np.ndarray:
    """CRC-32C as TFRecord stores it: rotated right by 15 bits, plus a constant. Of n messages at once: [bytes, n]."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
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


# ----------------------------------------------------------------------------- examples and episodes


@dataclass(frozen=True)
class Example:
    input: str
    target: str
    options: tuple[str, ...] = ()  # to rank, where answers are ranked
    references: tuple[str, ...] = ()  # all right answers, where answers are generated


@dataclass(frozen=True)
class Layout:
    """How a task is written.

    instruction  what stands in front of everything, around an instruction
    shot         an example: {n} its number, {input}, {target}
    head, tail   what stands before and behind the input of a query (which may lose its beginning)
    space        what stands before the input and the target of a query
    end          what follows a target where examples stand in a row: an untouched model goes on with it
    """

    shot: str
    head: str
    tail: str
    space: str = ""
    instruction: str = "{}"
    end: str = "\nInput:\n"

    def example(self, n: int, example: Example) -> str:
        return self.shot.format(n=n, input=example.input, target=example.target)


P3_LAYOUT = Layout("\nInput:\n{input}\nOutput:\n{target}", "\nInput:\n", "\nOutput:\n")

# Tk-Instruct's prompt (Wang et al. 2022).
SNI_LAYOUT = Layout(
    " Positive Example {n} -\nInput: {input}\n Output: {target}\n\n",
    "Now complete the following example -\nInput:",
    "\nOutput:",
    " ",
    "Definition: {}\n\n",
    "\n\n",
)

# The ten formats of symbol tuning (Wei et al. 2023): what stands before the input, and before the label.
SYMBOL_LAYOUTS = [
    Layout(f"\n{before} {{input}}{between} {{target}}", "\n" + before, between, " ", end="\n" + before)
    for before, between in (
        ("Input:", "\nOutput:"),
        ("Input:", "\nTarget:"),
        ("Input:", "\nSymbol:"),
        ("Input:", "\nLabel:"),
        ("Question:", "\nAnswer:"),
        ("Student:", "\nTeacher:"),
        ("X =", "\nY ="),
        ("Q:", "\nA:"),
        ("", " ->"),
        ("Sentences:", "\nMapped To:"),
    )
]


@dataclass(frozen=True)
class Episode:
    """Queries of one task, and what may be known of it: an instruction, examples."""

    queries: list[Example]
    shots: list[Example]
    layout: Layout
    instruction: str = ""


# A task (P3Task, SNITask, SymbolTask) has a name; a group, within which its score is averaged; a
# weight, by which it is drawn in training; and these methods:
#
#   draw(rng, shots, queries)          -> Episode         one of training
#   evaluation(seed, n, shots, limit)  -> [Episode, …]    all queries, with the n-th draw of examples


def read_lists(folder: Path) -> dict[str, list[str]] | None:
    """The names in {train,test}_tasks.txt, as {"train": […], "test": […]}; None without these files."""
    paths = {part: folder / f"{part}_tasks.txt" for part in ("train", "test")}
    if not any(path.exists() for path in paths.values()):
        return None
    names = {}
    for part, path in paths.items():
        try:
            names[part] = path.read_text(encoding="utf-8").split()
        except UnicodeDecodeError:
            raise InputError(f"{path}: is not UTF-8") from None
        except OSError:
            raise InputError(f"{path}: is missing; beside the other list it is needed, too") from None
        for name in names[part]:
            if Path(name).name != name:
                raise InputError(f"{path}: the task {name} is not in its folder")
    for name in sorted(set(names["train"]) & set(names["test"])):
        raise InputError(f"{folder}: the task {name} is in both lists")
    return names


def as_text(value: object, where: str) -> str:
    try:
        value = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8") from None
    if not isinstance(value, str):
        raise InputError(f"{where} is missing or not text")
    return value


def existing(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such data folder")
    return Path(folder)


# ------------------------------------------------------------------------------------------------ P3

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

    def check(self, count: int) -> None:
        """Read so many rows, evenly spaced: what is wrong with all of them is found before a long run, not in it."""
        for i in range(0, len(self), max(1, len(self) // count)):
            self[i]

    def scorable(self, i: int) -> Example:
        """Example i, with options that are there, differ, and hold the target; else InputError."""
        example = self[i]
        where = self.where(i)
        if len(set(example.options)) < 2 or not all(example.options):
            raise InputError(f"{where}: needs two or more different answer_choices, has {list(example.options)}")
        if example.target not in example.options:
            raise InputError(f"{where}: target {example.target!r} is not among {list(example.options)}")
        return example


MAX_WEIGHT = 30_000  # rows of one task that count when tasks are drawn
ROWS_CHECKED = 50_000  # training rows that are read at the start, over all tasks: every row of a small folder


@dataclass(frozen=True)
class P3Task:
    """One prompt of P3. Accuracies are averaged over a dataset's prompts (the group), then over datasets."""

    name: str
    group: str
    train: Split
    validation: Split | None = None

    @property
    def weight(self) -> int:
        return min(len(self.train), MAX_WEIGHT)

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        if len(self.train) < shots + queries:
            raise InputError(
                f"{self.train.folder}: {len(self.train)} training rows are too few for "
                f"{shots} shots and {queries} queries (--shots)"
            )
        picked = [self.train[i] for i in rng.sample(range(len(self.train)), shots + queries)]
        asked = {query.input for query in picked[:queries]}
        # Real tasks hold the same row several times: a shot may never be the query itself.
        return Episode(picked[:queries], [e for e in picked[queries:] if e.input not in asked], P3_LAYOUT)

    def evaluation(self, seed: int, n: int, shots: int, limit: int | None) -> list[Episode]:
        """One episode: the examples come from the training split, and none is among the questions."""
        if not len(self.validation):
            raise InputError(f"{self.validation.folder}: the {self.validation.name} split is empty")
        queries = [self.validation.scorable(i) for i in range(min(len(self.validation), limit or sys.maxsize))]
        order = random.Random(f"{seed} {self.name} {n}").sample(range(len(self.train)), len(self.train))
        asked = {query.input for query in queries}
        found = list(islice((e for e in map(self.train.__getitem__, order) if e.input not in asked), shots))
        if len(found) < shots:
            raise InputError(
                f"{self.train.folder}: only {len(found)} training rows are no questions; {shots} --shots asked"
            )
        return [Episode(queries, found, P3_LAYOUT)]


# Held-out datasets by the beginning of their tasks' names. T0 held out story_cloze too: it has to be
# asked for separately, so it is neither trained nor evaluated here.
HELD_OUT = (
    "anli hellaswag super_glue_cb super_glue_copa super_glue_rte super_glue_wic super_glue_wsc.fixed winogrande"
).split()


def p3_names(folder: Path, split: str) -> dict[str, str]:
    """Task name -> dataset, for split "train" or "test": by splits/{train,test}_tasks.txt, else the paper's."""
    lists = read_lists(folder / "splits")
    if lists is not None:
        return {name: name for name in lists[split]}
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


def p3_tasks(folder: str | Path, split: str) -> list[P3Task]:
    """The training tasks (split "train") or the held-out ones ("test") of a P3 folder."""
    folder = existing(folder)
    root = folder if (folder / "splits").is_dir() or not (folder / "data").is_dir() else folder / "data"
    tasks, names = [], p3_names(root, split)
    for name, dataset in tqdm(names.items(), desc=f"reading {split} tasks", leave=False, delay=1):
        if not (root / name).is_dir():
            raise InputError(f"{root}: the task {name}, listed in splits/{split}_tasks.txt, has no folder")
        validation = Split(root / name, "validation") if split == "test" else None
        tasks.append(P3Task(name, dataset, Split(root / name, "train"), validation))
        tasks[-1].train.check(ROWS_CHECKED // len(names))
    if not tasks:
        kind = "training" if split == "train" else "held-out"
        raise InputError(f"{root}: no {kind} tasks of P3 here (splits/{split}_tasks.txt may name them)")
    return tasks


# -------------------------------------------------------------------------- Super-NaturalInstructions

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
        if len(self.instances) < queries:
            raise InputError(f"{self.name}: has only {len(self.instances)} instances; {queries} are needed")
        picked = [replace(e, target=rng.choice(e.references)) for e in rng.sample(self.instances, queries)]
        return Episode(picked, self.examples[:shots], SNI_LAYOUT, self.definition)

    def evaluation(self, seed: int, n: int, shots: int, limit: int | None) -> list[Episode]:
        return [Episode(self.instances[:limit], self.examples[:shots], SNI_LAYOUT, self.definition)]


def full_stop(text: str) -> str:
    return text if not text or text[-1] in string.punctuation else text + "."


def read_sni_task(path: Path) -> SNITask:
    """A task file. Older ones have plain text where newer ones have lists."""

    def texts(value: object, what: str) -> list[str]:
        found = [as_text(v, f"{path}: {what}").strip() for v in (value if isinstance(value, list) else [value])]
        if not found:
            raise InputError(f"{path}: {what} is empty")
        return found

    try:
        raw = json.loads(path.read_bytes())
        definition = full_stop(texts(raw["Definition"], "Definition")[0])
        examples = [
            Example(*(full_stop(texts(e[field], f"Positive Examples: {field}")[0]) for field in ("input", "output")))
            for e in raw["Positive Examples"]
        ]
        instances = []
        for i, row in enumerate(raw["Instances"][:INSTANCES]):
            (text,) = texts(row["input"], f"instance {i + 1}: input")
            answers = texts(row["output"], f"instance {i + 1}: output")
            instances.append(Example(full_stop(text), answers[0], references=tuple(answers)))
        group = texts(raw.get("Categories") or "no category", "Categories")[0]
    except OSError as problem:
        raise InputError(f"{path}: {problem.strerror}") from None
    except ValueError as problem:  # also of UTF-8
        raise InputError(f"{path}: not a task file of Super-NaturalInstructions ({problem})") from None
    except KeyError as field:
        raise InputError(f"{path}: the field {field} is missing") from None
    except (TypeError, AttributeError):
        raise InputError(f"{path}: a field has the wrong type") from None
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
    found = [path for path in paths if path.exists()]
    if not found:
        raise InputError(f"{folder / 'tasks'}: none of the {len(paths)} tasks of {split}_tasks.txt is here")
    if len(found) < len(paths):
        print(f"{folder}: {len(paths) - len(found)} of {len(paths)} {split} tasks have no file and are left out", file=sys.stderr)
    return [read_sni_task(path) for path in tqdm(found, desc=f"reading {split} tasks", leave=False, delay=1)]


# ------------------------------------------------------------------------------------- symbol tuning

TRAINING_SHOTS = range(2, 11)  # examples per class in training; evaluation takes --shots


def in_test_pool(symbol: str) -> bool:
    """Symbols for evaluation are never seen in training: a checksum says which pool one belongs to."""
    return zlib.crc32(symbol.encode()) % 4 == 0


def draw_symbols(rng: random.Random, count: int, words: Sequence[str], test: bool) -> list[str]:
    """Arbitrary labels for one prompt: integers, letter strings or words, none the beginning of another.

    Integers have at most 5 digits in training and 4 in evaluation: Llama reads them digit by digit,
    and one that has never seen a fifth would give it no probability.
    """
    kind = rng.choice(("integer", "letters", "word"))
    symbols: list[str] = []
    for _ in range(10_000):
        if len(symbols) == count:
            return symbols
        if kind == "integer":
            symbol = str(rng.randrange(10_000 if test else 100_000))
        elif kind == "letters":
            symbol = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 4)))
        else:
            symbol = rng.choice(words)
        # A sum of log-probabilities would always prefer a label that another one begins with.
        clash = any(symbol.startswith(other) or other.startswith(symbol) for other in symbols)
        if in_test_pool(symbol) == test and not clash:
            symbols.append(symbol)
    raise InputError(f"{len(words)} words are too few to name {count} classes (--words)")


@dataclass(frozen=True)
class SymbolTask:
    """A set of texts with labels, whose labels are replaced anew for each prompt."""

    name: str
    classes: dict[str, list[str]]  # label -> texts
    words: Sequence[str]
    weight: int = 1

    @property
    def group(self) -> str:
        return self.name

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        """Training: 2 to 10 examples per class, whatever `shots` says."""
        labels = [rng.choice(list(self.classes)) for _ in range(queries)]
        rows = [(label, rng.choice(self.classes[label])) for label in labels]
        return self.episode(rng, rng.choice(TRAINING_SHOTS), rows, False)

    def evaluation(self, seed: int, n: int, shots: int, limit: int | None) -> list[Episode]:
        """An episode for each of at most 100 queries: its own symbols, format and examples."""
        rows = [(label, text) for label, texts in self.classes.items() for text in texts]
        rows = random.Random(f"{seed} {self.name}").sample(rows, min(len(rows), limit or INSTANCES))
        rngs = [random.Random(f"{seed} {self.name} {n} {i}") for i in range(len(rows))]
        return [self.episode(rng, shots, [row], True) for rng, row in zip(rngs, rows)]

    def episode(self, rng: random.Random, shots: int, rows: list[tuple[str, str]], test: bool) -> Episode:
        """`shots` examples per class (as many as there are), none of them a query."""
        symbols = dict(zip(self.classes, draw_symbols(rng, len(self.classes), self.words, test)))
        asked = {text for _, text in rows}
        examples = []
        for label, texts in self.classes.items():
            others = [text for text in texts if text not in asked]
            examples += [Example(text, symbols[label]) for text in rng.sample(others, min(shots, len(others)))]
        rng.shuffle(examples)
        options = tuple(symbols.values())
        queries = [Example(text, symbols[label], options) for label, text in rows]
        return Episode(queries, examples, rng.choice(SYMBOL_LAYOUTS))


# The paper's eleven evaluation sets, as parts of a file's name.
SYMBOL_HELD_OUT = (
    "subj hate stance_abortion stance_atheism stance_feminist stance_hillary "
    "ade_corpus overruling semiconductor terms_of_service twitter_complaints"
).split()


def symbol_tasks(folder: str | Path, split: str, words: Sequence[str]) -> list[SymbolTask]:
    """The sets of a folder, one .jsonl each with text and label; divided as in splits/, else as in the paper."""
    folder = existing(folder)
    paths = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    lists = read_lists(folder / "splits")
    if lists is None:
        held_out = [name for name in paths if any(part in name.lower() for part in SYMBOL_HELD_OUT)]
        lists = {"train": [name for name in paths if name not in held_out], "test": held_out}
    tasks = []
    for name in lists[split]:
        if name not in paths:
            raise InputError(f"{folder}: the set {name}, listed in splits/{split}_tasks.txt, has no {name}.jsonl")
        classes: dict[str, list[str]] = {}
        rows = JsonLines(paths[name])
        for i, row in enumerate(rows):
            where = f"{paths[name]}: line {i + 1}"
            if not isinstance(row.get("label"), (str, int)):
                raise InputError(f"{where}: label is missing or neither text nor a whole number")
            classes.setdefault(str(row["label"]), []).append(as_text(row.get("text"), f"{where}: text").strip())
        if len(classes) < 2 or min(len(set(texts)) for texts in classes.values()) < 2:
            raise InputError(f"{paths[name]}: needs two classes or more, and two texts or more in each")
        tasks.append(SymbolTask(name, classes, words))
    if not tasks:
        raise InputError(f"{folder}: no {split} sets here (.jsonl files; splits/{split}_tasks.txt may name them)")
    return tasks


def read_words(path: str | Path) -> list[str]:
    """Words to use as symbols, separated by white space."""
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: not a file of words ({problem})") from None
    if not words:
        raise InputError(f"{path}: holds no words")
    return words


# ------------------------------------------------------------------------------------------- tokens


ROOM_FOR_QUERY = 32  # tokens of a downstream row that its target must leave to the query


class Formatter:
    """Turns episodes into rows of tokens within a budget, and counts what did not fit."""

    def __init__(self, tokenizer: Tokenizer, context: int, downstream: int):
        """context: most tokens of a row of examples (gists included); downstream: of one query."""
        self.tokenizer, self.context, self.downstream = tokenizer, context, downstream
        self.counts: Counter[str] = Counter()

    def instruction(self, episode: Episode, budget: int) -> list[int]:
        """The instruction's tokens; at most half of the budget, of which it keeps the beginning."""
        if not episode.instruction:
            return []
        tokens = self.tokenizer.encode(episode.layout.instruction.format(episode.instruction))
        self.counts["instructions"] += 1
        self.counts["instructions cut"] += len(tokens) > budget // 2
        return tokens[: budget // 2]

    def context_row(self, episode: Episode, end: Sequence[int] = (), budget: int | None = None) -> tuple[list[int], int]:
        """BOS, instruction, as many whole examples as fit into the budget, then `end` (the gists, say).

        Also returns how many tokens there are before the first example. What is left out is counted.
        """
        budget = self.context if budget is None else budget
        row = [self.tokenizer.bos] + self.instruction(episode, budget)
        lead, room = len(row), budget - len(end)
        for n, example in enumerate(episode.shots, 1):
            tokens = self.tokenizer.encode(episode.layout.example(n, example))
            self.counts["shots"] += 1
            if len(row) + len(tokens) <= room:
                row += tokens
            else:
                self.counts["shots left out"] += 1
        return row + list(end), lead

    def target(self, episode: Episode, text: str) -> list[int]:
        return self.tokenizer.encode(episode.layout.space + text)

    def query(self, episode: Episode, example: Example, budget: int, instruct: bool, bos: bool = True) -> list[int]:
        """The prompt of a query; `instruct`: behind the instruction. What is too long loses the beginning of its input."""
        layout = episode.layout
        start = [self.tokenizer.bos] * bos + (self.instruction(episode, budget) if instruct else [])
        start += self.tokenizer.encode(layout.head)
        text, end = self.tokenizer.encode(layout.space + example.input), self.tokenizer.encode(layout.tail)
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

    def fitting(self, draw: Callable[[], Episode]) -> Episode:
        """What `draw` gives, without the queries whose target is too long; drawn again where none is left."""
        for _ in range(100):
            episode = draw()
            queries = [query for query in episode.queries if self.fits(query)]
            if queries:
                return replace(episode, queries=queries)
        raise InputError(f"no target fits into {self.downstream} tokens (--query-length)")

    def report(self) -> str:
        """What was left out or cut, in a line; empty if nothing was."""
        told = [
            f"{self.counts[part]} of {self.counts[whole]} {what}"
            for part, whole, what in (
                ("shots left out", "shots", "examples left out, because the context was full"),
                ("instructions cut", "instructions", "instructions cut at the end, because they were too long"),
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
    kept      [B] how many tokens at the beginning of each row of examples stay in the prefix, or None
    row       [N] which row of examples serves each query
    tokens    [N, T'] the queries with their targets (without the last token, which is only predicted)
    select    [M] positions that predict a target token, as indices into N·T'
    targets   [M] the tokens to predict there
    read      tokens read, padding left out: for tokens/s
    """

    examples: Tensor | None
    kept: Tensor | None
    row: Tensor
    tokens: Tensor
    select: Tensor
    targets: Tensor
    read: int

    def to(self, device: torch.device | str) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Batch(**moved)


def collate(
    examples: list[list[int]] | None,
    row: list[int],
    prompts: list[list[int]],
    targets: list[list[int]],
    kept: list[int] | None = None,
) -> Batch:
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
        kept=None if kept is None else torch.tensor(kept),
        row=torch.tensor(row),
        tokens=ragged(tokens),
        select=torch.tensor(select),
        targets=torch.tensor([token for target in targets for token in target]),
        read=sum(map(len, tokens)) + sum(map(len, examples or [])),
    )


QUERIES = 4  # queries that share one row of examples in training: one hyper pass serves them all


@dataclass
class TaskBatches:
    """Training batches of tasks: rows of examples with QUERIES queries each; without gists, rows of text.

    method    "hyper": the queries follow gists; "fewshot": they follow the examples; "zeroshot"
    instruct  whether the instruction also stands before a query that follows gists
    fuse      whether the instruction's own keys and values stay in the prefix beside the gists
    """

    tasks: Sequence[P3Task | SNITask | SymbolTask]
    formatter: Formatter
    method: str
    gist_ids: list[int]
    shots: int
    instruct: bool = False
    fuse: bool = False

    def __post_init__(self) -> None:
        self.queries = QUERIES if self.method == "hyper" else 1
        self.weights = [task.weight for task in self.tasks]
        for task in self.tasks:  # a task that is too small is found now, not after hours
            task.draw(random.Random(0), self.shots, self.queries)

    def __call__(self, seed: int, rows: Sequence[int]) -> Batch:
        """The rows of a run with these numbers. Each is a pure function of (seed, number)."""
        context, kept, row, prompts, targets = [], [], [], [], []
        for b, number in enumerate(rows):
            episode = self.draw(random.Random(f"{seed} {number}"))
            if self.method == "hyper":
                examples, lead = self.formatter.context_row(episode, self.gist_ids)
                context.append(examples)
                kept.append(lead)
            for query in episode.queries:
                target = self.formatter.target(episode, query.target) + [self.formatter.tokenizer.eos]
                row.append(b)
                prompts.append(self.prompt(episode, query, len(target)))
                targets.append(target)
        return collate(context or None, row, prompts, targets, kept if self.fuse else None)

    def prompt(self, episode: Episode, query: Example, target: int) -> list[int]:
        budget = self.formatter.downstream - target
        if self.method != "fewshot":
            return self.formatter.query(episode, query, budget, self.instruct or self.method == "zeroshot")
        end = self.formatter.query(episode, query, budget, instruct=False, bos=False)
        return self.formatter.context_row(episode, end, self.formatter.context - target)[0]

    def draw(self, rng: random.Random) -> Episode:
        """An episode of some task."""
        return self.formatter.fitting(
            lambda: rng.choices(self.tasks, self.weights)[0].draw(rng, self.shots, self.queries)
        )


@dataclass
class PrefixBatches:
    """Training batches for prefix tuning: for each row of a run, a query of every task behind its own prefix.

    shared: one prefix for all tasks; each row is a query of one of them, drawn by weight.
    """

    tasks: Sequence[P3Task]
    formatter: Formatter
    shared: bool = False

    def __call__(self, seed: int, rows: Sequence[int]) -> Batch:
        """The rows of a run with these numbers. Each is a pure function of (seed, number)."""
        row, prompts, targets = [], [], []
        for number in rows:
            for t, task in enumerate([None] if self.shared else self.tasks):
                episode = self.draw(random.Random(f"{seed} {task.name if task else 'shared'} {number}"), task)
                (query,) = episode.queries
                target = self.formatter.target(episode, query.target) + [self.formatter.tokenizer.eos]
                row.append(t)
                prompts.append(self.formatter.query(episode, query, self.formatter.downstream - len(target), False))
                targets.append(target)
        return collate(None, row, prompts, targets)

    def draw(self, rng: random.Random, task: P3Task | None) -> Episode:
        """An episode of this task, or of any."""
        return self.formatter.fitting(
            lambda: (task or rng.choices(self.tasks, [t.weight for t in self.tasks])[0]).draw(rng, 0, 1)
        )


# The eight prompts that the paper tunes prefixes on.
PREFIX_PROMPTS = (
    "anli_GPT_3_style_r1 hellaswag_complete_first_then super_glue_cb_GPT_3_style "
    "super_glue_copa_C1_or_C2_premise_so_because_ super_glue_rte_GPT_3_style super_glue_wic_GPT_3_prompt "
    "super_glue_wsc.fixed_GPT_3_Style winogrande_winogrande_debiased_Replace"
).split()


# --------------------------------------------------------------- text, for compression hyperpretraining


class TextBatches:
    """Segments A B C D of text: A and D are compressed, B C is predicted behind their gists (paper, Section 5).

    A and D fill the formatter's context, B and C its downstream budget. Files (.jsonl or .jsonl.gz
    with `text`) are never read whole: a window begins at a random byte of them. The last twentieth
    of each file is kept for evaluation.
    """

    def __init__(self, folder: str | Path, formatter: Formatter, gist_ids: list[int]):
        folder = existing(folder)
        paths = sorted(path for path in folder.rglob("*") if path.name.endswith((".jsonl", ".jsonl.gz")))
        if not paths:
            raise InputError(f"{folder}: no .jsonl or .jsonl.gz files with text")
        self.paths, self.borders, self.sizes = paths, [], []
        self.unpacked = tempfile.TemporaryDirectory(prefix="text-")
        for n, path in enumerate(paths):
            data = map_file(self.plain(n))
            self.sizes.append(len(data))
            self.borders.append(data.find(b"\n", len(data) * 19 // 20) + 1)  # behind it: evaluation
            if not 0 < self.borders[-1] < len(data):
                raise InputError(f"{path}: too few lines to keep some for evaluation")
            for at in (0, self.borders[-1]):  # a file that holds something else is found now
                text_of(data[at : data.find(b"\n", at) + 1 or len(data)], f"{path}: byte {at}")
        self.formatter, self.gist_ids = formatter, gist_ids
        self.outer = (formatter.context - len(gist_ids) - 1) // 2  # tokens of A, and of D
        self.inner = (formatter.downstream - 1) // 2  # of B, and of C
        if min(self.outer, self.inner) < 1:
            raise InputError("--context and --query-length leave no room for segments of text")

    def plain(self, n: int) -> Path:
        """File number n, or what was packed in it: nothing can be found inside a .gz, so it is unpacked once."""
        path, unpacked = self.paths[n], Path(self.unpacked.name) / str(n)
        if path.suffix != ".gz":
            return path
        try:
            if not unpacked.exists():
                with open(unpacked, "wb") as file, gzip.open(path) as packed:
                    shutil.copyfileobj(packed, file)
        except (OSError, EOFError, zlib.error) as problem:
            raise InputError(f"{path}: can't be unpacked ({problem})") from None
        return unpacked

    def window(self, rng: random.Random, test: bool) -> list[int]:
        """The tokens of A B C D: a stretch of one text, or of several where they are short."""
        needed, eos = 2 * (self.outer + self.inner), self.formatter.tokenizer.eos
        (file,) = rng.choices(range(len(self.paths)), self.sizes)
        path, data, border = self.paths[file], map_file(self.plain(file)), self.borders[file]
        start, end = (border, self.sizes[file]) if test else (0, border)
        at = data.find(b"\n", rng.randrange(start, end), end) + 1 or start  # the beginning of some line
        tokens: list[int] = []
        for _ in range(needed + 1):
            at = start if at >= end else at
            stop = data.find(b"\n", at, end) + 1 or end
            text = text_of(data[at:stop], f"{path}: byte {at}")
            # A text needn't be read whole: no token has more than 32 letters in the mean.
            skip = rng.randrange(max(1, len(text) - 32 * needed)) if not tokens else 0
            found = self.formatter.tokenizer.encode(text[skip : skip + 32 * needed])
            if not tokens and len(found) > needed:
                first = rng.randrange(len(found) - needed + 1)
                found = found[first : first + needed]
            tokens += found + [eos]
            if len(tokens) > needed:
                return tokens[:needed]
            at = stop
        raise InputError(f"{path}: its texts are empty")

    def __call__(self, seed: int, rows: Sequence[int], test: bool = False) -> Batch:
        """The rows of a run with these numbers. Each is a pure function of (seed, number)."""
        bos, context, targets = self.formatter.tokenizer.bos, [], []
        for number in rows:
            tokens = self.window(random.Random(f"{'test ' * test}{seed} {number}"), test)
            middle = slice(self.outer, self.outer + 2 * self.inner)
            context.append([bos, *tokens[: middle.start], *tokens[middle.stop :], *self.gist_ids])
            targets.append(tokens[middle])
        return collate(context, list(range(len(context))), [[bos]] * len(context), targets)


def text_of(line: bytes, where: str) -> str:
    try:
        return as_text(json.loads(line).get("text"), f"{where}: text")
    except (ValueError, AttributeError):
        raise InputError(f"{where}: not a line of JSON with the field text") from None
