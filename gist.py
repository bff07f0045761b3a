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
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import KV, Adapter, InputError, Linear, Llama, Tokenizer, holes_mask, load, positions_of, ragged, read_config
from lora import Heads, NF4Linear, Updates, add_lora, assign, load_tensors, save_tensors


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
    updates low-rank updates of the answering model instead of a past (--emit lora); else None

    Keys keep the rotation of the place where they were made, so the tokens that follow must count on
    from `offset`. Gists are made at positions 0 … G-1 whatever the length of their examples, which
    therefore begin at a negative position: rotary attention sees differences only. So all prefixes
    of a run have one offset, G (side by side: N·G); they can be averaged, and other programs' caches take them as they are.
    """

    past: Sequence[KV]
    offset: Tensor
    seen: Tensor | None = None
    updates: Updates | None = None

    def __getitem__(self, rows: Tensor) -> "Gists":
        """Choose rows, with repetition: several queries can follow the same gists."""

        def chosen(x: Tensor) -> Tensor:  # (the only row there is isn't copied)
            return x[rows] if len(x) > 1 else x.expand(len(rows), *x.shape[1:])

        seen = None if self.seen is None else chosen(self.seen)
        updates = self.updates and {path: (chosen(A), chosen(B)) for path, (A, B) in self.updates.items()}
        return Gists([(chosen(k), chosen(v)) for k, v in self.past], chosen(self.offset), seen, updates)

    def before(self, T: int, adapter: str | None = None) -> dict:
        """What `Llama.forward` must know to read T tokens after this prefix, with a LoRA set."""
        mask = None if self.seen is None else holes_mask(self.seen, T)
        return {"past": self.past, "offset": self.offset, "mask": mask, "adapter": self.acting(adapter)}

    def acting(self, adapter: str | None) -> Adapter:
        """The LoRA set, and beside it each row's own updates where there are any."""
        return adapter if self.updates is None else {"emitted": self.updates} | ({adapter: None} if adapter else {})


