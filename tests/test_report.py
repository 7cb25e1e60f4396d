"""support/report.py: bars on a terminal and lines elsewhere, the forecast, tables, answers and the figure."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train
from model import GPT, Config
from support import report
from support.checkpoint import resolve
from support.report import forecast, is_due, pairs_seen
from support.rows import Pair, collate, row_length
from tests.runs import argv_of, flags_of, id_rows, nudged, pairs_of, pretend, tiny_model

# ---- progress --------------------------------------------------------------------------------------------------------


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
    assert bar.miniters == 1  # if it is larger, tqdm's monitor thread repeats lines every 10 seconds


def test_a_short_evaluation_prints_no_line_without_a_terminal(capsys):
    assert list(report.progress_bar(range(3), "evaluate", "batch", leave=False, delay=2)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(report.progress_bar(range(3), "train", "step")) == [0, 1, 2]
    assert capsys.readouterr().err.count("\r") >= 2


def test_process_0_alone_prints(monkeypatch, capsys):
    pretend(monkeypatch, rank=1, world=2)
    assert list(report.progress_bar(range(3), "train", "step")) == [0, 1, 2]
    report.say("a line")
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.usefixtures("alone")
def test_a_run_without_a_terminal_prints_lines_only(folder, tmp_path, capsys):
    cache = ["--cache-reference", tmp_path / "cache"]
    assert train.main(argv_of(folder, tmp_path / "out", "--steps", 3, *cache)) == 0
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert [line.split()[0] for line in lines if line] == ["tokenizing"] * 4 + ["reference:"] * 2 + ["train:"] * 2
    assert "3/3" in lines[-1] and "loss" in lines[-1]


# ---- the forecast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, steps", [(8, 12), (30, 6), (31, 3), (99, 3)])
def test_the_forecast_counts_steps_tokens_and_evaluations(batch_size, steps):
    pairs = pairs_of(id_rows(31))
    said = forecast(tiny_model(), tiny_model(), pairs, pairs[:5], flags_of(batch_size=batch_size, epochs=3))
    assert f"{steps} steps of {batch_size} pairs" in said and "GB" in said
    assert "2 evaluations of 5 pairs" in said
    tokens = int(re.search(r"about ([0-9,]+) tokens", said)[1].replace(",", ""))
    assert tokens == pytest.approx(3 * sum(map(row_length, pairs)), rel=0.01)


@pytest.mark.parametrize("every, steps", [(0, [0, 12]), (5, [0, 5, 10, 12]), (6, [0, 6, 12]), (99, [0, 12])])
def test_evaluations_are_due_at_both_ends_and_every_n_steps(every, steps):
    assert [step for step in range(13) if is_due(step, 12, every)] == steps
    pairs = pairs_of(id_rows(31))
    said = forecast(tiny_model(), tiny_model(), pairs, pairs[:5], flags_of(batch_size=8, epochs=3, eval_every=every))
    assert f" {len(steps)} evaluations of 5 pairs" in said
    assert " 0 evaluations of 0 pairs" in forecast(tiny_model(), tiny_model(), pairs, (), flags_of(eval_every=every))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 90))
def test_pairs_seen_are_those_of_the_batches(pairs, batch_size, steps):
    an_epoch = [min(batch_size, pairs - at) for at in range(0, pairs, batch_size)]
    assert pairs_seen(steps, pairs, batch_size) == sum(an_epoch[i % len(an_epoch)] for i in range(steps))


def gigabytes(policy: GPT, **given) -> float:
    """The forecast of memory, from what is printed: digits after the first decimal are lost."""
    reference = None if "cache_reference" in given else policy
    said = forecast(policy, reference, pairs_of(id_rows(4)), (), flags_of(**given))
    return float(re.search(r"roughly ([0-9.]+) GB", said)[1])


def large_model(layers: int, vocab: int = 16, tied: bool = False) -> GPT:
    """Gigabytes of weights, none of which is allocated."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16}
    sizes |= {"head_dim": 128, "max_position_embeddings": 64, "windows": (None,) * layers}
    with torch.device("meta"):
        return GPT(Config(vocab_size=vocab, num_hidden_layers=layers, tie_word_embeddings=tied, **sizes))


def count(tensors) -> int:
    """Numbers in tensors, those that share storage once."""
    return sum({x.untyped_storage().data_ptr(): x.numel() for x in tensors}.values())


