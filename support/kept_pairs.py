"""The pairs of a run as a file, so that a resumed run trains on the same tokens without reading its data again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from support.files import replace_file, require
from support.rows import Pair

DATA_FLAGS = ("data", "eval_data", "eval_size", "max_length", "max_prompt_length", "skip_bad_rows")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def made_by(flags: object, names: Iterable[str]) -> dict[str, object]:
    """The tokenizer and, of the data flags, those of `names`; a file by its size and a hash of all its bytes."""

    def describe(file: str | Path) -> str:
        content = hashlib.sha256()
        with open(file, "rb") as f:
            for block in iter(lambda: f.read(1 << 20), b""):
                content.update(block)
        return f"{os.path.getsize(file)} bytes with sha256 {content.hexdigest()[:16]}"

    made = {name: getattr(flags, name) for name in DATA_FLAGS if name in names}
    made |= {name: [describe(x) for x in value] for name, value in made.items() if name.endswith("data")}
    tokenizer = [Path(flags.model) / name for name in TOKENIZER_FILES]
    return made | {"tokenizer": [describe(file) for file in tokenizer if file.exists()]}


def pairs_file_size(pairs: Sequence[Pair]) -> int:
    """About how many bytes `save_pairs_file` writes."""
    return sum(4 * sum(map(len, pair[:3])) + 64 for pair in pairs)


def save_pairs_file(path: Path, pairs: Sequence[Pair], eval_pairs: Sequence[Pair], made: dict) -> None:
    every = [*pairs, *eval_pairs]  # N of them
    files = sorted({pair.file for pair in every})
    columns = {
        "ids": np.concatenate([np.concatenate(pair[:3]) for pair in every]).astype(np.int32),  # all parts, end to end
        "lengths": np.array([[len(part) for part in pair[:3]] for pair in every], np.int64),  # (N, 3)
        "cut": np.array([pair.cut for pair in every], np.int64),  # (N, 3)
        "place": np.array([files.index(pair.file) for pair in every], np.int64),  # (N,) an index into `files`
        "line": np.array([pair.line for pair in every], np.int64),  # (N,)
    }
    text = json.dumps({"files": files, "to_train_on": len(pairs), "made_by": made})
    replace_file(path, lambda f: np.savez(f, **columns, text=np.array(text)))


def load_pairs_file(path: Path, vocab_size: int) -> tuple[list[Pair], list[Pair], dict]:
    """Training pairs, held-out pairs, and what made them. ValueError for a damaged file and for ids out of range."""
    try:
        with np.load(path, allow_pickle=False) as file:  # an array that is read to its end has its checksum compared
            ids, lengths, cut, place, line = (file[name] for name in ("ids", "lengths", "cut", "place", "line"))
            text = json.loads(str(file["text"]))
        files, to_train_on, made = text["files"], text["to_train_on"], dict(text["made_by"])
        ends = np.cumsum(lengths.reshape(-1, 3))
        n = len(lengths)
        require(cut.shape == (n, 3) and place.shape == line.shape == (n,), "its arrays are not of one length")
        fits = ids.dtype == np.int32 and lengths.min() > 0 and ends[-1] == len(ids)
        require(fits, "its lengths and ids do not match")
        parts = np.split(ids, ends[:-1])
        columns = zip(parts[::3], parts[1::3], parts[2::3], place, line, cut)
        every = [Pair(p, c, r, files[i], int(row), tuple(map(int, gone))) for p, c, r, i, row, gone in columns]
        require(0 < to_train_on <= n, f"it has {n} pairs, {to_train_on} to train on")
    except (MemoryError, FileNotFoundError, PermissionError):
        raise
    except Exception as e:  # numpy and zipfile fail in many ways on what is no such file
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}); start again with --overwrite and --data") from e
    if not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"{path}: expected token ids from 0 to {vocab_size - 1}, got {ids.min()} to {ids.max()}")
    return every[:to_train_on], every[to_train_on:], made
