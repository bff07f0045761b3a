"""The command: real runs of a few steps, resuming, several processes, bad input."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import FEW_TASKS, ONE_HELD_OUT, REAL_DATA, ROOT, SCORED, SHORT, SMALL, contents, needs_real_data
from conftest import part_of, random_llama, refusal, results, run, train, write_hf
from forker import launch, wait
from safetensors import safe_open

import eval as evaluation
import run as running
import train as training
from llama import InputError, load
from lora import load_tensors, save_tensors
from run import read_lines

P3 = ["--task p3", SHORT, "--model", SMALL]
PREFIX = ["--task prefix", SHORT, "--model", SMALL]
TEXT = ["--task hyperpretrain --gists 4 --limit 2 --measure 0 --batch-size 4 --model", SMALL]
TEXT += ["--context 60 --shortest-context 40 --query-length 33 --optimizer adamw --lr 3e-3 --gist-lr 3e-3"]


def tensors_of(out) -> dict:
    """All that was trained, and the optimizer's state."""
    tensors = {}
    for name in ("state", "adapters", "model", "gists"):
        if (out / f"{name}.safetensors").exists():
            own, about = load_tensors(out / f"{name}.safetensors")
            tensors |= {(name, key): tensor for key, tensor in own.items()} | {(name, "about"): about}
    return tensors


