"""The suite itself: its file is what the generator writes, nothing false is green, mistakes are caught and named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from . import asking, cases, failures, oracle, scales
from .__main__ import main
from .asking import Command, Failed, Function, UsageError, load, to_arrays
from .exact import float32
from .failures import SHRINK_SECONDS, Diagnosis, Reporter, both, complete, smallest_failure
from .judging import REQUIRED, Results, complaints, form, read_expected_failures
from .mistakes import MISTAKES

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = f"{__package__}.adapters"
SCHEMA = json.loads(cases.SCHEMA.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def read():
    return cases.read()


def answering(*names: str):
    """A port that makes these mistakes."""
    mistake = both(names)
    return Function(lambda case: mistake().answer(case), "theirs")


# ----------------------------------------------------------------------------------------------------------------------
# The case file


SLOW = (cases.lengths, cases.large_vocabulary, cases.not_monotone)  # in exact arithmetic


@pytest.mark.parametrize(
    "parts, every",
    [([part for part in cases.ALL if part not in SLOW], 16), pytest.param(cases.ALL, 1, marks=pytest.mark.slow)],
    ids=["most", "all"],
)
def test_file_is_what_the_generator_writes(parts, every):
    """Byte by byte; of the flags, which take long, those of every 16th case, or of all."""
    old = "cases.jsonl is old: python -m tests.conformance.cases > tests/conformance/cases.jsonl"
    lines = cases.FILE.read_text(encoding="utf-8").splitlines()
    known = {c["id"]: c["flags"] for c in cases.read()}
    number = {name: i for i, name in enumerate(known)}

    def flags_of(c):
        return cases.flags_of(c) if number.get(c["id"], 0) % every == 0 else known[c["id"]]

    made = cases.all_cases(flags_of, parts)
    ids = {c["id"] for c in made}
    wanted = [lines[0], *(line for line, name in zip(lines[1:], known) if name in ids)]
    assert len(ids) == len(made) > 200 and (parts is not cases.ALL or ids == known.keys()), old
    assert wanted == [cases.line(x) for x in (cases.head(), *made)], old


def violations(value, schema: dict, place: str = "$") -> list[str]:
    """What of a JSON value a schema forbids; as much of JSON Schema as `schema.json` uses."""
    if "$ref" in schema:
        return violations(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], place)
    if "anyOf" in schema:
        tried = [violations(value, s, place) for s in schema["anyOf"]]
        return [] if [] in tried else min(tried, key=len)
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float)}
    if "type" in schema and (isinstance(value, bool) or not isinstance(value, kinds[schema["type"]])):
        return [f"{place} is no {schema['type']}"]
    found = [f"{place} is {value!r}"] * ("const" in schema and value != schema["const"])
    found += [f"{place} is {value!r}"] * ("enum" in schema and value not in schema["enum"])
    found += [f"{place} is {value!r}"] * (
        value <= schema["exclusiveMinimum"] if "exclusiveMinimum" in schema else False
    )
    found += [f"{place} is {value!r}"] * (value < schema["minimum"] if "minimum" in schema else False)
    if isinstance(value, dict):
        found += [f"{place} has no {k}" for k in schema.get("required", []) if k not in value]
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{place} has {k}" for k in value if k not in known and more is False]
        for k, v in value.items():
            found += violations(v, known.get(k, more if isinstance(more, dict) else {}), f"{place}.{k}")
    if isinstance(value, list):
        found += [f"{place} is empty"] * (len(value) < schema.get("minItems", 0))
        for i, v in enumerate(value) if "items" in schema else ():
            found += violations(v, schema["items"], f"{place}[{i}]")
    return found


def test_schema_describes_head_cases_and_answers(read):
    kind = {k: {"$ref": f"#/$defs/{k}"} for k in ("head", "case", "answer", "asked")}
    assert not violations(json.loads(cases.FILE.open(encoding="utf-8").readline()), kind["head"])
    for c in read:
        assert not violations(c, kind["case"]), c["id"]
    assert violations(read[0] | {"step": [1]}, kind["case"]) == ["$ has step"]
    assert violations({k: v for k, v in read[0].items() if k != "beta"}, kind["case"]) == ["$ has no beta"]
    assert violations(read[0] | {"labels": [[0.5]]}, kind["case"]) == ["$.labels[0][0] is no integer"]
    assert violations(read[0] | {"entry": "x"}, kind["case"]) and violations(read[0] | {"beta": 0}, kind["case"])
    right = {k: np.asarray(v).tolist() for k, v in oracle.answer(to_arrays(read[0], "harmonic")).items()}
    assert violations(right, kind["answer"]) and not violations({"id": "x"} | right, kind["answer"])
    assert not violations({"id": "x", "skip": "why"}, kind["answer"]) and violations({"id": "x"}, kind["answer"])


def test_head_explains_everything(read):
    head = json.loads(cases.FILE.open(encoding="utf-8").readline())
    assert "id" not in head, "a program tells the head from a case by it"
    assert {k for c in read for k in c} == set(head["fields"])
    assert {f for c in read for f in c["flags"]} == set(head["flags"]) == set(MISTAKES)
    assert {c["property"] for c in read} == set(head["properties"])
    assert all(len(text) > 12 for part in ("fields", "flags", "properties") for text in head[part].values())


def test_cases_are_many_and_told_apart(read):
    assert len(read) >= 250 and len({c["id"] for c in read}) == len(read)
    for level in ("method", "exact"):
        steps = {s for c in read if c["level"] == level for s in c["expected"]["step"]}
        assert steps == {-1, 0, 1}
    assert {c["scale"] for c in read if "scale" in c} == {10.0**-n for n in range(8)}
    assert max(len(y) for c in read for y in c.get("labels", [])) > 512
    assert max(len(t) for c in read for r in c.get("policy_logits", []) for t in r) > 1000
    assert {c["beta"] for c in read} >= {1e-4, 20.0}


def test_one_epsilon_covers_every_property_and_every_mistake(read):
    one = [c for c in read if c["level"] == "method" and c["epsilon_check"] == c["epsilon_step"]]
    assert {c["property"] for c in one} == set(cases.PROPERTIES) - {"two epsilons"}
    caught = {f for c in one for f in c["flags"]}
    rounding = {"float32_subtraction", "float64_subtraction", "logits_read_as_doubles"}
    assert set(MISTAKES) - caught == rounding | {"step_for_check", "check_for_step"}
    logits = {f for c in one if form(c) in ("logits", "run") for f in c["flags"]}
    assert caught - logits == {"not_shifted", "rejected_after_chosen"}, "the two of packed rows"


def test_nine_digits_hold_each_logit(read):
    for c in read:
        for row in (t for k in ("policy_logits", "ref_logits") for r in c.get(k, []) for t in r):
            assert all(float(f"{float32(x):.9g}") == x for x in row)


def test_answers_do_not_ask_for_what_is_within_rounding(read):
    for c in read:
        if c["entry"] in ("sums", "run") or c["property"] in ("ties", "at the reference"):
            continue
        rows = [c["expected"][k] for k in ("step", "delta_minus", "delta_plus")]
        for step, minus, plus, floor in zip(*rows, c["tolerance"]["delta_minus"]):
            assert minus == plus == 0 or min(abs(minus), abs(plus)) > floor, c["id"]
            assert step == ((minus > 0 > plus) - (minus < 0 < plus))


def test_file_of_another_version_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"format": "epsdpo-cases", "version": 1}\n')
    with pytest.raises(ValueError, match="expected a case file of version 2"):
        cases.read(tmp_path / "x.jsonl")


def test_readme_counts_what_is_there(read):
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    method = sum(c["level"] == "method" for c in read)
    one = sum(c["level"] == "method" and form(c) in ("logits", "run") for c in read)
    port = len((Path(__file__).parent / "port.js").read_text(encoding="utf-8").splitlines())
    told = (f"({len(read)} cases", f"{method} of {method} | {len(read) - method} of", f"133 of the {one} cases")
    for part in (*told, f"of {len(MISTAKES)} known ones", f"in {port} lines", f"version ({cases.VERSION})"):
        assert part in text, part


def test_runner_of_the_readme_accepts_right_answers_and_refuses_wrong_ones(read):
    """Ten lines that anyone can copy: they must not be fooled either."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python runner\n(.*?)```", text, re.S)

    def run(my_answer) -> None:
        exec(block, {"my_answer": my_answer, "__name__": "runner"})

    path = os.getcwd()
    os.chdir(ROOT)
    try:
        run(lambda case: oracle.answer(to_arrays(case, "arithmetic")))
        for wrong in ({"step": []}, {"loss": float("nan")}, {"next_beta": 0.0}, {"beta": [0.1]}):
            with pytest.raises((AssertionError, ValueError)):
                run(lambda case, wrong=wrong: oracle.answer(to_arrays(case, "arithmetic")) | wrong)
    finally:
        os.chdir(path)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing false is green


