"""The command: real runs of a few steps, resuming, bad input."""

import argparse
import fcntl
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FEW_TASKS, REAL_DATA, ROOT, SHORT, command, needs_real_data, random_hyper, random_llama, run, train, write_hf
from safetensors import safe_open

import tasks
import eval as evaluation
import tools
import train as training
from data import again, collate
from llama import load
from lora import load_tensors, read_lines, save_tensors


def contents(out):
    tensors = {}
    for name in ("adapters.safetensors", "state.safetensors"):  # of a run that trains adapters
        with safe_open(out / name, "pt") as file:
            tensors |= {(name, key): file.get_tensor(key) for key in file.keys()}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in log]
    results = json.loads((out / "results.json").read_text()) | {"seconds": None}
    return tensors, log, results


def assert_same(one, other):
    assert_equal(contents(one), contents(other))


def assert_equal(one, other):
    (tensors, log, results), (tensors2, log2, results2) = one, other
    assert tensors.keys() == tensors2.keys() and all(torch.equal(tensors[k], tensors2[k]) for k in tensors)
    assert log == log2 and [line["step"] for line in log] == list(range(1, len(log) + 1))
    assert {**results, "args": None} == {**results2, "args": None}


# ----------------------------------------------------------------------------------------- the loop


def test_a_run_that_measures_also_says_where_it_began(tmp_path):
    plain = train(tmp_path / "plain", "--steps", "1")
    measured = train(tmp_path / "measured", "--steps", "1", "--measure", "1")
    assert "before" not in plain.stdout and plain.stdout.splitlines()[-1].startswith("after ")
    before, after = json.loads((tmp_path / "plain" / "results.json").read_text()), json.loads((tmp_path / "measured" / "results.json").read_text())
    assert before["before"] is None and f"before {after['before']:.1f} → after {after['average']:.1f}" in measured.stdout
    (first, *_) = [json.loads(line) for line in (tmp_path / "measured" / "log.jsonl").read_text().splitlines()]
    assert first["step"] == 1 and "score" in first