def numbers_of_a_step(monkeypatch) -> float:
    """What a step keeps for each weight, counted: weights, gradients and moments of the policy, and the reference."""
    policy, found, step = tiny_model(), [], torch.optim.AdamW.step
    reference = nudged(policy)

    def counted(self, *args):
        result = step(self, *args)
        moments = [x for state in self.state.values() for x in state.values() if x.ndim]
        found.append(count([*policy.parameters(), *(p.grad for p in policy.parameters()), *moments]))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    train.train(policy, reference, pairs_of(id_rows(4)), flags_of(steps=1))
    return (found[0] + count(reference.parameters())) / count(policy.parameters())


def test_the_forecast_counts_what_a_step_keeps_for_each_weight(monkeypatch):
    model = large_model(layers=20)
    weights = sum(p.numel() for p in model.parameters())
    each = numbers_of_a_step(monkeypatch)
    assert gigabytes(model, micro_tokens=1) == pytest.approx(4e-9 * weights * each, rel=0.02)
    without_reference = gigabytes(model, micro_tokens=1, cache_reference="x", model="x", data=("x",), out="x")
    assert without_reference == pytest.approx(4e-9 * weights * (each - 1), rel=0.02)
    pretend(monkeypatch, rank=0, world=4)
    assert gigabytes(model, micro_tokens=1) == pytest.approx(4e-9 * weights * each / 4, rel=0.03)


@pytest.mark.parametrize("tied", [False, True])
def test_the_forecast_counts_no_second_gradient_of_a_table_in_one_process(tied):
    model = large_model(layers=1, vocab=1_000_000, tied=tied)
    weights, chunk = sum(p.numel() for p in model.parameters()), 1024 * 1_000_000
    assert gigabytes(model, micro_tokens=1) == pytest.approx(4e-9 * (5 * weights + chunk), rel=0.01)


@pytest.mark.parametrize("tied, whole", [(False, 6), (True, 3)])
def test_the_forecast_counts_tables_whole_in_each_of_many_processes(tied, whole, monkeypatch):
    """FSDP gathers the root group: embeddings, head, their gradients, the reference's."""
    model = large_model(layers=1, vocab=1_000_000, tied=tied)
    table, weights = 2_048_000_000, sum(p.numel() for p in model.parameters())
    pretend(monkeypatch, rank=0, world=1000)
    chunk = 1024 * 1_000_000  # of the head's logits
    assert gigabytes(model, micro_tokens=1) == pytest.approx(
        4e-9 * (5 * weights / 1000 + whole * table + chunk), rel=0.02
    )


def numbers_kept(c: Config) -> float:
    """What backward keeps for each token and layer, counted on a model of this shape."""
    pairs = [Pair(*(np.arange(n) for n in sizes)) for sizes in ((9, 15, 20), (9, 15, 19))]
    model, kept, batch = GPT(c), {}, collate(pairs)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes() / 4)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(batch.tokens, batch.positions, batch.segments, batch.source)
    return sum(size for _, size in kept.values()) / (int((batch.segments >= 0).sum()) * c.num_hidden_layers)


def test_backward_keeps_no_more_than_the_forecast_counts():
    sizes = dict(vocab_size=50, hidden_size=240, intermediate_size=640, num_hidden_layers=3, num_attention_heads=3)
    c = resolve({"model_type": "llama"} | sizes)
    each, tokens = numbers_kept(c), 10**9
    forecast_of_all = gigabytes(GPT(c), micro_tokens=tokens) / (4e-9 * tokens)
    assert 0.97 < 3 * each / forecast_of_all <= 1.0, each
    # With gradient checkpointing one layer at a time, and the inputs of all.
    checkpointed = gigabytes(GPT(c), micro_tokens=tokens, gradient_checkpointing=True) / (4e-9 * tokens)
    assert 0.97 < (each + 3 * c.hidden_size) / checkpointed <= 1.0


@pytest.mark.parametrize(
    "epsilon, note",
    [
        (0.0, ""),  # plain DPO, as it was asked for
        (0.0099, "ε · steps is 0.99; below 1 β hardly moves, as in plain DPO"),
        (0.01, ""),
        (0.05, ""),
        (0.051, "ε · steps is 5.1; above 5 β may come near 0"),
    ],
)
def test_the_forecast_notes_an_epsilon_that_does_not_fit_the_steps(epsilon, note):
    pairs = pairs_of(id_rows(4))
    said = forecast(tiny_model(), None, pairs, (), flags_of(epsilon_step=epsilon, epsilon_check=0.3, steps=100))
    assert said.split("\n")[1:] == [note] * bool(note)


