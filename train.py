"""Training: from options to a finished run, read from top to bottom (main, then train).

    python train.py --task p3                                             the miniature, on two CPU cores
    python train.py --task p3 --model Llama-2-7b-hf --data P3 --quantize  the paper's

What is trained are LoRA sets and gist embeddings; in compression hyperpretraining the whole model, whose
run folder can be used as --model. With several processes (torchrun), LoRA runs are data-parallel, and
hyperpretraining is sharded by FSDP2. Rows are numbered, and their number says what they are: so neither
the number of processes nor a kill changes a loss.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from data import Batch, Term
from eval import HeldOut, draw_held_out, evaluate, measure, save_results, show_answers
from llama import InputError
from lora import check_tensors, load_tensors, replacing, save_tensors

# fmt: off
from run import (
    Options, Parser, Run, add_options, check_belongs, check_folder, default_folder, open_run, plugins,
    processes, read_args, read_lines, resolve_args, run_command, start_folder, start_processes, trainable,
)
# fmt: on

BETAS = (0.9, 0.99)  # Adam's
WARM_UP = 0.1  # share of the steps
MAX_NORM = 1.0  # of the gradient


def parse(argv: list[str] | None = None) -> tuple[Options, Path, bool, bool]:
    """What defines a run; and the three options that don't: --out, --resume, --overwrite."""
    parser = Parser(__doc__)
    add_options(parser)
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/<task>-<method>…)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, with its options")
    parser.add_argument("--overwrite", action="store_true", help="throw away what --out holds")
    typed = vars(parser.parse_args(argv))
    out = typed.pop("out", None)
    resume = typed.pop("resume", False)
    overwrite = typed.pop("overwrite", False)
    if out == "":
        raise InputError("--out: an empty name")
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    before = read_args(Path(out)) if resume and out else None  # what isn't said again stays
    args = resolve_args(typed, before)
    return args, Path(out or default_folder(args)), resume, overwrite


def main() -> None:
    args, out, resume, overwrite = parse()
    rank, world = start_processes()
    if args.batch_size < world:
        raise InputError(f"--batch-size {args.batch_size}: {world} processes need a row each")
    if rank == 0:
        check_folder(out, args, resume, overwrite)
    if args.optimizer == "muon" and (not hasattr(torch.optim, "Muon") or dist.is_initialized()):
        raise InputError("--optimizer muon needs torch 2.9 or later and a single process; adamw doesn't")
    # All that can be wrong with a run is found before anything is replaced.
    run = open_run(args)
    task = run.task
    counting = replace(run, formatter=replace(run.formatter, left_out=Counter()))
    batches = task.batches(counting)
    batches(args.seed, range(args.batch_size))  # a trial, whose counts are thrown away
    counting.formatter.left_out.clear()
    watched = task.watched(run)
    held_out = draw_held_out(watched) if watched else None
    if rank == 0:
        start_folder(out, args, resume, overwrite)
        held = f"{len(held_out.tasks)} held out, " if held_out and not task.evaluate else ""
        count = sum(p.numel() for p in trainable(run.hyper).values())
        print(f"{out}: {batches}, {held}{count:,} trained parameters")
    if world > 1:
        dist.barrier()
        task.shard(run.hyper)
    task.start(run, out, train)  # (a shared prefix is trained first, by the same loop)

    train(run, batches, out, watched, held_out)

    left_out = counting.formatter.left_out
    if task.evaluate:
        results, lines = task.evaluate(open_run(args, out)) if rank == 0 else (None, None)  # as it was saved
    else:
        results, lines = evaluate(run, held_out, out)
        left_out = left_out + held_out.left_out
        log = read_lines(out / "log.jsonl")
        results["before"] = next((line["before"] for line in log if "before" in line), None)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        save_results(results, lines, left_out, out)
        finish(run, held_out, results, out)