def test_accumulated_batches_have_the_loss_of_one_batch(tmp_path):
    """Two batches in one step = one batch of both: a mean of means would weigh tokens differently."""
    rows = [([1, 5, 6, 50, 51, 52], [1, 7], [8, 9, 2]), ([1, 4, 50, 51, 52], [1, 3, 3], [2])]
    parts = [collate([e], [0], [p], [t]) for e, p, t in rows]
    whole = collate([r[0] for r in rows], [0, 1], [r[1] for r in rows], [r[2] for r in rows])
    batch_of = {(0,): parts[0], (1,): parts[1], (0, 1): whole}
    lines, states = [], []
    for accumulate, size in ((2, 1), (1, 2)):
        args = argparse.Namespace(seed=0, steps=1, accumulate=accumulate, batch_size=size, lr=1e-3, gist_lr=1e-3, save_every=1, optimizer="adamw", distill=0.0, weight_by_context=False)
        out = tmp_path / str(accumulate)
        out.mkdir()
        training.train(random_hyper(), lambda seed, numbers: batch_of[tuple(numbers)], args, out, False, rank=0, world=1)
        lines.append(json.loads((out / "log.jsonl").read_text()))
        states.append(load_tensors(out / "state.safetensors")[0])
    for field in ("loss", "norm"):
        assert lines[0][field] == pytest.approx(lines[1][field], abs=1e-6)
    share = 1 - training.BETAS[0]  # of the gradient, in the first step's mean of gradients
    gradients = [{name: t / share for name, t in state.items() if name.startswith("exp_avg.")} for state in states]
    assert len(gradients[0]) == len(states[0]) / 3
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_the_schedule_warms_up_and_ends_at_zero():
    shares = [training.schedule(step, 100) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1.0 == max(shares) and 0 < shares[-1] < 0.02
    assert training.schedule(0, 1) == 1.0


# ------------------------------------------------------------------------------- runs of every kind

VARIANTS = [
    ["--downstream", "frozen"], ["--downstream", "lora"], ["--downstream", "shared"],
    ["--method", "fewshot"], ["--method", "zeroshot"], ["--emit", "lora"], ["--emit", "lora", "--downstream", "lora"],
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_every_variant_trains_all_its_tensors_and_evaluates_the_same_later(tmp_path, variant):
    out = tmp_path / "run"
    train(out, "--steps", "3", *variant)
    tensors, log, results = contents(out)
    assert len(log) == 3 and 0 <= results["average"] <= 100 and results["method"] == (variant[1] if "--method" in variant else "hyper")
    for (file, name), tensor in tensors.items():
        if name.startswith("exp_avg_sq."):
            assert tensor.abs().max() > 0, f"{name} never had a gradient"
    before = json.loads((out / "results.json").read_text())
    run(out, "--limit", "4", "--sets", "2", program="eval")
    after = json.loads((out / "results.json").read_text())
    assert after | {"seconds": 0} == before | {"seconds": 0}


def test_a_quantized_run_works(tmp_path):
    pytest.importorskip("bitsandbytes")
    train(tmp_path / "run", "--steps", "2", "--quantize")
    assert contents(tmp_path / "run")[2]["args"]["quantize"] is True


PRETRAIN = ["--task", "hyperpretrain", "--batch-size", "4", "--gists", "4", "--save-every", "2", "--limit", "4", "--measure", "0"]
PRETRAIN += ["--optimizer", "adamw", "--lr", "3e-3", "--gist-lr", "3e-3"]


@pytest.mark.parametrize("task", [
    ["--task", "p3", *SHORT], PRETRAIN, ["--task", "prefix", "--init", "propagate", *SHORT],
], ids=lambda task: task[1])  # fmt: skip
def test_checkpointed_activations_change_no_bit(tmp_path, task):
    states = []
    for name, options in (("plain", []), ("checkpointed", ["--checkpoint-activations"])):
        run(*task, "--steps", "2", "--out", tmp_path / name, *options)
        states.append(load_tensors(tmp_path / name / "state.safetensors")[0])
    plain, checkpointed = states
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)


@pytest.mark.parametrize("task, variant", [
    ("sni", []), ("sni", ["--instruction-downstream"]), ("sni", ["--fuse-instruction", "--downstream", "lora"]),
    ("sni", ["--method", "fewshot"]), ("sni", ["--method", "zeroshot"]), ("symbol", []), ("symbol", ["--method", "fewshot"]),
    ("symbol", ["--distill", "1", "--reconstruct", "0.5", "--gists-every", "2", "--weight-by-context"]),
], ids=str)  # fmt: skip
def test_every_task_runs_and_evaluates_the_same_later(tmp_path, task, variant):
    out = tmp_path / "run"
    short = ["--steps", "2", "--batch-size", "2", "--limit", "2", "--sets", "2", "--no-controls", "--measure", "0"]
    if task == "sni":  # two of the held-out tasks: answers of an untrained model are long
        source, data = ROOT / "tiny" / "natural-instructions", tmp_path / "sni"
        (data / "splits" / "default").mkdir(parents=True)
        (data / "tasks").symlink_to(source / "tasks")
        for part in ("train", "test"):
            names = (source / "splits" / "default" / f"{part}_tasks.txt").read_text().split()
            (data / "splits" / "default" / f"{part}_tasks.txt").write_text("\n".join(names[:2]))
        short += ["--data", data]
    run("--task", task, *short, "--out", out, *variant)
    before = contents(out)[2]
    assert before["task"] == task and before["metric"] == {"sni": "rougeL", "symbol": "accuracy"}[task]
    run(out, "--limit", "2", "--sets", "2", "--no-controls", program="eval")
    assert contents(out)[2] == before


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
    done = train(tmp_path / "run", "--steps", "2", "--data", data, "--shots", "16")
    _, log, results = contents(tmp_path / "run")
    assert len(log) == 2 and results["tasks"].keys() == set(held_out)
    assert "left out, because the context was full" in done.stdout and "examples read" in done.stdout


@needs_real_data
def test_real_sni_files_train_and_evaluate(tmp_path):
    data, out = REAL_DATA / "natural-instructions", tmp_path / "run"
    done = run("--task", "sni", "--steps", "2", "--batch-size", "1", "--limit", "1", "--no-controls", "--measure", "0", "--data", data, "--out", out)
    assert "have no file and are left out" in done.stderr and len(contents(out)[2]["tasks"]) == 5


HELD_OUT = len((ROOT / "tiny" / "P3" / "splits" / "test_tasks.txt").read_text().split())


@pytest.mark.parametrize("init", ["hyper", "shared", "random", "reparam", "text", "propagate"])
def test_every_start_of_prefix_tuning_runs_resumes_and_evaluates(tmp_path, hypernetwork, init):
    out = tmp_path / "run"
    start = ["--task", "prefix", "--gists", "4", "--shots", "4", "--limit", "4", "--batch-size", "1", "--measure", "10", "--init", init]
    start += ["--steps", "4", "--save-every", "2", "--sets", "1", "--out", out, *(["--run", hypernetwork] if init == "hyper" else [])]
    run(*start)
    tensors, log, results = contents(out)
    assert [line["step"] for line in log if "score" in line] == [1, 2, 3, 4] and len(log[-1]["scores"]) == HELD_OUT
    assert results["average"] == pytest.approx(log[-1]["score"], abs=0.01)
    run(out, "--limit", "4", "--sets", "1", program="eval")
    assert contents(out)[2] == results
    (out / "results.json").unlink()
    (out / "adapters.safetensors").unlink()
    run(*start, "--resume")  # nothing is left to train: the same prefixes, with the same offsets
    again = contents(out)
    assert again[2] == results and all(torch.equal(tensors[key], again[0][key]) for key in tensors)


def test_the_last_scores_along_the_way_are_those_of_the_end(tmp_path):
    train(tmp_path / "run", "--steps", "4", "--measure", "2", "--sets", "1")
    _, log, results = contents(tmp_path / "run")
    assert [line["step"] for line in log if "score" in line] == [1, 2, 4]
    assert log[-1]["score"] == pytest.approx(results["average"], abs=0.01)
    assert log[-1]["controls"] == pytest.approx(results["controls"], abs=0.01)
    assert log[-1]["scores"] == pytest.approx({name: task["mean"] for name, task in results["tasks"].items()}, abs=0.01)


def test_the_same_command_twice_has_the_same_results(tmp_path):
    for name in ("one", "two"):
        train(tmp_path / name, "--steps", "2")
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_run_never_talks_to_the_network(tmp_path, monkeypatch):
    def connect(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", connect)
    train(tmp_path / "run", "--steps", "1")


# --------------------------------------------------------------------------------- terms of the loss


def some_loss(hyper, batch, **weights):
    args = argparse.Namespace(**{"distill": 0.0, "weight_by_context": False} | weights)
    return training.loss_of(hyper, batch, args)


def some_batch(**more):
    rows = [[1, 5, 6, 7, 50, 51, 52], [1, 8, 9, 50, 51, 52]]
    return collate(rows, [0, 1, 1], [[1, 5, 6], [1, 7], [1, 8, 9, 10]], [[11, 12], [13], [14, 15]], **more)


def test_distillation_is_nothing_where_gists_say_what_the_examples_say():
    hyper, batch = random_hyper(), some_batch()
    plain, taught = some_loss(hyper, batch), some_loss(hyper, batch, distill=2.0)
    student, teacher = (torch.softmax(logits, -1) for logits in (hyper(batch), hyper.in_full(batch)))
    by_hand = (teacher * (teacher.log() - student.log())).sum()
    torch.testing.assert_close(taught - plain, 2 * by_hand)
    hyper.in_full = lambda _: hyper(batch).detach()
    torch.testing.assert_close(some_loss(hyper, batch, distill=2.0), plain)


def test_what_is_said_again_weighs_as_much_for_each_answer_token_however_long_it_is():
    hyper, batch = random_hyper(), some_batch()
    (saying,) = again(batch.examples.tolist(), hyper.gist_ids, 2, 0.5)
    both = some_loss(hyper, some_batch(more=[saying]))
    mean = F.cross_entropy(hyper(replace(batch, more=(saying,)))[len(batch.targets) :], saying.targets)
    torch.testing.assert_close(both, some_loss(hyper, batch) + 0.5 * len(batch.targets) * mean)


def test_targets_weigh_what_the_full_context_is_worth_for_them():
    hyper, batch = random_hyper(), some_batch()
    logits, full = hyper(batch), hyper.in_full(batch)
    weights = training.worth(hyper, batch, full)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    losses = [F.cross_entropy(x, batch.targets, reduction="none") for x in (logits, full, hyper.model(batch.tokens, select=batch.select)[0])]
    assert weights.argmax() == (losses[2] - losses[1]).argmax() and weights.min() > 0
    torch.testing.assert_close(some_loss(hyper, batch, weight_by_context=True), (weights * losses[0]).sum())


# -------------------------------------------------- compression hyperpretraining, several processes


STOP_AFTER_TWO = """
import os, signal, sys
sys.path.insert(0, %r)
import train, tools
save = train.save_state
def save_and_stop(out, hyper, optimizer, step, rank):
    save(out, hyper, optimizer, step, rank)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGINT)  # one process hears Ctrl-C in the step that follows
train.save_state = save_and_stop
tools.run_command(train.main)
""" % str(ROOT)


def torchrun(processes, *argv, status=0, program="train.py"):
    argv, options = command(*argv, program=program)
    argv[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    options["env"] |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, capture_output=True, timeout=120, **options)
    assert (done.returncode == 0) == (status == 0), done.stdout + done.stderr
    return done


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_hyperpretrained_model_can_be_used(tmp_path):
    run(*PRETRAIN, "--steps", "2", "--out", tmp_path / "c")
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    assert results["metric"] == "loss" and results["kept"] is not None and results["baselines"]["fewshot"] > 0
    run(tmp_path / "c", "--limit", "4", program="eval")
    again = json.loads((tmp_path / "c" / "results.json").read_text())
    assert again | {"seconds": 0, "args": 0} == results | {"seconds": 0, "args": 0}
    run(tmp_path / "c", "--limit", "1", "--out", tmp_path / "one", program="eval")
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert one["controls"]["other_task"] != one["average"]  # another text's gists, also where there is one text
    train(tmp_path / "run", "--steps", "1", "--model", tmp_path / "c")  # 4 gists: the checkpoint's own
    own, gists = load(tmp_path / "c"), load_tensors(tmp_path / "c" / "gists.safetensors")[0]["gists"]
    assert not torch.equal(own.embed_tokens.weight, load(ROOT / "tiny" / "llama").embed_tokens.weight)
    started = tasks.open_run(training.parse(["--task", "p3", "--model", str(tmp_path / "c"), "--gists", "4"])[0])
    assert torch.equal(started.hyper.gists, gists)


@pytest.fixture(scope="module")
def two_sharded(tmp_path_factory):
    """Four steps of hyperpretraining by two processes."""
    out = tmp_path_factory.mktemp("runs") / "two"
    torchrun(2, *PRETRAIN, "--steps", "4", "--out", out)
    return out


def test_two_processes_have_the_losses_of_one_and_go_on_as_one(tmp_path, two_sharded):
    """FSDP: two processes = one; 4 steps = 2 by two processes and 2 by one."""
    run(*PRETRAIN, "--steps", "4", "--out", tmp_path / "one")
    assert losses(tmp_path / "one") == pytest.approx(losses(two_sharded), abs=1e-5)
    one, two = (load_tensors(out / "state.safetensors")[0] for out in (tmp_path / "one", two_sharded))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)

    for name, processes in (("one", 2), ("two", 1)):  # stopped in the middle: what was saved is the state of step 2
        out = tmp_path / f"{name} cut"
        start = [*PRETRAIN, "--steps", "4", "--out", out]
        script = tmp_path / "stop.py"
        script.write_text(STOP_AFTER_TWO)
        stopped = torchrun(3 - processes, *start, status=130, program=script)
        assert len(losses(out)) == 3, stopped.stderr
        torchrun(processes, *start, "--resume")
        assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_data_parallel_lora_has_the_losses_of_one_process(tmp_path):
    data = ["--data", ROOT / "tiny" / "P3"]
    train(tmp_path / "one", "--steps", "2", *data)
    torchrun(2, "--task", "p3", *SHORT, *data, "--steps", "2", "--out", tmp_path / "two")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    one, two = (load_tensors(tmp_path / name / "adapters.safetensors")[0] for name in ("one", "two"))
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)  # Adam makes much of a gradient that is almost zero


