"""Mutation tests: each one-line mistake below must make one of the tests beside it fail.

    python -m tests.mutants            all of them: under three minutes on two cores
    python -m tests.mutants NAME …     those whose name contains a NAME
    python -m tests.mutants --list     their names

Each mutant is made and tested in a temporary copy of the project. Exit status 1 if one survives; 2 if one
can't be made, because its old text doesn't occur exactly once, or if its tests fail without it.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 2  # each with one thread
LIMIT = 300  # seconds, for the tests of a mutant
PROCESSES = multiprocessing.get_context("forkserver")
LIBRARIES = ["pytest", "sentencepiece", "safetensors.torch", "torch.distributed.tensor", "tqdm"]


class Mutant(NamedTuple):
    name: str
    file: str
    tests: Sequence[str]  # without "tests/test_"
    old: str  # occurs exactly once in the file
    new: str


BATCH = "equivalence.py::test_a_training_batch_has_the_logits_and_the_gradients_of_the_joint_pass"
PLAIN_BATCH = "equivalence.py::test_a_batch_without_gists_has_the_loss_of_plain_rows"
STEP = "equivalence.py::test_the_loss_of_a_step_is_the_sum_over_its_target_tokens_divided_by_their_number"
RESUMED = "equivalence.py::test_a_run_that_was_stopped_goes_on_with_the_rows_that_follow"
RANKED = "equivalence.py::test_every_column_answers_with_the_option_that_one_row_holds_most_likely"
WRITTEN = "equivalence.py::test_every_column_writes_what_greedy_decoding_in_one_row_writes"
SETS = "equivalence.py::test_several_sets_of_examples_answer_like_sets_combined_by_hand"
JOINT = "equivalence.py::test_the_joint_pass_is_a_llama_whose_queries_see_gists_alone"
LLAMA = "equivalence.py::test_the_plain_model_is_a_llama"
QUANTIZED = "equivalence.py::test_a_quantized_matrix_is_levels_times_the_scale_of_their_block"
HELD_OUT = "equivalence.py::test_no_held_out_task_of_the_miniature_is_trained_on"
HELD_OUT_BY_NAME = "equivalence.py::test_held_out_datasets_are_told_by_name_where_no_lists_say_which"
OWN_EXAMPLES = "equivalence.py::test_no_query_is_among_its_own_examples"
MASK = "gist.py::test_the_mask_of_a_small_row_is_what_the_paper_draws"
NUMBERS = "data.py::test_no_row_depends_on_the_number_of_processes"
OTHER = "eval.py::test_another_task_is_one_of_another_dataset"
PIECES = "llama.py::test_reading_in_pieces_equals_reading_at_once"

MUTANTS = [
    # ---------------------------------------------------------------------------------------- positions
    Mutant("compress: offset + 1", "gist.py", [BATCH],
        "start + last + 1",
        "start + last + 2"),
    Mutant("compress: offset - 1", "gist.py", [BATCH],
        "start + last + 1",
        "start + last"),
    Mutant("prefix: offset + 1", "gist.py", [BATCH],
        '"offset": self.offset, "mask"',
        '"offset": self.offset + 1, "mask"'),
    Mutant("prefix: offset - 1", "gist.py", [BATCH],
        '"offset": self.offset, "mask"',
        '"offset": self.offset - 1, "mask"'),
    Mutant("joint pass: query one position late", "gist.py", [JOINT],
        "offset=self.positions(tokens), adapter=adapter",
        "offset=self.positions(tokens) + after[..., 0].long(), adapter=adapter"),
    Mutant("joint pass: query one position early", "gist.py", [JOINT],
        "offset=self.positions(tokens), adapter=adapter",
        "offset=self.positions(tokens) - after[..., 0].long(), adapter=adapter"),
    Mutant("ranking: offset + 1", "eval.py", [RANKED],
        "offset=offset[:, None] + place,",
        "offset=offset[:, None] + place + 1,"),
    Mutant("ranking: offset - 1", "eval.py", [RANKED],
        "offset=offset[:, None] + place,",
        "offset=offset[:, None] + place - 1,"),
    Mutant("generation: prompt one position late", "llama.py", [WRITTEN],
        "offset=offset, adapter=adapter, mask=mask, select=last",
        "offset=None if offset is None else offset + 1, adapter=adapter, mask=mask, select=last"),
    Mutant("generation: answer one position late", "llama.py", [WRITTEN],
        "offset=position + n,",
        "offset=position + n + 1,"),
    Mutant("generation: answer one position early", "llama.py", [WRITTEN],
        "offset=position + n,",
        "offset=position + n - 1,"),
    Mutant("generation: answer after the padding", "llama.py", [WRITTEN],
        "else offset + lengths",
        "else offset + T"),
    Mutant("generation: goes on from the padding", "llama.py", [WRITTEN],
        "* T + lengths - 1",
        "* T + T - 1"),
    Mutant("gists one position early", "gist.py", [BATCH],
        "stable=True)[:, :G], None",
        "stable=True)[:, :G] - 1, None"),
    Mutant("gists one position early in the last layer", "llama.py", [BATCH],
        "..., at if layer is early[-1] else ...)",
        "..., (at[0], at[1] - 1) if at is not ... and layer is early[-1] else ...)"),
    Mutant("average of unequal positions", "gist.py", [f"{SETS}[None-average]"],
        "start=(1 + shift) * len(hyper.gists) - lengths",
        "start=shift * len(hyper.gists)"),
    Mutant("sets side by side without a shift", "gist.py", [f"{SETS}[None-concat]"],
        "device=device) * side_by_side",
        "device=device) * 0"),
    Mutant("sets of a chain don't see those before", "gist.py", [f"{SETS}[None-chain]"],
        "hyper.compress(piece, start, past=gists)",
        "hyper.compress(piece, start)"),
    Mutant("all gists have one embedding", "gist.py", [JOINT],
        "(tokens - V).clamp(min=0)",
        "(tokens - V).clamp(min=0, max=0)"),
    # ------------------------------------------------------------------------------ who acts, and where
    Mutant("compress without its LoRA set", "gist.py", [BATCH],
        "self.reader, before, mask",
        "None, before, mask"),
    Mutant("training: hypernetwork's set left on", "gist.py", [BATCH],
        "before(part.tokens.shape[1], self.answerer)",
        "before(part.tokens.shape[1], self.reader)"),
    Mutant("joint pass: hypernetwork's set left on", "gist.py", [JOINT],
        "{self.reader: ~after,",
        "{self.reader: ~after | after,"),
    Mutant("evaluation: hypernetwork's set left on", "eval.py", [RANKED],
        "run.hyper.answerer if column.trained",
        "run.hyper.reader if column.trained"),
    Mutant("ranking: hypernetwork's set left on", "eval.py", [RANKED],
        "given, choices, own, adapter,",
        "given, choices, own, run.hyper.reader,"),
    Mutant("generation: hypernetwork's set left on", "eval.py", [WRITTEN],
        "episodes[part[0]], given, own, adapter)",
        "episodes[part[0]], given, own, run.hyper.reader)"),
    Mutant("generation: set dropped after a token", "llama.py", [f"{WRITTEN}[downstream]"],
        "mask=holes_mask(seen, 1), adapter=adapter)",
        "mask=holes_mask(seen, 1))"),
    Mutant("baselines answered by the trained set", "eval.py", [f"{RANKED}[downstream-sum]"],
        "run.hyper.answerer if column.trained else None",
        "run.hyper.answerer"),
    Mutant("few-shot examples read by the base", "eval.py", [f"{RANKED}[downstream-sum]"],
        "episodes]\n    return read_rows(run.hyper.model, rows, adapter)",
        "episodes]\n    return read_rows(run.hyper.model, rows)"),
    Mutant("mean-pooled examples read by the set", "eval.py", [f"{WRITTEN}[downstream]"],
        "in_context(run, episodes, t, None)",
        "in_context(run, episodes, t, adapter)"),
    Mutant("LoRA applied twice", "llama.py", [LLAMA],
        "y = y + self.lora[name](x, gate)",
        "y = y + 2 * self.lora[name](x, gate)"),
    Mutant("LoRA always on, as if merged", "llama.py", [LLAMA],
        "adapter.items():",
        "(dict.fromkeys(self.lora) | dict(adapter)).items():"),
    Mutant("LoRA's scale is alpha", "lora.py", [LLAMA],
        "self.scale = alpha / rank",
        "self.scale = alpha"),
    Mutant("no gradient through the prefix's values", "gist.py", [BATCH],
        "return Gists(made, end, seen)",
        "return Gists([(k, v.detach()) for k, v in made], end, seen)"),
    # -------------------------------------------------------------------------------------------- masks
    Mutant("gist mask: the next token is seen", "gist.py", [MASK],
        "device=is_gist.device).tril()",
        "device=is_gist.device).tril(1)"),
    Mutant("gist mask: no token sees itself", "gist.py", [MASK],
        "device=is_gist.device).tril()",
        "device=is_gist.device).tril(-1)"),
    Mutant("gist mask: the last example token is seen", "gist.py", [JOINT],
        "(is_gist[:, None, :] |",
        "((is_gist | is_gist.roll(-1, 1))[:, None, :] |"),
    Mutant("gist mask: gists are hidden", "gist.py", [JOINT],
        "(is_gist[:, None, :] |",
        "((is_gist & False)[:, None, :] |"),
    Mutant("mask after a past: the next token is seen", "llama.py", [RANKED],
        "device=seen.device).tril()",
        "device=seen.device).tril(1)"),
    Mutant("mask after a past: no token sees itself", "llama.py", [RANKED],
        "device=seen.device).tril()",
        "device=seen.device).tril(-1)"),
    Mutant("causal mask: the next token is seen", "llama.py", [PIECES],
        ".tril(S - T)",
        ".tril(S - T + 1)"),
    Mutant("causal mask: no token sees itself", "llama.py", [PIECES],
        ".tril(S - T)",
        ".tril(S - T - 1)"),
    Mutant("gists see one token further", "llama.py", [BATCH],
        "mask = places <= asking",
        "mask = places - 1 <= asking"),
    Mutant("padding of rows in context is seen", "gist.py", [RANKED],
        "positions_of(tokens) < lengths[:, None] if",
        "positions_of(tokens) <= lengths[:, None] if"),
    Mutant("generation sees padding", "llama.py", [WRITTEN],
        "positions_of(tokens) < lengths[:, None])",
        "positions_of(tokens) < T)"),
    # ----------------------------------------------------------------------------- rows, loss, the loop
    Mutant("targets shifted by one", "data.py", [BATCH],
        "range(len(prompt) - 1, len(prompt) - 1 + len(target))",
        "range(len(prompt) - 2, len(prompt) - 2 + len(target))"),
    Mutant("no loss on EOS", "data.py", [STEP],
        "query.target) + [self.formatter.tokenizer.eos]",
        "query.target)"),
    Mutant("prompt without its last token", "data.py", [STEP],
        "len(text) - room) :] + end, 0",
        "len(text) - room) :] + end[:-1], 0"),
    Mutant("few-shot training: a second BOS", "data.py", [PLAIN_BATCH],
        "query, budget, bos=False)",
        "query, budget, bos=True)"),
    Mutant("training: another row's prefix", "data.py", [BATCH],
        "row.append(b)",
        "row.append((b + 1) % len(numbers))"),
    Mutant("mean of the batches' means", "train.py", [STEP],
        "loss_of(hyper, part, args) / totals[0]",
        "loss_of(hyper, part, args) / len(part.targets) / len(batch)"),
    Mutant("gradients add up over steps", "train.py", [RESUMED],
        "optimizer.zero_grad()",
        "pass"),
    Mutant("a row depends on its place in the batch", "data.py", [NUMBERS],
        'random.Random(f"{seed} {number}")',
        'random.Random(f"{seed} {b}")'),
    Mutant("each step reads the same rows", "train.py", [RESUMED],
        "(step * args.accumulate + i) * args.batch_size",
        "i * args.batch_size"),
    Mutant("a resumed run begins with the first rows", "train.py", [RESUMED],
        "draw(batches, args, first, rank",
        "draw(batches, args, 0, rank"),
    Mutant("a resumed run forgets the moments", "train.py", [RESUMED],
        'like(tensors[f"{moment}.{name}"], parameter) for moment',
        "torch.zeros_like(parameter) for moment"),
    # ----------------------------------------------------------------------------------- answers, tasks
    Mutant("evaluation: another row's prefix", "eval.py", [RANKED],
        "torch.tensor([queries[i][0] for i in chosen]",
        "torch.tensor([0 for i in chosen]"),
    Mutant("few-shot evaluation: a second BOS", "eval.py", [RANKED],
        'in_context, trained=False, instruct="no", bos=False)',
        'in_context, trained=False, instruct="no", bos=True)'),
    Mutant("answers of other queries", "eval.py", [RANKED],
        "for n, i in enumerate(chosen):",
        "for n, i in enumerate(sorted(chosen)):"),
    Mutant("an option's first token isn't scored", "eval.py", [RANKED],
        "else gain.sum()",
        "else gain[1:].sum()"),
    Mutant("options are compared by their mean", "eval.py", [RANKED],
        'run.args.score == "mean"',
        "True"),
    Mutant("an option's first token after the wrong one", "eval.py", [RANKED],
        "n * T + len(prompt) - 1,",
        "n * T + len(prompt) - 2,"),
    Mutant("an option sees the options before it", "eval.py", [RANKED],
        "(branch[:, None] == branch[:, :, None])",
        "(branch[:, None] <= branch[:, :, None])"),
    Mutant("other task: the task's own gists", "eval.py", [RANKED],
        "[others[i % len(others)] for i in range(len(episodes))] if column.other else episodes",
        "episodes"),
    Mutant("other task: one of the same dataset", "eval.py", [OTHER],
        "tasks[i].group != tasks[t].group",
        "i != t"),
    Mutant("a held-out task among the training tasks", "tasks/p3.py", [HELD_OUT],
        "for name in lists[split]}",
        'for name in lists["train"] + lists["test"][:1]}'),
    Mutant("held-out datasets among the training tasks", "tasks/p3.py", [HELD_OUT_BY_NAME],
        '(dataset is not None) != (split == "test")',
        'dataset is None and split == "test"'),
    Mutant("training: a query among its examples", "tasks/p3.py", [OWN_EXAMPLES],
        "for e in picked[queries:] if e.input not in asked]",
        "for e in picked[queries:]]"),
    Mutant("evaluation: a query among its examples", "tasks/p3.py", [OWN_EXAMPLES],
        "order) if e.input not in asked)",
        "order))"),
    # --------------------------------------------------------------------------------------- arithmetic
    Mutant("rotary: neighbours are pairs", "llama.py", [LLAMA],
        "x1, x2 = x.float().chunk(2, dim=-1)",
        "x1, x2 = x.float().unflatten(-1, (-1, 2)).unbind(-1)"),
    Mutant("rotary: backwards", "llama.py", [LLAMA],
        "(x1 * cos - x2 * sin, x2 * cos + x1 * sin)",
        "(x1 * cos + x2 * sin, x2 * cos - x1 * sin)"),
    Mutant("norm without its eps", "llama.py", [JOINT],
        "torch.rsqrt(mean + self.eps)",
        "torch.rsqrt(mean)"),
    Mutant("norm of a sum instead of a mean", "llama.py", [LLAMA],
        ".square() / x.shape[-1]",
        ".square()"),
    Mutant("NF4: the scale of another block", "lora.py", [QUANTIZED],
        "torch.cat([state.absmax for _, state in parts])",
        "torch.cat([state.absmax for _, state in parts]).roll(1)"),
]  # fmt: skip


def copy_project(folder: Path) -> None:
    """All that git would track. The copy has no ../shared beside it, so tests with real data are skipped."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("tiny/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "tiny").symlink_to(ROOT / "tiny")


