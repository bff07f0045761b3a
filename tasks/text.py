"""Compression hyperpretraining (paper, Section 5): text instead of tasks, all parameters, no LoRA.

A token sequence is cut in four segments A B C D. A and D are compressed, and the downstream model
predicts B and C after their gists. The result is a checkpoint with gists of its own, usable as --model.
"""

import argparse
import gzip
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from data import Batch, Formatter, collate
from gist import HyperLlama, read_rows
from gist import build as build_hyper
from llama import Config, InputError, Tokenizer, reading
from lora import save_tensors, write_json
from tasks.rows import as_text, existing, map_file, parse_line

FOLDER, MODEL = "text", "llama"  # the miniature's data and checkpoint
METRIC = "loss"
DEFAULTS = {
    "large": {"shots": 0, "steps": 50_000, "batch_size": 32, "lr": 2e-5, "gist_lr": 2e-5, "sets": 1},
    "tiny": {"shots": 0, "steps": 300, "batch_size": 24, "lr": 3e-3, "gist_lr": 3e-3, "context": 145, "query_length": 65, "sets": 5},
}


def check(args: argparse.Namespace) -> None:
    """InputError for options that don't go together."""
    if args.method != "hyper" or args.quantize:
        raise InputError("--task hyperpretrain trains all parameters of a hypernetwork: no --quantize, no other --method")
    if args.downstream != "frozen":
        raise InputError(f"--downstream {args.downstream} belongs to a hypernetwork with LoRA sets, not to this run")
    if args.measure:
        raise InputError("--measure counts the times that held-out tasks are scored; --task hyperpretrain has none")


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
    return TextBatches(args.data, formatter, hyper.gist_ids)


