"""Files: written whole or not at all, JSON objects with errors that name the file, and what a wrong file really is."""

from __future__ import annotations

import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

UTF8 = "text in {0}: convert it with `iconv -f {0} -t UTF-8`"


def command(arguments: str) -> str:
    """What makes JSON lines of the data set that load_dataset finds with these arguments."""
    return f"python -c \"import datasets; datasets.load_dataset({arguments}, split='train').to_json('pairs.jsonl')\""


def table(arguments: str) -> str:
    return f"a table; make JSON lines of it with: {command(arguments)}"


def header(sep: bytes) -> bytes:
    """A pattern of the line that names a table's columns: two or more words, or three or more names with spaces."""
    word, name = rb'"?[\w.-]+"?', rb'"?[\w\x80-\xff][\w\x80-\xff. -]*"?'
    return rb"(\xef\xbb\xbf)?(%b(%b%b)+|(%b)?(%b ?%b){2,})\r?\n" % (word, sep, word, name, sep, name)


FROM_HUB = command("'NAME'")
KINDS = {  # how a file begins -> what it is, and what to do
    rb"version https://git-lfs": "a Git LFS pointer in place of the file: run `git lfs pull` in its folder",
    rb"\s*(<!doctype|<html)": "an HTML page in place of the file: download the file again",
    rb"entry not found": "a server's error message in place of the file: download the file again",
    rb"\x80[\x02-\x05]|PK\x03\x04.{26,99}data\.pkl": "a PyTorch pickle (it may run code): save as safetensors",
    rb"GGUF": "a GGUF file: download the model's safetensors",
    rb"\x89HDF": "an HDF5 file: download the model's safetensors",
    rb"PK\x03\x04": "a zip archive: unpack it with `unzip`",
    rb"\x1f\x8b": "a gzip file: unpack it with `gunzip`",
    rb"\x28\xb5\x2f\xfd": "a zstd file: unpack it with `zstd -d`",
    rb"BZh": "a bzip2 file: unpack it with `bunzip2`",
    rb"\xfd7zXZ": "an xz file: unpack it with `unxz`",
    rb".{257}ustar": "a tar archive: unpack it with `tar -xf`",
    rb"\xff\xfe\0\0|\0\0\xfe\xff|([\n\r -~]\0{3}){2}|(\0{3}[\n\r -~]){2}": UTF8.format("UTF-32"),
    rb"\xff\xfe|\xfe\xff|([\n\r -~]\0){2}|(\0[\n\r -~]){2}": UTF8.format("UTF-16"),
    rb"PAR1": table("'parquet', data_files='PATH'"),
    rb"ARROW1|\xff{4}": table("'arrow', data_files='PATH'"),
    header(b","): table("'csv', data_files='PATH'"),
    header(b";"): table("'csv', data_files='PATH', sep=';'"),
    header(b"\t"): table(r"'csv', data_files='PATH', sep='\t'"),
    BOM_UTF8: "UTF-8 with a byte-order mark: save it without one",
}


def what_is(path: str | os.PathLike) -> str | None:
    """What a file is that should be JSON or safetensors, by its first bytes, and what to do; None if they do not say.

    The answer completes a sentence, f"{path} is {what_is(path)}". Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        return kind_of(file.read(512), path)


def kind_of(start: bytes, path: str | os.PathLike) -> str | None:
    """What a file at `path` is that begins with these bytes, up to 512 of them, as `what_is` says it."""
    if not start:
        return "empty: download it again"
    if start[8:10] == b'{"':  # safetensors: the 8 bytes before are a number, which can look like anything
        return None
    for pattern, kind in KINDS.items():
        if re.match(pattern, start, re.DOTALL | re.IGNORECASE):
            return kind.replace("PATH", str(path))
    return None


def check_link(path: Path) -> None:
    """FileNotFoundError if `path` is a broken link, as in a cache folder that was copied without its blobs."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a broken link, to {os.readlink(path)}: download the file again")


def check_data(path: Path) -> None:
    """FileNotFoundError or IsADirectoryError, with a remedy, for a path that is no file of data."""
    check_link(path)
    if path.is_dir():
        names = ", ".join(sorted(child.name for child in path.iterdir())[:9])
        raise IsADirectoryError(f"{path} is a folder; name the files in it that are meant ({names or 'it is empty'})")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; a data set of the Hub becomes one with: {FROM_HUB}")
    if not path.is_file():
        raise OSError(f"{path} is a pipe or a device; write it to a file first, because a run reads it twice")


def check_folder(folder: Path, wanted: str) -> None:
    """FileNotFoundError if folder/wanted does not exist: what the folder is instead of a checkpoint, and what to do.

    Broken links are named: that of the tokenizer too, which would be taken for a folder without one."""
    for name in (wanted, "tokenizer.json"):
        check_link(folder / name)
    if (folder / wanted).is_file():
        return
    inner = [*folder.glob(f"*/{wanted}"), *folder.glob(f"snapshots/*/{wanted}")]
    inner.sort(key=lambda path: (len(str(path)), path))  # checkpoint-1000 after checkpoint-500
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if folder.is_file():
        what = f"expected a folder with {wanted}, got a file"
    elif not folder.exists():
        hub = re.fullmatch(r"(?:https?:/huggingface\.co/)?((?:[\w-][\w.-]*/)?[\w-][\w.-]*)", str(folder))
        download = f"`hf download {hub[1]} --local-dir {folder.name}`" if hub else ""
        what = "no such folder" + f"; if it is a model of the Hub, download it first with {download}" * bool(hub)
    elif (folder / wanted).is_dir():
        what = f"expected {wanted} as a file, got a folder"
    elif inner:
        what = f"no {wanted} in this folder; use {inner[-1].parent}"
    elif "adapter_config.json" in names:
        what = "this is a LoRA adapter; merge it into its base model first (merge_and_unload of peft) and save that"
    elif wanted.endswith(".safetensors") and any(name.endswith((".bin", ".pth", ".pt")) for name in names):
        what = f"expected {wanted}, got {', '.join(names)}; let transformers load the model and save_pretrained it here"
    elif wanted == "tokenizer.json" and "tokenizer.model" in names:
        what = "tokenizer.model alone cannot be read; load and save it here with AutoTokenizer of transformers"
    else:
        what = f"expected {wanted} in this folder, got {', '.join(names[:9]) or 'no files'}"
    raise FileNotFoundError(f"{folder}: {what}")


def require(ok: bool, otherwise: str) -> None:
    if not ok:
        raise ValueError(otherwise if len(otherwise) < 4000 else f"{otherwise[:2000]} … {otherwise[-2000:]}")


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file. ValueError says what the file holds instead, OSError that it cannot be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # lone surrogates are no text
    except (ValueError, RecursionError) as error:
        what = what_is(path)
        raise ValueError(f"{path} is {what}" if what else f"{path}: expected JSON in UTF-8: {error}") from None
    require(type(found) is dict, f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, flush, move over it: `path` is at every moment the old file or the whole new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")  # pids repeat between machines
    try:
        with open(beside, "xb") as file:
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
