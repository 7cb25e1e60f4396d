"""Properties of `epsdpo.py`, in the method's own terms; the oracle is 60-digit arithmetic (mpmath) on the definition."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import epsdpo
from epsdpo import TokenStats, beta_steps, epsdpo_loss, next_beta, perturbed_logits, token_stats

LN2 = math.log(2)


def examples(n: int):
    return settings(max_examples=n, deadline=None, derandomize=True)


# ----------------------------------------------------------------------------------------------------------------------
# Inputs and oracles


def exact_token(f, f_ref, label: int, epsilon: float) -> dict[str, mpmath.mpf]:
    """One token by the definition at 60 digits: every number of TokenStats, and the rounding its deltas may carry.

    `rounding` is for float32 logits within |u| < 4, where `token_stats` computes in float32: 2⁻¹⁶ of the terms that are
    summed, and the rounding of d itself. From there on, and for float64 logits, it is that of float64.
    """
    counts = Counter(zip(f, f_ref))  # equal entries are computed once: a large vocabulary of few values is quick
    label = list(counts).index((f[label], f_ref[label]))
    with mpmath.workdps(60):
        f, f_ref = zip(*[[mpmath.mpf(x) for x in entry] for entry in counts])

        def total(values):
            return mpmath.fsum(n * x for n, x in zip(counts.values(), values))

        def log_softmax(s):
            g = [a + s * (a - b) for a, b in zip(f, f_ref)]
            top = max(g)
            log_sum = top + mpmath.log(total(mpmath.exp(x - top) for x in g))
            return [x - log_sum for x in g]

        eps = mpmath.mpf(epsilon)
        log_p, log_q = log_softmax(0), log_softmax(-1)
        p = [mpmath.exp(x) for x in log_p]
        d = [a - b for a, b in zip(f, f_ref)]
        u = [x - d[label] for x in d]
        spread = max(total(a * abs(mpmath.expm1(s * x)) for a, x in zip(p, u)) for s in (eps, -eps))  # E_p|expm1(±εu)|
        size, u_mean = max(abs(x) for x in u), total(a * abs(x) for a, x in zip(p, u))
        d_mean, d_max = total(a * abs(x) for a, x in zip(p, d)), max(abs(x) for x in d)
        return {
            "logp": log_p[label],
            "ref_logp": log_q[label],
            "delta_minus": log_softmax(eps)[label] - log_p[label],
            "delta_plus": log_softmax(-eps)[label] - log_p[label],
            "kl": max(0, total(a * (x - y) for a, x, y in zip(p, log_p, log_q))),
            "rounding": min(1, spread) * mpmath.mpf(2) ** -16 + eps * mpmath.mpf(2) ** -23 * (d_mean + abs(d[label])),
            "rounding_float64": eps * (mpmath.mpf("1e-12") * size + mpmath.mpf(2) ** -51 * d_max),
            "u_mean": u_mean,
            "d_max": d_max,
            "size": size,
        }


def check_deltas(stats: TokenStats, i: int, exact: dict[str, mpmath.mpf], epsilon: float, in_float64: bool) -> None:
    far = in_float64 or exact["size"] >= min(4, 1 / epsilon)
    for name in ("delta_minus", "delta_plus"):
        error = abs(getattr(stats, name)[i].item() - exact[name])
        assert error <= exact["rounding_float64" if far else "rounding"] + 1e-37, f"token {i}, ε {epsilon}: {name}"


def check_against_exact(stats: TokenStats, f, f_ref, labels, epsilon: float) -> None:
    """Each number of a token from float32 logits within the rounding of float32."""
    for i, y in enumerate(labels.tolist()):
        e = exact_token(f[i].tolist(), f_ref[i].tolist(), y, epsilon)
        where = f"token {i}, label {y}, ε {epsilon}"
        check_deltas(stats, i, e, epsilon, in_float64=False)
        far = e["size"] > 3.9
        logp, ref_logp, kl = stats.logp[i].item(), stats.ref_logp[i].item(), stats.kl[i].item()
        scale = max(1, *(abs(x) for x in f[i].tolist()))
        assert abs(logp - e["logp"]) <= 2.0**-21 * scale, where
        # The two log-probabilities' difference is what the margin is made of: it must not carry their rounding.
        ratio_error = abs((logp - ref_logp) - (e["logp"] - e["ref_logp"]))
        rounding = 2.0**-21 * (e["u_mean"] + abs(e["logp"] - e["ref_logp"]) + (0 if far else e["d_max"]))
        assert ratio_error <= rounding + 2.0**-44 * (abs(e["logp"]) + abs(e["ref_logp"])) + 1e-37, where
        assert kl >= 0, where
        delta = 2.0**-21 * e["d_max"]  # a shift of c this large adds at most this much to the KL
        tolerance = (
            mpmath.mpf("1e-4" if e["size"] > 2 else "2e-6") * e["kl"]
            + mpmath.sqrt(2 * e["kl"]) * delta
            + delta**2
            + 1e-37
        )
        assert abs(kl - e["kl"]) <= tolerance, f"{where}: kl {kl}, exactly {mpmath.nstr(e['kl'], 8)}"


KINDS = ("normal", "one_sided", "saturated", "offset", "tail")


def random_logits(seed: int, shape: tuple[int, ...], spread: float, kind: str = "normal", dtype=torch.float32):
    """Logits (f_θ, f_ref) and labels. `spread` is the standard deviation of d = f_θ − f_ref."""
    rng = np.random.default_rng(seed)
    f = rng.normal(0, 3, shape)
    d = rng.normal(0, spread, shape)
    labels = rng.integers(0, shape[-1], shape[:-1])
    if kind == "one_sided":  # the policy puts all but nothing on one token, often the label
        np.put_along_axis(f, labels[..., None], rng.uniform(15, 60), -1)
    if kind == "saturated":  # each of the two models is sure, of different tokens
        f *= 40
        d *= 10
    if kind == "offset":  # the two logit sets differ by a constant per position
        d += rng.choice([-1000.0, -30.0, 3.0, 200.0], shape[:-1])[..., None]
    if kind == "tail":  # the difference sits on tokens of next to no probability
        d *= (f < -2) * 20
    f, f_ref = torch.tensor(f, dtype=dtype), torch.tensor(f - d, dtype=dtype)
    return f, f_ref, torch.tensor(labels)


def to_sequence(stats: TokenStats) -> TokenStats:
    """(B, T) per token -> (B,) per response, written apart from `sum_over_responses`."""
    return TokenStats(*(x.double().sum(-1) for x in stats))


def sums(logp, ref_logp, delta_minus=0.0, delta_plus=0.0) -> TokenStats:
    columns = (torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (logp, ref_logp, delta_minus, delta_plus))
    logp, ref_logp, delta_minus, delta_plus = torch.broadcast_tensors(*columns)
    return TokenStats(logp, ref_logp, delta_minus, delta_plus, torch.zeros_like(logp))


def pairs_of_logits(seed: int, pairs: int = 4, length: int = 3, vocab: int = 7, spread: float = 0.5):
    return random_logits(seed, (2 * pairs, length, vocab), spread, dtype=torch.float64)


def decide(f, f_ref, labels, epsilon_check=0.05, beta=0.1, epsilon_step=0.05):
    """From logits (2B, T, V), chosen responses first, to the loss."""
    stats = to_sequence(token_stats(f, f_ref, labels, epsilon_check))
    half = len(labels) // 2
    chosen, rejected = (TokenStats(*(x[part] for x in stats)) for part in (slice(half), slice(half, None)))
    return epsdpo_loss(chosen, rejected, beta, epsilon_step)


# Numbers whose sums and products here are exact in float64 and float32: equalities can then be asked to the bit.
eighths = st.integers(-400, 400).map(lambda n: n / 8)
quarters = st.integers(-12, 12).map(lambda n: n / 4)


def rows(n: int, vocab: int = 4):
    return st.lists(st.lists(eighths, min_size=vocab, max_size=vocab), min_size=n, max_size=n)


# ----------------------------------------------------------------------------------------------------------------------
# 1. Perturbed-logit linearity


@examples(60)
@given(rows(1), rows(1), quarters, quarters, quarters)
def test_perturbed_logits_are_affine_in_s(f, f_ref, s, t, a):
    f, f_ref = torch.tensor(f), torch.tensor(f_ref)
    mixed = a * perturbed_logits(f, f_ref, s) + (1 - a) * perturbed_logits(f, f_ref, t)
    assert torch.equal(perturbed_logits(f, f_ref, a * s + (1 - a) * t), mixed)


@examples(60)
@given(rows(2), rows(2), quarters, quarters)
def test_perturbed_logits_are_affine_in_each_argument(f, f_ref, s, a):
    (f, g), (f_ref, g_ref) = torch.tensor(f), torch.tensor(f_ref)
    mix = lambda x, y: a * x + (1 - a) * y  # noqa: E731
    in_policy = mix(perturbed_logits(f, f_ref, s), perturbed_logits(g, f_ref, s))
    in_reference = mix(perturbed_logits(f, f_ref, s), perturbed_logits(f, g_ref, s))
    assert torch.equal(perturbed_logits(mix(f, g), f_ref, s), in_policy)
    assert torch.equal(perturbed_logits(f, mix(f_ref, g_ref), s), in_reference)


@examples(60)
@given(rows(1), rows(1), quarters)
def test_perturbed_logits_start_at_the_policy_and_end_at_the_reference(f, f_ref, s):
    f, f_ref = torch.tensor(f), torch.tensor(f_ref)
    assert torch.equal(perturbed_logits(f, f_ref, 0.0), f)
    assert torch.equal(perturbed_logits(f, f_ref, -1.0), f_ref)
    midpoint = (perturbed_logits(f, f_ref, s) + perturbed_logits(f, f_ref, -s)) / 2
    assert torch.equal(midpoint, f)
    assert torch.equal(perturbed_logits(f, f_ref, 1.0), 2 * f - f_ref)  # away from the reference, not towards it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_perturbed_logits_are_computed_in_float32_or_better(dtype):
    f = torch.tensor([1.0, 2.0], dtype=dtype)
    out = perturbed_logits(f, torch.zeros_like(f), 0.01)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out, torch.tensor([1.01, 2.02], dtype=out.dtype))


@examples(60)
@given(rows(3), rows(3), st.lists(eighths, min_size=3, max_size=3), st.booleans())
def test_a_constant_added_to_a_position_moves_no_bit_where_it_is_representable(f, f_ref, constants, in_reference):
    f, f_ref, c = torch.tensor(f), torch.tensor(f_ref), torch.tensor(constants)[:, None]
    labels = torch.tensor([0, 1, 2])
    before = token_stats(f, f_ref, labels, 0.01)
    after = token_stats(f, f_ref + c, labels, 0.01) if in_reference else token_stats(f + c, f_ref, labels, 0.01)
    for name in ("logp", "ref_logp", "delta_minus", "delta_plus", "kl"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name


@examples(25)
@given(st.integers(0, 10**6), st.floats(-5, 0.5), st.sampled_from([-1000.0, -7.3, 0.1, 50.0]))
def test_a_constant_added_to_a_position_changes_nothing_but_rounding(seed, log_spread, constant):
    f, f_ref, labels = random_logits(seed, (4, 9), 10**log_spread)
    moved = f + constant  # rounds: compared with the same logits, exactly moved back
    back = moved.double() - constant
    after = token_stats(moved, f_ref, labels, 0.01)
    for i, y in enumerate(labels.tolist()):
        exact = exact_token(back[i].tolist(), f_ref[i].tolist(), y, 0.01)
        rounding = {
            k: exact_token(moved[i].tolist(), f_ref[i].tolist(), y, 0.01)[k] for k in ("rounding", "rounding_float64")
        }
        check_deltas(after, i, exact | rounding, 0.01, in_float64=False)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Monotonicity branches


@examples(200)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_the_step_follows_the_order_of_the_three_log_odds(delta_minus, delta_plus):
    z = 0.0
    z_minus, z_plus = z + delta_minus, z + delta_plus
    expected = 1 if z_minus > z > z_plus else -1 if z_minus < z < z_plus else 0
    step = beta_steps(*(torch.tensor([x], dtype=torch.float64) for x in (delta_minus, delta_plus)))
    assert step.tolist() == [expected] and step.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_branch_and_every_tie(dtype):
    tiny = torch.finfo(dtype).tiny
    signs = torch.tensor([-1e30, -1.0, -tiny, 0.0, tiny, 1.0, 1e30], dtype=dtype)
    grid = beta_steps(signs[:, None].expand(7, 7), signs[None, :].expand(7, 7))  # [Δ⁻, Δ⁺]
    expected = torch.zeros(7, 7, dtype=torch.int64)
    expected[4:, :3], expected[:3, 4:] = 1, -1  # everything else is kept: ties and pairs that are not monotone
    assert torch.equal(grid, expected)
    assert beta_steps(torch.tensor([-0.0]), torch.tensor([0.0])).item() == 0


@examples(40)
@given(st.integers(0, 10**6), st.floats(-6, 1), st.sampled_from([0.001, 0.05, 0.5, 0.9]))
def test_swapping_chosen_and_rejected_flips_step_and_margin(seed, log_spread, epsilon):
    f, f_ref, labels = pairs_of_logits(seed, spread=10**log_spread)
    straight = decide(f, f_ref, labels, epsilon)
    swapped = decide(*(x.roll(4, 0) for x in (f, f_ref, labels)), epsilon)
    assert torch.equal(swapped.step, -straight.step)
    assert torch.equal(swapped.margin, -straight.margin)


def test_all_three_branches_are_reached_from_logits():
    found = {step for seed in range(30) for step in decide(*pairs_of_logits(seed, spread=2.0), 0.9).step.tolist()}
    assert found == {-1, 0, 1}


@pytest.mark.parametrize("epsilon", [0.01, 0.3])
def test_steps_follow_the_three_log_odds_and_not_the_margin(epsilon):
    """The definition in NumPy: z(β⁻), z(β) and z(β⁺) of 200 pairs. Some step against the sign of their margin."""
    f, f_ref, labels = pairs_of_logits(0, pairs=200, spread=1.0)

    def log_odds(s: float) -> np.ndarray:  # chosen minus rejected, (200,)
        logits = (1 + s) * f.numpy() - s * f_ref.numpy()
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen, rejected = np.take_along_axis(log_probs, labels.numpy()[..., None], -1).sum((1, 2)).reshape(2, 200)
        return chosen - rejected

    smaller, now, larger, reference = (log_odds(s) for s in (epsilon, 0.0, -epsilon, -1.0))
    expected = 1 * ((smaller > now) & (now > larger)) - 1 * ((smaller < now) & (now < larger))
    out = decide(f, f_ref, labels, epsilon)
    assert out.step.tolist() == expected.tolist()
    np.testing.assert_allclose(out.margin, now - reference, rtol=1e-10, atol=1e-12)
    assert (out.step * out.margin < 0).sum() >= 5


def test_a_pair_is_lowered_when_a_smaller_beta_separates_it_better():
    """Worked by hand: the policy has moved towards the chosen token, so going further helps: step +1."""
    f, f_ref = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.zeros(2, 2)
    labels = torch.tensor([0, 1])  # chosen is the token that the policy has come to like
    out = decide(f[:, None], f_ref[:, None], labels[:, None], 0.01, beta=0.1, epsilon_step=0.02)
    assert out.step.tolist() == [1] and out.margin.item() == pytest.approx(2.0)
    assert out.beta.item() == 0.1 / 1.02
    assert decide(f[:, None], f_ref[:, None], labels.flip(0)[:, None], 0.01).step.tolist() == [-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [2, 33, 5000])
def test_at_the_reference_everything_is_exactly_zero(dtype, vocab):
    f, _, labels = random_logits(0, (6, 4, vocab), 0.0)
    f = f.to(dtype).requires_grad_()
    stats = token_stats(f, f.detach(), labels, 0.01)
    assert not stats.delta_minus.any() and not stats.delta_plus.any() and not stats.kl.any()
    assert torch.equal(stats.logp.double(), stats.ref_logp)
    out = decide(f, f.detach(), labels)
    assert out.step.tolist() == [0, 0, 0] and not out.margin.any()
    assert out.beta.tolist() == [0.1] * 3
    assert out.loss.item() == LN2


def test_step_zero_from_hidden_states_is_exactly_zero():
    hidden, weight = torch.randn(70, 16), torch.randn(300, 16)
    labels = torch.randint(300, (70,))
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            stats = epsdpo.linear_token_stats(hidden, weight, hidden.clone(), weight.clone(), labels, 0.1, chunk_size=8)
        assert not stats.delta_minus.any() and not stats.delta_plus.any() and not stats.kl.any()
        assert torch.equal(stats.logp.double(), stats.ref_logp)


@examples(100)
@given(st.floats(1e-6, 1e3), st.floats(1e-6, 0.5))
def test_beta_is_the_harmonic_mean_of_its_two_neighbours(beta, epsilon_step):
    out = epsdpo_loss(sums([0, 0, 0], 0, [1, 0, -1], [-1, 0, 1]), sums([0, 0, 0], 0), beta, epsilon_step)
    low, keep, high = out.beta.tolist()
    assert out.step.tolist() == [1, 0, -1]
    assert low < beta < high and keep == beta
    assert low == pytest.approx(beta / (1 + epsilon_step), rel=1e-15)
    assert 2 / (1 / low + 1 / high) == pytest.approx(beta, rel=1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The numbers per token, against 50-digit arithmetic


@examples(150)
@given(
    st.integers(0, 10**9),
    st.sampled_from([2, 3, 5, 40]),
    st.floats(-7, 2),
    st.sampled_from(KINDS),
    st.one_of(st.floats(-4, -0.005).map(lambda x: 10**x), st.sampled_from([0.01, 0.5, 0.99])),
)
def test_token_stats_equal_exact_arithmetic(seed, vocab, log_spread, kind, epsilon):
    f, f_ref, labels = random_logits(seed, (3, vocab), 10**log_spread, kind)
    check_against_exact(token_stats(f, f_ref, labels, epsilon), f, f_ref, labels, epsilon)


@pytest.mark.parametrize("spread, epsilon, kind", [(1e-5, 0.01, "normal"), (3.0, 0.5, "normal"), (0.1, 0.9, "offset")])
def test_token_stats_equal_exact_arithmetic_in_a_large_vocabulary(spread, epsilon, kind):
    f, f_ref, labels = random_logits(1, (1, 500), spread, kind)
    f, f_ref = f.repeat(1, 100), f_ref.repeat(1, 100)  # 50,000 entries of 500 values
    check_against_exact(token_stats(f, f_ref, labels, epsilon), f, f_ref, labels, epsilon)


@pytest.mark.parametrize("epsilon", [0.01, 0.5])
def test_rounding_does_not_grow_with_the_vocabulary(epsilon):
    """Sums of 50,000 float32 terms, one after the other, would be off by 1e-6 and more."""
    f, f_ref, labels = random_logits(2, (3, 500), 0.1)
    f, f_ref = f.repeat(1, 100), f_ref.repeat(1, 100)
    stats = token_stats(f, f_ref, labels, epsilon)
    for i, y in enumerate(labels.tolist()):
        e = exact_token(f[i].tolist(), f_ref[i].tolist(), y, epsilon)
        assert stats.kl[i].item() == pytest.approx(float(e["kl"]), rel=3e-7)
        for name in ("delta_minus", "delta_plus"):
            assert getattr(stats, name)[i].item() == pytest.approx(
                float(e[name]), abs=float(3e-7 * epsilon * e["u_mean"])
            )


@examples(40)
@given(st.integers(0, 10**9), st.floats(-11, 2), st.sampled_from(KINDS), st.sampled_from([1e-4, 0.01, 0.9]))
def test_float64_logits_keep_float64(seed, log_spread, kind, epsilon):
    f, f_ref, labels = random_logits(seed, (2, 6), 10**log_spread, kind, torch.float64)
    stats = token_stats(f, f_ref, labels, epsilon)
    assert all(x.dtype == torch.float64 for x in stats)
    for i, y in enumerate(labels.tolist()):
        e = exact_token(f[i].tolist(), f_ref[i].tolist(), y, epsilon)
        check_deltas(stats, i, e, epsilon, in_float64=True)
        assert abs(stats.logp[i].item() - e["logp"]) <= 1e-14 * (1 + float(f[i].abs().max()))
        rounding = 2.0**-50 * e["d_max"] * mpmath.sqrt(2 * e["kl"]) + (2.0**-50 * e["d_max"]) ** 2
        assert abs(stats.kl[i].item() - e["kl"]) <= 1e-8 * e["kl"] + rounding  # 1e-8: the series ends at x⁶


# (policy, reference, label, ε): where expm1 leaves float32, where p underflows, where the two models are sure of opposites
CORNERS = [
    ([0, -30], [0, -60], 0, 0.1),
    ([0, 15.9, 0], [0, 0, 0], 0, 0.06),
    ([0, 16.1, 0], [0, 0, 0], 0, 0.01),
    ([0, 99, 0], [0, 0, 0], 0, 0.99),
    ([0, -99, 0], [0, 0, 0], 0, 0.99),
    ([-40, 0, 0.5], [40, 0, 0], 0, 0.99),
    ([0, -200], [0, -900], 0, 0.3),
    ([0, -200], [-900, 0], 0, 0.3),
    ([0, -200], [-900, 0], 1, 0.3),
    ([0, 0], [0, 1000], 1, 0.01),
    ([1e4, 0], [-1e4, 0], 0, 0.1),
    ([1e4, 0], [-1e4, 0], 1, 0.1),
    ([0, -650], [0, -1400], 0, 0.99),
    ([0, -800], [0, -1700], 0, 0.99),
    ([0, -1700], [0, -800], 1, 0.99),
    ([3e38, 0], [-3e38, 0], 0, 0.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("f, f_ref, label, epsilon", CORNERS)
def test_far_from_the_reference(f, f_ref, label, epsilon, dtype):
    f, f_ref, label = torch.tensor([f], dtype=dtype), torch.tensor([f_ref], dtype=dtype), torch.tensor([label])
    stats = token_stats(f, f_ref, label, epsilon)
    e = exact_token(f[0].tolist(), f_ref[0].tolist(), label.item(), epsilon)
    check_deltas(stats, 0, e, epsilon, in_float64=dtype == torch.float64)
    assert stats.kl.item() == pytest.approx(float(e["kl"]), rel=1e-5, abs=1e-30)
    assert stats.ref_logp.item() == pytest.approx(float(e["ref_logp"]), rel=1e-6, abs=1e-5)


def test_float16_and_bfloat16_logits_are_cast_up_first():
    f, f_ref, labels = random_logits(3, (5, 9), 0.3)
    for dtype in (torch.float16, torch.bfloat16):
        low, low_ref = f.to(dtype), f_ref.to(dtype)
        for a, b in zip(
            token_stats(low, low_ref, labels, 0.01), token_stats(low.float(), low_ref.float(), labels, 0.01)
        ):
            assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float32])
def test_mixed_precisions_meet_in_the_higher_one(which, low):
    """A float64 model beside a float32 or bf16 one: nothing of the float64 logits is rounded before the difference."""
    logits = list(random_logits(4, (5, 9), 1e-5, dtype=torch.float64))[:2]
    labels = torch.arange(5)
    logits[which] = logits[which].to(low)
    mixed, plain = (token_stats(*x, labels, 0.01) for x in (logits, [x.double() for x in logits]))
    eye = [torch.eye(9, dtype=x.dtype) for x in logits]
    linear = epsdpo.linear_token_stats(logits[0], eye[0], logits[1], eye[1], labels, 0.01)
    for a, b, c in zip(mixed, plain, linear):
        assert torch.equal(a, b) and a.dtype == torch.float64
        torch.testing.assert_close(c, b, rtol=1e-12, atol=1e-15)
    assert torch.equal(perturbed_logits(*logits, 0.5), perturbed_logits(*(x.double() for x in logits), 0.5))


@examples(20)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 0.1, 1.0]), st.sampled_from([0.01, 0.3]))
def test_the_readable_definition_says_the_same(seed, spread, epsilon):
    f, f_ref, labels = random_logits(seed, (3, 4, 11), spread, dtype=torch.float64)
    fast, plain = token_stats(f, f_ref, labels, epsilon), epsdpo.token_stats_by_definition(f, f_ref, labels, epsilon)
    for name in TokenStats._fields:
        torch.testing.assert_close(getattr(fast, name), getattr(plain, name), rtol=1e-8, atol=1e-13)
    out = epsdpo.token_stats_by_definition(f.float().requires_grad_(), f_ref.float(), labels, epsilon)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]
    e = exact_token(f[0, 0].tolist(), f_ref[0, 0].tolist(), labels[0, 0].item(), epsilon)
    for name in TokenStats._fields:  # and not merely the fast path's own mistakes
        assert getattr(plain, name)[0, 0].item() == pytest.approx(float(e[name]), rel=1e-9, abs=1e-13)


@examples(40)
@given(st.integers(0, 10**6), st.floats(-7, 0), st.sampled_from(["normal", "offset", "tail"]))
def test_kl_is_never_negative(seed, log_spread, kind):
    f, f_ref, labels = random_logits(seed, (50, 30), 10**log_spread, kind)
    assert (token_stats(f, f_ref, labels, 0.01).kl >= 0).all()
    assert (token_stats(f.double(), f_ref.double(), labels, 0.01).kl >= 0).all()


@examples(25)
@given(st.integers(0, 10**6), st.floats(-3, 1.5), st.sampled_from([0.01, 0.3, 0.9]))
def test_a_responses_log_probability_is_concave_in_lambda(seed, log_spread, epsilon):
    f, f_ref, labels = random_logits(seed, (3, 5, 8), 10**log_spread, dtype=torch.float64)
    stats = to_sequence(token_stats(f, f_ref, labels, epsilon))
    assert (stats.delta_minus + stats.delta_plus <= 1e-12).all()  # so each response's curve bends down around λ = 1
    for s in (-1.5, -0.3, 0.4, 2.0):
        below, at, above = (
            perturbed_logits(f, f_ref, x).log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2))
            for x in (s - epsilon, s, s + epsilon)
        )
        assert (above + below - 2 * at <= 1e-10 * at.abs()).all()


@examples(25)
@given(st.integers(0, 10**6), st.floats(-4, 0.3), st.sampled_from([1e-2, 1e-3, 1e-4]))
def test_first_order_law(seed, log_spread, epsilon):
    """Δ⁻ = ε·(margin − KL gap) + O(ε²), Δ⁺ its negative: the decision compares the margin with the KL gap."""
    f, f_ref, labels = pairs_of_logits(seed, spread=10**log_spread)
    stats = to_sequence(token_stats(f, f_ref, labels, epsilon))
    chosen, rejected = (TokenStats(*(x[part] for x in stats)) for part in (slice(4), slice(4, None)))
    margin = epsdpo_loss(chosen, rejected, 0.1, 0.1).margin
    law = margin - (chosen.kl - rejected.kl)
    d = f - f_ref
    second_order = 3 * epsilon * ((d.amax(-1) - d.amin(-1)) ** 2).sum(-1).view(2, -1).sum(0) + 1e-11
    assert ((chosen.delta_minus - rejected.delta_minus) / epsilon - law).abs().le(second_order).all()
    assert ((chosen.delta_plus - rejected.delta_plus) / epsilon + law).abs().le(second_order).all()


def test_epsilon_check_zero_keeps_every_pair():
    f, f_ref, labels = pairs_of_logits(0, spread=20.0)
    stats = token_stats(f, f_ref, labels, 0.0)
    assert not stats.delta_minus.any() and not stats.delta_plus.any()
    assert decide(f.float(), f_ref.float(), labels, 0.0).step.tolist() == [0] * 4


def test_rewards_by_hand():
    """log-probabilities −10 and −9, reference −12 and −9, β 0.1: rewards 0.2 and 0, loss −log σ(0.2)."""
    out = epsdpo_loss(sums([-10.0], [-12.0]), sums([-9.0], [-9.0]), 0.1, 0.01)
    assert out.margin.item() == 2.0
    assert out.loss.item() == pytest.approx(0.5981388693815918, abs=1e-15)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Tiles, chunks, batches


@pytest.mark.parametrize("tile", [1, 40, 95, 1000])
def test_tile_size_moves_no_bit(monkeypatch, tile):
    f, f_ref, labels = random_logits(5, (23, 40), 0.1)
    f_ref[7] -= 30 * torch.randn(40, generator=torch.Generator().manual_seed(0))  # one token needs float64
    whole = token_stats(f, f_ref, labels, 0.3)
    monkeypatch.setattr(epsdpo, "TILE", tile)
    assert all(torch.equal(a, b) for a, b in zip(whole, token_stats(f, f_ref, labels, 0.3)))
    check_against_exact(whole, f, f_ref, labels, 0.3)


@pytest.mark.parametrize("other", ([0.0, 0.0, 0.0], [3.9, 0.0, 0.0], [60.0, 0.0, 0.0], [3e38, 0.0, 0.0]))
def test_a_token_is_independent_of_its_neighbours(other):
    """The second token needs few moments or many, or float64; in the last case its f − f_ref overflows float32."""
    f, f_ref, labels = torch.tensor([[-5.0, 0.5, 2.5], other]), torch.tensor([[-5.0, -1.0, 3.1], [0.0] * 3]), Y3[:2]
    f_ref[1, 0] = -other[0] if other[0] == 3e38 else 0.0
    for order in ([0, 1], [1, 0]):
        both, alone = token_stats(f[order], f_ref[order], labels, 0.1), token_stats(f[:1], f_ref[:1], labels[:1], 0.1)
        assert all(torch.equal(a[order.index(0)], b[0]) for a, b in zip(both, alone))
    check_against_exact(alone, f, f_ref, labels[:1], 0.1)


@pytest.mark.parametrize("epsilon", [0.01, 0.9])
def test_the_series_of_moments_ends_late_enough(epsilon):
    """Two equally likely tokens: |c| is the same for both, so the bound on what the series leaves out is reached."""
    x = torch.arange(1, 250) / 64  # all inputs, p, u and c are exact in float32
    f, f_ref, labels = torch.zeros(len(x), 2), torch.stack([0 * x, -x], -1), torch.zeros(len(x), dtype=torch.int64)
    stats = token_stats(f, f_ref, labels, epsilon)
    for i, y in enumerate(labels.tolist()):
        e = exact_token(f[i].tolist(), f_ref[i].tolist(), y, epsilon)
        assert stats.kl[i].item() == pytest.approx(float(e["kl"]), rel=3e-7)
        for name in ("delta_minus", "delta_plus"):
            assert getattr(stats, name)[i].item() == pytest.approx(float(e[name]), rel=3e-7)


def linear_inputs(seed: int, m: int = 23, vocab: int = 11, width: int = 6, ref_width: int = 4, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden, ref_hidden = torch.randn(m, width, generator=g), torch.randn(m, ref_width, generator=g)
    weight, ref_weight = torch.randn(vocab, width, generator=g), torch.randn(vocab, ref_width, generator=g)
    labels = torch.randint(vocab, (m,), generator=g)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, ref_hidden, ref_weight)]
    return (*leaves, labels)


@pytest.mark.parametrize("m", [0, 1, 7, 23])
@pytest.mark.parametrize("chunk_size", [1, 5, 23, 256])
def test_linear_token_stats_equal_token_stats_of_the_logits(m, chunk_size):
    hidden, weight, ref_hidden, ref_weight, labels = linear_inputs(m, m)
    upstream = torch.randn(m, dtype=torch.float64)
    plain = token_stats(hidden @ weight.T, ref_hidden @ ref_weight.T, labels, 0.2)
    fused = epsdpo.linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.2, chunk_size)
    for name in TokenStats._fields:
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name), rtol=1e-10, atol=1e-13)
    expected = torch.autograd.grad((plain.logp * upstream).sum(), [hidden, weight])
    found = torch.autograd.grad((fused.logp * upstream).sum(), [hidden, weight])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("m", [0, 1, 7, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_grad_is_added_to_in_place(m, dtype):
    hidden, weight, ref_hidden, ref_weight, labels = linear_inputs(m, m, dtype=dtype)
    plain = token_stats(hidden @ weight.T, ref_hidden @ ref_weight.T, labels, 0.2)
    of_hidden, of_weight = torch.autograd.grad(plain.logp.sum(), [hidden, weight])
    start = torch.randn_like(weight)
    kept = weight.grad = start.clone()
    for times in (1, 2):
        hidden.grad = None
        stats = epsdpo.linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.2, 5, weight.grad)
        stats.logp.sum().backward()
        assert weight.grad is kept
        torch.testing.assert_close(kept, start + times * of_weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(hidden.grad, of_hidden, rtol=1e-4, atol=1e-5)


def test_a_weight_grad_of_another_dtype_is_left_to_autograd():
    """A float64 reference makes float64 logits, and a float32 gradient cannot add up their products."""
    hidden, weight, ref_hidden, ref_weight, labels = linear_inputs(1, dtype=torch.float32)
    ref_hidden, ref_weight = ref_hidden.double(), ref_weight.double()
    wanted = torch.autograd.grad(
        epsdpo.linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.2).logp.sum(), weight
    )[0]
    weight.grad = torch.ones_like(weight)
    stats = epsdpo.linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.2, weight_grad=weight.grad)
    stats.logp.sum().backward()
    assert torch.equal(weight.grad, 1 + wanted)


def test_gradcheck():
    hidden, weight, ref_hidden, ref_weight, labels = linear_inputs(0, m=5, vocab=4, width=3)

    def fused(hidden, weight):
        return epsdpo.linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.2, chunk_size=2).logp

    assert torch.autograd.gradcheck(fused, (hidden, weight))
    f, f_ref, labels = random_logits(0, (2, 3, 4), 1.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda f: token_stats(f, f_ref, labels, 0.2).logp, (f.requires_grad_(),))


def test_only_logp_carries_gradient_and_sums_are_float64():
    hidden, weight, ref_hidden, ref_weight, labels = linear_inputs(1, dtype=torch.float32)
    logits = (hidden @ weight.T, ref_hidden @ ref_weight.T)
    for stats in (
        token_stats(*logits, labels, 0.2),
        epsdpo.linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.2),
    ):
        assert [x.requires_grad for x in stats] == [True] + [False] * 4
        assert [x.dtype for x in stats] == [torch.float32] + [torch.float64] * 4
        assert all(x.shape == labels.shape for x in stats)
        total = epsdpo.sum_over_responses(stats, torch.zeros_like(labels), 1)
        assert [x.requires_grad for x in total] == [True] + [False] * 4
        assert all(x.dtype == torch.float64 for x in total)
        assert torch.autograd.grad(total.logp.sum(), [ref_hidden, ref_weight], allow_unused=True) == (None, None)


@pytest.mark.parametrize(
    "hidden_dtype, weight_dtype", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16",) * 2]
)
def test_the_head_is_float32_under_autocast_forward_and_backward(hidden_dtype, weight_dtype):
    """Small integers: the float32 products are exact in any order, and rounding them to bf16 would show."""
    g = torch.Generator().manual_seed(0)
    integers = lambda *shape: torch.randint(-9, 10, shape, generator=g)  # noqa: E731
    hidden, weight = (
        integers(12, 40).to(getattr(torch, hidden_dtype)),
        integers(30, 40).to(getattr(torch, weight_dtype)),
    )
    ref_hidden, ref_weight = hidden.clone(), weight.clone()
    ref_weight[:, 0] += 1
    labels = torch.randint(30, (12,), generator=g)
    hidden.requires_grad_(), weight.requires_grad_()
    assert (hidden.float() @ weight.float().T).abs().max() > 256  # beyond bf16's integers
    plain = token_stats(hidden.float() @ weight.float().T, ref_hidden.float() @ ref_weight.float().T, labels, 0.01)
    expected = torch.autograd.grad(plain.logp.sum(), [hidden, weight])
    with torch.autocast("cpu", torch.bfloat16):
        fused = epsdpo.linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.01, chunk_size=5)
        found = torch.autograd.grad(fused.logp.sum(), [hidden, weight])
    for a, b in zip(fused, plain):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
        assert a.dtype == b.dtype
    for a, b, leaf in zip(found, expected, (hidden, weight)):
        assert a.dtype == leaf.dtype
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if leaf.dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-2}
        torch.testing.assert_close(a, b, **tolerance)


class _LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gave back."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return out


def test_no_more_than_a_chunk_of_logits_exists_at_a_time():
    hidden, weight, ref_hidden, ref_weight, labels = linear_inputs(0, m=200, vocab=50, width=3, dtype=torch.float32)
    with _LargestTensor() as largest:
        epsdpo.linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.1, 10).logp.sum().backward()
    assert 10 * 50 <= largest.size <= 200 * 4, "logits are (chunk, V); hidden states and weights are smaller here"


class _Logits(TorchDispatchMode):
    """How many matmuls gave back rows as wide as the vocabulary."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += func is torch.ops.aten.mm.default and out.shape[1] == 50
        return out


