"""What is done with a finished run: answering after own examples, the cost, tables and curves."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import threading
import time
from statistics import fmean

import pytest
import torch
from conftest import ROOT, SHORT, config, contents, part_of, random_hyper, refusal, run, train
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import llama
from data import Episode, Example
from eval import gist_context
from llama import InputError, Tokenizer, generate, load, read_config
from lora import load_tensors, save_tensors
from run import open_run, read_args, resolve_args
from tools import bench, reproduce
from tools.cost import flops
from tools.export import METADATA
from tools.probe import asked_back
from tools.report import MADE_BY, compare, plot


# ------------------------------------------------------------------------------------- own examples

QUESTION = ["--input", "The fox sleeps.", "--options", "kilo,jade"]


def answer(folder, *argv, status=0):
    return run(folder, *argv, program="answer", status=status)


@pytest.fixture
def examples(tmp_path):
    rows = [{"input": f"The {w} is old.", "output": label} for w, label in (("fox", "kilo"), ("dog", "jade"))]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "my.jsonl"


def test_own_examples_are_compressed_kept_and_answered_after(tmp_path, hypernetwork, examples, monkeypatch):
    gists = tmp_path / "my.safetensors"
    done = answer(hypernetwork, "--examples", examples, "--save", gists)
    assert "2 examples" in done.stdout and "became 4 gists" in done.stdout and gists.stat().st_size < 20_000
    kept = answer(hypernetwork, "--gists", gists, QUESTION).stdout
    fresh = answer(hypernetwork, "--examples", examples, QUESTION).stdout
    assert kept.strip() == fresh.strip().splitlines()[-1] and kept.split()[0] in ("kilo", "jade")
    answer(hypernetwork, "--gists", gists, QUESTION, "--dtype", "bfloat16")  # kept in float32
    monkeypatch.setattr("sys.stdin", io.StringIO("The fox sleeps.\n\nThe dog waits.\n"))
    lines = answer(hypernetwork, "--gists", gists, "--options", "kilo,jade").stdout.splitlines()
    assert len(lines) == 2 and lines[0] == kept.strip()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a fox\n\xff\xfe b\n"), "utf-8"))
    refused = answer(hypernetwork, "--gists", gists, "--options", "kilo,jade", status=2)
    assert "stdin: not text" in refused.stderr
    own_words = answer(hypernetwork, "--gists", gists, ["--input", "The fox sleeps."]).stdout
    assert own_words.endswith("\n") and "%" not in own_words

    model = ["--model", ROOT / "tiny" / "llama"]
    another_base = answer(hypernetwork, *model, "--gists", gists, QUESTION, status=2).stderr
    assert "was trained on another model" in another_base
    refused = answer(another_run(tmp_path, hypernetwork), "--gists", gists, QUESTION, status=2).stderr
    assert "made with another run" in refused.strip().splitlines()[-1]
    examples.write_text('{"input": "a"}\n')
    assert "line 1: output" in answer(hypernetwork, "--examples", examples, QUESTION, status=2).stderr


def another_run(tmp_path, hypernetwork):
    """A finished run of the same base, with other weights."""
    folder = shutil.copytree(hypernetwork, tmp_path / "another")
    tensors, about = load_tensors(folder / "adapters.safetensors")
    tensors = {name: tensor + 0.01 for name, tensor in tensors.items()}
    save_tensors(folder / "adapters.safetensors", tensors, about)
    return folder


def test_own_examples_may_come_from_a_pipe(tmp_path, hypernetwork):
    rows = [{"input": f"The {word} is old.", "output": "kilo"} for word in ("fox", "dog")]
    text = "".join(json.dumps(row) + "\n\n" for row in rows)
    (tmp_path / "file").write_text(text)
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_text, args=[text]).start()
    paths = (tmp_path / "pipe", tmp_path / "file")
    piped, file = (answer(hypernetwork, "--examples", path, QUESTION).stdout for path in paths)
    assert piped == file and "2 examples" in file


def test_a_prefix_beside_a_fused_instruction_is_kept_too(tmp_path, examples):
    short = "--steps 1 --batch-size 2 --gists 4 --limit 1 --no-controls --measure 0"
    run("--task sni --fuse-instruction", short, "--data", part_of("sni", 2, 1), "--out", tmp_path / "run")
    answer(tmp_path / "run", "--examples", examples, "--save", tmp_path / "my.safetensors")
    kept = answer(tmp_path / "run", "--gists", tmp_path / "my.safetensors", QUESTION).stdout
    fresh = answer(tmp_path / "run", "--examples", examples, QUESTION).stdout
    assert kept.strip() == fresh.strip().splitlines()[-1]


def test_what_averaged_gists_take_is_said_of_the_average(tmp_path, examples):
    train(tmp_path / "run", "--steps", "1", "--no-controls", "--average", "2")
    said = answer(tmp_path / "run", "--examples", examples, "--save", tmp_path / "my.safetensors").stdout
    saved = load_tensors(tmp_path / "my.safetensors")[0]
    size = sum(x.numel() * x.element_size() for name, x in saved.items() if name != "offset")
    tokens = int(said.split(" tokens")[0].split()[-1])
    assert saved["0.key"].shape[2] == 4 and "became 4 gists" in said
    assert f"{size:,} bytes instead of {size // 4 * tokens:,}" in said


# ------------------------------------------------------------- what a tool makes, and what it replaces


@pytest.fixture
def figures(monkeypatch):
    """The pictures that are saved, in a list."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures, savefig = [], figure.savefig

    def listing(self, *args, **options):
        figures.append(self)
        savefig(self, *args, **options)

    monkeypatch.setattr(figure, "savefig", listing)
    return figures


