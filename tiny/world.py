"""The small world of the miniature: short English sentences, and tasks that ask about them.

P3: a task looks at one kind of word in a sentence (its animal, its colour, …), sorts the words of that
kind into two or three groups and answers with the group's label:

    The red fox sleeps in the barn. Which team gets the animal?   ->   kilo

Which animal belongs to which team can't be known from the wording: it stands in the examples.

Super-NaturalInstructions: a definition says which words to pick out of a sentence and, in half of
the tasks, how to write them; in the others only the examples show that.

Symbol tuning: a text is about one of two or three kinds of things, and its label is the kind.
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

PHRASES = ["{w}", "Here is {w}.", "Look at the {w}!", "It is the {w} again.", "I like {w}."]

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
HELDOUT_LABELS = (
    "kilo foxtrot amber violet coral ivory jade onyx east west up down wet dry loud calm near far".split()
)
LABELS = TRAIN_LABELS + HELDOUT_LABELS


def sentence(rng: random.Random, kind: str, word: str) -> str:
    """A sentence in which `word` is the only word of its kind."""
    template = rng.choice([t for t in SENTENCES if "{" + kind + "}" in t])
    words = {k: rng.choice(v) for k, v in KINDS.items()}
    return template.format(**words | {kind: word})


def pair(rng: random.Random, kind: str, word: str) -> str:
    """`word` beside one of another kind."""
    words = [word, rng.choice(KINDS[rng.choice([other for other in KINDS if other != kind])])]
    rng.shuffle(words)
    return "The {} and the {}.".format(*words)


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
    return Task(
        kind,
        split(words, rng.sample(LABELS, classes)),
        rng.choice(list(WORDINGS.values())),
        rng.choice(GROUP_NAMES),
    )


def p3(rng: random.Random) -> tuple[dict[str, Task], dict[str, Task]]:
    """The miniature's P3: training tasks and held-out tasks by name.

    Training: for each kind of word 20 groupings, each in one wording, and for two of them spotting tasks.
    Held out: two groupings with new labels for each kind, half of them in three groups, two more, and
    two spotting tasks.
    """
    train, held_out = {}, {}
    for kind in KINDS:
        for n in range(20):
            group, wording = GROUP_NAMES[n % (len(GROUP_NAMES) - 2)], rng.choice(list(WORDINGS))
            labels = rng.sample(TRAIN_LABELS, rng.choice((2, 2, 3)))
            groups = split(rng.sample(KINDS[kind], len(KINDS[kind])), labels)
            train[f"{kind}_{group}{n:02}_{wording}"] = Task(kind, groups, WORDINGS[wording], group)
    for kind in ("animal", "food", "tool"):
        for wording, text in SPOT.items():
            train[f"{kind}_{wording}"] = Task(kind, {}, text)
    for i, kind in enumerate([*KINDS, *KINDS, "animal", "place"]):
        labels = rng.sample(HELDOUT_LABELS, 3 if i % 12 >= 6 else 2)
        groups = split(rng.sample(KINDS[kind], len(KINDS[kind])), labels)
        group, wording = GROUP_NAMES[-1 - i % 2], list(WORDINGS)[(i + i // 6) % 6]
        held_out[f"{kind}_{group}{i:02}_{wording}"] = Task(kind, groups, WORDINGS[wording], group)
    for kind, wording in (("place", "spot"), ("colour", "spot_first")):
        held_out[f"{kind}_{wording}"] = Task(kind, {}, SPOT[wording])
    return train, held_out


# ------------------------------------------------------------------- tasks with a definition (S-NI)

FORMS = {  # how to write what was found, x; {w}: an arbitrary word that belongs to the task
    "{x}": "",
    "{x} {x}": " Write it twice.",
    "{w} {x}": " Write {w} before it.",
    "{x} {w}": " Write {w} after it.",
    "{w} {x} {w}": " Write {w} on both sides of it.",
}


def together(kinds: tuple[str, ...]) -> list[str]:
    """The sentences that have a word of each of these kinds."""
    return [t for t in SENTENCES if all("{" + kind + "}" in t for kind in kinds)]


PICKS = [(a,) for a in KINDS] + [(a, b) for a in KINDS for b in KINDS if a != b and together((a, b))]


def is_held_out(pick: tuple[str, ...], form: str) -> bool:
    """A fifth of the ways to combine a pick with a form is held out; all picks and all forms train."""
    return (PICKS.index(pick) + 2 * list(FORMS).index(form)) % 5 == 0


@dataclass
class Instruction:
    """Rows (input, outputs) of a task with a definition."""

    pick: tuple[str, ...]  # the kinds of the words to find, in the order in which they are written
    form: str
    word: str
    told: bool  # whether the definition says the form

    @property
    def definition(self) -> str:
        found = " and ".join(f"the {kind}" for kind in self.pick)
        return f"You are given a sentence. Find {found}." + FORMS[self.form].format(w=self.word) * self.told

    def row(self, rng: random.Random) -> tuple[str, str]:
        words = {kind: rng.choice(words) for kind, words in KINDS.items()}
        found = " ".join(words[kind] for kind in self.pick)
        return rng.choice(together(self.pick)).format(**words), self.form.format(x=found, w=self.word)


def random_instruction(rng: random.Random, words: list[str], held_out: bool) -> Instruction:
    while True:
        pick, form = rng.choice(PICKS[: len(KINDS)] if rng.random() < 0.4 else PICKS), rng.choice(list(FORMS))
        if is_held_out(pick, form) == held_out:
            return Instruction(pick, form, rng.choice(words), rng.random() < 0.5)


def sni(rng: random.Random) -> tuple[dict[str, Instruction], dict[str, Instruction]]:
    """The miniature's Super-NaturalInstructions: training and held-out tasks by name, all different."""
    found = []
    for count, words, held_out in ((60, TRAIN_LABELS, False), (12, HELDOUT_LABELS, True)):
        tasks: dict[str, Instruction] = {}
        while len(tasks) < count:
            task = random_instruction(rng, words, held_out)
            form = list(FORMS).index(task.form)
            name = f"{'_and_'.join(task.pick)}_form_{form}_{'told' if task.told else 'shown'}"
            tasks.setdefault(name, task)
        found.append(tasks)
    numbered = [
        {f"task{1 + i + 100 * part:03}_{name}": tasks[name] for i, name in enumerate(tasks)}
        for part, tasks in enumerate(found)
    ]
    return numbered[0], numbered[1]


