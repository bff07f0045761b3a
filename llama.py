"""Llama-2 in one file: the model, its loading, its tokenizer, greedy generation.

Three arguments of `Llama.forward` carry everything that gisting asks of a language model:

    past     keys and values that came before. A KV cache, a soft prefix and a set of gists are
             the same thing, and this is the only way in for all three.
    offset   per row, the position of the first token that is read now.
    adapter  which LoRA set acts in this call: one set of weights plays two roles (lora.py).

Inside, tensors carry Hugging Face's names (without the leading "model.") and its rotary pairing.
Left out: rope scaling, biases, tied embeddings, sampling. A checkpoint that needs one is refused.

Shapes: B batch, T tokens, P past length, D width, V vocabulary, H heads, K KV heads, hd head size.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

Past = Sequence[tuple[Tensor, Tensor]]  # per layer: key, value, each [B, K, P, hd]; keys are rotated
Adapter = str | Mapping[str | None, Tensor] | None  # a set's name, or {name: gate [B, T, 1]}, or the bare model


class InputError(Exception):
    """What the user gave us can't be used. The message is one line: what, where, what would be right."""


# ------------------------------------------------------------------------------------ configuration


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


def read_config(folder: Path) -> Config:
    """Read Hugging Face's config.json or Meta's params.json. InputError for what we don't implement."""
    name = "config.json" if (folder / "config.json").exists() else "params.json"
    try:
        raw = json.loads((folder / name).read_text())
        return _checked(_config_from_hf(raw) if name == "config.json" else _config_from_meta(raw, folder))
    except FileNotFoundError:
        raise InputError(f"{folder}: not a Llama checkpoint (no config.json or params.json)") from None
    except KeyError as missing:
        raise InputError(f"{folder / name}: the field {missing} is missing") from None
    except (OSError, ValueError) as problem:
        raise InputError(f"{folder / name}: {problem}") from None
    except (TypeError, AttributeError, ZeroDivisionError):
        raise InputError(f"{folder / name}: a field has the wrong type") from None
    except InputError as problem:
        raise InputError(f"{folder / name}: {problem}") from None


def _config_from_hf(raw: dict) -> Config:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # newer and older name
    unsupported = {
        "model_type": raw.get("model_type") != "llama",
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "quantization_config": raw.get("quantization_config"),
    }
    for field in filter(unsupported.get, unsupported):
        raise InputError(f"{field} = {raw.get(field)!r} is not implemented")
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
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
    )


def _config_from_meta(raw: dict, folder: Path) -> Config:
    if raw.get("use_scaled_rope"):
        raise InputError("use_scaled_rope is not implemented")
    width, heads, multiple = raw["dim"], raw["n_heads"], raw["multiple_of"]
    hidden = int((raw.get("ffn_dim_multiplier") or 1) * int(8 * width / 3))
    vocab = raw.get("vocab_size", -1)
    return Config(
        vocab=vocab if vocab > 0 else Tokenizer(folder).size,  # Llama-2's params.json says -1
        width=width,
        layers=raw["n_layers"],
        heads=heads,
        kv_heads=raw.get("n_kv_heads") or heads,
        head_size=width // heads,
        hidden=-(-hidden // multiple) * multiple,  # rounded up
        norm_eps=raw["norm_eps"],
        rope_theta=raw.get("rope_theta", 10000.0),
        max_positions=4096,  # Llama-2's; the file doesn't say
    )


def _checked(config: Config) -> Config:
    for field, value in vars(config).items():
        kind = (int, float) if field in ("norm_eps", "rope_theta") else int
        if not isinstance(value, kind) or isinstance(value, bool) or not value > 0:
            raise InputError(f"{field} = {value!r} is not a positive number")
    if config.heads % config.kv_heads or config.head_size % 2:
        raise InputError(f"{config.heads} heads of size {config.head_size} don't fit {config.kv_heads} KV heads")
    return config


# ------------------------------------------------------------------------------------------ the model


LARGE = 1 << 20  # numbers in a matrix: more than a cache holds


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ; x [..., inputs], W [outputs, inputs].

    Generation on a CPU takes a few rows through every matrix, and reading the matrix is all the work. As
    (W xᵀ)ᵀ, four rows at a time, it is read about twice as fast.
    """
    rows, (outputs, inputs) = x.shape[:-1].numel(), weight.shape
    few = 1 < rows <= 8 and outputs >= inputs and weight.numel() >= LARGE and not torch.is_grad_enabled()
    if not few or x.is_cuda or x.dtype != torch.float32:
        return F.linear(x, weight)
    return torch.cat([weight @ part.T for part in x.flatten(0, -2).split(4)], dim=1).T.unflatten(0, x.shape[:-1])


class Linear(nn.Module):
    """y = W x, plus the low-rank adapters that the call asks for (lora.py fills `lora`)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.lora = nn.ModuleDict()

    def place(self, weight: Tensor, device: torch.device | str, dtype: torch.dtype) -> None:
        """Take the weight as read from a file. (NF4Linear quantizes here.)"""
        self.weight = nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False)

    def matmul(self, x: Tensor) -> Tensor:
        return product(x, self.weight)

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


