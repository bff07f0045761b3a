"""ROUGE-L, columns, scores and their keys, averages, options."""

import contextlib
import fcntl
import json
import os
import shutil
import statistics
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import REAL_DATA, ROOT, G, needs_real_data

import eval as evaluation
import tasks
import train as training
from data import Episode, Example
from eval import HeldOut, average, draw_held_out, parse, take_folder
from gist import nothing
from llama import InputError, load
from run import MARK, Options, Run, all_options, default_folder, names_of, open_run, print_lines
from run import release_folders, resolve_args, trainable
from tasks.p3 import Prompt, Split, p3_tasks
from tasks.sni import rouge_l, sni_tasks
from tasks.symbol import symbol_tasks
from tiny.make import write_jsonl

# --------------------------------------------------------------------------------------- the result


def held_out(tasks, sizes):
    """Tasks with so many queries each."""
    episodes = [[[Episode([Example("x", "y")] * size, [])] for size in sizes]]
    return HeldOut(tasks, episodes, Counter(), [{"hyper": 0.0, "fewshot": 0.0}] * len(sizes))


def test_datasets_with_many_prompts_weigh_the_same():
    tasks = [Prompt(name, name[0], None) for name in ("a1", "a2", "a3", "b")]
    scores = [[10.0, 10.0], [20.0, 40.0], [20.0, 20.0], [60.0, 60.0]]
    assert average(Run(Options(task="p3"), None, None), held_out(tasks, [1, 1, 1, 1]), scores) == 40.0
    assert average(Run(Options(task="sni"), None, None), held_out(tasks, [1, 1, 1, 7]), scores) == 48.0, (
        "mean over instances"
    )


def tiny_run(*options, task="p3"):
    args, *_ = training.parse(["--task", task, "--gists", str(G), *map(str, options)])
    return open_run(args)


FEW = ["--shots", 4, "--limit", 2, "--sets", 1]


def few_tasks(count=2):
    return p3_tasks(ROOT / "tiny" / "P3", "test")[:count]


def draw(run, tasks):
    """Episodes of these tasks, whatever the run's data holds out."""
    with mock.patch.object(run.task, "load", lambda *_: tasks):
        return draw_held_out(run)


def evaluate(run, tasks):
    results, lines = evaluation.evaluate(run, draw(run, tasks))
    print_lines(lines)
    return results


def test_order_of_tasks_and_batch_size_change_no_result(capsys):
    one = evaluate(tiny_run(*FEW), few_tasks(3))
    other = evaluate(tiny_run(*FEW, "--eval-tokens", 100), few_tasks(3)[::-1])
    for part in ("tasks", "average", "std", "baselines", "controls"):
        assert one[part] == other[part], part


FIELDS = "task method metric tasks average std before shots baselines controls seconds args".split()


def test_results_have_their_fields_and_the_table_its_columns(capsys):
    tasks = few_tasks()
    results = json.loads(json.dumps(evaluate(tiny_run(*FEW, "--sets", 2), tasks)))
    assert list(results) == FIELDS
    assert results["tasks"].keys() == {task.name for task in tasks}
    for row in results["tasks"].values():
        assert row.keys() == {"mean", "std", "n", "shots"} and row["std"] is not None and row["n"] == 2
        assert row["shots"] == {"hyper": 4, "fewshot": 4}
    assert results["baselines"].keys() == {"zeroshot", "fewshot"} | BEYOND
    assert results["controls"].keys() == {"no_prefix", "other_task", "mean_pooled", "fewer_shots"}
    table = capsys.readouterr().out
    assert all(task.name in table for task in tasks) and "first 2 of each" in table
    assert "average" in table and "mean-pooled" in table and "4-shot" in table and "base, 4-shot" in table
    anchors = {f"{results['baselines'][name]:.1f}" for name in ("label_anchors", "base_label_anchors")}
    assert table.count("label anchors") == 1 and max(anchors, key=float) in table, "the better one is shown"
    no_prefix = results["controls"]["no_prefix"]
    assert "no prefix" not in table and no_prefix == results["baselines"]["zeroshot"], "shown once"


