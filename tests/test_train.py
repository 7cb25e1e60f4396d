"""train.py: one step against a step written apart, what a run must never do, and the command line."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import train
from epsdpo import EpsDPOLoss, TokenStats, epsdpo_loss, linear_token_stats, next_beta
from model import GPT
from support import metrics, toy
from support.cached_reference import CachedReference
from support.checkpoint import load_model, load_safetensors, save_model
from support.device import my_micro_batches
from support.metrics import totals
from support.rows import Pair, collate, epoch_order, row_length
from support.run import Run
from tests.runs import (
    CHECKPOINT,
    VOCAB,
    argv_of,
    ended,
    flags_of,
    id_rows,
    nudged,
    pairs_of,
    pretend,
    read_metrics,
    real,
    same_bits,
    snapshot,
    steps_of,
    tiny_model,
    two_models,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("alone")
DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


# ---- the whole step, written apart: plain sequences, textbook formulas, an optimizer by hand -------------------------


def plain_step_stats(policy: GPT, reference: GPT, prompt, answer, epsilon: float):
    """log π_θ(y), log π_ref(y) and log π(y) under β⁻ and β⁺ of one response, from one plain sequence per model."""
    tokens, start = torch.tensor([[*prompt.tolist(), *answer.tolist()]]), len(prompt)
    f, labels = policy(tokens)[0, start - 1 : -1], tokens[0, start:]
    with torch.no_grad():
        f_ref = reference(tokens)[0, start - 1 : -1]

    def logp(logits):
        return logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum()

    with torch.no_grad():
        minus, plus = (logp((1 + s) * f - s * f_ref) for s in (epsilon, -epsilon))
    return logp(f), logp(f_ref), minus, plus


def plain_training(policy: GPT, reference: GPT, pairs, order, flags: train.Flags):
    """Losses, the β of each step and grad norms; `policy` is trained in place. `order`: the pairs' indices by step."""
    parameters = list(policy.parameters())
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    beta, losses, betas, norms, steps = flags.beta, [], [], [], len(order)
    for t, indices in enumerate(order, 1):
        loss, perturbed = 0.0, []
        for i in indices:
            pair = pairs[i]
            w = plain_step_stats(policy, reference, pair.prompt, pair.chosen, flags.epsilon_check)
            l = plain_step_stats(policy, reference, pair.prompt, pair.rejected, flags.epsilon_check)
            z, z_ref, z_minus, z_plus = (a - b for a, b in zip(w, l))
            if z_minus > z.detach() + 1e-13 and z.detach() > z_plus + 1e-13:
                own = beta / (1 + flags.epsilon_step)
            elif z_minus < z.detach() - 1e-13 and z.detach() < z_plus - 1e-13:
                own = beta / (1 - flags.epsilon_step)
            else:
                own = beta
            perturbed.append(own)
            loss = loss - F.logsigmoid(own * (z - z_ref)) / len(indices)
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        warmup = math.ceil(Decimal(str(flags.warmup)) * steps)  # as written: 0.07 of 100 is 7
        if t <= warmup:
            rate = flags.lr * t / warmup
        else:
            rate = flags.lr * 0.5 * (1 + math.cos(math.pi * (t - 1 - warmup) / (steps - warmup)))
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, first, second):
                g = g * min(1.0, flags.clip / (norm + 1e-6))
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.mul_(1 - rate * flags.weight_decay)
                p.sub_(rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
        losses.append(float(loss.detach()))
        betas.append(beta)
        norms.append(norm)
        beta = sum(perturbed) / len(perturbed)
    return losses, betas, norms


@pytest.mark.parametrize(
    "epsilon_check, epsilon_step", [(0.05, 0.05), (0.2, 0.02), (0.01, 0.5), (0.1, 0.0), (0.0, 0.3)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_the_loop_is_the_method(epsilon_check, epsilon_step, tied):
    pairs = pairs_of(id_rows(11))
    flags = flags_of(
        epsilon_check=epsilon_check, epsilon_step=epsilon_step, epochs=2, warmup=0.3, clip=0.2, weight_decay=0.1
    )
    reference = tiny_model(tied=tied).double()
    policy, by_hand = nudged(reference), nudged(reference)
    before = copy.deepcopy(reference)
    lines = train.train(policy, reference, pairs, flags)
    order = [o[i : i + 4] for o in (epoch_order(11, 0, epoch) for epoch in range(2)) for i in (0, 4, 8)]
    losses, betas, norms = plain_training(by_hand, reference, pairs, order, flags)
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-9)
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-8)
    assert [line["beta"] for line in lines] == pytest.approx(betas, rel=1e-14)
    assert len(set(betas)) > 1 or epsilon_check == 0 or epsilon_step == 0
    for (name, a), b in zip(policy.named_parameters(), by_hand.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)
    assert same_bits(reference, before)


# ---- no extra forward pass -------------------------------------------------------------------------------------------


def count_calls(model: GPT) -> dict[str, int]:
    """Counts what runs: the model as a whole, its embedding, each layer and its norms, whoever calls them."""
    calls: dict[str, int] = {}

    def counter(name):
        def count(*_):
            calls[name] = calls.get(name, 0) + 1

        return count

    parts = {"model": model, "embedding": model.model.embed_tokens, "norm": model.model.norm}
    parts |= {f"layer {i}": layer for i, layer in enumerate(model.model.layers)}
    for name, module in parts.items():
        module.register_forward_pre_hook(counter(name))
    return calls


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("epsilon", [{"epsilon": 0.0}, {"epsilon": 0.01}, {"epsilon_check": 0.9, "epsilon_step": 0.5}])
def test_one_forward_of_each_model_per_micro_batch_whatever_epsilon(epsilon, dtype, monkeypatch):
    pairs, micro = pairs_of(id_rows(10)), []
    monkeypatch.setattr(train, "collate", lambda group: micro.append(len(group)) or collate(group))
    policy, reference = two_models()
    calls = [count_calls(m) for m in (nudged(policy), reference)]
    models = nudged(policy), reference
    calls = [count_calls(m) for m in models]
    train.train(*models, pairs, flags_of(steps=3, dtype=dtype, **epsilon))
    assert sum(micro) == 4 + 4 + 2 and len(micro) > 3
    assert [set(c.values()) for c in calls] == [{len(micro)}, {len(micro)}]
    assert all(len(c) == 5 for c in calls)


# ---- step 0 is exactly zero ------------------------------------------------------------------------------------------


def assert_nothing_has_moved(policy, reference, pairs, dtype, **given):
    flags = flags_of(steps=1, batch_size=len(pairs), dtype=dtype, **given)
    for group in my_micro_batches(pairs, flags.micro_tokens):
        with torch.no_grad():
            sums = train.score_pairs(policy, reference, collate(group), flags.epsilon_check, dtype)
        for stats in sums:
            assert not stats.delta_minus.any() and not stats.delta_plus.any() and not stats.kl.any()
            assert torch.equal(stats.logp, stats.ref_logp)
    lines = train.train(policy, reference, pairs, flags, eval_pairs=pairs)
    for line, prefix in ((lines[0], "eval/"), (lines[1], "")):
        assert line[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-15)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl"):
            assert line[prefix + name] == 0.0, name
        assert [line[f"{prefix}steps/{name}"] for name in ("lower", "keep", "raise")] == [0.0, 1.0, 0.0]
    assert lines[1]["grad_norm"] > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"model_type": "mistral", "sliding_window": 3}])
