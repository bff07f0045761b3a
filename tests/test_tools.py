"""What is done with a finished run: answering after own examples, the cost, tables and curves."""

import io
import json
import os
import threading
import time

import pytest
import torch
from conftest import ROOT, random_hyper, run, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import Episode, Example
from llama import InputError, Tokenizer, generate, load
from lora import load_tensors, save_tensors
from tasks import open_run, read_args, settle
from tools import at_once
from tools.cost import flops
from tools.probe import asked_back
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
    for name, change in (("0.key", torch.zeros(5)), ("offset", torch.tensor([900])), ("1.value", torch.zeros(1, 4, 0, 32))):
        tensors, about = load_tensors(gists)
        save_tensors(tmp_path / "crafted.safetensors", tensors | {name: change}, about)
        assert "crafted" in run(hypernetwork, "--gists", tmp_path / "crafted.safetensors", *question, program="answer", status=2).stderr
    for taken in (hypernetwork / "adapters.safetensors", examples, tmp_path):
        assert "not a saved prefix" in run(hypernetwork, "--examples", examples, "--save", taken, program="answer", status=2).stderr
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a fox\n\xff\xfe b\n"), "utf-8"))
    assert "stdin: not text" in run(hypernetwork, "--gists", gists, "--options", "kilo,jade", program="answer", status=2).stderr
    own_words = run(hypernetwork, "--gists", gists, "--input", "The fox sleeps.", program="answer").stdout
    assert own_words.endswith("\n") and "%" not in own_words

    train(tmp_path / "other", "--steps", "1", "--no-controls", "--seed", "5")
    another_base = run(hypernetwork, "--model", ROOT / "tiny" / "llama", "--gists", gists, *question, program="answer", status=2).stderr
    assert "was trained on another model" in another_base
    refused = run(tmp_path / "other", "--gists", gists, *question, program="answer", status=2).stderr
    assert "made with another run" in refused.strip().splitlines()[-1]
    examples.write_text('{"input": "a"}\n')
    assert "line 1: output" in run(hypernetwork, "--examples", examples, *question, program="answer", status=2).stderr


def test_own_examples_may_come_from_a_pipe(tmp_path, hypernetwork):
    text = "".join(json.dumps({"input": f"The {word} is old.", "output": "kilo"}) + "\n\n" for word in ("fox", "dog"))
    (tmp_path / "file").write_text(text)
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=[text]).start()
    question = ["--input", "The fox sleeps.", "--options", "kilo,jade"]
    piped, file = (run(hypernetwork, "--examples", tmp_path / name, *question, program="answer").stdout for name in ("pipe", "file"))
    assert piped == file and "2 examples" in file


def test_an_export_replaces_nothing_of_anybodys(tmp_path, hypernetwork):
    (tmp_path / "hyper").mkdir()
    (tmp_path / "hyper" / "adapter_config.json").write_text('{"mine": 1}')
    assert "isn't replaced" in run(hypernetwork, "--out", tmp_path, program="export", status=2).stderr
    assert (tmp_path / "hyper" / "adapter_config.json").read_text() == '{"mine": 1}'
    assert "folder of a run" in run(hypernetwork, "--out", hypernetwork, program="export", status=2).stderr
    for _ in range(2):  # an earlier export may be replaced
        run(hypernetwork, "--out", tmp_path / "new", program="export")


@pytest.mark.parametrize("argv, message", [
    (["--save", "f"], "either --examples FILE or --gists FILE"), (["--gists", "g", "--save", "f"], "--save needs --examples"),
    (["--examples", "a", "--gists", "b"], "either --examples"), (["--input", "x"], "either --examples"), ([], "either --examples"),
])  # fmt: skip
def test_options_of_answer_that_do_not_go_together_are_refused(tmp_path, argv, message):
    lines = run(tmp_path, *argv, program="answer", status=2).stderr.splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_each_example_is_asked_back_at_its_place(tmp_path, hypernetwork):
    episode = Episode([Example("q", "b", ("a", "b"))], [Example("x", "a"), Example("y", "b", ("b", "c")), Example("z", "a")])
    again = asked_back(episode, 2)
    assert [query.input for query in again.queries] == ["x", "y"] == [shot.input for shot in again.shots]
    assert [query.options for query in again.queries] == [("a", "b"), ("b", "c")]
    done = run(hypernetwork, "--sets", "1", "--out", tmp_path / "probe.png", program="probe").stdout
    assert (tmp_path / "probe.png").exists() and "place among 4 examples" in done and "in context" in done


@pytest.mark.parametrize("program", ["answer", "cost", "probe"])
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


QUESTIONS = ["The fox sleeps.", "A dog waits near the rope.", "The red cow is in the barn.", "fox", "Which is it, the dog?"]


