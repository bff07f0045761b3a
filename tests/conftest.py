"""Commands, and small random models in float32 on the CPU, with grouped queries."""

import atexit
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from forker import arguments
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import eval as evaluation  # noqa: E402
import train as training  # noqa: E402
from gist import HyperLlama  # noqa: E402
from llama import Config, Linear, Llama, Tokenizer  # noqa: E402
from lora import add_lora  # noqa: E402
from run import run_command  # noqa: E402
from tools import answer, cost, export, probe, report  # noqa: E402

REAL_DATA = ROOT.parent / "shared" / "data"  # real P3, S-NI and text files, where they are at hand
needs_real_data = pytest.mark.skipif(not REAL_DATA.exists(), reason="the real data files are not here")
G = 3  # gists of the small models
evaluation.MAX_NEW_TOKENS = 16  # (untrained models never end an answer)


@pytest.fixture(autouse=True)
def one_thread():
    """Products of small models don't fill two; and two jobs of two threads would wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(ROOT / "tiny" / "llama")


# ---------------------------------------------------------------------------------------- small models


def config(kv_heads: int = 2, **changes) -> Config:
    small = Config(
        vocab=50, width=32, layers=3, heads=4, kv_heads=kv_heads, head_size=8, hidden=40,
        norm_eps=1e-5, rope_theta=10000.0, max_positions=256,
    )  # fmt: skip
    return replace(small, **changes)


def random_llama(kv_heads: int = 2, seed: int = 0, **changes) -> Llama:
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config(kv_heads, **changes), Linear)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(
                    0, 1 if "embed" in name else parameter.shape[1] ** -0.5, generator=generator
                )
    return model.requires_grad_(False)


def random_hyper(downstream: str | None = None, kv_heads: int = 2, seed: int = 0) -> HyperLlama:
    """A HyperLlama whose LoRA sets do something: B is not zero."""
    generator = torch.Generator().manual_seed(seed + 1)
    model = random_llama(kv_heads, seed)
    for name in sorted({"hyper", downstream} - {None}):
        add_lora(model, name, rank=4, alpha=8, generator=generator, keys_values_only=name != downstream)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.data.normal_(0, 0.2, generator=generator)
    return HyperLlama(model, torch.randn(G, 32, generator=generator), "hyper", downstream)


def hf_config(c: Config) -> dict:
    return {
        "model_type": "llama", "hidden_act": "silu", "vocab_size": c.vocab, "hidden_size": c.width,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.hidden, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_positions, "tie_word_embeddings": False,
    }  # fmt: skip


def hf_tensors(model: Llama) -> dict[str, torch.Tensor]:
    return {
        ("" if n.startswith("lm_head") else "model.") + n: p.detach().clone()
        for n, p in model.named_parameters()
    }


def write_hf(folder: Path, model: Llama, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model.config) | changes))
    save_file(hf_tensors(model), folder / "model.safetensors")
    return folder


def write_meta(folder, model, shards: int):
    """The same weights as Meta publishes them: other names, neighbouring rotary pairs, split shards."""
    c = model.config
    folder.mkdir()
    params = {
        "dim": c.width, "n_layers": c.layers, "n_heads": c.heads, "n_kv_heads": c.kv_heads, "multiple_of": 40,
        "ffn_dim_multiplier": 0.45, "norm_eps": c.norm_eps, "vocab_size": c.vocab,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    names = {
        "embed_tokens": "tok_embeddings", "lm_head": "output",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    axes = {"tok_embeddings": 1, "wo": 1, "w2": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0}
    parts = [{"rope.freqs": torch.ones(4)} for _ in range(shards)]
    for name, p in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:  # halves -> neighbours, head by head
            p = p.view(-1, 2, c.head_size // 2, c.width).transpose(1, 2).reshape(p.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        axis = axes.get(name.split(".")[-2])
        for shard, part in enumerate(parts):
            part[name] = p.detach().clone() if axis is None else p.detach().chunk(shards, axis)[shard].clone()
    for shard, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{shard:02}.pth")
    return folder


def write_parquet(path: Path, rows, **options):
    """Rows of P3."""
    parquet = pytest.importorskip("pyarrow.parquet")
    fields = ("inputs_pretokenized", "targets_pretokenized", "answer_choices")
    columns = {field: list(column) for field, column in zip(fields, zip(*rows))}
    parquet.write_table(pytest.importorskip("pyarrow").table(columns), path, **options)


# -------------------------------------------------------------------------------------------- commands


def part_of(task: str, train: int, held_out: int) -> Path:
    """A folder with few of the miniature's tasks: commands start and evaluate sooner."""
    source = ROOT / "tiny" / {"p3": "P3", "sni": "natural-instructions"}[task]
    lists, tasks = {"p3": ("splits", "."), "sni": ("splits/default", "tasks")}[task]
    folder = Path(tempfile.mkdtemp(prefix="hyperllama-tests-")) / source.name
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    for name in (lists, tasks):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("test", held_out)):
        names = (source / lists / f"{part}_tasks.txt").read_text().split()[:count]
        (folder / lists / f"{part}_tasks.txt").write_text("\n".join(names))
        for name in names:
            path = Path(tasks, name if task == "p3" else f"{name}.json")
            (folder / path).symlink_to(source / path)
    return folder


