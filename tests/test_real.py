"""Today's small Llamas: tied embeddings, tokenizer.json, Llama-3's frequencies; a real one, if it is at hand.

HYPERLLAMA_REAL names the Hugging Face folder of a small Llama that reads English, for instance SmolLM2-135M.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REAL_DATA, ROOT, SCORED, SHORT, needs_real_data, random_hyper, random_llama, refusal, run
from conftest import train, write_hf
from safetensors.torch import load_file, save_file

from gist import HyperLlama, Rows, with_gists
from llama import InputError, Llama, RopeScaling, Tokenizer, generate, load
from lora import NF4Linear, add_lora
from tools import export

REAL = Path(os.environ.get("HYPERLLAMA_REAL", "/nowhere"))
needs_real_model = pytest.mark.skipif(not REAL.is_dir(), reason="HYPERLLAMA_REAL names no folder of a model")
SCALING = RopeScaling(32.0, 1.0, 4.0, 64)


def write_32(folder: Path, **changes) -> Path:
    """A random model of Llama-3.2's kind."""
    scaling = {"rope_type": "llama3"} | SCALING._asdict()
    write_hf(folder, random_llama(), tie_word_embeddings=True, rope_scaling=scaling, **changes)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def json_tokenizer(tmp_path_factory) -> Path:
    """A folder with a byte-level tokenizer.json, as Llama-3's and SmolLM's are."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["\nInput:\nThe fox is old.\nOutput:\nkilo"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def test_logits_with_scaled_frequencies_and_tied_embeddings_equal_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_32(tmp_path / "small")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(0, 50, (2, 200), generator=torch.Generator().manual_seed(0))
    ours = load(folder)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        plain = Llama(replace(ours.config, rope_scaling=None))
        plain.load_state_dict(ours.state_dict())
        assert (plain(tokens)[0] - ours(tokens)[0]).abs().max() > 0.1, "scaling matters here"


def test_two_passes_equal_the_joint_pass_with_scaled_frequencies():
    """Frequencies change, and scores still depend on differences of positions alone."""
    hyper = random_hyper("downstream")
    hyper.model.config = replace(hyper.model.config, rope_scaling=SCALING)
    examples = [1, *range(5, 40)]
    query = [1, 30, 31, 32]
    row = torch.tensor([examples + hyper.gist_ids + query])
    gists = hyper.compress(Rows.of([with_gists(examples, hyper.gist_ids)]))
    two, _ = hyper.model(torch.tensor([query]), **gists.as_past(4, "downstream"))
    torch.testing.assert_close(two[0], hyper.joint(row)[0, -4:], atol=1e-5, rtol=1e-5)


def test_tied_embeddings_are_one_parameter_loaded_with_or_without_a_copy_and_never_quantized(tmp_path):
    folder = write_32(tmp_path / "small")
    model = load(folder)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head + 1}, folder / "model.safetensors")
    with pytest.raises(InputError, match="ties lm_head to the embedding, and its lm_head.weight is another"):
        load(folder)
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
    assert load(folder).checksum == model.checksum
    pytest.importorskip("bitsandbytes")
    model = load(folder, linear=NF4Linear)
    assert model.lm_head.weight is model.embed_tokens.weight and model.lm_head.weight.is_floating_point()


def test_a_tied_model_is_hyperpretrained_saved_and_used(tmp_path, json_tokenizer):
    """Every command on a model of Llama-3.2's kind with a tokenizer.json."""
    folder = write_32(tmp_path / "small", vocab_size=400)
    weights = load_file(folder / "model.safetensors")
    rows = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    save_file(weights | {"model.embed_tokens.weight": rows}, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((json_tokenizer / name).read_text())
    lengths, out = "--context 120 --query-length 100 --gists 4 --limit 2", tmp_path / "c"
    start = ["--task hyperpretrain --steps 2 --save-every 1 --batch-size 2 --measure 0 --optimizer adamw"]
    run(*start, lengths, "--model", folder, "--out", out)
    saved, written = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    assert "lm_head.weight" not in saved and written["tie_word_embeddings"]
    assert written["rope_scaling"]["factor"] == SCALING.factor
    assert "model.lm_head.weight" not in load_file(out / "state.safetensors")
    (out / "results.json").unlink()
    run("--resume --out", out)
    for name, more in (("gists", ""), ("anchors", "--anchors"), ("nf4", "--quantize")):
        run("--task p3", SHORT, lengths, "--steps 1 --model", out, more, "--out", tmp_path / name)
        run(tmp_path / name, SCORED, program="eval")
        assert ("gists" in load_file(tmp_path / name / "adapters.safetensors")) == (name != "anchors")


# ------------------------------------------------------------------------------------------ tokenizer.json


def test_pieces_of_a_layout_are_the_tokens_of_the_whole_text(json_tokenizer):
    tokenizer = Tokenizer(json_tokenizer)
    pieces = ["\nInput:\nThe fox is old.\nOutput:\nkilo", "\nInput:\nIs it 12?\nOutput:\nno", "\nInput:\n"]
    assert sum(map(tokenizer.encode, pieces), []) == tokenizer.encode("".join(pieces))
    assert tokenizer.decode(tokenizer.encode("".join(pieces))) == "".join(pieces)
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.json", "{", "not a tokenizer"),
    ("tokenizer.json", "{}", "not a tokenizer"),
    ("tokenizer_config.json", '{"eos_token": "</s>"}', "no BOS or no EOS"),
    ("tokenizer_config.json", '{"bos_token": "<other>", "eos_token": "</s>"}', "no BOS"),
    ("tokenizer_config.json", None, "tokenizer_config.json|No such file"),
])  # fmt: skip
def test_a_tokenizer_that_does_not_fit_is_one_line(tmp_path, json_tokenizer, name, content, message):
    folder = shutil.copytree(json_tokenizer, tmp_path / "model")
    (folder / name).unlink()
    if content:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match=message) as problem:
        Tokenizer(folder)
    assert "\n" not in str(problem.value) and str(folder) in str(problem.value)


