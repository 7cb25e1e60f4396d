"""support/flags.py: what the command line takes, and the one line that each mistake gets."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys

import pytest
import torch

import train
from support.flags import one_line_errors, option, parse_flags
from tests.runs import argv_of

pytestmark = pytest.mark.usefixtures("alone")
FLAGS = [field.name for field in dataclasses.fields(train.Flags) if field.name != "given"]


def parsed(*argv: str) -> train.Flags:
    return parse_flags(train.Flags, "", argv)


@pytest.fixture
def no_jobs(monkeypatch):
    """No training: a flag that should have been refused is a failure at once."""
    monkeypatch.setattr(train, "toy_job", None)
    monkeypatch.setattr(train, "checkpoint_job", None)


def refused(argv, capsys) -> str:
    """What the program says on stderr: one line, and the exit status is 2."""
    try:
        code = train.main([str(a) for a in argv])
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("train.py: error: ") and err.count("\n") == 1, err
    return err.strip().removeprefix("train.py: error: ")


# ---- values ----------------------------------------------------------------------------------------------------------

LARGEST = 2**63 - 1
AT_LEAST_0, AT_LEAST_1 = "at least 0", "at least 1"
REAL = ("--model", "m", "--data", "d", "--out", "o")
RANGES = {  # flag: what it must be, values that are refused, values that are accepted
    "beta": ("above 0 and finite", ["0", "-0.1", "nan", "inf"], ["1e-300", "1e300"]),
    "epsilon": ("between 0 and 0.5", ["1", "-0.01", "0.5000001", "nan", "inf"], ["0", "0.5"]),
    "epsilon_check": ("at least 0 and below 1", ["1", "1.5", "-1e-9", "nan"], ["0", "0.9999"]),
    "epsilon_step": ("between 0 and 0.5", ["0.51", "-0.1", "nan", "inf"], ["0", "0.5"]),
    "lr": ("above 0 and finite", ["0", "-1", "nan", "inf"], ["1e-9"]),
    "warmup": ("between 0 and 1", ["-0.1", "1.1", "nan"], ["0", "1"]),
    "clip": ("above 0", ["0", "-1", "nan"], ["1e-9", "inf"]),
    "weight_decay": ("at least 0 and finite", ["-0.1", "nan", "inf"], ["0", "2"]),
    "batch_size": (AT_LEAST_1, ["0", "-1", str(2**63)], ["1", str(LARGEST)]),
    "epochs": (AT_LEAST_1, ["0", "-1"], ["1"]),
    "steps": (AT_LEAST_1, ["0", "-1", "1" + "0" * 400], ["1"]),
    "micro_tokens": (AT_LEAST_1, ["0", "-5"], ["1"]),
    "max_length": ("at least 2", ["0", "-1", "1"], ["2"]),
    "max_prompt_length": (AT_LEAST_1, ["-1"], ["1", "2047"]),
    "seed": (AT_LEAST_0, ["-1", "9" * 23], ["0"]),
    "eval_size": (AT_LEAST_0, ["-1"], ["0"]),
    "eval_every": (AT_LEAST_0, ["-1"], ["0"]),
    "save_every": (AT_LEAST_0, ["-1"], ["0"]),
    "samples": (AT_LEAST_0, ["-1"], ["0"]),
    "show": (AT_LEAST_0, ["-1"], ["0"]),
    "dtype": ("one of float32, float16, bfloat16", ["float8", "fp32", ""], ["float16", "bfloat16"]),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_value_out_of_range_is_one_line_with_both_bounds(name, folder, tmp_path, capsys, no_jobs):
    expected, bad, good = RANGES[name]
    number = {"float": float, "int": int}.get(train.Flags.__dataclass_fields__[name].type.split()[0], str)
    for value in bad:
        said = refused([*argv_of(folder, tmp_path / "out"), f"{option(name)}={value}"], capsys)
        wanted = f"at most {LARGEST}" if number is int and int(value) > LARGEST else expected
        assert said == f"{option(name)} must be {wanted} (got {number(value)})"
    for value in good:
        assert getattr(parsed(*REAL, option(name), value), name) == number(value)
    assert not list(tmp_path.iterdir())


def test_every_flag_with_a_range_is_tested():
    assert {field.name for field in dataclasses.fields(train.Flags) if field.metadata.get("range")} == set(RANGES)


BAD = {  # flag: values that are no number, or that nothing goes by
    "beta": ["x", ""],
    "epsilon": ["x"],
    "batch-size": ["1.5", "nan", "x"],
    "epochs": ["0.5"],
    "steps": ["1.5"],
    "max-prompt-length": ["0", "2048", "9999", "x"],
    "device": ["mps", "gpu", "cpu:x", "cuda:99", ""],
    "seed": ["1.5", "x"],
    "eval-size": ["x"],
    "no-such-flag": ["1"],
}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in BAD.items() for value in values])
def test_a_bad_value_is_one_line_that_names_its_flag(flag, value, folder, tmp_path, capsys, no_jobs):
    said = refused([*argv_of(folder, tmp_path / "out"), f"--{flag}", value], capsys)
    assert re.search(rf"--{flag}(?![\w-])", said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model", "data", "eval_data", "out", "cache_reference", "device"])
def test_an_empty_text_is_one_line_that_names_its_flag(name, capsys, tmp_path, monkeypatch, no_jobs):
    monkeypatch.chdir(tmp_path)
    for argv in ([*REAL, option(name), ""], [option(name), "", "--steps", "2"], [option(name), "x", option(name), ""]):
        assert refused(argv, capsys).startswith(f"{option(name)} is empty: expected a value")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--model", "x"], "--model also needs --data or --resume"),
        (["--data", "x"], "--data also needs --model"),
        (["--model", "x", "--data", "y"], "--model also needs --out or --show"),
        (["--resume", "--overwrite"], "expected either --overwrite or --resume, got both"),
        (["--eval-data", "x"], "--eval-data also needs --model"),
        (["--cache-reference", "x"], "--cache-reference also needs --model"),
        (["--show", "3"], "--show also needs --data"),
        ([*REAL, "--max-length", "9", "--max-prompt-length", "9"], "--max-prompt-length must be below --max-length"),
        (["--eval-size", "1000001"], "--eval-size must be at most 1000000 for the toy"),
        (["--steps", "2", "--epochs", "1"], "expected either --steps or --epochs, got both"),
        ([*REAL, "--eval-data", "x", "--eval-size", "1"], "expected either --eval-data or --eval-size, got both"),
        (["--eval-every", "2", "--eval-size", "0"], "--eval-every also needs --eval-data or --eval-size"),
        (["--samples", "1"], "--samples also needs --model"),
        ([*REAL, "--samples", "1", "--eval-size", "0"], "--samples also needs --eval-data or --eval-size"),
        (["--max-length", "9"], "--max-length also needs --model"),
        (["--max-prompt-length", "9"], "--max-prompt-length also needs --model"),
        (["--skip-bad-rows"], "--skip-bad-rows also needs --model"),
    ],
)
def test_flags_that_need_or_exclude_one_another_are_one_line(argv, expected, capsys, tmp_path, monkeypatch, no_jobs):
    monkeypatch.chdir(tmp_path)
    assert refused(argv, capsys) == expected and not list(tmp_path.iterdir())


def test_a_flag_that_is_off_needs_nothing_else():
    flags = parsed("--eval-every", "0", "--eval-size", "0", "--samples", "0", "--show", "0")
    assert flags.eval_every == flags.eval_size == flags.samples == flags.show == 0


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, hint",
    [
        (["--batch_size", "4"], "did you mean --batch-size?"),
        (["--modle", "x"], "did you mean --model?"),
        (["--eval_every=3"], "did you mean --eval-every?"),
        (["--epsilon-chek", "0.1", "--steps", "2"], "did you mean --epsilon-check?"),
        (["--no-such-flag"], "see --help"),
        (["file.jsonl"], "see --help"),
        (["--beta"], "see --help"),
        (["--resume=yes"], "see --help"),
    ],
)
def test_a_mistyped_flag_is_one_line_with_the_flag_that_was_meant(argv, hint, capsys, tmp_path, monkeypatch, no_jobs):
    monkeypatch.chdir(tmp_path)
    said = refused(argv, capsys)
    assert said.endswith(f"({hint})") and argv[0].split("=")[0] in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FLAGS)
def test_an_abbreviated_flag_is_refused(name, capsys):
    """A script that says --eval would change its meaning with the next flag that begins so."""
    short = option(name)[:-1]
    is_switch = train.Flags.__dataclass_fields__[name].type == "bool"
    with pytest.raises(SystemExit) as left:
        parsed(short, *([] if is_switch else ["1"]))
    assert left.value.code == 2 and f"did you mean {option(name)}?" in capsys.readouterr().err


def test_given_are_the_flags_of_the_command_line():
    assert parsed().given == frozenset() == train.Flags().given
    flags = parsed("--beta", "0.5", "--eval-size", "128", "--resume")  # given, though defaults
    assert flags.given == {"beta", "eval_size", "resume"} and flags.beta == parsed().beta
    assert parsed("--model", "m", "--out", "o", "--data", "a", "--data", "b").given == {"model", "out", "data"}


# ---- defaults and help -----------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_job():
    toy_flags, real_flags = parsed(), parsed("--model", "m", "--data", "d", "--out", "o")
    assert (toy_flags.beta, toy_flags.lr, toy_flags.batch_size) == (0.5, 1e-3, 64)
    assert (real_flags.beta, real_flags.lr, real_flags.batch_size) == (0.01, 7e-7, 128)
    one = parsed("--epsilon", "0.2", "--epsilon-step", "0")
    assert (one.epsilon_check, one.epsilon_step) == (0.2, 0.0)
    assert parsed(*REAL, "--max-length", "9").max_prompt_length == 4


def test_several_data_flags_add_up():
    assert parsed("--model", "m", "--out", "o", "--data", "a", "b", "--data", "c").data == ("a", "b", "c")
    assert parsed().data == ()


def test_help_says_what_a_newcomer_must_know(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "python train.py" in said and "torchrun" in said
    plain = " ".join(said.split())
    for name in FLAGS:
        assert f" {option(name)} " in plain.split("options:")[1], name
    assert re.search(r"ε (times|·) the number of steps|ε · steps", plain) and "between 1 and 5" in plain
    assert re.search(r"--epsilon X [^X]*\(default: 0\.01\)", plain)
    assert re.search(r"--epsilon-step X [^X]*\(default: that of --epsilon\)", plain)
    assert re.search(r"--beta X [^X]*\(default: 0\.01; for the toy 0\.5\)", plain)
    assert "--dtype float32|float16|bfloat16 " in plain
    assert sorted(re.findall(r"instead of (--[\w-]*)", plain)) == ["--epochs", "--eval-size", "--resume"]


# ---- the one line of an error ----------------------------------------------------------------------------------------


def raising(error: BaseException):
    def program() -> None:
        raise error

    return program


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ValueError("rows: bad"), 2, "train.py: error: rows: bad"),
        (FileNotFoundError("no file"), 2, "train.py: error: no file"),
        (ImportError("no module"), 2, "train.py: error: no module"),
        (MemoryError(), 2, "train.py: error: out of memory; try a smaller --micro-tokens"),
        (torch.OutOfMemoryError("of the GPU"), 2, "train.py: error: out of memory; try a smaller --micro-tokens"),
        (KeyboardInterrupt("stopped after step 3"), 130, "train.py: stopped after step 3"),
        (KeyboardInterrupt(), 130, "train.py: interrupted"),
    ],
)
def test_an_error_becomes_one_line_and_a_status(error, status, said, capsys):
    assert one_line_errors(raising(error)) == status
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes"), TypeError(), AssertionError(), ZeroDivisionError()])
def test_an_error_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        one_line_errors(raising(error))


def test_out_of_memory_on_a_cpu_is_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "score_pairs", lambda *_: torch.empty(10**16))
    assert train.main(argv_of(folder, tmp_path / "out")) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out of memory" in said and "--micro-tokens" in said
    monkeypatch.setattr(train, "score_pairs", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError):
        train.main(argv_of(folder, tmp_path / "out", "--overwrite"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_greek_does_not_stop_a_run(encoding, folder, tmp_path, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert train.main(argv_of(folder, tmp_path / "out", "--steps", 1)) == 0
    with pytest.raises(SystemExit) as left:
        train.main(["--help"])
    assert left.value.code == 0


def test_closed_streams_do_not_stop_a_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&- 2>&-`
    monkeypatch.setattr(sys, "stderr", None)
    assert train.main(argv_of(folder, tmp_path / "out", "--steps", 1)) == 0


@pytest.mark.parametrize("pairs", [1, 31])
def test_a_reader_of_the_output_that_leaves_is_no_error(pairs, folder, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", 1 if pairs > 1 else -1) as stream:  # it is noticed in a print, or in the flush at the end
        monkeypatch.setattr(sys, "stdout", stream)
        assert train.main(argv_of(folder, None, "--show", pairs)) == 141
        monkeypatch.undo()
    assert "rror" not in capsys.readouterr().err
