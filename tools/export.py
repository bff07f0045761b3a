"""A run's LoRA sets as peft reads them.

    python -m tools.export RUN --out DIR      DIR/hyper and, with --downstream lora, DIR/downstream

Each folder holds adapter_model.safetensors and adapter_config.json: PeftModel.from_pretrained(base, DIR/hyper).
A saved prefix (tools.answer --save) needs no adapter with a frozen downstream model; otherwise it comes with one.
"""

import json
from pathlib import Path

import torch

from gist import trained
from llama import InputError, reading
from lora import linears, save_tensors, write_json
from tasks import Parser, Run, add_places, open_run, read_args, settle
from tools import run_command
from tools.folder import MARK


def export(run: Run, name: str, folder: Path) -> None:
    """One LoRA set in peft's names. Where the set has no matrices, because they would change nothing, zeros stand."""
    args, tensors = run.args, {}
    for path, linear in linears(run.hyper.model).items():
        lora = linear.lora[name] if name in linear.lora else None
        key = f"base_model.model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = lora.A if lora else torch.zeros(args.rank, linear.inputs)
        tensors[f"{key}.lora_B.weight"] = lora.B if lora else torch.zeros(linear.outputs, args.rank)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(Path(args.model).resolve()),
        "r": args.rank, "lora_alpha": args.alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in linears(run.hyper.model)}),
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    print(f"written: {folder}")


def check_export(folder: Path, name: str) -> None:
    """InputError where something other than an earlier export would be replaced. name: of the option."""
    path = folder / "adapter_config.json"
    theirs = folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - {path.name, "adapter_model.safetensors"})
    with reading(path, "would be replaced"):
        if theirs or path.exists() and json.loads(path.read_text()).get("peft_type") != "LORA":
            raise InputError(f"{name}: {folder} holds something else, which isn't replaced")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write; a folder for each LoRA set")
    add_places(parser)
    typed = vars(parser.parse_args())
    folder, out = Path(typed.pop("folder")), Path(typed.pop("out"))
    run = open_run(settle(typed, read_args(folder)), folder)
    names = sorted({name.split(".lora.")[1].split(".")[0] for name in trained(run.hyper) if ".lora." in name})
    if not names:
        raise InputError(f"{folder}: has no LoRA sets")
    if (out / MARK).exists():
        raise InputError(f"--out {out}: is the folder of a run")
    for name in names:
        check_export(out / name, "--out")
    for name in names:
        export(run, name, out / name)


if __name__ == "__main__":
    run_command(main)
