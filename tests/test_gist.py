"""Gisting: the joint pass and the two passes are the same thing, in the paper's form and in the chapters'."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import G, config, random_hyper

import data
import llama
from data import PLAIN, Batch, Example, Sample, Term, collate
from eval import score_choices
from further import among, chain, fusion, lm, reconstruct, spread, teacher
from gist import Compression, Gists, HyperLlama, Rows, average, gist_mask, label_anchors, mean_pooled
from gist import read_rows, with_gists
from llama import InputError, generate, ragged, rotary_angles, rotate
from lora import load_tensors, save_tensors
from run import all_options, compression_of
from tools import lecture
from tools.export import load_gists, save_gists
from train import cross_entropy

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GIST_IDS = [50 + i for i in range(G)]
EOS = 2


def words(count: int, seed: int) -> list[int]:
    return torch.randint(3, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Episode:
    """Examples that are tokens already, after BOS (and an instruction)."""

    start: list[int]
    examples: list[list[int]]

    @property
    def instruction(self) -> list[int]:
        return self.start[1:]

    def split(self, sets: int) -> list["Episode"]:
        return [replace(self, examples=self.examples[n::sets]) for n in range(sets)]


class Formatter:
    """data.Formatter for such episodes, whatever their length."""

    tokenizer = SimpleNamespace(eos=EOS)

    def context_parts(self, episode: Episode, reserved: int = 0):
        return episode.start, episode.examples

    def context_tokens(self, episode: Episode, reserved: int = 0) -> list[int]:
        return sum(episode.examples, episode.start)


def episode(*lengths: int, instruction: int = 0) -> Episode:
    return Episode([1, *words(instruction, 77)], [words(n, 10 * i + n) for i, n in enumerate(lengths)])


EPISODES = [episode(3, 2, 2), episode(4, 1, 3, 4), episode(2), episode(5, 3, 1)]
QUERIES = [[1, *words(n, 99 + n)] for n in (5, 3, 8, 1)]


def rows_of(*contexts: list[int]) -> Rows:
    return Rows.of([with_gists(tokens, GIST_IDS) for tokens in contexts])


def all_rows() -> Rows:
    return rows_of(*(Formatter().context_tokens(e) for e in EPISODES))


def batch_of(hyper: HyperLlama, episodes: list[Episode], queries: list[list[tuple]]) -> Batch:
    """A batch as training has it. queries: of each episode, prompts with their targets."""
    contexts = [hyper.compression.contexts(Formatter(), e, hyper.gist_ids) for e in episodes]
    return collate([Sample(*sample) for sample in zip(contexts, queries)])


def two_passes(hyper: HyperLlama, episodes=EPISODES, queries=QUERIES, fill: int = 0) -> list[torch.Tensor]:
    """Logits at all tokens of the queries, one [T, V] per row. fill: what stands in the padding."""
    batch = batch_of(hyper, episodes, [[(query[:1], [*query[1:], EOS])] for query in queries])
    for padded in (batch.tokens, *(rows.tokens for rows in batch.context)):
        padded[padded == 0] = fill
    return list(hyper(batch)[0].split([len(query) for query in queries]))


def gists_at_the_end(e: Episode) -> list[int]:
    return sum(e.examples, e.start) + GIST_IDS


def one_pass(hyper: HyperLlama, before=gists_at_the_end, positions=None) -> list[torch.Tensor]:
    """The same in a joint pass. before: an episode as it stands before a query; positions: of the whole row.

    By default the row is counted from 0, whatever positions the two passes take.
    """
    contexts = [before(e) for e in EPISODES]
    joined = [context + query for context, query in zip(contexts, QUERIES)]
    if positions is not None:
        positions = ragged([positions(e, len(row)) for e, row in zip(EPISODES, joined)])
    logits = hyper.joint(ragged(joined), positions)
    places = [slice(len(context), len(row)) for context, row in zip(contexts, joined)]
    return [out[place] for out, place in zip(logits, places)]


VARIANTS = [(None, 2), (None, 4), (None, 1), ("downstream", 2), ("hyper", 2)]


@pytest.mark.parametrize("downstream, kv_heads", VARIANTS)
def test_two_passes_equal_the_joint_pass(downstream, kv_heads):
    hyper = random_hyper(downstream, kv_heads)
    torch.testing.assert_close(two_passes(hyper), one_pass(hyper), **TOLERANCE)


@pytest.mark.parametrize("downstream, kv_heads", VARIANTS)
def test_two_passes_have_the_gradients_of_the_joint_pass(downstream, kv_heads):
    gradients = []
    for way in (two_passes, one_pass):
        hyper = random_hyper(downstream, kv_heads)
        log_probs = torch.cat([out.log_softmax(-1)[:, 7] for out in way(hyper)])
        log_probs.mean().backward()  # as in training: per token
        gradients.append({name: p.grad for name, p in hyper.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-5, msg=name)


def test_answers_ranked_and_written_after_gists_are_those_of_the_joint_pass():
    hyper = random_hyper("downstream")
    gists = hyper.compress(all_rows())
    choices = [[words(n, n), words(n + 1, 50 + n)] for n in range(1, 5)]
    scores = score_choices(hyper.model, QUERIES, choices, gists, "downstream")
    prefix = gists.as_past(max(map(len, QUERIES)), "downstream")
    written = generate(hyper.model, QUERIES, 4, -1, **prefix)
    assert [len(answer) for answer in written] == [4] * 4
    for e, query, options, values, answer in zip(EPISODES, QUERIES, choices, scores, written):
        for continuation in [*options, answer]:
            row = gists_at_the_end(e) + query + continuation
            log_probs = hyper.joint(torch.tensor([row]))[0, -len(continuation) - 1 : -1].log_softmax(-1)
            if continuation is answer:
                assert log_probs.argmax(-1).tolist() == answer
            else:
                expected = log_probs.gather(1, torch.tensor(continuation)[:, None]).sum().item()
                assert values.pop(0) == pytest.approx(expected, abs=1e-4)


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


def test_the_mask_without_gists_is_causal_and_every_token_sees_itself():
    T = 6
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    assert torch.equal(gist_mask(torch.zeros(2, T, dtype=torch.bool))[1], causal)
    anywhere = torch.rand(64, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    assert gist_mask(anywhere).diagonal(dim1=1, dim2=2).all()


def test_two_runs_of_gists_are_a_chain_of_compressions():
    """[a gists b gists c] in one pass = compress a; compress b after a's gists; read c after both."""
    hyper = random_hyper()
    a = [1, *words(6, 1)]
    b = words(4, 2)
    c = words(5, 3)
    joint = hyper.joint(torch.tensor([a + GIST_IDS + b + GIST_IDS + c]))

    first = hyper.compress(rows_of(a))
    rows = rows_of(b)
    rows.positions += first.offset - rows.positions[:, :1]  # right after a's gists
    second = hyper.compress(rows, past=first.past)
    assert second.offset.tolist() == [G + len(b) + G]
    both = merged([first, second], lambda same: torch.cat(same, dim=2))
    chained, _ = hyper.model(torch.tensor([c]), past=both.past, offset=second.offset)
    torch.testing.assert_close(chained[0], joint[0, -len(c) :], **TOLERANCE)


