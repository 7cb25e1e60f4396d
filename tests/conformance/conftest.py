"""The suite under pytest: one test for each property and level, the table and the verdict at the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .__main__ import add_options, chosen, closing_lines, table
from .asking import Command, Function, UsageError
from .cases import PROPERTIES, read
from .failures import Reporter
from .judging import Results

HERE = Path(__file__).parent


def pytest_addoption(parser):
    group = parser.getgroup("conformance", "conformance of an ε-DPO implementation (see tests/conformance/README.md)")
    add_options(group.addoption)


def options_of(config) -> dict:
    """The suite's options; those of nobody when pytest was started from above and read this file too late to add them."""
    names = {"impl": None, "command": None, "baseline": "arithmetic", "level": None, "timeout": 60.0}
    names |= {"expected_failures": None, "report": None}
    return {name: config.getoption(name, default) for name, default in names.items()}


def pytest_ignore_collect(collection_path, config):
    """With an implementation given, only it is tested: not the suite itself, nor ours beside TRL's."""
    options = options_of(config)
    foreign = options["impl"] or options["command"]
    return True if foreign and collection_path.name in ("test_suite.py", "test_trl.py") else None


def pytest_configure(config):
    try:
        config.conformance_impl, config.conformance_expected = chosen(options_of(config))
    except (UsageError, OSError) as error:
        raise pytest.UsageError(str(error)) from None


def implementations(baseline: str) -> list:
    """The suite's own examples, tested when no other implementation is named."""
    from . import adapters, oracle

    ours = [Function(adapters.ours, "ours", baseline), Function(oracle.answer, "numpy", baseline)]
    node = shutil.which("node")
    return ours + ([Command(f"{node} {HERE / 'port.js'}", "port.js", baseline)] if node else [])


class Tested:
    """An implementation whose answers are asked for when the first test needs them."""

    def __init__(self, implementation, level: str, expected: set[str]):
        self.implementation, self.level, self.expected = implementation, level, expected
        self.results = self.reporter = None

    def ask(self) -> Results:
        if self.results is None:
            self.results = Results(self.implementation, read(), self.level, self.expected)
            self.reporter = Reporter(self.results, PROPERTIES)
        return self.results

    def check(self, prop: str, level: str) -> None:
        results = self.ask()
        failing, surprises = results.failing(level, prop), results.surprises(level, prop)
        if not results.of(level, prop):
            pytest.skip("declined")
        if failing and self.reporter.is_told(failing):
            pytest.skip("fails as an earlier property does: see the first failure")
        if surprises:
            text = self.reporter.describe(prop, level)
            pytest.fail(f"{self.implementation.name} fails\n{text}", pytrace=False)
        if failing:
            pytest.xfail("level exact is optional" if level == "exact" else "listed as an expected failure")

    def check_run(self) -> None:
        results = self.ask()
        if results.problem:
            pytest.fail(results.problem, pytrace=False)
        if results.outdated():
            pytest.fail(f"expected to fail, but nothing of it fails: {', '.join(results.outdated())}", pytrace=False)


def pytest_generate_tests(metafunc):
    if "tested" not in metafunc.fixturenames:
        return
    config = metafunc.config
    if not hasattr(config, "conformance"):
        options = options_of(config)
        made = [config.conformance_impl] if config.conformance_impl else implementations(options["baseline"])
        level = options["level"] or ("method" if config.conformance_impl else "exact")
        config.conformance = [Tested(x, level, config.conformance_expected) for x in made]
    if "prop" not in metafunc.fixturenames:
        metafunc.parametrize("tested", config.conformance, ids=[t.implementation.name for t in config.conformance])
        return
    there = {(c["property"], c["level"]) for c in read()}
    cells = [(t, p, v) for t in config.conformance for v in ("method", "exact") for p in PROPERTIES if (p, v) in there]
    metafunc.parametrize("tested, prop, level", cells, ids=[f"{t.implementation.name}-{v}-{p}" for t, p, v in cells])


def pytest_terminal_summary(terminalreporter, config):
    for tested in getattr(config, "conformance", []):
        if tested.results is None:
            continue
        title, *lines = table(tested.results)
        terminalreporter.write_sep("-", title)
        terminalreporter.write_line("\n".join([*lines, *closing_lines(tested.results, tested.reporter)]))
        if report := options_of(config)["report"]:
            text = json.dumps(tested.results.as_json(PROPERTIES), ensure_ascii=False, indent=1)
            Path(report).write_text(text + "\n", encoding="utf-8")