def test_a_far_tail_counts_in_moments():
    """|c| reaches 7.7 where |u| stays below 4: the series goes on until what it leaves out is small there too."""
    f, f_ref, labels = torch.tensor([[-5.0, 0.5, 8.5]]), torch.tensor([[-5.0, -3.4, 12.4]]), torch.tensor([0])
    check_against_exact(token_stats(f, f_ref, labels, 0.01), f, f_ref, labels, 0.01)
    assert float(token_stats(f, f_ref, labels, 0.01).kl) == pytest.approx(0.0022845, rel=1e-4)


def test_pairs_are_compared_in_float64():
    """float32 would see a tie."""
    one, zero = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.0))
    chosen = TokenStats(zero, zero, one + 1e-9, -one - 1e-9, zero)
    rejected = TokenStats(zero, zero, one, -one, zero)
    assert epsdpo_loss(chosen, rejected, 0.1, 0.1).step.tolist() == [1]


def test_backward_computes_again_the_logits_of_all_chunks_but_the_last():
    hidden, weight, ref_hidden, ref_weight, labels = linear_inputs(0, m=25, vocab=50, width=3, dtype=torch.float32)
    with _Logits() as forward:
        logp = epsdpo.linear_token_stats(hidden, weight, ref_hidden, ref_weight, labels, 0.1, 10).logp
    with _Logits() as backward:
        once = torch.autograd.grad(logp.sum(), [hidden, weight], retain_graph=True)
    with _Logits() as anew:
        twice = torch.autograd.grad(logp.sum(), [hidden, weight])
    assert (forward.count, backward.count, anew.count) == (6, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(once, twice))


