"""Damaged files. Each is changed in some hundred ways: it loads to what was written, or ends with one line."""

import argparse
import gzip
import json
import random

import pytest
import torch
from conftest import ROOT, G, random_hyper, random_llama, write_hf, write_meta

import train as training
from data import Formatter, collate
from gist import load_gists, save_gists, trainable
from llama import InputError, Tokenizer, load, read_config
from lora import assign, load_tensors, save_tensors
from tasks import portable, read_args, settle
from tasks.p3 import Split
from tasks.rows import TFRecords, row_group
from tasks.sni import read_sni_task
from tasks.symbol import symbol_tasks
from tasks.text import TextBatches
from tiny.make import write_jsonl, write_tfrecord

TIMES = 300

ROWS = [(f"Is number {i} even?", "yes" if i % 2 == 0 else "no", ["yes", "no"]) for i in range(6)]


def damaged(content: bytes, seed: int) -> bytes:
    """The content with some bytes flipped, cut off, cut out, swapped, doubled or made anew."""
    rng = random.Random(seed)
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kind = seed % 6
    if kind == 0:
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return content[:a]
    if kind == 2:
        return content[:a] + content[b:]
    if kind == 3:
        middle = (a + b) // 2
        return content[:a] + content[middle:b] + content[a:middle] + content[b:]
    if kind == 4:
        return content[:b] + content[a:]
    return content[:a] + rng.randbytes(b - a) + content[b:]


def fuzz(path, read, same=None, times=TIMES):
    """`read` the file at path in `times` damaged forms: only InputError of one line may come out of it.

    same(result): whether it is what was written; None where the format can't tell.
    Returns how many were refused.
    """
    whole, refused = path.read_bytes(), 0
    for seed in range(times):
        changed = damaged(whole, seed)
        path.write_bytes(changed)
        try:
            result = read()
        except InputError as problem:
            refused += 1
            assert "\n" not in str(problem) and str(problem), seed
        else:
            assert changed == whole or same is None or same(result), f"seed {seed}: wrong values were loaded silently"
    path.write_bytes(whole)
    read()
    return refused


def all_rows(reader, path):
    rows = reader(path)
    return [rows[i] for i in range(len(rows))]


def test_a_damaged_tfrecord_is_refused_or_loads_its_rows(tmp_path):
    path = tmp_path / "train.tfrecord-00000-of-00001"
    write_tfrecord(path, ROWS)
    original = all_rows(TFRecords, path)

    def same(rows):  # whole records may be missing or change places: their checksums hold
        return all(row in original for row in rows)

    assert fuzz(path, lambda: all_rows(TFRecords, path), same) > TIMES // 2


def test_a_damaged_jsonl_is_one_line(tmp_path):
    path = tmp_path / "train.jsonl"
    write_jsonl(path, ROWS)

    def read():
        rows = Split(tmp_path, "train")
        return [rows.scorable(i) for i in range(len(rows))]

    assert fuzz(path, read) > TIMES // 3


def test_a_damaged_parquet_is_one_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path = tmp_path / "train-00000-of-00001.parquet"
    fields = ("inputs_pretokenized", "targets_pretokenized", "answer_choices")
    write_table(pyarrow.Table.from_pylist([dict(zip(fields, row)) for row in ROWS]), path, write_page_checksum=True)

    def read():
        row_group.cache_clear()  # it holds what the file was before
        rows = Split(tmp_path, "train")
        return [rows[i] for i in range(len(rows))]

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


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_damaged_text_is_one_line_and_never_hangs(tmp_path, name):
    lines = "".join(json.dumps({"text": f"The dog number {i} sleeps in the barn."}) + "\n" for i in range(60)).encode()
    path, tokenizer = tmp_path / name, Tokenizer(ROOT / "tiny" / "llama")
    path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)

    def read():
        batches = TextBatches(tmp_path, Formatter(tokenizer, 60, 40), [5000, 5001])
        return [batches(seed, range(2)) for seed in range(2)]

    assert fuzz(path, read) > TIMES // 10


def test_damaged_weights_are_one_line_or_keep_their_shapes(tmp_path):
    folder = write_hf(tmp_path / "hf", random_llama())
    shapes = {name: p.shape for name, p in random_llama().named_parameters()}

    def same(model):  # the format has no checksum: names, shapes and types are what can be told
        return {name: p.shape for name, p in model.named_parameters()} == shapes

    assert fuzz(folder / "model.safetensors", lambda: load(folder), same) > TIMES // 4


def test_damaged_meta_weights_are_one_line(tmp_path):
    folder = write_meta(tmp_path / "meta", random_llama(), 1)
    assert fuzz(next(folder.glob("*.pth")), lambda: load(folder)) > TIMES // 4


