"""Gists among the examples: a part of them after every N examples, rather than all at the end.

A run of gists ends a segment (gist.gist_mask): what comes after it sees the segment through its gists
alone, and later gists see earlier ones. So each part compresses few examples, as in the many-shot
compression of arXiv 2412.17483. RESULTS.md, "What helps": from a base that was hyperpretrained with all
gists at the end, this is far worse, since it has to learn another place for them; "Places": hyperpretrained
further with gists among the text, it is better, and still worse than at the end; "Tokens a gist": only where
a gist stands for four examples is it better than at the end.
"""

from gist import Compression, Context, Gists, HyperLlama, Rows, gist_mask
from llama import InputError
from run import option

OPTIONS = {"gists_every": option(0, help="a part of the gists after every N examples (0: all at the end)")}


def check(args) -> None:
    if args.shots and args.gists_every > args.shots and args.task != "symbol":  # (shots per class)
        raise InputError(f"--gists-every {args.gists_every}: there are only {args.shots} --shots")


def compression(args) -> Compression | None:
    if not args.gists_every:
        return None

    def contexts(formatter, episode, gist_ids) -> list[Context]:
        start, examples = formatter.context_parts(episode, reserved=len(gist_ids))
        return [context_with_gists_among(start, examples, list(gist_ids), args.gists_every)]

    return Compression(contexts, prefix)


def context_with_gists_among(
    start: list[int], examples: list[list[int]], gist_ids: list[int], every: int
) -> Context:
    """The gists in parts of about equal size, each after `every` examples (the last after the rest)."""
    parts = max(1, -(-len(examples) // every))
    tokens = list(start)
    kept = []
    for n in range(parts):
        for example in examples[n * every : (n + 1) * every]:
            tokens += example
        part = gist_ids[n * len(gist_ids) // parts : (n + 1) * len(gist_ids) // parts]
        kept += range(len(tokens), len(tokens) + len(part))
        tokens += part
    end = len(gist_ids)
    return Context(tokens, list(range(end - len(tokens), end)), kept)


def prefix(hyper: HyperLlama, pieces: list[Rows]) -> Gists:
    (rows,) = pieces
    return hyper.compress(rows, mask=gist_mask(rows.tokens >= hyper.model.config.vocab))
