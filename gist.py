"""Gisting: many examples in, the keys and values of a few gist tokens out.

The hypernetwork reads [BOS examples gist×G]. The keys and values at the gists, in every layer, are
cut out and become the `past` of the downstream model, which reads [BOS query]: paper, Section 3.
Training and use take these two passes. The joint pass, one row under the gist mask (Mu et al. 2023),
says the same thing as one formula; it stays here as the explanation, and the tests hold the two ways
to the same logits and gradients.

`python gist.py` draws the mask and compares the two ways.

Shapes: B rows, T tokens, G gists, L layers, K KV heads, hd head size, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import InputError, Llama, Past, Tokenizer, holes_mask, load, positions_of, ragged
from lora import add_lora, load_tensors, save_tensors


def gist_mask(is_gist: Tensor) -> Tensor:
    """Who may look at whom in a joint pass. is_gist [B, T] bool -> [B, T, T] bool, True = may look.

    A run of gists ends a segment. Past the end of a segment only its gists can be seen:

        see(t, s)  =  s ≤ t  and  (gist(s) or segment(s) = segment(t))

    So what stands behind the gists depends on what stands before them through the gists alone, in
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
        return Gists([(k[rows], v[rows]) for k, v in self.past], self.offset[rows], seen)

    def before(self, T: int) -> dict:
        """What `Llama.forward` must know to read T tokens behind this prefix."""
        return {"past": self.past, "offset": self.offset, "mask": None if self.seen is None else holes_mask(self.seen, T)}


