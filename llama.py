"""Llama-2 in one file: the model, its loading, its tokenizer, greedy generation.

Three arguments of `Llama.forward` carry everything that gisting asks of a language model:

    past     keys and values that came before: the only way in for a KV cache, a soft prefix and gists.
    offset   per row, the position of the first token that is read now.
    adapter  which LoRA set acts in this call: one set of weights plays two roles (lora.py).

Inside, tensors carry Hugging Face's names (without the leading "model.") and its rotary pairing.
Llama-2, TinyLlama, SmolLM2 and Llama-3.2 fit. Left out: biases, other rope scalings, sampling; a
checkpoint that needs them is refused.

Shapes: B batch, T tokens, P past length, D width, V vocabulary, H heads, K KV heads, hd head size.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

KV = tuple[Tensor, Tensor]  # one layer's keys and values, each [B, K, P, hd]; keys are rotated
Angles = tuple[Tensor, Tensor]  # cosine and sine, each [B, 1, T, hd/2]
Adapter = str | Mapping | None  # the LoRA set that acts; or {set: gate [B, T, 1]}; or None, the bare model


class InputError(Exception):
    """What the user gave us can't be used. The message is one line: what, where, what would be right."""


@contextmanager
def reading(path: str | Path, what: str = "is damaged") -> Iterator[None]:
    """Whatever a library raises on a bad file becomes an InputError: which file, and `what` is wrong."""
    try:
        yield
    except InputError:  # says it already
        raise
    except Exception as problem:  # a damaged file can make a parser raise anything
        reason = getattr(problem, "strerror", None) or str(problem).split("\n")[0] or type(problem).__name__
        if isinstance(problem, UnicodeError):
            reason = "it is not UTF-8"
        text = f"{reason} is missing" if isinstance(problem, KeyError) else f"{what} ({reason})"
        raise InputError(f"{path}: {text}") from None


class RopeScaling(NamedTuple):
    """Llama-3's: rotary frequencies are lowered, the low ones by `factor`, so that longer contexts fit."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Config:
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int  # fewer than heads = grouped-query attention
    head_size: int
    hidden: int  # width of the MLP
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool = False  # lm_head is the embedding table
    rope_scaling: RopeScaling | None = None


def read_config(folder: Path) -> Config:
    """Read Hugging Face's config.json or Meta's params.json. InputError for what we don't implement."""
    path = folder / "config.json"
    if not path.exists() and (folder / "params.json").exists():
        path = folder / "params.json"
    with reading(path, "not a Llama checkpoint's configuration"):
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = _config_from_hf(raw) if path.name == "config.json" else _config_from_meta(raw, folder)
        numbers = vars(config) | (config.rope_scaling._asdict() if config.rope_scaling else {})
        del numbers["tied"], numbers["rope_scaling"]
        for field, value in numbers.items():
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{field} = {value!r} is not a positive number")
        if config.heads % config.kv_heads or config.head_size % 2:
            raise ValueError(
                f"{config.heads} heads of {config.head_size}, {config.kv_heads} KV heads: don't fit"
            )
    return config


_IMPLEMENTED = {  # the values of config.json's fields that this file computes; None: the field is absent
    "model_type": ["llama"],
    "hidden_act": ["silu", None],
    "attention_bias": [False, None],
    "mlp_bias": [False, None],
    "quantization_config": [None],
    "rope_type": ["llama3", "default", None],
}