def rotary_angles(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position × frequency. positions [B, T] -> two [B, 1, T, hd/2], float32."""
    steps = torch.arange(0, config.head_size, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (steps / config.head_size)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
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
    """Attention of T queries over S = P + T keys. q [B, H, T, hd]; k, v [B, K, S, hd]."""
    T, S, grouped = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=grouped)
    if T == 1:  # one new token sees all that came before
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    if S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    # is_causal=True aligns the triangle with the *first* key and would hide the past.
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S), enable_gqa=grouped)


class Room:
    """One layer's past with room for more tokens: they are written behind it, where cat would copy it all. No gradient."""

    def __init__(self, k: Tensor, v: Tensor, more: int):
        self.length = k.shape[2]
        self.k, self.v = (F.pad(x, (0, 0, 0, more)) for x in (k, v))  # [B, K, P, hd] -> [B, K, P + more, hd]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start : self.length], self.v[:, :, start : self.length] = k, v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


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

    def keys_values(self, x, angles, past, adapter) -> tuple[Tensor, Tensor]:
        """Keys and values of the past followed by those of x: two [B, K, P + T, hd]."""
        k = rotate(self.heads(self.k_proj(x, adapter)), angles)
        v = self.heads(self.v_proj(x, adapter))
        if isinstance(past, Room):
            return past.append(k, v)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        return k, v

    def forward(self, x, angles, past, mask, adapter) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """[B, T, H*hd], before o_proj; and the keys and values."""
        q = rotate(self.heads(self.q_proj(x, adapter)), angles)
        k, v = self.keys_values(x, angles, past, adapter)
        return attend(q, k, v, mask).transpose(1, 2).flatten(2), (k, v)


def recomputed(function: Callable, *inputs):
    """function(*inputs), of which backward keeps the inputs alone and computes the rest again. The bits are the same."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class MLP(nn.Module):
    def __init__(self, config: Config, linear: type[Linear]):
        super().__init__()
        self.gate_proj = linear(config.width, config.hidden)
        self.up_proj = linear(config.width, config.hidden)
        self.down_proj = linear(config.hidden, config.width)

    def forward(self, x: Tensor, adapter) -> Tensor:
        return self.down_proj(recomputed(swiglu, self.gate_proj(x, adapter), self.up_proj(x, adapter)), adapter)


def narrowed(adapter: Mapping[str, Tensor | None], at) -> dict[str, Tensor | None]:
    """The sets that act, with their gates at some positions only."""
    return {name: None if gate is None else gate[at] for name, gate in adapter.items()}


class Block(nn.Module):
    def __init__(self, config: Config, linear: type[Linear]):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, linear)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config, linear)

    def forward(self, x, angles, past, mask, adapter, at) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """at: an index into [B, T], the positions that are needed behind this layer; None: none is.

        Keys and values are made of every position, all that comes after them only where it is needed.
        """
        h = self.input_layernorm(x)
        if at is None:
            return None, self.self_attn.keys_values(h, angles, past, adapter)
        y, present = self.self_attn(h, angles, past, mask, adapter)
        x, y, adapter = x[at], y[at], narrowed(adapter, at)
        x = x + self.self_attn.o_proj(y, adapter)
        return x + self.mlp(self.post_attention_layernorm(x), adapter), present


class Llama(nn.Module):
    def __init__(self, config: Config, linear: type[Linear] = Linear):
        """`linear` makes the layers' matrices; the embedding and lm_head are never quantized."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.width)
        self.layers = nn.ModuleList(Block(config, linear) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = nn.Linear(config.width, config.vocab, bias=False)
        self.checkpoint_activations = False  # keep only what goes from layer to layer for backward: less memory, more work

    def forward(
        self,
        tokens: Tensor,
        *,
        past: Past | None = None,
        offset: Tensor | None = None,
        adapter: Adapter = None,
        mask: Tensor | None = None,
        select: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        """Read tokens after what came before.

        tokens   [B, T] ids, or [B, T, D] embeddings
        past     keys and values that came before, [B, K, P, hd] each; needs `offset`
        offset   [B] position of the first token of each row (0 when there is no past)
        adapter  name of the LoRA set that acts, or {name: gate [B, T, 1]} to let it act in places
        mask     [B, T, P + T] bool, True = may look; default: causal, and the past is seen whole
        select   [N] the positions whose logits are wanted, as indices into B·T (default: every one)
        keep     [B, G] the positions whose keys and values are all that is wanted

        Returns logits [B, T, V], or [N, V] with `select`; and the keys and values of past and tokens
        together: the `past` for what comes next. With `keep`: None, and the keys and values there.
        What neither depends on is not computed.
        """
        if past is not None and offset is None:
            raise ValueError("a past needs an offset: the position at which the new tokens go on")
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        B, T, last = *x.shape[:2], len(self.layers) - 1
        positions = positions_of(x) if offset is None else positions_of(x) + offset[:, None]
        angles = rotary_angles(positions, self.config)
        gates = {adapter: None} if isinstance(adapter, str) else adapter or {}
        for name in gates:  # every set has the first layer's keys
            if name is not None and name not in self.layers[0].self_attn.k_proj.lora:
                raise ValueError(f"there is no LoRA set {name!r}")

        needed = {}  # behind which layer only some positions are needed, or none; else all are
        if select is not None:
            needed[last] = (select // T, select % T)
        if keep is not None:
            at = (torch.arange(B, device=x.device)[:, None], keep)
            needed |= {last - 1: at, last: None}

        def cut(x: Tensor) -> Tensor:  # [B, K, P + T, hd] -> [B, K, G, hd]
            return x[:, :, -T:].transpose(1, 2)[at].transpose(1, 2)

        present, x = [], x[needed.get(-1, ...)]
        for i, layer in enumerate(self.layers):
            if i == last and keep is not None:  # from here on, x holds the kept positions alone
                past, angles, gates = None, rotary_angles(positions[at], self.config), narrowed(gates, at)
            inputs = (x, angles, None if past is None else past[i], mask, gates, needed.get(i, ...))
            x, (k, v) = recomputed(layer, *inputs) if self.checkpoint_activations else layer(*inputs)
            present.append((k, v) if keep is None or i == last else (cut(k), cut(v)))
        return product(self.norm(x), self.lm_head.weight) if keep is None else None, present


# ------------------------------------------------------------------------------------------ loading


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    linear: type[Linear] = Linear,
) -> Llama:
    """Load a Hugging Face or Meta checkpoint, frozen. `linear=NF4Linear` (lora.py) quantizes it.

    Tensors stream: the model starts on the meta device, and one tensor at a time is read, converted
    and placed, so the host holds the finished model and one tensor. InputError where the files
    don't hold exactly the tensors that the configuration asks for.
    """
    folder = Path(folder)
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config, linear)
    missing = {name: p.shape for name, p in model.named_parameters()}
    read = _read_hf if (folder / "config.json").exists() else _read_meta
    try:
        for name, tensor in tqdm(read(folder, config), total=len(missing), desc="loading", leave=False, delay=1):
            if name not in missing:
                raise InputError(f"{folder}: unexpected or repeated tensor {name}")
            if tensor.shape != missing.pop(name):
                raise InputError(f"{folder}: {name} has shape {list(tensor.shape)}, which doesn't fit the config")
            if not tensor.is_floating_point():
                raise InputError(f"{folder}: {name} holds {tensor.dtype}, not floating-point weights")
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, Linear):
                module.place(tensor, device, dtype)
            else:
                setattr(module, leaf, nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as problem:
        raise InputError(f"{folder}: unreadable weights ({str(problem).splitlines()[0]})") from None
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing, the first is {next(iter(missing))}")
    return model


def _read_hf(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{index}: not a weight index") from None
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise InputError(f"{index}: names a file outside its folder")
    else:
        names = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not names:
        raise InputError(f"{folder}: no model*.safetensors files")
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            keys = [key for key in file.keys() if not key.endswith("rotary_emb.inv_freq")]  # old exports store this constant
        for key in keys:
            with safe_open(folder / name, framework="pt") as file:  # a new map each time: what was read leaves memory
                yield key.removeprefix("model."), file.get_tensor(key)


_META_NAMES = {  # Meta's name -> Hugging Face's
    "tok_embeddings": "embed_tokens",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def _read_meta(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise InputError(f"{folder}: no consolidated.*.pth files")
    shards = [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in paths]
    for path, shard in zip(paths, shards):
        if not isinstance(shard, dict) or not all(isinstance(t, Tensor) for t in shard.values()):
            raise InputError(f"{path}: holds something other than named tensors")
        if shard.keys() != shards[0].keys():
            raise InputError(f"{path}: its tensors differ from those of {paths[0].name}")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    for key in [key for key in shards[0] if key != "rope.freqs"]:
        name = key
        for theirs, ours in _META_NAMES.items():
            name = name.replace(theirs + ".", ours + ".")
        parts = [shard[key] for shard in shards]
        # A tensor was split along the one axis on which its shards are smaller than the whole.
        whole = shapes.get(name, parts[0].shape)
        axis = next((a for a, (part, full) in enumerate(zip(parts[0].shape, whole)) if part != full), None)
        tensor = parts[0] if axis is None else torch.cat(parts, axis)
        if name.endswith(("q_proj.weight", "k_proj.weight")) and tensor.shape == whole:
            # Meta rotates neighbours (2i, 2i+1), Hugging Face halves (i, i + hd/2): re-pair the rows
            # of each head. k has kv_heads heads, which the head size takes care of.
            heads = tensor.unflatten(0, (-1, config.head_size // 2, 2))  # [h, hd/2, 2, D]
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        yield name, tensor


# ------------------------------------------------------------------------------ tokenizer, generation


class Tokenizer:
    """Llama's SentencePiece model. Text is encoded as it would be in the middle of a document."""

    def __init__(self, folder: str | Path):
        """Reads tokenizer.model in the folder, or beside it (as Meta ships it)."""
        folder = Path(folder)
        path = next((p for p in (folder, folder.absolute().parent) if (p / "tokenizer.model").is_file()), None)
        if path is None:
            raise InputError(f"{folder}: no tokenizer.model (a SentencePiece tokenizer is needed)")
        try:
            self.path = path / "tokenizer.model"
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
            self._newline = self.model.encode("\n")
            keeps_newlines = self.model.decode(self._newline) == "\n"
            keeps_newlines &= self.model.encode("\na")[: len(self._newline)] == self._newline
        except (OSError, RuntimeError, ValueError) as problem:
            reason = str(problem).splitlines()[0]
            raise InputError(f"{path / 'tokenizer.model'}: not a SentencePiece model ({reason})") from None
        self.size, self.bos, self.eos = len(self.model), self.model.bos_id(), self.model.eos_id()
        if not keeps_newlines:
            raise InputError(f"{path / 'tokenizer.model'}: loses newlines, so it is not a Llama tokenizer")
        if min(self.bos, self.eos) < 0:
            raise InputError(f"{path / 'tokenizer.model'}: has no BOS or no EOS")

    def encode(self, text: str) -> list[int]:
        """Token ids, without BOS and EOS and without the space that SentencePiece puts before a text.

        Encoding behind a newline, then cutting it off, keeps encode(a) + encode(b) = encode(a + b)
        wherever b begins with a newline or a ends with one: no token depends on what follows.
        """
        return self.model.encode("\n" + text)[len(self._newline) :]

    def words(self) -> list[str]:
        """The pieces that are whole English words: "▁" and three or more letters."""
        pieces = (self.model.id_to_piece(i)[1:] for i in range(self.size) if self.model.id_to_piece(i)[0] == "▁")
        return [piece for piece in pieces if len(piece) > 2 and piece.isascii() and piece.isalpha()]

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(self._newline + ids)[1:]


def ragged(rows: Sequence[Sequence[int]], fill: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Right-padded [B, longest]. Causal attention hides what comes after, so no mask is needed."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], device=device)


def real(lengths: Tensor, width: int) -> Tensor:
    """Which places of right-padded rows hold tokens. lengths [B] -> [B, width] bool"""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def holes_mask(seen: Tensor, T: int) -> Tensor:
    """The mask for T new tokens behind a past of which only a part may be seen. seen [B, P] bool -> [B, T, P + T]"""
    B, P = seen.shape
    causal = torch.ones(T, T, dtype=torch.bool, device=seen.device).tril()
    return torch.cat((seen[:, None].expand(B, T, P), causal.expand(B, T, T)), dim=2)


def seen_after(seen: Tensor | None, present: Past, lengths: Tensor, T: int) -> Tensor:
    """Which of a past and of the T right-padded tokens read behind it is real: [B, P + T] bool."""
    B, P = len(lengths), present[0][0].shape[2] - T
    before = torch.ones(B, P, dtype=torch.bool, device=lengths.device) if seen is None else seen
    return torch.cat((before, real(lengths, T)), dim=1)


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos: int,
    past: Past | None = None,
    offset: Tensor | None = None,
    seen: Tensor | None = None,
    adapter: Adapter = None,
    until: Sequence[int] = (),
) -> list[list[int]]:
    """Greedy continuation of prompts of unequal length, each as if it were alone.

    A row ends with EOS or with the tokens of `until`; neither is returned.

    past [B, K, P, hd] per layer and offset [B] as in `Llama.forward`; seen [B, P] bool: which of the
    past is real, where that differs from row to row.
    """
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]
    tokens = ragged(prompts, device=device)  # [B, T]
    B, T = tokens.shape
    offset = torch.zeros_like(lengths) if offset is None and past is None else offset
    mask = None if seen is None else holes_mask(seen, T)
    last = torch.arange(B, device=device) * T + lengths - 1  # each row's last real token
    logits, present = model(tokens, past=past, offset=offset, adapter=adapter, mask=mask, select=last)

    # Behind a short prompt stands padding, in `present` too. That it stays unseen takes an explicit mask.
    seen = seen_after(seen, present, lengths, T)
    room = [Room(*layer, max_new_tokens) for layer in present]
    position, rows = offset + lengths, [[] for _ in range(B)]
    running = [max_new_tokens > 0] * B
    while any(running):
        token = logits.argmax(-1)  # [B]
        for b, t in enumerate(token.tolist()):
            if running[b]:
                rows[b].append(t)
                ended = t == eos or until and rows[b][-len(until) :] == list(until)
                if ended:
                    del rows[b][-(1 if t == eos else len(until)) :]
                running[b] = not ended and len(rows[b]) < max_new_tokens
        if not any(running):
            break
        logits, _ = model(token[:, None], past=room, offset=position, mask=holes_mask(seen, 1), adapter=adapter)
        logits = logits[:, 0]
        seen = torch.cat((seen, seen.new_ones(B, 1)), dim=1)
        position = position + 1
    return rows