def train(
    run: Run, batches: Callable, out: Path, watched: Run | None = None, held_out: HeldOut | None = None
) -> None:
    """All steps from where the run in `out` stands, and what was trained, saved there.

    watched, held_out: the run whose held-out tasks are scored along the way, usually the same.
    """
    args = run.args
    hyper = run.hyper
    device = run.device
    rank, world = processes()
    parameters = list(trainable(hyper).values())
    sharded = isinstance(parameters[0], DTensor)
    optimizers = make_optimizers(hyper, args)
    terms = loss_terms(run)
    weights = torch.tensor([term.weight for term in terms], device=device)
    step = load_state(out, hyper, optimizers, args.steps)
    log = open_log(out, step)
    every = max(1, args.steps // args.measure) if args.measure and held_out else 0
    bar = tqdm(total=args.steps, initial=step, desc="training", disable=rank > 0)
    micro_batches = get_batches(batches, args, step, device)
    while True:
        # Before the first step, and once in a while, the held-out tasks are scored (by all processes).
        if every and (step % every == 0 or step == args.steps):
            log({"step": step} | measure(watched, held_out, step))
        if step == args.steps:
            break

        began = time.monotonic()
        share = schedule(step, args.steps)  # of each group's highest learning rate
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["highest_lr"]

        # Each term is a sum over tokens, divided by their number in the whole step, over all its batches and
        # processes: a mean of means would give tokens of short batches more weight.
        counts = torch.tensor([[b.read, *(term.count(b) for term in terms)] for b in micro_batches])
        tokens_read, *counts = all_sum(counts.sum(0).to(device))
        counts = torch.stack(counts).clamp(min=1)  # (a term may have no tokens at all)
        sums = torch.zeros(len(terms), device=device)
        for batch in micro_batches:
            logits, gists = hyper(batch)
            parts = torch.stack([term.loss(hyper, batch, gists, logits) for term in terms])
            loss = (weights * parts / counts).sum()
            # FSDP takes the mean of the processes' gradients; it is to be their sum.
            (loss * world if sharded else loss).backward()
            sums += parts.detach()
        if not sharded:
            for parameter in parameters:
                all_sum(parameter.grad)
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        # The step is queued on the device: the next batch is drawn while it works, before a number is read.
        step += 1
        micro_batches = get_batches(batches, args, step, device)
        means = all_sum(sums) / counts
        step_loss = (weights * means).sum().item()
        line = {"step": step, "loss": step_loss, "norm": full_tensor(norm).item(), "lr": share * args.lr}
        named = {f"{term.name}_loss": mean for term, mean in zip(terms, means.tolist()) if term.name}
        line |= {name: round(mean, 4) for name, mean in named.items() if mean}
        if not math.isfinite(line["loss"] + line["norm"]):  # nothing is saved of that
            row = (step - 1) * args.accumulate * args.batch_size
            what = f"loss or gradient of step {step} (rows {row} and following) isn't finite"
            raise InputError(f"{out}: {what}; the last checkpoint is kept; a smaller --lr may help")
        seconds = max(1e-6, time.monotonic() - began)
        line |= {"tokens_per_second": round(tokens_read.item() / seconds), "seconds": round(seconds, 4)}
        log(line)
        bar.set_postfix_str(in_short(line), refresh=False)
        bar.update()
        if step % args.save_every == 0 or step == args.steps:
            save_state(out, hyper, optimizers, step)
    bar.close()

    tensors = {name: full_tensor(p.detach()) for name, p in trainable(hyper).items()}
    if rank == 0:
        run.task.save(hyper, out, tensors, args)


# ---------------------------------------------------------------------------------- parts of the loop


def get_batches(batches: Callable, args: Options, step: int, device: torch.device) -> list[Batch]:
    """The batches of a step; none after the last.

    Step n reads the rows n·S … n·S + S - 1 of the run, S = accumulate · batch size; each process takes
    every world-th of them. So the number of processes changes no loss.
    """
    rank, world = processes()
    if step == args.steps:
        return []
    starts = [(step * args.accumulate + i) * args.batch_size for i in range(args.accumulate)]
    rows = [range(start + rank, start + args.batch_size, world) for start in starts]
    return [batches(args.seed, numbers).to(device) for numbers in rows]


def loss_terms(run: Run) -> list[Term]:
    """The cross entropy of the targets, and what chapters of further/ make of it.

    The log has labels and EOS apart: at first nearly all of the loss is that of EOS.
    """
    eos = run.formatter.tokenizer.eos
    terms = [Term(1.0, lambda batch: len(batch.targets), cross_entropy)]
    for chapter in plugins("further").values():
        terms = chapter.terms(run, terms)
    for name, is_end in (("label", False), ("end", True)):
        terms.append(part_of_targets(name, eos, is_end))
    return terms


def cross_entropy(hyper: nn.Module, batch: Batch, gists, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def part_of_targets(name: str, eos: int, is_end: bool) -> Term:
    """The cross entropy of the targets that are EOS, or of those that aren't, for the log alone."""

    def chosen(batch: Batch) -> Tensor:
        return (batch.targets == eos) == is_end

    @torch.no_grad()
    def loss(hyper: nn.Module, batch: Batch, gists, logits: Tensor) -> Tensor:
        part = chosen(batch)
        return F.cross_entropy(logits[part].float(), batch.targets[part], reduction="sum")

    return Term(0.0, lambda batch: int(chosen(batch).sum()), loss, name)


def in_short(line: dict) -> str:
    """A line of the log for the bar."""
    parts = [f"{name} {line[f'{name}_loss']:.2f}" for name in ("label", "end") if f"{name}_loss" in line]
    apart = f" ({', '.join(parts)})" if len(parts) == 2 else ""
    return f"loss {line['loss']:.3f}{apart}, {line['tokens_per_second']:,} tokens/s"


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then linear to zero. Share of --lr in step 0, 1 …"""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def make_optimizers(hyper: nn.Module, args: Options) -> list[torch.optim.Optimizer]:
    """AdamW. LoRA updates start at zero, gist embeddings at the size of words: each has a rate of its own.

    With --optimizer muon (Jordan et al. 2024), the layers' matrices take Muon's steps, and the rest AdamW's
    at --gist-lr.
    """
    main, rest = [], []
    for name, p in trainable(hyper).items():
        matrix = p.dim() == 2 and ".layers." in name
        slow = name == "gists" or (args.optimizer == "muon" and not matrix)
        (rest if slow else main).append(p)
    main = {"params": main, "highest_lr": args.lr * getattr(hyper, "lr_share", 1)}
    rest = {"params": rest, "highest_lr": args.gist_lr}
    if args.optimizer == "adamw":
        groups = [group for group in (main, rest) if group["params"]]
        return [torch.optim.AdamW(groups, args.lr, BETAS, weight_decay=0.0, fused=True)]
    return [
        torch.optim.Muon([main], args.lr, weight_decay=0.1, adjust_lr_fn="original"),
        torch.optim.AdamW([rest], args.gist_lr, BETAS, weight_decay=0.0, fused=True),
    ]


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# -------------------------------------------------------------------------------- the log and the state


def open_log(out: Path, step: int) -> Callable[[dict], None]:
    """A function that writes a line. What a killed run logged after step `step` is dropped first."""
    path = out / "log.jsonl"
    if processes()[0] > 0:
        return lambda line: None
    # (The score of step n is logged before step n + 1, and is found again when the run goes on from n.)
    kept = [line for line in read_lines(path) if line["step"] <= step - ("score" in line)]
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
    file = open(path, "a")
    return lambda line: print(json.dumps(line), file=file, flush=True)


def state_of(
    hyper: nn.Module, optimizers: list[torch.optim.Optimizer], full: bool
) -> tuple[dict[str, Tensor], dict, dict]:
    """Trained weights and what the optimizers keep of each, by name; and the same as torch nests them.

    full: gathered from all processes on the CPU of the first, for any number of them to go on; else sharded.
    """
    options = StateDictOptions(full_state_dict=full, ignore_frozen_params=True, cpu_offload=full)
    weights, nested = get_state_dict(hyper, optimizers, options=options)
    kept = nested.get("state", {})  # (the other processes get nothing)
    moments = {f"{key}.{name}": t for name, part in kept.items() for key, t in part.items()}
    names = trainable(hyper)  # (where lm_head is the embedding table, torch names it twice)
    return {name: t for name, t in weights.items() if name in names} | moments, weights, nested


def save_state(out: Path, hyper: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """All that the next step needs besides the options."""
    tensors, _, _ = state_of(hyper, optimizers, full=True)
    if processes()[0] == 0:
        path = out / "state.safetensors"
        check_tensors(tensors, tensors, path)  # what isn't finite isn't saved: the last good state is kept
        save_tensors(path, tensors, {"steps": str(step)} | hyper.belongs_to)


@torch.no_grad()
def load_state(out: Path, hyper: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> int:
    """The step to go on with; 0 where nothing was saved yet."""
    path = out / "state.safetensors"
    if not path.exists():
        return 0
    tensors, metadata = load_tensors(path)
    step = metadata.get("steps", "")
    if not (step.isdecimal() and len(step) < 10 and 0 < int(step) <= steps):
        raise InputError(f"{path}: step {step[:20]} is not one of the run's {steps}")
    check_belongs(path, metadata, hyper)
    state, weights, nested = state_of(hyper, optimizers, full=False)
    check_tensors(state, tensors, path)  # the kernels that use them don't
    for name, tensor in state.items():
        whole = tensors[name]
        if isinstance(tensor, DTensor):
            whole = distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)
        tensor.copy_(whole)
    options = StateDictOptions(strict=False)
    set_state_dict(hyper, optimizers, model_state_dict=weights, optim_state_dict=nested, options=options)
    return int(step)


def finish(run: Run, held_out: HeldOut | None, results: dict, out: Path) -> None:
    """The last lines on the screen, and the picture."""
    if run.args.measure:
        from tools.report import plot  # (slow to import)

        plot([out], out / "curve.png")
    if run.task.evaluate:
        return
    show_answers(run, held_out)
    baselines = results["baselines"]
    read = results["shots"]["fewshot"]
    examples = "all examples" if held_out.all_read else f"{read:.3g} examples"
    before = "" if results["before"] is None else f"before {results['before']:.1f} → "
    print(
        f"{before}after {results['average']:.1f} | without examples {baselines['zeroshot']:.1f} "
        f"| {examples} in context {baselines['fewshot']:.1f}"
    )


if __name__ == "__main__":
    run_command(main)
    if "RANK" in os.environ:  # gloo's threads sometimes abort the interpreter's own way out
        sys.stdout.flush()
        os._exit(0)
