"""Option ranking, conditions, averages."""

import argparse
import json
import statistics

import pytest
import torch
from conftest import REAL_DATA, ROOT, G, needs_real_data, random_hyper
from make import write_jsonl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
from data import P3Task, Split, p3_tasks, sni_tasks, symbol_tasks
from eval import Condition, average, mean_pooled, rouge_l, score_options, settings
from gist import Gists
from llama import InputError, holes_mask, positions_of
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
            logits, _ = hyper.model(row, **before, adapter=hyper.downstream)
            log_p = logits[0].log_softmax(-1)
            gains = [log_p[len(prompt) - 1 + t, token].item() for t, token in enumerate(option)]
            scores[-1].append(sum(gains) / (len(gains) if mean else 1))
    return scores


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_shared_prefix_and_query_score_differently_from_one_row_per_option(prefix, mean, kv_heads):
    hyper = random_hyper("downstream", kv_heads)
    with torch.no_grad():
        gists = hyper.compress(torch.tensor([[1, 5, 9, 33, 50, 51, 52]])) if prefix else None
        expected = one_row_per_option(hyper, gists, mean)
    found = score_options(hyper.model, PROMPTS, OPTIONS, gists and gists[[0, 0, 0]], "downstream", mean)
    for a, b in zip(found, expected):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=1e-5)


def test_batch_size_changes_a_score():
    hyper = random_hyper()
    together = score_options(hyper.model, PROMPTS, OPTIONS)
    for i in range(3):
        alone = score_options(hyper.model, PROMPTS[i : i + 1], OPTIONS[i : i + 1])[0]
        torch.testing.assert_close(torch.tensor(together[i]), torch.tensor(alone), atol=1e-5, rtol=1e-5)


def test_examples_as_a_prefix_score_differently_from_examples_in_the_row():
    """Few-shot prompting through `past` = the same text in one row."""
    hyper, shots = random_hyper(), [1, 20, 21, 22, 23]
    _, present = hyper.model(torch.tensor([shots]), keep=positions_of(torch.tensor([shots])))
    through_past = score_options(hyper.model, PROMPTS, OPTIONS, Gists(present, torch.tensor([len(shots)]))[[0, 0, 0]])
    in_row = score_options(hyper.model, [shots + prompt for prompt in PROMPTS], OPTIONS)
    for a, b in zip(through_past, in_row):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=1e-5, rtol=1e-5)


def test_mean_pooling_is_not_a_mean_over_stretches():
    k = torch.arange(8.0).view(1, 1, 8, 1)
    pooled = mean_pooled(Gists([(k, -k)], torch.tensor([8])), 4)
    assert pooled.past[0][0].flatten().tolist() == [0.5, 2.5, 4.5, 6.5]
    assert pooled.past[0][1].flatten().tolist() == [-0.5, -2.5, -4.5, -6.5]
    assert pooled.offset.tolist() == [8]
    assert mean_pooled(Gists([(k, k)], torch.tensor([8])), 16).past[0][0].shape[2] == 8, "fewer tokens than gists"


