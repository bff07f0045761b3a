"""The README as a program: every command of README.md, and of the pages in docs/ that it links, runs as printed.

    python -m tests.readme [FILE…]    in a fresh clone of HEAD; --here: in a copy of the working tree

Blocks ```sh and ```python run in order, in one folder and one environment (the one this runs in), so that later
ones see what earlier ones made. Each line of a sh block is a command by itself. A ``` block right below a command
is its output and is compared with it, word for word. Numbers differ between machines in two places alone: scores
of train.py and eval.py (those with a decimal point), and numbers before a % sign; there, ± 5 will do.
A comment directly above a block may say:

    <!-- short: --steps 3; eval.py --limit 3 -->  appended to each command with train.py, and to those with eval.py
                                                  (tools.NAME: python -m tools.NAME); outputs aren't compared then
    <!-- needs: transformers -->                  skipped where these packages aren't installed
    <!-- not run: downloads -->                   not run, and why
"""

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMENTS = ("short", "needs", "not run")
COMMAND = re.compile(r"\s*(\$ |python3? |torchrun |pip |hf |git |\. |source |cd |import |from \w+ import )")
TOLERANCE = 5.0  # percent; five draws of sixty questions vary by more than rounding does
MOST_SECONDS = 900


class ReadmeError(Exception):
    """The README has a form that this tool doesn't know."""


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
    shown: str | None = None

    def commands(self) -> list[tuple[int, str]]:
        """(line number, command): a python block as a whole, a sh block by lines; a backslash continues a line."""
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
        raise ReadmeError(f"{block.file}:{block.line}: unknown comment {comment!r}; known: {', '.join(COMMENTS)}")
    if name == "not run":
        block.not_run = value
    elif name == "needs":
        block.needs = value.split()
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
                blocks.append(last)
            elif language:
                raise ReadmeError(f"{file}:{number}: unknown language {language!r}; known: sh, python, and none for outputs")
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


def linked_pages(text: str) -> list[str]:
    """The pages in docs/ that a page links, each once."""
    return list(dict.fromkeys(re.findall(r"\]\((docs/[^)#\s]+\.md)", text)))


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


def same_word(shown: str, printed: str, measured: bool) -> bool:
    """Whether two words say the same; measured: numbers with a decimal point may differ a little."""
    pattern = r"[-+]?\d+\.\d+" if measured else r"(?!)"
    if shown == printed or not measured:
        return shown == printed
    numbers = [re.findall(pattern, word) for word in (shown, printed)]
    shapes = [re.sub(pattern, "0", word) for word in (shown, printed)]
    return shapes[0] == shapes[1] and all(abs(float(a) - float(b)) <= TOLERANCE for a, b in zip(*numbers))


def difference(shown: str, printed: str, measured: bool) -> str:
    """The first line in which an output differs from what the README shows; empty where none does."""
    expected, actual = words(shown), words(printed)
    for n in range(max(len(expected), len(actual))):
        a, b = (lines[n] if n < len(lines) else [] for lines in (expected, actual))
        percent = [word.strip("(),") == "%" for word in a[1:]] + [False]
        if len(a) != len(b) or not all(
            same_word(x, y, measured) or is_percent and x.isdecimal() and y.isdecimal() and abs(int(x) - int(y)) <= TOLERANCE
            for x, y, is_percent in zip(a, b, percent)
        ):
            return f"the README shows  {' '.join(a) or '(nothing)'}\nit printed        {' '.join(b) or '(nothing)'}"
    return ""


# ------------------------------------------------------------------------------------------- running


def missing(packages: list[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def run_command(command: str, language: str, folder: Path) -> tuple[int, str, str]:
    """Exit status, stdout, stderr of one command, in this environment."""
    argv = [sys.executable, "-c", command] if language == "python" else ["bash", "-euo", "pipefail", "-c", command]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        argv, cwd=folder, env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL, capture_output=True,
        encoding="utf-8", errors="replace", timeout=MOST_SECONDS,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def tell(where: str, command: str, result: str, seconds: float | None = None) -> None:
    """The line of a command."""
    first, *more = without_comment(command).splitlines() if "\n" not in command else command.splitlines()
    took = "" if seconds is None else f"{seconds:.1f} s"
    print(f"{where:<15} {result:<8} {took:>8}  {first}{' …' * bool(more)}", flush=True)


def run_block(block: Block, folder: Path) -> int:
    """Run a block's commands; the number of those that failed."""
    failures, outputs, is_short, commands = 0, [], False, block.commands()
    if not commands:
        raise ReadmeError(f"{block.file}:{block.line}: a block without a command")
    absent = missing(block.needs)
    reason = block.not_run or (f"needs {', '.join(absent)}" if absent else "")
    for number, command in commands:
        where = f"{block.file}:{number}"
        if reason:
            tell(where, command, f"not run ({reason})")
            continue
        full, start = command, time.monotonic()
        command = shortened(command, block.short) if block.language == "sh" else command
        is_short |= command != full
        problem = ""
        try:
            status, stdout, stderr = run_command(command, block.language, folder)
        except subprocess.TimeoutExpired:
            status, stdout, stderr, problem = -1, "", "", f"not done after {MOST_SECONDS} s"
        seconds = time.monotonic() - start
        outputs.append(stdout)
        if not problem and status:
            without_progress = re.sub(r"[^\n]*\r", "", stderr)
            problem = f"exit status {status}\n{stdout}{without_progress}"
        last = number == commands[-1][0]
        if not problem and last and block.shown is not None and not is_short:
            measured = program_of(command) in ("train.py", "eval.py")
            problem = difference(block.shown, "".join(outputs), measured)
            problem += f"\nall of it:\n{''.join(outputs)}" * bool(problem)
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
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="pages, by their place in the project (README.md and what it links in docs/)")
    parser.add_argument("--here", action="store_true", help="run in a copy of the working tree rather than in a clone of HEAD")
    args = parser.parse_args()
    failures, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "HyperLlama"
        copy_project(folder, args.here)
        files = args.files or ["README.md", *linked_pages((folder / "README.md").read_text(encoding="utf-8"))]
        try:
            pages = [parse((folder / file).read_text(encoding="utf-8"), file) for file in files]
            for block in sum(pages, []):
                failures += run_block(block, folder)
        except ReadmeError as problem:
            sys.exit(f"error: {problem}")
    print(f"{failures or 'none'} failed, {time.monotonic() - start:.0f} s")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
