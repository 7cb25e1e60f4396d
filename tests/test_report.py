"""What a run prints on the way: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys

import pytest

import train
from support import report
from tests.runs import argv_of


def test_without_a_terminal_a_line_comes_now_and_then(capsys):
    bar = report.progress_bar(range(100), "train", "step", initial=0)
    now = [bar.start_t]
    bar._time = lambda: now[0]  # ten seconds an item
    for _ in bar:
        now[0] += 10
        bar.set_postfix_str(f"loss {now[0] - bar.start_t:.0f}", refresh=False)
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert "\r" not in said and "\x1b" not in said and said.endswith("\n")
    assert 30 <= len(lines) <= 40  # every 30 seconds, of 1000
    assert all(line.startswith("train") for line in lines)
    assert lines[0].startswith("train:   0% 0/100") and lines[-1].startswith("train: 100% 100/100")
    assert "loss 1000" in lines[-1]


def test_a_short_evaluation_prints_no_line_without_a_terminal(capsys):
    assert list(report.progress_bar(range(3), "evaluate", "batch", leave=False, delay=2)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(report.progress_bar(range(3), "train", "step")) == [0, 1, 2]
    assert capsys.readouterr().err.count("\r") >= 2


@pytest.mark.usefixtures("alone")
def test_a_run_without_a_terminal_prints_lines_only(folder, tmp_path, capsys):
    cache = ["--cache-reference", tmp_path / "cache"]
    assert train.main(argv_of(folder, tmp_path / "out", "--steps", 3, *cache)) == 0
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert [line.split()[0] for line in lines if line] == ["tokenizing"] * 4 + ["reference:"] * 2 + ["train:"] * 2
    assert "3/3" in lines[-1] and "loss" in lines[-1]
