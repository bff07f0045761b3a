"""Gisting: many examples in, the keys and values of a few gist tokens out.

The hypernetwork reads [BOS examples gist×G]. The keys and values at the gists, in every layer, are
cut out and become the `past` of the downstream model, which reads [BOS query]: paper, Section 3.
Training and use take these two passes. The joint pass, one row under the gist mask (Mu et al. 2023),
says the same thing as one formula; it stays here as the explanation, and the tests hold the two ways
to the same logits and gradients.

`python gist.py` is the lecture: all of this in six steps, computed and drawn (tools/lecture.py).

Shapes: B rows, T tokens, G gists, P past, L layers, K KV heads, hd head size, D width, V vocabulary.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import KV, Config, Llama, causal_mask_after, positions_of, ragged, rotary_angles, rotate


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


# ------------------------------------------------------------------------- what the first pass reads


class Context(NamedTuple):
    """One row for the hypernetwork: its tokens, where each one stands, and which ones make the prefix."""

    tokens: list[int]
    positions: list[int]
    kept: list[int]  # indices into tokens


def with_gists(tokens: list[int], gist_ids: Sequence[int]) -> Context:
    """Examples and the gists after them: the paper's row.

    The positions, and with them the offset of Appendix B, are decided here. Gists stand at positions
    0 … G-1 whatever the length of their examples, which therefore begin at a negative position: rotary
    attention sees differences only. So all queries go on at the same position, G; prefixes can be
    averaged, and other programs' caches take them as they are.
    """
    G = len(gist_ids)
    T = len(tokens) + G
    return Context([*tokens, *gist_ids], list(range(G - T, G)), list(range(T - G, T)))


@dataclass
class Rows:
    """Contexts as right-padded tensors."""

    tokens: Tensor  # [B, T]; the gists are V, V + 1, …, V + G - 1
    positions: Tensor  # [B, T]
    kept: Tensor  # [B, G] which tokens' keys and values make the prefix, as indices into T
    past_mask: Tensor | None = None  # [B, G] bool, which of `kept` are real, where their numbers differ

    @classmethod
    def of(cls, contexts: Sequence[Context], device: torch.device | str = "cpu") -> "Rows":
        tokens, positions, kept = (ragged(field, device=device) for field in zip(*contexts))
        counts = torch.tensor([len(context.kept) for context in contexts], device=device)
        equal = bool((counts == counts[0]).all())
        return cls(tokens, positions, kept, None if equal else positions_of(kept) < counts[:, None])

    @property
    def offset(self) -> Tensor:
        """[B], the position after the last one that is kept."""
        return self.positions.gather(1, self.kept).amax(1) + 1

    def to(self, device: torch.device | str) -> "Rows":
        move = lambda x: None if x is None else x.to(device, non_blocking=True)  # noqa: E731
        return Rows(*map(move, vars(self).values()))


# ---------------------------------------------------------------------------------------- the prefix


@dataclass
class Gists:
    """What the hypernetwork makes of its examples: a past, and where to go on from there.

    past       per layer (key, value), each [B, K, G, hd]: 2·L·K·G·hd numbers a row, 8.4 MB for Llama-2-7B;
               None where nothing comes before
    offset     [B], the position after the last gist (paper, Appendix B)
    past_mask  [B, G] bool, which of the past is real, where rows keep unequal numbers of tokens; else None

    Keys keep the rotation of the place where they were made, so the tokens that follow must count on
    from `offset`.
    """

    past: Sequence[KV] | None
    offset: Tensor
    past_mask: Tensor | None = None

    @property
    def length(self) -> int:
        return self.past[0][0].shape[2] if self.past else 0

    def __getitem__(self, rows: Tensor) -> "Gists":
        """Choose rows, with repetition: several queries can follow the same gists."""

        def choose(x: Tensor) -> Tensor:  # (a single row isn't copied)
            return x[rows] if len(x) > 1 else x.expand(len(rows), *x.shape[1:])

        past = self.past and [(choose(k), choose(v)) for k, v in self.past]
        return Gists(past, choose(self.offset), None if self.past_mask is None else choose(self.past_mask))

    def as_past(self, T: int, adapter: str | None = None) -> dict:
        """The arguments of `Llama.forward` for T tokens that come after this prefix, with a LoRA set on."""
        mask = None if self.past_mask is None else causal_mask_after(self.past_mask, T)
        return {"past": self.past, "offset": self.offset, "mask": mask, "adapter": adapter}


def nothing(device: torch.device | str = "cpu") -> Gists:
    """No prefix: what comes after it begins at position 0."""
    return Gists(None, torch.zeros(1, dtype=torch.long, device=device))


def one_context(formatter, episode, gist_ids: Sequence[int]) -> list[Context]:
    """All of an episode's examples in one row, as many as fit; then the gists (formatter: data.Formatter)."""
    return [with_gists(formatter.context_tokens(episode, reserved=len(gist_ids)), gist_ids)]


