"""The suite without pytest and without torch: `python -m tests.conformance --impl … | --command …`, see README.md."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .asking import Command, Function, UsageError, users_modules_first
from .cases import PROPERTIES, read
from .failures import Reporter
from .judging import Results, read_expected_failures

DESCRIBED = 3  # properties; when more fail, they mostly fail for the same reason


def add_options(add) -> None:
    """The options, for argparse and for pytest alike; `add` takes what `ArgumentParser.add_argument` takes."""
    add("--impl", metavar="MODULE:FUNCTION", help="a Python function: package.module:name or file.py:name")
    add("--command", metavar="COMMAND", help="a program: JSON lines in, JSON lines out")
    add("--baseline", choices=("arithmetic", "harmonic"), default="arithmetic", help="which next_beta is asked for")
    add("--level", choices=("method", "exact"), help="the level that must pass [method]")
    add("--timeout", type=float, default=60.0, metavar="SECONDS", help="for all cases together [60]")
    add("--expected-failures", metavar="FILE", help="ids of cases or names of properties that may fail, one a line")
    add("--report", metavar="FILE", help="write the result as JSON")


def implementation(impl: str | None, command: str | None, baseline: str, timeout: float):
    """What the options name, or None; UsageError if they name two or cannot be loaded."""
    if impl and command:
        raise UsageError("--impl and --command: expected one of them, got both")
    if not 0 < timeout <= 1e6:
        raise UsageError(f"--timeout must be above 0 and at most 1000000 (got {timeout:g})")
    if command and not command.strip():
        raise UsageError("--command is empty: expected a program (is a shell variable not set?)")
    if command:
        return Command(command, baseline=baseline, timeout=timeout)
    if impl:
        users_modules_first()
        return Function(impl, baseline=baseline, timeout=timeout)
    return None


def chosen(options: dict) -> tuple[Function | Command | None, set[str]]:
    """The implementation and the expected failures that the options name; UsageError or OSError for bad options."""
    expected = read_expected_failures(options["expected_failures"])
    made = implementation(*(options[name] for name in ("impl", "command", "baseline", "timeout")))
    if made and options["report"]:
        open(options["report"], "a").close()  # a file that cannot be written is an error now, not at the end
    return made, expected


def table(results: Results) -> list[str]:
    """Cases right and asked, property by property."""
    lines = [f"conformance of {results.implementation.name}: cases right, of those asked"]
    for prop in PROPERTIES:
        cells = []
        for level in ("method", "exact"):
            asked, failing = len(results.of(level, prop)), len(results.failing(level, prop))
            cells.append(f"{level} {asked - failing:3} of {asked:3}" if asked else f"{level}          -")
        lines.append(f"  {prop:24} {'   '.join(cells)}")
    return lines


def closing_lines(results: Results, reporter: Reporter) -> list[str]:
    """What ends a run: the diagnosis, what was not judged, the verdict."""
    lines = []
    if diagnosis := reporter.diagnosis():
        lines += ["", *diagnosis.splitlines(), ""]
    if results.not_judged():
        lines.append(f"Not judged, because not answered: {', '.join(results.not_judged())}.")
    if results.outdated():
        lines.append(f"Listed as expected failures, but nothing of it fails: {', '.join(results.outdated())}.")
    return [*lines, f"{results.implementation.name} {results.verdict()}"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.conformance", description="Tests an implementation of ε-DPO.")
    add_options(parser.add_argument)
    options = parser.parse_args(arguments)
    try:
        made, expected = chosen(vars(options))
        if made is None:
            raise UsageError("expected --impl or --command")
    except (UsageError, OSError) as error:
        parser.exit(2, f"{error}\n")
    results = Results(made, read(), options.level or "method", expected)
    reporter = Reporter(results, PROPERTIES)
    failing = list(
        dict.fromkeys(
            (j.case["property"], j.case["level"]) for level in ("method", "exact") for j in results.surprises(level)
        )
    )
    described = 0
    for prop, level in failing:
        if described < DESCRIBED and not reporter.is_told(results.failing(level, prop)):
            print(reporter.describe(prop, level), end="\n\n")
            described += 1
    if failing[described:]:
        print(f"{len(failing) - described} more properties fail, see the table.\n")
    print("\n".join([*table(results), *closing_lines(results, reporter)]))
    if options.report:
        text = json.dumps(results.as_json(PROPERTIES), ensure_ascii=False, indent=1)
        Path(options.report).write_text(text + "\n", encoding="utf-8")
    return 0 if results.passes else 1


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(main())
