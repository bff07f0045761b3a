"""Prefix tuning (paper, Section 4.4): prefixes that are trained themselves, one for each held-out P3 prompt.

What is compared is where they start: gists of examples, a prefix tuned on the training tasks, random
numbers, an MLP, slots that pass through the layers; or keys and values of the examples' tokens: the first
ones, those at the labels, or all of them averaged.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import Batch, Episode, EpisodeBatches, Formatter, Sample, collate
from gist import Compression, Context, Gists, Rows, keep_all, label_anchors, mean_pooled, read_contexts
from llama import KV, InputError, Llama, positions_of, rotary_angles
from run import Options, Run, all_options, load_adapters, load_base, option, read_args
from run import build as build_hyper
from tasks import p3

FOLDER = "P3"
MODEL = "llama-c"
METRIC = "accuracy"
WAYS = False
INITS = ("hyper", "shared", "random", "reparam", "propagate", "text", "anchors", "pooled")
NOISE = 0.02  # standard deviation of what is added to averages, which are alike
OPTIONS = {
    "init": option(
        kind=str,
        choices=INITS,
        help="prefix: what a prefix starts from: gists of --run; a prefix tuned on training tasks; random "
        "numbers; an MLP; slots that pass through the layers; the examples' first tokens, their labels, or "
        "all of their tokens averaged",
    ),
    "run": option(
        kind=Path, help="prefix: a finished run whose hypernetwork makes the prefixes to start from"
    ),
}
WITHOUT = ("method", "downstream", "optimizer", "instruction_downstream", "rank", "alpha", "gist_lr")
DEFAULTS = {
    "large": p3.DEFAULTS["large"] | {"steps": 3000, "lr": 3e-3, "measure": 10, "init": "hyper"},
    "tiny": p3.DEFAULTS["tiny"]  # a small budget tells starts apart
    | {"steps": 100, "batch_size": 2, "lr": 3e-2, "measure": 10, "init": "hyper"},
}
MLP_LR = 0.1  # an MLP that makes a prefix learns at this share of the rate of a flat prefix
HIDDEN = 512  # most hidden units of the MLP that makes a prefix

# The eight prompts that the paper tunes prefixes on.
PROMPTS = (
    "anli_GPT_3_style_r1 hellaswag_complete_first_then super_glue_cb_GPT_3_style "
    "super_glue_copa_C1_or_C2_premise_so_because_ super_glue_rte_GPT_3_style super_glue_wic_GPT_3_prompt "
    "super_glue_wsc.fixed_GPT_3_Style winogrande_winogrande_debiased_Replace"
).split()


def check(args: Options) -> None:
    if (args.init == "hyper") != (args.run is not None):
        raise InputError(
            "--init hyper needs --run DIR, a finished run of --task p3; no other --init takes one"
        )


def load(args: Options, formatter: Formatter | None, split: str) -> list[p3.Prompt]:
    tasks = p3.p3_tasks(args.data, split)
    return tasks if split == "train" else [task for task in tasks if task.name in PROMPTS] or tasks


def build(args: Options) -> "SoftPrefix":
    generator = torch.Generator().manual_seed(args.seed)
    kind = args.init if args.init in ("reparam", "propagate") else "flat"
    names = [task.name for task in load(args, None, "test")]
    return SoftPrefix(load_base(args), names, args.gists, kind, generator)


def batches(run: Run) -> "PrefixBatches":
    """Also gives the prefixes what they start from, as far as it is made of examples."""
    tasks = load(run.args, run.formatter, "test")
    if run.args.init in MADE_OF_EXAMPLES:
        start_from_examples(run, tasks)
    return PrefixBatches(tasks, run.formatter)


def prefix_of(run: Run, t: int) -> Gists:
    """The prefix of task number t."""
    return run.hyper.prefix()[torch.tensor([t], device=run.device)]


class SoftPrefix(nn.Module):
    """Prefixes that are trained themselves, one for each of R tasks, in front of a frozen Llama.

    They stand at positions 0 … P-1, as gists do, so that queries go on at P.

    kind  "flat"       the keys and values are the parameters (prefix tuning, Li and Liang 2021)
          "reparam"    they are the outputs of an MLP: [P, D] -> Linear -> tanh -> 2·L·K·hd
          "propagate"  P slots pass through the layers, one added vector per layer and slot: half as
                       many parameters as flat keys and values (prefix-propagation, Li et al. 2023)
    """

    gist_ids = ()  # it reads no examples
    compression = Compression()
    downstream_adapter = None

    def __init__(
        self, model: Llama, tasks: Sequence[str], length: int, kind: str, generator: torch.Generator
    ):
        super().__init__()
        c = model.config
        self.model = model
        self.tasks = tasks
        self.length = length
        self.kind = kind
        self.lr_share = MLP_LR if kind == "reparam" else 1.0
        device = model.embed_tokens.weight.device

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(device))

        R = len(tasks)
        if kind == "flat":
            self.table = normal(c.layers, 2, R, c.kv_heads, length, c.head_size)
        elif kind == "reparam":
            hidden = min(c.width, HIDDEN)
            outputs = 2 * c.layers * c.kv_heads * c.head_size
            self.table = normal(R, length, c.width)
            self.first = nn.Parameter(normal(R, c.width, hidden).data / c.width**0.5)
            self.second = nn.Parameter(normal(R, hidden, outputs).data / hidden**0.5)
        else:  # the slots start as words; nothing is added in the layers after the first
            if R * length > c.vocab:
                what = f"{R} tasks of --gists {length} take more than the {c.vocab} words of the vocabulary"
                raise InputError(f"--init propagate: {what}")
            words = torch.randperm(c.vocab, generator=generator)[: R * length].to(device)
            table = torch.zeros(c.layers, R, length, c.width, device=device)
            table[0] = model.embed_tokens.weight[words].view(R, length, c.width)
            self.table = nn.Parameter(table)

    @property
    def belongs_to(self) -> dict[str, str]:
        """What its tensors mean nothing without: the base, and the tasks in this order."""
        return {"base": self.model.checksum, "tasks": " ".join(self.tasks)}

    def past(self) -> list[KV]:
        """Per layer keys and values [R, K, P, hd]."""
        if self.kind == "propagate":
            return self.propagated()
        c = self.model.config
        dtype = self.model.embed_tokens.weight.dtype
        table = self.table
        if self.kind == "reparam":
            table = (table @ self.first).tanh() @ self.second  # [R, P, 2·L·K·hd]
            table = table.unflatten(-1, (c.layers, 2, c.kv_heads, c.head_size)).permute(2, 3, 0, 4, 1, 5)
        return [(k.to(dtype), v.to(dtype)) for k, v in table]

    def propagated(self) -> list[KV]:
        """Slots see nothing but slots, so they pass through the layers alone, before any query."""
        x = torch.zeros_like(self.table[0], dtype=self.model.embed_tokens.weight.dtype)  # [R, P, D]
        angles = rotary_angles(positions_of(x), self.model.config)
        past = []
        for layer, added in zip(self.model.layers, self.table):
            x, k, v = self.model.run_layer(layer, x + added.to(x.dtype), angles, None, None, {})
            past.append((k, v))
        return past

    def prefix(self) -> Gists:
        offset = torch.full((len(self.tasks),), self.length, device=self.table.device)
        return Gists(self.past(), offset)

    @torch.no_grad()
    def start_from(self, gists: Gists) -> None:
        """Take keys and values as the flat prefix to start from. They must stand where the prefix does."""
        self.table.copy_(torch.stack([torch.stack(list(layer)) for layer in gists.past]))

    def forward(self, batch: Batch) -> tuple[Tensor, Gists]:
        """Logits at the targets [M, V], and the prefixes. A batch holds queries of all tasks in turn."""
        gists = self.prefix()
        past = gists[batch.row % len(self.tasks)].as_past(batch.tokens.shape[1])
        return self.model(batch.tokens, **past, select=batch.select)[0], gists


@dataclass
class PrefixBatches:
    """Training batches: for each row of a run, a query of every task after its own prefix."""

    tasks: Sequence[p3.Prompt]
    formatter: Formatter

    def __str__(self) -> str:
        return f"a prefix for each of {len(self.tasks)} tasks"

    def __call__(self, seed: int, numbers: Sequence[int]) -> Batch:
        """The rows of a run with these numbers. Each is a pure function of (seed, number)."""
        return collate([self.sample(seed, number, task) for number in numbers for task in self.tasks])

    def sample(self, seed: int, number: int, task: p3.Prompt) -> Sample:
        rng = random.Random(f"{seed} {task.name} {number}")
        episode = self.formatter.first_that_fits(lambda: task.draw(rng, 0, 1))
        (query,) = episode.queries
        target = self.formatter.training_target(episode, query.target)
        prompt = self.formatter.query(episode, query, self.formatter.query_length - len(target))
        return Sample(None, [(prompt, target)])


# ------------------------------------------------------------------------------ what a prefix starts from


@torch.no_grad()
def gists_of_run(run: Run, shots: list[Episode]) -> Gists:
    """What the hypernetwork of --run makes of the examples."""
    folder = Path(run.args.run)
    own = {name: getattr(run.args, name) for name in ("model", "device", "dtype")}
    before = all_options()(**read_args(folder) | own)
    if (before.task, before.method) != ("p3", "hyper"):
        raise InputError(f"--run {folder}: not a hypernetwork for P3")
    hyper = load_adapters(build_hyper(before), folder)
    contexts = [hyper.compression.contexts(run.formatter, episode, hyper.gist_ids) for episode in shots]
    return hyper.compression.prefix(hyper, [Rows.of(piece, run.device) for piece in zip(*contexts)])


def first_tokens(run: Run, shots: list[Episode]) -> Gists:
    rows = [run.formatter.context_tokens(episode)[1 : run.args.gists + 1] for episode in shots]
    return read_contexts(run.hyper.model, [keep_all(tokens) for tokens in rows])


def anchors(run: Run, shots: list[Episode]) -> Gists:
    contexts = [label_anchors(run.formatter, episode) for episode in shots]
    # (without BOS, and a position earlier, so that a prefix begins at 0 like all others)
    contexts = [Context(c.tokens, [p - 1 for p in c.positions], c.kept[1:]) for c in contexts]
    return read_contexts(run.hyper.model, contexts)


def pooled(run: Run, shots: list[Episode]) -> Gists:
    model = run.hyper.model
    rows = [keep_all(run.formatter.context_tokens(episode)) for episode in shots]
    return mean_pooled(read_contexts(model, rows), run.args.gists, model.config)


MADE_OF_EXAMPLES = {"hyper": gists_of_run, "text": first_tokens, "anchors": anchors, "pooled": pooled}


def start_from_examples(run: Run, tasks: Sequence[p3.Prompt]) -> None:
    args = run.args
    shots = [task.evaluation(args.seed, 0, args.shots, 1)[0] for task in tasks]
    gists = MADE_OF_EXAMPLES[args.init](run, shots)
    fits = isinstance(gists, Gists) and gists.length == args.gists
    if not fits or (gists.past_mask is not None and not gists.past_mask.all()):
        raise InputError(f"--init {args.init}: the examples don't give --gists {args.gists} positions")
    run.hyper.start_from(gists)
    if args.init == "pooled":
        generator = torch.Generator().manual_seed(args.seed)
        run.hyper.table.data += NOISE * torch.randn(run.hyper.table.shape, generator=generator).to(run.device)


def start(run: Run, out: Path, train: Callable) -> None:
    """--init shared: an MLP's prefix is first tuned on all training tasks, in a folder of its own.

    train(run, batches, folder): the loop of train.py.
    """
    args = run.args
    if args.init != "shared":
        return
    folder = out / "shared"
    generator = torch.Generator().manual_seed(args.seed)
    shared = SoftPrefix(run.hyper.model, ["shared"], args.gists, "reparam", generator)
    if not (folder / "adapters.safetensors").exists():
        folder.mkdir(exist_ok=True)
        batches = EpisodeBatches(load(args, run.formatter, "train"), run.formatter, "zeroshot", shots=0)
        train(replace(run, hyper=shared), batches, folder)
    if dist.is_initialized():
        dist.barrier()  # the first process has saved it
    load_adapters(shared, folder)
    every_task = torch.zeros(len(run.hyper.tasks), dtype=torch.long, device=run.device)
    with torch.no_grad():
        run.hyper.start_from(shared.prefix()[every_task])
