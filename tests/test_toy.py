"""The toy world against its definition, counted and summed the slow way."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epsdpo import TokenStats, epsdpo_loss, sum_over_responses, token_stats
from model import GPT
from support import toy
from support.checkpoint import resolve

WORLD = toy.World()
FIT_REFERENCE = toy.fit_reference
SMALL = toy.World(seed=3, letters=3, length=3)  # 40 responses for each of 3 prompts
worlds = pytest.mark.parametrize("world", [WORLD, SMALL, toy.World(seed=1, letters=2, length=1)], ids=str)


class Tabular(torch.nn.Module):
    """A policy with logits of its own, float64, after every row: the row, read as a number, is its place."""

    def __init__(self, world: toy.World, seed: int = 0, spread: float = 1.0):
        super().__init__()
        self.vocab = world.letters + 1
        generator = torch.Generator().manual_seed(seed)
        rows = self.vocab ** (world.length + 1)
        self.logits = torch.nn.Parameter(
            spread * torch.randn(rows, self.vocab, generator=generator, dtype=torch.float64)
        )

    def forward(self, tokens):  # (B, T) -> (B, T, V)
        number, rows = torch.zeros(len(tokens), dtype=torch.int64), []
        for column in tokens.T:
            number = number * self.vocab + column
            rows.append(number)
        return self.logits[torch.stack(rows, 1) % len(self.logits)]


def small_gpt(world, **changes):
    torch.manual_seed(0)
    sizes = dict(model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return GPT(resolve(sizes | {"vocab_size": world.letters + 1} | changes))


def random_logps(seed, prompts=2, responses=30, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(prompts, responses, generator=generator, dtype=torch.float64)).log_softmax(-1)


def random_reward(seed, prompts=2, responses=30):
    return torch.randint(-4, 6, (prompts, responses), generator=torch.Generator().manual_seed(seed))


seeds = st.integers(0, 10_000)
betas = st.floats(0.05, 20.0)
few = settings(max_examples=30, deadline=None)


# ----------------------------------------------------------------------------------------------------------------------
# The list


@worlds
def test_the_list_holds_every_response_once_in_order(world):
    letters = "abcdefgh"[: world.letters]
    expected = ["".join(text) for n in range(world.length + 1) for text in itertools.product(letters, repeat=n)]
    assert [world.text(i).rstrip(".") for i in range(len(world.responses))] == expected
    for i in range(len(expected)):
        assert world.text(i).endswith(".") == (len(expected[i]) < world.length)


def test_the_world_has_3906_responses():
    assert WORLD.responses.shape == (3906, 5)
    assert [WORLD.text(i) for i in (0, 1, 6, 3905)] == [".", "a.", "aa.", "eeeee"]


@worlds
def test_reward_by_eye(world):
    for prompt in range(world.letters):
        for i in range(len(world.responses)):
            text, letter = world.text(i).rstrip("."), "abcde"[prompt]
            expected = text.count(letter) - sum(x == y for x, y in itertools.pairwise(text))
            assert world.reward[prompt, i] == expected


def test_examples_of_the_reward():
    places = {WORLD.text(i): i for i in range(3906)}
    assert WORLD.reward[0, places["abca."]] == 2
    assert WORLD.reward[0, places["aab."]] == 1
    assert WORLD.reward[1, places["aaaaa"]] == -4
    assert WORLD.reward[2, places["."]] == 0


@worlds
def test_rows_are_prompt_and_response_as_stored(world):
    prompt = torch.arange(world.letters).repeat_interleave(len(world.responses))
    response = torch.arange(len(world.responses)).repeat(world.letters)
    for row, x, y in zip(world.tokens_of(prompt, response).numpy(), prompt.tolist(), response.tolist()):
        ids, start = world.response_ids(y), world.prompt_ids(x)
        assert ids.dtype == start.dtype == np.int32 and len(ids) == world.sizes[y]
        assert start.tolist() == [world.letters, x]
        assert row[: len(ids) + 1].tolist() == [*start, *ids[:-1]]


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities


def one_by_one(world, policy, prompt, response):
    """log π(y|x), by asking the policy for the next token again and again."""
    row, total = world.prompt_ids(prompt).tolist(), 0.0
    for token in world.response_ids(response).tolist():
        total += policy(torch.tensor([row]))[0, -1].double().log_softmax(-1)[token].item()
        row.append(token)
    return total


@worlds
def test_probabilities_of_the_list_sum_to_one(world):
    float32 = Tabular(world).float()
    for policy in (Tabular(world), Tabular(world, spread=20.0), world.language, float32, float32.bfloat16()):
        logps = world.list_logps(policy)
        assert logps.shape == world.reward.shape and logps.dtype == torch.float64 and not logps.requires_grad
        assert (logps.exp().sum(1) - 1).abs().max() < 1e-12


@torch.no_grad()
def test_listed_logps_are_those_of_scoring_each_response_alone():
    for policy in (Tabular(SMALL), SMALL.language, small_gpt(SMALL).double()):
        logps = SMALL.list_logps(policy)
        alone = [[one_by_one(SMALL, policy, x, y) for y in range(40)] for x in range(3)]
        assert (logps - torch.tensor(alone, dtype=torch.float64)).abs().max() < 1e-12


@torch.no_grad()
def test_listed_logps_of_the_default_world():
    policy = Tabular(WORLD)
    logps = WORLD.list_logps(policy)
    generator = np.random.default_rng(0)
    for x, y in zip(generator.integers(0, 5, 60), [0, 1, 5, 6, 780, 781, 3905, *generator.integers(0, 3906, 53)]):
        assert math.isclose(logps[x, y], one_by_one(WORLD, policy, x, y), abs_tol=1e-12)


def test_one_pass_is_enough():
    calls = []

    def policy(tokens):
        calls.append(tokens.shape)
        return torch.zeros(*tokens.shape, 6)

    WORLD.list_logps(policy)
    assert calls == [(5 * 625, 6)]


@worlds
def test_the_language_is_a_markov_chain_with_a_growing_stop(world):
    logps = world.list_logps(world.language)
    for x in range(world.letters):
        for y in range(0, len(world.responses), 7):
            last, expected = x, 1.0
            for n, token in enumerate(world.response_ids(y).tolist()):
                stop = 0.1 * (n + 1)
                expected *= stop if token == world.letters else (1 - stop) * world.chain[x, last, token].item()
                last = token
            assert math.isclose(logps[x, y].exp(), expected, rel_tol=1e-12)


def test_a_long_world_still_is_one():
    world = toy.World(letters=2, length=11)
    logp = world.list_logps(world.language)
    assert not logp.isnan().any()
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_seed_makes_the_language():
    logps = [toy.World(seed).list_logps(toy.World(seed).language) for seed in (0, 0, 1)]
    assert torch.equal(logps[0], logps[1]) and not torch.allclose(logps[0], logps[2])


def test_fit_reference():
    before = torch.get_rng_state()
    fits = []
    for _ in range(2):
        torch.set_rng_state(before)
        model = small_gpt(SMALL)
        start = toy.kl(SMALL.list_logps(SMALL.language), SMALL.list_logps(model))
        state = torch.get_rng_state()
        fits.append(toy.fit_reference(model, SMALL, steps=150, seed=1, lr=3e-3))
        assert torch.equal(torch.get_rng_state(), state), "fitting leaves the global generator alone"
        reached = SMALL.list_logps(model)
    assert fits[0] == fits[1] == float(toy.kl(SMALL.list_logps(SMALL.language), reached))
    assert start > 0.1 and fits[0] < 0.002, "the prompt's stop tells the model where it is: it must come close"


# ----------------------------------------------------------------------------------------------------------------------
# Pairs


def test_pairs_are_of_two_different_responses_and_follow_the_seed():
    logps = SMALL.list_logps(SMALL.language)
    state = torch.get_rng_state()
    pairs = [toy.sample_pairs(logps, SMALL.reward, 5000, 1.0, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state), "sampling leaves the global generator alone"
    for prompt, chosen, rejected in pairs:
        assert (chosen != rejected).all() and prompt.shape == chosen.shape == rejected.shape == (5000,)
        assert 0 <= prompt.min() and prompt.max() < 3 and 0 <= chosen.min() and chosen.max() < 40
    assert all(torch.equal(a, b) for a, b in zip(pairs[0], pairs[1]))
    assert not any(torch.equal(a, b) for a, b in zip(pairs[0], pairs[2]))


def test_pairs_are_distributed_as_promised():
    """Frequencies of (prompt, {y1, y2}) and of who is chosen, within five standard errors for every cell."""
    n, scale = 200_000, 0.7
    logps, reward = random_logps(1, prompts=2, responses=6, spread=1.0), random_reward(1, prompts=2, responses=6)
    prompt, chosen, rejected = toy.sample_pairs(logps, reward, n, scale, seed=0)
    counts = torch.zeros(2, 6, 6, dtype=torch.float64)
    counts.index_put_((prompt, chosen, rejected), torch.ones(n, dtype=torch.float64), accumulate=True)
    p = logps.exp()
    drawn = p[:, :, None] * p[:, None, :] * (1 - torch.eye(6))
    drawn = drawn / drawn.sum((1, 2), keepdim=True) / 2  # two prompts
    wins = torch.sigmoid(scale * (reward[:, :, None] - reward[:, None, :]).double())
    expected = 2 * drawn * wins  # chosen i and rejected j: drawn as (i, j) or as (j, i)
    assert math.isclose(expected.sum(), 1.0, rel_tol=1e-12)
    errors = (counts / n - expected).abs() / (expected * (1 - expected) / n + 1e-12).sqrt()
    assert errors.max() < 5


@pytest.mark.parametrize("scale, low, high", [(0.0, 0.48, 0.52), (1.0, 0.73 - 0.02, 0.73 + 0.02), (1e6, 1.0, 1.0)])
def test_bradley_terry(scale, low, high):
    """One point of reward between the two: the better is chosen with probability σ(scale)."""
    logps = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    _, chosen, _ = toy.sample_pairs(logps, torch.tensor([[1, 2]]), 10_000, scale, seed=0)
    assert low <= chosen.double().mean() <= high


def test_a_reference_with_one_response_is_refused():
    with pytest.raises(ValueError, match="two different"):
        toy.sample_pairs(torch.tensor([[0.0, -40.0]], dtype=torch.float64), torch.zeros(1, 2), 10, 1.0, seed=0)


# ----------------------------------------------------------------------------------------------------------------------
# A problem


@pytest.fixture
def quick_fit(monkeypatch):
    monkeypatch.setattr(toy, "fit_reference", partial(toy.fit_reference, steps=2))


def places(world, pair):
    """A pair's places in the list: (prompt, chosen, rejected)."""
    assert pair.prompt.tolist()[0] == world.letters
    ids = [world.response_ids(i).tolist() for i in range(len(world.responses))]
    return int(pair.prompt[1]), ids.index(pair.chosen.tolist()), ids.index(pair.rejected.tolist())


