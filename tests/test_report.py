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
