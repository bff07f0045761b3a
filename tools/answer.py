"""Your own examples: compress them with a run's hypernetwork, keep their gists, answer after them.

    python -m tools.answer RUN --examples FILE --save FILE       .jsonl with input and output -> .safetensors
    python -m tools.answer RUN --gists FILE --input TEXT         the model writes an answer
    python -m tools.answer RUN --gists FILE --options A,B        chooses one, for each line of stdin
"""

import hashlib
import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

from data import PLAIN, Episode, Example, report
from eval import ask, score_options, write_answers
from gist import Gists, combine, load_gists, save_gists
from llama import InputError, reading
from lora import load_tensors
from tasks import TASKS, Parser, Run, add_places, a_name, open_run, read_args, settle, several
from tasks.rows import as_text, parse_line
from tools import run_command
from tools.export import check_export, export


def belongs_to(run: Run, folder: Path) -> dict[str, str]:
    """Checksums of the model and the run that make and read a prefix: it means nothing to others."""
    trained = hashlib.sha256((folder / "adapters.safetensors").read_bytes())
    return {"model": run.hyper.model.checksum, "run": trained.hexdigest()[:16]}


def is_prefix(path: Path) -> bool:
    with suppress(InputError):
        return path.is_file() and {"model", "run"} <= load_tensors(path)[1].keys()
    return False


def layout(run: Run):
    """The layout that the run was trained with, or one of them."""
    return getattr(run.task, "LAYOUT", PLAIN)


@torch.no_grad()
def compress_examples(run: Run, path: Path) -> Gists:
    """The gists of a user's own examples, a .jsonl file with input and output; says what that saves."""
    with reading(path, "can't be read"):
        lines = {f"{path}: line {n}": line for n, line in enumerate(path.read_bytes().splitlines(), 1) if line.strip()}
    rows = {where: parse_line(line, where) for where, line in lines.items()}
    examples = [Example(*(as_text(row.get(field), f"{where}: {field}") for field in ("input", "output"))) for where, row in rows.items()]
    if not examples:
        raise InputError(f"{path}: holds no examples")
    way, sets = several(run.args)  # a run that was trained with --chain is given its pieces
    rows = [run.formatter.context_row(piece, run.hyper.gist_ids) for piece in Episode([], examples, layout(run)).split(sets)]
    unread = sum((row.left_out for row in rows), Counter())
    left_out = unread["shots left out"]
    if left_out == len(examples):
        raise InputError(f"{path}: no example fits into {run.args.context} tokens")
    if left_out:
        print(report(unread), file=sys.stderr)
    tokens = [row.tokens for row in rows]
    gists = combine(run.hyper, tokens, way) if way else run.hyper.compress(torch.tensor(tokens, device=run.device))
    count, read, c = sets * len(run.hyper.gists), sum(map(len, tokens)) - sets * len(run.hyper.gists), run.hyper.model.config
    what = f"{len(examples) - left_out} examples, {read} tokens, became {count} gists"
    if gists.updates:
        print(f"{what}: low-rank updates of {sum(x.numel() for pair in gists.updates.values() for x in pair):,} numbers")
        return gists
    a_token = 2 * c.layers * c.kv_heads * c.head_size * gists.past[0][0].element_size()
    print(f"{what}: keys and values of {a_token * count:,} bytes instead of {a_token * read:,}, {read / count:.0f} times as many")
    return gists


@torch.no_grad()
def answer(run: Run, gists: Gists, text: str, options: list[str]) -> str:
    """The answer to one input after a prefix: the best option with its probability, or generated text."""
    episode = Episode([Example(text, "", tuple(options))], [], layout(run))
    (prompt,), choices = ask(run.formatter, episode)
    if report(prompt.left_out):
        print(report(prompt.left_out), file=sys.stderr)
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
    add("--examples", type=a_name, metavar="FILE", help="compress own examples (.jsonl: input, output; a pipe will do)")
    add("--save", type=a_name, metavar="FILE", help="keep their gists (.safetensors)")
    add("--gists", type=a_name, metavar="FILE", help="answer after gists that were kept")
    add("--input", metavar="TEXT", help="what to answer (default: each line of stdin)")
    add("--options", metavar="A,B,…", help="answers to choose from (default: the model writes its own)")
    add_places(parser)
    typed = vars(parser.parse_args())
    folder, (examples, save, kept, text, options) = Path(typed.pop("folder")), (typed.pop(n, None) for n in ("examples", "save", "gists", "input", "options"))
    if (examples is None) == (kept is None):
        raise InputError("name either --examples FILE or --gists FILE")
    if save and not examples:
        raise InputError("--save needs --examples")
    choices = [option.strip() for option in (options or "").split(",")] if options is not None else []
    if not all(choices) or len(set(choices)) < len(choices) or len(choices) == 1:
        raise InputError(f"--options {options}: needs two or more different answers, with a comma between them")
    choices = [as_text(option, "--options") for option in choices]
    if save and os.path.lexists(save) and not is_prefix(Path(save)):
        raise InputError(f"--save {save}: would replace something that is not a saved prefix")
    args = settle(typed, read_args(folder))
    if save and args.emit != "kv":
        raise InputError(f"--save: {folder} makes low-rank updates, and what is saved are keys and values")
    if args.method != "hyper" or not (folder / "adapters.safetensors").exists() or hasattr(TASKS[args.task], "start"):
        raise InputError(f"{folder}: has no hypernetwork to compress examples with")
    run, adapter = open_run(args, folder), Path(f"{Path(save or 'gists').with_suffix('')}-adapter")
    if save and run.hyper.answerer:
        check_export(adapter, "--save")
    if examples:
        gists = compress_examples(run, Path(examples))
    else:
        gists = load_gists(Path(kept), belongs_to(run, folder), run.hyper.model)
    if save:
        save_gists(Path(save), gists, belongs_to(run, folder))
        print(f"saved as {save}, {Path(save).stat().st_size:,} bytes")
        if run.hyper.answerer:  # elsewhere, the prefix needs the set that answers after it
            export(run, run.hyper.answerer, adapter)
    if text is not None:
        print(answer(run, gists, as_text(text, "--input"), choices))
    elif not save:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # what isn't text is refused by as_text
        for line in sys.stdin:
            if line.strip():
                print(answer(run, gists, as_text(line.strip(), "stdin"), choices), flush=True)


if __name__ == "__main__":
    run_command(main)