def test_a_problem_has_the_pairs_of_the_language_and_a_fitted_reference(quick_fit):
    """Pairs come from the language, in order, the held-out ones last; ref_logp is the reference's."""
    state = torch.get_rng_state()
    problem = toy.make_problem(3, pairs=40, eval_pairs=7, scale=2.0, world=SMALL)
    assert torch.equal(torch.get_rng_state(), state), "making a problem leaves the global generator alone"
    assert problem.world is SMALL and (len(problem.pairs), len(problem.eval_pairs)) == (40, 7)
    language = SMALL.list_logps(SMALL.language)
    wanted = toy.sample_pairs(language, SMALL.reward, 47, 2.0, seed=3)
    found = [places(SMALL, pair) for pair in [*problem.pairs, *problem.eval_pairs]]
    assert found == list(zip(*(column.tolist() for column in wanted)))
    assert [pair.line for pair in problem.pairs] == list(range(1, 41)) and problem.eval_pairs[0].line == 41
    assert torch.equal(problem.ref_logp, SMALL.list_logps(problem.reference))
    assert problem.distance == pytest.approx(float(toy.kl(language, problem.ref_logp)))


def test_a_problem_follows_from_its_seed(quick_fit):
    one, same, other = (toy.make_problem(seed, pairs=30, eval_pairs=0) for seed in (4, 4, 5))
    assert one.world == toy.World(4) and torch.equal(one.ref_logp, same.ref_logp)
    assert not torch.allclose(one.ref_logp, other.ref_logp)
    texts = [[[part.tolist() for part in pair[:3]] for pair in problem.pairs] for problem in (one, same, other)]
    assert texts[0] == texts[1] != texts[2]