def test_a_row_longer_than_micro_tokens_counts_in_the_forecast():
    """It is a micro-batch of its own."""
    pairs = [Pair(*(np.ones(100_000, np.int32) for _ in range(3)), "ids", 1)]
    said = forecast(tiny_model(), tiny_model(), pairs, (), flags_of(micro_tokens=1))
    assert float(re.search(r"roughly ([0-9.]+) GB", said)[1]) > 0.3


# ---- the end of a run ------------------------------------------------------------------------------------------------


def test_the_last_table_compares_the_first_evaluation_and_the_last():
    def evaluation(step: int, x: float) -> dict[str, float]:
        names = ("rewards/accuracies", "rewards/margins", "loss", "kl")
        return {"step": step} | {f"eval/{name}": x + i for i, name in enumerate(names)}

    lines = [evaluation(0, 0.5), {"step": 1, "loss": 9.0, "beta": 0.25}, evaluation(1, 70.0), evaluation(2, 0.75)]
    table = report.before_and_after(lines, 0.125)
    rows = {line[:24].strip(): line[24:].split() for line in table.splitlines()}
    assert rows == {
        "": ["before", "after"],
        "held-out accuracy": ["0.5000", "0.7500"],
        "held-out reward margin": ["1.5000", "1.7500"],
        "held-out loss": ["2.5000", "2.7500"],
        "held-out KL": ["3.5000", "3.7500"],
        "β": ["0.2500", "0.1250"],
    }
    assert report.before_and_after(lines[1:2], 0.125).count("\n") == 1  # no held-out pairs: β alone


def test_answers_stand_beside_the_chosen_ones():
    tokenizer = SimpleNamespace(decode=lambda ids: " " + "".join(chr(97 + i) for i in ids))
    pair = pairs_of([{"prompt": [0, 1], "chosen": [2, 3], "rejected": [4]}])[0]
    said = report.show_answers([pair], [[5, 6]], [[7] * 500], tokenizer)
    assert said.split("\n") == ["", "prompt:  ab", "chosen:  cd", "before:  fg", "after:   " + 400 * "h"]


def test_control_characters_are_escaped():
    """A terminal would obey them: hide a text, write over it, or change its title."""
    text = "a\x1b[8mb\rc\x00\x7f\x9b2Jd\te\nf ü\u3000\xa0é\x85"
    assert report.printable(text) == "a\\x1b[8mb\\rc\\x00\\x7f\\x9b2Jd\te\nf ü\u3000\xa0é\\x85"
    pair = pairs_of([{"prompt": [0], "chosen": [2], "rejected": [4]}])[0]
    shown = report.show_answers([pair], [[5]], [[6]], SimpleNamespace(decode=lambda ids: "\x1b[8m" + str(ids[0])))
    assert "\x1b" not in shown and shown.count("\\x1b[8m") == 4


def test_answers_end_with_the_token_that_ends_most_chosen_responses(monkeypatch):
    asked = {}
    policy = SimpleNamespace(generate=lambda prompts, n, eos: asked.update(prompts=prompts, n=n, eos=eos) or [[1]])
    rows = [{"prompt": [i], "chosen": [5, end], "rejected": [9]} for i, end in enumerate((7, 7, 8))]
    pairs = pairs_of(rows)
    cut = [pair._replace(chosen=np.array([3]), cut=(0, 1, 0)) for pair in pairs]  # they end where they were cut
    assert report.answers(policy, pairs[:2], [*pairs, *cut, *cut]) == [[1]]
    assert asked == {"prompts": [[0], [1]], "n": 64, "eos": 7}
    assert report.answers(policy, pairs[:1], cut) == [[1]] and asked["eos"] == -1  # no token ends an answer
    assert report.answers(None, [], pairs) == []


@pytest.mark.usefixtures("alone")
def test_a_figure_is_written_if_matplotlib_is_installed(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert train.main(argv_of(folder, out, "--steps", 2)) == 0  # matplotlib cannot be imported: see `alone`
    assert not (out / "run.svg").exists() and (out / "model/model.safetensors").exists()
    assert "pip install -e '.[plot]'" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib.figure")
    assert train.main(argv_of(folder, out, "--steps", 2, "--overwrite")) == 0
    assert (out / "run.svg").read_text().count("<svg") == 1 and "run.svg (a figure)" in capsys.readouterr().out
