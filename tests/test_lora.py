"""LoRA sets, NF4, files of tensors."""

import pytest
import torch
import torch.nn.functional as F
from conftest import random_hyper, random_llama, write_hf
from safetensors.torch import save_file

from data import collate
from eval import score_options
from gist import HyperLlama
from llama import InputError, generate, load
from lora import Heads, NF4Linear, add_lora, assign, linears, load_tensors, save_tensors

X = torch.tensor([[1, 5, 9, 20, 30, 4]])


def with_sets(*names: str):
    model, generator = random_llama(), torch.Generator().manual_seed(1)
    for name in names:
        add_lora(model, name, rank=4, alpha=8, generator=generator)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data.normal_(0, 0.3, generator=generator)
    return model


def test_adapter_off_is_the_base_bit_for_bit():
    assert torch.equal(with_sets("a", "b")(X)[0], random_llama()(X)[0])


def test_a_new_set_changes_nothing_before_training():
    model = random_llama()
    add_lora(model, "a", rank=4, alpha=8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(X, adapter="a")[0], random_llama()(X)[0], atol=0, rtol=0)


def test_lora_equals_the_merged_matrix():
    model = with_sets("a")
    through_set = model(X, adapter="a")[0]
    for module in model.modules():
        if hasattr(module, "lora"):
            lora = module.lora["a"]
            module.weight.data += 8 / 4 * lora.B.data @ lora.A.data
    torch.testing.assert_close(through_set, model(X)[0], atol=1e-4, rtol=1e-4)


def test_sets_do_not_act_on_each_other():
    model = with_sets("a", "b")
    gate = torch.ones(1, X.shape[1], 1)
    torch.testing.assert_close(model(X, adapter={"b": gate, "a": 0 * gate})[0], model(X, adapter="b")[0])
    assert (model(X, adapter="a")[0] - model(X, adapter="b")[0]).abs().max() > 1e-2


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match="no LoRA set"):
        with_sets("a")(X, adapter="hyper")