def test_decoding_continues_right_after_the_last_gist():
    """Token by token after the gists = the joint pass, from the first token on."""
    hyper = random_hyper("downstream")
    gists = hyper.compress(all_rows())
    queries = ragged(QUERIES)
    past = gists.past
    steps = []
    for t in range(queries.shape[1]):
        how = {"past": past, "offset": gists.offset + t, "adapter": "downstream"}
        logits, past = hyper.model(queries[:, t : t + 1], **how)
        steps.append(logits)
    stepwise = [out[: len(query)] for out, query in zip(torch.cat(steps, 1), QUERIES)]
    torch.testing.assert_close(stepwise, one_pass(hyper), **TOLERANCE)


def test_a_prefix_made_at_another_offset_answers_the_same():
    hyper = random_hyper()
    queries = ragged(QUERIES)
    outputs = []
    for shift in ([0, 0, 0, 0], [40, 3, 100, 0]):
        rows = all_rows()
        gists = hyper.compress(replace(rows, positions=rows.positions + torch.tensor(shift)[:, None]))
        outputs.append(hyper.model(queries, **gists.as_past(queries.shape[1]))[0])
    torch.testing.assert_close(*outputs, **TOLERANCE)
    late = hyper.model(queries, past=gists.past, offset=gists.offset + 1)[0]  # the bug, on purpose
    assert (late - outputs[1]).abs().max() > 1e-2


