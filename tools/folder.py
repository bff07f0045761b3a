"""The folder of a run: whose it is, what may be replaced in it, one run in it at a time.

A folder that we made carries a mark. Only files of known names are ever deleted, and only there.
"""

import argparse
import fcntl
import os
import shutil
from pathlib import Path
from typing import IO

from llama import InputError
from lora import write_json
from tasks import COMMON, PATHS, WAYS, portable, read_args

MARK = ".hyperllama"
UNFINISHED = ".hyperllama-scores"  # files of an evaluation that isn't finished
REPLACED = ".hyperllama-replaced"  # in a run that is set aside until the new one has saved something
FILES = {MARK, REPLACED, f"{UNFINISHED}-*", "args.json", "log.jsonl", "state.safetensors", "adapters.safetensors", "results.json", "curve.png"}
FILES |= {"probe.png", "model.safetensors", "gists.safetensors", "config.json", "tokenizer.model"}
FOLDERS = {"shared", *(f"{way}-*" for way in WAYS)}


def ours(path: Path) -> bool:
    """Whether a run of ours wrote this, and all that is in it."""
    if path.is_dir() and not path.is_symlink():
        return any(map(path.match, FOLDERS)) and all(map(ours, path.iterdir()))
    return any(path.match(name) or path.match(f"{name}.partial") for name in FILES)


def check_writable(out: Path) -> None:
    place = out.resolve()
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: can't be used as a folder ({nearest} is {'not writable' if nearest.is_dir() else 'a file'})")


def check_folder(out: Path, args: argparse.Namespace, resume: bool, overwrite: bool) -> None:
    """Whether a run may write here, and go on with or replace what is there. Changes nothing."""
    if resume:
        before = COMMON | read_args(out)
        for name, value in vars(args).items():
            if before.get(name) != value and name != "threads":
                raise InputError(f"{out}: --resume with {name} = {value}, but the run has {before.get(name)}")
    place = out.resolve()
    for name in PATHS:
        other = Path(getattr(args, name) or os.devnull)
        if place == other or place in other.parents or other in place.parents:
            raise InputError(f"--out {out}: lies in, around or at --{name.replace('_', '-')} {other}")
    check_writable(out)
    if not resume and out.exists() and any(out.iterdir()):
        if not (out / MARK).exists() or not all(map(ours, out.iterdir())):
            raise InputError(f"{out}: holds something that no run of ours wrote, so it isn't used; --out names another folder")
        if not overwrite:
            state = "a finished run" if (out / "results.json").exists() else "an unfinished run (--resume goes on with it)"
            raise InputError(f"{out}: holds {state}; --overwrite replaces it, --out names another folder")


def open_folder(out: Path, args: argparse.Namespace, resume: bool, overwrite: bool) -> None:
    """Make the run folder, and hold it until `close_folders`. A run that is there is set aside, or gone on with."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock(out)
    bring_back(out)
    check_folder(out, args, resume, overwrite)  # again: another run may have ended here in the meantime
    if not resume and out.exists() and any(out.iterdir()):
        remove_replaced(out)
        (out / REPLACED).touch()
        out.rename(aside(out))
    out.mkdir(exist_ok=True)
    (out / MARK).touch()
    for path in out.glob("*.partial"):  # of a save that was killed
        path.unlink()
    write_json(out / "args.json", portable(args))


def aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def bring_back(out: Path) -> None:
    """The run that was to be replaced, where the new one ended before it saved anything."""
    if (aside(out) / REPLACED).exists() and not (out / "state.safetensors").exists():
        if out.exists():
            remove(out)
        aside(out).rename(out)
        (out / REPLACED).unlink()


def remove_replaced(out: Path) -> None:
    """The new run has saved something: the one that it replaces goes."""
    if (aside(out) / REPLACED).exists():
        remove(aside(out))


def remove(folder: Path) -> None:
    """Delete a run that we made: its known files, and the folder if nothing else is in it."""
    for path in folder.iterdir() if (folder / MARK).exists() else ():
        if ours(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


LOCKS: dict[Path, IO] = {}  # run folders of this process, and the files that lock them


def lock(out: Path) -> None:
    """A second run in the same folder is refused, as long as this process lives. The lock lies beside the folder."""
    path = out.with_name(f".{out.name}.lock")
    while out not in LOCKS:
        if path.exists() and path.stat().st_size:
            raise InputError(f"{path}: isn't a lock of ours, whose place it takes; --out names another folder")
        file = open(path, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{out}: another run is writing here") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):  # not one that was just removed
            LOCKS[out] = file


def close_folders(failed: bool) -> None:
    """Let go of the folders. Where a run ended before its first step, nothing of it stays."""
    while LOCKS:
        out, file = LOCKS.popitem()
        log = out / "log.jsonl"
        if failed and not (out / "state.safetensors").exists() and not (log.exists() and log.stat().st_size):
            remove(out)
        if failed:
            bring_back(out)
        Path(file.name).unlink(missing_ok=True)
        file.close()
