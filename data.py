"""From examples to batches: what a task is, how its text is laid out in tokens, what fits (paper, Section 4).

A task (tasks/p3.py, …) gives episodes: queries, and what may be known of their task (an instruction,
examples). Formatter turns episodes into rows of tokens, whole examples only:

    hypernetwork   BOS instruction {\\nInput:\\n x \\nOutput:\\n y}×shots gist×G
    downstream     BOS \\nInput:\\n x \\nOutput:\\n   then y EOS, the only tokens with a loss

Each row of a batch is a pure function of the seed and the row's number, so that a run can be resumed
at any step, by any number of processes, by asking for those rows.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llama import InputError, Tokenizer, ragged, tensor

# ----------------------------------------------------------------------------- examples and episodes


@dataclass(frozen=True)
class Example:
    input: str
    target: str
    options: tuple[str, ...] = ()  # to rank, where answers are ranked
    references: tuple[str, ...] = ()  # all right answers, where answers are generated


@dataclass(frozen=True)
class Layout:
    """How a task is written.

    shot         an example: {n} its number, {input}, {target}
    head, tail   what comes before and after the input of a query (an input that is too long loses its beginning)
    space        what comes before the input and the target of a query
    instruction  what comes before everything, around an instruction
    end          where a generated answer is cut: what follows a target where examples stand in a row
    """

    shot: str
    head: str
    tail: str
    space: str = ""
    instruction: str = "{}"
    end: str = "\nInput:\n"

    def example(self, n: int, example: Example) -> str:
        return self.shot.format(n=n, input=example.input, target=example.target)


PLAIN = Layout("\nInput:\n{input}\nOutput:\n{target}", "\nInput:\n", "\nOutput:\n")


@dataclass(frozen=True)
class Episode:
    """Queries of one task, and what may be known of it: an instruction, examples."""

    queries: list[Example]
    shots: list[Example]
    layout: Layout = PLAIN
    instruction: str = ""

    def split(self, pieces: int) -> list["Episode"]:
        """The same with a part of the examples each."""
        return [replace(self, shots=self.shots[n::pieces]) for n in range(pieces)]


class Task(Protocol):
    """What tasks/*.py load: one prompt of P3, one task of S-NI, one set of texts with labels."""

    name: str
    group: str  # scores are averaged within a group, then over groups
    weight: int  # by which the task is drawn in training

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        """An episode of training."""

    def evaluation(self, seed: int, n: int, shots: int, limit: int | None) -> list[Episode]:
        """All queries that are scored (at most `limit`), with the n-th draw of examples."""


# ------------------------------------------------------------------------------------ rows of tokens

ROOM_FOR_QUERY = 32  # tokens of a downstream row that its target must leave to the query


class Row(NamedTuple):
    """Tokens of one row; how many of them come before the first example; and what didn't fit."""

    tokens: list[int]
    lead: int
    left_out: Counter[str]


@dataclass(frozen=True)
class Formatter:
    """Turns episodes into rows of tokens within a budget.

    context       most tokens of a row of examples, gists included
    query_length  most tokens of a query with its target
    every         a part of the gists comes after every so many examples; 0: all gists at the end
    """

    tokenizer: Tokenizer
    context: int
    query_length: int
    every: int = 0

    def instruction(self, episode: Episode, budget: int) -> Row:
        """The instruction's tokens; at most half of the budget, of which it keeps the beginning."""
        if not episode.instruction:
            return Row([], 0, Counter())
        tokens = self.tokenizer.encode(episode.layout.instruction.format(episode.instruction))
        return Row(tokens[: budget // 2], 0, Counter({"instructions": 1, "instructions cut": int(len(tokens) > budget // 2)}))

    def context_row(self, episode: Episode, gists: Sequence[int] = (), budget: int | None = None, end: Sequence[int] = ()) -> Row:
        """BOS, instruction, as many whole examples as fit into the budget, the gists after or among them; then `end`."""
        budget = self.context if budget is None else budget
        instruction, _, left_out = self.instruction(episode, budget)
        tokens, rest = [self.tokenizer.bos] + instruction, list(gists)
        lead, part = len(tokens), -(-len(gists) * self.every // max(1, len(episode.shots)))  # gists in a part
        for n, example in enumerate(episode.shots, 1):
            more = self.tokenizer.encode(episode.layout.example(n, example))
            fits = len(tokens) + len(more) + len(rest) + len(end) <= budget
            left_out.update({"shots": 1, "shots left out": int(not fits)})
            tokens += more if fits else []
            if self.every and n % self.every == 0 and len(rest) > part:
                tokens, rest = tokens + rest[:part], rest[part:]
        return Row(tokens + rest + list(end), lead, left_out)

    def target(self, episode: Episode, text: str) -> list[int]:
        return self.tokenizer.encode(episode.layout.space + text)

    def query(self, episode: Episode, example: Example, budget: int, instruct: str = "no", bos: bool = True) -> Row:
        """The prompt of a query, in so many tokens. What is too long loses the beginning of its input.

        instruct: "inside", the instruction takes up to half of the budget; "before", it has as much
        room of its own as a hypernetwork would read it in; "no".
        """
        layout, instruction, left_out = episode.layout, [], Counter()
        if instruct != "no":
            instruction, _, left_out = self.instruction(episode, budget if instruct == "inside" else self.context)
            budget += len(instruction) * (instruct == "before")
        start = [self.tokenizer.bos] * bos + instruction + self.tokenizer.encode(layout.head)
        text, end = self.tokenizer.encode(layout.space + example.input), self.tokenizer.encode(layout.tail)
        room = budget - len(start) - len(end)
        if room < 0:
            raise InputError(f"{budget} tokens leave no room for a query: its target or options are too long for it")
        left_out.update({"queries": 1, "queries cut": int(len(text) > room)})
        return Row(start + text[max(0, len(text) - room) :] + end, 0, left_out)

    def fitting(self, draw: Callable[[], Episode]) -> tuple[Episode, Counter[str]]:
        """What `draw` gives, without the queries whose target is too long (a target is never cut); drawn again where none is left."""
        left_out: Counter[str] = Counter()
        for _ in range(100):
            episode, queries = draw(), []
            for query in episode.queries:
                fits = len(self.tokenizer.encode(query.target)) + ROOM_FOR_QUERY <= self.query_length
                left_out.update({"targets": 1, "targets left out": int(not fits)})
                queries += [query] * fits
            if queries:
                return replace(episode, queries=queries), left_out
        raise InputError(f"no target fits into {self.query_length} tokens (--query-length)")


def report(left_out: Counter[str]) -> str:
    """What was left out or cut, in a line; empty if nothing was."""
    kinds = (
        ("shots", "left out", "examples left out, because the context was full"),
        ("instructions", "cut", "instructions cut at the end, because they were too long"),
        ("targets", "left out", "training targets left out, because they were too long"),
        ("queries", "cut", "queries cut at the beginning, because they were too long"),
    )
    return "; ".join(f"{left_out[f'{what} {how}']} of {left_out[what]} {text}" for what, how, text in kinds if left_out[f"{what} {how}"])


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Batch:
    """What `HyperLlama.forward` reads. N queries share B rows of examples; M tokens have a loss.

    examples  [B, T] rows for the hypernetwork, or None
    kept      [B] how many tokens at the beginning of each row of examples stay in the prefix, or None
    row       [N] which row of examples serves each query
    tokens    [N, T'] the queries with their targets (without the last token, which is only predicted)
    select    [M] positions that predict a target token, as indices into N·T'
    targets   [M] the tokens to predict there
    read      tokens read, padding left out: for tokens/s
    left_out  what didn't fit, counted
    earlier   rows like `examples` that are compressed before them, one after the other (gist.chain)
    more      what other terms of the loss predict, each in a batch of its own: after the same gists, or (row None) after nothing
    weight    of such a term
    """

    examples: Tensor | None
    kept: Tensor | None
    row: Tensor | None
    tokens: Tensor
    select: Tensor
    targets: Tensor
    read: int
    left_out: Counter[str] = field(default_factory=Counter)
    earlier: tuple[Tensor, ...] = ()
    more: tuple["Batch", ...] = ()
    weight: float = 0.0

    def to(self, device: torch.device | str) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        parts = {name: tuple(part.to(device) for part in getattr(self, name)) for name in ("earlier", "more")}
        return replace(self, **moved, **parts)


def collate(
    examples: list[list[int]] | None,
    row: list[int] | None,
    prompts: list[list[int]],
    targets: list[list[int]],
    kept: list[int] | None = None,
    left_out: Counter[str] | None = None,
    more: Sequence[Batch] = (),
    weight: float = 0.0,
    earlier: Sequence[list[list[int]]] = (),
) -> Batch:
    """Right-padded tensors of rows of tokens; loss on the targets alone."""
    tokens = [prompt + target[:-1] for prompt, target in zip(prompts, targets)]
    width = max(map(len, tokens))
    select = [
        n * width + t
        for n, (prompt, target) in enumerate(zip(prompts, targets))
        for t in range(len(prompt) - 1, len(prompt) - 1 + len(target))
    ]
    return Batch(
        examples=None if examples is None else ragged(examples),
        kept=None if kept is None else torch.tensor(kept),
        row=None if row is None else torch.tensor(row),
        tokens=ragged(tokens),
        select=tensor(select),
        targets=tensor([token for target in targets for token in target]),
        read=sum(map(len, tokens)) + sum(len(row) for rows in (examples or [], *earlier) for row in rows) + sum(part.read for part in more),
        left_out=left_out or Counter(),
        earlier=tuple(map(ragged, earlier)),
        more=tuple(more),
        weight=weight,
    )


def again(examples: list[list[int]], gist_ids: Sequence[int], marker: int, weight: float) -> list[Batch]:
    """Reconstruction: after the gists of some rows and a marker, the rows' own tokens once more. Empty if it weighs nothing."""
    texts = [[token for token in row[1:] if token < gist_ids[0]] for row in examples] if weight else []
    return [collate(None, list(range(len(texts))), [[marker]] * len(texts), texts, weight=weight)] if texts else []


QUERIES = 4  # queries that share one row of examples in training: one hyper pass serves them all


@dataclass
class EpisodeBatches:
    """Training batches of tasks: rows of examples with QUERIES queries each; without gists, rows of text.

    method    "hyper": the queries follow gists; "fewshot": they follow the examples; "zeroshot"
    instruct  whether the instruction also stands before a query that follows gists
    fuse      whether the instruction's own keys and values stay in the prefix beside the gists
    reconstruct  the weight of saying the examples again
    pieces    so many times `shots` examples, compressed one after the other
    """

    tasks: Sequence[Task]
    formatter: Formatter
    method: str
    gist_ids: list[int]
    shots: int
    instruct: bool = False
    fuse: bool = False
    reconstruct: float = 0.0
    pieces: int = 1

    def __post_init__(self) -> None:
        self.queries = QUERIES if self.method == "hyper" else 1
        self.weights = [task.weight for task in self.tasks]
        for task in self.tasks:  # a task that is too small is found now, not after hours
            task.draw(random.Random(0), self.shots * self.pieces, self.queries)

    def __str__(self) -> str:
        return f"{len(self.tasks)} training tasks"

    def __call__(self, seed: int, numbers: Sequence[int]) -> Batch:
        """The rows of a run with these numbers. Each is a pure function of (seed, number)."""
        context, kept, row, prompts, targets, left_out = [[] for _ in range(self.pieces)], [], [], [], [], Counter()
        for b, number in enumerate(numbers):
            episode, some = self.draw(random.Random(f"{seed} {number}"))
            left_out += some
            for rows, piece in zip(context, episode.split(self.pieces) if self.method == "hyper" else ()):
                examples = self.formatter.context_row(piece, self.gist_ids)
                rows.append(examples.tokens)
                kept.append(examples.lead)
                left_out += examples.left_out
            for query in episode.queries:
                target = self.formatter.target(episode, query.target) + [self.formatter.tokenizer.eos]
                prompt = self.prompt(episode, query, len(target))
                row.append(b)
                prompts.append(prompt.tokens)
                targets.append(target)
                left_out += prompt.left_out
        *earlier, last = context
        more = again(last, self.gist_ids, self.formatter.tokenizer.eos, self.reconstruct)
        return collate(last or None, row, prompts, targets, kept if self.fuse else None, left_out, more, earlier=earlier if last else ())

    def prompt(self, episode: Episode, query: Example, target: int) -> Row:
        """What comes before a target of so many tokens."""
        budget = self.formatter.query_length - target
        if self.method != "fewshot":
            instruct = "before" if self.method == "zeroshot" else "inside" if self.instruct else "no"
            return self.formatter.query(episode, query, budget, instruct)
        end = self.formatter.query(episode, query, budget, bos=False)
        row = self.formatter.context_row(episode, (), self.formatter.context - target, end.tokens)
        return row._replace(left_out=row.left_out + end.left_out)

    def draw(self, rng: random.Random) -> tuple[Episode, Counter[str]]:
        """An episode of some task."""
        return self.formatter.fitting(
            lambda: rng.choices(self.tasks, self.weights)[0].draw(rng, self.shots * self.pieces, self.queries)
        )
