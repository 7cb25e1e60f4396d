"""What is right, by the definition of the method, in 60-digit decimal arithmetic (standard library only).

`expect(case)` gives the right answer and how far an answer may be off: four log-softmaxes per position, subtracted.
"""

from __future__ import annotations

import struct
from decimal import Context, Decimal, localcontext

PRECISION = Context(prec=60, Emax=10**9, Emin=-(10**9))
TINY = Decimal(10) ** -37
UNDERFLOW = Decimal(10) ** -330  # exp gives 0 in float64, and in float32


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
    ref_logp, log_sum_exp_ref = log_prob(Decimal(-1))
    minus, plus = (log_prob(s)[0] for s in (eps, -eps))
    p = [(x - total).exp() for x in f]
    q = [(x - log_sum_exp_ref).exp() for x in f_ref]
    size = eps * max(abs(x) for x in u)
    grown = {s: [(s * x).exp() for x in u] for s in (eps, -eps)}
    spread = max(sum(a * abs(g - 1) for a, g in zip(p, grown[s])) for s in grown)
    floor = min(Decimal(1), spread) / 2**16 + TINY
    if size < 1:  # the rounding of d = f − f_ref in float32
        floor += eps / 2**23 * (sum(a * abs(x) for a, x in zip(p, d)) + abs(d[label]))
    largest = max(max(abs(a), abs(b), abs(a) + eps * abs(c)) for a, b, c in zip(f, f_ref, d))
    kl = near_zero(sum(a * x for a, x in zip(p, d)) - total + log_sum_exp_ref)
    textbook = (largest + abs(logp) + abs(ref_logp) + 1) / 2**21  # the rounding of float32 log-softmaxes
    kl_floor = kl / 10**5 + sum(abs(a - b) * abs(x) for a, b, x in zip(p, q, d)) / 2**23
    kl_floor += (max(abs(x) for x in d) / 2**23) ** 2 if size < eps else textbook
    return {
        "logp": logp,
        "ref_logp": ref_logp,
        "delta_minus": minus - logp,
        "delta_plus": plus - logp,
        "kl": kl,
        "floor": floor,
        "kl_floor": kl_floor + TINY,
        "textbook": textbook,
        "zero_minus": is_exact_zero(p, grown[eps], d, u, label),
        "zero_plus": is_exact_zero(p, grown[-eps], d, u, label),
        "p": p,
    }


def is_exact_zero(p: list, grown: list, d: list, u: list, label: int) -> bool:
    """Any arithmetic finds an increment of exactly 0: where logits differ, exp underflows before and after."""
    return d[label] == 0 and all(x == 0 or max(a, a * g) < UNDERFLOW for a, g, x in zip(p, grown, u))


def response(tokens: list[tuple], epsilon: float) -> dict:
    stats = [token(*t, epsilon) for t in tokens]
    flags = {k: all(t[k] for t in stats) for k in ("zero_minus", "zero_plus")}
    found = {k: sum(t[k] for t in stats) for k in stats[0] if k not in (*flags, "p")}
    found["textbook"] += (abs(found["logp"]) + abs(found["ref_logp"])) * len(tokens) / 2**24  # and of their sum
    return found | flags | {"p": [t["p"] for t in stats]}


def expect(case: dict) -> dict:
    """The right answer of a case, how far an answer may be off, and the case's level.

    `tolerance` has the names and shapes of `expected` (one bound per response for `kl` and `grad`). `decided` is False
    when a pair's step lies within rounding, so that no answer can be asked for. `level` is "method" if float32
    log-softmaxes suffice, else "exact".
    """
    with localcontext(PRECISION):
        if case["entry"] == "run":
            return expect_run(case)
        return plain(expect_step(case, Decimal(case["beta"])))


def expect_run(case: dict) -> dict:
    """Several optimizer steps in a row: each uses the next β of the one before it. Numbers differ between baselines."""
    expected, tolerance, steps = {}, {}, []
    for baseline in ("arithmetic", "harmonic"):
        beta, steps = Decimal(case["beta"]), []
        for part in case["optimizer_steps"]:
            steps.append(expect_step(case | part | {"entry": "logits"}, beta))
            beta = steps[-1]["expected"]["next_beta"][baseline]
        found = [s["expected"] | {"next_beta": s["expected"]["next_beta"][baseline]} for s in steps]
        joined = {"beta": sum((f["beta"] for f in found), [])} | {
            k: [f[k] for f in found] for k in ("loss", "next_beta")
        }
        for name, values in joined.items():
            expected.setdefault(name, {})[baseline] = values
    tolerance = {k: sum((s["tolerance"][k] for s in steps), []) for k in ("step", "beta")}
    tolerance |= {k: [s["tolerance"][k] for s in steps] for k in ("loss", "next_beta")}
    return plain(
        {
            "expected": {"step": sum((s["expected"]["step"] for s in steps), [])} | expected,
            "tolerance": tolerance,
            "level": "method" if all(s["level"] == "method" for s in steps) else "exact",
            "decided": all(s["decided"] for s in steps),
        }
    )


