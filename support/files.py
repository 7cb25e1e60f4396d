"""Files: written whole or not at all, and JSON objects read with an error that names the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch


def require(ok: bool, otherwise: str) -> None:
    if not ok:
        raise ValueError(otherwise if len(otherwise) < 4000 else f"{otherwise[:2000]} … {otherwise[-2000:]}")


def read_json(path: str | os.PathLike) -> dict:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # lone surrogates are no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8: {error}") from None
    require(type(found) is dict, f"{path}: must hold a JSON object, holds {type(found).__name__}")
    return found


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, flush, move over it: `path` is at every moment the old file or the whole new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except torch.OutOfMemoryError:  # what is written may be computed on the way
        raise
    except (OSError, RuntimeError) as error:  # a full disk is the first in Python's files, the second in torch's
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
