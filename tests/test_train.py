"""The command: real runs of a few steps, resuming, several processes, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    FEW_TASKS,
    ONE_HELD_OUT,
    REAL_DATA,
    ROOT,
    SCORED,
    SHORT,
    needs_real_data,
    random_llama,
    train,
    write_hf,
)
from conftest import run as run_here
from forker import launch, wait
from safetensors import safe_open

import eval as evaluation
import run as running
import train as training
from llama import load
from lora import load_tensors, save_tensors
from run import read_lines


def contents(out):
    tensors = {}
    for name in ("adapters.safetensors", "state.safetensors"):  # of a run that trains adapters
        with safe_open(out / name, "pt") as file:
            tensors |= {(name, key): file.get_tensor(key) for key in file.keys()}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in log]
    log = [line for line in log if "loss" in line] + [line for line in log if "score" in line]
    results = json.loads((out / "results.json").read_text()) | {"seconds": None}
    return tensors, log, results


def assert_same(one, other):
    assert_equal(contents(one), contents(other))


def assert_equal(one, other):
    (tensors, log, results), (tensors2, log2, results2) = one, other
    assert tensors.keys() == tensors2.keys() and all(torch.equal(tensors[k], tensors2[k]) for k in tensors)
    assert log == log2
    steps = [line["step"] for line in log if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert {**results, "args": None} == {**results2, "args": None}


# ----------------------------------------------------------------------------------------- the loop


def test_a_run_that_measures_also_says_where_it_began(tmp_path):
    """Step 0 of the log is "before"; a later evaluation finds it there, if it scores in the same way."""
    plain = train(tmp_path / "plain", "--steps", "1")
    out = tmp_path / "measured"
    measured = train(out, "--steps", "1", "--measure", "1")
    assert "before" not in plain.stdout and plain.stdout.splitlines()[-1].startswith("after ")
    before, after = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("plain", "measured")
    )
    assert (
        before["before"] is None
        and f"before {after['before']:.1f} → after {after['average']:.1f}" in measured.stdout
    )
    log = list(read_lines(out / "log.jsonl"))
    assert [line["step"] for line in log if "score" in line] == [0, 1] and log[0]["before"] == after["before"]
    again = SCORED
    for options, expected in ((["--limit", "1"], None), (again, after["before"])):
        run_here(out, *options, program="eval")
        assert json.loads((out / "results.json").read_text())["before"] == expected
    shutil.copytree(FEW_TASKS, tmp_path / "other", symlinks=True)
    run_here(out, *again, "--data", tmp_path / "other", program="eval")
    assert json.loads((out / "results.json").read_text())["before"] == after["before"]
    assert json.loads((out / "data-other" / "results.json").read_text())["before"] is None


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
    evaluation_options = ["--limit", "2", "--sets", "2", "--controls"]
    train(out, "--steps", "3", *variant, *evaluation_options)
    tensors, log, results = contents(out)
    assert (
        len(log) == 3
        and 0 <= results["average"] <= 100
        and results["method"] == (variant[1] if "--method" in variant else "hyper")
    )
    for (file, name), tensor in tensors.items():
        if name.startswith("exp_avg_sq."):
            assert tensor.abs().max() > 0, f"{name} never had a gradient"
    before = json.loads((out / "results.json").read_text())
    run_here(out, *evaluation_options, program="eval")
    after = json.loads((out / "results.json").read_text())
    assert after | {"seconds": 0} == before | {"seconds": 0}


def test_a_quantized_run_works(tmp_path):
    pytest.importorskip("bitsandbytes")
    train(tmp_path / "run", "--steps", "2", "--quantize")
    assert contents(tmp_path / "run")[2]["args"]["quantize"] is True


PRETRAIN = [
    "--task",
    "hyperpretrain",
    "--batch-size",
    "4",
    "--gists",
    "4",
    "--save-every",
    "2",
    "--limit",
    "4",
    "--measure",
    "0",
]
PRETRAIN += ["--optimizer", "adamw", "--lr", "3e-3", "--gist-lr", "3e-3"]


@pytest.mark.parametrize("task", [
    ["--task", "p3", *SHORT], PRETRAIN, ["--task", "prefix", "--init", "propagate", *SHORT],
], ids=lambda task: task[1])  # fmt: skip
def test_checkpointed_activations_change_no_bit(tmp_path, task):
    states = []
    for name, options in (("plain", []), ("checkpointed", ["--checkpoint-activations"])):
        run_here(*task, "--steps", "2", "--out", tmp_path / name, *options)
        states.append(load_tensors(tmp_path / name / "state.safetensors")[0])
    plain, checkpointed = states
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)


@pytest.mark.parametrize("task, variant", [
    ("sni", []), ("sni", ["--instruction-downstream"]), ("sni", ["--fuse-instruction", "--downstream", "lora"]),
    ("sni", ["--method", "fewshot"]), ("sni", ["--method", "zeroshot"]), ("symbol", []), ("symbol", ["--method", "fewshot"]),
    ("symbol", ["--distill", "1", "--reconstruct", "0.5", "--gists-every", "2", "--weight-by-context"]),
    ("sample", []),
], ids=str)  # fmt: skip
def test_every_task_runs_and_evaluates_the_same_later(tmp_path, task, variant):
    out = tmp_path / "run"
    short = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--limit",
        "2",
        "--sets",
        "2",
        "--no-controls",
        "--measure",
        "0",
    ]
    if task == "sni":  # two of the held-out tasks: answers of an untrained model are long
        source, data = ROOT / "tiny" / "natural-instructions", tmp_path / "sni"
        (data / "splits" / "default").mkdir(parents=True)
        (data / "tasks").symlink_to(source / "tasks")
        for part in ("train", "test"):
            names = (source / "splits" / "default" / f"{part}_tasks.txt").read_text().split()
            (data / "splits" / "default" / f"{part}_tasks.txt").write_text("\n".join(names[:2]))
        short += ["--data", data]
    run_here("--task", task, *short, "--out", out, *variant)
    before = contents(out)[2]
    assert before["task"] == task and before["metric"] == ("rougeL" if task == "sni" else "accuracy")
    run_here(out, "--limit", "2", "--sets", "2", "--no-controls", program="eval")
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
    done = run_here(
        "--task",
        "sni",
        "--steps",
        "2",
        "--batch-size",
        "1",
        "--limit",
        "1",
        "--no-controls",
        "--measure",
        "0",
        "--data",
        data,
        "--out",
        out,
    )
    assert "have no file: left out" in done.stderr and len(contents(out)[2]["tasks"]) == 5


@pytest.mark.parametrize(
    "init", ["hyper", "shared", "random", "reparam", "propagate", "text", "anchors", "pooled"]
)
def test_every_start_of_prefix_tuning_runs_resumes_and_evaluates(tmp_path, hypernetwork, init):
    out = tmp_path / "run"
    start = ["--task", "prefix", *SHORT, "--batch-size", "1", "--measure", "10", "--init", init]
    start += [
        "--steps",
        "4",
        "--save-every",
        "2",
        "--sets",
        "1",
        "--out",
        out,
        *(["--run", hypernetwork] if init == "hyper" else []),
    ]
    run_here(*start)
    tensors, log, results = contents(out)
    assert [line["step"] for line in log if "score" in line] == [0, 1, 2, 3, 4] and len(
        log[-1]["scores"]
    ) == 3
    assert results["average"] == pytest.approx(log[-1]["score"], abs=0.01)
    run_here(out, *SCORED, program="eval")
    assert contents(out)[2] == results
    (out / "results.json").unlink()
    (out / "adapters.safetensors").unlink()
    run_here(*start, "--resume")  # nothing is left to train: the same prefixes
    again = contents(out)
    assert again[2] == results and all(torch.equal(tensors[key], again[0][key]) for key in tensors)


def test_the_last_scores_along_the_way_are_those_of_the_end(tmp_path):
    train(tmp_path / "run", "--steps", "4", "--measure", "2", "--controls")
    _, log, results = contents(tmp_path / "run")
    assert [line["step"] for line in log if "score" in line] == [0, 2, 4]
    assert log[-1]["score"] == pytest.approx(results["average"], abs=0.01)
    assert log[-1]["controls"] == pytest.approx(results["controls"], abs=0.01)
    assert log[-1]["scores"] == pytest.approx(
        {name: task["mean"] for name, task in results["tasks"].items()}, abs=0.01
    )


def test_the_same_command_twice_has_the_same_results(tmp_path):
    for name in ("one", "two"):
        train(tmp_path / name, "--steps", "2")
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_run_never_talks_to_the_network(tmp_path, monkeypatch):
    def connect(*_):
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", connect)
    train(tmp_path / "run", "--steps", "1")


# ------------------------------------------------------------------- the loss, however rows are divided

HYPERPRETRAIN = [
    "--task",
    "hyperpretrain",
    "--gists",
    "4",
    "--limit",
    "1",
    "--measure",
    "0",
    "--optimizer",
    "adamw",
]
HYPERPRETRAIN += ["--lr", "3e-3", "--gist-lr", "3e-3"]
P3 = ["--task", "p3", *SHORT, "--limit", "1"]
FORMS = {
    "plain": P3,
    "shared": [*P3, "--downstream", "shared"],
    "distill": [*P3, "--distill", "1"],
    "reconstruct": [*P3, "--reconstruct", "0.5"],
    "weighted": [*P3, "--weight-by-context"],
    "chain": [*P3, "--chain", "2"],
    "average": [*P3, "--average", "2"],
    "spread": [*P3, "--gists-spread"],
    "every": [*P3, "--gists-every", "2"],
    "emit": [*P3, "--emit", "lora"],
    "all terms": [*P3, "--distill", "1", "--reconstruct", "0.5", "--weight-by-context", "--gists-every", "2"],
    "prefix": ["--task", "prefix", "--init", "text", *P3[2:]],
    "text": [*HYPERPRETRAIN, "--lm", "0"],
    "text, lm, reconstruct": [*HYPERPRETRAIN, "--lm", "0.5", "--reconstruct", "0.5"],
}


@pytest.mark.parametrize("form", FORMS)
def test_losses_depend_neither_on_processes_nor_on_accumulation(tmp_path, form):
    """Each term is a sum over tokens, divided by their number in the whole step."""
    start = [*FORMS[form], "--steps", "2"]
    divided = 3 if form in ("plain", "text", "all terms") else 2
    log = tmp_path / "log"
    pids = launch(log, *start, "--batch-size", 6, "--out", tmp_path / "divided", processes=divided)
    run_here(*start, "--batch-size", "6", "--out", tmp_path / "one")
    run_here(*start, "--batch-size", "3", "--accumulate", "2", "--out", tmp_path / "accumulated")
    assert wait(pids) == [0] * divided, log.read_text()
    one, accumulated, divided = (
        list(read_lines(tmp_path / n / "log.jsonl")) for n in ("one", "accumulated", "divided")
    )
    assert len(one) == 2
    for other in (accumulated, divided):
        for field in ("loss", "norm"):
            expected = [line[field] for line in one]
            assert [line[field] for line in other] == pytest.approx(
                expected, abs=2e-6 if field == "loss" else None, rel=1e-4
            )


# -------------------------------------------------- compression hyperpretraining, several processes


def losses(out):
    return [line["loss"] for line in read_lines(out / "log.jsonl") if "loss" in line]


def test_a_hyperpretrained_model_can_be_used(tmp_path):
    run_here(*PRETRAIN, "--steps", "2", "--out", tmp_path / "c")
    results = json.loads((tmp_path / "c" / "results.json").read_text())
    assert results["metric"] == "loss" and results["kept"] is not None and results["baselines"]["fewshot"] > 0
    run_here(tmp_path / "c", "--limit", "4", program="eval")
    again = json.loads((tmp_path / "c" / "results.json").read_text())
    assert again | {"seconds": 0, "args": 0} == results | {"seconds": 0, "args": 0}
    run_here(tmp_path / "c", "--limit", "1", "--out", tmp_path / "one", program="eval")
    one = json.loads((tmp_path / "one" / "results.json").read_text())
    assert (
        one["controls"]["other_task"] != one["average"]
    )  # another text's gists, also where there is one text
    train(tmp_path / "run", "--steps", "1", "--model", tmp_path / "c")  # 4 gists: the checkpoint's own
    own, gists = load(tmp_path / "c"), load_tensors(tmp_path / "c" / "gists.safetensors")[0]["gists"]
    assert not torch.equal(own.embed_tokens.weight, load(ROOT / "tiny" / "llama").embed_tokens.weight)
    started = running.open_run(
        training.parse(["--task", "p3", "--model", str(tmp_path / "c"), "--gists", "4"])[0]
    )
    assert torch.equal(started.hyper.gists, gists)


def several(tmp_path, processes, *argv, module="train", kill_at=0):
    """A command under so many processes."""
    log = tmp_path / "log"
    statuses = wait(launch(log, *argv, module=module, processes=processes, kill_at=kill_at))
    assert statuses == [0] * processes or kill_at and -signal.SIGKILL in statuses, log.read_text()


STATE_OF_STEP_2 = (
    10  # moments of writing until it is in place: args.json 2, log.jsonl 2, its two lines 4, the state 2
)


def test_another_number_of_processes_goes_on_with_a_sharded_run(tmp_path):
    """FSDP: 4 steps by one process = 2 by two, killed, and 2 by one = 2 by one and 2 by two."""
    start = [*PRETRAIN, "--steps", "4"]
    run_here(*start, "--out", tmp_path / "one")
    for first, then in ((2, 1), (1, 2)):
        out = tmp_path / f"{first} then {then}"
        several(tmp_path, first, *start, "--out", out, kill_at=STATE_OF_STEP_2)
        assert len(losses(out)) == 2
        several(tmp_path, then, "--resume", "--out", out)
        assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
        one, other = (load_tensors(folder / "state.safetensors")[0] for folder in (tmp_path / "one", out))
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_data_parallel_lora_trains_what_one_process_trains(tmp_path):
    train(tmp_path / "one", "--steps", "2")
    several(tmp_path, 2, "--task", "p3", *SHORT, "--steps", "2", "--out", tmp_path / "two")
    one, two = (load_tensors(tmp_path / name / "adapters.safetensors")[0] for name in ("one", "two"))
    torch.testing.assert_close(
        one, two, atol=1e-3, rtol=1e-3
    )  # Adam makes much of a gradient that is almost zero


# ---------------------------------------------------------------------------- stopped at any moment


@pytest.mark.parametrize("task", [
    ["--task", "p3", *SHORT, "--limit", "1", "--measure", "2", "--data", str(ONE_HELD_OUT)],
    ["--task", "prefix", "--init", "shared", *SHORT, "--limit", "1", "--batch-size", "1", "--data", str(ONE_HELD_OUT)],
    ["--task", "hyperpretrain", "--batch-size", "2", "--gists", "4", "--limit", "1", "--measure", "0"],
], ids=lambda task: task[1])  # fmt: skip
def test_a_run_killed_at_every_write_ends_as_if_never_killed(tmp_path, task):
    """Killed at its first write, at the second write of the next attempt, and so on: bit for bit the same at the end."""
    start = [*task, "--steps", "2", "--save-every", "1"]
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
    assert losses(whole) == losses(cut) and len(losses(cut)) == 2
    for name in ("state", "adapters", "model", "gists"):
        if (whole / f"{name}.safetensors").exists():
            one, two = (load_tensors(out / f"{name}.safetensors") for out in (whole, cut))
            assert one[1] == two[1] and one[0].keys() == two[0].keys()
            assert all(torch.equal(one[0][key], two[0][key]) for key in one[0])
    one, two = (json.loads((out / "results.json").read_text()) for out in (whole, cut))
    assert one | {"seconds": 0, "args": 0} == two | {"seconds": 0, "args": 0}


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_ctrl_c_is_one_line_and_the_last_checkpoint_stays(tmp_path, kind):
    """Once or many times, in the middle of a step of many batches."""
    out, log = tmp_path / "run", tmp_path / "log"
    start = ["--task", "p3", *SHORT, "--out", out, "--steps", "4", "--save-every", "1"]
    (pid,) = launch(log, *start, "--accumulate", "300")
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    for _ in range(5):
        os.kill(pid, kind)
        time.sleep(0.01)
    began = time.monotonic()
    assert wait([pid]) == [130] and time.monotonic() - began < 10
    assert log.read_text().splitlines()[-1] == "interrupted" and "Traceback" not in log.read_text()
    assert not out.exists(), "a run that ended before its first step leaves nothing"


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5, 1.0])
def test_ctrl_c_while_a_command_starts_is_at_most_one_line(tmp_path, delay):
    """Whatever is being imported at that moment."""
    commands = (["train.py", "--task", "p3", "--out", str(tmp_path / "run")], ["gist.py"])
    started = [subprocess.Popen([sys.executable, *argv], cwd=ROOT, **PIPES) for argv in commands]
    time.sleep(0.1 + delay)  # (before that, nothing of ours has run)
    for process in started:
        process.send_signal(signal.SIGINT)
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT, 0), errors  # (0: gist.py was through)
        lines = [line for line in errors.splitlines() if "it/s" not in line and line.strip()]
        assert lines in ([], ["interrupted"]), errors


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def test_ctrl_c_during_the_imports_ends_every_command_at_once(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    tools = [path.stem for path in sorted((ROOT / "tools").glob("[a-z]*.py"))]
    for start in (["train.py"], ["eval.py"], ["gist.py"], *(["-m", f"tools.{name}"] for name in tools)):
        done = subprocess.run([sys.executable, *start], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == -signal.SIGINT and done.stderr == "", start  # (a shell says 130)


def test_an_interrupted_or_divided_evaluation_has_the_same_numbers(tmp_path, hypernetwork, monkeypatch):
    asked = [hypernetwork, "--limit", "3", "--sets", "2"]
    run_here(*asked, "--out", tmp_path / "whole", program="eval")
    scored = []
    score = evaluation.score

    def interrupted(*args):
        if len(scored) == 7:
            raise KeyboardInterrupt
        scored.append(args)
        return score(*args)

    monkeypatch.setattr(evaluation, "score", interrupted)
    run_here(*asked, "--out", tmp_path / "cut", program="eval", status=130)
    (kept,) = (tmp_path / "cut").glob("scores-*.jsonl")
    assert len(list(read_lines(kept))) == 7
    with open(kept, "a") as file:
        file.write('["abc')  # a line that was torn
    monkeypatch.setattr(evaluation, "score", lambda *args: scored.append(args) or score(*args))
    counts = []
    for out in ("cut", "again"):
        before = len(scored)
        run_here(*asked, "--out", tmp_path / out, program="eval")
        counts.append(len(scored) - before)
    assert counts[0] + 7 == counts[1]  # what was scored isn't scored again
    several(tmp_path, 2, *asked, "--out", tmp_path / "two", module="eval")
    results = [
        json.loads((tmp_path / out / "results.json").read_text()) | {"seconds": 0}
        for out in ("whole", "cut", "two")
    ]
    assert results[0] == results[1] == results[2]
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [".hyperllama", "results.json"]


def test_a_full_disk_leaves_the_last_state(tmp_path):
    """A limit on the size of files stands for the disk: the state of step 4 can't be written."""
    options = ["--task", "p3", *SHORT, "--steps", "6", "--save-every", "2"]
    out, log = tmp_path / "cut", tmp_path / "log"
    assert wait(launch(log, *options, "--out", tmp_path / "whole")) == [0]
    assert wait(launch(log, *options, "--out", out, kill_at=STATE_OF_STEP_2)) == [-signal.SIGKILL]
    saved = (out / "state.safetensors").read_bytes()
    log.unlink()
    assert wait(launch(log, "--resume", "--out", out, most_bytes=len(saved) // 2)) == [2]
    assert "Traceback" not in log.read_text()
    assert "state.safetensors: can't be written" in log.read_text().strip().splitlines()[-1]
    assert (out / "state.safetensors").read_bytes() == saved
    assert not list(out.glob("*.partial"))
    assert wait(launch(log, "--resume", "--out", out)) == [0]
    assert_same(tmp_path / "whole", out)


def test_a_loss_that_is_not_a_number_leaves_the_last_state(tmp_path):
    out = tmp_path / "run"
    train(out, "--steps", "2", "--lr", "1e30", "--save-every", "1", status=2)
    log = (out / "log.jsonl").read_text().splitlines()
    with safe_open(out / "state.safetensors", "pt") as file:
        assert int(file.metadata()["steps"]) == len(log) == 1
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())


# ---------------------------------------------------------------------------------------- bad input


def error(monkeypatch, capsys, *argv):
    """The one line that the command ends with; run in this process, which spares the imports."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        running.run_command(training.main)
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
        (["--out", ""], "--out: an empty name"),
        (["--resume", "--overwrite"], "exclude"),
        (["--gists", "600", "--context", "600"], "no room"),
        (["--device", "gpu"], "--device"),
        (["--fuse-instruction"], "belongs to --task sni"),
        (["--instruction-downstream"], "--instruction-downstream has no meaning for --task p3"),
        (["--words", "w"], "--words belongs"),
        (["--average", "2", "--concat", "2"], "exclude"),
        (["--chain", "2", "--concat", "2"], "exclude"),
        (["--gists-every", "4", "--gists-spread"], "exclude"),
        (["--gists-every", "17"], "only 16 --shots"),
        (["--emit", "lora", "--gists", "3"], "even number of gists"),
        (["--distill", "1", "--method", "fewshot"], "belong to a hypernetwork"),
        (
            ["--task", "prefix", "--init", "random", "--gists-every", "4"],
            "--gists-every belongs to a hypernetwork",
        ),
        (["--task", "sni", "--gists-every", "1", "--fuse-instruction"], "exclude"),
        (["--task", "sni", "--score", "mean"], "--score has no meaning for --task sni"),
        (["--task", "sni", "--average", "2"], "one set of examples"),
        (["--init", "random"], "belongs to --task prefix"),
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
        (["--lm", "0.5"], "belongs to --task hyperpretrain"),
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
    run_here("--resume", "--out", out)  # needs no other option
    assert {**json.loads(kept), "seconds": 0} == {
        **json.loads((out / "results.json").read_text()),
        "seconds": 0,
    }
    train(out, "--steps", "1", "--overwrite", "--seed", "3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "no run wrote" in refused("--out", tmp_path / "mine", "--overwrite")
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
        line = error(
            monkeypatch,
            capsys,
            "--task",
            "p3",
            *SHORT,
            "--steps",
            "1",
            "--overwrite",
            "--out",
            tmp_path / name,
        )
        assert "no run wrote" in line and (tmp_path / name / kept).exists()


def test_nothing_of_anybodys_in_a_run_is_touched(tmp_path, hypernetwork):
    """Files in the folders of a run, partial files of somebody's, other results."""
    out = tmp_path / "run"
    shutil.copytree(hypernetwork, out)
    for name in ("shared", "average-notes"):
        (out / name).mkdir()
        (out / name / "thesis.txt").write_text("precious")
        assert "no run wrote" in train(out, "--steps", "1", "--overwrite", status=2).stderr
        assert (out / name / "thesis.txt").exists()
        shutil.rmtree(out / name)
    (out / "my.partial").write_text("precious")
    (out / "state.safetensors.partial").write_text("torn")
    run_here("--resume", "--out", out)
    assert (out / "my.partial").exists() and not (out / "state.safetensors.partial").exists()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "results.json").write_text('{"my": "precious"}')
    assert (
        "no run wrote"
        in run_here(hypernetwork, "--out", tmp_path / "theirs", program="eval", status=2).stderr
    )
    (tmp_path / "file").write_text("precious")
    assert "is a file" in run_here(hypernetwork, "--out", tmp_path / "file", program="eval", status=2).stderr
    assert (tmp_path / "theirs" / "results.json").read_text() == '{"my": "precious"}'


