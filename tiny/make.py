"""Makes the miniature: data, a tokenizer, a tiny Llama-2, and the same after compression hyperpretraining.

    python -m tiny.make            all of it, from a seed, in place of what lies beside this file

Needs torch 2.9 or later (for the Muon optimizer); it takes about two hours and three quarters on one core.

This script writes the data and trains the base, an ordinary language model. Compression is left to the
project's own command, train.py --task hyperpretrain: tiny/llama-c is the folder of that run. Its text begins
with lists and stories (texts.py) and goes on with all kinds that the base has read, the tasks' layouts
among them; no text gives words the labels that a held-out task gives them.

Looking a word up in what came before doesn't come by itself: the base reads repeated strings first, then
lists of single words, phrases, pairs, and at last sentences, random tasks with a definition, random sets to
classify and texts, in layouts that include those of the tasks. (A real base has read such things, too.)
"""

import argparse
import csv
import gzip
import io
import json
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from data import Example
from llama import Config, Llama, Tokenizer, load, ragged
from tasks.rows import masked_crc32c
from tasks.sni import LAYOUT as SNI_LAYOUT
from tasks.symbol import LAYOUTS as SYMBOL_LAYOUTS
from tasks.symbol import draw_symbols, whole_words
from tasks.hyperpretrain import save_checkpoint
from tiny import texts, world

HERE = Path(__file__).parent

# ------------------------------------------------------------------------------------------ documents

LAYOUTS = ["\nInput:\n{x}\nOutput:\n{y}", "\nQ: {x}\nA:\n{y}", "\n{x}\n{y}"]
NAMES = ("repeat", "word", "phrase", "pair", "sentence", "definition", "topic", "text")  # kinds of documents
REPEAT, WORD, PHRASE, PAIR, SENTENCE, DEFINITION, TOPIC, TEXT = range(
    len(NAMES)
)  # the first five by difficulty
WORDS = world.LABELS + [word for words in world.KINDS.values() for word in words]


def lookup_rows(rng: random.Random, difficulty: int) -> Iterator[tuple[str, str, str]]:
    """Endless rows (input, label, word that decides) of one random task."""
    if difficulty == SENTENCE and rng.random() < 0.1:  # no lookup: the answer stands in the sentence
        task = world.Task(rng.choice(list(world.KINDS)), {}, rng.choice(list(world.SPOT.values())))
        while True:
            text, word, _ = task.row(rng)
            yield text, word, word
    classes = rng.choice((2, 2, 3) if difficulty == SENTENCE else (2, 3, 6))
    task = world.random_task(rng, classes)
    while True:
        label = rng.choice(list(task.groups))
        word = rng.choice(task.groups[label])
        if difficulty == SENTENCE:
            text = world.sentence(rng, task.kind, word)
        elif difficulty == PAIR:
            text = world.pair(rng, task.kind, word)
        else:
            text = (world.PHRASES[0] if difficulty == WORD else rng.choice(world.PHRASES)).format(w=word)
        if difficulty != WORD:
            text = task.ask(text)
        yield text, label, word


Row = tuple[str, str, bool]  # prompt, answer, and whether what stands before gives it away
NEXT = None  # in a series of rows: the next ones are a text of their own


def lookup(rng: random.Random, difficulty: int) -> Iterator[Row]:
    """Endless rows of one lookup task in one layout."""
    layout, seen = rng.choice(LAYOUTS), set()
    for text, label, word in lookup_rows(rng, difficulty):
        yield layout.format(x=text, y=""), label, word in seen
        seen.add(word)


def definition_rows(rng: random.Random, examples: int, queries: int) -> Iterator[Row]:
    """A task with a definition: examples, then queries."""
    task = world.random_instruction(rng, world.LABELS, held_out=False)
    start = SNI_LAYOUT.instruction.format(task.definition)
    for n in range(examples + queries):
        text, answer = task.row(rng)
        if n < examples:
            prompt = SNI_LAYOUT.example(n + 1, Example(text, "")).rstrip()
        else:
            prompt = f"{SNI_LAYOUT.head} {text}{SNI_LAYOUT.tail}"
        end = "\n\n" if n < examples else ""
        yield start + prompt, f" {answer}{end}", task.told or n > 0
        start = ""