def test_the_base_of_a_model_is_what_hyperpretraining_began_with(tmp_path):
    run = tiny_run()
    base = load(ROOT / "tiny" / "llama")
    assert run.base.hyper.model.checksum == base.checksum != run.hyper.model.checksum
    assert not any(p.requires_grad for p in run.base.hyper.parameters())
    assert run.base.formatter is run.formatter
    untouched = tiny_run("--model", ROOT / "tiny" / "llama")
    assert untouched.base_folder is None
    assert not any(column.base for column in evaluation.columns(untouched, few_tasks()).values())
    theirs = Path(shutil.copytree(ROOT / "tiny" / "llama", tmp_path / "model"))
    (theirs / "args.json").write_text('{"learning_rate": 1}')
    assert tiny_run("--model", theirs).base_folder is None, "another program's args.json"


def test_another_task_is_one_of_another_dataset():
    tasks = [Prompt(name, dataset, None) for name, dataset in (("a1", "a"), ("a2", "a"), ("b", "b"))]
    assert [held_out(tasks, [1, 1, 1]).other(t) for t in range(3)] == [2, 2, 0]
    assert [held_out(tasks[:2], [1, 1]).other(t) for t in range(2)] == [0, 1], "there is no other"


# -------------------------------------------------------------------------- equal work, scored once

BEYOND = {"label_anchors", "base_fewshot", "base_label_anchors"}
TITLES_BEYOND = {"label anchors", "base, {shots}-shot", "base, label anchors"}


def listed(monkeypatch):
    """The titles of columns, as they are scored from now on."""
    scored = []
    score = evaluation.score

    def listing(run, column, episodes, others, t):
        scored.append(column.title)
        return score(run, column, episodes, others, t)

    monkeypatch.setattr(evaluation, "score", listing)
    return scored


MOVING = {  # the titles of what training changes
    "frozen": {"gists", "other task"},
    "lora": {"gists", "mean-pooled", "no prefix", "other task"},
    "shared": {"gists", "mean-pooled", "no prefix", "other task"},
    "all is trained": None,  # all of them
}


@pytest.mark.parametrize("kind", MOVING)
def test_only_what_draws_or_training_change_is_scored_anew(monkeypatch, kind):
    """No prefix is 0-shot where the base answers both; without examples, all draws are the same."""
    run = tiny_run(*FEW, "--sets", 2, "--downstream", "frozen" if kind == "all is trained" else kind)
    if kind == "all is trained":
        run.hyper.requires_grad_(True)
    held_out, scored = draw(run, few_tasks()), listed(monkeypatch)
    results, _ = evaluation.evaluate(run, held_out)
    twice = ("gists", "{shots}-shot", "other task", "mean-pooled", "fewer shots", *TITLES_BEYOND)
    once = ["0-shot", "no prefix"] if kind in ("lora", "shared") else ["0-shot"]
    first = Counter(scored)
    assert first == dict.fromkeys(once, 2) | dict.fromkeys(twice, 4), "two tasks, two draws"
    scored.clear()
    assert evaluation.evaluate(run, held_out)[0] | {"seconds": 0} == results | {"seconds": 0}
    assert not scored, "no step, no work"

    for parameter in trainable(run.hyper).values():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    run = replace(run, args=replace(run.args, steps=run.args.steps + 1))
    later, _ = evaluation.evaluate(run, held_out)
    assert set(scored) == (MOVING[kind] or set(first))
    assert later["baselines"] == results["baselines"] or kind == "all is trained"


ALL_TITLES = {"gists", "0-shot", "{shots}-shot", "other task", "mean-pooled", "fewer shots"} | TITLES_BEYOND


