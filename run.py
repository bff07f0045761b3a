"""What a run is: its options, its folder, its model; and how commands end.

Options come from three places, found by looking: this file, tasks/*.py and further/*.py (a name OPTIONS
in each). Their defaults depend on the task and on the size of the model. A run lives in one folder:

    args.json              its options
    log.jsonl              a line for each step
    state.safetensors      to go on from (train.py)
    adapters.safetensors   what was trained: LoRA sets and gist embeddings
    results.json           its evaluation (eval.py)

Every file is replaced atomically. Nothing is deleted but files with these names, in a folder that a run
made, with --overwrite.
"""

import argparse
import fcntl
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tasks
from data import Formatter
from gist import Compression, HyperLlama, averaging
from llama import InputError, Linear, Llama, Tokenizer, load, read_config, reading
from lora import NF4Linear, add_lora, assign, load_tensors, replacing

PROJECT = Path(__file__).resolve().parent
TINY_WIDTH = 512  # models narrower than this get the miniature's defaults

# ------------------------------------------------------------------------------------------- options


def option(default=None, help="", kind=None, choices=None, least=0, role="model"):
    """A field of Options, and so an option of the command line.

    role  "model"  changes what is trained: fixed for a run, and part of its default folder's name
          "place"  may lie elsewhere, or be held otherwise, later
          "course" how long the run trains and how it is watched
          "parts"  how many sets of examples make one prefix: may be others in evaluation
          "eval"   may differ in each evaluation
    """
    metadata = dict(help=help, kind=kind or type(default), choices=choices, least=least, role=role)
    return field(default=default, metadata=metadata)


# fmt: off
@dataclass
class Options:
    task: str = option(kind=str, help="a file of tasks/: p3, sni, symbol, hyperpretrain, prefix, …")
    model: str = option(kind=Path, role="place", help="checkpoint of Hugging Face or Meta (the miniature's)")
    data: str = option(kind=Path, role="place", help="the task's data (the miniature's)")
    dtype: str = option(kind=str, choices=("float32", "bfloat16"), role="place", help="bfloat16 on a GPU")
    device: str = option(kind=str, role="place", help="cuda where there is one, else cpu")
    # what is trained
    method: str = option("hyper", choices=("hyper", "fewshot", "zeroshot"),
        help="HyperLlama; a language model with the examples in context; the same without examples")
    downstream: str = option("frozen", choices=("frozen", "lora", "shared"),
        help="the model that answers: frozen; with its own LoRA set (D); with the hypernetwork's (Mu et al.)")
    instruction_downstream: bool = option(False, help="the instruction also in the query (the paper's I)")
    gists: int = option(16, least=1, help="gist tokens")
    shots: int = option(kind=int, least=1, help="examples: 16 of p3, 2 of sni, 4 per class of symbol")
    context: int = option(1024, least=1, help="most tokens of examples and gists")
    query_length: int = option(384, least=1, help="most tokens of a query with its target")
    end: str = option("eos", choices=("eos", "layout"), help="of a target: EOS, or what follows an example")
    quantize: bool = option(False, help="hold the base in NF4")
    rank: int = option(8, least=1, help="LoRA rank")
    alpha: float = option(16.0, least=1e-9, help="LoRA scale")
    # how
    seed: int = option(0)
    steps: int = option(kind=int, least=1, role="course", help="optimizer steps")
    batch_size: int = option(kind=int, least=1, help="rows of examples a batch, over all processes")
    accumulate: int = option(1, least=1, help="batches in a step")
    lr: float = option(kind=float, least=1e-30, help="highest learning rate (LoRA sets, or all weights)")
    gist_lr: float = option(kind=float, least=1e-30, help="highest learning rate of the gist embeddings")
    optimizer: str = option("adamw", choices=("adamw", "muon"),
        help="AdamW, or Muon for the layers' matrices (the rest: AdamW at --gist-lr)")
    checkpoint_activations: bool = option(False, role="course", help="recompute in backward: less memory")
    measure: int = option(0, role="course", help="score held-out tasks N times along the way")
    save_every: int = option(100, least=1, role="course", help="steps between checkpoints")
    # how it is evaluated
    controls: bool = option(True, role="eval", help="also no prefix, another task's, …")
    sets: int = option(kind=int, least=1, role="eval", help="draws of examples, for mean and spread")
    limit: int = option(0, role="eval", help="rows of a held-out task to score (0: all)")
    score: str = option("sum", choices=("sum", "mean"), role="eval", help="of a choice's token log-probs")
    eval_tokens: int = option(8192, least=1, role="eval", help="tokens in memory at a time when evaluating")
    average: int = option(kind=int, least=1, role="parts", help="average the gists of N sets of examples")
