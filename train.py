"""Training: one step, the loop, the folder of a run.

    python train.py --task p3                                             the miniature, on two CPU cores
    python train.py --task p3 --model Llama-2-7b-hf --data P3 --quantize  the paper's

A run lives in one folder: args.json, log.jsonl, state.safetensors (to resume), adapters.safetensors
(what was trained: LoRA sets and gist embeddings), results.json. All but the log are replaced atomically.
Compression hyperpretraining trains the whole model: its run folder can be used as --model.
With several processes (torchrun), LoRA runs are data-parallel, and hyperpretraining is sharded by FSDP2.
"""

import argparse
import json
import math
import os
import shutil
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

from data import Batch, report
from eval import Run, final_results, measure, open_run, prepare, run_command
from gist import trainable, trained
from llama import InputError
from lora import assign, load_tensors, save_tensors, write_json
from tasks import Parser, add_options, positive, read_args, settle
from tasks.prefix import INITS

BETAS, WARM_UP, MAX_NORM = (0.9, 0.99), 0.1, 1.0  # Adam; share of the steps; of the gradient

# ------------------------------------------------------------------------------------------- options


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Path, bool, bool]:
    """What defines a run; and the three options that don't: --out, --resume, --overwrite."""
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--downstream", choices=["frozen", "lora", "shared"], help="the model that answers: frozen; "
        "with a LoRA set of its own (the paper's D); with the hypernetwork's set (Mu et al.'s gisting)")  # fmt: skip
    add("--init", choices=INITS, help="prefix: what a prefix starts from: gists of --run; a prefix tuned on the training "
        "tasks; random numbers; an MLP; the examples' first tokens; slots that pass through the layers")  # fmt: skip
    add("--run", metavar="DIR", help="a finished run to start from (--init hyper: its hypernetwork)")
    add("--rank", type=positive, help="LoRA rank (8)")
    add("--alpha", type=float, help="LoRA scale (16)")
    add("--steps", type=positive, help="optimizer steps")
    add("--batch-size", type=positive, help="rows of examples in a batch, over all processes; gists serve 4 queries a row")
    add("--accumulate", type=positive, help="batches in a step (1)")
    add("--lr", type=float, help="highest learning rate of the LoRA sets (hyperpretrain: of the model)")
    add("--gist-lr", type=float, help="highest learning rate of the gist embeddings")
    add("--checkpoint-activations", action="store_true",
        help="compute each layer again for its gradient, rather than keep what it needs: less memory, same bits")  # fmt: skip
    add("--measure", type=int, metavar="N", help="score the held-out tasks about N times along the way (default: prefix 10, else never)")
    add("--save-every", type=positive, metavar="STEPS", help="steps between checkpoints (100)")
    add("--out", metavar="DIR", help="run folder (default: runs/<task>-<method>…)")
    add("--resume", action="store_true", help="continue the run in --out, with its options")
    add("--overwrite", action="store_true", help="throw away what --out holds")
    typed = vars(parser.parse_args(argv))
    out, resume, overwrite = (typed.pop(name, None) for name in ("out", "resume", "overwrite"))
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    args = settle(typed, read_args(Path(out)) if resume and out else None)  # what isn't said again is as it was
    if args.run:
        check_start(args)
    return args, Path(out or default_folder(args)), bool(resume), bool(overwrite)


def check_start(args: argparse.Namespace) -> None:
    """InputError where --run is not a finished hypernetwork that this run can start from."""
    folder = Path(args.run)
    before = read_args(folder)
    if not (folder / "adapters.safetensors").exists() or (before["task"], before["method"]) != ("p3", "hyper"):
        raise InputError(f"--run {folder}: not a finished hypernetwork for P3")
    if before["gists"] != args.gists or Path(before["model"]).resolve() != Path(args.model).resolve():
        raise InputError(f"--run {folder}: has {before['gists']} gists and the model {before['model']}, other than this run")


def default_folder(args: argparse.Namespace) -> str:
    """A name that tells what differs from the defaults."""
    kind = {"hyperpretrain": "", "prefix": f"-{args.init}"}.get(args.task, f"-{args.method}" + f"-{args.downstream}" * (args.method == "hyper"))
    name, usual = args.task + kind, settle({"task": args.task, "lr": args.lr})
    for option in ("model", "data"):
        value = getattr(args, option)
        name += f"-{Path(value).name}" * (Path(value).resolve() != Path(getattr(usual, option)).resolve())
    for option in ("shots", "gists"):
        name += f"-{getattr(args, option)}-{option}" * (getattr(args, option) != getattr(usual, option))
    name += "-instruction" * args.instruction_downstream + "-fused" * args.fuse_instruction + "-nf4" * args.quantize
    return f"runs/{name}-seed{args.seed}"


