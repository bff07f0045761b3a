"""Training: the command line, the loss, the loop, checkpoint and resume.

    python train.py --task p3                                          the miniature, on two CPU cores
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
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

from data import P3Task, PrefixBatches, TaskBatches, TextBatches
from eval import (
    BASELINES,
    Parser,
    System,
    add_options,
    average,
    build,
    checksum,
    complete,
    conditions,
    evaluate,
    evaluate_text,
    load_tasks,
    load_trained,
    other_task,
    positive,
    prepare,
    read_args,
    run_command,
    score,
    usual_options,
    write_json,
)
from gist import Gists, SoftPrefix
from llama import Config, InputError, positions_of, ragged, read_config
from lora import assign, load_tensors, save_tensors

# The paper's table of hyperparameters isn't public. These are our choice: for large models, and for
# the miniature, which wants larger steps and fewer of them.
DEFAULTS = {
    "large": {"steps": 10_000, "batch_size": 4, "lr": 2e-4, "gist_lr": 2e-4, "sets": 1},
    "tiny": {"steps": 300, "batch_size": 8, "lr": 1e-3, "gist_lr": 3e-2, "sets": 5},
}
DEFAULTS_OF_TASK = {
    ("large", "hyperpretrain"): {"steps": 50_000, "batch_size": 32, "lr": 2e-5, "gist_lr": 2e-5},
    ("tiny", "hyperpretrain"): {"batch_size": 24, "lr": 3e-3, "gist_lr": 3e-3, "context": 145, "query_length": 65},
    ("large", "symbol"): {"sets": 10},
    ("tiny", "symbol"): {"sets": 10, "limit": 20},
    ("tiny", "sni"): {"sets": 1},
    ("large", "prefix"): {"steps": 3000, "lr": 3e-3},
    ("tiny", "prefix"): {"lr": 3e-2},
}
MLP_LR = 0.1  # an MLP that makes a prefix learns at this share of the rate of a flat prefix
INITS = ("hyper", "shared", "random", "reparam", "text", "propagate")
TINY_WIDTH = 512  # models narrower than this get the miniature's defaults
BETAS, WARM_UP, MAX_NORM = (0.9, 0.99), 0.1, 1.0  # Adam; share of the steps; of the gradient


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, Path, bool, bool]:
    """What defines a run; and the three options that don't: --out, --resume, --overwrite."""
    parser = Parser(__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--downstream", choices=["frozen", "lora", "shared"], default="frozen", help="the model that answers: frozen; "
        "with a LoRA set of its own (the paper's D); with the hypernetwork's set (Mu et al.'s gisting)")  # fmt: skip
    add("--init", choices=INITS, help="prefix: what a prefix starts from: gists of --run; a prefix tuned on the training "
        "tasks; random numbers; an MLP; the examples' first tokens; slots that pass through the layers")  # fmt: skip
    add("--run", metavar="DIR", help="a finished run to start from (--init hyper: its hypernetwork)")
    add("--rank", type=positive, default=8, help="LoRA rank")
    add("--alpha", type=float, default=16, help="LoRA scale")
    add("--steps", type=positive, help="optimizer steps")
    add("--batch-size", type=positive, help="rows of examples in a batch, over all processes; gists serve 4 queries a row")
    add("--accumulate", type=positive, default=1, help="batches in a step")
    add("--lr", type=float, help="highest learning rate of the LoRA sets (hyperpretrain: of the model)")
    add("--gist-lr", type=float, help="highest learning rate of the gist embeddings")
    add("--checkpoint-activations", action="store_true",
        help="compute each layer again for its gradient, rather than keep what it needs: less memory, same bits")  # fmt: skip
    add("--measure", type=int, metavar="N", help="score the held-out tasks about N times along the way (default: prefix 10, else never)")
    add("--save-every", type=positive, default=100, metavar="STEPS", help="steps between checkpoints")
    add("--out", metavar="DIR", help="run folder (default: runs/<task>-<method>…)")
    add("--resume", action="store_true", help="continue the run in --out, with its options")
    add("--overwrite", action="store_true", help="throw away what --out holds")
    parser.set_defaults(controls=True, context=None, query_length=None)
    args = parser.parse_args(argv)
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if args.resume and args.out:  # what isn't said again is as it was; what is said must agree (open_folder)
        parser.set_defaults(**read_args(Path(args.out)))
        args = parser.parse_args(argv)
    if args.task is None:
        parser.error("--task is required")

    complete(args)
    fill_in(args)
    check_options(args)
    out, resume, overwrite = (vars(args).pop(name) for name in ("out", "resume", "overwrite"))
    return args, Path(out or default_folder(args)), resume, overwrite


def fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on the size of the model and the task."""
    size = "tiny" if read_config(Path(args.model)).width < TINY_WIDTH else "large"
    defaults = {"context": 1024, "query_length": 384, "measure": 0} | DEFAULTS[size] | DEFAULTS_OF_TASK.get((size, args.task), {})
    if args.task == "prefix":
        defaults |= {"measure": 10, "init": "hyper"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_options(args: argparse.Namespace) -> None:
    """InputError for options that exclude each other."""
    if args.task == "prefix":
        if args.method != "hyper":
            raise InputError("--task prefix has no --method: --init says how a prefix starts")
        if (args.init == "hyper") != (args.run is not None):
            raise InputError("--init hyper needs --run DIR, a finished run of --task p3; no other --init takes one")
        if args.run:
            run = read_args(Path(args.run))
            if not (Path(args.run) / "adapters.safetensors").exists() or (run["task"], run["method"]) != ("p3", "hyper"):
                raise InputError(f"--run {args.run}: not a finished hypernetwork for P3")
            if run["gists"] != args.gists or Path(run["model"]).resolve() != Path(args.model).resolve():
                raise InputError(f"--run {args.run}: has {run['gists']} gists and the model {run['model']}, other than this run")
    elif args.init or args.run:
        raise InputError("--init and --run belong to --task prefix")
    if args.measure < 0 or args.measure and args.task == "hyperpretrain":
        raise InputError("--measure counts the times that held-out tasks are scored; --task hyperpretrain has none")
    if args.checkpoint_activations and args.init == "propagate":
        raise InputError("--checkpoint-activations doesn't go with --init propagate, which adds to layers from outside")
    if args.downstream != "frozen" and (args.method != "hyper" or args.task in ("hyperpretrain", "prefix")):
        raise InputError(f"--downstream {args.downstream} belongs to a hypernetwork with LoRA sets, not to this run")
    for name in ("lr", "gist_lr"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be above 0")


def default_folder(args: argparse.Namespace) -> str:
    name = {"hyperpretrain": "hyperpretrain", "prefix": f"prefix-{args.init}"}.get(args.task, f"{args.task}-{args.method}")
    name += f"-{args.downstream}" * (args.task not in ("hyperpretrain", "prefix") and args.method == "hyper")
    for option, usual in (usual_options(args.task) | {"gists": 16}).items():
        value = getattr(args, option)
        if option in ("model", "data"):
            name += f"-{Path(value).name}" * (Path(value).resolve() != Path(usual).resolve())
        else:
            name += f"-{value}-{option}" * (value != usual)
    name += "-instruction" * args.instruction_downstream + "-fused" * args.fuse_instruction + "-nf4" * args.quantize
    return f"runs/{name}-seed{args.seed}"


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then linear to zero. Share of --lr in step 0, 1, …"""
    warm_up = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


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