def test_the_offset_is_the_position_after_the_last_gist():
    """Gists stand at 0 … G-1 whatever came before them, which therefore begins at a negative position."""
    assert with_gists([1, 5, 6, 7], GIST_IDS).positions == [-4, -3, -2, -1, 0, 1, 2]
    hyper = random_hyper()
    rows = all_rows()
    assert hyper.compress(rows).offset.tolist() == [G] * 4
    shifted = replace(rows, positions=rows.positions + torch.tensor([[5], [0], [1], [2]]))
    assert hyper.compress(shifted).offset.tolist() == [G + 5, G, G + 1, G + 2]


def test_rows_keep_their_gists_wherever_padding_begins():
    rows = rows_of([1, 5], [1, 6, 7, 8])
    assert rows.tokens.tolist() == [[1, 5, *GIST_IDS, 0, 0], [1, 6, 7, 8, *GIST_IDS]]
    assert rows.positions[0, :5].tolist() == [-2, -1, 0, 1, 2]
    assert rows.positions[1].tolist() == [-4, -3, -2, -1, 0, 1, 2]
    assert rows.kept.tolist() == [[2, 3, 4], [4, 5, 6]] and rows.past_mask is None
    unequal = Rows.of([with_gists([1, 5], GIST_IDS), with_gists([1], GIST_IDS)._replace(kept=[0, 1, 2, 3])])
    assert unequal.past_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert all(torch.equal(getattr(unequal.to("cpu"), name), x) for name, x in vars(unequal).items())


def test_padding_never_reaches_the_gists():
    hyper = random_hyper()
    rows = all_rows()
    gists = hyper.compress(rows)
    more = torch.full((4, 9), 7)
    tokens = torch.cat((rows.tokens, more), dim=1)
    padded = hyper.compress(replace(rows, tokens=tokens, positions=torch.cat((rows.positions, more), dim=1)))
    torch.testing.assert_close(padded.past, gists.past, **TOLERANCE)
    assert torch.equal(padded.offset, gists.offset)
    torch.testing.assert_close(two_passes(hyper, fill=7), two_passes(hyper, fill=0), **TOLERANCE)


def test_a_row_in_a_batch_answers_like_the_row_alone():
    hyper = random_hyper("downstream")
    alone = [two_passes(hyper, EPISODES[n : n + 1], QUERIES[n : n + 1])[0] for n in range(4)]
    torch.testing.assert_close(two_passes(hyper), alone, **TOLERANCE)


def test_several_queries_of_one_prefix_answer_like_one_prefix_each():
    hyper = random_hyper("downstream")
    queries = [(query, words(n, n)) for n, query in zip((2, 1, 3, 2), QUERIES)]
    rows = (3, 0, 0, 2)
    grouped = [[queries[0]], [queries[1], queries[2]], [queries[3]]]
    shared = hyper(batch_of(hyper, [EPISODES[row] for row in (3, 0, 2)], grouped))[0]
    each = batch_of(hyper, [EPISODES[row] for row in rows], [[query] for query in queries])
    torch.testing.assert_close(shared, hyper(each)[0], **TOLERANCE)
    whole = batch_of(hyper, EPISODES, [[query] for query in queries])
    chosen = hyper(replace(whole, row=torch.tensor(rows)))[0]  # rows in any order
    torch.testing.assert_close(chosen, shared, **TOLERANCE)


def test_the_gradient_reaches_lora_and_gists_through_the_prefix_alone():
    """Cut the prefix off, and no hypernetwork parameter has a gradient; the base never has one."""
    for detached in (False, True):
        hyper = random_hyper()
        gists = hyper.compress(rows_of([1, 5, 6]))
        past = [(k.detach(), v.detach()) for k, v in gists.past] if detached else gists.past
        logits, _ = hyper.model(torch.tensor([[1, 7, 8]]), past=past, offset=gists.offset)
        assert logits.requires_grad != detached
        if not detached:
            logits.sum().backward()
            assert all((p.grad is not None) == p.requires_grad for p in hyper.parameters())
            assert hyper.gists.grad.abs().min() > 0