def test_step_0_is_exactly_zero(dtype, options):
    assert_nothing_has_moved(*two_models(**options), pairs_of(id_rows(13)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_step_0_is_exactly_zero_on_the_toy(dtype, quick_toy):
    problem = toy.make_problem(pairs=64, eval_pairs=0)
    assert_nothing_has_moved(copy.deepcopy(problem.reference), problem.reference, problem.pairs, dtype, beta=0.5)


@pytest.mark.parametrize(
    "dtype, n, longest",
    [
        pytest.param("float32", 3, 8, marks=real),
        pytest.param("float32", 5, 20, marks=[*real, pytest.mark.slow]),
        pytest.param("bfloat16", 5, 20, marks=[*real, pytest.mark.slow]),
    ],
)
def test_step_0_is_exactly_zero_on_a_real_checkpoint(dtype, n, longest):
    policy, reference = (load_model(CHECKPOINT) for _ in range(2))
    pairs = pairs_of(id_rows(n, vocab=policy.config.vocab_size, longest=longest))
    assert_nothing_has_moved(policy, reference, pairs, dtype, beta=0.01, lr=1e-6)


# ---- means -----------------------------------------------------------------------------------------------------------

SPLITS = {"3": 1000, "2+1": 30, "1+1+1": 1}  # tokens in a micro-batch that split three rows of 12 so


def three_pairs():
    rows = [{"prompt": [i, 5, 6, 7], "chosen": [8, 9, i, 1], "rejected": [3, 2, i, 4]} for i in range(3)]
    return pairs_of(rows)


def recorded_gradients(monkeypatch) -> list[list[torch.Tensor]]:
    """What the optimizer is given at each step."""
    steps, original = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        steps.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_split_of_a_batch_is_the_same_step(dtype, monkeypatch):
    pairs, found = three_pairs(), {}
    for name, tokens in SPLITS.items():
        assert sorted(len(g) for g in my_micro_batches(pairs, tokens)) == sorted(map(int, name.split("+")))
        gradients = recorded_gradients(monkeypatch)
        reference = tiny_model().to(dtype)
        lines = train.train(nudged(reference), reference, pairs, flags_of(steps=3, batch_size=3, micro_tokens=tokens))
        found[name] = lines, gradients
        monkeypatch.undo()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name in ("2+1", "1+1+1"):
        for line, whole in zip(found[name][0], found["3"][0]):
            assert line["beta"] == whole["beta"]
            assert line.keys() == whole.keys()
            for key in line.keys() - {"seconds", "tokens_per_second", "memory_gb"}:
                assert line[key] == pytest.approx(whole[key], rel=100 * tolerance, abs=tolerance), key
        for a, b in zip(found[name][1][0], found["3"][1][0]):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
    assert len({line["beta"] for line in found["3"][0]}) == 3


class Told(train.EpsDPO):
    """Losses and steps that the test says, looked up by a pair's first token; every β that was used is kept."""

    def tell(self, losses, steps):
        self.told, self.used = (torch.tensor(losses, dtype=torch.float64), torch.tensor(steps)), []
        return self

    def loss(self, chosen, rejected, batch):
        which = batch.tokens[:, 0]
        losses, step = (x[which] for x in self.told)
        self.used.append(self.beta)
        losses = losses + 0 * chosen.logp
        zero = torch.zeros_like(losses.detach())
        return EpsDPOLoss(losses.mean(), losses, zero + self.beta, step, zero)


@pytest.mark.parametrize("tokens", SPLITS.values(), ids=SPLITS)
def test_means_are_over_the_whole_batch(tokens):
    method = Told(0.1, 0.01, 0.01).tell([0.6, 0.7, 0.9], [1, 1, -1])
    lines = train.train(*two_models(), three_pairs(), flags_of(steps=2, batch_size=3, micro_tokens=tokens), method)
    assert lines[0]["loss"] == pytest.approx(0.7333333333333333, rel=1e-12)
    assert [lines[0][f"steps/{x}"] for x in ("lower", "keep", "raise")] == pytest.approx([2 / 3, 0, 1 / 3])
    assert lines[0]["beta"] == 0.1 and lines[1]["beta"] == pytest.approx(0.0996766343, abs=5e-11)
    assert lines[1]["beta"] == next_beta(0.1, 2, 0, 1, 0.01)
    micro = len(method.used) // 2
    assert method.used == [0.1] * micro + [lines[1]["beta"]] * micro  # the old one in all micro-batches of a step


def test_a_last_partial_batch_is_divided_by_its_own_count():
    order, losses = epoch_order(3, 0, 0), [0.6, 0.7, 0.9]
    method = Told(0.1, 0.01, 0.01).tell(losses, [1, 1, 1])
    lines = train.train(*two_models(), three_pairs(), flags_of(batch_size=2, micro_tokens=1), method)
    by_hand = [(losses[order[0]] + losses[order[1]]) / 2, losses[order[2]]]
    assert [line["loss"] for line in lines] == pytest.approx(by_hand, rel=1e-12)
    assert [line["steps/lower"] for line in lines] == [1.0, 1.0]
    assert method.beta == pytest.approx(0.1 / 1.01**2, rel=1e-15)
    assert [line["epoch"] for line in lines] == [0.5, 1.0]


def test_beta_is_a_python_float_that_small_steps_move():
    method = Told(0.1, 1e-5, 1e-5).tell([0.6, 0.7, 0.9], [1, 0, 0])
    train.train(*two_models(), three_pairs(), flags_of(steps=1, batch_size=3, dtype="bfloat16"), method)
    assert type(method.beta) is float and 0.0999996 < method.beta < 0.0999998


# ---- ε_s = 0 is plain DPO --------------------------------------------------------------------------------------------


class PlainDPO(train.EpsDPO):
    """DPO, and no other word: −log σ(β·margin)."""

    def loss(self, chosen: TokenStats, rejected: TokenStats, batch) -> EpsDPOLoss:
        margin = (chosen.logp - chosen.ref_logp) - (rejected.logp - rejected.ref_logp)
        losses = -F.logsigmoid(self.beta * margin)
        still = torch.zeros(len(margin), dtype=torch.int64)
        return EpsDPOLoss(losses.mean(), losses, still + self.beta, still, margin.detach())

    def after_step(self, sums, policy, reference):
        pass


@pytest.mark.parametrize("epsilon_check", [0.0, 0.05, 0.9])
def test_no_step_size_is_plain_dpo_to_the_bit(epsilon_check):
    pairs, flags = pairs_of(id_rows(11)), flags_of(epochs=3, epsilon_check=epsilon_check, epsilon_step=0.0)
    runs = []
    for method in (None, PlainDPO(0.1, epsilon_check, 0.0)):
        policy, reference = two_models()
        lines = train.train(policy, reference, pairs, flags, method, eval_pairs=pairs[:3])
        runs.append((policy, lines))
    assert same_bits(runs[0][0], runs[1][0])
    for ours, plain in zip(*(steps_of(lines) for _, lines in runs)):
        assert [ours[k] for k in ("loss", "grad_norm", "beta", "kl")] == [
            plain[k] for k in ("loss", "grad_norm", "beta", "kl")
        ]
        assert ours["beta"] == 0.1
    moved = [line["steps/keep"] for line in runs[0][1][2:] if "loss" in line]
    assert epsilon_check == 0 or min(moved) < 1  # the check still decides, and is logged


# ---- schedule --------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 60), st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(0, 1)), st.floats(1e-9, 1))
def test_the_schedule_warms_up_from_above_zero_and_never_rises_again(steps, warmup, lr):
    flags = flags_of(lr=lr, warmup=warmup)
    rates = [train.learning_rate(step, steps, flags) for step in range(steps + 5)]
    assert 0 < rates[0] <= lr and all(0 <= r <= lr * (1 + 1e-12) for r in rates)
    assert max(rates) == pytest.approx(lr) and rates[steps - 1] > 0
    top = rates.index(max(rates))
    assert all(a <= b for a, b in zip(rates[:top], rates[1 : top + 1]))
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :]))
    if warmup < 1:
        assert all(r <= 1e-15 * lr for r in rates[steps:]) or math.ceil(warmup * steps) == steps


