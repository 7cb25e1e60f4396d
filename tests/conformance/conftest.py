"""Options of the conformance suite, the implementations it runs against, and the table it ends with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .cases import PROPERTIES, read
from .judging import Command, Function, complaints, report

HERE = Path(__file__).parent


def pytest_addoption(parser):
    group = parser.getgroup("conformance", "conformance of an ε-DPO implementation (see tests/conformance/__init__.py)")
    group.addoption("--impl", metavar="MODULE:FUNCTION", help="a Python function: package.module:name or file.py:name")
    group.addoption("--command", metavar="COMMAND", help="a program: JSON lines in, JSON lines out")
    group.addoption("--baseline", choices=("arithmetic", "harmonic"), default="arithmetic", help="of next_beta")
    group.addoption("--level", choices=("method", "exact"), help="which level must pass; method unless it is ours")
    group.addoption("--timeout", type=float, default=60, metavar="SECONDS", help="for a run of the command")


def pytest_ignore_collect(collection_path, config):
    """With an implementation given, only it is tested: not the suite itself, nor ours beside TRL's."""
    foreign = config.getoption("impl", None) or config.getoption("command", None)
    return True if foreign and collection_path.name in ("test_suite.py", "test_trl.py") else None


def implementations(config) -> list:
    # getoption has no such options when pytest was started from above and read this file too late to add them
    option = lambda name, default=None: config.getoption(name, default)  # noqa: E731
    baseline = option("baseline", "arithmetic")
    if option("impl"):
        return [Function(option("impl"), baseline=baseline)]
    if option("command"):
        return [Command(option("command"), baseline=baseline, timeout=option("timeout", 60))]
    from . import adapters, oracle

    ours = [Function(adapters.ours, "ours", baseline), Function(oracle.answer, "numpy", baseline)]
    node = shutil.which("node")
    return ours + ([Command(f"{node} {HERE / 'port.js'}", "port.js", baseline)] if node else [])


class Results:
    """An implementation's answers to all cases, asked for once; and what became of them."""

    def __init__(self, implementation, level: str):
        self.implementation, self.level, self.table = implementation, level, {}
        self.answers = None

    def of(self, prop: str, level: str) -> list[tuple[dict, object]]:
        if self.answers is None:
            cases = read()
            self.answers = list(zip(cases, self.implementation.ask(cases)))
        return [(c, a) for c, a in self.answers if c["property"] == prop and c["level"] == level]

    def check(self, prop: str, level: str) -> None:
        asked = [(c, a) for c, a in self.of(prop, level) if a is not None]
        wrong = [(c, a) for c, a in asked if complaints(c, a, self.implementation.baseline)]
        self.table[prop, level] = (len(asked) - len(wrong), len(asked))
        if not asked:
            pytest.skip("the implementation does not offer this entry")
        if wrong:
            text = f"{self.implementation.name} fails, level {level}\n" + report(
                self.implementation, wrong, len(asked), PROPERTIES
            )
            if level == "method" or self.level == "exact":
                pytest.fail(text, pytrace=False)
            pytest.xfail(text)  # a distinction, not a duty


def pytest_generate_tests(metafunc):
    if "results" not in metafunc.fixturenames:
        return
    config = metafunc.config
    if not hasattr(config, "conformance"):
        foreign = config.getoption("impl", None) or config.getoption("command", None)
        level = config.getoption("level", None) or ("method" if foreign else "exact")
        config.conformance = [Results(i, level) for i in implementations(config)]
    there = {(c["property"], c["level"]) for c in read()}
    cells = [(r, p, v) for r in config.conformance for v in ("method", "exact") for p in PROPERTIES if (p, v) in there]
    metafunc.parametrize("results, prop, level", cells, ids=[f"{r.implementation.name}-{v}-{p}" for r, p, v in cells])


def pytest_terminal_summary(terminalreporter, config):
    for results in getattr(config, "conformance", []):
        if not results.table:
            continue
        terminalreporter.write_sep("-", f"conformance of {results.implementation.name}, cases passed")
        for prop in PROPERTIES:
            method, exact = (results.table.get((prop, v), (0, 0)) for v in ("method", "exact"))
            show = lambda x: f"{x[0]:3} of {x[1]:3}" if x[1] else "         -"  # noqa: E731
            terminalreporter.write_line(f"{prop:24} method {show(method)}   exact {show(exact)}")
        failing = {v: sum(a < b for (_, w), (a, b) in results.table.items() if w == v) for v in ("method", "exact")}
        verdict = (
            "passes the level method"
            if not failing["method"]
            else f"fails {failing['method']} properties of the level method"
        )
        verdict += ", and exact, a distinction" if not any(failing.values()) else ""
        terminalreporter.write_line(f"{results.implementation.name} {verdict}")
