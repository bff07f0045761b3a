"""Packing examples into rows of tokens, batches."""

import itertools
import random
from types import SimpleNamespace

import pytest
from conftest import ROOT

from data import PLAIN, Episode, EpisodeBatches, Example, Formatter, report
from further import among
from gist import one_context
from llama import InputError
from tasks.p3 import Prompt, Split, p3_tasks
from tasks.sni import LAYOUT as SNI_LAYOUT
from tasks.sni import sni_tasks
from tiny.make import write_jsonl

# ----------------------------------------------------------------------------------- rows of tokens


def examples(*lengths: int) -> list[Example]:
    return [Example("dog " * n, f"label{i}") for i, n in enumerate(lengths)]


def test_examples_that_do_not_fit_are_left_out_whole(tokenizer):
    formatter = Formatter(tokenizer, 60, 30)
    (context,) = one_context(formatter, Episode([], examples(3, 50, 2, 40), PLAIN), [-1, -2])
    tokens = context.tokens
    assert tokens[0] == tokenizer.bos and tokens[-2:] == [-1, -2] and len(tokens) <= 60
    text = tokenizer.decode(tokens[1:-2])
    assert text == "\nInput:\ndog dog dog \nOutput:\nlabel0\nInput:\ndog dog \nOutput:\nlabel2"
    assert report(formatter.left_out) == "2 of 4 examples left out, because the context was full"


def test_examples_fill_the_budget_beside_what_is_reserved_and_no_more(tokenizer):
    episode = Episode([], examples(3, 3, 3), PLAIN)
    lengths = [len(tokens) for tokens in Formatter(tokenizer, 200, 30).context_parts(episode)[1]]
    full = 1 + sum(lengths) + 2
    for budget, count in ((full, 3), (full - 1, 2)):
        start, read = Formatter(tokenizer, budget, 30).context_parts(episode, reserved=2)
        assert (start, len(read)) == ([tokenizer.bos], count)
        assert Formatter(tokenizer, 500, 30).context_parts(episode, budget, 2) == (start, read)


def test_gists_stand_in_equal_parts_after_every_so_many_of_the_examples_that_are_read(tokenizer):
    gist_ids = list(range(2000, 2016))

    def runs(shots: int, every: int, gists: int, context: int = 400) -> list[int]:
        """Lengths of the runs of gists among the examples."""
        contexts = among.compression(SimpleNamespace(gists_every=every)).contexts
        formatter = Formatter(tokenizer, context, 30)
        (row,) = contexts(formatter, Episode([], examples(*[1] * shots)), gist_ids[:gists])
        assert [row.tokens[i] for i in row.kept] == gist_ids[:gists]
        assert row.kept == [i for i, token in enumerate(row.tokens) if token >= 2000]
        assert row.positions == list(range(gists - len(row.tokens), gists)) and len(row.tokens) <= context
        assert row.tokens[-1] == gist_ids[gists - 1]
        assert bool(formatter.left_out["shots left out"]) == (context < 400)
        stands = itertools.groupby(row.tokens, lambda token: token >= 2000)
        return [len(list(run)) for is_gist, run in stands if is_gist]

    assert runs(6, 2, 8) == [2, 3, 3] and runs(6, 4, 8) == [4, 4] and runs(4, 1, 8) == [2, 2, 2, 2]
    assert runs(3, 3, 8) == runs(3, 5, 8) == [8]
    assert runs(16, 4, 16) == runs(15, 4, 16) == [4, 4, 4, 4], "the last part after what is left"
    assert runs(4, 1, 8, context=30) == [8], "one example fits, and gets all gists"
    assert runs(4, 1, 8, context=9) == [8], "no example fits"
    assert among.compression(SimpleNamespace(gists_every=0)) is None
    among.check(SimpleNamespace(gists_every=16, shots=16, task="p3"))  # all of them: not refused


def test_a_long_query_keeps_its_end(tokenizer):
    formatter = Formatter(tokenizer, 60, 30)
    long = Example("cat " + "dog " * 100 + "fox", "yes")
    prompt = formatter.query(Episode([long], [], PLAIN), long, 28)
    text = tokenizer.decode(prompt[1:])
    assert text.startswith("\nInput:\n") and text.endswith("fox\nOutput:\n") and "cat" not in text
    assert len(prompt) == 28
    message = "1 of 1 queries cut at the beginning, because they were too long"
    assert report(formatter.left_out) == message


def test_a_long_definition_leaves_room_for_the_query(tokenizer):
    query = Example("dog cat", "fox")
    episode = Episode([query], [], SNI_LAYOUT, "owl " + "dog " * 500)
    formatter = Formatter(tokenizer, 100, 160)
    prompt = formatter.query(episode, query, 150, "inside")
    assert len(prompt) <= 150 and tokenizer.decode(prompt[1:]).endswith("Input: dog cat\nOutput:")
    (context,) = one_context(formatter, episode, [-1, -2])
    assert len(context.tokens) <= 100
    for tokens in (prompt, context.tokens[:-2]):
        assert "owl dog dog" in tokenizer.decode(tokens), "an instruction keeps its beginning"
    message = "2 of 2 instructions cut at the end, because they were too long"
    assert report(formatter.left_out) == message
    before = formatter.query(episode, query, 150, "before")
    assert len(before) - len(formatter.query(episode, query, 150)) == 50, "as much as a hypernetwork reads"


def test_a_task_without_a_definition_has_none_of_its_layout(tokenizer):
    query = Example("dog cat", "fox")
    episode = Episode([query], [query], SNI_LAYOUT)
    formatter = Formatter(tokenizer, 100, 60)
    for tokens in (formatter.query(episode, query, 50, "inside"), formatter.context_tokens(episode)):
        assert "Definition" not in tokenizer.decode(tokens) and "dog cat" in tokenizer.decode(tokens)