@examples(15)
@given(st.integers(0, 10**6), st.permutations(range(4)))
def test_permuting_pairs_permutes_their_numbers(seed, order):
    f, f_ref, labels = pairs_of_logits(seed, spread=1.0)
    out = decide(f, f_ref, labels)
    index = torch.tensor([*order, *(4 + i for i in order)])
    permuted = decide(f[index], f_ref[index], labels[index])
    assert torch.equal(permuted.step, out.step[list(order)])
    for name in ("losses", "beta", "margin"):
        torch.testing.assert_close(getattr(permuted, name), getattr(out, name)[list(order)], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(permuted.loss, out.loss, rtol=1e-14, atol=0)


@examples(15)
@given(st.integers(0, 10**6))
def test_the_other_pairs_never_change_a_pairs_numbers(seed):
    f, f_ref, labels = pairs_of_logits(seed, spread=1.0)
    alone = decide(*(x[[2, 6]] for x in (f, f_ref, labels)))
    out = decide(f, f_ref, labels)
    assert out.step[2] == alone.step[0]
    for name in ("losses", "beta", "margin"):
        torch.testing.assert_close(getattr(out, name)[2:3], getattr(alone, name), rtol=1e-12, atol=1e-14)


@examples(25)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=500), st.integers(0, 10**6))
def test_sums_over_responses(owner, seed):
    """Lengths from 1 to 500 in any order, responses without a token included: each sum is that of its own tokens."""
    f, f_ref, labels = random_logits(seed, (len(owner), 3), 1.0)
    stats = token_stats(f, f_ref, labels, 0.05)
    total = epsdpo.sum_over_responses(stats, torch.tensor(owner), 6)
    for name in TokenStats._fields:
        column = getattr(stats, name).tolist()
        expected = [math.fsum(x for x, o in zip(column, owner) if o == i) for i in range(6)]
        assert getattr(total, name).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12), name


