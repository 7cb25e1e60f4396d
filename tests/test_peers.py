"""The peers against TRL's own trainers where TRL is installed, against numbers worked out by hand elsewhere."""

import contextlib
import copy
import csv
import importlib
import math
from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from epsdpo import TokenStats, epsdpo_loss, token_stats_by_definition
from experiments import compare as comparison
from experiments import peers
from model import GPT
from support import toy
from support.rows import Pair, collate
from train import Flags, score_pairs, train

PAIRS = [
    Pair(*(np.array(ids) for ids in row))
    for row in (
        ([5, 0], [1, 2, 5], [0, 5]),
        ([5, 1], [4], [3, 3, 1, 2, 0]),
        ([5, 2], [0, 1, 2, 3, 5], [4, 5]),
        ([5, 3], [2, 5], [1, 0, 5]),
    )
]


@pytest.fixture
def models():
    torch.manual_seed(0)
    policy, reference = (GPT(toy.TOY_MODEL) for _ in range(2))
    for p in [*policy.parameters(), *reference.parameters()]:
        p.data *= 3 if p.ndim == 2 else 1
    return policy, reference


@pytest.fixture
def sums(models):
    batch = collate(PAIRS)
    return *score_pairs(*models, batch, 0.01, "float32"), batch


def stats(logps, ref_logps):
    zero = torch.zeros(len(logps), dtype=torch.float64)
    logps, ref_logps = (torch.tensor(x, dtype=torch.float64) for x in (logps, ref_logps))
    return TokenStats(logps.requires_grad_(), ref_logps, zero, zero, zero)


def batch_of(*lengths):  # (chosen, rejected) of each pair
    return collate([Pair(np.zeros(1, int), *(np.zeros(n, int) for n in two)) for two in lengths])


# ----------------------------------------------------------------------------------------------------------------------
# TRL


def trl_class(module, name):
    pytest.importorskip("trl")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:  # TRL moves its trainers about
        pytest.skip(f"no {name} in this TRL: {e}")