@contextlib.contextmanager
def full_disk(size=100):
    """No file can grow longer than this, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_saved_prefix_replaces_only_one_of_the_same_run(tmp_path, hypernetwork, examples):
    mine = tmp_path / "mine.safetensors"
    save_file({"weights": torch.ones(3)}, mine, {"format": "pt"})
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "notes.safetensors").write_text("notes")
    theirs = tmp_path / "theirs.safetensors"
    answer(another_run(tmp_path, hypernetwork), "--examples", examples, "--save", theirs)
    before = contents(tmp_path) | contents(hypernetwork)
    others = [mine, theirs, examples, tmp_path, tmp_path / "link", tmp_path / "notes.safetensors"]
    for taken in (*others, hypernetwork / "adapters.safetensors"):
        refused = answer(hypernetwork, "--examples", examples, "--save", taken, status=2).stderr
        assert f"--save {taken}: would replace something" in refused and "not a saved prefix" in refused
    assert contents(tmp_path) | contents(hypernetwork) == before and (tmp_path / "link").is_symlink()

    own = tmp_path / "own.safetensors"
    answer(hypernetwork, "--examples", examples, "--save", own)
    first = own.read_bytes()
    examples.write_text(examples.read_text().splitlines()[0])
    answer(hypernetwork, "--examples", examples, "--save", own)
    assert own.read_bytes() != first, "our own is replaced"


OTHERS = ["an adapter of peft's", "a file", "more than an export", "damaged weights", "a config alone"]


@pytest.mark.parametrize("what", OTHERS)
def test_an_export_replaces_nothing_but_an_export_of_ours(tmp_path, hypernetwork, what):
    folder = tmp_path / "hyper"
    if what == "a file":
        folder.write_text("mine")
    elif what == "a config alone":
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"mine": 1}')
    else:
        for _ in range(2):  # an earlier export may be replaced
            run(hypernetwork, "--out", tmp_path, program="export")
    weights = folder / "adapter_model.safetensors"
    if what == "an adapter of peft's":  # the same names, without our mark
        save_file(load_tensors(weights)[0], weights, {"format": "pt"})
    elif what == "more than an export":
        (folder / "README.md").write_text("mine")
    elif what == "damaged weights":
        weights.write_bytes(weights.read_bytes()[:50])
    before = contents(tmp_path)
    assert str(folder) in refusal(hypernetwork, "--out", tmp_path, program="export")
    assert contents(tmp_path) == before
    assert "folder of a run" in refusal(hypernetwork, "--out", hypernetwork, program="export")


@pytest.mark.parametrize("what", ["a prefix", "an export", "a picture"])
def test_what_cannot_be_written_leaves_the_old_one(tmp_path, hypernetwork, examples, what):
    argv, program, path = {
        "a prefix": (["--examples", examples, "--save", tmp_path / "p"], "answer", tmp_path / "p"),
        "an export": (["--out", tmp_path], "export", tmp_path / "hyper"),
        "a picture": (["--sets 1 --out", tmp_path / "p.png"], "probe", tmp_path / "p.png"),
    }[what]
    run(hypernetwork, *argv, program=program)
    before = contents(tmp_path)
    with full_disk():
        refused = refusal(hypernetwork, *argv, program=program)
    assert str(path) in refused and "can't be written" in refused and contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_picture_replaces_only_a_picture_of_ours(tmp_path, figures, kind):
    from matplotlib.figure import Figure

    write_run(tmp_path / "run", 60.0)
    Figure().savefig(tmp_path / f"theirs.{kind}")
    (tmp_path / f"folder.{kind}").mkdir()
    (tmp_path / f"link.{kind}").symlink_to("nowhere")
    (tmp_path / f"empty.{kind}").touch()
    (tmp_path / f"about.{kind}").write_text("<svg><text>HyperLlama reads examples</text></svg>")
    before = contents(tmp_path)
    plot_to = ["plot", tmp_path / "run", "--out"]
    for name in ("theirs", "folder", "link", "empty", "about"):
        refused = refusal(*plot_to, tmp_path / f"{name}.{kind}", program="report")
        assert "isn't a picture of ours" in refused
    assert contents(tmp_path) == before and (tmp_path / f"link.{kind}").is_symlink()

    path = tmp_path / f"ours.{kind}"
    run(*plot_to, path, program="report")
    first = path.read_bytes()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    run(*plot_to, path, program="report")
    assert path.read_bytes() != first and MADE_BY.encode() in path.read_bytes(), "our own is replaced"


def test_a_tuned_prefix_is_exported_for_each_task(tmp_path):
    out = tmp_path / "run"
    run("--task prefix --init text --steps 1", SHORT, "--out", out)
    run(out, "--out", tmp_path / "peft", program="export")
    a_run = open_run(resolve_args({}, read_args(out)), out)
    c = a_run.hyper.model.config
    assert len(a_run.hyper.tasks) == 2
    for t, name in enumerate(a_run.hyper.tasks):
        (embeddings,) = load_tensors(tmp_path / "peft" / name / "adapter_model.safetensors")[0].values()
        layers = embeddings.view(4, c.layers, 2, c.kv_heads, c.head_size).permute(1, 2, 3, 0, 4)
        tuned = a_run.task.prefix_of(a_run, t).past
        assert torch.equal(layers, torch.stack([torch.stack((k[0], v[0])) for k, v in tuned]))
    assert "no hypernetwork" in refusal(out, "--examples", ROOT / "tiny" / "my.jsonl", program="answer")


EITHER = "either --examples FILE or --gists FILE"


@pytest.mark.parametrize("argv, message", [
    ([], EITHER), (["--save", "f"], EITHER), (["--input", "x"], EITHER),
    (["--examples", "a", "--gists", "b"], EITHER), (["--examples", ""], "an empty file name"),
    (["--gists", "g", "--save", "f"], "--save needs --examples"),
    (["--gists", "g", "--options", "a"], "two or more"), (["--gists", "g", "--input", " "], "is empty"),
    (["--examples", "e", "--save", "nowhere/g"], "there is no folder nowhere"),
    (["--gists", "g", "--options", "a,a"], "two or more"),
])  # fmt: skip
def test_options_of_answer_that_do_not_go_together_are_refused(tmp_path, argv, message):
    assert message in refusal(tmp_path, argv, program="answer")


def test_each_example_is_asked_back_at_its_place(tmp_path, hypernetwork):
    shots = [Example("x", "a"), Example("y", "b", ("b", "c")), Example("z", "a")]
    episode = Episode([Example("q", "b", ("a", "b"))], shots)
    again = asked_back(episode, 2)
    assert [query.input for query in again.queries] == ["x", "y"] == [shot.input for shot in again.shots]
    assert [query.choices for query in again.queries] == [("a", "b"), ("b", "c")]
    asked = [hypernetwork, "--sets 1 --out", tmp_path / "probe.png"]
    said = run(*asked, program="probe").stdout
    assert (tmp_path / "probe.png").exists() and "place among 4 examples" in said and "in context" in said
    (tmp_path / "probe.png").write_text("mine")
    assert "isn't a picture of ours" in refusal(*asked, program="probe")
    assert (tmp_path / "probe.png").read_text() == "mine"


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


QUESTIONS = "The fox sleeps.|A dog waits near the rope.|The red cow is in the barn.|fox|Which is it, the dog?"


def test_a_saved_prefix_answers_in_transformers_as_it_does_here(tmp_path, hypernetwork, examples):
    """Greedy, to the token, without position ids: the gists stand at 0 … G-1, as a cache of G tokens does."""
    transformers = pytest.importorskip("transformers")
    saved = tmp_path / "my.safetensors"
    answer(hypernetwork, "--examples", examples, "--save", saved)
    folder = ROOT / "tiny" / "llama-c"
    tokenizer = Tokenizer(folder)
    mine = load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gists = load_tensors(saved)[0]
    assert gists["offset"].tolist() == [gists["0.key"].shape[2]] == [4]
    past = [(gists[f"{i}.key"], gists[f"{i}.value"]) for i in range(theirs.config.num_hidden_layers)]
    for question in QUESTIONS.split("|"):
        cache = transformers.DynamicCache()
        for i, (key, value) in enumerate(past):
            cache.update(key, value, i)
        prompt = [tokenizer.bos, *tokenizer.encode(f"\nInput:\n{question}\nOutput:\n")]
        ids = torch.tensor([[0] * 4 + prompt])
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        new = theirs.generate(ids, past_key_values=cache, pad_token_id=0, **how)[0, ids.shape[1] :].tolist()
        (ours,) = generate(mine, [prompt], 12, tokenizer.eos, past=past, offset=gists["offset"])
        assert (new[: new.index(tokenizer.eos)] if tokenizer.eos in new else new) == ours


def test_exported_adapters_open_in_peft_with_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    train(tmp_path / "run", "--steps 2 --downstream lora")
    run(tmp_path / "run", "--out", tmp_path / "peft", program="export")
    names = ["downstream", "hyper"]
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == names
    assert load_tensors(tmp_path / "peft" / "hyper" / "adapter_model.safetensors")[1] == METADATA
    args = resolve_args({}, read_args(tmp_path / "run"))
    ours = open_run(args, tmp_path / "run").hyper.model
    x = torch.randint(3, 900, (2, 20), generator=torch.Generator().manual_seed(0))
    for name in names:
        base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft" / name).eval()
        with torch.no_grad():
            mine = ours(x, adapter=name)[0]
            torch.testing.assert_close(mine, theirs(x).logits, atol=1e-4, rtol=1e-4)
            assert (mine - ours(x)[0]).abs().max() > 1e-3, "the set does something"


# ---------------------------------------------------------------------- the cost, tables and curves


def test_the_cost_of_gists_is_printed(hypernetwork):
    printed = run(hypernetwork, program="cost").stdout
    assert "Llama-2-7B" in printed and "gists ahead after" in printed
    c = read_config(ROOT / "tiny" / "llama-c")
    (gists,) = (line.split() for line in printed.splitlines()[:8] if line.startswith("gists"))
    assert int(gists[3].replace(",", "")) == 4 * 2 * c.layers * c.kv_heads * c.head_size * 4, (
        "bytes of 4 gists"
    )


def test_the_cost_of_anchors_is_that_of_the_positions_that_are_kept(tmp_path):
    out = tmp_path / "run"
    train(out, "--task symbol --anchors --steps 1 --data", ROOT / "tiny" / "symbol")
    a_run = open_run(resolve_args({}, read_args(out)), out)
    kept = [
        len(gist_context(a_run, task.evaluation(0, 0, a_run.args.shots, 20)[0])[0].kept)
        for task in a_run.task.load(a_run.args, a_run.formatter, "test")
    ]
    printed = run(out, program="cost").stdout
    assert f" {round(fmean(kept))} anchors" in printed and min(kept) > 1 + a_run.args.shots


@pytest.mark.parametrize("T, P, adapter, kept", [
    (40, 0, None, 0), (40, 0, "hyper", 16), (40, 0, None, 40), (7, 16, None, 0), (9, 30, "all", 0)
])  # fmt: skip
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


def write_run(folder, average, **args):
    folder.mkdir(parents=True)
    args = {"task": "p3", "method": "hyper", "model": "m", "data": "d", "shots": 4, "init": "random"} | args
    results = {"metric": "accuracy", "average": average, "baselines": {"zeroshot": 50.0}, "controls": {}}
    (folder / "results.json").write_text(json.dumps(results | {"seconds": 2.0, "args": args}))
    (folder / "args.json").write_text(json.dumps(args))
    lines = [{"step": step, "loss": 1.0, "seconds": 1.0} for step in (1, 2)]
    lines[1] |= {"score": average, "controls": {"no_prefix": 50.0}}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_of_runs_has_mean_and_deviation(tmp_path):
    for seed, value in enumerate((60.0, 70.0)):
        write_run(tmp_path / "one_row" / f"seed{seed}", value)
    write_run(tmp_path / "two" / "seed0", 10.0)
    with open(tmp_path / "two" / "seed0" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')  # as a killed run leaves it
    lines = compare([tmp_path / "one_row", tmp_path / "two"]).splitlines()
    assert lines[0] == "| accuracy | result | 0-shot | seconds a run |" and len(lines) == 4
    assert lines[2] == "| one row | 65.0 ± 7.1 | 50.0 ± 0.0 | 4 |" and lines[3] == "| two | 10.0 | 50.0 | 4 |"
    write_run(tmp_path / "two" / "seed0" / "data-other", 90.0, data="other")
    assert compare([tmp_path / "two" / "seed0"]).splitlines()[2] == "| seed0 | 10.0 | 50.0 | 4 |", (
        "a run itself"
    )
    with pytest.raises(InputError, match="no runs"):
        compare([tmp_path])
    write_run(tmp_path / "two" / "seed1", 20.0, shots=2)
    with pytest.raises(InputError, match="differ in shots"):
        compare([tmp_path / "two"])
    write_run(tmp_path / "three" / "seed0", 20.0, shots=2)
    rows = [tmp_path / "one_row", tmp_path / "three"]
    assert run("table", *rows, program="report").stdout.splitlines()[3] == "| three | 20.0 | 50.0 | 4 |"


def test_a_picture_says_what_it_shows(tmp_path, figures):
    write_run(tmp_path / "measured", 60.0)
    write_run(tmp_path / "text", 1.0, task="hyperpretrain")
    unmeasured = tmp_path / "unmeasured"
    write_run(unmeasured, 60.0)
    (unmeasured / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "seconds": 1.0}) + "\n")
    for folder in ("measured", "text", "unmeasured"):
        run("plot", tmp_path / folder, "--out", tmp_path / "a.png", program="report")
    run("plot", tmp_path / "measured", "--by", "shots", "--out", tmp_path / "a.png", program="report")
    accuracy = "accuracy on held-out rows, %"
    labels = [(figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) for figure in figures]
    assert labels == [("step", accuracy), ("step", accuracy), ("step", "loss per token"), ("shots", accuracy)]
    (unmeasured / "log.jsonl").write_text("")
    for name, message in (("a.png", "nothing to draw"), ("curves", "ends in .png")):
        assert message in refusal("plot", unmeasured, "--out", tmp_path / name, program="report")
    no_run = ["plot", tmp_path, "--out", tmp_path / "a.png"]
    assert "not the folder of a run" in refusal(*no_run, program="report")


def test_bars_have_the_means_of_seeds_and_their_deviations_and_losses_stand_apart(tmp_path, figures):
    runs = [tmp_path / f"seed{seed}" for seed in range(2)]
    for folder, value in zip(runs, (60.0, 70.0)):
        write_run(folder, value)
    run("bars", *runs, "--out", tmp_path / "bars.png", program="report")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0-shot", "gists"]
    assert [bar.get_width() for bar in axes.patches] == [50.0, 65.0]
    (whiskers,) = axes.collections
    ends = [segment[:, 0].tolist() for segment in whiskers.get_segments()]
    assert ends[0] == [50.0, 50.0] and ends[1] == pytest.approx([65 - 7.07, 65 + 7.07], abs=0.01)

    for folder, loss in zip(runs, (1.0, 3.0)):
        line = {"step": 3, "loss": 9.0, "label_loss": loss}
        with open(folder / "log.jsonl", "a") as log:
            for line in (line | {"end_loss": 5.0}, line | {"step": 4}):
                log.write(json.dumps(line) + "\n")
    plot(runs, tmp_path / "c.png")
    below = {line.get_label(): line.get_ydata() for line in figures[1].axes[1].lines}
    assert {label: list(ys) for label, ys in below.items()} == {"label": [2.0, 2.0], "EOS after it": [5.0]}
    bars = ["--out", tmp_path / "b.png"]
    assert "not the folder of a run" in refusal("bars", tmp_path, *bars, program="report")
    write_run(tmp_path / "other", 60.0, shots=2)
    assert "these do in shots" in refusal("bars", runs[0], tmp_path / "other", *bars, program="report")
    assert "its result is a loss" in refusal("bars", ROOT / "tiny" / "llama-c", *bars, program="report")
    assert "--by belongs to plot" in refusal("bars", *runs, "--by", "shots", *bars, program="report")
    write_run(tmp_path / "prefix", 60.0, task="prefix")
    run("bars", tmp_path / "prefix", *bars, program="report")
    assert [label.get_text() for label in figures[-1].axes[0].get_yticklabels()] == ["0-shot", "prefix"]


def fake_runs(tmp_path, monkeypatch, program: str) -> None:
    """In place of train.py; and a table of three rows."""
    (tmp_path / "train.py").write_text(program)
    monkeypatch.setattr(reproduce, "PROJECT", tmp_path)
    monkeypatch.setattr(reproduce, "ALL", tmp_path / "all")
    monkeypatch.setattr(reproduce, "ROWS", {"p3": {name: "--task p3" for name in "abc"}})


def test_the_table_by_tokens_a_gist_has_each_row_where_its_options_say(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "ALL", tmp_path)
    for rows in reproduce.RATIOS.values():
        for n, (table, row) in enumerate(rows):
            options = f"--gists 16 --shots 16 {reproduce.ROWS[table][row]}".split()
            args = {
                option: int(options[-options[::-1].index(f"--{option}")]) for option in ("gists", "shots")
            }
            for seed in range(2):
                write_run(reproduce.folder_of(table, row) / f"seed{seed}", 10.0 * n + 2 * seed, **args)
    head, _, *lines = reproduce.ratio_table()
    assert head == "| tokens a gist | 6 | 12 | 24 | 47 | 95 |"
    deviations = "1.0 ± 1.4 | 11.0 ± 1.4 | 21.0 ± 1.4 | 31.0 ± 1.4 | 41.0 ± 1.4"
    assert lines[:3] == [f"| {line} | {deviations} |" for line in reproduce.RATIOS]
    assert lines[3:] == ["| 0-shot |" + " 50.0 ± 0.0 |" * 5]


def test_tables_are_not_written_where_a_run_failed(tmp_path, monkeypatch, capsys):
    fake_runs(tmp_path, monkeypatch, "import sys; sys.exit('0' in sys.argv)")
    with pytest.raises(InputError, match="3 runs failed .*seed0.log"):
        reproduce.run_all(["p3"], 2)
    assert capsys.readouterr().out.count("done") == 6, "the others are finished all the same"


def test_ctrl_c_ends_the_runs_and_begins_no_others(tmp_path, monkeypatch):
    fake_runs(tmp_path, monkeypatch, "import sys, time; print('on', flush=True); time.sleep(60)")

    def press():
        while not any(path.read_text() for path in (tmp_path / "all").glob("p3/*/*.log")):
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_all(["p3"], 1)
    assert len(list((tmp_path / "all").glob("p3/*/*.log"))) == 1 and not reproduce.RUNNING


def test_the_bench_measures_the_model_that_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHAPE", config(2))
    calls = []
    monkeypatch.setattr(llama, "checkpoint", lambda layer, *inputs, **how: calls.append(1) or layer(*inputs))
    for checkpointed in (False, True):
        bench.memory_of(tmp_path, bench.our_logits, checkpointed)
        assert bool(calls) == checkpointed
    took, _ = bench.growth_of(tmp_path, 128, 20, 2)  # more gists than the model of other rows has
    assert took > 0
