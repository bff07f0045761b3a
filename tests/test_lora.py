"""LoRA sets, updates that are emitted, NF4, files of tensors."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_hyper, random_llama, write_hf
from safetensors.torch import save_file

from data import Sample, collate
from eval import score_choices
from further.adapters import Heads, add_heads, emit
from gist import Compression, HyperLlama, Rows, with_gists
from llama import InputError, generate, load
from lora import NF4Linear, add_lora, assign, linears, load_tensors
from run import trainable

X = torch.tensor([[1, 5, 9, 20, 30, 4]])


def test_a_new_set_changes_nothing_before_training():
    model = random_llama()
    add_lora(model, "a", rank=4, alpha=8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(X, adapter="a")[0], random_llama()(X)[0], atol=0, rtol=0)


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match="no LoRA set"):
        random_hyper().model(X, adapter="downstream")


# -------------------------------------------------------------------- updates that are emitted (HyperT5)


def emitting() -> HyperLlama:
    """A hypernetwork whose four gists become updates that do something."""
    generator = torch.Generator().manual_seed(3)
    compression = Compression(prefix=emit, build=add_heads)
    hyper = HyperLlama(random_hyper().model, torch.randn(4, 32, generator=generator), compression=compression)
    compression.build(hyper, generator)
    for p in (hyper.heads.q, hyper.heads.v):
        p.data.normal_(0, 0.3, generator=generator)
    return hyper


CONTEXTS = [with_gists([1, 5, 6, 7], [50, 51, 52, 53]), with_gists([1, 9], [50, 51, 52, 53])]
EXAMPLES = Rows.of(CONTEXTS)
PROMPTS = [[1, 7], [1, 8, 9], [1, 4]]
TARGETS = [[8, 3], [5, 2], [6, 2]]
QUERIES = list(zip(PROMPTS, TARGETS))
BATCH = collate([Sample(CONTEXTS[:1], QUERIES[:1]), Sample(CONTEXTS[1:], QUERIES[1:])])


def test_emitted_updates_are_those_of_merged_matrices_row_by_row():
    hyper = emitting()
    emitted = emit(hyper, [EXAMPLES])
    together = hyper.model(X.expand(2, -1), **emitted.as_past(X.shape[1]))[0]
    assert emitted.offset.tolist() == [0, 0] and emitted.as_past(1)["past"] is None
    assert {(A.shape[1], B.shape[2]) for A, B in emitted.updates.values()} == {(2, 2)}, "of rank G / 2"
    updated = {path for path in linears(hyper.model) if path.endswith(("q_proj", "v_proj"))}
    assert emitted.updates.keys() == updated
    for row in range(2):
        merged = random_hyper().model
        for path, (A, B) in emitted.updates.items():
            linears(merged)[path].weight.data += B[row] @ A[row]
        torch.testing.assert_close(together[row], merged(X)[0][0], atol=1e-4, rtol=1e-4)
        chosen = emitted[torch.tensor([row])]
        alone = hyper.model(X, **chosen.as_past(X.shape[1]))[0][0]
        torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_an_emitted_update_is_the_mean_over_its_gists():
    hyper = emitting()
    gists = hyper.compress(EXAMPLES)
    # Of each half (for q_proj and for v_proj), every gist twice.
    twice = [tuple(x.repeat_interleave(2, dim=2) for x in layer) for layer in gists.past]
    once, same = hyper.heads(gists.past), hyper.heads(twice)
    for path, (A, B) in once.items():
        more_A, more_B = same[path]
        torch.testing.assert_close(more_B @ more_A, B @ A)
        assert (B @ A).abs().max() > 0.01


def test_emitted_updates_answer_alike_in_training_ranking_and_writing():
    hyper = emitting()
    logits, emitted = hyper(BATCH)
    losses = F.cross_entropy(logits, BATCH.targets, reduction="none").view(3, 2).sum(1)
    prefix = emitted[BATCH.row]
    scores = score_choices(hyper.model, PROMPTS, [[target] for target in TARGETS], prefix)
    torch.testing.assert_close(-torch.tensor(scores)[:, 0], losses, atol=1e-4, rtol=1e-4)
    (written,) = generate(hyper.model, PROMPTS[:1], 3, -1, **prefix[torch.tensor([0])].as_past(2))
    assert len(written) == 3
    row = list(PROMPTS[0])
    for token in written:
        before = prefix[torch.tensor([0])].as_past(len(row))
        assert hyper.model(torch.tensor([row]), **before)[0][0, -1].argmax() == token
        row.append(token)


def test_heads_emit_nothing_before_training_and_learn_with_the_rest():
    hyper = emitting()
    add_heads(hyper, torch.Generator().manual_seed(1))
    logits = hyper.model(X.expand(2, -1), **emit(hyper, [EXAMPLES]).as_past(X.shape[1]))[0]
    torch.testing.assert_close(logits, hyper.model(X.expand(2, -1))[0], atol=0, rtol=0)
    hyper = emitting()
    hyper(BATCH)[0].sum().backward()
    parameters = (hyper.gists, *hyper.heads.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("gists", [4, 64])
def test_heads_of_trained_size_move_logits_by_a_few_units_whatever_the_scale_of_keys(scale, gists):
    """And however many gists: trained keys are far larger than values, and of another size in each layer."""
    generator = torch.Generator().manual_seed(0)
    model = random_llama()
    heads = Heads(model, generator)
    for p in (heads.q, heads.v):
        p.data.normal_(0, 0.01, generator=generator)
    shape = (1, model.config.kv_heads, gists, model.config.head_size)
    past = []
    for layer in range(model.config.layers):
        k, v = torch.randn(2, *shape, generator=generator)
        past.append((scale * (layer + 1) * k, v))
    adapter = {"emitted": heads(past)}
    moved = (model(X, adapter=adapter)[0] - model(X)[0]).abs().max()
    assert 1e-3 < moved < 3


# --------------------------------------------------------------------------------------- NF4, files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_dequantize_and_matmul(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    linear = NF4Linear(128, 64)
    linear.load_weight(weight, "cpu", dtype)
    assert linear.weight.numel() == weight.numel() // 2, "two numbers to a byte"
    assert linear.state.nested, "double quantization"
    plain = functional.dequantize_4bit(linear.weight, linear.state).to(dtype)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.05}
    x = torch.randn(3, 5, 128, generator=generator).to(dtype).requires_grad_()
    ours, theirs = linear(x, {}), F.linear(x, plain)
    torch.testing.assert_close(ours, theirs, **tolerance)
    with torch.no_grad():  # as in evaluation
        torch.testing.assert_close(linear(x, {}), theirs, **tolerance)
    if dtype == torch.float32:
        gradients = (torch.autograd.grad(y.square().sum(), x) for y in (ours, theirs))
        torch.testing.assert_close(*gradients, atol=1e-2, rtol=0.05)


def test_quantized_loading_quantizes_the_matrices_of_layers_alone(tmp_path):
    dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
    folder = write_hf(tmp_path, random_llama())
    model = load(folder, linear=NF4Linear)
    plain = load(folder)
    assert model.checksum == plain.checksum, "adapters belong to a base, whatever it is held in"
    for name, p in model.named_parameters():
        in_layer = name.startswith("layers.") and "norm" not in name
        assert p.dtype == (torch.uint8 if in_layer else torch.float32), name
        assert not p.requires_grad
    for path, linear in linears(model).items():
        weight = dequantize_4bit(linear.weight, linear.state)
        plain.get_submodule(path).load_weight(weight, "cpu", torch.float32)
    torch.testing.assert_close(model(X)[0], plain(X)[0], atol=1e-4, rtol=1e-4)


def test_adapters_of_another_model_are_refused(tmp_path):
    path = tmp_path / "adapters.safetensors"
    parameters = trainable(random_hyper())
    save_file({name: p.detach().clone() for name, p in parameters.items()}, path)
    assign(parameters, load_tensors(path)[0], path)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for damage, message in (
        ({"gists": torch.zeros(3, 8)}, "made for another"),
        ({"more": torch.zeros(1)}, "more"),
        ({"gists": torch.zeros(3, 32, dtype=torch.int64)}, "int64"),
        ({"gists": torch.full((3, 32), torch.nan)}, "NaN"),
    ):
        with pytest.raises(InputError, match=message):
            assign(parameters, load_tensors(path)[0] | damage, path)
        assert all(torch.equal(p, before[name]) for name, p in parameters.items()), "nothing is half assigned"
