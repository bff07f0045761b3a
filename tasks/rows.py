"""Rows of a file, read one by one: .jsonl, TFRecord, parquet. Real P3 doesn't fit in memory.

All raise InputError, one line with the file and the row, where a file isn't what it should be.
"""

import json
import mmap
import random
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import Example
from llama import InputError, reading


class JsonLines(Sequence):
    """A .jsonl file, by number; blank lines don't count. Only where lines begin is kept in memory."""

    def __init__(self, path: Path):
        data = map_file(path)
        newlines = [np.zeros(1, dtype=np.int64)]
        for start in range(0, len(data), 1 << 24):
            block = np.frombuffer(data[start : start + (1 << 24)], dtype=np.uint8)
            newlines.append(np.flatnonzero(block == ord("\n")) + start + 1)
        if len(data) and data[len(data) - 1 :] != b"\n":  # the last line has no end of its own
            newlines.append(np.array([len(data)]))
        bounds = np.concatenate(newlines)  # of n lines: n + 1
        short = np.flatnonzero(np.diff(bounds) <= 16)
        blank = [i for i in short if not data[bounds[i] : bounds[i + 1]].strip()]
        self.path = path
        self.bounds = bounds
        self.lines = np.delete(np.arange(len(bounds) - 1), blank)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> dict:
        line = self.lines[i]
        return parse_line(read_bytes(self.path, self.bounds[line], self.bounds[line + 1]), self.where(i))

    def where(self, i: int) -> str:
        return f"{self.path}: line {self.lines[i] + 1}"


def parse_line(line: bytes, where: str) -> dict:
    """A JSON object with fields."""
    with reading(where, "not JSON"):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise InputError(f"{where}: not an object with fields")
        return row


class TFRecords(Sequence):
    """A .tfrecord file of tf.train.Example messages, read without TensorFlow.

    Framing of a record: length (8 bytes, little endian), checksum of the length (4), data, checksum
    of the data (4).
    """

    def __init__(self, path: Path):
        data = map_file(path)
        bounds = [0]
        while (start := bounds[-1]) + 12 <= len(data):
            bounds.append(start + 16 + struct.unpack_from("<Q", data, start)[0])
        if bounds[-1] != len(data):
            raise InputError(f"{path}: record {max(1, len(bounds) - 1)} is cut off or its length is corrupt")
        self.path = path
        self.bounds = np.array(bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, i: int) -> dict:
        record = read_bytes(self.path, self.bounds[i], self.bounds[i + 1])
        data = record[12:-4]
        for content, checksum in ((record[:8], record[8:12]), (data, record[-4:])):
            if masked_crc32c(content) != int.from_bytes(checksum, "little"):
                raise InputError(f"{self.path}: record {i + 1} fails its checksum")
        with reading(f"{self.path}: record {i + 1}", "not a tf.train.Example"):
            return parse_example(data)


class Parquet(Sequence):
    """A .parquet file, by row. Needs pyarrow. It isn't kept open: real P3 has hundreds of files."""

    def __init__(self, path: Path):
        self.path = path
        with reading(path, "not a parquet file"), open_parquet(path) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        self.ends = np.cumsum([0, *sizes])[1:]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, i: int) -> dict:
        group = int(np.searchsorted(self.ends, i, side="right"))
        with reading(f"{self.path}: row group {group + 1}", "can't be read"):
            rows = row_group(self.path, group)
            return rows.slice(i - int(self.ends[group]) + len(rows), 1).to_pylist()[0]