def test_a_damaged_config_is_one_line(tmp_path):
    folder = write_hf(tmp_path / "hf", random_llama())
    fuzz(folder / "config.json", lambda: read_config(folder))
    for seed in range(40):  # of those that can be read, the weights must fit
        whole = (folder / "config.json").read_bytes()
        (folder / "config.json").write_bytes(damaged(whole, 6 * seed))
        try:
            load(folder)
        except InputError as problem:
            assert "\n" not in str(problem)
        (folder / "config.json").write_bytes(whole)


def test_a_damaged_tokenizer_is_one_line(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes((ROOT / "tiny" / "llama" / "tokenizer.model").read_bytes())
    fuzz(path, lambda: Tokenizer(tmp_path))


def test_damaged_adapters_are_one_line(tmp_path):
    hyper = random_hyper()
    parameters = {name: p for name, p in hyper.named_parameters() if p.requires_grad}
    path = tmp_path / "adapters.safetensors"
    save_tensors(path, parameters, {"method": "hyper"})

    def read():
        tensors = load_tensors(path)[0]
        assign(parameters, tensors, path)

    assert fuzz(path, read) > TIMES // 4


def test_a_damaged_prefix_is_one_line_or_keeps_its_shapes(tmp_path):
    hyper, path = random_hyper(), tmp_path / "g.safetensors"
    gists = hyper.compress(torch.tensor([[1, 5, 6, *range(50, 50 + G)]]))
    save_gists(path, gists, {"model": "m", "run": "r"})

    def same(loaded):
        return [k.shape for k, _ in loaded.past] == [k.shape for k, _ in gists.past] and loaded.offset.shape == (1,)

    assert fuzz(path, lambda: load_gists(path, {"model": "m", "run": "r"}, hyper.model), same) > TIMES // 4


def test_damaged_arguments_are_one_line_or_values_that_the_command_line_takes(tmp_path):
    args = training.parse(["--task", "p3", "--shots", "4"])[0]
    path = tmp_path / "args.json"
    path.write_text(json.dumps(portable(args)))
    assert fuzz(path, lambda: settle({}, read_args(tmp_path) | {"model": args.model, "data": args.data})) > TIMES // 3


@pytest.mark.parametrize("change", [
    {"gists": -1}, {"gists": 1.5}, {"gists": "16"}, {"gists": True}, {"seed": [1]}, {"lr": "fast"}, {"lr": -1.0}, {"method": "magic"},
    {"gists": None}, {"lr": None}, {"task": None}, {"downstream": False}, {"rank": False}, {"shots": None}, {"quantize": None}, {"task": "nothing"}, {"task": 3}, {"downstream": {}}, {"quantize": 1}, {"unheard": 1}, {"steps": 10**12}, {"alpha": float("inf")},
], ids=str)  # fmt: skip
def test_arguments_edited_by_hand_are_held_to_the_rules_of_the_command_line(tmp_path, change):
    args = training.parse(["--task", "p3"])[0]
    (tmp_path / "args.json").write_text(json.dumps(portable(args) | change))
    with pytest.raises(InputError, match="args.json: ") as refused:
        settle({}, read_args(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_damaged_state_is_one_line_or_has_its_shapes(tmp_path):
    args = argparse.Namespace(seed=0, steps=2, accumulate=1, batch_size=1, lr=1e-3, gist_lr=1e-3, save_every=1, optimizer="adamw", distill=0.0, weight_by_context=False)
    batch = collate([[1, 5, 6, 50, 51, 52]], [0], [[1, 7]], [[8, 9, 2]])
    hyper = random_hyper()
    training.train(hyper, lambda seed, numbers: batch, args, tmp_path, False, rank=0, world=1)
    optimizers = training.make_optimizers(hyper, args)

    def read():
        assert training.load_state(tmp_path, hyper, optimizers, args.steps) == 2
        return all(p.isfinite().all() for p in trainable(hyper).values())

    assert fuzz(tmp_path / "state.safetensors", read, bool) > TIMES // 5


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": 10**9}, {"hidden_size": 10**8}, {"vocab_size": 10**12}, {"rms_norm_eps": 1e400}, {"num_attention_heads": 0},
    {"intermediate_size": "40"}, {"rope_theta": "1e4"}, {"head_dim": 10**9},
], ids=str)  # fmt: skip
def test_a_config_that_its_files_cannot_hold_is_refused_at_once(tmp_path, change):
    folder = write_hf(tmp_path, random_llama(), **change)
    with pytest.raises(InputError, match="config") as refused:
        load(folder)
    assert "\n" not in str(refused.value)
