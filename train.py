"""Training: the command line, the loss, the loop, checkpoint and resume.

    python train.py --task p3                                          the miniature, on two CPU cores
    python train.py --task p3 --model Llama-2-7b-hf --data P3 --quantize  the paper's

A run lives in one folder: args.json, log.jsonl, state.safetensors (to resume), adapters.safetensors
(what was trained: LoRA sets and gist embeddings), results.json. All but the log are replaced atomically.
"""

import argparse
import json
import math
import shutil
import signal
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import P3Batches, p3_tasks
from eval import Parser, System, add_options, build, evaluate, positive, prepare, read_args, run_command, write_json
from llama import InputError, read_config
from lora import assign, load_tensors, save_tensors

# The paper's table of hyperparameters isn't public. These are our choice: for large models, and for
# the miniature, which wants larger steps and fewer of them.
DEFAULTS = {
    "large": {"steps": 10_000, "batch_size": 4, "lr": 2e-4, "gist_lr": 2e-4, "sets": 1},
    "tiny": {"steps": 300, "batch_size": 8, "lr": 1e-3, "gist_lr": 3e-2, "sets": 5},
}
TINY_WIDTH = 512  # models narrower than this get the miniature's defaults
BETAS, WARM_UP, MAX_NORM = (0.9, 0.99), 0.1, 1.0  # Adam; share of the steps; of the gradient


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Path, bool, bool]:
    """What defines a run; and the three options that don't: --out, --resume, --overwrite."""
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--downstream", choices=["frozen", "lora", "shared"], default="frozen", help="the model that answers: frozen; "
        "with a LoRA set of its own (the paper's D); with the hypernetwork's set (Mu et al.'s gisting)")  # fmt: skip
    add("--rank", type=positive, default=8, help="LoRA rank")
    add("--alpha", type=float, default=16, help="LoRA scale")
    add("--steps", type=positive, help="optimizer steps")
    add("--batch-size", type=positive, help="rows of examples in a batch; gists serve 4 queries a row")
    add("--accumulate", type=positive, default=1, help="batches in a step")
    add("--lr", type=float, help="highest learning rate of the LoRA sets")
    add("--gist-lr", type=float, help="highest learning rate of the gist embeddings")
    add("--save-every", type=positive, default=100, metavar="STEPS", help="steps between checkpoints")
    add("--out", metavar="DIR", help="run folder (default: runs/<task>-<method>…)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="throw away what --out holds")
    parser.set_defaults(controls=True, sets=None)
    args = parser.parse_args(argv)
    if args.task is None:
        parser.error("--task is required")

    size = "tiny" if read_config(Path(args.model)).width < TINY_WIDTH else "large"
    for name, value in DEFAULTS[size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.method != "hyper" and args.downstream != "frozen":
        raise InputError(f"--downstream {args.downstream} belongs to --method hyper, not to {args.method}")
    for name in ("lr", "gist_lr"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")
    out, resume, overwrite = (vars(args).pop(name) for name in ("out", "resume", "overwrite"))
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    variant = f"-{args.downstream}" if args.method == "hyper" else ""
    default = f"runs/{args.task}-{args.method}{variant}{'-nf4' * args.quantize}-seed{args.seed}"
    return args, Path(out or default), resume, overwrite


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then linear to zero. Share of --lr in step 0, 1, …"""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def make_optimizer(system: System) -> torch.optim.Optimizer:
    """Adam. LoRA updates start at zero, gist embeddings at the size of words: they learn at rates of their own."""
    args, named = system.args, system.trainable()
    groups = [
        {"params": [p for name, p in named.items() if name != "gists"], "highest_lr": args.lr},
        {"params": [p for name, p in named.items() if name == "gists"], "highest_lr": args.gist_lr},
    ]
    return torch.optim.AdamW(groups, args.lr, BETAS, weight_decay=0.0)


def train_step(system: System, optimizer: torch.optim.Optimizer, batches: list) -> tuple[float, float]:
    """One optimizer step; returns loss per target token and the gradient's norm.

    The loss is the sum over target tokens divided by their number in the whole step: a mean over
    batches would give tokens of short batches more weight.
    """
    count = sum(len(batch.targets) for batch in batches)
    loss = torch.zeros((), device=system.device)
    for batch in batches:
        batch = batch.to(system.device)
        part = F.cross_entropy(system.hyper(batch).float(), batch.targets, reduction="sum") / count
        part.backward()
        loss += part.detach()
    norm = torch.nn.utils.clip_grad_norm_(system.trainable().values(), MAX_NORM)
    if not (loss.isfinite() and norm.isfinite()):
        optimizer.zero_grad()
        return math.nan, math.nan
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()


# -------------------------------------------------------------------------------- the folder of a run


def open_folder(out: Path, args: argparse.Namespace, resume: bool, overwrite: bool) -> None:
    """Make the run folder, or check that what is there may be continued or thrown away."""
    try:
        if resume:
            before = read_args(out)
            for name, value in vars(args).items():
                if before.get(name) != value:
                    raise InputError(f"{out}: --resume with {name} = {value}, but the run has {before.get(name)}")
        elif out.exists() and any(out.iterdir()):
            if not overwrite:
                state = "a finished run" if (out / "results.json").exists() else "an unfinished run or other files (--resume goes on with a run)"
                raise InputError(f"{out}: holds {state}; --overwrite replaces it, --out names another folder")
            if not (out / "args.json").exists():
                raise InputError(f"{out}: holds something that is not a run, so it is not overwritten")
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"{out}: can't be used as a run folder ({problem.strerror})") from None
    write_json(out / "args.json", vars(args))


def save_state(out: Path, system: System, optimizer: torch.optim.Optimizer, step: int) -> None:
    """All that the next step needs besides `args`: parameters, Adam's moments, and the step itself."""
    tensors = {}
    for name, parameter in system.trainable().items():
        tensors[name] = parameter
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    save_tensors(out / "state.safetensors", tensors, {"step": str(step)})


def load_state(out: Path, system: System, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with; 0 where nothing was saved yet. Cuts the log back to that step."""
    path = out / "state.safetensors"
    if not path.exists():
        (out / "log.jsonl").unlink(missing_ok=True)
        return 0
    tensors, about = load_tensors(path)
    parameters = system.trainable()
    assign(parameters, {name: tensors[name] for name in tensors if not name.startswith("exp_avg")}, path)
    step = int(about["step"])
    for name, parameter in parameters.items():
        moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)[:step]
    (out / "log.jsonl").write_text("".join(lines))
    return step


# ------------------------------------------------------------------------------------------- the loop


def train(system: System, batches: P3Batches, out: Path, resume: bool) -> None:
    """All steps from where the run stands. Ctrl-C ends it after a whole step, saved."""
    args = system.args
    optimizer = make_optimizer(system)
    first = load_state(out, system, optimizer) if resume else 0
    interrupted = []
    default = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    bar = tqdm(total=args.steps, initial=first, desc="training")
    with bar, open(out / "log.jsonl", "a") as log:
        for step in range(first, args.steps):
            began = time.time()
            share = schedule(step, args.steps)
            for group in optimizer.param_groups:
                group["lr"] = share * group["highest_lr"]
            some = [batches(args.seed, step * args.accumulate + i) for i in range(args.accumulate)]
            loss, norm = train_step(system, optimizer, some)
            if math.isnan(loss):
                raise InputError(f"{out}: loss or gradient of step {step + 1} is not finite; the last good "
                                 f"checkpoint is kept; another run with a smaller --lr may help")  # fmt: skip
            seconds = time.time() - began
            speed = sum(batch.read for batch in some) / seconds
            line = {"step": step + 1, "loss": loss, "norm": norm, "lr": share * args.lr}
            line |= {"tokens_per_second": round(speed), "seconds": round(seconds, 4)}
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps or interrupted:
                save_state(out, system, optimizer, step + 1)
            if interrupted:
                raise KeyboardInterrupt
    signal.signal(signal.SIGINT, default)


def main() -> None:
    args, out, resume, overwrite = parse()
    train_tasks, heldout_tasks = p3_tasks(args.data, "train"), p3_tasks(args.data, "test")
    system = build(args)
    batches = P3Batches(train_tasks, system.formatter, args.method, system.gist_ids, args.shots, args.batch_size)
    heldout = prepare(system, heldout_tasks)
    open_folder(out, args, resume, overwrite)
    count = sum(p.numel() for p in system.trainable().values())
    print(f"{out}: {len(train_tasks)} training tasks, {len(heldout_tasks)} held out, {count:,} trained parameters")
    train(system, batches, out, resume)
    save_tensors(out / "adapters.safetensors", system.trainable(), {"model": args.model, "method": args.method})
    write_json(out / "results.json", evaluate(system, *heldout))
    if system.formatter.report():
        print(system.formatter.report())


if __name__ == "__main__":
    run_command(main)
