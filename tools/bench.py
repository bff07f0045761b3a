"""How fast and how small. Each row of the table is a ratio, measured side by side in one run.

    python -m tools.bench                  the table, some minutes
    python -m tools.bench step generate    only some rows of it
    python -m tools.bench growth           how cost grows, drawn as figures/growth.png
    python -m tools.bench profile          what the miniature's training and evaluation spend their time with
    python -m tools.bench evaluation command --against DIR    whole commands, against another checkout

On a CPU the model is of middle size (width 1024, 8 layers); where there is a GPU it has the shape of
Llama-2-7B, in NF4. All ways of a row do the same work on the same random weights, and that is
checked before anything is timed; then they alternate, and the medians are compared. The peers are
`transformers` and `peft` (pip install transformers peft); without them their rows are left out.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import ctypes
import gc
import json
import multiprocessing
import random
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch, Sample, collate
from eval import columns, draw_held_out, score, score_choices
from gist import HyperLlama, gist_mask, keep_all, read_contexts, with_gists
from llama import KV, Config, InputError, Linear, Llama, Tokenizer, generate, load, positions_of
from lora import NF4Linear, add_lora, linears
from run import PROJECT, Parser, number, open_run, print_lines, run_command
from tasks.hyperpretrain import save_checkpoint
from tiny.make import write_jsonl, write_lists
from tools.cost import LLAMA_2_7B, flops
from tools.report import write_picture
from train import cross_entropy, parse

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
MIDDLE = Config(32000, 1024, 8, 16, 16, 64, 2752, 1e-5, 10000.0, 4096)
SHAPE = LLAMA_2_7B if CUDA else MIDDLE
GISTS, RANK, ALPHA = 16, 8, 16
HAVE_PEERS = find_spec("transformers") is not None and find_spec("peft") is not None

# ------------------------------------------------------------------------------------------ the models


@cache
def checkpoint(scratch: Path) -> Path:
    """A Hugging Face folder of random weights."""
    folder = scratch / ("7b" if CUDA else "middle")
    if (folder / "config.json").exists():
        return folder
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(SHAPE).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    for tensor in tensors.values():
        if tensor.dim() > 1:  # the others are of norms
            tensor.normal_(0, 0.02, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, SHAPE, tensors)
    return folder


@cache
def our_model(scratch: Path, dtype: torch.dtype) -> HyperLlama:
    model = load(checkpoint(scratch), DEVICE, dtype, NF4Linear if CUDA else Linear)
    add_lora(model, "hyper", RANK, ALPHA, torch.Generator().manual_seed(0), keys_values_only=True)
    return HyperLlama(model, model.embed_tokens.weight[:GISTS])


@cache
def their_model(scratch: Path) -> tuple[nn.Module, nn.Module, nn.Parameter]:
    """The peers' model with its adapter; the language model inside; and the gists' embeddings, as ours."""
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": DTYPE, "attn_implementation": "sdpa"}
    if CUDA:
        options["device_map"] = DEVICE
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(scratch), **options)
    matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=matrices))
    return peft, peft.base_model.model, nn.Parameter(our_model(scratch, DTYPE).gists.detach().clone())


def their_cache(layers: Sequence[KV]):
    from transformers import DynamicCache

    past = DynamicCache()
    for i, (key, value) in enumerate(layers):
        past.update(key, value, i)
    return past


# ------------------------------------------------------------------- a training step, in three ways


def random_words(rng: random.Random, count: int) -> list[int]:
    return rng.choices(range(3, SHAPE.vocab), k=count)


def a_batch(context: int = 1024, gists: int = GISTS, queries: int = 4) -> Batch:
    """One row of examples and gists, and queries of about 96 tokens after it: the last five are predicted."""
    rng = random.Random(0)
    examples = [1, *random_words(rng, context - gists - 1)]
    asked = []
    for n in range(queries):
        length = 88 + 16 * n // max(1, queries - 1)
        asked.append(([1, *random_words(rng, length - 6)], random_words(rng, 5)))
    row = with_gists(examples, range(SHAPE.vocab, SHAPE.vocab + gists))
    return collate([Sample([row], asked)]).to(DEVICE)


def our_logits(scratch: Path, batch: Batch, dtype: torch.dtype = DTYPE) -> Tensor:
    return our_model(scratch, dtype)(batch)[0]


def their_embeddings(scratch: Path, tokens: Tensor) -> Tensor:
    """Of examples and gists."""
    _, model, gists = their_model(scratch)
    words = model.get_input_embeddings()(tokens[:, :-GISTS])
    return torch.cat((words, gists.to(words.dtype).expand(len(tokens), -1, -1)), dim=1)


def their_two_passes(scratch: Path, batch: Batch) -> Tensor:
    """With past_key_values: one hyper pass for all queries, logits at the targets alone."""
    peft, model, _ = their_model(scratch)
    N = len(batch.tokens)
    examples = batch.context[0].tokens
    read = model.model(inputs_embeds=their_embeddings(scratch, examples), use_cache=True).past_key_values
    layers = [(layer.keys[:, :, -GISTS:], layer.values[:, :, -GISTS:]) for layer in read.layers]
    past = their_cache([(k.expand(N, -1, -1, -1), v.expand(N, -1, -1, -1)) for k, v in layers])
    how = {"past_key_values": past, "position_ids": examples.shape[1] + positions_of(batch.tokens)}
    with peft.disable_adapter():
        hidden = model.model(input_ids=batch.tokens, use_cache=True, **how).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.select])


def their_joint_pass(scratch: Path, batch: Batch) -> Tensor:
    """Under a 4-D mask: a row per query, the adapter on throughout, logits everywhere."""
    _, model, _ = their_model(scratch)
    examples = batch.context[0].tokens.expand(len(batch.tokens), -1)
    queries = model.get_input_embeddings()(batch.tokens)
    words = torch.cat((their_embeddings(scratch, examples), queries), dim=1)
    see = gist_mask(torch.cat((examples, batch.tokens), dim=1) >= SHAPE.vocab)[:, None]
    mask = torch.zeros(see.shape, dtype=words.dtype, device=words.device)
    mask = mask.masked_fill(~see, torch.finfo(words.dtype).min)
    logits = model(inputs_embeds=words, attention_mask=mask, use_cache=False).logits
    return logits[:, examples.shape[1] :].flatten(0, 1)[batch.select]


def training_step(logits_of: Callable[[Path, Batch], Tensor], scratch: Path, batch: Batch) -> float:
    """Forward and backward. Returns the loss."""
    loss = F.cross_entropy(logits_of(scratch, batch).float(), batch.targets)
    loss.backward()
    return loss.item()


# -------------------------------------------------------------------------------------------- measuring


def seconds(function: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def side_by_side(repeats: int, *ways: Callable[[], object]) -> list[list[float]]:
    """Seconds of each way, of every turn: warmed up once, then taking turns."""
    for function in ways:
        function()
    turns = [[seconds(function) for function in ways] for _ in range(repeats)]
    return [list(times) for times in zip(*turns)]


def peak(function: Callable[[], object]) -> float:
    """Memory in MB that a call needs at most, beyond what was there before it."""
    function()  # what stays, gradients for instance, is there before
    gc.collect()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    function()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """MB of this process: now (VmRSS), or at most since that was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3


