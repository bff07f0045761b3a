"""Gisting: many examples in, the keys and values of a few gist tokens out.

The hypernetwork reads [BOS examples gist×G]. The keys and values at the gists, in every layer, are
cut out and become the `past` of the downstream model, which reads [BOS query]: paper, Section 3.
Training and use take these two passes. The joint pass, one row under the gist mask (Mu et al. 2023),
says the same thing as one formula; it stays here as the explanation, and the tests hold the two ways
to the same logits and gradients.

`python gist.py` draws the mask and compares the two ways.

Shapes: B rows, T tokens, G gists, L layers, K KV heads, hd head size, D width, V vocabulary.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import KV, InputError, Linear, Llama, Past, Tokenizer, holes_mask, load, positions_of, ragged, reading, real
from lora import NF4Linear, add_lora, assign, load_tensors, save_tensors


def gist_mask(is_gist: Tensor) -> Tensor:
    """Who may look at whom in a joint pass. is_gist [B, T] bool -> [B, T, T] bool, True = may look.

    A run of gists ends a segment. Past the end of a segment only its gists can be seen:

        see(t, s)  =  s ≤ t  and  (gist(s) or segment(s) = segment(t))

    So what comes after the gists depends on what came before them through the gists alone, in
    every layer: their keys and values hold all that is needed to go on. That is why the joint mask
    can be replaced by two passes. Gists may stand anywhere, in several runs; later ones see earlier.
    """
    T = is_gist.shape[1]
    ends = is_gist[:, :-1] & ~is_gist[:, 1:]  # the last gist of its run [B, T-1]
    segment = torch.cat((ends.new_zeros(len(ends), 1), ends), dim=1).cumsum(1)  # [B, T]
    causal = torch.ones(T, T, dtype=torch.bool, device=is_gist.device).tril()
    return causal & (is_gist[:, None, :] | (segment[:, :, None] == segment[:, None, :]))


@dataclass
class Gists:
    """What the hypernetwork makes of its examples: a past, and where to go on from there.

    past    per layer (key, value), each [B, K, G, hd]: 2·L·K·G·hd numbers a row, 8 MiB for Llama-2-7B in bf16
    offset  [B], the position after the last gist (paper, Appendix B)
    seen    [B, G] bool, which of the past is real, where rows keep unequal numbers of tokens; else None

    Keys keep the rotation of the place where they were made, so the tokens that follow must count on
    from `offset`. Rotary attention sees differences only: were they to start at 0 instead, every
    distance between query and gist would be off by the length of the examples.
    """

    past: Past
    offset: Tensor
    seen: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Gists":
        """Choose rows, with repetition: several queries can follow the same gists."""
        seen = None if self.seen is None else self.seen[rows]
        return Gists([KV(k[rows], v[rows]) for k, v in self.past], self.offset[rows], seen)

    def before(self, T: int) -> dict:
        """What `Llama.forward` must know to read T tokens after this prefix."""
        return {"past": self.past, "offset": self.offset, "mask": None if self.seen is None else holes_mask(self.seen, T)}


class HyperLlama(nn.Module):
    """One Llama in two roles, and the embeddings of the gist tokens.

    The gists have a table of their own, [G, D]: the vocabulary and lm_head stay as they were. In a
    row of token ids, the gists are V, V + 1, …, V + G - 1.

    reader, answerer: the LoRA set that acts while examples are read, and while queries are answered;
    None is the bare base. With the same set in both, one model does both (Mu et al.'s gisting).
    """

    def __init__(self, model: Llama, embeddings: Tensor, reader: str | None = "hyper", answerer: str | None = None):
        super().__init__()
        self.model, self.reader, self.answerer = model, reader, answerer
        self.gists = nn.Parameter(embeddings.float().clone())

    @property
    def gist_ids(self) -> list[int]:
        return [self.model.config.vocab + i for i in range(len(self.gists))]

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of words and gists. [B, T] ids -> [B, T, D]"""
        V = self.model.config.vocab
        words = self.model.embed_tokens(tokens.clamp(max=V - 1))
        gists = F.embedding((tokens - V).clamp(min=0), self.gists).to(words.dtype)
        return torch.where((tokens >= V)[..., None], gists, words)

    def compress(self, tokens: Tensor, start: Tensor | None = None, kept: Tensor | None = None) -> Gists:
        """First pass. tokens [B, T]: each row BOS, examples, G gists, padding. start [B]: position of BOS.

        kept [B]: so many tokens at the beginning of each row stay in the prefix, beside the gists
        (instruction fusion, Ivison et al. 2023).

        Plain causal attention: gists never see the padding after them.
        """
        G, B = len(self.gists), len(tokens)
        start = torch.zeros_like(tokens[:, 0]) if start is None else start
        first = (tokens >= self.model.config.vocab).int().argmax(1)  # [B] where the gists begin
        at, seen = first[:, None] + torch.arange(G, device=tokens.device), None  # [B, G]
        if kept is not None:
            lead = torch.arange(int(kept.max()), device=tokens.device).expand(B, -1)
            seen = torch.cat((lead < kept[:, None], torch.ones_like(at, dtype=torch.bool)), dim=1)
            at = torch.cat((lead, at), dim=1)

        past = self.model.keys_values(self.embed(tokens), at, offset=start, adapter=self.reader)
        return Gists(past, start + first + G, seen)

    def forward(self, batch) -> Tensor:
        """Both passes. A data.Batch -> logits at its targets, [N, V].

        Without examples to compress (batch.examples is None) this is an ordinary language model.
        """
        prefix = {}
        if batch.examples is not None:
            gists = self.compress(batch.examples, kept=batch.kept)[batch.row]
            prefix = gists.before(batch.tokens.shape[1])
        return self.model(batch.tokens, **prefix, adapter=self.answerer, select=batch.select)[0]

    def joint(self, tokens: Tensor) -> Tensor:
        """The same as one pass. tokens [B, T]: each row BOS, examples, gists, BOS, query -> logits [B, T, V].

        The hypernetwork's LoRA acts up to the last gist, the downstream model's after it.
        """
        is_gist = tokens >= self.model.config.vocab
        after = (is_gist.flip(1).cumsum(1).flip(1) == 0)[..., None]  # [B, T, 1]
        adapter = {self.reader: ~after, self.answerer: after} if self.reader != self.answerer else self.reader
        return self.model(self.embed(tokens), adapter=adapter, mask=gist_mask(is_gist))[0]


def combine(hyper: HyperLlama, sets: Sequence[Sequence[int]], side_by_side: bool = False) -> Gists:
    """Several sets of examples as one prefix: averaged, or side by side (paper, Appendix B).

    sets: rows of tokens, each BOS, examples, G gists. Each row starts at the position that lets its
    gists end where they must: all at the same, so that keys with the same rotation are averaged; or
    each G after the one before. Returns one row, of G gists or of len(sets)·G.
    """
    device = hyper.gists.device
    lengths = torch.tensor([len(row) for row in sets], device=device)
    shift = torch.arange(len(sets), device=device) * (len(hyper.gists) if side_by_side else 0)
    ends = (lengths - shift).max() + shift
    gists = hyper.compress(ragged(sets, device=device), start=ends - lengths)

    def merge(x: Tensor) -> Tensor:  # [N, K, G, hd] -> [1, K, N*G or G, hd]
        return x.transpose(0, 1).flatten(1, 2)[None] if side_by_side else x.mean(0, keepdim=True)

    return Gists([KV(merge(k), merge(v)) for k, v in gists.past], ends[-1:])


@torch.no_grad()
def read_rows(model: Llama, rows: Sequence[Sequence[int]], adapter: str | None = None) -> Gists:
    """The keys and values of every token of some rows: few-shot prompting, as a prefix."""
    tokens = ragged(rows, device=model.embed_tokens.weight.device)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    past = model.keys_values(tokens, positions_of(tokens), adapter=adapter)
    return Gists(past, lengths, real(lengths, tokens.shape[1]) if len(rows) > 1 else None)


def mean_pooled(prefix: Gists, count: int) -> Gists:
    """Keys and values averaged over `count` stretches. Nothing is learned."""
    lengths = prefix.offset.tolist()
    count = min(count, *lengths)

    def pool(x: Tensor) -> Tensor:  # [B, K, T, hd] -> [B, K, count, hd]
        rows = [row[:, :length].tensor_split(count, dim=1) for row, length in zip(x, lengths)]
        return torch.stack([torch.stack([part.mean(1) for part in parts], dim=1) for parts in rows])

    return Gists([(pool(k), pool(v)) for k, v in prefix.past], prefix.offset)


# -------------------------------------------------------------------- the model that arguments describe

ANSWERERS = {"frozen": None, "lora": "downstream", "shared": "hyper"}  # --downstream -> LoRA set


def device_and_dtype(args: argparse.Namespace, whole: bool = False) -> tuple[str, torch.dtype]:
    """Where to compute and in what. whole: all weights are trained, so they stay float32: bf16 loses small updates."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        raise InputError(f"--device {device}: not available here ({str(problem).splitlines()[0]})") from None
    return device, getattr(torch, args.dtype or ("bfloat16" if device.startswith("cuda") and not whole else "float32"))


def load_base(args: argparse.Namespace, whole: bool = False) -> Llama:
    device, dtype = device_and_dtype(args, whole)
    return load(args.model, device, dtype, NF4Linear if args.quantize else Linear)


def build(args: argparse.Namespace, whole: bool = False) -> HyperLlama:
    """The model and its LoRA sets, as at the start of a run; untouched where no step is taken.

    whole: no LoRA, all parameters are trained (hyperpretraining).
    """
    model, generator = load_base(args, whole), torch.Generator().manual_seed(args.seed)
    reader, answerer = ("hyper", ANSWERERS[args.downstream]) if args.method == "hyper" else (None, "downstream")
    if whole or not args.steps:
        reader = answerer = None
    for name in dict.fromkeys(filter(None, (reader, answerer))):
        add_lora(model, name, args.rank, args.alpha, generator, keys_values_only=name != answerer)
    hyper = HyperLlama(model, first_gists(args, model, generator), reader, answerer)
    hyper.gists.requires_grad_(args.method == "hyper")
    return hyper.requires_grad_(True) if whole else hyper


def first_gists(args: argparse.Namespace, model: Llama, generator: torch.Generator) -> Tensor:
    """Gist embeddings to start from: a hyperpretrained model's own, else the embeddings of random words. [G, D]"""
    count = args.gists if args.method == "hyper" else 0
    words = model.embed_tokens.weight[torch.randperm(model.config.vocab, generator=generator)[:count]]
    own = Path(args.model) / "gists.safetensors"
    if not count or not own.exists():
        return words
    gists = load_tensors(own)[0].get("gists", words[:0])[:count]
    if len(gists) < count:
        print(f"{own}: holds {len(gists)} gists, fewer than {count}: these start as words", file=sys.stderr)
        return words
    if gists.shape != words.shape:
        raise InputError(f"{own}: gists of shape {list(gists.shape)} don't fit the model")
    return gists.to(words.device)


def checksum(model: Llama) -> str:
    """Tells models apart by tensors that are never quantized, whatever they are computed in."""
    digest = hashlib.sha256(repr(model.config).encode())
    for weight in (model.norm.weight, model.embed_tokens.weight[:256]):
        digest.update(weight.detach().bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def trained(module: nn.Module) -> dict[str, Tensor]:
    """What training leaves behind: trained parameters, and buffers (where prefixes that are trained themselves end)."""
    return trainable(module) | dict(module.named_buffers())


def load_trained(module: nn.Module, folder: Path) -> nn.Module:
    """Put a finished run's LoRA sets and gist embeddings (or its prefixes) in place."""
    path = folder / "adapters.safetensors"
    if not path.exists():
        raise InputError(f"{folder}: this run isn't finished (no {path.name}); train.py with --resume goes on with it")
    tensors, about = load_tensors(path)
    assign(trained(module), tensors, path)
    if about.get("base") != checksum(module.model):
        raise InputError(f"{path}: was trained on another model than --model")
    return module


def restore(args: argparse.Namespace, folder: Path) -> HyperLlama:
    """The model as a finished run left it."""
    return load_trained(build(args), folder)


def save(hyper: HyperLlama, tensors: dict[str, Tensor], args: argparse.Namespace, out: Path) -> None:
    """What training leaves behind. tensors: those of `trained`, whole."""
    save_tensors(out / "adapters.safetensors", tensors, {"base": checksum(hyper.model)})


# --------------------------------------------------------------------------------- a prefix as a file


def save_gists(path: Path, gists: Gists, about: dict[str, str]) -> None:
    """Keys and values of one prefix, with a note on what they belong to."""
    tensors = {"offset": gists.offset}
    for i, (k, v) in enumerate(gists.past):
        tensors |= {f"{i}.key": k, f"{i}.value": v}
    save_tensors(path, tensors, about)


def load_gists(path: Path, about: dict[str, str], device: torch.device | str, dtype: torch.dtype = torch.float32) -> Gists:
    """A saved prefix; InputError if it was made by another model or run than `about` says."""
    tensors, origin = load_tensors(path)
    for key, value in about.items():
        if origin.get(key) != value:
            raise InputError(f"{path}: made with another {key} ({origin.get(key)}, not {value})")
    with reading(path, "not a saved prefix"):
        layers = range((len(tensors) - 1) // 2)
        past = [KV(tensors[f"{i}.key"].to(device, dtype), tensors[f"{i}.value"].to(device, dtype)) for i in layers]
        return Gists(past, tensors["offset"].to(device))


# ---------------------------------------------------------------------------------------- the lecture


def demonstrate(folder: Path = Path(__file__).parent / "tiny" / "llama-c") -> None:
    """Draw the mask of a small example, and compare the joint pass with the two passes."""
    tokenizer, model = Tokenizer(folder), load(folder)
    generator = torch.Generator().manual_seed(0)
    for name in ("hyper", "downstream"):
        add_lora(model, name, rank=4, alpha=8, generator=generator)
        for path, parameter in model.named_parameters():
            if path.endswith(f"lora.{name}.B"):  # as if trained: a new set would do nothing
                parameter.data.normal_(0, 0.05, generator=generator)
    G, V = 3, model.config.vocab
    hyper = HyperLlama(model, model.embed_tokens.weight[-G:], "hyper", "downstream")
    examples = [tokenizer.bos, *tokenizer.encode("\nfox\nkilo\nowl\neast"), *range(V, V + G)]
    query = [tokenizer.bos, *tokenizer.encode("\nfox\n")]
    tokens = torch.tensor([examples + query])

    def name(t: int) -> str:
        return f"gist {t - V}" if t >= V else tokenizer.model.id_to_piece(t).replace("<0x0A>", "\\n")

    print("1. The gist mask. A row is a token that looks, a column a token that it may look at.\n")
    print("position  token")
    for t, see in enumerate(gist_mask(tokens >= V)[0].tolist()):
        marks = "".join(("# " if tokens[0, s] >= V else "o ") if seen else ". " for s, seen in enumerate(see))
        kept = "   <- its keys and values survive" if tokens[0, t] >= V else ""
        print(f"{t:8}  {name(tokens[0, t].item()):>8}  {marks}{kept}")
    print("\n# a gist, o another token, . hidden. After the gists, the examples can be reached only through them:")
    print("whatever stands there can be read later, by a second pass that has nothing else.\n")

    with torch.no_grad():
        joint = hyper.joint(tokens)[0, -1]
        gists = hyper.compress(torch.tensor([examples]))
        two, lost = (
            model(torch.tensor([query]), past=gists.past, offset=offset, adapter="downstream")[0][0, -1]
            for offset in (gists.offset, gists.offset * 0)
        )
    offset, layers, shape = gists.offset.item(), len(gists.past), list(gists.past[0][0].shape)
    numbers = sum(x.numel() for layer in gists.past for x in layer)
    print(f"2. The first pass reads positions 0 to {len(examples) - 1} and ends with the gists. What is stored: {layers} layers × (keys, values)")
    print(f"   × {shape} (rows, KV heads, gists, head size), {numbers * 4:,} bytes, and the offset {offset}: the position after the last gist.\n")
    print(f"3. The second pass reads the query at positions {offset} to {offset + len(query) - 1}. Its keys and queries are rotated there, the gists'")
    print("   keys stay rotated as they were made; attention sees the differences of positions, as in the joint pass.\n")
    print("4. Logits of the next token: the joint pass, the two passes, and two passes whose offset was forgotten.\n")
    print(f"{'next token':>14}{'joint':>10}{'two passes':>12}{'offset 0':>10}")
    for t in joint.topk(5).indices.tolist():
        print(f"{name(t):>14}{joint[t]:>10.4f}{two[t]:>12.4f}{lost[t]:>10.4f}")
    differences = [(other - joint).abs().max() for other in (two, lost)]
    print(f"{'largest difference':>24}{differences[0]:>12.1e}{differences[1]:>10.1e}")


if __name__ == "__main__":
    demonstrate()