def test_datasets_with_many_prompts_weigh_more():
    tasks = [P3Task(name, dataset, None) for name, dataset in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b", "b"))]
    scores = [[10.0], [20.0, 40.0], [20.0], [60.0]]
    assert average(tasks, scores, [1, 1, 1, 1], "p3") == 40.0
    assert average(tasks, scores, [1, 1, 1, 7], "sni") == 48.0, "Super-NaturalInstructions: mean over instances"


def tiny_system(**changes):
    args, *_ = parse(["--task", "p3", "--gists", str(G), "--shots", "4", "--limit", "6"])
    for name, value in changes.items():
        setattr(args, name, value)
    return evaluation.build(args)


def evaluate(system, tasks):
    return evaluation.evaluate(system, *evaluation.prepare(system, tasks))


def test_order_of_tasks_or_batch_size_changes_a_result(capsys):
    tasks = p3_tasks(ROOT / "tiny" / "P3", "test")[:3]
    one = evaluate(tiny_system(controls=True), tasks)
    other = evaluate(tiny_system(controls=True, eval_batch_size=4), tasks[::-1])
    for part in ("tasks", "average", "std", "baselines", "controls"):
        assert one[part] == other[part], part


def test_results_are_not_what_the_contract_says(capsys):
    tasks = p3_tasks(ROOT / "tiny" / "P3", "test")[:2]
    results = json.loads(json.dumps(evaluate(tiny_system(controls=True, sets=2), tasks)))
    assert list(results) == ["task", "method", "metric", "tasks", "average", "std", "baselines", "controls", "seconds", "args"]
    assert results["tasks"].keys() == {task.name for task in tasks}
    for row in results["tasks"].values():
        assert row.keys() == {"mean", "std", "n"} and row["std"] is not None and row["n"] == 6
    assert results["baselines"].keys() == {"zeroshot", "fewshot"}
    assert results["controls"].keys() == {"no_prefix", "other_task", "mean_pooled", "fewer_shots"}
    table = capsys.readouterr().out
    assert all(task.name in table for task in tasks) and "average" in table and "mean-pooled" in table


def test_untouched_baselines_move_with_training(capsys):
    """Baselines and controls of a trained system are those of the base, whatever the LoRA sets say."""
    tasks = p3_tasks(ROOT / "tiny" / "P3", "test")[:2]
    fresh = evaluate(tiny_system(downstream="lora", controls=True), tasks)
    system = tiny_system(downstream="lora", controls=True)
    for p in system.trainable().values():
        p.data.normal_(0, 0.5)
    trained = evaluate(system, tasks)
    assert trained["baselines"] == fresh["baselines"]
    assert trained["controls"]["fewer_shots"] == fresh["controls"]["fewer_shots"]


def test_another_task_is_a_prompt_of_the_same_dataset_or_the_task_itself():
    tasks = [P3Task(name, dataset, None) for name, dataset in (("a1", "a"), ("a2", "a"), ("b", "b"))]
    assert [evaluation.other_task(tasks, t) for t in range(3)] == [2, 2, 0]


def test_same_conditions_are_scored_twice():
    assert Condition(None) == Condition(None) and Condition(None) != Condition(None, "downstream")


def test_an_empty_evaluation_split_is_a_division_by_zero(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [("a", "b", ["b", "c"])] * 9)
    write_jsonl(tmp_path / "validation.jsonl", [])
    task = P3Task("t", "t", Split(tmp_path, "train"), Split(tmp_path, "validation"))
    with pytest.raises(InputError, match="empty"):
        evaluate(tiny_system(), [task])


@pytest.mark.parametrize("argv, message", [
    ([], "name a RUN"), (["--task", "p3"], "name a RUN"), (["nowhere"], "not the folder of a run"),
    (["nowhere", "--gists", "4"], "--gists"), (["nowhere", "--task", "p3"], "--task"),
])  # fmt: skip
def test_bad_options_of_eval_are_a_traceback(argv, message):
    with pytest.raises(InputError, match=message):
        settings(argv)


def test_evaluation_options_do_not_reach_a_run_or_change_others(tmp_path):
    saved = {"task": "p3", "method": "hyper", "model": "m", "data": "d", "gists": 5, "sets": 2, "controls": True}
    (tmp_path / "args.json").write_text(json.dumps(saved))
    args, asked = settings([str(tmp_path), "--sets", "3", "--data", "there"])
    assert isinstance(args, argparse.Namespace) and asked.out == asked.run == str(tmp_path)
    assert (args.gists, args.sets, args.controls, args.data) == (5, 3, True, "there")
    for same_as_default in ("--gists", "16"), ("--shots", "16"):
        with pytest.raises(InputError, match="can't be changed"):
            settings([str(tmp_path), *same_as_default])
    assert not settings([str(tmp_path), "--no-controls"])[0].controls
    plain, _ = settings(["--task", "p3", "--method", "fewshot"])
    assert (plain.sets, plain.controls, plain.score) == (1, False, "sum")


def test_a_shot_is_one_of_the_questions_or_shots_are_missing(tmp_path):
    rows = [(f"question {i}", "b", ["b", "c"]) for i in range(20)]
    write_jsonl(tmp_path / "train.jsonl", rows * 2)
    write_jsonl(tmp_path / "validation.jsonl", rows[:12])
    task = P3Task("t", "t", Split(tmp_path, "train"), Split(tmp_path, "validation"))
    ((shots, asked),) = [(e.shots, e.queries) for e in task.evaluation(0, 0, 16, None)]
    assert len(asked) == 12
    assert len(shots) == 16 and {shot.input for shot in shots} == {f"question {i}" for i in range(12, 20)}
    with pytest.raises(InputError, match="only 16 training rows are no questions"):
        task.evaluation(0, 0, 17, None)


# -------------------------------------------------------------------- ROUGE-L, generated answers


@pytest.mark.parametrize("prediction, references, expected", [
    ("the cat sat", ["the cat sat"], 100), ("a dog", ["the cat sat"], 0), ("", ["cat"], 0),
    ("running", ["runs"], 100),  # the stemmer
    ("testing one", ["testing one two"], 80), ("testing two", ["one", "testing one two", "three"], 80),  # the best of three
    ("The CAT, sat!", ["the cat sat"], 100),
])  # fmt: skip
def test_rouge_l_is_not_that_of_the_official_script(prediction, references, expected):
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-4)