def test_a_folders_own_tokenizer_comes_before_one_beside_it(tmp_path, json_tokenizer):
    shutil.copyfile(
        ROOT / "tiny" / "llama" / "tokenizer.model", tmp_path / "tokenizer.model"
    )  # as Meta ships it
    shutil.copytree(json_tokenizer, tmp_path / "model")
    (tmp_path / "7B").mkdir()
    assert Tokenizer(tmp_path / "model").path.name == "tokenizer.json"
    assert Tokenizer(tmp_path / "7B").path == tmp_path / "tokenizer.model"


def test_without_the_package_a_tokenizer_json_is_refused_in_a_line(json_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="needs the package tokenizers"):
        Tokenizer(json_tokenizer)


# ---------------------------------------------------------------------- a real model, a prefix in peft


@pytest.fixture(scope="module")
def real():
    return load(REAL), Tokenizer(REAL)


TEXT = "The capital of France is Paris, and the capital of Italy is"


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)


@needs_real_model
def test_a_real_model_has_the_logits_and_the_text_of_transformers(real, theirs):
    model, tokenizer = real
    ids = [tokenizer.bos, *tokenizer.encode(TEXT)]
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits
        torch.testing.assert_close(model(torch.tensor([ids]))[0], logits, atol=1e-3, rtol=0)
    assert logits.abs().max() < 40
    new = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert generate(model, [ids], 12, tokenizer.eos)[0] == [t for t in new if t != tokenizer.eos]


@needs_real_model
def test_nf4_of_a_real_model_is_that_of_bitsandbytes_in_transformers(real):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = transformers.BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.float32)
    their = transformers.AutoModelForCausalLM.from_pretrained(
        REAL, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    their.train()  # in eval mode it would repack its weights, on some CPUs, for products in bfloat16
    tokenizer = real[1]
    ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(TEXT)]])
    with torch.no_grad():
        ours = load(REAL, linear=NF4Linear)(ids)[0]
        torch.testing.assert_close(ours, their(ids).logits, atol=1e-3, rtol=0)
        assert not torch.allclose(ours, real[0](ids)[0], atol=0.1)  # four bits do change them