def small_base() -> Path:
    """A random model with the miniature's tokenizer, for runs whose answers nobody reads."""
    folder, tokenizer = Path(tempfile.mkdtemp(prefix="hyperllama-tests-")), ROOT / "tiny" / "llama"
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copy(tokenizer / "tokenizer.model", folder)
    return write_hf(folder, random_llama(vocab=Tokenizer(tokenizer).size, max_positions=2048))


SMALL = small_base()
FEW_TASKS = part_of("p3", 4, 2)  # the two held-out tasks are of different datasets
ONE_HELD_OUT = part_of("p3", 4, 1)
SCORED = "--limit 2 --sets 1 --no-controls"  # how short runs are evaluated
SHORT = ["--data", FEW_TASKS, *f"--batch-size 2 --shots 4 --gists 4 --lr 0.01 --measure 0 {SCORED}".split()]
PROGRAMS = (training, evaluation, answer, cost, report, export, probe)
MAINS = {program.__name__.split(".")[-1]: program.main for program in PROGRAMS}


def run(*argv, program="train", status=0):
    """The command in this process, which spares the imports."""
    stdout, stderr, ended = io.StringIO(), io.StringIO(), 0
    with mock.patch.object(sys, "argv", [program, *arguments(*argv)]):
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            try:
                run_command(MAINS[program])
            except SystemExit as stop:
                ended = stop.code
    done = subprocess.CompletedProcess(argv, ended, stdout.getvalue(), stderr.getvalue())
    assert ended == status, done.stdout + done.stderr
    return done


def train(out, *argv, status=0):
    return run("--task p3", SHORT, "--out", out, *argv, status=status)


def refusal(*argv, program="train") -> str:
    """The one line that a command ends with, whatever its progress bars have shown before."""
    lines = re.split(r"[\r\n]+", run(*argv, program=program, status=2).stderr)
    (line,) = [line for line in lines if line.strip() and "%|" not in line]
    return line


def results(out: Path) -> dict:
    """Without its seconds, which no two runs share."""
    return json.loads((out / "results.json").read_text()) | {"seconds": None}


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def hypernetwork(tmp_path_factory):
    """A finished run of two steps. (Tests that change it take a copy.)"""
    out = tmp_path_factory.mktemp("runs") / "hyper"
    train(out, "--steps 2")
    return out


@pytest.fixture
def finished(tmp_path, hypernetwork):
    """A copy of it."""
    return Path(shutil.copytree(hypernetwork, tmp_path / "run"))