# ---------------------------------------------------------------------------- stopped at any moment


def test_six_steps_equal_three_a_kill_and_three(tmp_path):
    train(tmp_path / "whole", "--steps", "6", "--save-every", "3")
    argv, options = command("--task", "p3", *SHORT, "--out", tmp_path / "cut", "--steps", "6", "--save-every", "3")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    while not (tmp_path / "cut" / "state.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train(tmp_path / "cut", "--steps", "6", "--save-every", "3", "--resume")
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_ctrl_c_saves_the_run(tmp_path, kind):
    out = tmp_path / "run"
    argv, options = command("--task", "p3", *SHORT, "--out", out, "--steps", "2000", "--save-every", "9999")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for _ in range(2):  # the second doesn't disturb the way out
        process.send_signal(kind)
        time.sleep(0.05)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    with safe_open(out / "state.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == len((out / "log.jsonl").read_text().splitlines())


def test_an_interrupted_or_divided_evaluation_has_the_same_numbers(tmp_path, hypernetwork, monkeypatch):
    asked = [hypernetwork, "--limit", "3", "--sets", "2"]
    run(*asked, "--out", tmp_path / "whole", program="eval")
    asked_for, score = itertools.count(), evaluation.score  # (several threads ask)

    def some(*args):
        if next(asked_for) == 7:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(evaluation, "score", some)
    run(*asked, "--out", tmp_path / "cut", program="eval", status=130)
    kept = next((tmp_path / "cut").glob(".hyperllama-scores-*"))
    done = len(list(read_lines(kept)))
    assert done  # about seven, as threads overtake each other
    with open(kept, "a") as file:
        file.write('\n[["main", 0')  # a line that was torn
    places = [next(asked_for)]
    for out in ("cut", "again"):
        run(*asked, "--out", tmp_path / out, program="eval")
        places.append(next(asked_for))
    assert places[1] - places[0] + done == places[2] - places[1]  # what was scored isn't scored again
    torchrun(2, *asked, "--out", tmp_path / "two", program=ROOT / "eval.py")
    for line, message in (("5", "not scores of ours"), ('[["main", 0, 0], "abc"]', "not scores of ours"), ('[["main", 0, 0], 500]', None)):
        (tmp_path / "crafted").mkdir(exist_ok=True)
        (tmp_path / "crafted" / kept.name).write_text(line)
        ended = run(*asked, "--out", tmp_path / "crafted", program="eval", status=2 if message else 0)
        assert message is None or message in ended.stderr
    results = [json.loads((tmp_path / out / "results.json").read_text()) | {"seconds": 0} for out in ("whole", "cut", "two", "crafted")]
    results = [result | {"args": result["args"] | {"threads": 0}} for result in results]
    assert results[0] == results[1] == results[2] == results[3]
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["results.json"]


@pytest.mark.parametrize("start", [["train.py"], ["eval.py"], ["-m", "tools.answer"]], ids=" ".join)
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, start):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, *start], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode in (130, -signal.SIGINT) and done.stderr == "interrupted\n"  # (a shell says 130 for both)


