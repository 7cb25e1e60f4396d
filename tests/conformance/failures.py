"""Explains failures: which known mistake gives these answers, and the smallest pair that still fails."""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter

import numpy as np

from .asking import ANSWERS, Failed, to_arrays
from .exact import expect, float32
from .judging import REQUIRED, Complaint, Judged, Results, expected, judge, to_numbers
from .mistakes import MISTAKES

LOGITS = ("policy_logits", "ref_logits")
COMPARED = (*REQUIRED, "margin", "losses", "delta_minus", "delta_plus")
SHRINK_SECONDS, DIAGNOSE_SECONDS = 10.0, 15.0  # for a whole run

# ----------------------------------------------------------------------------------------------------------------------
# Which mistake it is


def both(names: tuple[str, ...]) -> type:
    """The oracle with these mistakes, all at once."""
    return MISTAKES[names[0]] if len(names) == 1 else type("Both", tuple(MISTAKES[n] for n in names), {})


def agreements(mistake: type, judged: Judged, arrays: dict) -> dict[str, bool]:
    """For each quantity of an answer, whether the mistake gives the same one, within the case's bounds."""
    with np.errstate(all="ignore"):
        wrong = mistake().answer(arrays)
    right, found = expected(judged.case, arrays["baseline"]), {}
    for name in COMPARED:
        if name in wrong and name in right and judged.answer.get(name) is not None:
            theirs, ours = (to_numbers(x, np.shape(right[name])) for x in (judged.answer[name], wrong[name]))
            size = np.maximum(1, abs(ours) / np.maximum(abs(np.array(right[name])), 1e-300))  # bounds grow with numbers
            with np.errstate(invalid="ignore"):
                near = abs(theirs - ours) <= np.array(judged.case["tolerance"][name]) * size
            found[name] = bool((near | (theirs == ours) | np.isnan(theirs) & np.isnan(ours)).all())
    return found


def spread(judged: list[Judged], n: int) -> list[Judged]:
    """n small cases of as many properties as there are."""
    ranked, seen = [], Counter()
    for j in sorted(judged, key=lambda j: cost(j.case)):
        seen[j.case["property"]] += 1
        ranked.append((seen[j.case["property"]], len(ranked), j))
    return [j for _, _, j in sorted(ranked, key=lambda x: x[:2])[:n]]


def cost(case: dict) -> int:
    return len(str(case.get("optimizer_steps") or case.get("policy_logits") or ""))


