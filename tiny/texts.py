"""Texts of the miniature: what hyperpretraining compresses first (make.py adds the kinds that tasks have).

Word lists, phrases, small stories, notes and catalogues in which the same things keep going together:
which team an animal belongs to, which word somebody notes down, which mark a shelf has. What goes
with what is drawn anew for each text, so it can only be known from the text itself. A text is a list of
lines or a dialogue. The layouts of P3, Super-NaturalInstructions and symbol tuning don't occur here, and of
P3's eight wordings three do.
"""

import random
import string
from collections.abc import Iterator

from tiny import world

KINDS = ("words", "phrases", "pairs", "stories", "notes", "catalogues")  # of texts, from easy to hard
WORDINGS = ["{s} The {k}?", *(world.WORDINGS[name] for name in ("which_gets", "the_n_is", "which_has"))]

Line = tuple[str, str]  # what is said, and what goes with it


def grouped(rng: random.Random, kind: str) -> Iterator[Line]:
    """Words of one kind, divided at random into groups; each goes with the label of its group."""
    task = world.random_task(rng, rng.choice((2, 2, 3) if kind == "stories" else (2, 3, 6)))
    wording = rng.choice(WORDINGS)
    while True:
        label = rng.choice(list(task.groups))
        word = rng.choice(task.groups[label])
        if kind == "stories":
            said = world.sentence(rng, task.kind, word)
        elif kind == "pairs":
            said = world.pair(rng, task.kind, word)
        else:
            said = rng.choice(world.PHRASES if kind == "phrases" else world.PHRASES[:1]).format(w=word)
        yield said if kind == "words" else wording.format(s=said, k=task.kind, n=task.name), label


def notes(rng: random.Random, _: str) -> Iterator[Line]:
    """Somebody notes a word or two of each sentence, always in the same form."""
    task = world.random_instruction(rng, world.LABELS, held_out=False)
    while True:
        yield task.row(rng)


def mark(rng: random.Random) -> str:
    """A number, some letters or a word."""
    kind = rng.randrange(3)
    if kind == 0:
        return str(rng.randrange(10 ** rng.randint(1, 5)))
    return (
        "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 4)))
        if kind == 1
        else rng.choice(world.LABELS)
    )


def catalogues(rng: random.Random, _: str) -> Iterator[Line]:
    """Sayings about two or three kinds of things, each kind with a mark of its own."""
    topics = rng.choice(world.TRAIN_TOPICS)
    marks = {topic: mark(rng) for topic in topics}
    while True:
        topic = rng.choice(topics)
        yield world.about(rng, topic, topics), marks[topic]


WRITERS = {
    "words": grouped,
    "phrases": grouped,
    "pairs": grouped,
    "stories": grouped,
    "notes": notes,
    "catalogues": catalogues,
}


def text(rng: random.Random, shares: tuple[float, ...], shortest: int, longest: int) -> str:
    """A whole text of so many letters (or a line more), of a kind drawn by its share."""
    (kind,), letters, lines = rng.choices(KINDS, shares), rng.randint(shortest, longest), ""
    layout = rng.choice(["{}\n{}\n", "He: {}\nShe:\n{}\n"])
    for said, goes_with in WRITERS[kind](rng, kind):
        lines += layout.format(said, goes_with)
        if len(lines) >= letters:
            return lines.strip()