def shard(system: System) -> None:
    """FSDP2: each process holds a share of every parameter; a layer is put together while it is needed."""
    # Blocks return views (values with their heads in front); nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    kind = system.device.type
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if kind == "cuda" else MixedPrecisionPolicy()
    for layer in system.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(system.hyper, mesh=mesh, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards; all processes have to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, divided and placed as the parameter is."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else tensor


# ------------------------------------------------------------------------------------------- one step


def make_optimizer(system: System) -> torch.optim.Optimizer:
    """Adam. LoRA updates start at zero, gist embeddings at the size of words: they learn at rates of their own."""
    args, named = system.args, system.trainable()
    mlp = isinstance(system.hyper, SoftPrefix) and system.hyper.kind == "reparam"
    groups = [
        {"params": [p for name, p in named.items() if name != "gists"], "highest_lr": args.lr * (MLP_LR if mlp else 1)},
        {"params": [p for name, p in named.items() if name == "gists"], "highest_lr": args.gist_lr},
    ]
    return torch.optim.AdamW(groups, args.lr, BETAS, weight_decay=0.0, fused=True)


def train_step(system: System, optimizer: torch.optim.Optimizer, batches: list, stop: bool = False) -> tuple[Tensor, Tensor]:
    """One optimizer step. Returns [loss per target token, the gradient's norm, tokens read]; how many processes said `stop`.

    The loss is the sum over target tokens divided by their number in the whole step, over all its
    batches and processes: a mean of means would give tokens of short batches more weight. What is
    returned stays on the device: reading a number would mean waiting for it.
    """
    numbers = [sum(len(batch.targets) for batch in batches), sum(batch.read for batch in batches), stop]
    count, read, stops = totals = torch.tensor(numbers, dtype=torch.float32, device=system.device)
    add_up(totals)
    loss = torch.zeros((), device=system.device)
    parameters = list(system.trainable().values())
    sharded = isinstance(parameters[0], DTensor)
    for batch in batches:
        batch = batch.to(system.device)
        part = F.cross_entropy(system.hyper(batch).float(), batch.targets, reduction="sum") / count
        # FSDP takes the mean of the processes' gradients; here, too, it is to be their sum.
        (part * dist.get_world_size() if sharded else part).backward()
        loss += part.detach()
    add_up(loss, *(parameter.grad for parameter in parameters if not sharded))
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM))
    optimizer.step()
    optimizer.zero_grad()
    return torch.stack((loss, norm, read)), stops


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


MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