def one_row_a_response(pairs):
    """(2B, T) ids and completion mask, chosen ones first, plain causal rows: what TRL's models see."""
    rows = [(p.prompt, y) for y_of in ("chosen", "rejected") for p in pairs for y in [getattr(p, y_of)]]
    width = max(len(x) + len(y) for x, y in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, (x, y) in enumerate(rows):
        ids[i, : len(x) + len(y)] = torch.tensor(np.concatenate([x, y]))
        mask[i, len(x) : len(x) + len(y)] = 1
    return ids, mask


def trl_model(model):
    def forward(input_ids, labels, **_):
        labels = labels[:, 1:]
        logp = model(input_ids)[:, :-1].double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        logp = torch.where(labels >= 0, logp, 0.0)
        return SimpleNamespace(log_probs=logp, entropy=logp, mean_logits=logp, is_top1=logp > -1)

    return forward


def trl_self(**fields):
    def same(x):
        return x

    accelerator = SimpleNamespace(gather_for_metrics=same, gather=same, device="cpu")
    plain = {name: False for name in ("aux_loss_enabled", "use_weighting", "precompute_ref_logps")}
    fields = {"ld_alpha": None, "loss_weights": [1.0], "_tp_size": 1, "_total_train_tokens": 0} | plain | fields
    fake = MagicMock(accelerator=accelerator, _metrics=defaultdict(lambda: defaultdict(list)), **fields)
    fake.args.gradient_checkpointing = False
    return fake


@pytest.mark.parametrize("kind, of_trl, beta", [("dpo", "sigmoid", 0.3), ("ipo", "ipo", 0.2)])
def test_dpo_and_ipo_are_trls(models, kind, of_trl, beta):
    """TRL's IPO is of means over tokens: the same where responses have one token."""
    trainer = trl_class("trl.trainer.dpo_trainer", "DPOTrainer")
    pairs = [p._replace(chosen=p.chosen[:1], rejected=p.rejected[:1]) for p in PAIRS] if kind == "ipo" else PAIRS
    batch = collate(pairs)
    ours = peers.Peer(beta, kind).loss(*score_pairs(*models, batch, 0.0, "float32"), batch)
    ids, mask = one_row_a_response(pairs)
    fake = trl_self(beta=beta, loss_types=[of_trl], f_divergence_type="reverse_kl", ref_model=trl_model(models[1]))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    theirs = trainer._compute_loss(fake, trl_model(models[0]), inputs, False)
    torch.testing.assert_close(ours.loss, theirs.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_kto_is_trls_kl_rows_and_all(models, swapped):
    """With the models swapped the estimate has the other sign: one of the two is below 0 and counts as 0."""
    trainer = trl_class("trl.trainer.kto_trainer", "KTOTrainer")
    models, batch = models[::-1] if swapped else models, collate(PAIRS)
    method = peers.KTO(0.3, policy=models[0], reference=models[1])
    ours = method.loss(*score_pairs(*models, batch, 0.0, "float32"), batch)
    ids, mask = one_row_a_response(PAIRS)
    moved = [p._replace(chosen=q.chosen, rejected=q.rejected) for p, q in zip(PAIRS, PAIRS[1:] + PAIRS[:1])]
    kl_ids, kl_mask = one_row_a_response(moved)
    fake = trl_self(beta=0.3, loss_type="kto", calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    fake.ref_model = trl_model(models[1])
    fake._compute_kl_logps = lambda model, batch: trainer._compute_kl_logps(fake, model, batch)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    inputs |= {f"KL_{name}": x for name, x in zip(inputs, (kl_ids, torch.ones_like(kl_ids), kl_mask))}
    inputs["label"] = torch.arange(2 * len(PAIRS)) < len(PAIRS)
    theirs = trainer._compute_loss(fake, trl_model(models[0]), inputs, False)
    kl = [kl for metrics in fake._metrics.values() for kl in metrics["kl"]]
    assert (kl[0] == 0) == swapped
    torch.testing.assert_close(ours.loss, theirs.double(), rtol=1e-5, atol=1e-6)


def test_simpo_is_trls(sums):
    trainer = trl_class("trl.experimental.cpo.cpo_trainer", "CPOTrainer")
    fake = trl_self(beta=2.0, simpo_gamma=0.7, loss_type="simpo", alpha=0.0, label_smoothing=0.0)
    means = [x.logp / torch.tensor([len(getattr(p, y)) for p in PAIRS]) for x, y in zip(sums, ("chosen", "rejected"))]
    theirs = trainer.cpo_loss(fake, *means)[0]
    torch.testing.assert_close(peers.Peer(2.0, "simpo", 0.7).loss(*sums).losses, theirs.double())


def test_orpo_is_trls(sums):
    trainer = trl_class("trl.experimental.orpo.orpo_trainer", "ORPOTrainer")
    means = [x.logp / torch.tensor([len(getattr(p, y)) for p in PAIRS]) for x, y in zip(sums, ("chosen", "rejected"))]
    ratio = trainer.odds_ratio_loss(trl_self(beta=0.4), *means)[0]
    theirs = -means[0] - ratio.double()
    torch.testing.assert_close(peers.Peer(1.0, "orpo", 0.4).loss(*sums).losses, theirs, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Worked out by hand


def test_losses_by_hand():
    chosen, rejected, batch = stats([-2.0], [-3.0]), stats([-4.0], [-3.5]), batch_of((2, 5))  # margin 1 + 0.5

    def loss(*args):
        return float(peers.Peer(*args).loss(chosen, rejected, batch).loss.detach())

    assert loss(0.4) == pytest.approx(math.log1p(math.exp(-0.6)))
    assert loss(0.4, "ipo") == pytest.approx((1.5 - 1.25) ** 2)
    assert loss(2.0, "simpo", 0.3) == pytest.approx(math.log1p(math.exp(-(2 * (-1 + 0.8) - 0.3))))
    odds_w, odds_l = math.exp(-1) / (1 - math.exp(-1)), math.exp(-0.8) / (1 - math.exp(-0.8))
    assert loss(1.0, "orpo", 0.5) == pytest.approx(1 + 0.5 * math.log1p(odds_l / odds_w))
    kto = peers.kto(*(torch.tensor([x]) for x in (1.0, -0.5)), torch.tensor(0.2), 0.5)
    values = [1 - 1 / (1 + math.exp(-x)) for x in (0.5 * 0.8, 0.5 * 0.7)]
    assert float(kto) == pytest.approx(sum(values) / 2)


def test_dpo_is_epsdpo_without_steps(sums):
    torch.testing.assert_close(peers.Peer(0.3).loss(*sums).losses, epsdpo_loss(*sums[:2], 0.3, 0.0).losses)


def test_tr_dpo_moves_the_reference_when_and_where_it_should(models):
    policy, reference = models
    before = copy.deepcopy(reference.state_dict())
    method = peers.TRDPO(0.3, alpha=0.25, tau=3)
    for moved in (False, False, True, False):
        old = copy.deepcopy(reference.state_dict())
        method.after_step({}, policy, reference)
        for name, now in reference.state_dict().items():
            expected = 0.25 * policy.state_dict()[name] + 0.75 * old[name] if moved else old[name]
            torch.testing.assert_close(now, expected)
    assert any(not x.equal(before[name]) for name, x in reference.state_dict().items())
    hard = peers.TRDPO(0.3)
    hard.after_step({}, policy, reference)
    assert all(x.equal(y) for x, y in zip(policy.state_dict().values(), reference.state_dict().values()))


def test_beta_dpo_by_hand():
    """β₀ 0.5, margins 2 and 6: reward margins 1 and 3, running mean 0.1·2, deviation 0.1·1."""
    chosen, rejected, batch = stats([2.0, 6.0], [0.0, 0.0]), stats([0.0, 0.0], [0.0, 0.0]), batch_of((1, 1), (1, 1))
    pairwise = peers.BetaDPO(0.5, m=0.6, instance=True)
    out = pairwise.loss(chosen, rejected, batch)
    assert (pairwise.mean, pairwise.std) == pytest.approx((0.2, 0.1))
    assert out.beta.tolist() == pytest.approx([0.5 * (1 + 0.6 * 0.8), 0.5 * (1 + 0.6 * 2.8)])
    assert out.losses.tolist() == pytest.approx([math.log1p(math.exp(-b * x)) for b, x in zip(out.beta, (2, 6))])
    whole = peers.BetaDPO(0.5, m=0.6, share=1.0).loss(chosen, rejected, batch)
    assert whole.beta.tolist() == pytest.approx(2 * [0.5 * (1 + 0.6 * 1.8)])
    half = peers.BetaDPO(0.5, m=0.6, share=0.5).loss(chosen, rejected, batch)
    assert half.beta.tolist() == pytest.approx(2 * [0.5 * (1 + 0.6 * 0.8)])  # the pair near the running mean is kept
    assert half.losses.tolist() == pytest.approx([2 * math.log1p(math.exp(-0.74 * 2)), 0.0])
    low = peers.BetaDPO(0.5, m=10.0, share=1.0, mean=9.0).loss(chosen, rejected, batch)
    assert low.beta.tolist() == pytest.approx([1e-3, 1e-3])  # never below 0
    with torch.no_grad():
        pairwise.loss(chosen, rejected, batch)
    assert pairwise.mean == pytest.approx(0.2)  # an evaluation leaves no trace


def test_the_filter_prefers_the_typical():
    torch.manual_seed(0)
    margins = torch.linspace(-5, 5, 101, dtype=torch.float64)
    kept = torch.cat([peers.keep_typical(margins, 2.0, 1.0, 0.3) for _ in range(50)])
    assert len(kept) == 50 * 30 and len(peers.keep_typical(margins, 0.0, 1.0, 0.8).unique()) == 81
    assert margins[kept].mean() == pytest.approx(2.0, abs=0.15)
    assert len(peers.keep_typical(torch.zeros(5), 0.0, 0.0, 0.8)) == 4  # a first step, where all margins are 0


def test_mismatched_rows():
    rows = collate([p._replace(chosen=q.chosen, rejected=q.rejected) for p, q in zip(PAIRS, PAIRS[1:] + PAIRS[:1])])
    for found, expected in zip(peers.mismatched(collate(PAIRS)), rows):
        assert found.equal(expected)


def methods(policy, reference):
    kinds = [peers.Peer(0.5, "ipo"), peers.Peer(2.0, "simpo", 0.5), peers.Peer(1.0, "orpo", 0.5)]
    return [*kinds, peers.TRDPO(0.5, tau=2), peers.BetaDPO(0.5), peers.KTO(0.5, policy=policy, reference=reference)]


@pytest.mark.parametrize("which", range(6))
def test_every_peer_trains(models, which):
    """`train` takes each of them, and the chosen responses gain on the rejected ones."""
    policy, reference = copy.deepcopy(models[1]), copy.deepcopy(models[1])
    method = methods(policy, reference)[which]
    lines = train(policy, reference, PAIRS, Flags(steps=8, batch_size=4, lr=3e-3), method)
    assert len(lines) == 8 and all(line["steps/keep"] == 1 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    first, last = (line["logps/chosen"] - line["logps/rejected"] for line in (lines[0], lines[-1]))
    assert last > first


# ----------------------------------------------------------------------------------------------------------------------
# compare.py


def test_variants_of_the_steps(sums):
    """The plain variant is ε-DPO; shuffled has its counts; sign has the margins' signs; carried remembers."""
    ours = epsdpo_loss(*sums[:2], 0.5, 0.1)
    assert sorted(ours.step.tolist())[0] < sorted(ours.step.tolist())[-1]
    outs = {kind: comparison.Variant(kind, 0.01, 0.1, [0.5]).loss(*sums) for kind in ("", "sign", "shuffled")}
    assert outs[""].losses.equal(ours.losses) and outs[""].step.equal(ours.step)
    assert outs["sign"].step.equal(ours.margin.sign().long())
    assert sorted(outs["shuffled"].step.tolist()) == sorted(ours.step.tolist())
    carried = comparison.Variant("carried", 0.01, 0.1, [0.5])
    twice = [carried.loss(*sums).beta for _ in range(2)]
    torch.testing.assert_close(twice[0], ours.beta)
    torch.testing.assert_close(twice[1], 0.5 * (ours.beta / 0.5) ** 2)
    path = comparison.Variant("path", 0.01, 0.0, [0.5, 0.4, 0.3])
    for beta in (0.5, 0.4, 0.3):
        torch.testing.assert_close(path.loss(*sums).losses, peers.dpo(ours.margin, beta))
        path.after_step({}, None, None)


def test_next_logps_is_the_inverse_of_listing():
    """And the estimate from it is the one of `epsdpo`, summed over a response's tokens."""
    world = toy.World(3, letters=3, length=4)
    logp = torch.randn(3, len(world.responses), dtype=torch.float64).log_softmax(-1)
    table = comparison.next_logps(world, logp)
    torch.testing.assert_close(world.list_logps(lambda _: table), logp)
    ref_table = comparison.next_logps(world, world.list_logps(world.language))
    row, y = (
        40,
        world.tokens_of(torch.tensor([1]), torch.tensor([60]))[0, 2:],
    )  # the row of prompt 1 that begins as 60 does
    rows = world.tokens_of(torch.tensor([1] * len(world.responses)), torch.arange(len(world.responses)))
    row = next(i for i in range(27) if rows[13 + i, 2:].equal(y)) + 27
    labels = world.responses[60][None]
    sums = token_stats_by_definition(table[row : row + 1, 1:], ref_table[row : row + 1, 1:], labels, 0.1)
    listed = world.list_logps(lambda _: table + 0.1 * (table - ref_table)) - logp
    assert float(sums.delta_minus.sum()) == pytest.approx(float(listed[1, 60]))


def test_pairs_of_a_noisy_world_have_a_fifth_of_their_labels_flipped(monkeypatch):
    pairs = [Pair(np.array([i]), np.array([1]), np.array([2])) for i in range(4096)]
    monkeypatch.setattr(comparison, "problem_of", lambda seed: SimpleNamespace(pairs=pairs))
    assert comparison.pairs_of("easy", 0) == pairs
    hard = comparison.pairs_of("hard", 0)
    assert [int(pair.prompt[0]) for pair in hard] == list(range(512))
    flipped = [int(pair.chosen[0]) == 2 for pair in hard]
    assert all({int(pair.chosen[0]), int(pair.rejected[0])} == {1, 2} for pair in hard)
    assert 0.12 < np.mean(flipped) < 0.28
    again, other = ([int(pair.chosen[0]) == 2 for pair in comparison.pairs_of("hard", seed)] for seed in (0, 1))
    assert flipped == again != other


SETTINGS = {  # settings beside world, beta and seed, and the method that they must make
    "DPO": ({}, None),
    "IPO": ({}, peers.Peer(0.3, "ipo")),
    "SimPO": ({"gamma": 0.7}, peers.Peer(0.3, "simpo", 0.7)),
    "ORPO": ({"weight": 4.0}, peers.Peer(0.3, "orpo", 4.0)),
    "KTO": ({}, peers.KTO(0.3)),
    "TR-DPO": ({"alpha": 0.05, "tau": 2}, peers.TRDPO(0.3, alpha=0.05, tau=2)),
    "β-DPO": ({"m": 1.0, "instance": True}, peers.BetaDPO(0.3, m=1.0, instance=True)),
    "ε-DPO": ({"epsilon": 0.02}, None),
    "sign": ({"epsilon": 0.02, "epsilon_step": 0.1}, None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_makes_the_method_it_names(name):
    more, peer = SETTINGS[name]
    method = comparison.method_of({"method": name, "world": "easy", "beta": 0.3, "seed": 0} | more, None, None)
    assert (method.peer, method.beta, method.kind) == (peer, 0.3, name)
    assert method.epsilon_check == more.get("epsilon", 0.01)
    assert method.epsilon_step == (0.0 if name == "DPO" else more.get("epsilon_step", more.get("epsilon", 0.01)))


def test_replay_and_decay_take_the_path_of_epsdpo(monkeypatch):
    asked = []
    monkeypatch.setattr(comparison, "run", lambda setting: asked.append(setting) or {"betas": [0.4, 0.3, 0.1]})
    setting = {"world": "hard", "beta": 0.4, "epsilon": 0.05, "seed": 2}
    replay, decay = (comparison.method_of(setting | {"method": name}, None, None) for name in ("replay", "decay"))
    assert asked == 2 * [setting | {"method": "ε-DPO"}]
    assert replay.betas == [0.4, 0.3, 0.1] and decay.betas == pytest.approx([0.4, 0.2, 0.1])
    assert (replay.kind, decay.kind, replay.epsilon_step) == ("path", "path", 0.0)


def test_the_numbers_of_a_run_by_hand():
    def result(kl, reward, betas=(0.5, 0.5), steps=(0.0, 0.0)):
        names = ("beta", "accuracy", "opposite", "correlation_ours", "correlation_theirs")
        seen = [dict.fromkeys(names, 0.75) | {"step": step, "margin": 2 * step} for step in steps]
        yardsticks = {"reward": reward, "kl": kl, "win_rate": 0.5, "share": reward / 2}
        return yardsticks | {"betas": list(betas), "seen": seen}

    name, setting = comparison.name_of, {"method": "replay", "world": "easy", "beta": 0.5, "epsilon": 0.1}
    runs = {name(setting, 3): result(2.25, 1.2, betas=(0.5, 0.48, 0.46), steps=(0.2, 0.4, 0.6))}
    runs[name(setting | {"method": "ε-DPO"}, 3)] = result(2.0, 1.1)
    runs[name(setting | {"method": "ε-DPO"}, 4)] = result(9.0, 9.0)  # another seed
    for i, beta in enumerate(comparison.DPO_BETAS):
        runs[name({"method": "DPO", "world": "easy", "beta": beta}, 3)] = result(float(i * i), 0.5 * i)
    found = comparison.numbers(setting, 3, runs)
    assert found["reward minus DPO's at that KL"] == pytest.approx(1.2 - 0.75)  # DPO's reward is half the root of KL
    assert found["KL to reference minus ε-DPO's"] == pytest.approx(0.25)
    assert found["share minus ε-DPO's"] == pytest.approx(0.05)
    assert found["mean step and mean margin"] == pytest.approx(1.0) and math.isnan(found["β and mean margin"])
    assert (found["steps"], found["β at the end"], found["pairs moved apart"]) == (3, 0.46, 0.75)
    law, by_accuracy = (found[key] for key in comparison.PATH[1:])
    assert law == pytest.approx(0.5 * math.exp(-0.1 * 2 * 0.4)) and by_accuracy == pytest.approx(0.5 * math.exp(-0.1))
    beyond = runs | {name(setting, 3): result(17.0, 1.2)}  # farther than any run of DPO: no number
    assert math.isnan(comparison.numbers(setting, 3, beyond)["reward minus DPO's at that KL"])


def test_every_run_of_a_question_is_named_once():
    asked = comparison.questions()
    assert sorted(asked) == sorted(comparison.COLUMNS) == [1, 2, 3, 5, 6, 7]
    names = {comparison.name_of(x, seed) for settings in asked.values() for x in settings for seed in range(5)}
    assert len(names) == 610


def test_compare_quick(tmp_path, monkeypatch, capsys):
    """Two questions from end to end in an empty folder, without worker processes."""
    pool = SimpleNamespace(imap=map)
    context = SimpleNamespace(Pool=lambda *_: contextlib.nullcontext(pool))
    monkeypatch.setattr(comparison.multiprocessing, "get_context", lambda _: context)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "fit_reference", partial(toy.fit_reference, steps=30))
    comparison.problem_of.cache_clear()
    comparison.main(["2", "5", "--quick"])
    printed = capsys.readouterr().out
    assert "question 2" in printed and "question 5" in printed
    folder = tmp_path / "out" / "compare" / "quick"
    with open(folder / "question2.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    assert {row["method"] for row in rows} == {"ε-DPO", "β-DPO"}
    for row in rows:
        assert float(row["ε-DPO's move and margin"]) < 0 < float(row["β-DPO's move and margin"])
    comparison.problem_of.cache_clear()
    with open(folder / "question5.csv", encoding="utf-8", newline="") as f:
        assert all(float(row["margin right"]) > 0.99 for row in csv.DictReader(f))
