"""LoRA by hand, and the 4-bit linear under it (QLoRA).

LoRA (Hu et al. 2021) leaves W alone and learns a low-rank update beside it. Sets have names, and a
call says which one acts: HyperLlama's two roles (paper, Section 3) are two calls of one base,

    hypernetwork       y = W x + (alpha / r) · B A x      adapter="hyper"
    downstream model   y = W x                            adapter=None, or another set (variant D)

Which set acts is an argument, all the way down. A flag inside the modules could have changed by the
time a layer runs again, as under activation checkpointing; and merging an update into W would take
the base away from the other role.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
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
    model: Llama,
    name: str,
    rank: int,
    alpha: float,
    generator: torch.Generator,
    keys_values_only: bool = False,
) -> None:
    """Put a set called `name` on all seven matrices of every layer; A is drawn from `generator`.

    keys_values_only: the set will only ever compute keys and values, so the last layer gets it on k and v
    alone; what comes after them would never see a gradient.
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


BLOCK = 64  # numbers with one scale


class NF4Linear(Linear):
    """A linear whose weight is stored as NF4: four bits per number, one scale per block of 64.

    NF4's 16 levels are quantiles of the normal distribution, which trained weights resemble. With
    double quantization the scales themselves are stored in 8 bits (QLoRA, Dettmers et al. 2023):

        W ≈ level[code] · dequantize(scale);   y = W x in the dtype of x

    bitsandbytes' functions are called here rather than its Linear4bit, which on some CPUs repacks its
    weight in eval mode and can't be trained through afterwards.
    """

    def load_weight(self, weight: Tensor, device: torch.device | str, dtype: torch.dtype) -> None:
        from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise  # slow to import

        # A million numbers at a time: on the way, quantizing takes many times the room of the result.
        parts = weight.to(device, dtype).flatten().split(1 << 20)
        codes, states = zip(*(quantize_4bit(part, blocksize=BLOCK, quant_type="nf4") for part in parts))
        self.weight = nn.Parameter(torch.cat(codes), requires_grad=False)
        # Double quantization: of the blocks' scales, what differs from their mean, in 8 bits.
        scales = torch.cat([state.absmax for state in states])
        mean = scales.mean()
        scales, state2 = quantize_blockwise(scales - mean, blocksize=256)
        levels = states[0].code
        self.state = QuantState(scales, weight.shape, levels, BLOCK, "nf4", dtype, offset=mean, state2=state2)

    def matmul(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.weight, self.state)


# ------------------------------------------------------------------------------- saving and loading


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a partial file's path. Complete, it takes the place of `path`: the old file or the new."""
    partial = path.with_name(path.name + ".partial")
    try:
        with reading(path, "can't be written"):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file."""
    with replacing(path) as partial:
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(tensors, partial, dict(metadata))
        os.chmod(partial, 0o644)  # safetensors keeps its files to their owner
        with open(partial, "rb") as file:
            os.fsync(file.fileno())


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file, and its metadata."""
    with reading(path, "can't be read"), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def check_tensors(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """InputError unless loaded tensors are finite, and have the parameters' names, shapes and kinds."""

    for name in sorted(parameters.keys() | tensors.keys()):
        tensor = tensors.get(name)
        forms = {t is not None and (t.shape, t.is_floating_point()) for t in (tensor, parameters.get(name))}
        if len(forms) > 1:
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise InputError(f"{source}: {name} is {found}, which doesn't fit: made for another model?")
        if not tensor.isfinite().all():
            raise InputError(f"{source}: {name} holds NaN or inf")


def assign(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy loaded tensors into the parameters of the same names, all of them or none."""
    check_tensors(parameters, tensors, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