def test_the_schedule_in_numbers():
    rates = [train.learning_rate(step, 5, flags_of(lr=1.0, warmup=0.4)) for step in range(7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.25, 0.0, 0.0], abs=1e-15)
    assert [train.learning_rate(step, 1, flags_of(lr=1.0, warmup=0.0)) for step in (0, 1, 2)] == pytest.approx(
        [1, 0, 0]
    )


def test_warmup_is_the_share_that_is_written():
    """0.07 · 100 is 7.000000000000001 in floats."""
    rates = [train.learning_rate(step, 100, flags_of(lr=1.0, warmup=0.07)) for step in range(9)]
    assert rates[:8] == pytest.approx([1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1, 1]) and rates[8] < 1


def test_the_loop_counts_the_schedule_in_optimizer_steps(monkeypatch):
    used, original = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *a: used.append(self.param_groups[0]["lr"]) or original(self, *a)
    )
    flags = flags_of(lr=1.0e-3, warmup=0.4, batch_size=2, epochs=1, micro_tokens=1)
    lines = train.train(*two_models(), pairs_of(id_rows(10)), flags)
    expected = [1e-3 * x for x in (0.5, 1.0, 1.0, 0.75, 0.25)]
    assert used == pytest.approx(expected) and [line["learning_rate"] for line in lines] == pytest.approx(expected)


# ---- weights, reference, optimizer -----------------------------------------------------------------------------------


def watched(monkeypatch) -> dict:
    """The models, pairs and optimizer of a run through the command line."""
    seen, original, optimizer = {}, train.train, train.AdamW

    def spy(policy, reference, pairs, *args, **kwargs):
        seen.update(policy=policy, reference=reference, pairs=pairs, first=copy.deepcopy(reference))
        return original(policy, reference, pairs, *args, **kwargs)

    def make(parameters, *args, **kwargs):
        seen["optimizer"] = optimizer(parameters, *args, **kwargs)
        return seen["optimizer"]

    monkeypatch.setattr(train, "train", spy)
    monkeypatch.setattr(train, "AdamW", make)
    return seen


