"""What is right, by the definition of the method, in 60-digit decimal arithmetic (standard library only).

`expect(case)` gives what an answer should be and how far it may be off: four log-softmaxes per position, subtracted.
"""

from __future__ import annotations

import struct
from decimal import Context, Decimal, localcontext

PRECISION = Context(prec=60, Emax=10**9, Emin=-(10**9))
TINY = Decimal(10) ** -37


def float32(x: float) -> float:
    """The float32 nearest to x: every logit of the case file is one, written with 9 digits."""
    return struct.unpack("f", struct.pack("f", x))[0]


def responses(case: dict) -> list[list[tuple]]:
    """For each of the 2B responses its tokens: (policy logits, reference logits, label)."""
    if case["entry"] == "logits":
        return [list(zip(f, r, y)) for f, r, y in zip(case["policy_logits"], case["ref_logits"], case["labels"])]
    found = [[] for _ in range(2 * len(case["tokens"]))]
    f, r = ([position for row in case[name] for position in row] for name in ("policy_logits", "ref_logits"))
    for source, label, owner in zip(case["source"], case["label"], case["owner"]):
        found[owner].append((f[source], r[source], label))
    return found


def log_sum_exp(values: list[Decimal]) -> Decimal:
    top = max(values)
    return top + sum((x - top).exp() for x in values).ln()


def token(f: list[float], f_ref: list[float], label: int, epsilon: float) -> dict:
    """One token: its log-probabilities, the two increments, p, and the rounding that an answer may show."""
    f, f_ref = ([Decimal(float32(x)) for x in row] for row in (f, f_ref))
    eps = Decimal(epsilon)
    d = [a - b for a, b in zip(f, f_ref)]
    u = [x - d[label] for x in d]

    def log_prob(s: Decimal) -> tuple[Decimal, Decimal]:
        g = [a + s * b for a, b in zip(f, d)]
        total = log_sum_exp(g)
        return g[label] - total, total

    logp, total = log_prob(Decimal(0))
    ref_logp, minus, plus = (log_prob(s)[0] for s in (Decimal(-1), eps, -eps))
    p = [(x - total).exp() for x in f]
    size = eps * max(abs(x) for x in u)
    spread = max(sum(a * abs((s * x).exp() - 1) for a, x in zip(p, u)) for s in (eps, -eps))
    floor = min(Decimal(1), spread) / 2**16 + TINY
    if size < 1:  # the rounding of d = f − f_ref in float32
        floor += eps / 2**23 * (sum(a * abs(x) for a, x in zip(p, d)) + abs(d[label]))
    largest = max(max(abs(a), abs(b), abs(a) + eps * abs(c)) for a, b, c in zip(f, f_ref, d))
    return {
        "logp": logp,
        "ref_logp": ref_logp,
        "delta_minus": minus - logp,
        "delta_plus": plus - logp,
        "floor": floor,
        "textbook": (largest + abs(logp) + abs(ref_logp) + 1) / 2**21,  # the rounding of float32 log-softmaxes
        "p": p,
    }


def response(tokens: list[tuple], epsilon: float) -> dict:
    stats = [token(*t, epsilon) for t in tokens]
    found = {k: sum(t[k] for t in stats) for k in stats[0] if k != "p"}
    found["textbook"] += (abs(found["logp"]) + abs(found["ref_logp"])) * len(tokens) / 2**24  # and of their sum
    return found | {"p": [t["p"] for t in stats]}


