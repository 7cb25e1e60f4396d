"""support/flags.py: what the command line takes, and the one line that each mistake gets."""

from __future__ import annotations

import dataclasses
import io
import re
import sys

import pytest
import torch

import train
from support.flags import parse_flags
from tests.runs import argv_of, ended

pytestmark = pytest.mark.usefixtures("alone")


BAD = {  # flag: values that are refused at once
    "beta": ["0", "-0.1", "nan", "inf", "x", ""],
    "epsilon": ["1", "-0.01", "nan", "inf", "0.7", "x"],
    "epsilon-check": ["1", "1.5", "-1e-9", "nan", "x"],
    "epsilon-step": ["0.51", "-0.1", "nan", "inf", "x"],
    "lr": ["0", "-1", "nan", "inf", "x"],
    "warmup": ["-0.1", "1.1", "nan", "x"],
    "batch-size": ["0", "-1", "1.5", "nan", "x"],
    "epochs": ["0", "-1", "0.5"],
    "steps": ["0", "-1", "1.5", "1" + "0" * 400],
    "micro-tokens": ["0", "-5", "x"],
    "clip": ["0", "-1", "nan", "x"],
    "weight-decay": ["-0.1", "nan", "inf", "x"],
    "max-length": ["0", "-1", "1", "x"],
    "max-prompt-length": ["0", "-1", "2048", "9999", "x"],
    "dtype": ["float8", "fp32", ""],
    "device": ["mps", "gpu", "cpu:x", "cuda:99", ""],
    "seed": ["-1", "1.5", "x", "99999999999999999999999"],
    "eval-size": ["-1", "x"],
    "eval-every": ["-1", "x"],
    "save-every": ["-1", "x"],
    "samples": ["-1", "x"],
    "show": ["-1", "x"],
    "no-such-flag": ["1"],
}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in BAD.items() for value in values])
def test_a_bad_flag_is_one_line_that_names_it(flag, value, folder, tmp_path, capsys):
    code, said = ended([*argv_of(folder, tmp_path / "out"), f"--{flag}", value], capsys)
    assert code == 2
    assert re.search(rf"--{flag}(?![\w-])", said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--model", "x"], "--data"),
        (["--data", "x"], "--model"),
        (["--model", "x", "--data", "y"], "--out"),
        (["--resume", "--overwrite"], "--overwrite"),
    ],
)
def test_flags_that_need_one_another(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = ended(argv, capsys)
    assert code == 2 and named in said and not list(tmp_path.iterdir())


def parsed(*argv: str) -> train.Flags:
    return parse_flags(train.Flags, "", argv)


def test_defaults_are_those_of_the_job():
    toy_flags, real_flags = parsed(), parsed("--model", "m", "--data", "d", "--out", "o")
    assert (toy_flags.beta, toy_flags.lr, toy_flags.batch_size) == (0.5, 1e-3, 64)
    assert (real_flags.beta, real_flags.lr, real_flags.batch_size) == (0.01, 7e-7, 128)
    one = parsed("--epsilon", "0.2", "--epsilon-step", "0")
    assert (one.epsilon_check, one.epsilon_step) == (0.2, 0.0)


def test_several_data_flags_add_up():
    assert parsed("--model", "m", "--out", "o", "--data", "a", "b", "--data", "c").data == ("a", "b", "c")
    assert parsed().data == ()


def test_help_says_what_a_newcomer_must_know(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(f"--{f.name.replace('_', '-')}" in said for f in dataclasses.fields(train.Flags) if f.name != "given")
    plain = " ".join(said.split())
    assert re.search(r"ε (times|·) the number of steps|ε · steps", plain) and "between 1 and 5" in plain
    assert re.search(r"--epsilon X [^X]*\(default: 0\.01\)", plain)


def test_memory_that_a_cpu_has_not_is_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "score_pairs", lambda *_: torch.empty(10**16))
    code, said = ended(argv_of(folder, tmp_path / "out"), capsys)
    assert code == 2 and "out of memory" in said and "--micro-tokens" in said
    monkeypatch.setattr(train, "score_pairs", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):  # a fault of the program is not a user's
        train.main(argv_of(folder, tmp_path / "out", "--overwrite"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_greek_is_no_reason_to_stop(encoding, folder, tmp_path, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert train.main(argv_of(folder, tmp_path / "out", "--steps", 1)) == 0
    with pytest.raises(SystemExit) as left:
        train.main(["--help"])
    assert left.value.code == 0
