"""Gisting: many examples in, the keys and values of a few gist tokens out.

The hypernetwork reads [BOS examples gist×G]. The keys and values at the gists, in every layer, are
cut out and become the `past` of the downstream model, which reads [BOS query]: paper, Section 3.
Training and use take these two passes. The joint pass, one row under the gist mask (Mu et al. 2023),
says the same thing as one formula; it stays here as the explanation, and the tests hold the two ways
to the same logits and gradients.

`python gist.py` draws the mask and compares the two ways.

Shapes: B rows, T tokens, G gists, P past, L layers, K KV heads, hd head size, D width, V vocabulary.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import KV, Llama, Tokenizer, causal_mask_after, positions_of, ragged, rotary_angles, rotate


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

    The offset of Appendix B is decided here. Gists stand at positions 0 … G-1 whatever the length of
    their examples, which therefore begin at a negative position: rotary attention sees differences
    only. So all prefixes end at the same position, G; they can be averaged, and other programs' caches
    take them as they are.
    """
    G = len(gist_ids)
    T = len(tokens) + G
    return Context([*tokens, *gist_ids], list(range(G - T, G)), list(range(T - G, T)))


@dataclass
class Rows:
    """Contexts as right-padded tensors.

    tokens     [B, T]; the gists are V, V + 1, …, V + G - 1
    positions  [B, T]
    kept       [B, G] which tokens' keys and values make the prefix, as indices into T
    past_mask  [B, G] bool, which of `kept` are real where rows keep unequal numbers of tokens; else None
    """

    tokens: Tensor
    positions: Tensor
    kept: Tensor
    past_mask: Tensor | None = None

    @classmethod
    def of(cls, contexts: Sequence[Context], device: torch.device | str = "cpu") -> "Rows":
        tokens, positions, kept = (ragged(field, device=device) for field in zip(*contexts))
        counts = torch.tensor([len(context.kept) for context in contexts], device=device)
        equal = bool((counts == counts[0]).all())
        return cls(tokens, positions, kept, None if equal else positions_of(kept) < counts[:, None])

    def to(self, device: torch.device | str) -> "Rows":
        move = lambda x: None if x is None else x.to(device, non_blocking=True)  # noqa: E731
        return Rows(*map(move, vars(self).values()))


# ---------------------------------------------------------------------------------------- the prefix


@dataclass
class Gists:
    """What the hypernetwork makes of its examples: a past, and where to go on from there.

    past       per layer (key, value), each [B, K, G, hd]: 2·L·K·G·hd numbers a row, 8.4 MB for Llama-2-7B
    offset     [B], the position after the last gist (paper, Appendix B)
    past_mask  [B, G] bool, which of the past is real, where rows keep unequal numbers of tokens; else None

    Keys keep the rotation of the place where they were made, so the tokens that follow must count on
    from `offset`.
    """

    past: Sequence[KV]
    offset: Tensor
    past_mask: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Gists":
        """Choose rows, with repetition: several queries can follow the same gists."""

        def choose(x: Tensor) -> Tensor:  # (a single row isn't copied)
            return x[rows] if len(x) > 1 else x.expand(len(rows), *x.shape[1:])

        past = [(choose(k), choose(v)) for k, v in self.past]
        return Gists(past, choose(self.offset), None if self.past_mask is None else choose(self.past_mask))

    def as_past(self, T: int, adapter: str | None = None) -> dict:
        """The arguments of `Llama.forward` for T tokens that come after this prefix, with a LoRA set on."""
        mask = None if self.past_mask is None else causal_mask_after(self.past_mask, T)
        return {"past": self.past, "offset": self.offset, "mask": mask, "adapter": adapter}


def one_context(formatter, episode, gist_ids: Sequence[int]) -> list[Context]:
    """All of an episode's examples in one row, as many as fit; then the gists (formatter: data.Formatter)."""
    return [with_gists(formatter.context_tokens(episode, reserved=len(gist_ids)), gist_ids)]


def one_prefix(hyper: "HyperLlama", pieces: Sequence[Rows]) -> Gists:
    (rows,) = pieces
    return hyper.compress(rows)