def expect(case: dict) -> dict:
    """The right answer of a case, its level, and how far answers may be off.

    `floor` (of the deltas) and `margin_floor` are per pair. `decided` is False when a pair's step lies within its
    floor, so that nobody can be asked for it. `level` is "method" if float32 log-softmaxes suffice, else "exact".
    """
    with localcontext(PRECISION):
        if case["entry"] == "sums":
            names = ("logp", "ref_logp", "delta_minus", "delta_plus")
            sums = [dict(zip(names, map(Decimal, numbers))) for numbers in zip(*(case[name] for name in names))]
            for s in sums:
                s["floor"] = (abs(s["delta_minus"]) + abs(s["delta_plus"])) / 2**50 + TINY
                s["textbook"] = (abs(s["logp"]) + abs(s["ref_logp"])) / 2**22
        else:
            sums = [response(tokens, case["epsilon_check"]) for tokens in responses(case)]
        half = len(sums) // 2
        pairs = list(zip(sums[:half], sums[half:]))
        beta, eps = Decimal(case["beta"]), Decimal(case["epsilon_step"])
        beta_of_step = {1: beta / (1 + eps), 0: beta, -1: beta / (1 - eps)}
        delta_minus, delta_plus = ([near_zero(c[k] - r[k]) for c, r in pairs] for k in ("delta_minus", "delta_plus"))
        steps = [(m > 0 > p) - (m < 0 < p) for m, p in zip(delta_minus, delta_plus)]
        margin = [(c["logp"] - c["ref_logp"]) - (r["logp"] - r["ref_logp"]) for c, r in pairs]
        betas = [beta_of_step[s] for s in steps]
        losses = [log_sum_exp([Decimal(0), -b * m]) for b, m in zip(betas, margin)]
        floor, textbook = ([c[k] + r[k] for c, r in pairs] for k in ("floor", "textbook"))
        smallest = [min(abs(m), abs(p)) for m, p in zip(delta_minus, delta_plus)]
        same = [is_same(case, i) for i in range(half)]  # every implementation finds exact zeros there
        method = all(t or s > 2 * b for t, s, b in zip(same, smallest, textbook)) or case["entry"] == "sums"
        expected = {
            "step": steps,
            "beta": betas,
            "loss": sum(losses) / half,
            "next_beta": {"arithmetic": sum(betas) / half, "harmonic": half / sum(1 / b for b in betas)},
            "margin": margin,
            "losses": losses,
            "delta_minus": delta_minus,
            "delta_plus": delta_plus,
        }
        if case["entry"] == "logits":
            slopes = [b / (1 + (b * m).exp()) / half for b, m in zip(betas, margin)]  # σ(−β̃·margin)·β̃/B
            expected["grad"] = [
                [[slope * (a - (v == y)) for v, a in enumerate(p)] for p, y in zip(s["p"], labels)]
                for s, labels, slope in zip(sums, case["labels"], slopes + [-x for x in slopes])
            ]
        return {
            "expected": plain(expected),
            "level": "method" if method else "exact",
            "floor": plain(textbook if method and case["entry"] != "sums" else floor),
            "margin_floor": plain(textbook),
            "decided": all(t or s > f or offset_tie(case) for t, s, f in zip(same, smallest, floor)),
        }


def near_zero(x: Decimal) -> Decimal:
    """Zero for what is rounding even of 60 digits: a tie is a tie."""
    return x if abs(x) > Decimal(10) ** -45 else Decimal(0)


def is_same(case: dict, i: int) -> bool:
    """Pair i ties in any arithmetic: policy and reference are equal, or chosen and rejected are."""
    if case["entry"] == "sums":
        return True  # the deltas are given; nothing is lost in telling their signs
    if case["entry"] == "packed":
        return case["policy_logits"] == case["ref_logits"]
    both = (i, i + len(case["labels"]) // 2)
    policy, ref, labels = ([case[k][j] for j in both] for k in ("policy_logits", "ref_logits", "labels"))
    return (
        policy == ref
        or all(chosen == rejected for chosen, rejected in (policy, ref, labels))
        or not case["epsilon_check"]
    )


def offset_tie(case: dict) -> bool:
    """The two logit sets differ by a constant at each position, and by nothing else: a tie that float32 can see."""
    if case["entry"] == "sums":
        return True
    return all(len({float32(a) - float32(b) for a, b in zip(f, r)}) == 1 for t in responses(case) for f, r, _ in t)


def plain(x):
    """Decimals as floats of 12 digits, far more than any tolerance asks for."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [plain(v) for v in x]
    return x if isinstance(x, (int, str)) else float(f"{float(x):.12g}")
