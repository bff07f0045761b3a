"""Small random models, grouped-query (K < H) unless a test says otherwise, in float32 on the CPU."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]

from gist import HyperLlama  # noqa: E402
from llama import Config, Linear, Llama  # noqa: E402
from lora import add_lora  # noqa: E402

REAL_DATA = ROOT.parent / "shared" / "data"  # real P3, S-NI and text files, where they are at hand
needs_real_data = pytest.mark.skipif(not REAL_DATA.exists(), reason="the real data files are not here")
G = 3  # gists of the small models


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def config(kv_heads: int = 2) -> Config:
    return Config(
        vocab=50, width=32, layers=3, heads=4, kv_heads=kv_heads, head_size=8, hidden=40,
        norm_eps=1e-5, rope_theta=10000.0, max_positions=256,
    )  # fmt: skip


def random_llama(kv_heads: int = 2, seed: int = 0, linear: type[Linear] = Linear) -> Llama:
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config(kv_heads), linear)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 1 if "embed" in name else parameter.shape[1] ** -0.5, generator=generator)
    return model.requires_grad_(False)


def random_hyper(downstream: str | None = None, kv_heads: int = 2, seed: int = 0) -> HyperLlama:
    """A HyperLlama whose LoRA sets do something: B is not zero."""
    generator = torch.Generator().manual_seed(seed + 1)
    model = random_llama(kv_heads, seed)
    for name in {"hyper", downstream} - {None}:
        add_lora(model, name, rank=4, alpha=8, generator=generator, keys_values_only=name != downstream)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.normal_(0, 0.2, generator=generator)
    return HyperLlama(model, torch.randn(G, 32, generator=generator), "hyper", downstream)


def hf_config(c: Config, **changes) -> dict:
    return {
        "model_type": "llama", "hidden_act": "silu", "vocab_size": c.vocab, "hidden_size": c.width,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.hidden, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_positions, "tie_word_embeddings": False,
    } | changes  # fmt: skip


def hf_tensors(model: Llama) -> dict[str, torch.Tensor]:
    return {("" if n.startswith("lm_head") else "model.") + n: p.detach().clone() for n, p in model.named_parameters()}


def write_hf(folder: Path, model: Llama, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model.config, **changes)))
    save_file(hf_tensors(model), folder / "model.safetensors")
    return folder