@needs_real_model
@needs_real_data
def test_a_real_tokenizer_has_the_tokens_of_transformers(real):
    transformers = pytest.importorskip("transformers")
    _, tokenizer = real
    reference = transformers.AutoTokenizer.from_pretrained(REAL)
    paths = sorted((REAL_DATA / "text").glob("*.jsonl"))
    lines = "".join(path.read_text() for path in paths).splitlines()
    texts = [line for text in lines for line in json.loads(text)["text"].splitlines()][:500]
    assert len(texts) == 500
    for text in texts:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("variant", ["", "--anchors"], ids=["gists", "anchors"])
def test_a_saved_prefix_opens_in_peft_with_our_logits(tmp_path, variant):
    peft, transformers = map(pytest.importorskip, ("peft", "transformers"))
    if not hasattr(peft, "CartridgeConfig"):
        pytest.skip("this peft has no CARTRIDGE")
    out, saved, base = tmp_path / "run", tmp_path / "my.safetensors", ROOT / "tiny" / "llama-c"
    train(out, "--steps 2", variant)
    run(out, "--examples", ROOT / "tiny" / "my.jsonl", "--save", saved, program="answer")
    to_peft = [out, "--gists", saved, "--out", tmp_path / "cartridge"]
    run(*to_peft, program="export")
    ids = torch.tensor([[1, *Tokenizer(base).encode("\nInput:\nThe fox is old.\nOutput:\n")]])
    tensors = load_file(saved)
    past = [(tensors[f"{i}.key"], tensors[f"{i}.value"]) for i in range(len(tensors) // 2)]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        ours, _ = load(base)(ids, past=past, offset=tensors["offset"])
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "cartridge")(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs[:, -ids.shape[1] :], atol=1e-4, rtol=1e-4)
    (tmp_path / "cartridge" / "thesis.txt").write_text("precious")
    assert "isn't replaced" in refusal(*to_peft, program="export")


@needs_real_model
def test_two_passes_equal_the_joint_pass_in_a_real_model(real):
    tokenizer, model, generator = real[1], load(REAL), torch.Generator().manual_seed(0)
    add_lora(model, "hyper", 4, 8, generator, keys_values_only=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.normal_(0, 0.02, generator=generator)
    words = model.embed_tokens.weight[torch.randperm(49152, generator=generator)[:16]]
    hyper = HyperLlama(model, words)
    examples = [tokenizer.bos, *tokenizer.encode("\nInput:\nhot\nOutput:\ncold\nInput:\nup\nOutput:\ndown")]
    query = [tokenizer.bos, *tokenizer.encode("\nInput:\nbig\nOutput:\n")]
    with torch.no_grad():
        gists = hyper.compress(Rows.of([with_gists(examples, hyper.gist_ids)]))
        two, _ = model(torch.tensor([query]), **gists.as_past(len(query)))
        joint = hyper.joint(torch.tensor([examples + hyper.gist_ids + query]))[:, -len(query) :]
    torch.testing.assert_close(two, joint, atol=2e-3, rtol=1e-4)


@needs_real_model
def test_a_prefix_of_a_real_model_answers_in_transformers(real, theirs, tmp_path):
    """The README's generate snippet."""
    from transformers import DynamicCache

    model, tokenizer = real
    words = model.embed_tokens.weight[:16]
    hyper = HyperLlama(model, words, None)
    examples = [tokenizer.bos, *tokenizer.encode("\nInput:\nhot\nOutput:\ncold")]
    with torch.no_grad():
        gists = hyper.compress(Rows.of([with_gists(examples, hyper.gist_ids)]))
    export.save_gists(tmp_path / "g.safetensors", gists, {})
    saved = load_file(tmp_path / "g.safetensors")
    cache = DynamicCache()
    for i in range(model.config.layers):
        cache.update(saved[f"{i}.key"], saved[f"{i}.value"], i)
    prompt = [tokenizer.bos, *tokenizer.encode("\nInput:\nbig\nOutput:\n")]
    ids = torch.tensor([[0] * 16 + prompt])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=8, do_sample=False
    )
    new = out[0, ids.shape[1] :].tolist()
    ours = generate(model, [prompt], 8, tokenizer.eos, **gists.as_past(len(prompt)))[0]
    assert ours == [t for t in new if t != tokenizer.eos]
