"""The language model: reading with a past, offsets, generation, loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, hf_tensors, random_llama, write_hf, write_meta
from safetensors.torch import save_file

from llama import InputError, Llama, Tokenizer, generate, int_tensor, load, read_config

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_reading_in_pieces_equals_reading_at_once(kv_heads):
    model = random_llama(kv_heads)
    x = tokens(2, 12)
    logits, present = model(x)
    first, past = model(x[:, :5])
    second, past = model(x[:, 5:], past=past, offset=int_tensor([5, 5]))
    torch.testing.assert_close(torch.cat((first, second), 1), logits, **TOLERANCE)
    torch.testing.assert_close(past, present, **TOLERANCE)


def test_a_past_without_offset_is_refused():
    model = random_llama()
    x = tokens(1, 6)
    _, past = model(x)
    with pytest.raises(ValueError, match="offset"):
        model(x, past=past)
    with pytest.raises(ValueError, match="offset"):
        generate(model, x.tolist(), 3, eos=2, past=past)


# --------------------------------------------------------------------------------------- generation


def greedy_by_recomputing(model, prompt: list[int], end: list[int]) -> list[int]:
    """At most 20 tokens, up to this end; one pass over everything for each."""
    row = []
    for _ in range(20):
        row.append(model(torch.tensor([prompt + row]))[0][0, -1].argmax().item())
        if row[-len(end) :] == end:
            return row[: -len(end)]
    return row


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_generation_in_a_batch_equals_each_row_alone(kv_heads):
    """Each row up to its end: EOS, or the tokens that are named."""
    model = random_llama(kv_heads, seed=3)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (2, 9, 5, 1)]
    free = greedy_by_recomputing(model, prompts[1], [-1])
    for end, how in ((free[7:8], {"eos": free[7]}), (free[4:6], {"eos": -1, "until": free[4:6]})):
        expected = [greedy_by_recomputing(model, prompt, end) for prompt in prompts]
        assert len(expected[1]) <= 7 < len(expected[0])
        assert generate(model, prompts, 20, **how) == expected
        assert [generate(model, [prompt], 20, **how)[0] for prompt in prompts] == expected


def test_generating_no_tokens_gives_empty_rows():
    assert generate(random_llama(), [[1, 2]], 0, eos=2) == [[]]


# ------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("shards", [1, 2])
def test_meta_and_hugging_face_folders_load_the_same_model(tmp_path, shards, kv_heads):
    model = random_llama(kv_heads)
    x = tokens(2, 9)
    from_hf = load(write_hf(tmp_path / "hf", model))
    from_meta = load(write_meta(tmp_path / "meta", model, shards))
    assert from_meta.config.hidden == from_hf.config.hidden == 40
    torch.testing.assert_close(from_hf(x)[0], model(x)[0], atol=0, rtol=0)
    torch.testing.assert_close(from_meta(x)[0], model(x)[0], atol=0, rtol=0)


def split_files(folder: Path, model: Llama, count: int) -> dict:
    """Divide the weights of a Hugging Face folder among several files. Returns their index."""
    (folder / "model.safetensors").unlink()
    tensors = list(hf_tensors(model).items())
    files = {f"model-{i}.safetensors": dict(tensors[i::count]) for i in range(count)}
    for name, part in files.items():
        save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in files.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_sharded_hugging_face_folder_loads_whole(tmp_path):
    model = random_llama()
    x = tokens(1, 5)
    folder = write_hf(tmp_path, model)
    index = split_files(folder, model, 3)
    torch.testing.assert_close(load(folder)(x)[0], model(x)[0], atol=0, rtol=0)
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=f"{folder}/elsewhere.safetensors: .*No such file"):
        load(folder)


def test_equal_weights_have_one_checksum_in_every_format_and_division_into_files(tmp_path):
    deep = random_llama(layers=11)  # in the order of names: 0, 1, 10, 2, …
    shutil.copy(ROOT / "tiny" / "llama" / "tokenizer.model", tmp_path)  # beside all folders
    folders = [write_hf(tmp_path / "hf", deep), write_hf(tmp_path / "hf-3", deep)]
    split_files(folders[1], deep, 3)
    folders += [write_meta(tmp_path / f"meta-{shards}", deep, shards) for shards in (1, 2)]
    folders.append(write_hf(tmp_path / "bf16", deep))
    half = {name: tensor.bfloat16() for name, tensor in hf_tensors(deep).items()}
    save_file(half, folders[-1] / "model.safetensors")
    checksums = {load(folder).checksum for folder in folders}
    checksums.add(load(folders[0], dtype=torch.bfloat16).checksum)  # nor does it matter what they are held in
    assert len(checksums) == 1 and checksums != {""}


def test_swapped_weights_another_tokenizer_or_rotation_have_another_checksum(tmp_path):
    """That every tensor counts is said in test_equivalence.py."""
    deep = random_llama(layers=11)
    folder = write_hf(tmp_path / "hf", deep)
    good = hf_tensors(deep)
    checksums = [load(folder).checksum]
    swapped = ["model.norm.weight", "model.layers.3.input_layernorm.weight"]
    others = dict(zip(swapped, (good[name] for name in reversed(swapped))))
    save_file(good | others, folder / "model.safetensors")
    checksums.append(load(folder).checksum)
    # (matrices of equal shapes)
    other_heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    for change in ({"rope_theta": 5000.0}, {"rms_norm_eps": 1e-6}, other_heads):
        checksums.append(load(write_hf(folder, deep, **change)).checksum)
    write_hf(folder, deep)
    tokenizer = (ROOT / "tiny" / "llama" / "tokenizer.model").read_bytes()
    for words in (tokenizer, tokenizer.replace("▁kilo".encode(), "▁liko".encode())):
        (folder / "tokenizer.model").write_bytes(words)
        checksums.append(load(folder).checksum)
    assert len(set(checksums)) == len(checksums)


@pytest.mark.parametrize("change, message", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": -8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 64}}, "factor = -8.0 is not a positive number"),
    ({"model_type": "mistral"}, "model_type"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "32"}, "not a Llama checkpoint's configuration .*'str'"),
    ({"vocab_size": "50"}, "vocab = '50' is not a positive number"),
    ({"num_hidden_layers": 0}, "layers = 0 is not a positive number"),
    ({"rms_norm_eps": 1e400}, "norm_eps = inf is not a positive number"),
    ({"num_key_value_heads": 3}, "4 heads of 8, 3 KV heads: don't fit"),
    ({"head_dim": 7}, "4 heads of 7, 2 KV heads: don't fit"),
])  # fmt: skip
def test_a_config_that_is_not_implemented_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        load(write_hf(tmp_path, random_llama(), **change))


def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path):
    model = random_llama()
    folder = write_hf(tmp_path, model)
    good = hf_tensors(model)
    for change, message in (
        ({"lm_head.weight": None}, "1 tensors are missing, the first is lm_head.weight"),
        ({"model.extra": torch.zeros(1)}, r"extra is torch.float32 \[1\], which its config doesn't ask for"),
        ({"lm_head.weight": torch.zeros(2, 2)}, r"lm_head.weight is torch.float32 \[2, 2\]"),
        ({"lm_head.weight": torch.zeros(50, 32, dtype=torch.int8)}, "lm_head.weight is torch.int8"),
    ):
        bad = {name: tensor for name, tensor in (good | change).items() if tensor is not None}
        save_file(bad, folder / "model.safetensors")
        with pytest.raises(InputError, match=f"{folder}: {message}"):
            load(folder)
    save_file(good, folder / "model.safetensors")
    save_file(good, folder / "model-2.safetensors")
    with pytest.raises(InputError, match="not twice"):
        load(folder)
    (folder / "model-2.safetensors").unlink()
    for change in ({"num_key_value_heads": 4}, {"hidden_size": 40}):
        write_hf(folder, model, **change)
        with pytest.raises(InputError, match="which its config doesn't ask for"):
            load(folder)
    write_hf(folder, model, num_hidden_layers=3.0)
    with pytest.raises(InputError, match="can't be loaded .*float"):
        load(folder)


def test_a_pth_file_cannot_run_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("a .pth file ran code",))

    folder = write_meta(tmp_path / "meta", random_llama(), 1)
    tensors = {"tok_embeddings.weight": Evil(), "tensor": torch.zeros(1 << 12)}
    torch.save(tensors, folder / "consolidated.00.pth")
    with pytest.raises(InputError, match="consolidated.00.pth: not a checkpoint of tensors"):
        load(folder)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("size, parameters", [
    ({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256}, 6_738_415_616),
    ({"dim": 5120, "n_layers": 40, "n_heads": 40, "multiple_of": 256}, 13_015_864_320),
    ({"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096}
     | {"ffn_dim_multiplier": 1.3}, 68_976_648_192),
], ids=["7B", "13B", "70B"])  # fmt: skip
def test_llama_2_has_its_published_number_of_parameters_and_positions(tmp_path, size, parameters):
    (tmp_path / "params.json").write_text(json.dumps(size | {"norm_eps": 1e-5, "vocab_size": 32000}))
    config = read_config(tmp_path)
    assert config.max_positions == 4096
    with torch.device("meta"):
        model = Llama(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


# ------------------------------------------------------------------ against transformers; tokenizer


@pytest.mark.parametrize("name", ["llama", "llama-c"])
def test_the_tiny_checkpoint_opens_in_transformers(name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(ROOT / "tiny" / name, dtype=torch.float32).eval()
    x = tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(load(ROOT / "tiny" / name)(x)[0], theirs(x).logits, atol=1e-4, rtol=1e-4)


def test_no_token_depends_on_what_follows_it():
    tokenizer = Tokenizer(ROOT / "tiny" / "llama")
    text = "\nInput:\nThe red fox waits. \nOutput:\nkilo\nInput:\n zebra é\nOutput:\n"
    pieces = ["\nInput:\n", "The red fox waits. ", "\nOutput:\n", "kilo", "\nInput:\n", " zebra é"]
    pieces.append("\nOutput:\n")
    assert sum((tokenizer.encode(piece) for piece in pieces), []) == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_missing_or_wrong_tokenizer_is_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    with pytest.raises(InputError, match="no tokenizer.model"):
        Tokenizer(tmp_path / "deep")
    (tmp_path / "tokenizer.model").write_text("not a model")
    with pytest.raises(InputError, match="not a tokenizer of Llama.s kind"):
        Tokenizer(tmp_path / "deep")