def test_pairs_do_not_depend_on_how_well_the_reference_was_fitted(monkeypatch):
    """So they are the same on CPUs whose float32 results differ."""
    found = []
    for steps in (1, 3):
        monkeypatch.setattr(toy, "fit_reference", partial(FIT_REFERENCE, steps=steps))
        found.append(toy.make_problem(0, pairs=500, eval_pairs=0, world=SMALL))
    assert not torch.equal(found[0].ref_logp, found[1].ref_logp)
    assert [places(SMALL, pair) for pair in found[0].pairs] == [places(SMALL, pair) for pair in found[1].pairs]


def test_the_first_pairs_of_the_toy_are_these():
    """This list was drawn on one machine: language and draws are float64 and should be the same on every other."""
    world = toy.World()
    x, w, l = (c.tolist() for c in toy.sample_pairs(world.list_logps(world.language), world.reward, 6, 1.0, seed=0))
    found = [f"{'abcde'[i]}: {world.text(j)} {world.text(k)}" for i, j, k in zip(x, w, l)]
    assert found == ["e: c. e.", "e: eeaea dbaa.", "d: ae. ada.", "a: ad. de.", "d: . eecca", "e: . b."]


def test_draws_have_the_frequencies_of_the_policy():
    logp = random_logps(2, prompts=2, responses=6, spread=1.0)
    drawn = toy.draw_responses(logp, 20_000, seed=0)
    assert drawn.shape == (2, 20_000) and torch.equal(drawn, toy.draw_responses(logp, 20_000, seed=0))
    assert not torch.equal(drawn, toy.draw_responses(logp, 20_000, seed=1))
    share = torch.stack([(drawn == i).double().mean(1) for i in range(6)], 1)
    p = logp.exp()
    assert ((share - p).abs() / (p * (1 - p) / 20_000).sqrt()).max() < 5


