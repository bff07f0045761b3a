"""Several sets of examples as one prefix, side by side or as a chain.

    --concat N   each set's gists after those of the one before; no set sees another
    --chain N    the same, and each set also sees the gists of those before it, as in a joint pass
                 over all of them (recurrent compression, as in AutoCompressors); also in training

N · 16 gists stand for N times as many examples as a context holds; so do label anchors (anchors.py), put
together in the same two ways. RESULTS.md, "What helps": it is the one thing beyond the paper that helps
from C.
"""

import torch

from further import anchors
from gist import Compression, Context, Gists, HyperLlama, Rows, one_context
from llama import InputError
from run import option

OPTIONS = {
    "concat": option(kind=int, least=1, role="parts", help="the gists of N sets of examples side by side"),
    "chain": option(
        kind=int,
        least=1,
        role="parts",
        help="N sets of examples one after the other, each seeing the gists of those before it",
    ),
}


def compression(args) -> Compression | None:
    if args.chain and args.concat:
        raise InputError("--concat and --chain exclude each other")
    parts = args.chain or args.concat
    if not parts:
        return None

    of_one_set = anchors.contexts if args.anchors else one_context

    def contexts(formatter, episode, gist_ids) -> list[Context]:
        rows = [row for part in episode.split(parts) for row in of_one_set(formatter, part, gist_ids)]
        return placed(rows, joined=bool(args.chain))

    build = anchors.without_gists if args.anchors else None
    return Compression(contexts, chain if args.chain else side_by_side, parts, build)


def placed(rows: list[Context], joined: bool) -> list[Context]:
    """The same rows where they have to stand: the last token that is kept right before the query.

    joined: all rows follow one another, as in a joint pass; else only what is kept of them does.
    """
    moved = []
    end = sum(len(row.kept) for row in rows)
    for row in reversed(rows):
        moved.append(row._replace(positions=list(range(end - len(row.tokens), end))))
        end -= len(row.tokens) if joined else len(row.kept)
    return moved[::-1]


def side_by_side(hyper: HyperLlama, pieces: list[Rows]) -> Gists:
    gists = hyper.compress(pieces[0])
    for rows in pieces[1:]:
        gists = append(gists, hyper.compress(rows))
    return gists


def chain(hyper: HyperLlama, pieces: list[Rows]) -> Gists:
    gists = hyper.compress(pieces[0])
    for rows in pieces[1:]:
        before = gists.as_past(rows.tokens.shape[1])
        gists = append(gists, hyper.compress(rows, before["past"], before["mask"]))
    return gists


def append(gists: Gists, more: Gists) -> Gists:
    """One prefix after another, as far as each is real."""
    past = [(torch.cat(k, dim=2), torch.cat(v, dim=2)) for k, v in map(zip, gists.past, more.past)]
    return Gists(past, more.offset, torch.cat([real(gists), real(more)], dim=1))


def real(gists: Gists) -> torch.Tensor:
    """[B, P] which of the past is real."""
    if gists.past_mask is not None:
        return gists.past_mask
    return torch.ones(len(gists.offset), gists.length, dtype=torch.bool, device=gists.offset.device)