@pytest.mark.parametrize("options, anew", [
    ([], set()), (["--controls"], set()), (["--eval-tokens", 100], set()), (["--score", "mean"], ALL_TITLES),
    (["--gists", 5], ALL_TITLES),
    (["--dtype", "bfloat16"], ALL_TITLES),
    (["--quantize"], ALL_TITLES),
], ids=lambda options: " ".join(map(str, options)) if isinstance(options, list) else "")  # fmt: skip
def test_kept_scores_are_used_only_where_the_same_weights_read_the_same_tokens(
    tmp_path, monkeypatch, options, anew
):
    """What the folder of a stopped evaluation holds, when the next one there has other options."""
    if "--quantize" in options:
        pytest.importorskip("bitsandbytes")
    run = tiny_run(*FEW)
    evaluation.evaluate(run, draw(run, few_tasks()), tmp_path)
    scored = listed(monkeypatch)
    run = tiny_run(*FEW, *options)
    evaluation.evaluate(run, draw(run, few_tasks()), tmp_path)
    assert set(scored) == anew


# --------------------------------------------------------------------------- further tasks, ROUGE-L


def test_an_empty_evaluation_split_is_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [("a", "b", ["b", "c"])] * 9)
    write_jsonl(tmp_path / "validation.jsonl", [])
    task = Prompt("t", "t", Split(tmp_path, "train"), Split(tmp_path, "validation"))
    with pytest.raises(InputError, match="the validation split is empty"):
        evaluate(tiny_run(*FEW), [task])


def test_each_symbol_query_has_its_own_prefix(capsys):
    """Queries with examples of their own, scored in batches of any size = each alone."""
    words = ["apple", "river", "stone", "cloud", "music", "paper", "light", "table"]
    tasks = symbol_tasks(ROOT / "tiny" / "symbol", "test", words)[:2]
    run = tiny_run("--limit", 7, task="symbol")
    table = evaluation.columns(run, tasks)
    assert table.keys() == {"main", *evaluation.BASELINES, *evaluation.CONTROLS}
    for column in table.values():
        values = []
        for size in (8192, 300, 1):
            run.args.eval_tokens = size
            episodes, others = (task.evaluation(0, 0, 4, 7) for task in tasks)
            values.append(evaluation.score(run, column, episodes, others))
        assert values[0] == values[1] == values[2] and len(values[0]) == 7


@pytest.mark.parametrize("prediction, references, expected", [
    ("the cat sat", ["the cat sat"], 100), ("a dog", ["the cat sat"], 0), ("", ["cat"], 0),
    ("running", ["runs"], 100),  # the stemmer
    ("testing one", ["testing one two"], 80), ("The CAT, sat!", ["the cat sat"], 100),
    ("testing two", ["one", "testing one two", "three"], 80),  # the best of three
])  # fmt: skip
def test_rouge_l_is_that_of_the_official_script(prediction, references, expected):
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-4)


@needs_real_data
def test_rouge_l_has_its_reference_values():
    folder = REAL_DATA / "rouge"
    goldens = json.loads((folder / "goldens.json").read_text())
    mean = goldens["corpus_mean"]
    target, prediction = ((folder / name).read_text().splitlines() for name in mean["files"])
    score = statistics.fmean(rouge_l(p, [t]) for p, t in zip(prediction, target, strict=True))
    golden = mean["rougeL_stemmer"]
    assert score / 100 == pytest.approx(golden["f"], abs=golden["tolerance"])
    for pair in goldens["pairs"]:  # written without the stemmer, which changes none of these words
        if "target" in pair and not pair["stemmer"]:
            score = rouge_l(pair["prediction"], [pair["target"]])
            assert score == pytest.approx(100 * pair["rougeL"]["f"], abs=1e-3)


def test_instances_of_sni_are_what_is_averaged(capsys):
    tasks = sni_tasks(ROOT / "tiny" / "natural-instructions", "test")[:3]
    results = evaluate(tiny_run("--limit", 3, task="sni"), tasks)
    assert results["metric"] == "rougeL" and results["std"] is None
    example = [rouge_l(task.examples[0].target, e.references) for task in tasks for e in task.instances[:3]]
    assert results["baselines"]["copy_example"] == pytest.approx(sum(example) / 9)
    copied = [rouge_l(e.input, e.references) for task in tasks for e in task.instances[:3]]
    assert results["baselines"]["copy_input"] == pytest.approx(sum(copied) / 9)
    assert "copy example" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("argv, message", [
    ([], "name a RUN"), (["--task", "p3"], "name a RUN"), (["nowhere"], "no such folder"),
    (["nowhere", "--gists", "4"], "--gists"), (["nowhere", "--task", "p3"], "--task"),
    (["--task", "p3", "--method", "hyper"], "name a RUN"), (["nowhere", "--out", ""], "an empty name"),
    (["--task", "prefix", "--method", "fewshot"], "name a RUN"),
    (["--task", "hyperpretrain", "--method", "zeroshot"], "name a RUN"),
])  # fmt: skip
def test_bad_options_of_eval_are_refused(argv, message):
    with pytest.raises(InputError, match=message):
        parse(argv)