def test_draws_do_not_change_with_the_last_bits_of_a_policy():
    """Draws along the cumulative probabilities would: a shift of one response's share moves all that follow."""
    logp = WORLD.list_logps(WORLD.language)
    noise = 1e-5 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = (logp + noise).log_softmax(-1)
    changed = toy.draw_responses(logp, 200, seed=0) != toy.draw_responses(near, 200, seed=0)
    assert changed.double().mean() < 1e-3


def test_a_report_prints_the_policies_in_order_and_words_about_the_first(quick_fit, capsys):
    problem = toy.make_problem(3, pairs=8, eval_pairs=0, world=SMALL)
    best = toy.optimum(problem.ref_logp, SMALL.reward, 0.7)
    logps = {"ours": best, "theirs": problem.ref_logp}
    toy.print_report(problem, logps, [0.7, 0.65, 0.62, 0.6], told=1234)
    table, drawn, words = capsys.readouterr().out.strip().split("\n\n")
    head, *lines = table.splitlines()
    assert "after 3 steps" in head and "0.7" in head
    wanted = {"reference": problem.ref_logp} | logps | {"optimum π*": best}
    assert "\n".join(lines) == toy.table(
        {name: toy.report(logp, problem.ref_logp, SMALL.reward, 0.7) for name, logp in wanted.items()}
    )
    assert drawn.splitlines()[0].split() == ["responses", "drawn", "reference", "ours"]
    for name, left in (("reference", 21), ("ours", 51)):
        shown = [line[left : left + 30].split() for line in drawn.splitlines()[1:]]
        texts = [[SMALL.text(i) for i in row] for row in toy.draw_responses(wanted[name], 4, SMALL.seed).tolist()]
        assert shown == texts
    assert [line.split()[1] for line in drawn.splitlines()[1:]] == ["a:", "b:", "c:"]
    ours = toy.report(best, problem.ref_logp, SMALL.reward, 0.7)
    assert "β went from 0.700 to 0.600" in words and "told 1,234 times" in words
    assert f"in {ours.win_rate:.0%} of comparisons" in words and "has 100% of the gain" in words


