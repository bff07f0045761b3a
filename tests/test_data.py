"""Tasks on disk, drawing and packing examples, batches."""

import struct

import pytest
import torch
from conftest import REAL_DATA, ROOT, needs_real_data
from make import write_jsonl, write_tfrecord

from data import (
    P3_LAYOUT,
    Episode,
    Example,
    Formatter,
    JsonLines,
    P3Task,
    Split,
    TaskBatches,
    TextBatches,
    TFRecords,
    collate,
    draw_symbols,
    in_test_pool,
    masked_crc32c,
    p3_tasks,
    sni_tasks,
    symbol_tasks,
)
from llama import InputError, Tokenizer

ROWS = [
    ("Is ice cold?", "yes", ["yes", "no"]),
    ("Größe — 大きい?", "\n no ", ["yes", "no"]),
    ("x" * 300, "maybe", ["yes", "no", "maybe"]),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ROOT / "tiny" / "llama")


def all_of(folder, split="train"):
    rows = Split(folder, split)
    return [rows[i] for i in range(len(rows))]


# ------------------------------------------------------------------------------------------ formats


def test_tfrecord_and_jsonl_hold_other_examples(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "a" / "train.jsonl", ROWS)
    write_tfrecord(tmp_path / "b" / "train.tfrecord-00000-of-00001", ROWS)
    assert all_of(tmp_path / "a") == all_of(tmp_path / "b")
    assert all_of(tmp_path / "a")[1] == Example("Größe — 大きい?", "no", ("yes", "no"))


def test_parquet_and_jsonl_hold_other_examples(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    fields = ("inputs_pretokenized", "targets_pretokenized", "answer_choices")
    table = pyarrow.Table.from_pylist([dict(zip(fields, row)) for row in ROWS])
    parquet.write_table(table, tmp_path / "validation-00000-of-00001.parquet", row_group_size=2)
    assert all_of(tmp_path) == all_of(tmp_path, "validation")


def test_parquet_without_pyarrow_is_a_traceback(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="pip install pyarrow"):
        Split(tmp_path, "train")


@needs_real_data
@pytest.mark.parametrize("name", ["super_glue_copa_C1_or_C2_premise_so_because_", "super_glue_wsc.fixed_GPT_3_Style"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_real_tfrecords_hold_other_examples_than_their_jsonl(name, split):
    assert all_of(REAL_DATA / "P3-tfrecord" / name, split) == all_of(REAL_DATA / "P3" / name, split)


@needs_real_data
def test_the_real_p3_folder_has_other_held_out_tasks_than_the_paper():
    tasks = p3_tasks(REAL_DATA / "P3", "test")
    assert [task.group for task in tasks] == ["hellaswag", "super_glue_copa", "super_glue_wsc.fixed", "winogrande"]
    for task in tasks:
        assert len(task.train) >= 100 and task.validation.scorable(len(task.validation) - 1)
    with pytest.raises(InputError, match="no training tasks"):
        p3_tasks(REAL_DATA / "P3", "train")


@pytest.mark.parametrize("reader, write", [(JsonLines, write_jsonl), (TFRecords, write_tfrecord)])
def test_a_split_over_several_files_loses_rows(tmp_path, reader, write):
    ending = "jsonl" if reader is JsonLines else "tfrecord"
    for shard in range(3):
        write(tmp_path / f"train.{ending}-{shard:05}-of-00003", ROWS[shard : shard + 1])
    assert [e.target for e in all_of(tmp_path)] == ["yes", "no", "maybe"]
    with pytest.raises(IndexError):
        Split(tmp_path, "train")[3]


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_last_line_of_a_jsonl_file_is_lost(tmp_path, end):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}' + end)
    rows = JsonLines(tmp_path / "x.jsonl")
    assert [rows[i]["a"] for i in range(len(rows))] == [1, 2]


def test_checksum_of_crc32c_is_another_polynomial():
    rotated = (masked_crc32c(b"123456789") - 0xA282EAD8) & 0xFFFFFFFF
    assert (rotated >> 17 | rotated << 15) & 0xFFFFFFFF == 0xE3069283  # the check value of CRC-32C


def test_a_damaged_tfrecord_is_read(tmp_path):
    path = tmp_path / "train.tfrecord-00000-of-00001"
    write_tfrecord(path, ROWS)
    good = path.read_bytes()
    for damage, message in (
        (good[:-5], "cut off"),
        (good[:5], "cut off"),
        (good[:40] + b"X" + good[41:], "checksum"),
        (struct.pack("<Q", 1 << 60) + good[8:], "corrupt"),
    ):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=message):
            all_of(tmp_path)


@pytest.mark.parametrize("line, message", [
    ("{broken", "line 2 is not JSON"),
    ("[1]", "line 2 is not an object"),
    ('{"inputs_pretokenized": "a"}', "row 2 of train: targets_pretokenized is missing"),
    ('{"inputs_pretokenized": 3, "targets_pretokenized": "b"}', "inputs_pretokenized is missing or not text"),
    ('{"inputs_pretokenized": "a", "targets_pretokenized": "b", "answer_choices": "b"}', "not a list"),
    ('{"inputs_pretokenized": "a", "targets_pretokenized": "b", "answer_choices": [1]}', "answer_choices is missing"),
])  # fmt: skip
def test_a_bad_line_is_not_named(tmp_path, line, message):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=message):
        all_of(tmp_path)