def save_args(folder, **changes):
    """A folder with the options of a run."""
    folder.mkdir(exist_ok=True)
    args = vars(resolve_args({"task": "p3"} | changes))
    (folder / "args.json").write_text(json.dumps(args))
    return folder


def test_evaluation_options_reach_a_run_and_others_stay(tmp_path):
    (tmp_path / "here").mkdir()
    folder = save_args(tmp_path / "run", gists=5, limit=2, data=str(tmp_path / "here"))
    moved = [str(folder), "--data", str((tmp_path / "here").rename(tmp_path / "there"))]
    args, run, out = parse([*moved, "--sets", "3"])
    assert isinstance(args, Options) and run == out == folder
    assert (args.gists, args.sets, args.controls, args.data) == (5, 3, True, moved[-1])
    assert args.limit == 0, "what a run was tried with is not inherited"
    for same_as_default in ("--gists", "16"), ("--shots", "16"):
        with pytest.raises(InputError, match="can't be changed"):
            parse([*moved, *same_as_default])
    assert not parse([*moved, "--no-controls"])[0].controls
    for option in ("average", "concat", "chain"):  # beside the run's own result, not in its place
        assert parse([*moved, f"--{option}", "2"])[1:] == (folder, folder / f"{option}-2")
    for task in ("p3", "sni", "symbol"):
        plain, folder, out = parse(["--task", task, "--method", "fewshot"])
        assert folder is None and str(out) == f"runs/eval-{task}-fewshot-seed0" and plain.steps == 0
        sets = tasks.find(task).DEFAULTS["tiny"]["sets"]
        assert (plain.sets, plain.controls, plain.score) == (sets, True, "sum")


ARGS = resolve_args({"task": "p3"})


def test_results_of_other_data_or_more_sets_have_folders_of_their_own_beside_the_runs(tmp_path):
    """And none stands in the way of another."""
    folder, other = save_args(tmp_path / "run"), tmp_path / "mine"
    other.mkdir()
    average, data = ["--average", "2"], ["--data", str(other)]
    for options, name in (
        (average + data, "average-2-data-mine"),
        (average, "average-2"),
        (data, "data-mine"),
    ):
        args, _, out = parse([str(folder), *options])
        assert out == folder / name
        take_folder(out, folder, ARGS)
        (out / "results.json").write_text("{}")
        release_folders()
    assert args.data == str(other)
    assert parse([str(folder), *data, "--out", "x"])[2].name == "x"
    assert parse([str(folder), "--data", str(ROOT / "tiny" / "P3")])[2] == folder, "the same data"


def test_a_way_to_combine_sets_that_is_named_replaces_the_runs_own(tmp_path):
    folder = save_args(tmp_path / "run", chain=2)
    args, *_ = parse([str(folder)])
    assert (args.chain, args.concat) == (2, None)
    args, *_ = parse([str(folder), "--concat", "4"])
    assert (args.chain, args.concat) == (None, 4)


@pytest.fixture
def released():
    """Whatever folders a test has taken."""
    yield
    release_folders()


def test_results_replace_nothing_but_results(tmp_path, released):
    folder = save_args(tmp_path / "run")
    another = save_args(tmp_path / "another")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text("mine")
    take_folder(folder, folder, ARGS)
    for out, message in (
        (another, "holds another run"),
        (tmp_path / "mine", "no run wrote"),
        (another / "args.json", "a file"),
    ):
        release_folders()
        with pytest.raises(InputError, match=message):
            take_folder(out, folder, ARGS)
    for _ in range(2):  # an earlier evaluation may be replaced
        release_folders()
        take_folder(tmp_path / "new", folder, ARGS)
        (tmp_path / "new" / "results.json").write_text("{}")
    with pytest.raises(InputError, match="another command is writing here"):
        take_folder(tmp_path / "new", None, ARGS)
    assert (tmp_path / "mine" / "results.json").read_text() == "mine" and (folder / "args.json").exists()


