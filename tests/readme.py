"""The pages as programs: every command of README.md, and then of docs/*.md, is run.

    python -m tests.readme          all pages, in a fresh clone of HEAD; --here: in a copy of the working tree
    python -m tests.readme docs/tasks.md        the pages that are named

Blocks ```sh and ```python run in order, in one folder and in this environment: later ones see what earlier
ones made, and pages of docs/ what README.md made. Where README.md isn't among the pages that are named, a run
of two steps (PREPARE) takes its place. Each line of a sh block is a command by itself. A ``` block right
below commands is their output, compared word for word. Scores of train.py and eval.py (numbers with a decimal
point) and numbers before a % sign differ between machines: there, ± 5 will do. A comment directly above a
block may be one of these:

    <!-- short: --steps 3; eval.py --limit 3 -->  appended to train.py's commands, and to eval.py's
                                                  (tools.NAME: python -m tools.NAME); nothing is compared then
    <!-- needs: transformers -->                  not run where these packages aren't installed
    <!-- not run: downloads -->                   not run, and why
    <!-- file: further/mine.py -->                not run, but saved as this file
"""

import argparse
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMENTS = ("short", "needs", "not run", "file")
COMMAND = re.compile(r"\s*(\$ |python3? |torchrun |pip |hf |git |\. |source |cd |import |from \w+ import )")
MEASURED = ("train.py", "eval.py")  # programs that print scores
TOLERANCE = 5.0  # percent; five draws of sixty questions vary by more than rounding does
MOST_SECONDS = 900
RUN = "runs/p3-hyper-frozen-seed0"
PREPARE = f"""\
```sh
python train.py --task p3 --steps 2 --limit 2 --sets 1 --measure 0 --no-controls
python -m tools.answer {RUN} --examples tiny/my.jsonl --save my.safetensors
```
"""


class ReadmeError(Exception):
    """A page has a form that this tool doesn't know."""


@dataclass
class Block:
    """A sh or python block, what comments say about it, and the output that is shown below it."""

    file: str
    line: int
    language: str
    text: str
    short: dict[str, str] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    not_run: str = ""
    save_as: str = ""
    shown: str | None = None

    def commands(self) -> list[tuple[int, str]]:
        """Line numbers and commands: a python block is one; a sh block, one a line (\\ continues it)."""
        if self.language == "python":
            return [(self.line, self.text)]
        commands, number = [], self.line
        for line in re.split(r"(?<!\\)\n", self.text):
            if line.strip() and not line.lstrip().startswith("#"):
                commands.append((number, line))
            number += line.count("\n") + 1
        return commands


# ------------------------------------------------------------------------------------------- parsing


def read_comment(block: Block, comment: str) -> None:
    """Enter what a comment says about a block."""
    name, colon, value = (part.strip() for part in comment.partition(":"))
    if name not in COMMENTS or not colon or not value:
        known = ", ".join(COMMENTS)
        raise ReadmeError(f"{block.file}:{block.line}: unknown comment {comment!r}; known: {known}")
    if name == "not run":
        block.not_run = value
    elif name == "needs":
        block.needs = value.split()
    elif name == "file":
        block.save_as = value
    else:
        for part in value.split(";"):
            program, _, options = part.strip().partition(" ")
            if program.startswith("-"):
                program, options = "train.py", part.strip()
            block.short[program] = options.strip()


def parse(text: str, file: str = "README.md") -> list[Block]:
    """The blocks to run. ReadmeError: an unknown language or comment, a block without end."""
    blocks, comments = [], []
    last = None  # the block to run that ends right above
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        stripped = line.strip()
        if stripped.startswith("```"):
            language, indent, inside = stripped[3:].strip(), len(line) - len(line.lstrip()), []
            for _, line in lines:
                if line.strip() == "```":
                    break
                inside.append(line[indent:] if not line[:indent].strip() else line)
            else:
                raise ReadmeError(f"{file}:{number}: a block without end")
            content = "\n".join(inside)
            if language in ("sh", "python"):
                last = Block(file, number + 1, language, content)
                for comment in comments:
                    read_comment(last, comment)
                if not last.commands():
                    raise ReadmeError(f"{file}:{number}: a block without a command")
                unknown = last.short.keys() - {program_of(command) for _, command in last.commands()}
                if unknown:
                    raise ReadmeError(f"{file}:{number}: short: no command here runs {', '.join(unknown)}")
                blocks.append(last)
            elif language:
                raise ReadmeError(f"{file}:{number}: unknown language {language!r}; known: sh, python, none")
            elif comments:
                raise ReadmeError(f"{file}:{number}: a comment above a block that isn't run")
            elif any(COMMAND.match(line) for line in inside):
                raise ReadmeError(f"{file}:{number}: a block without language that holds a command")
            else:
                if last:
                    last.shown = content
                last = None
            comments = []
        elif stripped.startswith("<!--"):
            if not stripped.endswith("-->"):
                raise ReadmeError(f"{file}:{number}: a comment of more than one line")
            comments.append(stripped[4:-3].strip())
            last = None
        elif stripped:
            if comments:
                raise ReadmeError(f"{file}:{number}: a comment that is not directly above a block")
            last = None
        elif comments:
            raise ReadmeError(f"{file}:{number}: a comment that is not directly above a block")
    if comments:
        raise ReadmeError(f"{file}: ends with a comment")
    return blocks


def all_pages(folder: Path) -> list[str]:
    """README.md, then the pages of docs/ by name."""
    return ["README.md", *(f"docs/{path.name}" for path in sorted((folder / "docs").glob("*.md")))]


