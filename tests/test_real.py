"""experiments/real.py: its 16-bit formats against torch's own autocast, its textbook way and its table by hand."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from epsdpo import token_stats_by_definition
from experiments import real
from support.rows import collate
from tests.runs import id_rows, nudged, pairs_of, tiny_model

FORMATS = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_matmul_is_that_of_autocast_to_the_last_bit_or_so(dtype):
    x, w = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)), torch.randn(30, 64)
    with real.Autocast(dtype):
        found = F.linear(x, w)
    with torch.autocast("cpu", dtype):
        wanted = F.linear(x, w)
    assert wanted.dtype == dtype and torch.equal(found, found.to(dtype).float())
    assert not torch.equal(found, x @ w.T)
    torch.testing.assert_close(found, wanted.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(F.linear(x, w), x @ w.T)  # over when it is left


@pytest.mark.parametrize("dtype", FORMATS)
@torch.no_grad()
def test_the_noise_of_a_forward_pass_is_of_the_size_of_autocasts(dtype):
    model, batch = (
        tiny_model(num_hidden_layers=4, hidden_size=64, intermediate_size=128),
        collate(pairs_of(id_rows(12))),
    )
    exact, found = (real.body(model, batch, x) for x in (torch.float32, dtype))
    with torch.autocast("cpu", dtype):
        wanted = model(batch.tokens, batch.positions, batch.segments, batch.source)
    size, theirs = ((x.float() - exact).norm() for x in (found, wanted))
    assert 0.8 < size / theirs < 1.25
    assert 0.1 < (found - wanted.float()).norm() / theirs < 1.25  # no better than another rounding, and no worse


def test_the_textbook_way_is_the_definition():
    dice = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(6, 11, generator=dice, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(6)
    found, wanted = real.textbook(logits, ref, labels), token_stats_by_definition(logits, ref, labels, real.EPSILON)
    for name in ("logp", "ref_logp", "delta_minus", "delta_plus"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), atol=1e-12, rtol=0)


def test_decisions_of_all_formats_and_their_table():
    policy, reference, pairs = nudged(tiny_model(), 0.1), tiny_model(), pairs_of(id_rows(11))
    lines = real.decisions(policy, reference, pairs, known := {})
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert lines == real.decisions(policy, reference, pairs, known)  # the reference's states are kept
    rows = real.summary([{"step": 3, "pairs": "unseen"} | line for line in lines])
    assert [(r["format"], r["way"]) for r in rows][0] == ("float64", "increments") and len(rows) == 7
    assert all(r["n"] == 11 and r["lower"] + r["keep"] + r["raise"] == 11 for r in rows)
    assert rows[0]["agree"] == 1 and rows[0]["slope"] == pytest.approx(1) and rows[0]["noise / signal"] < 1e-12
    assert rows[1]["agree"] == 1 and rows[1]["noise / signal"] < 1e-4  # float32, increments, far from the reference
    assert rows[5]["noise / signal"] > 1e-3  # bfloat16
    longer = {line["pair"]: line["longer"] for line in lines}
    assert list(longer.values()) == [len(p.chosen) - len(p.rejected) for p in pairs]


def test_the_table_in_numbers():
    line = {"step": 1, "pairs": "seen", "way": "increments"}
    true, found = (
        [(1.0, -1.0), (2.0, -2.0), (-2.0, 2.0), (1.0, 1.0)],
        [(2.0, -2.0), (4.0, -4.0), (-4.0, 4.0), (-2.0, 2.0)],
    )
    lines = [
        line | {"format": name, "pair": i, "minus": a, "plus": b, "longer": i}
        for name, pairs in (("float64", true), ("float32", found))
        for i, (a, b) in enumerate(pairs)
    ]
    row = real.summary(lines)[1]
    assert (row["agree"], row["lower"], row["keep"], row["raise"]) == (0.75, 2, 0, 2)
    assert row["slope"] == pytest.approx((2 + 8 + 8 - 2) / 10)
    residual = [2 - 1.6, 4 - 3.2, -4 + 3.2, -2 - 1.6]
    assert row["noise / signal"] == pytest.approx((sum(x * x for x in residual) / (1.6**2 * 10)) ** 0.5)


def test_rows_of_seeds_become_means_and_standard_errors():
    rows = [{"pairs": "seen", "n": 4, "agree": x, "nothing": math.nan} for x in (0.5, 0.75, 1.0)]
    found = real.means(rows, ("pairs", "n"))
    assert list(found) == ["pairs", "n", "agree", "agree_se", "nothing", "nothing_se"]
    assert (found["pairs"], found["n"], found["agree"]) == ("seen", 4, 0.75) and math.isnan(found["nothing"])
    assert found["agree_se"] == pytest.approx(0.25 / 3**0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(real.means(rows[:1], ("pairs", "n"))["agree_se"])  # one seed has no spread


def test_what_is_finished_is_not_done_again_and_what_failed_is(tmp_path, monkeypatch):
    monkeypatch.setattr(real, "CACHE", tmp_path / "out")
    file = real.CACHE / "look.json"
    with pytest.raises(ZeroDivisionError):
        real.kept(file, lambda: 1 / 0)
    assert not file.exists()
    assert real.kept(file, lambda: [1.5]) == [1.5] == real.kept(file, lambda: 1 / 0)


def test_which_weights_can_leave_a_16_bit_grid():
    model = tiny_model()
    with torch.no_grad():
        for i, p in enumerate(p for name, p in model.named_parameters() if "proj" in name):
            p.fill_(-0.75 if i % 2 else 0.001)  # half a step of bf16: 2⁻⁹ and 2⁻¹⁸, of float16: 2⁻¹² and 2⁻²¹
    large = sum(p.numel() for n, p in model.named_parameters() if "proj" in n and p.flatten()[0] < 0)
    small = 1 - large / sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    rows = real.on_the_grid(model, [2.0**-20, *[0.0] * 6, 2.0**-11, *[1.0] * 24])
    assert [r["float16"] for r in rows] == [pytest.approx(small), 1, 1]
    assert [r["bfloat16"] for r in rows] == [0, pytest.approx(small), 1]
    for size, step in ((0.75, 2.0**-9), (0.001, 2.0**-18)):
        moved = torch.tensor(size).bfloat16().float() + torch.tensor([0.99 * step, 1.01 * step])
        assert (moved.bfloat16() == torch.tensor(size).bfloat16()).tolist() == [True, False]
