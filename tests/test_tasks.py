"""Tasks on disk: files and their rows, what each task makes of them, prefix tuning, the miniature."""

import gzip
import json
import random
import re
import struct
import sys
from collections import Counter
from itertools import permutations, product
from types import SimpleNamespace

import pytest
import torch
from conftest import FEW_TASKS, REAL_DATA, ROOT, needs_real_data, random_llama, write_parquet

import run
import tasks.prefix
import train as training
from data import Example, Formatter
from further import lm
from gist import Compression, HyperLlama, Rows, keep_all, label_anchors, mean_pooled, read_contexts
from llama import InputError, rotary_angles, rotate
from tasks.hyperpretrain import TextBatches
from tasks.p3 import Prompt, Split, p3_tasks
from tasks.prefix import PrefixBatches, SoftPrefix
from tasks.rows import JsonLines, TFRecords, masked_crc32c
from tasks.sni import sni_tasks
from tasks.symbol import LAYOUTS, draw_symbols, in_test_pool, symbol_tasks, whole_words
from tiny import make, world
from tiny.make import write_jsonl, write_tfrecord

ROWS = [
    ("Is ice cold?", "yes", ["yes", "no"]),
    ("Größe — 大きい?", "\n no ", ["yes", "no"]),
    ("x" * 300, "maybe", ["yes", "no", "maybe"]),
]


def all_of(folder, split="train"):
    return list(Split(folder, split))


# ------------------------------------------------------------------------------------ rows of files


def test_tfrecord_parquet_and_jsonl_hold_the_same_examples(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_tfrecord(tmp_path / "test.tfrecord-00000-of-00001", ROWS)
    assert all_of(tmp_path) == all_of(tmp_path, "test")
    assert all_of(tmp_path)[1] == Example("Größe — 大きい?", "no", ("yes", "no"))
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", ROWS, row_group_size=2)
    assert all_of(tmp_path) == all_of(tmp_path, "validation")


def test_parquet_without_pyarrow_is_refused(tmp_path, monkeypatch):
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="pip install pyarrow"):
        Split(tmp_path, "train")


