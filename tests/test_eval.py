"""Option ranking, ROUGE-L, columns, averages, options."""

import argparse
import json
import statistics
from collections import Counter

import pytest
import torch
from conftest import REAL_DATA, ROOT, G, needs_real_data, random_hyper

import eval as evaluation
from data import Episode, Example
from eval import HeldOut, average, prepare, score_options, settings
from gist import read_rows, trainable
from llama import InputError
from tasks import TASKS, Run, open_run
from tasks.p3 import Prompt, Split, p3_tasks
from tasks.sni import rouge_l, sni_tasks
from tasks.symbol import symbol_tasks
from tiny.make import write_jsonl
from tools import print_lines
from train import parse

PROMPTS = [[1, 5, 6, 7], [1, 8], [1, 9, 10, 11, 12, 13]]

OPTIONS = [[[20], [21, 22], [23, 24, 25]], [[20], [30]], [[31, 32], [31, 33, 34, 35, 36], [40]]]


def one_row_per_option(hyper, gists, mean=False):
    scores = []
    for prompt, choices in zip(PROMPTS, OPTIONS):
        scores.append([])
        for option in choices:
            row = torch.tensor([prompt + option])
            before = {} if gists is None else {"past": gists.past, "offset": gists.offset}
            logits, _ = hyper.model(row, **before, adapter=hyper.answerer)
            log_p = logits[0].log_softmax(-1)
            gains = [log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(option)]
            scores[-1].append(sum(gains) / (len(gains) if mean else 1))
    return scores


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_prefix_and_query_score_like_one_row_per_option(prefix, mean, kv_heads):
    hyper = random_hyper("downstream", kv_heads)
    with torch.no_grad():
        gists = hyper.compress(torch.tensor([[1, 5, 9, 33, 50, 51, 52]])) if prefix else None
        expected = one_row_per_option(hyper, gists, mean)
    scores = score_options(hyper.model, PROMPTS, OPTIONS, gists and gists[[0, 0, 0]], "downstream", mean)
    for a, b in zip(scores, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=1e-5)


def test_batch_size_changes_no_score():
    hyper = random_hyper()
    together = score_options(hyper.model, PROMPTS, OPTIONS)
    for i in range(3):
        alone = score_options(hyper.model, PROMPTS[i : i + 1], OPTIONS[i : i + 1])[0]
        torch.testing.assert_close(torch.tensor(together[i]), torch.tensor(alone), atol=1e-5, rtol=1e-5)


def test_examples_as_a_prefix_score_like_examples_in_the_row():
    """Few-shot prompting through `past` = the same text in one row."""
    hyper, shots = random_hyper(), [1, 20, 21, 22, 23]
    through_past = score_options(hyper.model, PROMPTS, OPTIONS, read_rows(hyper.model, [shots])[[0, 0, 0]])
    in_row = score_options(hyper.model, [shots + prompt for prompt in PROMPTS], OPTIONS)
    for a, b in zip(through_past, in_row):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------- the result


def a_run(task):
    return Run(argparse.Namespace(task=task), None, None)


def held_out(tasks, sizes):
    """Tasks with so many queries each."""
    return HeldOut(tasks, [[[Episode([Example("x", "y")] * size, [])] for size in sizes]], Counter(), [{"hyper": 0.0, "fewshot": 0.0}] * len(sizes))