def alone(function: Callable, *given):
    """function(*given) in a process of its own: what others left behind in memory isn't counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *given).result()


Line = list[str]  # what, ours, the other, how often as good


def as_times(what: str, ours: list[float], other: list[float], unit: str, digits=2, part=1) -> Line:
    """A line of the table: seconds or MB of every turn. part: of so many in a turn, one is shown."""
    a, b = median(ours), median(other)
    ratio = f"{b / a:.2f} ×" + middle_half([b / a for a, b in zip(ours, other)], ".2f")
    return [what, f"{a / part:,.{digits}f} {unit}", f"{b / part:,.{digits}f} {unit}", ratio]


def as_share(what: str, ours: list[float], other: list[float], unit: str, digits: int) -> Line:
    """The same of rates, which are the better the higher."""
    a, b = median(ours), median(other)
    share = f"{a / b:.0%}" + middle_half([a / b for a, b in zip(ours, other)], ".0%")
    return [what, f"{a:,.{digits}f} {unit}", f"{b:,.{digits}f} {unit}", share]


def middle_half(ratios: Sequence[float], form: str) -> str:
    """Of the turns, where there are several."""
    if len(ratios) < 2:
        return ""
    low, _, high = quantiles(ratios, n=4)
    return f" ({low:{form}} to {high:{form}})"


# ----------------------------------------------------------------------------------- rows of the table


def step(args: Namespace) -> Iterator[Line]:
    """Seconds of a training step: 1024 tokens of examples and gists, four queries after them."""
    if not HAVE_PEERS:
        return
    all_ways = (our_logits, their_two_passes, their_joint_pass)
    ours, best, usual = [partial(training_step, way, args.scratch, a_batch()) for way in all_ways]
    losses = [function() for function in (ours, best, usual)]
    if max(losses) - min(losses) > 1e-3 * losses[0] * (30 if CUDA else 1):
        raise InputError(f"bench: the ways don't do the same work: losses {losses}")
    # In pairs, so that the joint pass, which takes seven times the memory, doesn't stand between the others.
    times = side_by_side(args.repeats, ours, best)
    yield as_times("training step / transformers + peft, two passes", *times, "s")
    times = side_by_side(max(1, args.repeats // 3), ours, usual)
    yield as_times("training step / transformers + peft, joint pass", *times, "s")


def memory_of(scratch: Path, way: Callable, checkpointed: bool) -> float:
    our_model(scratch, DTYPE).model.checkpoint_activations = checkpointed
    return peak(partial(training_step, way, scratch, a_batch()))


def memory(args: Namespace) -> Iterator[Line]:
    """MB that the same step needs at most, beyond the loaded weights: medians of three."""

    def needed(way: Callable, checkpointed: bool = False) -> list[float]:
        return [median(alone(memory_of, args.scratch, way, checkpointed) for _ in range(3))]

    ours = needed(our_logits)
    if HAVE_PEERS:
        yield as_times("peak memory of it / two passes", ours, needed(their_two_passes), "MB", 0)
        yield as_times("peak memory of it / joint pass", ours, needed(their_joint_pass), "MB", 0)
    own = "peak memory of it, --checkpoint-activations / without"
    yield as_times(own, needed(our_logits, True), ours, "MB", 0)


@torch.no_grad()
def rank(args: Namespace) -> Iterator[Line]:
    """Seconds a query, and tokens a second: four options of four queries that share a thousand tokens."""
    hyper = our_model(args.scratch, DTYPE)
    rng = random.Random(1)
    (context,) = a_batch().context
    shots = context.tokens[0, :-GISTS].tolist()
    prompts = [random_words(rng, 91) for _ in range(4)]
    options = [[random_words(rng, 5) for _ in range(4)] for _ in prompts]
    same = torch.zeros(4, dtype=torch.long, device=DEVICE)  # all queries come after the same prefix

    def gists():
        return score_choices(hyper.model, prompts, options, hyper.compress(context)[same])

    def kept():
        return score_choices(
            hyper.model, prompts, options, read_contexts(hyper.model, [keep_all(shots)])[same]
        )

    def rows():  # by transformers, the four options of a query as a batch
        peft, model, _ = their_model(args.scratch)
        scores = []
        for prompt, choices in zip(prompts, options):
            tokens = torch.tensor([shots + prompt + option for option in choices], device=DEVICE)
            with peft.disable_adapter():
                logits = model(input_ids=tokens, logits_to_keep=6).logits[:, :-1].float()
            losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, -5:], reduction="none")
            scores.append((-losses.sum(1)).tolist())
        return scores

    queries = 4 * (91 + 4 * 5)  # tokens of all queries, each with its options
    others = {"examples in context, read once": (kept, len(shots) + queries)}
    if HAVE_PEERS:
        tolerance = 2e-2 * (10 if CUDA else 1)
        torch.testing.assert_close(torch.tensor(kept()), torch.tensor(rows()), atol=tolerance, rtol=1e-3)
        full = {"transformers, a full row per option": (rows, 16 * (len(shots) + 91 + 5))}
        others = full | others
    functions = [gists, *(function for function, _ in others.values())]
    ours, *theirs = side_by_side(max(1, args.repeats // 2), *functions)
    speed = (len(shots) + GISTS + queries) / median(ours)
    for (name, (_, tokens)), times in zip(others.items(), theirs):
        line = as_times(f"ranking 4 options, a query / {name}", ours, times, "s", part=len(prompts))
        line[1] += f", {speed:,.0f} tokens/s"
        line[2] += f", {tokens / median(times):,.0f} tokens/s"
        yield line


@torch.no_grad()
def generation(args: Namespace) -> Iterator[Line]:
    """Seconds for 128 tokens of each of eight rows after gists; and GB/s at which that reads the weights."""
    hyper = our_model(args.scratch, DTYPE)
    rng = random.Random(2)
    prompts = [random_words(rng, 48) for _ in range(8)]
    past = hyper.compress(a_batch().context[0])[torch.zeros(8, dtype=torch.long, device=DEVICE)].past
    offset = torch.full((8,), GISTS, device=DEVICE)  # transformers.generate counts on from the cache's length

    def ours():
        return generate(hyper.model, prompts, 128, -1, past=past, offset=offset)

    def theirs():
        peft, model, _ = their_model(args.scratch)
        # Zeros stand for what the cache holds.
        ids = torch.tensor([[0] * GISTS + prompt for prompt in prompts], device=DEVICE)
        how = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False, "pad_token_id": 0}
        how |= {"attention_mask": torch.ones_like(ids), "past_key_values": their_cache(past)}
        with peft.disable_adapter():
            return model.generate(ids, **how)[:, ids.shape[1] :].tolist()

    if HAVE_PEERS:
        agree = fmean(a == b for rows in zip(ours(), theirs()) for a, b in zip(*rows))
        if agree < 0.9 and not CUDA:  # rounding may send a row another way; in bf16, many
            raise InputError(f"bench: only {agree:.0%} of the generated tokens are the same")
        times = side_by_side(args.repeats, ours, theirs)
        yield as_times("generating 8 × 128 tokens / transformers.generate", *times, "s")

    ones = torch.ones(1 << 28, device=DEVICE, dtype=DTYPE)
    times = side_by_side(args.repeats, ours, lambda: ones.sum().item())
    generating, summing = map(median, times)
    weights = [linear.weight for linear in linears(hyper.model).values()] + [hyper.model.lm_head.weight]
    size = sum(weight.nbytes for weight in weights) / 1e9
    what = "weights read while generating / a plain sum over memory"
    yield as_share(what, [128 * size / generating], [ones.nbytes / 1e9 / summing], "GB/s", 1)
    if CUDA:
        return

    def products(rows: int) -> None:  # what bounds it: matrix products with as few rows as there are prompts
        for weight in weights:
            F.linear(torch.ones(rows, weight.shape[1]), weight)

    eight, one = (median(seconds(partial(products, rows)) for _ in range(9)) for rows in (8, 1))
    yield as_share("weights read by products of 8 rows / of one", [size / eight], [size / one], "GB/s", 1)


def limit(args: Namespace) -> Iterator[Line]:
    """GFLOP/s of the hyper pass, forward and backward, beside those of a plain matrix product."""
    hyper = our_model(args.scratch, DTYPE)
    (context,) = a_batch().context
    T = context.tokens.shape[1]
    x, weight = (torch.randn(n, SHAPE.width, device=DEVICE, dtype=DTYPE) for n in (T, SHAPE.hidden))

    def hyper_pass():
        sum(k.sum() + v.sum() for k, v in hyper.compress(context).past).backward()

    def products():
        for _ in range(20):
            F.linear(x, weight)

    # The base's products once forward, once for the gradient of their input; LoRA's also for that of
    # its weights. Half of the attention is hidden by the causal mask, and left out here.
    base = flops(SHAPE, T, kept=GISTS)
    lora = flops(SHAPE, T, kept=GISTS, rank=RANK) - base
    hidden = (SHAPE.layers - 2) * 2 * T * T * SHAPE.heads * SHAPE.head_size
    operations = (2 * (base - hidden) + 3 * lora, 20 * 2 * T * SHAPE.width * SHAPE.hidden)
    times = side_by_side(args.repeats, hyper_pass, products)
    rates = [[count / t / 1e9 for t in own] for count, own in zip(operations, times)]
    yield as_share("hyper pass, forward and backward / a matrix product", *rates, "GFLOP/s", 0)


def bfloat16(args: Namespace) -> Iterator[Line]:
    """Seconds of the training step in bfloat16, on a CPU (train.py --dtype bfloat16)."""
    ways = [partial(our_logits, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    steps = [partial(training_step, way, args.scratch, a_batch()) for way in ways]
    yield as_times("training step in bfloat16 / in float32", *side_by_side(args.repeats, *steps), "s")


# -------------------------------------------------------------------- rows of the table: two checkouts


def make_questions(folder: Path) -> Path:
    """P3 with 20 held-out prompts of 300 rows: 40 to 90 of the miniature's words, and options of 1 to 7."""
    if (folder / "splits").exists():
        return folder
    rng = random.Random(0)
    tokenizer = Tokenizer(PROJECT / "tiny" / "llama-c")
    pieces = map(tokenizer.piece, range(tokenizer.size))
    words = [piece[1:] for piece in pieces if piece.startswith("▁") and len(piece) > 3]

    def question(more: int) -> tuple[str, str, list[str]]:
        options = []
        for word in rng.sample(words, 4):
            options.append(" ".join([word, *rng.choices(words, k=rng.choice((0, more, 3 * more)))]))
        return " ".join(rng.choices(words, k=rng.randint(40, 90))), rng.choice(options), options

    train = [f"train{n}" for n in range(4)]
    test = [f"test{n:02}" for n in range(20)]
    for n, name in enumerate(train + test):
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 60), ("validation", 300)):
            write_jsonl(folder / name / f"{split}.jsonl", [question(n % 3) for _ in range(count)])
    write_lists(folder / "splits", train, test)
    return folder