@needs_real_data
def test_rouge_l_differs_from_its_reference_values():
    folder = REAL_DATA / "rouge"
    goldens = json.loads((folder / "goldens.json").read_text())
    mean = goldens["corpus_mean"]
    target, prediction = ((folder / name).read_text().splitlines() for name in mean["files"])
    found = statistics.fmean(rouge_l(p, [t]) for p, t in zip(prediction, target, strict=True))
    assert found / 100 == pytest.approx(mean["rougeL_stemmer"]["f"], abs=mean["rougeL_stemmer"]["tolerance"])
    for pair in goldens["pairs"]:  # written without the stemmer, which changes none of these words
        if "target" in pair and not pair["stemmer"]:
            assert rouge_l(pair["prediction"], [pair["target"]]) == pytest.approx(100 * pair["rougeL"]["f"], abs=1e-3)


def test_instances_of_sni_are_not_what_is_averaged(capsys):
    tasks = sni_tasks(ROOT / "tiny" / "natural-instructions", "test")[:3]
    args, *_ = parse(["--task", "sni", "--gists", str(G), "--limit", "3"])
    results = evaluate(evaluation.build(args), tasks)
    assert results["metric"] == "rougeL" and results["std"] is None
    example = [rouge_l(task.examples[0].target, e.references) for task in tasks for e in task.instances[:3]]
    assert results["baselines"]["copy_example"] == pytest.approx(sum(example) / 9)
    copied = [rouge_l(e.input, e.references) for task in tasks for e in task.instances[:3]]
    assert results["baselines"]["copy_input"] == pytest.approx(sum(copied) / 9)
    assert "copy example" in capsys.readouterr().out


@needs_real_data
def test_copying_a_demonstration_of_real_files_scores_otherwise(capsys):
    tasks = sni_tasks(REAL_DATA / "natural-instructions", "test")[:2]
    args, *_ = parse(["--task", "sni", "--gists", str(G), "--limit", "2"])
    results = evaluate(evaluation.build(args), tasks)
    expected = [rouge_l(task.examples[0].target, e.references) for task in tasks for e in task.instances[:2]]
    assert results["baselines"]["copy_example"] == pytest.approx(sum(expected) / len(expected))


