"""LoRA by hand, and the 4-bit linear under it (QLoRA).

LoRA (Hu et al. 2021) leaves W alone and learns a low-rank update beside it. Sets have names, and a
call says which one acts: HyperLlama's two roles (paper, Section 3) are two calls of one base,

    hypernetwork   y = W x + (alpha / r) · B A x      adapter="hyper"
    downstream     y = W x                            adapter=None, or another set (variant D)

Which set acts is an argument, all the way down. A flag inside the modules could have changed by the
time a layer runs again, as under activation checkpointing; and merging an update into W would take
the base away from the other role.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llama import InputError, Linear, Llama, reading


class LoRA(nn.Module):
    """x [..., inputs] -> gate · (alpha / rank) · B A x [..., outputs]. Zero at the start, because B is."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        # Parameters stay float32, whatever the base computes in: small updates get lost in bf16.
        h = F.linear(x, self.A.to(x.dtype)) * self.scale  # [..., rank]: scaling is cheap here
        # Copying the small B.T: in backward, a transposed view would become a product that is slow on a CPU.
        return (h if gate is None else gate * h) @ self.B.to(x.dtype).T.contiguous()


def linears(model: Llama) -> dict[str, Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear)}


def add_lora(
    model: Llama, name: str, rank: int, alpha: float, generator: torch.Generator, keys_values_only: bool = False
) -> None:
    """Put a set called `name` on all seven matrices of every layer; A is drawn from `generator`.

    keys_values_only: the set will only ever make keys and values, so the last layer gets it on k and
    v alone; what comes after them would never see a gradient.
    """
    last = f"layers.{model.config.layers - 1}."
    for path, linear in linears(model).items():
        if keys_values_only and path.startswith(last) and not path.endswith(("k_proj", "v_proj")):
            continue
        lora = LoRA(linear.inputs, linear.outputs, rank, alpha)
        bound = 1 / math.sqrt(linear.inputs)
        with torch.no_grad():
            lora.A.uniform_(-bound, bound, generator=generator)
        linear.lora[name] = lora.to(linear.weight.device)


Updates = dict[str, tuple[Tensor, Tensor]]  # path of a matrix -> A [B, r, inputs] and B [B, outputs, r], for each row its own


class Emitted(nn.Module):
    """The place of an update that isn't learned but made by a hypernetwork: it comes with the call."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x: Tensor, updates: Updates) -> Tensor:
        A, B = updates[self.path]
        return x @ A.to(x.dtype).mT @ B.to(x.dtype).mT  # [B, T, outputs]


class Heads(nn.Module):
    """Gists as adapters (HyperT5, Phang et al. 2023): in each layer, half of them become rank-one updates b aᵀ of
    q_proj, half of v_proj. A layer's head reads what keys and values the gist has there; b is zero at the start.
    """

    def __init__(self, model: Llama, generator: torch.Generator, hidden: int = 64):
        super().__init__()
        c, device = model.config, model.embed_tokens.weight.device
        made = {"down": (2 * c.kv_heads * c.head_size, hidden), "a": (hidden, 2 * c.width)}
        for name, shape in made.items():
            start = torch.randn(c.layers, *shape, generator=generator) / shape[0] ** 0.5
            setattr(self, name, nn.Parameter(start.to(device)))
        self.q = nn.Parameter(torch.zeros(c.layers, hidden, c.heads * c.head_size, device=device))
        self.v = nn.Parameter(torch.zeros(c.layers, hidden, c.kv_heads * c.head_size, device=device))
        for path, linear in linears(model).items():
            if path.endswith(("q_proj", "v_proj")):
                linear.lora["emitted"] = Emitted(path)

    def forward(self, past: Sequence[tuple[Tensor, Tensor]]) -> Updates:
        """Keys and values of G gists, for each layer two [B, K, G, hd] -> an update of rank G / 2 for each matrix."""
        updates = {}
        for i, both in enumerate(past):
            h = F.silu(torch.cat(both, dim=1).transpose(1, 2).flatten(2).float() @ self.down[i])  # [B, G, hidden]
            for name, gists, a, b in zip("qv", h.chunk(2, dim=1), self.a[i].chunk(2, dim=1), (self.q[i], self.v[i])):
                updates[f"layers.{i}.self_attn.{name}_proj"] = (gists @ a, (gists @ b).mT)
        return updates


BLOCK = 64  # numbers with one scale


class NF4Linear(Linear):
    """A linear whose weight is stored as NF4: four bits per number, one scale per block of 64.

    NF4's 16 levels are quantiles of the normal distribution, which trained weights resemble. With
    double quantization the scales themselves are stored in 8 bits (QLoRA, Dettmers et al. 2023):

        W ≈ level[code] · dequantize(scale);   y = W x in the dtype of x

    bitsandbytes' functions are called here rather than its Linear4bit, which on some CPUs repacks its
    weight in eval mode and can't be trained through afterwards.
    """

    def place(self, weight: Tensor, device: torch.device | str, dtype: torch.dtype) -> None:
        from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise  # slow to import, and only needed here

        # A million numbers at a time: on the way, quantizing takes many times the room of the result.
        parts = [quantize_4bit(part, blocksize=BLOCK, quant_type="nf4") for part in weight.to(device, dtype).flatten().split(1 << 20)]
        scales = torch.cat([state.absmax for _, state in parts])  # one for each block
        middle = scales.mean()
        scales, scales_of_scales = quantize_blockwise(scales - middle, blocksize=256)
        self.weight = nn.Parameter(torch.cat([codes for codes, _ in parts]), requires_grad=False)
        self.state = QuantState(
            scales, weight.shape, parts[0][1].code, BLOCK, "nf4", dtype, offset=middle, state2=scales_of_scales
        )

    def matmul(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.weight, self.state)


# ------------------------------------------------------------------------------- saving and loading


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a .safetensors file atomically: a killed process leaves the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, dict(about))
        os.chmod(partial, 0o644)  # safetensors keeps its files to their owner
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (SafetensorError, OSError) as problem:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: can't be written ({problem})") from None


def write_json(path: Path, value: dict) -> None:
    """Atomic, like save_tensors."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path}: can't be written ({problem.strerror})") from None


def read_lines(path: Path) -> Iterator:
    """The values in a file of JSON lines; not those that a killed process left torn."""
    for line in path.read_bytes().splitlines():
        with suppress(ValueError):
            yield json.loads(line)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file, and what it says about itself."""
    with reading(path, "can't be read"), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def assign(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy loaded tensors into parameters of the same names and shapes; InputError if they differ."""
    for name in sorted(parameters.keys() ^ tensors.keys()):
        raise InputError(f"{source}: tensor {name} is {'missing' if name in parameters else 'not expected here'}")
    for name, parameter in parameters.items():
        if not (tensors[name].is_floating_point() == parameter.is_floating_point() and tensors[name].isfinite().all()):
            raise InputError(f"{source}: {name} doesn't hold finite numbers of the right kind")
        if parameter.shape != tensors[name].shape:
            expected, found = list(parameter.shape), list(tensors[name].shape)
            raise InputError(f"{source}: {name} has shape {found} where {expected} is needed: made for another model?")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