def definitions(rng: random.Random) -> Iterator[Row | None]:
    """Tasks with a definition, texts of their own, each with up to four examples and a query."""
    while True:
        yield from definition_rows(rng, rng.randint(0, 4), 1)
        yield NEXT


def topics(rng: random.Random, words: list[str], all_symbols: bool) -> Iterator[Row]:
    """Endless rows of one set to classify, with arbitrary symbols as labels (some of them words)."""
    topics, layout, seen = rng.choice(world.TRAIN_TOPICS), rng.choice(SYMBOL_LAYOUTS), set()
    symbols = draw_symbols(rng, len(topics), words, test=all_symbols and rng.random() < 0.25)
    while True:
        at = rng.randrange(len(topics))
        text = world.about(rng, topics[at], topics)
        yield f"{layout.head} {text}{layout.tail}", " " + symbols[at], at in seen
        seen.add(at)


def rows_of(rng: random.Random, kind: int, words: list[str], all_symbols: bool) -> Iterator[Row | None]:
    if kind == DEFINITION:
        return definitions(rng)
    if kind == TOPIC:
        return topics(rng, words, all_symbols)
    return lookup(rng, kind)


Document = tuple[list[int], list[bool]]  # tokens, and which of them could be known from what stands before


def as_document(tokenizer: Tokenizer, rows: Iterable[Row | None], length: int) -> Document:
    tokens, known = [tokenizer.bos], [False]
    for row in rows:
        if row is NEXT:
            tokens += [tokenizer.eos, tokenizer.bos]
            known += [known[-1]] * 2
        else:
            prompt, answer = map(tokenizer.encode, row[:2])
            tokens += prompt + answer
            known += [False] * len(prompt) + [row[2]] * len(answer)
        if len(tokens) >= length:
            break
    return tokens[:length], known[:length]


def document(rng: random.Random, tokenizer: Tokenizer, kind: int, length: int) -> Document:
    if kind == TEXT:
        text = texts.text(rng, (0.1, 0.1, 0.15, 0.45, 0.1, 0.1), 600, 1000)
        tokens = [tokenizer.bos, *tokenizer.encode(text)][:length]
        return tokens, [False] * len(tokens)
    if kind != REPEAT:
        return as_document(tokenizer, rows_of(rng, kind, whole_words(tokenizer), True), length)
    period = rng.randint(8, 32)
    string = [t for _ in range(period) for t in tokenizer.encode(rng.choice(("", " ")) + rng.choice(WORDS))]
    return ([tokenizer.bos] + string * length)[:length], [t > len(string) for t in range(length)]


# ------------------------------------------------------------------------------------------ tokenizer


def make_tokenizer(folder: Path, rng: random.Random) -> None:
    """A SentencePiece BPE model with Llama's settings, so that every word of the world is one piece."""
    lines = []
    for _ in range(4000):
        rows = lookup_rows(rng, rng.choice((PHRASE, PAIR, SENTENCE)))
        lines += [
            line
            for _ in range(3)
            for line in rng.choice(LAYOUTS).format(x=next(rows)[0], y="").split("\n")
            if line
        ]
        task = world.random_instruction(rng, world.LABELS, held_out=False)
        example = Example(*task.row(rng))
        text = SNI_LAYOUT.instruction.format(task.definition) + SNI_LAYOUT.example(rng.randint(1, 4), example)
        lines += [line for line in (text + SNI_LAYOUT.head).split("\n") if line]
    # SentencePiece sees a space before each line. After ":" a word is seen as at the start of a line.
    starts = [*WORDS, "Input", "Output"]
    starts += [
        text.split()[0]
        for text in [
            *world.WORDINGS.values(),
            *world.SPOT.values(),
            *world.SENTENCES,
            *world.SHORT,
            *world.PHRASES,
        ]
    ]
    starts += ["Question", "Answer", "Student", "Teacher", "Sentences", "Mapped", "Symbol", "Label", "Target"]
    lines += [f":{word} {word}" for word in dict.fromkeys(starts) if "{" not in word] * 300
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=1024,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


# ------------------------------------------------------------------------------------------- training