@pytest.mark.parametrize("row, message", [
    (("a", "b", []), "two or more"), (("a", "b", ["b", "b"]), "two or more"), (("a", "b", ["", "b"]), "two or more"),
    (("a", "b", ["c", "d"]), "not among"),
])  # fmt: skip
def test_a_row_that_cannot_be_scored_is_scored(tmp_path, row, message):
    write_jsonl(tmp_path / "validation.jsonl", [row])
    with pytest.raises(InputError, match=message):
        Split(tmp_path, "validation").scorable(0)


def test_folders_of_scores_and_story_cloze_are_tasks(tmp_path):
    for name in ("cola_a", "cola_a_score_eval", "story_cloze_2016_x", "anli_r1", "super_glue_wsc.fixed_y"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for split in ("train", "validation"):
            write_jsonl(tmp_path / "data" / name / f"{split}.jsonl", ROWS)
    assert [t.name for t in p3_tasks(tmp_path, "train")] == ["cola_a"]
    assert [t.name for t in p3_tasks(tmp_path, "test")] == ["anli_r1", "super_glue_wsc.fixed_y"]


def test_a_listed_task_escapes_or_is_missing(tmp_path):
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "test_tasks.txt").write_text("")
    for name in ("nothing", "../outside"):
        (tmp_path / "splits" / "train_tasks.txt").write_text(name + "\n")
        with pytest.raises(InputError, match="has no folder|not in its folder"):
            p3_tasks(tmp_path, "train")


