"""The case file: `python -m tests.conformance.cases > cases.jsonl` writes it, the same bytes everywhere.

The first line is the head, which explains every field and flag. Each other line is one case with its right answer.
`cases.jsonl` beside this file is what it wrote; a test checks that it still is. `schema.json` describes both kinds of line.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np

from .asking import to_arrays
from .exact import float32
from .failures import complete
from .judging import REQUIRED, complaints
from .mistakes import MISTAKES
from .oracle import Oracle

FILE, SCHEMA = (Path(__file__).with_name(name) for name in ("cases.jsonl", "schema.json"))
VERSION = 2

PROPERTIES = {  # in the order of the file, easy ones first
    "worked by hand": "a token or two with round numbers, to follow with a pencil",
    "at the reference": "policy = reference: margin 0, every step 0, loss ln 2, gradient not zero",
    "branches": "z(β⁻) > z(β) > z(β⁺) is step +1 and β̃ = β/(1+ε); z(β⁻) < z(β) < z(β⁺) is step −1 and β̃ = β/(1−ε)",
    "swapped": "swapping chosen and rejected flips the step and the margin",
    "not monotone": "when both perturbed policies are better, or both worse, than the policy itself, the step is 0",
    "ties": "a tie is step 0, on both sides or on one: both comparisons are strict",
    "two epsilons": "(not for ports of the one ε of the paper) epsilon_check perturbs the logits of the check, epsilon_step sizes β̃; 0 checks nothing",
    "plain DPO": "with epsilon_step 0 the loss, its gradient and β are DPO's, whatever the steps are",
    "lengths": "log-probabilities are summed over a response's own tokens, first to last, and never averaged",
    "batch": "the other pairs of a batch, and their order, do not change a pair's numbers",
    "micro-batches": "all micro-batches of an optimizer step use the old β; the loss and the next β are means over all pairs",
    "two optimizer steps": "each optimizer step starts from the next β of the one before it and from nothing else",
    "small and large beta": "neither β̃ nor the next β is clipped",
    "large vocabulary": "the sums run over the whole vocabulary, its unlikely tail too",
    "sums": "from sums per response to step, β̃, loss and next β",
    "packed rows": "in a row [prompt | chosen | rejected], the prompt's last position predicts both first tokens",
    "near the reference": "the step is the sign of differences far smaller than the log-probabilities they are differences of",
    "offsets": "a constant added to all logits of a position changes nothing",
    "far from the reference": "sure and opposite models: nothing overflows, and small probabilities still count",
}


def number(x: float) -> float:
    """A float32, as the 9 digits that hold it exactly."""
    return float(f"{float32(x):.9g}")


def normal(rng: random.Random, spread: float = 1.0) -> float:
    """All but normal, of additions and products alone, so that every machine draws the same."""
    return spread * (sum(rng.random() for _ in range(12)) - 6)


def draw(rng, length: int, vocab: int, spread: float, offset: float = 0.0, sure: float = 0.0) -> tuple:
    """(policy logits, reference logits, labels) of one response; `spread` is the size of their difference."""
    f, r, labels = [], [], [rng.randrange(vocab) for _ in range(length)]
    for label in labels:
        row = [normal(rng, 2.0) for _ in range(vocab)]
        row[label] += sure
        f.append([number(x) for x in row])
        r.append([number(float32(x) - normal(rng, spread) - offset) for x in f[-1]])
    return f, r, labels


def draw_eighths(rng, length: int, vocab: int, tail: int = 0, shift: float = 0.0) -> tuple:
    """As `draw`, all logits multiples of 1/8; the `tail` least likely entries are moved by `shift` from the reference."""
    f, r = [], []
    for _ in range(length):
        f.append([round(8 * normal(rng, 0.6)) / 8 for _ in range(vocab)])
        low = sorted(range(vocab), key=lambda v: f[-1][v])[:tail]
        d = [round(8 * normal(rng, 0.4)) / 8 + shift * (v in set(low)) for v in range(vocab)]
        r.append([x - y for x, y in zip(f[-1], d)])
    return f, r, [rng.randrange(vocab) for _ in range(length)]


def case(name: str, responses: list[tuple], beta=0.1, check=0.01, step=0.01, micro_batches=None, **more) -> dict:
    """An unfinished case of entry logits; `responses`: B chosen, then B rejected."""
    f, r, labels = (list(x) for x in zip(*responses))
    return {
        "entry": "logits", "property": name, **more, "beta": beta, "epsilon_check": check, "epsilon_step": step,
        "micro_batches": micro_batches or [len(responses) // 2], "labels": labels, "policy_logits": f, "ref_logits": r,
    }  # fmt: skip


def found(make, want=lambda c: True, level: str = "") -> dict:
    """The first case that `make(rng)` draws that is decided, of the level, and as wanted."""
    for seed in range(3000):
        new = make(random.Random(seed))
        quick = Oracle().answer(to_arrays(new, "arithmetic"))  # the 60 digits are for those that look right
        new["expected"] = {k: np.array(v).tolist() for k, v in quick.items() if k != "grad"}
        if want(new) and (new := complete(new)) and want(new) and level in ("", new["level"]):
            return new
    raise AssertionError("no such case")


def steps(*wanted):
    return lambda c: c["expected"]["step"] == list(wanted)


def token(f: list, r: list, label: int) -> tuple:
    return [[float(x) for x in f]], [[float(x) for x in r]], [label]


def by_hand():
    up, flat = ([2, 0], [0, 0]), ([1, 1], [1, 1])
    for chosen, rejected in (
        (token(*up, 0), token(*up, 1)),
        (token(*up, 1), token(*up, 0)),
        (token(*flat, 0), token(*flat, 1)),
    ):
        for epsilon in (0.01, 0.25):
            yield complete(case("worked by hand", [chosen, rejected], check=epsilon, step=epsilon))
    three = (
        token([1, 2, 3], [1, 2, 2], 2),
        token([0, 0, 1], [1, 0, 0], 0),
        token([3, 1, 0], [0, 1, 3], 1),
        token([1, 0, 0], [0, 0, 0], 0),
    )
    yield complete(case("worked by hand", list(three), beta=0.5, check=0.2, step=0.2))


def at_the_reference():
    for seed, (pairs, length, vocab, spread) in enumerate([(1, 1, 2, 1), (2, 3, 5, 1), (3, 4, 9, 10), (1, 40, 4, 3)]):
        rng = random.Random(seed)
        responses = [draw(rng, length, vocab, 0.0, sure=spread) for _ in range(2 * pairs)]
        yield complete(case("at the reference", [(f, f, y) for f, _, y in responses], beta=0.05))


def branches():
    for i, wanted in enumerate([(1,), (-1,), (0,), (1, -1), (0, 1, -1), (-1, -1, 1, 0), (1, 1, 1), (-1, 0)]):
        for epsilon in (0.05, 0.5):

            def make(rng, n=len(wanted), epsilon=epsilon):
                return case(
                    "branches", [draw(rng, rng.randint(1, 3), 4, 1.5) for _ in range(2 * n)], 0.2, epsilon, epsilon
                )

            if epsilon > 0.1 or 0 not in wanted:
                yield found(make, steps(*wanted), "method")


def swapped():
    for seed in range(4):

        def make(rng, seed=seed):
            rng.seed(1000 * seed + rng.randrange(1000))
            return case("swapped", [draw(rng, rng.randint(1, 4), 5, 1.0) for _ in range(2)], 0.1, 0.1, 0.1)

        straight = found(make, lambda c: c["expected"]["step"] != [0], "method")
        yield straight
        back = {k: straight[k][::-1] for k in ("labels", "policy_logits", "ref_logits")}
        yield complete(straight | back)


def not_monotone():
    for sign in (1, -1):
        for check, step in ((0.3, 0.3), (0.5, 0.5), (0.9, 0.05)):
            for pairs in (1, 2):

                def make(rng, check=check, step=step, pairs=pairs):
                    return case("not monotone", [draw(rng, 2, 4, 2.0) for _ in range(2 * pairs)], 0.1, check, step)

                def want(c, sign=sign):
                    deltas = c["expected"]["delta_minus"] + c["expected"]["delta_plus"]
                    return all(sign * x > 3e-4 for x in deltas)

                yield found(make, want, "method")


def ties():
    for seed in range(3):  # equal responses: the same logits and labels
        rng = random.Random(seed)
        pairs = [draw(rng, 3, 5, 1.0) for _ in range(2)]
        yield complete(case("ties", pairs + pairs, check=0.2, step=0.2))
    for offset in (0.5, -3.0, 64.0):  # logits that differ by a constant alone, in eighths: float32 sees it exactly
        for epsilon in (0.01, 0.3):
            rng = random.Random(int(offset * 8))
            rows = [[[rng.randrange(-40, 40) / 8 for _ in range(5)] for _ in range(2)] for _ in range(4)]
            responses = [(f, [[x - offset for x in t] for t in f], [rng.randrange(5) for _ in f]) for f in rows]
            yield complete(case("ties", responses, check=epsilon, step=epsilon))
    # On one side: a logit so low that exp gives 0, which one of the two perturbations brings up and the other lowers more.
    plain = token([0, 1, -2000], [0, 1, -2000], 0)
    for change in (-4000, 4000):
        risen = token([0, 1, -2000], [0, 1, -2000 - change], 0)
        for pair in ([risen, plain], [plain, risen]):
            yield complete(case("ties", pair, beta=0.001, check=0.5, step=0.5))


def two_epsilons():
    for check, step in [(0.3, 0.01), (0.01, 0.3), (0.0, 0.2), (0.9, 0.5), (0.5, 0.0)]:
        for pairs in (1, 3):

            def make(rng, check=check, step=step, pairs=pairs):
                return case("two epsilons", [draw(rng, 2, 5, 2.0) for _ in range(2 * pairs)], 0.1, check, step)

            yield found(make, lambda c, check=check: check == 0 or any(c["expected"]["step"]), "method")

    for wanted in ((1,), (-1,), (0,), (1, -1, 0)):
        for sizes in ([len(wanted)], [1] * len(wanted))[: len(wanted)]:

            def branches_of(rng, n=len(wanted), sizes=sizes):
                responses = [draw(rng, rng.randint(1, 3), 4, 1.5) for _ in range(2 * n)]
                return case("two epsilons", responses, 0.2, 0.6, 0.3, sizes)

            yield found(branches_of, steps(*wanted), "method")

    def unlike(rng):  # the two ε give different steps
        return case("two epsilons", [draw(rng, 2, 4, 2.0) for _ in range(2)], 0.1, 0.9, 0.05)

    def want(c):
        other = complete(c | {"epsilon_check": 0.05})
        return other and other["level"] == "method" and other["expected"]["step"] != c["expected"]["step"]

    yield found(unlike, want, "method")


def plain_dpo():
    for beta, spread in [(0.1, 1.0), (0.01, 1.0), (2.0, 3.0), (0.5, 0.1)]:

        def make(rng, beta=beta, spread=spread):
            return case("plain DPO", [draw(rng, rng.randint(1, 3), 5, spread) for _ in range(4)], beta, 0.1, 0.0)

        yield found(make, lambda c: any(c["expected"]["step"]), "method")
        yield found(lambda rng, make=make: make(rng) | {"epsilon_check": 0.0}, level="method")


def lengths():
    for shape in [(1, 5), (5, 1), (2, 12), (1, 40), (60, 55), (1, 300), (250, 300)]:

        def make(rng, shape=shape):
            return case("lengths", [draw(rng, n, 4, 1.0) for n in shape], 0.02, 0.05, 0.05)

        yield found(make, level="method" if sum(shape) < 400 else "")
    for seed in range(6):  # the mean and the sum disagree about the step

        def make(rng, seed=seed):
            rng.seed(1000 * seed + rng.randrange(1000))
            return case("lengths", [draw(rng, n, 4, 1.0) for n in (2, 3 + seed, 7, 4)], 0.1, 0.05, 0.05)

        yield found(make, lambda c: fails(c, "delta_token_mean") and fails(c, "padding_counted"), "method")
    for name in ("first_token_lost", "last_token_lost"):
        yield found(make, lambda c, name=name: fails(c, name), "method")
    for shape in ((600, 3), (530, 600)):  # in eighths, to keep the file small

        def long(rng, shape=shape):
            return case("lengths", [draw_eighths(rng, n, 2) for n in shape], 0.01, 0.05, 0.05)

        yield found(long, lambda c: fails(c, "cut_at512"), "method")


def batch():
    def make(rng):
        return case("batch", [draw(rng, rng.randint(1, 4), 5, 1.0) for _ in range(8)], 0.1, 0.2, 0.2)

    whole = found(make, lambda c: len(set(c["expected"]["step"])) > 1, "method")
    yield whole
    for order in ([3, 2, 1, 0], [2, 0, 3, 1], [0], [1, 2], [3, 3, 0]):
        index = [*order, *(4 + i for i in order)]
        chosen = {k: [whole[k][i] for i in index] for k in ("labels", "policy_logits", "ref_logits")}
        yield complete(whole | chosen | {"micro_batches": [len(order)]})


def micro_batches():
    for epsilon in (0.05, 0.3):
        for sizes in ([3], [2, 1], [1, 1, 1], [4, 1, 2], [1, 6]):

            def make(rng, sizes=sizes, epsilon=epsilon):
                responses = [draw(rng, 2, 4, 2.0) for _ in range(2 * sum(sizes))]
                return case("micro-batches", responses, 0.1, epsilon, epsilon, sizes)

            yield found(make, lambda c: len(set(c["expected"]["step"])) > 1 and c["expected"]["step"][-1] < 1, "method")

    def uneven(rng):
        return case("micro-batches", [draw(rng, 1, 4, 2.0) for _ in range(6)], 0.1, 0.01, 0.01, [2, 1])

    yield found(uneven, steps(1, 1, -1), "method")  # next β 0.0996766343; the mean of the two means is 0.10001

    def small(rng):
        return case("micro-batches", [draw(rng, 1, 4, 2.0) for _ in range(4)], 0.1, 0.001, 0.001)

    yield found(small, steps(1, 1), "method")


def two_optimizer_steps():
    for epsilon in (0.05, 0.3):
        for sizes in ([[1], [1]], [[2], [1, 1]], [[2, 2], [1]], [[1], [3], [1, 1]]):

            def make(rng, sizes=sizes, epsilon=epsilon):
                parts = []
                for split in sizes:
                    made = case("", [draw(rng, 2, 4, 2.0) for _ in range(2 * sum(split))], micro_batches=split)
                    parts.append({k: made[k] for k in ("micro_batches", "labels", "policy_logits", "ref_logits")})
                return {
                    "entry": "run", "property": "two optimizer steps", "beta": 0.1,
                    "epsilon_check": epsilon, "epsilon_step": epsilon, "optimizer_steps": parts,
                }  # fmt: skip

            yield found(make, lambda c: fails(c, "steps_carried_over") and fails(c, "beta_not_updated"), "method")


def small_and_large_beta():
    for beta, spread in ((1e-4, 3.0), (1e-3, 2.0), (9.9, 0.2), (20.0, 0.1)):

        def make(rng, beta=beta, spread=spread):
            responses = [draw(rng, 2, 4, spread) for _ in range(6)]
            return case("small and large beta", responses, beta, 0.1, 0.1)

        yield found(make, lambda c: len(set(c["expected"]["step"])) > 1 and sum(c["expected"]["step"]), "method")


def large_vocabulary():
    for spread in (1e-4, 0.1, 2.0):

        def make(rng, spread=spread):
            return case("large vocabulary", [draw(rng, 1, 600, spread) for _ in range(2)], 0.1, 0.01, 0.01)

        yield found(make)
    for vocab, k in ((120, 50), (1200, 1000)):  # what the k largest logits say is not the step
        for sign in (1, -1):

            def make(rng, vocab=vocab, k=k, sign=sign):
                responses = [draw_eighths(rng, 1, vocab, vocab - k, s * 2.0) for s in (sign, -sign)]
                return case("large vocabulary", responses, 0.1, 0.1, 0.1)

            yield found(make, lambda c, k=k: fails(c, f"top{k}") and c["expected"]["step"] != [0], "method")


def sums():
    def make(rng, pairs, epsilon, sizes=None):
        def column(scale):
            return [round(scale * normal(rng) * 64) / 64 for _ in range(2 * pairs)]

        logp = [x - 40 for x in column(8.0)]
        return {
            "entry": "sums", "property": "sums", "beta": 0.1, "epsilon_check": epsilon, "epsilon_step": epsilon,
            "micro_batches": sizes or [pairs], "logp": logp, "ref_logp": [a + b for a, b in zip(logp, column(4.0))],
            "delta_minus": column(1.0), "delta_plus": column(1.0),
        }  # fmt: skip

    for wanted in [(1,), (-1,), (0,), (1, -1, 0), (0, 0, 1, -1, 1)]:
        for epsilon in (0.01, 0.3):
            yield found(lambda rng, n=len(wanted), e=epsilon: make(rng, n, e), steps(*wanted))
    yield found(lambda rng: make(rng, 3, 0.01, [2, 1]), steps(1, 1, -1))
    yield found(lambda rng: make(rng, 5, 0.1, [1, 4]), lambda c: len(set(c["expected"]["step"])) == 3)
    for epsilon in (0.0, 0.3):  # of the step; that of the check is in the sums already
        two = lambda rng, e=epsilon: make(rng, 3, 0.1) | {"epsilon_step": e}  # noqa: E731
        yield found(two, lambda c: any(c["expected"]["step"]))
    rng = random.Random(0)
    ties = make(rng, 6, 0.1)
    ties |= {"delta_minus": [1, -1, 0, 0, 2, 0] + [0, 0, 0, 0, 2, 0], "delta_plus": [0, 0, 1, -1, -1, 0] + [0] * 6}
    yield complete(ties)
    yield complete(make(rng, 2, 0.1) | {"logp": [-10.0, -9e3, -9.0, -10.0], "ref_logp": [-12.0, -10.0, -9.0, -9e3]})
    tiny = make(rng, 2, 0.1) | {"delta_minus": [1e-30, -1e-30, 0, 0], "delta_plus": [-1e-30, 1e-30, 0, 0]}
    yield complete(tiny)


def packed():
    def make(rng, pairs=1, spread=1.0, sizes=None):
        vocab, lengths = 5, [[rng.randint(1, 3) for _ in range(3)] for _ in range(pairs)]
        width = max(map(sum, lengths)) + 1
        row = {k: [] for k in ("tokens", "positions", "segments")}
        links, logits = [], []
        for i, (p, c, r) in enumerate(lengths):
            pad = width - p - c - r
            row["tokens"].append([rng.randrange(vocab) for _ in range(p + c + r)] + [0] * pad)
            row["positions"].append([*range(p + c), *range(p, p + r), *range(pad)])
            row["segments"].append([0] * p + [1] * c + [2] * r + [-1] * pad)
            for start, n, owner in ((p, c, i), (p + c, r, pairs + i)):
                sources = [p - 1, *range(start, start + n - 1)]
                links += [(i * width + s, row["tokens"][i][start + j], owner) for j, s in enumerate(sources)]
            logits.append(draw(rng, width, vocab, spread)[:2])
        source, label, owner = (list(x) for x in zip(*links))
        return {
            "entry": "packed", "property": "packed rows", "beta": 0.1, "epsilon_check": 0.1, "epsilon_step": 0.1,
            "micro_batches": sizes or [pairs], **row, "source": source, "label": label, "owner": owner,
            "policy_logits": [f for f, _ in logits], "ref_logits": [r for _, r in logits],
        }  # fmt: skip

    for pairs in (1, 2, 3):
        for name in ("not_shifted", "rejected_after_chosen", "padding_counted"):
            yield found(lambda rng, n=pairs: make(rng, n), lambda c, name=name: fails(c, name), "method")
    yield found(lambda rng: make(rng, 3, 1.0, [1, 2]), lambda c: len(set(c["expected"]["step"])) > 1, "method")
    same = make(random.Random(0), 2)
    yield complete(same | {"ref_logits": same["policy_logits"]})
    yield found(lambda rng: make(rng, 2, 1e-5))


def near():
    def make(rng, scale, seed):
        rng.seed(1000 * seed + rng.randrange(1000))
        epsilon = 0.01 if seed < 6 else 1e-4
        responses = [draw(rng, 2, 5, scale) for _ in range(6)]
        return case("near the reference", responses, 0.1, epsilon, epsilon, scale=scale)

    for exponent in range(0, -8, -1):
        for seed in range(8):
            yield found(lambda rng, scale=10.0**exponent, seed=seed: make(rng, scale, seed))
    yield found(lambda rng: make(rng, 1e-7, 8), lambda c: fails(c, "logits_read_as_doubles"))


def offsets():
    for offset in (3.0, -30.0, 200.0, -1000.0):
        for spread in (1.0, 1e-2):

            def make(rng, offset=offset, spread=spread):
                return case("offsets", [draw(rng, 2, 5, spread, offset) for _ in range(2)], 0.1, 0.05, 0.05)

            yield found(make)


def far():
    for spread, epsilon, sure in [
        (10, 0.1, 0),
        (30, 0.9, 0),
        (60, 0.99, 0),
        (60, 0.5, 0),
        (30, 0.2, 30),
        (20, 0.3, 60),
        (8, 0.5, 25),
    ]:
        for seed in range(2):

            def make(rng, spread=spread, epsilon=epsilon, sure=sure, seed=seed):
                rng.seed(1000 * seed + rng.randrange(1000))
                responses = [draw(rng, 2, 4, spread, 0, sure) for _ in range(2)]
                return case("far from the reference", responses, 0.1, epsilon, epsilon if epsilon <= 0.5 else 0.1)

            yield found(make, steps(-1 if seed else 1))
    opposite = [
        ([0, -30], [0, -60], 0, 0.1), ([0, 99, 0], [0, 0, 0], 0, 0.99), ([0, -99, 0], [0, 0, 0], 0, 0.99),
        ([-40, 0, 0.5], [40, 0, 0], 0, 0.99), ([0, -200], [0, -900], 0, 0.3), ([0, -200], [-900, 0], 1, 0.3),
        ([1e4, 0], [-1e4, 0], 0, 0.1), ([1e4, 0], [-1e4, 0], 1, 0.1), ([0, -800], [0, -1700], 0, 0.99),
    ]  # fmt: skip
    for f, r, label, epsilon in opposite:
        plain = token([0.5] + [0] * (len(f) - 1), [0] * len(f), 1 - min(label, 1))
        for pair in ([token(f, r, label), plain], [plain, token(f, r, label)]):
            new = complete(case("far from the reference", pair, 0.01, epsilon, epsilon if epsilon <= 0.5 else 0.1))
            if new:
                yield new


def fails(c: dict, mistake: str, arrays: dict | None = None) -> bool:
    """Whether what everybody answers (step, β̃, loss, next β) tells the mistake from the method."""
    with np.errstate(all="ignore"):
        wrong = MISTAKES[mistake]().answer(arrays or to_arrays(c, "arithmetic"))
    if "tolerance" not in c:  # a draw: finish it only if there is a difference to judge
        if all(np.allclose(wrong[k], c["expected"][k], rtol=1e-9) for k in ("step", "loss", "next_beta")):
            return False
        c = complete(c)
    return bool(c) and bool(complaints(c, {k: wrong[k] for k in REQUIRED}, "arithmetic"))


def flags_of(c: dict) -> list[str]:
    arrays = to_arrays(c, "arithmetic")
    return [name for name in MISTAKES if fails(c, name, arrays)]


ALL = (
    by_hand, at_the_reference, branches, swapped, not_monotone, ties, two_epsilons, plain_dpo, lengths, batch,
    micro_batches, two_optimizer_steps, small_and_large_beta, large_vocabulary, sums, packed, near, offsets, far,
)  # fmt: skip


def all_cases(flags_of=flags_of, parts=ALL) -> list[dict]:
    made = [c for part in parts for c in part()]
    names, cases = {}, []
    for c in made:
        names[c["property"]] = names.get(c["property"], -1) + 1
        head = {"id": f"{c['property']} {names[c['property']]}"} | {k: c[k] for k in ("entry", "property", "level")}
        c = head | {"flags": flags_of(head | c)} | {k: v for k, v in c.items() if k not in head}
        size = sum(len(t) for r in c.get("policy_logits", []) for t in r)
        if "grad" in c["expected"] and size > 40:  # to keep the file small
            del c["expected"]["grad"], c["tolerance"]["grad"]
        elif "grad" in c["expected"]:
            c["expected"]["grad"] = [[[float(f"{x:.6g}") for x in t] for t in r] for r in c["expected"]["grad"]]
        cases.append(c)
    return cases


def head() -> dict:
    fields = json.loads(SCHEMA.read_text(encoding="utf-8"))["$defs"]["case"]["properties"]
    return {
        "format": "epsdpo-cases", "version": VERSION, "schema": "schema.json",
        "fields": {name: field["description"] for name, field in fields.items()}, "properties": PROPERTIES,
        "flags": {name: " ".join(m.__doc__.split()) for name, m in MISTAKES.items()},
    }  # fmt: skip


def line(x: dict) -> str:
    return json.dumps(x, ensure_ascii=False, allow_nan=False)


def read(path: Path = FILE) -> list[dict]:
    """The cases of a file, without its head."""
    first, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if (first.get("format"), first.get("version")) != ("epsdpo-cases", VERSION):
        raise ValueError(f"{path}: expected a case file of version {VERSION}, its first line begins {str(first)[:60]}")
    return rest


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    print("\n".join(map(line, (head(), *all_cases()))))