def test_a_finished_run_without_a_state_is_never_begun_again(tmp_path):
    """The shipped tiny/llama-c is one: --resume has nothing to go on from, and would replace log and model."""
    for source in (tmp_path / "run", tmp_path / "c"):
        if source.name == "run":
            train(source, "--steps", "1")
            (source / "state.safetensors").unlink()
        else:
            shutil.copytree(ROOT / "tiny" / "llama-c", source)
        files = {path: path.read_bytes() for path in source.iterdir()}
        assert "nothing to resume from" in run_here("--resume", "--out", source, status=2).stderr
        assert files == {path: path.read_bytes() for path in source.iterdir()}


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
        line = error(
            monkeypatch,
            capsys,
            "--task",
            "p3",
            *SHORT,
            "--steps",
            "1",
            "--overwrite",
            option,
            source,
            "--out",
            out,
        )
        assert f"lies in, around or at {option}" in line
    assert len(list(source.iterdir())) > 3


def test_a_run_is_replaced_only_by_one_that_can_begin(tmp_path):
    """What is wrong with the options, the data or the model is found before the old run's files go."""
    out = tmp_path / "run"
    train(out, "--steps", "1")
    before = contents(out)
    for argv in (["--shots", "500"], ["--model", tmp_path], ["--gists", "1000"], ["--data", tmp_path]):
        train(out, "--steps", "1", *argv, "--overwrite", status=2)
        assert_equal(contents(out), before)
    train(out, "--steps", "2", "--overwrite")
    assert len(contents(out)[1]) == 2 and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_two_commands_cannot_write_into_one_folder(tmp_path, monkeypatch, capsys):
    """Training and evaluation alike."""
    out = tmp_path / "run"
    train(out, "--steps", "1")
    files = {path: path.read_bytes() for path in out.iterdir()}
    (pid,) = launch(tmp_path / "log", "--task", "p3", *SHORT, "--out", out, "--overwrite", "--steps", "2000")
    while (out / "results.json").exists():
        time.sleep(0.005)
    try:
        for options in (["--overwrite"], ["--resume"]):
            line = error(
                monkeypatch, capsys, "--task", "p3", *SHORT, "--steps", "2000", "--out", out, *options
            )
            assert "another command is writing here" in line or "nothing to resume from" in line
        assert "another command is writing here" in run_here(out, program="eval", status=2).stderr
    finally:
        os.kill(pid, signal.SIGKILL)
        wait([pid])
    assert files.keys() and not (out / "results.json").exists()
    train(out, "--steps", "1", "--overwrite")  # the lock ends with the process
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["run"]