def test_datasets_with_many_prompts_weigh_the_same():
    tasks = [Prompt(name, dataset, None) for name, dataset in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b", "b"))]
    scores = [[10.0], [20.0, 40.0], [20.0], [60.0]]
    assert average(a_run("p3"), held_out(tasks, [1, 1, 1, 1]), scores) == 40.0
    assert average(a_run("sni"), held_out(tasks, [1, 1, 1, 7]), scores) == 48.0, "Super-NaturalInstructions: mean over instances"


def tiny_run(*options, task="p3"):
    args, *_ = parse(["--task", task, "--gists", str(G), *map(str, options)])
    return open_run(args)


FEW = ["--shots", 4, "--limit", 6]


def evaluate(run, tasks):
    results, lines = evaluation.evaluate(run, prepare(run, tasks))
    print_lines(lines)
    return results


def test_order_of_tasks_and_batch_size_change_no_result(capsys):
    tasks = p3_tasks(ROOT / "tiny" / "P3", "test")[:3]
    one = evaluate(tiny_run(*FEW), tasks)
    other = evaluate(tiny_run(*FEW, "--eval-tokens", 100), tasks[::-1])
    for part in ("tasks", "average", "std", "baselines", "controls"):
        assert one[part] == other[part], part


def test_results_have_their_fields_and_the_table_its_columns(capsys):
    tasks = p3_tasks(ROOT / "tiny" / "P3", "test")[:2]
    results = json.loads(json.dumps(evaluate(tiny_run(*FEW, "--sets", 2), tasks)))
    assert list(results) == ["task", "method", "metric", "tasks", "average", "std", "before", "shots", "baselines", "controls", "seconds", "args"]
    assert results["tasks"].keys() == {task.name for task in tasks}
    for row in results["tasks"].values():
        assert row.keys() == {"mean", "std", "n", "shots"} and row["std"] is not None and row["n"] == 6
        assert row["shots"] == {"hyper": 4, "fewshot": 4}
    assert results["baselines"].keys() == {"zeroshot", "fewshot"}
    assert results["controls"].keys() == {"no_prefix", "other_task", "mean_pooled", "fewer_shots"}
    table = capsys.readouterr().out
    assert all(task.name in table for task in tasks) and "average" in table and "mean-pooled" in table and "4-shot" in table
    assert "no prefix" not in table and results["controls"]["no_prefix"] == results["baselines"]["zeroshot"], "shown once"
    assert "first 6 of each" in table


def test_untouched_baselines_do_not_move_with_training(capsys):
    """Baselines and fewer shots beside a trained run are those of the base, whatever its LoRA sets say."""
    tasks = p3_tasks(ROOT / "tiny" / "P3", "test")[:2]
    fresh = evaluate(tiny_run(*FEW, "--downstream", "lora"), tasks)
    run = tiny_run(*FEW, "--downstream", "lora")
    for p in trainable(run.hyper).values():
        p.data.normal_(0, 0.5)
    trained = evaluate(run, tasks)
    assert trained["baselines"] == fresh["baselines"]
    assert trained["controls"]["fewer_shots"] == fresh["controls"]["fewer_shots"]


def test_another_task_is_one_of_another_dataset():
    tasks = [Prompt(name, dataset, None) for name, dataset in (("a1", "a"), ("a2", "a"), ("b", "b"))]
    assert [held_out(tasks, [1, 1, 1]).other(t) for t in range(3)] == [2, 2, 0]
    assert [held_out(tasks[:2], [1, 1]).other(t) for t in range(2)] == [0, 1], "there is no other"


def test_what_the_draw_does_not_change_is_scored_once(monkeypatch, capsys):
    """With two draws of examples, what has no examples before it is scored for the first draw alone."""
    scored = listed(monkeypatch)
    evaluate(tiny_run(*FEW, "--sets", 2), p3_tasks(ROOT / "tiny" / "P3", "test")[:2])
    twice = ("hyper", "{shots}-shot", "other task", "mean-pooled", "fewer shots")
    assert Counter(scored) == {"0-shot": 2} | dict.fromkeys(twice, 4), "and no prefix is 0-shot"


def listed(monkeypatch):
    """The titles of columns, as they are scored from now on."""
    scored, score = [], evaluation.score

    def listing(run, column, episodes, others, t):
        scored.append(column.title)
        return score(run, column, episodes, others, t)

    monkeypatch.setattr(evaluation, "score", listing)
    return scored


@pytest.mark.parametrize("options, whole, moving", [
    ([], False, ["hyper", "other task"]), (["--downstream", "lora"], False, ["hyper", "mean-pooled", "no prefix", "other task"]),
    ([], True, ["fewer shots", "hyper", "mean-pooled", "no prefix", "other task"]),
], ids=["frozen", "lora", "all is trained"])  # fmt: skip
def test_along_the_way_only_what_training_changes_is_scored_anew(monkeypatch, options, whole, moving):
    tasks = p3_tasks(ROOT / "tiny" / "P3", "test")[:2]
    run = tiny_run(*FEW, *options)
    if whole:
        run.hyper.requires_grad_(True)
    held_out = prepare(run, tasks)
    evaluation.measure(run, held_out)
    for parameter in trainable(run.hyper).values():
        parameter.data += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    scored = listed(monkeypatch)
    again = evaluation.measure(run, held_out)
    assert sorted(set(scored)) == moving
    assert again == evaluation.measure(run, prepare(run, tasks)), "as if nothing had been known"


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
    assert table.keys() == {"main", "zeroshot", "fewshot", "no_prefix", "other_task", "mean_pooled", "fewer_shots"}
    for column in table.values():
        values = []
        for size in (8192, 300, 1):
            run.args.eval_tokens = size
            episodes, others = (task.evaluation(0, 0, 4, 7) for task in tasks)
            values.append(evaluation.score(run, column, episodes, others))
        assert values[0] == values[1] == values[2] and len(values[0]) == 7


# ------------------------------------------------------------------------------------------ ROUGE-L


@pytest.mark.parametrize("prediction, references, expected", [
    ("the cat sat", ["the cat sat"], 100), ("a dog", ["the cat sat"], 0), ("", ["cat"], 0),
    ("running", ["runs"], 100),  # the stemmer
    ("testing one", ["testing one two"], 80), ("testing two", ["one", "testing one two", "three"], 80),  # the best of three
    ("The CAT, sat!", ["the cat sat"], 100),
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
    assert score / 100 == pytest.approx(mean["rougeL_stemmer"]["f"], abs=mean["rougeL_stemmer"]["tolerance"])
    for pair in goldens["pairs"]:  # written without the stemmer, which changes none of these words
        if "target" in pair and not pair["stemmer"]:
            assert rouge_l(pair["prediction"], [pair["target"]]) == pytest.approx(100 * pair["rougeL"]["f"], abs=1e-3)


def test_instances_of_sni_are_what_is_averaged(capsys):
    tasks = sni_tasks(ROOT / "tiny" / "natural-instructions", "test")[:3]
    results = evaluate(tiny_run("--limit", 3, task="sni"), tasks)
    assert results["metric"] == "rougeL" and results["std"] is None
    example = [rouge_l(task.examples[0].target, e.references) for task in tasks for e in task.instances[:3]]
    assert results["baselines"]["copy_example"] == pytest.approx(sum(example) / 9)
    copied = [rouge_l(e.input, e.references) for task in tasks for e in task.instances[:3]]
    assert results["baselines"]["copy_input"] == pytest.approx(sum(copied) / 9)
    assert "copy example" in capsys.readouterr().out


@needs_real_data
def test_copying_an_example_of_real_files_scores_its_rouge_l(capsys):
    tasks = sni_tasks(REAL_DATA / "natural-instructions", "test")[:2]
    results = evaluate(tiny_run("--limit", 2, task="sni"), tasks)
    expected = [rouge_l(task.examples[0].target, e.references) for task in tasks for e in task.instances[:2]]
    assert results["baselines"]["copy_example"] == pytest.approx(sum(expected) / len(expected))


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("argv, message", [
    ([], "name a RUN"), (["--task", "p3"], "name a RUN"), (["nowhere"], "not the folder of a run"),
    (["nowhere", "--gists", "4"], "--gists"), (["nowhere", "--task", "p3"], "--task"),
])  # fmt: skip
def test_bad_options_of_eval_are_refused(argv, message):
    with pytest.raises(InputError, match=message):
        settings(argv)


def test_evaluation_options_reach_a_run_and_others_stay(tmp_path):
    model = str(ROOT / "tiny" / "llama-c")
    saved = {"task": "p3", "method": "hyper", "model": model, "data": "d", "gists": 5, "limit": 2, "controls": True}
    (tmp_path / "args.json").write_text(json.dumps(saved))
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(InputError, match="d: no such folder, which this run was made with; --data says"):
        settings([str(tmp_path)])
    args, folder, out = settings([str(tmp_path), "--sets", "3", "--data", str(there)])
    assert args.limit == 0, "what a run was tried with is not inherited"
    (tmp_path / "args.json").write_text(json.dumps(saved | {"data": str(there)}))
    assert isinstance(args, argparse.Namespace) and out == folder == tmp_path
    assert (args.gists, args.sets, args.controls, args.data, args.model) == (5, 3, True, str(there), model)
    for same_as_default in ("--gists", "16"), ("--shots", "16"):
        with pytest.raises(InputError, match="can't be changed"):
            settings([str(tmp_path), *same_as_default])
    assert not settings([str(tmp_path), "--no-controls"])[0].controls
    for option in ("average", "concat", "chain"):  # beside the run's own result, not in its place
        assert settings([str(tmp_path), f"--{option}", "2"])[1:] == (tmp_path, tmp_path / f"{option}-2")
    for task in ("p3", "sni", "symbol"):
        plain, folder, out = settings(["--task", task, "--method", "fewshot"])
        assert folder is None and str(out) == f"runs/eval-{task}-fewshot" and plain.steps == 0
        assert (plain.sets, plain.controls, plain.score) == (TASKS[task].DEFAULTS["tiny"]["sets"], True, "sum")
