"""A run's LoRA sets as peft reads them.

    python -m tools.export RUN --out DIR      DIR/hyper and, with --downstream lora, DIR/downstream

Each folder holds adapter_model.safetensors and adapter_config.json: PeftModel.from_pretrained(base, DIR/hyper).
A saved prefix (tools.answer --save) needs no adapter with a frozen downstream model; otherwise it comes with one.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends the process, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from pathlib import Path

import torch

from llama import InputError
from lora import linears, load_tensors, save_tensors
from run import MARK, Parser, Run, add_options, check_out, open_run, read_args, resolve_args
from run import run_command, write_json

FILES = {"adapter_config.json", "adapter_model.safetensors"}
METADATA = {"format": "pt", "made_by": "HyperLlama"}  # an export of ours, which may be replaced


def export(run: Run, name: str, folder: Path) -> None:
    """One LoRA set in peft's names. Where the set has no matrices, because they would change nothing, zeros stand."""
    args = run.args
    tensors = {}
    for path, linear in linears(run.hyper.model).items():
        lora = linear.lora[name] if name in linear.lora else None
        key = f"base_model.model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = lora.A if lora else torch.zeros(args.rank, linear.inputs)
        tensors[f"{key}.lora_B.weight"] = lora.B if lora else torch.zeros(linear.outputs, args.rank)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "adapter_model.safetensors", tensors, METADATA)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(Path(args.model).resolve()),
        "r": args.rank, "lora_alpha": args.alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": sorted({path.rpartition(".")[2] for path in linears(run.hyper.model)}),
    }  # fmt: skip
    write_json(folder / "adapter_config.json", config)
    print(f"written: {folder}")


def check_export(folder: Path, name: str) -> None:
    """InputError where something other than an earlier export would be replaced. name: of the option."""
    if not folder.exists():
        return
    names = {path.name.removesuffix(".partial") for path in folder.iterdir()} if folder.is_dir() else {""}
    weights = folder / "adapter_model.safetensors"
    if names and (not names <= FILES or not weights.exists() or load_tensors(weights)[1] != METADATA):
        raise InputError(
            f"{name}: {folder} holds something else than an export of ours, which isn't replaced"
        )


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="where to write; a folder for each LoRA set"
    )
    add_options(parser, "place")
    typed = vars(parser.parse_args())
    folder = Path(typed.pop("folder"))
    out = Path(typed.pop("out"))
    check_out(out)
    run = open_run(resolve_args(typed, read_args(folder)), folder)
    sets = {name for linear in linears(run.hyper.model).values() for name in linear.lora}
    names = sorted(sets & {"hyper", "downstream"})
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