@dataclass(frozen=True)
class Compression:
    """How the examples of an episode become a prefix: as in the paper, or as a chapter of further/ has it.

    contexts  (formatter, episode, gist ids) -> the rows that the hypernetwork reads, usually one
    prefix    (hyper, the same rows of B episodes as tensors) -> their Gists
    sets      the examples are so many times --shots
    build     (hyper, generator): adds what else is trained, if anything
    """

    contexts: Callable = one_context
    prefix: Callable = one_prefix
    sets: int = 1
    build: Callable | None = None


class HyperLlama(nn.Module):
    """One Llama in two roles, and the embeddings of the gist tokens.

    The gists have a table of their own, [G, D]: the vocabulary and lm_head stay as they were. In a
    row of token ids, the gists are V, V + 1, …, V + G - 1.

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

    def forward(self, batch) -> tuple[Tensor, Gists | None]:
        """Both passes. A data.Batch -> logits at its targets [M, V], and the gists that they come after.

        Without examples to compress (batch.context is None) this is an ordinary language model.
        """
        gists = None
        if batch.context is not None:
            gists = self.compression.prefix(self, batch.context)  # the first pass: LoRA on
        return self.predict(batch, gists), gists  # the second: LoRA off, or another set

    def compress(self, rows: Rows, past: Sequence[KV] | None = None, mask: Tensor | None = None) -> Gists:
        """The first pass: read the examples, keep the keys and values at the gists.

        past, mask: as Llama.forward takes them; by default nothing came before, and attention is causal,
        so that gists never see the padding after them.
        """
        x = self.embed(rows.tokens)
        kept = self.model.keys_values(x, rows.kept, rows.positions, self.hyper_adapter, past, mask)
        last = rows.positions.gather(1, rows.kept).amax(1)  # where the last gist stands
        return Gists(kept, last + 1, rows.past_mask)

    def predict(self, batch, gists: Gists | None) -> Tensor:
        """The second pass: read each query after its gists. Logits at the targets [M, V]."""
        if gists is None:
            prefix = {"adapter": self.downstream_adapter}
        else:
            prefix = gists[batch.row].as_past(batch.tokens.shape[1], self.downstream_adapter)
        return self.model(batch.tokens, **prefix, select=batch.select)[0]

    def joint(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Both passes as one. tokens [B, T]: each row BOS, examples, gists, BOS, query -> logits [B, T, V].

        The hypernetwork's LoRA is on up to the last gist, the downstream model's after it.
        """
        is_gist = tokens >= self.model.config.vocab
        after = (is_gist.flip(1).cumsum(1).flip(1) == 0)[..., None]  # no gist follows [B, T, 1]
        if self.hyper_adapter == self.downstream_adapter:
            adapter = self.hyper_adapter
        else:
            adapter = {self.hyper_adapter: ~after, self.downstream_adapter: after}
        return self.model(self.embed(tokens), offset=positions, adapter=adapter, mask=gist_mask(is_gist))[0]


def averaging(sets: int) -> Compression:
    """The gists of so many sets of examples, averaged."""

    def contexts(formatter, episode, gist_ids) -> list[Context]:
        return [context for part in episode.split(sets) for context in one_context(formatter, part, gist_ids)]

    return Compression(contexts, average, sets)


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


# ---------------------------------------------------------------------------------------- the lecture

TINY = Path(__file__).parent / "tiny"
TRAINED = Path(__file__).parent / "runs" / "p3-hyper-frozen-seed0"  # what `python train.py --task p3` leaves


