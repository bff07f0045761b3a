"""No gists at all: the prefix is read where the base gathers an example, at the last token of each answer.

The keys and values at BOS and at these tokens are a prefix of one position more than there are examples.
With an untrained LoRA set they are a control that costs no training (gist.label_anchors); training starts
there, while gist tokens start from nothing. On a small real base this is what works (docs/real.md).
"""

from gist import Compression, Context, HyperLlama, label_anchors
from run import option

OPTIONS = {
    "anchors": option(False, help="the prefix is read at the last token of each example, without gists")
}


def compression(args) -> Compression | None:
    if not args.anchors or args.concat or args.chain:  # (several sets: chain.py)
        return None
    return Compression(contexts, build=without_gists)


def without_gists(hyper: HyperLlama, generator) -> None:
    hyper.gists.requires_grad_(False)  # no row holds one


def contexts(formatter, episode, gist_ids) -> list[Context]:
    return [label_anchors(formatter, episode)]