def log_of(out) -> list[dict]:
    """Without what no two runs share."""
    lines = []
    for line in read_lines(out / "log.jsonl"):
        lines.append({k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")})
    return [line for line in lines if "loss" in line] + [line for line in lines if "score" in line]


def losses(out) -> list[float]:
    return [line["loss"] for line in log_of(out) if "loss" in line]


def assert_same(one, other):
    """Two runs, bit for bit, with each step once in the log."""
    tensors, tensors2 = tensors_of(one), tensors_of(other)
    assert tensors.keys() == tensors2.keys()
    for key, value in tensors.items():
        assert torch.equal(value, tensors2[key]) if torch.is_tensor(value) else value == tensors2[key], key
    assert log_of(one) == log_of(other)
    steps = [line["step"] for line in log_of(one) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert results(one) | {"args": None} == results(other) | {"args": None}


# ----------------------------------------------------------------------------------------- the loop


def test_a_run_that_measures_also_says_where_it_began(tmp_path):
    """Step 0 of the log is "before", and the last is the result."""
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    said = train(plain, "--steps 1").stdout
    assert "before" not in said and said.splitlines()[-1].startswith("after ")
    assert results(plain)["before"] is None
    said = train(measured, "--steps 2 --measure 1 --controls").stdout
    scores = [line for line in log_of(measured) if "score" in line]
    assert [line["step"] for line in scores] == [0, 2]
    first, last, after = scores[0], scores[-1], results(measured)
    assert first["before"] == after["before"] and "before" not in last
    assert f"before {after['before']:.1f} → after {after['average']:.1f}" in said
    assert last["score"] == pytest.approx(after["average"], abs=0.01)
    assert last["controls"] == pytest.approx(after["controls"], abs=0.01)
    means = {name: task["mean"] for name, task in after["tasks"].items()}
    assert last["scores"] == pytest.approx(means, abs=0.01)

    shutil.copytree(FEW_TASKS, tmp_path / "other", symlinks=True)
    run(measured, SCORED, "--data", tmp_path / "other", program="eval")
    assert results(measured) == after, "other data have a folder of their own"
    assert results(measured / "data-other")["before"] is None
    shutil.copytree(FEW_TASKS, tmp_path / "more" / "other", symlinks=True)
    line = refusal(measured, SCORED, "--data", tmp_path / "more" / "other", program="eval")
    assert "data-other: holds the results of" in line


def test_the_schedule_warms_up_and_ends_at_zero():
    shares = [training.schedule(step, 100) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1.0 == max(shares) and 0 < shares[-1] < 0.02
    assert training.schedule(0, 1) == 1.0


# ------------------------------------------------------------------------------- runs of every kind

SNI = part_of("sni", 2, 2)
KINDS = [
    "p3 --downstream frozen --sets 2 --controls",
    "p3 --downstream lora",
    "p3 --downstream shared",
    "p3 --method fewshot",
    "p3 --method zeroshot",
    "p3 --emit lora --downstream lora",
    "p3 --quantize",
    "sni",
    "sni --instruction-downstream",
    "sni --fuse-instruction --downstream lora",
    "sni --method fewshot",
    "sni --method zeroshot",
    "symbol --method fewshot",
    "symbol --distill 1 --reconstruct 0.5 --gists-every 2 --weight-by-context",
    "sample",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_trains_all_its_tensors_and_evaluates_the_same_later(tmp_path, kind):
    if "--quantize" in kind:
        pytest.importorskip("bitsandbytes")
    task, _, options = kind.partition(" ")
    out = tmp_path / "run"
    data = {"p3": SHORT, "sni": ["--data", SNI]}.get(task, [])
    start = ["--task", task, "--batch-size 2 --lr 0.01 --measure 0", SCORED, data, "--steps 3", options]
    run(*start, "--out", out)
    after = results(out)
    assert after["task"] == task and after["metric"] == ("rougeL" if task == "sni" else "accuracy")
    assert after["method"] == (options.split()[1] if "--method" in kind else "hyper")
    assert len(losses(out)) == 3 and 0 <= after["average"] <= 100
    assert after["args"]["quantize"] == ("--quantize" in kind)
    moments = [tensor for (_, name), tensor in tensors_of(out).items() if name.startswith("exp_avg_sq.")]
    assert moments and all(moment.abs().max() > 0 for moment in moments), "one never had a gradient"
    names = load_tensors(out / "adapters.safetensors")[0]
    trained = {name.split(".lora.")[1].split(".")[0] if ".lora." in name else name for name in names}
    parts = {"hyper", "gists"} | ({"downstream"} if "--downstream lora" in kind else set())
    parts = {"downstream"} if "--method" in kind else parts
    heads = {name for name in names if name.startswith("heads.")}
    assert trained == parts | heads and bool(heads) == ("--emit lora" in kind), "the base is frozen"
    run(out, SCORED, "--sets 2 --controls" if "--controls" in kind else "", program="eval")
    assert results(out) == after


@pytest.mark.parametrize(
    "task", [P3, TEXT, [*PREFIX, "--init propagate"]], ids=["p3", "hyperpretrain", "prefix"]
)
def test_checkpointed_activations_change_no_bit(tmp_path, task):
    for name, options in (("plain", ""), ("checkpointed", "--checkpoint-activations")):
        run(*task, "--steps 2 --out", tmp_path / name, options)
    assert_same(tmp_path / "plain", tmp_path / "checkpointed")


@needs_real_data
def test_real_p3_files_train_and_evaluate(tmp_path):
    data = tmp_path / "P3"
    (data / "splits").mkdir(parents=True)
    names = ["super_glue_copa_C1_or_C2_premise_so_because_", "winogrande_winogrande_debiased_Replace"]
    held_out = ["hellaswag_complete_first_then", "super_glue_wsc.fixed_GPT_3_Style"]
    for name in names + held_out:
        source = "P3-tfrecord" if name.startswith("super_glue") else "P3"
        (data / name).symlink_to(REAL_DATA / source / name)
    (data / "splits" / "train_tasks.txt").write_text("\n".join(names))
    (data / "splits" / "test_tasks.txt").write_text("\n".join(held_out))
    said = train(tmp_path / "run", "--steps 2 --shots 16 --data", data).stdout
    assert len(losses(tmp_path / "run")) == 2 and results(tmp_path / "run")["tasks"].keys() == set(held_out)
    assert "left out, because the context was full" in said and "examples read" in said


@needs_real_data
def test_real_sni_files_train_and_evaluate(tmp_path):
    start = "--task sni --steps 2 --batch-size 1 --limit 1 --no-controls --measure 0"
    done = run(start, "--data", REAL_DATA / "natural-instructions", "--out", tmp_path / "run")
    assert "have no file: left out" in done.stderr and len(results(tmp_path / "run")["tasks"]) == 5


@pytest.mark.parametrize("init", "hyper shared random reparam propagate text anchors pooled".split())
def test_every_start_of_prefix_tuning_runs_resumes_and_evaluates(tmp_path, hypernetwork, init):
    out = tmp_path / "run"
    start = [*PREFIX, "--init", init]
    if init == "hyper":
        shutil.copytree(hypernetwork, tmp_path / "own")
        start = ["--task prefix", SHORT, "--run", tmp_path / "own", "--measure 1"]
    start += ["--batch-size 1 --steps 2 --save-every 1 --out", out]
    run(*start)
    log, after, tensors = log_of(out), results(out), tensors_of(out)
    if init == "hyper":
        assert [line["step"] for line in log if "score" in line] == [0, 2] and len(log[-1]["scores"]) == 2
        assert after["average"] == pytest.approx(log[-1]["score"], abs=0.01)
        # What a prefix started from needn't be there any more.
        (tmp_path / "own").rename(tmp_path / "gone")
    run(out, SCORED, program="eval")
    assert results(out) == after | {"before": None}
    if init == "hyper":
        (tmp_path / "gone").rename(tmp_path / "own")
    (out / "results.json").unlink()
    (out / "adapters.safetensors").unlink()
    run(*start, "--resume")  # nothing is left to train: the same prefixes
    again = tensors_of(out)
    assert results(out) == after and tensors.keys() == again.keys()
    assert all(torch.equal(x, again[key]) for key, x in tensors.items() if torch.is_tensor(x))


def test_a_tuned_prefix_is_used_for_its_own_task_alone(tmp_path):
    data = tmp_path / "P3"
    shutil.copytree(FEW_TASKS, data, symlinks=True)
    train(tmp_path / "run", "--task prefix --init text --steps 1 --data", data)
    names = (data / "splits" / "test_tasks.txt").read_text().split()
    (data / "splits" / "test_tasks.txt").write_text("\n".join(reversed(names)))
    assert "other tasks" in refusal(tmp_path / "run", "--limit 2", program="eval")


def test_the_same_command_twice_has_the_same_results_with_a_network_or_without(tmp_path, monkeypatch):
    train(tmp_path / "one", "--steps 2")
    monkeypatch.setattr("socket.socket.connect", None)  # a TypeError where one is made
    train(tmp_path / "two", "--steps 2")
    assert_same(tmp_path / "one", tmp_path / "two")


# ------------------------------------------------------------------- the loss, however rows are divided

FORMS = {
    "all terms, shared": [
        *P3, "--distill 1 --reconstruct 0.5 --weight-by-context --gists-every 2 --downstream shared",
    ],
    "chain": [*P3, "--chain 2 --distill 1"],
    "average": [*P3, "--average 2"],
    "emit": [*P3, "--emit lora"],
    "prefix": [*PREFIX, "--init text"],
    "shared prefix": [*PREFIX, "--init shared"],
    "text": [*TEXT, "--lm 0.5 --reconstruct 0.5"],
}  # fmt: skip
needs_fsdp = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="before torch 2.7")


@pytest.mark.parametrize("form", [pytest.param(f, marks=needs_fsdp) if f == "text" else f for f in FORMS])
def test_losses_depend_neither_on_processes_nor_on_accumulation(tmp_path, form):
    """Each term is a sum over tokens, divided by their number in the whole step."""
    start = [*FORMS[form], "--steps 2 --limit 1"]
    processes = 3 if "prefix" in form else 2
    one, divided, log = tmp_path / "one", tmp_path / "divided", tmp_path / "log"
    several = "--batch-size 3 --accumulate 2" if "prefix" in form else "--batch-size 2 --accumulate 3"
    pids = launch(log, *start, several, "--out", divided, processes=processes)
    run(*start, "--batch-size 6 --out", one)
    assert wait(pids) == [0] * processes, log.read_text()
    for field, tolerance in (("loss", 2e-6), ("norm", None)):
        expected = [line[field] for line in log_of(one) if "loss" in line]
        assert len(expected) == 2
        found = [line[field] for line in log_of(divided) if "loss" in line]
        assert found == pytest.approx(expected, abs=tolerance, rel=1e-4)
    if (one / "adapters.safetensors").exists():  # (Adam makes much of a gradient that is almost zero)
        tensors = (load_tensors(out / "adapters.safetensors")[0] for out in (one, divided))
        torch.testing.assert_close(*tensors, atol=1e-3, rtol=1e-3)


# -------------------------------------------------- compression hyperpretraining, several processes


def test_a_hyperpretrained_model_can_be_used(tmp_path):
    out = tmp_path / "c"
    run(*TEXT, "--steps 2 --out", out)
    after = results(out)
    assert after["metric"] == "loss" and after["kept"] is not None and after["baselines"]["fewshot"] > 0
    run(out, "--limit 2", program="eval")
    assert results(out) | {"args": None} == after | {"args": None}
    run(out, "--limit 1 --out", tmp_path / "one", program="eval")
    one = results(tmp_path / "one")
    assert one["controls"]["other_task"] != one["average"], "another text's, also where there is one text"
    train(tmp_path / "run", "--steps 1 --model", out)  # 4 gists: the checkpoint's own
    own, gists = load(out), load_tensors(out / "gists.safetensors")[0]["gists"]
    assert not torch.equal(own.embed_tokens.weight, load(ROOT / "tiny" / "llama").embed_tokens.weight)
    args = training.parse(["--task", "p3", "--model", str(out), "--gists", "4"])[0]
    assert torch.equal(running.open_run(args).hyper.gists, gists)


def test_hyperpretraining_with_gists_among_the_text_is_measured_and_evaluated_with_them_there(tmp_path):
    out = tmp_path / "c"
    options = "--steps 1 --measure 1 --limit 2 --gists-every 4 --fewest-gists 2 --lm 0.5"
    run(*TEXT, options, "--held-out", FEW_TASKS, "--out", out)
    assert [line["step"] for line in log_of(out) if "score" in line] == [0, 1]
    before = results(out)
    run(out, "--limit 2", program="eval")
    assert results(out)["average"] == before["average"]
    run(*TEXT, options.replace("--gists-every 4", ""), "--held-out", FEW_TASKS, "--out", tmp_path / "end")
    assert results(tmp_path / "end")["average"] != before["average"]


def test_heads_that_were_hyperpretrained_are_evaluated_and_trained_further(tmp_path):
    out = tmp_path / "c"
    run(*TEXT, "--steps 2 --emit lora --out", out)
    before = results(out)
    run(out, "--limit 2", program="eval")
    assert results(out)["average"] == before["average"] != before["controls"]["other_task"]
    args = training.parse(["--task", "p3", "--model", str(out), "--gists", "4", "--emit", "lora"])[0]
    heads = running.open_run(args).hyper.heads
    own = load_tensors(out / "gists.safetensors")[0]
    assert own.pop("gists").shape[0] == 4 and own["heads.q"].any(), "it is zero at the start"
    for name, parameter in heads.named_parameters():
        assert torch.equal(parameter, own.pop(f"heads.{name}"))
    assert not own


def state_of(step: int) -> int:
    """Moments of writing until its state, the first, is in place: args.json, log, lines, state; two each."""
    return 6 + 2 * step


@needs_fsdp
def test_another_number_of_processes_goes_on_with_a_sharded_run(tmp_path):
    """FSDP: 2 steps by one process = 1 by two, killed, and 1 by one = 1 by one and 1 by two."""
    start, log = [*TEXT, "--steps 2 --save-every 1"], tmp_path / "log"
    run(*start, "--out", tmp_path / "one")
    for first, then in ((2, 1), (1, 2)):
        out = tmp_path / f"{first}-{then}"
        statuses = wait(launch(log, *start, "--out", out, processes=first, kill_at=state_of(1)))
        assert -signal.SIGKILL in statuses and len(losses(out)) == 1, log.read_text()
        assert wait(launch(log, "--resume --out", out, processes=then)) == [0] * then, log.read_text()
        assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        states = (load_tensors(folder / "state.safetensors")[0] for folder in (tmp_path / "one", out))
        torch.testing.assert_close(*states, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------------------- stopped at any moment


@pytest.mark.parametrize("task", [[*P3, "--measure 2"], TEXT], ids=["p3", "hyperpretrain"])
def test_a_run_killed_at_every_write_ends_as_if_never_killed(tmp_path, task):
    """Killed at its first write, at the second of the next attempt, and so on: the same bits at the end."""
    data = ["--data", ONE_HELD_OUT] if task is not TEXT else []
    start = [*task, data, "--limit 1 --batch-size 2 --steps 2 --save-every 1"]
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    assert wait(launch(log, *start, "--out", whole)) == [0], log.read_text()
    for moment in range(1, 100):
        # A run that has saved nothing has nothing to go on from, and is started again.
        how = "--resume" if (cut / "state.safetensors").exists() else "--overwrite"
        (status,) = wait(launch(log, *start, "--out", cut, how, kill_at=moment))
        if status == 0:
            break
        assert status == -signal.SIGKILL, log.read_text()
    assert moment > 12
    assert not list(cut.glob("*.partial")) and not list(cut.glob("scores-*"))
    assert_same(whole, cut)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_ctrl_c_is_one_line_and_the_last_checkpoint_stays(tmp_path, kind):
    """Once or many times, in the middle of a step of many batches."""
    out, log = tmp_path / "run", tmp_path / "log"
    (pid,) = launch(log, *P3, "--out", out, "--steps 4 --save-every 1 --accumulate 300")
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    for _ in range(5):
        os.kill(pid, kind)
        time.sleep(0.01)
    assert wait([pid]) == [130]
    assert log.read_text().splitlines()[-1] == "interrupted" and "Traceback" not in log.read_text()
    assert not out.exists(), "a run that ended before its first step leaves nothing"


def test_ctrl_c_during_the_imports_is_at_most_one_line_for_every_command(tmp_path):
    """While torch is imported; and later, for one of them."""
    tools = [path.stem for path in sorted((ROOT / "tools").glob("[a-z]*.py"))]
    commands = [["train.py"], ["eval.py"], ["gist.py"], *(["-m", f"tools.{name}"] for name in tools)]
    for package, commands in (("torch", commands), ("sentencepiece", commands[:1])):
        (tmp_path / package).mkdir()
        fake = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
        (tmp_path / package / f"{package}.py").write_text(fake)
        env = os.environ | {"PYTHONPATH": str(tmp_path / package)}
        for start in commands:
            argv = [sys.executable, *start]
            done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
            assert done.returncode == -signal.SIGINT and done.stderr == "", start  # (a shell says 130)


def test_an_interrupted_or_divided_evaluation_has_the_same_numbers(tmp_path, hypernetwork, monkeypatch):
    asked = [hypernetwork, "--limit 2 --sets 2"]
    scored, score, most = [], evaluation.score, 1000

    def counting(*args):
        if len(scored) == most:
            raise KeyboardInterrupt
        scored.append(args)
        return score(*args)

    monkeypatch.setattr(evaluation, "score", counting)
    run(*asked, "--out", tmp_path / "whole", program="eval")
    total, most = len(scored), 7
    scored.clear()
    run(*asked, "--out", tmp_path / "cut", program="eval", status=130)
    (kept,) = (tmp_path / "cut").glob("scores-*.jsonl")
    assert len(list(read_lines(kept))) == 7
    with open(kept, "a") as file:
        file.write('["abc')  # a line that was torn
    most = total
    run(*asked, "--out", tmp_path / "cut", program="eval")
    assert len(scored) == total, "what was scored isn't scored again"
    log = tmp_path / "log"
    pids = launch(log, *asked, "--out", tmp_path / "two", module="eval", processes=2)
    assert wait(pids) == [0, 0], log.read_text()
    whole, cut, two = (results(tmp_path / out) for out in ("whole", "cut", "two"))
    assert whole == cut == two
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [".hyperllama", "results.json"]


def test_a_full_disk_leaves_the_last_state(tmp_path):
    """A limit on the size of files stands for the disk: the state of step 4 can't be written."""
    start = [*P3, "--steps 6 --save-every 2"]
    out, log = tmp_path / "cut", tmp_path / "log"
    assert wait(launch(log, *start, "--out", tmp_path / "whole")) == [0]
    assert wait(launch(log, *start, "--out", out, kill_at=state_of(2))) == [-signal.SIGKILL]
    saved = (out / "state.safetensors").read_bytes()
    log.unlink()
    assert wait(launch(log, "--resume --out", out, most_bytes=len(saved) // 2)) == [2]
    assert "Traceback" not in log.read_text()
    assert "state.safetensors: can't be written" in log.read_text().strip().splitlines()[-1]
    assert (out / "state.safetensors").read_bytes() == saved and not list(out.glob("*.partial"))
    assert wait(launch(log, "--resume --out", out)) == [0]
    assert_same(tmp_path / "whole", out)


@pytest.fixture(scope="module")
def half_a_run(tmp_path_factory):
    """A run of two steps, of which one is saved: the second isn't finite."""
    out = tmp_path_factory.mktemp("half") / "run"
    train(out, "--steps 2 --save-every 1 --lr 1e30", status=2)
    return out


def test_a_loss_that_is_not_a_number_leaves_the_last_state(half_a_run):
    with safe_open(half_a_run / "state.safetensors", "pt") as file:
        assert int(file.metadata()["steps"]) == len(list(read_lines(half_a_run / "log.jsonl"))) == 1
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())


@pytest.mark.parametrize("change, message", [
    ({"exp_avg.gists": torch.zeros(2)}, "exp_avg.gists is"),
    ({"exp_avg_sq.gists": None}, "exp_avg_sq.gists is missing"),
    ({"exp_avg.gists": torch.full((4, 128), torch.nan)}, "exp_avg.gists holds NaN"),
    ({"gists": torch.zeros(4, 128, dtype=torch.int32)}, "gists is torch.int32"),
    ("1" * 5000, "step 1111"), ("-1", "step -1"), ("3.5", "step 3.5"), ("99", "step 99"), ("nan", "step nan"),
    ("base", "another model"),
], ids=range(10))  # fmt: skip
def test_a_crafted_state_or_one_of_another_model_is_refused(tmp_path, half_a_run, change, message):
    out = tmp_path / "run"
    shutil.copytree(half_a_run, out)
    tensors, about = load_tensors(out / "state.safetensors")
    if isinstance(change, dict):
        tensors = {name: t for name, t in (tensors | change).items() if t is not None}
    else:
        about |= {"base": "another"} if change == "base" else {"steps": change}
    save_tensors(out / "state.safetensors", tensors, about)
    assert message in refusal("--resume --out", out)


def test_a_log_that_was_torn_is_mended(hypernetwork, finished):
    with open(finished / "log.jsonl", "ab") as log:
        log.write(b'{"step": 5, "lo\xff\xfe')
    run("--resume --out", finished)
    assert_same(hypernetwork, finished)


# ---------------------------------------------------------------------------------------- bad input

BAD = [
    ("--shots 500", "too few"),
    ("--context 4000", "positions"),
    ("--method zeroshot --downstream lora", "--downstream"),
    ("--gists 0", "positive"),
    ("--lr nan", "--lr"),
    ("--lr 0", "--lr"),
    ("--gist-lr -1", "--gist-lr"),
    ("--alpha inf", "--alpha"),
    ("--seed -1", "--seed"),
    ("--rank 10000000000", "--rank"),
    ("--device meta", "--device meta"),
    ("--device gpu", "--device"),
    ("--gists 600 --context 600", "no room"),
    ("--measure -1", "--measure"),
    ("--resume", "no such folder"),
    ("--resume --overwrite", "exclude"),
    (["--out", ""], "--out: an empty name"),
    ("--fuse-instruction", "belongs to --task sni"),
    ("--instruction-downstream", "--instruction-downstream has no meaning for --task p3"),
    ("--words w", "--words belongs"),
    ("--lm 0.5", "belongs to --task hyperpretrain"),
    ("--init random", "belongs to --task prefix"),
    ("--average 2 --concat 2", "exclude"),
    ("--chain 2 --concat 2", "exclude"),
    ("--gists-every 4 --gists-spread", "exclude"),
    ("--gists-every 17", "only 16 --shots"),
    ("--emit lora --gists 3", "even number of gists"),
    ("--distill 1 --method fewshot", "belong to a hypernetwork"),
    ("--task prefix", "needs --run"),
    ("--task prefix --run NOTHING", "no such folder"),
    ("--task prefix --init random --run EMPTY", "no other --init"),
    ("--task prefix --init random --gists-every 4", "--gists-every belongs to a hypernetwork"),
    ("--task prefix --init text --method fewshot", "--method has no meaning"),
    ("--task prefix --init text --optimizer muon", "--optimizer has no meaning"),
    ("--task prefix --init text --gists 600", "don't give"),
    ("--task prefix --init propagate --gists 100", "words of the vocabulary"),
    ("--task prefix --init text --rank 4", "--rank has no meaning"),
    ("--task sni --sets 3", "there is one set"),
    ("--task sni --gists-every 1 --fuse-instruction", "exclude"),
    ("--task sni --score mean", "--score has no meaning for --task sni"),
    ("--task sni --average 2", "one set of examples"),
    ("--task sni --data EMPTY", "no splits/default"),
    ("--task symbol --data EMPTY", "no train sets"),
    ("--task symbol --words NOTHING", "not a file of words"),
    ("--task hyperpretrain --optimizer adamw --data EMPTY", "no .jsonl"),
    ("--task hyperpretrain --quantize", "--quantize has no meaning"),
    ("--task hyperpretrain --downstream lora", "--downstream has no meaning"),
    ("--task hyperpretrain --chain 2", "one set of examples"),
    ("--task hyperpretrain --fewest-gists 17", "must not exceed --gists 16"),
    ("--task hyperpretrain --fewest-gists 2 --anchors", "--anchors have no gists"),
    ("--fewest-gists 2", "belongs to --task hyperpretrain"),
    ("--model NOTHING", "no such folder"),
    ("--model EMPTY", "not a Llama checkpoint"),
    ("--model SMALL", "tokenizer.model"),
    ("--data NOTHING", "no such folder"),
    ("--data EMPTY", "no training tasks"),
]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    out = tmp_path / "runs" / "run"
    folders = {"NOTHING": tmp_path / "no", "EMPTY": tmp_path / "empty", "SMALL": tmp_path / "small"}
    folders["EMPTY"].mkdir()
    write_hf(folders["SMALL"], random_llama())
    for options, message in BAD:
        words = options if isinstance(options, list) else options.split()
        line = refusal("--task p3 --out", out, [folders.get(word, word) for word in words])
        assert message in line and not list(tmp_path.glob("runs/*")), options


def test_a_finished_run_is_neither_overwritten_nor_resumed_as_another(tmp_path, finished):
    before = contents(finished)
    start = ["--task p3", SHORT, "--steps 2 --out", finished]
    assert "--overwrite" in refusal(*start)
    assert "seed = 3, but the run has 0" in refusal(*start, "--resume --seed 3")
    assert contents(finished) == before
    kept = results(finished)
    run("--resume --out", finished)  # needs no other option
    assert results(finished) == kept
    train(finished, "--steps 1 --overwrite --seed 3")
    assert len(losses(finished)) == 1 and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_only_what_a_run_wrote_is_ever_deleted(tmp_path, finished):
    """Folders that look like a run, by name or file; a run that somebody put something into; results."""
    for name in ("mine.partial", "args", "theirs", "run/shared", "run/average-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "args" / "args.json").write_text("{}")
    (tmp_path / "theirs" / "results.json").write_text('{"my": "precious"}')
    for folder, path in (
        ("mine.partial", "mine.partial/thesis.txt"),
        ("args", "args/args.json"),
        ("run", "run/thesis.txt"),
        ("run", "run/shared/thesis.txt"),
        ("run", "run/average-notes/thesis.txt"),
    ):
        if not (tmp_path / path).exists():
            (tmp_path / path).write_text("precious")
        before = contents(tmp_path)
        assert "no run wrote" in refusal(*P3, "--steps 1 --overwrite --out", tmp_path / folder)
        assert contents(tmp_path) == before
        (tmp_path / path).unlink()
    (finished / "my.partial").write_text("precious")
    (finished / "state.safetensors.partial").write_text("torn")
    run("--resume --out", finished)
    assert (finished / "my.partial").exists() and not (finished / "state.safetensors.partial").exists()
    for out, message in (("theirs", "no run wrote"), ("theirs/results.json", "is a file")):
        assert message in refusal(finished, "--out", tmp_path / out, program="eval")
    assert (tmp_path / "theirs" / "results.json").read_text() == '{"my": "precious"}'


def test_a_finished_run_without_a_state_is_never_begun_again(tmp_path, finished):
    """tiny/llama-c is one: --resume has nothing to go on from, and would replace log and model."""
    (finished / "state.safetensors").unlink()
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "c")
    before = contents(tmp_path)
    for out in (finished, tmp_path / "c"):
        assert "nothing to resume from" in refusal("--resume --out", out)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("option", ["--model", "--data"])
def test_a_run_never_lies_in_around_or_at_what_it_reads(tmp_path, option):
    source = tmp_path / "around" / "source"
    shutil.copytree(ROOT / "tiny" / "llama-c" if option == "--model" else FEW_TASKS, source, symlinks=True)
    (source / ".hyperllama").touch()
    before = contents(tmp_path)
    for out in (source, source / "inside", tmp_path / "around"):
        line = refusal(*P3, "--steps 1 --overwrite", option, source, "--out", out)
        assert f"lies in, around or at {option}" in line
    assert contents(tmp_path) == before


def test_a_run_is_replaced_only_by_one_that_can_begin(tmp_path, finished):
    """What is wrong with the options, the data or the model is found before the old run's files go."""
    before = contents(finished)
    starts = ("--init text", "--init propagate", ["--init hyper --run", tmp_path])
    of_prefixes = [[*PREFIX, "--steps 1 --gists 600", options] for options in starts]
    of_p3 = ("--shots 500", ["--model", tmp_path], "--gists 1000", ["--data", tmp_path])
    for options in [*of_prefixes, *([*P3, "--steps 1", options] for options in of_p3)]:
        refusal(*options, "--overwrite --out", finished)
        assert contents(finished) == before


def test_two_commands_cannot_write_into_one_folder(tmp_path, finished):
    """Training and evaluation alike."""
    (pid,) = launch(tmp_path / "log", *P3, "--out", finished, "--overwrite --steps 2000")
    while (finished / "results.json").exists():
        time.sleep(0.005)
    try:
        for how in ("--overwrite", "--resume"):
            line = refusal(*P3, "--steps 2000 --out", finished, how)
            assert "another command is writing here" in line or "nothing to resume from" in line
        assert "another command is writing here" in refusal(finished, program="eval")
    finally:
        os.kill(pid, signal.SIGKILL)
        wait([pid])
    assert not (finished / "results.json").exists()
    train(finished, "--steps 1 --overwrite")  # the lock ends with the process
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def test_a_run_folder_may_be_a_link_or_the_folder_we_are_in(tmp_path, monkeypatch):
    (tmp_path / "far" / "run").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "far" / "run")
    monkeypatch.chdir(tmp_path / "far" / "run")
    for out, how in ((link, ""), (link, "--overwrite"), (Path("."), "--overwrite")):
        train(out, "--steps 1", how)
        assert (tmp_path / "far" / "run" / "results.json").exists() and link.is_symlink()
        monkeypatch.chdir(tmp_path / "far" / "run")
    assert [path.name for path in (tmp_path / "far").iterdir()] == ["run"]


def test_results_are_kept_where_nothing_can_be_printed(finished, monkeypatch):
    (finished / "results.json").unlink()
    shell = f"{sys.executable} eval.py {finished} {SCORED} > /dev/full"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "No space left" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert results(finished)["average"] >= 0
    (finished / "results.json").unlink()
    for name in ("stdout", "stderr"):  # where they are closed, Python has none
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["eval.py", str(finished), *SCORED.split()])
    running.run_command(evaluation.main)
    assert results(finished)["average"] >= 0


def test_a_path_in_a_run_works_from_any_folder_and_says_when_it_moved(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    train("run", "--steps 1 --model model")
    monkeypatch.chdir("/")
    run(tmp_path / "run", SCORED, program="eval")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    gone = refusal(tmp_path / "run", SCORED, program="eval")
    assert f"{tmp_path / 'model'}: no such folder" in gone and "--model says where it is now" in gone
    run(tmp_path / "run", SCORED, "--model", tmp_path / "elsewhere", program="eval")


def changed_base(folder, name: str, change) -> Path:
    """A copy of C in which a tensor is changed."""
    shutil.copytree(ROOT / "tiny" / "llama-c", folder)
    tensors, about = load_tensors(folder / "model.safetensors")
    change(tensors[name])
    save_tensors(folder / "model.safetensors", tensors, about)
    return folder


def test_a_model_with_other_weights_in_any_layer_is_refused(tmp_path, hypernetwork):
    name = "model.layers.2.mlp.up_proj.weight"
    other = changed_base(tmp_path / "other", name, lambda tensor: tensor.mul_(2))
    asked = [hypernetwork, "--limit 1 --model", other, "--out", tmp_path / "e"]
    assert "was trained on another model" in refusal(*asked, program="eval")


@pytest.mark.parametrize("task", ["p3", "sni"])
def test_scores_that_are_not_finite_are_refused(tmp_path, task):
    name = "model.layers.0.mlp.down_proj.weight"
    broken = changed_base(tmp_path / "broken", name, lambda tensor: tensor[0].fill_(torch.nan))
    asked = ["--task", task, "--method zeroshot --limit 1 --model", broken, "--out", tmp_path / "run"]
    assert "aren't finite" in refusal(*asked, program="eval")
    assert not (tmp_path / "run" / "results.json").exists()


def test_several_sets_are_counted_as_they_are_read(tmp_path, hypernetwork):
    """Each set is read in a context of its own; in context, there is one."""
    run(hypernetwork, "--average 3", SCORED, "--out", tmp_path / "three", program="eval")
    assert results(hypernetwork)["shots"] == {"hyper": 4, "fewshot": 4}
    assert results(tmp_path / "three")["shots"] == {"hyper": 12, "fewshot": 4}


def test_a_run_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("train.open_run", None)  # nothing may have been loaded
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refusal("--task p3 --out", tmp_path / "file" / "run")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "not a folder" in refusal("--task p3 --out", tmp_path / "loop")
    if os.geteuid():  # nothing is closed to root
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "not writable" in refusal("--task p3 --out", tmp_path / "closed" / "run")


@pytest.mark.parametrize(
    "problem, status, line",
    [
        (InputError("x.json: is damaged"), 2, "error: x.json: is damaged"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
        (ImportError("No module named 'peft'", name="peft"), 2,
            "error: No module named 'peft' (pip install -r requirements.txt installs what is needed)"),
        (ImportError("cannot import name 'x' from 'data'", name="data"), 2,
            "error: cannot import name 'x' from 'data'"),
        (ImportError("No module named 'tasks.mine'", name="tasks.mine"), 2,
            "error: No module named 'tasks.mine'"),
        (RuntimeError("can't allocate memory: you tried\nmore"), 2,
            "error: out of memory; a smaller --batch-size or --eval-tokens may help (can't allocate memory: "
            "you tried)"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2,
            "error: out of memory; a smaller --batch-size or --eval-tokens may help (CUDA out of memory)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_ends_in_one_line(capsys, problem, status, line):
    with pytest.raises(SystemExit) as ended:
        running.run_command(mock.Mock(side_effect=problem))
    assert (ended.value.code, capsys.readouterr().err) == (status, line + "\n")


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        running.run_command(mock.Mock(side_effect=RuntimeError("shapes don't fit")))
