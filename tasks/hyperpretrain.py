"""Compression hyperpretraining (paper, Section 5): text instead of tasks, all parameters, no LoRA.

A token sequence is cut in four segments A B C D. A and D are compressed, and the downstream model
predicts B and C after their gists. The result is a checkpoint with gists of its own, usable as --model.
"""

import gzip
import math
import mmap
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Batch, Formatter, Sample, collate
from gist import Compression, HyperLlama, Rows, keep_all, nothing, read_contexts
from llama import Config, InputError, Tokenizer, reading
from lora import save_tensors
from run import Options, Run, option, portable, resolve_args, write_json
from run import build as build_hyper
from tasks.rows import as_text, existing, map_file, parse_line

FOLDER = "text"
MODEL = "llama"
METRIC = "loss"
ONE_SET = True
OPTIONS = {
    "in_order": option(False, help="hyperpretrain: read the files of text one after the other, by name"),
    "shortest_context": option(
        0,
        help="hyperpretrain: each step draws its context's length, from this to --context (always --context)",
    ),
    "fewest_gists": option(
        0, help="hyperpretrain: each step draws how many of the gists it has, from this on (always all)"
    ),
    "held_out": option(
        kind=Path,
        role="course",
        help="hyperpretrain: P3 folder whose held-out tasks --measure scores (the miniature's)",
    ),
}
WITHOUT = (
    "method", "downstream", "quantize", "rank", "alpha",  # all parameters are trained, without LoRA
    "shots", "sets", "score", "controls", "end", "instruction_downstream",
)  # fmt: skip
DEFAULTS = {
    "large": {"steps": 50_000, "batch_size": 32, "lr": 2e-5, "gist_lr": 2e-5, "sets": 1},
    "tiny": {
        "steps": 2800, "batch_size": 24, "optimizer": "muon", "lr": 1e-2, "gist_lr": 2.5e-3, "lm": 0.5,
        "in_order": True, "context": 401, "shortest_context": 113, "query_length": 65,
        "sets": 1, "measure": 7,
    },
}  # fmt: skip


def load(args: Options, formatter: Formatter, split: str) -> list:
    raise InputError("--task hyperpretrain has text, and no tasks with examples")


def check(args: Options) -> None:
    if args.shortest_context > args.context:
        raise InputError(
            f"--shortest-context {args.shortest_context} must not exceed --context {args.context}"
        )
    if args.fewest_gists > args.gists:
        raise InputError(f"--fewest-gists {args.fewest_gists} must not exceed --gists {args.gists}")
    if args.fewest_gists and args.anchors:
        raise InputError("--fewest-gists: --anchors have no gists")


def build(args: Options) -> HyperLlama:
    return build_hyper(args, full_finetune=True)


def restore(args: Options, folder: Path) -> HyperLlama:
    """What was trained is a whole checkpoint, with its gists."""
    return build(replace(args, model=str(folder))).requires_grad_(False)


def save(hyper: HyperLlama, out: Path, tensors: dict[str, Tensor], args: Options) -> None:
    """The whole model as a Hugging Face folder, in bfloat16; its gists, and what else was trained."""
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    beside = {name: t for name, t in tensors.items() if not name.startswith("model.")}
    save_tensors(out / "gists.safetensors", beside, {})
    tokenizer = Tokenizer(args.model)
    save_checkpoint(out, hyper.model.config, weights, tokenizer.bos, tokenizer.eos)
    for path in (tokenizer.path, tokenizer.path.with_name("tokenizer_config.json")):
        if path.exists():
            shutil.copyfile(path, out / path.name)


def batches(run: Run) -> "TextBatches":
    args = run.args
    if dist.is_initialized() and run.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise InputError("--task hyperpretrain in several processes on a CPU needs torch 2.7 or later")
    rows = args.accumulate * args.batch_size
    text = TextBatches(
        args.data,
        run.formatter,
        run.hyper.gist_ids,
        run.hyper.compression,
        rows,
        args.steps * rows * args.in_order,
        args.shortest_context,
        args.fewest_gists,
    )
    text(args.seed, range(WINDOWS), test=True)  # what can't be read for evaluation is found before training
    return text


def watched(run: Run) -> Run | None:
    """Hyperpretraining is watched on P3's held-out tasks, after gists of 16 examples."""
    args = run.args
    if not args.measure:
        return None
    if dist.is_initialized():
        raise InputError("--measure of --task hyperpretrain needs a single process")
    own = {name: getattr(args, name) for name in ("model", "gists", "seed", "limit", "eval_tokens")}
    data = {"data": args.held_out} if args.held_out else {}
    probe = resolve_args(own | data | {"task": "p3", "steps": 0, "sets": 1})
    return Run(probe, run.hyper, Formatter(run.formatter.tokenizer, probe.context, probe.query_length))