def timed_run(root: Path, out: Path, options: list) -> tuple[float, dict]:
    """Seconds of train.py of a checkout, from start to end; and its results."""
    argv = [sys.executable, root / "train.py", "--task", "p3", *options, "--out", out, "--overwrite"]
    began = time.perf_counter()
    ended = subprocess.run(argv, cwd=root, capture_output=True, text=True)
    took = time.perf_counter() - began
    if ended.returncode:
        raise InputError(f"{root}: train.py failed: {ended.stderr.strip().splitlines()[-1:]}")
    return took, json.loads((out / "results.json").read_text())


def whole_runs(what: str, options: list, args: Namespace) -> Line:
    """Seconds of train.py by this code and by that of another checkout. The results must be the same."""
    scratch = args.scratch.resolve()
    other = args.against.resolve()
    turns = []
    for _ in range(max(1, args.repeats // 3)):
        ours, here = timed_run(PROJECT, scratch / "ours", options)
        theirs, there = timed_run(other, scratch / "other", options)
        turns.append((ours, theirs))
        for part in ("average", "std", "baselines", "controls", "tasks"):
            if here[part] != there[part]:
                raise InputError(f"bench: {part} is {here[part]} here and {there[part]} there")
    return as_times(f"{what} / {other.name}", *zip(*turns), "s", 0)


def evaluation(args: Namespace) -> Iterator[Line]:
    data = make_questions(args.scratch.resolve() / "questions")
    options = ["--model", PROJECT / "tiny" / "llama-c", "--data", data]
    options += "--steps 1 --batch-size 2 --measure 0 --sets 1".split()
    yield whole_runs("evaluating 20 prompts × 300 rows", options, args)


def command(args: Namespace) -> Iterator[Line]:
    yield whole_runs("python train.py --task p3", [], args)


# ---------------------------------------------------------------------- rows with a table of their own

GROWTH = {
    "tokens of examples and gists": [256, 512, 1024, 2048],
    "gists": [4, 16, 64],
    "queries per prefix": [1, 4, 16],
}


def growth_of(scratch: Path, context: int, gists: int, queries: int) -> tuple[float, float]:
    """Seconds and MB of a training step."""
    hyper = our_model(scratch, DTYPE)
    hyper.gists = nn.Parameter(hyper.model.embed_tokens.weight[:gists].float().clone())
    call = partial(training_step, our_logits, scratch, a_batch(context, gists, queries))
    (times,) = side_by_side(2, call)
    return median(times), peak(call)


def growth(args: Namespace) -> None:
    """Seconds and MB of a training step, by length of the examples, gists, and queries per prefix."""
    from matplotlib.figure import Figure  # slow to import

    lines = [["training step", "", "s", "MB", "s a query"]]
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    all_axes = figure.subplots(2, 3, sharey="row")
    for n, (name, values) in enumerate(GROWTH.items()):
        found = []
        for value in values:
            given = [1024, GISTS, 4]
            given[n] = value
            took, most = alone(growth_of, args.scratch, *given)
            found.append((took, most))
            lines.append([name, str(value), f"{took:.2f}", f"{most:,.0f}", f"{took / given[2]:.2f}"])
        for axes, numbers in zip(all_axes[:, n], zip(*found)):
            axes.plot(values, numbers, marker="o", linewidth=1.8)
            axes.set_xticks(values)
            axes.grid(alpha=0.3)
        all_axes[1, n].set_xlabel(name)
    for axes, label in zip(all_axes[:, 0], ("seconds a step", "MB beyond the weights")):
        axes.set(ylabel=label, ylim=(0, None))
    print_lines(lines, total=False)
    write_picture(figure, PROJECT / "figures" / "growth.png")


KINDS = {  # of torch's operations -> what their names have in them
    "attention": ("attention",),
    "matrix products": ("::mm", "::addmm", "::bmm"),
    "silu": ("silu",),
    "copies": ("cat", "copy_", "index", "where"),
}


def profile(args: Namespace) -> None:
    """Percent of the time of torch's operations, in five training steps and in evaluating four tasks."""
    options, *_ = parse(["--task", "p3"])
    run = open_run(options)
    batches = run.task.batches(run)
    held_out = draw_held_out(run)
    episodes = held_out.episodes[0]
    table = columns(run, held_out.tasks)
    del table["no_prefix"]  # with a frozen model, the same as 0-shot

    def training():
        for n in range(5):
            batch = batches(0, range(8 * n, 8 * n + 8))
            logits, gists = run.hyper(batch)
            (cross_entropy(run.hyper, batch, gists, logits) / len(batch.targets)).backward()

    def evaluating():
        for column in table.values():
            for t in range(4):
                score(run, column, episodes[t], episodes[held_out.other(t)], t)

    lines = [["time of torch's operations", "training", "evaluation"]]
    lines += [[kind] for kind in (*KINDS, "the rest")]
    threads = torch.get_num_threads()
    for work, own_threads in ((training, threads), (evaluating, 1)):
        torch.set_num_threads(own_threads)
        work()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            work()
        each = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
        whole = sum(each.values())
        rest = whole
        for line, names in zip(lines[1:], KINDS.values()):
            part = sum(t for key, t in each.items() if any(name in key for name in names))
            line.append(f"{part / whole:.0%}")
            rest -= part
        lines[-1].append(f"{rest / whole:.0%}")
    torch.set_num_threads(threads)
    print_lines(lines, total=False)


TABLE = {"step": step, "memory": memory, "rank": rank, "generate": generation, "limit": limit}
if not CUDA:
    TABLE["bfloat16"] = bfloat16
AGAINST = {"evaluation": evaluation, "command": command}
ALONE = {"growth": growth, "profile": profile}  # each prints what it found


def main() -> None:
    parser = Parser(__doc__)
    rows = TABLE | AGAINST | ALONE
    of_table = f"{', '.join(rows)} (default: {', '.join(TABLE)})"
    parser.add_argument("rows", nargs="*", metavar="ROW", default=[], help=of_table)
    repeats = "timings of each way, of which the median counts"
    parser.add_argument("--repeats", type=number(int, 1), default=7, help=repeats)
    folder = {"type": Path, "metavar": "DIR"}
    scratch = "where weights and data are made"
    parser.add_argument("--scratch", default=Path("runs/bench"), help=scratch, **folder)
    against = "another checkout, for evaluation and command"
    parser.add_argument("--against", default=None, help=against, **folder)
    args = parser.parse_args()
    for row in args.rows:
        if row not in rows:
            parser.error(f"there is no row {row!r}; there are {', '.join(rows)}")
        if row in AGAINST and not (args.against and (args.against / "train.py").exists()):
            parser.error(f"{row}: --against DIR has to name another checkout")
    kind = f"{DEVICE}, {str(DTYPE).removeprefix('torch.')}{', NF4' * CUDA}, {torch.get_num_threads()} threads"
    lines = [[kind, "ours", "the other", "ratio"]]
    for row in args.rows or TABLE:
        if row not in ALONE:
            lines += rows[row](args)
    if len(lines) > 1:
        print_lines(lines, total=False)
    for row in args.rows:
        if row in ALONE:
            rows[row](args)


if __name__ == "__main__":
    run_command(main)
