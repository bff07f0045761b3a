"""What examples cost in context, kept as keys and values, and as gists (compression included).

python -m tools.cost RUN        for the run's model, and for Llama-2-7B
python -m tools.cost --real     what real models need, as computed from their shapes
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import statistics
from pathlib import Path

from eval import encode_queries, gist_context
from llama import Config, InputError

# fmt: off
from run import (
    Parser, Run, add_options, open_run, portable, print_lines, read_args, resolve_args, run_command,
)
# fmt: on

SMOLLM2_1_7B = Config(49152, 2048, 24, 32, 32, 64, 8192, 1e-5, 130000.0, 8192, tied=True)
LLAMA_3_2_1B = Config(128256, 2048, 16, 32, 8, 64, 8192, 1e-5, 500000.0, 131072, tied=True)
TINYLLAMA = Config(32000, 2048, 22, 32, 4, 64, 5632, 1e-5, 10000.0, 2048)
LLAMA_2_7B = Config(32000, 4096, 32, 32, 32, 128, 11008, 1e-5, 10000.0, 4096)


def flops(c: Config, tokens: int, past: int = 0, logits: int = 0, rank: int = 0, kept: int = 0) -> int:
    """Floating-point operations of the matrix products of one forward pass; rank: of a LoRA set that acts.

    logits: at how many positions they are wanted; kept: at how many keys and values alone are wanted.
    As they are computed: every query against every key, also those that the causal mask hides.
    """
    q = c.heads * c.head_size
    kv = c.kv_heads * c.head_size

    def linears(*shapes: tuple[int, int]) -> int:  # for one token
        return sum(2 * (m * n + rank * (m + n)) for m, n in shapes)

    made = linears((c.width, kv), (c.width, kv))  # keys and values
    asked = linears((c.width, q)) + 2 * 2 * (past + tokens) * q
    rest = linears((q, c.width), *[(c.width, c.hidden)] * 2, (c.hidden, c.width))
    if kept:  # the last layer makes their keys and values alone; in the one before, only they ask
        whole = (c.layers - 2) * tokens + kept
        return ((c.layers - 1) * tokens + kept) * made + whole * (asked + rest)
    layers = c.layers * tokens * (made + asked) + ((c.layers - 1) * tokens + logits) * rest
    return layers + 2 * logits * c.width * c.vocab


def at_use(c: Config, G: int, emit: str, query: int, size: int, rank: int = 0) -> tuple[int, int]:
    """Bytes of a prefix of G positions; and operations of a query of so many tokens after it.

    emit: what gists become (--emit). size: bytes of a number.
    """
    if emit == "lora":  # half of the gists are a rank of q_proj, half of v_proj
        numbers = c.layers * (G // 2) * (2 * c.width + (c.heads + c.kv_heads) * c.head_size)
        return size * numbers, flops(c, query, 0, 1, rank) + 2 * numbers * query
    return size * 2 * c.layers * c.kv_heads * c.head_size * G, flops(c, query, G, 1, rank)


def needs(c: Config) -> dict[str, str]:
    """Weights in memory, and a training run of 10,000 steps.

    A step has 4 prefixes of 1,024 tokens, with 4 queries of 128 tokens each.
    """
    heads = 2 * c.heads + 2 * c.kv_heads
    matrices = c.layers * (c.width * c.head_size * heads + 3 * c.width * c.hidden)
    outside = (1 if c.tied else 2) * c.vocab * c.width
    nf4 = 0.5 + 1 / 64 + 4 / 64 / 256  # bytes: of a code, of a block's scale, of the scale of scales
    lora = 8 * c.layers * (c.head_size * heads + 4 * c.width + 3 * (c.width + c.hidden))
    token = 2 * 2 * c.layers * c.kv_heads * c.head_size  # bytes of its keys and values
    # Forward, and backward through the base for what lies before it: its own weights get no gradient.
    run = 10_000 * 4 * 2 * (flops(c, 1024, rank=8, kept=16) + 4 * flops(c, 128, 16, 8))
    return {
        "parameters": f"{(matrices + outside) / 1e9:.2f} billion",
        "weights in bf16": f"{2 * (matrices + outside) / 1e9:.1f} GB",
        "weights with --quantize": f"{(matrices * nf4 + 2 * outside) / 1e9:.1f} GB",
        "LoRA set and its Adam, float32": f"{12 * lora / 1e9:.2f} GB",
        "gists of a task, 16, bf16": f"{16 * token / 1e6:.1f} MB",
        "keys and values of 379 tokens, bf16": f"{379 * token / 1e6:.0f} MB",
        "operations of 10,000 steps": f"{run / 1e18:.2f} × 10¹⁸",
        "hours of it at 100 TFLOP/s (a GPU)": f"{run / 1e14 / 3600:.1f}",
        "hours of it at 0.2 TFLOP/s (two CPU cores)": f"{run / 2e11 / 3600:,.0f}",
    }


def print_needs() -> None:
    lines = [["as computed", "TinyLlama-1.1B", "Llama-3.2-1B", "SmolLM2-1.7B", "Llama-2-7B"]]
    models = [needs(c) for c in (TINYLLAMA, LLAMA_3_2_1B, SMOLLM2_1_7B, LLAMA_2_7B)]
    lines += [[name, *(model[name] for model in models)] for name in models[0]]
    print_lines(lines, total=False)


def print_cost(run: Run) -> None:
    """Means over the first draw of 20 queries of each held-out task."""
    args = run.args
    formatter = run.formatter
    tasks = run.task.load(args, formatter, "test")
    drawn = [task.evaluation(args.seed, 0, args.shots, 20)[0] for task in tasks]
    rows = [context for e in drawn for context in gist_context(run, e)]
    read = round(statistics.fmean(len(row.tokens) for row in rows))
    G = round(statistics.fmean(len(row.kept) for row in rows))
    V = run.hyper.model.config.vocab
    examples = round(statistics.fmean(sum(token < V for token in row.tokens) for row in rows))
    query = round(statistics.fmean(len(p) for e in drawn for p in encode_queries(formatter, e)[0]))
    written = portable(args)
    means = f"(means of {written['data']})"
    kind = "anchors" if args.anchors else "gists"
    print(f"{examples} tokens of examples, {query} of a query {means}, {G} {kind}; one logit row a query\n")
    adapted = args.rank if run.hyper.downstream_adapter else 0
    size = run.hyper.model.embed_tokens.weight.element_size()
    models = ((written["model"], run.hyper.model.config, size), ("Llama-2-7B, bf16", LLAMA_2_7B, 2))
    for name, c, size in models:
        kept, each = at_use(c, G, args.emit, query, size, adapted)
        once = flops(c, read, rank=args.rank, kept=G)
        in_full = size * 2 * c.layers * c.kv_heads * c.head_size * examples
        ways = {  # once, per query, bytes kept
            "in context": (0, flops(c, examples + query, logits=1), 0),
            "examples kept": (flops(c, examples, kept=examples), flops(c, query, examples, 1), in_full),
            kind: (once, each, kept),
        }
        lines = [[name, "GFLOP once", "GFLOP a query", "bytes kept", f"{kind} ahead after"]]
        for way, (first, then, bytes_kept) in ways.items():
            after = "" if way == kind else "never"
            if then > each:
                count = max(1, math.floor((once - first) / (then - each)) + 1)
                after = f"{count:,} {'query' if count == 1 else 'queries'}"
            lines.append([way, f"{first / 1e9:,.2f}", f"{then / 1e9:,.3f}", f"{bytes_kept:,}", after])
        print_lines(lines)
        print()


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="RUN", nargs="?", help="folder of a finished run")
    parser.add_argument("--real", action="store_true", help="what real models need")
    add_options(parser, "place")
    typed = vars(parser.parse_args())
    if typed.pop("real", False):
        if typed:
            raise InputError("--real takes nothing else")
        print_needs()
        return
    if "folder" not in typed:
        raise InputError("name a RUN, or --real")
    folder = Path(typed.pop("folder"))
    run = open_run(resolve_args(typed, read_args(folder)), folder)
    plain = run.args.method == "hyper" and run.hyper.compression.parts == 1 and not run.args.fuse_instruction
    if not plain or not run.hyper.gist_ids or run.task.evaluate:
        what = "only the cost of gists (or anchors) of one set of examples can be counted"
        raise InputError(f"{folder}: {what}")
    print_cost(run)


if __name__ == "__main__":
    run_command(main)
