"""The pages as programs: how tests/readme.py reads, runs and compares; numbers in their prose."""

import re
import subprocess

import pytest
import readme
from conftest import ROOT
from readme import ReadmeError, difference, parse, run_block, shortened

PAGE = """\
<!-- short: --steps 3 --limit 2; eval.py --limit 2 -->
```sh
python train.py --task p3 "a # b"   # an explanation
# nothing but an explanation
python eval.py RUN \\
    --sets 1
```

```
shown
```

```
a picture
```

- in a list:

  <!-- needs: torch -->
  <!-- not run: a reason -->
  ```python
  for x in ():
      print(x)
  ```
"""


def block(language: str, text: str, comment: str = "", shown: str = "") -> str:
    above = f"<!-- {comment} -->\n" if comment else ""
    below = f"\n```\n{shown}\n```\n" if shown else ""
    return f"{above}```{language}\n{text}\n```\n{below}\n"


SMALL_PAGE = [  # blocks, and how many of their commands fail
    (block("sh", "echo one > file"), 0),
    (block("python", 'print(open("file").read(), end="")', shown="one"), 0),
    (block("sh", "cat file", shown="two"), 1),
    (block("sh", "false | true\necho later"), 1),
    (block("sh", "false", "needs: no_such_package"), 0),
    (block("sh", "false", "not run: why"), 0),
    (block("python", "print(3)", "file: mine.py"), 0),
    (block("sh", "python mine.py", shown="3"), 0),
    (block("sh", "echo train.py", "short: train.py --steps 3", shown="a table of the full run"), 0),
]


def test_blocks_have_their_commands_comments_and_outputs():
    shell, python = parse(PAGE)
    first = (3, 'python train.py --task p3 "a # b"   # an explanation')
    assert shell.commands() == [first, (5, "python eval.py RUN \\\n    --sets 1")]
    assert shell.short == {"train.py": "--steps 3 --limit 2", "eval.py": "--limit 2"}
    assert shell.shown == "shown" and python.shown is None
    assert python.commands() == [(22, "for x in ():\n    print(x)")]
    assert python.needs == ["torch"] and python.not_run == "a reason"


@pytest.mark.parametrize(
    "page, problem",
    [
        ("<!-- shorter: --steps 3 -->\n```sh\ntrue\n```", "unknown comment"),
        ("<!-- not run: -->\n```sh\ntrue\n```", "unknown comment"),
        ("<!-- not run: why -->\n\n```sh\ntrue\n```", "not directly above"),
        ("<!-- a note -->\ntext", "not directly above"),
        ("<!-- not run: why -->\n```\noutput\n```", "isn't run"),
        ("<!-- short: evel.py --limit 3 -->\n```sh\npython eval.py RUN\n```", "no command here runs evel.py"),
        ("```bash\ntrue\n```", "unknown language 'bash'"),
        ("```\npython train.py --task p3\n```", "holds a command"),
        ("```sh\ntrue", "without end"),
    ],
)
def test_other_forms_are_errors(page, problem):
    with pytest.raises(ReadmeError, match=problem):
        parse(page)


def test_only_the_programs_that_a_comment_names_are_shortened():
    short = {"train.py": "--steps 3", "tools.probe": "--sets 1"}
    assert shortened("torchrun train.py --task p3  # why", short) == "torchrun train.py --task p3 --steps 3"
    assert shortened("python -m tools.probe RUN", short) == "python -m tools.probe RUN --sets 1"
    assert shortened("python eval.py RUN  # why", short) == "python eval.py RUN  # why"


def test_numbers_may_differ_only_where_they_are_measured():
    assert not difference("a  99.7 ± 0.7\n-----", "a  100.0 ± 0.0\n------", measured=True)
    assert difference("a  94.0", "a  100.0", measured=True)
    assert difference("60 queries 94.0", "61 queries 94.0", measured=True)
    assert difference("a  99.7", "a  99.8", measured=False)
    assert not difference("kilo  (kilo 90 %, jade 10 %)", "kilo  (kilo 87 %, jade 13 %)", measured=False)
    assert difference("kilo  (kilo 51 %, jade 49 %)", "jade  (kilo 49 %, jade 51 %)", measured=False)
    assert difference("kilo 90 %", "kilo 80 %", measured=False)
    assert difference("one line", "one line\nanother", measured=True)


def test_blocks_run_in_one_folder_and_failures_are_counted(tmp_path, capsys):
    texts, failures = zip(*SMALL_PAGE)
    blocks = parse("".join(texts))
    assert tuple(run_block(block, tmp_path) for block in blocks) == failures
    blocks[-1].short = {}
    assert run_block(blocks[-1], tmp_path) == 1, "a command that isn't shortened is compared"
    printed = capsys.readouterr().out
    assert "the page shows  two" in printed and "exit status 1" in printed
    assert "not run (needs no_such_package)" in printed and "not run (why)" in printed


# ------------------------------------------------------------------------------- the pages in prose

PAGES = readme.all_pages(ROOT)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose_and_outputs() -> tuple[str, str]:
    """Of all pages together."""
    prose = [re.sub(r"^ *```.*?^ *```$", "", read(page), flags=re.DOTALL | re.MULTILINE) for page in PAGES]
    outputs = [block.shown or "" for page in PAGES for block in parse(read(page), page)]
    return "\n".join(prose), "\n".join(outputs)


def test_sizes_in_prose_are_those_that_a_command_of_some_page_prints():
    prose, outputs = prose_and_outputs()
    sizes = re.findall(r"\d[\d.,]* (?:MB|bytes)\b", prose)
    assert sizes and not re.search(r"\d [KMG]iB\b", prose + outputs)
    for size in sizes:
        assert size in outputs or re.search(rf"(?<![\d,]){size.split()[0]}(?![\d,])", outputs), size


def test_means_in_prose_are_those_of_the_results():
    means = re.findall(r"\d+\.\d ± \d+\.\d", prose_and_outputs()[0])
    lines = (read("RESULTS.md") + read("docs/real.md")).splitlines()  # the miniature's, and a real model's
    tables = "\n".join(line for line in lines if line.startswith("|"))
    assert means and all(mean in tables for mean in means)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    folder = (ROOT / page).parent
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", read(page)):
        path = folder / target if target else ROOT / page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{target}#{heading}"


@pytest.mark.parametrize("page", [*PAGES, "tests/FAULTS.md"])
def test_a_test_that_a_page_names_is_there(page):
    there = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", read(page)):
        assert f"def {name}(" in there, name


def test_nothing_that_git_is_to_ignore_is_kept_in_it():
    """What commands of a page leave behind would stop the same commands in a fresh clone."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    listed = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""