# ------------------------------------------------------------- sets to classify (symbol tuning)

SHORT = [
    "Look at the {animal}.", "The {animal} runs home.", "Everything is {colour}.",
    "What a nice {colour} one!", "We go to the {place}.",
    "They live near the {place}.", "I like {food}.", "We had {food} again.",
    "{person} smiles.", "It was {person} who came.", "The {tool} is old.", "Put the {tool} away.",
]  # fmt: skip
HELDOUT_TOPICS = [
    ("animal", "tool"),
    ("colour", "person"),
    ("food", "place"),
    ("animal", "food", "person"),
    ("colour", "place", "tool"),
]
TOPICS = [
    *((a, b) for i, a in enumerate(sorted(KINDS)) for b in sorted(KINDS)[i + 1 :]),
    *(
        ("animal", "colour", "place"),
        ("food", "person", "tool"),
        ("animal", "person", "tool"),
        ("colour", "food", "place"),
    ),
]
TRAIN_TOPICS = [topics for topics in TOPICS if topics not in HELDOUT_TOPICS]


def about(rng: random.Random, kind: str, topics: tuple[str, ...]) -> str:
    """A text about this one of the topics, mostly a short one: it has no word of the others."""
    others = ["{" + other + "}" for other in topics if other != kind]
    source = SHORT if rng.random() < 0.7 else SENTENCES
    templates = [t for t in source if "{" + kind + "}" in t and not any(other in t for other in others)]
    return rng.choice(templates).format(**{k: rng.choice(words) for k, words in KINDS.items()})
