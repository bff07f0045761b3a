"""Prefix tuning (paper, Section 4.4): prefixes that are trained themselves, one for each held-out P3 prompt.

What is compared is where they start: gists of examples, a prefix tuned on the training tasks, random
numbers, an MLP, the examples' first tokens, or slots that pass through the layers.
"""

import argparse
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from data import Batch, Episode, Formatter, collate
from gist import Gists, load_base, load_trained, read_rows, save  # noqa: F401  called as tasks.prefix.save
from gist import restore as restore_hyper
from llama import KV, InputError, Llama, ragged
from tasks import p3

FOLDER, MODEL = "P3", "llama-c"  # the miniature's data and checkpoint
METRIC = "accuracy"
OPTIONS = ("init", "run")
score = p3.score
DEFAULTS = {
    "large": p3.DEFAULTS["large"] | {"steps": 3000, "lr": 3e-3, "measure": 10, "init": "hyper"},
    "tiny": p3.DEFAULTS["tiny"] | {"steps": 100, "batch_size": 2, "lr": 3e-2, "measure": 10, "init": "hyper"},  # a small budget tells starts apart
}
MLP_LR = 0.1  # an MLP that makes a prefix learns at this share of the rate of a flat prefix
INITS = ("hyper", "shared", "random", "reparam", "text", "propagate")

# The eight prompts that the paper tunes prefixes on.
PROMPTS = (
    "anli_GPT_3_style_r1 hellaswag_complete_first_then super_glue_cb_GPT_3_style "
    "super_glue_copa_C1_or_C2_premise_so_because_ super_glue_rte_GPT_3_style super_glue_wic_GPT_3_prompt "
    "super_glue_wsc.fixed_GPT_3_Style winogrande_winogrande_debiased_Replace"
).split()


def check(args: argparse.Namespace) -> None:
    """InputError for options that don't go together."""
    from tasks import read_args  # (which imports this module)

    if args.method != "hyper":
        raise InputError("--task prefix has no --method: --init says how a prefix starts")
    if args.downstream != "frozen":
        raise InputError(f"--downstream {args.downstream} belongs to a hypernetwork with LoRA sets, not to this run")
    if (args.init == "hyper") != (args.run is not None):
        raise InputError("--init hyper needs --run DIR, a finished run of --task p3; no other --init takes one")
    if args.run:
        folder, before = Path(args.run), read_args(Path(args.run))
        if not (folder / "adapters.safetensors").exists() or (before["task"], before["method"]) != ("p3", "hyper"):
            raise InputError(f"--run {folder}: not a finished hypernetwork for P3")
        if before.get("emit", "kv") != "kv":
            raise InputError(f"--run {folder}: makes low-rank updates, and a prefix starts from keys and values")
        if before["gists"] != args.gists or Path(before["model"]).resolve() != Path(args.model).resolve():
            raise InputError(f"--run {folder}: has {before['gists']} gists and the model {before['model']}, other than this run")


def load(args: argparse.Namespace, formatter: Formatter, split: str) -> list[p3.Prompt]:
    tasks = p3.p3_tasks(args.data, split)
    return tasks if split == "train" else [task for task in tasks if task.name in PROMPTS] or tasks


def build(args: argparse.Namespace) -> "SoftPrefix":
    generator = torch.Generator().manual_seed(args.seed)
    kind = args.init if args.init in ("reparam", "propagate") else "flat"
    tasks = load(args, None, "test")
    prefix = SoftPrefix(load_base(args), len(tasks), args.gists, kind, generator)
    prefix.tasks = " ".join(task.name for task in tasks)  # a prefix belongs to its task
    return prefix


def restore(args: argparse.Namespace, folder: Path) -> "SoftPrefix":
    return load_trained(build(args), folder)


def batches(args: argparse.Namespace, hyper: "SoftPrefix", formatter: Formatter) -> "PrefixBatches":
    return PrefixBatches(load(args, formatter, "test"), formatter)


def prefix_of(run, episodes: list[Episode], t: int, adapter: None) -> Gists:
    """The prefix of task number t, for each episode: the column of the table that is this run's own."""
    return run.hyper.prefix()[torch.tensor([t] * len(episodes), device=run.device)]