def test_a_report_of_a_policy_that_has_not_moved_says_nothing_is_gained(quick_fit, capsys):
    problem = toy.make_problem(3, pairs=8, eval_pairs=0, world=SMALL)
    toy.print_report(problem, {"ours": problem.ref_logp}, [0.5, 0.5], told=8)
    said = capsys.readouterr().out
    assert "in 50% of comparisons" in said and "has nothing of the gain" in said and "nan" not in said


# ----------------------------------------------------------------------------------------------------------------------
# The report


@given(seeds, betas, st.floats(0.0, 20.0))
@few
def test_regret_is_beta_times_the_kl_to_the_optimum(seed, beta, spread):
    """J(π*) − J(π) = β·KL(π ‖ π*), for any π."""
    logp, ref_logp, reward = random_logps(seed, spread=spread), random_logps(seed + 1), random_reward(seed)
    best = toy.optimum(ref_logp, reward, beta)
    assert (best.exp().sum(1) - 1).abs().max() < 1e-12
    found, star = toy.report(logp, ref_logp, reward, beta), toy.report(best, ref_logp, reward, beta)
    assert math.isclose(star.objective - found.objective, beta * found.kl_to_optimum, rel_tol=1e-12, abs_tol=1e-12)
    assert abs(star.kl_to_optimum) < 1e-12 and found.kl_to_optimum > -1e-12
    assert math.isclose(found.objective, found.reward - beta * found.kl, rel_tol=1e-12, abs_tol=1e-12)


@given(seeds, betas)
@few
def test_numbers_are_those_of_the_definitions(seed, beta):
    logp, ref_logp, reward = random_logps(seed), random_logps(seed + 1), random_reward(seed)
    p, q, r = (x.double().numpy() for x in (logp.exp(), ref_logp.exp(), reward))
    found = toy.report(logp, ref_logp, reward, beta)
    tilted = q * np.exp(r / beta - r.max() / beta)
    tilted /= tilted.sum(1, keepdims=True)
    above = r[:, :, None] - r[:, None, :]
    wins = (p[:, :, None] * q[:, None, :] * (np.where(above > 0, 1, 0) + np.where(above == 0, 0.5, 0))).sum((1, 2))
    close = dict(rel=1e-10, abs=1e-12)
    assert found.reward == pytest.approx((p * r).sum() / 2, **close)
    assert found.kl == pytest.approx((p * np.log(p / q)).sum() / 2, **close)
    assert found.win_rate == pytest.approx(wins.mean(), **close)
    assert toy.optimum(ref_logp, reward, beta).exp().numpy() == pytest.approx(tilted, **close)
    start, best = (q * r).sum() / 2, float(toy.frontier(ref_logp, reward, found.kl))
    assert found.share == pytest.approx((found.reward - start) / (best - start), **close)


@given(seeds)
@few
def test_win_rate_of_equals_and_of_the_best(seed):
    logp, other, reward = random_logps(seed), random_logps(seed + 1), random_reward(seed)
    assert toy.win_rate(logp, logp, reward) == pytest.approx(0.5)
    assert toy.win_rate(logp, other, reward) + toy.win_rate(other, logp, reward) == pytest.approx(1.0)