def test_a_long_response_loses_nothing_to_its_length():
    """One token of 1e-8 beside 500 of alternating ±1: float64 sums keep it, float32 sums do not."""
    big = torch.tensor([1.0, -1.0]).repeat(250)
    column = torch.cat([big, torch.tensor([1e-8]), big]).double()
    stats = TokenStats(column.float(), column, column, -column, column)
    total = epsdpo.sum_over_responses(stats, torch.zeros(len(column), dtype=torch.int64), 1)
    assert total.delta_minus.item() == pytest.approx(1e-8, rel=1e-6)
    assert total.logp.item() == pytest.approx(1e-8, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Loss and gradient


@examples(25)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.1, 3.0]), st.sampled_from([0.0, 0.01, 0.5]))
def test_gradient_is_dpos_at_beta_tilde_in_closed_form(seed, beta, epsilon_step):
    """∂loss/∂f = ∓(onehot − p)·σ(−β̃·margin)·β̃/B at each token: − for chosen, + for rejected responses."""
    f, f_ref, labels = pairs_of_logits(seed, spread=1.0)
    f.requires_grad_()
    out = decide(f, f_ref, labels, 0.3, beta, epsilon_step)
    (found,) = torch.autograd.grad(out.loss, f)
    with torch.no_grad():
        scale = (torch.sigmoid(-out.beta * out.margin) * out.beta / len(out.beta)).repeat(2)  # (2B,)
        sign = torch.tensor([-1.0] * 4 + [1.0] * 4)
        onehot = torch.nn.functional.one_hot(labels, f.shape[-1])
        expected = (sign * scale)[:, None, None] * (onehot - f.softmax(-1))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@examples(40)