# fmt: on


def plugins(folder: str) -> dict[str, SimpleNamespace]:
    """What the files of tasks/ or of further/ define, by name of the file.

    A chapter of further/ enters in four places: `all_options` and `check_args` read its OPTIONS and ask its
    check, `compression_of` its way to make a prefix, train.loss_terms its terms of the loss.
    """
    names = sorted(path.stem for path in (PROJECT / folder).glob("[a-z]*.py"))
    if folder == "tasks":
        return {name: tasks.find(name) for name in names if name not in tasks.NOT_TASKS}
    return {name: SimpleNamespace(**CHAPTER | vars(import_module(f"further.{name}"))) for name in names}


CHAPTER = {  # what a file of further/ leaves out
    "OPTIONS": {},
    "check": lambda args: None,
    "compression": lambda args: None,
    "terms": lambda run, terms: terms,
}


@cache
def all_options() -> type[Options]:
    """Options, with those of the tasks and of further/."""
    more = {}
    for module in [*plugins("tasks").values(), *plugins("further").values()]:
        more |= module.OPTIONS
    return make_dataclass(
        "AllOptions", [(name, f.metadata["kind"], f) for name, f in more.items()], bases=(Options,)
    )


def names_of(*roles: str) -> set[str]:
    return {f.name for f in fields(all_options()) if f.metadata["role"] in roles}