class Diagnosis:
    """Looks for one mistake, or two at once, that gives the answers to nearly all failing cases *and* to the passing ones.

    A step has three values, so a single answer agrees with many mistakes by chance; all of them together do not.
    """

    def __init__(self, results: Results, level: str = "method"):
        numeric = [j for j in results.of(level) if isinstance(j.answer, dict) and not j.malformed]
        self.failing = [j for j in numeric if j.complaints]
        self.passing = [j for j in numeric if not j.complaints]
        self.arrays = {j.case["id"]: to_arrays(j.case, results.implementation.baseline) for j in numeric}
        self.few_failing, self.few_passing = spread(self.failing, 12), spread(self.passing, 8)
        self.deadline = time.process_time() + DIAGNOSE_SECONDS

    def text(self) -> str:
        if not self.failing:
            return ""
        found = self.search([(name,) for name in MISTAKES]) or self.search(self.pairs())
        m = len(self.failing)
        if not found:
            names = (name for j in self.failing for name in {c.name for c in j.complaints})
            counts = ", ".join(f"{name} in {n}" for name, n in Counter(names).most_common())
            text = f"No known mistake, nor two at once, explains these answers. Wrong in {m} failing cases: {counts}."
            return "\n".join([text, *self.steps_alone()])
        lines = []
        for names, n in found[:3]:
            lines.append("   or:" if lines else "These answers come from this mistake:")
            lines.append("       " + "\n       and: ".join(described(name) for name in names))
            lines.append(f"       (explains {n} of {m} failing cases)")
        return "\n".join(lines)

    def pairs(self) -> list[tuple[str, str]]:
        """Two mistakes that passing cases do not rule out; in both orders where both change the same step of the method."""
        likely = [k for k in MISTAKES if self.count((k,), self.few_passing, 1) is not None]
        found = []
        for a, b in itertools.combinations(likely, 2):
            same = set(vars(MISTAKES[a])) & set(vars(MISTAKES[b])) - {"__doc__", "__module__"}
            if not issubclass(MISTAKES[a], MISTAKES[b]) and not issubclass(MISTAKES[b], MISTAKES[a]):
                found += [(a, b), (b, a)] if same else [(a, b)]
        return found

    def search(self, candidates: list[tuple[str, ...]]) -> list[tuple[tuple[str, ...], int]]:
        """The candidates that explain nearly all cases, with how many failing ones, best first."""
        found = []
        for names in candidates:
            sampled = all(self.count(names, few, 1) is not None for few in (self.few_failing, self.few_passing))
            n = self.count(names, self.failing, len(self.failing) // 10) if sampled else None
            if n is not None and self.count(names, self.passing, len(self.passing) // 20) is not None:
                found.append((names, n))
        return sorted(found, key=lambda x: -x[1])

    def count(self, names: tuple[str, ...], judged: list[Judged], misses: int) -> int | None:
        """How many of these answers the mistakes give, or None if they miss more than allowed (or time is up)."""
        mistake, n = both(names), 0
        for i, j in enumerate(judged):
            if time.process_time() > self.deadline:
                return None
            n += all(agreements(mistake, j, self.arrays[j.case["id"]]).values())
            if i + 1 - n > misses:
                return None
        return n

    def steps_alone(self) -> list[str]:
        """The mistake that gives the steps, where another one spoils the loss: half of an answer is better than none."""
        wrong = [j for j in self.failing if any(c.name == "step" for c in j.complaints)]
        sample, lines = [*spread(wrong, 24), *self.few_passing], []
        for name, mistake in MISTAKES.items() if len(wrong) > 2 else ():
            if time.process_time() < self.deadline:
                same = sum(agreements(mistake, j, self.arrays[j.case["id"]])["step"] for j in sample)
                if same > 0.95 * len(sample):
                    lines.append(f"The steps alone, in {same} of {len(sample)} cases: {described(name)}")
        return lines[:3]


def described(name: str) -> str:
    return f"{' '.join(MISTAKES[name].__doc__.split())} [{name}]"


def same_failures(failing: list[Judged]) -> str:
    """For level exact, where answers are rounding and no two are equal: which mistake fails the same cases."""
    names = ("float32_subtraction", "bfloat16_logits", "float64_subtraction", "logits_read_as_doubles")
    shares = {k: sum(k in j.case["flags"] for j in failing) for k in names}
    best = max(names, key=lambda k: shares[k])
    if shares[best] < 0.9 * len(failing):
        return ""
    return f"{shares[best]} of these {len(failing)} cases fail with: {described(best)}"


# ----------------------------------------------------------------------------------------------------------------------
# The smallest failing pair


def complete(case: dict) -> dict | None:
    """The case with its expected answer, or None if it asks for what is within rounding."""
    case = case | expect(case)
    return case if case.pop("decided") else None


def smaller(case: dict):
    """Simpler cases, the boldest simplification first: fewer pairs, tokens, vocabulary entries, digits."""
    half = len(case["labels"]) // 2

    def keep(change) -> dict:
        new = copy.deepcopy({k: v for k, v in case.items() if k not in ANSWERS})
        change(new)
        return new

    def without_pair(i):
        def change(new):
            for name in (*LOGITS, "labels"):
                new[name] = [x for j, x in enumerate(new[name]) if j % half != i]
            new["micro_batches"] = [half - 1]

        return change

    def tokens_only(i, kept):
        def change(new):
            for name in (*LOGITS, "labels"):
                new[name][i] = new[name][i][kept]

        return change

    def without_entries(entries):
        def change(new):
            for name in LOGITS:
                new[name] = [[[x for v, x in enumerate(t) if v not in entries] for t in r] for r in new[name]]
            new["labels"] = [[y - sum(v < y for v in entries) for y in r] for r in new["labels"]]

        return change

    def rounded(digits):
        def change(new):
            for name in LOGITS:
                new[name] = [
                    [[float(f"{float32(round(x, digits)) + 0.0:.9g}") for x in t] for t in r] for r in new[name]
                ]

        return change

    if half > 1:
        yield from (keep(without_pair(i)) for i in range(half))
    longest = max(map(len, case["labels"]))
    if longest > 3:
        yield keep(lambda new: [tokens_only(i, slice(0, longest // 2))(new) for i in range(2 * half)])
    for i, labels in enumerate(case["labels"]):
        n = len(labels)
        cuts = [slice(0, n // 2), slice(n // 2, n)] if n > 3 else []
        for kept in [*cuts, slice(0, n - 1), slice(1, n)] if n > 1 else []:
            yield keep(tokens_only(i, kept))
    vocab, used = len(case["policy_logits"][0][0]), {y for r in case["labels"] for y in r}
    free = [v for v in range(vocab) if v not in used]
    if vocab - len(free) >= 2 and len(free) > 1:
        yield keep(without_entries(set(free)))
    if len(free) > 3:
        yield keep(without_entries(set(free[: len(free) // 2])))
    if vocab > 2:
        yield from (keep(without_entries({v})) for v in free[:8])
    yield from (keep(rounded(d)) for d in (0, 1, 2) if rounded_differs(case, d))


def rounded_differs(case: dict, digits: int) -> bool:
    return any(abs(x - round(x, digits)) > 1e-6 for name in LOGITS for r in case[name] for t in r for x in t)


def must_answer_wrong(found: list[Complaint]) -> bool:
    return any(c.name in REQUIRED for c in found)


def smallest_failure(implementation, case: dict, answer, seconds: float) -> tuple[dict, object]:
    """Shrinks a failing case as long as the implementation gives wrong numbers for what is left of it.

    If a number is wrong that everyone must answer, one of those stays wrong.
    """
    deadline = time.monotonic() + seconds
    required = must_answer_wrong(judge(case, answer, implementation.baseline))
    if case["entry"] != "logits":
        return case, answer

    def rounds(case: dict):
        """The simpler cases that can be asked, so many at a time."""
        made = (complete(new | {"id": f"smaller {i}"}) for i, new in enumerate(smaller(case)))
        fair = (new for new in made if new and new["level"] >= case["level"])  # "exact" < "method": asks for no more
        while group := list(itertools.islice(fair, implementation.at_once)):
            yield group

    def step(case: dict) -> tuple | None:
        for group in rounds(case):
            if time.monotonic() > deadline:
                return None
            answers = implementation.ask(group)
            for new, found in zip(group, answers):
                wrong = [] if isinstance(found, Failed) else judge(new, found, implementation.baseline)
                if wrong and not any(c.malformed for c in wrong) and must_answer_wrong(wrong) >= required:
                    return new, found
        return None

    while time.monotonic() < deadline and (found := step(case)):
        case, answer = found
    return case, answer


def show(case: dict) -> str:
    """A case as a person reads it."""
    numbers = f"β {case['beta']:g}, ε_check {case['epsilon_check']:g}, ε_step {case['epsilon_step']:g}"
    pairs = f"{len(case['expected']['step'])} pair(s)"
    if case["entry"] != "logits":
        return f"{numbers}, {pairs}; entry {case['entry']}: see {case['id']} in cases.jsonl"
    lines = [f"{numbers}, {pairs} in micro-batches of {case['micro_batches']}"]
    half = len(case["labels"]) // 2
    for i in range(half) if half <= 3 else []:
        for name, j in (("chosen", i), ("rejected", i + half)):
            for t, y in enumerate(case["labels"][j][:6]):
                f, r = (", ".join(f"{x:.9g}" for x in case[k][j][t][:8]) for k in LOGITS)
                more = ", …" if len(case["policy_logits"][j][t]) > 8 else ""
                lines.append(f"  {name:8} {i}, token {t}: label {y}, policy [{f}{more}], reference [{r}{more}]")
    return "\n".join(lines)


class Reporter:
    """Describes the failures of one implementation: each malformed kind once, the diagnosis once, shrinking within a limit."""

    def __init__(self, results: Results, properties: dict):
        self.results, self.properties = results, properties
        self.told: dict[str, str] = {}  # malformed kind -> the property under which it was described
        self.seconds = SHRINK_SECONDS
        self.diagnosed = ""

    def diagnosis(self) -> str:
        self.diagnosed = self.diagnosed or Diagnosis(self.results).text()
        return self.diagnosed

    def is_told(self, failing: list[Judged]) -> bool:
        """All of these are malformed in ways that were described under another property."""
        return all(j.malformed in self.told for j in failing)

    def malformed(self, failing: list[Judged], prop: str) -> list[str]:
        lines = []
        for kind, n in Counter(j.malformed for j in failing if j.malformed).items():
            if kind in self.told:
                lines.append(f"{n} of them as described under {self.told[kind]!r}.")
                continue
            self.told[kind] = prop
            first = next(j for j in failing if j.malformed == kind)
            text = next(c.text for c in first.complaints if c.malformed == kind)
            total = sum(j.malformed == kind for j in self.results.judged)
            lines.append(f"{total} of {len(self.results.judged)} cases, the first {first.case['id']!r}: {text}")
        return lines

    def describe(self, prop: str, level: str) -> str:
        """What a failing property prints."""
        failing, asked = self.results.failing(level, prop), self.results.of(level, prop)
        text = [f"{prop}: {self.properties[prop]}", f"{len(failing)} of {len(asked)} cases fail (level {level})."]
        text += self.malformed(failing, prop)
        numeric = [j for j in failing if not j.malformed]
        if numeric:
            worst = min(numeric, key=lambda j: (not must_answer_wrong(j.complaints), cost(j.case)))
            started = time.monotonic()
            case, answer = smallest_failure(
                self.results.implementation, worst.case, worst.answer, min(self.seconds, SHRINK_SECONDS / 3)
            )
            self.seconds = max(0.0, self.seconds - (time.monotonic() - started))
            wrong = judge(case, answer, self.results.implementation.baseline)
            text += [
                f"The smallest, from {worst.case['id']!r}:",
                "",
                show(case),
                "",
                *(f"  {c.text}" for c in wrong[:6]),
            ]
        if numeric and level == "exact" and (why := same_failures(numeric)):
            text += ["", why]
        return "\n".join(text)