KILLER = """
import json, os, random, signal, sys, time
sys.path.insert(0, %r)
import torch
import torch._dynamo  # an optimizer imports it
torch.set_num_threads(1)
import tools, train

def start(argv, resume):
    pid = os.fork()  # a child for each attempt spares the imports
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.argv = ["train.py", *argv, *(["--resume"] if resume else [])]
        status = 1
        try:
            tools.run_command(train.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            os._exit(status)
    return pid

whole, cut, kills, argv = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
began = time.time()
assert os.waitpid(start([*argv, "--out", whole], False), 0)[1] == 0
length, rng, killed = time.time() - began, random.Random(0), 0
while True:
    pid = start([*argv, "--out", cut], os.path.exists(cut + "/args.json"))
    end = time.time() + rng.uniform(0, length) if killed < kills else float("inf")
    while time.time() < end and not (done := os.waitpid(pid, os.WNOHANG))[0]:
        time.sleep(0.002)
    if done[0]:
        assert done[1] == 0, done
        if killed >= kills:
            break
        os.remove(cut + "/results.json")  # it finished before its moment: the end of it once more
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
""" % str(ROOT)


@pytest.mark.parametrize("kills, task", [
    (12, ["--task", "p3", *SHORT, "--sets", "1"]), (4, ["--task", "hyperpretrain", "--batch-size", "2", "--gists", "4", "--limit", "4", "--measure", "0"]),
], ids=str)  # fmt: skip
def test_a_run_killed_many_times_ends_as_if_never_killed(tmp_path, kills, task):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = [sys.executable, "-c", KILLER, whole, cut, kills, *task, "--steps", "8", "--save-every", "2"]
    subprocess.run(list(map(str, argv)), check=True, timeout=200, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    if "p3" in task:
        assert_same(whole, cut)
        return
    for name in ("state", "model", "gists"):
        one, two = (load_tensors(out / f"{name}.safetensors")[0] for out in (whole, cut))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert losses(whole) == losses(cut) and len(losses(cut)) == 8
    one, two = (json.loads((out / "results.json").read_text()) for out in (whole, cut))
    assert one | {"seconds": 0, "args": 0} == two | {"seconds": 0, "args": 0}


def test_two_killed_processes_end_as_if_never_killed(tmp_path, two_sharded):
    start = [*PRETRAIN, "--steps", "4"]
    argv, options = command(*start, "--out", tmp_path / "cut")
    argv[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options["env"] |= {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, **options)
    while not (tmp_path / "cut" / "state.safetensors").exists():
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    torchrun(2, *start, "--out", tmp_path / "cut", "--resume")
    assert losses(two_sharded) == pytest.approx(losses(tmp_path / "cut"), abs=1e-6) and len(losses(tmp_path / "cut")) == 4


def test_a_full_disk_leaves_the_last_state(tmp_path):
    """A limit on the size of files stands for the disk: the state of step 3 can't be written."""
    options = [*SHORT, "--steps", "6", "--save-every", "2"]
    train(tmp_path / "whole", *options)
    out = tmp_path / "cut"
    argv, started = command("--task", "p3", *options, "--out", out)
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **started)
    while not (out / "state.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = (out / "state.safetensors").read_bytes()

    argv, started = command("--resume", "--out", out)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) // 2,) * 2)  # noqa: E731
    done = subprocess.run(argv, capture_output=True, preexec_fn=full, **started)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr and "state.safetensors: can't be written" in line
    assert (out / "state.safetensors").read_bytes() == saved
    assert not list(out.glob("*.partial"))
    run("--resume", "--out", out)
    assert_same(tmp_path / "whole", out)


def test_a_loss_that_is_not_a_number_leaves_the_last_state(tmp_path):
    out = tmp_path / "run"
    train(out, "--steps", "2", "--lr", "1e30", "--save-every", "1", status=2)
    log = (out / "log.jsonl").read_text().splitlines()
    with safe_open(out / "state.safetensors", "pt") as file:
        assert int(file.metadata()["step"]) == len(log) == 1
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())


