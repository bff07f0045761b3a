"""Instruction fusion (HINT, Ivison et al. 2023): the instruction's own keys and values stay beside the gists.

The downstream model then sees what the instruction says word for word, and the examples through the
gists. In an ablation of HINT, leaving fusion out costs most. Rows keep unequal numbers of tokens, so the
prefix has a past_mask.
"""

from gist import Compression, Context, with_gists
from llama import InputError
from run import option

OPTIONS = {
    "fuse_instruction": option(
        False, help="sni: the definition's own keys and values stay in the prefix beside the gists (HINT)"
    )
}


def check(args) -> None:
    if args.task != "sni":
        raise InputError("--fuse-instruction belongs to --task sni")


def compression(args) -> Compression | None:
    return Compression(contexts) if args.fuse_instruction else None


def contexts(formatter, episode, gist_ids) -> list[Context]:
    start, examples = formatter.context_parts(episode, reserved=len(gist_ids))
    plain = with_gists(sum(examples, start), gist_ids)
    instruction = range(len(start)) if episode.instruction else ()  # with its BOS
    return [plain._replace(kept=[*instruction, *plain.kept])]