@given(st.lists(st.floats(-300, 300), min_size=4, max_size=4), st.floats(1e-3, 10), st.floats(0, 0.5))
def test_loss_is_the_mean_negative_log_sigmoid(numbers, beta, epsilon_step):
    a, b, c, d = numbers
    for delta, beta_tilde in ((1.0, beta / (1 + epsilon_step)), (0.0, beta), (-1.0, beta / (1 - epsilon_step))):
        out = epsdpo_loss(
            sums([a, 0.0], [b, 0.0], [delta, 0.0], [-delta, 0.0]), sums([c, 0.0], [d, 0.0]), beta, epsilon_step
        )
        margin = (a - b) - (c - d)
        x = mpmath.mpf(beta_tilde) * margin
        assert out.margin[0].item() == pytest.approx(margin, abs=1e-12)
        assert out.losses[0].item() == pytest.approx(float(mpmath.log1p(mpmath.exp(-x))), rel=1e-12, abs=1e-300)
        assert out.losses[1].item() == LN2
        assert out.loss.item() == pytest.approx(out.losses.mean().item(), rel=1e-15)
        assert out.beta[0].item() == pytest.approx(beta_tilde, rel=1e-15)


def test_dtypes_and_gradient_of_the_loss():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)  # float32 sums are lifted to float64
    chosen = TokenStats(logp, logp.detach() - 1, *(torch.tensor([1.0, -1.0]) * s for s in (1, -1)), torch.zeros(2))
    out = epsdpo_loss(
        chosen, chosen._replace(logp=logp * 2, delta_minus=torch.zeros(2), delta_plus=torch.zeros(2)), 0.1, 0.01
    )
    assert [x.requires_grad for x in out] == [True, True, False, False, False]
    assert [x.dtype for x in out] == [torch.float64] * 3 + [torch.int64, torch.float64]
    assert out.loss.shape == () and all(x.shape == (2,) for x in out[1:])