class SoftPrefix(nn.Module):
    """Prefixes that are trained themselves, one for each of R tasks, in front of a frozen Llama.

    kind  "flat"       the keys and values are the parameters (prefix tuning, Li and Liang 2021)
          "reparam"    they are the outputs of an MLP: [P, D] -> Linear -> tanh -> 2·L·K·hd
          "propagate"  P slots pass through the layers, one added vector per layer and slot: half as
                       many parameters as flat keys and values (prefix-propagation, Li et al. 2023)
    """

    gist_ids = ()  # it reads no examples

    def __init__(self, model: Llama, tasks: int, length: int, kind: str, generator: torch.Generator):
        super().__init__()
        c = model.config
        self.model, self.kind, self.answerer = model, kind, None
        self.lr_share = MLP_LR if kind == "reparam" else 1.0
        device = model.embed_tokens.weight.device
        self.register_buffer("offset", torch.full((tasks,), length, device=device))

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(device))

        if kind == "flat":
            self.table = normal(c.layers, 2, tasks, c.kv_heads, length, c.head_size)
        elif kind == "reparam":
            hidden, outputs = min(c.width, HIDDEN), 2 * c.layers * c.kv_heads * c.head_size
            self.table = normal(tasks, length, c.width)
            self.first = nn.Parameter(normal(tasks, c.width, hidden).data / c.width**0.5)
            self.second = nn.Parameter(normal(tasks, hidden, outputs).data / hidden**0.5)
        else:  # the slots start as words; nothing is added in the layers after the first
            words = torch.randperm(c.vocab, generator=generator)[: tasks * length].to(device)
            table = torch.zeros(c.layers, tasks, length, c.width, device=device)
            table[0] = model.embed_tokens.weight[words].view(tasks, length, c.width)
            self.table = nn.Parameter(table)

    def past(self) -> list[KV]:
        """Per layer keys and values [R, K, P, hd]."""
        c, dtype = self.model.config, self.model.embed_tokens.weight.dtype
        if self.kind == "propagate":
            return self.propagated()
        table = self.table
        if self.kind == "reparam":
            table = (table @ self.first).tanh() @ self.second  # [R, P, 2·L·K·hd]
            table = table.unflatten(-1, (c.layers, 2, c.kv_heads, c.head_size)).permute(2, 3, 0, 4, 1, 5)
        return [(k.to(dtype), v.to(dtype)) for k, v in table]

    def propagated(self) -> list[KV]:
        """Slots see nothing but slots, so they can be read alone, before any query."""
        slots = torch.zeros_like(self.table[0], dtype=self.model.embed_tokens.weight.dtype)
        return self.model(slots, added=self.table, select=self.offset[:0])[1]

    def prefix(self) -> Gists:
        return Gists(self.past(), self.offset)

    @torch.no_grad()
    def start_from(self, gists: Gists) -> None:
        """Take keys, values and offsets as the flat prefix to start from."""
        self.table.copy_(torch.stack([torch.stack(list(layer)) for layer in gists.past]))
        self.offset.copy_(gists.offset)

    def forward(self, batch) -> Tensor:
        """A data.Batch, in which `row` says the task of each query -> logits at its targets, [N, V]."""
        before = self.prefix()[batch.row].before(batch.tokens.shape[1])
        return self.model(batch.tokens, **before, select=batch.select)[0]


HIDDEN = 512  # most hidden units of the MLP that makes a prefix


@dataclass
class PrefixBatches:
    """Training batches: for each row of a run, a query of every task after its own prefix.

    shared: one prefix for all tasks; each row is a query of one of them, drawn by weight.
    """

    tasks: Sequence[p3.Prompt]
    formatter: Formatter
    shared: bool = False

    def __str__(self) -> str:
        return f"a prefix for each of {len(self.tasks)} tasks"

    def __call__(self, seed: int, numbers: Sequence[int]) -> Batch:
        """The rows of a run with these numbers. Each is a pure function of (seed, number)."""
        row, prompts, targets, left_out = [], [], [], Counter()
        for number in numbers:
            for t, task in enumerate([None] if self.shared else self.tasks):
                episode, some = self.draw(random.Random(f"{seed} {task.name if task else 'shared'} {number}"), task)
                (query,) = episode.queries
                target = self.formatter.target(episode, query.target) + [self.formatter.tokenizer.eos]
                prompt = self.formatter.query(episode, query, self.formatter.query_length - len(target))
                row.append(t)
                prompts.append(prompt.tokens)
                targets.append(target)
                left_out += some + prompt.left_out
        return collate(None, row, prompts, targets, left_out=left_out)

    def draw(self, rng: random.Random, task: p3.Prompt | None) -> tuple[Episode, Counter[str]]:
        """An episode of this task, or of any."""
        return self.formatter.fitting(
            lambda: (task or rng.choices(self.tasks, [t.weight for t in self.tasks])[0]).draw(rng, 0, 1)
        )


def start(run, tasks: list[p3.Prompt], out: Path, train: Callable) -> None:
    """What the prefixes start from, by --init: "hyper" and "text" read examples, "shared" is tuned before.

    train(hyper, batches, folder): the loop of train.py, in a folder of its own.
    """
    from tasks import read_args

    args, hyper, formatter, device = run.args, run.hyper, run.formatter, run.device
    shots = [task.evaluation(args.seed, 0, args.shots, 1)[0] for task in tasks]
    if args.init == "hyper":
        folder = Path(args.run)
        made_by = restore_hyper(argparse.Namespace(**read_args(folder) | {"device": args.device, "dtype": args.dtype}), folder)
        rows = [formatter.context_row(episode, made_by.gist_ids).tokens for episode in shots]
        with torch.no_grad():
            hyper.start_from(made_by.compress(ragged(rows, device=device)))
    elif args.init == "text":
        rows = [formatter.context_row(episode).tokens[1 : args.gists + 1] for episode in shots]
        if min(map(len, rows)) < args.gists:
            raise InputError(f"--gists {args.gists}: the examples have fewer tokens")
        hyper.start_from(read_rows(hyper.model, rows))
    elif args.init == "shared":
        shared = SoftPrefix(hyper.model, 1, args.gists, "reparam", torch.Generator().manual_seed(args.seed))
        folder = out / "shared"
        if not (folder / "adapters.safetensors").exists():
            folder.mkdir(exist_ok=True)
            train(shared, PrefixBatches(load(args, formatter, "train"), formatter, shared=True), folder)
        load_trained(shared, folder)
        with torch.no_grad():  # folded: from here on, keys and values themselves are trained
            hyper.start_from(shared.prefix()[torch.zeros(len(tasks), dtype=torch.long, device=device)])