class Parser(argparse.ArgumentParser):
    """Keeps only what was typed. Its errors are one line, like all others."""

    def __init__(self, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, argument_default=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def a_path(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return str(Path(text).resolve())


def number(kind: type, least: float = 0) -> Callable[[str], float]:
    """A parser of finite numbers from `least` on."""

    def parse(text: str) -> float:
        value = kind(text)
        if value == math.inf or (kind is int and value >= 10**9):
            raise argparse.ArgumentTypeError(f"{text!r} is too large")
        if not least <= value:
            what = "a positive whole number" if (kind, least) == (int, 1) else f"a number from {least} on"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    # argparse says: invalid whole number value: 'x'
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def add_options(parser: Parser | argparse._ArgumentGroup, *roles: str) -> None:
    """The options with these roles; all, where none is named."""
    for f in fields(all_options()):
        kind, choices, least, role = (f.metadata[key] for key in ("kind", "choices", "least", "role"))
        if roles and role not in roles:
            continue
        types = {Path: a_path, int: number(int, least), float: number(float, least)}
        choices = list(plugins("tasks")) if f.name == "task" else choices
        how = {"type": types.get(kind, kind), "choices": choices}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        text = f.metadata["help"] + (f" ({f.default:g})" if kind in (int, float) and f.default else "")
        parser.add_argument(flag(f.name), help=text, **how)


def resolve_args(typed: dict, run: dict | None = None, check: bool = True) -> Options:
    """The task's defaults for this size of model, then the run's own options, then what was typed."""
    own = (run or {}) | typed
    if "task" not in own:
        raise InputError("--task is required")
    task = tasks.find(own["task"])
    folders = {"model": str(PROJECT / "tiny" / task.MODEL), "data": str(PROJECT / "tiny" / task.FOLDER)}
    for name in folders:
        if name in own and not Path(own[name]).is_dir():
            problem = "not a folder" if Path(own[name]).exists() else "no such folder"
            moved = "" if name in typed else f", which this run was made with; --{name} says where it is now"
            raise InputError(f"--{name} {own[name]}: {problem}{moved}")
    width = read_config(Path((folders | own)["model"])).width
    defaults = task.DEFAULTS["tiny" if width < TINY_WIDTH else "large"]
    args = all_options()(**defaults | folders | own)  # the later wins
    if check:
        check_args(args, typed)
    return args


def check_args(args: Options, typed: dict) -> None:
    """InputError for options that exclude each other; a note for those that change nothing."""
    task = tasks.find(args.task)
    defaults = {f.name: f.default for f in fields(args)}
    for name in task.WITHOUT:
        if typed.get(name, defaults[name]) != defaults[name]:
            raise InputError(f"{flag(name)} has no meaning for --task {args.task}")
    for name, owner in plugins("tasks").items():
        for other, f in owner.OPTIONS.items():
            if other not in task.OPTIONS and getattr(args, other) != f.default:
                raise InputError(f"{flag(other)} belongs to --task {name}")
    if args.downstream != "frozen" and args.method != "hyper":
        raise InputError(f"--downstream {args.downstream} belongs to --method hyper")
    task.check(args)
    compression_of(args)
    for chapter in plugins("further").values():
        if any(getattr(args, name) != f.default for name, f in chapter.OPTIONS.items()):
            chapter.check(args)
    if args.method != "hyper":
        for name in sorted(typed.keys() & {"gists", "gist_lr", "controls"}):
            print(f"note: {flag(name)} changes nothing with --method {args.method}", file=sys.stderr)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def compression_of(args: Options) -> Compression:
    """How examples become a prefix: the paper's way, or that of the one chapter that the options name."""
    ways = {"--average": averaging(args.average)} if args.average else {}
    for chapter in plugins("further").values():
        way = chapter.compression(args)
        if way:
            typed = [flag(name) for name, f in chapter.OPTIONS.items() if getattr(args, name) != f.default]
            ways[" and ".join(typed)] = way
    if not ways:
        return Compression()
    task = tasks.find(args.task)
    (name, way), *others = ways.items()
    if args.method != "hyper" or not task.WAYS:
        raise InputError(f"{name} belongs to a hypernetwork that is trained on tasks")
    if others:
        raise InputError(f"{', '.join(ways)} exclude each other: each is a way to make one prefix")
    if way.parts > 1 and task.ONE_SET:
        raise InputError(f"{name}: --task {args.task} has one set of examples")
    return way


def default_folder(args: Options) -> str:
    """A name that says every option that changes what is trained and differs from its default."""
    task = tasks.find(args.task)
    usual = resolve_args({"task": args.task}, check=False)
    name = args.task
    shown = {"task", "seed", "method", "downstream", "init"}
    if "init" in task.OPTIONS:
        name += f"-{args.init}"
    elif task.METRIC != "loss":
        name += f"-{args.method}" + f"-{args.downstream}" * (args.method == "hyper")
    for f in fields(args):
        value = getattr(args, f.name)
        if f.name in shown or value == getattr(usual, f.name):
            continue
        if f.name in ("model", "data"):
            name += f"-{Path(value).name}"
        elif f.metadata["role"] in ("model", "parts") or f.name == "dtype":
            name += f"-{f.name.replace('_', '-')}"
            if f.metadata["kind"] is not bool:
                name += f"-{Path(value).name if f.metadata['kind'] is Path else value}"
    return f"runs/{name}-seed{args.seed}"


def portable(args: Options) -> dict:
    """As written to disk: folders of this project by their place in it, which may be another one later."""
    values = {f.name: getattr(args, f.name) for f in fields(args)}
    for f in fields(args):
        path = values[f.name]
        if f.metadata["kind"] is Path and path and Path(path).is_relative_to(PROJECT):
            values[f.name] = str(Path(path).relative_to(PROJECT))
    return values


def read_args(folder: Path) -> dict:
    """The options of a run."""
    path = folder / "args.json"
    if not path.exists():
        what = "not the folder of a run (no args.json)" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}")
    with reading(path, "not what a run writes"):
        written = json.loads(path.read_text())
        unknown = sorted(written.keys() - {f.name for f in fields(all_options())})
        if unknown:
            raise ValueError(f"{unknown[0]} is no option; a file of tasks/ or further/ may be gone")
        args = all_options()(**written)
        for f in fields(args):
            value = getattr(args, f.name)
            kinds = {float: (float, int), Path: (str,)}.get(f.metadata["kind"], (f.metadata["kind"],))
            # (None where that is the default. True is no int.)
            if type(value) not in (*kinds, type(f.default)):
                raise ValueError(f"{f.name} = {value!r}")
            if f.metadata["kind"] is Path and value:
                setattr(args, f.name, str(PROJECT / value))
        tasks.find(args.task)
        if args.model is None or args.data is None:
            raise ValueError("model or data = null")
    return {f.name: getattr(args, f.name) for f in fields(args)}


# ---------------------------------------------------------------------------------------- the folder

MARK = ".hyperllama"  # in folders that a run made
FILES = {
    MARK, "args.json", "log.jsonl", "state.safetensors", "adapters.safetensors", "results.json",
    "scores-*.jsonl", "curve.png", "probe.png", "model.safetensors", "gists.safetensors", "config.json",
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def ours(path: Path) -> bool:
    """Whether a run wrote this, and all that is in it."""
    if path.is_dir() and not path.is_symlink():  # of further results of the same run
        folders = {"shared", "data-*", *(f"{name}-*" for name in names_of("parts"))}
        return any(map(path.match, folders)) and all(map(ours, path.iterdir()))
    return any(path.match(name) or path.match(f"{name}.partial") for name in FILES)


def check_out(out: Path, args: Options | None = None) -> None:
    """InputError where a folder can't be written, or lies in, around or at what a run reads."""
    place = Path(os.path.realpath(out))
    for f in fields(args) if args else ():
        other = getattr(args, f.name) if f.metadata["kind"] is Path else None
        if other and (place.is_relative_to(other) or Path(other).is_relative_to(place)):
            raise InputError(f"--out {out}: lies in, around or at {flag(f.name)} {other}")
    nearest = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        problem = "not writable" if nearest.is_dir() else "a file" if nearest.is_file() else "not a folder"
        raise InputError(f"--out {out}: can't be used as a folder ({nearest} is {problem})")


def check_folder(out: Path, args: Options, resume: bool, overwrite: bool) -> None:
    """InputError where a run may not write: what it would replace isn't its own. Changes nothing."""
    check_out(out, args)
    if resume:
        before = read_args(out)
        for name, value in vars(args).items():
            if before[name] != value:
                raise InputError(f"{out}: --resume with {name} = {value}, but the run has {before[name]}")
        if not (out / "state.safetensors").exists():
            again = "" if (out / "results.json").exists() else "; --overwrite starts it again"
            raise InputError(f"{out}: nothing to resume from (no state.safetensors){again}")
    elif out.exists() and any(out.iterdir()):
        if not (out / MARK).exists() or not all(map(ours, out.iterdir())):
            raise InputError(
                f"{out}: holds something that no run wrote, so it isn't used; --out names another folder"
            )
        if not overwrite:
            finished = (out / "results.json").exists()
            state = "a finished run" if finished else "an unfinished run (--resume goes on with it)"
            raise InputError(f"{out}: holds {state}; --overwrite replaces it, --out names another folder")


def lock(out: Path, only_read: bool = False) -> None:
    """Make a folder and keep others from writing into it, as long as this process lives.

    only_read: others may read it, too.
    """
    if not out.exists() or not any(out.iterdir()):
        MADE.add(out)
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, (fcntl.LOCK_SH if only_read else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(folder)
        raise InputError(f"{out}: another command is writing here") from None
    LOCKS[out] = folder


LOCKS: dict[Path, int] = {}  # folders of this process, held open
MADE: set[Path] = set()  # those of them that were empty, or emptied by this process


def start_folder(out: Path, args: Options, resume: bool, overwrite: bool) -> None:
    """Take the folder for a run. With --overwrite, the files of the run that was there are deleted."""
    check_folder(out, args, resume, overwrite)
    lock(out)
    check_folder(out, args, resume, overwrite)  # again: another run may have ended here in the meantime
    if not resume:
        clear(out)
        MADE.add(out)
    (out / MARK).touch()
    for name in FILES:
        (out / f"{name}.partial").unlink(missing_ok=True)  # of a save that was killed
    write_json(out / "args.json", portable(args))


def clear(out: Path) -> None:
    """Delete the known files of a folder that a run made, also in its known folders."""
    for path in out.iterdir() if (out / MARK).exists() else ():
        if ours(path) and path.is_dir() and not path.is_symlink():
            (path / MARK).touch()
            clear(path)
            path.rmdir()
        elif ours(path) and path.name != MARK:
            path.unlink()
    (out / MARK).unlink(missing_ok=True)


def release_folders() -> None:
    """Let go of this process's folders. Of a command that ended with nothing to keep, nothing stays."""
    while LOCKS:
        out, folder = LOCKS.popitem()
        files = [path for path in out.rglob("*") if path.is_file() and path.name not in (MARK, "args.json")]
        if out in MADE and not any(path.stat().st_size for path in files):
            clear(out)
            with suppress(OSError):  # an empty folder goes, too
                out.rmdir()
        os.close(folder)
    MADE.clear()


def write_json(path: Path, value: dict) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n")


def read_lines(path: Path) -> Iterator:
    """The values in a file of JSON lines; not those that a killed process left torn."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            yield json.loads(line)


# ----------------------------------------------------------------------------------------- the model

ROOM_FOR_EXAMPLES = 32  # least tokens of a row that gists must leave to examples
MAX_NEW_TOKENS = 128  # of a generated answer
DOWNSTREAM = {"frozen": None, "lora": "downstream", "shared": "hyper"}  # --downstream -> LoRA set


@dataclass
class Run:
    """A model and how it is used."""

    args: Options
    hyper: HyperLlama
    formatter: Formatter

    @property
    def task(self):
        return tasks.find(self.args.task)

    @property
    def device(self) -> torch.device:
        return self.hyper.model.embed_tokens.weight.device

    @property
    def instruct(self) -> str:
        """Where the instruction stands in a query after gists (Formatter.query): the paper's I or not."""
        return "inside" if self.args.instruction_downstream else "no"

    @cached_property
    def base_folder(self) -> str | None:
        """Where the model came from, if hyperpretraining made it and that model is still there."""
        folder = Path(self.args.model)
        if not (folder / "args.json").exists() or not (folder / "gists.safetensors").exists():
            return None
        before = read_args(folder)["model"]
        return before if Path(before).is_dir() else None

    @cached_property
    def base(self) -> "Run":
        """The same with the model before hyperpretraining, untouched. Loaded when it is first needed."""
        model = load_base(replace(self.args, model=self.base_folder))
        hyper = HyperLlama(model, self.hyper.gists, None, compression=self.hyper.compression)
        return replace(self, hyper=hyper.requires_grad_(False))


def open_run(args: Options, folder: Path | None = None) -> Run:
    """The model that the options describe, as at the start of a run; or as a finished one left it."""
    task = tasks.find(args.task)
    tokenizer = Tokenizer(args.model)
    config = read_config(Path(args.model))
    answer = MAX_NEW_TOKENS * (task.METRIC == "rougeL")
    most = config.max_positions
    if args.context + args.query_length + answer > most:
        parts = (
            f"--context {args.context} + --query-length {args.query_length}{' + an answer' * bool(answer)}"
        )
        raise InputError(f"{parts} exceed the {most} positions of {args.model}")
    prefixes = 1 if args.average else compression_of(args).parts  # that stand side by side
    if args.gists * prefixes + args.query_length + answer > most:
        raise InputError(f"so many gists and a query exceed the {most} positions of {args.model}")
    if args.method == "fewshot" and args.context <= args.query_length:
        raise InputError(f"--context {args.context} must be longer than --query-length {args.query_length}")
    if args.context < args.gists + ROOM_FOR_EXAMPLES:
        raise InputError(f"--gists {args.gists} leave no room for examples in --context {args.context}")
    if tokenizer.size > config.vocab:
        raise InputError(
            f"{args.model}: the tokenizer has {tokenizer.size} pieces, the model only {config.vocab}"
        )
    formatter = Formatter(tokenizer, args.context, args.query_length, args.end)
    if folder is None:
        return Run(args, task.build(args), formatter)
    return Run(args, task.restore(args, folder), formatter)


def load_base(args: Options, full_finetune: bool = False) -> Llama:
    """The base. Where all its weights are trained, in float32: bf16 loses small updates."""
    if full_finetune and args.dtype == "bfloat16":
        raise InputError("--dtype bfloat16: all parameters are trained, so they are held in float32")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    with reading(f"--device {device}", "not available here"):
        torch.zeros(1, device=device).item()
    half = device.startswith("cuda") and not full_finetune
    dtype = getattr(torch, args.dtype or ("bfloat16" if half else "float32"))
    model = load(args.model, device, dtype, NF4Linear if args.quantize else Linear)
    model.checkpoint_activations = args.checkpoint_activations
    return model


def build(args: Options, full_finetune: bool = False) -> HyperLlama:
    """The model and its LoRA sets, as at the start of a run; untouched where no step is taken.

    full_finetune: no LoRA, all parameters are trained (hyperpretraining).
    """
    model = load_base(args, full_finetune)
    generator = torch.Generator().manual_seed(args.seed)
    hyper_adapter, downstream_adapter = "hyper", DOWNSTREAM[args.downstream]
    if args.method != "hyper":
        hyper_adapter, downstream_adapter = None, "downstream"
    if full_finetune or not args.steps:
        hyper_adapter, downstream_adapter = None, None
    for name in dict.fromkeys(filter(None, (hyper_adapter, downstream_adapter))):
        keys_values_only = name != downstream_adapter
        add_lora(model, name, args.rank, args.alpha, generator, keys_values_only)
    gists = first_gists(args, model, generator)
    hyper = HyperLlama(model, gists, hyper_adapter, downstream_adapter, compression_of(args))
    hyper.gists.requires_grad_(args.method == "hyper")
    if hyper.compression.build:
        hyper.compression.build(hyper, generator)
    return hyper.requires_grad_(True) if full_finetune else hyper


def first_gists(args: Options, model: Llama, generator: torch.Generator) -> Tensor:
    """Gist embeddings to start from [G, D]: a hyperpretrained model's own, else random words."""
    count = args.gists if args.method == "hyper" else 0
    if count > model.config.vocab:
        raise InputError(
            f"--gists {count}: gists start as words, and the vocabulary has {model.config.vocab}"
        )
    gists = model.embed_tokens.weight[torch.randperm(model.config.vocab, generator=generator)[:count]]
    path = Path(args.model) / "gists.safetensors"
    if count and path.exists():
        own = load_tensors(path)[0].get("gists", gists[:0])[:count]
        assign({"gists": gists[: len(own)]}, {"gists": own}, path)  # the rest start as words
    return gists


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def load_adapters(hyper: HyperLlama, folder: Path) -> HyperLlama:
    path = folder / "adapters.safetensors"
    if not path.exists():
        raise InputError(
            f"{folder}: this run isn't finished (no {path.name}); train.py with --resume goes on with it"
        )
    tensors, metadata = load_tensors(path)
    assign(trainable(hyper), tensors, path)
    check_belongs(path, metadata, hyper)
    return hyper


def check_belongs(path: Path, metadata: dict[str, str], hyper: HyperLlama) -> None:
    """InputError where tensors were trained for another base (prefixes: for other tasks)."""
    other = {
        "base": "another model than --model",
        "tasks": "other tasks than --data has, or in another order",
    }
    for key, value in hyper.belongs_to.items():
        if metadata.get(key) != value:
            raise InputError(f"{path}: was trained on {other[key]}")


# ---------------------------------------------------------------------------------- several processes


def start_processes() -> tuple[int, int]:
    """This process's rank, and how many there are: torchrun says so in the environment."""
    if "RANK" not in os.environ:
        return 0, 1
    if not {"WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError("RANK is set without WORLD_SIZE, LOCAL_RANK and MASTER_ADDR: torchrun sets them all")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with reading("torchrun's environment", "doesn't describe processes"):
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return processes()


def processes() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather_dict(items: dict) -> dict:
    """The items of all processes together."""
    parts = [items] * processes()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, items)
    return {key: value for part in parts for key, value in part.items()}


# ----------------------------------------------------------------------------------- how commands end


def run_command(main: Callable[[], None]) -> None:
    """Run a command. A mistake of the user's is one line and exit status 2; Ctrl-C and SIGTERM, 130."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks ± shows a question mark
    torch.set_num_threads(torch.get_num_threads())  # set explicitly; else MKL uses fewer for small matmuls
    before = {kind: signal.signal(kind, interrupt) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        main()
        sys.stdout.flush()
        for kind, handler in before.items():
            signal.signal(kind, handler)
        return
    except (InputError, OSError) as problem:  # OSError: a full disk, a folder taken away, a closed pipe
        message = f"error: {problem}"
    except ImportError as problem:
        top = (problem.name or "").split(".")[0]  # (of this project, where a file of tasks/ has a mistake)
        own = (PROJECT / top).exists() or (PROJECT / f"{top}.py").exists()
        message = f"error: {problem}"
        message += "" if own else " (pip install -r requirements.txt installs what is needed)"
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as problem:
        text = str(problem).split("\n")[0]
        if type(problem) is RuntimeError and "alloc" not in text:
            raise
        message = f"error: out of memory; a smaller --batch-size or --eval-tokens may help ({text})"
    except KeyboardInterrupt:
        message = "interrupted"
    finally:
        release_folders()
    try:
        sys.stdout.flush()
    except OSError:  # what can't be written isn't tried again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    several = "WORLD_SIZE" in os.environ
    if not several or os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        with suppress(OSError):
            print(" ".join(message.split("\n")), file=sys.stderr)
    sys.exit(130 if message == "interrupted" else 2)


def interrupt(*_) -> None:
    """Ctrl-C and SIGTERM. A second one doesn't disturb the way out, which ends with the process."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    sys.unraisablehook = lambda _: None  # what is half made just now can't close itself, and would say so
    raise KeyboardInterrupt


def print_lines(lines: Sequence[Sequence[str]], total: bool = True) -> None:
    """A table: a rule under the first line, and above the last if that is a total."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for i, line in enumerate(lines):
        if i == 1 or total and i == len(lines) - 1:
            print("-" * (sum(widths) + 2 * len(widths) - 2))
        print(line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:]), sep="  ")
