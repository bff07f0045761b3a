"""Own examples: compress them with a run's hypernetwork, keep their gists, answer after them.

    python -m tools.answer RUN --examples FILE --save FILE       .jsonl with input and output -> .safetensors
    python -m tools.answer RUN --gists FILE --input TEXT         the model writes an answer
    python -m tools.answer RUN --gists FILE --options A,B        chooses one, for each line of stdin
"""

import hashlib
import sys
from pathlib import Path

import torch

from data import PLAIN, Episode, Example, report
from eval import Run, ask, open_run, run_command, score_options, write_answers
from gist import Gists, checksum, load_gists, save_gists
from llama import InputError
from tasks import MOVABLE, TASKS, Parser, read_args, settle
from tasks.rows import JsonLines, as_text


def belongs_to(run: Run, folder: Path) -> dict[str, str]:
    """Checksums of the model and the run that make and read a prefix: it means nothing to others."""
    trained = hashlib.sha256((folder / "adapters.safetensors").read_bytes())
    return {"model": checksum(run.hyper.model), "run": trained.hexdigest()[:16]}


def layout(run: Run):
    """The layout that the run was trained with, or one of them."""
    return getattr(run.task, "LAYOUT", PLAIN)


@torch.no_grad()
def compress_examples(run: Run, path: Path) -> Gists:
    """The gists of a user's own examples, a .jsonl file with input and output; says what that saves."""
    examples = [
        Example(*(as_text(row.get(field), f"{path}: line {i + 1}: {field}") for field in ("input", "output")))
        for i, row in enumerate(JsonLines(path))
    ]
    if not examples:
        raise InputError(f"{path}: holds no examples")
    row = run.formatter.context_row(Episode([], examples, layout(run)), run.hyper.gist_ids)
    left_out = row.left_out["shots left out"]
    if left_out == len(examples):
        raise InputError(f"{path}: no example fits into {run.args.context} tokens")
    if left_out:
        print(report(row.left_out), file=sys.stderr)
    gists = run.hyper.compress(torch.tensor([row.tokens], device=run.device))
    size = sum(x.numel() * x.element_size() for layer in gists.past for x in layer)
    count = len(run.hyper.gists)
    read = len(row.tokens) - count
    print(f"{len(examples) - left_out} examples, {read} tokens, became {count} gists: keys and values of {size:,} bytes "
          f"instead of {size // count * read:,}, {read / count:.0f} times as many")  # fmt: skip
    return gists


@torch.no_grad()
def answer(run: Run, gists: Gists, text: str, options: list[str]) -> str:
    """The answer to one input after a prefix: the best option with its probability, or generated text."""
    episode = Episode([Example(text, "", tuple(options))], [], layout(run))
    (prompt,), choices = ask(run.formatter, episode, instruct=False)
    if options:
        mean = run.args.score == "mean"
        (scores,) = score_options(run.hyper.model, [prompt.tokens], choices, gists, run.hyper.answerer, mean)
        shares = torch.tensor(scores).softmax(0).tolist()
        best = max(range(len(options)), key=scores.__getitem__)
        return f"{options[best]}  ({', '.join(f'{option} {100 * share:.0f} %' for option, share in zip(options, shares))})"
    return write_answers(run, episode, [prompt.tokens], gists, run.hyper.answerer)[0]


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="RUN", help="folder of a finished run with a hypernetwork")
    add("--examples", metavar="FILE", help="compress own examples (.jsonl: input, output)")
    add("--save", metavar="FILE", help="keep their gists (.safetensors)")
    add("--gists", metavar="FILE", help="answer after gists that were kept")
    add("--input", metavar="TEXT", help="what to answer (default: each line of stdin)")
    add("--options", metavar="A,B,…", help="answers to choose from (default: the model writes its own)")
    for name in sorted(MOVABLE - {"data"}):
        add(f"--{name}", help="other than the run's")
    typed = vars(parser.parse_args())
    folder, (examples, save, kept, text, options) = Path(typed.pop("folder")), (typed.pop(n, None) for n in ("examples", "save", "gists", "input", "options"))
    if (examples is None) == (kept is None):
        raise InputError("name either --examples FILE or --gists FILE")
    if save and not examples:
        raise InputError("--save needs --examples")
    args = settle(typed, read_args(folder))
    if args.method != "hyper" or not (folder / "adapters.safetensors").exists() or hasattr(TASKS[args.task], "start"):
        raise InputError(f"{folder}: has no hypernetwork to compress examples with")
    run = open_run(args, folder)
    if examples:
        gists = compress_examples(run, Path(examples))
    else:
        gists = load_gists(Path(kept), belongs_to(run, folder), run.device, run.hyper.model.embed_tokens.weight.dtype)
    if save:
        save_gists(Path(save), gists, belongs_to(run, folder))
        print(f"saved as {save}, {Path(save).stat().st_size:,} bytes")
    choices = [option.strip() for option in (options or "").split(",") if option.strip()]
    if text is not None:
        print(answer(run, gists, text, choices))
    elif not save:
        for line in sys.stdin:
            if line.strip():
                print(answer(run, gists, line.strip(), choices), flush=True)


if __name__ == "__main__":
    run_command(main)