def one_prefix(hyper: "HyperLlama", pieces: Sequence[Rows]) -> Gists:
    (rows,) = pieces
    return hyper.compress(rows)


@dataclass(frozen=True)
class Compression:
    """How the examples of an episode become a prefix: as in the paper, or as a chapter of further/ has it."""

    contexts: Callable = one_context  # (formatter, episode, gist ids) -> the rows that are read, usually one
    prefix: Callable = one_prefix  # (hyper, the same rows of B episodes as tensors) -> their Gists
    parts: int = 1  # the prefix is made of so many sets of --shots examples
    build: Callable | None = None  # (hyper, generator): adds what else is trained, if anything


class HyperLlama(nn.Module):
    """One Llama in two roles, and the embeddings of the gist tokens.

    The gists have a table of their own, [G, D]: the vocabulary and lm_head stay as they were.

    hyper_adapter, downstream_adapter: the LoRA set that is on while examples are read, and while queries
    are answered; None is the bare base. With the same set in both, one model does both (Mu et al.'s gisting).
    """

    def __init__(
        self,
        model: Llama,
        gist_embeddings: Tensor,
        hyper_adapter: str | None = "hyper",
        downstream_adapter: str | None = None,
        compression: Compression = Compression(),
    ):
        super().__init__()
        self.model = model
        self.gists = nn.Parameter(gist_embeddings.float().clone())
        self.hyper_adapter = hyper_adapter
        self.downstream_adapter = downstream_adapter
        self.compression = compression

    @property
    def gist_ids(self) -> list[int]:
        return [self.model.config.vocab + i for i in range(len(self.gists))]

    @property
    def belongs_to(self) -> dict[str, str]:
        """What its trained tensors mean nothing without."""
        return {"base": self.model.checksum}

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings of words and gists. [B, T] ids -> [B, T, D]"""
        V = self.model.config.vocab
        words = self.model.embed_tokens(tokens.clamp(max=V - 1))
        gists = F.embedding((tokens - V).clamp(min=0), self.gists).to(words.dtype)
        return torch.where((tokens >= V)[..., None], gists, words)

    def forward(self, batch) -> tuple[Tensor, Gists]:
        """Both passes. A data.Batch -> logits at its targets [M, V], and the gists that they come after.

        Without examples to compress (batch.context is None) this is an ordinary language model.
        """
        if batch.context is None:
            gists = nothing(batch.tokens.device)
        else:
            gists = self.compression.prefix(self, batch.context)  # the first pass: LoRA on
        return self.predict(batch, gists), gists  # the second: LoRA off, or another set

    def compress(self, rows: Rows, past: Sequence[KV] | None = None, mask: Tensor | None = None) -> Gists:
        """The first pass: read the examples, keep the keys and values at the gists.

        past, mask: as Llama.forward takes them; by default nothing came before, and attention is causal,
        so that gists never see the padding after them.
        """
        x = self.embed(rows.tokens)
        kept = self.model.keys_values(x, rows.kept, rows.positions, self.hyper_adapter, past, mask)
        return Gists(kept, rows.offset, rows.past_mask)

    def predict(self, batch, gists: Gists) -> Tensor:
        """The second pass: read each query after its gists. Logits at the targets [M, V]."""
        past = gists[batch.row].as_past(batch.tokens.shape[1], self.downstream_adapter)
        return self.model(batch.tokens, **past, select=batch.select)[0]

    def joint(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Both passes as one. tokens [B, T]: each row BOS, examples, gists, BOS, query -> logits [B, T, V].

        The hypernetwork's LoRA is on up to the last gist, the downstream model's after it.
        """
        is_gist = tokens >= self.model.config.vocab
        gists_to_come = is_gist.flip(1).cumsum(1).flip(1)  # from here on, itself included
        after = (gists_to_come == 0)[..., None]  # [B, T, 1]
        if self.hyper_adapter == self.downstream_adapter:
            adapter = self.hyper_adapter
        else:
            adapter = {self.hyper_adapter: ~after, self.downstream_adapter: after}  # (None: no set at all)
        return self.model(self.embed(tokens), offset=positions, adapter=adapter, mask=gist_mask(is_gist))[0]


