"""Gisting: the joint pass and the two passes are the same thing."""

import pytest
import torch
from conftest import G, config, random_hyper, random_llama

from data import collate
from gist import Gists, SoftPrefix, combine, gist_mask, load_gists, save_gists
from llama import InputError, generate, positions_of, ragged

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
    logits, _ = hyper.model(queries, past=gists.past, offset=gists.offset, adapter=hyper.downstream)
    return [out[: len(query)] for out, (_, query) in zip(logits, rows)]


def one_pass(hyper, rows, fill: int = 0):
    logits = hyper.joint(ragged([examples + query for examples, query in rows], fill))
    return [out[len(examples) : len(examples) + len(query)] for out, (examples, query) in zip(logits, rows)]


VARIANTS = [(None, 2), (None, 4), (None, 1), ("downstream", 2), ("hyper", 2)]


@pytest.mark.parametrize("downstream, kv_heads", VARIANTS)
def test_joint_pass_and_two_passes_disagree(downstream, kv_heads):
    hyper, rows = random_hyper(downstream, kv_heads), ragged_rows()
    torch.testing.assert_close(two_passes(hyper, rows), one_pass(hyper, rows), **TOLERANCE)


@pytest.mark.parametrize("downstream, kv_heads", VARIANTS)
def test_joint_pass_and_two_passes_have_other_gradients(downstream, kv_heads):
    rows, gradients = ragged_rows(), []
    for way in (two_passes, one_pass):
        hyper = random_hyper(downstream, kv_heads)
        torch.cat([out.log_softmax(-1)[:, 7] for out in way(hyper, rows)]).mean().backward()  # as in training: per token
        gradients.append({name: p.grad for name, p in hyper.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-5, msg=name)


def test_mask_of_a_small_row_is_not_what_the_paper_draws():
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


def test_mask_without_gists_is_not_causal_and_some_token_sees_nothing():
    T = 6
    assert torch.equal(gist_mask(torch.zeros(2, T, dtype=torch.bool))[1], torch.ones(T, T, dtype=torch.bool).tril())
    anywhere = torch.rand(64, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    assert gist_mask(anywhere).diagonal(dim1=1, dim2=2).all()


def test_two_runs_of_gists_are_not_a_chain_of_compressions():
    """[a gists b gists c] in one pass = compress a; compress b behind a's gists; read c behind both."""
    hyper = random_hyper()
    a, b, c = [1] + words(6, 1), words(4, 2), words(5, 3)
    row = torch.tensor([a + GIST_IDS + b + GIST_IDS + c])
    is_gist = row >= 50
    behind = torch.arange(row.shape[1])[None, :, None] >= row.shape[1] - len(c)
    joint, _ = hyper.model(hyper.embed(row), adapter={"hyper": ~behind}, mask=gist_mask(is_gist))

    first = hyper.compress(torch.tensor([a + GIST_IDS]))
    x = hyper.embed(torch.tensor([b + GIST_IDS]))
    _, both = hyper.model(x, past=first.past, offset=first.offset, adapter="hyper")
    keep = [*range(G), *range(G + len(b), G + len(b) + G)]  # a's gists and b's, without b itself
    past = [(k[:, :, keep], v[:, :, keep]) for k, v in both]
    chained, _ = hyper.model(torch.tensor([c]), past=past, offset=first.offset + len(b) + G)
    torch.testing.assert_close(chained[0], joint[0, -len(c) :], **TOLERANCE)


def test_first_token_after_the_gists_is_decoded_one_position_late():
    """Token by token behind the gists = all at once = the joint pass, from the first token on."""
    hyper, rows = random_hyper("downstream"), ragged_rows(((5, 4), (11, 4)))
    gists = hyper.compress(ragged([examples for examples, _ in rows]))
    past, offset, stepwise = gists.past, gists.offset, []
    for t in range(5):
        token = torch.tensor([[query[t]] for _, query in rows])
        logits, past = hyper.model(token, past=past, offset=offset + t, adapter="downstream")
        stepwise.append(logits)
    joint = one_pass(hyper, rows)
    torch.testing.assert_close(list(torch.cat(stepwise, 1)), joint, **TOLERANCE)


def test_a_prefix_made_at_another_offset_answers_differently():
    hyper, rows = random_hyper(), ragged_rows()
    tokens, queries = ragged([e for e, _ in rows]), ragged([q for _, q in rows])
    outputs = []
    for start in (None, torch.tensor([40, 3, 100, 0])):
        gists = hyper.compress(tokens, start)
        outputs.append(hyper.model(queries, past=gists.past, offset=gists.offset)[0])
    torch.testing.assert_close(*outputs, **TOLERANCE)
    late = hyper.model(queries, past=gists.past, offset=gists.offset + 1)[0]  # the bug, on purpose
    assert (late - outputs[1]).abs().max() > 1e-2


def test_offset_is_not_the_position_after_the_last_gist():
    hyper, rows = random_hyper(), ragged_rows()
    tokens = ragged([e for e, _ in rows])
    assert hyper.compress(tokens).offset.tolist() == [len(e) for e, _ in rows]
    assert hyper.compress(tokens, torch.tensor([5, 0, 1, 2])).offset.tolist() == [
        len(e) + s for (e, _), s in zip(rows, (5, 0, 1, 2))
    ]


def test_more_padding_changes_the_gists():
    hyper, rows = random_hyper(), ragged_rows()
    tokens = ragged([e for e, _ in rows])
    gists = hyper.compress(tokens)
    padded = hyper.compress(torch.cat((tokens, torch.full((len(tokens), 9), 7)), 1))
    torch.testing.assert_close(padded.past, gists.past, **TOLERANCE)
    assert torch.equal(padded.offset, gists.offset)
    torch.testing.assert_close(two_passes(hyper, rows, fill=7), two_passes(hyper, rows, fill=0), **TOLERANCE)


def test_a_row_in_a_batch_answers_differently_from_the_row_alone():
    hyper, rows = random_hyper("downstream"), ragged_rows()
    together = two_passes(hyper, rows)
    torch.testing.assert_close(together, [two_passes(hyper, [row])[0] for row in rows], **TOLERANCE)


def test_several_queries_of_one_prefix_answer_differently_from_one_prefix_each():
    hyper, rows = random_hyper("downstream"), ragged_rows()
    examples = [e for e, _ in rows]
    prompts, targets = [q for _, q in rows], [words(2, 5), words(1, 6), words(3, 7), words(2, 8)]
    shared = hyper(collate(examples, [3, 0, 0, 2], prompts, targets))
    each = hyper(collate([examples[i] for i in (3, 0, 0, 2)], [0, 1, 2, 3], prompts, targets))
    torch.testing.assert_close(shared, each, **TOLERANCE)


def test_gradient_reaches_lora_and_gists_past_the_prefix():
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


def test_gists_beyond_the_table_repeat_silently_or_words_use_it():
    hyper = random_hyper()
    tokens = torch.tensor([[1, 49, *GIST_IDS]])
    x = hyper.embed(tokens)
    torch.testing.assert_close(x[0, 2:], hyper.gists.detach().clone(), atol=0, rtol=0)
    torch.testing.assert_close(x[0, :2], hyper.model.embed_tokens.weight[[1, 49]], atol=0, rtol=0)


def test_choosing_rows_of_gists_mixes_them_up():
    gists = Gists([(torch.arange(6.0).view(3, 1, 1, 2), torch.zeros(3, 1, 1, 2))], torch.tensor([4, 5, 6]))
    chosen = gists[torch.tensor([2, 0, 2])]
    assert chosen.offset.tolist() == [6, 4, 6]
    assert chosen.past[0][0].flatten().tolist() == [4, 5, 0, 1, 4, 5]


def test_head_counts_of_the_fixtures_are_grouped():
    assert config().kv_heads < config().heads


# -------------------------------------------------------------------------------- instruction fusion


def test_a_fused_prefix_without_examples_is_not_full_context():
    """Nothing is compressed: BOS, the instruction and the gists stay, as if all stood in one row."""
    hyper = random_hyper("hyper")
    row, query = [1, 5, 9, 33, 50, 51, 52], [7, 8, 11]
    gists = hyper.compress(torch.tensor([row]), kept=torch.tensor([4]))
    fused, _ = hyper.model(torch.tensor([query]), **gists.before(3), adapter="hyper")
    full, _ = hyper.model(hyper.embed(torch.tensor([row + query])), adapter="hyper")
    torch.testing.assert_close(fused, full[:, len(row) :], atol=1e-5, rtol=1e-5)


def test_rows_that_keep_unequal_numbers_of_tokens_disturb_each_other():
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


# ------------------------------------------------------------------- averaging and concatenating gists

SETS = [[1, 5, 6, 50, 51, 52], [1, 7, 8, 9, 10, 11, 50, 51, 52], [1, 12, 50, 51, 52]]


def assert_same_gists(one, other):
    assert one.offset.tolist() == other.offset.tolist()
    for a, b in zip(one.past, other.past, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_set_averaged_with_itself_is_another():
    hyper = random_hyper()
    alone = hyper.compress(torch.tensor([SETS[0]]))
    assert_same_gists(combine(hyper, [SETS[0]] * 3), alone)
    assert_same_gists(combine(hyper, [SETS[0]], side_by_side=True), alone)


def test_sets_of_unequal_length_are_averaged_at_unequal_positions():
    """The mean of both, recomputed one by one so that they end at the common offset."""
    hyper = random_hyper()
    found = combine(hyper, SETS)
    alone = [hyper.compress(torch.tensor([row]), start=torch.tensor([9 - len(row)])) for row in SETS]
    assert [gists.offset.item() for gists in alone] == [9, 9, 9] == found.offset.tolist() * 3
    for layer, (k, v) in enumerate(found.past):
        torch.testing.assert_close(k, sum(gists.past[layer][0] for gists in alone) / 3, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, sum(gists.past[layer][1] for gists in alone) / 3, atol=1e-5, rtol=1e-5)
    first, second = (hyper.compress(torch.tensor([SETS[0]]), start=torch.tensor([start])) for start in (0, 3))
    assert not torch.allclose(first.past[0][0], second.past[0][0]), "positions matter to keys"


def test_sets_side_by_side_do_not_follow_one_another():
    hyper = random_hyper()
    found = combine(hyper, SETS, side_by_side=True)
    ends = [found.offset.item() - 2 * G, found.offset.item() - G, found.offset.item()]
    alone = [hyper.compress(torch.tensor([row]), start=torch.tensor([end - len(row)])) for row, end in zip(SETS, ends)]
    assert min(end - len(row) for row, end in zip(SETS, ends)) == 0, "no further back than needed"
    for layer, (k, v) in enumerate(found.past):
        torch.testing.assert_close(k, torch.cat([gists.past[layer][0] for gists in alone], dim=2), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(v, torch.cat([gists.past[layer][1] for gists in alone], dim=2), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------ prefix tuning


def soft(kind, kv_heads=2, tasks=2):
    return SoftPrefix(random_llama(kv_heads), tasks, 5, kind, torch.Generator().manual_seed(0))


def test_a_folded_reparametrisation_is_not_its_mlp():
    mlp, flat = soft("reparam"), soft("flat")
    for task in range(2):
        hidden = torch.tanh(mlp.table[task] @ mlp.first[task])
        out = (hidden @ mlp.second[task]).view(5, 3, 2, 2, 8)  # slots, layers, key and value, KV heads, head size
        for layer, (k, v) in enumerate(mlp.past()):
            torch.testing.assert_close(k[task], out[:, layer, 0].transpose(0, 1))
            torch.testing.assert_close(v[task], out[:, layer, 1].transpose(0, 1))
    flat.start_from(mlp.prefix())
    for a, b in zip(flat.past(), mlp.past(), strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_propagation_on_a_zero_table_is_not_plain_slots():
    prefix = soft("propagate")
    prefix.table.data.zero_()
    _, plain = prefix.model(torch.zeros(2, 5, 32), keep=positions_of(torch.zeros(2, 5)))
    for (k, v), (k2, v2) in zip(prefix.past(), plain, strict=True):
        assert torch.equal(k, k2) and torch.equal(v, v2)


def test_propagated_slots_differ_from_slots_in_the_row():
    """Read alone as a prefix, or in one row with the query, where vectors are added to the first P places."""
    prefix = soft("propagate")
    prefix.table.data.normal_(generator=torch.Generator().manual_seed(1))
    query = torch.tensor([[1, 7, 9], [1, 8, 20]])
    behind, _ = prefix.model(query, **prefix.prefix().before(3))
    row = torch.cat((torch.zeros(2, 5, 32), prefix.model.embed_tokens(query)), dim=1)
    for layer, vectors in zip(prefix.model.layers, prefix.table):
        padded = torch.cat((vectors, torch.zeros(2, 3, 32)), dim=1)
        layer.register_forward_pre_hook(lambda _, a, padded=padded: (a[0] + padded, *a[1:]))
    together, _ = prefix.model(row)
    torch.testing.assert_close(behind, together[:, 5:], atol=1e-5, rtol=1e-5)


def test_propagation_needs_more_than_half_of_the_parameters():
    count = {kind: sum(p.numel() for p in soft(kind, kv_heads=4).parameters() if p.requires_grad) for kind in ("flat", "propagate")}
    assert 2 * count["propagate"] == count["flat"]


@pytest.mark.parametrize("kind", ["flat", "reparam", "propagate"])
def test_a_task_trains_the_prefix_of_another(kind):
    prefix = soft(kind)
    batch = collate(None, [1, 1], [[1, 5], [1, 6, 7]], [[8, 2], [9, 2]])
    prefix(batch).sum().backward()
    grad = prefix.table.grad if kind == "reparam" else prefix.table.grad.transpose(0, 2 if kind == "flat" else 1)
    assert grad[1].abs().sum() > 0 and grad[0].abs().sum() == 0


# --------------------------------------------------------------------------------- a prefix as a file


def test_a_saved_prefix_answers_differently_or_in_another_model(tmp_path):
    hyper, about = random_hyper(), {"model": "a", "run": "b"}
    gists = hyper.compress(torch.tensor([SETS[1]]))
    save_gists(tmp_path / "g.safetensors", gists, about)
    found = load_gists(tmp_path / "g.safetensors", about, "cpu")
    query = torch.tensor([[1, 20, 21]])
    (one, _), (other, _) = (hyper.model(query, **g.before(3)) for g in (gists, found))
    assert torch.equal(one, other)
    for key in about:
        with pytest.raises(InputError, match=f"another {key}"):
            load_gists(tmp_path / "g.safetensors", about | {key: "x"}, "cpu")