def lecture() -> None:
    """The idea in a page: positions, mask, two roles, offset, what a prefix holds, and where a query looks."""
    from run import all_options, build, open_run, read_args, resolve_args  # (run.py comes after this file)
    from tools.answer import read_examples

    trained = (TRAINED / "adapters.safetensors").exists()
    run = open_run(all_options()(**read_args(TRAINED)), TRAINED) if trained else None
    hyper = run.hyper if run else build(resolve_args({"task": "p3"}))
    if not trained:  # a LoRA set that does something
        for p in (p for name, p in hyper.named_parameters() if name.endswith(".B")):
            p.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    print(f"The model: {TRAINED.name if trained else 'tiny/llama-c, with random numbers as its LoRA set'}\n")
    tokenizer = Tokenizer(TINY / "llama-c")
    rows = [(row.input, row.target) for row in read_examples(TINY / "my.jsonl")]
    examples = [tokenizer.bos, *tokenizer.encode("".join(f"\nInput:\n{x}\nOutput:\n{y}" for x, y in rows))]
    queries = [[tokenizer.bos, *tokenizer.encode(f"\nInput:\n{x}\nOutput:\n")] for x, _ in rows]
    answers = [tokenizer.encode(y)[0] for _, y in rows]
    with torch.no_grad():
        show_positions(len(examples), len(hyper.gists), len(queries[0]))
        show_mask(hyper, tokenizer)
        show_roles(hyper, examples, queries[0])
        show_prefixes(hyper, examples, queries, answers)
        show_offsets(hyper, examples, queries, answers)
        show_attention(hyper, examples, queries[0])


def show_positions(examples: int, G: int, query: int) -> None:
    print(
        "1. Positions. Examples begin at a negative one, so that the gists always stand at the same place, and"
    )
    print("   the query goes on after them: the prefix is (keys and values of the gists, offset).\n")
    print(f"   {-examples:>6} … -1      0 … {G - 1}     {G} … {G + query - 1}")
    print("   BOS, examples    gists      BOS, query")
    print("   first pass: LoRA on         second pass: LoRA off\n")


def show_mask(hyper: "HyperLlama", tokenizer: Tokenizer) -> None:
    V = hyper.model.config.vocab
    words = tokenizer.encode("fox\nkilo\nowl\neast\n")
    row = [tokenizer.bos, *words, V, V + 1, V + 2, tokenizer.bos, *tokenizer.encode("fox\n")]
    is_gist = torch.tensor([row]) >= V
    print("2. The gist mask. A row is a token that looks; # a gist, o another token, . hidden from it.\n")
    for t, sees in enumerate(gist_mask(is_gist)[0].tolist()):
        name = f"gist {row[t] - V}" if row[t] >= V else tokenizer.piece(row[t]).replace("<0x0A>", "\\n")
        marks = " ".join("." if not seen else "#" if is_gist[0, s] else "o" for s, seen in enumerate(sees))
        print(f"   {t - len(words) - 1:>3} {name:>7}  {marks}{'   kept' if is_gist[0, t] else ''}")
    print(
        "\n   After the gists, only they lead to the examples: a second pass needs nothing but what is kept.\n"
    )


def answer_logits(
    hyper: "HyperLlama", gists: Gists | None, queries: list[list[int]], shift: int = 0
) -> Tensor:
    """Logits of the token after each query. [N, V]"""
    tokens = ragged(queries)
    lengths = torch.tensor([len(query) for query in queries])
    past = {"adapter": hyper.downstream_adapter}
    if gists:
        past = gists[torch.zeros(len(queries), dtype=torch.long)].as_past(
            tokens.shape[1], hyper.downstream_adapter
        )
        past["offset"] = past["offset"] + shift
    select = torch.arange(len(queries)) * tokens.shape[1] + lengths - 1
    return hyper.model(tokens, **past, select=select)[0]


def show_roles(hyper: "HyperLlama", examples: list[int], query: list[int]) -> None:
    """Two passes against the joint pass, with LoRA in each of its states in either role."""
    rows = Rows.of([with_gists(examples, hyper.gist_ids)])
    joint = hyper.joint(torch.tensor([examples + hyper.gist_ids + query]))[0, -1]
    print("3. One base in two roles. Largest difference of the next token's logits from the joint pass:\n")
    roles = hyper.hyper_adapter, hyper.downstream_adapter
    for first, second in ((True, False), (False, False), (True, True)):
        hyper.hyper_adapter, hyper.downstream_adapter = ("hyper" if on else None for on in (first, second))
        difference = (answer_logits(hyper, hyper.compress(rows), [query])[0] - joint).abs().max()
        how = " and ".join(
            f"LoRA {'on ' if on else 'off'} for the {who}"
            for on, who in ((first, "examples"), (second, "query"))
        )
        print(f"   {how}: {difference:8.5f}{'   the two passes' if (first, second) == (True, False) else ''}")
    hyper.hyper_adapter, hyper.downstream_adapter = roles
    print()


