"""Asks an implementation, judges its answers, finds the smallest pair that breaks it and the mistake that explains it."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import math
import shlex
import subprocess
from pathlib import Path

import numpy as np

from .exact import expect, float32
from .mistakes import MISTAKES

REQUIRED = ("step", "beta", "loss", "next_beta")
LOGITS = ("policy_logits", "ref_logits")


# ----------------------------------------------------------------------------------------------------------------------
# Asking


def to_arrays(case: dict, baseline: str) -> dict:
    """A case as Python functions get it: NumPy arrays, logits float32, no expected answer."""
    given = {k: v for k, v in case.items() if k not in ("expected", "floor", "margin_floor", "flags")}
    given["baseline"], given["as_written"] = baseline, {}
    for name in LOGITS:
        if name in case:
            one = case["entry"] == "packed"
            rows = lambda dtype, name=name: [np.array(x, dtype) for x in case[name]]  # noqa: E731
            given[name] = np.array(case[name], np.float32) if one else rows(np.float32)
            given["as_written"][name] = np.array(case[name]) if one else rows(np.float64)
    if "labels" in case:
        given["labels"] = [np.array(y, np.int64) for y in case["labels"]]
    for name in ("tokens", "positions", "segments", "source", "label", "owner"):
        if name in case:
            given[name] = np.array(case[name], np.int64)
    for name in ("logp", "ref_logp", "delta_minus", "delta_plus"):
        if name in case:
            given[name] = np.array(case[name], np.float64)
    return given


class Function:
    """A Python function, "package.module:function", "file.py:function" or the function itself."""

    def __init__(self, spec, name: str = "", baseline: str = "arithmetic"):
        self.name, self.baseline = name or str(spec), baseline
        if callable(spec):
            self.function = spec
            return
        place, _, attribute = spec.rpartition(":")
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        self.function = getattr(module, attribute)

    def ask(self, cases: list[dict]) -> list:
        """An answer, None (not offered) or a text that says what went wrong, for each case."""
        answers = []
        for case in cases:
            try:
                answers.append(self.function(to_arrays(case, self.baseline)))
            except Exception as error:
                answers.append(f"raised {type(error).__name__}: {error}")
        return answers


class Command:
    """A program: cases as JSON lines on its standard input, one answer line for each on its standard output."""

    def __init__(self, command: str, name: str = "", baseline: str = "arithmetic", timeout: float = 60):
        self.command, self.name, self.baseline, self.timeout = command, name or command, baseline, timeout

    def ask(self, cases: list[dict]) -> list:
        lines = [
            json.dumps({k: v for k, v in c.items() if k != "expected"} | {"baseline": self.baseline}) for c in cases
        ]
        problem = ""
        try:
            run = subprocess.run(
                shlex.split(self.command), input="\n".join(lines) + "\n", capture_output=True,
                text=True, errors="replace", timeout=self.timeout,
            )  # fmt: skip
            out, err = run.stdout, run.stderr
            problem = f"the program ended with exit status {run.returncode}" if run.returncode else "the program ended"
        except subprocess.TimeoutExpired as late:
            out, err = ((x or b"").decode(errors="replace") for x in (late.stdout, late.stderr))
            problem = f"the program had not ended after {self.timeout:g} s (--timeout)"
        except OSError as error:
            return [f"the program could not be started: {error}"] * len(cases)
        answers = []
        for case, line in zip(cases, out.splitlines()):
            try:
                answer = json.loads(line)
                if not isinstance(answer, dict) or answer.get("id") != case["id"]:
                    raise ValueError
                answers.append(None if "skip" in answer else answer)
            except ValueError:
                answers.append(f'a line {{"id": "{case["id"]}", ...}} was expected, found: {line[:200]!r}')
                break  # what follows cannot be trusted to belong to its case
        if len(answers) < len(cases):
            last = err.strip().splitlines()[-1:] or ["nothing on standard error"]
            problem = (
                answers.pop() if answers and isinstance(answers[-1], str) else f"no answer: {problem} ({last[0][:200]})"
            )
            answers += [f"{problem} [after {len(answers)} of {len(cases)} answers]"] * (len(cases) - len(answers))
        return answers


# ----------------------------------------------------------------------------------------------------------------------
# Judging


def complaints(case: dict, answer, baseline: str) -> list[str]:
    """What is wrong with an answer, one line each; nothing if it is right or was not offered."""
    if answer is None:
        return []
    if not isinstance(answer, dict):
        return [answer if isinstance(answer, str) else f"an answer is a dict or None, found {type(answer).__name__}"]
    right = case["expected"] | {"next_beta": case["expected"]["next_beta"][baseline]}
    pairs, partial = len(right["step"]), answer.get("partial", False)
    slack = [b * m for b, m in zip(right["beta"], case["margin_floor"])]
    allowed = {
        "step": [0.0] * pairs,
        "beta": [1e-6 * b for b in right["beta"]],
        "loss": 2e-6 * (1 + right["loss"]) + sum(slack) / pairs,
        "next_beta": 1e-6 * right["next_beta"],
        "margin": [1e-5 * abs(m) + f for m, f in zip(right["margin"], case["margin_floor"])],
        "losses": [2e-6 * (1 + x) + s for x, s in zip(right["losses"], slack)],
        "delta_minus": case["floor"],
        "delta_plus": case["floor"],
    }
    found = []
    for name, tolerance in allowed.items():
        if name not in answer:
            if name in REQUIRED and not partial:
                found.append(f"{name} is missing")
            continue
        try:
            values, expected = np.asarray(answer[name]).astype(float), np.array(right[name])
        except (TypeError, ValueError):
            values = np.array(math.nan)
        if values.shape != expected.shape:
            found.append(f"{name}: numbers of shape {expected.shape} expected, found {answer[name]!r:.100}")
            continue
        for i in map(tuple, np.argwhere(~(abs(values - expected) <= np.array(tolerance)))):
            place = f"{name}[{i[0]}]" if i else name
            digits = "d" if name == "step" else ".9g"
            shown = (int if name == "step" and math.isfinite(values[i]) else float)(values[i])
            text = f"{place}: {expected[i].item():{digits}} expected, found {shown:{'d' if isinstance(shown, int) else '.9g'}}"
            if name == "step":
                text += f" (Δ⁻ {right['delta_minus'][i[0]]:.3g}, Δ⁺ {right['delta_plus'][i[0]]:.3g}, floor {case['floor'][i[0]]:.2g})"
            found.append(text)
    if answer.get("grad") is not None and "grad" in right:
        found += gradient_complaints(case, answer["grad"], right)
    return found


def gradient_complaints(case: dict, grads, right: dict) -> list[str]:
    pairs = len(right["step"])
    for i, expected in enumerate(right["grad"]):
        b, m = right["beta"][i % pairs], case["margin_floor"][i % pairs]
        expected = np.array(expected)
        try:
            values = np.asarray(grads[i]).astype(float).reshape(expected.shape)
        except (TypeError, ValueError, IndexError):
            return [f"grad[{i}]: an array of shape {expected.shape} expected"]
        wrong = ~(abs(values - expected) <= b / pairs * (1e-5 + b * m))
        if wrong.any():
            t, v = np.argwhere(wrong)[0].tolist()
            return [f"grad[{i}][{t}][{v}]: {expected[t, v]:.9g} expected, found {values[t, v]:.9g}"]
    return []


def explanation(failures: list[tuple[dict, object]], baseline: str, sample: int = 12) -> str:
    """The known mistakes that give the very answers of most failing cases, if any gives one."""
    explained = dict.fromkeys(MISTAKES, 0)
    for case, answer in failures[:sample]:
        if not isinstance(answer, dict):
            continue
        names = [k for k in (*REQUIRED, "margin", "delta_minus", "delta_plus") if k in answer]
        arrays = to_arrays(case, baseline)
        for name in MISTAKES:
            wrong = MISTAKES[name]().answer(arrays)
            expected = case["expected"] | {k: np.array(wrong[k]).tolist() for k in names}
            judged = case | {"expected": expected | {"next_beta": {baseline: float(wrong["next_beta"])}}}
            explained[name] += not complaints(judged, {k: answer[k] for k in names} | {"partial": True}, baseline)
    most = max(explained.values())
    found = [f"{' '.join(MISTAKES[k].__doc__.split())} [{k}]" for k, n in explained.items() if n == most > 0]
    return "\n    or: ".join(found[:3])


# ----------------------------------------------------------------------------------------------------------------------
# The smallest failing pair


def complete(case: dict) -> dict | None:
    """The case with its expected answer, or None if it asks for what lies within rounding."""
    case = case | expect(case)
    return case if case.pop("decided") else None


def smaller(case: dict):
    """Simpler cases, the boldest simplification first: fewer pairs, tokens, vocabulary entries, digits."""
    half = len(case["labels"]) // 2

    def keep(change) -> dict:
        new = copy.deepcopy({k: v for k, v in case.items() if k not in ("expected", "floor", "margin_floor", "flags")})
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


def smallest_failure(implementation, case: dict, answer, budget: int = 150) -> tuple[dict, object]:
    """Shrinks a failing case as long as the implementation fails what is left of it."""
    if case["entry"] != "logits" or isinstance(implementation, Command) and isinstance(answer, str):
        return case, answer
    shrinking = True
    while shrinking and budget > 0:
        shrinking = False
        for new in smaller(case):
            new = complete(new | {"id": "smaller"})
            if new is None or new["level"] > case["level"]:  # "exact" < "method": never asks for more than it did
                continue
            budget -= 1
            (found,) = implementation.ask([new])
            if complaints(new, found, implementation.baseline):
                case, answer, shrinking = new, found, True
                break
            if budget <= 0:
                break
    return case, answer


def show(case: dict) -> str:
    """A case as a person reads it."""
    numbers = f"β {case['beta']:g}, ε_check {case['epsilon_check']:g}, ε_step {case['epsilon_step']:g}"
    lines = [f"{numbers}, {len(case['expected']['step'])} pair(s) in micro-batches of {case['micro_batches']}"]
    if case["entry"] != "logits":
        return lines[0] + f"; entry {case['entry']}, id {case['id']}"
    half = len(case["labels"]) // 2
    for i in range(half) if half <= 3 else []:
        for name, j in (("chosen", i), ("rejected", i + half)):
            for t, y in enumerate(case["labels"][j][:6]):
                f, r = (", ".join(f"{x:.9g}" for x in case[k][j][t][:8]) for k in LOGITS)
                more = ", …" if len(case["policy_logits"][j][t]) > 8 else ""
                lines.append(f"  {name:8} {i}, token {t}: label {y}, policy [{f}{more}], reference [{r}{more}]")
    return "\n".join(lines)


def report(implementation, failures: list[tuple[dict, object]], total: int, properties: dict) -> str:
    """What a failing property prints."""
    failures = sorted(failures, key=lambda f: len(json.dumps(f[0])))
    case, answer = failures[0]
    name = case["property"]
    small, small_answer = smallest_failure(implementation, case, answer)
    why = explanation([(small, small_answer), *failures], implementation.baseline)
    text = [f"{name}: {properties[name]}", f"{len(failures)} of {total} cases fail; the smallest, from {case['id']}:"]
    text += ["", show(small), "", *(f"  {c}" for c in complaints(small, small_answer, implementation.baseline)[:6]), ""]
    if why:
        text.append(f"This answer is what you get by: {why}")
    else:
        usual = [f for f in case.get("flags", []) if f in MISTAKES][:6]
        text.append(
            "No known mistake gives this very answer. This case catches: " + (", ".join(usual) or "unknown ones")
        )
    return "\n".join(text)