def test_a_saved_prefix_answers_in_transformers_as_it_does_here(tmp_path, hypernetwork):
    """Greedy, to the token, without position ids: the gists stand at 0 … G-1, as a cache of G tokens does."""
    transformers = pytest.importorskip("transformers")
    examples, saved = tmp_path / "my.jsonl", tmp_path / "my.safetensors"
    examples.write_text("".join(json.dumps({"input": f"The {w} is old.", "output": o}) + "\n" for w, o in (("fox", "kilo"), ("dog", "jade"))))
    run(hypernetwork, "--examples", examples, "--save", saved, program="answer")
    folder = ROOT / "tiny" / "llama-c"
    tokenizer, theirs = Tokenizer(folder), transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gists = load_tensors(saved)[0]
    assert gists["offset"].tolist() == [gists["0.key"].shape[2]] == [4]
    for question in QUESTIONS:
        cache = transformers.DynamicCache()
        for i in range(theirs.config.num_hidden_layers):
            cache.update(gists[f"{i}.key"], gists[f"{i}.value"], i)
        prompt = [tokenizer.bos, *tokenizer.encode(f"\nInput:\n{question}\nOutput:\n")]
        ids = torch.tensor([[0] * 4 + prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0)
        past = [(gists[f"{i}.key"], gists[f"{i}.value"]) for i in range(theirs.config.num_hidden_layers)]
        ours = generate(load(folder), [prompt], 12, tokenizer.eos, past, gists["offset"])[0]
        new = out[0, ids.shape[1] :].tolist()
        assert (new[: new.index(tokenizer.eos)] if tokenizer.eos in new else new) == ours


@pytest.mark.parametrize("downstream", ["frozen", "lora"])
def test_exported_adapters_open_in_peft_with_the_same_logits(tmp_path, downstream):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    train(tmp_path / "run", "--steps", "2", "--no-controls", "--measure", "0", "--downstream", downstream)
    run(tmp_path / "run", "--out", tmp_path / "peft", program="export")
    names = ["hyper"] + ["downstream"] * (downstream == "lora")
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == sorted(names)
    ours = open_run(settle({}, read_args(tmp_path / "run")), tmp_path / "run").hyper.model
    x = torch.randint(3, 900, (2, 20), generator=torch.Generator().manual_seed(0))
    for name in names:
        base = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "llama-c", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft" / name).eval()
        with torch.no_grad():
            mine = ours(x, adapter=name)[0]
            torch.testing.assert_close(mine, theirs(x).logits, atol=1e-4, rtol=1e-4)
            assert (mine - ours(x)[0]).abs().max() > 1e-3, "the set does something"


# ------------------------------------------------------------------------------- several at once


def test_what_is_done_at_once_comes_in_order_and_leaves_the_threads_alone():
    torch.set_num_threads(2)

    def slow_if_early(n):
        time.sleep(0.1 - n / 100)
        return n, torch.get_num_threads()

    assert list(at_once(slow_if_early, range(9), several=True)) == [(n, 1) for n in range(9)]
    assert list(at_once(slow_if_early, range(3), several=False)) == [(n, 2) for n in range(3)]
    assert torch.get_num_threads() == 2


def test_after_a_failure_nothing_more_is_begun():
    torch.set_num_threads(2)
    begun = []

    def failing(n):
        begun.append(n)
        time.sleep(0.01)
        if n == 3:
            raise KeyboardInterrupt
        return n

    came = []
    with pytest.raises(KeyboardInterrupt):
        for n in at_once(failing, range(100), several=True):
            came.append(n)
    assert came == [0, 1, 2] and len(begun) < 10 and torch.get_num_threads() == 2


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
        past = {"past": present, "offset": torch.tensor([P])}
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


def test_a_picture_says_what_it_shows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot as pyplot

    labels = []
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda figure, *_, **__: labels.append((figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel())))
    write_run(tmp_path / "measured", 60.0)
    write_run(tmp_path / "text", 1.0, task="hyperpretrain")
    unmeasured = tmp_path / "unmeasured"
    write_run(unmeasured, 60.0)
    (unmeasured / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "seconds": 1.0}) + "\n")
    for folder in ("measured", "text", "unmeasured"):
        run("plot", tmp_path / folder, "--out", tmp_path / "a.png", program="report")
    run("plot", tmp_path / "measured", "--by", "shots", "--out", tmp_path / "a.png", program="report")
    accuracy = "accuracy on held-out rows, %"
    assert labels == [("step", accuracy), ("step", accuracy), ("step", "loss per token"), ("shots", accuracy)]
    (unmeasured / "log.jsonl").write_text("")
    assert "nothing to draw" in run("plot", unmeasured, "--out", tmp_path / "a.png", program="report", status=2).stderr
    assert "ends in .png" in run("plot", unmeasured, "--out", tmp_path / "curves", program="report", status=2).stderr


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
