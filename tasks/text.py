"""Compression hyperpretraining (paper, Section 5): text instead of tasks, all parameters, no LoRA.

A token sequence is cut in four segments A B C D. A and D are compressed, and the downstream model
predicts B and C after their gists. The result is a checkpoint with gists of its own, usable as --model.
"""

import argparse
import gzip
import math
import mmap
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Batch, Formatter, again, collate
from gist import HyperLlama, read_rows
from gist import build as build_hyper
from llama import Config, InputError, Tokenizer, reading
from lora import save_tensors, write_json
from tasks.rows import as_text, existing, map_file, parse_line

FOLDER, MODEL = "text", "llama"  # the miniature's data and checkpoint
METRIC = "loss"
OPTIONS = ("lm", "in_order", "held_out")
WITHOUT = ("shots", "sets", "score", "rank", "alpha", "controls", "instruction_downstream")
DEFAULTS = {
    "large": {"shots": None, "steps": 50_000, "batch_size": 32, "lr": 2e-5, "gist_lr": 2e-5, "sets": 1},
    "tiny": {
        "shots": None, "steps": 2000, "batch_size": 24, "optimizer": "muon", "lr": 1e-2, "gist_lr": 2.5e-3,
        "lm": 0.5, "in_order": True, "context": 145, "query_length": 65, "sets": 1, "measure": 7,
    },  # fmt: skip
}


def check(args: argparse.Namespace) -> None:
    """InputError for options that don't go together."""
    if args.method != "hyper" or args.quantize:
        raise InputError("--task hyperpretrain trains all parameters of a hypernetwork: no --quantize, no other --method")
    if args.downstream != "frozen":
        raise InputError(f"--downstream {args.downstream} belongs to a hypernetwork with LoRA sets, not to this run")
    if os.environ.get("WORLD_SIZE", "1") != "1" and (args.distill or args.weight_by_context):
        raise InputError("--distill and --weight-by-context of --task hyperpretrain need a single process: its teacher isn't sharded")


def build(args: argparse.Namespace) -> HyperLlama:
    return build_hyper(args, whole=True)


def restore(args: argparse.Namespace, folder: Path) -> HyperLlama:
    """What was trained is a whole checkpoint, with its gists."""
    return build_hyper(argparse.Namespace(**vars(args) | {"model": str(folder)}), whole=True).requires_grad_(False)


def save(hyper: HyperLlama, tensors: dict[str, Tensor], args: argparse.Namespace, out: Path) -> None:
    """The whole model as a Hugging Face folder, in bfloat16, and its gists."""
    save_tensors(out / "gists.safetensors", {"gists": tensors.pop("gists")}, {})
    save_checkpoint(out, hyper.model.config, {name.removeprefix("model."): t for name, t in tensors.items()})
    shutil.copyfile(Tokenizer(args.model).path, out / "tokenizer.model")


def batches(args: argparse.Namespace, hyper: HyperLlama, formatter: Formatter) -> "TextBatches":
    rows = args.steps * args.accumulate * args.batch_size
    text = TextBatches(args.data, formatter, hyper.gist_ids, args.lm, rows if args.in_order else 0, args.reconstruct)
    text(args.seed, range(WINDOWS), test=True)  # what can't be read for evaluation is found before training
    return text