class Tensor:
    """As much of a torch tensor that requires grad as the suite uses."""

    def __init__(self, values):
        self.values = values

    def __array__(self, *_, **__):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad")

    def detach(self):
        return types.SimpleNamespace(cpu=lambda: np.asarray(self.values))


class Rude:
    def __getattr__(self, name):
        raise RuntimeError("do not look at me")


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"step": None}, "step is missing"),
        ({"step": [0, 0]}, "step: expected real numbers of shape (1,), got [0, 0]"),
        ({"step": [float("nan")]}, "step[0]: expected 1, got nan"),
        ({"step": [True]}, "step: expected real numbers of shape (1,), got [True]"),
        ({"beta": ["x"]}, "beta: expected real numbers of shape (1,)"),
        ({"beta": ["0.0990099009901"]}, "beta: expected real numbers of shape (1,)"),
        ({"loss": float("nan")}, "loss: expected 0"),
        ({"loss": 0.599030773 + 0j}, "loss: expected real numbers of shape ()"),
        ({"loss": "0.599030773"}, "loss: expected real numbers of shape ()"),
        ({"loss": [0.5]}, "loss: expected real numbers of shape ()"),
        ({"loss": Rude()}, "loss: expected real numbers of shape ()"),
        ({"loss": Tensor(0.25)}, "loss: expected 0.599030773, got 0.25"),
        ({"next_beta": 0.5}, "next_beta: expected 0.0990099"),
        ({"margin": [0.0]}, "margin[0]: expected 2, got 0"),
        ({"kl": [0.0, 0.0]}, "kl[0]: expected 0.327813325, got 0"),
        ({"grad": [[[0.0, 0.0]], [[0.0, 0.0]]]}, "grad[0][0][0]: expected -0.0"),
        ({"grad": 5}, "grad[0]: expected real numbers of shape (1, 2)"),
        ({"grad": [[[0.0, 0.0]]]}, "grad[0]: expected real numbers of shape (1, 2)"),
    ],
)
def test_wrong_answers_of_every_kind_are_complaints(change, complaint, read):
    right = oracle.answer(to_arrays(read[0], "arithmetic"))
    assert not complaints(read[0], right, "arithmetic")
    assert any(x.startswith(complaint) for x in complaints(read[0], right | change, "arithmetic"))
    for key in change.keys() & set(REQUIRED):
        missing = {k: v for k, v in right.items() if k != key} | {"partial": True}
        assert f"{key} is missing" in complaints(read[0], missing, "arithmetic")