@pytest.mark.parametrize("wide", [0.0999, 0.05, 1e-3, 1e-8])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_kl_of_two_words_is_exact_to_the_last_digits(wide, sign):
    """Float64 logits that differ by less than a tenth: every term of the series counts, the last one for 1e-12."""
    f = torch.tensor([[math.log(2.0), 0.0]], dtype=torch.float64)
    f_ref = f + torch.tensor([0.0, sign * wide], dtype=torch.float64)
    exact = exact_token(f[0].tolist(), f_ref[0].tolist(), 0, 0.01)["kl"]
    assert abs(token_stats(f, f_ref, torch.tensor([0]), 0.01).kl.item() - exact) <= 2e-14 * exact


def test_no_gradient_reaches_the_reference():
    """A port may compute the reference's sums with autograd on, perhaps from weights that it shares with the policy."""
    logp = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([-1.5, -1.0], dtype=torch.float64, requires_grad=True)
    tied = sums(logp, ref_logp, 1.0, -1.0)
    epsdpo_loss(tied, sums([0.0, 0.0], ref_logp), 0.1, 0.01).loss.backward()
    assert ref_logp.grad is None and logp.grad.abs().min() > 0


def test_losses_saturate_without_overflow():
    out = epsdpo_loss(sums([1e5, -1e5, 0.0], 0.0), sums([0.0, 0.0, 0.0], 0.0), 0.1, 0.0)
    assert out.losses.tolist() == [0.0, 1e4, LN2]