class TextBatches:
    """Segments A B C D of text: A and D are compressed, B C is predicted after their gists (paper, Section 5).

    A and D fill the formatter's context, B and C its query length. Files (.jsonl or .jsonl.gz
    with `text`) are never read whole: a window begins at a random byte of them. The last twentieth
    of each file is kept for evaluation.
    """

    def __init__(self, folder: str | Path, formatter: Formatter, gist_ids: list[int]):
        folder = existing(folder)
        paths = sorted(path for path in folder.rglob("*") if path.name.endswith((".jsonl", ".jsonl.gz")))
        if not paths:
            raise InputError(f"{folder}: no .jsonl or .jsonl.gz files with text")
        self.paths, self.borders, self.sizes = paths, [], []
        self.unpacked = tempfile.TemporaryDirectory(prefix="text-")
        for n, path in enumerate(paths):
            data = map_file(self.plain(n))
            self.sizes.append(len(data))
            self.borders.append(data.find(b"\n", len(data) * 19 // 20) + 1)  # after it: evaluation
            if not 0 < self.borders[-1] < len(data):
                raise InputError(f"{path}: too few lines to keep some for evaluation")
            for at in (0, self.borders[-1]):  # a file that holds something else is found now
                text_of(data[at : data.find(b"\n", at) + 1 or len(data)], f"{path}: byte {at}")
        self.formatter, self.gist_ids = formatter, gist_ids
        self.outer = (formatter.context - len(gist_ids) - 1) // 2  # tokens of A, and of D
        self.inner = (formatter.query_length - 1) // 2  # of B, and of C
        if min(self.outer, self.inner) < 1:
            raise InputError("--context and --query-length leave no room for segments of text")

    def __str__(self) -> str:
        return f"{len(self.paths)} files of text"

    def plain(self, n: int) -> Path:
        """File number n, or what was packed in it: nothing can be found inside a .gz, so it is unpacked once."""
        path, unpacked = self.paths[n], Path(self.unpacked.name) / str(n)
        if path.suffix != ".gz":
            return path
        if not unpacked.exists():
            with reading(path, "can't be unpacked"), open(unpacked, "wb") as file, gzip.open(path) as packed:
                shutil.copyfileobj(packed, file)
        return unpacked

    def window(self, rng: random.Random, test: bool) -> list[int]:
        """The tokens of A B C D: a stretch of one text, or of several where they are short."""
        needed, eos = 2 * (self.outer + self.inner), self.formatter.tokenizer.eos
        (file,) = rng.choices(range(len(self.paths)), self.sizes)
        path, data, border = self.paths[file], map_file(self.plain(file)), self.borders[file]
        start, end = (border, self.sizes[file]) if test else (0, border)
        at = data.find(b"\n", rng.randrange(start, end), end) + 1 or start  # the beginning of some line
        tokens: list[int] = []
        for _ in range(needed + 1):
            at = start if at >= end else at
            stop = data.find(b"\n", at, end) + 1 or end
            text = text_of(data[at:stop], f"{path}: byte {at}")
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
        bos, context, targets = self.formatter.tokenizer.bos, [], []
        for number in rows:
            tokens = self.window(random.Random(f"{'test ' * test}{seed} {number}"), test)
            middle = slice(self.outer, self.outer + 2 * self.inner)
            context.append([bos, *tokens[: middle.start], *tokens[middle.stop :], *self.gist_ids])
            targets.append(tokens[middle])
        return collate(context, list(range(len(context))), [[bos]] * len(context), targets)


def text_of(line: bytes, where: str) -> str:
    return as_text(parse_line(line, where).get("text"), f"{where}: text")


# ----------------------------------------------------------------------------------------- evaluation

WINDOWS = 64  # stretches of text to evaluate on


@torch.no_grad()
def evaluate(args: argparse.Namespace, hyper: HyperLlama, formatter: Formatter) -> tuple[dict, list[list[str]]]:
    """Loss per token on C after B: with the gists of A and D, without, with A and D in full.

    Returns what results.json holds, and the lines of a table. "kept" is the share of the context's
    benefit that the gists keep, in percent: (without - gists) / (without - in full).
    """
    began, rows_of, G = time.time(), batches(args, hyper, formatter), len(hyper.gists)
    device, losses = hyper.gists.device, {name: [] for name in ("gists", "none", "full", "other")}
    count = min(WINDOWS, args.limit or WINDOWS)
    for start in tqdm(range(0, count, args.eval_batch_size), desc="evaluating", leave=False):
        size = min(args.eval_batch_size, count - start)
        # One row more: the gists of the next text are the control.
        more = rows_of(args.seed, range(start, start + size + 1), test=True).to(device)
        gists = hyper.compress(more.examples)
        rows = torch.arange(size, device=device)
        gists, others = gists[rows], gists[rows + 1]
        tokens, width = more.tokens[:size], more.tokens.shape[1]
        targets = more.targets.view(size + 1, -1)[:size, rows_of.inner :]
        full = read_rows(hyper.model, more.examples[:size, :-G].tolist())
        full.seen = None  # all rows have the same length
        for name, prefix in {"gists": gists, "none": None, "full": full, "other": others}.items():
            before = {} if prefix is None else prefix.before(width)
            logits, _ = hyper.model(tokens, **before)
            on_c = logits[:, rows_of.inner :].float()  # BOS and B come before it
            losses[name] += F.cross_entropy(on_c.transpose(1, 2), targets, reduction="none").mean(1).tolist()
    means = {name: statistics.fmean(values) for name, values in losses.items()}
    kept = 100 * (means["none"] - means["gists"]) / (means["none"] - means["full"])
    head = ["loss per token of C", "gists of A D", "no prefix", "A D in full", "other text's gists", "share kept"]
    results = {
        "task": args.task,
        "method": args.method,
        "metric": METRIC,
        "tasks": {"text": {"mean": means["gists"], "std": None, "n": count}},
        "average": means["gists"],
        "baselines": {"zeroshot": means["none"], "fewshot": means["full"]},
        "controls": {"other_task": means["other"]},
        "kept": kept,
        "seconds": round(time.time() - began, 1),
        "args": vars(args),
    }
    return results, [head, ["mean", *(f"{means[name]:.3f}" for name in losses), f"{kept:.0f} %"]]


# ---------------------------------------------------------------------------------- sharding and export


def shard(hyper: HyperLlama) -> None:
    """FSDP2: each process holds a share of every parameter; a layer is put together while it is needed."""
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