class TextBatches:
    """Segments A B C D of text: A and D are compressed, B C is predicted after their gists (paper, Section 5).

    A and D fill the formatter's context, B and C its query length. Files (.jsonl or .jsonl.gz
    with `text`) are never read whole: a window begins at a random byte of them. The documents in the
    last twentieth of each file (at least one) are kept for evaluation; a file of one document trains.

    lm           the weight of ordinary language modelling of the whole window
    in_order     so many rows take the files one after the other, by name; 0: each row draws a file
    reconstruct  the weight of saying A and D again
    """

    def __init__(
        self, folder: str | Path, formatter: Formatter, gist_ids: list[int], lm: float = 0.0, in_order: int = 0, reconstruct: float = 0.0
    ):
        folder = existing(folder)
        paths = sorted(path for path in folder.rglob("*") if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file())
        if not paths:
            raise InputError(f"{folder}: no .jsonl or .jsonl.gz files with text")
        self.paths, self.borders, self.sizes = paths, [], []
        self.unpacked: dict[int, mmap.mmap | bytes] = {}
        for n, path in enumerate(paths):
            data = self.data(n)
            size = len(data[:].rstrip()) if len(data) < 1 << 16 else len(data)  # blank lines may end a small file
            border = data.find(b"\n", size * 19 // 20, size) + 1 or data.rfind(b"\n", 0, max(0, size - 1)) + 1
            self.sizes.append(size)
            self.borders.append(border or size)  # after it: evaluation
            if not size:
                raise InputError(f"{path}: is empty")
            if not border:
                print(f"{path}: a single document, so none of it is kept for evaluation", file=sys.stderr)
            for start in {0, border}:  # a file that holds something else is found now
                while not data[start : (stop := data.find(b"\n", start) + 1 or size)].strip():  # a blank line
                    start = stop
                text_of(data, start, stop, path)
        if self.borders == self.sizes:
            raise InputError(f"{folder}: too few documents to keep some for evaluation")
        self.formatter, self.gist_ids, self.lm, self.in_order, self.reconstruct = formatter, gist_ids, lm, in_order, reconstruct
        self.outer = (formatter.context - len(gist_ids) - 1) // 2  # tokens of A, and of D
        self.inner = (formatter.query_length - 1) // 2  # of B, and of C
        if min(self.outer, self.inner) < 1:
            raise InputError("--context and --query-length leave no room for segments of text")

    def __str__(self) -> str:
        return f"{len(self.paths)} files of text"

    def data(self, n: int) -> mmap.mmap | bytes:
        """The bytes of file number n. Nothing can be found inside a .gz: it is unpacked once, into a file that has no name and ends with us."""
        path = self.paths[n]
        if path.suffix != ".gz":
            return map_file(path)
        if n not in self.unpacked:
            with reading(path, "can't be unpacked"), tempfile.TemporaryFile() as file, gzip.open(path) as packed:
                room = 100 * path.stat().st_size + (1 << 26)  # text packs ten to one
                while block := packed.read(1 << 20):
                    file.write(block)
                    if file.tell() > room:
                        raise InputError(f"{path}: unpacks to more than a hundred times its size, so it isn't text")
                file.flush()
                self.unpacked[n] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.tell() else b""
        return self.unpacked[n]

    def file(self, rng: random.Random, test: bool, number: int) -> int:
        """The file of a row: drawn by size, or (in order) the one that the row's share of the run falls in."""
        if self.in_order and not test:
            ends = list(accumulate(self.sizes))
            return next(n for n, end in enumerate(ends) if number * ends[-1] < self.in_order * end or end == ends[-1])
        weights = [size - border if test else size for size, border in zip(self.sizes, self.borders)]
        return rng.choices(range(len(self.paths)), weights)[0]

    def window(self, rng: random.Random, test: bool, number: int = 0) -> list[int]:
        """The tokens of A B C D: a stretch of one text, or of several where they are short."""
        needed, eos = 2 * (self.outer + self.inner), self.formatter.tokenizer.eos
        file = self.file(rng, test, number)
        path, data, border = self.paths[file], self.data(file), self.borders[file]
        start, end = (border, self.sizes[file]) if test else (0, border)
        at = data.find(b"\n", rng.randrange(start, end), end) + 1 or start  # the beginning of some line
        tokens: list[int] = []
        for _ in range(needed + 1):
            at = start if at >= end else at
            stop = data.find(b"\n", at, end) + 1 or end
            if not data[at:stop].strip():  # a blank line
                at = stop
                continue
            text = text_of(data, at, stop, path)
            # A text needn't be read whole: no token has more than 32 letters on average.
            skip = rng.randrange(max(1, len(text) - 32 * needed)) if not tokens else 0
            piece = self.formatter.tokenizer.encode(text[skip : skip + 32 * needed])
            if not tokens and len(piece) > needed:
                first = rng.randrange(len(piece) - needed + 1)
                piece = piece[first : first + needed]
            tokens += piece + [eos]
            if len(tokens) > needed:
                return tokens[:needed]
            at = stop
        raise InputError(f"{path}: its texts are empty")

    def __call__(self, seed: int, rows: Sequence[int], test: bool = False) -> Batch:
        """The rows of a run with these numbers. Each is a pure function of (seed, number)."""
        bos, context, targets, windows = self.formatter.tokenizer.bos, [], [], []
        for number in rows:
            tokens = self.window(random.Random(f"{'test ' * test}{seed} {number}"), test, number)
            middle = slice(self.outer, self.outer + 2 * self.inner)
            context.append([bos, *tokens[: middle.start], *tokens[middle.stop :], *self.gist_ids])
            targets.append(tokens[middle])
            windows.append(tokens)
        count = len(context)
        more = [] if test else again(context, self.gist_ids, self.formatter.tokenizer.eos, self.reconstruct)
        more += [collate(None, None, [[bos]] * count, windows, weight=self.lm)] if self.lm and not test else []
        return collate(context, list(range(count)), [[bos]] * count, targets, more=more)


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
def losses(args: argparse.Namespace, hyper: HyperLlama, formatter: Formatter, gists: bool = True) -> dict[str, float]:
    """Loss per token on C after B, on held-out text: with the gists of A and D, with another text's, without, with A and D in full."""
    rows_of, G, device = TextBatches(args.data, formatter, hyper.gist_ids), len(hyper.gists), hyper.gists.device
    each: dict[str, list[float]] = {}
    count = min(WINDOWS, args.limit or WINDOWS)
    most = max(1, args.eval_tokens // (args.context + args.query_length))
    for start in tqdm(range(0, count, most), desc="evaluating", leave=False):
        size = min(most, count - start)
        # One row more: the gists of the next text are the control.
        more = rows_of(args.seed, range(start, start + size + 1), test=True).to(device)
        tokens, width = more.tokens[:size], more.tokens.shape[1]
        targets = more.targets.view(size + 1, -1)[:size, rows_of.inner :]
        full = read_rows(hyper.model, more.examples[:size, : more.examples.shape[1] - G].tolist())
        full.seen = None  # all rows have the same length
        prefixes = {"none": None, "full": full}
        if gists:
            every, rows = hyper.compress(more.examples), torch.arange(size, device=device)
            prefixes |= {"gists": every[rows], "other": every[rows + 1]}
        for name, prefix in prefixes.items():
            logits, _ = hyper.model(tokens, **({} if prefix is None else prefix.before(width)))
            on_c = logits[:, rows_of.inner :].float()  # BOS and B come before it
            each.setdefault(name, []).extend(F.cross_entropy(on_c.transpose(1, 2), targets, reduction="none").mean(1).tolist())
    means = {name: statistics.fmean(values) for name, values in each.items()}
    if not all(map(math.isfinite, means.values())):
        raise InputError("losses on the held-out text aren't finite: the model holds NaN or inf")
    return means


def evaluate(args: argparse.Namespace, hyper: HyperLlama, formatter: Formatter) -> tuple[dict, list[list[str]]]:
    """What results.json holds, and the lines of a table.

    "kept" is the share of the context's benefit that the gists keep, in percent. The benefit is that
    of the model before hyperpretraining, since training changes the full-context loss as well:
    (without - gists) / (without - in full), where without and in full are the untouched model's.
    """
    began, now = time.monotonic(), losses(args, hyper, formatter)
    before = losses(args, build_hyper(args, whole=True).requires_grad_(False), formatter, gists=False)
    kept = 100 * (before["none"] - now["gists"]) / (before["none"] - before["full"])
    lines = [
        ["loss per token of C", "gists of A D", "no prefix", "A D in full", "other text's gists", "share kept"],
        ["before", "", f"{before['none']:.3f}", f"{before['full']:.3f}", "", ""],
        ["after", *(f"{now[name]:.3f}" for name in ("gists", "none", "full", "other")), f"{kept:.0f} %"],
    ]
    results = {
        "task": args.task,
        "method": args.method,
        "metric": METRIC,
        "tasks": {"text": {"mean": now["gists"], "std": None, "n": min(WINDOWS, args.limit or WINDOWS)}},
        "average": now["gists"],
        "baselines": {"zeroshot": before["none"], "fewshot": before["full"]},
        "controls": {"no_prefix": now["none"], "in_full": now["full"], "other_task": now["other"]},
        "kept": kept,
        "seconds": round(time.monotonic() - began, 1),
    }
    return results, lines


# ---------------------------------------------------------------------------------- sharding and export


def shard(hyper: HyperLlama) -> None:
    """FSDP2: each process holds a share of every parameter; a layer is put together while it is needed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a second and more to import, and only needed here

    # Blocks return views (values with their heads in front); nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    kind = hyper.gists.device.type
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if kind == "cuda" else MixedPrecisionPolicy()
    for layer in hyper.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(hyper, mesh=mesh, mp_policy=policy)


def hf_name(name: str) -> str:
    """Hugging Face's name of one of our tensors."""
    return name if name.startswith("lm_head") else f"model.{name}"


def save_checkpoint(folder: Path, c: Config, tensors: dict[str, Tensor]) -> None:
    """A Hugging Face folder, in bfloat16."""
    save_tensors(folder / "model.safetensors", {hf_name(name): t.bfloat16() for name, t in tensors.items()}, {"format": "pt"})
    write_config(folder, c)


def write_config(folder: Path, c: Config) -> None:
    """Hugging Face's config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": c.vocab,
        "hidden_size": c.width, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads, "head_dim": c.head_size, "intermediate_size": c.hidden,
        "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
    }  # fmt: skip
    write_json(folder / "config.json", config)
