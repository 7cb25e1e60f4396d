"""The suite itself: the file is what the generator writes, every mistake is caught and named, no program can hang it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import cases, oracle, scales
from .exact import float32
from .judging import Command, Function, complaints, complete, report, smallest_failure, to_arrays
from .mistakes import MISTAKES

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = f"{__package__}.adapters"


@pytest.fixture(scope="module")
def read():
    return cases.read()


def wrong_cases(mistake: str, read: list[dict], level: str = "exact") -> list[tuple[dict, dict]]:
    function = Function(MISTAKES[mistake]().answer)
    answers = zip(read, function.ask(read))
    return [(c, a) for c, a in answers if complaints(c, a, "arithmetic") and level in ("exact", c["level"])]


# ----------------------------------------------------------------------------------------------------------------------
# The case file


def test_the_file_is_what_the_generator_writes():
    assert cases.FILE.read_text(encoding="utf-8") == "\n".join(cases.lines()) + "\n", (
        "cases.jsonl is old: python -m tests.conformance.cases > tests/conformance/cases.jsonl"
    )


def test_the_head_explains_everything(read):
    head = json.loads(cases.FILE.open(encoding="utf-8").readline())
    assert (head["format"], head["version"]) == ("epsdpo-cases", 1)
    assert "id" not in head, "a program tells the head from a case by it"
    used = {k for c in read for k in c}
    assert used == set(head["fields"])
    assert {f for c in read for f in c["flags"]} == set(head["flags"])
    assert {c["property"] for c in read} == set(head["properties"])
    assert all(len(text) > 12 for part in ("fields", "flags", "properties") for text in head[part].values())


def test_the_cases_are_many_and_told_apart(read):
    assert len(read) >= 200 and len({c["id"] for c in read}) == len(read)
    assert {c["entry"] for c in read} == {"logits", "packed", "sums"}
    for level in ("method", "exact"):
        steps = {s for c in read if c["level"] == level for s in c["expected"]["step"]}
        assert steps == {-1, 0, 1}
    assert {c["scale"] for c in read if "scale" in c} == {10.0**-n for n in range(8)}
    assert max(len(y) for c in read for y in c.get("labels", [])) >= 250


def test_nine_digits_hold_each_logit(read):
    for c in read:
        for row in (t for k in ("policy_logits", "ref_logits") for r in c.get(k, []) for t in r):
            assert all(float(f"{float32(x):.9g}") == x for x in row)


def test_the_answers_do_not_ask_for_what_lies_within_rounding(read):
    for c in read:
        if c["entry"] == "sums" or c["property"] in ("ties", "at the reference"):
            continue
        for step, minus, plus, floor in zip(
            *(c["expected"][k] for k in ("step", "delta_minus", "delta_plus")), c["floor"]
        ):
            assert minus == plus == 0 or min(abs(minus), abs(plus)) > floor, c["id"]
            assert step == ((minus > 0 > plus) - (minus < 0 < plus))


def test_a_file_of_another_version_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"format": "epsdpo-cases", "version": 2}\n')
    with pytest.raises(ValueError, match="a case file of version 1 expected"):
        cases.read(tmp_path / "x.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes are caught, and named


def test_the_cases_that_carry_a_mistakes_flag_catch_it(read):
    for mistake, made in MISTAKES.items():
        flagged = sorted((c for c in read if mistake in c["flags"]), key=lambda c: len(str(c)))
        assert flagged, f"{mistake} passes every case"
        for case, answer in zip(flagged[:3], Function(made().answer).ask(flagged[:3])):
            assert complaints(case, answer, "arithmetic"), (mistake, case["id"])


@pytest.mark.parametrize(
    "mistake, told",
    [
        ("steps_swapped", "step[0]"),
        ("beta_per_micro_batch", "next_beta"),
        ("token_mean", ""),
        ("float32_subtraction", "step[0]"),
        ("not_shifted", ""),
        ("mean_of_loss_means", "loss"),
    ],
)
def test_a_failure_names_the_property_the_smallest_pair_and_the_mistake(mistake, told, read):
    wrong = wrong_cases(mistake, read)
    implementation = Function(MISTAKES[mistake]().answer, "theirs")
    text = report(implementation, wrong, len(read), cases.PROPERTIES)
    assert any(text.startswith(f"{name}: {line}") for name, line in cases.PROPERTIES.items())
    assert f"{len(wrong)} of {len(read)} cases fail" in text and told in text
    assert f"[{mistake}]" in text or MISTAKES[mistake].__doc__.split(":")[0] in text


def test_the_smallest_failing_pair_is_small_and_still_fails(read):
    implementation = Function(MISTAKES["delta_token_mean"]().answer)
    case = next(c for c, _ in wrong_cases("delta_token_mean", read) if c["property"] == "batch")
    (answer,) = implementation.ask([case])
    small, answer = smallest_failure(implementation, case, answer)
    assert complaints(small, answer, "arithmetic")
    assert len(json.dumps(small["policy_logits"])) < 0.2 * len(json.dumps(case["policy_logits"]))
    assert complete(small)["expected"] == small["expected"], "and its right answer is its own"


def test_an_unknown_mistake_is_not_given_a_wrong_name(read):
    implementation = Function(lambda case: oracle.answer(case) | {"loss": 17.0})
    case = read[0]
    text = report(implementation, [(case, implementation.ask([case])[0])], 1, cases.PROPERTIES)
    assert "No known mistake" in text and "loss: 0" in text and "found 17" in text


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"step": None}, "step: numbers of shape (1,) expected, found None"),
        ({"step": [0, 0]}, "step: numbers of shape (1,) expected, found [0, 0]"),
        ({"step": [float("nan")]}, "step[0]: 1 expected, found nan"),
        ({"beta": ["x"]}, "beta: numbers of shape (1,) expected"),
        ({"loss": float("nan")}, "loss: 0"),
        ({"loss": [0.5]}, "loss: numbers of shape () expected"),
        ({"next_beta": 0.5}, "next_beta: 0.0990099"),
        ({"margin": [0.0]}, "margin[0]: 2 expected, found 0"),
        ({"grad": [[[0.0, 0.0]], [[0.0, 0.0]]]}, "grad[0][0][0]: -0.0"),
        ({"grad": 5}, "grad[0]: an array of shape (1, 2) expected"),
    ],
)
def test_wrong_answers_of_every_kind_are_complaints(change, complaint, read):
    right = oracle.answer(to_arrays(read[0], "arithmetic"))
    assert not complaints(read[0], right, "arithmetic")
    assert any(x.startswith(complaint) for x in complaints(read[0], right | change, "arithmetic"))
    if set(change) <= {"step", "beta", "loss", "next_beta"}:
        (key,) = change
        missing = {k: v for k, v in right.items() if k != key}
        assert f"{key} is missing" in complaints(read[0], missing, "arithmetic")
        assert not complaints(read[0], missing | {"partial": True}, "arithmetic")


def test_the_two_baselines_are_told_apart(read):
    case = next(
        c for c in read if c["expected"]["next_beta"]["arithmetic"] > 1.001 * c["expected"]["next_beta"]["harmonic"]
    )
    for baseline, other in (("arithmetic", "harmonic"), ("harmonic", "arithmetic")):
        answer = oracle.answer(to_arrays(case, baseline))
        assert not complaints(case, answer, baseline)
        assert any(x.startswith("next_beta") for x in complaints(case, answer, other))


# ----------------------------------------------------------------------------------------------------------------------
# The examples pass what the README says


@pytest.mark.parametrize("name", ["trl_style", "textbook_float32"])
def test_a_right_port_in_float32_passes_the_level_method_and_fails_near_the_reference(name, read):
    for baseline in ("arithmetic", "harmonic"):
        answers = list(zip(read, Function(f"{ADAPTERS}:{name}", baseline=baseline).ask(read)))
        failed = {(c["level"], c["property"]) for c, a in answers if complaints(c, a, baseline)}
        assert {level for level, _ in failed} == {"exact"}
        assert ("exact", "near the reference") in failed


def test_bf16_logits_fail_nearly_everything_and_ours_nothing():
    rows = scales.table([Function(f"{ADAPTERS}:{n}", n) for n in ("textbook_bfloat16", "ours")]).splitlines()
    assert "| 0 of " in rows[2] and rows[2].endswith("| 0% |")
    assert rows[3].startswith("| ours | 17 of 17 | 7 of 7 | 100%") and rows[3].count("100%") == 8


def test_ours_passes_with_the_authors_baseline_too(read):
    implementation = Function(f"{ADAPTERS}:ours", baseline="harmonic")
    assert not [c["id"] for c, a in zip(read, implementation.ask(read)) if complaints(c, a, "harmonic")]


# ----------------------------------------------------------------------------------------------------------------------
# Programs


def program(tmp_path: Path, text: str, timeout: float = 20) -> Command:
    (tmp_path / "port.py").write_text("import sys, json, time\n" + text)
    return Command(f"{sys.executable} {tmp_path / 'port.py'}", timeout=timeout)


ECHO = "for line in sys.stdin: print(json.dumps({'id': json.loads(line)['id'], 'step': []}), flush=True)\n"


@pytest.mark.parametrize(
    "text, told",
    [
        ("sys.exit(3)", "no answer: the program ended with exit status 3 (nothing on standard error) [after 0 of 3"),
        ("print('{', end='')\nraise RuntimeError('boom')", "found: '{' [after 0 of 3 answers]"),
        ("sys.stdin.readline()\nraise RuntimeError('boom')", "exit status 1 (RuntimeError: boom)"),
        ("print('hello')", "expected, found: 'hello'"),
        ("print('[1]')", "expected, found: '[1]'"),
        ("print(json.dumps({'id': 'worked by hand 1'}))", """was expected, found: '{"id": "worked by hand 1"}'"""),
        (
            "print(json.dumps({'id': 'worked by hand 0'}))",
            "no answer: the program ended (nothing on standard error) [after 1 of 3",
        ),
        ("sys.stdout.buffer.write(b'\\xff\\xfe\\n')", "was expected, found:"),
    ],
)
def test_a_program_that_dies_or_answers_nonsense_is_a_clear_failure(tmp_path, read, text, told):
    answers = program(tmp_path, text).ask(read[:3])
    assert len(answers) == 3
    assert told in answers[-1], answers[-1]
    assert complaints(read[2], answers[2], "arithmetic") == [answers[2]]


def test_a_program_that_stalls_is_a_clear_failure(tmp_path, read):
    text = "line = sys.stdin.readline(); print(json.dumps({'id': json.loads(line)['id']}), flush=True)\ntime.sleep(60)"
    answers = program(tmp_path, text, timeout=2).ask(read[:3])
    assert answers[0] == {"id": "worked by hand 0"}
    assert "had not ended after 2 s (--timeout)" in answers[1] and "[after 1 of 3 answers]" in answers[1]


def test_a_program_that_is_not_there(read):
    assert "could not be started" in Command("./no-such-port").ask(read[:1])[0]


def test_a_program_may_skip_and_sees_no_answers(tmp_path, read):
    text = (
        "for line in sys.stdin:\n    c = json.loads(line)\n    assert 'expected' not in c and c['baseline'] == 'arithmetic'\n"
        "    print(json.dumps({'id': c['id'], 'skip': 'no such entry'}))"
    )
    assert program(tmp_path, text).ask(read[:3]) == [None] * 3


def run_pytest(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "pytest", "tests/conformance", "--confcutdir", "tests/conformance"]
    command = [*start, "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )


def test_the_command_line_on_someone_elses_function(tmp_path):
    """A stranger's file with one mistake: red, the mistake named; without it: green, though not exact, and no torch."""
    (tmp_path / "theirs.py").write_text(
        "import sys\nfrom tests.conformance.mistakes import MISTAKES\n"
        "def right(case):\n    assert 'torch' not in sys.modules\n"
        "    return MISTAKES['float32_subtraction']().answer(case)\n"
        "def wrong(case): return MISTAKES['steps_swapped']().answer(case)\n"
    )
    run = run_pytest(tmp_path, "--impl", "theirs:right")
    assert run.returncode == 0, run.stdout
    assert "theirs:right passes the level method" in run.stdout and "xfailed" in run.stdout
    assert run_pytest(tmp_path, "--impl", "theirs:right", "--level", "exact", "-k", "near").returncode == 1
    run = run_pytest(tmp_path, "--impl", f"{tmp_path / 'theirs.py'}:wrong", "-k", "hand")
    assert run.returncode == 1
    assert "step[0]: 1 expected, found -1" in run.stdout and "[steps_swapped]" in run.stdout


def test_the_command_line_on_a_program(tmp_path):
    (tmp_path / "port.py").write_text("import sys, json\n" + ECHO)
    run = run_pytest(
        tmp_path, "--command", f"{sys.executable} {tmp_path / 'port.py'}", "--baseline", "harmonic", "-k", "hand"
    )
    assert run.returncode == 1 and "next_beta is missing" in run.stdout