@pytest.mark.parametrize("model", ["model", "tied"])
def test_the_reference_shares_nothing_and_does_not_change(model, folder, tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    assert train.main(argv_of(folder, tmp_path / "out", "--dtype", "bfloat16", model=model)) == 0
    policy, reference = seen["policy"], seen["reference"]
    storage = [{p.untyped_storage().data_ptr() for p in m.parameters()} for m in (policy, reference)]
    assert not storage[0] & storage[1]
    assert same_bits(reference, seen["first"]) and not same_bits(reference, policy)
    assert all(p.grad is None and not p.requires_grad for p in reference.parameters())
    trained = {id(p) for group in seen["optimizer"].param_groups for p in group["params"]}
    assert trained == {id(p) for p in policy.parameters()}
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    changed = [
        name for name, p in policy.named_parameters() if not torch.equal(p, dict(reference.named_parameters())[name])
    ]
    assert len(changed) == len(list(policy.parameters()))  # the head too, tied or not


def test_a_reference_that_shares_weights_with_the_policy_is_refused():
    policy, reference = two_models()
    reference.model.norm.weight.data = policy.model.norm.weight.data
    for other in (reference, policy):
        with pytest.raises(ValueError, match="reference shares"):
            train.train(policy, other, pairs_of(id_rows(4)), flags_of())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_gradient_checkpointing_saves_memory_and_changes_no_bit(dtype):
    found = []
    for keep in (False, True):
        policy, reference = two_models()
        calls = count_calls(policy)
        lines = train.train(
            policy, reference, pairs_of(id_rows(9)), flags_of(gradient_checkpointing=keep, dtype=dtype), None, ()
        )
        found.append((policy, [line["loss"] for line in lines], calls))
    assert same_bits(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert found[1][2]["layer 0"] == 2 * found[0][2]["layer 0"] and found[1][2]["model"] == found[0][2]["model"]


class _NewTables(TorchDispatchMode):
    """How many tensors of the output matrix's shape were made, views and results in place aside."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape == (VOCAB + 5, 16):
            self.count += out.untyped_storage().data_ptr() not in given
        return out


def by_score_pairs(policy, reference, groups, n, method, flags, in_place):
    for pairs in groups:
        sums = train.score_pairs(policy, reference, collate(pairs), method.epsilon_check, flags.dtype, in_place)
        (method.loss(*sums, None).losses.sum() / n).backward()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_tables_are_added_in_place_and_are_those_of_autograd(tied, dtype, checkpointing):
    reference = tiny_model(tied=tied, vocab_size=VOCAB + 5)
    policy, other = nudged(reference), nudged(reference)
    policy.gradient_checkpointing = other.gradient_checkpointing = checkpointing
    method, flags = train.EpsDPO(0.1, 0.01, 0.01), flags_of(dtype=dtype)
    groups = [pairs_of(id_rows(5, seed=seed)) for seed in range(3)]
    with _NewTables() as made:
        train.run_batch(policy, reference, groups[:1], 15, method, flags)
    first = made.count
    assert first == (1 if tied else 2)  # the gradients of the embedding and of the output matrix
    with _NewTables() as made:
        train.run_batch(policy, reference, groups[1:], 15, method, flags)
    assert made.count == 0
    with _NewTables() as made:
        by_score_pairs(other, reference, groups, 15, method, flags, False)
    assert made.count > first  # or counting would prove nothing
    for a, b in zip(policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6 * float(b.grad.abs().max()))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_tables_have_the_same_bits_every_time(tied):
    """Six tokens, each many times in a batch: threads that add to one row in any order would round differently."""
    threads, found = torch.get_num_threads(), []
    reference = tiny_model(tied=tied, hidden_size=256)
    policy, pairs = nudged(reference), pairs_of(id_rows(40, vocab=6, longest=40))
    torch.set_num_threads(max(2, threads))
    try:
        for _ in range(5):
            policy.zero_grad()
            train.run_batch(policy, reference, [pairs], 40, train.EpsDPO(0.1, 0.01, 0.01), flags_of())
            found.append(policy.model.embed_tokens.weight.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_frozen_embedding_gets_no_gradient_in_place():
    policy, reference = two_models()
    policy.model.embed_tokens.requires_grad_(False)
    by_score_pairs(policy, reference, [pairs_of(id_rows(4))], 4, train.EpsDPO(0.1, 0.01, 0.01), flags_of(), True)
    assert policy.model.embed_tokens.weight.grad is None and policy.lm_head.weight.grad.norm() > 0


def test_score_pairs_alone_leaves_gradients_to_autograd():
    """The usual order, in which zero_grad comes between the forward and the backward pass, must lose nothing."""
    (policy, reference), batch = two_models(tied=True), collate(pairs_of(id_rows(4)))
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    for _ in range(2):
        chosen, rejected = train.score_pairs(policy, reference, batch, 0.01, "float32")
        loss = epsdpo_loss(chosen, rejected, 0.1, 0.01).loss
        wanted = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(policy.parameters(), wanted, strict=True))


def test_nothing_stays_on_the_policy_after_a_batch_that_failed():
    policy, reference = two_models()
    policy.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        train.run_batch(policy, reference, [pairs_of(id_rows(4))], 4, train.EpsDPO(0.1, 0.01, 0.01), flags_of())
    assert not policy.model.embed_tokens._forward_hooks


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_bfloat16_checkpoint_trains_in_float32_weights(dtype, folder, tmp_path):
    save_model(tiny_model(), tmp_path / "half", dtype=torch.bfloat16)
    argv = argv_of(folder, tmp_path / "out", "--lr", "5e-7", "--dtype", dtype, model=str(tmp_path / "half"))
    assert train.main(argv) == 0
    before, after = (load_safetensors(p / "model.safetensors") for p in (tmp_path / "half", tmp_path / "out/model"))
    assert {t.dtype for t in before.values()} == {torch.bfloat16} and {t.dtype for t in after.values()} == {
        torch.float32
    }
    norms = [name for name in after if name.endswith("norm.weight")]  # near 1: bfloat16 would not move them at all
    moved = torch.cat([(after[n] != before[n].float()) for n in norms])
    assert moved.float().mean() > 0.95
    assert max(float((after[n] - before[n].float()).abs().max()) for n in after) < 12 * 5e-7 * 1.5


def test_the_head_is_computed_in_float32_under_autocast():
    reference = tiny_model()
    policy, batch = nudged(reference), collate(pairs_of(id_rows(6)))
    found = train.score_pairs(policy, reference, batch, 0.05, "bfloat16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        where = (batch.tokens, batch.positions, batch.segments, batch.source)
        hidden = [m(*where, lambda h, w: (h.double(), w.double())) for m in (policy, reference)]
    exact = linear_token_stats(*hidden[0], *hidden[1], batch.label, 0.05)
    sums = [torch.zeros(12, dtype=torch.float64).index_add(0, batch.owner, x.double()) for x in exact]
    for name, ours, theirs in zip(TokenStats._fields, zip(*found), sums):
        ours = torch.cat(ours[:2])
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()), msg=name)


# ---- float16 ---------------------------------------------------------------------------------------------------------


class Loud(train.EpsDPO):
    """Its loss is 10⁷ times larger than β says."""

    def loss(self, chosen, rejected, batch):
        out = super().loss(chosen, rejected, batch)
        return out._replace(losses=1e7 * out.losses)


@pytest.mark.parametrize("beta, kind", [(1e-7, train.EpsDPO), (0.1, train.EpsDPO), (1e4, train.EpsDPO), (0.1, Loud)])
def test_float16_gradients_neither_vanish_nor_overflow(beta, kind, monkeypatch):
    seen, scales = {}, []
    run_batch, clip = train.run_batch, torch.nn.utils.clip_grad_norm_

    def clipped(parameters, norm):
        parameters = list(parameters)
        seen[dtype] = [p.grad.clone() for p in parameters]
        return clip(parameters, norm)

    monkeypatch.setattr(train, "run_batch", lambda *args: scales.append(args[6]) or run_batch(*args))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    for dtype in ("float32", "float16"):
        flags, method = flags_of(dtype=dtype, steps=1), kind(beta, 0.01, 0.01)
        lines = train.train(*two_models(), pairs_of(id_rows(4)), flags, method)
    for found, wanted in zip(seen["float16"], seen["float32"]):
        assert wanted.norm() > 0 and (found - wanted).norm() < 0.02 * wanted.norm()
    assert scales[:2] == [1, 2 ** round(math.log2(4 / beta))]
    assert lines[0]["loss_scale"] == scales[-1]
    assert len(scales) == 2 if kind is train.EpsDPO else 7 > len(scales) > 2 and scales[2] == scales[1] / 16


@pytest.mark.parametrize("what, tries", [("gradient", 6), ("loss", 1)])
def test_overflow_at_every_loss_scale_is_an_error_before_the_optimizer_step(what, tries, monkeypatch):
    calls, run_batch, loss = [], train.run_batch, train.EpsDPO.loss
    monkeypatch.setattr(train, "run_batch", lambda *args: calls.append(1) or run_batch(*args))
    policy, reference = two_models()
    before = copy.deepcopy(policy)
    if what == "gradient":
        policy.model.norm.weight.register_hook(lambda g: torch.full_like(g, math.inf))
    else:

        def spoiled(self, *args):
            out = loss(self, *args)
            return out._replace(losses=out.losses * math.inf)

        monkeypatch.setattr(train.EpsDPO, "loss", spoiled)
    with pytest.raises(ValueError, match=r"step 1, rows ids:\d.*float16 overflows above 65504"):
        train.train(policy, reference, pairs_of(id_rows(4)), flags_of(dtype="float16"))
    assert len(calls) == tries and same_bits(policy, before)


# ---- what is not finite ----------------------------------------------------------------------------------------------


def poison(policy: GPT, at: int, what: str, bad: float) -> None:
    """Make one number of a run not finite in its forward or backward number `at`, from 1."""
    calls = {"n": 0}

    def on_hidden(module, inputs, output):
        calls["n"] += 1
        if calls["n"] != at:
            return None
        if what == "gradient":
            output.register_hook(lambda g: torch.full_like(g, bad))
            return None
        return output * bad

    policy.model.norm.register_forward_hook(on_hidden)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["gradient", "logits"])
def test_a_number_that_is_not_finite_stops_the_run_before_the_optimizer_step(what, bad, tmp_path):
    pairs = pairs_of(id_rows(12))
    flags = flags_of(save_every=1, micro_tokens=1000)
    undisturbed, reference = two_models()
    train.train(undisturbed, reference, pairs, flags_of(steps=2, save_every=1, micro_tokens=1000, epochs=1))
    policy = tiny_model()
    poison(policy, 3, what, bad)
    saved = {}
    original = Run.save

    def save(self):
        original(self)
        saved[self.done] = (tmp_path / "checkpoint.pt").read_bytes()

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Run, "save", save)
        with pytest.raises(ValueError, match="step 3") as error:
            train.train(policy, reference, pairs, flags, run=Run(tmp_path, flags))
    rows = re.findall(r"ids:(\d+)", str(error.value))
    third = {pairs[i].line for i in epoch_order(12, 0, 0)[8:12]}
    assert rows and set(map(int, rows)) <= third and "step 2" in str(error.value)
    assert list(saved) == [1, 2] and (tmp_path / "checkpoint.pt").read_bytes() == saved[2]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert all(p.isfinite().all() for p in policy.parameters())
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert same_bits(dict(state["weights"]), policy.state_dict())  # no step was taken since


def test_rows_with_logits_that_are_not_finite_are_named(tmp_path):
    rows = id_rows(16, vocab=VOCAB - 1)
    rows[6]["chosen"] = [VOCAB - 1, *rows[6]["chosen"]]  # alone has this token
    policy, reference = two_models()
    with torch.no_grad():
        policy.model.embed_tokens.weight[VOCAB - 1] = math.nan
        policy.lm_head.weight[VOCAB - 1] = 0.0
    flags = flags_of(batch_size=16, micro_tokens=40)
    with pytest.raises(ValueError, match="ids:7[^0-9]") as error:
        train.train(policy, reference, pairs_of(rows), flags, run=Run(tmp_path, flags))
    assert "step 1" in str(error.value) and "no checkpoint" in str(error.value)
    assert not (tmp_path / "checkpoint.pt").exists() and read_metrics(tmp_path) == []


@pytest.mark.parametrize("margin", [1e4, -1e4, 1e300, -1e300, 0.0])
def test_the_loss_of_far_margins_is_finite(margin):
    def sums(x):
        zero = torch.zeros(1, dtype=torch.float64)
        return TokenStats(torch.tensor([x], dtype=torch.float64, requires_grad=True), zero, zero, zero, zero)

    chosen = sums(margin)
    out = epsdpo_loss(chosen, sums(0.0), 1.0, 0.01)
    out.loss.backward()
    assert (
        float(out.loss.detach()) == pytest.approx(max(0.0, -margin) if margin else math.log(2))
        and chosen.logp.grad.isfinite()
    )


# ---- what is logged --------------------------------------------------------------------------------------------------


def stats_of(logp, ref_logp) -> TokenStats:
    logp, ref_logp = (torch.tensor(x, dtype=torch.float64) for x in (logp, ref_logp))
    return TokenStats(logp, ref_logp, *torch.zeros(3, len(logp), dtype=torch.float64))


def test_rewards_in_numbers():
    batch = collate(
        pairs_of(
            [{"prompt": [1], "chosen": [2, 3, 4], "rejected": [5]}, {"prompt": [1], "chosen": [2], "rejected": [5, 6]}]
        )
    )
    chosen, rejected = stats_of([-10.0, -1.0], [-12.0, -1.0]), stats_of([-9.0, -2.0], [-9.0, -2.0])
    out = epsdpo_loss(chosen, rejected, 0.1, 0.01)
    sums = {k: float(v) for k, v in totals(out, chosen, rejected, batch, 0.1).items()}
    assert float(out.losses[0]) == pytest.approx(0.5981389, abs=5e-8)
    assert sums["rewards/chosen"] == pytest.approx(0.2) and sums["rewards/rejected"] == 0.0
    assert sums["rewards/margins"] == pytest.approx(0.2)
    assert sums["rewards/accuracies"] == 1  # the second pair is a tie, which is wrong
    assert (sums["lengths/chosen"], sums["lengths/rejected"]) == (4, 3)
    assert (sums["logps/chosen"], sums["logps/rejected"]) == (-11, -11)


def test_a_metrics_line_describes_the_step_that_it_names(folder, tmp_path):
    assert train.main(argv_of(folder, tmp_path / "out", "--eval-every", 5)) == 0
    lines = read_metrics(tmp_path / "out", timing=True)  # strict JSON
    steps = steps_of(lines)
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 5, 10, 12]
    assert all(set(line) == set(steps[0]) for line in steps)
    assert steps[0]["beta"] == 0.1  # the β that was used in this step
    sizes = [8, 8, 8, 7] * 3
    for line, after, n in zip(steps, steps[1:], sizes):
        counts = [round(line[f"steps/{name}"] * n) for name in ("lower", "keep", "raise")]
        assert sum(counts) == n
        assert after["beta"] == next_beta(line["beta"], *counts, 0.05)
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"])
    assert len({line["beta"] for line in steps}) > 5
    rows = [json.loads(x) for x in (folder / "ids.jsonl").read_text().splitlines()]
    mean = {k: sum(len(r[k]) for r in rows) for k in ("prompt", "chosen", "rejected")}
    for name in ("chosen", "rejected"):
        assert sum(line[f"lengths/{name}"] * n for line, n in zip(steps[:4], sizes)) == pytest.approx(mean[name])
    assert sum(line["tokens"] for line in steps[:4]) == sum(mean.values())


@pytest.mark.parametrize("step", [1, -1])
def test_a_beta_that_runs_away_is_reported_once(step, capsys):
    method = Told(0.1, 0.5, 0.5).tell([0.6, 0.7, 0.9], [step] * 3)
    train.train(*two_models(), three_pairs(), flags_of(steps=20, batch_size=3), method)
    warnings = [line for line in "".join(capsys.readouterr()).splitlines() if "β went" in line]
    assert len(warnings) == 1 and "--epsilon" in warnings[0]


def test_an_all_zero_first_gradient_is_a_warning_that_names_the_causes(capsys):
    policy, reference = two_models()
    with torch.no_grad():
        for m in (policy, reference):  # a body that says nothing, so nothing can be learned
            m.model.norm.weight.zero_()
            m.model.embed_tokens.weight.zero_()
    train.train(policy, reference, pairs_of(id_rows(4)), flags_of(steps=1))
    first = "".join(capsys.readouterr())
    assert "gradient is all zero" in first and "frozen" in first and "reference" in first and "equal" in first
    train.train(*two_models(), pairs_of(id_rows(4)), flags_of(steps=1))
    assert "all zero" not in "".join(capsys.readouterr())


# ---- randomness ------------------------------------------------------------------------------------------------------


def orders(monkeypatch, n: int, **given) -> list[list[int]]:
    """The lines of the pairs that each step got."""
    seen, original = [], train.my_micro_batches

    def spy(pairs, tokens):
        seen.append([pair.line for pair in pairs])
        return original(pairs, tokens)

    with monkeypatch.context() as m:
        m.setattr(train, "my_micro_batches", spy)
        train.train(*two_models(), pairs_of(id_rows(n)), flags_of(**given))
    return seen


def test_the_order_is_a_function_of_seed_and_epoch_alone(monkeypatch):
    first = orders(monkeypatch, 11, epochs=3)
    torch.manual_seed(99)
    assert first == orders(monkeypatch, 11, epochs=3, micro_tokens=1, lr=1e-5, epsilon=0.0)
    assert first[:3] == orders(monkeypatch, 11, epochs=1) and first[:5] == orders(monkeypatch, 11, steps=5)
    assert first != orders(monkeypatch, 11, epochs=3, seed=1)
    epochs = [sum(first[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(1, 12)) for epoch in epochs)  # each pair once an epoch
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    lengths = [row_length(p) for p in pairs_of(id_rows(60))]
    spread = [[lengths[i - 1] for i in batch] for batch in orders(monkeypatch, 60, epochs=1, batch_size=6)]
    assert sum(max(b) - min(b) for b in spread) / len(spread) > 8  # drawn at random, not sorted by length


def test_evaluation_leaves_no_trace_in_training(folder, tmp_path):
    outs = []
    for name, more in {"never": [], "always": ["--eval-every", 1]}.items():
        torch.manual_seed(0)
        assert train.main(argv_of(folder, tmp_path / name, *more)) == 0
        outs.append(tmp_path / name)
    assert snapshot(outs[0] / "model") == snapshot(outs[1] / "model")
    assert steps_of(read_metrics(outs[0])) == steps_of(read_metrics(outs[1]))
    without, reference = two_models()
    pairs = pairs_of(id_rows(31))
    state = torch.get_rng_state()
    lines = train.train(without, reference, pairs, flags_of(epochs=1))
    with_eval = tiny_model()
    torch.set_rng_state(state)
    more = train.train(
        with_eval, reference, pairs, flags_of(epochs=1, eval_every=2), eval_pairs=pairs_of(id_rows(9, seed=5))
    )
    assert same_bits(without, with_eval)
    assert [line["loss"] for line in lines] == [line["loss"] for line in steps_of(more)]
    torch.set_rng_state(state)
    train.evaluate(with_eval, reference, pairs, train.EpsDPO(0.1, 0.05, 0.05), flags_of())
    assert torch.equal(torch.get_rng_state(), state) and all(
        p.grad is None or not p.grad.any() for p in with_eval.parameters()
    )


def test_evaluation_in_numbers():
    reference = tiny_model().double()
    policy, pairs = nudged(reference, 0.1), pairs_of(id_rows(20))
    method = train.EpsDPO(0.1, 0.05, 0.05)
    found = train.evaluate(policy, reference, pairs, method, flags_of())
    margins, kl, logps = [], 0.0, [0.0, 0.0]
    with torch.no_grad():
        for pair in pairs:
            both = [plain_step_stats(policy, reference, pair.prompt, y, 0.05) for y in (pair.chosen, pair.rejected)]
            w, l = both
            margins.append(0.1 * float((w[0] - w[1]) - (l[0] - l[1])))
            for i, answer in enumerate((pair.chosen, pair.rejected)):
                tokens = torch.tensor([[*pair.prompt.tolist(), *answer.tolist()]])
                p, q = (m(tokens)[0, len(pair.prompt) - 1 : -1].log_softmax(-1) for m in (policy, reference))
                kl += float((p.exp() * (p - q)).sum()) / 40  # a mean over responses of sums over tokens
                logps[i] += float(both[i][0]) / 20
    margins = torch.tensor(margins, dtype=torch.float64)
    accuracy = float((margins > 0).double().mean())
    assert found["eval/pairs"] == 20 and found["eval/rewards/accuracies"] == accuracy
    assert found["eval/rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-9)
    assert found["eval/kl"] == pytest.approx(kl, rel=1e-9) and kl > 0
    assert [found["eval/logps/chosen"], found["eval/logps/rejected"]] == pytest.approx(logps, rel=1e-9)
    assert found["eval/lengths/chosen"] == sum(len(pair.chosen) for pair in pairs) / 20
    assert found["eval/rewards/margins_se"] == pytest.approx(float(margins.std(correction=0)) / math.sqrt(20), rel=1e-6)
    assert found["eval/rewards/accuracies_se"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 20))
    assert method.beta == 0.1  # looking changes nothing


def decisions_by_hand(policy: GPT, reference: GPT, pairs: list[Pair], epsilon: float) -> list[int]:
    """1 lower, -1 raise, 0 keep, from plain sequences in float64, each of them clear of float32's rounding."""
    policy, reference, steps = copy.deepcopy(policy).double(), copy.deepcopy(reference).double(), []
    for pair in pairs:
        w, l = (plain_step_stats(policy, reference, pair.prompt, y, epsilon) for y in (pair.chosen, pair.rejected))
        z, _, z_minus, z_plus = (float((a - b).detach()) for a, b in zip(w, l))
        assert min(abs(z_minus - z), abs(z - z_plus)) > 1e-5
        steps.append((z_minus > z > z_plus) - (z_minus < z < z_plus))
    return steps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n, compared", [(11, 11), (150, 128)])
def test_agreement_is_the_share_of_decisions_that_float32_would_make_too(n, compared, dtype):
    policy, reference, pairs = nudged(tiny_model(), 0.02), tiny_model(), pairs_of(id_rows(n))
    flags, method = flags_of(dtype=dtype), train.EpsDPO(0.1, 0.05, 0.05)
    found = train.evaluate(policy, reference, pairs, method, flags)
    ours, exact = {}, decisions_by_hand(policy, reference, pairs[:compared], 0.05)
    with torch.no_grad():
        for group in my_micro_batches(pairs[:compared], flags.micro_tokens):  # 16-bit rounding depends on the batch
            chosen, rejected = train.score_pairs(policy, reference, collate(group), 0.05, dtype)
            ours |= dict(zip((pair.line for pair in group), epsdpo_loss(chosen, rejected, 0.1, 0.05).step.tolist()))
    equal = sum(ours[pair.line] == step for pair, step in zip(pairs, exact))
    assert found["eval/steps/agree"] == equal / compared and found["eval/steps/agree_pairs"] == compared
    assert equal < compared or n == 11 or dtype == "float16"  # some differ, or there is nothing to find
    # The other numbers are of all pairs and of the 16-bit bodies.
    assert found["eval/pairs"] == n
    assert found["eval/lengths/chosen"] == pytest.approx(sum(len(pair.chosen) for pair in pairs) / n, rel=1e-12)
    assert sum(found[f"eval/steps/{name}"] for name in ("lower", "keep", "raise")) == pytest.approx(1, rel=1e-12)
    in_float32 = train.evaluate(policy, reference, pairs, method, flags_of())["eval/loss"]
    assert found["eval/loss"] == pytest.approx(in_float32, abs=0.01) and found["eval/loss"] != in_float32


@pytest.mark.parametrize(
    "why, given",
    [
        ("in float32 there is nothing to compare", {"dtype": "float32"}),
        ("without a check there are no decisions", {"dtype": "bfloat16", "epsilon_check": 0.0}),
    ],
)
def test_agreement_is_left_out(why, given):
    policy, reference = nudged(tiny_model()), tiny_model()
    flags = flags_of(**given)
    method = train.EpsDPO(0.1, flags.epsilon_check, 0.05)
    found = train.evaluate(policy, reference, pairs_of(id_rows(9)), method, flags)
    assert not any("agree" in name for name in found), why


def test_agreement_is_not_measured_before_the_first_step_nor_with_a_cached_reference(tmp_path):
    """At step 0 all deltas are 0, and a cache has the hidden states of one dtype only."""
    pairs, flags, reference = pairs_of(id_rows(9)), flags_of(dtype="bfloat16", steps=2, eval_every=1), tiny_model()
    lines = train.train(tiny_model(), reference, pairs, flags, eval_pairs=pairs)
    measured = {line["step"]: "eval/steps/agree" in line for line in lines if "eval/loss" in line}
    assert measured == {0: False, 1: True, 2: True}
    cached = CachedReference(reference, pairs, str(tmp_path), "bfloat16", 40)
    lines = train.train(tiny_model(), cached, pairs, flags, eval_pairs=pairs)
    assert not any("eval/steps/agree" in line for line in lines) and len(lines) == 5


def test_means_and_speed():
    sums = {"loss": 3.0, "kl": 1.0, "margin_squares": 2.0}
    assert metrics.means(sums, 2) == {"loss": 1.5, "kl": 0.5}
    batch = three_pairs()
    line = metrics.speed(batch, time.perf_counter() - 100)
    assert line["tokens"] == sum(len(part) for pair in batch for part in pair[:3]) and line["seconds"] >= 100
    assert line["tokens_per_second"] == line["tokens"] / line["seconds"]


def test_equal_margins_have_no_spread():
    """Their mean square less their squared mean is -1.7e-18 here."""
    sums = {"rewards/accuracies": 3.0, "rewards/margins": 3 * 0.1, "margin_squares": 3 * 0.1**2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run_batch", lambda *_: (sums, torch.zeros(3)))
        found = train.evaluate(*two_models(), three_pairs(), train.EpsDPO(0.1, 0.0, 0.0), flags_of())
    assert sums["margin_squares"] / 3 < (sums["rewards/margins"] / 3) ** 2
    assert found["eval/rewards/margins_se"] == 0.0


# ---- the command line ------------------------------------------------------------------------------------------------


def test_training_on_nothing_is_refused():
    with pytest.raises(ValueError, match="no pairs"):
        train.train(*two_models(), [], flags_of(steps=2))


def test_a_missing_file_or_folder_is_named(folder, tmp_path, capsys):
    for argv, named in (
        (argv_of(folder, tmp_path / "out", model="absent"), "absent"),
        (argv_of(folder, tmp_path / "out", data="absent.jsonl"), "absent.jsonl"),
    ):
        code, said = ended(argv, capsys)
        assert code == 2 and named in said
    (tmp_path / "file").write_text("mine")
    code, said = ended(argv_of(folder, tmp_path / "file"), capsys)
    assert code == 2 and "file" in said and (tmp_path / "file").read_text() == "mine"


def test_ids_outside_the_vocabulary_are_an_error_before_training(folder, tmp_path, capsys):
    for bad in (VOCAB, -1, 3.0, True):
        rows = id_rows(5)
        rows[3]["chosen"] = [1, bad]
        write_rows(tmp_path / "bad.jsonl", rows)
        code, said = ended(argv_of(folder, tmp_path / "out", data=str(tmp_path / "bad.jsonl")), capsys)
        assert code == 2 and "bad.jsonl:4" in said
        assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_show_prints_pairs_and_stops(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", None)
    monkeypatch.chdir(tmp_path)
    argv = ["--model", folder / "model", "--data", folder / "ids.jsonl", "--show", 3]
    assert train.main([str(a) for a in argv]) == 0
    said = capsys.readouterr().out
    assert said.count("⟦seam⟧") == 3 and "ids.jsonl:3" in said and "⟦end⟧" in said
    assert train.main([str(a) for a in [*argv, "--out", tmp_path / "out"]]) == 0
    assert not list(tmp_path.iterdir())


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_the_saved_model_opens_in_transformers_with_the_same_logits(folder, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    seen = watched(monkeypatch)
    (tmp_path / "source").mkdir()
    for file in (folder / "tied").iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "source" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    assert train.main(argv_of(folder, tmp_path / "out", model=str(tmp_path / "source"))) == 0
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out/model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, seen["policy"](tokens), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "out/model/generation_config.json").exists()
    assert same_bits(load_model(tmp_path / "out/model"), seen["policy"])


def test_a_toy_that_has_not_moved_says_so(quick_toy, capsys):
    assert train.main(["--eval-size", "8", "--batch-size", "32", "--steps", "1", "--lr", "1e-12"]) == 0
    said = capsys.readouterr().out
    assert "has nothing of the gain" in said and "nan" not in said
    assert [line["eval/pairs"] for line in read_metrics(quick_toy) if "eval/loss" in line] == [8, 8]


@pytest.mark.parametrize("world", [1, 2])
def test_samples_that_cannot_be_shown_are_refused(world, folder, tmp_path, monkeypatch, capsys):
    """Without a tokenizer, or by several processes. The default of two samples is only a wish."""
    if world == 2:
        model = Path(shutil.copytree(folder / "model", tmp_path / "model"))
        (model / "tokenizer.json").write_text("{}")
        monkeypatch.setattr(train.Tokenizer, "from_pretrained", lambda _: object())
        pretend(monkeypatch, rank=0, world=2)
    argv = argv_of(folder, tmp_path / "out", "--steps", 1, model=str(tmp_path / "model") if world == 2 else "model")
    code, said = ended([*argv, "--samples", "2"], capsys)
    assert code == 2 and "--samples needs a tokenizer.json in the checkpoint folder, and one process" in said
    assert not (tmp_path / "out").exists()
    if world == 1:
        assert train.main([*argv, "--samples", "0"]) == 0 and train.main([*argv, "--overwrite"]) == 0


def test_the_toys_dpo_is_a_run_with_epsilon_step_0(quick_toy, capsys):
    def rows(*more: str) -> dict[str, list[str]]:
        few = ["--eval-size", "8", "--batch-size", "32", "--steps", "6", "--epsilon", "0.3", "--overwrite"]
        assert train.main([*few, "--out", str(quick_toy), *more]) == 0
        return {line[:12].strip(): line.split()[1:] for line in capsys.readouterr().out.splitlines() if "%" in line}

    usual, plain = rows(), rows("--epsilon-step", "0")
    assert usual["DPO"] == plain["DPO"] == plain["ε-DPO"] != usual["ε-DPO"]
    assert (
        usual["optimum π*"] == plain["optimum π*"] and usual["optimum π*"][-1] == "0.000"
    )  # that of the β at the start


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_the_toy_ends_in_a_report(tmp_path):
    root = Path(train.__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, root / "train.py", "--steps", "12"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for line in ("reference", "ε-DPO", "DPO", "optimum π*"):
        assert re.search(rf"^{re.escape(line)} +-?[0-9.]+ ", done.stdout, re.M), done.stdout
    assert "E[reward]" in done.stdout and "win rate" in done.stdout and "after 12 steps" in done.stdout
    assert "told 768 times" in done.stdout
    assert re.search(r"β went from 0\.500 to 0\.\d+", done.stdout)
    table = {line[:12].strip(): line[12:].split() for line in done.stdout.splitlines() if line[:1] in "rεDo"}
    assert float(table["reference"][1]) == 0.0 and float(table["reference"][2]) == pytest.approx(0.5)
    assert float(table["ε-DPO"][2]) > 0.5 < float(table["DPO"][2])  # it learns, even in twelve steps
    assert float(table["optimum π*"][0]) > float(table["ε-DPO"][0])
    for name in ("reference", "ε-DPO", "DPO", "optimum π*"):
        row = table[name]
        assert float(row[-2]) == pytest.approx(float(row[0]) - 0.5 * float(row[1]), abs=2e-3), name
    lines = read_metrics(tmp_path / "out" / "toy")
    assert [line["step"] for line in steps_of(lines)] == list(range(1, 13))
    assert (tmp_path / "out/toy/model/model.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(
    "name, length, answer",
    [
        pytest.param("hh-harmless-test.jsonl.gz", 96, 64, marks=[*real, pytest.mark.slow]),
        pytest.param("chat-preferences.jsonl", 96, 64, marks=[*real, pytest.mark.slow]),
        pytest.param("chat-preferences.jsonl", 48, 8, marks=real),
    ],
)
def test_a_real_run(name, length, answer, tmp_path, monkeypatch, capsys):
    if not (DATA / name).exists():
        pytest.skip(f"no {name}")
    generate = GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda self, prompts, n, eos: generate(self, prompts, answer, eos))
    argv = ["--model", CHECKPOINT, "--data", DATA / name, "--out", tmp_path / "out", "--skip-bad-rows", "--steps", 2]
    argv += ["--batch-size", 2, "--max-length", length, "--micro-tokens", 2 * length, "--eval-size", 2, "--samples", 1]
    assert train.main([str(a) for a in [*argv, "--lr", "1e-6", "--save-every", 2]]) == 0
    said = capsys.readouterr().out
    assert "pairs kept" in said and said.count("held-out pairs: accuracy") == 2 and "before:" in said
    lines = read_metrics(tmp_path / "out")
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2)) and lines[0]["eval/steps/keep"] == 1.0
    first, second = steps_of(lines)
    assert first["loss"] == pytest.approx(math.log(2)) and first["steps/keep"] == 1.0 and first["kl"] == 0.0
    assert second["kl"] > 0 and second["grad_norm"] > 0 and second["steps/keep"] < 1
    before, after = load_model(CHECKPOINT), load_model(tmp_path / "out/model")
    assert (tmp_path / "out/model/tokenizer.json").exists() and not same_bits(before, after)


@pytest.mark.parametrize("size, held", [(0, 0), (6, 6), (100, 10)])  # at most a third of 31
def test_held_out_pairs_are_not_trained_on_and_the_same_for_every_seed(size, held, folder, tmp_path, monkeypatch):
    seen = []

    def note(policy, reference, pairs, flags, eval_pairs, run):
        seen.append([[pair.line for pair in some] for some in (pairs, eval_pairs)])
        run.method = train.EpsDPO(flags.beta, flags.epsilon_check, flags.epsilon_step)
        return [{"beta": 0.01}]

    monkeypatch.setattr(train, "train", note)
    monkeypatch.setattr(Run, "finish", lambda self: None)
    for seed in (0, 1):
        argv = ["--model", folder / "model", "--data", folder / "ids.jsonl", "--eval-size", size, "--seed", seed]
        assert train.main([str(x) for x in [*argv, "--out", tmp_path / f"{seed}"]]) == 0
    (pairs, eval_pairs), other = seen
    assert other == [pairs, eval_pairs] and len(eval_pairs) == held
    assert sorted(pairs + eval_pairs) == list(range(1, 32))


def test_a_frozen_policy_is_trained():
    policy, reference = two_models()
    before = copy.deepcopy(policy)
    train.train(policy.requires_grad_(False), reference, pairs_of(id_rows(4)), flags_of(steps=1))
    assert not same_bits(before, policy)


def test_a_gradient_left_by_an_interrupted_step_is_not_added_to_the_next():
    (policy, reference), pairs = two_models(), pairs_of(id_rows(4))
    clean = copy.deepcopy(policy)
    for p in policy.parameters():
        p.grad = torch.full_like(p, 9.0)
    for model in (policy, clean):
        train.train(model, reference, pairs, flags_of(steps=1))
    assert same_bits(policy, clean)


def test_the_check_uses_the_method_s_own_epsilon():
    reference, pairs = tiny_model(), pairs_of(id_rows(4))
    wide = train.EpsDPO(0.1, 0.5, 0.05)
    line = train.train(nudged(reference), reference, pairs, flags_of(steps=1, epsilon_check=0.0), wide)[0]
    assert line["steps/keep"] < 1  # with no check all pairs would be kept