def averaging(parts: int) -> Compression:
    """The gists of so many sets of examples, averaged."""

    def contexts(formatter, episode, gist_ids) -> list[Context]:
        return [
            context for part in episode.split(parts) for context in one_context(formatter, part, gist_ids)
        ]

    return Compression(contexts, average, parts)


def average(hyper: HyperLlama, pieces: Sequence[Rows]) -> Gists:
    """Several sets of examples as one prefix (paper, Appendix B).

    The gists of all sets stand at the same positions: keys with the same rotation are averaged.
    """
    sets = [hyper.compress(rows) for rows in pieces]
    past = []
    for layers in zip(*(gists.past for gists in sets)):
        past.append(tuple(torch.stack(same).mean(0) for same in zip(*layers)))
    return Gists(past, sets[0].offset)


# ------------------------------------------------------------- prefixes that no hypernetwork has made


def label_anchors(formatter, episode) -> Context:
    """BOS, instruction and examples. What is kept are the last tokens of these: of BOS, of each answer.

    In-context learning gathers what an example says at its label (Wang et al. 2023, arXiv 2305.14160). The
    keys and values there are a prefix that costs no training. As after gists, queries go on right after as
    many positions as are kept.
    """
    tokens, examples = formatter.context_parts(episode)
    kept = sorted({0, len(tokens) - 1})
    for example in examples:
        tokens = tokens + example
        last = len(tokens) - 1
        while last > kept[-1] + 1 and not formatter.tokenizer.decode([tokens[last]]).strip():
            last -= 1  # a line break after the answer
        kept.append(last)
    tokens = tokens[: kept[-1] + 1]
    end = len(kept)
    return Context(tokens, list(range(end - len(tokens), end)), kept)


def keep_all(tokens: list[int]) -> Context:
    """A row of which every token is kept: few-shot prompting, as a prefix."""
    everything = list(range(len(tokens)))
    return Context(tokens, everything, everything)


@torch.no_grad()
def read_contexts(model: Llama, contexts: Sequence[Context], adapter: str | None = None) -> Gists:
    """The keys and values of what is kept of rows without gists. Nothing is trained."""
    rows = Rows.of(contexts, model.embed_tokens.weight.device)
    past = model.keys_values(rows.tokens, rows.kept, rows.positions, adapter)
    return Gists(past, rows.offset, rows.past_mask)


def mean_pooled(prefix: Gists, count: int, config: Config) -> Gists:
    """Keys and values of whole rows, averaged over `count` stretches of each (fewer where a row is shorter).

    Nothing is learned. Keys are averaged as they were before their rotation (rotated ones from different
    positions would cancel out), and then rotated for the positions at which gists stand, 0 … count - 1.
    """
    lengths = prefix.offset  # rows were kept whole, from position 0 on
    counts = lengths.clamp(max=count)
    most = int(counts.max())

    def pool(x: Tensor) -> Tensor:  # [B, K, T, hd] -> [B, K, most, hd]
        rows = []
        for row, length, parts in zip(x, lengths.tolist(), counts.tolist()):
            stretches = row[:, :length].tensor_split(parts, dim=1)
            means = torch.stack([stretch.mean(1) for stretch in stretches], dim=1)
            rows.append(F.pad(means, (0, 0, 0, most - parts)))
        return torch.stack(rows)

    positions = torch.arange(prefix.past[0][0].shape[2], device=lengths.device)[None]
    back = rotary_angles(-positions, config)
    forth = rotary_angles(positions[:, :most], config)
    past = [(rotate(pool(rotate(k, back)), forth), pool(v)) for k, v in prefix.past]
    mask = None if bool((counts == most).all()) else positions[:, :most] < counts[:, None]
    return Gists(past, counts, mask)


if __name__ == "__main__":
    from run import run_command
    from tools.lecture import main

    run_command(main)
