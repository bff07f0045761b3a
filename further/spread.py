"""Gists whose positions are spread evenly over what they compress, rather than after it.

A query then sees each gist at about the distance of the examples that it stands for. RESULTS.md,
"What helps": from a base that was hyperpretrained with gists at the end it costs a little; "Places": from one
that had them spread as well, nothing.
"""

from gist import Compression, Context
from run import option

OPTIONS = {"gists_spread": option(False, help="the gists' positions spread evenly over what they compress")}


def compression(args) -> Compression | None:
    return Compression(contexts) if args.gists_spread else None


def contexts(formatter, episode, gist_ids) -> list[Context]:
    """Gist g of G stands where (g + 1) / G of the T tokens before it have been read; the last at G - 1."""
    tokens = formatter.context_tokens(episode, reserved=len(gist_ids))
    G = len(gist_ids)
    T = len(tokens)
    positions = [*range(T), *(T * (g + 1) // G - 1 for g in range(G))]
    shift = G - T  # the last token of the examples, and the last gist, stand at T - 1
    return [Context([*tokens, *gist_ids], [p + shift for p in positions], list(range(T, T + G)))]
