"""Good input of every format that fuzz.py tries, and the ways to damage it: its bytes, its JSON, what only it knows.

Each format has a function (an empty folder, the folder of good input, kind, dice) that writes the damaged files.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from random import Random

import safetensors.torch as library
import torch

from support.checkpoint import DTYPES, INDEX, SINGLE, save_model
from support.data import FIELDS, load_pairs
from support.text import Tokenizer
from tests.checkpoints import VARIANTS, fields, write_config
from tests.runs import id_rows, tiny_model, write_rows
from tests.test_data_text import CHATML, make
from train import Flags

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


# ---- bytes, and JSON -------------------------------------------------------------------------------------------------


def cuts(content: bytes, dice: Random) -> tuple[bytes, bytes, bytes]:
    """Content in three pieces."""
    a, b = sorted(dice.randrange(len(content) + 1) for _ in range(2))
    return content[:a], content[a:b], content[b:]


BYTES = {  # (its three pieces, dice) -> what becomes of them
    "a bit turned": lambda a, b, c, dice: (a + b)[:-1] + bytes([(b"x" + a + b)[-1] ^ 1 << dice.randrange(8)]) + c,
    "a byte changed": lambda a, b, c, dice: a + b + dice.randbytes(1) + c[1:],
    "bytes put in": lambda a, b, c, dice: a + b + dice.randbytes(dice.randint(1, 9)) + c,
    "punctuation changed": lambda a, b, c, dice: a + b + bytes([dice.choice(b'"{}[],:0-.\\')]) + c[1:],
    "a piece cut out": lambda a, b, c, dice: a + c,
    "a piece twice": lambda a, b, c, dice: a + b + b + c,
    "pieces swapped": lambda a, b, c, dice: a + c + b,
    "cut short": lambda a, b, c, dice: a + b,
    "its start lost": lambda a, b, c, dice: b + c,
    "a run of zeros": lambda a, b, c, dice: a + bytes(len(b)) + c,
    "something behind": lambda a, b, c, dice: a + b + c + dice.choice([b"\0", b"x", b"{}", bytes(4096)]),
    "empty": lambda a, b, c, dice: b"",
    "rubbish": lambda a, b, c, dice: dice.randbytes(dice.randrange(1000)),
    "not UTF-8": lambda a, b, c, dice: a + b + dice.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80"]) + c,
    "a byte-order mark": lambda a, b, c, dice: b"\xef\xbb\xbf" + a + b + c,
    "UTF-16": lambda a, b, c, dice: (a + b + c).decode("latin1").encode("utf-16"),
    "gzipped": lambda a, b, c, dice: gzip.compress(a + b + c),
    "a Git LFS pointer": lambda a, b, c, dice: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "an HTML page": lambda a, b, c, dice: b"<!DOCTYPE html>\n<html></html>\n",
}
ABSURD = ("2147483648", "9223372036854775807", "18446744073709551616", "1e308", "1e999", "1e-320", "1" + "0" * 40)
VALUES = {  # (a value, dice) -> JSON that takes its place
    "null": lambda value, dice: "null",
    "zero": lambda value, dice: "0",
    "negative": lambda value, dice: f"-{value}" if type(value) in (int, float) and value > 0 else "-1",
    "a number beside": lambda value, dice: str(value + dice.choice([-2, -1, 1, 2, 8])) if type(value) is int else "3",
    "an absurd number": lambda value, dice: dice.choice(ABSURD),
    "5,000 digits": lambda value, dice: "9" * 5000,
    "not finite": lambda value, dice: dice.choice(["NaN", "Infinity", "-Infinity"]),
    "a broken number": lambda value, dice: f"{value}.5" if type(value) is int else "0.5",
    "true or false": lambda value, dice: dice.choice(["true", "false"]),
    "as text": lambda value, dice: json.dumps(str(value)),
    "empty text": lambda value, dice: '""',
    "half a character": lambda value, dice: '"\\ud800"',
    "text with a NUL": lambda value, dice: '"a\\u0000b"',
    "400 kB of text": lambda value, dice: f'"{"a" * 400_000}"',
    "in a list": lambda value, dice: json.dumps([value]),
    "in an object": lambda value, dice: json.dumps({"a": value}),
    "nothing in it": lambda value, dice: dice.choice(["[]", "{}"]),
    "deep nesting": lambda value, dice: "[" * 100_000 + "]" * 100_000,
    "no JSON": lambda value, dice: dice.choice(["undefined", "'a'", "01", "+1", ".5", "[1,]", "// a", "\\"]),
}
KEYWISE = ("a key left out", "a key renamed", "a key twice", "a key of another place", "values swapped")
JSON = (*VALUES, *KEYWISE)


def place_in(tree: dict | list, dice: Random) -> tuple[dict | list, object]:
    """A random place in what JSON holds: an object or list, and a key or index of it."""
    while True:
        key = dice.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if not isinstance(tree[key], (dict, list)) or not tree[key] or dice.random() < 0.3:
            return tree, key
        tree = tree[key]


def damage(kind: str, content: bytes, dice: Random) -> bytes:
    if kind in BYTES:
        return BYTES[kind](*cuts(content, dice), dice)
    whole, raw = json.loads(content), None
    (tree, key), (other, its) = place_in(whole, dice), place_in(whole, dice)
    old, seed = tree[key], json.dumps(other[its])
    if kind in VALUES:
        tree[key], raw = "@", VALUES[kind](old, dice)
    elif kind == "values swapped":
        tree[key], raw = "@", seed
        other[its] = old if other is not tree or its != key else "@"
    elif kind == "a key left out" or isinstance(tree, list):
        del tree[key]
    elif kind == "a key renamed":
        tree[dice.choice([key + "x", key[:-1], key.upper(), ""])] = tree.pop(key)
    elif kind == "a key twice":
        tree[key], raw = "@", f"{json.dumps(old)}, {json.dumps(key)}: {dice.choice([seed, json.dumps(old)])}"
    else:
        tree[its if isinstance(its, str) else "odd"] = old
    text = json.dumps(whole)
    return (text if raw is None else text.replace('"@"', raw)).encode()


# ---- one format each -------------------------------------------------------------------------------------------------

HEADERS = ("header damaged", "length of the header", "offsets moved", "another dtype", "absurd shape")


def safetensors(folder: Path, good: Path, kind: str, dice: Random) -> None:
    content, length = (good / "some.safetensors").read_bytes(), None
    base = 8 + int.from_bytes(content[:8], "little")
    header = content[8:base]
    if kind in BYTES:
        (folder / "some.safetensors").write_bytes(damage(kind, content, dice))
        return
    if kind == "length of the header":
        length = dice.choice([0, 1, len(header) - 1, len(header) + 1, len(content), 10**8, 2**31, 2**63, 2**64 - 1])
    elif kind not in HEADERS or kind == "header damaged":
        header = damage(kind if kind not in HEADERS else dice.choice(list(BYTES)), header, dice)
    else:
        whole = json.loads(header)
        info = whole[dice.choice([name for name in whole if name != "__metadata__"])]
        if kind == "offsets moved":
            info["data_offsets"] = [max(0, n + dice.choice([-4, -1, 0, 1, 2**40])) for n in info["data_offsets"]]
        elif kind == "another dtype":
            info["dtype"] = dice.choice([*DTYPES, "F8_E4M3", "C64", "f32", ""])
        else:
            info["shape"] = dice.choices([0, 1, 2, 2**31, 2**40, 2**62, 2**63], k=dice.randrange(5))
        header = json.dumps(whole).encode()
    start = (len(header) if length is None else length).to_bytes(8, "little")
    (folder / "some.safetensors").write_bytes(start + header + content[base:])


PATHS = {"a path upwards": "../outside.safetensors", "a path from the root": "{}/outside.safetensors"}
PATHS |= {"a path up and down": "a/../../outside.safetensors", "a Windows path": "..\\outside.safetensors"}
PATHS |= {"a folder for a shard": "shards", "the index for a shard": INDEX, "no name for a shard": ""}
SHARDS = (*PATHS, "a shard missing", "shards swapped", "a shard damaged", "a shard of a larger model", "two models")


def checkpoint(folder: Path, good: Path, kind: str, dice: Random) -> None:
    """Shards a and b; beside the folder a model that nobody may read."""
    shutil.copytree(good / "sharded", folder, dirs_exist_ok=True)
    (folder / "shards").mkdir()
    shutil.copy(good / "other.safetensors", folder.parent / "outside.safetensors")
    index, hit, other = folder / INDEX, *dice.sample([folder / "a.safetensors", folder / "b.safetensors"], 2)
    if kind in PATHS:
        whole = json.loads(index.read_text())
        whole["weight_map"][dice.choice(list(whole["weight_map"]))] = PATHS[kind].format(folder.parent)
        index.write_text(json.dumps(whole))
    elif kind == "a shard missing":
        hit.unlink()
    elif kind == "shards swapped":
        one, two = hit.read_bytes(), other.read_bytes()
        hit.write_bytes(two), other.write_bytes(one)
    elif kind == "a shard damaged":
        hit.write_bytes(damage(dice.choice(list(BYTES)), hit.read_bytes(), dice))
    elif kind == "a shard of a larger model":
        library.save_file({name: t.repeat_interleave(2, 0) for name, t in library.load_file(hit).items()}, hit)
    elif kind == "two models":  # a single file is what counts
        shutil.copy(good / "other.safetensors", folder / SINGLE)
    else:
        index.write_bytes(damage(kind, index.read_bytes(), dice))


CONTRADICTIONS = {
    "heads that keys do not divide": {"num_attention_heads": 7, "num_key_value_heads": 2},
    "more keys than heads": {"num_key_value_heads": 64},
    "an odd head": {"head_dim": 7},
    "RoPE of two types": {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
    "RoPE twice": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    "RoPE without its numbers": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    "two values of θ": {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}},
    "layers that do not add up": {"layer_types": ["full_attention"] * 2},
    "another family": {"model_type": "gpt2"},
    "experts": {"num_local_experts": 8},
    "everything at its largest": dict.fromkeys(["vocab_size", "hidden_size", "num_hidden_layers"], 2**28),
}


def config(folder: Path, good: Path, kind: str, dice: Random) -> None:
    fresh = json.loads((good / "config.json").read_text()) if dice.random() < 0.3 else fields(dice.choice([*VARIANTS]))
    path = write_config(folder, fresh | CONTRADICTIONS.get(kind, {}))
    if kind not in CONTRADICTIONS:
        path.write_bytes(damage(kind, path.read_bytes(), dice))


HOSTILE = {
    "template that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "template that looks for classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "template that looks for globals": "{{ raise_exception.__globals__['os'].system('touch outside') }}",
    "template that changes messages": "{{ messages.append(1) }}{{ messages[0].update(content=1) }}",
    "template that reads files": "{% include '/etc/passwd' %}",
    "template that imports": "{% import 'os' as os %}{{ os.getcwd() }}",
    "template that refuses": "{{ raise_exception('no') }}",
    "template that divides by zero": "{{ 1 / 0 }}",
    "template without a filter": "{{ messages | no_such_filter }}",
    "template of brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "template of blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "template not closed": "{% for m in messages %}{{ m.content",
    "template of one constant": "always the same",
}


def tokenizer(folder: Path, good: Path, kind: str, dice: Random) -> None:
    for name in TOKENIZER_FILES:
        shutil.copy(good / name, folder / name)
    if kind in HOSTILE:
        (folder / TOKENIZER_FILES[2]).write_text(HOSTILE[kind])
    else:
        hit = folder / dice.choice(TOKENIZER_FILES[: 3 if kind in BYTES else 2])
        hit.write_bytes(damage(kind, hit.read_bytes(), dice))


LINES = {  # (a line, dice) -> what stands in its place
    "100 MB in one line": lambda line, dice: line[:-1] + b" " * 10**8 + b"}",
    "a line of NULs": lambda line, dice: bytes(dice.randrange(1, 9999)),
    "a row within a row": lambda line, dice: b'{"row": %b}' % line,
    "rows in a list": lambda line, dice: b"[%b, %b]" % (line, line),
    "two rows in a line": lambda line, dice: line + line,
}
FILES = {  # (all lines, dice) -> what stands in the file
    "100 MB gzipped": lambda whole, dice: gzip.compress(whole + bytes(100_000_000), 1),
    "gzip of two members": lambda whole, dice: gzip.compress(whole[:99]) + gzip.compress(whole[99:]),
    "gzip cut short": lambda whole, dice: gzip.compress(whole)[: dice.randrange(3, len(gzip.compress(whole)))],
    "gzip damaged": lambda whole, dice: damage("a byte changed", gzip.compress(whole), dice),
    "gzip of nothing": lambda whole, dice: gzip.compress(b""),
    "one JSON array": lambda whole, dice: b"[" + b",\n".join(whole.splitlines()) + b"]",
    "blank lines alone": lambda whole, dice: b" \r\n\t\n" * dice.randrange(1, 99),
}


def json_lines(folder: Path, good: Path, kind: str, dice: Random) -> None:
    lines = (good / "rows.jsonl").read_bytes().splitlines(keepends=True)
    at = dice.randrange(len(lines))
    if kind in LINES:
        lines[at] = LINES[kind](lines[at].strip(), dice) + b"\n"
    elif kind not in BYTES and kind not in FILES:
        lines[at] = damage(kind, lines[at], dice) + b"\n"
    whole = b"".join(lines)
    whole = FILES[kind](whole, dice) if kind in FILES else damage(kind, whole, dice) if kind in BYTES else whole
    (folder / "rows.jsonl").write_bytes(whole)


FLAG_VALUES = {  # what stands behind a flag
    "nothing behind it": [],
    "empty": [""],
    "blanks": ["  "],
    "zero": ["0"],
    "minus zero": ["-0.0"],
    "negative": ["-1"],
    "a little below zero": ["-1e-9"],
    "not a number": ["nan"],
    "infinite": ["inf"],
    "minus infinite": ["-inf"],
    "beyond floats": ["1e999"],
    "nearly beyond floats": ["1e308"],
    "nearly zero": ["1e-320"],
    "40 digits": ["1" + "0" * 39],
    "400 digits": ["1" + "0" * 399],
    "5,000 digits": ["9" * 5000],
    "2**63": [str(2**63)],
    "a broken number": ["1.5"],
    "an exponent": ["1e3"],
    "hexadecimal": ["0x10"],
    "an underscore": ["1_0"],
    "digits of another script": ["\u0663"],
    "a comma": ["0,1"],
    "text": ["x"],
    "long text": ["x" * 100_000],
    "half a character": ["\udcff"],
    "two lines": ["1\n2"],
    "two values": ["1", "2"],
    "a flag": ["--lr"],
    "itself again": ["1", "{flag}", "-2"],
    "an unknown flag": ["1", "--no-such-flag"],
}


def flags(folder: Path, good: Path, kind: str, dice: Random) -> None:
    """A command line: other flags, the flag, what stands behind it."""
    flag = "--" + dice.choice([field.name for field in dataclasses.fields(Flags) if field.metadata]).replace("_", "-")
    given = [text.replace("{flag}", flag) for text in FLAG_VALUES[kind]]
    real = ["--model", "m", "--data", "d", "--out", "o"] * dice.randint(0, 1)
    (folder / "argv.json").write_text(json.dumps([real, flag, given]))


# ---- good input ------------------------------------------------------------------------------------------------------


def make_good(good: Path, real: str) -> None:
    """What is damaged, in a folder, and what should be read from it."""
    if real:
        source = Path(real)
        some = {name: t for name, t in library.load_file(source / SINGLE).items() if t.ndim == 1}
        library.save_file(dict(list(some.items())[:8]), good / "some.safetensors", {"format": "pt"})
    else:
        source = make(good / "source", template=CHATML, model=fields("llama"))
        some = {dtype: torch.arange(-2, 4).reshape(2, 3).to(kind) for dtype, kind in DTYPES.items()}
        library.save_file(some, good / "some.safetensors", {"format": "pt"})
    for name in ("config.json", *TOKENIZER_FILES):
        shutil.copy(source / name, good / name)
    model, sharded = tiny_model(), good / "sharded"
    save_model(model, sharded)
    state = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    files = {name: "b.safetensors" if "layers.1" in name else "a.safetensors" for name in state}
    for file in set(files.values()):
        library.save_file({name: state[name] for name in state if files[name] == file}, sharded / file)
    (sharded / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    (sharded / SINGLE).unlink()
    library.save_file(
        {n: p.detach().contiguous() for n, p in tiny_model(1).named_parameters()}, good / "other.safetensors"
    )
    turns = [{"role": "user", "content": "He said"}]
    rows = [dict(zip(FIELDS, (prompt, " yes", " no"))) for prompt in ("He said", turns)]
    rows += [dict(zip(FIELDS[1:], ([*turns, {"role": "assistant", "content": a}] for a in ("yes", "no"))))]
    rows += id_rows(4, longest=12)
    write_rows(good / "rows.jsonl", rows)
    pairs, _ = load_pairs([good / "rows.jsonl"], Tokenizer.from_pretrained(good), 10**9, 500, progress=False)
    (good / "ids.json").write_text(json.dumps([[ids.tolist() for ids in pair[:3]] for pair in pairs]))