@pytest.mark.parametrize("name, content", [
    *((f"{name}.safetensors", "hours") for name in ("adapters", "model")), ("scores-0.jsonl", "minutes"),
    ("log.jsonl", ""),  # of a run that was killed before its first step
])  # fmt: skip
def test_an_evaluation_that_fails_removes_nothing_that_was_made_before(tmp_path, name, content):
    """A run of which only the trained tensors were kept; scores of an evaluation that was stopped."""
    folder = save_args(tmp_path / "run")
    (folder / MARK).touch()
    (folder / name).write_text(content)
    take_folder(folder, folder, ARGS)
    release_folders()
    assert (folder / name).read_text() == content and (folder / "args.json").exists()


def test_a_run_that_is_evaluated_may_be_read_by_others_and_not_written(tmp_path, released):
    take_folder(tmp_path / "one", save_args(tmp_path / "run"), ARGS)
    reader = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as a second evaluation with another --out would
    with pytest.raises(BlockingIOError):
        fcntl.flock(reader, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as training would
    os.close(reader)


def test_an_answer_ends_where_its_layout_says_whatever_the_tokens_are(monkeypatch):
    """A tokenizer may join the end of an answer and the beginning of what follows it in one token."""
    run = tiny_run()
    written = run.formatter.tokenizer.encode("kilo.\nInput:\nfox")
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: [written])
    assert evaluation.write_answers(run, Episode([], []), [[1]], nothing(), None) == ["kilo."]


# ----------------------------------------------------------------------------------- default folders

BASES = [{"task": name} for name in ("p3", "sni", "symbol", "hyperpretrain")]
BASES += [{"task": "prefix", "init": "random"}]


def default_folders(base, option, tmp_path):
    """value -> default folder, for the values of an option that go together with the base."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
    folders = [str(tmp_path / "a"), str(tmp_path / "b"), str(ROOT / "tiny" / "llama")]
    by_kind = {int: [2, 3, 5], float: [0.25, 0.5], bool: [False, True], Path: folders, str: ["cpu"]}
    found = {}
    for value in option.metadata["choices"] or by_kind[option.metadata["kind"]]:
        with contextlib.suppress(InputError):
            args = resolve_args(base | {option.name: value})
            found[getattr(args, option.name)] = default_folder(args)
    return found


def test_a_default_folder_says_every_option_that_changes_what_is_trained_and_no_other(tmp_path):
    """How long a run trains, how it is evaluated and on which device stay out of the name."""
    said = names_of("model", "parts") | {"model", "data", "dtype"}
    varied, options = set(), [f for f in fields(all_options()) if f.name not in ("task", "run")]
    for base in BASES:
        usual = resolve_args(base)
        for option in options:
            folders = default_folders(base, option, tmp_path)
            folders[getattr(usual, option.name)] = default_folder(usual)
            assert len(set(folders.values())) == (len(folders) if option.name in said else 1), (base, option)
            varied |= {option.name} if len(folders) > 1 else set()
    assert varied == {option.name for option in options}, "each goes with some task"
    assert len({default_folder(resolve_args(base)) for base in BASES}) == len(BASES)
    assert default_folder(resolve_args(BASES[0])) == "runs/p3-hyper-frozen-seed0"


def test_a_default_folder_of_prefix_tuning_names_the_run_that_it_starts_from(tmp_path, hypernetwork):
    other = shutil.copytree(hypernetwork, tmp_path / "other")
    for run in (hypernetwork, other):
        start = ["--task", "prefix", "--run", str(run), "--gists", "4"]
        assert training.parse(start)[1].name == f"prefix-hyper-gists-4-run-{run.name}-seed0"
    assert default_folder(resolve_args(BASES[-1])) == "runs/prefix-random-seed0"