@given(seeds, st.floats(0.01, 100.0), st.floats(0.0, 3.0))
@few
def test_no_policy_beats_the_frontier(seed, beta, spread):
    ref_logp, reward = random_logps(seed), random_reward(seed)
    noise = spread * torch.randn(2, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logp = (ref_logp + reward / beta + noise).log_softmax(-1)
    assert toy.mean_reward(logp, reward) <= toy.frontier(ref_logp, reward, toy.kl(logp, ref_logp)) + 1e-9
    assert toy.report(logp, ref_logp, reward, 1.0).share <= 1 + 1e-6


@given(seeds, st.floats(0.1, 1000.0))
@few
def test_the_optimum_of_any_beta_lies_on_the_frontier(seed, beta):
    ref_logp, reward = random_logps(seed), random_reward(seed)
    best = toy.optimum(ref_logp, reward, beta)
    at_kl = toy.kl(best, ref_logp)
    assert toy.frontier(ref_logp, reward, at_kl) == pytest.approx(float(toy.mean_reward(best, reward)), abs=1e-9)
    assert toy.report(best, ref_logp, reward, 1.0).share == pytest.approx(1.0, abs=1e-4)


def test_both_ends_of_the_frontier():
    ref_logp, reward = random_logps(0), random_reward(0)
    start = toy.report(ref_logp, ref_logp, reward, 0.5)
    assert start.kl == 0 and start.win_rate == pytest.approx(0.5) and math.isnan(start.share)
    only = torch.full_like(ref_logp, -math.inf)  # one of the best responses, and the least likely of them
    for x in range(2):
        best = [i for i in range(30) if reward[x, i] == reward[x].max()]
        only[x, min(best, key=lambda i: ref_logp[x, i])] = 0.0
    end = toy.report(only, ref_logp, reward, 0.5)
    assert end.reward == reward.max(1).values.double().mean() and end.kl == -ref_logp[only == 0].mean()
    assert end.share == pytest.approx(1.0) and toy.frontier(ref_logp, reward, 1e9) == pytest.approx(end.reward)
    worst = toy.report(toy.optimum(ref_logp, -reward, 0.5), ref_logp, reward, 0.5)
    assert worst.share < 0 and worst.win_rate < 0.5


def test_table_shows_the_numbers_in_the_order_of_its_head():
    numbers = {"reference": (0.1, 0.0, 0.5, math.nan, 0.1, 1.22), "π*": (1.29, 1.1344, 0.8376, 0.89249, 0.7228, 0.0)}
    lines = toy.table({name: toy.Exact(*row) for name, row in numbers.items()}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("  ")[-1] == "KL to optimum" and "E[reward]      KL to ref       win rate" in lines[0]
    assert lines[1].split() == ["reference", "0.100", "0.000", "0.500", "-", "0.100", "1.220"]
    assert lines[2].split() == ["π*", "1.290", "1.134", "0.838", "89.2", "%", "0.723", "0.000"]


# ----------------------------------------------------------------------------------------------------------------------
# The loss, β's place and every sign at once


@pytest.mark.parametrize("beta, scale", [(0.5, 1.0), (0.2, 0.3), (2.0, 1.5)])
def test_a_tabular_policy_reaches_the_optimum(beta, scale):
    """DPO over all pairs, weighted as the world draws and labels them, is at its minimum where π is π* of β / scale."""
    world, reference = SMALL, Tabular(SMALL, seed=1, spread=0.5)
    policy = Tabular(SMALL, seed=2)
    responses = len(world.responses)
    ref_logp, reward = world.list_logps(reference), world.reward.double()
    best = toy.optimum(ref_logp, reward, beta / scale)
    assert toy.kl(world.list_logps(policy), best) > 0.1

    every = torch.arange(world.letters * responses)  # all (prompt, response)
    prompt, response = every // responses, every % responses
    rows, labels = world.tokens_of(prompt, response), world.responses[response]
    scored = torch.arange(world.length) < world.sizes[response, None]
    owner = every[:, None].expand(-1, world.length)[scored]
    ref_logits = reference(rows)[:, 1:][scored].detach()

    x, chosen, rejected = torch.meshgrid(
        torch.arange(world.letters), torch.arange(responses), torch.arange(responses), indexing="ij"
    )
    weight = ref_logp.exp()[x, chosen] * ref_logp.exp()[x, rejected]  # (prompts, responses, responses)
    weight = weight * torch.sigmoid(scale * (reward[x, chosen] - reward[x, rejected]))
    chosen, rejected = (x * responses + chosen).flatten(), (x * responses + rejected).flatten()

    def population_loss():
        stats = token_stats(policy(rows)[:, 1:][scored], ref_logits, labels[scored], epsilon_check=0.01)
        sums = sum_over_responses(stats, owner, len(every))
        pair = [TokenStats(*(number[side] for number in sums)) for side in (chosen, rejected)]
        return (epsdpo_loss(*pair, beta, epsilon_step=0.0).losses * weight.flatten()).sum()

    optimizer = torch.optim.LBFGS(
        policy.parameters(), max_iter=1000, tolerance_grad=1e-11, tolerance_change=0.0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = population_loss()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert toy.kl(world.list_logps(policy), best) < 1e-10