def test_a_run_folder_may_be_a_link_or_the_folder_we_are_in(tmp_path, monkeypatch):
    (tmp_path / "far" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "run")
    for out, more in (
        (tmp_path / "link", []),
        (tmp_path / "link", ["--overwrite"]),
        (Path("."), ["--overwrite"]),
    ):
        monkeypatch.chdir(tmp_path / "far" / "run")
        train(out, "--steps", "1", *more)
        assert (tmp_path / "far" / "run" / "results.json").exists() and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "far").iterdir()) == ["run"]


def test_results_are_kept_where_nothing_can_be_printed(tmp_path):
    out = tmp_path / "run"
    train(out, "--steps", "1")
    for redirect, status in (("> /dev/full", 2), ("2>&- >&-", 0)):
        (out / "results.json").unlink()
        shell = f"{sys.executable} eval.py {out} --limit 2 --sets 1 --no-controls {redirect}"
        done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and ("No space left" in done.stderr) == (status == 2), done.stderr
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
        assert json.loads((out / "results.json").read_text())["average"] >= 0


@pytest.mark.parametrize("change, message", [
    ({"exp_avg.gists": torch.zeros(2)}, "exp_avg.gists is"), ({"exp_avg_sq.gists": None}, "exp_avg_sq.gists is missing"),
    ({"exp_avg.gists": torch.full((4, 128), torch.nan)}, "exp_avg.gists holds NaN"),
    ({"gists": torch.zeros(4, 128, dtype=torch.int32)}, "gists is torch.int32"),
    ("1" * 5000, "step 1111"), ("-1", "step -1"), ("3.5", "step 3.5"), ("99", "step 99"), ("nan", "step nan"),
], ids=range(9))  # fmt: skip
def test_a_crafted_state_is_refused(tmp_path, half_a_run, change, message):
    out = tmp_path / "run"
    shutil.copytree(half_a_run, out)
    tensors, about = load_tensors(out / "state.safetensors")
    if isinstance(change, str):
        about["steps"] = change
    else:
        tensors = {name: t for name, t in (tensors | change).items() if t is not None}
    save_tensors(out / "state.safetensors", tensors, about)
    assert message in run_here("--resume", "--out", out, status=2).stderr