def test_tensors_that_require_grad_are_read(read):
    right = oracle.answer(to_arrays(read[0], "arithmetic"))
    grad = [Tensor(x) for x in right["grad"]]
    beta = [Tensor(x) for x in right["beta"]]  # one tensor for each pair
    assert not complaints(read[0], right | {"loss": Tensor(right["loss"]), "beta": beta, "grad": grad}, "arithmetic")


def only_easy(case: dict):
    return oracle.answer(case) if case["property"] == "worked by hand" else None


@pytest.mark.parametrize(
    "function, told",
    [
        (lambda case: None, "0 of 204 cases right"),
        (lambda case: {"partial": True}, "0 of 204 cases right"),
        (lambda case: {}, "0 of 204 cases right"),
        (lambda case: sys.exit(0), "0 of 204 cases right"),
        (lambda case: [1], "0 of 204 cases right"),
        (only_easy, "7 of 204 cases right"),
        (lambda case: None if case["id"] == "packed rows 3" else oracle.answer(case), "203 of 204 cases right"),
        (lambda case: oracle.answer(case) if case["entry"] == "sums" else None, "17 of 204 cases right"),
        (lambda case: oracle.answer(case) | {"loss": 0j}, "0 of 204 cases right"),
    ],
    ids=["skips", "partial", "empty", "exits", "list", "easy ones", "all but one", "sums", "complex"],
)
def test_unanswered_cases_are_not_green(function, told, read):
    results = Results(Function(function), read)
    assert not results.passes and "fails the level method (" in results.verdict() and told in results.verdict()
    assert "passes the level method" not in results.verdict()