def sums_of(case: dict) -> list[dict]:
    """Of each of the 2B responses the sums over its tokens, and their rounding."""
    if case["entry"] != "sums":
        return [response(tokens, case["epsilon_check"]) for tokens in responses(case)]
    names = ("logp", "ref_logp", "delta_minus", "delta_plus")
    sums = [dict(zip(names, map(Decimal, numbers))) for numbers in zip(*(case[name] for name in names))]
    for s in sums:
        s["floor"] = (abs(s["delta_minus"]) + abs(s["delta_plus"])) / 2**50 + TINY
        s["textbook"] = (abs(s["logp"]) + abs(s["ref_logp"])) / 2**22
        s["zero_minus"] = s["zero_plus"] = False
    return sums


def expect_step(case: dict, beta: Decimal) -> dict:
    sums = sums_of(case)
    half = len(sums) // 2
    pairs = list(zip(sums[:half], sums[half:]))
    eps = Decimal(case["epsilon_step"])
    beta_of_step = {1: beta / (1 + eps), 0: beta, -1: beta / (1 - eps)}
    deltas = [[near_zero(c[k] - r[k]) for c, r in pairs] for k in ("delta_minus", "delta_plus")]
    steps = [(m > 0 > p) - (m < 0 < p) for m, p in zip(*deltas)]
    margin = [(c["logp"] - c["ref_logp"]) - (r["logp"] - r["ref_logp"]) for c, r in pairs]
    betas = [beta_of_step[s] for s in steps]
    losses = [log_sum_exp([Decimal(0), -b * m]) for b, m in zip(betas, margin)]
    loss = sum(losses) / half
    next_beta = {"arithmetic": sum(betas) / half, "harmonic": half / sum(1 / b for b in betas)}

    floor, textbook = ([c[k] + r[k] for c, r in pairs] for k in ("floor", "textbook"))
    given = case["entry"] == "sums"
    zeros = [[c[k] and r[k] for c, r in pairs] for k in ("zero_minus", "zero_plus")]
    to_decide = [[abs(d[i]) for d, z in zip(deltas, zeros) if not z[i]] for i in range(half)]
    smallest = [Decimal(1) if given or is_same(case, i) else min(to_decide[i], default=Decimal(1)) for i in range(half)]
    method = given or all(s > 2 * b for s, b in zip(smallest, textbook))
    delta_floor = floor if given or not method else textbook
    slack = [b * t for b, t in zip(betas, textbook)]  # a loss is at most as far off as β̃ times its margin
    expected = {
        "step": steps, "beta": betas, "loss": loss, "next_beta": next_beta,
        "margin": margin, "losses": losses, "delta_minus": deltas[0], "delta_plus": deltas[1],
    }  # fmt: skip
    tolerance = {
        "step": [0] * half,
        "beta": [b / 10**6 for b in betas],
        "loss": (1 + loss) / 500_000 + sum(slack) / half,
        "next_beta": next_beta["harmonic"] / 10**6,
        "margin": [abs(m) / 10**5 + t for m, t in zip(margin, textbook)],
        "losses": [(1 + x) / 500_000 + s for x, s in zip(losses, slack)],
        "delta_minus": delta_floor,
        "delta_plus": delta_floor,
    }
    if not given:
        expected["kl"] = [s["kl"] for s in sums]
        tolerance["kl"] = [s["textbook"] if method else s["kl_floor"] for s in sums]
    if case["entry"] == "logits":
        slopes = [b / (1 + (b * m).exp()) / half for b, m in zip(betas, margin)]  # σ(−β̃·margin)·β̃/B
        expected["grad"] = [
            [[slope * (a - (v == y)) for v, a in enumerate(p)] for p, y in zip(s["p"], labels)]
            for s, labels, slope in zip(sums, case["labels"], slopes + [-x for x in slopes])
        ]
        tolerance["grad"] = [b / half * (Decimal(10) ** -5 + s) for b, s in zip(betas, slack)] * 2
    return {
        "expected": expected,
        "tolerance": tolerance,
        "level": "method" if method else "exact",
        "decided": all(s > f or offset_tie(case) for s, f in zip(smallest, floor)),
    }


def near_zero(x: Decimal) -> Decimal:
    """Zero for what is rounding even of 60 digits: a tie is a tie."""
    return x if abs(x) > Decimal(10) ** -45 else Decimal(0)


def is_same(case: dict, i: int) -> bool:
    """Pair i ties in any arithmetic: policy and reference are equal, or chosen and rejected are."""
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
    return x if isinstance(x, (bool, int, str)) else float(f"{float(x):.12g}")
