"""Training and evaluation compute what the joint pass computes, with LoRA sets whose B is not zero.

The functions that a run calls (logits of a batch, loss of a step, answers to queries) are compared with rows
laid out here by hand, one query per row, which `HyperLlama.joint` or the plain model reads. Those two are
compared with a Llama in float64 (`by_hand`). `python -m tests.mutants` shows what mistakes these tests catch.
"""

import argparse
import contextlib
import json
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, G, random_hyper

import eval as evaluation
import train as training
from data import PLAIN, Episode, EpisodeBatches, Example, Formatter
from llama import ragged
from lora import NF4Linear
from tasks import TASKS, Run
from tasks.p3 import Prompt, Split, p3_tasks
from tiny.make import write_jsonl

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
BOS, EOS, GISTS = 1, 2, [50 + i for i in range(G)]
LETTERS = "\n :abcdefghijklmnopqrstuvwxyzIO0123456789.,?!-+"  # the tokens 3 to 49
ANSWERERS = [None, "downstream", "hyper"]  # the paper's frozen model, its D, Mu et al.'s gisting


class Letters:
    """A tokenizer for the small models."""

    bos, eos, size = BOS, EOS, 50

    def encode(self, text: str) -> list[int]:
        return [3 + LETTERS.index(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(LETTERS[i - 3] if i > 2 else "_" for i in ids)


encode = Letters().encode


def args_of(task: str = "p3", **changes) -> argparse.Namespace:
    """The options of a real run, some of them changed."""
    return argparse.Namespace(**vars(training.parse(["--task", task])[0]) | changes)


def attentive_hyper(answerer: str | None):
    """A model whose answers depend much on what comes before the query, and on the LoRA sets."""
    hyper = random_hyper(answerer)
    for name, parameter in hyper.named_parameters():
        parameter.data *= 2 if name.endswith(".B") else 1
    for layer in hyper.model.layers:
        layer.self_attn.q_proj.weight *= 4
        layer.self_attn.o_proj.weight *= 3
    return hyper


def run_of(hyper, **changes) -> Run:
    args = args_of(gists=G, context=600, query_length=100, eval_tokens=700, **changes)
    return Run(args, hyper, Formatter(Letters(), args.context, args.query_length))


# ------------------------------------------------------------------------------------- rows by hand


def word(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choices(LETTERS[3:29], k=rng.randint(least, most)))


def examples_of(rng: random.Random, count: int, choices: int = 8) -> list[Example]:
    """Inputs and options of unequal length. (Most options have three letters: short ones win too easily.)"""
    examples = []
    for _ in range(count):
        options = tuple(dict.fromkeys(word(rng, 3, 3) for _ in range(choices - 1))) + (word(rng, 2, 4),)
        examples.append(Example(word(rng, 1, 9), rng.choice(options), options))
    return examples


def shots_row(shots: list[Example]) -> list[int]:
    return [BOS] + encode("".join(f"\nInput:\n{shot.input}\nOutput:\n{shot.target}" for shot in shots))


def question(query: Example) -> list[int]:
    return encode(f"\nInput:\n{query.input}\nOutput:\n")


def joint(hyper, rows: list[list[int]]) -> torch.Tensor:
    """Logits [B, T, V] of rows of examples, gists and query."""
    return hyper.joint(ragged(rows))


def plain(hyper, rows: list[list[int]], adapter: str | None = None) -> torch.Tensor:
    """Logits [B, T, V] of rows without gists."""
    return hyper.model(ragged(rows), adapter=adapter)[0]


def targets_by_hand(read, row: list[int], *targets: list[int]) -> list[torch.Tensor]:
    """For each target its logits after the row, [T, V]. (What it ends with predicts nothing.)"""
    logits = read([row + target[:-1] for target in targets])
    return [out[len(row) - 1 : len(row) - 1 + len(target)] for out, target in zip(logits, targets)]


def losses_by_hand(read, row: list[int], *targets: list[int]) -> list[torch.Tensor]:
    """For each target its cross-entropy after the row, summed over its tokens."""
    pairs = zip(targets_by_hand(read, row, *targets), targets)
    return [F.cross_entropy(logits, torch.tensor(target), reduction="sum") for logits, target in pairs]


# --------------------------------------------------------------------------- the model, in float64


def by_hand(hyper, row: list[int], sets: list[str | None], visible: torch.Tensor) -> torch.Tensor:
    """A Llama for one row, positions 0 … T-1: logits [T, V]. sets: each token's LoRA set; visible [T, T]."""
    model, T = hyper.model, len(row)
    H, K, hd = model.config.heads, model.config.kv_heads, model.config.head_size

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
        angles = torch.arange(T)[:, None] * frequencies
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
@pytest.mark.parametrize("answerer", ANSWERERS)
def test_the_joint_pass_is_a_llama_whose_queries_see_gists_alone(answerer, size):
    hyper = random_hyper(answerer)
    for table in (hyper.model.embed_tokens.weight, hyper.gists):
        table.data *= size
    examples, query = shots_row(examples_of(random.Random(0), 2)), [BOS, *encode("\nabc")]
    row, end = examples + GISTS + query, len(examples) + G
    sets = ["hyper"] * end + [answerer] * len(query)
    visible = torch.ones(len(row), len(row)).tril().bool()
    visible[end:, : len(examples)] = False
    expected = by_hand(hyper, row, sets, visible).float()
    torch.testing.assert_close(joint(hyper, [row])[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapter", ANSWERERS)
def test_the_plain_model_is_a_llama(adapter):
    hyper, row = random_hyper("downstream"), shots_row(examples_of(random.Random(0), 2))
    expected = by_hand(hyper, row, [adapter] * len(row), torch.ones(len(row), len(row)).tril().bool())
    torch.testing.assert_close(plain(hyper, [row], adapter)[0], expected.float(), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------ training


@dataclass
class Recorded:
    """A training task that records its episodes: one to `shots` examples, targets of unequal length."""

    name: str = "t"
    group: str = "t"
    weight: int = 1
    episodes: list[Episode] = field(default_factory=list)

    def draw(self, rng: random.Random, shots: int, queries: int) -> Episode:
        examples = [Example(word(rng, 1, 9), word(rng, 1, 4)) for _ in range(queries + rng.randint(1, shots))]
        self.episodes.append(Episode(examples[:queries], examples[queries:]))
        return self.episodes[-1]


def recorded_batches(method: str = "hyper") -> tuple[EpisodeBatches, list[Episode]]:
    """Batches, and a list that fills with their episodes as they are drawn."""
    task = Recorded()
    batches = EpisodeBatches([task], Formatter(Letters(), 600, 100), method, GISTS, shots=4)
    task.episodes.clear()  # EpisodeBatches draws one to check the task
    return batches, task.episodes


def pairs_by_hand(hyper, episodes: list[Episode], method: str = "hyper") -> list[tuple]:
    """(function that reads rows, row, target) for each query."""
    pairs = []
    for episode in episodes:
        for query in episode.queries:
            if method == "hyper":
                read = lambda rows: joint(hyper, rows)  # noqa: E731
                row = shots_row(episode.shots) + GISTS + [BOS]
            else:
                read = lambda rows: plain(hyper, rows, hyper.answerer)  # noqa: E731
                row = shots_row(episode.shots if method == "fewshot" else [])
            pairs.append((read, row + question(query), encode(query.target) + [EOS]))
    return pairs


def gradients(hyper) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in hyper.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("answerer", ANSWERERS)
def test_a_training_batch_has_the_logits_and_the_gradients_of_the_joint_pass(answerer):
    """Rows of unequal length, four queries each."""
    batches, episodes = recorded_batches()
    batch, hyper, other = batches(0, range(5, 8)), random_hyper(answerer), random_hyper(answerer)
    assert len(episodes) == 3 and len(batch.row) == 12
    assert len({len(shots_row(episode.shots)) for episode in episodes}) == 3

    pairs = pairs_by_hand(other, episodes)
    expected = torch.cat([logits for pair in pairs for logits in targets_by_hand(*pair)])
    torch.testing.assert_close(hyper(batch), expected, **CLOSE)

    training.loss_of(hyper, batch, args_of()).backward()
    sum(losses_by_hand(*pair)[0] for pair in pairs).backward()
    torch.testing.assert_close(gradients(hyper), gradients(other), atol=1e-4, rtol=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in gradients(hyper).values())


@pytest.mark.parametrize("method", ["fewshot", "zeroshot"])
def test_a_batch_without_gists_has_the_loss_of_plain_rows(method):
    batches, episodes = recorded_batches(method)
    batch, hyper = batches(0, range(3)), random_hyper("downstream")
    expected = sum(losses_by_hand(*pair)[0] for pair in pairs_by_hand(hyper, episodes, method))
    torch.testing.assert_close(training.loss_of(hyper, batch, args_of()), expected, **CLOSE)


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def loop_args(**changes) -> argparse.Namespace:
    return args_of(accumulate=2, batch_size=2, lr=0.01, gist_lr=0.01, save_every=1, **changes)


@pytest.mark.parametrize("answerer", ANSWERERS)
def test_the_loss_of_a_step_is_the_sum_over_its_target_tokens_divided_by_their_number(tmp_path, answerer):
    """EOS included; two batches in the step."""
    (batches, episodes), other = recorded_batches(), random_hyper(answerer)
    training.train(random_hyper(answerer), batches, loop_args(steps=1), tmp_path, False, rank=0, world=1)
    pairs = pairs_by_hand(other, episodes)
    counts = [sum(len(target) for *_, target in half) for half in (pairs[:8], pairs[8:])]
    assert len(pairs) == 16 and counts[0] != counts[1]
    loss = sum(losses_by_hand(*pair)[0] for pair in pairs) / sum(counts)
    loss.backward()
    norm = torch.cat([gradient.flatten() for gradient in gradients(other).values()]).norm()
    (line,) = log_of(tmp_path)
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert line["norm"] == pytest.approx(norm.item(), abs=1e-4)


def test_a_run_that_was_stopped_goes_on_with_the_rows_that_follow(tmp_path):
    def stop(step):
        if step == 3:
            raise InterruptedError  # two steps are saved
        return {}

    def train(out, resume=False, measured=lambda step: {}):
        batches, _ = recorded_batches()
        hyper, numbers = random_hyper("downstream"), []
        out.mkdir(exist_ok=True)

        def listing(seed, rows):
            numbers.extend(rows)
            return batches(seed, rows)

        with contextlib.suppress(InterruptedError):
            training.train(hyper, listing, loop_args(steps=4), out, resume, 0, 1, measured)
        return numbers, [(line["step"], line["loss"], line["norm"]) for line in log_of(out)]

    numbers, log = train(tmp_path / "whole")
    assert numbers == [*range(16)], "four rows in a step, each once"
    train(tmp_path / "cut", measured=stop)
    rest, same = train(tmp_path / "cut", resume=True)
    assert rest == [*range(8, 16)] and same == log


# ---------------------------------------------------------------------------------------- evaluation


def episodes_of(seed: int, count: int, queries: int, choices: int = 8) -> list[Episode]:
    """Unequal numbers of examples."""
    rng = random.Random(seed)
    return [
        Episode(examples_of(rng, queries, choices), examples_of(rng, n))
        for n in rng.sample(range(2, 7), count)
    ]


def after(hyper, past, offset: int):
    """A function that reads rows after keys and values of one row."""

    def read(rows):
        prefix = [tuple(x.expand(len(rows), -1, -1, -1) for x in both) for both in past]
        offsets = torch.tensor([offset] * len(rows))
        return hyper.model(ragged(rows), past=prefix, offset=offsets, adapter=hyper.answerer)[0]

    return read


def pooled_by_hand(hyper, shots: list[Example]):
    """A function that reads rows after means over G stretches of the base's keys and values."""
    context = shots_row(shots)
    _, past = hyper.model(torch.tensor([context]))

    def means_of(x):  # [1, K, P, hd] -> [1, K, G, hd]
        return torch.stack([part.mean(2) for part in x.tensor_split(G, dim=2)], dim=2)

    means = [(means_of(k), means_of(v)) for k, v in past]
    return after(hyper, means, len(context))


def columns_by_hand(hyper, episode: Episode, other: Episode) -> dict:
    """Column -> (function that reads rows, what comes before the question in them)."""
    shots, alone = episode.shots, [BOS]
    base = lambda rows: plain(hyper, rows)  # noqa: E731
    trained = lambda rows: plain(hyper, rows, hyper.answerer)  # noqa: E731
    after_gists = lambda rows: joint(hyper, rows)  # noqa: E731
    return {
        "main": (after_gists, shots_row(shots) + GISTS + alone),
        "zeroshot": (base, alone),
        "fewshot": (base, shots_row(shots)),
        "no_prefix": (trained, alone),
        "other_task": (after_gists, shots_row(other.shots) + GISTS + alone),
        "mean_pooled": (pooled_by_hand(hyper, shots), alone),
        "fewer_shots": (base, shots_row(shots[:1])),
        "trained fewshot": (trained, shots_row(shots)),
        "trained zeroshot": (trained, alone),
    }


def columns_of(run: Run) -> dict:
    """The columns that evaluation compares, and those of models that were trained without gists."""
    trained = {f"trained {name}": evaluation.MAIN[name] for name in ("fewshot", "zeroshot")}
    return evaluation.columns(run, [Prompt(name, name, None) for name in "ab"]) | trained


@torch.no_grad()
def assert_best(read, row: list[int], query: Example, answer: str, mean: bool = False) -> None:
    """The answer is the option with the highest log-probability: the sum over its tokens, or their mean."""
    losses = losses_by_hand(read, row + question(query), *map(encode, query.options))
    losses = {o: loss.item() / (len(o) if mean else 1) for o, loss in zip(query.options, losses)}
    assert losses[answer] < min(losses.values()) + 1e-4


@pytest.mark.parametrize("answerer, score", [*((name, "sum") for name in ANSWERERS), ("downstream", "mean")])
def test_every_column_answers_with_the_option_that_one_row_holds_most_likely(answerer, score):
    hyper = attentive_hyper(answerer)
    run = run_of(hyper, score=score)
    episodes, others = episodes_of(1, 3, queries=4), episodes_of(2, 2, queries=1)
    queries = [query for episode in episodes for query in episode.queries]
    answered, by_column = {}, [columns_by_hand(hyper, e, others[i % 2]) for i, e in enumerate(episodes)]
    table = columns_of(run)
    assert table.keys() == by_column[0].keys()
    for name, column in table.items():
        answered[name] = answers = evaluation.respond(run, column, episodes, others)
        for n, (query, answer) in enumerate(zip(queries, answers, strict=True)):
            assert_best(*by_column[n // 4][name], query, answer, score == "mean")
        scores = [100.0 * (answer == query.target) for answer, query in zip(answers, queries)]
        assert evaluation.score(run, column, episodes, others) == scores
    different = {"main", "zeroshot", "fewshot", "other_task", "mean_pooled"}
    assert len({tuple(answered[name]) for name in different}) == len(different)


@torch.no_grad()
def greedy(read, row: list[int], end: str) -> str:
    """What greedy decoding writes, one whole pass for each token."""
    answer, end = [], encode(end)
    while len(answer) < evaluation.MAX_NEW_TOKENS:
        answer.append(read([row + answer])[0, -1].argmax().item())
        if answer[-1] == EOS:
            return Letters().decode(answer[:-1]).strip()
        if answer[-len(end) :] == end:
            return Letters().decode(answer[: -len(end)]).strip()
    return Letters().decode(answer).strip()


@pytest.mark.parametrize("answerer", ANSWERERS)
def test_every_column_writes_what_greedy_decoding_in_one_row_writes(answerer, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_NEW_TOKENS", 10)
    hyper = attentive_hyper(answerer)
    run, others, free = run_of(hyper), episodes_of(2, 1, queries=1), []
    for episode in episodes_of(1, 3, queries=1):
        free.append(replace(episode, queries=[replace(query, options=()) for query in episode.queries]))
    read, before = columns_by_hand(hyper, free[0], others[0])["main"]
    cut = greedy(read, before + question(free[0].queries[0]), PLAIN.end)[4:6]  # ends the first answer early
    for end, names in ((PLAIN.end, columns_of(run)), (cut, ["main"])):
        episodes = [replace(episode, layout=replace(PLAIN, end=end)) for episode in free]
        for name in names:
            expected = []
            for episode in episodes:
                read, before = columns_by_hand(hyper, episode, others[0])[name]
                expected += [greedy(read, before + question(query), end) for query in episode.queries]
            assert evaluation.respond(run, columns_of(run)[name], episodes, others) == expected, name


def combined_by_hand(hyper, sets: list[list[Example]], way: str):
    """A function that reads rows after several sets of examples.

    average  each set compressed alone, its gists at positions 0 … G-1
    concat   each set compressed alone, its gists after those of the set before
    chain    all sets in one row
    """
    rows = [shots_row(shots) + GISTS for shots in sets]
    if way == "chain":
        before = sum(rows, [])
        return lambda rows: joint(hyper, [before + row for row in rows])[:, len(before) :]
    pasts, ends = [], [G * (n + 1) if way == "concat" else G for n in range(len(rows))]
    for row, end in zip(rows, ends):
        start = torch.tensor([end - len(row)])
        pasts.append(hyper.model(hyper.embed(torch.tensor([row])), offset=start, adapter=hyper.reader)[1])
    merge = (lambda xs: sum(xs) / len(xs)) if way == "average" else (lambda xs: torch.cat(xs, dim=2))
    past = []
    for layer in zip(*pasts):
        past.append(tuple(merge([x[:, :, -G:] for x in xs]) for xs in zip(*layer)))
    return after(hyper, past, ends[-1])


@pytest.mark.parametrize("way", ["average", "concat", "chain"])
@pytest.mark.parametrize("answerer", ANSWERERS)
def test_several_sets_of_examples_answer_like_sets_combined_by_hand(answerer, way):
    hyper, rng = attentive_hyper(answerer), random.Random(3)
    run, episode = run_of(hyper, **{way: 3}), Episode(examples_of(rng, 24), examples_of(rng, 7))
    read = combined_by_hand(hyper, [episode.shots[n::3] for n in range(3)], way)
    answers = evaluation.respond(run, evaluation.MAIN["hyper"], [episode], [])
    for query, answer in zip(episode.queries, answers, strict=True):
        assert_best(read, [BOS], query, answer)


# ----------------------------------------------------------------------------------------------- NF4

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
    linear.place(weight, "cpu", torch.float32)

    blocks = weight.view(-1, 64)
    highest = blocks.abs().amax(1, keepdim=True)
    codes = (blocks[..., None] / highest[..., None] - NF4).abs().argmin(-1)  # [blocks, 64]
    expected = x @ (NF4[codes] * highest).view(64, 128).T
    y = linear(x, {})
    assert (y - expected).norm() / expected.norm() < 0.02, "the scales have 8 bits themselves"
    assert 0.03 < (y - x @ weight.T).norm() / (x @ weight.T).norm() < 0.12, "and four bits are few"


# ---------------------------------------------------------------------------------- what is held out


@pytest.mark.parametrize("task", ["p3", "sni", "symbol"])
def test_no_held_out_task_of_the_miniature_is_trained_on(tokenizer, task):
    args = args_of(task)
    formatter = Formatter(tokenizer, args.context, args.query_length)
    train, test = ({t.name for t in TASKS[task].load(args, formatter, split)} for split in ("train", "test"))
    assert train and test and not train & test


def test_held_out_datasets_are_told_by_name_where_no_lists_say_which(tmp_path):
    names = (ROOT / "tiny" / "P3" / "splits" / "test_tasks.txt").read_text().split()
    folders = ["anli_r1", "super_glue_cb_a", "winogrande_b", "rotten_c", "glue_d"]
    for folder, name in zip(folders, names):
        (tmp_path / folder).symlink_to(ROOT / "tiny" / "P3" / name)
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
