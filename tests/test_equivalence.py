"""Training and evaluation compute what the joint pass computes, with LoRA sets whose B is not zero.

The functions that a run calls (logits of a batch, loss of a step, predictions) are compared with rows laid
out here by hand, one query per row, which `HyperLlama.joint` or the plain model reads. Those two are compared
with a Llama in float64 (`by_hand`), and so are the chapters of further/, whose rows need other positions and
masks. `python -m tests.mutants` shows what mistakes these tests catch.
"""

import copy
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from statistics import fmean
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, G, random_hyper, random_llama, write_hf

import eval as evaluation
import train as training
from data import PLAIN, Episode, EpisodeBatches, Example, Formatter
from gist import HyperLlama, gist_mask
from llama import InputError, load, ragged
from lora import NF4Linear
from run import Options, Run, compression_of, read_lines
from tasks import find
from tasks.p3 import Prompt, Split, p3_tasks
from tiny.make import write_jsonl

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
NEAR = {"atol": 1e-4, "rtol": 1e-4}  # gradients, and float32 beside float64
BOS, EOS, GISTS = 1, 2, [50 + i for i in range(G)]
LETTERS = "\n :abcdefghijklmnopqrstuvwxyzIO0123456789.,?!-+"  # the tokens 3 to 49
DOWNSTREAM = [None, "downstream", "hyper"]  # the paper's frozen model, its D, Mu et al.'s gisting


