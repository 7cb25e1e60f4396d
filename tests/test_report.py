"""support/report.py: the forecast, the tables and the figure."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from model import GPT
from support import report
from support.checkpoint import resolve
from support.report import forecast, pairs_seen
from support.rows import Pair, collate, row_length
from tests.runs import argv_of, flags_of, id_rows, pairs_of, tiny_model

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("batch_size, steps", [(8, 12), (30, 6), (31, 3), (99, 3)])
def test_what_is_coming_is_said_before_any_time_is_spent(batch_size, steps):
    pairs = pairs_of(id_rows(31))
    said = forecast(tiny_model(), tiny_model(), pairs, pairs[:5], flags_of(batch_size=batch_size, epochs=3))
    assert f"{steps} steps of {batch_size} pairs" in said and "GB" in said
    assert "2 evaluations of 5 pairs" in said
    tokens = int(re.search(r"about ([0-9,]+) tokens", said)[1].replace(",", ""))
    assert tokens == pytest.approx(3 * sum(map(row_length, pairs)), rel=0.01)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 90))
def test_pairs_seen_are_those_of_the_batches(pairs, batch_size, steps):
    an_epoch = [min(batch_size, pairs - at) for at in range(0, pairs, batch_size)]
    assert pairs_seen(steps, pairs, batch_size) == sum(an_epoch[i % len(an_epoch)] for i in range(steps))


def test_backward_keeps_no_more_than_the_forecast_counts():
    sizes = dict(vocab_size=50, hidden_size=240, intermediate_size=640, num_hidden_layers=3, num_attention_heads=3)
    c = resolve({"model_type": "llama"} | sizes)
    pairs = [Pair(*(np.arange(n) for n in sizes)) for sizes in ((9, 15, 20), (9, 15, 19))]
    model, kept, batch = GPT(c), {}, collate(pairs)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes() / 4)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(batch.tokens, batch.positions, batch.segments, batch.source)
    numbers = sum(size for _, size in kept.values()) / (int((batch.segments >= 0).sum()) * c.num_hidden_layers)
    assert 0.97 < numbers / (9 * c.hidden_size + 2 * c.intermediate_size) <= 1.0, numbers


def test_a_figure_is_left_where_matplotlib_is(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert train.main(argv_of(folder, out, "--steps", 2)) == 0  # matplotlib cannot be imported: see `alone`
    assert not (out / "run.svg").exists() and (out / "model/model.safetensors").exists()
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib.figure")
    assert train.main(argv_of(folder, out, "--steps", 2, "--overwrite")) == 0
    assert (out / "run.svg").read_text().count("<svg") == 1


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


def test_a_run_without_a_terminal_prints_lines_only(folder, tmp_path, capsys):
    cache = ["--cache-reference", tmp_path / "cache"]
    assert train.main(argv_of(folder, tmp_path / "out", "--steps", 3, *cache)) == 0
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert [line.split()[0] for line in lines if line] == ["tokenizing"] * 4 + ["reference:"] * 2 + ["train:"] * 2
    assert "3/3" in lines[-1] and "loss" in lines[-1]