def test_a_held_out_task_is_trained_on(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", ROWS)
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "test_tasks.txt").write_text("b\n")
    with pytest.raises(InputError, match="train_tasks.txt: is missing"):
        p3_tasks(tmp_path, "train")
    (tmp_path / "splits" / "train_tasks.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="b is in both lists"):
        p3_tasks(tmp_path, "train")


def test_a_prompt_without_options_stops_the_evaluation_of_all(tmp_path, capsys):
    for name, options in (("hellaswag_open", []), ("hellaswag_choice", ["yes", "no"])):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", [("a?", "yes", options)])
    assert [task.name for task in p3_tasks(tmp_path, "test")] == ["hellaswag_choice"]
    assert "hellaswag_open: left out" in capsys.readouterr().err
    write_jsonl(tmp_path / "hellaswag_open" / "validation.jsonl", [])  # empty: said in one line when it is read
    assert len(p3_tasks(tmp_path, "test")) == 2


# ------------------------------------------------------------------------------- examples and batches


def examples(*lengths):
    return [Example("dog " * n, f"label{i}") for i, n in enumerate(lengths)]


def test_an_example_is_cut_when_the_budget_is_full(tokenizer):
    formatter = Formatter(tokenizer, context=60, downstream=30)
    row, lead = formatter.context_row(Episode([], examples(3, 50, 2, 40), P3_LAYOUT), end=[-1, -2])
    text = tokenizer.decode(row[1:-2])
    assert lead == 1 and row[0] == tokenizer.bos and row[-2:] == [-1, -2] and len(row) <= 60
    assert text == "\nInput:\ndog dog dog \nOutput:\nlabel0\nInput:\ndog dog \nOutput:\nlabel2"
    assert formatter.report() == "2 of 4 examples left out, because the context was full"


def test_a_long_query_loses_its_end(tokenizer):
    formatter = Formatter(tokenizer, context=60, downstream=30)
    long = Example("cat " + "dog " * 100 + "fox", "yes")
    prompt = formatter.query(Episode([long], [], P3_LAYOUT), long, 28, instruct=False)
    text = tokenizer.decode(prompt[1:])
    assert text.startswith("\nInput:\n") and text.endswith("fox\nOutput:\n") and "cat" not in text
    assert len(prompt) == 28
    assert "1 of 1 queries cut" in formatter.report()


ROWS_OF_BATCH = range(3)


def tiny_batches(tokenizer, method="hyper", shots=5, tasks=None):
    tasks = tasks or p3_tasks(ROOT / "tiny" / "P3", "train")[:6]
    return TaskBatches(tasks, Formatter(tokenizer, 400, 100), method, [2000, 2001], shots)


def test_a_batch_depends_on_what_was_asked_before(tokenizer):
    one, other = tiny_batches(tokenizer), tiny_batches(tokenizer)
    for step in range(5):
        other(0, range(3 * step, 3 * step + 3))
    for a, b in zip(vars(one(0, range(21, 24))).values(), vars(other(0, range(21, 24))).values()):
        assert (a is None and b is None) or torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert one(0, range(3)).targets.tolist() != one(0, range(3, 6)).targets.tolist()
    assert one(0, range(3)).targets.tolist() != one(1, range(3)).targets.tolist()


def test_a_row_depends_on_the_number_of_processes(tokenizer):
    batches = tiny_batches(tokenizer)
    both, first, second = batches(0, range(4)), batches(0, range(0, 4, 2)), batches(0, range(1, 4, 2))
    assert sorted(both.targets.tolist()) == sorted(first.targets.tolist() + second.targets.tolist())
    for row, (part, at) in enumerate([(first, 0), (second, 0), (first, 1), (second, 1)]):
        width = min(both.examples.shape[1], part.examples.shape[1])
        assert both.examples[row, :width].tolist() == part.examples[at, :width].tolist()


@pytest.mark.parametrize("method", ["hyper", "fewshot", "zeroshot"])
def test_loss_stands_on_other_tokens_than_target_and_eos(tokenizer, method):
    batch = tiny_batches(tokenizer, method)(0, range(3))
    flat, width = batch.tokens.flatten().tolist(), batch.tokens.shape[1]
    seen = {n: [] for n in range(len(batch.tokens))}
    for position, target in zip(batch.select.tolist(), batch.targets.tolist()):
        seen[position // width].append(target)
        if target != tokenizer.eos:
            assert flat[position + 1] == target  # the token after the position is the target
    for n, target in seen.items():
        assert target[-1] == tokenizer.eos
        row = tokenizer.decode(batch.tokens[n].tolist()[1:])
        assert row.split("\nOutput:\n")[-1].startswith(tokenizer.decode(target[:-1]))
    assert (batch.examples is None) == (method != "hyper")


def test_the_query_is_among_its_own_shots(tokenizer, tmp_path):
    rows = [(f"question {i % 6}", "yes", ["yes", "no"]) for i in range(12)]  # every question twice
    write_jsonl(tmp_path / "train.jsonl", rows)
    batches = tiny_batches(tokenizer, tasks=[P3Task("t", "t", Split(tmp_path, "train"))])
    for step in range(20):
        batch = batches(0, range(step, step + 3))
        for n, b in enumerate(batch.row.tolist()):
            query = tokenizer.decode(batch.tokens[n].tolist()[1:]).split("\n")[2]
            assert query not in tokenizer.decode([t for t in batch.examples[b].tolist()[1:] if t < 2000]).split("\n")


def test_a_task_with_too_few_rows_is_found_after_hours(tokenizer, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(InputError, match="3 training rows are too few for 5 shots"):
        tiny_batches(tokenizer, tasks=[P3Task("t", "t", Split(tmp_path, "train"))])


def test_a_target_longer_than_the_budget_stops_or_hangs_the_run(tokenizer, tmp_path):
    long = " ".join(["word"] * 200)
    write_jsonl(tmp_path / "train.jsonl", [(f"q{i}", long if i % 2 else "yes", []) for i in range(40)])
    batches = tiny_batches(tokenizer, tasks=[P3Task("t", "t", Split(tmp_path, "train"))])
    for step in range(10):
        assert batches(0, range(step, step + 3)).tokens.shape[1] <= 100
    assert "training targets left out" in batches.formatter.report()
    write_jsonl(tmp_path / "train.jsonl", [(f"q{i}", long, []) for i in range(40)])
    with pytest.raises(InputError, match="no target fits"):
        tiny_batches(tokenizer, tasks=[P3Task("t", "t", Split(tmp_path, "train"))])(0, range(3))


def test_large_tasks_are_not_capped():
    assert P3Task("many", "many", range(1_000_000)).weight == 30_000


def test_collating_loses_its_place():
    batch = collate([[1, 2], [3]], [0, 1], [[5, 6], [7]], [[8, 9], [10]])
    assert batch.tokens.tolist() == [[5, 6, 8], [7, 0, 0]]
    assert batch.select.tolist() == [1, 2, 3] and batch.targets.tolist() == [8, 9, 10]
    assert batch.read == 7


def test_the_miniature_shares_labels_between_training_and_held_out_tasks():
    labels = {}
    for split in ("train", "test"):
        labels[split] = set()
        for task in p3_tasks(ROOT / "tiny" / "P3", split):
            labels[split] |= {option for i in range(20) for option in task.train[i].options}
    assert len(labels["train"]) > 20 and len(labels["test"]) > 15
    assert not labels["train"] & labels["test"]
    assert len(p3_tasks(ROOT / "tiny" / "P3", "train")) >= 24 and len(p3_tasks(ROOT / "tiny" / "P3", "test")) == 8


def test_the_miniature_in_git_is_not_what_its_script_makes(tmp_path):
    from make import write_p3

    write_p3(tmp_path, seed=0)
    made = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    kept = ROOT / "tiny" / "P3"
    assert made == {p.relative_to(kept): p.read_bytes() for p in kept.rglob("*") if p.is_file()}
