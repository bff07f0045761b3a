"""Your own examples: compress them with a run's hypernetwork, keep their gists, answer after them.

python -m tools.answer RUN --examples FILE --save FILE       .jsonl with input and output -> .safetensors
python -m tools.answer RUN --gists FILE --input TEXT         the model writes an answer
python -m tools.answer RUN --gists FILE --options A,B        chooses one, for each line of stdin
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from data import Episode, Example, report
from eval import compress, encode_queries, gist_context, score_choices, write_answers
from gist import Gists
from llama import InputError, reading
from lora import load_tensors
from run import Parser, Run, add_options, open_run, read_args, resolve_args, run_command
from tasks.rows import as_text, parse_line
from tools.export import belongs_to, check_export, export, load_gists, save_gists


def read_examples(path: Path) -> list[Example]:
    """A .jsonl file with input and output."""
    examples = []
    with reading(path, "can't be read"):
        lines = path.read_bytes().splitlines()
    for n, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}: line {n}"
            row = parse_line(line, where)
            fields = [as_text(row.get(name), f"{where}: {name}") for name in ("input", "output")]
            examples.append(Example(*fields))
    if not examples:
        raise InputError(f"{path}: holds no examples")
    return examples


@torch.no_grad()
def compress_examples(run: Run, path: Path) -> Gists:
    """The gists of a user's own examples; says what that saves."""
    examples = read_examples(path)
    left_out = Counter()
    counting = replace(run, formatter=replace(run.formatter, left_out=left_out))
    context = gist_context(counting, Episode([], examples, run.task.LAYOUT))
    unread = left_out["shots left out"]
    if unread == len(examples):
        raise InputError(f"{path}: no example fits into {run.args.context} tokens")
    if unread:
        print(report(left_out), file=sys.stderr)
    shots = run.args.shots
    if len(examples) - unread > shots and not run.task.ONE_SET:
        print(f"note: the run was trained with {shots} examples, and reads more here", file=sys.stderr)
    gists = compress(run, [context], None)
    kept = gists.length or len(run.hyper.gists)
    read = sum(token < run.hyper.model.config.vocab for row in context for token in row.tokens)
    kind = "anchors" if run.args.anchors else "gists"
    what = f"{len(examples) - unread} examples, {read} tokens, became {kept} {kind}"
    if isinstance(gists, Gists):
        bytes_kept = sum(x.numel() * x.element_size() for layer in gists.past for x in layer)
        times = f"{read / kept:.0f} times as many"
        what += f": keys and values of {bytes_kept:,} bytes instead of {bytes_kept // kept * read:,}, {times}"
    print(what)
    return gists


@torch.no_grad()
def answer(run: Run, gists: Gists, text: str, choices: list[str]) -> str:
    """The answer to one input after a prefix: the best choice with its probability, or generated text."""
    episode = Episode([Example(text, "", tuple(choices))], [], run.task.LAYOUT)
    left_out = Counter()
    prompts, encoded = encode_queries(replace(run.formatter, left_out=left_out), episode)
    if report(left_out):
        print(report(left_out), file=sys.stderr)
    adapter = run.hyper.downstream_adapter
    if not choices:
        return write_answers(run, episode, prompts, gists, adapter)[0]
    (scores,) = score_choices(run.hyper.model, prompts, encoded, gists, adapter, run.args.score == "mean")
    shares = torch.tensor(scores).softmax(0).tolist()
    best = choices[scores.index(max(scores))]
    each = [f"{choice} {100 * share:.0f} %" for choice, share in zip(choices, shares)]
    return f"{best}  ({', '.join(each)})"


def check_save(path: Path, about: dict[str, str]) -> None:
    """InputError where --save would replace something other than a prefix of the same run."""
    if not os.path.lexists(path):
        return
    try:
        same = path.is_file() and load_tensors(path)[1].items() >= about.items()
    except InputError:
        same = False
    if not same:
        raise InputError(f"--save {path}: would replace something that is not a saved prefix of this run")


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="RUN", help="folder of a finished run with a hypernetwork")
    add("--examples", metavar="FILE", help="compress own examples (.jsonl: input, output; a pipe will do)")
    add("--save", metavar="FILE", help="keep their gists (.safetensors)")
    add("--gists", metavar="FILE", help="answer after gists that were kept")
    add("--input", metavar="TEXT", help="what to answer (default: each line of stdin)")
    add("--options", metavar="A,B,…", help="answers to choose from (default: the model writes its own)")
    add_options(parser, "place")
    typed = vars(parser.parse_args())
    folder = Path(typed.pop("folder"))
    names = ("examples", "save", "gists", "input", "options")
    examples, save, kept, text, options = (typed.pop(name, None) for name in names)
    if "" in (examples, save, kept):
        raise InputError("an empty file name")
    if (examples is None) == (kept is None):
        raise InputError("name either --examples FILE or --gists FILE")
    if save and not examples:
        raise InputError("--save needs --examples")
    if save and not Path(save).absolute().parent.is_dir():
        raise InputError(f"--save {save}: there is no folder {Path(save).parent}")
    if text is not None and not text.strip():
        raise InputError("--input: is empty")
    choices = [] if options is None else [as_text(c.strip(), "--options") for c in options.split(",")]
    if not all(choices) or len(set(choices)) < len(choices) or len(choices) == 1:
        what = "needs two or more different answers, with a comma between them"
        raise InputError(f"--options {options}: {what}")
    args = resolve_args(typed, read_args(folder))
    if not (folder / "adapters.safetensors").exists() or args.method != "hyper" or args.init:
        raise InputError(f"{folder}: has no hypernetwork to compress examples with")
    if save and args.emit != "kv":
        raise InputError(f"--save: {folder} makes low-rank updates, and what is saved are keys and values")
    run = open_run(args, folder)
    downstream = run.hyper.downstream_adapter
    about = belongs_to(run, folder)
    adapter = Path(f"{Path(save or 'gists').with_suffix('')}-adapter")
    if save:
        check_save(Path(save), about)
        if downstream:
            check_export(adapter, "--save")
    if examples:
        gists = compress_examples(run, Path(examples))
    else:
        gists = load_gists(Path(kept), about, run.hyper.model)
    if save:
        save_gists(Path(save), gists, about)
        print(f"saved as {save}, {Path(save).stat().st_size:,} bytes")
        if downstream:  # elsewhere, the prefix needs the set that answers after it
            export(run, downstream, adapter)
    if text is not None:
        print(answer(run, gists, as_text(text, "--input"), choices))
    elif not save:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")  # what isn't text is refused by as_text
        if sys.stdin.isatty():
            print("an input a line; Ctrl-D ends", file=sys.stderr)
        for line in sys.stdin:
            if line.strip():
                print(answer(run, gists, as_text(line.strip(), "stdin"), choices), flush=True)


if __name__ == "__main__":
    run_command(main)
