"""How fast and how small. Each row is a ratio, measured side by side in one run.

    python -m tools.bench                  the table, some minutes
    python -m tools.bench step generate    only some rows of it
    python -m tools.bench growth           how cost grows, drawn as figures/growth.png
    python -m tools.bench load             a checkpoint of Llama-2-7B's shape becomes NF4 (makes 13 GB in --scratch)
    python -m tools.bench data             training starts on 300 prompts of 30,000 rows (makes 3 GB there)
    python -m tools.bench profile          what the miniature's training and evaluation spend their time with
    python -m tools.bench evaluation command --against DIR    whole commands, against the code of another checkout

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
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Sample, collate
from eval import columns, draw_held_out, score, score_choices
from gist import HyperLlama, gist_mask, read_rows, with_gists
from llama import Config, InputError, Linear, Llama, Tokenizer, generate, load, positions_of
from lora import NF4Linear, add_lora, save_tensors
from run import PROJECT, Parser, number, open_run, print_lines, run_command, write_json
from tasks.hyperpretrain import hf_name, write_config
from tiny.make import write_jsonl
from tools.cost import LLAMA_2_7B, flops
from train import cross_entropy, parse

MIDDLE = Config(32000, 1024, 8, 16, 16, 64, 2752, 1e-5, 10000.0, 4096)
G, RANK, ALPHA = 16, 8, 16
NEEDS_PEERS = "needs pip install transformers peft"
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)

# --------------------------------------------------------------------------- the same work, three ways


def random_checkpoint(folder: Path, c: Config) -> Path:
    """A Hugging Face folder of random weights in bfloat16, a shard for every four layers."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(c).named_parameters()}
    shards: dict[str, dict] = {}
    for name, shape in shapes.items():
        number = 1 + int(name.split(".")[1]) // 4 if name.startswith("layers") else 0
        shards.setdefault(f"model-{number:05}.safetensors", {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    for file, named in tqdm(shards.items(), desc=f"making {folder}"):
        tensors = {
            name: torch.ones(shape)
            if len(shape) == 1
            else torch.empty(shape).normal_(0, 0.02, generator=generator)
            for name, shape in named.items()
        }
        save_tensors(
            folder / file, {hf_name(name): t.bfloat16() for name, t in tensors.items()}, {"format": "pt"}
        )
    index = {hf_name(name): file for file, named in shards.items() for name in named}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    write_config(folder, c)
    return folder


@cache
def shape_and_folder(scratch: Path) -> tuple[Config, Path]:
    return (
        (LLAMA_2_7B, random_checkpoint(scratch / "7b", LLAMA_2_7B))
        if CUDA
        else (MIDDLE, random_checkpoint(scratch / "middle", MIDDLE))
    )


@cache
def our_model(scratch: Path, dtype: torch.dtype) -> HyperLlama:
    _, folder = shape_and_folder(scratch)
    model = load(folder, DEVICE, dtype, NF4Linear if CUDA else Linear)
    add_lora(model, "hyper", RANK, ALPHA, torch.Generator().manual_seed(0), keys_values_only=True)
    return HyperLlama(model, model.embed_tokens.weight[:G])


@cache
def their_model(scratch: Path):
    """The peers' model with its adapter; ImportError without them."""
    import transformers
    from peft import LoraConfig, get_peft_model

    _, folder = shape_and_folder(scratch)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = {"dtype": DTYPE, "attn_implementation": "sdpa"}
    if CUDA:
        quantization = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": DTYPE,
        }
        options |= {
            "quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True, **quantization),
            "device_map": DEVICE,
        }
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=linears))


