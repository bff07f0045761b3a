"""Training: one step, the loop, the log and the state of a run (whose folder is looked after by tools/folder.py).

    python train.py --task p3                                             the miniature, on two CPU cores
    python train.py --task p3 --model Llama-2-7b-hf --data P3 --quantize  the paper's

A run lives in one folder: args.json, log.jsonl, state.safetensors (to resume), adapters.safetensors
(what was trained: LoRA sets and gist embeddings), results.json. All but the log are replaced atomically.
Compression hyperpretraining trains the whole model: its run folder can be used as --model.
With several processes (torchrun), LoRA runs are data-parallel, and hyperpretraining is sharded by FSDP2.
"""

from tools import run_command, start_processes  # isort: skip  first: Ctrl-C during the other imports is one line, too

import argparse
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from data import Batch, Formatter, report
from eval import HeldOut, final_results, main_score, measure, prepare, show_answers
from gist import check_origin, origin, trainable, trained
from llama import InputError, Tokenizer, reading
from lora import assign, load_tensors, read_lines, save_tensors
from tasks import TASKS, Parser, Run, add_options, open_run, read_args, settle
from tools.folder import check_folder, close_folders, open_folder, remove_replaced
from tools.report import plot

BETAS, WARM_UP, MAX_NORM = (0.9, 0.99), 0.1, 1.0  # Adam; share of the steps; of the gradient
LEAST_WORTH = 0.1  # a target's weight where the context is worth nothing for it, in nats

# ------------------------------------------------------------------------------------------- options


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Path, bool, bool]:
    """What defines a run; and the three options that don't: --out, --resume, --overwrite."""
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--out", metavar="DIR", help="run folder (default: runs/<task>-<method>…)")
    add("--resume", action="store_true", help="continue the run in --out, with its options")
    add("--overwrite", action="store_true", help="throw away what --out holds")
    typed = vars(parser.parse_args(argv))
    out, resume, overwrite = (typed.pop(name, None) for name in ("out", "resume", "overwrite"))
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    args = settle(typed, read_args(Path(out)) if resume and out else None)  # what isn't said again is as it was
    out = Path(out or default_folder(args))
    out = out.resolve() if out.is_symlink() or out.name in ("", "..") else out  # a name that can be renamed
    return args, out, bool(resume), bool(overwrite)


def default_folder(args: argparse.Namespace) -> str:
    """A name that tells what differs from the defaults."""
    task, method = TASKS[args.task], f"-{args.method}" + f"-{args.downstream}" * (args.method == "hyper")
    kind = f"-{args.init}" if args.init else method if hasattr(task, "load") else ""
    name, usual = args.task + kind, settle({"task": args.task})
    for option in ("model", "data"):
        value = getattr(args, option)
        name += f"-{Path(value).name}" * (Path(value).resolve() != Path(getattr(usual, option)).resolve())
    for option in ("shots", "gists", "chain"):
        name += f"-{getattr(args, option)}-{option}" * (getattr(args, option) != getattr(usual, option))
    name += "-instruction" * args.instruction_downstream + "-fused" * args.fuse_instruction + "-nf4" * args.quantize
    return f"runs/{name}-seed{args.seed}"


# ---------------------------------------------------------------------------------- several processes


