"""From examples to batches: what a task is, how its text is laid out in tokens, what fits (paper, Section 4).

A task (tasks/p3.py, …) gives episodes: queries, and what may be known of their task (an instruction,
examples). Formatter turns episodes into rows of tokens, whole examples only:

    hypernetwork   BOS instruction {\nInput:\n x \nOutput:\n y}×shots gist×G
    downstream     BOS \nInput:\n x \nOutput:\n   then y EOS, the only tokens with a loss

A row of a run is first a Sample, plain lists of tokens, and a pure function of the seed and the row's
number: a run is resumed at any step, by any number of processes, by asking for those rows. Samples
then become the tensors of a Batch.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from torch import Tensor

from gist import Compression, Context, Rows
from llama import InputError, Tokenizer, int_tensor, ragged

# ----------------------------------------------------------------------------- examples and episodes


@dataclass(frozen=True)
class Example:
    input: str
    target: str
    choices: tuple[str, ...] = ()  # to rank, where answers are ranked
    references: tuple[str, ...] = ()  # all right answers, where answers are generated


@dataclass(frozen=True)
class Layout:
    """How a task is written. (Of a query, too long an input loses its beginning.)"""

    shot: str  # an example: {n} its number, {input}, {target}
    head: str  # before the input of a query
    tail: str  # after it
    space: str = ""  # before the input and the target of a query
    instruction: str = "{}"  # before everything, around an instruction
    end: str = "\nInput:\n"  # what follows a target where examples stand in a row: cuts a generated answer

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

    def split(self, parts: int) -> list["Episode"]:
        """The same with a part of the examples each."""
        return [replace(self, shots=self.shots[n::parts]) for n in range(parts)]


class Task(Protocol):
    """What tasks/*.py load: one prompt of P3, one task of S-NI, one set of texts with labels."""

    name: str
    group: str  # scores are averaged within a group, then over groups
    weight: int  # how often the task is drawn in training, relative to others

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        """An episode of training."""

    def evaluation(self, seed: int, n: int, shots: int, limit: int | None) -> list[Episode]:
        """All queries that are scored (at most `limit`), with the n-th draw of examples."""


# ------------------------------------------------------------------------------------ rows of tokens

ROOM_FOR_QUERY = 32  # tokens of a downstream row that its target must leave to the query


@dataclass(frozen=True)
class Formatter:
    """Turns episodes into rows of tokens within a budget.

    row                          budget                   what is too long
    instruction, examples,       context                  instruction: beyond half, cut at its end;
    gists (or query, target)                              examples: left out whole, one by one
    query, target                query_length             input: cut at its beginning; target: never
    """

    tokenizer: Tokenizer
    context: int  # most tokens of a row of examples, gists included
    query_length: int  # most tokens of a query with its target
    end: str = "eos"  # what a target ends with; "layout": what follows it where examples stand in a row
    left_out: Counter[str] = field(default_factory=Counter)  # counts what didn't fit (report)

    def count(self, what: str, left_out: bool) -> None:
        self.left_out.update({what: 1, f"{what} left out": int(left_out)})

    def instruction(self, episode: Episode, budget: int) -> list[int]:
        """The instruction's tokens; at most half of the budget, of which it keeps the beginning."""
        if not episode.instruction:
            return []
        tokens = self.tokenizer.encode(episode.layout.instruction.format(episode.instruction))
        self.count("instructions", len(tokens) > budget // 2)
        return tokens[: budget // 2]

    def context_parts(
        self, episode: Episode, budget: int | None = None, reserved: int = 0
    ) -> tuple[list[int], list[list[int]]]:
        """BOS and the instruction; and the whole examples that fit beside `reserved` tokens."""
        budget = self.context if budget is None else max(0, budget)
        start = [self.tokenizer.bos, *self.instruction(episode, budget)]
        room = budget - len(start) - reserved
        examples = []
        for n, example in enumerate(episode.shots, 1):
            tokens = self.tokenizer.encode(episode.layout.example(n, example))
            fits = len(tokens) <= room
            self.count("shots", not fits)
            if fits:
                examples.append(tokens)
                room -= len(tokens)
        return start, examples

    def context_tokens(self, episode: Episode, budget: int | None = None, reserved: int = 0) -> list[int]:
        """The same as one row."""
        start, examples = self.context_parts(episode, budget, reserved)
        return sum(examples, start)

    def target(self, episode: Episode, text: str) -> list[int]:
        return self.tokenizer.encode(episode.layout.space + text)

    def training_target(self, episode: Episode, text: str) -> list[int]:
        """The target and its end: all that has a loss."""
        end = [self.tokenizer.eos] if self.end == "eos" else self.tokenizer.encode(episode.layout.end)
        return self.target(episode, text) + end

    def query(self, episode: Episode, example: Example, budget: int, instruct: str = "no") -> list[int]:
        """The prompt of a query, in so many tokens. What is too long loses the beginning of its input.

        instruct     the prompt begins with
        "no"         BOS
        "inside"     BOS and the instruction, in up to half of the budget
        "before"     BOS and the instruction, beside the budget: as much of it as a hypernetwork reads
        "continues"  nothing: it goes on in the row of its examples, which has both already
        """
        layout = episode.layout
        instruction = []
        if instruct in ("inside", "before"):
            instruction = self.instruction(episode, budget if instruct == "inside" else self.context)
            budget += len(instruction) * (instruct == "before")
        start = [] if instruct == "continues" else [self.tokenizer.bos, *instruction]
        start += self.tokenizer.encode(layout.head)
        text = self.tokenizer.encode(layout.space + example.input)
        end = self.tokenizer.encode(layout.tail)
        room = budget - len(start) - len(end)
        if room < 0:
            raise InputError(
                f"--query-length {self.query_length}: a query's layout takes {len(start) + len(end)} tokens, "
                f"and its target or choices leave {max(0, budget)}"
            )
        self.count("queries", len(text) > room)
        return start + text[max(0, len(text) - room) :] + end

    def fits(self, query: Example) -> bool:
        """Whether a training target leaves room for its query. A target is never cut."""
        fits = len(self.tokenizer.encode(query.target)) + ROOM_FOR_QUERY <= self.query_length
        self.count("targets", not fits)
        return fits

    def first_that_fits(self, draw: Callable[[], Episode]) -> Episode:
        """Of a hundred drawn episodes the first with a query whose target fits, and only such queries."""
        for _ in range(100):
            episode = draw()
            queries = [query for query in episode.queries if self.fits(query)]
            if queries:
                return replace(episode, queries=queries)
        raise InputError(f"no target fits into {self.query_length} tokens (--query-length)")


LEFT_OUT = {  # what is counted -> what becomes of it where it doesn't fit
    "shots": "examples left out, because the context was full",
    "instructions": "instructions cut at the end, because they were too long",
    "targets": "training targets left out, because they were too long",
    "queries": "queries cut at the beginning, because they were too long",
}


def report(left_out: Counter[str]) -> str:
    """What was left out or cut, in a line; empty if nothing was."""
    counts = {what: (left_out[f"{what} left out"], left_out[what]) for what in LEFT_OUT}
    return "; ".join(f"{n} of {total} {LEFT_OUT[what]}" for what, (n, total) in counts.items() if n)


# ------------------------------------------------------------------------------------------ batches


class Sample(NamedTuple):
    """A row of a run as tokens: examples to compress, if any, and the queries that share them."""

    context: list[Context] | None
    queries: list[tuple[list[int], list[int]]]


@dataclass
class Batch:
    """What `HyperLlama.forward` reads. N queries share the contexts of B samples; M tokens have a loss."""

    context: list[Rows] | None  # rows for the hypernetwork, usually one piece of B rows; or None
    row: Tensor  # [N] which sample each query belongs to
    tokens: Tensor  # [N, T] the queries with their targets (without the last token, which is only predicted)
    select: Tensor  # [M] where a target token is predicted, as indices into N·T
    targets: Tensor  # [M] the tokens to predict there
    read: int  # tokens read, padding left out: for tokens/s

    def to(self, device) -> "Batch":
        context = self.context and [rows.to(device) for rows in self.context]
        tensors = (self.row, self.tokens, self.select, self.targets)
        return Batch(context, *(x.to(device, non_blocking=True) for x in tensors), self.read)


class Term(NamedTuple):
    """A term of the loss: weight × the sum over some tokens / their number in the whole step."""

    weight: float
    count: Callable  # batch -> the number of its tokens; the whole step divides by the same sum of them
    loss: Callable  # (hyper, batch, gists, logits) -> the sum over the batch's tokens
    name: str = ""  # the log has its mean as `name`_loss; without a name, only the sum of all terms


NO_LOSS = -100  # a label that isn't predicted


def collate(samples: Sequence[Sample]) -> Batch:
    """Right-padded tensors of samples; a loss on the targets alone."""
    queries = [(b, *query) for b, sample in enumerate(samples) for query in sample.queries]
    # The model reads prompt + target but for the last token, and predicts the token after each that it reads:
    # the end of the prompt predicts the target's first token.
    tokens = [prompt + target[:-1] for _, prompt, target in queries]
    labels = [[NO_LOSS] * (len(prompt) - 1) + target for _, prompt, target in queries]
    labels = ragged(labels, fill=NO_LOSS).flatten()
    select = (labels != NO_LOSS).nonzero()[:, 0]
    pieces = list(zip(*(sample.context for sample in samples))) if samples[0].context else []
    return Batch(
        context=[Rows.of(contexts) for contexts in pieces] or None,
        row=int_tensor([b for b, _, _ in queries]),
        tokens=ragged(tokens),
        select=select,
        targets=labels[select],
        read=sum(map(len, tokens)) + sum(len(context.tokens) for contexts in pieces for context in contexts),
    )


QUERIES = 4  # queries that share one row of examples in training: one hyper pass serves them all


@dataclass
class EpisodeBatches:
    """Training batches of tasks.

    method    "hyper": QUERIES queries follow the gists of their examples; "fewshot": one follows the
              examples themselves; "zeroshot": one follows nothing
    instruct  where the instruction stands in a query that follows gists (Formatter.query)
    """

    tasks: Sequence[Task]
    formatter: Formatter
    method: str
    shots: int
    gist_ids: Sequence[int] = ()
    compression: Compression = Compression()
    instruct: str = "no"

    def __post_init__(self) -> None:
        self.queries = QUERIES if self.method == "hyper" else 1
        self.weights = [task.weight for task in self.tasks]
        for task in self.tasks:  # a task that is too small is found now, not after hours
            task.draw(random.Random(0), self.shots * self.compression.parts, self.queries)

    def __str__(self) -> str:
        return f"{len(self.tasks)} training tasks"

    def __call__(self, seed: int, numbers: Sequence[int]) -> Batch:
        """The rows of a run with these numbers. Each is a pure function of (seed, number)."""
        return collate([self.sample(random.Random(f"{seed} {number}")) for number in numbers])

    def sample(self, rng: random.Random) -> Sample:
        def draw() -> Episode:
            (task,) = rng.choices(self.tasks, self.weights)
            return task.draw(rng, self.shots * self.compression.parts, self.queries)

        episode = self.formatter.first_that_fits(draw)
        context = None
        if self.method == "hyper":
            context = self.compression.contexts(self.formatter, episode, self.gist_ids)
        return Sample(context, [self.prompt_and_target(episode, query) for query in episode.queries])

    def prompt_and_target(self, episode: Episode, query: Example) -> tuple[list[int], list[int]]:
        f = self.formatter
        target = f.training_target(episode, query.target)
        budget = f.query_length - len(target)
        if self.method == "fewshot":
            end = f.query(episode, query, budget, "continues")
            return f.context_tokens(episode, f.context - len(target), reserved=len(end)) + end, target
        instruct = "before" if self.method == "zeroshot" else self.instruct
        return f.query(episode, query, budget, instruct), target