def test_declined_forms_are_named_and_pass(read):
    """A port may decline two ε, packed rows, sums and runs, as a whole each; the verdict says how many cases that were."""
    takes = ("logits", "run")
    results = Results(Function(lambda c: oracle.answer(c) if form(c) in takes else None), read)
    declined = sum(form(c) not in takes and c["level"] == "method" for c in read)
    assert results.passes and f"{declined} declined" in results.verdict()
    assert {"cases with packed", "cases with logits, two ε"} <= set(results.not_judged())
    assert "grad" not in results.not_judged()
    assert {"grad", "kl"} <= set(Results(answering("float32_subtraction"), read).not_judged())


def program(tmp_path: Path, text: str, timeout: float = 20) -> Command:
    (tmp_path / "port.py").write_text("import sys, json, time\n" + text)
    return Command(f"{sys.executable} {tmp_path / 'port.py'}", timeout=timeout)


RIGHT = (
    f"sys.path.insert(0, {str(ROOT)!r})\nfrom tests.conformance import asking, oracle\nimport numpy as np\n"
    "for line in sys.stdin:\n    c = json.loads(line)\n    a = oracle.answer(asking.to_arrays(c, c['baseline']))\n"
    "    print(json.dumps({'id': c['id']} | {k: np.asarray(a[k]).tolist() for k in ('step','beta','loss','next_beta')}))\n"
)


@pytest.mark.parametrize(
    "end, problem",
    [
        ("", ""),
        ("sys.exit(7)", "the program ended with exit status 7 after its last answer"),
        ("print('{}')", "1 line(s) more than cases on standard output, the first: '{}'"),
        ("time.sleep(60)", "the program had not ended after 4 s (--timeout) after its last answer"),
    ],
)
def test_programs_that_end_badly_are_not_green(tmp_path, read, end, problem):
    results = Results(
        program(tmp_path, RIGHT + "sys.stdout.flush()\n" + end, timeout=4 if "sleep" in end else 60), read[:7]
    )
    assert results.problem.startswith(problem) and bool(results.problem) == bool(problem)
    assert results.passes == (not problem) == ("passes the level method" in results.verdict())
    assert problem in results.verdict()
    assert not results.failing("method")


@pytest.mark.parametrize("more", ["'skip': False", "'skip': None", "'note': 'a\\u2028b\\x85c'"])
def test_what_an_answer_may_hold_beside_its_numbers(more, tmp_path, read):
    text = RIGHT.replace("'id': c['id']", "'id': c['id'], " + more).replace(
        "'next_beta')}", "'next_beta')}, ensure_ascii=False"
    )
    results = Results(program(tmp_path, "sys.stdout.reconfigure(encoding='utf-8')\n" + text), read[:7])
    assert results.passes and not results.problem


@pytest.mark.parametrize(
    "text, told",
    [
        ("sys.exit(3)", "no answer: the program ended with exit status 3 (nothing on standard error) [after 0 of 3"),
        ("print('{', end='')\nraise RuntimeError('boom')", "got '{' [after 0 of 3 answers]"),
        ("sys.stdin.readline()\nraise RuntimeError('boom')", "exit status 1 (RuntimeError: boom)"),
        ("print('hello')", "got 'hello'"),
        ("print('[1]')", "got '[1]'"),
        ("print('[' * 10000)", "got '[[["),
        ("print(json.dumps({'id': 'worked by hand 1'}))", """, got '{"id": "worked by hand 1"}'"""),
        ("print(json.dumps({'id': 'worked by hand 0'}))", "no answer: the program ended (nothing on standard error) [after 1"),
        ("sys.stdout.buffer.write(b'\\xff\\xfe\\n')", "expected a line"),
        ("print('{\"id\": \"worked by hand 0\"}', flush=True)\ntime.sleep(60)", "had not ended after 2 s (--timeout)"),
    ],
)  # fmt: skip
def test_programs_that_die_or_answer_nonsense_fail_clearly(tmp_path, read, text, told):
    answers = program(tmp_path, text, timeout=2 if "sleep" in text else 20).ask(read[:3])
    assert len(answers) == 3 and isinstance(answers[-1], Failed)
    assert told in answers[-1], answers[-1]
    assert complaints(read[2], answers[2], "arithmetic") == [answers[2]]