@pytest.mark.parametrize("answerer", [None, "downstream", "hyper"])
def test_every_trainable_tensor_gets_a_gradient(answerer):
    """Within two steps: in the first, A has none because B is zero."""
    hyper = random_hyper(answerer)
    for name, p in hyper.named_parameters():
        if name.endswith(".B"):
            p.data.zero_()
    trainable = {name: p for name, p in hyper.named_parameters() if p.requires_grad}
    optimizer, moved = torch.optim.SGD(trainable.values(), 0.1), set()
    for _ in range(2):
        gists = hyper.compress(torch.tensor([[1, 7, 8, 9, 50, 51, 52]]))
        logits, _ = hyper.model(X, past=gists.past, offset=gists.offset, adapter=hyper.answerer)
        F.cross_entropy(logits[0], X[0]).backward()
        moved |= {name for name, p in trainable.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert moved == trainable.keys()


# ---------------------------------------------------------------------------------------------- NF4


def emitting() -> HyperLlama:
    """A hypernetwork whose four gists become updates that do something."""
    generator, hyper = torch.Generator().manual_seed(3), random_hyper()
    hyper.gists = torch.nn.Parameter(torch.randn(4, 32, generator=generator))
    hyper.heads = Heads(hyper.model, generator)
    for p in (hyper.heads.q, hyper.heads.v):
        p.data.normal_(0, 0.3, generator=generator)
    return hyper


EXAMPLES = torch.tensor([[1, 5, 6, 7, 50, 51, 52, 53], [1, 9, 50, 51, 52, 53, 0, 0]])


def test_emitted_updates_are_those_of_merged_matrices_row_by_row():
    hyper = emitting()
    gists = hyper.compress(EXAMPLES)
    together = hyper.model(X.expand(2, -1), **gists.before(X.shape[1]))[0]
    assert gists.offset.tolist() == [0, 0] and gists.past[0][0].shape[2] == 0
    for row in range(2):
        merged = random_hyper().model
        for path, linear in linears(merged).items():
            if path in gists.updates:
                A, B = gists.updates[path]
                linear.weight.data += B[row] @ A[row]
        torch.testing.assert_close(together[row], merged(X)[0][0], atol=1e-4, rtol=1e-4)
        chosen = gists[torch.tensor([row])]
        torch.testing.assert_close(hyper.model(X, **chosen.before(X.shape[1]))[0][0], together[row], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_emitted_updates_answer_alike_in_training_ranking_and_writing():
    hyper = emitting()
    batch = collate(EXAMPLES.tolist(), [0, 1, 1], [[1, 7], [1, 8, 9], [1, 4]], [[8, 3], [5, 2], [6, 2]])
    gists, rows = hyper.compress(EXAMPLES), batch.row
    expected = [F.cross_entropy(part, target, reduction="sum").item() for part, target in zip(hyper(batch).split(2), batch.targets.split(2))]
    scores = score_options(hyper.model, [[1, 7], [1, 8, 9], [1, 4]], [[[8, 3]], [[5, 2]], [[6, 2]]], gists[rows])
    torch.testing.assert_close([-score for (score,) in scores], expected, atol=1e-4, rtol=1e-4)
    written = generate(hyper.model, [[1, 7]], 3, -1, past=gists[rows[:1]].past, offset=gists.offset[:1], adapter=gists[rows[:1]].acting(None))[0]
    again = [1, 7]
    for token in written:
        assert hyper.model(torch.tensor([again]), **gists[rows[:1]].before(len(again)))[0][0, -1].argmax() == token
        again.append(token)


def test_heads_emit_nothing_before_training_and_learn_with_the_rest():
    hyper = emitting()
    hyper.heads = Heads(hyper.model, torch.Generator().manual_seed(1))
    torch.testing.assert_close(hyper.model(X.expand(2, -1), **hyper.compress(EXAMPLES).before(6))[0][0], hyper.model(X.expand(2, -1))[0][0], atol=0, rtol=0)
    hyper = emitting()
    hyper(collate(EXAMPLES.tolist(), [0, 1], [[1, 7], [1, 8]], [[8, 3], [5, 2]])).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (hyper.gists, *hyper.heads.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_dequantize_and_matmul(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    linear, weight = NF4Linear(128, 64), torch.randn(64, 128, generator=generator)
    linear.place(weight, "cpu", dtype)
    assert linear.weight.numel() == weight.numel() // 2, "two numbers to a byte"
    assert linear.state.nested, "double quantization"
    plain = functional.dequantize_4bit(linear.weight, linear.state).to(dtype)
    assert 0.02 < (plain.float() - weight).norm() / weight.norm() < 0.12
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.05}
    for training in (True, False, True):
        linear.train(training)
        x = torch.randn(3, 5, 128, generator=generator).to(dtype).requires_grad_()
        y = linear(x, {})
        y.float().square().sum().backward()
        x2 = x.detach().clone().requires_grad_()
        y2 = F.linear(x2, plain)
        y2.float().square().sum().backward()
        torch.testing.assert_close(y, y2, **tolerance)
        torch.testing.assert_close(x.grad, x2.grad, atol=1e-2 if dtype == torch.float32 else 30.0, rtol=0.05)
        with torch.no_grad():
            torch.testing.assert_close(linear(x, {}), y2, **tolerance)


def test_quantized_loading_quantizes_the_matrices_of_layers_alone(tmp_path):
    dequantize_4bit = pytest.importorskip("bitsandbytes.functional").dequantize_4bit
    folder = write_hf(tmp_path, random_llama())
    model, plain = load(folder, linear=NF4Linear), load(folder)
    for name, p in model.named_parameters():
        in_layer = name.startswith("layers.") and "norm" not in name
        assert p.dtype == (torch.uint8 if in_layer else torch.float32), name
        assert not p.requires_grad
    for path, linear in linears(model).items():
        whole = dequantize_4bit(linear.weight, linear.state)
        plain.get_submodule(path).place(whole, "cpu", torch.float32)
    torch.testing.assert_close(model(X)[0], plain(X)[0], atol=1e-4, rtol=1e-4)


def test_nf4_can_be_trained_through(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = load(write_hf(tmp_path, random_llama()), linear=NF4Linear)
    add_lora(model, "a", rank=4, alpha=8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.eval()(X, adapter="a")  # this must not change what comes after
    model.train()(X, adapter="a")[0].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if name.endswith(".B")}
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())


# -------------------------------------------------------------------------------------------- files


def test_saving_and_loading_lose_nothing(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(5)}
    save_tensors(tmp_path / "x.safetensors", tensors, {"step": "7"})
    loaded, about = load_tensors(tmp_path / "x.safetensors")
    assert about == {"step": "7"} and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)}, {})
    monkeypatch.setattr("lora.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="No space left"):
        save_tensors(path, {"a": torch.zeros(2)}, {})
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_adapters_of_another_model_are_refused(tmp_path):
    path = tmp_path / "adapters.safetensors"
    parameters = {name: p for name, p in random_hyper().named_parameters() if p.requires_grad}
    save_file({name: p.detach().clone() for name, p in parameters.items()}, path)
    assign(parameters, load_tensors(path)[0], path)
    for damage, message in (({"gists": torch.zeros(3, 8)}, "made for another"), ({"more": torch.zeros(1)}, "more")):
        with pytest.raises(InputError, match=message):
            assign(parameters, load_tensors(path)[0] | damage, path)