# ---------------------------------------------------------------------------------- several processes


def start_processes() -> tuple[int, int]:
    """This process's rank, and how many there are: torchrun says so in the environment."""
    if "RANK" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


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


def make_optimizer(hyper: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Adam. LoRA updates start at zero, gist embeddings at the size of words: they learn at rates of their own."""
    named = trainable(hyper)
    groups = [
        {"params": [p for name, p in named.items() if name != "gists"], "highest_lr": args.lr * getattr(hyper, "lr_share", 1)},
        {"params": [p for name, p in named.items() if name == "gists"], "highest_lr": args.gist_lr},
    ]
    return torch.optim.AdamW(groups, args.lr, BETAS, weight_decay=0.0, fused=True)


def loss_of(hyper: nn.Module, batch: Batch) -> Tensor:
    """The sum over target tokens."""
    return F.cross_entropy(hyper(batch).float(), batch.targets, reduction="sum")


def train(
    hyper: nn.Module, batches: Callable, args: argparse.Namespace, out: Path, resume: bool, rank: int, world: int,
    measured: Callable[[int], dict] = lambda step: {},
) -> Counter[str]:  # fmt: skip
    """All steps from where the run stands; returns what didn't fit. Ctrl-C ends it after a whole step, saved.

    Step n reads the rows with numbers n·S … n·S + S - 1, S = accumulate · batch size; each process
    takes every world-th of them. So the number of processes changes no loss.

    The loss is the sum over target tokens divided by their number in the whole step, over all its
    batches and processes: a mean of means would give tokens of short batches more weight.
    """
    parameters, optimizer = list(trainable(hyper).values()), make_optimizer(hyper, args)
    device, sharded = parameters[0].device, isinstance(parameters[0], DTensor)
    first = load_state(out, hyper, optimizer) if resume else 0
    left_out, interrupted = Counter(), []
    default = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))

    def draw(step: int) -> list[Batch]:
        starts = [(step * args.accumulate + i) * args.batch_size for i in range(args.accumulate)]
        parts = [batches(args.seed, range(start + rank, start + args.batch_size, world)) for start in starts]
        return [part.to(device) for part in parts]

    with open_log(out, first, rank) as log, tqdm(total=args.steps, initial=first, desc="training", disable=rank > 0) as bar:
        following = draw(first) if first < args.steps else []
        for step in range(first, args.steps):
            began, batch = time.time(), following
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, args.steps) * group["highest_lr"]
            numbers = [sum(len(part.targets) for part in batch), sum(part.read for part in batch), bool(interrupted)]
            totals = torch.tensor(numbers, dtype=torch.float32, device=device)
            add_up(totals)

            loss = torch.zeros((), device=device)
            for part in batch:
                share = loss_of(hyper, part) / totals[0]
                (share * world if sharded else share).backward()  # FSDP takes the mean of gradients; it is to be their sum
                loss += share.detach()
            add_up(loss, *(parameter.grad for parameter in parameters if not sharded))
            norm = whole(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM))
            optimizer.step()
            optimizer.zero_grad()

            for part in batch:
                left_out += part.left_out
            # The step is queued on the device: the next batch is made while it works, before a number is read.
            following = draw(step + 1) if step + 1 < args.steps else []
            loss, norm, (_, read, stop) = loss.item(), norm.item(), totals.tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                rows = f"rows {step * args.accumulate * args.batch_size} to {(step + 1) * args.accumulate * args.batch_size - 1}"
                raise InputError(f"{out}: loss or gradient of step {step + 1} ({rows} of the run) is not finite; the last good "
                                 f"checkpoint is kept; another run with a smaller --lr may help")  # fmt: skip
            seconds = time.time() - began
            line = {"step": step + 1, "loss": loss, "norm": norm, "tokens_per_second": round(read / seconds),
                    "lr": schedule(step, args.steps) * args.lr, "seconds": round(seconds, 4)} | measured(step + 1)  # fmt: skip
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix_str(f"loss {loss:.3f}, {read / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
            stop = stop or world == 1 and interrupted  # (other processes hear of it in the next step)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stop:
                save_state(out, hyper, optimizer, step + 1, rank)
            if stop:
                raise KeyboardInterrupt
    signal.signal(signal.SIGINT, default)
    return left_out


# -------------------------------------------------------------------------------- the folder of a run


def check_folder(out: Path, args: argparse.Namespace, resume: bool, overwrite: bool) -> None:
    """Whether a run may write here, and go on with or throw away what is there. Changes nothing."""
    if resume:
        before = read_args(out)
        for name, value in vars(args).items():
            if before.get(name) != value:
                raise InputError(f"{out}: --resume with {name} = {value}, but the run has {before.get(name)}")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{out}: can't be used as a run folder ({nearest} is {'not writable' if nearest.is_dir() else 'a file'})")
    if not resume and out.exists() and any(path.suffix != ".partial" for path in out.iterdir()):
        if not overwrite:
            unfinished = "an unfinished run or other files (--resume goes on with a run)"
            state = "a finished run" if (out / "results.json").exists() else unfinished
            raise InputError(f"{out}: holds {state}; --overwrite replaces it, --out names another folder")
        if not (out / "args.json").exists():
            raise InputError(f"{out}: holds something that is not a run, so it is not overwritten")


def open_folder(out: Path, args: argparse.Namespace, resume: bool) -> None:
    """Make the run folder; what check_folder let pass is thrown away, or gone on with."""
    if not resume and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "args.json", vars(args))


def open_log(out: Path, first: int, rank: int):
    """The log, to append to; without the steps that a killed run logged but didn't save."""
    path, partial = out / "log.jsonl", out / "log.jsonl.partial"
    if rank == 0 and path.exists():
        partial.write_text("".join(path.read_text().splitlines(keepends=True)[:first]))
        os.replace(partial, path)
    return open(path if rank == 0 else os.devnull, "a")


MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


def save_state(out: Path, hyper: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    """All that the next step needs besides `args`: parameters, Adam's moments, and the step itself.

    Whole tensors, whatever the number of processes: another number can go on.
    """
    tensors = {}
    for name, parameter in trainable(hyper).items():
        parts = {name: parameter} | {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
        for key, part in parts.items():
            part = whole(part.detach())
            if rank == 0:
                tensors[key] = part.cpu()
    if rank == 0:
        save_tensors(out / "state.safetensors", tensors, {"step": str(step)})


def load_state(out: Path, hyper: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with; 0 where nothing was saved yet."""
    path = out / "state.safetensors"
    if not path.exists():
        return 0
    tensors, about = load_tensors(path)
    parameters = trainable(hyper)
    assign(parameters, {name: like(tensors[name], parameters[name]) for name in parameters if name in tensors}, path)
    step = int(about["step"])
    for name, parameter in parameters.items():
        moments = {moment: like(tensors[f"{moment}.{name}"], parameter) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}
    return step


# ---------------------------------------------------------------------------------------- the command


def train_and_save(run: Run, hyper: nn.Module, batches: Callable, out: Path, resume: bool, rank: int, world: int, **more) -> Counter[str]:
    """Train to the end, and leave behind what was trained."""
    left_out = train(hyper, batches, run.args, out, resume, rank, world, **more)
    tensors = {name: whole(tensor.detach()) for name, tensor in trained(hyper).items()}
    if rank == 0:
        run.task.save(hyper, tensors, run.args, out)
    return left_out


def main() -> None:
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
    if rank == 0:
        open_folder(out, args, resume)
        count = sum(p.numel() for p in trainable(hyper).values())
        print(f"{out}: {batches}, {f'{len(held_out.tasks)} held out, ' if held_out else ''}{count:,} trained parameters")
    hyper.model.checkpoint_activations = args.checkpoint_activations
    if world > 1:
        dist.barrier()
        if hasattr(task, "shard"):
            task.shard(hyper)
    if hasattr(task, "start"):
        task.start(run, held_out.tasks, out, read_args, lambda *some: train_and_save(run, *some, resume, rank, world))

    def measured(step: int) -> dict:
        often = max(1, args.steps // args.measure) if args.measure else args.steps + 1
        return measure(run, held_out) if args.measure and (step % often == 0 or step in (1, args.steps)) else {}

    left_out = train_and_save(run, hyper, batches, out, resume, rank, world, measured=measured)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return
    if held_out is None:  # what others will load: whole, and rounded
        run.hyper = task.restore(args, out)
    write_json(out / "results.json", final_results(run, held_out))
    left_out += held_out.left_out if held_out else Counter()
    if report(left_out):
        print(report(left_out))


if __name__ == "__main__":
    run_command(main)
    if "RANK" in os.environ:  # gloo's threads sometimes abort the interpreter's own way out
        sys.stdout.flush()
        os._exit(0)
