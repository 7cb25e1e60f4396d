"""support/files.py: what a file is by its first bytes, JSON objects, and files written whole or not at all."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.files import check_folder, read_json, replace_file, what_is


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, '{"prompt": "a"}')
    return out.getvalue()


def saved(**options) -> bytes:
    out = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, out, **options)
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 269060552\n"
ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
NAMED = {  # content, a word of its name, a word of the remedy
    "an LFS pointer": (LFS, "Git LFS pointer", "git lfs pull"),
    "Parquet": (b"PAR1\x15\x04\x15\x10", "parquet", "to_json"),
    "an Arrow file": (b"ARROW1\0\0\xff\xff\xff\xff", "arrow", "to_json"),
    "an Arrow stream": (b"\xff\xff\xff\xff\x78\1\0\0", "arrow", "to_json"),
    "a table": (b"prompt,chosen,rejected\nx,y,z\n", "csv", "to_json"),
    "a table with quotes": (b'\xef\xbb\xbf"prompt","chosen"\r\n"x","y"\r\n', "csv", "to_json"),
    "a table with tabs": (b"question\tresponse_j\tresponse_k\nx\ty\tz\n", "csv", r"sep='\t', split='train').to_json"),
    "a table with semicolons": (b"prompt; chosen; rejected\nx; y; z\n", "csv", "sep=';', split='train').to_json"),
    "a table with numbered rows": (b",prompt,chosen,rejected\n0,x,y,z\n", "csv", "'{0}', split='train').to_json"),
    "a table with names of two words": (b"user prompt,chosen answer,bad r\xc3\xa9ponse\nx,y,z\n", "csv", "to_json"),
    "zip": (zipped("pairs.jsonl"), "zip", "unzip"),
    "gzip": (gzip.compress(ROW.encode(), mtime=0), "gzip", "gunzip"),
    "zstd": (bytes.fromhex("28b52ffd2004"), "zstd", "zstd -d"),
    "bzip2": (bz2.compress(b"{}"), "bzip2", "bunzip2"),
    "tar": (b"pairs.jsonl".ljust(257, b"\0") + b"ustar\x0000", "tar", "tar -xf"),
    "xz": (lzma.compress(b"{}"), "xz", "unxz"),
    "a pickle": (pickle.dumps({"a": 1}), "pickle", "safetensors"),
    "PyTorch's pickle": (saved(), "pickle", "safetensors"),
    "PyTorch's old pickle": (saved(_use_new_zipfile_serialization=False), "pickle", "safetensors"),
    "GGUF": (b"GGUF\3\0\0\0", "GGUF", "safetensors"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "HDF5", "safetensors"),
    "a byte-order mark": (b"\xef\xbb\xbf{}", "byte-order mark", "without one"),
    "UTF-32": (ROW.encode("utf-32"), "UTF-32", "iconv"),
    "UTF-32, little end first": (ROW.encode("utf-32-le"), "UTF-32", "iconv"),
    "UTF-32, big end first": (ROW.encode("utf-32-be"), "UTF-32", "iconv"),
    "UTF-16": (ROW.encode("utf-16"), "UTF-16", "iconv"),
    "UTF-16, little end first": (ROW.encode("utf-16-le"), "UTF-16", "iconv"),
    "UTF-16, big end first": (ROW.encode("utf-16-be"), "UTF-16", "iconv"),
    "a page": (b"\n<!DOCTYPE html>\n<html>", "HTML", "download"),
    "a page without a type": (b"<html lang='en'>", "HTML", "download"),
    "an error": (b"Entry not found", "error message", "download"),
    "nothing": (b"", "empty", "download"),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_is_names_the_kind_and_the_remedy(case, tmp_path):
    content, kind, remedy = NAMED[case]
    (tmp_path / "x").write_bytes(content)
    assert kind in what_is(tmp_path / "x") and remedy.format(tmp_path / "x") in what_is(tmp_path / "x")
    with pytest.raises(ValueError) as error:
        read_json(tmp_path / "x")
    assert str(error.value) == f"{tmp_path / 'x'} is {what_is(tmp_path / 'x')}"


@pytest.mark.parametrize(
    "content",
    [
        ROW,
        f"[{ROW}]",
        "{}",
        '"a",',
        "He said, yes\n",
        "a, b\n",
        "x",
        "{\n",
        '"prompt": "a,b"\n',
        "\0" * 9,
    ],
)
def test_what_is_says_nothing_of_text_that_may_be_broken_json(content, tmp_path):
    (tmp_path / "x").write_text(content)
    assert what_is(tmp_path / "x") is None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    length=st.sampled_from([0x0280, 0x0580, 0x8B1F, 0x088B1F, 0x685A42]) | st.integers(2, 10**8), metadata=st.booleans()
)
def test_what_is_says_nothing_of_safetensors_whatever_their_length_looks_like(length, metadata, tmp_path):
    header = b'{"__metadata__":' if metadata else b'{"a":'
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + header)
    assert what_is(tmp_path / "x") is None


@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_the_command_that_converts_a_table_names_the_file_and_works(tmp_path, sep):
    path, asked = tmp_path / "pairs.csv", []
    path.write_text("prompt,chosen,rejected\nx,y,z\n".replace(",", sep))
    code = what_is(path).split('python -c "')[1].removesuffix('"').removeprefix("import datasets;")

    def load_dataset(kind: str, data_files: str, sep: str = ",", split: str = ""):
        asked.append((kind, data_files, sep, split))
        return SimpleNamespace(to_json=asked.append)

    exec(code.strip(), {"datasets": SimpleNamespace(load_dataset=load_dataset)})
    assert asked == [("csv", str(path), sep, "train"), "pairs.jsonl"]


def test_read_json_reads_objects_alone(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": "é"}))
    assert read_json(path) == {"a": "é"}
    for content, named in (
        ("[1]", "list"),
        ("null", "NoneType"),
        ("{", "JSON in UTF-8"),
        ('{"a": "\\ud800"}', "UTF-8"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=named) as error:
            read_json(path)
        assert str(error.value).startswith(f"{path}: expected")


def inside(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


FOLDERS = {  # the files of a folder (none: no such folder), what is wanted, what the error says
    "nothing": ((), "config.json", ["here: no such folder"]),
    "a folder in place of the file": (
        ("config.json/x",),
        "config.json",
        ["expected config.json as a file, got a folder"],
    ),
    "a trainer's folder": (
        ("checkpoint-500/config.json", "checkpoint-1000/config.json", "checkpoint-900/config.json"),
        "config.json",
        ["use {0}/checkpoint-1000"],
    ),
    "an adapter": (("adapter_config.json", "x"), "config.json", ["LoRA adapter", "merge it into its base model"]),
    "an adapter's weights": (("adapter_config.json", "config.json"), "model.safetensors", ["LoRA adapter"]),
    "a cache": (("refs/main", "snapshots/0a1b/config.json"), "config.json", ["use {0}/snapshots/0a1b"]),
    "the folder of a run": (("flags.json", "model/config.json"), "config.json", ["use {0}/model"]),
    "an old tokenizer": (
        ("config.json", "tokenizer.model"),
        "tokenizer.json",
        ["tokenizer.model alone", "AutoTokenizer"],
    ),
    "a tokenizer alone": (("tokenizer.model",), "config.json", ["expected config.json", "got tokenizer.model"]),
    "a tokenizer elsewhere": (("config.json",), "tokenizer.json", ["expected tokenizer.json", "got config.json"]),
    "old weights": (
        ("config.json", "pytorch_model.bin"),
        "model.safetensors",
        ["got config.json, pytorch_model.bin; let"],
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_check_folder_says_what_a_folder_is(case, tmp_path):
    names, wanted, said = FOLDERS[case]
    folder = inside(tmp_path / "org" / "here", *names)
    with pytest.raises(FileNotFoundError) as error:
        check_folder(folder, wanted)
    assert str(error.value).startswith(f"{folder}: ") and "\n" not in str(error.value)
    for text in said:
        assert text.format(folder) in str(error.value)


@pytest.mark.parametrize(
    "given, command",
    [
        ("org/na-me_1.5B", "`hf download org/na-me_1.5B --local-dir na-me_1.5B`"),
        ("gpt2", "`hf download gpt2 --local-dir gpt2`"),
        ("https://huggingface.co/org/name", "`hf download org/name --local-dir name`"),
        ("~/model", ""),
        ("/no/such/folder", ""),
        ("runs/first/model", ""),
        ("../model", ""),
        ("./model", "`hf download model --local-dir model`"),  # to Path this is "model"
    ],
)
def test_check_folder_tells_a_name_of_the_hub_from_a_path(given, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        check_folder(Path(given), "config.json")
    rest = f"; if it is a model of the Hub, download it first with {command}" if command else ""
    assert str(error.value) == f"{Path(given)}: no such folder{rest}"


def test_check_folder_accepts_the_right_folder_and_names_a_file(tmp_path):
    inside(tmp_path, "config.json", "adapter_config.json", "sub/config.json", "tokenizer.model")
    check_folder(tmp_path, "config.json")
    with pytest.raises(FileNotFoundError, match="expected a folder with config.json, got a file"):
        check_folder(tmp_path / "config.json", "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_check_folder_names_a_broken_link(tmp_path, name):
    (tmp_path / name).symlink_to("../../blobs/0a1b")
    with pytest.raises(FileNotFoundError, match=f"{name} is a broken link, to ../../blobs/0a1b"):
        check_folder(tmp_path, name.replace("tokenizer", "config"))
    (tmp_path / name).unlink()
    inside(tmp_path, "blobs/0a1b", *{"config.json"} - {name})
    (tmp_path / name).symlink_to("blobs/0a1b")
    check_folder(tmp_path, name.replace("tokenizer", "config"))


def test_replace_file_leaves_the_old_file_or_the_whole_new_one(tmp_path, monkeypatch):
    path = tmp_path / "x"
    replace_file(path, lambda file: file.write(b"old"))

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="x cannot be written: disk full"):
        replace_file(path, write)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