def save_state(out: Path, system: System, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    """All that the next step needs besides `args`: parameters, Adam's moments, and the step itself.

    Whole tensors, whatever the number of processes: another number can go on.
    """
    tensors = {}
    for name, parameter in system.trainable().items():
        parts = {name: parameter} | {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
        for key, part in parts.items():
            part = whole(part.detach())
            if rank == 0:
                tensors[key] = part.cpu()
    if rank == 0:
        save_tensors(out / "state.safetensors", tensors, {"step": str(step)})


def load_state(out: Path, system: System, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with; 0 where nothing was saved yet."""
    path = out / "state.safetensors"
    if not path.exists():
        return 0
    tensors, about = load_tensors(path)
    parameters = system.trainable()
    found = {name: like(tensors[name], parameters[name]) for name in parameters if name in tensors}
    assign(parameters, found, path)
    step = int(about["step"])
    for name, parameter in parameters.items():
        moments = {moment: like(tensors[f"{moment}.{name}"], parameter) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device), **moments}
    return step


def save_trained(out: Path, system: System, rank: int) -> None:
    """What was trained: LoRA sets and gists; or the whole model as a Hugging Face folder, in bfloat16, and its gists."""
    tensors = {name: whole(tensor.detach()) for name, tensor in system.trained().items()}
    if rank:
        return
    if system.args.task != "hyperpretrain":
        save_tensors(out / "adapters.safetensors", tensors, {"base": checksum(system.model)})
        return
    save_tensors(out / "gists.safetensors", {"gists": tensors.pop("gists")}, {})
    save_checkpoint(out, system.model.config, {name.removeprefix("model."): t for name, t in tensors.items()})
    shutil.copyfile(system.tokenizer.path, out / "tokenizer.model")


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


# ------------------------------------------------------------------------------------------- the loop


def train(
    system: System,
    batches: TaskBatches | TextBatches | PrefixBatches,
    out: Path,
    resume: bool,
    rank: int,
    world: int,
    measure: Callable[[int], dict] | None = None,
) -> None:
    """All steps from where the run stands. Ctrl-C ends it after a whole step, saved.

    measure(step) may add something to the log's line of a step.

    Step n reads the rows with numbers n·S … n·S + S - 1, S = accumulate · batch size; each process
    takes every world-th of them. So the number of processes changes no loss.
    """
    args = system.args
    optimizer = make_optimizer(system)
    first = load_state(out, system, optimizer) if resume else 0
    log_path = out / "log.jsonl"
    if rank == 0 and log_path.exists():  # a killed run may have logged steps that it didn't save
        partial_path = out / "log.jsonl.partial"
        partial_path.write_text("".join(log_path.read_text().splitlines(keepends=True)[:first]))
        os.replace(partial_path, log_path)
    interrupted = []
    default = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    bar = tqdm(total=args.steps, initial=first, desc="training", disable=rank > 0)

    def tell(step: int, numbers: Tensor, line: dict) -> None:
        """Log a step."""
        loss, norm, read = numbers.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            rows = f"rows {step * args.accumulate * args.batch_size} to {(step + 1) * args.accumulate * args.batch_size - 1}"
            raise InputError(f"{out}: loss or gradient of step {step + 1} ({rows} of the run) is not finite; the last good "
                             f"checkpoint is kept; another run with a smaller --lr may help")  # fmt: skip
        speed = read / line["seconds"]
        line = {"step": step + 1, "loss": loss, "norm": norm, "tokens_per_second": round(speed)} | line
        log.write(json.dumps(line) + "\n")
        log.flush()
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        bar.update()

    with bar, open(log_path if rank == 0 else os.devnull, "a") as log:
        untold = None  # the last step: its numbers are read when the next one is under way on the device
        for step in range(first, args.steps):
            began = time.time()
            share = schedule(step, args.steps)
            for group in optimizer.param_groups:
                group["lr"] = share * group["highest_lr"]
            starts = [(step * args.accumulate + i) * args.batch_size for i in range(args.accumulate)]
            some = [batches(args.seed, range(at + rank, at + args.batch_size, world)) for at in starts]
            numbers, stops = train_step(system, optimizer, some, bool(interrupted))
            if untold:
                tell(*untold)
            stop = stops.item() > 0 if world > 1 else bool(interrupted)  # known when the step began: no long wait
            line = {"lr": share * args.lr, "seconds": round(time.time() - began, 4)}
            untold = (step, numbers, line | (measure(step + 1) if measure else {}))
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stop:
                tell(*untold)  # nothing is saved of a step that went wrong
                save_state(out, system, optimizer, step + 1, rank)
                untold = None
            if stop:
                raise KeyboardInterrupt
    signal.signal(signal.SIGINT, default)


def measure_held_out(system: System, prepared: tuple, step: int) -> dict:
    """Scores on the held-out tasks along the way, with the first draw of examples: about --measure times in a run."""
    args, (tasks, episodes) = system.args, prepared
    if not args.measure or step % max(1, args.steps // args.measure) and step not in (1, args.steps):
        return {}
    sizes = [sum(len(episode.queries) for episode in some) for some in episodes[0]]
    averages, table = {}, conditions(system, args.controls)
    for name in (name for name in table if name not in BASELINES):  # the untouched model stays as it is
        others = [episodes[0][other_task(tasks, t)] for t in range(len(tasks))]
        found = [statistics.fmean(score(system, episodes[0][t], others[t], table[name], t)) for t in range(len(tasks))]
        averages[name] = round(average(tasks, [[value] for value in found], sizes, args.task), 2)
        if name == "main":
            each = {task.name: round(value, 2) for task, value in zip(tasks, found)}
    return {"score": averages.pop("main"), "controls": averages, "scores": each}


# ------------------------------------------------------------------------------------- prefix tuning


def start_prefixes(system: System, tasks: list[P3Task], out: Path, resume: bool, rank: int, world: int) -> None:
    """What the prefixes start from, by --init: "hyper" and "text" read examples, "shared" is tuned before."""
    args, device = system.args, system.device
    shots = [task.evaluation(args.seed, 0, args.shots, 1)[0] for task in tasks]
    if args.init == "hyper":
        made_by = build(argparse.Namespace(**read_args(Path(args.run)) | {"device": args.device, "dtype": args.dtype}))
        load_trained(made_by, Path(args.run))
        with torch.no_grad():
            rows = [made_by.formatter.context_row(episode, made_by.gist_ids)[0] for episode in shots]
            system.hyper.start_from(made_by.hyper.compress(ragged(rows, device=device)))
    elif args.init == "text":
        rows = [system.formatter.context_row(episode)[0][1 : args.gists + 1] for episode in shots]
        if min(map(len, rows)) < args.gists:
            raise InputError(f"--gists {args.gists}: the examples have fewer tokens")
        with torch.no_grad():
            tokens = torch.tensor(rows, device=device)
            _, past = system.model(tokens, keep=positions_of(tokens))
            system.hyper.start_from(Gists(past, torch.full((len(rows),), args.gists, device=device)))
    elif args.init == "shared":
        generator = torch.Generator().manual_seed(args.seed)
        shared = replace(system, hyper=SoftPrefix(system.model, 1, args.gists, "reparam", generator))
        folder = out / "shared"
        if not (folder / "adapters.safetensors").exists():
            folder.mkdir(exist_ok=True)
            batches = PrefixBatches(load_tasks(args, system.tokenizer, "train"), system.formatter, shared=True)
            train(shared, batches, folder, resume, rank, world)
            save_trained(folder, shared, rank)
        load_trained(shared, folder)
        with torch.no_grad():  # folded: from here on, keys and values themselves are trained
            system.hyper.start_from(shared.hyper.prefix()[torch.zeros(len(tasks), dtype=torch.long, device=device)])


def main() -> None:
    args, out, resume, overwrite = parse()
    rank, world = start_processes()
    if args.batch_size < world:
        raise InputError(f"--batch-size {args.batch_size}: {world} processes need a row each")
    if rank == 0:
        check_folder(out, args, resume, overwrite)
    system = build(args)
    prepared = None
    if args.task == "hyperpretrain":
        batches = TextBatches(args.data, system.formatter, system.gist_ids)
        about = f"{len(batches.paths)} files of text"
    elif args.task == "prefix":
        held_out = load_tasks(args, system.tokenizer, "test")
        batches = PrefixBatches(held_out, system.formatter)
        prepared = prepare(system, held_out)
        about = f"prefixes for {len(held_out)} tasks"
    else:
        tasks, held_out = (load_tasks(args, system.tokenizer, split) for split in ("train", "test"))
        instruct, fuse = args.instruction_downstream, args.fuse_instruction
        batches = TaskBatches(tasks, system.formatter, args.method, system.gist_ids, args.shots, instruct, fuse)
        prepared = prepare(system, held_out)
        about = f"{len(tasks)} training tasks, {len(held_out)} held out"
    if rank == 0:
        open_folder(out, args, resume)
        count = sum(p.numel() for p in system.trainable().values())
        print(f"{out}: {about}, {count:,} trained parameters")
    system.model.checkpoint_activations = args.checkpoint_activations
    if world > 1:
        dist.barrier()
        if args.task == "hyperpretrain":
            shard(system)
    if args.task == "prefix":
        start_prefixes(system, held_out, out, resume, rank, world)
    train(system, batches, out, resume, rank, world, prepared and partial(measure_held_out, system, prepared))
    save_trained(out, system, rank)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return
    if args.task == "hyperpretrain":  # what others will load: whole, and rounded
        system = build(argparse.Namespace(**vars(args) | {"model": str(out)}), trained=False)
        results = evaluate_text(system, batches)
        results["args"] = vars(args)
    else:
        results = evaluate(system, *prepared)
    write_json(out / "results.json", results)
    if system.formatter.report():
        print(system.formatter.report())


if __name__ == "__main__":
    run_command(main)
    if "RANK" in os.environ:  # gloo's threads sometimes abort the interpreter's own way out
        sys.stdout.flush()
        os._exit(0)