class Letters:
    """A tokenizer for the small models."""

    bos, eos, size = BOS, EOS, 50

    def encode(self, text: str) -> list[int]:
        return [3 + LETTERS.index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(LETTERS[i - 3] if i > 2 else "_" for i in ids)


encode = Letters().encode


@cache
def usual(task: str) -> Options:
    return training.parse(["--task", task])[0]


def run_of(hyper: HyperLlama, task: str = "p3", **changes) -> Run:
    """The run of a small model with the options of a real one, some of them changed."""
    small = {"gists": G, "context": 600, "query_length": 100, "eval_tokens": 700}
    args = replace(usual(task), **small | changes)
    hyper.compression = compression_of(args)
    run = Run(args, hyper, Formatter(Letters(), args.context, args.query_length))
    run.base = replace(run, hyper=other_base())
    return run


@cache
def attentive_hyper(downstream: str | None) -> HyperLlama:
    """A model whose answers depend much on what comes before the query, and on the LoRA sets."""
    hyper = random_hyper(downstream)
    for name, parameter in hyper.named_parameters():
        parameter.data *= 2 if name.endswith(".B") else 1
    for layer in hyper.model.layers:
        layer.self_attn.q_proj.weight *= 4
        layer.self_attn.o_proj.weight *= 3
    return hyper


@cache
def other_base() -> HyperLlama:
    """Stands for the model before hyperpretraining: the same shape, other numbers, no LoRA set that is on."""
    hyper = copy.deepcopy(attentive_hyper(None))
    hyper.model.embed_tokens.weight.data = hyper.model.embed_tokens.weight.roll(1, 0)
    hyper.model.checksum = "another"
    hyper.hyper_adapter = None
    return hyper


# ------------------------------------------------------------------------------------- rows by hand


def word(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choices(LETTERS[3:29], k=rng.randint(least, most)))


def examples_of(rng: random.Random, count: int, choices: int = 5) -> list[Example]:
    """Inputs and choices of unequal length. (Most choices have three letters: short ones win too easily.)"""
    examples = []
    for _ in range(count):
        texts = tuple(dict.fromkeys(word(rng, 3, 3) for _ in range(choices - 1))) + (word(rng, 2, 4),)
        examples.append(Example(word(rng, 1, 9), rng.choice(texts), texts))
    return examples


def shot(example: Example) -> list[int]:
    return encode(f"\nInput:\n{example.input}\nOutput:\n{example.target}")


def shots_row(shots: list[Example]) -> list[int]:
    return sum(map(shot, shots), [BOS])


def question(query: Example) -> list[int]:
    return encode(f"\nInput:\n{query.input}\nOutput:\n")


def joint(hyper, rows: list[list[int]]) -> torch.Tensor:
    """Logits [B, T, V] of rows of examples, gists and query."""
    return hyper.joint(ragged(rows))


def plain(hyper, rows: list[list[int]], adapter: str | None = None) -> torch.Tensor:
    """Logits [B, T, V] of rows without gists."""
    return hyper.model(ragged(rows), adapter=adapter)[0]


def logits_by_hand(read, pairs: list[tuple]) -> list[torch.Tensor]:
    """For each (row, target) the target's logits after the row, [T, V]. (Its last token predicts nothing.)"""
    logits = read([row + target[:-1] for row, target in pairs])
    return [out[len(row) - 1 :][: len(target)] for out, (row, target) in zip(logits, pairs)]


def losses_of(logits: list[torch.Tensor], pairs: list[tuple]) -> list[torch.Tensor]:
    """For each (row, target) the cross-entropy of the target's tokens, [T]."""
    targets = [torch.tensor(target) for _, target in pairs]
    return [F.cross_entropy(out, target, reduction="none") for out, target in zip(logits, targets)]


def losses_by_hand(read, pairs: list[tuple]) -> list[torch.Tensor]:
    return losses_of(logits_by_hand(read, pairs), pairs)


# --------------------------------------------------------------------------- the model, in float64


def by_hand(hyper, row: list[int], sets: list, visible: torch.Tensor, positions=()) -> torch.Tensor:
    """A Llama for one row: logits [T, V].

    sets [T], each token's LoRA set or None; visible [T, T]; positions [T], else 0 … T-1
    """
    model, T = hyper.model, len(row)
    H, K, hd = model.config.heads, model.config.kv_heads, model.config.head_size
    positions = torch.tensor(positions or [*range(T)])

    def linear(module, x):
        y = x @ module.weight.double().T
        for name, lora in module.lora.items():
            acts = torch.tensor([[name == other] for other in sets])
            y = y + acts * (x @ (8 / 4 * lora.B.double() @ lora.A.double()).T)  # alpha 8, rank 4
        return y

    def norm(module, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight.double()

    def rotated(x):  # [T, h*hd] -> [h, T, hd/2], complex: halves of a head are real and imaginary parts
        frequencies = torch.tensor([10000.0 ** (-2 * i / hd) for i in range(hd // 2)], dtype=torch.float64)
        angles = positions[:, None] * frequencies
        real, imaginary = x.view(T, -1, hd).transpose(0, 1).chunk(2, dim=-1)
        return torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)

    x = torch.cat((model.embed_tokens.weight, hyper.gists)).double()[row]
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        h = norm(layer.input_layernorm, x)
        q, k = rotated(linear(attention.q_proj, h)), rotated(linear(attention.k_proj, h))
        v = linear(attention.v_proj, h).view(T, K, hd)
        heads = []
        for n in range(H):
            scores = (q[n] @ k[n * K // H].conj().T).real / hd**0.5
            heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, n * K // H])
        x = x + linear(attention.o_proj, torch.cat(heads, dim=-1))
        h = norm(layer.post_attention_layernorm, x)
        x = x + linear(mlp.down_proj, F.silu(linear(mlp.gate_proj, h)) * linear(mlp.up_proj, h))
    return norm(model.norm, x) @ model.lm_head.weight.double().T


@pytest.mark.parametrize("size", [1, 0.002], ids=["plain", "tiny"])  # (tiny numbers need the norm's eps)
@pytest.mark.parametrize("downstream", DOWNSTREAM)
def test_the_joint_pass_is_a_llama_whose_queries_see_gists_alone(downstream, size):
    hyper = random_hyper(downstream)
    for table in (hyper.model.embed_tokens.weight, hyper.gists):
        table.data *= size
    examples, query = shots_row(examples_of(random.Random(0), 2)), [BOS, *encode("\nabc")]
    row, end = examples + GISTS + query, len(examples) + G
    sets = ["hyper"] * end + [downstream] * len(query)
    visible = torch.ones(len(row), len(row)).tril().bool()
    visible[end:, : len(examples)] = False
    expected = by_hand(hyper, row, sets, visible).float()
    torch.testing.assert_close(joint(hyper, [row])[0], expected, **NEAR)


@pytest.mark.parametrize("adapter", DOWNSTREAM)
def test_the_plain_model_is_a_llama(adapter):
    hyper, row = random_hyper("downstream"), shots_row(examples_of(random.Random(0), 2))
    expected = by_hand(hyper, row, [adapter] * len(row), torch.ones(len(row), len(row)).tril().bool())
    torch.testing.assert_close(plain(hyper, [row], adapter)[0], expected.float(), **NEAR)


# ------------------------------------------------------------------------ examples and gists in a row

WAYS = {
    "paper": {},
    "spread": {"gists_spread": True},
    "among": {"gists_every": 2},
    "fusion": {"fuse_instruction": True},
    "concat": {"concat": 2},
    "chain": {"chain": 2},
    "anchors": {"anchors": True},
    "anchors concat": {"anchors": True, "concat": 2},
    "anchors chain": {"anchors": True, "chain": 2},
}


class Laid(NamedTuple):
    """Instruction, examples and gists (or anchors) as one row, before a query."""

    tokens: list[int]
    positions: list[int]
    visible: torch.Tensor  # [T, T]
    left: torch.Tensor  # [T] what a query sees of it


def lay_out(way: str, episode: Episode, parts: int = 2) -> Laid:
    """parts: sets of examples that are read side by side, or in a chain"""
    kind, _, joined = way.partition(" ")
    joined = joined or kind
    gists = [] if kind == "anchors" else GISTS
    start, examples = [BOS, *encode(episode.instruction)], [*map(shot, episode.shots)]
    sets = [examples[n::parts] for n in range(parts)] if joined in ("concat", "chain") else [examples]
    segments = [start + sum(own, []) + gists for own in sets]
    if way == "among":
        count = max(1, -(-len(examples) // 2))
        segments = []
        for n in range(count):
            own = GISTS[n * G // count : (n + 1) * G // count]
            segments.append(sum(examples[2 * n : 2 * n + 2], start if n == 0 else []) + own)
    tokens = sum(segments, [])
    positions = [*range(len(tokens))]
    number = torch.tensor([n for n, segment in enumerate(segments) for _ in segment])
    is_kept = torch.tensor(tokens) >= 50
    kept = [G] * len(sets)
    if kind == "anchors":  # BOS, the instruction's last token and each example's, in every segment
        ends = [{1, *accumulate([len(start), *map(len, own)])} for own in sets]
        is_kept = torch.tensor([t + 1 in ends[n] for n, own in enumerate(segments) for t in range(len(own))])
        kept = [*map(len, ends)]
    if joined == "concat":  # what is kept of a set follows that of the sets before
        last = accumulate(kept)
        positions = [p for end, own in zip(last, segments) for p in range(end - len(own), end)]
    if way == "spread":  # when a g-th of the tokens is read
        T = len(tokens) - G
        positions[T:] = [T * g // G - 1 for g in range(1, G + 1)]
    same = number[:, None] == number
    visible = (same if joined == "concat" else same | is_kept).tril()
    left = is_kept.clone()
    left[: len(start)] |= way == "fusion" and episode.instruction != ""
    return Laid(tokens, positions, visible, left)


# ------------------------------------------------------------------------------------------ training


@dataclass
class Recorded:
    """A training task that records its episodes: one to `shots` examples, targets of unequal length.

    instructed: every second episode has an instruction
    """

    instructed: bool = False
    name: str = "t"
    group: str = "t"
    weight: int = 1
    episodes: list[Episode] = field(default_factory=list)

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        examples = [Example(word(rng, 1, 9), word(rng, 1, 4)) for _ in range(queries + rng.randint(1, shots))]
        instruction = word(rng, 4, 9) if self.instructed and len(self.episodes) % 2 == 0 else ""
        self.episodes.append(Episode(examples[:queries], examples[queries:], PLAIN, instruction))
        return self.episodes[-1]


def recorded_batches(run: Run, method: str = "hyper", **options) -> tuple[EpisodeBatches, list[Episode]]:
    """Batches, and a list that fills with their episodes as they are drawn."""
    task = Recorded(**options)
    batches = EpisodeBatches([task], run.formatter, method, 4, GISTS, run.hyper.compression)
    task.episodes.clear()  # EpisodeBatches draws one to check the task
    return batches, task.episodes


def pairs_by_hand(episodes: list[Episode], before) -> list[tuple]:
    """(row, target) for each query. before: episode -> what comes before its questions."""
    pairs = []
    for episode in episodes:
        for query in episode.queries:
            pairs.append((before(episode) + question(query), encode(query.target) + [EOS]))
    return pairs


def after_gists(episode: Episode) -> list[int]:
    return shots_row(episode.shots) + GISTS + [BOS]


def loss_of(run: Run, batch) -> torch.Tensor:
    """The loss of a step of one batch."""
    logits, gists = run.hyper(batch)
    terms = training.loss_terms(run)
    return sum(term.weight * term.loss(run.hyper, batch, gists, logits) / term.count(batch) for term in terms)


def gradients(hyper) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in hyper.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("downstream, kv_heads", [*((name, 2) for name in DOWNSTREAM), (None, 4), (None, 1)])
def test_a_training_batch_has_the_logits_and_the_gradients_of_the_joint_pass(downstream, kv_heads):
    """Rows of unequal length, four queries each. All prefixes end at the same position."""
    run, other = run_of(random_hyper(downstream, kv_heads)), random_hyper(downstream, kv_heads)
    batches, episodes = recorded_batches(run)
    batch = batches(0, range(5, 8))
    assert len(episodes) == 3 and len(batch.row) == 12
    read = [len(shots_row(episode.shots)) + G for episode in episodes]
    assert len(set(read)) == 3

    pairs = pairs_by_hand(episodes, after_gists)
    expected = logits_by_hand(lambda rows: joint(other, rows), pairs)
    assert batch.read == sum(len(row + target) - 1 for row, target in pairs) - 3 * sum(read), "each once"
    for padded in (batch.tokens, batch.context[0].tokens):
        assert (padded == 0).any()
        padded[padded == 0] = 7  # no matter what
    logits, gists = run.hyper(batch)
    torch.testing.assert_close(logits, torch.cat(expected), **CLOSE)
    assert gists.offset.tolist() == [G] * 3 and gists.past[0][0].shape[2] == G

    loss_of(run, batch).backward()
    torch.cat(losses_of(expected, pairs)).mean().backward()
    torch.testing.assert_close(gradients(run.hyper), gradients(other), **CLOSE)
    assert all(gradient.abs().max() > 0 for gradient in gradients(run.hyper).values())


def test_the_log_tells_the_loss_of_labels_from_that_of_their_ends():
    run = run_of(random_hyper())
    batches, episodes = recorded_batches(run)
    batch = batches(0, range(6, 8))
    logits, gists = run.hyper(batch)
    main, *parts = training.loss_terms(run)
    sums = {term.name: term.loss(run.hyper, batch, gists, logits).item() for term in parts}
    counts = {term.name: term.count(batch) for term in parts}
    last = logits[batch.targets == EOS].log_softmax(-1)[:, EOS]
    assert sums["end"] == pytest.approx(-last.sum().item(), rel=1e-5)
    assert counts["end"] == len(last) == sum(len(episode.queries) for episode in episodes)
    assert sum(counts.values()) == len(batch.targets)
    assert sum(sums.values()) == pytest.approx(main.loss(run.hyper, batch, gists, logits).item(), rel=1e-5)
    assert not any(term.weight for term in parts)


@pytest.mark.parametrize("method", ["fewshot", "zeroshot"])
def test_a_batch_without_gists_has_the_loss_of_plain_rows(method):
    run = run_of(random_hyper("downstream"))
    batches, episodes = recorded_batches(run, method)
    batch = batches(0, range(3))
    pairs = pairs_by_hand(episodes, lambda episode: shots_row(episode.shots if method == "fewshot" else []))
    losses = losses_by_hand(lambda rows: plain(run.hyper, rows, "downstream"), pairs)
    torch.testing.assert_close(loss_of(run, batch), torch.cat(losses).mean(), **CLOSE)


LOOP = {"accumulate": 2, "batch_size": 2, "lr": 0.01, "gist_lr": 0.01}
TERMS = {"weight_by_context": True, "distill": 0.5, "reconstruct": 0.3}


def means_by_hand(hyper, episodes: list[Episode], way: str) -> dict[str, torch.Tensor]:
    """The terms of the loss, each a mean over its tokens: of targets, or of examples that are said again."""
    as_read = {"chain": lambda shots: shots[0::2] + shots[1::2]}.get(way, list)  # the order of the examples
    pairs = pairs_by_hand(episodes, lambda episode: lay_out(way, episode).tokens + [BOS])
    in_context = pairs_by_hand(episodes, lambda episode: shots_row(as_read(episode.shots)))
    alone = pairs_by_hand(episodes, lambda episode: [BOS])
    again = [(lay_out(way, e).tokens + [EOS], shots_row(as_read(e.shots))[1:]) for e in episodes]
    logits = logits_by_hand(lambda rows: joint(hyper, rows), pairs)
    losses = torch.cat(losses_of(logits, pairs))
    with torch.no_grad():
        teacher = logits_by_hand(lambda rows: plain(hyper, rows), in_context)
        taught = torch.cat(losses_of(teacher, in_context))
        gain = torch.cat(losses_by_hand(lambda rows: plain(hyper, rows), alone)) - taught
        teacher = torch.cat(teacher).log_softmax(-1)
    student = torch.cat(logits).log_softmax(-1)
    return {
        "targets": losses.mean(),
        "weight_by_context": (gain.clamp(min=0.1) * losses).mean(),
        "distill": (teacher.exp() * (teacher - student)).sum(-1).mean(),
        "reconstruct": torch.cat(losses_by_hand(lambda rows: joint(hyper, rows), again)).mean(),
    }


STEPS = {str(name): (name, "paper", {}) for name in DOWNSTREAM}
STEPS |= {
    "terms": ("downstream", "paper", TERMS),
    "terms, among": ("downstream", "among", TERMS),
    "terms, chain": ("downstream", "chain", TERMS | {"reconstruct": 0.0}),
}


@pytest.mark.parametrize("downstream, way, terms", STEPS.values(), ids=STEPS)
def test_the_loss_of_a_step_is_the_sum_over_its_target_tokens_divided_by_their_number(
    tmp_path, downstream, way, terms
):
    """EOS included; two batches in the step. The same of each further term and its tokens."""
    options = LOOP | WAYS[way] | terms
    run, other = run_of(random_hyper(downstream), steps=1, **options), random_hyper(downstream)
    batches, episodes = recorded_batches(run)
    training.train(run, batches, tmp_path)
    counts = [len(target) for _, target in pairs_by_hand(episodes, after_gists)]
    assert len(counts) == 16 and sum(counts[:8]) != sum(counts[8:])
    means = means_by_hand(other, episodes, way)
    loss = means["targets"]
    if terms:
        further = (terms[name] * means[name] for name in ("distill", "reconstruct"))
        loss = means["weight_by_context"] + sum(further)
    loss.backward()
    norm = torch.cat([gradient.flatten() for gradient in gradients(other).values()]).norm()
    (line,) = read_lines(tmp_path / "log.jsonl")
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["norm"] == pytest.approx(norm.item(), abs=1e-4)


def test_a_run_reads_each_row_once(tmp_path):
    run, numbers = run_of(random_hyper(), steps=3, **LOOP), []
    batches, _ = recorded_batches(run)

    def listing(seed, rows):
        numbers.extend(rows)
        return batches(seed, rows)

    training.train(run, listing, tmp_path)
    assert numbers == [*range(12)], "four in a step"


# ---------------------------------------------------------------------------------- chapters of further/


def after_laid(hyper, laid: Laid, query: list[int]) -> torch.Tensor:
    """Logits [T, V] of a query after it."""
    first, T, end = len(laid.tokens), len(laid.tokens) + len(query), laid.positions[-1] + 1
    visible = torch.ones(T, T).tril().bool()
    visible[:first, :first] = laid.visible
    visible[first:, :first] = laid.left
    sets = [hyper.hyper_adapter] * first + [hyper.downstream_adapter] * len(query)
    positions = laid.positions + [*range(end, end + len(query))]
    row = laid.tokens + query
    logits = by_hand(hyper, row, sets, visible, positions).float()
    is_gist = torch.tensor([row]) >= 50
    if visible.equal(gist_mask(is_gist)[0]):  # what the joint pass can read
        same = hyper.joint(torch.tensor([row]), torch.tensor([positions]))[0]
        torch.testing.assert_close(same, logits, **NEAR)
    return logits[first:]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_make_a_prefix_has_the_logits_and_the_gradients_of_one_row(way):
    """Rows of unequal length, one with an instruction; gists end at the same position, anchors may not."""
    run, other = run_of(random_hyper("downstream"), **WAYS[way]), random_hyper("downstream")
    batches, episodes = recorded_batches(run, instructed=True)
    batch = batches(0, range(5, 8))
    logits, gists = run.hyper(batch)
    expected = [G * run.hyper.compression.parts] * 3
    if "anchors" in way:
        expected = [int(lay_out(way, episode).left.sum()) for episode in episodes]
    assert gists.offset.tolist() == expected

    laid = [lay_out(way, episode) for episode in episodes for _ in episode.queries]
    pairs, expected = pairs_by_hand(episodes, lambda episode: [BOS]), []
    for prefix, (row, target) in zip(laid, pairs, strict=True):
        expected.append(after_laid(other, prefix, row + target[:-1])[len(row) - 1 :])
    torch.testing.assert_close(logits, torch.cat(expected), **NEAR)

    loss_of(run, batch).backward()
    torch.cat(losses_of(expected, pairs)).mean().backward()
    torch.testing.assert_close(gradients(run.hyper), gradients(other), **NEAR)


# ---------------------------------------------------------------------------------------- evaluation


def episodes_of(seed: int, count: int, queries: int) -> list[Episode]:
    """Unequal numbers of examples."""
    rng = random.Random(seed)
    return [Episode(examples_of(rng, queries), examples_of(rng, n)) for n in rng.sample(range(2, 7), count)]


def after(hyper, past, offset: int):
    """A function that reads rows after keys and values of one row."""

    def read(rows):
        prefix = [tuple(x.expand(len(rows), -1, -1, -1) for x in both) for both in past]
        offsets = torch.tensor([offset] * len(rows))
        return hyper.model(ragged(rows), past=prefix, offset=offsets, adapter=hyper.downstream_adapter)[0]

    return read


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Heads [1, K, T, hd] rotated by so many positions [T]: halves of a head are real and imaginary parts."""
    hd = x.shape[-1]
    angles = positions[:, None] * 10000.0 ** (-2 * torch.arange(hd // 2) / hd)
    y = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((y.real, y.imag), dim=-1)


def pooled_by_hand(hyper, shots: list[Example]):
    """A function that reads rows after means over G stretches of the base's keys and values.

    Keys are averaged as if all stood at position 0, and then stand where gists do.
    """
    context = shots_row(shots)
    _, past = hyper.model(torch.tensor([context]))

    def means_of(x):  # [1, K, P, hd] -> [1, K, G, hd]
        return torch.stack([part.mean(2) for part in x.tensor_split(G, dim=2)], dim=2)

    places = torch.arange(len(context))
    means = [(turned(means_of(turned(k, -places)), places[:G]), means_of(v)) for k, v in past]
    return after(hyper, means, G)


def laid_by_hand(hyper, way: str, shots: list[Example], parts: int = 2):
    """A function that reads rows after the examples, and gists or anchors, of one row."""
    laid = lay_out(way, Episode([], shots), parts)
    return lambda rows: [after_laid(hyper, laid, row) for row in rows]


def anchored_by_hand(hyper, shots: list[Example]):
    """The same where the base has read the examples, and answers."""
    return laid_by_hand(HyperLlama(hyper.model, hyper.gists, None), "anchors", shots)


def columns_by_hand(hyper, episode: Episode, other: Episode) -> dict:
    """Column -> (function that reads rows, what comes before the question in them)."""
    shots, alone = episode.shots, [BOS]
    base = lambda rows: plain(hyper, rows)  # noqa: E731
    trained = lambda rows: plain(hyper, rows, hyper.downstream_adapter)  # noqa: E731
    gists = lambda rows: joint(hyper, rows)  # noqa: E731
    earlier = lambda rows: plain(other_base(), rows)  # noqa: E731
    return {
        "main": (gists, after_gists(episode)),
        "zeroshot": (base, alone),
        "fewshot": (base, shots_row(shots)),
        "label_anchors": (anchored_by_hand(hyper, shots), alone),
        "base_fewshot": (earlier, shots_row(shots)),
        "base_label_anchors": (anchored_by_hand(other_base(), shots), alone),
        "no_prefix": (trained, alone),
        "other_task": (gists, after_gists(other)),
        "mean_pooled": (pooled_by_hand(hyper, shots), alone),
        "fewer_shots": (base, shots_row(shots[:1])),
        "trained fewshot": (trained, shots_row(shots)),
        "trained zeroshot": (trained, alone),
    }


def columns_of(run: Run) -> dict:
    """The columns that evaluation compares, and those of models that were trained without gists."""
    trained = {f"trained {name}": evaluation.MAIN[name] for name in ("fewshot", "zeroshot")}
    return evaluation.columns(run, [Prompt(name, name, None) for name in "ab"]) | trained


def predict(run: Run, column, episodes: list[Episode], others: list[Episode]) -> list[str]:
    run = run.base if column.base else run
    return evaluation.predict(run, column, episodes, evaluation.encode(run, column, episodes, others))


@torch.no_grad()
def choices_by_hand(read, row: list[int], queries: list[Example]) -> list[dict[str, torch.Tensor]]:
    """For each query after the row: choice -> the losses of its tokens."""
    pairs = [(row + question(query), encode(choice)) for query in queries for choice in query.choices]
    losses = iter(losses_by_hand(read, pairs))
    return [{choice: next(losses) for choice in query.choices} for query in queries]


@pytest.fixture
def scored(monkeypatch):
    """Log-probabilities of choices, by the choices' tokens, as they are computed."""
    scored, score_choices = {}, evaluation.score_choices

    def listing(model, prompts, choices, *how):
        scores = score_choices(model, prompts, choices, *how)
        scored.update(zip(map(str, choices), scores))
        return scores

    monkeypatch.setattr(evaluation, "score_choices", listing)
    return scored


def assert_best(answers: list[str], by_hand: list[dict[str, torch.Tensor]], scored: dict, mean: bool = False):
    """The answers are the choices with the highest log-probability: the sum over tokens, or the mean."""
    for answer, losses in zip(answers, by_hand, strict=True):
        expected = torch.stack([-loss.mean() if mean else -loss.sum() for loss in losses.values()])
        scores = scored[str([encode(choice) for choice in losses])]
        torch.testing.assert_close(torch.tensor(scores), expected, **NEAR)
        assert scores[list(losses).index(answer)] == max(scores)


EPISODES, OTHERS = episodes_of(4, 3, queries=2), episodes_of(2, 2, queries=1)


@cache
def ranked_by_hand(downstream: str | None) -> dict[str, list[dict]]:
    """Column -> what each query's choices lose."""
    ranked = {}
    for i, episode in enumerate(EPISODES):
        for name, (read, row) in columns_by_hand(attentive_hyper(downstream), episode, OTHERS[i % 2]).items():
            ranked.setdefault(name, []).extend(choices_by_hand(read, row, episode.queries))
    return ranked


SCORES = [*((name, "sum") for name in DOWNSTREAM), ("downstream", "mean")]


@pytest.mark.parametrize("downstream, score", SCORES)
def test_every_column_answers_with_the_choice_that_one_row_holds_most_likely(downstream, score, scored):
    run = run_of(attentive_hyper(downstream), score=score)
    targets = [query.target for episode in EPISODES for query in episode.queries]
    answered, table = {}, columns_of(run)
    assert table.keys() == ranked_by_hand(downstream).keys()
    for name, column in table.items():
        answered[name] = answers = predict(run, column, EPISODES, OTHERS)
        assert_best(answers, ranked_by_hand(downstream)[name], scored, score == "mean")
        scores = [100.0 * (answer == target) for answer, target in zip(answers, targets, strict=True)]
        assert evaluation.score(run, column, EPISODES, OTHERS) == scores
    different = {"main", "zeroshot", "fewshot", "other_task", "mean_pooled"}
    assert len({tuple(answered[name]) for name in different}) == len(different)


@torch.no_grad()
def greedy(read, rows: list[list[int]], end: str) -> list[str]:
    """What greedy decoding writes after each row, one whole pass for each token."""
    answers, end = [[] for _ in rows], encode(end)
    for _ in range(evaluation.MAX_NEW_TOKENS):
        for row, answer, logits in zip(rows, answers, read([a + b for a, b in zip(rows, answers)])):
            if EOS not in answer and answer[-len(end) :] != end:
                answer.append(logits[len(row) + len(answer) - 1].argmax().item())
    texts = []
    for answer in answers:
        length = len(answer) - (len(end) if answer[-len(end) :] == end else EOS in answer)
        texts.append(Letters().decode(answer[:length]).strip())
    return texts


@pytest.mark.parametrize("downstream", DOWNSTREAM)
def test_every_column_writes_what_greedy_decoding_in_one_row_writes(downstream, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 7)
    hyper = attentive_hyper(downstream)
    run, others, free = run_of(hyper), episodes_of(2, 1, queries=1), []
    for episode in episodes_of(1, 2, queries=2):
        free.append(replace(episode, queries=[replace(query, choices=()) for query in episode.queries]))
    by_column = [columns_by_hand(hyper, episode, others[0]) for episode in free]
    read, before = by_column[0]["main"]
    (text,) = greedy(read, [before + question(free[0].queries[0])], PLAIN.end)
    cut = text[4:6]  # ends the first answer early
    for end, names in ((PLAIN.end, columns_of(run)), (cut, ["main"])):
        episodes = [replace(episode, layout=replace(PLAIN, end=end)) for episode in free]
        for name in names:
            expected = []
            for episode, table in zip(episodes, by_column):
                read, before = table[name]
                expected += greedy(read, [before + question(query) for query in episode.queries], end)
            assert predict(run, columns_of(run)[name], episodes, others) == expected, name


def averaged_by_hand(hyper, sets: list[list[Example]]):
    """A function that reads rows after the mean of sets, each compressed alone to gists at 0 … G-1."""
    pasts = []
    for shots in sets:
        row = shots_row(shots) + GISTS
        start = torch.tensor([G - len(row)])
        pasts.append(hyper.model(hyper.embed(torch.tensor([row])), offset=start, adapter="hyper")[1])
    past = []
    for layer in zip(*pasts):
        past.append(tuple(torch.stack([x[:, :, -G:] for x in same]).mean(0) for same in zip(*layer)))
    return after(hyper, past, G)


@pytest.mark.parametrize("way", ["average", "concat", "chain"])
@pytest.mark.parametrize("downstream", DOWNSTREAM)
def test_several_sets_of_examples_answer_like_sets_combined_by_hand(downstream, way, scored):
    hyper, rng = attentive_hyper(downstream), random.Random(3)
    run, episode = run_of(hyper, **{way: 3}), Episode(examples_of(rng, 4), examples_of(rng, 7))
    if way == "average":
        read = averaged_by_hand(hyper, [episode.shots[n::3] for n in range(3)])
    else:
        read = laid_by_hand(hyper, way, episode.shots, parts=3)
    answers = predict(run, evaluation.MAIN["hyper"], [episode], [])
    assert_best(answers, choices_by_hand(read, [BOS], episode.queries), scored)


def test_a_score_that_is_known_is_that_of_the_same_tokens_and_the_same_weights():
    """Columns, draws of examples and steps of training, each scored alone and all together."""
    hyper = copy.deepcopy(attentive_hyper("downstream"))
    run, table, rng = run_of(hyper), columns_of(run_of(hyper)), random.Random(5)
    queries = [examples_of(rng, 6) for _ in range(2)]
    draws = [[[Episode(queries[t], examples_of(rng, 3))] for t in range(2)] for _ in range(2)]
    held_out = evaluation.HeldOut([Prompt(name, name, None) for name in "ab"], draws, Counter(), [])
    for step in range(2):
        scores = evaluation.score_all(run, held_out, table, 2, step)
        for name, column in table.items():
            for t in range(2):
                alone = [fmean(evaluation.score(run, column, draw[t], draw[1 - t], t)) for draw in draws]
                assert scores[name][t] == alone, (name, step)
        generator = torch.Generator().manual_seed(0)
        for parameter in training.trainable(hyper).values():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.3


# --------------------------------------------------------------------- the base, and what is held out


def test_a_checksum_tells_every_tensor(tmp_path):
    model = random_llama()
    known = {load(write_hf(tmp_path, model)).checksum}
    for parameter in model.parameters():
        parameter.mul_(1.5)
        checksum = load(write_hf(tmp_path, model)).checksum
        parameter.div_(1.5)
        assert checksum not in known
        known.add(checksum)


NF4 = torch.tensor([  # QLoRA, appendix E
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
])  # fmt: skip


def test_a_quantized_matrix_is_levels_times_the_scale_of_their_block():
    """Blocks of 64 numbers whose scales differ by up to sixteen times."""
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    scales = 2.0 ** torch.randint(0, 5, (64, 2, 1), generator=generator)
    weight = (torch.randn(64, 2, 64, generator=generator) * scales).view(64, 128)
    linear, x = NF4Linear(128, 64), torch.randn(5, 128, generator=generator)
    linear.load_weight(weight, "cpu", torch.float32)

    blocks = weight.view(-1, 64)
    highest = blocks.abs().amax(1, keepdim=True)
    codes = (blocks[..., None] / highest[..., None] - NF4).abs().argmin(-1)  # [blocks, 64]
    expected = x @ (NF4[codes] * highest).view(64, 128).T
    y = linear(x, {})
    assert (y - expected).norm() / expected.norm() < 0.02, "the scales have 8 bits themselves"
    assert 0.03 < (y - x @ weight.T).norm() / (x @ weight.T).norm() < 0.12, "and four bits are few"


@pytest.mark.parametrize("task", ["p3", "sni", "symbol"])
def test_no_held_out_task_of_the_miniature_is_trained_on(tokenizer, task):
    args = usual(task)
    formatter = Formatter(tokenizer, args.context, args.query_length)
    train, test = ({t.name for t in find(task).load(args, formatter, split)} for split in ("train", "test"))
    assert train and test and not train & test


def test_held_out_datasets_are_told_by_name_where_no_lists_say_which(tmp_path):
    """Story Cloze is neither; scores of another task's answers are no task."""
    names = (ROOT / "tiny" / "P3" / "splits" / "test_tasks.txt").read_text().split()
    folders = ["anli_r1", "super_glue_cb_a", "winogrande_b", "rotten_c", "glue_d"]
    (tmp_path / "data").mkdir()
    for folder, name in zip([*folders, "glue_d_score_eval", "story_cloze_2016_x"], names):
        (tmp_path / "data" / folder).symlink_to(ROOT / "tiny" / "P3" / name)
    assert {task.name for task in p3_tasks(tmp_path, "test")} == {*folders[:3]}
    assert {task.name for task in p3_tasks(tmp_path, "train")} == {*folders[3:]}


def test_no_query_is_among_its_own_examples(tmp_path):
    """In training and in evaluation, where rows are there several times."""
    rows = [(f"question {i % 9}", "yes", ["yes", "no"]) for i in range(27)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "validation.jsonl", rows[:4])
    task = Prompt("t", "t", Split(tmp_path, "train"), Split(tmp_path, "validation"))
    episodes = [task.draw(random.Random(seed), 8, 4) for seed in range(20)]
    episodes += [episode for n in range(5) for episode in task.evaluation(0, n, 8, None)]
    for episode in episodes:
        assert episode.queries and episode.shots
        assert not {query.input for query in episode.queries} & {shot.input for shot in episode.shots}
    with pytest.raises(InputError, match="only 15 training rows aren't questions, for 16 --shots"):
        task.evaluation(0, 0, 16, None)
    (episode,) = task.evaluation(0, 0, 15, None)
    assert len(episode.queries) == 4 and len(episode.shots) == 15