@needs_real_data
@pytest.mark.parametrize("name", ["copa_C1_or_C2_premise_so_because_", "wsc.fixed_GPT_3_Style"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_real_tfrecords_hold_the_examples_of_their_jsonl(name, split):
    tfrecord, jsonl = (REAL_DATA / folder / f"super_glue_{name}" for folder in ("P3-tfrecord", "P3"))
    assert all_of(tfrecord, split) == all_of(jsonl, split)


@pytest.mark.parametrize("reader, write", [(JsonLines, write_jsonl), (TFRecords, write_tfrecord)])
def test_a_split_over_several_files_is_read_whole_or_not_at_all(tmp_path, reader, write):
    ending = "jsonl" if reader is JsonLines else "tfrecord"
    for shard in (0, 2, 1):
        write(tmp_path / f"train.{ending}-{shard:05}-of-00003", ROWS[shard : shard + 1])
        if shard == 2:
            with pytest.raises(InputError, match="not all of the 3 files of the train split"):
                Split(tmp_path, "train")
    assert [e.target for e in all_of(tmp_path)] == ["yes", "no", "maybe"]
    with pytest.raises(IndexError):
        Split(tmp_path, "train")[3]


def test_the_checksum_is_crc32c():
    rotated = (masked_crc32c(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == 0xE3069283  # the check value of CRC-32C


def test_a_damaged_tfrecord_is_refused(tmp_path):
    path = tmp_path / "train.tfrecord-00000-of-00001"
    write_tfrecord(path, ROWS)
    good = path.read_bytes()
    for damage, message in (
        (good[:-5], "cut off"),
        (good[:5], "cut off"),
        (good[:40] + b"X" + good[41:], "record 1 fails its checksum"),
        (good[:8] + bytes([good[8] ^ 1]) + good[9:], "record 1 fails its checksum"),  # that of the length
        (struct.pack("<Q", 1 << 60) + good[8:], "corrupt"),
    ):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=message):
            all_of(tmp_path)


PAIR = '"inputs_pretokenized": "a", "targets_pretokenized": "b"'


@pytest.mark.parametrize("line, message", [
    ("{broken", "train.jsonl: line 31: not JSON"),
    ("[1]", "train.jsonl: line 31: .*not an object with fields"),
    ('{"inputs_pretokenized": "a"}', "row 31 of train: targets_pretokenized is missing"),
    ('{"inputs_pretokenized": 3, "targets_pretokenized": "b"}', "inputs_pretokenized is missing or not text"),
    (f'{{{PAIR}, "answer_choices": "b"}}', "not a list"),
    (f'{{{PAIR}, "answer_choices": [1]}}', "answer_choices is missing"),
    ('{"inputs_pretokenized": "half \\ud800", "targets_pretokenized": "b"}', "row 31 of train: .*: not text"),
])  # fmt: skip
def test_a_bad_training_row_is_refused_at_the_start(tmp_path, line, message):
    (tmp_path / "task").mkdir()
    write_jsonl(tmp_path / "task" / "train.jsonl", ROWS * 10)
    with open(tmp_path / "task" / "train.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=message):
        p3_tasks(tmp_path, "train")


def test_blank_lines_are_no_rows_and_lines_keep_their_numbers(tmp_path):
    for end in ("", "\n\n"):
        (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  \r\n{"a": 2}\nno' + end)
        rows = JsonLines(tmp_path / "a.jsonl")
        assert len(rows) == 3 and [rows[i]["a"] for i in range(2)] == [1, 2]
    with pytest.raises(InputError, match="a.jsonl: line 5: not JSON"):
        rows[2]


def test_copies_of_a_file_are_not_data(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    for name in ("train.jsonl.bak", "train.jsonl~", "train.jsonl-00000"):
        write_jsonl(tmp_path / name, ROWS)
    assert len(all_of(tmp_path)) == 3


# ------------------------------------------------------------------------------- files found by name


def test_every_file_of_the_folder_is_a_task_with_all_that_a_task_has():
    found = run.plugins("tasks")
    assert found.keys() == {"p3", "sni", "symbol", "hyperpretrain", "prefix", "sample"}
    for task in map(tasks.find, found):
        assert vars(task).keys() >= {"FOLDER", "MODEL", "METRIC", "DEFAULTS", "load"}
        assert task.DEFAULTS.keys() == {"tiny", "large"}


def test_a_file_put_into_the_folder_is_a_task_and_says_only_what_differs(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text('METRIC = "accuracy"\nWITHOUT = ("rank",)\n')
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    toy, defaults = tasks.find("toy"), tasks.find("defaults")
    assert (toy.METRIC, toy.WITHOUT, toy.build, toy.evaluate) == ("accuracy", ("rank",), defaults.build, None)
    assert defaults.WITHOUT != toy.WITHOUT and not hasattr(defaults, "METRIC"), "defaults stay as they are"


def test_the_file_to_copy_reads_tables_of_text_and_label(tmp_path):
    text = "text,label\n" + "".join(f"the {n},{'odd' if n % 2 else 'even'}\n" for n in range(40))
    for name in ("train-a", "test-b"):
        (tmp_path / f"{name}.csv").write_text(text)
    args = SimpleNamespace(data=tmp_path)
    for split, name in (("train", "train-a"), ("test", "test-b")):
        (table,) = tasks.find("sample").load(args, None, split)
        assert table.name == name and table.rows[3] == Example("the 3", "odd", ("even", "odd"))
    for episode in (table.draw(random.Random(0), 4, 2), *table.evaluation(0, 0, 4, 5)):
        assert len(episode.shots) == 4 and 0 < len(episode.queries) <= 5
    (tmp_path / "test-b.csv").write_text("text,label\n" + "a,x\na,x\nb,y\nb,y\n" + "c,x\nd,y\n" * 4)
    (table,) = tasks.find("sample").load(args, None, "test")
    draws = [table.draw(random.Random(seed), 8, 3) for seed in range(40)]
    for episode in (*draws, *table.evaluation(0, 0, 2, 2)):
        asked = {query.input for query in episode.queries}
        assert not asked & {e.input for e in episode.shots}, "real tables hold a row several times"
    for content, message in (
        ("text,kind\na,b\n", "'label' is missing|label is missing"),
        ("text,label\na,b\nc,b\n", "two labels or more"),
        ("text,label\na,b\nc\n", "not a CSV file"),
        ("text,label\na,b\nc,\n", "one in each row"),
    ):
        (tmp_path / "train-a.csv").write_text(content)
        with pytest.raises(InputError, match=message):
            tasks.find("sample").load(args, None, "train")
    with pytest.raises(InputError, match="no CSV files to train on"):
        tasks.find("sample").load(SimpleNamespace(data=ROOT / "tests"), None, "train")


# ----------------------------------------------------------------------------------------------- P3


@needs_real_data
def test_the_real_p3_folder_has_the_held_out_tasks_of_the_paper():
    tasks = p3_tasks(REAL_DATA / "P3", "test")
    groups = ["hellaswag", "super_glue_copa", "super_glue_wsc.fixed", "winogrande"]
    assert [task.group for task in tasks] == groups
    for task in tasks:
        assert len(task.train) >= 100 and task.validation.scorable(len(task.validation) - 1)
    with pytest.raises(InputError, match="no training tasks"):
        p3_tasks(REAL_DATA / "P3", "train")


@pytest.mark.parametrize("row, message", [
    (("a", "b", []), "two or more"), (("a", "b", ["b", "b"]), "two or more"),
    (("a", "b", ["", "b"]), "two or more"), (("a", "b", ["c", "d"]), "not among"),
])  # fmt: skip
def test_a_row_that_cannot_be_scored_is_refused(tmp_path, row, message):
    write_jsonl(tmp_path / "validation.jsonl", [row])
    with pytest.raises(InputError, match=message):
        Split(tmp_path, "validation").scorable(0)


@pytest.mark.parametrize("train, held_out, message", [
    (b"a\nb", b"b", "b is in both lists"), (None, b"b", "train_tasks.txt: is missing"),
    (b"nothing", b"b", "has no folder"), (b"../outside", b"b", "not in its folder"),
    (b"a\xff", b"b", "not UTF-8"),
])  # fmt: skip
def test_tasks_in_both_lists_or_not_in_the_folder_are_refused(tmp_path, train, held_out, message):
    for name in ("data/a", "data/b", "outside"):
        (tmp_path / name).mkdir(parents=True)
        for split in ("train", "validation"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", ROWS)
    (tmp_path / "data" / "splits").mkdir()
    for part, names in (("train", train), ("test", held_out)):
        if names is not None:
            (tmp_path / "data" / "splits" / f"{part}_tasks.txt").write_bytes(names)
    with pytest.raises(InputError, match=message):
        p3_tasks(tmp_path / "data", "train")


def test_a_prompt_without_choices_is_left_out_of_the_evaluation(tmp_path, capsys):
    for name, choices in (("hellaswag_open", []), ("hellaswag_choice", ["yes", "no"])):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", [("a?", "yes", choices)])
    assert [task.name for task in p3_tasks(tmp_path, "test")] == ["hellaswag_choice"]
    assert "hellaswag_open: left out" in capsys.readouterr().err
    write_jsonl(tmp_path / "hellaswag_open" / "validation.jsonl", [])  # empty: refused when it is read
    assert len(p3_tasks(tmp_path, "test")) == 2


def test_the_weight_of_large_tasks_is_capped():
    assert Prompt("many", "many", range(1_000_000)).weight == 30_000


# ------------------------------------------------------------------------ Super-NaturalInstructions


def write_sni(folder, tasks, test=("held",)):
    (folder / "splits" / "default").mkdir(parents=True)
    (folder / "tasks").mkdir()
    train = [name for name in tasks if name not in test]
    (folder / "splits" / "default" / "train_tasks.txt").write_text("\n".join(train))
    (folder / "splits" / "default" / "test_tasks.txt").write_text("\n".join(test))
    for name, task in tasks.items():
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(task))
    return folder


NEW = {
    "Categories": ["Counting"],
    "Definition": ["Count the words"],
    "Positive Examples": [
        {"input": "a b", "output": "2", "explanation": ""},
        {"input": "c!", "output": "1", "explanation": ""},
    ],
    "Instances": [
        {"id": "1", "input": "x y z", "output": ["3", "three"]},
        {"id": "2", "input": "x?", "output": ["1"]},
    ],
}

OLD = {
    "Definition": "Count the words.",
    "Positive Examples": [{"input": "a b", "output": "2"}],
    "Instances": [{"input": "x y z", "output": "3"}],
}


def test_old_and_new_files_of_sni_are_read_alike(tmp_path):
    folder = write_sni(tmp_path, {"new": NEW, "old": OLD, "held": NEW})
    new, old = sni_tasks(folder, "train")
    assert new.definition == old.definition == "Count the words."
    assert [e.input for e in new.examples] == ["a b.", "c!"] and new.group == "Counting"
    assert new.instances[0].references == ("3", "three") and old.instances[0].references == ("3",)
    assert new.instances[0].input == old.instances[0].input == "x y z." and new.instances[1].input == "x?"
    drawn = {new.draw(random.Random(i), 2, 2).queries[j].target for i in range(20) for j in range(2)}
    assert drawn == {"3", "three", "1"}, "every reference can be the label"


def test_missing_task_files_are_counted(tmp_path, capsys):
    folder = write_sni(tmp_path, {"new": NEW, "held": NEW})
    with open(folder / "splits" / "default" / "train_tasks.txt", "a") as file:
        file.write("\ngone1\ngone2\n")
    assert [task.name for task in sni_tasks(folder, "train")] == ["new"]
    assert "2 of 3 train tasks have no file" in capsys.readouterr().err
    (folder / "tasks" / "held.json").unlink()
    with pytest.raises(InputError, match="none of the 1 tasks"):
        sni_tasks(folder, "test")


@pytest.mark.parametrize("change, message", [
    ({"Definition": None}, "Definition"), ({"Instances": []}, "no instances"),
    ({"Instances": 3}, "not a task file .*'int'"),
    ({"Instances": [{"input": "a", "output": []}]}, "instance 1"),
    ({"Positive Examples": [{"input": "a"}]}, "'output' is missing"),
    ({"Instances": [{"input": "a", "output": [5]}]}, "instance 1"),
])  # fmt: skip
def test_a_bad_sni_file_is_refused(tmp_path, change, message):
    folder = write_sni(tmp_path, {"new": {**NEW, **change}, "held": NEW})
    with pytest.raises(InputError, match=message):
        sni_tasks(folder, "train")


@needs_real_data
def test_real_sni_files_load(capsys):
    train, test = (sni_tasks(REAL_DATA / "natural-instructions", split) for split in ("train", "test"))
    assert len(train) + len(test) == 35 and "have no file" in capsys.readouterr().err
    for task in train + test:
        assert task.definition and len(task.examples) >= 2 and 0 < len(task.instances) <= 100
        assert all(example.references for example in task.instances)
    assert max(len(example.references) for task in train + test for example in task.instances) > 1


def test_the_prompt_of_sni_is_that_of_tk_instruct(tokenizer):
    task = sni_tasks(ROOT / "tiny" / "natural-instructions", "train")[0]
    episode = task.draw(random.Random(0), 2, 1)
    formatter, query = Formatter(tokenizer, 400, 100), episode.queries[0]
    row = formatter.context_tokens(episode)
    start, shots = formatter.context_parts(episode)
    prompt = formatter.query(episode, query, 90, "continues")
    text = tokenizer.decode(row[1:] + prompt + formatter.target(episode, query.target))
    (a, b), x = task.examples, query.input
    expected = (
        f"Definition: {task.definition}\n\n Positive Example 1 -\nInput: {a.input}\n Output: {a.target}\n\n"
        f" Positive Example 2 -\nInput: {b.input}\n Output: {b.target}\n\n"
        f"Now complete the following example -\nInput: {x}\nOutput: {query.target}"
    )
    assert text == expected
    assert row == sum(shots, start) and len(shots) == 2
    assert tokenizer.decode(start[1:]) == f"Definition: {task.definition}\n\n"
    for instruct in ("inside", "before"):
        assert formatter.query(episode, query, 90, instruct) == [*start, *prompt]


# ------------------------------------------------------------------------------------ symbol tuning

WORDS = "apple river stone cloud music paper light table horse green winter market".split()


@pytest.mark.parametrize("test", [False, True])
def test_symbols_differ_and_come_from_their_pool(test):
    kinds = set()
    for seed in range(500):
        symbols = draw_symbols(random.Random(seed), 2 + seed % 2, WORDS * 4 + [w[::-1] for w in WORDS], test)
        assert all(in_test_pool(symbol) == test for symbol in symbols)
        assert len(set(symbols)) == len(symbols)
        assert not any(a != b and a.startswith(b) for a in symbols for b in symbols)
        kinds |= {"digit" if s.isdigit() else "word" if s in WORDS else "letters" for s in symbols}
        assert not test or not any(symbol.isdigit() and len(symbol) > 4 for symbol in symbols)
    assert kinds == {"digit", "word", "letters"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_of_a_symbol_prompt_are_consistent(split):
    layouts = set()
    for task in symbol_tasks(ROOT / "tiny" / "symbol", split, WORDS):
        label_of = {text: label for label, texts in task.classes.items() for text in texts}
        for seed in range(20):
            if split == "train":
                episodes = [task.draw(random.Random(seed), 4, 4)]
                assert 2 * len(task.classes) <= len(episodes[0].shots) <= 10 * len(task.classes)
            else:
                episodes = task.evaluation(seed, 0, 4, 5)
                assert len(episodes) == 5 and all(len(e.shots) == 4 * len(task.classes) for e in episodes)
            for episode in episodes:
                named = {(label_of[e.input], e.target) for e in episode.shots + episode.queries}
                symbols = {symbol for _, symbol in named}
                assert len(named) == len(task.classes) == len(symbols), "one symbol for each class"
                assert symbols == set(episode.queries[0].choices)
                assert not {e.input for e in episode.shots} & {e.input for e in episode.queries}
                assert all(in_test_pool(symbol) == (split == "test") for symbol in symbols)
                layouts.add(episode.layout)
    assert len(layouts) == 10


def test_symbol_sets_are_divided_as_in_the_paper(tmp_path):
    held_out = {"tweet_eval-hate", "SUBJ", "raft-overruling"}
    rows = [json.dumps({"text": f"t{i}", "label": i % 2}) for i in range(8)]
    for name in ("sst2", *held_out):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    assert [task.name for task in symbol_tasks(tmp_path, "train", WORDS)] == ["sst2"]
    assert {task.name for task in symbol_tasks(tmp_path, "test", WORDS)} == held_out
    (tmp_path / "sst2.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n')
    with pytest.raises(InputError, match="sst2.jsonl: line 2: label"):
        symbol_tasks(tmp_path, "train", WORDS)
    with pytest.raises(InputError, match="words are too few"):
        for seed in range(20):
            draw_symbols(random.Random(seed), 2, ["one"], False)


# --------------------------------------------------------------------------------------------- text


def text_batches(tokenizer, folder, context=30, query_length=21):
    return TextBatches(folder, Formatter(tokenizer, context, query_length), [2000, 2001])


def test_segments_of_text_are_one_stretch_in_order(tokenizer, tmp_path):
    words = [tokenizer.encode(" " + word)[0] for word in whole_words(tokenizer)[:120]]
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": tokenizer.decode(words)}) + "\n") * 40)
    batches = text_batches(tokenizer, tmp_path)
    batch = batches(0, range(6))
    (rows,) = batch.context
    A = D = (30 - 2 - 1) // 2
    B = C = (21 - 1) // 2
    for n in range(6):
        row = rows.tokens[n].tolist()
        bc = batch.targets.view(6, -1)[n].tolist()
        assert row[0] == tokenizer.bos and row[-2:] == [2000, 2001] and len(row) == 1 + A + D + 2
        window = row[1 : 1 + A] + bc + row[1 + A : 1 + A + D]
        assert len(bc) == B + C and batch.tokens[n].tolist() == [tokenizer.bos] + bc[:-1]
        first = words.index(window[0])
        assert window == words[first : first + len(window)], "A B C D is one stretch of text"
        assert rows.kept[n].tolist() == [len(row) - 2, len(row) - 1], "the gists make the prefix"
        assert rows.positions[n].tolist() == list(range(2 - len(row), 2)), "and stand at 0 and 1"
    assert batches(0, range(6)).targets.equal(batch.targets)
    assert not batches(0, range(6, 12)).targets.equal(batch.targets)


def test_evaluation_text_is_never_trained_on(tokenizer, tmp_path):
    lines = [json.dumps({"text": f"{i} " * 60}) for i in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    batches = text_batches(tokenizer, tmp_path)
    numbers = {}
    for test in (False, True):
        targets = batches(0, range(100), test=test).targets.view(100, -1).tolist()
        numbers[test] = {n for row in targets for n in tokenizer.decode(row).strip().split()[1:-1]}
    assert len(numbers[True]) > 3 and not numbers[True] & numbers[False]


def test_files_are_read_in_order_where_that_is_asked_and_every_row_depends_on_its_number(tokenizer, tmp_path):
    for name, word in (("1.jsonl", "fox"), ("2.jsonl", "owl")):
        (tmp_path / name).write_text((json.dumps({"text": f"{word} " * 80}) + "\n") * 30)
    batches = TextBatches(tmp_path, Formatter(tokenizer, 30, 21), [2000, 2001], in_order=40)
    is_owl = ["owl" in tokenizer.decode(batches(0, [n]).targets.tolist()) for n in range(40)]
    assert is_owl == [False] * 20 + [True] * 20


def test_a_steps_contexts_have_one_length_that_is_drawn_between_the_shortest_and_the_longest(
    tokenizer, tmp_path
):
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "fox owl " * 200}) + "\n") * 40)
    formatter = Formatter(tokenizer, 60, 21)
    batches = TextBatches(tmp_path, formatter, [2000, 2001], rows=4, shortest=21)

    def lengths(numbers, **how) -> list[int]:
        samples = [batches.sample(0, number, how.get("test", False)) for number in numbers]
        assert all(len(query[1]) == 20 for sample in samples for query in sample.queries), "B and C stay"
        return [len(sample.context[0].tokens) for sample in samples]

    drawn = lengths(range(400))
    steps = [set(drawn[start : start + 4]) for start in range(0, 400, 4)]
    assert all(len(step) == 1 for step in steps) and drawn == [*lengths(range(3)), *lengths(range(3, 400))]
    assert {min(drawn), max(drawn)} == {21, 59} and len(set(drawn)) == 20, "A and D are equally long"
    assert set(lengths(range(9), test=True)) == {59}, "evaluation reads the longest"


def test_a_step_draws_how_many_of_the_gists_it_has(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "fox owl " * 200}) + "\n") * 40)
    gist_ids = list(range(2000, 2008))
    batches = TextBatches(tmp_path, Formatter(tokenizer, 60, 21), gist_ids, rows=4, fewest=2)

    def gists(number: int, test: bool = False) -> tuple[int, ...]:
        (context,) = batches.sample(0, number, test).context
        return tuple(context.tokens[i] for i in context.kept)

    drawn = [gists(number) for number in range(800)]
    assert all(len(set(drawn[start : start + 4])) == 1 for start in range(0, 800, 4)), "equal in a step"
    assert set(drawn) == {tuple(gist_ids[:n]) for n in range(2, 9)}, "the first of them, and two at least"
    few = sum(len(kept) < 4 for kept in drawn)
    assert 0.35 < few / 800 < 0.6, "2 and 3 as often as 4 to 8"
    assert {gists(number, test=True) for number in range(9)} == {tuple(gist_ids)}, "evaluation has all"


@pytest.mark.parametrize("way", ["gists_every", "gists_spread", "anchors"])
def test_text_is_compressed_in_stretches_where_tasks_have_examples(tokenizer, tmp_path, way):
    """Another place for the prefix changes neither A B C D nor what language modelling reads of them."""
    lines = [
        json.dumps({"text": "".join(f" {word}" for word in whole_words(tokenizer)[n : n + 90])})
        for n in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    formatter = Formatter(tokenizer, 73, 21)  # 4 gists, BOS, and 68 tokens in sixteen stretches of 4 or 5
    args = run.all_options()(task="hyperpretrain", **{way: 4})
    V = 2000
    plain, other = (
        TextBatches(tmp_path, formatter, range(V, V + 4), compression)(0, range(3))
        for compression in (Compression(), run.compression_of(args))
    )
    assert other.targets.equal(plain.targets) and other.tokens.equal(plain.tokens)
    assert lm.whole_text(other, V).targets.equal(lm.whole_text(plain, V).targets)
    (rows,) = other.context
    ends = [0, *(68 * n // 16 for n in range(1, 17))]  # of BOS, and of each stretch
    expected = {
        "gists_every": [17 * n + n for n in (1, 2, 3, 4)],  # a gist after each fourth stretch
        "gists_spread": [69, 70, 71, 72],
        "anchors": ends,
    }[way]
    assert rows.kept.tolist() == [expected] * 3
    assert int(rows.offset[0]) == len(expected)


def pairs_in(text: str) -> list[tuple[set[str], str]]:
    """What a text of questions and answers holds: the words of each question, and its answer."""
    for layout in LAYOUTS:
        head, tail = re.escape(layout.head.strip("\n")), re.escape(layout.tail)
        rows = re.findall(f"{head} (.+){tail} (.+)", text)
        if len(rows) > 2:
            break
    else:
        lines = [line for line in text.split("\n") if line not in ("", "Input:", "Output:", "A:", "She:")]
        rows = list(zip(lines[::2], lines[1::2]))
    return [(set(re.findall(r"\w+", asked)), answer) for asked, answer in rows]


def agrees(pairs: list[tuple[set[str], str]], groups: list[list[str]], labels: list[str]) -> bool:
    """Whether each question has words of one group alone, and the answer is that group's label."""
    return all(
        [bool(asked & set(group)) for group in groups] == [answer == label for label in labels]
        for asked, answer in pairs
    )


def test_no_text_goes_together_as_a_held_out_task_does():
    """No grouping of P3 with its labels, no definition of S-NI, no topics of a set to classify."""
    _, p3 = world.p3(random.Random("p3 0"))
    held_out = product(world.PICKS, (form for form in world.FORMS if world.FORMS[form]))
    tasks = [world.Instruction(*both, r"\w+", told=True) for both in held_out if world.is_held_out(*both)]
    definitions = re.compile("|".join(task.definition.replace(".", r"\.") for task in tasks))
    seen = Counter()
    for path in sorted((ROOT / "tiny" / "text").glob("*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            text = json.loads(line)["text"]
            seen["told"] += text.startswith("Definition: ")
            assert not definitions.search(text)
            pairs = pairs_in(text)
            answers = sorted({answer for _, answer in pairs})
            for task in p3.values():
                if answers == sorted(task.groups):
                    seen["labels"] += 1
                    assert not agrees(pairs, list(task.groups.values()), list(task.groups)), (path, text)
            for names in world.TOPICS:
                if len(answers) == len(names) and len(pairs) > 5:
                    topics = [world.KINDS[name] for name in names]
                    if any(agrees(pairs, topics, list(labels)) for labels in permutations(answers)):
                        seen["topics"] += 1
                        assert names not in world.HELDOUT_TOPICS, (path, text)
    assert min(seen["told"], seen["topics"]) > 400 and seen["labels"] > 3, seen


def test_a_gz_that_unpacks_without_end_is_refused(tokenizer, tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"a" * (80 << 20)))
    with pytest.raises(InputError, match="hundred times its size"):
        text_batches(tokenizer, tmp_path)


def test_packed_text_equals_plain_text(tokenizer, tmp_path):
    source = gzip.decompress((ROOT / "tiny" / "text" / "2-stories.jsonl.gz").read_bytes())
    for name, content in (("plain/a.jsonl", source), ("packed/a.jsonl.gz", gzip.compress(source))):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    plain, packed = (text_batches(tokenizer, tmp_path / name)(3, range(4)) for name in ("plain", "packed"))
    assert plain.targets.equal(packed.targets) and plain.context[0].tokens.equal(packed.context[0].tokens)
    (tmp_path / "packed" / "a.jsonl.gz").write_bytes(gzip.compress(source)[:-5000])
    with pytest.raises(InputError, match="can't be unpacked"):
        text_batches(tokenizer, tmp_path / "packed")


def test_short_texts_are_joined_and_bad_lines_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "dog"}\n' * 400)
    assert len(text_batches(tokenizer, tmp_path)(0, range(2)).targets) == 40
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 400)
    text_batches(tokenizer, tmp_path)(0, range(2))  # empty texts still have their ends
    for content, message in (
        ('{"txt": "a"}\n' * 40, "text is missing"),
        ("no\n" * 40, "line 1: not JSON"),
        ("", "is empty"),
        ("\n \n\n" * 9, "is empty"),
    ):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(InputError, match=message):
            text_batches(tokenizer, tmp_path)(0, range(2))
    with pytest.raises(InputError, match="no .jsonl"):
        text_batches(tokenizer, ROOT / "tests")


@needs_real_data
def test_real_text_is_read(tokenizer):
    batch = text_batches(tokenizer, REAL_DATA / "text", 256, 129)(0, range(8))
    assert len(batch.context[0].tokens) == 8 and len(batch.targets) == 8 * 128


# ------------------------------------------------------------------------------------ prefix tuning


P = 5  # length of the prefixes


def soft(kind, kv_heads=2, tasks=("a", "b")):
    return SoftPrefix(random_llama(kv_heads), tasks, P, kind, torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("init", ["anchors", "pooled"])
def test_a_prefix_starts_from_the_keys_and_values_of_its_tasks_own_examples(init):
    args, *_ = training.parse(["--task", "prefix", "--init", init])
    a_run = run.open_run(args)
    held_out = tasks.prefix.batches(a_run).tasks
    hyper = HyperLlama(a_run.hyper.model, torch.zeros(1, 128), None)
    for t, task in enumerate(held_out[:3]):
        (episode,) = task.evaluation(0, 0, 16, 1)
        prefix = tasks.prefix.prefix_of(a_run, t)
        assert prefix.offset.tolist() == [16]
        if init == "anchors":  # without BOS, and so a position earlier
            expected = hyper.compress(Rows.of([label_anchors(a_run.formatter, episode)])).past
            back = rotary_angles(torch.tensor([[-1]]), hyper.model.config)
            expected = [(rotate(k[:, :, 1:], back), v[:, :, 1:]) for k, v in expected]
        else:
            rows = [keep_all(a_run.formatter.context_tokens(episode))]
            expected = mean_pooled(read_contexts(hyper.model, rows), 16, hyper.model.config).past
        differences = [a - b for ours, theirs in zip(prefix.past, expected) for a, b in zip(ours, theirs)]
        noise = torch.stack(differences).std().item()
        assert noise == pytest.approx(tasks.prefix.NOISE, rel=0.1) if init == "pooled" else noise < 1e-5


def test_a_folded_reparametrisation_equals_its_mlp():
    mlp, flat = soft("reparam"), soft("flat")
    for task in range(2):
        hidden = torch.tanh(mlp.table[task] @ mlp.first[task])
        out = (hidden @ mlp.second[task]).view(P, 3, 2, 2, 8)  # slots, layers, key and value, KV heads, hd
        for layer, (k, v) in enumerate(mlp.past()):
            torch.testing.assert_close(k[task], out[:, layer, 0].transpose(0, 1))
            torch.testing.assert_close(v[task], out[:, layer, 1].transpose(0, 1))
    flat.start_from(mlp.prefix())
    for a, b in zip(flat.past(), mlp.past(), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_propagated_slots_equal_slots_in_the_row():
    """Read alone as a prefix, or in one row with the query, where vectors are added to the first P places."""
    prefix = soft("propagate")
    prefix.table.data.normal_(generator=torch.Generator().manual_seed(1))
    query = torch.tensor([[1, 7, 9], [1, 8, 20]])
    after, _ = prefix.model(query, **prefix.prefix().as_past(3))
    row = torch.cat((torch.zeros(2, P, 32), prefix.model.embed_tokens(query)), dim=1)
    for layer, vectors in zip(prefix.model.layers, prefix.table):
        padded = torch.cat((vectors, torch.zeros(2, 3, 32)), dim=1)
        layer.register_forward_pre_hook(lambda _, inputs, padded=padded: (inputs[0] + padded, *inputs[1:]))
    by_hooks, _ = prefix.model(row)
    torch.testing.assert_close(after, by_hooks[:, P:], atol=1e-5, rtol=1e-5)


def test_propagation_needs_half_of_the_parameters():
    flat, propagate = (run.trainable(soft(kind, kv_heads=4)).values() for kind in ("flat", "propagate"))
    assert 2 * sum(p.numel() for p in propagate) == sum(p.numel() for p in flat)


@pytest.mark.parametrize("kind", ["flat", "reparam", "propagate"])
def test_each_query_of_a_batch_follows_the_prefix_of_its_own_task(kind, tokenizer):
    held_out = p3_tasks(FEW_TASKS, "test")
    names = [task.name for task in held_out]
    batch = PrefixBatches(held_out, Formatter(tokenizer, 60, 60))(0, range(2, 4))
    assert batch.context is None and batch.row.tolist() == list(range(2 * len(names)))
    for n, row in enumerate(batch.tokens.tolist()):
        text = tokenizer.decode(row[1:])
        assert any(example.input in text for example in held_out[n % len(names)].train), "of this task"
    prefix = soft(kind, tasks=names)
    assert prefix.prefix().offset.tolist() == [P] * len(names), "where gists stand"
    batch.tokens %= prefix.model.config.vocab  # (the small model's)
    logits, gists = prefix(batch)
    T = batch.tokens.shape[1]
    for n, row in enumerate(batch.tokens):
        alone, _ = prefix.model(row[None], **gists[torch.tensor([n % len(names)])].as_past(T))
        mine = batch.select // T == n
        torch.testing.assert_close(logits[mine], alone[0][batch.select[mine] % T], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ the miniature


def test_no_label_of_the_miniature_is_in_training_and_held_out_tasks():
    labels = {}
    for split in ("train", "test"):
        tasks = p3_tasks(ROOT / "tiny" / "P3", split)
        labels[split] = {choice for t in tasks for i in range(20) for choice in t.train[i].choices}
        assert len(tasks) == 16 if split == "test" else len(tasks) >= 100
    assert len(labels["train"]) > 20 and len(labels["test"]) > 15
    assert not labels["train"] & labels["test"]


def test_the_miniature_in_git_is_what_its_script_makes(tmp_path, tokenizer):
    make.write_data(tmp_path, seed=0)

    def files(root, folders):
        paths = [path for folder in folders for path in (root / folder).rglob("*") if path.is_file()]
        return {path.relative_to(root): path.read_bytes() for path in paths}

    folders = [path.name for path in tmp_path.iterdir()]
    assert len(folders) >= 4 and files(tmp_path, folders) == files(ROOT / "tiny", folders)


def test_the_miniature_never_trains_on_what_it_holds_out():
    parts = world.sni(random.Random(0))
    train, held_out = ([(task.pick, task.form) for task in part.values()] for part in parts)
    assert not set(train) & set(held_out)
    assert {form for _, form in held_out} <= {form for _, form in train}
    base = [world.random_instruction(random.Random(i), world.LABELS, held_out=False) for i in range(500)]
    assert not {(task.pick, task.form) for task in base} & set(held_out)
    assert not set(world.TRAIN_TOPICS) & set(world.HELDOUT_TOPICS)
