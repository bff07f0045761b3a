"""Packing examples into rows of tokens, batches."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import ROOT

from data import PLAIN, Episode, EpisodeBatches, Example, Formatter, collate, report
from llama import InputError
from tasks.p3 import Prompt, Split, p3_tasks
from tasks.sni import LAYOUT as SNI_LAYOUT
from tiny.make import write_jsonl

# ----------------------------------------------------------------------------------- rows of tokens


def examples(*lengths):
    return [Example("dog " * n, f"label{i}") for i, n in enumerate(lengths)]


def test_examples_that_do_not_fit_are_left_out_whole(tokenizer):
    formatter = Formatter(tokenizer, context=60, query_length=30)
    row, lead, left_out = formatter.context_row(Episode([], examples(3, 50, 2, 40), PLAIN), [-1, -2])
    text = tokenizer.decode(row[1:-2])
    assert lead == 1 and row[0] == tokenizer.bos and row[-2:] == [-1, -2] and len(row) <= 60
    assert text == "\nInput:\ndog dog dog \nOutput:\nlabel0\nInput:\ndog dog \nOutput:\nlabel2"
    assert report(left_out) == "2 of 4 examples left out, because the context was full"


def test_gists_stand_after_every_so_many_examples(tokenizer):
    gists = list(range(2000, 2008))
    for shots, every, expected in ((6, 2, [3, 3, 2]), (6, 4, [6, 2]), (4, 1, [2, 2, 2, 2]), (3, 3, [8]), (3, 0, [8])):
        row = Formatter(tokenizer, 200, 30, every).context_row(Episode([], examples(*[1] * shots)), gists).tokens
        assert [token for token in row if token >= 2000] == gists and row[-1] == gists[-1]
        runs = [len(list(run)) for is_gist, run in itertools.groupby(row, lambda token: token >= 2000) if is_gist]
        assert runs == expected
    short = Formatter(tokenizer, 30, 30, 1).context_row(Episode([], examples(1, 1, 1, 1)), gists)  # two examples don't fit
    assert len(short.tokens) <= 30 and short.left_out["shots left out"] and [t for t in short.tokens if t >= 2000] == gists


def test_a_long_query_keeps_its_end(tokenizer):
    formatter = Formatter(tokenizer, context=60, query_length=30)
    long = Example("cat " + "dog " * 100 + "fox", "yes")
    prompt = formatter.query(Episode([long], [], PLAIN), long, 28)
    text = tokenizer.decode(prompt.tokens[1:])
    assert text.startswith("\nInput:\n") and text.endswith("fox\nOutput:\n") and "cat" not in text
    assert len(prompt.tokens) == 28
    left_out = Counter()
    left_out += prompt.left_out
    assert report(left_out) == "1 of 1 queries cut at the beginning, because they were too long"


def test_a_long_definition_leaves_room_for_the_query(tokenizer):
    query = Example("dog cat", "fox")
    episode = Episode([query], [], SNI_LAYOUT, "dog " * 500)
    formatter = Formatter(tokenizer, 100, 160)
    prompt = formatter.query(episode, query, 150, "inside")
    assert len(prompt.tokens) <= 150 and tokenizer.decode(prompt.tokens[1:]).endswith("Input: dog cat\nOutput:")
    row = formatter.context_row(episode, [-1, -2])
    assert len(row.tokens) <= 100
    left_out = Counter()
    for part in (prompt, row):
        left_out += part.left_out
    assert report(left_out) == "2 of 2 instructions cut at the end, because they were too long"


# ------------------------------------------------------------------------------------------ batches


def tiny_batches(tokenizer, method="hyper", shots=5, tasks=None):
    tasks = tasks or p3_tasks(ROOT / "tiny" / "P3", "train")[:6]
    return EpisodeBatches(tasks, Formatter(tokenizer, 400, 100), method, [2000, 2001], shots)


def test_a_batch_depends_on_seed_and_numbers_alone(tokenizer):
    one, other = tiny_batches(tokenizer), tiny_batches(tokenizer)
    for step in range(5):
        other(0, range(3 * step, 3 * step + 3))
    (fields, others) = (vars(batches(0, range(21, 24))) for batches in (one, other))
    for name, value in fields.items():
        same = torch.equal(value, others[name]) if torch.is_tensor(value) else value == others[name]
        assert same, name
    assert one(0, range(3)).targets.tolist() != one(0, range(3, 6)).targets.tolist()
    assert one(0, range(3)).targets.tolist() != one(1, range(3)).targets.tolist()


def test_no_row_depends_on_the_number_of_processes(tokenizer):
    batches = tiny_batches(tokenizer)
    both, first, second = batches(0, range(4)), batches(0, range(0, 4, 2)), batches(0, range(1, 4, 2))
    assert sorted(both.targets.tolist()) == sorted(first.targets.tolist() + second.targets.tolist())
    assert both.left_out == first.left_out + second.left_out
    for number, (part, row) in enumerate([(first, 0), (second, 0), (first, 1), (second, 1)]):
        width = min(both.examples.shape[1], part.examples.shape[1])
        assert both.examples[number, :width].tolist() == part.examples[row, :width].tolist()


@pytest.mark.parametrize("method", ["hyper", "fewshot", "zeroshot"])
def test_the_loss_stands_on_target_and_eos_alone(tokenizer, method):
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


def test_the_query_is_never_among_its_own_shots(tokenizer, tmp_path):
    rows = [(f"question {i % 6}", "yes", ["yes", "no"]) for i in range(12)]  # every question twice
    write_jsonl(tmp_path / "train.jsonl", rows)
    batches = tiny_batches(tokenizer, tasks=[Prompt("t", "t", Split(tmp_path, "train"))])
    for step in range(20):
        batch = batches(0, range(step, step + 3))
        for n, b in enumerate(batch.row.tolist()):
            query = tokenizer.decode(batch.tokens[n].tolist()[1:]).split("\n")[2]
            assert query not in tokenizer.decode([t for t in batch.examples[b].tolist()[1:] if t < 2000]).split("\n")


def test_a_target_longer_than_the_budget_is_left_out(tokenizer, tmp_path):
    long = " ".join(["word"] * 200)
    write_jsonl(tmp_path / "train.jsonl", [(f"q{i}", long if i % 2 else "yes", []) for i in range(40)])
    batches = tiny_batches(tokenizer, tasks=[Prompt("t", "t", Split(tmp_path, "train"))])
    left_out = Counter()
    for step in range(10):
        batch = batches(0, range(step, step + 3))
        assert batch.tokens.shape[1] <= 100
        left_out += batch.left_out
    assert "training targets left out" in report(left_out) and 0 < left_out["targets left out"] < left_out["targets"]
    write_jsonl(tmp_path / "train.jsonl", [(f"q{i}", long, []) for i in range(40)])
    with pytest.raises(InputError, match="no target fits into 100 tokens"):
        tiny_batches(tokenizer, tasks=[Prompt("t", "t", Split(tmp_path, "train"))])(0, range(3))


def test_a_task_with_too_few_rows_is_refused_at_the_start(tokenizer, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [(f"q{i}", "yes", []) for i in range(3)])
    with pytest.raises(InputError, match="3 training rows are too few for 5 shots"):
        tiny_batches(tokenizer, tasks=[Prompt("t", "t", Split(tmp_path, "train"))])


def test_collating_selects_the_positions_before_targets():
    batch = collate([[1, 2], [3]], [0, 1], [[5, 6], [7]], [[8, 9], [10]])
    assert batch.tokens.tolist() == [[5, 6, 8], [7, 0, 0]]
    assert batch.select.tolist() == [1, 2, 3] and batch.targets.tolist() == [8, 9, 10]
    assert batch.read == 7