def test_each_symbol_query_has_another_ones_prefix(capsys):
    """Queries with examples of their own, scored in batches of any size = each alone."""
    words = ["apple", "river", "stone", "cloud", "music", "paper", "light", "table"]
    tasks = symbol_tasks(ROOT / "tiny" / "symbol", "test", words)[:2]
    args, *_ = parse(["--task", "symbol", "--gists", str(G), "--limit", "7"])
    system = evaluation.build(args)
    for condition in evaluation.conditions(system, controls=True).values():
        values = []
        for size in (16, 3, 1):
            args.eval_batch_size = size
            episodes, others = (task.evaluation(0, 0, 4, 7) for task in tasks)
            values.append(evaluation.score(system, episodes, others, condition))
        assert values[0] == values[1] == values[2] and len(values[0]) == 7


# ------------------------------------------------------------------------------------------ the cost


@pytest.mark.parametrize("T, P, adapter, kept", [(40, 0, None, 0), (40, 0, "hyper", 16), (40, 0, None, 40), (7, 16, None, 0), (9, 30, "all", 0)])
def test_counted_operations_differ_from_those_of_torch(T, P, adapter, kept):
    hyper = random_hyper("all") if adapter == "all" else random_hyper()
    past = {}
    if P:
        _, present = hyper.model(torch.ones(1, P, dtype=torch.long))
        # (A counter can't look into the bias that stands for the causal mask behind a past.)
        past = {"past": present, "offset": torch.tensor([P]), "mask": holes_mask(torch.ones(1, P, dtype=torch.bool), T)}
    # Only the plain kernel's products are counted on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        wanted = {"keep": torch.arange(T - kept, T)[None]} if kept else {"select": torch.tensor([T - 1])}
        hyper.model(torch.ones(1, T, dtype=torch.long), **past, adapter=adapter, **wanted)
    rank = 0 if adapter is None else 4
    found = evaluation.flops(hyper.model.config, T, P, 0 if kept else 1, rank, kept)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


# ----------------------------------------------------------------------------------- tables and curves


def write_run(folder, average, **args):
    folder.mkdir(parents=True)
    args = {"task": "p3", "method": "hyper", "model": "m", "data": "d", "shots": 4, "init": "random"} | args
    results = {"metric": "accuracy", "average": average, "baselines": {"zeroshot": 50.0}, "controls": {}, "seconds": 2.0, "args": args}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "args.json").write_text(json.dumps(args))
    lines = [{"step": step, "loss": 1.0, "seconds": 1.0} | ({"score": average, "controls": {"no_prefix": 50.0}} if step == 2 else {}) for step in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_of_runs_is_not_mean_and_deviation(tmp_path):
    for seed, value in enumerate((60.0, 70.0)):
        write_run(tmp_path / "one_row" / f"seed{seed}", value)
    write_run(tmp_path / "two" / "seed0", 10.0)
    lines = evaluation.compare([tmp_path / "one_row", tmp_path / "two"]).splitlines()
    assert lines[0] == "| accuracy | result | 0-shot | seconds a run |" and len(lines) == 4
    assert lines[2] == "| one row | 65.0 ± 7.1 | 50.0 ± 0.0 | 4 |" and lines[3] == "| two | 10.0 | 50.0 | 4 |"
    with pytest.raises(InputError, match="no runs"):
        evaluation.compare([tmp_path])


def test_curves_are_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for seed in range(2):
        write_run(tmp_path / f"seed{seed}", 60.0 + seed, gists=4 + seed)
    evaluation.plot([tmp_path / "seed0", tmp_path / "seed1"], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"
    evaluation.plot([tmp_path / "seed0", tmp_path / "seed1"], tmp_path / "by.png", by="gists")
    assert (tmp_path / "by.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(InputError, match="not the folder of a run"):
        evaluation.plot([tmp_path / "no"], tmp_path / "c.png")


@pytest.mark.parametrize("argv, message", [
    (["r", "--save-gists", "f"], "needs --examples"), (["r", "--examples", "a", "--gists-file", "b"], "exclude"),
    (["r", "--input", "x"], "--gists-file or --examples"), (["--examples", "a"], "name a RUN"), (["--cost"], "name a RUN"),
])  # fmt: skip
def test_options_that_do_not_go_together_are_taken(argv, message):
    with pytest.raises(InputError, match=message):
        settings(argv)