class HyperLlama(nn.Module):
    """One Llama in two roles, and the embeddings of the gist tokens.

    The gists have a table of their own, [G, D]: the vocabulary and lm_head stay as they were. In a
    row of token ids, the gists are V, V + 1, …, V + G - 1.

    reader, answerer: the LoRA set that acts while examples are read, and while queries are answered;
    None is the bare base. With the same set in both, one model does both (Mu et al.'s gisting).
    among: whether gists also stand among the examples; what comes after them then sees the gist mask.
    heads: what makes low-rank updates of the gists, instead of a past of them.
    spread: whether the positions of the gists are spread evenly over what they compress, rather than after it.
    """

    def __init__(
        self, model: Llama, embeddings: Tensor, reader: str | None = "hyper", answerer: str | None = None, among: bool = False,
        heads: Heads | None = None, spread: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.model, self.reader, self.answerer, self.among, self.heads, self.spread = model, reader, answerer, among, heads, spread
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

    def positions(self, tokens: Tensor) -> Tensor:
        """Where the tokens of rows stand, counted from their BOS. [B, T]"""
        if not self.spread:
            return positions_of(tokens)
        is_gist, G = tokens >= self.model.config.vocab, len(self.gists)
        before = is_gist.int().argmax(1, keepdim=True)  # so many tokens are compressed
        return torch.where(is_gist, before * is_gist.cumsum(1) // G - 1, (~is_gist).cumsum(1) - 1)

    def compress(self, tokens: Tensor, start: Tensor | None = None, kept: Tensor | None = None, past: Gists | None = None) -> Gists:
        """First pass. tokens [B, T]: each row BOS, examples, G gists, padding.

        start [B]: position of BOS; by default the one that puts the gists at 0 … G-1.
        kept [B]: so many tokens at the beginning of each row stay in the prefix, beside the gists
        (instruction fusion, Ivison et al. 2023).
        past: the gists of what came before, which these rows may see.

        Plain causal attention: gists never see the padding after them.
        """
        G, B, is_gist = len(self.gists), len(tokens), tokens >= self.model.config.vocab
        at, seen = is_gist.int().argsort(dim=1, descending=True, stable=True)[:, :G], None  # [B, G] where the gists stand
        offset, mask = self.positions(tokens), gist_mask(is_gist) if self.among else None
        last = offset.gather(1, at[:, -1:])[:, 0]
        start = G - 1 - last if start is None else start
        offset, end = start[:, None] + offset, start + last + 1
        if kept is not None:
            lead = torch.arange(int(kept.max()), device=tokens.device).expand(B, -1)
            seen = torch.cat((lead < kept[:, None], torch.ones_like(at, dtype=torch.bool)), dim=1)
            at = torch.cat((lead, at), dim=1)

        before = None if past is None else past.past
        made = self.model.keys_values(self.embed(tokens), at, offset, self.reader, before, mask)
        if self.heads is not None:  # nothing is left to look at: queries begin at 0
            return Gists([(k[:, :, :0], v[:, :, :0]) for k, v in made], torch.zeros_like(end), None, self.heads(made))
        return Gists(made, end, seen)

    def forward(self, batch) -> Tensor:
        """Both passes. A data.Batch -> logits at its targets, then at those of batch.more, [N, V].

        Without examples to compress (batch.examples is None) this is an ordinary language model.
        """
        gists, logits = None, []
        if batch.examples is not None:
            gists = chain(self, (*batch.earlier, batch.examples)) if batch.earlier else self.compress(batch.examples, kept=batch.kept)
        for part in (batch, *batch.more):
            alone = gists is None or part.row is None
            prefix = {"adapter": self.answerer} if alone else gists[part.row].before(part.tokens.shape[1], self.answerer)
            logits.append(self.model(part.tokens, **prefix, select=part.select)[0])
        return torch.cat(logits) if batch.more else logits[0]  # (cat copies, and logits are large)

    @torch.no_grad()
    def in_full(self, batch) -> Tensor:
        """What the bare base says at the targets with all examples in context: a teacher. [N, V]"""
        V, rows = self.model.config.vocab, [[] for _ in batch.examples]
        for piece in (*batch.earlier, batch.examples):
            for row, tokens in zip(rows, piece.tolist()):
                end = max(t for t, token in enumerate(tokens) if token >= V)  # padding follows the last gist
                row += [token for token in tokens[bool(row) : end] if token < V]  # one BOS is enough
        prefix = read_rows(self.model, rows)[batch.row].before(batch.tokens.shape[1])
        return self.model(batch.tokens, **prefix, select=batch.select)[0]

    def joint(self, tokens: Tensor) -> Tensor:
        """The same as one pass. tokens [B, T]: each row BOS, examples, gists, BOS, query -> logits [B, T, V].

        The hypernetwork's LoRA acts up to the last gist, the downstream model's after it.
        """
        is_gist = tokens >= self.model.config.vocab
        after = (is_gist.flip(1).cumsum(1).flip(1) == 0)[..., None]  # [B, T, 1]
        adapter = {self.reader: ~after, self.answerer: after} if self.reader != self.answerer else self.reader
        return self.model(self.embed(tokens), offset=self.positions(tokens), adapter=adapter, mask=gist_mask(is_gist))[0]


def combine(hyper: HyperLlama, sets: Sequence[Sequence[int]], way: str = "average") -> Gists:
    """Several sets of examples as one prefix. Returns one row, of G gists (average) or of len(sets)·G.

    sets: rows of tokens, each BOS, examples, G gists
    way   "average"  the gists of all stand at the same positions, so that keys with the same rotation are averaged (paper, Appendix B)
          "concat"   side by side, each G after the one before
          "chain"    one after the other as in a joint pass: each set sees the gists of those before it
    """
    device, side_by_side = hyper.gists.device, way == "concat"
    if way == "chain":
        return chain(hyper, [torch.tensor([row], device=device) for row in sets])
    lengths = torch.tensor([len(row) for row in sets], device=device)
    shift = torch.arange(len(sets), device=device) * side_by_side
    gists = hyper.compress(ragged(sets, device=device), start=(1 + shift) * len(hyper.gists) - lengths)

    def merge(x: Tensor) -> Tensor:  # [N, K, G, hd] -> [1, K, N*G or G, hd]
        return x.transpose(0, 1).flatten(1, 2)[None] if side_by_side else x.mean(0, keepdim=True)

    return Gists([(merge(k), merge(v)) for k, v in gists.past], gists.offset[-1:])


def chain(hyper: HyperLlama, pieces: Sequence[Tensor]) -> Gists:
    """Piece by piece, so that all the gists together see more than one context. The last stands at len(pieces)·G - 1.

    pieces: as `compress` reads them, each [B, T]
    """
    V = hyper.model.config.vocab
    start = len(pieces) * len(hyper.gists) - sum(p.shape[1] - (p >= V).flip(1).int().argmax(1) for p in pieces)  # [B]
    gists = None
    for piece in pieces:
        more = hyper.compress(piece, start, past=gists)
        past = more.past if gists is None else [(torch.cat(k, 2), torch.cat(v, 2)) for k, v in map(zip, gists.past, more.past)]
        gists, start = Gists(past, more.offset), more.offset
    return gists


@torch.no_grad()
def read_rows(model: Llama, rows: Sequence[Sequence[int]], adapter: str | None = None) -> Gists:
    """The keys and values of every token of some rows: few-shot prompting, as a prefix."""
    tokens = ragged(rows, device=model.embed_tokens.weight.device)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    past = model.keys_values(tokens, adapter=adapter)
    return Gists(past, lengths, positions_of(tokens) < lengths[:, None] if len(rows) > 1 else None)


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
    if whole and args.dtype == "bfloat16":
        raise InputError("--dtype bfloat16: all parameters are trained, so they are held in float32")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
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
    gists, heads = first_gists(args, model, generator), Heads(model, generator) if args.emit == "lora" else None
    hyper = HyperLlama(model, gists, reader, answerer, bool(args.gists_every), heads, args.gists_spread)
    hyper.gists.requires_grad_(args.method == "hyper")
    return hyper.requires_grad_(True) if whole else hyper


def first_gists(args: argparse.Namespace, model: Llama, generator: torch.Generator) -> Tensor:
    """Gist embeddings to start from: a hyperpretrained model's own, else the embeddings of random words. [G, D]"""
    count = args.gists if args.method == "hyper" else 0
    if count > model.config.vocab:
        raise InputError(f"--gists {count}: gists start as words, and the vocabulary has {model.config.vocab}")
    words = model.embed_tokens.weight[torch.randperm(model.config.vocab, generator=generator)[:count]]
    own = Path(args.model) / "gists.safetensors"
    if not count or not own.exists():
        return words
    gists = load_tensors(own)[0].get("gists", words[:0])
    if gists.dim() != 2 or not gists.is_floating_point() or not gists.isfinite().all():
        raise InputError(f"{own}: gists aren't rows of finite numbers")
    gists = gists[:count]
    if len(gists) < count:
        print(f"{own}: holds {len(gists)} gists, fewer than {count}: these start as words", file=sys.stderr)
        return words
    if gists.shape != words.shape:
        raise InputError(f"{own}: gists of shape {list(gists.shape)} don't fit the model")
    return gists.to(words.device)


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
    check_origin(path, about, module)
    return module


def origin(module: nn.Module) -> dict[str, str]:
    """What trained tensors mean nothing without: their base, and (prefix tuning) the tasks."""
    return {"base": module.model.checksum} | ({"tasks": module.tasks} if hasattr(module, "tasks") else {})


def check_origin(path: Path, about: dict[str, str], module: nn.Module) -> None:
    for key, value in origin(module).items():
        if about.get(key) != value:
            raise InputError(f"{path}: was trained on {'another model than --model' if key == 'base' else 'other tasks, or in another order, than --data has'}")


def restore(args: argparse.Namespace, folder: Path) -> HyperLlama:
    """The model as a finished run left it."""
    return load_trained(build(args), folder)


def save(hyper: HyperLlama, tensors: dict[str, Tensor], args: argparse.Namespace, out: Path) -> None:
    """What training leaves behind. tensors: those of `trained`, whole."""
    save_tensors(out / "adapters.safetensors", tensors, origin(hyper))


# --------------------------------------------------------------------------------- a prefix as a file


def save_gists(path: Path, gists: Gists, about: dict[str, str]) -> None:
    """Keys and values of one prefix at positions 0 … G-1, with a note on what they belong to.

    "0.key", "0.value", … are each [1, K, G, hd], as transformers' DynamicCache.update takes them.
    """
    tensors = {"offset": gists.offset}
    for i, (k, v) in enumerate(gists.past):
        tensors |= {f"{i}.key": k, f"{i}.value": v}
    save_tensors(path, tensors, about)


def load_gists(path: Path, about: dict[str, str], model: Llama) -> Gists:
    """A saved prefix; InputError if it was made by another model or run than `about` says, or doesn't fit the model."""
    tensors, origin = load_tensors(path)
    for key, value in about.items():
        if origin.get(key) != value:
            raise InputError(f"{path}: made with another {key} ({origin.get(key)}, not {value})")
    c, embedding = model.config, model.embed_tokens.weight
    names = {f"{i}.{part}" for i in range(c.layers) for part in ("key", "value")}
    if tensors.keys() != names | {"offset"}:
        raise InputError(f"{path}: not a saved prefix of a model of {c.layers} layers")
    offset, first = tensors["offset"], tensors["0.key"]
    shape = (1, c.kv_heads, first.shape[-2] if first.dim() == 4 else 0, c.head_size)
    for name in names:
        x = tensors[name]
        if not x.numel() or x.shape != shape or not x.is_floating_point() or not x.isfinite().all():
            raise InputError(f"{path}: {name} isn't {list(shape)} finite numbers")
    if offset.shape != (1,) or offset.dtype != torch.int64 or offset.item() != shape[2]:
        raise InputError(f"{path}: the offset isn't the position after its gists")
    tensors = {name: tensor.to(embedding.device, embedding.dtype) for name, tensor in tensors.items() if name != "offset"}
    return Gists([(tensors[f"{i}.key"], tensors[f"{i}.value"]) for i in range(c.layers)], offset.to(embedding.device))


# ---------------------------------------------------------------------------------------- the lecture


def demonstrate(folder: Path = Path(__file__).parent / "tiny" / "llama-c") -> None:
    """Draw the mask of a small example, compare the joint pass with the two passes, and forget the offset."""
    tokenizer, model, V = Tokenizer(folder), load(folder), read_config(folder).vocab
    own = load_tensors(folder / "gists.safetensors")[0]["gists"]
    colour = {"#": "\033[33m#\033[0m", "o": "\033[36mo\033[0m"} if sys.stdout.isatty() else {}

    def name(t: int) -> str:
        return f"gist {t - V}" if t >= V else tokenizer.model.id_to_piece(t).replace("<0x0A>", "\\n")

    few, query = HyperLlama(model, own[:3], None), [tokenizer.bos, *tokenizer.encode("fox\n")]
    row = torch.tensor([[tokenizer.bos, *tokenizer.encode("fox\nkilo\nowl\neast\n"), *few.gist_ids, *query]])
    print("1. The gist mask. A row is a token that looks, a column a token that it may look at.\n")
    print("position  token")
    for t, see in enumerate(gist_mask(row >= V)[0].tolist()):
        marks = [("#" if row[0, s] >= V else "o") if seen else "." for s, seen in enumerate(see)]
        kept = "  <- its keys and values survive" if row[0, t] >= V else ""
        print(f"{t:8}  {name(row[0, t].item()):>8}  {' '.join(colour.get(mark, mark) for mark in marks)}{kept}")
    print("\n# a gist, o another token, . hidden. After the gists, the examples can be reached only through them:")
    print("whatever stands there can be read later, by a second pass that has nothing else.\n")

    pairs = {"fox": "kilo", "owl": "east", "cat": "kilo", "dog": "west", "pig": "east", "duck": "west"}
    hyper, text = HyperLlama(model, own, None), "".join(f"{word}\n{label}\n" for word, label in list(pairs.items()) * 2)
    examples = torch.tensor([[tokenizer.bos, *tokenizer.encode(text), *hyper.gist_ids]])
    G, L = len(own), examples.shape[1]
    gists, late = hyper.compress(examples), hyper.compress(examples, start=torch.zeros(1, dtype=torch.long))
    shape, numbers = list(gists.past[0][0].shape), sum(x.numel() for layer in gists.past for x in layer)
    print(f"2. Now {len(pairs)} pairs, twice: fox is kilo, owl is east, … The first pass reads {L} tokens at positions {G - L} to {G - 1}, the gists")
    print(f"   at 0 to {G - 1}. What is stored: {len(gists.past)} layers × (keys, values) × {shape} (rows, KV heads, gists, head size), {numbers * 4:,} bytes,")
    print(f"   and the offset {gists.offset.item()}: the position after the last gist.\n")
    print(f"3. The second pass reads a query at positions {G} to {G + len(query) - 1}. Its keys and queries are rotated there, the gists' keys stay")
    print("   rotated as they were made; attention sees the differences of positions, as in the joint pass.\n")
    print("4. Logits of the next token after each question: in one joint pass; in two passes; in two passes whose first")
    print(f"   began at 0, so that the gists stand at {L - G} to {L - 1}, and whose second forgot that and began at 0, too.\n")
    print(f"{'question':>10}{'next token':>14}{'joint':>10}{'two passes':>12}{'offset forgotten':>18}   right answer")
    for word, label in pairs.items():
        tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(f"{word}\n")]])
        with torch.no_grad():
            joint = hyper.joint(torch.cat((examples, tokens), dim=1))[0, -1]
            two, lost = (model(tokens, past=g.past, offset=o)[0][0, -1] for g, o in ((gists, gists.offset), (late, gists.offset * 0)))
        for t in joint.topk(2).indices.tolist():
            best = [" *" if logits.argmax() == t else "  " for logits in (joint, two, lost)]
            right = f"   {label}" if t == joint.argmax() else ""
            print(f"{word if right else '':>10}{name(t):>14}{joint[t]:>8.2f}{best[0]}{two[t]:>10.2f}{best[1]}{lost[t]:>16.2f}{best[2]}{right}")
    print(f"\n* the largest logit of its column. Joint and two passes differ by at most {(two - joint).abs().max():.0e} in the last question,")
    print(f"  a forgotten offset by {(lost - joint).abs().max():.1f}.")


if __name__ == "__main__":
    from tools import run_command

    run_command(demonstrate)
