"""What examples cost in context, kept as keys and values, and as gists (compression included).

    python -m tools.cost RUN        for the run's model, and for Llama-2-7B
"""

import math
import statistics
from pathlib import Path

from eval import Run, ask, open_run, print_lines, run_command
from llama import Config
from tasks import MOVABLE, Parser, read_args, settle

LLAMA_2_7B = Config(32000, 4096, 32, 32, 32, 128, 11008, 1e-5, 10000.0, 4096)


def flops(c: Config, tokens: int, past: int = 0, logits: int = 0, rank: int = 0, kept: int = 0) -> int:
    """Floating-point operations of the matrix products of one forward pass; rank: of a LoRA set that acts.

    logits: at how many positions they are wanted; kept: at how many keys and values alone are wanted.
    As they are computed: every query against every key, also those that the causal mask hides.
    """
    q, kv = c.heads * c.head_size, c.kv_heads * c.head_size

    def linears(*shapes: tuple[int, int]) -> int:  # for one token
        return sum(2 * (m * n + rank * (m + n)) for m, n in shapes)

    made = linears((c.width, kv), (c.width, kv))  # keys and values
    asked = linears((c.width, q)) + 2 * 2 * (past + tokens) * q
    rest = linears((q, c.width), *[(c.width, c.hidden)] * 2, (c.hidden, c.width))
    if kept:  # the last layer but one goes on from the kept positions, and the last makes their keys and values alone
        return (c.layers - 1) * tokens * (made + asked) + ((c.layers - 2) * tokens + kept) * rest + kept * made
    layers = c.layers * tokens * (made + asked) + ((c.layers - 1) * tokens + logits) * rest
    return layers + 2 * logits * c.width * c.vocab


def print_cost(run: Run) -> None:
    args, formatter = run.args, run.formatter
    drawn = [task.evaluation(args.seed, 0, args.shots, 20)[0] for task in run.task.load(args, formatter, "test")]
    examples = round(statistics.fmean(len(formatter.context_row(e, budget=args.context - args.gists).tokens) for e in drawn))
    query = round(statistics.fmean(len(p.tokens) for e in drawn for p in ask(formatter, e, instruct=False)[0]))
    G = args.gists
    print(f"{examples} tokens of examples, {query} of a query (means of {args.data}), {G} gists; one logit row a query\n")
    adapted, weight = args.rank if run.hyper.answerer else 0, run.hyper.model.embed_tokens.weight
    for name, c, size in ((args.model, run.hyper.model.config, weight.element_size()), ("Llama-2-7B, bf16", LLAMA_2_7B, 2)):
        bytes_of = 2 * c.layers * c.kv_heads * c.head_size * size  # of one token's keys and values
        ways = {  # once, per query, tokens kept
            "in context": (0, flops(c, examples + query, logits=1), 0),
            "examples kept": (flops(c, examples, kept=examples), flops(c, query, examples, 1), examples),
            "gists": (flops(c, examples + G, rank=args.rank, kept=G), flops(c, query, G, 1, adapted), G),
        }
        once, each, _ = ways["gists"]
        lines = [[name, "GFLOP once", "GFLOP a query", "bytes kept", "gists ahead after"]]
        for way, (first, then, kept) in ways.items():
            count = math.floor((once - first) / (then - each)) + 1 if then > each else 0
            after = f"{max(1, count):,} quer{'y' if count < 2 else 'ies'}" if then > each else "never"
            lines.append([way, f"{first / 1e9:,.2f}", f"{then / 1e9:,.3f}", f"{kept * bytes_of:,}", "" if way == "gists" else after])
        print_lines(lines)
        print()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    for name in sorted(MOVABLE):
        parser.add_argument(f"--{name}", help="other than the run's")
    typed = vars(parser.parse_args())
    folder = Path(typed.pop("folder"))
    print_cost(open_run(settle(typed, read_args(folder)), folder))


if __name__ == "__main__":
    run_command(main)