def test_program_that_is_not_there(read):
    assert "could not be started" in Command("./no-such-port").ask(read[:1])[0]


def test_program_may_skip_and_sees_no_answers(tmp_path, read):
    text = (
        "for line in sys.stdin:\n    c = json.loads(line)\n    assert not {'expected', 'tolerance', 'flags'} & set(c)\n"
        "    assert c['baseline'] == 'arithmetic'\n    print(json.dumps({'id': c['id'], 'skip': 'no such entry'}))"
    )
    assert program(tmp_path, text).ask(read[:3]) == [None] * 3


def test_function_that_hangs_fails_the_rest(read):
    import threading

    stop = threading.Event()
    port = Function(lambda c: stop.wait(30) if c["id"] == "worked by hand 1" else oracle.answer(c), timeout=0.5)
    answers = port.ask(read[:3])
    assert isinstance(answers[0], dict) and "had not returned after 0.5 s" in answers[1]
    assert "had not returned" in port.ask(read[:1])[0], "and nothing more is asked"
    stop.set()


def test_expected_failures_are_not_red_and_must_fail(read, tmp_path):
    (tmp_path / "expected.txt").write_text("micro-batches  # a mean of means\n\n# all of\nsums\npacked rows\n")
    listed = read_expected_failures(str(tmp_path / "expected.txt"))
    (tmp_path / "with a mark.txt").write_text("\ufeffsums\n", encoding="utf-8")
    assert read_expected_failures(str(tmp_path / "with a mark.txt")) == {"sums"}
    port = answering("mean_of_loss_means")
    ids = {j.case["id"] for j in Results(port, read).failing("method")}
    assert Results(port, read, expected_failures=ids).passes
    assert Results(port, read, expected_failures=listed).passes
    assert not Results(port, read, expected_failures=set(list(ids)[1:])).passes
    outdated = Results(port, read, expected_failures=ids | {"branches 0", "swapped"})
    assert outdated.outdated() == ["branches 0", "swapped"] and not outdated.passes


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes are caught, and named


def test_cases_that_carry_a_mistakes_flag_catch_it(read):
    for mistake in MISTAKES:
        flagged = sorted((c for c in read if mistake in c["flags"]), key=lambda c: len(str(c)))
        assert flagged, f"{mistake} passes every case"
        for case, answer in zip(flagged[:3], answering(mistake).ask(flagged[:3])):
            assert complaints(case, answer, "arithmetic"), (mistake, case["id"])


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if "float" not in m and m not in ("logits_read_as_doubles",)])
def test_each_mistake_is_named_and_explains_nearly_all(mistake, read):
    asked = [c for c in read if c["level"] == "method" and (mistake in c["flags"] or len(str(c)) < 3000)]
    results = Results(answering(mistake), asked)
    n = len(results.failing("method"))
    text = Diagnosis(results).text()
    named = re.findall(r"\[(\w+)\]\n +\(explains (\d+) of (\d+) failing cases\)", text)
    assert (mistake, str(n), str(n)) in named, text
    assert " and: " not in text and len(named) <= 3
    assert text.startswith("These answers come from this mistake:\n") and text.count("   or:\n") == len(named) - 1


@pytest.mark.parametrize(
    "mistakes",
    [
        ("mean_of_loss_means", "mean_of_beta_means"),
        ("steps_swapped", "no_reference"),
        ("loss_at_beta", "one_sided_check"),
    ],
)
def test_two_mistakes_at_once_are_named(mistakes, read):
    text = Diagnosis(Results(answering(*mistakes), read)).text()
    assert all(f"[{m}]" in text for m in mistakes) and " and: " in text


