"""What implementations pass, and from which scale of policy − reference on: a table in Markdown.

python -m tests.conformance.scales                                        the examples of `adapters.py`
python -m tests.conformance.scales my.module:function './my_port'         yours
"""

from __future__ import annotations

import sys

import numpy as np

from .asking import Command, Function
from .cases import PROPERTIES, read
from .judging import Results

EXAMPLES = ["ours", "trl_style", "textbook_float32", "textbook_bfloat16"]


def properties_passed(results: Results, level: str) -> str:
    """ "n of m", and the names of those that fail."""
    asked = [p for p in PROPERTIES if results.of(level, p)]
    failed = [p for p in asked if results.failing(level, p)]
    names = f" (fails: {', '.join(failed)})" if 0 < len(failed) <= 6 else ""
    return f"{len(asked) - len(failed)} of {len(asked)}{names}"


def right_steps(results: Results) -> dict[float, float]:
    """Of the cases near the reference, the share of pairs with the right step, for each scale."""
    found: dict[float, list[bool]] = {}
    for j in results.judged:
        if "scale" in j.case:
            right = np.array(j.case["expected"]["step"])
            steps = np.asarray(j.answer.get("step", ()) if isinstance(j.answer, dict) else ())
            same = steps == right if steps.shape == right.shape else [False] * len(right)
            found.setdefault(j.case["scale"], []).extend(same)
    return {scale: float(np.mean(x)) for scale, x in found.items()}


def table(implementations: list) -> str:
    cases = read()
    scales = sorted({c["scale"] for c in cases if "scale" in c}, reverse=True)
    head = ["implementation", "level method: properties", "level exact: properties", *(f"{s:g}" for s in scales)]
    rows = [head, ["---"] * len(head)]
    for implementation in implementations:
        results = Results(implementation, cases)
        passed = [properties_passed(results, v) for v in ("method", "exact")]
        shares = right_steps(results)
        rows.append([implementation.name, *passed, *(f"{shares[s]:.0%}" for s in scales)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    named = [(f"tests.conformance.adapters:{name}", name) for name in EXAMPLES]
    asked = [(spec, "") for spec in sys.argv[1:]] or named
    made = [Function(s, n) if ":" in s and " " not in s else Command(s, n) for s, n in asked]
    print("Steps right at each size (standard deviation) of policy − reference logits:\n")
    print(table(made))