def add_up(*tensors: Tensor) -> None:
    """Each tensor becomes the sum over all processes."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, divided and placed as the parameter is."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else tensor


# ------------------------------------------------------------------------------------------ the loop


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then linear to zero. Share of --lr in step 0, 1, …"""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def make_optimizers(hyper: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW. LoRA updates start at zero, gist embeddings at the size of words: they learn at rates of their own.

    With --optimizer muon (Jordan et al. 2024), the layers' matrices take Muon's steps, and the rest AdamW's at --gist-lr.
    """
    named, muon = trainable(hyper), args.optimizer == "muon"
    slow = {name for name, p in named.items() if name == "gists" or muon and not (p.dim() == 2 and ".layers." in name)}
    main, rest = ([p for name, p in named.items() if (name in slow) == part] for part in (False, True))
    main = {"params": main, "highest_lr": args.lr * getattr(hyper, "lr_share", 1)}
    rest = {"params": rest, "highest_lr": args.gist_lr}
    if not muon:
        return [torch.optim.AdamW([main, rest], args.lr, BETAS, weight_decay=0.0, fused=True)]
    if not main["params"]:
        raise InputError("--optimizer muon is for matrices of layers, and this run trains none")
    if not hasattr(torch.optim, "Muon") or isinstance(main["params"][0], DTensor):
        raise InputError("--optimizer muon needs torch 2.9 or later and a single process; --optimizer adamw has no such needs")
    return [torch.optim.Muon([main], args.lr, weight_decay=0.1, adjust_lr_fn="original"),
            torch.optim.AdamW([rest], args.gist_lr, BETAS, weight_decay=0.0, fused=True)]  # fmt: skip


def loss_of(hyper: nn.Module, batch: Batch, args: argparse.Namespace) -> Tensor:
    """The loss: a sum over target tokens. Other terms add their mean, weighted, for each of these tokens.

    targets      the answer (in text: B and C) after the gists
    lm           ordinary language modelling of the same text, so that compressing is not all the model can do
    reconstruct  the examples again, after the gists
    distill      what the base, with the examples in full context, holds likely for the answer (Kullback-Leibler divergence)

    With --weight-by-context, a target counts by what the full context is worth for it.
    """
    logits, *others = hyper(batch).float().split([len(part.targets) for part in (batch, *batch.more)])
    teacher = hyper.in_full(batch).float() if args.distill or args.weight_by_context else None
    if args.weight_by_context:
        loss = (worth(hyper, batch, teacher) * F.cross_entropy(logits, batch.targets, reduction="none")).sum()
    else:
        loss = F.cross_entropy(logits, batch.targets, reduction="sum")
    if args.distill:
        loss = loss + args.distill * F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    for part, theirs in zip(batch.more, others):
        loss = loss + part.weight * len(batch.targets) * F.cross_entropy(theirs, part.targets)
    return loss


@torch.no_grad()
def worth(hyper: nn.Module, batch: Batch, teacher: Tensor) -> Tensor:
    """A weight for each target, 1 on average: by how much the full context lowers its loss ("token importance", arXiv 2412.17483). [N]"""
    alone = F.cross_entropy(hyper.model(batch.tokens, select=batch.select)[0].float(), batch.targets, reduction="none")
    gain = (alone - F.cross_entropy(teacher, batch.targets, reduction="none")).clamp(min=LEAST_WORTH)
    return gain / gain.mean()


def draw(batches: Callable, args: argparse.Namespace, step: int, rank: int, world: int, device: torch.device) -> list[Batch]:
    """The batches of a step; none after the last.

    Step n reads the rows with numbers n·S … n·S + S - 1, S = accumulate · batch size; each process
    takes every world-th of them. So the number of processes changes no loss.
    """
    starts = [(step * args.accumulate + i) * args.batch_size for i in range(args.accumulate)] if step < args.steps else []
    parts = [batches(args.seed, range(start + rank, start + args.batch_size, world)) for start in starts]
    return [part.to(device) for part in parts]


def log_line(args: argparse.Namespace, out: Path, step: int, loss: float, norm: float, read: float, seconds: float) -> dict:
    """What the log says of a step. InputError where it went wrong: nothing is saved of that."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        rows = f"rows {step * args.accumulate * args.batch_size} to {(step + 1) * args.accumulate * args.batch_size - 1}"
        raise InputError(f"{out}: loss or gradient of step {step + 1} ({rows} of the run) is not finite; the last good "
                         f"checkpoint is kept; another run with a smaller --lr may help")  # fmt: skip
    return {"step": step + 1, "loss": loss, "norm": norm, "tokens_per_second": round(read / seconds),
            "lr": schedule(step, args.steps) * args.lr, "seconds": round(seconds, 4)}  # fmt: skip


def train(
    hyper: nn.Module, batches: Callable, args: argparse.Namespace, out: Path, resume: bool, rank: int, world: int,
    measured: Callable[[int], dict] = lambda step: {},
) -> Counter[str]:  # fmt: skip
    """All steps from where the run stands; returns what didn't fit. Ctrl-C (or SIGTERM) ends it after a whole step, saved.

    The loss is the sum over target tokens divided by their number in the whole step, over all its
    batches and processes: a mean of means would give tokens of short batches more weight.
    """
    parameters, optimizers = list(trainable(hyper).values()), make_optimizers(hyper, args)
    device, sharded = parameters[0].device, isinstance(parameters[0], DTensor)
    first = load_state(out, hyper, optimizers, args.steps) if resume else 0
    left_out, interrupted = Counter(), []
    default = {kind: signal.signal(kind, lambda *_: interrupted.append(True)) for kind in (signal.SIGINT, signal.SIGTERM)}

    with open_log(out, first, rank) as log, tqdm(total=args.steps, initial=first, desc="training", disable=rank > 0) as bar:
        following = draw(batches, args, first, rank, world, device)
        for step in range(first, args.steps):
            began, batch = time.monotonic(), following
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = schedule(step, args.steps) * group["highest_lr"]
            numbers = [sum(len(part.targets) for part in batch), sum(part.read for part in batch), bool(interrupted)]
            totals = torch.tensor(numbers, dtype=torch.float32, device=device)
            add_up(totals)
            loss = torch.zeros((), device=device)
            for part in batch:
                share = loss_of(hyper, part, args) / totals[0]
                (share * world if sharded else share).backward()  # FSDP takes the mean of gradients; it is to be their sum
                loss += share.detach()
            add_up(loss, *(parameter.grad for parameter in parameters if not sharded))
            norm = whole(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            left_out += sum((part.left_out for part in batch), Counter())
            # The step is queued on the device: the next batch is made while it works, before a number is read.
            following = draw(batches, args, step + 1, rank, world, device)
            loss, norm, (_, read, stop) = loss.item(), norm.item(), totals.tolist()
            line = log_line(args, out, step, loss, norm, read, max(1e-6, time.monotonic() - began)) | measured(step + 1)
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix_str(f"loss {loss:.3f}, {line['tokens_per_second']:,} tokens/s", refresh=False)
            bar.update()
            stop = stop or (world == 1 and bool(interrupted))  # (other processes hear of it in the next step)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stop:
                save_state(out, hyper, optimizers, step + 1, rank)
            if stop:
                raise KeyboardInterrupt
    for kind, handler in default.items():
        signal.signal(kind, handler)
    return left_out


# -------------------------------------------------------------------------------- the log and the state


def open_log(out: Path, first: int, rank: int):
    """The log, to append to; without the steps that a killed run logged but didn't save, and without a torn line."""
    path = out / "log.jsonl"
    if rank == 0 and path.exists():
        partial = out / "log.jsonl.partial"
        with reading(path, "not the log of a run"):
            partial.write_text("".join(json.dumps(line) + "\n" for line in read_lines(path) if 0 < line["step"] <= first))
        os.replace(partial, path)
    return open(path if rank == 0 else os.devnull, "a")


def moments(optimizers: list[torch.optim.Optimizer]) -> dict[Tensor, tuple[torch.optim.Optimizer, tuple[str, ...]]]:
    """For each parameter its optimizer, and the names of what that keeps of its gradients."""
    names = {"AdamW": ("exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
    return {p: (o, names[type(o).__name__]) for o in optimizers for group in o.param_groups for p in group["params"]}


def save_state(out: Path, hyper: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, rank: int) -> None:
    """All that the next step needs besides `args`: parameters, the optimizers' moments, and the step itself.

    Whole tensors, whatever the number of processes: another number can go on.
    """
    tensors, kept = {}, moments(optimizers)
    for name, parameter in trainable(hyper).items():
        optimizer, names = kept[parameter]
        parts = {name: parameter} | {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in names}
        for key, part in parts.items():
            part = whole(part.detach())
            if not part.isfinite().all():
                raise InputError(f"{out}: {key} isn't finite after step {step}; the last good checkpoint is kept")
            if rank == 0:
                tensors[key] = part.cpu()
    if rank == 0:
        save_tensors(out / "state.safetensors", tensors, {"step": str(step)} | origin(hyper))
        remove_replaced(out)


def load_state(out: Path, hyper: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> int:
    """The step to go on with; 0 where nothing was saved yet."""
    path = out / "state.safetensors"
    if not path.exists():
        return 0
    tensors, about = load_tensors(path)
    parameters, kept = trainable(hyper), moments(optimizers)
    number = about.get("step", "")
    step = int(number) if number.isdecimal() and len(number) < 10 else -1
    if not 0 < step <= steps:
        raise InputError(f"{path}: step {number[:20]} is not one of the run's {steps}")
    check_origin(path, about, hyper)
    for name, parameter in parameters.items():
        optimizer, names = kept[parameter]
        for key in (name, *(f"{moment}.{name}" for moment in names)):  # the kernels that use them don't look at shapes
            part = tensors.get(key)
            if part is None or part.shape != parameter.shape or part.dtype != torch.float32 or not part.isfinite().all():
                raise InputError(f"{path}: {key} isn't {list(parameter.shape)} finite float32 numbers")
        own = {moment: like(tensors[f"{moment}.{name}"], parameter) for moment in names}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **own}
    assign(parameters, {name: like(tensors[name], parameters[name]) for name in parameters}, path)
    return step


# ---------------------------------------------------------------------------------------- the command


def train_and_save(run: Run, hyper: nn.Module, batches: Callable, out: Path, resume: bool, rank: int, world: int, **more) -> Counter[str]:
    """Train to the end, and leave behind what was trained."""
    left_out = train(hyper, batches, run.args, out, resume, rank, world, **more)
    tensors = {name: whole(tensor.detach()) for name, tensor in trained(hyper).items()}
    if rank == 0:
        run.task.save(hyper, tensors, run.args, out)
    return left_out


def held_out_of_p3(args: argparse.Namespace, hyper: nn.Module) -> tuple[Run, HeldOut]:
    """Hyperpretraining is watched on held-out tasks: P3's, answered by the model as it is, after gists of 16 examples."""
    if dist.is_initialized():
        raise InputError("--measure of --task hyperpretrain needs a single process")
    own = {name: getattr(args, name) for name in ("model", "gists", "seed", "limit", "eval_tokens")}
    probe = settle(own | {"task": "p3", "steps": 0, "sets": 1} | ({"data": args.held_out} if args.held_out else {}))
    run = Run(probe, hyper, Formatter(Tokenizer(args.model), probe.context, probe.query_length))
    return run, prepare(run, run.task.load(probe, run.formatter, "test"))


def main() -> None:
    failed = True
    try:
        run_training()
        failed = False
    finally:
        close_folders(failed)


def run_training() -> None:
    args, out, resume, overwrite = parse()
    rank, world = start_processes()
    if args.batch_size < world:
        raise InputError(f"--batch-size {args.batch_size}: {world} processes need a row each")
    if rank == 0:
        check_folder(out, args, resume, overwrite)
    run = open_run(args)
    hyper, task = run.hyper, run.task
    batches = task.batches(args, hyper, run.formatter)
    held_out = None if hasattr(task, "evaluate") else prepare(run, task.load(args, run.formatter, "test"))
    batches(args.seed, range(args.batch_size))  # what can't be drawn is found before anything is replaced
    if rank == 0:
        open_folder(out, args, resume, overwrite)
        count = sum(p.numel() for p in trainable(hyper).values())
        print(f"{out}: {batches}, {f'{len(held_out.tasks)} held out, ' if held_out else ''}{count:,} trained parameters")
    hyper.model.checkpoint_activations = args.checkpoint_activations
    if world > 1:
        dist.barrier()
        if hasattr(task, "shard"):
            task.shard(hyper)
    if hasattr(task, "start"):
        task.start(run, held_out.tasks, out, lambda *some: train_and_save(run, *some, resume, rank, world))

    measuring = (run, held_out) if held_out else held_out_of_p3(args, hyper) if args.measure else None

    def measured(step: int) -> dict:
        often = max(1, args.steps // args.measure) if args.measure else args.steps + 1
        return measure(*measuring) if args.measure and (step % often == 0 or step in (1, args.steps)) else {}

    before = main_score(run, held_out) if held_out and args.measure else None
    left_out = train_and_save(run, hyper, batches, out, resume, rank, world, measured=measured)
    if held_out is None and rank == 0:  # evaluate the checkpoint as it was saved, in bfloat16
        run.hyper = task.restore(args, out)
    results = final_results(run, held_out, before, out) if held_out or rank == 0 else {}
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return
    left_out += held_out.left_out if held_out else Counter()
    if report(left_out):
        print(report(left_out))
    if args.measure:
        plot([out], out / "curve.png")
    if held_out:
        show_answers(run, held_out)
        texts = {"without examples": "zeroshot", "all examples in context": "fewshot"}
        aside = [f"{text} {results['baselines'][name]:.1f}" for text, name in texts.items()]
        first = f"before {before:.1f} → " if args.measure else ""
        print(" | ".join([f"{first}after {results['average']:.1f}", *aside]))


if __name__ == "__main__":
    run_command(main)
    if "RANK" in os.environ:  # gloo's threads sometimes abort the interpreter's own way out
        sys.stdout.flush()
        os._exit(0)