def new_model(vocab: int, generator: torch.Generator) -> Llama:
    config = Config(
        vocab=vocab, width=128, layers=4, heads=4, kv_heads=2, head_size=32, hidden=352,
        norm_eps=1e-5, rope_theta=10000.0, max_positions=2048,
    )  # fmt: skip
    model = Llama(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:  # words as large as what the layers will add to them; outputs of layers small
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 1.0 if "embed" in name else 0.007 if small else 0.02
                parameter.normal_(0, std, generator=generator)
    return model


class Optimizers:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and lm_head."""

    def __init__(self, module: torch.nn.Module, scale: float = 1.0):
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.dim() == 2 and ".layers." in "." + name]
        others = [p for name, p in named if not (p.dim() == 2 and ".layers." in "." + name)]
        muon = torch.optim.Muon(matrices, lr=0.02 * scale, weight_decay=0.1, adjust_lr_fn="original")
        adam = torch.optim.AdamW(others, lr=5e-3 * scale, betas=(0.9, 0.99), weight_decay=0.0)
        self.all = [(optimizer, optimizer.param_groups[0]["lr"]) for optimizer in (muon, adam)]

    def step(self, share: float) -> None:
        for optimizer, lr in self.all:
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.step()
            optimizer.zero_grad()


def document_loss(model: Llama, documents: list[Document]) -> tuple[Tensor, Tensor]:
    """Mean loss of all tokens, plus that of those that can be known; which share of these is right [B]."""
    tokens, known = (
        ragged([tokens for tokens, _ in documents]),
        ragged([known for _, known in documents]).bool()[:, 1:],
    )
    real = ragged([[1] * len(tokens) for tokens, _ in documents]).bool()[:, 1:]
    logits = model(tokens[:, :-1])[0]
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(
        known.shape
    )
    right = (logits.argmax(-1) == tokens[:, 1:]) & known
    return losses[real].mean() + losses[known].mean(), right.sum(1) / known.sum(1)


def mean_by_kind(kinds: list[str], right: Tensor) -> dict[str, float]:
    return {
        name: 100 * right[[kind == name for kind in kinds]].mean().item()
        for name in NAMES[:-1]
        if name in kinds
    }


Stage = tuple[int, tuple[float, ...], int]  # steps, share of each kind of document, length
ROUNDS: list[list[Stage]] = [  # each with a learning rate that falls anew
    [
        (260, (1, 0, 0, 0, 0, 0, 0, 0), 128),
        (200, (0.3, 0.7, 0, 0, 0, 0, 0, 0), 128),
        (300, (0.1, 0.2, 0.7, 0, 0, 0, 0, 0), 192),
        (300, (0.1, 0.1, 0.3, 0.5, 0, 0, 0, 0), 192),
        (2600, (0.05, 0.05, 0.1, 0.15, 0.4, 0.15, 0.1, 0), 320),
    ],
    [(1500, (0, 0.05, 0.05, 0.1, 0.4, 0.1, 0.3, 0), 320)],
    [(400, (0, 0, 0.03, 0.07, 0.3, 0.1, 0.15, 0.35), 320)],
    [  # begins from the checkpoint of the others, in bfloat16
        (300, (0, 0, 0.03, 0.05, 0.17, 0.1, 0.55, 0.1), 320),
        (500, (0, 0, 0.03, 0.05, 0.17, 0.1, 0.55, 0.1), 448),
    ],
]
TOKENS_PER_STEP = 4096


def pretrain(model: Llama, tokenizer: Tokenizer, seed: int, stages: list[Stage]) -> None:
    optimizers, step, began = Optimizers(model), 0, time.time()
    total = sum(steps for steps, _, _ in stages)
    for steps, shares, length in stages:
        for _ in range(steps):
            rng = random.Random(f"pretrain {seed} {total} {step}")
            kinds = rng.choices(range(len(NAMES)), shares, k=TOKENS_PER_STEP // length)
            documents = [document(rng, tokenizer, kind, length) for kind in kinds]
            loss, right = document_loss(model, documents)
            loss.backward()
            optimizers.step(min(1.0, (total - step) / (0.4 * total)))
            step += 1
            if step % 25 == 0:
                shares_right = mean_by_kind([NAMES[kind] for kind in kinds], right)
                text = ", ".join(f"{name} {share:.0f} %" for name, share in shares_right.items())
                seconds = time.time() - began
                begin = f"{seconds:5.0f} s  step {step}/{total}  loss {loss.item():.2f}"
                print(f"{begin}  right: {text}", flush=True)


# ----------------------------------------------------------------------------------------- the files


def write_jsonl(path: Path, rows: list[tuple[str, str, list[str]]]) -> None:
    fields = ("inputs_pretokenized", "targets_pretokenized", "answer_choices")
    path.write_text("".join(json.dumps(dict(zip(fields, row))) + "\n" for row in rows))


def write_tfrecord(path: Path, rows: list[tuple[str, str, list[str]]]) -> None:
    """tf.train.Example messages with the fields of P3, framed as TFRecord."""

    def nested(number: int, content: bytes) -> bytes:  # a length-delimited field of a protocol-buffer message
        length, size = b"", len(content)
        while size >= 0x80:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    with open(path, "wb") as file:
        for text, target, options in rows:
            features = {
                "inputs_pretokenized": [text],
                "targets_pretokenized": [target],
                "answer_choices": options,
            }
            entries = b""
            for name, values in features.items():
                feature = nested(1, b"".join(nested(1, value.encode()) for value in values))
                entries += nested(1, nested(1, name.encode()) + nested(2, feature))
            data = nested(1, entries)
            length = struct.pack("<Q", len(data))
            file.write(
                length
                + struct.pack("<I", masked_crc32c(length))
                + data
                + struct.pack("<I", masked_crc32c(data))
            )


def write_p3(folder: Path, seed: int) -> None:
    """One folder per task. Every fourth is TFRecord, as published; the others are .jsonl, to be looked at."""
    rng = random.Random(f"p3 {seed}")
    train, held_out = world.p3(rng)
    write_lists(folder / "splits", train, held_out)
    for i, (name, task) in enumerate({**train, **held_out}.items()):
        (folder / name).mkdir()
        for split, count in (
            ("train", 60 if name in held_out else 40),
            ("validation", 60 if name in held_out else 10),
        ):
            rows = [task.row(rng) for _ in range(count)]
            if i % 4 == 0:
                write_tfrecord(folder / name / f"{split}.tfrecord-00000-of-00001", rows)
            else:
                write_jsonl(folder / name / f"{split}.jsonl", rows)


def write_lists(folder: Path, train: Iterable[str], test: Iterable[str]) -> None:
    folder.mkdir(parents=True)
    for name, tasks in (("train", train), ("test", test)):
        (folder / f"{name}_tasks.txt").write_text("".join(f"{task}\n" for task in tasks))


def write_sni(folder: Path, seed: int) -> None:
    """Task files as in natural-instructions: two positive examples, instances with their right answers."""
    rng = random.Random(f"sni {seed}")
    train, held_out = world.sni(rng)
    write_lists(folder / "splits" / "default", train, held_out)
    (folder / "tasks").mkdir()
    for name, task in {**train, **held_out}.items():
        rows = []
        for text, answer in dict(task.row(rng) for _ in range(200)).items():  # no sentence twice
            also = [f"the {answer}"] if task.form == "{x}" and len(task.pick) == 1 else []
            rows.append((text, [answer, *also]))
        examples = [{"input": text, "output": answers[0], "explanation": ""} for text, answers in rows[:2]]
        instances = [
            {"id": f"{name}-{i}", "input": text, "output": answers}
            for i, (text, answers) in enumerate(rows[2 : 52 if name in held_out else 82])
        ]
        content = {
            "Categories": ["Find one word" if len(task.pick) == 1 else "Find two words"],
            "Definition": [task.definition],
            "Positive Examples": examples,
            "Instances": instances,
        }
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def write_symbol(folder: Path, seed: int) -> None:
    """One .jsonl for each set, 40 texts of each class."""
    rng = random.Random(f"symbol {seed}")
    sets = {"_or_".join(topics): topics for topics in world.TRAIN_TOPICS + world.HELDOUT_TOPICS}
    held_out = [name for name in sets if sets[name] in world.HELDOUT_TOPICS]
    write_lists(folder / "splits", (name for name in sets if name not in held_out), held_out)
    for name, topics in sets.items():
        rows = [(world.about(rng, kind, topics), kind) for kind in topics for _ in range(40)]
        lines = [
            json.dumps({"text": text, "label": kind}) + "\n" for text, kind in rng.sample(rows, len(rows))
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def write_sample(folder: Path, seed: int) -> None:
    """CSV files of texts with labels: two topics each, a word for each topic, another word in each file."""
    rng = random.Random(f"sample {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    topics = [pair for pair in world.TRAIN_TOPICS if len(pair) == 2][:6]
    for n, pair in enumerate(topics):
        labels = dict(zip(pair, rng.sample(world.LABELS, 2)))
        with open(folder / f"{'test' if n >= 4 else 'train'}-{n}.csv", "w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(("text", "label"))
            for _ in range(40):
                kind = rng.choice(pair)
                rows.writerow((world.about(rng, kind, pair), labels[kind]))


EASY, STORIES, ALL = "1-words.jsonl.gz", "2-stories.jsonl.gz", "3-all-kinds.jsonl.gz"
TEXTS = {  # file -> millions of letters, shares of texts.KINDS, or of NAMES: easy ones first
    EASY: (2.2, (0.4, 0.25, 0.1, 0.25, 0, 0)),
    STORIES: (2.6, (0.05, 0.1, 0.15, 0.5, 0.1, 0.1)),
    ALL: (5.4, (0, 0.05, 0.05, 0.06, 0.2, 0.18, 0.4, 0.06)),
}


def texts_of(rng: random.Random, kind: int) -> list[str]:
    """600 to 2400 letters of a kind that the base was trained on: a text, or tasks with a definition."""
    if kind == TEXT:
        return [texts.text(rng, TEXTS[STORIES][1], 600, 2400)]
    rows = rows_of(rng, kind, WORDS, all_symbols=False)
    letters = rng.randint(600, 2400)
    found = [""]
    for row in rows:
        if row is NEXT:
            found.append("")
        else:
            found[-1] += row[0] + row[1]
        if sum(map(len, found)) >= letters:
            return [text.strip() for text in found]


def write_text(folder: Path, seed: int) -> None:
    """Lists, stories, notes in which the same things keep going together: what comes before helps."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (millions, shares) in TEXTS.items():
        written = []
        letters = 0
        draws = 0
        while letters < 1e6 * millions:
            rng = random.Random(f"text {seed} {name} {draws}")
            if name == ALL:
                (kind,) = rng.choices(range(len(NAMES)), shares)
                new = texts_of(rng, kind)
            else:
                new = [texts.text(rng, shares, 600, 2400)]
            written += new
            letters += sum(map(len, new))
            draws += 1
        lines = (json.dumps({"text": text}) + "\n" for text in written)
        (folder / name).write_bytes(gzip.compress("".join(lines).encode(), mtime=0))


def clear(folder: Path) -> None:
    """Beside this file, what was made before goes; elsewhere, nothing is removed."""
    if folder.exists() and folder.parent.resolve() != HERE.resolve():
        raise SystemExit(f"{folder}: is there already")
    shutil.rmtree(folder, ignore_errors=True)


def write_data(out: Path, seed: int) -> None:
    for name, write in (
        ("P3", write_p3),
        ("natural-instructions", write_sni),
        ("symbol", write_symbol),
        ("sample", write_sample),
        ("text", write_text),
    ):
        clear(out / name)
        write(out / name, seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: beside this file)")
    parser.add_argument("--data-only", action="store_true", help="stop when the data are written")
    args = parser.parse_args()
    if not args.data_only and not hasattr(torch.optim, "Muon"):
        parser.error("training needs torch 2.9 or later; --data-only doesn't")
    torch.set_num_threads(1)  # another number gives other bits
    write_data(args.out, args.seed)
    if args.data_only:
        return
    base, compressed = args.out / "llama", args.out / "llama-c"
    for folder in (base, compressed):
        clear(folder)
    base.mkdir(parents=True)
    make_tokenizer(base, random.Random(f"tokenizer {args.seed}"))
    tokenizer = Tokenizer(base)
    model = new_model(tokenizer.size, torch.Generator().manual_seed(args.seed))
    for stages in ROUNDS:
        if stages is ROUNDS[-1]:
            model = load(base).requires_grad_(True)
        pretrain(model, tokenizer, args.seed, stages)
        save_checkpoint(base, model.config, dict(model.named_parameters()))
    hyperpretrain = [
        "--task",
        "hyperpretrain",
        "--model",
        base,
        "--data",
        args.out / "text",
        "--out",
        compressed,
    ]
    subprocess.run(
        [sys.executable, HERE.parent / "train.py", *hyperpretrain, "--seed", str(args.seed)], check=True
    )
    (compressed / "state.safetensors").unlink()  # to go on with the run, and large
    (compressed / "curve.png").unlink()  # figures/ has one
    (compressed / ".hyperllama").unlink()  # nothing overwrites this run


if __name__ == "__main__":
    main()