def test_gists_have_a_table_of_their_own_and_words_do_not_use_it():
    hyper = random_hyper()
    x = hyper.embed(torch.tensor([[1, 49, *GIST_IDS]]))
    torch.testing.assert_close(x[0, 2:], hyper.gists.detach().clone(), atol=0, rtol=0)
    torch.testing.assert_close(x[0, :2], hyper.model.embed_tokens.weight[[1, 49]], atol=0, rtol=0)


def test_chosen_rows_of_gists_are_those_that_were_asked_for():
    keys = torch.arange(6.0).view(3, 1, 1, 2)
    past_mask = torch.tensor([[True], [True], [False]])
    gists = Gists([(keys, torch.zeros(3, 1, 1, 2))], torch.tensor([4, 5, 6]), past_mask)
    chosen = gists[torch.tensor([2, 0, 2])]
    assert chosen.offset.tolist() == [6, 4, 6]
    assert chosen.past[0][0].flatten().tolist() == [4, 5, 0, 1, 4, 5]
    assert chosen.past_mask.flatten().tolist() == [False, True, False]


def test_the_small_models_have_grouped_heads():
    assert config().kv_heads < config().heads


# ------------------------------------------------------------------------------- instruction fusion


def test_a_fused_prefix_without_examples_equals_full_context():
    """Nothing is compressed: BOS, the instruction and the gists stay, as if all stood in one row."""
    hyper = random_hyper("hyper")
    (context,) = fusion.contexts(Formatter(), episode(instruction=3), GIST_IDS)
    query = [7, 8, 11]
    gists = hyper.compress(Rows.of([context]))
    fused, _ = hyper.model(torch.tensor([query]), **gists.as_past(3, "hyper"))
    row = hyper.embed(torch.tensor([context.tokens + query]))
    full, _ = hyper.model(row, adapter="hyper")
    torch.testing.assert_close(fused, full[:, -3:], **TOLERANCE)


FUSED = [episode(3, 4), episode(2, 2, instruction=4), episode(1, instruction=2), episode(instruction=5)]


def test_a_fused_prefix_is_the_joint_pass_in_which_the_instruction_stays_in_view():
    hyper = random_hyper("downstream")
    hyper.compression = fusion.compression(SimpleNamespace(fuse_instruction=True))
    for e, query, out in zip(FUSED, QUERIES, two_passes(hyper, FUSED, fill=7)):
        row = torch.tensor([gists_at_the_end(e) + query])
        stays = row >= 50
        if e.instruction:
            stays[:, : len(e.start)] = True
        after = torch.arange(row.shape[1])[None, :, None] >= row.shape[1] - len(query)
        gates = {"hyper": ~after, "downstream": after}
        joint, _ = hyper.model(hyper.embed(row), adapter=gates, mask=gist_mask(stays))
        torch.testing.assert_close(out, joint[0, -len(query) :], **TOLERANCE)


def test_rows_that_keep_unequal_numbers_of_tokens_answer_like_each_alone():
    hyper = random_hyper()
    contexts = [fusion.contexts(Formatter(), e, GIST_IDS)[0] for e in FUSED]
    together = hyper.compress(Rows.of(contexts))
    T = max(map(len, QUERIES))
    logits, _ = hyper.model(ragged(QUERIES), **together.as_past(T))
    answers = generate(hyper.model, QUERIES, 5, -1, **together.as_past(T))
    for n, (e, query) in enumerate(zip(FUSED, QUERIES)):
        alone = hyper.compress(Rows.of(contexts[n : n + 1]))
        n_instruction = len(e.start) if e.instruction else 0  # with its BOS
        assert alone.past[0][0].shape[2] == n_instruction + G and alone.past_mask is None
        expected, _ = hyper.model(torch.tensor([query]), past=alone.past, offset=alone.offset)
        torch.testing.assert_close(logits[n, : len(query)], expected[0], **TOLERANCE)
        assert generate(hyper.model, [query], 5, -1, past=alone.past, offset=alone.offset) == [answers[n]]


# ------------------------------------------------------------- several sets of examples as one prefix