# ----------------------------------------------------------------------------------------- comparing


def without_comment(command: str) -> str:
    """A command without the explanation after it, which shlex knows from a # in quotes."""
    lexer = shlex.shlex(command, posix=False, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, "#"
    return " ".join(lexer)


def program_of(command: str) -> str:
    """train.py, eval.py, tools.answer, …: what a command runs."""
    match = re.search(r"\b(train\.py|eval\.py)\b|-m (\S+)", command)
    return (match[1] or match[2]) if match else ""


def shortened(command: str, short: dict[str, str]) -> str:
    options = short.get(program_of(command), "")
    return f"{without_comment(command)} {options}" if options else command


def words(text: str) -> list[list[str]]:
    """Lines of words. A table's columns and rules are as wide as its numbers are long: neither counts."""
    lines = [re.sub(r"-{4,}", "----", line).split() for line in text.strip().splitlines()]
    return [line for line in lines if line]


def close(pattern: str, shown: str, printed: str) -> bool:
    """Whether two words are the same but for numbers of this pattern, and these are close."""
    numbers = [map(float, re.findall(pattern, word)) for word in (shown, printed)]
    texts = [re.sub(pattern, "0", word) for word in (shown, printed)]
    return texts[0] == texts[1] and all(abs(a - b) <= TOLERANCE for a, b in zip(*numbers))


def same_line(shown: list[str], printed: list[str], measured: bool) -> bool:
    """Whether two lines say the same; measured: numbers with a decimal point only have to be close."""
    if len(shown) != len(printed):
        return False
    for word, other, after in zip(shown, printed, [*shown[1:], ""]):
        pattern = r"\d+" if after.strip("(),") == "%" else r"\d+\.\d+" if measured else ""
        if word != other and not (pattern and close(pattern, word, other)):
            return False
    return True


def difference(shown: str, printed: str, measured: bool) -> str:
    """The first line in which an output differs from what a page shows; empty where none does."""
    for expected, actual in zip_longest(words(shown), words(printed), fillvalue=[]):
        if not same_line(expected, actual, measured):
            lines = [" ".join(line) or "(nothing)" for line in (expected, actual)]
            return f"the page shows  {lines[0]}\nit printed      {lines[1]}"
    return ""


# ------------------------------------------------------------------------------------------- running


def run_command(command: str, language: str, folder: Path) -> tuple[str, str]:
    """Run one command in this environment; stdout, and what is wrong (empty: nothing)."""
    argv = [sys.executable, "-c", command]
    if language == "sh":
        argv = ["bash", "-euo", "pipefail", "-c", command]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        # A group of its own, so that all of torchrun's processes end with it.
        process = subprocess.Popen(
            argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        problem = ""
        try:
            status = process.wait(MOST_SECONDS)
            problem = f"exit status {status}\n" if status else ""
        except subprocess.TimeoutExpired:
            problem = f"not done after {MOST_SECONDS} s\n"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    if problem:
        without_progress = re.sub(r"[^\n]*\r", "", texts[1])
        problem += texts[0] + without_progress
    return texts[0], problem


def tell(where: str, command: str, result: str, seconds: float | None = None) -> None:
    """The line of a command."""
    lines = command.splitlines()
    text = lines[0] + " …" * (len(lines) > 1)
    took = "" if seconds is None else f"{seconds:.1f} s"
    print(f"{where:<15} {result:<8} {took:>8}  {text}", flush=True)


def run_block(block: Block, folder: Path) -> int:
    """Run a block's commands; the number of those that failed."""
    if block.save_as:
        (folder / block.save_as).write_text(block.text + "\n", encoding="utf-8")
        return 0
    failures = 0
    output = ""
    is_short = False
    commands = block.commands()
    absent = [package for package in block.needs if importlib.util.find_spec(package) is None]
    reason = block.not_run or (f"needs {', '.join(absent)}" if absent else "")
    for n, (number, printed) in enumerate(commands, 1):
        where = f"{block.file}:{number}"
        if reason:
            tell(where, printed, f"not run ({reason})")
            continue
        command = shortened(printed, block.short) if block.language == "sh" else printed
        is_short |= command != printed
        start = time.monotonic()
        stdout, problem = run_command(command, block.language, folder)
        seconds = time.monotonic() - start
        output += stdout
        if n == len(commands) and block.shown is not None and not problem and not is_short:
            problem = difference(block.shown, output, program_of(command) in MEASURED)
            problem += f"\nall of it:\n{output}" * bool(problem)
        tell(where, command, "failed" if problem else "ok", seconds)
        if problem:
            failures += 1
            print("    " + problem.strip().replace("\n", "\n    "), flush=True)
    return failures


def copy_project(folder: Path, here: bool) -> None:
    """A fresh clone of HEAD; or (here) the files that git knows, as they are now."""
    if not here:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        return
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="pages to run (all)")
    add("--here", action="store_true", help="in a copy of the working tree rather than in a clone of HEAD")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`: no command outlives this
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "HyperLlama"
        copy_project(folder, args.here)
        files = args.files or all_pages(folder)
        try:
            pages = [parse((folder / file).read_text(encoding="utf-8"), file) for file in files]
            if "README.md" not in files:
                pages.insert(0, parse(PREPARE, "(before)"))
            failures = sum(run_block(block, folder) for page in pages for block in page)
        except ReadmeError as problem:
            sys.exit(f"error: {problem}")
    print(f"{failures or 'none'} failed, {time.monotonic() - start:.0f} s")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
