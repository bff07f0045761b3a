"""Gisting: two passes and the joint pass are the same; prefixes without gists, as files, in the lecture.

`test_equivalence.py` compares what training and evaluation call, and the chapters of further/, with one row.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import G, config, random_hyper

import data
import llama
from data import PLAIN, Batch, Example, Sample, Term, collate
from further import lm, teacher
from gist import HyperLlama, Rows, gist_mask, keep_all, label_anchors, mean_pooled, read_contexts
from gist import with_gists
from llama import InputError, ragged
from lora import load_tensors, save_tensors
from run import all_options
from tools import lecture
from tools.export import load_gists, save_gists
from train import cross_entropy

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GIST_IDS = [50 + i for i in range(G)]


def words(count: int, seed: int) -> list[int]:
    return torch.randint(3, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


EXAMPLES = [[1, *words(n, 7 * n)] for n in (7, 12, 2, 9)]  # of four tasks, after BOS
QUERIES = [[1, *words(n, 99 + n)] for n in (5, 3, 8, 1)]


def rows_of(*contexts: list[int]) -> Rows:
    return Rows.of([with_gists(tokens, GIST_IDS) for tokens in contexts])


def batch_of(contexts: list[list[int]], queries: list[tuple]) -> Batch:
    """A batch as training has it. queries: of each context, a prompt with its target."""
    contexts = [[with_gists(tokens, GIST_IDS)] for tokens in contexts]
    return collate([Sample(context, [query]) for context, query in zip(contexts, queries)])


def test_the_mask_of_a_small_row_is_what_the_paper_draws():
    #                       a  b  G  G  c  d
    is_gist = torch.tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    assert gist_mask(is_gist)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]


def test_a_prefix_made_at_another_offset_answers_the_same():
    hyper, queries, outputs = random_hyper(), ragged(QUERIES), []
    for shift in ([0, 0, 0, 0], [40, 3, 100, 0]):
        rows = rows_of(*EXAMPLES)
        gists = hyper.compress(replace(rows, positions=rows.positions + torch.tensor(shift)[:, None]))
        assert gists.offset.tolist() == [G + s for s in shift], "the position after the last gist"
        outputs.append(hyper.model(queries, **gists.as_past(queries.shape[1]))[0])
    torch.testing.assert_close(*outputs, **TOLERANCE)
    late = hyper.model(queries, past=gists.past, offset=gists.offset + 1)[0]  # the bug, on purpose
    assert (late - outputs[1]).abs().max() > 1e-2


# ------------------------------------------------------------------------- other terms of the loss

MAIN = Term(1.0, lambda batch: len(batch.targets), cross_entropy)


def language_model_logits(hyper: HyperLlama, before: list[int], target: list[int]) -> torch.Tensor:
    """What the bare base predicts for a target after tokens."""
    return hyper.model(torch.tensor([before + target]))[0][0, len(before) - 1 : -1]


def test_language_modelling_reads_the_whole_text_as_it_is():
    hyper = random_hyper()
    texts = [words(10, 1), words(10, 2)]  # A B C D: 3, 2, 2 and 3 tokens
    batch = batch_of([[1, *text[:3], *text[7:]] for text in texts], [([1], text[3:7]) for text in texts])

    def terms(**options) -> list[Term]:
        return lm.terms(SimpleNamespace(args=all_options()(**options), hyper=hyper), [MAIN])

    assert terms() == [MAIN]
    _, term = terms(lm=0.25)
    assert term.weight == 0.25 and term.count(batch) == 20
    losses = [F.cross_entropy(language_model_logits(hyper, [1], text), torch.tensor(text)) for text in texts]
    logits, gists = hyper(batch)
    loss = term.loss(hyper, batch, gists, logits)
    torch.testing.assert_close(loss, 10 * sum(losses), atol=1e-4, rtol=1e-5)


def test_where_a_prompt_is_bos_alone_the_teacher_keeps_it():
    """Text: BOS A D, then BOS B C."""
    hyper, targets = random_hyper(), [words(4, 6), words(4, 8)]
    batch = batch_of(EXAMPLES[:2], [([1], target) for target in targets])
    taught = teacher.teacher_logits(hyper, batch).split(4)
    for logits, examples, target in zip(taught, EXAMPLES, targets):
        expected = language_model_logits(hyper, [*examples, 1], target)
        torch.testing.assert_close(logits, expected, **TOLERANCE)


# --------------------------------------------------------- prefixes that need no gists, or are kept


def test_a_context_shorter_than_the_gists_is_pooled_as_it_is_also_beside_a_longer_one():
    model, contexts = random_hyper().model, [keep_all(row) for row in EXAMPLES]
    together = mean_pooled(read_contexts(model, contexts), 9, model.config)
    assert together.offset.tolist() == [8, 9, 3, 9] and together.past_mask.sum(1).tolist() == [8, 9, 3, 9]
    for n, length in ((0, 8), (2, 3)):
        pooled = [tuple(x[n : n + 1, :, :length] for x in layer) for layer in together.past]
        alone = read_contexts(model, [contexts[n]])
        torch.testing.assert_close(pooled, list(alone.past), **TOLERANCE)


def test_label_anchors_are_bos_the_instruction_and_the_last_letter_of_each_answer(tokenizer):
    sni = replace(PLAIN, shot="Input: {input}\nOutput: {target}\n\n", instruction="{}\n")
    episode = data.Episode([], [Example("a red fox", "kilo"), Example("an owl", "east")], sni, "Find it.")
    formatter = data.Formatter(tokenizer, 100, 50)
    context = label_anchors(formatter, episode)
    whole = formatter.context_tokens(episode)
    assert context.tokens == whole[: context.kept[-1] + 1], "the line breaks at the end are left out"
    shown = [tokenizer.decode(context.tokens[: i + 1]) for i in context.kept]
    assert [text.split("\n")[-1] for text in shown[2:]] == ["Output: kilo", "Output: east"]
    assert shown[:2] == ["", "Find it.\n"]
    assert [context.positions[i] for i in context.kept][-1] == len(context.kept) - 1


def test_a_saved_prefix_answers_the_same_and_in_its_own_model_alone(tmp_path):
    hyper = random_hyper()
    about = {"model": "a", "run": "b"}
    path = tmp_path / "g.safetensors"
    gists = hyper.compress(rows_of([1, 7, 8, 9, 10, 11]))
    save_gists(path, gists, about)
    loaded = load_gists(path, about, hyper.model)
    query = torch.tensor([[1, 20, 21]])
    one, other = (hyper.model(query, **prefix.as_past(3))[0] for prefix in (gists, loaded))
    assert torch.equal(one, other)
    for key in about:
        with pytest.raises(InputError, match=f"another {key}"):
            load_gists(path, about | {key: "x"}, hyper.model)
    good, _ = load_tensors(path)
    for change, message in (
        ({"offset": torch.tensor([10**12])}, "offset"),
        ({"offset": torch.tensor([3.0])}, "offset"),
        ({"0.key": None}, "not a saved prefix"),
        ({"1.value": gists.past[1][1][:, :, :2]}, "1.value"),
        ({"2.key": gists.past[2][0].int()}, "2.key"),
        ({"0.value": gists.past[0][1] * torch.nan}, "0.value"),
        ({"0.key": gists.past[0][0].expand(2, -1, -1, -1)}, "0.key"),
    ):
        tensors = {name: x for name, x in (good | change).items() if x is not None}
        save_tensors(tmp_path / "bad.safetensors", tensors, about)
        with pytest.raises(InputError, match=message):
            load_gists(tmp_path / "bad.safetensors", about, hyper.model)


# -------------------------------------------------------------------------------------- the lecture


def small_lesson() -> lecture.Lesson:
    """The four contexts as tasks, with one or two queries each."""
    prompts = [[1, *words(n, 40 + n)] for n in (5, 3, 8, 1, 4, 2)]
    choices = [[words(1, n), words(2, 60 + n)] for n in range(6)]
    task = torch.tensor([0, 0, 1, 2, 3, 3])
    other = torch.tensor([1, 2, 3, 0])
    return lecture.Lesson(
        "random", random_hyper(), rows_of(*EXAMPLES), task, other, prompts, choices, [0, 1, 1, 0, 1, 0]
    )


def score_of_joint_rows(lesson: lecture.Lesson, hyper: HyperLlama, contexts, shift: int = 0) -> lecture.Score:
    """lecture.score, each choice in a row of its own. contexts: of each task, the tokens before a query."""
    right, losses = [], []
    for n, (prompt, options) in enumerate(zip(lesson.prompts, lesson.choices)):
        context, own = contexts[lesson.task[n]], []
        for option in options:
            after = G + shift
            positions = [*range(G - len(context), G), *range(after, after + len(prompt + option))]
            logits = hyper.joint(torch.tensor([context + prompt + option]), torch.tensor([positions]))
            logits = logits[0, -len(option) - 1 : -1]
            own.append(F.cross_entropy(logits, torch.tensor(option), reduction="sum").item())
        losses.append(own[lesson.right[n]])
        right.append(100.0 * (losses[-1] == min(own)))
    return lecture.Score(sum(right) / len(right), sum(losses) / len(losses))


@torch.no_grad()
def test_the_lecture_compares_each_pair_of_roles_with_the_joint_pass():
    lesson = small_lesson()
    contexts = [examples + GIST_IDS for examples in EXAMPLES]
    joint_roles = {
        (True, False): ("hyper", None),
        (False, False): (None, None),
        (True, True): ("hyper", "hyper"),
    }
    results = lecture.compare_roles(lesson)
    assert results.keys() == joint_roles.keys()
    for roles, (difference, score) in results.items():
        hyper = HyperLlama(lesson.hyper.model, lesson.hyper.gists, *joint_roles[roles])
        assert score == pytest.approx(score_of_joint_rows(lesson, hyper, contexts), abs=1e-4)
        differences = []
        for context, n in zip(contexts, (0, 2, 3, 4)):  # the first query of each task
            row = torch.tensor([context + lesson.prompts[n]])
            both = [way.joint(row)[0, len(context) :] for way in (hyper, lesson.hyper)]
            differences.append((both[0] - both[1]).abs().max().item())
        assert difference == pytest.approx(max(differences), abs=1e-4)
    assert results[True, False][0] < 1e-4 and min(results[False, False][0], results[True, True][0]) > 0.1


@torch.no_grad()
def test_the_lecture_scores_queries_where_they_begin_and_after_which_gists_they_stand(monkeypatch):
    lesson = small_lesson()
    contexts = [examples + GIST_IDS for examples in EXAMPLES]
    monkeypatch.setattr(lecture, "SHIFTS", (-7, 0, 5))
    scores = lecture.compare_offsets(lesson)
    assert list(scores) == [-7, 0, 5] and len({round(score.loss, 3) for score in scores.values()}) == 3
    for shift, score in scores.items():
        assert score == pytest.approx(score_of_joint_rows(lesson, lesson.hyper, contexts, shift), abs=1e-4)
    own, other, none = lecture.compare_prefixes(lesson).values()
    assert own == scores[0]
    others = [contexts[s] for s in (1, 2, 3, 0)]
    assert other == pytest.approx(score_of_joint_rows(lesson, lesson.hyper, others), abs=1e-4)
    assert none == pytest.approx(score_of_joint_rows(lesson, lesson.hyper, [[]] * 4), abs=1e-4)


@torch.no_grad()
def test_the_attention_in_the_lecture_is_the_softmax_of_scores_in_the_joint_pass(monkeypatch):
    lesson = small_lesson()
    layers = []

    def recorded(q, k, v, mask):
        k_of_heads = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = (q @ k_of_heads.transpose(2, 3)) / config().head_size ** 0.5
        layers.append(scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)[0, :, -1])  # [H, S]
        return attend(q, k, v, mask)

    expected = torch.zeros(config().layers, G)
    attend = llama.attend
    with monkeypatch.context() as patch:
        patch.setattr(llama, "attend", recorded)
        for s, prompt in zip(lesson.task.tolist(), lesson.prompts):
            context = EXAMPLES[s] + GIST_IDS
            layers.clear()
            lesson.hyper.joint(torch.tensor([context + prompt]))
            weights = torch.stack(layers).mean(1)  # [L, S]
            expected += weights[:, len(context) - G : len(context)] / len(lesson.prompts)
    torch.testing.assert_close(lecture.attention_to_gists(lesson), expected, **TOLERANCE)


def test_the_lecture_counts_positions_from_the_first_gist_and_draws_bars_to_scale(capsys):
    lesson = small_lesson()
    lecture.show_positions(lesson)
    ends = capsys.readouterr().out.splitlines()[-3].split()
    assert ends == ["-8", "-1", "0", "2", "3", "8"]
    lecture.show_mask()
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["5", ":", *7 * ".", *3 * "#", *3 * "o"]
    assert lines[-4].endswith("second pass") and lines[-5].split()[:2] == ["2", "gist"]
    assert lecture.bars([0, 25, 50, 75, 100], 100, 2) == ["   ▄█", " ▄███"]


def test_the_lecture_uses_the_trained_run_or_says_that_there_is_none(
    tmp_path, monkeypatch, capsys, hypernetwork
):
    monkeypatch.setattr(lecture, "PROJECT", tmp_path)
    lesson = lecture.open_lesson(1)
    assert "not trained" in lesson.model_name and len(lesson.prompts) == 16
    lecture.show(lesson)
    printed = capsys.readouterr().out
    assert all(f"\n{n}. " in printed for n in range(1, 7)) and "not trained" in printed
    assert max(map(len, printed.splitlines())) <= 90
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "p3-hyper-frozen-seed0").symlink_to(hypernetwork)
    lesson = lecture.open_lesson(2)
    assert "after 2 steps" in lesson.model_name and len(lesson.prompts) == 4 and len(lesson.hyper.gists) == 4
    trained, _ = load_tensors(hypernetwork / "adapters.safetensors")
    assert torch.equal(lesson.hyper.gists, trained["gists"])
    lecture.draw(lesson, tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(lecture.PICTURES)
    assert max(path.stat().st_size for path in (tmp_path / "figures").iterdir()) < 60_000
    (tmp_path / "figures" / lecture.PICTURES[-1]).write_text("mine")
    with pytest.raises(InputError, match="would replace"):
        lecture.draw(lesson, tmp_path / "figures")