def test_no_pairs_are_no_loss():
    """A process without pairs in this step has sums of shape (0,)."""
    none = TokenStats(*torch.zeros(5, 0, dtype=torch.float64))
    out = epsdpo_loss(none, none, 0.1, 0.01)
    assert out.losses.shape == out.step.shape == (0,) and out.loss.isnan()


def test_epsilon_step_zero_is_plain_dpo_to_the_bit():
    """Loss, gradient, β̃ and β over 1,000 steps, whatever the steps say."""
    g = torch.Generator().manual_seed(0)
    beta, seen = 0.1, set()
    for _ in range(1000):
        logp = (-50 * torch.rand(2, 8, generator=g)).requires_grad_()
        ref_logp, deltas = -50 * torch.rand(2, 8, generator=g).double(), torch.randn(2, 2, 8, generator=g)
        chosen, rejected = (TokenStats(logp[i], ref_logp[i], *deltas[i], torch.zeros(8)) for i in range(2))
        out = epsdpo_loss(chosen, rejected, beta, 0.0)
        margin = (logp[0].double() - ref_logp[0]) - (logp[1].double() - ref_logp[1])
        dpo = -torch.nn.functional.logsigmoid(0.1 * margin)
        assert torch.equal(out.losses, dpo) and torch.equal(out.loss, dpo.mean())
        found, expected = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (out.loss, dpo.mean()))
        assert torch.equal(found, expected)
        assert out.beta.tolist() == [0.1] * 8
        counts = [int((out.step == s).sum()) for s in (1, 0, -1)]
        seen.update(out.step.tolist())
        beta = next_beta(beta, *counts, 0.0)
        assert beta == 0.1
    assert seen == {-1, 0, 1}


# ----------------------------------------------------------------------------------------------------------------------
# 6. Next β

counts = st.tuples(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300)).filter(lambda n: sum(n) > 0)


def test_next_beta_by_hand():
    assert next_beta(0.1, 2, 0, 1, 0.01) == pytest.approx(0.0996766343, abs=5e-11)
    assert next_beta(0.1, 0, 5, 0, 0.01) == 0.1


@examples(200)
@given(st.floats(1e-4, 100), counts, st.floats(0, 0.5))
def test_next_beta_is_the_arithmetic_mean_of_beta_tilde(beta, n, epsilon_step):
    b, e = Fraction(beta), Fraction(epsilon_step)
    n_lower, n_keep, n_raise = n
    exact = (n_lower * b / (1 + e) + n_keep * b + n_raise * b / (1 - e)) / sum(n)
    found = next_beta(beta, *n, epsilon_step)
    assert isinstance(found, float)
    assert abs(found - exact) <= 4 * Fraction(math.ulp(beta) * 2)
    harmonic = Fraction(sum(n)) / (n_lower * (1 + e) / b + n_keep / b + n_raise * (1 - e) / b)  # the authors' baseline
    assert harmonic <= Fraction(found + 4 * math.ulp(found))
    if e == 0 or n_keep == sum(n):
        assert found == beta
    if epsilon_step > 1e-9:
        assert (n_raise == 0 and n_lower > 0) <= (found < beta)
        assert (n_lower == 0 and n_raise > 0) <= (found > beta)