STRETCHES = 16  # of A and D, where a chapter of further/ asks for examples one by one


class TextContext(NamedTuple):
    """A and D, where gist.Compression has a formatter and its episode. The episode is their tokens."""

    tokenizer: Tokenizer

    def context_tokens(self, text: list[int], reserved: int = 0) -> list[int]:
        return [self.tokenizer.bos, *text]

    def context_parts(self, text: list[int], reserved: int = 0) -> tuple[list[int], list[list[int]]]:
        """BOS, and stretches of about equal length in place of examples."""
        cuts = [len(text) * n // STRETCHES for n in range(STRETCHES + 1)]
        return [self.tokenizer.bos], [text[a:b] for a, b in zip(cuts, cuts[1:]) if a < b]


class TextBatches:
    """Segments A B C D of text: A and D are compressed, B C is predicted after their gists (Section 5).

    A and D fill the formatter's context, B and C its query length. Files (.jsonl or .jsonl.gz
    with `text`) are never read whole: a window begins at a random byte of them. The documents in the
    last twentieth of each file (at least one) are kept for evaluation; a file of one document trains.

    rows      of a step
    in_order  so many rows take the files one after the other, by name; 0: each row draws a file
    shortest  a training step's context has a length between this and the formatter's context, drawn for the
              step: what is to be read later has all lengths, too. 0: the formatter's, always
    fewest    a training step has so many gists or more, few as often as many; 0: all, always
    """

    def __init__(
        self,
        folder: str | Path,
        formatter: Formatter,
        gist_ids: Sequence[int],
        compression: Compression = Compression(),
        rows: int = 1,
        in_order: int = 0,
        shortest: int = 0,
        fewest: int = 0,
    ):
        folder = existing(folder)
        paths = (path for path in folder.rglob("*") if path.name.endswith((".jsonl", ".jsonl.gz")))
        self.paths = sorted(path for path in paths if path.is_file())
        if not self.paths:
            raise InputError(f"{folder}: no .jsonl or .jsonl.gz files with text")
        self.formatter = formatter
        self.gist_ids = gist_ids
        self.compression = compression
        self.fewest = fewest or len(gist_ids)
        self.rows = rows
        self.in_order = in_order
        self.shortest = shortest or formatter.context
        self.inner = (formatter.query_length - 1) // 2  # tokens of B, and of C
        if min(self.outer(self.shortest), self.inner) < 1:
            raise InputError("--context and --query-length leave no room for segments of text")
        self.unpacked: dict[int, mmap.mmap | bytes] = {}
        bounds = [self.bounds(n) for n in range(len(self.paths))]
        self.borders, self.sizes = zip(*bounds)  # training reads up to the border, evaluation from there
        if self.borders == self.sizes:
            raise InputError(f"{folder}: too few documents to keep some for evaluation")

    def __str__(self) -> str:
        return f"{len(self.paths)} files of text"

    def outer(self, context: int) -> int:
        """Tokens of A, and of D, in a context of this length."""
        return (context - len(self.gist_ids) - 1) // 2

    def bounds(self, n: int) -> tuple[int, int]:
        """Where file number n's documents for evaluation begin, and where its last one ends, in bytes."""
        path = self.paths[n]
        data = self.data(n)
        size = len(data)
        while size and data[size - 1 : size].isspace():
            size -= 1
        first = 0
        while first < size and data[first : first + 1].isspace():  # blank lines before the first document
            first += 1
        if not size:
            raise InputError(f"{path}: is empty")
        # Another kind of file is found now.
        text_of(data, first, data.find(b"\n", first, size) + 1 or size, path)
        # The first document after 19 twentieths; or the last one, if it is longer than a twentieth.
        border = data.find(b"\n", max(first, size * 19 // 20), size) + 1
        border = border or data.rfind(b"\n", first, size) + 1
        if not border:
            print(f"{path}: a single document, so none of it is kept for evaluation", file=sys.stderr)
            return size, size
        return border, size

    def data(self, n: int) -> mmap.mmap | bytes:
        """The bytes of file number n.

        Nothing can be found inside a .gz: it is unpacked once, into a file that has no name and ends with us.
        """
        path = self.paths[n]
        if path.suffix != ".gz":
            return map_file(path)
        if n not in self.unpacked:
            with (
                reading(path, "can't be unpacked"),
                tempfile.TemporaryFile() as file,
                gzip.open(path) as packed,
            ):
                room = 100 * path.stat().st_size + (1 << 26)  # text packs ten to one
                while block := packed.read(1 << 20):
                    file.write(block)
                    if file.tell() > room:
                        raise InputError(
                            f"{path}: unpacks to more than a hundred times its size, so it isn't text"
                        )
                file.flush()
                self.unpacked[n] = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""
                )
        return self.unpacked[n]

    def file(self, rng: random.Random, test: bool, number: int) -> int:
        """The file of a row: drawn by size, or (in order) the one that the row's share falls in."""
        if self.in_order and not test:
            ends = list(accumulate(self.sizes))
            share = number * ends[-1]
            return next(n for n, end in enumerate(ends) if share < self.in_order * end or end == ends[-1])
        weights = [size - border if test else size for size, border in zip(self.sizes, self.borders)]
        return rng.choices(range(len(self.paths)), weights)[0]

    def window(self, rng: random.Random, needed: int, test: bool, number: int = 0) -> list[int]:
        """The tokens of A B C D: a stretch of one text, or of several where they are short."""
        eos = self.formatter.tokenizer.eos
        n = self.file(rng, test, number)
        data = self.data(n)
        start, end = (self.borders[n], self.sizes[n]) if test else (0, self.borders[n])
        line = data.find(b"\n", rng.randrange(start, end), end) + 1 or start  # the beginning of some line
        tokens: list[int] = []
        while True:
            line = start if line >= end else line
            while not data[line : (stop := data.find(b"\n", line, end) + 1 or end)].strip():  # a blank line
                line = start if stop >= end else stop
            text = text_of(data, line, stop, self.paths[n])
            # A text needn't be read whole: no token has more than 32 letters on average.
            skip = rng.randrange(max(1, len(text) - 32 * needed)) if not tokens else 0
            piece = self.formatter.tokenizer.encode(text[skip : skip + 32 * needed])
            if not tokens and len(piece) > needed:
                first = rng.randrange(len(piece) - needed + 1)
                piece = piece[first : first + needed]
            tokens += piece + [eos]
            if len(tokens) > needed:
                return tokens[:needed]
            line = stop

    def __call__(self, seed: int, numbers: Sequence[int], test: bool = False) -> Batch:
        """The rows of a run with these numbers. Each is a pure function of (seed, number)."""
        return collate([self.sample(seed, number, test) for number in numbers])

    def sample(self, seed: int, number: int, test: bool) -> Sample:
        length = self.formatter.context
        gists = len(self.gist_ids)
        if not test:
            of_step = random.Random(f"{seed} step {number // self.rows}")
            length = of_step.randint(self.shortest, length)
            # A gist alone is as frequent as 2 and 3 together, as 4 to 7, as 8 to 15.
            gists = int(self.fewest * ((gists + 1) / self.fewest) ** of_step.random())
        outer = self.outer(length)
        end_of_c = outer + 2 * self.inner
        rng = random.Random(f"{'test ' * test}{seed} {number}")
        tokens = self.window(rng, end_of_c + outer, test, number)
        tokenizer = self.formatter.tokenizer
        a_and_d = tokens[:outer] + tokens[end_of_c:]
        b_and_c = tokens[outer:end_of_c]
        context = self.compression.contexts(TextContext(tokenizer), a_and_d, self.gist_ids[:gists])
        return Sample(context, [([tokenizer.bos], b_and_c)])


def words_of(rows: Rows, vocab: int) -> Tensor:
    """BOS A D without their gists [B, T]: all rows of a batch are equally long."""
    return rows.tokens[rows.tokens < vocab].view(len(rows.tokens), -1)


def text_of(data: mmap.mmap | bytes, start: int, stop: int, path: Path) -> str:
    """The text of one line."""
    try:
        return as_text(parse_line(data[start:stop], "").get("text"), "text")
    except InputError as problem:  # only now are lines counted
        line = data[:start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: {str(problem).removeprefix(': ')}") from None


# ----------------------------------------------------------------------------------------- evaluation

WINDOWS = 128  # stretches of text to evaluate on


@torch.no_grad()
def losses(args: Options, hyper: HyperLlama, text: TextBatches, gists: bool = True) -> dict[str, float]:
    """Loss per token on C after B, on held-out text.

    With the gists of A and D, with another text's, without, and with A and D in full.
    """
    device = hyper.gists.device
    losses_of: dict[str, list[float]] = {}
    count = min(WINDOWS, args.limit or WINDOWS)
    most = max(1, args.eval_tokens // (args.context + args.query_length))
    for start in tqdm(range(0, count, most), desc="evaluating", leave=False):
        size = min(most, count - start)
        # One row more: the gists of the next text are the control.
        batch = text(args.seed, range(start, start + size + 1), test=True).to(device)
        tokens = batch.tokens[:size]
        targets = batch.targets.view(size + 1, -1)[:size, text.inner :]
        words = words_of(batch.context[0], hyper.model.config.vocab)
        full = read_contexts(hyper.model, [keep_all(row) for row in words[:size].tolist()])
        prefixes = {"none": nothing(device), "full": full}
        if gists:
            compressed = hyper.compression.prefix(hyper, batch.context)
            own = torch.arange(size, device=device)
            prefixes |= {"gists": compressed[own], "other": compressed[own + 1]}
        for name, prefix in prefixes.items():
            logits, _ = hyper.model(tokens, **prefix.as_past(tokens.shape[1]))
            on_c = logits[:, text.inner :].float()  # BOS and B come before it
            each = F.cross_entropy(on_c.transpose(1, 2), targets, reduction="none").mean(1)
            losses_of.setdefault(name, []).extend(each.tolist())
    means = {name: statistics.fmean(values) for name, values in losses_of.items()}
    if not all(map(math.isfinite, means.values())):
        raise InputError("losses on the held-out text aren't finite: the model holds NaN or inf")
    return means


def evaluate(run: Run) -> tuple[dict, list[list[str]]]:
    """What results.json holds, and the lines of a table.

    "kept" is the share of the context's benefit that the gists keep, in percent: (without - gists) /
    (without - in full), all of the trained model. Above 100: it predicts better after gists than with A and D
    in full, which is what it was trained for.
    """
    args = run.args
    began = time.monotonic()
    text = TextBatches(args.data, run.formatter, run.hyper.gist_ids, run.hyper.compression)
    now = losses(args, run.hyper, text)
    before = losses(args, build(args).requires_grad_(False), text, gists=False)
    kept = 100 * (now["none"] - now["gists"]) / (now["none"] - now["full"])
    lines = [
        [
            "loss per token of C",
            "gists of A D",
            "no prefix",
            "A D in full",
            "other text's gists",
            "share kept",
        ],
        ["before", "", f"{before['none']:.3f}", f"{before['full']:.3f}", "", ""],
        ["after", *(f"{now[name]:.3f}" for name in ("gists", "none", "full", "other")), f"{kept:.0f} %"],
    ]
    results = {
        "task": args.task,
        "method": args.method,
        "metric": METRIC,
        "tasks": {"text": {"mean": now["gists"], "std": None, "n": min(WINDOWS, args.limit or WINDOWS)}},
        "average": now["gists"],
        "before": None,
        "baselines": {"zeroshot": before["none"], "fewshot": before["full"]},
        "controls": {"no_prefix": now["none"], "in_full": now["full"], "other_task": now["other"]},
        "kept": kept,
        "seconds": round(time.monotonic() - began, 1),
        "args": portable(args),
    }
    return results, lines


# ---------------------------------------------------------------------------------- sharding and export


def shard(hyper: HyperLlama) -> None:
    """FSDP2: each process holds a share of every parameter; a layer is put together while it is needed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (  # a second and more to import, and only needed here
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    # Blocks return views (values with their heads in front); nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    kind = hyper.gists.device.type
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if kind == "cuda":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in hyper.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        for method in ("forward_at", "keys_values"):
            register_fsdp_forward_method(layer, method)
    fully_shard(hyper, mesh=mesh, mp_policy=policy)


def save_checkpoint(folder: Path, c: Config, tensors: dict[str, Tensor], bos: int = 1, eos: int = 2) -> None:
    """A Hugging Face folder, in bfloat16."""
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": t.bfloat16() for name, t in tensors.items()
    }
    save_tensors(folder / "model.safetensors", weights, {"format": "pt"})
    write_config(folder, c, bos, eos)


def write_config(folder: Path, c: Config, bos: int = 1, eos: int = 2) -> None:
    """Hugging Face's config.json."""
    scaling = c.rope_scaling and {"rope_type": "llama3"} | c.rope_scaling._asdict()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": c.vocab, "hidden_size": c.width,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_size, "intermediate_size": c.hidden,
        "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "rope_scaling": scaling,
        "max_position_embeddings": c.max_positions, "tie_word_embeddings": c.tied, "bos_token_id": bos,
        "eos_token_id": eos, "torch_dtype": "bfloat16",
    }  # fmt: skip
    write_json(folder / "config.json", config)
