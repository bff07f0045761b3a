"""What is done with a finished run: answering after own examples, the cost, tables and curves."""

import io
import json

import pytest
import torch
from conftest import ROOT, random_hyper, run, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llama import InputError, holes_mask
from tools.cost import flops
from tools.report import compare, plot


# ------------------------------------------------------------------------------------- own examples


def test_own_examples_are_compressed_kept_and_answered_after(tmp_path, hypernetwork, monkeypatch):
    examples, gists = tmp_path / "my.jsonl", tmp_path / "my.safetensors"
    rows = [{"input": f"The {word} is old.", "output": label} for word, label in (("fox", "kilo"), ("dog", "jade"))]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(hypernetwork, "--examples", examples, "--save", gists, program="answer")
    assert "2 examples" in done.stdout and "became 4 gists" in done.stdout and gists.stat().st_size < 20_000
    question = ["--input", "The fox sleeps.", "--options", "kilo,jade"]
    kept = run(hypernetwork, "--gists", gists, *question, program="answer").stdout
    fresh = run(hypernetwork, "--examples", examples, *question, program="answer").stdout
    assert kept.strip() == fresh.strip().splitlines()[-1] and kept.split()[0] in ("kilo", "jade")
    run(hypernetwork, "--gists", gists, *question, "--dtype", "bfloat16", program="answer")  # kept in float32
    monkeypatch.setattr("sys.stdin", io.StringIO("The fox sleeps.\n\nThe dog waits.\n"))
    lines = run(hypernetwork, "--gists", gists, "--options", "kilo,jade", program="answer").stdout.splitlines()
    assert len(lines) == 2 and lines[0] == kept.strip()
    own_words = run(hypernetwork, "--gists", gists, "--input", "The fox sleeps.", program="answer").stdout
    assert own_words.endswith("\n") and "%" not in own_words

    train(tmp_path / "other", "--steps", "1", "--no-controls", "--seed", "5")
    another_base = run(hypernetwork, "--model", ROOT / "tiny" / "llama", "--gists", gists, *question, program="answer", status=2).stderr
    assert "was trained on another model" in another_base
    refused = run(tmp_path / "other", "--gists", gists, *question, program="answer", status=2).stderr
    assert "made with another run" in refused.strip().splitlines()[-1]
    examples.write_text('{"input": "a"}\n')
    assert "line 1: output" in run(hypernetwork, "--examples", examples, *question, program="answer", status=2).stderr


@pytest.mark.parametrize("argv, message", [
    (["--save", "f"], "either --examples FILE or --gists FILE"), (["--gists", "g", "--save", "f"], "--save needs --examples"),
    (["--examples", "a", "--gists", "b"], "either --examples"), (["--input", "x"], "either --examples"), ([], "either --examples"),
])  # fmt: skip
def test_options_of_answer_that_do_not_go_together_are_refused(tmp_path, argv, message):
    lines = run(tmp_path, *argv, program="answer", status=2).stderr.splitlines()
    assert len(lines) == 1 and message in lines[0]


@pytest.mark.parametrize("program", ["answer", "cost"])
def test_a_tool_without_a_finished_run_is_refused(tmp_path, program):
    options = ["--examples", tmp_path / "a"] if program == "answer" else []
    assert "RUN" in run(program=program, status=2).stderr
    assert "not the folder of a run" in run(tmp_path, *options, program=program, status=2).stderr


def test_only_a_finished_hypernetwork_compresses_own_examples(tmp_path, hypernetwork):
    for change in ({"method": "fewshot"}, {"task": "prefix", "init": "random"}, {}):
        out = tmp_path / str(len(change))
        out.mkdir(exist_ok=True)
        args = json.loads((hypernetwork / "args.json").read_text())
        (out / "args.json").write_text(json.dumps(args | change))
        refused = run(out, "--examples", tmp_path / "a", program="answer", status=2).stderr
        assert f"{out}: has no hypernetwork" in refused


# ----------------------------------------------------------------------------------------- the cost


def test_the_cost_of_gists_is_printed(hypernetwork):
    printed = run(hypernetwork, program="cost").stdout
    assert "Llama-2-7B" in printed and "gists ahead after" in printed


@pytest.mark.parametrize("T, P, adapter, kept", [(40, 0, None, 0), (40, 0, "hyper", 16), (40, 0, None, 40), (7, 16, None, 0), (9, 30, "all", 0)])
def test_counted_operations_are_those_that_torch_counts(T, P, adapter, kept):
    hyper = random_hyper("all") if adapter == "all" else random_hyper()
    past = {}
    if P:
        _, present = hyper.model(torch.ones(1, P, dtype=torch.long))
        # (A counter can't look into the bias that stands for the causal mask after a past.)
        past = {"past": present, "offset": torch.tensor([P]), "mask": holes_mask(torch.ones(1, P, dtype=torch.bool), T)}
    # Only the plain kernel's products are counted on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokens = torch.ones(1, T, dtype=torch.long)
        if kept:
            hyper.model.keys_values(tokens, torch.arange(T - kept, T)[None], adapter=adapter)
        else:
            hyper.model(tokens, **past, adapter=adapter, select=torch.tensor([T - 1]))
    rank = 0 if adapter is None else 4
    counted = flops(hyper.model.config, T, P, 0 if kept else 1, rank, kept)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


# -------------------------------------------------------------------------------- tables and curves


def write_run(folder, average, **args):
    folder.mkdir(parents=True)
    args = {"task": "p3", "method": "hyper", "model": "m", "data": "d", "shots": 4, "init": "random"} | args
    results = {"metric": "accuracy", "average": average, "baselines": {"zeroshot": 50.0}, "controls": {}, "seconds": 2.0, "args": args}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "args.json").write_text(json.dumps(args))
    lines = [{"step": step, "loss": 1.0, "seconds": 1.0} | ({"score": average, "controls": {"no_prefix": 50.0}} if step == 2 else {}) for step in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_of_runs_has_mean_and_deviation(tmp_path):
    for seed, value in enumerate((60.0, 70.0)):
        write_run(tmp_path / "one_row" / f"seed{seed}", value)
    write_run(tmp_path / "two" / "seed0", 10.0)
    lines = compare([tmp_path / "one_row", tmp_path / "two"]).splitlines()
    assert lines[0] == "| accuracy | result | 0-shot | seconds a run |" and len(lines) == 4
    assert lines[2] == "| one row | 65.0 ± 7.1 | 50.0 ± 0.0 | 4 |" and lines[3] == "| two | 10.0 | 50.0 | 4 |"
    with pytest.raises(InputError, match="no runs"):
        compare([tmp_path])
    assert run("table", tmp_path / "one_row", tmp_path / "two", program="report").stdout.splitlines() == lines


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for seed in range(2):
        write_run(tmp_path / f"seed{seed}", 60.0 + seed, gists=4 + seed)
    plot([tmp_path / "seed0", tmp_path / "seed1"], tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes()[1:4] == b"PNG"
    run("plot", tmp_path / "seed0", tmp_path / "seed1", "--out", tmp_path / "by.png", "--by", "gists", program="report")
    assert (tmp_path / "by.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(InputError, match="not the folder of a run"):
        plot([tmp_path / "no"], tmp_path / "c.png")