def test_a_run_goes_on_with_its_own_model_alone(tmp_path, half_a_run):
    shutil.copytree(half_a_run, tmp_path / "run")
    tensors, about = load_tensors(tmp_path / "run" / "state.safetensors")
    save_tensors(tmp_path / "run" / "state.safetensors", tensors, about | {"base": "another"})
    assert "another model" in run_here("--resume", "--out", tmp_path / "run", status=2).stderr


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
    run_here("--resume", "--out", tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_path_in_a_run_works_from_any_folder_and_says_when_it_moved(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    train("run", "--steps", "1", "--model", "model", "--no-controls")
    monkeypatch.chdir("/")
    again = ["--limit", "2", "--sets", "1", "--no-controls"]
    run_here(tmp_path / "run", *again, program="eval")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    gone = run_here(tmp_path / "run", *again, program="eval", status=2).stderr
    assert f"{tmp_path / 'model'}: no such folder" in gone and "--model says where it is now" in gone
    run_here(tmp_path / "run", *again, "--model", tmp_path / "elsewhere", program="eval")


def test_a_model_with_other_weights_in_any_layer_is_refused(tmp_path):
    train(tmp_path / "run", "--steps", "1", "--no-controls")
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "other")
    tensors, about = load_tensors(tmp_path / "other" / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 2
    save_tensors(tmp_path / "other" / "model.safetensors", tensors, about)
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "words")
    words = (tmp_path / "words" / "tokenizer.model").read_bytes()
    (tmp_path / "words" / "tokenizer.model").write_bytes(
        words.replace("▁kilo".encode(), b"\0" * 7)
        .replace("▁jade".encode(), "▁kilo".encode())
        .replace(b"\0" * 7, "▁jade".encode())
    )
    for name in ("other", "words"):
        line = run_here(
            tmp_path / "run",
            "--model",
            tmp_path / name,
            "--limit",
            "1",
            "--out",
            tmp_path / "e",
            program="eval",
            status=2,
        ).stderr
        assert "was trained on another model" in line


def test_scores_that_are_not_finite_are_refused(tmp_path):
    shutil.copytree(ROOT / "tiny" / "llama-c", tmp_path / "broken")
    tensors, about = load_tensors(tmp_path / "broken" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0] = torch.nan
    save_tensors(tmp_path / "broken" / "model.safetensors", tensors, about)
    for task in ("p3", "sni"):
        asked = [
            "--task",
            task,
            "--method",
            "zeroshot",
            "--model",
            tmp_path / "broken",
            "--limit",
            "1",
            "--out",
            tmp_path / task,
        ]
        assert (
            "aren't finite" in run_here(*asked, program="eval", status=2).stderr
            and not (tmp_path / task / "results.json").exists()
        )


def test_several_sets_are_counted_as_they_are_read(tmp_path, hypernetwork):
    """Each set is read in a context of its own; in context, there is one."""
    run_here(
        hypernetwork,
        "--average",
        "3",
        "--limit",
        "2",
        "--no-controls",
        "--sets",
        "1",
        "--out",
        tmp_path / "three",
        program="eval",
    )
    one, three = (
        json.loads((out / "results.json").read_text())["shots"] for out in (hypernetwork, tmp_path / "three")
    )
    assert one == {"hyper": 4, "fewshot": 4} and three == {"hyper": 12, "fewshot": 4}


def test_a_tuned_prefix_is_used_for_its_own_task_alone(tmp_path):
    data = tmp_path / "P3"
    shutil.copytree(FEW_TASKS, data, symlinks=True)
    short = ["--data", data, "--task", "prefix", "--init", "text", "--steps", "1", "--out", tmp_path / "run"]
    train(tmp_path / "run", *short)
    names = (data / "splits" / "test_tasks.txt").read_text().split()
    (data / "splits" / "test_tasks.txt").write_text("\n".join(reversed(names)))
    assert "other tasks" in run_here(tmp_path / "run", "--limit", "2", program="eval", status=2).stderr


def test_a_run_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.open_run", None)  # nothing may have been loaded
    (tmp_path / "file").write_text("mine")
    assert "is a file" in error(monkeypatch, capsys, "--task", "p3", "--out", tmp_path / "file" / "run")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "not a folder" in error(monkeypatch, capsys, "--task", "p3", "--out", tmp_path / "loop")
    if os.geteuid():  # nothing is closed to root
        (tmp_path / "closed").mkdir(mode=0o500)
        assert "not writable" in error(
            monkeypatch, capsys, "--task", "p3", "--out", tmp_path / "closed" / "run"
        )
