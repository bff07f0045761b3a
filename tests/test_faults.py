"""Damaged files. Each is changed in 120 ways: it loads to what was written, or ends with one line."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, random_hyper, random_llama, write_hf, write_meta, write_parquet

import train as training
from data import Formatter, Sample, collate
from gist import Rows, with_gists
from llama import InputError, Tokenizer, load
from lora import assign, load_tensors, save_tensors
from run import Run, portable, read_args, resolve_args, trainable
from tasks.hyperpretrain import TextBatches
from tasks.p3 import Split
from tasks.rows import TFRecords, row_group
from tasks.sni import read_sni_task
from tasks.symbol import symbol_tasks
from tiny.make import write_jsonl, write_tfrecord
from tools.export import load_gists, save_gists

TIMES = 120

ROWS = [(f"Is number {i} even?", "yes" if i % 2 == 0 else "no", ["yes", "no"]) for i in range(6)]


def damaged(content: bytes, seed: int) -> bytes:
    """The content with some bytes flipped, cut off, cut out, swapped, doubled or made anew."""
    rng = random.Random(seed)
    a, middle, b = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    flipped = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    forms = [
        bytes(flipped),
        content[:a],
        content[:a] + content[b:],
        content[:a] + content[middle:b] + content[a:middle] + content[b:],
        content[:b] + content[a:],
        content[:a] + rng.randbytes(b - a) + content[b:],
    ]
    return forms[seed % len(forms)]


def fuzz(path: Path, read: Callable, same: Callable | None = None) -> int:
    """`read` the file at path in TIMES damaged forms: only InputError of one line may come out of it.

    same(result): whether it is what was written; None where the format can't tell.
    Returns how many were refused.
    """
    whole = path.read_bytes()
    refused = 0
    for seed in range(TIMES):
        changed = damaged(whole, seed)
        path.write_bytes(changed)
        try:
            result = read()
        except InputError as problem:
            refused += 1
            assert "\n" not in str(problem) and str(path.parent) in str(problem), seed
        else:
            right = changed == whole or same is None or same(result)
            assert right, f"seed {seed}: wrong values were loaded silently"
    path.write_bytes(whole)
    read()
    return refused


def test_a_damaged_tfrecord_is_refused_or_loads_its_rows(tmp_path):
    path = tmp_path / "train.tfrecord-00000-of-00001"
    write_tfrecord(path, ROWS)
    original = list(TFRecords(path))

    def same(rows):  # whole records may be missing or change places: their checksums hold
        return all(row in original for row in rows)

    assert fuzz(path, lambda: list(TFRecords(path)), same) > TIMES // 2


def test_a_damaged_jsonl_is_one_line(tmp_path):
    path = tmp_path / "train.jsonl"
    write_jsonl(path, ROWS)

    def read():
        rows = Split(tmp_path, "train")
        return [rows.scorable(i) for i in range(len(rows))]

    assert fuzz(path, read) > TIMES // 3


def test_a_damaged_parquet_is_one_line(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    write_parquet(path, ROWS, write_page_checksum=True)

    def read():
        row_group.cache_clear()  # it holds what the file was before
        return list(Split(tmp_path, "train"))

    assert fuzz(path, read) > TIMES // 3


def test_a_damaged_sni_file_is_one_line(tmp_path):
    source = sorted((ROOT / "tiny" / "natural-instructions" / "tasks").glob("*.json"))[0]
    raw = json.loads(source.read_text())
    path = tmp_path / "task.json"
    path.write_text(json.dumps(raw | {"Instances": raw["Instances"][:3]}))
    assert fuzz(path, lambda: read_sni_task(path)) > TIMES // 2


def test_a_damaged_symbol_set_is_one_line(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) + "\n" for i in range(8)))
    assert fuzz(path, lambda: symbol_tasks(tmp_path, "train", ["word"])) > TIMES // 4


# --------------------------------------------------------------------------------------------- text

TOKENIZER = Tokenizer(ROOT / "tiny" / "llama")


def text_batches(folder: Path) -> TextBatches:
    return TextBatches(folder, Formatter(TOKENIZER, 60, 40), [5000, 5001])


def document(word: str, count: int) -> str:
    return json.dumps({"text": f"{word} " * count})


def words_of(batches: TextBatches, test: bool) -> set[str]:
    """The words in many windows of training or evaluation text."""
    batch = batches(0, range(12), test=test)
    tokens = [token for token in batch.targets.tolist() if token != TOKENIZER.eos]
    return set(TOKENIZER.decode(tokens).split())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_damaged_text_is_one_line_and_never_hangs(tmp_path, name):
    lines = [json.dumps({"text": f"The dog number {i} sleeps in the barn."}) + "\n" for i in range(60)]
    content = "".join(lines).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)

    def read():
        batches = text_batches(tmp_path)
        return [batches(seed, range(2)) for seed in range(2)]

    assert fuzz(path, read) > TIMES // 10


def write_text(path: Path, documents: list[str], before: str, between: str, after: str) -> None:
    path.write_text(before + between.join(documents) + after, newline="")


ENDS = [("", "\n", ""), ("", "\n", "\n"), (" \n\n", "\r\n", ""), (" \n\n", "\n\n \n", "\n \n\n")]
BLANK = [("\n" * 30_000, "\n", ""), ("", "\n" * 30_000, ""), ("", "\n", "\n" * 30_000)]
LAST = [(*ends, count, 20_000) for ends in ENDS for count in (1, 5)]  # more than 64 KiB
LAST += [(*ends, 1, 30) for ends in BLANK]


@pytest.mark.parametrize("before, between, after, training, length", LAST, ids=range(len(LAST)))
def test_a_last_document_longer_than_a_twentieth_of_its_file_is_evaluation_text(
    tmp_path, before, between, after, training, length
):
    """And blank lines are no documents, however many there are."""
    documents = [document("dog", 30)] * training + [document("cat", length)]
    write_text(tmp_path / "a.jsonl", documents, before, between, after)
    batches = text_batches(tmp_path)
    assert words_of(batches, test=False) == {"dog"} and words_of(batches, test=True) == {"cat"}


@pytest.mark.parametrize("before", ["", "\n \n"], ids=repr)
@pytest.mark.parametrize("after", ["", "\n", "\n \n\n"], ids=repr)
def test_a_single_document_trains_and_a_note_is_printed(tmp_path, capsys, before, after):
    write_text(tmp_path / "one.jsonl", [document("cat", 50)], before, "", after)
    with pytest.raises(InputError, match="too few documents to keep some for evaluation"):
        text_batches(tmp_path)
    capsys.readouterr()
    write_text(tmp_path / "two.jsonl", [document("dog", 50), document("owl", 50)], "", "\n", "")
    batches = text_batches(tmp_path)
    note = f"{tmp_path / 'one.jsonl'}: a single document, so none of it is kept for evaluation\n"
    assert capsys.readouterr().err == note
    assert words_of(batches, test=False) == {"cat", "dog"} and words_of(batches, test=True) == {"owl"}


# ------------------------------------------------------------------------- models and what is trained


def test_damaged_weights_are_one_line(tmp_path):
    folder = write_hf(tmp_path / "hf", random_llama())
    assert fuzz(folder / "model.safetensors", lambda: load(folder)) > TIMES // 4


def test_damaged_meta_weights_are_one_line(tmp_path):
    folder = write_meta(tmp_path / "meta", random_llama(), 1)
    assert fuzz(next(folder.glob("*.pth")), lambda: load(folder)) > TIMES // 4


def test_a_damaged_config_is_one_line(tmp_path):
    """Where it can be read, the weights must fit."""
    folder = write_hf(tmp_path / "hf", random_llama())
    assert fuzz(folder / "config.json", lambda: load(folder)) > TIMES // 2


def test_a_damaged_tokenizer_is_one_line(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes((ROOT / "tiny" / "llama" / "tokenizer.model").read_bytes())
    fuzz(path, lambda: Tokenizer(tmp_path))


def test_damaged_adapters_are_one_line(tmp_path):
    parameters = trainable(random_hyper())
    path = tmp_path / "adapters.safetensors"
    save_tensors(path, parameters, {"method": "hyper"})

    def read():
        assign(parameters, load_tensors(path)[0], path)

    assert fuzz(path, read) > TIMES // 4


def test_a_damaged_prefix_is_one_line_or_keeps_its_shapes(tmp_path):
    hyper = random_hyper()
    path = tmp_path / "g.safetensors"
    about = {"model": "m", "run": "r"}
    gists = hyper.compress(Rows.of([with_gists([1, 5, 6], hyper.gist_ids)]))
    save_gists(path, gists, about)

    def same(loaded):
        shapes = [[k.shape for k, _ in prefix.past] for prefix in (loaded, gists)]
        return shapes[0] == shapes[1] and loaded.offset.shape == (1,)

    assert fuzz(path, lambda: load_gists(path, about, hyper.model), same) > TIMES // 4


def test_damaged_arguments_are_one_line_or_values_of_their_types(tmp_path):
    args = training.parse(["--task", "p3", "--shots", "4"])[0]
    path = tmp_path / "args.json"
    path.write_text(json.dumps(portable(args)))
    folders = {"model": args.model, "data": args.data}
    assert fuzz(path, lambda: resolve_args({}, read_args(tmp_path) | folders)) > TIMES // 3


@pytest.mark.parametrize("change", [
    {"gists": 1.5}, {"gists": True}, {"gists": None}, {"seed": [1]}, {"lr": "fast"}, {"downstream": {}},
    {"quantize": 1}, {"task": None}, {"task": "nothing"}, {"unheard": 1}, {"model": 3}, {"model": None},
], ids=str)  # fmt: skip
def test_arguments_edited_by_hand_keep_their_names_and_types(tmp_path, change):
    args = training.parse(["--task", "p3"])[0]
    (tmp_path / "args.json").write_text(json.dumps(portable(args) | change))
    with pytest.raises(InputError, match="args.json: ") as refused:
        read_args(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_damaged_state_is_one_line_or_has_its_shapes(tmp_path):
    hyper = random_hyper()
    batch = collate([Sample([with_gists([1, 5, 6], hyper.gist_ids)], [([1, 7], [8, 9, 2])])])
    options = {"task": "p3", "steps": 2, "batch_size": 1, "lr": 1e-3, "gist_lr": 1e-3, "save_every": 1}
    args = resolve_args(options | {"measure": 0})
    training.train(Run(args, hyper, Formatter(TOKENIZER, 100, 40)), lambda seed, numbers: batch, tmp_path)
    optimizers = training.make_optimizers(hyper, args)

    def read():
        assert training.load_state(tmp_path, hyper, optimizers, args.steps) == 2
        return all(p.isfinite().all() for p in trainable(hyper).values())

    assert fuzz(tmp_path / "state.safetensors", read, bool) > TIMES // 5


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim"])
def test_a_config_that_its_files_cannot_hold_is_refused_at_once(tmp_path, field):
    with pytest.raises(InputError, match="config") as refused:
        load(write_hf(tmp_path, random_llama(), **{field: 10**9}))
    assert "\n" not in str(refused.value)
