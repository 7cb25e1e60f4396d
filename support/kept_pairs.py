"""The pairs of a run as a file, so that a resumed run trains on the same tokens without reading its data again."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from support.files import replace_file
from support.rows import Pair

DATA_FLAGS = ("data", "eval_data", "eval_size", "max_length", "max_prompt_length", "skip_bad_rows")


def made_by(flags: object, names: Iterable[str]) -> dict[str, object]:
    """Of the data flags, those of `names`; a file by its size and a hash of all its bytes, wherever it is."""

    def describe(file: str) -> str:
        content = hashlib.sha256()
        with open(file, "rb") as f:
            for block in iter(lambda: f.read(1 << 20), b""):
                content.update(block)
        return f"{os.path.getsize(file)} bytes with sha256 {content.hexdigest()[:16]}"

    made = {name: getattr(flags, name) for name in DATA_FLAGS if name in names}
    return {name: [describe(x) for x in value] if name.endswith("data") else value for name, value in made.items()}


def save_pairs_file(path: Path, pairs: Sequence[Pair], eval_pairs: Sequence[Pair], made: dict) -> None:
    every = [*pairs, *eval_pairs]
    names = sorted({pair.file for pair in every})
    columns = {
        "ids": np.concatenate([np.concatenate(pair[:3]) for pair in every]).astype(np.int32),  # all parts, end to end
        "lengths": np.array([[len(part) for part in pair[:3]] for pair in every], np.int64),  # (N, 3)
        "cut": np.array([pair.cut for pair in every], np.int64),  # (N, 3)
        "place": np.array([names.index(pair.file) for pair in every], np.int64),  # (N,) an index into `names`
        "line": np.array([pair.line for pair in every], np.int64),  # (N,)
        "names": np.array(names),
        "to_train_on": np.array(len(pairs)),
        "made_by": np.array(json.dumps(made)),
    }
    replace_file(path, lambda f: np.savez(f, **columns))


def load_pairs_file(path: Path, vocab_size: int) -> tuple[list[Pair], list[Pair], dict]:
    """Training pairs, held-out pairs, and what made them. ValueError for a damaged file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x = {name: file[name] for name in file.files}
        ids, lengths, names = x["ids"], x["lengths"], x["names"]
        ends = np.cumsum(lengths.flatten())
        if ends[-1] != len(ids) or lengths.min() < 1 or not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"its token ids do not fit a vocabulary of {vocab_size}")
        parts = np.split(ids, ends[:-1])
        columns = zip(parts[::3], parts[1::3], parts[2::3], x["place"], x["line"], x["cut"])
        every = [Pair(p, c, r, str(names[f]), int(n), tuple(map(int, cut))) for p, c, r, f, n, cut in columns]
        return every[: int(x["to_train_on"])], every[int(x["to_train_on"]) :], json.loads(str(x["made_by"]))
    except (ValueError, KeyError, IndexError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as e:
        raise ValueError(f"{path}: damaged ({e}); start again with --overwrite") from e