class HyperLlama(nn.Module):
    """One Llama in two roles, and the embeddings of the gist tokens.

    The gists have a table of their own, [G, D]: the vocabulary and lm_head stay as they were. In a
    row of token ids, the gists are V, V + 1, …, V + G - 1.

    hyper, downstream: the LoRA set that acts in each role, None for the bare base. With the same set
    in both, one model does both (Mu et al.'s gisting).
    """

    def __init__(self, model: Llama, embeddings: Tensor, hyper: str | None = "hyper", downstream: str | None = None):
        super().__init__()
        self.model, self.hyper, self.downstream = model, hyper, downstream
        self.gists = nn.Parameter(embeddings.float().clone())

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

        Plain causal attention: gists never see the padding behind them.
        """
        G, B = len(self.gists), len(tokens)
        start = torch.zeros_like(tokens[:, 0]) if start is None else start
        first = (tokens >= self.model.config.vocab).int().argmax(1)  # [B] where the gists begin
        at, seen = first[:, None] + torch.arange(G, device=tokens.device), None  # [B, G]
        if kept is not None:
            lead = torch.arange(int(kept.max()), device=tokens.device).expand(B, -1)
            seen = torch.cat((lead < kept[:, None], torch.ones_like(at, dtype=torch.bool)), dim=1)
            at = torch.cat((lead, at), dim=1)

        _, past = self.model(self.embed(tokens), offset=start, adapter=self.hyper, keep=at)
        return Gists(past, start + first + G, seen)

    def forward(self, batch) -> Tensor:
        """Both passes. A data.Batch -> logits at its targets, [N, V].

        Without examples to compress (batch.examples is None) this is an ordinary language model.
        """
        prefix = {}
        if batch.examples is not None:
            gists = self.compress(batch.examples, kept=batch.kept)[batch.row]
            prefix = gists.before(batch.tokens.shape[1])
        return self.model(batch.tokens, **prefix, adapter=self.downstream, select=batch.select)[0]

    def joint(self, tokens: Tensor) -> Tensor:
        """The same as one pass. tokens [B, T]: each row BOS, examples, gists, BOS, query -> logits [B, T, V].

        The hypernetwork's LoRA acts up to the last gist, the downstream model's behind it.
        """
        is_gist = tokens >= self.model.config.vocab
        behind = (is_gist.flip(1).cumsum(1).flip(1) == 0)[..., None]  # [B, T, 1]
        adapter = {self.hyper: ~behind, self.downstream: behind} if self.hyper != self.downstream else self.hyper
        return self.model(self.embed(tokens), adapter=adapter, mask=gist_mask(is_gist))[0]


def combine(hyper: HyperLlama, sets: Sequence[Sequence[int]], side_by_side: bool = False) -> Gists:
    """Several sets of examples as one prefix: averaged, or side by side (paper, Appendix B).

    sets: rows of tokens, each BOS, examples, G gists. Each row starts at the position that lets its
    gists end where they must: all at the same, so that keys with the same rotation are averaged; or
    each G behind the one before. Returns one row, of G gists or of len(sets)·G.
    """
    device = hyper.gists.device
    lengths = torch.tensor([len(row) for row in sets], device=device)
    behind = torch.arange(len(sets), device=device) * (len(hyper.gists) if side_by_side else 0)
    ends = (lengths - behind).max() + behind
    gists = hyper.compress(ragged(sets, device=device), start=ends - lengths)

    def merge(x: Tensor) -> Tensor:  # [N, K, G, hd] -> [1, K, N*G or G, hd]
        return x.transpose(0, 1).flatten(1, 2)[None] if side_by_side else x.mean(0, keepdim=True)

    return Gists([(merge(k), merge(v)) for k, v in gists.past], ends[-1:])


# ------------------------------------------------------------------------------------- prefix tuning


class SoftPrefix(nn.Module):
    """Prefixes that are trained themselves, one for each of R tasks, in front of a frozen Llama.

    kind  "flat"       the keys and values are the parameters (prefix tuning, Li and Liang 2021)
          "reparam"    they are the outputs of an MLP: [P, D] -> Linear -> tanh -> 2·L·K·hd
          "propagate"  P slots pass through the layers, one added vector per layer and slot: half as
                       many parameters as flat keys and values (prefix-propagation, Li et al. 2023)
    """

    def __init__(self, model: Llama, tasks: int, length: int, kind: str, generator: torch.Generator):
        super().__init__()
        c = model.config
        self.model, self.kind, self.downstream = model, kind, None
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
        else:  # the slots start as words; nothing is added in the layers behind the first
            words = torch.randperm(c.vocab, generator=generator)[: tasks * length].to(device)
            table = torch.zeros(c.layers, tasks, length, c.width, device=device)
            table[0] = model.embed_tokens.weight[words].view(tasks, length, c.width)
            self.table = nn.Parameter(table)

    def past(self) -> Past:
        """Per layer keys and values [R, K, P, hd]."""
        c, dtype = self.model.config, self.model.embed_tokens.weight.dtype
        if self.kind == "propagate":
            return self.propagated()
        table = self.table
        if self.kind == "reparam":
            table = (table @ self.first).tanh() @ self.second  # [R, P, 2·L·K·hd]
            table = table.unflatten(-1, (c.layers, 2, c.kv_heads, c.head_size)).permute(2, 3, 0, 4, 1, 5)
        return [(k.to(dtype), v.to(dtype)) for k, v in table]

    def propagated(self) -> Past:
        """Slots see nothing but slots, so they can be read alone, before any query."""

        def add(vectors: Tensor):
            return lambda block, arguments: (arguments[0] + vectors.to(arguments[0].dtype), *arguments[1:])

        hooks = [layer.register_forward_pre_hook(add(p)) for layer, p in zip(self.model.layers, self.table)]
        try:
            slots = torch.zeros_like(self.table[0], dtype=self.model.embed_tokens.weight.dtype)
            return self.model(slots, keep=positions_of(slots))[1]
        finally:
            for hook in hooks:
                hook.remove()

    def prefix(self) -> Gists:
        return Gists(self.past(), self.offset)

    @torch.no_grad()
    def start_from(self, gists: Gists) -> None:
        """Take keys, values and offsets as the flat prefix to start from."""
        self.table.copy_(torch.stack([torch.stack(layer) for layer in gists.past]))
        self.offset.copy_(gists.offset)

    def forward(self, batch) -> Tensor:
        """A data.Batch, in which `row` says the task of each query -> logits at its targets, [N, V]."""
        before = self.prefix()[batch.row].before(batch.tokens.shape[1])
        return self.model(batch.tokens, **before, select=batch.select)[0]


HIDDEN = 512  # most hidden units of the MLP that makes a prefix


# --------------------------------------------------------------------------------- a prefix as a file


def save_gists(path: Path, gists: Gists, about: dict[str, str]) -> None:
    """Keys and values of one prefix, with a note on what they belong to."""
    tensors = {"offset": gists.offset}
    for i, (k, v) in enumerate(gists.past):
        tensors |= {f"{i}.key": k, f"{i}.value": v}
    save_tensors(path, tensors, about)


def load_gists(path: Path, about: dict[str, str], device: torch.device | str, dtype: torch.dtype = torch.float32) -> Gists:
    """A saved prefix; InputError if it was made by another model or run than `about` says."""
    tensors, found = load_tensors(path)
    for key, value in about.items():
        if found.get(key) != value:
            raise InputError(f"{path}: made with another {key} ({found.get(key)}, not {value})")
    layers = range((len(tensors) - 1) // 2)
    try:
        past = [(tensors[f"{i}.key"].to(device, dtype), tensors[f"{i}.value"].to(device, dtype)) for i in layers]
        return Gists(past, tensors["offset"].to(device))
    except KeyError as name:
        raise InputError(f"{path}: not a saved prefix (no tensor {name})") from None


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
    hyper = HyperLlama(model, model.embed_tokens.weight[-G:], downstream="downstream")
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
    print("\n# a gist, o another token, . hidden. Behind the gists, the examples can be reached only through them:")
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