class AveragedDeltas(oracle.Oracle):
    """Δ⁻ and Δ⁺ averaged: one pair alone would look like swapped steps."""

    def differences(self, sums):
        minus, plus = super().differences(sums)
        return (minus + plus) / 2, -(minus + plus) / 2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda case: AveragedDeltas().answer(case),
        lambda case: (MISTAKES["steps_swapped"]() if case["id"] == "branches 0" else oracle.Oracle()).answer(case),
        pytest.param(
            lambda case: oracle.answer(case) | {"next_beta": np.asarray(oracle.answer(case)["next_beta"]) * 1.01},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["averaged deltas", "one case", "another next β"],
)
def test_unknown_mistakes_are_given_no_name(wrong, read):
    text = Diagnosis(Results(Function(wrong), read)).text()
    assert "No known mistake, nor two at once, explains" in text and "These answers" not in text, text


def test_steps_are_explained_when_the_loss_is_not(read):
    def wrong(case):
        return MISTAKES["steps_swapped"]().answer(case) | {"loss": 17.0} if case["entry"] == "logits" else None

    text = Diagnosis(Results(Function(wrong), read)).text()
    assert "The steps alone, in" in text and "[steps_swapped]" in text


def test_failure_shows_property_and_smallest_pair(read, monkeypatch):
    monkeypatch.setattr(failures, "SHRINK_SECONDS", 100.0)
    results = Results(answering("delta_token_mean"), read)
    text = Reporter(results, cases.PROPERTIES).describe("lengths", "method")
    assert text.startswith(f"lengths: {cases.PROPERTIES['lengths']}")
    assert f"{len(results.failing('method', 'lengths'))} of 16 cases fail (level method)." in text
    assert "token 0: label" in text and "step[0]: expected" in text


def test_smallest_failing_pair_is_small_and_still_fails(read):
    port = answering("delta_token_mean")
    case = next(j.case for j in Results(port, read).failing("method") if j.case["property"] == "batch")
    (answer,) = port.ask([case])
    small, answer = smallest_failure(port, case, answer, 30)
    assert complaints(small, answer, "arithmetic")
    assert len(json.dumps(small["policy_logits"])) < 0.2 * len(json.dumps(case["policy_logits"]))
    assert complete(small)["expected"] == small["expected"], "and its right answer is its own"