def run_pytest(folder: Path, argv: list[str], output: Path) -> None:
    """Runs in a process forked from one that has imported LIBRARIES, which takes longer than most tests."""
    import pytest

    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(folder)
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]  # import the copy instead
    sys.dont_write_bytecode = True  # tiny/ is a link into the project
    sys.exit(pytest.main(argv))


def run_tests(tests: Sequence[str], mutant: Mutant | None = None) -> tuple[str, float]:
    """The first failing test, and seconds. "" if all passed, "skipped" if none ran, "broken: …" otherwise."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hyperllama-mutant-") as name:
        folder, output = Path(name) / "project", Path(name) / "output"
        copy_project(folder)
        if mutant:
            path = folder / mutant.file
            path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
        argv = ["-x", "-q", "-p", "no:cacheprovider", *(f"tests/test_{test}" for test in tests)]
        process = PROCESSES.Process(target=run_pytest, args=(folder, argv, output))
        process.start()
        process.join(LIMIT)
        process.kill()
        process.join()
        lines = output.read_text("utf-8").splitlines() if output.exists() else []
    seconds = time.monotonic() - began
    failed = [match[1] for line in lines if (match := re.match(r"FAILED tests/(.+?)( - .*)?$", line))]
    if process.exitcode == 1 and failed:
        return failed[0], seconds
    if process.exitcode == 0:
        return ("" if " passed" in lines[-1] else "skipped"), seconds
    return f"broken: status {process.exitcode}, {lines[-1] if lines else 'no output'}", seconds


def check(mutants: Sequence[Mutant], pool: ThreadPoolExecutor) -> list[str]:
    """Why results would mean nothing: an old text that isn't unique, tests that fail without mutants."""
    problems = []
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text("utf-8").count(mutant.old)
        if count != 1:
            problems.append(f"{mutant.name}: its old text occurs {count} times in {mutant.file}, not once")
    if problems:
        return problems
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    parts = [part for part in (tests[n::AT_ONCE] for n in range(AT_ONCE)) if part]
    results = [result for result, _ in pool.map(run_tests, parts)]
    return [f"without any mutant: {result}" for result in results if result not in ("", "skipped")]


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if not args.names or any(name in m.name for name in args.names)]
    if args.list:
        print(*(f"{mutant.name:<48}{mutant.file}" for mutant in mutants), sep="\n")
        return 0
    began, survived = time.monotonic(), 0
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    PROCESSES.set_forkserver_preload(LIBRARIES)
    unknown = [name for name in args.names if not any(name in mutant.name for mutant in mutants)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        problems = [f"no mutant is called {name!r}" for name in unknown] or check(mutants, pool)
        if problems:
            print(*problems, sep="\n", file=sys.stderr)
            return 2
        print(f"{'mutant':<48}{'file':<13}{'seconds':>7}  killed by")
        for mutant, (result, seconds) in zip(mutants, pool.map(lambda m: run_tests(m.tests, m), mutants)):
            survived += not result or result.startswith("broken")
            killer = result or "SURVIVED"
            print(f"{mutant.name:<48}{mutant.file:<13}{seconds:>7.1f}  {killer}", flush=True)
    print(f"{len(mutants)} mutants, {survived} survived, {time.monotonic() - began:.0f} seconds")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