def _config_from_hf(raw: dict) -> Config:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # newer and older name
    rope_type = rope.get("rope_type", rope.get("type"))
    for field, values in _IMPLEMENTED.items():
        value = rope_type if field == "rope_type" else raw.get(field)
        if value not in values:
            raise ValueError(f"{field} = {value!r} is not implemented")
    width = raw["hidden_size"]
    heads = raw["num_attention_heads"]
    scaling = RopeScaling(*map(rope.__getitem__, RopeScaling._fields)) if rope_type == "llama3" else None
    return Config(
        vocab=raw["vocab_size"],
        width=width,
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_size=raw.get("head_dim") or width // heads,
        hidden=raw["intermediate_size"],
        norm_eps=raw["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
        max_positions=raw.get("max_position_embeddings", 2048),
        tied=bool(raw.get("tie_word_embeddings")),
        rope_scaling=scaling,
    )


def _config_from_meta(raw: dict, folder: Path) -> Config:
    if raw.get("use_scaled_rope"):
        raise ValueError("use_scaled_rope is not implemented")  # by what factor, the file doesn't say
    width = raw["dim"]
    heads = raw["n_heads"]
    hidden = int((raw.get("ffn_dim_multiplier") or 1) * int(8 * width / 3))
    return Config(
        vocab=max(raw.get("vocab_size", -1), 0) or Tokenizer(folder).size,  # Llama-2's params.json says -1
        width=width,
        layers=raw["n_layers"],
        heads=heads,
        kv_heads=raw.get("n_kv_heads") or heads,
        head_size=width // heads,
        hidden=-(-hidden // raw["multiple_of"]) * raw["multiple_of"],  # rounded up
        norm_eps=raw["norm_eps"],
        rope_theta=raw.get("rope_theta", 10000.0),
        max_positions=4096,  # Llama-2's; the file doesn't say
    )


# ------------------------------------------------------------------------------------------ the model


class Linear(nn.Module):
    """y = W x, plus the low-rank adapters that the call asks for (lora.py fills `lora`)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.inputs = inputs
        self.outputs = outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.lora = nn.ModuleDict()

    def load_weight(self, weight: Tensor, device: torch.device | str, dtype: torch.dtype) -> None:
        """Take the weight as read from a file. (NF4Linear quantizes here.)"""
        self.weight = nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False)

    def matmul(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def forward(self, x: Tensor, adapter: Mapping[str, Tensor | None]) -> Tensor:
        y = self.matmul(x)
        for name, gate in adapter.items():
            if name in self.lora:
                y = y + self.lora[name](x, gate)
        return y


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The mean of squares, as |x|²/D: one pass over x, in float32, since bf16 is too coarse for it.
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.shape[-1]
        return self.weight * (x * torch.rsqrt(mean + self.eps)).to(x.dtype)


def positions_of(x: Tensor) -> Tensor:
    """0 … T-1 in each row of x [B, T, …]. [B, T]"""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


def rotary_angles(positions: Tensor, config: Config) -> Angles:
    """Cosine and sine of position × frequency. positions [B, T] -> two [B, 1, T, hd/2], float32."""
    steps = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (steps / config.head_size)
    if config.rope_scaling:
        factor, low, high, length = config.rope_scaling
        # By how often a pair turns over the context that the model was first trained on: fast ones stay (1),
        # slow ones turn `factor` times slower (0).
        turns = length * frequencies / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (share + (1 - share) / factor)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate each pair (x[i], x[i + hd/2]) of every head by its angle. x [B, heads, T, hd].

    The offset identity: with R(m) the rotation at position m, R(m)ᵀ R(n) = R(n - m), so

        score(query at m, key at n) = (R(m) q)ᵀ (R(n) k) = qᵀ R(n - m) k

    depends on n - m alone, and adding the same number to every position changes nothing. But a key
    in `past` was rotated where it was *made*. Tokens that come after it must therefore count on
    from there: that is what `offset` is for.
    """
    cos, sin = angles
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of T queries over S = P + T keys. q [B, H, T, hd]; k, v [B, K, S, hd]; mask [B, T, S]."""
    T = q.shape[2]
    S = k.shape[2]
    if mask is not None:
        mask = mask[:, None]  # the same for all heads
    elif 1 < T < S:  # is_causal=True would align the triangle with the *first* key and hide the past
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    is_causal = mask is None and T > 1  # one token alone sees all
    options = {"is_causal": is_causal, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


class Attention(nn.Module):
    def __init__(self, config: Config, linear: type[Linear]):
        super().__init__()
        self.head_size = config.head_size
        self.q_proj = linear(config.width, config.heads * config.head_size)
        self.k_proj = linear(config.width, config.kv_heads * config.head_size)
        self.v_proj = linear(config.width, config.kv_heads * config.head_size)
        self.o_proj = linear(config.heads * config.head_size, config.width)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)  # [B, T, h*hd] -> [B, h, T, hd]

    def keys_values(self, x: Tensor, angles: Angles, past: KV | None, adapter: Mapping) -> KV:
        """Keys and values of the past followed by those of x: two [B, K, P + T, hd]."""
        k = rotate(self.heads(self.k_proj(x, adapter)), angles)
        v = self.heads(self.v_proj(x, adapter))
        if past is not None:
            k = torch.cat((past[0], k), dim=2)
            v = torch.cat((past[1], v), dim=2)
        return k, v

    def attention(
        self, x: Tensor, angles: Angles, present: KV, mask: Tensor | None, adapter: Mapping
    ) -> Tensor:
        """What the tokens of x see in the keys and values, before o_proj. [B, T, H*hd]"""
        q = rotate(self.heads(self.q_proj(x, adapter)), angles)
        return attend(q, *present, mask).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, config: Config, linear: type[Linear]):
        super().__init__()
        self.gate_proj = linear(config.width, config.hidden)
        self.up_proj = linear(config.width, config.hidden)
        self.down_proj = linear(config.hidden, config.width)

    def forward(self, x: Tensor, adapter: Mapping) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x, adapter)) * self.up_proj(x, adapter), adapter)


class Block(nn.Module):
    def __init__(self, config: Config, linear: type[Linear]):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, linear)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config, linear)

    def forward(self, x, angles, past, mask, adapter, select=...) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [B, T, D] after this layer, its keys and its values. (Flat, as FSDP expects.)

        select: an index into [B, T], where hidden states are wanted (in the last layer, for logits).
        """
        h = self.input_layernorm(x)
        present = self.self_attn.keys_values(h, angles, past, adapter)
        y = self.self_attn.attention(h, angles, present, mask, adapter)
        return self.rest(x[select], y[select], adapter), *present

    def rest(self, x: Tensor, y: Tensor, adapter: Mapping) -> Tensor:
        """The layer after attention: both residual sums."""
        x = x + self.self_attn.o_proj(y, adapter)
        return x + self.mlp(self.post_attention_layernorm(x), adapter)

    # The shortcut for gists, beside the plain forward: work that no one reads is skipped (Llama.keys_values).

    def forward_at(self, x, index, angles, past, mask, adapter) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` where hidden states are wanted at G positions of each row: only these compute queries.

        index: a pair that indexes [B, T] as [B, G]. Returns hidden states [B, G, D], and all keys and values.
        """
        h = self.input_layernorm(x)
        present = self.self_attn.keys_values(h, angles, past, adapter)
        if mask is None:  # causal: position t sees the past and 0 … t
            T = x.shape[1]
            key_positions = torch.arange(T - present[0].shape[2], T, device=x.device)  # -P … T-1
            mask = key_positions <= index[1][..., None]  # [B, G, P + T]
        else:
            mask = mask[index]
        angles = tuple(a[:, 0][index][:, None] for a in angles)
        y = self.self_attn.attention(h[index], angles, present, mask, adapter)
        return self.rest(x[index], y, adapter), *present

    def keys_values(self, x, angles, adapter) -> KV:
        """`forward` where nothing but keys and values is wanted."""
        return self.self_attn.keys_values(self.input_layernorm(x), angles, None, adapter)


class Llama(nn.Module):
    def __init__(self, config: Config, linear: type[Linear] = Linear):
        """`linear` makes the layers' matrices; the embedding and lm_head are never quantized."""
        super().__init__()
        self.config = config
        empty = torch.empty(config.vocab, config.width)  # (nn.Embedding's own start would be thrown away)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config, linear) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.checksum = ""  # of what was loaded
        self.checkpoint_activations = False  # recompute layers in backward: less memory, more work

    def forward(
        self,
        tokens: Tensor,
        *,
        past: Sequence[KV] | None = None,
        offset: Tensor | None = None,
        adapter: Adapter = None,
        mask: Tensor | None = None,
        select: Tensor | None = None,
    ) -> tuple[Tensor, list[KV]]:
        """Read tokens after what came before.

        tokens   [B, T] ids, or [B, T, D] embeddings
        past     keys and values that came before, for each layer two [B, K, P, hd]; needs `offset`
        offset   [B] position of each row's first token (0 when there is no past); or [B, T], of every token
        adapter  name of the LoRA set that acts, or {name: gate [B, T, 1]} to let it act in places
        mask     [B, T, P + T] bool, True = may look; default: causal, and the past is seen whole
        select   [N] the positions whose logits are wanted, as indices into B·T (default: all); no gates

        Returns logits [B, T, V], or [N, V] with `select`; and all keys and values: the `past` of what's next.
        """
        if past is not None and offset is None:
            raise ValueError("a past needs an offset: the position at which the new tokens go on")
        x, positions, adapter = self.inputs(tokens, offset, adapter)
        angles = rotary_angles(positions, self.config)
        present = []
        for i, layer in enumerate(self.layers):
            inputs = [x, angles, past and past[i], mask, adapter]
            if select is not None and layer is self.layers[-1]:  # only the last layer can leave positions out
                inputs.append((select // x.shape[1], select % x.shape[1]))
            x, k, v = self.run_layer(layer, *inputs)
            present.append((k, v))
        return self.lm_head(self.norm(x)), present

    def keys_values(
        self,
        tokens: Tensor,
        kept: Tensor,
        offset: Tensor | None = None,
        adapter: str | None = None,
        past: Sequence[KV] | None = None,
        mask: Tensor | None = None,
    ) -> list[KV]:
        """The keys and values that `forward` would return, at the tokens `kept` [B, G].

        For each layer two [B, K, G, hd]. Of the last layer nothing else is asked, so it reads the kept tokens
        alone; the one before it hands on their hidden states; all others read whole rows, as in `forward`.
        """
        x, positions, adapter = self.inputs(tokens, offset, adapter)
        angles = rotary_angles(positions, self.config)
        index = (torch.arange(len(x), device=x.device)[:, None], kept)  # into [B, T]
        T = x.shape[1]
        *layers, last = self.layers

        def of_kept(y: Tensor) -> Tensor:  # of P + T positions, those kept of the T new ones: [B, K, G, hd]
            return y[:, :, -T:].transpose(1, 2)[index].transpose(1, 2)

        present = []
        for i, layer in enumerate(layers):
            inputs = [angles, past and past[i], mask, adapter]
            if layer is layers[-1]:
                x, *kv = self.run_layer(layer.forward_at, x, index, *inputs)
            else:
                x, *kv = self.run_layer(layer, x, *inputs)
            present.append(tuple(map(of_kept, kv)))
        if not layers:  # (of a single layer)
            x = x[index]
        angles = rotary_angles(positions[index], self.config)
        return [*present, self.run_layer(last.keys_values, x, angles, adapter)]

    def inputs(
        self, tokens: Tensor, offset: Tensor | None, adapter: Adapter
    ) -> tuple[Tensor, Tensor, Mapping]:
        """Embeddings [B, T, D]; positions [B, T]; the LoRA sets that act, with their gates."""
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        if offset is None:
            positions = positions_of(x)
        else:
            positions = offset if offset.dim() == 2 else positions_of(x) + offset[:, None]
        gates = {adapter: None} if isinstance(adapter, str) else dict(adapter or {})
        for name in gates:  # every set has the first layer's values
            if name is not None and name not in self.layers[0].self_attn.v_proj.lora:
                raise ValueError(f"there is no LoRA set {name!r}")
        return x, positions, gates

    def run_layer(self, layer: Callable, *inputs):
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)


# ------------------------------------------------------------------------------------------ loading


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    linear: type[Linear] = Linear,
) -> Llama:
    """Load a Hugging Face or Meta checkpoint, frozen; `linear=NF4Linear` (lora.py) quantizes it.

    Tensors stream, one at a time, into a model on the meta device: the host holds the finished model and
    one tensor. InputError where the files don't hold exactly the tensors that the configuration asks for.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = [path for pattern in ("*.safetensors", "consolidated.*.pth") for path in folder.glob(pattern)]
    size = sum(path.stat().st_size for path in files)
    if config.layers * config.width * config.hidden > size:  # so many layers could fill the memory
        raise InputError(f"{folder}: its config asks for more parameters than {size:,} bytes of weights hold")
    with reading(folder, "can't be loaded"):
        with torch.device("meta"):
            model = Llama(config, linear)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        is_hf = (folder / "config.json").exists()
        tensors = _read_hf(folder) if is_hf else _read_meta(folder, config, shapes)
        missing = dict(shapes)
        samples = {}
        for name, tensor in tqdm(tensors, total=len(shapes), desc="loading", leave=False, delay=1):
            sample = tensor.flatten()[:: max(1, tensor.numel() // 64)]
            samples[name] = sample.bfloat16().float().numpy().tobytes()
            if config.tied and name == "lm_head.weight":
                continue  # some checkpoints hold it all the same
            if tensor.shape != missing.pop(name, None) or not tensor.is_floating_point():
                found = f"{name} is {tensor.dtype} {list(tensor.shape)}"
                raise InputError(f"{folder}: {found}, which its config doesn't ask for (or not twice)")
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, Linear):
                module.load_weight(tensor, device, dtype)
            else:
                setattr(module, leaf, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {next(iter(missing))}")
    if config.tied:
        embedding = samples["embed_tokens.weight"]
        if samples.pop("lm_head.weight", embedding) != embedding:
            text = "its config ties lm_head to the embedding, and its lm_head.weight is another"
            raise InputError(f"{folder}: {text}")
        model.lm_head.weight = model.embed_tokens.weight
    model.checksum = _checksum(config, samples, tokenizer_of(folder))
    return model


def _checksum(config: Config, samples: Mapping[str, bytes], tokenizer: Path | None) -> str:
    """Adapters and prefixes belong to one base, however its files are split and whatever it is held in."""
    digest = hashlib.sha256(tokenizer.read_bytes() if tokenizer else b"")
    for number in (config.heads, config.norm_eps, config.rope_theta, *(config.rope_scaling or ())):
        digest.update(repr(float(number)).encode())  # what the tensors' shapes don't say
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return digest.hexdigest()[:16]


def _read_hf(folder: Path) -> Iterator[tuple[str, Tensor]]:
    paths = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with reading(index, "not a weight index"):
            names = set(json.loads(index.read_text())["weight_map"].values())
            paths = [folder / Path(name).name for name in sorted(names)]  # never outside of the folder
    for path in paths:
        with reading(path, "unreadable weights"):
            for key in safe_open(path, framework="pt").keys():
                if not key.endswith("rotary_emb.inv_freq"):  # a constant that old exports store
                    # Opened anew, each tensor has a memory map of its own, which goes when it is copied.
                    yield key.removeprefix("model."), safe_open(path, framework="pt").get_tensor(key)


_META_NAMES = {  # Meta's name -> Hugging Face's
    "tok_embeddings": "embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}


def _read_meta(
    folder: Path, config: Config, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    shards = []
    for path in sorted(folder.glob("consolidated.*.pth")):
        try:  # weights_only refuses a pickle that would run code
            shards.append(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
        except Exception:  # torch's own message advises to run it
            raise InputError(f"{path}: not a checkpoint of tensors and nothing else") from None
    for key, tensor in shards[0].items():
        name = key
        for theirs, ours in _META_NAMES.items():
            name = name.replace(theirs + ".", ours + ".")
        shape = shapes.get(name, tensor.shape)
        if tensor.shape != shape:  # split along the one axis on which the shards are smaller
            axis = int(tensor.shape[1:] != shape[1:])
            tensor = torch.cat([shard[key] for shard in shards], axis)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # Meta rotates neighbours (2i, 2i+1), Hugging Face halves (i, i + hd/2): re-pair each head's rows.
            heads = tensor.unflatten(0, (-1, config.head_size // 2, 2))  # [h, hd/2, 2, D]
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        if name != "rope.freqs":  # a constant
            yield name, tensor


# ------------------------------------------------------------------------------ tokenizer, generation


def tokenizer_of(folder: Path) -> Path | None:
    """The folder's own tokenizer.model or tokenizer.json; else the one beside it, where Meta ships it."""
    candidates = (
        folder / "tokenizer.model",
        folder / "tokenizer.json",
        folder.absolute().parent / "tokenizer.model",
    )
    return next(filter(Path.is_file, candidates), None)


MOST_KEPT = 2000  # letters of a text whose tokens are kept


class Tokenizer:
    """Llama's SentencePiece model, or a tokenizer.json (needs the package tokenizers).

    Text is encoded as it would be in the middle of a document, after a newline.
    """

    def __init__(self, folder: str | Path):
        self.path = tokenizer_of(Path(folder))
        if self.path is None:
            raise InputError(f"{folder}: no tokenizer.model and no tokenizer.json")
        with reading(self.path, "not a tokenizer of Llama's kind"):
            if self.path.suffix == ".json":
                self._load_json()
            else:
                self._load_sentencepiece()
            self._pieces = lru_cache(1 << 14)(self._encode)  # rows come again: in other draws and columns
            for text in ("\n", "\na", "a\nb", "a \n b\n", "1\n2\n\n"):
                if self.decode(self.encode(text)) != text:
                    raise ValueError("it loses newlines or spaces")
            if self.bos in (None, -1) or self.eos in (None, -1):
                raise ValueError("it has no BOS or no EOS")

    def _load_sentencepiece(self) -> None:
        model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        newline = model.encode("\n")
        self.size = len(model)
        self.bos = model.bos_id()
        self.eos = model.eos_id()
        self.piece = model.id_to_piece  # a space is written as "▁"
        # SentencePiece puts a space before a text. Encoded after a newline, which is cut off, it has none,
        # and encode(a) + encode(b) = encode(a + b) at newlines.
        self._encode = lambda text: model.encode("\n" + text)[len(newline) :]
        self._decode = lambda ids: model.decode(newline + ids)[1:]

    def _load_json(self) -> None:
        with reading(self.path, "needs the package tokenizers"):
            import tokenizers
        model = tokenizers.Tokenizer.from_file(str(self.path))
        special = json.loads((self.path.parent / "tokenizer_config.json").read_text(encoding="utf-8"))

        def token_id(name: str) -> int | None:
            token = special.get(name) or ""
            return model.token_to_id(token["content"] if isinstance(token, dict) else token)

        self.size = model.get_vocab_size()
        self.bos = token_id("bos_token")
        self.eos = token_id("eos_token")
        self.piece = lambda i: (model.id_to_token(i) or "").replace("Ġ", "▁").replace("Ċ", "<0x0A>")
        self._encode = lambda text: model.encode(text, add_special_tokens=False).ids
        self._decode = lambda ids: model.decode(ids, skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids, without BOS and EOS."""
        return list(self._pieces(text) if len(text) < MOST_KEPT else self._encode(text))

    def decode(self, ids: list[int]) -> str:
        return self._decode([i for i in ids if i < self.size])  # a padded vocabulary has more ids


def int_tensor(numbers: Sequence, device: torch.device | str = "cpu") -> Tensor:
    """int64. (NumPy reads lists five times as fast as torch.)"""
    return torch.from_numpy(np.array(numbers, dtype=np.int64)).to(device)


def ragged(rows: Sequence[Sequence[int]], fill: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Right-padded [B, longest]. Causal attention hides what comes after, so no mask is needed."""
    length = max(map(len, rows))
    return int_tensor([[*row, *[fill] * (length - len(row))] for row in rows], device)


def causal_mask_after(past_mask: Tensor, T: int) -> Tensor:
    """The mask for T tokens after a past of which a part is real. past_mask [B, P] bool -> [B, T, P + T]"""
    causal = torch.ones(T, T, dtype=torch.bool, device=past_mask.device).tril()
    return torch.cat((past_mask[:, None].expand(-1, T, -1), causal.expand(len(past_mask), T, T)), dim=2)


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos: int,
    until: Sequence[int] = (),
    *,
    past: Sequence[KV] | None = None,
    offset: Tensor | None = None,
    mask: Tensor | None = None,
    adapter: Adapter = None,
) -> list[list[int]]:
    """Greedy continuation of prompts of unequal length, each as if it were alone.

    A row ends with EOS or with the tokens of `until`; neither is returned.
    past, offset, mask, adapter: as `Llama.forward` takes them for the prompts, right-padded.
    """
    device = model.embed_tokens.weight.device
    tokens = ragged(prompts, device=device)
    B, T = tokens.shape
    lengths = int_tensor([len(prompt) for prompt in prompts], device)
    P = past[0][0].shape[2] if past else 0
    past_mask = torch.ones(B, P, dtype=torch.bool, device=device) if mask is None else mask[:, 0, :P]
    past_mask = torch.cat((past_mask, positions_of(tokens) < lengths[:, None]), dim=1)  # padding isn't real
    position = lengths if offset is None else offset + lengths  # of the first new token
    each_row = torch.arange(B, device=device)
    select = each_row * T + lengths - 1  # the last token of each prompt, which predicts it

    def ending(row: list[int]) -> int:
        """How many tokens at its end are no longer part of the answer; 0 where it goes on."""
        if row[-1:] == [eos]:
            return 1
        return len(until) if row[-len(until) :] == [*until] else 0

    rows: list[list[int]] = [[] for _ in prompts]
    for n in range(max_new_tokens):
        logits, past = model(tokens, past=past, offset=offset, adapter=adapter, mask=mask, select=select)
        highest, new = logits.max(-1)  # [B]
        if not highest.isfinite().all():
            raise InputError("the model's logits aren't finite: it or its adapters hold NaN or inf")
        for row, token in zip(rows, new.tolist()):
            if not ending(row):
                row.append(token)
        if all(map(ending, rows)):
            break
        # From now on, one token a row is read: it sees what is real of the past, and itself.
        past_mask = torch.cat((past_mask, torch.ones_like(past_mask[:, :1])), dim=1)
        tokens = new[:, None]
        mask = past_mask[:, None]  # [B, 1, P + 1]
        offset = position + n
        select = each_row
    return [row[: len(row) - ending(row)] for row in rows]