def prefix_of(hyper: HyperLlama, episodes: list[Episode]) -> Gists:
    contexts = [hyper.compression.contexts(Formatter(), e, hyper.gist_ids) for e in episodes]
    return hyper.compression.prefix(hyper, [Rows.of(rows) for rows in zip(*contexts)])


def assert_same_gists(one: Gists, other: Gists) -> None:
    assert one.offset.tolist() == other.offset.tolist()
    torch.testing.assert_close(list(one.past), list(other.past), **TOLERANCE)


def merged(sets: list[Gists], how: Callable) -> Gists:
    """The keys of several sets, and their values, put together in each layer."""
    layers = zip(*(gists.past for gists in sets))
    return Gists([tuple(map(how, zip(*same))) for same in layers], sets[-1].offset)


def test_a_set_averaged_with_itself_is_itself():
    hyper = random_hyper()
    rows = rows_of([1, 5, 6])
    assert_same_gists(average(hyper, [rows] * 3), hyper.compress(rows))
    assert_same_gists(chain.side_by_side(hyper, [rows]), hyper.compress(rows))
    assert_same_gists(chain.chain(hyper, [rows]), hyper.compress(rows))


def test_sets_of_unequal_length_are_averaged_at_equal_positions():
    """Row by row, the mean of each set's gists, which all end at the same position."""
    hyper = random_hyper()
    hyper.compression = compression_of(all_options()(task="p3", average=3))
    assert hyper.compression.sets == 3
    averaged = prefix_of(hyper, EPISODES)
    assert averaged.offset.tolist() == [G] * 4
    for row, e in enumerate(EPISODES):
        alone = [hyper.compress(rows_of(Formatter().context_tokens(part))) for part in e.split(3)]
        assert_same_gists(averaged[torch.tensor([row])], merged(alone, lambda same: sum(same) / 3))
    rows = rows_of([1, 5, 6])
    first, second = (hyper.compress(replace(rows, positions=rows.positions + shift)) for shift in (0, 3))
    assert not torch.allclose(first.past[0][0], second.past[0][0]), "positions matter to keys"


def sets_as(**how: int) -> Compression:
    return chain.compression(SimpleNamespace(**{"chain": None, "concat": None} | how))


def test_sets_side_by_side_follow_one_another():
    hyper = random_hyper()
    hyper.compression = sets_as(concat=3)
    together = prefix_of(hyper, EPISODES)
    assert together.offset.tolist() == [3 * G] * 4
    for row, e in enumerate(EPISODES):
        alone = []
        for n, part in enumerate(e.split(3)):
            rows = rows_of(Formatter().context_tokens(part))
            alone.append(hyper.compress(replace(rows, positions=rows.positions + n * G)))
        assert_same_gists(together[torch.tensor([row])], merged(alone, lambda same: torch.cat(same, dim=2)))


def test_a_chain_of_sets_is_the_joint_pass_over_all_of_them():
    """Rows whose sets have unequal lengths, some of them empty."""
    hyper = random_hyper("downstream")
    hyper.compression = sets_as(chain=3)
    in_two_passes = two_passes(hyper, fill=7)
    joint = one_pass(hyper, lambda e: sum(map(gists_at_the_end, e.split(3)), []))
    torch.testing.assert_close(in_two_passes, joint, **TOLERANCE)
    assert prefix_of(hyper, EPISODES).offset.tolist() == [3 * G] * 4
    hyper.compression = sets_as(concat=3)
    apart = two_passes(hyper)
    assert (in_two_passes[0] - apart[0]).abs().max() > 1e-3, "each set sees the gists of those before it"


# ------------------------------------------------------------------------- other places for the gists


def test_gists_among_the_examples_are_the_joint_pass_too():
    hyper = random_hyper("downstream")
    hyper.compression = among.compression(SimpleNamespace(gists_every=2))

    def before(e: Episode) -> list[int]:
        return hyper.compression.contexts(Formatter(), e, GIST_IDS)[0].tokens

    first, second, third = EPISODES[0].examples
    assert before(EPISODES[0]) == [1, *first, *second, *GIST_IDS[:1], *third, *GIST_IDS[1:]]
    joint = one_pass(hyper, before)
    torch.testing.assert_close(two_passes(hyper, fill=7), joint, **TOLERANCE)
    hyper.compression = Compression(hyper.compression.contexts)  # without the gist mask
    assert (two_passes(hyper)[0] - joint[0]).abs().max() > 1e-3


