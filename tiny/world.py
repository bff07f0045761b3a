"""The small world of the miniature: short English sentences, and tasks that ask about them.

A task looks at one kind of word in a sentence (its animal, its colour, …), sorts the words of that
kind into two or three groups and answers with the group's label:

    The red fox sleeps in the barn. Which team gets the animal?   ->   kilo

Which animal belongs to which team can't be known from the wording: it stands in the examples.
"""

import random
from dataclasses import dataclass

KINDS = {
    "animal": "dog cat cow pig fox wolf owl duck".split(),
    "colour": "red blue green white black brown".split(),
    "place": "barn forest river garden kitchen cave".split(),
    "food": "bread apple cheese honey corn soup".split(),
    "person": "Anna Tom Lucy Ben Mia Sam".split(),
    "tool": "hammer rope lamp spade bucket knife".split(),
}

SENTENCES = [
    "The {colour} {animal} sleeps in the {place}.",
    "{person} sees a {colour} {animal}.",
    "The {animal} eats {food} in the {place}.",
    "{person} eats {food}.",
    "{person} takes the {colour} {tool}.",
    "The {tool} is in the {place}.",
    "{person} gives {food} to the {animal}.",
    "A {animal} waits near the {tool}.",
    "{person} walks to the {place} with a {tool}.",
    "There is {food} on the {colour} table.",
]

WORDINGS = {  # {s} sentence, {k} kind of word that is asked about, {n} what the groups are called
    "which_gets": "{s} Which {n} gets the {k}?",
    "the_n_is": "{s} The {n} of the {k} is",
    "which_has": "Which {n} has the {k}? {s}",
    "name_it": "{s} Name the {n} for this {k}.",
    "options": "{s} {n} of the {k}: {options}?",
    "find": "Find the {k}, then its {n}: {s}",
}
SPOT = {  # no groups: the answer stands in the sentence, so the wording is enough
    "spot": "{s} Which {k} is it, {options}?",
    "spot_first": "{options}: which {k} is in this? {s}",
}

# What the groups of a task are called. The last ones are kept for held-out tasks.
GROUP_NAMES = "team box club road house shelf day ship tent".split()

# Labels of training tasks and of held-out tasks: no word is in both.
TRAIN_LABELS = (
    "alpha bravo delta echo golf hotel india juliet lima mike north oscar papa quebec romeo sierra "
    "tango uniform victor whisky yankee zulu iron gold silver copper paper stone wood glass salt sand "
    "spring summer autumn winter seven eight nine ten first last left right yes no true false "
    "good bad hot cold high low early late open closed sweet bitter"
).split()
HELDOUT_LABELS = "kilo foxtrot amber violet coral ivory jade onyx east west up down wet dry loud calm near far".split()
LABELS = TRAIN_LABELS + HELDOUT_LABELS


def sentence(rng: random.Random, kind: str, word: str) -> str:
    """A sentence in which `word` is the only word of its kind."""
    template = rng.choice([t for t in SENTENCES if "{" + kind + "}" in t])
    words = {k: rng.choice(v) for k, v in KINDS.items()}
    return template.format(**words | {kind: word})


@dataclass
class Task:
    """Rows (input, target, options) about one kind of word, sorted into groups or (no groups) spotted."""

    kind: str
    groups: dict[str, list[str]]  # label -> the words that get it; empty: spot the word
    wording: str
    name: str = ""  # what the groups are called

    def row(self, rng: random.Random) -> tuple[str, str, list[str]]:
        if self.groups:
            target, options = rng.choice(list(self.groups)), list(self.groups)
            word = rng.choice(self.groups[target])
        else:
            options = rng.sample(KINDS[self.kind], 2)
            word = target = rng.choice(options)
        return self.ask(sentence(rng, self.kind, word), options), target, options

    def ask(self, text: str, options: list[str] = ()) -> str:
        """The wording around a sentence."""
        options = " or ".join(options or self.groups)
        return self.wording.format(s=text, k=self.kind, n=self.name, options=options)


def split(words: list[str], labels: list[str]) -> dict[str, list[str]]:
    return {label: words[i :: len(labels)] for i, label in enumerate(labels)}


def random_task(rng: random.Random, classes: int) -> Task:
    """Any kind, wording and group name; the words divided at random; labels from all that there are."""
    kind = rng.choice(list(KINDS))
    words = rng.sample(KINDS[kind], len(KINDS[kind]))
    return Task(kind, split(words, rng.sample(LABELS, classes)), rng.choice(list(WORDINGS.values())), rng.choice(GROUP_NAMES))


def p3(rng: random.Random) -> tuple[dict[str, Task], dict[str, Task]]:
    """The miniature's P3: training tasks and held-out tasks by name.

    Training: four datasets for each kind of word and two spotting datasets, in two wordings each.
    Held out: a new grouping with new labels for each kind, a second one for colours, and a spotting
    task; two of them have three groups.
    """
    train, held_out = {}, {}
    for kind in KINDS:
        for group in rng.sample(GROUP_NAMES[:-2], 4):
            chosen = rng.sample(TRAIN_LABELS, rng.choice((2, 2, 3)))
            groups = split(rng.sample(KINDS[kind], len(KINDS[kind])), chosen)
            for wording in rng.sample(list(WORDINGS), 2):
                train[f"{kind}_{group}_{wording}"] = Task(kind, groups, WORDINGS[wording], group)
    for kind in ("animal", "food"):
        for wording, text in SPOT.items():
            train[f"{kind}_{wording}"] = Task(kind, {}, text)
    labels = rng.sample(HELDOUT_LABELS, len(HELDOUT_LABELS))
    for i, kind in enumerate([*KINDS, "colour"]):
        count = 3 if i in (0, 6) else 2
        chosen, labels = labels[:count], labels[count:]
        groups = split(rng.sample(KINDS[kind], len(KINDS[kind])), chosen)
        group, wording = GROUP_NAMES[-1 - i % 2], list(WORDINGS)[i % 6]
        held_out[f"{kind}_{group}_{wording}"] = Task(kind, groups, WORDINGS[wording], group)
    held_out["place_spot"] = Task("place", {}, SPOT["spot"])
    return train, held_out