def a_batch(vocab: int, context: int = 1024, gists: int = G, queries: int = 4, length: int = 96):
    """One row of examples and gists, and queries after it whose last five tokens are to be predicted."""
    rng = random.Random(0)

    def words(count: int) -> list[int]:
        return [1, *rng.choices(range(3, vocab), k=count - 1)]

    examples = with_gists(words(context - gists), range(vocab, vocab + gists))
    lengths = [length - 8 + 16 * n // max(1, queries - 1) for n in range(queries)]  # about `length`
    prompts = [words(n - 5) for n in lengths]
    return collate([Sample([examples], [(prompt, words(6)[1:]) for prompt in prompts])]).to(DEVICE)


def our_step(scratch: Path, batch, dtype: torch.dtype = DTYPE) -> float:
    hyper = our_model(scratch, dtype)
    loss = F.cross_entropy(hyper(batch)[0].float(), batch.targets)
    loss.backward()
    return loss.item()


@cache
def their_gists(scratch: Path) -> torch.nn.Parameter:
    return torch.nn.Parameter(our_model(scratch, DTYPE).gists.detach().clone())


def their_embeddings(scratch: Path, tokens: torch.Tensor) -> torch.Tensor:
    words = their_model(scratch).get_input_embeddings()(tokens[:, :-G])
    return torch.cat((words, their_gists(scratch).to(words.dtype).expand(len(tokens), -1, -1)), dim=1)


def their_prefix(scratch: Path, tokens: torch.Tensor, rows: int):
    """First pass, and the keys and values at the gists as a cache for so many rows."""
    from transformers import DynamicCache

    lm = their_model(scratch).base_model.model
    read = lm.model(inputs_embeds=their_embeddings(scratch, tokens), use_cache=True).past_key_values
    cache = DynamicCache()
    for i, layer in enumerate(read.layers):
        cache.update(*(x[:, :, -G:].expand(rows, -1, -1, -1) for x in (layer.keys, layer.values)), i)
    return cache


def their_best_step(scratch: Path, batch) -> float:
    """Two passes with past_key_values, one hyper pass for all queries, logits at the targets alone."""
    peft = their_model(scratch)
    lm = peft.base_model.model
    examples = batch.context[0].tokens
    cache = their_prefix(scratch, examples, len(batch.tokens))
    positions = examples.shape[1] + positions_of(batch.tokens)
    with peft.disable_adapter():
        hidden = lm.model(
            input_ids=batch.tokens, past_key_values=cache, position_ids=positions, use_cache=True
        ).last_hidden_state
    loss = F.cross_entropy(lm.lm_head(hidden.flatten(0, 1)[batch.select]).float(), batch.targets)
    loss.backward()
    return loss.item()


def their_usual_step(scratch: Path, batch) -> float:
    """The joint pass under a 4-D mask: a row per query, the adapter on throughout, logits everywhere."""
    N = len(batch.tokens)
    examples = batch.context[0].tokens.expand(N, -1)
    T = examples.shape[1]
    lm = their_model(scratch).base_model.model
    words = torch.cat((their_embeddings(scratch, examples), lm.get_input_embeddings()(batch.tokens)), dim=1)
    is_gist = torch.cat((examples, batch.tokens), dim=1) >= lm.config.vocab_size
    see = gist_mask(is_gist)[:, None]
    mask = torch.zeros(see.shape, dtype=words.dtype, device=words.device).masked_fill(
        ~see, torch.finfo(words.dtype).min
    )
    logits = lm(inputs_embeds=words, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits[:, T:].flatten(0, 1)[batch.select].float(), batch.targets)
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


class Median(float):
    """Of some times, which it remembers."""

    def __new__(cls, times: list[float]):
        self = super().__new__(cls, statistics.median(times))
        self.times = times
        return self


def side_by_side(repeats: int, **ways: Callable[[], object]) -> dict[str, Median]:
    """Median seconds of each way: warmed up once, then taking turns."""
    for function in ways.values():
        function()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, function in ways.items():
            found[name].append(seconds(function))
    return {name: Median(times) for name, times in found.items()}


def spread(ratios: list[float], form: str) -> str:
    """Of the turns, the middle half."""
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f" ({low:{form}} to {high:{form}})"


def status(key: str) -> float:
    """A line of /proc/self/status, in MB: VmRSS (resident now) or VmHWM (at most, since it was reset)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1e3


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
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    function()
    return status("VmHWM") - before


def alone(function: Callable, *given):
    """function(*given) in a process of its own: what others left behind in memory isn't counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *given).result()


def peers(scratch: Path) -> bool:
    try:
        their_model(scratch)
        return True
    except ImportError:
        return False


# ---------------------------------------------------------------------------------------------- the rows

Line = list[str]  # what, ours, the other, how often as good


def against(what: str, ours: float, other: float, unit: str, digits: int = 2, part: int = 1) -> Line:
    """part: of so many in each way, the time of one is shown."""
    each = spread([b / a for a, b in zip(ours.times, other.times)], ".2f") if isinstance(ours, Median) else ""
    return [
        what,
        f"{ours / part:,.{digits}f} {unit}",
        f"{other / part:,.{digits}f} {unit}",
        f"{other / ours:.2f} ×{each}",
    ]


def step(scratch: Path, repeats: int) -> list[Line]:
    """1. A training step: 1024 tokens of examples and gists, four queries after them."""
    batch = a_batch(shape_and_folder(scratch)[0].vocab)
    ways = {"ours": partial(our_step, scratch, batch)}
    if not peers(scratch):
        return [["training step", f"{side_by_side(repeats, **ways)['ours']:.2f} s", NEEDS_PEERS, ""]]
    ways |= {
        "best": partial(their_best_step, scratch, batch),
        "usual": partial(their_usual_step, scratch, batch),
    }
    losses = [function() for function in ways.values()]
    if max(losses) - min(losses) > 1e-3 * losses[0] * (30 if CUDA else 1):
        raise InputError(f"bench: the ways don't do the same work: losses {losses}")
    # In pairs, so that the joint pass, which takes seven times the memory, doesn't stand between the other two.
    best = side_by_side(repeats, ours=ways["ours"], best=ways["best"])
    usual = side_by_side(max(1, repeats // 3), ours=ways["ours"], usual=ways["usual"])
    return [
        against("training step / transformers + peft, two passes", best["ours"], best["best"], "s"),
        against("training step / transformers + peft, joint pass", usual["ours"], usual["usual"], "s"),
    ]


def memory_of(scratch: Path, way: str) -> float:
    batch = a_batch(shape_and_folder(scratch)[0].vocab)
    our_model(scratch, DTYPE).model.checkpoint_activations = way == "checkpointed"
    ways = {"ours": our_step, "checkpointed": our_step, "best": their_best_step, "usual": their_usual_step}
    return peak(partial(ways[way], scratch, batch))


def memory(scratch: Path, repeats: int) -> list[Line]:
    """2. What the same step needs at most, beyond the loaded weights."""
    ours, checkpointed = (
        statistics.median(alone(memory_of, scratch, way) for _ in range(3))
        for way in ("ours", "checkpointed")
    )
    own = against("peak memory of it, --checkpoint-activations / without", checkpointed, ours, "MB", 0)
    if not peers(scratch):
        return [["peak memory of it", f"{ours:,.0f} MB", NEEDS_PEERS, ""], own]
    best, usual = (
        statistics.median(alone(memory_of, scratch, way) for _ in range(3)) for way in ("best", "usual")
    )
    return [
        against("peak memory of it / two passes", ours, best, "MB", 0),
        against("peak memory of it / joint pass", ours, usual, "MB", 0),
        own,
    ]


@torch.no_grad()
def rank(scratch: Path, repeats: int) -> list[Line]:
    """3. Ranking four options of four queries that share 16 shots (a thousand tokens), by one Llama of ours."""
    hyper, vocab = our_model(scratch, DTYPE), shape_and_folder(scratch)[0].vocab
    model, rng, n = hyper.model, random.Random(1), 4
    batch = a_batch(vocab, queries=n)
    shots = batch.context[0].tokens[0, :-G].tolist()
    prompts = [rng.choices(range(3, vocab), k=91) for _ in range(n)]
    options = [[rng.choices(range(3, vocab), k=5) for _ in range(4)] for _ in range(n)]
    first = torch.zeros(n, dtype=torch.long, device=DEVICE)

    def gists():
        return score_choices(model, prompts, options, hyper.compress(batch.context[0])[first])

    def kept():
        return score_choices(model, prompts, options, read_rows(model, [shots])[first])

    def rows():  # a full row for each option, the four of a query as a batch
        if not peers(scratch):
            return [
                [score_choices(model, [shots + prompt], [[option]])[0][0] for option in some]
                for prompt, some in zip(prompts, options)
            ]
        scores = []
        for prompt, some in zip(prompts, options):
            tokens = torch.tensor([shots + prompt + option for option in some], device=DEVICE)
            with their_model(scratch).disable_adapter():
                logits = their_model(scratch)(input_ids=tokens, logits_to_keep=len(some[0]) + 1).logits[
                    :, :-1
                ]
            each = -F.cross_entropy(
                logits.float().transpose(1, 2), tokens[:, -len(some[0]) :], reduction="none"
            )
            scores.append(each.sum(1).tolist())
        return scores

    torch.testing.assert_close(
        torch.tensor(kept()), torch.tensor(rows()), atol=2e-2 * (10 if CUDA else 1), rtol=1e-3
    )
    found = side_by_side(max(1, repeats // 2), gists=gists, kept=kept, rows=rows)
    read = {
        "gists": len(shots) + G + n * 111,
        "kept": len(shots) + n * 111,
        "rows": 4 * n * (len(shots) + 96),
    }
    speed = {way: f", {read[way] / found[way]:,.0f} tokens/s" for way in read}
    theirs = "transformers, a full row per option" if peers(scratch) else "one full row per option"
    lines = [
        against(f"ranking 4 options, a query / {theirs}", found["gists"], found["rows"], "s", part=n),
        against(
            "ranking 4 options, a query / examples in context, read once",
            found["gists"],
            found["kept"],
            "s",
            part=n,
        ),
    ]
    for line, way in zip(lines, ("rows", "kept")):
        line[1], line[2] = line[1] + speed["gists"], line[2] + speed[way]
    return lines


@torch.no_grad()
def generation(scratch: Path, repeats: int) -> list[Line]:
    """4. 128 tokens for a batch of eight after gists."""
    hyper, vocab = our_model(scratch, DTYPE), shape_and_folder(scratch)[0].vocab
    batch, rng, n = a_batch(vocab), random.Random(2), 8
    gists = hyper.compress(batch.context[0])[torch.zeros(n, dtype=torch.long, device=DEVICE)]
    prompts = [rng.choices(range(3, vocab), k=48) for _ in range(n)]
    at_gists = torch.full((n,), G, device=DEVICE)  # transformers.generate counts on from the cache's length

    def ours():
        return generate(hyper.model, prompts, 128, -1, past=gists.past, offset=at_gists)

    weights = [
        p for name, p in hyper.model.named_parameters() if "embed_tokens" not in name and ".lora." not in name
    ]
    memory = torch.ones(1 << 28, device=DEVICE, dtype=DTYPE)
    read = side_by_side(repeats, ours=ours, plain=lambda: memory.sum().item())
    rates = (
        128 * sum(p.numel() * p.element_size() for p in weights) / read["ours"],
        memory.numel() * memory.element_size() / read["plain"],
    )
    reading = [
        [
            "weights read while generating / a plain sum over memory",
            *(f"{rate / 1e9:.1f} GB/s" for rate in rates),
            f"{rates[0] / rates[1]:.0%}",
        ]
    ]
    if not CUDA:  # what bounds it: a matrix product with as few rows as there are prompts

        def products(count: int) -> None:
            for weight in weights:
                if weight.dim() == 2:
                    F.linear(torch.ones(count, weight.shape[1]), weight)

        took, size = (
            [Median([seconds(partial(products, count)) for _ in range(9)]) for count in (n, 1)],
            sum(w.nbytes for w in weights),
        )
        reading.append(
            [
                f"weights read by products of {n} rows / of one",
                *(f"{size / t / 1e9:.1f} GB/s" for t in took),
                f"{took[1] / took[0]:.0%}",
            ]
        )
    if not peers(scratch):
        return [["generating 8 × 128 tokens", f"{read['ours']:.2f} s", NEEDS_PEERS, ""], *reading]
    from transformers import DynamicCache

    peft = their_model(scratch).eval()

    def theirs():
        cache = DynamicCache()
        for i, (k, v) in enumerate(gists.past):
            cache.update(k, v, i)
        ids = torch.tensor(
            [[0] * G + prompt for prompt in prompts], device=DEVICE
        )  # zeros stand for what the cache holds
        with peft.disable_adapter():
            options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False, "pad_token_id": 0}
            out = peft.base_model.model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options
            )
        return out[:, ids.shape[1] :].tolist()

    agree = statistics.fmean(
        a == b for ours_row, their_row in zip(ours(), theirs()) for a, b in zip(ours_row, their_row)
    )
    if agree < 0.9 and not CUDA:  # rounding may send a row another way; in bf16, many
        raise InputError(f"bench: only {agree:.0%} of the generated tokens are the same")
    found = side_by_side(repeats, ours=ours, theirs=theirs)
    peft.train()
    return [
        against("generating 8 × 128 tokens / transformers.generate", found["ours"], found["theirs"], "s"),
        *reading,
    ]


def limit(scratch: Path, repeats: int) -> list[Line]:
    """5. The rate of the hyper pass, forward and backward, beside that of a plain matrix product."""
    hyper, c = our_model(scratch, DTYPE), shape_and_folder(scratch)[0]
    batch = a_batch(c.vocab)
    T = batch.context[0].tokens.shape[1]

    def hyper_pass():
        sum(k.sum() + v.sum() for k, v in hyper.compress(batch.context[0]).past).backward()

    x, weight = (torch.randn(n, c.width, device=DEVICE, dtype=DTYPE) for n in (T, c.hidden))

    def product():
        for _ in range(20):
            F.linear(x, weight)

    found = side_by_side(repeats, hyper_pass=hyper_pass, product=product)
    # The base's products once forward, once for the gradient of their input; LoRA's also for that of
    # its weights. Half of the attention is hidden by the causal mask, and left out here.
    base, all_ = flops(c, T, kept=G), flops(c, T, kept=G, rank=RANK)
    hidden = (c.layers - 2) * 2 * T * T * c.heads * c.head_size
    achieved = (2 * (base - hidden) + 3 * (all_ - base)) / found["hyper_pass"] / 1e9
    plain = 20 * 2 * T * c.width * c.hidden / found["product"] / 1e9
    turns = [
        achieved / plain * found["hyper_pass"] / found["product"] * b / a
        for a, b in zip(found["hyper_pass"].times, found["product"].times)
    ]
    share = f"{achieved / plain:.0%}{spread(turns, '.0%')}"
    return [
        [
            "hyper pass, forward and backward / a matrix product",
            f"{achieved:,.0f} GFLOP/s",
            f"{plain:,.0f} GFLOP/s",
            share,
        ]
    ]


def bfloat16(scratch: Path, repeats: int) -> list[Line]:
    """The training step in bfloat16, on a CPU (train.py --dtype bfloat16)."""
    batch = a_batch(shape_and_folder(scratch)[0].vocab)
    ways = {str(dtype): partial(our_step, scratch, batch, dtype) for dtype in (torch.bfloat16, torch.float32)}
    half, full = side_by_side(repeats, **ways).values()
    return [against("training step in bfloat16 / in float32", half, full, "s")]


TABLE = {"step": step, "memory": memory, "rank": rank, "generate": generation, "limit": limit} | (
    {} if CUDA else {"bfloat16": bfloat16}
)


# --------------------------------------------------------------------------------------------- the picture


def growth_of(scratch: Path, context: int, gists: int, queries: int) -> tuple[float, float]:
    """Seconds and MB of a training step."""
    c, _ = shape_and_folder(scratch)
    hyper = our_model(scratch, DTYPE)
    hyper.gists = torch.nn.Parameter(hyper.model.embed_tokens.weight[:gists].float().clone())
    call = partial(our_step, scratch, a_batch(c.vocab, context, gists, queries))
    return side_by_side(2, call=call)["call"], peak(call)


GROWTH = {
    "tokens of examples and gists": [256, 512, 1024, 2048],
    "gists": [4, 16, 64],
    "queries per prefix": [1, 4, 16],
}


def growth(scratch: Path) -> None:
    """6. Time and memory of a training step, by length of the examples, gists, and queries per prefix."""
    found: dict[str, list[tuple[float, float]]] = {}
    lines = [["training step", "", "s", "MB", "s a query"]]
    for n, (name, values) in enumerate(GROWTH.items()):
        found[name] = []
        for value in values:
            given = [1024, G, 4]
            given[n] = value
            took, most = alone(growth_of, scratch, *given)
            found[name].append((took, most))
            lines.append([name, str(value), f"{took:.2f}", f"{most:,.0f}", f"{took / given[2]:.2f}"])
    print_lines(lines, total=False)
    draw_growth(found, PROJECT / "figures" / "growth.png")


def draw_growth(found: dict[str, list[tuple[float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(2, 3, figsize=(9, 4.6), layout="constrained", sharey="row")
    for (name, values), column in zip(GROWTH.items(), all_axes.T):
        for axes, numbers in zip(column, zip(*found[name])):
            axes.plot(values, numbers, marker="o", linewidth=1.8)
            axes.set_xticks(values)
            axes.grid(alpha=0.3)
        column[1].set_xlabel(name)
    for axes, label in zip(all_axes[:, 0], ("seconds a step", "MB beyond the weights")):
        axes.set(ylabel=label, ylim=(0, None))
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


# -------------------------------------------------------------------------------------- real sizes


def bare(folder: Path) -> float:
    """Seconds to read every tensor and quantize the matrices, keeping nothing else in order."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors import safe_open

    kept, began = [], time.perf_counter()
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                tensor = file.get_tensor(key)
                kept.append(
                    quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
                    if "proj" in key
                    else tensor.clone()
                )
    return time.perf_counter() - began


def ours_loaded(folder: Path) -> tuple[float, float, float, float]:
    """Seconds to load as NF4; the model's size and the process's peak in MB; seconds of a small training step."""
    import bitsandbytes  # noqa: F401  its own memory is not the model's

    before, began = status("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")
    model = load(folder, "cpu", torch.bfloat16, NF4Linear)
    took, most = time.perf_counter() - began, status("VmHWM") - before
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    for module in model.modules():
        if isinstance(module, NF4Linear):  # the scales: a byte per block of 64, and a float for 256 of these
            size += (module.state.absmax.numel() + 4 * module.state.state2.absmax.numel()) / 1e6
    add_lora(model, "hyper", RANK, ALPHA, torch.Generator().manual_seed(0), keys_values_only=True)
    hyper = HyperLlama(model, model.embed_tokens.weight[:G])
    batch = a_batch(model.config.vocab, context=128, queries=1, length=32)
    began = time.perf_counter()
    F.cross_entropy(hyper(batch)[0].float(), batch.targets).backward()
    return took, size, most, time.perf_counter() - began


def load_7b(scratch: Path) -> None:
    folder = random_checkpoint(scratch / "7b", LLAMA_2_7B)
    for path in folder.glob("model*.safetensors"):  # both read from the page cache, as far as it reaches
        path.read_bytes()
    plain, (took, size, most, trained) = alone(bare, folder), alone(ours_loaded, folder)
    lines = [["Llama-2-7B's shape in NF4", "", ""]]
    lines.append(
        ["loading", f"{took:.0f} s", f"{took / plain:.2f} × reading and quantizing bare ({plain:.0f} s)"]
    )
    lines.append(
        ["peak memory", f"{most / 1e3:.2f} GB", f"{most / size:.2f} × the model ({size / 1e3:.2f} GB)"]
    )
    lines.append(["a training step, 128 + 32 tokens", f"{trained:.0f} s", ""])
    print_lines(lines, total=False)


def make_p3(folder: Path, tasks: int = 300, rows: int = 30_000) -> Path:
    """Random text as P3: jsonl, with the miniature's held-out tasks after it."""
    if (folder / "splits").exists():
        return folder
    rng, words = (
        random.Random(0),
        [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "en", "ir", "ost", "ule")],
    )
    for t in tqdm(range(tasks), desc=f"making {folder}"):
        path = folder / f"task_{t:03}"
        path.mkdir(parents=True, exist_ok=True)
        text = rng.choices(words, k=60 + rows)
        with open(path / "train.jsonl", "w") as file:
            for i in range(rows):
                fields = {
                    "inputs_pretokenized": " ".join(text[i : i + 60]),
                    "targets_pretokenized": text[i],
                    "answer_choices": ["yes", "no"],
                }
                file.write(json.dumps(fields) + "\n")
    tiny = PROJECT / "tiny" / "P3"
    held_out = (tiny / "splits" / "test_tasks.txt").read_text().split()[:1]
    (folder / held_out[0]).symlink_to(tiny / held_out[0])
    (folder / "splits").mkdir()
    (folder / "splits" / "train_tasks.txt").write_text("\n".join(f"task_{t:03}" for t in range(tasks)))
    (folder / "splits" / "test_tasks.txt").write_text("\n".join(held_out))
    return folder


def data(scratch: Path) -> None:
    folder, out = make_p3(scratch / "P3"), scratch / "run"
    size = sum(path.stat().st_size for path in folder.glob("task_*/*")) / 1e9
    options = [
        "--task",
        "p3",
        "--data",
        folder,
        "--steps",
        "1",
        "--limit",
        "4",
        "--sets",
        "1",
        "--no-controls",
        "--out",
        out,
        "--overwrite",
    ]
    began = time.time()
    process = subprocess.Popen([sys.executable, str(PROJECT / "train.py"), *map(str, options)])
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_mtime > began):
        time.sleep(0.05)
    took = time.time() - began
    if process.wait():
        raise InputError("bench: the training run failed")
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(
        f"P3 of 300 prompts × 30,000 rows, {size:.1f} GB: the first step was done after {took:.1f} s, {most:.2f} GB resident at most"
    )


# --------------------------------------------------------------------------------- two checkouts


def make_questions(folder: Path, prompts: int = 20, rows: int = 300) -> Path:
    """P3 with held-out prompts of so many questions: 40 to 90 words of the miniature's, and four options of one to eight."""
    if (folder / "splits").exists():
        return folder
    rng, tokenizer = random.Random(0), Tokenizer(PROJECT / "tiny" / "llama-c")
    pieces = [tokenizer.piece(i) for i in range(tokenizer.size)]
    words = [piece[1:] for piece in pieces if piece.startswith("▁") and len(piece) > 3]
    names = {"train": [f"train{n}" for n in range(4)], "test": [f"test{n:02}" for n in range(prompts)]}
    for n, name in enumerate(names["train"] + names["test"]):
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 60), ("validation", rows)):
            made = []
            for _ in range(count):
                options = [
                    " ".join([word, *rng.choices(words, k=rng.choice((0, n % 3, 3 * (n % 3))))])
                    for word in rng.sample(words, 4)
                ]
                answer = rng.choice(options)
                made.append((" ".join(rng.choices(words, k=rng.randint(40, 90))), answer, options))
            write_jsonl(folder / name / f"{split}.jsonl", made)
    (folder / "splits").mkdir()
    for part in names:
        (folder / "splits" / f"{part}_tasks.txt").write_text("\n".join(names[part]))
    return folder


def whole_runs(what: str, options: list[str | Path], scratch: Path, other: Path, repeats: int) -> Line:
    """train.py with these options, from start to end, by this code and that of another checkout, in turns; the results must be the same."""
    ways, found = {"ours": PROJECT, "other": other.resolve()}, {"ours": [], "other": []}
    for _ in range(max(1, repeats // 3)):
        results = []
        for way, root in ways.items():
            out, began = scratch.resolve() / way, time.perf_counter()
            command = [
                sys.executable,
                root / "train.py",
                "--task",
                "p3",
                *options,
                "--out",
                out,
                "--overwrite",
            ]
            subprocess.run(
                list(map(str, command)),
                cwd=root,
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            found[way].append(time.perf_counter() - began)
            results.append(json.loads((out / "results.json").read_text()))
        for part in ("average", "std", "baselines", "controls", "tasks"):
            if results[0][part] != results[1][part]:
                raise InputError(f"bench: {part} is {results[0][part]} here and {results[1][part]} there")
    return against(what, *(Median(times) for times in found.values()), "s", 0)


def evaluation(scratch: Path, other: Path, repeats: int) -> Line:
    folder = make_questions(scratch / "questions")
    options = [
        "--model",
        PROJECT / "tiny" / "llama-c",
        "--data",
        folder.resolve(),
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--measure",
        "0",
        "--sets",
        "1",
    ]
    return whole_runs(
        f"evaluating 20 prompts × 300 rows / {other.resolve().name}", options, scratch, other, repeats
    )


def command(scratch: Path, other: Path, repeats: int) -> Line:
    return whole_runs(f"python train.py --task p3 / {other.resolve().name}", [], scratch, other, repeats)


AGAINST = {"evaluation": evaluation, "command": command}
KINDS = {
    "attention": ("attention",),
    "matrix products": ("::mm", "::addmm", "::bmm"),
    "silu": ("silu",),
    "copies": ("cat", "copy_", "index", "where"),
}


def profile(scratch: Path) -> None:
    """Shares of the time in torch's operations: five training steps of the default run; an evaluation of its first draw, one thread."""
    args, *_ = parse(["--task", "p3"])
    run = open_run(args)
    batches = run.task.batches(run)
    held_out = draw_held_out(run)

    def training():
        for n in range(5):
            batch = batches(0, range(8 * n, 8 * n + 8))
            logits, gists = run.hyper(batch)
            (cross_entropy(run.hyper, batch, gists, logits) / len(batch.targets)).backward()

    def evaluating():
        for name, column in columns(run, held_out.tasks).items():
            for t, episodes in enumerate(held_out.episodes[0][:4] if name != "no_prefix" else ()):
                score(run, column, episodes, held_out.episodes[0][held_out.other(t)], t)

    lines = [
        ["time of torch's operations", "training", "evaluation"],
        *([kind] for kind in KINDS),
        ["the rest"],
    ]
    threads = torch.get_num_threads()
    for work in (training, evaluating):
        torch.set_num_threads(threads if work is training else 1)
        work()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            work()
        each = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
        parts = [
            sum(value for key, value in each.items() if any(word in key for word in words))
            / sum(each.values())
            for words in KINDS.values()
        ]
        for line, part in zip(lines[1:], [*parts, 1 - sum(parts)]):
            line.append(f"{part:.0%}")
    torch.set_num_threads(threads)
    print_lines(lines, total=False)


ALONE = {"growth": growth, "load": load_7b, "data": data, "profile": profile}  # each prints what it found


def main() -> None:
    parser = Parser(__doc__)
    rows = [*TABLE, *AGAINST, *ALONE]
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", default=[], help=f"{', '.join(rows)} (default: {', '.join(TABLE)})"
    )
    parser.add_argument(
        "--repeats", type=number(int, 1), default=7, help="timings of each way, of which the median counts"
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="where weights and data are made",
    )
    parser.add_argument(
        "--against",
        type=Path,
        default=None,
        metavar="DIR",
        help="another checkout, for evaluation and command",
    )
    args = parser.parse_args()
    for row in args.rows:
        if row not in rows:
            parser.error(f"there is no row {row!r}; there are {', '.join(rows)}")
        if row in AGAINST and not (args.against and (args.against / "train.py").exists()):
            parser.error(f"{row}: --against DIR has to name another checkout")
    lines = [
        [
            f"{DEVICE}, {str(DTYPE).removeprefix('torch.')}{', NF4' * CUDA}, {torch.get_num_threads()} threads",
            "ours",
            "the other",
            "ratio",
        ]
    ]
    for name in [row for row in args.rows or TABLE if row in TABLE]:
        lines += TABLE[name](args.scratch, args.repeats)
    lines += [
        AGAINST[name](args.scratch, args.against, args.repeats) for name in args.rows if name in AGAINST
    ]
    if len(lines) > 1:
        print_lines(lines, total=False)
    for name in [row for row in args.rows if row in ALONE]:
        ALONE[name](args.scratch)


if __name__ == "__main__":
    run_command(main)