def test_gists_with_spread_positions_are_the_joint_pass_too():
    hyper = random_hyper("downstream")
    plain = two_passes(hyper)
    hyper.compression = spread.compression(SimpleNamespace(gists_spread=True))

    def positions(e: Episode, length: int) -> list[int]:
        T = len(Formatter().context_tokens(e))
        return [*range(T), *(T * g // G - 1 for g in range(1, G + 1)), *range(T, length - G)]

    torch.testing.assert_close(two_passes(hyper, fill=7), one_pass(hyper, positions=positions), **TOLERANCE)
    assert (two_passes(hyper)[0] - plain[0]).abs().max() > 1e-3
    (context,) = spread.contexts(Formatter(), episode(5, 3), GIST_IDS)
    assert context.positions == [*range(-6, 3), -4, -1, 2]
    assert hyper.compress(Rows.of([context])).offset.tolist() == [G], "the last gist's place is the same"


# ------------------------------------------------------------------------- other terms of the loss

MAIN = Term(1.0, lambda batch: len(batch.targets), cross_entropy)
PROMPTS_AND_TARGETS = [[([1, 5, 6], [11, 12])], [([1, 7], [13]), ([1, 8, 9, 10], [14, 15])]]
FORMS = {
    "gists at the end": Compression(),
    "gists among the examples": among.compression(SimpleNamespace(gists_every=2)),
    "a chain": sets_as(chain=2),
}


def training_batch(hyper: HyperLlama, form: str = "gists at the end") -> Batch:
    hyper.compression = FORMS[form]
    return batch_of(hyper, EPISODES[:2], PROMPTS_AND_TARGETS)


def terms_of(chapter, hyper: HyperLlama, **options) -> list[Term]:
    args = all_options()(**options)
    return chapter.terms(SimpleNamespace(args=args, hyper=hyper, formatter=Formatter()), [MAIN])


def loss_of(term: Term, hyper: HyperLlama, batch: Batch) -> torch.Tensor:
    logits, gists = hyper(batch)
    return term.loss(hyper, batch, gists, logits)


def language_model_logits(hyper: HyperLlama, before: list[int], target: list[int]) -> torch.Tensor:
    """What the bare base predicts for a target after tokens."""
    return hyper.model(torch.tensor([before + target]))[0][0, len(before) - 1 : -1]


@pytest.mark.parametrize("form", ["gists at the end", "gists among the examples"])
def test_the_examples_are_reconstructed_after_their_own_gists_and_a_marker(form):
    hyper = random_hyper("downstream")
    batch = training_batch(hyper, form)
    assert terms_of(reconstruct, hyper) == [MAIN]
    main, term = terms_of(reconstruct, hyper, reconstruct=0.5)
    texts = [sum(e.examples, []) for e in EPISODES[:2]]
    again = reconstruct.reconstruction(batch, 50, EOS)
    assert again.targets.tolist() == sum(texts, []) and again.tokens[:, 0].tolist() == [EOS, EOS]
    assert main == MAIN and term.weight == 0.5 and term.count(batch) == len(again.targets)
    expected = 0.0
    for tokens, text in zip(batch.context[0].tokens.tolist(), texts):
        context = tokens[: len(text) + 1 + G]
        logits = hyper.joint(torch.tensor([context + [EOS] + text]))[0, len(context) : -1]
        expected += F.cross_entropy(logits, torch.tensor(text), reduction="sum")
    torch.testing.assert_close(loss_of(term, hyper, batch), expected, atol=1e-4, rtol=1e-5)


def test_language_modelling_reads_the_whole_text_as_it_is():
    hyper = random_hyper()
    texts = [words(10, 1), words(10, 2)]  # A B C D: 3, 2, 2 and 3 tokens
    samples = []
    for text in texts:
        samples.append(Sample([with_gists([1, *text[:3], *text[7:]], GIST_IDS)], [([1], text[3:7])]))
    batch = collate(samples)
    assert terms_of(lm, hyper) == [MAIN]
    _, term = terms_of(lm, hyper, lm=0.25)
    assert term.weight == 0.25 and term.count(batch) == 20
    losses = [F.cross_entropy(language_model_logits(hyper, [1], text), torch.tensor(text)) for text in texts]
    torch.testing.assert_close(loss_of(term, hyper, batch), 10 * sum(losses), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_reads_all_examples_no_gist_and_one_bos_as_few_shot_prompting_does(form):
    hyper = random_hyper("downstream")
    taught = teacher.teacher_logits(hyper, training_batch(hyper, form)).split([2, 1, 2])
    n = 0
    for e, queries in zip(EPISODES, PROMPTS_AND_TARGETS):
        parts = e.split(2) if form == "a chain" else [e]
        context = sum((sum(part.examples, []) for part in parts), [1])
        for prompt, target in queries:
            expected = language_model_logits(hyper, context + prompt[1:], target)
            torch.testing.assert_close(taught[n], expected, **TOLERANCE)
            n += 1


def test_where_a_prompt_is_bos_alone_the_teacher_keeps_it():
    """Text: BOS A D, then BOS B C."""
    hyper = random_hyper()
    targets = [words(4, 6), words(4, 8)]
    batch = batch_of(hyper, EPISODES[:2], [[([1], target)] for target in targets])
    taught = teacher.teacher_logits(hyper, batch).split(4)
    for logits, e, target in zip(taught, EPISODES, targets):
        expected = language_model_logits(hyper, [*Formatter().context_tokens(e), 1], target)
        torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_the_teacher_is_followed_and_targets_weigh_what_the_context_is_worth():
    hyper = random_hyper()
    batch = training_batch(hyper)
    assert terms_of(teacher, hyper) == [MAIN]
    main, distill = terms_of(teacher, hyper, distill=0.5, weight_by_context=True)
    assert (main.weight, distill.weight) == (1.0, 0.5) and main.count(batch) == distill.count(batch) == 5
    logits, gists = hyper(batch)
    taught = teacher.teacher_logits(hyper, batch)
    queries = sum(PROMPTS_AND_TARGETS, [])
    alone = torch.cat([language_model_logits(hyper, *query) for query in queries])
    log_probs = [x.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0] for x in (logits, taught, alone)]
    gain = (log_probs[1] - log_probs[2]).clamp(min=0.1)
    assert (gain > 0.1).any() and (gain == 0.1).any()
    torch.testing.assert_close(teacher.context_gain(hyper, batch), gain, **TOLERANCE)
    weighted = -(gain * log_probs[0]).sum()
    torch.testing.assert_close(main.loss(hyper, batch, gists, logits), weighted, **TOLERANCE)
    divergence = (taught.softmax(-1) * (taught.log_softmax(-1) - logits.log_softmax(-1))).sum()
    torch.testing.assert_close(distill.loss(hyper, batch, gists, logits), divergence, **TOLERANCE)
    assert distill.loss(hyper, batch, gists, taught).abs() < 1e-5 < divergence


@pytest.mark.parametrize("chapter, options", [
    (reconstruct, {"reconstruct": 1.0}),
    (teacher, {"distill": 1.0}),
    (teacher, {"weight_by_context": True}),
])  # fmt: skip
def test_no_term_depends_on_how_rows_are_divided_into_batches(chapter, options):
    hyper = random_hyper("downstream")
    term = terms_of(chapter, hyper, **options)[-1]
    whole = training_batch(hyper)
    parts = [batch_of(hyper, EPISODES[n : n + 1], PROMPTS_AND_TARGETS[n : n + 1]) for n in range(2)]
    assert term.count(whole) == sum(map(term.count, parts))
    losses = [loss_of(term, hyper, part) for part in parts]
    torch.testing.assert_close(loss_of(term, hyper, whole), sum(losses), atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------------- prefixes that need no gists


def test_rows_read_as_a_prefix_are_what_comes_before_in_one_row():
    """Unequal rows, with and without a LoRA set: after each, a query reads as in one row with it."""
    hyper = random_hyper("downstream")
    queries = torch.tensor([[1, 20, 21], [1, 22, 23], [1, 24, 25]])
    rows = [[1, 5, 6, 7, 8], [1, 9], [1, 10, 11, 12]]
    for adapter in (None, "downstream"):
        prefix = read_rows(hyper.model, rows, adapter)
        assert prefix.offset.tolist() == [5, 2, 4]
        logits, _ = hyper.model(queries, **prefix.as_past(3, adapter))
        for n, row in enumerate(rows):
            whole, _ = hyper.model(torch.tensor([row + queries[n].tolist()]), adapter=adapter)
            torch.testing.assert_close(logits[n], whole[0, len(row) :], **TOLERANCE)
    assert read_rows(hyper.model, rows[:1]).past_mask is None


def test_mean_pooling_averages_keys_before_their_rotation_and_puts_them_where_gists_stand():
    plain = torch.randn(1, 2, 8, config().head_size, generator=torch.Generator().manual_seed(0))
    angles = rotary_angles(torch.arange(8)[None], config())
    pooled = mean_pooled(Gists([(rotate(plain, angles), plain)], torch.tensor([8])), 4, config())
    means = plain.unflatten(2, (4, 2)).mean(3)
    at_gists = rotary_angles(torch.arange(4)[None], config())
    torch.testing.assert_close(pooled.past[0][0], rotate(means, at_gists), **TOLERANCE)
    torch.testing.assert_close(pooled.past[0][1], means, **TOLERANCE)
    assert pooled.offset.tolist() == [4]
    few = mean_pooled(Gists([(plain, plain)], torch.tensor([8])), 16, config())
    assert few.past[0][0].shape[2] == 8, "fewer tokens than gists"


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


# ------------------------------------------------------------------------------- a prefix as a file


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
    good = {"offset": gists.offset}
    for i, (k, v) in enumerate(gists.past):
        good |= {f"{i}.key": k, f"{i}.value": v}
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
    """The four episodes as tasks, with one or two queries each."""
    prompts = [[1, *words(n, 40 + n)] for n in (5, 3, 8, 1, 4, 2)]
    choices = [[words(1, n), words(2, 60 + n)] for n in range(6)]
    task = torch.tensor([0, 0, 1, 2, 3, 3])
    other = torch.tensor([1, 2, 3, 0])
    return lecture.Lesson(
        "random", random_hyper(), all_rows(), task, other, prompts, choices, [0, 1, 1, 0, 1, 0]
    )


def score_of_joint_rows(lesson: lecture.Lesson, hyper: HyperLlama, contexts, shift: int = 0) -> lecture.Score:
    """lecture.score, each choice in a row of its own. contexts: of each task, the tokens before a query."""
    right, losses = [], []
    for n, (prompt, options) in enumerate(zip(lesson.prompts, lesson.choices)):
        context = contexts[lesson.task[n]]
        log_probs = []
        for option in options:
            after = G + shift
            positions = [*range(G - len(context), G), *range(after, after + len(prompt + option))]
            logits = hyper.joint(torch.tensor([context + prompt + option]), torch.tensor([positions]))
            logits = logits[0, -len(option) - 1 : -1].log_softmax(-1)
            log_probs.append(logits.gather(1, torch.tensor(option)[:, None]).sum().item())
        right.append(100.0 * (log_probs[lesson.right[n]] == max(log_probs)))
        losses.append(-log_probs[lesson.right[n]])
    return lecture.Score(sum(right) / len(right), sum(losses) / len(losses))


@torch.no_grad()
def test_the_lecture_compares_each_pair_of_roles_with_the_joint_pass():
    lesson = small_lesson()
    contexts = [gists_at_the_end(e) for e in EPISODES]
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
    contexts = [gists_at_the_end(e) for e in EPISODES]
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
            context = gists_at_the_end(EPISODES[s])
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
    assert "after 2 steps" in lesson.model_name and len(lesson.prompts) == 6 and len(lesson.hyper.gists) == 4
    trained, _ = load_tensors(hypernetwork / "adapters.safetensors")
    assert torch.equal(lesson.hyper.gists, trained["gists"])
    lecture.draw(lesson, tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == sorted(lecture.PICTURES)
    assert max(path.stat().st_size for path in (tmp_path / "figures").iterdir()) < 60_000
    (tmp_path / "figures" / lecture.PICTURES[-1]).write_text("mine")
    with pytest.raises(InputError, match="would replace"):
        lecture.draw(lesson, tmp_path / "figures")
