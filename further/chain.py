"""Several sets of examples as one prefix, side by side or as a chain.

    --concat N   each set's gists after those of the one before; no set sees another
    --chain N    the same, and each set also sees the gists of those before it, as in a joint pass
                 over all of them (recurrent compression, as in AutoCompressors); also in training

N · 16 gists stand for N times as many examples as a context holds. RESULTS.md, "What helps": it is the
one thing beyond the paper that helps from C.
"""

import torch

from data import Formatter
from gist import Compression, Context, Gists, HyperLlama, Rows, with_gists
from llama import InputError
from run import option

OPTIONS = {
    "concat": option(kind=int, least=1, role="sets", help="the gists of N sets of examples side by side"),
    "chain": option(
        kind=int,
        least=1,
        role="sets",
        help="N sets of examples one after the other, each seeing the gists of those before it",
    ),
}
terms = None  # the loss stays as it is


def check(args) -> None:
    if args.method != "hyper" or args.task in ("prefix", "hyperpretrain", "sni", "symbol"):
        raise InputError("--concat and --chain belong to a hypernetwork for P3")


def compression(args) -> Compression | None:
    if args.chain and args.concat:
        raise InputError("--concat and --chain exclude each other")
    sets = args.chain or args.concat
    if not sets:
        return None

    def contexts(formatter: Formatter, episode, gist_ids) -> list[Context]:
        rows = []
        for part in episode.split(sets):
            rows.append(with_gists(formatter.context_tokens(part, reserved=len(gist_ids)), gist_ids))
        return placed(rows, len(gist_ids), joined=bool(args.chain))

    return Compression(contexts, chain if args.chain else side_by_side, sets)


def placed(rows: list[Context], G: int, joined: bool) -> list[Context]:
    """The same rows where they have to stand, the last gist at len(rows)·G - 1.

    joined: all rows follow one another, as in a joint pass; else only their gists do.
    """
    moved = []
    end = len(rows) * G
    for row in reversed(rows):
        moved.append(row._replace(positions=list(range(end - len(row.tokens), end))))
        end -= len(row.tokens) if joined else G
    return moved[::-1]


def side_by_side(hyper: HyperLlama, pieces: list[Rows]) -> Gists:
    sets = [hyper.compress(rows) for rows in pieces]
    past = sets[0].past
    for gists in sets[1:]:
        past = append(past, gists.past)
    return Gists(past, sets[-1].offset)


def chain(hyper: HyperLlama, pieces: list[Rows]) -> Gists:
    gists = hyper.compress(pieces[0])
    for rows in pieces[1:]:
        more = hyper.compress(rows, past=gists.past)
        gists = Gists(append(gists.past, more.past), more.offset)
    return gists


def append(past, more) -> list:
    return [(torch.cat(k, dim=2), torch.cat(v, dim=2)) for k, v in map(zip, past, more)]