def open_parquet(path: Path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from None
    return ParquetFile(path, memory_map=True, page_checksum_verification=True)


@lru_cache(32)
def row_group(path: Path, group: int):
    """A table of pyarrow's. The last ones that were read stay in memory, of all files together."""
    with open_parquet(path) as file:
        return file.read_row_group(group)


READERS = {".jsonl": JsonLines, ".tfrecord": TFRecords, ".parquet": Parquet}


def file_kind(path: Path) -> str | None:
    """By the end of its name: train.jsonl, train.tfrecord-00000-of-00001, train-00000-of-00002.parquet."""
    match = re.search(r"(\.jsonl|\.tfrecord|\.parquet)(-\d+-of-\d+)?$", path.name)
    return match and match[1]


def map_file(path: Path) -> mmap.mmap | bytes:
    """A file's bytes, without reading them. To be dropped soon: a map holds its file open."""
    with reading(path, "can't be read"), open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def read_bytes(path: Path, start: int, end: int) -> bytes:
    with reading(path, "can't be read"), open(path, "rb", buffering=0) as file:
        file.seek(start)
        return file.read(end - start)


# ------------------------------------------------------------------------- TFRecord without TensorFlow


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli's polynomial, reversed
        table.append(value)
    return table


_CRC_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32C as TFRecord stores it: rotated right by 15 bits, plus a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a protocol-buffer message: (field number, content)."""

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    at = 0
    while at < len(message):
        key = varint()
        if key & 7 != 2:
            raise ValueError("a field that tf.train.Example doesn't have")
        length = varint()
        if at + length > len(message):
            raise ValueError("a field that ends after its message")
        yield key >> 3, message[at : at + length]
        at += length


def parse_example(message: bytes) -> dict[str, list[bytes]]:
    """The byte features of a tf.train.Example: name -> values. (P3's numbers are T5 ids: ignored.)"""
    row = {}
    for _, features in _fields(message):
        for _, entry in _fields(features):
            parts = dict(_fields(entry))  # 1: name, 2: feature
            for kind, values in _fields(parts.get(2, b"")):
                if kind == 1 and 1 in parts:  # a list of bytes
                    row[parts[1].decode()] = [value for _, value in _fields(values)]
    return row


# ------------------------------------------------------------------------------ folders and their texts


def existing(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such data folder")
    return Path(folder)


def draw_rows(rng: random.Random, rows: Sequence, count: int, name: str | Path) -> list:
    """So many different rows of the task `name`."""
    if len(rows) < count:
        raise InputError(f"{name}: {len(rows)} rows are too few for --shots and queries: {count} are needed")
    return rng.sample(rows, count)


def unasked(rows: Iterable[Example], queries: Sequence[Example]) -> Iterator[Example]:
    """The rows that aren't among the queries: real tasks hold the same row several times."""
    asked = {query.input for query in queries}
    return (row for row in rows if row.input not in asked)


def as_text(value: object, where: str) -> str:
    """A field as text; InputError that says where it stands, if it isn't."""
    if isinstance(value, str) and value.isascii():  # nearly always
        return value
    with reading(where, "not text"):
        value = value.decode() if isinstance(value, bytes) else value
        if not isinstance(value, str):
            raise InputError(f"{where} is missing or not text")
        value.encode()  # JSON may hold half a character, which no tokenizer takes
    return value


def read_lists(folder: Path) -> dict[str, list[str]] | None:
    """The names in {train,test}_tasks.txt, as {"train": […], "test": […]}; None without these files."""
    paths = {part: folder / f"{part}_tasks.txt" for part in ("train", "test")}
    if not any(path.exists() for path in paths.values()):
        return None
    names = {}
    for part, path in paths.items():
        if not path.exists():
            raise InputError(f"{path}: is missing; the other list is there, and both are needed")
        with reading(path, "not a list of tasks"):
            names[part] = path.read_text(encoding="utf-8").split()
        for name in names[part]:
            if (
                name in (".", "..") or Path(name).name != name
            ):  # (a symbolic link in the folder may lead out of it)
                raise InputError(f"{path}: the task {name} is not in its folder")
        if len(set(names[part])) < len(names[part]):
            raise InputError(f"{path}: the task {max(names[part], key=names[part].count)} is listed twice")
    for name in sorted(set(names["train"]) & set(names["test"])):
        raise InputError(f"{folder}: the task {name} is in both lists")
    return names