def test_shrinking_keeps_to_its_time(read, monkeypatch):
    """However slowly a port answers: a fake clock on which each question takes a second."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    asked = []

    def slow(case):
        now[0] += 1
        asked.append(case["id"])
        fails = not case["id"].startswith("smaller")  # so that every simpler case is tried
        return MISTAKES["steps_swapped"]().answer(case) if fails else oracle.answer(case)

    results = Results(Function(slow), read)
    asked.clear()
    batch = next(j for j in results.failing("method") if j.case["id"] == "batch 0")
    smallest_failure(results.implementation, batch.case, batch.answer, 3)
    assert len(asked) == 4, "the question that was being asked when time was up is the last"
    asked.clear()
    reporter = Reporter(results, cases.PROPERTIES)
    for prop in cases.PROPERTIES:
        if results.failing("method", prop):
            reporter.describe(prop, "method")
    assert 0 < len(asked) <= SHRINK_SECONDS + len(cases.PROPERTIES)


@pytest.mark.parametrize(
    "function, told",
    [
        (lambda case: case["nothing"], "raised KeyError at test_suite.py:"),
        (lambda case: np.linalg.inv(np.zeros((2, 2))), "raised LinAlgError at test_suite.py:"),  # not at NumPy's line
        (lambda case: {k: v for k, v in oracle.answer(case).items() if k != "loss"}, "loss is missing"),
        (lambda case: oracle.answer(case) | {"step": [[0]]}, "step: expected real numbers of shape"),
    ],
)
def test_malformed_answers_are_told_once_without_diagnosis_or_shrinking(function, told, read, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(asking, "load", lambda spec: lambda case: (asked.append(case["id"]), function(case))[1])
    monkeypatch.setattr(asking, "users_modules_first", lambda: None)
    monkeypatch.setattr("tests.conformance.__main__.users_modules_first", lambda: None)
    assert main(["--impl", "their:function"]) == 1
    text = capsys.readouterr().out
    assert text.count(told) == 1 and f"{len(read)} of {len(read)} cases, the first 'worked by hand 0': {told}" in text
    assert len(asked) == len(read) and "known mistake" not in text and "smallest" not in text


def test_baselines_are_told_apart(read):
    for baseline, other in (("arithmetic", "harmonic"), ("harmonic", "arithmetic")):
        assert not Results(Function(oracle.answer, baseline=baseline), read).failing("method")
        port = Function(lambda case, other=other: oracle.answer(case | {"baseline": other}), baseline=baseline)
        failing = Results(port, read).failing("method")
        assert len(failing) > 40 and all("next_beta" in str(j.complaints) for j in failing)


# ----------------------------------------------------------------------------------------------------------------------
# The examples pass what the README says


@pytest.mark.parametrize("name", ["trl_style", "textbook_float32"])
def test_right_ports_in_float32_pass_the_level_method_and_fail_near_the_reference(name, read):
    for baseline in ("arithmetic", "harmonic"):
        results = Results(Function(f"{ADAPTERS}:{name}", baseline=baseline), read)
        assert results.passes and results.failing("exact", "near the reference")


def test_state_left_over_from_an_optimizer_step_is_found(read, monkeypatch):
    from . import adapters

    end_of_step = adapters.PatchedTrainer.end_of_step

    def keeps(self, baseline):
        kept = list(self.steps)
        end_of_step(self, baseline)
        self.steps = kept

    monkeypatch.setattr(adapters.PatchedTrainer, "end_of_step", keeps)
    failing = Results(Function(adapters.trl_style), read).failing("method")
    assert {j.case["property"] for j in failing} == {"two optimizer steps"}


def test_table_shows_bf16_logits_failing_and_ours_passing():
    rows = scales.table([Function(f"{ADAPTERS}:{n}", n) for n in ("textbook_bfloat16", "ours")]).splitlines()
    assert "| 0 of " in rows[2] and rows[2].endswith("| 0% |")
    assert rows[3].startswith("| ours | 19 of 19 | 7 of 7 | 100%") and rows[3].count("100%") == 8


def test_ours_passes_with_the_authors_baseline_too(read):
    results = Results(Function(f"{ADAPTERS}:ours", baseline="harmonic"), read, level="exact")
    assert results.passes and not results.not_judged(), results.verdict()


# ----------------------------------------------------------------------------------------------------------------------
# Loading, and the command line


@pytest.mark.parametrize(
    "spec, told",
    [
        ("my_module", "expected package.module:function or file.py:function"),
        (":answer", "expected package.module:function or file.py:function"),
        ("no_such_package.x:answer", "found no module 'no_such_package'"),
        ("no_such_file.py:answer", "no file no_such_file.py"),
        ("theirs.py:anser", "theirs.py has no function 'anser'; it has answer"),
        ("broken.py:answer", "importing it raised ZeroDivisionError at broken.py:2: division by zero"),
        ("needs.py:answer", "importing it raised ModuleNotFoundError at needs.py:1: No module named 'nowhere'"),
    ],
)
def test_bad_names_of_an_implementation_are_one_clear_line(tmp_path, monkeypatch, spec, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("theirs.py").write_text("from json import loads\ndef answer(case): ...\n")
    Path("broken.py").write_text("\n1 / 0\n")
    Path("needs.py").write_text("import nowhere\n")
    with pytest.raises(UsageError) as error:
        load(spec)
    assert told in str(error.value) and "\n" not in str(error.value) and "loads" not in str(error.value)


def suite(tmp_path: Path, *arguments: str, pythonpath: Path | str | None = None) -> subprocess.CompletedProcess:
    """`python -m tests.conformance`, as a stranger starts it."""
    env = {**os.environ, "PYTHONPATH": str(pythonpath or "")}
    command = [sys.executable, "-m", "tests.conformance", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=env)


THEIRS = (
    "import sys\nfrom dataclasses import dataclass\nimport model, train, sibling\n"
    "@dataclass\nclass Settings:\n    name: 'str' = model.NAME + train.NAME + sibling.NAME\n"
    "from tests.conformance.mistakes import MISTAKES\n"
    "def right(case):\n    assert 'torch' not in sys.modules and 'pytest' not in sys.modules\n"
    "    assert Settings().name == 'theirs' * 3\n    return MISTAKES['float32_subtraction']().answer(case)\n"
    "def wrong(case): return MISTAKES['steps_swapped']().answer(case)\n"
)


def test_command_line_on_someone_elses_function(tmp_path):
    """A stranger's file beside modules named as ours are, without torch: green as a file and as a module of PYTHONPATH."""
    for name in ("model", "train", "sibling"):
        (tmp_path / f"{name}.py").write_text("NAME = 'theirs'\n")
    (tmp_path / "theirs.py").write_text(THEIRS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sibling.py").write_text("NAME = 'of another folder'\n")
    report, other = tmp_path / "report.json", tmp_path / "other"
    run = suite(tmp_path, "--impl", f"{tmp_path / 'theirs.py'}:right", "--report", str(report), pythonpath=other)
    assert run.returncode == 0 and "more properties fail" not in run.stdout, run.stdout + run.stderr
    assert "passes the level method (204 of 204 cases right); fails the level exact" in run.stdout
    told = json.loads(report.read_text(encoding="utf-8"))
    assert told["passes"] and told["failing"]["method"] == [] and "grad" in told["not_judged"]
    assert told["properties"]["branches"]["method"] == {"right": 12, "asked": 12}
    both = os.pathsep.join([str(ROOT), str(tmp_path)])  # ours is looked at last, wherever it stands
    run = suite(tmp_path, "--impl", "theirs:right", "--level", "exact", pythonpath=both)
    assert run.returncode == 1 and "cases fail with:" in run.stdout, run.stdout + run.stderr
    run = suite(tmp_path, "--impl", "theirs:wrong", pythonpath=tmp_path)
    assert run.returncode == 1 and "step[0]: expected 1, got -1" in run.stdout and "[steps_swapped]" in run.stdout
    assert re.search(r"\n[1-9]\d* more properties fail, see the table\.\n", run.stdout)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((), "expected --impl or --command"),
        (("--impl", "a:b", "--command", "c"), "--impl and --command: expected one of them, got both"),
        (("--impl", "a"), "--impl a: expected package.module:function"),
        (("--impl", "os:getcwd", "--expected-failures", "nowhere.txt"), "nowhere.txt"),
        (("--impl", "os:getcwd", "--expected-failures", sys.executable), "expected text in UTF-8"),
        (("--impl", "os:getcwd", "--report", "no/such/folder.json"), "no/such/folder.json"),
        (("--impl", "os:getcwd", "--report", "."), "directory"),
        (("--command", " "), "--command is empty"),
        *((("--impl", "os:getcwd", "--timeout", x), "--timeout must be") for x in ("0", "-1", "nan", "inf", "1e30")),
    ],
)
def test_bad_arguments_are_one_line(arguments, told, capsys, monkeypatch):
    monkeypatch.setattr("tests.conformance.__main__.users_modules_first", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    text = capsys.readouterr().err
    assert ended.value.code == 2 and told in text and text.count("\n") == 1


def run_pytest(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "pytest", "tests/conformance", "--confcutdir", "tests/conformance"]
    command = [*start, "-q", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=env)


def test_pytest_tests_property_by_property(tmp_path):
    (tmp_path / "theirs.py").write_text(
        "from tests.conformance.mistakes import MISTAKES\n"
        "def right(case): return MISTAKES['float32_subtraction']().answer(case)\n"
        "def wrong(case): return MISTAKES['mean_of_loss_means']().answer(case)\n"
        "def broken(case): return case['nothing']\n"
    )
    run = run_pytest(tmp_path, "--impl", "theirs:right")
    assert run.returncode == 0 and "passes the level method" in run.stdout and "xfailed" in run.stdout, run.stdout
    run = run_pytest(tmp_path, "--impl", "theirs:wrong")
    assert run.returncode == 1 and "[mean_of_loss_means]" in run.stdout and "fails the level method" in run.stdout
    run = run_pytest(tmp_path, "--impl", "theirs:broken")
    assert run.returncode == 1 and "1 failed" in run.stdout, "a crash is told once"
    for wrong in (("--command", "x"), ("--report", "."), ("--expected-failures", sys.executable), ("--timeout", "nan")):
        run = run_pytest(tmp_path, "--impl", "theirs:right", *wrong)
        assert run.returncode == 4 and "INTERNALERROR" not in run.stdout + run.stderr
