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

from eval import encode_queries
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
    q, kv = c.heads * c.head_size, c.kv_heads * c.head_size

    def linears(*shapes: tuple[int, int]) -> int:  # for one token
        return sum(2 * (m * n + rank * (m + n)) for m, n in shapes)

    made = linears((c.width, kv), (c.width, kv))  # keys and values
    asked = linears((c.width, q)) + 2 * 2 * (past + tokens) * q
    rest = linears((q, c.width), *[(c.width, c.hidden)] * 2, (c.hidden, c.width))
    if kept:  # in the last layer but one only the kept positions ask, and the last makes their keys and values alone
        return (
            (c.layers - 1) * tokens * made + ((c.layers - 2) * tokens + kept) * (asked + rest) + kept * made
        )
    layers = c.layers * tokens * (made + asked) + ((c.layers - 1) * tokens + logits) * rest
    return layers + 2 * logits * c.width * c.vocab


def at_use(c: Config, args: dict, query: int, size: int, rank: int = 0) -> tuple[int, int]:
    """Bytes of a run's prefix, in numbers of so many bytes, and operations of a query of so many tokens after it."""
    G = args["gists"] * max(args.get(way) or 1 for way in ("concat", "chain"))
    if args.get("anchors"):  # BOS and a position of each example
        G = 1 + args["shots"]
    if args.get("emit") == "lora":  # half of the gists are a rank of q_proj, half of v_proj
        numbers = c.layers * (G // 2) * (2 * c.width + (c.heads + c.kv_heads) * c.head_size)
        return size * numbers, flops(c, query, 0, 1, rank) + 2 * numbers * query
    return size * 2 * c.layers * c.kv_heads * c.head_size * G, flops(c, query, G, 1, rank)


def print_needs() -> None:
    """Weights in memory, and what a training run of 10,000 steps takes: 4 prefixes of 1,024 tokens a step, 4 queries of 128 each."""
    lines = [["as computed", "TinyLlama-1.1B", "Llama-3.2-1B", "SmolLM2-1.7B", "Llama-2-7B"]]
    rows: dict[str, list[str]] = {}
    for c in (TINYLLAMA, LLAMA_3_2_1B, SMOLLM2_1_7B, LLAMA_2_7B):
        attention = c.width * c.head_size * (2 * c.heads + 2 * c.kv_heads)
        matrices = c.layers * (attention + 3 * c.width * c.hidden)
        outside = (1 if c.tied else 2) * c.vocab * c.width
        lora = (
            8
            * c.layers
            * (c.head_size * (2 * c.heads + 2 * c.kv_heads) + 4 * c.width + 3 * (c.width + c.hidden))
        )
        # forward, and backward through the base for what lies before it: the base's own weights get no gradient
        step = 4 * 2 * (flops(c, 1024, rank=8, kept=16) + 4 * flops(c, 128, 16, 8))
        for name, value in {
            "parameters": f"{(matrices + outside) / 1e9:.2f} billion",
            "weights in bf16": f"{2 * (matrices + outside) / 1e9:.1f} GB",
            "weights with --quantize": f"{(matrices * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * outside) / 1e9:.1f} GB",
            "LoRA set and its Adam, float32": f"{12 * lora / 1e9:.2f} GB",
            "gists of a task, 16, bf16": f"{2 * 2 * c.layers * c.kv_heads * c.head_size * 16 / 1e6:.1f} MB",
            "keys and values of 379 tokens, bf16": f"{2 * 2 * c.layers * c.kv_heads * c.head_size * 379 / 1e6:.0f} MB",
            "operations of 10,000 steps": f"{step * 1e4 / 1e18:.2f} × 10¹⁸",
            "hours of it at 100 TFLOP/s (a GPU)": f"{step * 1e4 / 1e14 / 3600:.1f}",
            "hours of it at 0.2 TFLOP/s (two CPU cores)": f"{step * 1e4 / 2e11 / 3600:,.0f}",
        }.items():
            rows.setdefault(name, []).append(value)
    print_lines(lines + [[name, *values] for name, values in rows.items()], total=False)


def print_cost(run: Run) -> None:
    args = run.args
    formatter = run.formatter
    drawn = [
        task.evaluation(args.seed, 0, args.shots, 20)[0] for task in run.task.load(args, formatter, "test")
    ]
    examples = round(statistics.fmean(len(formatter.context_tokens(e, reserved=args.gists)) for e in drawn))
    query = round(statistics.fmean(len(p) for e in drawn for p in encode_queries(formatter, e)[0]))
    G = args.gists
    written = portable(args)
    means = f"(means of {written['data']})"
    print(f"{examples} tokens of examples, {query} of a query {means}, {G} gists; one logit row a query\n")
    adapted = args.rank if run.hyper.downstream_adapter else 0
    size = run.hyper.model.embed_tokens.weight.element_size()
    models = ((written["model"], run.hyper.model.config, size), ("Llama-2-7B, bf16", LLAMA_2_7B, 2))
    for name, c, size in models:
        kept, each = at_use(c, vars(args), query, size, adapted)
        ways = {  # once, per query, bytes kept
            "in context": (0, flops(c, examples + query, logits=1), 0),
            "examples kept": (
                flops(c, examples, kept=examples),
                flops(c, query, examples, 1),
                size * 2 * c.layers * c.kv_heads * c.head_size * examples,
            ),
            "gists": (flops(c, examples + G, rank=args.rank, kept=G), each, kept),
        }
        once, each, _ = ways["gists"]
        lines = [[name, "GFLOP once", "GFLOP a query", "bytes kept", "gists ahead after"]]
        for way, (first, then, kept) in ways.items():
            count = math.floor((once - first) / (then - each)) + 1 if then > each else 0
            after = f"{max(1, count):,} quer{'y' if count < 2 else 'ies'}" if then > each else "never"
            lines.append(
                [
                    way,
                    f"{first / 1e9:,.2f}",
                    f"{then / 1e9:,.3f}",
                    f"{kept:,}",
                    "" if way == "gists" else after,
                ]
            )
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
    plain = run.args.method == "hyper" and run.hyper.compression.sets == 1 and not run.args.fuse_instruction
    if not plain or not run.hyper.gist_ids or run.task.evaluate:
        raise InputError(
            f"{folder}: what is counted are the gists of one set of a task's examples, nothing beside"
        )
    print_cost(run)


if __name__ == "__main__":
    run_command(main)
