"""Symbol tuning (Wei et al. 2023): texts to classify, with arbitrary symbols as labels, new for each prompt.

Only the examples say what a symbol means. Accuracy over at most 100 queries of each held-out set, each
with its own symbols, format and examples (paper, Section 4.3).
"""

import random
import string
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data import Episode, Example, Formatter, Layout
from llama import InputError, Tokenizer, reading
from run import option
from tasks.rows import JsonLines, as_text, existing, read_lists

FOLDER = "symbol"  # the miniature's data, and the checkpoint for it
MODEL = "llama-c"
METRIC = "accuracy"
OPTIONS = {"words": option(kind=Path, help="file of words to use as labels (the tokenizer's whole words)")}
ONE_SET = True
DEFAULTS = {
    "large": {"shots": 4, "steps": 10_000, "batch_size": 4, "lr": 2e-4, "gist_lr": 2e-4, "sets": 10},
    "tiny": {"shots": 4, "steps": 300, "batch_size": 8, "lr": 1e-3, "gist_lr": 3e-2, "sets": 10, "limit": 20},
}


def load(args, formatter: Formatter, split: str) -> list["SymbolTask"]:
    words = read_words(args.words) if args.words else whole_words(formatter.tokenizer)
    return symbol_tasks(args.data, split, words)


# The ten formats of symbol tuning: what comes before the input, and before the label.
LAYOUTS = [
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
LAYOUT = LAYOUTS[0]  # for own examples

MOST = 100  # queries of a set that are scored
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
        rows = random.Random(f"{seed} {self.name}").sample(rows, min(len(rows), MOST, limit or MOST))
        rngs = [random.Random(f"{seed} {self.name} {n} {i}") for i in range(len(rows))]
        return [self.episode(rng, shots, [row], True) for rng, row in zip(rngs, rows)]

    def episode(self, rng: random.Random, shots: int, rows: list[tuple[str, str]], test: bool) -> Episode:
        """`shots` examples per class (as many as there are), none of them a query."""
        symbols = dict(zip(self.classes, draw_symbols(rng, len(self.classes), self.words, test)))
        asked = {text for _, text in rows}
        examples = []
        for label, texts in self.classes.items():
            others = [text for text in texts if text not in asked]
            examples += [
                Example(text, symbols[label]) for text in rng.sample(others, min(shots, len(others)))
            ]
        rng.shuffle(examples)
        choices = tuple(symbols.values())
        queries = [Example(text, symbols[label], choices) for label, text in rows]
        return Episode(queries, examples, rng.choice(LAYOUTS))


# The paper's eleven evaluation sets, as parts of a file's name.
HELD_OUT = (
    "subj hate stance_abortion stance_atheism stance_feminist stance_hillary "
    "ade_corpus overruling semiconductor terms_of_service twitter_complaints"
).split()


def symbol_tasks(folder: str | Path, split: str, words: Sequence[str]) -> list[SymbolTask]:
    """The sets of a folder, one .jsonl each with text and label; divided by splits/, else as in the paper."""
    folder = existing(folder)
    paths = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    lists = read_lists(folder / "splits")
    if lists is None:
        held_out = [name for name in paths if any(part in name.lower() for part in HELD_OUT)]
        lists = {"train": [name for name in paths if name not in held_out], "test": held_out}
    tasks = []
    for name in lists[split]:
        if name not in paths:
            raise InputError(
                f"{folder}: the set {name}, listed in splits/{split}_tasks.txt, has no {name}.jsonl"
            )
        classes: dict[str, list[str]] = {}
        rows = JsonLines(paths[name])
        for i, row in enumerate(rows):
            where = rows.where(i)
            if not isinstance(row.get("label"), (str, int)):
                raise InputError(f"{where}: label is missing or neither text nor a whole number")
            classes.setdefault(str(row["label"]), []).append(
                as_text(row.get("text"), f"{where}: text").strip()
            )
        if len(classes) < 2 or min(len(set(texts)) for texts in classes.values()) < 2:
            raise InputError(f"{paths[name]}: needs two classes or more, and two texts or more in each")
        tasks.append(SymbolTask(name, classes, words))
    if not tasks:
        raise InputError(
            f"{folder}: no {split} sets here (.jsonl files; splits/{split}_tasks.txt may name them)"
        )
    return tasks


def read_words(path: str | Path) -> list[str]:
    """Words to use as symbols, separated by white space."""
    with reading(path, "not a file of words"):
        words = Path(path).read_text(encoding="utf-8").split()
    if not words:
        raise InputError(f"{path}: holds no words")
    return words


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """The tokenizer's pieces that are whole English words: "▁" and three or more letters."""
    pieces = map(tokenizer.piece, range(tokenizer.size))
    return [p[1:] for p in pieces if p[:1] == "▁" and len(p) > 3 and p[1:].isascii() and p[1:].isalpha()]