@examples(50)
@given(st.floats(1e-4, 1), st.lists(counts, min_size=1, max_size=6), st.sampled_from([0.01, 0.1]))
def test_next_beta_of_split_counts_is_that_of_the_whole(beta, parts, epsilon_step):
    """Through the losses: any split of the batch gives the same counts, so the same next β, to the bit."""
    steps = [s for n in parts for s, k in zip((1, 0, -1), n) for _ in range(min(k, 20))]
    if not steps:
        return
    deltas = torch.tensor(steps, dtype=torch.float64)
    zero = torch.zeros_like(deltas)

    def count(part: slice) -> list[int]:
        pairs = [sums(zero[part], 0.0, d[part], -d[part]) for d in (deltas, zero)]
        out = epsdpo_loss(*pairs, beta, epsilon_step)
        return [int((out.step == s).sum()) for s in (1, 0, -1)]

    whole = count(slice(None))
    pieces = [count(slice(i, i + 7)) for i in range(0, len(steps), 7)]
    assert next_beta(beta, *map(sum, zip(*pieces)), epsilon_step) == next_beta(beta, *whole, epsilon_step)
    mean = epsdpo_loss(sums(zero, 0.0, deltas, -deltas), sums(zero, 0.0), beta, epsilon_step).beta.mean().item()
    assert next_beta(beta, *whole, epsilon_step) == pytest.approx(mean, rel=1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Bad input is an error that says what was wrong

F3, F3_REF, Y3 = torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("vocab", [5, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_non_finite_logits_are_an_error_at_any_place(value, which, vocab, dtype):
    for token, entry in [(0, 0), (1, 1), (2, 2), (3, vocab - 1)]:  # labels are 1: before, at and behind the label
        logits = [x.to(dtype) for x in random_logits(0, (4, vocab), 0.1)[:2]]
        logits[which][token, entry] = value
        labels = torch.ones(4, dtype=torch.int64)
        with pytest.raises(ValueError, match=f"logits of token {token} are not finite"):
            token_stats(*logits, labels, 0.01)
        if dtype != torch.bfloat16:
            eye = torch.eye(vocab, dtype=dtype)
            clean = [x.nan_to_num(0.0, 0.0, 0.0) for x in logits]
            clean[which][token, entry] = value if value == value else math.nan
            with pytest.raises(ValueError, match="are not finite"):
                epsdpo.linear_token_stats(clean[0], eye, clean[1], eye, labels, 0.01, chunk_size=2)


def test_both_models_infinite_at_the_same_entry_is_an_error_too():
    for value in (math.inf, -math.inf):
        f = torch.zeros(2, 4)
        f[1, 3] = value
        with pytest.raises(ValueError, match="logits of token 1 are not finite: the policy or the reference"):
            token_stats(f, f.clone(), torch.zeros(2, dtype=torch.int64), 0.01)


def test_finite_logits_whose_difference_overflows_float32_are_fine():
    stats = token_stats(torch.tensor([[3e38, 0.0]]), torch.tensor([[-3e38, 0.0]]), torch.tensor([0]), 0.01)
    assert stats.delta_minus.isfinite().all()


LINEAR = (torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3, 5), torch.zeros(4, 5), Y3)
ONE = TokenStats(*torch.zeros(5, 1, dtype=torch.float64))  # the sums of one pair's response

OTHER_SHAPES = [  # (call, the shapes that the message names)
    (lambda: perturbed_logits(F3, torch.zeros(3, 5), 0.1), "(3, 4), (3, 5)"),
    (lambda: perturbed_logits(F3, torch.zeros(4), 0.1), "(3, 4), (4,)"),
    (lambda: token_stats(F3, torch.zeros(3, 5), Y3, 0.1), "(3, 4), (3, 5), (3,)"),
    (lambda: token_stats(F3, torch.zeros(1, 4), Y3, 0.1), "(3, 4), (1, 4), (3,)"),
    (lambda: token_stats(F3, F3_REF, Y3[:2], 0.1), "(3, 4), (3, 4), (2,)"),
    (lambda: token_stats(torch.zeros(()), torch.zeros(()), Y3[:0], 0.1), "(), (), (0,)"),
    (lambda: token_stats(torch.zeros(0, 0), torch.zeros(0, 0), Y3[:0], 0.1), "(0, 0), (0, 0), (0,)"),
    (lambda: epsdpo.token_stats_by_definition(F3, F3_REF, Y3[:2], 0.1), "(3, 4), (3, 4), (2,)"),
    (lambda: beta_steps(torch.zeros(2), torch.zeros(3)), "(2,), (3,)"),
    (lambda: epsdpo_loss(sums([0.0], 0.0), sums([0.0, 0.0], 0.0), 0.1, 0.1), "(1,), (1,), (1,), (1,), (1,), (2,)"),
    (lambda: epsdpo_loss(ONE._replace(kl=torch.zeros(2)), ONE, 0.1, 0.1), "(1,), (1,), (1,), (1,), (2,), (1,)"),
    (lambda: epsdpo_loss(*[TokenStats(*torch.zeros(5, 2, 3))] * 2, 0.1, 0.1), "(2, 3), (2, 3)"),
    (lambda: epsdpo_loss(*[TokenStats(*torch.zeros(5))] * 2, 0.1, 0.1), "(), ()"),
]
OTHER_SHAPES += [  # hidden, weight, ref_hidden, ref_weight, labels: one of them does not fit the other four
    (lambda i=i, shape=shape: linear_with(i, torch.zeros(shape, dtype=LINEAR[i].dtype)), str(shape))
    for i, shape in [
        *((0, shape) for shape in ((3, 3), (2, 2), (3,), ())),
        *((1, shape) for shape in ((6, 2), (4, 3), (4,))),
        *((2, shape) for shape in ((2, 5), (3, 2), (5,))),
        *((3, shape) for shape in ((4, 2), (6, 5), (5,))),
        *((4, shape) for shape in ((2,), (3, 1), ())),
    ]
]


def linear_with(i: int, value) -> TokenStats:
    return epsdpo.linear_token_stats(*(value if i == j else x for j, x in enumerate(LINEAR)), 0.1)


@pytest.mark.parametrize("call, shapes", OTHER_SHAPES)
def test_shapes_that_do_not_fit_are_named(call, shapes):
    with pytest.raises(ValueError, match="^expected .*, found ") as error:
        call()
    assert shapes in str(error.value).split(", found ")[1]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: token_stats(F3.long(), F3_REF, Y3, 0.1),
            "expected a floating dtype, found torch.int64, torch.float32",
        ),
        (
            lambda: token_stats(F3, F3_REF.long(), Y3, 0.1),
            "expected a floating dtype, found torch.float32, torch.int64",
        ),
        (lambda: linear_with(2, LINEAR[2].long()), "expected a floating dtype, found .*torch.int64"),
        (lambda: linear_with(3, LINEAR[3].to(torch.complex64)), "expected a floating dtype, found .*torch.complex64"),
        (lambda: token_stats(F3, F3_REF, Y3.int(), 0.1), "expected int64 labels, found torch.int32"),
        (lambda: linear_with(4, Y3.int()), "expected int64 labels, found torch.int32"),
    ],
)
def test_other_dtypes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("labels, found", [([4, 4, 4], "4 to 4"), ([0, -1, 3], "-1 to 3"), ([0, 4, 3], "0 to 4")])
def test_labels_outside_the_vocabulary_are_named(labels, found):
    labels = torch.tensor(labels)
    for call in (lambda: token_stats(F3, F3_REF, labels, 0.1), lambda: linear_with(4, labels)):
        with pytest.raises(ValueError, match=f"expected labels from 0 to 3, found {found}$"):
            call()


def epsilon_check_calls(value: float) -> list:
    return [
        lambda: token_stats(F3, F3_REF, Y3, value),
        lambda: epsdpo.token_stats_by_definition(F3, F3_REF, Y3, value),
        lambda: epsdpo.linear_token_stats(*LINEAR, value),
    ]


def beta_calls(beta: float, epsilon_step: float) -> list:
    return [lambda: epsdpo_loss(ONE, ONE, beta, epsilon_step), lambda: next_beta(beta, 1, 1, 1, epsilon_step)]


@pytest.mark.parametrize(
    "calls, message",
    [
        *(
            (epsilon_check_calls(x), f"epsilon_check must be at least 0 and below 1 (got {x})")
            for x in (1.0, -0.01, 1.5)
        ),
        (epsilon_check_calls(math.nan), "epsilon_check must be at least 0 and below 1 (got nan)"),
        *((beta_calls(x, 0.1), f"beta must be finite and above 0 (got {x})") for x in (0.0, -0.1, math.inf, math.nan)),
        *((beta_calls(0.1, x), f"epsilon_step must be between 0 and 0.5 (got {x})") for x in (0.51, -0.1, math.nan)),
        ([lambda: epsdpo.linear_token_stats(*LINEAR, 0.1, chunk_size=0)], "chunk_size must be at least 1 (got 0)"),
        *(
            (
                [lambda n=n: next_beta(0.1, *n, 0.1)],
                f"expected counts of pairs, found {n[0]} lower, {n[1]} keep, {n[2]} raise",
            )
            for n in (
                (0, 0, 0),
                (-1, 1, 1),
                (1, -1, 1),
                (1, 1, -1),
                (math.nan, 1, 1),
                (1, math.nan, 1),
                (1, 1, math.inf),
            )
        ),
    ],
)
def test_numbers_out_of_range_are_named(calls, message):
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


def test_the_limits_themselves_are_allowed():
    assert next_beta(0.1, 0, 0, 1, 0.5) == pytest.approx(0.2)
    token_stats(F3, F3_REF, Y3 + 3, 0.0)
    token_stats(F3, F3_REF, Y3, 0.999)
    assert token_stats(torch.zeros(0, 4), torch.zeros(0, 4), Y3[:0], 0.1).logp.shape == (0,)


def test_the_better_of_two_precisions_counts():
    dice = torch.Generator().manual_seed(0)
    f = torch.randn(5, 9, generator=dice)
    f_ref = f.double() + 1e-9 * torch.randn(5, 9, generator=dice, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 4])
    wanted = token_stats(f.double(), f_ref, y, 0.1)
    for a, b in zip(token_stats(f, f_ref, y, 0.1), wanted):
        assert torch.equal(a, b)
    unit = torch.eye(9, dtype=torch.float64)
    for a, b in zip(epsdpo.linear_token_stats(f, unit.float(), f_ref, unit, y, 0.1), wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_never_keep_a_pair_in_silence(value):
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, value, 0.0]])
    for pair in ((good, bad), (bad, good), (bad, bad)):
        with pytest.raises(ValueError, match="logits of token 1 are not finite"):
            epsdpo.token_stats_by_definition(*pair, torch.tensor([0, 0]), 0.1)
    for deltas in (([value, 1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, value])):
        with pytest.raises(ValueError, match="must be finite"):
            beta_steps(*map(torch.tensor, deltas))
    for field in ("logp", "ref_logp", "delta_minus", "delta_plus"):
        broken = ONE._replace(**{field: ONE.logp + value})
        for pair in ((broken, ONE), (ONE, broken)):
            with pytest.raises(ValueError, match="must be finite"):
                epsdpo_loss(*pair, 0.1, 0.01)
