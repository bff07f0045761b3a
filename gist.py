"""Gisting: many examples in, the keys and values of a few gist tokens out.

The hypernetwork reads [BOS examples gist×G]. The keys and values at the gists, in every layer, are
cut out and become the `past` of the downstream model, which reads [BOS query]: paper, Section 3.
Training and use take these two passes. The joint pass, one row under the gist mask (Mu et al. 2023),
says the same thing as one formula; it stays here as the explanation, and the tests hold the two ways
to the same logits and gradients.

`python gist.py` draws the mask and compares the two ways.

Shapes: B rows, T tokens, G gists, L layers, K KV heads, hd head size, D width, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llama import Llama, Past, Tokenizer, holes_mask, load
from lora import add_lora


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
    seen    [B, P] bool, which of the past is real, where rows keep unequal numbers of tokens; else None

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
        gists = self.gists[(tokens - V).clamp(min=0)].to(words.dtype)
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
        _, present = self.model(self.embed(tokens), offset=start, adapter=self.hyper, keys_values_only=True)
        at, seen = first[:, None] + torch.arange(G, device=tokens.device), None  # [B, G]
        if kept is not None:
            lead = torch.arange(int(kept.max()), device=tokens.device).expand(B, -1)
            seen = torch.cat((lead < kept[:, None], torch.ones_like(at, dtype=torch.bool)), dim=1)
            at = torch.cat((lead, at), dim=1)

        def cut(x: Tensor) -> Tensor:  # [B, K, T, hd] -> [B, K, P, hd]
            return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        return Gists([(cut(k), cut(v)) for k, v in present], start + first + G, seen)

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

    names = [f"gist {t - V}" if t >= V else tokenizer.model.id_to_piece(t).replace("<0x0A>", "\\n") for t in tokens[0].tolist()]
    print("The gist mask. A row is a token that looks, a column a token that it may look at.\n")
    for t, see in enumerate(gist_mask(tokens >= V)[0].tolist()):
        marks = "".join(("# " if tokens[0, s] >= V else "o ") if seen else ". " for s, seen in enumerate(see))
        print(f"{t:4} {names[t]:>8}  {marks}")
    print("\n# a gist, o another token, . hidden. Behind the gists, the examples can be reached only through them.")

    with torch.no_grad():
        joint = hyper.joint(tokens)[:, len(examples) :]
        gists = hyper.compress(torch.tensor([examples]))
        offset = gists.offset.item()
        two, _ = model(torch.tensor([query]), past=gists.past, offset=gists.offset, adapter="downstream")
        lost, _ = model(torch.tensor([query]), past=gists.past, offset=gists.offset * 0, adapter="downstream")
    keys = gists.past[0][0]
    print(f"\nTwo passes: the first ends with the gists, and {len(gists.past)} layers × (keys, values) × {list(keys.shape)} "
          f"survive.\nThe second reads the query at positions {offset} to {offset + len(query) - 1}: the offset is {offset}.\n")  # fmt: skip
    print("Largest difference of a logit from the joint pass")
    print(f"  two passes                         {(two - joint).abs().max():.1e}")
    print(f"  two passes, offset forgotten       {(lost - joint).abs().max():.1e}")


if __name__ == "__main__":
    demonstrate()