def chance_of_answers(logits: Tensor, answers: list[int]) -> tuple[float, float]:
    """Mean probability of the right answers; and how often the right answer beats the other one."""
    choices = sorted(set(answers))
    right = torch.tensor([choices.index(answer) for answer in answers])
    best = logits[:, choices].argmax(1)
    chosen = logits.softmax(1)[torch.arange(len(answers)), torch.tensor(answers)]
    return chosen.mean().item(), (best == right).float().mean().item()


def show_prefixes(
    hyper: "HyperLlama", examples: list[int], queries: list[list[int]], answers: list[int]
) -> None:
    other = [examples[0], *examples[1:][::-1]]  # the same words in a senseless order
    print("4. What a prefix holds: the sixteen examples of tiny/my.jsonl, each asked back.\n")
    print("   prefix                       probability of the answer   right of the two")
    for name, tokens in (
        ("gists of the examples", examples),
        ("gists of the words reversed", other),
        ("none", None),
    ):
        gists = hyper.compress(Rows.of([with_gists(tokens, hyper.gist_ids)])) if tokens else None
        chance, share = chance_of_answers(answer_logits(hyper, gists, queries), answers)
        print(f"   {name:<28} {chance:>24.1%} {share:>18.0%}")
    print()


def show_offsets(
    hyper: "HyperLlama", examples: list[int], queries: list[list[int]], answers: list[int]
) -> None:
    gists = hyper.compress(Rows.of([with_gists(examples, hyper.gist_ids)]))
    print(
        "5. The offset. The same prefix, and queries that begin too early or too late by so many positions:\n"
    )
    for shift in (-128, -64, -32, -16, -4, 0, 4, 16, 32, 64, 128):
        chance, share = chance_of_answers(answer_logits(hyper, gists, queries, shift), answers)
        print(f"   {shift:>+4}  {chance:>5.1%}  {'█' * round(40 * chance)}")
    print("\n   The gists' keys stay rotated where they were made, so a query has to count on from there.\n")


def show_attention(hyper: "HyperLlama", examples: list[int], query: list[int]) -> None:
    """How the last token of a query divides its attention, in each layer, mean over heads."""
    model = hyper.model
    G = len(hyper.gists)
    gists = hyper.compress(Rows.of([with_gists(examples, hyper.gist_ids)]))
    x, positions, adapter = model.embed(torch.tensor([query]), gists.offset, hyper.downstream_adapter)
    angles = rotary_angles(positions, model.config)
    print("6. Where the query's last token looks: its attention to the gists 0 … 15, and to the rest.\n")
    for i, layer in enumerate(model.layers):
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        q = rotate(attention.heads(attention.q_proj(h, adapter)), angles)[0, :, -1]  # [H, hd]
        k, _ = attention.keys_values(h, angles, gists.past[i], adapter)
        k = k[0].repeat_interleave(len(q) // k.shape[1], dim=0)  # [H, P + T, hd]
        shares = ((k @ q[..., None])[..., 0] / q.shape[1] ** 0.5).softmax(1).mean(0)
        shades = "".join(" ░▒▓█"[min(4, round(40 * share))] for share in shares[:G].tolist())
        print(
            f"   layer {i}  |{shades}|  gists {shares[:G].sum():.0%}, the query itself {shares[G:].sum():.0%}"
        )
        x, _, _ = layer(x, angles, gists.past[i], None, adapter)


if __name__ == "__main__":
    from run import Parser, run_command

    def main() -> None:
        Parser(__doc__).parse_args()  # there are no options
        lecture()

    run_command(main)
