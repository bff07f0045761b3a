"""Gisting: the joint pass and the two passes are the same thing."""

from dataclasses import replace

import pytest
import torch
from conftest import G, config, random_hyper

from data import again, collate
from gist import Gists, combine, gist_mask, load_gists, mean_pooled, read_rows, save_gists
from llama import InputError, generate, ragged
from lora import save_tensors

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
GIST_IDS = [50 + i for i in range(G)]


def words(count: int, seed: int) -> list[int]:
    return torch.randint(3, 50, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def ragged_rows(lengths=((7, 5), (12, 3), (2, 8), (9, 1))):
    """(examples with gists, query) of unequal lengths."""
    return [([1] + words(a, a) + GIST_IDS, [1] + words(b, 99 + b)) for a, b in lengths]


def two_passes(hyper, rows, fill: int = 0):
    """Logits at all tokens of the queries, one [T, V] per row."""
    gists = hyper.compress(ragged([examples for examples, _ in rows], fill))
    queries = ragged([query for _, query in rows], fill)
    logits, _ = hyper.model(queries, past=gists.past, offset=gists.offset, adapter=hyper.answerer)
    return [out[: len(query)] for out, (_, query) in zip(logits, rows)]


def one_pass(hyper, rows, fill: int = 0):
    logits = hyper.joint(ragged([examples + query for examples, query in rows], fill))
    return [out[len(examples) : len(examples) + len(query)] for out, (examples, query) in zip(logits, rows)]


VARIANTS = [(None, 2), (None, 4), (None, 1), ("downstream", 2), ("hyper", 2)]


@pytest.mark.parametrize("answerer, kv_heads", VARIANTS)
def test_two_passes_equal_the_joint_pass(answerer, kv_heads):
    hyper, rows = random_hyper(answerer, kv_heads), ragged_rows()
    torch.testing.assert_close(two_passes(hyper, rows), one_pass(hyper, rows), **TOLERANCE)


@pytest.mark.parametrize("answerer, kv_heads", VARIANTS)
def test_two_passes_have_the_gradients_of_the_joint_pass(answerer, kv_heads):
    rows, gradients = ragged_rows(), []
    for way in (two_passes, one_pass):
        hyper = random_hyper(answerer, kv_heads)
        torch.cat([out.log_softmax(-1)[:, 7] for out in way(hyper, rows)]).mean().backward()  # as in training: per token
        gradients.append({name: p.grad for name, p in hyper.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-5, msg=name)


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
    assert torch.equal(gist_mask(torch.zeros(2, T, dtype=torch.bool))[1], torch.ones(T, T, dtype=torch.bool).tril())
    anywhere = torch.rand(64, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    assert gist_mask(anywhere).diagonal(dim1=1, dim2=2).all()


def test_two_runs_of_gists_are_a_chain_of_compressions():
    """[a gists b gists c] in one pass = compress a; compress b after a's gists; read c after both."""
    hyper = random_hyper()
    a, b, c = [1] + words(6, 1), words(4, 2), words(5, 3)
    row = torch.tensor([a + GIST_IDS + b + GIST_IDS + c])
    is_gist = row >= 50
    after = torch.arange(row.shape[1])[None, :, None] >= row.shape[1] - len(c)
    joint, _ = hyper.model(hyper.embed(row), adapter={"hyper": ~after}, mask=gist_mask(is_gist))

    first = hyper.compress(torch.tensor([a + GIST_IDS]))
    x = hyper.embed(torch.tensor([b + GIST_IDS]))
    _, both = hyper.model(x, past=first.past, offset=first.offset, adapter="hyper")
    keep = [*range(G), *range(G + len(b), G + len(b) + G)]  # a's gists and b's, without b itself
    past = [(k[:, :, keep], v[:, :, keep]) for k, v in both]
    chained, _ = hyper.model(torch.tensor([c]), past=past, offset=first.offset + len(b) + G)
    torch.testing.assert_close(chained[0], joint[0, -len(c) :], **TOLERANCE)


def test_decoding_continues_right_after_the_last_gist():
    """Token by token after the gists = all at once = the joint pass, from the first token on."""
    hyper, rows = random_hyper("downstream"), ragged_rows(((5, 4), (11, 4)))
    gists = hyper.compress(ragged([examples for examples, _ in rows]))
    past, offset, stepwise = gists.past, gists.offset, []
    for t in range(5):
        token = torch.tensor([[query[t]] for _, query in rows])
        logits, past = hyper.model(token, past=past, offset=offset + t, adapter="downstream")
        stepwise.append(logits)
    joint = one_pass(hyper, rows)
    torch.testing.assert_close(list(torch.cat(stepwise, 1)), joint, **TOLERANCE)


def test_a_prefix_made_at_another_offset_answers_the_same():
    hyper, rows = random_hyper(), ragged_rows()
    tokens, queries = ragged([e for e, _ in rows]), ragged([q for _, q in rows])
    outputs = []
    for start in (None, torch.tensor([40, 3, 100, 0])):
        gists = hyper.compress(tokens, start)
        outputs.append(hyper.model(queries, past=gists.past, offset=gists.offset)[0])
    torch.testing.assert_close(*outputs, **TOLERANCE)
    late = hyper.model(queries, past=gists.past, offset=gists.offset + 1)[0]  # the bug, on purpose
    assert (late - outputs[1]).abs().max() > 1e-2


def test_the_offset_is_the_position_after_the_last_gist():
    hyper, rows = random_hyper(), ragged_rows()
    tokens = ragged([e for e, _ in rows])
    assert hyper.compress(tokens).offset.tolist() == [G] * len(rows), "gists stand at 0 … G-1 whatever came before them"
    assert hyper.compress(tokens, torch.tensor([5, 0, 1, 2])).offset.tolist() == [
        len(e) + s for (e, _), s in zip(rows, (5, 0, 1, 2))
    ]


def test_padding_never_reaches_the_gists():
    hyper, rows = random_hyper(), ragged_rows()
    tokens = ragged([e for e, _ in rows])
    gists = hyper.compress(tokens)
    padded = hyper.compress(torch.cat((tokens, torch.full((len(tokens), 9), 7)), 1))
    torch.testing.assert_close(padded.past, gists.past, **TOLERANCE)
    assert torch.equal(padded.offset, gists.offset)
    torch.testing.assert_close(two_passes(hyper, rows, fill=7), two_passes(hyper, rows, fill=0), **TOLERANCE)


def test_a_row_in_a_batch_answers_like_the_row_alone():
    hyper, rows = random_hyper("downstream"), ragged_rows()
    together = two_passes(hyper, rows)
    torch.testing.assert_close(together, [two_passes(hyper, [row])[0] for row in rows], **TOLERANCE)


def test_several_queries_of_one_prefix_answer_like_one_prefix_each():
    hyper, rows = random_hyper("downstream"), ragged_rows()
    examples = [e for e, _ in rows]
    prompts, targets = [q for _, q in rows], [words(2, 5), words(1, 6), words(3, 7), words(2, 8)]
    shared = hyper(collate(examples, [3, 0, 0, 2], prompts, targets))
    each = hyper(collate([examples[i] for i in (3, 0, 0, 2)], [0, 1, 2, 3], prompts, targets))
    torch.testing.assert_close(shared, each, **TOLERANCE)


def test_the_gradient_reaches_lora_and_gists_through_the_prefix_alone():
    """Cut the prefix off, and no hypernetwork parameter has a gradient; the base never has one."""
    for detached in (False, True):
        hyper = random_hyper()
        gists = hyper.compress(torch.tensor([[1, 5, 6, *GIST_IDS]]))
        past = [(k.detach(), v.detach()) for k, v in gists.past] if detached else gists.past
        logits, _ = hyper.model(torch.tensor([[1, 7, 8]]), past=past, offset=gists.offset)
        assert logits.requires_grad != detached
        if not detached:
            logits.sum().backward()
            assert all((p.grad is not None) == p.requires_grad for p in hyper.parameters())
            assert hyper.gists.grad.abs().min() > 0


def test_gists_have_a_table_of_their_own_and_words_do_not_use_it():
    hyper = random_hyper()
    tokens = torch.tensor([[1, 49, *GIST_IDS]])
    x = hyper.embed(tokens)
    torch.testing.assert_close(x[0, 2:], hyper.gists.detach().clone(), atol=0, rtol=0)
    torch.testing.assert_close(x[0, :2], hyper.model.embed_tokens.weight[[1, 49]], atol=0, rtol=0)


def test_chosen_rows_of_gists_are_those_that_were_asked_for():
    gists = Gists([(torch.arange(6.0).view(3, 1, 1, 2), torch.zeros(3, 1, 1, 2))], torch.tensor([4, 5, 6]))
    chosen = gists[torch.tensor([2, 0, 2])]
    assert chosen.offset.tolist() == [6, 4, 6]
    assert chosen.past[0][0].flatten().tolist() == [4, 5, 0, 1, 4, 5]


def test_the_small_models_have_grouped_heads():
    assert config().kv_heads < config().heads


# ------------------------------------------------------------------------------- instruction fusion


def test_a_fused_prefix_without_examples_equals_full_context():
    """Nothing is compressed: BOS, the instruction and the gists stay, as if all stood in one row."""
    hyper = random_hyper("hyper")
    row, query = [1, 5, 9, 33, 50, 51, 52], [7, 8, 11]
    gists = hyper.compress(torch.tensor([row]), kept=torch.tensor([4]))
    fused, _ = hyper.model(torch.tensor([query]), **gists.before(3, "hyper"))
    full, _ = hyper.model(hyper.embed(torch.tensor([row + query])), adapter="hyper")
    torch.testing.assert_close(fused, full[:, len(row) :], atol=1e-5, rtol=1e-5)


def test_rows_that_keep_unequal_numbers_of_tokens_answer_like_each_alone():
    hyper = random_hyper()
    rows = [[1, 5, 9, 33, 50, 51, 52], [1, 6, 50, 51, 52], [1, 7, 8, 9, 10, 11, 50, 51, 52]]
    kept, queries = [2, 1, 6], [[1, 20, 21], [1, 22], [1, 23, 24, 25]]
    together = hyper.compress(ragged(rows), kept=torch.tensor(kept))
    logits, _ = hyper.model(ragged(queries), **together.before(4))
    answers = generate(hyper.model, queries, 5, -1, together.past, together.offset, together.seen)
    for n in range(3):
        alone = hyper.compress(torch.tensor([rows[n]]), kept=torch.tensor([kept[n]]))
        assert alone.past[0][0].shape[2] == kept[n] + G and alone.seen.all()
        expected, _ = hyper.model(torch.tensor([queries[n]]), past=alone.past, offset=alone.offset)
        torch.testing.assert_close(logits[n, : len(queries[n])], expected[0], atol=1e-5, rtol=1e-5)
        assert generate(hyper.model, [queries[n]], 5, -1, alone.past, alone.offset) == [answers[n]]


# ---------------------------------------------------------------- averaging and concatenating gists

SETS = [[1, 5, 6, 50, 51, 52], [1, 7, 8, 9, 10, 11, 50, 51, 52], [1, 12, 50, 51, 52]]


def assert_same_gists(one, other):
    assert one.offset.tolist() == other.offset.tolist()
    for a, b in zip(one.past, other.past, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_set_averaged_with_itself_is_itself():
    hyper = random_hyper()
    alone = hyper.compress(torch.tensor([SETS[0]]))
    assert_same_gists(combine(hyper, [SETS[0]] * 3), alone)
    assert_same_gists(combine(hyper, [SETS[0]], "concat"), alone)


def test_sets_of_unequal_length_are_averaged_at_equal_positions():
    """The mean of both, recomputed one by one so that they end at the common offset."""
    hyper = random_hyper()
    combined = combine(hyper, SETS)
    alone = [hyper.compress(torch.tensor([row]), start=torch.tensor([G - len(row)])) for row in SETS]
    assert [gists.offset.item() for gists in alone] == [G, G, G] == combined.offset.tolist() * 3
    for layer, (k, v) in enumerate(combined.past):
        torch.testing.assert_close(k, sum(gists.past[layer][0] for gists in alone) / 3, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, sum(gists.past[layer][1] for gists in alone) / 3, atol=1e-5, rtol=1e-5)
    first, second = (hyper.compress(torch.tensor([SETS[0]]), start=torch.tensor([start])) for start in (0, 3))
    assert not torch.allclose(first.past[0][0], second.past[0][0]), "positions matter to keys"


def test_sets_side_by_side_follow_one_another():
    hyper = random_hyper()
    combined = combine(hyper, SETS, "concat")
    ends = [G, 2 * G, 3 * G]
    assert combined.offset.tolist() == [3 * G]
    alone = [hyper.compress(torch.tensor([row]), start=torch.tensor([end - len(row)])) for row, end in zip(SETS, ends)]
    for layer, (k, v) in enumerate(combined.past):
        torch.testing.assert_close(k, torch.cat([gists.past[layer][0] for gists in alone], dim=2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, torch.cat([gists.past[layer][1] for gists in alone], dim=2), atol=1e-5, rtol=1e-5)


def test_a_chain_of_sets_is_the_joint_pass_over_all_of_them():
    hyper, query = random_hyper(), [1, 30, 31, 32]
    gists = combine(hyper, SETS, "chain")
    assert gists.offset.tolist() == [3 * G]
    two = hyper.model(torch.tensor([query]), **gists.before(len(query)))[0][0]
    torch.testing.assert_close(two, hyper.joint(torch.tensor([sum(SETS, []) + query]))[0, -len(query) :], **TOLERANCE)
    batch = collate([SETS[2], SETS[0]], [0, 1], [query[:2]] * 2, [query[2:]] * 2, earlier=[[SETS[0], SETS[2]], [SETS[1], SETS[1]]])
    trained = hyper(batch.to("cpu")).view(2, 2, -1)  # two rows of unequal lengths, as in training
    for row, sets in zip(trained, (SETS[:1] + SETS[1:], SETS[2:] + SETS[1:2] + SETS[:1])):
        torch.testing.assert_close(row, hyper.joint(torch.tensor([sum(sets, []) + query]))[0, -3:-1], **TOLERANCE)
    assert hyper.in_full(batch).shape == (4, 50)
    apart = hyper.model(torch.tensor([query]), **combine(hyper, SETS, "concat").before(len(query)))[0][0]
    assert (two - apart).abs().max() > 1e-3, "each set sees the gists of those before it"


def test_gists_among_the_examples_are_the_joint_pass_too():
    """Rows of unequal length, their gists in two parts."""
    hyper, a, b = random_hyper("downstream"), G // 2, GIST_IDS
    hyper.among = True
    rows = [([1] + words(n, n) + b[:a] + words(m, m) + b[a:], [1] + words(q, q)) for n, m, q in ((4, 9, 3), (7, 2, 6), (1, 1, 1))]
    torch.testing.assert_close(two_passes(hyper, rows), one_pass(hyper, rows), **TOLERANCE)
    hyper.among = False
    assert (two_passes(hyper, rows)[0] - one_pass(hyper, rows)[0]).abs().max() > 1e-3


def test_gists_with_spread_positions_are_the_joint_pass_too():
    hyper, rows = random_hyper("downstream"), ragged_rows()
    plain = two_passes(hyper, rows)
    hyper.spread = True
    torch.testing.assert_close(two_passes(hyper, rows, fill=7), one_pass(hyper, rows), **TOLERANCE)
    assert (two_passes(hyper, rows)[0] - plain[0]).abs().max() > 1e-3
    row = torch.tensor([[1] + words(8, 8) + GIST_IDS + [1, 5]])
    assert hyper.positions(row).tolist() == [[*range(9), 2, 5, 8, 9, 10]] and hyper.compress(row[:, :-2]).offset.tolist() == [G]


# ------------------------------------------------------------------------- other terms of the loss


def some_batch(**more):
    rows = [[1] + words(7, 7) + GIST_IDS, [1] + words(3, 3) + GIST_IDS]
    return rows, collate(rows, [0, 1, 1], [[1, 5, 6], [1, 7], [1, 8, 9, 10]], [[11, 12], [13], [14, 15]], **more)


def test_what_other_terms_predict_comes_after_the_same_gists():
    hyper, (rows, batch) = random_hyper("downstream"), some_batch()
    saying, text = again(rows, GIST_IDS, 2, 0.5)[0], collate(None, None, [[1], [1]], [words(6, 6), words(4, 4)])
    assert saying.weight == 0.5 and saying.targets.tolist() == words(7, 7) + words(3, 3) and saying.tokens[:, 0].tolist() == [2, 2]
    apart = [hyper(batch), hyper(replace(saying, examples=batch.examples)), hyper(replace(text, row=torch.arange(2)))]
    torch.testing.assert_close(hyper(replace(batch, more=(saying, text))), torch.cat(apart), **TOLERANCE)


def test_the_teacher_reads_all_examples_and_no_gist():
    hyper, (rows, batch) = random_hyper(), some_batch()
    plain = [row[: -len(GIST_IDS)] for row in rows]
    for among in (False, True):  # wherever the gists stand
        if among:
            batch = replace(batch, examples=ragged([row[:3] + GIST_IDS[:1] + row[3:-G] + GIST_IDS[1:] for row in rows]))
        taught = hyper.in_full(batch).split([2, 1, 2])
        for n, (row, prompt, target) in enumerate([(0, [1, 5, 6], [11, 12]), (1, [1, 7], [13]), (1, [1, 8, 9, 10], [14, 15])]):
            whole = hyper.model(torch.tensor([plain[row] + prompt + target]))[0][0]
            torch.testing.assert_close(taught[n], whole[-len(target) - 1 : -1], **TOLERANCE)


# ---------------------------------------------------------------------- prefixes that need no gists


def test_rows_read_as_a_prefix_are_what_comes_before_in_one_row():
    """Unequal rows, with and without a LoRA set: after each, a query reads as in one row with it."""
    hyper, queries = random_hyper("downstream"), torch.tensor([[1, 20, 21], [1, 22, 23], [1, 24, 25]])
    rows = [[1, 5, 6, 7, 8], [1, 9], [1, 10, 11, 12]]
    for adapter in (None, "downstream"):
        prefix = read_rows(hyper.model, rows, adapter)
        assert prefix.offset.tolist() == [5, 2, 4]
        logits, _ = hyper.model(queries, **prefix.before(3, adapter))
        for n, row in enumerate(rows):
            whole, _ = hyper.model(torch.tensor([row + queries[n].tolist()]), adapter=adapter)
            torch.testing.assert_close(logits[n], whole[0, len(row) :], **TOLERANCE)
    assert read_rows(hyper.model, rows[:1]).seen is None


def test_mean_pooling_takes_means_over_stretches():
    k = torch.arange(8.0).view(1, 1, 8, 1)
    pooled = mean_pooled(Gists([(k, -k)], torch.tensor([8])), 4)
    assert pooled.past[0][0].flatten().tolist() == [0.5, 2.5, 4.5, 6.5]
    assert pooled.past[0][1].flatten().tolist() == [-0.5, -2.5, -4.5, -6.5]
    assert pooled.offset.tolist() == [8]
    assert mean_pooled(Gists([(k, k)], torch.tensor([8])), 16).past[0][0].shape[2] == 8, "fewer tokens than gists"


# ------------------------------------------------------------------------------- a prefix as a file


def test_a_saved_prefix_answers_the_same_and_in_its_own_model_alone(tmp_path):
    hyper, about = random_hyper(), {"model": "a", "run": "b"}
    gists = hyper.compress(torch.tensor([SETS[1]]))
    save_gists(tmp_path / "g.safetensors", gists, about)
    loaded = load_gists(tmp_path / "g.safetensors", about, hyper.model)
    query = torch.tensor([[1, 20, 21]])
    (one, _), (other, _) = (hyper.model(query, **g.before(3)) for g in (gists, loaded))
    assert torch.equal(one, other)
    for key in about:
        with pytest.raises(InputError, match=f"another {key}"):
            load_gists(tmp_path / "g.safetensors", about | {key: "x"}, hyper.model)
    good = {"offset": gists.offset} | {f"{i}.{part}": x for i, kv in enumerate(gists.past) for part, x in zip(("key", "value"), kv)}
    for change, message in (
        ({"offset": torch.tensor([10**12])}, "offset"), ({"offset": torch.tensor([3.0])}, "offset"), ({"0.key": None}, "not a saved prefix"),
        ({"1.value": gists.past[1][1][:, :, :2]}, "1.value"), ({"2.key": gists.past[2][0].int()}, "2.key"),
        ({"0.value": gists.past[0][1] * torch.nan}, "0.value"), ({"0.key": gists.past[0][0].expand(2, -1, -1, -1)}, "0.key"),
    ):  # fmt: skip
        save_tensors(tmp_path / "bad.safetensors", {name: x for name, x in (good | change).items() if x is not None}, about)
        with pytest.raises(InputError, match=message):
            load_gists(tmp_path / "bad.safetensors", about, hyper.model)
