"""The safetensors reader and writer of support/checkpoint.py, compared with the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from support.checkpoint import DTYPES, load_safetensors, read_header, save_safetensors

library = pytest.importorskip("safetensors.torch")

TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half(),
    "brain": torch.tensor([1.0, -2.0, float("inf"), float("nan")], dtype=torch.bfloat16),
    "double": torch.tensor([[1e300]], dtype=torch.float64),
    "float": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)),
    "byte": torch.tensor([0, 255, 7], dtype=torch.uint8),
    "signed": torch.tensor([-128, 127], dtype=torch.int8),
    "short": torch.tensor([-32768], dtype=torch.int16),
    "int": torch.tensor([-(2**31)], dtype=torch.int32),
    "long": torch.tensor([2**63 - 1]),
    "flag": torch.tensor([True, False, True]),
    'naïve "name"\n': torch.tensor([1.0]),
}


def same(one: dict, two: dict) -> bool:
    def bytes_of(tensor):
        return tensor.reshape(-1).view(torch.uint8)

    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype
        and one[name].shape == two[name].shape
        and torch.equal(bytes_of(one[name]), bytes_of(two[name]))
        for name in one
    )


def file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def one(**changes) -> dict:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


def test_reads_what_the_library_writes(tmp_path):
    library.save_file(TENSORS, tmp_path / "x")
    assert same(load_safetensors(tmp_path / "x"), TENSORS)


def test_the_library_reads_what_is_written(tmp_path):
    strided = TENSORS | {"strided": torch.arange(12.0).view(3, 4).t()[1:]}
    save_safetensors(strided, tmp_path / "x", {"format": "pt", "note": "ü"})
    assert same(library.load_file(tmp_path / "x"), {name: t.contiguous() for name, t in strided.items()})
    from safetensors import safe_open

    with safe_open(tmp_path / "x", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["x"]  # nothing left beside it


def test_bfloat16_bytes(tmp_path):
    save_safetensors({"x": torch.tensor([1.0, -2.0], dtype=torch.bfloat16)}, tmp_path / "x", {})
    assert (tmp_path / "x").read_bytes()[-4:] == bytes.fromhex("803f00c0")  # 3F80 C000, little-endian
    assert load_safetensors(tmp_path / "x")["x"].tolist() == [1.0, -2.0]


def test_tensors_are_writable_and_private(tmp_path):
    library.save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    tensors = load_safetensors(tmp_path / "x")
    tensors["a"].add_(1)
    assert (tmp_path / "x").read_bytes() == before
    assert tensors["b"].tolist() == [0] * 4 and load_safetensors(tmp_path / "x")["a"].tolist() == [0] * 4
    (tmp_path / "x").write_bytes(b"")  # nor do they hang on the file
    assert tensors["a"].tolist() == [1] * 4


BASE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
FOUR, EIGHT = b"\1\2\3\4", b"\1\2\3\4\5\6\7\x08"
ACCEPTED = {
    "plain": (BASE, FOUR),
    "no tensors": ({}, b""),
    "no tensors, metadata": ({"__metadata__": {"format": "pt"}}, b""),
    "metadata null": ({"__metadata__": None, "a": one()}, FOUR),
    "metadata behind": ({"a": one(), "__metadata__": {"a": "b"}}, FOUR),
    "spaces behind": (BASE + b"  \n\t ", FOUR),
    "spaces in front": (b"  " + BASE, FOUR),
    "0-dim": ({"a": one(shape=[])}, FOUR),
    "empty": ({"a": one(shape=[0, 3], data_offsets=[0, 0])}, b""),
    "empty and huge": ({"a": one(shape=[0, 2**40, 2**40], data_offsets=[0, 0])}, b""),
    "empty beside full": ({"a": one(), "b": one(shape=[0], data_offsets=[0, 0])}, FOUR),
    "empty at the end": ({"a": one(), "b": one(shape=[0], data_offsets=[4, 4])}, FOUR),
    "odd offset": ({"a": one(dtype="U8", data_offsets=[0, 1]), "b": one(data_offsets=[1, 5])}, FOUR + b"\5"),
    "not in order": ({"a": one(data_offsets=[4, 8]), "b": one()}, EIGHT),
    "unknown field": ({"a": one(more=[1, {"x": None}])}, FOUR),
    "no name": ({"": one()}, FOUR),
    "a name beyond the basic plane": (BASE.replace(b'"a"', b'"\\ud83d\\ude00"'), FOUR),
}
REJECTED = {
    "short by a byte": (BASE, FOUR[:3]),
    "long by a byte": (BASE, FOUR + b"\0"),
    "no header": (b"", b""),
    "an array": (b"[]", b""),
    "null": (b"null", b""),
    "text": (b'"x"', b""),
    "zeros behind": (BASE + b"\0\0", FOUR),
    "a byte-order mark": (b"\xef\xbb\xbf" + BASE, FOUR),
    "not UTF-8": (BASE.replace(b"a", b"\xff", 1), FOUR),
    "lone surrogate": (BASE.replace(b'"a"', b'"\\ud800"'), FOUR),
    "cut": (BASE[:-1], FOUR),
    "deep": (b"[" * 100_000, b""),
    "a field twice": (BASE.replace(b'"dtype"', b'"dtype":"F32","dtype"'), FOUR),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{},' + BASE[1:], FOUR),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": one()}, FOUR),
    "metadata a text": ({"__metadata__": "pt", "a": one()}, FOUR),
    "metadata a list": ({"__metadata__": [], "a": one()}, FOUR),
    "tensor null": ({"a": None}, b""),
    "tensor text": ({"a": "F32"}, b""),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR),
    "unknown dtype": ({"a": one(dtype="F31")}, FOUR),
    "lower-case dtype": ({"a": one(dtype="f32")}, FOUR),
    "dtype a list": ({"a": one(dtype=["F32"])}, FOUR),
    "shape null": ({"a": one(shape=None)}, FOUR),
    "shape negative": ({"a": one(shape=[-1])}, FOUR),
    "shape twice negative": ({"a": one(shape=[-1, -1])}, FOUR),
    "shape a float": ({"a": one(shape=[1.0])}, FOUR),
    "shape true": ({"a": one(shape=[True])}, FOUR),
    "shape text": ({"a": one(shape=["1"])}, FOUR),
    "shape too small": ({"a": one(data_offsets=[0, 8])}, EIGHT),
    "shape too large": ({"a": one(shape=[2])}, FOUR),
    "overflow": ({"a": one(shape=[2**62], data_offsets=[0, 0])}, b""),
    "overflow, then 0": ({"a": one(shape=[2**40, 2**40, 0], data_offsets=[0, 0])}, b""),
    "2**63": ({"a": one(shape=[2**63, 0], data_offsets=[0, 0])}, b""),
    "2**64": ({"a": one(shape=[2**64, 0], data_offsets=[0, 0])}, b""),
    "offsets reversed": ({"a": one(data_offsets=[4, 0])}, FOUR),
    "offsets negative": ({"a": one(data_offsets=[-4, 0])}, FOUR),
    "offsets beyond": ({"a": one(data_offsets=[2**62, 2**62 + 4])}, FOUR),
    "offsets of three": ({"a": one(data_offsets=[0, 4, 4])}, FOUR),
    "offsets of one": ({"a": one(data_offsets=[0])}, FOUR),
    "offsets true": ({"a": one(dtype="U8", data_offsets=[False, True])}, b"\1"),
    "offsets floats": ({"a": one(data_offsets=[0.0, 4.0])}, FOUR),
    "overlap": ({"a": one(), "b": one(data_offsets=[2, 6])}, EIGHT[:6]),
    "shared": ({"a": one(), "b": one()}, FOUR),
    "hole": ({"a": one(), "b": one(data_offsets=[8, 12])}, EIGHT + FOUR),
    "hole in front": ({"a": one(data_offsets=[4, 8])}, EIGHT),
    "data of nobody": ({}, FOUR),
    "empty inside another": ({"a": one(), "b": one(shape=[0], data_offsets=[2, 2])}, FOUR),
    "a tensor twice at two places": (BASE[:-1] + b"," + BASE[1:].replace(b"[0,4]", b"[4,8]"), EIGHT),
}


def by_library(path: Path):
    try:
        return library.load_file(path)
    except Exception as error:
        assert "Safetensor" in type(error).__name__ or isinstance(error, TypeError | OverflowError), error
        return None


def by_us(path: Path):
    try:
        return load_safetensors(path)
    except ValueError as error:
        assert str(path) in str(error)
        return None


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(case, tmp_path):
    path = file(tmp_path / "x", *ACCEPTED[case])
    wanted = by_library(path)
    assert wanted is not None and same(by_us(path), wanted)


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case, tmp_path):
    path = file(tmp_path / "x", *REJECTED[case])
    assert by_library(path) is None and by_us(path) is None


@pytest.mark.parametrize("content", [b"", b"abc", b"\1" + bytes(7), b"\xff" * 8, b"\xff" * 100, bytes(8), bytes(7)])
def test_no_safetensors_at_all(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    assert by_library(tmp_path / "x") is None and by_us(tmp_path / "x") is None


@pytest.mark.parametrize("length", [0, 1, 53, 55, 58, 59, 2**31, 100_000_001, 2**63, 2**64 - 1])
def test_header_lengths(length, tmp_path):
    path = file(tmp_path / "x", BASE, FOUR, length)
    assert by_library(path) is None and by_us(path) is None


def test_a_header_beyond_the_limit(tmp_path):
    path = file(tmp_path / "x", b"{}".ljust(100_000_001))  # right in all but its length
    assert by_library(path) is None and by_us(path) is None


def test_a_tensor_name_twice_is_refused_though_the_library_reads_it(tmp_path):
    """The format forbids it: one of the two would be lost without a word."""
    path = file(tmp_path / "x", BASE[:-1] + b"," + BASE[1:], FOUR)
    assert by_library(path) is not None
    with pytest.raises(ValueError, match="twice"):
        read_header(path)


def test_the_tensor_is_named(tmp_path):
    for changes in ({"dtype": "F8_E4M3"}, {"shape": [-1]}, {"shape": [3]}, {"data_offsets": [1, 5]}):
        with pytest.raises(ValueError, match="'layer.7'"):
            read_header(file(tmp_path / "x", {"layer.7": one(**changes)}, FOUR))
    with pytest.raises(ValueError, match="F8_E4M3"):
        read_header(file(tmp_path / "x", {"a": one(dtype="F8_E4M3", shape=[4])}, FOUR))


@st.composite
def damaged(draw):
    """A good file with some bytes changed, cut out, put in or moved."""
    tensors = {"a": torch.arange(3.0), "b": torch.tensor([[1, 2]], dtype=torch.int16), "c": torch.tensor(True)}
    content = bytearray(library.save(tensors, {"k": "v"} if draw(st.booleans()) else None))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content) - 1))
        some = draw(
            st.sampled_from([b"0", b"1", b"-", b".", b"9", b"e", b"[", b"]", b'"', b",", b" ", b"\0", b"F", b"4"])
        )
        action = draw(st.sampled_from(["change", "cut", "insert", "drop the end"]))
        if action == "change":
            content[at : at + 1] = some
        elif action == "cut" and len(content) > 1:
            del content[at]
        elif action == "insert":
            content[at:at] = some
            if draw(st.booleans()):  # with a header length that is right again
                content[:8] = struct.pack("<Q", int.from_bytes(content[:8], "little") + 1)
        elif len(content) > 10:
            del content[-draw(st.integers(1, 3)) :]
    return bytes(content)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged())
@example(content=b"\2" + bytes(7) + b"{}")
def test_both_accept_or_both_reject_a_damaged_file(content, tmp_path):
    assume(b"-0" not in content)  # a number to Python, none to the library
    path = tmp_path / "x"
    path.write_bytes(content)
    wanted, found = by_library(path), by_us(path)
    if wanted is not None and any(t.dtype not in DTYPES.values() for t in wanted.values()):
        return  # a dtype that is good safetensors and none of ours
    assert (found is None) == (wanted is None)
    assert wanted is None or same(found, wanted)


shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.dictionaries(st.text(max_size=5), st.tuples(shapes, st.sampled_from(sorted(DTYPES))), max_size=5))
def test_round_trips(entries, tmp_path):
    entries.pop("__metadata__", None)
    tensors = {name: torch.ones(shape).to(DTYPES[dtype]) for name, (shape, dtype) in entries.items()}
    save_safetensors(tensors, tmp_path / "x", {"format": "pt"})
    assert same(load_safetensors(tmp_path / "x"), tensors)
    assert same(library.load_file(tmp_path / "x"), tensors)
