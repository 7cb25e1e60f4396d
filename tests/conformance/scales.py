"""What implementations pass, and from which scale of policy − reference on: a table in Markdown.

python -m tests.conformance.scales                                        the examples of `adapters.py`
python -m tests.conformance.scales my.module:function './my_port'         yours
"""

from __future__ import annotations

import sys

import numpy as np

from .cases import PROPERTIES, read
from .judging import Command, Function, complaints

EXAMPLES = ["ours", "trl_style", "textbook_float32", "textbook_bfloat16"]


def properties_passed(cases: list[dict], answers: list, level: str, baseline: str) -> str:
    """ "n of m", and the names of those that fail."""
    asked = [(c, a) for c, a in zip(cases, answers) if c["level"] == level and a is not None]
    offered = [p for p in PROPERTIES if any(c["property"] == p for c, _ in asked)]
    failed = {c["property"] for c, a in asked if complaints(c, a, baseline)}
    names = ", ".join(p for p in offered if p in failed)
    return f"{len(offered) - len(failed)} of {len(offered)}" + (f" (fails: {names})" if 0 < len(failed) <= 6 else "")


def right_steps(cases: list[dict], answers: list) -> dict[float, float]:
    """Of the cases near the reference, the share of pairs with the right step, for each scale."""
    found: dict[float, list[bool]] = {}
    for c, a in zip(cases, answers):
        if "scale" in c:
            steps = a.get("step", ()) if isinstance(a, dict) else ()
            right = np.array(c["expected"]["step"])
            steps = np.asarray(steps)
            found.setdefault(c["scale"], []).extend(
                steps == right if steps.shape == right.shape else [False] * len(right)
            )
    return {scale: float(np.mean(x)) for scale, x in found.items()}


def table(implementations: list) -> str:
    cases = read()
    scales = sorted({c["scale"] for c in cases if "scale" in c}, reverse=True)
    head = ["implementation", "level method: properties", "level exact: properties", *(f"{s:g}" for s in scales)]
    rows = [head, ["---"] * len(head)]
    for implementation in implementations:
        answers = implementation.ask(cases)
        passed = [properties_passed(cases, answers, v, implementation.baseline) for v in ("method", "exact")]
        shares = right_steps(cases, answers)
        rows.append([implementation.name, *passed, *(f"{shares[s]:.0%}" for s in scales)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    named = [(f"tests.conformance.adapters:{name}", name) for name in EXAMPLES]
    asked = [(spec, "") for spec in sys.argv[1:]] or named
    made = [Function(s, n) if ":" in s and " " not in s else Command(s, n) for s, n in asked]
    print("Steps right at each size (standard deviation) of policy − reference logits:\n")
    print(table(made))