# ---------------------------------------------------------------------------------------- bad input


def error(monkeypatch, capsys, *argv):
    """The one line that the command ends with; run in this process, which spares the imports."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        tools.run_command(training.main)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs" / "run"
    start = ["--task", "p3", "--out", out]
    small, empty = write_hf(tmp_path / "small", random_llama()), tmp_path / "empty"
    empty.mkdir()
    for argv, message in (
        (["--model", tmp_path / "no"], "no such folder"),
        (["--model", empty], "not a Llama checkpoint"),
        (["--model", small], "tokenizer.model"),
        (["--data", tmp_path / "no"], "no such folder"),
        (["--data", empty], "no training tasks"),
        (["--shots", "500"], "too few"),
        (["--context", "4000"], "positions"),
        (["--method", "zeroshot", "--downstream", "lora"], "--downstream"),
        (["--gists", "0"], "positive"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "0"], "--lr"),
        (["--gist-lr", "-1"], "--gist-lr"),
        (["--alpha", "inf"], "--alpha"),
        (["--seed", "-1"], "--seed"),
        (["--rank", "10000000000"], "--rank"),
        (["--device", "meta"], "--device meta"),
        (["--gists", "5000", "--context", "9000"], "positions"),
        (["--resume"], "not the folder of a run"),
        (["--resume", "--overwrite"], "exclude"),
        (["--gists", "600", "--context", "600"], "no room"),
        (["--device", "gpu"], "--device"),
        (["--fuse-instruction"], "belong to --task sni"),
        (["--words", "w"], "--words belongs"),
        (["--average", "2", "--concat", "2"], "exclude"),
        (["--chain", "2", "--concat", "2"], "exclude"),
        (["--distill", "1", "--method", "fewshot"], "--distill belongs to a hypernetwork"),
        (["--task", "prefix", "--init", "random", "--gists-every", "4"], "--gists-every belongs to a hypernetwork"),
        (["--task", "sni", "--gists-every", "1", "--fuse-instruction"], "--gists-every goes with neither"),
        (["--init", "random"], "belong to --task prefix"),
        (["--task", "prefix"], "needs --run"),
        (["--task", "prefix", "--run", tmp_path / "no"], "not the folder of a run"),
        (["--task", "prefix", "--init", "random", "--run", empty], "no other --init"),
        (["--task", "prefix", "--init", "text", "--method", "fewshot"], "no --method"),
        (["--task", "sni", "--data", empty], "no splits/default"),
        (["--task", "symbol", "--data", empty], "no train sets"),
        (["--task", "symbol", "--words", tmp_path / "no"], "not a file of words"),
        (["--task", "hyperpretrain", "--data", tmp_path / "small"], "no .jsonl"),
        (["--task", "hyperpretrain", "--quantize"], "no --quantize"),
        (["--measure", "-1"], "--measure"),
        (["--lm", "0.5"], "belong to --task hyperpretrain"),
        (["--task", "hyperpretrain", "--downstream", "lora"], "--downstream lora"),
    ):
        assert message in error(monkeypatch, capsys, *start, *argv), argv
        assert not out.exists(), argv


def test_a_finished_run_is_neither_overwritten_nor_resumed_as_another(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"

    def refused(*argv):
        return error(monkeypatch, capsys, "--task", "p3", *SHORT, "--steps", "1", *argv)

    train(out, "--steps", "1")
    kept = (out / "results.json").read_bytes()
    assert "--overwrite" in refused("--out", out)
    assert "seed = 3, but the run has 0" in refused("--out", out, "--resume", "--seed", 3)
    assert (out / "results.json").read_bytes() == kept
    run("--resume", "--out", out)  # needs no other option
    assert {**json.loads(kept), "seconds": 0} == {**json.loads((out / "results.json").read_text()), "seconds": 0}
    train(out, "--steps", "1", "--overwrite", "--seed", "3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "no run of ours" in refused("--out", tmp_path / "mine", "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_only_what_a_run_wrote_is_ever_deleted(tmp_path, monkeypatch, capsys):
    """Folders that look like a run, by their name or by a file, and a run that somebody put a file into."""
    train(tmp_path / "run", "--steps", "1")
    for name in ("mine.partial", "run"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "thesis.txt").write_text("precious")
    (tmp_path / "args").mkdir()
    (tmp_path / "args" / "args.json").write_text("{}")
    for name, kept in (("mine.partial", "thesis.txt"), ("run", "thesis.txt"), ("args", "args.json")):
        line = error(monkeypatch, capsys, "--task", "p3", *SHORT, "--steps", "1", "--overwrite", "--out", tmp_path / name)
        assert "no run of ours" in line and (tmp_path / name / kept).exists()


def test_nothing_of_anybodys_in_or_beside_a_run_is_touched(tmp_path, hypernetwork):
    """Files in the folders of a run; a run that has the name of one set aside; a file where the lock would lie; other results."""
    out = tmp_path / "run"
    shutil.copytree(hypernetwork, out)
    for name in ("shared", "average-notes"):
        (out / name).mkdir()
        (out / name / "thesis.txt").write_text("precious")
        assert "no run of ours" in train(out, "--steps", "1", "--overwrite", status=2).stderr
        assert (out / name / "thesis.txt").exists()
        shutil.rmtree(out / name)
    for name in ("run.replaced", ".run.replaced", "new.replaced"):
        shutil.copytree(hypernetwork, tmp_path / name)
    train(tmp_path / "new", "--steps", "1")
    train(out, "--steps", "1", "--overwrite", status=2)  # where the run would be set aside, there is another
    assert (out / "results.json").exists()
    shutil.rmtree(tmp_path / ".run.replaced")
    train(out, "--steps", "1", "--overwrite")
    assert all((tmp_path / name / "results.json").exists() for name in ("run.replaced", "new.replaced"))
    (tmp_path / ".locked.lock").write_text("secret")
    assert "isn't a lock of ours" in train(tmp_path / "locked", "--steps", "1", status=2).stderr
    assert (tmp_path / ".locked.lock").read_text() == "secret"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "results.json").write_text('{"my": "precious"}')
    assert "results.json" in run(hypernetwork, "--out", tmp_path / "theirs", program="eval", status=2).stderr
    (tmp_path / "file").write_text("precious")
    assert "is a file" in run(hypernetwork, "--out", tmp_path / "file", program="eval", status=2).stderr
    assert (tmp_path / "theirs" / "results.json").read_text() == '{"my": "precious"}'


@pytest.mark.parametrize("argv, message", [
    (["--task", "prefix", "--init", "text", "--optimizer", "muon"], "--optimizer muon is for matrices of layers"),
    (["--task", "prefix", "--init", "text", "--gists", "600"], "fewer tokens"),
], ids=["muon", "gists"])  # fmt: skip
def test_a_run_that_ends_before_its_first_step_leaves_nothing(tmp_path, argv, message):
    assert message in train(tmp_path / "run", "--steps", "1", *argv, status=2).stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--model", "--data"])
def test_a_run_never_lies_in_around_or_at_what_it_reads(tmp_path, monkeypatch, capsys, option):
    source = tmp_path / "around" / "source"
    shutil.copytree(ROOT / "tiny" / ("llama-c" if option == "--model" else "P3"), source)
    (source / ".hyperllama").touch()
    for out in (source, source / "inside", tmp_path / "around"):
        line = error(monkeypatch, capsys, "--task", "p3", *SHORT, "--steps", "1", "--overwrite", option, source, "--out", out)
        assert f"lies in, around or at {option}" in line
    assert len(list(source.iterdir())) > 3


def test_a_run_is_replaced_only_when_the_new_one_has_saved_something(tmp_path):
    out = tmp_path / "run"
    train(out, "--steps", "1")
    before = contents(out)
    train(out, "--steps", "3", "--lr", "1e30", "--overwrite", status=2)  # ends before its first state
    train(out, "--steps", "1", "--task", "prefix", "--init", "text", "--gists", "600", "--overwrite", status=2)
    assert_equal(contents(out), before)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    train(out, "--steps", "2", "--overwrite")
    assert len(contents(out)[1]) == 2 and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_two_runs_cannot_share_a_folder(tmp_path, monkeypatch, capsys):
    out, aside = tmp_path / "run", tmp_path / ".run.replaced"
    train(out, "--steps", "1")
    shutil.copytree(out, aside)  # the other run is replacing this one and has saved nothing yet
    (aside / ".hyperllama-replaced").touch()
    (out / "state.safetensors").unlink()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with open(tmp_path / ".run.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for options in (["--overwrite"], ["--resume"]):
            line = error(monkeypatch, capsys, "--task", "p3", *SHORT, "--steps", "1", "--out", out, *options)
            assert "another run is writing here" in line
        assert files.items() <= {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}.items()
    train(out, "--steps", "1", "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_folder_may_be_a_link_or_the_folder_we_are_in(tmp_path, monkeypatch):
    (tmp_path / "far" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "run")
    for out, more in ((tmp_path / "link", []), (tmp_path / "link", ["--overwrite"]), (Path("."), ["--overwrite"])):
        monkeypatch.chdir(tmp_path / "far" / "run")
        train(out, "--steps", "1", *more)
        assert (tmp_path / "far" / "run" / "results.json").exists() and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["run"]


def test_results_are_kept_where_nothing_can_be_printed(tmp_path):
    out = tmp_path / "run"
    train(out, "--steps", "1")
    for redirect, status in (("> /dev/full", 2), ("2>&- >&-", 0)):
        (out / "results.json").unlink()
        done = subprocess.run(f"{sys.executable} eval.py {out} --limit 2 --sets 1 --no-controls {redirect}", shell=True, cwd=ROOT, capture_output=True)
        assert done.returncode == status and (b"stdout can't be written" in done.stderr) == (status == 2)
        assert json.loads((out / "results.json").read_text())["average"] >= 0
    for redirect in ("> /dev/full 2> /dev/full", "2>&1 | head -c 20"):  # no bar can be drawn: the run goes on
        command = f"{sys.executable} train.py --task p3 {' '.join(SHORT)} --steps 2 --no-controls --out {tmp_path / str(len(redirect))} {redirect}"
        subprocess.run(command, shell=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        assert (tmp_path / str(len(redirect)) / "results.json").exists()
    ascii_terminal = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "eval.py", out, "--limit", "2", "--sets", "2", "--no-controls"], cwd=ROOT, env=ascii_terminal, capture_output=True)
    assert done.returncode == 0 and b" ? " in done.stdout  # the plus-minus sign


@pytest.mark.parametrize("change, message", [
    ({"exp_avg.gists": torch.zeros(2)}, "exp_avg.gists isn't"), ({"exp_avg_sq.gists": None}, "exp_avg_sq.gists isn't"),
    ({"exp_avg.gists": torch.full((4, 128), torch.nan)}, "exp_avg.gists isn't"), ({"gists": torch.zeros(4, 128, dtype=torch.int32)}, "gists isn't"),
    ("1" * 5000, "step 1111"), ("-1", "step -1"), ("3.5", "step 3.5"), ("99", "step 99"), ("nan", "step nan"),
], ids=range(9))  # fmt: skip
def test_a_crafted_state_is_refused(tmp_path, half_a_run, change, message):
    out = tmp_path / "run"
    shutil.copytree(half_a_run, out)
    tensors, about = load_tensors(out / "state.safetensors")
    if isinstance(change, str):
        about["step"] = change
    else:
        tensors = {name: t for name, t in (tensors | change).items() if t is not None}
    save_tensors(out / "state.safetensors", tensors, about)
    assert message in run("--resume", "--out", out, status=2).stderr


def test_a_run_goes_on_with_its_own_model_alone(tmp_path, half_a_run):
    shutil.copytree(half_a_run, tmp_path / "run")
    tensors, about = load_tensors(tmp_path / "run" / "state.safetensors")
    save_tensors(tmp_path / "run" / "state.safetensors", tensors, about | {"base": "another"})
    assert "another model" in run("--resume", "--out", tmp_path / "run", status=2).stderr


@pytest.fixture(scope="module")
def half_a_run(tmp_path_factory):
    """A run of two steps, of which one is saved."""
    out = tmp_path_factory.mktemp("half") / "run"
    train(out, "--steps", "2", "--save-every", "1", "--lr", "1e30", "--no-controls", status=2)
    return out


def test_a_log_that_was_torn_is_mended(tmp_path):
    train(tmp_path / "whole", "--steps", "4", "--save-every", "2")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    with open(tmp_path / "cut" / "log.jsonl", "ab") as log:
        log.write(b'{"step": 5, "lo\xff\xfe')
    run("--resume", "--out", tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_path_in_a_run_works_from_any_folder_and_says_when_it_moved(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    train("run", "--steps", "1", "--model", "model", "--no-controls")
    monkeypatch.chdir("/")
    again = ["--limit", "2", "--sets", "1", "--no-controls"]
    run(tmp_path / "run", *again, program="eval")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    gone = run(tmp_path / "run", *again, program="eval", status=2).stderr
    assert f"{tmp_path / 'model'}: no such folder" in gone and "--model says where it is now" in gone
    run(tmp_path / "run", *again, "--model", tmp_path / "elsewhere", program="eval")


def test_a_model_with_other_weights_in_any_layer_is_refused(tmp_path):
    train(tmp_path / "run", "--steps", "1", "--no-controls")
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "other")
    tensors, about = load_tensors(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 2
    save_tensors(tmp_path / "other" / "model.safetensors", tensors, about)
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "words")
    words = (tmp_path / "words" / "tokenizer.model").read_bytes()
    (tmp_path / "words" / "tokenizer.model").write_bytes(words.replace("▁kilo".encode(), b"\0" * 7).replace("▁jade".encode(), "▁kilo".encode()).replace(b"\0" * 7, "▁jade".encode()))
    for name in ("other", "words"):
        line = run(tmp_path / "run", "--model", tmp_path / name, "--limit", "1", "--out", tmp_path / "e", program="eval", status=2).stderr
        assert "was trained on another model" in line


def test_scores_that_are_not_finite_are_refused(tmp_path):
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "broken")
    tensors, about = load_tensors(tmp_path / "broken" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0] = torch.nan
    save_tensors(tmp_path / "broken" / "model.safetensors", tensors, about)
    for task in ("p3", "sni"):
        asked = ["--task", task, "--method", "zeroshot", "--model", tmp_path / "broken", "--limit", "1", "--out", tmp_path / task]
        assert "aren't finite" in run(*asked, program="eval", status=2).stderr and not (tmp_path / task / "results.json").exists()


def test_several_sets_are_counted_as_they_are_read(tmp_path, hypernetwork):
    """Each set is read in a context of its own; in context, there is one."""
    run(hypernetwork, "--average", "3", "--limit", "2", "--no-controls", "--sets", "1", "--out", tmp_path / "three", program="eval")
    one, three = (json.loads((out / "results.json").read_text())["shots"] for out in (hypernetwork, tmp_path / "three"))
    assert one == {"hyper": 4, "fewshot": 4} and three == {"hyper": 12, "fewshot": 4}


def test_a_tuned_prefix_is_used_for_its_own_task_alone(tmp_path):
    data = tmp_path / "P3"
    shutil.copytree(FEW_TASKS, data, symlinks=True)
    short = ["--data", data, "--task", "prefix", "--init", "text", "--steps", "1", "--out", tmp_path / "run"]
    train(tmp_path / "run", *short)
    names = (data / "splits" / "test_tasks.txt").read_text().split()
    (data / "splits" / "test_tasks.txt").write_text("\n".join(reversed(names)))
    assert "other tasks" in run(tmp_path / "run", "--limit", "2", program="eval", status=2).stderr


def test_a_run_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.open_run", None)  # nothing may have been loaded
    (tmp_path / "file").write_text("mine")
    assert "is a file" in error(monkeypatch, capsys, "--task", "p3", "--out", tmp_path / "file" / "run")
    if os.geteuid():  # nothing is closed to root
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "not writable" in error(monkeypatch, capsys, "--task", "p3", "--out", tmp_path / "closed" / "run")
