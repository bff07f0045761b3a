"""What a run has trained, as peft reads it.

    python -m tools.export RUN --out DIR                 DIR/hyper, and DIR/downstream with --downstream lora
    python -m tools.export RUN --gists FILE --out DIR    a saved prefix (tools.answer) as peft's CARTRIDGE
    python -m tools.export PREFIXES --out DIR            DIR/TASK, a tuned prefix (--task prefix) as the same

Each folder holds adapter_model.safetensors and adapter_config.json; PeftModel.from_pretrained(base, FOLDER)
opens it. A saved prefix needs no adapter with a frozen downstream model; otherwise it comes with one.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import hashlib
from pathlib import Path

import torch

from gist import Gists
from llama import InputError, Llama
from lora import linears, load_tensors, save_tensors
from run import MARK, Parser, Run, add_options, check_out, open_run, read_args, resolve_args
from run import run_command, write_json

FILES = {"adapter_config.json", "adapter_model.safetensors"}
METADATA = {"format": "pt", "made_by": "HyperLlama"}  # an export of ours, which may be replaced


def belongs_to(run: Run, folder: Path) -> dict[str, str]:
    """Checksums of the model and the run that make and read a prefix: it means nothing to others."""
    trained = hashlib.sha256((folder / "adapters.safetensors").read_bytes())
    return {"model": run.hyper.model.checksum, "run": trained.hexdigest()[:16]}


def save_gists(path: Path, gists: Gists, about: dict[str, str]) -> None:
    """Keys and values of one prefix at positions 0 … G-1, with a note on what they belong to.

    "0.key", "0.value", … are each [1, K, G, hd], as transformers' DynamicCache.update takes them.
    """
    tensors = {"offset": gists.offset}
    for i, (k, v) in enumerate(gists.past):
        tensors |= {f"{i}.key": k, f"{i}.value": v}
    save_tensors(path, tensors, about)


def load_gists(path: Path, about: dict[str, str], model: Llama) -> Gists:
    """A saved prefix. InputError if it was made by another model or run than `about` says, or doesn't fit."""
    tensors, metadata = load_tensors(path)
    for key, value in about.items():
        if metadata.get(key) != value:
            raise InputError(f"{path}: made with another {key} (a run that is trained again is another)")
    c = model.config
    weight = model.embed_tokens.weight
    names = {f"{i}.{part}" for i in range(c.layers) for part in ("key", "value")}
    if tensors.keys() != names | {"offset"}:
        raise InputError(f"{path}: not a saved prefix of a model of {c.layers} layers")
    G = tensors["0.key"].shape[-2] if tensors["0.key"].dim() == 4 else 0
    shape = (1, c.kv_heads, G, c.head_size)
    for name in names:
        x = tensors[name]
        if not x.numel() or x.shape != shape or not x.is_floating_point() or not x.isfinite().all():
            raise InputError(f"{path}: {name} isn't {list(shape)} finite numbers")
    if tensors["offset"].dtype != torch.int64 or tensors["offset"].tolist() != [G]:
        raise InputError(f"{path}: the offset isn't the position after its gists")
    tensors = {name: tensors[name].to(weight.device, weight.dtype) for name in names}
    past = [(tensors[f"{i}.key"], tensors[f"{i}.value"]) for i in range(c.layers)]
    return Gists(past, torch.tensor([G], device=weight.device))


def export(run: Run, name: str, folder: Path) -> None:
    """One LoRA set in peft's names. Where it has no matrices, as they would change nothing, zeros stand."""
    args = run.args
    tensors = {}
    for path, linear in linears(run.hyper.model).items():
        lora = linear.lora[name] if name in linear.lora else None
        key = f"base_model.model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = lora.A if lora else torch.zeros(args.rank, linear.inputs)
        tensors[f"{key}.lora_B.weight"] = lora.B if lora else torch.zeros(linear.outputs, args.rank)
    write_adapter(run, folder, tensors, {
        "peft_type": "LORA", "r": args.rank, "lora_alpha": args.alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path in linears(run.hyper.model)}),
    })  # fmt: skip


def export_prefix(run: Run, gists: Gists, folder: Path) -> None:
    """A prefix as a peft adapter: PeftModel.from_pretrained(base, folder) then puts it before every input.

    peft 0.21 or later. Its forward has our logits. Its generate does with transformers 4.57; with
    transformers 5 it loses the prefix without a word: there, pass the cache as docs/export.md does.
    """
    c = run.hyper.model.config
    # Per position: for each layer the key, then the value, each by heads. [G, L·2·K·hd]
    layers = torch.stack([torch.stack((k[0], v[0])) for k, v in gists.past])  # [L, 2, K, G, hd]
    embeddings = layers.permute(3, 0, 1, 2, 4).flatten(1)
    write_adapter(run, folder, {"prompt_embeddings": embeddings}, {
        "peft_type": "CARTRIDGE", "num_virtual_tokens": len(embeddings), "num_layers": c.layers,
        "num_attention_heads": c.kv_heads, "token_dim": c.kv_heads * c.head_size,
    })  # fmt: skip


def write_adapter(run: Run, folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors, METADATA)
    base = str(Path(run.args.model).resolve())
    config |= {"task_type": "CAUSAL_LM", "inference_mode": True, "base_model_name_or_path": base}
    write_json(folder / "adapter_config.json", config)
    print(f"written: {folder}")


def check_export(folder: Path, name: str) -> None:
    """InputError where something other than an earlier export would be replaced. name: of the option."""
    if not folder.exists():
        return
    names = {path.name.removesuffix(".partial") for path in folder.iterdir()} if folder.is_dir() else {""}
    weights = folder / "adapter_model.safetensors"
    if names and (not names <= FILES or not weights.exists() or load_tensors(weights)[1] != METADATA):
        what = "holds something else than an export of ours, which isn't replaced"
        raise InputError(f"{name}: {folder} {what}")


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="RUN", help="folder of a finished run")
    add("--gists", metavar="FILE", help="a prefix that tools.answer saved, instead of LoRA sets")
    add("--out", metavar="DIR", required=True, help="where to write; a folder for each LoRA set")
    add_options(parser, "place")
    typed = vars(parser.parse_args())
    folder = Path(typed.pop("folder"))
    out = typed.pop("out")
    gists = typed.pop("gists", None)
    if "" in (out, gists):
        raise InputError("an empty name of a file or folder")
    out = Path(out)
    check_out(out)
    run = open_run(resolve_args(typed, read_args(folder)), folder)
    if (out / MARK).exists():
        raise InputError(f"--out {out}: is the folder of a run")
    if gists is not None:
        prefix = load_gists(Path(gists), belongs_to(run, folder), run.hyper.model)
        check_export(out, "--out")
        export_prefix(run, prefix, out)
        return
    if run.task.prefix_of:
        tuned = {out / name: run.task.prefix_of(run, t) for t, name in enumerate(run.hyper.tasks)}
        for place in tuned:
            check_export(place, "--out")
        for place, prefix in tuned.items():
            export_prefix(run, prefix, place)
        return
    sets = {name for linear in linears(run.hyper.model).values() for name in linear.lora}
    names = sorted(sets & {"hyper", "downstream"})
    if not names:
        raise InputError(f"{folder}: has no LoRA sets")
    for name in names:
        check_export(out / name, "--out")
    for name in names:
        export(run, name, out / name)


if __name__ == "__main__":
    run_command(main)
