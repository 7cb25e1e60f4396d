"""Judges answers by the case file alone (`expected`, `tolerance`), and sums up what an implementation passes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .asking import UsageError

REQUIRED = ("step", "beta", "loss", "next_beta")
OPTIONAL = ("margin", "losses", "delta_minus", "delta_plus", "kl", "grad")


class Complaint(NamedTuple):
    text: str
    malformed: str = ""  # not a wrong number but no number: what kind, for reporting it once

    @property
    def name(self) -> str:
        """The quantity that it is about: "step[0]: …" -> "step"."""
        return self.text.split(":")[0].split("[")[0]


def expected(case: dict, baseline: str) -> dict:
    """The right answer for this baseline: where the file has an object, it has one member for each baseline."""
    return {k: v[baseline] if isinstance(v, dict) else v for k, v in case["expected"].items()}


def to_plain(x):
    """Torch tensors, alone or in lists, as NumPy arrays, whether they require grad or not; anything else as it is."""
    if isinstance(x, (list, tuple)):
        return [to_plain(v) for v in x]
    return np.asarray(x.detach().cpu()) if hasattr(x, "detach") else x


def to_numbers(x, shape: tuple) -> np.ndarray | None:
    """x as float64 of this shape, or None if it is anything but real numbers of it (texts, booleans, complex, None)."""
    try:
        values = np.asarray(to_plain(x))
        if values.dtype.kind not in "iuf" and "float" not in str(values.dtype):  # JAX's bfloat16 is of kind V
            return None
        return values.astype(np.float64) if values.shape == shape else None
    except Exception:  # whatever an object of theirs does: it is not an array of numbers
        return None


def judge(case: dict, answer, baseline: str, names: tuple[str, ...] = REQUIRED) -> list[Complaint]:
    """What is wrong with an answer; nothing if it is right or declined (None). `names` must be in it."""
    if answer is None:
        return []
    if not isinstance(answer, dict):
        text = answer if isinstance(answer, str) else f"expected a dict or None, got {type(answer).__name__}"
        return [Complaint(str(text), "".join(c for c in text if not c.isdigit())[:80])]
    right = expected(case, baseline)
    found = [Complaint(f"{name} is missing", f"{name} is missing") for name in names if answer.get(name) is None]
    for name, values in right.items():
        if answer.get(name) is not None:
            compare = judge_rows if name == "grad" else judge_numbers
            found += compare(case, name, answer[name], values)
    return found


def judge_numbers(case: dict, name: str, answer, right) -> list[Complaint]:
    right, tolerance = np.array(right, np.float64), np.array(case["tolerance"][name])
    values = to_numbers(answer, right.shape)
    if values is None:
        text = f"{name}: expected real numbers of shape {right.shape}, got {answer!r:.100}"
        return [Complaint(text, f"{name} has the wrong shape or type")]
    found = []
    for i in map(tuple, np.argwhere(~(abs(values - right) <= tolerance))):
        place = f"{name}[{i[0]}]" if i else name
        text = f"{place}: expected {right[i]:.9g}, got {values[i]:.9g}"
        if name == "step" and "delta_minus" in case["expected"]:
            minus, plus = (case["expected"][k][i[0]] for k in ("delta_minus", "delta_plus"))
            text += f" (Δ⁻ {minus:.3g}, Δ⁺ {plus:.3g}, rounding {case['tolerance']['delta_minus'][i[0]]:.2g})"
        found.append(Complaint(text))
    return found


def judge_rows(case: dict, name: str, answer, right) -> list[Complaint]:
    """The gradient: one array per response, each with one bound."""
    for i, (row, bound) in enumerate(zip(right, case["tolerance"][name])):
        row = np.array(row)
        try:
            values = to_numbers(answer[i], row.shape) if len(answer) == len(right) else None
        except Exception:
            values = None
        if values is None:
            text = f"{name}[{i}]: expected real numbers of shape {row.shape}, {len(right)} such arrays in all"
            return [Complaint(text, f"{name} has the wrong shape or type")]
        wrong = ~(abs(values - row) <= bound)
        if wrong.any():
            t, v = np.argwhere(wrong)[0].tolist()
            return [Complaint(f"{name}[{i}][{t}][{v}]: expected {row[t, v]:.9g}, got {values[t, v]:.9g}")]
    return []


def complaints(case: dict, answer, baseline: str, names: tuple[str, ...] = REQUIRED) -> list[str]:
    return [c.text for c in judge(case, answer, baseline, names)]


# ----------------------------------------------------------------------------------------------------------------------
# What an implementation passes


class Judged(NamedTuple):
    case: dict
    answer: object
    complaints: list[Complaint]

    @property
    def malformed(self) -> str:
        return next((c.malformed for c in self.complaints if c.malformed), "")


def form(case: dict) -> str:
    """What an implementation may decline as a whole: an entry, or two different ε."""
    return case["entry"] + ("" if case["epsilon_check"] == case["epsilon_step"] else ", two ε")


class Results:
    """An implementation's answers to all cases, asked for once, judged once."""

    def __init__(
        self, implementation, cases: list[dict], level: str = "method", expected_failures: set[str] = frozenset()
    ):
        self.implementation, self.level, self.expected_failures = implementation, level, expected_failures
        answers = implementation.ask(cases)
        self.problem = implementation.problem
        answered = {form(c) for c, a in zip(cases, answers) if a is not None}
        self.judged = []
        for case, answer in zip(cases, answers):
            found = judge(case, answer, implementation.baseline)
            if answer is None and form(case) in answered:
                text = f"declined, although other cases with {form(case)} are answered"
                found = [Complaint(text, "declined, others answered")]
            elif answer is None and form(case) == "logits":
                text = "declined; every implementation must answer the cases with entry logits and one ε"
                found = [Complaint(text, "declined, required")]
            self.judged.append(Judged(case, answer, found))

    def of(self, level: str, prop: str = "") -> list[Judged]:
        """The cases of a level (and a property) that count: those not declined as a whole form."""
        found = [j for j in self.judged if j.case["level"] == level and prop in ("", j.case["property"])]
        return [j for j in found if j.answer is not None or j.complaints]

    def failing(self, level: str, prop: str = "") -> list[Judged]:
        return [j for j in self.of(level, prop) if j.complaints]

    def is_expected(self, j: Judged) -> bool:
        return bool({j.case["id"], j.case["property"]} & self.expected_failures)

    def surprises(self, level: str, prop: str = "") -> list[Judged]:
        """The failures that make a run red: at a level that must pass, and not listed as expected."""
        must = level == "method" or self.level == "exact"
        return [j for j in self.failing(level, prop) if must and not self.is_expected(j)]

    def outdated(self) -> list[str]:
        """Entries of the list of expected failures that name no failing case."""
        failing = {x for v in ("method", "exact") for j in self.failing(v) for x in (j.case["id"], j.case["property"])}
        return sorted(self.expected_failures - failing)

    @property
    def passes(self) -> bool:
        return not (self.surprises("method") or self.surprises("exact") or self.problem or self.outdated())

    def verdict(self) -> str:
        """One line: what is passed, of how many cases, and what was not asked."""
        text = []
        for level in ("method", "exact"):
            asked, failing = self.of(level), self.failing(level)
            total = sum(j.case["level"] == level for j in self.judged)
            did = "passes" if asked and not failing and not self.problem else "fails"
            listed = sum(self.is_expected(j) for j in failing)
            count = f"{len(asked) - len(failing)} of {total} cases right"
            count += f", {total - len(asked)} declined" * (total > len(asked))
            text.append(f"{did} the level {level} ({count}" + f", {listed} expected failures" * bool(listed) + ")")
        return "; ".join(text) + (f"; but {self.problem}" if self.problem else "")

    def not_judged(self) -> list[str]:
        """What a green line does not cover: forms that were declined, numbers that were not answered."""
        declined = sorted({form(j.case) for j in self.judged if j.answer is None and not j.complaints})
        answers = [j.answer for j in self.judged if isinstance(j.answer, dict)]
        missing = [k for k in OPTIONAL if not any(a.get(k) is not None for a in answers)]
        return [f"cases with {f}" for f in declined] + missing

    def as_json(self, properties: dict) -> dict:
        """The report that can be committed: the verdict, a summary by property, the failing cases."""

        def count(prop: str, level: str) -> dict:
            asked, failing = len(self.of(level, prop)), len(self.failing(level, prop))
            return {"right": asked - failing, "asked": asked}

        return {
            "format": "epsdpo-report",
            "version": 1,
            "implementation": self.implementation.name,
            "baseline": self.implementation.baseline,
            "level": self.level,
            "passes": self.passes,
            "verdict": self.verdict(),
            "not_judged": self.not_judged(),
            "properties": {p: {v: count(p, v) for v in ("method", "exact")} for p in properties},
            "failing": {v: [j.case["id"] for j in self.failing(v)] for v in ("method", "exact")},
            "expected_failures": sorted(self.expected_failures),
        }


def read_expected_failures(path: str | None) -> set[str]:
    """Of a text file: ids of cases or names of properties, one a line; # starts a comment. UsageError if no UTF-8."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines() if path else []
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected text in UTF-8: {error}") from error
    return {text for line in lines if (text := line.partition("#")[0].strip())}