def test_an_instruction_takes_nothing_of_a_context_that_is_full(tokenizer):
    episode = Episode([], [Example("dog", "fox")], SNI_LAYOUT, "owl " + "dog " * 50)
    assert Formatter(tokenizer, 100, 60).context_tokens(episode, -2) == [tokenizer.bos]


def test_a_query_whose_layout_has_no_room_is_refused(tokenizer):
    query = Example("dog", "fox")
    episode = Episode([query], [], PLAIN)
    formatter = Formatter(tokenizer, 60, 30)
    bare = formatter.query(episode, Example("", "fox"), 30)
    assert formatter.query(episode, query, len(bare)) == bare, "of its input, nothing is left"
    with pytest.raises(InputError, match=f"--query-length 30: a query's layout takes {len(bare)} tokens"):
        formatter.query(episode, query, len(bare) - 1)


# ------------------------------------------------------------------------------------------ batches


def tiny_batches(tokenizer, tasks=None) -> EpisodeBatches:
    tasks = tasks or p3_tasks(ROOT / "tiny" / "P3", "train")[:6]
    return EpisodeBatches(tasks, Formatter(tokenizer, 400, 100), "hyper", 5, [2000, 2001])


def one_task(folder) -> list[Prompt]:
    return [Prompt("t", "t", Split(folder, "train"))]


def row_of(batch, n: int) -> list[list[int]]:
    """What is compressed of a sample, its queries, where tokens stand, what is kept of them; the targets."""
    (rows,) = batch.context
    queries = batch.tokens[batch.row == n]
    of_row = batch.row[batch.select // batch.tokens.shape[1]] == n
    tokens = [[token for token in row.tolist() if token] for row in (rows.tokens[n], *queries)]
    positions = rows.positions[n, : len(tokens[0])].tolist()
    return [*tokens, positions, rows.kept[n].tolist(), batch.targets[of_row].tolist()]


def test_a_row_depends_on_the_seed_and_its_number_alone(tokenizer):
    """Not on rows that were read before, or beside it, nor on the number of processes."""
    whole, *halves = (tiny_batches(tokenizer) for _ in range(3))
    both = whole(0, range(4))
    parts = [half(0, range(rank, 4, 2)) for rank, half in enumerate(halves)]
    assert whole.formatter.left_out == halves[0].formatter.left_out + halves[1].formatter.left_out
    assert both.read == sum(part.read for part in parts)
    rows = [row_of(both, number) for number in range(4)]
    assert rows == [row_of(parts[number % 2], number // 2) for number in range(4)]
    assert rows[3] == row_of(whole(0, [3]), 0) != row_of(whole(1, [3]), 0) and rows[3] != rows[2]


def test_a_definition_stands_in_a_training_row_where_its_method_reads_it(tokenizer):
    task = sni_tasks(ROOT / "tiny" / "natural-instructions", "train")[0]
    definition = task.draw(random.Random(0), 2, 1).instruction
    for method, instruct, in_context, in_query, queries in (
        ("zeroshot", "no", 0, 1, 1),
        ("fewshot", "no", 0, 1, 1),
        ("hyper", "no", 1, 0, 4),
        ("hyper", "inside", 1, 1, 4),
    ):
        batches = EpisodeBatches([task], Formatter(tokenizer, 400, 200), method, 2, [2000], instruct=instruct)
        sample = batches.sample(random.Random(0))
        context = [tokenizer.decode(row.tokens).count(definition) for row in sample.context or ()]
        assert sum(context) == in_context and len(sample.queries) == queries
        inputs = 3 if method == "fewshot" else 1
        for prompt, _ in sample.queries:
            text = tokenizer.decode(prompt)
            assert (text.count(definition), text.count("Input:")) == (in_query, inputs)


def test_a_target_may_end_as_an_example_in_a_row_does(tokenizer):
    """A base that never saw EOS after an answer then has nothing new to learn."""
    rows = [Example(f"x{i}", "kilo", ("kilo", "jade")) for i in range(3)]
    episode = Episode(rows[:1], rows[1:])
    ended = Formatter(tokenizer, 200, 60, end="layout").training_target(episode, "kilo")
    assert tokenizer.decode(ended) == "kilo\nInput:\n" and tokenizer.eos not in ended
    assert Formatter(tokenizer, 200, 60).training_target(episode, "kilo")[-1] == tokenizer.eos


def test_a_target_longer_than_the_budget_is_left_out(tokenizer, tmp_path):
    long = " ".join(["word"] * 200)
    write_jsonl(tmp_path / "train.jsonl", [(f"q{i}", long if i % 2 else "yes", []) for i in range(40)])
    batches = tiny_batches(tokenizer, tasks=one_task(tmp_path))
    for step in range(10):
        batch = batches(0, range(step, step + 3))
        assert batch.tokens.shape[1] <= 100
    left_out = batches.formatter.left_out
    assert "training targets left out" in report(left_out)
    assert 0 < left_out["targets left out"] < left_out["targets"]
    write_jsonl(tmp_path / "train.jsonl", [(f"q{i}", long, []) for i in range(40)])
    with pytest.raises(InputError, match="no target fits into 100 tokens"):
        tiny_batches(tokenizer, tasks=one_task(tmp_path))(0, range(3))


def test_a_task_with_too_few_rows_is_refused_at_the_start(tokenizer, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [(f"q{i}", "yes", []) for i in range(3)])
    with pytest.raises(InputError, match="3 rows are too few"):
        tiny_batches(tokenizer, tasks=one_task(tmp_path))
