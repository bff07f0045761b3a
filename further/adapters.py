"""Gists as adapters (HyperT5, Phang et al. 2023): low-rank updates of the downstream model.

In each layer, half of the gists become rank-one updates b aᵀ of q_proj, half of v_proj. A layer's head
reads what keys and values the gists have there. RESULTS.md, "What helps": after 300 steps on tasks these
heads don't transfer; they start from nothing, while keys and values were hyperpretrained. "Places": after 300
steps of hyperpretraining they say a little about a text, and held-out tasks stay at chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gist import Compression, HyperLlama, Rows
from llama import KV, InputError, Llama
from lora import assign, linears, load_tensors
from run import option

OPTIONS = {
    "emit": option(
        "kv",
        choices=("kv", "lora"),
        help="what gists become: keys and values, or low-rank updates of q_proj and v_proj downstream",
    )
}
Updates = dict[str, tuple[Tensor, Tensor]]  # path of a matrix -> A [B, r, inputs] and B [B, outputs, r]


def check(args) -> None:
    if args.gists % 2:
        raise InputError(
            "--emit lora needs an even number of gists: half of them for q_proj, half for v_proj"
        )


def compression(args) -> Compression | None:
    if args.emit == "kv":
        return None

    def build(hyper: HyperLlama, generator: torch.Generator) -> None:
        add_heads(hyper, generator)
        path = Path(args.model) / "gists.safetensors"  # hyperpretraining puts them beside its gists
        own = load_tensors(path)[0] if path.exists() else {}
        own = {name: tensor for name, tensor in own.items() if name.startswith("heads.")}
        if own:
            assign({f"heads.{name}": p for name, p in hyper.heads.named_parameters()}, own, path)

    return Compression(prefix=emit, build=build)


def add_heads(hyper: HyperLlama, generator: torch.Generator) -> None:
    hyper.heads = Heads(hyper.model, generator)


def emit(hyper: HyperLlama, pieces: Sequence[Rows]) -> "Emitted":
    (rows,) = pieces
    gists = hyper.compress(rows)
    return Emitted(hyper.heads(gists.past), torch.zeros_like(gists.offset))


@dataclass
class Emitted:
    """In place of Gists: nothing comes before a query, which begins at 0 and is read by an updated model."""

    updates: Updates
    offset: Tensor
    length = 0

    def __getitem__(self, rows: Tensor) -> "Emitted":
        return Emitted({path: (A[rows], B[rows]) for path, (A, B) in self.updates.items()}, self.offset[rows])

    def as_past(self, T: int, adapter: str | None = None) -> dict:
        sets = {"emitted": self.updates} | ({adapter: None} if adapter else {})
        return {"past": None, "offset": self.offset, "mask": None, "adapter": sets}


class EmittedUpdate(nn.Module):
    """The place of an update that isn't learned but comes with the call, as the set's "gate"."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x: Tensor, updates: Updates) -> Tensor:
        A, B = updates[self.path]
        return x @ A.to(x.dtype).mT @ B.to(x.dtype).mT  # [B, T, outputs]


class Heads(nn.Module):
    """From the keys and values of G gists to updates of rank G / 2. b is zero at the start."""

    def __init__(self, model: Llama, generator: torch.Generator, hidden: int = 64):
        super().__init__()
        c = model.config
        device = model.embed_tokens.weight.device

        def normal(inputs: int, outputs: int) -> nn.Parameter:
            start = torch.randn(c.layers, inputs, outputs, generator=generator) / inputs**0.5
            return nn.Parameter(start.to(device))

        self.down = normal(2 * c.kv_heads * c.head_size, hidden)
        self.a = normal(hidden, 2 * c.width)
        self.q = nn.Parameter(torch.zeros(c.layers, hidden, c.heads * c.head_size, device=device))
        self.v = nn.Parameter(torch.zeros(c.layers, hidden, c.kv_heads * c.head_size, device=device))
        for path, linear in linears(model).items():
            if path.endswith(("q_proj", "v_proj")):
                linear.lora["emitted"] = EmittedUpdate(path)

    def forward(self, past: Sequence[KV]) -> Updates:
        updates = {}
        for i, kv in enumerate(past):
            x = torch.cat(kv, dim=1).transpose(1, 2).flatten(2).float()  # [B, G, 2·K·hd]
            # Normalised: trained keys are far larger than values, and of another size in each layer.
            h = F.silu(F.rms_norm(x, x.shape[-1:]) @ self.down[i])  # [B, G, hidden]
            gists_q, gists_v = h.chunk(2, dim=1)
            a_q, a_v = self.a[i].chunk(2, dim=1)
            G = x.shape[1]
            path = f"layers.{i}.self_attn."
            # A sum over G / 2 gists: divided by it, an update is as large with many gists as with few.
            updates[path + "q_proj"] = (gists_q @ a_q, (gists_q @ self.q[i]).mT * (2 / G))
            updates[path + "v_proj"] = (gists_v @ a_v, (gists_v @ self.v[i]).mT * (2 / G))
        return updates
